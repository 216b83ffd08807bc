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
    free(backend->merge_blob);
    free(backend->pinned);
    free(backend->launches);
    free(backend->is_planned);
    free(backend);
}

static fv_status_t choose_device(fv_backend_t *backend, int32_t device)
{
    struct cudaDeviceProp properties;
    int n_devices = 0;

    FV_RETURN_IF_ERR(FV_CUDA(cudaGetDeviceCount(&n_devices)));
    if ((device < 0) || (device >= n_devices)) {
        return fv_fail(FV_ERR_UNAVAILABLE, "backend cuda: given GPU %d, expected one of %d visible",
                       device, n_devices);
    }
    FV_RETURN_IF_ERR(FV_CUDA(cudaSetDevice(device)));
    FV_RETURN_IF_ERR(FV_CUDA(cudaGetDeviceProperties(&properties, device)));
    if (properties.major != 9) {
        return fv_fail(FV_ERR_UNIMPLEMENTED,
                       "backend cuda: given a GPU of compute capability %d.%d, expected 9.0",
                       properties.major, properties.minor);
    }
    backend->device = device;
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
    FV_RETURN_IF_ERR(choose_device(backend, config->device));
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
    (void)snprintf(out->device, sizeof(out->device), "%s, %d SMs, GPU %d", backend->name,
                   backend->n_sms, backend->device);
    out->n_threads = backend->n_sms;
    out->kv_arena_bytes = backend->kv_arena_bytes;
    out->workspace_bytes = backend->staging_bytes + fv_lean_plan_device_bytes(backend);
}

/* Notes memory that the device reaches at the host's address. */
static fv_status_t pinned_add(fv_backend_t *backend, void *begin, size_t n_bytes)
{
    FV_RETURN_IF_ERR(fv_cuda_grow((void **)&backend->pinned, &backend->pinned_max,
                                  backend->n_pinned + 1U, sizeof(*backend->pinned)));
    backend->pinned[backend->n_pinned++] = (fv_cuda_pinned_t){.begin = begin, .n_bytes = n_bytes};
    return FV_OK;
}

static bool pinned_remove(fv_backend_t *backend, const void *begin)
{
    for (size_t i = 0; i < backend->n_pinned; i++) {
        if (backend->pinned[i].begin == begin) {
            backend->pinned[i] = backend->pinned[--backend->n_pinned];
            return true;
        }
    }
    return false;
}

static fv_status_t cuda_host_alloc(fv_backend_t *backend, size_t n_bytes, void **out)
{
    void *memory = NULL;

    n_bytes = (n_bytes > 0U) ? n_bytes : 1U;
    FV_RETURN_IF_ERR(
        FV_CUDA(cudaHostAlloc(&memory, n_bytes, cudaHostAllocMapped | cudaHostAllocPortable)));
    fv_status_t status = pinned_add(backend, memory, n_bytes);
    if (status != FV_OK) {
        (void)cudaFreeHost(memory);
        return status;
    }
    *out = memory;
    return FV_OK;
}

static void cuda_host_free(fv_backend_t *backend, void *memory)
{
    if (pinned_remove(backend, memory)) {
        (void)cudaFreeHost(memory);
    }
}

int32_t fv_backend_cuda_count(void)
{
    int n_devices = 0;

    return (cudaGetDeviceCount(&n_devices) == cudaSuccess) ? (int32_t)n_devices : 0;
}

bool fv_backend_cuda_is_visible(void)
{
    return fv_backend_cuda_count() > 0;
}

size_t fv_backend_cuda_memory_free(int32_t device)
{
    size_t n_free = 0;
    size_t n_all = 0;

    if ((cudaSetDevice(device) != cudaSuccess) ||
        (cudaMemGetInfo(&n_free, &n_all) != cudaSuccess)) {
        return 0;
    }
    return n_free;
}

bool fv_backend_cuda_id(int32_t device, uint8_t out[FV_CUDA_ID_BYTES])
{
    struct cudaDeviceProp properties;

    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
        return false;
    }
    memcpy(out, properties.uuid.bytes, FV_CUDA_ID_BYTES);
    return true;
}

void *fv_backend_cuda_stream(fv_backend_t *backend)
{
    return backend->stream;
}

fv_status_t fv_backend_cuda_reach(fv_backend_t *backend, void *begin, size_t n_bytes)
{
    return pinned_add(backend, begin, n_bytes);
}

void fv_backend_cuda_unreach(fv_backend_t *backend, const void *begin)
{
    (void)pinned_remove(backend, begin);
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
    .empty = fv_cuda_empty,
    .finish = fv_cuda_finish,
};
