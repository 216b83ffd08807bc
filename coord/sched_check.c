/*
 * sched_check.c - what a request must fulfil before it may join a step.
 *
 * Decode path: station 3 of 10, part of coord/sched_step.c.
 */
#include "common/policy.h"
#include "coord/sched_internal.h"

#include <inttypes.h>

/* gRPC and MPI count a message in a signed int; the head takes a little. */
#define REPLY_BYTES_MAX ((uint64_t)INT32_MAX - 4096U)

static fv_status_t check_tensor(const char *name,
                                size_t given,
                                uint64_t n_tokens,
                                int32_t n_heads,
                                int32_t head_dim,
                                fv_dtype_t dtype)
{
    uint64_t expected = n_tokens * (uint64_t)n_heads * (uint64_t)head_dim * fv_dtype_bytes(dtype);

    if (given == expected) {
        return FV_OK;
    }
    return fv_fail(FV_ERR_INVALID_ARG,
                   "%s: given %zu bytes, expected %" PRIu64 " = %" PRIu64
                   " tokens x %d heads x %d x %s",
                   name, given, expected, n_tokens, n_heads, head_dim, fv_dtype_str((int)dtype));
}

uint64_t fv_request_reply_bytes(const fv_request_t *request)
{
    uint64_t n_rows = request->head.n_tokens * (uint64_t)request->spec->n_q_heads;
    uint64_t row_bytes =
        (uint64_t)fv_request_out_dim(request) * fv_dtype_bytes(request->head.dtype);

    return n_rows * (row_bytes + (request->head.want_lse ? sizeof(float) : 0U));
}

/* An answer is one message, and out can be many times larger than q (head_dim_v against head_dim_qk). */
static fv_status_t check_reply(const fv_request_t *request)
{
    if (fv_request_reply_bytes(request) <= REPLY_BYTES_MAX) {
        return FV_OK;
    }
    return fv_fail(FV_ERR_INVALID_ARG,
                   "q: given %" PRIu64 " tokens, whose answer would have %" PRIu64
                   " bytes, expected at most %" PRIu64 "; send fewer tokens a request",
                   request->head.n_tokens, fv_request_reply_bytes(request), REPLY_BYTES_MAX);
}

static fv_status_t check_tensors(const fv_request_t *request)
{
    const fv_attend_request_t *head = &request->head;
    const fv_model_spec_t *spec = request->spec;
    uint64_t n_kv = head->append ? head->n_tokens : 0;

    FV_RETURN_IF_ERR(check_tensor("q", head->q.n_bytes, head->n_tokens, spec->n_q_heads,
                                  spec->head_dim_qk, head->dtype));
    if (!head->append && ((head->k.n_bytes | head->v.n_bytes) != 0)) {
        return fv_fail(FV_ERR_INVALID_ARG, "%s: given %zu bytes, expected none with append = false",
                       (head->k.n_bytes != 0) ? "k" : "v",
                       (head->k.n_bytes != 0) ? head->k.n_bytes : head->v.n_bytes);
    }
    FV_RETURN_IF_ERR(
        check_tensor("k", head->k.n_bytes, n_kv, spec->n_kv_heads, spec->head_dim_qk, head->dtype));
    FV_RETURN_IF_ERR(check_tensor("v", head->v.n_bytes, n_kv, spec->n_kv_heads,
                                  fv_model_v_dim_sent(spec), head->dtype));
    if (head->only_slice > ((fv_model_groups(spec) > 1) ? (uint32_t)fv_model_groups(spec) : 0U)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "only_slice: given %u, expected 0..%d: 1 + a slice of the model's latents",
                       head->only_slice, (fv_model_groups(spec) > 1) ? fv_model_groups(spec) : 0);
    }
    if (head->want_lse && fv_model_is_approximate(spec) && (head->only_slice == 0)) {
        return fv_fail(
            FV_ERR_INVALID_ARG,
            "want_lse: given true, expected false or only_slice: sharded by latent, each of the %d "
            "slices has a softmax of its own",
            fv_model_groups(spec));
    }
    return check_reply(request);
}

static fv_status_t check_causal(const fv_request_t *request)
{
    const fv_model_spec_t *spec = request->spec;

    if (!request->head.causal &&
        (spec->policies[spec->layer_policy[request->head.layer]].kind == FV_POLICY_S2)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "causal: given false, expected true: layer %u has an S2 policy",
                       request->head.layer);
    }
    return FV_OK;
}

/* Finds item i's session and checks what does not depend on its length. */
static fv_status_t resolve_item(fv_sched_t *sched, fv_request_t *request, uint32_t i, uint64_t mark)
{
    fv_session_t *session = fv_session_find(sched->sessions, &request->items[i].session);

    if ((session == NULL) || !fv_principal_may_see(request->principal, session->owner)) {
        char hex[FV_SESSION_ID_CHARS + 1];
        fv_session_id_format(&request->items[i].session, hex);
        return fv_fail(FV_ERR_NOT_FOUND, "items[%u].session_id: no session %s", i, hex);
    }
    request->sessions[i] = session;
    if (i == 0) {
        request->model_slot = session->model_slot;
        request->spec = &sched->models[session->model_slot].spec;
    } else if (session->model_slot != request->model_slot) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "items[%u].session_id: a session of model %s, expected %s like items[0]", i,
                       sched->models[session->model_slot].id,
                       sched->models[request->model_slot].id);
    } else if (session->owner != request->sessions[0]->owner) { /* only an admin comes here */
        return fv_fail(FV_ERR_INVALID_ARG,
                       "items[%u].session_id: another owner's than items[0]'s, expected one owner "
                       "a request",
                       i);
    }
    if (request->head.layer >= (uint32_t)session->n_layers) {
        return fv_fail(FV_ERR_INVALID_ARG, "layer: given %u, expected 0..%d", request->head.layer,
                       session->n_layers - 1);
    }
    if (session->layers[request->head.layer].request_mark == mark) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "items[%u].session_id: the session is in this request twice", i);
    }
    session->layers[request->head.layer].request_mark = mark;
    session->used_us = sched->formed_us; /* it waits, or joins: either is no idleness */
    return FV_OK;
}

fv_status_t fv_sched_resolve(fv_sched_t *sched, fv_request_t *request)
{
    uint64_t mark = ++sched->next_mark;

    if ((sched->config.items_max > 0) && (request->head.n_items > sched->config.items_max)) {
        return fv_fail(FV_ERR_EXHAUSTED,
                       "items: given %u, this service takes at most %u a request (batch_max)",
                       request->head.n_items, sched->config.items_max);
    }
    for (uint32_t i = 0; i < request->head.n_items; i++) {
        FV_RETURN_IF_ERR(resolve_item(sched, request, i, mark));
    }
    FV_RETURN_IF_ERR(check_causal(request));
    return check_tensors(request);
}

/*
 * Exactly-once append: decides whether item i appends, repeats an append, or is refused, and says what
 * its rows may see (kv_end).
 */
static fv_status_t
check_position(const fv_request_t *request, uint32_t i, uint64_t tokens_max, fv_ctl_item_t *out)
{
    const fv_attend_item_t *item = &request->items[i];
    const fv_layer_t *layer = &request->sessions[i]->layers[request->head.layer];
    uint64_t end = item->position + item->n_tokens;

    if ((item->position > layer->n_tokens) || (end > FV_POSITION_MAX)) {
        return fv_fail(FV_ERR_OUT_OF_RANGE,
                       "items[%u].position: given %" PRIu64 ", layer %u has %" PRIu64
                       " tokens committed",
                       i, item->position, request->head.layer, layer->n_tokens);
    }
    *out = (fv_ctl_item_t){
        .session_slot = request->sessions[i]->slot,
        .layer = request->head.layer,
        .position = item->position,
        .kv_end = request->head.append ? end : layer->n_tokens,
        .n_tokens = item->n_tokens,
        .dtype = (uint16_t)request->head.dtype,
        .flags = (uint16_t)((request->head.causal ? FV_ITEM_CAUSAL : 0) |
                            (request->head.want_lse ? FV_ITEM_WANT_LSE : 0) |
                            ((int32_t)request->head.only_slice << FV_ITEM_SLICE_SHIFT)),
    };
    if (!request->head.append) {
        return FV_OK;
    }
    if (item->position == layer->n_tokens) {
        if ((tokens_max > 0) && (end > tokens_max)) {
            return fv_fail(FV_ERR_EXHAUSTED,
                           "items[%u]: %" PRIu64 " tokens with this append, a session of this "
                           "service has at most %" PRIu64 " (session_tokens_max)",
                           i, end, tokens_max);
        }
        out->flags |= FV_ITEM_APPEND;
        return FV_OK;
    }
    const fv_append_record_t *record = fv_layer_find_record(layer, item->position, item->n_tokens);
    if ((record != NULL) && (record->digest == request->digests[i])) {
        return FV_OK; /* a retry: nothing is appended, the same answer is computed */
    }
    return fv_fail(FV_ERR_PRECONDITION,
                   "items[%u].position: given %" PRIu64 ", layer %u has %" PRIu64
                   " tokens committed and %s; truncate the session first",
                   i, item->position, request->head.layer, layer->n_tokens,
                   (record != NULL) ? "k, v differ from what was appended there"
                                    : "no append of exactly these tokens");
}

/* Queries before the last append may find that what they would read is freed. */
static fv_status_t check_readable(const fv_request_t *request, uint32_t i)
{
    const fv_model_spec_t *spec = request->spec;
    const fv_ctl_item_t *item = &request->ctl_items[i];
    const fv_layer_t *layer = &request->sessions[i]->layers[item->layer];

    if (fv_policy_is_readable(&spec->policies[spec->layer_policy[item->layer]], spec->n_kv_heads,
                              fv_model_group(spec), (int64_t)layer->floor, (int64_t)item->position,
                              (int64_t)fv_item_sees_end(item))) {
        return FV_OK;
    }
    return fv_fail(FV_ERR_PRECONDITION,
                   "items[%u].position: given %" PRIu64
                   ", whose KV layer %u's policy has freed; queries from %" PRIu64
                   " on (the last append) are possible",
                   i, item->position, item->layer, layer->floor);
}

fv_status_t fv_sched_check_items(const fv_sched_t *sched, fv_request_t *request)
{
    for (uint32_t i = 0; i < request->head.n_items; i++) {
        FV_RETURN_IF_ERR(
            check_position(request, i, sched->config.session_tokens_max, &request->ctl_items[i]));
        FV_RETURN_IF_ERR(check_readable(request, i));
    }
    return FV_OK;
}
