/*
 * lean_smem.cuh - shared memory of the lean kernel, and how its roles walk the line and the ring.
 *
 * Decode path: station 7 of 10, inside lean_kernel.cuh.
 */
#ifndef FV_KERNELS_LEAN_SMEM_CUH
#define FV_KERNELS_LEAN_SMEM_CUH

#include "kernels/lean_cuda.h"
#include "kernels/ptx.cuh"

#define FV_LEAN_TEAM  (32 * FV_LEAN_WARPS) /* threads */
#define FV_LEAN_QUEUE 8                    /* shares between claiming and computing */

/* What the copying warp tells the computing ones of a tile, beside its bytes. */
typedef struct fv_lean_tile {
    int64_t begin; /* position of the first token */
    int32_t n_tokens;
    uint16_t is_full; /* every row sees all of FV_PAGE_TOKENS tokens */
    uint16_t strided; /* as in fv_tile_t */
} fv_lean_tile_t;

typedef struct fv_lean_smem {
    uint64_t full[FV_LEAN_SLOTS_MAX], empty[FV_LEAN_SLOTS_MAX];
    fv_lean_tile_t tile[FV_LEAN_SLOTS_MAX]; /* of the K that lies in that slot */
    /* Shares on their way from the copying warp, which claims them, to the computing ones; n_tiles 0: no more. */
    uint64_t share_full[FV_LEAN_QUEUE], share_empty[FV_LEAN_QUEUE];
    fv_lean_share_t share[FV_LEAN_QUEUE];
    fv_lean_run_t run;
    fv_row_range_t ranges[FV_LEAN_ROWS_MAX];
    float m[FV_LEAN_ROWS_MAX], l[FV_LEAN_ROWS_MAX]; /* [4 / m_warps][16 m_warps] */
    float2 fold_ml[FV_LEAN_TEAM];                   /* (m, l) of the second team's threads */
    fv_lean_late_t late[2];                         /* of each team's late unit */
    fv_lean_run_t late_run[2];
    float4 part_o[2][FV_LEAN_WARPS][8]; /* of each team's unit: each warp's sums of 8 x 4 columns */
    float2 part_ml[2][FV_LEAN_WARPS][8];
    uint32_t is_last;
} fv_lean_smem_t;

/* Bytes before the Q parts, what is joined (lean_out.cuh) and the ring: all are 128-byte aligned. */
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

/* Bytes through which warps hand each other 8 rows of their O: [FV_LEAN_WARPS][8, dv_max]. */
static inline FV_HD FV_CONSTEXPR uint32_t fv_lean_join_bytes(int32_t m_warps, int32_t dv_max)
{
    return (m_warps == 4) ? 0U : (128U * (uint32_t)dv_max);
}

/* Which of the computing threads this is. */
static __device__ __forceinline__ uint32_t fv_lean_team()
{
    return threadIdx.x / FV_LEAN_TEAM;
}

static __device__ __forceinline__ uint32_t fv_lean_thread()
{
    return threadIdx.x % FV_LEAN_TEAM;
}

static __device__ __forceinline__ uint32_t fv_lean_warp()
{
    return fv_lean_thread() / 32U;
}

/*
 * What racecheck can follow. It knows that the thread which arrives at an mbarrier is done with what it read, and does
 * not know __syncwarp(): with FV_LEAN_ALL_ARRIVE every lane arrives itself, where a slot is given back and where a share
 * is told. It dates an access by who has entered a barrier, too: a team that waits there early seems to write before the
 * other has read, so that barriers of two teams come twice (docs/gpu.md). Neither changes what is ordered before what.
 */
#if defined(FV_LEAN_ALL_ARRIVE)
#    define FV_LEAN_RELEASES FV_LEAN_TEAM
#    define FV_LEAN_TELLS    32
#    define FV_LEAN_BARRIERS 2
#else
#    define FV_LEAN_RELEASES FV_LEAN_WARPS
#    define FV_LEAN_TELLS    1
#    define FV_LEAN_BARRIERS 1
#endif

/* All computing threads meet; those of one team do. */
template <int TEAMS> static __device__ __forceinline__ void fv_lean_sync()
{
    for (int i = 0; i < ((TEAMS == 2) ? FV_LEAN_BARRIERS : 1); i++) {
        fv_bar_sync(1, TEAMS * FV_LEAN_TEAM);
    }
}

static __device__ __forceinline__ void fv_lean_sync_team()
{
    fv_bar_sync(2 + (int)fv_lean_team(), FV_LEAN_TEAM);
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
/* the same by the copying warp, once */
static __device__ __forceinline__ void fv_lean_mark_copier(const fv_lean_launch_t &p, uint32_t i)
{
    if ((threadIdx.x == blockDim.x - 32U) && (p.trace != NULL)) {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(p.trace[blockIdx.x * 8U + i]));
    }
}
#    define FV_LEAN_MARK_COPIER(p, i) fv_lean_mark_copier((p), (i))
#    define FV_LEAN_MARK(p, i)        fv_lean_mark((p), (i), false)
#    define FV_LEAN_MARK_FIRST(p, i)  fv_lean_mark((p), (i), true)
#else
#    define FV_LEAN_MARK_COPIER(p, i)
#    define FV_LEAN_MARK(p, i)
#    define FV_LEAN_MARK_FIRST(p, i)
#endif

/* A computing warp is done with a slot. One lane says so for all: __syncwarp() puts their reads before it. */
static __device__ __forceinline__ void fv_lean_release(uint64_t *bar)
{
    __syncwarp();
    if ((FV_LEAN_RELEASES == FV_LEAN_TEAM) || ((threadIdx.x & 31U) == 0)) {
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

/* The late group of unit u: the last whose units begin at or before it. All lanes of a warp. */
static __device__ __forceinline__ uint32_t fv_lean_find_late(const fv_lean_launch_t &p, uint32_t u)
{
    uint32_t n = 0;

    for (uint32_t begin = 0; begin < p.n_late; begin += 32U) {
        const uint32_t i = begin + (threadIdx.x & 31U);

        n += (uint32_t)__popc(
            __ballot_sync(0xffffffffU, (i < p.n_late) && (p.late[i].unit_begin <= u)));
    }
    return n - 1U;
}

#endif /* FV_KERNELS_LEAN_SMEM_CUH */
