/*
 * fuzz_journal.c - any bytes as the records of a journal.
 *
 * Checks: every record that is given lies inside the bytes, its checksums hold, records come in order and do not overlap, and
 * what was looked at adds up: records, damaged ones, and the rest.
 */
#include "common/digest.h"
#include "common/journal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* NOLINTNEXTLINE(readability-identifier-naming): the name is libFuzzer's */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

typedef struct seen {
    const uint8_t *data;
    size_t n_bytes, end;
    uint64_t n_whole, n_damaged;
    uint32_t sum; /* reads every byte that is given */
} seen_t;

static void check(bool ok, const char *what)
{
    if (!ok) {
        (void)fprintf(stderr, "fuzz_journal: %s\n", what);
        abort();
    }
}

static fv_status_t see(void *arg, const fv_journal_record_t *record)
{
    seen_t *seen = arg;

    if (record->body == NULL) {
        seen->n_damaged++;
        return FV_OK;
    }
    const uint8_t *body = record->body;
    size_t at = (size_t)(body - seen->data);
    check((body >= seen->data) && (at <= seen->n_bytes), "a body outside");
    check(record->n_bytes <= seen->n_bytes - at, "a body that ends outside");
    check(at >= seen->end + fv_journal_size(0), "records overlap");
    check((at % 8U) == 0U, "a body that is not aligned");
    seen->sum = fv_crc32c(seen->sum, body, record->n_bytes);
    seen->end = at + record->n_bytes;
    seen->n_whole++;
    return FV_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    fv_journal_report_t report;
    uint8_t *aligned = malloc(n_bytes + 8U); /* as a mapped file is */

    if (aligned == NULL) {
        return 0;
    }
    memcpy(aligned, data, n_bytes);
    seen_t seen = {.data = aligned, .n_bytes = n_bytes};
    check(fv_journal_scan(aligned, n_bytes, see, &seen, &report) == FV_OK, "the scan failed");
    check(report.n_records == seen.n_whole, "records");
    check(report.n_damaged == seen.n_damaged, "damaged records");
    check(report.tail_bytes <= n_bytes, "the tail");
    check(report.n_bytes == n_bytes, "bytes");
    free(aligned);
    return 0;
}
