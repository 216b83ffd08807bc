/*
 * store_load.c - what a worker finds in its slot's journal.
 *
 * Reading plays the records on page tables that nobody counts (pool NULL). Whatever in a record can not be so, though its
 * checksum holds, marks its session lost: nothing of a file is believed, and nothing of it ends the process.
 */
#include "common/log.h"
#include "worker/internal.h"

#include <stdlib.h>
#include <string.h>

#define TOKENS_MAX ((uint64_t)1 << 36)

/* ------------------------------------------------------------------ playing records */

void fv_store_drop(fv_worker_t *worker, uint32_t slot)
{
    fv_session_destroy(fv_worker_session(worker, slot), NULL);
    if (slot < worker->n_session_slots) {
        ((fv_session_t **)worker->sessions.data)[slot] = NULL;
    }
}

static fv_status_t bad(const char *what)
{
    return fv_fail(FV_ERR_DATA_LOSS, "store: a record of %s can not be so", what);
}

static fv_status_t play_model(fv_worker_t *worker, const fv_journal_record_t *record)
{
    fv_model_spec_t spec;
    uint32_t slot = record->key - FV_STORE_MODEL_KEY;

    if ((record->n_bytes != sizeof(spec)) || (slot >= FV_MODELS_MAX) ||
        (worker->models[slot] != NULL)) {
        return bad("a model");
    }
    memcpy(&spec, record->body, sizeof(spec));
    return fv_worker_add_model(worker, slot, &spec);
}

static fv_status_t
put(fv_worker_t *worker, uint32_t slot, const fv_session_id_t *id, fv_session_t *session)
{
    fv_status_t status = fv_worker_claim_slot(worker, slot);

    if (status != FV_OK) {
        fv_session_destroy(session, NULL);
        return status;
    }
    session->id = *id;
    session->last_record = fv_session_id_first_number(id);
    ((fv_session_t **)worker->sessions.data)[slot] = session;
    return FV_OK;
}

static fv_status_t play_open(fv_worker_t *worker, const fv_journal_record_t *record)
{
    fv_ctl_open_t open;
    fv_session_t *session = NULL;

    if (record->n_bytes != sizeof(open)) {
        return bad("opening");
    }
    memcpy(&open, record->body, sizeof(open));
    if ((open.model_slot >= FV_MODELS_MAX) || (worker->models[open.model_slot] == NULL)) {
        return bad("opening");
    }
    const fv_worker_model_t *model = worker->models[open.model_slot];
    FV_RETURN_IF_ERR(fv_worker_check_placement(worker, &model->spec, &open.placement));
    FV_RETURN_IF_ERR(
        fv_session_create(model, open.model_slot, &open.placement, worker->config.rank, &session));
    return put(worker, record->key, &open.id, session);
}

static fv_status_t play_fork(fv_worker_t *worker, const fv_journal_record_t *record)
{
    fv_store_fork_t fork;
    fv_session_t *child = NULL;

    if (record->n_bytes != sizeof(fork)) {
        return bad("a fork");
    }
    memcpy(&fork, record->body, sizeof(fork));
    const fv_session_t *parent = fv_worker_session(worker, fork.parent_slot);
    if ((parent == NULL) || parent->is_lost) {
        return fv_fail(FV_ERR_DATA_LOSS, "store: the parent of a fork is lost");
    }
    FV_RETURN_IF_ERR(fv_session_fork(parent, fork.at_position, NULL, &child));
    return put(worker, record->key, &fork.id, child);
}

static uint64_t pages_for(const fv_session_t *session, uint64_t n_tokens)
{
    return fv_placement_pages(&session->placement, session->cp, n_tokens);
}

static fv_status_t
play_entries(const fv_worker_t *worker, fv_session_t *session, const fv_journal_record_t *record)
{
    fv_store_entries_t e;

    (void)worker;
    if (record->n_bytes < sizeof(e)) {
        return bad("a step");
    }
    memcpy(&e, record->body, sizeof(e));
    if ((session->layers == NULL) || (e.layer >= (uint32_t)session->model->spec.n_layers) ||
        (e.length > TOKENS_MAX) || (e.position > TOKENS_MAX)) {
        return bad("a step");
    }
    fv_layer_kv_t *layer = &session->layers[e.layer];
    size_t n_refs = (record->n_bytes - sizeof(e)) / sizeof(fv_page_ref_t);
    if ((e.length < layer->length) || (e.first > layer->n_pages) ||
        (n_refs != (size_t)e.n_entries * (size_t)session->n_heads) ||
        ((uint64_t)e.first + e.n_entries != pages_for(session, e.length))) {
        return bad("a step");
    }
    FV_RETURN_IF_ERR(fv_session_set_entries(
        session, e.layer, e.first, e.n_entries,
        (const fv_page_ref_t *)(const void *)((const uint8_t *)record->body + sizeof(e))));
    layer->length = e.length;
    if (e.frees != 0U) {
        fv_session_settle(session, e.layer, e.position, NULL);
    }
    return FV_OK;
}

static fv_status_t play_table(fv_session_t *session, const fv_journal_record_t *record)
{
    fv_store_table_t t;

    if (record->n_bytes < sizeof(t)) {
        return bad("a table");
    }
    memcpy(&t, record->body, sizeof(t));
    if ((session->layers == NULL) || (t.layer >= (uint32_t)session->model->spec.n_layers) ||
        (t.length > TOKENS_MAX) || (t.floor > t.length) || (t.n_dead > t.n_entries) ||
        (t.n_entries != pages_for(session, t.length)) ||
        ((record->n_bytes - sizeof(t)) / sizeof(fv_page_ref_t) !=
         (size_t)t.n_entries * (size_t)session->n_heads)) {
        return bad("a table");
    }
    FV_RETURN_IF_ERR(fv_session_set_entries(
        session, t.layer, 0, t.n_entries,
        (const fv_page_ref_t *)(const void *)((const uint8_t *)record->body + sizeof(t))));
    fv_layer_kv_t *layer = &session->layers[t.layer];
    layer->length = t.length;
    layer->floor = t.floor;
    layer->n_dead = t.n_dead;
    return FV_OK;
}

static fv_status_t play_truncate(fv_session_t *session, const fv_journal_record_t *record)
{
    fv_ctl_truncate_t cut;
    uint32_t n_layers = (uint32_t)session->model->spec.n_layers;

    if (record->n_bytes != sizeof(cut)) {
        return bad("a cut");
    }
    memcpy(&cut, record->body, sizeof(cut));
    bool is_all = cut.layer == UINT32_MAX;
    if (!is_all && (cut.layer >= n_layers)) {
        return bad("a cut");
    }
    for (uint32_t i = is_all ? 0U : cut.layer;
         (session->layers != NULL) && (i < (is_all ? n_layers : cut.layer + 1U)); i++) {
        fv_session_truncate(session, i, cut.position, NULL);
    }
    return FV_OK;
}

/* A record of a session that is there. */
static fv_status_t
play_later(fv_worker_t *worker, fv_session_t *session, const fv_journal_record_t *record)
{
    if (record->body == NULL) {
        return fv_fail(FV_ERR_DATA_LOSS, "store: a record is damaged");
    }
    if (record->number != session->last_record + 1U) {
        return fv_fail(FV_ERR_DATA_LOSS, "store: a record is missing");
    }
    session->last_record++;
    switch (record->type) {
    case FV_STORE_ENTRIES:
        return play_entries(worker, session, record);
    case FV_STORE_TABLE:
        return play_table(session, record);
    case FV_STORE_TRUNCATE:
        return play_truncate(session, record);
    default:
        return bad("an unknown type");
    }
}

/* One that begins a key; `status` of a damaged one is an error, too. */
static fv_status_t play_first(fv_worker_t *worker, const fv_journal_record_t *record)
{
    if (record->key < FV_STORE_MODEL_KEY) {
        fv_store_drop(worker, record->key); /* its CLOSE was lost, or it would not be there */
    }
    if (record->body == NULL) {
        return fv_fail(FV_ERR_DATA_LOSS, "store: a record is damaged");
    }
    switch (record->type) {
    case FV_STORE_MODEL:
        return play_model(worker, record);
    case FV_STORE_OPEN:
        return play_open(worker, record);
    case FV_STORE_FORK:
        return play_fork(worker, record);
    default:
        return bad("an unknown type");
    }
}

static fv_status_t play(void *arg, const fv_journal_record_t *record)
{
    fv_worker_t *worker = arg;
    fv_session_t *session = fv_worker_session(worker, record->key);
    fv_status_t status = FV_OK;

    if ((record->flags & FV_JOURNAL_FIRST) != 0U) {
        status = play_first(worker, record);
    } else if ((session != NULL) && (record->type == FV_STORE_CLOSE)) {
        fv_store_drop(worker, record->key); /* whatever else was wrong with it */
    } else if ((session != NULL) && !session->is_lost) {
        status = play_later(worker, session, record);
        session->is_lost = status != FV_OK;
    }
    if (status == FV_ERR_NO_MEMORY) {
        return status;
    }
    if (status != FV_OK) {
        worker->store->n_damaged++;
        fv_warn("durability: slot %u, record of session or model %u: %s", worker->store->place.slot,
                record->key & ~FV_STORE_MODEL_KEY, fv_error_context());
    }
    return FV_OK;
}

fv_status_t fv_store_load(fv_worker_t *worker)
{
    fv_journal_report_t report = {0};
    fv_store_t *store = worker->store;
    uint32_t n = 0;

    if (store == NULL) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_journal_read(store->journal, play, worker, &report));
    for (uint32_t i = 0; i < worker->n_session_slots; i++) {
        n += (fv_worker_session(worker, i) != NULL) ? 1U : 0U;
    }
    if ((report.n_holes > 0U) || (report.n_damaged > 0U) || (report.tail_bytes > 0U)) {
        fv_warn("durability: slot %u: %llu damaged records, %llu holes, %llu bytes at the end",
                store->place.slot, (unsigned long long)report.n_damaged,
                (unsigned long long)report.n_holes, (unsigned long long)report.tail_bytes);
    }
    for (uint32_t i = 0; i < FV_MODELS_MAX; i++) {
        store->is_attaching = store->is_attaching || (worker->models[i] != NULL);
    }
    store->rewritten_bytes = fv_journal_bytes(store->journal);
    if (n > 0U) {
        fv_info("durability: slot %u of %s holds %u sessions", store->place.slot, store->place.dir,
                n);
    }
    return FV_OK;
}
