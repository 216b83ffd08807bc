/*
 * page_layout.h - where an element of a KV page lies on the CPU. Private to kernels/.
 *
 * A page is two matrices, K^T [dk, P] and V [P, dv]: the right-hand sides of S = Q K^T and O = P V, with the
 * summed index in rows, so that one kernel serves both and no lane ever holds another token's score (K) or
 * another dimension (V). bf16 rows are interleaved in pairs,
 *
 *     row pair i of n columns:  (2i,0) (2i+1,0) (2i,1) (2i+1,1) ... (2i,n-1) (2i+1,n-1)
 *
 * which is what AMX and vdpbf16ps multiply, and which widens to two fp32 rows with one shift and one mask.
 * fp16 and fp32 rows are plain. Every instruction set uses the same layout.
 */
#ifndef FV_KERNELS_PAGE_LAYOUT_H
#define FV_KERNELS_PAGE_LAYOUT_H

#include "common/model.h"

#include <stddef.h>

/* Element (row, column) of a matrix with n_columns columns. */
static inline size_t fv_page_index(fv_dtype_t dtype, size_t n_columns, size_t row, size_t column)
{
    if (dtype == FV_DTYPE_BF16) {
        return ((row / 2U) * n_columns + column) * 2U + (row % 2U);
    }
    return row * n_columns + column;
}

static inline size_t fv_page_v_offset(fv_dtype_t dtype, int32_t head_dim_qk)
{
    return (size_t)head_dim_qk * FV_PAGE_TOKENS * fv_dtype_bytes(dtype);
}

static inline size_t fv_page_bytes(fv_dtype_t dtype, int32_t head_dim_qk, int32_t head_dim_v)
{
    return (size_t)(head_dim_qk + head_dim_v) * FV_PAGE_TOKENS * fv_dtype_bytes(dtype);
}

#endif /* FV_KERNELS_PAGE_LAYOUT_H */
