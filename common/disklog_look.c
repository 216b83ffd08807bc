/*
 * disklog_look.c - a log's file, for who reads it.
 */
#define _GNU_SOURCE /* flock */

#include "common/disklog.h"
#include "common/disklog_format.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

fv_status_t fv_disklog_read_head(const char *path, int fd, fv_journal_head_t *out_head)
{
    fv_journal_disk_head_t disk;

    if (pread(fd, &disk, sizeof(disk), 0) != (ssize_t)sizeof(disk)) {
        return fv_fail(FV_ERR_DATA_LOSS, "%s: too short for a log's head", path);
    }
    if ((memcmp(disk.magic, FV_DISKLOG_MAGIC, sizeof(disk.magic)) != 0) ||
        (disk.version != FV_JOURNAL_VERSION)) {
        return fv_fail(FV_ERR_DATA_LOSS, "%s: given version %u, expected a log of version %u", path,
                       disk.version, FV_JOURNAL_VERSION);
    }
    if ((disk.crc != fv_journal_head_crc(&disk)) || (disk.head.disk_id == 0U)) {
        return fv_fail(FV_ERR_DATA_LOSS, "%s: the head is damaged", path);
    }
    disk.head.kind[sizeof(disk.head.kind) - 1U] = '\0';
    disk.head.layout[sizeof(disk.head.layout) - 1U] = '\0';
    disk.head.job[sizeof(disk.head.job) - 1U] = '\0';
    *out_head = disk.head;
    return FV_OK;
}

fv_status_t fv_disklog_scan_file(const char *path,
                                 int fd,
                                 const fv_disklog_reader_t *reader,
                                 fv_journal_report_t *out,
                                 size_t *out_end,
                                 uint64_t *out_n_batches)
{
    struct stat info;

    *out = (fv_journal_report_t){0};
    *out_end = 0;
    *out_n_batches = 0;
    if (fstat(fd, &info) != 0) {
        return fv_journal_system_error(path, "stat");
    }
    if (info.st_size <= (off_t)FV_JOURNAL_HEAD_BYTES) {
        return FV_OK;
    }
    size_t n_bytes = (size_t)info.st_size;
    uint8_t *data = mmap(NULL, n_bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (data == MAP_FAILED) {
        return fv_journal_system_error(path, "mmap");
    }
    (void)madvise(data, n_bytes, MADV_SEQUENTIAL);
    fv_status_t status =
        fv_disklog_scan(data + FV_JOURNAL_HEAD_BYTES, n_bytes - FV_JOURNAL_HEAD_BYTES, reader, out,
                        out_end, out_n_batches);
    (void)munmap(data, n_bytes);
    return status;
}

static fv_status_t open_to_look(const char *path, int *out_fd)
{
    *out_fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    return (*out_fd >= 0) ? FV_OK
                          : fv_fail((errno == ENOENT) ? FV_ERR_NOT_FOUND : FV_ERR_SYSTEM,
                                    "%s: errno %d", path, errno);
}

fv_status_t fv_disklog_head(const char *path, fv_journal_head_t *out)
{
    int fd = -1;

    FV_RETURN_IF_ERR(open_to_look(path, &fd));
    fv_status_t status = fv_disklog_read_head(path, fd, out);
    (void)close(fd);
    return status;
}

fv_status_t fv_disklog_inspect(const char *path,
                               const fv_disklog_reader_t *reader,
                               fv_journal_head_t *out_head,
                               fv_journal_report_t *out,
                               bool *out_is_locked)
{
    size_t end = 0;
    uint64_t n_batches = 0;
    int fd = -1;

    FV_RETURN_IF_ERR(open_to_look(path, &fd));
    fv_status_t status = fv_disklog_read_head(path, fd, out_head);
    if (status == FV_OK) {
        *out_is_locked = flock(fd, LOCK_SH | LOCK_NB) != 0; /* let go of by close() */
        status = fv_disklog_scan_file(path, fd, reader, out, &end, &n_batches);
    }
    (void)close(fd);
    return status;
}
