/*
 * backend_null.c - a device that does nothing, at once: what is left when it is measured is the service.
 *
 * It holds no KV memory and writes no result; sizes it is told are reported back, so that everything around it
 * behaves as on a real device.
 */
#include "kernels/kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct fv_backend {
    fv_backend_config_t config;
};

static fv_status_t null_create(const fv_backend_config_t *config, fv_backend_t **out)
{
    fv_backend_t *backend = calloc(1, sizeof(*backend));

    if (backend == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "null backend: no memory");
    }
    backend->config = *config;
    *out = backend;
    return FV_OK;
}

static void null_destroy(fv_backend_t *backend)
{
    free(backend);
}

static void null_describe(const fv_backend_t *backend, fv_device_info_t *out)
{
    memset(out, 0, sizeof(*out));
    (void)snprintf(out->device, sizeof(out->device), "null (computes nothing)");
    out->n_threads = 1;
    out->kv_arena_bytes = backend->config.kv_arena_bytes;
}

static fv_status_t null_host_alloc(fv_backend_t *backend, size_t n_bytes, void **out)
{
    void *memory = NULL;

    (void)backend;
    if (posix_memalign(&memory, 4096U, (n_bytes > 0U) ? n_bytes : 1U) != 0) {
        return fv_fail(FV_ERR_NO_MEMORY, "null backend: no memory for a buffer of %zu bytes",
                       n_bytes);
    }
    *out = memory;
    return FV_OK;
}

static void null_host_free(fv_backend_t *backend, void *memory)
{
    (void)backend;
    free(memory);
}

static fv_status_t null_append(fv_backend_t *backend, const fv_append_item_t *items, size_t n_items)
{
    (void)backend;
    (void)items;
    (void)n_items;
    return FV_OK;
}

static fv_status_t null_copy(fv_backend_t *backend, const fv_page_copy_t *copies, size_t n_copies)
{
    (void)backend;
    (void)copies;
    (void)n_copies;
    return FV_OK;
}

static fv_status_t null_attend(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items)
{
    (void)backend;
    (void)items;
    (void)n_items;
    return FV_OK;
}

static fv_status_t null_merge(fv_backend_t *backend,
                              const fv_merge_item_t *items,
                              size_t n_items,
                              const fv_merge_sync_t *sync)
{
    (void)backend;
    (void)items;
    (void)n_items;
    (void)sync;
    return FV_OK;
}

static fv_status_t null_empty(fv_backend_t *backend, float *lse_log2, uint64_t n_rows)
{
    (void)backend;
    (void)lse_log2;
    (void)n_rows;
    return FV_OK;
}

static fv_status_t
null_finish(fv_backend_t *backend, const fv_wait_limits_t *limits, fv_device_times_t *out_times)
{
    (void)backend;
    (void)limits;
    if (out_times != NULL) {
        *out_times = (fv_device_times_t){.is_known = false};
    }
    return FV_OK;
}

const fv_backend_ops_t fv_backend_null = {
    .name = "null",
    .kv_home = FV_KV_NOWHERE,
    .has_latent = true,
    .create = null_create,
    .destroy = null_destroy,
    .describe = null_describe,
    .host_alloc = null_host_alloc,
    .host_free = null_host_free,
    .append = null_append,
    .copy_pages = null_copy,
    .attend = null_attend,
    .merge = null_merge,
    .empty = null_empty,
    .finish = null_finish,
};
