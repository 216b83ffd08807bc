/*
 * journal_format.h - what a journal looks like in its file: for the files of journal.h alone.
 */
#ifndef FV_COMMON_JOURNAL_FORMAT_H
#define FV_COMMON_JOURNAL_FORMAT_H

#include "common/digest.h"
#include "common/journal.h"

#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#define FV_JOURNAL_MAGIC        "FVJRNL1"
#define FV_JOURNAL_RECORD_MAGIC 0x43455246U /* "FREC" */
#define FV_JOURNAL_COMMITTED_AT 2048U

/* The first bytes of the file. */
typedef struct fv_journal_disk_head {
    char magic[8];
    uint32_t version;
    uint32_t crc; /* of what follows */
    fv_journal_head_t head;
} fv_journal_disk_head_t;

typedef struct fv_journal_disk_record {
    uint32_t magic;
    uint16_t type, flags;
    uint32_t key;
    uint32_t n_bytes;
    uint64_t number;
    uint32_t body_crc;
    uint32_t head_crc; /* of what is before it */
} fv_journal_disk_record_t;

_Static_assert(sizeof(fv_journal_disk_record_t) == 32, "part of the file format");

static inline uint32_t fv_journal_head_crc(const fv_journal_disk_head_t *head)
{
    return fv_crc32c(head->version, &head->head, sizeof(head->head));
}

static inline uint32_t fv_journal_record_crc(const fv_journal_disk_record_t *record)
{
    return fv_crc32c(0, record, offsetof(fv_journal_disk_record_t, head_crc));
}

static inline size_t fv_journal_padded(size_t n_bytes)
{
    return (n_bytes + 7U) & ~(size_t)7U;
}

/* `committed` and what proves it, in one word: a store is all or nothing. */
static inline uint64_t fv_journal_pack_committed(uint64_t n_bytes)
{
    uint64_t units = n_bytes / 8U;

    return (units << 16U) | (fv_crc32c(0x5eedU, &units, sizeof(units)) & 0xffffU);
}

static inline bool fv_journal_unpack_committed(uint64_t word, uint64_t *out_bytes)
{
    uint64_t n_bytes = (word >> 16U) * 8U;

    *out_bytes = n_bytes;
    return fv_journal_pack_committed(n_bytes) == word;
}

/* Whether a record's head can stand at `at` of n_bytes; its body lies inside. */
bool fv_journal_read_record(const uint8_t *data,
                            size_t n_bytes,
                            size_t at,
                            fv_journal_disk_record_t *out);
/* A record at `to`, of a body in two pieces; returns its bytes. */
size_t fv_journal_put_record(uint8_t *to,
                             const fv_journal_record_t *record,
                             const void *more,
                             size_t more_bytes);
/* Whether `found` is the journal or log that `wanted` says. Errors: FV_ERR_PRECONDITION naming what differs. */
FV_MUST_CHECK fv_status_t fv_journal_check_head(const char *path,
                                                const fv_journal_head_t *found,
                                                const fv_journal_head_t *wanted);
/* errno of a call on `path` as a status: FV_ERR_EXHAUSTED when there is no room, else FV_ERR_SYSTEM. */
fv_status_t fv_journal_system_error(const char *path, const char *what);
/* Opens or makes a file and locks it; it is the one that the path names. Errors: FV_ERR_PRECONDITION: in use. */
FV_MUST_CHECK fv_status_t fv_journal_open_locked(const char *path, uint32_t wait_ms, int *out_fd);

/* The head of an open file, checked. Errors: FV_ERR_DATA_LOSS; FV_ERR_SYSTEM. */
FV_MUST_CHECK fv_status_t fv_journal_read_head(const char *path,
                                               int fd,
                                               fv_journal_head_t *out_head,
                                               uint64_t *out_committed);
/* Its committed records to `visit`. */
FV_MUST_CHECK fv_status_t fv_journal_scan_file(const char *path,
                                               int fd,
                                               uint64_t committed,
                                               fv_journal_visit_t visit,
                                               void *arg,
                                               fv_journal_report_t *out);

#endif /* FV_COMMON_JOURNAL_FORMAT_H */
