/*
 * config_file.c - the configuration file: lines of `key = value`, comments from # or ; on.
 */
#include "common/config_table.h"

#include <stdbool.h>
#include <string.h>

#define LINE_BYTES 1024 /* longer than the longest key and value that there are */
#define SPACES     " \t\r\v\f"

typedef struct file_reader {
    FILE *stream;
    fv_config_t *config;
    fv_source_t source; /* its line: the one being read */
    char line[LINE_BYTES];
} file_reader_t;

static fv_status_t file_fail(const file_reader_t *reader, const char *given, const char *expected)
{
    return fv_fail(FV_ERR_INVALID_ARG, "%.80s:%d: given %.60s, expected %s", reader->source.name,
                   reader->source.line, given, expected);
}

/* *out_is_end: there is none. */
static fv_status_t read_line(file_reader_t *reader, bool *out_is_end)
{
    size_t n = 0;
    int c = fgetc(reader->stream);

    *out_is_end = c == EOF;
    reader->source.line++;
    for (; (c != EOF) && (c != '\n'); c = fgetc(reader->stream)) {
        if (c == '\0') {
            return file_fail(reader, "a byte of value 0", "text");
        }
        if (n + 1U == sizeof(reader->line)) {
            return file_fail(reader, "a longer line", "fewer characters");
        }
        reader->line[n++] = (char)c;
    }
    reader->line[n] = '\0';
    return FV_OK;
}

static void trim_end(char *text)
{
    size_t n = strlen(text);

    while ((n > 0) && (strchr(SPACES, text[n - 1U]) != NULL)) {
        text[--n] = '\0';
    }
}

/* A comment behind a value begins with a space and a semicolon. */
static void cut_comment(char *value)
{
    for (char *at = strchr(value, ';'); at != NULL; at = strchr(at + 1, ';')) {
        if ((at == value) || (strchr(SPACES, at[-1]) != NULL)) {
            *at = '\0';
            return;
        }
    }
}

static fv_status_t take_line(file_reader_t *reader)
{
    char *text = reader->line;

    if ((reader->source.line == 1) && (strncmp(text, "\xEF\xBB\xBF", 3) == 0)) {
        text += 3; /* a byte order mark */
    }
    text += strspn(text, SPACES);
    if ((text[0] == '\0') || (text[0] == '#') || (text[0] == ';')) {
        return FV_OK;
    }
    if (text[0] == '[') {
        return file_fail(reader, "a [section]", "key = value only");
    }
    char *sign = text + strcspn(text, "=:");
    if (*sign == '\0') {
        return fv_fail(FV_ERR_INVALID_ARG, "%.120s:%d: expected key = value", reader->source.name,
                       reader->source.line);
    }
    *sign = '\0';
    trim_end(text);
    char *value = sign + 1 + strspn(sign + 1, SPACES);
    cut_comment(value);
    trim_end(value);
    const fv_option_t *option = fv_option_find(text);
    if (option == NULL) {
        return file_fail(reader, text, "a key that --print-config shows");
    }
    return fv_option_set(option, value, &reader->source, reader->config);
}

fv_status_t fv_config_read_file(const char *path, fv_config_t *config)
{
    file_reader_t reader = {.config = config, .source = {.kind = FV_SOURCE_FILE, .name = path}};
    fv_status_t status = FV_OK;
    bool is_end = false;

    reader.stream = fopen(path, "re");
    while ((reader.stream != NULL) && (status == FV_OK) && !is_end) {
        status = read_line(&reader, &is_end);
        if ((status == FV_OK) && !is_end) {
            status = take_line(&reader);
        }
    }
    /* a directory, or a disk that fails */
    if ((reader.stream == NULL) || (ferror(reader.stream) != 0)) {
        status = fv_fail(FV_ERR_NOT_FOUND,
                         "config: given \"%.160s\", expected a file that can be read", path);
    }
    if (reader.stream != NULL) {
        (void)fclose(reader.stream);
    }
    return status;
}
