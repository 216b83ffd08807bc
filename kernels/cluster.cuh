/*
 * cluster.cuh - instructions between the CTAs of one cluster: barriers, arrivals, bulk copies to all of them. sm_90.
 */
#ifndef FV_KERNELS_CLUSTER_CUH
#define FV_KERNELS_CLUSTER_CUH

#include "kernels/ptx.cuh"

/* All threads of all CTAs of the cluster meet. */
static __device__ __forceinline__ void fv_cluster_sync()
{
    asm volatile("barrier.cluster.arrive.aligned;\n"
                 "barrier.cluster.wait.aligned;" ::
                     : "memory");
}

/*
 * Arrives at the barrier that lies in CTA `rank` of the cluster where `bar` lies in this one. For "this may be overwritten":
 * it orders reads that are done, not writes that the other CTA is to see (release at cluster scope is a fence of the GPU).
 */
static __device__ __forceinline__ void fv_mbar_arrive_at(uint64_t *bar, uint32_t rank)
{
    asm volatile("{\n"
                 ".reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
                 "}\n" ::"r"(fv_smem(bar)),
                 "r"(rank)
                 : "memory");
}

/* fv_bulk_load() to the same place in each CTA of `mask`, whose own barrier counts the bytes. */
static __device__ __forceinline__ void fv_bulk_load_to(void *dst,
                                                       const void *src,
                                                       uint32_t n_bytes,
                                                       uint64_t *bar,
                                                       uint16_t mask,
                                                       uint64_t policy)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster.L2::cache_hint [%0], [%1], %2, [%3], %4, %5;" ::"r"(fv_smem(dst)),
        "l"(src), "r"(n_bytes), "r"(fv_smem(bar)), "h"(mask), "l"(policy)
        : "memory");
}

#endif /* FV_KERNELS_CLUSTER_CUH */
