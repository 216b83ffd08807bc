/*
 * client_attend.c - encoding of an attend request, gathering of its answer, and the unary call.
 */
#include "client/client_attend.h"

#include <stdlib.h>

/* ------------------------------------------------------------------ request */

static fovea_code_t
check_tensor(const char *name, const void *data, size_t n_bytes, fovea_error_t *error)
{
    if ((data == NULL) && (n_bytes > 0)) {
        return fv_client_fail(error, FOVEA_INVALID_ARGUMENT,
                              "%s: given NULL with %zu bytes, expected a pointer", name, n_bytes);
    }
    return FOVEA_OK;
}

/* What must hold for the memory to be usable; shapes are the service's to check. */
static fovea_code_t check_request(const fovea_attend_request_t *r, fovea_error_t *error)
{
    const struct {
        const char *name;
        const void *data;
        size_t n_bytes;
    } tensors[] = {{"q", r->q, r->q_bytes},
                   {"k", r->k, r->k_bytes},
                   {"v", r->v, r->v_bytes},
                   {"out", r->out, r->out_bytes}};
    fovea_code_t code = FOVEA_OK;

    if ((r->items == NULL) || (r->n_items == 0) || (r->n_items > FV_ITEMS_MAX)) {
        return fv_client_fail(error, FOVEA_INVALID_ARGUMENT, "items: given %u, expected 1..%d",
                              (r->items == NULL) ? 0 : r->n_items, FV_ITEMS_MAX);
    }
    if (fovea_dtype_bytes(r->dtype) == 0) {
        return fv_client_fail(error, FOVEA_INVALID_ARGUMENT,
                              "dtype: given %d, expected F32, F16 or BF16", (int)r->dtype);
    }
    for (size_t i = 0; (i < (sizeof(tensors) / sizeof(tensors[0]))) && (code == FOVEA_OK); i++) {
        code = check_tensor(tensors[i].name, tensors[i].data, tensors[i].n_bytes, error);
    }
    return code;
}

static void add_piece(fv_attend_message_t *m, const void *data, size_t n_bytes, atomic_uint *pins)
{
    if (n_bytes > 0) {
        m->pieces[m->n_pieces++] = (fv_out_piece_t){data, n_bytes, pins};
    }
}

static fv_attend_item_t *items_of(const fovea_attend_request_t *request)
{
    fv_attend_item_t *items = calloc(request->n_items, sizeof(*items));

    for (uint32_t i = 0; (items != NULL) && (i < request->n_items); i++) {
        items[i].session = fv_client_session(&request->items[i].session);
        items[i].position = request->items[i].position;
        items[i].n_tokens = request->items[i].n_tokens;
    }
    return items;
}

fovea_code_t fv_attend_message_init(fv_attend_message_t *out,
                                    const fovea_attend_request_t *request,
                                    uint64_t request_id,
                                    atomic_uint *pins,
                                    fovea_error_t *error)
{
    fovea_code_t code = check_request(request, error);
    fv_attend_item_t *items = NULL;

    memset(out, 0, sizeof(*out));
    if (code != FOVEA_OK) {
        return code;
    }
    items = items_of(request);
    if (items == NULL) {
        return fv_client_fail(error, FOVEA_RESOURCE_EXHAUSTED, "out of host memory");
    }
    fv_attend_request_t wire = {.request_id = request_id,
                                .layer = request->layer,
                                .dtype = (fv_dtype_t)request->dtype,
                                .causal = (request->flags & FOVEA_ATTEND_NOT_CAUSAL) == 0,
                                .append = (request->flags & FOVEA_ATTEND_QUERY_ONLY) == 0,
                                .want_lse = request->lse != NULL,
                                .only_slice = request->only_slice,
                                .n_items = request->n_items};
    fv_status_t status =
        fv_wire_attend_request_encode(&wire, items, request->q_bytes, request->k_bytes,
                                      request->v_bytes, &out->head, &out->tensor_heads);
    free(items);
    if (status != FV_OK) {
        return fv_client_status(error, status);
    }
    add_piece(out, out->head.data, out->head.n_bytes, NULL);
    add_piece(out, out->tensor_heads.q, out->tensor_heads.n_q, NULL);
    add_piece(out, request->q, request->q_bytes, pins);
    add_piece(out, out->tensor_heads.k, out->tensor_heads.n_k, NULL);
    add_piece(out, request->k, request->k_bytes, pins);
    add_piece(out, out->tensor_heads.v, out->tensor_heads.n_v, NULL);
    add_piece(out, request->v, request->v_bytes, pins);
    return FOVEA_OK;
}

void fv_attend_message_fini(fv_attend_message_t *message)
{
    fv_bytes_free(&message->head);
    message->n_pieces = 0;
}

/* ------------------------------------------------------------------ answer */

fovea_code_t fv_attend_reply_scan(const fv_span_t *spans,
                                  size_t n_spans,
                                  fv_attend_response_view_t *out,
                                  fovea_error_t *error)
{
    return (fv_wire_attend_response_scan(spans, n_spans, out) == FV_OK)
               ? FOVEA_OK
               : fv_client_bad_answer(error);
}

static fovea_code_t
check_size(const char *name, size_t given, size_t expected, fovea_error_t *error)
{
    if (given == expected) {
        return FOVEA_OK;
    }
    return fv_client_fail(error, FOVEA_INVALID_ARGUMENT,
                          "%s_bytes: given %zu, expected %zu (the answer's size)", name, expected,
                          given);
}

fovea_code_t fv_attend_reply_gather(const fv_span_t *spans,
                                    size_t n_spans,
                                    const fv_attend_response_view_t *view,
                                    const fv_attend_target_t *target,
                                    fovea_timings_t *out_timings,
                                    fovea_error_t *error)
{
    fovea_code_t code = FOVEA_OK;

    if (view->code != 0) {
        code = ((view->code > 0) && (view->code <= 16)) ? (fovea_code_t)view->code : FOVEA_UNKNOWN;
        return fv_client_fail(error, code, "%s", view->message);
    }
    code = check_size("out", view->out.n_bytes, target->out_bytes, error);
    if (code == FOVEA_OK) {
        code = check_size("lse", view->lse.n_bytes, target->lse_bytes, error);
    }
    if (code != FOVEA_OK) {
        return code;
    }
    if (target->out_bytes > 0) {
        fv_wire_gather(spans, n_spans, view->out, target->out);
    }
    if (target->lse_bytes > 0) {
        fv_wire_gather(spans, n_spans, view->lse, target->lse);
    }
    if (out_timings != NULL) {
        *out_timings = (fovea_timings_t){view->timings.queue_us, view->timings.compute_us,
                                         view->timings.exchange_us, view->timings.total_us};
    }
    return FOVEA_OK;
}

/* ------------------------------------------------------------------ unary */

typedef struct fv_once {
    fv_attend_target_t target;
    fovea_timings_t *out_timings;
} fv_once_t;

static fovea_code_t
on_reply(void *ctx, const fv_span_t *spans, size_t n_spans, fovea_error_t *error)
{
    const fv_once_t *once = ctx;
    fv_attend_response_view_t view;
    fovea_code_t code = fv_attend_reply_scan(spans, n_spans, &view, error);

    if (code != FOVEA_OK) {
        return code;
    }
    return fv_attend_reply_gather(spans, n_spans, &view, &once->target, once->out_timings, error);
}

fovea_code_t fovea_attend(fovea_client_t *client,
                          const fovea_attend_request_t *request,
                          int64_t timeout_ms,
                          fovea_timings_t *out_timings,
                          fovea_error_t *error)
{
    fv_attend_message_t message;
    atomic_uint pins = 0;
    fovea_code_t code = FOVEA_OK;

    if ((client == NULL) || (request == NULL)) {
        return fv_client_null(error, "client or request");
    }
    code = fv_attend_message_init(&message, request, 1, &pins, error);
    if (code == FOVEA_OK) {
        fv_once_t once = {fv_attend_target(request), out_timings};
        fv_unary_call_t unary = {.method = FV_METHOD_PATH("Attention", "AttendOnce"),
                                 .pieces = message.pieces,
                                 .n_pieces = message.n_pieces,
                                 .deadline_us = fv_client_call_deadline(client, timeout_ms),
                                 .on_reply = on_reply,
                                 .ctx = &once};
        code = fv_client_unary(client, &unary, NULL, error);
        fv_attend_message_fini(&message);
    }
    return code;
}
