/*
 * rpc_pb.c - protobuf's wire form, as far as flat messages need it.
 */
#include "coord/rpc_pb.h"

#include <stdlib.h>
#include <string.h>

#define WIRE_VARINT  0U
#define WIRE_FIXED64 1U
#define WIRE_BYTES   2U
#define WIRE_FIXED32 5U

static bool read_varint(fv_span_t *rest, uint64_t *out)
{
    uint64_t value = 0;

    for (uint32_t shift = 0; (shift < 70U) && (rest->n_bytes > 0U); shift += 7U) {
        uint8_t byte = *rest->data;
        rest->data++;
        rest->n_bytes--;
        if ((shift == 63U) && (byte > 1U)) {
            return false; /* more than 64 bits */
        }
        value |= (uint64_t)(byte & 0x7fU) << shift;
        if ((byte & 0x80U) == 0U) {
            *out = value;
            return true;
        }
    }
    return false;
}

static bool take(fv_span_t *rest, uint64_t n_bytes, fv_span_t *out)
{
    if (n_bytes > rest->n_bytes) {
        return false;
    }
    out->data = rest->data;
    out->n_bytes = (size_t)n_bytes;
    rest->data += n_bytes;
    rest->n_bytes -= (size_t)n_bytes;
    return true;
}

fv_pb_result_t fv_pb_next(fv_span_t *rest, fv_pb_field_t *out)
{
    uint64_t key = 0;
    uint64_t n_bytes = 0;
    fv_span_t skipped;
    bool is_ok = false;

    if (rest->n_bytes == 0U) {
        return FV_PB_END;
    }
    memset(out, 0, sizeof(*out));
    if (!read_varint(rest, &key) || (key > UINT32_MAX) || ((key >> 3U) == 0U)) {
        return FV_PB_MALFORMED;
    }
    out->number = (uint32_t)(key >> 3U);
    switch (key & 7U) {
    case WIRE_VARINT:
        is_ok = read_varint(rest, &out->value);
        break;
    case WIRE_BYTES:
        is_ok = read_varint(rest, &n_bytes) && take(rest, n_bytes, &out->bytes);
        break;
    case WIRE_FIXED64:
        is_ok = take(rest, 8, &skipped);
        break;
    case WIRE_FIXED32:
        is_ok = take(rest, 4, &skipped);
        break;
    default: /* groups, and what does not exist */
        break;
    }
    return is_ok ? FV_PB_FIELD : FV_PB_MALFORMED;
}

bool fv_pb_find_bytes(fv_span_t message, uint32_t number, fv_span_t *out)
{
    fv_pb_field_t field;
    fv_pb_result_t result = FV_PB_END;

    out->data = NULL;
    out->n_bytes = 0;
    while ((result = fv_pb_next(&message, &field)) == FV_PB_FIELD) {
        if (field.number == number) {
            *out = field.bytes;
        }
    }
    return result == FV_PB_END;
}

static bool reserve(fv_pb_writer_t *writer, size_t n_bytes)
{
    size_t cap = (writer->cap == 0U) ? 256U : writer->cap;

    while (cap - writer->n_bytes < n_bytes) {
        cap *= 2U;
    }
    if (!writer->failed && (cap != writer->cap)) {
        uint8_t *data = realloc(writer->data, cap);
        writer->failed = (data == NULL);
        if (data != NULL) {
            writer->data = data;
            writer->cap = cap;
        }
    }
    return !writer->failed;
}

static void put_raw_varint(fv_pb_writer_t *writer, uint64_t value)
{
    if (!reserve(writer, 10)) {
        return;
    }
    while (value > 0x7fU) {
        writer->data[writer->n_bytes++] = (uint8_t)(value | 0x80U);
        value >>= 7U;
    }
    writer->data[writer->n_bytes++] = (uint8_t)value;
}

void fv_pb_put_bytes(fv_pb_writer_t *writer, uint32_t number, fv_span_t bytes)
{
    put_raw_varint(writer, ((uint64_t)number << 3U) | WIRE_BYTES);
    put_raw_varint(writer, bytes.n_bytes);
    if (reserve(writer, bytes.n_bytes) && (bytes.n_bytes > 0U)) {
        memcpy(writer->data + writer->n_bytes, bytes.data, bytes.n_bytes);
        writer->n_bytes += bytes.n_bytes;
    }
}

void fv_pb_put_varint(fv_pb_writer_t *writer, uint32_t number, uint64_t value)
{
    put_raw_varint(writer, ((uint64_t)number << 3U) | WIRE_VARINT);
    put_raw_varint(writer, value);
}

void fv_pb_writer_fini(fv_pb_writer_t *writer)
{
    free(writer->data);
    memset(writer, 0, sizeof(*writer));
}
