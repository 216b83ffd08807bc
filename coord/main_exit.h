/*
 * main_exit.h - a part of main.c: what a process says when it ends.
 */
#ifndef FV_COORD_MAIN_EXIT_H
#define FV_COORD_MAIN_EXIT_H

#include "common/status.h"
#include "coord/main_process.h"

/* Exit codes. */
enum {
    FV_EXIT_CLEAN = 0,     /* clean stop */
    FV_EXIT_START = 1,     /* start-up failed */
    FV_EXIT_USAGE = 2,     /* usage or configuration */
    FV_EXIT_RANK_LOST = 3, /* a rank was lost */
    FV_EXIT_SERVING = 4,   /* failed while serving */
    FV_EXIT_FENCED = 5,    /* cut off from the coordinator */
};

/* Of a process that has served, and ended with `status`. */
int fv_main_exit_code(fv_status_t status);

/*
 * Writes `code` into the file that the environment's FOVEA_EXIT_FILE names; nothing without one. Rank 0 adds the hosts that
 * were cut off. A file that can not be written is left out: nobody is there to be told.
 */
void fv_main_write_exit_file(const fv_process_t *p, int code);

#endif /* FV_COORD_MAIN_EXIT_H */
