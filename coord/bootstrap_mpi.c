/*
 * bootstrap_mpi.c - addresses over MPI, then sockets.
 */
#define _GNU_SOURCE /* accept4 */

#include "common/secret.h"
#include "coord/bootstrap.h"
#include "coord/meet.h"

#include <mpi.h>

#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define JOIN_TIMEOUT_MS 20000

static fv_status_t system_error(const char *what)
{
    return fv_fail(FV_ERR_SYSTEM, "%s: %s", what, strerror(errno));
}

/* True on every rank when all ranks report the same host name. */
static bool is_one_host(MPI_Comm comm, const char host[64])
{
    char first[64];
    int same = 0;
    int all_same = 0;

    memcpy(first, host, sizeof(first));
    (void)MPI_Bcast(first, (int)sizeof(first), MPI_CHAR, 0, comm);
    same = (strncmp(first, host, sizeof(first)) == 0) ? 1 : 0;
    (void)MPI_Allreduce(&same, &all_same, 1, MPI_INT, MPI_MIN, comm);
    return all_same != 0;
}

/* ------------------------------------------------------------------ where rank 0 listens */

static fv_status_t unix_address(const char *path, fv_meeting_t *out)
{
    struct sockaddr_un *un = (struct sockaddr_un *)(void *)&out->address;

    un->sun_family = AF_UNIX;
    if (strlen(path) >= sizeof(un->sun_path)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "control_address: a path of %zu bytes, expected at most %zu", strlen(path),
                       sizeof(un->sun_path) - 1U);
    }
    memcpy(un->sun_path, path, strlen(path) + 1U);
    struct stat old;
    if ((lstat(path, &old) == 0) && S_ISSOCK(old.st_mode)) {
        (void)unlink(path); /* left by a job that was killed */
    }
    out->address_bytes = (uint32_t)sizeof(*un);
    return FV_OK;
}

/* "host:port" or "[v6]:port" (the configuration has checked the form); port 0 = any. */
static fv_status_t tcp_address(const char *text, fv_meeting_t *out)
{
    char host[128];
    const char *colon = strrchr(text, ':');
    struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM};
    struct addrinfo *list = NULL;
    size_t n = (colon == NULL) ? 0U : (size_t)(colon - text);

    if ((n == 0) || (n >= sizeof(host))) {
        return fv_fail(FV_ERR_INVALID_ARG, "control_address: given \"%s\", expected host:port",
                       text);
    }
    bool is_bracketed = (text[0] == '[') && (text[n - 1U] == ']');
    (void)snprintf(host, sizeof(host), "%.*s", (int)(is_bracketed ? (n - 2U) : n),
                   is_bracketed ? (text + 1) : text);
    int rc = getaddrinfo(host, colon + 1, &hints, &list);
    if (rc != 0) {
        return fv_fail(FV_ERR_INVALID_ARG, "control_address: \"%s\": %s", text, gai_strerror(rc));
    }
    memcpy(&out->address, list->ai_addr, list->ai_addrlen);
    out->address_bytes = (uint32_t)list->ai_addrlen;
    freeaddrinfo(list);
    return FV_OK;
}

/* The first address of an interface that is up and not loopback, IPv4 before IPv6. */
static fv_status_t pick_interface(fv_meeting_t *out)
{
    struct ifaddrs *list = NULL;
    static const int k_families[] = {AF_INET, AF_INET6};

    if (getifaddrs(&list) != 0) {
        return system_error("getifaddrs");
    }
    for (size_t f = 0; (f < 2U) && (out->address_bytes == 0); f++) {
        for (struct ifaddrs *i = list; i != NULL; i = i->ifa_next) {
            bool is_usable = (i->ifa_addr != NULL) && ((i->ifa_flags & IFF_UP) != 0) &&
                             ((i->ifa_flags & IFF_LOOPBACK) == 0) &&
                             (i->ifa_addr->sa_family == k_families[f]);
            if (is_usable) {
                size_t n = (f == 0) ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
                memcpy(&out->address, i->ifa_addr, n);
                out->address_bytes = (uint32_t)n;
                break;
            }
        }
    }
    freeifaddrs(list);
    if (out->address_bytes == 0) {
        return fv_fail(FV_ERR_UNAVAILABLE,
                       "the ranks are on several hosts and this one has no network interface that "
                       "is up; name one with control_address");
    }
    return FV_OK;
}

static fv_status_t choose_address(bool one_host, const char *control_address, fv_meeting_t *out)
{
    bool is_auto = (strcmp(control_address, "auto") == 0);
    unsigned long long tag = 0;

    if (strncmp(control_address, "unix:", 5) == 0) {
        return unix_address(control_address + 5, out);
    }
    if (!is_auto) {
        return tcp_address(control_address, out);
    }
    if (!one_host) {
        return pick_interface(out);
    }
    struct sockaddr_un *un = (struct sockaddr_un *)(void *)&out->address;
    un->sun_family = AF_UNIX;
    /* abstract: no file to leave behind; anybody can read the name, so it has nothing of the secret */
    FV_RETURN_IF_ERR(fv_random_bytes(&tag, sizeof(tag)));
    int n = snprintf(un->sun_path + 1, sizeof(un->sun_path) - 1U, "fovea-%d-%016llx", (int)getpid(),
                     tag);
    out->address_bytes = (uint32_t)(offsetof(struct sockaddr_un, sun_path) + 1U + (size_t)n);
    return FV_OK;
}

static fv_status_t listen_at(fv_meeting_t *meeting, int *out_fd)
{
    static const int k_on = 1;
    int fd = socket(meeting->address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    socklen_t n = meeting->address_bytes;

    if (fd < 0) {
        return system_error("socket");
    }
    /* a port that was given: connections to it live on while recruits come, and linger when their job was killed */
    if (meeting->address.ss_family != AF_UNIX) {
        (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &k_on, sizeof(k_on));
    }
    if ((bind(fd, (struct sockaddr *)&meeting->address, n) != 0) || (listen(fd, 1024) != 0)) {
        fv_status_t status = system_error("control socket: bind");
        (void)close(fd);
        return status;
    }
    if (meeting->address.ss_family != AF_UNIX) { /* port 0 was bound: say which it became */
        n = sizeof(meeting->address);
        if (getsockname(fd, (struct sockaddr *)&meeting->address, &n) != 0) {
            fv_status_t status = system_error("getsockname");
            (void)close(fd);
            return status;
        }
        meeting->address_bytes = n;
    }
    *out_fd = fd;
    return FV_OK;
}

/* ------------------------------------------------------------------ connections */

#ifndef TCP_RTO_MAX_MS /* Linux 6.15 */
#    define TCP_RTO_MAX_MS 44
#endif

/*
 * A host that vanishes is noticed within seconds, and a link that is down for 3 s is none that has vanished: what is sent again
 * must not be at ever longer intervals, or the next try would come when we have given up.
 */
static void tune(int fd)
{
    struct sockaddr_storage own = {0};
    socklen_t n_own = sizeof(own);
    static const struct {
        int level, option, value;
    } k_options[] = {
        {IPPROTO_TCP, TCP_NODELAY, 1},
        {SOL_SOCKET, SO_KEEPALIVE, 1},
        {IPPROTO_TCP, TCP_KEEPIDLE, 1},
        {IPPROTO_TCP, TCP_KEEPINTVL, 1},
        {IPPROTO_TCP, TCP_KEEPCNT, 4},
        {IPPROTO_TCP, TCP_USER_TIMEOUT, 5000},
        {IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS, 1},
        {IPPROTO_TCP, TCP_RTO_MAX_MS, 1000},
    };

    if ((getsockname(fd, (struct sockaddr *)&own, &n_own) != 0) || (own.ss_family == AF_UNIX)) {
        return;
    }
    for (size_t i = 0; i < sizeof(k_options) / sizeof(k_options[0]); i++) {
        (void)setsockopt(fd, k_options[i].level, k_options[i].option, &k_options[i].value,
                         sizeof(k_options[i].value));
    }
}

static fv_status_t connect_to(const fv_meeting_t *meeting,
                              uint32_t epoch,
                              uint32_t channel,
                              fv_ctl_hello_t *hello,
                              int *out_fd)
{
    int fd = socket(meeting->address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0) {
        return system_error("socket");
    }
    if (connect(fd, (const struct sockaddr *)&meeting->address, meeting->address_bytes) != 0) {
        fv_status_t status = system_error("control socket: connect to rank 0");
        (void)close(fd);
        return status;
    }
    tune(fd);
    hello->channel = channel;
    fv_status_t status = fv_meet_introduce(fd, meeting->secret, epoch, hello, JOIN_TIMEOUT_MS);
    if (status != FV_OK) {
        (void)close(fd);
        return status;
    }
    *out_fd = fd;
    return FV_OK;
}

/* ------------------------------------------------------------------ both sides */

fv_status_t fv_bootstrap_open(bool is_one_host,
                              const char *control_address,
                              fv_meeting_t *meeting,
                              int *listen_fd)
{
    *meeting = (fv_meeting_t){0};
    FV_RETURN_IF_ERR(fv_random_bytes(meeting->secret, FV_SECRET_BYTES));
    FV_RETURN_IF_ERR(choose_address(is_one_host, control_address, meeting));
    return listen_at(meeting, listen_fd);
}

fv_status_t fv_bootstrap_accept(const fv_meeting_t *meeting,
                                int listen_fd,
                                const char *control_address,
                                uint32_t epoch,
                                uint32_t n_ranks,
                                int *fds,
                                int *beat_fds,
                                fv_ctl_hello_t *hellos)
{
    fv_status_t status = fv_meet_accept(listen_fd, meeting->secret, epoch, n_ranks, JOIN_TIMEOUT_MS,
                                        tune, fds, beat_fds, hellos);

    (void)close(listen_fd);
    if (strncmp(control_address, "unix:", 5) == 0) {
        (void)unlink(control_address + 5); /* everybody is in */
    }
    return status;
}

fv_status_t fv_bootstrap_enter(const fv_meeting_t *meeting,
                               uint32_t epoch,
                               fv_ctl_hello_t *hello,
                               int *out_fd,
                               int *out_beat_fd)
{
    FV_RETURN_IF_ERR(connect_to(meeting, epoch, FV_CHANNEL_CONTROL, hello, out_fd));
    return connect_to(meeting, epoch, FV_CHANNEL_BEAT, hello, out_beat_fd);
}

fv_status_t fv_bootstrap(void *mpi_comm,
                         const char *control_address,
                         uint32_t epoch,
                         fv_ctl_hello_t *hello,
                         int *out_fds,
                         int *out_beat_fds,
                         fv_ctl_hello_t *out_hellos)
{
    MPI_Comm comm = *(MPI_Comm *)mpi_comm;
    fv_meeting_t meeting = {0};
    fv_status_t status = FV_OK;
    int listen_fd = -1;
    int rank = 0;
    int n_ranks = 0;

    (void)MPI_Comm_rank(comm, &rank);
    (void)MPI_Comm_size(comm, &n_ranks);
    for (int r = 0; r < n_ranks; r++) {
        out_fds[r] = -1;
        out_beat_fds[r] = -1;
    }
    (void)gethostname(hello->host, sizeof(hello->host) - 1U);
    bool one_host = is_one_host(comm, hello->host);
    if (rank == 0) {
        status = fv_bootstrap_open(one_host, control_address, &meeting, &listen_fd);
        meeting.is_ok = (status == FV_OK) ? 1 : 0;
    }
    (void)MPI_Bcast(&meeting, (int)sizeof(meeting), MPI_BYTE, 0, comm);
    if (meeting.is_ok == 0) {
        return (rank == 0) ? status : fv_fail(FV_ERR_UNAVAILABLE, "rank 0 could not listen");
    }
    if (rank != 0) {
        status = fv_bootstrap_enter(&meeting, epoch, hello, &out_fds[0], &out_beat_fds[0]);
        fv_secret_wipe(&meeting, sizeof(meeting));
        return status;
    }
    out_hellos[0] = *hello;
    status = fv_bootstrap_accept(&meeting, listen_fd, control_address, epoch, (uint32_t)n_ranks,
                                 out_fds, out_beat_fds, out_hellos);
    fv_secret_wipe(&meeting, sizeof(meeting));
    return status;
}
