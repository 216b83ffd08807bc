/*
 * mirror.c - keeps a device's KV in the host's memory, too, and brings it back.
 */
#include "worker/mirror.h"

#include "common/model.h"

#include <stdlib.h>

#define BATCH_PAGES 64U /* sent at once */

fv_status_t fv_mirror_create(void *arena, size_t n_bytes, fv_backend_t **out)
{
    const fv_backend_config_t config = {
        .n_threads = 0, .kv_arena_bytes = n_bytes, .kv_arena = arena, .isa = "auto"};

    return fv_backend_cpu.create(&config, out);
}

void fv_mirror_destroy(fv_backend_t *mirror)
{
    fv_backend_cpu.destroy(mirror);
}

fv_status_t fv_mirror_write(fv_backend_t *mirror,
                            const fv_page_copy_t *copies,
                            size_t n_copies,
                            const fv_append_item_t *appends,
                            size_t n_appends)
{
    FV_RETURN_IF_ERR(fv_backend_cpu.copy_pages(mirror, copies, n_copies));
    return fv_backend_cpu.append(mirror, appends, n_appends);
}

/* Rows of one page: K at `rows`, V behind; a page of FP8 latents as it is. */
static fv_append_item_t append_of(const fv_page_copy_t *page, const uint8_t *rows)
{
    size_t e = fv_dtype_bytes((fv_dtype_t)page->kv_dtype);
    size_t k_bytes = (size_t)page->head_dim_qk * e;

    return (fv_append_item_t){.n_kv_heads = 1,
                              .head_dim_qk = page->head_dim_qk,
                              .head_dim_v = page->head_dim_v,
                              .src_dtype = page->kv_dtype,
                              .kv_dtype = page->kv_dtype,
                              .v_in_k = page->v_in_k,
                              .k = rows,
                              .v = page->v_in_k ? NULL : (rows + FV_PAGE_TOKENS * k_bytes),
                              .k_token_bytes = k_bytes,
                              .v_token_bytes = (size_t)page->head_dim_v * e,
                              .n_tokens = FV_PAGE_TOKENS,
                              .pages = &page->src,
                              .pages_head_stride = 1};
}

static fv_status_t send_batch(const fv_backend_t *mirror,
                              const fv_backend_ops_t *ops,
                              fv_backend_t *device,
                              const fv_page_copy_t *pages,
                              size_t n_pages,
                              uint8_t *rows,
                              size_t page_bytes)
{
    fv_append_item_t appends[BATCH_PAGES];

    for (size_t i = 0; i < n_pages; i++) {
        appends[i] = append_of(&pages[i], rows + i * page_bytes);
        size_t k_bytes = FV_PAGE_TOKENS * appends[i].k_token_bytes;
        FV_RETURN_IF_ERR(fv_cpu_read_page(mirror, &pages[i], rows + i * page_bytes,
                                          rows + i * page_bytes + k_bytes));
    }
    FV_RETURN_IF_ERR(ops->append(device, appends, n_pages));
    return ops->finish(device, NULL, NULL); /* the rows are borrowed until then */
}

fv_status_t fv_mirror_restore(const fv_backend_t *mirror,
                              const fv_backend_ops_t *ops,
                              fv_backend_t *device,
                              const fv_page_copy_t *pages,
                              size_t n_pages)
{
    size_t page_bytes = (size_t)(FV_DIM_QK_MAX + FV_DIM_QK_MAX) * FV_PAGE_TOKENS * sizeof(float);
    void *rows = NULL;

    if (n_pages == 0U) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(ops->host_alloc(device, BATCH_PAGES * page_bytes, &rows));
    fv_status_t status = FV_OK;
    for (size_t at = 0; (status == FV_OK) && (at < n_pages); at += BATCH_PAGES) {
        size_t n = (n_pages - at < BATCH_PAGES) ? (n_pages - at) : BATCH_PAGES;
        status = send_batch(mirror, ops, device, pages + at, n, rows, page_bytes);
    }
    ops->host_free(device, rows);
    return status;
}
