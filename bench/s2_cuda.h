/*
 * s2_cuda.h - the S2 benchmark on a GPU: one problem, its pages, and the check against fp64.
 */
#ifndef FV_BENCH_S2_CUDA_H
#define FV_BENCH_S2_CUDA_H

#include "kernels/backend_cuda.h"

#include <stdio.h>

#define FV_S2_KV_HEADS   8
#define FV_S2_GROUP      4
#define FV_S2_Q_HEADS    (FV_S2_KV_HEADS * FV_S2_GROUP)
#define FV_S2_DIM        128
#define FV_S2_PAGE_BYTES ((size_t)FV_PAGE_TOKENS * 2U * FV_S2_DIM * 2U)
#define FV_S2_ROW_BYTES  ((size_t)FV_S2_Q_HEADS * FV_S2_DIM * 2U)
#define FV_S2_ITEMS_MAX  64
#define FV_S2_SETS_MAX   64
#define FV_S2_REPLAYS    5
#define FV_S2_CHUNK      32768
#define FV_S2_CONTEXT    131072

typedef struct fv_s2_bench {
    fv_backend_t *backend;
    uint32_t *order; /* a permutation of the arena's pages */
    size_t n_pages, n_used;
    fv_page_ref_t *tables; /* [sets][items][FV_S2_KV_HEADS][pages_stride] */
    size_t tables_max;
    size_t stride;
    uint8_t *q, *out; /* device, [FV_S2_CHUNK][FV_S2_Q_HEADS, FV_S2_DIM] */
    fv_lean_launch_t launches[FV_S2_SETS_MAX];
    FILE *json;
} fv_s2_bench_t;

typedef struct fv_s2_result {
    double us, error;
    double pages;   /* read by a step, or by the whole prefill */
    double held;    /* by its sessions */
    double plan_us; /* decode: on the host */
} fv_s2_result_t;

/* Ends the program where something failed. */
void fv_s2_die(const char *what);
void fv_s2_check(fv_status_t status, const char *what);
void fv_s2_check_cuda(cudaError_t error, const char *what);
int fv_s2_compare(const void *a, const void *b); /* of double, for qsort() */

/* Blocks of 64, 8 local, a pattern for each KV head. stride 0: dense. */
fv_policy_t fv_s2_policy(int32_t stride);
fv_tile_query_t fv_s2_query(const fv_policy_t *policy, int32_t kv_head, int64_t begin, int64_t end);

/* Pages of its own for each that a query at `position` or later can read; returns how many. */
size_t fv_s2_fill_table(fv_s2_bench_t *b,
                        const fv_policy_t *policy,
                        int64_t position,
                        fv_page_ref_t *table);

/* The item of these tokens; its Q and out are rows of the bench's, from `row` on. */
fv_attn_item_t fv_s2_item(const fv_s2_bench_t *b,
                          const fv_policy_t *policy,
                          const fv_page_ref_t *table,
                          int64_t position,
                          int32_t n_tokens,
                          size_t row);

/* Compares some rows of an item; returns the largest error relative to a row's norm. Ends the program if one is wrong. */
double fv_s2_verify(const fv_s2_bench_t *b, const fv_attn_item_t *item);

/* Decode of one token of each item at the end of FV_S2_CONTEXT tokens; prefill of a whole context. */
fv_s2_result_t fv_s2_decode(fv_s2_bench_t *b, int32_t n_items, int32_t stride);
fv_s2_result_t fv_s2_prefill(fv_s2_bench_t *b, int64_t n_tokens, int32_t stride);

#endif /* FV_BENCH_S2_CUDA_H */
