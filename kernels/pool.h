/*
 * pool.h - the compute threads of the CPU backend. Private to kernels/.
 *
 * fv_pool_run() runs one function on every thread, the caller's included, and returns when all are done. Between
 * runs the threads sleep; for a few microseconds after a run they watch for the next one first, because
 * the layers of a step follow each other closely.
 */
#ifndef FV_KERNELS_POOL_H
#define FV_KERNELS_POOL_H

#include "common/status.h"

#include <stdint.h>

typedef struct fv_pool fv_pool_t;
typedef void (*fv_pool_fn_t)(void *ctx, int32_t thread_idx); /* 0 = the caller */

/* Threads this process may use: its affinity mask. At least 1. */
int32_t fv_pool_cpus(void);

/* n_threads >= 1 counts the caller. Errors: FV_ERR_NO_MEMORY, FV_ERR_SYSTEM. */
FV_MUST_CHECK fv_status_t fv_pool_create(int32_t n_threads, fv_pool_t **out);
void fv_pool_destroy(fv_pool_t *pool); /* NULL is fine */

/* Thread: one caller at a time. fn must not call back into the pool. */
void fv_pool_run(fv_pool_t *pool, fv_pool_fn_t fn, void *ctx);

#endif /* FV_KERNELS_POOL_H */
