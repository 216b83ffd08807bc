/*
 * prefill_smem.cuh - what differs between prefill kernels, and the shared memory of one CTA.
 *
 * Station 7 of 10, inside prefill_kernel.cuh.
 *
 *     Q      [dk / 64][128 rows][64]                   panels as page_layout_cuda.h has them
 *     ring   of STAGES: K [dk / 64][N_TOKENS][64], then V [N_PAGES][dv / 64][64 tokens][64]
 *     then   fv_prefill_smem_t
 *
 * A tile is N_PAGES pages that follow each other in the block's list; K of all of them makes one product.
 */
#ifndef FV_KERNELS_PREFILL_SMEM_CUH
#define FV_KERNELS_PREFILL_SMEM_CUH

#include "kernels/prefill_cuda.h"
#include "kernels/wgmma.cuh"

#define FV_PREFILL_GROUPS    2 /* warpgroups that compute */
#define FV_PREFILL_WARPS     (4 * FV_PREFILL_GROUPS)
#define FV_PREFILL_THREADS   ((1 + FV_PREFILL_GROUPS) * FV_WARPGROUP)
#define FV_PREFILL_PAGES_MAX 2
#define FV_PREFILL_TILES \
    8 /* descriptions of tiles: more than STAGES + 1, so that none is replaced while it is read */
#define FV_PREFILL_Q_WARPS 2 /* that bring Q */

template <bool IS_F16_, int DK_, int DV_, int N_PAGES_, int STAGES_> struct fv_prefill_shape {
    static constexpr bool IS_F16 = IS_F16_;
    static constexpr int DK = DK_, DV = DV_, N_PAGES = N_PAGES_, STAGES = STAGES_;
    static constexpr int N_TOKENS = N_PAGES * FV_PAGE_TOKENS;
    static constexpr uint32_t Q_PANEL_BYTES = FV_PREFILL_ROWS * FV_PANEL_ROW_BYTES;
    static constexpr uint32_t Q_BYTES = DK / 64 * Q_PANEL_BYTES;
    static constexpr uint32_t K_PAGE_BYTES = DK / 64 * FV_PANEL_BYTES;
    static constexpr uint32_t V_PAGE_BYTES = DV / 64 * FV_PANEL_BYTES;
    static constexpr uint32_t K_BYTES = N_PAGES * K_PAGE_BYTES;
    static constexpr uint32_t STAGE_BYTES = K_BYTES + N_PAGES * V_PAGE_BYTES;
    static constexpr uint32_t DATA_BYTES = Q_BYTES + STAGES * STAGE_BYTES;
    /* fp16: weights up to 2^14, so that small ones stay normal */
    static constexpr float P_BIAS = IS_F16 ? 14.0F : 0.0F;
    static_assert(STAGES + 1 < FV_PREFILL_TILES, "");
};

/* One page of a tile. */
typedef struct fv_prefill_page {
    int64_t begin; /* position of the first token */
    fv_page_ref_t page;
    int16_t n_tokens; /* that exist; 0: there is no such page */
    uint8_t strided;  /* fv_tile_t's */
} fv_prefill_page_t;

typedef struct fv_prefill_tile {
    fv_prefill_page_t page[FV_PREFILL_PAGES_MAX];
    uint32_t is_masked; /* some row does not see some token */
    uint32_t
        is_spoiled; /* V had an inf or a NaN, which is 0 in shared memory now; of masked tiles only */
} fv_prefill_tile_t;

/* A unit on its way. */
typedef struct fv_prefill_unit {
    const fv_lean_run_t *run;
    int32_t head, row_begin, n_rows;
    int32_t n_tiles; /* -1: no more units */
} fv_prefill_unit_t;

/* What the copying warp must know of it. */
typedef struct fv_prefill_order {
    fv_prefill_unit_t unit;
    fv_tile_query_t query;
    fv_tile_list_t list;
} fv_prefill_order_t;

typedef struct fv_prefill_smem {
    uint64_t k_full[4], k_empty[4], v_full[4], v_empty[4];
    uint64_t v_raw[4]; /* V of a masked tile is there, to be looked through */
    uint64_t q_full, q_empty;
    uint64_t unit_full[2], unit_empty[2]; /* from the warp that claims to those that copy */
    uint64_t scan_full[FV_PREFILL_TILES];
    fv_prefill_order_t queue[2];
    uint32_t scan
        [FV_PREFILL_TILES]; /* tiles to look through: slot | description << 8, or FV_PREFILL_STOP */
    fv_prefill_tile_t tile[FV_PREFILL_TILES];
    /* of the unit whose Q is there, and of the one before or after it */
    fv_prefill_unit_t unit[2];
    fv_lean_run_t run[2];
} fv_prefill_smem_t;

#define FV_PREFILL_STOP 0xffffffffU

/* A place in the ring. */
typedef struct fv_prefill_ring {
    uint32_t slot, parity;
    uint32_t count; /* tiles so far: % FV_PREFILL_TILES is the description */
} fv_prefill_ring_t;

template <int STAGES>
static __device__ __forceinline__ void fv_prefill_next(fv_prefill_ring_t *ring)
{
    ring->count++;
    ring->slot++;
    if (ring->slot == STAGES) {
        ring->slot = 0;
        ring->parity ^= 1U;
    }
}

/* One lane for its warp: what the warp did stands before. */
static __device__ __forceinline__ void fv_prefill_release(uint64_t *bar)
{
    __syncwarp();
    if ((threadIdx.x & 31U) == 0) {
        fv_mbar_arrive(bar);
    }
}

template <typename SHAPE>
static __device__ __forceinline__ uint8_t *fv_prefill_k(uint8_t *memory, uint32_t slot)
{
    return memory + SHAPE::Q_BYTES + slot * SHAPE::STAGE_BYTES;
}

template <typename SHAPE>
static __device__ __forceinline__ uint8_t *fv_prefill_v(uint8_t *memory, uint32_t slot)
{
    return fv_prefill_k<SHAPE>(memory, slot) + SHAPE::K_BYTES;
}

/* Tokens of a page that the row with this range sees: bit t is token t. */
static __device__ __forceinline__ uint64_t fv_prefill_below(int64_t n)
{
    return (n >= 64) ? ~(uint64_t)0 : ((n <= 0) ? 0 : (((uint64_t)1 << n) - 1U));
}

static __device__ __forceinline__ uint64_t fv_prefill_sees(const fv_row_range_t &range,
                                                           const fv_prefill_page_t &page)
{
    const uint64_t end = fv_prefill_below(range.end - page.begin);
    const uint64_t begin = fv_prefill_below(range.begin - page.begin);
    const uint64_t sink = fv_prefill_below(range.sink - page.begin);
    uint64_t strided = 0;

    for (int i = 0; (page.strided != 0) && (i < FV_S2_QUARTERS); i++) {
        strided |= (((page.strided >> i) & 1) != 0) ? ((uint64_t)0xffffU << (16 * i)) : 0U;
    }
    return (sink | (end & (~begin | strided))) & fv_prefill_below(page.n_tokens);
}

#endif /* FV_KERNELS_PREFILL_SMEM_CUH */
