/*
 * scale_rank.c - a rank of the scaling benchmark: its device, its worker, its exchange.
 */
#include "bench/scale/scale.h"
#include "common/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define CPU_KV_BYTES ((uint64_t)1 << 30)
#define DEADLINE_MS  60000

void fv_scale_die(const char *what)
{
    int rank = 0;

    (void)MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    (void)fprintf(stderr, "bench_scale: rank %d: %s: %s\n", rank, what, fv_error_context());
    (void)MPI_Abort(MPI_COMM_WORLD, 1);
    exit(1);
}

void fv_scale_check(fv_status_t status, const char *what)
{
    if (status != FV_OK) {
        fv_scale_die(what);
    }
}

void *fv_scale_alloc(size_t n, size_t size)
{
    void *memory = calloc(n, size);

    if (memory == NULL) {
        fv_scale_die("no memory");
    }
    return memory;
}

double fv_scale_now_us(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

double fv_scale_max(const fv_scale_rank_t *r, double value)
{
    double all = 0.0;

    (void)MPI_Allreduce(&value, &all, 1, MPI_DOUBLE, MPI_MAX, r->comm);
    return all;
}

static void choose_backend(fv_scale_rank_t *r)
{
    const char *name = r->options->backend;

    r->backend = &fv_backend_cpu;
#if defined(FV_WITH_CUDA)
    if ((strcmp(name, "cuda") == 0) ||
        ((strcmp(name, "auto") == 0) && fv_backend_cuda_is_visible())) {
        r->backend = &fv_backend_cuda;
    }
#endif
    if ((strcmp(name, "auto") != 0) && (strcmp(name, r->backend->name) != 0)) {
        (void)fv_fail(FV_ERR_INVALID_ARG,
                      "given %s, expected auto, cpu, or cuda in a build with it", name);
        fv_scale_die("backend");
    }
}

static uint64_t kv_bytes(const fv_scale_rank_t *r, int32_t device, int32_t n_sharers)
{
    uint64_t n_bytes = r->options->kv_bytes;

    if (n_bytes == 0U) {
        n_bytes = CPU_KV_BYTES;
#if defined(FV_WITH_CUDA)
        if (r->backend == &fv_backend_cuda) {
            n_bytes = fv_backend_cuda_memory_free(device) / 100U * 85U / (uint64_t)n_sharers;
        }
#else
        (void)device;
        (void)n_sharers;
#endif
    }
    return n_bytes / FV_KV_SLAB_BYTES * FV_KV_SLAB_BYTES;
}

static fv_main_place_t place_on_host(fv_scale_rank_t *r)
{
    MPI_Comm host = MPI_COMM_NULL;
    int first = r->rank;

    (void)MPI_Comm_split_type(r->comm, MPI_COMM_TYPE_SHARED, r->rank, MPI_INFO_NULL, &host);
    (void)MPI_Comm_rank(host, &r->local_rank);
    (void)MPI_Comm_size(host, &r->n_local_ranks);
    (void)MPI_Bcast(&first, 1, MPI_INT, 0, host);
    (void)MPI_Comm_free(&host);
    return (fv_main_place_t){.comm = &r->comm,
                             .rank = r->rank,
                             .n_ranks = r->n_ranks,
                             .local_rank = r->local_rank,
                             .n_local_ranks = r->n_local_ranks,
                             .is_with_coordinator = first == 0};
}

/* As fovead does: the same GPU for a rank, the same exchange. */
static void open_worker(fv_scale_rank_t *r, const fv_main_place_t *place)
{
    const int32_t n_cores = (int32_t)sysconf(_SC_NPROCESSORS_ONLN) / r->n_local_ranks;
    int32_t n_threads = (int32_t)r->options->n_threads;
    int32_t device = 0;
    int32_t n_sharers = 1;
    fv_config_t service;

    fv_config_defaults(&service);
    (void)snprintf(service.exchange, sizeof(service.exchange), "%s", r->options->exchange);
#if defined(FV_WITH_CUDA)
    if (r->backend == &fv_backend_cuda) {
        device = fv_main_device(place, fv_backend_cuda_count());
        n_sharers = fv_main_device_sharers(place, fv_backend_cuda_count());
    }
#endif
    fv_scale_check(fv_main_exchange_open(place, &service, r->backend, device, &r->exchange),
                   "exchange");
    if (n_threads == 0) {
        n_threads = (n_cores < 1) ? 1 : n_cores;
    }
    r->arena_bytes = kv_bytes(r, device, n_sharers);
    (void)MPI_Barrier(r->comm); /* before a neighbour takes its own */
    const fv_worker_config_t config = {.rank = (uint32_t)r->rank,
                                       .n_ranks = (uint32_t)r->n_ranks,
                                       .backend = r->backend,
                                       .backend_config = {.n_threads = n_threads,
                                                          .kv_arena_bytes = r->arena_bytes,
                                                          .device = device},
                                       .move_bytes = r->options->move_bytes,
                                       .exchange = r->exchange.ops,
                                       .exchange_ctx = r->exchange.ctx,
                                       .step_deadline_ms = DEADLINE_MS};
    fv_scale_check(fv_worker_create(&config, &r->worker), "worker");
}

void fv_scale_rank_open(fv_scale_rank_t *r, const fv_scale_options_t *options)
{
    double rate = 0.0;
    uint64_t least = 0;

    memset(r, 0, sizeof(*r));
    r->options = options;
    r->comm = MPI_COMM_WORLD;
    (void)MPI_Comm_rank(r->comm, &r->rank);
    (void)MPI_Comm_size(r->comm, &r->n_ranks);
    const fv_main_place_t place = place_on_host(r);
    choose_backend(r);
    open_worker(r, &place);
    r->backend->describe(r->worker->backend, &r->device);
    (void)MPI_Allreduce(&r->arena_bytes, &least, 1, MPI_UINT64_T, MPI_MIN, r->comm);
    r->arena_bytes = least;
    rate = fv_scale_read_rate(r);
    (void)MPI_Allreduce(&rate, &r->read_gbps, 1, MPI_DOUBLE, MPI_MIN, r->comm);
}

uint32_t fv_scale_model(fv_scale_rank_t *r, const fv_model_spec_t *spec)
{
    for (uint32_t i = 0; i < r->n_models; i++) {
        if (fv_model_spec_equal(&r->models[i], spec)) {
            return i;
        }
    }
    const fv_ctl_model_t message = {.model_slot = r->n_models, .spec = *spec};

    fv_scale_check(fv_worker_model(r->worker, &message), "model");
    r->models[r->n_models] = *spec;
    return r->n_models++;
}

void fv_scale_rank_close(fv_scale_rank_t *r)
{
    fv_worker_destroy(r->worker);
    fv_main_exchange_close(&r->exchange);
}
