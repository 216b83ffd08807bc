/*
 * latent_smem.cuh - shared memory of the latent kernel, and what its roles tell each other.
 *
 * Decode path: station 7 of 10, inside latent_kernel.cuh.
 */
#ifndef FV_KERNELS_LATENT_SMEM_CUH
#define FV_KERNELS_LATENT_SMEM_CUH

#include "kernels/cluster.cuh"
#include "kernels/lean_smem.cuh"
#include "kernels/wgmma.cuh"

#define FV_LATENT_ROWS  64U /* of a CTA */
#define FV_LATENT_QUEUE 4U  /* shares between claiming and computing */
#define FV_LATENT_BARS  18U /* most chunks in the ring */
#define FV_LATENT_SLOTS 6U  /* most tiles in it */
#define FV_LATENT_FIXED 3072U

/* What differs between kernels: panels of the latent (its dims / 64; one more is the RoPE key's), element type, CTAs. */
template <int PANELS_, bool IS_F16_, int CLUSTER_> struct fv_latent_shape {
    static constexpr int PANELS = PANELS_, CLUSTER = CLUSTER_;
    static constexpr bool IS_F16 = IS_F16_;
    static constexpr int DV = 64 * PANELS_;
    static constexpr int OWN = PANELS_ / 2;           /* panels whose O one team holds */
    static constexpr int STEP = (OWN < 2) ? OWN : 2;  /* panels that come and go together */
    static constexpr int STEPS = OWN / STEP;          /* such chunks of one team */
    static constexpr int CHUNKS = PANELS_ / STEP + 1; /* of a tile; the last is the RoPE key */
    static constexpr int SLOTS = (PANELS_ == 8) ? 2 : ((PANELS_ == 4) ? 4 : 6);
    static constexpr uint32_t TILE_BYTES = (PANELS_ + 1) * FV_PANEL_BYTES;
    static constexpr float P_BIAS =
        IS_F16_ ? 14.0F : 0.0F; /* weights up to 2^14: small ones stay normal */
};

/* Shared memory in all: Q, the ring, P, the rest. */
static inline FV_HD FV_CONSTEXPR uint32_t fv_latent_smem_bytes(int panels)
{
    return (uint32_t)(panels + 1) * FV_PANEL_BYTES *
               (1U + ((panels == 8) ? 2U : ((panels == 4) ? 4U : 6U))) +
           FV_PANEL_BYTES + FV_LATENT_FIXED;
}

typedef enum fv_latent_kind {
    FV_LATENT_TILE = 0, /* weights of a tile lie in P, stat[0] is what O is multiplied with */
    FV_LATENT_PIECE,    /* a piece of a group is done: stat is m, l */
    FV_LATENT_END,
} fv_latent_kind_t;

/* From the warpgroup of scores to the teams of O. */
typedef struct fv_latent_message {
    uint64_t slot; /* PIECE: where it waits, and of which group */
    int32_t head;
    uint32_t first, n_pieces;
    int32_t kind; /* fv_latent_kind_t */
    uint32_t run; /* which of the two runs */
    uint32_t is_early,
        is_kept; /* TILE: heard once the weights are read; another message follows for the same tile */
} fv_latent_message_t;

typedef struct fv_latent_smem {
    uint64_t full[FV_LATENT_BARS], empty[FV_LATENT_BARS]; /* [slot][chunk] */
    uint64_t told, heard;                                 /* the message, P and stat */
    uint64_t share_full[FV_LATENT_QUEUE], share_empty[FV_LATENT_QUEUE];
    fv_lean_share_t share[FV_LATENT_QUEUE];
    fv_lean_tile_t tile[FV_LATENT_SLOTS];
    fv_lean_run_t run[2]; /* of the piece that is scored, and of the one before */
    fv_latent_message_t message;
    float stat[2][FV_LATENT_ROWS];
    uint32_t wild[2]; /* tokens of the tile that is cleaned: bit t % 32 of word t / 32 */
    uint32_t is_last;
} fv_latent_smem_t;

/* For late merging, over P. */
typedef struct fv_latent_late {
    fv_lean_late_t late;
    fv_lean_run_t run;
} fv_latent_late_t;

static_assert(sizeof(fv_latent_smem_t) <= FV_LATENT_FIXED, "what is beside Q, ring and P");
static_assert(2 * sizeof(fv_latent_late_t) <= FV_PANEL_BYTES, "lies over P");

/* Where things lie. All but the last are panels: multiples of 1 KB. */
typedef struct fv_latent_memory {
    uint8_t *q, *ring, *weights;
    fv_latent_smem_t *s;
} fv_latent_memory_t;

template <typename SHAPE>
static __device__ __forceinline__ fv_latent_memory_t fv_latent_place(uint8_t *memory)
{
    fv_latent_memory_t at;

    at.q = memory;
    at.ring = memory + SHAPE::TILE_BYTES;
    at.weights = at.ring + SHAPE::SLOTS * SHAPE::TILE_BYTES;
    at.s = (fv_latent_smem_t *)(at.weights + FV_PANEL_BYTES);
    return at;
}

/* Which CTA of its cluster this is, and which rows of a run are its. */
template <typename SHAPE> static __device__ __forceinline__ uint32_t fv_latent_rank()
{
    return (SHAPE::CLUSTER == 2) ? (blockIdx.x & 1U) : 0U;
}

template <typename SHAPE> static __device__ __forceinline__ int32_t fv_latent_row0()
{
    return (int32_t)(fv_latent_rank<SHAPE>() * FV_LATENT_ROWS);
}

template <typename SHAPE>
static __device__ __forceinline__ int32_t fv_latent_rows(const fv_lean_run_t &run)
{
    return min((int32_t)FV_LATENT_ROWS, run.n_rows - fv_latent_row0<SHAPE>());
}

/* The next tile of the ring. */
template <typename SHAPE>
static __device__ __forceinline__ void fv_latent_next(fv_lean_ring_t *ring)
{
    fv_lean_ring_next(ring, SHAPE::SLOTS);
}

/* A warp is done with a chunk of the ring: every CTA that copies into it is told. */
template <typename SHAPE> static __device__ __forceinline__ void fv_latent_release(uint64_t *bar)
{
    const uint32_t lane = threadIdx.x & 31U;

    __syncwarp();
    if (SHAPE::CLUSTER == 1) {
        if (lane == 0) {
            fv_mbar_arrive(bar);
        }
    } else if (lane < (uint32_t)SHAPE::CLUSTER) {
        fv_mbar_arrive_at(bar, lane);
    }
}

#endif /* FV_KERNELS_LATENT_SMEM_CUH */
