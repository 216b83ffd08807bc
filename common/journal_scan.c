/*
 * journal_scan.c - reads a journal, whatever has become of it.
 */
#define _GNU_SOURCE /* flock */

#include "common/journal_format.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

bool fv_journal_read_record(const uint8_t *data,
                            size_t n_bytes,
                            size_t at,
                            fv_journal_disk_record_t *out)
{
    if (n_bytes - at < sizeof(*out)) {
        return false;
    }
    memcpy(out, data + at, sizeof(*out));
    return (out->magic == FV_JOURNAL_RECORD_MAGIC) &&
           (out->head_crc == fv_journal_record_crc(out)) && (out->n_bytes <= FV_JOURNAL_BODY_MAX) &&
           (fv_journal_padded(out->n_bytes) <= n_bytes - at - sizeof(*out));
}

fv_status_t fv_journal_scan(const uint8_t *data,
                            size_t n_bytes,
                            fv_journal_visit_t visit,
                            void *arg,
                            fv_journal_report_t *out)
{
    fv_journal_disk_record_t disk;
    size_t at = 0;
    size_t end = 0; /* of the last record */

    *out = (fv_journal_report_t){.n_bytes = n_bytes};
    while (n_bytes - at >= sizeof(disk)) {
        if (!fv_journal_read_record(data, n_bytes, at, &disk)) {
            at += 8U; /* a hole: records begin at multiples of 8 */
            continue;
        }
        out->n_holes += (at != end) ? 1U : 0U;
        const uint8_t *body = data + at + sizeof(disk);
        bool is_whole = fv_crc32c(0, body, disk.n_bytes) == disk.body_crc;
        fv_journal_record_t record = {.type = disk.type,
                                      .flags = disk.flags,
                                      .key = disk.key,
                                      .n_bytes = disk.n_bytes,
                                      .number = disk.number,
                                      .body = is_whole ? body : NULL};
        out->n_records += is_whole ? 1U : 0U;
        out->n_damaged += is_whole ? 0U : 1U;
        at += sizeof(disk) + fv_journal_padded(disk.n_bytes);
        end = at;
        if (visit != NULL) {
            FV_RETURN_IF_ERR(visit(arg, &record));
        }
    }
    out->tail_bytes = n_bytes - end;
    return FV_OK;
}

fv_status_t
fv_journal_read_head(const char *path, int fd, fv_journal_head_t *out_head, uint64_t *out_committed)
{
    fv_journal_disk_head_t disk;
    uint64_t word = 0;
    struct stat file;

    if ((fstat(fd, &file) != 0) || (file.st_size < (off_t)FV_JOURNAL_HEAD_BYTES) ||
        (pread(fd, &disk, sizeof(disk), 0) != (ssize_t)sizeof(disk)) ||
        (pread(fd, &word, sizeof(word), FV_JOURNAL_COMMITTED_AT) != (ssize_t)sizeof(word))) {
        return fv_fail(FV_ERR_DATA_LOSS, "%s: too short for a journal's head", path);
    }
    if ((memcmp(disk.magic, FV_JOURNAL_MAGIC, sizeof(disk.magic)) != 0) ||
        (disk.version != FV_JOURNAL_VERSION)) {
        return fv_fail(FV_ERR_DATA_LOSS, "%s: given version %u, expected a journal of version %u",
                       path, disk.version, FV_JOURNAL_VERSION);
    }
    if ((disk.crc != fv_journal_head_crc(&disk)) ||
        !fv_journal_unpack_committed(word, out_committed) ||
        (*out_committed > (uint64_t)file.st_size - FV_JOURNAL_HEAD_BYTES)) {
        return fv_fail(FV_ERR_DATA_LOSS, "%s: the head is damaged", path);
    }
    disk.head.kind[sizeof(disk.head.kind) - 1U] = '\0';
    disk.head.layout[sizeof(disk.head.layout) - 1U] = '\0';
    disk.head.job[sizeof(disk.head.job) - 1U] = '\0';
    *out_head = disk.head;
    return FV_OK;
}

fv_status_t fv_journal_scan_file(const char *path,
                                 int fd,
                                 uint64_t committed,
                                 fv_journal_visit_t visit,
                                 void *arg,
                                 fv_journal_report_t *out)
{
    size_t n_bytes = FV_JOURNAL_HEAD_BYTES + (size_t)committed;

    *out = (fv_journal_report_t){0};
    if (committed == 0U) {
        return FV_OK;
    }
    uint8_t *data = mmap(NULL, n_bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (data == MAP_FAILED) {
        return fv_fail(FV_ERR_SYSTEM, "%s: mmap of %zu bytes: errno %d", path, n_bytes, errno);
    }
    fv_status_t status =
        fv_journal_scan(data + FV_JOURNAL_HEAD_BYTES, (size_t)committed, visit, arg, out);
    (void)munmap(data, n_bytes);
    return status;
}

fv_status_t fv_journal_inspect(const char *path,
                               fv_journal_visit_t visit,
                               void *arg,
                               fv_journal_head_t *out_head,
                               fv_journal_report_t *out,
                               bool *out_is_locked)
{
    uint64_t committed = 0;
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);

    if (fd < 0) {
        return fv_fail((errno == ENOENT) ? FV_ERR_NOT_FOUND : FV_ERR_SYSTEM, "%s: errno %d", path,
                       errno);
    }
    fv_status_t status = fv_journal_read_head(path, fd, out_head, &committed);
    if (status == FV_OK) {
        *out_is_locked = flock(fd, LOCK_SH | LOCK_NB) != 0; /* let go of by close() */
        status = fv_journal_scan_file(path, fd, committed, visit, arg, out);
    }
    (void)close(fd);
    return status;
}
