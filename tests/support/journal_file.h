/*
 * journal_file.h - a journal as bytes, for tests that damage one.
 */
#ifndef FV_TESTS_SUPPORT_JOURNAL_FILE_H
#define FV_TESTS_SUPPORT_JOURNAL_FILE_H

#include <stddef.h>
#include <stdint.h>

/* A whole file; returns its bytes. */
size_t fv_read_file(const char *path, uint8_t *out, size_t cap);
void fv_write_file(const char *path, const uint8_t *data, size_t n_bytes);

/* Where records begin in a whole journal, in order; the last one's end is out[n]. Returns n; room for cap numbers. */
size_t fv_find_records(const uint8_t *journal, size_t n_bytes, size_t *out, size_t cap);

#endif /* FV_TESTS_SUPPORT_JOURNAL_FILE_H */
