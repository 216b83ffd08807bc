/*
 * s2_cuda_time.c - the S2 benchmark's two measurements: steps of decode, and prefill of a whole context.
 */
#include "bench/s2_cuda.h"
#include "common/clock.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define SET_BYTES ((double)((size_t)1 << 30))

/* Microseconds of what was captured: the median of FV_S2_REPLAYS. */
static double time_graph(const fv_s2_bench_t *b, cudaGraph_t graph)
{
    cudaGraphExec_t exec = NULL;
    cudaEvent_t from = NULL;
    cudaEvent_t to = NULL;
    double ms[FV_S2_REPLAYS];

    fv_s2_check_cuda(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
    fv_s2_check_cuda(cudaEventCreate(&from), "event");
    fv_s2_check_cuda(cudaEventCreate(&to), "event");
    fv_s2_check_cuda(cudaGraphLaunch(exec, b->backend->stream), "warm up");
    for (int i = 0; i < FV_S2_REPLAYS; i++) {
        float elapsed = 0.0F;

        fv_s2_check_cuda(cudaEventRecord(from, b->backend->stream), "record");
        fv_s2_check_cuda(cudaGraphLaunch(exec, b->backend->stream), "replay");
        fv_s2_check_cuda(cudaEventRecord(to, b->backend->stream), "record");
        fv_s2_check_cuda(cudaEventSynchronize(to), "synchronize");
        fv_s2_check_cuda(cudaEventElapsedTime(&elapsed, from, to), "elapsed");
        ms[i] = (double)elapsed;
    }
    qsort(ms, FV_S2_REPLAYS, sizeof(ms[0]), fv_s2_compare);
    fv_s2_check_cuda(cudaEventDestroy(from), "event");
    fv_s2_check_cuda(cudaEventDestroy(to), "event");
    fv_s2_check_cuda(cudaGraphExecDestroy(exec), "graph");
    fv_s2_check_cuda(cudaGraphDestroy(graph), "graph");
    return ms[FV_S2_REPLAYS / 2] * 1e3;
}

/* ------------------------------------------------------------------ decode */

/* Items of one set: tables filled, pages counted. */
static double make_items(fv_s2_bench_t *b,
                         const fv_policy_t *policy,
                         size_t set,
                         int32_t n_items,
                         fv_attn_item_t *items)
{
    double n_pages = 0.0;

    for (int32_t i = 0; i < n_items; i++) {
        fv_page_ref_t *table =
            b->tables + (set * (size_t)n_items + (size_t)i) * FV_S2_KV_HEADS * b->stride;

        n_pages += (double)fv_s2_fill_table(b, policy, FV_S2_CONTEXT - 1, table);
        items[i] = fv_s2_item(b, policy, table, FV_S2_CONTEXT - 1, 1, (size_t)i);
    }
    return n_pages;
}

/* How many sets there are, and room for all of their plans, so that none moves another's. */
static size_t choose_sets(fv_s2_bench_t *b, double pages, int32_t n_items)
{
    const size_t table = (size_t)n_items * FV_S2_KV_HEADS * b->stride;
    size_t n_sets = (size_t)ceil(SET_BYTES / (pages * (double)FV_S2_PAGE_BYTES)) + 1U;

    n_sets = (n_sets > FV_S2_SETS_MAX) ? FV_S2_SETS_MAX : n_sets;
    while ((n_sets > 1U) &&
           (((double)n_sets * pages > (double)b->n_pages) || (n_sets * table > b->tables_max))) {
        n_sets--;
    }
    fv_s2_check(fv_cuda_reserve(b->backend, n_sets * (table * sizeof(fv_page_ref_t) +
                                                      ((size_t)n_items << 17U))),
                "reserve");
    return n_sets;
}

/* The plan of a step as a service has it: tables stand on the device already. */
static double time_plan(fv_s2_bench_t *b, fv_attn_item_t *items, int32_t n_items)
{
    double us[FV_S2_REPLAYS];

    for (int32_t i = 0; i < n_items; i++) {
        items[i].table_id = 1U + (uint64_t)i;
        items[i].table_version =
            (uint64_t)(uintptr_t)items[i].pages + (uint64_t)items[i].policy.vert_stride;
        items[i].n_table_pages = (uint32_t)b->stride;
    }
    for (int i = -1; i < FV_S2_REPLAYS; i++) {
        double begin = 0.0;

        fv_s2_check(fv_cuda_finish(b->backend, NULL, NULL), "finish");
        begin = (double)fv_clock_us();
        fv_s2_check(fv_cuda_attend_plan(b->backend, items, (size_t)n_items), "plan");
        us[(i < 0) ? 0 : i] = (double)fv_clock_us() - begin;
    }
    fv_s2_check(fv_cuda_finish(b->backend, NULL, NULL), "finish");
    qsort(us, FV_S2_REPLAYS, sizeof(us[0]), fv_s2_compare);
    return us[FV_S2_REPLAYS / 2];
}

fv_s2_result_t fv_s2_decode(fv_s2_bench_t *b, int32_t n_items, int32_t stride)
{
    const fv_policy_t policy = fv_s2_policy(stride);
    static fv_attn_item_t items[FV_S2_ITEMS_MAX];
    fv_s2_result_t result = {0};
    size_t n_sets = 1;
    size_t n_launches = 0;
    cudaGraph_t graph = NULL;

    b->stride = FV_S2_CONTEXT / FV_PAGE_TOKENS;
    b->n_used = 0;
    fv_s2_check(fv_cuda_finish(b->backend, NULL, NULL), "finish");
    for (size_t set = 0; set < n_sets; set++) {
        result.held = make_items(b, &policy, set, n_items, items);
        n_sets = (set == 0) ? choose_sets(b, result.held, n_items) : n_sets;
        fv_s2_check(fv_cuda_attend_plan(b->backend, items, (size_t)n_items), "plan");
        if (b->backend->n_launches != 1U) {
            fv_s2_die("one launch expected");
        }
        b->launches[set] = b->backend->launches[0];
    }
    result.pages = (double)b->launches[0].n_tiles;
    fv_s2_check(fv_cuda_attend_start(b->backend, &b->launches[n_sets - 1U], 1), "launch");
    fv_s2_check_cuda(cudaStreamSynchronize(b->backend->stream), "launch");
    result.error = fmax(fv_s2_verify(b, &items[0]), fv_s2_verify(b, &items[n_items - 1]));
    n_launches = ((n_sets > 8U) || (n_items > 1)) ? n_sets : (n_sets * 8U);
    fv_s2_check_cuda(cudaStreamBeginCapture(b->backend->stream, cudaStreamCaptureModeThreadLocal),
                     "capture");
    for (size_t i = 0; i < n_launches; i++) {
        fv_s2_check(fv_cuda_attend_start(b->backend, &b->launches[i % n_sets], 1), "launch");
    }
    fv_s2_check_cuda(cudaStreamEndCapture(b->backend->stream, &graph), "capture");
    result.us = time_graph(b, graph) / (double)n_launches;
    result.plan_us = time_plan(b, items, n_items);
    return result;
}

/* ------------------------------------------------------------------ prefill */

/* Microseconds of the launches that were planned, the better of two. */
static double time_launches(const fv_s2_bench_t *b)
{
    double best = INFINITY;

    for (int i = 0; i < 2; i++) {
        cudaEvent_t from = NULL;
        cudaEvent_t to = NULL;
        float elapsed = 0.0F;

        fv_s2_check_cuda(cudaEventCreate(&from), "event");
        fv_s2_check_cuda(cudaEventCreate(&to), "event");
        fv_s2_check_cuda(cudaEventRecord(from, b->backend->stream), "record");
        fv_s2_check(fv_cuda_attend_start(b->backend, b->backend->launches, b->backend->n_launches),
                    "launch");
        fv_s2_check(fv_prefill_start(b->backend), "launch");
        fv_s2_check_cuda(cudaEventRecord(to, b->backend->stream), "record");
        fv_s2_check_cuda(cudaEventSynchronize(to), "synchronize");
        fv_s2_check_cuda(cudaEventElapsedTime(&elapsed, from, to), "elapsed");
        fv_s2_check_cuda(cudaEventDestroy(from), "event");
        fv_s2_check_cuda(cudaEventDestroy(to), "event");
        best = fmin(best, (double)elapsed * 1e3);
    }
    return best;
}

/* Tiles that blocks of 64 query tokens read, all KV heads: the block count of the pattern. */
static double block_count(const fv_policy_t *policy, int64_t n_tokens)
{
    double n = 0.0;

    for (int32_t h = 0; h < FV_S2_KV_HEADS; h++) {
        for (int64_t t = 0; t < n_tokens; t += 64) {
            const fv_tile_query_t query = fv_s2_query(policy, h, t, t + 64);
            const fv_tile_list_t list = fv_tiles_make(&query);

            n += (double)fv_tiles_count(&list);
        }
    }
    return n;
}

fv_s2_result_t fv_s2_prefill(fv_s2_bench_t *b, int64_t n_tokens, int32_t stride)
{
    const fv_policy_t policy = fv_s2_policy(stride);
    const fv_policy_t dense = fv_s2_policy(0);
    fv_s2_result_t result = {.pages = block_count(&policy, n_tokens)};

    b->stride = (size_t)(n_tokens / FV_PAGE_TOKENS);
    b->n_used = 0;
    result.held = (double)fv_s2_fill_table(b, &policy, n_tokens - 1, b->tables);
    b->n_used = 0;
    (void)fv_s2_fill_table(b, &dense, n_tokens - 1, b->tables); /* a chunk's pages are all there */
    for (int64_t at = 0; at < n_tokens; at += FV_S2_CHUNK) {
        const int64_t n = fv_min64(n_tokens - at, FV_S2_CHUNK);
        const fv_attn_item_t item = fv_s2_item(b, &policy, b->tables, at, (int32_t)n, 0);

        fv_s2_check(fv_cuda_finish(b->backend, NULL, NULL), "finish");
        fv_s2_check(fv_cuda_attend_plan(b->backend, &item, 1), "plan");
        fv_s2_check_cuda(
            cudaMemsetAsync(b->out, 0xff, FV_S2_CHUNK * FV_S2_ROW_BYTES, b->backend->stream),
            "poison");
        result.us += time_launches(b);
        result.error = fmax(result.error, fv_s2_verify(b, &item));
    }
    return result;
}
