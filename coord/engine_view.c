/*
 * engine_view.c - what GetStatus and GetSession show.
 */
#include "common/clock.h"
#include "coord/engine_internal.h"
#include "coord/version.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static fv_rank_status_t rank_view(const fv_engine_t *engine, uint32_t rank)
{
    const fv_ctl_hello_t *hello = &engine->hellos[rank];
    const fv_ctl_memory_t *memory = fv_sched_rank(engine->sched, rank);
    fv_rank_status_t view = {.rank = rank,
                             .threads = hello->n_threads,
                             .kv_bytes_total = memory->kv_bytes_total,
                             .kv_bytes_free = memory->kv_bytes_free,
                             .n_steps = engine->rank_stats[rank].n_steps,
                             .busy_us = engine->rank_stats[rank].busy_us};

    (void)snprintf(view.host, sizeof(view.host), "%s", hello->host);
    (void)snprintf(view.backend, sizeof(view.backend), "%s", hello->backend);
    (void)snprintf(view.device, sizeof(view.device), "%s", hello->device);
    (void)snprintf(view.state, sizeof(view.state), "ready");
    return view;
}

fv_status_t fv_engine_status(fv_engine_t *engine, fv_cluster_status_t *out)
{
    uint32_t n_ranks = engine->config.sched.n_ranks;
    fv_cluster_status_t s = {
        .epoch = 1,
        .durability = engine->config.durability,
        .uptime_ms = (uint64_t)(fv_clock_us() - engine->start_us) / 1000U,
        .n_ranks = n_ranks,
        .n_models = fv_sched_n_models(engine->sched),
        .n_sessions = fv_session_table_count(fv_sched_sessions(engine->sched)),
        .n_requests_queued = fv_sched_n_queued(engine->sched),
        .n_requests_running = engine->n_running,
        .n_requests_done = engine->n_done,
        .n_requests_failed = engine->n_failed,
        .n_steps = engine->n_steps,
        .n_tokens_appended = fv_sched_tokens_appended(engine->sched),
    };

    s.ranks = calloc(n_ranks, sizeof(*s.ranks));
    if (s.ranks == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "status of %u ranks", n_ranks);
    }
    for (uint32_t r = 0; r < n_ranks; r++) {
        s.ranks[r] = rank_view(engine, r);
        s.kv_bytes_total += s.ranks[r].kv_bytes_total;
        s.kv_bytes_free += s.ranks[r].kv_bytes_free;
    }
    s.n_listen = (uint32_t)fv_rpc_n_addresses(engine->rpc);
    for (uint32_t i = 0; i < s.n_listen; i++) {
        (void)snprintf(s.listen[i], sizeof(s.listen[i]), "%s",
                       fv_rpc_address(engine->rpc, (int32_t)i));
    }
    (void)snprintf(s.version, sizeof(s.version), "%s", FV_VERSION);
    (void)snprintf(s.state, sizeof(s.state), "%s", engine->is_draining ? "draining" : "serving");
    (void)snprintf(s.exchange, sizeof(s.exchange), "%s", engine->config.exchange);
    *out = s;
    return FV_OK;
}

fv_status_t
fv_engine_session_info(fv_engine_t *engine, const fv_session_t *session, fv_session_info_t *out)
{
    const fv_placement_t *p = &session->placement;
    fv_session_info_t info = {
        .session = session->id,
        .parent = session->parent,
        .has_parent = session->has_parent,
        .n_layers = (uint32_t)session->n_layers,
        .max_tokens = fv_session_tokens(session),
        .created_unix_ms = session->created_unix_ms,
        .durability = engine->config.durability,
    };

    info.layer_tokens = calloc(info.n_layers, sizeof(*info.layer_tokens));
    if (info.layer_tokens == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "session of %u layers", info.n_layers);
    }
    for (uint32_t i = 0; i < info.n_layers; i++) {
        info.layer_tokens[i] = session->layers[i].n_tokens;
    }
    for (int32_t cell = 0; cell < p->n_head_parts * p->n_ctx_parts; cell++) {
        info.kv_bytes += session->held[cell];
    }
    (void)snprintf(info.model_id, sizeof(info.model_id), "%s",
                   fv_sched_model_id(engine->sched, session->model_slot));
    *out = info;
    return FV_OK;
}
