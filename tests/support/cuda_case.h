/*
 * cuda_case.h - problems for the CUDA backend: what the code for this GPU does not take is made smaller.
 */
#ifndef FV_TESTS_SUPPORT_CUDA_CASE_H
#define FV_TESTS_SUPPORT_CUDA_CASE_H

#include "kernels/backend_cuda.h"
#include "tests/support/attn_case.h"
#include "tests/support/test.h"

/* True if it takes the problem as it is. */
static inline bool fv_cuda_case_fits(const fv_backend_t *backend, const fv_attn_spec_t *spec)
{
    const fv_attn_item_t item = {.n_tokens = spec->n_tokens,
                                 .n_kv_heads = spec->n_kv_heads,
                                 .group = spec->group,
                                 .head_dim_qk = spec->head_dim_qk,
                                 .head_dim_v = spec->head_dim_v,
                                 .io_dtype = spec->io_dtype,
                                 .kv_dtype = spec->kv_dtype,
                                 .policy = spec->policy,
                                 .v_in_k = spec->v_in_k};

    return fv_cuda_attend_fits(backend, &item);
}

/* fp32 KV of large heads where shared memory is small (sm_80): 192 dims, which do fit. */
static inline void fv_cuda_case_fit(const fv_backend_t *backend, fv_attn_spec_t *spec)
{
    if (!fv_cuda_case_fits(backend, spec)) {
        assert_true(!backend->has_sm90 && (spec->kv_dtype == (int32_t)FV_DTYPE_F32));
        spec->head_dim_qk = (spec->head_dim_qk > 192) ? 192 : spec->head_dim_qk;
        spec->head_dim_v = (spec->head_dim_v > 192) ? 192 : spec->head_dim_v;
    }
}

#endif /* FV_TESTS_SUPPORT_CUDA_CASE_H */
