/*
 * test_plan.c - the planner: goldens of what it chooses, predicts, refuses and says.
 *
 * The cost model here is the test's own, so that a new measurement of the real one changes no golden:
 * 1 rank reads 1000 bytes/us, 10 us a further rank, 20 us an exchange, 500 bytes/us in it.
 */
#include "coord/plan.h"
#include "tests/support/test.h"

#include <math.h>
#include <string.h>

#define MIB (1024.0 * 1024.0)

static const fv_plan_cost_t k_cost = {.rank_bytes_per_us = 1000.0,
                                      .fanout_us = 10.0,
                                      .exchange_us = 20.0,
                                      .exchange_bytes_per_us = 500.0};

/* bf16, d = 128: 512 bytes a token and KV head. */
static fv_model_spec_t make_spec(int32_t n_q_heads, int32_t n_kv_heads, int32_t n_layers)
{
    fv_model_spec_t spec = {.n_layers = n_layers,
                            .n_q_heads = n_q_heads,
                            .n_kv_heads = n_kv_heads,
                            .head_dim_qk = 128,
                            .head_dim_v = 128,
                            .kv_dtype = FV_DTYPE_BF16,
                            .softmax_scale = 0.088F,
                            .n_policies = 1};
    return spec;
}

static fv_planner_t *make_planner(uint32_t n_ranks, uint64_t bytes)
{
    fv_planner_t *planner = NULL;

    assert_int_equal(fv_planner_create(n_ranks, &k_cost, &planner), FV_OK);
    for (uint32_t i = 0; i < n_ranks; i++) {
        fv_planner_set_rank(planner, i, bytes);
    }
    return planner;
}

static fv_placement_t place(fv_planner_t *planner,
                            const fv_model_spec_t *spec,
                            fv_sharding_t sharding,
                            uint64_t hint,
                            char *reason)
{
    fv_placement_t placement = {0};
    char text[FV_PLAN_REASON_BYTES] = "";

    assert_int_equal(fv_planner_place(planner, spec, &sharding, 2048, hint, &placement, text),
                     FV_OK);
    if (reason != NULL) {
        memcpy(reason, text, sizeof(text));
    }
    return placement;
}

/* cmocka's own assert_float_equal works in single precision. */
static void assert_us(double given, double expected)
{
    if (!(fabs(given - expected) <= 1e-9 * (1.0 + fabs(expected)))) {
        fail_msg("%.9g us, expected %.9g", given, expected);
    }
}

/* ------------------------------------------------------------------ predictions */

static void test_token_us(void **state)
{
    fv_model_spec_t spec = make_spec(32, 8, 4);
    fv_placement_t one = {.n_head_parts = 1, .n_ctx_parts = 1, .shard_tokens = 2048};
    fv_placement_t heads = {.n_head_parts = 3, .n_ctx_parts = 1, .shard_tokens = 2048};
    fv_placement_t ctx = {.n_head_parts = 1, .n_ctx_parts = 4, .shard_tokens = 2048};
    (void)state;

    /* 1000 tokens * 8 heads * 512 bytes / 1000 */
    assert_us(fv_plan_token_us(&k_cost, &spec, &one, 1000), 4096.0);
    /* the largest of 3, 3, 2 heads; two further ranks; no exchange */
    assert_us(fv_plan_token_us(&k_cost, &spec, &heads, 1000), 1536.0 + 20.0);
    /* below one block only the first of the four ranks takes part */
    assert_us(fv_plan_token_us(&k_cost, &spec, &ctx, 1000), 4096.0);
    /* 3 blocks: 3 ranks with one each; 2/3 of 32 states of 129 floats leave each rank */
    assert_us(fv_plan_token_us(&k_cost, &spec, &ctx, 6144),
              (2048.0 * 8 * 512 / 1000) + 20.0 + 20.0 + (32.0 * 2 / 3 * 516 / 500));
    assert_us(fv_plan_token_us(&k_cost, &spec, &one, 0), 0.0);
}

/* Three of four layers read 100 tokens however long the context is. */
static void test_token_us_window(void **state)
{
    fv_model_spec_t spec = make_spec(32, 8, 4);
    fv_placement_t one = {.n_head_parts = 1, .n_ctx_parts = 1, .shard_tokens = 2048};
    (void)state;

    spec.n_policies = 2;
    spec.policies[1] =
        (fv_policy_t){.kind = FV_POLICY_WINDOW, .window_tokens = 96, .sink_tokens = 4};
    spec.layer_policy[1] = spec.layer_policy[2] = spec.layer_policy[3] = 1;
    assert_us(fv_plan_token_us(&k_cost, &spec, &one, 1000), (0.25 * 1000 + 0.75 * 100) * 4.096);
    assert_us(fv_plan_token_us(&k_cost, &spec, &one, 50), 50 * 4.096);
}

static void test_growth_bytes(void **state)
{
    fv_model_spec_t spec = make_spec(6, 3, 9);
    /* cells 0, 1: head 0; cells 2, 3: heads 1 and 2; blocks of 128 tokens, two pages */
    fv_placement_t p = {.n_head_parts = 2, .n_ctx_parts = 2, .shard_tokens = 128};
    const uint64_t page = 64 * 512;
    (void)state;

    assert_int_equal(fv_plan_growth_bytes(&spec, &p, 0, 0, 1), page);
    assert_int_equal(fv_plan_growth_bytes(&spec, &p, 2, 0, 1), 2 * page);
    assert_int_equal(fv_plan_growth_bytes(&spec, &p, 1, 0, 1), 0);
    assert_int_equal(fv_plan_growth_bytes(&spec, &p, 0, 1, 64), 0); /* inside a page */
    assert_int_equal(fv_plan_growth_bytes(&spec, &p, 0, 64, 65), page);
    assert_int_equal(fv_plan_growth_bytes(&spec, &p, 0, 128, 256), 0); /* the other part's block */
    assert_int_equal(fv_plan_growth_bytes(&spec, &p, 3, 128, 256), 4 * page);
    assert_int_equal(fv_plan_growth_bytes(&spec, &p, 0, 0, 300), 3 * page);
    assert_int_equal(fv_plan_growth_bytes(&spec, &p, 0, 300, 0), 0); /* shrinking adds nothing */
}

/* ------------------------------------------------------------------ shapes */

typedef struct shape_case {
    int32_t n_kv_heads;
    uint32_t n_ranks;
    fv_sharding_t sharding;
    uint64_t hint;
    int32_t n_head_parts, n_ctx_parts;
} shape_case_t;

#define AUTO(max)                                    \
    {                                                \
        .mode = FV_SHARDING_AUTO, .max_ranks = (max) \
    }
#define HEADS(max)                                    \
    {                                                 \
        .mode = FV_SHARDING_HEADS, .max_ranks = (max) \
    }
#define CONTEXT(max)                                    \
    {                                                   \
        .mode = FV_SHARDING_CONTEXT, .max_ranks = (max) \
    }

static const shape_case_t k_shapes[] = {
    /* AUTO: a part costs 10 us; one token of one head 0.512 us */
    {8, 1, AUTO(0), 100000, 1, 1},
    {8, 4, AUTO(0), 2, 1, 1},  /* 8.2 us: not worth a second rank */
    {8, 4, AUTO(0), 16, 2, 1}, /* 66 us on one rank, 43 on two, 46 on four */
    {8, 4, AUTO(0), 4096, 4, 1},
    {8, 7, AUTO(0), 100, 4, 1},       /* seven parts of 8 heads are no faster than four */
    {8, 8, AUTO(3), 4096, 3, 1},      /* 3, 3, 2 */
    {1, 4, AUTO(0), 2048, 1, 1},      /* one block: context cannot be cut */
    {1, 4, AUTO(0), 8192, 1, 4},      /* heads cannot */
    {2, 8, AUTO(0), 65536, 2, 4},     /* both */
    {8, 128, AUTO(0), 1000000, 8, 8}, /* at most 64 ranks */
    /* no hint: one rank while short, the context moves on */
    {8, 1, AUTO(0), 0, 1, 1},
    {8, 3, AUTO(0), 0, 1, 3},
    {8, 3, AUTO(2), 0, 1, 2},
    /* HEADS */
    {8, 1, HEADS(0), 0, 1, 1},
    {8, 3, HEADS(0), 0, 3, 1},
    {8, 7, HEADS(0), 0, 4, 1},
    {8, 16, HEADS(0), 0, 8, 1},
    {3, 2, HEADS(0), 0, 2, 1},
    {1, 4, HEADS(0), 0, 1, 1},
    {2, 8, HEADS(0), 65536, 2, 4}, /* more ranks than heads: context parts help */
    {2, 8, HEADS(4), 65536, 2, 2},
    /* CONTEXT */
    {8, 1, CONTEXT(0), 0, 1, 1},
    {8, 7, CONTEXT(0), 0, 1, 7},
    {8, 7, CONTEXT(4), 100, 1, 4},
    {8, 100, CONTEXT(0), 0, 1, 64},
};

static void test_shapes(void **state)
{
    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_shapes); i++) {
        const shape_case_t *c = &k_shapes[i];
        fv_model_spec_t spec = make_spec(c->n_kv_heads * 4, c->n_kv_heads, 4);
        fv_planner_t *planner = make_planner(c->n_ranks, 1ULL << 40);
        fv_placement_t p = place(planner, &spec, c->sharding, c->hint, NULL);

        if ((p.n_head_parts != c->n_head_parts) || (p.n_ctx_parts != c->n_ctx_parts)) {
            fail_msg("case %zu: %d x %d, expected %d x %d", i, p.n_head_parts, p.n_ctx_parts,
                     c->n_head_parts, c->n_ctx_parts);
        }
        assert_int_equal(p.shard_tokens, 2048);
        fv_planner_destroy(planner);
    }
}

/* A gain below 5 % is not worth a rank. */
static void test_fewer_ranks_when_close(void **state)
{
    fv_model_spec_t spec = make_spec(8, 2, 1);
    fv_plan_cost_t cost = k_cost;
    fv_planner_t *planner = NULL;
    (void)state;

    /* one rank: 1000 * 2 * 512 / 1000 = 1024 us; two: 512 + fanout */
    cost.fanout_us = 470.0; /* 982: 4.3 % better */
    assert_int_equal(fv_planner_create(2, &cost, &planner), FV_OK);
    fv_planner_set_rank(planner, 0, 1ULL << 40);
    fv_planner_set_rank(planner, 1, 1ULL << 40);
    assert_int_equal(place(planner, &spec, (fv_sharding_t){0}, 1000, NULL).n_head_parts, 1);
    fv_planner_destroy(planner);

    cost.fanout_us = 460.0; /* 972: 5.3 % better */
    assert_int_equal(fv_planner_create(2, &cost, &planner), FV_OK);
    fv_planner_set_rank(planner, 0, 1ULL << 40);
    fv_planner_set_rank(planner, 1, 1ULL << 40);
    assert_int_equal(place(planner, &spec, (fv_sharding_t){0}, 1000, NULL).n_head_parts, 2);
    fv_planner_destroy(planner);
}

static void test_shard_tokens(void **state)
{
    fv_model_spec_t spec = make_spec(32, 8, 4);
    fv_planner_t *planner = make_planner(2, 1ULL << 40);
    fv_sharding_t sharding = {.mode = FV_SHARDING_CONTEXT, .shard_tokens = 192};
    (void)state;

    assert_int_equal(place(planner, &spec, sharding, 0, NULL).shard_tokens, 192);
    fv_planner_destroy(planner);
}

/* ------------------------------------------------------------------ ranks */

static void test_least_loaded_first(void **state)
{
    fv_model_spec_t spec = make_spec(32, 8, 4);
    fv_planner_t *planner = make_planner(4, 1000000000);
    fv_placement_t p;
    (void)state;

    fv_planner_account(planner, 0, 400000000);
    fv_planner_account(planner, 1, 100000000);
    fv_planner_account(planner, 2, 300000000);
    fv_planner_account(planner, 3, 200000000);
    p = place(planner, &spec, (fv_sharding_t)CONTEXT(0), 0, NULL);
    assert_int_equal(p.ranks[0], 1);
    assert_int_equal(p.ranks[1], 3);
    assert_int_equal(p.ranks[2], 2);
    assert_int_equal(p.ranks[3], 0);
    /* as a share of what a rank has: 400 MB of 4 GB is the least */
    fv_planner_set_rank(planner, 0, 4000000001);
    assert_int_equal(place(planner, &spec, (fv_sharding_t)CONTEXT(1), 0, NULL).ranks[0], 0);
    fv_planner_account(planner, 0, -300000000);
    assert_int_equal(fv_planner_used(planner, 0), 100000000);
    fv_planner_account(planner, 0, -300000000); /* never below nothing */
    assert_int_equal(fv_planner_used(planner, 0), 0);
    fv_planner_destroy(planner);
}

/* The first blocks of all head parts, which every session fills, are on the least loaded ranks. */
static void test_first_blocks(void **state)
{
    fv_model_spec_t spec = make_spec(8, 2, 4);
    fv_planner_t *planner = make_planner(4, 1ULL << 40);
    fv_placement_t p;
    (void)state;

    for (uint32_t i = 0; i < 4; i++) {
        fv_planner_account(planner, i, 1000 * (4 - (int64_t)i));
    }
    p = place(planner, &spec, (fv_sharding_t)AUTO(0), 65536, NULL);
    assert_int_equal(p.n_head_parts, 2);
    assert_int_equal(p.n_ctx_parts, 2);
    assert_int_equal(p.ranks[0], 3); /* head part 0, blocks 0, 2, 4 ... */
    assert_int_equal(p.ranks[2], 2); /* head part 1, the same */
    assert_int_equal(p.ranks[1], 1);
    assert_int_equal(p.ranks[3], 0);
    fv_planner_destroy(planner);
}

/* Equally loaded ranks take turns at beginning, whether or not a session takes them all. */
static void test_turns(void **state)
{
    fv_model_spec_t spec = make_spec(32, 8, 4);
    (void)state;

    for (int32_t width = 1; width <= 3; width++) {
        fv_planner_t *planner = make_planner(3, 1ULL << 40);
        for (int32_t i = 0; i < 7; i++) {
            fv_placement_t p = place(planner, &spec, (fv_sharding_t)CONTEXT(width), 0, NULL);
            assert_int_equal(p.ranks[0], i % 3);
        }
        fv_planner_destroy(planner);
    }
}

static void test_unusable_ranks(void **state)
{
    fv_model_spec_t spec = make_spec(32, 8, 4);
    fv_planner_t *planner = make_planner(3, 1ULL << 40);
    fv_sharding_t sharding = CONTEXT(0);
    fv_placement_t p = {0};
    char reason[FV_PLAN_REASON_BYTES];
    (void)state;

    fv_planner_set_rank(planner, 0, 0); /* a dedicated coordinator */
    p = place(planner, &spec, sharding, 0, NULL);
    assert_int_equal(p.n_ctx_parts, 2);
    assert_int_equal(fv_placement_cell(&p, 0), -1);
    fv_planner_account(planner, 0, 5); /* late news of a lost rank does not bring it back */
    assert_int_equal(place(planner, &spec, sharding, 0, NULL).n_ctx_parts, 2);
    fv_planner_set_rank(planner, 1, 0);
    fv_planner_set_rank(planner, 2, 0);
    fv_planner_set_rank(planner, 2, 0); /* twice is fine */
    assert_int_equal(fv_planner_place(planner, &spec, &sharding, 2048, 0, &p, reason),
                     FV_ERR_EXHAUSTED);
    assert_non_null(strstr(fv_error_context(), "0 of 3"));
    fv_planner_set_rank(planner, 1, 1 << 20);
    assert_int_equal(place(planner, &spec, sharding, 0, NULL).ranks[0], 1);
    fv_planner_destroy(planner);
}

/* ------------------------------------------------------------------ memory */

/* 1 layer, 8 heads: a token is 4 KiB. 10,000 tokens are 39 MiB, 157 pages of a head. */
static void test_spread_for_memory(void **state)
{
    fv_model_spec_t spec = make_spec(32, 8, 1);
    fv_plan_cost_t slow = k_cost;
    fv_planner_t *planner = NULL;
    fv_placement_t p;
    char reason[FV_PLAN_REASON_BYTES];
    (void)state;

    slow.fanout_us = 1e9; /* time alone would never spread */
    assert_int_equal(fv_planner_create(6, &slow, &planner), FV_OK);
    for (uint32_t i = 0; i < 6; i++) {
        fv_planner_set_rank(planner, i, (uint64_t)((i < 4) ? (25 * MIB) : (4 * MIB)));
    }
    p = place(planner, &spec, (fv_sharding_t)AUTO(0), 5000, reason);
    assert_int_equal(p.n_head_parts * p.n_ctx_parts, 1);
    assert_null(strstr(reason, "memory"));
    p = place(planner, &spec, (fv_sharding_t)AUTO(0), 10000, reason);
    assert_int_equal(p.n_head_parts, 2);
    assert_int_equal(p.n_ctx_parts, 1);
    assert_non_null(strstr(reason, "memory decided: 20 MiB a rank needed, 25 MiB free"));
    for (int32_t i = 0; i < 2; i++) {
        assert_true(p.ranks[i] < 4);
        fv_planner_account(planner, p.ranks[i], (int64_t)(20 * MIB));
    }
    /* the small ranks are the least loaded now and have no room: the next two big ones are taken */
    p = place(planner, &spec, (fv_sharding_t)AUTO(0), 10000, reason);
    assert_true((p.ranks[0] < 4) && (p.ranks[1] < 4));
    assert_int_equal(fv_planner_used(planner, p.ranks[0]), 0);
    assert_int_equal(fv_planner_used(planner, p.ranks[1]), 0);
    /* nothing has room: a hint reserves nothing, so the session still opens */
    p = place(planner, &spec, (fv_sharding_t)AUTO(0), 1000000, reason);
    assert_int_equal(p.n_head_parts * p.n_ctx_parts, 1);
    assert_non_null(strstr(reason, "memory is short: 3906 MiB a rank needed, 25 MiB free"));
    fv_planner_destroy(planner);
}

/* ------------------------------------------------------------------ words */

static void test_reasons(void **state)
{
    fv_model_spec_t spec = make_spec(32, 8, 4);
    fv_planner_t *planner = make_planner(3, 1ULL << 40);
    char reason[FV_PLAN_REASON_BYTES];
    (void)state;

    (void)place(planner, &spec, (fv_sharding_t)AUTO(2), 1000, reason);
    assert_string_equal(reason, "heads: 8 KV heads over 2 ranks, predicted 2058 us a token at 1000 "
                                "tokens against 4096 us on one");
    (void)place(planner, &spec, (fv_sharding_t)AUTO(1), 1000, reason);
    assert_string_equal(reason, "one rank: predicted 4096 us a token at 1000 tokens, no other rank "
                                "may be used");
    (void)place(planner, &spec, (fv_sharding_t)AUTO(0), 2, reason);
    assert_string_equal(reason, "one rank: predicted 8 us a token at 2 tokens");
    (void)place(planner, &spec, (fv_sharding_t)AUTO(0), 0, reason);
    assert_string_equal(reason, "context: blocks of 2048 tokens over 3 ranks, no length hint, "
                                "begins on rank 1 and reaches the next each 2048 tokens");
    (void)place(planner, &spec, (fv_sharding_t)HEADS(0), 0, reason);
    assert_string_equal(reason, "heads (as asked): 8 KV heads over 3 ranks, no length hint, begins "
                                "on rank 2");
    fv_planner_destroy(planner);

    spec = make_spec(8, 2, 4);
    planner = make_planner(8, 1ULL << 40);
    (void)place(planner, &spec, (fv_sharding_t)AUTO(0), 65536, reason);
    assert_string_equal(reason, "heads x context: 2 KV heads over 2 ranks x blocks of 2048 tokens "
                                "over 4 ranks, predicted 8482 us a token at 65536 tokens against "
                                "67109 us on one");
    (void)place(planner, &spec, (fv_sharding_t)AUTO(0), UINT64_MAX, reason);
    assert_true(strlen(reason) < FV_PLAN_REASON_BYTES);
    fv_planner_destroy(planner);
}

/* ------------------------------------------------------------------ refusals */

static void refuse(fv_planner_t *planner,
                   fv_sharding_t sharding,
                   uint32_t default_shard_tokens,
                   fv_status_t status,
                   const char *text)
{
    fv_model_spec_t spec = make_spec(32, 8, 4);
    fv_placement_t p = {.n_head_parts = 77};
    char reason[FV_PLAN_REASON_BYTES] = "untouched";

    assert_int_equal(
        fv_planner_place(planner, &spec, &sharding, default_shard_tokens, 0, &p, reason), status);
    assert_non_null(strstr(fv_error_context(), text));
    assert_int_equal(p.n_head_parts, 77);
    assert_string_equal(reason, "untouched");
}

static fv_model_spec_t mla_spec(int32_t n_layers)
{
    return (fv_model_spec_t){.name = "mla",
                             .n_layers = n_layers,
                             .n_q_heads = 128,
                             .kind = FV_MODEL_LATENT,
                             .latent_dim = 512,
                             .rope_dim = 64,
                             .kv_dtype = FV_DTYPE_BF16,
                             .softmax_scale = 0.1F,
                             .n_policies = 1};
}

/* One latent for all heads: context by itself; heads and slices only when asked for. */
static void test_latent_models(void **state)
{
    fv_planner_t *planner = make_planner(5, 1ULL << 40);
    fv_model_spec_t spec = mla_spec(2);
    fv_model_spec_t sliced = spec;
    fv_placement_t p;
    char reason[FV_PLAN_REASON_BYTES];

    (void)state;
    sliced.sharding = (fv_sharding_t){.mode = FV_SHARDING_LATENT, .groups = 2};
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    assert_int_equal(fv_model_spec_check(&sliced), FV_OK);
    p = place(planner, &spec, (fv_sharding_t){0}, 1U << 20, reason);
    assert_true((p.n_head_parts == 1) && (p.n_ctx_parts == 5));
    assert_non_null(strstr(reason, "context: blocks of 2048 tokens over 5 ranks"));
    p = place(planner, &spec, (fv_sharding_t){.mode = FV_SHARDING_HEADS, .max_ranks = 3}, 100,
              reason);
    assert_true((p.n_head_parts == 3) && (p.n_ctx_parts == 1));
    assert_non_null(strstr(reason, "128 query heads over 3 ranks, the latent on each"));
    p = place(planner, &sliced, sliced.sharding, 100, reason);
    assert_true((p.n_head_parts == 2) && (p.n_ctx_parts == 1));
    assert_non_null(strstr(reason, "latent (as asked): 2 slices of 256 dims, an approximation"));
    assert_null(strstr(reason, "on one"));
    sliced.sharding.max_ranks = 5; /* two for each slice; the fifth would be idle */
    p = place(planner, &sliced, sliced.sharding, 0, reason);
    assert_true((p.n_head_parts == 4) && (p.n_ctx_parts == 1));
    assert_non_null(strstr(reason, "128 query heads over 2 ranks"));
    sliced.sharding = (fv_sharding_t){.mode = FV_SHARDING_LATENT, .groups = 8};
    assert_int_equal(fv_planner_place(planner, &sliced, &sliced.sharding, 2048, 0, &p, reason),
                     FV_ERR_PRECONDITION);
    assert_non_null(strstr(fv_error_context(), "sharding.groups: 8 given, expected at most 5"));
    fv_planner_destroy(planner);
}

/* A long session's slices are cut by context as well, where ranks merge such parts; heads only where no more are left. */
static void test_latent_context(void **state)
{
    fv_planner_t *planner = make_planner(8, 1ULL << 40);
    fv_plan_cost_t cost = k_cost;
    fv_model_spec_t sliced = mla_spec(2);
    fv_placement_t p;
    char reason[FV_PLAN_REASON_BYTES];

    (void)state;
    sliced.sharding = (fv_sharding_t){.mode = FV_SHARDING_LATENT, .groups = 2, .exact = 1};
    assert_int_equal(fv_model_spec_check(&sliced), FV_OK);
    p = place(planner, &sliced, sliced.sharding, 1U << 20, reason);
    assert_true((p.n_head_parts == 2) && (p.n_ctx_parts == 4));
    assert_non_null(strstr(reason, "latent x context (as asked): 2 slices of 256 dims, their "
                                   "scores added up; blocks of 2048 tokens over 4 ranks"));
    p = place(planner, &sliced, sliced.sharding, 0, reason);
    assert_true((p.n_head_parts == 2) && (p.n_ctx_parts == 1)); /* its length is not known */
    sliced.sharding.max_ranks = 4;
    p = place(planner, &sliced, sliced.sharding, 1U << 20, reason);
    assert_true((p.n_head_parts == 2) && (p.n_ctx_parts == 2));
    p = place(planner, &sliced, sliced.sharding, 100, reason);
    assert_true((p.n_head_parts == 4) && (p.n_ctx_parts == 1));
    fv_planner_destroy(planner);
    cost.no_latent_context = true;
    assert_int_equal(fv_planner_create(4, &cost, &planner), FV_OK);
    for (uint32_t i = 0; i < 4U; i++) {
        fv_planner_set_rank(planner, i, 1ULL << 40);
    }
    p = place(planner, &sliced, sliced.sharding, 1U << 20, reason);
    assert_true((p.n_head_parts == 4) && (p.n_ctx_parts == 1));
    fv_planner_destroy(planner);
}

/* With many heads arithmetic is what takes the time: it spreads where the bytes alone would not. */
static void test_latent_arithmetic_counts(void **state)
{
    fv_plan_cost_t cost = k_cost;
    fv_model_spec_t spec = mla_spec(1);
    fv_placement_t one = {.n_head_parts = 1, .n_ctx_parts = 1, .shard_tokens = 2048};
    fv_placement_t heads = {.n_head_parts = 4, .n_ctx_parts = 1, .shard_tokens = 2048};

    (void)state;
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    assert_true(fabs(fv_plan_token_us(&cost, &spec, &one, 1000) - 1152.0) < 1e-6);
    cost.rank_macs_per_us = 100000.0; /* 128 heads x 1088 x 1000 tokens */
    assert_true(fabs(fv_plan_token_us(&cost, &spec, &one, 1000) - 1392.64) < 1e-6);
    assert_true(fabs(fv_plan_token_us(&cost, &spec, &heads, 1000) - 1182.0) <
                1e-6); /* bytes again */
}

static void test_bad_sharding(void **state)
{
    fv_planner_t *planner = make_planner(3, 1ULL << 40);
    (void)state;

    refuse(planner, (fv_sharding_t){.mode = 9}, 2048, FV_ERR_INVALID_ARG, "sharding.mode: 9");
    refuse(planner, (fv_sharding_t){.mode = -1}, 2048, FV_ERR_INVALID_ARG, "sharding.mode: -1");
    refuse(planner, (fv_sharding_t){.mode = FV_SHARDING_LATENT}, 2048, FV_ERR_INVALID_ARG,
           "sharding.mode: LATENT");
    refuse(planner, (fv_sharding_t){.shard_tokens = 100}, 2048, FV_ERR_INVALID_ARG,
           "sharding.shard_tokens: 100 given, expected 0 or a positive multiple of 64");
    refuse(planner, (fv_sharding_t){.shard_tokens = -64}, 2048, FV_ERR_INVALID_ARG,
           "sharding.shard_tokens: -64");
    refuse(planner, (fv_sharding_t){.max_ranks = -1}, 2048, FV_ERR_INVALID_ARG,
           "sharding.max_ranks: -1");
    refuse(planner, (fv_sharding_t){0}, 0, FV_ERR_INVALID_ARG, "shard_tokens: 0");
    refuse(planner, (fv_sharding_t){0}, 65, FV_ERR_INVALID_ARG, "shard_tokens: 65");
    fv_planner_destroy(planner);
}

static void test_bad_planner(void **state)
{
    fv_planner_t *planner = NULL;
    fv_plan_cost_t cost = k_cost;
    fv_plan_cost_t cpu = fv_plan_cost_cpu();
    (void)state;

    assert_int_equal(fv_planner_create(0, &k_cost, &planner), FV_ERR_INVALID_ARG);
    assert_int_equal(fv_planner_create(70000, &k_cost, &planner), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "70000"));
    cost.rank_bytes_per_us = 0.0;
    assert_int_equal(fv_planner_create(1, &cost, &planner), FV_ERR_INVALID_ARG);
    cost = k_cost;
    cost.fanout_us = -1.0;
    assert_int_equal(fv_planner_create(1, &cost, &planner), FV_ERR_INVALID_ARG);
    assert_null(planner);
    assert_int_equal(fv_planner_create(1, &cpu, &planner), FV_OK);
    fv_planner_destroy(planner);
    fv_planner_destroy(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_token_us),
        cmocka_unit_test(test_token_us_window),
        cmocka_unit_test(test_growth_bytes),
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_fewer_ranks_when_close),
        cmocka_unit_test(test_shard_tokens),
        cmocka_unit_test(test_least_loaded_first),
        cmocka_unit_test(test_first_blocks),
        cmocka_unit_test(test_turns),
        cmocka_unit_test(test_unusable_ranks),
        cmocka_unit_test(test_spread_for_memory),
        cmocka_unit_test(test_reasons),
        cmocka_unit_test(test_latent_models),
        cmocka_unit_test(test_latent_context),
        cmocka_unit_test(test_latent_arithmetic_counts),
        cmocka_unit_test(test_bad_sharding),
        cmocka_unit_test(test_bad_planner),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
