/*
 * disklog_write.c - batches and snapshots: one write for each commit, and the device's word that it has it.
 */
#include "common/disklog.h"
#include "common/disklog_internal.h"
#include "common/log.h"

#include <stdio.h>
#include <unistd.h>

/* ------------------------------------------------------------------ batches */

fv_status_t fv_disklog_reserve(fv_disklog_t *log, size_t n_bytes, size_t n_room)
{
    fv_disklog_file_t *file = fv_disklog_target(log);
    size_t n_begun = FV_DISKLOG_BATCH_BYTES + log->n_own;
    size_t n = n_begun + n_room;

    FV_RETURN_IF_ERR(
        fv_disklog_make_buffer(log, log->n_tail + n_begun + n_bytes + FV_DISKLOG_BLOCK));
    return (file->end + n <= file->allocated)
               ? FV_OK
               : fv_disklog_file_allocate((file == &log->next) ? "the new disk log" : log->path,
                                          file, file->end + n);
}

/* Where the next of the owner's records goes. */
static uint8_t *next_own(fv_disklog_t *log)
{
    return log->buffer + log->n_tail + FV_DISKLOG_BATCH_BYTES + log->n_own;
}

uint8_t *fv_disklog_begin(fv_disklog_t *log, const fv_journal_record_t *record)
{
    uint8_t *to = next_own(log);
    fv_journal_disk_record_t disk = {.type = (uint16_t)record->type,
                                     .flags = (uint16_t)record->flags,
                                     .key = record->key,
                                     .n_bytes = record->n_bytes,
                                     .number = record->number};

    FV_ASSERT((size_t)(to - log->buffer) + fv_journal_size(record->n_bytes) <= log->buffer_cap);
    memcpy(to, &disk, sizeof(disk));
    return to + sizeof(disk);
}

void fv_disklog_end(fv_disklog_t *log)
{
    uint8_t *to = next_own(log);
    fv_journal_disk_record_t disk;

    memcpy(&disk, to, sizeof(disk));
    const fv_journal_record_t record = {.type = disk.type,
                                        .flags = disk.flags,
                                        .key = disk.key,
                                        .n_bytes = disk.n_bytes,
                                        .number = disk.number,
                                        .body = to + sizeof(disk)};
    log->n_own += fv_journal_put_record(to, &record, NULL, 0);
    log->n_own_records++;
}

size_t fv_disklog_added(const fv_disklog_t *log)
{
    return log->n_own;
}

static uint32_t count_records(const uint8_t *records, size_t n_bytes)
{
    fv_journal_disk_record_t disk;
    uint32_t n = 0;

    for (size_t at = 0; at < n_bytes; at += fv_journal_size(disk.n_bytes)) {
        memcpy(&disk, records + at, sizeof(disk));
        n++;
    }
    return n;
}

static void forget(fv_disklog_t *log)
{
    log->n_own = 0;
    log->n_own_records = 0;
}

/* BATCH, own records, a journal's: behind the tail. Returns where they end in the buffer. */
static size_t put_batch(fv_disklog_t *log, const void *records, size_t n_bytes, bool is_last)
{
    fv_disklog_file_t *file = fv_disklog_target(log);
    const fv_disklog_batch_t batch = {
        .n_bytes = log->n_own + n_bytes,
        .n_records = log->n_own_records + count_records(records, n_bytes),
        .snapshot = log->in_snapshot ? (uint32_t)(file->n_snapshots + 1U) : 0U,
        .is_last = is_last ? 1U : 0U};
    const fv_journal_record_t head = {.type = FV_DISKLOG_BATCH,
                                      .number = file->n_batches + 1U,
                                      .body = &batch,
                                      .n_bytes = sizeof(batch)};
    size_t end = log->n_tail + FV_DISKLOG_BATCH_BYTES + log->n_own + n_bytes;
    size_t n_write = (end + FV_DISKLOG_BLOCK - 1U) / FV_DISKLOG_BLOCK * FV_DISKLOG_BLOCK;

    (void)fv_journal_put_record(log->buffer + log->n_tail, &head, NULL, 0);
    if (n_bytes > 0) {
        memcpy(next_own(log), records, n_bytes);
    }
    memset(log->buffer + end, 0, n_write - end);
    return end;
}

static fv_status_t commit(fv_disklog_t *log, const void *records, size_t n_bytes, bool is_last)
{
    fv_disklog_file_t *file = fv_disklog_target(log);

    if (file->fd < 0) {
        return fv_fail(FV_ERR_SYSTEM,
                       "%s: not written since a snapshot failed, until it is opened again",
                       log->path);
    }
    FV_RETURN_IF_ERR(fv_disklog_reserve(log, n_bytes, n_bytes));
    size_t end = put_batch(log, records, n_bytes, is_last);
    size_t n_write = (end + FV_DISKLOG_BLOCK - 1U) / FV_DISKLOG_BLOCK * FV_DISKLOG_BLOCK;
    FV_RETURN_IF_ERR(fv_disklog_write_at(log->path, file->fd, log->buffer, n_write,
                                         FV_JOURNAL_HEAD_BYTES + file->end - log->n_tail));
    file->end += end - log->n_tail;
    file->n_batches++;
    size_t n_tail = end % FV_DISKLOG_BLOCK;
    memmove(log->buffer, log->buffer + (end - n_tail), n_tail);
    log->n_tail = n_tail;
    return FV_OK;
}

fv_status_t fv_disklog_commit(fv_disklog_t *log, const void *records, size_t n_bytes)
{
    fv_status_t status = (log->n_own + n_bytes == 0) ? FV_OK : commit(log, records, n_bytes, false);

    forget(log);
    return status;
}

/* ------------------------------------------------------------------ snapshots */

static void next_path(const fv_disklog_t *log, char out[FV_DISKLOG_PATH_BYTES])
{
    (void)snprintf(out, FV_DISKLOG_PATH_BYTES, "%.*s.new", FV_DISKLOG_PATH_BYTES - 8, log->path);
}

void fv_disklog_want_fresh(fv_disklog_t *log)
{
    log->wants_fresh = true;
}

bool fv_disklog_wants_fresh(const fv_disklog_t *log)
{
    return log->wants_fresh;
}

bool fv_disklog_is_fresh(const fv_disklog_t *log)
{
    return log->next.fd >= 0;
}

fv_status_t fv_disklog_snapshot_begin(fv_disklog_t *log)
{
    char path[FV_DISKLOG_PATH_BYTES];

    FV_ASSERT(!log->in_snapshot);
    forget(log);
    log->in_snapshot = true;
    if (!log->wants_fresh) {
        return FV_OK;
    }
    next_path(log, path);
    fv_status_t status = fv_journal_open_locked(path, 0, &log->next.lock_fd);
    if (status == FV_OK) {
        status = fv_disklog_begin_file(log, path, &log->next);
    }
    if (status != FV_OK) {
        fv_disklog_snapshot_abort(log);
    }
    return status;
}

fv_status_t fv_disklog_snapshot_end(fv_disklog_t *log)
{
    char path[FV_DISKLOG_PATH_BYTES];
    fv_status_t status = commit(log, NULL, 0, true);

    forget(log);
    FV_RETURN_IF_ERR(status);
    fv_disklog_target(log)->n_snapshots++;
    if (log->next.fd >= 0) {
        next_path(log, path);
        if (rename(path, log->path) != 0) {
            return fv_journal_system_error(path, "rename");
        }
        fv_disklog_file_close(&log->file);
        log->file = log->next;
        log->next = (fv_disklog_file_t){.lock_fd = -1, .fd = -1};
        log->wants_fresh = false;
        status = fv_disklog_sync_folder(log->path);
        if (status != FV_OK) { /* the owner goes by the old one, the path by either */
            (void)close(log->file.fd);
            log->file.fd = -1;
        }
    }
    log->in_snapshot = false;
    return status;
}

void fv_disklog_snapshot_abort(fv_disklog_t *log)
{
    char path[FV_DISKLOG_PATH_BYTES];

    if (!log->in_snapshot) {
        return;
    }
    log->in_snapshot = false;
    log->file.n_snapshots++; /* what it has written is nobody's */
    forget(log);
    if (log->next.lock_fd >= 0) {
        next_path(log, path);
        (void)unlink(path);
        fv_disklog_file_close(&log->next);
        if (fv_disklog_load_tail(log) !=
            FV_OK) { /* the old one can not be gone on with: the next commit says so */
            fv_error("durability: %s", fv_error_context());
            fv_disklog_file_close(&log->file);
        }
    }
}
