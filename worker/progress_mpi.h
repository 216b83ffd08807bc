/*
 * progress_mpi.h - what both MPI files of worker/ need: posting messages of any size, and waiting for them.
 *
 * Non-blocking calls only. Open MPI never reports a dead peer, it lets requests pend; so every wait has a
 * deadline and asks, while it waits, whether to give up. A request that was given up stays posted: its buffer may
 * still be read or written later and must never be freed or used again.
 */
#ifndef FV_WORKER_PROGRESS_MPI_H
#define FV_WORKER_PROGRESS_MPI_H

#include "common/status.h"

#include <mpi.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* When a wait ends without success. */
typedef struct fv_mpi_limits {
    uint32_t deadline_ms;
    bool (*is_aborted)(void *arg); /* NULL: never */
    void *arg;
} fv_mpi_limits_t;

/* The largest count given to MPI as it is; more bytes travel as one message of a derived type. Tests lower it. */
extern size_t fv_mpi_count_max;

/* FV_OK, or FV_ERR_MPI with the library's text for `rc`. */
FV_MUST_CHECK fv_status_t fv_mpi_check(int rc, const char *call);

/* One message of n_bytes. Errors: FV_ERR_MPI, nothing is posted then. */
FV_MUST_CHECK fv_status_t fv_mpi_post_recv(MPI_Comm comm,
                                           void *data,
                                           size_t n_bytes,
                                           uint32_t peer,
                                           int tag,
                                           MPI_Request *out);
FV_MUST_CHECK fv_status_t fv_mpi_post_send(MPI_Comm comm,
                                           const void *data,
                                           size_t n_bytes,
                                           uint32_t peer,
                                           int tag,
                                           MPI_Request *out);

/*
 * Waits for all: spins briefly, then yields, then naps.
 * Errors: FV_ERR_TIMED_OUT, FV_ERR_RANK_LOST (aborted), FV_ERR_MPI.
 */
FV_MUST_CHECK fv_status_t fv_mpi_wait_all(MPI_Request *requests,
                                          MPI_Status *statuses,
                                          size_t n,
                                          const fv_mpi_limits_t *limits);

/* FV_ERR_PROTOCOL unless the message received with `status` had n_bytes. */
FV_MUST_CHECK fv_status_t fv_mpi_check_bytes(const MPI_Status *status,
                                             size_t n_bytes,
                                             uint32_t peer);

#endif /* FV_WORKER_PROGRESS_MPI_H */
