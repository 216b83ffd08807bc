/*
 * main_parts.c - what a rank is made of: its backend, its exchange, its store, its worker.
 */
#include "coord/main_parts.h"

#include "common/deadline.h"
#include "coord/main_exchange.h"
#include "coord/main_exit.h"
#include "coord/main_ranks.h"
#include "coord/main_store.h"
#include "coord/resources.h"

#include <mpi.h>

#include <stdio.h>
#include <string.h>

/* NULL: not in this build. */
static const fv_backend_ops_t *backend_named(const char *name)
{
#if defined(FV_WITH_CUDA)
    if ((strcmp(name, fv_backend_cuda.name) == 0) ||
        ((strcmp(name, "auto") == 0) && fv_backend_cuda_is_visible())) {
        return &fv_backend_cuda;
    }
#endif
    if (strcmp(name, "cuda") == 0) {
        return NULL;
    }
    return (strcmp(name, fv_backend_null.name) == 0) ? &fv_backend_null : &fv_backend_cpu;
}

static fv_main_place_t place_of(fv_process_t *p)
{
    return (fv_main_place_t){
        .comm = &p->crew.comm,
        .rank = p->rank,
        .n_ranks = p->n_ranks,
        .local_rank = p->local_rank,
        .n_local_ranks = p->n_local_ranks,
        .is_with_coordinator = p->is_with_coordinator,
        .is_dedicated = p->config.dedicated_coordinator,
    };
}

/* A share of the memory is one of the device's own. */
static uint64_t kv_memory(fv_process_t *p)
{
    const fv_memory_limit_t *limit = &p->config.kv_memory;

#if defined(FV_WITH_CUDA)
    if ((p->backend == &fv_backend_cuda) && (limit->percent > 0)) {
        fv_main_place_t place = place_of(p);
        uint64_t n_sharers = (uint64_t)fv_main_device_sharers(&place, fv_backend_cuda_count());
        fv_memory_limit_t device = {.bytes = fv_backend_cuda_memory_free(p->device) / 100U *
                                             (uint64_t)limit->percent / n_sharers};

        return fv_resolve_kv_memory(&device, 1);
    }
#endif
    return fv_resolve_kv_memory(limit, p->n_local_ranks);
}

/* Staging for KV that moves, whole MiB, so that the rest is whole slabs. */
static size_t move_bytes(const fv_process_t *p, uint64_t kv_bytes)
{
    const uint64_t most = kv_bytes / 8U;
    const uint64_t mib = (uint64_t)1 << 20;
    uint64_t wanted = p->config.move_memory;

    wanted = (wanted < most) ? wanted : most;
    return (p->n_ranks > 1) ? (size_t)(wanted / mib * mib) : 0U;
}

static bool has_worker(const fv_process_t *p)
{
    return (p->rank != 0) || !p->config.dedicated_coordinator;
}

/* What this rank finds out alone. */
static fv_status_t choose_backend(fv_process_t *p)
{
    p->backend = backend_named(p->config.backend);
    if (p->backend == NULL) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "backend: given %s, expected auto, cpu or null: this build has no CUDA",
                       p->config.backend);
    }
    if (p->config.dedicated_coordinator && (p->n_ranks == 1)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "dedicated_coordinator: given true for one rank, expected at least two");
    }
#if defined(FV_WITH_CUDA)
    if (p->backend == &fv_backend_cuda) {
        fv_main_place_t place = place_of(p);

        p->device = fv_main_device(&place, fv_backend_cuda_count());
    }
#endif
    return FV_OK;
}

fv_status_t fv_main_start_worker(fv_process_t *p, uint64_t kv_bytes, uint32_t n_threads)
{
    int32_t threads = fv_resolve_threads(p->config.threads, p->n_local_ranks);
    fv_worker_config_t config = {
        .rank = (uint32_t)p->rank,
        .n_ranks = (uint32_t)p->n_ranks,
        .backend = p->backend,
        .backend_config = {.n_threads = (n_threads > 0U) ? (int32_t)n_threads : threads,
                           .kv_arena_bytes = kv_bytes,
                           .device = p->device,
                           .isa = p->config.isa},
        .exchange = p->exchange.ops,
        .exchange_ctx = p->exchange.ctx,
        .move_bytes = move_bytes(p, kv_bytes),
        .step_deadline_ms = (uint32_t)p->config.step_deadline_ms,
        .store = p->store.is_on ? &p->store.place : NULL,
    };

    if (!has_worker(p)) {
        p->hello = (fv_ctl_hello_t){.rank = (uint32_t)p->rank, .backend = "none"};
        (void)snprintf(p->hello.device, sizeof(p->hello.device), "coordinator only");
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_worker_create(&config, &p->worker));
    p->crew.worker = p->worker;
    fv_worker_hello(p->worker, &p->hello);
    return FV_OK;
}

/* Rank 0's name for the store is everybody's. */
static fv_status_t open_store(fv_process_t *p)
{
    char job[FV_JOURNAL_JOB_BYTES] = "";

    fv_main_store_job(&p->config, job);
    if (p->has_mpi) {
        (void)MPI_Bcast(job, (int)sizeof(job), MPI_CHAR, 0, MPI_COMM_WORLD);
    }
    memcpy(p->crew.job, job, sizeof(job));
    return fv_main_store_open(&p->config, job, (uint32_t)p->rank, (uint32_t)p->n_ranks, &p->store);
}

fv_status_t fv_main_start_recruit_parts(fv_process_t *p, const char *job)
{
    FV_RETURN_IF_ERR(choose_backend(p));
    p->config.store_discard = false; /* what there is is what it is here for */
    return fv_main_store_open(&p->config, job, (uint32_t)p->rank, (uint32_t)p->n_ranks, &p->store);
}

/* All processes wait for whoever has most to read: what all have together counts. */
static void extend_start(const fv_process_t *p)
{
    uint64_t n_bytes = 0;

    if (strcmp(p->config.durability, "host") != 0) {
        return;
    }
    if (!fv_main_is_spare(p)) {
        n_bytes = fv_main_store_log_bytes(&p->config, p->crew.job, (uint32_t)p->rank);
    }
    if (p->has_mpi) {
        (void)MPI_Allreduce(MPI_IN_PLACE, &n_bytes, 1, MPI_UINT64_T, MPI_SUM, MPI_COMM_WORLD);
    }
    fv_deadline_arm((uint32_t)p->config.start_deadline_ms + fv_main_store_log_ms(n_bytes),
                    FV_EXIT_START, "fovead: start");
}

/* Backend, exchange, worker: after each, all ranks know whether all are fine, so that none waits for another. */
bool fv_main_start_parts(fv_process_t *p)
{
    fv_main_place_t place = place_of(p);
    fv_status_t status = choose_backend(p);

    if (!fv_main_said_fine(p, status)) {
        return false;
    }
    status = fv_main_is_spare(p)
                 ? FV_OK
                 : fv_main_exchange_open(&place, &p->config, p->backend, p->device, &p->exchange);
    fv_status_t opened = open_store(p);
    status = (status == FV_OK) ? opened : status;
    uint64_t kv_bytes = has_worker(p) ? kv_memory(p) : 0U; /* before a neighbour takes its own */
    if ((status == FV_OK) && has_worker(p) && !fv_main_is_spare(p)) {
        status =
            fv_main_store_kv_memory(&p->store, &p->config.kv_memory, p->n_local_ranks, &kv_bytes);
    }
    if (!fv_main_said_fine(p, status)) {
        return false;
    }
    extend_start(p);
    if (fv_main_is_spare(p)) { /* its worker is made when it is known whose place it takes */
        p->hello = (fv_ctl_hello_t){.rank = (uint32_t)p->rank, .backend = "spare"};
        return fv_main_said_fine(p, FV_OK);
    }
    return fv_main_said_fine(p, fv_main_start_worker(p, kv_bytes, 0));
}
