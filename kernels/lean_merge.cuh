/*
 * lean_merge.cuh - groups that shares' borders cut: pieces wait in slots, and the last to come merges them.
 *
 * Decode path: station 7 of 10. Before: lean_out.cuh. After: lean_write.cuh.
 *
 * Each piece goes to its share's slot, unnormalised; then a counter goes up. Whoever brings the last piece reads all of
 * them in ascending order of tiles and writes the rows: nobody waits for anybody, so CTAs need not be resident
 * together, and the order, so the result, is always the same. A group of many pieces is merged level by level: chunks
 * of neighbouring pieces first, each by its own last arriver (side by side), then the chunks' results in the same way.
 * Whoever finds a counter full puts it back to zero for the next launch.
 */
#ifndef FV_KERNELS_LEAN_MERGE_CUH
#define FV_KERNELS_LEAN_MERGE_CUH

#include "kernels/lean_write.cuh"

#define FV_LEAN_FLAT_MAX   40U /* pieces merged in one level */
#define FV_LEAN_CHUNK      17U /* pieces of a chunk; 17^3 is more than there can be */
#define FV_LEAN_AT_ONCE    18U /* loads of one thread under way */
#define FV_LEAN_PASS_ELEMS (FV_LEAN_WARPS * FV_LEAN_PASS_ROWS * FV_LEAN_PASS_PITCH)

/* Where the piece goes, and how many pieces its group has. */
typedef struct fv_lean_piece_place {
    uint32_t share;    /* that does it */
    uint32_t first;    /* share in which the group begins */
    uint32_t n_pieces; /* 1: whole */
    uint64_t slot;     /* of this one */
} fv_lean_piece_place_t;

static __device__ __forceinline__ fv_lean_piece_place_t fv_lean_place(const fv_lean_share_t &share,
                                                                      const fv_lean_run_t &run,
                                                                      const fv_lean_walk_t &walk,
                                                                      int32_t n_tiles)
{
    fv_lean_piece_place_t place = {share.index, 0, 1, 0};

    if (walk.tile > 0) {
        place.first = share.first;
        place.n_pieces = share.n_first;
        place.slot = 2U * (uint64_t)share.index;
    } else if (n_tiles < run.n_tiles) {
        place.first = share.index;
        place.n_pieces = share.n_last;
        place.slot = 2U * (uint64_t)share.index + 1U;
    }
    return place;
}

/* Pieces first, first + stride, ... of a group that are merged together. */
typedef struct fv_lean_pieces {
    uint32_t share; /* in which the group begins */
    uint32_t first, stride, n;
} fv_lean_pieces_t;

static __device__ __forceinline__ uint64_t fv_lean_piece_slot(const fv_lean_pieces_t &pieces,
                                                              uint32_t i)
{
    const uint32_t piece = pieces.first + i * pieces.stride;

    return 2U * (uint64_t)(pieces.share + piece) + ((piece == 0) ? 1U : 0U);
}

/* Weights 2^(m - top) of each piece and row to s->pass [n, n_rows], top and sum of l to s->m, s->l. */
static __device__ __forceinline__ void
fv_lean_merge_weights(const fv_lean_launch_t &p, fv_lean_smem_t *s, const fv_lean_pieces_t &pieces)
{
    const uint32_t n_rows = (uint32_t)s->run.n_rows;
    float *m = &s->pass[0][0][0];
    float *l = m + FV_LEAN_PASS_ELEMS / 2;

    for (uint32_t i = threadIdx.x; i < pieces.n * n_rows; i += FV_LEAN_COMPUTE) {
        const uint32_t piece = i / n_rows;
        const float *ml = p.slot_ml +
                          fv_lean_piece_slot(pieces, piece) * 2U * (uint64_t)p.slot_rows + i -
                          piece * n_rows;

        m[i] = __ldcg(ml);
        l[i] = __ldcg(ml + p.slot_rows);
    }
    fv_bar_sync(1, FV_LEAN_COMPUTE);
    for (uint32_t row = threadIdx.x >> 5U; row < n_rows; row += FV_LEAN_WARPS) {
        float top = -INFINITY;
        float sum = 0.0F;

        for (uint32_t i = threadIdx.x & 31U; i < pieces.n; i += 32U) {
            top = fmaxf(top, m[i * n_rows + row]);
        }
#pragma unroll
        for (int lane = 16; lane > 0; lane /= 2) {
            top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, lane));
        }
        for (uint32_t i = threadIdx.x & 31U; i < pieces.n; i += 32U) {
            const float w = fv_lean_weight(m[i * n_rows + row], top);

            m[i * n_rows + row] = w;
            sum += w * l[i * n_rows + row];
        }
#pragma unroll
        for (int lane = 16; lane > 0; lane /= 2) {
            sum += __shfl_xor_sync(0xffffffffU, sum, lane);
        }
        if ((threadIdx.x & 31U) == 0) {
            s->m[row] = top;
            s->l[row] = sum;
        }
    }
    fv_bar_sync(1, FV_LEAN_COMPUTE);
}

/* All of `pieces` are there: they become rows of the result, or one piece in the first one's slot. */
static __device__ __noinline__ void fv_lean_merge(const fv_lean_launch_t &p,
                                                  fv_lean_smem_t *s,
                                                  int32_t head,
                                                  const fv_lean_pieces_t &pieces,
                                                  bool is_final)
{
    const int32_t dv = p.head_dim_v;
    const int32_t quads = dv / 4;
    const uint64_t slot_elems = (uint64_t)p.slot_rows * (uint64_t)dv;
    const uint64_t out = fv_lean_piece_slot(pieces, 0);
    const float *weights = &s->pass[0][0][0];

    fv_lean_merge_weights(p, s, pieces);
    for (int32_t i = (int32_t)threadIdx.x; i < s->run.n_rows * quads; i += FV_LEAN_COMPUTE) {
        const int32_t row = i / quads;
        const int32_t col = (i - row * quads) * 4;
        const float *o_row = p.slot_o + (uint64_t)row * (uint64_t)dv + col;
        float4 sum = make_float4(0.0F, 0.0F, 0.0F, 0.0F);

        for (uint32_t j0 = 0; j0 < pieces.n; j0 += FV_LEAN_AT_ONCE) {
            float4 o[FV_LEAN_AT_ONCE];

#pragma unroll
            for (uint32_t j = 0; j < FV_LEAN_AT_ONCE; j++) { /* no branch between loads */
                const uint64_t slot = fv_lean_piece_slot(pieces, min(j0 + j, pieces.n - 1U));

                o[j] = __ldcg((const float4 *)(o_row + slot * slot_elems));
            }
#pragma unroll
            for (uint32_t j = 0; j < FV_LEAN_AT_ONCE; j++) {
                const uint32_t i_piece = min(j0 + j, pieces.n - 1U);
                const float w = weights[i_piece * (uint32_t)s->run.n_rows + (uint32_t)row];
                const bool is_there = j0 + j < pieces.n;

                sum.x += is_there ? (w * o[j].x) : 0.0F;
                sum.y += is_there ? (w * o[j].y) : 0.0F;
                sum.z += is_there ? (w * o[j].z) : 0.0F;
                sum.w += is_there ? (w * o[j].w) : 0.0F;
            }
        }
        if (is_final) {
            fv_lean_write(s->run, head, row, dv, col,
                          fv_lean_scale(sum, fv_lean_inverse(s->l[row])),
                          s->m[row] + log2f(s->l[row]));
            continue;
        }
        *(float4 *)(p.slot_o + out * slot_elems + (uint64_t)row * (uint64_t)dv + col) = sum;
        if (col == 0) {
            float *ml = p.slot_ml + out * 2U * (uint64_t)p.slot_rows + row;

            ml[0] = s->m[row];
            ml[p.slot_rows] = s->l[row];
        }
    }
}

/* What this thread block wrote is there for all; true for the CTA that is the n-th at the counter. */
static __device__ __forceinline__ bool
fv_lean_is_last(fv_lean_smem_t *s, uint32_t *counter, uint32_t n)
{
    __threadfence(); /* what was written, before the counter */
    fv_bar_sync(1, FV_LEAN_COMPUTE);
    if (threadIdx.x == 0) {
        s->is_last = (atomicAdd(counter, 1U) + 1U == n) ? 1U : 0U;
        if (s->is_last != 0) {
            *counter = 0;
        }
        __threadfence(); /* the counter, before what others wrote */
    }
    fv_bar_sync(1, FV_LEAN_COMPUTE);
    return s->is_last != 0;
}

/* This CTA's piece is in its slot. Level by level, as long as it is the last to come. */
static __device__ __forceinline__ void fv_lean_arrive(const fv_lean_launch_t &p,
                                                      fv_lean_smem_t *s,
                                                      int32_t head,
                                                      const fv_lean_piece_place_t &place)
{
    const uint32_t fits = (uint32_t)FV_LEAN_PASS_ELEMS / 2U / (uint32_t)s->run.n_rows;
    uint32_t n = place.n_pieces;                /* of this level */
    uint32_t piece = place.share - place.first; /* this one, of the level's */
    uint32_t stride = 1;                        /* original pieces of one of the level's */
    uint32_t *arrived = p.arrived;

    for (;;) {
        const uint32_t chunk = (n <= min(fits, FV_LEAN_FLAT_MAX)) ? n : FV_LEAN_CHUNK;
        const uint32_t begin = piece / chunk * chunk;
        const fv_lean_pieces_t pieces = {place.first, begin * stride, stride,
                                         min(chunk, n - begin)};

        if (!fv_lean_is_last(s, arrived + fv_lean_piece_slot(pieces, 0), pieces.n)) {
            return;
        }
        fv_lean_merge(p, s, head, pieces, chunk == n);
        if (chunk == n) {
            return;
        }
        n = (n + chunk - 1U) / chunk;
        piece /= chunk;
        stride *= chunk;
        arrived += 2U * p.n_shares;
    }
}

#endif /* FV_KERNELS_LEAN_MERGE_CUH */
