/*
 * journal_file.c - see journal_file.h.
 */
#include "tests/support/journal_file.h"

#include "common/journal_format.h"
#include "tests/support/test.h"

#include <stdio.h>

size_t fv_read_file(const char *path, uint8_t *out, size_t cap)
{
    FILE *file = fopen(path, "rb");

    assert_non_null(file);
    size_t n = fread(out, 1, cap, file);
    (void)fclose(file);
    assert_true(n < cap);
    return n;
}

void fv_write_file(const char *path, const uint8_t *data, size_t n_bytes)
{
    FILE *file = fopen(path, "wb");

    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, n_bytes, file), n_bytes);
    assert_int_equal(fclose(file), 0);
}

size_t fv_find_records(const uint8_t *journal, size_t n_bytes, size_t *out, size_t cap)
{
    fv_journal_disk_record_t head;
    size_t at = FV_JOURNAL_HEAD_BYTES;
    size_t n = 0;

    while (at + sizeof(head) <= n_bytes) {
        memcpy(&head, journal + at, sizeof(head));
        if (head.magic != FV_JOURNAL_RECORD_MAGIC) {
            break; /* room behind the last one */
        }
        assert_true(n + 1U < cap);
        out[n++] = at;
        at += fv_journal_size(head.n_bytes);
    }
    out[n] = at;
    return n;
}
