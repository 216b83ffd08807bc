/*
 * main_ranks.h - a part of main.c: this process among those of the job, from MPI_Init to the control sockets.
 *
 * Thread: main, at start. What is collective is called by every process of the job, spares too, whatever it found out alone.
 */
#ifndef FV_COORD_MAIN_RANKS_H
#define FV_COORD_MAIN_RANKS_H

#include "common/status.h"
#include "coord/main_process.h"

#include <stdbool.h>

/* Waits to become a rank. After fv_main_join(). */
bool fv_main_is_spare(const fv_process_t *p);

/*
 * Collective. Alone (not started by mpirun or srun): one rank, and MPI is not entered. Else rank, n_ranks, n_world, who shares
 * the host, and crew with the first epoch's communicator. Reads config. A recruit only learns that it is one (is_recruit).
 * Errors: FV_ERR_MPI; FV_ERR_INVALID_ARG for more ranks than there can be, or spares that leave fewer than two.
 */
FV_MUST_CHECK fv_status_t fv_main_join(fv_process_t *p);

/* Collective. True when every process passed FV_OK; one that did not logs its error. */
bool fv_main_said_fine(const fv_process_t *p, fv_status_t status);

/*
 * Collective, after fv_main_start_parts(). Every rank introduces itself to rank 0, and heartbeats begin: fills in hellos, fds,
 * beat_fds, heartbeat, and on rank 0 link and its parts of crew. Of a single rank only hellos[0].
 * Errors: FV_ERR_NO_MEMORY; those of fv_bootstrap(), fv_link_create() and fv_main_heartbeat_start().
 */
FV_MUST_CHECK fv_status_t fv_main_meet(fv_process_t *p);

#endif /* FV_COORD_MAIN_RANKS_H */
