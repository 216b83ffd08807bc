/*
 * workspace.h - grow-only scratch memory of the step: after a few steps nothing is allocated any more.
 */
#ifndef FV_WORKER_WORKSPACE_H
#define FV_WORKER_WORKSPACE_H

#include "common/status.h"
#include "kernels/kernels.h"

#include <stddef.h>

/* An array in ordinary memory. Zero-initialise it. */
typedef struct fv_array {
    void *data;
    size_t n_bytes; /* that fit */
} fv_array_t;

/* Room for n elements; what the array holds stays. May move it. Errors: FV_ERR_NO_MEMORY. */
FV_MUST_CHECK fv_status_t fv_array_reserve(fv_array_t *array, size_t n, size_t element_bytes);
void fv_array_free(fv_array_t *array);

/* Memory of the backend that peers and the device reach fast. Zero-initialise it. */
typedef struct fv_host_buffer {
    void *data;
    size_t n_bytes;
} fv_host_buffer_t;

/* Room for n bytes; what the buffer held is lost when it grows. Errors: the backend's. */
FV_MUST_CHECK fv_status_t fv_host_buffer_reserve(fv_host_buffer_t *buffer,
                                                 const fv_backend_ops_t *ops,
                                                 fv_backend_t *backend,
                                                 size_t n_bytes);
void fv_host_buffer_free(fv_host_buffer_t *buffer,
                         const fv_backend_ops_t *ops,
                         fv_backend_t *backend);

#endif /* FV_WORKER_WORKSPACE_H */
