/*
 * fp8_ref.h - what a cache of FP8 latents holds of a row, by definition and not by bits (kernels/fp8.h has the kernels').
 */
#ifndef FV_TESTS_SUPPORT_FP8_REF_H
#define FV_TESTS_SUPPORT_FP8_REF_H

#include "kernels/kernels.h"

#include <math.h>

/* The nearest e4m3: a multiple of the step at x's size, ties to even, at most 448; NaN where x is not finite. */
static inline float fv_e4m3_ref(float x)
{
    double magnitude = fabs((double)x);
    int exponent = 0;

    if (!isfinite(x)) {
        return NAN;
    }
    (void)frexp(magnitude, &exponent); /* in [2^(exponent - 1), 2^exponent) */
    double step = ldexp(1.0, ((exponent - 1 < -6) ? -6 : (exponent - 1)) - 3);
    double rounded = nearbyint(magnitude / step) * step;
    return (float)copysign((rounded > 448.0) ? 448.0 : rounded, (double)x);
}

/* A row [dk] becomes what is read of it again: dims [0, dv) by 128 with a scale each, the rest bf16. */
static inline void fv_fp8_row_ref(float *row, size_t dk, size_t dv)
{
    for (size_t first = 0; first < dv; first += 128U) {
        float largest = 0.0F;

        for (size_t d = first; d < first + 128U; d++) {
            largest = isfinite(row[d]) ? fmaxf(largest, fabsf(row[d])) : largest;
        }
        float scale = largest / 448.0F;
        for (size_t d = first; d < first + 128U; d++) {
            bool is_zero = isfinite(row[d]) && (scale <= 0.0F);

            row[d] = is_zero ? 0.0F : (fv_e4m3_ref(row[d] / scale) * scale);
        }
    }
    for (size_t d = dv; d < dk; d++) {
        row[d] = fv_bf16_to_f32(fv_f32_to_bf16(row[d]));
    }
}

#endif /* FV_TESTS_SUPPORT_FP8_REF_H */
