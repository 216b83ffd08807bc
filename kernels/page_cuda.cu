/*
 * page_cuda.cu - copies of pages, for copy on write.
 *
 * Decode path: station 6 of 10. Before: append_cuda.c. After: pull_cuda.cu appends to the copy.
 */
#include "kernels/page_cuda.h"

#include <cuda_runtime.h>

#define THREADS 128

/* Grid: one block a unit. */
static __global__ void __launch_bounds__(THREADS)
    copy_kernel(uint8_t *arena, const fv_copy_unit_t *units)
{
    const fv_copy_unit_t u = units[blockIdx.x];
    const uint4 *src = (const uint4 *)(arena + (uint64_t)u.src * FV_PAGE_UNIT);
    uint4 *dst = (uint4 *)(arena + (uint64_t)u.dst * FV_PAGE_UNIT);

    for (uint32_t i = threadIdx.x; i < u.k_bytes / 16U; i += THREADS) {
        dst[i] = src[i];
    }
    for (uint32_t i = threadIdx.x; i < u.v_bytes / 16U; i += THREADS) {
        dst[u.v_offset / 16U + i] = src[u.v_offset / 16U + i];
    }
}

cudaError_t fv_page_copy_launch(uint8_t *arena,
                                const fv_copy_unit_t *units,
                                uint32_t n_units,
                                cudaStream_t stream)
{
    copy_kernel<<<n_units, THREADS, 0, stream>>>(arena, units);
    return cudaGetLastError();
}
