/*
 * store.c - what goes into the journal of a worker's slot.
 */
#include "worker/store.h"

#include "common/log.h"
#include "kernels/kernels.h"
#include "worker/internal.h"
#include "worker/store_disk.h"

#include <string.h>

#define ARENA_SLACK   FV_KV_ARENA_SLACK
#define COMMAND_SPARE ((size_t)64 << 10) /* left for commands that give memory back */
#define REWRITE_BYTES ((uint64_t)16 << 20)
#define RETRY_BYTES   ((uint64_t)64 << 20)

/* ------------------------------------------------------------------ commands */

static fv_status_t commit_one(fv_worker_t *worker, const fv_journal_record_t *record, size_t spare)
{
    fv_journal_t *journal = worker->store->journal;

    FV_RETURN_IF_ERR(fv_journal_reserve(journal, fv_journal_size(record->n_bytes) + spare));
    fv_journal_add(journal, record, NULL, 0);
    return fv_journal_commit(journal);
}

/* Before anything new is noted: records that refer to what is there must find it so. */
static fv_status_t catch_up(fv_worker_t *worker)
{
    return worker->store->is_behind ? fv_store_rewrite(worker) : FV_OK;
}

/* Something was given back, and there was no room to say so. */
static fv_status_t fall_behind(fv_worker_t *worker, fv_status_t status)
{
    if (status != FV_ERR_EXHAUSTED) {
        return status;
    }
    if (!worker->store->is_behind) {
        fv_warn("durability: %s: until there is room, nothing is appended or opened here",
                fv_error_context());
    }
    worker->store->is_behind = true;
    return FV_OK;
}

static fv_status_t note_model_once(fv_worker_t *worker, uint32_t slot)
{
    fv_worker_model_t *model = worker->models[slot];
    const fv_journal_record_t record = {.type = FV_STORE_MODEL,
                                        .flags = FV_JOURNAL_FIRST,
                                        .key = FV_STORE_MODEL_KEY + slot,
                                        .number = 1,
                                        .body = &model->spec,
                                        .n_bytes = sizeof(model->spec)};

    if (model->is_noted) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(commit_one(worker, &record, COMMAND_SPARE));
    model->is_noted = true;
    return FV_OK;
}

fv_status_t fv_store_note_model(fv_worker_t *worker, uint32_t slot)
{
    fv_status_t status = (worker->store == NULL) ? FV_OK : note_model_once(worker, slot);

    return (status == FV_ERR_EXHAUSTED) ? FV_OK : status;
}

fv_status_t fv_store_note_open(fv_worker_t *worker, uint32_t slot, fv_session_t *session)
{
    const fv_ctl_open_t body = fv_store_open_body(slot, session);
    const fv_journal_record_t record = fv_store_open_record(slot, session, &body);

    session->last_record = record.number;
    if (worker->store == NULL) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(catch_up(worker));
    FV_RETURN_IF_ERR(note_model_once(worker, session->model_slot));
    return commit_one(worker, &record, COMMAND_SPARE);
}

fv_status_t
fv_store_note_fork(fv_worker_t *worker, const fv_ctl_fork_t *message, fv_session_t *child)
{
    const fv_store_fork_t body = {.parent_slot = message->parent_slot,
                                  .at_position = message->at_position,
                                  .id = message->id};
    const fv_journal_record_t record = {.type = FV_STORE_FORK,
                                        .flags = FV_JOURNAL_FIRST,
                                        .key = message->session_slot,
                                        .number = fv_session_id_first_number(&child->id),
                                        .body = &body,
                                        .n_bytes = sizeof(body)};

    child->last_record = record.number;
    if (worker->store == NULL) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(catch_up(worker));
    return commit_one(worker, &record, COMMAND_SPARE);
}

static bool cuts(const fv_ctl_truncate_t *message, const fv_session_t *session)
{
    bool is_all = message->layer == UINT32_MAX;
    bool does = false;

    for (uint32_t i = 0; (session->layers != NULL) && (i < (uint32_t)session->model->spec.n_layers);
         i++) {
        does = does || ((is_all || (i == message->layer)) &&
                        (session->layers[i].length > message->position));
    }
    return does;
}

fv_status_t
fv_store_note_truncate(fv_worker_t *worker, const fv_ctl_truncate_t *message, fv_session_t *session)
{
    const fv_journal_record_t record = {.type = FV_STORE_TRUNCATE,
                                        .key = message->session_slot,
                                        .number = session->last_record + 1U,
                                        .body = message,
                                        .n_bytes = sizeof(*message)};

    if ((worker->store == NULL) || worker->store->is_behind || !cuts(message, session)) {
        return FV_OK;
    }
    fv_status_t status = commit_one(worker, &record, COMMAND_SPARE);
    session->last_record += (status == FV_OK) ? 1U : 0U;
    return fall_behind(worker, status);
}

fv_status_t fv_store_note_close(fv_worker_t *worker, uint32_t slot, fv_session_t *session)
{
    const fv_journal_record_t record = {
        .type = FV_STORE_CLOSE, .key = slot, .number = session->last_record + 1U};

    if ((worker->store == NULL) || worker->store->is_behind) {
        return FV_OK;
    }
    return fall_behind(worker, commit_one(worker, &record, 0));
}

/* ------------------------------------------------------------------ steps */

/*
 * The pool opens a slab that was never used only when all others are in use, and they are taken in order: what is used now,
 * and what the step may open, bounds the address of every page that it takes.
 */
static fv_status_t ensure_pages(fv_worker_t *worker, size_t n_bytes)
{
    fv_kv_pool_stats_t stats;

    if (worker->store->pages == NULL) {
        return FV_OK;
    }
    fv_kv_pool_stats(worker->pool, &stats);
    /* at worst half of a slab is no page; and each class may open one for its first page */
    uint64_t n_slabs = (uint64_t)fv_kv_pool_slabs_seen(worker->pool) +
                       2U * n_bytes / stats.slab_bytes + stats.n_classes + 1U;
    uint64_t end = ((n_slabs < stats.n_slabs) ? n_slabs : stats.n_slabs) * stats.slab_bytes;

    return fv_segment_ensure(worker->store->pages, (size_t)end + ARENA_SLACK);
}

/* On the disk for all of the step's records; a log of what is mostly gone is begun anew when there is no room for more. */
static fv_status_t reserve_disk(fv_worker_t *worker, size_t n_bytes)
{
    fv_disklog_t *disk = worker->store->disk;
    fv_kv_pool_stats_t stats;

    if (disk == NULL) {
        return FV_OK;
    }
    fv_status_t status = fv_disklog_reserve(disk, n_bytes, n_bytes);
    fv_kv_pool_stats(worker->pool, &stats);
    if ((status != FV_ERR_EXHAUSTED) ||
        (fv_disklog_bytes(disk) / 2U < stats.bytes_total - stats.bytes_free)) {
        return status;
    }
    const fv_error_t error = fv_error_capture(status);
    fv_disklog_want_fresh(disk);
    status = fv_store_rewrite(worker);
    return (status == FV_OK) ? fv_disklog_reserve(disk, n_bytes, n_bytes)
                             : fv_fail((fv_status_t)error.status, "%s", error.text);
}

fv_status_t fv_store_reserve(fv_worker_t *worker,
                             size_t n_items,
                             size_t n_refs,
                             size_t n_page_bytes,
                             size_t n_disk_bytes)
{
    size_t n_bytes = n_items * (fv_journal_size(sizeof(fv_store_entries_t)) + 8U) +
                     n_refs * sizeof(fv_page_ref_t) + COMMAND_SPARE;

    if (worker->store == NULL) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(catch_up(worker));
    FV_RETURN_IF_ERR(ensure_pages(worker, n_page_bytes));
    FV_RETURN_IF_ERR(fv_array_reserve(&worker->store_refs, n_refs + 1U, sizeof(fv_page_ref_t)));
    FV_RETURN_IF_ERR(reserve_disk(worker, n_bytes + n_disk_bytes));
    return fv_journal_reserve(worker->store->journal, n_bytes);
}

void fv_store_note_entries(fv_worker_t *worker,
                           uint32_t slot,
                           fv_session_t *session,
                           const fv_store_entries_t *entries)
{
    const fv_layer_kv_t *layer = &session->layers[entries->layer];
    fv_journal_record_t record = {.type = FV_STORE_ENTRIES,
                                  .key = slot,
                                  .number = session->last_record + 1U,
                                  .body = entries,
                                  .n_bytes = sizeof(*entries)};

    if (worker->store == NULL) {
        return;
    }
    const fv_page_ref_t *refs =
        fv_store_pack(worker, session, layer, entries->first, entries->n_entries);
    FV_ASSERT(refs != NULL); /* fv_store_reserve() made room for all of the step's */
    session->last_record++;
    fv_journal_add(worker->store->journal, &record, refs,
                   (size_t)session->n_heads * entries->n_entries * sizeof(*refs));
}

fv_status_t fv_store_commit(fv_worker_t *worker)
{
    fv_store_t *store = worker->store;

    if (store == NULL) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_journal_commit(store->journal));
    uint64_t grown = fv_journal_bytes(store->journal) - store->rewritten_bytes;
    bool is_large = fv_store_disk_is_large(worker) &&
                    (fv_disklog_bytes(store->disk) > store->tried_disk_bytes + RETRY_BYTES);
    if (is_large) {
        store->tried_disk_bytes = fv_disklog_bytes(store->disk);
        fv_disklog_want_fresh(store->disk);
    }
    if ((is_large || ((grown > REWRITE_BYTES) && (grown > store->rewritten_bytes))) &&
        (fv_store_rewrite(worker) != FV_OK)) {
        fv_warn("durability: the journal grows on: %s", fv_error_context());
        store->rewritten_bytes = fv_journal_bytes(store->journal); /* tried again much later */
    }
    return FV_OK;
}
