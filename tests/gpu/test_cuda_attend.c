/*
 * test_cuda_attend.c - the CUDA backend against the fp64 oracle: fixed shapes, random ones, and the hard corners.
 *
 * Every case is poisoned (attn_case.h): unused slots and unseen tokens are NaN, page-table entries past the end wild.
 */
#include "kernels/backend_cuda.h"
#include "tests/support/cuda_case.h"
#include "tests/support/test.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ARENA_BYTES ((size_t)512 << 20)
#define STEP_MAX    32
#define MACS        3000000

static const fv_backend_ops_t *const k_ops = &fv_backend_cuda;
static fv_backend_t *backend;

static int setup(void **state)
{
    fv_backend_config_t config = {.kv_arena_bytes = ARENA_BYTES};

    (void)state;
    if (k_ops->create(&config, &backend) != FV_OK) {
        return -1;
    }
    backend->prefill_units_min =
        UINT32_MAX; /* the lean kernel's test: test_cuda_prefill.c has the other */
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    k_ops->destroy(backend);
    return 0;
}

/* Under a sanitizer everything is a hundred times slower: FV_GPU_QUICK=1 takes a sample of each test. */
static int quick(int n_all, int n_some)
{
    return (getenv("FV_GPU_QUICK") != NULL) ? n_some : n_all;
}

/* Problems that share a step. */
typedef struct step {
    size_t n;
    fv_attn_case_t *cases[STEP_MAX];
    fv_attn_item_t items[STEP_MAX];
    void *out[STEP_MAX];
    float *lse[STEP_MAX];
    uint32_t next_unit;
} step_t;

static void step_add(step_t *step, const fv_attn_spec_t *given, fv_rng_t *rng, bool is_pinned)
{
    const size_t i = step->n++;
    fv_attn_spec_t spec = *given;
    fv_attn_case_t *attn = NULL;
    void *lse = NULL;

    fv_cuda_case_fit(backend, &spec);
    attn = fv_attn_case_create(&spec);
    assert_true(step->n <= STEP_MAX);
    step->cases[i] = attn;
    fv_attn_case_place(attn, rng, &step->next_unit);
    assert_true((size_t)step->next_unit * FV_PAGE_UNIT <= ARENA_BYTES);
    assert_int_equal(fv_attn_case_load(attn, k_ops, backend, rng), FV_OK);
    if (is_pinned) {
        assert_int_equal(k_ops->host_alloc(backend, fv_attn_case_out_bytes(attn), &step->out[i]),
                         FV_OK);
        assert_int_equal(k_ops->host_alloc(backend, fv_attn_case_rows(attn) * sizeof(float), &lse),
                         FV_OK);
    } else {
        step->out[i] = malloc(fv_attn_case_out_bytes(attn));
        lse = malloc(fv_attn_case_rows(attn) * sizeof(float));
    }
    memset(step->out[i], 0xff, fv_attn_case_out_bytes(attn)); /* what is not written is NaN */
    memset(lse, 0xff, fv_attn_case_rows(attn) * sizeof(float));
    step->lse[i] = lse;
    step->items[i] = fv_attn_case_item(attn, 0, step->out[i], step->lse[i]);
}

static void step_run(step_t *step)
{
    assert_int_equal(k_ops->attend(backend, step->items, step->n), FV_OK);
    assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
}

static size_t step_check(step_t *step, const char *name)
{
    size_t n_bad = 0;

    for (size_t i = 0; i < step->n; i++) {
        fv_attn_case_solve(step->cases[i]);
        n_bad += fv_attn_case_check(step->cases[i], step->out[i], step->lse[i], name);
    }
    return n_bad;
}

static void step_free(step_t *step, bool is_pinned)
{
    for (size_t i = 0; i < step->n; i++) {
        fv_attn_case_destroy(step->cases[i]);
        if (is_pinned) {
            k_ops->host_free(backend, step->out[i]);
            k_ops->host_free(backend, step->lse[i]);
        } else {
            free(step->out[i]);
            free(step->lse[i]);
        }
    }
    memset(step, 0, sizeof(*step));
}

/* One problem in a step of its own. */
static void one(const fv_attn_spec_t *spec, fv_rng_t *rng, const char *name)
{
    step_t step = {0};

    step_add(&step, spec, rng, false);
    step_run(&step);
    assert_int_equal(step_check(&step, name), 0);
    step_free(&step, false);
}

static fv_attn_spec_t
spec_of(int32_t dk, int32_t dv, int32_t io, int32_t kv, int32_t group, int64_t kv_end)
{
    fv_attn_spec_t spec;

    memset(&spec, 0, sizeof(spec));
    spec.n_tokens = 1;
    spec.n_kv_heads = 2;
    spec.group = group;
    spec.head_dim_qk = dk;
    spec.head_dim_v = dv;
    spec.io_dtype = io;
    spec.kv_dtype = kv;
    spec.causal = true;
    spec.kv_end = kv_end;
    spec.position = (kv_end > 0) ? (kv_end - 1) : 0;
    spec.seed = (uint64_t)(dk * 1000 + dv + group + io * 7 + kv);
    return spec;
}

/* Head dims, every pair of dtypes. */
static void test_dims_and_dtypes(void **state)
{
    static const int32_t k_dims[][2] = {{64, 64},   {80, 80},   {96, 96},   {128, 128},
                                        {192, 192}, {256, 256}, {192, 128}, {128, 192},
                                        {16, 24},   {72, 40},   {88, 256},  {40, 8 * 17}};
    fv_rng_t rng = {1};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_dims); i += (size_t)quick(1, 4)) {
        for (int32_t io = FV_DTYPE_F32; io <= FV_DTYPE_BF16; io++) {
            for (int32_t kv = FV_DTYPE_F32; kv <= FV_DTYPE_BF16; kv++) {
                fv_attn_spec_t spec = spec_of(k_dims[i][0], k_dims[i][1], io, kv, 4, 333);

                one(&spec, &rng, "dims");
            }
        }
    }
}

/* fp32 KV of 256 dims does not fit into the shared memory of sm_80's GPUs: refused before anything is written. */
static void test_refused(void **state)
{
    fv_attn_spec_t spec = spec_of(256, 256, FV_DTYPE_F32, FV_DTYPE_F32, 4, 10);
    uint8_t out[2 * 4 * 256 * sizeof(float)];
    fv_attn_item_t item;
    fv_attn_case_t *attn = fv_attn_case_create(&spec);
    fv_rng_t rng = {9};
    uint32_t next_unit = 0;

    (void)state;
    fv_attn_case_place(attn, &rng, &next_unit);
    assert_int_equal(fv_attn_case_load(attn, k_ops, backend, &rng), FV_OK);
    item = fv_attn_case_item(attn, 0, out, NULL);
    assert_int_equal(fv_cuda_case_fits(backend, &spec), backend->has_sm90);
    assert_int_equal(k_ops->attend(backend, &item, 1),
                     backend->has_sm90 ? FV_OK : FV_ERR_UNIMPLEMENTED);
    assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
    fv_attn_case_destroy(attn);
}

/* 1 to 128 rows of a KV head, by group and by tokens; lengths round the borders of tiles and shares. */
static void test_rows_and_lengths(void **state)
{
    static const int32_t k_groups[] = {1,  2,  3,  7,  8,  9,  15,  16,  17,
                                       31, 32, 33, 63, 64, 65, 100, 127, 128};
    static const int64_t k_lengths[] = {0, 1, 63, 64, 65, 127, 128, 1000, 4097};
    fv_rng_t rng = {2};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_groups); i += (size_t)quick(1, 4)) {
        fv_attn_spec_t spec = spec_of(128, 128, FV_DTYPE_BF16, FV_DTYPE_BF16, k_groups[i], 200);

        one(&spec, &rng, "groups");
        spec = spec_of(64, 64, FV_DTYPE_F16, FV_DTYPE_F16, 1, 300);
        spec.n_tokens = k_groups[i];
        spec.position = spec.kv_end - spec.n_tokens;
        one(&spec, &rng, "tokens");
    }
    for (size_t i = 0; i < FV_COUNT(k_lengths); i++) {
        fv_attn_spec_t spec = spec_of(128, 128, FV_DTYPE_BF16, FV_DTYPE_BF16, 4, k_lengths[i]);

        one(&spec, &rng, "lengths");
    }
}

/* One row over every CTA; then more groups than CTAs. */
static void test_extremes(void **state)
{
    fv_attn_spec_t spec = spec_of(64, 64, FV_DTYPE_BF16, FV_DTYPE_BF16, 1, 64 * 700 + 13);
    fv_rng_t rng = {3};

    (void)state;
    spec.n_kv_heads = 1;
    one(&spec, &rng, "one row");
    spec = spec_of(64, 64, FV_DTYPE_BF16, FV_DTYPE_BF16, 1, 65);
    spec.n_kv_heads = 700;
    one(&spec, &rng, "many groups");
    spec.kv_end = 64 * 3;
    spec.position = spec.kv_end - 1;
    spec.n_kv_heads = 333;
    one(&spec, &rng, "many cut groups");
}

/*
 * Groups that many CTAs have pieces of, for every number of rows that merges in another way: one group, and three that
 * end in the middle of the line.
 */
static void test_cut_groups(void **state)
{
    static const int32_t k_rows[] = {1, 4, 8, 9, 16, 17, 32, 33, 64};
    fv_rng_t rng = {6};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_rows); i += (size_t)quick(1, 3)) {
        fv_attn_spec_t spec =
            spec_of(64, 64, FV_DTYPE_BF16, FV_DTYPE_BF16, k_rows[i], 64 * quick(150, 140) + 5);

        spec.n_kv_heads = 1;
        one(&spec, &rng, "one group");
        spec = spec_of(128, 128, FV_DTYPE_F16, FV_DTYPE_F16, k_rows[i], 64 * 57 + 1);
        spec.n_kv_heads = 3;
        one(&spec, &rng, "three groups");
    }
}

/*
 * The ways of cutting and merging that other sizes take, on small problems: shares in rounds down to a tile, so that one
 * group has hundreds of pieces, all of them merged late, early, or as it comes; lookups in place of what shares carry;
 * a launch that may overlap what is ahead of it.
 */
static void test_tunings(void **state)
{
    const fv_lean_tuning_t shipped = backend->tuning;
    fv_lean_tuning_t rounds = shipped;
    fv_rng_t rng = {8};

    (void)state;
    rounds.rounds_min[0] = 3;
    rounds.rounds_min[1] = 3;
    rounds.first_percent = 60;
    rounds.tail_tiles[0] = 1;
    rounds.tail_tiles[1] = 1;
    for (int i = 0; i < 5; i++) {
        backend->tuning = rounds;
        backend->tuning.early_bytes = (i == 1) ? 0U : shipped.early_bytes;
        backend->tuning.tail_bytes = (i == 1) ? 0U : shipped.tail_bytes;
        backend->tuning.is_cooperative = (i == 2) ? 0U : shipped.is_cooperative;
        backend->tuning.is_direct = (i == 3) ? 0U : shipped.is_direct;
        backend->tuning.is_dependent = (i == 4) ? 1U : 0U;
        for (int32_t group = 4; group <= 32; group += 28) {
            fv_attn_spec_t spec =
                spec_of(64, 64, FV_DTYPE_BF16, FV_DTYPE_BF16, group, 64 * quick(1500, 500) + 7);

            spec.n_kv_heads = 1;
            one(&spec, &rng, "one group in rounds");
            spec = spec_of(128, 128, FV_DTYPE_F16, FV_DTYPE_F16, group, 64 * 150 + 1);
            spec.n_kv_heads = 3;
            one(&spec, &rng, "three groups in rounds");
        }
    }
    backend->tuning = shipped;
}

/* Steps of long, short and empty sequences: some groups are merged early, some late, many are whole. */
static void test_mixed_groups(void **state)
{
    fv_rng_t rng = {fv_test_seed(20261123)};

    (void)state;
    for (int n = 0; n < quick(6, 1); n++) {
        const int32_t group = (n % 2 == 0) ? 4 : 32;
        step_t step = {0};

        for (int i = 0; i < 20; i++) {
            const int64_t longest = (i % 5 == 0) ? 9000 : 700;
            fv_attn_spec_t spec = spec_of(64, 64, FV_DTYPE_BF16, FV_DTYPE_BF16, group,
                                          (i % 7 == 3) ? 0 : fv_rng_range(&rng, 1, longest));

            spec.n_kv_heads = (group == 4) ? 3 : 1;
            step_add(&step, &spec, &rng, false);
        }
        step_run(&step);
        assert_int_equal(step_check(&step, "mixed"), 0);
        step_free(&step, false);
    }
}

/*
 * A token of infinite K whose score is -inf weighs nothing. Q in several parts must not make a NaN of it: some of Q's
 * values are bf16 already, so that their other parts are zero.
 */
static void test_infinite_k(void **state)
{
    static const int32_t k_dtypes[][2] = {
        {FV_DTYPE_F32, FV_DTYPE_BF16},  {FV_DTYPE_F16, FV_DTYPE_BF16},
        {FV_DTYPE_BF16, FV_DTYPE_BF16}, {FV_DTYPE_F32, FV_DTYPE_F16},
        {FV_DTYPE_F32, FV_DTYPE_F32},   {FV_DTYPE_F16, FV_DTYPE_F16}};
    fv_rng_t rng = {7};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_dtypes); i++) {
        fv_attn_spec_t spec = spec_of(64, 64, k_dtypes[i][0], k_dtypes[i][1], 1, 200);
        fv_attn_case_t *attn = NULL;
        step_t step = {0};

        spec.n_kv_heads = 1;
        step_add(&step, &spec, &rng, false);
        attn = step.cases[0];
        for (size_t d = 0; d < 4; d++) {
            const size_t at = (10 + d) * 64U + d; /* token 10 + d, dim d */
            const float q = (d % 2 == 0) ? 1.5F : -0.75F;

            fv_store_element(attn->q, (fv_dtype_t)spec.io_dtype, d, q);
            fv_store_element(attn->k, (fv_dtype_t)spec.io_dtype, at,
                             (q > 0) ? -INFINITY : INFINITY);
            attn->k_ref[at] = (q > 0) ? -(double)INFINITY : (double)INFINITY;
        }
        assert_int_equal(fv_attn_case_load(attn, k_ops, backend, &rng), FV_OK);
        step_run(&step);
        assert_int_equal(step_check(&step, "infinite"), 0);
        for (size_t d = 0; d < 64; d++) { /* the oracle's row is finite */
            assert_true(isfinite(attn->out_ref[d]));
        }
        step_free(&step, false);
    }
}

/* Prefill: chunks against a longer context, causal and not, windows, softcap. */
static void test_prefill(void **state)
{
    fv_rng_t rng = {4};

    (void)state;
    for (int i = 0; i < 8; i += quick(1, 3)) {
        fv_attn_spec_t spec =
            spec_of((i & 1) ? 128 : 64, (i & 1) ? 128 : 64, FV_DTYPE_BF16, FV_DTYPE_BF16, 4, 700);

        spec.n_tokens = 300;
        spec.position = 400 - 100 * (i & 2);
        spec.causal = (i & 4) == 0;
        spec.logit_softcap = (i == 3) ? 20.0F : 0.0F;
        if (i >= 6) {
            spec.policy.kind = FV_POLICY_WINDOW;
            spec.policy.window_tokens = 130;
            spec.policy.sink_tokens = 5;
        }
        one(&spec, &rng, "prefill");
    }
}

/* Steps of random problems: every dtype, shape, policy; NaN here and there; results pinned or not. */
static void test_random_steps(void **state)
{
    fv_rng_t rng = {fv_test_seed(20261122)};

    (void)state;
    for (int n = 0; n < quick(40, 3); n++) {
        const bool is_pinned = (n % 2) != 0;
        step_t step = {0};

        for (int i = 0; i < 6; i++) {
            fv_attn_spec_t spec = fv_attn_spec_random(&rng, MACS);

            if ((spec.kv_end > 0) && (fv_rng_range(&rng, 0, 3) == 0)) {
                spec.spoil_token = fv_rng_range(&rng, 1, spec.kv_end);
            }
            step_add(&step, &spec, &rng, is_pinned);
        }
        step_run(&step);
        assert_int_equal(step_check(&step, "random"), 0);
        step_free(&step, is_pinned);
    }
}

/* The same step 1,000 times: same bits, and nothing left over from other steps between. */
static void test_repeat(void **state)
{
    static const int64_t k_lengths[] = {0, 1, 64, 333, 5000, 20000, 7, 129};
    fv_attn_spec_t other_spec = spec_of(64, 64, FV_DTYPE_BF16, FV_DTYPE_BF16, 8, 3000);
    fv_rng_t rng = {5};
    static step_t step; /* two of them are much for a stack */
    static step_t other;
    void *first[STEP_MAX];

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_lengths); i++) {
        fv_attn_spec_t spec = spec_of(128, 128, FV_DTYPE_BF16, FV_DTYPE_BF16, 4, k_lengths[i]);

        spec.n_kv_heads = 3;
        step_add(&step, &spec, &rng, true);
    }
    other.next_unit = step.next_unit;
    step_add(&other, &other_spec, &rng, true);
    step_run(&step);
    assert_int_equal(step_check(&step, "repeat"), 0);
    for (size_t i = 0; i < step.n; i++) {
        first[i] = malloc(fv_attn_case_out_bytes(step.cases[i]));
        memcpy(first[i], step.out[i], fv_attn_case_out_bytes(step.cases[i]));
    }
    for (int n = 0; n < quick(1000, 3); n++) {
        if (n % 10 == 0) {
            step_run(&other);
        }
        for (size_t i = 0; i < step.n; i++) {
            memset(step.out[i], 0xff, fv_attn_case_out_bytes(step.cases[i]));
        }
        step_run(&step);
        for (size_t i = 0; i < step.n; i++) {
            assert_memory_equal(first[i], step.out[i], fv_attn_case_out_bytes(step.cases[i]));
        }
    }
    assert_int_equal(step_check(&other, "between"), 0);
    for (size_t i = 0; i < step.n; i++) {
        free(first[i]);
    }
    step_free(&step, true);
    step_free(&other, true);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dims_and_dtypes),  cmocka_unit_test(test_refused),
        cmocka_unit_test(test_rows_and_lengths), cmocka_unit_test(test_extremes),
        cmocka_unit_test(test_cut_groups),       cmocka_unit_test(test_tunings),
        cmocka_unit_test(test_mixed_groups),     cmocka_unit_test(test_infinite_k),
        cmocka_unit_test(test_prefill),          cmocka_unit_test(test_random_steps),
        cmocka_unit_test(test_repeat),
    };

    if (!fv_backend_cuda_is_visible()) {
        print_message("no GPU: skipped\n");
        return 77;
    }
    return cmocka_run_group_tests(tests, setup, teardown);
}
