/*
 * dispatch.h - cuts a step's requests into each rank's work: items, and where their tensors lie.
 *
 * Decode path: station 4 of 10. Before: coord/sched_step.c. After: coord/link_mpi.c and the local worker.
 *
 * Thread: engine. Memory grows to the largest step seen and is kept.
 */
#ifndef FV_COORD_DISPATCH_H
#define FV_COORD_DISPATCH_H

#include "common/status.h"
#include "coord/link.h"
#include "coord/sched.h"
#include "proto/step.h"

#include <stdbool.h>

/* The tensors of one request in the coordinator's memory: row-major, tokens of all items packed. */
typedef struct fv_tensors {
    const uint8_t *q, *k, *v; /* k, v: NULL without append */
    uint8_t *out;             /* [T, Hq, dv] in the request's dtype */
    float *lse;               /* [T, Hq], NULL unless wanted */
} fv_tensors_t;

/* An item as one rank sees it: back references for errors. */
typedef struct fv_work_origin {
    fv_request_t *request;
    uint32_t item;
} fv_work_origin_t;

/* What one rank does in a step. */
typedef struct fv_rank_work {
    fv_ctl_item_t *items;
    fv_work_origin_t *origins;
    fv_error_t *errors; /* of the items, filled when the rank answers */
    size_t n_items, items_cap;
    fv_step_io_t *io; /* the coordinator's own rank: unpacked views */
    fv_segment_t *inputs,
        *outputs; /* the other ranks: packed order (proto/step.h), pads included */
    size_t n_inputs, inputs_cap, n_outputs, outputs_cap;
    size_t in_bytes, out_bytes;
} fv_rank_work_t;

typedef struct fv_dispatch fv_dispatch_t;

/* own_rank: the rank whose work gets unpacked views instead of segments. */
FV_MUST_CHECK fv_status_t fv_dispatch_create(uint32_t n_ranks,
                                             uint32_t own_rank,
                                             fv_dispatch_t **out);
void fv_dispatch_destroy(fv_dispatch_t *dispatch);

/*
 * Builds every rank's work for the joined requests. tensors_of(request) says where a request's tensors lie.
 * Errors: FV_ERR_NO_MEMORY.
 */
FV_MUST_CHECK fv_status_t
fv_dispatch_build(fv_dispatch_t *dispatch,
                  const fv_step_plan_t *plan,
                  const fv_tensors_t *(*tensors_of)(fv_request_t *request));

/* The ranks with work in the last build, ascending; and their work. */
size_t fv_dispatch_ranks(const fv_dispatch_t *dispatch, const uint32_t **out);
fv_rank_work_t *fv_dispatch_work(fv_dispatch_t *dispatch, uint32_t rank);

#endif /* FV_COORD_DISPATCH_H */
