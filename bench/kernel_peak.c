/*
 * kernel_peak.c - streaming read, FMA and bf16 loops, on all threads at once. See kernel_peak.h.
 */
#include "bench/kernel_peak.h"

#include <stdatomic.h>
#include <time.h>

#if defined(__x86_64__)
#    include <immintrin.h>
#    define TARGET(isa) __attribute__((target(isa)))
#endif

#define FMA_TURNS    400000
#define FMA_CHAINS   16 /* independent sums: more than latency times ports */
#define SCALAR_LANES 16

typedef struct peak_run {
    const uint8_t *data;
    size_t n_bytes;
    int32_t n_threads;
    double (*loop)(void); /* returns flops done */
    _Atomic double flops;
    atomic_ullong sink; /* results end here, so that no loop is optimised away */
} peak_run_t;

static double now_s(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ------------------------------------------------------------------ streaming read */

static uint64_t read_words(const uint64_t *words, size_t n_words)
{
    uint64_t sum[8] = {0};

    for (size_t i = 0; i + 8U <= n_words; i += 8U) {
        for (size_t j = 0; j < 8U; j++) {
            sum[j] += words[i + j];
        }
    }
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

#if defined(__x86_64__)
TARGET("avx512f") static uint64_t read_vectors(const uint8_t *data, size_t n_bytes)
{
    __m512i sum[4];

    for (int j = 0; j < 4; j++) {
        sum[j] = _mm512_setzero_si512();
    }
    for (size_t i = 0; i + 256U <= n_bytes; i += 256U) {
        for (size_t j = 0; j < 4U; j++) {
            sum[j] = _mm512_add_epi64(sum[j], _mm512_loadu_si512(data + i + 64U * j));
        }
    }
    sum[0] = _mm512_add_epi64(_mm512_add_epi64(sum[0], sum[1]), _mm512_add_epi64(sum[2], sum[3]));
    return (uint64_t)_mm512_reduce_add_epi64(sum[0]);
}
#endif

static void read_thread(void *ctx, int32_t thread_idx)
{
    peak_run_t *run = ctx;
    size_t part = run->n_bytes / (size_t)run->n_threads / 256U * 256U;
    const uint8_t *data = run->data + part * (size_t)thread_idx;
    uint64_t sum = 0;

#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
        sum = read_vectors(data, part);
        atomic_fetch_add(&run->sink, sum);
        return;
    }
#endif
    sum = read_words((const uint64_t *)(const void *)data, part / 8U);
    atomic_fetch_add(&run->sink, sum);
}

void fv_peak_host_read(fv_pool_t *pool, int32_t n_threads, const void *data, size_t n_bytes)
{
    peak_run_t run = {.data = data, .n_bytes = n_bytes, .n_threads = n_threads};

    fv_pool_run(pool, read_thread, &run);
}

/* ------------------------------------------------------------------ arithmetic */

/* Lanes of the sums, so that the loops below cannot be thrown away. */
static volatile float peak_sink;

static double loop_plain(void)
{
    float sum[FMA_CHAINS * SCALAR_LANES] = {0.0F};

    for (int i = 0; i < FMA_TURNS / 4; i++) {
        for (int j = 0; j < FMA_CHAINS * SCALAR_LANES; j++) {
            sum[j] = sum[j] * 0.999F + 1.0F;
        }
    }
    peak_sink = sum[0];
    return 2.0 * FMA_TURNS / 4 * FMA_CHAINS * SCALAR_LANES;
}

#if defined(__x86_64__)
TARGET("avx512f") static double loop_avx512(void)
{
    __m512 sum[FMA_CHAINS];
    __m512 x = _mm512_set1_ps(0.999F);

    for (int j = 0; j < FMA_CHAINS; j++) {
        sum[j] = _mm512_set1_ps((float)j);
    }
    for (int i = 0; i < FMA_TURNS; i++) {
#    pragma GCC unroll 16
        for (int j = 0; j < FMA_CHAINS; j++) {
            sum[j] = _mm512_fmadd_ps(sum[j], x, x);
        }
    }
    for (int j = 1; j < FMA_CHAINS; j++) {
        sum[0] = _mm512_add_ps(sum[0], sum[j]);
    }
    peak_sink = _mm512_cvtss_f32(sum[0]);
    return 2.0 * FMA_TURNS * FMA_CHAINS * 16.0;
}

TARGET("avx2,fma") static double loop_avx2(void)
{
    __m256 sum[12];
    __m256 x = _mm256_set1_ps(0.999F);

    for (int j = 0; j < 12; j++) {
        sum[j] = _mm256_set1_ps((float)j);
    }
    for (int i = 0; i < FMA_TURNS; i++) {
#    pragma GCC unroll 16
        for (int j = 0; j < 12; j++) {
            sum[j] = _mm256_fmadd_ps(sum[j], x, x);
        }
    }
    for (int j = 1; j < 12; j++) {
        sum[0] = _mm256_add_ps(sum[0], sum[j]);
    }
    peak_sink = _mm256_cvtss_f32(sum[0]);
    return 2.0 * FMA_TURNS * 12.0 * 8.0;
}

TARGET("avx512f,avx512bf16") static double loop_bf16(void)
{
    __m512 sum[FMA_CHAINS];
    __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5F), _mm512_set1_ps(0.5F));

    for (int j = 0; j < FMA_CHAINS; j++) {
        sum[j] = _mm512_set1_ps((float)j);
    }
    for (int i = 0; i < FMA_TURNS; i++) {
#    pragma GCC unroll 16
        for (int j = 0; j < FMA_CHAINS; j++) {
            sum[j] = _mm512_dpbf16_ps(sum[j], x, x);
        }
    }
    for (int j = 1; j < FMA_CHAINS; j++) {
        sum[0] = _mm512_add_ps(sum[0], sum[j]);
    }
    peak_sink = _mm512_cvtss_f32(sum[0]);
    return 2.0 * FMA_TURNS * FMA_CHAINS * 32.0;
}

/* Needs the process to have AMX permission: creating a CPU backend has asked for it. */
TARGET("amx-tile,amx-bf16") static double loop_amx(void)
{
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t n_rows[16];
    } k_config = {.palette = 1,
                  .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                  .n_rows = {16, 16, 16, 16, 16, 16, 16, 16}};

    _tile_loadconfig(&k_config); /* also clears all tiles */
    for (int i = 0; i < FMA_TURNS; i++) {
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 5);
        _tile_dpbf16ps(2, 4, 5);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_release();
    return 2.0 * FMA_TURNS * 4.0 * 16.0 * 16.0 * 32.0;
}
#endif

static void arithmetic_thread(void *ctx, int32_t thread_idx)
{
    peak_run_t *run = ctx;
    double flops = run->loop();
    double seen = atomic_load(&run->flops);

    (void)thread_idx;
    while (!atomic_compare_exchange_weak(&run->flops, &seen, seen + flops)) {
    }
}

static double run_loop(fv_pool_t *pool, int32_t n_threads, double (*loop)(void))
{
    peak_run_t run = {.n_threads = n_threads, .loop = loop};
    double begin = now_s();

    fv_pool_run(pool, arithmetic_thread, &run);
    return atomic_load(&run.flops) / (now_s() - begin);
}

double fv_peak_fma(fv_pool_t *pool, int32_t n_threads)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
        return run_loop(pool, n_threads, loop_avx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return run_loop(pool, n_threads, loop_avx2);
    }
#endif
    return run_loop(pool, n_threads, loop_plain);
}

double fv_peak_bf16(fv_pool_t *pool, int32_t n_threads, bool amx)
{
#if defined(__x86_64__)
    if (amx) {
        return run_loop(pool, n_threads, loop_amx);
    }
    if (__builtin_cpu_supports("avx512bf16")) {
        return run_loop(pool, n_threads, loop_bf16);
    }
#else
    (void)amx;
#endif
    return 0.0;
}
