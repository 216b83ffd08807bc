/*
 * reduce.h - KV reduction: which pages of a session's cell have been given back, as both sides compute it.
 *
 * Policies that let pages die (common/policy.h) free them page by page and KV head by KV head. A layer's freed pages follow
 * from its policy, its floor and the placement alone: those before fv_reduce_dead() that no query head of their KV head reads
 * from afar. Workers free them when a step commits; the coordinator counts them.
 */
#ifndef FV_PROTO_REDUCE_H
#define FV_PROTO_REDUCE_H

#include "common/policy.h"
#include "proto/placement.h"

/* Local pages [0, result) of context part cp are dead but for what fv_policy_keeps(). */
static inline uint64_t fv_reduce_dead(const fv_placement_t *placement,
                                      int32_t cp,
                                      const fv_policy_t *policy,
                                      uint64_t floor)
{
    uint64_t n = (uint64_t)fv_policy_dead_pages(policy, (int64_t)floor);

    return fv_placement_pages(placement, cp, n * FV_PAGE_TOKENS);
}

/* The session's page at local page p of context part cp. */
static inline int64_t fv_reduce_page(const fv_placement_t *placement, int32_t cp, uint64_t p)
{
    return (int64_t)(fv_placement_global(placement, cp, p * FV_PAGE_TOKENS) / FV_PAGE_TOKENS);
}

/* (page, KV head) pairs among the dead local pages [from, to) of `cell` that are freed. */
uint64_t fv_reduce_freed(const fv_model_spec_t *spec,
                         const fv_policy_t *policy,
                         const fv_placement_t *placement,
                         int32_t cell,
                         uint64_t from,
                         uint64_t to);

/* (page, KV head) pairs that `cell` has freed of a layer with this floor. */
static inline uint64_t fv_reduce_freed_before(const fv_model_spec_t *spec,
                                              const fv_policy_t *policy,
                                              const fv_placement_t *placement,
                                              int32_t cell,
                                              uint64_t floor)
{
    return fv_reduce_freed(spec, policy, placement, cell, 0,
                           fv_reduce_dead(placement, cell % placement->n_ctx_parts, policy, floor));
}

#endif /* FV_PROTO_REDUCE_H */
