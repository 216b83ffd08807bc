/*
 * sched_step.c - forms a step of all that waits and may run together, and commits it.
 *
 * Decode path: station 3 of 10, continued from sched.h. Checks: sched_check.c.
 */
#include "coord/sched_internal.h"

/* Tensors of one step, unless one request alone has more. */
#define STEP_BYTES_MAX ((uint64_t)1 << 30)
/* Steps in a row that decode may fill so that no prefill fits. */
#define PATIENCE 8U

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
    return (input_bytes(request) + fv_request_reply_bytes(request)) / request->head.n_tokens *
           n_tokens;
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
    fv_sched_choose_ways(sched, request);
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
    fv_status_t status = fv_sched_resolve(sched, request);
    if (status != FV_OK) {
        return refuse(request, status);
    }
    if (must_wait(sched, request, step_id)) {
        mark(request, step_id); /* whoever comes later on these layers waits too */
        return FV_VERDICT_WAIT;
    }
    status = fv_sched_check_items(sched, request);
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
