/*
 * plan_order.c - the usable ranks in order of load.
 */
#include "coord/plan_order.h"

#include <stdlib.h>

#define ABSENT UINT64_MAX /* as a load: the bits of a NaN */
#define HALF   (FV_PLAN_RUN_KEYS / 2)

/* Two neighbours hold more than HALF keys, so pairs of runs number at most n_ranks / (HALF + 1). */
static uint32_t n_runs_max(uint32_t n_ranks)
{
    return (2 * (n_ranks / (HALF + 1))) + 2;
}

fv_status_t fv_plan_order_init(fv_plan_order_t *order, uint32_t n_ranks)
{
    fv_plan_order_t o = {0};
    uint32_t n_runs = n_runs_max(n_ranks);

    o.keys = calloc(n_ranks, sizeof(*o.keys));
    o.runs = calloc(n_runs, sizeof(*o.runs));
    o.sorted = calloc(n_runs, sizeof(*o.sorted));
    o.from = calloc(n_runs, sizeof(*o.from));
    if ((o.keys == NULL) || (o.runs == NULL) || (o.sorted == NULL) || (o.from == NULL)) {
        fv_plan_order_finish(&o);
        return fv_fail(FV_ERR_NO_MEMORY, "planner: no memory for %u ranks", n_ranks);
    }
    for (uint32_t i = 0; i < n_ranks; i++) {
        o.keys[i].load = ABSENT;
    }
    for (uint32_t i = 0; i < n_runs; i++) {
        o.sorted[i] = i;
    }
    o.n_runs = 1; /* the first run stays when it is empty */
    *order = o;
    return FV_OK;
}

void fv_plan_order_finish(fv_plan_order_t *order)
{
    free(order->keys);
    free(order->runs);
    free(order->sorted);
    free(order->from);
    *order = (fv_plan_order_t){0};
}

static bool is_before(fv_plan_key_t a, fv_plan_key_t b)
{
    return ((a.load < b.load) | ((a.load == b.load) & (a.begun_rank < b.begun_rank))) != 0;
}

/* How many of n ascending keys are not after `key`. */
static uint32_t count_upto(const fv_plan_key_t *keys, uint32_t n, fv_plan_key_t key)
{
    uint32_t begin = 0;

    while (n > 0) {
        uint32_t half = n / 2;
        uint32_t is_upto = is_before(key, keys[begin + half]) ? 0 : 1;

        begin += (half + 1) & (0U - is_upto); /* a mask: the compiler would branch on `if` */
        n = (n - is_upto) / 2;
    }
    return begin;
}

/*
 * The same within one run, where the time goes. Loads are random, and a branch on one is mispredicted half the time:
 * there is none, the steps are the same for every run, and the second word is looked at only for equal loads.
 */
static uint32_t count_upto_in(const fv_plan_run_t *run, fv_plan_key_t key)
{
    uint32_t begin = 0;

    for (uint32_t step = FV_PLAN_RUN_KEYS / 2; step > 0; step /= 2) {
        uint32_t is_below =
            (uint32_t)((begin + step <= run->n) & (run->keys[begin + step - 1].load < key.load));

        begin += step & (0U - is_below);
    }
    while ((begin < run->n) && !is_before(key, run->keys[begin])) {
        begin++;
    }
    return begin;
}

/* Position in `sorted` of the run where `key` is or belongs. */
static uint32_t run_of(const fv_plan_order_t *o, fv_plan_key_t key)
{
    return count_upto(o->from + 1, o->n_runs - 1, key);
}

/* The ranks of one session, about equally loaded before, are so after it: most go to the same run. */
static bool is_in_run(const fv_plan_order_t *o, uint32_t at, fv_plan_key_t key)
{
    return (at < o->n_runs) && ((at == 0) || !is_before(key, o->from[at])) &&
           ((at + 1 == o->n_runs) || is_before(key, o->from[at + 1]));
}

static fv_plan_run_t *run_at(const fv_plan_order_t *o, uint32_t at)
{
    return &o->runs[o->sorted[at]];
}

/* The upper half of the full run at `at` becomes the run after it. */
static void split(fv_plan_order_t *o, uint32_t at)
{
    uint32_t fresh = o->sorted[o->n_runs];
    fv_plan_run_t *lower = run_at(o, at);
    fv_plan_run_t *upper = &o->runs[fresh];
    size_t n_later = o->n_runs - at - 1;

    lower->n = HALF;
    upper->n = FV_PLAN_RUN_KEYS - HALF;
    memcpy(upper->keys, &lower->keys[HALF], upper->n * sizeof(upper->keys[0]));
    memmove(&o->sorted[at + 2], &o->sorted[at + 1], n_later * sizeof(o->sorted[0]));
    memmove(&o->from[at + 2], &o->from[at + 1], n_later * sizeof(o->from[0]));
    o->sorted[at + 1] = fresh;
    o->from[at + 1] = upper->keys[0];
    o->n_runs++;
}

/* The run at `at`, which is not the first, joins the one before it. */
static void join(fv_plan_order_t *o, uint32_t at)
{
    uint32_t spare = o->sorted[at];
    fv_plan_run_t *lower = run_at(o, at - 1);
    const fv_plan_run_t *upper = &o->runs[spare];
    size_t n_later = o->n_runs - at - 1;

    memcpy(&lower->keys[lower->n], upper->keys, upper->n * sizeof(upper->keys[0]));
    lower->n += upper->n;
    memmove(&o->sorted[at], &o->sorted[at + 1], n_later * sizeof(o->sorted[0]));
    memmove(&o->from[at], &o->from[at + 1], n_later * sizeof(o->from[0]));
    o->n_runs--;
    o->sorted[o->n_runs] = spare;
}

static bool is_sparse(const fv_plan_order_t *o, uint32_t at)
{
    uint32_t n = run_at(o, at - 1)->n;
    uint32_t n_next = run_at(o, at)->n;

    return (n == 0) || (n_next == 0) || (n + n_next <= HALF);
}

static void take(fv_plan_order_t *o, fv_plan_key_t key)
{
    uint32_t at = run_of(o, key);
    fv_plan_run_t *run = run_at(o, at);
    uint32_t i = count_upto_in(run, key);

    FV_ASSERT((i > 0) && (run->keys[i - 1].begun_rank == key.begun_rank));
    memmove(&run->keys[i - 1], &run->keys[i], (run->n - i) * sizeof(run->keys[0]));
    run->n--;
    if (run->n <= HALF) {
        if ((at + 1 < o->n_runs) && is_sparse(o, at + 1)) {
            join(o, at + 1);
        }
        if ((at > 0) && is_sparse(o, at)) {
            join(o, at);
        }
    }
}

static void insert(fv_plan_order_t *o, fv_plan_key_t key)
{
    uint32_t at = is_in_run(o, o->last_run, key) ? o->last_run : run_of(o, key);
    fv_plan_run_t *run = run_at(o, at);

    if (run->n == FV_PLAN_RUN_KEYS) {
        split(o, at);
        at = run_of(o, key);
        run = run_at(o, at);
    }
    o->last_run = at;
    uint32_t i = count_upto_in(run, key);
    memmove(&run->keys[i + 1], &run->keys[i], (run->n - i) * sizeof(run->keys[0]));
    run->keys[i] = key;
    run->n++;
}

void fv_plan_order_put(fv_plan_order_t *order, fv_plan_key_t key)
{
    fv_plan_key_t *now = &order->keys[fv_plan_key_rank(key)];

    if (now->load == ABSENT) {
        order->n++;
    } else {
        take(order, *now);
    }
    insert(order, key);
    *now = key;
}

void fv_plan_order_remove(fv_plan_order_t *order, uint32_t rank)
{
    fv_plan_key_t *now = &order->keys[rank];

    if (now->load != ABSENT) {
        take(order, *now);
        now->load = ABSENT;
        order->n--;
    }
}

void fv_plan_order_drop(fv_plan_order_t *order, uint32_t k)
{
    fv_plan_run_t *run = run_at(order, 0);

    FV_ASSERT(k <= order->n);
    order->n -= k;
    while (k > 0) {
        uint32_t n = (k < run->n) ? k : run->n;

        for (uint32_t i = 0; i < n; i++) {
            order->keys[fv_plan_key_rank(run->keys[i])].load = ABSENT;
        }
        run->n -= n;
        k -= n;
        memmove(run->keys, &run->keys[n], run->n * sizeof(run->keys[0]));
        if ((order->n_runs > 1) && is_sparse(order, 1)) {
            join(order, 1);
        }
    }
}

void fv_plan_order_first(const fv_plan_order_t *order, uint32_t k, uint32_t *ranks)
{
    const fv_plan_run_t *run = run_at(order, 0);
    uint32_t at = 0;
    uint32_t i = 0;

    FV_ASSERT((k >= 1) && (k <= order->n));
    for (uint32_t taken = 0; taken < k; taken++) {
        if (i == run->n) {
            run = run_at(order, ++at);
            i = 0;
        }
        ranks[taken] = fv_plan_key_rank(run->keys[i++]);
    }
}

uint32_t fv_plan_order_first_of(const fv_plan_order_t *order,
                                uint32_t k,
                                bool (*keep)(const void *arg, uint32_t rank),
                                const void *arg,
                                uint32_t *ranks)
{
    uint32_t n = 0;

    for (uint32_t at = 0; at < order->n_runs; at++) {
        const fv_plan_run_t *run = run_at(order, at);

        for (uint32_t i = 0; (i < run->n) && (n < k); i++) {
            uint32_t rank = fv_plan_key_rank(run->keys[i]);

            if (keep(arg, rank)) {
                ranks[n++] = rank;
            }
        }
    }
    return n;
}
