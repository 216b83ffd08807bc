/*
 * prefill_tile.cuh - what a computing warpgroup does with one tile: products, mask, softmax.
 *
 * Station 7 of 10, inside prefill_kernel.cuh. 64 rows; a thread has rows lane / 4 + {0, 8} of its warp's 16:
 *
 *     S = Q K^T                  wgmma, both from shared memory
 *     m' = max(m, S)             then P = 2^(scale (S - m')), alpha = 2^(scale (m - m')), l = alpha l + sum P
 *     O = alpha O + P V          wgmma, P from registers in one 16-bit part
 */
#ifndef FV_KERNELS_PREFILL_TILE_CUH
#define FV_KERNELS_PREFILL_TILE_CUH

#include "kernels/prefill_smem.cuh"

/* What a thread keeps of a unit. Sides: rows lane / 4 and lane / 4 + 8 of the warp. */
template <typename SHAPE> struct fv_prefill_state {
    float o[SHAPE::DV / 2]; /* [4 n + 2 side + i]: column 8 n + 2 (lane % 4) + i */
    float m[2];             /* of S as it comes from the product, or of the capped S */
    float l[2];             /* of this thread's columns */
    int32_t t[2];           /* query token of each row */
    float scale;            /* log2 units of one unit of S */
    uint32_t p[SHAPE::N_TOKENS / 16]
              [4]; /* weights of the last tile, an A of wgmma for each 16 tokens */
};

template <typename SHAPE>
static __device__ __forceinline__ void
fv_prefill_scores(float *sc, uint64_t q_desc, uint64_t k_desc)
{
#pragma unroll
    for (int ks = 0; ks < SHAPE::DK / 16; ks++) {
        const uint32_t in = (uint32_t)(ks % 4) * 32U;

        fv_wgmma_ss<SHAPE::N_TOKENS, SHAPE::IS_F16, false>(
            sc, fv_wgmma_desc_at(q_desc, (uint32_t)(ks / 4) * SHAPE::Q_PANEL_BYTES + in),
            fv_wgmma_desc_at(k_desc,
                             (uint32_t)(ks / 4) * SHAPE::N_TOKENS * FV_PANEL_ROW_BYTES + in),
            ks > 0);
    }
}

template <typename SHAPE>
static __device__ __forceinline__ void fv_prefill_values(fv_prefill_state<SHAPE> &state,
                                                         uint64_t v_desc)
{
#pragma unroll
    for (int ks = 0; ks < SHAPE::N_TOKENS / 16; ks++) {
        fv_wgmma_rs<SHAPE::DV, SHAPE::IS_F16, true>(
            state.o, state.p[ks],
            fv_wgmma_desc_at(v_desc, (uint32_t)(ks / 4) * SHAPE::V_PAGE_BYTES +
                                         (uint32_t)(ks % 4) * 16U * FV_PANEL_ROW_BYTES),
            true);
    }
}

/* S = cap tanh(S / cap), from scores before scaling. tanh(x) = 1 - 2 / (2^(2 x log2 e) + 1): good to 2^-22 of 1. */
template <typename SHAPE>
static __device__ __forceinline__ void fv_prefill_cap(float *sc, float cap_inner, float cap_outer)
{
    const float inner = cap_inner * 2.0F * 1.44269504088896340736F;

#pragma unroll
    for (int i = 0; i < SHAPE::N_TOKENS / 2; i++) {
        const float e = fv_exp2(sc[i] * inner);

        sc[i] = cap_outer - __fdividef(2.0F * cap_outer, e + 1.0F);
    }
}

/* -inf where a row does not see a token. */
template <typename SHAPE>
static __device__ __forceinline__ void fv_prefill_mask(float *sc,
                                                       const fv_prefill_tile_t &tile,
                                                       const fv_lean_run_t &run,
                                                       const int32_t t[2])
{
#pragma unroll
    for (int side = 0; side < 2; side++) {
        const fv_row_range_t range = fv_row_range(&run.query, run.position + t[side]);

#pragma unroll
        for (int page = 0; page < SHAPE::N_PAGES; page++) {
            const uint64_t sees =
                fv_prefill_sees(range, tile.page[page]) >> ((threadIdx.x & 3U) * 2U);

#pragma unroll
            for (int n = 0; n < 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (((sees >> (8 * n + i)) & 1U) == 0) {
                        sc[(8 * page + n) * 4 + 2 * side + i] = -INFINITY;
                    }
                }
            }
        }
    }
}

/*
 * The exponent that weights are relative to, of a maximum before scaling. Rounded here, whatever surrounds it: fused
 * with a difference it would not be the number that was taken off before, and a maximum that stays would multiply O and
 * l by 2^(its rounding error) at every tile.
 */
template <typename SHAPE>
static __device__ __forceinline__ float fv_prefill_base(float top, float scale)
{
    return SHAPE::IS_F16 ? fmaf(top, scale, -SHAPE::P_BIAS) : __fmul_rn(top, scale);
}

/* S becomes weights; m and l follow; alpha: what O must be multiplied by, 1 where the maximum stays. */
template <typename SHAPE>
static __device__ __forceinline__ void
fv_prefill_softmax(float *sc, fv_prefill_state<SHAPE> &state, float alpha[2])
{
#pragma unroll
    for (int side = 0; side < 2; side++) {
        float top = state.m[side];
        float sum = 0.0F;

#pragma unroll
        for (int n = 0; n < SHAPE::N_TOKENS / 8; n++) {
            top = fmaxf(top, fmaxf(sc[4 * n + 2 * side], sc[4 * n + 2 * side + 1]));
        }
        top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, 2));
        const float base = (top == -INFINITY) ? 0.0F : fv_prefill_base<SHAPE>(top, state.scale);

        alpha[side] = fv_exp2(__fsub_rn(fv_prefill_base<SHAPE>(state.m[side], state.scale), base));
        state.m[side] = top;
#pragma unroll
        for (int n = 0; n < SHAPE::N_TOKENS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float x = fv_exp2(fmaf(sc[4 * n + 2 * side + i], state.scale, -base));

                sc[4 * n + 2 * side + i] = x;
                sum += x;
            }
        }
        state.l[side] = state.l[side] * alpha[side] + sum;
    }
}

template <typename SHAPE>
static __device__ __forceinline__ void fv_prefill_pack(fv_prefill_state<SHAPE> &state,
                                                       const float *sc)
{
#pragma unroll
    for (int ks = 0; ks < SHAPE::N_TOKENS / 16; ks++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            fv_split_rounded<SHAPE::IS_F16, 1>(&state.p[ks][i], 1, sc[8 * ks + 2 * i],
                                               sc[8 * ks + 2 * i + 1]);
        }
    }
}

template <typename SHAPE>
static __device__ __forceinline__ void fv_prefill_rescale(fv_prefill_state<SHAPE> &state,
                                                          const float alpha[2])
{
#pragma unroll
    for (int n = 0; n < SHAPE::DV / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            state.o[4 * n + i] *= alpha[i / 2];
        }
    }
}

/* O += V over the tokens whose V is inf or NaN, for the rows that see them: from the page itself. */
template <typename SHAPE>
static __device__ __forceinline__ void fv_prefill_spoil(fv_prefill_state<SHAPE> &state,
                                                        const fv_prefill_tile_t &tile,
                                                        const fv_lean_run_t &run,
                                                        const uint8_t *arena)
{
    const fv_page_rows_t rows = fv_page_rows_make(SHAPE::DV * 2U, 2U);

#pragma unroll 1
    for (int page = 0; page < SHAPE::N_PAGES; page++) {
        const uint8_t *v = arena + (uint64_t)tile.page[page].page * FV_PAGE_UNIT +
                           SHAPE::K_PAGE_BYTES + (threadIdx.x & 3U) * 4U;
        uint64_t sees[2];

#pragma unroll
        for (int side = 0; side < 2; side++) {
            sees[side] = fv_prefill_sees(fv_row_range(&run.query, run.position + state.t[side]),
                                         tile.page[page]);
        }
#pragma unroll 1
        for (uint32_t token = 0; (int32_t)token < tile.page[page].n_tokens; token++) {
#pragma unroll
            for (int n = 0; n < SHAPE::DV / 8; n++) {
                const uint32_t pair =
                    *(const uint32_t *)(v + fv_page_chunk(&rows, token, (uint32_t)n));
                const float2 x = SHAPE::IS_F16 ? __half22float2(*(const __half2 *)&pair)
                                               : make_float2(__uint_as_float(pair << 16U),
                                                             __uint_as_float(pair & 0xffff0000U));

#pragma unroll
                for (int side = 0; side < 2; side++) {
                    const bool is_seen = ((sees[side] >> token) & 1U) != 0;

                    state.o[4 * n + 2 * side] += (is_seen && !isfinite(x.x)) ? x.x : 0.0F;
                    state.o[4 * n + 2 * side + 1] += (is_seen && !isfinite(x.y)) ? x.y : 0.0F;
                }
            }
        }
    }
}

#endif /* FV_KERNELS_PREFILL_TILE_CUH */
