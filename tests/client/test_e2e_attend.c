/*
 * test_e2e_attend.c - attention through the whole service, against the fp64 oracle.
 */
#include "tests/client/e2e.h"

static fv_e2e_t g_e2e;

static int setup(void **state)
{
    static const char *const k_extra[] = {"--kv-memory=256m", NULL};

    return fv_e2e_setup(&g_e2e, state, k_extra);
}

static int teardown(void **state)
{
    (void)state;
    return fv_e2e_teardown(&g_e2e);
}

#define ALL FOVEA_DTYPE_F32

/* Shapes, dtypes and options that matter; every one takes prefill, decode, verification and queries. */
static const struct {
    const char *name;
    fovea_model_spec_t spec;
    fovea_dtype_t wire;
} k_cases[] = {
    {"mha f32",
     {.n_q_heads = 4, .n_kv_heads = 4, .head_dim_qk = 64, .head_dim_v = 64, .kv_dtype = ALL},
     FOVEA_DTYPE_F32},
    {"gqa bf16",
     {.n_q_heads = 9,
      .n_kv_heads = 3,
      .head_dim_qk = 64,
      .head_dim_v = 64,
      .kv_dtype = FOVEA_DTYPE_BF16},
     FOVEA_DTYPE_BF16},
    {"mqa f16, dv != dk",
     {.n_q_heads = 8,
      .n_kv_heads = 1,
      .head_dim_qk = 96,
      .head_dim_v = 40,
      .kv_dtype = FOVEA_DTYPE_F16},
     FOVEA_DTYPE_F16},
    {"f32 wire, bf16 cache, 5 kv heads",
     {.n_q_heads = 10,
      .n_kv_heads = 5,
      .head_dim_qk = 128,
      .head_dim_v = 128,
      .kv_dtype = FOVEA_DTYPE_BF16},
     FOVEA_DTYPE_F32},
    {"bf16 wire, f32 cache, scale and softcap",
     {.n_q_heads = 4,
      .n_kv_heads = 2,
      .head_dim_qk = 32,
      .head_dim_v = 32,
      .kv_dtype = ALL,
      .softmax_scale = 0.3F,
      .logit_softcap = 5.0F},
     FOVEA_DTYPE_BF16},
    {"smallest dims",
     {.n_q_heads = 2, .n_kv_heads = 2, .head_dim_qk = 16, .head_dim_v = 16, .kv_dtype = ALL},
     FOVEA_DTYPE_F32},
    {"largest dims",
     {.n_q_heads = 2, .n_kv_heads = 1, .head_dim_qk = 256, .head_dim_v = 256, .kv_dtype = ALL},
     FOVEA_DTYPE_F32},
    {"context over ranks",
     {.n_q_heads = 4,
      .n_kv_heads = 2,
      .head_dim_qk = 64,
      .head_dim_v = 64,
      .kv_dtype = ALL,
      .sharding = {.mode = FOVEA_SHARDING_CONTEXT, .shard_tokens = 64}},
     FOVEA_DTYPE_F32},
    {"heads over ranks",
     {.n_q_heads = 10,
      .n_kv_heads = 5,
      .head_dim_qk = 64,
      .head_dim_v = 64,
      .kv_dtype = FOVEA_DTYPE_BF16,
      .sharding = {.mode = FOVEA_SHARDING_HEADS}},
     FOVEA_DTYPE_BF16},
};

static void test_shapes_and_dtypes(void **state)
{
    fv_e2e_t *e = *state;

    for (size_t i = 0; i < FV_COUNT(k_cases); i++) {
        fovea_model_spec_t spec = k_cases[i].spec;
        fv_mirror_t m;
        (void)fprintf(stderr, "case %s\n", k_cases[i].name);
        spec.name = k_cases[i].name;
        spec.n_layers = 1;
        fovea_model_t model = fv_e2e_model(e, &spec);
        fovea_session_id_t session = fv_e2e_open(e, &model);
        fv_mirror_init(&m, &spec, &session, 0, 512);
        fv_e2e_step(e, &m, 100, k_cases[i].wire, 0); /* prefill */
        fv_e2e_step(e, &m, 61, k_cases[i].wire, 0);  /* a further chunk, over page borders */
        for (int step = 0; step < 4; step++) {
            fv_e2e_step(e, &m, 1, k_cases[i].wire, 0); /* decode */
        }
        fv_e2e_step(e, &m, 5, k_cases[i].wire, 0); /* verification of several tokens */
        fv_e2e_step(e, &m, 3, k_cases[i].wire, FOVEA_ATTEND_QUERY_ONLY);
        fv_e2e_step(e, &m, 7, k_cases[i].wire, FOVEA_ATTEND_NOT_CAUSAL);
        fv_mirror_fini(&m);
        fv_e2e_close(e, &session);
    }
}

static void test_window_and_sinks(void **state)
{
    fv_e2e_t *e = *state;
    const uint32_t layer_one = 1;
    fovea_policy_t window = {.kind = FOVEA_POLICY_WINDOW,
                             .window_tokens = 40,
                             .sink_tokens = 3,
                             .layers = &layer_one,
                             .n_layers = 1};
    fovea_model_spec_t spec = {.name = "window",
                               .n_layers = 2,
                               .n_q_heads = 4,
                               .n_kv_heads = 2,
                               .head_dim_qk = 64,
                               .head_dim_v = 64,
                               .kv_dtype = FOVEA_DTYPE_F32,
                               .policies = &window,
                               .n_policies = 1};
    fovea_model_t model = fv_e2e_model(e, &spec);
    fovea_session_id_t session = fv_e2e_open(e, &model);

    for (uint32_t layer = 0; layer < 2; layer++) { /* dense, then windowed */
        fv_mirror_t m;
        fv_mirror_init(&m, &spec, &session, layer, 256);
        fv_e2e_step(e, &m, 150, FOVEA_DTYPE_F32, 0);
        fv_e2e_step(e, &m, 1, FOVEA_DTYPE_F32, 0);
        fv_e2e_step(e, &m, 9, FOVEA_DTYPE_F32, 0);
        fv_mirror_fini(&m);
    }
    fv_e2e_close(e, &session);
}

/* Layer 0 is S2, its numbers given one by one (the oracle resolves nothing); what it frees shows in the placement. */
static void test_s2(void **state)
{
    fv_e2e_t *e = *state;
    const uint32_t layer_zero = 0;
    fovea_policy_t sparse = {.kind = FOVEA_POLICY_S2,
                             .layers = &layer_zero,
                             .n_layers = 1,
                             .s2 = {.block_tokens = 64,
                                    .local_blocks = 2,
                                    .vert_stride = 5,
                                    .head_sliding_step = 1,
                                    .head_sliding_offset = -3,
                                    .pattern_per = FOVEA_PATTERN_KV_HEAD}};
    fovea_model_spec_t spec = {.name = "s2",
                               .n_layers = 2,
                               .n_q_heads = 4,
                               .n_kv_heads = 2,
                               .head_dim_qk = 64,
                               .head_dim_v = 64,
                               .kv_dtype = FOVEA_DTYPE_F32,
                               .policies = &sparse,
                               .n_policies = 1};
    fv_e2e_need_model(e, &spec);
    fovea_model_t model = fv_e2e_model(e, &spec);
    fovea_session_id_t session = fv_e2e_open(e, &model);
    const uint64_t page_bytes = 64U * 2U * 64U * 4U;
    fovea_placement_t placement = {0};
    fovea_error_t error = {FOVEA_OK, ""};
    fv_mirror_t m;

    assert_int_equal(model.n_warnings, 1); /* 2 heads read 2 of every 5 blocks */
    fv_mirror_init(&m, &spec, &session, 0, 800);
    fv_e2e_step(e, &m, 150, FOVEA_DTYPE_F32, 0);
    for (int i = 0; i < 60; i++) {
        fv_e2e_step(e, &m, (i % 3 == 0) ? 20 : 1, FOVEA_DTYPE_F32, 0);
    }
    assert_int_equal(m.n_tokens, 590);
    fv_assert_ok(fovea_get_placement(e->client, &session, 0, &placement, &error), error);
    assert_int_equal(placement.n_patterns, 1);
    assert_int_equal(placement.patterns[0].policy.s2.vert_stride, 5);
    assert_int_equal(placement.patterns[0].policy.n_layers, 1);
    assert_int_equal(placement.patterns[0].floor, 589);
    /* blocks 8 and 9 are local; of 0..7 head 0 keeps 3, and head 1 keeps 2 and 7 */
    assert_int_equal(placement.patterns[0].kv_bytes, (2U * 2U + 3U) * page_bytes);
    assert_int_equal(placement.patterns[0].freed_bytes, (20U - 7U) * page_bytes);
    fovea_placement_free(&placement);
    fv_mirror_fini(&m);
    fv_e2e_close(e, &session);
    sparse.s2 = (fovea_s2_t){.preset = "s2-3"};
    assert_int_equal(fovea_register_model(e->client, &spec, 0, &model, &error),
                     FOVEA_INVALID_ARGUMENT);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "preset", "s2-3", "phi3-small");
    sparse.s2 = (fovea_s2_t){.preset = "s2-8"};
    fv_assert_ok(fovea_register_model(e->client, &spec, 0, &model, &error), error);
}

/* One request of ragged items: decode, prefill and an empty session's first token, mixed. */
static void test_ragged_batch(void **state)
{
    enum {
        N = 6
    };
    static const uint32_t k_first[N] = {70, 1, 130, 0, 64, 5};
    static const uint32_t k_second[N] = {1, 33, 1, 1, 2, 90};
    fv_e2e_t *e = *state;
    fovea_model_spec_t spec = {.name = "ragged",
                               .n_layers = 1,
                               .n_q_heads = 6,
                               .n_kv_heads = 3,
                               .head_dim_qk = 64,
                               .head_dim_v = 64,
                               .kv_dtype = FOVEA_DTYPE_F32};
    fovea_model_t model = fv_e2e_model(e, &spec);
    fovea_error_t error = {FOVEA_OK, ""};
    fv_mirror_t mirrors[N];
    fv_mirror_t *all[N];
    fv_exam_t exam;

    for (int i = 0; i < N; i++) {
        fovea_session_id_t session = fv_e2e_open(e, &model);
        fv_mirror_init(&mirrors[i], &spec, &session, 0, 256);
        all[i] = &mirrors[i];
        if (k_first[i] > 0) {
            fv_e2e_step(e, &mirrors[i], k_first[i], FOVEA_DTYPE_F32, 0);
        }
    }
    fv_exam_init(&exam, all, k_second, N, FOVEA_DTYPE_F32, 0, &e->random);
    fv_assert_ok(fovea_attend(e->client, &exam.request, 0, NULL, &error), error);
    assert_int_equal(fv_exam_check(&exam), 0);
    fv_exam_fini(&exam);
    for (int i = 0; i < N; i++) {
        fv_e2e_close(e, &mirrors[i].session);
        fv_mirror_fini(&mirrors[i]);
    }
}

/* A NaN in one session's query spoils that row; the same request's other rows stay right. */
static void test_nan_stays_in_its_row(void **state)
{
    enum {
        DIM = 64
    };
    fv_e2e_t *e = *state;
    fovea_model_spec_t spec = {.name = "nan",
                               .n_layers = 1,
                               .n_q_heads = 2,
                               .n_kv_heads = 2,
                               .head_dim_qk = DIM,
                               .head_dim_v = DIM,
                               .kv_dtype = FOVEA_DTYPE_F32};
    fovea_model_t model = fv_e2e_model(e, &spec);
    fovea_session_id_t session = fv_e2e_open(e, &model);
    fovea_error_t error = {FOVEA_OK, ""};
    uint32_t n_tokens = 4;
    fv_mirror_t m;
    fv_mirror_t *all = &m;
    fv_exam_t exam;

    fv_mirror_init(&m, &spec, &session, 0, 64);
    fv_e2e_step(e, &m, 20, FOVEA_DTYPE_F32, 0);
    fv_exam_init(&exam, &all, &n_tokens, 1, FOVEA_DTYPE_F32, 0, &e->random);
    float *q = exam.q;
    float good = q[DIM];
    memset(&q[DIM], 0xFF, sizeof(float)); /* token 0, head 1: a NaN */
    fv_assert_ok(fovea_attend(e->client, &exam.request, 0, NULL, &error), error);
    const float *out = exam.out;
    assert_true(out[DIM] != out[DIM]);
    assert_true(exam.lse[1] != exam.lse[1]);
    q[DIM] = good;
    assert_int_equal(fv_exam_check(&exam), DIM + 1); /* that row of out, and its lse */
    fv_exam_fini(&exam);
    fv_e2e_step(e, &m, 1, FOVEA_DTYPE_F32, 0); /* the cache is untouched by it */
    fv_mirror_fini(&m);
    fv_e2e_close(e, &session);
}

/* Without lse nothing but `out` is written. */
static void test_lse_is_optional(void **state)
{
    fv_e2e_t *e = *state;
    fovea_model_spec_t spec = {.name = "no-lse",
                               .n_layers = 1,
                               .n_q_heads = 2,
                               .n_kv_heads = 1,
                               .head_dim_qk = 32,
                               .head_dim_v = 32,
                               .kv_dtype = FOVEA_DTYPE_F32};
    fovea_model_t model = fv_e2e_model(e, &spec);
    fovea_session_id_t session = fv_e2e_open(e, &model);
    fovea_error_t error = {FOVEA_OK, ""};
    fovea_timings_t timings = {0};
    uint32_t n_tokens = 3;
    fv_mirror_t m;
    fv_mirror_t *all = &m;
    fv_exam_t exam;
    size_t n_bad = 0;

    fv_mirror_init(&m, &spec, &session, 0, 8);
    fv_exam_init(&exam, &all, &n_tokens, 1, FOVEA_DTYPE_F32, 0, &e->random);
    exam.request.lse = NULL;
    exam.request.lse_bytes = 0;
    fv_assert_ok(fovea_attend(e->client, &exam.request, 0, &timings, &error), error);
    assert_true(timings.total_us > 0);
    n_bad = fv_exam_check(&exam);
    assert_int_equal(n_bad, n_tokens * spec.n_q_heads); /* every lse still poison, out right */
    fv_exam_fini(&exam);
    fv_mirror_fini(&m);
    fv_e2e_close(e, &session);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes_and_dtypes),
        cmocka_unit_test(test_window_and_sinks),
        cmocka_unit_test(test_s2),
        cmocka_unit_test(test_ragged_batch),
        cmocka_unit_test(test_nan_stays_in_its_row),
        cmocka_unit_test(test_lse_is_optional),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
