/*
 * bench_step_cuda.c - one rank's step on the GPU without gRPC: what it costs beside its kernel.
 *
 *     bench_step_cuda [--batch 1,64] [--context 4096,131072] [--seconds 2] [--pageable] [--json FILE]
 *
 * Decode of 32 query and 8 KV heads of 128, bf16: each step appends a token to every session and attends. Tensors lie in
 * memory of host_alloc(), packed as a request brings them (--pageable: in ordinary memory). Sessions have several layers
 * where memory allows, and steps go round them, so that L2 does not serve them.
 *
 * Columns, us: step = fv_worker_step() by the host's clock, median and 99th percentile; device = its own record of the
 * step (compute_us); kernel = the same launches alone, back to back, by events. over = step - kernel.
 */
#include "common/log.h"
#include "kernels/backend_cuda.h"
#include "worker/internal.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define N_Q_HEADS   32
#define N_KV_HEADS  8
#define HEAD_DIM    128
#define ELEM        2U
#define FILL_TOKENS 4096U /* of one append */
#define LAYERS_MAX  8
#define CASES_MAX   16
#define STEPS_MAX   20000U
#define L2_BYTES    ((size_t)192 << 20) /* KV that the steps go round, at least, when memory allows */

#define Q_BYTES ((size_t)N_Q_HEADS * HEAD_DIM * ELEM)
#define K_BYTES ((size_t)N_KV_HEADS * HEAD_DIM * ELEM)

typedef struct options {
    uint32_t batches[CASES_MAX], contexts[CASES_MAX];
    size_t n_batches, n_contexts;
    double seconds;
    bool is_pageable;
    const char *json;
} options_t;

typedef struct bench {
    fv_worker_t *worker;
    uint32_t batch, context, n_layers;
    uint64_t lengths[LAYERS_MAX];
    uint8_t *q, *k, *v, *out; /* [batch] rows each */
    fv_ctl_item_t *items;
    fv_step_io_t *io;
    fv_error_t *errors;
    bool is_pageable;
} bench_t;

typedef struct result {
    double step_us, p99_us, device_us, kernel_us;
    size_t n_steps;
} result_t;

static void check(fv_status_t status, const char *what)
{
    if (status != FV_OK) {
        (void)fprintf(stderr, "bench_step_cuda: %s: %s\n", what, fv_error_context());
        exit(1);
    }
}

static double now_us(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

/* Small bf16 values that are not all alike. */
static void fill_random(uint8_t *bytes, size_t n_bytes)
{
    uint32_t x = 1;

    for (size_t i = 0; i + 1U < n_bytes; i += 2U) {
        const float value = (float)((x >> 16U) & 0xffU) / 128.0F - 1.0F;

        fv_store_element(bytes + i, FV_DTYPE_BF16, 0, value);
        x = x * 1664525U + 1013904223U; /* Numerical Recipes' generator */
    }
}

static uint8_t *take(const bench_t *b, size_t n_bytes)
{
    void *memory = NULL;

    if (b->is_pageable) {
        memory = malloc(n_bytes);
    } else {
        check(b->worker->config.backend->host_alloc(b->worker->backend, n_bytes, &memory),
              "host_alloc");
    }
    if (memory == NULL) {
        exit(1);
    }
    fill_random(memory, n_bytes);
    return memory;
}

static void give(const bench_t *b, void *memory)
{
    if (b->is_pageable) {
        free(memory);
    } else {
        b->worker->config.backend->host_free(b->worker->backend, memory);
    }
}

/* A session's layer gets its tokens without attention over them. */
static void fill_layer(bench_t *b, uint32_t slot, uint32_t layer, const uint8_t *rows)
{
    fv_session_t *session = fv_worker_session(b->worker, slot);
    fv_layer_kv_t *l = &session->layers[layer];

    while (l->length < b->context) {
        const uint64_t left = b->context - l->length;
        const uint64_t n = (left < FILL_TOKENS) ? left : FILL_TOKENS;
        fv_page_copy_t copies[N_KV_HEADS];
        size_t n_copies = 0;

        check(fv_session_reserve(session, layer, l->length + n, b->worker->pool, copies, &n_copies),
              "reserve");
        const fv_append_item_t append = {.n_kv_heads = N_KV_HEADS,
                                         .head_dim_qk = HEAD_DIM,
                                         .head_dim_v = HEAD_DIM,
                                         .src_dtype = FV_DTYPE_BF16,
                                         .kv_dtype = FV_DTYPE_BF16,
                                         .k = rows,
                                         .v = rows,
                                         .k_token_bytes = K_BYTES,
                                         .v_token_bytes = K_BYTES,
                                         .local_begin = l->length,
                                         .n_tokens = n,
                                         .pages = l->pages,
                                         .pages_head_stride = l->stride};
        check(b->worker->config.backend->append(b->worker->backend, &append, 1), "append");
        check(b->worker->config.backend->finish(b->worker->backend, NULL, NULL), "finish");
        l->length += n;
    }
}

static void create(bench_t *b, const options_t *o, uint32_t batch, uint32_t context)
{
    const size_t layer_bytes = (size_t)batch * (context + 4096U) * 2U * K_BYTES;

    memset(b, 0, sizeof(*b));
    b->batch = batch;
    b->context = context;
    b->is_pageable = o->is_pageable;
    b->n_layers = 1;
    while ((b->n_layers < LAYERS_MAX) && ((size_t)b->n_layers * layer_bytes < L2_BYTES)) {
        b->n_layers++;
    }
    fv_worker_config_t config = {
        .n_ranks = 1,
        .backend = &fv_backend_cuda,
        .backend_config = {.kv_arena_bytes =
                               fv_align_up((size_t)b->n_layers * layer_bytes, (size_t)1 << 21)}};
    fv_ctl_model_t model = {.spec = {.name = "bench",
                                     .n_layers = (int32_t)b->n_layers,
                                     .n_q_heads = N_Q_HEADS,
                                     .n_kv_heads = N_KV_HEADS,
                                     .head_dim_qk = HEAD_DIM,
                                     .head_dim_v = HEAD_DIM,
                                     .kv_dtype = FV_DTYPE_BF16,
                                     .n_policies = 1}};

    check(fv_worker_create(&config, &b->worker), "worker");
    check(fv_worker_model(b->worker, &model), "model");
    uint8_t *rows = take(b, FILL_TOKENS * K_BYTES);
    for (uint32_t s = 0; s < batch; s++) {
        const fv_ctl_open_t open = {
            .session_slot = s,
            .placement = {.n_head_parts = 1, .n_ctx_parts = 1, .shard_tokens = 2048}};

        check(fv_worker_open(b->worker, &open), "open");
        for (uint32_t l = 0; l < b->n_layers; l++) {
            fill_layer(b, s, l, rows);
        }
    }
    give(b, rows);
    for (uint32_t l = 0; l < b->n_layers; l++) {
        b->lengths[l] = context;
    }
    b->q = take(b, batch * Q_BYTES);
    b->k = take(b, batch * K_BYTES);
    b->v = take(b, batch * K_BYTES);
    b->out = take(b, batch * Q_BYTES);
    b->items = calloc(batch, sizeof(*b->items));
    b->io = calloc(batch, sizeof(*b->io));
    b->errors = calloc(batch, sizeof(*b->errors));
    if ((b->items == NULL) || (b->io == NULL) || (b->errors == NULL)) {
        exit(1);
    }
}

static void destroy(bench_t *b)
{
    give(b, b->q);
    give(b, b->k);
    give(b, b->v);
    give(b, b->out);
    fv_worker_destroy(b->worker);
    free(b->items);
    free(b->io);
    free(b->errors);
}

/* One token to every session, in one layer; the device's time, and how long the call took. */
static uint32_t step(bench_t *b, uint32_t layer, double *out_us)
{
    fv_ctl_done_t done;

    for (uint32_t s = 0; s < b->batch; s++) {
        b->items[s] = (fv_ctl_item_t){.session_slot = s,
                                      .layer = layer,
                                      .position = b->lengths[layer],
                                      .kv_end = b->lengths[layer] + 1U,
                                      .n_tokens = 1,
                                      .dtype = FV_DTYPE_BF16,
                                      .flags = FV_ITEM_CAUSAL | FV_ITEM_APPEND};
        b->io[s] = (fv_step_io_t){.q = b->q + s * Q_BYTES,
                                  .k = b->k + s * K_BYTES,
                                  .v = b->v + s * K_BYTES,
                                  .q_token_bytes = Q_BYTES,
                                  .k_token_bytes = K_BYTES,
                                  .v_token_bytes = K_BYTES,
                                  .out = b->out + s * Q_BYTES,
                                  .out_token_bytes = Q_BYTES};
    }
    const double begin = now_us();

    check(fv_worker_step(b->worker, b->items, b->io, b->batch, &done, b->errors), "step");
    *out_us = now_us() - begin;
    check((fv_status_t)done.error.status, "an item");
    b->lengths[layer]++;
    return done.compute_us;
}

/* The lean launches alone: each layer's last step planned once more, then started back to back. */
static double time_kernel(bench_t *b)
{
    enum {
        ROUNDS = 10
    };
    fv_backend_t *backend = b->worker->backend;
    fv_lean_launch_t launches[LAYERS_MAX];
    cudaEvent_t events[2];
    float ms = 0.0F;
    double us = 0.0;

    check(fv_cuda_reserve(backend, (size_t)48 << 20), "staging"); /* no plan moves another's */
    for (uint32_t l = 0; l < b->n_layers; l++) {
        check(fv_cuda_finish(backend, NULL, NULL), "finish");
        (void)step(b, l, &us);
    }
    for (uint32_t l = 0; l < b->n_layers; l++) {
        fv_attn_item_t *items = b->worker->work.attends.data;

        for (uint32_t s = 0; s < b->batch; s++) { /* as the last layer's, but for the table */
            const fv_session_t *session = fv_worker_session(b->worker, s);
            const fv_layer_kv_t *kv = &session->layers[l];

            items[s].pages = kv->pages;
            items[s].pages_head_stride = kv->stride;
            items[s].table_id = session->table_id + l;
            items[s].table_version = kv->table_version;
            items[s].n_table_pages = kv->n_pages;
        }
        check(fv_cuda_attend_plan(backend, items, b->batch), "plan");
        launches[l] = backend->launches[0];
    }
    check(FV_CUDA(cudaEventCreate(&events[0])), "event");
    check(FV_CUDA(cudaEventCreate(&events[1])), "event");
    check(fv_cuda_attend_start(backend, launches, b->n_layers), "start");
    check(FV_CUDA(cudaEventRecord(events[0], backend->stream)), "event");
    for (int i = 0; i < ROUNDS; i++) {
        check(fv_cuda_attend_start(backend, launches, b->n_layers), "start");
    }
    check(FV_CUDA(cudaEventRecord(events[1], backend->stream)), "event");
    check(fv_cuda_finish(backend, NULL, NULL), "finish");
    check(FV_CUDA(cudaEventElapsedTime(&ms, events[0], events[1])), "elapsed");
    (void)cudaEventDestroy(events[0]);
    (void)cudaEventDestroy(events[1]);
    return (double)ms * 1000.0 / (double)(ROUNDS * (int)b->n_layers);
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a;
    const double y = *(const double *)b;

    return (x > y) - (x < y);
}

static result_t measure(bench_t *b, double seconds)
{
    static double us[STEPS_MAX];
    static double device[STEPS_MAX];
    const double end = now_us() + seconds * 1e6;
    result_t r = {0};

    for (uint32_t i = 0; i < 20U; i++) { /* areas grow, tables arrive */
        (void)step(b, i % b->n_layers, &us[0]);
    }
    while ((r.n_steps < STEPS_MAX) && (now_us() < end) &&
           (b->lengths[0] < (uint64_t)b->context + 3500U)) {
        device[r.n_steps] = step(b, (uint32_t)r.n_steps % b->n_layers, &us[r.n_steps]);
        r.n_steps++;
    }
    qsort(us, r.n_steps, sizeof(*us), ascending);
    qsort(device, r.n_steps, sizeof(*device), ascending);
    r.step_us = us[r.n_steps / 2U];
    r.p99_us = us[r.n_steps * 99U / 100U];
    r.device_us = device[r.n_steps / 2U];
    r.kernel_us = time_kernel(b);
    return r;
}

static size_t parse_list(const char *text, uint32_t *out)
{
    size_t n = 0;
    char *end = NULL;

    for (; (n < CASES_MAX) && (*text != '\0'); n++) {
        out[n] = (uint32_t)strtoul(text, &end, 10);
        if ((end == text) || (out[n] == 0U)) {
            (void)fprintf(stderr, "bench_step_cuda: given \"%s\", expected numbers > 0\n", text);
            exit(2);
        }
        text = (*end == ',') ? (end + 1) : end;
    }
    return n;
}

static options_t parse(int argc, char **argv)
{
    static const struct option k_options[] = {
        {"batch", required_argument, NULL, 'b'},   {"context", required_argument, NULL, 'c'},
        {"seconds", required_argument, NULL, 's'}, {"pageable", no_argument, NULL, 'p'},
        {"json", required_argument, NULL, 'j'},    {NULL, 0, NULL, 0},
    };
    options_t o = {.seconds = 2.0};
    int c = 0;

    o.n_batches = parse_list("1,64", o.batches);
    o.n_contexts = parse_list("4096,131072", o.contexts);
    while ((c = getopt_long(argc, argv, "", k_options, NULL)) != -1) {
        switch (c) {
        case 'b':
            o.n_batches = parse_list(optarg, o.batches);
            break;
        case 'c':
            o.n_contexts = parse_list(optarg, o.contexts);
            break;
        case 's':
            o.seconds = strtod(optarg, NULL);
            break;
        case 'p':
            o.is_pageable = true;
            break;
        case 'j':
            o.json = optarg;
            break;
        default:
            exit(2);
        }
    }
    return o;
}

int main(int argc, char **argv)
{
    const options_t o = parse(argc, argv);
    fv_log_level_now = FV_LOG_WARN; /* sizes at each start would cut the table up */
    FILE *json = (o.json == NULL) ? NULL : fopen(o.json, "w");

    (void)printf("| batch | context | layers | steps | step p50 | p99 | device | kernel | over |\n"
                 "|---|---|---|---|---|---|---|---|---|\n");
    for (size_t c = 0; c < o.n_contexts; c++) {
        for (size_t i = 0; i < o.n_batches; i++) {
            static bench_t b;

            create(&b, &o, o.batches[i], o.contexts[c]);
            const result_t r = measure(&b, o.seconds);

            (void)printf("| %u | %u | %u | %zu | %.1f | %.1f | %.0f | %.1f | %.1f |\n", b.batch,
                         b.context, b.n_layers, r.n_steps, r.step_us, r.p99_us, r.device_us,
                         r.kernel_us, r.step_us - r.kernel_us);
            (void)fflush(stdout);
            if (json != NULL) {
                (void)fprintf(json,
                              "{\"batch\": %u, \"context\": %u, \"layers\": %u, \"steps\": %zu, "
                              "\"pinned\": %s, \"step_p50_us\": %.2f, \"step_p99_us\": %.2f, "
                              "\"device_p50_us\": %.0f, \"kernel_us\": %.2f}\n",
                              b.batch, b.context, b.n_layers, r.n_steps,
                              o.is_pageable ? "false" : "true", r.step_us, r.p99_us, r.device_us,
                              r.kernel_us);
            }
            destroy(&b);
        }
    }
    if (json != NULL) {
        (void)fclose(json);
    }
    return 0;
}
