/*
 * merge_cuda.cu - partial states of rows whose KV spans ranks become results. The formula is in kernels.h.
 *
 * Decode path: station 8 of 10. Before: merge_cuda.c. After: worker/step.c.
 *
 * With pairs, this kernel is also the end of the exchange: peers wrote their states straight into this device's memory,
 * as this device did into theirs. Block 0 tells each peer that all of it is there (release), every block waits until each
 * peer has said so (acquire). Waiting is safe however many blocks fit the device: the signals come from block 0, which
 * is the first to run and signals before it waits, so no rank waits for a block that has no room. It is bounded too, by
 * the device's clock and by a word that the host can set.
 */
#include "kernels/merge_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <math.h>

#define WARPS      4U
#define THREADS    (WARPS * 32U)
#define BLOCKS_MAX 1056U /* 8 for each SM; more rows go round */
#define AT_ONCE    4U    /* parts whose rows are read together */
#define COLS       2U    /* float4 of each lane: head_dim_v <= 256 */
#define POLLS      256U  /* between looks at clock and abort word */
#define LN2        0.69314718055994530942F

static __device__ __forceinline__ uint64_t clock_ns()
{
    uint64_t t = 0;

    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

/* Everything before it, of the kernels this one depends on too, is visible to the peer that sees the value. */
static __device__ __forceinline__ void signal(uint32_t *at, uint32_t value)
{
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

static __device__ __forceinline__ uint32_t look(const uint32_t *at)
{
    uint32_t value = 0;

    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}

/* Values count up and wrap: later ones will do, a peer may be ahead by one. */
static __device__ bool await(const fv_merge_launch_t &p, const uint32_t *at, uint32_t value)
{
    uint64_t begin = 0;

    for (uint32_t i = 0;; i++) {
        if ((int32_t)(look(at) - value) >= 0) {
            return true;
        }
        if (i % POLLS == POLLS - 1U) {
            const uint64_t now = clock_ns();

            begin = (begin == 0) ? now : begin;
            if ((now - begin > p.deadline_ns) || (*p.abort != 0)) {
                return false;
            }
        }
    }
}

/* True when all peers' states are there. The same answer for the whole block. */
static __device__ bool meet(const fv_merge_launch_t &p, const fv_merge_pair_t *pairs)
{
    bool is_there = true;

    if (blockIdx.x == 0) {
        for (uint32_t i = threadIdx.x; i < p.n_pairs; i += THREADS) {
            signal(pairs[i].signal, pairs[i].value);
        }
    }
    for (uint32_t i = threadIdx.x; is_there && (i < p.n_pairs); i += THREADS) {
        is_there = await(p, pairs[i].awaited, pairs[i].value);
        if (!is_there) {
            *p.gave_up = i + 1U;
        }
    }
    return __syncthreads_and(is_there ? 1 : 0) != 0;
}

/* The unit that holds the row. */
static __device__ const fv_merge_unit_t *
find_unit(const fv_merge_unit_t *units, uint32_t n_units, uint64_t row)
{
    uint32_t low = 0;
    uint32_t high = n_units;

    while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;

        if (units[middle].row_begin <= row) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return units + low;
}

static __device__ __forceinline__ uint32_t pack_bf16(float a, float b)
{
    const __nv_bfloat162 packed = __floats2bfloat162_rn(a, b);

    return *(const uint32_t *)&packed;
}

static __device__ __forceinline__ uint32_t pack_f16(float a, float b)
{
    const __half2 packed = __floats2half2_rn(a, b);

    return *(const uint32_t *)&packed;
}

/* Four columns; `at` may have any alignment that the element has. */
static __device__ void store4(uint8_t *at, int32_t dtype, float4 x)
{
    if (dtype == FV_DTYPE_F32) {
        if (((uintptr_t)at & 15U) == 0) {
            *(float4 *)at = x;
            return;
        }
        ((float *)at)[0] = x.x;
        ((float *)at)[1] = x.y;
        ((float *)at)[2] = x.z;
        ((float *)at)[3] = x.w;
        return;
    }
    const bool is_bf16 = dtype == FV_DTYPE_BF16;
    const uint32_t low = is_bf16 ? pack_bf16(x.x, x.y) : pack_f16(x.x, x.y);
    const uint32_t high = is_bf16 ? pack_bf16(x.z, x.w) : pack_f16(x.z, x.w);

    if (((uintptr_t)at & 7U) == 0) {
        *(uint2 *)at = make_uint2(low, high);
        return;
    }
    ((uint16_t *)at)[0] = (uint16_t)low;
    ((uint16_t *)at)[1] = (uint16_t)(low >> 16U);
    ((uint16_t *)at)[2] = (uint16_t)high;
    ((uint16_t *)at)[3] = (uint16_t)(high >> 16U);
}

/* What a warp needs of a row to merge it. Worked out before waiting, for the warp's first row. */
typedef struct job {
    const fv_merge_part_t *parts;
    uint8_t *out; /* of the row */
    float *lse;   /* of the row, or NULL */
    uint64_t i;   /* row of the parts */
    uint32_t n_parts, dv;
    int32_t io_dtype;
} job_t;

static __device__ __forceinline__ job_t make_job(const fv_merge_unit_t *units,
                                                 uint32_t n_units,
                                                 const fv_merge_part_t *parts,
                                                 uint64_t row)
{
    const fv_merge_unit_t *u = find_unit(units, n_units, row);
    const uint64_t i = row - u->row_begin;
    const uint64_t at = u->row_base + i;
    const bool is_small = (at >> 32U) == 0 && (u->row_len >> 32U) == 0; /* division is dear */
    const uint64_t t =
        is_small ? (uint64_t)((uint32_t)at / (uint32_t)u->row_len) : (at / u->row_len);
    const uint64_t h = at - t * u->row_len;
    const uint64_t e = (u->io_dtype == FV_DTYPE_F32) ? 4U : 2U;
    job_t job;

    job.parts = parts + u->part_begin;
    job.out = u->out + (t - u->out_first) * u->out_token_bytes + h * (uint64_t)u->head_dim_v * e;
    job.lse = (u->lse == NULL) ? NULL : (u->lse + (t - u->lse_first) * u->lse_token_stride + h);
    job.i = i;
    job.n_parts = u->n_parts;
    job.dv = (uint32_t)u->head_dim_v;
    job.io_dtype = u->io_dtype;
    return job;
}

/* Up to AT_ONCE parts of a row, their loads under way together. This lane's columns. */
typedef struct batch {
    float4 o[AT_ONCE][COLS];
    float lse[AT_ONCE];
} batch_t;

static __device__ __forceinline__ void load_batch(batch_t *b, const job_t &job, uint32_t first)
{
    const uint32_t lane = threadIdx.x & 31U;

#pragma unroll
    for (uint32_t i = 0; i < AT_ONCE; i++) {
        const fv_merge_part_t part = job.parts[min(first + i, job.n_parts - 1U)];

        b->lse[i] = __ldcg(part.lse_log2 + job.i);
#pragma unroll
        for (uint32_t c = 0; c < COLS; c++) {
            const uint32_t col = min((c * 32U + lane) * 4U, job.dv - 4U);

            if (c * 128U < job.dv) {
                b->o[i][c] = __ldcg((const float4 *)(part.o + job.i * job.dv + col));
            }
        }
    }
}

/* The sum so far of a row, this lane's columns. */
typedef struct row_sum {
    float4 o[COLS];
    float weight;
} row_sum_t;

/* An empty part's o may be anything and is not multiplied. */
static __device__ __forceinline__ void
add_batch(row_sum_t *sum, const batch_t &b, const job_t &job, uint32_t first, float top)
{
#pragma unroll
    for (uint32_t i = 0; i < AT_ONCE; i++) {
        if ((first + i < job.n_parts) && (b.lse[i] != -INFINITY)) {
            const float w = exp2f(b.lse[i] - top);

            sum->weight += w;
#pragma unroll
            for (uint32_t c = 0; c < COLS; c++) {
                sum->o[c].x += w * b.o[i][c].x;
                sum->o[c].y += w * b.o[i][c].y;
                sum->o[c].z += w * b.o[i][c].z;
                sum->o[c].w += w * b.o[i][c].w;
            }
        }
    }
}

static __device__ __forceinline__ void store_row(const job_t &job, const row_sum_t &sum, float top)
{
    const uint32_t lane = threadIdx.x & 31U;
    const uint64_t e = (job.io_dtype == FV_DTYPE_F32) ? 4U : 2U;
    const float w = sum.weight;
    const bool is_empty = w == 0.0F;

#pragma unroll
    for (uint32_t c = 0; c < COLS; c++) {
        const uint32_t col = (c * 32U + lane) * 4U;

        if (col < job.dv) {
            store4(job.out + col * e, job.io_dtype,
                   make_float4(
                       is_empty ? 0.0F : (sum.o[c].x / w), is_empty ? 0.0F : (sum.o[c].y / w),
                       is_empty ? 0.0F : (sum.o[c].z / w), is_empty ? 0.0F : (sum.o[c].w / w)));
        }
    }
    if ((lane == 0) && (job.lse != NULL)) {
        *job.lse = (top + log2f(w)) * LN2;
    }
}

/* One row by one warp. A NaN lse may be dropped by the maximum; its weight is NaN and takes the row with it. */
static __device__ __forceinline__ void merge_row(const job_t &job)
{
    row_sum_t sum = {};
    float top = -INFINITY;
    batch_t b;

    load_batch(&b, job, 0);
    if (job.n_parts <= AT_ONCE) { /* one round of loads */
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) { /* the last part again and again does no harm */
            top = (b.lse[i] > top) ? b.lse[i] : top;
        }
        add_batch(&sum, b, job, 0, top);
        store_row(job, sum, top);
        return;
    }
    for (uint32_t part = 0; part < job.n_parts; part++) {
        const float lse = __ldcg(job.parts[part].lse_log2 + job.i);

        top = (lse > top) ? lse : top;
    }
    for (uint32_t first = 0; first < job.n_parts; first += AT_ONCE) {
        load_batch(&b, job, first);
        add_batch(&sum, b, job, first, top);
    }
    store_row(job, sum, top);
}

static __device__ __forceinline__ void merge(const fv_merge_launch_t &p, const uint8_t *blob)
{
    const fv_merge_pair_t *pairs = (const fv_merge_pair_t *)blob;
    const fv_merge_unit_t *units = (const fv_merge_unit_t *)(blob + fv_merge_units_at(p.n_pairs));
    const fv_merge_part_t *parts =
        (const fv_merge_part_t *)(blob + fv_merge_parts_at(p.n_pairs, p.n_units));
    const uint64_t stride = (uint64_t)gridDim.x * WARPS;
    uint64_t row = (uint64_t)blockIdx.x * WARPS + (threadIdx.x >> 5U);
    job_t job = {};

    if (p.is_staged != 0) { /* the blob itself comes by what stands before on the stream */
        asm volatile("griddepcontrol.wait;" ::: "memory");
    }
    if (row < p.n_rows) {
        job = make_job(units, p.n_units, parts, row);
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if ((p.attended_ns != nullptr) && (blockIdx.x == 0) && (threadIdx.x == 0)) {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(*p.attended_ns));
    }
    if (!meet(p, pairs)) {
        return;
    }
    while (row < p.n_rows) {
        merge_row(job);
        row += stride;
        if (row < p.n_rows) {
            job = make_job(units, p.n_units, parts, row);
        }
    }
}

template <uint32_t BYTES> struct blob_t {
    alignas(16) uint8_t data[BYTES];
};

template <uint32_t BYTES>
static __global__ void __launch_bounds__(THREADS)
    merge_kernel(const __grid_constant__ fv_merge_launch_t p,
                 const __grid_constant__ blob_t<BYTES> blob)
{
    merge(p, blob.data);
}

static __global__ void __launch_bounds__(THREADS)
    merge_staged_kernel(const __grid_constant__ fv_merge_launch_t p)
{
    merge(p, p.blob);
}

static __global__ void __launch_bounds__(THREADS) empty_kernel(float *lse_log2, uint64_t n)
{
    const uint64_t i = (uint64_t)blockIdx.x * THREADS + threadIdx.x;

    if (i < n) {
        lse_log2[i] = -INFINITY;
    }
}

static cudaError_t
start(const void *kernel, const fv_merge_launch_t *launch, void **args, cudaStream_t stream)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    uint64_t n_blocks = (launch->n_rows + WARPS - 1U) / WARPS;

    n_blocks = (n_blocks < 1U) ? 1U : n_blocks; /* nothing to merge, but somebody to tell */
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3((uint32_t)((n_blocks < BLOCKS_MAX) ? n_blocks : BLOCKS_MAX));
    config.blockDim = dim3(THREADS);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelExC(&config, kernel, args);
}

/* The parameters' blob is read up to the kernel's size, so it is copied into a buffer of that size. */
template <uint32_t BYTES>
static cudaError_t start_inline(const fv_merge_launch_t *launch, cudaStream_t stream)
{
    static thread_local blob_t<BYTES> blob;
    fv_merge_launch_t copy = *launch;
    void *args[2] = {&copy, &blob};

    for (uint64_t i = 0; i < launch->blob_bytes; i += 16U) {
        *(uint4 *)(blob.data + i) = *(const uint4 *)(launch->blob + i);
    }
    return start((const void *)merge_kernel<BYTES>, launch, args, stream);
}

cudaError_t fv_merge_launch(const fv_merge_launch_t *launch, cudaStream_t stream)
{
    if (launch->blob_bytes <= 1024U) {
        return start_inline<1024U>(launch, stream);
    }
    if (launch->blob_bytes <= 8192U) {
        return start_inline<8192U>(launch, stream);
    }
    if (launch->blob_bytes <= FV_MERGE_BLOB_MAX) {
        return start_inline<FV_MERGE_BLOB_MAX>(launch, stream);
    }
    fv_merge_launch_t copy = *launch;
    void *args[1] = {&copy};

    return start((const void *)merge_staged_kernel, launch, args, stream);
}

cudaError_t fv_merge_empty_launch(float *lse_log2, uint64_t n, cudaStream_t stream)
{
    if (n == 0) {
        return cudaSuccess;
    }
    empty_kernel<<<(uint32_t)((n + THREADS - 1U) / THREADS), THREADS, 0, stream>>>(lse_log2, n);
    return cudaGetLastError();
}
