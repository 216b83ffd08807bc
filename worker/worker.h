/*
 * worker.h - one rank's share of the service: KV pool, page tables, and the step.
 *
 * The only header of worker/ that others (coord/main_*, tests, bench) include. A worker executes what the
 * coordinator decided: it never places anything. Rank 0's worker is called directly by the coordinator's engine
 * (through coord/link.h); the others run fv_worker_serve() on their control socket.
 *
 * Thread: every call from one thread, the rank's compute thread (it is also the only one that calls MPI).
 */
#ifndef FV_WORKER_WORKER_H
#define FV_WORKER_WORKER_H

#include "common/status.h"
#include "common/store.h"
#include "kernels/kernels.h"
#include "proto/control.h"
#include "proto/step.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct fv_worker fv_worker_t;

/* One contiguous buffer to or from a peer rank. */
typedef struct fv_exchange_message {
    uint32_t peer; /* rank */
    void *data;    /* sends only read it */
    size_t n_bytes;
} fv_exchange_message_t;

/* A peer of a step of a device exchange: what goes to it and comes from it. Not both sizes are 0. */
typedef struct fv_exchange_peer {
    uint32_t rank;
    size_t send_bytes, recv_bytes;
    uint8_t *send, *recv; /* set by begin(): where the devices write the one and read the other */
} fv_exchange_peer_t;

/*
 * The exchange door: one packed all-to-all a step, sparse: at most one message each way per peer, none where
 * there is nothing to say. It is of one of two kinds.
 *
 * Over host memory (begin == NULL): all_to_all() moves finished messages. It returns when all have arrived and all
 * sends may be reused. Errors: FV_ERR_TIMED_OUT past deadline_ms; FV_ERR_RANK_LOST when `is_aborted` says so; FV_ERR_MPI.
 *
 * Between devices (begin != NULL): messages lie in memory that the exchange gives, which the device reaches and the
 * host does not, and nothing is waited for until the step's finish():
 *     attach  once, when the backend exists
 *     begin   before attend: says where each message of the step is written and read; `own` has room for own_bytes
 *     run     after attend was enqueued: enqueues what moves messages; *out_sync is what merge() must wait for
 *     bring   see there; a step that has brought something has an end(), if it has no begin()
 *     end     after finish(), with its status; FV_OK, or why the step failed. After an error nothing works any more.
 * Both ends of a pair call begin() for the same steps in the same order, with the same two sizes.
 */
typedef struct fv_exchange_ops {
    const char *name; /* "none", "mpi", "nccl" */
    fv_status_t (*all_to_all)(void *ctx,
                              const fv_exchange_message_t *sends,
                              size_t n_sends,
                              const fv_exchange_message_t *recvs,
                              size_t n_recvs,
                              uint32_t deadline_ms);
    fv_status_t (*attach)(void *ctx, fv_backend_t *backend);
    fv_status_t (*begin)(void *ctx,
                         fv_exchange_peer_t *peers,
                         size_t n_peers,
                         size_t own_bytes,
                         uint8_t **own);
    fv_status_t (*run)(void *ctx,
                       const fv_exchange_peer_t *peers,
                       size_t n_peers,
                       const fv_merge_sync_t **out_sync);
    fv_status_t (*end)(void *ctx, fv_status_t status);
    /*
     * Between devices, before run(), any number of times: enqueues, behind what the backend was given, the moving of memory of
     * the devices. Messages as of all_to_all(). NULL: not served.
     */
    fv_status_t (*bring)(void *ctx,
                         const fv_exchange_message_t *sends,
                         size_t n_sends,
                         const fv_exchange_message_t *recvs,
                         size_t n_recvs);
    /* somebody is gone: waiting for the device is in vain; NULL: never */
    bool (*is_aborted)(void *ctx);
    /* is_gone(arg) is asked while waiting; true ends the wait with FV_ERR_RANK_LOST. is_gone NULL: never. The op may be
     * NULL: nobody is asked. fv_worker_serve() sets its own, which watches the control socket. */
    void (*on_poll)(void *ctx, bool (*is_gone)(void *arg), void *arg);
} fv_exchange_ops_t;

typedef struct fv_worker_config {
    uint32_t rank, n_ranks;
    const fv_backend_ops_t *backend;
    fv_backend_config_t backend_config; /* kv_arena_bytes: all of this rank's KV memory */
    const fv_exchange_ops_t *exchange;  /* NULL: single rank */
    void *exchange_ctx;                 /* keeps */
    size_t
        move_bytes; /* of the KV arena's end: staging for KV that moves; the same on all ranks; 0: none */
    uint32_t step_deadline_ms; /* of one exchange, and of the device's work; 0 = 30000 */
    const fv_store_place_t
        *store; /* where its state outlives it (worker/store.h); copied; NULL: nowhere */
} fv_worker_config_t;

FV_MUST_CHECK fv_status_t fv_worker_create(const fv_worker_config_t *config, fv_worker_t **out);
void fv_worker_destroy(fv_worker_t *worker); /* NULL is fine */

/* Fills rank, threads, backend, device and memory; host is left to the caller. */
void fv_worker_hello(const fv_worker_t *worker, fv_ctl_hello_t *out);
void fv_worker_memory(const fv_worker_t *worker, fv_ctl_memory_t *out);

/* Control messages. Errors: FV_ERR_PROTOCOL for a slot out of range, in use, or unknown. */
FV_MUST_CHECK fv_status_t fv_worker_model(fv_worker_t *worker, const fv_ctl_model_t *message);
FV_MUST_CHECK fv_status_t fv_worker_open(fv_worker_t *worker, const fv_ctl_open_t *message);
FV_MUST_CHECK fv_status_t fv_worker_fork(fv_worker_t *worker, const fv_ctl_fork_t *message);
FV_MUST_CHECK fv_status_t fv_worker_truncate(fv_worker_t *worker, const fv_ctl_truncate_t *message);
FV_MUST_CHECK fv_status_t fv_worker_close(fv_worker_t *worker, const fv_ctl_close_t *message);

/*
 * A worker with a store begins with the sessions that its slot's files hold, as candidates. The coordinator says what
 * becomes of them: MODEL for each model (known ones are compared), KEEP for each session that it wants, KEEP_END. Until then
 * nothing else is served, and nothing in the files changes.
 * keep: cuts the session to the coordinator's lengths. out_floors[n_layers]: as fv_layer_kv_t.floor, at most the length.
 *       Errors: FV_ERR_DATA_LOSS: the session, or tokens of it, are not here (whole); it is not kept.
 * keep_end: drops all others, counts the pages, and writes the files anew. Errors: FV_ERR_EXHAUSTED: the files.
 */
FV_MUST_CHECK fv_status_t fv_worker_keep(fv_worker_t *worker,
                                         const fv_ctl_keep_t *message,
                                         const fv_ctl_keep_layer_t *layers,
                                         uint64_t *out_floors);
FV_MUST_CHECK fv_status_t fv_worker_keep_end(fv_worker_t *worker);
/* At a clean end: destroy() takes the slot's files away. */
void fv_worker_discard_store(fv_worker_t *worker);

/*
 * on_wait(arg) is called while a step's device work is waited for, on the same thread, again and again: at least once a step,
 * when all of it is enqueued. NULL: nobody. Where the exchange asks (on_poll), it asks instead of this.
 */
void fv_worker_on_wait(fv_worker_t *worker, void (*on_wait)(void *arg), void *arg);

/* For on_wait() alone: inputs of the next step are at `data`, in memory of the backend's host_alloc(); see kernels.h. */
void fv_worker_prefetch(fv_worker_t *worker, const void *data, size_t n_bytes);

/*
 * Runs one step: reserve pages (copy on write where shared), append, attend, exchange, merge.
 * `items` are all items of the step in which this rank has a share, `io` one each, `item_errors` one each.
 * An item that fails (no pages) fails alone and leaves the session as it was on this rank; it still takes part
 * in the exchange, so that peers do not wait. `out_done` gets timings, memory and the first error.
 * Returns an error only when the rank can not go on (exchange or backend failure).
 */
FV_MUST_CHECK fv_status_t fv_worker_step(fv_worker_t *worker,
                                         const fv_ctl_item_t *items,
                                         const fv_step_io_t *io,
                                         size_t n_items,
                                         fv_ctl_done_t *out_done,
                                         fv_error_t *item_errors);

/* The same over packed buffers of in_bytes and out_bytes (checked against the shares' sizes). */
FV_MUST_CHECK fv_status_t fv_worker_step_packed(fv_worker_t *worker,
                                                const fv_ctl_step_t *step,
                                                const fv_ctl_item_t *items,
                                                const void *in,
                                                void *out,
                                                fv_ctl_done_t *out_done,
                                                fv_error_t *item_errors);

/* Memory of the backend, which its device reaches fast: tensors of a step may lie there. From any thread. */
FV_MUST_CHECK fv_status_t fv_worker_host_alloc(fv_worker_t *worker, size_t n_bytes, void **out);
void fv_worker_host_free(fv_worker_t *worker, void *memory);

/* What GetPlacement and tests ask: pages held by a session on this rank, all layers and heads. */
uint64_t fv_worker_session_pages(const fv_worker_t *worker, uint32_t session_slot);

/*
 * The service loop of a rank other than the coordinator's (inbox_mpi.c): sleeps in poll() on
 * `control_fd`, enters MPI only while a step is under way, returns FV_OK after STOP,
 * FV_ERR_RANK_LOST when the coordinator's socket closes, FV_ERR_ABORTED with *out_next when the coordinator begins another epoch:
 * fv_worker_renew(), answer it, and serve again.
 * `mpi_comm` points to the MPI_Comm of the epoch (void: this header names no MPI type).
 */
FV_MUST_CHECK fv_status_t fv_worker_serve(fv_worker_t *worker,
                                          int control_fd,
                                          uint32_t epoch,
                                          void *mpi_comm,
                                          fv_ctl_epoch_t *out_next);

/*
 * A step was given up because another rank is gone: the worker can go on, with sessions as far as that step came on this rank;
 * the coordinator cuts them back. Its exchange must be renewed, too. Only for backends whose step() has returned.
 */
void fv_worker_renew(fv_worker_t *worker);

/*
 * The MPI exchange (exchange_mpi.c), for `exchange` and `exchange_ctx` of the configuration. `mpi_comm` points to the
 * MPI_Comm of the epoch. Waits spin briefly, then yield, then test and nap. After an error other than of memory it
 * refuses every further call with FV_ERR_RANK_LOST: messages given up stay posted, their order is lost.
 */
typedef struct fv_exchange_mpi fv_exchange_mpi_t;
extern const fv_exchange_ops_t fv_exchange_mpi_ops;
FV_MUST_CHECK fv_status_t fv_exchange_mpi_create(void *mpi_comm, fv_exchange_mpi_t **out);
void fv_exchange_mpi_destroy(fv_exchange_mpi_t *exchange);
/* Goes on over another communicator. What was under way is given up; its buffers must stay (fv_worker_renew() sees to it). */
FV_MUST_CHECK fv_status_t fv_exchange_mpi_renew(fv_exchange_mpi_t *exchange, void *mpi_comm);

#if defined(FV_WITH_NCCL)
/*
 * The exchange between GPUs (exchange_nccl.c); the backend must be fv_backend_cuda on the same device. Messages that fit
 * their region of the window go straight from the decode kernel into the memory of a GPU on the same NVLink; larger
 * ones, and those to other hosts, through NCCL's send and receive.
 */
#    define FV_EXCHANGE_NCCL_ID_BYTES     128
#    define FV_EXCHANGE_NCCL_WINDOW_BYTES ((size_t)256 << 20)

typedef struct fv_exchange_nccl fv_exchange_nccl_t;

typedef struct fv_exchange_nccl_config {
    uint32_t rank, n_ranks; /* of the service */
    uint32_t first_rank; /* ranks below it take no part (1: a dedicated coordinator); usually 0 */
    int32_t device;      /* as in fv_backend_config_t; no two ranks may have the same GPU */
    uint8_t id[FV_EXCHANGE_NCCL_ID_BYTES]; /* fv_exchange_nccl_id() of one rank, the same on all */
    size_t
        window_bytes; /* device memory for messages; the smallest of all ranks' counts; 0: the default above */
    uint32_t deadline_ms; /* of creation, and of the waiting in a step; 0 = 30000 */
    bool is_collective;   /* NCCL's send and receive for all messages */
} fv_exchange_nccl_config_t;

extern const fv_exchange_ops_t fv_exchange_nccl_ops;
/* Call it on one rank; the others get the bytes from there. Errors: FV_ERR_NCCL. */
FV_MUST_CHECK fv_status_t fv_exchange_nccl_id(uint8_t out[FV_EXCHANGE_NCCL_ID_BYTES]);
/* On every taking-part rank at once, before the worker (whose KV memory is what is left). Makes the device current. */
FV_MUST_CHECK fv_status_t fv_exchange_nccl_create(const fv_exchange_nccl_config_t *config,
                                                  fv_exchange_nccl_t **out);
/* After the worker. Bounded in time whatever the peers do. NULL is fine. */
void fv_exchange_nccl_destroy(fv_exchange_nccl_t *exchange);
/* One line: library, window, how many ranks are reached directly. */
void fv_exchange_nccl_describe(const fv_exchange_nccl_t *exchange, char *out, size_t out_bytes);
#endif

#endif /* FV_WORKER_WORKER_H */
