/*
 * test_cuda_prefill.c - the prefill kernel against the fp64 oracle: fixed shapes, random ones, chunks, shards, repetition.
 *
 * Every case is poisoned (attn_case.h). Each step says how many launches of the prefill kernel it expects, so none of
 * them passes by going another way. Code for sm_80 has no such kernel: there the lean kernel must do all of it.
 */
#include "kernels/backend_cuda.h"
#include "tests/support/attn_case.h"
#include "tests/support/test.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ARENA_BYTES ((size_t)256 << 20)
#define STEP_MAX    8
#define RMS_BF16 \
    6e-3 /* of all values together: the rounding of weights and results, 2^-8 each at most */
#define RMS_F16 1e-3

static const fv_backend_ops_t *const k_ops = &fv_backend_cuda;
static fv_backend_t *backend;

static int setup(void **state)
{
    fv_backend_config_t config = {.kv_arena_bytes = ARENA_BYTES};

    (void)state;
    if (k_ops->create(&config, &backend) != FV_OK) {
        return -1;
    }
    backend->prefill_units_min = 1;
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

static void step_add(step_t *step, const fv_attn_spec_t *spec, fv_rng_t *rng)
{
    const size_t i = step->n++;
    fv_attn_case_t *attn = fv_attn_case_create(spec);

    assert_true(step->n <= STEP_MAX);
    step->cases[i] = attn;
    fv_attn_case_place(attn, rng, &step->next_unit);
    assert_true((size_t)step->next_unit * FV_PAGE_UNIT <= ARENA_BYTES);
    assert_int_equal(fv_attn_case_load(attn, k_ops, backend, rng), FV_OK);
    step->out[i] = malloc(fv_attn_case_out_bytes(attn));
    step->lse[i] = malloc(fv_attn_case_rows(attn) * sizeof(float));
    step->items[i] = fv_attn_case_item(attn, 0, step->out[i], step->lse[i]);
}

/* What is not written is NaN. */
static void step_run(step_t *step, size_t n_prefills)
{
    for (size_t i = 0; i < step->n; i++) {
        memset(step->out[i], 0xff, fv_attn_case_out_bytes(step->cases[i]));
        memset(step->lse[i], 0xff, fv_attn_case_rows(step->cases[i]) * sizeof(float));
    }
    assert_int_equal(k_ops->attend(backend, step->items, step->n), FV_OK);
    assert_int_equal(backend->n_prefills, backend->has_sm90 ? n_prefills : 0);
    assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
}

/* The tolerance of a single value must allow for the worst rounding; all together are better than that. */
static size_t check_rms(const fv_attn_case_t *attn, const void *out)
{
    const fv_attn_spec_t *s = &attn->spec;
    const double most = (s->io_dtype == (int32_t)FV_DTYPE_BF16) ? RMS_BF16 : RMS_F16;
    double error = 0.0;
    double norm = 0.0;

    for (size_t i = 0; i < fv_attn_case_rows(attn) * (size_t)s->head_dim_v; i++) {
        const double ref = attn->out_ref[i];

        if (isfinite(ref)) {
            const double d = (double)fv_load_element(out, (fv_dtype_t)s->io_dtype, i) - ref;

            error += d * d;
            norm += ref * ref;
        }
    }
    if (sqrt(error) <= most * sqrt(norm)) {
        return 0;
    }
    print_message("rms %.3g of the norm, allowed %.3g\n", sqrt(error / norm), most);
    return 1;
}

static size_t step_check(step_t *step, const char *name)
{
    size_t n_bad = 0;

    for (size_t i = 0; i < step->n; i++) {
        fv_attn_case_solve(step->cases[i]);
        n_bad += fv_attn_case_check(step->cases[i], step->out[i], step->lse[i], name);
        n_bad += check_rms(step->cases[i], step->out[i]);
    }
    return n_bad;
}

static void step_free(step_t *step)
{
    for (size_t i = 0; i < step->n; i++) {
        fv_attn_case_destroy(step->cases[i]);
        free(step->out[i]);
        free(step->lse[i]);
    }
    memset(step, 0, sizeof(*step));
}

/* One problem in a step of its own. */
static void one(const fv_attn_spec_t *spec, fv_rng_t *rng, const char *name)
{
    step_t step = {0};

    step_add(&step, spec, rng);
    step_run(&step, 1);
    assert_int_equal(step_check(&step, name), 0);
    step_free(&step);
}

static fv_attn_spec_t
spec_of(int32_t dk, int32_t dv, int32_t dtype, int32_t group, int32_t n_tokens, int64_t kv_end)
{
    fv_attn_spec_t spec;

    memset(&spec, 0, sizeof(spec));
    spec.n_tokens = n_tokens;
    spec.n_kv_heads = 2;
    spec.group = group;
    spec.head_dim_qk = dk;
    spec.head_dim_v = dv;
    spec.io_dtype = dtype;
    spec.kv_dtype = dtype;
    spec.causal = true;
    spec.kv_end = kv_end;
    spec.position = kv_end - n_tokens;
    spec.one_part = true;
    spec.seed = (uint64_t)(dk * 1000 + dv + group * 31 + dtype * 7 + n_tokens);
    return spec;
}

static const int32_t k_dims[][2] = {{128, 128}, {64, 64}, {192, 128}, {256, 256}};

/* Every kernel, with every kind of mask. */
static void test_kernels_and_masks(void **state)
{
    fv_rng_t rng = {11};

    (void)state;
    for (size_t d = 0; d < FV_COUNT(k_dims); d++) {
        for (int32_t dtype = FV_DTYPE_BF16; dtype >= (int32_t)FV_DTYPE_F16; dtype--) {
            for (int i = 0; i < quick(6, 1); i++) {
                fv_attn_spec_t spec = spec_of(k_dims[d][0], k_dims[d][1], dtype, 4, 150, 500);

                spec.causal = i != 1;
                spec.position = (i == 2) ? 100 : spec.position;
                spec.logit_softcap = (i == 3) ? 20.0F : 0.0F;
                if (i >= 4) {
                    spec.causal = i == 4;
                    spec.policy.kind = FV_POLICY_WINDOW;
                    spec.policy.window_tokens = 130;
                    spec.policy.sink_tokens = 5;
                }
                one(&spec, &rng, "masks");
            }
        }
    }
}

/* Lengths and rows round the borders of pages, tiles and blocks; groups that divide a block and that do not. */
static void test_borders(void **state)
{
    static const int64_t k_ends[] = {65, 127, 128, 129, 191, 192, 193, 256, 257, 1000};
    static const int32_t k_groups[] = {1, 3, 8, 33, 100};
    fv_rng_t rng = {12};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_ends); i += (size_t)quick(1, 5)) {
        fv_attn_spec_t spec = spec_of(128, 128, FV_DTYPE_BF16, 1, 65, k_ends[i]);

        one(&spec, &rng, "ends");
        spec = spec_of(64, 64, FV_DTYPE_BF16, 2, (int32_t)k_ends[i], k_ends[i]);
        one(&spec, &rng, "whole prompts");
    }
    for (size_t i = 0; i < FV_COUNT(k_groups); i += (size_t)quick(1, 3)) {
        fv_attn_spec_t spec = spec_of(128, 128, FV_DTYPE_BF16, k_groups[i], 70, 300);

        one(&spec, &rng, "groups");
    }
}

/* More units than CTAs, ragged, with items that the lean kernel takes beside them. */
static void test_ragged(void **state)
{
    static const int32_t k_tokens[] = {700, 1, 65, 300, 128, 2, 431, 64};
    fv_rng_t rng = {13};
    step_t step = {0};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_tokens); i++) {
        fv_attn_spec_t spec =
            spec_of(128, 128, FV_DTYPE_BF16, 4, k_tokens[i], k_tokens[i] + (int64_t)(i % 3) * 77);

        spec.n_kv_heads = 3;
        step_add(&step, &spec, &rng);
    }
    step_run(&step, 1);
    assert_int_equal(step_check(&step, "ragged"), 0);
    step_free(&step);
}

/* Any shape that the kernel takes; NaN in a token of K and V, seen by some rows. */
static void test_random(void **state)
{
    fv_rng_t rng = {fv_test_seed(20261124)};

    (void)state;
    for (int n = 0; n < quick(40, 4); n++) {
        fv_attn_spec_t spec = fv_attn_spec_random(&rng, 3000000);
        const size_t d = (size_t)fv_rng_range(&rng, 0, 3);
        const int64_t before = fv_rng_range(&rng, 0, 400);

        spec.head_dim_qk = k_dims[d][0];
        spec.head_dim_v = k_dims[d][1];
        spec.io_dtype = (fv_rng_range(&rng, 0, 1) == 0) ? FV_DTYPE_BF16 : FV_DTYPE_F16;
        spec.kv_dtype = spec.io_dtype;
        spec.n_tokens = (int32_t)fv_rng_range(&rng, 65, 200);
        spec.group = (int32_t)fv_rng_range(&rng, 1, 5);
        spec.kv_end = before + spec.n_tokens;
        spec.position =
            (fv_rng_range(&rng, 0, 3) == 0) ? fv_rng_range(&rng, 0, spec.kv_end + 10) : before;
        fv_attn_spec_maybe_s2(&rng, &spec);
        if (fv_policy_splits_group(&spec.policy)) { /* a head of its own for each row of a token */
            spec.n_tokens = (int32_t)fv_rng_range(&rng, 65, 90);
            spec.kv_end = before + spec.n_tokens;
        }
        spec.one_part = true;
        if (fv_rng_range(&rng, 0, 2) == 0) {
            spec.spoil_token = fv_rng_range(&rng, 1, spec.kv_end);
        }
        one(&spec, &rng, "random");
    }
}

/* Rows of one prompt in chunks of any size: right, and by the prefill kernel the same bits as in one. */
static void test_chunks(void **state)
{
    static const int32_t k_chunks[] = {33, 64, 100, 250};
    fv_attn_spec_t spec = spec_of(128, 128, FV_DTYPE_BF16, 4, 500, 500);
    const size_t row = 8U * 128U * 2U;
    fv_rng_t rng = {14};
    step_t step = {0};
    uint8_t *whole = NULL;

    (void)state;
    step_add(&step, &spec, &rng);
    const size_t n_bytes = fv_attn_case_out_bytes(step.cases[0]);

    step_run(&step, 1);
    assert_int_equal(step_check(&step, "whole"), 0);
    whole = malloc(n_bytes);
    memcpy(whole, step.out[0], n_bytes);
    for (size_t c = 0; c < FV_COUNT(k_chunks); c++) {
        const fv_attn_item_t item = step.items[0];

        memset(step.out[0], 0xff, n_bytes);
        for (int32_t at = 0; at < item.n_tokens;) {
            const int32_t left = item.n_tokens - at;
            fv_attn_item_t chunk = item;

            /* a rest of up to 64 rows would be the lean kernel's */
            chunk.n_tokens = ((left - k_chunks[c]) * item.group <= 64) ? left : k_chunks[c];
            chunk.position += at;
            chunk.kv_end = chunk.position + chunk.n_tokens;
            chunk.q = (const uint8_t *)item.q + (size_t)at * item.q_token_bytes;
            chunk.out = (uint8_t *)item.out + (size_t)at * row;
            chunk.lse = item.lse + (size_t)at * item.lse_token_stride;
            assert_int_equal(k_ops->attend(backend, &chunk, 1), FV_OK);
            assert_int_equal(backend->n_prefills, backend->has_sm90 ? 1 : 0);
            assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
            at += chunk.n_tokens;
        }
        if (backend->has_sm90) {
            assert_memory_equal(whole, step.out[0], n_bytes);
        }
        assert_int_equal(step_check(&step, "chunks"), 0);
    }
    free(whole);
    step_free(&step);
}

/*
 * A thousand tiles in which the maximum rarely moves, with large logits: l and O must then be multiplied by exactly 1, or
 * what a tile errs by grows with the context.
 */
static void test_long(void **state)
{
    fv_rng_t rng = {18};

    (void)state;
    for (int i = 0; i < 4; i++) {
        const bool is_wide = i >= 2;
        fv_attn_spec_t spec =
            spec_of(is_wide ? 128 : 64, is_wide ? 128 : 64,
                    (i % 2 == 0) ? FV_DTYPE_BF16 : FV_DTYPE_F16, 1, 65, quick(131072, 8192));

        spec.n_kv_heads = 1;
        spec.q_amplitude = 6.0F;
        one(&spec, &rng, "long");
    }
}

/* Partial states of each part of a sharded context, some parts empty, merge to the whole. */
static void test_shards(void **state)
{
    fv_rng_t rng = {15};

    (void)state;
    for (uint16_t n_parts = 2; n_parts <= 4; n_parts++) {
        fv_attn_spec_t spec = spec_of(128, 128, FV_DTYPE_BF16, 4, 100, (n_parts == 4) ? 130 : 600);
        step_t step = {0};
        float *parts[4];
        const float *o[4];
        const float *lse[4];

        spec.n_parts = n_parts;
        step_add(&step, &spec, &rng);
        const size_t n_rows = fv_attn_case_rows(step.cases[0]);

        for (uint16_t part = 0; part < n_parts; part++) {
            fv_attn_item_t item = fv_attn_case_item(step.cases[0], part, NULL, NULL);

            parts[part] = malloc(n_rows * 129U * sizeof(float));
            memset(parts[part], 0xff, n_rows * 129U * sizeof(float));
            o[part] = parts[part];
            lse[part] = parts[part] + n_rows * 128U;
            fv_partial_dst_t dst = {0, parts[part], parts[part] + n_rows * 128U};
            item.dst = &dst;
            item.n_dst = 1;
            assert_int_equal(k_ops->attend(backend, &item, 1), FV_OK);
            assert_int_equal(backend->n_prefills, backend->has_sm90 ? 1 : 0);
            assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
        }
        fv_merge_item_t merge = {.n_rows = n_rows,
                                 .n_parts = n_parts,
                                 .head_dim_v = 128,
                                 .io_dtype = FV_DTYPE_BF16,
                                 .o = o,
                                 .lse_log2 = lse,
                                 .row_len = 8,
                                 .out = step.out[0],
                                 .out_token_bytes = 8U * 128U * 2U,
                                 .lse = step.lse[0],
                                 .lse_token_stride = 8};

        assert_int_equal(k_ops->merge(backend, &merge, 1, NULL), FV_OK);
        assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
        assert_int_equal(step_check(&step, "shards"), 0);
        for (uint16_t part = 0; part < n_parts; part++) {
            free(parts[part]);
        }
        step_free(&step);
    }
}

/* The same step again and again: same bits, whoever claims a unit. */
static void test_repeat(void **state)
{
    fv_rng_t rng = {16};
    step_t step = {0};
    uint8_t *first[STEP_MAX];

    (void)state;
    for (int i = 0; i < 4; i++) {
        fv_attn_spec_t spec = spec_of(128, 128, FV_DTYPE_BF16, 4, 200 + 100 * i, 700);

        spec.n_kv_heads = 8;
        step_add(&step, &spec, &rng);
    }
    step_run(&step, 1);
    assert_int_equal(step_check(&step, "repeat"), 0);
    for (size_t i = 0; i < step.n; i++) {
        first[i] = malloc(fv_attn_case_out_bytes(step.cases[i]));
        memcpy(first[i], step.out[i], fv_attn_case_out_bytes(step.cases[i]));
    }
    for (int n = 0; n < quick(200, 2); n++) {
        step_run(&step, 1);
        for (size_t i = 0; i < step.n; i++) {
            assert_memory_equal(first[i], step.out[i], fv_attn_case_out_bytes(step.cases[i]));
        }
    }
    for (size_t i = 0; i < step.n; i++) {
        free(first[i]);
    }
    step_free(&step);
}

/* What the kernel does not have, and steps that are too small for it, go the lean way. */
static void test_rule(void **state)
{
    fv_rng_t rng = {17};

    (void)state;
    for (int i = 0; i < 4; i++) {
        fv_attn_spec_t spec = spec_of((i == 0) ? 80 : 128, (i == 0) ? 80 : 128, FV_DTYPE_BF16, 1,
                                      (i == 1) ? 64 : 65, 100);
        step_t step = {0};

        spec.io_dtype = (i == 2) ? FV_DTYPE_F32 : FV_DTYPE_BF16;
        spec.one_part = false;
        backend->prefill_units_min = (i == 3) ? 3U : 1U;
        step_add(&step, &spec, &rng);
        step_run(&step, 0);
        fv_attn_case_solve(step.cases[0]);
        assert_int_equal(fv_attn_case_check(step.cases[0], step.out[0], step.lse[0], "lean"), 0);
        step_free(&step);
    }
    backend->prefill_units_min = 1;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kernels_and_masks),
        cmocka_unit_test(test_borders),
        cmocka_unit_test(test_ragged),
        cmocka_unit_test(test_random),
        cmocka_unit_test(test_chunks),
        cmocka_unit_test(test_long),
        cmocka_unit_test(test_shards),
        cmocka_unit_test(test_repeat),
        cmocka_unit_test(test_rule),
    };

    if (!fv_backend_cuda_is_visible()) {
        print_message("no GPU: skipped\n");
        return 77;
    }
    return cmocka_run_group_tests(tests, setup, teardown);
}
