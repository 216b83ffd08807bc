/*
 * append_cpu.c - new K and V into pages, and whole pages for copy on write.
 *
 * Decode path: station 6 of 10. Before: worker/step.c. After: attend_cpu.c.
 *
 * One unit of work is one (item, KV head): its pages are its own, so units never meet. K is stored transposed
 * (page_layout.h), so a token's K is a column: its writes are scattered over the page, which a cache line's
 * neighbours (the next tokens) pay back when many tokens come at once.
 */
#include "kernels/backend_cpu.h"
#include "kernels/fp8.h"
#include "kernels/norm.h"
#include "kernels/page_layout.h"

#include <math.h>
#include <string.h>

#define PARALLEL_ELEMS_MIN 65536U /* below, one thread is done before the others are awake */

typedef struct append_step {
    fv_backend_t *backend;
    const fv_append_item_t *items;
    size_t n_items;
    uint64_t n_units;
    atomic_ullong next_unit;
} append_step_t;

static void put(uint8_t *matrix, fv_dtype_t dtype, size_t i, float value)
{
    uint16_t half = 0;

    if (dtype == FV_DTYPE_F32) {
        memcpy(matrix + 4U * i, &value, sizeof(value));
        return;
    }
    half = (dtype == FV_DTYPE_BF16) ? fv_f32_to_bf16(value) : fv_f32_to_f16(value);
    memcpy(matrix + 2U * i, &half, sizeof(half));
}

/* Dims [0, n) of a latent, normalised. Squares are added in the order of a warp, so that every backend stores the same bits. */
static void normalise(const fv_append_item_t *item, float *row, size_t n)
{
    float sums[FV_NORM_LANES] = {0.0F};
    float factor = 0.0F;

    for (size_t d = 0; d < n; d++) {
        sums[d / FV_NORM_DIMS % FV_NORM_LANES] += row[d] * row[d];
    }
    for (size_t half = FV_NORM_LANES / 2U; half > 0U; half /= 2U) {
        for (size_t lane = 0; lane < half; lane++) {
            sums[lane] += sums[lane + half];
        }
    }
    factor = 1.0F / sqrtf(item->norm_alpha * (sums[0] / (float)n) + item->norm_eps);
    for (size_t d = 0; d < n; d++) {
        row[d] *= factor;
    }
}

static void
append_token(const fv_append_item_t *item, int32_t head, uint64_t t, uint8_t *page, size_t slot)
{
    size_t dk = (size_t)item->head_dim_qk;
    size_t dv = (size_t)item->head_dim_v;
    fv_dtype_t kv = (fv_dtype_t)item->kv_dtype;
    fv_dtype_t src = (fv_dtype_t)item->src_dtype;
    size_t e = fv_dtype_bytes(src);
    const uint8_t *k = (const uint8_t *)item->k + t * item->k_token_bytes +
                       (size_t)head * (dk * e + item->rope_gap_bytes);
    uint8_t *page_v = page + fv_page_v_offset(kv, item->head_dim_qk);
    float row[FV_DIM_QK_MAX];

    if (item->rope_gap_bytes == 0U) {
        fv_load_row(row, k, src, dk);
    } else {
        fv_load_row(row, k, src, dv);
        fv_load_row(row + dv, k + dv * e + item->rope_gap_bytes, src, dk - dv);
    }
    if (item->norm_alpha > 0.0F) {
        normalise(item, row, dv);
    }
    if (kv == FV_DTYPE_FP8_LATENT) {
        fv_fp8_put(page, item->head_dim_qk, item->head_dim_v, slot, row);
        return;
    }
    for (size_t d = 0; d < dk; d++) {
        put(page, kv, fv_page_index(kv, dk, FV_PAGE_TOKENS, d, slot), row[d]);
    }
    if (item->v_in_k) {
        return;
    }
    const uint8_t *v = (const uint8_t *)item->v + t * item->v_token_bytes + (size_t)head * dv * e;
    fv_load_row(row, v, src, dv);
    for (size_t d = 0; d < dv; d++) {
        put(page_v, kv, fv_page_index(kv, FV_PAGE_TOKENS, dv, slot, d), row[d]);
    }
}

static void append_head(fv_backend_t *backend, const fv_append_item_t *item, int32_t head)
{
    const fv_page_ref_t *pages = item->pages + (size_t)head * item->pages_head_stride;
    size_t page_bytes = fv_page_bytes((fv_dtype_t)item->kv_dtype, item->head_dim_qk,
                                      item->head_dim_v, item->v_in_k);

    if (item->src_dtype == (int32_t)FV_DTYPE_FP8_LATENT) { /* whole pages */
        for (uint64_t p = 0; p < item->n_tokens / FV_PAGE_TOKENS; p++) {
            memcpy(fv_cpu_page(backend, pages[item->local_begin / FV_PAGE_TOKENS + p], page_bytes),
                   (const uint8_t *)item->k + p * page_bytes, page_bytes);
        }
        return;
    }
    for (uint64_t t = 0; t < item->n_tokens; t++) {
        uint64_t local = item->local_begin + t;
        uint8_t *page = fv_cpu_page(backend, pages[local / FV_PAGE_TOKENS], page_bytes);

        append_token(item, head, t, page, (size_t)(local % FV_PAGE_TOKENS));
    }
}

static void append_thread(void *ctx, int32_t thread_idx)
{
    append_step_t *step = ctx;

    (void)thread_idx;
    for (;;) {
        uint64_t unit = atomic_fetch_add_explicit(&step->next_unit, 1U, memory_order_relaxed);
        const fv_append_item_t *item = step->items;

        if (unit >= step->n_units) {
            return;
        }
        while (unit >= (uint64_t)item->n_kv_heads) {
            unit -= (uint64_t)item->n_kv_heads;
            item++;
        }
        append_head(step->backend, item, (int32_t)unit);
    }
}

/* All pages are looked at before any is written: a refused append changes nothing. */
static fv_status_t check_pages(const fv_backend_t *backend, const fv_append_item_t *item)
{
    size_t page_bytes = fv_page_bytes((fv_dtype_t)item->kv_dtype, item->head_dim_qk,
                                      item->head_dim_v, item->v_in_k);
    uint64_t first = item->local_begin / FV_PAGE_TOKENS;
    uint64_t last = (item->local_begin + item->n_tokens - 1U) / FV_PAGE_TOKENS;

    for (int32_t h = 0; (item->n_tokens > 0) && (h < item->n_kv_heads); h++) {
        for (uint64_t p = first; p <= last; p++) {
            fv_page_ref_t ref = item->pages[(size_t)h * item->pages_head_stride + p];

            if (fv_cpu_page(backend, ref, page_bytes) == NULL) {
                return fv_fail(FV_ERR_INVALID_ARG,
                               "kernels: pages[head %d][%llu]: given %u, expected a page inside "
                               "the arena of %zu bytes",
                               h, (unsigned long long)p, ref, backend->kv_arena_bytes);
            }
        }
    }
    return FV_OK;
}

fv_status_t fv_cpu_append(fv_backend_t *backend, const fv_append_item_t *items, size_t n_items)
{
    append_step_t step;
    uint64_t n_elems = 0;

    step.backend = backend;
    step.items = items;
    step.n_items = n_items;
    step.n_units = 0;
    atomic_init(&step.next_unit, 0U);
    for (size_t i = 0; i < n_items; i++) {
        const fv_append_item_t *item = &items[i];

        FV_RETURN_IF_ERR(fv_cpu_check_append(item));
        FV_RETURN_IF_ERR(check_pages(backend, item));
        step.n_units += (uint64_t)item->n_kv_heads;
        n_elems += item->n_tokens * (uint64_t)item->n_kv_heads *
                   (uint64_t)(item->head_dim_qk + item->head_dim_v);
    }
    if (n_elems < PARALLEL_ELEMS_MIN) {
        append_thread(&step, 0);
    } else {
        fv_pool_run(backend->pool, append_thread, &step);
    }
    return FV_OK;
}

fv_status_t fv_cpu_copy_pages(fv_backend_t *backend, const fv_page_copy_t *copies, size_t n_copies)
{
    for (size_t i = 0; i < n_copies; i++) {
        const fv_page_copy_t *copy = &copies[i];
        size_t page_bytes = 0;
        const uint8_t *src = NULL;
        uint8_t *dst = NULL;

        FV_RETURN_IF_ERR(fv_cpu_check_copy(copy));
        page_bytes = fv_page_bytes((fv_dtype_t)copy->kv_dtype, copy->head_dim_qk, copy->head_dim_v,
                                   copy->v_in_k);
        src = fv_cpu_page(backend, copy->src, page_bytes);
        dst = fv_cpu_page(backend, copy->dst, page_bytes);
        if ((src == NULL) || (dst == NULL)) {
            return fv_fail(FV_ERR_INVALID_ARG,
                           "kernels: copy %u -> %u: expected pages inside the arena of %zu bytes",
                           copy->src, copy->dst, backend->kv_arena_bytes);
        }
        /* the slots beyond n_tokens come along: they are columns, and may hold anything anyway */
        if ((copy->n_tokens > 0) && (src != dst)) {
            memcpy(dst, src, page_bytes);
        }
    }
    return FV_OK;
}

fv_status_t fv_cpu_read_page(const fv_backend_t *backend,
                             const fv_page_copy_t *page,
                             void *k_rows,
                             void *v_rows)
{
    size_t dk = (size_t)page->head_dim_qk;
    size_t dv = (size_t)page->head_dim_v;
    fv_dtype_t kv = (fv_dtype_t)page->kv_dtype;
    size_t e = fv_dtype_bytes(kv);

    FV_RETURN_IF_ERR(fv_cpu_check_copy(page));
    size_t page_bytes = fv_page_bytes(kv, page->head_dim_qk, page->head_dim_v, page->v_in_k);
    const uint8_t *k = fv_cpu_page(backend, page->src, page_bytes);
    if (k == NULL) {
        return fv_fail(FV_ERR_INVALID_ARG, "kernels: page %u: expected one inside the arena",
                       page->src);
    }
    if (kv ==
        FV_DTYPE_FP8_LATENT) { /* it has no rows of one dtype, and on devices the same bytes */
        memcpy(k_rows, k, page_bytes);
        return FV_OK;
    }
    const uint8_t *v = k + fv_page_v_offset(kv, page->head_dim_qk);
    for (size_t slot = 0; slot < FV_PAGE_TOKENS; slot++) {
        for (size_t d = 0; d < dk; d++) {
            memcpy((uint8_t *)k_rows + (slot * dk + d) * e,
                   k + fv_page_index(kv, dk, FV_PAGE_TOKENS, d, slot) * e, e);
        }
        for (size_t d = 0; !page->v_in_k && (d < dv); d++) {
            memcpy((uint8_t *)v_rows + (slot * dv + d) * e,
                   v + fv_page_index(kv, FV_PAGE_TOKENS, dv, slot, d) * e, e);
        }
    }
    return FV_OK;
}
