/*
 * main_exit.c - what a process says when it ends: its exit code, and the file that repeats it.
 */
#include "coord/main_exit.h"

#include "coord/link.h"

#include <stdio.h>
#include <stdlib.h>

int fv_main_exit_code(fv_status_t status)
{
    if (status == FV_OK) {
        return FV_EXIT_CLEAN;
    }
    return ((status == FV_ERR_RANK_LOST) || (status == FV_ERR_TIMED_OUT)) ? FV_EXIT_RANK_LOST
                                                                          : FV_EXIT_SERVING;
}

/* For launchers that hide the exit code of a rank, as mpirun with recovery does; and hosts to be left out. */
void fv_main_write_exit_file(const fv_process_t *p, int code)
{
    const char *path = getenv("FOVEA_EXIT_FILE"); /* NOLINT(concurrency-mt-unsafe) */
    FILE *file = (path == NULL) ? NULL : fopen(path, "w");

    if (file != NULL) {
        (void)fprintf(file, "%d\n", code);
        for (int r = 1; (p->link != NULL) && (r < p->n_ranks); r++) {
            if (fv_link_is_cut_off(p->link, (uint32_t)r)) {
                (void)fprintf(file, "cut-off %s\n", p->hellos[r].host);
            }
        }
        (void)fclose(file);
    }
}
