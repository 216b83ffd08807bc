/*
 * prop_plan_s2.c - the planner and S2: kept tiles, not tokens, are what is predicted and dealt out evenly.
 *
 * Goal:   goldens of time and memory; for random patterns every context part of a placement keeps the same tiles, but for
 *         the turn under way and the local blocks, which lie where the context ends.
 * Method: tiles are counted page by page from the definition (common/policy.h).
 */
#include "common/policy.h"
#include "coord/plan.h"
#include "coord/plan_grid.h"
#include "tests/support/random.h"
#include "tests/support/test.h"

#include <math.h>
#include <string.h>

#define N_ROUNDS  300
#define PARTS_MAX 8
#define GIB       ((uint64_t)1 << 30)

/* 1 rank reads 1000 bytes/us; a further rank and an exchange cost so much that only memory spreads a session. */
static const fv_plan_cost_t k_cost = {.rank_bytes_per_us = 1000.0,
                                      .fanout_us = 1e9,
                                      .exchange_us = 1e9,
                                      .exchange_bytes_per_us = 500.0};

/* 32 over 8 heads, d = 128, bf16: 512 bytes a token and KV head. All layers have the policy. */
static fv_model_spec_t model(const fv_policy_t *policy)
{
    fv_model_spec_t spec = {.name = "s2",
                            .n_layers = 2,
                            .n_q_heads = 32,
                            .n_kv_heads = 8,
                            .head_dim_qk = 128,
                            .kv_dtype = FV_DTYPE_BF16,
                            .n_policies = 2};

    spec.policies[1] = *policy;
    spec.layer_policy[0] = spec.layer_policy[1] = 1;
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    return spec;
}

static fv_policy_t s2_16(void)
{
    return (fv_policy_t){
        .kind = FV_POLICY_S2, .block_tokens = 64, .local_blocks = 8, .vert_stride = 16};
}

static void assert_us(double given, double expected)
{
    if (fabs(given - expected) > 1e-6 * expected) {
        fail_msg("%.9g us, expected %.9g", given, expected);
    }
}

static void test_token_us(void **state)
{
    fv_policy_t policy = s2_16();
    fv_model_spec_t spec = model(&policy);
    fv_placement_t one = {.n_head_parts = 1, .n_ctx_parts = 1, .shard_tokens = 2048};
    fv_placement_t eight = {.n_head_parts = 8, .n_ctx_parts = 1, .shard_tokens = 2048};
    double sparse = 512.0 + (131072.0 - 512.0) / 16.0; /* tokens of a head */

    (void)state;
    assert_us(fv_plan_token_us(&k_cost, &spec, &one, 131072), 8.0 * sparse * 0.512);
    assert_us(fv_plan_token_us(&k_cost, &spec, &one, 400), 8.0 * 400.0 * 0.512);
    policy.num_dense_heads = 2;
    spec = model(&policy);
    assert_us(fv_plan_token_us(&k_cost, &spec, &one, 131072),
              (6.0 * sparse + 2.0 * 131072.0) * 0.512);
    /* by heads, the rank with a dense head is what the others wait for */
    assert_us(fv_plan_token_us(&k_cost, &spec, &eight, 131072), 131072.0 * 0.512 + 7e9);
    policy = s2_16();
    policy.pattern_per = FV_PATTERN_Q_HEAD; /* four patterns a KV head */
    spec = model(&policy);
    assert_us(fv_plan_token_us(&k_cost, &spec, &one, 131072),
              8.0 * (512.0 + (131072.0 - 512.0) / 4.0) * 0.512);
    policy = s2_16();
    policy.block_tokens = 16; /* each keeps its page */
    spec = model(&policy);
    assert_us(fv_plan_token_us(&k_cost, &spec, &one, 131072),
              8.0 * (128.0 + (131072.0 - 128.0) / 4.0) * 0.512);
}

/* A million tokens of two layers are 8 GiB dense and 0.5 GiB with every 16th block. */
static void test_memory(void **state)
{
    fv_policy_t policy = s2_16();
    fv_policy_t dense = {.kind = FV_POLICY_DENSE};
    fv_model_spec_t sparse_spec = model(&policy);
    fv_model_spec_t dense_spec = model(&dense);
    fv_sharding_t sharding = {.mode = FV_SHARDING_AUTO};
    char reason[FV_PLAN_REASON_BYTES];
    fv_planner_t *planner = NULL;
    fv_placement_t p;

    (void)state;
    assert_int_equal(fv_planner_create(8, &k_cost, &planner), FV_OK);
    for (uint32_t r = 0; r < 8U; r++) {
        fv_planner_set_rank(planner, r, GIB);
    }
    assert_int_equal(fv_planner_place(planner, &sparse_spec, &sharding, 2048, 1000000, &p, reason),
                     FV_OK);
    assert_int_equal(p.n_head_parts * p.n_ctx_parts, 1);
    assert_int_equal(fv_planner_place(planner, &dense_spec, &sharding, 2048, 1000000, &p, reason),
                     FV_OK);
    assert_int_equal(p.n_head_parts * p.n_ctx_parts, 8);
    fv_planner_destroy(planner);
}

static void test_shard_tokens(void **state)
{
    static const int32_t k_rows[][3] = {/* block, stride, tokens of a turn */
                                        {64, 16, 2048},  {64, 64, 4096}, {64, 3, 2112},
                                        {128, 24, 3072}, {16, 5, 2240},  {256, 65536, 2048}};
    fv_sharding_t sharding = {.mode = FV_SHARDING_CONTEXT};
    char reason[FV_PLAN_REASON_BYTES];
    fv_planner_t *planner = NULL;
    fv_placement_t p;

    (void)state;
    assert_int_equal(fv_planner_create(4, &k_cost, &planner), FV_OK);
    for (uint32_t r = 0; r < 4U; r++) {
        fv_planner_set_rank(planner, r, 64U * GIB);
    }
    for (size_t i = 0; i < FV_COUNT(k_rows); i++) {
        fv_policy_t policy = s2_16();

        policy.block_tokens = k_rows[i][0];
        policy.vert_stride = k_rows[i][1];
        fv_model_spec_t spec = model(&policy);
        sharding.shard_tokens = 0;
        assert_int_equal(fv_planner_place(planner, &spec, &sharding, 2048, 0, &p, reason), FV_OK);
        assert_int_equal(p.shard_tokens, k_rows[i][2]);
        sharding.shard_tokens = 640; /* as asked */
        assert_int_equal(fv_planner_place(planner, &spec, &sharding, 2048, 0, &p, reason), FV_OK);
        assert_int_equal(p.shard_tokens, 640);
    }
    fv_planner_destroy(planner);
}

/* Tiles that head `h` reads at the end of n_tokens, by context part. */
static void count_tiles(const fv_policy_t *p,
                        const fv_placement_t *placement,
                        int32_t h,
                        int64_t n_tokens,
                        int64_t *out)
{
    for (int64_t page = 0; page * FV_PAGE_TOKENS < n_tokens; page++) {
        if ((page >= fv_policy_dead_pages(p, n_tokens - 1)) || fv_policy_keeps(p, h, 1, page)) {
            out[fv_placement_part_of(placement, (uint64_t)page * FV_PAGE_TOKENS)]++;
        }
    }
}

static int64_t spread(const int64_t *counts, int32_t n)
{
    int64_t least = counts[0];
    int64_t most = counts[0];

    for (int32_t i = 1; i < n; i++) {
        least = (counts[i] < least) ? counts[i] : least;
        most = (counts[i] > most) ? counts[i] : most;
    }
    return most - least;
}

static void test_parts_keep_alike(void **state)
{
    fv_random_t r = {.state = fv_random_seed(5)};

    (void)state;
    for (int round = 0; round < N_ROUNDS; round++) {
        fv_policy_t policy = {.kind = FV_POLICY_S2,
                              .block_tokens = 16 << fv_random_int(&r, 0, 4),
                              .local_blocks = (int32_t)fv_random_int(&r, 1, 6),
                              .vert_stride = (int32_t)fv_random_int(&r, 1, 80),
                              .head_sliding_offset = (int32_t)fv_random_int(&r, -9, 9)};
        fv_model_spec_t spec = model(&policy);
        fv_placement_t p = {.n_head_parts = 1,
                            .n_ctx_parts = (uint16_t)fv_random_int(&r, 2, PARTS_MAX),
                            .shard_tokens = fv_plan_align_shard(&spec, 2048)};
        int64_t n_tokens = fv_random_int(&r, 1, 300000);
        int64_t local = (int64_t)policy.local_blocks * policy.block_tokens / FV_PAGE_TOKENS + 2;

        for (int32_t h = 0; h < spec.n_kv_heads; h++) {
            fv_strides_t strides = fv_s2_strides(&spec.policies[1], h);
            int64_t turn = (int64_t)(p.shard_tokens / FV_PAGE_TOKENS);
            int64_t counts[PARTS_MAX] = {0};
            int64_t a_turn = fv_strides_fill_pages(&strides)
                                 ? turn
                                 : fv_strides_count(&strides, turn * strides.per_page);

            count_tiles(&spec.policies[1], &p, h, n_tokens, counts);
            assert_true(spread(counts, p.n_ctx_parts) <= a_turn + local);
        }
    }
}

/* Without alignment a head's strided blocks may all lie on one part: the law above is worth something. */
static void test_unaligned_is_uneven(void **state)
{
    fv_policy_t policy = s2_16();
    fv_placement_t p = {.n_head_parts = 1, .n_ctx_parts = 2, .shard_tokens = 2048};
    int64_t counts[PARTS_MAX] = {0};

    (void)state;
    policy.vert_stride = 64;
    fv_model_spec_t spec = model(&policy);
    count_tiles(&spec.policies[1], &p, 0, 1 << 20, counts);
    assert_true(spread(counts, 2) > 200);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_token_us),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_shard_tokens),
        cmocka_unit_test(test_parts_keep_alike),
        cmocka_unit_test(test_unaligned_is_uneven),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
