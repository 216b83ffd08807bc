/*
 * engine.h - the coordinator's thread: takes what the RPC door brings, runs steps, answers.
 *
 * Decode path: stations 2, 3, 9 and 10 of 10. Before: coord/rpc_event.c. After: coord/rpc_call.c.
 *
 * The engine owns the clock, the inbox, the requests' memory and the scheduler core. Its thread also computes
 * rank 0's own share, and hands answers to gRPC itself: one hand-over between threads (rpc -> engine). A small request on
 * a single rank has none: the rpc thread takes the engine's turn and serves it on the spot.
 *
 *   rpc thread:    scan, gather tensors into staging, digest -> inbox (lock-free); its own turn, or an eventfd
 *   engine thread: commands; then steps while anything waits  -> replies
 *
 * Two steps are under way (FV_STEP_DEPTH) where that gains something: the tensors of the next one travel to the other ranks
 * while this one computes. See engine_pipeline.c.
 */
#ifndef FV_COORD_ENGINE_H
#define FV_COORD_ENGINE_H

#include "common/status.h"
#include "coord/ledger.h"
#include "coord/link.h"
#include "coord/local.h"
#include "coord/rpc.h"
#include "coord/sched.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct fv_engine fv_engine_t;

/* The ranks that a repair has replaced, and what the new ones say of themselves. */
#define FV_REPAIRED_MAX 16
typedef struct fv_repaired {
    uint32_t n, epoch;
    uint32_t ranks[FV_REPAIRED_MAX];
    fv_ctl_hello_t hellos[FV_REPAIRED_MAX];
} fv_repaired_t;

typedef struct fv_engine_config {
    fv_sched_config_t sched;
    size_t request_memory_bytes;
    uint32_t drain_timeout_ms;
    int32_t session_idle_s;      /* a session not used for so long is closed; 0 = never */
    fv_auth_t *auth;             /* told to read its file again by SIGHUP; NULL: none */
    const fv_local_ops_t *local; /* NULL: dedicated coordinator */
    void *local_ctx;
    bool local_is_async; /* its step() leaves this thread free while the device works */
    uint64_t
        inline_pairs_max; /* (query, KV token) pairs served on the rpc thread; 0 = 65536, ms of a CPU */
    fv_link_t *link;      /* NULL: one rank */
    /*
     * Puts spares into the place of the ranks that `link` has lost, and takes link, exchange and the own rank to another
     * epoch. NULL: a lost rank ends the service. Errors: nobody is left, or it can not be done.
     */
    fv_status_t (*repair)(void *ctx, fv_repaired_t *out);
    void *repair_ctx;
    fv_ledger_t *ledger;         /* what outlives this process; NULL: nothing */
    int32_t durability;          /* as in attention.proto: told to clients */
    const char *exchange;        /* "none", "mpi" */
    const fv_ctl_hello_t *ranks; /* [n_ranks] as they introduced themselves; copied */
} fv_engine_config_t;

/* Starts nothing: fv_engine_handlers() go to fv_rpc_start(), then fv_engine_run(). */
FV_MUST_CHECK fv_status_t fv_engine_create(const fv_engine_config_t *config, fv_engine_t **out);
void fv_engine_destroy(fv_engine_t *engine);

/*
 * Brings back the sessions that the ledger and the ranks' stores hold: once, before anything else. Errors: a rank is gone, or a
 * store is full; sessions that are damaged are no error, they are lost and said so.
 */
FV_MUST_CHECK fv_status_t fv_engine_recover(fv_engine_t *engine);

fv_rpc_handlers_t fv_engine_handlers(fv_engine_t *engine);

/*
 * Serves on the calling thread until drained: by signal_fd (a signalfd: any signal it brings; -1: none), or by the Drain
 * RPC. Stops `rpc` itself, in the right order. Returns FV_OK after a clean drain;
 * otherwise what broke the service (a lost rank, an exchange that failed), every open request answered UNAVAILABLE.
 */
FV_MUST_CHECK fv_status_t fv_engine_run(fv_engine_t *engine, fv_rpc_t *rpc, int signal_fd);

/* After fv_engine_run(): the signal that made it drain; 0: none did, the Drain call perhaps. */
int fv_engine_stop_signal(const fv_engine_t *engine);

#endif /* FV_COORD_ENGINE_H */
