/*
 * wire_oracle.h - the scanner's answer judged by protobuf-c's own unpack of the same bytes.
 */
#ifndef FV_TESTS_FUZZ_WIRE_ORACLE_H
#define FV_TESTS_FUZZ_WIRE_ORACLE_H

#include "proto/wire.h"

#include <stdbool.h>

/* Cuts `data` into pieces that each have memory of their own, so that a read past one is caught. */
typedef struct fv_pieces {
    fv_span_t *spans;
    uint8_t **memory;
    size_t n;
} fv_pieces_t;

/* cuts[i] is the size of piece i; what is left over goes into one last piece. */
fv_pieces_t fv_pieces_cut(const uint8_t *data, size_t n_bytes, const size_t *cuts, size_t n_cuts);
void fv_pieces_free(fv_pieces_t *pieces);

/*
 * Scans `data`, cut into `pieces`, as an AttendRequest (AttendResponse), and compares. NULL: they agree;
 * otherwise what differs. is_strict: the bytes come from a protobuf writer, so the scanner may refuse only
 * what a request means, not how it is written.
 */
const char *
fv_oracle_request(const uint8_t *data, size_t n_bytes, fv_pieces_t pieces, bool is_strict);
const char *fv_oracle_response(const uint8_t *data, size_t n_bytes, fv_pieces_t pieces);

#endif /* FV_TESTS_FUZZ_WIRE_ORACLE_H */
