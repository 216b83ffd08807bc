/*
 * main_worker.h - a part of main.c: the life of every rank but 0, and of a spare.
 */
#ifndef FV_COORD_MAIN_WORKER_H
#define FV_COORD_MAIN_WORKER_H

#include "coord/main_process.h"

/*
 * On the others, after fv_main_meet(): does what rank 0 says on fds[0], from epoch to epoch, until told to stop. A spare
 * waits to be told whose place it takes. Logs its error. Returns the exit code. Thread: main.
 */
int fv_main_run_worker(fv_process_t *p);

#endif /* FV_COORD_MAIN_WORKER_H */
