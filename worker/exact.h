/*
 * exact.h - LATENT models sharded by latent with `exact`: scores of the slices are added up before one softmax.
 *
 * Decode path: station 7 of 10, with a part of station 8. Before: worker/step.c. After: worker/partials.c.
 *
 * The ranks that hold the slices of the same tokens for the same query heads each compute the scores of their slice (the
 * first one's with the RoPE key's part), and add them up: each rank gets one part of them from all others, adds in the
 * order of the slices, and sends the sum back, 2 (N - 1) / N of the scores' bytes from each of N ranks, in fp32. All then
 * have the same bits, and so the same softmax; what it weighs is each rank's own slice.
 *
 * An item's rows are worked off in blocks, one in each round, so that memory is bounded whatever its length; a step has as
 * many rounds as its largest item has blocks. Ranks meet in a round only over items that both have, whose blocks both cut
 * alike, and every rank goes through the rounds in the same order: none waits in a circle.
 */
#ifndef FV_WORKER_EXACT_H
#define FV_WORKER_EXACT_H

#include "worker/internal.h"

/* The backend computes scores apart, and the exchange moves messages of the host. */
bool fv_exact_is_served(const fv_worker_t *worker);

/* Its arrays; the buffer is the worker's to free: an exchange given up may still use it. */
void fv_exact_free(fv_exact_work_t *work);

/* Of the step under way: none yet. */
void fv_exact_begin(fv_worker_t *worker);

/*
 * One more item, after fv_partials_bind(); `attend` as for the backend. A failed one takes part all the same, with scores
 * of 0: its peers do not know. Errors: FV_ERR_NO_MEMORY.
 */
FV_MUST_CHECK fv_status_t fv_exact_add(fv_worker_t *worker,
                                       const fv_step_item_t *item,
                                       const fv_attn_item_t *attend);

/* After append: scores, exchange and attention of all that were added. Errors: the backend's, the exchange's. */
FV_MUST_CHECK fv_status_t fv_exact_run(fv_worker_t *worker);

#endif /* FV_WORKER_EXACT_H */
