/*
 * move.h - KV that moves to the queries: pages of other ranks come into a staging area, and each rank attends whole rows.
 *
 * Decode path: station 7 of 10, with the exchange of station 8 before it. Before: worker/step.c. After: worker/step.c.
 *
 * Of an item with FV_ITEM_MOVES_KV every active context part has query tokens of its own (proto/step.h) and needs all pages that
 * the item reads. They come in rounds, each with the whole context of as many KV heads as the staging area holds: a rank
 * lays its own pages of those heads side by side, sends them to every other part, receives theirs, and attends with a page
 * table of the whole context, in which its own pages are where they always are. So a row is computed by one call on one
 * rank, exactly as a single rank would, and no partial states are left.
 *
 * Which pages travel, in which order and in which rounds follows from the item (spec, placement, positions) and the size of the
 * staging area, which is the same on all ranks; no message describes it. Pages that the item's rows do not read (windows, S2)
 * stay where they are. Items are worked off one after the other, in the order of the step, and each round's messages
 * are waited for, so ranks that share items meet in the same order.
 *
 * The staging area is the end of the KV arena (fv_worker_config_t.move_bytes), which the pool does not have.
 */
#ifndef FV_WORKER_MOVE_H
#define FV_WORKER_MOVE_H

#include "worker/internal.h"

/* The bytes of staging with which this rank serves such items; 0: it serves none. */
size_t fv_move_served_bytes(const fv_worker_t *worker);
/* The same of a worker that is yet to be. */
size_t fv_move_config_bytes(const fv_worker_config_t *config);

void fv_move_free(fv_move_work_t *work);

/* Of the step under way: none yet. */
void fv_move_begin(fv_worker_t *worker);

/*
 * One more item whose share has n_movers > 0; `attend` as for the backend, whole rows and all tokens of the item. A failed one sends
 * what happens to lie in its place: its peers do not know. Errors: FV_ERR_NO_MEMORY, FV_ERR_PROTOCOL when it does not fit.
 */
FV_MUST_CHECK fv_status_t fv_move_add(fv_worker_t *worker,
                                      const fv_step_item_t *item,
                                      const fv_attn_item_t *attend);

/* After append: all rounds of all items. Errors: the backend's, the exchange's. */
FV_MUST_CHECK fv_status_t fv_move_run(fv_worker_t *worker);

#endif /* FV_WORKER_MOVE_H */
