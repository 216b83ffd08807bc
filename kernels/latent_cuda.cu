/*
 * latent_cuda.cu - chooses the kernel for latents of a launch and starts it.
 *
 * Decode path: station 7 of 10. Before: attend_cuda.c. After: latent_kernel.cuh, latent_any.cu.
 */
#include "kernels/latent_any.h"
#include "kernels/latent_cuda.h"
#include "kernels/latent_kernel.cuh"

#include <cuda_runtime.h>

typedef void (*fv_latent_kernel_t)(fv_lean_launch_t);

#define ROPE_DIM 64 /* of models whose kernel is tuned */

static bool is_tuned(const fv_attn_item_t *item)
{
    const bool is_mu = (item->latent_mu != 0.0F) && (item->latent_mu != 1.0F);

    return !is_mu && (item->kv_dtype == (int32_t)FV_DTYPE_BF16) &&
           (item->io_dtype == (int32_t)FV_DTYPE_BF16) &&
           (item->head_dim_qk == item->head_dim_v + ROPE_DIM) &&
           ((item->head_dim_v == 512) || (item->head_dim_v == 256) || (item->head_dim_v == 128));
}

int32_t fv_latent_choose(const fv_attn_item_t *item)
{
    if (!is_tuned(item)) {
        return FV_LATENT_ANY;
    }
    return ((int64_t)item->n_tokens * item->group <= (int64_t)FV_LATENT_ROWS) ? FV_LATENT_ONE
                                                                              : FV_LATENT_PAIR;
}

int32_t fv_latent_rows(int32_t latent)
{
    return (latent == FV_LATENT_ANY)
               ? FV_LATENT_ANY_ROWS
               : ((int32_t)FV_LATENT_ROWS * ((latent == FV_LATENT_PAIR) ? 2 : 1));
}

uint32_t fv_latent_cuda_smem(int32_t latent, int32_t head_dim_qk, int32_t head_dim_v)
{
    return (latent == FV_LATENT_ANY) ? fv_latent_any_smem(head_dim_qk, head_dim_v)
                                     : fv_latent_smem_bytes(head_dim_v / 64);
}

template <int CLUSTER> static fv_latent_kernel_t choose(int32_t head_dim_v)
{
    switch (head_dim_v) {
    case 512:
        return fv_latent_kernel<fv_latent_shape<8, false, CLUSTER>>;
    case 256:
        return fv_latent_kernel<fv_latent_shape<4, false, CLUSTER>>;
    default:
        return fv_latent_kernel<fv_latent_shape<2, false, CLUSTER>>;
    }
}

cudaError_t fv_latent_cuda_init(bool has_wgmma)
{
    static const int32_t k_dims[] = {512, 256, 128};

    for (int32_t dim : k_dims) {
        if (!has_wgmma) {
            break;
        }
        const fv_latent_kernel_t kernels[] = {choose<1>(dim), choose<2>(dim)};

        for (fv_latent_kernel_t kernel : kernels) {
            const cudaError_t error = cudaFuncSetAttribute(
                (const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                (int)fv_latent_smem_bytes(dim / 64));

            if (error != cudaSuccess) {
                return error;
            }
        }
    }
    return fv_latent_any_init();
}

cudaError_t fv_latent_cuda_launch(const fv_lean_launch_t *launch, cudaStream_t stream)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[3] = {};
    fv_latent_kernel_t kernel = fv_latent_any_kernel();

    config.blockDim = dim3(FV_LATENT_ANY_THREADS);
    if (launch->latent != FV_LATENT_ANY) {
        kernel = (launch->latent == FV_LATENT_PAIR) ? choose<2>(launch->head_dim_v)
                                                    : choose<1>(launch->head_dim_v);
        config.blockDim = dim3(FV_LATENT_THREADS);
    }
    config.gridDim = dim3(launch->n_ctas * launch->n_cluster);
    config.dynamicSmemBytes = launch->smem_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (launch->n_cluster > 1U) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = launch->n_cluster;
        attributes[config.numAttrs].val.clusterDim.y = 1;
        attributes[config.numAttrs++].val.clusterDim.z = 1;
    }
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
