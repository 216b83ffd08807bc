/*
 * table_cache.h - which page tables stand in device memory, and how much of each: bookkeeping only. Private to kernels/.
 *
 * A table is the page references of one (session, layer) on this rank: [n_heads, stride], stride a power of two, so that
 * it can grow in place. The area is dealt out in blocks of powers of two (a buddy allocator, Knuth, TAOCP 1, 2.5);
 * when none is free, the table used longest ago goes. No CUDA here: who calls fv_table_cache_use() sends what is missing.
 *
 * Thread: the owner's. Nothing allocates after create.
 */
#ifndef FV_KERNELS_TABLE_CACHE_H
#define FV_KERNELS_TABLE_CACHE_H

#include "common/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FV_TABLE_BLOCK_WORDS 64U /* the smallest block: 8 heads x 8 pages */

typedef struct fv_table_cache fv_table_cache_t;

/* Where a table stands: head h, page p at word offset + h * stride + p; [0, n_known) of each head are there already. */
typedef struct fv_table_view {
    uint32_t offset, stride, n_known;
} fv_table_view_t;

/* An area of n_words 32-bit words; of it the largest multiple of FV_TABLE_BLOCK_WORDS is used. */
FV_MUST_CHECK fv_status_t fv_table_cache_create(size_t n_words, fv_table_cache_t **out);
void fv_table_cache_destroy(fv_table_cache_t *cache); /* NULL is fine */

/* A new step: what it uses stays until the next one begins. */
void fv_table_cache_begin(fv_table_cache_t *cache);

/*
 * Table `id` in `version`, of n pages of each of n_heads, is about to be used: on true the caller sends pages
 * [out->n_known, n) of every head. Entries that were there stay as long as id and version do. False: there is no room
 * beside the tables that this step uses.
 */
bool fv_table_cache_use(fv_table_cache_t *cache,
                        uint64_t id,
                        uint64_t version,
                        uint32_t n_heads,
                        uint32_t n,
                        fv_table_view_t *out);

/* The step was given up before anything was sent: what it used is not there. */
void fv_table_cache_undo(fv_table_cache_t *cache);

/* Tables that stand there now (for tests and status). */
uint32_t fv_table_cache_count(const fv_table_cache_t *cache);

#endif /* FV_KERNELS_TABLE_CACHE_H */
