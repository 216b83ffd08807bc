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
    if ((o.heap == NULL) || (o.where == NULL)) {
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

/*
 * The next rank in order is always a child of one already taken; those children are the frontier, at most
 * k + 1 of them. A frontier this short is not worth a heap of its own.
 */
void fv_plan_order_first(const fv_plan_order_t *order, uint32_t k, uint32_t *ranks)
{
    uint32_t frontier[FV_PLACEMENT_RANKS_MAX + 1];
    fv_plan_key_t keys[FV_PLACEMENT_RANKS_MAX + 1]; /* of the frontier's positions */
    uint32_t n = 1;

    FV_ASSERT((k >= 1) && (k <= FV_PLACEMENT_RANKS_MAX) && (k <= order->n));
    frontier[0] = 0;
    keys[0] = order->heap[0];
    for (uint32_t taken = 0; taken < k; taken++) {
        fv_plan_key_t best_key = keys[0];
        uint32_t best = 0;

        for (uint32_t i = 1; i < n; i++) {
            bool is_better = is_before(keys[i], best_key);

            best_key = is_better ? keys[i] : best_key;
            best = is_better ? i : best;
        }
        ranks[taken] = fv_plan_key_rank(best_key);
        uint32_t child = (2 * frontier[best]) + 1;
        n--; /* the last one fills the gap, then the children join */
        frontier[best] = frontier[n];
        keys[best] = keys[n];
        for (uint32_t last = child + 1; (child <= last) && (child < order->n); child++) {
            frontier[n] = child;
            keys[n++] = order->heap[child];
        }
    }
}

uint32_t fv_plan_order_first_of(const fv_plan_order_t *order,
                                uint32_t k,
                                bool (*keep)(const void *arg, uint32_t rank),
                                const void *arg,
                                uint32_t *ranks)
{
    fv_plan_key_t best[FV_PLACEMENT_RANKS_MAX]; /* ascending */
    uint32_t n = 0;

    FV_ASSERT((k >= 1) && (k <= FV_PLACEMENT_RANKS_MAX));
    for (uint32_t i = 0; i < order->n; i++) {
        fv_plan_key_t key = order->heap[i];
        uint32_t at = 0;

        if (((n == k) && !is_before(key, best[n - 1])) || !keep(arg, fv_plan_key_rank(key))) {
            continue;
        }
        n += (n < k) ? 1U : 0U;
        for (at = n - 1; (at > 0) && is_before(key, best[at - 1]); at--) {
            best[at] = best[at - 1];
        }
        best[at] = key;
    }
    for (uint32_t i = 0; i < n; i++) {
        ranks[i] = fv_plan_key_rank(best[i]);
    }
    return n;
}
