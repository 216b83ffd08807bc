/*
 * partials.h - partial states of rows whose KV spans ranks: where they go, their exchange, their merge.
 *
 * Decode path: station 8 of 10. Before: kernels (attend). After: coord (outputs gathered).
 *
 * The message from rank a to rank b holds, for each item of the step in item order in which both hold a
 * context part of the same heads, the rows that b merges:
 *     o [rows, dv] fp32, lse_log2 [rows] fp32, each padded to FV_STEP_ALIGN bytes.
 * Both derive its size from the items, so it carries no header. Ranks with nothing to say send nothing.
 *
 * Use, once a step: begin; add each item; layout; bind each item in the same order; attend; finish.
 *
 * Over MPI, messages lie in one buffer of the host, and the backend is waited for before they leave. Between devices they
 * lie where the exchange says (begin() of the door), the attention writes them straight there, and the host waits once,
 * after the merge.
 */
#ifndef FV_WORKER_PARTIALS_H
#define FV_WORKER_PARTIALS_H

#include "worker/internal.h"

void fv_partials_begin(fv_worker_t *worker);

/* Counts what an item adds to each message. */
void fv_partials_add(fv_worker_t *worker, const fv_step_item_t *item);

/* Makes room for all that was added. Errors: FV_ERR_NO_MEMORY. */
FV_MUST_CHECK fv_status_t fv_partials_layout(fv_worker_t *worker);

/*
 * Points `attend` (its dst, n_dst) to the item's places in the messages and notes the merge of its rows. A failed
 * item gets the empty set in each place and no merge; `attend` may be NULL then. Errors: the backend's.
 */
FV_MUST_CHECK fv_status_t fv_partials_bind(fv_worker_t *worker,
                                           const fv_step_item_t *item,
                                           fv_attn_item_t *attend);

/*
 * The rest of a step whose attention was enqueued with status `computed`: all messages out and in, every row merged to
 * its output, and the backend done. Errors: `computed`, the exchange's, the backend's.
 */
FV_MUST_CHECK fv_status_t fv_partials_finish(fv_worker_t *worker,
                                             fv_status_t computed,
                                             fv_step_times_t *times);

#endif /* FV_WORKER_PARTIALS_H */
