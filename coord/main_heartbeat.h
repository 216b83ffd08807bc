/*
 * main_heartbeat.h - a part of main.c: who watches whom, and what follows when somebody falls silent.
 */
#ifndef FV_COORD_MAIN_HEARTBEAT_H
#define FV_COORD_MAIN_HEARTBEAT_H

#include "common/config.h"
#include "common/status.h"
#include "coord/heartbeat.h"
#include "coord/link.h"

/*
 * Rank 0 watches all others and declares them silent to `link`. The others watch rank 0: one that is cut off from it ends its
 * process with `fenced_code`, so that nothing of its work can meet that of whoever took its place.
 * beat_fds: [n_ranks], taken. *out is NULL where the configuration wants no heartbeats.
 */
FV_MUST_CHECK fv_status_t fv_main_heartbeat_start(const fv_config_t *config,
                                                  int rank,
                                                  int n_ranks,
                                                  const int *beat_fds,
                                                  fv_link_t *link,
                                                  int fenced_code,
                                                  fv_heartbeat_t **out);

#endif /* FV_COORD_MAIN_HEARTBEAT_H */
