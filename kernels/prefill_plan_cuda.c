/*
 * prefill_plan_cuda.c - which items the prefill kernel takes, and its launches: items become blocks of rows, longest first.
 *
 * Station 7 of 10. Before: attend_cuda.c. After: prefill_cuda.cu (executes). Items that are left go the lean way.
 *
 * The rule, in one place: the code is sm_90's, the kernel has the item's dtypes and head dims, a head has
 * more than ROWS_MIN rows, and all such items of the step with one geometry make at least prefill_units_min units. Below,
 * the lean kernel is faster although its products are slower: it cuts lines of tiles over all SMs.
 */
#include "kernels/backend_cuda.h"
#include "kernels/stage_cuda.h"

#include <stdlib.h>
#include <string.h>

#define ROWS_MIN 64
/* This kernel's tanh errs by 2^-22 of the cap, not of the score: fine for caps that cap, not for caps meant as none. */
#define SOFTCAP_MAX 256.0F
#define L2_BYTES \
    ((uint64_t)24 << 20) /* of K and V that are read together, at most: half of the L2 */
/*
 * Of the SMs. A unit's SM does 4.9 TFLOP/s; the lean kernel does 88 with all of them, so 18 units are where both are even
 * on 132 SMs (bench/results/prefill_cuda_h100.md). Blocks that are not full want some more.
 */
#define UNITS_PERCENT 25

/* What items of one launch have in common. Heads: KV heads, of S2 with a pattern for each query head those. */
typedef struct geometry {
    int32_t dtype, head_dim_qk, head_dim_v, n_heads;
} geometry_t;

/* An item's blocks while the launch is put together: those that are left, last first. */
typedef struct source {
    uint32_t run;
    int32_t next; /* row_begin of the longest that is left; < 0: none */
    int32_t n_tiles;
} source_t;

void fv_prefill_plan_init(fv_backend_t *backend)
{
    backend->prefill_units_min = ((uint32_t)backend->n_sms * UNITS_PERCENT + 99U) / 100U;
}

/* Heads with a list of their own for each KV head, and rows of one for each token. */
static int32_t heads_each(const fv_attn_item_t *item)
{
    return fv_policy_splits_group(&item->policy) ? item->group : 1;
}

static int32_t rows_each(const fv_attn_item_t *item)
{
    return item->group / heads_each(item);
}

static bool is_eligible(const fv_attn_item_t *item)
{
    return (item->logit_softcap <= SOFTCAP_MAX) && (item->io_dtype == item->kv_dtype) &&
           !item->v_in_k && (item->softmax_scale > 0.0F) &&
           ((int64_t)item->n_tokens * rows_each(item) > ROWS_MIN) &&
           fv_prefill_cuda_has(item->kv_dtype, item->head_dim_qk, item->head_dim_v);
}

static geometry_t geometry_of(const fv_attn_item_t *item)
{
    return (geometry_t){item->kv_dtype, item->head_dim_qk, item->head_dim_v,
                        item->n_kv_heads * heads_each(item)};
}

static bool is_wanted(const fv_backend_t *backend,
                      const fv_attn_item_t *items,
                      size_t i,
                      const geometry_t *geometry)
{
    const geometry_t g = geometry_of(&items[i]);

    return (backend->is_planned[i] == 0) && is_eligible(&items[i]) &&
           (memcmp(&g, geometry, sizeof(g)) == 0);
}

static uint32_t item_blocks(const fv_attn_item_t *item)
{
    return (uint32_t)fv_div_up((uint64_t)item->n_tokens * (uint64_t)rows_each(item),
                               FV_PREFILL_ROWS);
}

/* Tiles of a block of the run's item, of its first head. */
static int32_t block_tiles(const fv_lean_run_t *run, int32_t row_begin)
{
    const int32_t left = run->n_rows - row_begin;
    const int32_t n_rows = (left < FV_PREFILL_ROWS) ? left : FV_PREFILL_ROWS;
    fv_tile_query_t query = run->query;
    fv_tile_list_t list;

    query.q_begin = run->position + row_begin / run->group;
    query.q_end = run->position + (row_begin + n_rows - 1) / run->group + 1;
    list = fv_tiles_make(&query);
    return fv_tiles_count(&list);
}

static fv_status_t plan_run(fv_backend_t *backend, const fv_attn_item_t *item, fv_lean_run_t *run)
{
    const fv_tile_list_t pages = fv_cuda_item_pages(item);

    memset(run, 0, sizeof(*run));
    FV_RETURN_IF_ERR(fv_cuda_stage_item(backend, item, &pages, run));
    fv_cuda_set_scale(item, run);
    run->query = fv_cuda_tokens_query(item, 0, item->n_tokens);
    run->head_step = ((item->policy.kind == FV_POLICY_S2) && (item->policy.homo_head == 0)) ? 1 : 0;
    run->table_group = heads_each(item);
    run->n_kv_heads = item->n_kv_heads * heads_each(item);
    run->group = rows_each(item);
    run->n_q_heads = item->n_kv_heads * item->group;
    run->position = item->position;
    run->io_dtype = item->io_dtype;
    run->n_q_parts = 1;
    run->n_rows = item->n_tokens * run->group;
    return FV_OK;
}

/*
 * Blocks in the order in which they are claimed: always the longest of those that are next in their items. Within an item
 * the later rows of a causal mask see more.
 */
static void order_blocks(const fv_lean_run_t *runs,
                         source_t *sources,
                         uint32_t n_sources,
                         fv_prefill_block_t *blocks,
                         uint32_t n_blocks)
{
    for (uint32_t b = 0; b < n_blocks; b++) {
        uint32_t best = 0;

        for (uint32_t i = 1; i < n_sources; i++) {
            if (sources[i].n_tiles > sources[best].n_tiles) {
                best = i;
            }
        }
        source_t *from = &sources[best];

        blocks[b] = (fv_prefill_block_t){.run = from->run, .row_begin = from->next};
        from->next -= FV_PREFILL_ROWS;
        from->n_tiles = (from->next < 0) ? -1 : block_tiles(&runs[from->run], from->next);
    }
}

/* The most heads, a divisor of all, whose K and V of all items stay in L2 while their units are done. */
static uint32_t heads_together(const geometry_t *g, int64_t tokens)
{
    const uint64_t head_bytes = (uint64_t)tokens * (uint64_t)(g->head_dim_qk + g->head_dim_v) *
                                fv_dtype_bytes((fv_dtype_t)g->dtype);
    uint32_t n = (uint32_t)g->n_heads;

    while ((n > 1U) &&
           (((uint32_t)g->n_heads % n != 0U) || ((uint64_t)n * head_bytes > L2_BYTES))) {
        n--;
    }
    return n;
}

static fv_status_t add_launch(fv_backend_t *backend, const fv_prefill_launch_t *launch)
{
    FV_RETURN_IF_ERR(fv_cuda_grow((void **)&backend->prefills, &backend->prefills_max,
                                  backend->n_prefills + 1U, sizeof(*backend->prefills)));
    backend->prefills[backend->n_prefills++] = *launch;
    return FV_OK;
}

/* All items from `first` on with its geometry; n_items of them, n_blocks in all. */
static fv_status_t plan_launch(fv_backend_t *backend,
                               const fv_attn_item_t *items,
                               size_t n_items,
                               size_t first,
                               uint32_t n_wanted,
                               uint32_t n_blocks)
{
    const geometry_t g = geometry_of(&items[first]);
    const size_t runs_at = fv_cuda_stage(backend, n_wanted * sizeof(fv_lean_run_t));
    const size_t blocks_at = fv_cuda_stage(backend, n_blocks * sizeof(fv_prefill_block_t));
    fv_lean_run_t *runs = fv_cuda_on_host(backend, runs_at);
    fv_prefill_launch_t launch = {.arena = backend->arena,
                                  .runs = fv_cuda_on_device(backend, runs_at),
                                  .blocks = fv_cuda_on_device(backend, blocks_at),
                                  .claimed = backend->arrived + backend->shares_max,
                                  .n_blocks = n_blocks,
                                  .n_units = n_blocks * (uint32_t)g.n_heads,
                                  .n_heads = (uint32_t)g.n_heads,
                                  .head_dim_qk = g.head_dim_qk,
                                  .head_dim_v = g.head_dim_v,
                                  .kv_dtype = g.dtype};
    int64_t tokens = 0;
    uint32_t n = 0;

    FV_RETURN_IF_ERR(fv_cuda_grow((void **)&backend->prefill_sources, &backend->prefill_sources_max,
                                  n_wanted, sizeof(source_t)));
    source_t *sources = backend->prefill_sources;

    for (size_t i = first; i < n_items; i++) {
        if (!is_wanted(backend, items, i, &g)) {
            continue;
        }
        FV_RETURN_IF_ERR(plan_run(backend, &items[i], &runs[n]));
        sources[n].run = n;
        sources[n].next = (int32_t)(item_blocks(&items[i]) - 1U) * FV_PREFILL_ROWS;
        sources[n].n_tiles = block_tiles(&runs[n], sources[n].next);
        tokens += items[i].kv_end;
        backend->is_planned[i] = 1;
        n++;
    }
    order_blocks(runs, sources, n, fv_cuda_on_host(backend, blocks_at), n_blocks);
    launch.heads_each = heads_together(&g, tokens);
    launch.n_ctas =
        (launch.n_units < (uint32_t)backend->n_sms) ? launch.n_units : (uint32_t)backend->n_sms;
    return add_launch(backend, &launch);
}

fv_status_t fv_prefill_plan(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items)
{
    backend->n_prefills = 0;
    for (size_t i = 0; backend->has_sm90 && (i < n_items); i++) {
        const geometry_t g = geometry_of(&items[i]);
        uint32_t n_wanted = 0;
        uint32_t n_blocks = 0;

        if ((backend->is_planned[i] != 0) || !is_eligible(&items[i])) {
            continue;
        }
        for (size_t j = i; j < n_items; j++) {
            if (is_wanted(backend, items, j, &g)) {
                n_wanted++;
                n_blocks += item_blocks(&items[j]);
            }
        }
        if ((uint64_t)n_blocks * (uint64_t)g.n_heads >= backend->prefill_units_min) {
            FV_RETURN_IF_ERR(plan_launch(backend, items, n_items, i, n_wanted, n_blocks));
        }
    }
    return FV_OK;
}

fv_status_t fv_prefill_start(fv_backend_t *backend)
{
    for (size_t i = 0; i < backend->n_prefills; i++) {
        FV_RETURN_IF_ERR(FV_CUDA(fv_prefill_cuda_launch(&backend->prefills[i], backend->stream)));
    }
    return FV_OK;
}

void fv_prefill_plan_free(fv_backend_t *backend)
{
    free(backend->prefills);
    free(backend->prefill_sources);
}
