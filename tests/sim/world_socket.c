/*
 * world_socket.c - stream sockets between simulated processes.
 *
 * Bytes arrive in order, late, in pieces. A partition holds them back, and ends the connection as TCP does when it lasts. A
 * process that dies closes its ends; the other side learns of it when the network lets it.
 */
#define _GNU_SOURCE

#include "common/status.h"
#include "tests/sim/world.h"

#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define CONNECTIONS_MAX 1024
#define TCP_TIMEOUT_US  (5 * SIM_SECOND) /* as coord/bootstrap_mpi.c sets it */
#define POLL_FDS_MAX    64

int sim_socket_close(int fd);
int __real_poll(struct pollfd *fds, nfds_t n, int timeout_ms);
int __wrap_poll(struct pollfd *fds, nfds_t n, int timeout_ms);
ssize_t __wrap_recv(int fd, void *out, size_t n_bytes, int flags);
ssize_t __wrap_send(int fd, const void *data, size_t n_bytes, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags);
int __wrap_shutdown(int fd, int how);
int __wrap_getsockopt(int fd, int level, int name, void *value, socklen_t *n);
int __wrap_getsockname(int fd, struct sockaddr *out, socklen_t *n);

typedef struct end {
    sim_process_t *owner; /* NULL: closed */
    uint32_t host;
    uint8_t *data; /* came, not read yet */
    size_t n_bytes, n_read, cap;
    bool has_ended; /* nothing more comes */
    bool is_shut;   /* by its owner */
    int error;
    int64_t last_us; /* when what is on its way to it arrives */
} end_t;

typedef struct connection {
    end_t ends[2];
} connection_t;

typedef struct packet {
    size_t n_bytes; /* 0: the end */
    uint8_t data[];
} packet_t;

static struct {
    connection_t connections[CONNECTIONS_MAX];
    int n_connections;
    int64_t partitioned_until[SIM_HOSTS_MAX];
    int64_t delay_low_us, delay_high_us;
    sim_tap_t tap;
} n;

/* ------------------------------------------------------------------ the way */

void sim_set_delay(int64_t low_us, int64_t high_us)
{
    n.delay_low_us = low_us;
    n.delay_high_us = high_us;
}

void sim_partition(uint32_t host, int64_t until_us)
{
    n.partitioned_until[host] =
        (n.partitioned_until[host] > until_us) ? n.partitioned_until[host] : until_us;
}

int64_t sim_partition_ends_us(uint32_t a, uint32_t b)
{
    int64_t until_us = (n.partitioned_until[a] > n.partitioned_until[b]) ? n.partitioned_until[a]
                                                                         : n.partitioned_until[b];

    return ((a == b) || (until_us < sim_now_us())) ? sim_now_us() : until_us;
}

int64_t sim_calm_us(void)
{
    int64_t until_us = sim_now_us();

    for (int i = 0; i < SIM_HOSTS_MAX; i++) {
        until_us = (n.partitioned_until[i] > until_us) ? n.partitioned_until[i] : until_us;
    }
    return until_us;
}

int64_t sim_arrival_us(uint32_t from_host, uint32_t to_host)
{
    int64_t delay_us =
        (from_host == to_host) ? sim_pick(5, 60) : sim_pick(n.delay_low_us, n.delay_high_us);

    return sim_partition_ends_us(from_host, to_host) + delay_us;
}

void sim_tap(sim_tap_t tap)
{
    n.tap = tap;
}

static end_t *end_of(int fd)
{
    return &n.connections[(fd - SIM_FDS_FROM) / 2].ends[(fd - SIM_FDS_FROM) % 2];
}

static end_t *other_end(int fd)
{
    return end_of(SIM_FDS_FROM + ((fd - SIM_FDS_FROM) ^ 1));
}

static void wake_owner(const end_t *end)
{
    if (end->owner != NULL) {
        sim_wake(end->owner);
    }
}

/* ------------------------------------------------------------------ arrivals */

static void append(end_t *end, const uint8_t *data, size_t n_bytes)
{
    if (end->n_read == end->n_bytes) {
        end->n_read = 0;
        end->n_bytes = 0;
    }
    if (end->n_bytes + n_bytes > end->cap) {
        size_t cap = 2U * (end->n_bytes + n_bytes);
        uint8_t *grown = sim_alloc(cap);
        if (end->n_bytes > 0) {
            memcpy(grown, end->data, end->n_bytes);
        }
        sim_free(end->data);
        end->data = grown;
        end->cap = cap;
    }
    memcpy(end->data + end->n_bytes, data, n_bytes);
    end->n_bytes += n_bytes;
}

static void arrive(void *a, uint64_t fd)
{
    packet_t *packet = a;
    end_t *end = end_of((int)fd);

    if ((end->error == 0) && !end->has_ended && (end->owner != NULL)) {
        if (packet->n_bytes > 0) {
            append(end, packet->data, packet->n_bytes);
        } else {
            end->has_ended = true;
        }
        wake_owner(end);
    }
    sim_free(packet);
}

/* From the other end to `fd`'s. */
static void post(int fd, const void *data, size_t n_bytes)
{
    end_t *end = end_of(fd);
    packet_t *packet = sim_alloc(sizeof(*packet) + n_bytes);
    int64_t at_us = sim_arrival_us(other_end(fd)->host, end->host);

    packet->n_bytes = n_bytes;
    if (n_bytes > 0) {
        memcpy(packet->data, data, n_bytes);
    }
    end->last_us = (at_us > end->last_us) ? at_us : (end->last_us + 1);
    sim_at_owned(end->last_us, arrive, packet, (uint64_t)fd);
}

static void time_out(void *a, uint64_t fd)
{
    end_t *end = end_of((int)fd);

    (void)a;
    if (end->error == 0) {
        end->error = ETIMEDOUT;
        wake_owner(end);
    }
}

/* ------------------------------------------------------------------ life */

void sim_connect(sim_process_t *a, sim_process_t *b, int ends[2])
{
    sim_process_t *owners[2] = {a, b};
    int i = n.n_connections++;

    FV_ASSERT(i < CONNECTIONS_MAX);
    for (int e = 0; e < 2; e++) {
        n.connections[i].ends[e] =
            (end_t){.owner = owners[e], .host = sim_process_host(sim_process_number(owners[e]))};
        ends[e] = SIM_FDS_FROM + 2 * i + e;
    }
}

static void close_end(int fd)
{
    end_t *end = end_of(fd);

    if (end->owner == NULL) {
        return;
    }
    end->owner = NULL;
    if (!end->is_shut) {
        post(SIM_FDS_FROM + ((fd - SIM_FDS_FROM) ^ 1), NULL, 0);
    }
}

int sim_socket_close(int fd)
{
    close_end(fd);
    return 0;
}

void sim_sockets_drop(const sim_process_t *process)
{
    for (int i = 0; i < 2 * n.n_connections; i++) {
        if (end_of(SIM_FDS_FROM + i)->owner == process) {
            close_end(SIM_FDS_FROM + i);
        }
    }
}

void sim_sockets_begin(void)
{
    memset(&n, 0, sizeof(n));
    sim_set_delay(50, 300);
}

void sim_sockets_end(void)
{
    for (int i = 0; i < 2 * n.n_connections; i++) {
        sim_free(end_of(SIM_FDS_FROM + i)->data);
    }
}

/* ------------------------------------------------------------------ calls */

ssize_t __wrap_recv(int fd, void *out, size_t n_bytes, int flags)
{
    end_t *end = end_of(fd);
    size_t n_here = end->n_bytes - end->n_read;

    (void)flags;
    sim_look();
    if (end->error != 0) {
        errno = end->error;
        return -1;
    }
    if (n_here == 0) {
        errno = EAGAIN;
        return (end->has_ended || end->is_shut) ? 0 : -1;
    }
    size_t n_taken = (n_here < n_bytes) ? n_here : n_bytes;
    n_taken = sim_chance(8) ? (size_t)sim_pick(1, (int64_t)n_taken) : n_taken;
    memcpy(out, end->data + end->n_read, n_taken);
    end->n_read += n_taken;
    return (ssize_t)n_taken;
}

ssize_t __wrap_send(int fd, const void *data, size_t n_bytes, int flags)
{
    struct iovec piece = {.iov_base = (void *)(uintptr_t)data, .iov_len = n_bytes};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};

    return __wrap_sendmsg(fd, &message, flags);
}

ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags)
{
    end_t *end = end_of(fd);
    ssize_t n_sent = 0;

    (void)flags;
    sim_call();
    if ((end->error != 0) || end->has_ended || end->is_shut) {
        errno = (end->error != 0) ? end->error : EPIPE;
        return -1;
    }
    bool is_short = sim_chance(16); /* the rest does not fit just now */
    for (size_t i = 0; i < message->msg_iovlen; i++) {
        const struct iovec *piece = &message->msg_iov[i];
        if (piece->iov_len == 0) {
            continue;
        }
        size_t n_taken = is_short ? (size_t)sim_pick(1, (int64_t)piece->iov_len) : piece->iov_len;
        if (n.tap != NULL) {
            n.tap((fd - SIM_FDS_FROM) / 2, (fd - SIM_FDS_FROM) % 2, piece->iov_base, n_taken);
        }
        post(SIM_FDS_FROM + ((fd - SIM_FDS_FROM) ^ 1), piece->iov_base, n_taken);
        n_sent += (ssize_t)n_taken;
        if (is_short) {
            break;
        }
    }
    if (sim_partition_ends_us(end->host, other_end(fd)->host) > sim_now_us() + TCP_TIMEOUT_US) {
        sim_at(sim_now_us() + TCP_TIMEOUT_US, time_out, NULL, (uint64_t)fd);
    }
    return n_sent;
}

int __wrap_shutdown(int fd, int how)
{
    end_t *end = end_of(fd);

    (void)how;
    if ((end->owner != NULL) && !end->is_shut) {
        end->is_shut = true;
        post(SIM_FDS_FROM + ((fd - SIM_FDS_FROM) ^ 1), NULL, 0);
        wake_owner(end);
    }
    return 0;
}

int __wrap_getsockopt(int fd, int level, int name, void *value, socklen_t *n_bytes)
{
    (void)level;
    (void)name;
    (void)n_bytes;
    memcpy(value, &end_of(fd)->error, sizeof(int));
    return 0;
}

/* Processes of one host speak over unix sockets, others over TCP. */
int __wrap_getsockname(int fd, struct sockaddr *out, socklen_t *n_bytes)
{
    bool is_tcp = end_of(fd)->host != other_end(fd)->host;

    (void)n_bytes;
    out->sa_family = is_tcp ? AF_INET : AF_UNIX;
    return 0;
}

static short look_at(int fd, short events)
{
    const end_t *end = end_of(fd);
    short got = POLLOUT;

    if (end->owner == NULL) {
        return POLLNVAL;
    }
    if ((end->n_bytes > end->n_read) || end->has_ended || end->is_shut || (end->error != 0)) {
        got |= POLLIN;
    }
    if (end->has_ended || end->is_shut) {
        got |= POLLRDHUP;
    }
    got = (short)(got & events);
    if (end->is_shut) {
        got |= POLLHUP;
    }
    return (short)(got | ((end->error != 0) ? (POLLERR | POLLHUP) : 0));
}

static int look_at_all(struct pollfd *fds, nfds_t n_fds)
{
    int n_ready = 0;

    for (nfds_t i = 0; i < n_fds; i++) {
        fds[i].revents = 0;
        if (fds[i].fd >= SIM_FDS_FROM) {
            fds[i].revents = look_at(fds[i].fd, fds[i].events);
        } else if (fds[i].fd >= 0) {
            (void)__real_poll(&fds[i], 1, 0);
        }
        n_ready += (fds[i].revents != 0) ? 1 : 0;
    }
    return n_ready;
}

int __wrap_poll(struct pollfd *fds, nfds_t n_fds, int timeout_ms)
{
    int64_t until_us = (timeout_ms < 0) ? SIM_NEVER : (sim_now_us() + (int64_t)timeout_ms * 1000);

    if (sim_current() == NULL) {
        return __real_poll(fds, n_fds, timeout_ms);
    }
    if (timeout_ms == 0) {
        sim_look();
    }
    for (;;) {
        int n_ready = look_at_all(fds, n_fds);
        if ((n_ready > 0) || (sim_now_us() >= until_us)) {
            return n_ready;
        }
        sim_block(until_us);
    }
}
