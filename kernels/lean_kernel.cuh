/*
 * lean_kernel.cuh - lean (stream-K) attention over the paged cache: the persistent kernel of a step.
 *
 * Decode path: station 7 of 10. Before: attend_cuda.c plans and launches. After: lean_out.cuh writes the results.
 *
 * One CTA does shares of the line (lean_cuda.h). Its fifth warp claims them and copies K and V of tile after tile into a ring in
 * shared memory and runs ahead over groups' borders; the other four compute, each on its own rows and tokens:
 *
 *     m_warps rows x (4 / m_warps) tokens      16 rows, 16 m_warps tokens of every tile for each warp
 *
 * so a warp keeps (O, m, l) of its own and meets the others only where a group ends. Per tile and warp:
 *
 *     S = Q K^T          mma m16n8k16, fp32 sums; then scale, softcap, mask, in units of log2
 *     m' = max(m, S), P = 2^(S - m'), alpha = 2^(m - m'), l = alpha l + sum P
 *     O = alpha O + P V  P in parts (lean_frag.cuh), so that weights lose no more than 2^-17
 *
 * NaN and masks: a masked score becomes -inf by selection and its weight 0; but 0 * NaN is NaN, so in a tile that some
 * row does not see whole, V of unseen tokens is cleared in registers, and a NaN or inf that only some rows
 * see goes the careful way, element by element.
 */
#ifndef FV_KERNELS_LEAN_KERNEL_CUH
#define FV_KERNELS_LEAN_KERNEL_CUH

#include "kernels/lean_frag.cuh"
#include "kernels/lean_out.cuh"
#include "kernels/lean_smem.cuh"

/* ------------------------------------------------------------------ the copying warp */

static __device__ __forceinline__ void fv_lean_issue(const fv_lean_launch_t &p,
                                                     fv_lean_smem_t *s,
                                                     uint8_t *ring_data,
                                                     fv_lean_ring_t ring,
                                                     const fv_tile_t &tile,
                                                     fv_page_ref_t page,
                                                     uint64_t policy)
{
    const uint8_t *k = p.arena + (uint64_t)page * FV_PAGE_UNIT;
    uint32_t n_tokens = (uint32_t)tile.n_tokens;

    fv_mbar_wait(&s->empty[ring.slot], ring.parity);
    s->tile[ring.slot].begin = tile.begin;
    s->tile[ring.slot].n_tokens = tile.n_tokens;
    s->tile[ring.slot].is_full = tile.full && (tile.n_tokens == FV_PAGE_TOKENS);
    fv_mbar_expect(&s->full[ring.slot], n_tokens * p.k_bytes);
    fv_bulk_load(ring_data + ring.slot * p.slot_bytes, k, n_tokens * p.k_bytes, &s->full[ring.slot],
                 policy);
    fv_lean_ring_next(&ring, (uint32_t)p.ring_slots);
    fv_mbar_wait(&s->empty[ring.slot], ring.parity);
    fv_mbar_expect(&s->full[ring.slot], n_tokens * p.v_bytes);
    fv_bulk_load(ring_data + ring.slot * p.slot_bytes, k + FV_PAGE_TOKENS * p.k_bytes,
                 n_tokens * p.v_bytes, &s->full[ring.slot], policy);
}

/* The tiles of one share: 32 at a time, each lane looks up one, then they are issued in order. */
static __device__ __forceinline__ void fv_lean_copy_share(const fv_lean_launch_t &p,
                                                          fv_lean_smem_t *s,
                                                          uint8_t *ring_data,
                                                          fv_lean_ring_t *ring,
                                                          const fv_lean_share_t &share,
                                                          uint64_t policy)
{
    const int32_t lane = (int32_t)(threadIdx.x & 31U);
    fv_lean_walk_t walk = fv_lean_walk_begin(p, share);

    while (walk.left > 0) {
        const fv_lean_run_t *run = walk.run;
        const int32_t n = min(walk.left, run->n_tiles - walk.tile);
        const fv_tile_query_t query = run->query;
        const fv_tile_list_t tiles = run->tiles;
        const fv_page_ref_t *pages = run->pages + (int64_t)walk.head * run->pages_stride;

        for (int32_t done = 0; (run->is_empty == 0) && (done < n); done += 32) {
            const int32_t some = min(32, n - done);
            fv_tile_t tile = {};
            fv_page_ref_t page = 0;

            if (lane < some) {
                tile = fv_tile_at(&query, &tiles, walk.tile + done + lane);
                page = pages[tile.local_page -
                             ((tile.local_page >= run->gap_begin) ? run->gap_pages : 0)];
            }
            for (int32_t i = 0; i < some; i++) {
                if (i == lane) {
                    fv_lean_issue(p, s, ring_data, *ring, tile, page, policy);
                }
                fv_lean_ring_next(ring, (uint32_t)p.ring_slots);
                fv_lean_ring_next(ring, (uint32_t)p.ring_slots);
                __syncwarp();
            }
        }
        fv_lean_walk_next(&walk, n, run->n_kv_heads);
    }
}

/* The next share for this CTA; n_tiles 0 when all are taken. The last CTA to find none resets the counter. */
static __device__ __forceinline__ fv_lean_share_t fv_lean_claim(const fv_lean_launch_t &p,
                                                                bool is_first)
{
    const uint32_t lane = threadIdx.x & 31U;
    fv_lean_share_t share = {};
    uint32_t index = blockIdx.x;

    if (!is_first) {
        uint32_t taken = p.n_shares;

        if ((lane == 0) && (p.n_shares > p.n_ctas)) {
            taken = atomicAdd(p.claimed, 1U);
            if (taken == p.n_shares - 1U) {
                *p.claimed = 0;
            }
        }
        index = p.n_ctas + __shfl_sync(0xffffffffU, taken, 0);
    }
    if (index < p.n_shares) {
        share = p.shares[index];
    }
    return share;
}

/* The copying warp: claims shares, tells the others, copies their tiles. Runs ahead as far as the ring is long. */
static __device__ void
fv_lean_copy(const fv_lean_launch_t &p, fv_lean_smem_t *s, uint8_t *ring_data)
{
    const uint64_t policy = fv_evict_first();
    fv_lean_ring_t ring = {0, 1}; /* parity 1: a slot never used counts as empty */
    fv_lean_ring_t queue = {0, 1};

    for (bool is_first = true;; is_first = false) {
        const fv_lean_share_t share = fv_lean_claim(p, is_first);

        if ((threadIdx.x & 31U) == 0) {
            fv_mbar_wait(&s->share_empty[queue.slot], queue.parity);
            s->share[queue.slot] = share;
            fv_mbar_arrive(&s->share_full[queue.slot]);
        }
        fv_lean_ring_next(&queue, 2);
        if (share.n_tiles == 0) {
            return;
        }
        fv_lean_copy_share(p, s, ring_data, &ring, share, policy);
    }
}

/* ------------------------------------------------------------------ the computing warps */

/* The run's description and its rows' ranges to shared memory. All computing threads, between barriers. */
static __device__ void fv_lean_load_run(fv_lean_smem_t *s, const fv_lean_run_t *run)
{
    static_assert(sizeof(fv_lean_run_t) % 8 == 0, "copied in words of 8 bytes");
    const uint32_t n_words = (uint32_t)(sizeof(fv_lean_run_t) / 8U);

    for (uint32_t i = threadIdx.x; i < n_words; i += FV_LEAN_COMPUTE) {
        ((uint64_t *)&s->run)[i] = ((const uint64_t *)run)[i];
    }
    fv_bar_sync(1, FV_LEAN_COMPUTE);
    if (threadIdx.x < FV_LEAN_ROWS_MAX) {
        int32_t row = s->run.row_begin + min((int32_t)threadIdx.x, s->run.n_rows - 1);

        s->ranges[threadIdx.x] = fv_row_range(&s->run.query, s->run.position + row / s->run.group);
    }
}

/* 8 elements of Q, 16-byte aligned. */
static __device__ __forceinline__ void
fv_lean_q_chunk(float x[8], const uint8_t *q, int32_t io_dtype)
{
    if (io_dtype == FV_DTYPE_F32) {
        *(float4 *)x = ((const float4 *)q)[0];
        *(float4 *)(x + 4) = ((const float4 *)q)[1];
        return;
    }
    const uint4 raw = *(const uint4 *)q;
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};

#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (io_dtype == FV_DTYPE_BF16) {
            x[2 * i] = __uint_as_float(words[i] << 16U);
            x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000U);
        } else {
            const float2 pair = __half22float2(*(const __half2 *)&words[i]);

            x[2 * i] = pair.x;
            x[2 * i + 1] = pair.y;
        }
    }
}

/* Rows of Q to shared memory, in parts; rows and columns that do not exist are zero. */
template <int KIND, int M_WARPS>
static __device__ __forceinline__ void
fv_lean_load_q(const fv_lean_smem_t *s, uint16_t *q_smem, uint32_t dk, int32_t head)
{
    const uint32_t pitch = fv_lean_q_pitch(dk);
    const uint32_t n_chunks = (pitch - 8U) / 8U;
    const uint32_t e = (s->run.io_dtype == FV_DTYPE_F32) ? 4U : 2U;

#pragma unroll 2
    for (uint32_t i = threadIdx.x; i < 16U * M_WARPS * n_chunks; i += FV_LEAN_COMPUTE) {
        const uint32_t r = i / n_chunks;
        const uint32_t c = (i - r * n_chunks) * 8U;
        float x[8] = {};

        if (((int32_t)r < s->run.n_rows) && (c < dk)) {
            const int32_t row = s->run.row_begin + (int32_t)r;
            const int32_t t = row / s->run.group;
            const int32_t h = head * s->run.group + (row - t * s->run.group);

            fv_lean_q_chunk(
                x, s->run.q + (uint64_t)t * s->run.q_token_bytes + ((uint64_t)h * dk + c) * e,
                s->run.io_dtype);
        }
        for (int part = 0; part < s->run.n_q_parts; part++) {
            uint32_t words[4];

#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (KIND == FV_LEAN_F16) {
                    fv_split_rounded<true, 1>(&words[j], 1, x[2 * j], x[2 * j + 1]);
                } else {
                    fv_split<1>(&words[j], x[2 * j], x[2 * j + 1]);
                    x[2 * j] -= fv_bf16_part(x[2 * j]);
                    x[2 * j + 1] -= fv_bf16_part(x[2 * j + 1]);
                }
            }
            *(uint4 *)(q_smem + ((uint32_t)part * 16U * M_WARPS + r) * pitch + c) =
                make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

/*
 * Two n-tiles of sums join theirs. The tensor cores truncate what they add to, so kinds that promise fp32's accuracy
 * let them sum a few products only and add those sums here, where they are rounded.
 */
static __device__ __forceinline__ void fv_lean_add_tiles(float (*sum)[4], const float (*more)[4])
{
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum[n][i] += more[n][i];
        }
    }
}

/* S[16, 16 M_WARPS] of this warp. */
template <int KIND, int M_WARPS>
static __device__ __forceinline__ void fv_lean_scores(float (*sc)[4],
                                                      const fv_lean_matrix_t &k,
                                                      uint32_t q_smem,
                                                      uint32_t dk,
                                                      int32_t n_q_parts,
                                                      uint32_t token0)
{
    using traits = fv_lean_traits<KIND>;
    const uint32_t lane = threadIdx.x & 31U;
    const uint32_t pitch_bytes = fv_lean_q_pitch(dk) * 2U;
    const uint32_t q_lane = q_smem + (lane & 15U) * pitch_bytes + (lane >> 4U) * 16U;

    /* kinds of several parts hold one pair of n-tiles at a time: registers */
    constexpr int n_unroll = (traits::n_kv_parts == 1) ? ((M_WARPS == 4) ? 2 : 4) : 1;
    constexpr int n_pairs = (traits::n_kv_parts == 1) ? M_WARPS : 1;

#pragma unroll n_unroll
    for (uint32_t ks = 0; ks * 16U < dk; ks++) {
#pragma unroll
        for (int pair0 = 0; pair0 < M_WARPS; pair0 += n_pairs) {
            uint32_t b[n_pairs][traits::n_kv_parts][4];
            float own[2][4] = {};

#pragma unroll
            for (int i = 0; i < n_pairs; i++) {
                fv_lean_load_k<KIND>(b[i], k, token0 + (uint32_t)(pair0 + i) * 16U, ks, dk, lane);
            }
            for (int i_part = 0; i_part < n_q_parts; i_part++) {
                const int qp = n_q_parts - 1 - i_part; /* small parts first */
                uint32_t a[4];

                fv_ldmatrix_x4(a, q_lane + (uint32_t)qp * 16U * M_WARPS * pitch_bytes + ks * 32U);
#pragma unroll
                for (int kp = traits::n_kv_parts - 1; kp >= 0; kp--) {
                    if (qp + kp > FV_LEAN_PARTS_SUM) {
                        continue;
                    }
#pragma unroll
                    for (int i = 0; i < n_pairs; i++) {
                        float(*d)[4] = (traits::n_kv_parts == 1) ? (sc + 2 * (pair0 + i)) : own;

                        fv_mma<traits::is_f16>(d[0], a, b[i][kp][0], b[i][kp][1]);
                        fv_mma<traits::is_f16>(d[1], a, b[i][kp][2], b[i][kp][3]);
                    }
                }
            }
            if (traits::n_kv_parts > 1) {
                fv_lean_add_tiles(sc + 2 * pair0, own);
            }
        }
    }
}

/* The same where head_dim is known and Q has one part: Q stays in registers, two chains of sums. */
template <int KIND, int M_WARPS, int DIM>
static __device__ __forceinline__ void fv_lean_scores_exact(float (*sc)[4],
                                                            const fv_lean_matrix_t &k,
                                                            const uint32_t (*q)[4],
                                                            uint32_t q_smem,
                                                            uint32_t token0)
{
    constexpr bool is_q_kept = M_WARPS < 4;
    const uint32_t lane = threadIdx.x & 31U;
    const uint32_t pitch_bytes = fv_lean_q_pitch(DIM) * 2U;
    const uint32_t q_lane = q_smem + (lane & 15U) * pitch_bytes + (lane >> 4U) * 16U;
    float odd[2 * M_WARPS][4] = {};

#pragma unroll
    for (uint32_t ks = 0; ks < DIM / 16U; ks++) {
        float(*d)[4] = (((ks & 1U) != 0) && (M_WARPS == 1)) ? odd : sc;
        uint32_t a[4];

        if (is_q_kept) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[i] = q[ks][i];
            }
        } else {
            fv_ldmatrix_x4(a, q_lane + ks * 32U);
        }
#pragma unroll
        for (int pair = 0; pair < M_WARPS; pair++) {
            uint32_t b[1][4];

            fv_lean_load_k<KIND>(b, k, token0 + (uint32_t)pair * 16U, ks, DIM, lane);
            fv_mma<KIND == FV_LEAN_F16>(d[2 * pair], a, b[0][0], b[0][1]);
            fv_mma<KIND == FV_LEAN_F16>(d[2 * pair + 1], a, b[0][2], b[0][3]);
        }
    }
    if (M_WARPS == 1) {
        fv_lean_add_tiles(sc, odd);
    }
}

static __device__ __forceinline__ bool fv_lean_sees(const fv_row_range_t &range, int64_t j)
{
    return (j < range.sink) || ((j >= range.begin) && (j < range.end));
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

                if ((token >= tile.n_tokens) || !fv_lean_sees(range, tile.begin + token)) {
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

            if ((token < tile.n_tokens) && fv_lean_sees(hull, tile.begin + token)) {
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
        const int64_t j = tile.begin + token0 + t;
        const bool sees0 = fv_lean_sees(s->ranges[row0 + (lane >> 2U)], j);
        const bool sees1 = fv_lean_sees(s->ranges[row0 + (lane >> 2U) + 8U], j);

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
                                                       const uint32_t (*q)[4],
                                                       uint32_t q_warp)
{
    constexpr int n_tiles = DV_MAX / 8;
    const uint32_t warp = threadIdx.x >> 5U;
    const uint32_t row0 = (warp % M_WARPS) * 16U;
    const uint32_t token0 = (warp / M_WARPS) * 16U * M_WARPS;
    const uint32_t dk = IS_EXACT ? (uint32_t)DV_MAX : (uint32_t)p.head_dim_qk;
    const uint32_t dv = IS_EXACT ? (uint32_t)DV_MAX : (uint32_t)p.head_dim_v;
    float sc[2 * M_WARPS][4] = {};
    fv_lean_matrix_t k = {ring_data + ring->slot * p.slot_bytes, p.k_bytes, p.k_shift, p.k_xor};

    if (IS_EXACT) { /* 16-bit, a multiple of 8 chunks */
        k.row_bytes = DV_MAX * 2U;
        k.shift = 0;
        k.mask = 7;
    }
    fv_mbar_wait(&s->full[ring->slot], ring->parity);
    FV_LEAN_MARK_FIRST(p, 1);
    const fv_lean_tile_t tile = s->tile[ring->slot];
    if (IS_EXACT) {
        fv_lean_scores_exact<KIND, M_WARPS, DV_MAX>(sc, k, q, q_warp, token0);
    } else {
        fv_lean_scores<KIND, M_WARPS>(sc, k, q_warp, dk, s->run.n_q_parts, token0);
    }
    fv_lean_release(&s->empty[ring->slot]);
    fv_lean_ring_next(ring, (uint32_t)p.ring_slots);
    fv_lean_mask<M_WARPS>(sc, s, tile, row0, token0);
    fv_lean_softmax<KIND, M_WARPS, n_tiles>(sc, state.o, state.m, state.l);
    fv_lean_matrix_t v = {ring_data + ring->slot * p.slot_bytes, p.v_bytes, p.v_shift, p.v_xor};
    if (IS_EXACT) {
        v.row_bytes = DV_MAX * 2U;
        v.shift = 0;
        v.mask = 7;
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

/* The groups of one share. `loaded` is the run whose description is in shared memory. */
template <int KIND, int M_WARPS, int DV_MAX, bool IS_EXACT>
static __device__ __forceinline__ void fv_lean_compute_share(const fv_lean_launch_t &p,
                                                             fv_lean_smem_t *s,
                                                             uint16_t *q_smem,
                                                             const uint8_t *ring_data,
                                                             fv_lean_ring_t *ring,
                                                             const fv_lean_share_t &share,
                                                             const fv_lean_run_t **loaded)
{
    constexpr int n_tiles = DV_MAX / 8;
    constexpr int n_kept = (IS_EXACT && (M_WARPS < 4)) ? (DV_MAX / 16) : 1;
    const uint32_t dk = IS_EXACT ? (uint32_t)DV_MAX : (uint32_t)p.head_dim_qk;
    const uint32_t q_warp =
        fv_smem(q_smem) + ((threadIdx.x >> 5U) % M_WARPS) * 16U * fv_lean_q_pitch(dk) * 2U;
    fv_lean_walk_t walk = fv_lean_walk_begin(p, share);

    while (walk.left > 0) {
        uint32_t q[n_kept][4];

        fv_bar_sync(1, FV_LEAN_COMPUTE); /* all are done with the run and the Q before */
        if (*loaded != walk.run) {
            fv_lean_load_run(s, walk.run);
            *loaded = walk.run;
        }
        fv_lean_load_q<KIND, M_WARPS>(s, q_smem, dk, walk.head);
        fv_bar_sync(1, FV_LEAN_COMPUTE);
        if (n_kept > 1) {
#pragma unroll
            for (uint32_t ks = 0; ks < n_kept; ks++) {
                fv_ldmatrix_x4(q[ks], q_warp + (threadIdx.x & 15U) * fv_lean_q_pitch(dk) * 2U +
                                          ((threadIdx.x & 31U) >> 4U) * 16U + ks * 32U);
            }
        }
        const int32_t n = min(walk.left, s->run.n_tiles - walk.tile);
        fv_lean_state<n_tiles> state = {};

        state.m[0] = -INFINITY;
        state.m[1] = -INFINITY;
        for (int32_t i = 0; (s->run.is_empty == 0) && (i < n); i++) {
            fv_lean_do_tile<KIND, M_WARPS, DV_MAX, IS_EXACT>(state, p, s, ring_data, ring, q,
                                                             q_warp);
        }
        FV_LEAN_MARK(p, 2);
        fv_lean_store<M_WARPS, n_tiles>(p, s, state.o, state.m, state.l, share, walk, n);
        FV_LEAN_MARK(p, 3);
        fv_lean_walk_next(&walk, n, s->run.n_kv_heads);
    }
}

template <int KIND, int M_WARPS, int DV_MAX, bool IS_EXACT>
static __device__ void fv_lean_compute(const fv_lean_launch_t &p,
                                       fv_lean_smem_t *s,
                                       uint16_t *q_smem,
                                       const uint8_t *ring_data)
{
    const fv_lean_run_t *loaded = NULL;
    fv_lean_ring_t ring = {0, 0};
    fv_lean_ring_t queue = {0, 0};

    for (;;) {
        fv_mbar_wait(&s->share_full[queue.slot], queue.parity);
        const fv_lean_share_t &share = s->share[queue.slot];

        if (share.n_tiles == 0) {
            return;
        }
        fv_lean_compute_share<KIND, M_WARPS, DV_MAX, IS_EXACT>(p, s, q_smem, ring_data, &ring,
                                                               share, &loaded);
        fv_lean_release(&s->share_empty[queue.slot]);
        fv_lean_ring_next(&queue, 2);
    }
}

/* ------------------------------------------------------------------ the kernel */

template <int KIND, int M_WARPS, int DV_MAX, bool IS_EXACT>
static __global__ void __launch_bounds__(FV_LEAN_THREADS, fv_lean_cuda_ctas(KIND, M_WARPS, DV_MAX))
    fv_lean_kernel(const __grid_constant__ fv_lean_launch_t p)
{
    extern __shared__ __align__(128) uint8_t memory[];
    fv_lean_smem_t *s = (fv_lean_smem_t *)memory;
    uint16_t *q_smem = (uint16_t *)(memory + FV_LEAN_SMEM_FIXED);
    uint8_t *ring_data = (uint8_t *)q_smem + fv_lean_q_bytes((uint32_t)p.head_dim_qk, 16U * M_WARPS,
                                                             (uint32_t)p.n_q_parts);

    FV_LEAN_MARK(p, 0);
    if (threadIdx.x == 0) {
        for (int32_t i = 0; i < p.ring_slots; i++) {
            fv_mbar_init(&s->full[i], 1);
            fv_mbar_init(&s->empty[i], FV_LEAN_RELEASES);
        }
        for (int32_t i = 0; i < 2; i++) {
            fv_mbar_init(&s->share_full[i], 1);
            fv_mbar_init(&s->share_empty[i], FV_LEAN_RELEASES);
        }
        fv_mbar_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= FV_LEAN_COMPUTE) {
        fv_lean_copy(p, s, ring_data);
    } else {
        fv_lean_compute<KIND, M_WARPS, DV_MAX, IS_EXACT>(p, s, q_smem, ring_data);
    }
}

#endif /* FV_KERNELS_LEAN_KERNEL_CUH */
