/*
 * store_rewrite.c - writes a slot's journal anew from the tables.
 */
#include "worker/internal.h"
#include "worker/store_disk.h"

#include <string.h>

/* ------------------------------------------------------------------ bodies */

fv_ctl_open_t fv_store_open_body(uint32_t slot, const fv_session_t *session)
{
    return (fv_ctl_open_t){.session_slot = slot,
                           .model_slot = session->model_slot,
                           .id = session->id,
                           .placement = session->placement};
}

/* The first record of a session, of a body that outlives it. */
fv_journal_record_t
fv_store_open_record(uint32_t slot, const fv_session_t *session, const fv_ctl_open_t *body)
{
    return (fv_journal_record_t){.type = FV_STORE_OPEN,
                                 .flags = FV_JOURNAL_FIRST,
                                 .key = slot,
                                 .number = fv_session_id_first_number(&session->id),
                                 .body = body,
                                 .n_bytes = sizeof(*body)};
}

const fv_page_ref_t *fv_store_pack(fv_worker_t *worker,
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
    const fv_page_ref_t *refs = fv_store_pack(worker, session, layer, 0, layer->n_pages);

    return (refs == NULL) ? FV_ERR_NO_MEMORY
                          : add(worker->store, &record, refs,
                                (size_t)session->n_heads * layer->n_pages * sizeof(*refs));
}

static fv_status_t add_session(fv_worker_t *worker, uint32_t slot, fv_session_t *session)
{
    const fv_ctl_open_t body = fv_store_open_body(slot, session);
    const fv_journal_record_t record = fv_store_open_record(slot, session, &body);

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
        status = fv_store_disk_add_pages(worker);
    }
    if (status == FV_OK) {
        status = fv_journal_rewrite_end(store->journal);
    }
    if (status != FV_OK) {
        fv_journal_rewrite_abort(store->journal);
        return status;
    }
    store->rewritten_bytes = fv_journal_bytes(store->journal);
    store->is_behind = false;
    store->tried_disk_bytes = 0;
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
