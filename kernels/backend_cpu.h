/*
 * backend_cpu.h - what the files of the CPU backend share. Private to kernels/.
 */
#ifndef FV_KERNELS_BACKEND_CPU_H
#define FV_KERNELS_BACKEND_CPU_H

#include "kernels/kernels.h"
#include "kernels/lean.h"
#include "kernels/pool.h"
#include "kernels/tile.h"

#include <stdatomic.h>

/* A piece of a cut group, unnormalised: O [rows, o_stride], m and l [rows]. */
typedef struct fv_cpu_slot {
    float *o, *m, *l;
} fv_cpu_slot_t;

struct fv_backend {
    fv_isa_t isa;
    int32_t n_threads;
    fv_pool_t *pool;
    uint8_t
        *arena; /* kv_arena_bytes, and readable a little beyond (tile_simd.h reads whole vectors) */
    size_t kv_arena_bytes;
    size_t arena_map_bytes;

    uint8_t *workspace; /* blocks and slots; fixed at create */
    size_t workspace_bytes;
    fv_tile_block_t *blocks; /* [n_threads], pointers into workspace */
    fv_cpu_slot_t *slots;    /* [2 * n_shares_max] */
    int32_t n_shares_max;
    atomic_int
        *arrived; /* [n_shares_max]: pieces done of the cut group that begins in this share */

    fv_lean_group_t *groups; /* grows to the largest step seen, never shrinks */
    size_t groups_max;

    /* The step under way. */
    const fv_attn_item_t *items;
    fv_lean_line_t line;
    bool is_scoring; /* scores() rather than attend() */
    atomic_int next_share;
    atomic_bool bad_page; /* a page reference outside the arena was met (and not read) */
};

/* check_cpu.c. Errors: FV_ERR_INVALID_ARG naming the field. */
FV_MUST_CHECK fv_status_t fv_cpu_check_append(const fv_append_item_t *item);
FV_MUST_CHECK fv_status_t fv_cpu_check_attend(const fv_attn_item_t *item);
FV_MUST_CHECK fv_status_t fv_cpu_check_merge(const fv_merge_item_t *item);
FV_MUST_CHECK fv_status_t fv_cpu_check_copy(const fv_page_copy_t *copy);

/* A page, or NULL when the reference does not lie in the arena. */
static inline uint8_t *
fv_cpu_page(const fv_backend_t *backend, fv_page_ref_t ref, size_t page_bytes)
{
    size_t offset = (size_t)ref * FV_PAGE_UNIT;

    if ((offset >= backend->kv_arena_bytes) || (backend->kv_arena_bytes - offset < page_bytes)) {
        return NULL;
    }
    return backend->arena + offset;
}

/* The operations, one file each: <name>_cpu.c. */
fv_status_t fv_cpu_append(fv_backend_t *backend, const fv_append_item_t *items, size_t n_items);
fv_status_t fv_cpu_copy_pages(fv_backend_t *backend, const fv_page_copy_t *copies, size_t n_copies);
fv_status_t fv_cpu_attend(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items);
uint64_t fv_cpu_score_count(const fv_attn_item_t *item);
fv_status_t fv_cpu_scores(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items);
fv_status_t fv_cpu_merge(fv_backend_t *backend,
                         const fv_merge_item_t *items,
                         size_t n_items,
                         const fv_merge_sync_t *sync);
fv_status_t fv_cpu_empty(fv_backend_t *backend, float *lse_log2, uint64_t n_rows);

/*
 * attend_mask_cpu.c: tiles that some row does not see wholly, or that are not full of tokens. `group` is the rows of
 * one query token. clean_v returns V itself, or a copy whose unused slots are zero.
 */
void fv_cpu_mask_scores(fv_tile_block_t *block,
                        const fv_tile_query_t *query,
                        const fv_tile_t *tile,
                        int32_t group);
const uint8_t *fv_cpu_clean_v(fv_tile_block_t *block, const fv_tile_t *tile, const uint8_t *v);
bool fv_cpu_is_finite_v(const fv_tile_block_t *block, const uint8_t *v);
void fv_cpu_accumulate_seen(fv_tile_block_t *block,
                            const fv_tile_query_t *query,
                            const fv_tile_t *tile,
                            int32_t group,
                            const uint8_t *v);

/* attend_out_cpu.c: where a finished row goes. */
void fv_cpu_write_rows(const fv_attn_item_t *item,
                       const fv_lean_group_t *group,
                       const fv_tile_block_t *block);
void fv_cpu_write_empty(const fv_attn_item_t *item, const fv_lean_group_t *group);

#endif /* FV_KERNELS_BACKEND_CPU_H */
