/*
 * cuda_peak.cu - see cuda_peak.h.
 */
#include "bench/cuda_peak.h"
#include "kernels/lean_cuda.h"
#include "kernels/wgmma.cuh"

#include <cuda_runtime.h>

#include <math.h>

#define STAGE_BYTES 16384U
#define STAGES      12U
#define REF_THREADS 256

static __device__ uint32_t mix(uint32_t x)
{
    x ^= x >> 16U;
    x *= 0x7feb352dU;
    x ^= x >> 15U;
    x *= 0x846ca68bU;
    return x ^ (x >> 16U);
}

static __global__ void __launch_bounds__(256)
    fill_kernel(__nv_bfloat16 *data, size_t n, uint32_t seed)
{
    for (size_t i = (size_t)blockIdx.x * 256U + threadIdx.x; i < n; i += (size_t)gridDim.x * 256U) {
        const uint32_t a = mix((uint32_t)i ^ mix(seed + (uint32_t)(i >> 32U)));
        const uint32_t b = mix(a + 0x9e3779b9U);
        /* four 16-bit uniforms: variance 1/3 */
        const float sum =
            (float)(a & 0xffffU) + (float)(a >> 16U) + (float)(b & 0xffffU) + (float)(b >> 16U);

        data[i] = __float2bfloat16_rn((sum / 65536.0F - 2.0F) * 1.7320508F);
    }
}

cudaError_t fv_peak_fill_bf16(void *data, size_t n_elems, uint32_t seed, cudaStream_t stream)
{
    fill_kernel<<<132 * 8, 256, 0, stream>>>((__nv_bfloat16 *)data, n_elems, seed);
    return cudaGetLastError();
}

static __global__ void __launch_bounds__(32)
    read_kernel(const uint8_t *data, uint32_t n_chunks, uint32_t *sink)
{
    extern __shared__ __align__(128) uint8_t memory[];
    uint64_t *full = (uint64_t *)(memory + STAGES * STAGE_BYTES);
    const uint32_t mine = (n_chunks - blockIdx.x + gridDim.x - 1U) / gridDim.x;
    const uint64_t policy = fv_evict_first();

    if (threadIdx.x != 0) {
        return;
    }
    for (uint32_t i = 0; i < STAGES; i++) {
        fv_mbar_init(&full[i], 1);
    }
    fv_mbar_init_fence();
    for (uint32_t i = 0; i < mine + STAGES; i++) {
        if (i >= STAGES) {
            fv_mbar_wait(&full[i % STAGES], (i / STAGES + 1U) & 1U);
        }
        if (i < mine) {
            fv_mbar_expect(&full[i % STAGES], STAGE_BYTES);
            fv_bulk_load(memory + (i % STAGES) * STAGE_BYTES,
                         data + ((size_t)blockIdx.x + (size_t)i * gridDim.x) * STAGE_BYTES,
                         STAGE_BYTES, &full[i % STAGES], policy);
        }
    }
    if (*(volatile uint32_t *)memory == 0x12345678U) {
        *sink = 1;
    }
}

cudaError_t
fv_peak_read(const void *data, size_t n_bytes, int32_t n_sms, uint32_t *sink, cudaStream_t stream)
{
    const uint32_t smem = STAGES * (STAGE_BYTES + 8U);
    const cudaError_t error = cudaFuncSetAttribute(
        (const void *)read_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem);

    if (error != cudaSuccess) {
        return error;
    }
    read_kernel<<<n_sms, 32, smem, stream>>>((const uint8_t *)data,
                                             (uint32_t)(n_bytes / STAGE_BYTES), sink);
    return cudaGetLastError();
}

/* Element d of a token's row of a matrix with rows of head_dim bf16 values. */
static __device__ double
element(const uint8_t *matrix, uint32_t token, uint32_t d, uint32_t head_dim)
{
    const fv_page_rows_t rows = fv_page_rows_make(head_dim * 2U, 2U);
    const uint16_t x =
        *(const uint16_t *)(matrix + fv_page_chunk(&rows, token, d / 8U) + (d % 8U) * 2U);

    return (double)__uint_as_float((uint32_t)x << 16U);
}

/* One block: thread d holds column d; scores one token at a time by a tree. Slow on purpose and simple. */
static __global__ void __launch_bounds__(REF_THREADS) reference_kernel(const fv_peak_row_t p)
{
    __shared__ double scores[REF_THREADS];
    const uint32_t dim = (uint32_t)p.head_dim;
    double m = -INFINITY;
    double l = 0.0;
    double o = 0.0;

    for (int64_t begin = 0; begin < p.n_tokens; begin += REF_THREADS) {
        const int64_t token = begin + threadIdx.x;
        double s = -INFINITY;

        if (token < p.n_tokens) {
            const uint8_t *k = p.arena + (uint64_t)p.pages[token / FV_PAGE_TOKENS] * FV_PAGE_UNIT;

            s = 0.0;
            for (uint32_t d = 0; d < dim; d++) {
                s += (double)__uint_as_float((uint32_t)p.q[d] << 16U) *
                     element(k, (uint32_t)(token % FV_PAGE_TOKENS), d, dim);
            }
            s *= p.scale;
        }
        __syncthreads();
        scores[threadIdx.x] = s;
        __syncthreads();
        double top = m;
        for (int i = 0; i < REF_THREADS; i++) {
            top = fmax(top, scores[i]);
        }
        l *= exp(m - top);
        o *= exp(m - top);
        m = top;
        for (int i = 0; i < REF_THREADS; i++) {
            const int64_t j = begin + i;

            if (j < p.n_tokens) {
                const uint8_t *page =
                    p.arena + (uint64_t)p.pages[j / FV_PAGE_TOKENS] * FV_PAGE_UNIT;
                const double w = exp(scores[i] - m);

                l += w;
                if (threadIdx.x < dim) {
                    o += w * element(page + FV_PAGE_TOKENS * dim * 2U,
                                     (uint32_t)(j % FV_PAGE_TOKENS), threadIdx.x, dim);
                }
            }
        }
    }
    if (threadIdx.x < dim) {
        p.out[threadIdx.x] = o / l;
    }
    if (threadIdx.x == 0) {
        p.out[dim] = m + log(l);
    }
}

cudaError_t fv_peak_reference(const fv_peak_row_t *row, cudaStream_t stream)
{
    reference_kernel<<<1, REF_THREADS, 0, stream>>>(*row);
    return cudaGetLastError();
}

/* ------------------------------------------------------------------ matrix products */

#define WGMMA_SMEM (48U << 10U)

/* A: [2 warpgroups][64 rows][64]; B: [256 rows][64]. Results are looked at, so that no product is left out. */
static __global__ void __launch_bounds__(2 * FV_WARPGROUP, 1)
    wgmma_kernel(const uint4 *data, int32_t n_steps, uint32_t *sink)
{
    extern __shared__ __align__(1024) uint8_t operands[];
    float d[128] = {};
    float sum = 0.0F;

    for (uint32_t i = threadIdx.x; i < WGMMA_SMEM / 16U; i += 2U * FV_WARPGROUP) {
        ((uint4 *)operands)[i] = data[i];
    }
    fv_async_proxy_fence();
    __syncthreads();
    const uint64_t a =
        fv_wgmma_desc(fv_smem(operands) + threadIdx.x / FV_WARPGROUP * (8U << 10U), 1024, 16);
    const uint64_t b = fv_wgmma_desc(fv_smem(operands) + (16U << 10U), 1024, 16);

    for (int32_t i = 0; i < n_steps; i++) {
        fv_wgmma_fence();
#pragma unroll
        for (uint32_t k = 0; k < 4U; k++) {
            fv_wgmma_ss<256, false, false>(d, fv_wgmma_desc_at(a, k * 32U),
                                           fv_wgmma_desc_at(b, k * 32U), true);
        }
        fv_wgmma_commit();
        fv_wgmma_wait<0>();
    }
#pragma unroll
    for (int i = 0; i < 128; i++) {
        sum += d[i];
    }
    if (sum == 0.12345F) {
        *sink = 1;
    }
}

cudaError_t
fv_peak_wgmma(const void *data, int32_t n_steps, int32_t n_sms, uint32_t *sink, cudaStream_t stream)
{
    const cudaError_t error = cudaFuncSetAttribute(
        (const void *)wgmma_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)WGMMA_SMEM);

    if (error != cudaSuccess) {
        return error;
    }
    wgmma_kernel<<<n_sms, 2 * FV_WARPGROUP, WGMMA_SMEM, stream>>>((const uint4 *)data, n_steps,
                                                                  sink);
    return cudaGetLastError();
}

double fv_peak_wgmma_flop(int32_t n_steps, int32_t n_sms)
{
    return 2.0 * 64.0 * 256.0 * 16.0 * 4.0 * 2.0 * (double)n_steps * (double)n_sms;
}
