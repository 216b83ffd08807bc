/*
 * disklog.h - a journal's copy on a disk, with the pages that it speaks of: for level `host`.
 *
 *   | head, 4 KiB: whose it is | batch: records | batch: records | ... | zeros, allocated ahead |
 *
 * A commit is one write, past the page cache where the file system can (O_DIRECT), and returns when the device has it
 * (O_DSYNC): a batch, which is a record that says how many bytes and records follow, and those. Records are a journal's
 * (journal_format.h), and the owner's of pages, which the journal does not have. A batch that did not get through whole never
 * happened. Batches follow each other without a gap: the block in which one ends is written again with the next, the same
 * bytes at the same place.
 *
 * What the whole state is can be written anew (a snapshot): into the log, where only tables are meant, or into a new file that
 * takes its place, with all pages. So a log takes about twice what it describes.
 *
 * Torn or damaged: devices write sectors of 512 bytes whole. A last batch with a sector of zeros did not get through; one that
 * has all of its sectors, and whose checksums do not hold, is damaged, like one in the middle.
 *
 * Thread: one at a time.
 */
#ifndef FV_COMMON_DISKLOG_H
#define FV_COMMON_DISKLOG_H

#include "common/journal.h"
#include "common/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Types of records from here on are not of the journal. */
#define FV_DISKLOG_OWN 0x8000U
enum {
    FV_DISKLOG_BATCH = FV_DISKLOG_OWN, /* number: one more each; fv_disklog_batch_t */
    FV_DISKLOG_PAGES,                  /* the first of the owner's */
};

/* Body of a BATCH: what follows. */
typedef struct fv_disklog_batch {
    uint64_t n_bytes;
    uint32_t n_records;
    uint32_t snapshot; /* of which it is a part; 0: of none */
    uint32_t is_last;  /* of the snapshot: what was before it is past */
    uint32_t reserved;
} fv_disklog_batch_t;

typedef struct fv_disklog fv_disklog_t;

/*
 * Opens `path`, or makes it with `head` (mode 0600). Waits at most wait_ms for another process to let go of it.
 * Errors: as fv_journal_open(); FV_ERR_INVALID_ARG on a file system that is memory (tmpfs): it would not survive its host.
 */
FV_MUST_CHECK fv_status_t fv_disklog_open(const char *path,
                                          const fv_journal_head_t *head,
                                          uint32_t wait_ms,
                                          fv_disklog_t **out,
                                          bool *out_is_new);
void fv_disklog_close(fv_disklog_t *log); /* NULL is fine */
void fv_disklog_remove(fv_disklog_t *log);

uint64_t fv_disklog_id(const fv_disklog_t *log);    /* random, never 0: of this log's whole life */
uint64_t fv_disklog_bytes(const fv_disklog_t *log); /* of all batches */

/* ------------------------------------------------------------------ writing */

/* Room for records of n_bytes in all with the next commit, and of n_room (not less) with it and others: then nothing fails for
 * want of it. Errors: FV_ERR_EXHAUSTED with the bytes needed and free; FV_ERR_NO_MEMORY. */
FV_MUST_CHECK fv_status_t fv_disklog_reserve(fv_disklog_t *log, size_t n_bytes, size_t n_room);
/* One of the owner's records for the next commit; returns its body of record->n_bytes, to be filled in before end(). */
uint8_t *fv_disklog_begin(fv_disklog_t *log, const fv_journal_record_t *record);
void fv_disklog_end(fv_disklog_t *log);
size_t fv_disklog_added(const fv_disklog_t *log); /* bytes of them */
/* What was added since the last commit, and a journal's records: on the device when it returns. Errors: nothing was committed,
 * and what was added is forgotten. */
FV_MUST_CHECK fv_status_t fv_disklog_commit(fv_disklog_t *log, const void *records, size_t n_bytes);

/* The next snapshot goes to a new file, with all pages. */
void fv_disklog_want_fresh(fv_disklog_t *log);
bool fv_disklog_wants_fresh(const fv_disklog_t *log); /* also when it was found damaged */
/* From begin on commits are parts of a snapshot; end makes it the state, abort forgets it. An end that fails once the new file
 * has taken its place leaves open which is the state: nothing is committed any more until the log is opened again. */
FV_MUST_CHECK fv_status_t fv_disklog_snapshot_begin(fv_disklog_t *log);
bool fv_disklog_is_fresh(const fv_disklog_t *log); /* the snapshot under way needs the pages */
FV_MUST_CHECK fv_status_t fv_disklog_snapshot_end(fv_disklog_t *log);
void fv_disklog_snapshot_abort(fv_disklog_t *log);

/* ------------------------------------------------------------------ reading */

#define FV_DISKLOG_ANYBODY UINT32_MAX

/* An error of these ends the reading and is returned by it. */
typedef struct fv_disklog_reader {
    /* A record of the owner's, in order; body NULL: it is damaged. NULL: they are skipped. */
    fv_status_t (*page)(void *arg, const fv_journal_record_t *record);
    /* Bytes of a journal's records since the last snapshot, damaged ones and holes included. NULL: they are skipped. */
    fv_status_t (*table)(void *arg, const void *records, size_t n_bytes);
    /* A record with FV_JOURNAL_FIRST, outside snapshots: what was said of its key before is past. NULL: nobody asks. */
    fv_status_t (*first)(void *arg, const fv_journal_record_t *record);
    /* Pages are missing that may have been of this key; FV_DISKLOG_ANYBODY: of any. NULL: nobody asks. */
    fv_status_t (*suspect)(void *arg, uint32_t key);
    void *arg;
} fv_disklog_reader_t;

/* tail_bytes: of a batch that did not get through, or (n_holes > 0) of what nothing could be made of. */
FV_MUST_CHECK fv_status_t fv_disklog_read(fv_disklog_t *log,
                                          const fv_disklog_reader_t *reader,
                                          fv_journal_report_t *out);
/* The reader itself: `data` is what lies behind the head, 8-byte aligned. *out_end: of the last batch that counts. */
FV_MUST_CHECK fv_status_t fv_disklog_scan(const uint8_t *data,
                                          size_t n_bytes,
                                          const fv_disklog_reader_t *reader,
                                          fv_journal_report_t *out,
                                          size_t *out_end,
                                          uint64_t *out_n_batches);
/* The head of a log that need not be ours. Errors: FV_ERR_NOT_FOUND; FV_ERR_DATA_LOSS; FV_ERR_SYSTEM. */
FV_MUST_CHECK fv_status_t fv_disklog_head(const char *path, fv_journal_head_t *out);
/* Without a lock, for tools and tests: as fv_journal_inspect(). */
FV_MUST_CHECK fv_status_t fv_disklog_inspect(const char *path,
                                             const fv_disklog_reader_t *reader,
                                             fv_journal_head_t *out_head,
                                             fv_journal_report_t *out,
                                             bool *out_is_locked);

#endif /* FV_COMMON_DISKLOG_H */
