/*
 * rpc_server.c - the gRPC server: settings, addresses, start and stop.
 *
 * Decode path: station 1 of 10. After: rpc_loop.c.
 */
#include "common/clock.h"
#include "common/log.h"
#include "coord/rpc_internal.h"

#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/support/log.h>
#include <grpc/support/time.h>

#include <limits.h>
#include <malloc.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#define MAX_FRAME_BYTES    16777215 /* the largest HTTP/2 allows: fewer frames per tensor */
#define KEEPALIVE_MS       30000    /* a silent client is asked, then dropped */
#define KEEPALIVE_REPLY_MS 20000
#define CLIENT_PING_MS     5000 /* the most often a client may ask us */
#define STREAMS_DEFAULT    1024
#define METADATA_DEFAULT   8192

struct fv_rpc {
    fv_rpc_handlers_t handlers;
    fv_calls_t calls;
    fv_health_t health;
    grpc_server *server;
    grpc_completion_queue *queue;
    grpc_completion_queue *stop_queue; /* only for the notice that the server has shut down */
    fv_loop_t loop;
    fv_tls_t *tls[FV_LISTEN_MAX]; /* of each address; NULL: plain */
    fv_acceptor_t *acceptor;
    int32_t n_listen;
    fv_listen_t listen[FV_LISTEN_MAX];
};

/* ------------------------------------------------------------------ process-wide settings */

/* At most so many lines a second: whoever can connect can make gRPC complain (about handshakes, for one). */
#define GRPC_LINES_A_SECOND 4

static bool may_log(void)
{
    static _Atomic(int64_t) second;
    static atomic_int n_lines;
    int64_t now_s = fv_clock_us() / 1000000;

    if (atomic_exchange(&second, now_s) != now_s) {
        atomic_store(&n_lines, 0);
    }
    return atomic_fetch_add(&n_lines, 1) < GRPC_LINES_A_SECOND;
}

static void log_from_grpc(gpr_log_func_args *args)
{
    if ((args->severity == GPR_LOG_SEVERITY_ERROR) &&
        may_log()) { /* ours are reported as a status; this adds why */
        fv_warn("grpc: %s", args->message);
    } else {
        fv_debug("grpc: %s", args->message);
    }
}

/*
 * Messages of megabytes come and go all the time: without these, malloc maps and unmaps each of them and
 * the page faults cost more than the transfer (a 1 MiB echo takes 2.3 times as long).
 */
static void tune_malloc(void)
{
    static atomic_flag is_done = ATOMIC_FLAG_INIT;

    if (!atomic_flag_test_and_set(&is_done)) {
        /* NOLINTBEGIN(concurrency-mt-unsafe): takes malloc's own lock */
        (void)mallopt(M_MMAP_THRESHOLD, 1 << 30);
        (void)mallopt(M_TRIM_THRESHOLD, INT_MAX);
        (void)mallopt(M_TOP_PAD, 64 << 20);
        /* NOLINTEND(concurrency-mt-unsafe) */
    }
}

/* ------------------------------------------------------------------ server */

/* NOLINTNEXTLINE(readability-non-const-parameter): gRPC keeps it as char * */
static grpc_arg int_arg(char *key, int value)
{
    grpc_arg arg = {.type = GRPC_ARG_INTEGER, .key = key};

    arg.value.integer = value;
    return arg;
}

/* BDP probing stays on (its default): without it the connection window is 64 KiB for good. */
static grpc_server *create_server(const fv_rpc_config_t *config)
{
    static char k_receive[] = GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH;
    static char k_send[] = GRPC_ARG_MAX_SEND_MESSAGE_LENGTH;
    static char k_streams[] = GRPC_ARG_MAX_CONCURRENT_STREAMS;
    static char k_frame[] = GRPC_ARG_HTTP2_MAX_FRAME_SIZE;
    static char k_reuse[] = GRPC_ARG_ALLOW_REUSEPORT;
    static char k_time[] = GRPC_ARG_KEEPALIVE_TIME_MS;
    static char k_timeout[] = GRPC_ARG_KEEPALIVE_TIMEOUT_MS;
    static char k_idle[] = GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS;
    static char k_pings[] = GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA;
    static char k_ping[] = GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS;
    static char k_metadata[] = GRPC_ARG_MAX_METADATA_SIZE;
    static char k_quota[] = GRPC_ARG_RESOURCE_QUOTA;
    int n_streams =
        (config->connection_streams_max > 0) ? config->connection_streams_max : STREAMS_DEFAULT;
    grpc_resource_quota *quota = grpc_resource_quota_create("fovea");
    grpc_arg args[] = {
        int_arg(k_receive, (int)config->message_bytes_max),
        int_arg(k_send, -1),
        int_arg(k_streams, n_streams),
        int_arg(k_frame, MAX_FRAME_BYTES),
        int_arg(k_reuse, 0), /* else two servers share a port and neither knows */
        int_arg(k_time, KEEPALIVE_MS),
        int_arg(k_timeout, KEEPALIVE_REPLY_MS),
        int_arg(k_idle, 1),
        int_arg(k_pings, 0),
        int_arg(k_ping, CLIENT_PING_MS),
        int_arg(k_metadata, (config->metadata_bytes_max > 0) ? (int)config->metadata_bytes_max
                                                             : METADATA_DEFAULT),
        {.type = GRPC_ARG_POINTER, .key = k_quota},
    };
    grpc_channel_args list = {sizeof(args) / sizeof(args[0]), args};

    grpc_resource_quota_resize(quota, config->memory_bytes_max);
    args[list.num_args - 1U].value.pointer.p = quota;
    args[list.num_args - 1U].value.pointer.vtable = grpc_resource_quota_arg_vtable();
    grpc_server *server = grpc_server_create(&list, NULL);
    grpc_resource_quota_unref(quota);
    return server;
}

static bool has_tls(const fv_rpc_config_t *config)
{
    const char *files[] = {config->tls_cert, config->tls_key, config->tls_client_ca};
    bool has = false;

    for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
        has = has || ((files[i] != NULL) && (files[i][0] != '\0'));
    }
    return has;
}

/* Nobody opens a cache to the network by accident. */
static fv_status_t check_exposure(const fv_listen_t *listen, const fv_rpc_config_t *config)
{
    bool has_tokens = (config->auth != NULL) && fv_auth_is_required(config->auth);

    if (fv_listen_is_local(listen)) {
        return FV_OK;
    }
    if (has_tls(config)) {
        bool has_client_ca = (config->tls_client_ca != NULL) && (config->tls_client_ca[0] != '\0');
        if (!has_client_ca && !has_tokens) {
            fv_warn("%s asks nobody who he is: whoever reaches it may read and change everything",
                    listen->address);
        }
        return FV_OK;
    }
    if (!has_tokens && !config->may_be_open) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "listen: %.100s can be reached from other hosts and there is neither TLS "
                       "(tls_cert, tls_key) nor a token file (tokens); --insecure serves anyway",
                       listen->address);
    }
    fv_warn("%s has no TLS: %s", listen->address,
            has_tokens ? "tokens and tensors travel in clear text"
                       : "whoever reaches it may read and change everything");
    return FV_OK;
}

static fv_status_t bind_one(fv_rpc_t *rpc, const fv_rpc_config_t *config, int32_t i)
{
    fv_listen_t *listen = &rpc->listen[i];

    FV_RETURN_IF_ERR(fv_listen_prepare(config->listen[i], listen));
    rpc->n_listen++;
    FV_RETURN_IF_ERR(check_exposure(listen, config));
    if (!has_tls(config) || listen->is_unix) {
        return fv_listen_bind(listen, config->unix_mode);
    }
    FV_RETURN_IF_ERR(fv_tls_create(config, &rpc->tls[i]));
    grpc_server_credentials *credentials = fv_tls_credentials(rpc->tls[i]);
    int port = grpc_server_add_http2_port(rpc->server, listen->address, credentials);
    grpc_server_credentials_release(credentials);
    if (port <= 0) {
        return fv_fail(FV_ERR_UNAVAILABLE,
                       "listen: cannot listen at %.160s (in use, or not an address of this host)",
                       listen->address);
    }
    fv_listen_set_port(listen, port);
    return FV_OK;
}

static fv_status_t bind_all(fv_rpc_t *rpc, const fv_rpc_config_t *config)
{
    for (int32_t i = 0; i < config->n_listen; i++) {
        FV_RETURN_IF_ERR(bind_one(rpc, config, i));
    }
    return FV_OK;
}

static void drain(grpc_completion_queue *queue)
{
    grpc_completion_queue_shutdown(queue);
    while (grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type !=
           GRPC_QUEUE_SHUTDOWN) {
    }
    grpc_completion_queue_destroy(queue);
}

/* The server has not been given a request yet, or all of them are back. */
static void close_server(fv_rpc_t *rpc)
{
    grpc_server_destroy(rpc->server);
    if (rpc->loop.is_running) {
        grpc_completion_queue_shutdown(rpc->queue);
        fv_loop_join(&rpc->loop);
        grpc_completion_queue_destroy(rpc->queue);
    } else {
        drain(rpc->queue);
    }
    grpc_completion_queue_shutdown(rpc->stop_queue);
    grpc_completion_queue_destroy(rpc->stop_queue);
    for (int32_t i = 0; i < rpc->n_listen; i++) {
        fv_listen_release(&rpc->listen[i]);
    }
}

static bool wait_for_shutdown(fv_rpc_t *rpc, gpr_timespec deadline)
{
    return grpc_completion_queue_pluck(rpc->stop_queue, rpc, deadline, NULL).type ==
           GRPC_OP_COMPLETE;
}

static fv_status_t start(fv_rpc_t *rpc, const fv_rpc_config_t *config)
{
    rpc->queue = grpc_completion_queue_create_for_next(NULL);
    rpc->stop_queue = grpc_completion_queue_create_for_pluck(NULL);
    rpc->server = create_server(config);
    grpc_server_register_completion_queue(rpc->server, rpc->queue, NULL);
    fv_status_t status = bind_all(rpc, config);
    if (status == FV_OK) {
        grpc_server_start(rpc->server);
        rpc->calls.server = rpc->server;
        rpc->calls.queue = rpc->queue;
        rpc->calls.n_requests = 1; /* given up by fv_calls_begin(): a stop waits for it */
        status = fv_loop_start(&rpc->loop, &rpc->calls);
        if (status == FV_OK) {
            status =
                fv_acceptor_start(config, rpc->listen, rpc->n_listen, rpc->server, &rpc->acceptor);
            if (status != FV_OK) {
                fv_error_t error = fv_error_capture(status);
                fv_rpc_stop(rpc, 0);
                return fv_fail(status, "%s", error.text);
            }
            return FV_OK;
        }
        rpc->calls.n_requests = 0;
    }
    grpc_server_shutdown_and_notify(rpc->server, rpc->stop_queue, rpc);
    (void)wait_for_shutdown(rpc, gpr_inf_future(GPR_CLOCK_MONOTONIC));
    close_server(rpc);
    return status;
}

static fv_status_t check_config(const fv_rpc_config_t *config)
{
    if ((config->n_listen < 1) || (config->n_listen > FV_LISTEN_MAX)) {
        return fv_fail(FV_ERR_INVALID_ARG, "listen: given %d addresses, expected 1..%d",
                       (int)config->n_listen, FV_LISTEN_MAX);
    }
    if ((config->message_bytes_max < 1024U) || (config->message_bytes_max > (size_t)INT_MAX)) {
        return fv_fail(FV_ERR_INVALID_ARG, "message-bytes-max: given %zu, expected 1024..%d",
                       config->message_bytes_max, INT_MAX);
    }
    if (config->memory_bytes_max < config->message_bytes_max) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "rpc memory: given %zu bytes, expected at least one message of %zu",
                       config->memory_bytes_max, config->message_bytes_max);
    }
    if (config->stream_inflight_max < 1) {
        return fv_fail(FV_ERR_INVALID_ARG, "stream-inflight-max: given %d, expected at least 1",
                       (int)config->stream_inflight_max);
    }
    return FV_OK;
}

fv_status_t
fv_rpc_start(const fv_rpc_config_t *config, const fv_rpc_handlers_t *handlers, fv_rpc_t **out)
{
    sigset_t all;
    sigset_t before;

    FV_RETURN_IF_ERR(check_config(config));
    fv_rpc_t *rpc = calloc(1, sizeof(*rpc));
    if (rpc == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "rpc: out of memory");
    }
    tune_malloc();
    rpc->handlers = *handlers;
    fv_health_init(&rpc->health);
    fv_calls_init(&rpc->calls);
    rpc->calls.handlers = &rpc->handlers;
    rpc->calls.health = &rpc->health;
    rpc->calls.stream_inflight_max = config->stream_inflight_max;
    rpc->calls.calls_max = config->calls_max;
    rpc->calls.health_calls_max = config->health_calls_max;
    rpc->calls.first_message_us = (int64_t)config->first_message_ms * 1000;
    rpc->calls.auth = config->auth;

    /* gRPC's threads and ours inherit a full mask: signals go to whoever waits for them in main. */
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    gpr_set_log_function(log_from_grpc);
    grpc_init();
    fv_status_t status = start(rpc, config);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (status != FV_OK) {
        fv_rpc_destroy(rpc);
        return status;
    }
    *out = rpc;
    return FV_OK;
}

int32_t fv_rpc_n_addresses(const fv_rpc_t *rpc)
{
    return rpc->n_listen;
}

const char *fv_rpc_address(const fv_rpc_t *rpc, int32_t i)
{
    return rpc->listen[i].address;
}

bool fv_rpc_address_has_tls(const fv_rpc_t *rpc, int32_t i)
{
    return rpc->tls[i] != NULL;
}

void fv_rpc_set_serving(fv_rpc_t *rpc, bool is_serving)
{
    fv_health_set_serving(&rpc->health, is_serving);
}

/*
 * The order is what gRPC demands: no batch may start once the queue is shut down, and the notice that
 * the server has shut down does not mean that the last batches of our calls are back.
 */
void fv_rpc_stop(fv_rpc_t *rpc, uint32_t grace_ms)
{
    gpr_timespec deadline =
        gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_millis(grace_ms, GPR_TIMESPAN));

    if (!rpc->loop.is_running) {
        return;
    }
    fv_health_set_serving(&rpc->health, false);
    fv_acceptor_stop(rpc->acceptor);
    rpc->acceptor = NULL;
    for (int32_t i = 0; i < rpc->n_listen; i++) {
        fv_listen_close(&rpc->listen[i]);
    }
    fv_calls_stop(&rpc->calls);
    grpc_server_shutdown_and_notify(rpc->server, rpc->stop_queue, rpc);
    if (!wait_for_shutdown(rpc, deadline)) {
        grpc_server_cancel_all_calls(rpc->server);
        (void)wait_for_shutdown(rpc, gpr_inf_future(GPR_CLOCK_MONOTONIC));
    }
    fv_calls_wait_idle(&rpc->calls);
    close_server(rpc);
}

void fv_rpc_destroy(fv_rpc_t *rpc)
{
    if (rpc == NULL) {
        return;
    }
    fv_rpc_stop(rpc, 0);
    /* Only now: until here replies to calls that are gone may still come in and use gRPC's memory. */
    grpc_shutdown_blocking();
    for (int32_t i = 0; i < rpc->n_listen; i++) {
        fv_tls_destroy(rpc->tls[i]);
    }
    fv_calls_fini(&rpc->calls);
    fv_health_fini(&rpc->health);
    free(rpc);
}
