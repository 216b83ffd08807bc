/*
 * plan_order.h - the usable ranks in order of load: an indexed binary heap with an ordered walk.
 *
 * Inside of the planner. The root is the least loaded rank; the walk yields the k least loaded ones in order
 * without taking them out, in O(k log k). A change of one rank costs O(log n_ranks).
 *
 * Order: load, then `begun`, then rank number. `begun` is the planner's count when a session last began on
 * the rank: among equally loaded ranks the one that waited longest comes first, so they take turns.
 */
#ifndef FV_COORD_PLAN_ORDER_H
#define FV_COORD_PLAN_ORDER_H

#include "common/status.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct fv_plan_key {
    double load; /* bytes held and expected / bytes in all */
    uint64_t begun;
    uint32_t rank;
} fv_plan_key_t;

typedef struct fv_plan_order {
    fv_plan_key_t *heap; /* [n] */
    uint32_t *where;     /* [n_ranks]: position in heap, or UINT32_MAX */
    uint32_t *frontier;  /* [n_ranks]: the walk's own heap of positions */
    uint32_t n;          /* usable ranks */
    uint32_t n_frontier;
} fv_plan_order_t;

FV_MUST_CHECK fv_status_t fv_plan_order_init(fv_plan_order_t *order, uint32_t n_ranks);
void fv_plan_order_finish(fv_plan_order_t *order);

/* Inserts the key's rank, or moves it to its new place. */
void fv_plan_order_put(fv_plan_order_t *order, fv_plan_key_t key);
void fv_plan_order_remove(fv_plan_order_t *order, uint32_t rank); /* absent is fine */
bool fv_plan_order_has(const fv_plan_order_t *order, uint32_t rank);

/* Starts a walk; fv_plan_order_put and _remove end it. */
void fv_plan_order_walk(fv_plan_order_t *order);
/* The next rank in order of load; false at the end. */
bool fv_plan_order_next(fv_plan_order_t *order, uint32_t *rank);

#endif /* FV_COORD_PLAN_ORDER_H */
