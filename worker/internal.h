/*
 * internal.h - the worker's own state: for the files of this folder only.
 */
#ifndef FV_WORKER_INTERNAL_H
#define FV_WORKER_INTERNAL_H

#include "proto/moved.h"
#include "worker/kv_pool.h"
#include "worker/session.h"
#include "worker/store.h"
#include "worker/worker.h"
#include "worker/workspace.h"

#define FV_WORKER_DEADLINE_MS 30000U /* of one exchange, when the configuration does not say */
#define FV_SESSION_SLOTS_MAX  (1U << 24)

/* One item of the step under way. */
typedef struct fv_step_item {
    const fv_ctl_item_t *ctl;
    const fv_step_io_t *io;
    fv_session_t *session;
    fv_layer_kv_t *layer;
    fv_item_share_t share;
    int32_t n_q_heads;           /* local query heads */
    uint32_t first_entry;        /* of the layer's table that this step may have changed */
    size_t first_copy, n_copies; /* of the work's copies: its own */
    size_t first_append, n_appends;
    bool failed; /* its error is in item_errors; it goes on as the empty set */
} fv_step_item_t;

/* How long the parts of a step took. */
typedef struct fv_step_times {
    int64_t computed_us; /* host clock: attention done; between devices: enqueued */
    bool
        is_exchange_known; /* device.exchange_us is the exchange's, if the device's times are known */
    fv_device_times_t device;
} fv_step_times_t;

/* What one peer sends and gets in the step under way. */
typedef struct fv_peer {
    size_t send_bytes, recv_bytes;
    uint8_t *send, *recv; /* next free byte while messages are laid out */
} fv_peer_t;

/* An item whose slices' scores are added up (exact.h), and how its rows are cut into blocks. */
typedef struct fv_exact_item {
    const fv_step_item_t *item;
    fv_attn_item_t attend;
    int32_t n_block_tokens,
        n_block_heads; /* several tokens with all heads, or heads of one token */
    uint64_t n_blocks;
} fv_exact_item_t;

typedef struct fv_exact_block {
    const fv_step_item_t *item;
    fv_attn_item_t attend;
    uint64_t n_scores;
} fv_exact_block_t;

/* Scratch of exact.c. Counts are of the step and the round under way. */
typedef struct fv_exact_work {
    fv_array_t items;    /* fv_exact_item_t */
    fv_array_t blocks;   /* fv_exact_block_t */
    fv_array_t attends;  /* fv_attn_item_t */
    fv_array_t dsts;     /* fv_partial_dst_t */
    fv_array_t peers;    /* fv_peer_t [n_ranks] */
    fv_array_t messages; /* fv_exchange_message_t, sends, then receives */
    size_t n_items, n_blocks;
    int64_t exchange_us;     /* spent in the exchange, all rounds */
    fv_host_buffer_t buffer; /* own scores | to and from each peer */
} fv_exact_work_t;

/* An item whose KV moves to its queries (move.h). */
typedef struct fv_move_item {
    const fv_step_item_t *item;
    fv_attn_item_t attend;
    fv_moved_t moved;
} fv_move_item_t;

/* Scratch of move.c. Counts are of the step under way. */
typedef struct fv_move_work {
    fv_array_t items;    /* fv_move_item_t */
    fv_array_t tables;   /* fv_page_ref_t */
    fv_array_t attends;  /* fv_attn_item_t */
    fv_array_t copies;   /* fv_page_copy_t */
    fv_array_t messages; /* fv_exchange_message_t, sends, then receives */
    size_t n_items, n_entries, n_attends, n_copies;
    int64_t exchange_us;     /* spent in the exchange, all rounds */
    fv_host_buffer_t buffer; /* host exchange: a round's messages */
} fv_move_work_t;

/* Scratch of the step, see step.c and partials.c. Counts are of the step under way. */
typedef struct fv_step_work {
    fv_array_t items;    /* fv_step_item_t */
    fv_array_t attends;  /* fv_attn_item_t */
    fv_array_t appends;  /* fv_append_item_t */
    fv_array_t copies;   /* fv_page_copy_t */
    fv_array_t merges;   /* fv_merge_item_t */
    fv_array_t dsts;     /* fv_partial_dst_t */
    fv_array_t parts;    /* const float *: o, then lse, of each merge */
    fv_array_t messages; /* host exchange: fv_exchange_message_t, sends, then receives */
    fv_array_t with;     /* device exchange: fv_exchange_peer_t */
    size_t n_items, n_attends, n_appends, n_copies, n_merges, n_dsts, n_parts, n_with;
    fv_peer_t *peers; /* [n_ranks] */
    size_t own_bytes;
    uint8_t *own;
    bool is_store_full; /* its appends have failed */
    fv_host_buffer_t
        exchange; /* host exchange: to each peer | from each peer | own partial states */
    fv_exact_work_t exact;
    fv_move_work_t move;
} fv_step_work_t;

struct fv_worker {
    fv_worker_config_t config;
    fv_backend_t *backend;
    fv_kv_pool_t *pool;
    fv_worker_model_t *models[FV_MODELS_MAX];
    fv_array_t sessions; /* fv_session_t *, by slot */
    uint32_t n_session_slots;
    uint64_t n_steps;
    fv_step_work_t work;
    fv_status_t broken; /* not FV_OK: a backend or exchange failure; nothing works any more */
    fv_store_t *store;  /* NULL: nothing outlives the process */
    fv_array_t store_refs, store_tags; /* store.c, store_load.c: scratch */
    fv_array_t ios;                    /* step_packed.c: fv_step_io_t */
    fv_host_buffer_t in[FV_STEP_DEPTH],
        out[FV_STEP_DEPTH]; /* inbox_mpi.c: packed tensors of steps */
    void (*on_wait)(void *arg);
    void *on_wait_arg;
    bool has_asked; /* on_wait, in the finish() under way */
};

/* NULL when the slot is empty. */
fv_session_t *fv_worker_session(const fv_worker_t *worker, uint32_t slot);

/* Errors: FV_ERR_PROTOCOL for a placement that no model and no job has. */
FV_MUST_CHECK fv_status_t fv_worker_check_placement(const fv_worker_t *worker,
                                                    const fv_model_spec_t *spec,
                                                    const fv_placement_t *p);
/* An empty place for session `slot`. Errors: FV_ERR_PROTOCOL when it is none; FV_ERR_NO_MEMORY. */
FV_MUST_CHECK fv_status_t fv_worker_claim_slot(fv_worker_t *worker, uint32_t slot);
/* A model in its slot, which is empty. Errors: as of its spec and its pages' class. */
FV_MUST_CHECK fv_status_t fv_worker_add_model(fv_worker_t *worker,
                                              uint32_t slot,
                                              const fv_model_spec_t *spec);

/* Remembers that the worker can not go on; returns `status`. */
fv_status_t fv_worker_break(fv_worker_t *worker, fv_status_t status);

/* FV_OK, or why the worker does nothing any more. */
FV_MUST_CHECK fv_status_t fv_worker_usable(const fv_worker_t *worker);

/* Waits for the backend, at most the step's deadline, and no longer than the exchange sees all peers. */
FV_MUST_CHECK fv_status_t fv_worker_finish(fv_worker_t *worker, fv_device_times_t *out_times);

/*
 * Finds an item's session and share and checks what both rest on. Errors: FV_ERR_PROTOCOL when coordinator and worker
 * disagree so much that sizes of messages can not be trusted.
 */
FV_MUST_CHECK fv_status_t fv_step_item_make(const fv_worker_t *worker,
                                            const fv_ctl_item_t *ctl,
                                            fv_step_item_t *out);

/* Sizes of the packed input and output of a step. Errors: as fv_step_item_make(). */
FV_MUST_CHECK fv_status_t fv_worker_packed_bytes(const fv_worker_t *worker,
                                                 const fv_ctl_item_t *items,
                                                 size_t n_items,
                                                 size_t *out_in_bytes,
                                                 size_t *out_out_bytes);

#endif /* FV_WORKER_INTERNAL_H */
