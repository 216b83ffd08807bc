/*
 * sched_memory.c - what requests take of the ranks' memory, and what policies give back.
 *
 * Decode path: station 3 of 10, continued from sched_step.c.
 */
#include "coord/sched_internal.h"
#include "proto/reduce.h"

#include <inttypes.h>

/* Pages of the model's size that the rank can still give: loose ones, and whole free slabs. */
static uint64_t pages_free(const fv_sched_t *sched, uint32_t rank, uint32_t model_slot)
{
    const fv_ctl_memory_t *memory = &sched->ranks[rank];
    uint64_t page_bytes = fv_model_page_bytes(&sched->models[model_slot].spec);

    return memory->n_pages_free[model_slot] +
           memory->n_slabs_free * (memory->slab_bytes / page_bytes);
}

/* Takes pages from the mirror, as the rank's pool will: loose pages first, then slabs. A rank that reported less than was
 * promised has none left. */
static void take_pages(fv_sched_t *sched, uint32_t rank, uint32_t model_slot, uint64_t n_pages)
{
    fv_ctl_memory_t *memory = &sched->ranks[rank];
    size_t page_bytes = fv_model_page_bytes(&sched->models[model_slot].spec);
    uint64_t pages_per_slab = memory->slab_bytes / page_bytes;
    uint64_t loose = memory->n_pages_free[model_slot];
    uint64_t n_free = pages_free(sched, rank, model_slot);

    n_pages = (n_pages < n_free) ? n_pages : n_free;
    if (n_pages > loose) {
        uint64_t n_slabs = fv_div_up(n_pages - loose, pages_per_slab);
        memory->n_slabs_free -= (uint32_t)n_slabs;
        memory->kv_bytes_free -= n_slabs * (memory->slab_bytes % page_bytes); /* holds no page */
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

/* ------------------------------------------------------------------ promises */

static fv_promise_t *promise_of(fv_sched_t *sched, uint32_t slot, uint32_t rank)
{
    return &sched->promises[(size_t)slot * sched->config.n_ranks + rank];
}

void fv_sched_deduct_promises(fv_sched_t *sched, uint32_t rank)
{
    for (uint32_t slot = 0; slot < FV_PROMISES; slot++) {
        const fv_promise_t *promise = promise_of(sched, slot, rank);
        for (uint32_t i = 0; (promise->n_pages > 0) && (i < sched->n_models); i++) {
            if (promise->by_model[i] > 0) {
                take_pages(sched, rank, i, promise->by_model[i]);
            }
        }
    }
}

void fv_sched_rank_done(fv_sched_t *sched,
                        const fv_step_plan_t *plan,
                        uint32_t rank,
                        const fv_ctl_memory_t *memory)
{
    *promise_of(sched, plan->slot, rank) = (fv_promise_t){0};
    fv_sched_rank_memory(sched, rank, memory);
}

void fv_sched_forget_promises(fv_sched_t *sched, uint32_t slot)
{
    for (uint32_t rank = 0; rank < sched->config.n_ranks; rank++) {
        fv_promise_t *promise = promise_of(sched, slot, rank);
        if (promise->n_pages > 0) {
            *promise = (fv_promise_t){0};
        }
    }
}

/* ------------------------------------------------------------------ requests */

/* Adds what one appending item needs on each rank to the scratch; O(cells). */
static uint32_t
count_pages(fv_sched_t *sched, const fv_request_t *request, uint32_t i, uint32_t n_touched)
{
    const fv_session_t *session = request->sessions[i];
    const fv_placement_t *p = &session->placement;
    const fv_ctl_item_t *item = &request->ctl_items[i];
    uint64_t end = item->position + item->n_tokens;
    bool copies_tail = ((item->flags & FV_ITEM_CONTINUES) == 0) && (item->n_tokens > 0) &&
                       ((item->flags & FV_ITEM_COPIES_TAIL) != 0);

    for (int32_t cell = 0; cell < p->n_head_parts * p->n_ctx_parts; cell++) {
        int32_t cp = cell % p->n_ctx_parts;
        int32_t hp = cell / p->n_ctx_parts;
        uint64_t n_pages =
            fv_placement_pages(p, cp, end) - fv_placement_pages(p, cp, item->position);
        if (copies_tail && (fv_placement_part_of(p, item->position) == cp)) {
            n_pages++; /* the shared partial page is copied first */
        }
        if (n_pages == 0) {
            continue;
        }
        uint32_t rank = p->ranks[cell];
        n_pages *= (uint64_t)fv_placement_n_heads(p, request->spec, hp);
        if (sched->pages_needed[rank] == 0) {
            sched->touched_ranks[n_touched++] = rank;
        }
        sched->pages_needed[rank] += n_pages;
    }
    return n_touched;
}

/* Of all its appending items, into the scratch; the number of ranks. */
static uint32_t count_request(fv_sched_t *sched, const fv_request_t *request)
{
    uint32_t n_touched = 0;

    for (uint32_t i = 0; i < request->head.n_items; i++) {
        if ((request->ctl_items[i].flags & FV_ITEM_APPEND) != 0) {
            n_touched = count_pages(sched, request, i, n_touched);
        }
    }
    return n_touched;
}

/* Moves what the scratch says from one promise to another (FV_PROMISES: to none), and empties the scratch. */
static void
move_promise(fv_sched_t *sched, uint32_t model_slot, uint32_t n_touched, uint32_t from, uint32_t to)
{
    for (uint32_t t = 0; t < n_touched; t++) {
        uint32_t rank = sched->touched_ranks[t];
        uint64_t n_pages = sched->pages_needed[rank];
        fv_promise_t *source = promise_of(sched, from, rank);

        source->n_pages -= n_pages;
        source->by_model[model_slot] -= (uint32_t)n_pages;
        if (to < FV_PROMISES) {
            fv_promise_t *target = promise_of(sched, to, rank);
            target->n_pages += n_pages;
            target->by_model[model_slot] += (uint32_t)n_pages;
        }
        sched->pages_needed[rank] = 0;
    }
}

void fv_sched_promise_piece(fv_sched_t *sched, const fv_request_t *request, uint32_t slot)
{
    uint32_t n_touched = count_request(sched, request);

    move_promise(sched, request->model_slot, n_touched, FV_PROMISE_LATER, slot);
}

void fv_sched_forget_rest(fv_sched_t *sched, fv_request_t *request)
{
    uint64_t n_done = request->n_tokens_done;
    uint64_t n_piece = request->n_tokens_piece;

    if (!request->has_rest) {
        return;
    }
    request->has_rest = false;
    request->n_tokens_done += n_piece;
    fv_sched_set_piece(request, request->head.n_tokens - request->n_tokens_done);
    uint32_t n_touched = count_request(sched, request);
    move_promise(sched, request->model_slot, n_touched, FV_PROMISE_LATER, FV_PROMISES);
    request->n_tokens_done = n_done;
    fv_sched_set_piece(request, n_piece);
}

/* What it takes now it is promised to the end, whatever becomes of those who share the page. */
static void note_tails(fv_request_t *request)
{
    for (uint32_t i = 0; i < request->head.n_items; i++) {
        fv_ctl_item_t *item = &request->ctl_items[i];

        if (((item->flags & FV_ITEM_APPEND) != 0) &&
            fv_layer_copies_tail(&request->sessions[i]->layers[item->layer])) {
            item->flags |= FV_ITEM_COPIES_TAIL;
        }
    }
}

/* All or nothing: takes the request's pages on every rank, or none. */
static fv_status_t take_of_ranks(fv_sched_t *sched, fv_request_t *request)
{
    note_tails(request);
    uint32_t n_touched = count_request(sched, request);
    fv_status_t status = FV_OK;

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
            fv_promise_t *promise = promise_of(sched, FV_PROMISE_LATER, rank);
            take_pages(sched, rank, request->model_slot, sched->pages_needed[rank]);
            promise->n_pages += sched->pages_needed[rank];
            promise->by_model[request->model_slot] += (uint32_t)sched->pages_needed[rank];
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

fv_status_t fv_sched_reserve(fv_sched_t *sched, fv_request_t *request)
{
    FV_RETURN_IF_ERR(check_kv_quota(request));
    FV_RETURN_IF_ERR(take_of_ranks(sched, request));
    if (request->kv_bytes_pending > 0) { /* joins: nothing can refuse it any more */
        request->sessions[0]->owner->kv_bytes_pending += request->kv_bytes_pending;
    }
    return FV_OK;
}

void fv_sched_account_item(fv_sched_t *sched,
                           const fv_request_t *request,
                           uint32_t i,
                           uint64_t n_tokens)
{
    const fv_model_spec_t *spec = request->spec;
    const fv_attend_item_t *item = &request->items[i]; /* all pieces of it */
    const fv_policy_t *policy = &spec->policies[spec->layer_policy[request->head.layer]];
    fv_session_t *session = request->sessions[i];
    const fv_placement_t *p = &session->placement;
    fv_layer_t *layer = &session->layers[request->head.layer];

    for (int32_t cell = 0; cell < p->n_head_parts * p->n_ctx_parts; cell++) {
        int32_t cp = cell % p->n_ctx_parts;
        uint64_t bytes = fv_plan_growth_bytes(spec, p, cell, item->position, n_tokens);
        uint64_t freed = 0;

        if (policy->kind != FV_POLICY_DENSE) {
            freed =
                fv_reduce_freed(spec, policy, p, cell, fv_reduce_dead(p, cp, policy, layer->floor),
                                fv_reduce_dead(p, cp, policy, item->position)) *
                fv_model_page_bytes(spec);
        }
        if (bytes != freed) {
            fv_sched_account(sched, session, cell, session->held[cell] + bytes - freed);
        }
    }
    layer->floor = item->position;
}
