/*
 * main_parts.h - a part of main.c: what a rank is made of, namely its backend, its exchange, its store and its worker.
 *
 * Thread: main.
 */
#ifndef FV_COORD_MAIN_PARTS_H
#define FV_COORD_MAIN_PARTS_H

#include "common/status.h"
#include "coord/main_process.h"

#include <stdbool.h>
#include <stdint.h>

/*
 * Collective, after fv_main_join(). Fills in backend, device, exchange, store, worker and hello; of a spare all but exchange and
 * worker. False, on every process, when one of them failed; that one has logged why. The process closes worker and exchange.
 */
bool fv_main_start_parts(fv_process_t *p);

/*
 * Of one rank alone: makes worker, and hello from it; a dedicated coordinator gets hello only. n_threads 0: as the
 * configuration says. Errors: those of fv_worker_create().
 */
FV_MUST_CHECK fv_status_t fv_main_start_worker(fv_process_t *p,
                                               uint64_t kv_bytes,
                                               uint32_t n_threads);

/*
 * Of a recruit (main_recruit.h), which has nobody to agree with: fills in backend and store, those of `job` in its rank's slot.
 * Errors: as fv_main_store_open().
 */
FV_MUST_CHECK fv_status_t fv_main_start_recruit_parts(fv_process_t *p, const char *job);

#endif /* FV_COORD_MAIN_PARTS_H */
