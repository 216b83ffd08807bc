/*
 * fuzz_disklog.c - any bytes as a log on a disk.
 *
 * Checks: every record and every piece of a table that is given lies inside the bytes that count, records of pages have their
 * checksums, and reading twice gives the same.
 */
#include "common/digest.h"
#include "common/disklog.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* NOLINTNEXTLINE(readability-identifier-naming): the name is libFuzzer's */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

typedef struct seen {
    const uint8_t *data;
    size_t n_bytes;
    uint64_t n_pages, n_table_bytes, n_suspects;
    uint32_t sum; /* reads every byte that is given */
} seen_t;

static void check(bool ok, const char *what)
{
    if (!ok) {
        (void)fprintf(stderr, "fuzz_disklog: %s\n", what);
        abort();
    }
}

static fv_status_t see_page(void *arg, const fv_journal_record_t *record)
{
    seen_t *seen = arg;
    const uint8_t *body = record->body;

    seen->n_pages++;
    if (body == NULL) {
        return FV_OK;
    }
    check((body >= seen->data) && ((size_t)(body - seen->data) <= seen->n_bytes) &&
              (record->n_bytes <= seen->n_bytes - (size_t)(body - seen->data)),
          "a page outside");
    seen->sum = fv_crc32c(seen->sum, body, record->n_bytes);
    return FV_OK;
}

static fv_status_t see_table(void *arg, const void *records, size_t n_bytes)
{
    seen_t *seen = arg;

    seen->n_table_bytes += n_bytes;
    seen->sum = fv_crc32c(seen->sum, records, n_bytes);
    return FV_OK;
}

static fv_status_t see_suspect(void *arg, uint32_t key)
{
    seen_t *seen = arg;

    seen->n_suspects++;
    seen->sum = fv_crc32c(seen->sum, &key, sizeof(key));
    return FV_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    seen_t seen[2];
    fv_journal_report_t report;
    uint8_t *aligned = malloc(n_bytes + 8U); /* as a mapped file is */

    if (aligned == NULL) {
        return 0;
    }
    memcpy(aligned, data, n_bytes);
    for (size_t i = 0; i < 2U; i++) {
        seen[i] = (seen_t){.data = aligned, .n_bytes = n_bytes};
        const fv_disklog_reader_t reader = {
            .page = see_page, .table = see_table, .suspect = see_suspect, .arg = &seen[i]};
        size_t end = 0;
        uint64_t n_batches = 0;
        check(fv_disklog_scan(aligned, n_bytes, &reader, &report, &end, &n_batches) == FV_OK,
              "the scan failed");
        check((end <= n_bytes) && (report.n_bytes == end), "the end");
        check(report.tail_bytes <= n_bytes - end, "the tail");
    }
    check(memcmp(&seen[0], &seen[1], sizeof(seen[0])) == 0, "another reading gave something else");
    free(aligned);
    return 0;
}
