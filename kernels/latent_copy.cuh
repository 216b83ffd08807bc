/*
 * latent_copy.cuh - the copying warp of the latent kernel: claims shares, and brings their pages into the ring.
 *
 * Decode path: station 7 of 10, inside latent_kernel.cuh.
 *
 * A page comes in chunks of one or two panels with a barrier each, so that scores begin with the first and a place is
 * filled again as soon as its own part of O has been added. The two CTAs of a cluster bring half of each chunk each, to
 * both: a page crosses the L2 once for 128 rows.
 */
#ifndef FV_KERNELS_LATENT_COPY_CUH
#define FV_KERNELS_LATENT_COPY_CUH

#include "kernels/latent_smem.cuh"
#include "kernels/lean_copy.cuh"

typedef struct fv_latent_copier {
    fv_lean_ring_t ring; /* next slot to fill */
    uint64_t policy;
} fv_latent_copier_t;

/* One lane: a page into the next slot, chunk by chunk, each when its place is free in all CTAs of the cluster. */
template <typename SHAPE>
static __device__ __forceinline__ void fv_latent_load(const fv_lean_launch_t &p,
                                                      const fv_latent_memory_t &at,
                                                      const fv_latent_copier_t &copier,
                                                      const fv_tile_t &tile,
                                                      fv_page_ref_t page)
{
    const uint32_t slot = copier.ring.slot;
    const uint8_t *src = p.arena + (uint64_t)page * FV_PAGE_UNIT;
    uint8_t *dst = at.ring + slot * SHAPE::TILE_BYTES;

#pragma unroll
    for (int c = 0; c < SHAPE::CHUNKS; c++) {
        const uint32_t begin = (uint32_t)(c * SHAPE::STEP) * FV_PANEL_BYTES;
        const uint32_t n_bytes =
            ((c == SHAPE::CHUNKS - 1) ? 1U : (uint32_t)SHAPE::STEP) * FV_PANEL_BYTES;
        const uint32_t part = n_bytes / SHAPE::CLUSTER;
        const uint32_t from = begin + fv_latent_rank<SHAPE>() * part;
        const uint32_t bar = slot * SHAPE::CHUNKS + (uint32_t)c;

        fv_mbar_wait(&at.s->empty[bar], copier.ring.parity);
        if (c == SHAPE::CHUNKS - 1) { /* the scores' warpgroup has let go of the tile before */
            at.s->tile[slot].begin = tile.begin;
            at.s->tile[slot].n_tokens = tile.n_tokens;
            at.s->tile[slot].is_full = tile.full && (tile.n_tokens == FV_PAGE_TOKENS);
            at.s->tile[slot].strided = tile.strided;
        }
        fv_mbar_expect(&at.s->full[bar], n_bytes);
        if (SHAPE::CLUSTER == 1) {
            fv_bulk_load(dst + from, src + from, part, &at.s->full[bar], copier.policy);
        } else {
            fv_bulk_load_to(dst + from, src + from, part, &at.s->full[bar],
                            (uint16_t)((1U << SHAPE::CLUSTER) - 1U), copier.policy);
        }
    }
}

/* Tile i of a head of a run, and its page. A function of its own: it needs many registers, once in 32 tiles. */
static __device__ __noinline__ fv_tile_t fv_latent_look_up(const fv_lean_run_t *run,
                                                           int32_t head,
                                                           int32_t i,
                                                           fv_page_ref_t *page)
{
    const fv_tile_query_t query = fv_lean_head_query(run, head);
    const fv_tile_list_t tiles = run->tiles;
    const fv_tile_t tile = fv_tile_at(&query, &tiles, i);

    *page = fv_lean_head_pages(run, head)[fv_lean_page_index(run, tile.local_page)];
    return tile;
}

/* Tiles of one share from walk on, until `stop` are left: 32 at a time, each lane looks up one, in order they go. */
template <typename SHAPE>
static __device__ __forceinline__ void fv_latent_copy_until(const fv_lean_launch_t &p,
                                                            const fv_latent_memory_t &at,
                                                            fv_latent_copier_t *copier,
                                                            fv_lean_walk_t *walk,
                                                            int32_t stop)
{
    const int32_t lane = (int32_t)(threadIdx.x & 31U);

    while (walk->left > stop) {
        const fv_lean_run_t *run = walk->run;
        const int32_t n = min(min(walk->left - stop, run->n_tiles - walk->tile), 32);
        const bool is_empty = run->is_empty != 0;
        const bool is_end = walk->tile + n == run->n_tiles;
        fv_tile_t tile = {};
        fv_page_ref_t page = 0;

        if ((lane < n) && !is_empty) {
            tile = fv_latent_look_up(run, walk->head, walk->tile + lane, &page);
        }
        for (int32_t i = 0; !is_empty && (i < n); i++) {
            if (i == lane) {
                fv_latent_load<SHAPE>(p, at, *copier, tile, page);
            }
            fv_latent_next<SHAPE>(&copier->ring);
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

/* The warpgroup of scores may have the share, or know that there is none. */
static __device__ __forceinline__ void
fv_latent_tell_share(fv_latent_smem_t *s, fv_lean_ring_t *queue, const fv_lean_share_t &share)
{
    if ((threadIdx.x & 31U) == 0) {
        fv_mbar_wait(&s->share_empty[queue->slot], queue->parity);
        s->share[queue->slot] = share;
        fv_mbar_arrive(&s->share_full[queue->slot]);
    }
    fv_lean_ring_next(queue, FV_LATENT_QUEUE);
}

template <typename SHAPE>
static __device__ __forceinline__ void fv_latent_copy(const fv_lean_launch_t &p,
                                                      const fv_latent_memory_t &at)
{
    fv_latent_copier_t copier = {{0, 1}, fv_evict_first()}; /* parity 1: never used is empty */
    fv_lean_ring_t queue = {0, 1};
    fv_lean_share_t share = p.shares[blockIdx.x / (uint32_t)SHAPE::CLUSTER];

    while (share.n_tiles > 0) {
        fv_lean_walk_t walk = fv_lean_walk_begin(p, share);
        uint32_t taken = 0;

        fv_latent_tell_share(at.s, &queue, share);
        fv_latent_copy_until<SHAPE>(p, at, &copier, &walk, 2);
        taken = fv_lean_claim(p);
        share = fv_lean_claimed(p, taken);
        fv_latent_copy_until<SHAPE>(p, at, &copier, &walk, 0);
    }
    fv_launch_dependents();
    fv_latent_tell_share(at.s, &queue, {});
}

#endif /* FV_KERNELS_LATENT_COPY_CUH */
