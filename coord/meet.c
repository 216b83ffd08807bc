/*
 * meet.c - challenge and proof; connections that have not proved themselves are read side by side.
 */
#define _GNU_SOURCE /* accept4 */

#include "coord/meet.h"

#include "common/clock.h"
#include "common/frame.h"
#include "common/log.h"
#include "common/secret.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Beside two of each rank, so many that have not proved themselves; a further one takes the oldest's place. */
#define STRANGERS_SPARE 64U
#define STRANGER_MS     5000 /* so long they may take */

/* What a rank sends first. */
typedef struct fv_introduction {
    fv_ctl_header_t header;
    fv_ctl_hello_t hello;
} fv_introduction_t;

typedef struct fv_stranger {
    int fd;
    int64_t deadline_us;
    uint8_t nonce[FV_MEET_NONCE_BYTES];
    size_t n_bytes; /* of `said` */
    fv_introduction_t said;
} fv_stranger_t;

typedef struct fv_meeting_place {
    const uint8_t *secret;
    uint32_t epoch, n_ranks, n_joined; /* n_joined: connections */
    int *fds, *beat_fds;
    fv_ctl_hello_t *hellos;
    size_t n_strangers, strangers_max; /* oldest first */
    fv_stranger_t *strangers;          /* [strangers_max] */
    struct pollfd *polled;             /* [strangers_max + 1] */
} fv_meeting_place_t;

static fv_status_t prove(const uint8_t *secret,
                         const uint8_t *nonce,
                         uint32_t epoch,
                         const fv_ctl_hello_t *hello,
                         uint8_t out[FV_SHA256_BYTES])
{
    uint8_t text[FV_MEET_NONCE_BYTES + sizeof(epoch) + sizeof(*hello)];
    fv_ctl_hello_t without_proof;

    memcpy(&without_proof, hello,
           sizeof(without_proof)); /* padding, too: both sides see the same bytes */
    memset(without_proof.proof, 0, sizeof(without_proof.proof));
    memcpy(text, nonce, FV_MEET_NONCE_BYTES);
    memcpy(text + FV_MEET_NONCE_BYTES, &epoch, sizeof(epoch));
    memcpy(text + FV_MEET_NONCE_BYTES + sizeof(epoch), &without_proof, sizeof(without_proof));
    return fv_hmac_sha256(secret, FV_SECRET_BYTES, text, sizeof(text), out);
}

/* ------------------------------------------------------------------ rank 0 */

static void drop(fv_meeting_place_t *place, size_t i)
{
    fv_warn("control socket: dropped a connection that is not one of this job's ranks");
    (void)close(place->strangers[i].fd);
    place->n_strangers--;
    memmove(&place->strangers[i], &place->strangers[i + 1U],
            (place->n_strangers - i) * sizeof(place->strangers[0]));
}

static void take_in(fv_meeting_place_t *place, int listen_fd, void (*on_accept)(int fd))
{
    fv_meet_challenge_t challenge = {.magic = FV_CTL_MAGIC, .epoch = place->epoch};
    int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC);

    if (fd < 0) {
        return;
    }
    if (on_accept != NULL) {
        on_accept(fd);
    }
    fv_frame_piece_t piece = {&challenge, sizeof(challenge)};
    if ((fv_random_bytes(challenge.nonce, sizeof(challenge.nonce)) != FV_OK) ||
        (fv_frame_send(fd, &piece, 1, 0) != FV_OK)) { /* it fits into any fresh socket's buffer */
        (void)close(fd);
        return;
    }
    if (place->n_strangers == place->strangers_max) {
        drop(place, 0);
    }
    fv_stranger_t *stranger = &place->strangers[place->n_strangers++];
    *stranger =
        (fv_stranger_t){.fd = fd, .deadline_us = fv_clock_us() + (int64_t)STRANGER_MS * 1000};
    memcpy(stranger->nonce, challenge.nonce, sizeof(stranger->nonce));
}

/* Where the connection of an introduction belongs; NULL: nowhere. */
static int *seat_of(const fv_meeting_place_t *place, const fv_ctl_hello_t *hello)
{
    if ((hello->rank == 0) || (hello->rank >= place->n_ranks) ||
        (hello->channel > (uint32_t)FV_CHANNEL_BEAT)) {
        return NULL;
    }
    return (hello->channel == (uint32_t)FV_CHANNEL_BEAT) ? &place->beat_fds[hello->rank]
                                                         : &place->fds[hello->rank];
}

static bool is_one_of_us(const fv_meeting_place_t *place, const fv_stranger_t *stranger)
{
    const fv_ctl_header_t *header = &stranger->said.header;
    const fv_ctl_hello_t *hello = &stranger->said.hello;
    const int *seat = seat_of(place, hello);
    uint8_t proof[FV_SHA256_BYTES];

    return (header->magic == FV_CTL_MAGIC) && (header->type == FV_CTL_HELLO) &&
           (header->epoch == place->epoch) && (header->body_bytes == sizeof(*hello)) &&
           (prove(place->secret, stranger->nonce, place->epoch, hello, proof) == FV_OK) &&
           fv_secret_equal(proof, hello->proof, sizeof(proof)) && (seat != NULL) && (*seat < 0);
}

static void join(fv_meeting_place_t *place, size_t i)
{
    fv_ctl_hello_t *hello = &place->hellos[place->strangers[i].said.hello.rank];

    *seat_of(place, &place->strangers[i].said.hello) = place->strangers[i].fd;
    *hello = place->strangers[i].said.hello;
    hello->channel = FV_CHANNEL_CONTROL;
    hello->host[sizeof(hello->host) - 1U] = '\0';
    hello->backend[sizeof(hello->backend) - 1U] = '\0';
    hello->device[sizeof(hello->device) - 1U] = '\0';
    memset(hello->proof, 0, sizeof(hello->proof));
    place->n_joined++;
    place->n_strangers--;
    memmove(&place->strangers[i], &place->strangers[i + 1U],
            (place->n_strangers - i) * sizeof(place->strangers[0]));
}

/* Reads what stranger i has said meanwhile. True when it is still one afterwards. */
static bool listen_to(fv_meeting_place_t *place, size_t i)
{
    fv_stranger_t *stranger = &place->strangers[i];
    ssize_t n = recv(stranger->fd, (uint8_t *)&stranger->said + stranger->n_bytes,
                     sizeof(stranger->said) - stranger->n_bytes, MSG_DONTWAIT);

    if (n > 0) {
        stranger->n_bytes += (size_t)n;
    }
    bool is_broken = (n == 0) || ((n < 0) && (errno != EAGAIN) && (errno != EINTR));
    if (stranger->n_bytes == sizeof(stranger->said)) {
        if (is_one_of_us(place, stranger)) {
            join(place, i);
            return false;
        }
        is_broken = true;
    }
    if (is_broken || (fv_clock_us() >= stranger->deadline_us)) {
        drop(place, i);
        return false;
    }
    return true;
}

/* Waits for a connection, for words, or for a stranger's time to be over. */
static void wait_and_listen(fv_meeting_place_t *place,
                            int listen_fd,
                            int64_t left_ms,
                            void (*on_accept)(int fd))
{
    struct pollfd *fds = place->polled;
    size_t n = place->n_strangers;

    fds[0] = (struct pollfd){.fd = listen_fd, .events = POLLIN};
    for (size_t i = 0; i < n; i++) {
        fds[i + 1U] = (struct pollfd){.fd = place->strangers[i].fd, .events = POLLIN};
    }
    if ((n > 0) && (left_ms > 100)) {
        left_ms = 100; /* their deadlines */
    }
    (void)poll(fds, n + 1U, (int)left_ms);
    for (size_t i = 0, at = 0; i < n; i++) { /* before anybody new takes a place */
        at += listen_to(place, at) ? 1U : 0U;
    }
    if (fds[0].revents != 0) {
        take_in(place, listen_fd, on_accept);
    }
}

static fv_status_t missing_ranks(const fv_meeting_place_t *place, uint32_t timeout_ms)
{
    char text[128] = "";
    size_t n = 0;

    for (uint32_t r = 1; (r < place->n_ranks) && (n + 8U < sizeof(text)); r++) {
        if ((place->fds[r] < 0) || (place->beat_fds[r] < 0)) {
            n += (size_t)snprintf(text + n, sizeof(text) - n, " %u", r);
        }
    }
    return fv_fail(FV_ERR_TIMED_OUT, "these ranks did not connect within %u s:%s",
                   timeout_ms / 1000U, text);
}

static fv_status_t
accept_all(fv_meeting_place_t *place, int listen_fd, uint32_t timeout_ms, void (*on_accept)(int fd))
{
    int64_t deadline_us = fv_clock_us() + (int64_t)timeout_ms * 1000;
    uint32_t n_expected = 0;
    fv_status_t status = FV_OK;

    for (uint32_t r = 1; r < place->n_ranks; r++) {
        n_expected += ((place->fds[r] < 0) ? 1U : 0U) + ((place->beat_fds[r] < 0) ? 1U : 0U);
    }

    while ((place->n_joined < n_expected) && (status == FV_OK)) {
        int64_t left_ms = (deadline_us - fv_clock_us()) / 1000;
        if (left_ms <= 0) {
            status = missing_ranks(place, timeout_ms);
        } else {
            wait_and_listen(place, listen_fd, left_ms, on_accept);
        }
    }
    while (place->n_strangers > 0) {
        drop(place, 0);
    }
    return status;
}

fv_status_t fv_meet_accept(int listen_fd,
                           const uint8_t secret[FV_SECRET_BYTES],
                           uint32_t epoch,
                           uint32_t n_ranks,
                           uint32_t timeout_ms,
                           void (*on_accept)(int fd),
                           int *fds,
                           int *beat_fds,
                           fv_ctl_hello_t *hellos)
{
    fv_meeting_place_t place = {.secret = secret,
                                .epoch = epoch,
                                .n_ranks = n_ranks,
                                .fds = fds,
                                .beat_fds = beat_fds,
                                .hellos = hellos,
                                .strangers_max = STRANGERS_SPARE + 2U * (size_t)n_ranks};
    fv_status_t status = FV_OK;

    place.strangers = calloc(place.strangers_max, sizeof(*place.strangers));
    place.polled = calloc(place.strangers_max + 1U, sizeof(*place.polled));
    if ((place.strangers == NULL) || (place.polled == NULL)) {
        status = fv_fail(FV_ERR_NO_MEMORY, "a meeting of %u ranks", n_ranks);
    } else {
        status = accept_all(&place, listen_fd, timeout_ms, on_accept);
    }
    free(place.strangers);
    free(place.polled);
    return status;
}

/* ------------------------------------------------------------------ the others */

fv_status_t fv_meet_introduce(int fd,
                              const uint8_t secret[FV_SECRET_BYTES],
                              uint32_t epoch,
                              const fv_ctl_hello_t *hello,
                              uint32_t timeout_ms)
{
    fv_meet_challenge_t challenge;
    fv_introduction_t said = {.header = {.magic = FV_CTL_MAGIC,
                                         .type = FV_CTL_HELLO,
                                         .epoch = epoch,
                                         .body_bytes = sizeof(*hello)}};
    fv_frame_piece_t piece = {&said, sizeof(said)};

    FV_RETURN_IF_ERR(fv_frame_read(fd, &challenge, sizeof(challenge), (int)timeout_ms));
    if ((challenge.magic != FV_CTL_MAGIC) || (challenge.epoch != epoch)) {
        return fv_fail(FV_ERR_PROTOCOL, "control socket: what answers there is no rank 0 of ours");
    }
    memcpy(&said.hello, hello, sizeof(said.hello));
    FV_RETURN_IF_ERR(prove(secret, challenge.nonce, epoch, hello, said.hello.proof));
    return fv_frame_send(fd, &piece, 1, (int)timeout_ms);
}
