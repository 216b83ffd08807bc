/*
 * wire_scan.c - the field scanner: tags, varints and lengths over pieces that may split anywhere.
 *
 * Decode path: station 2 of 10. Before: coord/engine_inbox.c. After: wire_attend.c.
 */
#include "proto/wire_scan.h"

#include <string.h>

#define VARINT_BYTES_MAX 10
#define LENGTH_BYTES_MAX 5 /* tags and lengths are 32-bit varints */

void fv_scan_begin(fv_scan_t *scan, const fv_span_t *spans, size_t n_spans)
{
    *scan = (fv_scan_t){.spans = spans};
    for (size_t i = 0; i < n_spans; i++) {
        scan->end += spans[i].n_bytes;
    }
}

/* The caller has checked that the bytes are there. */
static void advance(fv_scan_t *scan, size_t n_bytes)
{
    scan->offset += n_bytes;
    while (n_bytes > 0) {
        size_t here = scan->spans[scan->span].n_bytes - scan->in_span;

        if (n_bytes < here) {
            scan->in_span += n_bytes;
            return;
        }
        n_bytes -= here;
        scan->span++;
        scan->in_span = 0;
    }
}

static bool next_byte(fv_scan_t *scan, uint8_t *out)
{
    if (scan->offset == scan->end) {
        scan->error = "truncated";
        return false;
    }
    while (scan->in_span == scan->spans[scan->span].n_bytes) { /* empty pieces */
        scan->span++;
        scan->in_span = 0;
    }
    *out = scan->spans[scan->span].data[scan->in_span];
    scan->in_span++;
    scan->offset++;
    return true;
}

static bool read_varint(fv_scan_t *scan, unsigned n_bytes_max, uint64_t *out)
{
    uint64_t value = 0;
    uint8_t byte = 0;

    for (unsigned i = 0; i < n_bytes_max; i++) {
        if (!next_byte(scan, &byte)) {
            return false;
        }
        if ((i == VARINT_BYTES_MAX - 1U) && (byte > 1U)) {
            break;
        }
        value |= (uint64_t)(byte & 0x7fU) << (7U * i);
        if ((byte & 0x80U) == 0) {
            *out = value;
            return true;
        }
    }
    scan->error = "varint too long";
    return false;
}

static bool skip_fixed(fv_scan_t *scan, size_t n_bytes)
{
    if (scan->end - scan->offset < n_bytes) {
        scan->error = "truncated";
        return false;
    }
    advance(scan, n_bytes);
    return true;
}

static bool read_length(fv_scan_t *scan, fv_region_t *out)
{
    uint64_t length = 0;

    if (!read_varint(scan, LENGTH_BYTES_MAX, &length)) {
        return false;
    }
    if (length > scan->end - scan->offset) {
        scan->error = "a length beyond the end";
        return false;
    }
    *out = (fv_region_t){.offset = scan->offset, .n_bytes = (size_t)length};
    return true;
}

bool fv_scan_next(fv_scan_t *scan, fv_scan_field_t *out)
{
    uint64_t tag = 0;
    bool ok = false;

    if (scan->error != NULL) {
        return false;
    }
    advance(scan, scan->resume - scan->offset);
    if (scan->offset == scan->end) {
        return false;
    }
    if (!read_varint(scan, LENGTH_BYTES_MAX, &tag)) {
        return false;
    }
    *out = (fv_scan_field_t){.number = (uint32_t)(tag >> 3U), .wire_type = (uint32_t)(tag & 7U)};
    if ((tag > UINT32_MAX) || (out->number == 0)) {
        scan->error = "bad field number";
        return false;
    }
    switch (out->wire_type) {
    case FV_WIRE_VARINT:
        ok = read_varint(scan, VARINT_BYTES_MAX, &out->value);
        break;
    case FV_WIRE_I64:
        ok = skip_fixed(scan, 8);
        break;
    case FV_WIRE_LEN:
        ok = read_length(scan, &out->region);
        break;
    case FV_WIRE_I32:
        ok = skip_fixed(scan, 4);
        break;
    default:
        scan->error = "a group or an unknown wire type";
        break;
    }
    scan->resume = scan->offset + out->region.n_bytes;
    return ok;
}

fv_scan_t fv_scan_sub(const fv_scan_t *scan, const fv_scan_field_t *field)
{
    fv_scan_t sub = *scan;

    sub.end = field->region.offset + field->region.n_bytes;
    sub.resume = sub.offset;
    return sub;
}

void fv_scan_read(const fv_scan_t *scan, void *dst, size_t n_bytes)
{
    size_t in_span = scan->in_span;
    uint8_t *to = dst;

    for (size_t i = scan->span; n_bytes > 0; i++) {
        size_t here = scan->spans[i].n_bytes - in_span;
        size_t n = (n_bytes < here) ? n_bytes : here;

        if (n > 0) {
            memcpy(to, scan->spans[i].data + in_span, n);
        }
        to += n;
        n_bytes -= n;
        in_span = 0;
    }
}

fv_status_t fv_scan_fail(const fv_scan_t *scan, const char *what)
{
    return fv_fail(FV_ERR_INVALID_ARG,
                   "%s: given malformed bytes (%s, at byte %zu), expected a protobuf message", what,
                   scan->error, scan->offset);
}

fv_status_t fv_scan_expect(const fv_scan_field_t *field, uint32_t wire_type, const char *name)
{
    if (field->wire_type == wire_type) {
        return FV_OK;
    }
    return fv_fail(FV_ERR_INVALID_ARG, "%s: given wire type %u, expected %u", name,
                   field->wire_type, wire_type);
}
