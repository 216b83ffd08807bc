/*
 * fp8.h - latents in FP8: e4m3 values with a scale for each 128 dims of a token. Private to kernels/.
 *
 * e4m3 (OCP 8-bit floating point, "e4m3fn"): sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities; 0x7f and 0xff
 * are NaN; the largest value is 448, the smallest above 0 is 2^-9.
 *
 * A token's 128 dims x are stored as q = e4m3(x / scale), scale = max |x| / 448 in fp32 (FlashMLA's FP8 cache), and read as
 * q * scale in fp32. Only finite values count for the maximum. What is not finite is stored as NaN, so that it spoils
 * the rows that see it as it does in every other cache. A block of zeros (and what is too small for a scale) has
 * scale 0 and values 0.
 */
#ifndef FV_KERNELS_FP8_H
#define FV_KERNELS_FP8_H

#include "common/model.h"
#include "common/policy.h"

#include <math.h>
#include <string.h>

#define FV_E4M3_MAX 448.0F
#define FV_E4M3_NAN 0x7fU

#define FV_LATENT_FP8 \
    4 /* fv_lean_launch_t.kind of latents in FP8, which is none of fv_lean_kind_t */

/* To nearest, ties to even; beyond 448 saturates; infinities and NaN become 0x7f. The GPU has the same code, so the same bits. */
static inline FV_HD uint8_t fv_f32_to_e4m3(float f)
{
    const float magnitude = fabsf(f);
    uint32_t sign = 0;
    uint32_t bits = 0;

    memcpy(&sign, &f, sizeof(sign));
    sign = (sign >> 24U) & 0x80U;
    memcpy(&bits, &magnitude, sizeof(bits));
    if (bits >=
        0x7f800000U) { /* without its sign: who computed a NaN decides that, and not alike */
        return FV_E4M3_NAN;
    }
    if (magnitude >= FV_E4M3_MAX) {
        return (uint8_t)(sign | (FV_E4M3_NAN - 1U));
    }
    if (magnitude < 0x1p-6F) { /* subnormal: the fp32 adder rounds to a multiple of 2^-9 */
        const float shifted = magnitude + 0x1p14F;

        memcpy(&bits, &shifted, sizeof(bits));
        return (uint8_t)(sign | (bits & 0xfU)); /* 8 is the smallest normal */
    }
    bits += 0x7ffffU + ((bits >> 20U) & 1U);
    return (uint8_t)(sign | ((bits >> 20U) - (120U << 3U)));
}

float fv_e4m3_to_f32(uint8_t byte); /* exact */

/* n dims, a multiple of FV_FP8_BLOCK, of one token, and n / FV_FP8_BLOCK scales. */
void fv_fp8_quantise(const float *row, size_t n, uint8_t *out, float *out_scales);

/*
 * A page, on CPUs and GPUs: K^T of the latent [dv, P] bytes, scales [dv / FV_FP8_BLOCK, P] fp32, RoPE key [dk - dv, P] bf16,
 * plain rows each.
 */
static inline FV_HD size_t fv_fp8_scales_offset(int32_t dv)
{
    return (size_t)dv * FV_PAGE_TOKENS;
}

static inline FV_HD size_t fv_fp8_rope_offset(int32_t dv)
{
    return fv_fp8_scales_offset(dv) + (size_t)(dv / FV_FP8_BLOCK) * FV_PAGE_TOKENS * sizeof(float);
}

/* One token's row [dk] into slot `slot` of a page. */
void fv_fp8_put(uint8_t *page, int32_t dk, int32_t dv, size_t slot, const float *row);

/* A page as one in fp32 has it: K^T [dk, P]. Slots without a token come along as they are. */
void fv_fp8_widen(const uint8_t *page, int32_t dk, int32_t dv, float *out);
#if defined(FV_KERNELS_X86)
void fv_fp8_widen_avx512(const uint8_t *page,
                         int32_t dk,
                         int32_t dv,
                         float *out); /* fp8_avx512.c */
#endif

#endif /* FV_KERNELS_FP8_H */
