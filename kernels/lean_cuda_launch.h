/*
 * lean_cuda_launch.h - starts the lean kernel. Private to kernels/, and to the GPU tests and benchmarks.
 */
#ifndef FV_KERNELS_LEAN_CUDA_LAUNCH_H
#define FV_KERNELS_LEAN_CUDA_LAUNCH_H

#include "kernels/lean_cuda.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of shared memory beside the ring. */
uint32_t fv_lean_cuda_fixed_bytes(int32_t head_dim_qk,
                                  int32_t head_dim_v,
                                  int32_t m_warps,
                                  int32_t n_q_parts);

/* Of which architecture the code is that the driver chose for this device, 80 or 90. Error: there is none for it. */
cudaError_t fv_lean_cuda_code(int32_t *out);

/* Allows every kernel the shared memory of an SM. Once a device. */
cudaError_t fv_lean_cuda_init(int32_t smem_max);

cudaError_t fv_lean_cuda_launch(const fv_lean_launch_t *launch, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* FV_KERNELS_LEAN_CUDA_LAUNCH_H */
