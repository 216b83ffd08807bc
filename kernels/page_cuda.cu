/*
 * page_cuda.cu - copies of pages, for copy on write.
 *
 * Decode path: station 6 of 10. Before: append_cuda.c. After: pull_cuda.cu appends to the copy.
 */
#include "kernels/page_cuda.h"

#include <cuda_runtime.h>

#define THREADS 128

/* The first n_tokens rows of K or V. */
static __device__ __forceinline__ void copy_rows(uint8_t *dst,
                                                 const uint8_t *src,
                                                 uint32_t n_tokens,
                                                 uint32_t row_bytes,
                                                 uint32_t elem_bytes)
{
    const fv_page_rows_t rows = fv_page_rows_make(row_bytes, elem_bytes);
    const uint32_t n_chunks = row_bytes / 16U;

    for (uint32_t i = threadIdx.x; i < n_tokens * n_chunks; i += THREADS) {
        const uint32_t at = fv_page_chunk(&rows, i / n_chunks, i % n_chunks);

        *(uint4 *)(dst + at) = *(const uint4 *)(src + at);
    }
}

/* Grid: one block a unit. */
static __global__ void __launch_bounds__(THREADS)
    copy_kernel(uint8_t *arena, const fv_copy_unit_t *units)
{
    const fv_copy_unit_t u = units[blockIdx.x];
    const uint8_t *src = arena + (uint64_t)u.src * FV_PAGE_UNIT;
    uint8_t *dst = arena + (uint64_t)u.dst * FV_PAGE_UNIT;

    copy_rows(dst, src, u.n_tokens, u.k_bytes, u.elem_bytes);
    copy_rows(dst + u.v_offset, src + u.v_offset, u.n_tokens, u.v_bytes, u.elem_bytes);
}

cudaError_t fv_page_copy_launch(uint8_t *arena,
                                const fv_copy_unit_t *units,
                                uint32_t n_units,
                                cudaStream_t stream)
{
    copy_kernel<<<n_units, THREADS, 0, stream>>>(arena, units);
    return cudaGetLastError();
}
