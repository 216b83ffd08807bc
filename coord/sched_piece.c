/*
 * sched_piece.c - a request served in pieces, one a step.
 *
 * Decode path: station 3 of 10, continued from sched_step.c.
 *
 * A request is admitted whole: checked, and its memory taken on every rank, before its first piece runs. It is committed
 * whole, too: until its last piece is done the sessions' lengths are what they were, and whoever else wants one of its
 * (session, layer)s waits. A failure, cancellation or deadline in between cuts the ranks back to where the request began.
 * Pieces after the first free no KV (FV_ITEM_CONTINUES), so that the whole request can be repeated as if it had been one.
 *
 * A piece is a run of the request's tokens, in the order in which they came: it may end within an item and begin within one.
 */
#include "common/policy.h"
#include "coord/sched_internal.h"

#include <math.h>

static uint64_t clamp(uint64_t x, uint64_t low, uint64_t high)
{
    return (x < low) ? low : (x > high) ? high : x;
}

bool fv_request_has_begun(const fv_request_t *request, uint32_t i)
{
    const fv_ctl_item_t *item = &request->ctl_items[i];

    return ((item->flags & FV_ITEM_APPEND) != 0) &&
           ((item->n_tokens > 0) || ((item->flags & FV_ITEM_CONTINUES) != 0));
}

bool fv_request_is_last_piece(const fv_request_t *request)
{
    return request->n_tokens_done + request->n_tokens_piece >= request->head.n_tokens;
}

bool fv_sched_is_half_way(const fv_session_t *session)
{
    for (int32_t i = 0; i < session->n_layers; i++) {
        if (session->layers[i].half_way != NULL) {
            return true;
        }
    }
    return false;
}

void fv_sched_set_piece(fv_request_t *request, uint64_t n_tokens)
{
    uint64_t begin = request->n_tokens_done;
    uint64_t end = begin + n_tokens;
    uint64_t first = 0; /* token of the item */

    request->n_tokens_piece = n_tokens;
    for (uint32_t i = 0; i < request->head.n_items; i++) {
        const fv_attend_item_t *whole = &request->items[i];
        fv_ctl_item_t *item = &request->ctl_items[i];
        uint64_t from = clamp(begin, first, first + whole->n_tokens) - first;
        uint64_t to = clamp(end, first, first + whole->n_tokens) - first;

        item->position = whole->position + from;
        item->n_tokens = (uint32_t)(to - from);
        item->flags &= (uint16_t) ~(FV_ITEM_CONTINUES | FV_ITEM_MOVES_KV);
        if ((item->flags & FV_ITEM_APPEND) != 0) { /* else what exists already stays visible */
            item->kv_end = whole->position + to;
        }
        if (from > 0) {
            item->flags |= FV_ITEM_CONTINUES;
        }
        first += whole->n_tokens;
    }
}

void fv_sched_choose_ways(const fv_sched_t *sched, fv_request_t *request)
{
    const fv_sched_config_t *c = &sched->config;

    for (uint32_t i = 0; i < request->head.n_items; i++) {
        fv_ctl_item_t *item = &request->ctl_items[i];
        fv_session_t *session = request->sessions[i];

        if ((item->n_tokens <= FV_DECODE_TOKENS_MAX) ||
            (fv_placement_active_parts(&session->placement, item->kv_end) < 2)) {
            continue;
        }
        if (fv_plan_moves(&c->cost, c->context_prefill, c->move_bytes, request->spec,
                          &session->placement, item)) {
            item->flags |= FV_ITEM_MOVES_KV;
            session->n_moves++;
        } else {
            session->n_visits++;
        }
    }
}

/* Tokens that the first query of an item at `position` sees, of a policy; roughly, for its cost. */
static double visible_tokens(const fv_policy_t *policy, double position)
{
    double local = 0.0;

    switch ((fv_policy_kind_t)policy->kind) {
    case FV_POLICY_WINDOW:
        local = (double)policy->window_tokens + (double)policy->sink_tokens;
        return (local < position) ? local : position;
    case FV_POLICY_S2:
        local = (double)policy->local_blocks * (double)policy->block_tokens;
        return (local < position) ? (local + (position - local) / (double)policy->vert_stride)
                                  : position;
    case FV_POLICY_DENSE:
    default:
        return position;
    }
}

/* Rows see each other only through the causal mask: where it is off, those of one append all see all of it. */
static bool can_be_cut(const fv_request_t *request)
{
    for (uint32_t i = 0; !request->head.causal && (i < request->head.n_items); i++) {
        if ((request->ctl_items[i].flags & FV_ITEM_APPEND) != 0) {
            return false;
        }
    }
    return true;
}

/*
 * Whole pages of the prompt where there is one, else whole row blocks of the kernels: rows then share a block with the same
 * rows however the prompt is cut, so that on CPU ranks time changes no bit of an answer (docs/numerics.md).
 */
static uint64_t round_piece(uint64_t n, uint64_t left)
{
    if (n >= left) {
        return left;
    }
    uint64_t block = (n >= FV_PAGE_TOKENS) ? FV_PAGE_TOKENS : FV_PIECE_TOKENS_MIN;
    return (n >= block) ? (n / block * block) : n;
}

static double macs_per_pair(const fv_model_spec_t *spec)
{
    return (double)spec->n_q_heads * ((double)spec->head_dim_qk + (double)spec->head_dim_v);
}

static uint64_t least_tokens(const fv_sched_t *sched, const fv_model_spec_t *spec)
{
    double n_kv_heads = fv_model_is_latent(spec) ? 1.0 : (double)spec->n_kv_heads;

    return fv_budget_least(&sched->budget, macs_per_pair(spec),
                           n_kv_heads * (double)fv_model_token_bytes(spec),
                           sched->config.cost.rank_bytes_per_us);
}

/* Tokens of one item that the allowance has room for, and their cost, which is taken from it; at least `least`, or none, unless it is
 * the first of the step. */
static uint64_t take_of_item(const fv_request_t *request,
                             uint32_t i,
                             uint64_t n_done,
                             uint64_t least,
                             bool is_first,
                             fv_allowance_t *allowance,
                             double *macs)
{
    const fv_model_spec_t *spec = request->spec;
    const fv_attend_item_t *item = &request->items[i];
    double position = (double)(item->position + n_done);
    double visible =
        request->head.causal
            ? visible_tokens(&spec->policies[spec->layer_policy[request->head.layer]], position)
            : (double)request->ctl_items[i].kv_end;
    uint64_t left = item->n_tokens - n_done;
    uint64_t n = fv_budget_tokens(macs_per_pair(spec), visible, allowance->macs);

    n = (n < allowance->n_tokens) ? n : allowance->n_tokens;
    if ((n < least) && (n < left)) {
        n = is_first ? clamp(allowance->n_tokens, 0, least) : 0U;
    }
    n = round_piece(n, left);
    double cost = fv_budget_macs(macs_per_pair(spec), visible, (double)n);
    *macs += cost;
    allowance->macs -= (cost < allowance->macs) ? cost : allowance->macs;
    allowance->n_tokens -= n;
    return n;
}

uint64_t fv_sched_size_piece(const fv_sched_t *sched,
                             const fv_request_t *request,
                             bool is_first,
                             fv_allowance_t *allowance,
                             double *macs)
{
    uint64_t first = 0;
    uint64_t n_tokens = 0;
    bool can_cut = can_be_cut(request);
    fv_allowance_t unbounded = {.n_tokens = UINT64_MAX, .macs = (double)INFINITY};
    uint64_t least = least_tokens(sched, request->spec);

    for (uint32_t i = 0; i < request->head.n_items; i++) {
        uint64_t n_item = request->items[i].n_tokens;
        uint64_t n_done = clamp(request->n_tokens_done, first, first + n_item) - first;

        first += n_item;
        if (n_done == n_item) {
            continue;
        }
        uint64_t n = take_of_item(request, i, n_done, least, is_first && (n_tokens == 0),
                                  can_cut ? allowance : &unbounded, macs);
        n_tokens += n;
        if (n_done + n < n_item) {
            break;
        }
    }
    if (!can_cut) {
        *allowance = (fv_allowance_t){0, 0.0};
    }
    return n_tokens;
}

/* ------------------------------------------------------------------ between pieces */

void fv_sched_hold_layers(fv_request_t *request, bool is_held)
{
    for (uint32_t i = 0; i < request->head.n_items; i++) {
        request->sessions[i]->layers[request->head.layer].half_way = is_held ? request : NULL;
    }
}

bool fv_sched_next_piece(fv_sched_t *sched, fv_request_t *request)
{
    if ((request->error.status != FV_OK) || fv_request_is_last_piece(request)) {
        return false;
    }
    request->n_tokens_done += request->n_tokens_piece;
    request->n_tokens_piece = 0;
    fv_sched_enqueue(sched, request);
    return true;
}
