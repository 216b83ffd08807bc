/*
 * echo_server.c - the bare echo on gRPC's C core: the floor that the service is measured against.
 */
#include "bench/echo/echo.h"

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/time.h>

#include <limits.h>
#include <malloc.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REQUESTS_POSTED 128

typedef enum fv_event_kind {
    FV_EVENT_REQUEST,
    FV_EVENT_READ,
    FV_EVENT_SENT,
    FV_EVENT_CLOSED
} fv_event_kind_t;

typedef struct fv_bare_call fv_bare_call_t;

typedef struct fv_event {
    fv_bare_call_t *owner;
    fv_event_kind_t kind;
} fv_event_t;

typedef struct fv_queued {
    struct fv_queued *next;
    grpc_byte_buffer *message;
} fv_queued_t;

/* Touched by the one thread only. Freed when closed and nothing is outstanding. */
struct fv_bare_call {
    fv_event_t request, read, sent, closed;
    grpc_call *call;
    grpc_call_details details;
    grpc_metadata_array metadata;
    grpc_byte_buffer *received;
    fv_queued_t *first, *last, *sending;
    int cancelled, n_outstanding;
    bool is_unary, has_sent_head, is_ending, has_sent_status, is_closed;
};

static grpc_server *g_server;
static grpc_completion_queue *g_queue;
static uint8_t *g_zeros;

void fv_echo_tune_malloc(void)
{
    /* NOLINTBEGIN(concurrency-mt-unsafe): takes malloc's own lock */
    (void)mallopt(M_MMAP_THRESHOLD, 1 << 30);
    (void)mallopt(M_TRIM_THRESHOLD, INT_MAX);
    (void)mallopt(M_TOP_PAD, 64 << 20);
    /* NOLINTEND(concurrency-mt-unsafe) */
}

static void start_batch(fv_bare_call_t *c, const grpc_op *ops, size_t n_ops, fv_event_t *event)
{
    if (grpc_call_start_batch(c->call, ops, n_ops, event, NULL) != GRPC_CALL_OK) {
        (void)fprintf(stderr, "bench_echo: a batch was refused\n");
        abort();
    }
    c->n_outstanding++;
}

static void post_request(void)
{
    fv_bare_call_t *c = calloc(1, sizeof(*c));

    if (c == NULL) {
        abort();
    }
    c->request = (fv_event_t){c, FV_EVENT_REQUEST};
    c->read = (fv_event_t){c, FV_EVENT_READ};
    c->sent = (fv_event_t){c, FV_EVENT_SENT};
    c->closed = (fv_event_t){c, FV_EVENT_CLOSED};
    grpc_call_details_init(&c->details);
    grpc_metadata_array_init(&c->metadata);
    (void)grpc_server_request_call(g_server, &c->call, &c->details, &c->metadata, g_queue, g_queue,
                                   &c->request);
}

static void read_next(fv_bare_call_t *c)
{
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};

    op.data.recv_message.recv_message = &c->received;
    start_batch(c, &op, 1, &c->read);
}

static void send_next(fv_bare_call_t *c)
{
    grpc_op ops[3];
    size_t n = 0;

    if ((c->sending != NULL) || c->has_sent_status || ((c->first == NULL) && !c->is_ending)) {
        return;
    }
    memset(ops, 0, sizeof(ops));
    if (!c->has_sent_head) {
        c->has_sent_head = true;
        ops[n++].op = GRPC_OP_SEND_INITIAL_METADATA;
    }
    if (c->first != NULL) {
        c->sending = c->first;
        c->first = c->first->next;
        ops[n].op = GRPC_OP_SEND_MESSAGE;
        ops[n].flags = (c->first != NULL) ? GRPC_WRITE_BUFFER_HINT : 0U;
        ops[n++].data.send_message.send_message = c->sending->message;
    }
    if (c->is_ending && (c->first == NULL)) {
        c->has_sent_status = true;
        ops[n].op = GRPC_OP_SEND_STATUS_FROM_SERVER;
        ops[n++].data.send_status_from_server.status = GRPC_STATUS_OK;
    }
    start_batch(c, ops, n, &c->sent);
}

/* The reply shares the request's slices: nothing is copied. */
static grpc_byte_buffer *reply_to(grpc_byte_buffer *request)
{
    grpc_slice_buffer *in = &request->data.raw.slice_buffer;
    grpc_byte_buffer *reply = grpc_raw_byte_buffer_create(NULL, 0);
    grpc_slice_buffer *out = &reply->data.raw.slice_buffer;
    uint8_t head[ECHO_HEAD_BYTES] = {0};
    uint64_t left = 0;
    size_t n_head = 0;

    for (size_t i = 0; (i < in->count) && (n_head < sizeof(head));
         i++) { /* it may straddle slices */
        size_t n = GRPC_SLICE_LENGTH(in->slices[i]);
        n = (n < sizeof(head) - n_head) ? n : (sizeof(head) - n_head);
        memcpy(head + n_head, GRPC_SLICE_START_PTR(in->slices[i]), n);
        n_head += n;
    }
    memcpy(&left, head, sizeof(left));
    left = (left < ECHO_REPLY_MAX) ? left : ECHO_REPLY_MAX;
    for (size_t i = 0; (i < in->count) && (left > 0U); i++) {
        size_t n = GRPC_SLICE_LENGTH(in->slices[i]);
        n = (n < left) ? n : (size_t)left;
        grpc_slice_buffer_add(out, grpc_slice_sub(in->slices[i], 0, n));
        left -= n;
    }
    if (left > 0U) {
        grpc_slice_buffer_add(out, grpc_slice_from_static_buffer(g_zeros, (size_t)left));
    }
    return reply;
}

static void on_read(fv_bare_call_t *c)
{
    if (c->received == NULL) {
        c->is_ending = true;
    } else {
        fv_queued_t *reply = malloc(sizeof(*reply));
        if (reply == NULL) {
            abort();
        }
        *reply = (fv_queued_t){NULL, reply_to(c->received)};
        grpc_byte_buffer_destroy(c->received);
        c->received = NULL;
        if (c->first == NULL) {
            c->first = reply;
        } else {
            c->last->next = reply;
        }
        c->last = reply;
        c->is_ending = c->is_unary;
        if (!c->is_unary && !c->is_closed) {
            read_next(c);
        }
    }
    if (!c->is_closed) {
        send_next(c);
    }
}

static void drop(fv_queued_t *list)
{
    while (list != NULL) {
        fv_queued_t *next = list->next;
        grpc_byte_buffer_destroy(list->message);
        free(list);
        list = next;
    }
}

static void on_request(fv_bare_call_t *c)
{
    grpc_op op = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};

    post_request();
    op.data.recv_close_on_server.cancelled = &c->cancelled;
    start_batch(c, &op, 1, &c->closed);
    c->is_unary = grpc_slice_str_cmp(c->details.method, ECHO_ONCE) == 0;
    read_next(c);
}

static void on_event(fv_event_t *event)
{
    fv_bare_call_t *c = event->owner;

    if (event->kind == FV_EVENT_REQUEST) {
        on_request(c);
        return;
    }
    c->n_outstanding--;
    if (event->kind == FV_EVENT_READ) {
        on_read(c);
    } else if (event->kind == FV_EVENT_SENT) {
        if (c->sending != NULL) {
            c->sending->next = NULL;
            drop(c->sending);
            c->sending = NULL;
        }
        if (!c->is_closed) {
            send_next(c);
        }
    } else {
        c->is_closed = true;
    }
    if (c->is_closed && (c->n_outstanding == 0)) {
        drop(c->first);
        grpc_call_details_destroy(&c->details);
        grpc_metadata_array_destroy(&c->metadata);
        grpc_call_unref(c->call);
        free(c);
    }
}

int fv_echo_serve(const char *address)
{
    static char k_receive[] = GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH;
    static char k_frame[] = GRPC_ARG_HTTP2_MAX_FRAME_SIZE;
    grpc_arg args[2] = {{.type = GRPC_ARG_INTEGER, .key = k_receive},
                        {.type = GRPC_ARG_INTEGER, .key = k_frame}};
    grpc_channel_args list = {2, args};

    args[0].value.integer = -1;
    args[1].value.integer = ECHO_FRAME_BYTES;
    fv_echo_tune_malloc();
    g_zeros = calloc(1, ECHO_REPLY_MAX);
    grpc_init();
    g_queue = grpc_completion_queue_create_for_next(NULL);
    g_server = grpc_server_create(&list, NULL);
    grpc_server_register_completion_queue(g_server, g_queue, NULL);
    grpc_server_credentials *credentials = grpc_insecure_server_credentials_create();
    int port = grpc_server_add_http2_port(g_server, address, credentials);
    grpc_server_credentials_release(credentials);
    if ((port <= 0) || (g_zeros == NULL)) {
        (void)fprintf(stderr, "bench_echo: cannot listen at %s\n", address);
        return 1;
    }
    grpc_server_start(g_server);
    for (int i = 0; i < REQUESTS_POSTED; i++) {
        post_request();
    }
    if (strncmp(address, "unix:", 5) == 0) {
        (void)printf("%s\n", address);
    } else {
        (void)printf("%.*s:%d\n", (int)(strrchr(address, ':') - address), address, port);
    }
    (void)fflush(stdout);
    for (;;) {
        grpc_event event =
            grpc_completion_queue_next(g_queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        if (event.type == GRPC_OP_COMPLETE) {
            on_event(event.tag);
        }
    }
}
