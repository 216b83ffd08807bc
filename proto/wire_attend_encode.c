/*
 * wire_attend_encode.c - the small heads around the tensors of AttendRequest and AttendResponse.
 *
 * Decode path: station 10 of 10. Before: coord/engine_reply.c. After: coord/rpc_call.c sends.
 *
 * A tensor itself is never copied: its head (tag and length) is written here, its bytes follow as a
 * slice of their own.
 */
#include "proto/wire.h"
#include "proto/wire_text.h"

#include <stdlib.h>
#include <string.h>

/* Tags as they stand on the wire: (field number << 3) | wire type. */
enum {
    FV_TAG_ID = (1 << 3) | 0, /* of request and response alike */
    FV_TAG_LAYER = (2 << 3) | 0,
    FV_TAG_ITEMS = (3 << 3) | 2,
    FV_TAG_DTYPE = (4 << 3) | 0,
    FV_TAG_CAUSAL = (5 << 3) | 0,
    FV_TAG_WANT_LSE = (6 << 3) | 0,
    FV_TAG_APPEND = (7 << 3) | 0,
    FV_TAG_ONLY_SLICE = (8 << 3) | 0,
    FV_TAG_Q = (14 << 3) | 2,
    FV_TAG_K = (15 << 3) | 2,
    FV_TAG_V = (16 << 3) | 2,
    FV_TAG_ITEM_SESSION = (1 << 3) | 2,
    FV_TAG_ITEM_POSITION = (2 << 3) | 0,
    FV_TAG_ITEM_N_TOKENS = (3 << 3) | 0,
    FV_TAG_STATUS = (2 << 3) | 2,
    FV_TAG_TIMINGS = (3 << 3) | 2,
    FV_TAG_DURABILITY = (4 << 3) | 0,
    FV_TAG_LSE = (14 << 3) | 2,
    FV_TAG_OUT = (15 << 3) | 2,
    FV_TAG_STATUS_CODE = (1 << 3) | 0,
    FV_TAG_STATUS_MESSAGE = (2 << 3) | 2,
    FV_TAG_QUEUE = (1 << 3) | 0,
    FV_TAG_COMPUTE = (2 << 3) | 0,
    FV_TAG_EXCHANGE = (3 << 3) | 0,
    FV_TAG_TOTAL = (4 << 3) | 0,
};

#define ITEM_BYTES_MAX (2 + 2 + FV_SESSION_ID_CHARS + 11 + 6)
#define SMALL_BYTES    64                  /* the scalar fields of a request */
#define TENSOR_MAX     ((size_t)INT32_MAX) /* a protobuf length */

static uint8_t *put_varint(uint8_t *p, uint64_t value)
{
    while (value >= 0x80U) {
        *p++ = (uint8_t)(value | 0x80U);
        value >>= 7U;
    }
    *p++ = (uint8_t)value;
    return p;
}

/* A scalar field; like every proto3 writer, leaves out a zero. */
static uint8_t *put_scalar(uint8_t *p, unsigned tag, uint64_t value)
{
    return (value == 0) ? p : put_varint(put_varint(p, tag), value);
}

static uint8_t *put_bytes(uint8_t *p, unsigned tag, const void *data, size_t n_bytes)
{
    p = put_varint(put_varint(p, tag), n_bytes);
    memcpy(p, data, n_bytes);
    return p + n_bytes;
}

/* Tag and length of a tensor whose bytes follow elsewhere; nothing for an empty one. */
static uint8_t *put_tensor_head(uint8_t *p, unsigned tag, size_t n_bytes)
{
    return (n_bytes == 0) ? p : put_varint(put_varint(p, tag), n_bytes);
}

static uint8_t *put_status(uint8_t *p, const fv_attend_response_t *response)
{
    const char *message = (response->message != NULL) ? response->message : "";
    char text[FV_ERROR_TEXT_BYTES];
    uint8_t body[FV_ERROR_TEXT_BYTES + 16];
    uint8_t *end = body;

    if ((response->code == 0) && (message[0] == '\0')) {
        return p;
    }
    end = put_scalar(end, FV_TAG_STATUS_CODE, (uint64_t)(int64_t)response->code);
    size_t n = fv_utf8_copy(text, sizeof(text), message, strlen(message));
    if (n > 0) {
        end = put_bytes(end, FV_TAG_STATUS_MESSAGE, text, n);
    }
    return put_bytes(p, FV_TAG_STATUS, body, (size_t)(end - body));
}

static uint8_t *put_timings(uint8_t *p, const fv_timings_t *timings)
{
    uint8_t body[32];
    uint8_t *end = body;

    end = put_scalar(end, FV_TAG_QUEUE, timings->queue_us);
    end = put_scalar(end, FV_TAG_COMPUTE, timings->compute_us);
    end = put_scalar(end, FV_TAG_EXCHANGE, timings->exchange_us);
    end = put_scalar(end, FV_TAG_TOTAL, timings->total_us);
    return (end == body) ? p : put_bytes(p, FV_TAG_TIMINGS, body, (size_t)(end - body));
}

void fv_wire_attend_response_encode(const fv_attend_response_t *response,
                                    uint8_t head[FV_WIRE_HEAD_BYTES],
                                    size_t *n_before_lse,
                                    size_t *n_head)
{
    uint8_t *p = put_scalar(head, FV_TAG_ID, response->request_id);

    p = put_status(p, response);
    p = put_timings(p, &response->timings);
    p = put_scalar(p, FV_TAG_DURABILITY, (uint64_t)response->durability);
    p = put_tensor_head(p, FV_TAG_LSE, response->lse_bytes);
    *n_before_lse = (size_t)(p - head);
    p = put_tensor_head(p, FV_TAG_OUT, response->out_bytes);
    *n_head = (size_t)(p - head);
}

static uint8_t *put_item(uint8_t *p, const fv_attend_item_t *item)
{
    char hex[FV_SESSION_ID_CHARS + 1];
    uint8_t body[ITEM_BYTES_MAX];
    uint8_t *end = body;

    fv_session_id_format(&item->session, hex);
    end = put_bytes(end, FV_TAG_ITEM_SESSION, hex, FV_SESSION_ID_CHARS);
    end = put_scalar(end, FV_TAG_ITEM_POSITION, item->position);
    end = put_scalar(end, FV_TAG_ITEM_N_TOKENS, item->n_tokens);
    return put_bytes(p, FV_TAG_ITEMS, body, (size_t)(end - body));
}

static fv_status_t check_tensor(const char *name, size_t n_bytes)
{
    if (n_bytes <= TENSOR_MAX) {
        return FV_OK;
    }
    return fv_fail(FV_ERR_INVALID_ARG, "%s: given %zu bytes, expected at most %zu", name, n_bytes,
                   TENSOR_MAX);
}

static fv_status_t check_request(const fv_attend_request_t *request)
{
    if ((request->n_items == 0) || (request->n_items > FV_ITEMS_MAX)) {
        return fv_fail(FV_ERR_INVALID_ARG, "items: given %u, expected 1..%d", request->n_items,
                       FV_ITEMS_MAX);
    }
    if (!fv_dtype_is_valid((int)request->dtype)) {
        return fv_fail(FV_ERR_INVALID_ARG, "dtype: given %d, expected F32, F16 or BF16",
                       (int)request->dtype);
    }
    return FV_OK;
}

/* NOLINTNEXTLINE(readability-function-size): the parameters are the message's parts */
fv_status_t fv_wire_attend_request_encode(const fv_attend_request_t *request,
                                          const fv_attend_item_t *items,
                                          size_t q_bytes,
                                          size_t k_bytes,
                                          size_t v_bytes,
                                          fv_bytes_t *out_head,
                                          fv_wire_tensor_heads_t *out_tensors)
{
    FV_RETURN_IF_ERR(check_request(request));
    FV_RETURN_IF_ERR(check_tensor("q", q_bytes));
    FV_RETURN_IF_ERR(check_tensor("k", k_bytes));
    FV_RETURN_IF_ERR(check_tensor("v", v_bytes));
    uint8_t *head = malloc(SMALL_BYTES + ((size_t)request->n_items * ITEM_BYTES_MAX));
    if (head == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "AttendRequest: no memory for %u items", request->n_items);
    }
    uint8_t *p = put_scalar(head, FV_TAG_ID, request->request_id);
    p = put_scalar(p, FV_TAG_LAYER, request->layer);
    for (uint32_t i = 0; i < request->n_items; i++) {
        p = put_item(p, &items[i]);
    }
    p = put_scalar(p, FV_TAG_DTYPE, (uint64_t)request->dtype);
    if (!request->causal) { /* absent means true, so false must be there */
        p = put_varint(put_varint(p, FV_TAG_CAUSAL), 0);
    }
    p = put_scalar(p, FV_TAG_WANT_LSE, request->want_lse ? 1U : 0U);
    if (!request->append) {
        p = put_varint(put_varint(p, FV_TAG_APPEND), 0);
    }
    p = put_scalar(p, FV_TAG_ONLY_SLICE, request->only_slice);
    *out_head = (fv_bytes_t){.data = head, .n_bytes = (size_t)(p - head)};
    out_tensors->n_q =
        (size_t)(put_tensor_head(out_tensors->q, FV_TAG_Q, q_bytes) - out_tensors->q);
    out_tensors->n_k =
        (size_t)(put_tensor_head(out_tensors->k, FV_TAG_K, k_bytes) - out_tensors->k);
    out_tensors->n_v =
        (size_t)(put_tensor_head(out_tensors->v, FV_TAG_V, v_bytes) - out_tensors->v);
    return FV_OK;
}
