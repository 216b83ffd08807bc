/*
 * page_layout_cuda.h - where an element of a KV page lies on the GPU. Private to kernels/; page_layout.h is the CPU's.
 *
 * A page is K, then V (v_in_k: K alone), each one stretch of memory, so that one bulk copy (cp.async.bulk, no tensor map)
 * moves either into shared memory, where all kernels read the very bytes. A row (one token's K or V) is made of 16-byte
 * chunks. Two ways of storing them, chosen by the row alone:
 *
 *   panels  2-byte elements, head dims that are multiples of 64: [dim / 64][64 tokens][64 elements], so a panel's rows
 *           are 128 bytes and a panel 8 KB. Chunk c of token t stands at c ^ (t % 8) within its panel's row: the 128-byte
 *           swizzle of wgmma and of tensor maps. wgmma takes K from there as a K-major operand, V as an MN-major one (both:
 *           8 rows 1 KB apart; from panel to panel 8 KB). Panels begin at multiples of 1 KB wherever they lie.
 *   rows    all others: [64 tokens][dim], chunk c of token t at c ^ ((t >> shift) & mask).
 *
 * Both let ldmatrix read 8 tokens of one chunk column without bank conflicts. The permutation is done once, when a token
 * is appended, and never again.
 */
#ifndef FV_KERNELS_PAGE_LAYOUT_CUDA_H
#define FV_KERNELS_PAGE_LAYOUT_CUDA_H

#include "common/policy.h"

#include <stdbool.h>
#include <stdint.h>

#define FV_PANEL_ROW_BYTES 128U
#define FV_PANEL_BYTES     (FV_PAGE_TOKENS * FV_PANEL_ROW_BYTES)

/* Of one matrix: byte distances of tokens and of groups of 8 chunks, and the permutation. */
typedef struct fv_page_rows {
    uint32_t token_bytes, panel_bytes;
    uint32_t shift, mask;
} fv_page_rows_t;

static inline FV_HD bool fv_page_is_panels(uint32_t row_bytes, uint32_t elem_bytes)
{
    return (elem_bytes == 2U) && (row_bytes % FV_PANEL_ROW_BYTES == 0);
}

/* row_bytes: a multiple of 16. */
static inline FV_HD fv_page_rows_t fv_page_rows_make(uint32_t row_bytes, uint32_t elem_bytes)
{
    const uint32_t n_chunks = row_bytes / 16U;
    fv_page_rows_t rows;

    if (fv_page_is_panels(row_bytes, elem_bytes)) {
        rows.token_bytes = FV_PANEL_ROW_BYTES;
        rows.panel_bytes = FV_PANEL_BYTES;
        rows.shift = 0;
        rows.mask = 7;
        return rows;
    }
    rows.token_bytes = row_bytes;
    rows.panel_bytes = FV_PANEL_ROW_BYTES; /* 8 chunks follow 8 chunks */
    /* 8 tokens of one chunk column fall on (t * n_chunks + c) mod 8 bank groups: all different if n_chunks is odd;
     * otherwise the bits that the product loses are put back. */
    rows.shift = ((n_chunks & 1U) != 0)
                     ? 3U
                     : (((n_chunks & 2U) != 0) ? 2U : (((n_chunks & 4U) != 0) ? 1U : 0U));
    rows.mask = (1U << (3U - rows.shift)) - 1U;
    return rows;
}

/* Byte offset of a token's chunk in its matrix. */
static inline FV_HD uint32_t fv_page_chunk(const fv_page_rows_t *rows,
                                           uint32_t token,
                                           uint32_t chunk)
{
    const uint32_t at = chunk ^ ((token >> rows->shift) & rows->mask);

    return (at >> 3U) * rows->panel_bytes + token * rows->token_bytes + (at & 7U) * 16U;
}

#endif /* FV_KERNELS_PAGE_LAYOUT_CUDA_H */
