/*
 * wire_placement.c - GetPlacement's answer: shares of ranks, and what each policy's layers hold.
 */
#include "proto/wire_message.h"
#include "proto/wire_policy.h"
#include "proto/wire_text.h"

#include <stdlib.h>
#include <string.h>

#define SHARES_MAX 1024

void fv_placement_info_free(fv_placement_info_t *placement)
{
    free(placement->shares);
    free(placement->patterns);
    *placement = (fv_placement_info_t){0};
}

static fv_status_t share_decode(const Fovea__V1__PlacementShare *in, fv_placement_share_t *out)
{
    FV_RETURN_IF_ERR(fv_message_count("shares.ranges", in->n_ranges, FV_SHARE_RANGES_MAX));
    for (size_t i = 0; i < in->n_ranges; i++) {
        out->ranges[i] =
            (fv_token_range_t){.begin = in->ranges[i]->begin, .end = in->ranges[i]->end};
    }
    out->n_ranges = (uint32_t)in->n_ranges;
    out->rank = in->rank;
    out->kv_head_begin = in->kv_head_begin;
    out->kv_head_end = in->kv_head_end;
    out->q_head_begin = in->q_head_begin;
    out->q_head_end = in->q_head_end;
    out->n_tokens = in->n_tokens;
    out->kv_bytes = in->kv_bytes;
    out->freed_bytes = in->freed_bytes;
    out->latent_begin = in->latent_begin;
    out->latent_end = in->latent_end;
    out->truncated = in->truncated != 0;
    return FV_OK;
}

static fv_status_t
pattern_decode(const Fovea__V1__PlacementPattern *in, size_t index, fv_placement_pattern_t *out)
{
    if (in->policy == NULL) {
        return fv_fail(FV_ERR_INVALID_ARG, "patterns[%zu].policy: given none, expected one", index);
    }
    FV_RETURN_IF_ERR(
        fv_message_count("patterns.policy.layers", in->policy->n_layers, FV_LAYERS_MAX));
    FV_RETURN_IF_ERR(fv_wire_policy_decode(in->policy, index, &out->policy));
    out->n_layers = (uint32_t)in->policy->n_layers;
    for (uint32_t i = 0; i < out->n_layers; i++) {
        out->layers[i] = in->policy->layers[i];
    }
    out->n_tokens = in->n_tokens;
    out->floor = in->floor;
    out->kv_bytes = in->kv_bytes;
    out->freed_bytes = in->freed_bytes;
    return FV_OK;
}

static fv_status_t patterns_decode(const Fovea__V1__Placement *in, fv_placement_info_t *out)
{
    FV_RETURN_IF_ERR(fv_message_count("patterns", in->n_patterns, FV_POLICIES_MAX));
    out->patterns = fv_message_alloc(in->n_patterns, sizeof(*out->patterns));
    if (out->patterns == NULL) {
        return FV_ERR_NO_MEMORY;
    }
    out->n_patterns = (uint32_t)in->n_patterns;
    for (uint32_t i = 0; i < out->n_patterns; i++) {
        FV_RETURN_IF_ERR(pattern_decode(in->patterns[i], i, &out->patterns[i]));
    }
    return FV_OK;
}

/* On failure the caller frees `out`. */
static fv_status_t placement_decode(const Fovea__V1__Placement *in, fv_placement_info_t *out)
{
    FV_RETURN_IF_ERR(fv_message_session("session_id", in->session_id, &out->session));
    FV_RETURN_IF_ERR(
        fv_message_text("model_id", in->model_id, out->model_id, sizeof(out->model_id)));
    FV_RETURN_IF_ERR(fv_message_text("mode", in->mode, out->mode, sizeof(out->mode)));
    FV_RETURN_IF_ERR(fv_message_text("reason", in->reason, out->reason, sizeof(out->reason)));
    out->n_head_parts = in->n_head_parts;
    out->n_latent_parts = in->n_latent_parts;
    out->is_approximate = in->approximate != 0;
    out->n_ctx_parts = in->n_ctx_parts;
    out->shard_tokens = in->shard_tokens;
    out->n_tokens = in->n_tokens;
    out->n_q_heads = in->n_q_heads;
    out->n_kv_heads = in->n_kv_heads;
    FV_RETURN_IF_ERR(fv_message_count("shares", in->n_shares, SHARES_MAX));
    out->shares = fv_message_alloc(in->n_shares, sizeof(*out->shares));
    if (out->shares == NULL) {
        return FV_ERR_NO_MEMORY;
    }
    out->n_shares = (uint32_t)in->n_shares;
    for (uint32_t i = 0; i < out->n_shares; i++) {
        FV_RETURN_IF_ERR(share_decode(in->shares[i], &out->shares[i]));
    }
    return patterns_decode(in, out);
}

fv_status_t fv_wire_placement_decode(fv_span_t in, fv_placement_info_t *out)
{
    ProtobufCMessage *message = NULL;

    *out = (fv_placement_info_t){0};
    FV_RETURN_IF_ERR(
        fv_message_unpack(&fovea__v1__placement__descriptor, in, FV_WIRE_RESPONSE_MAX, &message));
    fv_status_t status = placement_decode((Fovea__V1__Placement *)message, out);
    if (status != FV_OK) {
        fv_placement_info_free(out);
    }
    fv_message_free(message);
    return status;
}

/* A share and the memory of its ranges. */
typedef struct share_out {
    Fovea__V1__PlacementShare message;
    Fovea__V1__TokenRange *list[FV_SHARE_RANGES_MAX];
    Fovea__V1__TokenRange ranges[FV_SHARE_RANGES_MAX];
} share_out_t;

static void share_encode(const fv_placement_share_t *in, share_out_t *out)
{
    Fovea__V1__PlacementShare *m = &out->message;

    *m = (Fovea__V1__PlacementShare)FOVEA__V1__PLACEMENT_SHARE__INIT;
    for (uint32_t i = 0; i < in->n_ranges; i++) {
        out->ranges[i] = (Fovea__V1__TokenRange)FOVEA__V1__TOKEN_RANGE__INIT;
        out->ranges[i].begin = in->ranges[i].begin;
        out->ranges[i].end = in->ranges[i].end;
        out->list[i] = &out->ranges[i];
    }
    m->n_ranges = in->n_ranges;
    m->ranges = out->list;
    m->rank = in->rank;
    m->kv_head_begin = in->kv_head_begin;
    m->kv_head_end = in->kv_head_end;
    m->q_head_begin = in->q_head_begin;
    m->q_head_end = in->q_head_end;
    m->n_tokens = in->n_tokens;
    m->kv_bytes = in->kv_bytes;
    m->freed_bytes = in->freed_bytes;
    m->latent_begin = in->latent_begin;
    m->latent_end = in->latent_end;
    m->truncated = in->truncated ? 1 : 0;
}

/* A pattern and the messages in it. */
typedef struct pattern_out {
    Fovea__V1__PlacementPattern message;
    Fovea__V1__LayerPolicy policy;
    fv_wire_policy_t kind;
} pattern_out_t;

static void pattern_encode(fv_placement_pattern_t *in, pattern_out_t *out)
{
    out->policy = (Fovea__V1__LayerPolicy)FOVEA__V1__LAYER_POLICY__INIT;
    out->policy.n_layers = in->n_layers;
    out->policy.layers = in->layers;
    fv_wire_policy_encode(&in->policy, &out->kind, &out->policy);
    out->message = (Fovea__V1__PlacementPattern)FOVEA__V1__PLACEMENT_PATTERN__INIT;
    out->message.policy = &out->policy;
    out->message.n_tokens = in->n_tokens;
    out->message.floor = in->floor;
    out->message.kv_bytes = in->kv_bytes;
    out->message.freed_bytes = in->freed_bytes;
}

/* Checked before anything is allocated: share_encode() and pattern_encode() rely on it. */
static fv_status_t check_lists(const fv_placement_info_t *in)
{
    FV_RETURN_IF_ERR(fv_message_count("shares", in->n_shares, SHARES_MAX));
    for (uint32_t i = 0; i < in->n_shares; i++) {
        FV_RETURN_IF_ERR(
            fv_message_count("shares.ranges", in->shares[i].n_ranges, FV_SHARE_RANGES_MAX));
    }
    for (uint32_t i = 0; i < in->n_patterns; i++) {
        FV_RETURN_IF_ERR(
            fv_message_count("patterns.policy.layers", in->patterns[i].n_layers, FV_LAYERS_MAX));
    }
    return fv_message_count("patterns", in->n_patterns, FV_POLICIES_MAX);
}

fv_status_t fv_wire_placement_encode(const fv_placement_info_t *in, fv_bytes_t *out)
{
    Fovea__V1__Placement message = FOVEA__V1__PLACEMENT__INIT;
    char reason[sizeof(in->reason)];
    char session[FV_SESSION_ID_CHARS + 1];
    pattern_out_t patterns[FV_POLICIES_MAX];
    Fovea__V1__PlacementPattern *pattern_list[FV_POLICIES_MAX];

    FV_RETURN_IF_ERR(check_lists(in));
    /* one block: the messages, then the pointers to them */
    share_out_t *shares =
        fv_message_alloc(in->n_shares, sizeof(share_out_t) + sizeof(Fovea__V1__PlacementShare *));
    if (shares == NULL) {
        return FV_ERR_NO_MEMORY;
    }
    Fovea__V1__PlacementShare **list = (void *)(shares + in->n_shares);
    for (uint32_t i = 0; i < in->n_shares; i++) {
        share_encode(&in->shares[i], &shares[i]);
        list[i] = &shares[i].message;
    }
    for (uint32_t i = 0; i < in->n_patterns; i++) {
        pattern_encode(&in->patterns[i], &patterns[i]);
        pattern_list[i] = &patterns[i].message;
    }
    fv_session_id_format(&in->session, session);
    (void)fv_utf8_copy(reason, sizeof(reason), in->reason, strlen(in->reason));
    message.session_id = session;
    message.model_id = fv_message_borrow(in->model_id);
    message.mode = fv_message_borrow(in->mode);
    message.reason = reason;
    message.n_head_parts = in->n_head_parts;
    message.n_latent_parts = in->n_latent_parts;
    message.approximate = in->is_approximate ? 1 : 0;
    message.n_ctx_parts = in->n_ctx_parts;
    message.shard_tokens = in->shard_tokens;
    message.n_tokens = in->n_tokens;
    message.n_shares = in->n_shares;
    message.shares = list;
    message.n_q_heads = in->n_q_heads;
    message.n_kv_heads = in->n_kv_heads;
    message.n_patterns = in->n_patterns;
    message.patterns = pattern_list;
    fv_status_t status = fv_message_pack(&message.base, out);
    free(shares);
    return status;
}
