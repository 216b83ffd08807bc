/*
 * attend_load.h - decode steps against a running fovead, as a workload of the load generator.
 *
 * Model: 1 layer, 32 query heads, 8 KV heads, d = 128, bf16. A slot is one client: `batch` sessions of its
 * own, each request appends one token to every one of them.
 *
 * Tensors: q is the same at every position; K and V of token p are those of parity p % 2. With n0 even and
 * n1 odd tokens the answer is known exactly, at any length and whatever the sharding:
 *
 *   out = (n0 e^s0 v0 + n1 e^s1 v1) / (n0 e^s0 + n1 e^s1),   s_i = scale * (q . k_i)
 */
#ifndef FV_BENCH_ATTEND_LOAD_H
#define FV_BENCH_ATTEND_LOAD_H

#include "bench/echo/load.h"

#define ATTEND_Q_HEADS  32U
#define ATTEND_KV_HEADS 8U
#define ATTEND_HEAD_DIM 128U

typedef struct fv_attend_slot {
    fv_attend_item_t *items; /* [batch] */
    uint64_t position;       /* of the next token */
    fv_bytes_t head;
    fv_wire_tensor_heads_t tensors;
} fv_attend_slot_t;

typedef struct fv_attend_load {
    fv_load_t *load;
    uint32_t batch, n_slots;
    uint64_t context;          /* tokens before the first decode */
    bool is_verifying;         /* compare the values of replies, not only their shape */
    bool is_noop;              /* the backend computes nothing */
    uint16_t *q, *k[2], *v[2]; /* [batch, heads, head_dim] bf16; every item has the same */
    fv_attend_slot_t *slots;
    fv_bytes_t scratch;
    size_t request_bytes, reply_bytes; /* of the last message */
    uint64_t n_timed;
    double queue_us, compute_us, exchange_us, total_us; /* sums over n_timed replies */
} fv_attend_load_t;

/* Registers the model, opens and fills the sessions, sends a few steps and compares them. False: said on stderr. */
bool fv_attend_load_open(fv_attend_load_t *attend,
                         const char *address,
                         bool is_stream,
                         uint32_t batch,
                         uint32_t n_in_flight,
                         uint64_t context);
/* Back to `context` tokens in every session; clears the timings. */
bool fv_attend_load_rewind(fv_attend_load_t *attend);
void fv_attend_load_close(fv_attend_load_t *attend);

#endif /* FV_BENCH_ATTEND_LOAD_H */
