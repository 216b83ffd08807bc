/*
 * plan_order.h - the usable ranks in order of load: sorted runs of keys, in sorted order.
 *
 * Inside of the planner. A session over k ranks reads the first k keys, in memory order; a rank whose load changes
 * moves from one run to another, at the cost of two binary searches and two moves of half a run.
 *
 *     from    -          k32        k60        k85      the least key that belongs to the run; none for the first
 *     runs    k0 .. k31  k32 .. k59 k60 .. k84 ...      each 1..FV_PLAN_RUN_KEYS keys, ascending
 *
 * A full run is cut in two; two neighbours that fill half a run or less become one.
 *
 * Order: load, then `begun`, then rank number. `begun` is the planner's count when a session last began on
 * the rank: among equally loaded ranks the one that waited longest comes first, so they take turns.
 */
#ifndef FV_COORD_PLAN_ORDER_H
#define FV_COORD_PLAN_ORDER_H

#include "common/status.h"
#include "proto/placement.h"

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* Two words, compared one after the other: a comparison without a branch that could be mispredicted. */
typedef struct fv_plan_key {
    uint64_t load;       /* the bits of a double >= 0, which sort as it does */
    uint64_t begun_rank; /* begun, then rank in the low 16 bits */
} fv_plan_key_t;

/* load: bytes held / bytes in all, >= 0; begun < 2^48; rank < 2^16. */
static inline fv_plan_key_t fv_plan_key(double load, uint64_t begun, uint32_t rank)
{
    fv_plan_key_t key = {.begun_rank = (begun << 16) | rank};

    memcpy(&key.load, &load, sizeof(key.load));
    return key;
}

static inline uint32_t fv_plan_key_rank(fv_plan_key_t key)
{
    return (uint32_t)(key.begun_rank & 0xffffU);
}

#define FV_PLAN_RUN_KEYS 64

typedef struct fv_plan_run {
    uint32_t n;
    fv_plan_key_t keys[FV_PLAN_RUN_KEYS];
} fv_plan_run_t;

typedef struct fv_plan_order {
    fv_plan_key_t *keys; /* [n_ranks]: by rank; its place is found by its key */
    fv_plan_run_t *runs; /* [n_runs_max]: in no order */
    uint32_t *sorted; /* [n_runs_max]: indices of runs in order; from n_runs on those not in use */
    fv_plan_key_t *from; /* [n_runs_max]: parallel to sorted; from[0] is not read */
    uint32_t n_runs;
    uint32_t last_run; /* position in sorted of the last insertion: a guess for the next */
    uint32_t n;        /* usable ranks */
} fv_plan_order_t;

FV_MUST_CHECK fv_status_t fv_plan_order_init(fv_plan_order_t *order, uint32_t n_ranks);
void fv_plan_order_finish(fv_plan_order_t *order);

/* Inserts the key's rank, or moves it to its new place. */
void fv_plan_order_put(fv_plan_order_t *order, fv_plan_key_t key);
void fv_plan_order_remove(fv_plan_order_t *order, uint32_t rank); /* absent is fine */

/* Removes the k least loaded ranks; k <= n. O(k): no search, which is why a plan's own ranks leave like this. */
void fv_plan_order_drop(fv_plan_order_t *order, uint32_t k);

/* The k least loaded ranks, ascending; 1 <= k <= n. O(k). */
void fv_plan_order_first(const fv_plan_order_t *order, uint32_t k, uint32_t *ranks);

/* The same of those that keep(arg, rank) likes; returns how many there are, at most k. O(n_ranks). */
uint32_t fv_plan_order_first_of(const fv_plan_order_t *order,
                                uint32_t k,
                                bool (*keep)(const void *arg, uint32_t rank),
                                const void *arg,
                                uint32_t *ranks);

#endif /* FV_COORD_PLAN_ORDER_H */
