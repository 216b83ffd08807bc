/*
 * bootstrap.h - how ranks find each other at start: who is where over MPI, then a control socket and one for beats each.
 *
 * Ranks of one host meet on an abstract unix socket, ranks of several on TCP. Rank 0 listens and hands address and a
 * per-job secret out over MPI; a connection that does not prove to have the secret (coord/meet.h) is dropped.
 *
 * Thread: main, at start; the only place with blocking MPI calls.
 */
#ifndef FV_COORD_BOOTSTRAP_H
#define FV_COORD_BOOTSTRAP_H

#include "common/secret.h"
#include "common/status.h"
#include "proto/control.h"

#include <sys/socket.h>

/* What rank 0 tells the others over MPI: where it listens, and the secret. Plain data, sent as bytes; wiped after use. */
typedef struct fv_meeting {
    struct sockaddr_storage address;
    uint32_t address_bytes;
    uint8_t secret[FV_SECRET_BYTES];
    int32_t is_ok;
} fv_meeting_t;

/*
 * On every rank of `mpi_comm` (a MPI_Comm *). `hello` is this rank's own, complete but for proof and host, which
 * are filled in. control_address: "auto", "unix:/path", or "host:port" (port 0 = any) on which rank 0 listens.
 * Rank 0: out_fds[r] is the control socket of rank r (-1 for itself), out_beat_fds[r] that of its heartbeat,
 * out_hellos[r] its introduction.
 * Others: out_fds[0] and out_beat_fds[0] are the sockets to rank 0, all others -1; out_hellos is not used.
 * Errors: FV_ERR_TIMED_OUT naming who did not come; FV_ERR_SYSTEM; FV_ERR_MPI.
 */
FV_MUST_CHECK fv_status_t fv_bootstrap(void *mpi_comm,
                                       const char *control_address,
                                       uint32_t epoch,
                                       fv_ctl_hello_t *hello,
                                       int *out_fds,
                                       int *out_beat_fds,
                                       fv_ctl_hello_t *out_hellos);

/*
 * Later, for a rank that joins a job under way. Rank 0 opens, hands `meeting` over by MPI, and accepts; listen_fd is closed by
 * fv_bootstrap_accept(), or by the caller. fds, beat_fds: [n_ranks], -1 for whoever is awaited, anything else for the others.
 * Errors: as above.
 */
FV_MUST_CHECK fv_status_t fv_bootstrap_open(bool is_one_host,
                                            const char *control_address,
                                            fv_meeting_t *meeting,
                                            int *listen_fd);
FV_MUST_CHECK fv_status_t fv_bootstrap_accept(const fv_meeting_t *meeting,
                                              int listen_fd,
                                              const char *control_address,
                                              uint32_t epoch,
                                              uint32_t n_ranks,
                                              int *fds,
                                              int *beat_fds,
                                              fv_ctl_hello_t *hellos);
/* The rank that joins. */
FV_MUST_CHECK fv_status_t fv_bootstrap_enter(const fv_meeting_t *meeting,
                                             uint32_t epoch,
                                             fv_ctl_hello_t *hello,
                                             int *out_fd,
                                             int *out_beat_fd);

#endif /* FV_COORD_BOOTSTRAP_H */
