/*
 * attend_mask_cpu.c - tiles that some row sees only in part.
 *
 * Decode path: station 7 of 10. Before: attend_cpu.c. After: attend_cpu.c.
 *
 * A masked score is -inf, so its weight is 0; but 0 * NaN is NaN, so a masked V must not be multiplied at all.
 * Slots that hold no token are multiplied as zeros, from a clean copy. A token that only some rows see is
 * harmless while it is finite; when V holds NaN or inf the tile takes the careful way, row by row.
 */
#include "kernels/backend_cpu.h"
#include "kernels/page_layout.h"

#include <math.h>
#include <string.h>

/* Slots of a tile that a row sees: [0, sink), [begin, end), and before `begin` the strided ones. */
typedef struct slot_range {
    int32_t sink, begin, end;
    uint32_t strided; /* quarters */
} slot_range_t;

static bool is_strided(const slot_range_t *slots, int32_t slot)
{
    return ((slots->strided >> ((uint32_t)slot / FV_S2_BLOCK_MIN)) & 1U) != 0U;
}

static int32_t to_slot(int64_t token, const fv_tile_t *tile)
{
    return (int32_t)fv_max64(0, fv_min64(token - tile->begin, tile->n_tokens));
}

static slot_range_t row_slots(const fv_tile_query_t *query, const fv_tile_t *tile, int64_t position)
{
    fv_row_range_t row = fv_row_range(query, position);
    slot_range_t slots;

    slots.sink = to_slot(row.sink, tile);
    slots.begin = to_slot(row.begin, tile);
    slots.end = to_slot(row.end, tile);
    slots.strided = tile->strided;
    return slots;
}

void fv_cpu_mask_scores(fv_tile_block_t *block,
                        const fv_tile_query_t *query,
                        const fv_tile_t *tile,
                        int32_t group)
{
    for (int32_t r = 0; r < block->n_rows; r += group) {
        slot_range_t slots = row_slots(query, tile, query->q_begin + r / group);

        for (int32_t g = 0; g < group; g++) {
            float *s = block->s + (size_t)(r + g) * FV_PAGE_TOKENS;

            for (int32_t j = slots.sink; j < slots.begin; j++) {
                s[j] = is_strided(&slots, j) ? s[j] : -INFINITY;
            }
            for (int32_t j = slots.end; j < FV_PAGE_TOKENS; j++) {
                s[j] = -INFINITY;
            }
        }
    }
}

/* Zeroes slots [n_tokens, P) of V in bf16: whole pairs, and the second half of a pair that an odd count cuts. */
static void zero_bf16_slots(uint8_t *v, size_t dv, size_t n_tokens)
{
    uint16_t *out = (uint16_t *)(void *)v;
    size_t n_pairs = (n_tokens + 1U) / 2U;

    for (size_t pair = 0; pair < FV_PAGE_TOKENS / 2U; pair += FV_TILE_PAIRS) {
        size_t kept = (n_pairs > pair) ? fv_page_min(n_pairs - pair, FV_TILE_PAIRS) : 0U;

        for (size_t column = 0; column < dv; column += FV_TILE_COLUMNS) {
            size_t width = fv_piece_columns(dv, column, FV_TILE_COLUMNS);
            uint16_t *tile = out + fv_tile_offset(FV_PAGE_TOKENS, dv, pair, column);

            memset(tile + kept * width * 2U, 0, (FV_TILE_PAIRS - kept) * width * 4U);
        }
    }
    for (size_t d = 0; ((n_tokens % 2U) != 0U) && (d < dv); d++) {
        out[fv_page_index(FV_DTYPE_BF16, FV_PAGE_TOKENS, dv, n_tokens, d)] = 0;
    }
}

const uint8_t *fv_cpu_clean_v(fv_tile_block_t *block, const fv_tile_t *tile, const uint8_t *v)
{
    size_t dv = (size_t)block->head_dim_v;
    size_t e = fv_dtype_bytes(block->kv_dtype);
    size_t n_tokens = (size_t)tile->n_tokens;

    if (n_tokens == FV_PAGE_TOKENS) {
        return v;
    }
    if (v != block->v_clean) { /* V out of a latent page is a copy already */
        memcpy(block->v_clean, v, dv * FV_PAGE_TOKENS * e);
    }
    if (block->kv_dtype == FV_DTYPE_BF16) {
        zero_bf16_slots(block->v_clean, dv, n_tokens);
        return block->v_clean;
    }
    for (size_t column = 0; column < dv; column += FV_PANEL_COLUMNS) {
        size_t width = fv_piece_columns(dv, column, FV_PANEL_COLUMNS);

        memset(block->v_clean + (column * FV_PAGE_TOKENS + n_tokens * width) * e, 0,
               (FV_PAGE_TOKENS - n_tokens) * width * e);
    }
    return block->v_clean;
}

/* An exponent of all ones is inf or NaN. */
bool fv_cpu_is_finite_v(const fv_tile_block_t *block, const uint8_t *v)
{
    size_t n_elems = (size_t)block->head_dim_v * FV_PAGE_TOKENS;
    const uint16_t *halves = (const uint16_t *)(const void *)v;
    const uint32_t *words = (const uint32_t *)(const void *)v;
    uint16_t exponent = (block->kv_dtype == FV_DTYPE_BF16) ? 0x7f80U : 0x7c00U;
    unsigned n_bad = 0;

    if (block->kv_dtype == FV_DTYPE_F32) {
        for (size_t i = 0; i < n_elems; i++) {
            n_bad += ((words[i] & 0x7f800000U) == 0x7f800000U) ? 1U : 0U;
        }
        return n_bad == 0U;
    }
    for (size_t i = 0; i < n_elems; i++) {
        n_bad += ((halves[i] & exponent) == exponent) ? 1U : 0U;
    }
    return n_bad == 0U;
}

/* o += p * V[j] */
static void add_token(const fv_tile_block_t *block, const uint8_t *v, size_t j, float p, float *o)
{
    size_t dv = (size_t)block->head_dim_v;

    for (size_t d = 0; d < dv; d++) {
        size_t i = fv_page_index(block->kv_dtype, FV_PAGE_TOKENS, dv, j, d);

        o[d] += p * fv_load_element(v, block->kv_dtype, i);
    }
}

void fv_cpu_accumulate_seen(fv_tile_block_t *block,
                            const fv_tile_query_t *query,
                            const fv_tile_t *tile,
                            int32_t group,
                            const uint8_t *v)
{
    for (int32_t r = 0; r < block->n_rows; r++) {
        slot_range_t slots = row_slots(query, tile, query->q_begin + r / group);
        const float *p = block->s + (size_t)r * FV_PAGE_TOKENS;
        float *o = block->o + (size_t)r * (size_t)block->o_stride;

        for (int32_t d = 0; d < block->head_dim_v; d++) {
            o[d] *= block->alpha[r];
        }
        for (int32_t j = 0; j < tile->n_tokens; j++) {
            if ((j < slots.sink) || ((j >= slots.begin) && (j < slots.end)) ||
                ((j < slots.begin) && is_strided(&slots, j))) {
                add_token(block, v, (size_t)j, p[j], o);
            }
        }
    }
}
