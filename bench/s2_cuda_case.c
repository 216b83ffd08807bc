/*
 * s2_cuda_case.c - the S2 benchmark's problem: policies, page tables with holes, items, and the fp64 check.
 */
#include "bench/cuda_peak.h"
#include "bench/s2_cuda.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ROW_TOLERANCE 6e-3 /* relative to the row: bf16 results */

void fv_s2_die(const char *what)
{
    (void)fprintf(stderr, "bench_s2_cuda: %s: %s\n", what, fv_error_context());
    exit(1);
}

void fv_s2_check(fv_status_t status, const char *what)
{
    if (status != FV_OK) {
        fv_s2_die(what);
    }
}

void fv_s2_check_cuda(cudaError_t error, const char *what)
{
    fv_s2_check(fv_cuda_check(error, what), what);
}

int fv_s2_compare(const void *a, const void *b)
{
    const double x = *(const double *)a;
    const double y = *(const double *)b;

    return (x > y) - (x < y);
}

/* stride 0: dense. */
fv_policy_t fv_s2_policy(int32_t stride)
{
    fv_policy_t policy = {.kind = FV_POLICY_DENSE};

    if (stride > 0) {
        policy = (fv_policy_t){.kind = FV_POLICY_S2,
                               .block_tokens = 64,
                               .local_blocks = 8,
                               .vert_stride = stride,
                               .head_sliding_step =
                                   (stride > FV_S2_KV_HEADS) ? (stride / FV_S2_KV_HEADS) : 1,
                               .n_heads = FV_S2_KV_HEADS};
    }
    return policy;
}

fv_tile_query_t fv_s2_query(const fv_policy_t *policy, int32_t kv_head, int64_t begin, int64_t end)
{
    fv_tile_query_t query = {.policy = *policy,
                             .shard = {.shard_tokens = FV_PAGE_TOKENS, .n_parts = 1},
                             .q_begin = begin,
                             .q_end = end,
                             .kv_end = end,
                             .head = kv_head,
                             .causal = true};

    return query;
}

/* Pages of its own for each that a query at `position` or later can read; returns how many. */
size_t fv_s2_fill_table(fv_s2_bench_t *b,
                        const fv_policy_t *policy,
                        int64_t position,
                        fv_page_ref_t *table)
{
    const int64_t dead = fv_policy_dead_pages(policy, position);
    const size_t before = b->n_used;

    for (int32_t h = 0; h < FV_S2_KV_HEADS; h++) {
        for (int64_t p = 0; p < (int64_t)b->stride; p++) {
            fv_page_ref_t *entry = &table[(size_t)h * b->stride + (size_t)p];

            *entry = FV_PAGE_NONE;
            if ((p >= dead) || fv_policy_keeps(policy, h, FV_S2_GROUP, p)) {
                *entry = (fv_page_ref_t)(b->order[b->n_used % b->n_pages] *
                                         (FV_S2_PAGE_BYTES / FV_PAGE_UNIT));
                b->n_used++;
            }
        }
    }
    return b->n_used - before;
}

fv_attn_item_t fv_s2_item(const fv_s2_bench_t *b,
                          const fv_policy_t *policy,
                          const fv_page_ref_t *table,
                          int64_t position,
                          int32_t n_tokens,
                          size_t row)
{
    fv_attn_item_t item;

    memset(&item, 0, sizeof(item));
    item.n_tokens = n_tokens;
    item.n_kv_heads = FV_S2_KV_HEADS;
    item.group = FV_S2_GROUP;
    item.head_dim_qk = FV_S2_DIM;
    item.head_dim_v = FV_S2_DIM;
    item.io_dtype = FV_DTYPE_BF16;
    item.kv_dtype = FV_DTYPE_BF16;
    item.softmax_scale = 1.0F / sqrtf((float)FV_S2_DIM);
    item.causal = true;
    item.policy = *policy;
    item.shard.shard_tokens = FV_PAGE_TOKENS;
    item.shard.n_parts = 1;
    item.position = position;
    item.kv_end = position + n_tokens;
    item.q = b->q + row * FV_S2_ROW_BYTES;
    item.q_token_bytes = FV_S2_ROW_BYTES;
    item.pages = table;
    item.pages_head_stride = b->stride;
    item.out = b->out + row * FV_S2_ROW_BYTES;
    item.out_token_bytes = FV_S2_ROW_BYTES;
    return item;
}

/* Error of one head of an item's token t, relative to the row's norm. */
static double row_error(const fv_s2_bench_t *b, const fv_attn_item_t *item, int32_t t, int32_t head)
{
    const int64_t position = item->position + t;
    const fv_tile_query_t query =
        fv_s2_query(&item->policy, head / FV_S2_GROUP, position, position + 1);
    const fv_tile_list_t list = fv_tiles_make(&query);
    const size_t n = (size_t)fv_tiles_count(&list);
    const size_t at = (size_t)t * FV_S2_ROW_BYTES + (size_t)head * FV_S2_DIM * 2U;
    static fv_page_ref_t pages[FV_S2_CONTEXT / FV_PAGE_TOKENS];
    static uint8_t *device;
    uint16_t got[FV_S2_DIM];
    double want[FV_S2_DIM + 1];
    double error = 0.0;
    double norm = 0.0;
    fv_peak_row_t row = {.arena = b->backend->arena, .head_dim = FV_S2_DIM};

    if (device == NULL) {
        fv_s2_check_cuda(cudaMalloc((void **)&device, sizeof(pages) + 4096U), "verify");
    }
    for (size_t i = 0; i < n; i++) {
        pages[i] = item->pages[(size_t)(head / FV_S2_GROUP) * b->stride +
                               (size_t)fv_tile_at(&query, &list, (int32_t)i).local_page];
    }
    fv_s2_check_cuda(cudaMemcpy(device + 4096, pages, n * sizeof(pages[0]), cudaMemcpyHostToDevice),
                     "verify");
    row.pages = (const void *)(device + 4096);
    row.q = (const void *)((const uint8_t *)item->q + at);
    row.out = (void *)device;
    row.n_tokens = (int64_t)(n - 1U) * FV_PAGE_TOKENS + position % FV_PAGE_TOKENS + 1;
    row.scale = (double)item->softmax_scale;
    fv_s2_check_cuda(fv_peak_reference(&row, b->backend->stream), "reference");
    fv_s2_check_cuda(cudaStreamSynchronize(b->backend->stream), "reference");
    fv_s2_check_cuda(cudaMemcpy(want, device, sizeof(want), cudaMemcpyDeviceToHost), "verify");
    fv_s2_check_cuda(
        cudaMemcpy(got, (const uint8_t *)item->out + at, sizeof(got), cudaMemcpyDeviceToHost),
        "verify");
    for (size_t d = 0; d < FV_S2_DIM; d++) {
        const double x = (double)fv_bf16_to_f32(got[d]);

        error += (x - want[d]) * (x - want[d]);
        norm += want[d] * want[d];
    }
    return sqrt(error / norm);
}

/* Some rows of an item; ends the run if one is wrong (NaN compares false). */
double fv_s2_verify(const fv_s2_bench_t *b, const fv_attn_item_t *item)
{
    double worst = 0.0;

    for (int32_t i = 0; i < 4; i++) {
        const int32_t t = (item->n_tokens - 1) * i / 3;
        const double error = row_error(b, item, t, (i * 11 + 5) % FV_S2_Q_HEADS);

        if (!(error <= ROW_TOLERANCE)) {
            (void)printf("stride %d, position %lld: error %.3g of the row, expected at most %g\n",
                         item->policy.vert_stride, (long long)(item->position + t), error,
                         ROW_TOLERANCE);
            exit(1);
        }
        worst = fmax(worst, error);
    }
    return worst;
}
