/*
 * prop_plan.c - laws of the planner over random clusters, models and loads.
 *
 * FV_SEED=n repeats a run; the seed is printed.
 */
#include "coord/plan.h"
#include "tests/support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_ROUNDS   400
#define RANKS_MAX  4096
#define GIB        (1ULL << 30)
#define N_SESSIONS 10000

static uint64_t seed;
static uint64_t state_now;

/* splitmix64 */
static uint64_t next(void)
{
    uint64_t z = (state_now += 0x9e3779b97f4a7c15ULL);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
}

/* Uniform in [low, high]. */
static uint64_t between(uint64_t low, uint64_t high)
{
    return low + (next() % (high - low + 1));
}

/* Its magnitude, not its value, is uniform: short and long sessions alike. */
static uint64_t log_between(uint32_t low_bits, uint32_t high_bits)
{
    uint64_t bits = between(low_bits, high_bits);

    return (1ULL << bits) + (next() & ((1ULL << bits) - 1));
}

static fv_model_spec_t random_spec(void)
{
    static const int32_t heads[] = {1, 2, 3, 4, 5, 8, 12, 32, 96};
    fv_model_spec_t spec = {.n_layers = (int32_t)between(1, 40),
                            .n_kv_heads = heads[between(0, FV_COUNT(heads) - 1)],
                            .head_dim_qk = (int32_t)between(2, 32) * 8,
                            .head_dim_v = (int32_t)between(2, 32) * 8,
                            .kv_dtype = (int32_t)between(FV_DTYPE_F32, FV_DTYPE_BF16),
                            .softmax_scale = 1.0F,
                            .n_policies = 2};

    spec.n_q_heads = spec.n_kv_heads * (int32_t)between(1, 8);
    spec.policies[1] =
        (fv_policy_t){.kind = FV_POLICY_WINDOW, .window_tokens = (int32_t)log_between(0, 14)};
    for (int32_t i = 0; i < spec.n_layers; i++) {
        spec.layer_policy[i] = (uint8_t)between(0, 1);
    }
    return spec;
}

static fv_sharding_t random_sharding(void)
{
    fv_sharding_t s = {.mode = (int32_t)between(FV_SHARDING_AUTO, FV_SHARDING_CONTEXT)};

    s.shard_tokens = (int32_t)(between(0, 1) * between(1, 64) * FV_PAGE_TOKENS);
    s.max_ranks = (int32_t)(between(0, 1) * between(1, 70));
    return s;
}

static uint64_t random_hint(void)
{
    return (between(0, 3) == 0) ? 0 : log_between(0, 21);
}

/* A planner, and a second opinion on what it was told. */
typedef struct cluster {
    fv_planner_t *planner;
    uint32_t n_ranks;
    uint64_t total[RANKS_MAX];
    uint64_t used[RANKS_MAX];
} cluster_t;

static void set_rank(cluster_t *c, uint32_t rank, uint64_t total)
{
    c->total[rank] = total;
    fv_planner_set_rank(c->planner, rank, total);
}

static void account(cluster_t *c, uint32_t rank, int64_t delta)
{
    c->used[rank] += (uint64_t)delta;
    fv_planner_account(c->planner, rank, delta);
}

static cluster_t *make_cluster(uint32_t n_ranks)
{
    fv_plan_cost_t cost = fv_plan_cost_cpu();
    cluster_t *c = calloc(1, sizeof(*c));

    assert_non_null(c);
    c->n_ranks = n_ranks;
    assert_int_equal(fv_planner_create(n_ranks, &cost, &c->planner), FV_OK);
    return c;
}

static void free_cluster(cluster_t *c)
{
    fv_planner_destroy(c->planner);
    free(c);
}

/* Uneven memory, uneven load, some ranks without KV. */
static cluster_t *random_cluster(uint32_t n_ranks)
{
    cluster_t *c = make_cluster(n_ranks);

    for (uint32_t i = 0; i < n_ranks; i++) {
        set_rank(c, i, (between(0, 5) == 0) ? 0 : between(1, 64) * GIB);
        account(c, i, (int64_t)between(0, 8 * GIB));
    }
    set_rank(c, (uint32_t)between(0, n_ranks - 1), 64 * GIB); /* at least one is usable */
    return c;
}

static uint32_t n_usable(const cluster_t *c)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < c->n_ranks; i++) {
        n += (c->total[i] > 0) ? 1U : 0U;
    }
    return n;
}

static double load(const cluster_t *c, uint32_t rank)
{
    return (double)c->used[rank] / (double)c->total[rank];
}

static int32_t n_cells(const fv_placement_t *p)
{
    return p->n_head_parts * p->n_ctx_parts;
}

static fv_placement_t place(cluster_t *c,
                            const fv_model_spec_t *spec,
                            const fv_sharding_t *sharding,
                            uint64_t hint,
                            char *reason)
{
    fv_placement_t p = {0};

    assert_int_equal(fv_planner_place(c->planner, spec, sharding, 2048, hint, &p, reason), FV_OK);
    return p;
}

/* The session grows to n_tokens in every layer; a negative sign closes it again. */
static void grow(cluster_t *c,
                 const fv_model_spec_t *spec,
                 const fv_placement_t *p,
                 uint64_t n_tokens,
                 int64_t sign)
{
    for (int32_t cell = 0; cell < n_cells(p); cell++) {
        uint64_t bytes =
            fv_plan_growth_bytes(spec, p, cell, 0, n_tokens) * (uint64_t)spec->n_layers;
        account(c, p->ranks[cell], sign * (int64_t)bytes);
    }
}

/* ------------------------------------------------------------------ laws */

/* Every (KV head, token block) belongs to exactly one cell, by count over all cells. */
static void check_ownership(const fv_model_spec_t *spec, const fv_placement_t *p)
{
    uint64_t n_tokens = (uint64_t)p->shard_tokens * (uint64_t)(2 * p->n_ctx_parts) + 1;
    uint64_t owned = 0;

    for (int32_t head = 0; head < spec->n_kv_heads; head++) {
        int32_t n_owners = 0;
        for (int32_t hp = 0; hp < p->n_head_parts; hp++) {
            n_owners += ((head >= fv_placement_head_begin(p, spec->n_kv_heads, hp)) &&
                         (head < fv_placement_head_begin(p, spec->n_kv_heads, hp + 1)))
                            ? 1
                            : 0;
        }
        assert_int_equal(n_owners, 1);
    }
    for (int32_t hp = 0; hp < p->n_head_parts; hp++) {
        assert_true(fv_placement_head_begin(p, spec->n_kv_heads, hp) <
                    fv_placement_head_begin(p, spec->n_kv_heads, hp + 1)); /* no idle part */
    }
    for (int32_t cp = 0; cp < p->n_ctx_parts; cp++) {
        owned += fv_placement_tokens(p, cp, n_tokens);
    }
    assert_int_equal(owned, n_tokens);
}

static void test_placement_is_valid(void **state)
{
    (void)state;
    for (int32_t round = 0; round < N_ROUNDS; round++) {
        cluster_t *c = random_cluster((uint32_t)between(1, 100));
        fv_model_spec_t spec = random_spec();
        fv_sharding_t sharding = random_sharding();
        char reason[FV_PLAN_REASON_BYTES];
        fv_placement_t p = place(c, &spec, &sharding, random_hint(), reason);
        uint32_t limit = n_usable(c);

        if ((sharding.max_ranks > 0) && ((uint32_t)sharding.max_ranks < limit)) {
            limit = (uint32_t)sharding.max_ranks;
        }
        assert_in_range(n_cells(&p), 1, FV_PLACEMENT_RANKS_MAX);
        assert_true((uint32_t)n_cells(&p) <= limit);
        assert_in_range(p.n_head_parts, 1, spec.n_kv_heads);
        assert_int_equal(p.shard_tokens,
                         (sharding.shard_tokens > 0) ? sharding.shard_tokens : 2048);
        if (sharding.mode == FV_SHARDING_CONTEXT) {
            assert_int_equal(p.n_head_parts, 1);
        }
        for (int32_t i = 0; i < n_cells(&p); i++) {
            assert_true(p.ranks[i] < c->n_ranks);
            assert_true(c->total[p.ranks[i]] > 0);
            assert_int_equal(fv_placement_cell(&p, p.ranks[i]), i); /* distinct */
        }
        assert_in_range(strlen(reason), 10, FV_PLAN_REASON_BYTES - 1);
        check_ownership(&spec, &p);
        free_cluster(c);
    }
}

/* With ample memory and after any history, no rank left out has less load than one chosen. */
static void test_least_loaded_are_chosen(void **state)
{
    (void)state;
    for (int32_t round = 0; round < N_ROUNDS; round++) {
        cluster_t *c = random_cluster((uint32_t)between(2, 100));
        fv_model_spec_t spec = random_spec();
        char reason[FV_PLAN_REASON_BYTES];

        for (int32_t i = 0; i < 50; i++) { /* changes that the order must follow */
            uint32_t rank = (uint32_t)between(0, c->n_ranks - 1);
            if (between(0, 9) == 0) {
                set_rank(c, rank, between(0, 1) * between(1, 64) * GIB);
            }
            account(c, rank, (int64_t)between(0, GIB) - (int64_t)((c->used[rank] > GIB) ? GIB : 0));
        }
        set_rank(c, 0, GIB);
        fv_sharding_t sharding = {.mode = FV_SHARDING_CONTEXT,
                                  .max_ranks = (int32_t)between(1, 64)};
        fv_placement_t p = place(c, &spec, &sharding, 0, reason);
        for (int32_t i = 1; i < n_cells(&p); i++) {
            assert_true(load(c, p.ranks[i - 1]) <= load(c, p.ranks[i]));
        }
        double highest = load(c, p.ranks[n_cells(&p) - 1]);
        for (uint32_t rank = 0; rank < c->n_ranks; rank++) {
            assert_int_equal(fv_planner_used(c->planner, rank), c->used[rank]);
            if ((c->total[rank] > 0) && (fv_placement_cell(&p, rank) < 0)) {
                assert_true(load(c, rank) >= highest);
            }
        }
        free_cluster(c);
    }
}

/* When memory decides, the ranks chosen have room, and are the least loaded of those that have. */
static void test_least_loaded_with_room(void **state)
{
    int32_t n_decided = 0;
    (void)state;

    for (int32_t round = 0; round < N_ROUNDS; round++) {
        cluster_t *c = random_cluster((uint32_t)between(8, 100));
        fv_model_spec_t spec = random_spec();
        fv_sharding_t sharding = {.mode = FV_SHARDING_CONTEXT, .max_ranks = (int32_t)between(1, 8)};
        uint64_t hint = log_between(10, 22);
        char reason[FV_PLAN_REASON_BYTES];
        fv_placement_t p = place(c, &spec, &sharding, hint, reason);
        uint64_t need =
            fv_plan_growth_bytes(&spec, &p, 0, 0, hint) * (uint64_t)spec.n_layers; /* the fullest */

        if (strstr(reason, "memory decided") != NULL) {
            double highest = load(c, p.ranks[n_cells(&p) - 1]);
            n_decided++;
            for (int32_t i = 0; i < n_cells(&p); i++) {
                assert_true(c->used[p.ranks[i]] + need <= c->total[p.ranks[i]]);
                assert_true((i == 0) || (load(c, p.ranks[i - 1]) <= load(c, p.ranks[i])));
            }
            for (uint32_t rank = 0; rank < c->n_ranks; rank++) {
                if ((c->used[rank] + need <= c->total[rank]) && (fv_placement_cell(&p, rank) < 0)) {
                    assert_true(load(c, rank) >= highest);
                }
            }
        }
        free_cluster(c);
    }
    assert_true(n_decided > N_ROUNDS / 50);
}

static void test_same_calls_same_plan(void **state)
{
    (void)state;
    for (int32_t round = 0; round < 50; round++) {
        uint64_t begin = state_now;
        fv_placement_t plans[2][20];
        char reasons[2][20][FV_PLAN_REASON_BYTES];

        memset(plans, 0, sizeof(plans));
        memset(reasons, 0, sizeof(reasons));
        for (int32_t run = 0; run < 2; run++) {
            state_now = begin;
            cluster_t *c = random_cluster((uint32_t)between(1, 50));
            for (int32_t i = 0; i < 20; i++) {
                fv_model_spec_t spec = random_spec();
                fv_sharding_t sharding = random_sharding();
                uint64_t hint = random_hint();
                plans[run][i] = place(c, &spec, &sharding, hint, reasons[run][i]);
                grow(c, &spec, &plans[run][i], hint / 2, 1);
            }
            free_cluster(c);
        }
        assert_memory_equal(plans[0], plans[1], sizeof(plans[0]));
        for (int32_t i = 0; i < 20; i++) {
            assert_string_equal(reasons[0][i], reasons[1][i]);
        }
    }
}

/* AUTO is never predicted to be much slower than one rank, or than any even cut it could have taken. */
static void test_auto_is_near_the_best(void **state)
{
    fv_plan_cost_t cost = fv_plan_cost_cpu();
    (void)state;

    for (int32_t round = 0; round < N_ROUNDS; round++) {
        uint32_t n_ranks = (uint32_t)between(1, 64);
        cluster_t *c = make_cluster(n_ranks);
        fv_model_spec_t spec = random_spec();
        fv_sharding_t sharding = {0};
        uint64_t hint = log_between(0, 20);
        char reason[FV_PLAN_REASON_BYTES];

        for (uint32_t i = 0; i < n_ranks; i++) {
            set_rank(c, i, 1ULL << 50);
        }
        fv_placement_t p = place(c, &spec, &sharding, hint, reason);
        double chosen = fv_plan_token_us(&cost, &spec, &p, hint);
        for (uint32_t h = 1; (h <= n_ranks) && (h <= (uint32_t)spec.n_kv_heads); h++) {
            for (uint32_t x = 1; x * h <= n_ranks; x *= 2) {
                fv_placement_t other = {.n_head_parts = (uint16_t)h,
                                        .n_ctx_parts = (uint16_t)x,
                                        .shard_tokens = p.shard_tokens};
                assert_true(chosen <= 1.0501 * fv_plan_token_us(&cost, &spec, &other, hint) + 1e-9);
            }
        }
        free_cluster(c);
    }
}

/* Token by token or all at once, the same bytes; and pages enough for every token, none to spare. */
static void test_growth_adds_up(void **state)
{
    (void)state;
    for (int32_t round = 0; round < 100; round++) {
        fv_model_spec_t spec = random_spec();
        fv_placement_t p = {.n_head_parts = (uint16_t)between(1, (uint64_t)spec.n_kv_heads),
                            .n_ctx_parts = (uint16_t)between(1, 5),
                            .shard_tokens = (uint32_t)between(1, 4) * FV_PAGE_TOKENS};
        uint64_t n_tokens = between(0, 3000);
        uint64_t all = 0;
        uint64_t n_pages = 0;

        for (int32_t cell = 0; cell < n_cells(&p); cell++) {
            uint64_t sum = 0;
            uint64_t at = 0;
            while (at < n_tokens) {
                uint64_t to = at + between(1, 200);
                to = (to > n_tokens) ? n_tokens : to;
                sum += fv_plan_growth_bytes(&spec, &p, cell, at, to);
                at = to;
            }
            assert_int_equal(sum, fv_plan_growth_bytes(&spec, &p, cell, 0, n_tokens));
            all += sum;
        }
        /* pages never span parts and blocks are whole pages, so cutting wastes none */
        n_pages = fv_div_up(n_tokens, FV_PAGE_TOKENS) * (uint64_t)spec.n_kv_heads;
        assert_int_equal(all, n_pages * fv_model_page_bytes(&spec));
    }
}

static double max_over_mean(const cluster_t *c)
{
    double used = 0.0;
    double total = 0.0;
    double highest = 0.0;

    for (uint32_t i = 0; i < c->n_ranks; i++) {
        if (c->total[i] > 0) {
            used += (double)c->used[i];
            total += (double)c->total[i];
            highest = (load(c, i) > highest) ? load(c, i) : highest;
        }
    }
    return highest / (used / total);
}

/*
 * 10,000 sessions of 100 to 16k tokens, half without a hint: the fullest rank is within 1.2 of the mean. With uneven memory
 * a session takes at most an eighth of the ranks: one that takes them all, in equal parts, cannot follow.
 */
static void test_load_is_balanced(void **state)
{
    static const uint32_t sizes[] = {2, 7, 64, 512};
    (void)state;

    for (size_t i = 0; i < FV_COUNT(sizes); i++) {
        for (int32_t uneven = 0; uneven < 2; uneven++) {
            cluster_t *c = make_cluster(sizes[i]);
            fv_model_spec_t spec = random_spec();
            fv_sharding_t sharding = {0};
            char reason[FV_PLAN_REASON_BYTES];

            sharding.max_ranks = (uneven != 0) ? (int32_t)fv_div_up(sizes[i], 8) : 0;
            for (uint32_t rank = 0; rank < sizes[i]; rank++) {
                set_rank(c, rank, (1ULL << 40) * ((uneven != 0) ? between(1, 4) : 2));
            }
            for (int32_t s = 0; s < N_SESSIONS; s++) {
                uint64_t n_tokens = log_between(7, 13);
                fv_placement_t p =
                    place(c, &spec, &sharding, (between(0, 1) == 0) ? 0 : n_tokens, reason);
                grow(c, &spec, &p, n_tokens, 1);
            }
            double ratio = max_over_mean(c);
            if (!(ratio <= 1.2)) {
                fail_msg("%u ranks, uneven %d: fullest is %.3f of the mean", sizes[i], uneven,
                         ratio);
            }
            free_cluster(c);
        }
    }
}

typedef struct live_session {
    fv_placement_t placement;
    uint64_t n_tokens;
} live_session_t;

/* A year in the life of 4096 ranks: sessions come, grow and go, ranks are lost and return. */
static void test_large_cluster_churn(void **state)
{
    cluster_t *c = make_cluster(RANKS_MAX);
    fv_model_spec_t spec = random_spec();
    fv_sharding_t sharding = {0};
    live_session_t *live = calloc(N_SESSIONS, sizeof(*live));
    char reason[FV_PLAN_REASON_BYTES];
    (void)state;

    assert_non_null(live);
    for (uint32_t rank = 0; rank < RANKS_MAX; rank++) {
        set_rank(c, rank, 1ULL << 40);
    }
    for (int32_t event = 0; event < 3 * N_SESSIONS; event++) {
        live_session_t *s = &live[between(0, N_SESSIONS - 1)];

        if (between(0, 99) == 0) {
            uint32_t rank = (uint32_t)between(0, RANKS_MAX - 1);
            set_rank(c, rank, (c->total[rank] > 0) ? 0 : (1ULL << 40));
        }
        if (s->n_tokens > 0) {
            grow(c, &spec, &s->placement, s->n_tokens, -1);
        }
        s->n_tokens = log_between(7, 17);
        s->placement = place(c, &spec, &sharding, s->n_tokens, reason);
        for (int32_t i = 0; i < n_cells(&s->placement); i++) {
            assert_true(c->total[s->placement.ranks[i]] > 0);
        }
        grow(c, &spec, &s->placement, s->n_tokens, 1);
    }
    for (int32_t i = 0; i < N_SESSIONS; i++) {
        grow(c, &spec, &live[i].placement, live[i].n_tokens, (live[i].n_tokens > 0) ? -1 : 0);
    }
    for (uint32_t rank = 0; rank < RANKS_MAX; rank++) {
        assert_int_equal(fv_planner_used(c->planner, rank), 0);
    }
    free(live);
    free_cluster(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_placement_is_valid),
        cmocka_unit_test(test_least_loaded_are_chosen),
        cmocka_unit_test(test_least_loaded_with_room),
        cmocka_unit_test(test_same_calls_same_plan),
        cmocka_unit_test(test_auto_is_near_the_best),
        cmocka_unit_test(test_growth_adds_up),
        cmocka_unit_test(test_load_is_balanced),
        cmocka_unit_test(test_large_cluster_churn),
    };
    const char *text = getenv("FV_SEED");

    seed = (text != NULL) ? strtoull(text, NULL, 10) : 20250611U;
    state_now = seed;
    printf("FV_SEED=%llu\n", (unsigned long long)seed);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
