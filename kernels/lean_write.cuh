/*
 * lean_write.cuh - finished rows leave the lean kernel: normalised, converted, and put where the item wants them.
 *
 * Decode path: station 7 of 10. Before: lean_out.cuh, lean_merge.cuh. After: worker/exchange_*.c, coord's reply.
 */
#ifndef FV_KERNELS_LEAN_WRITE_CUH
#define FV_KERNELS_LEAN_WRITE_CUH

#include "kernels/lean_smem.cuh"

#define FV_LEAN_LN2 0.69314718055994530942F

/* Row `row` of the block at KV head `head`: query token, and query head of the run. */
typedef struct fv_lean_row {
    int32_t t, h;
} fv_lean_row_t;

static __device__ __forceinline__ fv_lean_row_t fv_lean_find_row(const fv_lean_run_t &run,
                                                                 int32_t head,
                                                                 int32_t row)
{
    const int32_t flat = run.row_begin + row;
    fv_lean_row_t r;

    r.t = flat / run.group;
    r.h = head * run.group + (flat - r.t * run.group);
    return r;
}

static __device__ __forceinline__ void fv_lean_store4(uint8_t *at, int32_t dtype, float4 o)
{
    if (dtype == FV_DTYPE_F32) {
        if (((uintptr_t)at & 15U) == 0) {
            *(float4 *)at = o;
            return;
        }
        ((float *)at)[0] = o.x;
        ((float *)at)[1] = o.y;
        ((float *)at)[2] = o.z;
        ((float *)at)[3] = o.w;
        return;
    }
    uint32_t low = 0;
    uint32_t high = 0;

    if (dtype == FV_DTYPE_BF16) {
        fv_split_rounded<false, 1>(&low, 1, o.x, o.y);
        fv_split_rounded<false, 1>(&high, 1, o.z, o.w);
    } else {
        fv_split_rounded<true, 1>(&low, 1, o.x, o.y);
        fv_split_rounded<true, 1>(&high, 1, o.z, o.w);
    }
    if (((uintptr_t)at & 7U) == 0) {
        *(uint2 *)at = make_uint2(low, high);
        return;
    }
    ((uint16_t *)at)[0] = (uint16_t)low;
    ((uint16_t *)at)[1] = (uint16_t)(low >> 16U);
    ((uint16_t *)at)[2] = (uint16_t)high;
    ((uint16_t *)at)[3] = (uint16_t)(high >> 16U);
}

/* Where a row's results go. */
typedef struct fv_lean_target {
    uint8_t *o; /* [dv] of dtype */
    float *lse; /* or NULL: log2 units times lse_unit */
    float lse_unit;
    int32_t dtype;
} fv_lean_target_t;

static __device__ __forceinline__ fv_lean_target_t fv_lean_find_target(const fv_lean_run_t &run,
                                                                       int32_t head,
                                                                       int32_t row,
                                                                       int32_t dv)
{
    const fv_lean_row_t r = fv_lean_find_row(run, head, row);
    fv_lean_target_t target;

    if (run.n_dst > 0) {
        const uint64_t index =
            (uint64_t)r.t * (uint64_t)run.n_q_heads + (uint64_t)(run.q_head + r.h);
        int32_t low = 0;
        int32_t high = run.n_dst;

        while (high - low > 1) {
            const int32_t middle = low + (high - low) / 2;

            if (run.dst[middle].row_begin <= index) {
                low = middle;
            } else {
                high = middle;
            }
        }
        const uint64_t at = index - run.dst[low].row_begin;

        target.o = (uint8_t *)(run.dst[low].o + at * (uint64_t)dv);
        target.lse = run.dst[low].lse_log2 + at;
        target.lse_unit = 1.0F;
        target.dtype = FV_DTYPE_F32;
        return target;
    }
    target.o = run.out + (uint64_t)r.t * run.out_token_bytes + (uint64_t)r.h * run.out_head_bytes;
    target.lse =
        (run.lse == NULL) ? NULL : (run.lse + (uint64_t)r.t * run.lse_token_stride + (uint64_t)r.h);
    target.lse_unit = FV_LEAN_LN2;
    target.dtype = run.io_dtype;
    return target;
}

/* Four finished columns. */
static __device__ __forceinline__ void
fv_lean_write(const fv_lean_target_t &target, int32_t col, float4 o)
{
    fv_lean_store4(target.o + (uint64_t)col * ((target.dtype == FV_DTYPE_F32) ? 4U : 2U),
                   target.dtype, o);
}

static __device__ __forceinline__ void fv_lean_write_lse(const fv_lean_target_t &target,
                                                         float lse_log2)
{
    if (target.lse != NULL) {
        *target.lse = lse_log2 * target.lse_unit;
    }
}

static __device__ __forceinline__ float4 fv_lean_scale(float4 o, float w)
{
    return make_float4(o.x * w, o.y * w, o.z * w, o.w * w);
}

static __device__ __forceinline__ void fv_lean_add(float4 *sum, float w, float4 o)
{
    sum->x += w * o.x;
    sum->y += w * o.y;
    sum->z += w * o.z;
    sum->w += w * o.w;
}

/* 1 / l, and 0 for the empty set. */
static __device__ __forceinline__ float fv_lean_inverse(float l)
{
    return (l == 0.0F) ? 0.0F : (1.0F / l);
}

static __device__ __forceinline__ float fv_lean_weight(float m, float top)
{
    return fv_exp2(m - ((top == -INFINITY) ? 0.0F : top));
}

#endif /* FV_KERNELS_LEAN_WRITE_CUH */
