/*
 * main_repair.h - a part of main.c: which process is which rank, and how a spare becomes one.
 *
 *   processes   rank 0 | ranks 1 .. n_ranks-1 | spares, the last ones: numbers of MPI_COMM_WORLD. One that is started in a lost
 *               one's place (main_recruit.h) has its number
 *   epoch       a communicator of the service's ranks alone, in their order, whichever processes they are
 *
 * A rank that is lost: rank 0 alone says so, picks a spare, or, where none waits, has a process started, and tells all that are
 * left and the spare who is who in the next epoch. All of them, and nobody else, make its communicator:
 * MPI_Comm_create_group() needs only those who take part. It can not be given up, so it has a timer that ends the process (common/deadline.h): a second death in those
 * milliseconds ends the job, and its launcher starts it again.
 *
 * Thread: main (the engine).
 */
#ifndef FV_COORD_MAIN_REPAIR_H
#define FV_COORD_MAIN_REPAIR_H

#include "common/config.h"
#include "common/journal.h"
#include "coord/engine.h"
#include "coord/heartbeat.h"
#include "coord/link.h"
#include "coord/main_exchange.h"

#include <mpi.h>

#include <stdatomic.h>

#define FV_CREW_NOBODY UINT32_MAX

/* A rank that was lost, and what its process had said of itself. */
typedef struct fv_loss {
    uint32_t rank;
    fv_ctl_hello_t hello;
} fv_loss_t;

typedef struct fv_crew {
    MPI_Comm comm; /* of the epoch */
    MPI_Comm
        base; /* has all processes that may still be members: MPI_COMM_WORLD, or the last communicator with a recruit */
    uint32_t epoch, n_ranks, n_world;
    uint32_t deadline_ms;             /* of a repair, what reading logs takes not counted */
    int lost_code;                    /* the process ends with it when the deadline passes */
    uint32_t members[FV_RANKS_MAX];   /* processes by rank */
    uint32_t seats[FV_RANKS_MAX];     /* places in base by process */
    uint8_t is_recruit[FV_RANKS_MAX]; /* by rank: is being started, in this epoch */
    fv_main_exchange_t *exchange;     /* own */
    fv_worker_t *worker;              /* own, NULL: none */
    /* rank 0 alone */
    uint32_t n_losses; /* of the repair that is under way */
    fv_loss_t losses[FV_REPAIRED_MAX];
    bool may_recruit;
    uint32_t n_recruited; /* since recruited_us */
    int64_t recruited_us;
    const fv_config_t *config;
    char job[FV_JOURNAL_JOB_BYTES]; /* of the stores */
    char *const *argv;              /* of this process, for those that are started */
    const int *fds;                 /* [n_world] control sockets, as at start */
    fv_ctl_hello_t *hellos; /* [n_world], by rank for the ranks, by process for the spares */
    fv_link_t *link;
    fv_heartbeat_t *heartbeat;
    atomic_uint rank_of[FV_RANKS_MAX];  /* ranks by process, FV_CREW_NOBODY: a spare, or lost */
    atomic_bool is_spare[FV_RANKS_MAX]; /* by process: waits */
} fv_crew_t;

/* Before anything else: processes 0 .. n_ranks-1 are the ranks. */
void fv_crew_init(fv_crew_t *crew, uint32_t n_ranks, uint32_t n_world, uint32_t epoch);
/* The communicator of crew->members; on every one of them but recruits. own_rank: the caller's in the epoch. */
FV_MUST_CHECK fv_status_t fv_crew_make_comm(fv_crew_t *crew, uint32_t own_rank);
/* Takes over who is who in the epoch of `message`. Errors: FV_ERR_PROTOCOL. */
FV_MUST_CHECK fv_status_t fv_crew_adopt(fv_crew_t *crew, const fv_ctl_epoch_t *message);
/* A process was not heard. Thread: any. */
void fv_crew_note_silent(fv_crew_t *crew, uint32_t process, uint32_t silent_ms);

/* On rank 0; `crew` is a fv_crew_t *. See fv_engine_config_t.repair. */
FV_MUST_CHECK fv_status_t fv_crew_repair(void *crew, fv_repaired_t *out);

/* On rank 0: what rank `rank` is told of the epoch. */
void fv_crew_tell(const fv_crew_t *crew, uint32_t rank, fv_ctl_epoch_t *out);

/* Those that still wait leave. */
void fv_crew_stop_spares(fv_crew_t *crew);

/* On the others: into the epoch of `message`. The caller then answers with fv_crew_answer(). */
FV_MUST_CHECK fv_status_t fv_crew_follow(fv_crew_t *crew, const fv_ctl_epoch_t *message);
FV_MUST_CHECK fv_status_t fv_crew_answer(const fv_crew_t *crew,
                                         int fd,
                                         const fv_ctl_hello_t *hello);

/* A spare sleeps here. *out_is_stop: the service has ended; else `out` makes it a rank. Errors: FV_ERR_RANK_LOST. */
FV_MUST_CHECK fv_status_t fv_crew_wait_as_spare(int fd, bool *out_is_stop, fv_ctl_epoch_t *out);

#endif /* FV_COORD_MAIN_REPAIR_H */
