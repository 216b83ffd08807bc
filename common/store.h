/*
 * store.h - the folder of a job's durable state, and the segments that hold KV pages in it.
 *
 *   DIR/JOB/coordinator.journal   models, sessions, what was appended (coord/ledger.h)
 *   DIR/JOB/slot-0002.journal     page tables of worker slot 2 (worker/store.h)
 *   DIR/JOB/slot-0002.kv          its pages: the KV arena itself, or a mirror of a device's
 *   DISK/JOB/coordinator.log      the same on a disk (disklog.h), for level `host`
 *   DISK/JOB/slot-0002.log
 *
 * DIR is /dev/shm/fovea-UID by default, so that files are memory, and outlive processes but not the host. A slot is a rank of
 * the job; a process that takes a dead rank's place attaches its slot's files (locks go with a process).
 *
 * Thread: any, one at a time per segment but for fv_segment_ensure().
 */
#ifndef FV_COMMON_STORE_H
#define FV_COMMON_STORE_H

#include "common/journal.h"
#include "common/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FV_STORE_PATH_BYTES 640
#define FV_STORE_DIR_BYTES  600
#define FV_STORE_SLOTS_MAX  10000U

/* A job's folder and this process's place in it. Plain data. */
typedef struct fv_store_place {
    char dir[FV_STORE_DIR_BYTES];      /* of the job */
    char disk_dir[FV_STORE_DIR_BYTES]; /* of the job, on a disk; "" = level process */
    char job[FV_JOURNAL_JOB_BYTES];
    uint32_t slot, n_slots;
    uint32_t wait_ms; /* for a process that is leaving the slot */
} fv_store_place_t;

typedef enum fv_store_file {
    FV_STORE_COORDINATOR,
    FV_STORE_TABLES, /* slot-N.journal */
    FV_STORE_PAGES,  /* slot-N.kv */
    FV_STORE_COORDINATOR_LOG,
    FV_STORE_LOG, /* slot-N.log */
} fv_store_file_t;

/* "" for dir = the default. Errors: FV_ERR_INVALID_ARG for a job that is no name (letters, digits, . _ -) or a path too long. */
FV_MUST_CHECK fv_status_t fv_store_place_make(const char *dir,
                                              const char *job,
                                              uint32_t slot,
                                              uint32_t n_slots,
                                              fv_store_place_t *out);
/* The place is on a disk, too. Errors: FV_ERR_INVALID_ARG for a path too long. */
FV_MUST_CHECK fv_status_t fv_store_place_disk(fv_store_place_t *place, const char *disk_dir);
/*
 * Makes the folders (0700); before anything below them is looked at. Errors: FV_ERR_SYSTEM naming the folder;
 * FV_ERR_PERMISSION when it is another user's, or a link.
 */
FV_MUST_CHECK fv_status_t fv_store_prepare(const fv_store_place_t *place);
void fv_store_path(const fv_store_place_t *place,
                   fv_store_file_t file,
                   char out[FV_STORE_PATH_BYTES]);
/* Takes the folder away if nothing is left in it. */
void fv_store_leave(const fv_store_place_t *place);
/* A job's name from where it listens: the same whenever it is started again; "" when the system chooses the port. */
void fv_store_job_name(const char *address, char out[FV_JOURNAL_JOB_BYTES]);
/* Bytes that the file system of the place can still take, and of all; false: unknown. */
bool fv_store_space(const fv_store_place_t *place, uint64_t *out_free, uint64_t *out_total);

/* ------------------------------------------------------------------ segments */

typedef struct fv_segment fv_segment_t;

/*
 * Maps the slot's pages, n_bytes of them and slack_bytes more, made when missing. No byte is allocated yet.
 * Errors: FV_ERR_EXHAUSTED naming free and needed when the file system has no room; FV_ERR_PRECONDITION when an existing
 * one has another size; FV_ERR_SYSTEM.
 */
FV_MUST_CHECK fv_status_t fv_segment_open(const char *path,
                                          size_t n_bytes,
                                          size_t slack_bytes,
                                          fv_segment_t **out,
                                          bool *out_is_new);
void fv_segment_close(fv_segment_t *segment); /* unmaps; the file stays */
void fv_segment_remove(fv_segment_t *segment);
uint8_t *fv_segment_base(const fv_segment_t *segment);

/* Allocates memory ahead on a thread of its own, from the first byte to the last. */
FV_MUST_CHECK fv_status_t fv_segment_populate(fv_segment_t *segment);
/*
 * Bytes [0, end) are allocated on return: touching them can not fail any more. Costs nothing when they are. Thread: any.
 * Errors: FV_ERR_EXHAUSTED when the file system is full.
 */
FV_MUST_CHECK fv_status_t fv_segment_ensure(fv_segment_t *segment, size_t end);
/* The same for bytes [begin, end) alone, wherever they are. Allocates each time: for what is needed from the start. */
FV_MUST_CHECK fv_status_t fv_segment_ensure_range(fv_segment_t *segment, size_t begin, size_t end);

/* ------------------------------------------------------------------ folders of all jobs */

/* One job below `dir` ("" = the default). Return false to stop. */
typedef bool (*fv_store_visit_t)(void *arg, const char *dir, const char *job);
FV_MUST_CHECK fv_status_t fv_store_each(const char *dir, fv_store_visit_t visit, void *arg);
/* Whether a process has one of the job's files open, or may have: they can not be looked at. */
bool fv_store_is_used(const char *job_dir);
/* Deletes a job's files. Errors: FV_ERR_PRECONDITION when it is used; FV_ERR_SYSTEM. */
FV_MUST_CHECK fv_status_t fv_store_delete(const char *job_dir);
/* Deletes all files of the place's job whose slots no process has: of a job that ends, or of an older one. */
void fv_store_clear(const fv_store_place_t *place);
/*
 * Deletes one file of a store, if it is there, holding the lock of its slot. Errors: FV_ERR_PRECONDITION when a process uses the
 * slot, the caller's own included; FV_ERR_SYSTEM.
 */
FV_MUST_CHECK fv_status_t fv_store_delete_file(const char *path);
/* Deletes jobs without a lasting name (FV_STORE_ANONYMOUS...) that no process uses; how many. */
uint32_t fv_store_sweep(const char *dir);
#define FV_STORE_ANONYMOUS "anonymous-"

#endif /* FV_COMMON_STORE_H */
