/*
 * load_channel.c - the load generator's connection: one channel, one queue, the stream, unary calls.
 */
#include "bench/echo/echo.h"
#include "bench/echo/load_internal.h"

#include <grpc/grpc_security.h>
#include <grpc/support/time.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WAIT_SECONDS 60

void fv_load_fail(fv_load_t *load, const char *why)
{
    if (!load->has_failed) {
        (void)fprintf(stderr, "load: %s\n", why);
    }
    load->has_failed = true;
}

grpc_event fv_load_next(fv_load_t *load)
{
    return grpc_completion_queue_next(
        load->queue,
        gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                     gpr_time_from_seconds(WAIT_SECONDS, GPR_TIMESPAN)),
        NULL);
}

void fv_load_start(fv_load_t *load, grpc_call *call, const grpc_op *ops, size_t n_ops, void *tag)
{
    if (grpc_call_start_batch(call, ops, n_ops, tag, NULL) != GRPC_CALL_OK) {
        fv_load_fail(load, "a batch was refused");
    }
}

void fv_load_stream_read(fv_load_t *load)
{
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};

    op.data.recv_message.recv_message = &load->stream.received;
    load->is_reading = true;
    fv_load_start(load, load->stream.call, &op, 1, &load->tag_read);
}

void fv_load_once_start(fv_load_t *load,
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
    fv_load_start(load, slot->call, ops, 6, tag);
}

void fv_load_once_finish(fv_slot_t *slot)
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
    fv_load_start(load, s->call, ops, 2, &load->tag_head);
    memset(ops, 0, sizeof(ops));
    ops[0].op = GRPC_OP_RECV_STATUS_ON_CLIENT;
    ops[0].data.recv_status_on_client.trailing_metadata = &s->tail;
    ops[0].data.recv_status_on_client.status = &s->status;
    ops[0].data.recv_status_on_client.status_details = &s->details;
    fv_load_start(load, s->call, ops, 1, &load->tag_status);
    fv_load_stream_read(load);
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
    fv_load_once_start(load, &slot, method, grpc_raw_byte_buffer_create(&slice, 1),
                       &load->tag_call);
    grpc_slice_unref(slice);
    for (grpc_event event = fv_load_next(load); event.tag != &load->tag_call;
         event = fv_load_next(load)) {
        if (event.type != GRPC_OP_COMPLETE) {
            (void)fprintf(stderr, "load: no answer to %s for a minute\n", method);
            abort(); /* the slot is on this stack: nothing can be unwound */
        }
        fv_load_on_event(load, event.tag);
    }
    int status = (int)slot.status;
    if (status != 0) {
        (void)fprintf(stderr, "load: %s: status %d: %.*s\n", method, status,
                      (int)GRPC_SLICE_LENGTH(slot.details),
                      (const char *)GRPC_SLICE_START_PTR(slot.details));
    } else if (slot.received != NULL) {
        copy_out(slot.received, out);
    }
    fv_load_once_finish(&slot);
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
    while (fv_load_next(load).type == GRPC_OP_COMPLETE) {
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
