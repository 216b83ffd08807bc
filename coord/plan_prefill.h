/*
 * plan_prefill.h - what one chunk of a prompt costs a session whose context lies on several ranks. Pure.
 *
 * A chunk of n query tokens at `position` sees S = position + n tokens, which A context parts hold block by block. Two ways:
 *
 *  - its queries visit the KV where it lies: every part attends with all rows to what it holds, and sends of each row that
 *    another part merges a partial state of (dv + 1) fp32. Bytes grow with n, not with S.
 *  - the KV moves to the queries: every part gets all KV of [0, S) and attends with its share of the rows, so that nothing is
 *    merged, and the arithmetic is even. Bytes grow with S, not with n.
 *
 * Which one a piece takes is fv_plan_moves(); how it is done is worker/partials.h and worker/move.h.
 *
 * KV that moves is fewer bytes while S * Hkv * (dk + dv) * e < n * Hq * (dv + 1) * 4, which for 32/8 heads of 128 in bf16 is
 * S < 4 n; docs/performance.md says what that is worth.
 */
#ifndef FV_COORD_PLAN_PREFILL_H
#define FV_COORD_PLAN_PREFILL_H

#include "coord/plan.h"
#include "proto/control.h"

/* One way; of the rank that has most. */
typedef struct fv_plan_way {
    double macs;       /* multiply-adds */
    double sent_bytes; /* to all others */
    double us;         /* macs and bytes one after the other: nothing overlaps within a step */
} fv_plan_way_t;

typedef struct fv_plan_chunk {
    int32_t n_parts;     /* A: parts that hold some of [0, S) */
    double mean_macs;    /* over those parts */
    fv_plan_way_t visit; /* queries visit */
    fv_plan_way_t move;  /* KV moves */
} fv_plan_chunk_t;

/*
 * Pairs (query, token it sees) of queries [position, position + n_tokens) and the tokens that context part cp holds; causal,
 * dense. O(n_tokens / shard_tokens).
 */
double fv_plan_chunk_pairs(const fv_placement_t *placement,
                           int32_t cp,
                           uint64_t position,
                           uint64_t n_tokens);

/* Predictions for one layer of a dense policy. n_tokens >= 1. */
fv_plan_chunk_t fv_plan_chunk(const fv_plan_cost_t *cost,
                              const fv_model_spec_t *spec,
                              const fv_placement_t *placement,
                              uint64_t position,
                              uint64_t n_tokens);

/* What decides. */
typedef enum fv_plan_prefill {
    FV_PLAN_PREFILL_AUTO = 0, /* what is predicted to be faster */
    FV_PLAN_PREFILL_VISIT,
    FV_PLAN_PREFILL_MOVE, /* wherever it can */
} fv_plan_prefill_t;

/*
 * Whether the KV of a prefill item moves to its queries. move_bytes: of each rank's staging area (0: it can not), which holds the
 * whole context of at least one KV head, or the queries visit. Never of models that add up scores between slices. The prediction is
 * fv_plan_chunk()'s, less what a policy does not read; KV moves if that is clearly faster, as the prediction knows nothing of
 * copies within a rank.
 */
bool fv_plan_moves(const fv_plan_cost_t *cost,
                   fv_plan_prefill_t choice,
                   size_t move_bytes,
                   const fv_model_spec_t *spec,
                   const fv_placement_t *placement,
                   const fv_ctl_item_t *item);

#endif /* FV_COORD_PLAN_PREFILL_H */
