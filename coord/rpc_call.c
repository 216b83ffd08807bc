/*
 * rpc_call.c - what a call sends and reads next: replies queued, batches started, the status decided.
 *
 * Decode path: station 10 of 10. Before: coord/engine_reply.c.
 */
#include "coord/rpc_call.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What a send batch is made of. */
typedef struct fv_send {
    grpc_op ops[3];
    size_t n_ops;
    grpc_slice details;
} fv_send_t;

/* ------------------------------------------------------------------ life */

void fv_call_ref(fv_call_t *call)
{
    (void)atomic_fetch_add_explicit(&call->n_refs, 1U, memory_order_relaxed);
}

void fv_call_unref(fv_call_t *call)
{
    /* acq_rel: whoever frees sees every other holder's last writes */
    if (atomic_fetch_sub_explicit(&call->n_refs, 1U, memory_order_acq_rel) == 1U) {
        (void)pthread_mutex_destroy(&call->lock);
        fv_grant_unref(call->grant);
        free(call);
    }
}

fv_call_t *fv_call_create(fv_calls_t *calls)
{
    fv_call_t *call = calloc(1, sizeof(*call));

    if (call == NULL) {
        return NULL;
    }
    call->calls = calls;
    atomic_init(&call->n_refs, 1U);
    atomic_init(&call->is_closed, false);
    atomic_init(&call->user, NULL);
    call->tag_request = (fv_tag_t){call, FV_TAG_REQUEST};
    call->tag_close = (fv_tag_t){call, FV_TAG_CLOSE};
    call->tag_read = (fv_tag_t){call, FV_TAG_READ};
    call->tag_send = (fv_tag_t){call, FV_TAG_SEND};
    grpc_call_details_init(&call->details);
    grpc_metadata_array_init(&call->metadata);
    (void)pthread_mutex_init(&call->lock, NULL);
    return call;
}

void fv_requests_end(fv_principal_t *principal, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        fv_principal_end_request(principal);
    }
}

void fv_outgoing_drop(fv_outgoing_t *list)
{
    while (list != NULL) {
        fv_outgoing_t *next = list->next;
        fv_requests_end(list->principal, list->n_ends);
        grpc_byte_buffer_destroy(list->message);
        free(list);
        list = next;
    }
}

/* ------------------------------------------------------------------ batches */

static void start_batch(fv_call_t *call, const grpc_op *ops, size_t n_ops, fv_tag_t *tag)
{
    grpc_call_error error = grpc_call_start_batch(call->call, ops, n_ops, tag, NULL);

    FV_ASSERT(error == GRPC_CALL_OK); /* only a mistake of ours: two batches of a kind, bad flags */
}

void fv_call_start_close(fv_call_t *call)
{
    grpc_op op = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};

    op.data.recv_close_on_server.cancelled = &call->was_cancelled;
    (void)pthread_mutex_lock(&call->lock);
    call->n_batches++;
    (void)pthread_mutex_unlock(&call->lock);
    fv_call_ref(call);
    start_batch(call, &op, 1, &call->tag_close);
}

/* Lock held. */
void fv_call_end(fv_call_t *call, int32_t code, const char *text)
{
    if (!call->is_ending) {
        call->is_ending = true;
        call->end_code = code;
        (void)snprintf(call->end_text, sizeof(call->end_text), "%s", text);
    }
}

/* Lock held. Ends a stream that has nothing under way and expects nothing more. */
static void end_if_done(fv_call_t *call)
{
    bool is_idle = (call->n_inflight == 0) && (call->first == NULL) && !call->is_sending;

    if ((call->method == NULL) || (call->method->kind == FV_CALL_UNARY) || !is_idle) {
        return;
    }
    if (call->is_half_closed && (call->method->kind == FV_CALL_BIDI)) {
        fv_call_end(call, GRPC_STATUS_OK, "");
    } else if (atomic_load(&call->calls->is_stopping)) {
        fv_call_end(call, GRPC_STATUS_UNAVAILABLE, "the service is stopping");
    }
}

/* Lock held. True when a read is to be started now. */
static bool take_read(fv_call_t *call)
{
    if ((call->method == NULL) || call->is_reading || call->is_delivering || call->is_half_closed ||
        call->is_refusing || call->is_ending) {
        return false;
    }
    if ((call->method->kind == FV_CALL_BIDI)
            ? (call->n_inflight >= call->calls->stream_inflight_max)
            : call->has_read) {
        return false;
    }
    call->has_read = true;
    call->is_reading = true;
    call->n_batches++;
    fv_call_ref(call);
    return true;
}

/* Lock held. True when `out` is to be started now. */
static bool take_send(fv_call_t *call, fv_send_t *out)
{
    fv_outgoing_t *head = call->first;

    if (call->is_sending || call->has_sent_status || ((head == NULL) && !call->is_ending)) {
        return false;
    }
    memset(out, 0, sizeof(*out));
    if (!call->has_sent_head) {
        call->has_sent_head = true;
        out->ops[out->n_ops++].op = GRPC_OP_SEND_INITIAL_METADATA;
    }
    if (head != NULL) {
        grpc_op *op = &out->ops[out->n_ops++];
        call->first = head->next;
        call->sending = head;
        /* not when gRPC says that it is sent: the caller may have it, and send the next request, before that */
        fv_requests_end(call->sending->principal, call->sending->n_ends);
        call->sending->n_ends = 0;
        op->op = GRPC_OP_SEND_MESSAGE;
        /* more follows at once: let the transport write them together */
        op->flags = (head->next != NULL) ? GRPC_WRITE_BUFFER_HINT : 0U;
        op->data.send_message.send_message = head->message;
        head->next = NULL;
    }
    if (call->is_ending && (call->first == NULL)) {
        grpc_op *op = &out->ops[out->n_ops++];
        call->has_sent_status = true;
        op->op = GRPC_OP_SEND_STATUS_FROM_SERVER;
        op->data.send_status_from_server.status = (grpc_status_code)call->end_code;
        out->details = grpc_slice_from_copied_string(call->end_text);
        op->data.send_status_from_server.status_details = &out->details;
    }
    call->is_sending = true;
    call->n_batches++;
    fv_call_ref(call);
    return true;
}

/* Starts whatever the state allows now. Thread: any; no lock held. */
void fv_call_pump(fv_call_t *call)
{
    fv_send_t send;

    (void)pthread_mutex_lock(&call->lock);
    if (atomic_load(&call->is_closed)) { /* `calls` may be gone */
        (void)pthread_mutex_unlock(&call->lock);
        return;
    }
    end_if_done(call);
    bool must_read = take_read(call);
    bool must_send = take_send(call, &send);
    (void)pthread_mutex_unlock(&call->lock);
    if (must_send) {
        start_batch(call, send.ops, send.n_ops, &call->tag_send);
        grpc_slice_unref(send.details);
    }
    if (must_read) {
        grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};
        op.data.recv_message.recv_message = &call->received;
        start_batch(call, &op, 1, &call->tag_read);
    }
}

/* ------------------------------------------------------------------ replies; any thread */

void fv_call_reply(fv_call_t *call, const fv_reply_piece_t *pieces, size_t n_pieces)
{
    fv_outgoing_t *dropped = NULL;

    if (atomic_load(&call->is_closed)) {
        fv_message_release_pieces(pieces, n_pieces);
        return;
    }
    fv_outgoing_t *reply = malloc(sizeof(*reply));
    if (reply == NULL) {
        fv_message_release_pieces(pieces, n_pieces);
        fv_call_fail(call, GRPC_STATUS_RESOURCE_EXHAUSTED, "reply: out of host memory");
        return;
    }
    *reply = (fv_outgoing_t){.principal = fv_call_principal(call)};
    reply->message = fv_message_create(pieces, n_pieces);
    (void)pthread_mutex_lock(&call->lock);
    if (call->is_ending || atomic_load(&call->is_closed)) {
        dropped = reply;
    } else {
        if (call->method->kind == FV_CALL_SERVER_STREAM) {
            dropped = call->first; /* at most one waits: a slow watcher sees the newest state */
            call->first = NULL;
        } else if (call->method->kind == FV_CALL_UNARY) {
            fv_call_end(call, GRPC_STATUS_OK, "");
        }
        if (call->first == NULL) {
            call->first = reply;
        } else {
            call->last->next = reply;
        }
        call->last = reply;
        if (call->method->kind == FV_CALL_BIDI) { /* else with the call */
            reply->n_ends = call->n_ends;
            call->n_ends = 0;
        }
    }
    (void)pthread_mutex_unlock(&call->lock);
    fv_outgoing_drop(dropped);
    fv_call_pump(call);
}

void fv_call_fail(fv_call_t *call, int32_t grpc_code, const char *message)
{
    bool lacks_reply = (grpc_code == GRPC_STATUS_OK) && (call->method->kind == FV_CALL_UNARY);

    if (lacks_reply) { /* OK without a message is no answer a client can read */
        grpc_code = GRPC_STATUS_INTERNAL;
        message = "the call ended without a reply";
    }
    (void)pthread_mutex_lock(&call->lock);
    fv_call_end(call, grpc_code, message);
    (void)pthread_mutex_unlock(&call->lock);
    fv_call_pump(call);
}

void fv_call_end_request(fv_call_t *call)
{
    fv_principal_t *principal = fv_call_principal(call);
    bool ends_now = false;

    if (principal == NULL) {
        return;
    }
    (void)pthread_mutex_lock(&call->lock);
    if (atomic_load(&call->is_closed)) {
        ends_now = true;
    } else {
        call->n_ends++;
    }
    (void)pthread_mutex_unlock(&call->lock);
    fv_requests_end(principal, ends_now ? 1U : 0U);
}

bool fv_call_is_closed(const fv_call_t *call)
{
    return atomic_load(&call->is_closed);
}

fv_method_t fv_call_method(const fv_call_t *call)
{
    return (fv_method_t)call->method->method;
}

void *fv_call_user(const fv_call_t *call)
{
    return atomic_load(&call->user);
}

void fv_call_set_user(fv_call_t *call, void *user)
{
    atomic_store(&call->user, user);
}
