/*
 * lean_merge.cuh - groups that shares' borders cut: their pieces wait in slots and are merged, early or late.
 *
 * Decode path: station 7 of 10. Before: lean_out.cuh. After: lean_write.cuh.
 *
 * Pieces are unnormalised (O, m, l). Early and late (lean_cuda.h) run the same unit of work, a stretch of a group's
 * columns in row-major order, done by one team: `split` threads share four columns, each of them takes every split-th
 * piece, all loads of a batch under way at once, and then their sums are joined. The order of all sums follows from the plan, so the
 * result is the same whoever merges. Counters go back to zero for the next launch: early by the last arriver, late
 * by the unit that is the last to have seen the group complete.
 */
#ifndef FV_KERNELS_LEAN_MERGE_CUH
#define FV_KERNELS_LEAN_MERGE_CUH

#include "kernels/lean_write.cuh"

#define FV_LEAN_AT_ONCE 12U /* pieces of one thread under way */

/* A group with all its pieces. */
typedef struct fv_lean_group {
    int32_t head;
    uint32_t first; /* share in which it begins */
    uint32_t n_pieces;
} fv_lean_group_t;

static __device__ __forceinline__ uint64_t fv_lean_piece_slot(uint32_t first, uint32_t piece)
{
    return 2U * (uint64_t)(first + piece) + ((piece == 0) ? 1U : 0U);
}

/* Some pieces' sum at four columns of a row. */
typedef struct fv_lean_sum {
    float4 o;
    float m, l;
} fv_lean_sum_t;

/* Pieces at, at + stride, ... of n join the sum: loads first, then arithmetic, without branches between. */
static __device__ __forceinline__ void fv_lean_sum_batch(fv_lean_sum_t *sum,
                                                         const float *o,
                                                         const float *ml,
                                                         uint64_t o_slot,
                                                         uint64_t ml_slot,
                                                         const fv_lean_group_t &group,
                                                         uint32_t at,
                                                         uint32_t stride)
{
    float4 piece_o[FV_LEAN_AT_ONCE];
    float2 piece_ml[FV_LEAN_AT_ONCE];
    float top = sum->m;

#pragma unroll
    for (uint32_t i = 0; i < FV_LEAN_AT_ONCE; i++) {
        const uint32_t piece = at + i * stride;
        const uint64_t slot = fv_lean_piece_slot(group.first, piece);
        const bool is_there = piece < group.n_pieces;

        piece_o[i] = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
        piece_ml[i] = make_float2(-INFINITY, 0.0F);
        fv_load2_if(&piece_ml[i], ml + slot * ml_slot, is_there);
        fv_load4_if(&piece_o[i], o + slot * o_slot, is_there);
    }
#pragma unroll
    for (uint32_t i = 0; i < FV_LEAN_AT_ONCE; i++) {
        top = fmaxf(top, piece_ml[i].x);
    }
    const float alpha = fv_lean_weight(sum->m, top);

    sum->o = fv_lean_scale(sum->o, alpha);
    sum->l *= alpha;
    sum->m = top;
#pragma unroll
    for (uint32_t i = 0; i < FV_LEAN_AT_ONCE; i++) {
        const float w = fv_lean_weight(piece_ml[i].x, top);

        sum->l += w * piece_ml[i].y;
        fv_lean_add(&sum->o, w, piece_o[i]);
    }
}

static __device__ __forceinline__ void fv_lean_sum_join(fv_lean_sum_t *sum,
                                                        const fv_lean_sum_t &more)
{
    const float top = fmaxf(sum->m, more.m);
    const float w = fv_lean_weight(sum->m, top);
    const float w_more = fv_lean_weight(more.m, top);

    sum->o = fv_lean_scale(sum->o, w);
    fv_lean_add(&sum->o, w_more, more.o);
    sum->l = sum->l * w + more.l * w_more;
    sum->m = top;
}

/* Sums of the lanes whose numbers differ in bit `lanes`. */
static __device__ __forceinline__ void fv_lean_sum_lanes(fv_lean_sum_t *sum, int lanes)
{
    fv_lean_sum_t more;

    more.o.x = __shfl_xor_sync(0xffffffffU, sum->o.x, lanes);
    more.o.y = __shfl_xor_sync(0xffffffffU, sum->o.y, lanes);
    more.o.z = __shfl_xor_sync(0xffffffffU, sum->o.z, lanes);
    more.o.w = __shfl_xor_sync(0xffffffffU, sum->o.w, lanes);
    more.m = __shfl_xor_sync(0xffffffffU, sum->m, lanes);
    more.l = __shfl_xor_sync(0xffffffffU, sum->l, lanes);
    fv_lean_sum_join(sum, more);
}

/* One thread: waits until the late group is complete. */
static __device__ __forceinline__ void fv_lean_await(const fv_lean_launch_t &p,
                                                     const fv_lean_late_t &late)
{
    while (fv_load_acquire(p.arrived + late.first) < late.n_pieces * p.n_cluster) {
    }
}

/* One thread: a unit has seen the group complete. The last of them puts the counter back. */
static __device__ __forceinline__ void fv_lean_depart(const fv_lean_launch_t &p,
                                                      const fv_lean_late_t &late)
{
    uint32_t *counter = p.arrived + late.first;

    if (atomicAdd(counter, 1U) + 1U == late.n_pieces * p.n_cluster + late.n_units) {
        *counter = 0;
    }
}

/* The team's sums of 8 x 4 columns, one for each warp, become one in the first warp's lanes 0 to 7. */
static __device__ __forceinline__ void fv_lean_sum_warps(fv_lean_sum_t *sum, fv_lean_smem_t *s)
{
    float4(*o)[8] = s->part_o[fv_lean_team()];
    float2(*ml)[8] = s->part_ml[fv_lean_team()];
    const uint32_t lane = threadIdx.x & 31U;

    if (lane < 8U) {
        o[fv_lean_warp()][lane] = sum->o;
        ml[fv_lean_warp()][lane] = make_float2(sum->m, sum->l);
    }
    fv_lean_sync_team();
    if (fv_lean_thread() < 8U) {
#pragma unroll
        for (int w = 1; w < FV_LEAN_WARPS; w++) {
            fv_lean_sum_join(sum, {o[w][lane], ml[w][lane].x, ml[w][lane].y});
        }
    }
}

/*
 * One team: columns of 4 from quad0 on, FV_LEAN_UNIT_THREADS / split of them. Its pieces are there, or are waited for
 * as `late` says. 4 threads that share columns are 8 lanes apart, 16 are in all four warps.
 */
static __device__ __noinline__ void fv_lean_merge_unit(const fv_lean_launch_t &p,
                                                       fv_lean_smem_t *s,
                                                       const fv_lean_run_t &run,
                                                       const fv_lean_group_t &group,
                                                       uint32_t quad0,
                                                       uint32_t split,
                                                       const fv_lean_late_t *late)
{
    const uint32_t thread = fv_lean_thread();
    const uint32_t lane = thread & 31U;
    const uint32_t own =
        (split == 1U) ? thread : ((lane & 7U) + ((split == 4U) ? (fv_lean_warp() * 8U) : 0U));
    const uint32_t share =
        (split == 1U) ? 0U : ((lane >> 3U) + ((split == 4U) ? 0U : (fv_lean_warp() * 4U)));
    const uint32_t quads = (uint32_t)p.head_dim_v / 4U;
    const bool is_there = quad0 + own < (uint32_t)run.n_rows * quads;
    const uint32_t row = is_there ? ((quad0 + own) / quads) : 0U;
    const uint32_t col = is_there ? ((quad0 + own - row * quads) * 4U) : 0U;
    const float *o = p.slot_o + (uint64_t)row * (uint64_t)p.head_dim_v + col;
    const fv_lean_target_t target =
        fv_lean_find_target(run, group.head, (int32_t)row, p.head_dim_v);
    fv_lean_sum_t sum = {make_float4(0.0F, 0.0F, 0.0F, 0.0F), -INFINITY, 0.0F};

    if (late != NULL) {
        if (thread == 0) {
            fv_lean_await(p, *late);
        }
        fv_lean_sync_team();
        FV_LEAN_MARK(p, 5);
        if (thread == 96U) { /* beside the merging, not before it */
            fv_lean_depart(p, *late);
        }
    }
    for (uint32_t at = share; is_there && (at < group.n_pieces); at += split * FV_LEAN_AT_ONCE) {
        fv_lean_sum_batch(&sum, o, p.slot_ml + 2U * row,
                          (uint64_t)p.slot_rows * (uint64_t)p.head_dim_v,
                          2U * (uint64_t)p.slot_rows, group, at, split);
    }
    if (split > 1U) {
        fv_lean_sum_lanes(&sum, 8);
        fv_lean_sum_lanes(&sum, 16);
    }
    if (split > 4U) {
        fv_lean_sum_warps(&sum, s);
    }
    if (is_there && ((split == 1U) || (lane < 8U)) && ((split <= 4U) || (thread < 8U))) {
        fv_lean_write(target, (int32_t)col, fv_lean_scale(sum.o, fv_lean_inverse(sum.l)));
        if (col == 0) {
            fv_lean_write_lse(target, sum.m + log2f(sum.l));
        }
    }
}

/* The first team: the piece is in its slot, for all its threads: it is counted. n_pieces as in the share. */
static __device__ __forceinline__ void
fv_lean_arrive(const fv_lean_launch_t &p, fv_lean_smem_t *s, const fv_lean_group_t &cut)
{
    const fv_lean_group_t group = {cut.head, cut.first, cut.n_pieces & ~FV_LEAN_LATE};
    uint32_t *counter = p.arrived + cut.first;

    fv_lean_sync_team(); /* all have written */
    if ((cut.n_pieces & FV_LEAN_LATE) != 0) {
        if (threadIdx.x == 0) {
            fv_add_release(counter);
        }
        return;
    }
    if (threadIdx.x == 0) {
        s->is_last = (fv_add_acq_rel(counter) + 1U == group.n_pieces) ? 1U : 0U;
        if (s->is_last != 0) {
            *counter = 0;
        }
    }
    fv_lean_sync_team();
    if (s->is_last == 0) {
        return;
    }
    for (uint32_t quad = 0; quad < (uint32_t)(s->run.n_rows * p.head_dim_v / 4);
         quad += FV_LEAN_UNIT_THREADS) {
        fv_lean_merge_unit(p, s, s->run, group, quad, 1U, NULL);
    }
}

/* This CTA has no more shares: each team's units of the late groups. Of the first all is in shared memory already. */
template <int TEAMS>
static __device__ __forceinline__ void fv_lean_merge_late(const fv_lean_launch_t &p,
                                                          fv_lean_smem_t *s)
{
    const uint32_t team = fv_lean_team();
    fv_lean_late_t *late = &s->late[team];
    fv_lean_run_t *run = &s->late_run[team];

    for (uint32_t u = blockIdx.x + team * p.n_ctas; u < p.n_late_units; u += TEAMS * p.n_ctas) {
        if (u >= TEAMS * p.n_ctas) {
            const uint32_t at = fv_lean_find_late(p, u);

            fv_lean_sync_team(); /* all are done with the unit before */
            if (fv_lean_thread() == 0) {
                *late = p.late[at];
            }
            for (uint32_t i = fv_lean_thread(); i < sizeof(fv_lean_run_t) / 8U; i += FV_LEAN_TEAM) {
                ((uint64_t *)run)[i] = ((const uint64_t *)(p.runs + p.late[at].run))[i];
            }
            fv_lean_sync_team();
        }
        const fv_lean_group_t group = {late->head, late->first, late->n_pieces};
        const uint32_t n_own = FV_LEAN_UNIT_THREADS / late->split;

        fv_lean_merge_unit(p, s, *run, group, (u - late->unit_begin) * n_own, late->split, late);
    }
}

#endif /* FV_KERNELS_LEAN_MERGE_CUH */
