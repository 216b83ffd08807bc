/*
 * stage_cuda.c - page table, query and results of an item, where the device reaches them.
 *
 * Decode path: station 7 of 10. Before: attend_cuda.c. After: send_cuda.c, which brings them.
 *
 * A table that has an id stays on the device; only entries it lacks travel (table_cache.h). Others travel each time,
 * closed up to the pages that are read. A query in memory of host_alloc() is pulled from where it lies.
 */
#include "kernels/stage_cuda.h"

#include <string.h>

#define LOOK_BYTES  ((size_t)64 << 10)
#define PATCH_PAGES 4U /* new pages of a table up to which each is a patch */

static size_t n_q_heads(const fv_attn_item_t *item)
{
    return (size_t)item->n_kv_heads * (size_t)item->group;
}

/* From the first byte of a token's Q to its last, what lies between included. */
static size_t q_span(const fv_attn_item_t *item)
{
    const size_t row = (size_t)item->head_dim_qk * fv_dtype_bytes((fv_dtype_t)item->io_dtype) +
                       item->rope_gap_bytes;

    return (n_q_heads(item) - 1U) * ((item->q_head_bytes != 0U) ? item->q_head_bytes : row) + row;
}

/* Of a token's results. */
static size_t out_span(const fv_attn_item_t *item)
{
    const size_t row = (size_t)item->head_dim_v * fv_dtype_bytes((fv_dtype_t)item->io_dtype);

    return (n_q_heads(item) - 1U) * ((item->out_head_bytes != 0U) ? item->out_head_bytes : row) +
           row;
}

/* Of the results, that is. Small ones are counted without a look: staging has room for them. */
static size_t result_bytes(const fv_backend_t *backend, const fv_attn_item_t *item, size_t n_rows)
{
    const bool is_partial = item->n_dst > 0;
    const size_t e = is_partial ? sizeof(float) : fv_dtype_bytes((fv_dtype_t)item->io_dtype);
    const size_t n_bytes = n_rows * (size_t)item->head_dim_v * e;

    if (!is_partial && (n_bytes > LOOK_BYTES) &&
        fv_cuda_is_pinned(backend, item->out,
                          item->out_token_bytes * (size_t)(item->n_tokens - 1) + out_span(item))) {
        return FV_CUDA_STAGE_BYTES(n_rows * sizeof(float));
    }
    return FV_CUDA_STAGE_BYTES(n_bytes) + FV_CUDA_STAGE_BYTES(n_rows * sizeof(float)) +
           (size_t)item->n_dst * 2U * FV_CUDA_STAGE_BYTES(1);
}

size_t fv_cuda_item_bytes(const fv_backend_t *backend,
                          const fv_attn_item_t *item,
                          const fv_tile_list_t *pages)
{
    const size_t n_heads = (size_t)item->n_kv_heads;
    const size_t n_rows = (size_t)item->n_tokens * n_heads * (size_t)item->group;
    const size_t n_pages = (size_t)fv_tiles_count(pages);
    const size_t n_table = (item->table_id != 0U) ? item->n_table_pages : 0U;

    /* rows of a table are staged in multiples of 4 entries */
    return FV_CUDA_STAGE_BYTES(n_heads * ((n_table > n_pages ? n_table : n_pages) + 8U) *
                               sizeof(fv_page_ref_t)) +
           FV_CUDA_STAGE_BYTES(fv_align_up(q_span(item), 16U) * (size_t)item->n_tokens) +
           FV_CUDA_STAGE_BYTES((size_t)item->n_dst * sizeof(fv_lean_dst_t)) +
           result_bytes(backend, item, n_rows);
}

/* ------------------------------------------------------------------ pages */

/* References [begin, end) of a head, all of pages that are read. */
static fv_status_t check_pages(const fv_backend_t *backend,
                               const fv_attn_item_t *item,
                               int32_t head,
                               uint32_t begin,
                               uint32_t end)
{
    const fv_page_ref_t *pages = item->pages + (size_t)head * item->pages_head_stride;
    const size_t page_bytes =
        fv_cuda_page_bytes(item->kv_dtype, item->head_dim_qk, item->head_dim_v, item->v_in_k);
    fv_page_ref_t top = 0;

    for (uint32_t i = begin; i < end; i++) {
        top = (pages[i] > top) ? pages[i] : top;
    }
    if ((begin < end) && !fv_cuda_page_ok(backend, top, page_bytes)) {
        return fv_fail(
            FV_ERR_INVALID_ARG,
            "kernels: pages[head %d]: given %u, expected a page inside the arena of %zu bytes",
            head, top, backend->kv_arena_bytes);
    }
    return FV_OK;
}

/* S2: of local pages from `begin` on, those on the list of a pattern. */
static fv_status_t check_listed_pages(const fv_backend_t *backend,
                                      const fv_attn_item_t *item,
                                      int32_t kv_head,
                                      int32_t pattern,
                                      uint32_t begin)
{
    const fv_page_ref_t *pages = item->pages + (size_t)kv_head * item->pages_head_stride;
    const size_t page_bytes =
        fv_cuda_page_bytes(item->kv_dtype, item->head_dim_qk, item->head_dim_v, item->v_in_k);
    fv_tile_query_t query = fv_cuda_tokens_query(item, 0, item->n_tokens);

    query.head = pattern;
    const fv_tile_list_t list = fv_tiles_make(&query);

    for (int32_t i = fv_tiles_count(&list) - 1; i >= 0; i--) {
        const int32_t page = fv_tile_at(&query, &list, i).local_page;

        if ((uint32_t)page < begin) {
            break;
        }
        if (!fv_cuda_page_ok(backend, pages[page], page_bytes)) {
            return fv_fail(FV_ERR_INVALID_ARG,
                           "kernels: pages[head %d][%d]: given %u, expected a page inside the "
                           "arena of %zu bytes",
                           kv_head, page, pages[page], backend->kv_arena_bytes);
        }
    }
    return FV_OK;
}

static fv_status_t
check_s2_pages(const fv_backend_t *backend, const fv_attn_item_t *item, uint32_t begin)
{
    const int32_t n_patterns = fv_policy_splits_group(&item->policy) ? item->group : 1;

    for (int32_t h = 0; h < item->n_kv_heads; h++) {
        for (int32_t g = 0; g < n_patterns; g++) {
            const int32_t pattern =
                fv_policy_head(&item->policy, item->kv_head_begin + h, item->group, g);

            FV_RETURN_IF_ERR(check_listed_pages(backend, item, h, pattern, begin));
        }
    }
    return FV_OK;
}

/* Of [begin, n) those that are read must be there; the others are never looked at. */
static fv_status_t check_new_pages(const fv_backend_t *backend,
                                   const fv_attn_item_t *item,
                                   const fv_tile_list_t *list,
                                   uint32_t begin)
{
    const uint32_t a_begin = ((uint32_t)list->a_begin > begin) ? (uint32_t)list->a_begin : begin;
    const uint32_t b_begin = ((uint32_t)list->b_begin > begin) ? (uint32_t)list->b_begin : begin;

    if (item->policy.kind == FV_POLICY_S2) {
        return check_s2_pages(backend, item, begin);
    }
    for (int32_t h = 0; h < item->n_kv_heads; h++) {
        FV_RETURN_IF_ERR(check_pages(backend, item, h, a_begin, (uint32_t)list->a_end));
        FV_RETURN_IF_ERR(check_pages(backend, item, h, b_begin, (uint32_t)list->b_end));
    }
    return FV_OK;
}

/* A few new pages: one entry of up to FV_PULL_HEADS heads a unit. */
static fv_status_t
patch_table(fv_backend_t *backend, const fv_attn_item_t *item, const fv_table_view_t *view)
{
    fv_pull_unit_t unit = {.kind = FV_PULL_PATCH,
                           .n_bytes = view->stride * (uint32_t)sizeof(fv_page_ref_t)};

    for (uint32_t p = view->n_known; p < item->n_table_pages; p++) {
        for (int32_t h = 0; h < item->n_kv_heads; h += FV_PULL_HEADS) {
            const int32_t left = item->n_kv_heads - h;

            unit.n_heads = (uint8_t)((left < FV_PULL_HEADS) ? left : FV_PULL_HEADS);
            unit.dst =
                (uint8_t *)(backend->tables_device + view->offset + (size_t)h * view->stride + p);
            for (int32_t i = 0; i < unit.n_heads; i++) {
                unit.pages[i] = item->pages[(size_t)(h + i) * item->pages_head_stride + p];
            }
            FV_RETURN_IF_ERR(fv_cuda_send_unit(backend, &unit));
        }
    }
    return FV_OK;
}

/* Many: rows of entries, whole words of 16 bytes. */
static fv_status_t
fill_table(fv_backend_t *backend, const fv_attn_item_t *item, const fv_table_view_t *view)
{
    const uint32_t first = view->n_known & ~3U;
    const uint32_t n = item->n_table_pages - first;
    const size_t row = fv_align_up(n, 4U);
    fv_page_ref_t *staged = fv_cuda_on_host(
        backend, fv_cuda_stage_still(backend, (size_t)item->n_kv_heads * row * sizeof(*staged)));

    for (int32_t h = 0; h < item->n_kv_heads; h++) {
        memcpy(staged, item->pages + (size_t)h * item->pages_head_stride + first,
               n * sizeof(*staged));
        memset(staged + n, 0xff, (row - n) * sizeof(*staged));
        FV_RETURN_IF_ERR(fv_cuda_send_bytes(
            backend, backend->tables_device + view->offset + (size_t)h * view->stride + first,
            staged, row * sizeof(*staged)));
        staged += row;
    }
    return FV_OK;
}

/* True if the item's table stands on the device; what it lacks there is on its way. */
static fv_status_t use_table(fv_backend_t *backend,
                             const fv_attn_item_t *item,
                             const fv_tile_list_t *list,
                             fv_lean_run_t *run,
                             bool *out_stands)
{
    fv_table_view_t view;

    *out_stands = false;
    if ((item->table_id == 0U) || (list->a_end > (int64_t)item->n_table_pages) ||
        (list->b_end > (int64_t)item->n_table_pages) ||
        !fv_table_cache_use(backend->tables, item->table_id, item->table_version,
                            (uint32_t)item->n_kv_heads, item->n_table_pages, &view)) {
        return FV_OK;
    }
    *out_stands = true;
    run->pages = backend->tables_device + view.offset;
    run->pages_stride = (int32_t)view.stride;
    run->gap_begin = INT32_MAX;
    run->gap_pages = 0;
    if (view.n_known == item->n_table_pages) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(check_new_pages(backend, item, list, view.n_known));
    return (item->n_table_pages - view.n_known <= PATCH_PAGES) ? patch_table(backend, item, &view)
                                                               : fill_table(backend, item, &view);
}

/* Copies the item's page references, closed up, and checks each. */
static fv_status_t copy_pages(fv_backend_t *backend,
                              const fv_attn_item_t *item,
                              const fv_tile_list_t *list,
                              fv_lean_run_t *run)
{
    const size_t n_a = (size_t)(list->a_end - list->a_begin);
    const size_t n = (size_t)fv_tiles_count(list);
    const size_t offset =
        fv_cuda_stage(backend, n * (size_t)item->n_kv_heads * sizeof(fv_page_ref_t));

    FV_RETURN_IF_ERR(check_new_pages(backend, item, list, 0));
    run->pages = fv_cuda_on_device(backend, offset);
    run->pages_stride = (int32_t)n;
    run->gap_begin = list->b_begin;
    run->gap_pages = list->b_begin - (int32_t)n_a;
    for (int32_t h = 0; h < item->n_kv_heads; h++) {
        const fv_page_ref_t *src = item->pages + (size_t)h * item->pages_head_stride;
        fv_page_ref_t *dst = (fv_page_ref_t *)fv_cuda_on_host(backend, offset) + (size_t)h * n;

        memcpy(dst, src + list->a_begin, n_a * sizeof(*dst));
        memcpy(dst + n_a, src + list->b_begin, (n - n_a) * sizeof(*dst));
    }
    return FV_OK;
}

static fv_status_t stage_pages(fv_backend_t *backend,
                               const fv_attn_item_t *item,
                               const fv_tile_list_t *list,
                               fv_lean_run_t *run)
{
    bool stands = false;

    if (fv_tiles_count(list) == 0) {
        return FV_OK;
    }
    if (item->pages == NULL) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "kernels: pages: given none, expected %d of each KV head",
                       fv_tiles_count(list));
    }
    FV_RETURN_IF_ERR(use_table(backend, item, list, run, &stands));
    return stands ? FV_OK : copy_pages(backend, item, list, run);
}

/* ------------------------------------------------------------------ query */

static fv_status_t
stage_query(fv_backend_t *backend, const fv_attn_item_t *item, fv_lean_run_t *run)
{
    const size_t row = q_span(item);
    const size_t n_bytes = row * (size_t)item->n_tokens;
    const uint8_t *q = item->q;
    size_t offset = 0;

    run->q_token_bytes = row;
    run->q_head_bytes =
        (uint32_t)((item->q_head_bytes != 0U)
                       ? item->q_head_bytes
                       : (size_t)item->head_dim_qk * fv_dtype_bytes((fv_dtype_t)item->io_dtype));
    run->rope_gap_bytes = (uint32_t)item->rope_gap_bytes;
    run->latent_mu = (item->latent_mu == 0.0F) ? 1.0F : item->latent_mu;
    if (((item->n_tokens == 1) || (item->q_token_bytes == row)) &&
        fv_cuda_is_pinned(backend, q, n_bytes)) {
        FV_RETURN_IF_ERR(fv_cuda_stage_space(backend, n_bytes, &offset));
        run->q = fv_cuda_on_device(backend, offset);
        return fv_cuda_send_bytes(backend, fv_cuda_on_device(backend, offset),
                                  fv_cuda_ahead_source(backend, q, n_bytes), n_bytes);
    }
    offset = fv_cuda_stage(backend, n_bytes);
    run->q = fv_cuda_on_device(backend, offset);
    for (int32_t t = 0; t < item->n_tokens; t++) {
        memcpy((uint8_t *)fv_cuda_on_host(backend, offset) + (size_t)t * row,
               q + (size_t)t * item->q_token_bytes, row);
    }
    return FV_OK;
}

/* ------------------------------------------------------------------ results */

/* Rows of several tokens, each token's far apart: where the device reaches them, else staged side by side. */
static fv_status_t stage_head_rows(fv_backend_t *backend,
                                   const fv_attn_item_t *item,
                                   size_t row_bytes,
                                   fv_lean_run_t *run)
{
    const size_t n_heads = n_q_heads(item);
    const size_t n_tokens = (size_t)item->n_tokens;
    uint8_t *out = item->out;
    uint8_t *staged = NULL;

    if (fv_cuda_is_pinned(backend, out, (n_tokens - 1U) * item->out_token_bytes + out_span(item))) {
        run->out = out;
        run->out_token_bytes = item->out_token_bytes;
        run->out_head_bytes = (uint32_t)item->out_head_bytes;
        return FV_OK;
    }
    staged = backend->staging_host + fv_cuda_stage_still(backend, n_tokens * n_heads * row_bytes);
    run->out = staged;
    run->out_token_bytes = n_heads * row_bytes;
    for (size_t t = 0; t < n_tokens; t++) {
        const fv_cuda_scatter_t scatter = {
            .dst = out + t * item->out_token_bytes,
            .src = staged + t * n_heads * row_bytes,
            .row_bytes = row_bytes,
            .n_rows = n_heads,
            .dst_stride = item->out_head_bytes,
        };

        FV_RETURN_IF_ERR(fv_cuda_scatter(backend, scatter));
    }
    return FV_OK;
}

/* A result of n_rows x row_bytes at dst: there if the device reaches it, else staged for finish(). */
static fv_status_t stage_result(fv_backend_t *backend,
                                void *dst,
                                size_t row_bytes,
                                size_t n_rows,
                                size_t *stride,
                                void **out)
{
    const size_t n_bytes = (n_rows == 0) ? 0 : ((n_rows - 1U) * *stride + row_bytes);
    fv_cuda_scatter_t scatter = {
        .dst = dst, .row_bytes = row_bytes, .n_rows = n_rows, .dst_stride = *stride};
    uint8_t *staged = NULL;

    if (fv_cuda_is_pinned(backend, dst, n_bytes)) {
        *out = dst;
        return FV_OK;
    }
    staged = backend->staging_host + fv_cuda_stage_still(backend, row_bytes * n_rows);
    scatter.src = staged;
    *out = staged;
    *stride = row_bytes;
    return fv_cuda_scatter(backend, scatter);
}

static fv_status_t
stage_partials(fv_backend_t *backend, const fv_attn_item_t *item, fv_lean_run_t *run)
{
    const size_t offset = fv_cuda_stage(backend, (size_t)item->n_dst * sizeof(fv_lean_dst_t));
    const uint64_t n_rows = (uint64_t)item->n_tokens * (uint64_t)(item->n_kv_heads * item->group);
    fv_lean_dst_t *dst = fv_cuda_on_host(backend, offset);

    for (int32_t i = 0; i < item->n_dst; i++) {
        const uint64_t end = (i + 1 < item->n_dst) ? item->dst[i + 1].row_begin : n_rows;
        const size_t n =
            (end > item->dst[i].row_begin) ? (size_t)(end - item->dst[i].row_begin) : 0U;
        size_t o_stride = n * (size_t)item->head_dim_v * sizeof(float);
        size_t lse_stride = n * sizeof(float);
        void *o = NULL;
        void *lse = NULL;

        FV_RETURN_IF_ERR(stage_result(backend, item->dst[i].o, o_stride, 1, &o_stride, &o));
        FV_RETURN_IF_ERR(
            stage_result(backend, item->dst[i].lse_log2, lse_stride, 1, &lse_stride, &lse));
        dst[i] = (fv_lean_dst_t){.row_begin = item->dst[i].row_begin, .o = o, .lse_log2 = lse};
    }
    run->dst = fv_cuda_on_device(backend, offset);
    run->n_dst = item->n_dst;
    return FV_OK;
}

static fv_status_t
stage_outputs(fv_backend_t *backend, const fv_attn_item_t *item, fv_lean_run_t *run)
{
    const size_t n_heads = n_q_heads(item);
    const size_t row_bytes = (size_t)item->head_dim_v * fv_dtype_bytes((fv_dtype_t)item->io_dtype);
    size_t out_stride = item->out_token_bytes;
    size_t lse_stride = item->lse_token_stride * sizeof(float);
    void *out = NULL;

    if (item->n_dst > 0) {
        return stage_partials(backend, item, run);
    }
    run->out_head_bytes = (uint32_t)row_bytes;
    if ((item->out_head_bytes != 0U) && (item->out_head_bytes != row_bytes)) {
        FV_RETURN_IF_ERR(stage_head_rows(backend, item, row_bytes, run));
    } else {
        FV_RETURN_IF_ERR(stage_result(backend, item->out, n_heads * row_bytes,
                                      (size_t)item->n_tokens, &out_stride, &out));
        run->out = out;
        run->out_token_bytes = out_stride;
    }
    if (item->lse != NULL) {
        FV_RETURN_IF_ERR(stage_result(backend, item->lse, n_heads * sizeof(float),
                                      (size_t)item->n_tokens, &lse_stride, &out));
        run->lse = out;
        run->lse_token_stride = lse_stride / sizeof(float);
    }
    return FV_OK;
}

fv_status_t fv_cuda_stage_item(fv_backend_t *backend,
                               const fv_attn_item_t *item,
                               const fv_tile_list_t *pages,
                               fv_lean_run_t *run)
{
    FV_RETURN_IF_ERR(stage_pages(backend, item, pages, run));
    FV_RETURN_IF_ERR(stage_query(backend, item, run));
    return stage_outputs(backend, item, run);
}
