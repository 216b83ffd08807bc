/*
 * plan.c - the planner: chooses ranks for a session, and says why.
 *
 * Decode path: station 4 of 10. Before: coord/sched.c. After: coord/dispatch.c.
 *
 * plan_grid.c decides how many parts (cost model), plan_order.c knows which ranks are the least loaded; here
 * the two meet, and a session that does not fit on one rank's free memory is spread until it does.
 *
 * What a rank holds is what the caller accounts, promises of open sessions included.
 */
#include "coord/plan.h"

#include "coord/plan_grid.h"
#include "coord/plan_order.h"
#include "coord/plan_text.h"

#include <stdlib.h>

#define RANKS_MAX 65536 /* a placement names ranks in 16 bits */
/* Without a hint the width of the context is the best for this many turns of blocks of one rank. */
#define UNKNOWN_BLOCKS 64
/* Changes of load that may wait: a session over 64 ranks, which begins on some of them and is accounted on all. */
#define CHANGED_MAX 64

typedef struct plan_rank {
    uint64_t total; /* bytes; 0 = unusable */
    uint64_t used;
    uint64_t begun;  /* fv_planner::n_placed when a session last began here */
    bool is_changed; /* listed in fv_planner::changed */
} plan_rank_t;

struct fv_planner {
    fv_plan_cost_t cost;
    fv_plan_order_t order;
    plan_rank_t *ranks;
    uint32_t n_ranks;
    uint64_t n_placed;
    uint32_t n_changed;
    uint32_t changed[CHANGED_MAX]; /* ranks whose place in `order` is that of an earlier load */
};

/*
 * Gives the changed ranks their places. After a plan these are the first ranks of the order: they leave it
 * together.
 */
static void settle(fv_planner_t *planner)
{
    uint32_t n = (planner->n_changed < planner->order.n) ? planner->n_changed : planner->order.n;
    uint32_t first[CHANGED_MAX];
    uint32_t n_drop = 0;

    if (n > 0) {
        fv_plan_order_first(&planner->order, n, first);
        while ((n_drop < n) && planner->ranks[first[n_drop]].is_changed) {
            n_drop++;
        }
        fv_plan_order_drop(&planner->order, n_drop);
    }
    for (uint32_t i = 0; i < planner->n_changed; i++) {
        uint32_t rank = planner->changed[i];
        plan_rank_t *r = &planner->ranks[rank];

        r->is_changed = false;
        if (r->total > 0) {
            fv_plan_order_put(&planner->order,
                              fv_plan_key((double)r->used / (double)r->total, r->begun, rank));
        }
    }
    planner->n_changed = 0;
}

/* Only placing needs the order: until then a rank that changes many times moves once. */
static void reorder(fv_planner_t *planner, uint32_t rank)
{
    if (!planner->ranks[rank].is_changed) {
        if (planner->n_changed == CHANGED_MAX) {
            settle(planner);
        }
        planner->ranks[rank].is_changed = true;
        planner->changed[planner->n_changed++] = rank;
    }
}

fv_status_t fv_planner_create(uint32_t n_ranks, const fv_plan_cost_t *cost, fv_planner_t **out)
{
    fv_planner_t *planner = NULL;
    fv_status_t status = FV_OK;

    if ((n_ranks == 0) || (n_ranks > RANKS_MAX)) {
        return fv_fail(FV_ERR_INVALID_ARG, "planner: n_ranks is %u, expected 1..%u", n_ranks,
                       (unsigned)RANKS_MAX);
    }
    if (!(cost->rank_bytes_per_us > 0.0) || !(cost->exchange_bytes_per_us > 0.0) ||
        !(cost->fanout_us >= 0.0) || !(cost->exchange_us >= 0.0)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "planner: cost model has a rate that is not positive or a negative latency");
    }
    planner = calloc(1, sizeof(*planner));
    if (planner == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "planner: no memory for %u ranks", n_ranks);
    }
    planner->cost = *cost;
    planner->n_ranks = n_ranks;
    planner->ranks = calloc(n_ranks, sizeof(*planner->ranks));
    if (planner->ranks == NULL) {
        status = fv_fail(FV_ERR_NO_MEMORY, "planner: no memory for %u ranks", n_ranks);
        goto err_free_planner;
    }
    status = fv_plan_order_init(&planner->order, n_ranks);
    if (status != FV_OK) {
        goto err_free_ranks;
    }
    *out = planner;
    return FV_OK;

err_free_ranks:
    free(planner->ranks);
err_free_planner:
    free(planner);
    return status;
}

void fv_planner_destroy(fv_planner_t *planner)
{
    if (planner != NULL) {
        fv_plan_order_finish(&planner->order);
        free(planner->ranks);
        free(planner);
    }
}

void fv_planner_set_rank(fv_planner_t *planner, uint32_t rank, uint64_t kv_bytes_total)
{
    FV_ASSERT(rank < planner->n_ranks);
    planner->ranks[rank].total = kv_bytes_total;
    if (kv_bytes_total == 0) {
        fv_plan_order_remove(&planner->order, rank);
    } else {
        reorder(planner, rank);
    }
}

void fv_planner_account(fv_planner_t *planner, uint32_t rank, int64_t delta_bytes)
{
    plan_rank_t *r = NULL;

    FV_ASSERT(rank < planner->n_ranks);
    r = &planner->ranks[rank];
    if (delta_bytes >= 0) {
        r->used += (uint64_t)delta_bytes;
    } else {
        uint64_t less = (uint64_t)0 - (uint64_t)delta_bytes;

        r->used -= (less < r->used) ? less : r->used;
    }
    if (r->total > 0) {
        reorder(planner, rank);
    }
}

uint64_t fv_planner_used(const fv_planner_t *planner, uint32_t rank)
{
    FV_ASSERT(rank < planner->n_ranks);
    return planner->ranks[rank].used;
}

static double free_bytes(const fv_planner_t *planner, uint32_t rank)
{
    const plan_rank_t *r = &planner->ranks[rank];

    return (r->used < r->total) ? (double)(r->total - r->used) : 0.0;
}

/* ------------------------------------------------------------------ choosing */

/* One call of fv_planner_place(). */
typedef struct placing {
    fv_plan_shape_t shape;
    fv_plan_ask_t ask;
    fv_plan_grid_t grid;
    double roomiest[FV_PLACEMENT_RANKS_MAX]; /* free bytes of the emptiest ranks, descending */
    uint32_t ranks[FV_PLACEMENT_RANKS_MAX];  /* of the grid, least loaded first */
    fv_plan_memory_t memory;
} placing_t;

static fv_status_t check_sharding(const fv_sharding_t *sharding, uint32_t default_shard_tokens)
{
    if ((sharding->mode < FV_SHARDING_AUTO) || (sharding->mode > FV_SHARDING_LATENT)) {
        return fv_fail(
            FV_ERR_INVALID_ARG,
            "sharding.mode: %d given, expected 0 (AUTO), 1 (HEADS), 2 (CONTEXT) or 3 (LATENT)",
            sharding->mode);
    }
    if ((sharding->shard_tokens < 0) || (sharding->shard_tokens % FV_PAGE_TOKENS != 0)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "sharding.shard_tokens: %d given, expected 0 or a positive multiple of %d",
                       sharding->shard_tokens, FV_PAGE_TOKENS);
    }
    if (sharding->max_ranks < 0) {
        return fv_fail(FV_ERR_INVALID_ARG, "sharding.max_ranks: %d given, expected 0 or more",
                       sharding->max_ranks);
    }
    if ((sharding->shard_tokens == 0) &&
        ((default_shard_tokens == 0) || (default_shard_tokens % FV_PAGE_TOKENS != 0))) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "shard_tokens: %u given, expected a positive multiple of %d",
                       default_shard_tokens, FV_PAGE_TOKENS);
    }
    return FV_OK;
}

static int32_t n_cells(const fv_plan_grid_t *grid)
{
    return grid->n_head_parts * grid->n_ctx_parts;
}

/* Which ranks have room for a part of the grid. */
typedef struct room {
    const fv_planner_t *planner;
    double need;
} room_t;

static bool has_room(const void *arg, uint32_t rank)
{
    const room_t *room = arg;

    return free_bytes(room->planner, rank) >= room->need;
}

static bool fits(const void *arg, const fv_plan_grid_t *grid)
{
    const placing_t *p = arg;

    return p->roomiest[n_cells(grid) - 1] >= grid->rank_bytes;
}

/* The free bytes of the n_ranks_max emptiest ranks. O(n_ranks), but only when memory is short. */
static void find_room(const fv_planner_t *planner, placing_t *p)
{
    int32_t n = 0;

    for (uint32_t rank = 0; rank < planner->n_ranks; rank++) {
        double room = free_bytes(planner, rank);
        int32_t at = 0;

        if (planner->ranks[rank].total == 0) {
            continue;
        }
        if (n < p->ask.n_ranks_max) {
            at = n++;
        } else if (room > p->roomiest[n - 1]) {
            at = n - 1;
        } else {
            continue;
        }
        for (; (at > 0) && (p->roomiest[at - 1] < room); at--) {
            p->roomiest[at] = p->roomiest[at - 1];
        }
        p->roomiest[at] = room;
    }
}

/*
 * First the cheapest grid on the least loaded ranks. If one of them has no room for its part of a session of
 * the hinted length: the cheapest grid for which enough ranks have room, on those. When there is no such grid
 * the first choice stands: a hint reserves nothing, and the session may stay shorter.
 */
static void choose(const fv_planner_t *planner, placing_t *p)
{
    bool is_found = fv_plan_grid_choose(&p->shape, &p->ask, &p->grid);
    bool is_short = false;

    FV_ASSERT(is_found); /* nothing was asked that a grid could fail */
    fv_plan_order_first(&planner->order, (uint32_t)n_cells(&p->grid), p->ranks);
    for (int32_t i = 0; p->ask.has_hint && (i < n_cells(&p->grid)); i++) {
        is_short = is_short || (free_bytes(planner, p->ranks[i]) < p->grid.rank_bytes);
    }
    if (!is_short) {
        return;
    }
    find_room(planner, p);
    p->ask.fits = fits;
    p->ask.arg = p;
    p->memory = FV_PLAN_MEMORY_SHORT;
    if (fv_plan_grid_choose(&p->shape, &p->ask, &p->grid)) {
        room_t room = {.planner = planner, .need = p->grid.rank_bytes};
        uint32_t k = (uint32_t)n_cells(&p->grid);

        p->memory = FV_PLAN_MEMORY_DECIDED;
        is_found = fv_plan_order_first_of(&planner->order, k, has_room, &room, p->ranks) == k;
        FV_ASSERT(is_found);
    }
}

/* The least loaded ranks get the first blocks, which every session fills; later blocks come if it grows. */
static void lay_out(const placing_t *p, fv_placement_t *out)
{
    int32_t n = 0;

    *out = (fv_placement_t){.n_head_parts = (uint16_t)p->grid.n_head_parts,
                            .n_ctx_parts = (uint16_t)p->grid.n_ctx_parts,
                            .shard_tokens = p->shape.shard_tokens};
    for (int32_t cp = 0; cp < p->grid.n_ctx_parts; cp++) {
        for (int32_t hp = 0; hp < p->grid.n_head_parts; hp++) {
            out->ranks[hp * p->grid.n_ctx_parts + cp] = (uint16_t)p->ranks[n++];
        }
    }
}

/* Among equally loaded ranks, those that just began a session come last from now on. */
static void take_turns(fv_planner_t *planner, const placing_t *p, const fv_placement_t *placement)
{
    planner->n_placed++;
    for (int32_t hp = 0; hp < p->grid.n_head_parts; hp++) {
        uint32_t rank = placement->ranks[hp * placement->n_ctx_parts];

        planner->ranks[rank].begun = planner->n_placed;
        reorder(planner, rank);
    }
}

static fv_plan_why_t why(const placing_t *p, const fv_sharding_t *asked)
{
    fv_plan_why_t w = {.grid = &p->grid, .shape = &p->shape, .first_rank = p->ranks[0]};

    w.has_hint = p->ask.has_hint;
    w.is_asked = asked->mode != FV_SHARDING_AUTO;
    w.n_ranks_max = p->ask.n_ranks_max;
    w.memory = p->memory;
    w.one_rank_us = fv_plan_grid(&p->shape, 1, 1).token_us;
    w.room_bytes = p->roomiest[n_cells(&p->grid) - 1];
    return w;
}

fv_status_t fv_planner_place(fv_planner_t *planner,
                             const fv_model_spec_t *spec,
                             const fv_sharding_t *sharding,
                             uint32_t default_shard_tokens,
                             uint64_t max_tokens_hint,
                             fv_placement_t *out,
                             char reason[FV_PLAN_REASON_BYTES])
{
    placing_t p = {0};
    uint32_t shard_tokens = fv_plan_align_shard(spec, default_shard_tokens);
    uint32_t n_max = 0;

    settle(planner);
    n_max = planner->order.n;
    FV_RETURN_IF_ERR(check_sharding(sharding, default_shard_tokens));
    if (n_max == 0) {
        return fv_fail(FV_ERR_EXHAUSTED, "no rank holds KV: 0 of %u are usable, expected 1",
                       planner->n_ranks);
    }
    if (sharding->shard_tokens > 0) {
        shard_tokens = (uint32_t)sharding->shard_tokens;
    }
    if ((sharding->max_ranks > 0) && ((uint32_t)sharding->max_ranks < n_max)) {
        n_max = (uint32_t)sharding->max_ranks;
    }
    if (n_max > FV_PLACEMENT_RANKS_MAX) {
        n_max = FV_PLACEMENT_RANKS_MAX;
    }
    if ((sharding->mode == FV_SHARDING_LATENT) && !fv_model_is_latent(spec)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "sharding.mode: LATENT given, expected AUTO, HEADS or CONTEXT for kind KV");
    }
    if ((sharding->mode == FV_SHARDING_LATENT) && (n_max < (uint32_t)fv_model_groups(spec))) {
        return fv_fail(
            FV_ERR_PRECONDITION,
            "sharding.groups: %d given, expected at most %u, the ranks that may be used: "
            "each slice lives on a rank of its own",
            fv_model_groups(spec), n_max);
    }
    p.ask.mode = (fv_sharding_mode_t)sharding->mode;
    p.ask.has_max = sharding->max_ranks > 0;
    p.ask.n_ranks_max = (int32_t)n_max;
    p.ask.has_hint = max_tokens_hint > 0;
    p.shape =
        fv_plan_shape(&planner->cost, spec, shard_tokens,
                      p.ask.has_hint ? max_tokens_hint : ((uint64_t)shard_tokens * UNKNOWN_BLOCKS));
    choose(planner, &p);
    lay_out(&p, out);
    fv_plan_why_t w = why(&p, sharding);
    fv_plan_text(&w, reason);
    take_turns(planner, &p, out);
    return FV_OK;
}
