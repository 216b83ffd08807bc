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

#include "common/status.h"
#include "proto/control.h"

/*
 * On every rank of `mpi_comm` (a MPI_Comm *). `hello` is this rank's own, complete but for proof and host, which
 * are filled in. control_address: "auto", "unix:/path", or "host:port" (port 0 = any) on which rank 0 listens.
 * Rank 0: out_fds[r] is the control socket of rank r (-1 for itself), out_beat_fds[r] that of its heartbeat,
 * out_hellos[r] its introduction.
 * Others: out_fds[0] and out_beat_fds[0] are the sockets to rank 0; out_hellos is not used.
 * Errors: FV_ERR_TIMED_OUT naming who did not come; FV_ERR_SYSTEM; FV_ERR_MPI.
 */
FV_MUST_CHECK fv_status_t fv_bootstrap(void *mpi_comm,
                                       const char *control_address,
                                       uint32_t epoch,
                                       fv_ctl_hello_t *hello,
                                       int *out_fds,
                                       int *out_beat_fds,
                                       fv_ctl_hello_t *out_hellos);

#endif /* FV_COORD_BOOTSTRAP_H */
