/*
 * lean_tile.cuh - one tile joins a warp's state (O, m, l): scores, mask, softmax, weights times V.
 *
 * Decode path: station 7 of 10, inside lean_kernel.cuh. Per tile and warp:
 *
 *     S = Q K^T          mma m16n8k16, fp32 sums; then scale, softcap, mask, in units of log2
 *     m' = max(m, S), P = 2^(S - m'), alpha = 2^(m - m'), l = alpha l + sum P
 *     O = alpha O + P V  P in parts (lean_frag.cuh), so that weights lose no more than 2^-17
 *
 * NaN and masks: a masked score becomes -inf by selection and its weight 0; but 0 * NaN is NaN, so in a tile that some
 * row does not see whole, V of unseen tokens is cleared in registers, and a NaN or inf that only some rows
 * see goes the careful way, element by element.
 */
#ifndef FV_KERNELS_LEAN_TILE_CUH
#define FV_KERNELS_LEAN_TILE_CUH

#include "kernels/lean_scores.cuh"

static __device__ __forceinline__ bool
fv_lean_sees(const fv_row_range_t &range, const fv_lean_tile_t &tile, int32_t token)
{
    const int64_t j = tile.begin + token;
    const bool is_strided = ((tile.strided >> ((uint32_t)token / FV_S2_BLOCK_MIN)) & 1U) != 0;

    return (j < range.sink) || ((j < range.begin) ? is_strided : (j < range.end));
}

/* Scale, softcap and mask: S in units of log2, -inf where unseen. */
template <int M_WARPS>
static __device__ __forceinline__ void fv_lean_mask(float (*sc)[4],
                                                    const fv_lean_smem_t *s,
                                                    const fv_lean_tile_t &tile,
                                                    uint32_t row0,
                                                    uint32_t token0)
{
    const uint32_t lane = threadIdx.x & 31U;
    const float scale = s->run.score_scale;
    const float cap_inner = s->run.cap_inner;

#pragma unroll
    for (int n = 0; n < 2 * M_WARPS; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x = sc[n][i];

            if (cap_inner != 0.0F) {
                x = s->run.cap_outer * tanhf(x * cap_inner);
            }
            sc[n][i] = x * scale;
        }
    }
    if (tile.is_full != 0) {
        return;
    }
#pragma unroll
    for (int side = 0; side < 2; side++) {
        const fv_row_range_t range = s->ranges[row0 + (lane >> 2U) + (uint32_t)side * 8U];

#pragma unroll
        for (int n = 0; n < 2 * M_WARPS; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int32_t token = (int32_t)(token0 + (uint32_t)n * 8U + (lane & 3U) * 2U) + i;

                if ((token >= tile.n_tokens) || !fv_lean_sees(range, tile, token)) {
                    sc[n][2 * side + i] = -INFINITY;
                }
            }
        }
    }
}

/* S becomes P; m and l follow; O is rescaled where a maximum moved. */
template <int KIND, int M_WARPS, int N_TILES>
static __device__ __forceinline__ void
fv_lean_softmax(float (*sc)[4], float (*o)[4], float m[2], float l[2])
{
    float alpha[2];

#pragma unroll
    for (int side = 0; side < 2; side++) {
        float top = -INFINITY;
        float base = 0.0F;
        float sum = 0.0F;

#pragma unroll
        for (int n = 0; n < 2 * M_WARPS; n++) {
            top = fmaxf(top, fmaxf(sc[n][2 * side], sc[n][2 * side + 1]));
        }
        top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, 2));
        top = fmaxf(m[side], top - fv_lean_traits<KIND>::p_bias);
        base = (top == -INFINITY) ? 0.0F : top;
        alpha[side] = fv_exp2(m[side] - base);
        m[side] = top;
#pragma unroll
        for (int n = 0; n < 2 * M_WARPS; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float x = fv_exp2(sc[n][2 * side + i] - base);

                sc[n][2 * side + i] = x;
                sum += x;
            }
        }
        l[side] = l[side] * alpha[side] + sum;
    }
    if (__any_sync(0xffffffffU, !(alpha[0] == 1.0F) || !(alpha[1] == 1.0F))) {
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
            o[n][0] *= alpha[0];
            o[n][1] *= alpha[0];
            o[n][2] *= alpha[1];
            o[n][3] *= alpha[1];
        }
    }
}

/* For tokens 2 (lane % 4) + {0, 1} and + {8, 9} of 16: side-word masks, set where some row of the block may see. */
static __device__ __forceinline__ void
fv_lean_keep(uint32_t keep[2], const fv_lean_smem_t *s, const fv_lean_tile_t &tile, uint32_t token0)
{
    const fv_row_range_t first = s->ranges[0];
    const fv_row_range_t last = s->ranges[s->run.n_rows - 1];
    const uint32_t lane = threadIdx.x & 31U;
    fv_row_range_t hull;

    hull.sink = fv_max64(first.sink, last.sink);
    hull.begin = fv_min64(first.begin, last.begin);
    hull.end = fv_max64(first.end, last.end);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        keep[i] = 0;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int32_t token = (int32_t)(token0 + (lane & 3U) * 2U) + 8 * i + j;

            if ((token < tile.n_tokens) && fv_lean_sees(hull, tile, token)) {
                keep[i] |= 0xffffU << (16 * j);
            }
        }
    }
}

/* O += V over the tokens whose V is inf or NaN, for the rows that see them. */
template <int KIND, int M_WARPS, int N_TILES>
static __device__ __forceinline__ void fv_lean_spoil(float (*o)[4],
                                                     const fv_lean_smem_t *s,
                                                     const fv_lean_matrix_t &v,
                                                     const fv_lean_tile_t &tile,
                                                     uint32_t row0,
                                                     uint32_t token0,
                                                     uint32_t dv)
{
    const uint32_t lane = threadIdx.x & 31U;

    for (int32_t t = 0; (t < 16 * M_WARPS) && ((int32_t)token0 + t < tile.n_tokens); t++) {
        const int32_t token = (int32_t)token0 + t;
        const bool sees0 = fv_lean_sees(s->ranges[row0 + (lane >> 2U)], tile, token);
        const bool sees1 = fv_lean_sees(s->ranges[row0 + (lane >> 2U) + 8U], tile, token);

#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t d = (uint32_t)n * 8U + (lane & 3U) * 2U + (uint32_t)i;
                const float x = (d < dv) ? fv_lean_v_at<KIND>(v, token0 + (uint32_t)t, d) : 0.0F;

                if (!isfinite(x)) {
                    o[n][i] += sees0 ? x : 0.0F;
                    o[n][2 + i] += sees1 ? x : 0.0F;
                }
            }
        }
    }
}

/* O += P V over this warp's tokens. */
template <int KIND, int M_WARPS, int N_TILES, bool IS_FULL>
static __device__ __forceinline__ void fv_lean_accumulate(float (*o)[4],
                                                          const float (*sc)[4],
                                                          const fv_lean_smem_t *s,
                                                          const fv_lean_matrix_t &v,
                                                          const fv_lean_tile_t &tile,
                                                          uint32_t row0,
                                                          uint32_t token0,
                                                          uint32_t dv)
{
    using traits = fv_lean_traits<KIND>;
    const uint32_t lane = threadIdx.x & 31U;
    bool is_spoiled = false;

#pragma unroll
    for (int step = 0; step < M_WARPS; step++) {
        uint32_t a[traits::n_p_parts][4];
        uint32_t keep[2];

#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *p = sc[2 * step + (i >> 1)] + 2 * (i & 1);

            fv_split_rounded<traits::is_f16, traits::n_p_parts>(&a[0][i], 4, p[0], p[1]);
        }
        if (!IS_FULL) {
            fv_lean_keep(keep, s, tile, token0 + (uint32_t)step * 16U);
        }
#pragma unroll
        for (int n2 = 0; n2 < N_TILES / 2; n2++) {
            uint32_t raw[traits::is_f32 ? 8 : 4];
            uint32_t b[traits::n_kv_parts][4];

            if ((uint32_t)n2 * 16U >= dv) {
                continue;
            }
            fv_lean_load_v_raw<KIND>(raw, v, token0 + (uint32_t)step * 16U, (uint32_t)n2, dv, lane);
            if (!IS_FULL) {
                is_spoiled |= fv_lean_clean_v<KIND>(raw, keep);
            }
            fv_lean_split_v<KIND>(b, raw);
            float own[2][4] = {};
            float(*d)[4] = (traits::n_kv_parts == 1) ? (o + 2 * n2) : own;

#pragma unroll
            for (int pp = traits::n_p_parts - 1; pp >= 0; pp--) {
#pragma unroll
                for (int vp = traits::n_kv_parts - 1; vp >= 0; vp--) {
                    if (pp + vp > FV_LEAN_PARTS_SUM) {
                        continue;
                    }
                    fv_mma<traits::is_f16>(d[0], a[pp], b[vp][0], b[vp][1]);
                    fv_mma<traits::is_f16>(d[1], a[pp], b[vp][2], b[vp][3]);
                }
            }
            if (traits::n_kv_parts > 1) {
                fv_lean_add_tiles(o + 2 * n2, own);
            }
        }
    }
    if (!IS_FULL && __any_sync(0xffffffffU, is_spoiled)) {
        fv_lean_spoil<KIND, M_WARPS, N_TILES>(o, s, v, tile, row0, token0, dv);
    }
}

/* What a computing warp holds of the group it works on. */
template <int N_TILES> struct fv_lean_state {
    float o[N_TILES][4];
    float m[2], l[2]; /* rows lane / 4 and lane / 4 + 8 */
};

/* One tile: K, then V, from the ring. */
template <int KIND, int M_WARPS, int DV_MAX, bool IS_EXACT>
static __device__ __forceinline__ void fv_lean_do_tile(fv_lean_state<DV_MAX / 8> &state,
                                                       const fv_lean_launch_t &p,
                                                       fv_lean_smem_t *s,
                                                       const uint8_t *ring_data,
                                                       fv_lean_ring_t *ring,
                                                       uint32_t q_warp)
{
    constexpr int n_tiles = DV_MAX / 8;
    const uint32_t warp = fv_lean_warp();
    const uint32_t row0 = (warp % M_WARPS) * 16U;
    const uint32_t token0 = (warp / M_WARPS) * 16U * M_WARPS;
    const uint32_t dk = IS_EXACT ? (uint32_t)DV_MAX : (uint32_t)p.head_dim_qk;
    const uint32_t dv = IS_EXACT ? (uint32_t)DV_MAX : (uint32_t)p.head_dim_v;
    float sc[2 * M_WARPS][4] = {};
    fv_lean_matrix_t k = {ring_data + ring->slot * p.slot_bytes, p.k_rows};

    if (IS_EXACT) { /* panels */
        k.rows = fv_page_rows_make(DV_MAX * 2U, 2U);
    }
    fv_mbar_wait(&s->full[ring->slot], ring->parity);
    FV_LEAN_MARK_FIRST(p, 1);
    const fv_lean_tile_t tile = s->tile[ring->slot];
    if (IS_EXACT) {
        fv_lean_scores_exact<KIND, M_WARPS, DV_MAX>(sc, k, q_warp, token0);
    } else {
        fv_lean_scores<KIND, M_WARPS>(sc, k, q_warp, dk, s->run.n_q_parts, token0);
    }
    fv_lean_release(&s->empty[ring->slot]);
    fv_lean_ring_next(ring, (uint32_t)p.ring_slots);
    fv_lean_mask<M_WARPS>(sc, s, tile, row0, token0);
    fv_lean_softmax<KIND, M_WARPS, n_tiles>(sc, state.o, state.m, state.l);
    fv_lean_matrix_t v = {ring_data + ring->slot * p.slot_bytes, p.v_rows};
    if (IS_EXACT) {
        v.rows = fv_page_rows_make(DV_MAX * 2U, 2U);
    }
    fv_mbar_wait(&s->full[ring->slot], ring->parity);
    if (tile.is_full != 0) {
        fv_lean_accumulate<KIND, M_WARPS, n_tiles, true>(state.o, sc, s, v, tile, row0, token0, dv);
    } else {
        fv_lean_accumulate<KIND, M_WARPS, n_tiles, false>(state.o, sc, s, v, tile, row0, token0,
                                                          dv);
    }
    fv_lean_release(&s->empty[ring->slot]);
    fv_lean_ring_next(ring, (uint32_t)p.ring_slots);
}

#endif /* FV_KERNELS_LEAN_TILE_CUH */
