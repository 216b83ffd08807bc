/*
 * cmd_bench.c - `fovea bench`: a quick look at the latency and throughput of a running service.
 *
 * L lanes (--in-flight) keep one request each in flight on one stream. A lane has its own B sessions
 * (--batch), all filled with C tokens of context; its requests decode one token of each. The context is
 * computed once and forked, unless --own-context asks for separate copies: those are what a real mix
 * of sequences costs in memory bandwidth, but take L * B prefills to set up.
 *
 * Figures: latency from submit to result, as the client sees it; tokens/s = B * requests/s; KV read in
 * GB/s = tokens/s * (mean context) * Hkv * (dk + dv) * bytes of the KV dtype.
 * For figures to publish use bench/, which verifies before it times and compares with a bare echo.
 */
#include "client/cli.h"

#include <limits.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PREFILL_CHUNK  256 /* tokens of one request while the context is filled */
#define SAMPLES_MAX    (1U << 20U)
#define LANES_MAX      1024
#define BATCH_MAX      4096
#define WARMUP_SECONDS 0.2

enum {
    OPT_BATCH = 3000,
    OPT_CONTEXT,
    OPT_IN_FLIGHT,
    OPT_DURATION,
    OPT_DTYPE,
    OPT_QUERY_ONLY,
    OPT_OWN
};

typedef struct fv_bench_args {
    fv_spec_options_t spec;
    uint32_t batch, context, n_lanes;
    double duration_s;
    fovea_dtype_t dtype;
    bool is_query_only, is_own_context, is_json;
} fv_bench_args_t;

typedef struct fv_bench fv_bench_t;

/* One request in flight at a time, with the memory it uses. */
typedef struct fv_lane {
    fv_bench_t *bench;
    fovea_attend_item_t *items; /* [batch] */
    void *q, *k, *v, *out;
    double submitted_s;
} fv_lane_t;

struct fv_bench {
    const fv_cli_t *cli;
    fv_bench_args_t args;
    fovea_client_t *client;
    fovea_stream_t *stream;
    fv_lane_t *lanes;
    size_t q_token, k_token, v_token, out_token; /* bytes of one token */
    double begin_s, end_s;                       /* of the timed part; 0 = not begun */
    double *samples_us;
    uint32_t n_samples;
    uint64_t n_requests, server_us, tokens_read;
    fovea_error_t error; /* the first one */
};

static const struct argp_option k_options[] = {
    {0, 0, 0, 0, "Load:", 1},
    {"batch", OPT_BATCH, "N", 0, "Sessions of one request (default 1)", 0},
    {"context", OPT_CONTEXT, "N", 0, "Tokens in each session before timing (default 1024)", 0},
    {"in-flight", OPT_IN_FLIGHT, "N", 0,
     "Requests in flight, each with sessions of its own (default 1)", 0},
    {"duration", OPT_DURATION, "SECONDS", 0, "Of the timed part (default 3)", 0},
    {"dtype", OPT_DTYPE, "f32|f16|bf16", 0, "Of q, k, v and out on the wire (default bf16)", 0},
    {"query-only", OPT_QUERY_ONLY, 0, 0, "Append nothing: the context stays as long as it is", 0},
    {"own-context", OPT_OWN, 0, 0, "Fill every session separately instead of forking one", 0},
    {"json", 'j', 0, 0, "One JSON object", 0},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    fv_bench_args_t *a = state->input;

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &a->spec;
        return 0;
    case OPT_BATCH:
        a->batch = (uint32_t)fv_cli_u64(state, "--batch", arg, BATCH_MAX);
        break;
    case OPT_CONTEXT:
        a->context = (uint32_t)fv_cli_u64(state, "--context", arg, 1U << 24U);
        break;
    case OPT_IN_FLIGHT:
        a->n_lanes = (uint32_t)fv_cli_u64(state, "--in-flight", arg, LANES_MAX);
        break;
    case OPT_DURATION:
        a->duration_s = fv_cli_real(state, "--duration", arg);
        break;
    case OPT_DTYPE:
        a->dtype = fv_cli_dtype(state, arg);
        break;
    case OPT_QUERY_ONLY:
        a->is_query_only = true;
        break;
    case OPT_OWN:
        a->is_own_context = true;
        break;
    case 'j':
        a->is_json = true;
        break;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", arg);
        break;
    case ARGP_KEY_END:
        if ((a->batch == 0) || (a->n_lanes == 0) || !(a->duration_s > 0.0)) {
            argp_error(state, "--batch, --in-flight and --duration must be more than 0");
        }
        if (a->is_query_only && (a->context == 0)) {
            argp_error(state, "--query-only needs a --context to read");
        }
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static const struct argp_child k_children[] = {{&fv_spec_argp, 0, NULL, 2}, {0}};

static const struct argp k_argp = {
    .options = k_options,
    .parser = parse,
    .children = k_children,
    .doc = "Measure decode latency and throughput of a running service with random data.\v"
           "Default model: 1 layer, 32 query heads, 8 KV heads, head dim 128, bf16.\n\n"
           "Exit codes: 0 success, 1 service error, 2 wrong usage.",
};

/* ------------------------------------------------------------------ data */

static double now_s(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + ((double)t.tv_nsec * 1e-9);
}

/* xorshift64: the values do not matter, only that they are finite and not all equal. */
static uint32_t next_random(uint64_t *state)
{
    *state ^= *state << 13U;
    *state ^= *state >> 7U;
    *state ^= *state << 17U;
    return (uint32_t)(*state >> 32U);
}

/* Random finite numbers below 1 in magnitude, made straight as bits of the dtype. */
static void *random_tensor(size_t n_bytes, fovea_dtype_t dtype, uint64_t *seed)
{
    uint8_t *data = malloc(n_bytes + 1);
    size_t element = fovea_dtype_bytes(dtype);

    for (size_t i = 0; (data != NULL) && (i < n_bytes); i += element) {
        uint32_t r = next_random(seed);
        if (dtype == FOVEA_DTYPE_F32) {
            float value = ((float)(r >> 8U) / 8388608.0F) - 1.0F; /* [-1, 1) */
            memcpy(data + i, &value, sizeof(value));
        } else { /* sign and mantissa random, exponent that of 1/8 (f16) or 1/8..1/2 (bf16) */
            uint16_t bits = (dtype == FOVEA_DTYPE_F16) ? (uint16_t)(0x3000U | (r & 0x83FFU))
                                                       : (uint16_t)(0x3E00U | (r & 0x80FFU));
            memcpy(data + i, &bits, sizeof(bits));
        }
    }
    return data;
}

static bool lane_init(fv_bench_t *b, fv_lane_t *lane, uint64_t *seed)
{
    size_t n = b->args.batch;

    lane->bench = b;
    lane->items = calloc(n, sizeof(*lane->items));
    lane->q = random_tensor(n * b->q_token, b->args.dtype, seed);
    lane->k = random_tensor(n * b->k_token, b->args.dtype, seed);
    lane->v = random_tensor(n * b->v_token, b->args.dtype, seed);
    lane->out = malloc((n * b->out_token) + 1);
    return (lane->items != NULL) && (lane->q != NULL) && (lane->k != NULL) && (lane->v != NULL) &&
           (lane->out != NULL);
}

static void lane_fini(fv_lane_t *lane)
{
    free(lane->items);
    free(lane->q);
    free(lane->k);
    free(lane->v);
    free(lane->out);
}

/* ------------------------------------------------------------------ set-up */

/* Appends `context` random tokens to one session, in chunks. */
static fovea_code_t fill(fv_bench_t *b, const fovea_session_id_t *session, uint64_t *seed)
{
    const uint32_t chunk = (b->args.context < PREFILL_CHUNK) ? b->args.context : PREFILL_CHUNK;
    fovea_attend_item_t item = {.session = *session};
    void *q = random_tensor(chunk * b->q_token, b->args.dtype, seed);
    void *k = random_tensor(chunk * b->k_token, b->args.dtype, seed);
    void *v = random_tensor(chunk * b->v_token, b->args.dtype, seed);
    void *out = malloc((chunk * b->out_token) + 1);
    fovea_code_t code = FOVEA_OK;

    if ((q == NULL) || (k == NULL) || (v == NULL) || (out == NULL)) {
        code = FOVEA_RESOURCE_EXHAUSTED;
        b->error = (fovea_error_t){code, "out of host memory"};
    }
    for (uint32_t at = 0; (code == FOVEA_OK) && (at < b->args.context); at += item.n_tokens) {
        item.position = at;
        item.n_tokens = ((b->args.context - at) < chunk) ? (b->args.context - at) : chunk;
        fovea_attend_request_t r = {.dtype = b->args.dtype,
                                    .n_items = 1,
                                    .items = &item,
                                    .q = q,
                                    .q_bytes = item.n_tokens * b->q_token,
                                    .k = k,
                                    .k_bytes = item.n_tokens * b->k_token,
                                    .v = v,
                                    .v_bytes = item.n_tokens * b->v_token,
                                    .out = out,
                                    .out_bytes = item.n_tokens * b->out_token};
        code = fovea_attend(b->client, &r, b->cli->timeout_ms, NULL, &b->error);
    }
    free(q);
    free(k);
    free(v);
    free(out);
    return code;
}

static fovea_code_t open_one(fv_bench_t *b,
                             const char *model_id,
                             const fovea_session_id_t *first,
                             fovea_session_id_t *out,
                             uint64_t *seed)
{
    fovea_session_options_t options = {.max_tokens_hint = b->args.context};
    fovea_code_t code = FOVEA_OK;

    if ((first != NULL) && !b->args.is_own_context) {
        return fovea_fork_session(b->client, first, FOVEA_WHOLE, b->cli->timeout_ms, out,
                                  &b->error);
    }
    code = fovea_open_session(b->client, model_id, &options, b->cli->timeout_ms, out, &b->error);
    return (code == FOVEA_OK) ? fill(b, out, seed) : code;
}

static fovea_code_t set_up(fv_bench_t *b)
{
    const fovea_session_id_t *first = NULL;
    uint64_t seed = 0x9E3779B97F4A7C15U;
    fovea_model_t model;
    fovea_code_t code =
        fovea_register_model(b->client, &b->args.spec.spec, b->cli->timeout_ms, &model, &b->error);

    for (uint32_t i = 0; (code == FOVEA_OK) && (i < b->args.n_lanes); i++) {
        fv_lane_t *lane = &b->lanes[i];
        if (!lane_init(b, lane, &seed)) {
            b->error = (fovea_error_t){FOVEA_RESOURCE_EXHAUSTED, "out of host memory"};
            return FOVEA_RESOURCE_EXHAUSTED;
        }
        for (uint32_t j = 0; (code == FOVEA_OK) && (j < b->args.batch); j++) {
            fovea_session_id_t id;
            code = open_one(b, model.model_id, first, &id, &seed);
            if (code == FOVEA_OK) {
                lane->items[j] = (fovea_attend_item_t){id, b->args.context, 1};
                first = &b->lanes[0].items[0].session;
            }
        }
    }
    if (code == FOVEA_OK) {
        code = fovea_stream_open(b->client, NULL, &b->stream, &b->error);
    }
    return code;
}

static void tear_down(fv_bench_t *b)
{
    fovea_stream_close(b->stream);
    for (uint32_t i = 0; (b->lanes != NULL) && (i < b->args.n_lanes); i++) {
        for (uint32_t j = 0; (b->lanes[i].items != NULL) && (j < b->args.batch); j++) {
            if (b->lanes[i].items[j].n_tokens != 0) { /* it was opened */
                (void)fovea_close_session(b->client, &b->lanes[i].items[j].session, 0, NULL);
            }
        }
        lane_fini(&b->lanes[i]);
    }
    free(b->lanes);
    free(b->samples_us);
    fovea_close(b->client);
}

/* ------------------------------------------------------------------ the timed part */

static void submit(fv_lane_t *lane);

static void on_done(const fovea_result_t *result)
{
    fv_lane_t *lane = result->user;
    fv_bench_t *b = lane->bench;
    double done_s = now_s();

    if (result->error.code != FOVEA_OK) {
        if (b->error.code == FOVEA_OK) {
            b->error = result->error;
        }
        return; /* this lane ends; the others notice */
    }
    if (lane->submitted_s >= b->begin_s) {
        if (b->n_samples < SAMPLES_MAX) {
            b->samples_us[b->n_samples++] = (done_s - lane->submitted_s) * 1e6;
        }
        b->n_requests++;
        b->server_us += result->timings.total_us;
        b->tokens_read += lane->items[0].position + (b->args.is_query_only ? 0U : 1U);
    }
    for (uint32_t j = 0; !b->args.is_query_only && (j < b->args.batch); j++) {
        lane->items[j].position++;
    }
    if ((done_s < b->end_s) && (b->error.code == FOVEA_OK)) {
        submit(lane);
    }
}

static void submit(fv_lane_t *lane)
{
    fv_bench_t *b = lane->bench;
    bool is_append = !b->args.is_query_only;
    fovea_attend_request_t r = {.dtype = b->args.dtype,
                                .flags = is_append ? 0U : FOVEA_ATTEND_QUERY_ONLY,
                                .n_items = b->args.batch,
                                .items = lane->items,
                                .q = lane->q,
                                .q_bytes = b->args.batch * b->q_token,
                                .k = is_append ? lane->k : NULL,
                                .k_bytes = is_append ? (b->args.batch * b->k_token) : 0,
                                .v = is_append ? lane->v : NULL,
                                .v_bytes = is_append ? (b->args.batch * b->v_token) : 0,
                                .out = lane->out,
                                .out_bytes = b->args.batch * b->out_token};
    fovea_error_t error;

    lane->submitted_s = now_s();
    if ((fovea_stream_submit(b->stream, &r, on_done, lane, NULL, &error) != FOVEA_OK) &&
        (b->error.code == FOVEA_OK)) {
        b->error = error;
    }
}

static fovea_code_t measure(fv_bench_t *b)
{
    b->begin_s = now_s() + WARMUP_SECONDS;
    b->end_s = b->begin_s + b->args.duration_s;
    for (uint32_t i = 0; i < b->args.n_lanes; i++) {
        /* A token that is only asked about again must be one that is there. */
        for (uint32_t j = 0; b->args.is_query_only && (j < b->args.batch); j++) {
            b->lanes[i].items[j].position = b->args.context - 1;
        }
        submit(&b->lanes[i]);
    }
    fovea_code_t code = fovea_stream_flush(b->stream, FOVEA_TIMEOUT_NONE, &b->error);
    return (code != FOVEA_OK) ? code : b->error.code;
}

/* ------------------------------------------------------------------ report */

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a;
    double y = *(const double *)b;

    return (x > y) - (x < y);
}

/* Nearest-rank quantile of the sorted samples. */
static double quantile(const fv_bench_t *b, double p)
{
    return b->samples_us[(size_t)(p * (double)(b->n_samples - 1))];
}

/* What a token brings and what is stored of it: elements of each tensor's token. */
typedef struct fv_bench_dims {
    uint32_t qk, v;     /* of a head; LATENT: v is part of k */
    uint32_t k, v_sent; /* of a token, all KV heads */
} fv_bench_dims_t;

static fv_bench_dims_t dims_of(const fovea_model_spec_t *s)
{
    uint32_t v = (s->head_dim_v == 0) ? s->head_dim_qk : s->head_dim_v;
    uint32_t latent = s->latent_dim + s->rope_dim;

    if (s->kind == FOVEA_KIND_LATENT) {
        return (fv_bench_dims_t){.qk = latent, .v = s->latent_dim, .k = latent};
    }
    return (fv_bench_dims_t){.qk = s->head_dim_qk,
                             .v = v,
                             .k = s->n_kv_heads * s->head_dim_qk,
                             .v_sent = s->n_kv_heads * v};
}

static int report(fv_bench_t *b)
{
    const fovea_model_spec_t *s = &b->args.spec.spec;
    fv_bench_dims_t dims = dims_of(s);
    double seconds = b->args.duration_s;
    double tokens_s = (double)b->n_requests * b->args.batch / seconds;
    double token_bytes = (s->kv_dtype == FOVEA_DTYPE_FP8_LATENT)
                             ? ((double)s->latent_dim * 33.0 / 32.0 + 2.0 * s->rope_dim)
                             : ((dims.k + dims.v_sent) * (double)fovea_dtype_bytes(s->kv_dtype));
    double kv_bytes = (double)b->tokens_read * b->args.batch * token_bytes;

    if (b->n_samples == 0) {
        (void)fprintf(stderr, "fovea: no request finished within --duration\n");
        return FV_EXIT_SERVICE;
    }
    qsort(b->samples_us, b->n_samples, sizeof(*b->samples_us), compare_double);
    if (b->args.is_json) {
        cJSON *json = cJSON_CreateObject();
        fv_json_u64(json, "n_requests", b->n_requests);
        fv_json_real(json, "p50_us", quantile(b, 0.50));
        fv_json_real(json, "p99_us", quantile(b, 0.99));
        fv_json_real(json, "max_us", quantile(b, 1.0));
        fv_json_real(json, "server_mean_us", (double)b->server_us / (double)b->n_requests);
        fv_json_real(json, "requests_per_s", (double)b->n_requests / seconds);
        fv_json_real(json, "tokens_per_s", tokens_s);
        fv_json_real(json, "kv_read_gb_per_s", kv_bytes / seconds / 1e9);
        return fv_cli_print_json(json, true);
    }
    (void)printf("model %u/%u heads, dim %u/%u; batch %u, context %u, in flight %u, %s\n",
                 s->n_q_heads, (s->kind == FOVEA_KIND_LATENT) ? 1U : s->n_kv_heads, dims.qk, dims.v,
                 b->args.batch, b->args.context, b->args.n_lanes,
                 b->args.is_query_only ? "query only" : "decode");
    (void)printf(
        "latency   p50 %.0f us   p99 %.0f us   max %.0f us   (in the service: mean %.0f us)\n",
        quantile(b, 0.50), quantile(b, 0.99), quantile(b, 1.0),
        (double)b->server_us / (double)b->n_requests);
    (void)printf("rate      %.0f requests/s   %.0f tokens/s   KV read %.2f GB/s\n",
                 (double)b->n_requests / seconds, tokens_s, kv_bytes / seconds / 1e9);
    return FV_EXIT_OK;
}

static void token_sizes(fv_bench_t *b)
{
    const fovea_model_spec_t *s = &b->args.spec.spec;
    size_t element = fovea_dtype_bytes(b->args.dtype);
    fv_bench_dims_t dims = dims_of(s);

    b->q_token = element * s->n_q_heads * dims.qk;
    b->k_token = element * dims.k;
    b->v_token = element * dims.v_sent;
    b->out_token = element * s->n_q_heads * dims.v;
}

int fv_cmd_bench(const fv_cli_t *cli, int argc, char **argv)
{
    fv_bench_t b = {.cli = cli,
                    .args = {.spec.spec = {.name = "fovea-bench",
                                           .n_layers = 1,
                                           .n_q_heads = 32,
                                           .n_kv_heads = 8,
                                           .head_dim_qk = 128,
                                           .kv_dtype = FOVEA_DTYPE_BF16},
                             .batch = 1,
                             .context = 1024,
                             .n_lanes = 1,
                             .duration_s = 3.0,
                             .dtype = FOVEA_DTYPE_BF16}};
    int rc = FV_EXIT_OK;

    (void)argp_parse(&k_argp, argc, argv, 0, NULL, &b.args);
    /* As a frontend should: keep the memory of large messages instead of faulting it in each time. */
    (void)mallopt(M_MMAP_THRESHOLD, 1 << 30);
    (void)mallopt(M_TRIM_THRESHOLD, INT_MAX);
    (void)mallopt(M_TOP_PAD, 64 << 20);
    rc = fv_cli_connect(cli, &b.client);
    if (rc != FV_EXIT_OK) {
        return rc;
    }
    token_sizes(&b);
    b.lanes = calloc(b.args.n_lanes, sizeof(*b.lanes));
    b.samples_us = malloc(SAMPLES_MAX * sizeof(*b.samples_us));
    if ((b.lanes == NULL) || (b.samples_us == NULL)) {
        b.error = (fovea_error_t){FOVEA_RESOURCE_EXHAUSTED, "out of host memory"};
        rc = fv_cli_error(&b.error);
    } else if ((set_up(&b) != FOVEA_OK) || (measure(&b) != FOVEA_OK)) {
        rc = fv_cli_error(&b.error);
    } else {
        rc = report(&b);
    }
    tear_down(&b);
    return rc;
}
