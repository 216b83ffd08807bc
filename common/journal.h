/*
 * journal.h - an append-only file of small records that survives its writer at any instruction.
 *
 *   | head, 4 KiB: whose it is, its geometry, `committed` | record | record | ... | room |
 *
 * A commit writes the records that were added, then release-stores `committed` (the head is mapped, shared): what lies behind
 * it never happened, a torn tail included. What lies before it must be whole: each record has a checksum of its head and one
 * of its body. A record whose body is damaged is reported with its key; one whose head is damaged is skipped, and the
 * gap in its key's numbers (`number`) tells on it when the key's next record comes.
 *
 * Keys are the owner's: a session slot, a model slot. A record with FV_JOURNAL_FIRST begins a key anew, and where its numbers
 * begin is the owner's, too: far from those of the key's use before, so that a gap across both is noticed.
 *
 * The file is locked (flock) while it is open: two writers never share one, and the lock goes with the process.
 * Rewriting (compaction) fills a new file beside it and renames it over the old one.
 *
 * Thread: one at a time.
 */
#ifndef FV_COMMON_JOURNAL_H
#define FV_COMMON_JOURNAL_H

#include "common/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FV_JOURNAL_VERSION    3U
#define FV_JOURNAL_HEAD_BYTES 4096U
#define FV_JOURNAL_BODY_MAX   (1U << 30)
#define FV_JOURNAL_JOB_BYTES  64
#define FV_JOURNAL_FIRST      1U /* flag of a record: its key begins anew */
/* disk_id of one that was read from a disk, and that nobody has looked through yet: opened again, it is new. */
#define FV_JOURNAL_UNSETTLED UINT64_MAX

/* Whose journal it is: opening one with another head is refused. Plain data, zero-padded texts. */
typedef struct fv_journal_head {
    char kind[16];   /* "worker", "coordinator" */
    char layout[16]; /* of the pages beside it: the backend's name; "" = none */
    char job[FV_JOURNAL_JOB_BYTES];
    uint32_t slot, n_slots; /* of the job's worker slots, this one's */
    uint64_t kv_bytes;      /* of the pages beside it */
    uint64_t disk_id; /* of the log on a disk that has all of it, too (disklog.h); 0: none has */
} fv_journal_head_t;

typedef struct fv_journal_record {
    uint32_t type; /* the owner's */
    uint32_t flags;
    uint32_t key;
    uint32_t n_bytes; /* of the body */
    uint64_t number;  /* of the key's records: one more each, from any number on */
    const void *body; /* 8-byte aligned */
} fv_journal_record_t;

/* What reading found. */
typedef struct fv_journal_report {
    uint64_t n_bytes;    /* looked at */
    uint64_t n_records;  /* whole */
    uint64_t n_damaged;  /* body damaged: reported to the visitor with body NULL */
    uint64_t n_holes;    /* places where no record could be made out */
    uint64_t tail_bytes; /* behind the last record, cut */
} fv_journal_report_t;

/* An error ends the reading and is returned by it. body NULL: the record is damaged. */
typedef fv_status_t (*fv_journal_visit_t)(void *arg, const fv_journal_record_t *record);

typedef struct fv_journal fv_journal_t;
struct fv_disklog;

/*
 * Opens `path`, or makes it with `head` (mode 0600). Waits at most wait_ms for another
 * process to let go of it.
 * Errors: FV_ERR_PRECONDITION naming what differs (job, slot, number of slots, layout, KV bytes) or that it is in use;
 *         FV_ERR_DATA_LOSS for a head that is damaged or of another version; FV_ERR_EXHAUSTED when the file system
 *         is full; FV_ERR_SYSTEM.
 */
FV_MUST_CHECK fv_status_t fv_journal_open(const char *path,
                                          const fv_journal_head_t *head,
                                          uint32_t wait_ms,
                                          fv_journal_t **out,
                                          bool *out_is_new);
/* Releases the lock. NULL is fine. */
void fv_journal_close(fv_journal_t *journal);
/* The same, and the file goes. */
void fv_journal_remove(fv_journal_t *journal);

/*
 * From here on all that is committed is on that disk's log before it is in the file; the next one that is written anew says so in
 * its head (disk_id). Borrowed; NULL: no longer.
 */
void fv_journal_set_disk(fv_journal_t *journal, struct fv_disklog *disk, uint64_t disk_id);

const fv_journal_head_t *fv_journal_head(const fv_journal_t *journal);
uint64_t fv_journal_bytes(const fv_journal_t *journal); /* committed */

/* Calls `visit` for each committed record, in order. */
FV_MUST_CHECK fv_status_t fv_journal_read(const fv_journal_t *journal,
                                          fv_journal_visit_t visit,
                                          void *arg,
                                          fv_journal_report_t *out);

/* Room for records of n_bytes in all (with fv_journal_size()): then adding and committing them can not fail for
 * want of space. Errors: FV_ERR_EXHAUSTED naming the file; FV_ERR_NO_MEMORY. */
FV_MUST_CHECK fv_status_t fv_journal_reserve(fv_journal_t *journal, size_t n_bytes);
/* What a record with such a body takes. */
size_t fv_journal_size(size_t body_bytes);

/* Adds a record to the next commit; its room was reserved. `body` may be in two pieces; the second may be NULL. */
void fv_journal_add(fv_journal_t *journal,
                    const fv_journal_record_t *record,
                    const void *more,
                    size_t more_bytes);
/* Records as they are in another journal, whole or not; their room was reserved. */
void fv_journal_add_raw(fv_journal_t *journal, const void *records, size_t n_bytes);
/* One that readers will report as damaged: what is known of `key` is not to be trusted. Its room was reserved. */
void fv_journal_add_damaged(fv_journal_t *journal, uint32_t key);
/* All that was added, or nothing. Errors: FV_ERR_SYSTEM, FV_ERR_EXHAUSTED: nothing was committed. */
FV_MUST_CHECK fv_status_t fv_journal_commit(fv_journal_t *journal);

/* From begin on records go to a new file; end makes it the journal, abort forgets it. */
FV_MUST_CHECK fv_status_t fv_journal_rewrite_begin(fv_journal_t *journal);
FV_MUST_CHECK fv_status_t fv_journal_rewrite_end(fv_journal_t *journal);
void fv_journal_rewrite_abort(fv_journal_t *journal);

/*
 * Without a lock, for tools and tests: the head and, of a file that another process writes, what was committed when it was
 * looked at. `visit` may be NULL. out_is_locked: a process has it open. Errors: as fv_journal_open(); FV_ERR_NOT_FOUND.
 */
FV_MUST_CHECK fv_status_t fv_journal_inspect(const char *path,
                                             fv_journal_visit_t visit,
                                             void *arg,
                                             fv_journal_head_t *out_head,
                                             fv_journal_report_t *out,
                                             bool *out_is_locked);

/* The reader itself: `data` is what lies behind the head, n_bytes of it committed, 8-byte aligned. */
FV_MUST_CHECK fv_status_t fv_journal_scan(const uint8_t *data,
                                          size_t n_bytes,
                                          fv_journal_visit_t visit,
                                          void *arg,
                                          fv_journal_report_t *out);

#endif /* FV_COMMON_JOURNAL_H */
