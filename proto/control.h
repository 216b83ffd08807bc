/*
 * control.h - coordinator <-> worker messages on the control socket: fixed-size structs.
 *
 * Every message is a fv_ctl_header_t followed by body_bytes of body. The socket is also the doorbell (a
 * worker sleeps in poll() on it) and the death detector (a closed socket is a dead peer). Tensors never
 * travel here: a STEP names them, MPI carries them (coord/link_mpi.c, worker/inbox_mpi.c), laid out as
 * proto/step.h says.
 *
 * Sessions and models have slots: small integers that the coordinator hands out and reuses only after
 * the CLOSE has been sent; the socket keeps the order.
 *
 * Answers: MODEL, OPEN, FORK, TRUNCATE, CLOSE -> DONE; STEP -> DONE. Each DONE carries the rank's free
 * memory, so the coordinator's view of it is exact whenever nothing is under way.
 */
#ifndef FV_PROTO_CONTROL_H
#define FV_PROTO_CONTROL_H

#include "common/model.h"
#include "common/status.h"
#include "proto/placement.h"
#include "proto/session_id.h"

#include <stdint.h>

#define FV_CTL_MAGIC      0x31305646U /* "FV01" */
#define FV_CTL_BODY_MAX   (1U << 26)
#define FV_MODELS_MAX     64
#define FV_STEP_ITEMS_MAX 4096

/*
 * Steps under way at once. The coordinator begins step n + 1 on the ranks while step n computes, so that its tensors travel
 * meanwhile; it begins n + 2 only when every rank of n has answered. Each rank runs its steps in order, so a rank may be in
 * n + 1 while another is still in n, never further. What is kept per step (request buffers, an exchange's windows) is
 * therefore kept twice, by turns, and needs no other guard. Commands (MODEL to CLOSE) are sent only when no step is under way.
 */
#define FV_STEP_DEPTH 2

typedef enum fv_ctl_type {
    FV_CTL_HELLO = 1, /* worker -> coordinator, first message: fv_ctl_hello_t */
    FV_CTL_MODEL,     /* fv_ctl_model_t */
    FV_CTL_OPEN,      /* fv_ctl_open_t */
    FV_CTL_FORK,      /* fv_ctl_fork_t */
    FV_CTL_TRUNCATE,  /* fv_ctl_truncate_t */
    FV_CTL_CLOSE,     /* fv_ctl_close_t */
    FV_CTL_STEP,      /* fv_ctl_step_t, then n_items fv_ctl_item_t */
    FV_CTL_DONE, /* worker -> coordinator: fv_ctl_done_t, then n_items fv_error_t (failed steps only) */
    FV_CTL_PING, /* coordinator -> worker, no body; answered by PONG */
    FV_CTL_PONG, /* fv_ctl_memory_t */
    FV_CTL_STOP, /* fv_ctl_stop_t: finish and leave */
    /*
     * What a worker with a store shall keep of what it found there (worker/worker.h): after the MODELs, one KEEP for each
     * session, then KEEP_END.
     */
    FV_CTL_KEEP, /* fv_ctl_keep_t, then n_layers fv_ctl_keep_layer_t */
    FV_CTL_KEPT, /* answer to KEEP: fv_ctl_done_t, then n_layers floors, uint64_t; none if refused */
    FV_CTL_KEEP_END, /* no body; DONE */
    /*
     * fv_ctl_epoch_t, under the new epoch's number: a rank was lost, and this is who goes on. Whatever is under way is given up.
     * Answered by HELLO, when the rank is in the epoch. Also what makes a spare a rank.
     */
    FV_CTL_EPOCH,
} fv_ctl_type_t;

typedef struct fv_ctl_header {
    uint32_t magic;
    uint16_t type;
    uint16_t reserved;
    uint32_t epoch; /* of the coordinator; a worker refuses another one */
    uint32_t body_bytes;
    uint64_t seq; /* of the message; a DONE repeats it */
} fv_ctl_header_t;

/* The free memory of a rank, exact at the moment of sending. See worker/kv_pool.h for slabs. */
typedef struct fv_ctl_memory {
    uint64_t kv_bytes_total;
    uint64_t kv_bytes_free;
    uint32_t slab_bytes;
    uint32_t n_slabs_free;
    uint32_t n_pages_free[FV_MODELS_MAX]; /* by model slot: free pages in slabs of its page size */
} fv_ctl_memory_t;

#define FV_SECRET_BYTES 16
#define FV_RANKS_MAX    1024

/* The ranks of now, by their processes; a process that is started anew has the number of the lost one. */
typedef struct fv_ctl_epoch {
    uint32_t epoch; /* the header's */
    uint32_t n_ranks;
    uint32_t rank;   /* of whom this is for */
    uint32_t is_new; /* it takes the place of a process that is lost: what follows is its */
    uint32_t n_threads;
    uint64_t kv_bytes;
    int32_t lost_pid; /* on lost_host; it may live, stopped, and must not write any more */
    char lost_host[64];
    uint32_t members[FV_RANKS_MAX]; /* [n_ranks] processes, by rank of the service */
    uint8_t is_recruit[FV_RANKS_MAX]; /* [n_ranks] 1: all others start it together, in this epoch */
} fv_ctl_epoch_t;

/* The two connections of a rank. */
enum {
    FV_CHANNEL_CONTROL = 0, /* the messages of this file */
    FV_CHANNEL_BEAT = 1,    /* a byte again and again: coord/heartbeat.h */
};

typedef struct fv_ctl_hello {
    uint8_t
        proof[32]; /* that the sender has the job's secret, which MPI handed out: coord/meet.h */
    uint32_t rank;
    uint32_t n_threads;
    uint32_t has_latent; /* the rank's backend serves models of kind LATENT */
    uint32_t channel;    /* FV_CHANNEL_*: a rank introduces each of its connections */
    uint32_t has_exact;  /* and, sharded by latent, adds up scores between ranks */
    int32_t pid;
    uint32_t has_fp8_latent; /* and with caches of FP8_LATENT */
    uint32_t
        move_kib; /* of staging for KV that moves (FV_ITEM_MOVES_KV), the same on all ranks; 0: not served */
    char host[64];
    char backend[16];
    char device[96];
    fv_ctl_memory_t memory;
} fv_ctl_hello_t;

typedef struct fv_ctl_model {
    uint32_t model_slot;
    uint32_t reserved;
    fv_model_spec_t spec;
} fv_ctl_model_t;

typedef struct fv_ctl_open {
    uint32_t session_slot;
    uint32_t model_slot;
    fv_session_id_t id;
    fv_placement_t placement;
} fv_ctl_open_t;

/* The new session has the parent's model and placement, and each layer's first
 * min(layer length, at_position) tokens, pages shared. */
typedef struct fv_ctl_fork {
    uint32_t session_slot; /* of the new session */
    uint32_t parent_slot;
    uint64_t at_position;
    fv_session_id_t id; /* of the new session */
} fv_ctl_fork_t;

typedef struct fv_ctl_truncate {
    uint32_t session_slot;
    uint32_t layer;    /* UINT32_MAX = every layer */
    uint64_t position; /* layers longer than this are cut to it */
} fv_ctl_truncate_t;

typedef struct fv_ctl_close {
    uint32_t session_slot;
    uint32_t reserved;
} fv_ctl_close_t;

/* A session as the coordinator has it; what a worker has in its slot may be another's. A worker's shard has as many tokens or more: those that were never acknowledged. */
typedef struct fv_ctl_keep {
    uint32_t session_slot, model_slot;
    fv_session_id_t id;
    uint32_t n_layers;
    uint32_t
        is_exact; /* more tokens are no unfinished append: the coordinator may have lost something */
    fv_placement_t placement;
} fv_ctl_keep_t;

typedef struct fv_ctl_keep_layer {
    uint64_t n_tokens;
} fv_ctl_keep_layer_t;

typedef struct fv_ctl_stop {
    uint32_t discards_store; /* a clean end: nobody will ask for the sessions again */
} fv_ctl_stop_t;

/* MPI message tags, all on the epoch's communicator. Both sides post a step's messages before the next step's, and MPI keeps
 * order per (source, tag), so a tag needs no step number. A packed buffer travels as one message of bytes. */
enum {
    FV_TAG_INPUT = 1,    /* coordinator -> worker: packed input, present iff in_bytes > 0 */
    FV_TAG_OUTPUT = 2,   /* worker -> coordinator: packed output, present iff out_bytes > 0 */
    FV_TAG_EXCHANGE = 3, /* worker -> worker: partial states */
};

enum {
    FV_ITEM_CAUSAL = 1,
    FV_ITEM_APPEND = 2, /* K and V travel and are appended at `position` */
    FV_ITEM_WANT_LSE = 4,
    FV_ITEM_CONTINUES =
        8, /* a later piece of one append: nothing more is freed than what lay behind the first */
    FV_ITEM_COPIES_TAIL =
        16, /* the coordinator's note: a page is promised for a copy of the layer's shared last page */
    FV_ITEM_MOVES_KV =
        32, /* the KV comes to the ranks that have the query rows (proto/step.h); else the rows visit it */
    FV_ITEM_SLICE_SHIFT =
        8, /* bits 8..11: 1 + the one slice of a latent that is answered; 0: all */
    FV_ITEM_SLICE_MASK = 0xf,
};

/* One item of a step; its share of each rank follows from the session's placement (proto/step.h). */
typedef struct fv_ctl_item {
    uint32_t session_slot;
    uint32_t layer;
    uint64_t position; /* of the first query token, in the session */
    uint64_t
        kv_end; /* tokens [0, kv_end) exist once this item's are appended; rows see no later one */
    uint32_t n_tokens; /* query tokens; 0: nobody has a share */
    uint16_t dtype;    /* fv_dtype_t of q, k, v and out */
    uint16_t flags;    /* FV_ITEM_* */
} fv_ctl_item_t;

/* No row of the item sees this token or a later one. */
static inline uint64_t fv_item_sees_end(const fv_ctl_item_t *item)
{
    uint64_t end = item->position + item->n_tokens;

    return (((item->flags & FV_ITEM_CAUSAL) != 0) && (end < item->kv_end)) ? end : item->kv_end;
}

typedef struct fv_ctl_step {
    uint64_t step_id;
    uint32_t n_items;
    uint32_t reserved;
    uint64_t in_bytes;  /* of the packed tensors that MPI brings to this rank, 0 = none */
    uint64_t out_bytes; /* of the packed results that this rank sends back, 0 = none */
} fv_ctl_step_t;

typedef struct fv_ctl_done {
    fv_error_t error;     /* FV_OK, or the first failure */
    uint32_t compute_us;  /* STEP: append and attention */
    uint32_t exchange_us; /* STEP: partial states exchanged and merged */
    uint32_t n_items;     /* STEP with failures: per-item errors that follow; else 0 */
    uint32_t reserved;
    fv_ctl_memory_t memory;
} fv_ctl_done_t;

_Static_assert(sizeof(fv_ctl_header_t) == 24, "the header is part of the wire format");
_Static_assert(sizeof(fv_ctl_keep_t) % 8 == 0, "layers follow it");
_Static_assert(sizeof(fv_ctl_item_t) == 32, "the item is part of the wire format");

#endif /* FV_PROTO_CONTROL_H */
