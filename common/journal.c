/*
 * journal.c - writes a journal: records gather in memory, one write and one store commit them.
 */
#define _GNU_SOURCE /* flock, fallocate */

#include "common/journal.h"

#include "common/disklog.h"
#include "common/journal_format.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PATH_BYTES   800
#define GROW_BYTES   ((uint64_t)256 << 10) /* the file is allocated ahead in such pieces, at least */
#define FLUSH_BYTES  ((size_t)1 << 20)     /* of a rewrite: written when so much has gathered */
#define BATCH_FACTOR 3U                    /* a batch of the smallest record, to that record */

/* An open file with its mapped head. */
typedef struct journal_file {
    int fd;
    uint8_t *head;      /* FV_JOURNAL_HEAD_BYTES, shared */
    uint64_t committed; /* behind the head */
    uint64_t written;   /* >= committed */
    uint64_t allocated;
} journal_file_t;

struct fv_journal {
    char path[PATH_BYTES];
    fv_journal_head_t head;
    journal_file_t file, next; /* next.fd >= 0: a rewrite is under way */
    fv_disklog_t *disk;        /* has all of it, too, and before it; NULL: none */
    uint8_t *buffer;           /* added, not yet written */
    size_t n_buffered, buffer_cap;
};

/* ------------------------------------------------------------------ files */

static void file_close(journal_file_t *file)
{
    if (file->head != NULL) {
        (void)munmap(file->head, FV_JOURNAL_HEAD_BYTES);
    }
    if (file->fd >= 0) {
        (void)close(file->fd);
    }
    *file = (journal_file_t){.fd = -1};
}

static fv_status_t file_write(const char *path, int fd, const void *data, size_t n, uint64_t at)
{
    const uint8_t *from = data;

    while (n > 0) {
        ssize_t done = pwrite(fd, from, n, (off_t)at);
        if ((done < 0) && (errno == EINTR)) {
            continue;
        }
        if (done <= 0) {
            return fv_journal_system_error(path, "write");
        }
        from += done;
        at += (uint64_t)done;
        n -= (size_t)done;
    }
    return FV_OK;
}

static fv_status_t file_write_head(const char *path, int fd, const fv_journal_head_t *head)
{
    uint8_t page[FV_JOURNAL_HEAD_BYTES] = {0};
    uint64_t word = fv_journal_pack_committed(0);
    fv_journal_disk_head_t disk = {
        .magic = FV_JOURNAL_MAGIC, .version = FV_JOURNAL_VERSION, .head = *head};

    disk.crc = fv_journal_head_crc(&disk);
    memcpy(page, &disk, sizeof(disk));
    memcpy(page + FV_JOURNAL_COMMITTED_AT, &word, sizeof(word));
    return file_write(path, fd, page, sizeof(page), 0);
}

static fv_status_t file_write_id(const char *path, int fd, fv_journal_head_t *head)
{
    fv_journal_disk_head_t disk = {.magic = FV_JOURNAL_MAGIC, .version = FV_JOURNAL_VERSION};

    if (head->disk_id == 0U) {
        return FV_OK;
    }
    head->disk_id = 0;
    disk.head = *head;
    disk.crc = fv_journal_head_crc(&disk);
    return file_write(path, fd, &disk, sizeof(disk), 0);
}

static fv_status_t file_map_head(const char *path, journal_file_t *file)
{
    void *head = mmap(NULL, FV_JOURNAL_HEAD_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file->fd, 0);

    if (head == MAP_FAILED) {
        return fv_journal_system_error(path, "mmap");
    }
    file->head = head;
    return FV_OK;
}

static void file_publish(journal_file_t *file)
{
    _Atomic(uint64_t) *word = (void *)(file->head + FV_JOURNAL_COMMITTED_AT);

    file->committed = file->written;
    atomic_store_explicit(word, fv_journal_pack_committed(file->committed), memory_order_release);
}

/* What was allocated stays: a later write needs no new room. */
static fv_status_t file_allocate(const char *path, journal_file_t *file, uint64_t n_bytes)
{
    uint64_t grow = n_bytes - file->allocated;

    grow = (grow < GROW_BYTES) ? GROW_BYTES : grow;
    if ((fallocate(file->fd, FALLOC_FL_KEEP_SIZE, (off_t)(FV_JOURNAL_HEAD_BYTES + file->allocated),
                   (off_t)grow) != 0) &&
        (errno != EOPNOTSUPP)) {
        return fv_journal_system_error(path, "no room for more records");
    }
    file->allocated += grow;
    return FV_OK;
}

/* ------------------------------------------------------------------ opening */

static fv_status_t
open_file(fv_journal_t *journal, const fv_journal_head_t *head, uint32_t wait_ms, bool *out_is_new)
{
    struct stat info;
    journal_file_t *file = &journal->file;

    FV_RETURN_IF_ERR(fv_journal_open_locked(journal->path, wait_ms, &file->fd));
    if (fstat(file->fd, &info) != 0) {
        return fv_journal_system_error(journal->path, "stat");
    }
    *out_is_new = info.st_size < (off_t)FV_JOURNAL_HEAD_BYTES; /* also one that died at birth */
    if (!*out_is_new) {
        FV_RETURN_IF_ERR(
            fv_journal_read_head(journal->path, file->fd, &journal->head, &file->committed));
        /* nothing in it: it may become another one */
        *out_is_new = (file->committed == 0U) || (journal->head.disk_id == FV_JOURNAL_UNSETTLED);
        file->committed = *out_is_new ? 0U : file->committed;
    }
    if (*out_is_new) {
        FV_RETURN_IF_ERR(file_write_head(journal->path, file->fd, head));
        journal->head = *head;
    } else {
        FV_RETURN_IF_ERR(fv_journal_check_head(journal->path, &journal->head, head));
        if (head->disk_id == 0U) { /* what is added from here on is on no disk */
            FV_RETURN_IF_ERR(file_write_id(journal->path, file->fd, &journal->head));
        }
        file->written = file->committed;
        file->allocated = file->committed;
    }
    return file_map_head(journal->path, file);
}

fv_status_t fv_journal_open(const char *path,
                            const fv_journal_head_t *head,
                            uint32_t wait_ms,
                            fv_journal_t **out,
                            bool *out_is_new)
{
    fv_journal_t *journal = calloc(1, sizeof(*journal));

    if (journal == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "journal");
    }
    journal->file.fd = -1;
    journal->next.fd = -1;
    fv_status_t status = FV_OK;
    if (snprintf(journal->path, sizeof(journal->path), "%s", path) >= (int)sizeof(journal->path)) {
        status = fv_fail(FV_ERR_INVALID_ARG, "%s: too long a path", path);
    } else {
        status = open_file(journal, head, wait_ms, out_is_new);
    }
    if (status != FV_OK) {
        fv_journal_close(journal);
        return status;
    }
    *out = journal;
    return FV_OK;
}

void fv_journal_close(fv_journal_t *journal)
{
    if (journal == NULL) {
        return;
    }
    fv_journal_rewrite_abort(journal);
    file_close(&journal->file);
    free(journal->buffer);
    free(journal);
}

void fv_journal_remove(fv_journal_t *journal)
{
    if (journal != NULL) {
        (void)unlink(journal->path); /* before the lock goes: nobody else's file is meant */
        fv_journal_close(journal);
    }
}

void fv_journal_set_disk(fv_journal_t *journal, fv_disklog_t *disk, uint64_t disk_id)
{
    journal->disk = disk;
    journal->head.disk_id = disk_id;
}

const fv_journal_head_t *fv_journal_head(const fv_journal_t *journal)
{
    return &journal->head;
}

uint64_t fv_journal_bytes(const fv_journal_t *journal)
{
    return journal->file.committed;
}

fv_status_t fv_journal_read(const fv_journal_t *journal,
                            fv_journal_visit_t visit,
                            void *arg,
                            fv_journal_report_t *out)
{
    return fv_journal_scan_file(journal->path, journal->file.fd, journal->file.committed, visit,
                                arg, out);
}

/* ------------------------------------------------------------------ records */

size_t fv_journal_size(size_t body_bytes)
{
    return sizeof(fv_journal_disk_record_t) + fv_journal_padded(body_bytes);
}

/* Where records go now. */
static journal_file_t *target(fv_journal_t *journal)
{
    return (journal->next.fd >= 0) ? &journal->next : &journal->file;
}

static fv_status_t flush(fv_journal_t *journal)
{
    journal_file_t *file = target(journal);

    if (journal->disk != NULL) {
        FV_RETURN_IF_ERR(fv_disklog_commit(journal->disk, journal->buffer, journal->n_buffered));
    }
    FV_RETURN_IF_ERR(file_write(journal->path, file->fd, journal->buffer, journal->n_buffered,
                                FV_JOURNAL_HEAD_BYTES + file->written));
    file->written += journal->n_buffered;
    journal->n_buffered = 0;
    return FV_OK;
}

fv_status_t fv_journal_reserve(fv_journal_t *journal, size_t n_bytes)
{
    journal_file_t *file = target(journal);

    if ((journal->next.fd >= 0) && (journal->n_buffered >= FLUSH_BYTES)) {
        FV_RETURN_IF_ERR(flush(journal));
    }
    size_t n = journal->n_buffered + n_bytes;
    if (n > journal->buffer_cap) {
        size_t cap = (journal->buffer_cap == 0) ? 4096U : journal->buffer_cap;
        while (cap < n) {
            cap *= 2U;
        }
        uint8_t *buffer = realloc(journal->buffer, cap);
        if (buffer == NULL) {
            return fv_fail(FV_ERR_NO_MEMORY, "journal: %zu bytes of records", cap);
        }
        journal->buffer = buffer;
        journal->buffer_cap = cap;
    }
    if (journal->disk != NULL) {
        /* each record may be committed by itself, in a batch of its own */
        FV_RETURN_IF_ERR(fv_disklog_reserve(journal->disk, n, BATCH_FACTOR * n));
    }
    return (file->written + n <= file->allocated)
               ? FV_OK
               : file_allocate(journal->path, file, file->written + n);
}

void fv_journal_add(fv_journal_t *journal,
                    const fv_journal_record_t *record,
                    const void *more,
                    size_t more_bytes)
{
    FV_ASSERT(journal->n_buffered + fv_journal_size(record->n_bytes + more_bytes) <=
              journal->buffer_cap);
    journal->n_buffered +=
        fv_journal_put_record(journal->buffer + journal->n_buffered, record, more, more_bytes);
}

void fv_journal_add_raw(fv_journal_t *journal, const void *records, size_t n_bytes)
{
    FV_ASSERT(journal->n_buffered + n_bytes <= journal->buffer_cap);
    memcpy(journal->buffer + journal->n_buffered, records, n_bytes);
    journal->n_buffered += n_bytes;
}

void fv_journal_add_damaged(fv_journal_t *journal, uint32_t key)
{
    fv_journal_disk_record_t disk = {
        .magic = FV_JOURNAL_RECORD_MAGIC, .key = key, .body_crc = ~fv_crc32c(0, NULL, 0)};

    disk.head_crc = fv_journal_record_crc(&disk);
    fv_journal_add_raw(journal, &disk, sizeof(disk));
}

fv_status_t fv_journal_commit(fv_journal_t *journal)
{
    journal_file_t *file = &journal->file;

    FV_ASSERT(journal->next.fd < 0);
    if (journal->n_buffered == 0) { /* pages that no record speaks of are nobody's */
        return FV_OK;
    }
    fv_status_t status = flush(journal);
    if (status != FV_OK) { /* the next commit writes over what got through */
        journal->n_buffered = 0;
        return status;
    }
    file_publish(file);
    return FV_OK;
}

/* ------------------------------------------------------------------ rewriting */

static void next_path(const fv_journal_t *journal, char out[PATH_BYTES + 8])
{
    (void)snprintf(out, PATH_BYTES + 8, "%s.new", journal->path);
}

fv_status_t fv_journal_rewrite_begin(fv_journal_t *journal)
{
    char path[PATH_BYTES + 8];
    journal_file_t next = {.fd = -1};

    FV_ASSERT((journal->n_buffered == 0) && (journal->next.fd < 0));
    next_path(journal, path);
    next.fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (next.fd < 0) {
        return fv_journal_system_error(path, "open");
    }
    fv_status_t status =
        (flock(next.fd, LOCK_EX | LOCK_NB) == 0) ? FV_OK : fv_journal_system_error(path, "lock");
    if (status == FV_OK) {
        status = file_write_head(path, next.fd, &journal->head);
    }
    if (status == FV_OK) {
        status = file_map_head(path, &next);
    }
    journal->next = next;
    if ((status == FV_OK) && (journal->disk != NULL)) {
        status = fv_disklog_snapshot_begin(journal->disk);
    }
    if (status != FV_OK) {
        fv_journal_rewrite_abort(journal);
    }
    return status;
}

fv_status_t fv_journal_rewrite_end(fv_journal_t *journal)
{
    char path[PATH_BYTES + 8];

    FV_RETURN_IF_ERR(flush(journal));
    if (journal->disk != NULL) { /* a death in between: both say the same */
        FV_RETURN_IF_ERR(fv_disklog_snapshot_end(journal->disk));
    }
    file_publish(&journal->next);
    next_path(journal, path);
    if (rename(path, journal->path) != 0) {
        return fv_journal_system_error(path, "rename");
    }
    file_close(&journal->file);
    journal->file = journal->next;
    journal->next = (journal_file_t){.fd = -1};
    return FV_OK;
}

void fv_journal_rewrite_abort(fv_journal_t *journal)
{
    char path[PATH_BYTES + 8];

    if (journal->next.fd >= 0) {
        next_path(journal, path);
        (void)unlink(path);
        file_close(&journal->next);
        if (journal->disk != NULL) {
            fv_disklog_snapshot_abort(journal->disk);
        }
    }
    journal->n_buffered = 0;
}
