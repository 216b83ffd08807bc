/*
 * lean.h - stream-K: the line of all KV tiles of a step, cut into equal shares. Private to kernels/.
 *
 * Source: LeanAttention, arXiv:2405.10480. A group is one (item, KV head, block of query rows); its tiles
 * stand on the line in ascending position, one group after another. A tile costs what its group says (memory
 * plus arithmetic), so a decode row and a prefill block share one line fairly; with equal costs two shares
 * differ by at most one tile.
 *
 *     line   |g0 g0 g0 g0|g1 g1|g2 g2 g2 g2 g2 g2|
 *     shares |---- 0 ----|---- 1 ----|---- 2 ----|      g2 is cut: shares 1 and 2 hold partial states
 *
 * There are a few shares per thread, so that a thread that is held up leaves the rest of its work to the others.
 * The cuts depend on the step and on n_shares alone, never on timing or on who does which share. Whoever finishes
 * the last piece of a cut group merges its pieces in ascending order: nobody waits, and the same step with the same
 * number of shares gives the same bits. A share has at most two pieces of cut groups, its first and its last: two
 * slots a share.
 */
#ifndef FV_KERNELS_LEAN_H
#define FV_KERNELS_LEAN_H

#include "kernels/tiles.h"

typedef struct fv_lean_group {
    uint64_t cost_begin; /* of its first tile on the line */
    uint32_t item_idx;
    int32_t kv_head;
    int32_t t_begin, t_end; /* query tokens of the item */
    int32_t g_begin, g_end; /* query heads of the KV head */
    int32_t n_tiles;        /* >= 1 */
    uint32_t tile_cost;     /* >= 1 */
    uint64_t score_begin;   /* items with scores: where the group's are, [n_tiles][rows, P] */
    fv_tile_list_t tiles;
} fv_lean_group_t;

typedef struct fv_lean_line {
    const fv_lean_group_t *groups;
    uint64_t n_groups;
    uint64_t cost; /* of the whole line */
    int32_t n_shares;
} fv_lean_line_t;

/* Tiles [begin, end) of a group that one share does. */
typedef struct fv_lean_piece {
    int32_t begin, end;
} fv_lean_piece_t;

/* Cost at which a share begins; share n_shares begins at the line's end. */
uint64_t fv_lean_share_begin(const fv_lean_line_t *line, int32_t share);

/* The group in which a share's first tile may lie: the last one with cost_begin <= the share's begin. */
uint64_t fv_lean_first_group(const fv_lean_line_t *line, int32_t share);

/* What `share` does of `group`; begin == end: nothing. */
fv_lean_piece_t
fv_lean_piece(const fv_lean_line_t *line, const fv_lean_group_t *group, int32_t share);

/* The share that does tile `tile` of `group`. */
int32_t fv_lean_share_of(const fv_lean_line_t *line, const fv_lean_group_t *group, int32_t tile);

#endif /* FV_KERNELS_LEAN_H */
