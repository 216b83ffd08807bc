/*
 * prefill_kernel.cuh - attention of many rows over the paged cache, on the warpgroup's tensor cores: the persistent kernel.
 *
 * Station 7 of 10. Before: prefill_plan_cuda.c plans and launches. After: prefill_out.cuh writes the results.
 *
 * Source: FlashAttention-3, arXiv:2407.08608, whose two ideas are here:
 *   - the two computing warpgroups take turns: named barriers let one issue its products while the other does its
 *     softmax (fv_prefill_my_turn, fv_prefill_your_turn);
 *   - within a warpgroup S of tile j is computed while O takes up tile j - 1, whose weights are in registers.
 *
 *     warpgroup 0    brings (prefill_load.cuh)
 *     warpgroup 1, 2 rows [0, 64), [64, 128) of the unit
 */
#ifndef FV_KERNELS_PREFILL_KERNEL_CUH
#define FV_KERNELS_PREFILL_KERNEL_CUH

#include "kernels/prefill_load.cuh"
#include "kernels/prefill_out.cuh"
#include "kernels/prefill_scan.cuh"

/* What a computing warpgroup keeps from unit to unit. */
typedef struct fv_prefill_worker {
    fv_prefill_ring_t k, v;
    uint32_t group; /* 0 or 1 */
} fv_prefill_worker_t;

static __device__ __forceinline__ void fv_prefill_my_turn(uint32_t group)
{
    fv_bar_sync(1 + (int)group, FV_PREFILL_GROUPS * FV_WARPGROUP);
}

static __device__ __forceinline__ void fv_prefill_your_turn(uint32_t group)
{
    fv_bar_arrive(2 - (int)group, FV_PREFILL_GROUPS * FV_WARPGROUP);
}

template <typename SHAPE>
static __device__ __forceinline__ uint64_t fv_prefill_k_desc(uint8_t *memory, uint32_t slot)
{
    return fv_wgmma_desc(fv_smem(fv_prefill_k<SHAPE>(memory, slot)), 8U * FV_PANEL_ROW_BYTES, 16U);
}

template <typename SHAPE>
static __device__ __forceinline__ uint64_t fv_prefill_v_desc(uint8_t *memory, uint32_t slot)
{
    return fv_wgmma_desc(fv_smem(fv_prefill_v<SHAPE>(memory, slot)), 8U * FV_PANEL_ROW_BYTES,
                         FV_PANEL_BYTES);
}

/* S as the product left it: cap, mask, softmax. */
template <typename SHAPE>
static __device__ __forceinline__ void fv_prefill_weigh(float *sc,
                                                        fv_prefill_state<SHAPE> &state,
                                                        const fv_prefill_tile_t &tile,
                                                        const fv_lean_run_t &run,
                                                        float alpha[2])
{
    if (run.cap_inner != 0.0F) {
        fv_prefill_cap<SHAPE>(sc, run.cap_inner, run.cap_outer);
    }
    if (tile.is_masked != 0) {
        fv_prefill_mask<SHAPE>(sc, tile, run, state.t);
    }
    fv_prefill_softmax<SHAPE>(sc, state, alpha);
}

/* O has taken up the tile at worker.v: what of its V was kept back is added, and the slot is free. */
template <typename SHAPE>
static __device__ __forceinline__ void fv_prefill_done(const fv_prefill_launch_t &p,
                                                       fv_prefill_smem_t *s,
                                                       fv_prefill_worker_t &worker,
                                                       fv_prefill_state<SHAPE> &state,
                                                       const fv_lean_run_t &run)
{
    const fv_prefill_tile_t &tile = s->tile[worker.v.count % FV_PREFILL_TILES];

    if (tile.is_spoiled != 0) {
        fv_prefill_spoil<SHAPE>(state, tile, run, p.arena);
    }
    fv_prefill_release(&s->v_empty[worker.v.slot]);
    fv_prefill_next<SHAPE::STAGES>(&worker.v);
}

/* All tiles of a unit. */
template <typename SHAPE>
static __device__ __forceinline__ void fv_prefill_tiles(const fv_prefill_launch_t &p,
                                                        fv_prefill_smem_t *s,
                                                        uint8_t *memory,
                                                        fv_prefill_worker_t &worker,
                                                        fv_prefill_state<SHAPE> &state,
                                                        const fv_lean_run_t &run,
                                                        int32_t n_tiles)
{
    const uint64_t q_desc = fv_wgmma_desc(fv_smem(memory) + worker.group * 64U * FV_PANEL_ROW_BYTES,
                                          8U * FV_PANEL_ROW_BYTES, 16U);
    float sc[SHAPE::N_TOKENS / 2];
    float alpha[2];

    fv_mbar_wait(&s->k_full[worker.k.slot], worker.k.parity);
    fv_wgmma_fence();
    fv_prefill_scores<SHAPE>(sc, q_desc, fv_prefill_k_desc<SHAPE>(memory, worker.k.slot));
    fv_wgmma_commit();
    fv_wgmma_wait<0>();
    fv_prefill_release(&s->k_empty[worker.k.slot]);
    if (n_tiles == 1) {
        fv_prefill_release(&s->q_empty);
    }
    fv_prefill_weigh<SHAPE>(sc, state, s->tile[worker.k.count % FV_PREFILL_TILES], run, alpha);
    fv_prefill_next<SHAPE::STAGES>(&worker.k);
    fv_prefill_pack<SHAPE>(state, sc);
#pragma unroll 1
    for (int32_t i = 1; i < n_tiles; i++) {
        fv_mbar_wait(&s->k_full[worker.k.slot], worker.k.parity);
        fv_prefill_my_turn(worker.group);
        fv_wgmma_fence();
        fv_prefill_scores<SHAPE>(sc, q_desc, fv_prefill_k_desc<SHAPE>(memory, worker.k.slot));
        fv_wgmma_commit();
        fv_mbar_wait(&s->v_full[worker.v.slot], worker.v.parity);
        fv_wgmma_fence();
        fv_prefill_values<SHAPE>(state, fv_prefill_v_desc<SHAPE>(memory, worker.v.slot));
        fv_wgmma_commit();
        fv_prefill_your_turn(worker.group);
        fv_wgmma_wait<1>();
        fv_prefill_release(&s->k_empty[worker.k.slot]);
        if (i == n_tiles - 1) {
            fv_prefill_release(&s->q_empty);
        }
        fv_prefill_weigh<SHAPE>(sc, state, s->tile[worker.k.count % FV_PREFILL_TILES], run, alpha);
        fv_prefill_next<SHAPE::STAGES>(&worker.k);
        fv_wgmma_wait<0>();
        fv_prefill_done<SHAPE>(p, s, worker, state, run);
        fv_prefill_pack<SHAPE>(state, sc);
        fv_prefill_rescale<SHAPE>(state, alpha);
    }
    fv_mbar_wait(&s->v_full[worker.v.slot], worker.v.parity);
    fv_wgmma_fence();
    fv_prefill_values<SHAPE>(state, fv_prefill_v_desc<SHAPE>(memory, worker.v.slot));
    fv_wgmma_commit();
    fv_wgmma_wait<0>();
    fv_prefill_done<SHAPE>(p, s, worker, state, run);
}

template <typename SHAPE>
static __device__ void
fv_prefill_compute(const fv_prefill_launch_t &p, fv_prefill_smem_t *s, uint8_t *memory)
{
    fv_prefill_worker_t worker = {};
    const uint32_t warp = threadIdx.x / 32U - 4U;
    const int32_t row0 = (int32_t)warp * 16;

    worker.group = warp / 4U;
    if (worker.group == 1U) {
        fv_prefill_your_turn(1); /* the first turn is the first group's */
    }
    for (uint32_t n = 0;; n++) {
        fv_mbar_wait(&s->q_full, n & 1U);
        const fv_prefill_unit_t unit = s->unit[n & 1U];
        const fv_lean_run_t &run = s->run[n & 1U];
        fv_prefill_state<SHAPE> state;

        if (unit.n_tiles < 0) {
            break;
        }
        state.scale = run.score_scale;
#pragma unroll
        for (int i = 0; i < SHAPE::DV / 2; i++) {
            state.o[i] = 0.0F;
        }
#pragma unroll
        for (int side = 0; side < 2; side++) {
            const int32_t row = row0 + (int32_t)((threadIdx.x & 31U) >> 2U) + 8 * side;

            state.m[side] = -INFINITY;
            state.l[side] = 0.0F;
            state.t[side] = (unit.row_begin + min(row, unit.n_rows - 1)) / run.group;
        }
        if (unit.n_tiles > 0) {
            fv_prefill_tiles<SHAPE>(p, s, memory, worker, state, run, unit.n_tiles);
        } else {
            fv_prefill_release(&s->q_empty);
        }
        fv_prefill_write<SHAPE>(state, run, unit, row0);
    }
    if (worker.group == 0U) {
        fv_prefill_my_turn(0); /* as many turns given as taken */
    }
}

/* ------------------------------------------------------------------ the kernel */

template <typename SHAPE>
static __device__ __forceinline__ void fv_prefill_init(fv_prefill_smem_t *s)
{
    for (int i = 0; i < SHAPE::STAGES; i++) {
        fv_mbar_init(&s->k_full[i], 1);
        fv_mbar_init(&s->k_empty[i], FV_PREFILL_WARPS);
        fv_mbar_init(&s->v_full[i], 1);
        fv_mbar_init(&s->v_empty[i], FV_PREFILL_WARPS);
        fv_mbar_init(&s->v_raw[i], 1);
    }
    for (int i = 0; i < 2; i++) {
        fv_mbar_init(&s->unit_full[i], 1);
        fv_mbar_init(&s->unit_empty[i], FV_PREFILL_Q_WARPS + 1);
    }
    for (int i = 0; i < FV_PREFILL_TILES; i++) {
        fv_mbar_init(&s->scan_full[i], 1);
    }
    fv_mbar_init(&s->q_full, FV_PREFILL_Q_WARPS);
    fv_mbar_init(&s->q_empty, FV_PREFILL_WARPS);
    fv_mbar_init_fence();
}

template <typename SHAPE>
static __global__ void __launch_bounds__(FV_PREFILL_THREADS, 1)
    fv_prefill_kernel(const __grid_constant__ fv_prefill_launch_t p)
{
#if FV_HAS_WGMMA /* else the host launches none */
    extern __shared__ __align__(1024) uint8_t memory[];
    fv_prefill_smem_t *s = (fv_prefill_smem_t *)(memory + SHAPE::DATA_BYTES);

    if (threadIdx.x == 0) {
        fv_prefill_init<SHAPE>(s);
    }
    __syncthreads();
    fv_wait_for_prior_launch();
    if (threadIdx.x < FV_WARPGROUP) {
        const uint32_t warp = threadIdx.x / 32U;

        fv_registers_fewer<40>();
        if (warp == 0) {
            fv_prefill_copy<SHAPE>(p, s, memory);
        } else if (warp == 1) {
            fv_prefill_scan<SHAPE>(s, memory);
        } else {
            fv_prefill_bring_q<SHAPE>(p, s, memory, threadIdx.x - 64U);
        }
    } else {
        fv_registers_more<232>();
        fv_prefill_compute<SHAPE>(p, s, memory);
    }
#endif
}

#endif /* FV_KERNELS_PREFILL_KERNEL_CUH */
