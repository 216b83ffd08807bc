/*
 * merge_cuda.c - the merge of partial states on the GPU: parts are read where they are, over the bus.
 *
 * Decode path: station 8 of 10. Before: worker/exchange_*.c. After: merge_cuda.cu, then worker/step.c.
 */
#include "kernels/backend_cuda.h"
#include "kernels/page_cuda.h"

#include <string.h>

#define BLOCKS_MAX ((uint64_t)INT32_MAX)

static size_t item_stage_bytes(const fv_merge_item_t *item)
{
    const size_t n_rows = (size_t)item->n_rows;
    const size_t parts = (size_t)item->n_parts;

    return 2U * FV_CUDA_STAGE_BYTES(parts * sizeof(float *)) +
           parts * (FV_CUDA_STAGE_BYTES(n_rows * (size_t)item->head_dim_v * sizeof(float)) +
                    FV_CUDA_STAGE_BYTES(n_rows * sizeof(float)));
}

/* n floats where the device reaches them. */
static const float *stage_floats(fv_backend_t *backend, const float *src, size_t n)
{
    float *staged = NULL;

    if (fv_cuda_is_pinned(backend, src, n * sizeof(float))) {
        return src;
    }
    staged = fv_cuda_on_host(backend, fv_cuda_stage(backend, n * sizeof(float)));
    memcpy(staged, src, n * sizeof(float));
    return staged;
}

/* Rows of the result's tokens [first, last]: bytes from the first token on. */
static size_t span(size_t token_bytes, size_t row_bytes, uint64_t n_tokens)
{
    return (size_t)(n_tokens - 1U) * token_bytes + row_bytes;
}

/*
 * Results that the device does not reach are written to a buffer of the whole item's shape and copied out row by row:
 * the first and last token may be partial.
 */
static fv_status_t stage_rows_out(fv_backend_t *backend,
                                  const fv_merge_item_t *item,
                                  void *dst,
                                  size_t token_bytes,
                                  size_t row_bytes,
                                  void **out)
{
    const uint64_t first = item->row_base / item->row_len;
    const uint64_t last = (item->row_base + item->n_rows - 1U) / item->row_len;
    uint8_t *const begin = (uint8_t *)dst + first * token_bytes;
    uint8_t *staged = NULL;

    *out = dst;
    if (fv_cuda_is_pinned(
            backend, begin,
            span(token_bytes, (size_t)item->row_len * row_bytes, last - first + 1U))) {
        return FV_OK;
    }
    staged = backend->staging_host + fv_cuda_stage(backend, (size_t)(last - first + 1U) *
                                                                (size_t)item->row_len * row_bytes);
    for (uint64_t t = first; t <= last; t++) {
        const uint64_t row = t * item->row_len;
        const uint64_t from = (row < item->row_base) ? (item->row_base - row) : 0U;
        const uint64_t end = item->row_base + item->n_rows - row;
        const uint64_t to = (end < item->row_len) ? end : item->row_len;
        const fv_cuda_scatter_t scatter = {
            .dst = (uint8_t *)dst + t * token_bytes + from * row_bytes,
            .src = staged + (t - first) * item->row_len * row_bytes + from * row_bytes,
            .row_bytes = (size_t)(to - from) * row_bytes,
            .n_rows = 1,
            .dst_stride = 0,
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

    FV_RETURN_IF_ERR(
        stage_rows_out(backend, item, item->out, item->out_token_bytes, row_bytes, &out));
    unit->row_base = item->row_base;
    unit->out = out;
    unit->out_token_bytes = item->out_token_bytes;
    if (out != item->out) { /* dense, and begins at the first token */
        unit->out_token_bytes = item->row_len * row_bytes;
        unit->out_first = first;
    }
    if (item->lse == NULL) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(stage_rows_out(backend, item, item->lse,
                                    item->lse_token_stride * sizeof(float), sizeof(float), &lse));
    unit->lse = lse;
    unit->lse_token_stride = item->lse_token_stride;
    if (lse != item->lse) {
        unit->lse_token_stride = item->row_len;
        unit->lse_first = first;
    }
    return FV_OK;
}

static fv_status_t
make_unit(fv_backend_t *backend, const fv_merge_item_t *item, fv_merge_unit_t *unit)
{
    const size_t parts = (size_t)item->n_parts;
    const size_t o_at = fv_cuda_stage(backend, parts * sizeof(float *));
    const size_t lse_at = fv_cuda_stage(backend, parts * sizeof(float *));
    const float **o = fv_cuda_on_host(backend, o_at);
    const float **lse = fv_cuda_on_host(backend, lse_at);

    for (size_t part = 0; part < parts; part++) {
        o[part] =
            stage_floats(backend, item->o[part], (size_t)item->n_rows * (size_t)item->head_dim_v);
        lse[part] = stage_floats(backend, item->lse_log2[part], (size_t)item->n_rows);
    }
    unit->o = fv_cuda_on_device(backend, o_at);
    unit->lse_log2 = fv_cuda_on_device(backend, lse_at);
    unit->row_len = item->row_len;
    unit->n_rows = item->n_rows;
    unit->n_parts = item->n_parts;
    unit->head_dim_v = item->head_dim_v;
    unit->io_dtype = item->io_dtype;
    return stage_results(backend, item, unit);
}

static size_t item_out_bytes(const fv_merge_item_t *item)
{
    const uint64_t n_tokens = item->n_rows / item->row_len + 2U;

    return FV_CUDA_STAGE_BYTES((size_t)n_tokens * (size_t)item->row_len * (size_t)item->head_dim_v *
                               4U) +
           FV_CUDA_STAGE_BYTES((size_t)n_tokens * (size_t)item->row_len * sizeof(float));
}

fv_status_t fv_cuda_merge(fv_backend_t *backend, const fv_merge_item_t *items, size_t n_items)
{
    size_t n_bytes = FV_CUDA_STAGE_BYTES(n_items * sizeof(fv_merge_unit_t));
    uint64_t n_blocks = 0;
    uint32_t n_units = 0;
    size_t begin = 0;
    fv_merge_unit_t *units = NULL;

    for (size_t i = 0; i < n_items; i++) {
        FV_RETURN_IF_ERR(fv_cpu_check_merge(&items[i]));
        n_bytes +=
            (items[i].n_rows > 0) ? (item_stage_bytes(&items[i]) + item_out_bytes(&items[i])) : 0U;
        n_blocks += items[i].n_rows;
    }
    if (n_blocks == 0) {
        return FV_OK;
    }
    if (n_blocks > BLOCKS_MAX) {
        return fv_fail(FV_ERR_INVALID_ARG, "kernels: merge: given %llu rows, expected at most %llu",
                       (unsigned long long)n_blocks, (unsigned long long)BLOCKS_MAX);
    }
    FV_RETURN_IF_ERR(fv_cuda_reserve(backend, n_bytes));
    begin = fv_cuda_stage(backend, n_items * sizeof(fv_merge_unit_t));
    units = fv_cuda_on_host(backend, begin);
    n_blocks = 0;
    for (size_t i = 0; i < n_items; i++) {
        if (items[i].n_rows > 0) {
            memset(&units[n_units], 0, sizeof(units[n_units]));
            units[n_units].block_begin = n_blocks;
            FV_RETURN_IF_ERR(make_unit(backend, &items[i], &units[n_units]));
            n_blocks += items[i].n_rows;
            n_units++;
        }
    }
    FV_RETURN_IF_ERR(fv_cuda_stage_send(backend, begin));
    FV_RETURN_IF_ERR(FV_CUDA(
        fv_merge_launch(fv_cuda_on_device(backend, begin), n_units, n_blocks, backend->stream)));
    return fv_cuda_clock_mark(backend, FV_CUDA_MERGED);
}
