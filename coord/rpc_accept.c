/*
 * rpc_accept.c - plain addresses are accepted here, not by gRPC: so connections can be counted and peers looked at.
 *
 * One thread sleeps in poll() on the listening sockets, and hands what it accepts to gRPC. Whether a connection given away still
 * stands is asked only when the table is full: its descriptor, then, is another file or none.
 * (TLS addresses stay gRPC's: it takes foreign descriptors without TLS only.)
 */
#define _GNU_SOURCE /* accept4, struct ucred */

#include "common/clock.h"
#include "common/log.h"
#include "coord/rpc_internal.h"

#include <grpc/grpc.h>
#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define BACKLOG      1024
#define RETRY_MS     50 /* after an accept that failed for want of descriptors or memory */
#define LOG_EVERY_US 1000000
#define GROUPS_MAX   64

/* A descriptor given to gRPC: the same file as long as inode and device are the same. */
typedef struct fv_given {
    int fd;
    ino_t inode;
    dev_t device;
} fv_given_t;

struct fv_acceptor {
    grpc_server *server;
    grpc_server_credentials *credentials;
    fv_listen_t *listen; /* [n_listen], borrowed */
    int32_t n_listen;
    fv_unix_peers_t unix_peers;
    int stop_fd;
    pthread_t thread;
    bool is_running;
    fv_given_t *given; /* [n_max], n_given in use */
    size_t n_given, n_max;
    uint64_t n_refused; /* since the last line in the log */
    int64_t logged_us;
};

/* ------------------------------------------------------------------ binding */

static fv_status_t cannot(const fv_listen_t *listen)
{
    return fv_fail(FV_ERR_UNAVAILABLE,
                   "listen: cannot listen at %.160s (in use, or not an address of this host)",
                   listen->address);
}

/* False: errno says why. */
static bool bind_socket(fv_listen_t *at, int fd, const struct sockaddr *address, socklen_t n)
{
    if ((fd < 0) || (bind(fd, address, n) != 0) || (listen(fd, BACKLOG) != 0)) {
        int error = errno;
        if (fd >= 0) {
            (void)close(fd);
        }
        errno = error;
        return false;
    }
    at->fds[at->n_fds++] = fd;
    return true;
}

static fv_status_t bind_unix(fv_listen_t *listen, int32_t mode)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = listen->address + strlen("unix:");
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    if ((mode != 0) && (fd >= 0)) {
        (void)fchmod(
            fd, (mode_t)mode); /* the socket is born with it: never wider, if only for a moment */
    }
    if (!bind_socket(listen, fd, (const struct sockaddr *)&address, sizeof(address)) ||
        ((mode != 0) && (chmod(path, (mode_t)mode) != 0))) { /* what the umask took away */
        return cannot(listen);
    }
    return FV_OK;
}

/* The port that the first of several sockets got, for the others. */
static void set_port(struct sockaddr *address, int port)
{
    if (port == 0) {
        return;
    }
    if (address->sa_family == AF_INET6) {
        ((struct sockaddr_in6 *)(void *)address)->sin6_port = htons((uint16_t)port);
    } else {
        ((struct sockaddr_in *)(void *)address)->sin_port = htons((uint16_t)port);
    }
}

static int port_of(int fd)
{
    struct sockaddr_storage address = {0};
    socklen_t n = sizeof(address);

    (void)getsockname(fd, (struct sockaddr *)&address, &n);
    return ntohs((address.ss_family == AF_INET6)
                     ? ((struct sockaddr_in6 *)(void *)&address)->sin6_port
                     : ((struct sockaddr_in *)(void *)&address)->sin_port);
}

static fv_status_t bind_tcp(fv_listen_t *listen)
{
    char host[FV_ADDRESS_BYTES];
    struct addrinfo hints = {.ai_family = AF_UNSPEC,
                             .ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *list = NULL;
    int one = 1;

    (void)snprintf(host, sizeof(host), "%s", listen->address);
    char *colon = strrchr(host, ':'); /* checked: it is there, and brackets are in order */
    *colon = '\0';
    char *name = host;
    if (host[0] == '[') {
        name = host + 1;
        colon[-1] = '\0';
    }
    int error = getaddrinfo(name, colon + 1, &hints, &list);
    if (error != 0) {
        return fv_fail(FV_ERR_UNAVAILABLE, "listen: cannot listen at %.160s: %s", listen->address,
                       gai_strerror(error));
    }
    bool is_taken = false;
    for (struct addrinfo *a = list; (a != NULL) && (listen->n_fds < FV_LISTEN_FDS_MAX);
         a = a->ai_next) {
        int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        set_port(a->ai_addr, (listen->n_fds > 0) ? port_of(listen->fds[0]) : 0);
        if (fd >= 0) {
            (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
        }
        if (!bind_socket(listen, fd, a->ai_addr, a->ai_addrlen)) {
            is_taken = is_taken || (errno == EADDRINUSE);
        }
    }
    freeaddrinfo(list);
    if (is_taken || (listen->n_fds == 0)) {
        return cannot(listen);
    }
    fv_listen_set_port(listen, port_of(listen->fds[0]));
    return FV_OK;
}

fv_status_t fv_listen_bind(fv_listen_t *listen, int32_t unix_mode)
{
    return listen->is_unix ? bind_unix(listen, unix_mode) : bind_tcp(listen);
}

/* ------------------------------------------------------------------ who may connect */

static void log_refusal(fv_acceptor_t *acceptor, const char *why)
{
    int64_t now_us = fv_clock_us();

    acceptor->n_refused++;
    if (now_us - acceptor->logged_us >= LOG_EVERY_US) {
        fv_warn("refused %llu connection%s; the last: %s", (unsigned long long)acceptor->n_refused,
                (acceptor->n_refused == 1U) ? "" : "s", why);
        acceptor->logged_us = now_us;
        acceptor->n_refused = 0;
    }
}

static bool is_in_our_group(int fd, gid_t gid)
{
    gid_t groups[GROUPS_MAX];
    socklen_t n_bytes = sizeof(groups);

    if (gid == getegid()) {
        return true;
    }
    if (getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups, &n_bytes) != 0) {
        return false; /* more groups than that: not one of ours */
    }
    for (size_t i = 0; i < n_bytes / sizeof(gid_t); i++) {
        if (groups[i] == getegid()) {
            return true;
        }
    }
    return false;
}

static bool is_peer_welcome(fv_acceptor_t *acceptor, int fd)
{
    struct ucred peer = {0};
    socklen_t n = sizeof(peer);
    char why[96];

    if (acceptor->unix_peers == FV_UNIX_PEERS_ANY) {
        return true;
    }
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &n) != 0) {
        return false;
    }
    if ((peer.uid == geteuid()) || (peer.uid == 0) ||
        ((acceptor->unix_peers == FV_UNIX_PEERS_GROUP) && is_in_our_group(fd, peer.gid))) {
        return true;
    }
    (void)snprintf(why, sizeof(why), "user %u, group %u are not allowed in (unix_peers)",
                   (unsigned)peer.uid, (unsigned)peer.gid);
    log_refusal(acceptor, why);
    return false;
}

/* Takes out of the table what gRPC has closed meanwhile. */
static void forget_closed(fv_acceptor_t *acceptor)
{
    size_t n = 0;

    for (size_t i = 0; i < acceptor->n_given; i++) {
        struct stat now;
        const fv_given_t *given = &acceptor->given[i];
        if ((fstat(given->fd, &now) == 0) && (now.st_ino == given->inode) &&
            (now.st_dev == given->device)) {
            acceptor->given[n++] = *given;
        }
    }
    acceptor->n_given = n;
}

static bool has_room(fv_acceptor_t *acceptor)
{
    char why[96];

    if (acceptor->n_given == acceptor->n_max) {
        forget_closed(acceptor);
    }
    if (acceptor->n_given < acceptor->n_max) {
        return true;
    }
    (void)snprintf(why, sizeof(why), "%zu are open, the most allowed (connections_max)",
                   acceptor->n_given);
    log_refusal(acceptor, why);
    return false;
}

/* ------------------------------------------------------------------ the thread */

static void give_to_grpc(fv_acceptor_t *acceptor, int fd)
{
    struct stat about;

    if (fstat(fd, &about) != 0) {
        (void)close(fd);
        return;
    }
    acceptor->given[acceptor->n_given++] =
        (fv_given_t){.fd = fd, .inode = about.st_ino, .device = about.st_dev};
    grpc_server_add_channel_from_fd(acceptor->server, fd, acceptor->credentials);
}

/* Everything that waits at one socket. False: for want of something that may come back. */
static bool accept_all(fv_acceptor_t *acceptor, int listen_fd, bool is_unix)
{
    int one = 1;

    for (;;) {
        int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0) {
            return (errno != EMFILE) && (errno != ENFILE) && (errno != ENOBUFS) &&
                   (errno != ENOMEM);
        }
        if (!is_unix) {
            (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
        }
        if ((is_unix && !is_peer_welcome(acceptor, fd)) || !has_room(acceptor)) {
            (void)close(fd);
        } else {
            give_to_grpc(acceptor, fd);
        }
    }
}

static size_t list_sockets(const fv_acceptor_t *acceptor, struct pollfd *fds, bool *is_unix)
{
    size_t n = 0;

    for (int32_t i = 0; i < acceptor->n_listen; i++) {
        for (int j = 0; j < acceptor->listen[i].n_fds; j++) {
            is_unix[n] = acceptor->listen[i].is_unix;
            fds[n++] = (struct pollfd){.fd = acceptor->listen[i].fds[j], .events = POLLIN};
        }
    }
    return n;
}

static void *run(void *arg)
{
    fv_acceptor_t *acceptor = arg;
    struct pollfd fds[(FV_LISTEN_MAX * FV_LISTEN_FDS_MAX) + 1];
    bool is_unix[FV_LISTEN_MAX * FV_LISTEN_FDS_MAX];

    fv_log_thread_name("accept");
    size_t n = list_sockets(acceptor, fds + 1, is_unix);
    fds[0] = (struct pollfd){.fd = acceptor->stop_fd, .events = POLLIN};
    for (;;) {
        (void)poll(fds, n + 1U, -1);
        if (fds[0].revents != 0) {
            return NULL;
        }
        for (size_t i = 0; i < n; i++) {
            if ((fds[i + 1U].revents != 0) && !accept_all(acceptor, fds[i + 1U].fd, is_unix[i])) {
                log_refusal(acceptor, "no descriptor or memory is left");
                (void)poll(fds, 1, RETRY_MS); /* the stop alone */
            }
        }
    }
}

fv_status_t fv_acceptor_start(const fv_rpc_config_t *config,
                              fv_listen_t *listen,
                              int32_t n_listen,
                              struct grpc_server *server,
                              fv_acceptor_t **out)
{
    size_t n_max =
        (config->connections_max > 0) ? (size_t)config->connections_max : FV_CONNECTIONS_DEFAULT;
    fv_acceptor_t *acceptor = calloc(1, sizeof(*acceptor));

    if (acceptor == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "acceptor");
    }
    acceptor->server = server;
    acceptor->credentials = grpc_insecure_server_credentials_create();
    acceptor->listen = listen;
    acceptor->n_listen = n_listen;
    acceptor->unix_peers = config->unix_peers;
    acceptor->n_max = n_max;
    acceptor->logged_us = fv_clock_us() - LOG_EVERY_US;
    acceptor->given = calloc(n_max, sizeof(*acceptor->given));
    acceptor->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if ((acceptor->given != NULL) && (acceptor->stop_fd >= 0) &&
        (pthread_create(&acceptor->thread, NULL, run, acceptor) == 0)) {
        acceptor->is_running = true;
        *out = acceptor;
        return FV_OK;
    }
    fv_acceptor_stop(acceptor);
    return fv_fail(FV_ERR_SYSTEM, "rpc: cannot create the thread that accepts");
}

void fv_acceptor_stop(fv_acceptor_t *acceptor)
{
    uint64_t one = 1;

    if (acceptor == NULL) {
        return;
    }
    if (acceptor->is_running) {
        ssize_t n = write(acceptor->stop_fd, &one, sizeof(one));
        (void)n; /* a fresh counter is never full */
        (void)pthread_join(acceptor->thread, NULL);
    }
    if (acceptor->stop_fd >= 0) {
        (void)close(acceptor->stop_fd);
    }
    grpc_server_credentials_release(acceptor->credentials);
    free(acceptor->given);
    free(acceptor);
}
