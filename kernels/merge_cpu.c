/*
 * merge_cpu.c - partial states of rows whose KV spans ranks become results. The formula is in kernels.h.
 *
 * Decode path: station 8 of 10. Before: worker/exchange_*.c. After: worker/step.c.
 *
 * NaN: max() may drop a NaN lse, but its weight 2^(NaN - m) is NaN and takes the row with it.
 */
#include "kernels/backend_cpu.h"

#include <math.h>
#include <string.h>

#define ROWS_PER_UNIT      64U
#define PARALLEL_ELEMS_MIN 65536U

typedef struct merge_step {
    const fv_merge_item_t *items;
    uint64_t n_units;
    atomic_ullong next_unit;
} merge_step_t;

static uint64_t item_units(const fv_merge_item_t *item)
{
    return fv_div_up(item->n_rows, ROWS_PER_UNIT);
}

static void merge_row(const fv_merge_item_t *item, uint64_t i)
{
    size_t dv = (size_t)item->head_dim_v;
    uint64_t row = item->row_base + i;
    size_t head_bytes = (item->out_head_bytes != 0U)
                            ? item->out_head_bytes
                            : (dv * fv_dtype_bytes((fv_dtype_t)item->io_dtype));
    float o[FV_DIM_V_MAX];
    float m = -INFINITY;
    float sum = 0.0F;
    float inverse = 0.0F;

    memset(o, 0, dv * sizeof(o[0]));
    for (int32_t s = 0; s < item->n_parts; s++) {
        m = (item->lse_log2[s][i] > m) ? item->lse_log2[s][i] : m;
    }
    for (int32_t s = 0; s < item->n_parts; s++) {
        float lse = item->lse_log2[s][i];
        float weight = exp2f(lse - m);

        if (lse == -INFINITY) {
            continue; /* its o may be anything */
        }
        sum += weight;
        for (size_t d = 0; d < dv; d++) {
            o[d] += weight * item->o[s][i * dv + d];
        }
    }
    inverse = (sum == 0.0F) ? 0.0F : (1.0F / sum); /* 0: only empty parts */
    for (size_t d = 0; d < dv; d++) {
        o[d] *= inverse;
    }
    fv_store_row((uint8_t *)item->out + (row / item->row_len) * item->out_token_bytes +
                     (row % item->row_len) * head_bytes,
                 (fv_dtype_t)item->io_dtype, o, dv);
    if (item->lse != NULL) {
        item->lse[(row / item->row_len) * item->lse_token_stride + row % item->row_len] =
            (m + log2f(sum)) * FV_LN2;
    }
}

static void merge_thread(void *ctx, int32_t thread_idx)
{
    merge_step_t *step = ctx;

    (void)thread_idx;
    for (;;) {
        uint64_t unit = atomic_fetch_add_explicit(&step->next_unit, 1U, memory_order_relaxed);
        const fv_merge_item_t *item = step->items;

        if (unit >= step->n_units) {
            return;
        }
        while (unit >= item_units(item)) {
            unit -= item_units(item);
            item++;
        }
        for (uint64_t i = unit * ROWS_PER_UNIT;
             (i < item->n_rows) && (i < (unit + 1U) * ROWS_PER_UNIT); i++) {
            merge_row(item, i);
        }
    }
}

fv_status_t fv_cpu_empty(fv_backend_t *backend, float *lse_log2, uint64_t n_rows)
{
    (void)backend;
    for (uint64_t i = 0; i < n_rows; i++) {
        lse_log2[i] = -INFINITY;
    }
    return FV_OK;
}

fv_status_t fv_cpu_merge(fv_backend_t *backend,
                         const fv_merge_item_t *items,
                         size_t n_items,
                         const fv_merge_sync_t *sync)
{
    merge_step_t step;
    uint64_t n_elems = 0;

    if (sync != NULL) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "kernels: merge: given pairs to wait for, expected none");
    }
    step.items = items;
    step.n_units = 0;
    atomic_init(&step.next_unit, 0U);
    for (size_t i = 0; i < n_items; i++) {
        FV_RETURN_IF_ERR(fv_cpu_check_merge(&items[i]));
        step.n_units += item_units(&items[i]);
        n_elems += items[i].n_rows * (uint64_t)items[i].n_parts * (uint64_t)items[i].head_dim_v;
    }
    if (n_elems < PARALLEL_ELEMS_MIN) {
        merge_thread(&step, 0);
    } else {
        fv_pool_run(backend->pool, merge_thread, &step);
    }
    return FV_OK;
}
