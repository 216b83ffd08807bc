/*
 * main_process.h - what one process of the job consists of: main.c and its parts fill it in, in the order of their calls.
 *
 * Thread: main.
 */
#ifndef FV_COORD_MAIN_PROCESS_H
#define FV_COORD_MAIN_PROCESS_H

#include "common/config.h"
#include "coord/auth.h"
#include "coord/heartbeat.h"
#include "coord/ledger.h"
#include "coord/link.h"
#include "coord/main_exchange.h"
#include "coord/main_repair.h"
#include "coord/main_store.h"
#include "worker/worker.h"

#include <stdbool.h>
#include <stdint.h>

/* The job's first epoch; a repair begins the next (main_repair.h). */
#define FV_MAIN_EPOCH 1U

/* One process of the job. */
typedef struct fv_process {
    fv_config_t config;
    char *const *argv;
    bool has_mpi;
    bool is_recruit; /* started in a lost rank's place (main_recruit.h) */
    fv_crew_t crew;
    int rank,
        n_ranks; /* of the service; a spare's is its number among the processes, until it is a rank */
    int n_world;                   /* processes: ranks, then spares */
    int local_rank, n_local_ranks; /* among the ranks of this host */
    bool is_with_coordinator;      /* rank 0 is on this host */
    const fv_backend_ops_t *backend;
    int32_t device;      /* cuda: of the GPUs that this process sees */
    fv_worker_t *worker; /* NULL: dedicated coordinator */
    fv_main_exchange_t exchange;
    fv_ctl_hello_t hello;
    fv_ctl_hello_t *hellos; /* rank 0: [n_world] */
    int *fds, *beat_fds;    /* [n_world] */
    fv_heartbeat_t *heartbeat;
    fv_link_t *link;
    fv_auth_t *auth; /* rank 0 */
    fv_main_store_t store;
    fv_ledger_t *ledger; /* rank 0 */
} fv_process_t;

#endif /* FV_COORD_MAIN_PROCESS_H */
