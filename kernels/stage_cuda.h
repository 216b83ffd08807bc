/*
 * stage_cuda.h - what an item of attend() reads and writes, brought where the device reaches it. Private to kernels/.
 */
#ifndef FV_KERNELS_STAGE_CUDA_H
#define FV_KERNELS_STAGE_CUDA_H

#include "kernels/backend_cuda.h"

/* What tokens [t_begin, t_end) of an item read, of S2 the first pattern's. */
static inline fv_tile_query_t
fv_cuda_tokens_query(const fv_attn_item_t *item, int32_t t_begin, int32_t t_end)
{
    const fv_tile_query_t query = {
        .policy = item->policy,
        .shard = item->shard,
        .q_begin = item->position + t_begin,
        .q_end = item->position + t_end,
        .kv_end = item->kv_end,
        .head = fv_policy_head(&item->policy, item->kv_head_begin, item->group, 0),
        .causal = item->causal};

    return query;
}

/* Staging bytes of an item's pages, query and results, at most. `pages`: all tiles that its rows read. */
size_t fv_cuda_item_bytes(const fv_backend_t *backend,
                          const fv_attn_item_t *item,
                          const fv_tile_list_t *pages);

/* Page table, query and results of an item: fills the run's pointers and strides. Errors: FV_ERR_INVALID_ARG, memory. */
FV_MUST_CHECK fv_status_t fv_cuda_stage_item(fv_backend_t *backend,
                                             const fv_attn_item_t *item,
                                             const fv_tile_list_t *pages,
                                             fv_lean_run_t *run);

/* attend_cuda.c: the pages that any row of an item may read, as lists of local pages; the run's scale and softcap. */
fv_tile_list_t fv_cuda_item_pages(const fv_attn_item_t *item);
void fv_cuda_set_scale(const fv_attn_item_t *item, fv_lean_run_t *run);

#endif /* FV_KERNELS_STAGE_CUDA_H */
