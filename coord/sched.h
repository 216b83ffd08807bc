/*
 * sched.h - the scheduler core: events in, what to do out. No I/O, no clock, no lock, no thread.
 *
 * Decode path: station 3 of 10. Before: coord/engine_inbox.c (the engine owns the clock, the doors and the
 * requests' memory). After: coord/engine_step.c, with a step to run.
 *
 * Two kinds of events:
 *  - session commands (register, open, fork, truncate, close) take effect when no step is under way: the core changes its
 *    tables and says which control message goes to which ranks;
 *  - requests queue in order of arrival. fv_sched_next_step() forms a step of everything that waits and may
 *    run together (continuous batching); fv_sched_step_done() commits it. Up to FV_STEP_DEPTH steps are under way.
 *
 * Rules of a step:
 *  - at most one request of all steps under way touches a given (session, layer); a later one waits for a later step, and so
 *    does everything behind it on that layer: appends keep their order, and nobody overtakes for ever;
 *  - a request is checked against the state it will find: lengths, geometry, memory on every rank. One that fails is
 *    answered and changes nothing; the others go on;
 *  - step_tokens_max bounds the query tokens of a step;
 *  - decode goes first. A request with more than FV_DECODE_TOKENS_MAX tokens an item is a prefill: a step takes as much
 *    of the prefills as its allowance says (coord/sched_budget.h), oldest first, and what is left of a request goes to the
 *    back of the queue: it is served in pieces, over several steps (coord/sched_piece.c). It is admitted, committed
 *    and answered whole. Only appends without the causal mask are not cut.
 *
 * Two steps under way. They share no (session, layer), so that either may be committed, or undone, whatever becomes of the
 * other. A request that failed on a rank must be cut back on all ranks, and commands change tables that steps rely on: both
 * wait until nothing is under way, which is at most two steps, because the engine forms none while one of them waits. That
 * costs a moment and spares every proof of what commutes with a step whose outcome is open.
 *
 * Memory. The core mirrors each rank's free pages (fv_ctl_memory_t, refreshed by every DONE) and deducts what a step
 * will take before dispatching it, so a rank never has to refuse: a full pool is seen here, with numbers. What is deducted for
 * a step is its promise on the rank. The DONE of a step does not know of the next one, so the promise of the next is deducted
 * again from what it reports. A step takes what was promised or less (a fork's last page may be copied by neither or
 * by one of two), so the mirror is never above what the rank will have, and exact when nothing is under way.
 */
#ifndef FV_COORD_SCHED_H
#define FV_COORD_SCHED_H

#include "common/model.h"
#include "common/status.h"
#include "coord/plan.h"
#include "coord/plan_prefill.h"
#include "coord/sched_budget.h"
#include "coord/session.h"
#include "proto/control.h"
#include "proto/step.h"
#include "proto/wire.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct fv_sched fv_sched_t;

/* Query tokens of an item up to which it is decode, or its verification. */
#define FV_DECODE_TOKENS_MAX 16U

struct fv_request;

typedef struct fv_sched_config {
    uint32_t n_ranks;
    uint32_t sessions_max;
    uint32_t session_tokens_max; /* of a layer; 0 = no limit */
    uint32_t items_max;          /* of a request; 0 = no limit */
    uint32_t step_tokens_max;
    uint32_t prefill_tokens_per_step; /* 0 = by time: coord/sched_budget.h */
    uint32_t shard_tokens;            /* default of models and sessions that name none */
    fv_plan_cost_t cost;
    fv_plan_prefill_t context_prefill;
    size_t move_bytes; /* of each rank's staging for KV that moves; 0: none moves */
    const char *
        no_latent; /* a backend among the ranks' that serves no model of kind LATENT; NULL: all do */
    const char *no_fp8;   /* likewise, none with a cache of FP8_LATENT */
    const char *no_exact; /* likewise, none sharded by latent with exact */
    /*
     * Called for a request that is about to join a step, when its spec is known and before anything is taken for it: room
     * for its answer. An error refuses the request. NULL: nothing to prepare.
     */
    fv_status_t (*prepare)(struct fv_request *request);
} fv_sched_config_t;

/* A new session: its fresh random id, when, and whose it is. A fork belongs to its parent's owner, whoever forks. */
typedef struct fv_birth {
    fv_session_id_t id;
    uint64_t now_unix_ms;
    int64_t now_us;
    fv_principal_t *owner; /* NULL: nobody's, visible to all; no quota */
} fv_birth_t;

/*
 * One AttendRequest on its way. The engine allocates it (with its arrays), fills the first part, and keeps it until it
 * comes back in a step's `finished` or `joined` list. Links and results belong to the core meanwhile.
 */
typedef struct fv_request {
    fv_attend_request_t head;
    const fv_attend_item_t *items; /* [head.n_items] */
    const uint32_t
        *digests; /* [head.n_items] crc32c of the item's K then V; unused without append */
    fv_ctl_item_t
        *ctl_items; /* [head.n_items] filled by the core when it joins a step: of its piece alone */
    fv_session_t **sessions; /* [head.n_items] likewise */
    int64_t received_us, deadline_us;
    const fv_principal_t *principal; /* who asks; NULL may see every session */
    void *user;

    uint32_t model_slot;
    const fv_model_spec_t *spec;
    uint64_t n_tokens_done; /* of head.n_tokens: the steps before have served them */
    uint64_t
        n_tokens_piece; /* and the step that it has joined serves these; 0: only to be undone */
    bool has_rest;      /* pages are promised for later pieces */
    uint64_t candidate_step;   /* the step in which it may join as a prefill */
    uint64_t kv_bytes_pending; /* charged to the sessions' owner until the step is done */
    fv_error_t error;          /* status FV_OK: served */
    struct fv_request *next;
} fv_request_t;

/* Dims of a row of its answer. */
static inline int32_t fv_request_out_dim(const fv_request_t *request)
{
    return (request->head.only_slice != 0) ? fv_model_stored_dim_v(request->spec)
                                           : request->spec->head_dim_v;
}

/* A step to run. Lists are linked by fv_request_t.next, in order of arrival. */
typedef struct fv_step_plan {
    uint64_t step_id;
    uint32_t slot; /* below FV_STEP_DEPTH, of no other step under way; steps in a row alternate */
    fv_request_t *joined;   /* to run */
    fv_request_t *finished; /* refused, cancelled or late: answer with their error */
    uint32_t n_joined, n_items;
    uint64_t n_tokens;
    fv_step_cost_t cost; /* the engine fills in how long it took */
} fv_step_plan_t;

/* Of a request that joined a step: some rank may have appended tokens of item i. */
bool fv_request_has_begun(const fv_request_t *request, uint32_t i);
/* Nothing is left of it after this step. */
bool fv_request_is_last_piece(const fv_request_t *request);
/* Between the pieces of a request of one of its layers: commands that would change it must wait. */
bool fv_sched_is_half_way(const fv_session_t *session);

FV_MUST_CHECK fv_status_t fv_sched_create(const fv_sched_config_t *config, fv_sched_t **out);
void fv_sched_destroy(
    fv_sched_t *sched); /* NULL is fine; requests still queued stay the caller's */

/* A rank's state: at start from its HELLO, then from every DONE of a command. */
void fv_sched_rank_memory(fv_sched_t *sched, uint32_t rank, const fv_ctl_memory_t *memory);
const fv_ctl_memory_t *fv_sched_rank(const fv_sched_t *sched, uint32_t rank);

/* ------------------------------------------------------------------ commands */

/*
 * `spec` as decoded; it is checked. A new model counts in the quota of `owner` (NULL: in nobody's). *out_message is to be sent to every rank iff *out_is_new.
 * Errors: as fv_model_spec_check; FV_ERR_EXHAUSTED at FV_MODELS_MAX, for the quota, or when a rank's memory is too small for slabs that
 * hold one of the model's pages; FV_ERR_UNIMPLEMENTED for LATENT when a rank serves none.
 */
FV_MUST_CHECK fv_status_t fv_sched_register(fv_sched_t *sched,
                                            fv_model_spec_t *spec,
                                            fv_principal_t *owner,
                                            fv_register_response_t *out,
                                            bool *out_is_new,
                                            fv_ctl_model_t *out_message);
/* Takes back what fv_sched_register() has just made for `owner`, before anybody uses it. */
void fv_sched_unregister_last(fv_sched_t *sched, fv_principal_t *owner);

/*
 * The message goes to the ranks of out_message->placement. Errors: FV_ERR_NOT_FOUND for the model; FV_ERR_EXHAUSTED for
 * sessions_max or the owner's quota.
 */
FV_MUST_CHECK fv_status_t fv_sched_open(fv_sched_t *sched,
                                        const fv_open_request_t *request,
                                        const fv_birth_t *birth,
                                        fv_ctl_open_t *out_message);
/* at_position: UINT64_MAX = everything. Errors: FV_ERR_NOT_FOUND, FV_ERR_OUT_OF_RANGE, FV_ERR_EXHAUSTED as above. */
FV_MUST_CHECK fv_status_t fv_sched_fork(fv_sched_t *sched,
                                        const fv_session_id_t *parent,
                                        uint64_t at_position,
                                        const fv_birth_t *birth,
                                        fv_ctl_fork_t *out_message,
                                        fv_placement_t *out_placement);
FV_MUST_CHECK fv_status_t fv_sched_truncate(fv_sched_t *sched,
                                            const fv_session_id_t *id,
                                            uint64_t position,
                                            fv_ctl_truncate_t *out_message,
                                            fv_placement_t *out_placement);
/* Frees the slot: the message must be sent before any later command. */
FV_MUST_CHECK fv_status_t fv_sched_close(fv_sched_t *sched,
                                         const fv_session_id_t *id,
                                         fv_ctl_close_t *out_message,
                                         fv_placement_t *out_placement);

/* A session that was put into the table by a ledger: what it holds is counted, for ranks and owner. */
void fv_sched_restore(fv_sched_t *sched, fv_session_t *session);
/* Its floors were raised: what it holds is counted again. */
void fv_sched_recount(fv_sched_t *sched, fv_session_t *session);

/* ------------------------------------------------------------------ requests */

/* Takes `request` until it comes back in a plan. */
void fv_sched_submit(fv_sched_t *sched, fv_request_t *request);
uint32_t fv_sched_n_queued(const fv_sched_t *sched);
/* When a step was formed last: the sessions of requests that waited then were used then. */
int64_t fv_sched_formed_us(const fv_sched_t *sched);
uint64_t fv_sched_bytes_queued(const fv_sched_t *sched); /* q, k and v of those */

/*
 * Forms the next step at time now_us. is_cancelled(request->user) is asked for each queued request.
 * An empty plan (nothing joined, nothing finished) means that nothing waits, or that all of it waits for a step under way.
 * A plan that joined something is under way until fv_sched_step_done(); fewer than FV_STEP_DEPTH may be when this is called.
 * A request that is cancelled or late half-way joins with its error and no tokens: the engine undoes it as one that failed.
 */
void fv_sched_next_step(fv_sched_t *sched,
                        int64_t now_us,
                        bool (*is_cancelled)(void *user),
                        fv_step_plan_t *out);

/* A rank's DONE of a step under way; its DONEs come in the order of steps. */
void fv_sched_rank_done(fv_sched_t *sched,
                        const fv_step_plan_t *plan,
                        uint32_t rank,
                        const fv_ctl_memory_t *memory);

/*
 * A request that joined has failed: what was promised for its later pieces is not taken. To be called before all ranks of
 * its appending items are told to cut back, so that what they report then is what is free.
 */
void fv_sched_forget_rest(fv_sched_t *sched, fv_request_t *request);

/*
 * Commits a step that ran: lengths and digests of every joined request whose error is still FV_OK and of which this was
 * the last piece; of what is left of others the queue has the rest, and plan->joined only what is to be answered. A request
 * that failed on a rank (error set by the engine) leaves the lengths as they were; the engine truncates the ranks first. What
 * earlier appends alone could still read is freed all the same: some ranks have done so.
 */
void fv_sched_step_done(fv_sched_t *sched, fv_step_plan_t *plan);

/* Empties the queue: every request that waits, linked in order of arrival. For the end of the service. */
fv_request_t *fv_sched_take_all(fv_sched_t *sched);

/* ------------------------------------------------------------------ views, for status and placement */

fv_session_t *fv_sched_session(const fv_sched_t *sched, const fv_session_id_t *id);
const fv_session_table_t *fv_sched_sessions(const fv_sched_t *sched);
fv_session_table_t *fv_sched_session_table(fv_sched_t *sched); /* not to add or remove */
uint32_t fv_sched_n_models(const fv_sched_t *sched);
/* A model that nobody owns counts for `owner` from now on; NULL: for nobody. */
void fv_sched_own_model(fv_sched_t *sched, uint32_t slot, fv_principal_t *owner);
const fv_principal_t *fv_sched_model_owner(const fv_sched_t *sched, uint32_t slot); /* or NULL */
const fv_model_spec_t *fv_sched_model(const fv_sched_t *sched, uint32_t model_slot);
const char *fv_sched_model_id(const fv_sched_t *sched, uint32_t model_slot);
uint64_t fv_sched_tokens_appended(const fv_sched_t *sched);

#endif /* FV_COORD_SCHED_H */
