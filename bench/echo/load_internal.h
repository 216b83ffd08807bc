/*
 * load_internal.h - what load.c (turns and figures) and load_channel.c (connection and calls) share.
 */
#ifndef FV_BENCH_LOAD_INTERNAL_H
#define FV_BENCH_LOAD_INTERNAL_H

#include "bench/echo/load.h"

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/slice.h>

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

/* The first failure is said on stderr; nothing more is started after it. */
void fv_load_fail(fv_load_t *load, const char *why);
grpc_event fv_load_next(fv_load_t *load);
void fv_load_start(fv_load_t *load, grpc_call *call, const grpc_op *ops, size_t n_ops, void *tag);
void fv_load_stream_read(fv_load_t *load);
/* A unary call in `slot`; takes the message. One completion, `tag`, when all of it is over. */
void fv_load_once_start(fv_load_t *load,
                        fv_slot_t *slot,
                        const char *method,
                        grpc_byte_buffer *message,
                        void *tag);
void fv_load_once_finish(fv_slot_t *slot);
/* What a completion means for the turns. */
void fv_load_on_event(fv_load_t *load, void *tag);

#endif /* FV_BENCH_LOAD_INTERNAL_H */
