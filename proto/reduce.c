/*
 * reduce.c - counts freed pages; patterns repeat, so that a long context costs no more than one period.
 */
#include "proto/reduce.h"

static uint64_t gcd(uint64_t a, uint64_t b)
{
    while (b != 0) {
        uint64_t rest = a % b;

        a = b;
        b = rest;
    }
    return a;
}

/* Local pages after which an S2 pattern repeats on a part. */
static uint64_t local_period(const fv_policy_t *policy, const fv_placement_t *placement)
{
    fv_strides_t strides = fv_s2_strides(policy, 0);
    uint64_t per_page = (uint64_t)strides.per_page;
    uint64_t pages = (uint64_t)strides.period / gcd((uint64_t)strides.period, per_page);
    uint64_t turn = (uint64_t)(placement->shard_tokens / FV_PAGE_TOKENS) * placement->n_ctx_parts;

    if (placement->n_ctx_parts == 1) {
        return pages;
    }
    return turn / gcd(turn, pages) * pages / placement->n_ctx_parts;
}

typedef struct cell_heads {
    const fv_policy_t *policy;
    const fv_placement_t *placement;
    int32_t cp, head_begin, head_end, group;
} cell_heads_t;

static uint64_t count(const cell_heads_t *c, uint64_t from, uint64_t to)
{
    uint64_t n = 0;

    for (uint64_t p = from; p < to; p++) {
        int64_t page = fv_reduce_page(c->placement, c->cp, p);

        for (int32_t h = c->head_begin; h < c->head_end; h++) {
            n += fv_policy_keeps(c->policy, h, c->group, page) ? 0U : 1U;
        }
    }
    return n;
}

uint64_t fv_reduce_freed(const fv_model_spec_t *spec,
                         const fv_policy_t *policy,
                         const fv_placement_t *placement,
                         int32_t cell,
                         uint64_t from,
                         uint64_t to)
{
    fv_head_part_t part = fv_placement_head_part(placement, spec, cell / placement->n_ctx_parts);
    cell_heads_t c = {.policy = policy,
                      .placement = placement,
                      .cp = cell % placement->n_ctx_parts,
                      .head_begin = part.head_begin,
                      .head_end = part.head_end,
                      .group = fv_model_group(spec)};
    uint64_t n = 0;

    if ((from >= to) || (policy->kind == FV_POLICY_DENSE)) {
        return 0;
    }
    if (policy->kind == FV_POLICY_WINDOW) { /* what is kept lies in front */
        uint64_t n_sinks = fv_placement_pages(placement, c.cp, (uint64_t)policy->sink_tokens);

        from = (from < n_sinks) ? n_sinks : from;
        return (from < to) ? ((to - from) * (uint64_t)(c.head_end - c.head_begin)) : 0U;
    }
    uint64_t period = local_period(policy, placement);
    if (to - from > period) {
        n = (to - from) / period * count(&c, from, from + period);
        from += (to - from) / period * period;
    }
    return n + count(&c, from, to);
}
