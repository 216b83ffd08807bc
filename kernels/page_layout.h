/*
 * page_layout.h - where an element of a KV page lies on the CPU. Private to kernels/.
 *
 * A page is two matrices, K^T [dk, P] and V [P, dv]: the right-hand sides of S = Q K^T and O = P V, with the
 * summed index in rows, so that one kernel serves both and no lane ever holds another token's score (K) or
 * another dimension (V). Both are cut into pieces that are read from front to back, as memory likes it:
 *
 *   fp32, fp16: panels of 64 columns, each with plain rows:            [n / 64][rows][64]
 *   bf16:       tiles of 32 rows by 16 columns, each one operand of AMX: [rows / 32][n / 16][16 pairs][16][2]
 *
 * bf16 rows are interleaved in pairs, (2i, j) beside (2i + 1, j), which is what AMX multiplies, and which widens
 * to two fp32 rows with one shift and one mask. Pieces at the edges are smaller, never padded. Every instruction set
 * uses the same layout.
 */
#ifndef FV_KERNELS_PAGE_LAYOUT_H
#define FV_KERNELS_PAGE_LAYOUT_H

#include "common/model.h"

#include <stddef.h>

#define FV_PANEL_COLUMNS 64U
#define FV_TILE_PAIRS    16U
#define FV_TILE_COLUMNS  16U

static inline size_t fv_page_min(size_t a, size_t b)
{
    return (a < b) ? a : b;
}

/* Columns of the panel (step 64) or tile (step 16) that begins at `column`. */
static inline size_t fv_piece_columns(size_t n_columns, size_t column, size_t step)
{
    return fv_page_min(step, n_columns - column);
}

/* bf16: element offset of the tile of row pairs from `pair` on and of columns from `column` on. */
static inline size_t fv_tile_offset(size_t n_rows, size_t n_columns, size_t pair, size_t column)
{
    size_t n_pairs = fv_page_min(FV_TILE_PAIRS, n_rows / 2U - pair);

    return (pair * n_columns + column * n_pairs) * 2U;
}

/* Element (row, column) of a matrix [n_rows, n_columns]. */
static inline size_t
fv_page_index(fv_dtype_t dtype, size_t n_rows, size_t n_columns, size_t row, size_t column)
{
    if (dtype == FV_DTYPE_BF16) {
        size_t first_pair = row / 2U / FV_TILE_PAIRS * FV_TILE_PAIRS;
        size_t first_column = column / FV_TILE_COLUMNS * FV_TILE_COLUMNS;
        size_t width = fv_piece_columns(n_columns, first_column, FV_TILE_COLUMNS);

        return fv_tile_offset(n_rows, n_columns, first_pair, first_column) +
               ((row / 2U - first_pair) * width + (column - first_column)) * 2U + (row % 2U);
    }
    size_t first = column / FV_PANEL_COLUMNS * FV_PANEL_COLUMNS;

    return first * n_rows + row * fv_piece_columns(n_columns, first, FV_PANEL_COLUMNS) +
           (column - first);
}

static inline size_t fv_page_v_offset(fv_dtype_t dtype, int32_t head_dim_qk)
{
    return (size_t)head_dim_qk * FV_PAGE_TOKENS * fv_dtype_bytes(dtype);
}

/* v_in_k: V is the first rows of K^T; who needs it as [P, dv] has it turned (tile.h, latent_v). */
static inline size_t
fv_page_bytes(fv_dtype_t dtype, int32_t head_dim_qk, int32_t head_dim_v, bool v_in_k)
{
    size_t dims = (size_t)head_dim_qk + (v_in_k ? 0U : (size_t)head_dim_v);

    if (dtype == FV_DTYPE_FP8_LATENT) { /* its layout is in fp8.h */
        return fv_align_up(FV_PAGE_TOKENS *
                               fv_fp8_token_bytes(head_dim_v, head_dim_qk - head_dim_v),
                           FV_FP8_PAGE_STEP);
    }

    return dims * FV_PAGE_TOKENS * fv_dtype_bytes(dtype);
}

#endif /* FV_KERNELS_PAGE_LAYOUT_H */
