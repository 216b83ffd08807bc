/*
 * bench_latent_cuda.c - MLA decode on the GPU (latent_kernel.cuh) beside what memory and tensor cores allow.
 *
 * One step = n_items tokens of `heads` query heads over latents of 512 + 64 dims, bf16 (or slices of 256 + 64 and
 * 128 + 64: TPLA). A case has n_sets copies of its batch in pages of their own, shuffled, over 1 GiB or more, so that L2
 * serves none of it. Time = a CUDA graph of launches that walk over the sets, median of REPLAYS, divided by the
 * launches: GPU time of a call without launch gaps, planning and copies. Before it is timed the first and last item are
 * compared with the kernel for any dims (fp32).
 *
 *     bytes = sum over items of kv_end * (latent + 64) * 2
 *     flops = sum over items of kv_end * heads * 2 * (2 latent + 64)
 *     floor = 1.4 us + the longer of bytes / streaming read (measured in the same run) and flops / 720 TFLOP/s
 *
 * Q and results lie in device memory, as the peers' do (a service's go over the bus, 128 KB an item at 128 heads).
 * FlashMLA's and the best peer's microseconds were measured on an H100 (docs/gpu.md) and are quoted on an H100 only.
 */
#include "bench/cuda_peak.h"
#include "kernels/backend_cuda.h"
#include "tests/support/attn_case.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ITEMS_MAX  128
#define HEADS_MAX  128
#define SETS_MAX   64
#define REPLAYS    5
#define SET_BYTES  ((double)((size_t)1 << 30))
#define READ_BYTES ((size_t)2 << 30)
#define LAUNCH_US  1.4
#define PEAK_FLOPS 720e12
#define ROPE       64
#define DIM_MAX    (512 + ROPE)
#define PAGE_BYTES ((size_t)FV_PAGE_TOKENS * DIM_MAX * 2U)
#define SCALE      0.1352F
#define OUT_BYTES  ((size_t)ITEMS_MAX * HEADS_MAX * DIM_MAX * 2U)

#define ROW_TOLERANCE 8e-3 /* relative to the row: bf16 weights and results */

#define K 1024
typedef struct bench_case {
    int32_t heads, n_items, latent;
    int64_t kv_end; /* 0: ragged, log-spaced 1k..64k */
    double flashmla_us, best_us;
} bench_case_t;

static const bench_case_t k_cases[] = {
    {128, 1, 512, 4 * K, 20.5, 19.2},       {128, 1, 512, 32 * K, 41.4, 41.0},
    {128, 16, 512, 4 * K, 46.8, 46.8},      {128, 16, 512, 32 * K, 263.4, 263.4},
    {128, 64, 512, 4 * K, 133.3, 133.3},    {128, 64, 512, 32 * K, 1001.6, 1001.6},
    {128, 128, 512, 4 * K, 270.1, 270.1},   {128, 128, 512, 32 * K, 2167.3, 2109.4},
    {128, 64, 512, 0, 510.9, 510.9},        {64, 1, 512, 4 * K, 26.9, 18.1},
    {64, 1, 512, 32 * K, 51.0, 37.1},       {64, 16, 512, 4 * K, 42.4, 42.4},
    {64, 16, 512, 32 * K, 231.4, 219.4},    {64, 64, 512, 4 * K, 124.8, 122.5},
    {64, 64, 512, 32 * K, 861.4, 838.6},    {64, 128, 512, 4 * K, 213.6, 213.6},
    {64, 128, 512, 32 * K, 1689.4, 1623.8}, {64, 64, 512, 0, 435.5, 435.5},
    {16, 1, 512, 4 * K, 23.2, 15.5},        {16, 1, 512, 32 * K, 46.1, 32.0},
    {16, 16, 512, 4 * K, 35.8, 35.8},       {16, 16, 512, 32 * K, 211.3, 211.3},
    {16, 64, 512, 4 * K, 110.6, 110.6},     {16, 64, 512, 32 * K, 811.3, 811.3},
    {16, 128, 512, 4 * K, 208.2, 208.2},    {16, 128, 512, 32 * K, 1614.4, 1613.6},
    {16, 64, 512, 0, 401.4, 401.4},         {128, 64, 256, 32 * K, 0, 0},
    {128, 64, 128, 32 * K, 0, 0},
};

typedef struct bench {
    fv_backend_t *backend;
    uint32_t *order; /* a permutation of the arena's pages */
    size_t n_pages;
    fv_page_ref_t *tables; /* of all sets of the case */
    uint16_t *q;           /* pinned, [items][HEADS_MAX, DIM_MAX], shared by the sets */
    uint16_t *out; /* alike, in device memory: as others are measured, whose results stay there */
    int64_t kv_end[ITEMS_MAX];
    double bytes, flops; /* of one set */
    size_t set_pages, n_sets;
    fv_attn_item_t items[ITEMS_MAX]; /* of the set planned last */
    fv_lean_launch_t launches[SETS_MAX];
    bool is_h100;
    double read_gbps;
} bench_t;

static void die(const char *what)
{
    (void)fprintf(stderr, "bench_latent_cuda: %s: %s\n", what, fv_error_context());
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

/* Seconds of a captured graph: the median. */
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
    for (int i = 0; i < 4; i++) {
        check_cuda(fv_peak_read(b->backend->arena + (size_t)i * READ_BYTES, READ_BYTES,
                                b->backend->n_sms, b->backend->arrived, b->backend->stream),
                   "read");
    }
    check_cuda(cudaStreamEndCapture(b->backend->stream, &graph), "capture");
    b->read_gbps = 4.0 * (double)READ_BYTES / time_graph(b, graph) * 1e-9;
}

static size_t item_pages(const bench_t *b, int32_t i)
{
    return (size_t)((b->kv_end[i] + FV_PAGE_TOKENS - 1) / FV_PAGE_TOKENS);
}

static void choose_lengths(bench_t *b, const bench_case_t *c)
{
    b->set_pages = 0;
    b->bytes = 0.0;
    b->flops = 0.0;
    for (int32_t i = 0; i < c->n_items; i++) {
        /* log-spaced, shuffled: 37 is prime to 64 */
        const double at = (double)((i * 37 + 11) % c->n_items) / (double)(c->n_items);

        b->kv_end[i] = (c->kv_end > 0) ? c->kv_end : llround(1024.0 * pow(64.0, at));
        b->bytes += (double)b->kv_end[i] * (double)(c->latent + ROPE) * 2.0;
        b->flops +=
            (double)b->kv_end[i] * (double)c->heads * 2.0 * (2.0 * (double)c->latent + ROPE);
        b->set_pages += item_pages(b, i);
    }
    b->n_sets = (size_t)ceil(SET_BYTES / b->bytes) + 1U;
    b->n_sets = (b->n_sets > SETS_MAX) ? SETS_MAX : b->n_sets;
    while ((b->n_sets > 1) && (b->n_sets * b->set_pages > b->n_pages)) {
        b->n_sets--;
    }
}

static void make_item(bench_t *b, const bench_case_t *c, int32_t i, const fv_page_ref_t *pages)
{
    fv_attn_item_t *item = &b->items[i];

    memset(item, 0, sizeof(*item));
    item->n_tokens = 1;
    item->n_kv_heads = 1;
    item->group = c->heads;
    item->head_dim_qk = c->latent + ROPE;
    item->head_dim_v = c->latent;
    item->io_dtype = FV_DTYPE_BF16;
    item->kv_dtype = FV_DTYPE_BF16;
    item->v_in_k = true;
    item->softmax_scale = SCALE;
    item->causal = true;
    item->shard.shard_tokens = FV_PAGE_TOKENS;
    item->shard.n_parts = 1;
    item->position = b->kv_end[i] - 1;
    item->kv_end = b->kv_end[i];
    item->q = b->q + (size_t)i * HEADS_MAX * DIM_MAX;
    item->q_token_bytes = (size_t)c->heads * (size_t)item->head_dim_qk * 2U;
    item->pages = pages;
    item->pages_head_stride = item_pages(b, i);
    item->out = b->out + (size_t)i * HEADS_MAX * DIM_MAX;
    item->out_token_bytes = (size_t)c->heads * (size_t)c->latent * 2U;
}

/* Stages every set; launches point into the staging area, which stays as it is until finish(). */
static void plan_sets(bench_t *b, const bench_case_t *c)
{
    size_t used = 0;

    check(fv_cuda_finish(b->backend, NULL, NULL), "finish");
    /* so that no set's staging moves another's */
    check(fv_cuda_reserve(b->backend, (b->n_sets * b->set_pages * 4U) +
                                          (b->n_sets * (size_t)c->n_items << 19U)),
          "reserve");
    for (size_t n = 0; n < b->n_sets; n++) {
        const size_t set = b->n_sets - 1U - n; /* set 0 is planned last: b->items are its */
        const size_t begin = used;

        for (int32_t i = 0; i < c->n_items; i++) {
            make_item(b, c, i, b->tables + used);
            used += item_pages(b, i);
        }
        for (size_t p = begin; p < used; p++) {
            b->tables[p] = (fv_page_ref_t)(b->order[p] * (PAGE_BYTES / FV_PAGE_UNIT));
        }
        check(fv_cuda_attend_plan(b->backend, b->items, (size_t)c->n_items), "plan");
        if (b->backend->n_launches != 1) {
            die("one launch expected");
        }
        b->launches[set] = b->backend->launches[0];
    }
    check_cuda(cudaStreamSynchronize(b->backend->stream), "staging");
}

/* Largest error of a row of an item against the fp32 kernel, relative to the row's norm. */
static double item_error(bench_t *b, const bench_case_t *c, int32_t i)
{
    const size_t n = (size_t)c->heads * (size_t)c->latent;
    uint16_t *want = must_alloc(n, sizeof(*want));
    uint16_t *rows = must_alloc(n, sizeof(*rows));
    fv_attn_item_t item = b->items[i];
    double worst = 0.0;

    item.latent_mu = nextafterf(1.0F, 2.0F); /* what the fast kernel does not take */
    item.out = want;
    check(fv_cuda_attend_plan(b->backend, &item, 1), "reference");
    if (b->backend->launches[0].latent != (int32_t)FV_LATENT_ANY) {
        die("the reference is the kernel itself");
    }
    check(fv_cuda_attend_start(b->backend, b->backend->launches, 1), "reference");
    check(fv_cuda_finish(b->backend, NULL, NULL), "reference");
    check_cuda(cudaMemcpy(rows, b->items[i].out, n * sizeof(*rows), cudaMemcpyDeviceToHost),
               "results");
    for (int32_t h = 0; h < c->heads; h++) {
        double error = 0.0;
        double norm = 0.0;

        for (int32_t d = 0; d < c->latent; d++) {
            const size_t at = (size_t)h * (size_t)c->latent + (size_t)d;
            const double x = (double)fv_bf16_to_f32(want[at]);
            const double got = (double)fv_bf16_to_f32(rows[at]);

            error += (got - x) * (got - x);
            norm += x * x;
        }
        error = sqrt(error / norm);
        if (!(error <= ROW_TOLERANCE)) { /* NaN too */
            (void)printf("item %d head %d: error %.3g of the row, expected at most %g\n", i, h,
                         error, ROW_TOLERANCE);
            exit(1);
        }
        worst = fmax(worst, error);
    }
    free(want);
    free(rows);
    return worst;
}

/* Before the sets are planned for timing: finish() empties the staging area. */
static double verify(bench_t *b, const bench_case_t *c)
{
    double worst = 0.0;

    check_cuda(cudaMemset(b->out, 0xff, OUT_BYTES), "results");
    check(fv_cuda_attend_start(b->backend, &b->launches[0], 1), "launch");
    check_cuda(cudaStreamSynchronize(b->backend->stream), "launch");
    worst = item_error(b, c, 0);
    return fmax(worst, item_error(b, c, c->n_items - 1));
}

static double time_case(bench_t *b)
{
    /* enough launches that the graph's own start does not count */
    const size_t least = (b->bytes > 1e9) ? 6U : 30U;
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

static void run_case(bench_t *b, const bench_case_t *c, const char *name)
{
    double error = 0.0;
    double us = 0.0;
    double floor_us = 0.0;

    choose_lengths(b, c);
    if (b->set_pages > b->n_pages) {
        (void)printf("%-26s needs %.0f GB\n", name, b->bytes * 1e-9);
        return;
    }
    plan_sets(b, c);
    error = verify(b, c);
    plan_sets(b, c);
    us = time_case(b) * 1e6;
    floor_us = LAUNCH_US + fmax(b->bytes / b->read_gbps * 1e-3, b->flops / PEAK_FLOPS * 1e6);
    (void)printf("%-26s %9.1f us %6.0f GB/s %5.0f TFLOP/s floor %8.1f x%.2f", name, us,
                 b->bytes / us * 1e-3, b->flops / us * 1e-6, floor_us, us / floor_us);
    if (b->is_h100 && (c->flashmla_us > 0.0)) {
        (void)printf("  FlashMLA %7.1f x%.2f best %7.1f x%.2f", c->flashmla_us, us / c->flashmla_us,
                     c->best_us, us / c->best_us);
    }
    (void)printf("  err %.1e\n", error);
    (void)fflush(stdout);
}

static void prepare(bench_t *b, size_t arena_bytes)
{
    fv_backend_config_t config = {.kv_arena_bytes = arena_bytes / PAGE_BYTES * PAGE_BYTES};
    fv_rng_t rng = {20261122};
    void *memory = NULL;

    check(fv_backend_cuda.create(&config, &b->backend), "create");
    b->n_pages = config.kv_arena_bytes / PAGE_BYTES;
    b->order = must_alloc(b->n_pages, sizeof(*b->order));
    b->tables = must_alloc(b->n_pages, sizeof(*b->tables));
    for (size_t i = 0; i < b->n_pages; i++) {
        b->order[i] = (uint32_t)i;
    }
    for (size_t i = b->n_pages; i > 1U; i--) {
        const size_t j = (size_t)(fv_rng_next(&rng) % i);
        const uint32_t swap = b->order[i - 1U];

        b->order[i - 1U] = b->order[j];
        b->order[j] = swap;
    }
    check_cuda(
        fv_peak_fill_bf16(b->backend->arena, config.kv_arena_bytes / 2U, 1, b->backend->stream),
        "fill");
    check(fv_backend_cuda.host_alloc(b->backend, (size_t)ITEMS_MAX * HEADS_MAX * DIM_MAX * 2U,
                                     &memory),
          "q");
    b->q = memory;
    check_cuda(cudaMalloc(&memory, OUT_BYTES), "out");
    check(fv_backend_cuda_reach(b->backend, memory, OUT_BYTES), "out");
    b->out = memory;
    for (size_t i = 0; i < (size_t)ITEMS_MAX * HEADS_MAX * DIM_MAX; i++) {
        fv_store_element(b->q, FV_DTYPE_BF16, i, fv_rng_normal(&rng));
    }
    check(fv_cuda_finish(b->backend, NULL, NULL), "fill");
}

static void name_case(const bench_case_t *c, char *name, size_t n)
{
    if (c->kv_end == 0) {
        (void)snprintf(name, n, "h%d ragged%d %d+64", c->heads, c->n_items, c->latent);
    } else {
        (void)snprintf(name, n, "h%d b%d %lldk %d+64", c->heads, c->n_items,
                       (long long)(c->kv_end / K), c->latent);
    }
}

/* bench_latent_cuda [GiB of KV [only cases whose name begins with this]...] */
int main(int argc, char **argv)
{
    static bench_t b;
    fv_device_info_t info;
    const double gib = (argc > 1) ? strtod(argv[1], NULL) : 0.0;
    size_t n_bytes = (size_t)(gib * (double)((size_t)1 << 30));

    if (!fv_backend_cuda_is_visible()) {
        (void)printf("no GPU\n");
        return 77;
    }
    if (n_bytes == 0) {
        n_bytes = fv_backend_cuda_memory_free(0) / 100U * 80U;
    }
    prepare(&b, n_bytes);
    fv_backend_cuda.describe(b.backend, &info);
    b.is_h100 = strstr(info.device, "H100") != NULL;
    measure_read(&b);
    (void)printf("%s, KV %.1f GB, streaming read %.0f GB/s\n", info.device,
                 (double)info.kv_arena_bytes * 1e-9, b.read_gbps);
    for (size_t i = 0; i < sizeof(k_cases) / sizeof(k_cases[0]); i++) {
        bool is_wanted = argc <= 2;
        char name[64];

        name_case(&k_cases[i], name, sizeof(name));
        for (int a = 2; a < argc; a++) {
            is_wanted = is_wanted || (strncmp(name, argv[a], strlen(argv[a])) == 0);
        }
        if (is_wanted) {
            run_case(&b, &k_cases[i], name);
        }
    }
    fv_backend_cuda_unreach(b.backend, b.out);
    (void)cudaFree(b.out);
    fv_backend_cuda.destroy(b.backend);
    free(b.order);
    free(b.tables);
    return 0;
}
