/*
 * lean_copy.cuh - the copying warp: claims shares, tells the others, and copies K and V of their tiles into the ring.
 *
 * Decode path: station 7 of 10, inside lean_kernel.cuh.
 *
 * It runs ahead of the computing warps as far as the ring is long, over groups' borders. A tile belongs to one lane, which
 * looks it up and, on sm_90, copies it in bulk; code for sm_80 copies with all lanes, 16 bytes each, and each lane arrives at
 * the slot's barrier when what it asked for has come.
 */
#ifndef FV_KERNELS_LEAN_COPY_CUH
#define FV_KERNELS_LEAN_COPY_CUH

#include "kernels/lean_smem.cuh"

/* Where the copying warp is. All lanes hold the same. */
typedef struct fv_lean_copier {
    fv_lean_ring_t ring;  /* next slot to fill */
    fv_lean_ring_t ahead; /* V of the tile that must have come before the next one is asked for */
    uint32_t n_ahead;     /* tiles asked for, up to p.tiles_ahead */
    uint64_t policy;
} fv_lean_copier_t;

static __device__ __forceinline__ void
fv_lean_tell_tile(fv_lean_smem_t *s, uint32_t k_slot, const fv_tile_t &tile)
{
    s->tile[k_slot].begin = tile.begin;
    s->tile[k_slot].n_tokens = tile.n_tokens;
    s->tile[k_slot].is_full = (tile.full && (tile.n_tokens == FV_PAGE_TOKENS)) ? 1U : 0U;
    s->tile[k_slot].strided = tile.strided;
}

/* What the lane that a tile belongs to knows: all lanes that copy it must. */
static __device__ __forceinline__ uint32_t fv_lean_from(uint32_t x, int32_t owner)
{
#if FV_HAS_SM90
    (void)owner;
    return x;
#else
    return __shfl_sync(0xffffffffU, x, owner);
#endif
}

/* True for the lanes that copy the tile of lane `owner`. */
static __device__ __forceinline__ bool fv_lean_copies(int32_t owner)
{
    return (FV_HAS_SM90 == 0) || ((int32_t)(threadIdx.x & 31U) == owner);
}

/* The owner: a slot's tile is described, and n_bytes of it are on their way or soon will be. */
static __device__ __forceinline__ void fv_lean_expect(uint64_t *full, uint32_t n_bytes)
{
#if FV_HAS_SM90
    fv_mbar_expect(full, n_bytes);
#else
    (void)n_bytes; /* the lanes that copy arrive themselves */
    fv_mbar_arrive(full);
#endif
}

static __device__ __forceinline__ void
fv_lean_load(uint8_t *dst, const uint8_t *src, uint32_t n_bytes, uint64_t *bar, uint64_t policy)
{
#if FV_HAS_SM90
    fv_bulk_load(dst, src, n_bytes, bar, policy);
#else
    (void)bar;
    fv_warp_load(dst, src, n_bytes, policy);
#endif
}

/* n_tokens of K or V: one copy, or one of each panel where they do not fill it. */
static __device__ __forceinline__ void fv_lean_load_rows(uint8_t *dst,
                                                         const uint8_t *src,
                                                         const fv_page_rows_t &rows,
                                                         uint32_t row_bytes,
                                                         uint32_t n_tokens,
                                                         uint64_t *bar,
                                                         uint64_t policy)
{
    if ((n_tokens == FV_PAGE_TOKENS) || (rows.token_bytes == row_bytes)) {
        fv_lean_load(dst, src, n_tokens * row_bytes, bar, policy);
    } else {
        for (uint32_t at = 0; at < row_bytes * FV_PAGE_TOKENS; at += FV_PANEL_BYTES) {
            fv_lean_load(dst + at, src + at, n_tokens * FV_PANEL_ROW_BYTES, bar, policy);
        }
    }
#if !FV_HAS_SM90
    fv_copies_arrive(bar);
#endif
}

/* The lanes that copy: K and V of a page go to the next two slots, which are free; n_tokens of each. */
static __device__ __forceinline__ void fv_lean_load_page(const fv_lean_launch_t &p,
                                                         fv_lean_smem_t *s,
                                                         uint8_t *ring_data,
                                                         const fv_lean_copier_t &copier,
                                                         fv_page_ref_t page,
                                                         uint32_t n_tokens)
{
    const uint8_t *k = p.arena + (uint64_t)page * FV_PAGE_UNIT;
    const uint32_t slot = copier.ring.slot;
    const uint32_t v_slot = (slot + 1U == (uint32_t)p.ring_slots) ? 0U : (slot + 1U);

    fv_lean_load_rows(ring_data + slot * p.slot_bytes, k, p.k_rows, p.k_bytes, n_tokens,
                      &s->full[slot], copier.policy);
    fv_lean_load_rows(ring_data + v_slot * p.slot_bytes, k + FV_PAGE_TOKENS * p.k_bytes, p.v_rows,
                      p.v_bytes, n_tokens, &s->full[v_slot], copier.policy);
}

/*
 * The lanes that copy: wait until the ring has room, and until the tile p.tiles_ahead before this one has come. That many tiles
 * keep the memory busy; more would only wait in its queues, and the first of them as long as the last.
 */
static __device__ __forceinline__ void fv_lean_issue(const fv_lean_launch_t &p,
                                                     fv_lean_smem_t *s,
                                                     uint8_t *ring_data,
                                                     const fv_lean_copier_t &copier,
                                                     const fv_tile_t &tile,
                                                     fv_page_ref_t page,
                                                     int32_t owner)
{
    const uint32_t n_tokens = fv_lean_from((uint32_t)tile.n_tokens, owner);
    fv_lean_ring_t v = copier.ring;

    fv_lean_ring_next(&v, (uint32_t)p.ring_slots);
    fv_mbar_wait(&s->empty[copier.ring.slot], copier.ring.parity);
    fv_mbar_wait(&s->empty[v.slot], v.parity);
    if (copier.n_ahead == p.tiles_ahead) {
        fv_mbar_wait(&s->full[copier.ahead.slot], copier.ahead.parity);
    }
    if ((int32_t)(threadIdx.x & 31U) == owner) {
        fv_lean_tell_tile(s, copier.ring.slot, tile);
        fv_lean_expect(&s->full[copier.ring.slot], n_tokens * p.k_bytes);
        fv_lean_expect(&s->full[v.slot], n_tokens * p.v_bytes);
    }
    fv_lean_load_page(p, s, ring_data, copier, fv_lean_from(page, owner), n_tokens);
}

/* After each tile: all lanes. */
static __device__ __forceinline__ void fv_lean_copier_next(const fv_lean_launch_t &p,
                                                           fv_lean_copier_t *copier)
{
    for (int i = 0; i < 2; i++) {
        fv_lean_ring_next(&copier->ring, (uint32_t)p.ring_slots);
        if (copier->n_ahead == p.tiles_ahead) {
            fv_lean_ring_next(&copier->ahead, (uint32_t)p.ring_slots);
        }
    }
    copier->n_ahead += (copier->n_ahead < p.tiles_ahead) ? 1U : 0U;
}

/*
 * The first tiles of the launch, while the ring is empty: their pages are read straight from the share, whole, and
 * are under way before the run is looked at. A slot's barrier counts the bytes when they come, but is not complete
 * before it was told how many there are.
 */
static __device__ __forceinline__ void fv_lean_copy_first(const fv_lean_launch_t &p,
                                                          fv_lean_smem_t *s,
                                                          uint8_t *ring_data,
                                                          fv_lean_copier_t *copier,
                                                          const fv_lean_share_t &share,
                                                          fv_lean_walk_t *walk)
{
    const int32_t lane = (int32_t)(threadIdx.x & 31U);
    const int32_t n = min((int32_t)share.n_direct, (int32_t)p.tiles_ahead);
    const fv_page_ref_t page = (lane < n) ? share.pages[lane] : 0;
    const uint32_t k_slot = 2U * (uint32_t)lane; /* the ring holds tiles_ahead tiles */

    FV_LEAN_MARK_COPIER(p, 7);
    for (int32_t i = 0; i < n; i++) { /* in order: the first tile is waited for */
        if (fv_lean_copies(i)) {
            fv_lean_load_page(p, s, ring_data, *copier, fv_lean_from(page, i), FV_PAGE_TOKENS);
        }
        fv_lean_copier_next(p, copier);
        __syncwarp();
    }
    if (lane < n) {
        const fv_tile_query_t query = fv_lean_head_query(walk->run, walk->head);
        const fv_tile_list_t tiles = walk->run->tiles;

        fv_lean_tell_tile(s, k_slot, fv_tile_at(&query, &tiles, walk->tile + lane));
        fv_lean_expect(&s->full[k_slot], FV_PAGE_TOKENS * p.k_bytes);
        fv_lean_expect(&s->full[k_slot + 1U], FV_PAGE_TOKENS * p.v_bytes);
    }
    __syncwarp();
    walk->left -= n;
    walk->tile += n;
    if ((walk->left > 0) && (walk->tile == walk->run->n_tiles)) {
        fv_lean_walk_next(walk, 0, walk->run->n_kv_heads);
    }
}

/* Brings the group's Q near: the computing warps read it when they get there. */
static __device__ __forceinline__ void
fv_lean_prefetch_q(const fv_lean_launch_t &p, const fv_lean_run_t *run, int32_t head)
{
    const uint32_t row_bytes =
        (uint32_t)p.head_dim_qk * ((run->io_dtype == FV_DTYPE_F32) ? 4U : 2U);

    for (int32_t r = (int32_t)(threadIdx.x & 31U); r < run->n_rows; r += 32) {
        const int32_t row = run->row_begin + r;
        const int32_t t = row / run->group;
        const uint8_t *q = run->q + (uint64_t)t * run->q_token_bytes +
                           (uint64_t)(head * run->group + (row - t * run->group)) * row_bytes;

        for (uint32_t at = 0; at < row_bytes; at += 128U) {
            fv_prefetch(q + at);
        }
    }
}

/* Tiles of one share from walk on, until `stop` are left: 32 at a time, each lane looks up one, in order they go. */
static __device__ __forceinline__ void fv_lean_copy_until(const fv_lean_launch_t &p,
                                                          fv_lean_smem_t *s,
                                                          uint8_t *ring_data,
                                                          fv_lean_copier_t *copier,
                                                          fv_lean_walk_t *walk,
                                                          int32_t stop)
{
    const int32_t lane = (int32_t)(threadIdx.x & 31U);

    while (walk->left > stop) {
        const fv_lean_run_t *run = walk->run;
        const int32_t n = min(min(walk->left - stop, run->n_tiles - walk->tile), 32);
        const fv_tile_query_t query = fv_lean_head_query(run, walk->head);
        const fv_tile_list_t tiles = run->tiles;
        const fv_page_ref_t *pages = fv_lean_head_pages(run, walk->head);
        const bool is_end = walk->tile + n == run->n_tiles;
        fv_tile_t tile = {};
        fv_page_ref_t page = 0;

        if ((lane < n) && (run->is_empty == 0)) {
            tile = fv_tile_at(&query, &tiles, walk->tile + lane);
            page = pages[fv_lean_page_index(run, tile.local_page)];
        }
        if (walk->tile == 0) {
            fv_lean_prefetch_q(p, run, walk->head);
        }
        for (int32_t i = 0; (run->is_empty == 0) && (i < n); i++) {
            if (fv_lean_copies(i)) {
                fv_lean_issue(p, s, ring_data, *copier, tile, page, i);
            }
            fv_lean_copier_next(p, copier);
            __syncwarp();
        }
        if (is_end) {
            fv_lean_walk_next(walk, n, run->n_kv_heads);
        } else {
            walk->left -= n;
            walk->tile += n;
        }
    }
}

/* Asks for the next share: lane 0 will know. The last CTA to find none resets the counter. */
static __device__ __forceinline__ uint32_t fv_lean_claim(const fv_lean_launch_t &p)
{
    uint32_t taken = p.n_shares;

    if (((threadIdx.x & 31U) == 0) && (p.n_shares > p.n_ctas)) {
        taken = atomicAdd(p.claimed, 1U);
        if (taken == p.n_shares - 1U) {
            *p.claimed = 0;
        }
    }
    return taken;
}

/* The share that was claimed; n_tiles 0 when all are taken. */
static __device__ __forceinline__ fv_lean_share_t fv_lean_claimed(const fv_lean_launch_t &p,
                                                                  uint32_t taken)
{
    const uint32_t index = p.n_ctas + __shfl_sync(0xffffffffU, taken, 0);
    fv_lean_share_t share = {};

    if (index < p.n_shares) {
        share = p.shares[index];
    }
    return share;
}

/* The computing warps may have the share, or know that there is none. */
static __device__ __forceinline__ void
fv_lean_tell_share(fv_lean_smem_t *s, fv_lean_ring_t *queue, const fv_lean_share_t &share)
{
    if ((threadIdx.x & 31U) == 0) {
        fv_mbar_wait(&s->share_empty[queue->slot], queue->parity);
        s->share[queue->slot] = share;
    }
    if (FV_LEAN_TELLS > 1) {
        __syncwarp();
    }
    if ((FV_LEAN_TELLS > 1) || ((threadIdx.x & 31U) == 0)) {
        fv_mbar_arrive(&s->share_full[queue->slot]);
    }
    fv_lean_ring_next(queue, FV_LEAN_QUEUE);
}

/* What the teams need for their first late units, while they are busy with the last tiles. */
template <int TEAMS>
static __device__ __forceinline__ void fv_lean_fetch_late(const fv_lean_launch_t &p,
                                                          fv_lean_smem_t *s)
{
    const uint32_t lane = threadIdx.x & 31U;

#pragma unroll
    for (uint32_t team = 0; team < TEAMS; team++) {
        const uint32_t unit = blockIdx.x + team * p.n_ctas;

        if (unit < p.n_late_units) {
            const uint32_t at = fv_lean_find_late(p, unit);
            const fv_lean_run_t *run = p.runs + p.late[at].run;

            if (lane == 0) {
                s->late[team] = p.late[at];
            }
            for (uint32_t i = lane; i < sizeof(fv_lean_run_t) / 8U; i += 32U) {
                ((uint64_t *)&s->late_run[team])[i] = ((const uint64_t *)run)[i];
            }
        }
    }
    __syncwarp();
}

template <int TEAMS>
static __device__ void
fv_lean_copy(const fv_lean_launch_t &p, fv_lean_smem_t *s, uint8_t *ring_data)
{
    fv_lean_copier_t copier = {
        {0, 1}, {1, 0}, 0, fv_evict_first()}; /* parity 1: never used is empty */
    fv_lean_ring_t queue = {0, 1};
    fv_lean_share_t share = p.shares[blockIdx.x];

    FV_LEAN_MARK_COPIER(p, 6);
    for (bool is_first = true; share.n_tiles > 0; is_first = false) {
        fv_lean_walk_t walk = fv_lean_walk_begin(p, share);
        uint32_t taken = 0;

        fv_lean_tell_share(s, &queue, share);
        if (is_first) {
            fv_lean_copy_first(p, s, ring_data, &copier, share, &walk);
        }
        /* the next share is asked for shortly before this one has gone: not to wait, and not to hoard */
        fv_lean_copy_until(p, s, ring_data, &copier, &walk, 3);
        taken = fv_lean_claim(p);
        fv_lean_copy_until(p, s, ring_data, &copier, &walk, 1);
        share = fv_lean_claimed(p, taken);
        fv_lean_copy_until(p, s, ring_data, &copier, &walk, 0);
    }
    fv_launch_dependents();
    fv_lean_fetch_late<TEAMS>(p, s);
    fv_lean_tell_share(s, &queue, {});
}

#endif /* FV_KERNELS_LEAN_COPY_CUH */
