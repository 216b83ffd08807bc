/*
 * attend_cpu.c - the step's attention: the line of tiles is laid out, cut into shares, and walked.
 *
 * Decode path: station 7 of 10. Before: worker/step.c. After: attend_out_cpu.c, then worker/exchange_*.c.
 *
 * Planning (lean.h) runs on the caller; shares are then claimed by the pool's threads. Cuts do not depend on who
 * claims what, so neither does the result. Memory: per thread one block (tile.h) and per share two slots, all from create();
 * the table of groups grows to the largest step seen.
 */
#include "kernels/backend_cpu.h"
#include "kernels/page_layout.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PRIME_EVERY    4096U /* bytes: the hardware's streams end at every page of memory */
#define PRIME_BYTES    512U  /* of each are asked for ahead; the hardware then fetches the rest */
#define SHARE_COST_MIN 2000U /* ns; less is not worth waking a thread for */

/* Query heads of a KV head that walk together: those with the same pattern. */
static int32_t walk_heads(const fv_attn_item_t *item)
{
    return fv_policy_splits_group(&item->policy) ? 1 : item->group;
}

static int32_t block_tokens(const fv_attn_item_t *item)
{
    int32_t n_heads = walk_heads(item);

    return (n_heads >= FV_BLOCK_ROWS) ? 1 : (FV_BLOCK_ROWS / n_heads);
}

static fv_tile_query_t group_query(const fv_attn_item_t *item, const fv_lean_group_t *group)
{
    fv_tile_query_t query;

    query.policy = item->policy;
    query.shard = item->shard;
    query.q_begin = item->position + group->t_begin;
    query.q_end = item->position + group->t_end;
    query.kv_end = item->kv_end;
    query.head = fv_policy_head(&item->policy, item->kv_head_begin + group->kv_head, item->group,
                                group->g_begin);
    query.causal = item->causal;
    return query;
}

/* ns, roughly: what one tile streams and what its rows compute. */
static uint32_t tile_cost(const fv_backend_t *backend, const fv_attn_item_t *item, int32_t n_rows)
{
    const fv_tile_ops_t *ops =
        fv_isa_ops(&backend->isa, item->head_dim_qk, item->head_dim_v, item->kv_dtype);
    size_t n_elems = (size_t)(item->head_dim_qk + item->head_dim_v) * FV_PAGE_TOKENS;
    size_t bytes = fv_page_bytes((fv_dtype_t)item->kv_dtype, item->head_dim_qk, item->head_dim_v,
                                 item->v_in_k);

    return (uint32_t)(1U + bytes / 8U + n_elems * (size_t)n_rows / (size_t)ops->macs_per_ns);
}

static fv_status_t
reserve_groups(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items)
{
    size_t n_groups = 0;
    fv_lean_group_t *grown = NULL;

    for (size_t i = 0; i < n_items; i++) {
        FV_RETURN_IF_ERR(fv_cpu_check_attend(&items[i]));
        n_groups += (size_t)items[i].n_kv_heads * (size_t)(items[i].group / walk_heads(&items[i])) *
                    fv_div_up((uint64_t)items[i].n_tokens, (uint64_t)block_tokens(&items[i]));
    }
    if (n_groups <= backend->groups_max) {
        return FV_OK;
    }
    grown = realloc(backend->groups, n_groups * sizeof(*grown));
    if (grown == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "cpu backend: no memory for a step of %zu row groups",
                       n_groups);
    }
    backend->groups = grown;
    backend->groups_max = n_groups;
    return FV_OK;
}

static int32_t group_rows(const fv_lean_group_t *group)
{
    return (group->t_end - group->t_begin) * (group->g_end - group->g_begin);
}

static uint64_t group_scores(const fv_lean_group_t *group)
{
    return (uint64_t)group->n_tiles * (uint64_t)group_rows(group) * FV_PAGE_TOKENS;
}

uint64_t fv_cpu_score_count(const fv_attn_item_t *item)
{
    uint64_t n = 0;
    int32_t step = block_tokens(item);

    for (int32_t g = 0; g < item->group; g += walk_heads(item)) {
        for (int32_t t = 0; t < item->n_tokens; t += step) {
            fv_lean_group_t group = {.t_begin = t,
                                     .t_end =
                                         (item->n_tokens - t < step) ? item->n_tokens : (t + step),
                                     .g_begin = g,
                                     .g_end = g + walk_heads(item)};
            fv_tile_query_t query = group_query(item, &group);

            group.tiles = fv_tiles_make(&query);
            group.n_tiles = fv_tiles_count(&group.tiles);
            n += group_scores(&group);
        }
    }
    return n * (uint64_t)item->n_kv_heads;
}

/* The group's tiles join the line; rows without any are answered at once. */
static fv_status_t
plan_group(fv_backend_t *backend, const fv_attn_item_t *item, fv_lean_group_t *group)
{
    fv_lean_line_t *line = &backend->line;
    fv_tile_query_t query = group_query(item, group);

    group->tiles = fv_tiles_make(&query);
    group->n_tiles = fv_tiles_count(&group->tiles);
    if (group->n_tiles == 0) {
        if (!backend->is_scoring) {
            fv_cpu_write_empty(item, group);
        }
        return FV_OK;
    }
    if (item->pages == NULL) {
        return fv_fail(FV_ERR_INVALID_ARG, "kernels: pages: given none, expected %d of KV head %d",
                       group->n_tiles, group->kv_head);
    }
    group->cost_begin = line->cost;
    group->tile_cost = tile_cost(backend, item, group_rows(group));
    line->cost += (uint64_t)group->tile_cost * (uint64_t)group->n_tiles;
    line->n_groups++;
    return FV_OK;
}

/* Appends the groups of one item to the line. */
static fv_status_t plan_item(fv_backend_t *backend, uint32_t item_idx)
{
    const fv_attn_item_t *item = &backend->items[item_idx];
    int32_t step = block_tokens(item);
    int32_t n_heads = walk_heads(item);
    uint64_t n_scores = 0;

    for (int32_t h = 0; h < item->n_kv_heads; h++) {
        for (int32_t g = 0; g < item->group; g += n_heads) {
            for (int32_t t = 0; t < item->n_tokens; t += step) {
                fv_lean_group_t *group = &backend->groups[backend->line.n_groups];

                group->item_idx = item_idx;
                group->kv_head = h;
                group->t_begin = t;
                group->t_end = (item->n_tokens - t < step) ? item->n_tokens : (t + step);
                group->g_begin = g;
                group->g_end = g + n_heads;
                group->score_begin = n_scores;
                FV_RETURN_IF_ERR(plan_group(backend, item, group));
                n_scores += group_scores(group);
            }
        }
    }
    return FV_OK;
}

/* The queries of one token, in fp32. */
static void load_token(float *q, const fv_attn_item_t *item, int32_t n_heads, const uint8_t *token)
{
    fv_dtype_t io = (fv_dtype_t)item->io_dtype;
    size_t e = fv_dtype_bytes(io);
    size_t dk = (size_t)item->head_dim_qk;
    size_t dv = (size_t)item->head_dim_v;

    if ((item->q_head_bytes == 0U) && (item->rope_gap_bytes == 0U)) {
        fv_load_row(q, token, io, dk * (size_t)n_heads);
        return;
    }
    for (int32_t g = 0; g < n_heads; g++) {
        fv_load_row(q, token, io, dv);
        fv_load_row(q + dv, token + dv * e + item->rope_gap_bytes, io, dk - dv);
        q += dk;
        token += item->q_head_bytes;
    }
}

/* mu on the query's latent dims; the products are no longer exact in fewer bf16 parts than fp32 needs. */
static void weigh_latent(fv_tile_block_t *block, float mu)
{
    for (int32_t r = 0; r < block->n_rows; r++) {
        float *q = block->q + (size_t)r * (size_t)block->head_dim_qk;

        for (int32_t d = 0; d < block->head_dim_v; d++) {
            q[d] *= mu;
        }
    }
    block->n_q_planes = FV_Q_PLANES_MAX;
}

/* Another rank's scores have the RoPE key's part. */
static void drop_rope(fv_tile_block_t *block)
{
    size_t dk = (size_t)block->head_dim_qk;
    size_t dv = (size_t)block->head_dim_v;

    for (size_t r = 0; r < (size_t)block->n_rows; r++) {
        memset(block->q + r * dk + dv, 0, (dk - dv) * sizeof(float));
    }
}

static void
load_block(fv_tile_block_t *block, const fv_attn_item_t *item, const fv_lean_group_t *group)
{
    size_t dk = (size_t)item->head_dim_qk;
    size_t head_bytes = (item->q_head_bytes != 0U)
                            ? item->q_head_bytes
                            : (dk * fv_dtype_bytes((fv_dtype_t)item->io_dtype));
    int32_t n_heads = group->g_end - group->g_begin;
    float *q = block->q;

    block->n_rows = (group->t_end - group->t_begin) * n_heads;
    block->head_dim_qk = item->head_dim_qk;
    block->head_dim_v = item->head_dim_v;
    block->v_in_k = item->v_in_k;
    block->o_stride = (int32_t)fv_align_up((size_t)item->head_dim_v, 16U);
    block->kv_dtype = (item->kv_dtype == (int32_t)FV_DTYPE_FP8_LATENT)
                          ? FV_DTYPE_F32 /* as the tiles see it */
                          : (fv_dtype_t)item->kv_dtype;
    block->n_q_planes = (item->io_dtype == (int32_t)FV_DTYPE_BF16)  ? 1
                        : (item->io_dtype == (int32_t)FV_DTYPE_F16) ? 2
                                                                    : FV_Q_PLANES_MAX;
    block->score_scale = item->softmax_scale * FV_LOG2E;
    if (item->logit_softcap > 0.0F) {
        block->score_scale = FV_LOG2E;
        block->cap_inner = item->softmax_scale / item->logit_softcap;
        block->cap_outer = item->logit_softcap;
    }
    for (int32_t t = group->t_begin; t < group->t_end; t++) {
        const uint8_t *token = (const uint8_t *)item->q + (size_t)t * item->q_token_bytes +
                               (size_t)(group->kv_head * item->group + group->g_begin) * head_bytes;

        load_token(q, item, n_heads, token);
        q += dk * (size_t)n_heads;
    }
    if ((item->latent_mu != 0.0F) && (item->latent_mu != 1.0F)) {
        weigh_latent(block, item->latent_mu);
    }
    if (item->without_rope) {
        drop_rope(block);
    }
    memset(block->o, 0, (size_t)block->n_rows * (size_t)block->o_stride * sizeof(float));
    for (int32_t r = 0; r < block->n_rows; r++) {
        block->m[r] = -INFINITY;
        block->l[r] = 0.0F;
    }
}

/*
 * Starts the streams of a matrix that is needed next, while the core computes. Asking for every line would be slower:
 * such requests wait in the core's few line buffers, the hardware's own do not.
 */
static void prime_streams(const uint8_t *matrix, size_t n_bytes)
{
    for (size_t i = 0; i < n_bytes; i += PRIME_EVERY) {
        for (size_t j = 0; j < PRIME_BYTES; j += 64U) {
            __builtin_prefetch(matrix + i + j, 0, 3);
        }
    }
}

/*
 * V of the page: already on its way to the core when the softmax asks for it. A latent page holds none, it is made from
 * K, which has just been read.
 */
static const uint8_t *fetch_v(const fv_tile_ops_t *ops, fv_tile_block_t *block, const uint8_t *page)
{
    const uint8_t *v = page + fv_page_v_offset(block->kv_dtype, block->head_dim_qk);

    if (block->v_in_k) {
        ops->latent_v(block, page);
        return block->v_clean;
    }
    prime_streams(
        v, fv_page_v_offset(block->kv_dtype, block->head_dim_v)); /* [P, dv], as K is [dk, P] */
    return v;
}

static void attend_tile(const fv_tile_ops_t *ops,
                        fv_tile_block_t *block,
                        const fv_attn_item_t *item,
                        int32_t n_heads,
                        const fv_tile_query_t *query,
                        const fv_tile_t *tile,
                        const uint8_t *page,
                        const float *scores)
{
    const uint8_t *v = NULL;
    bool whole = tile->n_tokens == FV_PAGE_TOKENS;

    if (scores == NULL) {
        ops->scores(block, page);
    } else {
        memcpy(block->s, scores, (size_t)block->n_rows * FV_PAGE_TOKENS * sizeof(float));
    }
    v = fetch_v(ops, block, page);
    if (item->logit_softcap > 0.0F) {
        ops->softcap(block);
    }
    if (whole && tile->full) {
        ops->softmax(block);
        if (block->next_page != NULL) {
            prime_streams(block->next_page, block->next_bytes);
        }
        ops->accumulate(block, v);
        return;
    }
    fv_cpu_mask_scores(block, query, tile, n_heads);
    ops->softmax(block);
    v = fv_cpu_clean_v(block, tile, v);
    if (!tile->full && !fv_cpu_is_finite_v(block, v)) {
        fv_cpu_accumulate_seen(block, query, tile, n_heads, v);
        return;
    }
    ops->accumulate(block, v);
}

/* Where the scores of a group's i-th tile are. */
static float *tile_scores(const fv_attn_item_t *item, const fv_lean_group_t *group, int32_t i)
{
    return item->scores + group->score_begin +
           (size_t)i * (size_t)group_rows(group) * FV_PAGE_TOKENS;
}

/* Tiles [begin, end) of a group into `block`, from the empty state; scoring: into the item's scores. */
static void attend_piece(fv_backend_t *backend,
                         fv_tile_block_t *block,
                         const fv_lean_group_t *group,
                         fv_lean_piece_t piece)
{
    const fv_attn_item_t *item = &backend->items[group->item_idx];
    const fv_tile_ops_t *ops =
        fv_isa_ops(&backend->isa, item->head_dim_qk, item->head_dim_v, item->kv_dtype);
    const fv_page_ref_t *pages = item->pages + (size_t)group->kv_head * item->pages_head_stride;
    size_t page_bytes = fv_page_bytes((fv_dtype_t)item->kv_dtype, item->head_dim_qk,
                                      item->head_dim_v, item->v_in_k);
    fv_tile_query_t query = group_query(item, group);

    load_block(block, item, group);
    block->next_bytes =
        item->v_in_k ? page_bytes : fv_page_v_offset(block->kv_dtype, block->head_dim_qk);
    if (ops->begin != NULL) {
        ops->begin(block);
    }
    for (int32_t i = piece.begin; i < piece.end; i++) {
        fv_tile_t tile = fv_tile_at(&query, &group->tiles, i);
        const uint8_t *page = fv_cpu_page(backend, pages[tile.local_page], page_bytes);

        if (page == NULL) {
            atomic_store_explicit(&backend->bad_page, true, memory_order_relaxed);
            continue;
        }
        if (item->kv_dtype == (int32_t)FV_DTYPE_FP8_LATENT) {
            ops->widen_fp8(page, item->head_dim_qk, item->head_dim_v, block->unpacked);
            page = (const uint8_t *)block->unpacked;
        }
        block->next_page = NULL;
        if (i + 1 < piece.end) {
            fv_tile_t next = fv_tile_at(&query, &group->tiles, i + 1);
            block->next_page = fv_cpu_page(backend, pages[next.local_page], page_bytes);
        }
        float *scores = (item->scores == NULL) ? NULL : tile_scores(item, group, i);
        if (backend->is_scoring) {
            ops->scores(block, page);
            memcpy(scores, block->s, (size_t)block->n_rows * FV_PAGE_TOKENS * sizeof(float));
            continue;
        }
        attend_tile(ops, block, item, group->g_end - group->g_begin, &query, &tile, page, scores);
    }
    if (ops->end != NULL) {
        ops->end();
    }
}

/* State a = merge(a, b), unnormalised. */
static void merge_slot(const fv_tile_block_t *block, fv_cpu_slot_t *a, const fv_cpu_slot_t *b)
{
    for (int32_t r = 0; r < block->n_rows; r++) {
        size_t at = (size_t)r * (size_t)block->o_stride;
        float m = (b->m[r] > a->m[r]) ? b->m[r] : a->m[r];
        float base = (m == -INFINITY) ? 0.0F : m;
        float weight_a = exp2f(a->m[r] - base);
        float weight_b = exp2f(b->m[r] - base);

        for (int32_t d = 0; d < block->head_dim_v; d++) {
            a->o[at + (size_t)d] =
                weight_a * a->o[at + (size_t)d] + weight_b * b->o[at + (size_t)d];
        }
        a->l[r] = weight_a * a->l[r] + weight_b * b->l[r];
        a->m[r] = m;
    }
}

/* A share's slot for its piece of a cut group: 0 for a piece that goes on from the share before. */
static fv_cpu_slot_t *piece_slot(fv_backend_t *backend, int32_t share, fv_lean_piece_t piece)
{
    return &backend->slots[2 * share + ((piece.begin == 0) ? 1 : 0)];
}

/* One more piece of a cut group is done; the last to arrive merges all of them, first tile first. */
static void
finish_piece(fv_backend_t *backend, fv_tile_block_t *block, const fv_lean_group_t *group)
{
    const fv_lean_line_t *line = &backend->line;
    int32_t first = fv_lean_share_of(line, group, 0);
    int32_t last = fv_lean_share_of(line, group, group->n_tiles - 1);
    int32_t n_pieces = 0;
    fv_cpu_slot_t *sum = NULL;

    for (int32_t share = first; share <= last; share++) {
        fv_lean_piece_t piece = fv_lean_piece(line, group, share);
        n_pieces += (piece.begin < piece.end) ? 1 : 0;
    }
    /* acq_rel: the last one sees what the others wrote to their slots */
    if (atomic_fetch_add_explicit(&backend->arrived[first], 1, memory_order_acq_rel) + 1 !=
        n_pieces) {
        return;
    }
    for (int32_t share = first; share <= last; share++) {
        fv_lean_piece_t piece = fv_lean_piece(line, group, share);
        fv_cpu_slot_t *slot = piece_slot(backend, share, piece);

        if (piece.begin >= piece.end) {
            continue;
        }
        if (sum == NULL) {
            sum = slot;
        } else {
            merge_slot(block, sum, slot);
        }
    }
    FV_ASSERT(sum != NULL);
    block->o = sum->o;
    block->m = sum->m;
    block->l = sum->l;
    fv_cpu_write_rows(&backend->items[group->item_idx], group, block);
}

static void attend_share(fv_backend_t *backend, int32_t thread_idx, int32_t share)
{
    const fv_lean_line_t *line = &backend->line;
    uint64_t end = fv_lean_share_begin(line, share + 1);

    for (uint64_t g = fv_lean_first_group(line, share);
         (g < line->n_groups) && (line->groups[g].cost_begin < end); g++) {
        const fv_lean_group_t *group = &line->groups[g];
        fv_lean_piece_t piece = fv_lean_piece(line, group, share);
        fv_tile_block_t block = backend->blocks[thread_idx];
        bool whole = (piece.begin == 0) && (piece.end == group->n_tiles);

        if (piece.begin >= piece.end) {
            continue;
        }
        if (!whole) {
            fv_cpu_slot_t *slot = piece_slot(backend, share, piece);
            block.o = slot->o;
            block.m = slot->m;
            block.l = slot->l;
        }
        attend_piece(backend, &block, group, piece);
        if (backend->is_scoring) {
            continue;
        }
        if (whole) {
            fv_cpu_write_rows(&backend->items[group->item_idx], group, &block);
        } else {
            finish_piece(backend, &block, group);
        }
    }
}

static void attend_thread(void *ctx, int32_t thread_idx)
{
    fv_backend_t *backend = ctx;

    for (;;) {
        int32_t share = atomic_fetch_add_explicit(&backend->next_share, 1, memory_order_relaxed);

        if (share >= backend->line.n_shares) {
            return;
        }
        attend_share(backend, thread_idx, share);
    }
}

static fv_status_t walk_line(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items)
{
    fv_lean_line_t *line = &backend->line;

    FV_RETURN_IF_ERR(reserve_groups(backend, items, n_items));
    backend->items = items;
    line->groups = backend->groups;
    line->n_groups = 0;
    line->cost = 0;
    for (size_t i = 0; i < n_items; i++) {
        FV_RETURN_IF_ERR(plan_item(backend, (uint32_t)i));
    }
    if (line->n_groups == 0) {
        return FV_OK;
    }
    line->n_shares =
        (int32_t)fv_min64(backend->n_shares_max, (int64_t)fv_div_up(line->cost, SHARE_COST_MIN));
    for (int32_t i = 0; i < line->n_shares; i++) {
        atomic_store_explicit(&backend->arrived[i], 0, memory_order_relaxed);
    }
    atomic_store_explicit(&backend->next_share, 0, memory_order_relaxed);
    atomic_store_explicit(&backend->bad_page, false, memory_order_relaxed);
    if (line->n_shares == 1) {
        attend_thread(backend, 0);
    } else {
        fv_pool_run(backend->pool, attend_thread, backend);
    }
    if (atomic_load_explicit(&backend->bad_page, memory_order_relaxed)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "kernels: pages: a reference lies outside the arena of %zu bytes",
                       backend->kv_arena_bytes);
    }
    return FV_OK;
}

fv_status_t fv_cpu_attend(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items)
{
    backend->is_scoring = false;
    return walk_line(backend, items, n_items);
}

fv_status_t fv_cpu_scores(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items)
{
    for (size_t i = 0; i < n_items; i++) {
        if ((items[i].scores == NULL) || !items[i].v_in_k) {
            return fv_fail(FV_ERR_INVALID_ARG,
                           "kernels: scores: given none, or an item without v_in_k");
        }
    }
    backend->is_scoring = true;
    return walk_line(backend, items, n_items);
}
