/*
 * prefill_cuda.cu - chooses the prefill kernel of a launch and starts it.
 *
 * Station 7 of 10. Before: prefill_plan_cuda.c. After: prefill_kernel.cuh.
 */
#include "kernels/prefill_kind.cuh"

static fv_prefill_choice_t choose(int32_t dtype, int32_t head_dim_qk, int32_t head_dim_v)
{
    if (dtype == FV_DTYPE_BF16) {
        return fv_prefill_choose_bf16(head_dim_qk, head_dim_v);
    }
    if (dtype == FV_DTYPE_F16) {
        return fv_prefill_choose_f16(head_dim_qk, head_dim_v);
    }
    return {NULL, 0, 0};
}

bool fv_prefill_cuda_has(int32_t dtype, int32_t head_dim_qk, int32_t head_dim_v)
{
    return choose(dtype, head_dim_qk, head_dim_v).kernel != NULL;
}

cudaError_t fv_prefill_cuda_init(void)
{
    static const int32_t k_dims[][2] = {{64, 64}, {128, 128}, {192, 128}, {256, 256}};

    for (int32_t dtype = FV_DTYPE_F16; dtype <= FV_DTYPE_BF16; dtype++) {
        for (const auto &dims : k_dims) {
            const fv_prefill_choice_t c = choose(dtype, dims[0], dims[1]);
            const cudaError_t error = cudaFuncSetAttribute(
                (const void *)c.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                (int)c.smem_bytes);

            if (error != cudaSuccess) {
                return error;
            }
        }
    }
    return cudaSuccess;
}

cudaError_t fv_prefill_cuda_launch(const fv_prefill_launch_t *launch, cudaStream_t stream)
{
    const fv_prefill_choice_t c = choose(launch->kv_dtype, launch->head_dim_qk, launch->head_dim_v);

    if (c.kernel == NULL) {
        return cudaErrorInvalidValue;
    }
    c.kernel<<<launch->n_ctas, c.n_threads, c.smem_bytes, stream>>>(*launch);
    return cudaGetLastError();
}
