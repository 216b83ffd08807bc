/*
 * bench_kernels_cuda.c - the lean kernel beside the GPU's own streaming read.
 *
 * Every case is compared with an fp64 reference on the GPU before it is timed; a wrong kernel is not timed. A case has
 * n_sets copies of its batch in pages of their own, over 1 GiB or more, so that L2 serves none of it. Time = a CUDA
 * graph of launches that walk over the sets, median of REPLAYS, divided by the launches: GPU time of a call without
 * launch gaps, planning and copies (which are made once, before). The floor is measured in the same run:
 *
 *     bytes = sum over items of n_kv_heads * kv_end * 2 * head_dim * 2      (K and V, bf16)
 *     floor = 1.4 us + bytes / streaming read
 *
 * Peers: the best of any kernel that was measured on an H100 (docs/gpu.md), as microseconds: quoted on an H100 only.
 *
 * FV_BENCH_TUNE="name=value,...;name=value,..." times each case under each of these variants of fv_lean_tuning_t; an
 * empty one is the shipped one.
 */
#include "bench/cuda_peak.h"
#include "kernels/backend_cuda.h"
#include "tests/support/attn_case.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ITEMS_MAX  64
#define SETS_MAX   64
#define REPLAYS    5
#define SET_BYTES  ((double)((size_t)1 << 30))
#define READ_BYTES ((size_t)4 << 30)
#define N_READS    4U
#define LAUNCH_US  1.4
#define HEAD_DIM   128
#define PAGE_BYTES ((size_t)FV_PAGE_TOKENS * 2U * HEAD_DIM * 2U)

#define ROW_TOLERANCE 6e-3 /* relative to the row: bf16 results */

typedef enum placement {
    SHUFFLED, /* anywhere in the arena */
    REGULAR,  /* one page in 22 */
    IN_ORDER, /* one after another */
} placement_t;

typedef struct bench_case {
    const char *name;
    int32_t n_kv_heads, group, n_items;
    int64_t kv_end;    /* uniform; 0: ragged */
    int64_t low, high; /* ragged: log-spaced; low 0: 1 of `high`, the others of 1024 */
    placement_t placement;
    double peer_us; /* 0: none known */
} bench_case_t;

#define K 1024
static const bench_case_t k_cases[] = {
    {"gqa32/8 b1 4k", 8, 4, 1, 4 * K, 0, 0, SHUFFLED, 11.8},
    {"gqa32/8 b1 32k", 8, 4, 1, 32 * K, 0, 0, SHUFFLED, 51.0},
    {"gqa32/8 b1 128k", 8, 4, 1, 128 * K, 0, 0, SHUFFLED, 179.3},
    {"gqa32/8 b1 512k", 8, 4, 1, 512 * K, 0, 0, SHUFFLED, 694.9},
    {"gqa32/8 b4 4k", 8, 4, 4, 4 * K, 0, 0, SHUFFLED, 29.2},
    {"gqa32/8 b4 32k", 8, 4, 4, 32 * K, 0, 0, SHUFFLED, 179.3},
    {"gqa32/8 b4 128k", 8, 4, 4, 128 * K, 0, 0, SHUFFLED, 696.1},
    {"gqa32/8 b4 512k", 8, 4, 4, 512 * K, 0, 0, SHUFFLED, 2765.4},
    {"gqa32/8 b16 4k", 8, 4, 16, 4 * K, 0, 0, SHUFFLED, 89.2},
    {"gqa32/8 b16 32k", 8, 4, 16, 32 * K, 0, 0, SHUFFLED, 685.0},
    {"gqa32/8 b16 128k", 8, 4, 16, 128 * K, 0, 0, SHUFFLED, 2744.8},
    {"gqa32/8 b16 512k", 8, 4, 16, 512 * K, 0, 0, SHUFFLED, 11238.2},
    {"gqa32/8 b64 4k", 8, 4, 64, 4 * K, 0, 0, SHUFFLED, 350.0},
    {"gqa32/8 b64 32k", 8, 4, 64, 32 * K, 0, 0, SHUFFLED, 2762.2},
    {"gqa32/8 b64 128k", 8, 4, 64, 128 * K, 0, 0, SHUFFLED, 11166.6},
    {"gqa32/8 ragged16 1k..256k", 8, 4, 16, 0, 1 * K, 256 * K, SHUFFLED, 1159.2},
    {"gqa32/8 ragged64 1k..64k", 8, 4, 64, 0, 1 * K, 64 * K, SHUFFLED, 1395.0},
    {"gqa32/8 1x256k + 15x1k", 8, 4, 16, 0, 0, 256 * K, SHUFFLED, 0},
    {"gqa32/8 b16 32k regular", 8, 4, 16, 32 * K, 0, 0, REGULAR, 0},
    {"gqa32/8 b16 32k in order", 8, 4, 16, 32 * K, 0, 0, IN_ORDER, 0},
    {"mha32/32 b1 4k", 32, 1, 1, 4 * K, 0, 0, SHUFFLED, 28.6},
    {"mha32/32 b1 32k", 32, 1, 1, 32 * K, 0, 0, SHUFFLED, 178.9},
    {"mha32/32 b1 128k", 32, 1, 1, 128 * K, 0, 0, SHUFFLED, 698.8},
    {"mha32/32 b1 512k", 32, 1, 1, 512 * K, 0, 0, SHUFFLED, 2813.0},
    {"mha32/32 b4 4k", 32, 1, 4, 4 * K, 0, 0, SHUFFLED, 93.3},
    {"mha32/32 b4 32k", 32, 1, 4, 32 * K, 0, 0, SHUFFLED, 701.6},
    {"mha32/32 b16 4k", 32, 1, 16, 4 * K, 0, 0, SHUFFLED, 349.8},
    {"mha32/32 b16 32k", 32, 1, 16, 32 * K, 0, 0, SHUFFLED, 2765.0},
    {"mha32/32 b64 4k", 32, 1, 64, 4 * K, 0, 0, SHUFFLED, 1380.1},
    {"mha32/32 ragged16 1k..256k", 32, 1, 16, 0, 1 * K, 256 * K, SHUFFLED, 4540.6},
    {"mha32/32 ragged64 1k..64k", 32, 1, 64, 0, 1 * K, 64 * K, SHUFFLED, 5315.9},
    {"mqa32/1 b1 4k", 1, 32, 1, 4 * K, 0, 0, SHUFFLED, 9.4},
    {"mqa32/1 b1 32k", 1, 32, 1, 32 * K, 0, 0, SHUFFLED, 14.4},
    {"mqa32/1 b1 128k", 1, 32, 1, 128 * K, 0, 0, SHUFFLED, 39.5},
    {"mqa32/1 b1 512k", 1, 32, 1, 512 * K, 0, 0, SHUFFLED, 104.7},
    {"mqa32/1 b4 4k", 1, 32, 4, 4 * K, 0, 0, SHUFFLED, 11.4},
    {"mqa32/1 b4 32k", 1, 32, 4, 32 * K, 0, 0, SHUFFLED, 35.0},
    {"mqa32/1 b4 128k", 1, 32, 4, 128 * K, 0, 0, SHUFFLED, 103.7},
    {"mqa32/1 b16 4k", 1, 32, 16, 4 * K, 0, 0, SHUFFLED, 20.6},
    {"mqa32/1 b16 32k", 1, 32, 16, 32 * K, 0, 0, SHUFFLED, 99.5},
    {"mqa32/1 b16 128k", 1, 32, 16, 128 * K, 0, 0, SHUFFLED, 365.2},
    {"mqa32/1 b64 4k", 1, 32, 64, 4 * K, 0, 0, SHUFFLED, 55.1},
    {"mqa32/1 b64 32k", 1, 32, 64, 32 * K, 0, 0, SHUFFLED, 358.6},
    {"mqa32/1 b64 128k", 1, 32, 64, 128 * K, 0, 0, SHUFFLED, 1415.9},
    {"mqa32/1 ragged16 1k..256k", 1, 32, 16, 0, 1 * K, 256 * K, SHUFFLED, 158.2},
    {"mqa32/1 ragged64 1k..64k", 1, 32, 64, 0, 1 * K, 64 * K, SHUFFLED, 190.3},
};

typedef struct bench {
    fv_backend_t *backend;
    uint32_t *order; /* a permutation of the arena's pages */
    size_t n_pages;
    fv_page_ref_t *tables; /* of all sets of the case */
    size_t tables_max;
    uint16_t *q, *out; /* pinned, [items][32, HEAD_DIM], shared by the sets */
    int64_t kv_end[ITEMS_MAX];
    double bytes; /* of one set */
    size_t set_pages, n_sets;
    fv_lean_launch_t launches[SETS_MAX];
    fv_lean_tuning_t tuning; /* the shipped one */
    bool is_h100;
    double read_gbps;
    FILE *json;
} bench_t;

static void die(const char *what)
{
    (void)fprintf(stderr, "bench_kernels_cuda: %s: %s\n", what, fv_error_context());
    exit(1);
}

static void check(fv_status_t status, const char *what)
{
    if (status != FV_OK) {
        die(what);
    }
}

static void check_cuda(cudaError_t error, const char *what)
{
    check(fv_cuda_check(error, what), what);
}

static void *must_alloc(size_t n, size_t size)
{
    void *memory = calloc(n, size);

    if (memory == NULL) {
        die("no memory");
    }
    return memory;
}

static int compare_double(const void *a, const void *b)
{
    const double x = *(const double *)a;
    const double y = *(const double *)b;

    return (x > y) - (x < y);
}

/* Seconds of `n` runs of a captured graph: the median. */
static double time_graph(bench_t *b, cudaGraph_t graph)
{
    cudaGraphExec_t exec = NULL;
    cudaEvent_t from = NULL;
    cudaEvent_t to = NULL;
    double ms[REPLAYS];

    check_cuda(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
    check_cuda(cudaEventCreate(&from), "event");
    check_cuda(cudaEventCreate(&to), "event");
    check_cuda(cudaGraphLaunch(exec, b->backend->stream), "warm up");
    for (int i = 0; i < REPLAYS; i++) {
        float elapsed = 0.0F;

        check_cuda(cudaEventRecord(from, b->backend->stream), "record");
        check_cuda(cudaGraphLaunch(exec, b->backend->stream), "replay");
        check_cuda(cudaEventRecord(to, b->backend->stream), "record");
        check_cuda(cudaEventSynchronize(to), "synchronize");
        check_cuda(cudaEventElapsedTime(&elapsed, from, to), "elapsed");
        ms[i] = (double)elapsed;
    }
    qsort(ms, REPLAYS, sizeof(ms[0]), compare_double);
    check_cuda(cudaEventDestroy(from), "event");
    check_cuda(cudaEventDestroy(to), "event");
    check_cuda(cudaGraphExecDestroy(exec), "graph");
    check_cuda(cudaGraphDestroy(graph), "graph");
    return ms[REPLAYS / 2] * 1e-3;
}

static void measure_read(bench_t *b)
{
    cudaGraph_t graph = NULL;

    check_cuda(cudaStreamBeginCapture(b->backend->stream, cudaStreamCaptureModeThreadLocal),
               "capture");
    for (size_t i = 0; i < N_READS; i++) {
        check_cuda(fv_peak_read(b->backend->arena + i * READ_BYTES, READ_BYTES, b->backend->n_sms,
                                b->backend->arrived, b->backend->stream),
                   "read");
    }
    check_cuda(cudaStreamEndCapture(b->backend->stream, &graph), "capture");
    b->read_gbps = (double)(N_READS * READ_BYTES) / time_graph(b, graph) * 1e-9;
}

static void choose_lengths(bench_t *b, const bench_case_t *c)
{
    b->set_pages = 0;
    b->bytes = 0.0;
    for (int32_t i = 0; i < c->n_items; i++) {
        int64_t n = c->kv_end;

        if ((n == 0) && (c->low == 0)) {
            n = (i == c->n_items / 2) ? c->high : 1024;
        } else if (n == 0) {
            /* log-spaced, shuffled: 37 is prime to 16 and 64 */
            const double at = (double)((i * 37 + 11) % c->n_items) / (double)(c->n_items - 1);

            n = (int64_t)llround((double)c->low * pow((double)c->high / (double)c->low, at));
        }
        b->kv_end[i] = n;
        b->bytes += (double)n * (double)c->n_kv_heads * 2.0 * HEAD_DIM * 2.0;
        b->set_pages += (size_t)((n + FV_PAGE_TOKENS - 1) / FV_PAGE_TOKENS) * (size_t)c->n_kv_heads;
    }
    b->n_sets = (size_t)ceil(SET_BYTES / b->bytes) + 1U;
    b->n_sets = (b->n_sets > SETS_MAX) ? SETS_MAX : b->n_sets;
    while ((b->n_sets > 1) && (b->n_sets * b->set_pages > b->n_pages)) {
        b->n_sets--;
    }
}

/* Page `i` of the pages that a case takes. */
static fv_page_ref_t place(const bench_t *b, placement_t placement, size_t i)
{
    size_t page = i;

    if (placement == SHUFFLED) {
        page = b->order[i];
    } else if (placement == REGULAR) {
        const size_t lane = b->n_pages / 22U;

        page = (i % lane) * 22U + i / lane;
    }
    return (fv_page_ref_t)(page * (PAGE_BYTES / FV_PAGE_UNIT));
}

/* Stages every set; launches point into the staging area, which stays as it is until finish(). */
static void plan_sets(bench_t *b, const bench_case_t *c)
{
    const size_t n_heads = (size_t)(c->n_kv_heads * c->group);
    static fv_attn_item_t items[ITEMS_MAX];
    size_t used = 0;

    if (b->n_sets * b->set_pages > b->tables_max) {
        die("tables");
    }
    check(fv_cuda_finish(b->backend, NULL, NULL), "finish");
    /* so that no set's staging moves another's */
    check(fv_cuda_reserve(b->backend, (b->n_sets * b->set_pages * 4U) +
                                          (b->n_sets * (size_t)c->n_items << 17U)),
          "reserve");
    for (size_t set = 0; set < b->n_sets; set++) {
        memset(items, 0, sizeof(items));
        for (int32_t i = 0; i < c->n_items; i++) {
            const size_t n = (size_t)((b->kv_end[i] + FV_PAGE_TOKENS - 1) / FV_PAGE_TOKENS);
            fv_attn_item_t *item = &items[i];

            item->n_tokens = 1;
            item->n_kv_heads = c->n_kv_heads;
            item->group = c->group;
            item->head_dim_qk = HEAD_DIM;
            item->head_dim_v = HEAD_DIM;
            item->io_dtype = FV_DTYPE_BF16;
            item->kv_dtype = FV_DTYPE_BF16;
            item->softmax_scale = 1.0F / sqrtf((float)HEAD_DIM);
            item->causal = true;
            item->shard.shard_tokens = FV_PAGE_TOKENS;
            item->shard.n_parts = 1;
            item->position = b->kv_end[i] - 1;
            item->kv_end = b->kv_end[i];
            item->q = b->q + (size_t)i * n_heads * HEAD_DIM;
            item->q_token_bytes = n_heads * HEAD_DIM * 2U;
            item->pages = b->tables + used;
            item->pages_head_stride = n;
            item->out = b->out + (size_t)i * n_heads * HEAD_DIM;
            item->out_token_bytes = item->q_token_bytes;
            for (size_t p = 0; p < n * (size_t)c->n_kv_heads; p++) {
                b->tables[used + p] = place(b, c->placement, used + p);
            }
            used += n * (size_t)c->n_kv_heads;
        }
        check(fv_cuda_attend_plan(b->backend, items, (size_t)c->n_items), "plan");
        if (b->backend->n_launches != 1) {
            die("one launch expected");
        }
        b->launches[set] = b->backend->launches[0];
    }
    check_cuda(cudaStreamSynchronize(b->backend->stream), "staging");
}

/* Largest error of a row against the reference, relative to the row's norm. */
static double row_error(bench_t *b, const bench_case_t *c, int32_t item, int32_t head)
{
    const size_t n_heads = (size_t)(c->n_kv_heads * c->group);
    const size_t at = ((size_t)item * n_heads + (size_t)head) * HEAD_DIM;
    const size_t n = (size_t)((b->kv_end[item] + FV_PAGE_TOKENS - 1) / FV_PAGE_TOKENS);
    size_t table = 0;
    uint8_t *device = NULL;
    double want[HEAD_DIM + 1];
    double error = 0.0;
    double norm = 0.0;
    fv_peak_row_t row = {
        .arena = b->backend->arena, .n_tokens = b->kv_end[item], .head_dim = HEAD_DIM};

    for (int32_t i = 0; i < item; i++) {
        table +=
            (size_t)((b->kv_end[i] + FV_PAGE_TOKENS - 1) / FV_PAGE_TOKENS) * (size_t)c->n_kv_heads;
    }
    table += (size_t)(head / c->group) * n;
    check_cuda(cudaMalloc((void **)&device, n * 4U + 4096U), "verify");
    check_cuda(cudaMemcpy(device + 4096, b->tables + table, n * 4U, cudaMemcpyHostToDevice),
               "verify");
    row.pages = (const void *)(device + 4096);
    row.q = b->q + at; /* pinned: the device reaches it */
    row.out = (void *)device;
    row.scale = (double)(1.0F / sqrtf((float)HEAD_DIM));
    check_cuda(fv_peak_reference(&row, b->backend->stream), "reference");
    check_cuda(cudaStreamSynchronize(b->backend->stream), "reference");
    check_cuda(cudaMemcpy(want, device, sizeof(want), cudaMemcpyDeviceToHost), "verify");
    check_cuda(cudaFree(device), "verify");
    for (size_t d = 0; d < HEAD_DIM; d++) {
        const double got = (double)fv_bf16_to_f32(b->out[at + d]);

        error += (got - want[d]) * (got - want[d]);
        norm += want[d] * want[d];
    }
    return sqrt(error / norm); /* NaN compares false below */
}

/* First head of the first item and last of the last and of a middle one, of set 0. */
static double verify(bench_t *b, const bench_case_t *c)
{
    const int32_t n_heads = c->n_kv_heads * c->group;
    double worst = 0.0;

    memset(b->out, 0xff, (size_t)c->n_items * (size_t)n_heads * HEAD_DIM * 2U);
    check(fv_cuda_attend_start(b->backend, &b->launches[0], 1), "launch");
    check_cuda(cudaStreamSynchronize(b->backend->stream), "launch");
    for (int i = 0; i < 3; i++) {
        const int32_t item = (c->n_items - 1) * i / 2;
        const double error = row_error(b, c, item, (n_heads - 1) * i / 2);

        if (!(error <= ROW_TOLERANCE)) {
            (void)printf("%s: item %d: error %.3g of the row, expected at most %g\n", c->name, item,
                         error, ROW_TOLERANCE);
            exit(1);
        }
        worst = fmax(worst, error);
    }
    return worst;
}

#if defined(FV_LEAN_TRACE)
/* Where a launch's time goes, CTA by CTA: microseconds since the first CTA began. */
static void print_trace(bench_t *b)
{
    static uint64_t rows[1024][8];
    static double column[1024];
    static const char *const k_names[] = {"begin", "first K", "tiles done",
                                          "end",   "",        "pieces there"};
    const size_t n = b->launches[0].n_ctas;
    uint64_t *trace = NULL;
    uint64_t begin = UINT64_MAX;

    check_cuda(cudaMalloc((void **)&trace, sizeof(rows)), "trace");
    for (size_t i = 0; i < 3; i++) { /* the last one is looked at */
        fv_lean_launch_t launch = b->launches[i % b->n_sets];

        check_cuda(cudaMemsetAsync(trace, 0, sizeof(rows), b->backend->stream), "trace");
        launch.trace = trace;
        check(fv_cuda_attend_start(b->backend, &launch, 1), "launch");
    }
    check_cuda(cudaStreamSynchronize(b->backend->stream), "trace");
    check_cuda(cudaMemcpy(rows, trace, n * sizeof(rows[0]), cudaMemcpyDeviceToHost), "trace");
    check_cuda(cudaFree(trace), "trace");
    for (size_t i = 0; i < n; i++) {
        begin = (rows[i][0] < begin) ? rows[i][0] : begin;
    }
    for (int k = 0; k < 8; k++) {
        for (size_t i = 0; i < n; i++) {
            column[i] = (rows[i][k] == 0) ? 0.0 : ((double)(rows[i][k] - begin) * 1e-3);
        }
        if (k == 4) { /* which SM */
            continue;
        }
        qsort(column, n, sizeof(column[0]), compare_double);
        (void)printf("    %-12s min %7.1f p10 %7.1f p50 %7.1f p90 %7.1f max %7.1f\n", k_names[k],
                     column[0], column[n / 10], column[n / 2], column[n * 9 / 10], column[n - 1]);
    }
}
#endif

static double time_case(bench_t *b)
{
    /* enough launches that the graph's own start does not count */
    const size_t least = (b->bytes > 3e9) ? 8U : 40U;
    const size_t rounds = (least + b->n_sets - 1U) / b->n_sets;
    cudaGraph_t graph = NULL;

    check_cuda(cudaStreamBeginCapture(b->backend->stream, cudaStreamCaptureModeThreadLocal),
               "capture");
    for (size_t i = 0; i < rounds * b->n_sets; i++) {
        check(fv_cuda_attend_start(b->backend, &b->launches[i % b->n_sets], 1), "launch");
    }
    check_cuda(cudaStreamEndCapture(b->backend->stream, &graph), "capture");
    return time_graph(b, graph) / (double)(rounds * b->n_sets);
}

/* What bench/peers gives the others, too. */
static void print_shape(const bench_t *b, const bench_case_t *c)
{
    (void)fprintf(b->json, "\"kv_heads\":%d,\"group\":%d,\"head_dim\":%d,\"lengths\":[",
                  c->n_kv_heads, c->group, HEAD_DIM);
    for (int32_t i = 0; i < c->n_items; i++) {
        (void)fprintf(b->json, "%s%lld", (i == 0) ? "" : ",", (long long)b->kv_end[i]);
    }
    (void)fprintf(b->json, "]}\n");
}

static void run_case(bench_t *b, const bench_case_t *c, const char *variant)
{
    const double peer_us = b->is_h100 ? c->peer_us : 0.0;
    double error = 0.0;
    double us = 0.0;
    double floor_us = 0.0;

    choose_lengths(b, c);
    if (b->set_pages > b->n_pages) {
        (void)printf("%-28s needs %.0f GB\n", c->name, b->bytes * 1e-9);
        return;
    }
    plan_sets(b, c);
    error = verify(b, c);
    us = time_case(b) * 1e6;
    floor_us = LAUNCH_US + b->bytes / b->read_gbps * 1e-3;
    (void)printf("%-28s %8.1f MB %9.1f us %7.0f GB/s floor %9.1f x%.3f", c->name, b->bytes * 1e-6,
                 us, b->bytes / us * 1e-3, floor_us, us / floor_us);
    if (peer_us > 0.0) {
        (void)printf("  peer %8.1f (%.2f of it)", peer_us, us / peer_us);
    }
    (void)printf("  sets %zu err %.1e %s\n", b->n_sets, error, variant);
    if (b->json != NULL) {
        (void)fprintf(
            b->json,
            "{\"case\":\"%s\",\"bytes\":%.0f,\"us\":%.2f,\"gbps\":%.1f,\"floor_us\":%.2f,\"ratio\":%.4f,"
            "\"peer_us\":%.1f,\"sets\":%zu,\"row_error\":%.2e,\"read_gbps\":%.1f,\"variant\":\"%s\",",
            c->name, b->bytes, us, b->bytes / us * 1e-3, floor_us, us / floor_us, peer_us,
            b->n_sets, error, b->read_gbps, variant);
        print_shape(b, c);
    }
#if defined(FV_LEAN_TRACE)
    print_trace(b);
#endif
    (void)fflush(stdout);
}

/* Reads one variant, up to ';' or the end, into the backend's tuning; returns what follows it, or NULL. */
static const char *read_variant(bench_t *b, const char *text, char *name, size_t n_name)
{
    static const struct {
        const char *name;
        size_t offset;
    } k_fields[] = {
        {"ctas16", offsetof(fv_lean_tuning_t, ctas_max[0])},
        {"ctas32", offsetof(fv_lean_tuning_t, ctas_max[1])},
        {"ahead", offsetof(fv_lean_tuning_t, bytes_ahead)},
        {"rounds", offsetof(fv_lean_tuning_t, rounds_min[0])},
        {"rounds32", offsetof(fv_lean_tuning_t, rounds_min[1])},
        {"first", offsetof(fv_lean_tuning_t, first_percent)},
        {"tail", offsetof(fv_lean_tuning_t, tail_tiles[0])},
        {"tail32", offsetof(fv_lean_tuning_t, tail_tiles[1])},
        {"early", offsetof(fv_lean_tuning_t, early_bytes)},
        {"last", offsetof(fv_lean_tuning_t, tail_bytes)},
        {"coop", offsetof(fv_lean_tuning_t, is_cooperative)},
        {"direct", offsetof(fv_lean_tuning_t, is_direct)},
        {"dependent", offsetof(fv_lean_tuning_t, is_dependent)},
    };
    const size_t length = strcspn(text, ";");
    const char *at = text;

    (void)snprintf(name, n_name, "%.*s", (int)length, text);
    b->backend->tuning = b->tuning;
    while (at < text + length) {
        const size_t n = strcspn(at, "=");
        char *end = NULL;

        for (size_t i = 0; i < sizeof(k_fields) / sizeof(k_fields[0]); i++) {
            if ((strlen(k_fields[i].name) == n) && (strncmp(k_fields[i].name, at, n) == 0)) {
                const uint32_t value = (uint32_t)strtoul(at + n + 1U, &end, 10);

                memcpy((char *)&b->backend->tuning + k_fields[i].offset, &value, sizeof(value));
            }
        }
        if (end == NULL) {
            die("FV_BENCH_TUNE: unknown field");
        }
        at = (*end == ',') ? (end + 1) : end;
    }
    return (text[length] == ';') ? (text + length + 1U) : NULL;
}

/* A case as shipped, or under each variant asked for. */
static void run_variants(bench_t *b, const bench_case_t *c)
{
    const char *text = (getenv("FV_BENCH_TUNE") != NULL) ? getenv("FV_BENCH_TUNE") : "";
    char name[128];

    while (text != NULL) {
        text = read_variant(b, text, name, sizeof(name));
        run_case(b, c, name);
    }
}

static void prepare(bench_t *b, size_t arena_bytes)
{
    fv_backend_config_t config = {.kv_arena_bytes = arena_bytes / PAGE_BYTES * PAGE_BYTES};
    fv_rng_t rng = {20261122};
    void *memory = NULL;

    check(fv_backend_cuda.create(&config, &b->backend), "create");
    b->tuning = b->backend->tuning;
    b->n_pages = config.kv_arena_bytes / PAGE_BYTES;
    b->order = must_alloc(b->n_pages, sizeof(*b->order));
    for (size_t i = 0; i < b->n_pages; i++) {
        b->order[i] = (uint32_t)i;
    }
    for (size_t i = b->n_pages; i > 1U; i--) {
        const size_t j = (size_t)(fv_rng_next(&rng) % i);
        const uint32_t swap = b->order[i - 1U];

        b->order[i - 1U] = b->order[j];
        b->order[j] = swap;
    }
    b->tables_max = b->n_pages;
    b->tables = must_alloc(b->tables_max, sizeof(*b->tables));
    check_cuda(
        fv_peak_fill_bf16(b->backend->arena, config.kv_arena_bytes / 2U, 1, b->backend->stream),
        "fill");
    check(fv_backend_cuda.host_alloc(b->backend, (size_t)ITEMS_MAX * 32U * HEAD_DIM * 2U, &memory),
          "q");
    b->q = memory;
    check(fv_backend_cuda.host_alloc(b->backend, (size_t)ITEMS_MAX * 32U * HEAD_DIM * 2U, &memory),
          "out");
    b->out = memory;
    for (size_t i = 0; i < (size_t)ITEMS_MAX * 32U * HEAD_DIM; i++) {
        fv_store_element(b->q, FV_DTYPE_BF16, i, fv_rng_normal(&rng));
    }
    check(fv_cuda_finish(b->backend, NULL, NULL), "fill");
}

/* True if `name` contains one of the texts that `only` lists between bars; an empty list means all. */
static bool is_wanted(const char *name, const char *only)
{
    while (*only != '\0') {
        const size_t n = strcspn(only, "|");

        for (const char *at = name; *at != '\0'; at++) {
            if (strncmp(at, only, n) == 0) {
                return true;
            }
        }
        only += n + ((only[n] == '|') ? 1U : 0U);
        if (*only == '\0') {
            return false;
        }
    }
    return true;
}

/* bench_kernels_cuda [JSON file or - [GiB of KV [only cases whose name contains this|or this]]] */
int main(int argc, char **argv)
{
    static bench_t b;
    fv_device_info_t info;
    const char *only = (argc > 3) ? argv[3] : "";
    const double gib = (argc > 2) ? strtod(argv[2], NULL) : 0.0;
    size_t n_bytes = (size_t)(gib * (double)((size_t)1 << 30));

    if (!fv_backend_cuda_is_visible()) {
        (void)printf("no GPU\n");
        return 77;
    }
    if (n_bytes == 0) {
        n_bytes = fv_backend_cuda_memory_free(0) / 100U * 90U;
    }
    if (n_bytes < N_READS * READ_BYTES) {
        die("GPU memory: expected 16 GiB or more, which the streaming read walks over");
    }
    b.json = ((argc > 1) && (strcmp(argv[1], "-") != 0)) ? fopen(argv[1], "w") : NULL;
    prepare(&b, n_bytes);
    fv_backend_cuda.describe(b.backend, &info);
    b.is_h100 = strstr(info.device, "H100") != NULL;
    measure_read(&b);
    (void)printf("%s, KV %.1f GB, streaming read %.0f GB/s\n", info.device,
                 (double)info.kv_arena_bytes * 1e-9, b.read_gbps);
    for (size_t i = 0; i < sizeof(k_cases) / sizeof(k_cases[0]); i++) {
        if (is_wanted(k_cases[i].name, only)) {
            run_variants(&b, &k_cases[i]);
        }
    }
    measure_read(&b);
    (void)printf("streaming read again %.0f GB/s\n", b.read_gbps);
    if (b.json != NULL) {
        (void)fclose(b.json);
    }
    fv_backend_cuda.destroy(b.backend);
    free(b.order);
    free(b.tables);
    return 0;
}
