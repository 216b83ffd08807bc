/*
 * merge_cuda.cu - partial states of rows whose KV spans ranks become results. The formula is in kernels.h.
 *
 * Decode path: station 8 of 10. Before: merge_cuda.c. After: worker/step.c.
 */
#include "kernels/page_cuda.h"
#include "kernels/ptx.cuh"

#include <cuda_runtime.h>

#include <math.h>

#define THREADS 64
#define LN2     0.69314718055994530942F

/* The unit whose blocks hold this one. */
static __device__ const fv_merge_unit_t *find_unit(const fv_merge_unit_t *units, uint32_t n_units)
{
    uint32_t low = 0;
    uint32_t high = n_units;

    while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;

        if (units[middle].block_begin <= blockIdx.x) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return units + low;
}

static __device__ void store(uint8_t *at, int32_t dtype, uint32_t i, float x)
{
    if (dtype == FV_DTYPE_F32) {
        ((float *)at)[i] = x;
    } else if (dtype == FV_DTYPE_BF16) {
        ((__nv_bfloat16 *)at)[i] = __float2bfloat16_rn(x);
    } else {
        ((__half *)at)[i] = __float2half_rn(x);
    }
}

/* Grid: one block a row. A NaN lse may be dropped by the maximum; its weight is NaN and takes the row with it. */
static __global__ void __launch_bounds__(THREADS)
    merge_kernel(const fv_merge_unit_t *units, uint32_t n_units)
{
    const fv_merge_unit_t u = *find_unit(units, n_units);
    const uint64_t i = blockIdx.x - u.block_begin;
    const uint64_t row = u.row_base + i;
    const uint64_t t = row / u.row_len;
    const uint64_t h = row - t * u.row_len;
    const uint32_t e = (u.io_dtype == FV_DTYPE_F32) ? 4U : 2U;
    float top = -INFINITY;

    for (int32_t part = 0; part < u.n_parts; part++) {
        const float lse = u.lse_log2[part][i];

        top = (lse > top) ? lse : top;
    }
    for (uint32_t d = threadIdx.x; d < (uint32_t)u.head_dim_v; d += THREADS) {
        float o = 0.0F;
        float sum = 0.0F;

        for (int32_t part = 0; part < u.n_parts; part++) {
            const float lse = u.lse_log2[part][i];

            if (lse != -INFINITY) { /* an empty part's o may be anything */
                const float w = exp2f(lse - top);

                sum += w;
                o += w * u.o[part][i * (uint64_t)u.head_dim_v + d];
            }
        }
        store(u.out + (t - u.out_first) * u.out_token_bytes + h * (uint64_t)u.head_dim_v * e,
              u.io_dtype, d, (sum == 0.0F) ? 0.0F : (o / sum));
        if ((d == 0) && (u.lse != NULL)) {
            u.lse[(t - u.lse_first) * u.lse_token_stride + h] = (top + log2f(sum)) * LN2;
        }
    }
}

cudaError_t fv_merge_launch(const fv_merge_unit_t *units,
                            uint32_t n_units,
                            uint64_t n_blocks,
                            cudaStream_t stream)
{
    merge_kernel<<<(uint32_t)n_blocks, THREADS, 0, stream>>>(units, n_units);
    return cudaGetLastError();
}
