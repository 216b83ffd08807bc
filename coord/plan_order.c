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

static bool is_before(const fv_plan_key_t *a, const fv_plan_key_t *b)
{
    if (a->load < b->load) {
        return true;
    }
    if (a->load > b->load) {
        return false;
    }
    return (a->begun != b->begun) ? (a->begun < b->begun) : (a->rank < b->rank);
}

static void set_at(fv_plan_order_t *o, uint32_t at, fv_plan_key_t key)
{
    o->heap[at] = key;
    o->where[key.rank] = at;
}

/* Both move a hole rather than swap: one write a level. */
static void sift_up(fv_plan_order_t *o, uint32_t at, fv_plan_key_t key)
{
    while (at > 0) {
        uint32_t parent = (at - 1) / 2;

        if (!is_before(&key, &o->heap[parent])) {
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
        if ((child + 1 < o->n) && is_before(&o->heap[child + 1], &o->heap[child])) {
            child++;
        }
        if (!is_before(&o->heap[child], &key)) {
            break;
        }
        set_at(o, at, o->heap[child]);
        at = child;
    }
    set_at(o, at, key);
}

void fv_plan_order_put(fv_plan_order_t *order, fv_plan_key_t key)
{
    uint32_t at = order->where[key.rank];

    if (at == NOWHERE) {
        sift_up(order, order->n++, key);
    } else if (is_before(&key, &order->heap[at])) {
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

        if ((at > 0) && is_before(&last, &order->heap[(at - 1) / 2])) {
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
 * frontier, itself a heap, of at most n_yielded + 1 positions.
 */
static void frontier_push(fv_plan_order_t *o, uint32_t position)
{
    uint32_t at = o->n_frontier++;

    while (at > 0) {
        uint32_t parent = (at - 1) / 2;

        if (!is_before(&o->heap[position], &o->heap[o->frontier[parent]])) {
            break;
        }
        o->frontier[at] = o->frontier[parent];
        at = parent;
    }
    o->frontier[at] = position;
}

static uint32_t frontier_pop(fv_plan_order_t *o)
{
    uint32_t top = o->frontier[0];
    uint32_t last = o->frontier[--o->n_frontier];
    uint32_t at = 0;

    for (uint32_t child = 1; child < o->n_frontier; child = (2 * at) + 1) {
        if ((child + 1 < o->n_frontier) &&
            is_before(&o->heap[o->frontier[child + 1]], &o->heap[o->frontier[child]])) {
            child++;
        }
        if (!is_before(&o->heap[o->frontier[child]], &o->heap[last])) {
            break;
        }
        o->frontier[at] = o->frontier[child];
        at = child;
    }
    o->frontier[at] = last;
    return top;
}

void fv_plan_order_walk(fv_plan_order_t *order)
{
    order->n_frontier = 0;
    if (order->n > 0) {
        frontier_push(order, 0);
    }
}

bool fv_plan_order_next(fv_plan_order_t *order, uint32_t *rank)
{
    uint32_t at = 0;

    if (order->n_frontier == 0) {
        return false;
    }
    at = frontier_pop(order);
    for (uint32_t child = (2 * at) + 1; (child <= (2 * at) + 2) && (child < order->n); child++) {
        frontier_push(order, child);
    }
    *rank = order->heap[at].rank;
    return true;
}
