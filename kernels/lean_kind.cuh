/*
 * lean_kind.cuh - the kernels of one kind (lean_cuda.h): one file each includes this, so that they compile apart.
 */
#ifndef FV_KERNELS_LEAN_KIND_CUH
#define FV_KERNELS_LEAN_KIND_CUH

#include "kernels/lean_kernel.cuh"

#include <cuda_runtime.h>

typedef void (*fv_lean_kernel_t)(fv_lean_launch_t);

/* The kernel for rows (1, 2, 4 warps) and head_dim_v. */
template <int KIND> static fv_lean_kernel_t fv_lean_choose(int32_t m_warps, int32_t head_dim_v)
{
    static const fv_lean_kernel_t k_table[3][3] = {
        {fv_lean_kernel<KIND, 1, 64>, fv_lean_kernel<KIND, 1, 128>, fv_lean_kernel<KIND, 1, 256>},
        {fv_lean_kernel<KIND, 2, 64>, fv_lean_kernel<KIND, 2, 128>, fv_lean_kernel<KIND, 2, 256>},
        {fv_lean_kernel<KIND, 4, 64>, fv_lean_kernel<KIND, 4, 128>, fv_lean_kernel<KIND, 4, 256>},
    };
    const int rows = (m_warps == 4) ? 2 : (m_warps - 1);
    const int cols = (head_dim_v <= 64) ? 0 : ((head_dim_v <= 128) ? 1 : 2);

    return k_table[rows][cols];
}

/* One of each kind's file. */
fv_lean_kernel_t fv_lean_choose_bf16(int32_t m_warps, int32_t head_dim_v);
fv_lean_kernel_t fv_lean_choose_f16(int32_t m_warps, int32_t head_dim_v);
fv_lean_kernel_t fv_lean_choose_f32_wide(int32_t m_warps, int32_t head_dim_v);
fv_lean_kernel_t fv_lean_choose_f16_wide(int32_t m_warps, int32_t head_dim_v);

#endif /* FV_KERNELS_LEAN_KIND_CUH */
