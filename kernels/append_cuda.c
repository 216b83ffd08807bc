/*
 * append_cuda.c - new K and V into pages on the GPU, and whole pages for copy on write.
 *
 * Decode path: station 6 of 10. Before: worker/step.c. After: page_cuda.cu, then attend_cuda.c.
 *
 * The source is read once, so the kernel reads it where it is when it came from host_alloc(), and from the staging area's
 * host side otherwise: a copy to the device first would only add its latency.
 */
#include "kernels/backend_cuda.h"
#include "kernels/page_cuda.h"

#include <string.h>

static size_t head_bytes(const fv_append_item_t *item, int32_t head_dim)
{
    return (size_t)item->n_kv_heads * (size_t)head_dim *
           fv_dtype_bytes((fv_dtype_t)item->src_dtype);
}

static uint64_t item_pages(const fv_append_item_t *item)
{
    const uint64_t first = item->local_begin / FV_PAGE_TOKENS;

    return (item->n_tokens == 0)
               ? 0
               : ((item->local_begin + item->n_tokens - 1U) / FV_PAGE_TOKENS - first + 1U);
}

/* All pages are looked at before any is written: a refused append changes nothing. */
static fv_status_t check_pages(const fv_backend_t *backend, const fv_append_item_t *item)
{
    const size_t page_bytes =
        fv_cuda_page_bytes(item->kv_dtype, item->head_dim_qk, item->head_dim_v);
    const uint64_t first = item->local_begin / FV_PAGE_TOKENS;
    const uint64_t n_pages = item_pages(item);

    for (int32_t h = 0; h < item->n_kv_heads; h++) {
        for (uint64_t p = first; p < first + n_pages; p++) {
            const fv_page_ref_t ref = item->pages[(size_t)h * item->pages_head_stride + p];

            if (!fv_cuda_page_ok(backend, ref, page_bytes)) {
                return fv_fail(
                    FV_ERR_INVALID_ARG,
                    "kernels: pages[head %d][%llu]: given %u, expected a page inside the arena of "
                    "%zu bytes",
                    h, (unsigned long long)p, ref, backend->kv_arena_bytes);
            }
        }
    }
    return FV_OK;
}

/* Rows of one tensor, where the device reaches them; *token_bytes becomes their distance there. */
static const uint8_t *stage_rows(fv_backend_t *backend,
                                 const void *src,
                                 size_t row_bytes,
                                 size_t n_rows,
                                 size_t *token_bytes)
{
    uint8_t *staged = NULL;

    if (fv_cuda_is_pinned(backend, src, (n_rows - 1U) * *token_bytes + row_bytes)) {
        return src;
    }
    staged = backend->staging_host + fv_cuda_stage(backend, row_bytes * n_rows);
    for (size_t t = 0; t < n_rows; t++) {
        memcpy(staged + t * row_bytes, (const uint8_t *)src + t * *token_bytes, row_bytes);
    }
    *token_bytes = row_bytes;
    return staged;
}

static uint32_t make_units(const fv_append_item_t *item,
                           const uint8_t *k,
                           const uint8_t *v,
                           size_t k_stride,
                           size_t v_stride,
                           fv_append_unit_t *units)
{
    const size_t e = fv_dtype_bytes((fv_dtype_t)item->src_dtype);
    uint32_t n_units = 0;

    for (int32_t h = 0; h < item->n_kv_heads; h++) {
        uint64_t done = 0;

        while (done < item->n_tokens) {
            const uint64_t local = item->local_begin + done;
            const uint64_t slot = local % FV_PAGE_TOKENS;
            const uint64_t left = item->n_tokens - done;
            const uint64_t n = (FV_PAGE_TOKENS - slot < left) ? (FV_PAGE_TOKENS - slot) : left;
            fv_append_unit_t *u = &units[n_units++];

            memset(u, 0, sizeof(*u));
            u->k = k + done * k_stride + (size_t)h * (size_t)item->head_dim_qk * e;
            u->v = v + done * v_stride + (size_t)h * (size_t)item->head_dim_v * e;
            u->k_token_bytes = k_stride;
            u->v_token_bytes = v_stride;
            u->page = item->pages[(size_t)h * item->pages_head_stride + local / FV_PAGE_TOKENS];
            u->slot = (int32_t)slot;
            u->n_tokens = (int32_t)n;
            u->head_dim_qk = item->head_dim_qk;
            u->head_dim_v = item->head_dim_v;
            u->src_dtype = item->src_dtype;
            u->kv_dtype = item->kv_dtype;
            done += n;
        }
    }
    return n_units;
}

fv_status_t fv_cuda_append(fv_backend_t *backend, const fv_append_item_t *items, size_t n_items)
{
    size_t n_bytes = 0;
    size_t n_units_max = 0;
    size_t offset = 0;
    uint32_t n_units = 0;

    for (size_t i = 0; i < n_items; i++) {
        const fv_append_item_t *item = &items[i];

        FV_RETURN_IF_ERR(fv_cpu_check_append(item));
        FV_RETURN_IF_ERR(fv_cuda_check_latent(item->v_in_k));
        FV_RETURN_IF_ERR(check_pages(backend, item));
        n_units_max += (size_t)item_pages(item) * (size_t)item->n_kv_heads;
        n_bytes += FV_CUDA_STAGE_BYTES(item->n_tokens * head_bytes(item, item->head_dim_qk)) +
                   FV_CUDA_STAGE_BYTES(item->n_tokens * head_bytes(item, item->head_dim_v));
    }
    if (n_units_max == 0) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_cuda_reserve(
        backend, n_bytes + FV_CUDA_STAGE_BYTES(n_units_max * sizeof(fv_append_unit_t))));
    offset = fv_cuda_stage(backend, n_units_max * sizeof(fv_append_unit_t));
    for (size_t i = 0; i < n_items; i++) {
        const fv_append_item_t *item = &items[i];
        size_t k_stride = item->k_token_bytes;
        size_t v_stride = item->v_token_bytes;

        if (item->n_tokens > 0) {
            const uint8_t *k = stage_rows(backend, item->k, head_bytes(item, item->head_dim_qk),
                                          (size_t)item->n_tokens, &k_stride);
            const uint8_t *v = stage_rows(backend, item->v, head_bytes(item, item->head_dim_v),
                                          (size_t)item->n_tokens, &v_stride);

            n_units += make_units(item, k, v, k_stride, v_stride,
                                  (fv_append_unit_t *)fv_cuda_on_host(backend, offset) + n_units);
        }
    }
    FV_RETURN_IF_ERR(fv_cuda_clock_mark(backend, FV_CUDA_BEGIN));
    FV_RETURN_IF_ERR(FV_CUDA(cudaMemcpyAsync(
        backend->staging_device + offset, backend->staging_host + offset,
        n_units * sizeof(fv_append_unit_t), cudaMemcpyHostToDevice, backend->stream)));
    return FV_CUDA(fv_page_append_launch(backend->arena, fv_cuda_on_device(backend, offset),
                                         n_units, backend->stream));
}

fv_status_t fv_cuda_copy_pages(fv_backend_t *backend, const fv_page_copy_t *copies, size_t n_copies)
{
    size_t offset = 0;

    for (size_t i = 0; i < n_copies; i++) {
        const fv_page_copy_t *c = &copies[i];
        size_t page_bytes = 0;

        FV_RETURN_IF_ERR(fv_cpu_check_copy(c));
        FV_RETURN_IF_ERR(fv_cuda_check_latent(c->v_in_k));
        page_bytes = fv_cuda_page_bytes(c->kv_dtype, c->head_dim_qk, c->head_dim_v);
        if (!fv_cuda_page_ok(backend, c->src, page_bytes) ||
            !fv_cuda_page_ok(backend, c->dst, page_bytes)) {
            return fv_fail(FV_ERR_INVALID_ARG,
                           "kernels: copy %u -> %u: expected pages inside the arena of %zu bytes",
                           c->src, c->dst, backend->kv_arena_bytes);
        }
    }
    if (n_copies == 0) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(
        fv_cuda_reserve(backend, FV_CUDA_STAGE_BYTES(n_copies * sizeof(fv_copy_unit_t))));
    offset = fv_cuda_stage(backend, n_copies * sizeof(fv_copy_unit_t));
    for (size_t i = 0; i < n_copies; i++) {
        const fv_page_copy_t *c = &copies[i];
        const uint32_t e = (uint32_t)fv_dtype_bytes((fv_dtype_t)c->kv_dtype);

        ((fv_copy_unit_t *)fv_cuda_on_host(backend, offset))[i] = (fv_copy_unit_t){
            .src = c->src,
            .dst = c->dst,
            .k_bytes = (uint32_t)c->n_tokens * (uint32_t)c->head_dim_qk * e,
            .v_bytes = (uint32_t)c->n_tokens * (uint32_t)c->head_dim_v * e,
            .v_offset = FV_PAGE_TOKENS * (uint32_t)c->head_dim_qk * e,
        };
    }
    FV_RETURN_IF_ERR(fv_cuda_stage_send(backend, offset));
    return FV_CUDA(fv_page_copy_launch(backend->arena, fv_cuda_on_device(backend, offset),
                                       (uint32_t)n_copies, backend->stream));
}
