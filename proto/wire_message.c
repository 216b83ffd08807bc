/*
 * wire_message.c - protobuf-c with sizes, strings and lists checked.
 */
#include "proto/wire_message.h"

#include "proto/wire_text.h"

#include <stdlib.h>
#include <string.h>

#define QUOTED_MAX 64 /* bytes of a bad string that an error repeats */

fv_status_t fv_message_unpack(const ProtobufCMessageDescriptor *descriptor,
                              fv_span_t in,
                              size_t n_bytes_max,
                              ProtobufCMessage **out)
{
    if (in.n_bytes > n_bytes_max) {
        return fv_fail(FV_ERR_INVALID_ARG, "%s: given %zu bytes, expected at most %zu",
                       descriptor->short_name, in.n_bytes, n_bytes_max);
    }
    ProtobufCMessage *message = protobuf_c_message_unpack(descriptor, NULL, in.n_bytes, in.data);
    if (message == NULL) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "%s: given %zu malformed bytes, expected a protobuf message",
                       descriptor->short_name, in.n_bytes);
    }
    *out = message;
    return FV_OK;
}

void fv_message_free(ProtobufCMessage *message)
{
    protobuf_c_message_free_unpacked(message, NULL);
}

fv_status_t fv_message_pack(const ProtobufCMessage *message, fv_bytes_t *out)
{
    size_t n_bytes = protobuf_c_message_get_packed_size(message);
    uint8_t *data = malloc((n_bytes > 0) ? n_bytes : 1U);

    if (data == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "%s: no memory for %zu bytes",
                       message->descriptor->short_name, n_bytes);
    }
    *out = (fv_bytes_t){.data = data, .n_bytes = protobuf_c_message_pack(message, data)};
    return FV_OK;
}

fv_status_t fv_message_text(const char *field, const char *given, char *out, size_t cap)
{
    size_t n = strlen(given);

    if (n >= cap) {
        return fv_fail(FV_ERR_INVALID_ARG, "%s: given %zu bytes, expected at most %zu", field, n,
                       cap - 1U);
    }
    if (!fv_utf8_valid(given, n)) {
        return fv_fail(FV_ERR_INVALID_ARG, "%s: given bytes that are not UTF-8, expected UTF-8",
                       field);
    }
    memcpy(out, given, n + 1U);
    return FV_OK;
}

fv_status_t fv_message_model_id(const char *given, char out[FV_MODEL_ID_BYTES])
{
    if (given[0] == '\0') {
        return fv_fail(FV_ERR_INVALID_ARG, "model_id: given none, expected one from RegisterModel");
    }
    return fv_message_text("model_id", given, out, FV_MODEL_ID_BYTES);
}

fv_status_t fv_message_session(const char *field, const char *given, fv_session_id_t *out)
{
    char quoted[QUOTED_MAX];

    if (fv_session_id_parse(given, strlen(given), out)) {
        return FV_OK;
    }
    (void)fv_utf8_copy(quoted, sizeof(quoted), given, strlen(given));
    return fv_fail(FV_ERR_INVALID_ARG, "%s: given \"%s\", expected %d hex digits", field, quoted,
                   FV_SESSION_ID_CHARS);
}

fv_status_t fv_message_count(const char *field, size_t given, size_t max)
{
    if (given <= max) {
        return FV_OK;
    }
    return fv_fail(FV_ERR_INVALID_ARG, "%s: given %zu elements, expected at most %zu", field, given,
                   max);
}

fv_status_t fv_message_int32(const char *field, uint32_t given, int32_t *out)
{
    if (given > (uint32_t)INT32_MAX) {
        return fv_fail(FV_ERR_INVALID_ARG, "%s: given %u, expected at most %d", field, given,
                       INT32_MAX);
    }
    *out = (int32_t)given;
    return FV_OK;
}

void *fv_message_alloc(size_t n, size_t size)
{
    void *memory = calloc((n > 0) ? n : 1U, size);

    if (memory == NULL) {
        (void)fv_fail(FV_ERR_NO_MEMORY, "message: no memory for %zu elements of %zu bytes", n,
                      size);
    }
    return memory;
}
