/*
 * workspace.c - grow-only scratch memory.
 */
#include "worker/workspace.h"

#include <stdlib.h>

/* Half as much again, so that a slowly growing batch does not allocate every step. */
static size_t with_slack(size_t n_bytes)
{
    size_t slack = n_bytes / 2U;

    return (n_bytes > SIZE_MAX - slack) ? n_bytes : (n_bytes + slack);
}

fv_status_t fv_array_reserve(fv_array_t *array, size_t n, size_t element_bytes)
{
    size_t n_bytes = 0;

    if (!fv_size_mul(n, element_bytes, &n_bytes)) {
        return fv_fail(FV_ERR_NO_MEMORY, "step workspace: %zu elements of %zu bytes are too many",
                       n, element_bytes);
    }
    if (n_bytes <= array->n_bytes) {
        return FV_OK;
    }
    n_bytes = with_slack(n_bytes);
    void *data = realloc(array->data, n_bytes);
    if (data == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "step workspace: no host memory for %zu bytes", n_bytes);
    }
    array->data = data;
    array->n_bytes = n_bytes;
    return FV_OK;
}

void fv_array_free(fv_array_t *array)
{
    free(array->data);
    *array = (fv_array_t){0};
}

fv_status_t fv_host_buffer_reserve(fv_host_buffer_t *buffer,
                                   const fv_backend_ops_t *ops,
                                   fv_backend_t *backend,
                                   size_t n_bytes)
{
    void *data = NULL;

    if (n_bytes <= buffer->n_bytes) {
        return FV_OK;
    }
    n_bytes = with_slack(n_bytes);
    fv_host_buffer_free(buffer, ops, backend); /* first: the two need not fit together */
    FV_RETURN_IF_ERR(ops->host_alloc(backend, n_bytes, &data));
    buffer->data = data;
    buffer->n_bytes = n_bytes;
    return FV_OK;
}

void fv_host_buffer_free(fv_host_buffer_t *buffer,
                         const fv_backend_ops_t *ops,
                         fv_backend_t *backend)
{
    if (buffer->data != NULL) {
        ops->host_free(backend, buffer->data);
    }
    *buffer = (fv_host_buffer_t){0};
}
