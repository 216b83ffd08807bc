/*
 * latent_any.h - the kernel for latents of any dims and dtypes (latent_any.cu). Private to latent_cuda.cu.
 */
#ifndef FV_KERNELS_LATENT_ANY_H
#define FV_KERNELS_LATENT_ANY_H

#include "kernels/lean_cuda.h"

#include <cuda_runtime_api.h>

#define FV_LATENT_ANY_ROWS    16
#define FV_LATENT_ANY_THREADS 256

uint32_t fv_latent_any_smem(int32_t head_dim_qk, int32_t head_dim_v);
cudaError_t fv_latent_any_init(void);
void (*fv_latent_any_kernel(void))(fv_lean_launch_t);

#endif /* FV_KERNELS_LATENT_ANY_H */
