/*
 * append_cuda.c - new K and V into pages on the GPU, and whole pages for copy on write.
 *
 * Decode path: station 6 of 10. Before: worker/step.c. After: pull_cuda.cu, then attend_cuda.c.
 *
 * The source is read once, so the kernel reads it where it is when it came from host_alloc(), and from the staging area's
 * host side otherwise: a copy to the device first would only add its latency.
 */
#include "kernels/backend_cuda.h"
#include "kernels/page_cuda.h"

#include <string.h>

/* Of a token's rows of all heads; of whole pages of FP8 latents, their 64th part. */
static size_t k_row_bytes(const fv_append_item_t *item)
{
    if (item->src_dtype == (int32_t)FV_DTYPE_FP8_LATENT) {
        return fv_cuda_page_bytes(item->kv_dtype, item->head_dim_qk, item->head_dim_v,
                                  item->v_in_k) /
               FV_PAGE_TOKENS;
    }
    return (size_t)item->n_kv_heads *
           ((size_t)item->head_dim_qk * fv_dtype_bytes((fv_dtype_t)item->src_dtype) +
            item->rope_gap_bytes);
}

static size_t k_token_bytes(const fv_append_item_t *item)
{
    return (item->src_dtype == (int32_t)FV_DTYPE_FP8_LATENT) ? k_row_bytes(item)
                                                             : item->k_token_bytes;
}

static size_t v_row_bytes(const fv_append_item_t *item)
{
    return item->v_in_k ? 0U
                        : ((size_t)item->n_kv_heads * (size_t)item->head_dim_v *
                           fv_dtype_bytes((fv_dtype_t)item->src_dtype));
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
        fv_cuda_page_bytes(item->kv_dtype, item->head_dim_qk, item->head_dim_v, item->v_in_k);
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

static bool reaches(const fv_backend_t *backend,
                    const void *src,
                    size_t row_bytes,
                    size_t n_rows,
                    size_t token_bytes)
{
    return fv_cuda_is_pinned(backend, src, (n_rows - 1U) * token_bytes + row_bytes);
}

/* Staging bytes of one tensor. */
static size_t rows_bytes(const fv_backend_t *backend,
                         const void *src,
                         size_t row_bytes,
                         size_t n_rows,
                         size_t token_bytes)
{
    return ((n_rows == 0U) || (row_bytes == 0U) ||
            reaches(backend, src, row_bytes, n_rows, token_bytes))
               ? 0U
               : FV_CUDA_STAGE_BYTES(row_bytes * n_rows);
}

/* Rows of one tensor, where the device reaches them; *token_bytes becomes their distance there. */
static const uint8_t *stage_rows(fv_backend_t *backend,
                                 const void *src,
                                 size_t row_bytes,
                                 size_t n_rows,
                                 size_t *token_bytes)
{
    uint8_t *staged = NULL;

    if (reaches(backend, src, row_bytes, n_rows, *token_bytes)) {
        return fv_cuda_ahead_source(backend, src, (n_rows - 1U) * *token_bytes + row_bytes);
    }
    staged = backend->staging_host + fv_cuda_stage_still(backend, row_bytes * n_rows);
    for (size_t t = 0; t < n_rows; t++) {
        memcpy(staged + t * row_bytes, (const uint8_t *)src + t * *token_bytes, row_bytes);
    }
    *token_bytes = row_bytes;
    return staged;
}

/* One unit for each stretch of tokens in a local page and some heads: about as many rows in each. */
static fv_status_t send_units(fv_backend_t *backend,
                              const fv_append_item_t *item,
                              const fv_pull_unit_t *first,
                              uint64_t local,
                              int32_t n_tokens)
{
    const size_t e = fv_dtype_bytes((fv_dtype_t)item->src_dtype);
    const int32_t heads_max = (n_tokens >= FV_PULL_HEADS) ? 1 : (FV_PULL_HEADS / n_tokens);
    const fv_page_ref_t *pages = item->pages + local / FV_PAGE_TOKENS;
    fv_pull_unit_t unit = *first;

    unit.slot = (uint16_t)(local % FV_PAGE_TOKENS);
    unit.n_tokens = (uint16_t)n_tokens;
    for (int32_t h = 0; h < item->n_kv_heads; h += heads_max) {
        const int32_t left = item->n_kv_heads - h;

        unit.n_heads = (uint8_t)((left < heads_max) ? left : heads_max);
        unit.k = first->k + (size_t)h * ((size_t)item->head_dim_qk * e + item->rope_gap_bytes);
        unit.v = first->v + (size_t)h * (size_t)item->head_dim_v * e;
        for (int32_t i = 0; i < unit.n_heads; i++) {
            unit.pages[i] = pages[(size_t)(h + i) * item->pages_head_stride];
        }
        FV_RETURN_IF_ERR(fv_cuda_send_unit(backend, &unit));
    }
    return FV_OK;
}

/* Whole pages of FP8 latents, as they are stored. */
static fv_status_t append_pages(fv_backend_t *backend, const fv_append_item_t *item)
{
    size_t row_bytes = k_row_bytes(item);
    const uint8_t *k = stage_rows(backend, item->k, row_bytes, (size_t)item->n_tokens, &row_bytes);
    const size_t page_bytes = row_bytes * FV_PAGE_TOKENS;

    for (uint64_t p = 0; p < item_pages(item); p++) {
        const fv_page_ref_t ref = item->pages[item->local_begin / FV_PAGE_TOKENS + p];

        FV_RETURN_IF_ERR(fv_cuda_send_bytes(backend, backend->arena + (size_t)ref * FV_PAGE_UNIT,
                                            k + p * page_bytes, page_bytes));
    }
    return FV_OK;
}

static fv_status_t append_item(fv_backend_t *backend, const fv_append_item_t *item)
{
    size_t k_stride = item->k_token_bytes;
    size_t v_stride = item->v_token_bytes;
    const uint8_t *k =
        stage_rows(backend, item->k, k_row_bytes(item), (size_t)item->n_tokens, &k_stride);
    const uint8_t *v = item->v_in_k ? k
                                    : stage_rows(backend, item->v, v_row_bytes(item),
                                                 (size_t)item->n_tokens, &v_stride);
    fv_pull_unit_t unit = {.kind = item->v_in_k ? FV_PULL_LATENT : FV_PULL_APPEND,
                           .rope_gap_bytes = (uint32_t)item->rope_gap_bytes,
                           .norm_alpha = item->norm_alpha,
                           .norm_eps = item->norm_eps,
                           .k_token_bytes = k_stride,
                           .v_token_bytes = v_stride,
                           .src_dtype = (uint8_t)item->src_dtype,
                           .kv_dtype = (uint8_t)item->kv_dtype,
                           .head_dim_qk = (uint16_t)item->head_dim_qk,
                           .head_dim_v = (uint16_t)item->head_dim_v};
    uint64_t done = 0;

    while (done < item->n_tokens) {
        const uint64_t local = item->local_begin + done;
        const uint64_t left = item->n_tokens - done;
        const uint64_t room = FV_PAGE_TOKENS - local % FV_PAGE_TOKENS;
        const uint64_t n = (room < left) ? room : left;

        unit.k = k + done * k_stride;
        unit.v = v + done * v_stride;
        FV_RETURN_IF_ERR(send_units(backend, item, &unit, local, (int32_t)n));
        done += n;
    }
    return FV_OK;
}

fv_status_t fv_cuda_append(fv_backend_t *backend, const fv_append_item_t *items, size_t n_items)
{
    size_t n_bytes = 0;

    for (size_t i = 0; i < n_items; i++) {
        const fv_append_item_t *item = &items[i];

        FV_RETURN_IF_ERR(fv_cpu_check_append(item));
        FV_RETURN_IF_ERR(check_pages(backend, item));
        n_bytes += rows_bytes(backend, item->k, k_row_bytes(item), (size_t)item->n_tokens,
                              k_token_bytes(item)) +
                   rows_bytes(backend, item->v, v_row_bytes(item), (size_t)item->n_tokens,
                              item->v_token_bytes);
    }
    FV_RETURN_IF_ERR(fv_cuda_reserve(backend, n_bytes));
    if (backend->outbox.has_appends) { /* blocks of one launch have no order, two calls do */
        FV_RETURN_IF_ERR(fv_cuda_flush(backend));
    }
    backend->outbox.has_appends = true;
    for (size_t i = 0; i < n_items; i++) {
        if (items[i].n_tokens > 0) {
            FV_RETURN_IF_ERR((items[i].src_dtype == (int32_t)FV_DTYPE_FP8_LATENT)
                                 ? append_pages(backend, &items[i])
                                 : append_item(backend, &items[i]));
        }
    }
    return FV_OK;
}

static fv_copy_unit_t copy_unit(const fv_page_copy_t *c)
{
    const uint32_t e = (uint32_t)fv_dtype_bytes((fv_dtype_t)c->kv_dtype);

    if (c->kv_dtype ==
        (int32_t)FV_DTYPE_FP8_LATENT) { /* tokens lie across it: the whole page, in any rows */
        return (fv_copy_unit_t){
            .src = c->src,
            .dst = c->dst,
            .n_tokens = FV_PAGE_TOKENS,
            .k_bytes = (uint32_t)(fv_cuda_page_bytes(c->kv_dtype, c->head_dim_qk, c->head_dim_v,
                                                     c->v_in_k) /
                                  FV_PAGE_TOKENS),
            .elem_bytes = 1,
        };
    }
    return (fv_copy_unit_t){
        .src = c->src,
        .dst = c->dst,
        .n_tokens = (uint32_t)c->n_tokens,
        .k_bytes = (uint32_t)c->head_dim_qk * e,
        .v_bytes = c->v_in_k ? 0U : ((uint32_t)c->head_dim_v * e),
        .elem_bytes = e,
        .v_offset = FV_PAGE_TOKENS * (uint32_t)c->head_dim_qk * e,
    };
}

fv_status_t fv_cuda_copy_pages(fv_backend_t *backend, const fv_page_copy_t *copies, size_t n_copies)
{
    size_t offset = 0;

    for (size_t i = 0; i < n_copies; i++) {
        const fv_page_copy_t *c = &copies[i];
        size_t page_bytes = 0;

        FV_RETURN_IF_ERR(fv_cpu_check_copy(c));
        page_bytes = fv_cuda_page_bytes(c->kv_dtype, c->head_dim_qk, c->head_dim_v, c->v_in_k);
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
    offset = fv_cuda_stage_still(backend, n_copies * sizeof(fv_copy_unit_t));
    for (size_t i = 0; i < n_copies; i++) {
        ((fv_copy_unit_t *)fv_cuda_on_host(backend, offset))[i] = copy_unit(&copies[i]);
    }
    /* at once, so that appends noted before and after keep their order; its units are read over the bus */
    FV_RETURN_IF_ERR(fv_cuda_flush(backend));
    return FV_CUDA(fv_page_copy_launch(backend->arena, fv_cuda_on_host(backend, offset),
                                       (uint32_t)n_copies, backend->stream));
}
