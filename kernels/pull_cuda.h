/*
 * pull_cuda.h - what one launch brings to the device: units of work of the pull kernel. Private to kernels/.
 *
 * Decode path: station 6 of 10. Before: send_cuda.c (collects). After: pull_cuda.cu (executes), then lean_cuda.cu.
 *
 * A decode step brings little: descriptors, a row of Q, K and V for each sequence, a page number now and then. One small
 * kernel that reads it all out of mapped host memory takes a third of the time of two DMA copies and an append kernel
 * (docs/gpu.md). A unit is the work of one block; few units travel in the launch's own arguments, many in mapped memory.
 */
#ifndef FV_KERNELS_PULL_CUDA_H
#define FV_KERNELS_PULL_CUDA_H

#include "kernels/kernels.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FV_PULL_BYTES  8192U /* of one copy, at most */
#define FV_PULL_HEADS  8     /* of one append or patch, at most */
#define FV_PULL_INLINE 32    /* units in the launch's arguments: stays below 4 KiB of them */

typedef enum fv_pull_kind {
    FV_PULL_COPY = 0,   /* n_bytes from k to dst */
    FV_PULL_APPEND = 1, /* new tokens of some KV heads that fall into one local page */
    FV_PULL_LATENT = 3, /* APPEND of latents: k alone, some normalised */
    FV_PULL_PATCH = 2,  /* one entry of some KV heads' page tables: pages[h] to dst + h * n_bytes */
} fv_pull_kind_t;

/* Sources lie in mapped host memory or in device memory; destinations in device memory. */
typedef struct fv_pull_unit {
    const uint8_t *k, *v; /* APPEND: first token, first head; heads are contiguous */
    uint8_t *dst;
    uint64_t k_token_bytes, v_token_bytes;
    uint32_t n_bytes;
    uint8_t kind, n_heads, src_dtype, kv_dtype;
    uint16_t slot, n_tokens;
    uint16_t head_dim_qk, head_dim_v;
    uint32_t rope_gap_bytes; /* LATENT, these three: fv_append_item_t's */
    float norm_alpha, norm_eps;
    fv_page_ref_t pages[FV_PULL_HEADS]; /* of each head */
} fv_pull_unit_t;

/* The device's own record of a step, in mapped memory. Times are its clock in ns, 0 where nothing was noted. */
typedef struct fv_cuda_record {
    uint32_t
        n_done; /* steps that ended: written with end_ns as one word of 16 bytes, after everything else */
    uint32_t reserved;
    uint64_t end_ns;
    uint64_t begin_ns, attended_ns;
} fv_cuda_record_t;

typedef struct fv_pull_launch {
    uint8_t *arena;
    const fv_pull_unit_t *units; /* [n_units] in mapped memory; NULL: those below */
    uint64_t *begin_ns;          /* or NULL */
    uint32_t n_units;
    fv_pull_unit_t inlined[FV_PULL_INLINE];
} fv_pull_launch_t;

cudaError_t fv_pull_launch(const fv_pull_launch_t *launch, cudaStream_t stream);

/*
 * Writes the device's clock to *ns when everything before on the stream is done. is_early: the kernel may be set up before
 * (code of sm_90).
 */
cudaError_t fv_stamp_launch(uint64_t *ns, bool is_early, cudaStream_t stream);

/* The end of a step: when everything before is done and visible to the host, end_ns and n_done. */
cudaError_t
fv_done_launch(fv_cuda_record_t *record, uint32_t n_done, bool is_early, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* FV_KERNELS_PULL_CUDA_H */
