/*
 * wire_scan.h - walks the fields of a protobuf message that lies in several pieces. Private to proto/.
 *
 * Decode path: station 2 of 10. Before: coord/engine_inbox.c. After: wire_attend.c.
 *
 * The scan holds a place (which piece, which byte of it) and never copies. A length-delimited field is
 * reported before its bytes are passed over, so that the caller may read them (fv_scan_read) or open
 * them as a message (fv_scan_sub); fv_scan_next() then jumps over them whatever the caller did.
 * Thread: any; no shared state. Allocates nothing.
 */
#ifndef FV_PROTO_WIRE_SCAN_H
#define FV_PROTO_WIRE_SCAN_H

#include "proto/wire.h"

enum {
    FV_WIRE_VARINT = 0,
    FV_WIRE_I64 = 1,
    FV_WIRE_LEN = 2,
    FV_WIRE_I32 = 5,
};

typedef struct fv_scan {
    const fv_span_t *spans;
    size_t span;       /* current piece */
    size_t in_span;    /* next byte of it */
    size_t offset;     /* next byte, counted from the first of the whole message */
    size_t end;        /* one past the last byte of what this scan may read */
    size_t resume;     /* where the next field begins */
    const char *error; /* why the scan stopped; NULL: it has not failed */
} fv_scan_t;

typedef struct fv_scan_field {
    uint32_t number;
    uint32_t wire_type;
    uint64_t value;     /* VARINT only */
    fv_region_t region; /* LEN only: where its bytes lie, inside what is left */
} fv_scan_field_t;

/* Starts at the first byte of the message that the pieces make up. Pieces may be empty. */
void fv_scan_begin(fv_scan_t *scan, const fv_span_t *spans, size_t n_spans);

/* The next field; false at the end and on malformed input (then scan->error says what is wrong). */
bool fv_scan_next(fv_scan_t *scan, fv_scan_field_t *out);

/* A scan of the message inside the LEN field that fv_scan_next() has just reported. */
fv_scan_t fv_scan_sub(const fv_scan_t *scan, const fv_scan_field_t *field);

/* Copies the first n bytes of the LEN field just reported; n <= field->region.n_bytes. */
void fv_scan_read(const fv_scan_t *scan, void *dst, size_t n_bytes);

/* FV_ERR_INVALID_ARG for a scan with an error; `what` names the message. */
FV_MUST_CHECK fv_status_t fv_scan_fail(const fv_scan_t *scan, const char *what);

/* FV_OK if the field has this wire type. */
FV_MUST_CHECK fv_status_t fv_scan_expect(const fv_scan_field_t *field,
                                         uint32_t wire_type,
                                         const char *name);

#endif /* FV_PROTO_WIRE_SCAN_H */
