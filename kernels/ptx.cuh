/*
 * ptx.cuh - the instructions that have no C name: barriers, asynchronous copies, ldmatrix, mma.
 *
 * sm_90 has what the kernels are written for: bulk copies that a barrier counts in bytes, launches that overlap. Code for
 * sm_80 does the same with copies of 16 bytes that each lane reports to the barrier, and with launches in order.
 */
#ifndef FV_KERNELS_PTX_CUH
#define FV_KERNELS_PTX_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdint.h>

#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900)
#    define FV_HAS_SM90 0
#else
#    define FV_HAS_SM90 1
#endif
/* wgmma and setmaxnreg: of sm_90a alone. */
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#    define FV_HAS_WGMMA 0
#else
#    define FV_HAS_WGMMA 1
#endif

/* ------------------------------------------------------------------ shared-memory barriers */

static __device__ __forceinline__ uint32_t fv_smem(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

static __device__ __forceinline__ void fv_mbar_init(uint64_t *bar, uint32_t n_arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(fv_smem(bar)), "r"(n_arrivals)
                 : "memory");
}

/* Makes the initialisations visible to the copy engine. */
static __device__ __forceinline__ void fv_mbar_init_fence()
{
#if FV_HAS_SM90
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

/* sm_90. */
static __device__ __forceinline__ void fv_mbar_expect(uint64_t *bar, uint32_t n_bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(fv_smem(bar)),
                 "r"(n_bytes)
                 : "memory");
}

static __device__ __forceinline__ void fv_mbar_arrive(uint64_t *bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(fv_smem(bar)) : "memory");
}

static __device__ __forceinline__ void fv_mbar_wait(uint64_t *bar, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
#if FV_HAS_SM90
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
#else
                 "mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
#endif
                 "@done bra over;\n"
                 "bra again;\n"
                 "over:\n"
                 "}\n" ::"r"(fv_smem(bar)),
                 "r"(parity)
                 : "memory");
}

/* For data that is read once: first to leave L2. */
static __device__ __forceinline__ uint64_t fv_evict_first()
{
    uint64_t policy;

    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

/* n_bytes (multiple of 16) from global to shared memory; both 16-byte aligned. sm_90. */
static __device__ __forceinline__ void
fv_bulk_load(void *dst, const void *src, uint32_t n_bytes, uint64_t *bar, uint64_t policy)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1], %2, [%3], %4;" ::"r"(fv_smem(dst)),
                 "l"(src), "r"(n_bytes), "r"(fv_smem(bar)), "l"(policy)
                 : "memory");
}

/* The same by a whole warp, whose lanes then say so: fv_copies_arrive(). */
static __device__ __forceinline__ void
fv_warp_load(void *dst, const void *src, uint32_t n_bytes, uint64_t policy)
{
    for (uint32_t at = (threadIdx.x & 31U) * 16U; at < n_bytes; at += 32U * 16U) {
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(
                         fv_smem((uint8_t *)dst + at)),
                     "l"((const uint8_t *)src + at), "l"(policy)
                     : "memory");
    }
}

/* Arrives at the barrier when all copies that this thread has asked for have come. */
static __device__ __forceinline__ void fv_copies_arrive(uint64_t *bar)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(fv_smem(bar))
                 : "memory");
}

/* Barrier of a part of the CTA. */
static __device__ __forceinline__ void fv_bar_sync(int id, int n_threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

/* ------------------------------------------------------------------ between CTAs, between launches */

/* Adds 1 after all that this thread, and whom it met at a barrier, wrote before. */
static __device__ __forceinline__ void fv_add_release(uint32_t *counter)
{
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

/* The same, and what others wrote before they added is there afterwards. Returns the value before. */
static __device__ __forceinline__ uint32_t fv_add_acq_rel(uint32_t *counter)
{
    uint32_t before;

    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(counter)
                 : "memory");
    return before;
}

static __device__ __forceinline__ uint32_t fv_load_acquire(const uint32_t *counter)
{
    uint32_t value;

    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

/* Waits until the launch before in the stream is done and its writes are there; at once if it did not overlap. */
static __device__ __forceinline__ void fv_wait_for_prior_launch()
{
#if FV_HAS_SM90
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* The next launch in the stream may be brought onto the GPU, if it asked to be. */
static __device__ __forceinline__ void fv_launch_dependents()
{
#if FV_HAS_SM90
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* ------------------------------------------------------------------ loads */

/* Brings a line to L2. */
static __device__ __forceinline__ void fv_prefetch(const void *p)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/* Loads from L2 if is_wanted, without a branch; otherwise x stays as it is. */
static __device__ __forceinline__ void fv_load4_if(float4 *x, const float *p, bool is_wanted)
{
    asm volatile("{\n"
                 ".reg .pred wanted;\n"
                 "setp.ne.u32 wanted, %5, 0;\n"
                 "@wanted ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];\n"
                 "}\n"
                 : "+f"(x->x), "+f"(x->y), "+f"(x->z), "+f"(x->w)
                 : "l"(p), "r"(is_wanted ? 1U : 0U));
}

static __device__ __forceinline__ void fv_load2_if(float2 *x, const float *p, bool is_wanted)
{
    asm volatile("{\n"
                 ".reg .pred wanted;\n"
                 "setp.ne.u32 wanted, %3, 0;\n"
                 "@wanted ld.global.cg.v2.f32 {%0,%1}, [%2];\n"
                 "}\n"
                 : "+f"(x->x), "+f"(x->y)
                 : "l"(p), "r"(is_wanted ? 1U : 0U));
}

/* ------------------------------------------------------------------ matrices */

static __device__ __forceinline__ void fv_ldmatrix_x4(uint32_t r[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

static __device__ __forceinline__ void fv_ldmatrix_x4_trans(uint32_t r[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

/* D[16,8] += A[16,16] B[16,8], fp32 sums. */
template <bool IS_F16>
static __device__ __forceinline__ void
fv_mma(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    if (IS_F16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

/* ------------------------------------------------------------------ numbers */

static __device__ __forceinline__ float fv_exp2(float x)
{
    float y;

    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* The bf16 part of x by truncation: x - part is exact, and three parts hold every fp32 exactly. */
static __device__ __forceinline__ float fv_bf16_part(float x)
{
    return __uint_as_float(__float_as_uint(x) & 0xffff0000U);
}

/* Two values that are bf16 already, low half first. */
static __device__ __forceinline__ uint32_t fv_pack_parts(float low, float high)
{
    return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}

/* x less its bf16 part. An inf or NaN is all in its part: inf - inf would be NaN. */
static __device__ __forceinline__ float fv_bf16_rest(float x)
{
    return isfinite(x) ? (x - fv_bf16_part(x)) : 0.0F;
}

/* N_PARTS bf16 parts of two fp32 values; their sum is exact for 3 parts, and for fp16 values for 2. */
template <int N_PARTS>
static __device__ __forceinline__ void fv_split(uint32_t parts[N_PARTS], float low, float high)
{
#pragma unroll
    for (int i = 0; i < N_PARTS; i++) {
        float l = fv_bf16_part(low);
        float h = fv_bf16_part(high);

        parts[i] = fv_pack_parts(l, h);
        if (i + 1 < N_PARTS) {
            low = fv_bf16_rest(low);
            high = fv_bf16_rest(high);
        }
    }
}

/* The same by rounding: for weights, where two parts must reach 2^-17. */
template <bool IS_F16, int N_PARTS>
static __device__ __forceinline__ void
fv_split_rounded(uint32_t *parts, int stride, float low, float high)
{
#pragma unroll
    for (int i = 0; i < N_PARTS; i++) {
        if (IS_F16) {
            __half2 p = __floats2half2_rn(low, high);
            float2 back = __half22float2(p);

            parts[i * stride] = *(const uint32_t *)&p;
            low -= back.x;
            high -= back.y;
        } else {
            __nv_bfloat162 p = __floats2bfloat162_rn(low, high);
            float2 back = __bfloat1622float2(p);

            parts[i * stride] = *(const uint32_t *)&p;
            low -= back.x;
            high -= back.y;
        }
    }
}

#endif /* FV_KERNELS_PTX_CUH */
