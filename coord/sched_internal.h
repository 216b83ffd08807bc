/*
 * sched_internal.h - the scheduler's state, shared by sched.c (commands), sched_step.c (steps) and their parts.
 */
#ifndef FV_COORD_SCHED_INTERNAL_H
#define FV_COORD_SCHED_INTERNAL_H

#include "coord/sched.h"

/* Tokens of a session: keeps local page numbers in 31 bits, and byte counts far from 64. */
#define FV_POSITION_MAX ((uint64_t)1 << 36)

typedef struct fv_model {
    char id[FV_MODEL_ID_BYTES];
    fv_model_spec_t spec;
    fv_principal_t *owner; /* whose quota it counts for; NULL: nobody's */
} fv_model_t;

/* Pages that a step under way will take on one rank. */
typedef struct fv_promise {
    uint64_t n_pages; /* of all models together */
    uint32_t by_model[FV_MODELS_MAX];
} fv_promise_t;

/* Promises by slot of a step, and of what later pieces of the requests between two pieces will take. */
#define FV_PROMISE_LATER FV_STEP_DEPTH
#define FV_PROMISES      (FV_STEP_DEPTH + 1U)

struct fv_sched {
    fv_sched_config_t config;
    fv_budget_t budget;
    uint32_t n_passed_over; /* steps in a row in which prefill waited and did not fit */
    fv_session_table_t *sessions;
    fv_planner_t *planner;
    fv_model_t models[FV_MODELS_MAX];
    uint32_t n_models;
    fv_ctl_memory_t *ranks; /* [n_ranks] mirror of each rank's free memory, promises deducted */
    fv_promise_t *promises; /* [FV_PROMISES, n_ranks] */
    uint64_t under_way[FV_STEP_DEPTH]; /* step ids by slot; 0: none */
    uint32_t last_slot;
    uint64_t *pages_needed;  /* [n_ranks] scratch of one request */
    uint32_t *touched_ranks; /* [n_ranks] scratch: the ranks with pages_needed > 0 */
    fv_request_t *queue_head, **queue_tail;
    uint32_t n_queued;
    uint64_t n_bytes_queued;
    uint64_t next_step_id, next_mark;
    int64_t formed_us; /* when a step was formed last */
    uint64_t n_tokens_appended;
};

/* sched_memory.c: deducts from a rank's mirror what the steps under way will take there. */
void fv_sched_deduct_promises(fv_sched_t *sched, uint32_t rank);
void fv_sched_forget_promises(fv_sched_t *sched, uint32_t slot);

/* Tells the planner what a session holds now on one cell. */
void fv_sched_account(fv_sched_t *sched, fv_session_t *session, int32_t cell, uint64_t held_bytes);

/*
 * All or nothing: charges the owner's quota and takes the request's pages on every rank from the mirror, as a promise for
 * later, or neither. ctl_items have the whole request.
 * Errors: FV_ERR_EXHAUSTED.
 */
FV_MUST_CHECK fv_status_t fv_sched_reserve(fv_sched_t *sched, fv_request_t *request);
/* What the request's piece takes is promised for the step in `slot` now. */
void fv_sched_promise_piece(fv_sched_t *sched, const fv_request_t *request, uint32_t slot);
/* sched_step.c: to the back of the queue. */
void fv_sched_enqueue(fv_sched_t *sched, fv_request_t *request);

/*
 * sched_check.c: finds the items' sessions, the model and its spec, and checks all that does not depend on the sessions' lengths.
 * Nothing is taken; the sessions count as used at formed_us. Repeated while the request waits: its sessions may go meanwhile.
 * Errors: FV_ERR_NOT_FOUND, FV_ERR_INVALID_ARG, FV_ERR_EXHAUSTED (batch_max), each naming the field.
 */
FV_MUST_CHECK fv_status_t fv_sched_resolve(fv_sched_t *sched, fv_request_t *request);
/*
 * After fv_sched_resolve(), and when no step under way may change the lengths: what depends on them. ctl_items become those of
 * the whole request. Errors: FV_ERR_OUT_OF_RANGE, FV_ERR_EXHAUSTED (session_tokens_max), FV_ERR_PRECONDITION.
 */
FV_MUST_CHECK fv_status_t fv_sched_check_items(const fv_sched_t *sched, fv_request_t *request);
/* Bytes of a resolved request's answer: out and lse. */
uint64_t fv_request_reply_bytes(const fv_request_t *request);

/*
 * sched_piece.c: how many of the request's next tokens fit the allowance, which they are taken from; adds their cost.
 * is_first: the step has no other prefill, and takes fv_budget_least() in any case.
 */
uint64_t fv_sched_size_piece(const fv_sched_t *sched,
                             const fv_request_t *request,
                             bool is_first,
                             fv_allowance_t *allowance,
                             double *macs);
/* ctl_items become those of the next n_tokens. */
void fv_sched_set_piece(fv_request_t *request, uint64_t n_tokens);
/* Of the next piece: whether KV moves, for each of its items that is prefill (coord/plan_prefill.h). */
void fv_sched_choose_ways(const fv_sched_t *sched, fv_request_t *request);
void fv_sched_hold_layers(fv_request_t *request, bool is_held);
/* Its piece is done: queues what is left of it. False: nothing is, or it failed. */
bool fv_sched_next_piece(fv_sched_t *sched, fv_request_t *request);

/*
 * Item i, an append, has run, and its layer has n_tokens now. The layer's floor moves to its position, committed or
 * not: some ranks may have freed what lies behind it. What the cells hold grows by the pages up to n_tokens, and shrinks by those.
 */
void fv_sched_account_item(fv_sched_t *sched,
                           const fv_request_t *request,
                           uint32_t i,
                           uint64_t n_tokens);

/* What is to be said of a model that is accepted, for a person. */
void fv_sched_warn(const fv_model_spec_t *spec, fv_register_response_t *response);

#endif /* FV_COORD_SCHED_INTERNAL_H */
