/*
 * session.h - the coordinator's table of sessions: lengths per layer, and what proves a retry.
 *
 * Part of the scheduler core (coord/sched.h): no I/O, no clock, no lock; one thread.
 *
 * Exactly-once append. Each layer remembers every append as (position, n_tokens, crc32c of the K and V bytes
 * as received). A request at a lower position than the layer's length that repeats one of them is a retry.
 */
#ifndef FV_COORD_SESSION_H
#define FV_COORD_SESSION_H

#include "common/model.h"
#include "common/status.h"
#include "coord/auth.h"
#include "coord/plan.h"
#include "proto/placement.h"
#include "proto/wire.h"

#include <stdbool.h>
#include <stdint.h>

/* One acknowledged append of a layer. */
typedef struct fv_append_record {
    uint64_t position;
    uint32_t n_tokens;
    uint32_t digest; /* crc32c of K then V, as received */
} fv_append_record_t;

/* A partial page that a fork shares. Owned by its sharers together. */
typedef struct fv_tail {
    uint32_t n_sharers;
} fv_tail_t;

typedef struct fv_layer {
    uint64_t n_tokens; /* committed */
    uint64_t
        floor; /* position of the last append, or where the layer was cut: queries from here on are possible */
    uint64_t step_mark;   /* the last step that a request of this layer joined or waited for */
    uint64_t joined_mark; /* the last step that a request of this layer joined */
    const struct fv_request *half_way; /* it has appended some of its tokens here, and goes on */
    uint64_t request_mark; /* the last request that was checked here: finds an item given twice */
    fv_append_record_t *records; /* ascending position; owned */
    uint32_t n_records, records_cap;
    /*
     * Who else holds the partial last page: an append into it copies it first, which takes a page. `tail` counts the sessions
     * that a fork left with this very page (NULL: only this one); tail_unknown says that a cut made an old page the last
     * one, which others may hold.
     */
    fv_tail_t *tail;
    bool tail_unknown;
} fv_layer_t;

/* Sessions that have something in common; each is on one list at most. */
typedef struct fv_session_list {
    struct fv_session *first;
} fv_session_list_t;

typedef struct fv_session {
    fv_session_id_t id, parent;
    bool has_parent, is_forked; /* is_forked: it was a fork's parent or child */
    uint32_t slot, model_slot;
    uint64_t created_unix_ms;
    int64_t used_us;       /* when somebody used it last */
    fv_principal_t *owner; /* NULL: nobody's */
    bool closes_with_stream;
    bool is_orphan; /* and a stream that is gone may have used it: it came back after a restart */
    fv_session_list_t *list; /* NULL: on none */
    struct fv_session *next_of_list, *prev_of_list;
    uint64_t opened_seq;            /* order of opening: pages of ListSessions */
    struct fv_session *next, *prev; /* in order of opening */
    fv_placement_t placement;
    char reason[FV_PLAN_REASON_BYTES];
    /* By cell: bytes of pages held, and what the planner was told (held, or what was expected at opening). */
    uint64_t held[FV_PLACEMENT_RANKS_MAX], accounted[FV_PLACEMENT_RANKS_MAX];
    uint64_t n_visits,
        n_moves; /* pieces of prompts over several context parts: how they were computed */
    uint64_t last_noted, last_rewritten; /* number of the last record in the ledger */
    bool is_lost;                        /* while it is loaded: a record is damaged */
    int32_t n_layers;
    fv_layer_t layers[]; /* [n_layers] */
} fv_session_t;

typedef struct fv_session_table fv_session_table_t;

FV_MUST_CHECK fv_status_t fv_session_table_create(uint32_t sessions_max, fv_session_table_t **out);
void fv_session_table_destroy(fv_session_table_t *table);
uint32_t fv_session_table_count(const fv_session_table_t *table);

/* NULL when there is none. */
fv_session_t *fv_session_find(const fv_session_table_t *table, const fv_session_id_t *id);

/*
 * A new empty session with a slot. `id` is fresh random.
 * Errors: FV_ERR_EXHAUSTED at sessions_max; FV_ERR_NO_MEMORY.
 */
FV_MUST_CHECK fv_status_t fv_session_add(fv_session_table_t *table,
                                         const fv_session_id_t *id,
                                         int32_t n_layers,
                                         fv_session_t **out);
/*
 * For a table that is filled from a ledger: at a slot that nobody has, with its number in the order of opening; then
 * fv_session_table_restore_slots() once.
 * Errors: FV_ERR_INVALID_ARG for a slot beyond sessions_max; FV_ERR_NO_MEMORY.
 */
FV_MUST_CHECK fv_status_t fv_session_add_at(fv_session_table_t *table,
                                            const fv_session_id_t *id,
                                            int32_t n_layers,
                                            uint32_t slot,
                                            uint64_t opened_seq,
                                            fv_session_t **out);
void fv_session_table_restore_slots(fv_session_table_t *table);
/* Takes it off its list, too. */
void fv_session_remove(fv_session_table_t *table, fv_session_t *session);

/* The first session with opened_seq > after, NULL at the end; session->next goes on. O(sessions). */
fv_session_t *fv_session_after(const fv_session_table_t *table, uint64_t after);

/* One after the other, round and round, whatever is added or removed meanwhile; NULL when there is none. O(1). */
fv_session_t *fv_session_table_round(fv_session_table_t *table);

/* It must be on none. */
void fv_session_list_add(fv_session_list_t *list, fv_session_t *session);

/* Tokens of the longest layer. */
uint64_t fv_session_tokens(const fv_session_t *session);

/* Makes room for one more record, so that committing can not fail. Cost: amortised O(1). */
FV_MUST_CHECK fv_status_t fv_layer_reserve_record(fv_layer_t *layer);
void fv_layer_add_record(fv_layer_t *layer, uint64_t position, uint32_t n_tokens, uint32_t digest);
/* The record of an append of exactly these tokens, or NULL. */
const fv_append_record_t *
fv_layer_find_record(const fv_layer_t *layer, uint64_t position, uint32_t n_tokens);
/* Cuts the layer to `position` tokens; records that reach past it go. was_forked: of its session. */
void fv_layer_truncate(fv_layer_t *layer, uint64_t position, bool was_forked);
/* Makes `child` (empty) hold the parent's first min(length, at) tokens' records, and share its last page. */
FV_MUST_CHECK fv_status_t fv_layer_fork(fv_layer_t *parent, uint64_t at, fv_layer_t *child);
/* True when an append at the layer's end copies a page first. */
bool fv_layer_copies_tail(const fv_layer_t *layer);
/* The layer's last page is its own from now on (or there is none): it has been copied, filled or cut off. */
void fv_layer_own_tail(fv_layer_t *layer);

/* Pages that the session holds of a layer on one cell of its placement, over the cell's KV heads. */
uint64_t fv_session_layer_pages(const fv_session_t *session,
                                const fv_model_spec_t *spec,
                                int32_t cell,
                                int32_t layer);

/* And those it has given back, of the tokens that it has. */
uint64_t fv_session_layer_freed(const fv_session_t *session,
                                const fv_model_spec_t *spec,
                                int32_t cell,
                                int32_t layer);

/* Bytes of whole pages that the session holds on one cell of its placement: what no query can read any more is not. */
uint64_t
fv_session_cell_bytes(const fv_session_t *session, const fv_model_spec_t *spec, int32_t cell);

#endif /* FV_COORD_SESSION_H */
