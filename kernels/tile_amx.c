/*
 * tile_amx.c - one tile on AMX: bf16 KV with dk % 32 == 0 and dv % 16 == 0; the rest is AVX-512's.
 *
 * Decode path: station 7 of 10. Before: attend_cpu.c. After: attend_cpu.c.
 *
 * A tile product is [16 rows, 32] x [32, 16 columns] bf16 -> fp32. B comes straight from the page, which is made of
 * such operands. A must be bf16 too, and no precision is lost for it: Q is cut into as many bf16
 * parts as its dtype needs to be exact (1 bf16, 2 fp16, 3 fp32), the weights P into two (error 2^-17); each part is one
 * more product into the same fp32 accumulators.
 *
 *     up to 16 rows:  0..3 C (four column blocks of 16)   4..6 A (parts)   7 B
 *     more:           0..3 C (two row blocks by two column blocks)   4, 5 A   6, 7 B
 *
 * A product takes 16 cycles and its result is there after 52: four into different C keep the unit busy, two in a row into the
 * same C do not. So with many rows the parts of A come one after the other, each for all four C; and a B serves two of them.
 *
 * Rows of A, and so of C, never mix, and neither do columns: rows beyond n_rows compute garbage that nobody reads. The unit
 * treats subnormals as zero. Tile loads and stores are invisible to the compiler; the signal fences keep ordinary
 * stores on their side of them.
 */
#include "kernels/tile_amx.h"

#include "kernels/fp8.h"
#include "kernels/kernels.h"
#include "kernels/page_layout.h"
#include "kernels/tile.h"

#include <immintrin.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#define TILE_K     32 /* bf16 elements of a row of A */
#define C_TILES    4
#define TILE_BYTES 1024 /* of B: 16 row pairs of 16 columns, one after another in the page */

typedef struct tile_config {
    uint8_t palette, start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t n_rows[16];
} tile_config_t;

_Static_assert(sizeof(tile_config_t) == 64, "layout of ldtilecfg");

/* A and C have as many rows as there are queries, up to 16: fewer rows take less time. */
static void configure(int32_t n_rows)
{
    tile_config_t config;
    uint8_t rows = (n_rows < FV_AMX_ROWS) ? (uint8_t)n_rows : FV_AMX_ROWS;

    memset(&config, 0, sizeof(config));
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.n_rows[i] = (i == 7) ? FV_AMX_ROWS : rows;
    }
    atomic_signal_fence(memory_order_seq_cst);
    _tile_loadconfig(&config);
}

/*
 * The query in bf16 parts: each takes the upper 16 bits of what is left, so that fp32 fits three parts exactly.
 * What is left of an infinity is 0, not inf - inf.
 */
static void amx_begin(fv_tile_block_t *block)
{
    size_t n = (size_t)block->n_rows * (size_t)block->head_dim_qk;
    size_t plane = FV_AMX_PLANE_ROWS * (size_t)block->head_dim_qk;
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000U);
    const __m512 infinity = _mm512_set1_ps((float)INFINITY);

    for (size_t i = 0; i < n; i += 16U) {
        __m512 rest = _mm512_loadu_ps(block->q + i);

        for (size_t part = 0; part < (size_t)block->n_q_planes; part++) {
            __m512i bits = _mm512_and_si512(_mm512_castps_si512(rest), upper);
            __m512 high = _mm512_castsi512_ps(bits);
            __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(high), infinity, _CMP_NEQ_UQ);

            _mm256_storeu_si256((__m256i *)(void *)(block->q_planes + part * plane + i),
                                _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
            rest = _mm512_maskz_sub_ps(finite, rest, high);
        }
    }
    configure(block->n_rows);
}

static void amx_end(void)
{
    _tile_release(); /* so that the kernel need not save 8 KiB at every switch */
}

static void zero_c(void)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static void load_c(const float *c, long stride, int n_tiles)
{
    _tile_loadd(0, c, stride);
    if (n_tiles > 1) {
        _tile_loadd(1, c + 16, stride);
    }
    if (n_tiles > 2) {
        _tile_loadd(2, c + 32, stride);
    }
    if (n_tiles > 3) {
        _tile_loadd(3, c + 48, stride);
    }
}

static void store_c(float *c, long stride, int n_tiles)
{
    _tile_stored(0, c, stride);
    if (n_tiles > 1) {
        _tile_stored(1, c + 16, stride);
    }
    if (n_tiles > 2) {
        _tile_stored(2, c + 32, stride);
    }
    if (n_tiles > 3) {
        _tile_stored(3, c + 48, stride);
    }
}

/* C[i] += every part of A times B. */
#define STEP_C(i)                                     \
    do {                                              \
        if ((i) < n_tiles) {                          \
            _tile_loadd(7, b + TILE_BYTES * (i), 64); \
            _tile_dpbf16ps(i, 4, 7);                  \
            if (n_parts > 1) {                        \
                _tile_dpbf16ps(i, 5, 7);              \
            }                                         \
            if (n_parts > 2) {                        \
                _tile_dpbf16ps(i, 6, 7);              \
            }                                         \
        }                                             \
    } while (0)

/* One 32-deep step: A parts are `plane` elements apart, B has n_tiles column blocks. */
static void
step(const uint16_t *a, size_t plane, long a_stride, int n_parts, const uint8_t *b, int n_tiles)
{
    _tile_loadd(4, a, a_stride);
    if (n_parts > 1) {
        _tile_loadd(5, a + plane, a_stride);
    }
    if (n_parts > 2) {
        _tile_loadd(6, a + 2U * plane, a_stride);
    }
    STEP_C(0);
    STEP_C(1);
    STEP_C(2);
    STEP_C(3);
}

/* ------------------------------------------------------------------ two row blocks at once */

/* A of rows [row, row + 32): parts `plane` elements apart, rows of `stride` bytes. */
typedef struct pair_a {
    const uint16_t *a;
    size_t plane, second; /* elements: between parts; to the second row block */
    long stride;
    int n_parts;
} pair_a_t;

/* One 32-deep step of two row blocks by two column blocks (or one): B's are TILE_BYTES apart. */
static inline void pair_step(const pair_a_t *p, size_t k, const uint8_t *b, bool is_wide)
{
    const uint16_t *a = p->a + k;

    _tile_loadd(6, b, 64);
    if (is_wide) {
        _tile_loadd(7, b + TILE_BYTES, 64);
    }
    for (int part = 0; part < p->n_parts; part++) {
        _tile_loadd(4, a, p->stride);
        _tile_loadd(5, a + p->second, p->stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (is_wide) {
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        a += p->plane;
    }
}

static inline void pair_load_c(const float *c, long stride, size_t second, bool is_wide)
{
    _tile_loadd(0, c, stride);
    _tile_loadd(2, c + second, stride);
    if (is_wide) {
        _tile_loadd(1, c + 16, stride);
        _tile_loadd(3, c + second + 16, stride);
    }
}

static inline void pair_store_c(float *c, long stride, size_t second, bool is_wide)
{
    _tile_stored(0, c, stride);
    _tile_stored(2, c + second, stride);
    if (is_wide) {
        _tile_stored(1, c + 16, stride);
        _tile_stored(3, c + second + 16, stride);
    }
}

/* Rows [0, n_rows) in pairs of blocks: of a pair of column blocks all rows, while its B's are in the first cache. */
static void pair_scores(const fv_tile_block_t *block, size_t n_rows, const uint8_t *k)
{
    size_t dk = (size_t)block->head_dim_qk;

    for (size_t column = 0; column < FV_PAGE_TOKENS; column += 32U) {
        const uint8_t *b = k + column / 16U * TILE_BYTES;

        for (size_t row = 0; row < n_rows; row += 2U * FV_AMX_ROWS) {
            pair_a_t a = {.a = block->q_planes + row * dk,
                          .plane = FV_AMX_PLANE_ROWS * dk,
                          .second = FV_AMX_ROWS * dk,
                          .stride = (long)(dk * 2U),
                          .n_parts = block->n_q_planes};

            zero_c();
            for (size_t d = 0; d < dk; d += TILE_K) {
                pair_step(&a, d, b + d * FV_PAGE_TOKENS * 2U, true);
            }
            pair_store_c(block->s + row * FV_PAGE_TOKENS + column, FV_PAGE_TOKENS * 4,
                         (size_t)FV_AMX_ROWS * FV_PAGE_TOKENS, true);
        }
    }
}

static void pair_accumulate(const fv_tile_block_t *block, size_t n_rows, const uint8_t *v)
{
    size_t dv = (size_t)block->head_dim_v;
    size_t o_stride = (size_t)block->o_stride;

    for (size_t d = 0; d < dv; d += 32U) {
        bool is_wide = dv - d >= 32U;

        for (size_t row = 0; row < n_rows; row += 2U * FV_AMX_ROWS) {
            pair_a_t a = {.a = block->p_planes + row * FV_PAGE_TOKENS,
                          .plane = FV_AMX_PLANE_ROWS * FV_PAGE_TOKENS,
                          .second = (size_t)FV_AMX_ROWS * FV_PAGE_TOKENS,
                          .stride = FV_PAGE_TOKENS * 2,
                          .n_parts = FV_P_PLANES};
            float *o = block->o + row * o_stride + d;

            pair_load_c(o, (long)(o_stride * 4U), FV_AMX_ROWS * o_stride, is_wide);
            for (size_t j = 0; j < FV_PAGE_TOKENS; j += TILE_K) {
                pair_step(&a, j, v + 2U * fv_tile_offset(FV_PAGE_TOKENS, dv, j / 2U, d), is_wide);
            }
            pair_store_c(o, (long)(o_stride * 4U), FV_AMX_ROWS * o_stride, is_wide);
        }
    }
}

/* Rows that pairs of blocks take; at most FV_AMX_ROWS are left. */
static size_t rows_in_pairs(size_t n_rows)
{
    size_t rest = n_rows % (2U * FV_AMX_ROWS);

    return (rest > FV_AMX_ROWS) ? (n_rows + 2U * FV_AMX_ROWS - rest) : (n_rows - rest);
}

/* ------------------------------------------------------------------ the table's functions */

static void amx_scores(fv_tile_block_t *block, const void *k)
{
    size_t dk = (size_t)block->head_dim_qk;
    size_t n_rows = (size_t)block->n_rows;
    size_t n_pairs = rows_in_pairs(n_rows);

    atomic_signal_fence(memory_order_seq_cst);
    pair_scores(block, n_pairs, k);
    for (size_t row = n_pairs; row < n_rows; row += FV_AMX_ROWS) {
        zero_c();
        for (size_t d = 0; d < dk; d += TILE_K) {
            step(block->q_planes + row * dk + d, FV_AMX_PLANE_ROWS * dk, (long)(dk * 2U),
                 block->n_q_planes, (const uint8_t *)k + d * FV_PAGE_TOKENS * 2U, C_TILES);
        }
        store_c(block->s + row * FV_PAGE_TOKENS, FV_PAGE_TOKENS * 4, C_TILES);
    }
    atomic_signal_fence(memory_order_seq_cst);
}

static void scale_rows(fv_tile_block_t *block)
{
    for (size_t r = 0; r < (size_t)block->n_rows; r++) {
        float *o = block->o + r * (size_t)block->o_stride;
        __m512 alpha = _mm512_set1_ps(block->alpha[r]);

        if (block->alpha[r] == 1.0F) {
            continue;
        }
        for (size_t d = 0; d < (size_t)block->o_stride; d += 16U) {
            _mm512_storeu_ps(o + d, _mm512_mul_ps(_mm512_loadu_ps(o + d), alpha));
        }
    }
}

static void amx_accumulate(fv_tile_block_t *block, const void *v)
{
    size_t dv = (size_t)block->head_dim_v;
    long o_bytes = (long)block->o_stride * 4;

    size_t n_rows = (size_t)block->n_rows;
    size_t n_pairs = rows_in_pairs(n_rows);

    scale_rows(block);
    atomic_signal_fence(memory_order_seq_cst);
    pair_accumulate(block, n_pairs, v);
    for (size_t row = n_pairs; row < n_rows; row += FV_AMX_ROWS) {
        for (size_t d = 0; d < dv; d += 16U * C_TILES) {
            int n_tiles = (dv - d >= 16U * C_TILES) ? C_TILES : (int)((dv - d) / 16U);
            float *o = block->o + row * (size_t)block->o_stride + d;

            load_c(o, o_bytes, n_tiles);
            for (size_t j = 0; j < FV_PAGE_TOKENS; j += TILE_K) {
                step(block->p_planes + row * FV_PAGE_TOKENS + j, FV_AMX_PLANE_ROWS * FV_PAGE_TOKENS,
                     FV_PAGE_TOKENS * 2, FV_P_PLANES,
                     (const uint8_t *)v + 2U * fv_tile_offset(FV_PAGE_TOKENS, dv, j / 2U, d),
                     n_tiles);
            }
            store_c(o, o_bytes, n_tiles);
        }
    }
    atomic_signal_fence(memory_order_seq_cst);
}

static void amx_softcap(fv_tile_block_t *block)
{
    fv_tile_avx512.softcap(block);
}

const fv_tile_ops_t fv_tile_amx = {
    .name = "amx",
    .macs_per_ns = 300,
    .begin = amx_begin,
    .scores = amx_scores,
    .softcap = amx_softcap,
    .softmax = fv_amx_softmax,
    .accumulate = amx_accumulate,
    .latent_v = fv_tile_latent_v_avx512,
    .widen_fp8 = fv_fp8_widen_avx512,
    .end = amx_end,
};
