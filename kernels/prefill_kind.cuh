/*
 * prefill_kind.cuh - the prefill kernels of one dtype: one file each includes this, so that they compile apart.
 */
#ifndef FV_KERNELS_PREFILL_KIND_CUH
#define FV_KERNELS_PREFILL_KIND_CUH

#include "kernels/prefill_cuda.h"

/* A kernel and what it needs; NULL: there is none. */
typedef struct fv_prefill_choice {
    void (*kernel)(fv_prefill_launch_t);
    uint32_t n_threads, smem_bytes;
} fv_prefill_choice_t;

fv_prefill_choice_t fv_prefill_choose_bf16(int32_t head_dim_qk, int32_t head_dim_v);
fv_prefill_choice_t fv_prefill_choose_f16(int32_t head_dim_qk, int32_t head_dim_v);

#ifdef FV_PREFILL_IS_F16
#    include "kernels/prefill_kernel.cuh"

template <int DK, int DV, int N_PAGES, int STAGES> static fv_prefill_choice_t fv_prefill_choice()
{
    using shape = fv_prefill_shape<FV_PREFILL_IS_F16, DK, DV, N_PAGES, STAGES>;
    constexpr uint32_t smem = shape::DATA_BYTES + sizeof(fv_prefill_smem_t);

    static_assert(smem <= 227U * 1024U, "what a CTA may have");
    return {fv_prefill_kernel<shape>, FV_PREFILL_THREADS, smem};
}

/* Tiles of 128 tokens, of 64 where O takes the registers; as many stages as fit. */
static fv_prefill_choice_t fv_prefill_choose(int32_t head_dim_qk, int32_t head_dim_v)
{
    if ((head_dim_qk == 64) && (head_dim_v == 64)) {
        return fv_prefill_choice<64, 64, 2, 4>();
    }
    if ((head_dim_qk == 128) && (head_dim_v == 128)) {
        return fv_prefill_choice<128, 128, 2, 3>();
    }
    if ((head_dim_qk == 192) && (head_dim_v == 128)) {
        return fv_prefill_choice<192, 128, 2, 2>();
    }
    if ((head_dim_qk == 256) && (head_dim_v == 256)) {
        return fv_prefill_choice<256, 256, 1, 2>();
    }
    return {NULL, 0, 0};
}
#endif

#endif /* FV_KERNELS_PREFILL_KIND_CUH */
