/*
 * stage_cuda.h - what an item of attend() reads and writes, brought where the device reaches it. Private to kernels/.
 */
#ifndef FV_KERNELS_STAGE_CUDA_H
#define FV_KERNELS_STAGE_CUDA_H

#include "kernels/backend_cuda.h"

/* Staging bytes of an item's pages, query and results, at most. `pages`: all tiles that its rows read. */
size_t fv_cuda_item_bytes(const fv_backend_t *backend,
                          const fv_attn_item_t *item,
                          const fv_tile_list_t *pages);

/* Page table, query and results of an item: fills the run's pointers and strides. Errors: FV_ERR_INVALID_ARG, memory. */
FV_MUST_CHECK fv_status_t fv_cuda_stage_item(fv_backend_t *backend,
                                             const fv_attn_item_t *item,
                                             const fv_tile_list_t *pages,
                                             fv_lean_run_t *run);

#endif /* FV_KERNELS_STAGE_CUDA_H */
