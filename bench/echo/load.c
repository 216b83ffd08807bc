/*
 * load.c - the load generator: one channel, one queue, one thread.
 */
#include "bench/echo/load.h"

#include "bench/echo/echo.h"

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/time.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define WAIT_SECONDS 60

/* One request in flight; for unary calls also its call. */
typedef struct fv_slot {
    double begin_us;
    grpc_call *call;
    grpc_byte_buffer *sent, *received;
    grpc_metadata_array head, tail;
    grpc_status_code status;
    grpc_slice details;
} fv_slot_t;

struct fv_load {
    fv_workload_t workload;
    grpc_channel *channel;
    grpc_completion_queue *queue;
    bool is_stream;
    uint32_t n_slots;
    fv_slot_t slots[LOAD_SLOTS_MAX];
    fv_slot_t stream; /* the stream's own call */
    bool is_sending, is_reading, has_failed;
    uint32_t turns[LOAD_SLOTS_MAX]; /* slots whose request waits to be sent: a ring */
    uint32_t n_turns, first_turn;
    uint32_t n_outstanding;
    double end_us;
    double *latencies;
    size_t n_latencies, cap;
    char tag_send, tag_read, tag_status, tag_head, tag_call; /* addresses only */
};

static double now_us(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return ((double)t.tv_sec * 1e6) + ((double)t.tv_nsec * 1e-3);
}

static void fail(fv_load_t *load, const char *why)
{
    if (!load->has_failed) {
        (void)fprintf(stderr, "load: %s\n", why);
    }
    load->has_failed = true;
}

static grpc_event next_event(fv_load_t *load)
{
    return grpc_completion_queue_next(
        load->queue,
        gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                     gpr_time_from_seconds(WAIT_SECONDS, GPR_TIMESPAN)),
        NULL);
}

static void
start_batch(fv_load_t *load, grpc_call *call, const grpc_op *ops, size_t n_ops, void *tag)
{
    if (grpc_call_start_batch(call, ops, n_ops, tag, NULL) != GRPC_CALL_OK) {
        fail(load, "a batch was refused");
    }
}

static grpc_byte_buffer *build(fv_load_t *load, uint32_t slot)
{
    fv_load_request_t request = {.n_pieces = 0};
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(NULL, 0);

    load->workload.build(load->workload.ctx, slot, &request);
    for (size_t i = 0; i < request.n_pieces; i++) {
        const fv_span_t *piece = &request.pieces[i];
        grpc_slice_buffer_add(
            &message->data.raw.slice_buffer,
            request.is_copied[i]
                ? grpc_slice_from_copied_buffer((const char *)piece->data, piece->n_bytes)
                : grpc_slice_from_static_buffer(piece->data, piece->n_bytes));
    }
    return message;
}

static void record(fv_load_t *load, double us)
{
    if (load->n_latencies == load->cap) {
        size_t cap = (load->cap == 0U) ? 65536U : (load->cap * 2U);
        double *grown = realloc(load->latencies, cap * sizeof(*grown));
        if (grown == NULL) {
            fail(load, "out of memory");
            return;
        }
        load->latencies = grown;
        load->cap = cap;
    }
    load->latencies[load->n_latencies++] = us;
}

/* Reads the reply; the slot it answers, or load->n_slots. */
static uint32_t check(fv_load_t *load, grpc_byte_buffer *reply)
{
    static fv_span_t spans[LOAD_SPANS_MAX];
    grpc_byte_buffer_reader reader;
    grpc_slice *slice = NULL;
    size_t n = 0;
    uint32_t slot = 0;

    (void)grpc_byte_buffer_reader_init(&reader, reply);
    while ((n < LOAD_SPANS_MAX) && (grpc_byte_buffer_reader_peek(&reader, &slice) != 0)) {
        spans[n].data = GRPC_SLICE_START_PTR(*slice);
        spans[n++].n_bytes = GRPC_SLICE_LENGTH(*slice);
    }
    grpc_byte_buffer_reader_destroy(&reader);
    if (!load->workload.check(load->workload.ctx, spans, n, &slot) || (slot >= load->n_slots)) {
        fail(load, "a reply is wrong");
        return load->n_slots;
    }
    return slot;
}

/* ------------------------------------------------------------------ stream */

static void stream_send(fv_load_t *load)
{
    grpc_op op = {.op = GRPC_OP_SEND_MESSAGE};

    if (load->is_sending || (load->n_turns == 0U) || load->has_failed) {
        return;
    }
    uint32_t slot = load->turns[load->first_turn];
    load->first_turn = (load->first_turn + 1U) % LOAD_SLOTS_MAX;
    load->n_turns--;
    load->is_sending = true;
    load->stream.sent = build(load, slot);
    op.data.send_message.send_message = load->stream.sent;
    op.flags = (load->n_turns > 0U) ? GRPC_WRITE_BUFFER_HINT : 0U;
    start_batch(load, load->stream.call, &op, 1, &load->tag_send);
}

static void stream_read(fv_load_t *load)
{
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};

    op.data.recv_message.recv_message = &load->stream.received;
    load->is_reading = true;
    start_batch(load, load->stream.call, &op, 1, &load->tag_read);
}

/* ------------------------------------------------------------------ unary */

static void once_start(fv_load_t *load,
                       fv_slot_t *slot,
                       const char *method,
                       grpc_byte_buffer *message,
                       void *tag)
{
    grpc_op ops[6];
    grpc_slice host = grpc_slice_from_static_string("localhost");

    memset(ops, 0, sizeof(ops));
    slot->sent = message;
    slot->received = NULL;
    slot->details = grpc_empty_slice();
    slot->call = grpc_channel_create_call(load->channel, NULL, GRPC_PROPAGATE_DEFAULTS, load->queue,
                                          grpc_slice_from_static_string(method), &host,
                                          gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    grpc_metadata_array_init(&slot->head);
    grpc_metadata_array_init(&slot->tail);
    ops[0].op = GRPC_OP_SEND_INITIAL_METADATA;
    ops[0].flags = GRPC_INITIAL_METADATA_WAIT_FOR_READY;
    ops[1].op = GRPC_OP_SEND_MESSAGE;
    ops[1].data.send_message.send_message = message;
    ops[2].op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    ops[3].op = GRPC_OP_RECV_INITIAL_METADATA;
    ops[3].data.recv_initial_metadata.recv_initial_metadata = &slot->head;
    ops[4].op = GRPC_OP_RECV_MESSAGE;
    ops[4].data.recv_message.recv_message = &slot->received;
    ops[5].op = GRPC_OP_RECV_STATUS_ON_CLIENT;
    ops[5].data.recv_status_on_client.trailing_metadata = &slot->tail;
    ops[5].data.recv_status_on_client.status = &slot->status;
    ops[5].data.recv_status_on_client.status_details = &slot->details;
    start_batch(load, slot->call, ops, 6, tag);
}

static void once_finish(fv_slot_t *slot)
{
    grpc_byte_buffer_destroy(slot->sent);
    if (slot->received != NULL) {
        grpc_byte_buffer_destroy(slot->received);
    }
    grpc_slice_unref(slot->details);
    grpc_metadata_array_destroy(&slot->head);
    grpc_metadata_array_destroy(&slot->tail);
    grpc_call_unref(slot->call);
    slot->call = NULL;
}

/* ------------------------------------------------------------------ turns */

static void begin_turn(fv_load_t *load, uint32_t slot)
{
    load->n_outstanding++;
    load->slots[slot].begin_us = now_us();
    if (!load->is_stream) {
        once_start(load, &load->slots[slot], load->workload.once_method, build(load, slot),
                   &load->slots[slot]);
        return;
    }
    load->turns[(load->first_turn + load->n_turns) % LOAD_SLOTS_MAX] = slot;
    load->n_turns++;
    stream_send(load);
}

static void end_turn(fv_load_t *load, uint32_t slot)
{
    double end_us = now_us();

    load->n_outstanding--;
    if (slot < load->n_slots) {
        record(load, end_us - load->slots[slot].begin_us);
        if ((end_us < load->end_us) && !load->has_failed) {
            begin_turn(load, slot);
        }
    }
}

static void on_reply(fv_load_t *load)
{
    grpc_byte_buffer *reply = load->stream.received;

    load->is_reading = false;
    if (reply == NULL) {
        fail(load, "the stream ended");
        return;
    }
    uint32_t slot = check(load, reply);
    grpc_byte_buffer_destroy(reply);
    stream_read(load);
    end_turn(load, slot);
}

static void on_once(fv_load_t *load, fv_slot_t *slot)
{
    uint32_t answered = load->n_slots;

    if ((slot->status != GRPC_STATUS_OK) || (slot->received == NULL)) {
        (void)fprintf(stderr, "load: status %d: %.*s\n", (int)slot->status,
                      (int)GRPC_SLICE_LENGTH(slot->details),
                      (const char *)GRPC_SLICE_START_PTR(slot->details));
        fail(load, "a call failed");
    } else {
        answered = check(load, slot->received);
    }
    once_finish(slot);
    end_turn(load, answered);
}

static void on_event(fv_load_t *load, void *tag)
{
    if (tag == &load->tag_send) {
        load->is_sending = false;
        grpc_byte_buffer_destroy(load->stream.sent);
        stream_send(load);
    } else if (tag == &load->tag_read) {
        on_reply(load);
    } else if (tag == &load->tag_status) {
        (void)fprintf(stderr, "load: the stream ended with status %d: %.*s\n",
                      (int)load->stream.status, (int)GRPC_SLICE_LENGTH(load->stream.details),
                      (const char *)GRPC_SLICE_START_PTR(load->stream.details));
        fail(load, "the stream ended");
    } else if (tag != &load->tag_head) {
        on_once(load, tag);
    }
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a;
    double y = *(const double *)b;

    return (x > y) - (x < y);
}

static void summarise(fv_load_t *load, double seconds, fv_load_result_t *out)
{
    double sum = 0;
    size_t n = load->n_latencies;

    qsort(load->latencies, n, sizeof(double), compare);
    for (size_t i = 0; i < n; i++) {
        sum += load->latencies[i];
    }
    out->n_replies = n;
    out->seconds = seconds;
    out->p50_us = load->latencies[n / 2U];
    out->p99_us = load->latencies[(n * 99U) / 100U];
    out->mean_us = sum / (double)n;
    out->per_second = (double)n / seconds;
}

bool fv_load_run(fv_load_t *load, double seconds, fv_load_result_t *out)
{
    double begin_us = now_us();

    load->n_latencies = 0;
    load->end_us = begin_us + (seconds * 1e6);
    for (uint32_t slot = 0; slot < load->n_slots; slot++) {
        begin_turn(load, slot);
    }
    while ((load->n_outstanding > 0U) && !load->has_failed) {
        grpc_event event = next_event(load);
        if (event.type == GRPC_OP_COMPLETE) {
            on_event(load, event.tag);
        } else {
            fail(load, "no event for a minute");
        }
    }
    if (load->has_failed || (load->n_latencies == 0U)) {
        return false;
    }
    summarise(load, (now_us() - begin_us) * 1e-6, out);
    return true;
}

/* ------------------------------------------------------------------ life */

static void open_stream(fv_load_t *load)
{
    grpc_op ops[2];
    grpc_slice host = grpc_slice_from_static_string("localhost");
    fv_slot_t *s = &load->stream;

    memset(ops, 0, sizeof(ops));
    s->call = grpc_channel_create_call(load->channel, NULL, GRPC_PROPAGATE_DEFAULTS, load->queue,
                                       grpc_slice_from_static_string(load->workload.stream_method),
                                       &host, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    grpc_metadata_array_init(&s->head);
    grpc_metadata_array_init(&s->tail);
    s->details = grpc_empty_slice();
    ops[0].op = GRPC_OP_SEND_INITIAL_METADATA;
    ops[0].flags = GRPC_INITIAL_METADATA_WAIT_FOR_READY;
    ops[1].op = GRPC_OP_RECV_INITIAL_METADATA;
    ops[1].data.recv_initial_metadata.recv_initial_metadata = &s->head;
    start_batch(load, s->call, ops, 2, &load->tag_head);
    memset(ops, 0, sizeof(ops));
    ops[0].op = GRPC_OP_RECV_STATUS_ON_CLIENT;
    ops[0].data.recv_status_on_client.trailing_metadata = &s->tail;
    ops[0].data.recv_status_on_client.status = &s->status;
    ops[0].data.recv_status_on_client.status_details = &s->details;
    start_batch(load, s->call, ops, 1, &load->tag_status);
    stream_read(load);
}

fv_load_t *fv_load_open(const char *address,
                        const fv_workload_t *workload,
                        bool is_stream,
                        uint32_t n_in_flight)
{
    static char k_receive[] = GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH;
    static char k_frame[] = GRPC_ARG_HTTP2_MAX_FRAME_SIZE;
    static char k_retries[] = GRPC_ARG_ENABLE_RETRIES;
    static char k_local[] = "grpc.use_local_subchannel_pool";
    grpc_arg args[4] = {{.type = GRPC_ARG_INTEGER, .key = k_receive},
                        {.type = GRPC_ARG_INTEGER, .key = k_frame},
                        {.type = GRPC_ARG_INTEGER, .key = k_retries},
                        {.type = GRPC_ARG_INTEGER, .key = k_local}};
    grpc_channel_args list = {4, args};
    fv_load_t *load = calloc(1, sizeof(*load));

    if ((load == NULL) || (n_in_flight > LOAD_SLOTS_MAX)) {
        free(load);
        return NULL;
    }
    args[0].value.integer = -1;
    args[1].value.integer = ECHO_FRAME_BYTES;
    args[2].value.integer = 0; /* with retries on, sent buffers stay pinned */
    args[3].value.integer = 1; /* its own connection */
    load->workload = *workload;
    load->is_stream = is_stream;
    load->n_slots = n_in_flight;
    grpc_init();
    load->queue = grpc_completion_queue_create_for_next(NULL);
    grpc_channel_credentials *credentials = grpc_insecure_credentials_create();
    load->channel = grpc_channel_create(address, credentials, &list);
    grpc_channel_credentials_release(credentials);
    if (is_stream) {
        open_stream(load);
    }
    return load;
}

static void copy_out(grpc_byte_buffer *message, fv_bytes_t *out)
{
    grpc_byte_buffer_reader reader;

    (void)grpc_byte_buffer_reader_init(&reader, message);
    grpc_slice all = grpc_byte_buffer_reader_readall(&reader);
    out->n_bytes = GRPC_SLICE_LENGTH(all);
    out->data = malloc(out->n_bytes + 1U);
    if (out->data != NULL) {
        memcpy(out->data, GRPC_SLICE_START_PTR(all), out->n_bytes);
    }
    grpc_slice_unref(all);
    grpc_byte_buffer_reader_destroy(&reader);
}

int fv_load_call(fv_load_t *load, const char *method, fv_span_t request, fv_bytes_t *out)
{
    fv_slot_t slot;
    grpc_slice slice = grpc_slice_from_copied_buffer((const char *)request.data, request.n_bytes);

    memset(&slot, 0, sizeof(slot));
    once_start(load, &slot, method, grpc_raw_byte_buffer_create(&slice, 1), &load->tag_call);
    grpc_slice_unref(slice);
    for (grpc_event event = next_event(load); event.tag != &load->tag_call;
         event = next_event(load)) {
        if (event.type != GRPC_OP_COMPLETE) {
            (void)fprintf(stderr, "load: no answer to %s for a minute\n", method);
            abort(); /* the slot is on this stack: nothing can be unwound */
        }
        on_event(load, event.tag);
    }
    int status = (int)slot.status;
    if (status != 0) {
        (void)fprintf(stderr, "load: %s: status %d: %.*s\n", method, status,
                      (int)GRPC_SLICE_LENGTH(slot.details),
                      (const char *)GRPC_SLICE_START_PTR(slot.details));
    } else if (slot.received != NULL) {
        copy_out(slot.received, out);
    }
    once_finish(&slot);
    return status;
}

void fv_load_close(fv_load_t *load)
{
    if (load == NULL) {
        return;
    }
    if (load->is_stream) {
        (void)grpc_call_cancel(load->stream.call, NULL);
    }
    for (uint32_t i = 0; i < load->n_slots; i++) {
        if (load->slots[i].call != NULL) {
            (void)grpc_call_cancel(load->slots[i].call, NULL);
        }
    }
    load->has_failed = true; /* nothing more is started or reported */
    grpc_completion_queue_shutdown(load->queue);
    while (next_event(load).type == GRPC_OP_COMPLETE) {
    }
    if (load->is_stream) {
        grpc_slice_unref(load->stream.details);
        grpc_metadata_array_destroy(&load->stream.head);
        grpc_metadata_array_destroy(&load->stream.tail);
        grpc_call_unref(load->stream.call);
    }
    grpc_channel_destroy(load->channel);
    grpc_completion_queue_destroy(load->queue);
    grpc_shutdown();
    free(load->latencies);
    free(load);
}
