/*
 * bench_mixed.c - what decode waits while a long prompt is prefilled, against a running fovead.
 *
 *   fovead --listen unix:/tmp/f.sock &
 *   bench_mixed --connect unix:/tmp/f.sock --clients 2 --context 4096 --prompt 16384
 *
 * Model: 1 layer, 32 query heads, 8 KV heads, d = 128, bf16. Decode: so many clients, each with a session of its own and one
 * request in flight, one token after the other. Each round measures decode alone for --seconds, the prompt alone, and then
 * decode while the prompt is prefilled into a fresh session, in messages of --chunk tokens; a round therefore compares
 * what was measured within one minute. Reported: latencies at the client, p50 and p99 of a round; medians over rounds; ratios
 * taken within a round. The prompt's output with decode beside it is compared with that of the prompt alone.
 */
#include "client/fovea.h"

#include <argp.h>
#include <cjson/cJSON.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define N_Q_HEADS   32U
#define N_KV_HEADS  8U
#define HEAD_DIM    128U
#define Q_BYTES     ((size_t)N_Q_HEADS * HEAD_DIM * 2U)
#define KV_BYTES    ((size_t)N_KV_HEADS * HEAD_DIM * 2U)
#define CLIENTS_MAX 64
#define ROUNDS_MAX  32
#define SAMPLES_MAX 200000
#define TOLERANCE   0.02 /* bf16 keeps 8 bits; |v| <= 1 */
#define TIMEOUT_MS  3600000

typedef struct options {
    const char *connect, *json;
    uint32_t n_clients, n_rounds;
    uint64_t context, prompt, chunk;
    double seconds;
} options_t;

/* Microseconds; seconds of the prompt. */
typedef struct percentiles {
    double p50, p99;
} percentiles_t;

/* Of decode requests: at the client, and what the service says of its part. */
typedef struct phase {
    percentiles_t client, total, queue, compute, exchange;
    double rate;
} phase_t;

typedef struct round {
    phase_t alone, beside;
    double prompt_alone, prompt_beside;
} round_t;

/* One decode request; microseconds. */
typedef struct sample {
    double client;
    fovea_timings_t service;
} sample_t;

typedef struct bench bench_t;

typedef struct decoder {
    bench_t *bench;
    fovea_session_id_t session;
    uint64_t position;
    sample_t *samples; /* [SAMPLES_MAX] */
    size_t n;
    bool has_failed;
    pthread_t thread;
} decoder_t;

struct bench {
    options_t options;
    fovea_client_t *client; /* of the decoders */
    fovea_client_t
        *prompt_client; /* another frontend: its messages have a connection of their own */
    fovea_model_t model;
    uint16_t *q, *k, *v;      /* [chunk tokens, heads, d] random in [-1, 1] */
    uint16_t *out, *expected; /* [chunk tokens] of the prompt's last message */
    decoder_t decoders[CLIENTS_MAX];
    atomic_bool stops;
};

static double now_s(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static bool say(fovea_code_t code, const fovea_error_t *error)
{
    if (code != FOVEA_OK) {
        (void)fprintf(stderr, "bench_mixed: %s: %s\n", fovea_code_name(code), error->message);
    }
    return code == FOVEA_OK;
}

static uint16_t *random_tensor(size_t n_elems, uint32_t x)
{
    uint16_t *tensor = malloc(n_elems * sizeof(*tensor));

    for (size_t i = 0; (tensor != NULL) && (i < n_elems); i++) {
        x = (x * 1664525U) + 1013904223U;
        float value = ((float)(x >> 8U) / 8388608.0F) - 1.0F;
        uint32_t bits = 0;
        memcpy(&bits, &value, sizeof(bits));
        tensor[i] = (uint16_t)(bits >> 16U);
    }
    return tensor;
}

static float widen(uint16_t bits)
{
    uint32_t word = (uint32_t)bits << 16U;
    float value = 0.0F;

    memcpy(&value, &word, sizeof(value));
    return value;
}

/* ------------------------------------------------------------------ requests */

static fovea_attend_request_t
request_of(const bench_t *b, const fovea_attend_item_t *item, uint16_t *out)
{
    return (fovea_attend_request_t){.dtype = FOVEA_DTYPE_BF16,
                                    .n_items = 1,
                                    .items = item,
                                    .q = b->q,
                                    .q_bytes = item->n_tokens * Q_BYTES,
                                    .k = b->k,
                                    .k_bytes = item->n_tokens * KV_BYTES,
                                    .v = b->v,
                                    .v_bytes = item->n_tokens * KV_BYTES,
                                    .out = out,
                                    .out_bytes = item->n_tokens * Q_BYTES};
}

/* A fresh session with n_tokens in it; `out` has the output of the last message. */
static bool fill(bench_t *b, uint64_t n_tokens, uint16_t *out, fovea_session_id_t *session)
{
    fovea_error_t error = {0};
    fovea_session_options_t options = {.max_tokens_hint = n_tokens + 4096U};

    if (!say(fovea_open_session(b->prompt_client, b->model.model_id, &options, 0, session, &error),
             &error)) {
        return false;
    }
    for (uint64_t at = 0; at < n_tokens;) {
        uint64_t n = (n_tokens - at < b->options.chunk) ? (n_tokens - at) : b->options.chunk;
        fovea_attend_item_t item = {.session = *session, .position = at, .n_tokens = (uint32_t)n};
        fovea_attend_request_t request = request_of(b, &item, out);
        if (!say(fovea_attend(b->prompt_client, &request, TIMEOUT_MS, NULL, &error), &error)) {
            return false;
        }
        at += n;
    }
    return true;
}

/* The whole prompt, timed, and its session closed. Negative: it failed. */
static double prefill(bench_t *b, uint16_t *out)
{
    fovea_session_id_t session;
    fovea_error_t error = {0};
    double begin = now_s();

    if (!fill(b, b->options.prompt, out, &session)) {
        return -1.0;
    }
    double seconds = now_s() - begin;
    return say(fovea_close_session(b->prompt_client, &session, 0, &error), &error) ? seconds : -1.0;
}

static bool is_same(const bench_t *b)
{
    uint64_t rest = b->options.prompt % b->options.chunk;
    size_t n = (size_t)((rest == 0) ? b->options.chunk : rest) * N_Q_HEADS * HEAD_DIM;

    for (size_t i = 0; i < n; i++) {
        double difference = fabs((double)widen(b->out[i]) - (double)widen(b->expected[i]));
        if (!(difference <= TOLERANCE)) {
            (void)fprintf(stderr,
                          "bench_mixed: the prompt's output differs by %g at %zu, at most %g\n",
                          difference, i, TOLERANCE);
            return false;
        }
    }
    return true;
}

/* ------------------------------------------------------------------ decode */

static void *decode(void *arg)
{
    decoder_t *d = arg;
    bench_t *b = d->bench;
    fovea_stream_t *stream = NULL;
    fovea_error_t error = {0};
    static _Thread_local uint16_t out[N_Q_HEADS * HEAD_DIM];

    d->has_failed = !say(fovea_stream_open(b->client, NULL, &stream, &error), &error);
    while (!d->has_failed && !atomic_load(&b->stops) && (d->n < SAMPLES_MAX)) {
        fovea_attend_item_t item = {.session = d->session, .position = d->position, .n_tokens = 1};
        fovea_attend_request_t request = request_of(b, &item, out);
        fovea_result_t result = {0};
        uint64_t ticket = 0;
        double begin = now_s();
        d->has_failed =
            !say(fovea_stream_submit(stream, &request, NULL, NULL, &ticket, &error), &error) ||
            !say(fovea_stream_wait(stream, ticket, TIMEOUT_MS, &result, &error), &error) ||
            !say(result.error.code, &result.error);
        d->samples[d->n++] =
            (sample_t){.client = (now_s() - begin) * 1e6, .service = result.timings};
        d->position++;
    }
    fovea_stream_close(stream);
    return NULL;
}

static bool start_decode(bench_t *b)
{
    atomic_store(&b->stops, false);
    for (uint32_t i = 0; i < b->options.n_clients; i++) {
        b->decoders[i].n = 0;
        if (pthread_create(&b->decoders[i].thread, NULL, decode, &b->decoders[i]) != 0) {
            return false;
        }
    }
    return true;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a;
    double y = *(const double *)b;

    return (x > y) - (x < y);
}

/* Sorts them. */
static percentiles_t percentiles(double *values, size_t n)
{
    qsort(values, n, sizeof(*values), compare);
    return (percentiles_t){.p50 = values[n / 2U], .p99 = values[(n * 99U) / 100U]};
}

/* One figure of all samples. offset: of a uint32_t in the service's timings; SIZE_MAX: the client's. */
static percentiles_t gather(const bench_t *b, size_t offset, double *values)
{
    size_t n = 0;

    for (uint32_t i = 0; i < b->options.n_clients; i++) {
        for (size_t k = 0; k < b->decoders[i].n; k++) {
            const sample_t *sample = &b->decoders[i].samples[k];
            uint32_t us = 0;

            if (offset != SIZE_MAX) {
                memcpy(&us, (const char *)&sample->service + offset, sizeof(us));
            }
            values[n++] = (offset == SIZE_MAX) ? sample->client : (double)us;
        }
    }
    return percentiles(values, n);
}

/* Ends the decoders; of all their requests, in so many seconds. False: one failed. */
static bool stop_decode(bench_t *b, double begin, phase_t *out)
{
    bool is_ok = true;
    size_t n = 0;

    atomic_store(&b->stops, true);
    for (uint32_t i = 0; i < b->options.n_clients; i++) {
        (void)pthread_join(b->decoders[i].thread, NULL);
        is_ok = is_ok && !b->decoders[i].has_failed && (b->decoders[i].n > 0);
        n += b->decoders[i].n;
    }
    out->rate = (double)n / (now_s() - begin);
    double *values = malloc((n + 1U) * sizeof(*values));
    if (!is_ok || (values == NULL)) {
        free(values);
        return false;
    }
    out->client = gather(b, SIZE_MAX, values);
    out->total = gather(b, offsetof(fovea_timings_t, total_us), values);
    out->queue = gather(b, offsetof(fovea_timings_t, queue_us), values);
    out->compute = gather(b, offsetof(fovea_timings_t, compute_us), values);
    out->exchange = gather(b, offsetof(fovea_timings_t, exchange_us), values);
    free(values);
    return true;
}

/* ------------------------------------------------------------------ rounds */

static void pause_s(double seconds)
{
    struct timespec t = {.tv_sec = (time_t)seconds,
                         .tv_nsec = (long)((seconds - floor(seconds)) * 1e9)};

    (void)nanosleep(&t, NULL);
}

static bool run_round(bench_t *b, round_t *r)
{
    if (!start_decode(b)) {
        return false;
    }
    double begin = now_s();
    pause_s(b->options.seconds);
    if (!stop_decode(b, begin, &r->alone)) {
        return false;
    }
    r->prompt_alone = prefill(b, b->expected);
    if ((r->prompt_alone < 0.0) || !start_decode(b)) {
        return false;
    }
    begin = now_s();
    r->prompt_beside = prefill(b, b->out);
    return stop_decode(b, begin, &r->beside) && (r->prompt_beside >= 0.0) && is_same(b);
}

#define MEDIAN(rounds, n, expr) median((rounds), (n), offsetof(round_t, expr), SIZE_MAX)
#define RATIO(rounds, n, a, b)  median((rounds), (n), offsetof(round_t, a), offsetof(round_t, b))

static double median(const round_t *rounds, uint32_t n, size_t offset, size_t divide_by)
{
    double values[ROUNDS_MAX];

    for (uint32_t i = 0; i < n; i++) {
        double d = 1.0;
        memcpy(&values[i], (const char *)&rounds[i] + offset, sizeof(double));
        if (divide_by != SIZE_MAX) {
            memcpy(&d, (const char *)&rounds[i] + divide_by, sizeof(d));
        }
        values[i] /= d;
    }
    qsort(values, n, sizeof(values[0]), compare);
    return (values[n / 2U] + values[(n - 1U) / 2U]) / 2.0;
}

static bool report(const bench_t *b, const round_t *rounds, uint32_t n)
{
    const options_t *o = &b->options;
    double flops = 2.0 * N_Q_HEADS * 2.0 * HEAD_DIM * (double)o->prompt * (double)o->prompt / 2.0;
    cJSON *json = cJSON_CreateObject();
    const struct {
        const char *name;
        double value;
    } figures[] = {
        {"clients", o->n_clients},
        {"context", (double)o->context},
        {"prompt", (double)o->prompt},
        {"chunk", (double)o->chunk},
        {"rounds", n},
        {"decode_alone_p50_us", MEDIAN(rounds, n, alone.client.p50)},
        {"decode_alone_p99_us", MEDIAN(rounds, n, alone.client.p99)},
        {"decode_beside_p50_us", MEDIAN(rounds, n, beside.client.p50)},
        {"decode_beside_p99_us", MEDIAN(rounds, n, beside.client.p99)},
        {"p50_ratio", RATIO(rounds, n, beside.client.p50, alone.client.p50)},
        {"p99_ratio", RATIO(rounds, n, beside.client.p99, alone.client.p99)},
        /* where it goes: the service's own account */
        {"alone_total_p99_us", MEDIAN(rounds, n, alone.total.p99)},
        {"alone_queue_p99_us", MEDIAN(rounds, n, alone.queue.p99)},
        {"alone_compute_p50_us", MEDIAN(rounds, n, alone.compute.p50)},
        {"alone_compute_p99_us", MEDIAN(rounds, n, alone.compute.p99)},
        {"beside_total_p50_us", MEDIAN(rounds, n, beside.total.p50)},
        {"beside_total_p99_us", MEDIAN(rounds, n, beside.total.p99)},
        {"beside_queue_p50_us", MEDIAN(rounds, n, beside.queue.p50)},
        {"beside_queue_p99_us", MEDIAN(rounds, n, beside.queue.p99)},
        {"beside_compute_p50_us", MEDIAN(rounds, n, beside.compute.p50)},
        {"beside_compute_p99_us", MEDIAN(rounds, n, beside.compute.p99)},
        {"beside_exchange_p99_us", MEDIAN(rounds, n, beside.exchange.p99)},
        {"decode_alone_per_s", MEDIAN(rounds, n, alone.rate)},
        {"decode_beside_per_s", MEDIAN(rounds, n, beside.rate)},
        {"prompt_alone_s", MEDIAN(rounds, n, prompt_alone)},
        {"prompt_beside_s", MEDIAN(rounds, n, prompt_beside)},
        {"prompt_alone_gflops", flops / MEDIAN(rounds, n, prompt_alone) * 1e-9},
        {"prompt_beside_gflops", flops / MEDIAN(rounds, n, prompt_beside) * 1e-9},
    };

    for (size_t i = 0; i < sizeof(figures) / sizeof(figures[0]); i++) {
        (void)printf("%-22s %12.6g\n", figures[i].name, figures[i].value);
        (void)cJSON_AddNumberToObject(json, figures[i].name, figures[i].value);
    }
    char *text = cJSON_Print(json);
    FILE *file = (o->json != NULL) ? fopen(o->json, "w") : NULL;
    bool is_ok = (o->json == NULL) ||
                 ((file != NULL) && (text != NULL) && (fprintf(file, "%s\n", text) > 0));
    if (file != NULL) {
        is_ok = (fclose(file) == 0) && is_ok;
    }
    free(text);
    cJSON_Delete(json);
    return is_ok;
}

/* ------------------------------------------------------------------ life */

static bool prepare(bench_t *b)
{
    const options_t *o = &b->options;
    fovea_error_t error = {0};
    fovea_model_spec_t spec = {.name = "bench-mixed",
                               .n_layers = 1,
                               .n_q_heads = N_Q_HEADS,
                               .n_kv_heads = N_KV_HEADS,
                               .head_dim_qk = HEAD_DIM,
                               .kv_dtype = FOVEA_DTYPE_BF16};

    b->q = random_tensor(o->chunk * Q_BYTES / 2U, 1);
    b->k = random_tensor(o->chunk * KV_BYTES / 2U, 2);
    b->v = random_tensor(o->chunk * KV_BYTES / 2U, 3);
    b->out = malloc(o->chunk * Q_BYTES);
    b->expected = malloc(o->chunk * Q_BYTES);
    if ((b->q == NULL) || (b->k == NULL) || (b->v == NULL) || (b->out == NULL) ||
        (b->expected == NULL) ||
        !say(fovea_connect(o->connect, NULL, &b->client, &error), &error) ||
        !say(fovea_connect(o->connect, NULL, &b->prompt_client, &error), &error) ||
        !say(fovea_register_model(b->client, &spec, 0, &b->model, &error), &error)) {
        return false;
    }
    for (uint32_t i = 0; i < o->n_clients; i++) {
        decoder_t *d = &b->decoders[i];
        d->bench = b;
        d->position = o->context;
        d->samples = malloc(SAMPLES_MAX * sizeof(*d->samples));
        if ((d->samples == NULL) || !fill(b, o->context, b->out, &d->session)) {
            return false;
        }
    }
    return true;
}

static void release(bench_t *b)
{
    for (uint32_t i = 0; i < b->options.n_clients; i++) {
        if (b->decoders[i].samples != NULL) {
            (void)fovea_close_session(b->client, &b->decoders[i].session, 0, NULL);
        }
        free(b->decoders[i].samples);
    }
    fovea_close(b->client);
    fovea_close(b->prompt_client);
    free(b->q);
    free(b->k);
    free(b->v);
    free(b->out);
    free(b->expected);
}

static uint64_t parse_number(struct argp_state *state, const char *arg, uint64_t low, uint64_t high)
{
    char *end = NULL;
    unsigned long long n = strtoull(arg, &end, 10);

    if ((*arg == '\0') || (*end != '\0') || (n < low) || (n > high)) {
        argp_error(state, "given \"%s\", expected %llu..%llu", arg, (unsigned long long)low,
                   (unsigned long long)high);
    }
    return n;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    options_t *o = state->input;

    switch (key) {
    case 'c':
        o->connect = arg;
        return 0;
    case 'n':
        o->n_clients = (uint32_t)parse_number(state, arg, 1, CLIENTS_MAX);
        return 0;
    case 'x':
        o->context = parse_number(state, arg, 1, (uint64_t)1 << 24U);
        return 0;
    case 'p':
        o->prompt = parse_number(state, arg, 1, (uint64_t)1 << 24U);
        return 0;
    case 'k':
        o->chunk = parse_number(state, arg, 1, (uint64_t)1 << 17U);
        return 0;
    case 'r':
        o->n_rounds = (uint32_t)parse_number(state, arg, 1, ROUNDS_MAX);
        return 0;
    case 't':
        o->seconds = (double)parse_number(state, arg, 1, 3600);
        return 0;
    case 'j':
        o->json = arg;
        return 0;
    case ARGP_KEY_END:
        if (o->connect == NULL) {
            argp_error(state, "connect: expected the address of a running fovead");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int main(int argc, char **argv)
{
    static const struct argp_option k_options[] = {
        {"connect", 'c', "ADDRESS", 0, "A running fovead", 0},
        {"clients", 'n', "N", 0, "Decode clients, one request in flight each (default 2)", 0},
        {"context", 'x', "TOKENS", 0, "Of each decoding session (default 4096)", 0},
        {"prompt", 'p', "TOKENS", 0, "Of the prefill (default 16384)", 0},
        {"chunk", 'k', "TOKENS", 0, "Of one message of it (default 8192)", 0},
        {"rounds", 'r', "N", 0, "(default 3)", 0},
        {"seconds", 't', "S", 0, "Of decode alone in each round (default 3)", 0},
        {"json", 'j', "FILE", 0, "Write the figures as JSON too", 0},
        {0},
    };
    static const struct argp k_argp = {
        .options = k_options,
        .parser = parse,
        .doc = "Latency of decode alone, and while a long prompt is prefilled."};
    static bench_t bench = {.options = {.n_clients = 2,
                                        .n_rounds = 3,
                                        .context = 4096,
                                        .prompt = 16384,
                                        .chunk = 8192,
                                        .seconds = 3.0}};
    static round_t rounds[ROUNDS_MAX];

    if (argp_parse(&k_argp, argc, argv, 0, NULL, &bench.options) != 0) {
        return 1;
    }
    bool is_ok = prepare(&bench);
    for (uint32_t i = 0; is_ok && (i < bench.options.n_rounds); i++) {
        is_ok = run_round(&bench, &rounds[i]);
    }
    is_ok = is_ok && report(&bench, rounds, bench.options.n_rounds);
    release(&bench);
    return is_ok ? 0 : 1;
}
