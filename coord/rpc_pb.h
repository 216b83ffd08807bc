/*
 * rpc_pb.h - protobuf's wire form for the door's own small services: read a field, write a field.
 *
 * Health and reflection are answered where no generated code may come; their messages are flat.
 */
#ifndef FV_COORD_RPC_PB_H
#define FV_COORD_RPC_PB_H

#include "proto/wire.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct fv_pb_field {
    uint32_t number;
    uint64_t value;  /* varint fields; else 0 */
    fv_span_t bytes; /* length-delimited fields; else empty. Borrows from the message. */
} fv_pb_field_t;

typedef enum fv_pb_result {
    FV_PB_FIELD,
    FV_PB_END,
    FV_PB_MALFORMED
} fv_pb_result_t;

/* Reads the next field and moves `rest` past it. Groups and truncated fields are malformed. */
fv_pb_result_t fv_pb_next(fv_span_t *rest, fv_pb_field_t *out);

/* The last length-delimited field `number`; empty when absent. False when the message is malformed. */
bool fv_pb_find_bytes(fv_span_t message, uint32_t number, fv_span_t *out);

/* A growing message. `failed` is set once memory is gone; then nothing more is written. */
typedef struct fv_pb_writer {
    uint8_t *data;
    size_t n_bytes;
    size_t cap;
    bool failed;
} fv_pb_writer_t;

void fv_pb_put_bytes(fv_pb_writer_t *writer, uint32_t number, fv_span_t bytes);
void fv_pb_put_varint(fv_pb_writer_t *writer, uint32_t number, uint64_t value);
void fv_pb_writer_fini(fv_pb_writer_t *writer);

#endif /* FV_COORD_RPC_PB_H */
