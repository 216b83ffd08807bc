/*
 * exchange_nccl.h - the state of the exchange between GPUs: for the exchange_nccl*.c files only.
 *
 * exchange_nccl.c        a step: where messages lie, what moves them, how a step fails
 * exchange_nccl_comm.c   the life: communicator, window, who reaches whom; every wait bounded
 * exchange_nccl_lsa.cu   asks NCCL's device interface where the peers' windows are
 */
#ifndef FV_WORKER_EXCHANGE_NCCL_H
#define FV_WORKER_EXCHANGE_NCCL_H

#include "worker/exchange_regions.h"
#include "worker/worker.h"
#include "worker/workspace.h"

#include <cuda_runtime_api.h>
#include <nccl.h>

/* What this rank knows of another one. */
typedef struct fv_nccl_peer {
    uint8_t *window; /* its window, as this device reaches it; NULL: it does not */
    uint32_t source; /* its place in this rank's window; this rank's in its own is self_source */
    uint32_t seq;    /* steps of the pair so far */
} fv_nccl_peer_t;

struct fv_exchange_nccl {
    fv_exchange_nccl_config_t config;
    ncclComm_t comm;
    int32_t version;           /* of the library that is loaded */
    cudaStream_t setup_stream; /* of creation only */
    fv_backend_t *backend;
    cudaStream_t stream; /* the backend's */

    uint8_t *window; /* NULL: everything goes by send and receive */
    ncclWindow_t handle;
    size_t window_bytes;
    fv_exchange_regions_t regions;
    uint32_t self_source;
    uint32_t n_reached;    /* others */
    fv_nccl_peer_t *peers; /* [n_ranks], by rank of the service */

    uint8_t *spill; /* device memory for what no region takes, grow-only */
    size_t spill_bytes;

    fv_array_t pairs;      /* fv_merge_pair_t, of the step under way */
    fv_array_t pair_ranks; /* uint32_t: the rank of each */
    fv_merge_sync_t sync;
    bool has_collective;      /* the step under way has messages by send and receive */
    volatile uint32_t *words; /* mapped host memory: abort, gave up */

    bool (*is_gone)(void *arg);
    void *arg;
    bool broken;
};

/* FV_OK, or FV_ERR_RANK_LOST for what a peer did, else FV_ERR_NCCL; with the call and the library's text. */
FV_MUST_CHECK fv_status_t fv_nccl_check(ncclResult_t result, const char *call);

/* Waits until the communicator has done what `call` asked of it. Errors: also FV_ERR_TIMED_OUT, FV_ERR_RANK_LOST. */
FV_MUST_CHECK fv_status_t fv_nccl_settle(const fv_exchange_nccl_t *exchange,
                                         ncclResult_t result,
                                         const char *call);

/* Aborts the communicator on a thread of its own, and waits for that thread a bounded time. */
void fv_nccl_abort(fv_exchange_nccl_t *exchange);

/* Device memory of at least n_bytes at exchange->spill; nothing may be under way. */
FV_MUST_CHECK fv_status_t fv_nccl_reserve_spill(fv_exchange_nccl_t *exchange, size_t n_bytes);

#endif /* FV_WORKER_EXCHANGE_NCCL_H */
