/*
 * prefill_scan.cuh - the warp that looks V of masked tiles through for inf and NaN.
 *
 * Station 7 of 10, inside prefill_kernel.cuh.
 *
 * Why V is looked through: a weight of 0 times a NaN is NaN, and the tensor cores multiply every row with every token of
 * a tile. In a tile that all rows see whole that is right. In the others (diagonal, window's edge, end of the context)
 * there may be tokens that some rows do not see, slots never written and parts of the ring that hold an older tile: their inf
 * and NaN become 0 before the products, and what rows do see of them is added afterwards (fv_prefill_spoil).
 */
#ifndef FV_KERNELS_PREFILL_SCAN_CUH
#define FV_KERNELS_PREFILL_SCAN_CUH

#include "kernels/prefill_smem.cuh"

/* A pair with 0 for inf and NaN. */
template <bool IS_F16> static __device__ __forceinline__ void fv_prefill_clean(uint32_t *pair)
{
    constexpr uint32_t exponent = IS_F16 ? 0x7c00U : 0x7f80U;

    if ((*pair & exponent) == exponent) {
        *pair &= 0xffff0000U;
    }
    if ((*pair & (exponent << 16U)) == (exponent << 16U)) {
        *pair &= 0x0000ffffU;
    }
}

/* True if one of these values is an inf or a NaN: without its sign none is larger. One warp, all lanes alike. */
template <typename SHAPE> static __device__ __forceinline__ bool fv_prefill_find(const uint8_t *v)
{
    constexpr uint32_t least = SHAPE::IS_F16 ? 0x7c00U : 0x7f80U;
    constexpr uint32_t n_chunks = SHAPE::N_PAGES * SHAPE::V_PAGE_BYTES / 16U;
    const uint4 *chunk = (const uint4 *)v + (threadIdx.x & 31U);
    uint32_t top[4] = {};

#pragma unroll 8
    for (uint32_t i = 0; i < n_chunks / 32U; i++) {
        const uint4 x = chunk[i * 32U];

        top[0] = __vmaxu2(top[0], x.x & 0x7fff7fffU);
        top[1] = __vmaxu2(top[1], x.y & 0x7fff7fffU);
        top[2] = __vmaxu2(top[2], x.z & 0x7fff7fffU);
        top[3] = __vmaxu2(top[3], x.w & 0x7fff7fffU);
    }
    const uint32_t all = __vmaxu2(__vmaxu2(top[0], top[1]), __vmaxu2(top[2], top[3]));

    return __any_sync(0xffffffffU, ((all & 0xffffU) >= least) || ((all >> 16U) >= least)) != 0;
}

/* Puts 0 for every inf and NaN; true if this lane found one among the tokens that exist. */
template <typename SHAPE>
static __device__ __forceinline__ bool fv_prefill_clean_v(const fv_prefill_tile_t &tile, uint8_t *v)
{
    constexpr uint32_t page_pairs = SHAPE::V_PAGE_BYTES / 4U;
    bool is_spoiled = false;

#pragma unroll 1
    for (uint32_t i = threadIdx.x & 31U; i < SHAPE::N_PAGES * page_pairs; i += 32U) {
        uint32_t pair = ((const uint32_t *)v)[i];
        const uint32_t before = pair;

        fv_prefill_clean<SHAPE::IS_F16>(&pair);
        if (pair != before) {
            const uint32_t token = i % page_pairs % (FV_PANEL_BYTES / 4U) / 32U;

            ((uint32_t *)v)[i] = pair;
            is_spoiled |= (int32_t)token < tile.page[i / page_pairs].n_tokens;
        }
    }
    return is_spoiled;
}

/* The warp that looks V of masked tiles through. */
template <typename SHAPE>
static __device__ void fv_prefill_scan(fv_prefill_smem_t *s, uint8_t *memory)
{
    uint32_t parities = 0; /* bit i: of v_raw[i] */

    for (uint32_t n = 0;; n++) {
        const uint32_t at = n % FV_PREFILL_TILES;

        fv_mbar_wait(&s->scan_full[at], (n / FV_PREFILL_TILES) & 1U);
        const uint32_t what = s->scan[at];

        if (what == FV_PREFILL_STOP) {
            break;
        }
        const uint32_t slot = what & 0xffU;
        fv_prefill_tile_t *tile = &s->tile[what >> 8U];

        fv_mbar_wait(&s->v_raw[slot], (parities >> slot) & 1U);
        parities ^= 1U << slot;
        if (fv_prefill_find<SHAPE>(fv_prefill_v<SHAPE>(memory, slot))) { /* rare */
            if (fv_prefill_clean_v<SHAPE>(*tile, fv_prefill_v<SHAPE>(memory, slot))) {
                tile->is_spoiled = 1;
            }
            fv_async_proxy_fence();
        }
        fv_prefill_release(&s->v_full[slot]);
    }
}

#endif /* FV_KERNELS_PREFILL_SCAN_CUH */
