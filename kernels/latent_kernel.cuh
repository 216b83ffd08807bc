/*
 * latent_kernel.cuh - attention to latents (MLA, absorbed): the persistent kernel of a step, on wgmma.
 *
 * Decode path: station 7 of 10. Before: attend_cuda.c plans and launches. After: lean_write.cuh writes the results.
 *
 * The line of tiles, its shares and the merging of cut groups are the lean kernel's (lean_cuda.h). What differs is the
 * tile: one page of latents is K and V of up to 64 rows (all heads of a token), so O is 64 x 512 in fp32, half of
 * an SM's registers. Four warpgroups:
 *
 *     0, 1  teams of O: half of the columns each; O += P C                            latent_values.cuh
 *     2     scores: S = Q C^T, softmax; runs ahead of them as far as the ring is long  latent_scores.cuh
 *     3     one warp of it copies pages into the ring, panel by panel                  latent_copy.cuh
 *
 * More rows take a cluster of two CTAs, 64 rows each, which do the same shares and bring each other half of every page.
 * DeepSeek's FlashMLA ("A deep-dive into the new Flash MLA kernel", 2025-04) lets two warpgroups do both S and O in turns;
 * here S has a warpgroup of its own, so the tensor cores have scores to compute whenever O waits for weights.
 */
#ifndef FV_KERNELS_LATENT_KERNEL_CUH
#define FV_KERNELS_LATENT_KERNEL_CUH

#include "kernels/latent_copy.cuh"
#include "kernels/latent_scores.cuh"
#include "kernels/latent_values.cuh"

#define FV_LATENT_THREADS (4 * FV_WARPGROUP)

template <typename SHAPE> static __device__ __forceinline__ void fv_latent_init(fv_latent_smem_t *s)
{
    for (int i = 0; i < SHAPE::SLOTS * SHAPE::CHUNKS; i++) {
        fv_mbar_init(&s->full[i], 1);
        fv_mbar_init(&s->empty[i], 4U * SHAPE::CLUSTER); /* warps that read the chunk last */
    }
    for (uint32_t i = 0; i < FV_LATENT_QUEUE; i++) {
        fv_mbar_init(&s->share_full[i], 1);
        fv_mbar_init(&s->share_empty[i], FV_LEAN_RELEASES);
    }
    fv_mbar_init(&s->told, 4);
    fv_mbar_init(&s->heard, 2U * FV_LEAN_RELEASES);
    fv_mbar_init_fence();
}

template <typename SHAPE>
static __global__ void __launch_bounds__(FV_LATENT_THREADS, 1)
    fv_latent_kernel(const __grid_constant__ fv_lean_launch_t p)
{
#if FV_HAS_WGMMA /* else the host launches none */
    extern __shared__ __align__(1024) uint8_t memory[];
    const fv_latent_memory_t at = fv_latent_place<SHAPE>(memory);
    const uint32_t role = threadIdx.x / FV_WARPGROUP;

    if (threadIdx.x == 0) {
        fv_latent_init<SHAPE>(at.s);
    }
    __syncthreads();
    if (SHAPE::CLUSTER > 1) {
        fv_cluster_sync(); /* before one copies to the other */
    }
    fv_wait_for_prior_launch();
    if (role == 3U) {
        fv_registers_fewer<40>();
        if (threadIdx.x < 3 * FV_WARPGROUP + 32) {
            fv_latent_copy<SHAPE>(p, at);
        }
    } else if (role == 2U) {
        fv_registers_fewer<120>();
        fv_latent_scores<SHAPE>(p, at);
    } else {
        fv_registers_more<176>();
        fv_latent_values<SHAPE>(p, at);
    }
    if (SHAPE::CLUSTER > 1) {
        fv_cluster_sync(); /* nobody leaves while the other may still arrive at its barriers */
    }
#endif
}

#endif /* FV_KERNELS_LATENT_KERNEL_CUH */
