/*
 * test_latent.c - LATENT models: what is resolved and refused, and what a placement gives each rank.
 */
#include "common/model.h"
#include "proto/step.h"
#include "tests/support/test.h"

#include <math.h>
#include <string.h>

/* DeepSeek's: 128 heads over a latent of 512 and a RoPE key of 64. */
static fv_model_spec_t mla_spec(void)
{
    return (fv_model_spec_t){.name = "mla",
                             .n_layers = 2,
                             .n_q_heads = 128,
                             .kind = FV_MODEL_LATENT,
                             .latent_dim = 512,
                             .rope_dim = 64,
                             .kv_dtype = FV_DTYPE_BF16,
                             .softmax_scale = 0.13523F,
                             .n_policies = 1};
}

static fv_model_spec_t tpla_spec(int32_t groups)
{
    fv_model_spec_t spec = mla_spec();

    spec.sharding.mode = FV_SHARDING_LATENT;
    spec.sharding.groups = groups;
    return spec;
}

static void test_what_is_left_out_is_resolved(void **state)
{
    fv_model_spec_t spec = mla_spec();
    fv_model_spec_t same = mla_spec();

    (void)state;
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    assert_int_equal(spec.n_kv_heads, 1);
    assert_int_equal(spec.head_dim_qk, 576);
    assert_int_equal(spec.head_dim_v, 512);
    assert_true(spec.softmax_scale == 0.13523F);
    assert_int_equal(fv_model_token_bytes(&spec), 1152); /* V is not stored again */
    assert_int_equal(fv_model_page_bytes(&spec), 64 * 1152);
    same.n_kv_heads = 1;
    same.head_dim_qk = 576;
    same.head_dim_v = 512;
    assert_int_equal(fv_model_spec_check(&same), FV_OK);
    assert_true(fv_model_spec_equal(&spec, &same));
    assert_int_equal(fv_model_spec_check(&spec), FV_OK); /* again, as every worker does */
    assert_true(fv_model_spec_equal(&spec, &same));
}

/* M9: 512 e4m3, 4 scales, 64 bf16; of two slices 256 and 2; pages in whole units. */
static void test_fp8_cache_sizes(void **state)
{
    fv_model_spec_t spec = mla_spec();

    (void)state;
    spec.kv_dtype = FV_DTYPE_FP8_LATENT;
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    assert_int_equal(fv_model_token_bytes(&spec), 656);
    assert_int_equal(fv_model_page_bytes(&spec), 64 * 656);
    spec = tpla_spec(2);
    spec.kv_dtype = FV_DTYPE_FP8_LATENT;
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    assert_int_equal(fv_model_token_bytes(&spec), 256 + 8 + 128);
    assert_int_equal(fv_model_page_bytes(&spec), 25 * 1024);
}

/* T5: the cache of a rank. */
static void test_cache_sizes(void **state)
{
    static const int32_t k_dims[][2] = {{1, 576}, {2, 320}, {4, 192}, {8, 128}};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_dims); i++) {
        fv_model_spec_t spec = tpla_spec(k_dims[i][0]);

        assert_int_equal(fv_model_spec_check(&spec), FV_OK);
        assert_int_equal(fv_model_stored_dim_qk(&spec), k_dims[i][1]);
        assert_int_equal(fv_model_token_bytes(&spec), 2 * k_dims[i][1]);
        assert_int_equal(spec.sharding.n_mu, k_dims[i][0]);
        assert_true(spec.sharding.mu[k_dims[i][0] - 1] == 1.0F);
    }
}

typedef struct bad_case {
    const char *text;
    void (*spoil)(fv_model_spec_t *spec);
} bad_case_t;

#define SPOIL(function, statement)              \
    static void function(fv_model_spec_t *spec) \
    {                                           \
        statement;                              \
    }
#define NORM(a, b)                                                    \
    (fv_latent_norm_t)                                                \
    {                                                                 \
        .mode = FV_NORM_SLICE_RMS, .n_alpha = 2, .alpha = {(a), (b)}, \
    }
SPOIL(odd_latent, spec->latent_dim = 96)
SPOIL(no_latent, spec->latent_dim = 0)
SPOIL(big_latent, spec->latent_dim = 1088)
SPOIL(negative_latent, spec->latent_dim = INT32_MIN)
SPOIL(odd_rope, spec->rope_dim = 12)
SPOIL(big_rope, spec->rope_dim = 136)
SPOIL(no_scale, spec->softmax_scale = 0.0F)
SPOIL(nan_scale, spec->softmax_scale = NAN)
SPOIL(kv_heads, spec->n_kv_heads = 8)
SPOIL(dim_qk, spec->head_dim_qk = 192)
SPOIL(dim_v, spec->head_dim_v = 128)
SPOIL(many_heads, spec->n_q_heads = 129)
SPOIL(s2_heads,
      (spec->policies[0] = (fv_policy_t){.kind = FV_POLICY_S2,
                                         .block_tokens = 64,
                                         .local_blocks = 1,
                                         .vert_stride = 8,
                                         .pattern_per = FV_PATTERN_Q_HEAD}))
SPOIL(three_groups, spec->sharding.groups = 3)
SPOIL(no_groups, spec->sharding.groups = 0)
SPOIL(thin_slices, (spec->latent_dim = 64, spec->sharding.groups = 4))
SPOIL(groups_elsewhere, spec->sharding.mode = FV_SHARDING_CONTEXT)
SPOIL(one_mu, (spec->sharding.n_mu = 1, spec->sharding.mu[0] = 1.0F))
SPOIL(zero_mu, (spec->sharding.n_mu = 2, spec->sharding.mu[0] = 1.0F))
SPOIL(idle_alpha, (spec->sharding.n_alpha = 2, spec->sharding.alpha[0] = 2.0F))
SPOIL(fp8_half_blocks,
      (spec->latent_dim = 448,
       spec->sharding = (fv_sharding_t){0},
       spec->kv_dtype = FV_DTYPE_FP8_LATENT))
SPOIL(fp8_slices, (spec->sharding.groups = 8, spec->kv_dtype = FV_DTYPE_FP8_LATENT))
SPOIL(unknown_dtype, spec->kv_dtype = 5)
SPOIL(exact_elsewhere,
      (spec->sharding.mode = FV_SHARDING_CONTEXT,
       spec->sharding.groups = 0,
       spec->sharding.exact = 1))
SPOIL(exact_twice, spec->sharding.exact = 2)
SPOIL(exact_mu,
      (spec->sharding.exact = 1,
       spec->sharding.n_mu = 2,
       spec->sharding.mu[0] = 1.0F,
       spec->sharding.mu[1] = 1.5F))
SPOIL(exact_norm, (spec->sharding.exact = 1, spec->latent_norm = NORM(2.0F, 2.0F)))
SPOIL(norm_mode, spec->latent_norm.mode = 2)
SPOIL(norm_eps, (spec->latent_norm = NORM(2.0F, 2.0F), spec->latent_norm.eps = -1.0F))
SPOIL(norm_alone, spec->latent_norm.mode = FV_NORM_SLICE_RMS)
SPOIL(norm_negative, spec->latent_norm = NORM(2.0F, -2.0F))
SPOIL(norm_shares, spec->latent_norm = NORM(0.9F, 0.1F))
SPOIL(norm_twice,
      (spec->latent_norm = NORM(2.0F, 2.0F),
       spec->sharding.n_alpha = 2,
       spec->sharding.alpha[0] = 4.0F,
       spec->sharding.alpha[1] = 4.0F / 3.0F))

static void test_each_bad_field_is_refused_by_name(void **state)
{
    static const bad_case_t k_cases[] = {
        {"latent_dim: given 96, expected a multiple of 64", odd_latent},
        {"latent_dim: given 0", no_latent},
        {"latent_dim: given 1088", big_latent},
        {"latent_dim: given -2147483648", negative_latent},
        {"rope_dim: given 12", odd_rope},
        {"rope_dim: given 136", big_rope},
        {"softmax_scale: given 0, expected the model's own", no_scale},
        {"softmax_scale: given", nan_scale},
        {"n_kv_heads: given 8, expected 0 or 1", kv_heads},
        {"head_dim_qk: given 192, expected 0 or 576", dim_qk},
        {"head_dim_v: given 128, expected 0 or 512", dim_v},
        {"n_q_heads: given 129", many_heads},
        {"pattern_per", s2_heads},
        {"groups: given 3, expected 1, 2, 4 or 8", three_groups},
        {"groups: given 0", no_groups},
        {"groups: given 4, expected slices of at least 32", thin_slices},
        {"groups, alpha, mu, exact: given 2, expected none", groups_elsewhere},
        {"mu: given 1, expected 2", one_mu},
        {"mu[1]: given 0", zero_mu},
        {"sharding.alpha: given 2, expected none", idle_alpha},
        {"kv_dtype: given FP8_LATENT with latent_dim 448 in 1 groups", fp8_half_blocks},
        {"kv_dtype: given FP8_LATENT with latent_dim 512 in 8 groups", fp8_slices},
        {"kv_dtype: given 5", unknown_dtype},
        {"groups, alpha, mu, exact: given 0, expected none", exact_elsewhere},
        {"exact: given 2, expected 0 or 1", exact_twice},
        {"mu[1]: given 1.5, expected 1 with sharding.exact", exact_mu},
        {"latent_norm.mode: given 1, expected NONE with sharding.exact", exact_norm},
        {"latent_norm.mode: given 2", norm_mode},
        {"latent_norm.eps: given -1", norm_eps},
        {"latent_norm.alpha: given 0, expected 2", norm_alone},
        {"latent_norm.alpha[1]: given -2", norm_negative},
        {"reciprocals that add up to 11.1111", norm_shares}, /* T8: the share itself */
        {"expected none, or the same as latent_norm.alpha", norm_twice},
    };

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_cases); i++) {
        fv_model_spec_t spec = tpla_spec(2);

        k_cases[i].spoil(&spec);
        assert_int_equal(fv_model_spec_check(&spec), FV_ERR_INVALID_ARG);
        if (strstr(fv_error_context(), k_cases[i].text) == NULL) {
            fail_msg("\"%s\" is not in \"%s\"", k_cases[i].text, fv_error_context());
        }
    }
}

static void test_alpha_is_the_reciprocal_share(void **state)
{
    fv_model_spec_t spec = tpla_spec(2);
    fv_model_spec_t other = tpla_spec(2);

    (void)state;
    spec.latent_norm = NORM(1.0F / 0.9F, 1.0F / 0.1F);
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    other.latent_norm.mode = FV_NORM_SLICE_RMS; /* given once, with the sharding */
    other.sharding.n_alpha = 2;
    other.sharding.alpha[0] = 1.0F / 0.9F;
    other.sharding.alpha[1] = 1.0F / 0.1F;
    assert_int_equal(fv_model_spec_check(&other), FV_OK);
    assert_true(fv_model_spec_equal(&spec, &other));
    spec = mla_spec();
    spec.latent_norm.mode = FV_NORM_SLICE_RMS; /* not sliced: plain RMS */
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    assert_true((spec.latent_norm.n_alpha == 1) && (spec.latent_norm.alpha[0] == 1.0F));
}

static void test_kv_models_have_no_latent(void **state)
{
    fv_model_spec_t spec = {.name = "kv",
                            .n_layers = 1,
                            .n_q_heads = 4,
                            .n_kv_heads = 1,
                            .head_dim_qk = 64,
                            .kv_dtype = FV_DTYPE_BF16,
                            .n_policies = 1};
    fv_model_spec_t with = spec;

    (void)state;
    with.rope_dim = 64;
    assert_int_equal(fv_model_spec_check(&with), FV_ERR_INVALID_ARG);
    with = spec;
    with.kv_dtype = FV_DTYPE_FP8_LATENT;
    assert_int_equal(fv_model_spec_check(&with), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "FP8_LATENT is for kind LATENT"));
    with = spec;
    with.sharding.mode = FV_SHARDING_LATENT;
    assert_int_equal(fv_model_spec_check(&with), FV_ERR_INVALID_ARG);
    with = spec;
    with.sharding.groups = 2;
    assert_int_equal(fv_model_spec_check(&with), FV_ERR_INVALID_ARG);
    with = spec;
    with.kind = 2;
    assert_int_equal(fv_model_spec_check(&with), FV_ERR_INVALID_ARG);
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
}

/* Every query head meets every dim of the latent on exactly one rank, and the RoPE key on all. */
static void check_parts(int32_t groups, int32_t n_per_slice)
{
    fv_model_spec_t spec = tpla_spec(groups);
    fv_placement_t p = {
        .n_head_parts = (uint16_t)(groups * n_per_slice), .n_ctx_parts = 1, .shard_tokens = 64};
    fv_ctl_item_t item = {.n_tokens = 2,
                          .kv_end = 2,
                          .dtype = FV_DTYPE_BF16,
                          .flags = FV_ITEM_APPEND | FV_ITEM_CAUSAL};
    static uint8_t seen[128][512];

    memset(seen, 0, sizeof(seen));
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    for (uint32_t r = 0; r < p.n_head_parts; r++) {
        p.ranks[r] = (uint16_t)r;
    }
    for (uint32_t r = 0; r < p.n_head_parts; r++) {
        fv_item_share_t s;

        assert_true(fv_item_share(&spec, &p, &item, r, &s));
        assert_int_equal(s.part.head_dim_qk, 512 / groups + 64);
        assert_int_equal(s.q_bytes, 2U * 2U * (size_t)s.n_q_heads * (512U / (size_t)groups + 64U));
        assert_int_equal(s.k_bytes, 2U * 2U * (512U / (size_t)groups + 64U));
        assert_int_equal(s.v_bytes, 0);
        assert_int_equal(s.out_bytes, 2U * 2U * (size_t)s.n_q_heads * (512U / (size_t)groups));
        for (int32_t h = s.part.q_head_begin; h < s.part.q_head_end; h++) {
            for (int32_t d = 0; d < s.part.head_dim_v; d++) {
                seen[h][s.part.latent_begin + d]++;
            }
        }
    }
    for (size_t i = 0; i < sizeof(seen); i++) {
        assert_int_equal(((const uint8_t *)seen)[i], 1);
    }
}

static void test_parts_cover_heads_and_latent_once(void **state)
{
    (void)state;
    check_parts(1, 1);
    check_parts(1, 3);
    check_parts(2, 1);
    check_parts(2, 2); /* T10: (k, g) */
    check_parts(2, 4);
    check_parts(4, 2);
    check_parts(8, 5);
}

/* A client asks for slice 1 alone: its ranks have rows; the others append, and without that have no share. */
static void test_one_slice_is_asked_for(void **state)
{
    fv_model_spec_t spec = tpla_spec(2);
    fv_placement_t p = {
        .n_head_parts = 4, .n_ctx_parts = 1, .shard_tokens = 64, .ranks = {0, 1, 2, 3}};
    fv_ctl_item_t item = {.kv_end = 3,
                          .n_tokens = 3,
                          .dtype = FV_DTYPE_BF16,
                          .flags = (uint16_t)(FV_ITEM_APPEND | (2U << FV_ITEM_SLICE_SHIFT))};
    fv_item_share_t s;

    (void)state;
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    assert_int_equal(fv_item_out_dim(&spec, &item), 256);
    for (uint32_t r = 0; r < 4U; r++) {
        assert_true(fv_item_share(&spec, &p, &item, r, &s));
        assert_true(s.is_answered == (r >= 2U));
        assert_int_equal(s.out_bytes, (r >= 2U) ? (3 * 64 * 256 * 2) : 0);
        assert_int_equal(s.q_bytes, (r >= 2U) ? (3 * 64 * 320 * 2) : 0);
        assert_int_equal(s.k_bytes, 3 * 320 * 2);
        assert_int_equal(fv_item_out_begin(&s.part, &item), 0);
    }
    item.flags = (uint16_t)(2U << FV_ITEM_SLICE_SHIFT);
    assert_false(fv_item_share(&spec, &p, &item, 0, &s));
    assert_true(fv_item_share(&spec, &p, &item, 2, &s));
    spec.sharding.exact = 1; /* the other slice's scores are needed */
    assert_true(fv_item_share(&spec, &p, &item, 0, &s));
    assert_false(s.is_answered);
    assert_int_equal(s.q_bytes, 3 * 64 * 320 * 2);
    assert_int_equal(s.out_bytes, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_what_is_left_out_is_resolved),
        cmocka_unit_test(test_cache_sizes),
        cmocka_unit_test(test_fp8_cache_sizes),
        cmocka_unit_test(test_each_bad_field_is_refused_by_name),
        cmocka_unit_test(test_alpha_is_the_reciprocal_share),
        cmocka_unit_test(test_one_slice_is_asked_for),
        cmocka_unit_test(test_kv_models_have_no_latent),
        cmocka_unit_test(test_parts_cover_heads_and_latent_once),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
