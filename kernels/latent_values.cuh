/*
 * latent_values.cuh - the two teams of O: each holds half of its columns of 64 rows, adds P C tile by tile, and writes them.
 *
 * Decode path: station 7 of 10, inside latent_kernel.cuh. Before: latent_scores.cuh. After: lean_write.cuh.
 */
#ifndef FV_KERNELS_LATENT_VALUES_CUH
#define FV_KERNELS_LATENT_VALUES_CUH

#include "kernels/latent_merge.cuh"
#include "kernels/latent_smem.cuh"

/* O of a thread: [chunk][n-tile of 8 columns][4]. */
template <typename SHAPE> struct fv_latent_sums {
    float o[SHAPE::STEPS][32 * SHAPE::STEP];
};

/* Weights of a tile: O = alpha O + P C. */
template <typename SHAPE>
static __device__ __forceinline__ void
fv_latent_add(const fv_latent_memory_t &at, fv_latent_sums<SHAPE> &sums, fv_lean_ring_t *ring)
{
    const uint32_t row = fv_lean_warp() * 16U + ((threadIdx.x & 31U) >> 2U);
    const bool is_kept = at.s->message.is_kept != 0;
    const bool is_early = at.s->message.is_early != 0;
    const float alpha[2] = {at.s->stat[0][row], at.s->stat[0][row + 8U]};
    const uint8_t *data = at.ring + ring->slot * SHAPE::TILE_BYTES;
    uint64_t *full = at.s->full + ring->slot * SHAPE::CHUNKS + fv_lean_team() * SHAPE::STEPS;
    uint64_t *empty = at.s->empty + ring->slot * SHAPE::CHUNKS + fv_lean_team() * SHAPE::STEPS;
    const uint64_t v =
        fv_wgmma_desc(fv_smem(data) + fv_lean_team() * (uint32_t)SHAPE::OWN * FV_PANEL_BYTES, 1024,
                      FV_PANEL_BYTES);
    uint32_t a[4][4];

#pragma unroll
    for (int step = 0; step < 4; step++) {
        fv_ldmatrix_x4(a[step], fv_latent_weights_at(at.weights, step));
    }
    if (is_early) {
        fv_lean_release(&at.s->heard);
    }
#pragma unroll
    for (int c = 0; c < SHAPE::STEPS; c++) {
        fv_mbar_wait(full + c, ring->parity);
    }
    if (__any_sync(0xffffffffU, !(alpha[0] == 1.0F) || !(alpha[1] == 1.0F))) {
#pragma unroll
        for (int c = 0; c < SHAPE::STEPS; c++) {
#pragma unroll
            for (int i = 0; i < 32 * SHAPE::STEP; i++) {
                sums.o[c][i] *= alpha[(i >> 1) & 1];
            }
        }
    }
    fv_wgmma_fence();
#pragma unroll
    for (int c = 0; c < SHAPE::STEPS; c++) {
#pragma unroll
        for (int step = 0; step < 4; step++) {
            fv_wgmma_rs<64 * SHAPE::STEP, SHAPE::IS_F16, true>(
                sums.o[c], a[step],
                fv_wgmma_desc_at(v, (uint32_t)(c * SHAPE::STEP) * FV_PANEL_BYTES +
                                        (uint32_t)step * 2048U),
                true);
        }
        fv_wgmma_commit();
    }
    if (SHAPE::STEPS == 2) {
        fv_wgmma_wait<1>();
        if (!is_kept) {
            fv_latent_release<SHAPE>(empty);
        }
    }
    fv_wgmma_wait<0>();
    if (!is_kept) {
        fv_latent_release<SHAPE>(empty + SHAPE::STEPS - 1);
        fv_latent_next<SHAPE>(ring);
    }
    if (!is_early) {
        fv_lean_release(&at.s->heard);
    }
}

/* One row of a piece: where it goes and what it is multiplied with. */
template <typename SHAPE>
static __device__ __forceinline__ fv_lean_target_t fv_latent_target(const fv_lean_launch_t &p,
                                                                    const fv_lean_run_t &run,
                                                                    const fv_latent_message_t &m,
                                                                    int32_t row)
{
    fv_lean_target_t target = {NULL, NULL, 1.0F, FV_DTYPE_F32};

    if (m.n_pieces == 1U) {
        return fv_lean_find_target(run, m.head, row, p.head_dim_v);
    }
    target.o = (uint8_t *)(p.slot_o + (m.slot * (uint64_t)p.slot_rows + (uint64_t)row) *
                                          (uint64_t)p.head_dim_v);
    return target;
}

/* A piece is done: whole rows leave normalised, to where the item wants them; pieces as they are, to their slot. */
template <typename SHAPE>
static __device__ __forceinline__ void fv_latent_leave(const fv_lean_launch_t &p,
                                                       const fv_latent_memory_t &at,
                                                       const fv_latent_sums<SHAPE> &sums)
{
    const uint32_t lane = threadIdx.x & 31U;
    const fv_latent_message_t m = at.s->message;
    const fv_lean_run_t &run = at.s->run[m.run];
    const bool is_whole = m.n_pieces == 1U;
    const bool is_odd = (lane & 1U) != 0;

#pragma unroll
    for (int side = 0; side < 2; side++) {
        const uint32_t own = fv_lean_warp() * 16U + (lane >> 2U) + (uint32_t)side * 8U;
        const int32_t row = fv_latent_row0<SHAPE>() + (int32_t)own;
        const bool is_there = row < run.n_rows;
        const float l = at.s->stat[1][own];
        const float scale = is_whole ? fv_lean_inverse(l) : 1.0F;
        const fv_lean_target_t target = fv_latent_target<SHAPE>(p, run, m, is_there ? row : 0);

#pragma unroll
        for (int c = 0; c < SHAPE::STEPS; c++) {
#pragma unroll
            for (int n = 0; n < 8 * SHAPE::STEP; n += 2) {
                /* of two n-tiles the even lane takes four columns of the first, the odd one of the second */
                const float *even = sums.o[c] + 4 * n + 2 * side;
                const float *odd = even + 4;
                const float x = __shfl_xor_sync(0xffffffffU, is_odd ? even[0] : odd[0], 1) * scale;
                const float y = __shfl_xor_sync(0xffffffffU, is_odd ? even[1] : odd[1], 1) * scale;
                const int32_t col = ((int32_t)fv_lean_team() * SHAPE::OWN + c * SHAPE::STEP) * 64 +
                                    (n + (is_odd ? 1 : 0)) * 8 + (int32_t)(lane & 2U) * 2;

                if (is_there) {
                    fv_lean_write(target, col,
                                  is_odd ? make_float4(x, y, odd[0] * scale, odd[1] * scale)
                                         : make_float4(even[0] * scale, even[1] * scale, x, y));
                }
            }
        }
        if (is_there && (fv_lean_team() == 0U) && ((lane & 3U) == 0)) {
            const float top = at.s->stat[0][own];

            if (is_whole) {
                fv_lean_write_lse(target, top + log2f(l));
            } else {
                *(float2 *)(p.slot_ml + 2U * (m.slot * (uint64_t)p.slot_rows + (uint64_t)row)) =
                    make_float2(top, l);
            }
        }
    }
    if (!is_whole) {
        const fv_lean_group_t group = {m.head, m.first, m.n_pieces};

        fv_latent_arrive(p, run, group, &at.s->is_last);
    }
}

template <typename SHAPE>
static __device__ __forceinline__ void fv_latent_values(const fv_lean_launch_t &p,
                                                        const fv_latent_memory_t &at)
{
    fv_latent_sums<SHAPE> sums = {};
    fv_lean_ring_t ring = {0, 0};
    fv_latent_late_t *late = (fv_latent_late_t *)at.weights + fv_lean_team();

    for (uint32_t told = 0;; told ^= 1U) {
        fv_mbar_wait(&at.s->told, told);
        const int32_t kind = at.s->message.kind;

        if (kind == FV_LATENT_END) {
            break;
        }
        if (kind == FV_LATENT_TILE) {
            fv_latent_add<SHAPE>(at, sums, &ring);
            continue;
        }
        fv_latent_leave<SHAPE>(p, at, sums);
        fv_lean_release(&at.s->heard);
#pragma unroll
        for (int c = 0; c < SHAPE::STEPS; c++) {
#pragma unroll
            for (int i = 0; i < 32 * SHAPE::STEP; i++) {
                sums.o[c][i] = 0.0F;
            }
        }
    }
    fv_lean_sync<2>(); /* nobody reads weights any more */
    fv_latent_merge_late(p, &late->late, &late->run);
}

#endif /* FV_KERNELS_LATENT_VALUES_CUH */
