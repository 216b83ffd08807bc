/*
 * lean_out.cuh - a piece of a group ends: warps' states are joined, whole rows leave, cut ones wait in their slot.
 *
 * Decode path: station 7 of 10. Before: lean_kernel.cuh. After: worker/exchange_*.c (partial states), coord's reply.
 */
#ifndef FV_KERNELS_LEAN_OUT_CUH
#define FV_KERNELS_LEAN_OUT_CUH

#include "kernels/lean_merge.cuh"

/* One pass: 8 rows x 64 columns of each warp's O are in s->pass; they are joined over the warps along tokens. */
template <int M_WARPS>
static __device__ __forceinline__ void fv_lean_join(const fv_lean_launch_t &p,
                                                    const fv_lean_smem_t *s,
                                                    const fv_lean_piece_place_t &place,
                                                    int32_t head,
                                                    int32_t side,
                                                    int32_t col0)
{
    constexpr int n_warps = FV_LEAN_WARPS / M_WARPS; /* along tokens */

    for (int32_t i = (int32_t)threadIdx.x; i < M_WARPS * 8 * 16; i += FV_LEAN_COMPUTE) {
        const int32_t col = (i & 15) * 4;
        const int32_t r = (i >> 4) & 7;
        const int32_t wm = i >> 7;
        const int32_t row = wm * 16 + side * 8 + r;
        float top = -INFINITY;
        float l = 0.0F;
        float4 o = make_float4(0.0F, 0.0F, 0.0F, 0.0F);

        if ((row >= s->run.n_rows) || (col0 + col >= p.head_dim_v)) {
            continue;
        }
#pragma unroll
        for (int w = 0; w < n_warps; w++) {
            top = fmaxf(top, s->m[w * 16 * M_WARPS + row]);
        }
#pragma unroll
        for (int w = 0; w < n_warps; w++) {
            const float weight = fv_lean_weight(s->m[w * 16 * M_WARPS + row], top);

            l += weight * s->l[w * 16 * M_WARPS + row];
            fv_lean_add(&o, weight, *(const float4 *)&s->pass[w * M_WARPS + wm][r][col]);
        }
        if (place.n_pieces == 1) {
            fv_lean_write(s->run, head, row, p.head_dim_v, col0 + col,
                          fv_lean_scale(o, fv_lean_inverse(l)), top + log2f(l));
            continue;
        }
        const uint64_t at = place.slot * (uint64_t)p.slot_rows + (uint64_t)row;

        *(float4 *)(p.slot_o + at * (uint64_t)p.head_dim_v + col0 + col) = o;
        if (col0 + col == 0) {
            float *ml = p.slot_ml + place.slot * 2U * (uint64_t)p.slot_rows + row;

            ml[0] = top;
            ml[p.slot_rows] = l;
        }
    }
}

/* A piece is done: n_tiles from walk.tile on. All computing threads. */
template <int M_WARPS, int N_TILES>
static __device__ __forceinline__ void fv_lean_store(const fv_lean_launch_t &p,
                                                     fv_lean_smem_t *s,
                                                     const float (*o)[4],
                                                     const float m[2],
                                                     float l[2],
                                                     const fv_lean_share_t &share,
                                                     const fv_lean_walk_t &walk,
                                                     int32_t n_tiles)
{
    const uint32_t warp = threadIdx.x >> 5U;
    const uint32_t lane = threadIdx.x & 31U;
    const uint32_t row = (warp / M_WARPS) * 16U * M_WARPS + (warp % M_WARPS) * 16U + (lane >> 2U);
    const fv_lean_piece_place_t place = fv_lean_place(share, s->run, walk, n_tiles);

#pragma unroll
    for (int side = 0; side < 2; side++) {
        l[side] += __shfl_xor_sync(0xffffffffU, l[side], 1);
        l[side] += __shfl_xor_sync(0xffffffffU, l[side], 2);
        if ((lane & 3U) == 0) {
            s->m[row + (uint32_t)side * 8U] = m[side];
            s->l[row + (uint32_t)side * 8U] = l[side];
        }
    }
#pragma unroll
    for (int side = 0; side < 2; side++) {
#pragma unroll
        for (int n0 = 0; n0 < N_TILES; n0 += 8) {
            if (((side == 1) && (s->run.n_rows <= 8)) || (n0 * 8 >= p.head_dim_v)) {
                continue;
            }
#pragma unroll
            for (int n = 0; n < 8; n++) {
                *(float2 *)&s->pass[warp][lane >> 2U][n * 8 + (int)(lane & 3U) * 2] =
                    make_float2(o[n0 + n][2 * side], o[n0 + n][2 * side + 1]);
            }
            fv_bar_sync(1, FV_LEAN_COMPUTE);
            fv_lean_join<M_WARPS>(p, s, place, walk.head, side, n0 * 8);
            fv_bar_sync(1, FV_LEAN_COMPUTE);
        }
    }
    if (place.n_pieces == 1) {
        return;
    }
    fv_lean_arrive(p, s, walk.head, place);
}

#endif /* FV_KERNELS_LEAN_OUT_CUH */
