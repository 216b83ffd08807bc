/*
 * test_backend_merge.c - merging partial states: goldens, empties, IEEE, and the places results go.
 */
#include "kernels/kernels.h"
#include "tests/support/attn_case.h"
#include "tests/support/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define DV    16
#define LN2   0.6931471805599453
#define PARTS 4

static fv_backend_t *backend;

static int open_backend(void **state)
{
    fv_backend_config_t config = {.n_threads = 3, .kv_arena_bytes = 1024};

    (void)state;
    return (fv_backend_cpu.create(&config, &backend) == FV_OK) ? 0 : -1;
}

static int close_backend(void **state)
{
    (void)state;
    fv_backend_cpu.destroy(backend);
    return 0;
}

/* A state whose first two dims are (x, y), the rest 0; weight given by its natural lse. */
typedef struct part {
    float x, y;
    double lse;
} part_t;

/* Merges n states of one row; out [DV]; returns the natural lse. */
static float merge(const part_t *parts, int32_t n, float *out)
{
    float o[PARTS][DV];
    float lse_log2[PARTS];
    const float *o_at[PARTS];
    const float *lse_at[PARTS];
    float lse = 0.0F;
    fv_merge_item_t item;

    memset(o, 0, sizeof(o));
    for (int32_t s = 0; s < n; s++) {
        o[s][0] = parts[s].x;
        o[s][1] = parts[s].y;
        lse_log2[s] = (float)(parts[s].lse / LN2);
        o_at[s] = o[s];
        lse_at[s] = &lse_log2[s];
    }
    memset(&item, 0, sizeof(item));
    item.n_rows = 1;
    item.n_parts = n;
    item.head_dim_v = DV;
    item.io_dtype = FV_DTYPE_F32;
    item.o = o_at;
    item.lse_log2 = lse_at;
    item.row_len = 1;
    item.out = out;
    item.out_token_bytes = DV * sizeof(float);
    item.lse = &lse;
    item.lse_token_stride = 1;
    assert_int_equal(fv_backend_cpu.merge(backend, &item, 1, NULL), FV_OK);
    return lse;
}

static void assert_near(double got, double expected)
{
    if (fabs(got - expected) > 1e-6 * fmax(1.0, fabs(expected))) {
        print_error("got %.9g, expected %.9g\n", got, expected);
        fail();
    }
}

static void test_goldens(void **state)
{
    part_t parts[] = {{1.0F, 0.0F, log(1.0)}, {0.0F, 1.0F, log(3.0)}, {2.0F, 2.0F, log(4.0)}};
    float out[DV];

    (void)state;
    assert_near((double)merge(parts, 2, out), log(4.0));
    assert_near((double)out[0], 0.25);
    assert_near((double)out[1], 0.75);
    assert_true(out[2] == 0.0F);
    assert_near((double)merge(parts, 3, out), log(8.0));
    assert_near((double)out[0], 1.125);
    assert_near((double)out[1], 1.375);
}

static void test_far_apart(void **state)
{
    part_t parts[] = {{3.0F, -7.0F, 1e4}, {NAN, 1.0F, -(double)INFINITY}, {5.0F, 5.0F, -1e4}};
    float out[DV];

    (void)state;
    assert_near((double)merge(parts, 3, out), 1e4);
    assert_true((out[0] == 3.0F) && (out[1] == -7.0F)); /* exactly the first */
}

static void test_empty_parts(void **state)
{
    part_t skipped[] = {{NAN, INFINITY, -(double)INFINITY}, {3.0F, 4.0F, -5.0}};
    part_t all_empty[] = {{NAN, 1.0F, -(double)INFINITY}, {9.0F, 9.0F, -(double)INFINITY}};
    float out[DV];

    (void)state;
    assert_near((double)merge(skipped, 2, out), -5.0);
    assert_true((out[0] == 3.0F) && (out[1] == 4.0F));
    assert_true(isinf(merge(all_empty, 2, out)) && (out[0] == 0.0F) && (out[1] == 0.0F));
}

/* Not an empty part: NaN and +inf follow IEEE, so that a spoiled row stays spoiled. */
static void test_ieee(void **state)
{
    part_t with_nan[] = {{1.0F, 1.0F, (double)NAN}, {3.0F, 4.0F, 0.0}};
    part_t nan_last[] = {{3.0F, 4.0F, 0.0}, {1.0F, 1.0F, (double)NAN}};
    part_t with_inf[] = {{1.0F, 1.0F, (double)INFINITY}, {3.0F, 4.0F, 0.0}};
    float out[DV];

    (void)state;
    assert_true(isnan(merge(with_nan, 2, out)) && isnan(out[0]));
    assert_true(isnan(merge(nan_last, 2, out)) && isnan(out[0]));
    assert_true(isnan(merge(with_inf, 2, out)) && isnan(out[0]));
}

/* Rows [row_base, row_base + n) of a [tokens, row_len] result, enough of them for every thread; bf16. */
static void test_rows_and_conversion(void **state)
{
    enum {
        N_ROWS = 3000,
        ROW_BASE = 5,
        ROW_LEN = 7,
        STRIDE = 9
    };
    size_t out_token_bytes = (size_t)ROW_LEN * DV * 2U + 6U;
    size_t n_tokens = (N_ROWS + ROW_BASE) / ROW_LEN + 1U;
    float *o = malloc(2U * N_ROWS * DV * sizeof(*o));
    float *lse_log2 = malloc(2U * N_ROWS * sizeof(*lse_log2));
    uint8_t *out = calloc(n_tokens, out_token_bytes);
    float *lse = calloc(n_tokens * STRIDE, sizeof(*lse));
    const float *o_at[2] = {o, o + (size_t)N_ROWS * DV};
    const float *lse_at[2] = {lse_log2, lse_log2 + N_ROWS};
    fv_rng_t rng = {fv_test_seed(4)};
    fv_merge_item_t item = {.n_rows = N_ROWS,
                            .n_parts = 2,
                            .head_dim_v = DV,
                            .io_dtype = FV_DTYPE_BF16,
                            .o = o_at,
                            .lse_log2 = lse_at,
                            .row_base = ROW_BASE,
                            .row_len = ROW_LEN,
                            .out = out,
                            .out_token_bytes = out_token_bytes,
                            .lse = lse,
                            .lse_token_stride = STRIDE};

    (void)state;
    for (size_t i = 0; i < 2U * N_ROWS * DV; i++) {
        o[i] = fv_rng_normal(&rng);
    }
    for (size_t i = 0; i < 2U * N_ROWS; i++) {
        lse_log2[i] = fv_rng_normal(&rng) * 10.0F;
    }
    assert_int_equal(fv_backend_cpu.merge(backend, &item, 1, NULL), FV_OK);
    for (size_t i = 0; i < N_ROWS; i++) {
        size_t row = ROW_BASE + i;
        double a = exp2((double)lse_at[0][i]);
        double b = exp2((double)lse_at[1][i]);
        const uint8_t *at = out + row / ROW_LEN * out_token_bytes + row % ROW_LEN * DV * 2U;

        assert_near((double)lse[row / ROW_LEN * STRIDE + row % ROW_LEN], log(a + b));
        for (size_t d = 0; d < DV; d++) {
            double expected =
                (a * (double)o_at[0][i * DV + d] + b * (double)o_at[1][i * DV + d]) / (a + b);
            double got = (double)fv_load_element(at, FV_DTYPE_BF16, d);
            assert_true(fabs(got - expected) <= 0x1p-8 * fabs(expected) + 1e-6);
        }
    }
    free(o);
    free(lse_log2);
    free(out);
    free(lse);
}

static void test_refusals(void **state)
{
    fv_merge_item_t item = {
        .n_rows = 1, .n_parts = 0, .head_dim_v = DV, .io_dtype = 1, .row_len = 1};

    (void)state;
    assert_int_equal(fv_backend_cpu.merge(backend, &item, 1, NULL), FV_ERR_INVALID_ARG);
    item.n_parts = 1;
    assert_int_equal(fv_backend_cpu.merge(backend, &item, 1, NULL), FV_ERR_INVALID_ARG);
    item.n_rows = 0;
    assert_int_equal(fv_backend_cpu.merge(backend, &item, 1, NULL), FV_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_goldens),     cmocka_unit_test(test_far_apart),
        cmocka_unit_test(test_empty_parts), cmocka_unit_test(test_ieee),
        cmocka_unit_test(test_refusals),    cmocka_unit_test(test_rows_and_conversion),
    };

    return cmocka_run_group_tests(tests, open_backend, close_backend);
}
