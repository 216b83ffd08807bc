/*
 * attend_out_cpu.c - finished rows leave their block: normalised, converted, and put where the item wants them.
 *
 * Decode path: station 7 of 10. Before: attend_cpu.c. After: worker/exchange (partial states), or coord's reply.
 */
#include "kernels/backend_cpu.h"

#include <math.h>
#include <string.h>

/* The partial destination that holds `row`. */
static const fv_partial_dst_t *find_dst(const fv_attn_item_t *item, uint64_t row)
{
    int32_t low = 0;
    int32_t high = item->n_dst;

    while (high - low > 1) {
        int32_t middle = low + (high - low) / 2;

        if (item->dst[middle].row_begin <= row) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return &item->dst[low];
}

/* o: [dv] normalised. */
static void
write_row(const fv_attn_item_t *item, int64_t t, int32_t h, const float *o, float lse_log2)
{
    size_t dv = (size_t)item->head_dim_v;
    size_t head_bytes = (item->out_head_bytes != 0U)
                            ? item->out_head_bytes
                            : (dv * fv_dtype_bytes((fv_dtype_t)item->io_dtype));

    if (item->n_dst > 0) {
        uint64_t row = (uint64_t)t * (uint64_t)(item->n_kv_heads * item->group) + (uint64_t)h;
        const fv_partial_dst_t *dst = find_dst(item, row);

        memcpy(dst->o + (row - dst->row_begin) * dv, o, dv * sizeof(float));
        dst->lse_log2[row - dst->row_begin] = lse_log2;
        return;
    }
    fv_store_row((uint8_t *)item->out + (size_t)t * item->out_token_bytes + (size_t)h * head_bytes,
                 (fv_dtype_t)item->io_dtype, o, dv);
    if (item->lse != NULL) {
        item->lse[(size_t)t * item->lse_token_stride + (size_t)h] = lse_log2 * FV_LN2;
    }
}

void fv_cpu_write_rows(const fv_attn_item_t *item,
                       const fv_lean_group_t *group,
                       const fv_tile_block_t *block)
{
    int32_t n_heads = group->g_end - group->g_begin;

    for (int32_t r = 0; r < block->n_rows; r++) {
        float *o = block->o + (size_t)r * (size_t)block->o_stride;
        /* l = 0 only where every score was -inf: the empty set, by whichever way it came about */
        float inverse = (block->l[r] == 0.0F) ? 0.0F : (1.0F / block->l[r]);

        for (int32_t d = 0; d < block->head_dim_v; d++) {
            o[d] *= inverse;
        }
        write_row(item, group->t_begin + r / n_heads,
                  group->kv_head * item->group + group->g_begin + r % n_heads, o,
                  block->m[r] + log2f(block->l[r]));
    }
}

void fv_cpu_write_empty(const fv_attn_item_t *item, const fv_lean_group_t *group)
{
    static const float zeros[FV_DIM_V_MAX];

    for (int64_t t = group->t_begin; t < group->t_end; t++) {
        for (int32_t g = group->g_begin; g < group->g_end; g++) {
            write_row(item, t, group->kv_head * item->group + g, zeros, -INFINITY);
        }
    }
}
