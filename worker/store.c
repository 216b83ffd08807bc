/*
 * store.c - the files of a worker's slot, and what goes into its journal.
 */
#include "worker/store.h"

#include "common/log.h"
#include "kernels/kernels.h"
#include "worker/internal.h"
#include "worker/mirror.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ARENA_SLACK   FV_KV_ARENA_SLACK
#define COMMAND_SPARE ((size_t)64 << 10) /* left for commands that give memory back */
#define REWRITE_BYTES ((uint64_t)16 << 20)

/* ------------------------------------------------------------------ life */

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

static fv_status_t open_files(fv_store_t *store, const fv_worker_config_t *config)
{
    const fv_store_place_t *place = &store->place;
    bool has_pages = config->backend->kv_home != FV_KV_NOWHERE;
    char path[FV_STORE_PATH_BYTES];
    bool is_new = false;
    bool is_new_pages = true;
    fv_journal_head_t head = {.kind = "worker",
                              .slot = place->slot,
                              .n_slots = place->n_slots,
                              .kv_bytes = config->backend_config.kv_arena_bytes};

    (void)snprintf(head.layout, sizeof(head.layout), "%s", has_pages ? "cpu" : "none");
    memcpy(head.job, place->job, sizeof(head.job));
    FV_RETURN_IF_ERR(fv_store_prepare(place));
    fv_store_path(place, FV_STORE_TABLES, path);
    FV_RETURN_IF_ERR(open_journal(store, path, &head, &is_new));
    if (has_pages) {
        fv_store_path(place, FV_STORE_PAGES, path);
        if (is_new) { /* pages that no table names */
            FV_RETURN_IF_ERR(drop_pages(path));
        }
        FV_RETURN_IF_ERR(fv_segment_open(path, config->backend_config.kv_arena_bytes, ARENA_SLACK,
                                         &store->pages, &is_new_pages));
    }
    if (!is_new && has_pages && is_new_pages) { /* tables of pages that are gone */
        fv_warn("durability: %s was missing: its sessions are lost", path);
        FV_RETURN_IF_ERR(fv_journal_rewrite_begin(store->journal));
        FV_RETURN_IF_ERR(fv_journal_rewrite_end(store->journal));
    }
    return FV_OK;
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
        fv_journal_remove(store->journal); /* last: it holds the lock */
        fv_store_leave(&store->place);
    } else {
        fv_segment_close(store->pages);
        fv_journal_close(store->journal);
    }
    free(store);
}

void fv_worker_discard_store(fv_worker_t *worker)
{
    if (worker->store != NULL) {
        worker->store->is_discarded = true;
    }
}

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

static fv_ctl_open_t open_body(uint32_t slot, const fv_session_t *session)
{
    return (fv_ctl_open_t){.session_slot = slot,
                           .model_slot = session->model_slot,
                           .id = session->id,
                           .placement = session->placement};
}

/* The first record of a session, of a body that outlives it. */
static fv_journal_record_t
open_record(uint32_t slot, const fv_session_t *session, const fv_ctl_open_t *body)
{
    return (fv_journal_record_t){.type = FV_STORE_OPEN,
                                 .flags = FV_JOURNAL_FIRST,
                                 .key = slot,
                                 .number = fv_session_id_first_number(&session->id),
                                 .body = body,
                                 .n_bytes = sizeof(*body)};
}

fv_status_t fv_store_note_open(fv_worker_t *worker, uint32_t slot, fv_session_t *session)
{
    const fv_ctl_open_t body = open_body(slot, session);
    const fv_journal_record_t record = open_record(slot, session, &body);

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

fv_status_t
fv_store_reserve(fv_worker_t *worker, size_t n_items, size_t n_refs, size_t n_page_bytes)
{
    if (worker->store == NULL) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(catch_up(worker));
    FV_RETURN_IF_ERR(ensure_pages(worker, n_page_bytes));
    FV_RETURN_IF_ERR(fv_array_reserve(&worker->store_refs, n_refs + 1U, sizeof(fv_page_ref_t)));
    return fv_journal_reserve(worker->store->journal,
                              n_items * (fv_journal_size(sizeof(fv_store_entries_t)) + 8U) +
                                  n_refs * sizeof(fv_page_ref_t) + COMMAND_SPARE);
}

/* [n_heads, n] of a table from `first` on, to the worker's scratch. NULL: no memory. */
static const fv_page_ref_t *pack(fv_worker_t *worker,
                                 const fv_session_t *session,
                                 const fv_layer_kv_t *layer,
                                 uint32_t first,
                                 uint32_t n)
{
    size_t n_heads = (size_t)session->n_heads;

    if (fv_array_reserve(&worker->store_refs, n_heads * n + 1U, sizeof(fv_page_ref_t)) != FV_OK) {
        return NULL;
    }
    fv_page_ref_t *to = worker->store_refs.data;
    for (size_t h = 0; (n > 0U) && (h < n_heads); h++) {
        memcpy(to + h * n, layer->pages + h * layer->stride + first, n * sizeof(*to));
    }
    return to;
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
    const fv_page_ref_t *refs = pack(worker, session, layer, entries->first, entries->n_entries);
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
    if ((grown > REWRITE_BYTES) && (grown > store->rewritten_bytes) &&
        (fv_store_rewrite(worker) != FV_OK)) {
        fv_warn("durability: the journal grows on: %s", fv_error_context());
        store->rewritten_bytes = fv_journal_bytes(store->journal); /* tried again much later */
    }
    return FV_OK;
}

/* ------------------------------------------------------------------ writing anew */

static fv_status_t
add(fv_store_t *store, const fv_journal_record_t *record, const void *more, size_t more_bytes)
{
    FV_RETURN_IF_ERR(
        fv_journal_reserve(store->journal, fv_journal_size(record->n_bytes + more_bytes)));
    fv_journal_add(store->journal, record, more, more_bytes);
    return FV_OK;
}

static fv_status_t add_layer(fv_worker_t *worker, uint32_t slot, fv_session_t *session, uint32_t i)
{
    const fv_layer_kv_t *layer = &session->layers[i];
    const fv_store_table_t body = {.layer = i,
                                   .n_entries = layer->n_pages,
                                   .n_dead = layer->n_dead,
                                   .length = layer->length,
                                   .floor = layer->floor};
    const fv_journal_record_t record = {.type = FV_STORE_TABLE,
                                        .key = slot,
                                        .number = ++session->last_rewritten,
                                        .body = &body,
                                        .n_bytes = sizeof(body)};
    const fv_page_ref_t *refs = pack(worker, session, layer, 0, layer->n_pages);

    return (refs == NULL) ? FV_ERR_NO_MEMORY
                          : add(worker->store, &record, refs,
                                (size_t)session->n_heads * layer->n_pages * sizeof(*refs));
}

static fv_status_t add_session(fv_worker_t *worker, uint32_t slot, fv_session_t *session)
{
    const fv_ctl_open_t body = open_body(slot, session);
    const fv_journal_record_t record = open_record(slot, session, &body);

    session->last_rewritten = record.number;
    FV_RETURN_IF_ERR(add(worker->store, &record, NULL, 0));
    for (uint32_t i = 0; (session->layers != NULL) && (i < (uint32_t)session->model->spec.n_layers);
         i++) {
        if ((session->layers[i].length > 0U) || (session->layers[i].floor > 0U)) {
            FV_RETURN_IF_ERR(add_layer(worker, slot, session, i));
        }
    }
    return FV_OK;
}

static fv_status_t add_all(fv_worker_t *worker)
{
    for (uint32_t i = 0; i < FV_MODELS_MAX; i++) {
        if (worker->models[i] != NULL) {
            const fv_journal_record_t record = {.type = FV_STORE_MODEL,
                                                .flags = FV_JOURNAL_FIRST,
                                                .key = FV_STORE_MODEL_KEY + i,
                                                .number = 1,
                                                .body = &worker->models[i]->spec,
                                                .n_bytes = sizeof(worker->models[i]->spec)};
            FV_RETURN_IF_ERR(add(worker->store, &record, NULL, 0));
        }
    }
    for (uint32_t i = 0; i < worker->n_session_slots; i++) {
        if (fv_worker_session(worker, i) != NULL) {
            FV_RETURN_IF_ERR(add_session(worker, i, fv_worker_session(worker, i)));
        }
    }
    return FV_OK;
}

fv_status_t fv_store_rewrite(fv_worker_t *worker)
{
    fv_store_t *store = worker->store;

    FV_RETURN_IF_ERR(fv_journal_rewrite_begin(store->journal));
    fv_status_t status = add_all(worker);
    if (status == FV_OK) {
        status = fv_journal_rewrite_end(store->journal);
    }
    if (status != FV_OK) {
        fv_journal_rewrite_abort(store->journal);
        return status;
    }
    store->rewritten_bytes = fv_journal_bytes(store->journal);
    store->is_behind = false;
    for (uint32_t i = 0; i < FV_MODELS_MAX; i++) {
        if (worker->models[i] != NULL) {
            worker->models[i]->is_noted = true;
        }
    }
    for (uint32_t i = 0; i < worker->n_session_slots;
         i++) { /* only now: the old numbers are past */
        fv_session_t *session = fv_worker_session(worker, i);
        if (session != NULL) {
            session->last_record = session->last_rewritten;
        }
    }
    return FV_OK;
}
