/*
 * sched_step.c - forms a step of all that waits and may run together, and commits it.
 *
 * Decode path: station 3 of 10, continued from sched.h.
 */
#include "common/digest.h"
#include "coord/sched_internal.h"

#include <inttypes.h>
#include <string.h>

/* Keeps local page numbers in 31 bits. */
#define POSITION_MAX ((uint64_t)1 << 36)
/* Tensors of one step, unless one request alone has more. */
#define STEP_BYTES_MAX ((uint64_t)1 << 30)
/* gRPC and MPI count a message in a signed int; the head takes a little. */
#define REPLY_BYTES_MAX ((uint64_t)INT32_MAX - 4096U)

void fv_sched_submit(fv_sched_t *sched, fv_request_t *request)
{
    request->next = NULL;
    request->error = (fv_error_t){0};
    *sched->queue_tail = request;
    sched->queue_tail = &request->next;
    sched->n_queued++;
}

fv_request_t *fv_sched_take_all(fv_sched_t *sched)
{
    fv_request_t *all = sched->queue_head;

    sched->queue_head = NULL;
    sched->queue_tail = &sched->queue_head;
    sched->n_queued = 0;
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
    uint64_t row_bytes = (uint64_t)request->spec->head_dim_v * fv_dtype_bytes(request->head.dtype);

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
    FV_RETURN_IF_ERR(
        check_tensor("v", head->v.n_bytes, n_kv, spec->n_kv_heads, spec->head_dim_v, head->dtype));
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
    session->used_us = request->received_us;
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

    if ((item->position > layer->n_tokens) || (end > POSITION_MAX)) {
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
                            (request->head.want_lse ? FV_ITEM_WANT_LSE : 0)),
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

/* ------------------------------------------------------------------ memory */

/* Pages of the model's size that the rank can still give: loose ones, and whole free slabs. */
static uint64_t pages_free(const fv_sched_t *sched, uint32_t rank, uint32_t model_slot)
{
    const fv_ctl_memory_t *memory = &sched->ranks[rank];
    uint64_t page_bytes = fv_model_page_bytes(&sched->models[model_slot].spec);

    return memory->n_pages_free[model_slot] +
           memory->n_slabs_free * (memory->slab_bytes / page_bytes);
}

/* Takes pages from the mirror, as the rank's pool will: loose pages first, then slabs. */
static void take_pages(fv_sched_t *sched, uint32_t rank, uint32_t model_slot, uint64_t n_pages)
{
    fv_ctl_memory_t *memory = &sched->ranks[rank];
    size_t page_bytes = fv_model_page_bytes(&sched->models[model_slot].spec);
    uint64_t pages_per_slab = memory->slab_bytes / page_bytes;
    uint64_t loose = memory->n_pages_free[model_slot];

    if (n_pages > loose) {
        uint64_t n_slabs = fv_div_up(n_pages - loose, pages_per_slab);
        memory->n_slabs_free -= (uint32_t)n_slabs;
        loose += n_slabs * pages_per_slab;
    }
    loose -= n_pages;
    memory->kv_bytes_free -= n_pages * page_bytes;
    for (uint32_t i = 0; i < sched->n_models; i++) { /* models of one page size share their slabs */
        if (fv_model_page_bytes(&sched->models[i].spec) == page_bytes) {
            memory->n_pages_free[i] = (uint32_t)loose;
        }
    }
}

/* Adds what one appending item needs on each rank to the scratch; O(cells). */
static uint32_t
count_pages(fv_sched_t *sched, const fv_request_t *request, uint32_t i, uint32_t n_touched)
{
    const fv_session_t *session = request->sessions[i];
    const fv_placement_t *p = &session->placement;
    const fv_ctl_item_t *item = &request->ctl_items[i];
    uint64_t end = item->position + item->n_tokens;

    for (int32_t cell = 0; cell < p->n_head_parts * p->n_ctx_parts; cell++) {
        int32_t cp = cell % p->n_ctx_parts;
        int32_t hp = cell / p->n_ctx_parts;
        uint64_t n_pages =
            fv_placement_pages(p, cp, end) - fv_placement_pages(p, cp, item->position);
        if (fv_layer_copies_tail(&session->layers[item->layer]) &&
            (fv_placement_part_of(p, item->position) == cp)) {
            n_pages++; /* the shared partial page is copied first */
        }
        if (n_pages == 0) {
            continue;
        }
        uint32_t rank = p->ranks[cell];
        n_pages *= (uint64_t)(fv_placement_head_begin(p, request->spec->n_kv_heads, hp + 1) -
                              fv_placement_head_begin(p, request->spec->n_kv_heads, hp));
        if (sched->pages_needed[rank] == 0) {
            sched->touched_ranks[n_touched++] = rank;
        }
        sched->pages_needed[rank] += n_pages;
    }
    return n_touched;
}

/* All or nothing: takes the request's pages on every rank, or none. */
static fv_status_t reserve_memory(fv_sched_t *sched, fv_request_t *request)
{
    uint32_t n_touched = 0;
    fv_status_t status = FV_OK;

    for (uint32_t i = 0; i < request->head.n_items; i++) {
        if ((request->ctl_items[i].flags & FV_ITEM_APPEND) != 0) {
            n_touched = count_pages(sched, request, i, n_touched);
        }
    }
    for (uint32_t t = 0; (t < n_touched) && (status == FV_OK); t++) {
        uint32_t rank = sched->touched_ranks[t];
        uint64_t free_pages = pages_free(sched, rank, request->model_slot);
        uint64_t page_bytes = fv_model_page_bytes(request->spec);
        if (sched->pages_needed[rank] > free_pages) {
            status = fv_fail(FV_ERR_EXHAUSTED,
                             "KV memory of rank %u: %" PRIu64 " bytes needed, %" PRIu64
                             " free of %" PRIu64 "; close or truncate sessions",
                             rank, sched->pages_needed[rank] * page_bytes, free_pages * page_bytes,
                             sched->ranks[rank].kv_bytes_total);
        }
    }
    for (uint32_t t = 0; t < n_touched; t++) {
        uint32_t rank = sched->touched_ranks[t];
        if (status == FV_OK) {
            take_pages(sched, rank, request->model_slot, sched->pages_needed[rank]);
        }
        sched->pages_needed[rank] = 0;
    }
    return status;
}

/* What the appends of a request add to what its sessions hold, over all ranks. */
static uint64_t growth_bytes(const fv_request_t *request)
{
    uint64_t n_bytes = 0;

    for (uint32_t i = 0; i < request->head.n_items; i++) {
        const fv_ctl_item_t *item = &request->ctl_items[i];
        const fv_placement_t *p = &request->sessions[i]->placement;
        for (int32_t cell = 0;
             ((item->flags & FV_ITEM_APPEND) != 0) && (cell < p->n_head_parts * p->n_ctx_parts);
             cell++) {
            n_bytes += fv_plan_growth_bytes(request->spec, p, cell, item->position,
                                            item->position + item->n_tokens);
        }
    }
    return n_bytes;
}

/* The quota of the sessions' owner: charged now, settled when the step is done. */
static fv_status_t check_kv_quota(fv_request_t *request)
{
    const fv_principal_t *owner = request->sessions[0]->owner;

    request->kv_bytes_pending = 0;
    if ((owner == NULL) ||
        (atomic_load_explicit(&owner->kv_bytes_max, memory_order_relaxed) == 0)) {
        return FV_OK;
    }
    uint64_t n_bytes = growth_bytes(request);
    FV_RETURN_IF_ERR(fv_principal_check_kv(owner, n_bytes));
    request->kv_bytes_pending = n_bytes;
    return FV_OK;
}

static fv_status_t admit(fv_sched_t *sched, fv_request_t *request)
{
    for (uint32_t i = 0; i < request->head.n_items; i++) {
        FV_RETURN_IF_ERR(
            check_position(request, i, sched->config.session_tokens_max, &request->ctl_items[i]));
    }
    if (sched->config.prepare != NULL) {
        FV_RETURN_IF_ERR(sched->config.prepare(request));
    }
    for (uint32_t i = 0; i < request->head.n_items; i++) {
        if ((request->ctl_items[i].flags & FV_ITEM_APPEND) != 0) {
            FV_RETURN_IF_ERR(
                fv_layer_reserve_record(&request->sessions[i]->layers[request->head.layer]));
        }
    }
    FV_RETURN_IF_ERR(check_kv_quota(request));
    FV_RETURN_IF_ERR(reserve_memory(sched, request));
    if (request->kv_bytes_pending > 0) { /* joins: nothing can refuse it any more */
        request->sessions[0]->owner->kv_bytes_pending += request->kv_bytes_pending;
    }
    return FV_OK;
}

/* ------------------------------------------------------------------ the step */

static uint64_t tensor_bytes(const fv_request_t *request)
{
    return (uint64_t)request->head.q.n_bytes + request->head.k.n_bytes + request->head.v.n_bytes +
           reply_bytes(request);
}

/* True when a request of this step, or one waiting in front of this one, has the same (session, layer). */
static bool must_wait(const fv_request_t *request, uint64_t step_id)
{
    for (uint32_t i = 0; i < request->head.n_items; i++) {
        if (request->sessions[i]->layers[request->head.layer].step_mark == step_id) {
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

typedef enum fv_verdict {
    FV_VERDICT_JOIN,
    FV_VERDICT_WAIT,
    FV_VERDICT_REFUSE,
} fv_verdict_t;

static fv_verdict_t
judge(fv_sched_t *sched, fv_request_t *request, const fv_step_plan_t *plan, uint64_t n_bytes)
{
    fv_status_t status = resolve(sched, request);

    if (status != FV_OK) {
        request->error = fv_error_capture(status);
        return FV_VERDICT_REFUSE;
    }
    bool is_full = (plan->n_joined > 0) &&
                   ((plan->n_tokens + request->head.n_tokens > sched->config.step_tokens_max) ||
                    (n_bytes + tensor_bytes(request) > STEP_BYTES_MAX) ||
                    (plan->n_items + request->head.n_items > FV_STEP_ITEMS_MAX));
    if (is_full || must_wait(request, plan->step_id)) {
        mark(request, plan->step_id); /* whoever comes later on these layers waits too */
        return FV_VERDICT_WAIT;
    }
    status = admit(sched, request);
    if (status != FV_OK) {
        request->error = fv_error_capture(status);
        return FV_VERDICT_REFUSE;
    }
    mark(request, plan->step_id);
    return FV_VERDICT_JOIN;
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

void fv_sched_next_step(fv_sched_t *sched,
                        int64_t now_us,
                        bool (*is_cancelled)(void *user),
                        fv_step_plan_t *out)
{
    fv_step_plan_t plan = {.step_id = ++sched->next_step_id};
    fv_request_t **joined_tail = &plan.joined;
    fv_request_t **finished_tail = &plan.finished;
    fv_request_t **link = &sched->queue_head;
    uint64_t n_bytes = 0;

    while (*link != NULL) {
        fv_request_t *request = *link;
        fv_verdict_t verdict = FV_VERDICT_REFUSE;
        if (!is_stale(request, now_us, is_cancelled)) {
            verdict = judge(sched, request, &plan, n_bytes);
        }
        if (verdict == FV_VERDICT_WAIT) {
            link = &request->next;
            continue;
        }
        *link = request->next;
        request->next = NULL;
        sched->n_queued--;
        if (verdict == FV_VERDICT_JOIN) {
            *joined_tail = request;
            joined_tail = &request->next;
            plan.n_joined++;
            plan.n_items += request->head.n_items;
            plan.n_tokens += request->head.n_tokens;
            n_bytes += tensor_bytes(request);
        } else {
            *finished_tail = request;
            finished_tail = &request->next;
        }
    }
    sched->queue_tail = link;
    *out = plan;
}

static void commit_item(fv_sched_t *sched, const fv_request_t *request, uint32_t i)
{
    const fv_ctl_item_t *item = &request->ctl_items[i];
    fv_session_t *session = request->sessions[i];
    const fv_placement_t *p = &session->placement;
    fv_layer_t *layer = &session->layers[item->layer];
    uint64_t end = item->position + item->n_tokens;

    for (int32_t cell = 0; cell < p->n_head_parts * p->n_ctx_parts; cell++) {
        uint64_t bytes = fv_plan_growth_bytes(request->spec, p, cell, item->position, end);
        if (bytes > 0) {
            fv_sched_account(sched, session, cell, session->held[cell] + bytes);
        }
    }
    layer->n_tokens = end;
    fv_layer_own_tail(layer);
    fv_layer_add_record(layer, item->position, item->n_tokens, request->digests[i]);
    sched->n_tokens_appended += item->n_tokens;
}

void fv_sched_step_done(fv_sched_t *sched, const fv_step_plan_t *plan)
{
    for (const fv_request_t *r = plan->joined; r != NULL; r = r->next) {
        if (r->kv_bytes_pending > 0) {
            r->sessions[0]->owner->kv_bytes_pending -= r->kv_bytes_pending;
        }
        if (r->error.status != FV_OK) {
            continue;
        }
        for (uint32_t i = 0; i < r->head.n_items; i++) {
            if ((r->ctl_items[i].flags & FV_ITEM_APPEND) != 0) {
                commit_item(sched, r, i);
            }
        }
    }
}
