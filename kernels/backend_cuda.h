/*
 * backend_cuda.h - what the host files of the CUDA backend share. Private to kernels/, and to its GPU benchmark.
 *
 * Memory. The KV arena is one cudaMalloc, the page tables another (table_cache.h). What else a step needs goes through
 * one staging area that exists twice, pinned on the host and on the device, at the same offsets: from below, what
 * travels; from above, what the device reads or writes where it is. finish() empties it; it grows only (a step larger
 * than any before waits for the device once). Operations describe, and note what must travel in the outbox; attend() and
 * merge() flush it, as a rule one launch a step. Results go straight into the caller's memory when it came
 * from host_alloc(), which maps it; otherwise finish() copies them out of the staging area. One stream; nothing
 * waits for the device but finish(), which watches a word in mapped memory that the last kernel writes.
 */
#ifndef FV_KERNELS_BACKEND_CUDA_H
#define FV_KERNELS_BACKEND_CUDA_H

#include "kernels/kernels.h"
#include "kernels/lean_cuda.h"
#include "kernels/lean_plan_cuda.h"
#include "kernels/page_layout.h"
#include "kernels/prefill_cuda.h"
#include "kernels/pull_cuda.h"
#include "kernels/table_cache.h"

#include <cuda_runtime_api.h>

#include <pthread.h>
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

/* Bytes that lie together on both sides. */
typedef struct fv_cuda_stretch {
    const uint8_t *src; /* the device reaches it */
    uint8_t *dst;
    size_t n_bytes;
} fv_cuda_stretch_t;

/* What waits to be sent, and the device's record of the step. */
typedef struct fv_cuda_outbox {
    fv_pull_unit_t *units;
    size_t n_units, units_max;
    fv_cuda_stretch_t *stretches;
    size_t n_stretches, stretches_max;
    fv_pull_unit_t *mapped; /* of launches with many units, until the step's end */
    size_t mapped_used, mapped_max;
    fv_cuda_record_t *record; /* mapped */
    uint32_t n_done;          /* ends of steps that were enqueued */
    bool has_appends;         /* among the units */
    bool has_begun;           /* this step: the device notes when it began */
    fv_pull_launch_t launch;  /* scratch */
} fv_cuda_outbox_t;

/* How far a step was described: to take back what a refused call added. */
typedef struct fv_cuda_outbox_mark {
    size_t n_units, n_stretches, last_bytes, n_scatters;
    size_t staging_used, staging_sent, staging_top;
} fv_cuda_outbox_mark_t;

#define FV_CUDA_LEASES_MAX 64U

/* Inputs of one step that travelled ahead of it: sources, and where they are on the device. */
typedef struct fv_cuda_ahead_step {
    struct {
        const uint8_t *src;
        uint8_t *dst;
        size_t n_bytes;
    } leases[FV_CUDA_LEASES_MAX];
    size_t n_leases, used; /* bytes of this step's half of the area */
    bool is_used;          /* the step's stream waits for the copies */
} fv_cuda_ahead_step_t;

typedef struct fv_cuda_ahead {
    cudaStream_t stream;
    cudaEvent_t copied; /* the last copy */
    uint8_t *area;      /* device: two halves */
    size_t half_bytes;
    fv_cuda_ahead_step_t steps[2];
    uint32_t now;     /* of the step that is described or works; the other one fills */
    bool is_open;     /* a step works and is waited for: what comes now is the next one's */
    uint64_t n_bytes; /* that steps found on the device, since the start */
} fv_cuda_ahead_t;

struct fv_backend {
    int device;
    int32_t n_sms;
    size_t smem_per_sm;
    bool has_sm90; /* the driver chose code of sm_90: wgmma kernels, launches that overlap */
    char name[64];
    cudaStream_t stream;
    fv_cuda_outbox_t outbox;
    fv_cuda_ahead_t ahead;
    fv_status_t lost; /* not FV_OK: a step was given up; nothing waits for the device any more */
    uint8_t *arena;   /* device */
    size_t kv_arena_bytes;

    uint8_t *staging_host, *staging_device;
    size_t staging_bytes, staging_used, staging_sent, staging_top;

    fv_table_cache_t *tables;
    fv_page_ref_t *tables_device;
    size_t tables_bytes;

    fv_cuda_scatter_t *scatters;
    size_t n_scatters, scatters_max;

    uint8_t *merge_blob; /* of the merge() under way, 16-byte aligned, grow-only */
    size_t merge_blob_max;

    fv_cuda_pinned_t *pinned; /* ascending; pinned_lock */
    size_t n_pinned, pinned_max;
    pthread_mutex_t
        pinned_lock; /* held by operations, and by host_alloc() and host_free() of other threads */

    /* Of the lean kernel: cut groups' pieces, grow-only. */
    float *slots;
    size_t slots_bytes;
    uint32_t *arrived; /* lean_cuda.h's arrived [shares_max], then its claimed */
    int32_t shares_max;
    uint32_t *begins; /* [shares_max + 1], of the line that is cut */
    fv_lean_tuning_t tuning;

    fv_lean_launch_t *launches; /* of the attend() under way */
    size_t n_launches, launches_max;
    fv_lean_run_t *runs; /* of the launch that is planned; grow-only */
    size_t runs_max;
    uint8_t *is_planned; /* [items_max] */
    size_t items_max;

    fv_prefill_launch_t *prefills; /* of the attend() under way */
    size_t n_prefills, prefills_max;
    void *prefill_sources; /* scratch of prefill_plan_cuda.c */
    size_t prefill_sources_max;
    uint32_t
        prefill_units_min; /* units of one geometry from which on the prefill kernel takes them */
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

/* The same, for bytes that do not travel with the area: something else is sent there (fv_cuda_send_bytes). */
FV_MUST_CHECK fv_status_t fv_cuda_stage_space(fv_backend_t *backend,
                                              size_t n_bytes,
                                              size_t *out_offset);

/* The same, for bytes that the device reads or writes where they are, on the host's side. */
size_t fv_cuda_stage_still(fv_backend_t *backend, size_t n_bytes);

/* True if [p, p + n) is memory of host_alloc() or reach(). */
bool fv_cuda_is_pinned(const fv_backend_t *backend, const void *p, size_t n_bytes);
FV_MUST_CHECK fv_status_t fv_cuda_pinned_add(fv_backend_t *backend, void *begin, size_t n_bytes);
bool fv_cuda_pinned_remove(fv_backend_t *backend, const void *begin); /* false: it is none */

/* Notes that finish() must copy rows from the staging area to dst. */
FV_MUST_CHECK fv_status_t fv_cuda_scatter(fv_backend_t *backend, fv_cuda_scatter_t scatter);

/* Grow-only array. */
FV_MUST_CHECK fv_status_t fv_cuda_grow(void **array, size_t *max, size_t n, size_t elem_bytes);

/* The device is done: results that wait in the staging area go to their places, and the area is empty again. */
void fv_cuda_staging_reset(fv_backend_t *backend);

void fv_cuda_staging_free(fv_backend_t *backend);

/* ------------------------------------------------------------------ send_cuda.c */

FV_MUST_CHECK fv_status_t fv_cuda_outbox_create(fv_cuda_outbox_t *outbox);
void fv_cuda_outbox_destroy(fv_cuda_outbox_t *outbox); /* its device part */

/* Notes bytes or a unit for the next flush. Sources stay until finish(). */
FV_MUST_CHECK fv_status_t fv_cuda_send_bytes(fv_backend_t *backend,
                                             void *dst,
                                             const void *src,
                                             size_t n_bytes);
FV_MUST_CHECK fv_status_t fv_cuda_send_unit(fv_backend_t *backend, const fv_pull_unit_t *unit);
/* Notes what was staged and not yet noted. */
FV_MUST_CHECK fv_status_t fv_cuda_send_staged(fv_backend_t *backend);

/* Sends all that was noted or staged: one launch, and DMA copies where there is much. */
FV_MUST_CHECK fv_status_t fv_cuda_flush(fv_backend_t *backend);

fv_cuda_outbox_mark_t fv_cuda_outbox_mark(const fv_backend_t *backend);
void fv_cuda_outbox_back(fv_backend_t *backend, const fv_cuda_outbox_mark_t *mark);

/* ------------------------------------------------------------------ ahead_cuda.c */

FV_MUST_CHECK fv_status_t fv_cuda_ahead_create(fv_cuda_ahead_t *ahead);
void fv_cuda_ahead_destroy(fv_cuda_ahead_t *ahead);
void fv_cuda_prefetch(fv_backend_t *backend, const void *data, size_t n_bytes);
/* Where the device reads [src, src + n_bytes), which it reaches: its own memory if they travelled ahead, else src. */
const uint8_t *fv_cuda_ahead_source(fv_backend_t *backend, const void *src, size_t n_bytes);
/* Before the step's first launch: what reads copies waits for them. */
FV_MUST_CHECK fv_status_t fv_cuda_ahead_join(fv_backend_t *backend);
/* The step has ended; what travelled ahead meanwhile belongs to the next. */
void fv_cuda_ahead_next(fv_backend_t *backend);

/* ------------------------------------------------------------------ wait_cuda.c */

extern const fv_wait_limits_t
    fv_cuda_long; /* of waits inside an operation: long, but not for ever */

/*
 * Between attend and an exchange that is enqueued on the stream: the step's compute time ends here, its exchange time
 * begins. A kernel of the exchange may write outbox.record->attended_ns itself instead (%globaltimer).
 */
FV_MUST_CHECK fv_status_t fv_cuda_attended(fv_backend_t *backend);

/* Until everything on the stream is done. limits NULL: for ever. Errors: as finish(). */
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

/* The kernel that does an item's rows: alike for all items of a launch. */
fv_lean_geometry_t fv_cuda_item_geometry(const fv_backend_t *backend, const fv_attn_item_t *item);

/* False: shared memory is too small for this item's head dims and dtypes; attend() refuses it. */
bool fv_cuda_attend_fits(const fv_backend_t *backend, const fv_attn_item_t *item);

/* The same for the table of operations: FV_ERR_UNIMPLEMENTED with what was given. */
fv_status_t fv_cuda_check_attend(const fv_backend_t *backend, const fv_attn_item_t *item);

/* attend in two halves, which the benchmark calls apart: plan and stage into backend->launches, then start them. */
fv_status_t fv_cuda_attend_plan(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items);
fv_status_t
fv_cuda_attend_start(fv_backend_t *backend, const fv_lean_launch_t *launches, size_t n_launches);
fv_status_t fv_cuda_attend(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items);

/* prefill_plan_cuda.c: plans the items that the prefill kernel takes (is_planned), and starts what was planned. */
void fv_prefill_plan_init(fv_backend_t *backend);
void fv_prefill_plan_free(fv_backend_t *backend);
fv_status_t fv_prefill_plan(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items);
fv_status_t fv_prefill_start(fv_backend_t *backend);

/* Bytes of a page, and whether a reference lies in the arena. */
static inline size_t
fv_cuda_page_bytes(int32_t kv_dtype, int32_t head_dim_qk, int32_t head_dim_v, bool v_in_k)
{
    return fv_page_bytes((fv_dtype_t)kv_dtype, head_dim_qk, head_dim_v, v_in_k);
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

#endif /* FV_KERNELS_BACKEND_CUDA_H */
