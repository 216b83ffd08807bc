/*
 * kernel_workload.c - see kernel_workload.h.
 */
#include "bench/kernel_workload.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SETS_MAX 512

double fv_bench_now(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

double fv_bench_cpu(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

void fv_bench_die(const char *what)
{
    (void)fprintf(stderr, "bench_kernels: %s: %s\n", what, fv_error_context());
    exit(1);
}

void *fv_bench_alloc(size_t n_bytes)
{
    void *memory = calloc(1, n_bytes);

    if (memory == NULL) {
        fv_bench_die("no memory");
    }
    return memory;
}

/* ------------------------------------------------------------------ workload */

static int32_t dim_qk(const fv_bench_case_t *c)
{
    return c->head_dim + c->rope_dim;
}

/* Dims of a token of a KV head in its page. */
static int32_t stored_dims(const fv_bench_case_t *c)
{
    return c->is_latent ? dim_qk(c) : (2 * c->head_dim);
}

/* The rows [begin, end) of one KV head. */
static fv_tile_query_t rows_of(const fv_bench_case_t *c, int32_t head, int64_t begin, int64_t end)
{
    fv_tile_query_t q = {.shard = {.shard_tokens = FV_PAGE_TOKENS, .n_parts = 1},
                         .q_begin = begin,
                         .q_end = end,
                         .kv_end = end,
                         .causal = true};

    if (c->policy != NULL) {
        q.policy = *c->policy;
        q.head = fv_policy_head(c->policy, head, c->group, 0);
    }
    return q;
}

/* Tokens that the rows see, or (each row by itself, causal) the sum over rows. */
static int64_t seen_tokens(const fv_tile_query_t *q)
{
    fv_tile_list_t list = fv_tiles_make(q);
    int64_t n = 0;

    for (int32_t i = 0; i < fv_tiles_count(&list); i++) {
        n += fv_tile_at(q, &list, i).n_tokens;
    }
    return n;
}

static void choose_lengths(fv_workload_t *w)
{
    const fv_bench_case_t *c = w->spec;
    int64_t shares = (int64_t)c->n_items * (c->n_items + 1) / 2;

    for (int32_t i = 0; i < c->n_items; i++) {
        int64_t n = c->ragged ? (c->kv_end * c->n_items * (i + 1) / shares) : c->kv_end;

        for (int32_t h = 0; h < c->n_kv_heads; h++) {
            fv_tile_query_t all = rows_of(c, h, n - c->n_tokens, n);

            w->kv_bytes += (double)seen_tokens(&all) * stored_dims(c) *
                           (double)fv_dtype_bytes((fv_dtype_t)c->kv_dtype);
            for (int64_t p = n - c->n_tokens; p < n; p++) {
                fv_tile_query_t row = rows_of(c, h, p, p + 1);

                w->flops += 2.0 * c->group * (double)seen_tokens(&row) * (dim_qk(c) + c->head_dim);
            }
        }
        w->kv_end[i] = n;
        w->pages_max =
            (size_t)fv_max64((int64_t)w->pages_max, (n + FV_PAGE_TOKENS - 1) / FV_PAGE_TOKENS);
    }
}

static fv_page_ref_t *table(const fv_workload_t *w, size_t set, int32_t item, int32_t head)
{
    size_t i = (set * (size_t)w->spec->n_items + (size_t)item) * (size_t)w->spec->n_kv_heads;

    return w->pages + (i + (size_t)head) * w->pages_max;
}

static uint32_t page_units(const fv_bench_case_t *c)
{
    return (uint32_t)((size_t)stored_dims(c) * FV_PAGE_TOKENS *
                      fv_dtype_bytes((fv_dtype_t)c->kv_dtype) / FV_PAGE_UNIT);
}

static bool is_kept(const fv_workload_t *w, int32_t item, int32_t head, int64_t page)
{
    const fv_policy_t *policy = w->spec->policy;

    return (page * FV_PAGE_TOKENS < w->kv_end[item]) &&
           ((policy == NULL) ||
            (page >= fv_policy_dead_pages(policy, w->kv_end[item] - w->spec->n_tokens)) ||
            fv_policy_keeps(policy, head, w->spec->group, page));
}

/* Hands out pages in the order a pool would: page by page, all heads of an item in turn. Returns the units used. */
static size_t place_pages(fv_workload_t *w)
{
    const fv_bench_case_t *c = w->spec;
    size_t next = 0;

    for (size_t set = 0; set < w->n_sets; set++) {
        for (int32_t i = 0; i < c->n_items; i++) {
            for (size_t p = 0; p < w->pages_max; p++) {
                for (int32_t h = 0; h < c->n_kv_heads; h++) {
                    bool kept = is_kept(w, i, h, (int64_t)p);

                    table(w, set, i, h)[p] = kept ? (fv_page_ref_t)next : FV_PAGE_NONE;
                    next += kept ? page_units(c) : 0U;
                }
            }
        }
    }
    return next;
}

/* A head's pages [begin, end), which are all there. */
static void append_run(fv_workload_t *w, const fv_page_ref_t *pages, int64_t begin, int64_t end)
{
    const fv_bench_case_t *c = w->spec;
    size_t e = fv_dtype_bytes((fv_dtype_t)c->io_dtype);
    size_t k_bytes = (size_t)dim_qk(c) * e;
    size_t v_bytes = (size_t)c->head_dim * e;
    fv_append_item_t item = {.n_kv_heads = 1,
                             .head_dim_qk = dim_qk(c),
                             .head_dim_v = c->head_dim,
                             .src_dtype = c->io_dtype,
                             .kv_dtype = c->kv_dtype,
                             .k = (const uint8_t *)w->head->k + (size_t)begin * k_bytes,
                             .v = (const uint8_t *)w->head->v + (size_t)begin * v_bytes,
                             .v_in_k = c->is_latent,
                             .k_token_bytes = k_bytes,
                             .v_token_bytes = v_bytes,
                             .local_begin = (uint64_t)begin,
                             .n_tokens = (uint64_t)(end - begin),
                             .pages = pages};

    if (fv_backend_cpu.append(w->backend, &item, 1) != FV_OK) {
        fv_bench_die("append");
    }
}

static void append_head(fv_workload_t *w, size_t set, int32_t i, int32_t h)
{
    const fv_page_ref_t *pages = table(w, set, i, h);
    int64_t begin = 0;

    while (begin < w->kv_end[i]) {
        int64_t end = begin;

        while ((end < w->kv_end[i]) && (pages[end / FV_PAGE_TOKENS] != FV_PAGE_NONE)) {
            end = fv_min64(end + FV_PAGE_TOKENS, w->kv_end[i]);
        }
        if (end > begin) {
            append_run(w, pages, begin, end);
        }
        begin = (end > begin) ? end : (begin + FV_PAGE_TOKENS);
    }
}

static void append_all(fv_workload_t *w)
{
    for (size_t set = 0; set < w->n_sets; set++) {
        for (int32_t i = 0; i < w->spec->n_items; i++) {
            for (int32_t h = 0; h < w->spec->n_kv_heads; h++) {
                append_head(w, set, i, h);
            }
        }
    }
}

void fv_workload_create(fv_workload_t *w,
                        const fv_bench_case_t *c,
                        const fv_backend_config_t *config,
                        size_t kv_memory_bytes)
{
    fv_rng_t rng = {20261122};
    fv_attn_spec_t spec = {.n_tokens = 1,
                           .n_kv_heads = 1,
                           .group = 1,
                           .head_dim_qk = dim_qk(c),
                           .head_dim_v = c->head_dim,
                           .io_dtype = c->io_dtype,
                           .kv_dtype = c->kv_dtype,
                           .v_in_k = c->is_latent,
                           .causal = true,
                           .tame = true,
                           .seed = 1};
    fv_backend_config_t sized = *config;
    size_t n_rows = (size_t)c->n_tokens * (size_t)(c->n_kv_heads * c->group);
    size_t n_elems = n_rows * (size_t)dim_qk(c);
    size_t e = fv_dtype_bytes((fv_dtype_t)c->io_dtype);

    memset(w, 0, sizeof(*w));
    w->spec = c;
    choose_lengths(w);
    w->n_sets = (c->n_tokens > 16) ? 1U : (size_t)((double)kv_memory_bytes / w->kv_bytes);
    w->n_sets = (w->n_sets < 1U) ? 1U : (w->n_sets > SETS_MAX) ? SETS_MAX : w->n_sets;
    spec.kv_end = (int64_t)w->pages_max * FV_PAGE_TOKENS;
    spec.position = spec.kv_end - 1;
    w->head = fv_attn_case_create(&spec);
    w->pages = fv_bench_alloc(w->n_sets * (size_t)(c->n_items * c->n_kv_heads) * w->pages_max *
                              sizeof(*w->pages));
    sized.kv_arena_bytes = place_pages(w) * FV_PAGE_UNIT;
    if (fv_backend_cpu.create(&sized, &w->backend) != FV_OK) {
        fv_bench_die("create");
    }
    append_all(w);
    w->q_bytes = n_elems * e;
    w->out_bytes = n_rows * (size_t)c->head_dim * e;
    w->q = fv_bench_alloc(w->q_bytes * (size_t)c->n_items);
    w->out = fv_bench_alloc(w->out_bytes * (size_t)c->n_items);
    for (size_t i = 0; i < n_elems * (size_t)c->n_items; i++) {
        fv_store_element(w->q, (fv_dtype_t)c->io_dtype, i, fv_rng_normal(&rng));
    }
}

void fv_workload_destroy(fv_workload_t *w)
{
    fv_backend_cpu.destroy(w->backend);
    fv_attn_case_destroy(w->head);
    free(w->pages);
    free(w->q);
    free(w->out);
}

void fv_workload_step(fv_workload_t *w, size_t set)
{
    const fv_bench_case_t *c = w->spec;
    static fv_attn_item_t items[FV_BENCH_ITEMS_MAX]; /* large for a stack; one thread */

    memset(items, 0, sizeof(items));
    for (int32_t i = 0; i < c->n_items; i++) {
        fv_attn_item_t *item = &items[i];

        item->n_tokens = c->n_tokens;
        item->n_kv_heads = c->n_kv_heads;
        item->group = c->group;
        item->head_dim_qk = dim_qk(c);
        item->head_dim_v = c->head_dim;
        item->v_in_k = c->is_latent;
        item->io_dtype = c->io_dtype;
        item->kv_dtype = c->kv_dtype;
        item->softmax_scale = 1.0F / sqrtf((float)dim_qk(c));
        item->causal = true;
        item->policy = (c->policy != NULL) ? *c->policy : (fv_policy_t){0};
        item->shard = (fv_kv_shard_t){.shard_tokens = FV_PAGE_TOKENS, .n_parts = 1, .part = 0};
        item->kv_end = w->kv_end[i];
        item->position = w->kv_end[i] - c->n_tokens;
        item->q = w->q + w->q_bytes * (size_t)i;
        item->q_token_bytes = w->q_bytes / (size_t)c->n_tokens;
        item->pages = table(w, set, i, 0);
        item->pages_head_stride = w->pages_max;
        item->out = w->out + w->out_bytes * (size_t)i;
        item->out_token_bytes = w->out_bytes / (size_t)c->n_tokens;
    }
    if (fv_backend_cpu.attend(w->backend, items, (size_t)c->n_items) != FV_OK) {
        fv_bench_die("attend");
    }
}

/* ------------------------------------------------------------------ verification */

/* The query heads of one KV head, one token of one item, against the oracle: every KV head holds the same K and V. */
static bool verify_head(const fv_workload_t *w, int32_t item, int32_t t, int32_t h)
{
    const fv_bench_case_t *c = w->spec;
    fv_attn_case_t check = *w->head; /* borrows its K and V */
    size_t n_heads = (size_t)c->n_kv_heads;
    size_t at = ((size_t)item * (size_t)c->n_tokens + (size_t)t) * n_heads + (size_t)h;
    size_t n_bad = 0;
    double q_norm = 0.0;

    check.spec.group = c->group;
    check.spec.kv_head_begin = h;
    check.spec.policy = (c->policy != NULL) ? *c->policy : (fv_policy_t){0};
    check.n_q_heads = c->group;
    check.spec.kv_end = w->kv_end[item];
    check.spec.position = w->kv_end[item] - c->n_tokens + t;
    check.q = w->q + at * (w->q_bytes / ((size_t)c->n_tokens * n_heads));
    check.out_ref = NULL;
    check.lse_ref = NULL;
    for (int32_t d = 0; d < dim_qk(c); d++) {
        q_norm +=
            1.7 * 1.7; /* bound for a query of deviation 1: the case's own query was one row */
    }
    check.logit_bound = fmax(check.logit_bound, sqrt(q_norm) * 2.0);
    fv_attn_case_solve(&check);
    n_bad = fv_attn_case_check(
        &check, w->out + at * (w->out_bytes / ((size_t)c->n_tokens * n_heads)), NULL, c->name);
    free(check.out_ref);
    free(check.lse_ref);
    return n_bad == 0;
}

static bool verify_token(const fv_workload_t *w, int32_t item, int32_t t)
{
    bool ok = true;

    for (int32_t h = 0; h < w->spec->n_kv_heads; h++) {
        ok = verify_head(w, item, t, h) && ok;
    }
    return ok;
}

bool fv_workload_verify(fv_workload_t *w)
{
    const fv_bench_case_t *c = w->spec;
    bool ok = true;

    fv_workload_step(w, w->n_sets - 1U);
    ok = verify_token(w, 0, 0);
    if ((c->n_items > 1) || (c->n_tokens > 1)) {
        ok = verify_token(w, c->n_items - 1, c->n_tokens - 1) && ok;
    }
    return ok;
}
