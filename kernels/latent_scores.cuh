/*
 * latent_scores.cuh - the warpgroup of scores: S = Q C^T of each tile, softmax, and the weights' way to the teams of O.
 *
 * Decode path: station 7 of 10, inside latent_kernel.cuh. Before: latent_copy.cuh. After: latent_values.cuh.
 *
 * It keeps m and l of 64 rows, each thread those of rows 16 w + lane / 4 and 8 more. Weights go through one buffer, with
 * what O must be multiplied with before them; a message says so, and another one that a piece is done.
 */
#ifndef FV_KERNELS_LATENT_SCORES_CUH
#define FV_KERNELS_LATENT_SCORES_CUH

#include "kernels/latent_clean.cuh"
#include "kernels/lean_out.cuh"

/* What a thread keeps from share to share. */
typedef struct fv_latent_scorer {
    fv_lean_ring_t ring;
    uint32_t heard;           /* parity */
    uint32_t run_slot;        /* where the run is */
    const fv_lean_run_t *run; /* that is there, or NULL */
    int32_t head;
    float m[2], l[2];
} fv_latent_scorer_t;

/* 16 bytes to shared memory, zeros unless is_there; fv_async_wait() waits for all. */
static __device__ __forceinline__ void
fv_async_load(uint32_t dst, const uint8_t *src, bool is_there)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src),
                 "r"(is_there ? 16U : 0U)
                 : "memory");
}

static __device__ __forceinline__ void fv_async_wait()
{
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* Q of this CTA's rows: two threads a row. Rows that do not exist are zero. */
template <typename SHAPE>
static __device__ __forceinline__ void
fv_latent_load_q(const fv_lean_run_t &run, uint8_t *q_smem, int32_t head)
{
    const uint32_t thread = threadIdx.x % FV_WARPGROUP;
    const uint32_t r = thread / 2U;
    const int32_t row = fv_latent_row0<SHAPE>() + (int32_t)r;
    const bool is_there = row < run.n_rows;
    const int32_t flat = run.row_begin + (is_there ? row : 0);
    const int32_t t = flat / run.group;
    const int32_t h = head * run.group + (flat - t * run.group);
    const uint8_t *src = run.q + (uint64_t)t * run.q_token_bytes + (uint64_t)h * run.q_head_bytes;
    const uint32_t dst = fv_smem(q_smem) + r * FV_PANEL_ROW_BYTES;

#pragma unroll 4
    for (uint32_t c = thread & 1U; c < 8U * (SHAPE::PANELS + 1); c += 2U) {
        const uint32_t gap = (c >= 8U * SHAPE::PANELS) ? run.rope_gap_bytes : 0U;

        fv_async_load(dst + (c / 8U) * FV_PANEL_BYTES + (((c & 7U) ^ (r & 7U)) * 16U),
                      src + c * 16U + gap, is_there);
    }
    fv_async_wait();
    fv_async_proxy_fence();
}

/* A group begins or goes on: its run and Q are there. */
template <typename SHAPE>
static __device__ __forceinline__ void
fv_latent_begin(const fv_latent_memory_t &at, fv_latent_scorer_t &w, const fv_lean_walk_t &walk)
{
    const uint32_t thread = threadIdx.x % FV_WARPGROUP;

    w.m[0] = -INFINITY;
    w.m[1] = -INFINITY;
    w.l[0] = 0.0F;
    w.l[1] = 0.0F;
    if ((w.run == walk.run) && (w.head == walk.head)) {
        return;
    }
    if (w.run != walk.run) {
        w.run_slot ^= 1U;
        for (uint32_t i = thread; i < sizeof(fv_lean_run_t) / 8U; i += FV_WARPGROUP) {
            ((uint64_t *)&at.s->run[w.run_slot])[i] = ((const uint64_t *)walk.run)[i];
        }
    }
    fv_latent_sync(); /* and all are done with the Q before */
    const fv_lean_run_t &run = at.s->run[w.run_slot];

    fv_latent_load_q<SHAPE>(run, at.q, walk.head);
    w.run = walk.run;
    w.head = walk.head;
    fv_latent_sync();
}

/* Enqueues S = Q C^T of the next tile, as its chunks come. */
template <typename SHAPE>
static __device__ __forceinline__ void
fv_latent_issue(float (&sc)[32], const fv_latent_memory_t &at, const fv_lean_ring_t &ring)
{
    const uint64_t q = fv_wgmma_desc(fv_smem(at.q), 1024, 16);
    const uint64_t k = fv_wgmma_desc(fv_smem(at.ring) + ring.slot * SHAPE::TILE_BYTES, 1024, 16);

#pragma unroll
    for (int panel = 0; panel <= SHAPE::PANELS; panel++) {
        if (panel % SHAPE::STEP == 0) {
            fv_mbar_wait(&at.s->full[ring.slot * SHAPE::CHUNKS + (uint32_t)(panel / SHAPE::STEP)],
                         ring.parity);
            fv_wgmma_fence();
        }
#pragma unroll
        for (int step = 0; step < 4; step++) {
            const uint32_t from = (uint32_t)panel * FV_PANEL_BYTES + (uint32_t)step * 32U;

            fv_wgmma_ss<64, SHAPE::IS_F16, false>(sc, fv_wgmma_desc_at(q, from),
                                                  fv_wgmma_desc_at(k, from), panel + step > 0);
        }
    }
    fv_wgmma_commit();
}

/* Softcap and mask: S still to be multiplied with the scale, to be in units of log2; -inf where unseen. */
template <typename SHAPE>
static __device__ __forceinline__ void
fv_latent_mask(float (&sc)[32], const fv_lean_run_t &run, const fv_lean_tile_t &tile, int32_t head)
{
    const float cap_inner = run.cap_inner;

    if (cap_inner != 0.0F) {
#pragma unroll
        for (int i = 0; i < 32; i++) {
            sc[i] = run.cap_outer * tanhf(sc[i] * cap_inner);
        }
    }
    if (tile.is_full != 0) {
        return;
    }
#pragma unroll
    for (int side = 0; side < 2; side++) {
        const fv_latent_window_t window = fv_latent_window<SHAPE>(run, tile, head, side);

#pragma unroll
        for (int i = 0; i < 32; i++) {
            if ((((i >> 1) & 1) == side) && !fv_latent_sees(window, fv_latent_token(i))) {
                sc[i] = -INFINITY;
            }
        }
    }
}

/* S becomes P; m and l follow; alpha is what O must be multiplied with. The scale is positive. */
template <typename SHAPE>
static __device__ __forceinline__ void
fv_latent_softmax(float (&sc)[32], fv_latent_scorer_t &w, float scale, float (&alpha)[2])
{
#pragma unroll
    for (int side = 0; side < 2; side++) {
        float top = fmaxf(sc[2 * side], sc[2 * side + 1]);
        float base = 0.0F;
        float sums[2] = {};

#pragma unroll
        for (int n = 1; n < 8; n++) {
            top = fmaxf(top, fmaxf(sc[4 * n + 2 * side], sc[4 * n + 2 * side + 1]));
        }
        top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, 2));
        top = fmaxf(w.m[side], top * scale - SHAPE::P_BIAS);
        base = (top == -INFINITY) ? 0.0F : top;
        alpha[side] = fv_exp2(w.m[side] - base);
        w.m[side] = top;
#pragma unroll
        for (int n = 0; n < 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float x = fv_exp2(fmaf(sc[4 * n + 2 * side + i], scale, -base));

                sc[4 * n + 2 * side + i] = x;
                sums[i] += x;
            }
        }
        w.l[side] = w.l[side] * alpha[side] + (sums[0] + sums[1]);
    }
}

/* The message before has been heard: P, stat and message may be written. */
static __device__ __forceinline__ void fv_latent_speak(fv_latent_smem_t *s, fv_latent_scorer_t &w)
{
    fv_mbar_wait(&s->heard, w.heard);
    w.heard ^= 1U;
}

/* S of a tile is there: it becomes weights, which go to the teams of O. slot: of the ring. */
template <typename SHAPE>
static __device__ __forceinline__ void fv_latent_finish(float (&sc)[32],
                                                        const fv_latent_memory_t &at,
                                                        fv_latent_scorer_t &w,
                                                        const fv_lean_tile_t &tile,
                                                        uint32_t slot)
{
    float alpha[2];

    fv_latent_mask<SHAPE>(sc, at.s->run[w.run_slot], tile, w.head);
    fv_latent_softmax<SHAPE>(sc, w, at.s->run[w.run_slot].score_scale, alpha);
    fv_latent_speak(at.s, w);
    fv_latent_put_weights<SHAPE>(sc, at.weights);
    fv_latent_put_stat(at.s->stat[0], alpha[0], alpha[1]);
    if (tile.is_full == 0) {
        w.heard = fv_latent_clean<SHAPE>(at, at.s->run[w.run_slot], tile,
                                         at.ring + slot * SHAPE::TILE_BYTES, w.head, w.heard);
    } else {
        fv_latent_tell_tile(at.s, true, false);
    }
}

/* Waits for S of the tile that was issued last; what the copying warp said of it. */
template <typename SHAPE>
static __device__ __forceinline__ fv_lean_tile_t fv_latent_scored(const fv_latent_memory_t &at,
                                                                  fv_latent_scorer_t &w,
                                                                  uint32_t *slot)
{
    fv_wgmma_wait<0>();
    const fv_lean_tile_t tile = at.s->tile[w.ring.slot];

    fv_latent_release<SHAPE>(&at.s->empty[w.ring.slot * SHAPE::CHUNKS + SHAPE::CHUNKS - 1]);
    *slot = w.ring.slot;
    fv_latent_next<SHAPE>(&w.ring);
    return tile;
}

/* n tiles. */
template <typename SHAPE>
static __device__ __forceinline__ void
fv_latent_score(const fv_latent_memory_t &at, fv_latent_scorer_t &w, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        uint32_t slot = 0;
        float sc[32];

        fv_latent_issue<SHAPE>(sc, at, w.ring);
        const fv_lean_tile_t tile = fv_latent_scored<SHAPE>(at, w, &slot);

        fv_latent_finish<SHAPE>(sc, at, w, tile, slot);
    }
}

/* A piece of n_tiles from walk.tile on is done. */
static __device__ __forceinline__ void fv_latent_tell_piece(const fv_latent_memory_t &at,
                                                            fv_latent_scorer_t &w,
                                                            const fv_lean_share_t &share,
                                                            const fv_lean_walk_t &walk,
                                                            int32_t n_tiles)
{
    uint64_t slot = 0;

    fv_latent_speak(at.s, w);
#pragma unroll
    for (int side = 0; side < 2; side++) {
        w.l[side] += __shfl_xor_sync(0xffffffffU, w.l[side], 1);
        w.l[side] += __shfl_xor_sync(0xffffffffU, w.l[side], 2);
    }
    fv_latent_put_stat(at.s->stat[0], w.m[0], w.m[1]);
    fv_latent_put_stat(at.s->stat[1], w.l[0], w.l[1]);
    if (threadIdx.x % FV_WARPGROUP == 0) {
        const fv_lean_group_t group =
            fv_lean_place(share, at.s->run[w.run_slot], walk, n_tiles, &slot);

        at.s->message.kind = FV_LATENT_PIECE;
        at.s->message.run = w.run_slot;
        at.s->message.slot = slot;
        at.s->message.head = group.head;
        at.s->message.first = group.first;
        at.s->message.n_pieces = group.n_pieces;
    }
    fv_latent_tell(at.s);
}

template <typename SHAPE>
static __device__ __forceinline__ void fv_latent_scores(const fv_lean_launch_t &p,
                                                        const fv_latent_memory_t &at)
{
    fv_latent_scorer_t w = {};
    fv_lean_ring_t queue = {0, 0};

    w.heard = 1; /* nothing was said yet */
    for (;;) {
        fv_mbar_wait(&at.s->share_full[queue.slot], queue.parity);
        const fv_lean_share_t &share = at.s->share[queue.slot];
        fv_lean_walk_t walk = fv_lean_walk_begin(p, share);

        if (share.n_tiles == 0) {
            break;
        }
        while (walk.left > 0) {
            fv_latent_begin<SHAPE>(at, w, walk);
            const fv_lean_run_t &run = at.s->run[w.run_slot];
            const int32_t n = min(walk.left, run.n_tiles - walk.tile);

            fv_latent_score<SHAPE>(at, w, (run.is_empty != 0) ? 0 : n);
            fv_latent_tell_piece(at, w, share, walk, n);
            fv_lean_walk_next(&walk, n, run.n_kv_heads);
        }
        fv_lean_release(&at.s->share_empty[queue.slot]);
        fv_lean_ring_next(&queue, FV_LATENT_QUEUE);
    }
    fv_latent_speak(at.s, w);
    if (threadIdx.x % FV_WARPGROUP == 0) {
        at.s->message.kind = FV_LATENT_END;
    }
    fv_latent_tell(at.s);
}

#endif /* FV_KERNELS_LATENT_SCORES_CUH */
