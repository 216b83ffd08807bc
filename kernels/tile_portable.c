/*
 * tile_portable.c - one tile in plain C: for CPUs without AVX2, and the judge of the others in tests.
 *
 * Decode path: station 7 of 10. Before: attend_cpu.c. After: attend_cpu.c.
 */
#include "kernels/fp8.h"
#include "kernels/kernels.h"
#include "kernels/page_layout.h"
#include "kernels/tile.h"

#include <math.h>

/* [n_rows, n_columns] of a page -> fp32, plain rows. */
static void widen(const void *page, fv_dtype_t dtype, int32_t n_rows, int32_t n_columns, float *out)
{
    for (size_t r = 0; r < (size_t)n_rows; r++) {
        for (size_t c = 0; c < (size_t)n_columns; c++) {
            out[r * (size_t)n_columns + c] = fv_load_element(
                page, dtype, fv_page_index(dtype, (size_t)n_rows, (size_t)n_columns, r, c));
        }
    }
}

/* c[j] += a * b[j] */
static void add_scaled(float *restrict c, const float *restrict b, float a, int32_t n)
{
    for (int32_t j = 0; j < n; j++) {
        c[j] += a * b[j];
    }
}

static void portable_scores(fv_tile_block_t *block, const void *k)
{
    int32_t dk = block->head_dim_qk;

    widen(k, block->kv_dtype, dk, FV_PAGE_TOKENS, block->wide);
    for (size_t r = 0; r < (size_t)block->n_rows; r++) {
        float *s = block->s + r * FV_PAGE_TOKENS;
        const float *q = block->q + r * (size_t)dk;

        for (int32_t j = 0; j < FV_PAGE_TOKENS; j++) {
            s[j] = 0.0F;
        }
        for (int32_t d = 0; d < dk; d++) {
            add_scaled(s, block->wide + (size_t)d * FV_PAGE_TOKENS, q[d], FV_PAGE_TOKENS);
        }
    }
}

static void portable_softcap(fv_tile_block_t *block)
{
    for (size_t i = 0; i < (size_t)block->n_rows * FV_PAGE_TOKENS; i++) {
        block->s[i] = block->cap_outer * tanhf(block->s[i] * block->cap_inner);
    }
}

static void portable_softmax(fv_tile_block_t *block)
{
    for (int32_t r = 0; r < block->n_rows; r++) {
        float *s = block->s + (size_t)r * FV_PAGE_TOKENS;
        float m_old = block->m[r];
        float m = m_old;
        float base = 0.0F;
        float sum = 0.0F;

        for (int32_t j = 0; j < FV_PAGE_TOKENS; j++) {
            float x = s[j] * block->score_scale;
            m = (x > m) ? x : m;
        }
        base =
            (m == -INFINITY) ? 0.0F : m; /* nothing visible yet: -inf - -inf must not be formed */
        for (int32_t j = 0; j < FV_PAGE_TOKENS; j++) {
            s[j] = exp2f(fmaf(s[j], block->score_scale, -base));
            sum += s[j];
        }
        block->alpha[r] = (m_old == m) ? 1.0F : exp2f(m_old - base);
        block->l[r] = block->l[r] * block->alpha[r] + sum;
        block->m[r] = m;
    }
}

static void portable_accumulate(fv_tile_block_t *block, const void *v)
{
    int32_t dv = block->head_dim_v;

    widen(v, block->kv_dtype, FV_PAGE_TOKENS, dv, block->wide);
    for (size_t r = 0; r < (size_t)block->n_rows; r++) {
        float *o = block->o + r * (size_t)block->o_stride;
        const float *p = block->s + r * FV_PAGE_TOKENS;

        for (int32_t d = 0; d < dv; d++) {
            o[d] *= block->alpha[r];
        }
        for (int32_t j = 0; j < FV_PAGE_TOKENS; j++) {
            add_scaled(o, block->wide + (size_t)j * (size_t)dv, p[j], dv);
        }
    }
}

const fv_tile_ops_t fv_tile_portable = {
    .name = "portable",
    .macs_per_ns = 8,
    .begin = NULL,
    .scores = portable_scores,
    .softcap = portable_softcap,
    .softmax = portable_softmax,
    .accumulate = portable_accumulate,
    .latent_v = fv_tile_latent_v,
    .widen_fp8 = fv_fp8_widen,
    .end = NULL,
};
