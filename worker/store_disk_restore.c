/*
 * store_disk_restore.c - a slot's files, from its log on a disk: after the host was down.
 *
 * Nothing of the log is believed: a record that can not be so is a damaged one. Sessions that lack something are lost: a damaged
 * record of theirs is put into the journal, which says so to whoever reads it (store_load.c).
 */
#include "common/log.h"
#include "worker/mirror.h"
#include "worker/store_disk.h"

#include <stdlib.h>
#include <string.h>

typedef struct restore {
    fv_store_t *store;
    fv_backend_t *pages; /* a CPU backend over the segment; NULL: there are none */
    size_t arena_bytes;
    fv_array_t lost; /* uint8_t of each session slot: one of LOST... */
    uint32_t n_slots;
    bool is_anybody;
} restore_t;

/* ------------------------------------------------------------------ who is lost */

/* What is known of a slot; LOST_UNMET is 0: nothing speaks of it. */
enum {
    LOST_UNMET,
    LOST_NOT,
    LOST,
};

static fv_status_t set_lost(restore_t *r, uint32_t key, bool is_lost)
{
    if (key >= FV_SESSION_SLOTS_MAX) {
        return FV_OK;
    }
    if (key >= r->n_slots) {
        FV_RETURN_IF_ERR(fv_array_reserve(&r->lost, (size_t)key + 1U, 1));
        memset((uint8_t *)r->lost.data + r->n_slots, 0, (size_t)key + 1U - r->n_slots);
        r->n_slots = key + 1U;
    }
    ((uint8_t *)r->lost.data)[key] = is_lost ? LOST : LOST_NOT;
    return FV_OK;
}

static bool get_lost(const restore_t *r, uint32_t key)
{
    return (key < r->n_slots) && (((const uint8_t *)r->lost.data)[key] == LOST);
}

static bool was_met(const restore_t *r, uint32_t key)
{
    return (key < r->n_slots) && (((const uint8_t *)r->lost.data)[key] != LOST_UNMET);
}

static fv_status_t on_suspect(void *arg, uint32_t key)
{
    restore_t *r = arg;

    r->is_anybody = r->is_anybody || (key == FV_DISKLOG_ANYBODY);
    return (key == FV_DISKLOG_ANYBODY) ? FV_OK : set_lost(r, key, true);
}

/* A fork has what its parent has; of which, is not known when its record is damaged. */
static fv_status_t on_first(void *arg, const fv_journal_record_t *record)
{
    restore_t *r = arg;
    fv_store_fork_t fork;
    bool is_lost = (record->type == FV_STORE_FORK) && (record->body == NULL);

    if ((record->type == FV_STORE_FORK) && (record->body != NULL) &&
        (record->n_bytes == sizeof(fork))) {
        memcpy(&fork, record->body, sizeof(fork));
        is_lost = get_lost(r, fork.parent_slot);
    }
    return set_lost(r, record->key, is_lost);
}

/* ------------------------------------------------------------------ pages */

static void cover(const restore_t *r, fv_page_ref_t page)
{
    size_t unit = (size_t)page * FV_PAGE_UNIT / FV_KV_PAGE_BYTES_MIN;

    r->store->covered[unit / 8U] = (uint8_t)(r->store->covered[unit / 8U] | (1U << (unit % 8U)));
}

/* The page lies in the arena, and its memory is there. */
static bool make_room(const restore_t *r, fv_page_ref_t page, fv_status_t *status)
{
    size_t at = (size_t)page * FV_PAGE_UNIT;

    if ((page == FV_PAGE_NONE) || (at >= r->arena_bytes)) {
        return false;
    }
    if (*status == FV_OK) {
        *status = fv_segment_ensure(r->store->pages, at + FV_KV_PAGE_BYTES_MAX);
    }
    return true;
}

static bool put_page(const restore_t *r, const fv_journal_record_t *record, fv_status_t *status)
{
    fv_store_page_t head;

    if (record->n_bytes < sizeof(head)) {
        return false;
    }
    memcpy(&head, record->body, sizeof(head));
    if ((head.n_bytes != record->n_bytes - sizeof(head)) || (head.n_bytes > FV_KV_PAGE_BYTES_MAX) ||
        !make_room(r, head.page, status) ||
        (head.n_bytes > r->arena_bytes - (size_t)head.page * FV_PAGE_UNIT)) {
        return false;
    }
    if (*status == FV_OK) {
        memcpy(fv_segment_base(r->store->pages) + (size_t)head.page * FV_PAGE_UNIT,
               (const uint8_t *)record->body + sizeof(head), head.n_bytes);
        cover(r, head.page);
    }
    return true;
}

/* Sizes of a ROWS body; false: they do not fit. */
static bool read_rows(const fv_journal_record_t *record, fv_store_rows_t *h, fv_append_item_t *a)
{
    if (record->n_bytes < sizeof(*h)) {
        return false;
    }
    memcpy(h, record->body, sizeof(*h));
    if ((h->n_kv_heads < 1) || (h->n_kv_heads > FV_HEADS_MAX) || (h->head_dim_qk < 1) ||
        (h->head_dim_qk > FV_DIM_QK_MAX) || (h->head_dim_v < 1) ||
        (h->head_dim_v > FV_DIM_QK_MAX) || !fv_dtype_is_valid((uint32_t)h->src_dtype) ||
        (h->first_slot >= FV_PAGE_TOKENS) || (h->n_tokens < 1U) ||
        (h->n_pages != ((uint64_t)h->first_slot + h->n_tokens - 1U) / FV_PAGE_TOKENS + 1U)) {
        return false;
    }
    size_t e = fv_dtype_bytes((fv_dtype_t)h->src_dtype);
    size_t k_row = (size_t)h->n_kv_heads * (size_t)h->head_dim_qk * e;
    size_t v_row = (h->v_in_k != 0U) ? 0U : ((size_t)h->n_kv_heads * (size_t)h->head_dim_v * e);
    size_t refs = ((size_t)h->n_kv_heads * h->n_pages * sizeof(fv_page_ref_t) + 7U) & ~(size_t)7U;
    size_t k = (h->n_tokens * k_row + 7U) & ~(size_t)7U;
    const uint8_t *at = (const uint8_t *)record->body + sizeof(*h);
    *a = (fv_append_item_t){.n_kv_heads = h->n_kv_heads,
                            .head_dim_qk = h->head_dim_qk,
                            .head_dim_v = h->head_dim_v,
                            .src_dtype = h->src_dtype,
                            .kv_dtype = h->kv_dtype,
                            .v_in_k = h->v_in_k != 0U,
                            .norm_alpha = h->norm_alpha,
                            .norm_eps = h->norm_eps,
                            .k = at + refs,
                            .v = (v_row == 0U) ? NULL : (at + refs + k),
                            .k_token_bytes = k_row,
                            .v_token_bytes = v_row,
                            .local_begin = h->first_slot,
                            .n_tokens = h->n_tokens,
                            .pages = (const fv_page_ref_t *)(const void *)at,
                            .pages_head_stride = h->n_pages};
    return record->n_bytes == sizeof(*h) + refs + k + h->n_tokens * v_row;
}

static bool put_rows(const restore_t *r, const fv_journal_record_t *record, fv_status_t *status)
{
    fv_store_rows_t head;
    fv_append_item_t append;

    if (!read_rows(record, &head, &append)) {
        return false;
    }
    for (size_t i = 0; i < (size_t)head.n_kv_heads * head.n_pages; i++) {
        if (!make_room(r, append.pages[i], status)) {
            return false;
        }
    }
    if ((*status != FV_OK) || (fv_backend_cpu.append(r->pages, &append, 1) != FV_OK)) {
        return *status != FV_OK;
    }
    for (size_t i = 0; i < (size_t)head.n_kv_heads * head.n_pages; i++) {
        if ((head.first_slot == 0U) || (i % head.n_pages != 0U)) { /* from its first token on */
            cover(r, append.pages[i]);
        }
    }
    return true;
}

static fv_status_t on_page(void *arg, const fv_journal_record_t *record)
{
    restore_t *r = arg;
    fv_status_t status = FV_OK;
    bool is_good = false;

    if ((record->body != NULL) && (r->pages != NULL) && (record->type == FV_STORE_ROWS)) {
        is_good = put_rows(r, record, &status);
    } else if ((record->body != NULL) && (r->pages != NULL) && (record->type == FV_STORE_PAGE)) {
        is_good = put_page(r, record, &status);
    }
    FV_RETURN_IF_ERR(status);
    return is_good ? FV_OK : set_lost(r, record->key, true);
}

/* ------------------------------------------------------------------ tables */

/* Who has a table is met, also who was there only in a snapshot. */
static fv_status_t meet(void *arg, const fv_journal_record_t *record)
{
    restore_t *r = arg;

    return set_lost(r, record->key, get_lost(r, record->key));
}

static fv_status_t on_table(void *arg, const void *records, size_t n_bytes)
{
    restore_t *r = arg;
    fv_journal_report_t report;

    FV_RETURN_IF_ERR(fv_journal_scan(records, n_bytes, meet, r, &report));
    FV_RETURN_IF_ERR(fv_journal_reserve(r->store->journal, n_bytes));
    fv_journal_add_raw(r->store->journal, records, n_bytes);
    return FV_OK;
}

static fv_status_t mark_lost(restore_t *r)
{
    for (uint32_t slot = 0; slot < r->n_slots; slot++) {
        if (get_lost(r, slot) || (r->is_anybody && was_met(r, slot))) {
            FV_RETURN_IF_ERR(fv_journal_reserve(r->store->journal, fv_journal_size(0)));
            fv_journal_add_damaged(r->store->journal, slot);
        }
    }
    return FV_OK;
}

static fv_status_t replay(restore_t *r, fv_journal_report_t *report)
{
    const fv_disklog_reader_t reader = {
        .page = on_page, .table = on_table, .first = on_first, .suspect = on_suspect, .arg = r};

    FV_RETURN_IF_ERR(fv_journal_rewrite_begin(r->store->journal));
    fv_status_t status = fv_disklog_read(r->store->disk, &reader, report);
    if (status == FV_OK) {
        status = mark_lost(r);
    }
    if (status == FV_OK) {
        status = fv_journal_rewrite_end(r->store->journal);
    }
    if (status != FV_OK) {
        fv_journal_rewrite_abort(r->store->journal);
    }
    return status;
}

fv_status_t fv_store_disk_restore(fv_store_t *store, size_t arena_bytes)
{
    restore_t r = {.store = store, .arena_bytes = arena_bytes};
    fv_journal_report_t report = {0};

    store->covered = calloc(arena_bytes / FV_KV_PAGE_BYTES_MIN / 8U + 2U, 1);
    if (store->covered == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "store");
    }
    if (store->pages != NULL) {
        FV_RETURN_IF_ERR(fv_mirror_create(fv_segment_base(store->pages), arena_bytes, &r.pages));
    }
    fv_status_t status = replay(&r, &report);
    fv_mirror_destroy(r.pages);
    fv_array_free(&r.lost);
    if (status == FV_OK) {
        fv_info("durability: slot %u is read from its disk: %llu records, %llu MiB",
                store->place.slot, (unsigned long long)report.n_records,
                (unsigned long long)(report.n_bytes >> 20U));
    }
    if ((report.n_damaged > 0U) || (report.n_holes > 0U)) {
        fv_warn("durability: slot %u, disk: %llu damaged records, %llu holes", store->place.slot,
                (unsigned long long)report.n_damaged, (unsigned long long)report.n_holes);
    }
    return status;
}

bool fv_store_disk_has(const fv_store_t *store, fv_page_ref_t page)
{
    size_t unit = (size_t)page * FV_PAGE_UNIT / FV_KV_PAGE_BYTES_MIN;

    return (store->covered == NULL) || ((store->covered[unit / 8U] & (1U << (unit % 8U))) != 0U);
}
