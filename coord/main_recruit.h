/*
 * main_recruit.h - a part of main.c: a rank is lost, no spare waits, and a process is started in its place.
 *
 *   the others   MPI_Comm_spawn, all together; merge; in the order of the ranks: the communicator of the epoch, and the base
 *                of all later ones, for the new process is not in MPI_COMM_WORLD
 *   rank 0       says over MPI who the new one is, where to connect, and the job's secret
 *   the new one  connects, makes its worker over what the lost one has left, and says HELLO as a spare would
 *
 * None of MPI's part can be given up: it has the timer of a repair (common/deadline.h). On a host whose daemon is dead
 * a spawn ends the job, so it is only done where another process of the job lives (fv_recruit_can()).
 *
 * Thread: main (the engine).
 */
#ifndef FV_COORD_MAIN_RECRUIT_H
#define FV_COORD_MAIN_RECRUIT_H

#include "coord/main_process.h"

/* On rank 0: whether this job may start processes: the configuration wants it, and mpirun lets a job live on. */
bool fv_recruit_is_possible(const fv_config_t *config);

/* On rank 0: whether rank `rank` may be started anew. is_lost: [n_ranks]. Notes when it was allowed: not too often. */
bool fv_recruit_can(fv_crew_t *crew, const bool *is_lost, uint32_t rank);

/*
 * On every rank that is left: `present` is a communicator of them alone, in the order of their ranks. Starts those of
 * crew->is_recruit, makes crew->comm of all, and on rank 0 connects them.
 * Errors: FV_ERR_MPI; on rank 0 also those of fv_bootstrap_open() and fv_bootstrap_accept(), FV_ERR_NO_MEMORY.
 */
FV_MUST_CHECK fv_status_t fv_recruit_start(fv_crew_t *crew, MPI_Comm present, uint32_t own_rank);

/* True in a process that was started so; after MPI_Init. */
bool fv_recruit_is_one(void);

/* There: into the crew, and to rank 0's sockets. Fills in p as fv_main_join() and fv_main_meet() do, and *out. */
FV_MUST_CHECK fv_status_t fv_recruit_join(fv_process_t *p, fv_ctl_epoch_t *out);

#endif /* FV_COORD_MAIN_RECRUIT_H */
