/*
 * disklog_format.h - what a log looks like on its disk: for the files of disklog.h alone.
 */
#ifndef FV_COMMON_DISKLOG_FORMAT_H
#define FV_COMMON_DISKLOG_FORMAT_H

#include "common/disklog.h"
#include "common/journal_format.h"

#define FV_DISKLOG_MAGIC       "FVDISK1"
#define FV_DISKLOG_BLOCK       4096U /* what is written is a multiple */
#define FV_DISKLOG_SECTOR      512U  /* what a device writes whole */
#define FV_DISKLOG_BATCH_BYTES (sizeof(fv_journal_disk_record_t) + sizeof(fv_disklog_batch_t))

_Static_assert(sizeof(fv_disklog_batch_t) == 24, "part of the file format");

/* The head of an open file, checked. Errors: FV_ERR_DATA_LOSS. */
FV_MUST_CHECK fv_status_t fv_disklog_read_head(const char *path,
                                               int fd,
                                               fv_journal_head_t *out_head);
/* fv_disklog_scan() of what is behind an open file's head. */
FV_MUST_CHECK fv_status_t fv_disklog_scan_file(const char *path,
                                               int fd,
                                               const fv_disklog_reader_t *reader,
                                               fv_journal_report_t *out,
                                               size_t *out_end,
                                               uint64_t *out_n_batches);

#endif /* FV_COMMON_DISKLOG_FORMAT_H */
