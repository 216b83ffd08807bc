/*
 * merge_cuda.cu - partial states of rows whose KV spans ranks become results. The formula is in kernels.h.
 *
 * Decode path: station 8 of 10. Before: merge_cuda.c. After: worker/step.c.
 *
 * With pairs, this kernel is also the end of the exchange (fv_merge_pair_t). Large states were written by the attention
 * of each rank straight into the memory of the one that merges them: block 0 tells each peer that all of it is there
 * (release), every block waits until each peer has said so (acquire). Small ones this kernel copies over first, LL: each
 * word comes with its own proof of being there, so nothing is told, released or acquired; a reader asks for the words it
 * needs until they are there.
 *
 * Waiting is safe. With flags, whatever the number of blocks: block 0 signals before it waits and is the first to run.
 * With LL, because all blocks of the launch fit the device at once, and each sends its part before it waits. It is
 * bounded too, by the device's clock and by a word that the host can set.
 */
#include "kernels/merge_cuda.h"
#include "kernels/ptx.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <math.h>

#define WARPS      4U
#define THREADS    (WARPS * 32U)
#define BLOCKS_MAX 1056U                  /* 8 for each SM; more rows go round */
#define AT_ONCE    4U                     /* parts whose rows are read together */
#define COLS       (FV_MERGE_DIMS / 128U) /* float4 of each lane */
#define POLLS      256U                   /* between looks at clock and abort word */
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

/* After look number n: has waiting lasted too long, or has the host ended it? Then it is noted that `pair` never came. */
static __device__ __forceinline__ bool
is_in_vain(const fv_merge_launch_t &p, uint32_t n, uint64_t *begin, uint32_t pair)
{
    if (n % POLLS != POLLS - 1U) {
        return false;
    }
    const uint64_t now = clock_ns();

    *begin = (*begin == 0) ? now : *begin;
    if ((now - *begin <= p.deadline_ns) && (*p.abort == 0)) {
        return false;
    }
    *p.gave_up = pair + 1U;
    return true;
}

/* Values count up and wrap: later ones will do, a peer may be ahead by one. */
static __device__ bool
await(const fv_merge_launch_t &p, const uint32_t *at, uint32_t value, uint32_t pair)
{
    uint64_t begin = 0;

    for (uint32_t n = 0; (int32_t)(look(at) - value) < 0; n++) {
        if (is_in_vain(p, n, &begin, pair)) {
            return false;
        }
    }
    return true;
}

/* Two words and their proofs; each half of 8 bytes is written and read as one. */
static __device__ __forceinline__ void send_ll(uint32_t *at, uint32_t a, uint32_t b, uint32_t value)
{
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %3, %2, %3};" ::"l"(at), "r"(a), "r"(b),
                 "r"(value)
                 : "memory");
}

static __device__ __forceinline__ uint4 look_ll(const uint32_t *at)
{
    uint4 x;

    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(at)
                 : "memory");
    return x;
}

static __device__ __forceinline__ uint2 look_ll2(const uint32_t *at)
{
    uint2 x;

    asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(x.x), "=r"(x.y)
                 : "l"(at)
                 : "memory");
    return x;
}

static __device__ __forceinline__ bool has_come(uint4 x, uint32_t value)
{
    return (x.y == value) && (x.w == value);
}

/* This launch's small messages, dealt out over all its threads. */
static __device__ __forceinline__ void send_all_ll(const fv_merge_launch_t &p,
                                                   const fv_merge_pair_t *pairs)
{
    for (uint64_t quad = (uint64_t)blockIdx.x * THREADS + threadIdx.x; quad < p.ll_quads;
         quad += (uint64_t)gridDim.x * THREADS) {
        for (uint32_t i = 0; i < p.n_pairs; i++) {
            const fv_merge_pair_t &pair = pairs[i];

            if (quad < pair.send_bytes / 16U) {
                const uint4 x = __ldcg((const uint4 *)pair.send + quad);

                send_ll(pair.ll_send + quad * 8U, x.x, x.y, pair.value);
                send_ll(pair.ll_send + quad * 8U + 4U, x.z, x.w, pair.value);
            }
        }
    }
}

/* True when all states that flags stand for are there. The same answer for the whole block. */
static __device__ bool meet(const fv_merge_launch_t &p, const fv_merge_pair_t *pairs)
{
    bool is_there = true;

    if (blockIdx.x == 0) {
        for (uint32_t i = threadIdx.x; i < p.n_pairs; i += THREADS) {
            if (pairs[i].signal != NULL) {
                signal(pairs[i].signal, pairs[i].value);
            }
        }
    }
    for (uint32_t i = threadIdx.x; is_there && (i < p.n_pairs); i += THREADS) {
        is_there = (pairs[i].awaited == NULL) || await(p, pairs[i].awaited, pairs[i].value, i);
    }
    return __syncthreads_and(is_there ? 1 : 0) != 0;
}

/* LL: the launch does not end before each peer has begun the step, though no row here may need what it sends. */
static __device__ void see_all_begun(const fv_merge_launch_t &p, const fv_merge_pair_t *pairs)
{
    for (uint32_t i = threadIdx.x; i < p.n_pairs; i += THREADS) {
        uint64_t begin = 0;

        for (uint32_t n = 0;
             (pairs[i].recv_bytes > 0U) && (look_ll2(pairs[i].ll_recv).y != pairs[i].value); n++) {
            if (is_in_vain(p, n, &begin, i)) {
                break;
            }
        }
    }
}

/* The unit that holds the row. */
static __device__ const fv_merge_unit_t *
find_unit(const fv_merge_unit_t *units, uint32_t n_units, uint64_t row)
{
    uint32_t low = 0;
    uint32_t high = n_units;

    while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;

        if (units[middle].job_begin <= row) {
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
    uint32_t begin, end; /* its columns */
    int32_t io_dtype;
} job_t;

static __device__ __forceinline__ job_t make_job(const fv_merge_unit_t *units,
                                                 uint32_t n_units,
                                                 const fv_merge_part_t *parts,
                                                 uint64_t row)
{
    const fv_merge_unit_t *u = find_unit(units, n_units, row);
    const uint32_t n_jobs = fv_merge_row_jobs(u->head_dim_v);
    const uint32_t which = (n_jobs == 1U) ? 0U : (uint32_t)((row - u->job_begin) % n_jobs);
    const uint64_t i = (n_jobs == 1U) ? (row - u->job_begin) : ((row - u->job_begin) / n_jobs);
    const uint64_t at = u->row_base + i;
    const bool is_small = (at >> 32U) == 0 && (u->row_len >> 32U) == 0; /* division is dear */
    const uint64_t t =
        is_small ? (uint64_t)((uint32_t)at / (uint32_t)u->row_len) : (at / u->row_len);
    const uint64_t h = at - t * u->row_len;
    job_t job;

    job.parts = parts + u->part_begin;
    job.out = u->out + (t - u->out_first) * u->out_token_bytes + h * u->out_head_bytes;
    job.lse = (u->lse == NULL) ? NULL : (u->lse + (t - u->lse_first) * u->lse_token_stride + h);
    job.i = i;
    job.n_parts = u->n_parts;
    job.dv = (uint32_t)u->head_dim_v;
    job.begin = which * FV_MERGE_DIMS;
    job.end = min(job.begin + FV_MERGE_DIMS, job.dv);
    job.io_dtype = u->io_dtype;
    return job;
}

/* Up to AT_ONCE parts of a row, their loads under way together. This lane's columns. */
typedef struct batch {
    float4 o[AT_ONCE][COLS];
    float lse[AT_ONCE];
} batch_t;

/* This lane's columns of a part that comes by LL, with their proofs. */
typedef struct words {
    uint4 low[COLS], high[COLS];
    uint2 lse;
} words_t;

static __device__ __forceinline__ void
look_words(words_t *w, const job_t &job, const fv_merge_part_t &part)
{
    w->lse = look_ll2((const uint32_t *)part.lse_log2 + 2U * job.i);
#pragma unroll
    for (uint32_t c = 0; c < COLS; c++) {
        const uint32_t col = min(job.begin + (c * 32U + (threadIdx.x & 31U)) * 4U, job.end - 4U);
        const uint32_t *at = (const uint32_t *)part.o + 2U * (job.i * job.dv + col);

        if (job.begin + c * 128U < job.end) {
            w->low[c] = look_ll(at);
            w->high[c] = look_ll(at + 4);
        }
    }
}

/* Are all words there? Then they are the part's row. */
static __device__ __forceinline__ bool
take_words(batch_t *b, uint32_t i, const words_t &w, const job_t &job, uint32_t value)
{
    bool is_there = w.lse.y == value;

#pragma unroll
    for (uint32_t c = 0; c < COLS; c++) {
        if (job.begin + c * 128U < job.end) {
            b->o[i][c] = make_float4(__uint_as_float(w.low[c].x), __uint_as_float(w.low[c].z),
                                     __uint_as_float(w.high[c].x), __uint_as_float(w.high[c].z));
            is_there = is_there && has_come(w.low[c], value) && has_come(w.high[c], value);
        }
    }
    b->lse[i] = __uint_as_float(w.lse.x);
    return is_there;
}

static __device__ __forceinline__ void
load_plain(batch_t *b, uint32_t i, const job_t &job, const fv_merge_part_t &part)
{
    b->lse[i] = __ldcg(part.lse_log2 + job.i);
#pragma unroll
    for (uint32_t c = 0; c < COLS; c++) {
        const uint32_t col = min(job.begin + (c * 32U + (threadIdx.x & 31U)) * 4U, job.end - 4U);

        if (job.begin + c * 128U < job.end) {
            b->o[i][c] = __ldcg((const float4 *)(part.o + job.i * job.dv + col));
        }
    }
}

/* All loads are under way before the first is looked at; what has not come is looked for again. */
template <bool HAS_LL>
static __device__ __forceinline__ void
load_batch(const fv_merge_launch_t &p, batch_t *b, const job_t &job, uint32_t first)
{
    words_t words[AT_ONCE];

#pragma unroll
    for (uint32_t i = 0; i < AT_ONCE; i++) {
        b->lse[i] = -INFINITY;
        if (first + i < job.n_parts) {
            const fv_merge_part_t &part = job.parts[first + i];

            if (!HAS_LL || (part.value == 0U)) {
                load_plain(b, i, job, part);
            } else {
                look_words(&words[i], job, part);
            }
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < AT_ONCE; i++) {
        if (HAS_LL && (first + i < job.n_parts) && (job.parts[first + i].value != 0U)) {
            const fv_merge_part_t &part = job.parts[first + i];
            uint64_t begin = 0;

            for (uint32_t n = 0; !take_words(b, i, words[i], job, part.value); n++) {
                if (is_in_vain(p, n, &begin, part.pair)) {
                    break;
                }
                look_words(&words[i], job, part);
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

static __device__ __forceinline__ void scale_sum(row_sum_t *sum, float w)
{
    sum->weight *= w;
#pragma unroll
    for (uint32_t c = 0; c < COLS; c++) {
        sum->o[c].x *= w;
        sum->o[c].y *= w;
        sum->o[c].z *= w;
        sum->o[c].w *= w;
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
        const uint32_t col = job.begin + (c * 32U + lane) * 4U;

        if (col < job.end) {
            store4(job.out + col * e, job.io_dtype,
                   make_float4(
                       is_empty ? 0.0F : (sum.o[c].x / w), is_empty ? 0.0F : (sum.o[c].y / w),
                       is_empty ? 0.0F : (sum.o[c].z / w), is_empty ? 0.0F : (sum.o[c].w / w)));
        }
    }
    if ((lane == 0) && (job.begin == 0) && (job.lse != NULL)) {
        *job.lse = (top + log2f(w)) * LN2;
    }
}

/* One row by one warp. A NaN lse may be dropped by the maximum; its weight is NaN and takes the row with it. */
template <bool HAS_LL>
static __device__ __forceinline__ void merge_row(const fv_merge_launch_t &p, const job_t &job)
{
    row_sum_t sum = {};
    float top = -INFINITY;
    batch_t b;

    load_batch<HAS_LL>(p, &b, job, 0);
    if (job.n_parts <= AT_ONCE) { /* one round of loads */
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) { /* those that do not exist are empty */
            top = (b.lse[i] > top) ? b.lse[i] : top;
        }
        add_batch(&sum, b, job, 0, top);
        store_row(job, sum, top);
        return;
    }
    for (uint32_t first = 0; first < job.n_parts; first += AT_ONCE) {
        float next = top;

        if (first > 0) {
            load_batch<HAS_LL>(p, &b, job, first);
        }
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            next = (b.lse[i] > next) ? b.lse[i] : next;
        }
        if ((next > top) &&
            (top != -INFINITY)) { /* a maximum is known only for parts that have come */
            scale_sum(&sum, exp2f(top - next));
        }
        top = next;
        add_batch(&sum, b, job, first, top);
    }
    store_row(job, sum, top);
}

/* Without LL the code is smaller and more blocks run at once. */
template <bool HAS_LL>
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
        fv_wait_for_prior_launch();
    }
    if (row < p.n_jobs) {
        job = make_job(units, p.n_units, parts, row);
    }
    fv_wait_for_prior_launch();
    const uint64_t attended_ns = clock_ns();

    if (HAS_LL) {
        send_all_ll(p, pairs);
    }
    if ((p.n_flags > 0U) && !meet(p, pairs)) {
        return;
    }
    if ((p.attended_ns != nullptr) && (blockIdx.x == 0) && (threadIdx.x == 0)) {
        *p.attended_ns =
            attended_ns; /* over the bus: not before the signal, whose release would wait for it */
    }
    while (row < p.n_jobs) {
        merge_row<HAS_LL>(p, job);
        row += stride;
        if (row < p.n_jobs) {
            job = make_job(units, p.n_units, parts, row);
        }
    }
    if (HAS_LL && (blockIdx.x == 0)) {
        see_all_begun(p, pairs);
    }
}

template <uint32_t BYTES> struct blob_t {
    alignas(16) uint8_t data[BYTES];
};

template <uint32_t BYTES, bool HAS_LL>
static __global__ void __launch_bounds__(THREADS)
    merge_kernel(const __grid_constant__ fv_merge_launch_t p,
                 const __grid_constant__ blob_t<BYTES> blob)
{
    merge<HAS_LL>(p, blob.data);
}

template <bool HAS_LL>
static __global__ void __launch_bounds__(THREADS)
    merge_staged_kernel(const __grid_constant__ fv_merge_launch_t p)
{
    merge<HAS_LL>(p, p.blob);
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
    uint64_t n_blocks = (launch->n_jobs + WARPS - 1U) / WARPS;

    const uint64_t n_senders = (launch->ll_quads + THREADS - 1U) / THREADS;
    const uint64_t most = (launch->ll_quads > 0U) ? launch->n_blocks_ll : BLOCKS_MAX;

    n_blocks = (n_blocks < n_senders) ? n_senders : n_blocks;
    n_blocks = (n_blocks < 1U) ? 1U : n_blocks; /* nothing to merge, but somebody to tell */
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3((uint32_t)((n_blocks < most) ? n_blocks : most));
    config.blockDim = dim3(THREADS);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = launch->is_early;
    return cudaLaunchKernelExC(&config, kernel, args);
}

/* The parameters' blob is read up to the kernel's size, so it is copied into a buffer of that size. */
template <uint32_t BYTES, bool HAS_LL>
static cudaError_t start_inline(const fv_merge_launch_t *launch, cudaStream_t stream)
{
    static thread_local blob_t<BYTES> blob;
    fv_merge_launch_t copy = *launch;
    void *args[2] = {&copy, &blob};

    for (uint64_t i = 0; i < launch->blob_bytes; i += 16U) {
        *(uint4 *)(blob.data + i) = *(const uint4 *)(launch->blob + i);
    }
    return start((const void *)merge_kernel<BYTES, HAS_LL>, launch, args, stream);
}

template <bool HAS_LL>
static cudaError_t choose(const fv_merge_launch_t *launch, cudaStream_t stream)
{
    if (launch->blob_bytes <= 1024U) {
        return start_inline<1024U, HAS_LL>(launch, stream);
    }
    if (launch->blob_bytes <= 8192U) {
        return start_inline<8192U, HAS_LL>(launch, stream);
    }
    if (launch->blob_bytes <= FV_MERGE_BLOB_MAX) {
        return start_inline<FV_MERGE_BLOB_MAX, HAS_LL>(launch, stream);
    }
    fv_merge_launch_t copy = *launch;
    void *args[1] = {&copy};

    return start((const void *)merge_staged_kernel<HAS_LL>, launch, args, stream);
}

cudaError_t fv_merge_launch(const fv_merge_launch_t *launch, cudaStream_t stream)
{
    return (launch->ll_quads > 0U) ? choose<true>(launch, stream) : choose<false>(launch, stream);
}

cudaError_t fv_merge_empty_launch(float *lse_log2, uint64_t n, cudaStream_t stream)
{
    if (n == 0) {
        return cudaSuccess;
    }
    empty_kernel<<<(uint32_t)((n + THREADS - 1U) / THREADS), THREADS, 0, stream>>>(lse_log2, n);
    return cudaGetLastError();
}
