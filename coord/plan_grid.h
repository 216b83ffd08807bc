/*
 * plan_grid.h - how many head parts and context parts a session gets: the cost model's side of the planner.
 *
 * Inside of the planner; knows nothing of particular ranks. Pure.
 */
#ifndef FV_COORD_PLAN_GRID_H
#define FV_COORD_PLAN_GRID_H

#include "coord/plan.h"

#include <stdbool.h>

/* Tokens cut into blocks of shard_tokens once, so that a grid costs one division and not four. */
typedef struct fv_plan_length {
    uint64_t n_full; /* blocks */
    uint64_t n_rest; /* tokens of the block that is not full */
} fv_plan_length_t;

/*
 * What a query at the end of the context reads in the layers of one policy. S2: a sparse KV head reads its local blocks, and
 * `strided` tokens that lie all over the context, so that every context part has its share of them; the n_dense last heads
 * read `length` as heads of other policies do. Tokens are counted by tiles: a block smaller than a page is read as one.
 */
typedef struct fv_plan_read {
    double weight;           /* share of the model's layers */
    fv_plan_length_t length; /* of a head */
    bool is_s2;
    double strided;
    fv_plan_length_t local;
    int32_t n_dense; /* KV heads */
} fv_plan_read_t;

/* A session at a length, reduced to what the cost depends on. */
typedef struct fv_plan_shape {
    const fv_plan_cost_t *cost;
    const fv_model_spec_t *spec;
    uint64_t n_tokens;
    uint32_t shard_tokens;
    double token_bytes; /* K and V of one token of one KV head */
    fv_plan_length_t length;
    bool has_s2;     /* some of the reads are */
    int32_t n_reads; /* entries of reads */
    fv_plan_read_t reads[FV_POLICIES_MAX];
} fv_plan_shape_t;

/* H x C parts, and what is predicted of them. */
typedef struct fv_plan_grid {
    int32_t n_head_parts;
    int32_t n_ctx_parts;
    double token_us;   /* one decode token of one layer (mean over layers) */
    double rank_bytes; /* KV of the fullest rank at n_tokens, all layers */
} fv_plan_grid_t;

fv_plan_shape_t fv_plan_shape(const fv_plan_cost_t *cost,
                              const fv_model_spec_t *spec,
                              uint32_t shard_tokens,
                              uint64_t n_tokens);

/*
 * shard_tokens, or the next larger number of tokens at which all S2 patterns of the model begin anew: then every turn of every
 * context part has the same strided blocks, and parts differ by no more than a turn that is under way. Patterns
 * longer than 2^18 tokens are left alone.
 */
uint32_t fv_plan_align_shard(const fv_model_spec_t *spec, uint32_t shard_tokens);

/* Fills the predictions for n_head_parts x n_ctx_parts. */
fv_plan_grid_t
fv_plan_grid(const fv_plan_shape_t *shape, int32_t n_head_parts, int32_t n_ctx_parts);

/* What is asked of fv_plan_grid_choose(). */
typedef struct fv_plan_ask {
    fv_sharding_mode_t mode;
    int32_t n_ranks_max; /* 1..FV_PLACEMENT_RANKS_MAX; LATENT: at least the model's groups */
    bool has_max;        /* the caller asked for that number */
    bool has_hint;       /* shape->n_tokens is a hint; else it is only a reference length */
    /* fits(arg, grid): are there ranks with room for it? NULL: any grid will do. */
    bool (*fits)(const void *arg, const fv_plan_grid_t *grid);
    const void *arg;
} fv_plan_ask_t;

/*
 * The cheapest grid that fits; of those within 5 % of it the one with the fewest ranks. False, and nothing
 * written, when none fits.
 */
bool fv_plan_grid_choose(const fv_plan_shape_t *shape,
                         const fv_plan_ask_t *ask,
                         fv_plan_grid_t *out);

#endif /* FV_COORD_PLAN_GRID_H */
