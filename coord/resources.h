/*
 * resources.h - what this host has: turns "90%" and "0 threads" into numbers.
 */
#ifndef FV_COORD_RESOURCES_H
#define FV_COORD_RESOURCES_H

#include "common/config.h"

#include <stddef.h>
#include <stdint.h>

/* Memory this process may still use: MemAvailable, or what its cgroup leaves if that is less. Bytes; 0 = unknown. */
uint64_t fv_memory_available(void);

/* KV bytes of one rank out of n_local_ranks on this host; a multiple of 1 MiB, at least that. */
uint64_t fv_resolve_kv_memory(const fv_memory_limit_t *limit, int32_t n_local_ranks);

/* Compute threads of one rank: `configured`, or this host's cores shared among its ranks, never more than it is bound to. */
int32_t fv_resolve_threads(int32_t configured, int32_t n_local_ranks);

/* "1.5 GiB" and the like; `text` has room for 24 bytes. */
const char *fv_format_bytes(uint64_t n_bytes, char text[24]);

#endif /* FV_COORD_RESOURCES_H */
