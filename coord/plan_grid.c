/*
 * plan_grid.c - predicts and compares grids of head parts x context parts.
 */
#include "coord/plan_grid.h"

#include <stddef.h>

/* Grids of one choice: at most 64 head parts, each with the powers of two up to 64 / H, and 64 / H itself. */
#define GRIDS_MAX 256
/* A gain smaller than this is not worth a rank: each rank of a step costs every other session a little. */
#define WORTHWHILE 1.05
/* One partial state: o in fp32, and its lse. */
#define STATE_BYTES(dv) (((double)(dv) + 1.0) * 4.0)

/*
 * Bandwidth: one core's streaming read of 27 GB/s, of which decode reaches three quarters. Latencies: `fovea bench`
 * with short contexts on 3 ranks of a shared 2-core host, p50 of one decode: 1 rank 71 us, heads over 2
 * ranks 98, context over 2 ranks 110 (another run beside other work: 57, 153, 190; heads over 3 178).
 */
fv_plan_cost_t fv_plan_cost_cpu(void)
{
    return (fv_plan_cost_t){.rank_bytes_per_us = 20000.0,
                            .fanout_us = 25.0,
                            .exchange_us = 40.0,
                            .exchange_bytes_per_us = 2000.0};
}

static uint64_t read_tokens(const fv_policy_t *policy, uint64_t n_tokens)
{
    uint64_t n = n_tokens;

    if (policy->kind == FV_POLICY_WINDOW) {
        uint64_t visible = (uint64_t)policy->window_tokens + (uint64_t)policy->sink_tokens;
        n = (visible < n) ? visible : n;
    }
    return n;
}

fv_plan_shape_t fv_plan_shape(const fv_plan_cost_t *cost,
                              const fv_model_spec_t *spec,
                              uint32_t shard_tokens,
                              uint64_t n_tokens)
{
    fv_plan_shape_t s = {
        .cost = cost, .spec = spec, .n_tokens = n_tokens, .shard_tokens = shard_tokens};
    int32_t n_layers[FV_POLICIES_MAX] = {0};

    if (spec->n_policies <= 1) {
        n_layers[0] = spec->n_layers;
    } else {
        for (int32_t i = 0; i < spec->n_layers; i++) {
            n_layers[spec->layer_policy[i]]++;
        }
    }
    for (int32_t i = 0; (i < FV_POLICIES_MAX) && (i < spec->n_policies); i++) {
        if (n_layers[i] > 0) {
            s.reads[s.n_reads].weight = (double)n_layers[i] / (double)spec->n_layers;
            s.reads[s.n_reads].n_tokens = read_tokens(&spec->policies[i], n_tokens);
            s.n_reads++;
        }
    }
    return s;
}

/*
 * Part 0 is the fullest part: it owns the first block of every turn. (For a window the same count is taken as
 * if it began at a block's border.)
 */
fv_plan_grid_t fv_plan_grid(const fv_plan_shape_t *shape, int32_t n_head_parts, int32_t n_ctx_parts)
{
    const fv_plan_cost_t *cost = shape->cost;
    const fv_model_spec_t *spec = shape->spec;
    fv_plan_grid_t g = {.n_head_parts = n_head_parts, .n_ctx_parts = n_ctx_parts};
    fv_placement_t p = {.n_head_parts = (uint16_t)n_head_parts,
                        .n_ctx_parts = (uint16_t)n_ctx_parts,
                        .shard_tokens = shape->shard_tokens};
    double n_heads = (double)((spec->n_kv_heads + n_head_parts - 1) / n_head_parts);
    double token_bytes = n_heads * (double)fv_model_token_bytes(spec);
    double n_parts = (double)fv_placement_active_parts(&p, shape->n_tokens);
    double n_read = 0.0;

    for (int32_t i = 0; i < shape->n_reads; i++) {
        n_read +=
            shape->reads[i].weight * (double)fv_placement_tokens(&p, 0, shape->reads[i].n_tokens);
    }
    g.token_us = n_read * token_bytes / cost->rank_bytes_per_us;
    g.rank_bytes = (double)fv_placement_pages(&p, 0, shape->n_tokens) * FV_PAGE_TOKENS *
                   token_bytes * (double)spec->n_layers;
    if (n_parts < 1.0) {
        n_parts = 1.0;
    }
    g.token_us += ((double)n_head_parts * n_parts - 1.0) * cost->fanout_us;
    if (n_parts > 1.0) {
        double n_rows = n_heads * (double)fv_model_group(spec);
        double sent = n_rows * (n_parts - 1.0) / n_parts * STATE_BYTES(spec->head_dim_v);

        g.token_us += cost->exchange_us + sent / cost->exchange_bytes_per_us;
    }
    return g;
}

static int32_t min_i32(int32_t a, int32_t b)
{
    return (a < b) ? a : b;
}

/* The largest head part when n_heads are cut into n_parts. */
static int32_t largest_part(int32_t n_heads, int32_t n_parts)
{
    return (n_heads + n_parts - 1) / n_parts;
}

typedef struct candidates {
    fv_plan_grid_t grids[GRIDS_MAX];
    int32_t n;
} candidates_t;

static void add(candidates_t *c, const fv_plan_shape_t *shape, int32_t n_head_parts, int32_t n_ctx)
{
    FV_ASSERT(c->n < GRIDS_MAX);
    c->grids[c->n++] = fv_plan_grid(shape, n_head_parts, n_ctx);
}

/* 1, 2, 4 ... and n_max itself; no more parts than the context has blocks: they would hold nothing. */
static void
add_contexts(candidates_t *c, const fv_plan_shape_t *shape, int32_t n_head_parts, int32_t n_max)
{
    uint64_t n_blocks = fv_div_up(shape->n_tokens, shape->shard_tokens);

    if (n_blocks < (uint64_t)n_max) {
        n_max = (n_blocks > 1) ? (int32_t)n_blocks : 1;
    }
    for (int32_t n = 1; n < n_max; n *= 2) {
        add(c, shape, n_head_parts, n);
    }
    add(c, shape, n_head_parts, n_max);
}

static void enumerate(candidates_t *c, const fv_plan_shape_t *shape, const fv_plan_ask_t *ask)
{
    int32_t n_heads = shape->spec->n_kv_heads;
    int32_t n_max = ask->n_ranks_max;
    int32_t h_max = min_i32(n_heads, n_max);

    c->n = 0;
    if (ask->mode == FV_SHARDING_CONTEXT) {
        add(c, shape, 1, n_max);
        return;
    }
    if (ask->mode == FV_SHARDING_HEADS) {
        /* The fewest ranks with the same largest part: 8 heads over 7 ranks are 2, 2, 2, 2. */
        int32_t h = largest_part(n_heads, largest_part(n_heads, h_max));

        add_contexts(c, shape, h, ask->has_hint ? (n_max / h) : 1);
        return;
    }
    if (!ask->has_hint) { /* context parts cost nothing until the context reaches them */
        add_contexts(c, shape, 1, n_max);
        return;
    }
    for (int32_t h = 1; h <= h_max; h++) {
        if ((h == 1) || (largest_part(n_heads, h) < largest_part(n_heads, h - 1))) {
            add_contexts(c, shape, h, n_max / h);
        }
    }
}

static int32_t n_cells(const fv_plan_grid_t *g)
{
    return g->n_head_parts * g->n_ctx_parts;
}

/* Fewer ranks, then cheaper, then more by heads, which need no exchange. */
static bool is_better(const fv_plan_grid_t *a, const fv_plan_grid_t *b)
{
    if (n_cells(a) != n_cells(b)) {
        return n_cells(a) < n_cells(b);
    }
    if (a->token_us < b->token_us) {
        return true;
    }
    return (a->token_us <= b->token_us) && (a->n_ctx_parts < b->n_ctx_parts);
}

bool fv_plan_grid_choose(const fv_plan_shape_t *shape,
                         const fv_plan_ask_t *ask,
                         fv_plan_grid_t *out)
{
    candidates_t all;
    const fv_plan_grid_t *best = NULL;
    int32_t n = 0;
    double least_us = 0.0;

    enumerate(&all, shape, ask);
    for (int32_t i = 0; i < all.n; i++) { /* those that fit move to the front */
        if ((ask->fits == NULL) || ask->fits(ask->arg, &all.grids[i])) {
            all.grids[n] = all.grids[i];
            least_us =
                ((n == 0) || (all.grids[n].token_us < least_us)) ? all.grids[n].token_us : least_us;
            n++;
        }
    }
    for (int32_t i = 0; i < n; i++) {
        if ((all.grids[i].token_us <= least_us * WORTHWHILE) &&
            ((best == NULL) || is_better(&all.grids[i], best))) {
            best = &all.grids[i];
        }
    }
    if (best == NULL) {
        return false;
    }
    *out = *best;
    return true;
}

double fv_plan_token_us(const fv_plan_cost_t *cost,
                        const fv_model_spec_t *spec,
                        const fv_placement_t *placement,
                        uint64_t n_tokens)
{
    fv_plan_shape_t shape = fv_plan_shape(cost, spec, placement->shard_tokens, n_tokens);

    return fv_plan_grid(&shape, placement->n_head_parts, placement->n_ctx_parts).token_us;
}

uint64_t fv_plan_growth_bytes(const fv_model_spec_t *spec,
                              const fv_placement_t *placement,
                              int32_t cell,
                              uint64_t n_before,
                              uint64_t n_after)
{
    int32_t hp = cell / placement->n_ctx_parts;
    int32_t cp = cell % placement->n_ctx_parts;
    int32_t n_heads = fv_placement_head_begin(placement, spec->n_kv_heads, hp + 1) -
                      fv_placement_head_begin(placement, spec->n_kv_heads, hp);
    uint64_t before = fv_placement_pages(placement, cp, n_before);
    uint64_t after = fv_placement_pages(placement, cp, n_after);

    return (after > before) ? ((after - before) * (uint64_t)n_heads * fv_model_page_bytes(spec))
                            : 0U;
}
