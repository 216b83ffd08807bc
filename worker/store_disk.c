/*
 * store_disk.c - what a step writes to pages, into the log on a disk.
 *
 * Decode path: station 6 of 10, when a step is settled.
 */
#include "worker/store_disk.h"

#include <string.h>

#define LARGE_BYTES ((uint64_t)256 << 20) /* what a log may take beyond what it describes */
#define FLUSH_BYTES ((size_t)4 << 20)     /* of pages: written when so many have gathered */

static size_t padded(size_t n_bytes)
{
    return (n_bytes + 7U) & ~(size_t)7U;
}

/* ------------------------------------------------------------------ records */

static size_t row_bytes(const fv_append_item_t *a)
{
    return (size_t)a->n_kv_heads * (size_t)a->head_dim_qk *
           fv_dtype_bytes((fv_dtype_t)a->src_dtype);
}

static size_t v_row_bytes(const fv_append_item_t *a)
{
    return a->v_in_k ? 0U
                     : ((size_t)a->n_kv_heads * (size_t)a->head_dim_v *
                        fv_dtype_bytes((fv_dtype_t)a->src_dtype));
}

/* Pages of one head that tokens from local_begin on lie in. */
static uint32_t pages_of(uint64_t local_begin, uint64_t n_tokens)
{
    return (uint32_t)((local_begin + n_tokens - 1U) / FV_PAGE_TOKENS -
                      local_begin / FV_PAGE_TOKENS + 1U);
}

static size_t rows_bytes(const fv_append_item_t *a)
{
    size_t n_refs = (size_t)a->n_kv_heads * pages_of(a->local_begin, a->n_tokens);

    return sizeof(fv_store_rows_t) + padded(n_refs * sizeof(fv_page_ref_t)) +
           padded((size_t)a->n_tokens * row_bytes(a)) + (size_t)a->n_tokens * v_row_bytes(a);
}

/* A token's K row; a slice of a latent and its RoPE key lie apart where it comes from. */
static void copy_k_row(const fv_append_item_t *a, const uint8_t *from, uint8_t *to)
{
    size_t e = fv_dtype_bytes((fv_dtype_t)a->src_dtype);
    size_t k_bytes = (size_t)a->head_dim_qk * e;
    size_t v_bytes = (size_t)a->head_dim_v * e;

    if (a->rope_gap_bytes == 0U) {
        memcpy(to, from, (size_t)a->n_kv_heads * k_bytes);
        return;
    }
    for (int32_t h = 0; h < a->n_kv_heads; h++) {
        const uint8_t *head = from + (size_t)h * (k_bytes + a->rope_gap_bytes);
        memcpy(to + (size_t)h * k_bytes, head, v_bytes);
        memcpy(to + (size_t)h * k_bytes + v_bytes, head + v_bytes + a->rope_gap_bytes,
               k_bytes - v_bytes);
    }
}

static void note_rows(fv_disklog_t *log, uint32_t key, const fv_append_item_t *a)
{
    const fv_store_rows_t head = {.n_kv_heads = a->n_kv_heads,
                                  .head_dim_qk = a->head_dim_qk,
                                  .head_dim_v = a->head_dim_v,
                                  .src_dtype = a->src_dtype,
                                  .kv_dtype = a->kv_dtype,
                                  .v_in_k = a->v_in_k ? 1U : 0U,
                                  .norm_alpha = a->norm_alpha,
                                  .norm_eps = a->norm_eps,
                                  .first_slot = (uint32_t)(a->local_begin % FV_PAGE_TOKENS),
                                  .n_tokens = (uint32_t)a->n_tokens,
                                  .n_pages = pages_of(a->local_begin, a->n_tokens)};
    const fv_journal_record_t record = {
        .type = FV_STORE_ROWS, .key = key, .n_bytes = (uint32_t)rows_bytes(a)};
    uint8_t *to = fv_disklog_begin(log, &record);
    size_t n_refs = (size_t)head.n_kv_heads * head.n_pages;

    memset(to, 0, sizeof(head) + padded(n_refs * sizeof(fv_page_ref_t)));
    memcpy(to, &head, sizeof(head));
    to += sizeof(head);
    for (size_t h = 0; h < (size_t)head.n_kv_heads; h++) {
        memcpy(to + h * head.n_pages * sizeof(fv_page_ref_t),
               a->pages + h * a->pages_head_stride + a->local_begin / FV_PAGE_TOKENS,
               head.n_pages * sizeof(fv_page_ref_t));
    }
    to += padded(n_refs * sizeof(fv_page_ref_t));
    for (uint64_t t = 0; t < a->n_tokens; t++) {
        copy_k_row(a, (const uint8_t *)a->k + t * a->k_token_bytes, to + t * row_bytes(a));
    }
    size_t k_bytes = (size_t)a->n_tokens * row_bytes(a);
    memset(to + k_bytes, 0, padded(k_bytes) - k_bytes);
    to += padded(k_bytes);
    for (uint64_t t = 0; (t < a->n_tokens) && !a->v_in_k; t++) {
        memcpy(to + t * v_row_bytes(a), (const uint8_t *)a->v + t * a->v_token_bytes,
               v_row_bytes(a));
    }
    fv_disklog_end(log);
}

static size_t page_record_bytes(size_t page_bytes)
{
    return fv_journal_size(sizeof(fv_store_page_t) + page_bytes);
}

static void note_page(const fv_store_t *store, uint32_t key, fv_page_ref_t page, size_t page_bytes)
{
    const fv_store_page_t head = {.page = page, .n_bytes = (uint32_t)page_bytes};
    const fv_journal_record_t record = {
        .type = FV_STORE_PAGE, .key = key, .n_bytes = (uint32_t)(sizeof(head) + page_bytes)};
    uint8_t *to = fv_disklog_begin(store->disk, &record);

    memcpy(to, &head, sizeof(head));
    memcpy(to + sizeof(head), fv_segment_base(store->pages) + (size_t)page * FV_PAGE_UNIT,
           page_bytes);
    fv_disklog_end(store->disk);
}

/* ------------------------------------------------------------------ steps */

static bool has_disk(const fv_worker_t *worker)
{
    return (worker->store != NULL) && (worker->store->disk != NULL) &&
           (worker->store->pages != NULL);
}

size_t fv_store_disk_need(const fv_worker_t *worker, const fv_step_item_t *item, size_t n_new_pages)
{
    const fv_session_t *session = item->session;
    const fv_model_spec_t *spec = &session->model->spec;
    size_t n_heads = (size_t)session->n_heads;
    /* contiguous tokens: each run begins a page, but the first */
    size_t n_runs = n_new_pages / ((n_heads > 0U) ? n_heads : 1U) + 2U;
    size_t token_bytes =
        n_heads * ((size_t)item->share.part.head_dim_qk + (size_t)item->share.part.head_dim_v) *
        fv_dtype_bytes((fv_dtype_t)item->ctl->dtype);

    if (!has_disk(worker)) {
        return 0;
    }
    return (size_t)item->share.n_kv_tokens * token_bytes +
           n_runs * (fv_journal_size(sizeof(fv_store_rows_t)) + 32U) +
           (n_new_pages + n_runs * 2U * n_heads) * sizeof(fv_page_ref_t) +
           n_heads * page_record_bytes(fv_model_page_bytes(spec));
}

void fv_store_disk_note_item(fv_worker_t *worker, const fv_step_item_t *item)
{
    const fv_step_work_t *w = &worker->work;
    const fv_append_item_t *appends = w->appends.data;
    const fv_page_copy_t *copies = w->copies.data;

    if (!has_disk(worker)) {
        return;
    }
    /* the table points to the copies, whatever became of the append */
    for (size_t i = 0; i < item->n_copies; i++) {
        note_page(worker->store, item->ctl->session_slot, copies[item->first_copy + i].dst,
                  fv_model_page_bytes(&item->session->model->spec));
    }
    for (size_t i = 0; !item->failed && (i < item->n_appends); i++) {
        if (appends[item->first_append + i].n_tokens > 0U) {
            note_rows(worker->store->disk, item->ctl->session_slot,
                      &appends[item->first_append + i]);
        }
    }
}

/* ------------------------------------------------------------------ all of it */

bool fv_store_disk_is_large(const fv_worker_t *worker)
{
    fv_kv_pool_stats_t stats;

    if ((worker->store == NULL) || (worker->store->disk == NULL)) {
        return false;
    }
    fv_kv_pool_stats(worker->pool, &stats);
    uint64_t n_held = stats.bytes_total - stats.bytes_free;
    return fv_disklog_bytes(worker->store->disk) > 2U * n_held + LARGE_BYTES;
}

static fv_status_t
add_page(fv_worker_t *worker, uint32_t slot, fv_page_ref_t page, uint8_t *seen, size_t page_bytes)
{
    fv_store_t *store = worker->store;
    size_t unit = (size_t)page * FV_PAGE_UNIT / FV_KV_PAGE_BYTES_MIN;

    if ((page == FV_PAGE_NONE) || ((seen[unit / 8U] & (1U << (unit % 8U))) != 0U)) {
        return FV_OK;
    }
    seen[unit / 8U] = (uint8_t)(seen[unit / 8U] | (1U << (unit % 8U)));
    FV_RETURN_IF_ERR(fv_disklog_reserve(store->disk, page_record_bytes(page_bytes),
                                        page_record_bytes(page_bytes)));
    note_page(store, slot, page, page_bytes);
    return (fv_disklog_added(store->disk) < FLUSH_BYTES) ? FV_OK
                                                         : fv_disklog_commit(store->disk, NULL, 0);
}

static fv_status_t add_session(fv_worker_t *worker, uint32_t slot, uint8_t *seen)
{
    const fv_session_t *session = fv_worker_session(worker, slot);
    size_t page_bytes = fv_model_page_bytes(&session->model->spec);

    for (uint32_t i = 0; (session->layers != NULL) && (i < (uint32_t)session->model->spec.n_layers);
         i++) {
        const fv_layer_kv_t *layer = &session->layers[i];
        for (size_t h = 0; h < (size_t)session->n_heads; h++) {
            for (uint32_t p = 0; p < layer->n_pages; p++) {
                FV_RETURN_IF_ERR(
                    add_page(worker, slot, layer->pages[h * layer->stride + p], seen, page_bytes));
            }
        }
    }
    return FV_OK;
}

fv_status_t fv_store_disk_add_pages(fv_worker_t *worker)
{
    fv_array_t seen = {0};
    size_t n_units = worker->config.backend_config.kv_arena_bytes / FV_KV_PAGE_BYTES_MIN + 1U;
    fv_status_t status = FV_OK;

    if (!has_disk(worker) || !fv_disklog_is_fresh(worker->store->disk)) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_array_reserve(&seen, n_units / 8U + 1U, 1));
    memset(seen.data, 0, n_units / 8U + 1U);
    for (uint32_t i = 0; (status == FV_OK) && (i < worker->n_session_slots); i++) {
        if (fv_worker_session(worker, i) != NULL) {
            status = add_session(worker, i, seen.data);
        }
    }
    fv_array_free(&seen);
    return (status == FV_OK) ? fv_disklog_commit(worker->store->disk, NULL, 0) : status;
}
