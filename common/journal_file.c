/*
 * journal_file.c - files of records: opened by one process at a time, known by their heads, filled record by record.
 */
#define _GNU_SOURCE /* flock */

#include "common/clock.h"
#include "common/journal_format.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define NAP_MS 5

fv_status_t fv_journal_system_error(const char *path, const char *what)
{
    return fv_fail(((errno == ENOSPC) || (errno == EDQUOT) || (errno == EFBIG)) ? FV_ERR_EXHAUSTED
                                                                                : FV_ERR_SYSTEM,
                   "%s: %s: %s", path, what,
                   (errno == ENOSPC) ? "the file system is full" : strerror(errno));
}

static bool is_same_file(const char *path, int fd)
{
    struct stat a;
    struct stat b;

    return (fstat(fd, &a) == 0) && (stat(path, &b) == 0) && (a.st_ino == b.st_ino) &&
           (a.st_dev == b.st_dev);
}

/* Another may have renamed or removed it meanwhile. */
fv_status_t fv_journal_open_locked(const char *path, uint32_t wait_ms, int *out_fd)
{
    int64_t until_us = fv_clock_us() + (int64_t)wait_ms * 1000;

    for (;;) {
        int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0) {
            return fv_journal_system_error(path, "open");
        }
        if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
            (void)close(fd);
            if (fv_clock_us() >= until_us) {
                return fv_fail(FV_ERR_PRECONDITION,
                               "%s is in use by another process: two services never share a store "
                               "(job)",
                               path);
            }
            (void)nanosleep(&(struct timespec){.tv_nsec = NAP_MS * 1000000L}, NULL);
            continue;
        }
        if (is_same_file(path, fd)) {
            *out_fd = fd;
            return FV_OK;
        }
        (void)close(fd);
    }
}

fv_status_t fv_journal_check_head(const char *path,
                                  const fv_journal_head_t *found,
                                  const fv_journal_head_t *wanted)
{
    const char *advice = "start with the settings that made it, or remove it (fovea store rm)";

    if ((strncmp(found->kind, wanted->kind, sizeof(found->kind)) != 0) ||
        (strncmp(found->job, wanted->job, sizeof(found->job)) != 0)) {
        return fv_fail(FV_ERR_PRECONDITION, "%s: %s of job %s, expected %s of job %s; %s", path,
                       found->kind, found->job, wanted->kind, wanted->job, advice);
    }
    if ((found->slot != wanted->slot) || (found->n_slots != wanted->n_slots)) {
        return fv_fail(FV_ERR_PRECONDITION, "%s: rank %u of %u, expected rank %u of %u; %s", path,
                       found->slot, found->n_slots, wanted->slot, wanted->n_slots, advice);
    }
    if (strncmp(found->layout, wanted->layout, sizeof(found->layout)) != 0) {
        return fv_fail(
            FV_ERR_PRECONDITION,
            "%s: pages laid out as %s, expected %s (backend, less what move_memory takes); %s",
            path, found->layout, wanted->layout, advice);
    }
    if (found->kv_bytes != wanted->kv_bytes) {
        return fv_fail(FV_ERR_PRECONDITION, "%s: %llu bytes of KV (kv_memory), expected %llu; %s",
                       path, (unsigned long long)found->kv_bytes,
                       (unsigned long long)wanted->kv_bytes, advice);
    }
    return FV_OK;
}

size_t fv_journal_put_record(uint8_t *to,
                             const fv_journal_record_t *record,
                             const void *more,
                             size_t more_bytes)
{
    size_t n_body = record->n_bytes + more_bytes;
    uint8_t *body = to + sizeof(fv_journal_disk_record_t);
    fv_journal_disk_record_t disk = {.magic = FV_JOURNAL_RECORD_MAGIC,
                                     .type = (uint16_t)record->type,
                                     .flags = (uint16_t)record->flags,
                                     .key = record->key,
                                     .n_bytes = (uint32_t)n_body,
                                     .number = record->number};

    if ((record->n_bytes > 0) && (record->body != body)) {
        memcpy(body, record->body, record->n_bytes);
    }
    if (more_bytes > 0) {
        memcpy(body + record->n_bytes, more, more_bytes);
    }
    memset(body + n_body, 0, fv_journal_padded(n_body) - n_body);
    disk.body_crc = fv_crc32c(0, body, n_body);
    disk.head_crc = fv_journal_record_crc(&disk);
    memcpy(to, &disk, sizeof(disk));
    return fv_journal_size(n_body);
}
