/*
 * test_backend_convert.c - fp16 and bf16 conversions: every 16-bit value, and rounding against fp64 arithmetic.
 */
#include "kernels/kernels.h"
#include "tests/support/attn_case.h"
#include "tests/support/test.h"

#include <math.h>
#include <string.h>

#define N_RANDOM 200000

static float from_bits(uint32_t bits)
{
    float f = 0.0F;

    memcpy(&f, &bits, sizeof(f));
    return f;
}

/* value of an fp16 by its definition */
static double f16_value(uint32_t h)
{
    double sign = ((h & 0x8000U) != 0U) ? -1.0 : 1.0;
    int exponent = (int)((h >> 10U) & 0x1fU);
    double mantissa = (double)(h & 0x3ffU);

    return sign *
           ((exponent == 0) ? ldexp(mantissa, -24) : ldexp(1024.0 + mantissa, exponent - 25));
}

static void test_every_f16(void **state)
{
    (void)state;
    for (uint32_t h = 0; h <= 0xffffU; h++) {
        float f = fv_f16_to_f32((uint16_t)h);

        if ((h & 0x7c00U) == 0x7c00U) {
            assert_int_equal(isnan(f) != 0, (h & 0x3ffU) != 0U);
            assert_int_equal(isnan(fv_f16_to_f32(fv_f32_to_f16(f))) != 0, isnan(f) != 0);
            continue;
        }
        assert_true((double)f == f16_value(h));
        assert_int_equal(fv_f32_to_f16(f), h);
    }
}

static void test_every_bf16(void **state)
{
    (void)state;
    for (uint32_t h = 0; h <= 0xffffU; h++) {
        float f = fv_bf16_to_f32((uint16_t)h);

        if (isnan(f)) {
            assert_true(isnan(fv_bf16_to_f32(fv_f32_to_bf16(f))));
        } else {
            assert_int_equal(fv_f32_to_bf16(f), h);
        }
    }
    assert_true(isnan(fv_bf16_to_f32(fv_f32_to_bf16(from_bits(0x7f800001U)))));
    assert_true(isinf(fv_bf16_to_f32(fv_f32_to_bf16(3.4e38F))));
}

/* |f - round(f)| is at most |f - neighbour| for both neighbours; ties go to the even one. */
static void assert_nearest(float f, uint16_t h, double value, double below, double above)
{
    double error = fabs((double)f - value);
    double other = fmin(fabs((double)f - below), fabs((double)f - above));

    assert_true(error <= other);
    if (error == other) {
        assert_int_equal(h & 1U, 0);
    }
}

static void test_rounding(void **state)
{
    fv_rng_t rng = {fv_test_seed(3)};

    (void)state;
    for (int i = 0; i < N_RANDOM; i++) {
        /* magnitudes of 2^-26 to 2^16: all of fp16's normal and subnormal range; half the time exact ties */
        uint32_t bits = (uint32_t)fv_rng_range(&rng, (127 - 26) << 23, (127 + 15) << 23);
        uint16_t h = 0;
        float f = 0.0F;

        bits = (fv_rng_range(&rng, 0, 1) == 0) ? ((bits & 0xffffe000U) | 0x1000U) : bits;
        f = from_bits(bits);
        h = fv_f32_to_f16(f);
        if (h < 0x7bffU) {
            assert_nearest(f, h, f16_value(h), (h == 0) ? -1.0 : f16_value(h - 1U),
                           f16_value(h + 1U));
        }
        bits = (fv_rng_range(&rng, 0, 1) == 0) ? ((bits & 0xffff0000U) | 0x8000U) : bits;
        f = from_bits(bits);
        h = fv_f32_to_bf16(f);
        assert_nearest(f, h, (double)fv_bf16_to_f32(h), (double)fv_bf16_to_f32((uint16_t)(h - 1U)),
                       (double)fv_bf16_to_f32((uint16_t)(h + 1U)));
    }
    assert_int_equal(fv_f32_to_f16(65519.0F), 0x7bff);
    assert_int_equal(fv_f32_to_f16(65520.0F), 0x7c00);
    assert_int_equal(fv_f32_to_f16(-1e30F), 0xfc00);
    assert_int_equal(fv_f32_to_f16(0x1p-25F), 0);
    assert_int_equal(fv_f32_to_f16(0x1.8p-25F), 1);
}

static void test_rows_equal_elements(void **state)
{
    fv_rng_t rng = {fv_test_seed(5)};
    uint8_t bytes[4 * 37 + 1];
    float row[37];

    (void)state;
    for (int32_t dtype = FV_DTYPE_F32; dtype <= FV_DTYPE_BF16; dtype++) {
        uint8_t *at = bytes + 1; /* any alignment */
        float back[37];

        for (size_t i = 0; i < FV_COUNT(row); i++) {
            row[i] = fv_rng_normal(&rng) * 1000.0F;
        }
        fv_store_row(at, (fv_dtype_t)dtype, row, FV_COUNT(row));
        fv_load_row(back, at, (fv_dtype_t)dtype, FV_COUNT(row));
        for (size_t i = 0; i < FV_COUNT(row); i++) {
            uint8_t one[4];

            fv_store_element(one, (fv_dtype_t)dtype, 0, row[i]);
            assert_memory_equal(one, at + i * fv_dtype_bytes((fv_dtype_t)dtype),
                                fv_dtype_bytes((fv_dtype_t)dtype));
            assert_true(back[i] == fv_load_element(at, (fv_dtype_t)dtype, i));
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_f16),
        cmocka_unit_test(test_every_bf16),
        cmocka_unit_test(test_rounding),
        cmocka_unit_test(test_rows_equal_elements),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
