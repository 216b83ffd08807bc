/*
 * tile_avx2.c - tile_simd.h on AVX2 with FMA and F16C: 8 lanes, 6 x 2 vectors of C in registers.
 *
 * Decode path: station 7 of 10. Before: attend_cpu.c. After: attend_cpu.c.
 */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

typedef __m256 vec_t;

#define VEC_W  8
#define VEC_NV 2
#define VEC_NR 6
#define INLINE static inline __attribute__((always_inline))

INLINE vec_t vec_zero(void)
{
    return _mm256_setzero_ps();
}

INLINE vec_t vec_set1(float x)
{
    return _mm256_set1_ps(x);
}

INLINE vec_t vec_load(const float *p)
{
    return _mm256_loadu_ps(p);
}

INLINE void vec_store(float *p, vec_t x)
{
    _mm256_storeu_ps(p, x);
}

INLINE vec_t vec_add(vec_t a, vec_t b)
{
    return _mm256_add_ps(a, b);
}

INLINE vec_t vec_sub(vec_t a, vec_t b)
{
    return _mm256_sub_ps(a, b);
}

INLINE vec_t vec_mul(vec_t a, vec_t b)
{
    return _mm256_mul_ps(a, b);
}

INLINE vec_t vec_div(vec_t a, vec_t b)
{
    return _mm256_div_ps(a, b);
}

INLINE vec_t vec_fma(vec_t a, vec_t b, vec_t c)
{
    return _mm256_fmadd_ps(a, b, c);
}

INLINE vec_t vec_max(vec_t a, vec_t b)
{
    return _mm256_max_ps(a, b);
}

INLINE vec_t vec_small(vec_t x, float limit, vec_t a, vec_t b)
{
    vec_t magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0F), x);

    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(magnitude, _mm256_set1_ps(limit), _CMP_LT_OQ));
}

INLINE float vec_hmax(vec_t x)
{
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));

    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    y = _mm_max_ss(y, _mm_movehdup_ps(y));
    return _mm_cvtss_f32(y);
}

INLINE float vec_hsum(vec_t x)
{
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));

    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    y = _mm_add_ss(y, _mm_movehdup_ps(y));
    return _mm_cvtss_f32(y);
}

INLINE vec_t vec_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}

/* 8 interleaved pairs: a bf16 is the upper half of its fp32. */
INLINE vec_t vec_bf16_even(const uint8_t *p)
{
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p), 16));
}

INLINE vec_t vec_bf16_odd(const uint8_t *p)
{
    return _mm256_castsi256_ps(_mm256_and_si256(
        _mm256_loadu_si256((const __m256i *)(const void *)p), _mm256_set1_epi32((int)0xffff0000U)));
}

/*
 * 2^x: as in tile_avx512.c, but 2^n is built in the exponent field: below 2^-126 the result is 0 (no subnormals),
 * above 2^127 it stays there (only tanh goes so far, and is 1 by then).
 */
INLINE vec_t vec_exp2(vec_t x)
{
    vec_t is_zero = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0F), _CMP_LT_OQ);
    vec_t y = _mm256_set1_ps(1.535336188319500e-4F);
    vec_t n;
    vec_t f;
    __m256i exponent;

    x = _mm256_max_ps(_mm256_set1_ps(-126.0F), x);
    x = _mm256_min_ps(_mm256_set1_ps(127.0F), x);
    n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    f = _mm256_sub_ps(x, n);
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(1.339887440266574e-3F));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(9.618437357674640e-3F));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(5.550332471162809e-2F));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(2.402264791363012e-1F));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(6.931472028550421e-1F));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(1.0F));
    exponent =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    y = _mm256_mul_ps(y, _mm256_castsi256_ps(exponent));
    return _mm256_andnot_ps(is_zero, y);
}

#include "kernels/fp8.h"
#include "kernels/tile_simd.h"

const fv_tile_ops_t fv_tile_avx2 = {
    .name = "avx2",
    .macs_per_ns = 20,
    .begin = NULL,
    .scores = simd_scores,
    .softcap = simd_softcap,
    .softmax = simd_softmax,
    .accumulate = simd_accumulate,
    .latent_v = fv_tile_latent_v,
    .widen_fp8 = fv_fp8_widen,
    .end = NULL,
};
