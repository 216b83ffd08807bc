/*
 * wire.c - the small parts of wire.h that every message shares: byte strings, session ids, gathering.
 */
#include "proto/wire.h"

#include <stdlib.h>
#include <string.h>

void fv_bytes_free(fv_bytes_t *bytes)
{
    free(bytes->data);
    *bytes = (fv_bytes_t){0};
}

/* Value of a hex digit plus one; 0 for any other character. A table: ids are parsed for every item of a step. */
static const uint8_t k_hex[256] = {
    ['0'] = 1,  ['1'] = 2,  ['2'] = 3,  ['3'] = 4,  ['4'] = 5,  ['5'] = 6,  ['6'] = 7,  ['7'] = 8,
    ['8'] = 9,  ['9'] = 10, ['a'] = 11, ['b'] = 12, ['c'] = 13, ['d'] = 14, ['e'] = 15, ['f'] = 16,
    ['A'] = 11, ['B'] = 12, ['C'] = 13, ['D'] = 14, ['E'] = 15, ['F'] = 16,
};

bool fv_session_id_parse(const char *hex, size_t n_chars, fv_session_id_t *out)
{
    fv_session_id_t id;
    bool ok = true;

    if (n_chars != FV_SESSION_ID_CHARS) {
        return false;
    }
    for (size_t i = 0; i < sizeof(id.bytes); i++) {
        unsigned high = k_hex[(uint8_t)hex[2U * i]];
        unsigned low = k_hex[(uint8_t)hex[(2U * i) + 1U]];

        ok = ok && (high != 0) && (low != 0);
        id.bytes[i] = (uint8_t)(((high - 1U) << 4U) | ((low - 1U) & 15U));
    }
    if (ok) {
        *out = id;
    }
    return ok;
}

void fv_session_id_format(const fv_session_id_t *id, char out[FV_SESSION_ID_CHARS + 1])
{
    static const char k_digits[] = "0123456789abcdef";

    for (size_t i = 0; i < sizeof(id->bytes); i++) {
        out[2U * i] = k_digits[id->bytes[i] >> 4U];
        out[(2U * i) + 1U] = k_digits[id->bytes[i] & 15U];
    }
    out[FV_SESSION_ID_CHARS] = '\0';
}

void fv_wire_gather(const fv_span_t *spans, size_t n_spans, fv_region_t region, void *dst)
{
    size_t skip = region.offset;
    size_t left = region.n_bytes;
    uint8_t *to = dst;

    for (size_t i = 0; (i < n_spans) && (left > 0); i++) {
        if (skip >= spans[i].n_bytes) {
            skip -= spans[i].n_bytes;
            continue;
        }
        size_t here = spans[i].n_bytes - skip;
        size_t n = (left < here) ? left : here;

        memcpy(to, spans[i].data + skip, n);
        to += n;
        left -= n;
        skip = 0;
    }
    FV_ASSERT(left == 0); /* the caller's region came from a scan of the same spans */
}
