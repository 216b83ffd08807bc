/*
 * latent_clean.cuh - tiles that some row does not see whole: what nobody sees is cleared, inf and NaN spoil who sees them.
 *
 * Decode path: station 7 of 10, inside latent_scores.cuh.
 */
#ifndef FV_KERNELS_LATENT_CLEAN_CUH
#define FV_KERNELS_LATENT_CLEAN_CUH

#include "kernels/latent_tell.cuh"

/* Two 16-bit elements: which are inf or NaN, as a mask. */
template <bool IS_F16> static __device__ __forceinline__ uint32_t fv_latent_wild(uint32_t pair)
{
    constexpr uint32_t exponent = IS_F16 ? 0x7c00U : 0x7f80U;

    return (((pair & exponent) == exponent) ? 0x0000ffffU : 0U) |
           (((pair & (exponent << 16U)) == (exponent << 16U)) ? 0xffff0000U : 0U);
}

/* Is `is_true` true for any thread of the warpgroup? All meet. */
static __device__ __forceinline__ bool fv_latent_any(bool is_true)
{
    uint32_t any = 0;

    asm volatile("{\n"
                 ".reg .pred in, out;\n"
                 "setp.ne.u32 in, %1, 0;\n"
                 "barrier.cta.red.or.aligned.pred out, %2, 128, in;\n"
                 "selp.u32 %0, 1, 0, out;\n"
                 "}\n"
                 : "=r"(any)
                 : "r"(is_true ? 1U : 0U), "n"(FV_LATENT_BAR)
                 : "memory");
    return any != 0;
}

/* 16 bytes of a token's latent in a tile. */
static __device__ __forceinline__ uint4 *
fv_latent_chunk(uint8_t *tile, uint32_t token, uint32_t chunk)
{
    return (uint4 *)(tile + (chunk / 8U) * FV_PANEL_BYTES + token * FV_PANEL_ROW_BYTES +
                     (((chunk & 7U) ^ (token & 7U)) * 16U));
}

/* Does any row of this CTA see the token? */
template <typename SHAPE>
static __device__ __forceinline__ bool
fv_latent_is_seen(const fv_lean_run_t &run, const fv_lean_tile_t &tile, int32_t head, int32_t token)
{
    const fv_tile_query_t query = fv_lean_head_query(&run, head);
    const int32_t first = min(fv_latent_row0<SHAPE>(), run.n_rows - 1);
    const int32_t last = min(fv_latent_row0<SHAPE>() + (int32_t)FV_LATENT_ROWS, run.n_rows) - 1;
    fv_row_range_t hull = fv_row_range(&query, run.position + (run.row_begin + first) / run.group);
    const fv_row_range_t other =
        fv_row_range(&query, run.position + (run.row_begin + max(first, last)) / run.group);

    hull.sink = fv_max64(hull.sink, other.sink);
    hull.begin = fv_min64(hull.begin, other.begin);
    hull.end = fv_max64(hull.end, other.end);
    return (token < tile.n_tokens) && fv_lean_sees(hull, tile, token);
}

/*
 * The rare way: inf or NaN among latents that some row may not see. They count as 0 first; then as the largest finite
 * number, all else as 0, with weights of 2^100 for the rows that see the token: its product overflows for them alone.
 */
template <typename SHAPE>
static __device__ __forceinline__ void fv_latent_spoil(const fv_latent_memory_t &at,
                                                       const fv_lean_run_t &run,
                                                       const fv_lean_tile_t &tile,
                                                       uint8_t *data,
                                                       int32_t head,
                                                       bool is_seen,
                                                       uint32_t heard)
{
    constexpr uint32_t huge = SHAPE::IS_F16 ? 0x7bff7bffU : 0x7f7f7f7fU;
    const uint32_t token = threadIdx.x % FV_WARPGROUP / 2U;
    uint32_t found[SHAPE::PANELS] = {}; /* bit 2 i + j: element 2 i + j of this thread's 4 chunks */
    float sc[32];

    if (threadIdx.x % FV_WARPGROUP < 2U) {
        at.s->wild[threadIdx.x % FV_WARPGROUP] = 0;
    }
    fv_latent_sync();
#pragma unroll
    for (uint32_t c = 0; c < 4U * SHAPE::PANELS; c++) {
        uint32_t *x = (uint32_t *)fv_latent_chunk(data, token, 2U * c + (threadIdx.x & 1U));

#pragma unroll
        for (uint32_t i = 0; i < 4U; i++) {
            const uint32_t wild = is_seen ? fv_latent_wild<SHAPE::IS_F16>(x[i]) : 0U;

            found[c / 4U] |= ((wild & 1U) | ((wild >> 31U) << 1U)) << (8U * (c % 4U) + 2U * i);
            x[i] = is_seen ? (x[i] & ~wild) : 0U;
        }
        if (found[c / 4U] != 0) {
            atomicOr(&at.s->wild[token / 32U], 1U << (token & 31U));
        }
    }
    fv_async_proxy_fence();
    fv_latent_sync();
    fv_latent_tell_tile(at.s, false, true);
    fv_mbar_wait(&at.s->heard, heard); /* O has read the tile */
#pragma unroll
    for (uint32_t c = 0; c < 4U * SHAPE::PANELS; c++) {
        uint32_t *x = (uint32_t *)fv_latent_chunk(data, token, 2U * c + (threadIdx.x & 1U));

#pragma unroll
        for (uint32_t i = 0; i < 4U; i++) {
            const uint32_t bits = found[c / 4U] >> (8U * (c % 4U) + 2U * i);

            x[i] =
                huge & (((bits & 1U) != 0 ? 0xffffU : 0U) | ((bits & 2U) != 0 ? 0xffff0000U : 0U));
        }
    }
#pragma unroll
    for (int side = 0; side < 2; side++) {
        const fv_latent_window_t window = fv_latent_window<SHAPE>(run, tile, head, side);

#pragma unroll
        for (int i = 0; i < 32; i++) {
            const int32_t t = fv_latent_token(i);
            const bool is_wild = ((at.s->wild[t / 32] >> (t & 31)) & 1U) != 0;

            if (((i >> 1) & 1) == side) {
                sc[i] = (is_wild && fv_latent_sees(window, t))
                            ? (SHAPE::IS_F16 ? 16384.0F : 0x1p100F)
                            : 0.0F;
            }
        }
    }
    fv_latent_put_weights<SHAPE>(sc, at.weights);
    fv_latent_put_stat(at.s->stat[0], 1.0F, 1.0F);
    fv_async_proxy_fence();
    fv_latent_sync();
    fv_latent_tell_tile(at.s, false, false);
}

/*
 * A masked weight is 0, but 0 * NaN is NaN: in a tile that some row does not see whole, latents of tokens that no row sees
 * are cleared before O adds them. Two threads a token. Returns the parity of the next `heard`.
 */
template <typename SHAPE>
static __device__ __noinline__ uint32_t fv_latent_clean(const fv_latent_memory_t at,
                                                        const fv_lean_run_t &run,
                                                        const fv_lean_tile_t tile,
                                                        uint8_t *data,
                                                        int32_t head,
                                                        uint32_t heard)
{
    const uint32_t token = threadIdx.x % FV_WARPGROUP / 2U;
    const bool is_seen = fv_latent_is_seen<SHAPE>(run, tile, head, (int32_t)token);
    bool is_wild = false;

    for (uint32_t c = threadIdx.x & 1U; is_seen && (c < 8U * SHAPE::PANELS); c += 2U) {
        const uint4 x = *fv_latent_chunk(data, token, c);

        is_wild |= (fv_latent_wild<SHAPE::IS_F16>(x.x) | fv_latent_wild<SHAPE::IS_F16>(x.y) |
                    fv_latent_wild<SHAPE::IS_F16>(x.z) | fv_latent_wild<SHAPE::IS_F16>(x.w)) != 0;
    }
    if (fv_latent_any(is_wild)) {
        fv_latent_spoil<SHAPE>(at, run, tile, data, head, is_seen, heard);
        return heard ^ 1U;
    }
    for (uint32_t c = threadIdx.x & 1U; !is_seen && (c < 8U * SHAPE::PANELS); c += 2U) {
        *fv_latent_chunk(data, token, c) = make_uint4(0, 0, 0, 0);
    }
    fv_async_proxy_fence();
    fv_latent_sync();
    fv_latent_tell_tile(at.s, false, false);
    return heard;
}

#endif /* FV_KERNELS_LATENT_CLEAN_CUH */
