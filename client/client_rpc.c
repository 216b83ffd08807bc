/*
 * client_rpc.c - connection and unary calls on gRPC C core.
 */
#include "client/client_rpc_internal.h"
#include "common/clock.h"

#include <grpc/byte_buffer_reader.h>

#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FRAME_BYTES_MAX      16777215 /* fewer, larger HTTP/2 frames */
#define BACKOFF_FIRST_MS     20
#define BACKOFF_MAX_MS       250
#define ATTEMPT_MS           1000 /* gRPC's minimum of the pause is the time of an attempt, too */
#define KEEPALIVE_TIMEOUT_MS 20000
#define ARGS_MAX             12
#define RELEASE_POLL_US      1000

fovea_code_t fv_client_fail(fovea_error_t *error, fovea_code_t code, const char *fmt, ...)
{
    va_list ap;

    if (error != NULL) {
        error->code = code;
        va_start(ap, fmt);
        (void)vsnprintf(error->message, sizeof(error->message), fmt, ap);
        va_end(ap);
    }
    return code;
}

int64_t fv_client_deadline(int64_t timeout_ms)
{
    if ((timeout_ms < 0) || (timeout_ms > (INT64_MAX / 4000))) {
        return FV_RPC_NO_DEADLINE;
    }
    return fv_clock_us() + (timeout_ms * 1000);
}

gpr_timespec fv_rpc_timespec(int64_t deadline_us)
{
    if (deadline_us == FV_RPC_NO_DEADLINE) {
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    }
    /* gRPC's monotonic clock need not be ours: carry over the difference to now. */
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                        gpr_time_from_micros(deadline_us - fv_clock_us(), GPR_TIMESPAN));
}

/* ------------------------------------------------------------------ messages */

typedef struct fv_pin {
    atomic_uint *pins;
} fv_pin_t;

/* Thread: any of gRPC's. After the decrement the counter's memory may be gone. */
static void unpin(void *arg)
{
    atomic_uint *pins = ((fv_pin_t *)arg)->pins;

    free(arg);
    (void)atomic_fetch_sub_explicit(pins, 1, memory_order_release);
}

static bool piece_slice(const fv_out_piece_t *piece, grpc_slice *out)
{
    fv_pin_t *pin = NULL;

    if (piece->pins == NULL) {
        *out = grpc_slice_from_copied_buffer((const char *)piece->data, piece->n_bytes);
        return true;
    }
    pin = malloc(sizeof(*pin));
    if (pin == NULL) {
        return false;
    }
    pin->pins = piece->pins;
    (void)atomic_fetch_add_explicit(piece->pins, 1, memory_order_relaxed);
    /* gRPC's signature is not const-correct; a slice handed to SEND_MESSAGE is only read. */
    union {
        const void *read_only;
        void *plain;
    } data = {.read_only = piece->data};
    *out = grpc_slice_new_with_user_data(data.plain, piece->n_bytes, unpin, pin);
    return true;
}

grpc_byte_buffer *fv_rpc_message(const fv_out_piece_t *pieces, size_t n_pieces)
{
    grpc_byte_buffer *buffer = NULL;
    grpc_slice *slices = malloc((n_pieces + 1) * sizeof(*slices));
    size_t n_slices = 0;

    if (slices == NULL) {
        return NULL;
    }
    while ((n_slices < n_pieces) && piece_slice(&pieces[n_slices], &slices[n_slices])) {
        n_slices++;
    }
    if (n_slices == n_pieces) {
        buffer = grpc_raw_byte_buffer_create(slices, n_slices); /* takes references of its own */
    }
    for (size_t i = 0; i < n_slices; i++) {
        grpc_slice_unref(slices[i]);
    }
    free(slices);
    return buffer;
}

bool fv_message_view_set(fv_message_view_t *view, grpc_byte_buffer *buffer)
{
    grpc_byte_buffer_reader reader;
    grpc_slice *slice = NULL;

    fv_message_view_clear(view);
    view->buffer = buffer;
    if (!grpc_byte_buffer_reader_init(&reader, buffer)) {
        return false;
    }
    while (grpc_byte_buffer_reader_peek(&reader, &slice)) {
        if (view->n_spans == view->spans_cap) {
            size_t cap = (view->spans_cap == 0) ? 64 : (2 * view->spans_cap);
            fv_span_t *spans = realloc(view->spans, cap * sizeof(*spans));
            if (spans == NULL) {
                grpc_byte_buffer_reader_destroy(&reader);
                return false;
            }
            view->spans = spans;
            view->spans_cap = cap;
        }
        view->spans[view->n_spans].data = GRPC_SLICE_START_PTR(*slice);
        view->spans[view->n_spans].n_bytes = GRPC_SLICE_LENGTH(*slice);
        view->n_spans++;
    }
    grpc_byte_buffer_reader_destroy(&reader);
    return true;
}

void fv_message_view_clear(fv_message_view_t *view)
{
    if (view->buffer != NULL) {
        grpc_byte_buffer_destroy(view->buffer);
    }
    view->buffer = NULL;
    view->n_spans = 0;
}

void fv_message_view_free(fv_message_view_t *view)
{
    fv_message_view_clear(view);
    free(view->spans);
    memset(view, 0, sizeof(*view));
}

void fv_rpc_status(grpc_status_code code, grpc_slice details, fovea_error_t *error)
{
    size_t n_bytes = GRPC_SLICE_LENGTH(details);

    if (n_bytes >= sizeof(error->message)) {
        n_bytes = sizeof(error->message) - 1;
    }
    error->code = (((int)code >= 0) && ((int)code <= 16)) ? (fovea_code_t)code : FOVEA_UNKNOWN;
    memcpy(error->message, GRPC_SLICE_START_PTR(details), n_bytes);
    error->message[n_bytes] = '\0';
    grpc_slice_unref(details);
}

/* ------------------------------------------------------------------ connection */

static grpc_arg int_arg(const char *key, int value)
{
    /* gRPC's struct is not const-correct; it copies the key. */
    union {
        const char *read_only;
        char *plain;
    } name = {.read_only = key};

    return (grpc_arg){.type = GRPC_ARG_INTEGER, .key = name.plain, .value.integer = value};
}

static grpc_arg text_arg(const char *key, const char *value)
{
    union {
        const char *read_only;
        char *plain;
    } name = {.read_only = key}, text = {.read_only = value};

    return (grpc_arg){.type = GRPC_ARG_STRING, .key = name.plain, .value.string = text.plain};
}

/* NULL: *error says why. */
static grpc_channel *
channel_create(const char *address, const fv_channel_config_t *config, fovea_error_t *error)
{
    grpc_channel_credentials *credentials = fv_rpc_credentials(config->options, error);
    grpc_arg args[ARGS_MAX];
    size_t n = 0;
    int limit = ((config->message_bytes_max == 0) || (config->message_bytes_max > INT_MAX))
                    ? -1
                    : (int)config->message_bytes_max;

    args[n++] = int_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, limit);
    args[n++] = int_arg(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1);
    args[n++] = int_arg(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, FRAME_BYTES_MAX);
    args[n++] = int_arg(GRPC_ARG_ENABLE_RETRIES, 0); /* retries would hold on to the tensors */
    args[n++] = int_arg(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1); /* a connection of its own */
    args[n++] = int_arg(GRPC_ARG_ENABLE_HTTP_PROXY, 0);         /* never through $http_proxy */
    args[n++] = int_arg(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, BACKOFF_FIRST_MS);
    args[n++] = int_arg(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, ATTEMPT_MS);
    args[n++] = int_arg(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, BACKOFF_MAX_MS);
    if (config->keepalive_ms > 0) {
        args[n++] = int_arg(GRPC_ARG_KEEPALIVE_TIME_MS, config->keepalive_ms);
        args[n++] = int_arg(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, KEEPALIVE_TIMEOUT_MS);
    }

    if ((config->options->server_name != NULL) && (config->options->server_name[0] != '\0')) {
        args[n++] = text_arg(GRPC_SSL_TARGET_NAME_OVERRIDE_ARG, config->options->server_name);
    }
    if (credentials == NULL) {
        return NULL;
    }
    grpc_channel_args all = {.num_args = n, .args = args};
    grpc_channel *channel = grpc_channel_create(address, credentials, &all);
    grpc_channel_credentials_release(credentials);
    return channel;
}

bool fv_channel_wait_ready(fv_channel_t *channel, int64_t deadline_us)
{
    grpc_completion_queue *queue = fv_channel_queue_get(channel);
    gpr_timespec deadline = fv_rpc_timespec(deadline_us);
    grpc_connectivity_state state = grpc_channel_check_connectivity_state(channel->grpc, 1);
    bool in_time = true;

    while ((state != GRPC_CHANNEL_READY) && (state != GRPC_CHANNEL_SHUTDOWN) && in_time) {
        grpc_channel_watch_connectivity_state(channel->grpc, state, deadline, queue, channel);
        grpc_event event =
            grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        in_time = (event.success != 0);
        state = grpc_channel_check_connectivity_state(channel->grpc, 1);
    }
    fv_channel_queue_put(channel, queue);
    return state == GRPC_CHANNEL_READY;
}

fovea_code_t fv_channel_open(const char *address,
                             const fv_channel_config_t *config,
                             int64_t timeout_ms,
                             fv_channel_t **out,
                             fovea_error_t *error)
{
    fv_channel_t *channel = NULL;

    if ((address == NULL) || (address[0] == '\0')) {
        return fv_client_fail(error, FOVEA_INVALID_ARGUMENT,
                              "address: given \"\", expected \"host:port\" or \"unix:/path\"");
    }
    channel = calloc(1, sizeof(*channel));
    if (channel == NULL) {
        return fv_client_fail(error, FOVEA_RESOURCE_EXHAUSTED, "out of host memory");
    }
    grpc_init();
    (void)pthread_mutex_init(&channel->lock, NULL);
    fovea_error_t why = {0};
    channel->grpc = channel_create(address, config, &why);
    if ((channel->grpc == NULL) ||
        (fv_channel_set_token(channel, config->options, &why) != FOVEA_OK)) {
        fv_channel_close(channel);
        return fv_client_fail(error, why.code, "%s", why.message);
    }
    if (!fv_channel_wait_ready(channel, fv_client_deadline(timeout_ms))) {
        fv_channel_close(channel);
        return fv_client_fail(error, FOVEA_UNAVAILABLE,
                              "no Fovea service could be reached at %s within %lld ms", address,
                              (long long)timeout_ms);
    }
    *out = channel;
    return FOVEA_OK;
}

static void queue_destroy(grpc_completion_queue *queue)
{
    grpc_completion_queue_shutdown(queue);
    while (grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type !=
           GRPC_QUEUE_SHUTDOWN) {
    }
    grpc_completion_queue_destroy(queue);
}

void fv_channel_close(fv_channel_t *channel)
{
    if (channel == NULL) {
        return;
    }
    if (channel->grpc != NULL) {
        grpc_channel_destroy(channel->grpc);
    }
    if (channel->has_token) {
        grpc_slice_unref(channel->token.value);
    }
    for (size_t i = 0; i < channel->n_idle; i++) {
        queue_destroy(channel->idle[i]);
    }
    (void)pthread_mutex_destroy(&channel->lock);
    free(channel);
    grpc_shutdown();
}

grpc_completion_queue *fv_channel_queue_get(fv_channel_t *channel)
{
    grpc_completion_queue *queue = NULL;

    (void)pthread_mutex_lock(&channel->lock);
    if (channel->n_idle > 0) {
        queue = channel->idle[--channel->n_idle];
    }
    (void)pthread_mutex_unlock(&channel->lock);
    return (queue != NULL) ? queue : grpc_completion_queue_create_for_next(NULL);
}

void fv_channel_queue_put(fv_channel_t *channel, grpc_completion_queue *queue)
{
    (void)pthread_mutex_lock(&channel->lock);
    if (channel->n_idle < FV_IDLE_QUEUES_MAX) {
        channel->idle[channel->n_idle++] = queue;
        queue = NULL;
    }
    (void)pthread_mutex_unlock(&channel->lock);
    if (queue != NULL) {
        queue_destroy(queue);
    }
}

grpc_call *fv_channel_call(fv_channel_t *channel,
                           const char *method,
                           grpc_completion_queue *queue,
                           int64_t deadline_us)
{
    return grpc_channel_create_call(channel->grpc, NULL, GRPC_PROPAGATE_DEFAULTS, queue,
                                    grpc_slice_from_static_string(method), NULL,
                                    fv_rpc_timespec(deadline_us), NULL);
}

/* ------------------------------------------------------------------ unary */

/* What a unary call receives; all of it belongs to the batch until its completion. */
typedef struct fv_unary {
    grpc_metadata sent;
    size_t n_sent;
    grpc_metadata_array initial, trailing;
    grpc_byte_buffer *reply;
    grpc_status_code code;
    grpc_slice details;
} fv_unary_t;

static void
unary_run(grpc_call *call, grpc_completion_queue *queue, grpc_byte_buffer *message, fv_unary_t *u)
{
    grpc_op ops[6];
    grpc_call_error rc = GRPC_CALL_OK;

    memset(ops, 0, sizeof(ops));
    ops[0].op = GRPC_OP_SEND_INITIAL_METADATA;
    ops[0].data.send_initial_metadata.count = u->n_sent;
    ops[0].data.send_initial_metadata.metadata = &u->sent;
    ops[1].op = GRPC_OP_SEND_MESSAGE;
    ops[1].data.send_message.send_message = message;
    ops[2].op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    ops[3].op = GRPC_OP_RECV_INITIAL_METADATA;
    ops[3].data.recv_initial_metadata.recv_initial_metadata = &u->initial;
    ops[4].op = GRPC_OP_RECV_MESSAGE;
    ops[4].data.recv_message.recv_message = &u->reply;
    ops[5].op = GRPC_OP_RECV_STATUS_ON_CLIENT;
    ops[5].data.recv_status_on_client.trailing_metadata = &u->trailing;
    ops[5].data.recv_status_on_client.status = &u->code;
    ops[5].data.recv_status_on_client.status_details = &u->details;
    rc = grpc_call_start_batch(call, ops, 6, u, NULL);
    FV_ASSERT(rc == GRPC_CALL_OK); /* the batch is well-formed by construction */
    (void)grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
}

/* Polls until gRPC has let go of every piece: normally it already has. */
static void wait_unpinned(grpc_completion_queue *queue, const fv_out_piece_t *pieces, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        while ((pieces[i].pins != NULL) &&
               (atomic_load_explicit(pieces[i].pins, memory_order_acquire) != 0)) {
            (void)grpc_completion_queue_next(
                queue, fv_rpc_timespec(fv_clock_us() + RELEASE_POLL_US), NULL);
        }
    }
}

static fovea_code_t
unary_finish(fv_unary_t *u, fv_reply_fn_t on_reply, void *ctx, fovea_error_t *error)
{
    fv_message_view_t view = {0};
    fovea_code_t code = FOVEA_OK;
    fovea_error_t final;

    fv_rpc_status(u->code, u->details, &final);
    if (final.code != FOVEA_OK) {
        code = fv_client_fail(error, final.code, "%s", final.message);
    } else if (u->reply == NULL) {
        code = fv_client_fail(error, FOVEA_INTERNAL, "the service answered OK without a message");
    } else if (!fv_message_view_set(&view, u->reply)) {
        code = fv_client_fail(error, FOVEA_RESOURCE_EXHAUSTED, "out of host memory");
        u->reply = NULL; /* the view's now */
    } else {
        u->reply = NULL;
        code = on_reply(ctx, view.spans, view.n_spans, error);
    }
    if (u->reply != NULL) {
        grpc_byte_buffer_destroy(u->reply);
    }
    fv_message_view_free(&view);
    return code;
}

fovea_code_t
fv_channel_unary(fv_channel_t *channel, const fv_unary_call_t *unary, fovea_error_t *error)
{
    grpc_byte_buffer *message = fv_rpc_message(unary->pieces, unary->n_pieces);
    grpc_completion_queue *queue = NULL;
    grpc_call *call = NULL;
    fovea_code_t code = FOVEA_OK;
    fv_unary_t u = {.details = grpc_empty_slice()};

    if (message == NULL) {
        return fv_client_fail(error, FOVEA_RESOURCE_EXHAUSTED, "out of host memory");
    }
    grpc_metadata_array_init(&u.initial);
    grpc_metadata_array_init(&u.trailing);
    u.n_sent = fv_channel_metadata(channel, &u.sent);
    queue = fv_channel_queue_get(channel);
    call = fv_channel_call(channel, unary->method, queue, unary->deadline_us);
    unary_run(call, queue, message, &u);
    grpc_byte_buffer_destroy(message);
    code = unary_finish(&u, unary->on_reply, unary->ctx, error);
    grpc_metadata_array_destroy(&u.initial);
    grpc_metadata_array_destroy(&u.trailing);
    grpc_call_unref(call); /* first: a call cut short holds on to what it has not sent */
    wait_unpinned(queue, unary->pieces, unary->n_pieces);
    fv_channel_queue_put(channel, queue);
    return code;
}
