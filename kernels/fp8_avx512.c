/*
 * fp8_avx512.c - a page of FP8 latents widened to fp32, with AVX-512.
 *
 * Decode path: station 7 of 10. Before: attend_cpu.c. After: attend_cpu.c.
 *
 * Shifted into place, the bits of an e4m3 are those of an fp16 that is 2^-8 of it, subnormals included: the hardware
 * widens that exactly, and the scale takes the 2^8 along. NaN alone has other bits, and is put in.
 */
#include "kernels/fp8.h"
#include "kernels/kernels.h"

#include <immintrin.h>
#include <math.h>

/* 16 values times 16 scales, which have the 2^8 in them. */
static inline __m512 widen16(const uint8_t *at, __m512 scales)
{
    __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(const void *)at));
    __m256i magnitude = _mm256_and_si256(bytes, _mm256_set1_epi16(0x7f));
    __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(0x80)), 8);
    __mmask16 is_nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(FV_E4M3_NAN));
    __m512 value = _mm512_cvtph_ps(_mm256_or_si256(sign, _mm256_slli_epi16(magnitude, 7)));

    return _mm512_mask_mov_ps(_mm512_mul_ps(value, scales), is_nan, _mm512_set1_ps(NAN));
}

void fv_fp8_widen_avx512(const uint8_t *page, int32_t dk, int32_t dv, float *out)
{
    for (size_t j = 0; j < FV_PAGE_TOKENS; j += 16U) {
        for (size_t b = 0; b < (size_t)dv / FV_FP8_BLOCK; b++) {
            const uint8_t *at =
                page + fv_fp8_scales_offset(dv) + (b * FV_PAGE_TOKENS + j) * sizeof(float);
            __m512 scales = _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(256.0F));

            for (size_t d = b * FV_FP8_BLOCK; d < (b + 1U) * FV_FP8_BLOCK; d++) {
                _mm512_storeu_ps(out + d * FV_PAGE_TOKENS + j,
                                 widen16(page + d * FV_PAGE_TOKENS + j, scales));
            }
        }
    }
    fv_load_row(out + (size_t)dv * FV_PAGE_TOKENS, page + fv_fp8_rope_offset(dv), FV_DTYPE_BF16,
                (size_t)(dk - dv) * FV_PAGE_TOKENS);
}
