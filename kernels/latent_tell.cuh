/*
 * latent_tell.cuh - how the warpgroup of scores speaks to the teams of O: weights, statistics, messages; and who sees what.
 *
 * Decode path: station 7 of 10, inside latent_kernel.cuh.
 */
#ifndef FV_KERNELS_LATENT_TELL_CUH
#define FV_KERNELS_LATENT_TELL_CUH

#include "kernels/latent_smem.cuh"
#include "kernels/lean_tile.cuh"

#define FV_LATENT_BAR 4 /* hardware barrier of this warpgroup; teams' are 1 to 3 (lean_smem.cuh) */

static __device__ __forceinline__ void fv_latent_sync()
{
    fv_bar_sync(FV_LATENT_BAR, FV_WARPGROUP);
}

/* What this warp wrote may be read. */
static __device__ __forceinline__ void fv_latent_tell(fv_latent_smem_t *s)
{
    __syncwarp();
    if ((threadIdx.x & 31U) == 0) {
        fv_mbar_arrive(&s->told);
    }
}

/* One number of each row. */
static __device__ __forceinline__ void fv_latent_put_stat(float *stat, float first, float second)
{
    const uint32_t row = threadIdx.x % FV_WARPGROUP / 32U * 16U + ((threadIdx.x & 31U) >> 2U);

    if ((threadIdx.x & 3U) == 0) {
        stat[row] = first;
        stat[row + 8U] = second;
    }
}

/* Where lane l's row of four 8 x 8 matrices lies in P: rows of this warp, tokens [16 step, 16 step + 16). */
static __device__ __forceinline__ uint32_t fv_latent_weights_at(const uint8_t *weights, int step)
{
    const uint32_t lane = threadIdx.x & 31U;
    const uint32_t row = threadIdx.x % FV_WARPGROUP / 32U * 16U + (lane & 15U);
    const uint32_t chunk = 2U * (uint32_t)step + (lane >> 4U);

    return fv_smem(weights) + row * FV_PANEL_ROW_BYTES + ((chunk ^ (row & 7U)) * 16U);
}

/* Weights of 64 tokens as bf16 or fp16 to P. */
template <typename SHAPE>
static __device__ __forceinline__ void fv_latent_put_weights(const float (&sc)[32],
                                                             uint8_t *weights)
{
#pragma unroll
    for (int step = 0; step < 4; step++) {
        uint32_t a[4];

#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *pair = sc + 8 * step + 4 * (i >> 1) + 2 * (i & 1);

            fv_split_rounded<SHAPE::IS_F16, 1>(&a[i], 1, pair[0], pair[1]);
        }
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         fv_latent_weights_at(weights, step)),
                     "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
                     : "memory");
    }
}

/* The weights in P are those of a tile. */
static __device__ __forceinline__ void
fv_latent_tell_tile(fv_latent_smem_t *s, bool is_early, bool is_kept)
{
    if (threadIdx.x % FV_WARPGROUP == 0) {
        s->message.kind = FV_LATENT_TILE;
        s->message.is_early = is_early ? 1U : 0U;
        s->message.is_kept = is_kept ? 1U : 0U;
    }
    fv_latent_tell(s);
}

/* Tokens of one tile that a row sees: [0, sink) and [begin, end), and of [0, begin) the strided quarters. */
typedef struct fv_latent_window {
    int32_t sink, begin, end;
    uint32_t strided;
} fv_latent_window_t;

static __device__ __forceinline__ int32_t fv_latent_within(int64_t token)
{
    return (int32_t)fv_max64(0, fv_min64(token, FV_PAGE_TOKENS));
}

/* Of the row this thread holds on a side; for tiles that some row does not see whole. */
template <typename SHAPE>
static __device__ __noinline__ fv_latent_window_t
fv_latent_window(const fv_lean_run_t &run, const fv_lean_tile_t &tile, int32_t head, int side)
{
    const fv_tile_query_t query = fv_lean_head_query(&run, head);
    const int32_t row = fv_latent_row0<SHAPE>() +
                        (int32_t)(threadIdx.x % FV_WARPGROUP / 32U * 16U) +
                        (int32_t)((threadIdx.x & 31U) >> 2U) + side * 8;
    const fv_row_range_t range =
        fv_row_range(&query, run.position + (run.row_begin + min(row, run.n_rows - 1)) / run.group);
    fv_latent_window_t window;

    window.sink = min(fv_latent_within(range.sink - tile.begin), tile.n_tokens);
    window.begin = fv_latent_within(range.begin - tile.begin);
    window.end = min(fv_latent_within(range.end - tile.begin), tile.n_tokens);
    window.begin = min(window.begin, tile.n_tokens);
    window.strided = tile.strided;
    return window;
}

static __device__ __forceinline__ bool fv_latent_sees(const fv_latent_window_t &window,
                                                      int32_t token)
{
    return (token < window.sink) ||
           ((token < window.begin)
                ? (((window.strided >> ((uint32_t)token / FV_S2_BLOCK_MIN)) & 1U) != 0)
                : (token < window.end));
}

/* Of element i of S: its token in the tile. */
static __device__ __forceinline__ int32_t fv_latent_token(int i)
{
    return (i / 4) * 8 + (int32_t)(threadIdx.x & 3U) * 2 + (i & 1);
}

#endif /* FV_KERNELS_LATENT_TELL_CUH */
