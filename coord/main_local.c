/*
 * main_local.c - rank 0's own worker as a table of functions.
 *
 * Decode path: between coord/engine_step.c and worker/worker.h on rank 0; calls only, nothing is copied.
 */
#include "coord/main_local.h"

#include <string.h>

static fv_status_t local_model(void *ctx, const fv_ctl_model_t *message)
{
    return fv_worker_model(ctx, message);
}
static fv_status_t local_open(void *ctx, const fv_ctl_open_t *message)
{
    return fv_worker_open(ctx, message);
}
static fv_status_t local_fork(void *ctx, const fv_ctl_fork_t *message)
{
    return fv_worker_fork(ctx, message);
}
static fv_status_t local_truncate(void *ctx, const fv_ctl_truncate_t *message)
{
    return fv_worker_truncate(ctx, message);
}
static fv_status_t local_close(void *ctx, const fv_ctl_close_t *message)
{
    return fv_worker_close(ctx, message);
}
static fv_status_t local_keep(void *ctx,
                              const fv_ctl_keep_t *message,
                              const fv_ctl_keep_layer_t *layers,
                              uint64_t *out_floors)
{
    return fv_worker_keep(ctx, message, layers, out_floors);
}
static fv_status_t local_keep_end(void *ctx)
{
    return fv_worker_keep_end(ctx);
}
static fv_status_t local_step(void *ctx,
                              const fv_ctl_item_t *items,
                              const fv_step_io_t *io,
                              size_t n_items,
                              fv_ctl_done_t *out_done,
                              fv_error_t *item_errors)
{
    return fv_worker_step(ctx, items, io, n_items, out_done, item_errors);
}
static void local_memory(void *ctx, fv_ctl_memory_t *out)
{
    fv_worker_memory(ctx, out);
}

static fv_status_t local_host_alloc(void *ctx, size_t n_bytes, void **out)
{
    return fv_worker_host_alloc(ctx, n_bytes, out);
}
static void local_host_free(void *ctx, void *memory)
{
    fv_worker_host_free(ctx, memory);
}
static void local_prefetch(void *ctx, const void *data, size_t n_bytes)
{
    fv_worker_prefetch(ctx, data, n_bytes);
}
static void local_on_wait(void *ctx, void (*on_wait)(void *arg), void *arg)
{
    fv_worker_on_wait(ctx, on_wait, arg);
}

static const fv_local_ops_t k_local_ops = {
    .model = local_model,
    .open = local_open,
    .fork = local_fork,
    .truncate = local_truncate,
    .close = local_close,
    .keep = local_keep,
    .keep_end = local_keep_end,
    .step = local_step,
    .memory = local_memory,
    .prefetch = local_prefetch,
    .on_wait = local_on_wait,
};

/* Beside a device with memory of its own, requests and answers lie where it reaches them fast. */
const fv_local_ops_t *fv_main_local_ops(const fv_process_t *p)
{
    static fv_local_ops_t pinned;

    if (p->worker == NULL) {
        return NULL;
    }
    if (strcmp(p->backend->name, "cuda") != 0) {
        return &k_local_ops;
    }
    pinned = k_local_ops;
    pinned.host_alloc = local_host_alloc;
    pinned.host_free = local_host_free;
    return &pinned;
}
