/*
 * backend_cuda.h - what the host files of the CUDA backend share. Private to kernels/, and to its GPU benchmark.
 *
 * Memory. The KV arena is one cudaMalloc. Everything a step needs beside it goes through one staging area that exists
 * twice, pinned on the host and on the device, at the same offsets: descriptors, page tables and queries are written
 * on the host side and travel in one copy a call. The area is given out by a bump pointer that finish() puts back,
 * and grows only (a step larger than any before waits for the device once). Results go straight into the caller's
 * memory when it came from host_alloc(), which maps it; otherwise into the staging area's host side,
 * which is mapped too, and finish() copies them out. One stream; nothing waits for the device but finish().
 */
#ifndef FV_KERNELS_BACKEND_CUDA_H
#define FV_KERNELS_BACKEND_CUDA_H

#include "kernels/kernels.h"
#include "kernels/lean_cuda.h"

#include <cuda_runtime_api.h>

#include <stdbool.h>

/* Memory of host_alloc() or reach(): the device reaches it at the same address. */
typedef struct fv_cuda_pinned {
    uint8_t *begin;
    size_t n_bytes;
} fv_cuda_pinned_t;

/* A result that waits in the staging area: n_rows of row_bytes, to dst + i * dst_stride. */
typedef struct fv_cuda_scatter {
    uint8_t *dst;
    const uint8_t *src;
    size_t row_bytes, n_rows, dst_stride;
} fv_cuda_scatter_t;

/* Moments of a step on the device's clock. */
typedef enum fv_cuda_mark {
    FV_CUDA_BEGIN = 0,
    FV_CUDA_ATTENDED = 1,
    FV_CUDA_MERGED = 2,
    FV_CUDA_MARKS = 3,
} fv_cuda_mark_t;

typedef struct fv_cuda_clock {
    cudaEvent_t events[FV_CUDA_MARKS];
    bool is_wanted; /* some finish() has asked for times */
    bool has[FV_CUDA_MARKS];
} fv_cuda_clock_t;

struct fv_backend {
    int device;
    int32_t n_sms;
    size_t smem_per_sm;
    char name[64];
    cudaStream_t stream;
    fv_cuda_clock_t clock;
    fv_status_t lost; /* not FV_OK: a step was given up; nothing waits for the device any more */
    uint8_t *arena;   /* device */
    size_t kv_arena_bytes;

    uint8_t *staging_host, *staging_device;
    size_t staging_bytes, staging_used;

    fv_cuda_scatter_t *scatters;
    size_t n_scatters, scatters_max;

    uint8_t *merge_blob; /* of the merge() under way, 16-byte aligned, grow-only */
    size_t merge_blob_max;

    fv_cuda_pinned_t *pinned;
    size_t n_pinned, pinned_max;

    /* Of the lean kernel: cut groups' pieces, grow-only. */
    float *slots;
    size_t slots_bytes;
    uint32_t *arrived; /* lean_cuda.h's arrived, then its claimed */
    int32_t shares_max;
    uint32_t *begins; /* [shares_max + 1], of the line that is cut */
    int32_t ctas_max; /* of an SM; smaller only for measuring */

    fv_lean_launch_t *launches; /* of the attend() under way */
    size_t n_launches, launches_max;
    uint8_t *is_planned; /* [items_max] */
    size_t items_max;
};

/* FV_OK, or FV_ERR_CUDA with the call and the library's text. */
fv_status_t fv_cuda_check(cudaError_t error, const char *call);
#define FV_CUDA(expr) fv_cuda_check((expr), #expr)

/* ------------------------------------------------------------------ staging_cuda.c */

/*
 * Makes sure that n_bytes more fit without another reserve; call it before the first fv_cuda_stage() of an operation.
 * Waits for the device, finishes what is under way and grows when they do not.
 */
FV_MUST_CHECK fv_status_t fv_cuda_reserve(fv_backend_t *backend, size_t n_bytes);

/* n_bytes of the reserved area, 256-byte aligned: offset from either base. */
size_t fv_cuda_stage(fv_backend_t *backend, size_t n_bytes);
#define FV_CUDA_STAGE_BYTES(n_bytes) fv_align_up((n_bytes), 256U)

static inline void *fv_cuda_on_host(const fv_backend_t *backend, size_t offset)
{
    return backend->staging_host + offset;
}

static inline void *fv_cuda_on_device(const fv_backend_t *backend, size_t offset)
{
    return backend->staging_device + offset;
}

/* Copies [begin, staging_used) to the device. */
FV_MUST_CHECK fv_status_t fv_cuda_stage_send(fv_backend_t *backend, size_t begin);

/* True if [p, p + n) is memory of host_alloc() or reach(). */
bool fv_cuda_is_pinned(const fv_backend_t *backend, const void *p, size_t n_bytes);

/* Notes that finish() must copy rows from the staging area to dst. */
FV_MUST_CHECK fv_status_t fv_cuda_scatter(fv_backend_t *backend, fv_cuda_scatter_t scatter);

/* Grow-only array. */
FV_MUST_CHECK fv_status_t fv_cuda_grow(void **array, size_t *max, size_t n, size_t elem_bytes);

/* The device is done: results that wait in the staging area go to their places, and the area is empty again. */
void fv_cuda_staging_reset(fv_backend_t *backend);

void fv_cuda_staging_free(fv_backend_t *backend);

/* ------------------------------------------------------------------ wait_cuda.c */

FV_MUST_CHECK fv_status_t fv_cuda_clock_create(fv_cuda_clock_t *clock);
void fv_cuda_clock_destroy(fv_cuda_clock_t *clock);

/*
 * Notes a moment, if the step is timed: BEGIN before an operation enqueues anything (the first one counts), the others
 * after (the last one counts). Whatever else uses the stream between attend and merge (an exchange) needs no mark.
 */
FV_MUST_CHECK fv_status_t fv_cuda_clock_mark(fv_backend_t *backend, fv_cuda_mark_t mark);

/* Until the stream is idle. limits NULL: for ever. Errors: as finish(). */
FV_MUST_CHECK fv_status_t fv_cuda_wait(fv_backend_t *backend, const fv_wait_limits_t *limits);

/* FV_OK, or why the backend does nothing any more. */
FV_MUST_CHECK fv_status_t fv_cuda_usable(const fv_backend_t *backend);

/* ------------------------------------------------------------------ operations, one file each: <name>_cuda.c */

fv_status_t
fv_cuda_finish(fv_backend_t *backend, const fv_wait_limits_t *limits, fv_device_times_t *out_times);
fv_status_t fv_cuda_append(fv_backend_t *backend, const fv_append_item_t *items, size_t n_items);
fv_status_t
fv_cuda_copy_pages(fv_backend_t *backend, const fv_page_copy_t *copies, size_t n_copies);
fv_status_t fv_cuda_merge(fv_backend_t *backend,
                          const fv_merge_item_t *items,
                          size_t n_items,
                          const fv_merge_sync_t *sync);
fv_status_t fv_cuda_empty(fv_backend_t *backend, float *lse_log2, uint64_t n_rows);

/* attend in two halves, which the benchmark calls apart: plan and stage into backend->launches, then start them. */
fv_status_t fv_cuda_attend_plan(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items);
fv_status_t
fv_cuda_attend_start(fv_backend_t *backend, const fv_lean_launch_t *launches, size_t n_launches);
fv_status_t fv_cuda_attend(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items);

/* Bytes of a page, and whether a reference lies in the arena. */
static inline size_t fv_cuda_page_bytes(int32_t kv_dtype, int32_t head_dim_qk, int32_t head_dim_v)
{
    return (size_t)(head_dim_qk + head_dim_v) * FV_PAGE_TOKENS *
           fv_dtype_bytes((fv_dtype_t)kv_dtype);
}

static inline bool
fv_cuda_page_ok(const fv_backend_t *backend, fv_page_ref_t ref, size_t page_bytes)
{
    const size_t offset = (size_t)ref * FV_PAGE_UNIT;

    return (offset < backend->kv_arena_bytes) && (backend->kv_arena_bytes - offset >= page_bytes);
}

/* check_cpu.c: descriptors are checked alike for every backend. Errors: FV_ERR_INVALID_ARG naming the field. */
FV_MUST_CHECK fv_status_t fv_cpu_check_append(const fv_append_item_t *item);
FV_MUST_CHECK fv_status_t fv_cpu_check_attend(const fv_attn_item_t *item);
FV_MUST_CHECK fv_status_t fv_cpu_check_merge(const fv_merge_item_t *item);
FV_MUST_CHECK fv_status_t fv_cpu_check_copy(const fv_page_copy_t *copy);

/* Pages of latents are not served here yet (has_latent is false): refused before anything is read. */
static inline fv_status_t fv_cuda_check_latent(bool v_in_k)
{
    return v_in_k
               ? fv_fail(FV_ERR_UNIMPLEMENTED, "cuda backend: v_in_k: given true, expected false "
                                               "(kind LATENT is served by CPU ranks)")
               : FV_OK;
}

#endif /* FV_KERNELS_BACKEND_CUDA_H */
