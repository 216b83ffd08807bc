/*
 * fovead.h - a real fovead of the test's own, on a unix socket in a directory of its own.
 *
 * Environment: FV_TEST_FOVEAD, the program (set by ctest); FV_TEST_LAUNCH, words to put before it, e.g.
 * "mpirun -np 3": the same tests then run over several ranks.
 */
#ifndef FV_TESTS_CLIENT_FOVEAD_H
#define FV_TESTS_CLIENT_FOVEAD_H

#include "client/fovea.h"

#include <stdbool.h>
#include <sys/types.h>

typedef struct fv_fovead {
    pid_t pid;
    char dir[64];
    char address[96]; /* unix:DIR/s */
} fv_fovead_t;

/* Starts it and waits until it serves. `extra`: further arguments, NULL-terminated, or NULL. False: said why. */
bool fv_fovead_start(fv_fovead_t *out, const char *const *extra);

/* Drains it through the API and waits for its end; true when that was in order (exit code 0). */
bool fv_fovead_stop(fv_fovead_t *fovead);

/* Runs a program with stdout and stderr into `out` (cut to fit); its exit code, -1 when it did not exit. */
int fv_run_program(char *const *argv, char *out, size_t out_bytes);

#endif /* FV_TESTS_CLIENT_FOVEAD_H */
