/*
 * store_keep.c - what the coordinator lets a worker keep of what it found (store_load.c).
 */
#include "common/log.h"
#include "worker/internal.h"
#include "worker/mirror.h"
#include "worker/store_disk.h"

#include <stdlib.h>
#include <string.h>

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
            if (!fv_store_disk_has(worker->store, page)) {
                return fv_fail(FV_ERR_DATA_LOSS, "store: page %u is damaged on the disk", page);
            }
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
            fv_store_drop(worker, i);
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
    if ((worker->store == NULL) || (!worker->store->is_attaching && !worker->store->must_rewrite)) {
        return FV_OK;
    }
    for (uint32_t i = 0; i < worker->n_session_slots; i++) {
        const fv_session_t *session = fv_worker_session(worker, i);
        if ((session != NULL) && !session->is_kept) {
            fv_store_drop(worker, i);
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
    free(worker->store->covered);
    worker->store->covered = NULL;
    worker->store->is_attaching = false;
    worker->store->must_rewrite = false;
    fv_status_t status = fv_store_rewrite(worker);
    if ((status == FV_ERR_EXHAUSTED) && !worker->store->is_undone) {
        /* what is there can be read; the old journal has more than that */
        fv_warn("durability: %s: until there is room, nothing is appended or opened here",
                fv_error_context());
        worker->store->is_behind = true;
        status = FV_OK;
    }
    return status;
}
