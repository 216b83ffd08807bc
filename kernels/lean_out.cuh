/*
 * lean_out.cuh - a piece of a group ends: warps' states are joined, whole rows leave, cut ones go to their slot.
 *
 * Decode path: station 7 of 10. Before: lean_kernel.cuh. After: worker/exchange_*.c (partial states), coord's reply.
 *
 * The 4 / m_warps warps along tokens hold the same rows and columns. Each leaves its O in shared memory, in the order of
 * its registers, 8 rows at a time, and finishes its part of the columns.
 */
#ifndef FV_KERNELS_LEAN_OUT_CUH
#define FV_KERNELS_LEAN_OUT_CUH

#include "kernels/lean_merge.cuh"

/* The group of a piece of n_tiles from walk.tile on, and the piece's slot; n_pieces 1: the group is whole. */
static __device__ __forceinline__ fv_lean_group_t fv_lean_place(const fv_lean_share_t &share,
                                                                const fv_lean_run_t &run,
                                                                const fv_lean_walk_t &walk,
                                                                int32_t n_tiles,
                                                                uint64_t *slot)
{
    fv_lean_group_t group = {walk.head, share.index, 1};

    if (walk.tile > 0) {
        group.first = share.first;
        group.n_pieces = share.n_first;
        *slot = 2U * (uint64_t)share.index;
    } else if (n_tiles < run.n_tiles) {
        group.n_pieces = share.n_last;
        *slot = 2U * (uint64_t)share.index + 1U;
    }
    return group;
}

/* A warp's part of the columns of 8 rows, joined: N_OWN n-tiles of one row of each lane. */
template <int N_OWN> struct fv_lean_part {
    float2 o[N_OWN];
    float m, l;
};

/* Rows lane / 4 + 8 side of this warp's rows, summed over the warps along tokens, which are in `dump`. */
template <int M_WARPS, int N_TILES>
static __device__ __forceinline__ void
fv_lean_join(fv_lean_part<N_TILES * M_WARPS / FV_LEAN_WARPS> &part,
             const fv_lean_smem_t *s,
             const float2 *dump,
             int side)
{
    constexpr int n_along = FV_LEAN_WARPS / M_WARPS;
    constexpr int n_own = N_TILES / n_along;
    const uint32_t lane = threadIdx.x & 31U;
    const uint32_t along = fv_lean_warp() / M_WARPS;
    const uint32_t warp_m = fv_lean_warp() % M_WARPS;
    const uint32_t row = warp_m * 16U + (lane >> 2U) + (uint32_t)side * 8U;
    float weights[n_along];

    part.m = -INFINITY;
    part.l = 0.0F;
#pragma unroll
    for (int w = 0; w < n_along; w++) {
        weights[w] = s->m[w * 16 * M_WARPS + (int)row];
        part.m = fmaxf(part.m, weights[w]);
    }
#pragma unroll
    for (int w = 0; w < n_along; w++) {
        weights[w] = fv_lean_weight(weights[w], part.m);
        part.l += weights[w] * s->l[w * 16 * M_WARPS + (int)row];
    }
#pragma unroll
    for (int i = 0; i < n_own; i++) {
        part.o[i] = make_float2(0.0F, 0.0F);
#pragma unroll
        for (int w = 0; w < n_along; w++) {
            const uint32_t from = (uint32_t)(w * M_WARPS) + warp_m;
            const float2 x = dump[(from * N_TILES + along * n_own + (uint32_t)i) * 32U + lane];

            part.o[i].x += weights[w] * x.x;
            part.o[i].y += weights[w] * x.y;
        }
    }
}

/* The part leaves: whole rows normalised, to where the item wants them; pieces as they are, to their slot. */
template <int M_WARPS, int N_OWN>
static __device__ __forceinline__ void fv_lean_leave(const fv_lean_launch_t &p,
                                                     const fv_lean_smem_t *s,
                                                     const fv_lean_part<N_OWN> &part,
                                                     const fv_lean_group_t &group,
                                                     uint64_t slot,
                                                     int side)
{
    const uint32_t lane = threadIdx.x & 31U;
    const uint32_t along = fv_lean_warp() / M_WARPS;
    const int32_t row = (int32_t)(fv_lean_warp() % M_WARPS * 16U + (lane >> 2U)) + side * 8;
    const bool is_there = row < s->run.n_rows;
    const bool is_whole = group.n_pieces == 1;
    const bool is_odd = (lane & 1U) != 0;
    const float scale = is_whole ? fv_lean_inverse(part.l) : 1.0F;
    const uint64_t at = slot * (uint64_t)p.slot_rows + (uint64_t)row;
    fv_lean_target_t target = {(uint8_t *)(p.slot_o + at * (uint64_t)p.head_dim_v), NULL, 1.0F,
                               FV_DTYPE_F32};

    if (is_whole && is_there) {
        target = fv_lean_find_target(s->run, group.head, row, p.head_dim_v);
    }
#pragma unroll
    for (int i = 0; i < N_OWN; i += 2) {
        /* of two n-tiles the even lane takes four columns of the first, the odd one of the second */
        const float2 mine = is_odd ? part.o[i + 1] : part.o[i];
        const float2 other = is_odd ? part.o[i] : part.o[i + 1];
        const float x = __shfl_xor_sync(0xffffffffU, other.x, 1) * scale;
        const float y = __shfl_xor_sync(0xffffffffU, other.y, 1) * scale;
        const int32_t col =
            ((int32_t)along * N_OWN + i + (is_odd ? 1 : 0)) * 8 + (int32_t)(lane & 2U) * 2;

        if (is_there && (col < p.head_dim_v)) {
            fv_lean_write(target, col,
                          is_odd ? make_float4(x, y, mine.x * scale, mine.y * scale)
                                 : make_float4(mine.x * scale, mine.y * scale, x, y));
        }
    }
    if (is_there && (along == 0) && ((lane & 3U) == 0)) {
        if (is_whole) {
            fv_lean_write_lse(target, part.m + log2f(part.l));
        } else {
            *(float2 *)(p.slot_ml + 2U * at) = make_float2(part.m, part.l);
        }
    }
}

/* Rows lane / 4 + 8 side: the second team leaves its state, thread by thread, and the first takes it up. */
template <int N_TILES>
static __device__ __forceinline__ void
fv_lean_fold(fv_lean_smem_t *s, float2 *dump, float (*o)[4], float m[2], float l[2], int side)
{
    float2 *at = dump + fv_lean_warp() * N_TILES * 32U + (threadIdx.x & 31U);
    float2 *ml = &s->fold_ml[fv_lean_thread()];

    fv_lean_sync<2>(); /* the rows and the piece before are out */
    if (fv_lean_team() == 1U) {
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
            at[n * 32] = make_float2(o[n][2 * side], o[n][2 * side + 1]);
        }
        *ml = make_float2(m[side], l[side]);
    }
    fv_lean_sync<2>();
    if (fv_lean_team() == 0U) {
        const float top = fmaxf(m[side], ml->x);
        const float w = fv_lean_weight(m[side], top);
        const float w_other = fv_lean_weight(ml->x, top);

#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
            o[n][2 * side] = o[n][2 * side] * w + at[n * 32].x * w_other;
            o[n][2 * side + 1] = o[n][2 * side + 1] * w + at[n * 32].y * w_other;
        }
        l[side] = l[side] * w + ml->y * w_other;
        m[side] = top;
        __syncwarp(); /* the warp's place in `dump` is free again */
    }
}

/* A piece is done: n_tiles from walk.tile on. All computing threads. */
template <int M_WARPS, int N_TILES, int TEAMS>
static __device__ __forceinline__ void fv_lean_store(const fv_lean_launch_t &p,
                                                     fv_lean_smem_t *s,
                                                     float2 *dump,
                                                     float (*o)[4],
                                                     float m[2],
                                                     float l[2],
                                                     const fv_lean_share_t &share,
                                                     const fv_lean_walk_t &walk,
                                                     int32_t n_tiles)
{
    constexpr int n_along = FV_LEAN_WARPS / M_WARPS;
    constexpr int n_own = N_TILES / n_along;
    const uint32_t warp = fv_lean_warp();
    const uint32_t lane = threadIdx.x & 31U;
    const uint32_t row = (warp / M_WARPS) * 16U * M_WARPS + (warp % M_WARPS) * 16U + (lane >> 2U);
    uint64_t slot = 0;
    const fv_lean_group_t group = fv_lean_place(share, s->run, walk, n_tiles, &slot);

#pragma unroll
    for (int side = 0; side < 2; side++) {
        fv_lean_part<n_own> part;

        if ((side == 1) && (s->run.n_rows <= 8)) {
            continue;
        }
        if (TEAMS == 2) {
            fv_lean_fold<N_TILES>(s, dump, o, m, l, side);
            if (fv_lean_team() == 1U) {
                continue;
            }
        }
        l[side] += __shfl_xor_sync(0xffffffffU, l[side], 1);
        l[side] += __shfl_xor_sync(0xffffffffU, l[side], 2);
        if (n_along == 1) {
#pragma unroll
            for (int i = 0; i < n_own; i++) {
                part.o[i] = make_float2(o[i][2 * side], o[i][2 * side + 1]);
            }
            part.m = m[side];
            part.l = l[side];
        } else {
            if ((side == 1) && (TEAMS == 1)) {
                fv_lean_sync_team(); /* all have taken their part of the rows before */
            }
            if ((lane & 3U) == 0) {
                s->m[row + (uint32_t)side * 8U] = m[side];
                s->l[row + (uint32_t)side * 8U] = l[side];
            }
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
                dump[(warp * N_TILES + (uint32_t)n) * 32U + lane] =
                    make_float2(o[n][2 * side], o[n][2 * side + 1]);
            }
            fv_lean_sync_team();
            fv_lean_join<M_WARPS, N_TILES>(part, s, dump, side);
        }
        fv_lean_leave<M_WARPS, n_own>(p, s, part, group, slot, side);
    }
    if ((group.n_pieces != 1) && (fv_lean_team() == 0U)) {
        fv_lean_arrive(p, s, group);
    }
}

#endif /* FV_KERNELS_LEAN_OUT_CUH */
