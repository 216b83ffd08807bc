/*
 * test_fp8.c - FP8 latents (M9): goldens of e4m3, of a token's 656 bytes, and of a page widened again.
 */
#include "kernels/fp8.h"
#include "kernels/kernels.h"
#include "tests/support/fp8_ref.h"
#include "tests/support/random.h"
#include "tests/support/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void test_goldens(void **state)
{
    static const struct {
        float given;
        uint8_t expected;
    } k_goldens[] = {
        {0.0F, 0x00},      {-0.0F, 0x80},     {1.0F, 0x38},      {-1.0F, 0xb8},
        {448.0F, 0x7e},    {449.0F, 0x7e},    {1e30F, 0x7e},     {-1e30F, 0xfe},
        {464.0F, 0x7e},    {432.0F, 0x7e},    {431.9F, 0x7d},    {0x1p-6F, 0x08},
        {0x1p-9F, 0x01},   {0x1p-10F, 0x00},  {0x1.8p-9F, 0x02}, {0x1.4p-9F, 0x01},
        {0x1.8p-8F, 0x03}, {0x1.cp-7F, 0x07}, {0x1.fp-7F, 0x08}, {1.0625F, 0x38},
        {1.1875F, 0x3a},   {1.07F, 0x39},     {0x1p-149F, 0x00}, {INFINITY, 0x7f},
        {-INFINITY, 0x7f}, {NAN, 0x7f},
    };

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_goldens); i++) {
        if (fv_f32_to_e4m3(k_goldens[i].given) != k_goldens[i].expected) {
            fail_msg("%g: given 0x%02x, expected 0x%02x", (double)k_goldens[i].given,
                     fv_f32_to_e4m3(k_goldens[i].given), k_goldens[i].expected);
        }
    }
    assert_true(fv_e4m3_to_f32(0x7e) == 448.0F);
    assert_true(fv_e4m3_to_f32(0x01) == 0x1p-9F);
    assert_true(fv_e4m3_to_f32(0xc4) == -3.0F);
    assert_true(isnan(fv_e4m3_to_f32(0x7f)) && isnan(fv_e4m3_to_f32(0xff)));
}

static void test_every_value_comes_back(void **state)
{
    fv_random_t random = {.state = fv_random_seed(1)};

    (void)state;
    for (uint32_t i = 0; i < 256U; i++) {
        float value = fv_e4m3_to_f32((uint8_t)i);

        if (!isnan(value)) {
            assert_int_equal(fv_f32_to_e4m3(value), i);
        }
    }
    for (int i = 0; i < 200000; i++) {
        float x = ldexpf(fv_random_unit(&random), (int)fv_random_int(&random, -12, 9));

        assert_true(fv_e4m3_to_f32(fv_f32_to_e4m3(x)) == fv_e4m3_ref(x));
    }
}

/* 128 dims share a scale, each token has its own, and what is not finite spoils its own dim alone. */
static void test_a_token_is_656_bytes(void **state)
{
    static float row[512];
    uint8_t bytes[512];
    float scales[4];

    (void)state;
    for (int d = 0; d < 512; d++) {
        row[d] = (float)((d % 128) - 64) * ((d < 128) ? 1.0F : 0.25F);
    }
    memset(row + 256, 0, 128 * sizeof(float));
    row[400] = NAN;
    row[401] = -INFINITY;
    fv_fp8_quantise(row, 512, bytes, scales);
    assert_true((scales[0] == 64.0F / 448.0F) && (scales[1] == 16.0F / 448.0F));
    assert_true((scales[2] == 0.0F) && (scales[3] == 16.0F / 448.0F));
    assert_int_equal(bytes[0], 0xfe); /* -64 is the largest */
    assert_int_equal(bytes[64], 0x00);
    assert_int_equal(bytes[128], 0xfe);
    assert_int_equal(bytes[256], 0x00);
    assert_int_equal(bytes[384], 0xfe);
    assert_int_equal(bytes[400], 0x7f);
    assert_int_equal(bytes[401], 0x7f);
    assert_int_equal(fv_fp8_token_bytes(512, 64), 656);
}

/* Slots of a page are tokens of their own; plain C and AVX-512 widen it to the same bits. */
static void test_pages(void **state)
{
    enum {
        DV = 256,
        DK = DV + 24
    };
    fv_random_t random = {.state = fv_random_seed(2)};
    uint8_t *page = malloc(64U * fv_fp8_token_bytes(DV, DK - DV));
    float *rows = malloc(64U * DK * sizeof(*rows));
    float *wide = malloc(64U * DK * sizeof(*wide));

    (void)state;
    assert_true((page != NULL) && (rows != NULL) && (wide != NULL));
    for (size_t j = 0; j < 64U; j++) {
        for (size_t d = 0; d < DK; d++) {
            rows[j * DK + d] = ldexpf(fv_random_unit(&random), (int)(j % 9U) - 4);
        }
        rows[j * DK + 3U] = (j == 5U) ? NAN : rows[j * DK + 3U];
        fv_fp8_put(page, DK, DV, j, rows + j * DK);
    }
    fv_fp8_widen(page, DK, DV, wide);
    for (size_t j = 0; j < 64U; j++) {
        fv_fp8_row_ref(rows + j * DK, DK, DV);
        for (size_t d = 0; d < DK; d++) {
            float given = wide[d * 64U + j];
            float expected = rows[j * DK + d];

            assert_true((given == expected) || (isnan(given) && isnan(expected)));
        }
    }
#if defined(FV_KERNELS_X86)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        float *again = malloc(64U * DK * sizeof(*again));

        assert_non_null(again);
        fv_fp8_widen_avx512(page, DK, DV, again);
        for (size_t i = 0; i < (size_t)64 * DK; i++) {
            assert_true((again[i] == wide[i]) || (isnan(again[i]) && isnan(wide[i])));
        }
        free(again);
    }
#endif
    free(page);
    free(rows);
    free(wide);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_goldens),
        cmocka_unit_test(test_every_value_comes_back),
        cmocka_unit_test(test_a_token_is_656_bytes),
        cmocka_unit_test(test_pages),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
