/*
 * kernel_workload.h - one benchmark case made real: KV in the arena, queries, the step, and its check.
 *
 * Every KV head of every item holds the same random K and V (in its own pages), so that the oracle needs one head of
 * memory whatever the case; queries are all different. A batch is repeated in n_sets places, for rotation.
 */
#ifndef FV_BENCH_KERNEL_WORKLOAD_H
#define FV_BENCH_KERNEL_WORKLOAD_H

#include "kernels/kernels.h"
#include "tests/support/attn_case.h"

#include <stdbool.h>

#define FV_BENCH_ITEMS_MAX 64

typedef struct fv_bench_case {
    const char *name;
    int32_t n_kv_heads, group, head_dim;
    int32_t kv_dtype, io_dtype;
    int32_t n_tokens; /* 1 = decode */
    int32_t n_items;
    int64_t kv_end; /* of each item; ragged: of all, on average */
    bool ragged;    /* item i has (i + 1) shares of n (n + 1) / 2 */
    bool is_latent; /* head_dim is the latent's; K alone is stored, of head_dim + rope_dim */
    int32_t rope_dim;
    const fv_policy_t *policy; /* NULL: dense; else only what it keeps lies in memory */
} fv_bench_case_t;

typedef struct fv_workload {
    const fv_bench_case_t *spec;
    fv_backend_t *backend;
    fv_attn_case_t *head;      /* the K and V of every head; its oracle's data */
    size_t pages_max;          /* of one head of the longest item */
    fv_page_ref_t *pages;      /* [n_sets][n_items][n_kv_heads][pages_max] */
    uint8_t *q, *out;          /* [n_items][n_tokens, Hq, dk or dv] */
    size_t q_bytes, out_bytes; /* one item */
    int64_t kv_end[FV_BENCH_ITEMS_MAX];
    size_t n_sets;
    double kv_bytes, flops; /* of one batch */
} fv_workload_t;

/* Prints what failed and exits: there is nothing to measure then. */
void fv_bench_die(const char *what) __attribute__((noreturn));
void *fv_bench_alloc(size_t n_bytes); /* zeroed; dies rather than fail */
double fv_bench_now(void);            /* seconds, monotonic */
double fv_bench_cpu(void);            /* seconds of CPU time of the whole process */

/* kv_memory_bytes: the batch is repeated until its KV takes about so much (prefill: once). */
void fv_workload_create(fv_workload_t *w,
                        const fv_bench_case_t *spec,
                        const fv_backend_config_t *config,
                        size_t kv_memory_bytes);
void fv_workload_destroy(fv_workload_t *w);

/* One step on copy `set` of the batch. */
void fv_workload_step(fv_workload_t *w, size_t set);

/* Runs a step; first token of the first item and last token of the last against the oracle, all heads. */
bool fv_workload_verify(fv_workload_t *w);

#endif /* FV_BENCH_KERNEL_WORKLOAD_H */
