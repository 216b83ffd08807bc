/*
 * lean_cuda.h - what the host plans and the lean kernel reads: runs, shares, and one launch. Private to kernels/.
 *
 * Decode path: station 7 of 10. Before: attend_cuda.c (plans). After: lean_cuda.cu (executes).
 *
 * Source: LeanAttention, arXiv:2405.10480, with the arithmetic of lean.h in units of whole tiles. A launch holds items
 * of one geometry. Its line of tiles is made of runs: one block of query rows of one item, for all KV heads
 * (every head of a run has the same number of tiles, so a position on the line is found by one division).
 * S2: for neighbouring heads whose lists are as long, and each query head is a head of its own where each has a pattern:
 *
 *     run    |        run 0: 3 heads x 2 tiles        |  run 1: 1 head x 5 tiles  |
 *     group  |  h0 h0   |  h1 h1   |  h2 h2           |  h0 h0 h0 h0 h0           |
 *     share  |---- 0 ----|---- 1 ----|---- 2 ----|---- 3 ----|
 *
 * A short line has one share for each CTA, equal to a tile. On a long one that is not fair: SMs of one GPU get up to a
 * third more bandwidth than others (traces in docs/gpu.md). So its shares come in rounds of one for each CTA, smaller
 * from round to round; the first round is dealt out, of the others each CTA takes the next when it is done. The cuts
 * depend on the step alone, and merging on the order of shares alone: who does a share changes no bit of the result.
 *
 * A group cut by a border leaves pieces, one for each share that it lies in. A share has at most two pieces of cut
 * groups: slot 2s when the piece continues a group begun before, slot 2s + 1 when the group begins in the share and
 * goes on in the next. A counter of the group says how many have come. Which way its pieces are merged is the plan's:
 *
 *     early  small groups in the middle of the line: whoever brings the last piece merges, while others stream
 *     late   large ones, and those at the end of the line, where everybody would wait for one: the merge is cut into
 *            units (some columns of some rows), which are dealt out; a CTA that has no more shares waits for its
 *            unit's group and merges it. The launch is cooperative, so every CTA that is waited for is on the GPU.
 *
 * How pages are stored: page_layout_cuda.h.
 */
#ifndef FV_KERNELS_LEAN_CUDA_H
#define FV_KERNELS_LEAN_CUDA_H

#include "kernels/kernels.h"
#include "kernels/page_layout_cuda.h"
#include "kernels/tiles.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FV_LEAN_WARPS        4  /* that compute; one more copies */
#define FV_LEAN_ROWS_MAX     64 /* of one block: 16 for each computing warp */
#define FV_LEAN_SHARES_MAX   8  /* for each CTA that the GPU holds */
#define FV_LEAN_SPLIT_MAX    16 /* threads that share a group's pieces in late merging: 1, 4 or 16 */
#define FV_LEAN_SLOTS_MAX    24                   /* of the ring in shared memory */
#define FV_LEAN_UNIT_THREADS (32 * FV_LEAN_WARPS) /* that merge a unit */

#ifdef __cplusplus
#    define FV_CONSTEXPR constexpr
#else
#    define FV_CONSTEXPR
#endif

/* How elements of K and V reach the tensor cores. */
typedef enum fv_lean_kind {
    FV_LEAN_BF16 = 0,     /* bf16 KV; Q in 1 to 3 bf16 parts, whatever its dtype */
    FV_LEAN_F16 = 1,      /* fp16 KV and Q */
    FV_LEAN_F32_WIDE = 2, /* fp32 KV in 3 bf16 parts, Q alike */
    FV_LEAN_F16_WIDE = 3, /* fp16 KV in 2 bf16 parts, for a Q that fp16 can not hold */
} fv_lean_kind_t;

typedef struct fv_lean_dst {
    uint64_t row_begin;
    float *o, *lse_log2;
} fv_lean_dst_t;

/* Which kernel does a launch: the lean kernel, or for latents (V is a part of K) one of latent_cuda.cu. */
typedef enum fv_lean_latent {
    FV_LATENT_NONE = 0,
    FV_LATENT_ONE = 1, /* wgmma, up to 64 rows */
    FV_LATENT_PAIR =
        2, /* the same, up to 128 rows: two CTAs with half of them each read a page together */
    FV_LATENT_ANY = 3, /* any dims and dtypes, up to 16 rows */
} fv_lean_latent_t;

/* One block of query rows of one item, its KV heads. Device memory; all pointers are the device's. */
typedef struct fv_lean_run {
    fv_tile_query_t query; /* of the block's rows at head 0: fv_lean_head_query() */
    fv_tile_list_t tiles;
    const fv_page_ref_t *
        pages; /* of fv_lean_head_pages(): [pages_stride], local pages, those of the gap left out */
    const uint8_t *q; /* of the item's first token and the run's first head; out and lse alike */
    uint8_t *out;
    float *lse; /* or NULL */
    const fv_lean_dst_t *dst;
    uint64_t q_token_bytes, out_token_bytes, lse_token_stride;
    uint32_t q_head_bytes, out_head_bytes;
    uint32_t rope_gap_bytes; /* latents: of a row of Q, between dims [0, dv) and the others */
    float latent_mu;         /* latents: factor of dims [0, dv) in the scores */
    int64_t position;        /* of the item's first query token */
    uint32_t line_begin;     /* first tile on the line */
    int32_t n_tiles;         /* of each head; 1 and is_empty when there is none */
    int32_t n_kv_heads, group;
    int32_t head_step; /* S2: from one head's pattern to the next one's; 0: they have the same */
    int32_t table_group, table_head; /* heads that share a row of pages; which of them head 0 is */
    int32_t n_q_heads, q_head;       /* query heads of the item; the first of head 0 among them */
    int32_t row_begin, n_rows;       /* rows of a KV head: r = t * group + g */
    int32_t pages_stride, gap_begin, gap_pages; /* pages >= gap_begin stand gap_pages earlier */
    int32_t io_dtype, n_q_parts, n_dst;
    int32_t is_empty;
    float score_scale;          /* log2 units of one unit of S, after the softcap if any */
    float cap_inner, cap_outer; /* S = cap_outer * tanh(S * cap_inner); 0: no softcap */
} fv_lean_run_t;

/* A stretch of the line that one CTA does. 56 bytes. */
typedef struct fv_lean_share {
    uint32_t run;
    int32_t head, tile; /* of that run: where it begins */
    int32_t n_tiles;    /* of the share */
    uint32_t index;     /* of the share itself */
    uint32_t first;     /* share in which the group cut by this one's begin began */
    uint32_t n_first;   /* pieces of that group; | FV_LEAN_LATE */
    uint32_t n_last;    /* of the group that begins here and goes on in the next; | FV_LEAN_LATE */
    const fv_page_ref_t *pages; /* of the first tile: device memory */
    const uint8_t *q;           /* of its first group: n_q_rows side by side */
    uint32_t n_direct; /* tiles of its group whose pages follow it there; 0: look them up */
    uint32_t n_q_rows; /* 0: look them up; the launch is_exact otherwise */
} fv_lean_share_t;

#define FV_LEAN_LATE 0x80000000U

/* A group that is merged late. */
typedef struct fv_lean_late {
    uint32_t run;
    int32_t head;
    uint32_t first;      /* share in which it begins */
    uint32_t n_pieces;   /* one for each share from there on */
    uint32_t unit_begin; /* first of its units */
    uint32_t n_units;    /* each FV_LEAN_UNIT_THREADS / split columns of 4, in row-major order */
    uint32_t split;      /* 1, 4 or 16 */
    uint32_t reserved;
} fv_lean_late_t;

/* One launch: passed by value. */
typedef struct fv_lean_launch {
    const uint8_t *arena;
    const fv_lean_run_t *runs;
    const fv_lean_share_t *shares;
    float *slot_o;     /* [2 * n_shares][slot_rows, dv], unnormalised */
    float *slot_ml;    /* [2 * n_shares][slot_rows][2]: m and l */
    uint32_t *arrived; /* [n_shares]: of the group cut by that share's end; zero between launches */
    uint32_t *claimed; /* shares taken beyond the first n_ctas; zero between launches */
    const fv_lean_late_t *late; /* [n_late], ascending on the line */
    uint32_t n_late, n_late_units;
    uint32_t n_tiles, n_shares, n_ctas;
    int32_t is_cooperative; /* must be unless n_late is 0 */
    int32_t is_dependent; /* starts before the work ahead of it in the stream is done, and waits */
    int32_t is_exact;     /* both head dims are DV_MAX of the kernel and Q has one part */
    int32_t head_dim_qk, head_dim_v;
    int32_t n_q_parts; /* most of any run */
    int32_t slot_rows;
    int32_t ring_slots;   /* of slot_bytes each */
    uint32_t tiles_ahead; /* under way at once: at most ring_slots / 2 */
    uint32_t slot_bytes;
    uint32_t k_bytes; /* of one token's K row; V alike */
    uint32_t v_bytes;
    fv_page_rows_t k_rows, v_rows;
    uint32_t smem_bytes;
    int32_t kind;   /* fv_lean_kind_t */
    int32_t latent; /* fv_lean_latent_t */
    uint32_t
        n_cluster;   /* CTAs that do a share together, each its rows; n_ctas counts such clusters */
    int32_t m_warps; /* 1, 2 or 4: warps along rows; the others are along tokens */
#if defined(FV_LEAN_TRACE)
    /* [n_ctas][8] ns: begin, first K, last tile, end; SM; last wait for pieces over; share and pages there */
    uint64_t *trace;
#endif
} fv_lean_launch_t;

/*
 * Teams of one CTA. Two take turns with the tiles of a piece: while one waits for the results of a tile's matrix
 * products, the other's are under way. One where registers do not suffice, and where arithmetic is the limit anyway.
 */
static inline FV_HD FV_CONSTEXPR int32_t fv_lean_cuda_teams(int32_t m_warps, bool is_exact)
{
    return (is_exact && (m_warps < 4)) ? 2 : 1;
}

/* CTAs of one launch that an SM can hold, by registers. */
static inline FV_HD FV_CONSTEXPR int32_t fv_lean_cuda_ctas(int32_t kind,
                                                           int32_t m_warps,
                                                           int32_t head_dim_v,
                                                           bool is_exact)
{
    return ((head_dim_v > 128) || ((kind >= FV_LEAN_F32_WIDE) && (m_warps == 4)) ||
            (fv_lean_cuda_teams(m_warps, is_exact) == 2))
               ? 1
               : 2;
}

/* The tiles' query of one head of a run. */
static inline FV_HD fv_tile_query_t fv_lean_head_query(const fv_lean_run_t *run, int32_t head)
{
    fv_tile_query_t query = run->query;

    query.head += head * run->head_step;
    return query;
}

/* The page references of one head of a run. */
static inline FV_HD const fv_page_ref_t *fv_lean_head_pages(const fv_lean_run_t *run, int32_t head)
{
    return run->pages + (int64_t)((run->table_head + head) / run->table_group) * run->pages_stride;
}

/* Teams of one launch, which merge late units. */
static inline uint32_t fv_lean_launch_teams(const fv_lean_launch_t *launch)
{
    return launch->n_ctas * launch->n_cluster *
           ((launch->latent != FV_LATENT_NONE)
                ? 2U
                : (uint32_t)fv_lean_cuda_teams(launch->m_warps, launch->is_exact != 0));
}

/* Where a local page stands in the table of a run. */
static inline FV_HD int32_t fv_lean_page_index(const fv_lean_run_t *run, int32_t local_page)
{
    return local_page - ((local_page >= run->gap_begin) ? run->gap_pages : 0);
}

#ifdef __cplusplus
}
#endif

#endif /* FV_KERNELS_LEAN_CUDA_H */
