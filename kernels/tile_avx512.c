/*
 * tile_avx512.c - tile_simd.h on AVX-512 (F, BW, DQ, VL): 16 lanes, 6 x 4 vectors of C in registers.
 *
 * Decode path: station 7 of 10. Before: attend_cpu.c. After: attend_cpu.c.
 */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

typedef __m512 vec_t;

#define VEC_W  16
#define VEC_NV 4
#define VEC_NR 6
#define INLINE static inline __attribute__((always_inline))

INLINE vec_t vec_zero(void)
{
    return _mm512_setzero_ps();
}

INLINE vec_t vec_set1(float x)
{
    return _mm512_set1_ps(x);
}

INLINE vec_t vec_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

INLINE void vec_store(float *p, vec_t x)
{
    _mm512_storeu_ps(p, x);
}

INLINE vec_t vec_add(vec_t a, vec_t b)
{
    return _mm512_add_ps(a, b);
}

INLINE vec_t vec_sub(vec_t a, vec_t b)
{
    return _mm512_sub_ps(a, b);
}

INLINE vec_t vec_mul(vec_t a, vec_t b)
{
    return _mm512_mul_ps(a, b);
}

INLINE vec_t vec_div(vec_t a, vec_t b)
{
    return _mm512_div_ps(a, b);
}

INLINE vec_t vec_fma(vec_t a, vec_t b, vec_t c)
{
    return _mm512_fmadd_ps(a, b, c);
}

INLINE vec_t vec_max(vec_t a, vec_t b)
{
    return _mm512_max_ps(a, b);
}

INLINE vec_t vec_small(vec_t x, float limit, vec_t a, vec_t b)
{
    __mmask16 is_small = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(limit), _CMP_LT_OQ);

    return _mm512_mask_blend_ps(is_small, b, a);
}

INLINE float vec_hmax(vec_t x)
{
    return _mm512_reduce_max_ps(x);
}

INLINE float vec_hsum(vec_t x)
{
    return _mm512_reduce_add_ps(x);
}

INLINE vec_t vec_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

/* 16 interleaved pairs: a bf16 is the upper half of its fp32. */
INLINE vec_t vec_bf16_even(const uint8_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}

INLINE vec_t vec_bf16_odd(const uint8_t *p)
{
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000U)));
}

/*
 * 2^x: x = n + f, f in [-1/2, 1/2], Cephes' polynomial for 2^f (error 2e-7), scaled by 2^n, which underflows to
 * 0 and overflows to inf by itself. -inf is clamped first: -inf - -inf would be NaN. The clamp's second operand
 * is x, because max and min return it when either is NaN.
 */
INLINE vec_t vec_exp2(vec_t x)
{
    vec_t n;
    vec_t f;
    vec_t y = _mm512_set1_ps(1.535336188319500e-4F);

    x = _mm512_max_ps(_mm512_set1_ps(-200.0F), x);
    x = _mm512_min_ps(_mm512_set1_ps(200.0F), x);
    n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    f = _mm512_sub_ps(x, n);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.339887440266574e-3F));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.618437357674640e-3F));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.550332471162809e-2F));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.402264791363012e-1F));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.931472028550421e-1F));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0F));
    return _mm512_scalef_ps(y, n);
}

#include "kernels/fp8.h"
#include "kernels/tile_simd.h"

const fv_tile_ops_t fv_tile_avx512 = {
    .name = "avx512",
    .macs_per_ns = 40,
    .begin = NULL,
    .scores = simd_scores,
    .softcap = simd_softcap,
    .softmax = simd_softmax,
    .accumulate = simd_accumulate,
    .latent_v = fv_tile_latent_v_avx512,
    .widen_fp8 = fv_fp8_widen_avx512,
    .end = NULL,
};
