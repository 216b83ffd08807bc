/*
 * page_cuda.h - units of work of the append, copy and merge kernels, and their launchers. Private to kernels/.
 */
#ifndef FV_KERNELS_PAGE_CUDA_H
#define FV_KERNELS_PAGE_CUDA_H

#include "kernels/lean_cuda.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* New tokens of one KV head that fall into one page. `k` and `v` lie in mapped host memory: read once, over the bus. */
typedef struct fv_append_unit {
    const uint8_t *k, *v; /* first token of the unit, this head */
    uint64_t k_token_bytes, v_token_bytes;
    fv_page_ref_t page;
    int32_t slot, n_tokens;
    int32_t head_dim_qk, head_dim_v;
    int32_t src_dtype, kv_dtype;
    int32_t reserved;
} fv_append_unit_t;

/* The first n_tokens tokens of a page: bytes of K and of V, which begins at v_offset. */
typedef struct fv_copy_unit {
    fv_page_ref_t src, dst;
    uint32_t k_bytes, v_bytes, v_offset;
} fv_copy_unit_t;

cudaError_t fv_page_append_launch(uint8_t *arena,
                                  const fv_append_unit_t *units,
                                  uint32_t n_units,
                                  cudaStream_t stream);
cudaError_t fv_page_copy_launch(uint8_t *arena,
                                const fv_copy_unit_t *units,
                                uint32_t n_units,
                                cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* FV_KERNELS_PAGE_CUDA_H */
