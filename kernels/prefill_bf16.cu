/*
 * prefill_bf16.cu - the prefill kernels of bf16.
 */
#define FV_PREFILL_IS_F16 false
#include "kernels/prefill_kind.cuh"

fv_prefill_choice_t fv_prefill_choose_bf16(int32_t head_dim_qk, int32_t head_dim_v)
{
    return fv_prefill_choose(head_dim_qk, head_dim_v);
}
