/*
 * tile_amx_softmax.c - the softmax of a tile whose weights go on as bf16 parts: tile_simd.h's, made for AMX.
 *
 * Decode path: station 7 of 10, between the two products of tile_amx.c.
 *
 * With 16 rows and more, what there is of each row once (its largest score, its sum, its alpha) is done for 16 of them together:
 * alone, the sums across a vector are a third of the work.
 */
#include "kernels/page_layout.h"
#include "kernels/tile.h"
#include "kernels/tile_amx.h"

#include <immintrin.h>
#include <math.h>

/* 2^f on [-1/2, 1/2], relative error 9e-8: fitted, with 1 at 0 */
#define EXP2_1 6.931470037e-01F
#define EXP2_2 2.402224243e-01F
#define EXP2_3 5.550733581e-02F
#define EXP2_4 9.671512991e-03F
#define EXP2_5 1.326472382e-03F

/*
 * 2^x for x <= 0, as tile_avx512.c has it with a polynomial of one degree less.
 * The clamp's second operand is x, because max returns it when either is NaN.
 */
static inline __m512 exp2_weight(__m512 x)
{
    __m512 y = _mm512_set1_ps(EXP2_5);

    x = _mm512_max_ps(_mm512_set1_ps(-200.0F), x);
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, n);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(EXP2_4));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(EXP2_3));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(EXP2_2));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(EXP2_1));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0F));
    return _mm512_scalef_ps(y, n);
}

/* 32 weights in two bf16 parts: the upper 16 bits, and the rounded rest. NaN stays NaN in both. */
static inline void split_weights(uint16_t *plane, __m512 p0, __m512 p1)
{
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000U);
    __m512 high0 = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(p0), upper));
    __m512 high1 = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(p1), upper));

    _mm512_storeu_si512(plane, (__m512i)_mm512_cvtne2ps_pbh(high1, high0));
    _mm512_storeu_si512(
        plane + FV_AMX_PLANE_ROWS * FV_PAGE_TOKENS,
        (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(p1, high1), _mm512_sub_ps(p0, high0)));
}

/* Lane r of the result: op over the 16 lanes of v[r]. A tree of 15 steps for all, in place of 4 for each. */
#define REDUCE_16(op)                                                                              \
    do {                                                                                           \
        _Pragma("GCC unroll 8") for (size_t i = 0; i < 8U; i++)                                    \
        {                                                                                          \
            v[i] = op(_mm512_unpacklo_ps(v[2U * i], v[2U * i + 1U]),                               \
                      _mm512_unpackhi_ps(v[2U * i], v[2U * i + 1U]));                              \
        }                                                                                          \
        _Pragma("GCC unroll 4") for (size_t i = 0; i < 4U; i++)                                    \
        {                                                                                          \
            v[i] = op(_mm512_shuffle_ps(v[2U * i], v[2U * i + 1U], 0x44),                          \
                      _mm512_shuffle_ps(v[2U * i], v[2U * i + 1U], 0xee));                         \
        }                                                                                          \
        _Pragma("GCC unroll 2") for (size_t i = 0; i < 2U; i++)                                    \
        {                                                                                          \
            v[i] = op(_mm512_shuffle_f32x4(v[2U * i], v[2U * i + 1U], 0x44),                       \
                      _mm512_shuffle_f32x4(v[2U * i], v[2U * i + 1U], 0xee));                      \
        }                                                                                          \
        v[0] = op(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd)); \
    } while (0)

static inline __m512 max_16(__m512 v[FV_AMX_ROWS])
{
    REDUCE_16(_mm512_max_ps);
    return v[0];
}

static inline __m512 sum_16(__m512 v[FV_AMX_ROWS])
{
    REDUCE_16(_mm512_add_ps);
    return v[0];
}

/* Weights of one row, S to P in fp32 and in bf16 parts; returns their sums by lane. base: -m, or 0. */
static inline __m512 weigh_row(fv_tile_block_t *block, size_t r, __m512 scale, __m512 base)
{
    float *s = block->s + r * FV_PAGE_TOKENS;
    __m512 p[4];

#pragma GCC unroll 4
    for (size_t i = 0; i < 4U; i++) {
        p[i] = exp2_weight(_mm512_fmadd_ps(_mm512_loadu_ps(s + 16U * i), scale, base));
        _mm512_storeu_ps(s + 16U * i, p[i]);
    }
    split_weights(block->p_planes + r * FV_PAGE_TOKENS, p[0], p[1]);
    split_weights(block->p_planes + r * FV_PAGE_TOKENS + 32U, p[2], p[3]);
    return _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
}

static inline __m512 row_max(const fv_tile_block_t *block, size_t r)
{
    const float *s = block->s + r * FV_PAGE_TOKENS;

    return _mm512_max_ps(_mm512_max_ps(_mm512_loadu_ps(s), _mm512_loadu_ps(s + 16)),
                         _mm512_max_ps(_mm512_loadu_ps(s + 32), _mm512_loadu_ps(s + 48)));
}

static void softmax_row(fv_tile_block_t *block, size_t r, __m512 scale)
{
    float m_old = block->m[r];
    float m = _mm512_reduce_max_ps(row_max(block, r)) * block->score_scale;

    m = (m_old > m) ? m_old : m;
    /* nothing visible yet: -inf - -inf must not be formed */
    __m512 sums = weigh_row(block, r, scale, _mm512_set1_ps((m == -INFINITY) ? 0.0F : -m));
    block->alpha[r] = (m_old == m) ? 1.0F : exp2f(m_old - m);
    block->l[r] = block->l[r] * block->alpha[r] + _mm512_reduce_add_ps(sums);
    block->m[r] = m;
}

/* 16 rows from r on: what there is of each row once is done for all of them at once. */
static void softmax_16(fv_tile_block_t *block, size_t r, __m512 scale)
{
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    float base[FV_AMX_ROWS];
    __m512 v[FV_AMX_ROWS];

#pragma GCC unroll 16
    for (size_t i = 0; i < FV_AMX_ROWS; i++) {
        v[i] = row_max(block, r + i);
    }
    __m512 m_old = _mm512_loadu_ps(block->m + r);
    __m512 m = _mm512_max_ps(m_old, _mm512_mul_ps(max_16(v), scale)); /* the second, when NaN */
    __mmask16 is_same = _mm512_cmp_ps_mask(m_old, m, _CMP_EQ_OQ);
    __mmask16 is_seen = _mm512_cmp_ps_mask(m, lowest, _CMP_NEQ_UQ);
    __m512 alpha =
        _mm512_mask_blend_ps(is_same, exp2_weight(_mm512_sub_ps(m_old, m)), _mm512_set1_ps(1.0F));
    _mm512_storeu_ps(base, _mm512_maskz_sub_ps(is_seen, _mm512_setzero_ps(), m));
    for (size_t i = 0; i < FV_AMX_ROWS; i++) {
        v[i] = weigh_row(block, r + i, scale, _mm512_set1_ps(base[i]));
    }
    _mm512_storeu_ps(block->l + r,
                     _mm512_fmadd_ps(_mm512_loadu_ps(block->l + r), alpha, sum_16(v)));
    _mm512_storeu_ps(block->alpha + r, alpha);
    _mm512_storeu_ps(block->m + r, m);
}

/* As tile_simd.h has it, and the weights go on as bf16 parts; S becomes P all the same, for who looks at single weights. */
void fv_amx_softmax(fv_tile_block_t *block)
{
    const __m512 scale = _mm512_set1_ps(block->score_scale);
    size_t n_rows = (size_t)block->n_rows;
    size_t r = 0;

    for (; r + FV_AMX_ROWS <= n_rows; r += FV_AMX_ROWS) {
        softmax_16(block, r, scale);
    }
    for (; r < n_rows; r++) {
        softmax_row(block, r, scale);
    }
}
