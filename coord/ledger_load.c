/*
 * ledger_load.c - plays the coordinator's journal into an empty scheduler core.
 *
 * Nothing of a file is believed: a record that can not be so makes its session lost, and the others go on.
 */
#include "common/log.h"
#include "coord/ledger_internal.h"
#include "coord/sched_internal.h"

#include <stdlib.h>
#include <string.h>

/* Whom a damaged opening concerns; forgotten when the slot is free again. */
typedef struct loss {
    bool is_set;
    fv_session_id_t id;
    fv_principal_t *owner;
} loss_t;

typedef struct player {
    fv_sched_t *sched;
    fv_principal_t *(*owner)(void *arg, const char *name);
    void *arg;
    fv_session_t **by_slot; /* [sessions_max] */
    loss_t *losses;         /* [sessions_max] of sessions that could not be made */
    uint32_t n_slots;
    fv_lost_t *lost;
} player_t;

static fv_status_t bad(const char *what)
{
    return fv_fail(FV_ERR_DATA_LOSS, "a record of %s can not be so", what);
}

/* Nothing is in the slot, nor was lost there. */
static void drop(player_t *p, uint32_t slot)
{
    if (slot < p->n_slots) {
        p->losses[slot].is_set = false;
    }
    if ((slot < p->n_slots) && (p->by_slot[slot] != NULL)) {
        fv_session_remove(p->sched->sessions, p->by_slot[slot]);
        p->by_slot[slot] = NULL;
    }
}

static fv_status_t play_model(player_t *p, const fv_journal_record_t *record)
{
    static fv_ledger_model_t model; /* large; one thread */
    fv_register_response_t response;
    static fv_ctl_model_t message;
    bool is_new = false;

    if ((record->n_bytes != sizeof(model)) ||
        (record->key - FV_LEDGER_MODEL_KEY != p->sched->n_models)) {
        return bad("a model");
    }
    memcpy(&model, record->body, sizeof(model));
    if (memchr(model.owner, '\0', sizeof(model.owner)) == NULL) {
        return bad("a model");
    }
    /* it is there, even if its owner may have fewer now */
    FV_RETURN_IF_ERR(fv_sched_register(p->sched, &model.spec, NULL, &response, &is_new, &message));
    if (is_new && (model.owner[0] != '\0')) {
        fv_sched_own_model(p->sched, message.model_slot, p->owner(p->arg, model.owner));
    }
    return FV_OK;
}

static bool is_placement(const player_t *p, const fv_model_spec_t *spec, const fv_placement_t *at)
{
    uint32_t n_cells = (uint32_t)at->n_head_parts * at->n_ctx_parts;

    if ((n_cells == 0) || (n_cells > FV_PLACEMENT_RANKS_MAX) ||
        ((int32_t)at->n_head_parts > fv_model_groups(spec) * spec->n_q_heads) ||
        (at->shard_tokens == 0) || (at->shard_tokens % FV_PAGE_TOKENS != 0)) {
        return false;
    }
    for (uint32_t i = 0; i < n_cells; i++) {
        if (at->ranks[i] >= p->sched->config.n_ranks) {
            return false;
        }
    }
    return true;
}

static fv_status_t
make_session(player_t *p, uint32_t slot, const fv_ledger_session_t *from, fv_session_t **out)
{
    if ((from->model_slot >= p->sched->n_models) || (slot >= p->n_slots) ||
        !is_placement(p, &p->sched->models[from->model_slot].spec, &from->placement) ||
        (memchr(from->owner, '\0', sizeof(from->owner)) == NULL) ||
        (memchr(from->reason, '\0', sizeof(from->reason)) == NULL) ||
        (fv_session_find(p->sched->sessions, &from->id) != NULL)) {
        return bad("opening");
    }
    FV_RETURN_IF_ERR(fv_session_add_at(p->sched->sessions, &from->id,
                                       p->sched->models[from->model_slot].spec.n_layers, slot,
                                       from->opened_seq, out));
    fv_session_t *session = *out;
    session->model_slot = from->model_slot;
    session->parent = from->parent;
    session->has_parent = from->has_parent != 0;
    session->is_forked = from->is_forked != 0;
    session->closes_with_stream = from->closes_with_stream != 0;
    session->created_unix_ms = from->created_unix_ms;
    session->placement = from->placement;
    session->last_noted = fv_session_id_first_number(&from->id);
    memcpy(session->reason, from->reason, sizeof(session->reason));
    if (from->owner[0] != '\0') {
        session->owner = p->owner(p->arg, from->owner);
    }
    p->by_slot[slot] = session;
    return FV_OK;
}

static fv_status_t
begin_session(player_t *p, const fv_journal_record_t *record, const fv_ledger_session_t *from)
{
    fv_session_t *session = NULL;
    fv_session_t *parent = NULL;

    if (record->type == FV_LEDGER_FORK) {
        parent = (from->parent_slot < p->n_slots) ? p->by_slot[from->parent_slot] : NULL;
        if ((parent == NULL) || parent->is_lost || (parent->model_slot != from->model_slot)) {
            return fv_fail(FV_ERR_DATA_LOSS, "the parent of a fork is lost");
        }
    }
    FV_RETURN_IF_ERR(make_session(p, record->key, from, &session));
    for (int32_t i = 0; (parent != NULL) && (i < session->n_layers); i++) {
        parent->is_forked = true;
        FV_RETURN_IF_ERR(fv_layer_fork(&parent->layers[i], from->at_position, &session->layers[i]));
    }
    return FV_OK;
}

static fv_status_t play_session(player_t *p, const fv_journal_record_t *record)
{
    fv_ledger_session_t from;

    if ((record->n_bytes != sizeof(from)) || (record->key >= p->n_slots)) {
        return bad("opening");
    }
    memcpy(&from, record->body, sizeof(from));
    fv_status_t status = begin_session(p, record, &from);
    bool is_owned =
        (from.owner[0] != '\0') && (memchr(from.owner, '\0', sizeof(from.owner)) != NULL);
    if (status != FV_OK) { /* whose it was can be told */
        p->losses[record->key] = (loss_t){
            .is_set = true, .id = from.id, .owner = is_owned ? p->owner(p->arg, from.owner) : NULL};
    }
    return status;
}

static fv_status_t play_append(fv_session_t *session, const fv_journal_record_t *record)
{
    fv_ledger_append_t a;

    if (record->n_bytes != sizeof(a)) {
        return bad("an append");
    }
    memcpy(&a, record->body, sizeof(a));
    if ((a.layer >= (uint32_t)session->n_layers) ||
        (a.position != session->layers[a.layer].n_tokens) || (a.n_tokens == 0) ||
        (a.position + a.n_tokens > FV_POSITION_MAX)) {
        return bad("an append");
    }
    fv_layer_t *layer = &session->layers[a.layer];
    FV_RETURN_IF_ERR(fv_layer_reserve_record(layer));
    fv_layer_own_tail(layer);
    fv_layer_add_record(layer, a.position, a.n_tokens, a.digest);
    layer->n_tokens = a.position + a.n_tokens;
    layer->floor = a.position;
    return FV_OK;
}

static fv_status_t play_layer(fv_session_t *session, const fv_journal_record_t *record)
{
    fv_ledger_layer_t l;

    if (record->n_bytes < sizeof(l)) {
        return bad("a layer");
    }
    memcpy(&l, record->body, sizeof(l));
    const fv_append_record_t *records = (const void *)((const uint8_t *)record->body + sizeof(l));
    if ((l.layer >= (uint32_t)session->n_layers) || (l.n_tokens > FV_POSITION_MAX) ||
        (l.floor > l.n_tokens) || (session->layers[l.layer].n_tokens != 0) ||
        ((record->n_bytes - sizeof(l)) != (size_t)l.n_records * sizeof(*records))) {
        return bad("a layer");
    }
    fv_layer_t *layer = &session->layers[l.layer];
    uint64_t end = 0;
    for (uint32_t i = 0; i < l.n_records; i++) {
        if ((records[i].position < end) || (records[i].n_tokens == 0) ||
            (records[i].position + records[i].n_tokens > l.n_tokens)) {
            return bad("a layer");
        }
        end = records[i].position + records[i].n_tokens;
        FV_RETURN_IF_ERR(fv_layer_reserve_record(layer));
        fv_layer_add_record(layer, records[i].position, records[i].n_tokens, records[i].digest);
    }
    layer->n_tokens = l.n_tokens;
    layer->floor = l.floor;
    return FV_OK;
}

static fv_status_t play_truncate(fv_session_t *session, const fv_journal_record_t *record)
{
    fv_ledger_truncate_t cut;

    if (record->n_bytes != sizeof(cut)) {
        return bad("a cut");
    }
    memcpy(&cut, record->body, sizeof(cut));
    for (int32_t i = 0; i < session->n_layers; i++) {
        fv_layer_truncate(&session->layers[i], cut.position, session->is_forked);
    }
    return FV_OK;
}

static fv_status_t play_later(fv_session_t *session, const fv_journal_record_t *record)
{
    if (record->body == NULL) {
        return fv_fail(FV_ERR_DATA_LOSS, "a record is damaged");
    }
    if (record->number != session->last_noted + 1U) {
        return fv_fail(FV_ERR_DATA_LOSS, "a record is missing");
    }
    session->last_noted++;
    switch (record->type) {
    case FV_LEDGER_APPEND:
        return play_append(session, record);
    case FV_LEDGER_LAYER:
        return play_layer(session, record);
    case FV_LEDGER_TRUNCATE:
        return play_truncate(session, record);
    default:
        return bad("an unknown type");
    }
}

static fv_status_t play_first(player_t *p, const fv_journal_record_t *record)
{
    if (record->key < FV_LEDGER_MODEL_KEY) {
        drop(p, record->key); /* its CLOSE was lost, or it would not be there */
    }
    if (record->body == NULL) {
        return fv_fail(FV_ERR_DATA_LOSS, "a record is damaged");
    }
    switch (record->type) {
    case FV_LEDGER_MODEL:
        return play_model(p, record);
    case FV_LEDGER_OPEN:
    case FV_LEDGER_FORK:
        return play_session(p, record);
    default:
        return bad("an unknown type");
    }
}

static fv_status_t play(void *arg, const fv_journal_record_t *record)
{
    player_t *p = arg;
    fv_session_t *session = (record->key < p->n_slots) ? p->by_slot[record->key] : NULL;
    fv_status_t status = FV_OK;

    if ((record->flags & FV_JOURNAL_FIRST) != 0U) {
        status = play_first(p, record);
    } else if (record->type == FV_LEDGER_CLOSE) {
        drop(p, record->key); /* whatever else was wrong with it */
    } else if ((session != NULL) && !session->is_lost) {
        status = play_later(session, record);
        session->is_lost = status != FV_OK;
    }
    if (status == FV_ERR_NO_MEMORY) {
        return status;
    }
    if (status != FV_OK) {
        fv_warn("durability: coordinator, session or model %u: %s",
                record->key & ~FV_LEDGER_MODEL_KEY, fv_error_context());
    }
    return FV_OK;
}

/* Whoever asks for it is told so. */
static void lose(player_t *p, uint32_t slot, const fv_session_id_t *id, fv_principal_t *owner)
{
    const fv_lost_session_t lost = {.id = *id, .owner = owner, .rank = FV_LOST_RECORDS};
    char hex[FV_SESSION_ID_CHARS + 1];

    drop(p, slot);
    fv_session_id_format(&lost.id, hex);
    fv_error("durability: session %s is lost: its records are damaged", hex);
    fv_lost_add(p->lost, &lost);
}

/* Sessions whose records are damaged go; of the others a shared last page may be shared with anybody. */
static void finish(player_t *p)
{
    for (uint32_t slot = 0; slot < p->n_slots; slot++) {
        fv_session_t *session = p->by_slot[slot];
        const loss_t loss = p->losses[slot];
        if ((session == NULL) && loss.is_set &&
            (fv_session_find(p->sched->sessions, &loss.id) == NULL)) {
            lose(p, slot, &loss.id, loss.owner);
        }
        if (session == NULL) {
            continue;
        }
        if (session->is_lost) {
            const fv_session_id_t id = session->id;
            lose(p, slot, &id, session->owner);
            continue;
        }
        for (int32_t i = 0; i < session->n_layers; i++) {
            fv_layer_own_tail(&session->layers[i]);
            session->layers[i].tail_unknown = session->is_forked;
        }
    }
    fv_session_table_restore_slots(p->sched->sessions);
}

fv_status_t fv_ledger_load(fv_ledger_t *ledger,
                           fv_sched_t *sched,
                           fv_principal_t *(*owner)(void *arg, const char *name),
                           void *arg,
                           fv_lost_t *lost,
                           bool *out_has_holes)
{
    player_t p = {.sched = sched,
                  .owner = owner,
                  .arg = arg,
                  .lost = lost,
                  .n_slots = sched->config.sessions_max};
    fv_journal_report_t report = {0};

    p.by_slot = calloc((size_t)p.n_slots + 1U, sizeof(fv_session_t *));
    p.losses = calloc((size_t)p.n_slots + 1U, sizeof(*p.losses));
    if ((p.by_slot == NULL) || (p.losses == NULL)) {
        free(p.by_slot);
        free(p.losses);
        return fv_fail(FV_ERR_NO_MEMORY, "%u sessions", p.n_slots);
    }
    fv_status_t status = fv_journal_read(ledger->journal, play, &p, &report);
    if (status == FV_OK) {
        finish(&p);
    }
    free(p.by_slot);
    free(p.losses);
    if ((report.n_damaged > 0) || (report.n_holes > 0) || (report.tail_bytes > 0)) {
        fv_warn("durability: coordinator: %llu damaged records, %llu holes, %llu bytes at the end",
                (unsigned long long)report.n_damaged, (unsigned long long)report.n_holes,
                (unsigned long long)report.tail_bytes);
    }
    *out_has_holes = (report.n_holes > 0) || (report.tail_bytes > 0);
    ledger->rewritten_bytes = fv_journal_bytes(ledger->journal);
    return status;
}
