/*
 * disklog_internal.h - a log that is open: for disklog.c and disklog_write.c alone.
 */
#ifndef FV_COMMON_DISKLOG_INTERNAL_H
#define FV_COMMON_DISKLOG_INTERNAL_H

#include "common/disklog.h"
#include "common/disklog_format.h"

#define FV_DISKLOG_PATH_BYTES 800

/* An open file. Its bytes are counted from behind its head. */
typedef struct fv_disklog_file {
    int lock_fd;        /* ours alone; read through the page cache */
    int fd;             /* written */
    uint64_t end;       /* of the last batch */
    uint64_t allocated; /* >= end */
    uint64_t n_batches;
    uint64_t n_snapshots;
} fv_disklog_file_t;

struct fv_disklog {
    char path[FV_DISKLOG_PATH_BYTES];
    fv_journal_head_t head;
    fv_disklog_file_t file, next; /* next.fd >= 0: a fresh snapshot is under way */
    bool is_direct, wants_fresh, in_snapshot;
    uint8_t *
        buffer; /* aligned: the block that `end` lies in, up to it; room for a BATCH; own records */
    size_t buffer_cap;
    size_t n_tail, n_own; /* bytes of the block; of own records */
    uint32_t n_own_records;
    size_t body_at; /* of the record under way, from the buffer's begin */
};

/* Where batches go now. */
fv_disklog_file_t *fv_disklog_target(fv_disklog_t *log);
void fv_disklog_file_close(fv_disklog_file_t *file);
/* n bytes, a multiple of a block, from an aligned buffer: on the device when it returns. */
FV_MUST_CHECK fv_status_t
fv_disklog_write_at(const char *path, int fd, const uint8_t *data, size_t n, uint64_t at);
FV_MUST_CHECK fv_status_t fv_disklog_sync_folder(const char *path);
/* The buffer has room for n_bytes; what is in it stays. */
FV_MUST_CHECK fv_status_t fv_disklog_make_buffer(fv_disklog_t *log, size_t n_bytes);
/* The block in which the last batch ends: the next write begins with it. */
FV_MUST_CHECK fv_status_t fv_disklog_load_tail(fv_disklog_t *log);
/* Room up to `end`. Errors: FV_ERR_EXHAUSTED. */
FV_MUST_CHECK fv_status_t fv_disklog_file_allocate(const char *path,
                                                   fv_disklog_file_t *file,
                                                   uint64_t end);
/* An empty log in an open, locked file. */
FV_MUST_CHECK fv_status_t fv_disklog_begin_file(fv_disklog_t *log,
                                                const char *path,
                                                fv_disklog_file_t *file);

#endif /* FV_COMMON_DISKLOG_INTERNAL_H */
