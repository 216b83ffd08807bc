/*
 * raw_client.c - the blocking client on a pluck queue: each batch has its own tag, waited for by name.
 */
#include "tests/rpc/raw_client.h"

#include "tests/support/test.h"

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct fv_raw_client {
    grpc_channel *channel;
    grpc_completion_queue *queue;
};

struct fv_raw_call {
    fv_raw_client_t *client;
    grpc_call *call;
    grpc_metadata_array head, tail;
    grpc_byte_buffer *outgoing, *incoming;
    grpc_status_code status;
    grpc_slice details;
    bool is_sending, has_status;
    char tag_head, tag_status, tag_send, tag_receive, tag_half_close; /* addresses only */
};

static gpr_timespec in_ms(uint32_t ms)
{
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_millis(ms, GPR_TIMESPAN));
}

fv_raw_client_t *fv_raw_open(const char *target)
{
    static char k_receive[] = GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH;
    static char k_subchannel[] = "grpc.use_local_subchannel_pool";
    grpc_arg args[2] = {{.type = GRPC_ARG_INTEGER, .key = k_receive},
                        {.type = GRPC_ARG_INTEGER, .key = k_subchannel}};
    grpc_channel_args list = {2, args};
    fv_raw_client_t *client = calloc(1, sizeof(*client));

    assert_non_null(client);
    args[0].value.integer = -1;
    args[1].value.integer = 1; /* its own connection, so that vanishing shows */
    grpc_init();
    grpc_channel_credentials *credentials = grpc_insecure_credentials_create();
    client->channel = grpc_channel_create(target, credentials, &list);
    grpc_channel_credentials_release(credentials);
    client->queue = grpc_completion_queue_create_for_pluck(NULL);
    return client;
}

void fv_raw_close(fv_raw_client_t *client)
{
    grpc_channel_destroy(client->channel);
    grpc_completion_queue_shutdown(client->queue);
    grpc_completion_queue_destroy(client->queue);
    grpc_shutdown_blocking();
    free(client);
}

static bool wait_for(fv_raw_call_t *call, char *tag, uint32_t wait_ms, bool *out_ok)
{
    grpc_event event = grpc_completion_queue_pluck(call->client->queue, tag, in_ms(wait_ms), NULL);

    *out_ok = (event.type == GRPC_OP_COMPLETE) && (event.success != 0);
    return event.type == GRPC_OP_COMPLETE;
}

static void begin(fv_raw_call_t *call, const grpc_op *ops, size_t n_ops, char *tag)
{
    assert_int_equal(grpc_call_start_batch(call->call, ops, n_ops, tag, NULL), GRPC_CALL_OK);
}

fv_raw_call_t *fv_raw_start(fv_raw_client_t *client, const char *method, uint32_t timeout_ms)
{
    fv_raw_call_t *call = calloc(1, sizeof(*call));
    grpc_slice host = grpc_slice_from_static_string("localhost");
    grpc_slice path = grpc_slice_from_copied_string(method);
    grpc_op ops[2];

    assert_non_null(call);
    call->client = client;
    call->call = grpc_channel_create_call(
        client->channel, NULL, GRPC_PROPAGATE_DEFAULTS, client->queue, path, &host,
        (timeout_ms == 0U) ? gpr_inf_future(GPR_CLOCK_MONOTONIC) : in_ms(timeout_ms), NULL);
    grpc_slice_unref(path);
    grpc_metadata_array_init(&call->head);
    grpc_metadata_array_init(&call->tail);
    memset(ops, 0, sizeof(ops));
    ops[0].op = GRPC_OP_SEND_INITIAL_METADATA;
    ops[0].flags = GRPC_INITIAL_METADATA_WAIT_FOR_READY;
    ops[1].op = GRPC_OP_RECV_INITIAL_METADATA;
    ops[1].data.recv_initial_metadata.recv_initial_metadata = &call->head;
    begin(call, ops, 2, &call->tag_head);
    memset(ops, 0, sizeof(ops));
    ops[0].op = GRPC_OP_RECV_STATUS_ON_CLIENT;
    ops[0].data.recv_status_on_client.trailing_metadata = &call->tail;
    ops[0].data.recv_status_on_client.status = &call->status;
    ops[0].data.recv_status_on_client.status_details = &call->details;
    begin(call, ops, 1, &call->tag_status);
    return call;
}

void fv_raw_send(fv_raw_call_t *call, const void *data, size_t n_bytes)
{
    grpc_op op = {.op = GRPC_OP_SEND_MESSAGE};
    grpc_slice slice = grpc_slice_from_copied_buffer(data, n_bytes);

    assert_false(call->is_sending);
    call->outgoing = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    op.data.send_message.send_message = call->outgoing;
    begin(call, &op, 1, &call->tag_send);
    call->is_sending = true;
}

bool fv_raw_sent(fv_raw_call_t *call, uint32_t wait_ms)
{
    bool is_ok = false;

    assert_true(call->is_sending);
    if (!wait_for(call, &call->tag_send, wait_ms, &is_ok)) {
        return false;
    }
    call->is_sending = false;
    grpc_byte_buffer_destroy(call->outgoing);
    return is_ok;
}

void fv_raw_half_close(fv_raw_call_t *call)
{
    grpc_op op = {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT};
    bool is_ok = false;

    begin(call, &op, 1, &call->tag_half_close);
    assert_true(wait_for(call, &call->tag_half_close, RAW_WAIT_MS, &is_ok));
}

static uint8_t *flatten(grpc_byte_buffer *message, size_t *out_bytes)
{
    grpc_byte_buffer_reader reader;

    assert_int_equal(grpc_byte_buffer_reader_init(&reader, message), 1);
    grpc_slice slice = grpc_byte_buffer_reader_readall(&reader);
    uint8_t *bytes = malloc(GRPC_SLICE_LENGTH(slice) + 1U);
    assert_non_null(bytes);
    memcpy(bytes, GRPC_SLICE_START_PTR(slice), GRPC_SLICE_LENGTH(slice));
    *out_bytes = GRPC_SLICE_LENGTH(slice);
    grpc_slice_unref(slice);
    grpc_byte_buffer_reader_destroy(&reader);
    return bytes;
}

uint8_t *fv_raw_receive(fv_raw_call_t *call, size_t *out_bytes)
{
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};
    bool is_ok = false;
    uint8_t *bytes = NULL;

    *out_bytes = 0;
    call->incoming = NULL;
    op.data.recv_message.recv_message = &call->incoming;
    begin(call, &op, 1, &call->tag_receive);
    assert_true(wait_for(call, &call->tag_receive, RAW_WAIT_MS, &is_ok));
    if (call->incoming != NULL) {
        bytes = flatten(call->incoming, out_bytes);
        grpc_byte_buffer_destroy(call->incoming);
    }
    return bytes;
}

void fv_raw_cancel(fv_raw_call_t *call)
{
    (void)grpc_call_cancel(call->call, NULL);
}

int fv_raw_status(fv_raw_call_t *call, char *out_text)
{
    bool is_ok = false;

    assert_true(wait_for(call, &call->tag_status, RAW_WAIT_MS, &is_ok));
    call->has_status = true;
    if (out_text != NULL) {
        (void)snprintf(out_text, 256, "%.*s", (int)GRPC_SLICE_LENGTH(call->details),
                       (const char *)GRPC_SLICE_START_PTR(call->details));
    }
    return (int)call->status;
}

void fv_raw_free(fv_raw_call_t *call)
{
    bool is_ok = false;

    if (!call->has_status) {
        fv_raw_cancel(call);
        (void)fv_raw_status(call, NULL);
    }
    assert_true(wait_for(call, &call->tag_head, RAW_WAIT_MS, &is_ok));
    if (call->is_sending) {
        (void)fv_raw_sent(call, RAW_WAIT_MS);
    }
    grpc_slice_unref(call->details);
    grpc_metadata_array_destroy(&call->head);
    grpc_metadata_array_destroy(&call->tail);
    grpc_call_unref(call->call);
    free(call);
}

int fv_raw_unary(fv_raw_client_t *client,
                 const char *method,
                 const void *data,
                 size_t n_bytes,
                 uint8_t **out_reply,
                 size_t *out_bytes)
{
    fv_raw_call_t *call = fv_raw_start(client, method, 0);
    size_t n_reply = 0;

    fv_raw_send(call, data, n_bytes);
    fv_raw_half_close(call);
    uint8_t *reply = fv_raw_receive(call, &n_reply);
    int status = fv_raw_status(call, NULL);
    fv_raw_free(call);
    if (out_reply != NULL) {
        *out_reply = reply;
        *out_bytes = n_reply;
    } else {
        free(reply);
    }
    return status;
}
