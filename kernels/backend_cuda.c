/*
 * backend_cuda.c - the CUDA backend: its device, its memory and its table of operations.
 */
#include "kernels/backend_cuda.h"

#include "kernels/lean_cuda_launch.h"
#include "kernels/lean_plan_cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

fv_status_t fv_cuda_check(cudaError_t error, const char *call)
{
    if (error == cudaSuccess) {
        return FV_OK;
    }
    return fv_fail((error == cudaErrorMemoryAllocation) ? FV_ERR_NO_MEMORY : FV_ERR_CUDA,
                   "%.80s: %s", call, cudaGetErrorString(error));
}

static void free_device(fv_backend_t *backend)
{
    if (backend->stream != NULL) {
        (void)cudaStreamSynchronize(backend->stream);
        (void)cudaStreamDestroy(backend->stream);
    }
    fv_cuda_clock_destroy(&backend->clock);
    fv_cuda_staging_free(backend);
    (void)cudaFree(backend->arena);
    fv_lean_plan_free(backend);
}

static void cuda_destroy(fv_backend_t *backend)
{
    if (backend == NULL) {
        return;
    }
    if (backend->lost == FV_OK) {
        free_device(backend);
    } /* else: freeing would wait for a step that may never end; the process's end frees it */
    free(backend->scatters);
    free(backend->pinned);
    free(backend->launches);
    free(backend->is_planned);
    free(backend);
}

/* The rank's device is the first visible one: the launcher shows each rank its own (CUDA_VISIBLE_DEVICES). */
static fv_status_t choose_device(fv_backend_t *backend)
{
    struct cudaDeviceProp properties;
    int n_devices = 0;

    FV_RETURN_IF_ERR(FV_CUDA(cudaGetDeviceCount(&n_devices)));
    if (n_devices < 1) {
        return fv_fail(FV_ERR_UNAVAILABLE,
                       "backend cuda: given 0 visible GPUs, expected at least one");
    }
    FV_RETURN_IF_ERR(FV_CUDA(cudaSetDevice(0)));
    FV_RETURN_IF_ERR(FV_CUDA(cudaGetDeviceProperties(&properties, 0)));
    if (properties.major != 9) {
        return fv_fail(FV_ERR_UNIMPLEMENTED,
                       "backend cuda: given a GPU of compute capability %d.%d, expected 9.0",
                       properties.major, properties.minor);
    }
    backend->device = 0;
    backend->n_sms = properties.multiProcessorCount;
    backend->smem_per_sm = properties.sharedMemPerMultiprocessor;
    (void)snprintf(backend->name, sizeof(backend->name), "%.60s", properties.name);
    return FV_CUDA(fv_lean_cuda_init((int32_t)properties.sharedMemPerBlockOptin));
}

static fv_status_t cuda_init(fv_backend_t *backend, const fv_backend_config_t *config)
{
    if ((config->kv_arena_bytes % FV_PAGE_UNIT) != 0) {
        return fv_fail(FV_ERR_INVALID_ARG, "kv_arena_bytes: given %zu, expected a multiple of %d",
                       config->kv_arena_bytes, FV_PAGE_UNIT);
    }
    FV_RETURN_IF_ERR(choose_device(backend));
    FV_RETURN_IF_ERR(FV_CUDA(cudaStreamCreateWithFlags(&backend->stream, cudaStreamNonBlocking)));
    FV_RETURN_IF_ERR(fv_cuda_clock_create(&backend->clock));
    backend->kv_arena_bytes = config->kv_arena_bytes;
    if (config->kv_arena_bytes > 0) {
        FV_RETURN_IF_ERR(FV_CUDA(cudaMalloc((void **)&backend->arena, config->kv_arena_bytes)));
    }
    FV_RETURN_IF_ERR(fv_lean_plan_init(backend));
    return fv_cuda_reserve(backend, 1);
}

static fv_status_t cuda_create(const fv_backend_config_t *config, fv_backend_t **out)
{
    fv_backend_t *backend = calloc(1, sizeof(*backend));
    fv_status_t status = FV_OK;

    if (backend == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "cuda backend: no memory");
    }
    status = cuda_init(backend, config);
    if (status != FV_OK) {
        cuda_destroy(backend);
        return status;
    }
    *out = backend;
    return FV_OK;
}

static void cuda_describe(const fv_backend_t *backend, fv_device_info_t *out)
{
    memset(out, 0, sizeof(*out));
    (void)snprintf(out->device, sizeof(out->device), "%s, %d SMs", backend->name, backend->n_sms);
    out->n_threads = backend->n_sms;
    out->kv_arena_bytes = backend->kv_arena_bytes;
    out->workspace_bytes = backend->staging_bytes + fv_lean_plan_device_bytes(backend);
}

static fv_status_t cuda_host_alloc(fv_backend_t *backend, size_t n_bytes, void **out)
{
    void *memory = NULL;

    n_bytes = (n_bytes > 0U) ? n_bytes : 1U;
    FV_RETURN_IF_ERR(fv_cuda_grow((void **)&backend->pinned, &backend->pinned_max,
                                  backend->n_pinned + 1U, sizeof(*backend->pinned)));
    FV_RETURN_IF_ERR(
        FV_CUDA(cudaHostAlloc(&memory, n_bytes, cudaHostAllocMapped | cudaHostAllocPortable)));
    backend->pinned[backend->n_pinned++] = (fv_cuda_pinned_t){.begin = memory, .n_bytes = n_bytes};
    *out = memory;
    return FV_OK;
}

static void cuda_host_free(fv_backend_t *backend, void *memory)
{
    for (size_t i = 0; i < backend->n_pinned; i++) {
        if (backend->pinned[i].begin == memory) {
            backend->pinned[i] = backend->pinned[--backend->n_pinned];
            if (backend->lost == FV_OK) { /* freeing waits for the device */
                (void)cudaFreeHost(memory);
            }
            return;
        }
    }
}

bool fv_backend_cuda_is_visible(void)
{
    int n_devices = 0;

    return (cudaGetDeviceCount(&n_devices) == cudaSuccess) && (n_devices > 0);
}

size_t fv_backend_cuda_memory_free(void)
{
    size_t n_free = 0;
    size_t n_all = 0;

    return (cudaMemGetInfo(&n_free, &n_all) == cudaSuccess) ? n_free : 0U;
}

const fv_backend_ops_t fv_backend_cuda = {
    .name = "cuda",
    .create = cuda_create,
    .destroy = cuda_destroy,
    .describe = cuda_describe,
    .host_alloc = cuda_host_alloc,
    .host_free = cuda_host_free,
    .append = fv_cuda_append,
    .copy_pages = fv_cuda_copy_pages,
    .attend = fv_cuda_attend,
    .merge = fv_cuda_merge,
    .finish = fv_cuda_finish,
};
