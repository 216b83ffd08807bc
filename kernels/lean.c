/*
 * lean.c - the arithmetic of lean.h. A tile belongs to the share in which its first unit of cost lies.
 */
#include "kernels/lean.h"

uint64_t fv_lean_share_begin(const fv_lean_line_t *line, int32_t share)
{
    uint64_t n = (uint64_t)line->n_shares;
    uint64_t c = (uint64_t)share;

    /* cost * c / n without overflow */
    return (line->cost / n) * c + (line->cost % n) * c / n;
}

uint64_t fv_lean_first_group(const fv_lean_line_t *line, int32_t share)
{
    uint64_t at = fv_lean_share_begin(line, share);
    uint64_t low = 0;
    uint64_t high = line->n_groups;

    while (high - low > 1) {
        uint64_t middle = low + (high - low) / 2;

        if (line->groups[middle].cost_begin <= at) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

/* Tiles of `group` that begin before `cost`. */
static int32_t tiles_before(const fv_lean_group_t *group, uint64_t cost)
{
    uint64_t n = 0;

    if (cost <= group->cost_begin) {
        return 0;
    }
    n = (cost - group->cost_begin + group->tile_cost - 1U) / group->tile_cost;
    return (n < (uint64_t)group->n_tiles) ? (int32_t)n : group->n_tiles;
}

fv_lean_piece_t
fv_lean_piece(const fv_lean_line_t *line, const fv_lean_group_t *group, int32_t share)
{
    fv_lean_piece_t piece;

    piece.begin = tiles_before(group, fv_lean_share_begin(line, share));
    piece.end = tiles_before(group, fv_lean_share_begin(line, share + 1));
    return piece;
}

int32_t fv_lean_share_of(const fv_lean_line_t *line, const fv_lean_group_t *group, int32_t tile)
{
    uint64_t at = group->cost_begin + (uint64_t)tile * group->tile_cost;
    int32_t low = 0;
    int32_t high = line->n_shares;

    while (high - low > 1) {
        int32_t middle = low + (high - low) / 2;

        if (fv_lean_share_begin(line, middle) <= at) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}
