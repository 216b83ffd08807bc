/*
 * wire_text.h - text that goes on the wire must be UTF-8: other implementations refuse the whole
 * message otherwise. Private to proto/.
 */
#ifndef FV_PROTO_WIRE_TEXT_H
#define FV_PROTO_WIRE_TEXT_H

#include <stdbool.h>
#include <stddef.h>

/* Bytes (1..4) of the UTF-8 character at `text`, n_bytes left; 0 if there is none. */
size_t fv_utf8_char(const char *text, size_t n_bytes);

/* True if all n bytes are UTF-8. */
bool fv_utf8_valid(const char *text, size_t n_bytes);

/*
 * Copies at most cap - 1 bytes of `text` as UTF-8: bytes that are none become '?', a character that
 * does not fit is left out. NUL-terminated. Returns the bytes written without the NUL.
 */
size_t fv_utf8_copy(char *out, size_t cap, const char *text, size_t n_bytes);

#endif /* FV_PROTO_WIRE_TEXT_H */
