/*
 * lean_cuda.cu - chooses the lean kernel of a launch and starts it.
 *
 * Decode path: station 7 of 10. Before: attend_cuda.c. After: lean_kernel.cuh.
 */
#include "kernels/lean_cuda_launch.h"
#include "kernels/lean_kind.cuh"

uint32_t fv_lean_cuda_fixed_bytes(int32_t head_dim_qk,
                                  int32_t head_dim_v,
                                  int32_t m_warps,
                                  int32_t n_q_parts)
{
    const int32_t dv_max = (head_dim_v <= 64) ? 64 : ((head_dim_v <= 128) ? 128 : 256);

    return FV_LEAN_SMEM_FIXED + fv_lean_join_bytes(m_warps, dv_max) +
           fv_lean_q_bytes((uint32_t)head_dim_qk, 16U * (uint32_t)m_warps, (uint32_t)n_q_parts);
}

static fv_lean_kernel_t choose(int32_t kind, int32_t m_warps, int32_t head_dim_v, bool is_exact)
{
    switch (kind) {
    case FV_LEAN_BF16:
        return fv_lean_choose_bf16(m_warps, head_dim_v, is_exact);
    case FV_LEAN_F16:
        return fv_lean_choose_f16(m_warps, head_dim_v, is_exact);
    case FV_LEAN_F32_WIDE:
        return fv_lean_choose_f32_wide(m_warps, head_dim_v, is_exact);
    default:
        return fv_lean_choose_f16_wide(m_warps, head_dim_v, is_exact);
    }
}

cudaError_t fv_lean_cuda_code(int32_t *out)
{
    cudaFuncAttributes attributes;
    const cudaError_t error =
        cudaFuncGetAttributes(&attributes, (const void *)choose(FV_LEAN_BF16, 1, 64, true));

    *out = (error == cudaSuccess) ? attributes.ptxVersion : 0;
    (void)cudaGetLastError(); /* it was said: no other call shall find it */
    return error;
}

cudaError_t fv_lean_cuda_init(int32_t smem_max)
{
    static const int32_t k_dims[] = {64, 128, 256};

    for (int32_t kind = FV_LEAN_BF16; kind <= FV_LEAN_F16_WIDE; kind++) {
        for (int32_t m_warps = 1; m_warps <= 4; m_warps *= 2) {
            for (int32_t dim : k_dims) {
                for (int32_t exact = 0; exact < 2; exact++) {
                    const cudaError_t error =
                        cudaFuncSetAttribute((const void *)choose(kind, m_warps, dim, exact != 0),
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, smem_max);

                    if (error != cudaSuccess) {
                        return error;
                    }
                }
            }
        }
    }
    return cudaSuccess;
}

cudaError_t fv_lean_cuda_launch(const fv_lean_launch_t *launch, cudaStream_t stream)
{
    const fv_lean_kernel_t kernel =
        choose(launch->kind, launch->m_warps, launch->head_dim_v, launch->is_exact != 0);
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};

    config.gridDim = dim3(launch->n_ctas);
    config.blockDim =
        dim3(32U *
             (FV_LEAN_WARPS * (uint32_t)fv_lean_cuda_teams(launch->m_warps, launch->is_exact != 0) +
              1U));
    config.dynamicSmemBytes = launch->smem_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (launch->is_cooperative != 0) {
        attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
        attributes[config.numAttrs++].val.cooperative = 1;
    }
    if (launch->is_dependent != 0) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, *launch);

    if (error != cudaSuccess) {
        (void)cudaGetLastError(); /* it was said: no other call shall find it */
    }
    return error;
}
