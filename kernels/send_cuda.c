/*
 * send_cuda.c - what goes to the device: collected while a step is described, sent by one launch.
 *
 * Decode path: station 6 of 10. Before: append_cuda.c, stage_cuda.c. After: pull_cuda.cu.
 *
 * Up to PULL_BYTES_MAX a launch of the pull kernel brings everything; beyond, long stretches go by DMA, which costs 5 us
 * more for each but has a fifth more bandwidth (measured: docs/gpu.md).
 */
#include "kernels/backend_cuda.h"

#include <stdlib.h>
#include <string.h>

#define PULL_BYTES_MAX ((size_t)1 << 20)
#define DMA_BYTES_MIN  ((size_t)256 << 10) /* of one stretch */
#define UNITS_MAPPED   8192U /* 0.7 MB: those of a step that do not fit into a launch's arguments */

fv_status_t fv_cuda_outbox_create(fv_cuda_outbox_t *outbox)
{
    outbox->mapped_max = UNITS_MAPPED;
    FV_RETURN_IF_ERR(FV_CUDA(cudaHostAlloc(
        (void **)&outbox->mapped, UNITS_MAPPED * sizeof(*outbox->mapped), cudaHostAllocMapped)));
    FV_RETURN_IF_ERR(FV_CUDA(
        cudaHostAlloc((void **)&outbox->record, sizeof(*outbox->record), cudaHostAllocMapped)));
    memset(outbox->record, 0, sizeof(*outbox->record));
    return FV_OK;
}

void fv_cuda_outbox_destroy(fv_cuda_outbox_t *outbox)
{
    (void)cudaFreeHost(outbox->mapped);
    (void)cudaFreeHost(outbox->record);
    outbox->mapped = NULL;
    outbox->record = NULL;
}

fv_status_t fv_cuda_send_unit(fv_backend_t *backend, const fv_pull_unit_t *unit)
{
    fv_cuda_outbox_t *o = &backend->outbox;

    FV_RETURN_IF_ERR(
        fv_cuda_grow((void **)&o->units, &o->units_max, o->n_units + 1U, sizeof(*o->units)));
    o->units[o->n_units++] = *unit;
    return FV_OK;
}

fv_status_t fv_cuda_send_bytes(fv_backend_t *backend, void *dst, const void *src, size_t n_bytes)
{
    fv_cuda_outbox_t *o = &backend->outbox;
    fv_cuda_stretch_t *last = (o->n_stretches > 0U) ? &o->stretches[o->n_stretches - 1U] : NULL;

    if (n_bytes == 0U) {
        return FV_OK;
    }
    if ((last != NULL) && (last->src + last->n_bytes == src) &&
        (last->dst + last->n_bytes == dst)) { /* items of one request lie together */
        last->n_bytes += n_bytes;
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_cuda_grow((void **)&o->stretches, &o->stretches_max, o->n_stretches + 1U,
                                  sizeof(*o->stretches)));
    o->stretches[o->n_stretches++] =
        (fv_cuda_stretch_t){.src = src, .dst = dst, .n_bytes = n_bytes};
    return FV_OK;
}

/* Stretches become units of the pull kernel, or DMA copies where there is much. */
static fv_status_t place_stretches(fv_backend_t *backend)
{
    fv_cuda_outbox_t *o = &backend->outbox;
    size_t n_bytes = 0;

    for (size_t i = 0; i < o->n_stretches; i++) {
        n_bytes += o->stretches[i].n_bytes;
    }
    for (size_t i = 0; i < o->n_stretches; i++) {
        const fv_cuda_stretch_t *s = &o->stretches[i];

        if ((n_bytes > PULL_BYTES_MAX) && (s->n_bytes >= DMA_BYTES_MIN)) {
            FV_RETURN_IF_ERR(FV_CUDA(
                cudaMemcpyAsync(s->dst, s->src, s->n_bytes, cudaMemcpyDefault, backend->stream)));
            continue;
        }
        for (size_t at = 0; at < s->n_bytes; at += FV_PULL_BYTES) {
            const size_t left = s->n_bytes - at;
            const fv_pull_unit_t unit = {
                .kind = FV_PULL_COPY,
                .k = s->src + at,
                .dst = s->dst + at,
                .n_bytes = (uint32_t)((left < FV_PULL_BYTES) ? left : FV_PULL_BYTES)};

            FV_RETURN_IF_ERR(fv_cuda_send_unit(backend, &unit));
        }
    }
    o->n_stretches = 0;
    return FV_OK;
}

/* One launch for [first, first + n) of the collected units. */
static fv_status_t launch_units(fv_backend_t *backend, size_t first, size_t n)
{
    fv_cuda_outbox_t *o = &backend->outbox;
    fv_pull_launch_t *launch = &o->launch;

    launch->arena = backend->arena;
    launch->n_units = (uint32_t)n;
    launch->units = NULL;
    launch->begin_ns = o->has_begun ? NULL : &o->record->begin_ns;
    o->has_begun = true;
    if (n <= FV_PULL_INLINE) {
        memcpy(launch->inlined, o->units + first, n * sizeof(*o->units));
    } else {
        if (n > o->mapped_max - o->mapped_used) { /* units of launches under way lie there */
            FV_RETURN_IF_ERR(fv_cuda_wait(backend, &fv_cuda_long));
            o->mapped_used = 0;
        }
        memcpy(o->mapped + o->mapped_used, o->units + first, n * sizeof(*o->units));
        launch->units = o->mapped + o->mapped_used;
        o->mapped_used += n;
    }
    return FV_CUDA(fv_pull_launch(launch, backend->stream));
}

fv_status_t fv_cuda_send_staged(fv_backend_t *backend)
{
    const size_t begin = backend->staging_sent;

    backend->staging_sent = backend->staging_used;
    return fv_cuda_send_bytes(backend, backend->staging_device + begin,
                              backend->staging_host + begin, backend->staging_used - begin);
}

fv_status_t fv_cuda_flush(fv_backend_t *backend)
{
    fv_cuda_outbox_t *o = &backend->outbox;

    FV_RETURN_IF_ERR(fv_cuda_send_staged(backend));
    FV_RETURN_IF_ERR(fv_cuda_ahead_join(backend));
    FV_RETURN_IF_ERR(place_stretches(backend));
    for (size_t at = 0; at < o->n_units; at += o->mapped_max) {
        const size_t left = o->n_units - at;

        FV_RETURN_IF_ERR(launch_units(backend, at, (left < o->mapped_max) ? left : o->mapped_max));
    }
    o->n_units = 0;
    o->has_appends = false;
    return FV_OK;
}

fv_cuda_outbox_mark_t fv_cuda_outbox_mark(const fv_backend_t *backend)
{
    const fv_cuda_outbox_t *o = &backend->outbox;

    return (fv_cuda_outbox_mark_t){
        .n_units = o->n_units,
        .n_stretches = o->n_stretches,
        .last_bytes = (o->n_stretches > 0U) ? o->stretches[o->n_stretches - 1U].n_bytes : 0U,
        .n_scatters = backend->n_scatters,
        .staging_used = backend->staging_used,
        .staging_sent = backend->staging_sent,
        .staging_top = backend->staging_top};
}

void fv_cuda_outbox_back(fv_backend_t *backend, const fv_cuda_outbox_mark_t *mark)
{
    fv_cuda_outbox_t *o = &backend->outbox;

    o->n_units = mark->n_units;
    o->n_stretches = mark->n_stretches;
    if (o->n_stretches > 0U) { /* it may have grown */
        o->stretches[o->n_stretches - 1U].n_bytes = mark->last_bytes;
    }
    backend->n_scatters = mark->n_scatters;
    backend->staging_used = mark->staging_used;
    backend->staging_sent = mark->staging_sent;
    backend->staging_top = mark->staging_top;
}
