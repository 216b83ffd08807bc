/*
 * client.c - connection, errors, identifiers, and the shape of a small unary call.
 */
#include "client/client_internal.h"

#include <stdio.h>
#include <stdlib.h>

#define CONNECT_TIMEOUT_MS 5000
#define CALL_TIMEOUT_MS    30000
#define KEEPALIVE_MS       30000
#define RETRY_MS           10000

static const char *const k_code_names[] = {
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
};

const char *fovea_code_name(fovea_code_t code)
{
    size_t n_names = sizeof(k_code_names) / sizeof(k_code_names[0]);

    return ((size_t)code < n_names) ? k_code_names[(size_t)code] : "UNKNOWN";
}

const char *fovea_version(void)
{
    return FV_CLIENT_VERSION;
}

size_t fovea_dtype_bytes(fovea_dtype_t dtype)
{
    return fv_dtype_is_valid((int)dtype) ? fv_dtype_bytes((fv_dtype_t)dtype) : 0;
}

void fovea_session_id_format(const fovea_session_id_t *id, char out[FOVEA_SESSION_TEXT_BYTES])
{
    fv_session_id_t session = fv_client_session(id);

    fv_session_id_format(&session, out);
}

bool fovea_session_id_parse(const char *text, fovea_session_id_t *out)
{
    fv_session_id_t session;

    if ((text == NULL) || !fv_session_id_parse(text, strlen(text), &session)) {
        return false;
    }
    *out = fv_client_session_out(&session);
    return true;
}

fovea_code_t fovea_connect(const char *address,
                           const fovea_options_t *options,
                           fovea_client_t **out,
                           fovea_error_t *error)
{
    fovea_options_t o = {0};
    fv_channel_config_t config = {0};
    fovea_client_t *client = NULL;
    fovea_code_t code = FOVEA_OK;

    if (out == NULL) {
        return fv_client_null(error, "out");
    }
    if (options != NULL) {
        o = *options;
    }
    config.options = &o;
    config.message_bytes_max = o.message_bytes_max;
    config.keepalive_ms = (o.keepalive_ms == 0) ? KEEPALIVE_MS : o.keepalive_ms;
    client = calloc(1, sizeof(*client));
    if (client == NULL) {
        return fv_client_fail(error, FOVEA_RESOURCE_EXHAUSTED, "out of host memory");
    }
    client->retry_ms = (o.retry_ms == 0) ? RETRY_MS : o.retry_ms;
    client->call_timeout_ms = (o.call_timeout_ms == 0) ? CALL_TIMEOUT_MS : o.call_timeout_ms;
    code = fv_channel_open(address, &config,
                           (o.connect_timeout_ms == 0) ? CONNECT_TIMEOUT_MS : o.connect_timeout_ms,
                           &client->channel, error);
    if (code != FOVEA_OK) {
        free(client);
        return code;
    }
    *out = client;
    return FOVEA_OK;
}

void fovea_close(fovea_client_t *client)
{
    if (client != NULL) {
        fv_channel_close(client->channel);
        free(client);
    }
}

int64_t fv_client_call_deadline(const fovea_client_t *client, int64_t timeout_ms)
{
    return fv_client_deadline((timeout_ms == FOVEA_TIMEOUT_DEFAULT) ? client->call_timeout_ms
                                                                    : timeout_ms);
}

fovea_code_t fv_client_null(fovea_error_t *error, const char *what)
{
    return fv_client_fail(error, FOVEA_INVALID_ARGUMENT, "%s: given NULL, expected a pointer",
                          what);
}

fovea_code_t fv_client_status(fovea_error_t *error, fv_status_t status)
{
    return fv_client_fail(error, (fovea_code_t)fv_status_grpc(status), "%s", fv_error_context());
}

fovea_code_t fv_client_bad_answer(fovea_error_t *error)
{
    return fv_client_fail(error, FOVEA_INTERNAL, "the service's answer cannot be decoded: %s",
                          fv_error_context());
}

/* ------------------------------------------------------------------ small calls */

fovea_code_t fv_client_decode(const fv_span_t *spans,
                              size_t n_spans,
                              fv_decode_fn_t decode,
                              void *out,
                              fovea_error_t *error)
{
    uint8_t *gathered = NULL;
    fv_span_t whole = {0};
    fv_status_t status = FV_OK;

    if (n_spans == 1) {
        whole = spans[0];
    } else if (n_spans > 1) {
        for (size_t i = 0; i < n_spans; i++) {
            whole.n_bytes += spans[i].n_bytes;
        }
        gathered = malloc(whole.n_bytes + 1); /* never 0 bytes */
        if (gathered == NULL) {
            return fv_client_fail(error, FOVEA_RESOURCE_EXHAUSTED, "out of host memory");
        }
        fv_wire_gather(spans, n_spans, (fv_region_t){.n_bytes = whole.n_bytes}, gathered);
        whole.data = gathered;
    }
    status = decode(whole, out);
    free(gathered);
    return (status == FV_OK) ? FOVEA_OK : fv_client_bad_answer(error);
}

static fovea_code_t
on_reply(void *ctx, const fv_span_t *spans, size_t n_spans, fovea_error_t *error)
{
    const fv_client_call_t *call = ctx;

    if (call->decode == NULL) {
        return FOVEA_OK;
    }
    return fv_client_decode(spans, n_spans, call->decode, call->out, error);
}

fovea_code_t
fv_client_call(fovea_client_t *client, const fv_client_call_t *call, fovea_error_t *error)
{
    fv_client_call_t copy = *call;
    fovea_code_t code = FOVEA_OK;

    if (call->encoded != FV_OK) {
        return fv_client_status(error, call->encoded);
    }
    fv_out_piece_t piece = {.data = call->request->data, .n_bytes = call->request->n_bytes};
    fv_unary_call_t unary = {.method = call->method,
                             .pieces = &piece,
                             .n_pieces = (piece.n_bytes > 0) ? 1 : 0,
                             .deadline_us = fv_client_call_deadline(client, call->timeout_ms),
                             .on_reply = on_reply,
                             .ctx = &copy,
                             .is_once = call->is_once};
    fovea_client_t once = *client;
    uint32_t n_tries = 0;
    once.retry_ms = call->is_single ? -1 : client->retry_ms;
    code = fv_client_unary(&once, &unary, &n_tries, error);
    if ((code == FOVEA_NOT_FOUND) && call->may_be_done && (n_tries > 1U)) {
        code = FOVEA_OK;
    }
    fv_bytes_free(call->request);
    return code;
}
