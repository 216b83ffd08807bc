/*
 * client_rpc_duplex.c - one streaming call on gRPC C core: messages both ways at once.
 *
 * The call has a completion queue of its own, polled by whoever calls fv_duplex_next(). Under way are
 * always RECV_STATUS and (until the peer has no more) RECV_MESSAGE, and at most one SEND_MESSAGE. The
 * call is over when all of them have come back: only then does FV_DUPLEX_CLOSED come.
 */
#include "client/client_rpc_internal.h"

#include <stdlib.h>
#include <string.h>

/* Tags of the completion queue: addresses inside the duplex, told apart by which. */
typedef enum fv_duplex_tag {
    TAG_START,
    TAG_SEND,
    TAG_RECEIVE,
    TAG_HALF_CLOSE,
    TAG_STATUS,
    TAG_COUNT
} fv_duplex_tag_t;

struct fv_duplex {
    fv_channel_t *channel;
    grpc_completion_queue *queue;
    grpc_call *call;
    grpc_metadata sent;
    size_t n_sent;
    grpc_metadata_array initial, trailing;
    grpc_status_code code;
    grpc_slice details;
    fovea_error_t status;
    atomic_int n_under_way; /* batches started and not come back; senders raise it too */
    atomic_bool is_over;    /* the status came: nothing more can be sent */
    grpc_byte_buffer *sending;
    grpc_byte_buffer *received;
    fv_message_view_t view;
    char tags[TAG_COUNT];
};

/* Release: whoever takes the batch's event sees what was set up for it (fv_duplex_next() acquires). */
static bool start(fv_duplex_t *d, const grpc_op *ops, size_t n_ops, fv_duplex_tag_t tag)
{
    (void)atomic_fetch_add_explicit(&d->n_under_way, 1, memory_order_release);
    if (grpc_call_start_batch(d->call, ops, n_ops, &d->tags[tag], NULL) == GRPC_CALL_OK) {
        return true;
    }
    (void)atomic_fetch_sub_explicit(&d->n_under_way, 1, memory_order_relaxed);
    return false;
}

static bool start_receive(fv_duplex_t *d)
{
    grpc_op op;

    memset(&op, 0, sizeof(op));
    op.op = GRPC_OP_RECV_MESSAGE;
    op.data.recv_message.recv_message = &d->received;
    return start(d, &op, 1, TAG_RECEIVE);
}

static bool start_all(fv_duplex_t *d)
{
    grpc_op ops[2];

    memset(ops, 0, sizeof(ops));
    ops[0].op = GRPC_OP_RECV_STATUS_ON_CLIENT;
    ops[0].data.recv_status_on_client.trailing_metadata = &d->trailing;
    ops[0].data.recv_status_on_client.status = &d->code;
    ops[0].data.recv_status_on_client.status_details = &d->details;
    if (!start(d, ops, 1, TAG_STATUS)) {
        return false;
    }
    memset(ops, 0, sizeof(ops));
    ops[0].op = GRPC_OP_SEND_INITIAL_METADATA;
    ops[0].data.send_initial_metadata.count = d->n_sent;
    ops[0].data.send_initial_metadata.metadata = &d->sent;
    ops[1].op = GRPC_OP_RECV_INITIAL_METADATA;
    ops[1].data.recv_initial_metadata.recv_initial_metadata = &d->initial;
    return start(d, ops, 2, TAG_START) && start_receive(d);
}

fovea_code_t fv_duplex_open(fv_channel_t *channel,
                            const char *method,
                            int64_t deadline_us,
                            fv_duplex_t **out,
                            fovea_error_t *error)
{
    fv_duplex_t *d = calloc(1, sizeof(*d));
    bool is_started = false;

    if (d == NULL) {
        return fv_client_fail(error, FOVEA_RESOURCE_EXHAUSTED, "out of host memory");
    }
    d->channel = channel;
    d->queue = fv_channel_queue_get(channel);
    d->call = fv_channel_call(channel, method, d->queue, deadline_us);
    d->details = grpc_empty_slice();
    d->n_sent = fv_channel_metadata(channel, &d->sent);
    grpc_metadata_array_init(&d->initial);
    grpc_metadata_array_init(&d->trailing);
    is_started = start_all(d);
    FV_ASSERT(is_started); /* the batches are well-formed by construction */
    *out = d;
    return FOVEA_OK;
}

bool fv_duplex_send(fv_duplex_t *d, const fv_out_piece_t *pieces, size_t n_pieces)
{
    grpc_op op;

    if (atomic_load_explicit(&d->is_over, memory_order_acquire)) {
        return false;
    }
    FV_ASSERT(d->sending == NULL);
    d->sending = fv_rpc_message(pieces, n_pieces);
    if (d->sending == NULL) {
        return false;
    }
    memset(&op, 0, sizeof(op));
    op.op = GRPC_OP_SEND_MESSAGE;
    op.data.send_message.send_message = d->sending;
    if (!start(d, &op, 1, TAG_SEND)) {
        grpc_byte_buffer_destroy(d->sending);
        d->sending = NULL;
        return false;
    }
    return true;
}

void fv_duplex_half_close(fv_duplex_t *d)
{
    grpc_op op;

    memset(&op, 0, sizeof(op));
    op.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    if (!atomic_load_explicit(&d->is_over, memory_order_acquire)) {
        (void)start(d, &op, 1, TAG_HALF_CLOSE); /* refused only when the call is over */
    }
}

void fv_duplex_cancel(fv_duplex_t *d)
{
    if (d->call != NULL) {
        (void)grpc_call_cancel(d->call, NULL);
    }
}

void fv_duplex_end(fv_duplex_t *d)
{
    if (d->call != NULL) {
        grpc_call_unref(d->call);
        d->call = NULL;
    }
}

static void set_status(fv_duplex_t *d)
{
    fv_rpc_status(d->code, d->details, &d->status);
    d->details = grpc_empty_slice();
    atomic_store_explicit(&d->is_over, true, memory_order_release);
}

static fv_duplex_event_t received(fv_duplex_t *d)
{
    fv_duplex_event_t event = {.kind = FV_DUPLEX_OTHER};
    grpc_byte_buffer *buffer = d->received;

    d->received = NULL;
    if (buffer == NULL) { /* the peer has no more, or the call failed: the status tells */
        return event;
    }
    if (!fv_message_view_set(&d->view, buffer)) {
        fv_message_view_clear(&d->view);
        (void)grpc_call_cancel_with_status(d->call, GRPC_STATUS_RESOURCE_EXHAUSTED,
                                           "out of host memory", NULL);
        return event;
    }
    event.kind = FV_DUPLEX_RECEIVED;
    event.spans = d->view.spans;
    event.n_spans = d->view.n_spans;
    return event;
}

fv_duplex_event_t fv_duplex_next(fv_duplex_t *d, int64_t deadline_us)
{
    fv_duplex_event_t event = {.kind = FV_DUPLEX_OTHER};
    grpc_event raw;

    if (atomic_load_explicit(&d->n_under_way, memory_order_acquire) == 0) {
        if (d->call == NULL) { /* no event can come, but the connection's writes go on */
            (void)grpc_completion_queue_next(d->queue, fv_rpc_timespec(deadline_us), NULL);
        }
        event.kind = FV_DUPLEX_CLOSED;
        return event;
    }
    raw = grpc_completion_queue_next(d->queue, fv_rpc_timespec(deadline_us), NULL);
    (void)atomic_load_explicit(&d->n_under_way, memory_order_acquire); /* pairs with start() */
    if (raw.type != GRPC_OP_COMPLETE) {
        event.kind = FV_DUPLEX_TIMEOUT;
        return event;
    }
    switch ((fv_duplex_tag_t)((char *)raw.tag - d->tags)) {
    case TAG_SEND:
        grpc_byte_buffer_destroy(d->sending);
        d->sending = NULL;
        event.kind = FV_DUPLEX_SENT;
        break;
    case TAG_RECEIVE:
        event = received(d);
        break;
    case TAG_STATUS:
        set_status(d);
        break;
    case TAG_START:
    case TAG_HALF_CLOSE:
    case TAG_COUNT:
        break;
    }
    /* Lowered last: while the message is being looked at, the call is not over. */
    if (event.kind != FV_DUPLEX_RECEIVED) {
        (void)atomic_fetch_sub_explicit(&d->n_under_way, 1, memory_order_acq_rel);
    }
    return event;
}

void fv_duplex_receive_next(fv_duplex_t *d)
{
    fv_message_view_clear(&d->view);
    (void)start_receive(d); /* refused only when the call is over: then the status tells */
    (void)atomic_fetch_sub_explicit(&d->n_under_way, 1, memory_order_acq_rel);
}

const fovea_error_t *fv_duplex_status(const fv_duplex_t *d)
{
    return &d->status;
}

void fv_duplex_destroy(fv_duplex_t *d)
{
    if (d == NULL) {
        return;
    }
    fv_message_view_free(&d->view);
    grpc_metadata_array_destroy(&d->initial);
    grpc_metadata_array_destroy(&d->trailing);
    fv_duplex_end(d);
    fv_channel_queue_put(d->channel, d->queue);
    free(d);
}
