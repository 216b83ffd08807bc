/*
 * merge_cuda.c - the merge of partial states on the GPU: parts are read where they are, in the device's memory after an
 * exchange between devices, over the bus after one between hosts.
 *
 * Decode path: station 8 of 10. Before: worker/exchange_*.c. After: merge_cuda.cu, then worker/step.c.
 */
#include "kernels/merge_cuda.h"

#include "kernels/backend_cuda.h"

#include <stdlib.h>
#include <string.h>

#define ROWS_MAX  ((uint64_t)1 << 40)
#define UNITS_MAX ((size_t)1 << 24)
#define BLOCKS_PER_SM_LL \
    2U /* all blocks of a launch with LL run at once: each sends before it waits */

/* The kernel reads states by 16 bytes. */
static bool is_direct(const fv_backend_t *backend, const float *src, size_t n, size_t alignment)
{
    return ((uintptr_t)src % alignment == 0U) && fv_cuda_is_pinned(backend, src, n * sizeof(float));
}

static size_t part_bytes(const fv_backend_t *backend, const float *src, size_t n, size_t alignment)
{
    return is_direct(backend, src, n, alignment) ? 0U : FV_CUDA_STAGE_BYTES(n * sizeof(float));
}

/* Staging bytes of an item's states, those that the device does not reach. */
static size_t item_stage_bytes(const fv_backend_t *backend, const fv_merge_item_t *item)
{
    const size_t n_rows = (size_t)item->n_rows;
    size_t n_bytes = 0;

    for (int32_t part = 0; part < item->n_parts; part++) {
        n_bytes += part_bytes(backend, item->o[part], n_rows * (size_t)item->head_dim_v, 16U) +
                   part_bytes(backend, item->lse_log2[part], n_rows, sizeof(float));
    }
    return n_bytes;
}

/* n floats where the device reaches them. */
static const float *
stage_floats(fv_backend_t *backend, const float *src, size_t n, size_t alignment)
{
    float *staged = NULL;

    if (is_direct(backend, src, n, alignment)) {
        return src;
    }
    staged = fv_cuda_on_host(backend, fv_cuda_stage_still(backend, n * sizeof(float)));
    memcpy(staged, src, n * sizeof(float));
    return staged;
}

/* Rows of the result's tokens [first, last]: bytes from the first token on. */
static size_t span(size_t token_bytes, size_t row_bytes, uint64_t n_tokens)
{
    return (size_t)(n_tokens - 1U) * token_bytes + row_bytes;
}

/* From row to row of a token's results. */
static size_t out_head_bytes(const fv_merge_item_t *item)
{
    return (item->out_head_bytes != 0U)
               ? item->out_head_bytes
               : ((size_t)item->head_dim_v * fv_dtype_bytes((fv_dtype_t)item->io_dtype));
}

/* Are all tokens that the item writes to, whole, where the device reaches them? */
static bool is_out_direct(const fv_backend_t *backend,
                          const fv_merge_item_t *item,
                          const void *dst,
                          size_t token_bytes,
                          size_t head_bytes,
                          size_t row_bytes)
{
    const uint64_t first = item->row_base / item->row_len;
    const uint64_t last = (item->row_base + item->n_rows - 1U) / item->row_len;

    return fv_cuda_is_pinned(backend, (const uint8_t *)dst + first * token_bytes,
                             span(token_bytes,
                                  (size_t)(item->row_len - 1U) * head_bytes + row_bytes,
                                  last - first + 1U));
}

/*
 * Results that the device does not reach are written to a buffer of the whole item's shape and copied out row by row:
 * the first and last token may be partial.
 */
static fv_status_t stage_rows_out(fv_backend_t *backend,
                                  const fv_merge_item_t *item,
                                  void *dst,
                                  size_t token_bytes,
                                  size_t head_bytes,
                                  size_t row_bytes,
                                  void **out)
{
    const uint64_t first = item->row_base / item->row_len;
    const uint64_t last = (item->row_base + item->n_rows - 1U) / item->row_len;
    uint8_t *staged = NULL;

    *out = dst;
    if (is_out_direct(backend, item, dst, token_bytes, head_bytes, row_bytes)) {
        return FV_OK;
    }
    staged = backend->staging_host +
             fv_cuda_stage_still(backend,
                                 (size_t)(last - first + 1U) * (size_t)item->row_len * row_bytes);
    for (uint64_t t = first; t <= last; t++) {
        const uint64_t row = t * item->row_len;
        const uint64_t from = (row < item->row_base) ? (item->row_base - row) : 0U;
        const uint64_t end = item->row_base + item->n_rows - row;
        const uint64_t to = (end < item->row_len) ? end : item->row_len;
        const fv_cuda_scatter_t scatter = {
            .dst = (uint8_t *)dst + t * token_bytes + from * head_bytes,
            .src = staged + (t - first) * item->row_len * row_bytes + from * row_bytes,
            .row_bytes = (head_bytes == row_bytes) ? ((size_t)(to - from) * row_bytes) : row_bytes,
            .n_rows = (head_bytes == row_bytes) ? 1U : (size_t)(to - from),
            .dst_stride = head_bytes,
        };

        FV_RETURN_IF_ERR(fv_cuda_scatter(backend, scatter));
    }
    *out = staged;
    return FV_OK;
}

/* Rows and lse are staged or not each on its own, so each has its own first token. */
static fv_status_t
stage_results(fv_backend_t *backend, const fv_merge_item_t *item, fv_merge_unit_t *unit)
{
    const size_t row_bytes = (size_t)item->head_dim_v * fv_dtype_bytes((fv_dtype_t)item->io_dtype);
    const uint64_t first = item->row_base / item->row_len;
    void *out = NULL;
    void *lse = NULL;

    FV_RETURN_IF_ERR(stage_rows_out(backend, item, item->out, item->out_token_bytes,
                                    out_head_bytes(item), row_bytes, &out));
    unit->row_base = item->row_base;
    unit->out = out;
    unit->out_token_bytes = item->out_token_bytes;
    unit->out_head_bytes = out_head_bytes(item);
    if (out != item->out) { /* dense, and begins at the first token */
        unit->out_token_bytes = item->row_len * row_bytes;
        unit->out_head_bytes = row_bytes;
        unit->out_first = first;
    }
    if (item->lse == NULL) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(stage_rows_out(backend, item, item->lse,
                                    item->lse_token_stride * sizeof(float), sizeof(float),
                                    sizeof(float), &lse));
    unit->lse = lse;
    unit->lse_token_stride = item->lse_token_stride;
    if (lse != item->lse) {
        unit->lse_token_stride = item->row_len;
        unit->lse_first = first;
    }
    return FV_OK;
}

static size_t item_out_bytes(const fv_backend_t *backend, const fv_merge_item_t *item)
{
    const size_t row_bytes = (size_t)item->head_dim_v * fv_dtype_bytes((fv_dtype_t)item->io_dtype);
    const size_t n_rows = (size_t)((item->n_rows / item->row_len + 2U) * item->row_len);
    size_t n_bytes = 0;

    if (!is_out_direct(backend, item, item->out, item->out_token_bytes, out_head_bytes(item),
                       row_bytes)) {
        n_bytes += FV_CUDA_STAGE_BYTES(n_rows * row_bytes);
    }
    if ((item->lse != NULL) &&
        !is_out_direct(backend, item, item->lse, item->lse_token_stride * sizeof(float),
                       sizeof(float), sizeof(float))) {
        n_bytes += FV_CUDA_STAGE_BYTES(n_rows * sizeof(float));
    }
    return n_bytes;
}

/* A state that arrives by LL: words lie twice as far from the message's begin. True if it is one. */
static bool
find_ll(const fv_merge_sync_t *sync, const float *o, const float *lse, fv_merge_part_t *part)
{
    for (size_t i = 0; (sync != NULL) && (i < sync->n_pairs); i++) {
        const fv_merge_pair_t *pair = &sync->pairs[i];
        const uintptr_t begin = (uintptr_t)pair->ll_recv;
        const uintptr_t at = (uintptr_t)o;

        if ((pair->recv_bytes > 0U) && (at >= begin) && (at - begin < pair->recv_bytes)) {
            part->o = (const float *)(begin + 2U * (at - begin));
            part->lse_log2 = (const float *)(begin + 2U * ((uintptr_t)lse - begin));
            part->value = pair->value;
            part->pair = (uint32_t)i;
            return true;
        }
    }
    return false;
}

static fv_status_t make_unit(fv_backend_t *backend,
                             const fv_merge_item_t *item,
                             const fv_merge_sync_t *sync,
                             fv_merge_unit_t *unit,
                             fv_merge_part_t *parts)
{
    const size_t n_rows = (size_t)item->n_rows;

    for (int32_t i = 0; i < item->n_parts; i++) {
        parts[i] = (fv_merge_part_t){.value = 0};
        if (find_ll(sync, item->o[i], item->lse_log2[i], &parts[i])) {
            continue;
        }
        parts[i].o = stage_floats(backend, item->o[i], n_rows * (size_t)item->head_dim_v, 16U);
        parts[i].lse_log2 = stage_floats(backend, item->lse_log2[i], n_rows, sizeof(float));
    }
    unit->row_len = item->row_len;
    unit->n_parts = (uint32_t)item->n_parts;
    unit->head_dim_v = item->head_dim_v;
    unit->io_dtype = item->io_dtype;
    return stage_results(backend, item, unit);
}

/* What one merge() needs. */
typedef struct plan {
    size_t n_units, n_parts, n_pairs;
    uint64_t n_jobs;
    size_t stage_bytes; /* at most, for states and results that the device does not reach */
} plan_t;

static fv_status_t make_plan(const fv_backend_t *backend,
                             const fv_merge_item_t *items,
                             size_t n_items,
                             const fv_merge_sync_t *sync,
                             plan_t *plan)
{
    *plan = (plan_t){.n_pairs = (sync == NULL) ? 0U : sync->n_pairs};
    for (size_t i = 0; i < n_items; i++) {
        FV_RETURN_IF_ERR(fv_cpu_check_merge(&items[i]));
        if (items[i].n_rows > 0) {
            plan->stage_bytes +=
                item_stage_bytes(backend, &items[i]) + item_out_bytes(backend, &items[i]);
            plan->n_units++;
            plan->n_parts += (size_t)items[i].n_parts;
            plan->n_jobs += items[i].n_rows * fv_merge_row_jobs(items[i].head_dim_v);
        }
    }
    if ((plan->n_jobs > ROWS_MAX) || (plan->n_parts > UNITS_MAX)) {
        return fv_fail(
            FV_ERR_INVALID_ARG,
            "kernels: merge: given %llu rows and %zu parts, expected at most %llu and %zu",
            (unsigned long long)plan->n_jobs, plan->n_parts, (unsigned long long)ROWS_MAX,
            UNITS_MAX);
    }
    return FV_OK;
}

/* Room for the blob, 16-byte aligned: malloc's alignment. */
static fv_status_t take_blob(fv_backend_t *backend, size_t n_bytes)
{
    return fv_cuda_grow((void **)&backend->merge_blob, &backend->merge_blob_max, n_bytes, 1);
}

static fv_status_t fill_blob(fv_backend_t *backend,
                             const fv_merge_item_t *items,
                             size_t n_items,
                             const fv_merge_sync_t *sync,
                             const plan_t *plan)
{
    void *const units_at = backend->merge_blob + fv_merge_units_at(plan->n_pairs);
    void *const parts_at = backend->merge_blob + fv_merge_parts_at(plan->n_pairs, plan->n_units);
    fv_merge_unit_t *unit = units_at;
    fv_merge_part_t *part = parts_at;
    uint64_t n_jobs = 0;

    if (plan->n_pairs > 0) {
        memcpy(backend->merge_blob, sync->pairs, plan->n_pairs * sizeof(*sync->pairs));
    }
    for (size_t i = 0; i < n_items; i++) {
        if (items[i].n_rows == 0) {
            continue;
        }
        *unit = (fv_merge_unit_t){
            .job_begin = n_jobs,
            .part_begin = (uint32_t)(part - (const fv_merge_part_t *)parts_at),
        };
        FV_RETURN_IF_ERR(make_unit(backend, &items[i], sync, unit, part));
        n_jobs += items[i].n_rows * fv_merge_row_jobs(items[i].head_dim_v);
        part += items[i].n_parts;
        unit++;
    }
    return FV_OK;
}

/* A blob that is too large for parameters travels through the staging area. */
static fv_status_t send_blob(fv_backend_t *backend, fv_merge_launch_t *launch)
{
    size_t at = 0;

    launch->blob = backend->merge_blob;
    if (launch->blob_bytes <= FV_MERGE_BLOB_MAX) {
        return fv_cuda_flush(backend);
    }
    at = fv_cuda_stage(backend, (size_t)launch->blob_bytes);
    memcpy(fv_cuda_on_host(backend, at), backend->merge_blob, (size_t)launch->blob_bytes);
    launch->blob = fv_cuda_on_device(backend, at);
    launch->is_staged = 1;
    return fv_cuda_flush(backend);
}

fv_status_t fv_cuda_merge(fv_backend_t *backend,
                          const fv_merge_item_t *items,
                          size_t n_items,
                          const fv_merge_sync_t *sync)
{
    fv_merge_launch_t launch = {0};
    plan_t plan;

    FV_RETURN_IF_ERR(make_plan(backend, items, n_items, sync, &plan));
    if ((plan.n_jobs == 0) && (plan.n_pairs == 0)) {
        return FV_OK;
    }
    launch.is_early = backend->has_sm90 ? 1U : 0U;
    launch.n_blocks_ll = (uint32_t)backend->n_sms * BLOCKS_PER_SM_LL;
    launch.blob_bytes = fv_align_up(fv_merge_parts_at(plan.n_pairs, plan.n_units) +
                                        plan.n_parts * sizeof(fv_merge_part_t),
                                    16U);
    launch.n_jobs = plan.n_jobs;
    launch.n_pairs = (uint32_t)plan.n_pairs;
    launch.n_units = (uint32_t)plan.n_units;
    for (size_t i = 0; i < plan.n_pairs; i++) {
        const uint64_t quads = sync->pairs[i].send_bytes / 16U;

        launch.ll_quads = (quads > launch.ll_quads) ? quads : launch.ll_quads;
        launch.n_flags += (sync->pairs[i].signal != NULL) ? 1U : 0U;
    }
    if (sync != NULL) {
        launch.deadline_ns = (uint64_t)sync->deadline_ms * 1000000U;
        launch.abort = sync->abort;
        launch.gave_up = sync->gave_up;
        launch.attended_ns = &backend->outbox.record->attended_ns;
    }
    FV_RETURN_IF_ERR(take_blob(backend, (size_t)launch.blob_bytes));
    FV_RETURN_IF_ERR(fv_cuda_reserve(backend, plan.stage_bytes +
                                                  FV_CUDA_STAGE_BYTES((size_t)launch.blob_bytes)));
    FV_RETURN_IF_ERR(fill_blob(backend, items, n_items, sync, &plan));
    FV_RETURN_IF_ERR(send_blob(backend, &launch));
    return FV_CUDA(fv_merge_launch(&launch, backend->stream));
}

fv_status_t fv_cuda_empty(fv_backend_t *backend, float *lse_log2, uint64_t n_rows)
{
    FV_RETURN_IF_ERR(fv_cuda_usable(backend));
    return FV_CUDA(fv_merge_empty_launch(lse_log2, n_rows, backend->stream));
}
