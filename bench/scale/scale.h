/*
 * scale.h - the scaling benchmark: decode and prefill steps over p ranks of a job of N, without gRPC and coordinator.
 *
 * Every rank owns a worker (worker/worker.h) over the backend and the exchange of the service, and all of them run
 * the same steps: the coordinator's part, who holds what, is the case's placement. p of the N ranks take part in a
 * case, so that the ratio to one rank is taken in one run, on the same machine and memory.
 *
 * What a session holds is known in closed form (scale_data.c), so every case is compared with fp64 softmax at its full
 * size before and after it is timed. Errors end the job: a benchmark that went wrong has nothing to say.
 */
#ifndef FV_BENCH_SCALE_H
#define FV_BENCH_SCALE_H

#include "coord/main_exchange.h"
#include "tests/support/random.h"
#include "worker/internal.h"

#include <mpi.h>

#include <stdbool.h>

#define FV_SCALE_ITEMS_MAX   1024
#define FV_SCALE_LAYERS_MAX  64
#define FV_SCALE_S2_LAYERS   32 /* of the model of table "s2": all of them are there */
#define FV_SCALE_MLA_LAYERS  61 /* of that of table "mla" (DeepSeek-V3): the batch is what fits */
#define FV_SCALE_S2_LOCAL    8
#define FV_SCALE_S2_FILL     65536U /* tokens that are put in before what no query will read is freed */
#define FV_SCALE_STEPS_MAX   256
#define FV_SCALE_RESULTS_MAX 256
#define FV_SCALE_NAME_BYTES  64

/* ------------------------------------------------------------------ this rank */

typedef struct fv_scale_options {
    const char *backend;  /* "auto", "cpu", "cuda" */
    const char *exchange; /* fovead's --exchange */
    const char *json, *csv;
    size_t
        move_bytes; /* of a rank's KV: staging, and prompts by context move their KV; 0: they visit */
    const char *only;      /* cases whose name contains it */
    const char *list;      /* "time" or "check" */
    uint64_t kv_bytes;     /* of a rank; 0: most of the device's, CPU 1 GiB */
    uint64_t rotate_bytes; /* KV that a rank walks through before it comes back to the same layer */
    uint32_t shrink;       /* divides the tokens of every case */
    uint32_t n_threads;    /* CPU; 0: this host's cores / its ranks */
    double seconds;        /* of timed steps per case and rank count */
} fv_scale_options_t;

typedef struct fv_scale_rank {
    const fv_scale_options_t *options;
    MPI_Comm comm;
    int rank, n_ranks, local_rank, n_local_ranks;
    const fv_backend_ops_t *backend;
    fv_main_exchange_t exchange;
    fv_worker_t *worker;
    fv_device_info_t device;
    double read_gbps;     /* streaming read, all ranks at once; the slowest rank's */
    uint64_t arena_bytes; /* of the rank that has least */
    fv_model_spec_t models[FV_MODELS_MAX]; /* registered, by slot */
    uint32_t n_models;
} fv_scale_rank_t;

/* Prints who failed and what; the whole job ends. */
void fv_scale_die(const char *what) __attribute__((noreturn));
void fv_scale_check(fv_status_t status, const char *what);
void *fv_scale_alloc(size_t n, size_t size); /* zeroed */
double fv_scale_now_us(void);

/* After MPI_Init. Measures the streaming read, too. */
void fv_scale_rank_open(fv_scale_rank_t *r, const fv_scale_options_t *options);
void fv_scale_rank_close(fv_scale_rank_t *r);
double fv_scale_max(const fv_scale_rank_t *r, double value); /* over all ranks */

/* Slot of a model in every worker; registered when it is new. */
uint32_t fv_scale_model(fv_scale_rank_t *r, const fv_model_spec_t *spec);

/* GB/s of this rank's streaming read over its arena, all ranks at once (scale_read*.c). */
double fv_scale_read_rate(const fv_scale_rank_t *r);
#if defined(FV_WITH_CUDA)
double fv_scale_read_rate_cuda(const fv_scale_rank_t *r);
#endif

/* ------------------------------------------------------------------ what sessions hold */

/* Token t of (item, layer) is token (shift + t % WINDOW) of a pool of random bf16 K and V, other for each item. */
#define FV_SCALE_WINDOW 4096
#define FV_SCALE_POOL   ((size_t)FV_SCALE_WINDOW * 2U)

typedef struct fv_scale_data {
    const fv_model_spec_t *spec;
    fv_host_buffer_t memory;
    uint16_t *k, *v; /* [POOL, Hkv, d]; latents: k [POOL, latent + rope], no v */
    uint16_t *q;     /* [q_tokens, Hq, d], another place for each item */
    size_t q_tokens;
    size_t kv_token_bytes, v_token_bytes, q_token_bytes;
} fv_scale_data_t;

/* n_query_tokens: the longest chunk of queries. */
void fv_scale_data_open(fv_scale_data_t *d,
                        fv_scale_rank_t *r,
                        const fv_model_spec_t *spec,
                        size_t n_query_tokens);
void fv_scale_data_close(fv_scale_data_t *d, fv_scale_rank_t *r);

/* Pool index of token t. */
size_t fv_scale_token(uint32_t item, uint32_t layer, uint64_t t);
/* First query of an item's step at `position`. */
const uint16_t *fv_scale_query(const fv_scale_data_t *d, uint32_t item, uint64_t position);

/*
 * fp64: out[part->head_dim_v] of query head `head` at `position`, which sees tokens [0, position]. Of a slice of latents:
 * the softmax of this slice's scores and the RoPE key's, whatever the others say (TPLA).
 */
void fv_scale_expected(const fv_scale_data_t *d,
                       uint32_t item,
                       uint32_t layer,
                       uint64_t position,
                       int32_t head,
                       const fv_head_part_t *part,
                       double *out);

/* ------------------------------------------------------------------ a case */

typedef enum fv_scale_axis {
    FV_SCALE_HEADS,
    FV_SCALE_CONTEXT,
    FV_SCALE_GRID,
    FV_SCALE_SLICES /* of latents: a softmax each; ranks beyond the slices share one's heads */
} fv_scale_axis_t;
typedef enum fv_scale_grows {
    FV_SCALE_STRONG,
    FV_SCALE_WEAK_TOKENS,
    FV_SCALE_WEAK_ITEMS
} fv_scale_grows_t;

typedef struct fv_scale_latent {
    int32_t rope_dim; /* 0: no latents; else head_dim is the latent's */
    int32_t groups;   /* slices; 0: whole */
} fv_scale_latent_t;

typedef struct fv_scale_case {
    const char *name;
    const char *table; /* "strong", "weak", "exchange", "prefill", "s2", "mla", "check" */
    int32_t n_q_heads, n_kv_heads, head_dim;
    uint32_t n_items;  /* 0: as many as fit */
    uint64_t n_tokens; /* before the first step; weak: per rank */
    fv_scale_axis_t axis;
    fv_scale_grows_t grows;
    uint32_t shard_tokens;
    uint32_t
        chunk; /* 0: KV is put in place; else by real prefill steps of so many tokens, each verified; "prefill" times them */
    int32_t s2_stride; /* 0: dense; else all layers are S2 of blocks of 64, 8 local */
    fv_scale_latent_t latent;
} fv_scale_case_t;

static inline bool fv_scale_is_latent(const fv_scale_case_t *c)
{
    return c->latent.rope_dim > 0;
}

static inline int32_t fv_scale_groups(const fv_scale_case_t *c)
{
    return (c->latent.groups > 0) ? c->latent.groups : 1;
}

/* One rank has an answer of its own, for the same batch, that others are compared with. */
static inline bool fv_scale_has_one_rank(const fv_scale_case_t *c)
{
    return (c->grows == FV_SCALE_STRONG) && (c->n_items > 0U) && (c->axis != FV_SCALE_SLICES);
}

/* Head parts that there can be. */
static inline int32_t fv_scale_parts_max(const fv_scale_case_t *c)
{
    return fv_scale_is_latent(c) ? (c->n_q_heads * fv_scale_groups(c)) : c->n_kv_heads;
}

/* Bytes of KV of a token of a layer on one rank that holds all of its heads, or its slice. */
static inline double fv_scale_token_bytes(const fv_scale_case_t *c)
{
    return fv_scale_is_latent(c)
               ? (2.0 * (double)(c->head_dim / fv_scale_groups(c) + c->latent.rope_dim))
               : ((double)c->n_kv_heads * (double)c->head_dim * 4.0); /* K and V, bf16 */
}

/* Microseconds; of a step the slowest rank's. */
typedef struct fv_scale_times {
    double p10, p50, p90;
} fv_scale_times_t;

typedef struct fv_scale_result {
    char name[FV_SCALE_NAME_BYTES];
    const fv_scale_case_t *spec;
    int n_ranks;
    uint32_t n_items, n_layers, n_steps;
    uint64_t n_tokens;
    double kv_bytes;   /* read a step by the rank that holds most */
    double sent_bytes; /* partial states, of the rank that sends most */
    double error;      /* largest of a row, relative to its norm, all ranks */
    double difference; /* largest from the result of one rank, relative to the row's norm */
    fv_scale_times_t wall, device, compute, exchange;
    double floor_us;
    double ratio; /* one rank's device time / this one's; "mla": tokens a second / those by heads on
                       as many ranks; 0: not measured */
    double over_us; /* this one's device time - one rank's */
} fv_scale_result_t;

/* A case under way on p ranks (scale_step.c). */
typedef struct fv_scale_run {
    fv_scale_rank_t *r;
    const fv_scale_case_t *spec;
    int p;
    uint32_t n_items, n_layers; /* layers in use */
    uint32_t chunk;             /* tokens of a prefill step; 0: none */
    bool is_prefill;            /* which are what is timed */
    uint64_t n_tokens;
    fv_model_spec_t model;
    fv_placement_t placement;
    fv_scale_data_t data;
    uint64_t *lengths;    /* [n_layers] */
    fv_ctl_item_t *items; /* of the step: those of which this rank has a share */
    uint32_t *item_of;    /* their indices */
    fv_error_t *errors;
    uint32_t n_shares;
    fv_host_buffer_t in, out;
    fv_ctl_step_t step;
    uint64_t step_id;
    uint16_t
        *one_rank; /* [n_items, Hq, d]: what one rank gave at the first step; NULL: not yet known */
    double error, difference;
} fv_scale_run_t;

void fv_scale_run_open(fv_scale_run_t *run, fv_scale_rank_t *r, const fv_scale_case_t *c, int p);
void fv_scale_run_close(fv_scale_run_t *run);
/* Every session gets its tokens (scale_fill.c). */
void fv_scale_fill(fv_scale_run_t *run);
/* Lays out the next step of a layer; false: this rank has no share. */
bool fv_scale_step_prepare(fv_scale_run_t *run, uint32_t layer, uint32_t n_tokens);
void fv_scale_step_run(fv_scale_run_t *run, fv_ctl_done_t *out_done);
/* Compares what the last step returned; dies when a row is off. */
void fv_scale_step_verify(fv_scale_run_t *run, uint32_t layer);
double fv_scale_sent_bytes(const fv_scale_run_t *run);
double fv_scale_kv_bytes(const fv_scale_run_t *run);

/* Prefills one layer after the other and times it (scale_prefill.c); ranks of comm. */
void fv_scale_prefill(fv_scale_run_t *run, MPI_Comm comm, fv_scale_result_t *out);
double fv_scale_prefill_flops(const fv_scale_result_t *result); /* causal, of one prompt */

/* Runs a case on p ranks; false: it does not fit, and why is printed. one_rank: kept from p = 1 to the others. */
bool fv_scale_case_run(fv_scale_rank_t *r,
                       const fv_scale_case_t *c,
                       int p,
                       uint16_t **one_rank,
                       fv_scale_result_t *out);

/* ------------------------------------------------------------------ report (rank 0) */

/* Of a model of as many layers as were there. */
double fv_scale_tokens_per_second(const fv_scale_result_t *result);
void fv_scale_print_machine(const fv_scale_rank_t *r);
void fv_scale_print_head(const char *table);
void fv_scale_print(const fv_scale_result_t *result);
void fv_scale_write(const fv_scale_rank_t *r, const fv_scale_result_t *results, size_t n_results);

#endif /* FV_BENCH_SCALE_H */
