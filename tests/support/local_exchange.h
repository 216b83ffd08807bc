/*
 * local_exchange.h - the exchange between several workers of one process, each on its own thread.
 *
 * Goal: run every placement shape without MPI. Both sides' message sizes are compared, as MPI would.
 */
#ifndef FV_TESTS_SUPPORT_LOCAL_EXCHANGE_H
#define FV_TESTS_SUPPORT_LOCAL_EXCHANGE_H

#include "worker/worker.h"

#define FV_LOCAL_RANKS_MAX 16

typedef struct fv_local_hub fv_local_hub_t;

extern const fv_exchange_ops_t fv_local_exchange_ops;

fv_local_hub_t *fv_local_hub_create(uint32_t n_ranks); /* NULL: no memory */
void fv_local_hub_destroy(fv_local_hub_t *hub);        /* NULL is fine */

/* The exchange_ctx of a rank. */
void *fv_local_hub_ctx(fv_local_hub_t *hub, uint32_t rank);

/* Messages delivered so far. Call between steps. */
uint64_t fv_local_hub_messages(const fv_local_hub_t *hub);
uint64_t fv_local_hub_bytes(const fv_local_hub_t *hub);

#endif /* FV_TESTS_SUPPORT_LOCAL_EXCHANGE_H */
