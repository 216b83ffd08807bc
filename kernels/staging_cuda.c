/*
 * staging_cuda.c - the staging area of the CUDA backend, and what waits in it for finish(). See backend_cuda.h.
 */
#include "kernels/backend_cuda.h"

#include <stdlib.h>
#include <string.h>

/*
 * What a usual step needs, so that none grows it: 64 items of 8 kB of Q and as much of results from memory that the
 * device does not reach, or 4096 descriptors.
 */
#define STAGING_MIN ((size_t)8 << 20)
/* A step of more goes in stretches: its own time is far longer than a wait. */
#define STAGING_WHOLE ((size_t)512 << 20)

fv_status_t fv_cuda_grow(void **array, size_t *max, size_t n, size_t elem_bytes)
{
    size_t wanted = n + n / 2U;
    void *grown = NULL;

    if (n <= *max) {
        return FV_OK;
    }
    grown = realloc(*array, wanted * elem_bytes);
    if (grown == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "cuda backend: no host memory for %zu x %zu bytes", wanted,
                       elem_bytes);
    }
    *array = grown;
    *max = wanted;
    return FV_OK;
}

void fv_cuda_staging_free(fv_backend_t *backend)
{
    (void)cudaFreeHost(backend->staging_host);
    (void)cudaFree(backend->staging_device);
    backend->staging_host = NULL;
    backend->staging_device = NULL;
    backend->staging_bytes = 0;
    backend->staging_used = 0;
    backend->staging_sent = 0;
    backend->staging_top = 0;
}

fv_status_t fv_cuda_reserve(fv_backend_t *backend, size_t n_bytes)
{
    const size_t n_free = backend->staging_top - backend->staging_used;
    size_t wanted = backend->staging_bytes;
    size_t needed = backend->staging_bytes - n_free + n_bytes;

    FV_RETURN_IF_ERR(fv_cuda_usable(backend));
    if (n_bytes <= n_free) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_cuda_flush(backend));
    FV_RETURN_IF_ERR(fv_cuda_wait(backend, &fv_cuda_long));
    fv_cuda_staging_reset(backend);
    /* All of a step, so that the next one like it need not wait for the device in its middle. */
    needed = (needed > STAGING_WHOLE) ? n_bytes : needed;
    if (needed <= backend->staging_bytes) {
        return FV_OK;
    }
    while ((wanted < STAGING_MIN) || (wanted < needed)) {
        wanted = (wanted < STAGING_MIN) ? STAGING_MIN : (wanted * 2U);
    }
    fv_cuda_staging_free(backend); /* first: the two need not fit together */
    FV_RETURN_IF_ERR(
        FV_CUDA(cudaHostAlloc((void **)&backend->staging_host, wanted, cudaHostAllocMapped)));
    FV_RETURN_IF_ERR(FV_CUDA(cudaMalloc((void **)&backend->staging_device, wanted)));
    backend->staging_bytes = wanted;
    backend->staging_top = wanted;
    return FV_OK;
}

size_t fv_cuda_stage(fv_backend_t *backend, size_t n_bytes)
{
    size_t offset = backend->staging_used;

    FV_ASSERT(FV_CUDA_STAGE_BYTES(n_bytes) <= backend->staging_top - offset);
    backend->staging_used += FV_CUDA_STAGE_BYTES(n_bytes);
    return offset;
}

fv_status_t fv_cuda_stage_space(fv_backend_t *backend, size_t n_bytes, size_t *out_offset)
{
    FV_RETURN_IF_ERR(fv_cuda_send_staged(backend));
    *out_offset = fv_cuda_stage(backend, n_bytes);
    backend->staging_sent = backend->staging_used;
    return FV_OK;
}

size_t fv_cuda_stage_still(fv_backend_t *backend, size_t n_bytes)
{
    FV_ASSERT(FV_CUDA_STAGE_BYTES(n_bytes) <= backend->staging_top - backend->staging_used);
    backend->staging_top -= FV_CUDA_STAGE_BYTES(n_bytes);
    return backend->staging_top;
}

fv_status_t fv_cuda_scatter(fv_backend_t *backend, fv_cuda_scatter_t scatter)
{
    FV_RETURN_IF_ERR(fv_cuda_grow((void **)&backend->scatters, &backend->scatters_max,
                                  backend->n_scatters + 1U, sizeof(*backend->scatters)));
    backend->scatters[backend->n_scatters++] = scatter;
    return FV_OK;
}

void fv_cuda_staging_reset(fv_backend_t *backend)
{
    for (size_t i = 0; i < backend->n_scatters; i++) {
        const fv_cuda_scatter_t *s = &backend->scatters[i];

        for (size_t row = 0; row < s->n_rows; row++) {
            memcpy(s->dst + row * s->dst_stride, s->src + row * s->row_bytes, s->row_bytes);
        }
    }
    backend->n_scatters = 0;
    backend->staging_used = 0;
    backend->staging_sent = 0;
    backend->staging_top = backend->staging_bytes;
    backend->outbox.mapped_used = 0;
}

/* ------------------------------------------------------------------ memory of host_alloc() */

/* Number of ranges that begin at or before p. */
static size_t ranges_upto(const fv_backend_t *backend, const uint8_t *p)
{
    size_t low = 0;
    size_t high = backend->n_pinned;

    while (low < high) {
        const size_t mid = (low + high) / 2U;

        if (backend->pinned[mid].begin <= p) {
            low = mid + 1U;
        } else {
            high = mid;
        }
    }
    return low;
}

bool fv_cuda_is_pinned(const fv_backend_t *backend, const void *p, size_t n_bytes)
{
    const uint8_t *at = p;
    const size_t n = ranges_upto(backend, at);

    if (n == 0U) {
        return false;
    }
    const fv_cuda_pinned_t *range = &backend->pinned[n - 1U];
    const size_t offset = (size_t)(at - range->begin);

    return (offset < range->n_bytes) && (n_bytes <= range->n_bytes - offset);
}

fv_status_t fv_cuda_pinned_add(fv_backend_t *backend, void *begin, size_t n_bytes)
{
    const size_t at = ranges_upto(backend, begin);

    FV_RETURN_IF_ERR(fv_cuda_grow((void **)&backend->pinned, &backend->pinned_max,
                                  backend->n_pinned + 1U, sizeof(*backend->pinned)));
    memmove(backend->pinned + at + 1U, backend->pinned + at,
            (backend->n_pinned - at) * sizeof(*backend->pinned));
    backend->pinned[at] = (fv_cuda_pinned_t){.begin = begin, .n_bytes = n_bytes};
    backend->n_pinned++;
    return FV_OK;
}

bool fv_cuda_pinned_remove(fv_backend_t *backend, const void *begin)
{
    const size_t n = ranges_upto(backend, begin);

    if ((n == 0U) || (backend->pinned[n - 1U].begin != begin)) {
        return false;
    }
    memmove(backend->pinned + n - 1U, backend->pinned + n,
            (backend->n_pinned - n) * sizeof(*backend->pinned));
    backend->n_pinned--;
    return true;
}
