/*
 * token_file.c - a whole token file: its lines, and what must hold between them.
 */
#include "common/token.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

typedef struct fv_token_list {
    fv_token_line_t *lines;
    size_t n, cap;
} fv_token_list_t;

static fv_status_t add(fv_token_list_t *list, const fv_token_line_t *line)
{
    if (list->n == FV_TOKENS_MAX) {
        return fv_fail(FV_ERR_INVALID_ARG, "given more than %d tokens", FV_TOKENS_MAX);
    }
    if (list->n == list->cap) {
        size_t cap = (list->cap == 0) ? 64U : (2U * list->cap);
        fv_token_line_t *lines = realloc(list->lines, cap * sizeof(*lines));
        if (lines == NULL) {
            return fv_fail(FV_ERR_NO_MEMORY, "%zu tokens", cap);
        }
        list->lines = lines;
        list->cap = cap;
    }
    list->lines[list->n++] = *line;
    return FV_OK;
}

static fv_status_t add_text(fv_token_list_t *list, char *text)
{
    fv_token_line_t line;
    size_t n = strlen(text);

    if ((n + 1U == FV_TOKEN_LINE_BYTES) && (text[n - 1U] != '\n')) {
        return fv_fail(FV_ERR_INVALID_ARG, "given a longer line, expected fewer than %d characters",
                       FV_TOKEN_LINE_BYTES);
    }
    text[strcspn(text, "\n")] = '\0';
    if ((text[0] == '#') || (text[strspn(text, " \t\r")] == '\0')) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_token_line_parse(text, &line));
    return add(list, &line);
}

/* "path:line: " before the text of the error that `status` is. */
static fv_status_t at_line(fv_status_t status, const char *path, int line)
{
    fv_error_t error = fv_error_capture(status);

    return fv_fail(status, "%.100s:%d: %.140s", path, line, error.text);
}

static fv_status_t read_all(FILE *file, const char *path, fv_token_list_t *list)
{
    char text[FV_TOKEN_LINE_BYTES];

    for (int line = 1; fgets(text, sizeof(text), file) != NULL; line++) {
        fv_status_t status = add_text(list, text);
        if (status != FV_OK) {
            return at_line(status, path, line);
        }
    }
    fv_secret_wipe(text, sizeof(text));
    if (ferror(file) != 0) { /* half a file would revoke the other half */
        return fv_fail(FV_ERR_SYSTEM, "%.100s: reading failed", path);
    }
    return FV_OK;
}

/* ------------------------------------------------------------------ between the lines */

static int by_hash(const void *a, const void *b)
{
    return memcmp(((const fv_token_line_t *)a)->sha256, ((const fv_token_line_t *)b)->sha256,
                  FV_SHA256_BYTES);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const fv_token_line_t *)a)->name, ((const fv_token_line_t *)b)->name);
}

static bool is_same_principal(const fv_token_line_t *a, const fv_token_line_t *b)
{
    return (a->role == b->role) && (memcmp(&a->quota, &b->quota, sizeof(a->quota)) == 0);
}

static fv_status_t check_together(fv_token_list_t *list, const char *path)
{
    if (list->n == 0) {
        return FV_OK;
    }
    qsort(list->lines, list->n, sizeof(*list->lines), by_name);
    for (size_t i = 1; i < list->n; i++) {
        if ((by_name(&list->lines[i - 1U], &list->lines[i]) == 0) &&
            !is_same_principal(&list->lines[i - 1U], &list->lines[i])) {
            return fv_fail(FV_ERR_INVALID_ARG,
                           "%.100s: %s: two lines with different roles or quotas", path,
                           list->lines[i].name);
        }
    }
    qsort(list->lines, list->n, sizeof(*list->lines), by_hash);
    for (size_t i = 1; i < list->n; i++) {
        if (by_hash(&list->lines[i - 1U], &list->lines[i]) == 0) {
            return fv_fail(FV_ERR_INVALID_ARG, "%.100s: %s and %s: the same token twice", path,
                           list->lines[i - 1U].name, list->lines[i].name);
        }
    }
    return FV_OK;
}

fv_status_t fv_token_file_load(const char *path, fv_token_line_t **out, size_t *out_n)
{
    fv_token_list_t list = {0};
    struct stat about;
    FILE *file = fopen(path, "re");

    if ((file == NULL) || (fstat(fileno(file), &about) != 0) || !S_ISREG(about.st_mode)) {
        fv_status_t status = fv_fail(FV_ERR_NOT_FOUND, "%.100s: %s", path,
                                     (file == NULL) ? strerror(errno) : "not a file");
        if (file != NULL) {
            (void)fclose(file);
        }
        return status;
    }
    fv_status_t status = FV_OK;
    if ((about.st_mode & S_IWOTH) != 0) {
        status = fv_fail(FV_ERR_INVALID_ARG,
                         "%.100s: given mode %03o, expected one that others cannot write", path,
                         (unsigned)about.st_mode & 0777U);
    }
    if (status == FV_OK) {
        status = read_all(file, path, &list);
    }
    (void)fclose(file);
    if (status == FV_OK) {
        status = check_together(&list, path);
    }
    if (status != FV_OK) {
        free(list.lines);
        return status;
    }
    *out = list.lines;
    *out_n = list.n;
    return FV_OK;
}
