/*
 * plan.h - the planner: which ranks hold a session. Pure: no I/O, no clock, no lock.
 *
 * Decode path: station 4 of 10. Before: coord/sched.c. After: coord/dispatch.c.
 *
 * Axes, in this order: heads (no exchange), then context (block-cyclic). Short sessions live on one rank, long ones
 * spread: the cost model decides per session (AUTO), or the caller fixes the axis (HEADS, CONTEXT).
 * With the context axis a session begins on the first of its ranks and reaches the next each shard_tokens
 * tokens, so even AUTO without a hint stays on one rank while it is short.
 *
 * Cost of one decode token over p ranks:  bytes / (p * bandwidth) + p > 1 ? fan-out + exchange : 0.
 */
#ifndef FV_COORD_PLAN_H
#define FV_COORD_PLAN_H

#include "common/model.h"
#include "common/status.h"
#include "proto/placement.h"

#include <stdbool.h>
#include <stdint.h>

#define FV_PLAN_REASON_BYTES 192

typedef struct fv_plan_cost {
    double rank_bytes_per_us; /* KV bytes one rank reads per microsecond */
    double fanout_us;         /* what one more rank in a step costs: control message and tensors */
    double exchange_us;       /* latency of one exchange of partial states */
    double exchange_bytes_per_us;
    double
        rank_macs_per_us; /* of latent models, whose many heads share what is read; 0 = no limit */
    bool no_latent_context; /* ranks do not merge slices of latents whose context is cut too */
} fv_plan_cost_t;

fv_plan_cost_t fv_plan_cost_cpu(void);  /* defaults measured on CPU ranks */
fv_plan_cost_t fv_plan_cost_cuda(void); /* and on GPU ranks of one host */

typedef struct fv_planner fv_planner_t;

/* Ranks 0..n_ranks-1, all unusable until fv_planner_set_rank(). */
FV_MUST_CHECK fv_status_t fv_planner_create(uint32_t n_ranks,
                                            const fv_plan_cost_t *cost,
                                            fv_planner_t **out);
void fv_planner_destroy(fv_planner_t *planner);

/* kv_bytes_total = 0: the rank holds no KV (dedicated coordinator, lost). */
void fv_planner_set_rank(fv_planner_t *planner, uint32_t rank, uint64_t kv_bytes_total);

/*
 * What the planner believes a rank holds: adjusted by the caller as sessions grow, shrink, close. Never below 0: giving
 * back more than was accounted leaves 0.
 */
void fv_planner_account(fv_planner_t *planner, uint32_t rank, int64_t delta_bytes);
uint64_t fv_planner_used(const fv_planner_t *planner, uint32_t rank);

/*
 * Chooses ranks for a new session, least loaded first. `sharding` has the mode (AUTO, HEADS, CONTEXT, LATENT),
 * shard_tokens (0 = default_shard_tokens, or as much more as S2 patterns need to be dealt evenly) and max_ranks (0 = all); max_tokens_hint 0 = unknown.
 * Does not account anything (the caller accounts at opening what the hint promises); equally loaded ranks take turns.
 * A session whose hinted length does not fit on one rank's free memory is spread until it does, where that is
 * possible. `reason` says in one sentence why, for GetPlacement.
 * Errors: FV_ERR_EXHAUSTED when no rank holds KV; FV_ERR_INVALID_ARG naming the field of `sharding`; FV_ERR_PRECONDITION for
 * LATENT with more groups than ranks.
 * Cost: O(k log n_ranks) for a session over k ranks, plus at most 64 changes of load not yet sorted in (O(n_ranks) when
 * memory is short); allocates nothing.
 */
FV_MUST_CHECK fv_status_t fv_planner_place(fv_planner_t *planner,
                                           const fv_model_spec_t *spec,
                                           const fv_sharding_t *sharding,
                                           uint32_t default_shard_tokens,
                                           uint64_t max_tokens_hint,
                                           fv_placement_t *out,
                                           char reason[FV_PLAN_REASON_BYTES]);

/* Predicted microseconds of one decode token at `n_tokens` of context under a placement (one layer). */
double fv_plan_token_us(const fv_plan_cost_t *cost,
                        const fv_model_spec_t *spec,
                        const fv_placement_t *placement,
                        uint64_t n_tokens);

/*
 * One more token: bytes that session growth from n_before to n_after tokens (one layer) adds on `cell`
 * (index into placement->ranks), in whole pages. The incremental step of a plan; O(1).
 */
uint64_t fv_plan_growth_bytes(const fv_model_spec_t *spec,
                              const fv_placement_t *placement,
                              int32_t cell,
                              uint64_t n_before,
                              uint64_t n_after);

#endif /* FV_COORD_PLAN_H */
