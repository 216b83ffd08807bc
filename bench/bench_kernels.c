/*
 * bench_kernels.c - the CPU backend beside what the same cores can do at best.
 *
 * Every case is compared with the fp64 oracle before it is timed; a wrong kernel is not timed. In each round
 * the ceilings (streaming read, FMA, bf16) are measured next to the case, and the ratio is taken within the round:
 * on a shared machine only that holds. Reported: medians over rounds. KV is rotated through --memory bytes, so that it
 * comes from memory, not from a cache.
 *
 *     GB/s     = sum over items of n_kv_heads * kv_end * (dk + dv) * bytes(kv) / seconds (each KV byte counted once; latents:
 *                dk alone, V is a part of K; sparse: those that some row reads)
 *     ratio    = GB/s over the streaming read's GB/s; by cpu: the same per second of CPU time, which leaves out the
 *                time that other programs had the cores (but also an idle thread): for busy machines
 *     GFLOP/s  = sum over rows of 2 * visible tokens * (dk + dv) / seconds; by cpu: per second of CPU time, times threads
 */
#include "bench/kernel_peak.h"
#include "bench/kernel_workload.h"

#include <argp.h>
#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define ROUNDS_MAX 200

#define BF16  FV_DTYPE_BF16
#define F16   FV_DTYPE_F16
#define F32   FV_DTYPE_F32
#define KV    false, 0, NULL
#define S2_16 false, 0, &k_s2_16
#define MLA   true, 64, NULL /* DeepSeek's RoPE key beside the latent */

/* Blocks of 64, 8 local, every 16th; 8 KV heads of a model with 32 query heads. */
static const fv_policy_t k_s2_16 = {.kind = FV_POLICY_S2,
                                    .block_tokens = 64,
                                    .local_blocks = 8,
                                    .vert_stride = 16,
                                    .head_sliding_step = 1,
                                    .n_heads = 8};

static const fv_bench_case_t k_cases[] = {
    {"decode-gqa32/8-4k", 8, 4, 128, BF16, BF16, 1, 1, 4096, false, KV},
    {"decode-gqa32/8-32k", 8, 4, 128, BF16, BF16, 1, 1, 32768, false, KV},
    {"decode-gqa32/8-128k", 8, 4, 128, BF16, BF16, 1, 1, 131072, false, KV},
    {"decode-gqa32/8-4k-x8", 8, 4, 128, BF16, BF16, 1, 8, 4096, false, KV},
    {"decode-gqa32/8-4k-x8-ragged", 8, 4, 128, BF16, BF16, 1, 8, 4096, true, KV},
    {"decode-gqa32/8-32k-x4", 8, 4, 128, BF16, BF16, 1, 4, 32768, false, KV},
    {"decode-gqa32/8-32k-x4-ragged", 8, 4, 128, BF16, BF16, 1, 4, 32768, true, KV},
    {"decode-gqa32/8-32k-io32", 8, 4, 128, BF16, F32, 1, 1, 32768, false, KV},
    {"decode-gqa32/8-32k-f16", 8, 4, 128, F16, F16, 1, 1, 32768, false, KV},
    {"decode-gqa32/8-32k-f32", 8, 4, 128, F32, F32, 1, 1, 32768, false, KV},
    {"decode-mqa32/1-32k", 1, 32, 128, BF16, BF16, 1, 1, 32768, false, KV},
    {"decode-mha32/32-32k", 32, 1, 128, BF16, BF16, 1, 1, 32768, false, KV},
    {"verify4-gqa32/8-32k", 8, 4, 128, BF16, BF16, 4, 1, 32768, false, KV},
    {"prefill512-gqa32/8-4k", 8, 4, 128, BF16, BF16, 512, 1, 4096, false, KV},
    {"prefill512-gqa32/8-4k-f16", 8, 4, 128, F16, F16, 512, 1, 4096, false, KV},
    {"prefill512-gqa32/8-4k-f32", 8, 4, 128, F32, F32, 512, 1, 4096, false, KV},
    {"prefill2048-gqa32/8-2k", 8, 4, 128, BF16, BF16, 2048, 1, 2048, false, KV},
    {"prefill4096-gqa32/8-4k", 8, 4, 128, BF16, BF16, 4096, 1, 4096, false, KV},
    {"prefill16384-gqa8/2-16k", 2, 4, 128, BF16, BF16, 16384, 1, 16384, false, KV},
    {"prefill2048-gqa32/8-2k-d64", 8, 4, 64, BF16, BF16, 2048, 1, 2048, false, KV},
    {"prefill4096-gqa32/8-4k-d64", 8, 4, 64, BF16, BF16, 4096, 1, 4096, false, KV},
    {"prefill2048-gqa32/8-2k-f32", 8, 4, 128, F32, F32, 2048, 1, 2048, false, KV},
    {"prefill2048-gqa32/8-2k-f32-d64", 8, 4, 64, F32, F32, 2048, 1, 2048, false, KV},
    {"prefill512-gqa9/3-512-d64", 3, 3, 64, F16, F32, 512, 1, 512, false, KV},
    {"decode-mla16-32k", 1, 16, 512, BF16, BF16, 1, 1, 32768, false, MLA},
    {"decode-mla64-32k", 1, 64, 512, BF16, BF16, 1, 1, 32768, false, MLA},
    {"decode-mla128-32k", 1, 128, 512, BF16, BF16, 1, 1, 32768, false, MLA},
    {"decode-mla16-4k-x8-ragged", 1, 16, 512, BF16, BF16, 1, 8, 4096, true, MLA},
    {"decode-mla16-32k-f32", 1, 16, 512, F32, F32, 1, 1, 32768, false, MLA},
    {"decode-tpla2-mla128-32k", 1, 128, 256, BF16, BF16, 1, 1, 32768, false, MLA},
    {"verify4-mla128-4k", 1, 128, 512, BF16, BF16, 4, 1, 4096, false, MLA},
    {"prefill64-mla16-4k", 1, 16, 512, BF16, BF16, 64, 1, 4096, false, MLA},
    {"decode-gqa32/8-32k-s2-16", 8, 4, 128, BF16, BF16, 1, 1, 32768, false, S2_16},
    {"decode-gqa32/8-128k-s2-16", 8, 4, 128, BF16, BF16, 1, 1, 131072, false, S2_16},
    {"prefill512-gqa32/8-32k", 8, 4, 128, BF16, BF16, 512, 1, 32768, false, KV},
    {"prefill512-gqa32/8-32k-s2-16", 8, 4, 128, BF16, BF16, 512, 1, 32768, false, S2_16},
};

typedef struct options {
    int n_rounds, n_threads;
    size_t memory_bytes;
    const char *isa, *only, *json;
} options_t;

typedef struct sample {
    double seconds, gbps, read_gbps, gflops, fma_gflops, bf16_gflops;
    double cpu_gbps, cpu_read_gbps, cpu_gflops; /* per second of CPU time, times threads */
} sample_t;

/* ------------------------------------------------------------------ measuring */

typedef struct ceilings {
    fv_pool_t *pool;
    int32_t n_threads;
    bool amx;
    uint8_t *stream;
    size_t stream_bytes, window_bytes, next;
} ceilings_t;

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a;
    double y = *(const double *)b;

    return (x > y) - (x < y);
}

static double median(const sample_t *samples, int n, size_t offset, size_t divide_by)
{
    double values[ROUNDS_MAX];

    for (int i = 0; i < n; i++) {
        memcpy(&values[i], (const char *)&samples[i] + offset, sizeof(double));
        if (divide_by != SIZE_MAX) {
            double d = 0.0;
            memcpy(&d, (const char *)&samples[i] + divide_by, sizeof(d));
            values[i] /= d;
        }
    }
    qsort(values, (size_t)n, sizeof(values[0]), compare_doubles);
    return (values[n / 2] + values[(n - 1) / 2]) / 2.0;
}

#define MEDIAN(field)      median(samples, n, offsetof(sample_t, field), SIZE_MAX)
#define MEDIAN_RATIO(a, b) median(samples, n, offsetof(sample_t, a), offsetof(sample_t, b))

static void measure_read(ceilings_t *top, sample_t *s)
{
    double cpu = fv_bench_cpu();
    double begin = fv_bench_now();

    fv_peak_host_read(top->pool, top->n_threads, top->stream + top->next, top->window_bytes);
    s->read_gbps = (double)top->window_bytes / (fv_bench_now() - begin) * 1e-9;
    s->cpu_read_gbps = (double)top->window_bytes / (fv_bench_cpu() - cpu) * top->n_threads * 1e-9;
}

static void measure(fv_workload_t *w, ceilings_t *top, int n, sample_t *samples)
{
    size_t set = 0;

    for (int i = 0; i < n; i++) {
        sample_t *s = &samples[i];
        double begin = 0.0;
        double cpu = 0.0;
        int n_steps = 0;

        top->next = (top->next + 2U * top->window_bytes <= top->stream_bytes)
                        ? (top->next + top->window_bytes)
                        : 0U;
        measure_read(top, s);
        begin = fv_bench_now();
        cpu = fv_bench_cpu();
        do { /* about as long as the ceiling next to it */
            fv_workload_step(w, set);
            set = (set + 1U) % w->n_sets;
            n_steps++;
        } while ((fv_bench_now() - begin < 0.01) && (n_steps < 64));
        s->seconds = (fv_bench_now() - begin) / n_steps;
        cpu = (fv_bench_cpu() - cpu) / n_steps;
        s->cpu_gbps = w->kv_bytes / cpu * top->n_threads * 1e-9;
        s->cpu_gflops = w->flops / cpu * top->n_threads * 1e-9;
        s->fma_gflops = fv_peak_fma(top->pool, top->n_threads) * 1e-9;
        s->bf16_gflops = fv_peak_bf16(top->pool, top->n_threads, top->amx) * 1e-9;
        s->gbps = w->kv_bytes / s->seconds * 1e-9;
        s->gflops = w->flops / s->seconds * 1e-9;
    }
}

static void
report(const fv_workload_t *w, const sample_t *samples, int n, const char *device, cJSON *json)
{
    cJSON *row = cJSON_CreateObject();

    (void)printf("%-30s %10.1f %8.2f %8.2f %7.3f %7.3f %9.1f %9.1f %9.1f %7.3f %9.1f\n",
                 w->spec->name, MEDIAN(seconds) * 1e6, MEDIAN(gbps), MEDIAN(read_gbps),
                 MEDIAN_RATIO(gbps, read_gbps), MEDIAN_RATIO(cpu_gbps, cpu_read_gbps),
                 MEDIAN(gflops), MEDIAN(cpu_gflops), MEDIAN(fma_gflops),
                 MEDIAN_RATIO(gflops, fma_gflops), MEDIAN(bf16_gflops));
    (void)fflush(stdout);
    (void)cJSON_AddStringToObject(row, "case", w->spec->name);
    (void)cJSON_AddStringToObject(row, "device", device);
    (void)cJSON_AddNumberToObject(row, "rounds", n);
    (void)cJSON_AddNumberToObject(row, "us", MEDIAN(seconds) * 1e6);
    (void)cJSON_AddNumberToObject(row, "kv_bytes", w->kv_bytes);
    (void)cJSON_AddNumberToObject(row, "flops", w->flops);
    (void)cJSON_AddNumberToObject(row, "gb_per_s", MEDIAN(gbps));
    (void)cJSON_AddNumberToObject(row, "read_gb_per_s", MEDIAN(read_gbps));
    (void)cJSON_AddNumberToObject(row, "of_read", MEDIAN_RATIO(gbps, read_gbps));
    (void)cJSON_AddNumberToObject(row, "of_read_by_cpu_time",
                                  MEDIAN_RATIO(cpu_gbps, cpu_read_gbps));
    (void)cJSON_AddNumberToObject(row, "gflop_per_s", MEDIAN(gflops));
    (void)cJSON_AddNumberToObject(row, "gflop_per_s_by_cpu_time", MEDIAN(cpu_gflops));
    (void)cJSON_AddNumberToObject(row, "fma_gflop_per_s", MEDIAN(fma_gflops));
    (void)cJSON_AddNumberToObject(row, "of_fma", MEDIAN_RATIO(gflops, fma_gflops));
    (void)cJSON_AddNumberToObject(row, "bf16_gflop_per_s", MEDIAN(bf16_gflops));
    (void)cJSON_AddItemToArray(json, row);
}

/* False when the kernel was wrong. */
static bool
bench_case(const fv_bench_case_t *c, const options_t *options, ceilings_t *top, cJSON *json)
{
    fv_backend_config_t config = {.n_threads = options->n_threads, .isa = options->isa};
    fv_workload_t w;
    sample_t samples[ROUNDS_MAX];
    fv_device_info_t info;
    bool ok = false;

    fv_workload_create(&w, c, &config, options->memory_bytes);
    fv_backend_cpu.describe(w.backend, &info);
    top->amx = strstr(info.device, "amx") != NULL;
    ok = fv_workload_verify(&w);
    if (ok) {
        measure(&w, top, options->n_rounds, samples);
        report(&w, samples, options->n_rounds, info.device, json);
    } else {
        (void)printf("%-30s WRONG: not timed\n", c->name);
    }
    fv_workload_destroy(&w);
    return ok;
}

/* ------------------------------------------------------------------ options */

static const struct argp_option k_options[] = {
    {"case", 'c', "TEXT", 0, "only cases whose name contains TEXT", 0},
    {"isa", 'i', "NAME", 0, "auto (default), amx, avx512, avx2 or portable", 0},
    {"json", 'j', "FILE", 0, "write the results to FILE as a JSON array", 0},
    {"list", 'l', NULL, 0, "list the cases and exit", 0},
    {"memory", 'm', "MIB", 0, "KV and read buffer to rotate through, each (default 1024)", 0},
    {"rounds", 'r', "N", 0, "rounds per case, 1..200 (default 9)", 0},
    {"threads", 't', "N", 0, "compute threads (default: all this process may use)", 0},
    {NULL, 0, NULL, 0, NULL, 0},
};

static long parse_number(struct argp_state *state, const char *text, long low, long high)
{
    char *end = NULL;
    long n = strtol(text, &end, 10);

    if ((*text == '\0') || (*end != '\0') || (n < low) || (n > high)) {
        argp_error(state, "given \"%s\", expected %ld..%ld", text, low, high);
    }
    return n;
}

static error_t parse_option(int key, char *arg, struct argp_state *state)
{
    options_t *options = state->input;

    switch (key) {
    case 'c':
        options->only = arg;
        return 0;
    case 'i':
        options->isa = arg;
        return 0;
    case 'j':
        options->json = arg;
        return 0;
    case 'l':
        for (size_t i = 0; i < sizeof(k_cases) / sizeof(k_cases[0]); i++) {
            (void)printf("%s\n", k_cases[i].name);
        }
        exit(0);
    case 'm':
        options->memory_bytes = (size_t)parse_number(state, arg, 16, 1 << 20) << 20U;
        return 0;
    case 'r':
        options->n_rounds = (int)parse_number(state, arg, 1, ROUNDS_MAX);
        return 0;
    case 't':
        options->n_threads = (int)parse_number(state, arg, 1, 1024);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static bool write_json(const char *path, const cJSON *json)
{
    FILE *file = fopen(path, "w");
    char *text = cJSON_Print(json);
    bool ok = (file != NULL) && (text != NULL) && (fprintf(file, "%s\n", text) > 0);

    if (file != NULL) {
        ok = (fclose(file) == 0) && ok;
    }
    free(text);
    if (!ok) {
        (void)fprintf(stderr, "bench_kernels: cannot write %s\n", path);
    }
    return ok;
}

int main(int argc, char **argv)
{
    static const struct argp k_argp = {
        .options = k_options,
        .parser = parse_option,
        .doc =
            "Times the CPU attention kernels beside the streaming read and the peak arithmetic of "
            "the same cores, interleaved. Each case is checked against the fp64 oracle first."};
    options_t options = {.n_rounds = 9, .memory_bytes = (size_t)1 << 30U};
    ceilings_t top = {0};
    cJSON *json = cJSON_CreateArray();
    bool ok = true;

    if (argp_parse(&k_argp, argc, argv, 0, NULL, &options) != 0) {
        return 1;
    }
    options.n_threads = (options.n_threads > 0) ? options.n_threads : fv_pool_cpus();
    top.n_threads = options.n_threads;
    top.stream_bytes = options.memory_bytes;
    top.window_bytes = options.memory_bytes / 8U;
    top.stream = aligned_alloc((size_t)2 << 20U, top.stream_bytes);
    if (top.stream == NULL) {
        fv_bench_die("no memory for the read buffer");
    }
    (void)madvise(top.stream, top.stream_bytes, MADV_HUGEPAGE); /* as the KV arena is */
    memset(top.stream, 1, top.stream_bytes);
    if (fv_pool_create(top.n_threads, &top.pool) != FV_OK) {
        fv_bench_die("pool");
    }
    (void)printf("%-30s %10s %8s %8s %7s %7s %9s %9s %9s %7s %9s\n", "case", "us", "GB/s", "read",
                 "ratio", "by cpu", "GFLOP/s", "by cpu", "FMA", "ratio", "bf16");
    for (size_t i = 0; i < sizeof(k_cases) / sizeof(k_cases[0]); i++) {
        if ((options.only == NULL) || (strstr(k_cases[i].name, options.only) != NULL)) {
            ok = bench_case(&k_cases[i], &options, &top, json) && ok;
        }
    }
    ok = ((options.json == NULL) || write_json(options.json, json)) && ok;
    fv_pool_destroy(top.pool);
    free(top.stream);
    cJSON_Delete(json);
    return ok ? 0 : 1;
}
