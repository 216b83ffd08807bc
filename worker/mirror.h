/*
 * mirror.h - the KV of a device in the host's memory, page for page.
 *
 * Decode path: station 6 of 10, while the device appends and attends, before the step is committed. Where a device keeps KV, a second arena of the same size and
 * with the same page references lies in the slot's segment, in the layout of the CPU backend, which also fills it: K and V
 * arrive in the host's memory anyway. A process that takes the slot over sends its pages to its device.
 *
 * Thread: the worker's.
 */
#ifndef FV_WORKER_MIRROR_H
#define FV_WORKER_MIRROR_H

#include "common/status.h"
#include "kernels/kernels.h"

#include <stddef.h>

/* A CPU backend over n_bytes at `arena` and FV_KV_ARENA_SLACK behind; keeps it. */
FV_MUST_CHECK fv_status_t fv_mirror_create(void *arena, size_t n_bytes, fv_backend_t **out);
void fv_mirror_destroy(fv_backend_t *mirror); /* NULL is fine */

/* Copies, then appends, as the device will do them. */
FV_MUST_CHECK fv_status_t fv_mirror_write(fv_backend_t *mirror,
                                          const fv_page_copy_t *copies,
                                          size_t n_copies,
                                          const fv_append_item_t *appends,
                                          size_t n_appends);

/* Sends pages to the device: page.src says which, page.dst is not read. Returns when they are there. */
FV_MUST_CHECK fv_status_t fv_mirror_restore(const fv_backend_t *mirror,
                                            const fv_backend_ops_t *ops,
                                            fv_backend_t *device,
                                            const fv_page_copy_t *pages,
                                            size_t n_pages);

#endif /* FV_WORKER_MIRROR_H */
