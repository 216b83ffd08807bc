/*
 * kv_pool.h - host bookkeeping of the KV arena: which page is free, which is held, by how many.
 *
 * The arena's memory belongs to the backend (kernels.h); the pool only deals out references into it.
 *
 *   arena   | slab 0      | slab 1      | slab 2      | ...        slab_bytes each, a power of two
 *   slab    | page | page | page | rest |                          all pages of one size: its class
 *
 * A slab belongs to one class (page size) while one of its pages is held, and goes back to the free slabs
 * with the last of them; so models with different page sizes share one arena, and what a class can still get is
 *     n_pages_free[class] + n_slabs_free * (slab_bytes / page_bytes).
 * Pages are reference-counted: forks share them. Every operation is O(1) and none but create allocates.
 *
 * Thread: the owner's; no locks.
 */
#ifndef FV_WORKER_KV_POOL_H
#define FV_WORKER_KV_POOL_H

#include "common/status.h"
#include "kernels/kernels.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FV_KV_SLAB_BYTES       ((size_t)1 << 20) /* default: 8 pages of 128 KiB */
#define FV_KV_PAGE_BYTES_MIN   4096U             /* 16 + 16 dims of 2 bytes, 64 tokens */
#define FV_KV_PAGE_BYTES_MAX   294912U /* a latent's 1024 + 128 dims of 4 bytes, 64 tokens */
#define FV_KV_SLAB_BYTES_MIN   131072U /* holds the largest page but those of the widest latents */
#define FV_KV_POOL_CLASSES_MAX 64U

typedef struct fv_kv_pool fv_kv_pool_t;

/* Plain figures for status output and logs. */
typedef struct fv_kv_pool_stats {
    uint64_t bytes_total; /* whole slabs only */
    uint64_t bytes_free;  /* free slabs, and free pages of slabs in use */
    uint64_t bytes_lost;  /* ends of slabs in use that hold no whole page */
    uint64_t table_bytes; /* host memory of this bookkeeping */
    size_t slab_bytes;
    uint32_t n_slabs, n_slabs_free;
    uint32_t n_classes;
    uint64_t n_pages_held; /* distinct pages, however many share them */
} fv_kv_pool_stats_t;

/*
 * slab_bytes: a power of two of at least FV_KV_SLAB_BYTES_MIN, or 0: the default, smaller for arenas of less than
 * four default slabs.
 * Errors: FV_ERR_INVALID_ARG for an arena without room for one slab or too large for 32-bit page references;
 *         FV_ERR_NO_MEMORY.
 */
FV_MUST_CHECK fv_status_t fv_kv_pool_create(size_t arena_bytes,
                                            size_t slab_bytes,
                                            fv_kv_pool_t **out);
void fv_kv_pool_destroy(fv_kv_pool_t *pool); /* NULL is fine */

/*
 * The class of a page size, made on first use.
 * Errors: FV_ERR_INVALID_ARG for a size outside the limits, larger than a slab, or no multiple of FV_PAGE_UNIT;
 *         FV_ERR_EXHAUSTED when there are FV_KV_POOL_CLASSES_MAX others.
 */
FV_MUST_CHECK fv_status_t fv_kv_pool_class(fv_kv_pool_t *pool,
                                           size_t page_bytes,
                                           uint32_t *out_class);

/* True when n pages of a class can be taken now: then as many fv_kv_pool_take() succeed. */
bool fv_kv_pool_has(const fv_kv_pool_t *pool, uint32_t page_class, uint64_t n);

/* One page with one reference; FV_PAGE_NONE when there is none. */
fv_page_ref_t fv_kv_pool_take(fv_kv_pool_t *pool, uint32_t page_class);

/* All or nothing. Errors: FV_ERR_EXHAUSTED with the bytes needed and free. */
FV_MUST_CHECK fv_status_t fv_kv_pool_alloc(fv_kv_pool_t *pool,
                                           uint32_t page_class,
                                           size_t n,
                                           fv_page_ref_t *out);

/* `page` must be held. unref of the last reference frees it. pool NULL: tables that nobody counts yet (store.h). */
void fv_kv_pool_ref(fv_kv_pool_t *pool, fv_page_ref_t page);
void fv_kv_pool_unref(fv_kv_pool_t *pool, fv_page_ref_t page);
uint32_t fv_kv_pool_refs(const fv_kv_pool_t *pool, fv_page_ref_t page); /* 0: free */

/*
 * An empty pool made as one was whose tables are known: one adopt for each entry of a table (the second one of a page is a
 * reference more), then adopt_end; nothing else in between. check: whether adopt would do.
 * Errors: FV_ERR_DATA_LOSS for what can not be a page of the class.
 */
FV_MUST_CHECK fv_status_t fv_kv_pool_check(const fv_kv_pool_t *pool,
                                           uint32_t page_class,
                                           fv_page_ref_t page);
void fv_kv_pool_adopt(fv_kv_pool_t *pool, uint32_t page_class, fv_page_ref_t page);
void fv_kv_pool_adopt_end(fv_kv_pool_t *pool);

/* Slabs from the first one on that were ever used: the next new one is the one behind them. */
uint32_t fv_kv_pool_slabs_seen(const fv_kv_pool_t *pool);

uint64_t fv_kv_pool_bytes_free(const fv_kv_pool_t *pool);
uint32_t fv_kv_pool_pages_free(const fv_kv_pool_t *pool, uint32_t page_class); /* in used slabs */
void fv_kv_pool_stats(const fv_kv_pool_t *pool, fv_kv_pool_stats_t *out);

#endif /* FV_WORKER_KV_POOL_H */
