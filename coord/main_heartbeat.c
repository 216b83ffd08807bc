/*
 * main_heartbeat.c - heartbeats between the coordinator and the other ranks.
 */
#include "coord/main_heartbeat.h"

#include "common/log.h"

#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

/* Between hosts a link may be down for some seconds and come back: TCP's own limit on it (bootstrap_mpi.c). */
#define SILENCE_MS_HOSTS 5000U

static int s_fenced_code;

/* On rank 0. */
static void on_rank_silent(void *arg, uint32_t peer, uint32_t silent_ms)
{
    fv_crew_note_silent(arg, peer, silent_ms);
}

/* On the others: this process may be what another one has replaced. Nothing of it is finished. */
static void on_coordinator_silent(void *arg, uint32_t peer, uint32_t silent_ms)
{
    (void)arg;
    (void)peer;
    fv_error("exit %d: rank 0 was not heard for %u ms: this rank is cut off and leaves",
             s_fenced_code, silent_ms);
    (void)fflush(stderr);
    _exit(s_fenced_code);
}

static bool is_between_hosts(const int *fds, int n_ranks)
{
    for (int r = 0; r < n_ranks; r++) {
        struct sockaddr_storage own = {0};
        socklen_t n_own = sizeof(own);
        if ((fds[r] >= 0) && (getsockname(fds[r], (struct sockaddr *)&own, &n_own) == 0) &&
            (own.ss_family != AF_UNIX)) {
            return true;
        }
    }
    return false;
}

fv_status_t fv_main_heartbeat_start(const fv_config_t *config,
                                    int rank,
                                    int n_world,
                                    const int *beat_fds,
                                    fv_crew_t *crew,
                                    int fenced_code,
                                    fv_heartbeat_t **out)
{
    fv_heartbeat_config_t beat = {
        .interval_ms = (uint32_t)config->heartbeat_ms,
        .silence_ms = (uint32_t)config->heartbeat_ms * (uint32_t)config->heartbeat_misses,
        .on_silent = (rank == 0) ? on_rank_silent : on_coordinator_silent,
        .arg = crew,
    };

    s_fenced_code = fenced_code;
    if (beat.interval_ms == 0U) {
        for (int r = 0; r < n_world; r++) {
            if (beat_fds[r] >= 0) {
                (void)close(beat_fds[r]);
            }
        }
        *out = NULL;
        return FV_OK;
    }
    if ((beat.silence_ms < SILENCE_MS_HOSTS) && is_between_hosts(beat_fds, n_world)) {
        beat.silence_ms = SILENCE_MS_HOSTS;
    }
    return fv_heartbeat_start(&beat, beat_fds, (rank == 0) ? (uint32_t)n_world : 1U, out);
}
