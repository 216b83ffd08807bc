/*
 * frame.c - partial reads and writes, deadlines, and a closed peer, in one place.
 */
#define _GNU_SOURCE /* POLLRDHUP: a closed peer shows although unread data waits */
#include "common/frame.h"

#include "common/clock.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define PIECES_MAX 8

static fv_status_t wait_ready(int fd, short events, int64_t deadline_us)
{
    for (;;) {
        struct pollfd p = {.fd = fd, .events = events};
        int timeout = -1;
        if (deadline_us != INT64_MAX) {
            int64_t left_us = deadline_us - fv_clock_us();
            if (left_us <= 0) {
                return fv_fail(FV_ERR_TIMED_OUT, "control socket: no progress in time");
            }
            timeout = (int)((left_us + 999) / 1000);
        }
        int n = poll(&p, 1, timeout);
        if (n > 0) {
            return FV_OK; /* readable, writable, or closed: the next call tells */
        }
        if ((n < 0) && (errno != EINTR)) {
            return fv_fail(FV_ERR_SYSTEM, "poll: %s", strerror(errno));
        }
    }
}

static int64_t deadline_of(int timeout_ms)
{
    return (timeout_ms < 0) ? INT64_MAX : (fv_clock_us() + (int64_t)timeout_ms * 1000);
}

static fv_status_t socket_error(const char *call)
{
    if ((errno == EPIPE) || (errno == ECONNRESET) || (errno == ETIMEDOUT)) {
        return fv_fail(FV_ERR_RANK_LOST, "control socket closed: %s", strerror(errno));
    }
    return fv_fail(FV_ERR_SYSTEM, "%s on a control socket: %s", call, strerror(errno));
}

/* Drops what was sent from the front of the list. */
static void advance(struct iovec *iov, size_t n_iov, size_t *first, size_t n_bytes)
{
    while ((*first < n_iov) && (n_bytes >= iov[*first].iov_len)) {
        n_bytes -= iov[*first].iov_len;
        (*first)++;
    }
    if (*first < n_iov) {
        iov[*first].iov_base = (unsigned char *)iov[*first].iov_base + n_bytes;
        iov[*first].iov_len -= n_bytes;
    }
}

fv_status_t fv_frame_send(int fd, const fv_frame_piece_t *pieces, size_t n_pieces, int timeout_ms)
{
    struct iovec iov[PIECES_MAX];
    int64_t deadline_us = deadline_of(timeout_ms);
    size_t first = 0;

    FV_ASSERT(n_pieces <= PIECES_MAX);
    for (size_t i = 0; i < n_pieces; i++) {
        iov[i].iov_base = (void *)(uintptr_t)pieces[i].data;
        iov[i].iov_len = pieces[i].n_bytes;
    }
    advance(iov, n_pieces, &first, 0); /* skips empty pieces */
    while (first < n_pieces) {
        struct msghdr message = {.msg_iov = iov + first, .msg_iovlen = n_pieces - first};
        ssize_t n = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n >= 0) {
            advance(iov, n_pieces, &first, (size_t)n);
        } else if (errno == EAGAIN) {
            FV_RETURN_IF_ERR(wait_ready(fd, POLLOUT, deadline_us));
        } else if (errno != EINTR) {
            return socket_error("sendmsg");
        }
    }
    return FV_OK;
}

fv_status_t fv_frame_read(int fd, void *out, size_t n_bytes, int timeout_ms)
{
    unsigned char *p = out;
    int64_t deadline_us = deadline_of(timeout_ms);

    while (n_bytes > 0) {
        ssize_t n = recv(fd, p, n_bytes, MSG_DONTWAIT);
        if (n > 0) {
            p += n;
            n_bytes -= (size_t)n;
        } else if (n == 0) {
            return fv_fail(FV_ERR_RANK_LOST, "control socket closed by the peer");
        } else if (errno == EAGAIN) {
            FV_RETURN_IF_ERR(wait_ready(fd, POLLIN, deadline_us));
        } else if (errno != EINTR) {
            return socket_error("recv");
        }
    }
    return FV_OK;
}

bool fv_frame_is_closed(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLRDHUP};

    return (poll(&p, 1, 0) > 0) && ((p.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0);
}
