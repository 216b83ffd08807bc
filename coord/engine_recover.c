/*
 * engine_recover.c - brings back what a ledger and the ranks' stores hold, before anybody is served.
 *
 * The ledger says which sessions there are and how long each layer is; each rank is told (KEEP), cuts its shard to that, and
 * says which queries its pages still serve (floors). A session of which some rank lacks something is lost: it is closed
 * everywhere, named in the log, and never served.
 */
#include "common/clock.h"
#include "common/log.h"
#include "coord/engine_internal.h"

#include <stdlib.h>
#include <string.h>

#define OWN_RANK  0U
#define ALL_RANKS UINT32_MAX

/* Message and answer of one session. */
typedef struct keep {
    fv_ctl_keep_t *message; /* with its layers behind it */
    size_t n_bytes;
    uint64_t *floors;
} keep_t;

static fv_principal_t *owner_of(void *arg, const char *name)
{
    return fv_auth_principal(arg, name);
}

static fv_status_t make_keep(const fv_session_t *session, bool is_exact, keep_t *out)
{
    size_t n_layers = (size_t)session->n_layers;
    size_t n_bytes = sizeof(fv_ctl_keep_t) + n_layers * sizeof(fv_ctl_keep_layer_t);
    fv_ctl_keep_t *message = calloc(1, n_bytes);
    uint64_t *floors = calloc(n_layers, sizeof(*floors));

    if ((message == NULL) || (floors == NULL)) {
        free(message);
        free(floors);
        return fv_fail(FV_ERR_NO_MEMORY, "recovery");
    }
    *message = (fv_ctl_keep_t){.session_slot = session->slot,
                               .model_slot = session->model_slot,
                               .id = session->id,
                               .n_layers = (uint32_t)n_layers,
                               .is_exact = is_exact ? 1U : 0U,
                               .placement = session->placement};
    fv_ctl_keep_layer_t *layers = (fv_ctl_keep_layer_t *)(void *)(message + 1);
    for (size_t i = 0; i < n_layers; i++) {
        layers[i].n_tokens = session->layers[i].n_tokens;
    }
    *out = (keep_t){.message = message, .n_bytes = n_bytes, .floors = floors};
    return FV_OK;
}

/* One rank's answer: *out_error is its refusal. */
static fv_status_t
ask_rank(fv_engine_t *engine, uint32_t rank, const keep_t *keep, fv_error_t *out_error)
{
    const fv_local_ops_t *local = engine->config.local;
    fv_ctl_done_t done = {0};

    if (rank != OWN_RANK) {
        FV_RETURN_IF_ERR(fv_link_wait_kept(engine->config.link, rank, &done, keep->floors,
                                           keep->message->n_layers));
        *out_error = done.error;
        return FV_OK;
    }
    *out_error = fv_error_capture(local->keep(engine->config.local_ctx, keep->message,
                                              (const void *)(keep->message + 1), keep->floors));
    return FV_OK;
}

/* Some rank may have freed more than the ledger knows: the last append was not noted any more. */
static void raise_floors(fv_session_t *session, const uint64_t *floors)
{
    for (int32_t i = 0; i < session->n_layers; i++) {
        fv_layer_t *layer = &session->layers[i];
        uint64_t floor = (floors[i] < layer->n_tokens) ? floors[i] : layer->n_tokens;
        layer->floor = (floor > layer->floor) ? floor : layer->floor;
    }
}

/* Tells one rank of a session, or all of its ranks (ALL_RANKS); *out_lost_rank is one that lacks something. */
static fv_status_t keep_session(fv_engine_t *engine,
                                fv_session_t *session,
                                uint32_t only_rank,
                                bool is_exact,
                                uint32_t *out_lost_rank)
{
    const fv_placement_t *p = &session->placement;
    uint32_t n = (uint32_t)p->n_head_parts * p->n_ctx_parts;
    keep_t keep = {0};
    fv_status_t status = make_keep(session, is_exact, &keep);

    for (uint32_t i = 0; (status == FV_OK) && (i < n); i++) {
        if ((p->ranks[i] != OWN_RANK) && ((only_rank == ALL_RANKS) || (only_rank == p->ranks[i]))) {
            status = fv_link_send(engine->config.link, p->ranks[i], FV_CTL_KEEP, keep.message,
                                  keep.n_bytes);
        }
    }
    for (uint32_t i = 0; (status == FV_OK) && (i < n); i++) {
        fv_error_t error = {0};
        if ((only_rank != ALL_RANKS) && (only_rank != p->ranks[i])) {
            continue;
        }
        status = ask_rank(engine, p->ranks[i], &keep, &error);
        if ((status == FV_OK) && (error.status == FV_OK)) {
            raise_floors(session, keep.floors);
        } else if ((status == FV_OK) && (*out_lost_rank == ALL_RANKS)) {
            char hex[FV_SESSION_ID_CHARS + 1];
            fv_session_id_format(&session->id, hex);
            fv_error("durability: session %s is lost: rank %u: %s", hex, p->ranks[i], error.text);
            *out_lost_rank = p->ranks[i];
        }
    }
    free(keep.message);
    free(keep.floors);
    return status;
}

static fv_status_t tell_models(fv_engine_t *engine)
{
    static fv_ctl_model_t message; /* large; the turn is held */

    for (uint32_t i = 0; i < fv_sched_n_models(engine->sched); i++) {
        fv_error_t refusal = {0};
        memset(&message, 0, sizeof(message));
        message.model_slot = i;
        message.spec = *fv_sched_model(engine->sched, i);
        FV_RETURN_IF_ERR(
            fv_engine_broadcast(engine, NULL, FV_CTL_MODEL, &message, sizeof(message), &refusal));
        if (refusal.status != FV_OK) {
            return fv_fail(FV_ERR_INTERNAL, "a rank refused a model: %s", refusal.text);
        }
    }
    return FV_OK;
}

/* A session, and which rank lacks something of it. */
typedef struct loss {
    fv_session_id_t id;
    uint32_t rank;
} loss_t;

/* Every session to its ranks, or to one of them; those that are lost are left in `losses`. */
static fv_status_t keep_all(fv_engine_t *engine,
                            uint32_t only_rank,
                            bool is_exact,
                            loss_t *losses,
                            uint32_t *out_n_lost)
{
    for (fv_session_t *s = fv_session_after(fv_sched_sessions(engine->sched), 0); s != NULL;
         s = s->next) {
        uint32_t lost_rank = ALL_RANKS;
        if ((only_rank != ALL_RANKS) && (fv_placement_cell(&s->placement, only_rank) < 0)) {
            continue;
        }
        FV_RETURN_IF_ERR(keep_session(engine, s, only_rank, is_exact, &lost_rank));
        fv_sched_recount(engine->sched, s);
        if (lost_rank != ALL_RANKS) {
            losses[(*out_n_lost)++] = (loss_t){.id = s->id, .rank = lost_rank};
        }
    }
    return FV_OK;
}

static fv_status_t end_rank(fv_engine_t *engine, uint32_t rank)
{
    fv_ctl_done_t done = {0};

    FV_RETURN_IF_ERR(fv_link_send(engine->config.link, rank, FV_CTL_KEEP_END, NULL, 0));
    FV_RETURN_IF_ERR(fv_link_wait_done(engine->config.link, rank, &done));
    fv_sched_rank_memory(engine->sched, rank, &done.memory);
    return (done.error.status == FV_OK)
               ? FV_OK
               : fv_fail((fv_status_t)done.error.status, "%s", done.error.text);
}

static fv_status_t end_all(fv_engine_t *engine)
{
    fv_error_t refusal = {0};

    FV_RETURN_IF_ERR(fv_engine_broadcast(engine, NULL, FV_CTL_KEEP_END, NULL, 0, &refusal));
    return (refusal.status == FV_OK) ? FV_OK
                                     : fv_fail((fv_status_t)refusal.status, "%s", refusal.text);
}

/* KEEP to one rank or all, then KEEP_END; what is lost is closed everywhere. */
static fv_status_t reconcile(fv_engine_t *engine, uint32_t only_rank, bool is_exact)
{
    uint32_t n = fv_session_table_count(fv_sched_sessions(engine->sched));
    uint32_t n_lost = 0;
    int64_t begin_us = fv_clock_us();
    loss_t *losses = calloc((size_t)n + 1U, sizeof(*losses));

    if (losses == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "recovery of %u sessions", n);
    }
    fv_status_t status = keep_all(engine, only_rank, is_exact, losses, &n_lost);
    if (status == FV_OK) {
        status = (only_rank == ALL_RANKS) ? end_all(engine) : end_rank(engine, only_rank);
    }
    for (uint32_t i = 0; (status == FV_OK) && (i < n_lost); i++) {
        fv_session_t *session = fv_sched_session(engine->sched, &losses[i].id);
        status = fv_engine_lose_session(engine, session, losses[i].rank);
    }
    free(losses);
    if ((status == FV_OK) && (n > 0)) {
        fv_info("durability: of %u sessions %u are lost, after %lld ms", n, n_lost,
                (long long)((fv_clock_us() - begin_us) / 1000));
    }
    return status;
}

fv_status_t fv_engine_recover_rank(fv_engine_t *engine, uint32_t rank)
{
    return reconcile(engine, rank, false);
}

fv_status_t fv_engine_recover(fv_engine_t *engine)
{
    fv_ledger_t *ledger = engine->config.ledger;
    bool has_holes = false;

    if (ledger == NULL) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_ledger_load(ledger, engine->sched, owner_of, engine->config.auth,
                                    engine->lost, &has_holes));
    for (fv_session_t *s = fv_session_after(fv_sched_sessions(engine->sched), 0); s != NULL;
         s = s->next) {
        s->used_us = fv_clock_us();
        fv_sched_restore(engine->sched, s);
    }
    FV_RETURN_IF_ERR(tell_models(engine));
    FV_RETURN_IF_ERR(reconcile(engine, ALL_RANKS, has_holes));
    fv_engine_note_orphans(engine, fv_clock_us());
    fv_status_t status = fv_ledger_rewrite(ledger, engine->sched);
    if ((status == FV_ERR_EXHAUSTED) && !fv_ledger_is_undone(ledger)) {
        /* the old one goes on: what is stored can be read, and closed */
        fv_warn("durability: %s: the coordinator's journal is not written anew",
                fv_error_context());
        status = FV_OK;
    }
    return status;
}
