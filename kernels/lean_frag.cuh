/*
 * lean_frag.cuh - K and V from shared memory into tensor-core registers, for each way of storing them.
 *
 * Decode path: station 7 of 10, inside lean_kernel.cuh.
 *
 * A fragment is the right-hand side of m16n8k16 for two neighbouring n-tiles: registers 0, 1 of the first, 2, 3 of
 * the second. For S = Q K^T n counts tokens and k counts head_dim; for O = P V n counts head_dim and k tokens.
 */
#ifndef FV_KERNELS_LEAN_FRAG_CUH
#define FV_KERNELS_LEAN_FRAG_CUH

#include "kernels/lean_cuda.h"
#include "kernels/ptx.cuh"

/* What differs between kinds: in how many parts KV and weights go through the tensor cores. */
template <int KIND> struct fv_lean_traits;
template <> struct fv_lean_traits<FV_LEAN_BF16> {
    static constexpr bool is_f16 = false, is_f32 = false;
    static constexpr int n_kv_parts = 1, n_p_parts = 2;
    static constexpr float p_bias = 0.0F;
};
template <> struct fv_lean_traits<FV_LEAN_F16> {
    static constexpr bool is_f16 = true, is_f32 = false;
    static constexpr int n_kv_parts = 1, n_p_parts = 2;
    static constexpr float p_bias = 14.0F; /* weights up to 2^14: small ones stay normal in fp16 */
};
template <> struct fv_lean_traits<FV_LEAN_F32_WIDE> {
    static constexpr bool is_f16 = false, is_f32 = true;
    static constexpr int n_kv_parts = 3, n_p_parts = 3;
    static constexpr float p_bias = 0.0F;
};
template <> struct fv_lean_traits<FV_LEAN_F16_WIDE> {
    static constexpr bool is_f16 = false, is_f32 = false;
    static constexpr int n_kv_parts = 2, n_p_parts = 2;
    static constexpr float p_bias = 0.0F;
};
#define FV_LEAN_PARTS_SUM \
    2 /* products of part i and part j matter while i + j <= 2 (2^-24 beyond) */

/* One matrix of a page in shared memory. */
typedef struct fv_lean_matrix {
    const uint8_t *data;
    fv_page_rows_t rows;
} fv_lean_matrix_t;

static __device__ __forceinline__ const uint8_t *
fv_lean_chunk(const fv_lean_matrix_t &m, uint32_t token, uint32_t chunk)
{
    return m.data + fv_page_chunk(&m.rows, token, chunk);
}

/* Widens two packed fp16 pairs into bf16 parts. */
static __device__ __forceinline__ void fv_lean_widen(uint32_t out[2], uint32_t pair)
{
    float2 x = __half22float2(*(const __half2 *)&pair);

    fv_split<2>(out, x.x, x.y);
}

/* Tokens [token0, token0 + 16), head_dim [16 ks, 16 ks + 16); what lies beyond the row is zero. */
template <int KIND>
static __device__ __forceinline__ void fv_lean_load_k(uint32_t b[][4],
                                                      const fv_lean_matrix_t &m,
                                                      uint32_t token0,
                                                      uint32_t ks,
                                                      uint32_t dk,
                                                      uint32_t lane)
{
    using traits = fv_lean_traits<KIND>;
    bool is_cut = (ks + 1U) * 16U > dk; /* dk = 8 mod 16: the last side lies beyond */

    if (traits::is_f32) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t token = token0 + (lane >> 2U) + ((i & 2) ? 8U : 0U);
            uint32_t k = ks * 16U + (lane & 3U) * 2U + ((i & 1) ? 8U : 0U);
            float2 x = make_float2(0.0F, 0.0F);
            uint32_t parts[3];

            if (!is_cut || ((i & 1) == 0)) {
                x = *(const float2 *)(fv_lean_chunk(m, token, k >> 2U) + (k & 3U) * 4U);
            }
            fv_split<3>(parts, x.x, x.y);
#pragma unroll
            for (int part = 0; part < 3; part++) {
                b[part % traits::n_kv_parts][i] = parts[part];
            }
        }
        return;
    }
    uint32_t r[4];
    uint32_t side = (lane >> 3U) & 1U;

    fv_ldmatrix_x4(r, fv_smem(fv_lean_chunk(m, token0 + (lane & 7U) + ((lane >> 4U) * 8U),
                                            ks * 2U + (is_cut ? 0U : side))));
    if (is_cut) {
        r[1] = 0;
        r[3] = 0;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (traits::n_kv_parts == 2) {
            uint32_t parts[2];

            fv_lean_widen(parts, r[i]);
            b[0][i] = parts[0];
            b[1 % traits::n_kv_parts][i] = parts[1];
        } else {
            b[0][i] = r[i];
        }
    }
}

/* Raw V of tokens [token0, token0 + 16), head_dim [16 n2, 16 n2 + 16): 16-bit pairs, or fp32 as 8 words. */
template <int KIND>
static __device__ __forceinline__ void fv_lean_load_v_raw(uint32_t *r,
                                                          const fv_lean_matrix_t &m,
                                                          uint32_t token0,
                                                          uint32_t n2,
                                                          uint32_t dv,
                                                          uint32_t lane)
{
    bool is_cut =
        (n2 + 1U) * 16U > dv; /* the second n-tile lies beyond the row: never written out */

    if (fv_lean_traits<KIND>::is_f32) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint32_t token = token0 + (lane & 3U) * 2U + (uint32_t)(i & 1) + ((i & 2) ? 8U : 0U);
            uint32_t d = n2 * 16U + (lane >> 2U) + (((i & 4) && !is_cut) ? 8U : 0U);

            r[i] = *(const uint32_t *)(fv_lean_chunk(m, token, d >> 2U) + (d & 3U) * 4U);
        }
        return;
    }
    uint32_t side = is_cut ? 0U : (lane >> 4U);

    fv_ldmatrix_x4_trans(r, fv_smem(fv_lean_chunk(m, token0 + (lane & 15U), n2 * 2U + side)));
}

/* Of a raw fragment: words that hold an inf or NaN become 0; true if there was one. `keep` as in fv_lean_keep(). */
template <int KIND>
static __device__ __forceinline__ bool fv_lean_clean_v(uint32_t *r, const uint32_t keep[2])
{
    using traits = fv_lean_traits<KIND>;
    bool found = false;

    if (traits::is_f32) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint32_t bits = (i & 2) ? keep[1] : keep[0];
            uint32_t mask = (i & 1) ? 0xffff0000U : 0x0000ffffU;

            r[i] = ((bits & mask) != 0) ? r[i] : 0U;
            if ((r[i] & 0x7f800000U) == 0x7f800000U) {
                found = true;
                r[i] = 0;
            }
        }
        return found;
    }
    const uint32_t exponent = (KIND == FV_LEAN_BF16) ? 0x7f80U : 0x7c00U;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        r[i] &= keep[i & 1];
        if ((r[i] & exponent) == exponent) {
            found = true;
            r[i] &= 0xffff0000U;
        }
        if ((r[i] & (exponent << 16U)) == (exponent << 16U)) {
            found = true;
            r[i] &= 0x0000ffffU;
        }
    }
    return found;
}

/* Raw V into parts. */
template <int KIND>
static __device__ __forceinline__ void fv_lean_split_v(uint32_t b[][4], const uint32_t *r)
{
    using traits = fv_lean_traits<KIND>;

#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (traits::is_f32) {
            uint32_t parts[3];

            fv_split<3>(parts, __uint_as_float(r[(2 * i) % (traits::is_f32 ? 8 : 4)]),
                        __uint_as_float(r[(2 * i + 1) % (traits::is_f32 ? 8 : 4)]));
#pragma unroll
            for (int part = 0; part < 3; part++) {
                b[part % traits::n_kv_parts][i] = parts[part];
            }
        } else if (traits::n_kv_parts == 2) {
            uint32_t parts[2];

            fv_lean_widen(parts, r[i]);
            b[0][i] = parts[0];
            b[1 % traits::n_kv_parts][i] = parts[1];
        } else {
            b[0][i] = r[i];
        }
    }
}

/* Element of V, for the careful way round inf and NaN. */
template <int KIND>
static __device__ __forceinline__ float
fv_lean_v_at(const fv_lean_matrix_t &m, uint32_t token, uint32_t d)
{
    if (fv_lean_traits<KIND>::is_f32) {
        return *(const float *)(fv_lean_chunk(m, token, d >> 2U) + (d & 3U) * 4U);
    }
    uint16_t x = *(const uint16_t *)(fv_lean_chunk(m, token, d >> 3U) + (d & 7U) * 2U);
    return (KIND == FV_LEAN_BF16) ? __uint_as_float((uint32_t)x << 16U)
                                  : __half2float(__ushort_as_half(x));
}

#endif /* FV_KERNELS_LEAN_FRAG_CUH */
