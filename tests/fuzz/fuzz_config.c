/*
 * fuzz_config.c - any bytes as a configuration file, as environment, as command line.
 *
 * Input: byte 0 picks one of the three; the rest is the file, or words separated by NUL.
 * Checks: a refusal has a text; what was read can be printed and read back to the same.
 */
#include "common/config.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WORDS_MAX 32
#define TEXT_MAX  4096

/* NOLINTNEXTLINE(readability-identifier-naming): the name is libFuzzer's */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static char g_path[64];

static void check(bool ok, const char *what)
{
    if (!ok) {
        (void)fprintf(stderr, "fuzz_config: %s (%s)\n", what, fv_error_context());
        abort();
    }
}

static void remove_file(void)
{
    (void)unlink(g_path);
}

/* One file a process, removed at its end. */
static void make_file(void)
{
    if (g_path[0] == '\0') {
        const char *folder = (access("/dev/shm", W_OK) == 0) ? "/dev/shm" : "/tmp";

        (void)snprintf(g_path, sizeof(g_path), "%s/fv_fuzz_config_%ld", folder, (long)getpid());
        check(atexit(remove_file) == 0, "atexit");
    }
}

static fv_status_t load_file(fv_config_t *out)
{
    char program[] = "fovead";
    char option[] = "--config";
    char *argv[] = {program, option, g_path, NULL};

    return fv_config_load(3, argv, NULL, out);
}

static void check_printed(const fv_config_t *config)
{
    fv_config_t back;
    FILE *file = fopen(g_path, "wb");

    check(file != NULL, "file");
    fv_config_print(config, file);
    check(fclose(file) == 0, "written");
    check(load_file(&back) == FV_OK, "what was printed is refused");
    for (uint32_t i = 0; i < config->listen.n; i++) {
        check(strcmp(back.listen.text[i], config->listen.text[i]) == 0, "listen differs");
    }
    static fv_config_t copy; /* large for a stack */
    copy = *config;          /* only the sources may differ */
    copy.action = back.action;
    memset(&copy.listen, 0, sizeof(copy.listen));
    memset(&back.listen, 0, sizeof(back.listen));
    /* NOLINTNEXTLINE(bugprone-suspicious-memory-comparison): both begin as zero bytes */
    check(memcmp(&copy, &back, sizeof(copy)) == 0, "what was printed differs");
}

/* Words of the input; ones that would read other files are left out. */
static int split(char *text, size_t n_bytes, char **words, int n_words)
{
    for (size_t at = 0; (at < n_bytes) && (n_words < WORDS_MAX); at += strlen(text + at) + 1U) {
        if ((strncmp(text + at, "--conf", 6) != 0) && (strncmp(text + at, "FV_CONFIG", 9) != 0)) {
            words[n_words++] = text + at;
        }
    }
    words[n_words] = NULL;
    return n_words;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    char text[TEXT_MAX + 1];
    char program[] = "fovead";
    char *words[WORDS_MAX + 1] = {program};
    fv_status_t status = FV_OK;
    static fv_config_t config; /* large for a stack */

    if ((n_bytes == 0) || (n_bytes > TEXT_MAX)) {
        return 0;
    }
    make_file();
    memcpy(text, data + 1, n_bytes - 1U);
    text[n_bytes - 1U] = '\0';
    if (data[0] % 3U == 0) {
        FILE *file = fopen(g_path, "wb");

        check(file != NULL, "file");
        check(fwrite(text, 1, n_bytes - 1U, file) == n_bytes - 1U, "written");
        check(fclose(file) == 0, "closed");
        status = load_file(&config);
    } else if (data[0] % 3U == 1) {
        (void)split(text, n_bytes - 1U, words, 0);
        status = fv_config_load(0, NULL, words, &config);
    } else {
        int argc = split(text, n_bytes - 1U, words, 1);

        status = fv_config_load(argc, words, NULL, &config);
    }
    if (status == FV_OK) {
        check_printed(&config);
    } else {
        check(fv_error_context()[0] != '\0', "refused without a text");
    }
    return 0;
}
