/*
 * lean_smem.cuh - shared memory of the lean kernel, and how its roles walk the line and the ring.
 *
 * Decode path: station 7 of 10, inside lean_kernel.cuh.
 */
#ifndef FV_KERNELS_LEAN_SMEM_CUH
#define FV_KERNELS_LEAN_SMEM_CUH

#include "kernels/lean_cuda.h"
#include "kernels/ptx.cuh"

#define FV_LEAN_THREADS    (32 * (FV_LEAN_WARPS + 1))
#define FV_LEAN_COMPUTE    (32 * FV_LEAN_WARPS)
#define FV_LEAN_PASS_COLS  64 /* columns of O that pass through shared memory at once */
#define FV_LEAN_PASS_ROWS  8
#define FV_LEAN_PASS_PITCH 72 /* floats: 8 rows x 4 float2 hit different banks */

/* What the copying warp tells the computing ones of a tile, beside its bytes. */
typedef struct fv_lean_tile {
    int64_t begin; /* position of the first token */
    int32_t n_tokens;
    int32_t is_full; /* every row sees all of FV_PAGE_TOKENS tokens */
} fv_lean_tile_t;

typedef struct fv_lean_smem {
    uint64_t full[FV_LEAN_SLOTS_MAX], empty[FV_LEAN_SLOTS_MAX];
    fv_lean_tile_t tile[FV_LEAN_SLOTS_MAX]; /* of the K that lies in that slot */
    fv_lean_run_t run;
    fv_row_range_t ranges[FV_LEAN_ROWS_MAX];
    float m[FV_LEAN_ROWS_MAX], l[FV_LEAN_ROWS_MAX]; /* [4 / m_warps][16 m_warps] */
    float pass[FV_LEAN_WARPS][FV_LEAN_PASS_ROWS][FV_LEAN_PASS_PITCH];
    uint32_t is_last;
    /* Shares on their way from the copying warp, which claims them, to the computing ones; n_tiles 0: no more. */
    uint64_t share_full[2], share_empty[2];
    fv_lean_share_t share[2];
} fv_lean_smem_t;

/* Bytes before the Q parts and the ring: both are 128-byte aligned. */
#define FV_LEAN_SMEM_FIXED ((uint32_t)((sizeof(fv_lean_smem_t) + 127U) / 128U * 128U))

/* Elements of one row of Q in shared memory: an odd number of 16-byte chunks, free of bank conflicts. */
static inline FV_HD uint32_t fv_lean_q_pitch(uint32_t dk)
{
    return (dk + 15U) / 16U * 16U + 8U;
}

static inline FV_HD uint32_t fv_lean_q_bytes(uint32_t dk, uint32_t n_rows, uint32_t n_parts)
{
    return (fv_lean_q_pitch(dk) * 2U * n_rows * n_parts + 127U) / 128U * 128U;
}

/* For measuring (FV_LEAN_TRACE): ns of the GPU's clock, written by the first computing thread. */
#if defined(FV_LEAN_TRACE)
static __device__ __forceinline__ void
fv_lean_mark(const fv_lean_launch_t &p, uint32_t i, bool is_first)
{
    if ((threadIdx.x == 0) && (p.trace != NULL)) {
        uint64_t *at = p.trace + blockIdx.x * 8U;
        uint64_t now = 0;
        uint32_t sm = 0;

        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
        asm volatile("mov.u32 %0, %smid;" : "=r"(sm));
        at[i] = (is_first && (at[i] != 0)) ? at[i] : now;
        at[4] = sm;
    }
}
#    define FV_LEAN_MARK(p, i)       fv_lean_mark((p), (i), false)
#    define FV_LEAN_MARK_FIRST(p, i) fv_lean_mark((p), (i), true)
#else
#    define FV_LEAN_MARK(p, i)
#    define FV_LEAN_MARK_FIRST(p, i)
#endif

/*
 * A computing warp is done with a slot. One lane says so for all: __syncwarp() puts their reads before it. racecheck
 * does not follow that; FV_LEAN_ALL_ARRIVE makes every lane arrive itself, which it does (docs/gpu.md).
 */
#if defined(FV_LEAN_ALL_ARRIVE)
#    define FV_LEAN_RELEASES FV_LEAN_COMPUTE
#else
#    define FV_LEAN_RELEASES FV_LEAN_WARPS
#endif

static __device__ __forceinline__ void fv_lean_release(uint64_t *bar)
{
    __syncwarp();
    if ((FV_LEAN_RELEASES == FV_LEAN_COMPUTE) || ((threadIdx.x & 31U) == 0)) {
        fv_mbar_arrive(bar);
    }
}

/* A place in the ring: K and V of a tile take a slot each, one after the other. */
typedef struct fv_lean_ring {
    uint32_t slot, parity;
} fv_lean_ring_t;

static __device__ __forceinline__ void fv_lean_ring_next(fv_lean_ring_t *ring, uint32_t n_slots)
{
    ring->slot++;
    if (ring->slot == n_slots) {
        ring->slot = 0;
        ring->parity ^= 1U;
    }
}

/* A place on the line. */
typedef struct fv_lean_walk {
    const fv_lean_run_t *run;
    int32_t head, tile;
    int32_t left; /* tiles of the share not walked yet */
} fv_lean_walk_t;

static __device__ __forceinline__ fv_lean_walk_t fv_lean_walk_begin(const fv_lean_launch_t &p,
                                                                    const fv_lean_share_t &share)
{
    fv_lean_walk_t walk;

    walk.run = p.runs + share.run;
    walk.head = share.head;
    walk.tile = share.tile;
    walk.left = share.n_tiles;
    return walk;
}

/* After n_tiles that end a group or the share. */
static __device__ __forceinline__ void
fv_lean_walk_next(fv_lean_walk_t *walk, int32_t n_tiles, int32_t n_kv_heads)
{
    walk->left -= n_tiles;
    walk->tile = 0;
    walk->head++;
    if (walk->head == n_kv_heads) {
        walk->head = 0;
        walk->run++;
    }
}

#endif /* FV_KERNELS_LEAN_SMEM_CUH */
