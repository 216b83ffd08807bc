/*
 * tensor.h - element types and overflow-checked sizes.
 */
#ifndef FV_COMMON_TENSOR_H
#define FV_COMMON_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Values are those of fovea.v1.DType. */
typedef enum fv_dtype {
    FV_DTYPE_NONE = 0,
    FV_DTYPE_F32 = 1,
    FV_DTYPE_F16 = 2,
    FV_DTYPE_BF16 = 3,
    FV_DTYPE_FP8_LATENT = 4, /* of caches alone: e4m3 latents with scales, and a bf16 RoPE key */
} fv_dtype_t;

/* Of tensors; a cache may have FP8_LATENT too. */
static inline bool fv_dtype_is_valid(int dtype)
{
    return (dtype >= FV_DTYPE_F32) && (dtype <= FV_DTYPE_BF16);
}

/* Bytes of one element; FP8_LATENT has no elements of one size (common/model.h). */
static inline size_t fv_dtype_bytes(fv_dtype_t dtype)
{
    return (dtype == FV_DTYPE_F32) ? 4U : 2U;
}

static inline const char *fv_dtype_str(int dtype)
{
    return (dtype == FV_DTYPE_F32)          ? "f32"
           : (dtype == FV_DTYPE_F16)        ? "f16"
           : (dtype == FV_DTYPE_BF16)       ? "bf16"
           : (dtype == FV_DTYPE_FP8_LATENT) ? "fp8_latent"
                                            : "none";
}

/* *out = a * b; false (and *out untouched) when it does not fit. */
static inline bool fv_size_mul(size_t a, size_t b, size_t *out)
{
    size_t product = 0;

    if (__builtin_mul_overflow(a, b, &product)) {
        return false;
    }
    *out = product;
    return true;
}

static inline uint64_t fv_div_up(uint64_t a, uint64_t b)
{
    return (a / b) + ((a % b) != 0U);
}

static inline size_t fv_align_up(size_t n, size_t alignment)
{
    return (n + alignment - 1U) / alignment * alignment;
}

#endif /* FV_COMMON_TENSOR_H */
