/*
 * merge_cuda.h - what the host gives the merge kernel. Private to kernels/.
 *
 * Decode path: station 8 of 10. Before: merge_cuda.c. After: merge_cuda.cu.
 *
 * The merge follows the decode kernel without a copy between them: all it needs to know is one blob - pairs, then units,
 * then parts - that travels in the kernel's parameters. Only the blob of a step of several hundred items does not fit
 * there and is staged.
 */
#ifndef FV_KERNELS_MERGE_CUDA_H
#define FV_KERNELS_MERGE_CUDA_H

#include "kernels/kernels.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FV_MERGE_DIMS     256U
#define FV_MERGE_BLOB_MAX 30720U /* bytes that travel as parameters; a kernel takes 32764 in all */

/* One source of a unit's rows. Device addresses. With a value: LL, every word is {word, value} and waited for. */
typedef struct fv_merge_part {
    const float *o;        /* [n_rows, dv] */
    const float *lse_log2; /* [n_rows] */
    uint32_t value;        /* 0: plain */
    uint32_t pair;         /* LL: of the pairs */
} fv_merge_part_t;

/* fv_merge_item_t with the device's pointers. */
typedef struct fv_merge_unit {
    uint8_t *out;
    float *lse; /* or NULL */
    uint64_t row_base, row_len, out_token_bytes, out_head_bytes, lse_token_stride;
    uint64_t out_first, lse_first; /* token that stands at the base */
    uint64_t job_begin;            /* jobs of the units before */
    uint32_t part_begin, n_parts;  /* of the blob's */
    int32_t head_dim_v, io_dtype;
} fv_merge_unit_t;

/* One launch. All of it but the blob is passed by value. */
typedef struct fv_merge_launch {
    const uint8_t
        *blob; /* host memory if it is at most FV_MERGE_BLOB_MAX bytes, else device memory */
    uint64_t blob_bytes;
    uint64_t n_jobs;
    uint64_t ll_quads;              /* 16-byte pieces of the longest LL message that is sent */
    uint64_t deadline_ns;           /* of waiting for pairs */
    const volatile uint32_t *abort; /* mapped host memory; NULL when there are no pairs */
    volatile uint32_t *gave_up;     /* alike */
    uint64_t *attended_ns;          /* alike: %globaltimer when what was before is done; or NULL */
    uint32_t n_pairs, n_units;
    uint32_t is_staged;   /* the blob lies in device memory */
    uint32_t n_flags;     /* pairs with something to tell or to wait for */
    uint32_t n_blocks_ll; /* most blocks of a launch with ll_quads */
    uint32_t is_early;    /* may start before what stands ahead on the stream is done, and waits */
} fv_merge_launch_t;

/* A row's columns are done by a warp each FV_MERGE_DIMS: its jobs. Rows of latents have several. */
static inline FV_HD uint32_t fv_merge_row_jobs(int32_t head_dim_v)
{
    return ((uint32_t)head_dim_v + FV_MERGE_DIMS - 1U) / FV_MERGE_DIMS;
}

/* Where units and parts begin in the blob. */
static inline FV_HD size_t fv_merge_units_at(size_t n_pairs)
{
    return (n_pairs * sizeof(fv_merge_pair_t) + 15U) / 16U * 16U;
}

static inline FV_HD size_t fv_merge_parts_at(size_t n_pairs, size_t n_units)
{
    return fv_merge_units_at(n_pairs) + (n_units * sizeof(fv_merge_unit_t) + 15U) / 16U * 16U;
}

/* Follows what is on the stream; is_early: as a programmatic dependent, which waits for it itself. */
cudaError_t fv_merge_launch(const fv_merge_launch_t *launch, cudaStream_t stream);

/* n states become the empty set. */
cudaError_t fv_merge_empty_launch(float *lse_log2, uint64_t n, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* FV_KERNELS_MERGE_CUDA_H */
