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

#define FV_E4M3_MAX 448.0F
#define FV_E4M3_NAN 0x7fU

/* To nearest, ties to even; beyond 448 saturates; infinities and NaN become NaN. */
uint8_t fv_f32_to_e4m3(float f);
float fv_e4m3_to_f32(uint8_t byte); /* exact */

/* n dims, a multiple of FV_FP8_BLOCK, of one token, and n / FV_FP8_BLOCK scales. */
void fv_fp8_quantise(const float *row, size_t n, uint8_t *out, float *out_scales);

/*
 * A page: K^T of the latent [dv, P] bytes, scales [dv / FV_FP8_BLOCK, P] fp32, RoPE key [dk - dv, P] bf16, plain rows each.
 */
static inline size_t fv_fp8_scales_offset(int32_t dv)
{
    return (size_t)dv * FV_PAGE_TOKENS;
}

static inline size_t fv_fp8_rope_offset(int32_t dv)
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
