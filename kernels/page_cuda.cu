/*
 * page_cuda.cu - tokens into pages: conversion and the page's permutation in one pass; copies of pages.
 *
 * Decode path: station 6 of 10. Before: append_cuda.c. After: lean_kernel.cuh reads the pages.
 */
#include "kernels/page_cuda.h"
#include "kernels/ptx.cuh"

#include <cuda_runtime.h>

#define THREADS 128

/* n elements from src at any alignment of its element size. */
template <int N>
static __device__ __forceinline__ void load_elems(float out[N], const uint8_t *src, int32_t dtype)
{
    if (dtype == FV_DTYPE_F32) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            out[i] = ((const float *)src)[i];
        }
        return;
    }
    uint16_t raw[N];

    if (((uintptr_t)src % (2U * N)) == 0) {
        if (N == 8) {
            *(uint4 *)raw = *(const uint4 *)src;
        } else {
            *(uint2 *)raw = *(const uint2 *)src;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) {
            raw[i] = ((const uint16_t *)src)[i];
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        out[i] = (dtype == FV_DTYPE_BF16) ? __uint_as_float((uint32_t)raw[i] << 16U)
                                          : __half2float(__ushort_as_half(raw[i]));
    }
}

/* One 16-byte chunk of a page. */
static __device__ __forceinline__ void
put_chunk(uint8_t *dst, const uint8_t *row, uint32_t chunk, int32_t src_dtype, int32_t kv_dtype)
{
    const uint32_t src_e = (src_dtype == FV_DTYPE_F32) ? 4U : 2U;
    uint32_t words[4];

    if (kv_dtype == FV_DTYPE_F32) {
        float x[4];

        load_elems<4>(x, row + chunk * 4U * src_e, src_dtype);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            words[i] = __float_as_uint(x[i]);
        }
    } else {
        float x[8];

        load_elems<8>(x, row + chunk * 8U * src_e, src_dtype);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (kv_dtype == FV_DTYPE_BF16) {
                fv_split_rounded<false, 1>(&words[i], 1, x[2 * i], x[2 * i + 1]);
            } else {
                fv_split_rounded<true, 1>(&words[i], 1, x[2 * i], x[2 * i + 1]);
            }
        }
    }
    *(uint4 *)dst = make_uint4(words[0], words[1], words[2], words[3]);
}

/* Grid: one block a unit. */
static __global__ void __launch_bounds__(THREADS)
    append_kernel(uint8_t *arena, const fv_append_unit_t *units)
{
    const fv_append_unit_t u = units[blockIdx.x];
    const uint32_t e = (u.kv_dtype == FV_DTYPE_F32) ? 4U : 2U;
    const uint32_t k_chunks = (uint32_t)u.head_dim_qk * e / 16U;
    const uint32_t v_chunks = (uint32_t)u.head_dim_v * e / 16U;
    const uint32_t chunks = k_chunks + v_chunks;
    const fv_page_swizzle_t k_swizzle = fv_page_swizzle_make(k_chunks);
    const fv_page_swizzle_t v_swizzle = fv_page_swizzle_make(v_chunks);
    uint8_t *page = arena + (uint64_t)u.page * FV_PAGE_UNIT;

    for (uint32_t i = threadIdx.x; i < chunks * (uint32_t)u.n_tokens; i += THREADS) {
        const uint32_t t = i / chunks;
        const uint32_t c = i - t * chunks;
        const uint32_t slot = (uint32_t)u.slot + t;

        if (c < k_chunks) {
            const uint32_t at = c ^ ((slot >> k_swizzle.shift) & k_swizzle.mask);

            put_chunk(page + (slot * k_chunks + at) * 16U, u.k + t * u.k_token_bytes, c,
                      u.src_dtype, u.kv_dtype);
        } else {
            const uint32_t at = (c - k_chunks) ^ ((slot >> v_swizzle.shift) & v_swizzle.mask);

            put_chunk(page + (FV_PAGE_TOKENS * k_chunks + slot * v_chunks + at) * 16U,
                      u.v + t * u.v_token_bytes, c - k_chunks, u.src_dtype, u.kv_dtype);
        }
    }
}

/* Grid: one block a unit. */
static __global__ void __launch_bounds__(THREADS)
    copy_kernel(uint8_t *arena, const fv_copy_unit_t *units)
{
    const fv_copy_unit_t u = units[blockIdx.x];
    const uint4 *src = (const uint4 *)(arena + (uint64_t)u.src * FV_PAGE_UNIT);
    uint4 *dst = (uint4 *)(arena + (uint64_t)u.dst * FV_PAGE_UNIT);

    for (uint32_t i = threadIdx.x; i < u.k_bytes / 16U; i += THREADS) {
        dst[i] = src[i];
    }
    for (uint32_t i = threadIdx.x; i < u.v_bytes / 16U; i += THREADS) {
        dst[u.v_offset / 16U + i] = src[u.v_offset / 16U + i];
    }
}

cudaError_t fv_page_append_launch(uint8_t *arena,
                                  const fv_append_unit_t *units,
                                  uint32_t n_units,
                                  cudaStream_t stream)
{
    append_kernel<<<n_units, THREADS, 0, stream>>>(arena, units);
    return cudaGetLastError();
}

cudaError_t fv_page_copy_launch(uint8_t *arena,
                                const fv_copy_unit_t *units,
                                uint32_t n_units,
                                cudaStream_t stream)
{
    copy_kernel<<<n_units, THREADS, 0, stream>>>(arena, units);
    return cudaGetLastError();
}
