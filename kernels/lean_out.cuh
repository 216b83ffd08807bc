/*
 * lean_out.cuh - a piece of a group ends: warps' states are joined, whole rows leave, cut ones wait in their slot.
 *
 * Decode path: station 7 of 10. Before: lean_kernel.cuh. After: worker/exchange_*.c (partial states), coord's reply.
 *
 * Cut groups. Each piece goes to its share's slot, unnormalised; then a counter goes up. Whoever brings the last piece
 * reads all of them in ascending order of tiles, writes the rows and puts the counter back to zero: nobody waits for
 * anybody, so CTAs need not be resident together, and the same step gives the same bits.
 */
#ifndef FV_KERNELS_LEAN_OUT_CUH
#define FV_KERNELS_LEAN_OUT_CUH

#include "kernels/lean_smem.cuh"

#define FV_LEAN_LN2 0.69314718055994530942F

/* Row `row` of the block at KV head `head`: query token, and query head of this rank. */
typedef struct fv_lean_row {
    int32_t t, h;
} fv_lean_row_t;

static __device__ __forceinline__ fv_lean_row_t fv_lean_find_row(const fv_lean_run_t &run,
                                                                 int32_t head,
                                                                 int32_t row)
{
    const int32_t flat = run.row_begin + row;
    fv_lean_row_t r;

    r.t = flat / run.group;
    r.h = head * run.group + (flat - r.t * run.group);
    return r;
}

static __device__ __forceinline__ void fv_lean_store4(uint8_t *at, int32_t dtype, float4 o)
{
    if (dtype == FV_DTYPE_F32) {
        if (((uintptr_t)at & 15U) == 0) {
            *(float4 *)at = o;
            return;
        }
        ((float *)at)[0] = o.x;
        ((float *)at)[1] = o.y;
        ((float *)at)[2] = o.z;
        ((float *)at)[3] = o.w;
        return;
    }
    uint32_t low = 0;
    uint32_t high = 0;

    if (dtype == FV_DTYPE_BF16) {
        fv_split_rounded<false, 1>(&low, 1, o.x, o.y);
        fv_split_rounded<false, 1>(&high, 1, o.z, o.w);
    } else {
        fv_split_rounded<true, 1>(&low, 1, o.x, o.y);
        fv_split_rounded<true, 1>(&high, 1, o.z, o.w);
    }
    if (((uintptr_t)at & 7U) == 0) {
        *(uint2 *)at = make_uint2(low, high);
        return;
    }
    ((uint16_t *)at)[0] = (uint16_t)low;
    ((uint16_t *)at)[1] = (uint16_t)(low >> 16U);
    ((uint16_t *)at)[2] = (uint16_t)high;
    ((uint16_t *)at)[3] = (uint16_t)(high >> 16U);
}

/* Four finished columns of a row, normalised; lse_log2 goes with column 0. */
static __device__ void fv_lean_write(const fv_lean_run_t &run,
                                     int32_t head,
                                     int32_t row,
                                     int32_t dv,
                                     int32_t col,
                                     float4 o,
                                     float lse_log2)
{
    const fv_lean_row_t r = fv_lean_find_row(run, head, row);

    if (run.n_dst > 0) {
        const uint64_t index =
            (uint64_t)r.t * (uint64_t)(run.n_kv_heads * run.group) + (uint64_t)r.h;
        int32_t low = 0;
        int32_t high = run.n_dst;

        while (high - low > 1) {
            const int32_t middle = low + (high - low) / 2;

            if (run.dst[middle].row_begin <= index) {
                low = middle;
            } else {
                high = middle;
            }
        }
        const uint64_t at = index - run.dst[low].row_begin;

        fv_lean_store4((uint8_t *)(run.dst[low].o + at * (uint64_t)dv + col), FV_DTYPE_F32, o);
        if (col == 0) {
            run.dst[low].lse_log2[at] = lse_log2;
        }
        return;
    }
    const uint64_t e = (run.io_dtype == FV_DTYPE_F32) ? 4U : 2U;

    fv_lean_store4(run.out + (uint64_t)r.t * run.out_token_bytes +
                       ((uint64_t)r.h * (uint64_t)dv + (uint64_t)col) * e,
                   run.io_dtype, o);
    if ((col == 0) && (run.lse != NULL)) {
        run.lse[(uint64_t)r.t * run.lse_token_stride + (uint64_t)r.h] = lse_log2 * FV_LEAN_LN2;
    }
}

static __device__ __forceinline__ float4 fv_lean_scale(float4 o, float w)
{
    return make_float4(o.x * w, o.y * w, o.z * w, o.w * w);
}

static __device__ __forceinline__ void fv_lean_add(float4 *sum, float w, float4 o)
{
    sum->x += w * o.x;
    sum->y += w * o.y;
    sum->z += w * o.z;
    sum->w += w * o.w;
}

/* 1 / l, and 0 for the empty set. */
static __device__ __forceinline__ float fv_lean_inverse(float l)
{
    return (l == 0.0F) ? 0.0F : (1.0F / l);
}

static __device__ __forceinline__ float fv_lean_weight(float m, float top)
{
    return fv_exp2(m - ((top == -INFINITY) ? 0.0F : top));
}

/* The last piece has come: all pieces of a cut group, in ascending order, become its rows. */
static __device__ void fv_lean_merge(const fv_lean_launch_t &p,
                                     const fv_lean_run_t &run,
                                     int32_t head,
                                     uint32_t first,
                                     uint32_t n_pieces)
{
    const int32_t dv = p.head_dim_v;
    const int32_t quads = dv / 4;
    const uint64_t slot_elems = (uint64_t)p.slot_rows * (uint64_t)dv;

    for (int32_t i = (int32_t)threadIdx.x; i < run.n_rows * quads; i += FV_LEAN_COMPUTE) {
        const int32_t row = i / quads;
        const int32_t col = (i - row * quads) * 4;
        float top = -INFINITY;
        float l = 0.0F;
        float4 o = make_float4(0.0F, 0.0F, 0.0F, 0.0F);

#pragma unroll 8
        for (uint32_t piece = 0; piece < n_pieces; piece++) {
            const uint64_t slot = 2U * (uint64_t)(first + piece) + ((piece == 0) ? 1U : 0U);

            top = fmaxf(top, __ldcg(p.slot_ml + slot * 2U * (uint64_t)p.slot_rows + row));
        }
#pragma unroll 8
        for (uint32_t piece = 0; piece < n_pieces; piece++) {
            const uint64_t slot = 2U * (uint64_t)(first + piece) + ((piece == 0) ? 1U : 0U);
            const float *ml = p.slot_ml + slot * 2U * (uint64_t)p.slot_rows + row;
            const float w = fv_lean_weight(__ldcg(ml), top);

            l += w * __ldcg(ml + p.slot_rows);
            fv_lean_add(
                &o, w,
                __ldcg((const float4 *)(p.slot_o + slot * slot_elems + (uint64_t)row * dv + col)));
        }
        fv_lean_write(run, head, row, dv, col, fv_lean_scale(o, fv_lean_inverse(l)),
                      top + log2f(l));
    }
}

/* Where the piece goes, and how many pieces its group has. */
typedef struct fv_lean_piece_place {
    uint32_t first;    /* share in which the group begins */
    uint32_t n_pieces; /* 1: whole */
    uint64_t slot;
} fv_lean_piece_place_t;

static __device__ __forceinline__ fv_lean_piece_place_t fv_lean_place(const fv_lean_launch_t &p,
                                                                      const fv_lean_run_t &run,
                                                                      const fv_lean_walk_t &walk,
                                                                      int32_t n_tiles)
{
    fv_lean_piece_place_t place = {0, 1, 0};

    if (n_tiles < run.n_tiles) {
        const uint32_t begin = run.line_begin + (uint32_t)walk.head * (uint32_t)run.n_tiles;

        place.first = fv_lean_cuda_share_of(p.share_tiles, p.share_rest, begin);
        place.n_pieces =
            fv_lean_cuda_share_of(p.share_tiles, p.share_rest, begin + (uint32_t)run.n_tiles - 1U) -
            place.first + 1U;
        place.slot = 2U * (uint64_t)blockIdx.x + ((walk.tile == 0) ? 1U : 0U);
    }
    return place;
}

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
                                                     const fv_lean_walk_t &walk,
                                                     int32_t n_tiles)
{
    const uint32_t warp = threadIdx.x >> 5U;
    const uint32_t lane = threadIdx.x & 31U;
    const uint32_t row = (warp / M_WARPS) * 16U * M_WARPS + (warp % M_WARPS) * 16U + (lane >> 2U);
    const fv_lean_piece_place_t place = fv_lean_place(p, s->run, walk, n_tiles);

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
    __threadfence(); /* the piece before the counter */
    fv_bar_sync(1, FV_LEAN_COMPUTE);
    if (threadIdx.x == 0) {
        s->is_last = (atomicAdd(p.arrived + place.first, 1U) + 1U == place.n_pieces) ? 1U : 0U;
        if (s->is_last != 0) {
            p.arrived[place.first] = 0; /* for the next launch */
        }
        __threadfence(); /* the counter before the other pieces */
    }
    fv_bar_sync(1, FV_LEAN_COMPUTE);
    if (s->is_last != 0) {
        fv_lean_merge(p, s->run, walk.head, place.first, place.n_pieces);
    }
}

#endif /* FV_KERNELS_LEAN_OUT_CUH */
