/*
 * step.h - what one item of a step means for one rank: who gets which bytes, who merges which row.
 *
 * Coordinator and workers compute the same share from the same (spec, placement, item), so no message
 * has to describe it.
 *
 * Rows. Cell (hp, cp) has n_q_heads_local = q_head_end - q_head_begin query heads; row
 *   r = t * n_q_heads_local + h     (t query token of the item, h local query head)
 * The rows of one head part are merged by its active context parts: part d merges rows
 * [fv_rows_begin(R, A, d), fv_rows_begin(R, A, d + 1)), R rows, A active parts. A = 1: no exchange.
 *
 * KV that moves (FV_ITEM_MOVES_KV, A > 1). Instead, each active part gets all KV that the item reads, and has rows of its own from
 * beginning to end. The item's tokens are cut into 2 A blocks of equal size; part d has blocks d and 2 A - 1 - d, so that
 * causal rows see as much on every part. Nothing is merged; the share says n_parts = 1 and n_movers = A.
 *
 * Packed input of a rank (MPI, coordinator -> rank): for each item of the step in order in which the rank
 * has a share:  q [n_tokens, n_q_heads_local, dk] (KV that moves: of its spans' tokens alone), then k [n_kv_tokens, n_heads_local, dk], then
 * v [n_kv_tokens, n_heads_local, dv], each padded to FV_STEP_ALIGN bytes; k and v only of the new tokens
 * this rank owns, in ascending position. LATENT: dk and dv are those of the rank's slice (the slice, then the RoPE key), and
 * there is no v.
 * Packed output of a rank (rank -> coordinator): for each item, o of its merged rows
 * [n_rows, dv] in the item's dtype, then (FV_ITEM_WANT_LSE) lse [n_rows] fp32, natural log, each padded.
 */
#ifndef FV_PROTO_STEP_H
#define FV_PROTO_STEP_H

#include "proto/control.h"
#include "proto/placement.h"

#include <stdbool.h>

#define FV_STEP_ALIGN 64

/* Query tokens of an item: [begin, begin + n). */
typedef struct fv_token_span {
    uint64_t begin, n;
} fv_token_span_t;

/* The share of one item that a rank has. */
typedef struct fv_item_share {
    int32_t hp, cp;                   /* the rank's cell */
    fv_head_part_t part;              /* heads, slice and dims */
    int32_t n_q_heads;                /* of the part */
    int32_t n_parts;                  /* A: active context parts; the share exists iff cp < A */
    uint64_t n_kv_tokens;             /* new tokens that this rank appends */
    uint64_t n_rows;                  /* R = n_tokens * n_q_heads_local */
    uint64_t row_begin, row_end;      /* rows this rank merges and returns; unused where KV moves */
    int32_t n_movers;                 /* KV moves between so many parts; 0: it does not */
    int32_t n_spans;                  /* of query tokens that this rank is sent */
    fv_token_span_t spans[2];         /* ascending, not empty */
    size_t q_bytes, k_bytes, v_bytes; /* packed input, unpadded */
    size_t out_bytes, lse_bytes;      /* packed output, unpadded */
    bool
        is_answered; /* false: another slice alone is asked for; this rank appends, and has no rows */
} fv_item_share_t;

/* 1 + the slice of a latent that alone is answered; 0: all. */
static inline int32_t fv_item_only_slice(const fv_ctl_item_t *item)
{
    return ((int32_t)item->flags >> FV_ITEM_SLICE_SHIFT) & FV_ITEM_SLICE_MASK;
}

/* Dims of a row of the item's whole output. */
static inline int32_t fv_item_out_dim(const fv_model_spec_t *spec, const fv_ctl_item_t *item)
{
    return (fv_item_only_slice(item) != 0) ? fv_model_stored_dim_v(spec) : spec->head_dim_v;
}

/* Where a part's dims begin in it. */
static inline int32_t fv_item_out_begin(const fv_head_part_t *part, const fv_ctl_item_t *item)
{
    return (fv_item_only_slice(item) != 0) ? 0 : part->latent_begin;
}

static inline uint64_t fv_rows_begin(uint64_t n_rows, int32_t n_parts, int32_t d)
{
    return (n_rows / (uint64_t)n_parts) * (uint64_t)d +
           (((n_rows % (uint64_t)n_parts) < (uint64_t)d) ? (n_rows % (uint64_t)n_parts)
                                                         : (uint64_t)d);
}

/* Block i of 2 A of an item whose KV moves; A = n_movers. */
static inline fv_token_span_t fv_mover_block(uint64_t n_tokens, int32_t n_movers, int32_t i)
{
    uint64_t begin = fv_rows_begin(n_tokens, 2 * n_movers, i);

    return (fv_token_span_t){.begin = begin,
                             .n = fv_rows_begin(n_tokens, 2 * n_movers, i + 1) - begin};
}

/* Query tokens that a rank is sent. */
static inline uint64_t fv_share_tokens(const fv_item_share_t *s)
{
    return ((s->n_spans > 0) ? s->spans[0].n : 0U) + ((s->n_spans > 1) ? s->spans[1].n : 0U);
}

/*
 * The i-th run of rows that a rank returns, in the order in which they are packed; false when there is none. The rows that
 * it merges, or those of its spans.
 */
static inline bool
fv_share_rows(const fv_item_share_t *s, int32_t i, uint64_t *out_begin, uint64_t *out_end)
{
    if (s->n_movers == 0) {
        *out_begin = s->row_begin;
        *out_end = s->row_end;
        return i == 0;
    }
    if (i >= s->n_spans) {
        return false;
    }
    *out_begin = s->spans[i].begin * (uint64_t)s->n_q_heads;
    *out_end = *out_begin + s->spans[i].n * (uint64_t)s->n_q_heads;
    return true;
}

/* A run of an item's new tokens that one part owns: contiguous in the item and in the part. */
typedef struct fv_token_run {
    uint64_t item_begin;  /* first token, counted from the item's first */
    uint64_t local_begin; /* the same token among the part's own tokens */
    uint64_t n_tokens;
} fv_token_run_t;

/*
 * The share of `rank`; false when it has none (no query tokens, not in the placement, its context part holds no
 * token of [0, kv_end), or nothing is appended and another slice alone is asked for).
 */
bool fv_item_share(const fv_model_spec_t *spec,
                   const fv_placement_t *placement,
                   const fv_ctl_item_t *item,
                   uint32_t rank,
                   fv_item_share_t *out);

/*
 * Walks the runs of new tokens [position, position + n_tokens) owned by part cp: start with
 * *cursor = 0; false when there is no further run. Runs come in ascending position.
 */
bool fv_token_run_next(const fv_placement_t *placement,
                       int32_t cp,
                       const fv_ctl_item_t *item,
                       uint64_t *cursor,
                       fv_token_run_t *out);

/*
 * Where one item's tensors are. Not packed (coordinator's own rank): the whole item's tensors, head 0 first;
 * the worker picks its heads, tokens and rows. Packed: only this rank's share, as proto/step.h lays it out.
 */
typedef struct fv_step_io {
    const void *q, *k, *v;
    size_t q_token_bytes, k_token_bytes, v_token_bytes;
    void *out;
    size_t out_token_bytes;
    float *lse;              /* NULL unless FV_ITEM_WANT_LSE */
    size_t lse_token_stride; /* elements */
    bool is_packed;
} fv_step_io_t;

/* Padded sizes of a share in the packed buffers. */
static inline size_t fv_share_in_bytes(const fv_item_share_t *s)
{
    return fv_align_up(s->q_bytes, FV_STEP_ALIGN) + fv_align_up(s->k_bytes, FV_STEP_ALIGN) +
           fv_align_up(s->v_bytes, FV_STEP_ALIGN);
}

static inline size_t fv_share_out_bytes(const fv_item_share_t *s)
{
    return fv_align_up(s->out_bytes, FV_STEP_ALIGN) + fv_align_up(s->lse_bytes, FV_STEP_ALIGN);
}

#endif /* FV_PROTO_STEP_H */
