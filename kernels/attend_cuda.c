/*
 * attend_cuda.c - the step's attention on the GPU: items are staged and become runs, runs a line; one launch a geometry.
 *
 * Decode path: station 7 of 10. Before: worker/step.c. After: lean_plan_cuda.c cuts the line, lean_cuda.cu executes.
 *
 * The plan is arithmetic on the host: a run for each (item, block of rows), some ns each (lean_cuda.h). Items of one
 * geometry (how K and V are stored, head dims, how many rows a KV head has) share a launch, so a step of one model is
 * one launch for decode and one for prefill. Items of many rows go to the prefill kernel where it has their geometry
 * (prefill_plan_cuda.c).
 *
 * S2: each head has a list of its own. A run takes neighbours whose lists are as long and differ in the pattern's number
 * alone, which is most of them: strided blocks of two heads differ by one at most. With a pattern for each query head, each
 * is a head of a run, and rows of the page table are shared.
 */
#include "kernels/fp8.h"
#include "kernels/latent_cuda.h"
#include "kernels/lean_cuda_launch.h"
#include "kernels/stage_cuda.h"

#include <math.h>
#include <string.h>

#define LOG2E          1.44269504088896340736F
#define LINE_TILES_MAX ((uint64_t)1 << 31)

static int32_t item_kind(const fv_attn_item_t *item)
{
    if (item->kv_dtype == (int32_t)FV_DTYPE_F32) {
        return FV_LEAN_F32_WIDE;
    }
    if (item->kv_dtype == (int32_t)FV_DTYPE_FP8_LATENT) {
        return FV_LATENT_FP8;
    }
    if (item->kv_dtype == (int32_t)FV_DTYPE_BF16) {
        return FV_LEAN_BF16;
    }
    return (item->io_dtype == (int32_t)FV_DTYPE_F16) ? FV_LEAN_F16 : FV_LEAN_F16_WIDE;
}

/* Heads of an item's page table row: 1, or a KV head's query heads where each has a pattern. */
static int32_t row_heads(const fv_attn_item_t *item)
{
    return fv_policy_splits_group(&item->policy) ? item->group : 1;
}

/* Rows of a head of a run for each token. */
static int32_t head_group(const fv_attn_item_t *item)
{
    return item->group / row_heads(item);
}

/* Parts of 16 bits that Q is split into for the tensor cores. */
static int32_t q_parts(const fv_attn_item_t *item, int32_t kind)
{
    if (item->io_dtype == (int32_t)FV_DTYPE_F32) {
        return 3;
    }
    return ((item->io_dtype == (int32_t)FV_DTYPE_F16) && (kind != (int32_t)FV_LEAN_F16)) ? 2 : 1;
}

/*
 * Warps along rows. Not as many as there are rows for where shared memory has no room for Q and a ring; or more, which
 * join no sums and so need no room for that.
 */
static int32_t
row_warps(const fv_backend_t *backend, const fv_lean_geometry_t *g, int32_t n_q_parts)
{
    static const int32_t k_others[] = {2, 1, 4};
    fv_lean_geometry_t other = *g;

    for (size_t i = 0; !fv_lean_plan_fits(backend, &other, n_q_parts); i++) {
        if (i == sizeof(k_others) / sizeof(k_others[0])) {
            return g->m_warps; /* none fits: it will be refused */
        }
        other.m_warps = k_others[i];
    }
    return other.m_warps;
}

fv_lean_geometry_t fv_cuda_item_geometry(const fv_backend_t *backend, const fv_attn_item_t *item)
{
    int64_t n_rows = (int64_t)item->n_tokens * head_group(item);
    fv_lean_geometry_t g = {
        .kind = item_kind(item), .head_dim_qk = item->head_dim_qk, .head_dim_v = item->head_dim_v};

    if (item->v_in_k) {
        g.latent = backend->has_sm90 ? fv_latent_choose(item) : (int32_t)FV_LATENT_ANY;
        g.m_warps = 4;
        return g;
    }
    g.m_warps = (n_rows <= 16) ? 1 : ((n_rows <= 32) ? 2 : 4);
    if ((g.kind == (int32_t)FV_LEAN_F32_WIDE) && (g.m_warps == 4) &&
        ((g.head_dim_qk > 128) || (g.head_dim_v > 128))) {
        g.m_warps = 2; /* shared memory: 64 rows of Q in three parts leave no ring */
    }
    g.m_warps = row_warps(backend, &g, q_parts(item, g.kind));
    return g;
}

bool fv_cuda_attend_fits(const fv_backend_t *backend, const fv_attn_item_t *item)
{
    const fv_lean_geometry_t g = fv_cuda_item_geometry(backend, item);

    return (g.latent != (int32_t)FV_LATENT_NONE) ||
           fv_lean_plan_fits(backend, &g, q_parts(item, g.kind));
}

fv_status_t fv_cuda_check_attend(const fv_backend_t *backend, const fv_attn_item_t *item)
{
    if (fv_cuda_attend_fits(backend, item)) {
        return FV_OK;
    }
    return fv_fail(
        FV_ERR_UNIMPLEMENTED,
        "kv_dtype, head_dim_qk, head_dim_v: given %s, %d, %d and tensors of %s, which do not fit into this GPU's "
        "shared memory: expected a KV dtype of 2 bytes, or at most 192 dims",
        fv_dtype_str(item->kv_dtype), item->head_dim_qk, item->head_dim_v,
        fv_dtype_str(item->io_dtype));
}

static bool same_geometry(const fv_lean_geometry_t *a, const fv_lean_geometry_t *b)
{
    return (a->kind == b->kind) && (a->m_warps == b->m_warps) &&
           (a->head_dim_qk == b->head_dim_qk) && (a->head_dim_v == b->head_dim_v) &&
           (a->latent == b->latent);
}

/* Rows of one run: 16 for each warp along rows. */
static int32_t run_rows(const fv_lean_geometry_t *g)
{
    return (g->latent != (int32_t)FV_LATENT_NONE) ? fv_latent_rows(g->latent) : (16 * g->m_warps);
}

/* At most. */
static size_t item_runs(const fv_backend_t *backend, const fv_attn_item_t *item)
{
    const fv_lean_geometry_t g = fv_cuda_item_geometry(backend, item);
    const uint64_t n_rows = (uint64_t)item->n_tokens * (uint64_t)head_group(item);
    const int32_t n_heads = (item->policy.kind == FV_POLICY_S2)
                                ? (item->n_kv_heads * row_heads(item))
                                : 1; /* they share every run */

    return fv_div_up(n_rows, (uint64_t)run_rows(&g)) * (size_t)n_heads;
}

static fv_tile_query_t rows_query(const fv_attn_item_t *item, int32_t row_begin, int32_t n_rows)
{
    const int32_t group = head_group(item);

    return fv_cuda_tokens_query(item, row_begin / group, (row_begin + n_rows - 1) / group + 1);
}

/*
 * The pages that any row of the item reads: local pages [a_begin, a_end) and [b_begin, b_end). S2: all up to the last one,
 * of which each head reads its own.
 */
fv_tile_list_t fv_cuda_item_pages(const fv_attn_item_t *item)
{
    fv_tile_query_t query = fv_cuda_tokens_query(item, 0, item->n_tokens);
    fv_tile_list_t list = fv_tiles_make(&query);

    if (item->policy.kind == FV_POLICY_S2) {
        list = (fv_tile_list_t){.b_end = list.b_end};
    }
    return list;
}

void fv_cuda_set_scale(const fv_attn_item_t *item, fv_lean_run_t *run)
{
    run->score_scale = item->softmax_scale * LOG2E;
    if (item->logit_softcap > 0.0F) {
        run->score_scale = LOG2E;
        run->cap_inner = item->softmax_scale / item->logit_softcap;
        run->cap_outer = item->logit_softcap;
    }
}

static bool same_list(const fv_tile_list_t *a, const fv_tile_list_t *b)
{
    return (a->a_begin == b->a_begin) && (a->a_end == b->a_end) && (a->b_begin == b->b_begin) &&
           (a->b_end == b->b_end);
}

/* A run of the item's heads from `head` on: its query's rows are set, the rest is the item's. Takes as many as are alike. */
static void set_heads(const fv_attn_item_t *item, int32_t head, fv_lean_run_t *run)
{
    const fv_policy_t *policy = &item->policy;
    const int32_t each = row_heads(item);
    const int32_t n_heads = item->n_kv_heads * each;
    fv_tile_query_t next = run->query;

    run->query.head =
        fv_policy_head(policy, item->kv_head_begin + head / each, item->group, head % each);
    run->head_step = ((policy->kind == FV_POLICY_S2) && (policy->homo_head == 0)) ? 1 : 0;
    run->tiles = fv_tiles_make(&run->query);
    run->n_kv_heads = n_heads - head;
    for (int32_t i = 1; (run->head_step != 0) && (i < run->n_kv_heads); i++) {
        next.head = run->query.head + i;
        const fv_tile_list_t list = fv_tiles_make(&next);

        if ((fv_policy_is_dense(policy, next.head) !=
             fv_policy_is_dense(policy, run->query.head)) ||
            !same_list(&list, &run->tiles)) {
            run->n_kv_heads = i;
        }
    }
}

/* Where the heads of a run from the item's `head` on find their pages and rows; `all` is from the item's first on. */
static void
set_places(const fv_attn_item_t *item, int32_t head, const fv_lean_run_t *all, fv_lean_run_t *run)
{
    const int32_t each = row_heads(item);
    const size_t q_head = (size_t)(head * head_group(item));

    run->table_group = each;
    run->table_head = head % each;
    run->q_head = (int32_t)q_head;
    run->n_q_heads = item->n_kv_heads * item->group;
    run->pages = all->pages + (size_t)(head / each) * (size_t)all->pages_stride;
    run->q = all->q + q_head * all->q_head_bytes;
    if (item->n_dst == 0) {
        run->out = all->out + q_head * all->out_head_bytes;
        run->lse = (all->lse == NULL) ? NULL : (all->lse + q_head);
    }
}

/* The runs of one block of rows join the draft; `all` is the item's. */
static fv_status_t plan_rows(fv_backend_t *backend,
                             const fv_attn_item_t *item,
                             const fv_lean_run_t *all,
                             fv_lean_draft_t *draft)
{
    const int32_t n_heads = item->n_kv_heads * row_heads(item);

    for (int32_t head = 0; head < n_heads;) {
        fv_lean_run_t *run = &backend->runs[draft->n_runs++];

        *run = *all;
        set_heads(item, head, run);
        set_places(item, head, all, run);
        run->n_tiles = fv_tiles_count(&run->tiles);
        run->is_empty = (run->n_tiles == 0);
        run->n_tiles = run->is_empty ? 1 : run->n_tiles; /* somebody must write its empty result */
        run->line_begin = (uint32_t)draft->n_tiles;
        draft->n_tiles += (uint64_t)run->n_tiles * (uint64_t)run->n_kv_heads;
        if (draft->n_tiles >= LINE_TILES_MAX) {
            return fv_fail(FV_ERR_INVALID_ARG, "kernels: step: given more than %llu tiles",
                           (unsigned long long)LINE_TILES_MAX);
        }
        head += run->n_kv_heads;
    }
    draft->rows_max = (all->n_rows > draft->rows_max) ? all->n_rows : draft->rows_max;
    return FV_OK;
}

/* The item's runs join the draft. */
static fv_status_t
plan_item(fv_backend_t *backend, const fv_attn_item_t *item, fv_lean_draft_t *draft)
{
    const int32_t n_rows = item->n_tokens * head_group(item);
    const int32_t rows_max = run_rows(&draft->geometry);
    const fv_tile_list_t pages = fv_cuda_item_pages(item);
    fv_lean_run_t run;

    memset(&run, 0, sizeof(run));
    FV_RETURN_IF_ERR(fv_cuda_stage_item(backend, item, &pages, &run));
    fv_cuda_set_scale(item, &run);
    run.position = item->position;
    run.group = head_group(item);
    run.io_dtype = item->io_dtype;
    run.n_q_parts = q_parts(item, draft->geometry.kind);
    for (int32_t row = 0; row < n_rows; row += rows_max) {
        run.row_begin = row;
        run.n_rows = (n_rows - row < rows_max) ? (n_rows - row) : rows_max;
        run.query = rows_query(item, row, run.n_rows);
        FV_RETURN_IF_ERR(plan_rows(backend, item, &run, draft));
    }
    draft->n_q_parts = (run.n_q_parts > draft->n_q_parts) ? run.n_q_parts : draft->n_q_parts;
    return FV_OK;
}

/* All items from `first` on with its geometry, which no draft has yet. */
static fv_status_t
plan_geometry(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items, size_t first)
{
    fv_lean_draft_t draft = {.geometry = fv_cuda_item_geometry(backend, &items[first])};
    size_t runs_max = 0;

    for (size_t i = first; i < n_items; i++) {
        const fv_lean_geometry_t g = fv_cuda_item_geometry(backend, &items[i]);

        runs_max += ((backend->is_planned[i] == 0) && same_geometry(&g, &draft.geometry))
                        ? item_runs(backend, &items[i])
                        : 0U;
    }
    FV_RETURN_IF_ERR(fv_cuda_grow((void **)&backend->runs, &backend->runs_max, runs_max,
                                  sizeof(*backend->runs)));
    for (size_t i = first; i < n_items; i++) {
        const fv_lean_geometry_t g = fv_cuda_item_geometry(backend, &items[i]);

        if ((backend->is_planned[i] == 0) && same_geometry(&g, &draft.geometry)) {
            FV_RETURN_IF_ERR(plan_item(backend, &items[i], &draft));
            backend->is_planned[i] = 1;
        }
    }
    draft.runs = fv_cuda_stage(backend, draft.n_runs * sizeof(*backend->runs));
    memcpy(fv_cuda_on_host(backend, draft.runs), backend->runs,
           draft.n_runs * sizeof(*backend->runs));
    return fv_lean_plan(backend, &draft);
}

/* Everything of the step into the staging area and the outbox, launches into backend->launches. */
static fv_status_t plan_all(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items)
{
    memset(backend->is_planned, 0, n_items);
    backend->n_launches = 0;
    FV_RETURN_IF_ERR(fv_prefill_plan(backend, items, n_items)); /* what is left goes the lean way */
    for (size_t i = 0; i < n_items; i++) {
        if (backend->is_planned[i] == 0) {
            FV_RETURN_IF_ERR(plan_geometry(backend, items, n_items, i));
        }
    }
    fv_lean_plan_finish(backend);
    return FV_OK;
}

fv_status_t fv_cuda_attend_plan(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items)
{
    size_t n_bytes = 0;
    fv_lean_geometry_t last = {0};

    for (size_t i = 0; i < n_items; i++) {
        FV_RETURN_IF_ERR(fv_cpu_check_attend(&items[i]));
        if (items[i].scores != NULL) {
            return fv_fail(FV_ERR_UNIMPLEMENTED, "cuda backend: scores: given some, expected none");
        }
        if (items[i].v_in_k && (((items[i].q_head_bytes | items[i].rope_gap_bytes) % 16U) != 0)) {
            return fv_fail(
                FV_ERR_INVALID_ARG,
                "cuda backend: q_head_bytes, rope_gap_bytes: given %llu, %llu, expected multiples of 16",
                (unsigned long long)items[i].q_head_bytes,
                (unsigned long long)items[i].rope_gap_bytes);
        }
        const fv_lean_geometry_t g = fv_cuda_item_geometry(backend, &items[i]);
        const fv_tile_list_t pages = fv_cuda_item_pages(&items[i]);

        /* the lean runs take more than the prefill kernel's blocks would */
        n_bytes += fv_cuda_item_bytes(backend, &items[i], &pages) +
                   FV_CUDA_STAGE_BYTES(item_runs(backend, &items[i]) * sizeof(fv_lean_run_t)) +
                   2U * FV_CUDA_STAGE_BYTES(1);
        /* a launch each; those that come back to an earlier geometry are counted again */
        n_bytes += ((i == 0) || !same_geometry(&g, &last)) ? fv_lean_plan_stage_bytes(backend) : 0U;
        last = g;
    }
    FV_RETURN_IF_ERR(fv_cuda_reserve(backend, n_bytes));
    FV_RETURN_IF_ERR(fv_cuda_grow((void **)&backend->is_planned, &backend->items_max, n_items, 1));
    fv_table_cache_begin(backend->tables);
    const fv_cuda_outbox_mark_t mark = fv_cuda_outbox_mark(backend);
    const fv_status_t status = plan_all(backend, items, n_items);

    if (status != FV_OK) { /* nothing of this call will be read or written */
        fv_cuda_outbox_back(backend, &mark);
        fv_table_cache_undo(backend->tables);
        return status;
    }
    return fv_cuda_flush(backend);
}

fv_status_t
fv_cuda_attend_start(fv_backend_t *backend, const fv_lean_launch_t *launches, size_t n_launches)
{
    for (size_t i = 0; i < n_launches; i++) {
        FV_RETURN_IF_ERR(FV_CUDA((launches[i].latent != (int32_t)FV_LATENT_NONE)
                                     ? fv_latent_cuda_launch(&launches[i], backend->stream)
                                     : fv_lean_cuda_launch(&launches[i], backend->stream)));
    }
    return FV_OK;
}

fv_status_t fv_cuda_attend(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items)
{
    if (n_items == 0) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_cuda_attend_plan(backend, items, n_items));
    FV_RETURN_IF_ERR(fv_cuda_attend_start(backend, backend->launches, backend->n_launches));
    return fv_prefill_start(backend);
}
