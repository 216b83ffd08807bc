/*
 * client_rpc.h - the client's door to gRPC: bytes out, bytes in, nothing of what they mean.
 *
 * client_rpc.c (connection, unary calls), client_rpc_duplex.c (streaming calls) and client_rpc_tls.c (credentials) are the
 * only files of client/ that include gRPC.
 *
 * Pins. A piece that is sent from the caller's memory is pinned while gRPC may read it: *pins is raised
 * by one when it is handed over and lowered, on any thread, when gRPC lets go. gRPC promises that only
 * through the slice's destroy function, which may come later than the completion of the send.
 */
#ifndef FV_CLIENT_CLIENT_RPC_H
#define FV_CLIENT_CLIENT_RPC_H

#include "client/fovea.h"
#include "proto/wire.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FV_RPC_NO_DEADLINE INT64_MAX /* deadlines: CLOCK_MONOTONIC microseconds */

#define FV_METHOD_PATH(service, method) "/fovea.v1." service "/" method

typedef struct fv_channel fv_channel_t;
typedef struct fv_duplex fv_duplex_t;

/* Part of an outgoing message. pins == NULL: copied before return. */
typedef struct fv_out_piece {
    const void *data;
    size_t n_bytes;
    atomic_uint *pins;
} fv_out_piece_t;

typedef struct fv_channel_config {
    size_t message_bytes_max;       /* 0 = no limit */
    int32_t keepalive_ms;           /* <= 0 = off */
    const fovea_options_t *options; /* TLS and token; not NULL */
} fv_channel_config_t;

/* Records `code` and a formatted text in *error (which may be NULL); returns code. */
__attribute__((format(printf, 3, 4))) fovea_code_t
fv_client_fail(fovea_error_t *error, fovea_code_t code, const char *fmt, ...);

/* Now + timeout_ms, saturating; negative = FV_RPC_NO_DEADLINE. */
int64_t fv_client_deadline(int64_t timeout_ms);

/* Connects and waits until the peer speaks HTTP/2. Errors: UNAVAILABLE, INVALID_ARGUMENT. */
fovea_code_t fv_channel_open(const char *address,
                             const fv_channel_config_t *config,
                             int64_t timeout_ms,
                             fv_channel_t **out,
                             fovea_error_t *error);
/* Waits until the connection stands; failed attempts are repeated by gRPC until the deadline. Between calls nobody else polls
 * a connection that is being made. Thread: any. */
bool fv_channel_wait_ready(fv_channel_t *channel, int64_t deadline_us);
void fv_channel_close(fv_channel_t *channel); /* all calls over; NULL is fine */

/* Reads an answer; the spans are borrowed until return. Its code becomes the call's. */
typedef fovea_code_t (*fv_reply_fn_t)(void *ctx,
                                      const fv_span_t *spans,
                                      size_t n_spans,
                                      fovea_error_t *error);

typedef struct fv_unary_call {
    const char *method;
    const fv_out_piece_t *pieces;
    size_t n_pieces;
    int64_t deadline_us;
    fv_reply_fn_t on_reply;
    void *ctx;
    bool is_once; /* made again (fv_client_unary()) only if nothing of it was sent */
} fv_unary_call_t;

/* One unary call. Returns when it is over and every piece's memory is free again. Thread: any. */
fovea_code_t
fv_channel_unary(fv_channel_t *channel, const fv_unary_call_t *unary, fovea_error_t *error);

/* ------------------------------------------------------------------ streaming calls */

typedef enum fv_duplex_event_kind {
    FV_DUPLEX_TIMEOUT,  /* nothing happened in time */
    FV_DUPLEX_SENT,     /* the message under way left: another one may be sent */
    FV_DUPLEX_RECEIVED, /* spans, borrowed until fv_duplex_receive_next() */
    FV_DUPLEX_OTHER,    /* progress of no interest */
    FV_DUPLEX_CLOSED,   /* the call is over and nothing is under way: the last event */
} fv_duplex_event_kind_t;

typedef struct fv_duplex_event {
    fv_duplex_event_kind_t kind;
    const fv_span_t *spans;
    size_t n_spans;
} fv_duplex_event_t;

fovea_code_t fv_duplex_open(fv_channel_t *channel,
                            const char *method,
                            int64_t deadline_us,
                            fv_duplex_t **out,
                            fovea_error_t *error);

/*
 * Sends the concatenation of the pieces. At most one message is under way: not before FV_DUPLEX_SENT
 * for the last one. False when the call is over: nothing was pinned.
 * Thread: sends and half-closes one at a time; they may run beside fv_duplex_next().
 */
bool fv_duplex_send(fv_duplex_t *duplex, const fv_out_piece_t *pieces, size_t n_pieces);

/* Tells the peer that no message follows. After the last FV_DUPLEX_SENT. Thread: as fv_duplex_send(). */
void fv_duplex_half_close(fv_duplex_t *duplex);

void fv_duplex_cancel(fv_duplex_t *duplex); /* thread: any, but not beside fv_duplex_end() */

/* Waits for the next event. Thread: one at a time. */
fv_duplex_event_t fv_duplex_next(fv_duplex_t *duplex, int64_t deadline_us);

/* Lets go of the message received and reads on. Thread: as fv_duplex_next(). */
void fv_duplex_receive_next(fv_duplex_t *duplex);

/*
 * After FV_DUPLEX_CLOSED: gives the call up, for gRPC to let go of pieces that a call cut short still
 * holds. fv_duplex_next() then polls the connection until its deadline and says CLOSED again.
 */
void fv_duplex_end(fv_duplex_t *duplex);

/* With which status it ended; after FV_DUPLEX_CLOSED. Lives as long as the duplex. */
const fovea_error_t *fv_duplex_status(const fv_duplex_t *duplex);

void fv_duplex_destroy(fv_duplex_t *duplex); /* after FV_DUPLEX_CLOSED; NULL is fine */

#endif /* FV_CLIENT_CLIENT_RPC_H */
