/*
 * engine_placement.c - what GetPlacement shows: shares of ranks, and what policies keep and have freed.
 */
#include "coord/engine_internal.h"

#include <stdio.h>
#include <stdlib.h>

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
    for (int32_t layer = 0; layer < session->n_layers; layer++) {
        out->freed_bytes +=
            fv_session_layer_freed(session, spec, cell, layer) * fv_model_page_bytes(spec);
    }
    list_ranges(p, cp, n_tokens, out);
}

static void
put_mode(const fv_placement_t *p, const fv_model_spec_t *spec, char *out, size_t n_bytes)
{
    const char *latent = fv_model_adds_scores(spec)    ? "latent exact"
                         : (fv_model_groups(spec) > 1) ? "latent"
                                                       : NULL;
    const char *heads = (p->n_head_parts > fv_model_groups(spec)) ? "heads" : NULL;
    const char *context = (p->n_ctx_parts > 1) ? "context" : NULL;
    const char *axes[] = {latent, heads, context};
    size_t at = 0;

    (void)snprintf(out, n_bytes, "one rank");
    for (size_t i = 0; i < sizeof(axes) / sizeof(axes[0]); i++) {
        if ((axes[i] != NULL) && (at < n_bytes)) {
            at += (size_t)snprintf(out + at, n_bytes - at, "%s%s", (at > 0) ? " x " : "", axes[i]);
        }
    }
}

static void
fill_pattern(const fv_session_t *session, const fv_model_spec_t *spec, fv_placement_pattern_t *out)
{
    const fv_placement_t *p = &session->placement;

    for (uint32_t i = 0; i < out->n_layers; i++) {
        int32_t layer = (int32_t)out->layers[i];
        const fv_layer_t *l = &session->layers[layer];

        if (l->n_tokens >= out->n_tokens) {
            out->n_tokens = l->n_tokens;
            out->floor = l->floor;
        }
        for (int32_t cell = 0; cell < p->n_head_parts * p->n_ctx_parts; cell++) {
            out->kv_bytes += fv_session_layer_pages(session, spec, cell, layer);
            out->freed_bytes += fv_session_layer_freed(session, spec, cell, layer);
        }
    }
    out->kv_bytes *= fv_model_page_bytes(spec);
    out->freed_bytes *= fv_model_page_bytes(spec);
}

/* One for each policy but dense that some layer has. */
static void
list_patterns(const fv_session_t *session, const fv_model_spec_t *spec, fv_placement_info_t *info)
{
    for (int32_t i = 0; i < spec->n_policies; i++) {
        fv_placement_pattern_t *pattern = &info->patterns[info->n_patterns];

        pattern->policy = spec->policies[i];
        for (int32_t layer = 0; layer < spec->n_layers; layer++) {
            if (spec->layer_policy[layer] == i) {
                pattern->layers[pattern->n_layers++] = (uint32_t)layer;
            }
        }
        if ((pattern->policy.kind != FV_POLICY_DENSE) && (pattern->n_layers > 0)) {
            fill_pattern(session, spec, pattern);
            info->n_patterns++;
        } else {
            pattern->n_layers = 0;
        }
    }
}

/* Why it lies there, and how its prompts were computed over it. */
static void put_reason(const fv_session_t *session, char *out, size_t n_bytes)
{
    if (session->n_visits + session->n_moves == 0U) {
        (void)snprintf(out, n_bytes, "%s", session->reason);
        return;
    }
    (void)snprintf(out, n_bytes, "%s; pieces of prompts: %llu visited the KV, to %llu it moved",
                   session->reason, (unsigned long long)session->n_visits,
                   (unsigned long long)session->n_moves);
}

fv_status_t
fv_engine_placement(fv_engine_t *engine, const fv_session_t *session, fv_placement_info_t *out)
{
    const fv_placement_t *p = &session->placement;
    const fv_model_spec_t *spec = fv_sched_model(engine->sched, session->model_slot);
    fv_placement_info_t info = {
        .n_latent_parts = (uint32_t)fv_model_groups(spec),
        .is_approximate = fv_model_is_approximate(spec),
        .session = session->id,
        .n_head_parts = p->n_head_parts,
        .n_ctx_parts = p->n_ctx_parts,
        .shard_tokens = p->shard_tokens,
        .n_tokens = fv_session_tokens(session),
        .n_shares = (uint32_t)p->n_head_parts * p->n_ctx_parts,
        .n_q_heads = (uint32_t)spec->n_q_heads,
        .n_kv_heads = (uint32_t)spec->n_kv_heads,
    };

    info.shares = calloc(info.n_shares, sizeof(*info.shares));
    /* one too many: the last may be tried and dropped */
    info.patterns = calloc((size_t)spec->n_policies + 1U, sizeof(*info.patterns));
    if ((info.shares == NULL) || (info.patterns == NULL)) {
        fv_placement_info_free(&info);
        return fv_fail(FV_ERR_NO_MEMORY, "placement of %u shares", info.n_shares);
    }
    for (uint32_t cell = 0; cell < info.n_shares; cell++) {
        fill_share(engine, session, (int32_t)cell, &info.shares[cell]);
    }
    list_patterns(session, spec, &info);
    (void)snprintf(info.model_id, sizeof(info.model_id), "%s",
                   fv_sched_model_id(engine->sched, session->model_slot));
    put_mode(p, spec, info.mode, sizeof(info.mode));
    put_reason(session, info.reason, sizeof(info.reason));
    *out = info;
    return FV_OK;
}
