/*
 * fuzz_token.c - any bytes as a token file.
 *
 * Checks: a refusal has a text of one line and never the token that stands in the corpus; what was read can be written and
 * read back to the same, hashes ascend and differ, and principals agree with themselves.
 */
#include "common/token.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* NOLINTNEXTLINE(readability-identifier-naming): the name is libFuzzer's */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static char g_path[64];

static void check(bool ok, const char *what)
{
    if (!ok) {
        (void)fprintf(stderr, "fuzz_token: %s (%s)\n", what, fv_error_context());
        abort();
    }
}

static void remove_file(void)
{
    (void)unlink(g_path);
}

/* One file a process, removed at its end. */
static void write_file(const uint8_t *data, size_t n_bytes)
{
    if (g_path[0] == '\0') {
        const char *folder = (access("/dev/shm", W_OK) == 0) ? "/dev/shm" : "/tmp";

        (void)snprintf(g_path, sizeof(g_path), "%s/fv_fuzz_token_%ld", folder, (long)getpid());
        check(atexit(remove_file) == 0, "atexit");
    }
    FILE *file = fopen(g_path, "we");
    check((file != NULL) && (fwrite(data, 1, n_bytes, file) == n_bytes) && (fclose(file) == 0),
          "written");
    check(chmod(g_path, 0600) == 0, "chmod");
}

static void check_line(const fv_token_line_t *line)
{
    char text[FV_TOKEN_LINE_BYTES];
    char again[FV_TOKEN_LINE_BYTES];
    fv_token_line_t back;

    fv_token_line_format(line, text);
    check(fv_token_line_parse(text, &back) == FV_OK, "what was written is refused");
    fv_token_line_format(&back, again);
    check(strcmp(text, again) == 0, "what was written differs");
    check(fv_token_name_is_valid(line->name), "a name that is none");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    fv_token_line_t *lines = NULL;
    size_t n = 0;

    write_file(data, n_bytes);
    if (fv_token_file_load(g_path, &lines, &n) != FV_OK) {
        check(fv_error_context()[0] != '\0', "a refusal without a text");
        check(strchr(fv_error_context(), '\n') == NULL, "a refusal of several lines");
        check(strstr(fv_error_context(), " fv_5eC") == NULL, "a refusal repeats a token");
        return 0;
    }
    for (size_t i = 0; i < n; i++) {
        check_line(&lines[i]);
        check((i == 0) || (memcmp(lines[i - 1U].sha256, lines[i].sha256, FV_SHA256_BYTES) < 0),
              "hashes do not ascend");
    }
    free(lines);
    return 0;
}
