/*
 * backend_cuda.c - the CUDA backend: its device, its memory and its table of operations.
 */
#include "kernels/backend_cuda.h"

#include "common/log.h"
#include "kernels/latent_cuda.h"
#include "kernels/lean_cuda_launch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TABLES_MIN ((size_t)64 << 10) /* bytes */
#define TABLES_MAX ((size_t)1 << 30)
#define SM80_SMEM  ((size_t)164 << 10) /* bytes of an SM of 8.0; others of 8.x have less */

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
    fv_cuda_outbox_destroy(&backend->outbox);
    (void)cudaFree(backend->tables_device);
    fv_cuda_ahead_destroy(&backend->ahead);
    fv_cuda_staging_free(backend);
    (void)cudaFree(backend->arena);
    fv_lean_plan_free(backend);
    fv_prefill_plan_free(backend);
}

static void cuda_destroy(fv_backend_t *backend)
{
    if (backend == NULL) {
        return;
    }
    if (backend->lost == FV_OK) {
        free_device(backend);
    } /* else: freeing would wait for a step that may never end; the process's end frees it */
    fv_table_cache_destroy(backend->tables);
    (void)pthread_mutex_destroy(&backend->pinned_lock);
    free(backend->outbox.units);
    free(backend->outbox.stretches);
    free(backend->scatters);
    free(backend->merge_blob);
    free(backend->pinned);
    free(backend->launches);
    free(backend->runs);
    free(backend->is_planned);
    free(backend);
}

static fv_status_t choose_device(fv_backend_t *backend, int32_t device)
{
    struct cudaDeviceProp properties;
    int n_devices = 0;
    int32_t code = 0;

    FV_RETURN_IF_ERR(FV_CUDA(cudaGetDeviceCount(&n_devices)));
    if ((device < 0) || (device >= n_devices)) {
        return fv_fail(FV_ERR_UNAVAILABLE, "backend cuda: given GPU %d, expected one of %d visible",
                       device, n_devices);
    }
    FV_RETURN_IF_ERR(FV_CUDA(cudaSetDevice(device)));
    FV_RETURN_IF_ERR(FV_CUDA(cudaGetDeviceProperties(&properties, device)));
    if (fv_lean_cuda_code(&code) != cudaSuccess) {
        return fv_fail(
            FV_ERR_UNIMPLEMENTED,
            "backend cuda: given a GPU of compute capability %d.%d, expected one of what it was built for: " FV_CUDA_ARCHS,
            properties.major, properties.minor);
    }
    backend->has_sm90 = code >= 90;
    backend->device = device;
    backend->n_sms = properties.multiProcessorCount;
    backend->smem_per_sm = properties.sharedMemPerMultiprocessor;
    if (!backend->has_sm90 && (backend->smem_per_sm > SM80_SMEM)) {
        backend->smem_per_sm = SM80_SMEM; /* the same plans on any GPU, so that any can test them */
    }
    (void)snprintf(backend->name, sizeof(backend->name), "%.60s", properties.name);
    FV_RETURN_IF_ERR(FV_CUDA(fv_lean_cuda_init((int32_t)properties.sharedMemPerBlockOptin)));
    if (backend->has_sm90) {
        FV_RETURN_IF_ERR(FV_CUDA(fv_prefill_cuda_init()));
    }
    return FV_CUDA(fv_latent_cuda_init(backend->has_sm90));
}

/*
 * Page tables: one reference for each 2 KB of the arena. Pages of 32 KB (128 + 128 dims of 2 bytes) need an eighth of
 * it at most; the rest is for rounding to powers of two, for forks (they share pages, not tables) and for smaller pages.
 */
static fv_status_t create_tables(fv_backend_t *backend)
{
    const size_t wanted = backend->kv_arena_bytes / 2048U * sizeof(*backend->tables_device);

    backend->tables_bytes = (wanted < TABLES_MIN)   ? TABLES_MIN
                            : (wanted > TABLES_MAX) ? TABLES_MAX
                                                    : fv_align_up(wanted, 256U);
    FV_RETURN_IF_ERR(FV_CUDA(cudaMalloc((void **)&backend->tables_device, backend->tables_bytes)));
    return fv_table_cache_create(backend->tables_bytes / sizeof(*backend->tables_device),
                                 &backend->tables);
}

static fv_status_t cuda_init(fv_backend_t *backend, const fv_backend_config_t *config)
{
    if ((config->kv_arena_bytes % FV_PAGE_UNIT) != 0) {
        return fv_fail(FV_ERR_INVALID_ARG, "kv_arena_bytes: given %zu, expected a multiple of %d",
                       config->kv_arena_bytes, FV_PAGE_UNIT);
    }
    FV_RETURN_IF_ERR(choose_device(backend, config->device));
    FV_RETURN_IF_ERR(FV_CUDA(cudaStreamCreateWithFlags(&backend->stream, cudaStreamNonBlocking)));
    FV_RETURN_IF_ERR(fv_cuda_outbox_create(&backend->outbox));
    backend->kv_arena_bytes = config->kv_arena_bytes;
    if (config->kv_arena_bytes > 0) {
        FV_RETURN_IF_ERR(FV_CUDA(cudaMalloc((void **)&backend->arena, config->kv_arena_bytes)));
    }
    FV_RETURN_IF_ERR(create_tables(backend));
    FV_RETURN_IF_ERR(fv_cuda_ahead_create(&backend->ahead));
    FV_RETURN_IF_ERR(fv_lean_plan_init(backend));
    fv_prefill_plan_init(backend);
    return fv_cuda_reserve(backend, 1);
}

/* Nothing is allocated on the step path after this but by a step larger than any before: staging and pieces grow then. */
static void print_sizes(const fv_backend_t *backend)
{
    const double kib = 1.0 / 1024.0;

    fv_info(
        "GPU %d, KiB: KV %.0f, page tables %.0f, staging 2 x %.0f (host and GPU), pieces of cut rows %.0f, "
        "units of the pull kernel %.0f (host), inputs ahead of their step %.0f",
        backend->device, (double)backend->kv_arena_bytes * kib, (double)backend->tables_bytes * kib,
        (double)backend->staging_bytes * kib, (double)fv_lean_plan_device_bytes(backend) * kib,
        (double)(backend->outbox.mapped_max * sizeof(*backend->outbox.mapped)) * kib,
        (double)(2U * backend->ahead.half_bytes) * kib);
}

static fv_status_t cuda_create(const fv_backend_config_t *config, fv_backend_t **out)
{
    fv_backend_t *backend = calloc(1, sizeof(*backend));
    fv_status_t status = FV_OK;

    if (backend == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "cuda backend: no memory");
    }
    (void)pthread_mutex_init(&backend->pinned_lock, NULL);
    status = cuda_init(backend, config);
    if (status != FV_OK) {
        cuda_destroy(backend);
        return status;
    }
    print_sizes(backend);
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
    out->workspace_bytes = backend->staging_bytes + backend->tables_bytes +
                           fv_lean_plan_device_bytes(backend) + 2U * backend->ahead.half_bytes;
}

static fv_status_t cuda_host_alloc(fv_backend_t *backend, size_t n_bytes, void **out)
{
    fv_status_t status = FV_OK;
    void *memory = NULL;

    n_bytes = (n_bytes > 0U) ? n_bytes : 1U;
    FV_RETURN_IF_ERR(FV_CUDA(cudaSetDevice(backend->device))); /* any thread may ask */
    FV_RETURN_IF_ERR(
        FV_CUDA(cudaHostAlloc(&memory, n_bytes, cudaHostAllocMapped | cudaHostAllocPortable)));
    (void)pthread_mutex_lock(&backend->pinned_lock);
    status = fv_cuda_pinned_add(backend, memory, n_bytes);
    (void)pthread_mutex_unlock(&backend->pinned_lock);
    if (status != FV_OK) {
        (void)cudaFreeHost(memory);
        return status;
    }
    *out = memory;
    return FV_OK;
}

static void cuda_host_free(fv_backend_t *backend, void *memory)
{
    bool is_ours = false;

    (void)pthread_mutex_lock(&backend->pinned_lock);
    is_ours = fv_cuda_pinned_remove(backend, memory);
    (void)pthread_mutex_unlock(&backend->pinned_lock);
    if (is_ours && (backend->lost == FV_OK)) { /* freeing waits for the device */
        (void)cudaFreeHost(memory);
    }
}

/* ------------------------------------------------------------------ operations, in which no pinned memory comes or goes */

#define LOCKED(backend, call)                            \
    fv_status_t status = FV_OK;                          \
    (void)pthread_mutex_lock(&(backend)->pinned_lock);   \
    status = (call);                                     \
    (void)pthread_mutex_unlock(&(backend)->pinned_lock); \
    return status

static fv_status_t cuda_append(fv_backend_t *backend, const fv_append_item_t *items, size_t n_items)
{
    LOCKED(backend, fv_cuda_append(backend, items, n_items));
}

static fv_status_t cuda_attend(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items)
{
    LOCKED(backend, fv_cuda_attend(backend, items, n_items));
}

static fv_status_t cuda_merge(fv_backend_t *backend,
                              const fv_merge_item_t *items,
                              size_t n_items,
                              const fv_merge_sync_t *sync)
{
    LOCKED(backend, fv_cuda_merge(backend, items, n_items, sync));
}

static void cuda_prefetch(fv_backend_t *backend, const void *data, size_t n_bytes)
{
    (void)pthread_mutex_lock(&backend->pinned_lock);
    fv_cuda_prefetch(backend, data, n_bytes);
    (void)pthread_mutex_unlock(&backend->pinned_lock);
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
    fv_status_t status = FV_OK;

    (void)pthread_mutex_lock(&backend->pinned_lock);
    status = fv_cuda_pinned_add(backend, begin, n_bytes);
    (void)pthread_mutex_unlock(&backend->pinned_lock);
    return status;
}

void fv_backend_cuda_unreach(fv_backend_t *backend, const void *begin)
{
    (void)pthread_mutex_lock(&backend->pinned_lock);
    (void)fv_cuda_pinned_remove(backend, begin);
    (void)pthread_mutex_unlock(&backend->pinned_lock);
}

const fv_backend_ops_t fv_backend_cuda = {
    .name = "cuda",
    .has_latent = true,
    .has_fp8_latent = true,
    .is_async = true,
    .create = cuda_create,
    .destroy = cuda_destroy,
    .describe = cuda_describe,
    .host_alloc = cuda_host_alloc,
    .host_free = cuda_host_free,
    .prefetch = cuda_prefetch,
    .append = cuda_append,
    .copy_pages = fv_cuda_copy_pages,
    .attend = cuda_attend,
    .check_attend = fv_cuda_check_attend,
    .merge = cuda_merge,
    .empty = fv_cuda_empty,
    .finish = fv_cuda_finish,
};
