/*
 * prefill_load.cuh - the warpgroup that brings: one warp copies K and V, one looks V through, two bring Q, one of which claims units.
 *
 * Station 7 of 10, inside prefill_kernel.cuh.
 */
#ifndef FV_KERNELS_PREFILL_LOAD_CUH
#define FV_KERNELS_PREFILL_LOAD_CUH

#include "kernels/prefill_smem.cuh"

/* ------------------------------------------------------------------ units */

/* Unit number `index`: which block, which head. Heads of a section stand together, blocks in order within it. */
static __device__ __forceinline__ fv_prefill_unit_t fv_prefill_unit_at(const fv_prefill_launch_t &p,
                                                                       uint32_t index)
{
    fv_prefill_unit_t unit = {};

    unit.n_tiles = -1;
    if (index >= p.n_units) {
        return unit;
    }
    const uint32_t section = index / (p.n_blocks * p.heads_each);
    const uint32_t rest = index - section * p.n_blocks * p.heads_each;
    const uint32_t block = rest / p.heads_each;
    const fv_prefill_block_t b = p.blocks[block];

    unit.run = p.runs + b.run;
    unit.head = (int32_t)(section * p.heads_each + (rest - block * p.heads_each));
    unit.row_begin = b.row_begin;
    unit.n_rows = min(unit.run->n_rows - b.row_begin, FV_PREFILL_ROWS);
    unit.n_tiles = 0;
    return unit;
}

/* The next unit, for all lanes. The last CTA to find none puts the counter back. */
static __device__ __forceinline__ uint32_t fv_prefill_claim(const fv_prefill_launch_t &p)
{
    uint32_t taken = 0;

    if ((threadIdx.x & 31U) == 0) {
        taken = atomicAdd(p.claimed, 1U);
        if (taken == p.n_units - 1U) {
            *p.claimed = 0;
        }
    }
    return p.n_ctas + __shfl_sync(0xffffffffU, taken, 0);
}

/* Unit number n of this CTA goes to the queue: which it is, and its list of tiles. False: there is none. All lanes. */
template <typename SHAPE>
static __device__ __forceinline__ bool
fv_prefill_tell_unit(const fv_prefill_launch_t &p, fv_prefill_smem_t *s, uint32_t n, uint32_t index)
{
    fv_prefill_order_t order = {};

    order.unit = fv_prefill_unit_at(p, index);
    if (order.unit.n_tiles == 0) {
        const fv_lean_run_t *run = order.unit.run;

        order.query = fv_lean_head_query(run, order.unit.head);
        order.query.q_begin = run->position + order.unit.row_begin / run->group;
        order.query.q_end =
            run->position + (order.unit.row_begin + order.unit.n_rows - 1) / run->group + 1;
        order.list = fv_tiles_make(&order.query);
        order.unit.n_tiles = (fv_tiles_count(&order.list) + SHAPE::N_PAGES - 1) / SHAPE::N_PAGES;
    }
    fv_mbar_wait(&s->unit_empty[n & 1U], ((n >> 1U) & 1U) ^ 1U);
    if ((threadIdx.x & 31U) == 0) {
        s->queue[n & 1U] = order;
        fv_mbar_arrive(&s->unit_full[n & 1U]);
    }
    __syncwarp();
    return order.unit.n_tiles >= 0;
}

/* ------------------------------------------------------------------ K and V */

/* What the copying warp keeps. */
typedef struct fv_prefill_copier {
    fv_prefill_ring_t ring;
    uint32_t n_scans;
} fv_prefill_copier_t;

/* Tells the scanning warp of a tile. */
static __device__ __forceinline__ void
fv_prefill_tell_scan(fv_prefill_smem_t *s, uint32_t *n_scans, uint32_t what)
{
    const uint32_t at = *n_scans % FV_PREFILL_TILES;

    if ((threadIdx.x & 31U) == 0) {
        s->scan[at] = what;
        fv_mbar_arrive(&s->scan_full[at]);
    }
    (*n_scans)++;
}

/*
 * One tile: lanes [first, first + N_PAGES) hold its pages, first among them lane `first`. Whole pages are copied: what lies
 * behind their tokens is masked.
 */
template <typename SHAPE>
static __device__ __forceinline__ void fv_prefill_issue(const fv_prefill_launch_t &p,
                                                        fv_prefill_smem_t *s,
                                                        uint8_t *memory,
                                                        fv_prefill_copier_t *copier,
                                                        const fv_prefill_page_t &page,
                                                        bool is_full,
                                                        uint32_t first)
{
    constexpr uint32_t ones = (1U << SHAPE::N_PAGES) - 1U;
    const uint32_t lane = threadIdx.x & 31U;
    const uint32_t slot = copier->ring.slot;
    const uint32_t at = copier->ring.count % FV_PREFILL_TILES;
    const bool is_mine = (lane >= first) && (lane < first + SHAPE::N_PAGES);
    const bool is_there = is_mine && (page.n_tokens > 0);
    const uint32_t n = (uint32_t)__popc(__ballot_sync(0xffffffffU, is_there));
    const bool is_masked = (__ballot_sync(0xffffffffU, is_mine && is_full) >> first) != ones;
    uint64_t *v_bar = is_masked ? &s->v_raw[slot] : &s->v_full[slot];
    const uint8_t *src = p.arena + (uint64_t)page.page * FV_PAGE_UNIT;
    uint8_t *k = fv_prefill_k<SHAPE>(memory, slot) + (lane - first) * FV_PANEL_BYTES;
    uint8_t *v = fv_prefill_v<SHAPE>(memory, slot) + (lane - first) * SHAPE::V_PAGE_BYTES;

    fv_mbar_wait(&s->k_empty[slot], copier->ring.parity);
    if (is_mine) {
        s->tile[at].page[lane - first] = page;
    }
    if (lane == first) {
        s->tile[at].is_masked = is_masked ? 1U : 0U;
        s->tile[at].is_spoiled = 0;
    }
    __syncwarp();
    if (lane == first) {
        fv_mbar_expect(&s->k_full[slot], n * SHAPE::K_PAGE_BYTES);
    }
    for (uint32_t i = 0; is_there && (i < SHAPE::DK / 64); i++) {
        fv_bulk_load_l2(k + i * SHAPE::N_TOKENS * FV_PANEL_ROW_BYTES, src + i * FV_PANEL_BYTES,
                        FV_PANEL_BYTES, &s->k_full[slot]);
    }
    fv_mbar_wait(&s->v_empty[slot], copier->ring.parity);
    if (lane == first) {
        fv_mbar_expect(v_bar, n * SHAPE::V_PAGE_BYTES);
    }
    if (is_there) {
        fv_bulk_load_l2(v, src + SHAPE::K_PAGE_BYTES, SHAPE::V_PAGE_BYTES, v_bar);
    }
    if (is_masked) {
        fv_prefill_tell_scan(s, &copier->n_scans, slot | (at << 8U));
    }
    fv_prefill_next<SHAPE::STAGES>(&copier->ring);
    __syncwarp();
}

/* All tiles of a unit: 32 pages at a time, each lane looks up one. */
template <typename SHAPE>
static __device__ __forceinline__ void fv_prefill_copy_unit(const fv_prefill_launch_t &p,
                                                            fv_prefill_smem_t *s,
                                                            uint8_t *memory,
                                                            fv_prefill_copier_t *copier,
                                                            const fv_prefill_unit_t &unit,
                                                            const fv_tile_query_t &query,
                                                            const fv_tile_list_t &list)
{
    const int32_t lane = (int32_t)(threadIdx.x & 31U);
    const int32_t n_pages = fv_tiles_count(&list);
    const fv_page_ref_t *pages = fv_lean_head_pages(unit.run, unit.head);

    for (int32_t begin = 0; begin < n_pages; begin += 32) {
        fv_prefill_page_t page = {};
        bool is_full = false;

        if (begin + lane < n_pages) {
            const fv_tile_t tile = fv_tile_at(&query, &list, begin + lane);

            page.begin = tile.begin;
            page.page = pages[fv_lean_page_index(unit.run, tile.local_page)];
            page.n_tokens = (int16_t)tile.n_tokens;
            page.strided = tile.strided;
            is_full = tile.full && (tile.n_tokens == FV_PAGE_TOKENS);
        }
        const int32_t n = min(n_pages - begin, 32);

        for (int32_t first = 0; first < n; first += SHAPE::N_PAGES) {
            fv_prefill_issue<SHAPE>(p, s, memory, copier, page, is_full, (uint32_t)first);
        }
    }
}

/* The warp that copies K and V. */
template <typename SHAPE>
static __device__ void
fv_prefill_copy(const fv_prefill_launch_t &p, fv_prefill_smem_t *s, uint8_t *memory)
{
    fv_prefill_copier_t copier = {{0, 1, 0}, 0}; /* parity 1: never used is empty */

    for (uint32_t n = 0;; n++) {
        const uint32_t at = n & 1U;

        fv_mbar_wait(&s->unit_full[at], (n >> 1U) & 1U);
        if (s->queue[at].unit.n_tiles < 0) {
            break;
        }
        fv_prefill_copy_unit<SHAPE>(p, s, memory, &copier, s->queue[at].unit, s->queue[at].query,
                                    s->queue[at].list);
        fv_prefill_release(&s->unit_empty[at]);
    }
    fv_prefill_tell_scan(s, &copier.n_scans, FV_PREFILL_STOP);
}

/* ------------------------------------------------------------------ Q */

/* Where a thread that brings Q reads: one chunk of 8 elements in every panel, of every FV_PREFILL_Q_STEP-th row. */
#define FV_PREFILL_Q_STEP (4U * FV_PREFILL_Q_WARPS)
typedef struct fv_prefill_q_walk {
    const uint8_t *q;
    int32_t g, group;
    uint64_t step_bytes,
        wrap_bytes; /* to the next row; more when it is another token's than that says */
    int32_t d_g;
} fv_prefill_q_walk_t;

template <typename SHAPE>
static __device__ __forceinline__ fv_prefill_q_walk_t
fv_prefill_q_begin(const fv_prefill_unit_t &unit, uint32_t thread)
{
    const uint64_t token_bytes = unit.run->q_token_bytes;
    const uint64_t row_bytes = SHAPE::DK * 2U;
    const int32_t row = unit.row_begin + (int32_t)(thread / 8U);
    fv_prefill_q_walk_t walk;

    walk.group = unit.run->group;
    walk.g = row % walk.group;
    walk.d_g = (int32_t)FV_PREFILL_Q_STEP % walk.group;
    walk.step_bytes = (uint64_t)((int32_t)FV_PREFILL_Q_STEP / walk.group) * token_bytes +
                      (uint64_t)walk.d_g * row_bytes;
    walk.wrap_bytes = token_bytes - (uint64_t)walk.group * row_bytes;
    walk.q = unit.run->q + (uint64_t)(row / walk.group) * token_bytes +
             (uint64_t)(unit.head * walk.group + walk.g) * row_bytes + (thread & 7U) * 16U;
    return walk;
}

/* The unit's rows; those that do not exist are zero. */
template <typename SHAPE>
static __device__ __forceinline__ void
fv_prefill_load_q(fv_prefill_q_walk_t walk, int32_t n_rows, uint8_t *memory, uint32_t thread)
{
    const uint8_t *valid = walk.q;
    uint8_t *to = memory + thread / 8U * FV_PANEL_ROW_BYTES + ((thread ^ (thread / 8U)) & 7U) * 16U;

#pragma unroll 4
    for (uint32_t r = thread / 8U; r < FV_PREFILL_ROWS; r += FV_PREFILL_Q_STEP) {
        const bool is_there = (int32_t)r < n_rows;

#pragma unroll
        for (uint32_t panel = 0; panel < SHAPE::DK / 64; panel++) {
            fv_copy16(to + panel * SHAPE::Q_PANEL_BYTES,
                      (is_there ? walk.q : valid) + panel * FV_PANEL_ROW_BYTES, is_there);
        }
        to += FV_PREFILL_Q_STEP * FV_PANEL_ROW_BYTES;
        walk.q += walk.step_bytes;
        walk.g += walk.d_g;
        if (walk.g >= walk.group) {
            walk.g -= walk.group;
            walk.q += walk.wrap_bytes;
        }
    }
}

/*
 * The warps that bring Q, and what the computing warpgroups must know of a unit. The second one claims units, one ahead of
 * the one whose Q is brought.
 */
template <typename SHAPE>
static __device__ void fv_prefill_bring_q(const fv_prefill_launch_t &p,
                                          fv_prefill_smem_t *s,
                                          uint8_t *memory,
                                          uint32_t thread)
{
    static_assert((sizeof(fv_lean_run_t) % 8 == 0) &&
                      (sizeof(fv_lean_run_t) / 8 <= 32 * FV_PREFILL_Q_WARPS),
                  "copied in words of 8 bytes, one a thread");
    static_assert(offsetof(fv_lean_run_t, query.head) < 32 * 8, "by the warp that corrects it");
    bool is_claiming = thread >= 32U;

    if (is_claiming) {
        (void)fv_prefill_tell_unit<SHAPE>(p, s, 0, blockIdx.x);
    }
    for (uint32_t n = 0;; n++) {
        const uint32_t at = n & 1U;
        uint64_t word = 0;

        if (is_claiming && (n > 0)) {
            is_claiming = fv_prefill_tell_unit<SHAPE>(p, s, n + 1U, fv_prefill_claim(p));
        }
        fv_mbar_wait(&s->unit_full[at], (n >> 1U) & 1U);
        const fv_prefill_unit_t unit = s->queue[at].unit;

        fv_prefill_release(&s->unit_empty[at]);
        if (unit.n_tiles < 0) {
            fv_mbar_wait(&s->q_empty, at ^ 1U);
            if (thread == 0) {
                s->unit[at] = unit;
            }
            fv_prefill_release(&s->q_full);
            break;
        }
        if (thread < sizeof(fv_lean_run_t) / 8U) {
            word = ((const uint64_t *)unit.run)[thread];
        }
        const fv_prefill_q_walk_t walk = fv_prefill_q_begin<SHAPE>(unit, thread);

        fv_mbar_wait(&s->q_empty, at ^ 1U); /* and nobody looks at the run of unit n - 2 any more */
        fv_prefill_load_q<SHAPE>(walk, unit.n_rows, memory, thread);
        if (thread < sizeof(fv_lean_run_t) / 8U) {
            ((uint64_t *)&s->run[at])[thread] = word;
        }
        __syncwarp();
        if (thread == 0) { /* S2: masks go by this head's pattern; the first one may be dense */
            s->run[at].query.head += unit.head * unit.run->head_step;
            s->unit[at] = unit;
        }
        fv_copy16_wait();
        fv_async_proxy_fence();
        fv_prefill_release(&s->q_full);
        if (is_claiming && (n == 0)) { /* the first unit is not kept waiting */
            is_claiming = fv_prefill_tell_unit<SHAPE>(p, s, 1, fv_prefill_claim(p));
        }
    }
}

#endif /* FV_KERNELS_PREFILL_LOAD_CUH */
