/*
 * convert.c - scalar conversions between fp32, fp16 and bf16.
 *
 * Round to nearest even; NaN stays NaN (its quiet bit is set, so that truncation cannot make an infinity
 * of it); subnormal fp16 values are kept. Vector code must agree with these bit for bit on finite values.
 */
#include "kernels/kernels.h"

#include <string.h>

#define F32_ABS_MASK 0x7fffffffU
#define F32_INF      0x7f800000U

static uint32_t f32_bits(float f)
{
    uint32_t bits = 0;

    memcpy(&bits, &f, sizeof(bits));
    return bits;
}

static float bits_f32(uint32_t bits)
{
    float f = 0.0F;

    memcpy(&f, &bits, sizeof(f));
    return f;
}

float fv_bf16_to_f32(uint16_t h)
{
    return bits_f32((uint32_t)h << 16U);
}

uint16_t fv_f32_to_bf16(float f)
{
    uint32_t bits = f32_bits(f);

    if ((bits & F32_ABS_MASK) > F32_INF) {
        return (uint16_t)((bits >> 16U) | 0x0040U);
    }
    bits += 0x7fffU + ((bits >> 16U) & 1U);
    return (uint16_t)(bits >> 16U);
}

float fv_f16_to_f32(uint16_t h)
{
    uint32_t sign = ((uint32_t)h & 0x8000U) << 16U;
    uint32_t exponent = ((uint32_t)h >> 10U) & 0x1fU;
    uint32_t mantissa = (uint32_t)h & 0x3ffU;

    if (exponent == 0x1fU) {
        return bits_f32(sign | F32_INF | (mantissa << 13U) | ((mantissa != 0U) ? 0x400000U : 0U));
    }
    if (exponent == 0U) { /* zero or subnormal: mantissa * 2^-24, exact in fp32 */
        float magnitude = (float)mantissa * 0x1p-24F;
        return (sign != 0U) ? -magnitude : magnitude;
    }
    return bits_f32(sign | ((exponent + 112U) << 23U) | (mantissa << 13U));
}

uint16_t fv_f32_to_f16(float f)
{
    uint32_t bits = f32_bits(f);
    uint32_t magnitude = bits & F32_ABS_MASK;
    uint16_t sign = (uint16_t)((bits >> 16U) & 0x8000U);

    if (magnitude > F32_INF) {
        return (uint16_t)(sign | 0x7e00U | ((magnitude >> 13U) & 0x3ffU));
    }
    if (magnitude >= 0x477ff000U) { /* 65520 and more round to infinity */
        return (uint16_t)(sign | 0x7c00U);
    }
    if (magnitude < 0x38800000U) { /* below 2^-14: the fp32 adder rounds to a multiple of 2^-24 */
        float shifted = bits_f32(magnitude) + 0.5F;
        return (uint16_t)(sign | (uint16_t)(f32_bits(shifted) - 0x3f000000U));
    }
    magnitude += 0xfffU + ((magnitude >> 13U) & 1U);
    return (uint16_t)(sign | (uint16_t)((magnitude >> 13U) - (112U << 10U)));
}

float fv_load_element(const void *data, fv_dtype_t dtype, size_t i)
{
    const char *at = (const char *)data + i * fv_dtype_bytes(dtype);
    uint16_t half = 0;
    float f = 0.0F;

    if (dtype == FV_DTYPE_F32) {
        memcpy(&f, at, sizeof(f));
        return f;
    }
    memcpy(&half, at, sizeof(half));
    return (dtype == FV_DTYPE_F16) ? fv_f16_to_f32(half) : fv_bf16_to_f32(half);
}

void fv_store_element(void *data, fv_dtype_t dtype, size_t i, float value)
{
    char *at = (char *)data + i * fv_dtype_bytes(dtype);
    uint16_t half = 0;

    if (dtype == FV_DTYPE_F32) {
        memcpy(at, &value, sizeof(value));
        return;
    }
    half = (dtype == FV_DTYPE_F16) ? fv_f32_to_f16(value) : fv_f32_to_bf16(value);
    memcpy(at, &half, sizeof(half));
}

void fv_load_row(float *out, const void *data, fv_dtype_t dtype, size_t n_elems)
{
    const uint8_t *at = data; /* any alignment */
    uint16_t half = 0;

    if (dtype == FV_DTYPE_F32) {
        memcpy(out, data, n_elems * sizeof(float));
        return;
    }
    if (dtype == FV_DTYPE_BF16) {
        for (size_t i = 0; i < n_elems; i++) {
            memcpy(&half, at + 2U * i, sizeof(half));
            out[i] = fv_bf16_to_f32(half);
        }
        return;
    }
    for (size_t i = 0; i < n_elems; i++) {
        memcpy(&half, at + 2U * i, sizeof(half));
        out[i] = fv_f16_to_f32(half);
    }
}

void fv_store_row(void *data, fv_dtype_t dtype, const float *row, size_t n_elems)
{
    uint8_t *at = data;
    uint16_t half = 0;

    if (dtype == FV_DTYPE_F32) {
        memcpy(data, row, n_elems * sizeof(float));
        return;
    }
    if (dtype == FV_DTYPE_BF16) {
        for (size_t i = 0; i < n_elems; i++) {
            half = fv_f32_to_bf16(row[i]);
            memcpy(at + 2U * i, &half, sizeof(half));
        }
        return;
    }
    for (size_t i = 0; i < n_elems; i++) {
        half = fv_f32_to_f16(row[i]);
        memcpy(at + 2U * i, &half, sizeof(half));
    }
}
