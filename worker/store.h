/*
 * store.h - what of a worker outlives its process: its pages, and a journal of its page tables.
 *
 * Decode path: station 6 of 10, with worker/step.c.
 *
 * Pages lie in a segment of the slot (common/store.h): the KV arena itself where the backend keeps KV in host memory; else a
 * mirror, written while the device works (worker/mirror.h). They need no journal: a step writes them before it commits, only
 * where no committed token lies.
 *
 * The journal says which page belongs where. A step adds a record for each layer that changed, and commits all of them with
 * one write and one store before it answers; commands commit one record each. Records of a session carry its slot and are
 * numbered, from a number of the session's own on (proto/session_id.h), so that a damaged one is noticed, and the session, which
 * can not be trusted then, is not served:
 *
 *   MODEL      key: 2^31 + model slot    the spec
 *   OPEN       key: session slot, first  id, model slot, placement
 *   FORK       first                     id, parent's slot, position: the parent's tables as they are then
 *   ENTRIES    layer, length, position, the layer's page table from an entry on; its policy then frees what it lets die
 *   TRUNCATE   layer or all, position
 *   CLOSE
 *   TABLE      layer, its whole state: instead of all its ENTRIES when the journal is written anew
 *
 * Only the owner of the tables knows their references: pages are counted anew from the tables, not journalled.
 *
 * Thread: the worker's. Functions take a worker without a store: they do nothing then.
 */
#ifndef FV_WORKER_STORE_H
#define FV_WORKER_STORE_H

#include "common/disklog.h"
#include "common/journal.h"
#include "common/store.h"
#include "worker/session.h"
#include "worker/worker.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    FV_STORE_MODEL = 1,
    FV_STORE_OPEN,
    FV_STORE_FORK,
    FV_STORE_ENTRIES,
    FV_STORE_TRUNCATE,
    FV_STORE_CLOSE,
    FV_STORE_TABLE,
};
#define FV_STORE_MODEL_KEY 0x80000000U

/* Bodies. Page references follow ENTRIES and TABLE: [n_heads, n_entries]. */
typedef struct fv_store_fork {
    uint32_t parent_slot, reserved;
    uint64_t at_position;
    fv_session_id_t id; /* of the child */
} fv_store_fork_t;

typedef struct fv_store_entries {
    uint32_t layer;
    uint32_t first, n_entries; /* of each head */
    uint32_t frees;            /* the policy frees what queries before `position` alone read */
    uint64_t length, position;
} fv_store_entries_t;

typedef struct fv_store_table {
    uint32_t layer;
    uint32_t n_entries, n_dead;
    uint32_t reserved;
    uint64_t length, floor;
} fv_store_table_t;

typedef struct fv_store {
    fv_store_place_t place;
    fv_journal_t *journal;
    fv_segment_t *pages;  /* NULL: the backend keeps no KV at all */
    fv_backend_t *mirror; /* a CPU backend over `pages`; NULL: the arena itself, or no KV */
    fv_disklog_t *disk;   /* level host: has all of it, too (worker/store_disk.h); NULL: none */
    uint8_t *covered;     /* of what came from a disk: a bit for each page that it had; NULL: all */
    bool must_rewrite;    /* at KEEP_END */
    bool is_undone;       /* and the disk lacks something until then */
    bool is_attaching;    /* sessions are candidates until KEEP_END */
    bool is_discarded;    /* the files go with the store */
    bool
        is_behind; /* the journal still has what was given back: rewritten before anything new is noted */
    uint64_t rewritten_bytes;  /* of the journal when it was last written anew */
    uint64_t tried_disk_bytes; /* of the log when it could not be begun anew */
    uint64_t n_damaged;
} fv_store_t;

/*
 * Opens the slot's files, before the backend is made: config->kv_arena is set where it keeps KV in the host's memory.
 * *out NULL: no store is configured. Errors: as fv_journal_open() and fv_segment_open().
 */
FV_MUST_CHECK fv_status_t fv_store_open(const fv_worker_config_t *config,
                                        fv_backend_config_t *backend_config,
                                        fv_store_t **out);
void fv_store_close(fv_store_t *store); /* NULL is fine; after the backend */

/* Reads what is there: models, and sessions as candidates (fv_worker_keep()). */
FV_MUST_CHECK fv_status_t fv_store_load(fv_worker_t *worker);

/* While sessions are candidates: a model that is not kept, and its sessions, are as if they had not been found. */
void fv_store_forget_model(fv_worker_t *worker, uint32_t slot);

/* A session as if it had not been found. */
void fv_store_drop(fv_worker_t *worker, uint32_t slot);

/* The first record of a session, of a body that outlives it. */
fv_ctl_open_t fv_store_open_body(uint32_t slot, const fv_session_t *session);
fv_journal_record_t
fv_store_open_record(uint32_t slot, const fv_session_t *session, const fv_ctl_open_t *body);
/* [n_heads, n] of a table from `first` on, to the worker's scratch. NULL: no memory. */
const fv_page_ref_t *fv_store_pack(fv_worker_t *worker,
                                   const fv_session_t *session,
                                   const fv_layer_kv_t *layer,
                                   uint32_t first,
                                   uint32_t n);

/* ------------------------------------------------------------------ commands, before they change anything */

/*
 * What is given back never fails for want of room: the journal then has more than there is, which the coordinator's word cuts
 * after a death (fv_worker_keep()). Nor does a model: its first session notes it.
 */
FV_MUST_CHECK fv_status_t fv_store_note_model(fv_worker_t *worker, uint32_t slot);
/* The session is not in its slot yet; it counts its records. */
FV_MUST_CHECK fv_status_t fv_store_note_open(fv_worker_t *worker,
                                             uint32_t slot,
                                             fv_session_t *session);
FV_MUST_CHECK fv_status_t fv_store_note_fork(fv_worker_t *worker,
                                             const fv_ctl_fork_t *message,
                                             fv_session_t *child);
FV_MUST_CHECK fv_status_t fv_store_note_truncate(fv_worker_t *worker,
                                                 const fv_ctl_truncate_t *message,
                                                 fv_session_t *session);
FV_MUST_CHECK fv_status_t fv_store_note_close(fv_worker_t *worker,
                                              uint32_t slot,
                                              fv_session_t *session);

/* ------------------------------------------------------------------ steps */

/* Room for the records of a step of so many items and page references, memory for new pages of n_page_bytes in all, and
 * n_disk_bytes of their records on a disk. */
FV_MUST_CHECK fv_status_t fv_store_reserve(fv_worker_t *worker,
                                           size_t n_items,
                                           size_t n_refs,
                                           size_t n_page_bytes,
                                           size_t n_disk_bytes);
/* A layer's table from entry `first` on is as it is now, its length will be `length`. Its room was reserved. */
void fv_store_note_entries(fv_worker_t *worker,
                           uint32_t slot,
                           fv_session_t *session,
                           const fv_store_entries_t *entries);
/* Commits the records of a step; now and then the journal is written anew. */
FV_MUST_CHECK fv_status_t fv_store_commit(fv_worker_t *worker);

/* Writes the journal anew from the tables; the log on a disk, too, there with all pages where that is due. Errors: the old ones
 * stay in force. */
FV_MUST_CHECK fv_status_t fv_store_rewrite(fv_worker_t *worker);

#endif /* FV_WORKER_STORE_H */
