/*
 * disklog.c - writes a log: one write past the page cache for each commit, and the device's word that it has it.
 */
#define _GNU_SOURCE /* O_DIRECT, fallocate */

#include "common/disklog.h"

#include "common/disklog_format.h"
#include "common/log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <unistd.h>

#define PATH_BYTES     800
#define GROW_MIN_BYTES ((uint64_t)1 << 20) /* the file is allocated ahead in such pieces */
#define GROW_MAX_BYTES ((uint64_t)64 << 20)
#define TMPFS_TYPE     0x01021994L
#define RAMFS_TYPE     0x858458f6L

/* An open file. Its bytes are counted from behind its head. */
typedef struct log_file {
    int lock_fd;        /* ours alone; read through the page cache */
    int fd;             /* written */
    uint64_t end;       /* of the last batch */
    uint64_t allocated; /* >= end */
    uint64_t n_batches;
    uint64_t n_snapshots;
} log_file_t;

struct fv_disklog {
    char path[PATH_BYTES];
    fv_journal_head_t head;
    log_file_t file, next; /* next.fd >= 0: a fresh snapshot is under way */
    bool is_direct, wants_fresh, in_snapshot;
    uint8_t *
        buffer; /* aligned: the block that `end` lies in, up to it; room for a BATCH; own records */
    size_t buffer_cap;
    size_t n_tail, n_own; /* bytes of the block; of own records */
    uint32_t n_own_records;
    size_t body_at; /* of the record under way, from the buffer's begin */
};

/* ------------------------------------------------------------------ files */

static log_file_t *target(fv_disklog_t *log)
{
    return (log->next.fd >= 0) ? &log->next : &log->file;
}

static void file_close(log_file_t *file)
{
    if (file->fd >= 0) {
        (void)close(file->fd);
    }
    if (file->lock_fd >= 0) {
        (void)close(file->lock_fd);
    }
    *file = (log_file_t){.lock_fd = -1, .fd = -1};
}

static fv_status_t write_at(const char *path, int fd, const uint8_t *data, size_t n, uint64_t at)
{
    while (n > 0) {
        ssize_t done = pwrite(fd, data, n, (off_t)at);
        if ((done < 0) && (errno == EINTR)) {
            continue;
        }
        if (done <= 0) {
            return fv_journal_system_error(path, "write");
        }
        data += done;
        at += (uint64_t)done;
        n -= (size_t)done;
        if ((n > 0) && (at % FV_DISKLOG_BLOCK != 0)) {
            return fv_fail(FV_ERR_SYSTEM, "%s: a write ended inside a block", path);
        }
    }
    return FV_OK;
}

/* Names last as long as what they name. */
static fv_status_t sync_folder(const char *path)
{
    char folder[PATH_BYTES];
    const char *slash = strrchr(path, '/');

    (void)snprintf(folder, sizeof(folder), "%.*s", (slash == NULL) ? 1 : (int)(slash - path),
                   (slash == NULL) ? "." : path);
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    fv_status_t status = ((fd >= 0) && (fsync(fd) == 0))
                             ? FV_OK
                             : fv_journal_system_error(folder, "sync of the folder");
    if (fd >= 0) {
        (void)close(fd);
    }
    return status;
}

static fv_status_t check_home(const char *path, int fd)
{
    struct statfs fs;

    if ((fstatfs(fd, &fs) == 0) && ((fs.f_type == TMPFS_TYPE) || (fs.f_type == RAMFS_TYPE))) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "disk_dir: %s is memory, expected a disk: it would not survive its host",
                       path);
    }
    return FV_OK;
}

/* Writes go past the page cache where the file system can; they return when the device has them in any case. */
static fv_status_t open_for_writing(fv_disklog_t *log, const char *path, int *out_fd)
{
    *out_fd = open(path, O_RDWR | O_DSYNC | O_DIRECT | O_CLOEXEC);
    log->is_direct = *out_fd >= 0;
    if ((*out_fd < 0) && (errno == EINVAL)) {
        fv_info("durability: %s: its file system has no O_DIRECT, the page cache is used", path);
        *out_fd = open(path, O_RDWR | O_DSYNC | O_CLOEXEC);
    }
    return (*out_fd >= 0) ? FV_OK : fv_journal_system_error(path, "open");
}

static fv_status_t make_buffer(fv_disklog_t *log, size_t n_bytes)
{
    void *buffer = NULL;
    size_t cap = (log->buffer_cap == 0) ? ((size_t)64 << 10) : log->buffer_cap;

    if (n_bytes <= log->buffer_cap) {
        return FV_OK;
    }
    while (cap < n_bytes) {
        cap *= 2U;
    }
    if (posix_memalign(&buffer, FV_DISKLOG_BLOCK, cap) != 0) {
        return fv_fail(FV_ERR_NO_MEMORY, "disk log: %zu bytes of records", cap);
    }
    if (log->buffer != NULL) {
        memcpy(buffer, log->buffer, log->n_tail + FV_DISKLOG_BATCH_BYTES + log->n_own);
        free(log->buffer);
    }
    log->buffer = buffer;
    log->buffer_cap = cap;
    return FV_OK;
}

static fv_status_t write_head(fv_disklog_t *log, const char *path, int fd)
{
    fv_journal_disk_head_t disk = {
        .magic = FV_DISKLOG_MAGIC, .version = FV_JOURNAL_VERSION, .head = log->head};

    FV_RETURN_IF_ERR(make_buffer(log, FV_JOURNAL_HEAD_BYTES));
    disk.crc = fv_journal_head_crc(&disk);
    memset(log->buffer, 0, FV_JOURNAL_HEAD_BYTES);
    memcpy(log->buffer, &disk, sizeof(disk));
    log->n_tail = 0;
    log->n_own = 0;
    log->n_own_records = 0;
    return write_at(path, fd, log->buffer, FV_JOURNAL_HEAD_BYTES, 0);
}

/* The block in which the last batch ends: the next write begins with it. */
static fv_status_t load_tail(fv_disklog_t *log)
{
    const log_file_t *file = &log->file;
    size_t n_tail = (size_t)(file->end % FV_DISKLOG_BLOCK);

    FV_RETURN_IF_ERR(make_buffer(log, (size_t)2 * FV_DISKLOG_BLOCK));
    log->n_tail = 0;
    log->n_own = 0;
    log->n_own_records = 0;
    if ((n_tail > 0) &&
        (pread(file->fd, log->buffer, FV_DISKLOG_BLOCK,
               (off_t)(FV_JOURNAL_HEAD_BYTES + file->end - n_tail)) != (ssize_t)FV_DISKLOG_BLOCK)) {
        return fv_journal_system_error(log->path, "read");
    }
    log->n_tail = n_tail;
    return FV_OK;
}

static uint64_t free_bytes(int fd)
{
    struct statvfs fs;

    return (fstatvfs(fd, &fs) == 0) ? (uint64_t)fs.f_bavail * fs.f_frsize : 0U;
}

/* What was allocated stays zeros until it is written; the file's size does not change with each write. */
static fv_status_t file_allocate(const char *path, log_file_t *file, uint64_t end)
{
    uint64_t grow = file->allocated / 4U;
    uint64_t need = end - file->allocated;

    grow = (grow < GROW_MIN_BYTES) ? GROW_MIN_BYTES : grow;
    grow = (grow > GROW_MAX_BYTES) ? GROW_MAX_BYTES : grow;
    grow = (grow < need) ? need : grow;
    grow = (grow + FV_DISKLOG_BLOCK - 1U) / FV_DISKLOG_BLOCK * FV_DISKLOG_BLOCK;
    off_t at = (off_t)(FV_JOURNAL_HEAD_BYTES + file->allocated);
    if ((fallocate(file->lock_fd, 0, at, (off_t)grow) != 0) &&
        ((errno != EOPNOTSUPP) || (ftruncate(file->lock_fd, at + (off_t)grow) != 0))) {
        uint64_t n_free = free_bytes(file->lock_fd);
        fv_status_t status = fv_journal_system_error(path, "no room for more");
        return (status != FV_ERR_EXHAUSTED)
                   ? status
                   : fv_fail(status, "%s: %llu bytes needed, its file system has %llu free", path,
                             (unsigned long long)grow, (unsigned long long)n_free);
    }
    file->allocated += grow;
    return FV_OK;
}

/* ------------------------------------------------------------------ life */

static fv_status_t begin_file(fv_disklog_t *log, const char *path, log_file_t *file)
{
    FV_RETURN_IF_ERR(check_home(path, file->lock_fd));
    if (ftruncate(file->lock_fd, 0) != 0) {
        return fv_journal_system_error(path, "truncate");
    }
    FV_RETURN_IF_ERR(open_for_writing(log, path, &file->fd));
    return write_head(log, path, file->fd);
}

static fv_status_t begin_log(fv_disklog_t *log, const fv_journal_head_t *head)
{
    log->head = *head;
    log->head.disk_id = 0;
    while ((log->head.disk_id == 0U) || (log->head.disk_id == FV_JOURNAL_UNSETTLED)) {
        if (getrandom(&log->head.disk_id, sizeof(log->head.disk_id), 0) < 0) {
            return fv_journal_system_error(log->path, "getrandom");
        }
    }
    FV_RETURN_IF_ERR(begin_file(log, log->path, &log->file));
    return sync_folder(log->path);
}

/* A last batch that did not get through goes, so that zeros follow again. */
static fv_status_t cut_tail(fv_disklog_t *log, uint64_t n_bytes)
{
    log_file_t *file = &log->file;

    if ((ftruncate(file->lock_fd, (off_t)(FV_JOURNAL_HEAD_BYTES + file->end)) != 0) ||
        (fdatasync(file->lock_fd) != 0)) {
        return fv_journal_system_error(log->path, "truncate");
    }
    if (n_bytes > 0) {
        fv_warn("durability: %s: %llu bytes at the end had not got through, and are cut", log->path,
                (unsigned long long)n_bytes);
    }
    file->allocated = file->end / FV_DISKLOG_BLOCK * FV_DISKLOG_BLOCK;
    return file_allocate(log->path, file, file->end + 1U);
}

static fv_status_t resume_log(fv_disklog_t *log, const fv_journal_head_t *head)
{
    const fv_disklog_reader_t nobody = {0};
    fv_journal_report_t report;
    size_t end = 0;

    FV_RETURN_IF_ERR(fv_journal_check_head(log->path, &log->head, head));
    FV_RETURN_IF_ERR(open_for_writing(log, log->path, &log->file.fd));
    FV_RETURN_IF_ERR(fv_disklog_scan_file(log->path, log->file.lock_fd, &nobody, &report, &end,
                                          &log->file.n_batches));
    log->file.end = end;
    log->file.n_snapshots = log->file.n_batches; /* no fewer than there were */
    log->wants_fresh = (report.n_damaged > 0) || (report.n_holes > 0);
    if (!log->wants_fresh) {
        FV_RETURN_IF_ERR(cut_tail(log, report.tail_bytes));
    }
    return load_tail(log);
}

static fv_status_t
open_log(fv_disklog_t *log, const fv_journal_head_t *head, uint32_t wait_ms, bool *out_is_new)
{
    struct stat info;

    FV_RETURN_IF_ERR(fv_journal_open_locked(log->path, wait_ms, &log->file.lock_fd));
    if (fstat(log->file.lock_fd, &info) != 0) {
        return fv_journal_system_error(log->path, "stat");
    }
    *out_is_new = info.st_size < (off_t)FV_JOURNAL_HEAD_BYTES; /* also one that died at birth */
    if (*out_is_new) {
        return begin_log(log, head);
    }
    FV_RETURN_IF_ERR(check_home(log->path, log->file.lock_fd));
    FV_RETURN_IF_ERR(fv_disklog_read_head(log->path, log->file.lock_fd, &log->head));
    FV_RETURN_IF_ERR(resume_log(log, head));
    *out_is_new = log->file.n_batches == 0U;
    return FV_OK;
}

fv_status_t fv_disklog_open(const char *path,
                            const fv_journal_head_t *head,
                            uint32_t wait_ms,
                            fv_disklog_t **out,
                            bool *out_is_new)
{
    fv_disklog_t *log = calloc(1, sizeof(*log));

    if (log == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "disk log");
    }
    log->file = (log_file_t){.lock_fd = -1, .fd = -1};
    log->next = log->file;
    fv_status_t status = FV_OK;
    if (snprintf(log->path, sizeof(log->path), "%s", path) >= (int)sizeof(log->path) - 8) {
        status = fv_fail(FV_ERR_INVALID_ARG, "%s: too long a path", path);
    } else {
        status = open_log(log, head, wait_ms, out_is_new);
    }
    if (status != FV_OK) {
        fv_disklog_close(log);
        return status;
    }
    *out = log;
    return FV_OK;
}

void fv_disklog_close(fv_disklog_t *log)
{
    if (log != NULL) {
        fv_disklog_snapshot_abort(log);
        file_close(&log->file);
        free(log->buffer);
        free(log);
    }
}

void fv_disklog_remove(fv_disklog_t *log)
{
    if (log != NULL) {
        (void)unlink(log->path); /* before the lock goes: nobody else's file is meant */
        fv_disklog_close(log);
    }
}

uint64_t fv_disklog_id(const fv_disklog_t *log)
{
    return log->head.disk_id;
}

uint64_t fv_disklog_bytes(const fv_disklog_t *log)
{
    return log->file.end;
}

fv_status_t
fv_disklog_read(fv_disklog_t *log, const fv_disklog_reader_t *reader, fv_journal_report_t *out)
{
    size_t end = 0;
    uint64_t n_batches = 0;

    return fv_disklog_scan_file(log->path, log->file.lock_fd, reader, out, &end, &n_batches);
}

/* ------------------------------------------------------------------ batches */

fv_status_t fv_disklog_reserve(fv_disklog_t *log, size_t n_bytes, size_t n_room)
{
    log_file_t *file = target(log);
    size_t n_begun = FV_DISKLOG_BATCH_BYTES + log->n_own;
    size_t n = n_begun + n_room;

    FV_RETURN_IF_ERR(make_buffer(log, log->n_tail + n_begun + n_bytes + FV_DISKLOG_BLOCK));
    return (file->end + n <= file->allocated)
               ? FV_OK
               : file_allocate((file == &log->next) ? "the new disk log" : log->path, file,
                               file->end + n);
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
    log_file_t *file = target(log);
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
    log_file_t *file = target(log);

    FV_RETURN_IF_ERR(fv_disklog_reserve(log, n_bytes, n_bytes));
    size_t end = put_batch(log, records, n_bytes, is_last);
    size_t n_write = (end + FV_DISKLOG_BLOCK - 1U) / FV_DISKLOG_BLOCK * FV_DISKLOG_BLOCK;
    FV_RETURN_IF_ERR(write_at(log->path, file->fd, log->buffer, n_write,
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

static void next_path(const fv_disklog_t *log, char out[PATH_BYTES])
{
    (void)snprintf(out, PATH_BYTES, "%.*s.new", PATH_BYTES - 8, log->path);
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
    char path[PATH_BYTES];

    FV_ASSERT(!log->in_snapshot);
    forget(log);
    log->in_snapshot = true;
    if (!log->wants_fresh) {
        return FV_OK;
    }
    next_path(log, path);
    fv_status_t status = fv_journal_open_locked(path, 0, &log->next.lock_fd);
    if (status == FV_OK) {
        status = begin_file(log, path, &log->next);
    }
    if (status != FV_OK) {
        fv_disklog_snapshot_abort(log);
    }
    return status;
}

fv_status_t fv_disklog_snapshot_end(fv_disklog_t *log)
{
    char path[PATH_BYTES];
    fv_status_t status = commit(log, NULL, 0, true);

    forget(log);
    FV_RETURN_IF_ERR(status);
    target(log)->n_snapshots++;
    if (log->next.fd >= 0) {
        next_path(log, path);
        if (rename(path, log->path) != 0) {
            return fv_journal_system_error(path, "rename");
        }
        file_close(&log->file);
        log->file = log->next;
        log->next = (log_file_t){.lock_fd = -1, .fd = -1};
        log->wants_fresh = false;
        log->in_snapshot = false;
        return sync_folder(log->path);
    }
    log->in_snapshot = false;
    return FV_OK;
}

void fv_disklog_snapshot_abort(fv_disklog_t *log)
{
    char path[PATH_BYTES];

    if (!log->in_snapshot) {
        return;
    }
    log->in_snapshot = false;
    log->file.n_snapshots++; /* what it has written is nobody's */
    forget(log);
    if (log->next.lock_fd >= 0) {
        next_path(log, path);
        (void)unlink(path);
        file_close(&log->next);
        if (load_tail(log) !=
            FV_OK) { /* the old one can not be gone on with: the next commit says so */
            fv_error("durability: %s", fv_error_context());
            file_close(&log->file);
        }
    }
}
