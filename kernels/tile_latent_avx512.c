/*
 * tile_latent_avx512.c - V [P, dv] out of a latent page's K^T [dk, P], with AVX-512.
 *
 * Decode path: station 7 of 10. Before: attend_cpu.c (scores). After: attend_cpu.c (accumulate).
 *
 * bf16: a tile of K^T is 16 rows of 16 tokens, each a pair of dims (a, b):
 *     row i:  a0 b0 a1 b1 | a2 b2 a3 b3 | ...      tokens 0, 1, 2, 3 ...
 * A shuffle makes pairs of tokens of it, a0 a1 b0 b1 | a2 a3 b2 b3 ...: groups of 64 bits, one for each pair of tokens and
 * pair of dims. Eight rows are then a matrix of 8 x 8 such groups, and its transpose is eight rows of V's tiles.
 */
#include "kernels/page_layout.h"
#include "kernels/tile.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

/* 32 bytes of two rows, four rows apart. */
INLINE __m512i load_halves(const uint8_t *in)
{
    __m512i lower = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(const void *)in));

    return _mm512_inserti64x4(
        lower, _mm256_loadu_si256((const __m256i *)(const void *)(in + 4U * 64U)), 1);
}

/*
 * 8 rows of 4 columns of 64 bits, which lie in r[i] as row i, then row i + 4: out, 4 columns. (The load has done the
 * transpose's last step, on ports that shuffles do not need.)
 */
INLINE void transpose4(const __m512i r[4], uint8_t *out)
{
    const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13); /* lanes 0 and 2 of both */
    const __m512i odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    __m512i a = _mm512_unpacklo_epi64(r[0], r[1]);
    __m512i b = _mm512_unpacklo_epi64(r[2], r[3]);
    __m512i c = _mm512_unpackhi_epi64(r[0], r[1]);
    __m512i d = _mm512_unpackhi_epi64(r[2], r[3]);

    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(a, even, b));
    _mm512_storeu_si512(out + 64, _mm512_permutex2var_epi64(c, even, d));
    _mm512_storeu_si512(out + 128, _mm512_permutex2var_epi64(a, odd, b));
    _mm512_storeu_si512(out + 192, _mm512_permutex2var_epi64(c, odd, d));
}

/* Eight pairs of dims of 16 tokens: in, 8 rows of 64 bytes; out, 8 rows of a tile of V (pairs of tokens). */
INLINE void turn_bf16_half(uint8_t *out, const uint8_t *in)
{
    const __m512i pairs =
        _mm512_broadcast_i32x4(_mm_set_epi8(15, 14, 11, 10, 13, 12, 9, 8, 7, 6, 3, 2, 5, 4, 1, 0));

    for (int half = 0; half < 2; half++) {
        __m512i r[4];

        for (int i = 0; i < 4; i++) {
            r[i] = _mm512_shuffle_epi8(load_halves(in + 64 * i + 32 * half), pairs);
        }
        transpose4(r, out + 256 * half);
    }
}

/* dv % 32 == 0. */
static void turn_bf16(uint8_t *v, const uint8_t *k, size_t dk, size_t dv)
{
    for (size_t d = 0; d < dv; d += 32U) {
        for (size_t j = 0; j < FV_PAGE_TOKENS; j += FV_TILE_COLUMNS) {
            const uint8_t *in = k + 2U * fv_tile_offset(dk, FV_PAGE_TOKENS, d / 2U, j);
            size_t first_pair = j / 2U / FV_TILE_PAIRS * FV_TILE_PAIRS;
            size_t row_bytes = (j / 2U - first_pair) * 64U;

            for (size_t half = 0; half < 2U; half++) {
                size_t at = fv_tile_offset(FV_PAGE_TOKENS, dv, first_pair, d + 16U * half);

                turn_bf16_half(v + 2U * at + row_bytes, in + 512U * half);
            }
        }
    }
}

/* 16 x 16 of 32 bits. */
INLINE void transpose16(__m512i r[16])
{
    __m512i t[16];

    for (int i = 0; i < 16; i += 4) { /* 4 x 4 in each lane: t[i + c], lane l has column 4l + c */
        __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        __m512i b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]);
        __m512i d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);

        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int c = 0; c < 4; c++) { /* 4 x 4 of lanes */
        __m512i a = _mm512_shuffle_i32x4(t[c], t[c + 4], 0x88);
        __m512i b = _mm512_shuffle_i32x4(t[c + 8], t[c + 12], 0x88);
        __m512i d = _mm512_shuffle_i32x4(t[c], t[c + 4], 0xdd);
        __m512i e = _mm512_shuffle_i32x4(t[c + 8], t[c + 12], 0xdd);

        r[c] = _mm512_shuffle_i32x4(a, b, 0x88);
        r[c + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
        r[c + 4] = _mm512_shuffle_i32x4(d, e, 0x88);
        r[c + 12] = _mm512_shuffle_i32x4(d, e, 0xdd);
    }
}

/* dv % 16 == 0; e: bytes of an element, 4 or (fp16) 2. */
INLINE void turn_plain(uint8_t *v, const uint8_t *k, size_t dv, size_t e)
{
    for (size_t d = 0; d < dv; d += 16U) {
        size_t first = d / FV_PANEL_COLUMNS * FV_PANEL_COLUMNS;
        size_t width = fv_piece_columns(dv, first, FV_PANEL_COLUMNS);

        for (size_t j = 0; j < FV_PAGE_TOKENS; j += 16U) {
            uint8_t *out = v + (first * FV_PAGE_TOKENS + j * width + (d - first)) * e;
            __m512i r[16];

            for (size_t i = 0; i < 16U; i++) {
                const uint8_t *in = k + ((d + i) * FV_PAGE_TOKENS + j) * e;

                r[i] = (e == 4U) ? _mm512_loadu_si512(in)
                                 : _mm512_cvtepu16_epi32(
                                       _mm256_loadu_si256((const __m256i *)(const void *)in));
            }
            transpose16(r);
            for (size_t i = 0; i < 16U; i++) {
                if (e == 4U) {
                    _mm512_storeu_si512(out + i * width * e, r[i]);
                } else {
                    _mm256_storeu_si256((__m256i *)(void *)(out + i * width * e),
                                        _mm512_cvtepi32_epi16(r[i]));
                }
            }
        }
    }
}

void fv_tile_latent_v_avx512(fv_tile_block_t *block, const void *k)
{
    size_t dv = (size_t)block->head_dim_v;

    if ((block->kv_dtype == FV_DTYPE_BF16) && ((dv % 32U) == 0U)) {
        turn_bf16(block->v_clean, k, (size_t)block->head_dim_qk, dv);
    } else if ((block->kv_dtype == FV_DTYPE_F32) && ((dv % 16U) == 0U)) {
        turn_plain(block->v_clean, k, dv, 4U);
    } else if ((block->kv_dtype == FV_DTYPE_F16) && ((dv % 16U) == 0U)) {
        turn_plain(block->v_clean, k, dv, 2U);
    } else {
        fv_tile_latent_v(block, k);
    }
}
