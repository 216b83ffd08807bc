/*
 * staging_cuda.c - the staging area of the CUDA backend, and what waits in it for finish(). See backend_cuda.h.
 */
#include "kernels/backend_cuda.h"

#include <stdlib.h>
#include <string.h>

#define STAGING_MIN ((size_t)1 << 20)

/* Growing waits for the operations before: long, but not for ever. */
static const fv_wait_limits_t k_grow_limits = {.deadline_ms = 30000};

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
}

fv_status_t fv_cuda_reserve(fv_backend_t *backend, size_t n_bytes)
{
    size_t wanted = backend->staging_bytes;

    FV_RETURN_IF_ERR(fv_cuda_usable(backend));
    if (n_bytes <= backend->staging_bytes - backend->staging_used) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_cuda_wait(backend, &k_grow_limits));
    fv_cuda_staging_reset(backend);
    if (n_bytes <= backend->staging_bytes) {
        return FV_OK;
    }
    while ((wanted < STAGING_MIN) || (wanted < n_bytes)) {
        wanted = (wanted < STAGING_MIN) ? STAGING_MIN : (wanted * 2U);
    }
    fv_cuda_staging_free(backend); /* first: the two need not fit together */
    FV_RETURN_IF_ERR(
        FV_CUDA(cudaHostAlloc((void **)&backend->staging_host, wanted, cudaHostAllocMapped)));
    FV_RETURN_IF_ERR(FV_CUDA(cudaMalloc((void **)&backend->staging_device, wanted)));
    backend->staging_bytes = wanted;
    return FV_OK;
}

size_t fv_cuda_stage(fv_backend_t *backend, size_t n_bytes)
{
    size_t offset = backend->staging_used;

    FV_ASSERT(FV_CUDA_STAGE_BYTES(n_bytes) <= backend->staging_bytes - offset);
    backend->staging_used += FV_CUDA_STAGE_BYTES(n_bytes);
    return offset;
}

fv_status_t fv_cuda_stage_send(fv_backend_t *backend, size_t begin)
{
    if (backend->staging_used == begin) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_cuda_clock_mark(backend, FV_CUDA_BEGIN));
    return FV_CUDA(cudaMemcpyAsync(backend->staging_device + begin, backend->staging_host + begin,
                                   backend->staging_used - begin, cudaMemcpyHostToDevice,
                                   backend->stream));
}

bool fv_cuda_is_pinned(const fv_backend_t *backend, const void *p, size_t n_bytes)
{
    const uint8_t *at = p;

    for (size_t i = 0; i < backend->n_pinned; i++) {
        const fv_cuda_pinned_t *range = &backend->pinned[i];

        if ((at >= range->begin) && (at < range->begin + range->n_bytes)) {
            return n_bytes <= (size_t)(range->begin + range->n_bytes - at);
        }
    }
    return false;
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
}
