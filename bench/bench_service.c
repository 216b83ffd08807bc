/*
 * bench_service.c - Attend against a running fovead, beside a bare gRPC echo of the same bytes.
 *
 *   fovead --listen 127.0.0.1:7411 --listen unix:/tmp/f.sock --backend null &     (a no-op step)
 *   bench_service --connect 127.0.0.1:7411 --connect unix:/tmp/f.sock
 *
 * For each configuration: the replies are compared with the known answer (attend_load.h), then rounds of the
 * service and rounds of the echo take turns on one machine in the same minute. Reported are medians over the
 * rounds; the ratio is the median of each round's service p50 / echo p50. Latency is the client's; queue,
 * compute, exchange and total are the service's own, averaged over the replies of the last round.
 */
#include "bench/attend_load.h"
#include "bench/echo/echo.h"
#include "bench/echo/echo_child.h"

#include <argp.h>
#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ROUNDS_MAX    64
#define LIST_MAX      8
#define ADDRESSES_MAX 4

typedef struct fv_options {
    const char *connect[ADDRESSES_MAX];
    int n_connect;
    uint32_t batch[LIST_MAX], in_flight[LIST_MAX];
    size_t n_batch, n_in_flight;
    uint64_t context;
    int n_rounds;
    double seconds;
    const char *json;
    bool has_stream, has_unary;
} fv_options_t;

typedef struct fv_case {
    const char *address;
    bool is_stream;
    uint32_t batch, n_in_flight;
} fv_case_t;

typedef struct fv_series {
    double p50[ROUNDS_MAX], p99[ROUNDS_MAX], rate[ROUNDS_MAX];
} fv_series_t;

/* NOLINTBEGIN(concurrency-mt-unsafe): options are read before there is another thread */
static void parse_list(struct argp_state *state, const char *arg, uint32_t *out, size_t *out_n)
{
    char *rest = NULL;

    *out_n = 0;
    for (const char *at = arg; *at != '\0'; at = rest) {
        unsigned long value = strtoul(at, &rest, 10);
        if ((rest == at) || (value < 1UL) || (value > LOAD_SLOTS_MAX) || (*out_n == LIST_MAX)) {
            argp_error(state, "given \"%s\", expected at most %d numbers from 1 to %u", arg,
                       LIST_MAX, LOAD_SLOTS_MAX);
            return;
        }
        out[(*out_n)++] = (uint32_t)value;
        rest += (*rest == ',');
    }
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    fv_options_t *o = state->input;

    switch (key) {
    case 'c':
        if (o->n_connect == ADDRESSES_MAX) {
            argp_error(state, "connect: given more than %d addresses", ADDRESSES_MAX);
        }
        o->connect[o->n_connect++] = arg;
        return 0;
    case 'b':
        parse_list(state, arg, o->batch, &o->n_batch);
        return 0;
    case 'n':
        parse_list(state, arg, o->in_flight, &o->n_in_flight);
        return 0;
    case 'x':
        o->context = strtoull(arg, NULL, 10);
        return 0;
    case 'r':
        o->n_rounds = (int)strtol(arg, NULL, 10);
        if ((o->n_rounds < 1) || (o->n_rounds > ROUNDS_MAX)) {
            argp_error(state, "rounds: given %s, expected 1..%d", arg, ROUNDS_MAX);
        }
        return 0;
    case 't':
        o->seconds = strtod(arg, NULL);
        return 0;
    case 'j':
        o->json = arg;
        return 0;
    case 'k':
        o->has_stream = (strcmp(arg, "unary") != 0);
        o->has_unary = (strcmp(arg, "stream") != 0);
        return 0;
    case ARGP_KEY_END:
        if (o->n_connect == 0) {
            argp_error(state, "connect: expected the address of a running fovead");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}
/* NOLINTEND(concurrency-mt-unsafe) */

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a;
    double y = *(const double *)b;

    return (x > y) - (x < y);
}

/* Leaves the values as they are. */
static double median(const double *values, int n)
{
    double sorted[ROUNDS_MAX];

    memcpy(sorted, values, (size_t)n * sizeof(double));
    qsort(sorted, (size_t)n, sizeof(double), compare);
    return sorted[n / 2];
}

static double median_ratio(const double *a, const double *b, int n)
{
    double ratios[ROUNDS_MAX];

    for (int i = 0; i < n; i++) {
        ratios[i] = a[i] / b[i];
    }
    return median(ratios, n);
}

static void store(fv_series_t *series, int round, const fv_load_result_t *result)
{
    if (round >= 0) {
        series->p50[round] = result->p50_us;
        series->p99[round] = result->p99_us;
        series->rate[round] = result->per_second;
    }
}

static bool measure(fv_attend_load_t *attend,
                    fv_load_t *echo,
                    const fv_options_t *o,
                    fv_series_t *service,
                    fv_series_t *bare)
{
    fv_load_result_t result;

    for (int round = -1; round < o->n_rounds; round++) { /* the first one warms up */
        double seconds = (round < 0) ? (o->seconds / 2.0) : o->seconds;
        if (!fv_attend_load_rewind(attend) || !fv_load_run(attend->load, seconds, &result)) {
            return false;
        }
        store(service, round, &result);
        if (!fv_load_run(echo, seconds, &result)) {
            return false;
        }
        store(bare, round, &result);
    }
    return true;
}

static void add(cJSON *entry, const char *name, double value)
{
    (void)cJSON_AddNumberToObject(entry, name, value);
}

static void report(const fv_case_t *c,
                   const fv_attend_load_t *a,
                   const fv_options_t *o,
                   const fv_series_t *service,
                   const fv_series_t *bare,
                   cJSON *list)
{
    int n = o->n_rounds;
    double n_timed = (a->n_timed > 0U) ? (double)a->n_timed : 1.0;
    double ratio = median_ratio(service->p50, bare->p50, n);
    const char *over = (strncmp(c->address, "unix:", 5) == 0) ? "unix" : "tcp";
    const char *kind = c->is_stream ? "stream" : "unary";
    cJSON *entry = cJSON_CreateObject();

    (void)printf(
        "%-4s %-6s %5u %6u %8zu %8zu | %9.1f %9.1f %8.0f | %9.1f %9.1f %8.0f | %5.2f %5.2f | "
        "%7.0f %7.0f %7.0f %7.0f\n",
        over, kind, c->batch, c->n_in_flight, a->request_bytes, a->reply_bytes,
        median(service->p50, n), median(service->p99, n), median(service->rate, n),
        median(bare->p50, n), median(bare->p99, n), median(bare->rate, n), ratio,
        median_ratio(service->rate, bare->rate, n), a->queue_us / n_timed, a->compute_us / n_timed,
        a->exchange_us / n_timed, a->total_us / n_timed);
    (void)fflush(stdout);
    (void)cJSON_AddStringToObject(entry, "transport", over);
    (void)cJSON_AddStringToObject(entry, "call", kind);
    (void)cJSON_AddStringToObject(entry, "backend", a->is_noop ? "null" : "real");
    add(entry, "batch", c->batch);
    add(entry, "in_flight", c->n_in_flight);
    add(entry, "context", (double)o->context);
    add(entry, "request_bytes", (double)a->request_bytes);
    add(entry, "reply_bytes", (double)a->reply_bytes);
    add(entry, "p50_us", median(service->p50, n));
    add(entry, "p99_us", median(service->p99, n));
    add(entry, "requests_per_s", median(service->rate, n));
    add(entry, "echo_p50_us", median(bare->p50, n));
    add(entry, "echo_p99_us", median(bare->p99, n));
    add(entry, "echo_per_s", median(bare->rate, n));
    add(entry, "p50_ratio", ratio);
    add(entry, "rate_ratio", median_ratio(service->rate, bare->rate, n));
    add(entry, "queue_us", a->queue_us / n_timed);
    add(entry, "compute_us", a->compute_us / n_timed);
    add(entry, "exchange_us", a->exchange_us / n_timed);
    add(entry, "total_us", a->total_us / n_timed);
    add(entry, "rounds", n);
    (void)cJSON_AddItemToArray(list, entry);
}

static bool
run_case(const fv_case_t *c, const fv_options_t *o, const char *echo_address, cJSON *list)
{
    static fv_attend_load_t attend;
    static fv_echo_load_t messages;
    static fv_series_t service;
    static fv_series_t bare;
    fv_load_t *echo = NULL;
    bool is_ok = fv_attend_load_open(&attend, c->address, c->is_stream, c->batch, c->n_in_flight,
                                     o->context);

    if (is_ok && fv_echo_load_init(&messages, attend.request_bytes, attend.reply_bytes)) {
        fv_workload_t workload = fv_echo_workload(&messages);
        echo = fv_load_open(echo_address, &workload, c->is_stream, c->n_in_flight);
        is_ok = (echo != NULL) && measure(&attend, echo, o, &service, &bare);
        if (is_ok) {
            report(c, &attend, o, &service, &bare, list);
        }
        fv_load_close(echo);
    }
    fv_echo_load_fini(&messages);
    fv_attend_load_close(&attend);
    return is_ok;
}

static bool run_address(const char *address, const fv_options_t *o, cJSON *list)
{
    fv_echo_child_t child = {0};
    char path[64];
    bool is_ok = true;

    (void)snprintf(path, sizeof(path), "unix:/tmp/fv-bench-service-%d", (int)getpid());
    if (!fv_echo_child_start((strncmp(address, "unix:", 5) == 0) ? path : "127.0.0.1:0", &child)) {
        return false;
    }
    for (int is_unary = 0; is_unary < 2; is_unary++) {
        for (size_t b = 0; b < o->n_batch; b++) {
            for (size_t i = 0; is_ok && (i < o->n_in_flight); i++) {
                fv_case_t c = {address, is_unary == 0, o->batch[b], o->in_flight[i]};
                if (c.is_stream ? o->has_stream : o->has_unary) {
                    is_ok = run_case(&c, o, child.address, list);
                }
            }
        }
    }
    fv_echo_child_stop(&child);
    return is_ok;
}

static bool write_json(const char *path, const cJSON *list)
{
    char *text = cJSON_Print(list);
    FILE *file = fopen(path, "w");
    bool is_ok =
        (text != NULL) && (file != NULL) && (fputs(text, file) >= 0) && (fputc('\n', file) >= 0);

    is_ok = (file != NULL) && (fclose(file) == 0) && is_ok;
    if (!is_ok) {
        perror(path);
    }
    free(text);
    return is_ok;
}

int main(int argc, char **argv)
{
    static const struct argp_option k_options[] = {
        {"connect", 'c', "ADDRESS", 0,
         "A running fovead; may be given for TCP and for a unix socket", 0},
        {"batch", 'b', "LIST", 0, "Sessions per request (default 1,64)", 0},
        {"in-flight", 'n', "LIST", 0, "Requests in flight (default 1,8,64)", 0},
        {"context", 'x', "TOKENS", 0, "Tokens in each session before the first step (default 0)",
         0},
        {"call", 'k', "KIND", 0, "stream, unary or both (default both)", 0},
        {"rounds", 'r', "N", 0, "Rounds of each, taking turns (default 7)", 0},
        {"seconds", 't', "S", 0, "Seconds per round (default 0.3)", 0},
        {"json", 'j', "FILE", 0, "Write the figures as JSON too", 0},
        {0},
    };
    static const struct argp k_argp = {
        k_options, parse,
        NULL,      "Attend latency and throughput beside a bare gRPC echo of the same bytes.",
        NULL,      NULL,
        NULL};
    fv_options_t o = {.batch = {1, 64},
                      .n_batch = 2,
                      .in_flight = {1, 8, 64},
                      .n_in_flight = 3,
                      .n_rounds = 7,
                      .seconds = 0.3,
                      .has_stream = true,
                      .has_unary = true};
    bool is_ok = true;

    /* NOLINTNEXTLINE(concurrency-mt-unsafe): one thread yet */
    (void)argp_parse(&k_argp, argc, argv, 0, NULL, &o);
    cJSON *list = cJSON_CreateArray();
    fv_echo_tune_malloc();
    (void)printf(
        "%-4s %-6s %5s %6s %8s %8s | %9s %9s %8s | %9s %9s %8s | %5s %5s | %7s %7s %7s %7s\n",
        "over", "call", "batch", "flight", "request", "reply", "p50 us", "p99 us", "req/s",
        "echo p50", "echo p99", "msg/s", "p50 x", "rate x", "queue", "compute", "exchg", "total");
    for (int i = 0; is_ok && (i < o.n_connect); i++) {
        is_ok = run_address(o.connect[i], &o, list);
    }
    if (is_ok && (o.json != NULL)) {
        is_ok = write_json(o.json, list);
    }
    cJSON_Delete(list);
    return is_ok ? 0 : 1;
}
