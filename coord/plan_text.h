/*
 * plan_text.h - the planner's one sentence: why a session is placed as it is.
 *
 * Inside of the planner. Written without printf: a placement takes about a microsecond, and so would one
 * formatted double.
 */
#ifndef FV_COORD_PLAN_TEXT_H
#define FV_COORD_PLAN_TEXT_H

#include "coord/plan_grid.h"

typedef enum fv_plan_memory {
    FV_PLAN_MEMORY_AMPLE = 0, /* played no part */
    FV_PLAN_MEMORY_DECIDED,   /* the cheapest grid had no room: another one, or other ranks, has */
    FV_PLAN_MEMORY_SHORT,     /* no grid has room for the hinted length */
} fv_plan_memory_t;

typedef struct fv_plan_why {
    const fv_plan_grid_t *grid;   /* chosen */
    const fv_plan_shape_t *shape; /* at the hint, or at the reference length */
    double one_rank_us;           /* predicted for 1 x 1 */
    double room_bytes;            /* free on the least roomy of the roomiest ranks; unless AMPLE */
    uint32_t first_rank;
    int32_t n_ranks_max;
    bool has_hint;
    bool is_asked; /* the caller fixed the axis */
    fv_plan_memory_t memory;
} fv_plan_why_t;

/* Writes a NUL-terminated sentence, cut to fit. */
void fv_plan_text(const fv_plan_why_t *why, char out[FV_PLAN_REASON_BYTES]);

#endif /* FV_COORD_PLAN_TEXT_H */
