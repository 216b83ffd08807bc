/*
 * prefill_out.cuh - a unit's rows leave the prefill kernel: normalised, converted, put where the item wants them.
 *
 * Station 7 of 10, inside prefill_kernel.cuh. After: worker/exchange_*.c, coord's reply.
 */
#ifndef FV_KERNELS_PREFILL_OUT_CUH
#define FV_KERNELS_PREFILL_OUT_CUH

#include "kernels/lean_write.cuh"
#include "kernels/prefill_tile.cuh"

/*
 * Of four neighbouring groups of 8 columns each lane of four holds a pair of columns of each; then lane i holds all 8
 * columns of group i, which leave in one store.
 */
static __device__ __forceinline__ uint4 fv_prefill_turn(const uint32_t w[4])
{
    const bool is_odd = (threadIdx.x & 1U) != 0;
    const bool is_high = (threadIdx.x & 2U) != 0;
    const uint32_t r0 = __shfl_xor_sync(0xffffffffU, is_odd ? w[0] : w[1], 1);
    const uint32_t r1 = __shfl_xor_sync(0xffffffffU, is_odd ? w[2] : w[3], 1);
    const uint32_t x0 = is_odd ? r0 : w[0];
    const uint32_t x1 = is_odd ? w[1] : r0;
    const uint32_t x2 = is_odd ? r1 : w[2];
    const uint32_t x3 = is_odd ? w[3] : r1;
    const uint32_t y0 = __shfl_xor_sync(0xffffffffU, is_high ? x0 : x2, 2);
    const uint32_t y1 = __shfl_xor_sync(0xffffffffU, is_high ? x1 : x3, 2);

    return is_high ? make_uint4(y0, y1, x2, x3) : make_uint4(x0, x1, y0, y1);
}

/* 8 columns of 16 bits. */
static __device__ __forceinline__ void fv_prefill_store8(uint8_t *at, uint4 x)
{
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};

    if (((uintptr_t)at & 15U) == 0) {
        *(uint4 *)at = x;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        ((uint16_t *)at)[2 * i] = (uint16_t)words[i];
        ((uint16_t *)at)[2 * i + 1] = (uint16_t)(words[i] >> 16U);
    }
}

/* One side's row, in 16 bits. All lanes of the warp. */
template <typename SHAPE>
static __device__ __forceinline__ void
fv_prefill_write16(const float *o, uint8_t *to, int side, float inverse, bool is_there)
{
#pragma unroll
    for (int n = 0; n < SHAPE::DV / 8; n += 4) {
        uint32_t w[4];

#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *pair = o + 4 * (n + i) + 2 * side;

            fv_split_rounded<SHAPE::IS_F16, 1>(&w[i], 1, pair[0] * inverse, pair[1] * inverse);
        }
        const uint4 x = fv_prefill_turn(w);

        if (is_there) {
            fv_prefill_store8(to + ((uint32_t)n + (threadIdx.x & 3U)) * 16U, x);
        }
    }
}

/* The same in fp32: a partial state. */
template <typename SHAPE>
static __device__ __forceinline__ void
fv_prefill_write32(const float *o, float *to, int side, float inverse, bool is_there)
{
#pragma unroll
    for (int n = 0; is_there && (n < SHAPE::DV / 8); n++) {
        const float x = o[4 * n + 2 * side] * inverse;
        const float y = o[4 * n + 2 * side + 1] * inverse;
        float *at = to + 8 * n + 2 * (int)(threadIdx.x & 3U);

        if (((uintptr_t)at & 7U) == 0) {
            *(float2 *)at = make_float2(x, y);
        } else {
            at[0] = x;
            at[1] = y;
        }
    }
}

/* row0: the warp's first of the unit's rows. */
template <typename SHAPE>
static __device__ __forceinline__ void fv_prefill_write(fv_prefill_state<SHAPE> &state,
                                                        const fv_lean_run_t &run,
                                                        const fv_prefill_unit_t &unit,
                                                        int32_t row0)
{
#pragma unroll
    for (int side = 0; side < 2; side++) {
        const int32_t row = row0 + (int32_t)((threadIdx.x & 31U) >> 2U) + 8 * side;
        const bool is_there = row < unit.n_rows;
        float l = state.l[side];

        l += __shfl_xor_sync(0xffffffffU, l, 1);
        l += __shfl_xor_sync(0xffffffffU, l, 2);
        const float inverse = fv_lean_inverse(l);
        const fv_lean_target_t target =
            fv_lean_find_target(run, unit.head, unit.row_begin + (is_there ? row : 0), SHAPE::DV);

        if (target.dtype == FV_DTYPE_F32) {
            fv_prefill_write32<SHAPE>(state.o, (float *)target.o, side, inverse, is_there);
        } else {
            fv_prefill_write16<SHAPE>(state.o, target.o, side, inverse, is_there);
        }
        if (is_there && ((threadIdx.x & 3U) == 0)) {
            fv_lean_write_lse(
                target, (l == 0.0F) ? -INFINITY
                                    : __fadd_rn(fv_prefill_base<SHAPE>(state.m[side], state.scale),
                                                log2f(l)));
        }
    }
}

#endif /* FV_KERNELS_PREFILL_OUT_CUH */
