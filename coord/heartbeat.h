/*
 * heartbeat.h - ranks tell each other that they live: a byte every interval on a socket of its own, from a thread of its own.
 *
 * A closed control socket tells of a dead process at once. This tells of what closes nothing: a rank that was stopped, a host
 * that is cut off. The thread computes nothing and waits for nothing else, so a rank that is busy is not taken for a stopped one.
 * A connection that closes is silent from then on: what follows comes after silence_ms, unless the process has
 * ended by itself meanwhile.
 *
 * Thread: start, drop, replace and stop from one thread; on_silent() comes from the heartbeat's own.
 */
#ifndef FV_COORD_HEARTBEAT_H
#define FV_COORD_HEARTBEAT_H

#include "common/status.h"

#include <stdint.h>

typedef struct fv_heartbeat fv_heartbeat_t;

typedef struct fv_heartbeat_config {
    uint32_t interval_ms;
    uint32_t
        silence_ms; /* so long without a byte: on_silent(), once for each peer; more than interval_ms */
    /* How long this process itself did not run counts for nobody. */
    void (*on_silent)(void *arg, uint32_t peer, uint32_t silent_ms);
    void *arg;
} fv_heartbeat_config_t;

/*
 * fds[i]: a connected stream socket to peer i, -1 for none; taken, also on failure. Errors: FV_ERR_NO_MEMORY, FV_ERR_SYSTEM,
 * FV_ERR_INVALID_ARG.
 */
FV_MUST_CHECK fv_status_t fv_heartbeat_start(const fv_heartbeat_config_t *config,
                                             const int *fds,
                                             uint32_t n_peers,
                                             fv_heartbeat_t **out);
/* Peer i is expected to end, or has been given up: its connection is closed, and nothing is said of it any more. */
void fv_heartbeat_drop(fv_heartbeat_t *heartbeat, uint32_t peer);
/* Peer i is another process from now on, whose socket `fd` is; taken. */
void fv_heartbeat_replace(fv_heartbeat_t *heartbeat, uint32_t peer, int fd);
/* Ends the thread and closes the sockets. NULL is fine. */
void fv_heartbeat_stop(fv_heartbeat_t *heartbeat);

#endif /* FV_COORD_HEARTBEAT_H */
