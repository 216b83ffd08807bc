/*
 * bench_echo.c - what gRPC's C core itself costs: latency and throughput of the bare echo.
 *
 * bench_echo                 starts the echo over TCP loopback and a unix socket and measures both
 * bench_echo --serve ADDR    only the server, for other programs
 *
 * Reported: p50 and p99 of the latency, messages per second = replies / seconds. Each figure is the median
 * over the rounds; all configurations take turns within a round, because a shared machine drifts.
 */
#include "bench/echo/echo.h"
#include "bench/echo/echo_child.h"

#include <argp.h>
#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ROUNDS_MAX  64
#define CONFIGS_MAX 128

#define IN_FLIGHT_BYTES_MAX ((size_t)128U << 20U)

typedef struct fv_options {
    const char *serve, *json;
    int n_rounds;
    double seconds;
} fv_options_t;

typedef struct fv_config_run {
    const char *transport;
    bool is_stream;
    uint32_t n_in_flight;
    size_t n_bytes;
    fv_echo_load_t echo;
    fv_load_t *load;
    double p50[ROUNDS_MAX], p99[ROUNDS_MAX], per_second[ROUNDS_MAX];
} fv_config_run_t;

/* NOLINTBEGIN(concurrency-mt-unsafe): options are read before there is another thread */
static error_t parse(int key, char *arg, struct argp_state *state)
{
    fv_options_t *o = state->input;

    switch (key) {
    case 's':
        o->serve = arg;
        return 0;
    case 'j':
        o->json = arg;
        return 0;
    case 'r':
        o->n_rounds = (int)strtol(arg, NULL, 10);
        if ((o->n_rounds < 1) || (o->n_rounds > ROUNDS_MAX)) {
            argp_error(state, "rounds: given %s, expected 1..%d", arg, ROUNDS_MAX);
        }
        return 0;
    case 't':
        o->seconds = strtod(arg, NULL);
        if (!(o->seconds > 0.0)) {
            argp_error(state, "seconds: given %s, expected more than 0", arg);
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

static double median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof(double), compare);
    return values[n / 2];
}

static bool add_config(fv_config_run_t *run, const char *address)
{
    if (!fv_echo_load_init(&run->echo, run->n_bytes, run->n_bytes)) {
        return false;
    }
    fv_workload_t workload = fv_echo_workload(&run->echo);
    run->load = fv_load_open(address, &workload, run->is_stream, run->n_in_flight);
    return run->load != NULL;
}

/* Every transport, call, size and number in flight; 0 when one cannot be set up. */
static size_t make_configs(fv_config_run_t *runs, const fv_echo_child_t servers[2])
{
    static const size_t k_sizes[] = {256, 4096, 65536, 1U << 20U, 16U << 20U};
    static const uint32_t k_in_flight[] = {1, 8, 64};
    const size_t n_sizes = sizeof(k_sizes) / sizeof(k_sizes[0]);
    const size_t n_flights = sizeof(k_in_flight) / sizeof(k_in_flight[0]);
    size_t n = 0;

    for (size_t i = 0; i < 4U * n_sizes * n_flights; i++) {
        size_t transport = i / (2U * n_sizes * n_flights);
        fv_config_run_t *run = &runs[n];
        run->transport = (transport == 0U) ? "tcp" : "unix";
        run->is_stream = ((i / (n_sizes * n_flights)) % 2U) == 0U;
        run->n_bytes = k_sizes[(i / n_flights) % n_sizes];
        run->n_in_flight = k_in_flight[i % n_flights];
        if (run->n_bytes * run->n_in_flight > IN_FLIGHT_BYTES_MAX) {
            continue; /* a gigabyte in flight measures the memory, not the call */
        }
        if (!add_config(run, servers[transport].address)) {
            return 0;
        }
        n++;
    }
    return n;
}

static bool measure(fv_config_run_t *runs, size_t n_runs, const fv_options_t *options)
{
    fv_load_result_t result;

    for (int round = -1; round < options->n_rounds; round++) { /* the first one warms up */
        for (size_t i = 0; i < n_runs; i++) {
            if (!fv_load_run(runs[i].load, (round < 0) ? 0.05 : options->seconds, &result)) {
                return false;
            }
            if (round >= 0) {
                runs[i].p50[round] = result.p50_us;
                runs[i].p99[round] = result.p99_us;
                runs[i].per_second[round] = result.per_second;
            }
        }
    }
    return true;
}

static void report(fv_config_run_t *runs, size_t n_runs, const fv_options_t *options)
{
    cJSON *list = cJSON_CreateArray();

    (void)printf("%-5s %-7s %9s %9s %11s %11s %11s\n", "over", "call", "bytes", "in flight",
                 "p50 us", "p99 us", "msg/s");
    for (size_t i = 0; i < n_runs; i++) {
        fv_config_run_t *run = &runs[i];
        double p50 = median(run->p50, options->n_rounds);
        double p99 = median(run->p99, options->n_rounds);
        double rate = median(run->per_second, options->n_rounds);
        cJSON *entry = cJSON_CreateObject();
        (void)printf("%-5s %-7s %9zu %9u %11.1f %11.1f %11.0f\n", run->transport,
                     run->is_stream ? "stream" : "unary", run->n_bytes, run->n_in_flight, p50, p99,
                     rate);
        (void)cJSON_AddStringToObject(entry, "transport", run->transport);
        (void)cJSON_AddStringToObject(entry, "call", run->is_stream ? "stream" : "unary");
        (void)cJSON_AddNumberToObject(entry, "bytes", (double)run->n_bytes);
        (void)cJSON_AddNumberToObject(entry, "in_flight", run->n_in_flight);
        (void)cJSON_AddNumberToObject(entry, "p50_us", p50);
        (void)cJSON_AddNumberToObject(entry, "p99_us", p99);
        (void)cJSON_AddNumberToObject(entry, "messages_per_s", rate);
        (void)cJSON_AddItemToArray(list, entry);
    }
    if (options->json != NULL) {
        char *text = cJSON_Print(list);
        FILE *file = fopen(options->json, "w");
        if ((file == NULL) || (fputs(text, file) < 0) || (fclose(file) != 0)) {
            perror(options->json);
        }
        free(text);
    }
    cJSON_Delete(list);
}

static int run(const fv_options_t *options)
{
    static fv_config_run_t runs[CONFIGS_MAX];
    fv_echo_child_t servers[2] = {{0}, {0}};
    char path[64];
    int code = 1;

    (void)snprintf(path, sizeof(path), "unix:/tmp/fv-bench-echo-%d", (int)getpid());
    if (fv_echo_child_start("127.0.0.1:0", &servers[0]) && fv_echo_child_start(path, &servers[1])) {
        fv_echo_tune_malloc();
        size_t n_runs = make_configs(runs, servers);
        if ((n_runs > 0U) && measure(runs, n_runs, options)) {
            report(runs, n_runs, options);
            code = 0;
        }
        for (size_t i = 0; i < n_runs; i++) {
            fv_load_close(runs[i].load);
            fv_echo_load_fini(&runs[i].echo);
        }
    }
    fv_echo_child_stop(&servers[0]);
    fv_echo_child_stop(&servers[1]);
    return code;
}

int main(int argc, char **argv)
{
    static const struct argp_option k_options[] = {
        {"serve", 's', "ADDRESS", 0, "Only serve, at HOST:PORT or unix:/PATH", 0},
        {"rounds", 'r', "N", 0, "Rounds; the median is reported (default 7)", 0},
        {"seconds", 't', "S", 0, "Seconds per configuration and round (default 0.2)", 0},
        {"json", 'j', "FILE", 0, "Write the figures as JSON too", 0},
        {0},
    };
    static const struct argp k_argp = {
        k_options, parse, NULL, "Latency and throughput of a bare gRPC echo.", NULL, NULL, NULL};
    fv_options_t options = {.n_rounds = 7, .seconds = 0.2};

    /* NOLINTNEXTLINE(concurrency-mt-unsafe): one thread yet */
    (void)argp_parse(&k_argp, argc, argv, 0, NULL, &options);
    return (options.serve != NULL) ? fv_echo_serve(options.serve) : run(&options);
}
