/*
 * main_store.h - the part of main.c that knows where a job's durable state lies, and how much of it there can be.
 */
#ifndef FV_COORD_MAIN_STORE_H
#define FV_COORD_MAIN_STORE_H

#include "common/config.h"
#include "common/status.h"
#include "common/store.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct fv_main_store {
    bool is_on;        /* durability is not none */
    bool is_anonymous; /* nobody can find it again */
    fv_store_place_t place;
} fv_main_store_t;

/* The job's name: the same on all ranks, once rank 0 has told them (main). */
void fv_main_store_job(const fv_config_t *config, char out[FV_JOURNAL_JOB_BYTES]);

/*
 * Where this rank's state lies. Sweeps what nobody uses any more; with store_discard also what an earlier run left.
 * Errors: FV_ERR_INVALID_ARG for a name, or level host without disk_dir; FV_ERR_PRECONDITION: in use; FV_ERR_SYSTEM.
 */
FV_MUST_CHECK fv_status_t fv_main_store_open(const fv_config_t *config,
                                             const char *job,
                                             uint32_t rank,
                                             uint32_t n_ranks,
                                             fv_main_store_t *out);

/*
 * KV bytes of this rank: those of a store that is there, when a share was asked for; never more than the store's file system
 * can take of n_local_ranks.
 * Errors: FV_ERR_EXHAUSTED naming sizes and keys when that is less than a quarter of what the share would be.
 */
FV_MUST_CHECK fv_status_t fv_main_store_kv_memory(const fv_main_store_t *store,
                                                  const fv_memory_limit_t *limit,
                                                  int32_t n_local_ranks,
                                                  uint64_t *inout_bytes);

/*
 * Opening a slot reads its log on the disk whole (level host): deadlines grow by what that takes.
 *   log_bytes   of slot `slot` on this host; 0: there is none, or another level
 *   log_most    what a log grows to that holds kv_bytes, for one that can not be seen; 0 on another level
 *   log_ms      milliseconds for n_bytes on a slow disk, a day at most
 */
uint64_t fv_main_store_log_bytes(const fv_config_t *config, const char *job, uint32_t slot);
uint64_t fv_main_store_log_most(const fv_config_t *config, uint64_t kv_bytes);
uint32_t fv_main_store_log_ms(uint64_t n_bytes);

#endif /* FV_COORD_MAIN_STORE_H */
