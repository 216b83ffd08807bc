/*
 * local_windows.h - an exchange "between devices" for several CPU workers of one process, each on its own thread.
 *
 * Goal: the door's second kind, the division of windows, the ways of messages and their order are tested without a GPU.
 * As between GPUs, attention writes straight into the peers' windows; run() signals and waits, where a GPU's merge would.
 * What no region takes goes through the host exchange of local_exchange.h.
 */
#ifndef FV_TESTS_SUPPORT_LOCAL_WINDOWS_H
#define FV_TESTS_SUPPORT_LOCAL_WINDOWS_H

#include "tests/support/local_exchange.h"

typedef struct fv_local_windows fv_local_windows_t;

extern const fv_exchange_ops_t fv_local_windows_ops;

/* The hub must outlive it. NULL: no memory. Ranks reach each other if they are in one domain of domain_ranks. */
fv_local_windows_t *fv_local_windows_create(fv_local_hub_t *hub,
                                            uint32_t n_ranks,
                                            uint32_t domain_ranks,
                                            size_t window_bytes);
void fv_local_windows_destroy(fv_local_windows_t *windows); /* NULL is fine */

/* The exchange_ctx of a rank. */
void *fv_local_windows_ctx(fv_local_windows_t *windows, uint32_t rank);

/* Messages that went straight, by LL, and neither way. Call between steps. */
uint64_t fv_local_windows_ll(const fv_local_windows_t *windows);
uint64_t fv_local_windows_direct(const fv_local_windows_t *windows);
uint64_t fv_local_windows_rest(const fv_local_windows_t *windows);

#endif /* FV_TESTS_SUPPORT_LOCAL_WINDOWS_H */
