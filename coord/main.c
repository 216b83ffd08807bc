/*
 * main.c - fovead: picks this process's role and puts the parts together.
 *
 * Alone (no mpirun): one rank, coordinator and worker, no MPI. Under mpirun or srun: rank 0 coordinates and, unless
 * --dedicated-coordinator, works too; the others work. With main_exchange.c the only file that knows coord and worker
 * both.
 *
 * Exit codes: 0 clean stop, 1 start-up failed, 2 usage or configuration, 3 a rank was lost, 4 failed while serving,
 * 5 cut off from the coordinator.
 */
#define _GNU_SOURCE

#include "common/config.h"
#include "common/deadline.h"
#include "common/log.h"
#include "coord/bootstrap.h"
#include "coord/engine.h"
#include "coord/link.h"
#include "coord/main_exchange.h"
#include "coord/main_heartbeat.h"
#include "coord/main_repair.h"
#include "coord/main_store.h"
#include "coord/resources.h"
#include "coord/rpc.h"
#include "coord/version.h"
#include "worker/worker.h"

#include <mpi.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

#define EPOCH 1U
/* MPI_Finalize waits for every rank, and one may have died meanwhile. */
#define FINISH_MS 10000U
/* A GPU does as many in a few ms: batch 64 at 64k tokens, or a prefill of 2k. */
#define INLINE_PAIRS_CUDA ((uint64_t)4 << 20)

enum {
    EXIT_CLEAN = 0,
    EXIT_START = 1,
    EXIT_USAGE = 2,
    EXIT_RANK_LOST = 3,
    EXIT_SERVING = 4,
    EXIT_FENCED = 5,
};

extern char **environ;

/* One process of the job. */
typedef struct fv_process {
    fv_config_t config;
    bool has_mpi;
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

static int exit_code_of(fv_status_t status)
{
    if (status == FV_OK) {
        return EXIT_CLEAN;
    }
    return ((status == FV_ERR_RANK_LOST) || (status == FV_ERR_TIMED_OUT)) ? EXIT_RANK_LOST
                                                                          : EXIT_SERVING;
}

/* ------------------------------------------------------------------ MPI */

static bool is_launched_by_mpi(void)
{
    static const char *const k_marks[] = {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"};

    for (size_t i = 0; i < sizeof(k_marks) / sizeof(k_marks[0]); i++) {
        if (getenv(k_marks[i]) != NULL) { /* NOLINT(concurrency-mt-unsafe): no thread yet */
            return true;
        }
    }
    return false;
}

static bool is_spare(const fv_process_t *p)
{
    return p->rank >= p->n_ranks;
}

/* The first epoch's communicator. Without spares there is never another one. */
static fv_status_t form_crew(fv_process_t *p)
{
    fv_crew_init(&p->crew, (uint32_t)p->n_ranks, (uint32_t)p->n_world, EPOCH);
    p->crew.deadline_ms = (uint32_t)p->config.repair_deadline_ms;
    p->crew.lost_code = EXIT_RANK_LOST;
    p->crew.exchange = &p->exchange;
    p->crew.comm = MPI_COMM_WORLD;
    return ((p->config.spares == 0) || is_spare(p)) ? FV_OK : fv_crew_make_comm(&p->crew);
}

static fv_status_t join_mpi(fv_process_t *p)
{
    MPI_Comm local = MPI_COMM_NULL;
    int provided = 0;

    p->n_ranks = 1;
    p->n_world = 1;
    p->n_local_ranks = 1;
    p->is_with_coordinator = true;
    if (!is_launched_by_mpi()) {
        return FV_OK; /* embedded: MPI is not entered at all */
    }
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS) {
        return fv_fail(FV_ERR_MPI, "MPI_Init_thread failed");
    }
    p->has_mpi = true;
    (void)MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    (void)MPI_Comm_rank(MPI_COMM_WORLD, &p->rank);
    (void)MPI_Comm_size(MPI_COMM_WORLD, &p->n_world);
    p->n_ranks = p->n_world - p->config.spares;
    if (MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &local) ==
        MPI_SUCCESS) {
        int first = p->rank;
        int is_rank = is_spare(p) ? 0 : 1;

        (void)MPI_Allreduce(&is_rank, &p->n_local_ranks, 1, MPI_INT, MPI_SUM, local);
        p->n_local_ranks = (p->n_local_ranks > 0) ? p->n_local_ranks : 1;
        (void)MPI_Comm_rank(local, &p->local_rank);
        (void)MPI_Bcast(&first, 1, MPI_INT, 0, local);
        p->is_with_coordinator = first == 0;
        (void)MPI_Comm_free(&local);
    }
    if (p->n_world > (int)FV_RANKS_MAX) {
        return fv_fail(FV_ERR_INVALID_ARG, "mpirun -np: given %d ranks, expected at most %d",
                       p->n_world, FV_RANKS_MAX);
    }
    if ((p->config.spares > 0) && (p->n_ranks < 2)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spares: given %d of %d processes, expected two ranks at least beside them",
                       p->config.spares, p->n_world);
    }
    return form_crew(p);
}

/* Every rank learns whether all ranks are fine. */
static bool all_fine(const fv_process_t *p, bool mine)
{
    int local = mine ? 1 : 0;
    int all = local;

    if (p->has_mpi) {
        (void)MPI_Allreduce(&local, &all, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    }
    return all != 0;
}

/* The same; a rank that is not fine says why. */
static bool said_fine(const fv_process_t *p, fv_status_t status)
{
    if (status != FV_OK) {
        fv_error("%s", fv_error_context());
    }
    return all_fine(p, status == FV_OK);
}

/* ------------------------------------------------------------------ the worker */

/* NULL: not in this build. */
static const fv_backend_ops_t *backend_named(const char *name)
{
#if defined(FV_WITH_CUDA)
    if ((strcmp(name, fv_backend_cuda.name) == 0) ||
        ((strcmp(name, "auto") == 0) && fv_backend_cuda_is_visible())) {
        return &fv_backend_cuda;
    }
#endif
    if (strcmp(name, "cuda") == 0) {
        return NULL;
    }
    return (strcmp(name, fv_backend_null.name) == 0) ? &fv_backend_null : &fv_backend_cpu;
}

static fv_main_place_t place_of(fv_process_t *p)
{
    return (fv_main_place_t){
        .comm = &p->crew.comm,
        .rank = p->rank,
        .n_ranks = p->n_ranks,
        .local_rank = p->local_rank,
        .n_local_ranks = p->n_local_ranks,
        .is_with_coordinator = p->is_with_coordinator,
        .is_dedicated = p->config.dedicated_coordinator,
    };
}

/* A share of the memory is one of the device's own. */
static uint64_t kv_memory(fv_process_t *p)
{
    const fv_memory_limit_t *limit = &p->config.kv_memory;

#if defined(FV_WITH_CUDA)
    if ((p->backend == &fv_backend_cuda) && (limit->percent > 0)) {
        fv_main_place_t place = place_of(p);
        uint64_t n_sharers = (uint64_t)fv_main_device_sharers(&place, fv_backend_cuda_count());
        fv_memory_limit_t device = {.bytes = fv_backend_cuda_memory_free(p->device) / 100U *
                                             (uint64_t)limit->percent / n_sharers};

        return fv_resolve_kv_memory(&device, 1);
    }
#endif
    return fv_resolve_kv_memory(limit, p->n_local_ranks);
}

static bool has_worker(const fv_process_t *p)
{
    return (p->rank != 0) || !p->config.dedicated_coordinator;
}

/* What this rank finds out alone. */
static fv_status_t choose_backend(fv_process_t *p)
{
    p->backend = backend_named(p->config.backend);
    if (p->backend == NULL) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "backend: given %s, expected auto, cpu or null: this build has no CUDA",
                       p->config.backend);
    }
    if (p->config.dedicated_coordinator && (p->n_ranks == 1)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "dedicated_coordinator: given true for one rank, expected at least two");
    }
#if defined(FV_WITH_CUDA)
    if (p->backend == &fv_backend_cuda) {
        fv_main_place_t place = place_of(p);

        p->device = fv_main_device(&place, fv_backend_cuda_count());
    }
#endif
    return FV_OK;
}

/* n_threads 0: as the configuration says. */
static fv_status_t start_worker(fv_process_t *p, uint64_t kv_bytes, uint32_t n_threads)
{
    int32_t threads = fv_resolve_threads(p->config.threads, p->n_local_ranks);
    fv_worker_config_t config = {
        .rank = (uint32_t)p->rank,
        .n_ranks = (uint32_t)p->n_ranks,
        .backend = p->backend,
        .backend_config = {.n_threads = (n_threads > 0U) ? (int32_t)n_threads : threads,
                           .kv_arena_bytes = kv_bytes,
                           .device = p->device,
                           .isa = p->config.isa},
        .exchange = p->exchange.ops,
        .exchange_ctx = p->exchange.ctx,
        .step_deadline_ms = (uint32_t)p->config.step_deadline_ms,
        .store = p->store.is_on ? &p->store.place : NULL,
    };

    if (!has_worker(p)) {
        p->hello = (fv_ctl_hello_t){.rank = (uint32_t)p->rank, .backend = "none"};
        (void)snprintf(p->hello.device, sizeof(p->hello.device), "coordinator only");
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_worker_create(&config, &p->worker));
    p->crew.worker = p->worker;
    fv_worker_hello(p->worker, &p->hello);
    return FV_OK;
}

/* Rank 0's name for the store is everybody's. */
static fv_status_t open_store(fv_process_t *p)
{
    char job[FV_JOURNAL_JOB_BYTES] = "";

    fv_main_store_job(&p->config, job);
    if (p->has_mpi) {
        (void)MPI_Bcast(job, (int)sizeof(job), MPI_CHAR, 0, MPI_COMM_WORLD);
    }
    return fv_main_store_open(&p->config, job, (uint32_t)p->rank, (uint32_t)p->n_ranks, &p->store);
}

/* Backend, exchange, worker: after each, all ranks know whether all are fine, so that none waits for another. */
static bool start_parts(fv_process_t *p)
{
    fv_main_place_t place = place_of(p);
    fv_status_t status = choose_backend(p);

    if (!said_fine(p, status)) {
        return false;
    }
    status = is_spare(p)
                 ? FV_OK
                 : fv_main_exchange_open(&place, &p->config, p->backend, p->device, &p->exchange);
    fv_status_t opened = open_store(p);
    status = (status == FV_OK) ? opened : status;
    uint64_t kv_bytes = has_worker(p) ? kv_memory(p) : 0U; /* before a neighbour takes its own */
    if ((status == FV_OK) && has_worker(p) && !is_spare(p)) {
        status =
            fv_main_store_kv_memory(&p->store, &p->config.kv_memory, p->n_local_ranks, &kv_bytes);
    }
    if (!said_fine(p, status)) {
        return false;
    }
    if (is_spare(p)) { /* its worker is made when it is known whose place it takes */
        p->hello = (fv_ctl_hello_t){.rank = (uint32_t)p->rank, .backend = "spare"};
        return said_fine(p, FV_OK);
    }
    return said_fine(p, start_worker(p, kv_bytes, 0));
}

static fv_status_t local_model(void *ctx, const fv_ctl_model_t *message)
{
    return fv_worker_model(ctx, message);
}
static fv_status_t local_open(void *ctx, const fv_ctl_open_t *message)
{
    return fv_worker_open(ctx, message);
}
static fv_status_t local_fork(void *ctx, const fv_ctl_fork_t *message)
{
    return fv_worker_fork(ctx, message);
}
static fv_status_t local_truncate(void *ctx, const fv_ctl_truncate_t *message)
{
    return fv_worker_truncate(ctx, message);
}
static fv_status_t local_close(void *ctx, const fv_ctl_close_t *message)
{
    return fv_worker_close(ctx, message);
}
static fv_status_t local_keep(void *ctx,
                              const fv_ctl_keep_t *message,
                              const fv_ctl_keep_layer_t *layers,
                              uint64_t *out_floors)
{
    return fv_worker_keep(ctx, message, layers, out_floors);
}
static fv_status_t local_keep_end(void *ctx)
{
    return fv_worker_keep_end(ctx);
}
static fv_status_t local_step(void *ctx,
                              const fv_ctl_item_t *items,
                              const fv_step_io_t *io,
                              size_t n_items,
                              fv_ctl_done_t *out_done,
                              fv_error_t *item_errors)
{
    return fv_worker_step(ctx, items, io, n_items, out_done, item_errors);
}
static void local_memory(void *ctx, fv_ctl_memory_t *out)
{
    fv_worker_memory(ctx, out);
}

static fv_status_t local_host_alloc(void *ctx, size_t n_bytes, void **out)
{
    return fv_worker_host_alloc(ctx, n_bytes, out);
}
static void local_host_free(void *ctx, void *memory)
{
    fv_worker_host_free(ctx, memory);
}
static void local_prefetch(void *ctx, const void *data, size_t n_bytes)
{
    fv_worker_prefetch(ctx, data, n_bytes);
}
static void local_on_wait(void *ctx, void (*on_wait)(void *arg), void *arg)
{
    fv_worker_on_wait(ctx, on_wait, arg);
}

static const fv_local_ops_t k_local_ops = {
    .model = local_model,
    .open = local_open,
    .fork = local_fork,
    .truncate = local_truncate,
    .close = local_close,
    .keep = local_keep,
    .keep_end = local_keep_end,
    .step = local_step,
    .memory = local_memory,
    .prefetch = local_prefetch,
    .on_wait = local_on_wait,
};

/* Beside a device with memory of its own, requests and answers lie where it reaches them fast. */
static const fv_local_ops_t *local_ops(const fv_process_t *p)
{
    static fv_local_ops_t pinned;

    if (p->worker == NULL) {
        return NULL;
    }
    if (strcmp(p->backend->name, "cuda") != 0) {
        return &k_local_ops;
    }
    pinned = k_local_ops;
    pinned.host_alloc = local_host_alloc;
    pinned.host_free = local_host_free;
    return &pinned;
}

/* ------------------------------------------------------------------ start */

static fv_status_t meet(fv_process_t *p)
{
    p->hellos = calloc((size_t)p->n_world, sizeof(*p->hellos));
    p->fds = calloc((size_t)p->n_world, sizeof(*p->fds));
    p->beat_fds = calloc((size_t)p->n_world, sizeof(*p->beat_fds));
    if ((p->hellos == NULL) || (p->fds == NULL) || (p->beat_fds == NULL)) {
        return fv_fail(FV_ERR_NO_MEMORY, "%d ranks", p->n_ranks);
    }
    MPI_Comm world = MPI_COMM_WORLD;
    p->hello.pid = (int32_t)getpid();
    if (!p->has_mpi || (p->n_world == 1)) {
        (void)gethostname(p->hello.host, sizeof(p->hello.host) - 1U);
        p->hellos[0] = p->hello;
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_bootstrap(&world, p->config.control_address, EPOCH, &p->hello, p->fds,
                                  p->beat_fds, p->hellos));
    if (p->rank != 0) {
        return fv_main_heartbeat_start(&p->config, p->rank, p->n_world, p->beat_fds, NULL,
                                       EXIT_FENCED, &p->heartbeat);
    }
    FV_RETURN_IF_ERR(fv_link_create(&p->crew.comm, (uint32_t)p->n_ranks, EPOCH, p->fds,
                                    (uint32_t)p->config.step_deadline_ms, &p->link));
    if ((p->exchange.ops != NULL) && (p->exchange.ops->on_poll != NULL)) {
        p->exchange.ops->on_poll(p->exchange.ctx, fv_link_is_broken, p->link);
    }
    p->crew.link = p->link;
    p->crew.fds = p->fds;
    p->crew.hellos = p->hellos;
    FV_RETURN_IF_ERR(fv_main_heartbeat_start(&p->config, p->rank, p->n_world, p->beat_fds, &p->crew,
                                             EXIT_FENCED, &p->heartbeat));
    p->crew.heartbeat = p->heartbeat;
    return FV_OK;
}

static void print_banner(const fv_process_t *p, const fv_rpc_t *rpc)
{
    char text[24];
    uint64_t kv_bytes = 0;

    fv_info("fovead %s: %d rank%s, exchange %s", FV_VERSION, p->n_ranks,
            (p->n_ranks == 1) ? "" : "s", p->exchange.text);
    for (int r = 0; r < p->n_ranks; r++) {
        const fv_ctl_hello_t *h = &p->hellos[r];
        kv_bytes += h->memory.kv_bytes_total;
        fv_info("rank %d on %s: %s (%s), KV %s", r, h->host, h->backend, h->device,
                fv_format_bytes(h->memory.kv_bytes_total, text));
    }
    fv_info("memory: KV cache %s", fv_format_bytes(kv_bytes, text));
    fv_info("memory: requests in flight at most %s (request_memory)",
            fv_format_bytes(p->config.request_memory, text));
    fv_info("memory: gRPC at most %s (grpc_memory)", fv_format_bytes(p->config.grpc_memory, text));
    for (int32_t i = 0; i < fv_rpc_n_addresses(rpc); i++) {
        fv_info("listening on %s (%s, %s)", fv_rpc_address(rpc, i),
                fv_rpc_address_has_tls(rpc, i) ? "TLS" : "no TLS",
                (p->config.tokens[0] != '\0') ? "tokens" : "no authentication");
    }
}

static fv_unix_peers_t unix_peers(const char *who)
{
    if (strcmp(who, "any") == 0) {
        return FV_UNIX_PEERS_ANY;
    }
    return (strcmp(who, "group") == 0) ? FV_UNIX_PEERS_GROUP : FV_UNIX_PEERS_USER;
}

static fv_rpc_config_t rpc_config(const fv_config_t *config, fv_auth_t *auth)
{
    fv_rpc_config_t rpc = {
        .calls_max = config->calls_max,
        .connections_max = config->connections_max,
        .unix_mode = (int32_t)strtol(config->unix_mode, NULL, 8), /* "auto": 0 */
        .unix_peers = unix_peers(config->unix_peers),
        .metadata_bytes_max = config->metadata_max,
        .tls_cert = config->tls_cert,
        .tls_key = config->tls_key,
        .tls_client_ca = config->tls_client_ca,
        .auth = auth,
        .may_be_open = config->insecure,
        .n_listen = (int32_t)config->listen.n,
        .message_bytes_max = config->message_max,
        .stream_inflight_max = config->stream_inflight,
        .connection_streams_max = config->connection_streams,
        .memory_bytes_max = config->grpc_memory,
    };

    for (uint32_t i = 0; i < config->listen.n; i++) {
        rpc.listen[i] = config->listen.text[i];
    }
    return rpc;
}

/* What hangs in a device waits for a rank that is gone, and a GPU has no spare of its own: such a job is started again. */
static bool can_repair(const fv_process_t *p)
{
    bool has_gpu = false;

    for (int r = 0; r < p->n_ranks; r++) {
        has_gpu = has_gpu || (strcmp(p->hellos[r].backend, "cuda") == 0);
    }
    if (has_gpu && (p->config.spares > 0)) {
        fv_warn(
            "spares are not used by GPU ranks: a lost rank ends the job, which is started again");
    }
    return (p->config.spares > 0) && !has_gpu;
}

static fv_status_t serve(fv_process_t *p, int signal_fd, bool *out_has_served)
{
    fv_engine_t *engine = NULL;
    fv_rpc_t *rpc = NULL;
    bool is_cuda = strcmp(p->backend->name, "cuda") == 0;
    fv_engine_config_t config = {
        .sched = {.n_ranks = (uint32_t)p->n_ranks,
                  .sessions_max = (uint32_t)p->config.sessions_max,
                  .session_tokens_max = (uint32_t)p->config.session_tokens_max,
                  .items_max = (uint32_t)p->config.batch_max,
                  .step_tokens_max = (uint32_t)p->config.step_tokens_max,
                  .prefill_tokens_per_step = (uint32_t)p->config.prefill_tokens_per_step,
                  .shard_tokens = (uint32_t)p->config.shard_tokens,
                  .cost = is_cuda ? fv_plan_cost_cuda() : fv_plan_cost_cpu()},
        .request_memory_bytes = p->config.request_memory,
        .drain_timeout_ms = (uint32_t)p->config.drain_timeout_ms,
        .session_idle_s = p->config.session_idle_s,
        .auth = p->auth,
        .local = local_ops(p),
        .local_ctx = p->worker,
        .local_is_async = (p->worker != NULL) && p->backend->is_async,
        .inline_pairs_max = is_cuda ? INLINE_PAIRS_CUDA : 0U,
        .link = p->link,
        .repair = can_repair(p) ? fv_crew_repair : NULL,
        .repair_ctx = &p->crew,
        .ledger = p->ledger,
        .durability = p->store.is_on ? 1 : 0, /* DURABILITY_PROCESS */
        .exchange = p->exchange.name,
        .ranks = p->hellos,
    };

    *out_has_served = false;
    FV_RETURN_IF_ERR(fv_engine_create(&config, &engine));
    fv_status_t recovered = fv_engine_recover(engine);
    if (recovered != FV_OK) {
        fv_error("durability: %s", fv_error_context());
        fv_engine_destroy(engine);
        return recovered;
    }
    fv_rpc_handlers_t handlers = fv_engine_handlers(engine);
    fv_rpc_config_t listen = rpc_config(&p->config, p->auth);
    fv_status_t status = fv_rpc_start(&listen, &handlers, &rpc);
    if (status != FV_OK) {
        fv_error("%s", fv_error_context());
        fv_engine_destroy(engine);
        return status;
    }
    *out_has_served = true;
    print_banner(p, rpc);
    status = fv_engine_run(engine, rpc, signal_fd);
    fv_error_t error = fv_error_capture(status);
    fv_rpc_destroy(rpc);
    fv_engine_destroy(engine);
    return (status == FV_OK) ? FV_OK : fv_fail(status, "%s", error.text);
}

/* Who may come, and what earlier runs have left. */
static fv_status_t open_tables(fv_process_t *p)
{
    fv_status_t status = fv_auth_create(p->config.tokens, &p->auth);

    if (status != FV_OK) {
        fv_error("tokens: %s", fv_error_context());
    } else if (p->store.is_on) {
        status = fv_ledger_open(&p->store.place, &p->ledger);
        if (status != FV_OK) {
            fv_error("durability: %s", fv_error_context());
        }
    }
    return status;
}

/* After a clean end nobody asks for the sessions again, unless they were meant to stay; a start that failed leaves none. */
static bool close_ledger(fv_process_t *p, bool has_served, bool is_clean)
{
    bool is_discarded = has_served ? (is_clean && (!p->config.store_keep || p->store.is_anonymous))
                                   : fv_ledger_is_new(p->ledger);

    if (is_discarded) {
        fv_ledger_remove(p->ledger);
    } else {
        fv_ledger_close(p->ledger);
    }
    if (is_discarded && (p->worker != NULL)) {
        fv_worker_discard_store(p->worker);
    }
    return is_discarded;
}

static int run_coordinator(fv_process_t *p, int signal_fd)
{
    bool has_served = false;
    fv_status_t status = open_tables(p);

    if (status == FV_OK) {
        status = serve(p, signal_fd, &has_served);
    }
    bool is_discarded = close_ledger(p, has_served, status == FV_OK);
    fv_auth_destroy(p->auth);
    fv_heartbeat_stop(p->heartbeat); /* from here on nobody is missed */
    p->heartbeat = NULL;
    p->crew.heartbeat = NULL;
    int code = has_served ? exit_code_of(status) : EXIT_START;

    if ((p->link != NULL) && (code != EXIT_RANK_LOST)) {
        fv_link_stop(p->link, is_discarded);
    }
    fv_crew_stop_spares(&p->crew);
    if (code == EXIT_CLEAN) {
        fv_info("stopped cleanly");
    } else if (code != EXIT_START) {
        fv_error("exit %d: %s", code, fv_error_context());
    }
    return code;
}

/* Into the epoch of `message`; a spare becomes a rank in it. */
static fv_status_t enter_epoch(fv_process_t *p, const fv_ctl_epoch_t *message)
{
    char host[sizeof(p->hello.host)];

    memcpy(host, p->hello.host, sizeof(host));
    if (message->is_new != 0U) {
        if ((message->lost_pid > 1) && (strncmp(message->lost_host, host, sizeof(host)) == 0)) {
            (void)kill((pid_t)message->lost_pid, SIGKILL); /* it may be stopped, and not dead */
        }
        p->rank = (int)message->rank;
        fv_log_init(fv_log_level_now, p->rank);
    }
    FV_RETURN_IF_ERR(fv_crew_follow(&p->crew, message));
    if (message->is_new != 0U) {
        p->store.place.slot = message->rank; /* what the lost one has left, if this is its host */
        FV_RETURN_IF_ERR(start_worker(p, message->kv_bytes, message->n_threads));
    } else {
        fv_worker_renew(p->worker);
        fv_worker_hello(p->worker, &p->hello);
    }
    memcpy(p->hello.host, host, sizeof(host));
    p->hello.pid = (int32_t)getpid();
    fv_info("epoch %u: this is rank %d", message->epoch, p->rank);
    return fv_crew_answer(&p->crew, p->fds[0], &p->hello);
}

static int run_worker(fv_process_t *p)
{
    static fv_ctl_epoch_t next; /* large; one thread */
    fv_status_t status = FV_ERR_ABORTED;
    bool is_stop = false;

    if (is_spare(p)) {
        fv_log_thread_name("spare");
        status = fv_crew_wait_as_spare(p->fds[0], &is_stop, &next);
        if (is_stop) {
            return EXIT_CLEAN;
        }
        status = (status == FV_OK) ? enter_epoch(p, &next) : status;
    } else {
        status = FV_OK;
    }
    fv_log_thread_name("worker");
    while (status == FV_OK) {
        status = fv_worker_serve(p->worker, p->fds[0], p->crew.epoch, &p->crew.comm, &next);
        if (status != FV_ERR_ABORTED) {
            break;
        }
        status = enter_epoch(p, &next);
    }
    if (status == FV_OK) {
        return EXIT_CLEAN;
    }
    fv_error("exit %d: %s", exit_code_of(status), fv_error_context());
    return exit_code_of(status);
}

/* ------------------------------------------------------------------ process */

/* For launchers that hide the exit code of a rank, as mpirun with recovery does; and hosts to be left out. */
static void write_exit_file(const fv_process_t *p, int code)
{
    const char *path = getenv("FOVEA_EXIT_FILE"); /* NOLINT(concurrency-mt-unsafe) */
    FILE *file = (path == NULL) ? NULL : fopen(path, "w");

    if (file != NULL) {
        (void)fprintf(file, "%d\n", code);
        for (int r = 1; (p->link != NULL) && (r < p->n_ranks); r++) {
            if (fv_link_is_cut_off(p->link, (uint32_t)r)) {
                (void)fprintf(file, "cut-off %s\n", p->hellos[r].host);
            }
        }
        (void)fclose(file);
    }
}

/*
 * Signals mean "drain and stop" to rank 0, which reads them from a descriptor; the others wait to be told. Blocked
 * before any thread exists, MPI's included, so that all inherit the mask.
 */
static void block_signals(sigset_t *out_set)
{
    (void)signal(SIGPIPE, SIG_IGN);
    (void)sigemptyset(out_set);
    (void)sigaddset(out_set, SIGTERM);
    (void)sigaddset(out_set, SIGINT);
    (void)sigaddset(out_set, SIGUSR1);
    (void)sigaddset(out_set, SIGHUP); /* not to stop: reads the token file again */
    (void)pthread_sigmask(SIG_BLOCK, out_set, NULL);
}

static int start_and_run(fv_process_t *p, const sigset_t *signals)
{
    fv_log_level_t level = FV_LOG_INFO;

    fv_status_t status = fv_log_level_parse(p->config.log_level, &level);
    fv_log_init(level, p->rank);
    int signal_fd = (p->rank == 0) ? signalfd(-1, signals, SFD_NONBLOCK | SFD_CLOEXEC) : -1;
    if (!said_fine(p, status) || !start_parts(p)) {
        return EXIT_START;
    }
    status = meet(p);
    fv_deadline_disarm();
    if (status != FV_OK) {
        fv_error("%s", fv_error_context());
        return EXIT_START;
    }
    return (p->rank == 0) ? run_coordinator(p, signal_fd) : run_worker(p);
}

static void finish(fv_process_t *p, int code)
{
    if (p->rank == 0) {
        write_exit_file(p, code);
    }
    if ((code != EXIT_CLEAN) && p->has_mpi) {
        /* Something is gone: MPI_Finalize would wait for it. The sockets close with the process. */
        (void)fflush(NULL);
        _exit(code);
    }
    fv_heartbeat_stop(p->heartbeat);
    fv_link_destroy(p->link);
    if ((p->rank != 0) && (p->fds != NULL)) {
        (void)close(p->fds[0]);
    }
    fv_worker_destroy(p->worker);
    fv_main_exchange_close(&p->exchange);
    free(p->hellos);
    free(p->fds);
    free(p->beat_fds);
    if (p->config.spares > 0) { /* somebody may have been lost */
        (void)fflush(NULL);
        _exit(code);
    }
    if (p->has_mpi) {
        fv_deadline_arm(FINISH_MS, code, "fovead: MPI_Finalize");
        (void)MPI_Finalize();
        fv_deadline_disarm();
    }
}

int main(int argc, char **argv)
{
    static fv_process_t process;
    fv_status_t status = fv_config_load(argc, argv, environ, &process.config);

    if (status != FV_OK) {
        (void)fprintf(stderr, "fovead: %s\nTry fovead --help.\n", fv_error_context());
        write_exit_file(&process, EXIT_USAGE); /* every rank finds the same */
        return EXIT_USAGE;
    }
    switch (process.config.action) {
    case FV_CONFIG_PRINT:
        fv_config_print(&process.config, stdout);
        return EXIT_CLEAN;
    case FV_CONFIG_HELP:
        fv_config_help("fovead", stdout);
        return EXIT_CLEAN;
    case FV_CONFIG_VERSION:
        (void)printf("fovead %s\n", FV_VERSION);
        return EXIT_CLEAN;
    case FV_CONFIG_RUN:
    default:
        break;
    }
    int code = EXIT_START;
    sigset_t signals;
    block_signals(&signals);
    fv_deadline_arm((uint32_t)process.config.start_deadline_ms, EXIT_START, "fovead: start");
    status = join_mpi(&process);
    if (status == FV_OK) {
        code = start_and_run(&process, &signals);
    } else {
        (void)fprintf(stderr, "fovead: %s\n", fv_error_context());
    }
    finish(&process, code);
    return code;
}
