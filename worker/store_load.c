/*
 * store_load.c - what a worker finds in its slot's files, and what the coordinator lets it keep.
 *
 * Reading plays the records on page tables that nobody counts (pool NULL). Whatever in a record can not be so, though its
 * checksum holds, marks its session lost: nothing of a file is believed, and nothing of it ends the process.
 */
#include "common/log.h"
#include "worker/internal.h"
#include "worker/mirror.h"

#include <stdlib.h>
#include <string.h>

#define TOKENS_MAX ((uint64_t)1 << 36)

/* ------------------------------------------------------------------ playing records */

static void drop(fv_worker_t *worker, uint32_t slot)
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
        drop(worker, record->key); /* its CLOSE was lost, or it would not be there */
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
        drop(worker, record->key); /* whatever else was wrong with it */
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

/* ------------------------------------------------------------------ keeping */

/* Who claims a page, so that no two tables mean different tokens by it. */
static uint64_t tag_of(const fv_session_t *session, uint32_t layer, size_t head, uint32_t page)
{
    return 1U + ((((uint64_t)session->model_slot * FV_LAYERS_MAX + layer) << 36U) |
                 ((uint64_t)(session->head_begin + (int32_t)head) << 26U) | page);
}

static fv_status_t check_layer(fv_worker_t *worker, const fv_session_t *session, uint32_t i)
{
    const fv_layer_kv_t *layer = &session->layers[i];
    uint64_t *tags = worker->store_tags.data;

    for (size_t h = 0; h < (size_t)session->n_heads; h++) {
        for (uint32_t p = 0; p < layer->n_pages; p++) {
            fv_page_ref_t page = layer->pages[h * layer->stride + p];
            if ((page == FV_PAGE_NONE) && (p < layer->n_dead)) {
                continue;
            }
            FV_RETURN_IF_ERR(fv_kv_pool_check(worker->pool, session->model->page_class, page));
            uint64_t *tag = &tags[(size_t)page * FV_PAGE_UNIT / FV_KV_PAGE_BYTES_MIN];
            if ((*tag != 0U) && (*tag != tag_of(session, i, h, p))) {
                return fv_fail(FV_ERR_DATA_LOSS, "store: page %u is in two tables", page);
            }
            *tag = tag_of(session, i, h, p);
        }
    }
    return FV_OK;
}

static void adopt(fv_worker_t *worker, const fv_session_t *session)
{
    for (uint32_t i = 0; i < (uint32_t)session->model->spec.n_layers; i++) {
        const fv_layer_kv_t *layer = &session->layers[i];
        for (size_t h = 0; h < (size_t)session->n_heads; h++) {
            for (uint32_t p = 0; p < layer->n_pages; p++) {
                fv_page_ref_t page = layer->pages[h * layer->stride + p];
                if (page != FV_PAGE_NONE) {
                    fv_kv_pool_adopt(worker->pool, session->model->page_class, page);
                }
            }
        }
    }
}

/* Cuts a layer to what the coordinator knows of it. */
static fv_status_t
cut_layer(fv_session_t *session, uint32_t i, const fv_ctl_keep_t *message, uint64_t n_tokens)
{
    uint64_t own = fv_session_own(session, session->layers[i].length);
    uint64_t wanted = fv_session_own(session, n_tokens);

    if ((own < wanted) || ((message->is_exact != 0U) && (own > wanted))) {
        return fv_fail(FV_ERR_DATA_LOSS,
                       "layer %u: %llu tokens of the session are here, expected %llu", i,
                       (unsigned long long)own, (unsigned long long)wanted);
    }
    fv_session_truncate(session, i, n_tokens, NULL);
    return FV_OK;
}

static fv_status_t
find_candidate(const fv_worker_t *worker, const fv_ctl_keep_t *message, fv_session_t **out)
{
    fv_session_t *session = fv_worker_session(worker, message->session_slot);

    if (worker->store == NULL) {
        return fv_fail(FV_ERR_PROTOCOL, "keep: this worker has no store");
    }
    if ((session == NULL) || !worker->store->is_attaching || session->is_kept) {
        return fv_fail(FV_ERR_DATA_LOSS, "the session is not in the store of slot %u",
                       worker->store->place.slot);
    }
    if (!fv_session_id_is(&session->id, &message->id)) { /* the files are of another time */
        return fv_fail(FV_ERR_DATA_LOSS, "slot %u of the store has another session in its place",
                       worker->store->place.slot);
    }
    if (session->is_lost || (session->model_slot != message->model_slot) ||
        !session->model->is_kept ||
        (message->n_layers != (uint32_t)session->model->spec.n_layers) ||
        (memcmp(&session->placement, &message->placement, sizeof(session->placement)) != 0)) {
        return fv_fail(FV_ERR_DATA_LOSS, "the session's records in slot %u are damaged",
                       worker->store->place.slot);
    }
    *out = session;
    return FV_OK;
}

fv_status_t fv_worker_keep(fv_worker_t *worker,
                           const fv_ctl_keep_t *message,
                           const fv_ctl_keep_layer_t *layers,
                           uint64_t *out_floors)
{
    fv_session_t *session = NULL;

    FV_RETURN_IF_ERR(find_candidate(worker, message, &session));
    memset(out_floors, 0, message->n_layers * sizeof(*out_floors));
    if (session->layers == NULL) {
        session->is_kept = true;
        return FV_OK;
    }
    size_t n_tags = worker->config.backend_config.kv_arena_bytes / FV_KV_PAGE_BYTES_MIN + 1U;
    if (worker->store_tags.data == NULL) {
        FV_RETURN_IF_ERR(fv_array_reserve(&worker->store_tags, n_tags, sizeof(uint64_t)));
        memset(worker->store_tags.data, 0, n_tags * sizeof(uint64_t));
    }
    for (uint32_t i = 0; i < message->n_layers; i++) {
        FV_RETURN_IF_ERR(cut_layer(session, i, message, layers[i].n_tokens));
        FV_RETURN_IF_ERR(check_layer(worker, session, i));
        out_floors[i] = session->layers[i].floor;
    }
    adopt(worker, session);
    session->is_kept = true;
    return FV_OK;
}

/* ------------------------------------------------------------------ the end of it */

void fv_store_forget_model(fv_worker_t *worker, uint32_t slot)
{
    for (uint32_t i = 0; i < worker->n_session_slots; i++) {
        const fv_session_t *session = fv_worker_session(worker, i);
        if ((session != NULL) && (session->model_slot == slot)) {
            drop(worker, i);
        }
    }
    free(worker->models[slot]);
    worker->models[slot] = NULL;
}

/* Every page once: its tag goes with it. */
static fv_status_t add_page(fv_worker_t *worker,
                            const fv_session_t *session,
                            fv_page_ref_t page,
                            fv_array_t *pages,
                            size_t *n)
{
    const fv_model_spec_t *spec = &session->model->spec;
    uint64_t *tags = worker->store_tags.data;
    uint64_t *tag = &tags[(size_t)page * FV_PAGE_UNIT / FV_KV_PAGE_BYTES_MIN];

    if (*tag == 0U) {
        return FV_OK;
    }
    *tag = 0;
    FV_RETURN_IF_ERR(fv_array_reserve(pages, *n + 1U, sizeof(fv_page_copy_t)));
    ((fv_page_copy_t *)pages->data)[(*n)++] =
        (fv_page_copy_t){.src = page,
                         .dst = page,
                         .n_tokens = FV_PAGE_TOKENS,
                         .head_dim_qk = fv_model_stored_dim_qk(spec),
                         .head_dim_v = fv_model_stored_dim_v(spec),
                         .kv_dtype = spec->kv_dtype,
                         .v_in_k = fv_model_is_latent(spec)};
    return FV_OK;
}

static fv_status_t collect_pages(fv_worker_t *worker, fv_array_t *pages, size_t *n)
{
    for (uint32_t slot = 0; slot < worker->n_session_slots; slot++) {
        const fv_session_t *session = fv_worker_session(worker, slot);
        for (uint32_t i = 0; (session != NULL) && (session->layers != NULL) &&
                             (i < (uint32_t)session->model->spec.n_layers);
             i++) {
            const fv_layer_kv_t *layer = &session->layers[i];
            for (size_t e = 0; e < (size_t)session->n_heads * layer->n_pages; e++) {
                fv_page_ref_t page =
                    layer->pages[e / layer->n_pages * layer->stride + e % layer->n_pages];
                if (page != FV_PAGE_NONE) {
                    FV_RETURN_IF_ERR(add_page(worker, session, page, pages, n));
                }
            }
        }
    }
    return FV_OK;
}

/* The device gets its pages back. */
static fv_status_t fill_device(fv_worker_t *worker)
{
    fv_array_t pages = {0};
    size_t n = 0;

    if ((worker->store->mirror == NULL) || (worker->store_tags.data == NULL)) {
        return FV_OK;
    }
    fv_status_t status = collect_pages(worker, &pages, &n);
    if (status == FV_OK) {
        status = fv_mirror_restore(worker->store->mirror, worker->config.backend, worker->backend,
                                   pages.data, n);
    }
    fv_array_free(&pages);
    return status;
}

fv_status_t fv_worker_keep_end(fv_worker_t *worker)
{
    if ((worker->store == NULL) || !worker->store->is_attaching) {
        return FV_OK;
    }
    for (uint32_t i = 0; i < worker->n_session_slots; i++) {
        const fv_session_t *session = fv_worker_session(worker, i);
        if ((session != NULL) && !session->is_kept) {
            drop(worker, i);
        }
    }
    for (uint32_t i = 0; i < FV_MODELS_MAX; i++) {
        if ((worker->models[i] != NULL) && !worker->models[i]->is_kept) {
            fv_store_forget_model(worker, i);
        }
    }
    fv_kv_pool_adopt_end(worker->pool);
    FV_RETURN_IF_ERR(fill_device(worker));
    fv_array_free(&worker->store_tags);
    worker->store->is_attaching = false;
    fv_status_t status = fv_store_rewrite(worker);
    if (status ==
        FV_ERR_EXHAUSTED) { /* what is there can be read; the old journal has more than that */
        fv_warn("durability: %s: until there is room, nothing is appended or opened here",
                fv_error_context());
        worker->store->is_behind = true;
        status = FV_OK;
    }
    return status;
}
