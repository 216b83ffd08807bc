/*
 * latent_any.cu - attention to latents of any dims and dtypes, in fp32 on the ordinary units.
 *
 * Decode path: station 7 of 10. Before: latent_cuda.cu. After: latent_merge.cuh, lean_write.cuh.
 *
 * For what the tensor-core kernel does not take (latent_kernel.cuh): other dims, fp16, fp32 and FP8, weighted latents (mu).
 * Right, with fp32's accuracy, and slow. A CTA does one share, 16 rows at a time; Q and O lie in shared memory as fp32, a page comes
 * panel by panel (64 dims), for the scores and once more for O.
 */
#include "kernels/fp8.h"
#include "kernels/latent_any.h"
#include "kernels/latent_merge.cuh"
#include "kernels/lean_out.cuh"
#include "kernels/lean_query.cuh"
#include "kernels/lean_tile.cuh"

#include <cuda_fp8.h>
#include <cuda_runtime.h>

#define ROWS        FV_LATENT_ANY_ROWS
#define THREADS     FV_LATENT_ANY_THREADS
#define PANEL_PITCH 65U /* floats of a token's dims: a column of tokens meets no bank twice */

typedef struct state {
    fv_lean_run_t run;
    fv_row_range_t ranges[ROWS];
    float m[ROWS], l[ROWS], alpha[ROWS];
    uint32_t seen[ROWS][2]; /* bit t % 32 of word t / 32: the row sees token t */
    float weights[ROWS][FV_PAGE_TOKENS];
    float panel[FV_PAGE_TOKENS][PANEL_PITCH];
    fv_lean_late_t late[2];
    fv_lean_run_t late_run[2];
    uint32_t is_last;
} state_t;

/* Shared memory: the state, Q [ROWS, dk], O [ROWS, dv]. */
typedef struct memory {
    state_t *s;
    float *q, *o;
} memory_t;

static uint32_t state_bytes(void)
{
    return (uint32_t)((sizeof(state_t) + 127U) / 128U * 128U);
}

uint32_t fv_latent_any_smem(int32_t head_dim_qk, int32_t head_dim_v)
{
    return state_bytes() + ROWS * (uint32_t)(head_dim_qk + head_dim_v) * 4U;
}

/* The run's description, its rows' ranges, and Q as fp32, weighted. */
static __device__ void
load_group(const fv_lean_launch_t &p, const memory_t &at, const fv_lean_run_t *run, int32_t head)
{
    state_t *s = at.s;
    const uint32_t n_chunks = (uint32_t)p.head_dim_qk / 8U;

    __syncthreads();
    for (uint32_t i = threadIdx.x; i < sizeof(fv_lean_run_t) / 8U; i += THREADS) {
        ((uint64_t *)&s->run)[i] = ((const uint64_t *)run)[i];
    }
    __syncthreads();
    const uint32_t e = (s->run.io_dtype == FV_DTYPE_F32) ? 4U : 2U;

    if (threadIdx.x < ROWS) {
        const int32_t row = s->run.row_begin + min((int32_t)threadIdx.x, s->run.n_rows - 1);

        const fv_tile_query_t query = fv_lean_head_query(&s->run, head);

        s->ranges[threadIdx.x] = fv_row_range(&query, s->run.position + row / s->run.group);
        s->m[threadIdx.x] = -INFINITY;
        s->l[threadIdx.x] = 0.0F;
    }
    for (uint32_t i = threadIdx.x; i < ROWS * n_chunks; i += THREADS) {
        const uint32_t r = i / n_chunks;
        const uint32_t d = (i - r * n_chunks) * 8U;
        const bool is_rope = (int32_t)d >= p.head_dim_v;
        float x[8] = {};

        if ((int32_t)r < s->run.n_rows) {
            const int32_t row = s->run.row_begin + (int32_t)r;
            const int32_t t = row / s->run.group;
            const int32_t h = head * s->run.group + (row - t * s->run.group);

            fv_lean_q_chunk(x,
                            s->run.q + (uint64_t)t * s->run.q_token_bytes +
                                (uint64_t)h * s->run.q_head_bytes + d * e +
                                (is_rope ? s->run.rope_gap_bytes : 0U),
                            s->run.io_dtype);
        }
        for (int j = 0; j < 8; j++) {
            at.q[r * (uint32_t)p.head_dim_qk + d + (uint32_t)j] =
                x[j] * (is_rope ? 1.0F : s->run.latent_mu);
        }
    }
    for (uint32_t i = threadIdx.x; i < ROWS * (uint32_t)p.head_dim_v; i += THREADS) {
        at.o[i] = 0.0F;
    }
    __syncthreads();
}

/* The same of a page of FP8 latents (fp8.h): dim by dim, four tokens at a time. A panel is all latent or all RoPE key. */
static __device__ void load_panel_fp8(const fv_lean_launch_t &p,
                                      state_t *s,
                                      const uint8_t *page,
                                      uint32_t panel,
                                      uint32_t width)
{
    const uint32_t dv = (uint32_t)p.head_dim_v;

    for (uint32_t i = threadIdx.x; i < FV_PAGE_TOKENS / 4U * width; i += THREADS) {
        const uint32_t c = i / (FV_PAGE_TOKENS / 4U);
        const uint32_t t = i % (FV_PAGE_TOKENS / 4U) * 4U;
        const uint32_t d = panel * 64U + c;
        float x[4];

        if (d < dv) {
            const uint32_t raw = *(const uint32_t *)(page + d * FV_PAGE_TOKENS + t);
            const float4 scales = *(const float4 *)(page + fv_fp8_scales_offset((int32_t)dv) +
                                                    (d / FV_FP8_BLOCK * FV_PAGE_TOKENS + t) * 4U);
            const float2 low = __half22float2(__half2(
                __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)(raw & 0xffffU), __NV_E4M3)));
            const float2 high = __half22float2(
                __half2(__nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)(raw >> 16U), __NV_E4M3)));

            x[0] = low.x * scales.x;
            x[1] = low.y * scales.y;
            x[2] = high.x * scales.z;
            x[3] = high.y * scales.w;
        } else {
            const uint2 raw = *(const uint2 *)(page + fv_fp8_rope_offset((int32_t)dv) +
                                               ((d - dv) * FV_PAGE_TOKENS + t) * 2U);

            x[0] = __uint_as_float(raw.x << 16U);
            x[1] = __uint_as_float(raw.x & 0xffff0000U);
            x[2] = __uint_as_float(raw.y << 16U);
            x[3] = __uint_as_float(raw.y & 0xffff0000U);
        }
#pragma unroll
        for (uint32_t j = 0; j < 4U; j++) {
            s->panel[t + j][c] = x[j];
        }
    }
}

/* Dims [64 panel, + width) of all tokens of a page, as fp32. */
static __device__ void load_panel(const fv_lean_launch_t &p,
                                  state_t *s,
                                  const uint8_t *page,
                                  uint32_t panel,
                                  uint32_t width)
{
    const uint32_t e = (p.kind == FV_LEAN_F32_WIDE) ? 4U : 2U;
    const uint32_t per = 16U / e;
    const uint32_t n_chunks = width / per;

    __syncthreads(); /* all are done with the panel before */
    if (p.kind == FV_LATENT_FP8) {
        load_panel_fp8(p, s, page, panel, width);
        __syncthreads();
        return;
    }
    for (uint32_t i = threadIdx.x; i < FV_PAGE_TOKENS * n_chunks; i += THREADS) {
        const uint32_t t = i / n_chunks;
        const uint32_t c = i - t * n_chunks;
        const uint4 raw =
            *(const uint4 *)(page + fv_page_chunk(&p.k_rows, t, panel * 64U / per + c));
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
        float *to = &s->panel[t][c * per];

#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (e == 4U) {
                to[j] = __uint_as_float(words[j]);
            } else if (p.kind == FV_LEAN_BF16) {
                to[2 * j] = __uint_as_float(words[j] << 16U);
                to[2 * j + 1] = __uint_as_float(words[j] & 0xffff0000U);
            } else {
                const float2 pair = __half22float2(*(const __half2 *)&words[j]);

                to[2 * j] = pair.x;
                to[2 * j + 1] = pair.y;
            }
        }
    }
    __syncthreads();
}

/* Scores of four rows at one token: scaled, capped, masked, in units of log2. */
static __device__ void
put_scores(const float sc[4], state_t *s, const fv_lean_tile_t &tile, uint32_t row0, uint32_t token)
{
#pragma unroll
    for (uint32_t k = 0; k < 4U; k++) {
        float x = sc[k];
        const bool sees = ((int32_t)token < tile.n_tokens) &&
                          fv_lean_sees(s->ranges[row0 + k], tile, (int32_t)token);
        const uint32_t mask = __ballot_sync(0xffffffffU, sees);

        if (s->run.cap_inner != 0.0F) {
            x = s->run.cap_outer * tanhf(x * s->run.cap_inner);
        }
        s->weights[row0 + k][token] = sees ? (x * s->run.score_scale) : -INFINITY;
        if ((threadIdx.x & 31U) == 0) {
            s->seen[row0 + k][token / 32U] = mask;
        }
    }
}

/* Scores become weights: each warp two rows. */
static __device__ void softmax(state_t *s)
{
    const uint32_t lane = threadIdx.x & 31U;

    __syncthreads();
    for (uint32_t row = threadIdx.x / 32U; row < ROWS; row += THREADS / 32U) {
        float x[2] = {s->weights[row][lane], s->weights[row][lane + 32U]};
        float top = fmaxf(x[0], x[1]);
        float sum = 0.0F;

        for (int lanes = 16; lanes > 0; lanes /= 2) {
            top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, lanes));
        }
        top = fmaxf(s->m[row], top);
        const float base = (top == -INFINITY) ? 0.0F : top;
        const float alpha = exp2f(s->m[row] - base);

        x[0] = exp2f(x[0] - base);
        x[1] = exp2f(x[1] - base);
        sum = x[0] + x[1];
        for (int lanes = 16; lanes > 0; lanes /= 2) {
            sum += __shfl_xor_sync(0xffffffffU, sum, lanes);
        }
        s->weights[row][lane] = x[0];
        s->weights[row][lane + 32U] = x[1];
        __syncwarp();
        if (lane == 0) {
            s->m[row] = top;
            s->l[row] = s->l[row] * alpha + sum;
            s->alpha[row] = alpha;
        }
    }
    __syncthreads();
}

/* One page joins (O, m, l): each thread four rows at one token, then at one dim of each panel. */
static __device__ void do_tile(const fv_lean_launch_t &p,
                               const memory_t &at,
                               const fv_lean_tile_t &tile,
                               const uint8_t *page)
{
    state_t *s = at.s;
    const uint32_t dk = (uint32_t)p.head_dim_qk;
    const uint32_t dv = (uint32_t)p.head_dim_v;
    const uint32_t row0 = threadIdx.x / 64U * 4U;
    const uint32_t own = threadIdx.x % 64U; /* token, then dim */
    float sc[4] = {};

    for (uint32_t panel = 0; panel * 64U < dk; panel++) {
        const uint32_t width = min(64U, dk - panel * 64U);

        load_panel(p, s, page, panel, width);
        for (uint32_t d = 0; d < width; d++) {
#pragma unroll
            for (uint32_t k = 0; k < 4U; k++) {
                sc[k] += at.q[(row0 + k) * dk + panel * 64U + d] * s->panel[own][d];
            }
        }
    }
    put_scores(sc, s, tile, row0, own);
    softmax(s);
    for (uint32_t panel = 0; panel * 64U < dv; panel++) {
        const uint32_t width = min(64U, dv - panel * 64U);
        float sum[4] = {};

        load_panel(p, s, page, panel, width);
        for (uint32_t t = 0; (own < width) && (t < FV_PAGE_TOKENS); t++) {
#pragma unroll
            for (uint32_t k = 0; k < 4U; k++) {
                if (((s->seen[row0 + k][t / 32U] >> (t % 32U)) & 1U) != 0) {
                    sum[k] += s->weights[row0 + k][t] * s->panel[t][own];
                }
            }
        }
        for (uint32_t k = 0; (own < width) && (k < 4U); k++) {
            float *o = at.o + (row0 + k) * dv + panel * 64U + own;

            *o = *o * s->alpha[row0 + k] + sum[k];
        }
    }
}

/* A piece is done: whole rows to where the item wants them, pieces to their slot. */
static __device__ void
leave(const fv_lean_launch_t &p, const memory_t &at, const fv_lean_group_t &group, uint64_t slot)
{
    state_t *s = at.s;
    const uint32_t quads = (uint32_t)p.head_dim_v / 4U;
    const bool is_whole = group.n_pieces == 1U;

    __syncthreads();
    for (uint32_t i = threadIdx.x; i < (uint32_t)s->run.n_rows * quads; i += THREADS) {
        const uint32_t row = i / quads;
        const uint32_t col = (i - row * quads) * 4U;
        const float *o = at.o + row * (uint32_t)p.head_dim_v + col;
        const float scale = is_whole ? fv_lean_inverse(s->l[row]) : 1.0F;
        const uint64_t at_slot = slot * (uint64_t)p.slot_rows + row;
        fv_lean_target_t target = {(uint8_t *)(p.slot_o + at_slot * (uint64_t)p.head_dim_v), NULL,
                                   1.0F, FV_DTYPE_F32};

        if (is_whole) {
            target = fv_lean_find_target(s->run, group.head, (int32_t)row, p.head_dim_v);
        }
        fv_lean_write(target, (int32_t)col,
                      make_float4(o[0] * scale, o[1] * scale, o[2] * scale, o[3] * scale));
        if ((col == 0) && is_whole) {
            fv_lean_write_lse(target, s->m[row] + log2f(s->l[row]));
        } else if (col == 0) {
            *(float2 *)(p.slot_ml + 2U * at_slot) = make_float2(s->m[row], s->l[row]);
        }
    }
    if (!is_whole) {
        fv_latent_arrive(p, s->run, group, &s->is_last);
    }
}

static __global__ void __launch_bounds__(THREADS, 1)
    latent_any_kernel(const __grid_constant__ fv_lean_launch_t p)
{
    extern __shared__ __align__(128) uint8_t raw[];
    state_t *s = (state_t *)raw;
    float *q = (float *)(raw + (sizeof(state_t) + 127U) / 128U * 128U);
    const memory_t at = {s, q, q + ROWS * (uint32_t)p.head_dim_qk};

    fv_wait_for_prior_launch(); /* shares, too, are what it brings */

    const fv_lean_share_t share = p.shares[blockIdx.x];
    fv_lean_walk_t walk = fv_lean_walk_begin(p, share);

    while (walk.left > 0) {
        uint64_t slot = 0;

        load_group(p, at, walk.run, walk.head);
        const int32_t n = min(walk.left, s->run.n_tiles - walk.tile);
        const fv_page_ref_t *pages = fv_lean_head_pages(&s->run, walk.head);
        const fv_tile_query_t query = fv_lean_head_query(&s->run, walk.head);

        for (int32_t i = 0; (s->run.is_empty == 0) && (i < n); i++) {
            const fv_tile_t tile = fv_tile_at(&query, &s->run.tiles, walk.tile + i);
            const fv_page_ref_t page = pages[fv_lean_page_index(&s->run, tile.local_page)];
            const fv_lean_tile_t told = {.begin = tile.begin,
                                         .n_tokens = tile.n_tokens,
                                         .is_full = 0,
                                         .strided = tile.strided};

            do_tile(p, at, told, p.arena + (uint64_t)page * FV_PAGE_UNIT);
        }
        const fv_lean_group_t group = fv_lean_place(share, s->run, walk, n, &slot);

        leave(p, at, group, slot);
        fv_lean_walk_next(&walk, n, s->run.n_kv_heads);
    }
    fv_launch_dependents();
    fv_latent_merge_late(p, &s->late[fv_lean_team()], &s->late_run[fv_lean_team()]);
}

cudaError_t fv_latent_any_init(void)
{
    return cudaFuncSetAttribute((const void *)latent_any_kernel,
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)fv_latent_any_smem(FV_DIM_QK_MAX, FV_DIM_V_MAX));
}

void (*fv_latent_any_kernel(void))(fv_lean_launch_t)
{
    return latent_any_kernel;
}
