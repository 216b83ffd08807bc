/*
 * wire_message.h - what every small message needs around protobuf-c. Private to proto/.
 *
 * Thread: any; no shared state.
 */
#ifndef FV_PROTO_WIRE_MESSAGE_H
#define FV_PROTO_WIRE_MESSAGE_H

#include "proto/attention.pb-c.h"
#include "proto/wire.h"

#define FV_WIRE_REQUEST_MAX \
    ((size_t)1 << 20) /* bytes of a small request; bounds what one can allocate */
#define FV_WIRE_RESPONSE_MAX ((size_t)1 << 26) /* a full page of sessions with many layers */

/*
 * Unpacks `in` into a message of `descriptor`'s type; release it with fv_message_free(). Errors:
 * FV_ERR_INVALID_ARG when there are more than n_bytes_max bytes or they are no such message.
 */
FV_MUST_CHECK fv_status_t fv_message_unpack(const ProtobufCMessageDescriptor *descriptor,
                                            fv_span_t in,
                                            size_t n_bytes_max,
                                            ProtobufCMessage **out);
void fv_message_free(ProtobufCMessage *message); /* NULL is fine */

/* Packs into owned bytes. Errors: FV_ERR_NO_MEMORY. */
FV_MUST_CHECK fv_status_t fv_message_pack(const ProtobufCMessage *message, fv_bytes_t *out);

/* Copies a string into an array of `cap` bytes; refuses one that is too long or not UTF-8. */
FV_MUST_CHECK fv_status_t fv_message_text(const char *field,
                                          const char *given,
                                          char *out,
                                          size_t cap);

/* The same for a model id, which may not be empty. */
FV_MUST_CHECK fv_status_t fv_message_model_id(const char *given, char out[FV_MODEL_ID_BYTES]);

/* Reads 32 hex digits. */
FV_MUST_CHECK fv_status_t fv_message_session(const char *field,
                                             const char *given,
                                             fv_session_id_t *out);

/* Refuses a list with more than `max` elements. */
FV_MUST_CHECK fv_status_t fv_message_count(const char *field, size_t given, size_t max);

/* An unsigned field that is kept in an int32_t. */
FV_MUST_CHECK fv_status_t fv_message_int32(const char *field, uint32_t given, int32_t *out);

/* n zeroed elements, never NULL for n = 0; NULL (with the text of FV_ERR_NO_MEMORY) when there is no memory. */
void *fv_message_alloc(size_t n, size_t size);

/* protobuf-c's structs have char * where text is only read. */
static inline char *fv_message_borrow(const char *text)
{
    union {
        const char *in;
        char *out;
    } u = {.in = text};

    return u.out;
}

#endif /* FV_PROTO_WIRE_MESSAGE_H */
