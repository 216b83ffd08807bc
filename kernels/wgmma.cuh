/*
 * wgmma.cuh - matrix products of a warpgroup: descriptors of operands in shared memory, fences, and the instructions.
 *
 * Station 7 of 10. sm_90a. A warpgroup (4 warps, the first a multiple of 4) computes D[64, N] += A[64, 16] B[16, N]:
 *
 *     A  in shared memory, K-major: rows of 128 bytes with the 128-byte swizzle (page_layout_cuda.h), or in registers
 *     B  in shared memory: K-major ("B^T", N rows), or MN-major (16 rows of k, N elements each, in panels of 64)
 *     D  in registers: warp w has rows 16 w + lane / 4 + {0, 8}; d[4 n + i] is column 8 n + 2 (lane % 4) + i % 2 of
 *        row + 8 (i / 2). Two neighbouring groups of 8 columns, converted, are an A in registers.
 *
 * Use: fence, products, commit, wait. Until the wait nothing may touch the registers of D or A, and nobody may write
 * the shared memory of the operands. What ordinary stores put there needs fv_async_proxy_fence() by the storing thread,
 * then a barrier; what bulk copies put there needs the copy's barrier alone.
 */
#ifndef FV_KERNELS_WGMMA_CUH
#define FV_KERNELS_WGMMA_CUH

#include "kernels/ptx.cuh"

#define FV_WARPGROUP 128 /* threads */

/* ------------------------------------------------------------------ order */

/* Before the first product on registers that other instructions wrote. */
static __device__ __forceinline__ void fv_wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void fv_wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Until at most N_LEFT committed groups of this warp are under way. */
template <int N_LEFT> static __device__ __forceinline__ void fv_wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N_LEFT) : "memory");
}

/* This thread's ordinary stores to shared memory before what copy engine and tensor cores do there. */
static __device__ __forceinline__ void fv_async_proxy_fence()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Registers of each thread of the warpgroup from here on; N a multiple of 8. The kernel needs __launch_bounds__(n, 1). */
template <int N> static __device__ __forceinline__ void fv_registers_more()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> static __device__ __forceinline__ void fv_registers_fewer()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* ------------------------------------------------------------------ copies and barriers of such kernels */

/* fv_bulk_load() of data that others read again: as L2 sees fit. */
static __device__ __forceinline__ void
fv_bulk_load_l2(void *dst, const void *src, uint32_t n_bytes, uint64_t *bar)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1], %2, [%3];" ::"r"(fv_smem(dst)),
                 "l"(src), "r"(n_bytes), "r"(fv_smem(bar))
                 : "memory");
}

/* 16 bytes from global to shared memory, zeros if not is_there; until fv_copy16_wait() of the same thread. */
static __device__ __forceinline__ void fv_copy16(void *dst, const void *src, bool is_there)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(fv_smem(dst)), "l"(src),
                 "r"(is_there ? 16 : 0)
                 : "memory");
}

static __device__ __forceinline__ void fv_copy16_wait()
{
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* Arrives at fv_bar_sync()'s barrier without waiting. */
static __device__ __forceinline__ void fv_bar_arrive(int id, int n_threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

/* ------------------------------------------------------------------ operands in shared memory */

/*
 * 128-byte swizzle. address: of the operand's first byte in shared memory; the swizzle goes by address bits 7 to 9, so
 * panels begin at multiples of 1 KB. group_bytes: from 8 rows to the next 8 (of tokens in a panel: 1024). panel_bytes:
 * MN-major with N > 64: from one panel of 64 to the next; K-major: not used.
 * Steps of 16 along k: K-major 32 bytes further, MN-major 16 rows (2048 bytes).
 */
static __device__ __forceinline__ uint64_t fv_wgmma_desc(uint32_t address,
                                                         uint32_t group_bytes,
                                                         uint32_t panel_bytes)
{
    return (uint64_t)((address & 0x3ffffU) >> 4U) | ((uint64_t)(panel_bytes >> 4U) << 16U) |
           ((uint64_t)(group_bytes >> 4U) << 32U) | ((uint64_t)1U << 62U);
}

/* The operand n_bytes further. */
static __device__ __forceinline__ uint64_t fv_wgmma_desc_at(uint64_t desc, uint32_t n_bytes)
{
    return desc + (uint64_t)(n_bytes >> 4U);
}

/* ------------------------------------------------------------------ products */

#define FV_WGMMA_ACC8(d, i)                                                     \
    "+f"((d)[(i)]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3]), \
        "+f"((d)[(i) + 4]), "+f"((d)[(i) + 5]), "+f"((d)[(i) + 6]), "+f"((d)[(i) + 7])
#define FV_WGMMA_ACC32(d, i)                                                    \
    FV_WGMMA_ACC8(d, i), FV_WGMMA_ACC8(d, (i) + 8), FV_WGMMA_ACC8(d, (i) + 16), \
        FV_WGMMA_ACC8(d, (i) + 24)
#define FV_WGMMA_ACC64(d, i)  FV_WGMMA_ACC32(d, i), FV_WGMMA_ACC32(d, (i) + 32)
#define FV_WGMMA_ACC96(d, i)  FV_WGMMA_ACC64(d, i), FV_WGMMA_ACC32(d, (i) + 64)
#define FV_WGMMA_ACC128(d, i) FV_WGMMA_ACC64(d, i), FV_WGMMA_ACC64(d, (i) + 64)
#define FV_WGMMA_LIST32                                                       \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define FV_WGMMA_LIST64                                                                \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define FV_WGMMA_LIST96                                                                \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}"
#define FV_WGMMA_LIST128                                                                           \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                      \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

/*
 * The two instructions of one N. N_REGS = N / 2; A_, B_, C_ ... are the numbers of the operands behind them.
 * is_sum false: D = A B. TRANS_B: B is MN-major.
 */
#define FV_WGMMA_SS_ASM(N, N_REGS, TYPE, A_, B_, P_, T_)                                      \
    asm volatile("{\n.reg .pred sum;\nsetp.ne.b32 sum, %" #P_ ", 0;\n"                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE              \
                 " " FV_WGMMA_LIST##N_REGS ", %" #A_ ", %" #B_ ", sum, 1, 1, 0, %" #T_ ";\n}" \
                 : FV_WGMMA_ACC##N_REGS(d, 0)                                                 \
                 : "l"(a), "l"(b), "r"(is_sum ? 1 : 0), "n"(TRANS_B ? 1 : 0)                  \
                 : "memory")
#define FV_WGMMA_RS_ASM(N, N_REGS, TYPE, A0_, A1_, A2_, A3_, B_, P_, T_)                           \
    asm volatile("{\n.reg .pred sum;\nsetp.ne.b32 sum, %" #P_ ", 0;\n"                             \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                   \
                 " " FV_WGMMA_LIST##N_REGS ", {%" #A0_ ", %" #A1_ ", %" #A2_ ", %" #A3_ "}, %" #B_ \
                                           ", sum, 1, 1, %" #T_ ";\n}"                             \
                 : FV_WGMMA_ACC##N_REGS(d, 0)                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(is_sum ? 1 : 0),        \
                   "n"(TRANS_B ? 1 : 0)                                                            \
                 : "memory")
#define FV_WGMMA_DEFINE(N, N_REGS, R0, R1, R2, R3, R4, R5, R6)                                   \
    template <bool IS_F16, bool TRANS_B> struct fv_wgmma_n<N, IS_F16, TRANS_B> {                 \
        static __device__ __forceinline__ void ss(float *d, uint64_t a, uint64_t b, bool is_sum) \
        {                                                                                        \
            if (IS_F16) {                                                                        \
                FV_WGMMA_SS_ASM(N, N_REGS, "f16", R0, R1, R2, R3);                               \
            } else {                                                                             \
                FV_WGMMA_SS_ASM(N, N_REGS, "bf16", R0, R1, R2, R3);                              \
            }                                                                                    \
        }                                                                                        \
        static __device__ __forceinline__ void                                                   \
        rs(float *d, const uint32_t *a, uint64_t b, bool is_sum)                                 \
        {                                                                                        \
            if (IS_F16) {                                                                        \
                FV_WGMMA_RS_ASM(N, N_REGS, "f16", R0, R1, R2, R3, R4, R5, R6);                   \
            } else {                                                                             \
                FV_WGMMA_RS_ASM(N, N_REGS, "bf16", R0, R1, R2, R3, R4, R5, R6);                  \
            }                                                                                    \
        }                                                                                        \
    }

/* d [N / 2]. */
template <int N, bool IS_F16, bool TRANS_B> struct fv_wgmma_n;

FV_WGMMA_DEFINE(64, 32, 32, 33, 34, 35, 36, 37, 38);
FV_WGMMA_DEFINE(128, 64, 64, 65, 66, 67, 68, 69, 70);
FV_WGMMA_DEFINE(192, 96, 96, 97, 98, 99, 100, 101, 102);
FV_WGMMA_DEFINE(256, 128, 128, 129, 130, 131, 132, 133, 134);

/* D (+)= A B, A and B in shared memory. */
template <int N, bool IS_F16, bool TRANS_B>
static __device__ __forceinline__ void fv_wgmma_ss(float *d, uint64_t a, uint64_t b, bool is_sum)
{
    fv_wgmma_n<N, IS_F16, TRANS_B>::ss(d, a, b, is_sum);
}

/* D (+)= A B, A in registers: a [4]. */
template <int N, bool IS_F16, bool TRANS_B>
static __device__ __forceinline__ void
fv_wgmma_rs(float *d, const uint32_t *a, uint64_t b, bool is_sum)
{
    fv_wgmma_n<N, IS_F16, TRANS_B>::rs(d, a, b, is_sum);
}

#endif /* FV_KERNELS_WGMMA_CUH */
