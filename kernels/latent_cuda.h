/*
 * latent_cuda.h - the kernels that attend to latents on the GPU. Private to kernels/.
 *
 * Decode path: station 7 of 10. Before: attend_cuda.c (plans). After: worker/exchange_*.c.
 *
 * A page of latents (V is dims [0, dv) of K, fv_attn_item_t.v_in_k) is stored once, like any K (page_layout_cuda.h). In panels
 * wgmma reads the same bytes for S = Q C^T (tokens along N, dims summed) and for O = P C (dims along N, tokens summed),
 * without bank conflicts either way, and one bulk copy moves any stretch of panels.
 */
#ifndef FV_KERNELS_LATENT_CUDA_H
#define FV_KERNELS_LATENT_CUDA_H

#include "kernels/lean_cuda.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The kernel for an item with v_in_k (fv_lean_latent_t), rows of its runs, and shared memory of a CTA. */
int32_t fv_latent_choose(const fv_attn_item_t *item);
int32_t fv_latent_rows(int32_t latent);
uint32_t fv_latent_cuda_smem(int32_t latent, int32_t head_dim_qk, int32_t head_dim_v);

/* Allows the kernels their shared memory: those of wgmma too, or FV_LATENT_ANY's alone. Once a device. */
cudaError_t fv_latent_cuda_init(bool has_wgmma);

cudaError_t fv_latent_cuda_launch(const fv_lean_launch_t *launch, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* FV_KERNELS_LATENT_CUDA_H */
