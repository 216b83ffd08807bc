/*
 * plan_prefill.c - see plan_prefill.h.
 */
#include "coord/plan_prefill.h"

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
