/*
 * rpc_message.c - received byte buffers seen as spans, reply pieces made into byte buffers. No copies but of small
 * heads.
 *
 * Decode path: part of stations 1 and 10 of 10.
 */
#include "coord/rpc_internal.h"

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/slice.h>

#include <stdlib.h>

#define SPANS_FIRST 64U /* a 1 MiB message comes in about 20 slices, one of 16 MiB in about 400 */

static fv_status_t grow(fv_span_list_t *list)
{
    size_t cap = (list->cap == 0U) ? SPANS_FIRST : (list->cap * 2U);
    fv_span_t *spans = realloc(list->spans, cap * sizeof(*spans));

    if (spans == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "message: no memory for %zu spans", cap);
    }
    list->spans = spans;
    list->cap = cap;
    return FV_OK;
}

fv_status_t fv_message_spans(grpc_byte_buffer *message, fv_span_list_t *out)
{
    grpc_byte_buffer_reader reader;
    grpc_slice *slice = NULL;
    fv_status_t status = FV_OK;

    out->n_spans = 0;
    if (grpc_byte_buffer_reader_init(&reader, message) == 0) {
        return fv_fail(FV_ERR_INVALID_ARG, "message: gRPC cannot read it");
    }
    while ((status == FV_OK) && (grpc_byte_buffer_reader_peek(&reader, &slice) != 0)) {
        if (GRPC_SLICE_LENGTH(*slice) == 0U) {
            continue;
        }
        if (out->n_spans == out->cap) {
            status = grow(out);
        }
        if (status == FV_OK) {
            out->spans[out->n_spans].data = GRPC_SLICE_START_PTR(*slice);
            out->spans[out->n_spans].n_bytes = GRPC_SLICE_LENGTH(*slice);
            out->n_spans++;
        }
    }
    grpc_byte_buffer_reader_destroy(&reader);
    return status;
}

/* gRPC only reads what it sends, but its slices are not const. */
static void *writable(const void *data)
{
    union {
        const void *in;
        void *out;
    } pointer = {.in = data};

    return pointer.out;
}

grpc_byte_buffer *fv_message_create(const fv_reply_piece_t *pieces, size_t n_pieces)
{
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(NULL, 0);
    grpc_slice_buffer *slices = &message->data.raw.slice_buffer;

    for (size_t i = 0; i < n_pieces; i++) {
        const fv_reply_piece_t *piece = &pieces[i];
        if (piece->release == NULL) {
            grpc_slice_buffer_add(slices,
                                  grpc_slice_from_copied_buffer(piece->data, piece->n_bytes));
        } else if (piece->n_bytes == 0U) {
            piece->release(piece->arg);
        } else {
            grpc_slice_buffer_add(
                slices, grpc_slice_new_with_user_data(writable(piece->data), piece->n_bytes,
                                                      piece->release, piece->arg));
        }
    }
    return message;
}

void fv_message_release_pieces(const fv_reply_piece_t *pieces, size_t n_pieces)
{
    for (size_t i = 0; i < n_pieces; i++) {
        if (pieces[i].release != NULL) {
            pieces[i].release(pieces[i].arg);
        }
    }
}
