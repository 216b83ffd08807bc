/*
 * lean_kind.cuh - the kernels of one kind (lean_cuda.h): one file each includes this, so that they compile apart.
 */
#ifndef FV_KERNELS_LEAN_KIND_CUH
#define FV_KERNELS_LEAN_KIND_CUH

#include "kernels/lean_kernel.cuh"

#include <cuda_runtime.h>

typedef void (*fv_lean_kernel_t)(fv_lean_launch_t);

template <int KIND, int M_WARPS>
static fv_lean_kernel_t fv_lean_choose_dims(int32_t head_dim_v, bool is_exact)
{
    constexpr bool has_exact = (KIND == FV_LEAN_BF16) || (KIND == FV_LEAN_F16);

    if (is_exact && has_exact) {
        return (head_dim_v <= 64) ? fv_lean_kernel<fv_lean_shape<KIND, M_WARPS, 64, has_exact>>
                                  : fv_lean_kernel<fv_lean_shape<KIND, M_WARPS, 128, has_exact>>;
    }
    if (head_dim_v <= 64) {
        return fv_lean_kernel<fv_lean_shape<KIND, M_WARPS, 64, false>>;
    }
    return (head_dim_v <= 128) ? fv_lean_kernel<fv_lean_shape<KIND, M_WARPS, 128, false>>
                               : fv_lean_kernel<fv_lean_shape<KIND, M_WARPS, 256, false>>;
}

/* The kernel for rows (1, 2, 4 warps) and head_dim_v; is_exact: both head dims are 64, or 128, and Q has one part. */
template <int KIND>
static fv_lean_kernel_t fv_lean_choose(int32_t m_warps, int32_t head_dim_v, bool is_exact)
{
    return (m_warps == 1)   ? fv_lean_choose_dims<KIND, 1>(head_dim_v, is_exact)
           : (m_warps == 2) ? fv_lean_choose_dims<KIND, 2>(head_dim_v, is_exact)
                            : fv_lean_choose_dims<KIND, 4>(head_dim_v, is_exact);
}

/* One of each kind's file. */
fv_lean_kernel_t fv_lean_choose_bf16(int32_t m_warps, int32_t head_dim_v, bool is_exact);
fv_lean_kernel_t fv_lean_choose_f16(int32_t m_warps, int32_t head_dim_v, bool is_exact);
fv_lean_kernel_t fv_lean_choose_f32_wide(int32_t m_warps, int32_t head_dim_v, bool is_exact);
fv_lean_kernel_t fv_lean_choose_f16_wide(int32_t m_warps, int32_t head_dim_v, bool is_exact);

#endif /* FV_KERNELS_LEAN_KIND_CUH */
