/*
 * lean_bf16.cu - the lean kernels of kind FV_LEAN_BF16.
 */
#include "kernels/lean_kind.cuh"

fv_lean_kernel_t fv_lean_choose_bf16(int32_t m_warps, int32_t head_dim_v, bool is_exact)
{
    return fv_lean_choose<FV_LEAN_BF16>(m_warps, head_dim_v, is_exact);
}
