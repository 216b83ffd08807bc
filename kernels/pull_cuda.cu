/*
 * pull_cuda.cu - brings a step to the device: bytes, new tokens into pages, entries into page tables; and its end.
 *
 * Decode path: station 6 of 10. Before: send_cuda.c. After: lean_kernel.cuh reads what was brought.
 */
#include "kernels/fp8.h"
#include "kernels/lean_cuda.h"
#include "kernels/norm.h"
#include "kernels/ptx.cuh"
#include "kernels/pull_cuda.h"

#include <cuda_runtime.h>

#define THREADS 256

static __device__ __forceinline__ uint64_t clock_ns(void)
{
    uint64_t ns;

    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
}

/* n elements from src at any alignment of its element size. */
template <int N>
static __device__ __forceinline__ void load_elems(float out[N], const uint8_t *src, int32_t dtype)
{
    if (dtype == FV_DTYPE_F32) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            out[i] = ((const float *)src)[i];
        }
        return;
    }
    uint16_t raw[N];

    if (((uintptr_t)src % (2U * N)) == 0) {
        if (N == 8) {
            *(uint4 *)raw = *(const uint4 *)src;
        } else if (N == 4) {
            *(uint2 *)raw = *(const uint2 *)src;
        } else {
            raw[0] = *(const uint16_t *)src;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) {
            raw[i] = ((const uint16_t *)src)[i];
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        out[i] = (dtype == FV_DTYPE_BF16) ? __uint_as_float((uint32_t)raw[i] << 16U)
                                          : __half2float(__ushort_as_half(raw[i]));
    }
}

/* One 16-byte chunk of a page. */
static __device__ __forceinline__ void put_chunk(uint8_t *dst,
                                                 const uint8_t *row,
                                                 uint32_t chunk,
                                                 int32_t src_dtype,
                                                 int32_t kv_dtype,
                                                 float factor)
{
    const uint32_t src_e = (src_dtype == FV_DTYPE_F32) ? 4U : 2U;
    uint32_t words[4];

    if (kv_dtype == FV_DTYPE_F32) {
        float x[4];

        load_elems<4>(x, row + chunk * 4U * src_e, src_dtype);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            words[i] = __float_as_uint(x[i] * factor);
        }
    } else {
        float x[8];

        load_elems<8>(x, row + chunk * 8U * src_e, src_dtype);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (kv_dtype == FV_DTYPE_BF16) {
                fv_split_rounded<false, 1>(&words[i], 1, x[2 * i] * factor, x[2 * i + 1] * factor);
            } else {
                fv_split_rounded<true, 1>(&words[i], 1, x[2 * i] * factor, x[2 * i + 1] * factor);
            }
        }
    }
    *(uint4 *)dst = make_uint4(words[0], words[1], words[2], words[3]);
}

/* A token's K or V row of one head into its page, chunk by chunk: see page_layout_cuda.h. */
static __device__ __forceinline__ void append_unit(uint8_t *arena, const fv_pull_unit_t *u)
{
    const uint32_t e = (u->kv_dtype == FV_DTYPE_F32) ? 4U : 2U;
    const uint32_t src_e = (u->src_dtype == FV_DTYPE_F32) ? 4U : 2U;
    const uint32_t k_chunks = (uint32_t)u->head_dim_qk * e / 16U;
    const uint32_t v_chunks = (uint32_t)u->head_dim_v * e / 16U;
    const uint32_t chunks = k_chunks + v_chunks;
    const fv_page_rows_t k_rows = fv_page_rows_make(k_chunks * 16U, e);
    const fv_page_rows_t v_rows = fv_page_rows_make(v_chunks * 16U, e);

    for (uint32_t i = threadIdx.x; i < chunks * u->n_heads * u->n_tokens; i += THREADS) {
        const uint32_t row = i / chunks;
        const uint32_t c = i - row * chunks;
        const uint32_t t = row / u->n_heads;
        const uint32_t h = row - t * u->n_heads;
        const uint32_t slot = (uint32_t)u->slot + t;
        uint8_t *page = arena + (uint64_t)u->pages[h] * FV_PAGE_UNIT;

        if (c < k_chunks) {
            put_chunk(page + fv_page_chunk(&k_rows, slot, c),
                      u->k + t * u->k_token_bytes + (uint64_t)h * u->head_dim_qk * src_e, c,
                      u->src_dtype, u->kv_dtype, 1.0F);
        } else {
            put_chunk(page + FV_PAGE_TOKENS * k_chunks * 16U +
                          fv_page_chunk(&v_rows, slot, c - k_chunks),
                      u->v + t * u->v_token_bytes + (uint64_t)h * u->head_dim_v * src_e,
                      c - k_chunks, u->src_dtype, u->kv_dtype, 1.0F);
        }
    }
}

/*
 * What dims [0, dv) of a latent are multiplied with. All lanes of a warp. In the order of norm.h, each
 * operation rounded by itself, as on a CPU: a factor of other bits would round some values of a page the other way.
 */
static __device__ __forceinline__ float latent_factor(const fv_pull_unit_t *u, const uint8_t *row)
{
    const uint32_t src_e = (u->src_dtype == FV_DTYPE_F32) ? 4U : 2U;
    float sum = 0.0F;

    for (uint32_t d = (threadIdx.x & 31U) * FV_NORM_DIMS; d < u->head_dim_v;
         d += FV_NORM_DIMS * FV_NORM_LANES) {
        float x[FV_NORM_DIMS];

        load_elems<FV_NORM_DIMS>(x, row + d * src_e, u->src_dtype);
#pragma unroll
        for (uint32_t i = 0; i < FV_NORM_DIMS; i++) {
            sum = __fadd_rn(sum, __fmul_rn(x[i], x[i]));
        }
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffU, sum, lanes));
    }
    const float mean = __fdiv_rn(sum, (float)u->head_dim_v);

    return __frcp_rn(__fsqrt_rn(__fadd_rn(__fmul_rn(u->norm_alpha, mean), u->norm_eps)));
}

/* A latent and its RoPE key into a page of FP8 (fp8.h), as fv_fp8_put() does: the same bits, but for a NaN's. A warp. */
static __device__ __forceinline__ void
put_fp8(uint8_t *page, const fv_pull_unit_t *u, const uint8_t *row, uint32_t slot, float factor)
{
    const uint32_t src_e = (u->src_dtype == FV_DTYPE_F32) ? 4U : 2U;
    const uint32_t lane = threadIdx.x & 31U;
    const uint8_t *key = row + u->head_dim_v * src_e + u->rope_gap_bytes;

    for (uint32_t first = 0; first < u->head_dim_v; first += FV_FP8_BLOCK) {
        const uint32_t d = first + lane * (FV_FP8_BLOCK / 32U);
        float x[FV_FP8_BLOCK / 32];
        float largest = 0.0F;

        load_elems<FV_FP8_BLOCK / 32>(x, row + d * src_e, u->src_dtype);
#pragma unroll
        for (int i = 0; i < FV_FP8_BLOCK / 32; i++) {
            x[i] = __fmul_rn(x[i], factor);
            largest = (isfinite(x[i]) && (fabsf(x[i]) > largest)) ? fabsf(x[i]) : largest;
        }
        for (int lanes = 16; lanes > 0; lanes /= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, lanes));
        }
        const float scale = __fdiv_rn(largest, FV_E4M3_MAX);

#pragma unroll
        for (uint32_t i = 0; i < FV_FP8_BLOCK / 32U; i++) {
            const bool is_zero = (scale == 0.0F) && isfinite(x[i]);

            page[(d + i) * FV_PAGE_TOKENS + slot] =
                is_zero ? (uint8_t)0 : fv_f32_to_e4m3(__fdiv_rn(x[i], scale));
        }
        if (lane == 0) {
            *(float *)(page + fv_fp8_scales_offset(u->head_dim_v) +
                       (first / FV_FP8_BLOCK * FV_PAGE_TOKENS + slot) * 4U) = scale;
        }
    }
    for (uint32_t d = lane; d < (uint32_t)u->head_dim_qk - u->head_dim_v; d += 32U) {
        float x[1];

        load_elems<1>(x, key + d * src_e, u->src_dtype);
        *(__nv_bfloat16 *)(page + fv_fp8_rope_offset(u->head_dim_v) +
                           (d * FV_PAGE_TOKENS + slot) * 2U) = __float2bfloat16_rn(x[0]);
    }
}

/* Tokens' latents and RoPE keys into their page: a row by a warp. */
static __device__ __forceinline__ void append_latent(uint8_t *arena, const fv_pull_unit_t *u)
{
    const uint32_t e = (u->kv_dtype == FV_DTYPE_F32) ? 4U : 2U;
    const uint32_t src_e = (u->src_dtype == FV_DTYPE_F32) ? 4U : 2U;
    const uint32_t n_chunks = (uint32_t)u->head_dim_qk * e / 16U;
    const uint32_t dv_chunks = (uint32_t)u->head_dim_v * e / 16U;
    const fv_page_rows_t rows = fv_page_rows_make(n_chunks * 16U, e);

    for (uint32_t i = threadIdx.x / 32U; i < (uint32_t)u->n_heads * u->n_tokens;
         i += THREADS / 32U) {
        const uint32_t t = i / u->n_heads;
        const uint32_t h = i - t * u->n_heads;
        const uint8_t *row = u->k + t * u->k_token_bytes +
                             (uint64_t)h * (u->head_dim_qk * src_e + u->rope_gap_bytes);
        uint8_t *page = arena + (uint64_t)u->pages[h] * FV_PAGE_UNIT;
        const float factor = (u->norm_alpha > 0.0F) ? latent_factor(u, row) : 1.0F;

        if (u->kv_dtype == FV_DTYPE_FP8_LATENT) {
            put_fp8(page, u, row, (uint32_t)u->slot + t, factor);
            continue;
        }
        for (uint32_t c = threadIdx.x & 31U; c < n_chunks; c += 32U) {
            const bool is_rope = c >= dv_chunks;

            put_chunk(page + fv_page_chunk(&rows, (uint32_t)u->slot + t, c),
                      row + (is_rope ? u->rope_gap_bytes : 0U), c, u->src_dtype, u->kv_dtype,
                      is_rope ? 1.0F : factor);
        }
    }
}

/* At most FV_PULL_BYTES: both loads of a thread are under way before either is waited for. */
static __device__ __forceinline__ void copy_unit(const fv_pull_unit_t *u)
{
    const bool is_aligned = (((uintptr_t)u->k | (uintptr_t)u->dst) % 16U) == 0;
    const uint32_t n_chunks = is_aligned ? (u->n_bytes / 16U) : 0U;
    const uint4 *src = (const uint4 *)u->k;
    uint4 *dst = (uint4 *)u->dst;
    uint4 x[FV_PULL_BYTES / 16U / THREADS];

#pragma unroll
    for (uint32_t i = 0; i < FV_PULL_BYTES / 16U / THREADS; i++) {
        if (threadIdx.x + i * THREADS < n_chunks) {
            x[i] = src[threadIdx.x + i * THREADS];
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < FV_PULL_BYTES / 16U / THREADS; i++) {
        if (threadIdx.x + i * THREADS < n_chunks) {
            dst[threadIdx.x + i * THREADS] = x[i];
        }
    }
    for (uint32_t i = n_chunks * 16U + threadIdx.x; i < u->n_bytes; i += THREADS) {
        u->dst[i] = u->k[i];
    }
}

/* Grid: one block a unit. */
static __global__ void __launch_bounds__(THREADS)
    pull_kernel(const __grid_constant__ fv_pull_launch_t launch)
{
    __shared__ fv_pull_unit_t unit;
    const fv_pull_unit_t *units = (launch.units != NULL) ? launch.units : launch.inlined;
    const uint32_t *words = (const uint32_t *)(units + blockIdx.x);

    /* the kernel behind may be set up meanwhile: it waits for this one's end before it reads */
    fv_launch_dependents();
    if (threadIdx.x < sizeof(unit) / sizeof(*words)) { /* over the bus once a block */
        ((uint32_t *)&unit)[threadIdx.x] = words[threadIdx.x];
    }
    if ((launch.begin_ns != NULL) && (blockIdx.x == 0) && (threadIdx.x == 0)) {
        *launch.begin_ns = clock_ns();
    }
    __syncthreads();
    if (unit.kind == FV_PULL_APPEND) {
        append_unit(launch.arena, &unit);
    } else if (unit.kind == FV_PULL_LATENT) {
        append_latent(launch.arena, &unit);
    } else if (unit.kind == FV_PULL_COPY) {
        copy_unit(&unit);
    } else if (threadIdx.x < unit.n_heads) {
        *(fv_page_ref_t *)(unit.dst + (uint64_t)threadIdx.x * unit.n_bytes) =
            unit.pages[threadIdx.x];
    }
}

static __global__ void __launch_bounds__(32) stamp_kernel(uint64_t *ns)
{
    fv_wait_for_prior_launch();
    if (threadIdx.x == 0) {
        *ns = clock_ns();
    }
}

static __global__ void __launch_bounds__(32) done_kernel(fv_cuda_record_t *record, uint32_t n_done)
{
    fv_wait_for_prior_launch();
    if (threadIdx.x == 0) {
        const uint64_t ns = clock_ns();

        __threadfence_system(); /* results before the word that announces them */
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(record), "r"(n_done), "r"(0U),
                     "r"((uint32_t)ns), "r"((uint32_t)(ns >> 32U))
                     : "memory");
    }
}

/* Kernels that wait for the launch before themselves may be set up while it runs. */
static cudaLaunchConfig_t
early_config(cudaLaunchAttribute *attribute, bool is_early, cudaStream_t stream)
{
    cudaLaunchConfig_t config = {};

    attribute->id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute->val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(1);
    config.blockDim = dim3(32);
    config.stream = stream;
    config.attrs = attribute;
    config.numAttrs = is_early ? 1 : 0;
    return config;
}

cudaError_t fv_pull_launch(const fv_pull_launch_t *launch, cudaStream_t stream)
{
    pull_kernel<<<launch->n_units, THREADS, 0, stream>>>(*launch);
    return cudaGetLastError();
}

cudaError_t fv_stamp_launch(uint64_t *ns, bool is_early, cudaStream_t stream)
{
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = early_config(&attribute, is_early, stream);

    return cudaLaunchKernelEx(&config, stamp_kernel, ns);
}

cudaError_t
fv_done_launch(fv_cuda_record_t *record, uint32_t n_done, bool is_early, cudaStream_t stream)
{
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = early_config(&attribute, is_early, stream);

    return cudaLaunchKernelEx(&config, done_kernel, record, n_done);
}
