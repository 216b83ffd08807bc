/*
 * test_model.c - fv_model_spec_check: what is resolved, and that each bad field is refused by its name.
 */
#include "common/model.h"
#include "tests/support/test.h"

#include <math.h>
#include <string.h>

/* A good one: 32 query heads over 8 KV heads, a window in layer 1. */
static void good_spec(fv_model_spec_t *spec)
{
    memset(spec, 0, sizeof(*spec));
    (void)strcpy(spec->name, "test");
    spec->n_layers = 2;
    spec->n_q_heads = 32;
    spec->n_kv_heads = 8;
    spec->head_dim_qk = 64;
    spec->kv_dtype = FV_DTYPE_BF16;
    spec->n_policies = 2;
    spec->policies[1] =
        (fv_policy_t){.kind = FV_POLICY_WINDOW, .window_tokens = 128, .sink_tokens = 4};
    spec->layer_policy[1] = 1;
}

static void test_what_is_left_out_is_resolved(void **state)
{
    fv_model_spec_t spec;
    fv_model_spec_t other;

    (void)state;
    good_spec(&spec);
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    assert_int_equal(spec.head_dim_v, 64);
    assert_true(spec.softmax_scale == 0.125F);
    assert_int_equal(fv_model_group(&spec), 4);
    assert_int_equal(fv_model_token_bytes(&spec), 256);
    assert_int_equal(fv_model_page_bytes(&spec), 16384);
    good_spec(&other);
    other.head_dim_v = 64;
    other.softmax_scale = 0.125F;
    assert_int_equal(fv_model_spec_check(&other), FV_OK);
    assert_true(fv_model_spec_equal(&spec, &other));
    other.layer_policy[0] = 1;
    assert_false(fv_model_spec_equal(&spec, &other));
}

/* Each case spoils one field of a good spec. */
typedef struct bad_case {
    const char *field;
    void (*spoil)(fv_model_spec_t *spec);
    fv_status_t status;
} bad_case_t;

#define SPOIL(function, statement)              \
    static void function(fv_model_spec_t *spec) \
    {                                           \
        statement;                              \
    }
SPOIL(no_name, spec->name[0] = '\0')
SPOIL(no_layers, spec->n_layers = 0)
SPOIL(many_layers, spec->n_layers = FV_LAYERS_MAX + 1)
SPOIL(no_q_heads, spec->n_q_heads = 0)
SPOIL(absurd_q_heads, spec->n_q_heads = INT32_MAX)
SPOIL(no_kv_heads, spec->n_kv_heads = 0)
SPOIL(odd_heads, spec->n_q_heads = 33)
SPOIL(big_group, (spec->n_q_heads = 1024, spec->n_kv_heads = 1))
SPOIL(small_dim, spec->head_dim_qk = 8)
SPOIL(odd_dim, spec->head_dim_qk = 65)
SPOIL(big_dim_v, spec->head_dim_v = 264)
SPOIL(negative_dim_v, spec->head_dim_v = -8)
SPOIL(no_dtype, spec->kv_dtype = 0)
SPOIL(bad_dtype, spec->kv_dtype = 4)
SPOIL(negative_scale, spec->softmax_scale = -1.0F)
SPOIL(nan_scale, spec->softmax_scale = NAN)
SPOIL(infinite_scale, spec->softmax_scale = INFINITY)
SPOIL(negative_softcap, spec->logit_softcap = -1.0F)
SPOIL(nan_softcap, spec->logit_softcap = NAN)
SPOIL(latent, spec->kind = FV_MODEL_LATENT)
SPOIL(unknown_kind, spec->policies[1].kind = 3)
#define GOOD_S2                                                                         \
    (fv_policy_t)                                                                       \
    {                                                                                   \
        .kind = FV_POLICY_S2, .block_tokens = 64, .local_blocks = 16, .vert_stride = 8, \
    }
SPOIL(s2_block_48, (spec->policies[1] = GOOD_S2, spec->policies[1].block_tokens = 48))
SPOIL(s2_block_8, (spec->policies[1] = GOOD_S2, spec->policies[1].block_tokens = 8))
SPOIL(s2_block_512, (spec->policies[1] = GOOD_S2, spec->policies[1].block_tokens = 512))
SPOIL(s2_no_local, (spec->policies[1] = GOOD_S2, spec->policies[1].local_blocks = 0))
SPOIL(s2_no_stride, (spec->policies[1] = GOOD_S2, spec->policies[1].vert_stride = 0))
SPOIL(s2_stride, (spec->policies[1] = GOOD_S2, spec->policies[1].vert_stride = 65537))
SPOIL(s2_step, (spec->policies[1] = GOOD_S2, spec->policies[1].head_sliding_step = INT32_MIN))
SPOIL(s2_offset, (spec->policies[1] = GOOD_S2, spec->policies[1].head_sliding_offset = INT32_MAX))
SPOIL(s2_dense, (spec->policies[1] = GOOD_S2, spec->policies[1].num_dense_heads = 9))
SPOIL(s2_homo,
      (spec->policies[1] = GOOD_S2,
       spec->policies[1].homo_head = 1,
       spec->policies[1].num_dense_heads = 1))
SPOIL(s2_per, (spec->policies[1] = GOOD_S2, spec->policies[1].pattern_per = 2))
SPOIL(no_window, spec->policies[1].window_tokens = 0)
SPOIL(negative_sink, spec->policies[1].sink_tokens = -1)
SPOIL(no_policies, spec->n_policies = 0)
SPOIL(many_policies, spec->n_policies = FV_POLICIES_MAX + 1)
SPOIL(unknown_policy, spec->layer_policy[0] = 2)
SPOIL(odd_shard, spec->sharding.shard_tokens = 65)
SPOIL(negative_shard, spec->sharding.shard_tokens = -64)
SPOIL(bad_mode, spec->sharding.mode = 4)
SPOIL(latent_mode, spec->sharding.mode = FV_SHARDING_LATENT)
SPOIL(negative_ranks, spec->sharding.max_ranks = -1)

static void test_each_bad_field_is_refused_by_name(void **state)
{
    static const bad_case_t k_cases[] = {
        {"name", no_name, FV_ERR_INVALID_ARG},
        {"n_layers", no_layers, FV_ERR_INVALID_ARG},
        {"n_layers", many_layers, FV_ERR_INVALID_ARG},
        {"n_q_heads", no_q_heads, FV_ERR_INVALID_ARG},
        {"n_q_heads", absurd_q_heads, FV_ERR_INVALID_ARG},
        {"n_kv_heads", no_kv_heads, FV_ERR_INVALID_ARG},
        {"n_q_heads", odd_heads, FV_ERR_INVALID_ARG},
        {"n_q_heads", big_group, FV_ERR_INVALID_ARG},
        {"head_dim_qk", small_dim, FV_ERR_INVALID_ARG},
        {"head_dim_qk", odd_dim, FV_ERR_INVALID_ARG},
        {"head_dim_v", big_dim_v, FV_ERR_INVALID_ARG},
        {"head_dim_v", negative_dim_v, FV_ERR_INVALID_ARG},
        {"kv_dtype", no_dtype, FV_ERR_INVALID_ARG},
        {"kv_dtype", bad_dtype, FV_ERR_INVALID_ARG},
        {"softmax_scale", negative_scale, FV_ERR_INVALID_ARG},
        {"softmax_scale", nan_scale, FV_ERR_INVALID_ARG},
        {"softmax_scale", infinite_scale, FV_ERR_INVALID_ARG},
        {"logit_softcap", negative_softcap, FV_ERR_INVALID_ARG},
        {"logit_softcap", nan_softcap, FV_ERR_INVALID_ARG},
        {"latent_dim", latent, FV_ERR_INVALID_ARG},
        {"kind", unknown_kind, FV_ERR_INVALID_ARG},
        {"block_tokens: given 48", s2_block_48, FV_ERR_INVALID_ARG},
        {"block_tokens: given 8", s2_block_8, FV_ERR_INVALID_ARG},
        {"block_tokens: given 512", s2_block_512, FV_ERR_INVALID_ARG},
        {"local_blocks", s2_no_local, FV_ERR_INVALID_ARG},
        {"vert_stride", s2_no_stride, FV_ERR_INVALID_ARG},
        {"vert_stride", s2_stride, FV_ERR_INVALID_ARG},
        {"head_sliding_step", s2_step, FV_ERR_INVALID_ARG},
        {"head_sliding_offset", s2_offset, FV_ERR_INVALID_ARG},
        {"num_dense_heads", s2_dense, FV_ERR_INVALID_ARG},
        {"num_dense_heads: given 1, expected 0 with homo_head", s2_homo, FV_ERR_INVALID_ARG},
        {"pattern_per", s2_per, FV_ERR_INVALID_ARG},
        {"window_tokens", no_window, FV_ERR_INVALID_ARG},
        {"sink_tokens", negative_sink, FV_ERR_INVALID_ARG},
        {"policies", no_policies, FV_ERR_INVALID_ARG},
        {"policies", many_policies, FV_ERR_INVALID_ARG},
        {"layers", unknown_policy, FV_ERR_INVALID_ARG},
        {"shard_tokens", odd_shard, FV_ERR_INVALID_ARG},
        {"shard_tokens", negative_shard, FV_ERR_INVALID_ARG},
        {"mode", bad_mode, FV_ERR_INVALID_ARG},
        {"mode", latent_mode, FV_ERR_INVALID_ARG},
        {"max_ranks", negative_ranks, FV_ERR_INVALID_ARG},
    };
    fv_model_spec_t spec;

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_cases); i++) {
        good_spec(&spec);
        k_cases[i].spoil(&spec);
        if ((fv_model_spec_check(&spec) != k_cases[i].status) ||
            (strstr(fv_error_context(), k_cases[i].field) == NULL)) {
            fail_msg("case %zu (%s): \"%s\"", i, k_cases[i].field, fv_error_context());
        }
    }
}

static void test_s2_is_resolved(void **state)
{
    fv_model_spec_t spec;

    (void)state;
    good_spec(&spec);
    spec.policies[1] = GOOD_S2;
    spec.policies[1].vert_stride = 70;
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    assert_int_equal(spec.policies[1].n_heads, 8);
    assert_int_equal(spec.policies[1].head_sliding_step, 2); /* by query heads: 70 / 32 */
    spec.policies[1].pattern_per = FV_PATTERN_Q_HEAD;
    assert_int_equal(fv_model_spec_check(&spec), FV_OK); /* again: what is resolved stays */
    assert_int_equal(spec.policies[1].n_heads, 32);
    assert_int_equal(spec.policies[1].head_sliding_step, 2);
    spec.policies[1] = GOOD_S2;
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    assert_int_equal(spec.policies[1].head_sliding_step, 1); /* 8 / 32 rounds down to none */
    spec.policies[1] = GOOD_S2;
    spec.policies[1].homo_head = 1;
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    assert_int_equal(spec.policies[1].head_sliding_step, 8);
}

static void test_the_largest_and_smallest_are_served(void **state)
{
    fv_model_spec_t spec;

    (void)state;
    good_spec(&spec);
    spec.n_layers = FV_LAYERS_MAX;
    spec.n_q_heads = 1024;
    spec.n_kv_heads = 8;
    spec.head_dim_qk = 256;
    spec.head_dim_v = 16;
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    good_spec(&spec);
    spec.n_layers = 2;
    spec.n_q_heads = 1;
    spec.n_kv_heads = 1;
    spec.head_dim_qk = 16;
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_what_is_left_out_is_resolved),
        cmocka_unit_test(test_each_bad_field_is_refused_by_name),
        cmocka_unit_test(test_s2_is_resolved),
        cmocka_unit_test(test_the_largest_and_smallest_are_served),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
