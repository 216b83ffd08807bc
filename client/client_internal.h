/*
 * client_internal.h - what the files of the library share; not installed.
 */
#ifndef FV_CLIENT_CLIENT_INTERNAL_H
#define FV_CLIENT_CLIENT_INTERNAL_H

#include "client/client_rpc.h"
#include "client/fovea.h"
#include "common/status.h"
#include "proto/wire.h"

#include <string.h>

struct fovea_client {
    fv_channel_t *channel;
    int64_t call_timeout_ms; /* < 0 = none */
    int32_t retry_ms;        /* < 0 = never */
};

/*
 * One unary call, repeated while the service is unavailable: what is repeated is harmless, because appends are exactly-once;
 * with is_once it is repeated only while there is no connection that it could have left on.
 * *out_n_tries (may be NULL): how often it was made.
 */
fovea_code_t fv_client_unary(const fovea_client_t *client,
                             const fv_unary_call_t *unary,
                             uint32_t *out_n_tries,
                             fovea_error_t *error);

/* The deadline that `timeout_ms` means for this client. */
int64_t fv_client_call_deadline(const fovea_client_t *client, int64_t timeout_ms);

/* INVALID_ARGUMENT "what: given NULL ..." . */
fovea_code_t fv_client_null(fovea_error_t *error, const char *what);

/* Turns a status of ours, with the text this thread recorded for it, into the caller's error. */
fovea_code_t fv_client_status(fovea_error_t *error, fv_status_t status);

/* The same for an answer of the service that could not be decoded: its fault, not the caller's. */
fovea_code_t fv_client_bad_answer(fovea_error_t *error);

typedef fv_status_t (*fv_decode_fn_t)(fv_span_t in, void *out);

/* A whole small message in one piece: calls `decode` on it, gathering first where it must. */
fovea_code_t fv_client_decode(const fv_span_t *spans,
                              size_t n_spans,
                              fv_decode_fn_t decode,
                              void *out,
                              fovea_error_t *error);

/* One small unary call. decode == NULL: the answer has no fields. */
typedef struct fv_client_call {
    const char *method;
    fv_status_t encoded; /* of encoding `request` */
    fv_bytes_t *request; /* freed in any case */
    int64_t timeout_ms;
    bool is_single;   /* never repeated */
    bool is_once;     /* repeated only if it was not sent: doing it twice is not doing it once */
    bool may_be_done; /* NOT_FOUND when repeated: the first time did it */
    fv_decode_fn_t decode;
    void *out;
} fv_client_call_t;

fovea_code_t
fv_client_call(fovea_client_t *client, const fv_client_call_t *call, fovea_error_t *error);

/* Defines decode_NAME(), fv_wire_NAME_decode() with the signature of fv_decode_fn_t. */
#define FV_CLIENT_DECODER(name, type)                         \
    static fv_status_t decode_##name(fv_span_t in, void *out) \
    {                                                         \
        return fv_wire_##name##_decode(in, (type *)out);      \
    }

/* An unsigned field to the wire struct's int32_t; what does not fit becomes INT32_MAX, which the service refuses by name. */
static inline int32_t fv_client_i32(uint32_t value)
{
    return (value > (uint32_t)INT32_MAX) ? INT32_MAX : (int32_t)value;
}

static inline fv_session_id_t fv_client_session(const fovea_session_id_t *id)
{
    fv_session_id_t out;

    memcpy(out.bytes, id->bytes, sizeof(out.bytes));
    return out;
}

static inline fovea_session_id_t fv_client_session_out(const fv_session_id_t *id)
{
    fovea_session_id_t out;

    memcpy(out.bytes, id->bytes, sizeof(out.bytes));
    return out;
}

#endif /* FV_CLIENT_CLIENT_INTERNAL_H */
