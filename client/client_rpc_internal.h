/*
 * client_rpc_internal.h - what the two gRPC files of the client share; nobody else includes it.
 */
#ifndef FV_CLIENT_CLIENT_RPC_INTERNAL_H
#define FV_CLIENT_CLIENT_RPC_INTERNAL_H

#include "client/client_rpc.h"

#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>

#include <pthread.h>

#define FV_IDLE_QUEUES_MAX 16

/* A connection, and completion queues that wait for the next call: each call has one of its own, so
 * that the calling thread itself polls the sockets and no hand-over between threads is paid. */
struct fv_channel {
    grpc_channel *grpc;
    grpc_metadata token; /* "authorization", sent with every call */
    bool has_token;
    pthread_mutex_t lock; /* guards idle, n_idle */
    grpc_completion_queue *idle[FV_IDLE_QUEUES_MAX];
    size_t n_idle;
};

/* The slices of a message received, as spans. Zeroed = empty. */
typedef struct fv_message_view {
    grpc_byte_buffer *buffer;
    fv_span_t *spans;
    size_t n_spans, spans_cap;
} fv_message_view_t;

gpr_timespec fv_rpc_timespec(int64_t deadline_us);
grpc_completion_queue *fv_channel_queue_get(fv_channel_t *channel);
void fv_channel_queue_put(fv_channel_t *channel, grpc_completion_queue *queue); /* it is drained */
grpc_call *fv_channel_call(fv_channel_t *channel,
                           const char *method,
                           grpc_completion_queue *queue,
                           int64_t deadline_us);

/* client_rpc_tls.c: TLS or plain, as the options say; the caller releases. NULL: *error says why. */
grpc_channel_credentials *fv_rpc_credentials(const fovea_options_t *options, fovea_error_t *error);
fovea_code_t
fv_channel_set_token(fv_channel_t *channel, const fovea_options_t *options, fovea_error_t *error);
/* What every call begins with: copied to `out`; how many. The op may change its copy. */
static inline size_t fv_channel_metadata(const fv_channel_t *channel, grpc_metadata *out)
{
    if (channel->has_token) {
        *out = channel->token;
    }
    return channel->has_token ? 1U : 0U;
}

/* NULL when out of memory: then nothing stays pinned. */
grpc_byte_buffer *fv_rpc_message(const fv_out_piece_t *pieces, size_t n_pieces);

/* Takes `buffer` and lists its slices; false when out of memory. _clear keeps the list's memory. */
bool fv_message_view_set(fv_message_view_t *view, grpc_byte_buffer *buffer);
void fv_message_view_clear(fv_message_view_t *view);
void fv_message_view_free(fv_message_view_t *view);

/* Fills *error from a final status; takes `details`. */
void fv_rpc_status(grpc_status_code code, grpc_slice details, fovea_error_t *error);

#endif /* FV_CLIENT_CLIENT_RPC_INTERNAL_H */
