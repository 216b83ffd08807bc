/*
 * store_files.c - the files of a worker's slot: opened, and given back.
 */
#include "common/log.h"
#include "kernels/kernels.h"
#include "worker/internal.h"
#include "worker/mirror.h"
#include "worker/move.h"
#include "worker/store_disk.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* One whose head is damaged is set aside: its sessions are lost, others are not. */
static fv_status_t
open_journal(fv_store_t *store, const char *path, const fv_journal_head_t *head, bool *out_is_new)
{
    char aside[FV_STORE_PATH_BYTES + 16];
    uint32_t wait_ms = store->place.wait_ms;
    fv_status_t status = fv_journal_open(path, head, wait_ms, &store->journal, out_is_new);

    if (status != FV_ERR_DATA_LOSS) {
        return status;
    }
    (void)snprintf(aside, sizeof(aside), "%s.damaged", path);
    fv_error("durability: %s: its sessions are lost; it is kept as %s", fv_error_context(), aside);
    if (rename(path, aside) != 0) {
        return fv_fail(FV_ERR_SYSTEM, "%s: cannot be renamed", path);
    }
    return fv_journal_open(path, head, wait_ms, &store->journal, out_is_new);
}

/* The slot is ours. */
static fv_status_t drop_pages(const char *path)
{
    return ((unlink(path) == 0) || (errno == ENOENT))
               ? FV_OK
               : fv_fail(FV_ERR_SYSTEM, "%s: %s", path, strerror(errno));
}

static fv_status_t open_disk(fv_store_t *store, const fv_journal_head_t *head, bool *out_is_new)
{
    char path[FV_STORE_PATH_BYTES];
    char aside[FV_STORE_PATH_BYTES + 16];

    *out_is_new = true;
    if (store->place.disk_dir[0] == '\0') {
        return FV_OK;
    }
    fv_store_path(&store->place, FV_STORE_LOG, path);
    fv_status_t status =
        fv_disklog_open(path, head, store->place.wait_ms, &store->disk, out_is_new);
    if (status != FV_ERR_DATA_LOSS) {
        return status;
    }
    (void)snprintf(aside, sizeof(aside), "%s.damaged", path);
    fv_error("durability: %s: what only the disk has is lost; it is kept as %s", fv_error_context(),
             aside);
    if (rename(path, aside) != 0) {
        return fv_fail(FV_ERR_SYSTEM, "%s: cannot be renamed", path);
    }
    return fv_disklog_open(path, head, store->place.wait_ms, &store->disk, out_is_new);
}

static fv_status_t open_pages(fv_store_t *store, size_t n_bytes, bool is_new, bool *out_is_new)
{
    char path[FV_STORE_PATH_BYTES];

    fv_store_path(&store->place, FV_STORE_PAGES, path);
    if (is_new) { /* pages that no table names */
        FV_RETURN_IF_ERR(drop_pages(path));
    }
    return fv_segment_open(path, n_bytes, FV_KV_ARENA_SLACK, &store->pages, out_is_new);
}

/*
 * Tables of pages that are gone, or that the disk knows nothing of. What is in memory is never older than what a disk has of
 * it: the disk counts where memory has nothing.
 */
static fv_status_t
reconcile(fv_store_t *store, size_t arena_bytes, bool has_tables, bool has_pages, bool has_log)
{
    bool is_pair = (store->disk != NULL) &&
                   (fv_journal_head(store->journal)->disk_id == fv_disklog_id(store->disk));
    fv_status_t status = FV_OK;

    if (has_tables && !has_pages) {
        fv_warn("durability: the pages of slot %u were missing: its sessions are lost%s",
                store->place.slot, has_log ? ", unless its disk has them" : "");
    }
    if (has_log && (!has_tables || !has_pages)) {
        fv_journal_set_disk(store->journal, NULL, FV_JOURNAL_UNSETTLED);
        status = fv_store_disk_restore(store, arena_bytes);
    } else if (has_tables && !has_pages) {
        FV_RETURN_IF_ERR(fv_journal_rewrite_begin(store->journal));
        status = fv_journal_rewrite_end(store->journal);
    } else if (has_tables && (store->disk != NULL) && !is_pair) {
        fv_disklog_want_fresh(store->disk);
    }
    if (store->disk != NULL) {
        store->must_rewrite = has_tables || has_log;
        store->is_undone = fv_disklog_wants_fresh(store->disk);
        fv_journal_set_disk(store->journal, store->disk, fv_disklog_id(store->disk));
    }
    return status;
}

/* Whose pages, and what of the arena's end is no page's: pages of one layout may lie in the other's staging area. */
static void name_layout(const fv_worker_config_t *config, bool has_pages, char out[16])
{
    const size_t staging_kib = fv_move_config_bytes(config) >> 10U;

    if (!has_pages) {
        (void)snprintf(out, 16, "none");
    } else if (staging_kib == 0U) {
        (void)snprintf(out, 16, "cpu");
    } else {
        (void)snprintf(out, 16, "cpu-%uk", (unsigned)staging_kib);
    }
}

static fv_status_t open_files(fv_store_t *store, const fv_worker_config_t *config)
{
    const fv_store_place_t *place = &store->place;
    size_t arena_bytes = config->backend_config.kv_arena_bytes;
    bool has_pages = config->backend->kv_home != FV_KV_NOWHERE;
    char path[FV_STORE_PATH_BYTES];
    bool is_new = false;
    bool is_new_pages = false;
    bool is_new_log = true;
    fv_journal_head_t head = {
        .kind = "worker", .slot = place->slot, .n_slots = place->n_slots, .kv_bytes = arena_bytes};

    name_layout(config, has_pages, head.layout);
    memcpy(head.job, place->job, sizeof(head.job));
    FV_RETURN_IF_ERR(fv_store_prepare(place));
    FV_RETURN_IF_ERR(open_disk(store, &head, &is_new_log));
    head.disk_id = (store->disk == NULL) ? 0U : fv_disklog_id(store->disk);
    fv_store_path(place, FV_STORE_TABLES, path);
    FV_RETURN_IF_ERR(open_journal(store, path, &head, &is_new));
    if (has_pages) {
        FV_RETURN_IF_ERR(open_pages(store, arena_bytes, is_new, &is_new_pages));
    }
    return reconcile(store, arena_bytes, !is_new, !is_new_pages, !is_new_log);
}

fv_status_t fv_store_open(const fv_worker_config_t *config,
                          fv_backend_config_t *backend_config,
                          fv_store_t **out)
{
    *out = NULL;
    if (config->store == NULL) {
        return FV_OK;
    }
    fv_store_t *store = calloc(1, sizeof(*store));
    if (store == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "store");
    }
    store->place = *config->store;
    fv_status_t status = open_files(store, config);
    if ((status == FV_OK) && (config->backend->kv_home == FV_KV_HOST)) {
        backend_config->kv_arena = fv_segment_base(store->pages);
    }
    if ((status == FV_OK) && (config->backend->kv_home == FV_KV_DEVICE)) {
        status = fv_mirror_create(fv_segment_base(store->pages), backend_config->kv_arena_bytes,
                                  &store->mirror);
    }
    if ((status == FV_OK) && (store->pages != NULL) && (fv_move_config_bytes(config) > 0U)) {
        /* KV that moves lands at the arena's end, which no page ever claims */
        const size_t arena_bytes = backend_config->kv_arena_bytes;
        status = fv_segment_ensure_range(store->pages, arena_bytes - fv_move_config_bytes(config),
                                         arena_bytes + FV_KV_ARENA_SLACK);
    }
    if ((status == FV_OK) && (store->pages != NULL)) {
        status = fv_segment_populate(store->pages);
    }
    if (status != FV_OK) {
        fv_store_close(store);
        return status;
    }
    *out = store;
    return FV_OK;
}

void fv_store_close(fv_store_t *store)
{
    if (store == NULL) {
        return;
    }
    fv_mirror_destroy(store->mirror);
    if (store->is_discarded) {
        fv_segment_remove(store->pages);
        fv_disklog_remove(store->disk);
        fv_journal_remove(store->journal); /* last: it holds the lock */
        fv_store_leave(&store->place);
    } else {
        fv_segment_close(store->pages);
        fv_journal_close(store->journal);
        fv_disklog_close(store->disk);
    }
    free(store->covered);
    free(store);
}

void fv_worker_discard_store(fv_worker_t *worker)
{
    if (worker->store != NULL) {
        worker->store->is_discarded = true;
    }
}
