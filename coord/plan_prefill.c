/*
 * plan_prefill.c - see plan_prefill.h.
 */
#include "coord/plan_prefill.h"

#include "proto/moved.h"

#define CLEARLY 0.95

/* Query tokens of a part sum linearly while they run through one block of the context. */
double fv_plan_chunk_pairs(const fv_placement_t *placement,
                           int32_t cp,
                           uint64_t position,
                           uint64_t n_tokens)
{
    uint64_t end = position + n_tokens;
    double pairs = 0.0;

    for (uint64_t t = position; t < end;) {
        uint64_t block_end = (t / placement->shard_tokens + 1U) * placement->shard_tokens;
        uint64_t n = ((block_end < end) ? block_end : end) - t;
        double first = (double)fv_placement_tokens(placement, cp, t + 1U);
        double last = (double)fv_placement_tokens(placement, cp, t + n);

        pairs += (double)n * (first + last) / 2.0;
        t += n;
    }
    return pairs;
}

static void set_us(const fv_plan_cost_t *cost, int32_t n_parts, fv_plan_way_t *way)
{
    way->us = (cost->rank_macs_per_us > 0.0) ? (way->macs / cost->rank_macs_per_us) : 0.0;
    if (n_parts > 1) {
        way->us += cost->exchange_us + way->sent_bytes / cost->exchange_bytes_per_us;
    }
}

fv_plan_chunk_t fv_plan_chunk(const fv_plan_cost_t *cost,
                              const fv_model_spec_t *spec,
                              const fv_placement_t *placement,
                              uint64_t position,
                              uint64_t n_tokens)
{
    fv_head_part_t part = fv_placement_head_part(placement, spec, 0);
    double n_q_heads = (double)(part.q_head_end - part.q_head_begin);
    double n_kv_heads = (double)(part.head_end - part.head_begin);
    double pair_macs = n_q_heads * ((double)part.head_dim_qk + (double)part.head_dim_v);
    double state_bytes = ((double)part.head_dim_v + 1.0) * (double)sizeof(float);
    double n_rows = (double)n_tokens * n_q_heads;
    uint64_t n_seen = position + n_tokens;
    fv_plan_chunk_t c = {.n_parts = fv_placement_active_parts(placement, n_seen)};
    double others = (double)(c.n_parts - 1);
    double pairs = 0.0;

    for (int32_t cp = 0; cp < c.n_parts; cp++) {
        double own = fv_plan_chunk_pairs(placement, cp, position, n_tokens);
        double held = (double)fv_placement_tokens(placement, cp, n_seen) * n_kv_heads *
                      (double)fv_model_token_bytes(spec);

        pairs += own;
        c.visit.macs = (own * pair_macs > c.visit.macs) ? (own * pair_macs) : c.visit.macs;
        c.move.sent_bytes =
            (held * others > c.move.sent_bytes) ? (held * others) : c.move.sent_bytes;
    }
    c.mean_macs = pairs * pair_macs / (double)c.n_parts;
    c.visit.sent_bytes = n_rows * others / (double)c.n_parts * state_bytes;
    c.move.macs = c.mean_macs; /* rows are dealt so that each part's see as much */
    set_us(cost, c.n_parts, &c.visit);
    set_us(cost, c.n_parts, &c.move);
    return c;
}

/* Predicted times, less what the layer's policy does not read. */
static bool is_faster_moved(const fv_plan_cost_t *cost,
                            const fv_model_spec_t *spec,
                            const fv_placement_t *placement,
                            const fv_ctl_item_t *item,
                            const fv_moved_t *moved)
{
    fv_plan_chunk_t c = fv_plan_chunk(cost, spec, placement, item->position, item->n_tokens);
    double share = (double)fv_moved_pages(moved, 0) / (double)moved->n_pages;

    c.visit.macs *= share;
    c.move.macs *= share;
    c.move.sent_bytes *= share;
    set_us(cost, c.n_parts, &c.visit);
    set_us(cost, c.n_parts, &c.move);
    return c.move.us < CLEARLY * c.visit.us;
}

bool fv_plan_moves(const fv_plan_cost_t *cost,
                   fv_plan_prefill_t choice,
                   size_t move_bytes,
                   const fv_model_spec_t *spec,
                   const fv_placement_t *placement,
                   const fv_ctl_item_t *item)
{
    if ((choice == FV_PLAN_PREFILL_VISIT) || (move_bytes == 0U) || fv_model_adds_scores(spec) ||
        (fv_placement_active_parts(placement, item->kv_end) < 2) ||
        (fv_item_sees_end(item) == 0U)) {
        return false;
    }
    fv_moved_t moved = fv_moved_make(spec, placement, item, 0);
    if ((choice == FV_PLAN_PREFILL_AUTO) && !is_faster_moved(cost, spec, placement, item, &moved)) {
        return false;
    }
    for (int32_t hp = 0; hp < placement->n_head_parts; hp++) {
        moved = fv_moved_make(spec, placement, item, hp);
        if (fv_moved_least_bytes(&moved) > move_bytes) {
            return false;
        }
    }
    return true;
}
