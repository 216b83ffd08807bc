/*
 * tile_simd.h - one tile of attention with SIMD, written once. Included by tile_avx512.c and tile_avx2.c only.
 *
 * Decode path: station 7 of 10. Before: attend_cpu.c. After: attend_cpu.c.
 *
 * S = Q K^T and O = alpha O + P V are the same product C = A B with B straight from the page (page_layout.h),
 * so one kernel does both. It holds a block of C, VEC_NR rows by VEC_NV vectors, in registers; each vector of B is loaded
 * and widened once for all rows of the block (this is what makes grouped heads cheap):
 *
 *     for k:  b[0..nv) = widen(B[k, columns]);  for r:  acc[r][v] += broadcast(A[r, k]) * b[v]
 *
 * With many rows (prefill) the page is widened to fp32 once and every row block reads that. Columns are worked in
 * whole vectors: where dv is not a multiple of VEC_W the last vector reads on into the next row (or the slack behind
 * the page) and its surplus lanes land in the padding of O, which nobody reads.
 *
 * The including file defines vec_t, VEC_W (lanes), VEC_NV, VEC_NR, and the static functions vec_zero, vec_set1,
 * vec_load, vec_store, vec_add, vec_sub, vec_mul, vec_div, vec_fma(a, b, c) = a b + c, vec_max(a, b) (b when either
 * is NaN), vec_small(x, limit, a, b) = |x| < limit ? a : b, vec_exp2, vec_hmax, vec_hsum, vec_f16, vec_bf16_even,
 * vec_bf16_odd. Each must carry NaN through.
 */
#include "kernels/kernels.h"
#include "kernels/page_layout.h"
#include "kernels/tile.h"

#include <math.h>
#include <stdbool.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define WIDEN_ROWS    (2 * VEC_NR) /* more rows than this: widen the page first */
#define S_VECS        (FV_PAGE_TOKENS / VEC_W)

/* C [n_rows, n_columns] = (alpha C, or 0) + A [n_rows, n_k] B [n_k, n_columns] */
typedef struct product {
    const float *a;
    size_t a_stride;
    const uint8_t *b;
    fv_dtype_t b_dtype;
    bool b_padded; /* widened: every panel has 64 columns' room */
    size_t n_columns;
    int32_t n_k, n_rows;
    float *c;
    size_t c_stride;
    const float *alpha; /* NULL: C starts at 0 */
} product_t;

/* Where a run of vectors of B lies: vector v of row (or row pair) i is at b + i * row_bytes + v * vec_bytes. */
typedef struct run {
    const uint8_t *b;
    size_t row_bytes, vec_bytes;
    int32_t n_k;
} run_t;

ALWAYS_INLINE void multiply_add(const int nr,
                                const int nv,
                                vec_t acc[VEC_NR][VEC_NV],
                                const vec_t b[VEC_NV],
                                const float *a,
                                size_t a_stride)
{
#pragma GCC unroll 8
    for (int r = 0; r < nr; r++) {
        vec_t x = vec_set1(a[(size_t)r * a_stride]);
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) {
            acc[r][v] = vec_fma(x, b[v], acc[r][v]);
        }
    }
}

/* One step of k: a row of B (a pair of rows in bf16) against nr rows of A. */
ALWAYS_INLINE void step_k(const fv_dtype_t dtype,
                          const int nr,
                          const int nv,
                          vec_t acc[VEC_NR][VEC_NV],
                          const uint8_t *row,
                          size_t vec_bytes,
                          const float *a,
                          size_t a_stride)
{
    vec_t b[VEC_NV];

#pragma GCC unroll 8
    for (int v = 0; v < nv; v++) {
        const uint8_t *at = row + (size_t)v * vec_bytes;
        b[v] = (dtype == FV_DTYPE_F32)   ? vec_load((const float *)(const void *)at)
               : (dtype == FV_DTYPE_F16) ? vec_f16((const uint16_t *)(const void *)at)
                                         : vec_bf16_even(at);
    }
    multiply_add(nr, nv, acc, b, a, a_stride);
    if (dtype != FV_DTYPE_BF16) {
        return;
    }
#pragma GCC unroll 8
    for (int v = 0; v < nv; v++) {
        b[v] = vec_bf16_odd(row + (size_t)v * vec_bytes);
    }
    multiply_add(nr, nv, acc, b, a + 1, a_stride);
}

/* The rows of B from k on that lie at one stride, in the columns from `column` on: all of a panel, one tile of bf16. */
ALWAYS_INLINE run_t find_run(const fv_dtype_t dtype, const product_t *p, int32_t k, size_t column)
{
    size_t n_k = (size_t)p->n_k;
    size_t e = fv_dtype_bytes(dtype);
    run_t run;

    if (dtype == FV_DTYPE_BF16) {
        size_t first = column / FV_TILE_COLUMNS * FV_TILE_COLUMNS;
        size_t pair = (size_t)k / 2U;
        size_t n_pairs = fv_page_min(FV_TILE_PAIRS, n_k / 2U - pair);

        run.row_bytes = fv_piece_columns(p->n_columns, first, FV_TILE_COLUMNS) * 4U;
        run.vec_bytes =
            (VEC_W == FV_TILE_COLUMNS) ? (n_pairs * FV_TILE_COLUMNS * 4U) : (VEC_W * 4U);
        run.b = p->b + fv_tile_offset(n_k, p->n_columns, pair, first) * 2U + (column - first) * 4U;
        run.n_k = (int32_t)n_pairs * 2;
    } else {
        size_t first = column / FV_PANEL_COLUMNS * FV_PANEL_COLUMNS;
        size_t width = p->b_padded ? FV_PANEL_COLUMNS
                                   : fv_piece_columns(p->n_columns, first, FV_PANEL_COLUMNS);

        run.row_bytes = width * e;
        run.vec_bytes = VEC_W * e;
        run.b = p->b + (first * n_k + (column - first)) * e;
        run.n_k = p->n_k;
    }
    return run;
}

ALWAYS_INLINE void register_block(const fv_dtype_t dtype,
                                  const int nr,
                                  const int nv,
                                  const product_t *p,
                                  size_t row,
                                  size_t column)
{
    const int k_step = (dtype == FV_DTYPE_BF16) ? 2 : 1;
    const float *a = p->a + row * p->a_stride;
    float *c = p->c + row * p->c_stride + column;
    vec_t acc[VEC_NR][VEC_NV];

#pragma GCC unroll 8
    for (int r = 0; r < nr; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) {
            const float *at = c + (size_t)r * p->c_stride + (size_t)v * VEC_W;
            acc[r][v] = (p->alpha == NULL)
                            ? vec_zero()
                            : vec_mul(vec_load(at), vec_set1(p->alpha[row + (size_t)r]));
        }
    }
    for (int k = 0; k < p->n_k;) {
        run_t run = find_run(dtype, p, k, column);

        for (int i = 0; i < run.n_k; i += k_step) {
            step_k(dtype, nr, nv, acc, run.b, run.vec_bytes, a + k + i, p->a_stride);
            run.b += run.row_bytes;
        }
        k += run.n_k;
    }
#pragma GCC unroll 8
    for (int r = 0; r < nr; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < nv; v++) {
            vec_store(c + (size_t)r * p->c_stride + (size_t)v * VEC_W, acc[r][v]);
        }
    }
}

#define ROWS_CASES(dtype, nv)                                  \
    switch (nr) {                                              \
    case 1:                                                    \
        register_block((dtype), 1, (nv), p, row, column);      \
        break;                                                 \
    case 2:                                                    \
        register_block((dtype), 2, (nv), p, row, column);      \
        break;                                                 \
    case 3:                                                    \
        register_block((dtype), 3, (nv), p, row, column);      \
        break;                                                 \
    case 4:                                                    \
        register_block((dtype), 4, (nv), p, row, column);      \
        break;                                                 \
    case 5:                                                    \
        register_block((dtype), 5, (nv), p, row, column);      \
        break;                                                 \
    default:                                                   \
        register_block((dtype), VEC_NR, (nv), p, row, column); \
        break;                                                 \
    }

/* nv vectors of columns from `column` on, all rows: row blocks of nearly equal height, at most VEC_NR. */
#define DEFINE_COLUMNS(name, dtype, nv)                                          \
    static void name(const product_t *p, size_t column)                          \
    {                                                                            \
        int n_blocks = (p->n_rows + VEC_NR - 1) / VEC_NR;                        \
        size_t row = 0;                                                          \
        for (int i = 0; i < n_blocks; i++) {                                     \
            int nr = (p->n_rows - (int)row + n_blocks - i - 1) / (n_blocks - i); \
            ROWS_CASES(dtype, nv)                                                \
            row += (size_t)nr;                                                   \
        }                                                                        \
    }

typedef void (*columns_fn_t)(const product_t *p, size_t column);

DEFINE_COLUMNS(columns_f32_1, FV_DTYPE_F32, 1)
DEFINE_COLUMNS(columns_f32_2, FV_DTYPE_F32, 2)
DEFINE_COLUMNS(columns_f16_1, FV_DTYPE_F16, 1)
DEFINE_COLUMNS(columns_f16_2, FV_DTYPE_F16, 2)
DEFINE_COLUMNS(columns_bf16_1, FV_DTYPE_BF16, 1)
DEFINE_COLUMNS(columns_bf16_2, FV_DTYPE_BF16, 2)
#if VEC_NV >= 4
DEFINE_COLUMNS(columns_f32_4, FV_DTYPE_F32, 4)
DEFINE_COLUMNS(columns_f16_4, FV_DTYPE_F16, 4)
DEFINE_COLUMNS(columns_bf16_4, FV_DTYPE_BF16, 4)
#else
#    define columns_f32_4  columns_f32_2
#    define columns_f16_4  columns_f16_2
#    define columns_bf16_4 columns_bf16_2
#endif

static void multiply(const product_t *p)
{
    static const columns_fn_t k_columns[4][3] = {
        [FV_DTYPE_F32] = {columns_f32_1, columns_f32_2, columns_f32_4},
        [FV_DTYPE_F16] = {columns_f16_1, columns_f16_2, columns_f16_4},
        [FV_DTYPE_BF16] = {columns_bf16_1, columns_bf16_2, columns_bf16_4},
    };
    size_t column = 0;

    while (column < p->n_columns) {
        /* a run of vectors stays inside a panel; a tile of 8 columns at the edge has its own row stride */
        size_t first = column / FV_PANEL_COLUMNS * FV_PANEL_COLUMNS;
        size_t end = first + fv_piece_columns(p->n_columns, first, FV_PANEL_COLUMNS);
        size_t left = (p->b_dtype == FV_DTYPE_BF16) ? ((end - column) / VEC_W)
                                                    : ((end - column + VEC_W - 1U) / VEC_W);
        int width = ((left >= 4U) && (VEC_NV >= 4)) ? 2 : (left >= 2U) ? 1 : 0;

        k_columns[p->b_dtype][width](p, column);
        column += (size_t)VEC_W << (unsigned)width;
    }
}

/* One panel's width of fp32 rows from a page in fp16. */
static void widen_f16(fv_tile_block_t *block, const uint8_t *page, size_t n_rows, size_t n_columns)
{
    for (size_t first = 0; first < n_columns; first += FV_PANEL_COLUMNS) {
        size_t width = fv_piece_columns(n_columns, first, FV_PANEL_COLUMNS);

        for (size_t r = 0; r < n_rows; r++) {
            const uint16_t *src = (const uint16_t *)(const void *)page + first * n_rows + r * width;
            float *out = block->wide + first * n_rows + r * FV_PANEL_COLUMNS;

            for (size_t c = 0; c < width; c += VEC_W) {
                vec_store(out + c, vec_f16(src + c));
            }
        }
    }
}

static void widen_bf16(fv_tile_block_t *block, const uint8_t *page, size_t n_rows, size_t n_columns)
{
    for (size_t r = 0; r < n_rows; r += 2U) {
        for (size_t c = 0; c < n_columns; c += VEC_W) {
            size_t first = c / FV_PANEL_COLUMNS * FV_PANEL_COLUMNS;
            float *out = block->wide + first * n_rows + r * FV_PANEL_COLUMNS + (c - first);
            const uint8_t *src = page + 2U * fv_page_index(FV_DTYPE_BF16, n_rows, n_columns, r, c);

            vec_store(out, vec_bf16_even(src));
            vec_store(out + FV_PANEL_COLUMNS, vec_bf16_odd(src));
        }
    }
}

/* B = the page's matrix, widened first when there are rows enough to pay for it. */
static void multiply_page(fv_tile_block_t *block, product_t *p, const void *page)
{
    p->b = page;
    p->b_dtype = block->kv_dtype;
    p->b_padded = false;
    if ((block->n_rows > WIDEN_ROWS) && (block->kv_dtype != FV_DTYPE_F32)) {
        if (block->kv_dtype == FV_DTYPE_F16) {
            widen_f16(block, page, (size_t)p->n_k, p->n_columns);
        } else {
            widen_bf16(block, page, (size_t)p->n_k, p->n_columns);
        }
        p->b_padded = true;
        p->b = (const uint8_t *)block->wide;
        p->b_dtype = FV_DTYPE_F32;
    }
    multiply(p);
}

static void simd_scores(fv_tile_block_t *block, const void *k)
{
    product_t p = {
        .a = block->q,
        .a_stride = (size_t)block->head_dim_qk,
        .n_columns = FV_PAGE_TOKENS,
        .n_k = block->head_dim_qk,
        .n_rows = block->n_rows,
        .c = block->s,
        .c_stride = FV_PAGE_TOKENS,
        .alpha = NULL,
    };

    multiply_page(block, &p, k);
}

static void simd_accumulate(fv_tile_block_t *block, const void *v)
{
    product_t p = {
        .a = block->s,
        .a_stride = FV_PAGE_TOKENS,
        .n_columns = (size_t)block->head_dim_v,
        .n_k = FV_PAGE_TOKENS,
        .n_rows = block->n_rows,
        .c = block->o,
        .c_stride = (size_t)block->o_stride,
        .alpha = block->alpha,
    };

    multiply_page(block, &p, v);
}

/* tanh(x) = 1 - 2 / (e^2x + 1); near 0, where that cancels, its series. */
ALWAYS_INLINE vec_t vec_tanh(vec_t x)
{
    vec_t e = vec_exp2(vec_mul(x, vec_set1(2.0F * FV_LOG2E)));
    vec_t far = vec_sub(vec_set1(1.0F), vec_div(vec_set1(2.0F), vec_add(e, vec_set1(1.0F))));
    vec_t xx = vec_mul(x, x);
    vec_t series = vec_set1(62.0F / 2835.0F);

    series = vec_fma(series, xx, vec_set1(-17.0F / 315.0F));
    series = vec_fma(series, xx, vec_set1(2.0F / 15.0F));
    series = vec_fma(series, xx, vec_set1(-1.0F / 3.0F));
    series = vec_fma(vec_mul(series, xx), x, x);
    return vec_small(x, 0.25F, series, far);
}

static void simd_softcap(fv_tile_block_t *block)
{
    vec_t inner = vec_set1(block->cap_inner);
    vec_t outer = vec_set1(block->cap_outer);

    for (size_t i = 0; i < (size_t)block->n_rows * FV_PAGE_TOKENS; i += VEC_W) {
        vec_t x = vec_mul(vec_load(block->s + i), inner);
        vec_store(block->s + i, vec_mul(vec_tanh(x), outer));
    }
}

static void simd_softmax(fv_tile_block_t *block)
{
    vec_t scale = vec_set1(block->score_scale);

    for (int32_t r = 0; r < block->n_rows; r++) {
        float *s = block->s + (size_t)r * FV_PAGE_TOKENS;
        float m_old = block->m[r];
        vec_t largest = vec_load(s);
        vec_t sum = vec_zero();
        vec_t base;
        float m = 0.0F;

#pragma GCC unroll 8
        for (size_t i = 1; i < S_VECS; i++) {
            largest = vec_max(largest, vec_load(s + i * VEC_W));
        }
        m = vec_hmax(largest) * block->score_scale;
        m = (m_old > m) ? m_old : m;
        /* nothing visible yet: -inf - -inf must not be formed */
        base = vec_set1((m == -INFINITY) ? 0.0F : -m);
#pragma GCC unroll 8
        for (size_t i = 0; i < S_VECS; i++) {
            vec_t p = vec_exp2(vec_fma(vec_load(s + i * VEC_W), scale, base));
            vec_store(s + i * VEC_W, p);
            sum = vec_add(sum, p);
        }
        block->alpha[r] = (m_old == m) ? 1.0F : exp2f(m_old - m);
        block->l[r] = block->l[r] * block->alpha[r] + vec_hsum(sum);
        block->m[r] = m;
    }
}
