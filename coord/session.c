/*
 * session.c - open-addressing table by session id, and the append log of a layer.
 */
#include "coord/session.h"

#include "proto/reduce.h"

#include <stdlib.h>
#include <string.h>

struct fv_session_table {
    uint32_t sessions_max;
    uint32_t n_sessions;
    uint32_t mask; /* n_cells - 1, a power of two at least twice sessions_max */
    uint64_t next_seq;
    fv_session_t *first, *last; /* in order of opening */
    fv_session_t *round;        /* what fv_session_table_round() gives next; NULL: the first */
    fv_session_t **cells; /* [mask + 1], NULL = empty; linear probing, backward-shift deletion */
    uint32_t *free_slots; /* stack */
    uint32_t n_free_slots;
};

static uint32_t hash_of(const fv_session_id_t *id)
{
    uint32_t h = 0;

    memcpy(&h, id->bytes, sizeof(h)); /* ids are random already */
    return h;
}

fv_status_t fv_session_table_create(uint32_t sessions_max, fv_session_table_t **out)
{
    uint32_t n_cells = 16;
    fv_session_table_t *table = calloc(1, sizeof(*table));

    while (n_cells < 2U * sessions_max) {
        n_cells *= 2U;
    }
    if (table == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "session table");
    }
    table->sessions_max = sessions_max;
    table->mask = n_cells - 1U;
    table->cells = calloc(n_cells, sizeof(*table->cells));
    table->free_slots = calloc(sessions_max, sizeof(*table->free_slots));
    if ((table->cells == NULL) || (table->free_slots == NULL)) {
        fv_session_table_destroy(table);
        return fv_fail(FV_ERR_NO_MEMORY, "session table of %u sessions", sessions_max);
    }
    for (uint32_t i = 0; i < sessions_max; i++) {
        table->free_slots[i] = sessions_max - 1U - i; /* slot 0 first */
    }
    table->n_free_slots = sessions_max;
    *out = table;
    return FV_OK;
}

static void session_free(fv_session_t *session)
{
    for (int32_t i = 0; i < session->n_layers; i++) {
        fv_layer_own_tail(&session->layers[i]);
        free(session->layers[i].records);
    }
    free(session);
}

void fv_session_table_destroy(fv_session_table_t *table)
{
    if (table == NULL) {
        return;
    }
    for (fv_session_t *s = table->first; s != NULL;) {
        fv_session_t *next = s->next;
        session_free(s);
        s = next;
    }
    free(table->cells);
    free(table->free_slots);
    free(table);
}

uint32_t fv_session_table_count(const fv_session_table_t *table)
{
    return table->n_sessions;
}

/* The cell that holds `id`, or the empty one where it would go. The table is at most half full. */
static uint32_t find_cell(const fv_session_table_t *table, const fv_session_id_t *id)
{
    uint32_t i = hash_of(id) & table->mask;

    while ((table->cells[i] != NULL) &&
           (memcmp(table->cells[i]->id.bytes, id->bytes, sizeof(id->bytes)) != 0)) {
        i = (i + 1U) & table->mask;
    }
    return i;
}

fv_session_t *fv_session_find(const fv_session_table_t *table, const fv_session_id_t *id)
{
    return table->cells[find_cell(table, id)];
}

/* A session in its cell and at the end of the list; slot and number are the caller's. */
static fv_status_t
insert(fv_session_table_t *table, const fv_session_id_t *id, int32_t n_layers, fv_session_t **out)
{
    uint32_t cell = find_cell(table, id);

    if (table->cells[cell] != NULL) {
        return fv_fail(FV_ERR_INTERNAL, "session id drawn twice");
    }
    fv_session_t *session =
        calloc(1, sizeof(*session) + (size_t)n_layers * sizeof(session->layers[0]));
    if (session == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "session of %d layers", n_layers);
    }
    session->id = *id;
    session->n_layers = n_layers;
    session->prev = table->last;
    *((table->last != NULL) ? &table->last->next : &table->first) = session;
    table->last = session;
    table->cells[cell] = session;
    table->n_sessions++;
    *out = session;
    return FV_OK;
}

fv_status_t fv_session_add(fv_session_table_t *table,
                           const fv_session_id_t *id,
                           int32_t n_layers,
                           fv_session_t **out)
{
    if (table->n_free_slots == 0) {
        return fv_fail(FV_ERR_EXHAUSTED,
                       "sessions: %u are open, the most this service allows (sessions_max)",
                       table->n_sessions);
    }
    FV_RETURN_IF_ERR(insert(table, id, n_layers, out));
    (*out)->slot = table->free_slots[--table->n_free_slots];
    (*out)->opened_seq = ++table->next_seq;
    return FV_OK;
}

fv_status_t fv_session_add_at(fv_session_table_t *table,
                              const fv_session_id_t *id,
                              int32_t n_layers,
                              uint32_t slot,
                              uint64_t opened_seq,
                              fv_session_t **out)
{
    if ((slot >= table->sessions_max) || (table->n_sessions == table->sessions_max) ||
        (opened_seq <= ((table->last != NULL) ? table->last->opened_seq : 0U))) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "session slot %u, number %llu: expected below %u, and more", slot,
                       (unsigned long long)opened_seq, table->sessions_max);
    }
    table->n_free_slots = 0; /* until they are restored */
    FV_RETURN_IF_ERR(insert(table, id, n_layers, out));
    (*out)->slot = slot;
    (*out)->opened_seq = opened_seq;
    table->next_seq = opened_seq;
    return FV_OK;
}

void fv_session_table_restore_slots(fv_session_table_t *table)
{
    uint32_t *slots = table->free_slots; /* for a moment: 1 where one is in use */

    memset(slots, 0, (size_t)table->sessions_max * sizeof(*slots));
    for (const fv_session_t *s = table->first; s != NULL; s = s->next) {
        slots[s->slot] = 1;
    }
    /* the lowest on top: written from the end, the stack never overtakes what is still to be read */
    uint32_t n = table->sessions_max;
    for (uint32_t slot = table->sessions_max; slot > 0; slot--) {
        if (slots[slot - 1U] == 0) {
            slots[--n] = slot - 1U;
        }
    }
    table->n_free_slots = table->sessions_max - n;
    for (uint32_t i = 0; i < table->n_free_slots / 2U; i++) {
        uint32_t other = table->sessions_max - 1U - i;
        uint32_t low = slots[n + i];
        slots[n + i] = slots[other];
        slots[other] = low;
    }
    memmove(slots, slots + n, (size_t)table->n_free_slots * sizeof(*slots));
}

fv_session_t *fv_session_table_round(fv_session_table_t *table)
{
    fv_session_t *session = (table->round != NULL) ? table->round : table->first;

    table->round = (session == NULL) ? NULL : session->next;
    return session;
}

void fv_session_list_add(fv_session_list_t *list, fv_session_t *session)
{
    session->list = list;
    session->prev_of_list = NULL;
    session->next_of_list = list->first;
    if (list->first != NULL) {
        list->first->prev_of_list = session;
    }
    list->first = session;
}

static void list_remove(fv_session_t *session)
{
    if (session->list == NULL) {
        return;
    }
    *((session->prev_of_list != NULL) ? &session->prev_of_list->next_of_list
                                      : &session->list->first) = session->next_of_list;
    if (session->next_of_list != NULL) {
        session->next_of_list->prev_of_list = session->prev_of_list;
    }
    session->list = NULL;
}

void fv_session_remove(fv_session_table_t *table, fv_session_t *session)
{
    uint32_t hole = find_cell(table, &session->id);
    uint32_t i = hole;

    if (table->round == session) {
        table->round = session->next;
    }
    list_remove(session);
    /* Backward shift: pull back every later entry of the run that may move into the hole. */
    table->cells[hole] = NULL;
    for (;;) {
        i = (i + 1U) & table->mask;
        if (table->cells[i] == NULL) {
            break;
        }
        uint32_t home = hash_of(&table->cells[i]->id) & table->mask;
        if (((i - home) & table->mask) >= ((i - hole) & table->mask)) {
            table->cells[hole] = table->cells[i];
            table->cells[i] = NULL;
            hole = i;
        }
    }
    *((session->prev != NULL) ? &session->prev->next : &table->first) = session->next;
    *((session->next != NULL) ? &session->next->prev : &table->last) = session->prev;
    if (table->n_free_slots < table->sessions_max) {
        table->free_slots[table->n_free_slots++] = session->slot;
    }
    table->n_sessions--;
    session_free(session);
}

fv_session_t *fv_session_after(const fv_session_table_t *table, uint64_t after)
{
    fv_session_t *s = table->first;

    while ((s != NULL) && (s->opened_seq <= after)) {
        s = s->next;
    }
    return s;
}

uint64_t fv_session_tokens(const fv_session_t *session)
{
    uint64_t longest = 0;

    for (int32_t i = 0; i < session->n_layers; i++) {
        if (session->layers[i].n_tokens > longest) {
            longest = session->layers[i].n_tokens;
        }
    }
    return longest;
}

fv_status_t fv_layer_reserve_record(fv_layer_t *layer)
{
    if (layer->n_records < layer->records_cap) {
        return FV_OK;
    }
    uint32_t cap = (layer->records_cap == 0) ? 8U : (layer->records_cap * 2U);
    fv_append_record_t *records = realloc(layer->records, (size_t)cap * sizeof(*records));
    if (records == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "append log of %u records", cap);
    }
    layer->records = records;
    layer->records_cap = cap;
    return FV_OK;
}

void fv_layer_add_record(fv_layer_t *layer, uint64_t position, uint32_t n_tokens, uint32_t digest)
{
    FV_ASSERT(layer->n_records < layer->records_cap);
    layer->records[layer->n_records++] =
        (fv_append_record_t){.position = position, .n_tokens = n_tokens, .digest = digest};
}

const fv_append_record_t *
fv_layer_find_record(const fv_layer_t *layer, uint64_t position, uint32_t n_tokens)
{
    uint32_t low = 0;
    uint32_t high = layer->n_records;

    while (low < high) {
        uint32_t middle = low + ((high - low) / 2U);
        if (layer->records[middle].position < position) {
            low = middle + 1U;
        } else {
            high = middle;
        }
    }
    if ((low < layer->n_records) && (layer->records[low].position == position) &&
        (layer->records[low].n_tokens == n_tokens)) {
        return &layer->records[low];
    }
    return NULL;
}

bool fv_layer_copies_tail(const fv_layer_t *layer)
{
    return ((layer->n_tokens % FV_PAGE_TOKENS) != 0) &&
           (layer->tail_unknown || ((layer->tail != NULL) && (layer->tail->n_sharers > 1U)));
}

void fv_layer_own_tail(fv_layer_t *layer)
{
    if (layer->tail != NULL) {
        layer->tail->n_sharers--;
        if (layer->tail->n_sharers == 0) {
            free(layer->tail);
        }
        layer->tail = NULL;
    }
    layer->tail_unknown = false;
}

/* Forgets the tokens past `position`, and their records. */
static void cut(fv_layer_t *layer, uint64_t position)
{
    layer->n_tokens = position;
    layer->floor = (layer->floor < position) ? layer->floor : position;
    while ((layer->n_records > 0) && (layer->records[layer->n_records - 1U].position +
                                          layer->records[layer->n_records - 1U].n_tokens >
                                      position)) {
        layer->n_records--;
    }
}

void fv_layer_truncate(fv_layer_t *layer, uint64_t position, bool was_forked)
{
    bool same_page = (layer->n_tokens / FV_PAGE_TOKENS) == (position / FV_PAGE_TOKENS);

    if (layer->n_tokens <= position) {
        return;
    }
    if (!same_page) { /* an old page becomes the last one */
        fv_layer_own_tail(layer);
        layer->tail_unknown = was_forked;
    }
    cut(layer, position);
}

/* Parent and child now hold the same partial page. */
static fv_status_t share_tail(fv_layer_t *parent, fv_layer_t *child)
{
    if (parent->tail == NULL) {
        parent->tail = calloc(1, sizeof(*parent->tail));
        if (parent->tail == NULL) {
            return fv_fail(FV_ERR_NO_MEMORY, "fork");
        }
        parent->tail->n_sharers = 1;
    }
    parent->tail->n_sharers++;
    child->tail = parent->tail;
    child->tail_unknown = parent->tail_unknown;
    return FV_OK;
}

fv_status_t fv_layer_fork(fv_layer_t *parent, uint64_t at, fv_layer_t *child)
{
    fv_layer_t view = {.n_tokens = parent->n_tokens,
                       .floor = parent->floor,
                       .records = parent->records,
                       .n_records = parent->n_records};

    if (at < parent->n_tokens) {
        cut(&view, at);
    }
    child->n_tokens = view.n_tokens;
    child->floor = view.floor;
    if (view.n_records > 0) {
        child->records = malloc((size_t)view.n_records * sizeof(*child->records));
        if (child->records == NULL) {
            return fv_fail(FV_ERR_NO_MEMORY, "append log of %u records", view.n_records);
        }
        memcpy(child->records, parent->records, (size_t)view.n_records * sizeof(*child->records));
        child->n_records = view.n_records;
        child->records_cap = view.n_records;
    }
    if ((child->n_tokens % FV_PAGE_TOKENS) == 0) {
        return FV_OK;
    }
    if ((child->n_tokens / FV_PAGE_TOKENS) == (parent->n_tokens / FV_PAGE_TOKENS)) {
        return share_tail(parent, child);
    }
    child->tail_unknown = true; /* the parent's page is full: it never copies it, the child does */
    return FV_OK;
}

uint64_t fv_session_layer_freed(const fv_session_t *session,
                                const fv_model_spec_t *spec,
                                int32_t cell,
                                int32_t layer)
{
    return fv_reduce_freed_before(spec, &spec->policies[spec->layer_policy[layer]],
                                  &session->placement, cell, session->layers[layer].floor);
}

uint64_t fv_session_layer_pages(const fv_session_t *session,
                                const fv_model_spec_t *spec,
                                int32_t cell,
                                int32_t layer)
{
    const fv_placement_t *p = &session->placement;
    const fv_layer_t *l = &session->layers[layer];
    int32_t hp = cell / p->n_ctx_parts;
    uint64_t n_heads = (uint64_t)fv_placement_n_heads(p, spec, hp);

    return fv_placement_pages(p, cell % p->n_ctx_parts, l->n_tokens) * n_heads -
           fv_session_layer_freed(session, spec, cell, layer);
}

uint64_t
fv_session_cell_bytes(const fv_session_t *session, const fv_model_spec_t *spec, int32_t cell)
{
    uint64_t n_pages = 0;
    uint64_t of_layer = 0;

    for (int32_t i = 0; i < session->n_layers; i++) {
        const fv_layer_t *l = &session->layers[i];
        /* layers mostly are as the one before: counted once */
        if ((i == 0) || (l->n_tokens != l[-1].n_tokens) || (l->floor != l[-1].floor) ||
            (spec->layer_policy[i] != spec->layer_policy[i - 1])) {
            of_layer = fv_session_layer_pages(session, spec, cell, i);
        }
        n_pages += of_layer;
    }
    return n_pages * fv_model_page_bytes(spec);
}
