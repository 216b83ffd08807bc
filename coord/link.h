/*
 * link.h - the coordinator's side of the other ranks: control sockets, and tensors over MPI.
 *
 * Decode path: station 5 of 10 (out) and 9 (back). Before: coord/dispatch.c. After: worker/inbox_mpi.c.
 *
 * Control messages go over one socket per rank (proto/control.h); tensors go by MPI, gathered from and
 * scattered to where they lie by MPI datatypes, without a copy of ours. MPI is entered only while a step is
 * under way; while waiting, every rank's socket is watched, so that a death is noticed at once whoever is awaited.
 *
 * Thread: engine. Errors: FV_ERR_RANK_LOST naming the rank, FV_ERR_TIMED_OUT, FV_ERR_PROTOCOL, FV_ERR_MPI; after any of
 * them the link is unusable until it is taken to another epoch (fv_link_begin_epoch()), or the service must end.
 */
#ifndef FV_COORD_LINK_H
#define FV_COORD_LINK_H

#include "common/status.h"
#include "proto/control.h"

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct fv_link fv_link_t;

/* A piece of a rank's packed input or output, where it lies in the coordinator's memory. */
typedef struct fv_segment {
    void *data; /* inputs are only read */
    size_t n_bytes;
} fv_segment_t;

/*
 * `fds[r]` is the connected control socket of rank r, -1 for the coordinator itself; the link takes
 * them. `mpi_comm` points to the epoch's MPI_Comm.
 */
FV_MUST_CHECK fv_status_t fv_link_create(void *mpi_comm,
                                         uint32_t n_ranks,
                                         uint32_t epoch,
                                         const int *fds,
                                         uint32_t deadline_ms,
                                         fv_link_t **out);
void fv_link_destroy(fv_link_t *link); /* closes the sockets */

/* Sends one command; its DONE is read by fv_link_wait_done(), in order of sending. */
FV_MUST_CHECK fv_status_t
fv_link_send(fv_link_t *link, uint32_t rank, fv_ctl_type_t type, const void *body, size_t n_bytes);
FV_MUST_CHECK fv_status_t fv_link_wait_done(fv_link_t *link, uint32_t rank, fv_ctl_done_t *out);

/* The answer to a KEEP: floors[n_layers] are filled unless it is a refusal. */
FV_MUST_CHECK fv_status_t fv_link_wait_kept(fv_link_t *link,
                                            uint32_t rank,
                                            fv_ctl_done_t *out,
                                            uint64_t *floors,
                                            size_t n_layers);

/* What a rank is told of a step, and where its tensors lie. */
typedef struct fv_link_step {
    fv_ctl_step_t head;
    const fv_ctl_item_t *items;
    const fv_segment_t *inputs, *outputs;
    size_t n_inputs, n_outputs;
} fv_link_step_t;

/*
 * Begins a step on `rank`: the control message leaves, the tensors are on their way. Borrows everything it points to until
 * fv_link_step_test() has seen the end. slot: below FV_STEP_DEPTH; two steps may be under way on a rank, in two slots.
 */
FV_MUST_CHECK fv_status_t fv_link_step_begin(fv_link_t *link,
                                             uint32_t slot,
                                             uint32_t rank,
                                             const fv_link_step_t *step);
/* Waits until all inputs of a step have left, so that the coordinator's own share can begin without starving MPI. */
FV_MUST_CHECK fv_status_t fv_link_step_flush(fv_link_t *link, uint32_t slot);
/* Moves them along and never waits. */
FV_MUST_CHECK fv_status_t fv_link_step_push(fv_link_t *link, uint32_t slot);
/*
 * Looks whether the rank's outputs and its DONE are here; never waits. Of two steps on a rank, the older one must be seen to
 * end first. item_errors: one per item of the rank; filled where the rank says so.
 */
FV_MUST_CHECK fv_status_t fv_link_step_test(fv_link_t *link,
                                            uint32_t slot,
                                            uint32_t rank,
                                            bool *out_is_done,
                                            fv_ctl_done_t *out,
                                            fv_error_t *item_errors,
                                            size_t n_items);
/* How long a rank may take. */
uint32_t fv_link_deadline_ms(const fv_link_t *link);

/* For the engine's poll() while idle: fills one entry per rank, returns how many. */
size_t fv_link_pollfds(const fv_link_t *link, struct pollfd *out, size_t cap);
/* Looks at every socket without waiting: FV_ERR_RANK_LOST when one has closed. */
FV_MUST_CHECK fv_status_t fv_link_check(fv_link_t *link);
/*
 * Rank `rank` has not been heard for silent_ms: it is lost, whatever its socket says. Whoever waits finds the socket closed.
 * Thread: any; not beside fv_link_destroy().
 */
void fv_link_declare_silent(fv_link_t *link, uint32_t rank, uint32_t silent_ms);
/* True of a rank that is lost, and whose process may live: it was not heard, or its host can not be reached. */
bool fv_link_is_cut_off(const fv_link_t *link, uint32_t rank);
bool fv_link_is_lost(const fv_link_t *link, uint32_t rank);
/*
 * Another epoch: what is under way is given up, and memory that messages of it may still reach must stay as it is. Messages of
 * older epochs that still come are dropped.
 *   begin_epoch   the control sockets speak for the new epoch
 *   replace       `fd` is rank `rank`'s from now on; taken. The old one is closed.
 *   wait_hello    a rank is in the new epoch
 *   set_comm      tensors go over the new MPI_Comm
 */
void fv_link_begin_epoch(fv_link_t *link, uint32_t epoch);
void fv_link_replace(fv_link_t *link, uint32_t rank, int fd);
FV_MUST_CHECK fv_status_t fv_link_wait_hello(fv_link_t *link, uint32_t rank, fv_ctl_hello_t *out);
void fv_link_set_comm(fv_link_t *link, void *mpi_comm);
/* The same as a predicate for the exchange's waits; `link` is a fv_link_t. */
bool fv_link_is_broken(void *link);
/* Called by fv_link_is_broken(), that is, while the coordinator's own rank waits for its device or for partial states. */
void fv_link_on_wait(fv_link_t *link, void (*on_wait)(void *arg), void *arg);
/* Tells every rank to leave; and to take its store's files away. */
void fv_link_stop(fv_link_t *link, bool discards_stores);

#endif /* FV_COORD_LINK_H */
