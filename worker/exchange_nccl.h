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

struct fv_exchange_nccl {
    fv_exchange_nccl_config_t config;
    ncclComm_t comm;
    int32_t version;           /* of the library that is loaded */
    cudaStream_t setup_stream; /* of creation only */
    fv_backend_t *backend;
    cudaStream_t stream; /* the backend's */

    fv_exchange_place_t place; /* its window is ours; its spill is grow-only device memory */
    ncclWindow_t handle;
    size_t window_bytes, spill_bytes;
    uint32_t n_reached; /* other ranks */
    fv_merge_sync_t sync;
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

/* Device memory of at least n_bytes at exchange->place.spill; nothing may be under way. */
FV_MUST_CHECK fv_status_t fv_nccl_reserve_spill(fv_exchange_nccl_t *exchange, size_t n_bytes);

#endif /* FV_WORKER_EXCHANGE_NCCL_H */
