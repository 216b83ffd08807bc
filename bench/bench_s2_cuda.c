/*
 * bench_s2_cuda.c - S2 beside dense attention on one GPU, same run: decode and prefill, 32/8 heads of 128, bf16.
 *
 *   bench_s2_cuda [JSON file or - [decode, prefill or all [lean]]]        lean: by that kernel alone
 *
 * Every case is compared with an fp64 reference on the GPU before it is timed: a row of S2 is dense attention over the pages
 * on its list. Decode: sets of pages of their own, over 1 GiB, take turns in a graph of launches (bench_kernels_cuda.c),
 * so that no cache serves them; the table has no entry where a page was freed. Prefill: the whole context from position 0
 * in chunks of 32k tokens at most; the sum of the chunks' times. Planning, page tables and Q are brought to the device before.
 *
 *     pages = tiles of K and V that are read, all heads;  ratio = dense time / S2 time;  ceiling = dense pages / S2 pages
 *     held  = pages that a session at this position keeps, of one layer (common/policy.h)
 */
#include "bench/cuda_peak.h"
#include "bench/s2_cuda.h"
#include "tests/support/attn_case.h"

#include <stdlib.h>
#include <string.h>

static void report(fv_s2_bench_t *b,
                   const char *name,
                   int32_t stride,
                   const fv_s2_result_t *r,
                   const fv_s2_result_t *dense)
{
    const double ratio = dense->us / r->us;
    const double ceiling = dense->pages / r->pages;

    (void)printf(
        "%-14s %3d  %10.1f us  ratio %6.2f of %6.2f  pages %10.0f  held %9.0f (1/%.2f)  plan %6.1f us  err %.1e\n",
        name, stride, r->us, ratio, ceiling, r->pages, r->held, dense->held / r->held, r->plan_us,
        r->error);
    (void)fflush(stdout);
    if (b->json != NULL) {
        (void)fprintf(
            b->json,
            "{\"case\":\"%s\",\"stride\":%d,\"us\":%.2f,\"ratio\":%.3f,\"ceiling\":%.3f,\"pages\":%.0f,"
            "\"held_pages\":%.0f,\"plan_us\":%.1f,\"row_error\":%.2e}\n",
            name, stride, r->us, ratio, ceiling, r->pages, r->held, r->plan_us, r->error);
    }
}

static void run_decode(fv_s2_bench_t *b)
{
    static const int32_t k_items[] = {1, 64};
    static const int32_t k_strides[] = {8, 16, 32, 64};

    for (size_t i = 0; i < sizeof(k_items) / sizeof(k_items[0]); i++) {
        char name[32];
        const fv_s2_result_t dense = fv_s2_decode(b, k_items[i], 0);

        (void)snprintf(name, sizeof(name), "b%d 128k", k_items[i]);
        report(b, name, 0, &dense, &dense);
        for (size_t s = 0; s < sizeof(k_strides) / sizeof(k_strides[0]); s++) {
            const fv_s2_result_t sparse = fv_s2_decode(b, k_items[i], k_strides[s]);

            report(b, name, k_strides[s], &sparse, &dense);
        }
    }
}

static void run_prefill(fv_s2_bench_t *b)
{
    static const int64_t k_tokens[] = {16384, 32768, 131072};
    static const int32_t k_strides[] = {16, 32, 64};

    for (size_t i = 0; i < sizeof(k_tokens) / sizeof(k_tokens[0]); i++) {
        char name[32];
        const fv_s2_result_t dense = fv_s2_prefill(b, k_tokens[i], 0);

        (void)snprintf(name, sizeof(name), "prefill %lldk", (long long)(k_tokens[i] / 1024));
        report(b, name, 0, &dense, &dense);
        for (size_t s = 0; s < sizeof(k_strides) / sizeof(k_strides[0]); s++) {
            const fv_s2_result_t sparse = fv_s2_prefill(b, k_tokens[i], k_strides[s]);

            report(b, name, k_strides[s], &sparse, &dense);
        }
    }
}

static void *must_alloc(size_t n, size_t size)
{
    void *memory = calloc(n, size);

    if (memory == NULL) {
        fv_s2_die("no memory");
    }
    return memory;
}

static void prepare(fv_s2_bench_t *b, bool is_lean)
{
    const size_t n_bytes = FV_S2_CHUNK * FV_S2_ROW_BYTES;
    fv_backend_config_t config = {.kv_arena_bytes = (size_t)36 << 30};
    fv_rng_t rng = {20261122};

    fv_s2_check(fv_backend_cuda.create(&config, &b->backend), "create");
    if (is_lean) { /* prefill, too */
        b->backend->prefill_units_min = UINT32_MAX;
    }
    b->n_pages = config.kv_arena_bytes / FV_S2_PAGE_BYTES;
    b->tables_max =
        (size_t)FV_S2_ITEMS_MAX * FV_S2_KV_HEADS * (FV_S2_CONTEXT / FV_PAGE_TOKENS) * 4U;
    b->tables = must_alloc(b->tables_max, sizeof(*b->tables));
    b->order = must_alloc(b->n_pages, sizeof(*b->order));
    for (size_t i = 0; i < b->n_pages; i++) {
        const size_t j = (size_t)(fv_rng_next(&rng) % (i + 1U));

        b->order[i] = b->order[j];
        b->order[j] = (uint32_t)i;
    }
    fv_s2_check_cuda(
        fv_peak_fill_bf16(b->backend->arena, config.kv_arena_bytes / 2U, 1, b->backend->stream),
        "fill");
    fv_s2_check_cuda(cudaMalloc((void **)&b->q, n_bytes), "q");
    fv_s2_check_cuda(cudaMalloc((void **)&b->out, n_bytes), "out");
    fv_s2_check(fv_backend_cuda_reach(b->backend, b->q, n_bytes), "q");
    fv_s2_check(fv_backend_cuda_reach(b->backend, b->out, n_bytes), "out");
    fv_s2_check_cuda(fv_peak_fill_bf16(b->q, n_bytes / 2U, 2, b->backend->stream), "fill");
    fv_s2_check(fv_cuda_finish(b->backend, NULL, NULL), "fill");
}

int main(int argc, char **argv)
{
    static fv_s2_bench_t b;
    fv_device_info_t info;
    const char *mode = (argc > 2) ? argv[2] : "all";

    if (!fv_backend_cuda_is_visible()) {
        (void)printf("no GPU\n");
        return 77;
    }
    b.json = ((argc > 1) && (strcmp(argv[1], "-") != 0)) ? fopen(argv[1], "w") : NULL;
    prepare(&b, (argc > 3) && (strcmp(argv[3], "lean") == 0));
    fv_backend_cuda.describe(b.backend, &info);
    (void)printf("%s; S2 of blocks of 64, 8 local, by KV head\n", info.device);
    if (strcmp(mode, "prefill") != 0) {
        run_decode(&b);
    }
    if (strcmp(mode, "decode") != 0) {
        run_prefill(&b);
    }
    if (b.json != NULL) {
        (void)fclose(b.json);
    }
    fv_backend_cuda.destroy(b.backend);
    return 0;
}
