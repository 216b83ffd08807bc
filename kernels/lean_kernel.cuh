/*
 * lean_kernel.cuh - lean (stream-K) attention over the paged cache: the persistent kernel of a step.
 *
 * Decode path: station 7 of 10. Before: attend_cuda.c plans and launches. After: lean_out.cuh writes the results.
 *
 * One CTA does shares of the line (lean_cuda.h). Its fifth warp (lean_copy.cuh) claims them, copies K and V of tile after
 * tile into a ring in shared memory and runs ahead over groups' borders; the other four compute, each on its own rows
 * and tokens:
 *
 *     m_warps rows x (4 / m_warps) tokens      16 rows, 16 m_warps tokens of every tile for each warp
 *
 * so a warp keeps (O, m, l) of its own (lean_tile.cuh) and meets the others only where a piece of a group ends
 * (lean_out.cuh), and where there is nothing left to do but merge (lean_merge.cuh).
 */
#ifndef FV_KERNELS_LEAN_KERNEL_CUH
#define FV_KERNELS_LEAN_KERNEL_CUH

#include "kernels/lean_copy.cuh"
#include "kernels/lean_out.cuh"
#include "kernels/lean_query.cuh"
#include "kernels/lean_tile.cuh"

/* What differs between kernels. */
template <int KIND_, int M_WARPS_, int DV_MAX_, bool IS_EXACT_> struct fv_lean_shape {
    static constexpr int KIND = KIND_, M_WARPS = M_WARPS_, DV_MAX = DV_MAX_;
    static constexpr bool IS_EXACT = IS_EXACT_;
    static constexpr int TEAMS = fv_lean_cuda_teams(M_WARPS_, IS_EXACT_);
    static constexpr int N_TILES = DV_MAX_ / 8;
};

/* What a computing thread keeps from share to share. */
typedef struct fv_lean_worker {
    fv_lean_ring_t ring;
    const fv_lean_run_t *run; /* whose description is in shared memory, or NULL */
    int32_t head;             /* of it, whose Q is there */
} fv_lean_worker_t;

/* The group at `walk` begins or goes on: its run and Q are there. */
template <typename SHAPE>
static __device__ __forceinline__ void fv_lean_load_group(fv_lean_worker_t &worker,
                                                          fv_lean_smem_t *s,
                                                          uint16_t *q_smem,
                                                          uint32_t dk,
                                                          const fv_lean_walk_t &walk,
                                                          const fv_lean_share_t &share)
{
    bool is_copied = false;

    if ((worker.run == walk.run) && (worker.head == walk.head)) {
        return;
    }
    fv_lean_sync<SHAPE::TEAMS>(); /* all are done with the run and the Q before */
    if (SHAPE::IS_EXACT && (share.n_q_rows > 0) && (walk.left == share.n_tiles)) {
        fv_lean_copy_q<SHAPE::M_WARPS, SHAPE::TEAMS, SHAPE::DV_MAX>(q_smem, share.q,
                                                                    share.n_q_rows);
        is_copied = true;
    }
    if (worker.run != walk.run) {
        fv_lean_load_run<SHAPE::TEAMS>(s, walk.run);
    }
    worker.run = walk.run;
    worker.head = walk.head;
    if (!is_copied) {
        fv_lean_load_q<SHAPE::KIND, SHAPE::M_WARPS, SHAPE::TEAMS>(s, q_smem, dk, walk.head);
    }
    fv_lean_sync<SHAPE::TEAMS>();
}

/* The groups of one share. Teams take turns with the tiles of each piece. */
template <typename SHAPE>
static __device__ __forceinline__ void fv_lean_compute_share(const fv_lean_launch_t &p,
                                                             fv_lean_smem_t *s,
                                                             uint16_t *q_smem,
                                                             float2 *dump,
                                                             const uint8_t *ring_data,
                                                             const fv_lean_share_t &share,
                                                             fv_lean_worker_t &worker)
{
    const uint32_t dk = SHAPE::IS_EXACT ? (uint32_t)SHAPE::DV_MAX : (uint32_t)p.head_dim_qk;
    const uint32_t q_warp =
        fv_smem(q_smem) + (fv_lean_warp() % SHAPE::M_WARPS) * 16U * fv_lean_q_pitch(dk) * 2U;
    fv_lean_walk_t walk = fv_lean_walk_begin(p, share);

    while (walk.left > 0) {
        fv_lean_load_group<SHAPE>(worker, s, q_smem, dk, walk, share);
        const int32_t n = min(walk.left, s->run.n_tiles - walk.tile);
        fv_lean_state<SHAPE::N_TILES> state = {};

        state.m[0] = -INFINITY;
        state.m[1] = -INFINITY;
        for (int32_t i = 0; (s->run.is_empty == 0) && (i < n); i++) {
            if ((SHAPE::TEAMS == 2) && ((uint32_t)(i & 1) != fv_lean_team())) {
                fv_lean_ring_next(&worker.ring, (uint32_t)p.ring_slots);
                fv_lean_ring_next(&worker.ring, (uint32_t)p.ring_slots);
                continue;
            }
            fv_lean_do_tile<SHAPE::KIND, SHAPE::M_WARPS, SHAPE::DV_MAX, SHAPE::IS_EXACT>(
                state, p, s, ring_data, &worker.ring, q_warp);
        }
        FV_LEAN_MARK(p, 2);
        fv_lean_store<SHAPE::M_WARPS, SHAPE::N_TILES, SHAPE::TEAMS>(p, s, dump, state.o, state.m,
                                                                    state.l, share, walk, n);
        fv_lean_walk_next(&walk, n, s->run.n_kv_heads);
    }
}

template <typename SHAPE>
static __device__ void fv_lean_compute(const fv_lean_launch_t &p,
                                       fv_lean_smem_t *s,
                                       uint16_t *q_smem,
                                       float2 *dump,
                                       const uint8_t *ring_data)
{
    fv_lean_worker_t worker = {};
    fv_lean_ring_t queue = {0, 0};

    for (;;) {
        fv_mbar_wait(&s->share_full[queue.slot], queue.parity);
        const fv_lean_share_t &share = s->share[queue.slot];

        if (share.n_tiles == 0) {
            break;
        }
        fv_lean_compute_share<SHAPE>(p, s, q_smem, dump, ring_data, share, worker);
        fv_lean_release(&s->share_empty[queue.slot]);
        fv_lean_ring_next(&queue, FV_LEAN_QUEUE);
    }
    fv_lean_merge_late<SHAPE::TEAMS>(p, s);
    FV_LEAN_MARK(p, 3);
}

/* ------------------------------------------------------------------ the kernel */

static __device__ __forceinline__ void
fv_lean_init(const fv_lean_launch_t &p, fv_lean_smem_t *s, uint32_t n_teams)
{
    for (int32_t i = 0; i < p.ring_slots; i++) {
        fv_mbar_init(&s->full[i], FV_HAS_SM90 ? 1 : 33); /* who describes it; who copies */
        fv_mbar_init(&s->empty[i], FV_LEAN_RELEASES);
    }
    for (int32_t i = 0; i < FV_LEAN_QUEUE; i++) {
        fv_mbar_init(&s->share_full[i], FV_LEAN_TELLS);
        fv_mbar_init(&s->share_empty[i], FV_LEAN_RELEASES * n_teams);
    }
    fv_mbar_init_fence();
}

template <typename SHAPE>
static __global__ void __launch_bounds__(
    32 * (FV_LEAN_WARPS * SHAPE::TEAMS + 1),
    fv_lean_cuda_ctas(SHAPE::KIND, SHAPE::M_WARPS, SHAPE::DV_MAX, SHAPE::IS_EXACT))
    fv_lean_kernel(const __grid_constant__ fv_lean_launch_t p)
{
    extern __shared__ __align__(128) uint8_t memory[];
    fv_lean_smem_t *s = (fv_lean_smem_t *)memory;
    float2 *dump = (float2 *)(memory + FV_LEAN_SMEM_FIXED);
    uint16_t *q_smem = (uint16_t *)(memory + FV_LEAN_SMEM_FIXED +
                                    fv_lean_join_bytes(SHAPE::M_WARPS, SHAPE::DV_MAX));
    uint8_t *ring_data =
        (uint8_t *)q_smem +
        fv_lean_q_bytes((uint32_t)p.head_dim_qk, 16U * SHAPE::M_WARPS, (uint32_t)p.n_q_parts);

    FV_LEAN_MARK(p, 0);
    if (threadIdx.x == 0) {
        fv_lean_init(p, s, SHAPE::TEAMS);
    }
    __syncthreads();
    fv_wait_for_prior_launch();
    if (threadIdx.x >= SHAPE::TEAMS * FV_LEAN_TEAM) {
        fv_lean_copy<SHAPE::TEAMS>(p, s, ring_data);
    } else {
        fv_lean_compute<SHAPE>(p, s, q_smem, dump, ring_data);
    }
}

#endif /* FV_KERNELS_LEAN_KERNEL_CUH */
