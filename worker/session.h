/*
 * session.h - what one rank holds of a session: a length and a page table per layer.
 *
 *   pages[h * stride + p]   page of local KV head h, local page p (proto/placement.h numbers them)
 *
 * Invariant between steps: a layer has exactly the pages its own tokens of [0, length) need, for every local head,
 * less those that its policy has let die (proto/reduce.h): these are FV_PAGE_NONE. A page with more than one reference is shared with a fork and is copied before it is written.
 * A session without a cell on this rank is only its placement: no layers, no pages.
 *
 * Thread: the worker's.
 */
#ifndef FV_WORKER_SESSION_H
#define FV_WORKER_SESSION_H

#include "common/model.h"
#include "common/status.h"
#include "proto/placement.h"
#include "proto/session_id.h"
#include "worker/kv_pool.h"

#include <stdbool.h>
#include <stdint.h>

/* A registered model; outlives its sessions. */
typedef struct fv_worker_model {
    fv_model_spec_t spec;
    uint32_t page_class; /* in the pool */
    bool is_kept;        /* found in a store: the coordinator knows it, too */
    bool is_noted;       /* in the store's journal */
} fv_worker_model_t;

typedef struct fv_layer_kv {
    uint64_t
        length; /* tokens [0, length) of the session exist; this rank holds its own share of them */
    uint64_t last_step;   /* number of the last step that named this layer */
    fv_page_ref_t *pages; /* [n_heads * stride] */
    uint32_t stride;      /* pages that fit, per head */
    uint32_t n_pages;     /* in the table, per head: held or freed */
    uint32_t n_dead;  /* of these, from the first: looked at, and freed where no head keeps them */
    uint64_t floor;   /* position of the last append: queries from here on are possible */
    uint64_t n_freed; /* entries of the table that are FV_PAGE_NONE */
    uint64_t
        table_version; /* grows when an entry that was in use goes or is replaced (kernels.h) */
} fv_layer_kv_t;

typedef struct fv_session {
    const fv_worker_model_t *model;
    fv_placement_t placement;
    uint32_t model_slot;
    uint32_t rank;         /* this one */
    uint64_t table_id;     /* of layer 0's table; the next layers' follow; unlike any before */
    int32_t cp;            /* context part; -1: no cell on this rank */
    int32_t head_begin;    /* the model's number of local KV head 0 */
    int32_t n_heads;       /* local KV heads */
    fv_layer_kv_t *layers; /* [n_layers], NULL without a cell */
    /* store.h */
    fv_session_id_t id;
    uint64_t last_record; /* its number in the journal */
    uint64_t last_rewritten;
    bool is_lost, is_kept; /* found in a store: damaged; wanted */
} fv_session_t;

/* Errors: FV_ERR_NO_MEMORY. The session keeps pointers to `model`. */
FV_MUST_CHECK fv_status_t fv_session_create(const fv_worker_model_t *model,
                                            uint32_t model_slot,
                                            const fv_placement_t *placement,
                                            uint32_t rank,
                                            fv_session_t **out);

/* Releases the pages too. NULL is fine. */
void fv_session_destroy(fv_session_t *session, fv_kv_pool_t *pool);

/* Same model and placement, each layer cut to at_position, every page shared. Errors: FV_ERR_NO_MEMORY. */
FV_MUST_CHECK fv_status_t fv_session_fork(const fv_session_t *parent,
                                          uint64_t at_position,
                                          fv_kv_pool_t *pool,
                                          fv_session_t **out);

/* Cuts a layer to `position` tokens; a shorter one stays as it is. */
void fv_session_truncate(fv_session_t *session,
                         uint32_t layer,
                         uint64_t position,
                         fv_kv_pool_t *pool);

/*
 * Makes room for the tokens [length, end) of a layer: new pages, and pages of its own where the partly filled last
 * one is shared; what must be copied is written to copies[0 .. *out_n_copies), room for n_heads. The length stays:
 * the caller sets it when the tokens are in, or takes the pages back with fv_session_trim().
 * Errors: FV_ERR_EXHAUSTED with bytes needed and free; nothing has changed then.
 */
FV_MUST_CHECK fv_status_t fv_session_reserve(fv_session_t *session,
                                             uint32_t layer,
                                             uint64_t end,
                                             fv_kv_pool_t *pool,
                                             fv_page_copy_t *copies,
                                             size_t *out_n_copies);

/*
 * Undoes what fv_session_reserve() did to entry `entry` of a layer, of which it wrote these copies: the shared pages are in the
 * table again, the own ones are given back. Nobody may have let go of the shared ones meanwhile.
 */
void fv_session_share_again(fv_session_t *session,
                            uint32_t layer,
                            uint32_t entry,
                            const fv_page_copy_t *copies,
                            size_t n_copies,
                            fv_kv_pool_t *pool);

/*
 * An append at `position` is in: queries before it will not come any more, and the pages that only they could read are
 * given back. Cost: the pages that have died since the last call.
 */
void fv_session_settle(fv_session_t *session,
                       uint32_t layer,
                       uint64_t position,
                       fv_kv_pool_t *pool);

/* Gives back the pages that the layer's length does not need. */
void fv_session_trim(fv_session_t *session, uint32_t layer, fv_kv_pool_t *pool);

/* This rank's own tokens of [0, n_tokens). */
static inline uint64_t fv_session_own(const fv_session_t *session, uint64_t n_tokens)
{
    return fv_placement_tokens(&session->placement, session->cp, n_tokens);
}

/*
 * Of a table that nobody counts: entries [first, first + n) of every head become refs[h * n + i], the table ends behind them.
 * first: at most the table's end. Errors: FV_ERR_EXHAUSTED.
 */
FV_MUST_CHECK fv_status_t fv_session_set_entries(fv_session_t *session,
                                                 uint32_t layer,
                                                 uint32_t first,
                                                 uint32_t n,
                                                 const fv_page_ref_t *refs);

/* Pages held, all layers and heads; shared ones count in full. */
uint64_t fv_session_pages(const fv_session_t *session);

#endif /* FV_WORKER_SESSION_H */
