/*
 * page_cuda.h - units of work of the page copy and merge kernels, and their launchers. Private to kernels/.
 */
#ifndef FV_KERNELS_PAGE_CUDA_H
#define FV_KERNELS_PAGE_CUDA_H

#include "kernels/lean_cuda.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The first n_tokens tokens of a page: rows of K and of V, which begins at v_offset. */
typedef struct fv_copy_unit {
    fv_page_ref_t src, dst;
    uint32_t n_tokens;
    uint32_t k_bytes, v_bytes, elem_bytes; /* of a row */
    uint32_t v_offset;
} fv_copy_unit_t;

cudaError_t fv_page_copy_launch(uint8_t *arena,
                                const fv_copy_unit_t *units,
                                uint32_t n_units,
                                cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* FV_KERNELS_PAGE_CUDA_H */
