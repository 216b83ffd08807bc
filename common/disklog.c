/*
 * disklog.c - the file of a log: opened, allocated ahead, written past the page cache.
 */
#define _GNU_SOURCE /* O_DIRECT, fallocate */

#include "common/disklog.h"

#include "common/disklog_internal.h"
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

#define GROW_MIN_BYTES ((uint64_t)1 << 20) /* the file is allocated ahead in such pieces */
#define GROW_MAX_BYTES ((uint64_t)64 << 20)
#define TMPFS_TYPE     0x01021994L
#define RAMFS_TYPE     0x858458f6L

/* ------------------------------------------------------------------ files */

fv_disklog_file_t *fv_disklog_target(fv_disklog_t *log)
{
    return (log->next.fd >= 0) ? &log->next : &log->file;
}

void fv_disklog_file_close(fv_disklog_file_t *file)
{
    if (file->fd >= 0) {
        (void)close(file->fd);
    }
    if (file->lock_fd >= 0) {
        (void)close(file->lock_fd);
    }
    *file = (fv_disklog_file_t){.lock_fd = -1, .fd = -1};
}

fv_status_t
fv_disklog_write_at(const char *path, int fd, const uint8_t *data, size_t n, uint64_t at)
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
fv_status_t fv_disklog_sync_folder(const char *path)
{
    char folder[FV_DISKLOG_PATH_BYTES];
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

fv_status_t fv_disklog_make_buffer(fv_disklog_t *log, size_t n_bytes)
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

    FV_RETURN_IF_ERR(fv_disklog_make_buffer(log, FV_JOURNAL_HEAD_BYTES));
    disk.crc = fv_journal_head_crc(&disk);
    memset(log->buffer, 0, FV_JOURNAL_HEAD_BYTES);
    memcpy(log->buffer, &disk, sizeof(disk));
    log->n_tail = 0;
    log->n_own = 0;
    log->n_own_records = 0;
    return fv_disklog_write_at(path, fd, log->buffer, FV_JOURNAL_HEAD_BYTES, 0);
}

/* The block in which the last batch ends: the next write begins with it. */
fv_status_t fv_disklog_load_tail(fv_disklog_t *log)
{
    const fv_disklog_file_t *file = &log->file;
    size_t n_tail = (size_t)(file->end % FV_DISKLOG_BLOCK);

    FV_RETURN_IF_ERR(fv_disklog_make_buffer(log, (size_t)2 * FV_DISKLOG_BLOCK));
    log->n_tail = 0;
    log->n_own = 0;
    log->n_own_records = 0;
    ssize_t n_read = (n_tail == 0) ? 0
                                   : pread(file->fd, log->buffer, FV_DISKLOG_BLOCK,
                                           (off_t)(FV_JOURNAL_HEAD_BYTES + file->end - n_tail));
    if (n_read < (ssize_t)n_tail) { /* a file that was cut may end inside the block */
        return fv_fail(FV_ERR_SYSTEM, "%s: cannot be read at %llu", log->path,
                       (unsigned long long)file->end);
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
fv_status_t fv_disklog_file_allocate(const char *path, fv_disklog_file_t *file, uint64_t end)
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

fv_status_t fv_disklog_begin_file(fv_disklog_t *log, const char *path, fv_disklog_file_t *file)
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
    FV_RETURN_IF_ERR(fv_disklog_begin_file(log, log->path, &log->file));
    return fv_disklog_sync_folder(log->path);
}

/* A last batch that did not get through goes, so that zeros follow again. */
static fv_status_t cut_tail(fv_disklog_t *log, uint64_t n_bytes)
{
    fv_disklog_file_t *file = &log->file;

    if ((ftruncate(file->lock_fd, (off_t)(FV_JOURNAL_HEAD_BYTES + file->end)) != 0) ||
        (fdatasync(file->lock_fd) != 0)) {
        return fv_journal_system_error(log->path, "truncate");
    }
    if (n_bytes > 0) {
        fv_warn("durability: %s: %llu bytes at the end had not got through, and are cut", log->path,
                (unsigned long long)n_bytes);
    }
    file->allocated = file->end / FV_DISKLOG_BLOCK * FV_DISKLOG_BLOCK;
    return fv_disklog_file_allocate(log->path, file, file->end + 1U);
}

static fv_status_t resume_log(fv_disklog_t *log, const fv_journal_head_t *head)
{
    const fv_disklog_reader_t nobody = {0};
    fv_journal_report_t report;
    size_t end = 0;

    FV_RETURN_IF_ERR(fv_journal_check_head(log->path, &log->head, head));
    FV_RETURN_IF_ERR(fv_disklog_sync_folder(log->path)); /* who renamed it may have died before */
    FV_RETURN_IF_ERR(open_for_writing(log, log->path, &log->file.fd));
    FV_RETURN_IF_ERR(fv_disklog_scan_file(log->path, log->file.lock_fd, &nobody, &report, &end,
                                          &log->file.n_batches));
    log->file.end = end;
    log->file.n_snapshots = log->file.n_batches; /* no fewer than there were */
    log->wants_fresh = (report.n_damaged > 0) || (report.n_holes > 0);
    if (!log->wants_fresh) {
        FV_RETURN_IF_ERR(cut_tail(log, report.tail_bytes));
    }
    return fv_disklog_load_tail(log);
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
    log->file = (fv_disklog_file_t){.lock_fd = -1, .fd = -1};
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
        fv_disklog_file_close(&log->file);
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
