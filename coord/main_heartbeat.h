/*
 * main_heartbeat.h - a part of main.c: who watches whom, and what follows when somebody falls silent.
 */
#ifndef FV_COORD_MAIN_HEARTBEAT_H
#define FV_COORD_MAIN_HEARTBEAT_H

#include "common/config.h"
#include "common/status.h"
#include "coord/heartbeat.h"
#include "coord/main_repair.h"

/*
 * Rank 0 watches all others and declares them silent to `crew`. The others watch rank 0: one that is cut off from it ends its
 * process with `fenced_code`, so that nothing of its work can meet that of whoever took its place.
 * n_world: processes. beat_fds: [n_world], taken. *out is NULL where the configuration wants no heartbeats.
 */
FV_MUST_CHECK fv_status_t fv_main_heartbeat_start(const fv_config_t *config,
                                                  int rank,
                                                  int n_world,
                                                  const int *beat_fds,
                                                  fv_crew_t *crew,
                                                  int fenced_code,
                                                  fv_heartbeat_t **out);

#endif /* FV_COORD_MAIN_HEARTBEAT_H */
