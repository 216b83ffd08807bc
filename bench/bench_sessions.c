/*
 * bench_sessions.c - does the service leak? Open, append, fork now and then, close, a million times.
 *
 * Drives a running fovead over libfovea from several threads, one connection each; every --report cycles the server's
 * resident memory, descriptors and threads (by --pid) and its free KV are printed. Flat is good: the last line gives the
 * growth of resident memory after a tenth of the cycles (warm-up), in bytes a cycle.
 *
 *     fovead --listen unix:/tmp/b.sock --kv-memory 64m & bench_sessions --address unix:/tmp/b.sock --pid $!
 */
#include "client/fovea.h"

#include <argp.h>
#include <cjson/cJSON.h>
#include <dirent.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define N_Q_HEADS  4
#define N_KV_HEADS 2
#define HEAD_DIM   16
#define N_TOKENS   70 /* two pages, the second one partial */

typedef struct options {
    const char *address, *json;
    int64_t n_cycles, n_report;
    int n_threads, pid;
} options_t;

typedef struct shared {
    options_t options;
    char model_id[FOVEA_MODEL_ID_BYTES];
    atomic_llong n_done;
    atomic_int has_failed;
} shared_t;

static float g_tensor[N_TOKENS * N_Q_HEADS * HEAD_DIM];

static double now_s(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static long rss_bytes(int pid)
{
    char path[64];
    long pages = 0;

    (void)snprintf(path, sizeof(path), "/proc/%d/statm", pid);
    FILE *file = fopen(path, "r");
    if (file == NULL) {
        return -1;
    }
    if (fscanf(file, "%*d %ld", &pages) != 1) {
        pages = 0;
    }
    (void)fclose(file);
    return pages * sysconf(_SC_PAGESIZE);
}

static int count_entries(int pid, const char *what)
{
    char path[64];
    int n = 0;

    (void)snprintf(path, sizeof(path), "/proc/%d/%s", pid, what);
    DIR *dir = opendir(path);
    if (dir == NULL) {
        return -1;
    }
    while (readdir(dir) != NULL) {
        n++;
    }
    (void)closedir(dir);
    return n - 2; /* . and .. */
}

static fovea_code_t append(fovea_client_t *client,
                           const fovea_session_id_t *session,
                           uint64_t position,
                           uint32_t n_tokens,
                           float *out,
                           fovea_error_t *error)
{
    size_t q_bytes = (size_t)n_tokens * N_Q_HEADS * HEAD_DIM * sizeof(float);
    size_t kv_bytes = (size_t)n_tokens * N_KV_HEADS * HEAD_DIM * sizeof(float);
    fovea_attend_item_t item = {.session = *session, .position = position, .n_tokens = n_tokens};
    fovea_attend_request_t request = {.dtype = FOVEA_DTYPE_F32,
                                      .n_items = 1,
                                      .items = &item,
                                      .q = g_tensor,
                                      .q_bytes = q_bytes,
                                      .k = g_tensor,
                                      .k_bytes = kv_bytes,
                                      .v = g_tensor,
                                      .v_bytes = kv_bytes,
                                      .out = out,
                                      .out_bytes = q_bytes};

    return fovea_attend(client, &request, FOVEA_TIMEOUT_DEFAULT, NULL, error);
}

/* One life: open, prefill, (every 8th: fork, and append into the copy), close. */
static fovea_code_t
cycle(fovea_client_t *client, const shared_t *shared, int64_t i, float *out, fovea_error_t *error)
{
    fovea_session_id_t session;
    fovea_session_id_t child;
    fovea_code_t code = fovea_open_session(client, shared->model_id, NULL, 0, &session, error);

    if (code == FOVEA_OK) {
        code = append(client, &session, 0, N_TOKENS, out, error);
    }
    if ((code == FOVEA_OK) && ((i % 8) == 0)) {
        code = fovea_fork_session(client, &session, FOVEA_WHOLE, 0, &child, error);
        if (code == FOVEA_OK) {
            code = append(client, &child, N_TOKENS, 1, out, error);
        }
        if (code == FOVEA_OK) {
            code = fovea_close_session(client, &child, 0, error);
        }
    }
    return (code == FOVEA_OK) ? fovea_close_session(client, &session, 0, error) : code;
}

static void *run(void *arg)
{
    shared_t *shared = arg;
    fovea_client_t *client = NULL;
    fovea_error_t error = {FOVEA_OK, ""};
    float *out = malloc(sizeof(g_tensor));
    fovea_code_t code = fovea_connect(shared->options.address, NULL, &client, &error);

    while ((code == FOVEA_OK) && (out != NULL) && !atomic_load(&shared->has_failed)) {
        int64_t i = atomic_fetch_add(&shared->n_done, 1);
        if (i >= shared->options.n_cycles) {
            break;
        }
        code = cycle(client, shared, i, out, &error);
    }
    if (code != FOVEA_OK) {
        (void)fprintf(stderr, "%s: %s\n", fovea_code_name(code), error.message);
        atomic_store(&shared->has_failed, 1);
    }
    free(out);
    fovea_close(client);
    return NULL;
}

static int register_model(fovea_client_t *client, shared_t *shared)
{
    fovea_model_spec_t spec = {.name = "bench_sessions",
                               .n_layers = 1,
                               .n_q_heads = N_Q_HEADS,
                               .n_kv_heads = N_KV_HEADS,
                               .head_dim_qk = HEAD_DIM,
                               .kv_dtype = FOVEA_DTYPE_F32};
    fovea_model_t model;
    fovea_error_t error;

    if (fovea_register_model(client, &spec, 0, &model, &error) != FOVEA_OK) {
        (void)fprintf(stderr, "register: %s\n", error.message);
        return -1;
    }
    memcpy(shared->model_id, model.model_id, sizeof(shared->model_id));
    return 0;
}

static uint64_t kv_free(fovea_client_t *client)
{
    fovea_cluster_status_t status;
    uint64_t n_bytes = 0;

    if (fovea_get_status(client, 0, &status, NULL) == FOVEA_OK) {
        n_bytes = status.kv_bytes_free;
        fovea_cluster_status_free(&status);
    }
    return n_bytes;
}

/* Watches while the threads run; returns the growth of RSS after the warm-up. */
static double watch(shared_t *shared, fovea_client_t *client, cJSON *samples)
{
    int64_t next = 0;
    long warm_rss = -1;
    int64_t warm_at = 0;
    double begin_s = now_s();
    long rss = 0;
    int64_t n = 0;

    (void)printf("%10s %12s %8s %8s %14s %10s\n", "cycles", "RSS bytes", "fds", "threads",
                 "KV free", "cycles/s");
    do {
        (void)usleep(20000);
        n = atomic_load(&shared->n_done);
        if ((n < next) && (n < shared->options.n_cycles)) {
            continue;
        }
        next = n + shared->options.n_report;
        rss = rss_bytes(shared->options.pid);
        if ((warm_rss < 0) && (n >= shared->options.n_cycles / 10)) {
            warm_rss = rss;
            warm_at = n;
        }
        (void)printf("%10" PRId64 " %12ld %8d %8d %14" PRIu64 " %10.0f\n", n, rss,
                     count_entries(shared->options.pid, "fd"),
                     count_entries(shared->options.pid, "task"), kv_free(client),
                     (double)n / (now_s() - begin_s));
        (void)fflush(stdout);
        cJSON *sample = cJSON_CreateObject();
        (void)cJSON_AddNumberToObject(sample, "cycles", (double)n);
        (void)cJSON_AddNumberToObject(sample, "rss_bytes", (double)rss);
        (void)cJSON_AddItemToArray(samples, sample);
    } while ((n < shared->options.n_cycles) && !atomic_load(&shared->has_failed));
    return (n > warm_at) ? ((double)(rss - warm_rss) / (double)(n - warm_at)) : 0.0;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    options_t *o = state->input;

    switch (key) {
    case 'a':
        o->address = arg;
        return 0;
    case 'p':
        o->pid = (int)strtol(arg, NULL, 10);
        return 0;
    case 'n':
        o->n_cycles = strtoll(arg, NULL, 10);
        return 0;
    case 'r':
        o->n_report = strtoll(arg, NULL, 10);
        return 0;
    case 't':
        o->n_threads = (int)strtol(arg, NULL, 10);
        return 0;
    case 'j':
        o->json = arg;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_option k_options[] = {
    {"address", 'a', "ADDRESS", 0, "the service (default 127.0.0.1:7411)", 0},
    {"pid", 'p', "PID", 0, "process of rank 0, for its memory", 0},
    {"cycles", 'n', "N", 0, "sessions to open and close (default 1000000)", 0},
    {"report", 'r', "N", 0, "cycles between lines (default a twentieth)", 0},
    {"threads", 't', "N", 0, "connections (default 4)", 0},
    {"json", 'j', "FILE", 0, "write the samples here", 0},
    {0},
};

static void write_json(const options_t *options, cJSON *root)
{
    char *text = cJSON_Print(root);
    FILE *file = (options->json == NULL) ? NULL : fopen(options->json, "w");

    if ((file != NULL) && (text != NULL)) {
        (void)fprintf(file, "%s\n", text);
        (void)fclose(file);
    }
    free(text);
}

int main(int argc, char **argv)
{
    static const struct argp k_argp = {
        k_options, parse, NULL, "Churns sessions and watches memory.", NULL, NULL, NULL};
    static shared_t shared = {
        .options = {.address = "127.0.0.1:7411", .n_cycles = 1000000, .n_threads = 4}};
    pthread_t threads[64];
    fovea_client_t *client = NULL;
    fovea_error_t error;

    if (argp_parse(&k_argp, argc, argv, 0, NULL, &shared.options) != 0) {
        return 2;
    }
    if ((shared.options.n_threads < 1) || (shared.options.n_threads > 64)) {
        (void)fprintf(stderr, "--threads: given %d, expected 1..64\n", shared.options.n_threads);
        return 2;
    }
    if (shared.options.n_report <= 0) {
        shared.options.n_report = shared.options.n_cycles / 20;
    }
    if (fovea_connect(shared.options.address, NULL, &client, &error) != FOVEA_OK) {
        (void)fprintf(stderr, "%s\n", error.message);
        return 1;
    }
    if (register_model(client, &shared) != 0) {
        return 1;
    }
    uint64_t free_before = kv_free(client);
    for (int i = 0; i < shared.options.n_threads; i++) {
        if (pthread_create(&threads[i], NULL, run, &shared) != 0) {
            return 1;
        }
    }
    cJSON *root = cJSON_CreateObject();
    double growth = watch(&shared, client, cJSON_AddArrayToObject(root, "samples"));
    for (int i = 0; i < shared.options.n_threads; i++) {
        (void)pthread_join(threads[i], NULL);
    }
    uint64_t free_after = kv_free(client);
    (void)printf("RSS growth after warm-up: %.3f bytes a cycle; KV not given back: %" PRId64
                 " bytes\n",
                 growth, (int64_t)(free_before - free_after));
    (void)cJSON_AddNumberToObject(root, "rss_bytes_per_cycle", growth);
    (void)cJSON_AddNumberToObject(root, "kv_bytes_leaked", (double)(free_before - free_after));
    write_json(&shared.options, root);
    cJSON_Delete(root);
    fovea_close(client);
    return (atomic_load(&shared.has_failed) || (free_before != free_after)) ? 1 : 0;
}
