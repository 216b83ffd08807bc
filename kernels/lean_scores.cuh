/*
 * lean_scores.cuh - S = Q K^T of one tile on the tensor cores.
 *
 * Decode path: station 7 of 10, inside lean_tile.cuh.
 */
#ifndef FV_KERNELS_LEAN_SCORES_CUH
#define FV_KERNELS_LEAN_SCORES_CUH

#include "kernels/lean_frag.cuh"
#include "kernels/lean_smem.cuh"

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

/*
 * bf16 pairs of K without inf and NaN. An inf meets the first part of Q alone, which has its sign: another part may be
 * zero, and inf * 0 is not what inf * q is.
 */
static __device__ __forceinline__ void fv_lean_finite_k(uint32_t out[4], const uint32_t k[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t low = ((k[i] & 0x7f80U) == 0x7f80U) ? 0U : (k[i] & 0xffffU);
        const uint32_t high = ((k[i] & 0x7f800000U) == 0x7f800000U) ? 0U : (k[i] & 0xffff0000U);

        out[i] = low | high;
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
                        uint32_t k_part[4] = {b[i][kp][0], b[i][kp][1], b[i][kp][2], b[i][kp][3]};

                        if ((KIND != FV_LEAN_F16) && (kp == 0) && (qp > 0)) {
                            fv_lean_finite_k(k_part, b[i][kp]);
                        }
                        fv_mma<traits::is_f16>(d[0], a, k_part[0], k_part[1]);
                        fv_mma<traits::is_f16>(d[1], a, k_part[2], k_part[3]);
                    }
                }
            }
            if (traits::n_kv_parts > 1) {
                fv_lean_add_tiles(sc + 2 * pair0, own);
            }
        }
    }
}

/* The same where head_dim is known and Q has one part: two chains of sums. */
template <int KIND, int M_WARPS, int DIM>
static __device__ __forceinline__ void
fv_lean_scores_exact(float (*sc)[4], const fv_lean_matrix_t &k, uint32_t q_smem, uint32_t token0)
{
    const uint32_t lane = threadIdx.x & 31U;
    const uint32_t pitch_bytes = fv_lean_q_pitch(DIM) * 2U;
    const uint32_t q_lane = q_smem + (lane & 15U) * pitch_bytes + (lane >> 4U) * 16U;
    float odd[2 * M_WARPS][4] = {};

#pragma unroll
    for (uint32_t ks = 0; ks < DIM / 16U; ks++) {
        float(*d)[4] = (((ks & 1U) != 0) && (M_WARPS == 1)) ? odd : sc;
        uint32_t a[4];

        fv_ldmatrix_x4(a, q_lane + ks * 32U);
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

#endif /* FV_KERNELS_LEAN_SCORES_CUH */
