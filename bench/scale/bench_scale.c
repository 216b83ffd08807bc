/*
 * bench_scale.c - decode and prefill steps over 1, 2, 4 ... N ranks: strong and weak scaling, and the exchange alone.
 *
 *   mpirun -np 4 bench_scale --json scale.json --csv scale.csv        (or srun -n 4)
 *   mpirun -np 4 bench_scale --check                                  N ranks equal 1, in every sharding mode
 *
 * A step is that of the service: one token of every sequence appended, attended to, partial states exchanged and
 * merged; what is left out is gRPC, the scheduler and the link to the coordinator. Ranks start a step together and it
 * takes as long as its slowest rank. `device` is the backend's own clock (events) where it has one, `wall` the host's;
 * layers take turns, so that no cache holds what is read. floor = KV bytes of the fullest rank / the streaming read
 * of the same run (+ 1.4 us for a launch). bench/scale/run_gpus.sh and run_cpu.sh call it.
 */
#include "bench/scale/scale.h"

#include <argp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define K     1024U
#define MI    (1024U * 1024U)
#define SHARD 2048U /* the service's default */
#define CHUNK 4096U /* of a prompt: its partial states fit the exchange's window */
#define GQA   32, 8, 128
#define MLA   128, 1, 512 /* and a RoPE key of 64 */

/* s2_stride, latent */
#define DENSE \
    0,        \
    {         \
        0, 0  \
    }
#define S2_OF(n) \
    (n),         \
    {            \
        0, 0     \
    }
#define WHOLE \
    0,        \
    {         \
        64, 0 \
    }
#define SLICES(g) \
    0,            \
    {             \
        64, (g)   \
    }

static const fv_scale_case_t k_time[] = {
    {"one 128k, context", "strong", GQA, 1, 128U * K, FV_SCALE_CONTEXT, FV_SCALE_STRONG, SHARD, 0,
     DENSE},
    {"one 128k, heads", "strong", GQA, 1, 128U * K, FV_SCALE_HEADS, FV_SCALE_STRONG, SHARD, 0,
     DENSE},
    {"one 512k, context", "strong", GQA, 1, 512U * K, FV_SCALE_CONTEXT, FV_SCALE_STRONG, SHARD, 0,
     DENSE},
    {"one 512k, heads", "strong", GQA, 1, 512U * K, FV_SCALE_HEADS, FV_SCALE_STRONG, SHARD, 0,
     DENSE},
    {"one 2M, context", "strong", GQA, 1, 2U * MI, FV_SCALE_CONTEXT, FV_SCALE_STRONG, SHARD, 0,
     DENSE},
    {"one 4M, context", "strong", GQA, 1, 4U * MI, FV_SCALE_CONTEXT, FV_SCALE_STRONG, SHARD, 0,
     DENSE},
    {"64 x 32k, heads", "strong", GQA, 64, 32U * K, FV_SCALE_HEADS, FV_SCALE_STRONG, SHARD, 0,
     DENSE},
    {"64 x 32k, context", "strong", GQA, 64, 32U * K, FV_SCALE_CONTEXT, FV_SCALE_STRONG, SHARD, 0,
     DENSE},
    {"128k a rank, context", "weak", GQA, 1, 128U * K, FV_SCALE_CONTEXT, FV_SCALE_WEAK_TOKENS,
     SHARD, 0, DENSE},
    {"1M a rank, context", "weak", GQA, 1, MI, FV_SCALE_CONTEXT, FV_SCALE_WEAK_TOKENS, SHARD, 0,
     DENSE},
    {"16 x 32k a rank, context", "weak", GQA, 16, 32U * K, FV_SCALE_CONTEXT, FV_SCALE_WEAK_ITEMS,
     SHARD, 0, DENSE},
    {"16 x 32k a rank, heads", "weak", GQA, 16, 32U * K, FV_SCALE_HEADS, FV_SCALE_WEAK_ITEMS, SHARD,
     0, DENSE},
    /* whole prompts in chunks; a chunk's queries visit the KV of every rank, partial states come back */
    {"prompt of 32k, context", "prefill", GQA, 1, 32U * K, FV_SCALE_CONTEXT, FV_SCALE_STRONG, SHARD,
     CHUNK, DENSE},
    {"prompt of 128k, context", "prefill", GQA, 1, 128U * K, FV_SCALE_CONTEXT, FV_SCALE_STRONG,
     SHARD, CHUNK, DENSE},
    {"prompt of 128k, heads", "prefill", GQA, 1, 128U * K, FV_SCALE_HEADS, FV_SCALE_STRONG, SHARD,
     CHUNK, DENSE},
    {"prompt of 512k, context", "prefill", GQA, 1, 512U * K, FV_SCALE_CONTEXT, FV_SCALE_STRONG,
     SHARD, CHUNK, DENSE},
    {"prompt of 512k, heads", "prefill", GQA, 1, 512U * K, FV_SCALE_HEADS, FV_SCALE_STRONG, SHARD,
     CHUNK, DENSE},
    /* one session of a model of 32 layers, S2 of blocks of 64, 8 local, or dense as long as it fits */
    {"one 1M, s2 of 16", "s2", GQA, 1, MI, FV_SCALE_CONTEXT, FV_SCALE_STRONG, SHARD, 0, S2_OF(16)},
    {"one 832k, dense", "s2", GQA, 1, 832U * K, FV_SCALE_CONTEXT, FV_SCALE_STRONG, SHARD, 0, DENSE},
    {"one 1M, dense", "s2", GQA, 1, MI, FV_SCALE_CONTEXT, FV_SCALE_STRONG, SHARD, 0, DENSE},
    {"one 1664k, dense", "s2", GQA, 1, 1664U * K, FV_SCALE_CONTEXT, FV_SCALE_STRONG, SHARD, 0,
     DENSE},
    /* 64 tokens a rank: next to nothing but the exchange and the merge */
    {"4 heads, batch 1", "exchange", 4, 1, 128, 1, 64, FV_SCALE_CONTEXT, FV_SCALE_WEAK_TOKENS, 64,
     0, DENSE},
    {"8 heads, batch 1", "exchange", 8, 2, 128, 1, 64, FV_SCALE_CONTEXT, FV_SCALE_WEAK_TOKENS, 64,
     0, DENSE},
    {"16 heads, batch 1", "exchange", 16, 4, 128, 1, 64, FV_SCALE_CONTEXT, FV_SCALE_WEAK_TOKENS, 64,
     0, DENSE},
    {"32 heads, batch 1", "exchange", GQA, 1, 64, FV_SCALE_CONTEXT, FV_SCALE_WEAK_TOKENS, 64, 0,
     DENSE},
    {"32 heads, batch 2", "exchange", GQA, 2, 64, FV_SCALE_CONTEXT, FV_SCALE_WEAK_TOKENS, 64, 0,
     DENSE},
    {"32 heads, batch 4", "exchange", GQA, 4, 64, FV_SCALE_CONTEXT, FV_SCALE_WEAK_TOKENS, 64, 0,
     DENSE},
    {"32 heads, batch 8", "exchange", GQA, 8, 64, FV_SCALE_CONTEXT, FV_SCALE_WEAK_TOKENS, 64, 0,
     DENSE},
    {"32 heads, batch 16", "exchange", GQA, 16, 64, FV_SCALE_CONTEXT, FV_SCALE_WEAK_TOKENS, 64, 0,
     DENSE},
    {"32 heads, batch 32", "exchange", GQA, 32, 64, FV_SCALE_CONTEXT, FV_SCALE_WEAK_TOKENS, 64, 0,
     DENSE},
    {"32 heads, batch 64", "exchange", GQA, 64, 64, FV_SCALE_CONTEXT, FV_SCALE_WEAK_TOKENS, 64, 0,
     DENSE},
    {"32 heads, batch 128", "exchange", GQA, 128, 64, FV_SCALE_CONTEXT, FV_SCALE_WEAK_TOKENS, 64, 0,
     DENSE},
    {"32 heads, batch 256", "exchange", GQA, 256, 64, FV_SCALE_CONTEXT, FV_SCALE_WEAK_TOKENS, 64, 0,
     DENSE},
    {"32 heads, batch 512", "exchange", GQA, 512, 64, FV_SCALE_CONTEXT, FV_SCALE_WEAK_TOKENS, 64, 0,
     DENSE},
    /* latents of a model of 61 layers, as many sessions as fit; slices are TPLA, an approximation */
    {"mla 32k, heads", "mla", MLA, 0, 32U * K, FV_SCALE_HEADS, FV_SCALE_STRONG, SHARD, 0, WHOLE},
    {"mla 32k, context", "mla", MLA, 0, 32U * K, FV_SCALE_CONTEXT, FV_SCALE_STRONG, SHARD, 0,
     WHOLE},
    {"mla 32k, 2 slices", "mla", MLA, 0, 32U * K, FV_SCALE_SLICES, FV_SCALE_STRONG, SHARD, 0,
     SLICES(2)},
    {"mla 32k, 4 slices", "mla", MLA, 0, 32U * K, FV_SCALE_SLICES, FV_SCALE_STRONG, SHARD, 0,
     SLICES(4)},
    {"mla 32k, 8 slices", "mla", MLA, 0, 32U * K, FV_SCALE_SLICES, FV_SCALE_STRONG, SHARD, 0,
     SLICES(8)},
    {"mla 128k, heads", "mla", MLA, 0, 128U * K, FV_SCALE_HEADS, FV_SCALE_STRONG, SHARD, 0, WHOLE},
    {"mla 128k, context", "mla", MLA, 0, 128U * K, FV_SCALE_CONTEXT, FV_SCALE_STRONG, SHARD, 0,
     WHOLE},
    {"mla 128k, 2 slices", "mla", MLA, 0, 128U * K, FV_SCALE_SLICES, FV_SCALE_STRONG, SHARD, 0,
     SLICES(2)},
    {"mla 128k, 4 slices", "mla", MLA, 0, 128U * K, FV_SCALE_SLICES, FV_SCALE_STRONG, SHARD, 0,
     SLICES(4)},
    {"mla 128k, 8 slices", "mla", MLA, 0, 128U * K, FV_SCALE_SLICES, FV_SCALE_STRONG, SHARD, 0,
     SLICES(8)},
};

/* Filled by real prefill steps, odd sizes: contexts that do not reach every part, parts that end inside a page. */
static const fv_scale_case_t k_check[] = {
    {"context, 32/8 d 128", "check", GQA, 3, 1001, FV_SCALE_CONTEXT, FV_SCALE_STRONG, 64, 257,
     DENSE},
    {"context, 8/8 d 64", "check", 8, 8, 64, 2, 700, FV_SCALE_CONTEXT, FV_SCALE_STRONG, 128, 99,
     DENSE},
    {"context, 16/1 d 256", "check", 16, 1, 256, 2, 333, FV_SCALE_CONTEXT, FV_SCALE_STRONG, 64, 64,
     DENSE},
    {"context, short, 32/8 d 80", "check", 32, 8, 80, 4, 70, FV_SCALE_CONTEXT, FV_SCALE_STRONG, 64,
     9, DENSE},
    {"prefill, context, 32/8 d 128", "check", GQA, 1, 4001, FV_SCALE_CONTEXT, FV_SCALE_STRONG, 128,
     2048, DENSE},
    {"prefill, heads, 32/8 d 128", "check", GQA, 1, 4001, FV_SCALE_HEADS, FV_SCALE_STRONG, 128,
     2048, DENSE},
    {"heads, 32/8 d 128", "check", GQA, 3, 500, FV_SCALE_HEADS, FV_SCALE_STRONG, 64, 123, DENSE},
    {"heads, 12/6 d 96", "check", 12, 6, 96, 2, 200, FV_SCALE_HEADS, FV_SCALE_STRONG, 64, 200,
     DENSE},
    {"grid, 32/8 d 128", "check", GQA, 3, 900, FV_SCALE_GRID, FV_SCALE_STRONG, 64, 250, DENSE},
    {"grid, 8/4 d 192", "check", 8, 4, 192, 2, 400, FV_SCALE_GRID, FV_SCALE_STRONG, 128, 77, DENSE},
    {"s2, context, 32/8 d 128", "check", GQA, 2, 2500, FV_SCALE_CONTEXT, FV_SCALE_STRONG, 128, 300,
     S2_OF(16)},
    {"s2, grid, 8/4 d 64", "check", 8, 4, 64, 2, 2100, FV_SCALE_GRID, FV_SCALE_STRONG, 64, 250,
     S2_OF(8)},
    {"mla heads, 128 of 512 + 64", "check", MLA, 2, 230, FV_SCALE_HEADS, FV_SCALE_STRONG, 64, 133,
     WHOLE},
    {"mla context, 128 of 512 + 64", "check", MLA, 2, 520, FV_SCALE_CONTEXT, FV_SCALE_STRONG, 64,
     170, WHOLE},
    {"mla context, 16 of 192 + 64", "check", 16, 1, 192, 3, 300, FV_SCALE_CONTEXT, FV_SCALE_STRONG,
     64, 77, WHOLE},
    {"mla 2 slices, 128 of 512 + 64", "check", MLA, 2, 230, FV_SCALE_SLICES, FV_SCALE_STRONG, 64,
     67, SLICES(2)},
    {"mla 4 slices, 128 of 512 + 64", "check", MLA, 2, 230, FV_SCALE_SLICES, FV_SCALE_STRONG, 64,
     67, SLICES(4)},
    {"mla 8 slices, 128 of 512 + 64", "check", MLA, 2, 230, FV_SCALE_SLICES, FV_SCALE_STRONG, 64,
     67, SLICES(8)},
};

/* ------------------------------------------------------------------ options */

static uint64_t parse_bytes(struct argp_state *state, const char *arg)
{
    char *rest = NULL;
    const double value = strtod(arg, &rest);
    const char *const units = "kmg";
    const char *unit = (*rest == '\0') ? NULL : strchr(units, *rest);
    double scale = 1.0;

    if ((value <= 0.0) || ((*rest != '\0') && ((unit == NULL) || (rest[1] != '\0')))) {
        argp_error(state, "given \"%s\", expected a number of bytes, or of k, m or g", arg);
    }
    for (const char *at = units; (unit != NULL) && (at <= unit); at++) {
        scale *= 1024.0;
    }
    return (uint64_t)(value * scale);
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    fv_scale_options_t *o = state->input;

    switch (key) {
    case 'b':
        o->backend = arg;
        return 0;
    case 'e':
        o->exchange = arg;
        return 0;
    case 'j':
        o->json = arg;
        return 0;
    case 'v':
        o->csv = arg;
        return 0;
    case 'o':
        o->only = arg;
        return 0;
    case 'c':
        o->list = "check";
        return 0;
    case 'm':
        o->kv_bytes = parse_bytes(state, arg);
        return 0;
    case 'M':
        o->move_bytes = (size_t)parse_bytes(state, arg);
        return 0;
    case 'r':
        o->rotate_bytes = parse_bytes(state, arg);
        return 0;
    case 's':
        o->shrink = (uint32_t)strtoul(arg, NULL, 10);
        if (o->shrink == 0U) {
            argp_error(state, "shrink: given %s, expected 1 or more", arg);
        }
        return 0;
    case 't':
        o->seconds = strtod(arg, NULL);
        return 0;
    case 'n':
        o->n_threads = (uint32_t)strtoul(arg, NULL, 10);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_option k_options[] = {
    {"backend", 'b', "NAME", 0, "auto, cpu or cuda (default auto)", 0},
    {"exchange", 'e', "NAME", 0, "auto, mpi, nccl or nccl-collective, as fovead (default auto)", 0},
    {"check", 'c', NULL, 0, "Compare every sharding mode with one rank and with fp64; time nothing",
     0},
    {"only", 'o', "TEXT", 0, "Only cases whose table or name contains it", 0},
    {"json", 'j', "FILE", 0, "Write the figures as JSON", 0},
    {"csv", 'v', "FILE", 0, "Write the figures as CSV", 0},
    {"kv-memory", 'm', "BYTES", 0, "KV of a rank (default 85 % of a GPU's free memory; CPU 1g)", 0},
    {"move-memory", 'M', "BYTES", 0,
     "KV of prompts by context moves to the queries, through so much of each rank's KV", 0},
    {"rotate", 'r', "BYTES", 0,
     "KV that a rank reads before a layer's turn comes again (default 1g)", 0},
    {"shrink", 's', "N", 0, "Divide the tokens of every timed case by N", 0},
    {"seconds", 't', "S", 0, "Of timed steps, a case and rank count (default 1)", 0},
    {"threads", 'n', "N", 0, "CPU: compute threads of a rank (default: cores / ranks of the host)",
     0},
    {0},
};

/* ------------------------------------------------------------------ cases */

static double one_rank_us(const fv_scale_result_t *results, size_t n, const fv_scale_case_t *c)
{
    for (size_t i = 0; i < n; i++) {
        if ((results[i].spec == c) && (results[i].n_ranks == 1)) {
            return results[i].device.p50;
        }
    }
    return 0.0;
}

/* Tokens a second over those of the same context by heads, every rank with the whole latent, on as many ranks. */
static double over_heads(const fv_scale_result_t *results, size_t n, const fv_scale_result_t *x)
{
    for (size_t i = 0; i < n; i++) {
        const fv_scale_result_t *y = &results[i];

        if ((strcmp(y->spec->table, "mla") == 0) && (y->spec->axis == FV_SCALE_HEADS) &&
            (y->spec->n_tokens == x->spec->n_tokens) && (y->n_ranks == x->n_ranks)) {
            return fv_scale_tokens_per_second(x) / fv_scale_tokens_per_second(y);
        }
    }
    return 0.0;
}

/* 1, 2, 4 ... and N itself. */
static int next_count(int p, int n_ranks)
{
    return ((p < n_ranks) && (2 * p > n_ranks)) ? n_ranks : (2 * p);
}

static bool fits_axis(const fv_scale_case_t *c, int p)
{
    const int most = fv_scale_parts_max(c);

    if ((p == 1) && (c->axis == FV_SCALE_CONTEXT) && (strcmp(c->table, "mla") == 0)) {
        return false; /* by heads is the same there */
    }
    if (c->axis == FV_SCALE_SLICES) {
        return p % fv_scale_groups(c) == 0;
    }
    return (c->axis != FV_SCALE_HEADS) || (most % p == 0) || (p % most == 0);
}

/* Times are known to rank 0. */
static void
compare_with_others(fv_scale_result_t *x, const fv_scale_result_t *results, size_t n_results)
{
    const double one = one_rank_us(results, n_results, x->spec);

    if (strcmp(x->spec->table, "mla") == 0) { /* another batch on each count of ranks */
        x->ratio = over_heads(results, n_results, x);
        return;
    }
    x->ratio = (x->device.p50 > 0.0) ? (one / x->device.p50) : 0.0;
    x->over_us = (one > 0.0) ? (x->device.p50 - one) : 0.0;
}

static void
run_case(fv_scale_rank_t *r, const fv_scale_case_t *c, fv_scale_result_t *results, size_t *n)
{
    uint16_t *one_rank = NULL;

    for (int p = 1; p <= r->n_ranks; p = next_count(p, r->n_ranks)) {
        fv_scale_result_t *result = &results[*n];

        if ((*n == FV_SCALE_RESULTS_MAX) || !fits_axis(c, p) ||
            !fv_scale_case_run(r, c, p, &one_rank, result)) {
            continue;
        }
        (*n)++;
        if (r->rank == 0) {
            compare_with_others(result, results, *n);
            fv_scale_print(result);
            fv_scale_write(r, results,
                           *n); /* every time: what is ended from outside keeps its figures */
        }
    }
    free(one_rank);
}

static void run_cases(fv_scale_rank_t *r,
                      const fv_scale_case_t *cases,
                      size_t n_cases,
                      fv_scale_result_t *results,
                      size_t *n)
{
    const char *only = (r->options->only == NULL) ? "" : r->options->only;
    const char *table = "";

    for (size_t i = 0; i < n_cases; i++) {
        if ((strstr(cases[i].name, only) == NULL) && (strstr(cases[i].table, only) == NULL)) {
            continue;
        }
        if ((r->rank == 0) && (strcmp(table, cases[i].table) != 0)) {
            table = cases[i].table;
            fv_scale_print_head(table);
        }
        run_case(r, &cases[i], results, n);
    }
}

int main(int argc, char **argv)
{
    static fv_scale_result_t results[FV_SCALE_RESULTS_MAX];
    static fv_scale_rank_t rank;
    fv_scale_options_t options = {.backend = "auto",
                                  .exchange = "auto",
                                  .list = "time",
                                  .rotate_bytes = (uint64_t)1 << 30,
                                  .shrink = 1,
                                  .seconds = 1.0};
    const struct argp argp = {
        k_options, parse,
        NULL,      "Decode steps over 1, 2, 4 ... N ranks; start it under mpirun or srun",
        NULL,      NULL,
        NULL};
    size_t n_results = 0;
    int level = 0;

    (void)MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
    (void)argp_parse(&argp, argc, argv, 0, NULL, &options);
    fv_scale_rank_open(&rank, &options);
    if (rank.rank == 0) {
        fv_scale_print_machine(&rank);
    }
    if (strcmp(options.list, "check") == 0) {
        run_cases(&rank, k_check, sizeof(k_check) / sizeof(k_check[0]), results, &n_results);
        if (n_results == 0U) { /* tables without checks of their own want all */
            options.only = NULL;
            run_cases(&rank, k_check, sizeof(k_check) / sizeof(k_check[0]), results, &n_results);
        }
    } else {
        run_cases(&rank, k_time, sizeof(k_time) / sizeof(k_time[0]), results, &n_results);
    }
    if (rank.rank == 0) {
        (void)printf("%zu results\n", n_results);
    }
    fv_scale_rank_close(&rank);
    (void)MPI_Finalize();
    return (n_results > 0U) ? 0 : 1;
}
