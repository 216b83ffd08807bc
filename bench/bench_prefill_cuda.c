/*
 * bench_prefill_cuda.c - the prefill kernel alone on one GPU: TFLOP/s from shuffled pages, beside a ceiling of the same run.
 *
 *   bench_prefill_cuda [JSON lines file or - [only cases whose name contains this [lean]]]
 *
 * bf16, 32 query and 8 KV heads, d = 128, random data; Q and results in device memory, as in the peers' benchmarks. GPU
 * time of a launch: median of LAUNCHES, by events. FLOP: 4 pairs Hq d, a causal mask counted as half of what it covers, S2
 * by its live blocks of 64 x 64, as S2's figures count. Three rows of each case are compared with an fp64 reference first. Ceiling: a loop of
 * wgmma m64n256k16 on random operands in shared memory, on all SMs.
 */
#include "bench/cuda_peak.h"
#include "kernels/backend_cuda.h"
#include "tests/support/attn_case.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define K             1024
#define HEAD_DIM      128
#define N_HEADS       32
#define N_KV_HEADS    8
#define ROW_BYTES     ((size_t)N_HEADS * HEAD_DIM * 2U)
#define PAGE_BYTES    ((size_t)2 * HEAD_DIM * 2U * FV_PAGE_TOKENS)
#define ITEMS_MAX     16
#define TOKENS_MAX    ((size_t)128 * K) /* of a case, queries */
#define ARENA_BYTES   ((size_t)2 << 30)
#define LAUNCHES      9
#define ROW_TOLERANCE 1e-2

typedef struct bench_case {
    const char *name;
    int32_t n_items, n_tokens;
    int64_t position; /* of the first query token: what was prefilled before */
    bool causal;
    bool is_s2; /* blocks of 64, 8 local, stride 16, a pattern for each KV head */
} bench_case_t;

static const bench_case_t k_cases[] = {
    {"causal b4 4k", 4, 4 * K, 0, true, false},
    {"causal b1 16k", 1, 16 * K, 0, true, false},
    {"causal b1 32k", 1, 32 * K, 0, true, false},
    {"causal b1 128k", 1, 128 * K, 0, true, false},
    {"full b4 4k", 4, 4 * K, 0, false, false},
    {"full b1 16k", 1, 16 * K, 0, false, false},
    {"full b1 32k", 1, 32 * K, 0, false, false},
    {"chunk 2k at 30k", 1, 2 * K, 30 * K, true, false},
    {"chunk 512 at 32k", 1, 512, 32 * K, true, false},
    {"s2 b1 16k", 1, 16 * K, 0, true, true},
    {"s2 b1 32k", 1, 32 * K, 0, true, true},
    {"s2 b1 128k", 1, 128 * K, 0, true, true},
};

typedef struct bench {
    fv_backend_t *backend;
    uint32_t *order;
    fv_page_ref_t *tables;
    fv_attn_item_t items[ITEMS_MAX];
    uint8_t *q, *out; /* device */
    bool is_lean;     /* the other kernel, for comparison */
    FILE *json;
} bench_t;

static void die(const char *what)
{
    (void)fprintf(stderr, "bench_prefill_cuda: %s: %s\n", what, fv_error_context());
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

static int compare_double(const void *a, const void *b)
{
    const double x = *(const double *)a;
    const double y = *(const double *)b;

    return (x > y) - (x < y);
}

static void *device_tensor(bench_t *b, size_t n_bytes, uint32_t seed)
{
    void *p = NULL;

    check_cuda(cudaMalloc(&p, n_bytes), "tensor");
    check_cuda(fv_peak_fill_bf16(p, n_bytes / 2U, seed, b->backend->stream), "fill");
    /* the device reaches it at the same address: results go straight there */
    check(fv_cuda_pinned_add(b->backend, p, n_bytes), "tensor");
    return p;
}

static void prepare(bench_t *b)
{
    fv_backend_config_t config = {.kv_arena_bytes = ARENA_BYTES};
    const size_t n_pages = ARENA_BYTES / PAGE_BYTES;
    fv_rng_t rng = {20261122};

    check(fv_backend_cuda.create(&config, &b->backend), "create");
    b->order = calloc(n_pages, sizeof(*b->order));
    b->tables = calloc(n_pages, sizeof(*b->tables));
    if ((b->order == NULL) || (b->tables == NULL)) {
        die("no memory");
    }
    for (size_t i = 0; i < n_pages; i++) {
        b->order[i] = (uint32_t)i;
    }
    for (size_t i = n_pages; i > 1U; i--) {
        const size_t j = (size_t)(fv_rng_next(&rng) % i);
        const uint32_t swap = b->order[i - 1U];

        b->order[i - 1U] = b->order[j];
        b->order[j] = swap;
    }
    for (size_t i = 0; i < n_pages; i++) {
        b->tables[i] = (fv_page_ref_t)(b->order[i] * (PAGE_BYTES / FV_PAGE_UNIT));
    }
    check_cuda(fv_peak_fill_bf16(b->backend->arena, ARENA_BYTES / 2U, 1, b->backend->stream),
               "fill");
    b->q = device_tensor(b, TOKENS_MAX * ROW_BYTES, 2);
    b->out = device_tensor(b, TOKENS_MAX * ROW_BYTES, 3);
    check_cuda(cudaStreamSynchronize(b->backend->stream), "fill");
}

static fv_policy_t policy_of(const bench_case_t *c)
{
    fv_policy_t policy = {.kind = FV_POLICY_DENSE};

    if (c->is_s2 && fv_policy_preset("s2-16", &policy)) {
        policy.n_heads = N_KV_HEADS;
        policy.head_sliding_step = (policy.head_sliding_step == 0) ? 1 : policy.head_sliding_step;
    }
    return policy;
}

/* What query tokens [begin, end) of a head read. */
static fv_tile_query_t query_of(const bench_case_t *c, int64_t begin, int64_t end, int32_t head)
{
    return (fv_tile_query_t){.policy = policy_of(c),
                             .shard = {.shard_tokens = FV_PAGE_TOKENS, .n_parts = 1},
                             .q_begin = c->position + begin,
                             .q_end = c->position + end,
                             .kv_end = c->position + c->n_tokens,
                             .head = head / (N_HEADS / N_KV_HEADS),
                             .causal = c->causal};
}

/* Blocks of 64 x 64 that some row reads, over all query heads of an item. */
static double live_blocks(const bench_case_t *c)
{
    double n = 0.0;

    for (int32_t head = 0; head < N_HEADS; head++) {
        for (int64_t t = 0; t < c->n_tokens; t += FV_PAGE_TOKENS) {
            const fv_tile_query_t query = query_of(c, t, t + FV_PAGE_TOKENS, head);
            const fv_tile_list_t list = fv_tiles_make(&query);

            n += (double)fv_tiles_count(&list);
        }
    }
    return n;
}

static size_t pages_of(const bench_case_t *c)
{
    return (size_t)((c->position + c->n_tokens + FV_PAGE_TOKENS - 1) / FV_PAGE_TOKENS);
}

static void plan(bench_t *b, const bench_case_t *c)
{
    const size_t n_pages = pages_of(c);

    memset(b->items, 0, sizeof(b->items));
    for (int32_t i = 0; i < c->n_items; i++) {
        const size_t at = (size_t)i * (size_t)c->n_tokens * ROW_BYTES;

        b->items[i] = (fv_attn_item_t){
            .n_tokens = c->n_tokens,
            .n_kv_heads = N_KV_HEADS,
            .group = N_HEADS / N_KV_HEADS,
            .head_dim_qk = HEAD_DIM,
            .head_dim_v = HEAD_DIM,
            .io_dtype = FV_DTYPE_BF16,
            .kv_dtype = FV_DTYPE_BF16,
            .softmax_scale = 1.0F / sqrtf((float)HEAD_DIM),
            .causal = c->causal,
            .policy = policy_of(c),
            .shard = {.shard_tokens = FV_PAGE_TOKENS, .n_parts = 1},
            .position = c->position,
            .kv_end = c->position + c->n_tokens,
            .q = b->q + at,
            .q_token_bytes = ROW_BYTES,
            .pages = b->tables + (size_t)i * n_pages * N_KV_HEADS,
            .pages_head_stride = n_pages,
            .out = b->out + at,
            .out_token_bytes = ROW_BYTES,
        };
    }
    b->backend->prefill_units_min = b->is_lean ? UINT32_MAX : 1U;
    check(fv_cuda_finish(b->backend, NULL, NULL), "finish");
    check(fv_cuda_attend_plan(b->backend, b->items, (size_t)c->n_items), "plan");
    if ((b->backend->n_prefills != (b->is_lean ? 0U : 1U)) ||
        (b->backend->n_launches != (b->is_lean ? 1U : 0U))) {
        die("one launch expected");
    }
    check_cuda(cudaStreamSynchronize(b->backend->stream), "staging");
}

static void launch(bench_t *b)
{
    check(fv_cuda_attend_start(b->backend, b->backend->launches, b->backend->n_launches), "launch");
    check(fv_prefill_start(b->backend), "launch");
}

/* Error of one row against the reference, relative to the row's norm. */
static double
row_error(bench_t *b, const bench_case_t *c, int32_t item, int32_t token, int32_t head)
{
    const size_t at = ((size_t)item * (size_t)c->n_tokens + (size_t)token) * ROW_BYTES +
                      (size_t)head * HEAD_DIM * 2U;
    const fv_page_ref_t *table =
        b->items[item].pages + (size_t)(head / (N_HEADS / N_KV_HEADS)) * pages_of(c);
    const fv_tile_query_t query = query_of(c, token, token + 1, head);
    const fv_tile_list_t list = fv_tiles_make(&query);
    const size_t n = (size_t)fv_tiles_count(&list);
    fv_page_ref_t *pages = calloc(n, sizeof(*pages));
    fv_peak_row_t row = {.arena = b->backend->arena,
                         .q = (const void *)(b->q + at),
                         .head_dim = HEAD_DIM,
                         .scale = (double)b->items[item].softmax_scale};
    uint16_t got[HEAD_DIM];
    double want[HEAD_DIM + 1];
    uint8_t *device = NULL;
    double error = 0.0;
    double norm = 0.0;

    for (size_t i = 0; (pages != NULL) && (i < n); i++) {
        const fv_tile_t tile = fv_tile_at(&query, &list, (int32_t)i);

        pages[i] = table[tile.local_page];
        row.n_tokens +=
            fv_min64(FV_PAGE_TOKENS, fv_row_range(&query, query.q_begin).end - tile.begin);
    }
    check_cuda(cudaMalloc((void **)&device, n * 4U + 4096U), "verify");
    check_cuda(cudaMemcpy(device + 4096, pages, n * 4U, cudaMemcpyHostToDevice), "verify");
    free(pages);
    row.pages = (const void *)(device + 4096);
    row.out = (void *)device;
    check_cuda(fv_peak_reference(&row, b->backend->stream), "reference");
    check_cuda(cudaStreamSynchronize(b->backend->stream), "reference");
    check_cuda(cudaMemcpy(want, device, sizeof(want), cudaMemcpyDeviceToHost), "verify");
    check_cuda(cudaMemcpy(got, b->out + at, sizeof(got), cudaMemcpyDeviceToHost), "verify");
    check_cuda(cudaFree(device), "verify");
    for (size_t d = 0; d < HEAD_DIM; d++) {
        const double x = (double)fv_bf16_to_f32(got[d]);

        error += (x - want[d]) * (x - want[d]);
        norm += want[d] * want[d];
    }
    return sqrt(error / norm); /* NaN compares false below */
}

static double verify(bench_t *b, const bench_case_t *c)
{
    double worst = 0.0;

    check_cuda(cudaMemsetAsync(b->out, 0xff, (size_t)c->n_items * (size_t)c->n_tokens * ROW_BYTES,
                               b->backend->stream),
               "poison");
    launch(b);
    check_cuda(cudaStreamSynchronize(b->backend->stream), "launch");
    for (int32_t i = 0; i < 3; i++) {
        const double error = row_error(b, c, (c->n_items - 1) * i / 2, (c->n_tokens - 1) * i / 2,
                                       (N_HEADS - 1) * i / 2);

        if (!(error <= ROW_TOLERANCE)) {
            (void)printf("%s: row %d: error %.3g of the row, expected at most %g\n", c->name, i,
                         error, ROW_TOLERANCE);
            exit(1);
        }
        worst = fmax(worst, error);
    }
    return worst;
}

/* Seconds of one call of `work`: the median. */
static double time_of(bench_t *b, void (*work)(bench_t *))
{
    cudaEvent_t from = NULL;
    cudaEvent_t to = NULL;
    double ms[LAUNCHES];

    check_cuda(cudaEventCreate(&from), "event");
    check_cuda(cudaEventCreate(&to), "event");
    work(b);
    for (int i = 0; i < LAUNCHES; i++) {
        float elapsed = 0.0F;

        check_cuda(cudaEventRecord(from, b->backend->stream), "record");
        work(b);
        check_cuda(cudaEventRecord(to, b->backend->stream), "record");
        check_cuda(cudaEventSynchronize(to), "synchronize");
        check_cuda(cudaEventElapsedTime(&elapsed, from, to), "elapsed");
        ms[i] = (double)elapsed;
    }
    qsort(ms, LAUNCHES, sizeof(ms[0]), compare_double);
    check_cuda(cudaEventDestroy(from), "event");
    check_cuda(cudaEventDestroy(to), "event");
    return ms[LAUNCHES / 2] * 1e-3;
}

static void ceiling(bench_t *b)
{
    check_cuda(fv_peak_wgmma(b->q, FV_PEAK_WGMMA_STEPS, b->backend->n_sms, b->backend->arrived,
                             b->backend->stream),
               "ceiling");
}

static double ceiling_tflops(bench_t *b)
{
    return fv_peak_wgmma_flop(FV_PEAK_WGMMA_STEPS, b->backend->n_sms) / time_of(b, ceiling) * 1e-12;
}

static void run_case(bench_t *b, const bench_case_t *c)
{
    const double kv = (double)(c->position + c->n_tokens);
    const double covered = c->causal ? (kv - 0.5 * (double)c->n_tokens) : kv;
    const double blocks = (double)c->n_items * live_blocks(c);
    const double pairs = c->is_s2 ? (blocks * FV_PAGE_TOKENS * FV_PAGE_TOKENS)
                                  : (N_HEADS * (double)c->n_items * (double)c->n_tokens * covered);
    const double flop = 4.0 * HEAD_DIM * pairs;
    double error = 0.0;
    double seconds = 0.0;

    plan(b, c);
    error = verify(b, c);
    seconds = time_of(b, launch);
    (void)printf("%-18s %-7s %10.1f us %7.1f TFLOP/s err %.1e %.1f ns a block\n", c->name,
                 b->is_lean ? "lean" : "prefill", seconds * 1e6, flop / seconds * 1e-12, error,
                 seconds / blocks * 1e9);
    if (b->json != NULL) {
        (void)fprintf(b->json,
                      "{\"case\":\"%s\",\"kernel\":\"%s\",\"us\":%.1f,\"tflops\":%.1f,"
                      "\"row_error\":%.2e,\"live_blocks\":%.0f}\n",
                      c->name, b->is_lean ? "lean" : "prefill", seconds * 1e6,
                      flop / seconds * 1e-12, error, blocks);
    }
    (void)fflush(stdout);
}

int main(int argc, char **argv)
{
    static bench_t b;
    const char *only = (argc > 2) ? argv[2] : "";
    const bool with_lean = argc > 3; /* the lean kernel at the same shapes */

    if (!fv_backend_cuda_is_visible()) {
        (void)printf("no GPU\n");
        return 77;
    }
    b.json = ((argc > 1) && (strcmp(argv[1], "-") != 0)) ? fopen(argv[1], "w") : NULL;
    prepare(&b);
    (void)printf("%s, wgmma %.0f TFLOP/s\n", b.backend->name, ceiling_tflops(&b));
    for (size_t i = 0; i < sizeof(k_cases) / sizeof(k_cases[0]); i++) {
        if (strstr(k_cases[i].name, only) != NULL) {
            b.is_lean = false;
            run_case(&b, &k_cases[i]);
            b.is_lean = true;
            if (with_lean && (k_cases[i].n_tokens <= 16 * K)) { /* it takes long */
                run_case(&b, &k_cases[i]);
            }
        }
    }
    (void)printf("wgmma again %.0f TFLOP/s\n", ceiling_tflops(&b));
    if (b.json != NULL) {
        (void)fclose(b.json);
    }
    fv_backend_cuda.destroy(b.backend);
    free(b.order);
    free(b.tables);
    return 0;
}
