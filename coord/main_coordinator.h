/*
 * main_coordinator.h - a part of main.c: rank 0's life from the open door to the last answer.
 */
#ifndef FV_COORD_MAIN_COORDINATOR_H
#define FV_COORD_MAIN_COORDINATOR_H

#include "coord/main_process.h"

/*
 * On rank 0, after fv_main_meet(): opens tokens and ledger, takes up again what earlier runs have left, listens, and serves until
 * a signal on `signal_fd` (a signalfd) has been followed by the drain, or something is lost. Then stops heartbeats, ranks and
 * spares. Logs its errors. Returns the exit code. Thread: main, which is the engine's meanwhile.
 */
int fv_main_run_coordinator(fv_process_t *p, int signal_fd);

#endif /* FV_COORD_MAIN_COORDINATOR_H */
