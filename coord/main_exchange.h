/*
 * main_exchange.h - which GPU a rank takes, and how the ranks exchange partial states. A part of main.c.
 *
 * Thread: main, at start. All calls are collective: every rank of the job makes them, whatever it found out alone.
 */
#ifndef FV_COORD_MAIN_EXCHANGE_H
#define FV_COORD_MAIN_EXCHANGE_H

#include "common/config.h"
#include "worker/worker.h"

#define FV_MAIN_EXCHANGE_TEXT 160

/* A process's place in the job. comm: its MPI_Comm, not used when n_ranks is 1. */
typedef struct fv_main_place {
    void *comm;
    int rank, n_ranks;
    int local_rank, n_local_ranks; /* among the ranks of this host */
    bool is_with_coordinator;      /* rank 0 is on this host */
    bool is_dedicated;             /* rank 0 is the coordinator only */
} fv_main_place_t;

/* The exchange of a rank. ops NULL: single rank, or no worker. */
typedef struct fv_main_exchange {
    const fv_exchange_ops_t *ops;
    void *ctx;
    const char *name;                 /* "none", "mpi", "nccl", "nccl-collective" */
    char text[FV_MAIN_EXCHANGE_TEXT]; /* for people */
} fv_main_exchange_t;

/* The GPU of this rank's worker among those it sees: dealt out in turn over the workers of the host. */
int32_t fv_main_device(const fv_main_place_t *place, int32_t n_devices);

/* Workers of this host that have the same GPU as this one. */
int32_t fv_main_device_sharers(const fv_main_place_t *place, int32_t n_devices);

/*
 * Agrees on the exchange that `config` asks for and opens it; with backend cuda before the worker, whose memory is what
 * is left. Errors, on every rank: FV_ERR_INVALID_ARG when nccl is asked for and can not be; NCCL's. "auto" falls back to
 * MPI and says why.
 */
FV_MUST_CHECK fv_status_t fv_main_exchange_open(const fv_main_place_t *place,
                                                const fv_config_t *config,
                                                const fv_backend_ops_t *backend,
                                                int32_t device,
                                                fv_main_exchange_t *out);

/*
 * Of one rank alone, in another epoch: opens the exchange of a rank that is new, or goes on with that of one that is not, over
 * place's new communicator. Errors: FV_ERR_UNIMPLEMENTED for an exchange between GPUs.
 */
FV_MUST_CHECK fv_status_t fv_main_exchange_renew(void *comm, fv_main_exchange_t *exchange);

/* After the worker. */
void fv_main_exchange_close(fv_main_exchange_t *exchange);

#endif /* FV_COORD_MAIN_EXCHANGE_H */
