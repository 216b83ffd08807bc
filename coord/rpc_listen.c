/*
 * rpc_listen.c - listening addresses: their form, and who owns the path of a unix socket.
 *
 * gRPC unlinks whatever lies at a unix path before it binds, so a second server would silently take the
 * first one's clients. A lock file beside the socket (PATH.lock, flock) decides instead: it lives exactly
 * as long as the process that holds it, whatever killed it.
 */
#include "common/log.h"
#include "coord/rpc_internal.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define UNIX_PREFIX   "unix:"
#define UNIX_PATH_MAX 107U /* bytes of sun_path, without its NUL */

static fv_status_t bad_form(const char *address, const char *why)
{
    return fv_fail(
        FV_ERR_INVALID_ARG,
        "listen: given \"%.120s\" (%s), expected HOST:PORT with port 0..65535 or unix:/PATH",
        address, why);
}

static fv_status_t check_tcp(const char *address)
{
    const char *colon = strrchr(address, ':');
    char *rest = NULL;

    if ((colon == NULL) || (colon == address)) {
        return bad_form(address, "no host or no port");
    }
    if ((address[0] != '[') && (memchr(address, ':', (size_t)(colon - address)) != NULL)) {
        return bad_form(address, "an IPv6 host goes in brackets");
    }
    errno = 0;
    long port = strtol(colon + 1, &rest, 10);
    if ((colon[1] < '0') || (colon[1] > '9') || (*rest != '\0') || (errno != 0) || (port > 65535)) {
        return bad_form(address, "the port is not a number from 0 to 65535");
    }
    return FV_OK;
}

/* True when `fd` is still the file at `path`: its last holder may have removed it meanwhile. */
static bool is_same_file(int fd, const char *path)
{
    struct stat open_file;
    struct stat named;

    return (fstat(fd, &open_file) == 0) && (stat(path, &named) == 0) &&
           (open_file.st_dev == named.st_dev) && (open_file.st_ino == named.st_ino);
}

/* NOLINTBEGIN(concurrency-mt-unsafe): glibc's strerror is safe between threads */
static fv_status_t take_lock(fv_listen_t *listen)
{
    for (;;) {
        int fd = open(listen->lock_path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (fd < 0) {
            return fv_fail(FV_ERR_UNAVAILABLE, "listen: %.120s: cannot open its lock file: %s",
                           listen->address, strerror(errno));
        }
        if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
            int error = errno;
            (void)close(fd);
            return fv_fail(FV_ERR_UNAVAILABLE, "listen: %.120s: %s", listen->address,
                           (error == EWOULDBLOCK) ? "another server listens there"
                                                  : strerror(error));
        }
        if (is_same_file(fd, listen->lock_path)) {
            listen->lock_fd = fd;
            return FV_OK;
        }
        (void)close(fd);
    }
}
/* NOLINTEND(concurrency-mt-unsafe) */

/* True when somebody accepts connections at `path`, lock or no lock. */
static bool is_answered(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    /* EAGAIN: it listens and its backlog is full */
    bool is_connected =
        (fd >= 0) && ((connect(fd, (const struct sockaddr *)&address, sizeof(address)) == 0) ||
                      (errno == EAGAIN));
    if (fd >= 0) {
        (void)close(fd);
    }
    return is_connected;
}

/* Lock held: what lies at the path is stale, unless a stranger serves it or it is no socket. */
static fv_status_t clear_path(const fv_listen_t *listen, const char *path)
{
    struct stat named;

    if (lstat(path, &named) != 0) {
        return FV_OK; /* nothing there; a missing directory shows at the bind */
    }
    if (!S_ISSOCK(named.st_mode)) {
        return fv_fail(FV_ERR_UNAVAILABLE, "listen: %.120s: a file that is no socket lies there",
                       listen->address);
    }
    if (is_answered(path)) {
        return fv_fail(FV_ERR_UNAVAILABLE, "listen: %.120s: another server listens there",
                       listen->address);
    }
    fv_info("removing the stale socket %s", path);
    (void)unlink(path);
    return FV_OK;
}

static fv_status_t prepare_unix(fv_listen_t *listen)
{
    const char *path = listen->address + strlen(UNIX_PREFIX);
    size_t n_chars = strlen(path);

    if (n_chars == 0U) {
        return bad_form(listen->address, "no path");
    }
    if (n_chars > UNIX_PATH_MAX) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "listen: given a unix path of %zu bytes, expected at most %u", n_chars,
                       UNIX_PATH_MAX);
    }
    (void)snprintf(listen->lock_path, sizeof(listen->lock_path), "%s.lock", path);
    FV_RETURN_IF_ERR(take_lock(listen));
    fv_status_t status = clear_path(listen, path);
    if (status != FV_OK) {
        fv_listen_release(listen);
    }
    return status;
}

fv_status_t fv_listen_prepare(const char *address, fv_listen_t *out)
{
    memset(out, 0, sizeof(*out));
    out->lock_fd = -1;
    if (strlen(address) >= sizeof(out->address) - 8U) { /* room for a port in place of 0 */
        return bad_form(address, "too long");
    }
    (void)snprintf(out->address, sizeof(out->address), "%s", address);
    out->is_unix = (strncmp(address, UNIX_PREFIX, strlen(UNIX_PREFIX)) == 0);
    return out->is_unix ? prepare_unix(out) : check_tcp(address);
}

bool fv_listen_is_local(const fv_listen_t *listen)
{
    static const char *const k_names[] = {"localhost:", "[::1]:"};
    struct in_addr ip;
    char host[FV_ADDRESS_BYTES];

    if (listen->is_unix) {
        return true;
    }
    for (size_t i = 0; i < sizeof(k_names) / sizeof(k_names[0]); i++) {
        if (strncasecmp(listen->address, k_names[i], strlen(k_names[i])) == 0) {
            return true;
        }
    }
    (void)snprintf(host, sizeof(host), "%s", listen->address);
    *strrchr(host, ':') = '\0'; /* checked: there is a colon */
    return (inet_pton(AF_INET, host, &ip) == 1) && ((ntohl(ip.s_addr) >> 24U) == 127U);
}

void fv_listen_set_port(fv_listen_t *listen, int port)
{
    char *colon = strrchr(listen->address, ':');

    if (!listen->is_unix) { /* checked: there is a colon, and room */
        (void)snprintf(colon + 1, sizeof(listen->address) - (size_t)(colon + 1 - listen->address),
                       "%d", port);
    }
}

void fv_listen_close(fv_listen_t *listen)
{
    for (int i = 0; i < listen->n_fds; i++) {
        (void)close(listen->fds[i]);
    }
    if (listen->is_unix && (listen->n_fds > 0)) {
        (void)unlink(listen->address + strlen(UNIX_PREFIX)); /* ours: the lock is still held */
    }
    listen->n_fds = 0;
}

void fv_listen_release(fv_listen_t *listen)
{
    fv_listen_close(listen);
    if (listen->lock_fd >= 0) { /* removed while held, so that nobody locks a file without a name */
        (void)unlink(listen->lock_path);
        (void)close(listen->lock_fd);
        listen->lock_fd = -1;
    }
}
