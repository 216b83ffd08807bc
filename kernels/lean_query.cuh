/*
 * lean_query.cuh - a group begins: its run's description, its rows' ranges and its Q come to shared memory.
 *
 * Decode path: station 7 of 10, inside lean_kernel.cuh.
 */
#ifndef FV_KERNELS_LEAN_QUERY_CUH
#define FV_KERNELS_LEAN_QUERY_CUH

#include "kernels/lean_frag.cuh"
#include "kernels/lean_smem.cuh"

/* The run's description and its rows' ranges to shared memory. All computing threads, between barriers. */
template <int TEAMS>
static __device__ void fv_lean_load_run(fv_lean_smem_t *s, const fv_lean_run_t *run)
{
    static_assert(sizeof(fv_lean_run_t) % 8 == 0, "copied in words of 8 bytes");
    const uint32_t n_words = (uint32_t)(sizeof(fv_lean_run_t) / 8U);

    for (uint32_t i = threadIdx.x; i < n_words; i += TEAMS * FV_LEAN_TEAM) {
        ((uint64_t *)&s->run)[i] = ((const uint64_t *)run)[i];
    }
    fv_lean_sync<TEAMS>();
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
template <int KIND, int M_WARPS, int TEAMS>
static __device__ __forceinline__ void
fv_lean_load_q(const fv_lean_smem_t *s, uint16_t *q_smem, uint32_t dk, int32_t head)
{
    const uint32_t pitch = fv_lean_q_pitch(dk);
    const uint32_t n_chunks = (pitch - 8U) / 8U;
    const uint32_t e = (s->run.io_dtype == FV_DTYPE_F32) ? 4U : 2U;

#pragma unroll 2
    for (uint32_t i = threadIdx.x; i < 16U * M_WARPS * n_chunks; i += TEAMS * FV_LEAN_TEAM) {
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
                    x[2 * j] = fv_bf16_rest(x[2 * j]);
                    x[2 * j + 1] = fv_bf16_rest(x[2 * j + 1]);
                }
            }
            *(uint4 *)(q_smem + ((uint32_t)part * 16U * M_WARPS + r) * pitch + c) =
                make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

/* The same where rows stand side by side and need no conversion: under way before the run is known. */
template <int M_WARPS, int TEAMS, int DIM>
static __device__ __forceinline__ void
fv_lean_copy_q(uint16_t *q_smem, const uint8_t *q, uint32_t n_rows)
{
    constexpr uint32_t n_chunks = DIM / 8;

#pragma unroll
    for (uint32_t i = threadIdx.x; i < 16U * M_WARPS * n_chunks; i += TEAMS * FV_LEAN_TEAM) {
        const uint32_t r = i / n_chunks;
        uint4 x = make_uint4(0, 0, 0, 0);

        if (r < n_rows) {
            x = ((const uint4 *)q)[i];
        }
        *(uint4 *)(q_smem + r * fv_lean_q_pitch(DIM) + (i - r * n_chunks) * 8U) = x;
    }
}

#endif /* FV_KERNELS_LEAN_QUERY_CUH */
