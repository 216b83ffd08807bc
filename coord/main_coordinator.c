/*
 * main_coordinator.c - rank 0: opens what it needs, serves, drains, and tells the others to stop.
 */
#include "coord/main_coordinator.h"

#include "common/config.h"
#include "common/log.h"
#include "coord/auth.h"
#include "coord/engine.h"
#include "coord/heartbeat.h"
#include "coord/ledger.h"
#include "coord/link.h"
#include "coord/main_exit.h"
#include "coord/main_local.h"
#include "coord/main_repair.h"
#include "coord/resources.h"
#include "coord/rpc.h"
#include "coord/version.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

/* A GPU does as many in a few ms: batch 64 at 64k tokens, or a prefill of 2k. */
#define INLINE_PAIRS_CUDA ((uint64_t)4 << 20)

/* ------------------------------------------------------------------ the door */

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
        .health_calls_max = config->health_calls_max,
        .first_message_ms = config->first_message_ms,
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

static fv_plan_prefill_t context_prefill(const char *name)
{
    if (strcmp(name, "visit") == 0) {
        return FV_PLAN_PREFILL_VISIT;
    }
    return (strcmp(name, "move") == 0) ? FV_PLAN_PREFILL_MOVE : FV_PLAN_PREFILL_AUTO;
}

/* ------------------------------------------------------------------ serving */

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
    return ((p->config.spares > 0) || p->crew.may_recruit) && (p->n_ranks > 1) && !has_gpu;
}

/*
 * Whether the service was told to end, and not only its processes: mpirun passes a SIGTERM on when its own parent dies, or when
 * a batch system takes the job away, and a service that comes back wants its sessions. Alone there is nobody between.
 */
static bool is_meant(const fv_process_t *p, int signal)
{
    return !p->has_mpi || (signal == 0) || (signal == SIGUSR1);
}

/* *out_has_served: the door was open. *out_is_over: and it has ended as it was told to, for good. */
static fv_status_t serve(fv_process_t *p, int signal_fd, bool *out_has_served, bool *out_is_over)
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
                  .context_prefill = context_prefill(p->config.context_prefill),
                  .cost = is_cuda ? fv_plan_cost_cuda() : fv_plan_cost_cpu()},
        .request_memory_bytes = p->config.request_memory,
        .drain_timeout_ms = (uint32_t)p->config.drain_timeout_ms,
        .session_idle_s = p->config.session_idle_s,
        .auth = p->auth,
        .local = fv_main_local_ops(p),
        .local_ctx = p->worker,
        .local_is_async = (p->worker != NULL) && p->backend->is_async,
        .inline_pairs_max = is_cuda ? INLINE_PAIRS_CUDA : 0U,
        .link = p->link,
        .repair = can_repair(p) ? fv_crew_repair : NULL,
        .repair_ctx = &p->crew,
        .ledger = p->ledger,
        .durability = fv_ledger_durability(p->ledger),
        .exchange = p->exchange.name,
        .ranks = p->hellos,
    };

    *out_has_served = false;
    *out_is_over = false;
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
    *out_is_over = (status == FV_OK) && is_meant(p, fv_engine_stop_signal(engine));
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

/*
 * After an end that was meant nobody asks for the sessions again, unless they are to stay, or for those that no name leads to;
 * a start that failed leaves none.
 */
static bool close_ledger(fv_process_t *p, bool has_served, bool is_over, bool is_clean)
{
    bool is_discarded =
        has_served ? ((is_over && !p->config.store_keep) || (is_clean && p->store.is_anonymous))
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

int fv_main_run_coordinator(fv_process_t *p, int signal_fd)
{
    bool has_served = false;
    bool is_over = false;
    fv_status_t status = open_tables(p);

    if (status == FV_OK) {
        status = serve(p, signal_fd, &has_served, &is_over);
    }
    bool is_discarded = close_ledger(p, has_served, is_over, status == FV_OK);
    fv_auth_destroy(p->auth);
    fv_heartbeat_stop(p->heartbeat); /* from here on nobody is missed */
    p->heartbeat = NULL;
    p->crew.heartbeat = NULL;
    int code = has_served ? fv_main_exit_code(status) : FV_EXIT_START;

    if ((p->link != NULL) && (code != FV_EXIT_RANK_LOST)) {
        fv_link_stop(p->link, is_discarded);
    }
    fv_crew_stop_spares(&p->crew);
    if (code == FV_EXIT_CLEAN) {
        fv_info("stopped cleanly");
    } else if (code != FV_EXIT_START) {
        fv_error("exit %d: %s", code, fv_error_context());
    }
    return code;
}
