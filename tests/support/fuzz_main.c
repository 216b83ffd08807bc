/*
 * fuzz_main.c - replays files through a fuzz target, where libFuzzer is not linked.
 *
 * Usage: fuzz_x PATH...    each a file, or a directory whose files are all run. A failure aborts, as under
 * libFuzzer. No file at all is a failure too: an empty corpus tests nothing.
 */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define PATH_BYTES 1024
#define INPUT_MAX  (1U << 20U)

/* NOLINTNEXTLINE(readability-identifier-naming): the name is libFuzzer's */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

/* The bytes in a block of exactly their size, so that a read past the end is caught. */
static int run_file(const char *path)
{
    static uint8_t bytes[INPUT_MAX];
    FILE *file = fopen(path, "rb");

    if (file == NULL) {
        (void)fprintf(stderr, "%s: cannot be opened\n", path);
        return -1;
    }
    size_t n = fread(bytes, 1, sizeof(bytes), file);
    (void)fclose(file);
    uint8_t *exact = malloc((n > 0) ? n : 1U);
    if (exact == NULL) {
        return -1;
    }
    memcpy(exact, bytes, n);
    (void)LLVMFuzzerTestOneInput(exact, n);
    free(exact);
    return 1;
}

/* Number of files run, -1 on failure. */
static int run_directory(const char *path)
{
    char full[PATH_BYTES];
    int n_files = 0;
    DIR *dir = opendir(path);

    if (dir == NULL) {
        return -1;
    }
    /* NOLINTNEXTLINE(concurrency-mt-unsafe): one thread */
    for (struct dirent *e = readdir(dir); (e != NULL) && (n_files >= 0); e = readdir(dir)) {
        if (e->d_name[0] == '.') {
            continue;
        }
        if (snprintf(full, sizeof(full), "%s/%s", path, e->d_name) >= (int)sizeof(full)) {
            n_files = -1;
        } else {
            n_files = (run_file(full) < 0) ? -1 : (n_files + 1);
        }
    }
    (void)closedir(dir);
    return n_files;
}

int main(int argc, char **argv)
{
    int n_files = 0;

    for (int i = 1; i < argc; i++) {
        struct stat info;
        int n = -1;

        if (stat(argv[i], &info) == 0) {
            n = S_ISDIR(info.st_mode) ? run_directory(argv[i]) : run_file(argv[i]);
        }
        if (n < 0) {
            (void)fprintf(stderr, "%s: cannot be read\n", argv[i]);
            return EXIT_FAILURE;
        }
        n_files += n;
    }
    (void)printf("%d inputs\n", n_files);
    return (n_files > 0) ? EXIT_SUCCESS : EXIT_FAILURE;
}
