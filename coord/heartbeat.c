/*
 * heartbeat.c - one thread: sends a byte to each peer every interval, and looks who has not sent one for too long.
 */
#include "coord/heartbeat.h"

#include "common/clock.h"
#include "common/log.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

typedef struct peer {
    int fd; /* -1: none */
    int64_t heard_us;
    bool is_closed; /* by the other side */
    bool is_silent; /* on_silent() was called */
} peer_t;

struct fv_heartbeat {
    fv_heartbeat_config_t config;
    pthread_t thread;
    bool has_thread;
    int stop_fd;
    pthread_mutex_t lock; /* of the peers, whom drop() changes */
    uint32_t n_peers;
    peer_t *peers;
};

/* ------------------------------------------------------------------ the thread */

/* Takes what has come; a connection that ended says nothing any more. */
static void listen_to(peer_t *peer, int64_t now_us)
{
    uint8_t beats[256];

    while (!peer->is_closed) {
        ssize_t n = recv(peer->fd, beats, sizeof(beats), MSG_DONTWAIT);
        if (n > 0) {
            peer->heard_us = now_us;
        } else if ((n < 0) && (errno == EAGAIN)) {
            return;
        } else if ((n == 0) || (errno != EINTR)) {
            peer->is_closed = true;
        }
    }
}

/* A full buffer is no matter: the other side has more than enough beats to read. */
static void send_beats(fv_heartbeat_t *h)
{
    static const uint8_t k_beat = 1;

    for (uint32_t i = 0; i < h->n_peers; i++) {
        if ((h->peers[i].fd >= 0) && !h->peers[i].is_closed) {
            ssize_t n = send(h->peers[i].fd, &k_beat, 1, MSG_DONTWAIT | MSG_NOSIGNAL);
            (void)n;
        }
    }
}

static void look_at_peers(fv_heartbeat_t *h, int64_t now_us)
{
    for (uint32_t i = 0; i < h->n_peers; i++) {
        peer_t *peer = &h->peers[i];
        if ((peer->fd < 0) || peer->is_silent) {
            continue;
        }
        listen_to(peer, now_us);
        int64_t silent_ms = (now_us - peer->heard_us) / 1000;
        if (silent_ms > (int64_t)h->config.silence_ms) {
            peer->is_silent = true;
            h->config.on_silent(h->config.arg, i, (uint32_t)silent_ms);
        }
    }
}

/* This process was stopped, or had no core, for so long: so may the others have been, or they waited for us. */
static void forgive(fv_heartbeat_t *h, int64_t lost_us)
{
    for (uint32_t i = 0; i < h->n_peers; i++) {
        h->peers[i].heard_us += lost_us;
    }
}

static void *run(void *arg)
{
    fv_heartbeat_t *h = arg;
    struct pollfd stop = {.fd = h->stop_fd, .events = POLLIN};
    int64_t interval_us = (int64_t)h->config.interval_ms * 1000;
    int64_t due_us = fv_clock_us();

    fv_log_thread_name("heartbeat");
    for (;;) {
        int64_t now_us = fv_clock_us();
        (void)pthread_mutex_lock(&h->lock);
        if (now_us > due_us + interval_us) {
            forgive(h, now_us - due_us);
        }
        send_beats(h);
        look_at_peers(h, now_us);
        (void)pthread_mutex_unlock(&h->lock);
        due_us = now_us + interval_us;
        if (poll(&stop, 1, (int)h->config.interval_ms) > 0) {
            return NULL;
        }
    }
}

/* ------------------------------------------------------------------ life */

static void close_peers(const int *fds, uint32_t n_peers)
{
    for (uint32_t i = 0; i < n_peers; i++) {
        if (fds[i] >= 0) {
            (void)close(fds[i]);
        }
    }
}

static fv_status_t
create(const fv_heartbeat_config_t *config, const int *fds, uint32_t n_peers, fv_heartbeat_t **out)
{
    if ((config->interval_ms == 0U) || (config->silence_ms <= config->interval_ms)) {
        return fv_fail(
            FV_ERR_INVALID_ARG,
            "heartbeat: given %u ms of silence, expected more than the interval of %u ms",
            config->silence_ms, config->interval_ms);
    }
    fv_heartbeat_t *h = calloc(1, sizeof(*h));
    if (h == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "heartbeat");
    }
    h->config = *config;
    h->n_peers = n_peers;
    h->peers = calloc((n_peers == 0U) ? 1U : n_peers, sizeof(*h->peers));
    h->stop_fd = eventfd(0, EFD_CLOEXEC);
    if ((h->peers == NULL) || (h->stop_fd < 0)) {
        if (h->stop_fd >= 0) {
            (void)close(h->stop_fd);
        }
        free(h->peers);
        free(h);
        return fv_fail(FV_ERR_NO_MEMORY, "heartbeat of %u peers", n_peers);
    }
    (void)pthread_mutex_init(&h->lock, NULL);
    for (uint32_t i = 0; i < n_peers; i++) {
        h->peers[i] = (peer_t){.fd = fds[i], .heard_us = fv_clock_us()};
    }
    *out = h;
    return FV_OK;
}

fv_status_t fv_heartbeat_start(const fv_heartbeat_config_t *config,
                               const int *fds,
                               uint32_t n_peers,
                               fv_heartbeat_t **out)
{
    fv_heartbeat_t *h = NULL;
    fv_status_t status = create(config, fds, n_peers, &h);

    if (status != FV_OK) {
        close_peers(fds, n_peers);
        return status;
    }
    int rc = pthread_create(&h->thread, NULL, run, h);
    if (rc != 0) {
        fv_heartbeat_stop(h);
        return fv_fail(FV_ERR_SYSTEM, "heartbeat: pthread_create: %s", strerror(rc));
    }
    h->has_thread = true;
    *out = h;
    return FV_OK;
}

void fv_heartbeat_drop(fv_heartbeat_t *h, uint32_t peer)
{
    (void)pthread_mutex_lock(&h->lock);
    if (h->peers[peer].fd >= 0) {
        (void)close(h->peers[peer].fd);
        h->peers[peer].fd = -1;
    }
    (void)pthread_mutex_unlock(&h->lock);
}

void fv_heartbeat_replace(fv_heartbeat_t *h, uint32_t peer, int fd)
{
    (void)pthread_mutex_lock(&h->lock);
    if (h->peers[peer].fd >= 0) {
        (void)close(h->peers[peer].fd);
    }
    h->peers[peer] = (peer_t){.fd = fd, .heard_us = fv_clock_us()};
    (void)pthread_mutex_unlock(&h->lock);
}

void fv_heartbeat_stop(fv_heartbeat_t *h)
{
    uint64_t one = 1;

    if (h == NULL) {
        return;
    }
    if (h->has_thread) {
        ssize_t n = write(h->stop_fd, &one, sizeof(one));
        (void)n; /* fails only when the counter is full */
        (void)pthread_join(h->thread, NULL);
    }
    for (uint32_t i = 0; i < h->n_peers; i++) {
        if (h->peers[i].fd >= 0) {
            (void)close(h->peers[i].fd);
        }
    }
    (void)close(h->stop_fd);
    (void)pthread_mutex_destroy(&h->lock);
    free(h->peers);
    free(h);
}
