/*
 * sched_step.c - forms a step of all that waits and may run together, and commits it.
 *
 * Decode path: station 3 of 10, continued from sched.h.
 */
#include "common/digest.h"
#include "common/policy.h"
#include "coord/sched_internal.h"

#include <inttypes.h>
#include <string.h>

/* Tensors of one step, unless one request alone has more. */
#define STEP_BYTES_MAX ((uint64_t)1 << 30)
/* Steps in a row that decode may fill so that no prefill fits. */
#define PATIENCE 8U
/* gRPC and MPI count a message in a signed int; the head takes a little. */
#define REPLY_BYTES_MAX ((uint64_t)INT32_MAX - 4096U)

static uint64_t input_bytes(const fv_request_t *request)
{
    return (uint64_t)request->head.q.n_bytes + request->head.k.n_bytes + request->head.v.n_bytes;
}

void fv_sched_enqueue(fv_sched_t *sched, fv_request_t *request)
{
    request->next = NULL;
    *sched->queue_tail = request;
    sched->queue_tail = &request->next;
    sched->n_queued++;
    sched->n_bytes_queued += input_bytes(request);
}

void fv_sched_submit(fv_sched_t *sched, fv_request_t *request)
{
    request->error = (fv_error_t){0};
    request->n_tokens_done = 0;
    request->n_tokens_piece = 0;
    request->has_rest = false;
    request->candidate_step = 0;
    fv_sched_enqueue(sched, request);
}

fv_request_t *fv_sched_take_all(fv_sched_t *sched)
{
    fv_request_t *all = sched->queue_head;

    sched->queue_head = NULL;
    sched->queue_tail = &sched->queue_head;
    sched->n_queued = 0;
    sched->n_bytes_queued = 0;
    return all;
}

/* ------------------------------------------------------------------ checks */

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

/* Bytes of the answer: out and lse. */
static uint64_t reply_bytes(const fv_request_t *request)
{
    uint64_t n_rows = request->head.n_tokens * (uint64_t)request->spec->n_q_heads;
    uint64_t row_bytes =
        (uint64_t)fv_request_out_dim(request) * fv_dtype_bytes(request->head.dtype);

    return n_rows * (row_bytes + (request->head.want_lse ? sizeof(float) : 0U));
}

/* An answer is one message, and out can be many times larger than q (head_dim_v against head_dim_qk). */
static fv_status_t check_reply(const fv_request_t *request)
{
    if (reply_bytes(request) <= REPLY_BYTES_MAX) {
        return FV_OK;
    }
    return fv_fail(FV_ERR_INVALID_ARG,
                   "q: given %" PRIu64 " tokens, whose answer would have %" PRIu64
                   " bytes, expected at most %" PRIu64 "; send fewer tokens a request",
                   request->head.n_tokens, reply_bytes(request), REPLY_BYTES_MAX);
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

/* Finds the sessions and checks everything that does not depend on their lengths. */
static fv_status_t resolve(fv_sched_t *sched, fv_request_t *request)
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

/* What depends on the sessions' lengths; ctl_items become those of the whole request. */
static fv_status_t check_items(const fv_sched_t *sched, fv_request_t *request)
{
    for (uint32_t i = 0; i < request->head.n_items; i++) {
        FV_RETURN_IF_ERR(
            check_position(request, i, sched->config.session_tokens_max, &request->ctl_items[i]));
        FV_RETURN_IF_ERR(check_readable(request, i));
    }
    return FV_OK;
}

/* Takes what it needs: memory for its answer, records, pages. */
static fv_status_t admit(fv_sched_t *sched, fv_request_t *request)
{
    if (sched->config.prepare != NULL) {
        FV_RETURN_IF_ERR(sched->config.prepare(request));
    }
    for (uint32_t i = 0; i < request->head.n_items; i++) {
        if ((request->ctl_items[i].flags & FV_ITEM_APPEND) != 0) {
            FV_RETURN_IF_ERR(
                fv_layer_reserve_record(&request->sessions[i]->layers[request->head.layer]));
        }
    }
    return fv_sched_reserve(sched, request);
}

/* ------------------------------------------------------------------ the step */

/* Of its whole inputs and answer the part that n_tokens of its tokens have. */
static uint64_t tensor_bytes(const fv_request_t *request, uint64_t n_tokens)
{
    return (input_bytes(request) + reply_bytes(request)) / request->head.n_tokens * n_tokens;
}

static bool is_under_way(const fv_sched_t *sched, uint64_t step_id)
{
    for (uint32_t slot = 0; slot < FV_STEP_DEPTH; slot++) {
        if ((step_id != 0) && (sched->under_way[slot] == step_id)) {
            return true;
        }
    }
    return false;
}

/* True when a request of this step, of one under way, half-way, or waiting in front of this one has the same (session, layer). */
static bool must_wait(const fv_sched_t *sched, const fv_request_t *request, uint64_t step_id)
{
    for (uint32_t i = 0; i < request->head.n_items; i++) {
        const fv_layer_t *layer = &request->sessions[i]->layers[request->head.layer];
        if ((layer->half_way != NULL) || (layer->step_mark == step_id) ||
            is_under_way(sched, layer->joined_mark)) {
            return true;
        }
    }
    return false;
}

static void mark(const fv_request_t *request, uint64_t step_id)
{
    for (uint32_t i = 0; i < request->head.n_items; i++) {
        request->sessions[i]->layers[request->head.layer].step_mark = step_id;
    }
}

static bool is_prefill(const fv_request_t *request)
{
    for (uint32_t i = 0; i < request->head.n_items; i++) {
        if (request->items[i].n_tokens > FV_DECODE_TOKENS_MAX) {
            return true;
        }
    }
    return false;
}

typedef enum fv_verdict {
    FV_VERDICT_JOIN,
    FV_VERDICT_WAIT,
    FV_VERDICT_REFUSE,
} fv_verdict_t;

/* The step that is being formed. */
typedef struct fv_forming {
    fv_step_plan_t plan;
    fv_request_t **joined_tail, **finished_tail;
    uint64_t n_bytes;
    uint32_t n_candidates;    /* prefills that may join */
    bool prefill_first;       /* decode waits for once */
    fv_allowance_t allowance; /* of prefill */
} fv_forming_t;

static fv_verdict_t refuse(fv_request_t *request, fv_status_t status)
{
    request->error = fv_error_capture(status);
    return FV_VERDICT_REFUSE;
}

/* No room for n_tokens of the request beside what has joined. */
static bool is_full(const fv_sched_t *sched,
                    const fv_forming_t *f,
                    const fv_request_t *request,
                    uint64_t n_tokens)
{
    return (f->plan.n_joined > 0) &&
           ((f->plan.n_tokens + n_tokens > sched->config.step_tokens_max) ||
            (f->n_bytes + tensor_bytes(request, n_tokens) > STEP_BYTES_MAX) ||
            (f->plan.n_items + request->head.n_items > FV_STEP_ITEMS_MAX));
}

static fv_verdict_t
join(fv_sched_t *sched, fv_forming_t *f, fv_request_t *request, uint64_t n_tokens)
{
    fv_sched_set_piece(request, n_tokens);
    fv_sched_promise_piece(sched, request, f->plan.slot);
    for (uint32_t i = 0; i < request->head.n_items; i++) {
        request->sessions[i]->layers[request->head.layer].joined_mark = f->plan.step_id;
    }
    request->has_rest = !fv_request_is_last_piece(request);
    if (request->has_rest) {
        fv_sched_hold_layers(request, true);
    }
    return FV_VERDICT_JOIN;
}

/* Half-way, and nobody wants the rest: it joins without tokens, to be undone. */
static fv_verdict_t give_up(fv_sched_t *sched, fv_forming_t *f, fv_request_t *request)
{
    return (request->n_tokens_done > 0) ? join(sched, f, request, 0) : FV_VERDICT_REFUSE;
}

/* First round: decode joins; prefill is looked at, and waits for the second. */
static fv_verdict_t judge(fv_sched_t *sched, fv_forming_t *f, fv_request_t *request)
{
    uint64_t step_id = f->plan.step_id;

    if (request->n_tokens_done > 0) { /* admitted already; its layers wait for it */
        for (uint32_t i = 0; i < request->head.n_items; i++) {
            request->sessions[i]->used_us = sched->formed_us;
        }
        request->candidate_step = step_id;
        f->n_candidates++;
        return FV_VERDICT_WAIT;
    }
    fv_status_t status = resolve(sched, request);
    if (status != FV_OK) {
        return refuse(request, status);
    }
    if (must_wait(sched, request, step_id)) {
        mark(request, step_id); /* whoever comes later on these layers waits too */
        return FV_VERDICT_WAIT;
    }
    status = check_items(sched, request);
    if (status != FV_OK) {
        return refuse(request, status);
    }
    if (is_prefill(request)) {
        mark(request, step_id);
        request->candidate_step = step_id;
        f->n_candidates++;
        return FV_VERDICT_WAIT;
    }
    if (f->prefill_first || is_full(sched, f, request, request->head.n_tokens)) {
        mark(request, step_id);
        return FV_VERDICT_WAIT;
    }
    status = admit(sched, request);
    if (status != FV_OK) {
        return refuse(request, status);
    }
    mark(request, step_id);
    f->plan.cost.has_decode = true;
    return join(sched, f, request, request->head.n_tokens);
}

/* Second round: as much of it as the step still takes. */
static fv_verdict_t judge_prefill(fv_sched_t *sched, fv_forming_t *f, fv_request_t *request)
{
    fv_allowance_t left = f->allowance;
    double macs = 0.0;

    if ((request->candidate_step != f->plan.step_id) || (left.n_tokens == 0)) {
        return FV_VERDICT_WAIT;
    }
    request->candidate_step = 0;
    uint64_t n_tokens =
        fv_sched_size_piece(sched, request, f->plan.cost.prefill_macs <= 0.0, &left, &macs);
    if ((n_tokens == 0) || is_full(sched, f, request, n_tokens)) {
        return FV_VERDICT_WAIT;
    }
    if (request->n_tokens_done == 0) {
        fv_status_t status = admit(sched, request);
        if (status != FV_OK) {
            return refuse(request, status);
        }
    }
    f->allowance = left;
    f->plan.cost.prefill_macs += macs;
    return join(sched, f, request, n_tokens);
}

static bool is_stale(fv_request_t *request, int64_t now_us, bool (*is_cancelled)(void *user))
{
    if (is_cancelled(request->user)) {
        request->error = fv_error_capture(fv_fail(FV_ERR_CANCELLED, "the client cancelled"));
        return true;
    }
    if (now_us >= request->deadline_us) {
        request->error = fv_error_capture(
            fv_fail(FV_ERR_DEADLINE, "the deadline passed while the request waited"));
        return true;
    }
    return false;
}

/* The one that the step before did not have, so that slots alternate also when each step ends before the next begins. */
static uint32_t free_slot(const fv_sched_t *sched)
{
    uint32_t slot = (sched->last_slot + 1U) % FV_STEP_DEPTH;

    FV_ASSERT(sched->under_way[slot] == 0);
    return slot;
}

/* The queue, once, oldest first: who joins or is finished leaves it. */
static void walk_queue(fv_sched_t *sched,
                       fv_forming_t *f,
                       bool is_first_round,
                       bool (*is_cancelled)(void *user))
{
    fv_request_t **link = &sched->queue_head;

    while (*link != NULL) {
        fv_request_t *request = *link;
        fv_verdict_t verdict = FV_VERDICT_REFUSE;
        if (!is_first_round) {
            verdict = judge_prefill(sched, f, request);
        } else if (is_stale(request, sched->formed_us, is_cancelled)) {
            verdict = give_up(sched, f, request);
        } else {
            verdict = judge(sched, f, request);
        }
        if (verdict == FV_VERDICT_WAIT) {
            link = &request->next;
            continue;
        }
        *link = request->next;
        request->next = NULL;
        sched->n_queued--;
        sched->n_bytes_queued -= input_bytes(request);
        if (verdict == FV_VERDICT_JOIN) {
            *f->joined_tail = request;
            f->joined_tail = &request->next;
            f->plan.n_joined++;
            f->plan.n_items += request->head.n_items;
            f->plan.n_tokens += request->n_tokens_piece;
            f->n_bytes += tensor_bytes(request, request->n_tokens_piece);
        } else {
            *f->finished_tail = request;
            f->finished_tail = &request->next;
        }
    }
    sched->queue_tail = link;
}

void fv_sched_next_step(fv_sched_t *sched,
                        int64_t now_us,
                        bool (*is_cancelled)(void *user),
                        fv_step_plan_t *out)
{
    fv_forming_t f = {.plan = {.step_id = ++sched->next_step_id, .slot = free_slot(sched)}};
    uint64_t n_tokens_max = sched->config.step_tokens_max;

    f.joined_tail = &f.plan.joined;
    f.finished_tail = &f.plan.finished;
    f.prefill_first = sched->n_passed_over >= PATIENCE;
    sched->formed_us = now_us;
    walk_queue(sched, &f, true, is_cancelled);
    n_tokens_max = (f.plan.n_tokens < n_tokens_max) ? (n_tokens_max - f.plan.n_tokens) : 0U;
    f.allowance = fv_budget_allow(&sched->budget, now_us, f.plan.cost.has_decode, n_tokens_max);
    walk_queue(sched, &f, false, is_cancelled);
    bool has_passed = (f.n_candidates > 0) && (f.plan.cost.prefill_macs <= 0.0);
    sched->n_passed_over = (has_passed && !f.prefill_first) ? (sched->n_passed_over + 1U) : 0U;
    if (f.prefill_first && (f.plan.joined == NULL) && (f.plan.finished == NULL)) {
        fv_sched_next_step(sched, now_us, is_cancelled, out); /* decode waited for nobody */
        return;
    }
    if (f.plan.joined != NULL) {
        sched->under_way[f.plan.slot] = f.plan.step_id;
        sched->last_slot = f.plan.slot;
    }
    *out = f.plan;
}

static void commit_item(fv_sched_t *sched, const fv_request_t *request, uint32_t i)
{
    const fv_attend_item_t *item = &request->items[i];
    fv_layer_t *layer = &request->sessions[i]->layers[request->head.layer];
    uint64_t end = item->position + item->n_tokens;

    fv_sched_account_item(sched, request, i, end);
    layer->n_tokens = end;
    fv_layer_own_tail(layer);
    fv_layer_add_record(layer, item->position, item->n_tokens, request->digests[i]);
    sched->n_tokens_appended += item->n_tokens;
}

/* Its last piece is done, or it failed. */
static void end_request(fv_sched_t *sched, fv_request_t *request)
{
    if (request->kv_bytes_pending > 0) {
        request->sessions[0]->owner->kv_bytes_pending -= request->kv_bytes_pending;
    }
    fv_sched_forget_rest(sched, request);
    if ((request->n_tokens_done > 0) || !fv_request_is_last_piece(request)) {
        fv_sched_hold_layers(request, false);
    }
    for (uint32_t i = 0; i < request->head.n_items; i++) {
        if (!fv_request_has_begun(request, i)) {
            continue;
        }
        if (request->error.status == FV_OK) {
            commit_item(sched, request, i);
        } else {
            fv_sched_account_item(sched, request, i, request->items[i].position);
        }
    }
}

void fv_sched_step_done(fv_sched_t *sched, fv_step_plan_t *plan)
{
    fv_request_t *request = plan->joined;
    fv_request_t **tail = &plan->joined;

    if (request == NULL) { /* was never under way */
        return;
    }
    while (request != NULL) {
        fv_request_t *next = request->next;
        if (!fv_sched_next_piece(sched, request)) {
            end_request(sched, request);
            *tail = request;
            tail = &request->next;
        }
        request = next;
    }
    *tail = NULL;
    sched->under_way[plan->slot] = 0;
    fv_sched_forget_promises(sched, plan->slot);
    fv_budget_learn(&sched->budget, &plan->cost);
}
