/*
 * ledger.c - writes the coordinator's journal.
 *
 * Decode path: station 9 of 10, between the ranks' DONEs and the answers.
 */
#include "coord/ledger.h"

#include "common/log.h"
#include "coord/ledger_internal.h"

#include <stdio.h>
#include <string.h>

#define REWRITE_BYTES ((uint64_t)64 << 20)
#define SPARE_BYTES   ((size_t)64 << 10) /* left for what gives memory back */

/* ------------------------------------------------------------------ single records */

static fv_status_t commit_one(fv_ledger_t *ledger, const fv_journal_record_t *record, size_t left)
{
    FV_RETURN_IF_ERR(fv_journal_reserve(ledger->journal, fv_journal_size(record->n_bytes) + left));
    fv_journal_add(ledger->journal, record, NULL, 0);
    return fv_journal_commit(ledger->journal);
}

/* What giving back takes, of every session that is open, and then some. */
static size_t spare(const fv_ledger_t *ledger)
{
    return SPARE_BYTES + (size_t)ledger->n_open * fv_journal_size(0);
}

/* A model's record; its body is valid until the next. */
static fv_journal_record_t model_record(const fv_sched_t *sched, uint32_t slot)
{
    static fv_ledger_model_t body; /* large; the turn is held */
    const fv_principal_t *owner = fv_sched_model_owner(sched, slot);

    memset(&body, 0, sizeof(body));
    body.spec = *fv_sched_model(sched, slot);
    if (owner != NULL) {
        (void)snprintf(body.owner, sizeof(body.owner), "%s", owner->name);
    }
    return (fv_journal_record_t){.type = FV_LEDGER_MODEL,
                                 .flags = FV_JOURNAL_FIRST,
                                 .key = FV_LEDGER_MODEL_KEY + slot,
                                 .number = 1,
                                 .body = &body,
                                 .n_bytes = sizeof(body)};
}

fv_status_t fv_ledger_note_model(fv_ledger_t *ledger, const fv_sched_t *sched, uint32_t slot)
{
    if (ledger == NULL) {
        return FV_OK;
    }
    const fv_journal_record_t record = model_record(sched, slot);
    return commit_one(ledger, &record, spare(ledger));
}

static void fill_session(const fv_session_t *session, fv_ledger_session_t *out)
{
    memset(out, 0, sizeof(*out));
    out->id = session->id;
    out->parent = session->parent;
    out->has_parent = session->has_parent ? 1U : 0U;
    out->is_forked = session->is_forked ? 1U : 0U;
    out->closes_with_stream = session->closes_with_stream ? 1U : 0U;
    out->model_slot = session->model_slot;
    out->created_unix_ms = session->created_unix_ms;
    out->opened_seq = session->opened_seq;
    out->placement = session->placement;
    (void)snprintf(out->reason, sizeof(out->reason), "%s", session->reason);
    if (session->owner != NULL) {
        (void)snprintf(out->owner, sizeof(out->owner), "%s", session->owner->name);
    }
}

fv_status_t fv_ledger_note_session(fv_ledger_t *ledger,
                                   fv_session_t *session,
                                   const fv_session_t *parent,
                                   uint64_t at_position)
{
    fv_ledger_session_t body;
    const fv_journal_record_t record = {.type = (parent == NULL) ? FV_LEDGER_OPEN : FV_LEDGER_FORK,
                                        .flags = FV_JOURNAL_FIRST,
                                        .key = session->slot,
                                        .number = fv_session_id_first_number(&session->id),
                                        .body = &body,
                                        .n_bytes = sizeof(body)};

    if (ledger == NULL) {
        return FV_OK;
    }
    fill_session(session, &body);
    if (parent != NULL) {
        body.parent_slot = parent->slot;
        body.at_position = at_position;
    }
    session->last_noted = record.number;
    FV_RETURN_IF_ERR(commit_one(ledger, &record, spare(ledger) + fv_journal_size(0)));
    ledger->n_open++;
    return FV_OK;
}

fv_status_t fv_ledger_reserve_command(fv_ledger_t *ledger)
{
    return (ledger == NULL)
               ? FV_OK
               : fv_journal_reserve(ledger->journal,
                                    fv_journal_size(sizeof(fv_ledger_model_t)) + spare(ledger));
}

fv_status_t fv_ledger_note_truncate(fv_ledger_t *ledger, fv_session_t *session, uint64_t position)
{
    const fv_ledger_truncate_t body = {.position = position};
    const fv_journal_record_t record = {.type = FV_LEDGER_TRUNCATE,
                                        .key = session->slot,
                                        .number = session->last_noted + 1U,
                                        .body = &body,
                                        .n_bytes = sizeof(body)};

    if (ledger == NULL) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(commit_one(ledger, &record, spare(ledger)));
    session->last_noted++;
    return FV_OK;
}

fv_status_t fv_ledger_note_close(fv_ledger_t *ledger, const fv_session_t *session)
{
    const fv_journal_record_t record = {
        .type = FV_LEDGER_CLOSE, .key = session->slot, .number = session->last_noted + 1U};

    if (ledger == NULL) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(commit_one(ledger, &record, 0));
    ledger->n_open -= (ledger->n_open > 0U) ? 1U : 0U;
    return FV_OK;
}

/* ------------------------------------------------------------------ steps */

fv_status_t fv_ledger_reserve(fv_ledger_t *ledger)
{
    size_t n_items = (size_t)(FV_STEP_DEPTH + 1) * FV_STEP_ITEMS_MAX;

    return (ledger == NULL)
               ? FV_OK
               : fv_journal_reserve(ledger->journal,
                                    n_items * fv_journal_size(sizeof(fv_ledger_append_t)) +
                                        spare(ledger));
}

static void note_item(fv_ledger_t *ledger, const fv_request_t *request, uint32_t i)
{
    fv_session_t *session = request->sessions[i];
    const fv_ledger_append_t body = {.position = request->items[i].position,
                                     .n_tokens = request->items[i].n_tokens,
                                     .digest = request->digests[i],
                                     .layer = request->head.layer};
    const fv_journal_record_t record = {.type = FV_LEDGER_APPEND,
                                        .key = session->slot,
                                        .number = ++session->last_noted,
                                        .body = &body,
                                        .n_bytes = sizeof(body)};

    fv_journal_add(ledger->journal, &record, NULL, 0);
}

fv_status_t fv_ledger_note_step(fv_ledger_t *ledger, const fv_step_plan_t *plan)
{
    if (ledger == NULL) {
        return FV_OK;
    }
    uint32_t n = 0;
    for (const fv_request_t *r = plan->joined; r != NULL; r = r->next) {
        for (uint32_t i = 0;
             (r->error.status == FV_OK) && fv_request_is_last_piece(r) && (i < r->head.n_items);
             i++) {
            if ((r->ctl_items[i].flags & FV_ITEM_APPEND) == 0) {
                continue;
            }
            if (n++ == 0) { /* there since they were admitted */
                FV_RETURN_IF_ERR(fv_ledger_reserve(ledger));
            }
            note_item(ledger, r, i);
        }
    }
    return (n == 0) ? FV_OK : fv_journal_commit(ledger->journal);
}

/* ------------------------------------------------------------------ writing anew */

static fv_status_t
add(fv_ledger_t *ledger, const fv_journal_record_t *record, const void *more, size_t more_bytes)
{
    FV_RETURN_IF_ERR(
        fv_journal_reserve(ledger->journal, fv_journal_size(record->n_bytes + more_bytes)));
    fv_journal_add(ledger->journal, record, more, more_bytes);
    return FV_OK;
}

static fv_status_t add_layer(fv_ledger_t *ledger, fv_session_t *session, uint32_t i)
{
    const fv_layer_t *layer = &session->layers[i];
    const fv_ledger_layer_t body = {.n_tokens = layer->n_tokens,
                                    .floor = layer->floor,
                                    .layer = i,
                                    .n_records = layer->n_records};
    const fv_journal_record_t record = {.type = FV_LEDGER_LAYER,
                                        .key = session->slot,
                                        .number = ++session->last_rewritten,
                                        .body = &body,
                                        .n_bytes = sizeof(body)};

    return add(ledger, &record, layer->records, (size_t)layer->n_records * sizeof(*layer->records));
}

static fv_status_t add_session(fv_ledger_t *ledger, fv_session_t *session)
{
    fv_ledger_session_t body;
    const fv_journal_record_t record = {.type = FV_LEDGER_OPEN,
                                        .flags = FV_JOURNAL_FIRST,
                                        .key = session->slot,
                                        .number = fv_session_id_first_number(&session->id),
                                        .body = &body,
                                        .n_bytes = sizeof(body)};

    fill_session(session, &body);
    session->last_rewritten = record.number;
    FV_RETURN_IF_ERR(add(ledger, &record, NULL, 0));
    for (uint32_t i = 0; i < (uint32_t)session->n_layers; i++) {
        if ((session->layers[i].n_tokens > 0) || (session->layers[i].floor > 0)) {
            FV_RETURN_IF_ERR(add_layer(ledger, session, i));
        }
    }
    return FV_OK;
}

static fv_session_t *first_session(const fv_sched_t *sched)
{
    return fv_session_after(fv_sched_sessions(sched), 0);
}

static fv_status_t add_all(fv_ledger_t *ledger, const fv_sched_t *sched)
{
    for (uint32_t i = 0; i < fv_sched_n_models(sched); i++) {
        const fv_journal_record_t record = model_record(sched, i);
        FV_RETURN_IF_ERR(add(ledger, &record, NULL, 0));
    }
    for (fv_session_t *s = first_session(sched); s != NULL; s = s->next) {
        FV_RETURN_IF_ERR(add_session(ledger, s));
    }
    size_t n_open = fv_session_table_count(fv_sched_sessions(sched));
    return fv_journal_reserve(ledger->journal, SPARE_BYTES + n_open * fv_journal_size(0));
}

fv_status_t fv_ledger_rewrite(fv_ledger_t *ledger, const fv_sched_t *sched)
{
    if (ledger->disk != NULL) { /* it has no pages: all of it is what is written here */
        fv_disklog_want_fresh(ledger->disk);
    }
    FV_RETURN_IF_ERR(fv_journal_rewrite_begin(ledger->journal));
    fv_status_t status = add_all(ledger, sched);
    if (status == FV_OK) {
        status = fv_journal_rewrite_end(ledger->journal);
    }
    if (status != FV_OK) {
        fv_journal_rewrite_abort(ledger->journal);
        return status;
    }
    ledger->rewritten_bytes = fv_journal_bytes(ledger->journal);
    ledger->is_undone = false;
    ledger->n_open = fv_session_table_count(fv_sched_sessions(sched));
    for (fv_session_t *s = first_session(sched); s != NULL; s = s->next) {
        s->last_noted = s->last_rewritten; /* only now: the old numbers are past */
    }
    return FV_OK;
}

void fv_ledger_tidy(fv_ledger_t *ledger, const fv_sched_t *sched)
{
    if (ledger == NULL) {
        return;
    }
    uint64_t grown = fv_journal_bytes(ledger->journal) - ledger->rewritten_bytes;
    if ((grown > REWRITE_BYTES) && (grown > ledger->rewritten_bytes) &&
        (fv_ledger_rewrite(ledger, sched) != FV_OK)) {
        fv_warn("durability: the coordinator's journal grows on: %s", fv_error_context());
        ledger->rewritten_bytes = fv_journal_bytes(ledger->journal); /* tried again much later */
    }
}
