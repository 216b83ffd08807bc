/*
 * local.h - the coordinator's own rank, as a table of functions.
 *
 * coord may not include worker; main binds these to a fv_worker_t. Same meanings as the control messages.
 * Thread: engine.
 */
#ifndef FV_COORD_LOCAL_H
#define FV_COORD_LOCAL_H

#include "common/status.h"
#include "proto/control.h"
#include "proto/step.h"

#include <stddef.h>

typedef struct fv_local_ops {
    fv_status_t (*model)(void *ctx, const fv_ctl_model_t *message);
    fv_status_t (*open)(void *ctx, const fv_ctl_open_t *message);
    fv_status_t (*fork)(void *ctx, const fv_ctl_fork_t *message);
    fv_status_t (*truncate)(void *ctx, const fv_ctl_truncate_t *message);
    fv_status_t (*close)(void *ctx, const fv_ctl_close_t *message);
    fv_status_t (*keep)(void *ctx,
                        const fv_ctl_keep_t *message,
                        const fv_ctl_keep_layer_t *layers,
                        uint64_t *out_floors);
    fv_status_t (*keep_end)(void *ctx);
    fv_status_t (*step)(void *ctx,
                        const fv_ctl_item_t *items,
                        const fv_step_io_t *io,
                        size_t n_items,
                        fv_ctl_done_t *out_done,
                        fv_error_t *item_errors);
    void (*memory)(void *ctx, fv_ctl_memory_t *out);
    /* Host memory that the rank's device reaches fast, for requests and answers; NULL: malloc is as good. Any thread. */
    fv_status_t (*host_alloc)(void *ctx, size_t n_bytes, void **out);
    void (*host_free)(void *ctx, void *memory);
    /* From on_wait() alone, a hint: these bytes of the next step's inputs, in memory of host_alloc(), are final. */
    void (*prefetch)(void *ctx, const void *data, size_t n_bytes);
    /* on_wait(arg) is called by step() on its thread while the device works, again and again. */
    void (*on_wait)(void *ctx, void (*on_wait)(void *arg), void *arg);
} fv_local_ops_t;

#endif /* FV_COORD_LOCAL_H */
