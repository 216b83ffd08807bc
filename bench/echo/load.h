/*
 * load.h - a closed-loop load generator on gRPC's C core: N requests in flight on one connection.
 *
 * One thread polls, so the client costs the least it can. Latency: from the moment a request's turn begins
 * to the moment its whole reply is here.
 */
#ifndef FV_BENCH_LOAD_H
#define FV_BENCH_LOAD_H

#include "proto/wire.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LOAD_SPANS_MAX  4096
#define LOAD_PIECES_MAX 8
#define LOAD_SLOTS_MAX  1024

/* A request: pieces[i].data is copied where is_copied, else read in place while it is sent. */
typedef struct fv_load_request {
    fv_span_t pieces[LOAD_PIECES_MAX];
    bool is_copied[LOAD_PIECES_MAX];
    size_t n_pieces;
} fv_load_request_t;

/* What is sent and how replies are read. A slot has one request in flight. */
typedef struct fv_workload {
    const char *stream_method, *once_method;
    void *ctx;
    void (*build)(void *ctx, uint32_t slot, fv_load_request_t *out);
    /* The slot that the reply answers; false when the reply is wrong. */
    bool (*check)(void *ctx, const fv_span_t *spans, size_t n_spans, uint32_t *out_slot);
} fv_workload_t;

typedef struct fv_load fv_load_t;

typedef struct fv_load_result {
    uint64_t n_replies;
    double seconds;
    double p50_us, p99_us, mean_us;
    double per_second;
} fv_load_result_t;

/* Opens a connection (and the stream). NULL and a line on stderr when there is no server. */
fv_load_t *fv_load_open(const char *address,
                        const fv_workload_t *workload,
                        bool is_stream,
                        uint32_t n_in_flight);
/* Runs for about `seconds`. False: a reply was wrong, or a call failed (a line on stderr says how). */
bool fv_load_run(fv_load_t *load, double seconds, fv_load_result_t *out);
/* One unary call on the same connection. The gRPC status; `out` (owned by the caller) only when it is 0. */
int fv_load_call(fv_load_t *load, const char *method, fv_span_t request, fv_bytes_t *out);
void fv_load_close(fv_load_t *load);

#endif /* FV_BENCH_LOAD_H */
