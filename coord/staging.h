/*
 * staging.h - pooled, 64-byte aligned host memory for tensors on their way in and out.
 *
 * Buffers come in powers of two and are kept for reuse, so the steady state allocates nothing and touches no cold
 * page. The bytes handed out are bounded: over the bound a request is refused with numbers, which is what
 * keeps many fast clients from growing the process.
 * Thread: any (rpc threads take and gRPC's threads give back); one mutex, held for a few instructions.
 */
#ifndef FV_COORD_STAGING_H
#define FV_COORD_STAGING_H

#include "common/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct fv_staging fv_staging_t;

/* Where buffers come from, when a device is to reach them fast (pinned memory). Both are called from any thread. */
typedef struct fv_staging_memory {
    fv_status_t (*alloc)(void *ctx, size_t n_bytes, void **out); /* page-aligned */
    void (*free)(void *ctx, void *memory);
    void *ctx; /* outlives the staging */
} fv_staging_memory_t;

/*
 * memory NULL: malloc. Otherwise buffers are cut from chunks of it, for sizes up to 1 MiB at once, for larger ones when
 * first needed; chunks stay until destroy. They hold at most bytes_max; what goes beyond, and what `memory` refuses, comes
 * from malloc.
 */
FV_MUST_CHECK fv_status_t fv_staging_create(size_t bytes_max,
                                            const fv_staging_memory_t *memory,
                                            fv_staging_t **out);
void fv_staging_destroy(fv_staging_t *staging); /* every buffer must be back */

/*
 * may_pass: what must go on when the bound is reached (a small command); fails only for want of memory.
 * Errors: FV_ERR_EXHAUSTED with bytes needed and free; FV_ERR_NO_MEMORY.
 */
FV_MUST_CHECK fv_status_t fv_staging_take(fv_staging_t *staging,
                                          size_t n_bytes,
                                          bool may_pass,
                                          void **out);
/* Matches the release signature of fv_reply_piece_t: `buffer` is what take() gave. NULL is fine. */
void fv_staging_give(void *buffer);

/* The bytes no longer count, and are never reused: somebody may still read or write them. NULL is fine. */
void fv_staging_abandon(void *buffer);

size_t fv_staging_bytes(const fv_staging_t *staging); /* handed out now */

#endif /* FV_COORD_STAGING_H */
