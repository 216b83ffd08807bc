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
                            .exchange_bytes_per_us = 2000.0,
                            .rank_macs_per_us = 200000.0};
}

/*
 * An H100 or H200: what decode reaches of its memory, the exchange over NVLink with its merge, and the same control
 * message and tensors as above, which come over a socket and host memory (bench/results/).
 */
fv_plan_cost_t fv_plan_cost_cuda(void)
{
    return (fv_plan_cost_t){.rank_bytes_per_us = 3000000.0,
                            .fanout_us = 40.0,
                            .exchange_us = 4.0,
                            .exchange_bytes_per_us = 200000.0,
                            .rank_macs_per_us = 200000000.0,
                            .no_latent_context = true};
}

/* fv_placement_tokens() of part 0. */
static uint64_t
fullest_tokens(const fv_plan_length_t *length, uint32_t shard_tokens, uint32_t n_parts)
{
    uint64_t n_turns = length->n_full / n_parts;
    uint64_t last = (length->n_full == n_turns * n_parts) ? length->n_rest : shard_tokens;

    return n_turns * shard_tokens + last;
}

/* Context parts that hold something: no more than the session has blocks, and one of an empty session. */
static int32_t active_parts(const fv_plan_shape_t *shape, int32_t n_ctx_parts)
{
    uint64_t n_blocks = shape->length.n_full + ((shape->length.n_rest > 0) ? 1U : 0U);

    if (n_blocks >= (uint64_t)n_ctx_parts) {
        return n_ctx_parts;
    }
    return (n_blocks > 1) ? (int32_t)n_blocks : 1;
}

static double fanout_us(const fv_plan_shape_t *shape, int32_t n_head_parts, int32_t n_ctx_parts)
{
    return (double)(n_head_parts * active_parts(shape, n_ctx_parts) - 1) * shape->cost->fanout_us;
}

/* The largest head part when n_heads are cut into n_parts. */
static int32_t largest_part(int32_t n_heads, int32_t n_parts)
{
    return (n_heads + n_parts - 1) / n_parts;
}

/* Tokens of an S2 layer that the fullest cell reads, summed over its n_heads KV heads; the last head part is the fullest. */
static double s2_head_tokens(const fv_plan_shape_t *shape,
                             const fv_plan_read_t *read,
                             int32_t n_heads,
                             int32_t n_ctx_parts)
{
    int32_t n_dense = (read->n_dense < n_heads) ? read->n_dense : n_heads;
    uint32_t n_parts = (uint32_t)n_ctx_parts;
    double dense = (double)fullest_tokens(&read->length, shape->shard_tokens, n_parts);
    double sparse = read->strided / (double)active_parts(shape, n_ctx_parts) +
                    (double)fullest_tokens(&read->local, shape->shard_tokens, n_parts);

    return (double)n_dense * dense + (double)(n_heads - n_dense) * sparse;
}

/* Multiply-adds of one token with all query heads of a part: scores, and the sum of latents. */
static double latent_macs(const fv_model_spec_t *spec, int32_t n_head_parts)
{
    int32_t n_parts = n_head_parts / fv_model_groups(spec);
    int32_t n_heads = largest_part(spec->n_q_heads, (n_parts > 0) ? n_parts : 1);

    return (double)n_heads * (double)(fv_model_stored_dim_qk(spec) + fv_model_stored_dim_v(spec));
}

/*
 * Part 0 is the fullest part: it owns the first block of every turn. (For a window the same count is taken as
 * if it began at a block's border.)
 */
static double token_us(const fv_plan_shape_t *shape, int32_t n_head_parts, int32_t n_ctx_parts)
{
    const fv_plan_cost_t *cost = shape->cost;
    double n_heads = (double)largest_part(shape->spec->n_kv_heads, n_head_parts);
    double n_parts = (double)active_parts(shape, n_ctx_parts);
    double n_read = 0.0;
    double us = 0.0;

    for (int32_t i = 0; i < shape->n_reads; i++) {
        const fv_plan_read_t *read = &shape->reads[i];

        n_read +=
            read->weight *
            (read->is_s2 ? (s2_head_tokens(shape, read, (int32_t)n_heads, n_ctx_parts) / n_heads)
                         : (double)fullest_tokens(&read->length, shape->shard_tokens,
                                                  (uint32_t)n_ctx_parts));
    }
    us = n_read * (n_heads * shape->token_bytes) / cost->rank_bytes_per_us;
    if (fv_model_is_latent(shape->spec) && (cost->rank_macs_per_us > 0.0)) {
        double macs_us = n_read * latent_macs(shape->spec, n_head_parts) / cost->rank_macs_per_us;

        us = (macs_us > us) ? macs_us : us;
    }
    us += fanout_us(shape, n_head_parts, n_ctx_parts);
    if (n_parts > 1.0) {
        double n_rows = n_heads * (double)fv_model_group(shape->spec);
        double sent =
            n_rows * (n_parts - 1.0) / n_parts * STATE_BYTES(fv_model_stored_dim_v(shape->spec));

        us += cost->exchange_us + sent / cost->exchange_bytes_per_us;
    }
    return us;
}

/*
 * A window is counted as if it freed nothing: its prefill may come in one chunk, and then it is so for a while. S2 is for
 * contexts that would not fit at all otherwise, and is counted by what it keeps.
 */
static double rank_bytes(const fv_plan_shape_t *shape, int32_t n_head_parts, int32_t n_ctx_parts)
{
    double n_heads = (double)largest_part(shape->spec->n_kv_heads, n_head_parts);
    uint64_t n_tokens = fullest_tokens(&shape->length, shape->shard_tokens, (uint32_t)n_ctx_parts);
    double whole = (double)fv_div_up(n_tokens, FV_PAGE_TOKENS) * FV_PAGE_TOKENS * n_heads;
    double kept = 0.0; /* tokens over heads, mean over layers */
    double rest = 1.0;

    for (int32_t i = 0; shape->has_s2 && (i < shape->n_reads); i++) {
        const fv_plan_read_t *read = &shape->reads[i];

        if (read->is_s2) { /* what is read is what is kept, and a page more at either end */
            kept += read->weight * (s2_head_tokens(shape, read, (int32_t)n_heads, n_ctx_parts) +
                                    2.0 * FV_PAGE_TOKENS * n_heads);
            rest -= read->weight;
        }
    }
    if (kept > 0.0) {
        kept = (kept < whole * (1.0 - rest)) ? kept : (whole * (1.0 - rest));
        whole = whole * rest + kept;
    }
    return whole * shape->token_bytes * (double)shape->spec->n_layers;
}

fv_plan_grid_t fv_plan_grid(const fv_plan_shape_t *shape, int32_t n_head_parts, int32_t n_ctx_parts)
{
    return (fv_plan_grid_t){.n_head_parts = n_head_parts,
                            .n_ctx_parts = n_ctx_parts,
                            .token_us = token_us(shape, n_head_parts, n_ctx_parts),
                            .rank_bytes = rank_bytes(shape, n_head_parts, n_ctx_parts)};
}

static int32_t min_i32(int32_t a, int32_t b)
{
    return (a < b) ? a : b;
}

typedef struct candidates {
    const fv_plan_shape_t *shape;
    const fv_plan_ask_t *ask;
    double least_us; /* of the grids, which all fit */
    int32_t n;
    fv_plan_grid_t grids[GRIDS_MAX];
} candidates_t;

/* False: the fan-out alone makes the grid too dear, and so any with more ranks. */
static bool add(candidates_t *c, int32_t n_head_parts, int32_t n_ctx)
{
    fv_plan_grid_t *g = &c->grids[c->n];

    FV_ASSERT(c->n < GRIDS_MAX);
    if ((c->n > 0) && (fanout_us(c->shape, n_head_parts, n_ctx) > c->least_us * WORTHWHILE)) {
        return false;
    }
    g->n_head_parts = n_head_parts;
    g->n_ctx_parts = n_ctx;
    g->rank_bytes = 0.0;
    if (c->ask->fits != NULL) {
        g->rank_bytes = rank_bytes(c->shape, n_head_parts, n_ctx);
        if (!c->ask->fits(c->ask->arg, g)) {
            return true;
        }
    }
    g->token_us = token_us(c->shape, n_head_parts, n_ctx);
    c->least_us = ((c->n == 0) || (g->token_us < c->least_us)) ? g->token_us : c->least_us;
    c->n++;
    return true;
}

/* 1, 2, 4 ... and n_max itself; no more parts than the context has blocks: they would hold nothing. */
static void add_contexts(candidates_t *c, int32_t n_head_parts, int32_t n_max)
{
    bool is_worth_more = true;

    n_max = active_parts(c->shape, n_max);
    for (int32_t n = 1; is_worth_more && (n < n_max); n *= 2) {
        is_worth_more = add(c, n_head_parts, n);
    }
    if (is_worth_more) {
        (void)add(c, n_head_parts, n_max);
    }
}

/*
 * Every part reads a whole latent, or a whole slice of it, so more parts only spread the arithmetic. By heads: as many as
 * asked for. By latent: one for each slice; the heads of a slice are cut only where max_ranks asks for more.
 */
static int32_t latent_parts(const fv_model_spec_t *spec, const fv_plan_ask_t *ask)
{
    int32_t groups = fv_model_groups(spec);

    if ((ask->mode == FV_SHARDING_LATENT) && !ask->has_max) {
        return groups;
    }
    return groups * min_i32(ask->n_ranks_max / groups, spec->n_q_heads);
}

/* Slices whose context is cut as well, at a known length; of the ranks of a slice the fewer are left for its heads. */
static void add_latent(candidates_t *c, int32_t n_head_parts)
{
    const fv_plan_ask_t *ask = c->ask;
    int32_t groups = fv_model_groups(c->shape->spec);
    int32_t n_max = active_parts(c->shape, ask->n_ranks_max / groups);

    (void)add(c, n_head_parts, 1);
    if (!ask->has_hint || (ask->mode != FV_SHARDING_LATENT) || c->shape->cost->no_latent_context) {
        return;
    }
    for (int32_t n = 2; n <= n_max; n *= 2) {
        int32_t n_heads =
            ask->has_max ? min_i32(ask->n_ranks_max / groups / n, c->shape->spec->n_q_heads) : 1;

        (void)add(c, groups * n_heads, n);
    }
}

static void enumerate(candidates_t *c)
{
    const fv_plan_ask_t *ask = c->ask;
    int32_t n_heads = c->shape->spec->n_kv_heads;
    int32_t n_max = ask->n_ranks_max;
    int32_t h_max = min_i32(n_heads, n_max);

    if (fv_model_is_latent(c->shape->spec) &&
        ((ask->mode == FV_SHARDING_LATENT) || (ask->mode == FV_SHARDING_HEADS))) {
        add_latent(c, latent_parts(c->shape->spec, ask));
        return;
    }
    if (ask->mode == FV_SHARDING_CONTEXT) {
        (void)add(c, 1, n_max);
        return;
    }
    if (ask->mode == FV_SHARDING_HEADS) {
        /* The fewest ranks with the same largest part: 8 heads over 7 ranks are 2, 2, 2, 2. */
        int32_t h = largest_part(n_heads, largest_part(n_heads, h_max));

        add_contexts(c, h, ask->has_hint ? (n_max / h) : 1);
        return;
    }
    if (!ask->has_hint) { /* context parts cost nothing until the context reaches them */
        add_contexts(c, 1, n_max);
        return;
    }
    for (int32_t h = 1; h <= h_max; h++) {
        if ((h == 1) || (largest_part(n_heads, h) < largest_part(n_heads, h - 1))) {
            add_contexts(c, h, n_max / h);
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
    candidates_t all; /* grids[0..n-1] only are ever written */
    const fv_plan_grid_t *best = NULL;

    all.shape = shape;
    all.ask = ask;
    all.least_us = 0.0;
    all.n = 0;
    enumerate(&all);
    for (int32_t i = 0; i < all.n; i++) {
        if ((all.grids[i].token_us <= all.least_us * WORTHWHILE) &&
            ((best == NULL) || is_better(&all.grids[i], best))) {
            best = &all.grids[i];
        }
    }
    if (best == NULL) {
        return false;
    }
    *out = *best;
    out->rank_bytes = rank_bytes(shape, best->n_head_parts, best->n_ctx_parts);
    return true;
}

double fv_plan_token_us(const fv_plan_cost_t *cost,
                        const fv_model_spec_t *spec,
                        const fv_placement_t *placement,
                        uint64_t n_tokens)
{
    fv_plan_shape_t shape = fv_plan_shape(cost, spec, placement->shard_tokens, n_tokens);

    return token_us(&shape, placement->n_head_parts, placement->n_ctx_parts);
}

uint64_t fv_plan_growth_bytes(const fv_model_spec_t *spec,
                              const fv_placement_t *placement,
                              int32_t cell,
                              uint64_t n_before,
                              uint64_t n_after)
{
    int32_t hp = 0;
    int32_t cp = cell;

    if ((fv_div_up(n_before, FV_PAGE_TOKENS) >= fv_div_up(n_after, FV_PAGE_TOKENS))) {
        return 0; /* no new page anywhere: pages never span parts */
    }
    if (placement->n_head_parts > 1) {
        hp = cell / placement->n_ctx_parts;
        cp = cell % placement->n_ctx_parts;
    }
    if ((uint64_t)cp * placement->shard_tokens >= n_after) {
        return 0; /* the context has not reached this part */
    }
    int32_t n_heads = fv_placement_n_heads(placement, spec, hp);
    uint64_t before = (n_before > 0) ? fv_placement_pages(placement, cp, n_before) : 0U;
    uint64_t after = fv_placement_pages(placement, cp, n_after);

    return (after - before) * (uint64_t)n_heads * fv_model_page_bytes(spec);
}
