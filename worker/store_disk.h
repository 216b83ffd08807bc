/*
 * store_disk.h - level `host`: the slot's tables and pages in a log on a disk (common/disklog.h).
 *
 * Decode path: station 6 of 10, with worker/store.c.
 *
 * The journal's records go there with the journal's own commits (fv_journal_set_disk()). Of pages a step adds to the same batch,
 * so that one write has all of it:
 *
 *   ROWS    key: session slot   new tokens' K and V, as they came, and where they belong; replayed by the CPU backend
 *   PAGE    key: session slot   a whole page: an own copy of a shared one; any page that is held, when the log is begun anew
 *
 * Pages are used again only after what freed them is on the disk, and what is committed in one never changes: so replaying all
 * of the log in its order gives each page its bytes.
 *
 * Thread: the worker's. Functions take a worker without a disk: they do nothing then.
 */
#ifndef FV_WORKER_STORE_DISK_H
#define FV_WORKER_STORE_DISK_H

#include "worker/internal.h"
#include "worker/store.h"

#include <stdbool.h>
#include <stddef.h>

enum {
    FV_STORE_ROWS = FV_DISKLOG_PAGES,
    FV_STORE_PAGE,
};

/* Bodies. ROWS: page references [n_kv_heads, n_pages], to a multiple of 8 bytes; K rows; V rows, if any. */
typedef struct fv_store_rows {
    int32_t n_kv_heads, head_dim_qk, head_dim_v;
    int32_t src_dtype, kv_dtype;
    uint32_t v_in_k;
    float norm_alpha, norm_eps;
    uint32_t first_slot; /* of the first token, in its page */
    uint32_t n_tokens, n_pages, reserved;
} fv_store_rows_t;

/* PAGE: its bytes follow, as in the arena. */
typedef struct fv_store_page {
    fv_page_ref_t page;
    uint32_t n_bytes;
} fv_store_page_t;

/* Bytes of the disk's records of an item's append. */
size_t
fv_store_disk_need(const fv_worker_t *worker, const fv_step_item_t *item, size_t n_new_pages);
/* What an item has written to pages, for the next commit; its room was reserved. */
void fv_store_disk_note_item(fv_worker_t *worker, const fv_step_item_t *item);

/* The log takes much more than what it describes. */
bool fv_store_disk_is_large(const fv_worker_t *worker);
/* All pages that are held, into a snapshot that needs them. */
FV_MUST_CHECK fv_status_t fv_store_disk_add_pages(fv_worker_t *worker);

/* What the log has, into the slot's files, which have nothing: pages into the segment, records into the journal. */
FV_MUST_CHECK fv_status_t fv_store_disk_restore(fv_store_t *store, size_t arena_bytes);
/* A page came from the disk, or always was here. */
bool fv_store_disk_has(const fv_store_t *store, fv_page_ref_t page);

#endif /* FV_WORKER_STORE_DISK_H */
