/*
 * tile_latent.c - V [P, dv] out of a latent page's K^T [dk, P], in plain C.
 *
 * Decode path: station 7 of 10. Before: attend_cpu.c (scores). After: attend_cpu.c (accumulate).
 */
#include "kernels/page_layout.h"
#include "kernels/tile.h"

/* Plain rows of P tokens -> panels of 64 dims. K^T is one panel. */
#define DEFINE_TURN(name, type)                                                 \
    static void name(type *restrict v, const type *restrict k, size_t dv)       \
    {                                                                           \
        for (size_t first = 0; first < dv; first += FV_PANEL_COLUMNS) {         \
            size_t width = fv_piece_columns(dv, first, FV_PANEL_COLUMNS);       \
            type *panel = v + first * FV_PAGE_TOKENS;                           \
            for (size_t j = 0; j < FV_PAGE_TOKENS; j++) {                       \
                for (size_t d = 0; d < width; d++) {                            \
                    panel[j * width + d] = k[(first + d) * FV_PAGE_TOKENS + j]; \
                }                                                               \
            }                                                                   \
        }                                                                       \
    }

DEFINE_TURN(turn_f32, float)
DEFINE_TURN(turn_f16, uint16_t)

/* Dims [d0, d0 + n) of 16 tokens from j0 on: pairs of dims become pairs of tokens. */
static void turn_bf16_tile(uint16_t *restrict v,
                           const uint16_t *restrict k,
                           size_t dv,
                           size_t d0,
                           size_t n,
                           size_t j0)
{
    for (size_t d = d0; d < d0 + n; d++) {
        size_t column = d / FV_TILE_COLUMNS * FV_TILE_COLUMNS;
        size_t width = fv_piece_columns(dv, column, FV_TILE_COLUMNS);
        size_t first_pair = j0 / 2U / FV_TILE_PAIRS * FV_TILE_PAIRS;
        uint16_t *out = v + fv_tile_offset(FV_PAGE_TOKENS, dv, first_pair, column) +
                        ((j0 / 2U - first_pair) * width + (d - column)) * 2U;
        const uint16_t *in = k + (d - d0) / 2U * FV_TILE_COLUMNS * 2U + (d - d0) % 2U;

        for (size_t t = 0; t < FV_TILE_COLUMNS / 2U; t++) {
            out[t * width * 2U] = in[4U * t];
            out[t * width * 2U + 1U] = in[4U * t + 2U];
        }
    }
}

static void turn_bf16(uint16_t *restrict v, const uint16_t *restrict k, size_t dk, size_t dv)
{
    for (size_t d = 0; d < dv; d += 2U * FV_TILE_PAIRS) {
        size_t n = fv_page_min(2U * FV_TILE_PAIRS, dv - d);

        for (size_t j = 0; j < FV_PAGE_TOKENS; j += FV_TILE_COLUMNS) {
            turn_bf16_tile(v, k + fv_tile_offset(dk, FV_PAGE_TOKENS, d / 2U, j), dv, d, n, j);
        }
    }
}

void fv_tile_latent_v(fv_tile_block_t *block, const void *k)
{
    size_t dv = (size_t)block->head_dim_v;
    void *v = block->v_clean;

    if (block->kv_dtype == FV_DTYPE_BF16) {
        turn_bf16(v, k, (size_t)block->head_dim_qk, dv);
    } else if (block->kv_dtype == FV_DTYPE_F16) {
        turn_f16(v, k, dv);
    } else {
        turn_f32(v, k, dv);
    }
}
