/*
 * wire_text.c - UTF-8 as RFC 3629 has it: no overlong forms, no surrogates, nothing above U+10FFFF.
 */
#include "proto/wire_text.h"

#include <stdint.h>
#include <string.h>

static bool is_tail(uint8_t byte)
{
    return (byte & 0xc0U) == 0x80U;
}

size_t fv_utf8_char(const char *text, size_t n_bytes)
{
    const uint8_t *s = (const uint8_t *)text;
    uint8_t low = 0x80; /* range of the second byte */
    uint8_t high = 0xbf;
    size_t n = 0;

    if (n_bytes == 0) {
        return 0;
    }
    if (s[0] < 0x80U) {
        return 1;
    }
    if ((s[0] >= 0xc2U) && (s[0] <= 0xdfU)) {
        n = 2;
    } else if ((s[0] & 0xf0U) == 0xe0U) {
        n = 3;
        low = (s[0] == 0xe0U) ? 0xa0U : low;
        high = (s[0] == 0xedU) ? 0x9fU : high;
    } else if ((s[0] >= 0xf0U) && (s[0] <= 0xf4U)) {
        n = 4;
        low = (s[0] == 0xf0U) ? 0x90U : low;
        high = (s[0] == 0xf4U) ? 0x8fU : high;
    }
    if ((n == 0) || (n > n_bytes) || (s[1] < low) || (s[1] > high)) {
        return 0;
    }
    for (size_t i = 2; i < n; i++) {
        if (!is_tail(s[i])) {
            return 0;
        }
    }
    return n;
}

bool fv_utf8_valid(const char *text, size_t n_bytes)
{
    for (size_t i = 0; i < n_bytes;) {
        size_t n = fv_utf8_char(text + i, n_bytes - i);

        if (n == 0) {
            return false;
        }
        i += n;
    }
    return true;
}

size_t fv_utf8_copy(char *out, size_t cap, const char *text, size_t n_bytes)
{
    size_t n_out = 0;

    for (size_t i = 0; i < n_bytes;) {
        size_t n = fv_utf8_char(text + i, n_bytes - i);
        size_t n_put = (n == 0) ? 1U : n;

        if (n_out + n_put >= cap) {
            break;
        }
        if (n == 0) {
            out[n_out] = '?';
        } else {
            memcpy(out + n_out, text + i, n);
        }
        n_out += n_put;
        i += n_put;
    }
    out[n_out] = '\0';
    return n_out;
}
