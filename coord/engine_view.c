/*
 * engine_view.c - what GetStatus, GetSession and GetPlacement show.
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

/* The blocks of the longest layer that context part cp owns. */
static void
list_ranges(const fv_placement_t *p, int32_t cp, uint64_t n_tokens, fv_placement_share_t *share)
{
    uint64_t begin = (p->n_ctx_parts == 1) ? 0 : ((uint64_t)cp * p->shard_tokens);
    uint64_t stride = (uint64_t)p->n_ctx_parts * p->shard_tokens;

    while (begin < n_tokens) {
        uint64_t end = (p->n_ctx_parts == 1) ? n_tokens : (begin + p->shard_tokens);
        if (share->n_ranges == FV_SHARE_RANGES_MAX) {
            share->truncated = true;
            return;
        }
        share->ranges[share->n_ranges++] =
            (fv_token_range_t){.begin = begin, .end = (end < n_tokens) ? end : n_tokens};
        begin = (p->n_ctx_parts == 1) ? n_tokens : (begin + stride);
    }
}

static void fill_share(const fv_engine_t *engine,
                       const fv_session_t *session,
                       int32_t cell,
                       fv_placement_share_t *out)
{
    const fv_placement_t *p = &session->placement;
    const fv_model_spec_t *spec = fv_sched_model(engine->sched, session->model_slot);
    uint64_t n_tokens = fv_session_tokens(session);
    int32_t hp = cell / p->n_ctx_parts;
    int32_t cp = cell % p->n_ctx_parts;
    fv_head_part_t part = fv_placement_head_part(p, spec, hp);

    out->rank = p->ranks[cell];
    out->kv_head_begin = (uint32_t)part.head_begin;
    out->kv_head_end = (uint32_t)part.head_end;
    out->q_head_begin = (uint32_t)part.q_head_begin;
    out->q_head_end = (uint32_t)part.q_head_end;
    if (fv_model_is_latent(spec)) {
        out->latent_begin = (uint32_t)part.latent_begin;
        out->latent_end = (uint32_t)(part.latent_begin + part.head_dim_v);
    }
    out->n_tokens = fv_placement_tokens(p, cp, n_tokens);
    out->kv_bytes = session->held[cell];
    list_ranges(p, cp, n_tokens, out);
}

static const char *mode_of(const fv_placement_t *p, const fv_model_spec_t *spec)
{
    int32_t groups = fv_model_groups(spec);

    if (groups > 1) {
        return (p->n_head_parts > groups) ? "latent x heads" : "latent";
    }
    if ((p->n_head_parts > 1) && (p->n_ctx_parts > 1)) {
        return "heads x context";
    }
    return (p->n_head_parts > 1) ? "heads" : ((p->n_ctx_parts > 1) ? "context" : "one rank");
}

fv_status_t
fv_engine_placement(fv_engine_t *engine, const fv_session_t *session, fv_placement_info_t *out)
{
    const fv_placement_t *p = &session->placement;
    const fv_model_spec_t *spec = fv_sched_model(engine->sched, session->model_slot);
    fv_placement_info_t info = {
        .n_latent_parts = (uint32_t)fv_model_groups(spec),
        .is_approximate = fv_model_groups(spec) > 1,
        .session = session->id,
        .n_head_parts = p->n_head_parts,
        .n_ctx_parts = p->n_ctx_parts,
        .shard_tokens = p->shard_tokens,
        .n_tokens = fv_session_tokens(session),
        .n_shares = (uint32_t)p->n_head_parts * p->n_ctx_parts,
    };

    info.shares = calloc(info.n_shares, sizeof(*info.shares));
    if (info.shares == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "placement of %u shares", info.n_shares);
    }
    for (uint32_t cell = 0; cell < info.n_shares; cell++) {
        fill_share(engine, session, (int32_t)cell, &info.shares[cell]);
    }
    (void)snprintf(info.model_id, sizeof(info.model_id), "%s",
                   fv_sched_model_id(engine->sched, session->model_slot));
    (void)snprintf(info.mode, sizeof(info.mode), "%s", mode_of(p, spec));
    (void)snprintf(info.reason, sizeof(info.reason), "%s", session->reason);
    *out = info;
    return FV_OK;
}
