/*
 * plan_order.c - the usable ranks in order of load.
 */
#include "coord/plan_order.h"

#include <stdlib.h>

#define NOWHERE UINT32_MAX

fv_status_t fv_plan_order_init(fv_plan_order_t *order, uint32_t n_ranks)
{
    fv_plan_order_t o = {0};

    o.heap = calloc(n_ranks, sizeof(*o.heap));
    o.where = calloc(n_ranks, sizeof(*o.where));
    o.frontier = calloc(n_ranks, sizeof(*o.frontier));
    if ((o.heap == NULL) || (o.where == NULL) || (o.frontier == NULL)) {
        fv_plan_order_finish(&o);
        return fv_fail(FV_ERR_NO_MEMORY, "planner: no memory for %u ranks", n_ranks);
    }
    for (uint32_t i = 0; i < n_ranks; i++) {
        o.where[i] = NOWHERE;
    }
    *order = o;
    return FV_OK;
}

void fv_plan_order_finish(fv_plan_order_t *order)
{
    free(order->heap);
    free(order->where);
    free(order->frontier);
    *order = (fv_plan_order_t){0};
}

static bool is_before(fv_plan_key_t a, fv_plan_key_t b)
{
    return ((a.load < b.load) | ((a.load == b.load) & (a.begun_rank < b.begun_rank))) != 0;
}

static void set_at(fv_plan_order_t *o, uint32_t at, fv_plan_key_t key)
{
    o->heap[at] = key;
    o->where[fv_plan_key_rank(key)] = at;
}

/* Both move a hole rather than swap: one write a level. */
static void sift_up(fv_plan_order_t *o, uint32_t at, fv_plan_key_t key)
{
    while (at > 0) {
        uint32_t parent = (at - 1) / 2;

        if (!is_before(key, o->heap[parent])) {
            break;
        }
        set_at(o, at, o->heap[parent]);
        at = parent;
    }
    set_at(o, at, key);
}

static void sift_down(fv_plan_order_t *o, uint32_t at, fv_plan_key_t key)
{
    for (uint32_t child = (2 * at) + 1; child < o->n; child = (2 * at) + 1) {
        child += (child + 1 < o->n) && is_before(o->heap[child + 1], o->heap[child]);
        if (!is_before(o->heap[child], key)) {
            break;
        }
        set_at(o, at, o->heap[child]);
        at = child;
    }
    set_at(o, at, key);
}

void fv_plan_order_put(fv_plan_order_t *order, fv_plan_key_t key)
{
    uint32_t at = order->where[fv_plan_key_rank(key)];

    if (at == NOWHERE) {
        sift_up(order, order->n++, key);
    } else if (is_before(key, order->heap[at])) {
        sift_up(order, at, key);
    } else {
        sift_down(order, at, key);
    }
}

void fv_plan_order_remove(fv_plan_order_t *order, uint32_t rank)
{
    uint32_t at = order->where[rank];

    if (at == NOWHERE) {
        return;
    }
    order->where[rank] = NOWHERE;
    order->n--;
    if (at < order->n) { /* the last one fills the hole: it may belong above or below it */
        fv_plan_key_t last = order->heap[order->n];

        if ((at > 0) && is_before(last, order->heap[(at - 1) / 2])) {
            sift_up(order, at, last);
        } else {
            sift_down(order, at, last);
        }
    }
}

bool fv_plan_order_has(const fv_plan_order_t *order, uint32_t rank)
{
    return order->where[rank] != NOWHERE;
}

/*
 * The walk. The next rank in order is always a child of one already yielded; those children are the
 * frontier, itself a heap, of at most n_yielded + 1 keys.
 */
static void frontier_push(fv_plan_order_t *o, fv_plan_spot_t spot)
{
    uint32_t at = o->n_frontier++;

    while (at > 0) {
        uint32_t parent = (at - 1) / 2;

        if (!is_before(spot.key, o->frontier[parent].key)) {
            break;
        }
        o->frontier[at] = o->frontier[parent];
        at = parent;
    }
    o->frontier[at] = spot;
}

/* Puts `spot` where the root was. */
static void frontier_replace(fv_plan_order_t *o, fv_plan_spot_t spot)
{
    fv_plan_spot_t *f = o->frontier;
    uint32_t at = 0;

    for (uint32_t child = 1; child < o->n_frontier; child = (2 * at) + 1) {
        child += (child + 1 < o->n_frontier) && is_before(f[child + 1].key, f[child].key);
        if (!is_before(f[child].key, spot.key)) {
            break;
        }
        f[at] = f[child];
        at = child;
    }
    f[at] = spot;
}

static fv_plan_spot_t spot_at(const fv_plan_order_t *o, uint32_t at)
{
    return (fv_plan_spot_t){.key = o->heap[at], .at = at};
}

void fv_plan_order_walk(fv_plan_order_t *order)
{
    order->n_frontier = 0;
    if (order->n > 0) {
        frontier_push(order, spot_at(order, 0));
    }
}

bool fv_plan_order_next(fv_plan_order_t *order, uint32_t *rank)
{
    if (order->n_frontier == 0) {
        return false;
    }
    uint32_t child = (2 * order->frontier[0].at) + 1;
    *rank = fv_plan_key_rank(order->frontier[0].key);
    if (child < order->n) {
        frontier_replace(order, spot_at(order, child));
    } else {
        order->n_frontier--;
        if (order->n_frontier > 0) {
            frontier_replace(order, order->frontier[order->n_frontier]);
        }
    }
    if (child + 1 < order->n) {
        frontier_push(order, spot_at(order, child + 1));
    }
    return true;
}
