/*
 * fp8.c - e4m3, and pages of latents in it, in plain C.
 */
#include "kernels/fp8.h"

#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

float fv_e4m3_to_f32(uint8_t byte)
{
    uint32_t exponent = ((uint32_t)byte >> 3U) & 0xfU;
    uint32_t mantissa = (uint32_t)byte & 7U;
    float magnitude = 0.0F;

    if ((byte & 0x7fU) == FV_E4M3_NAN) {
        return NAN;
    }
    magnitude = (exponent == 0U) ? ldexpf((float)mantissa, -9)
                                 : ldexpf((float)(8U + mantissa), (int)exponent - 10);
    return ((byte & 0x80U) != 0U) ? -magnitude : magnitude;
}

void fv_fp8_quantise(const float *row, size_t n, uint8_t *out, float *out_scales)
{
    for (size_t first = 0; first < n; first += FV_FP8_BLOCK) {
        float largest = 0.0F;
        float scale = 0.0F;

        for (size_t d = first; d < first + FV_FP8_BLOCK; d++) {
            float magnitude = fabsf(row[d]);

            largest = (isfinite(magnitude) && (magnitude > largest)) ? magnitude : largest;
        }
        scale = largest / FV_E4M3_MAX;
        for (size_t d = first; d < first + FV_FP8_BLOCK; d++) {
            bool is_zero = (scale == 0.0F) && isfinite(row[d]);

            out[d] = is_zero ? 0U : fv_f32_to_e4m3(row[d] / scale);
        }
        out_scales[first / FV_FP8_BLOCK] = scale;
    }
}

void fv_fp8_put(uint8_t *page, int32_t dk, int32_t dv, size_t slot, const float *row)
{
    uint8_t bytes[FV_DIM_V_MAX];
    float scales[FV_DIM_V_MAX / FV_FP8_BLOCK];
    uint8_t *rope = page + fv_fp8_rope_offset(dv);

    fv_fp8_quantise(row, (size_t)dv, bytes, scales);
    for (size_t d = 0; d < (size_t)dv; d++) {
        page[d * FV_PAGE_TOKENS + slot] = bytes[d];
    }
    for (size_t b = 0; b < (size_t)dv / FV_FP8_BLOCK; b++) {
        memcpy(page + fv_fp8_scales_offset(dv) + (b * FV_PAGE_TOKENS + slot) * sizeof(float),
               &scales[b], sizeof(float));
    }
    for (size_t d = 0; d < (size_t)(dk - dv); d++) {
        fv_store_element(rope, FV_DTYPE_BF16, d * FV_PAGE_TOKENS + slot, row[(size_t)dv + d]);
    }
}

void fv_fp8_widen(const uint8_t *page, int32_t dk, int32_t dv, float *out)
{
    float values[256];

    for (uint32_t i = 0; i < 256U; i++) {
        values[i] = fv_e4m3_to_f32((uint8_t)i);
    }
    for (size_t d = 0; d < (size_t)dv; d++) {
        float scales[FV_PAGE_TOKENS];

        memcpy(scales,
               page + fv_fp8_scales_offset(dv) + d / FV_FP8_BLOCK * FV_PAGE_TOKENS * sizeof(float),
               sizeof(scales));
        for (size_t j = 0; j < FV_PAGE_TOKENS; j++) {
            out[d * FV_PAGE_TOKENS + j] = values[page[d * FV_PAGE_TOKENS + j]] * scales[j];
        }
    }
    fv_load_row(out + (size_t)dv * FV_PAGE_TOKENS, page + fv_fp8_rope_offset(dv), FV_DTYPE_BF16,
                (size_t)(dk - dv) * FV_PAGE_TOKENS);
}
