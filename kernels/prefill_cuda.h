/*
 * prefill_cuda.h - what the host plans and the prefill kernel reads. Private to kernels/, its tests and benchmarks.
 *
 * Station 7 of 10. Before: prefill_plan_cuda.c (plans). After: prefill_kernel.cuh (executes).
 *
 * For items of many rows, where matrix products are the limit and not memory: one persistent launch for all such items
 * of a step that have one geometry. A unit is (item, head, block of FV_PREFILL_ROWS rows), done from begin to end by
 * one CTA, so nothing is merged, and who does it changes no bit. Rows of a group are packed, r = t * group + g: a block
 * then spans few tokens, which keeps masks tight, windows and block lists short, and short chunks whole; K and V are read
 * as often either way. Units are dealt out longest first; each CTA takes the next when it is done.
 *
 * A CTA: one warpgroup brings K, V and Q, two compute, 64 rows each (prefill_kernel.cuh).
 */
#ifndef FV_KERNELS_PREFILL_CUDA_H
#define FV_KERNELS_PREFILL_CUDA_H

#include "kernels/lean_cuda.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FV_PREFILL_ROWS 128

/* A block of rows of one item, for all its KV heads. */
typedef struct fv_prefill_block {
    uint32_t run;
    int32_t row_begin;
} fv_prefill_block_t;

/* One launch: passed by value. */
typedef struct fv_prefill_launch {
    const uint8_t *arena;
    const fv_lean_run_t
        *runs; /* one an item: all its rows; tiles, line_begin, n_tiles, is_empty are not used */
    const fv_prefill_block_t *blocks;
    uint32_t *claimed; /* units taken beyond the first n_ctas; zero between launches */
    uint32_t n_blocks, n_units, n_ctas;
    uint32_t n_heads; /* of every item: fv_lean_run_t's n_kv_heads */
    uint32_t
        heads_each; /* divides n_heads: heads whose units stand together, so that their K and V stay in L2 */
    int32_t head_dim_qk, head_dim_v;
    int32_t kv_dtype;
} fv_prefill_launch_t;

/* True if there is a kernel for this geometry. dtype: of Q, K and V alike. */
bool fv_prefill_cuda_has(int32_t dtype, int32_t head_dim_qk, int32_t head_dim_v);

/* Allows every kernel the shared memory it needs. Once a device. */
cudaError_t fv_prefill_cuda_init(void);

cudaError_t fv_prefill_cuda_launch(const fv_prefill_launch_t *launch, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* FV_KERNELS_PREFILL_CUDA_H */
