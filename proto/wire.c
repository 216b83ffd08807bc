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

static int hex_digit(char c)
{
    if ((c >= '0') && (c <= '9')) {
        return c - '0';
    }
    if ((c >= 'a') && (c <= 'f')) {
        return c - 'a' + 10;
    }
    if ((c >= 'A') && (c <= 'F')) {
        return c - 'A' + 10;
    }
    return -1;
}

bool fv_session_id_parse(const char *hex, size_t n_chars, fv_session_id_t *out)
{
    fv_session_id_t id;

    if (n_chars != FV_SESSION_ID_CHARS) {
        return false;
    }
    for (size_t i = 0; i < sizeof(id.bytes); i++) {
        int high = hex_digit(hex[2U * i]);
        int low = hex_digit(hex[(2U * i) + 1U]);

        if ((high < 0) || (low < 0)) {
            return false;
        }
        id.bytes[i] = (uint8_t)((high * 16) + low);
    }
    *out = id;
    return true;
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
