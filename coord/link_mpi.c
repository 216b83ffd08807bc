/*
 * link_mpi.c - control sockets and MPI tensors to and from the other ranks. The coordinator's MPI door.
 */
#define _GNU_SOURCE /* POLLRDHUP */

#include "common/clock.h"
#include "common/fault.h"
#include "common/frame.h"
#include "common/log.h"
#include "coord/link.h"

#include <mpi.h>

#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define SPIN_US 200 /* busy-test this long, then give the core away between tests */
#define NAP_US  30

typedef struct fv_peer {
    int fd;
    atomic_uint silent_ms; /* declared silent after so long; 0 = not */
    bool is_unreachable;   /* its host, says the network */
    MPI_Request input[FV_STEP_DEPTH], output[FV_STEP_DEPTH]; /* by slot of the step */
} fv_peer_t;

struct fv_link {
    MPI_Comm comm;
    uint32_t n_ranks, epoch, deadline_ms;
    uint64_t next_seq;
    fv_peer_t *peers;     /* [n_ranks] */
    struct pollfd *watch; /* [n_ranks], fd -1 for the coordinator itself */
    void (*on_wait)(void *arg);
    void *on_wait_arg;
    /* scratch of one datatype */
    int *lengths;
    MPI_Aint *addresses;
    size_t n_blocks_cap;
};

fv_status_t fv_link_create(void *mpi_comm,
                           uint32_t n_ranks,
                           uint32_t epoch,
                           const int *fds,
                           uint32_t deadline_ms,
                           fv_link_t **out)
{
    fv_link_t *link = calloc(1, sizeof(*link));

    if (link == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "link");
    }
    link->peers = calloc(n_ranks, sizeof(*link->peers));
    link->watch = calloc(n_ranks, sizeof(*link->watch));
    if ((link->peers == NULL) || (link->watch == NULL)) {
        free(link->peers);
        free(link->watch);
        free(link);
        return fv_fail(FV_ERR_NO_MEMORY, "link of %u ranks", n_ranks);
    }
    link->comm = *(MPI_Comm *)mpi_comm;
    link->n_ranks = n_ranks;
    link->epoch = epoch;
    link->deadline_ms = deadline_ms;
    for (uint32_t r = 0; r < n_ranks; r++) {
        link->peers[r].fd = fds[r];
        for (uint32_t slot = 0; slot < FV_STEP_DEPTH; slot++) {
            link->peers[r].input[slot] = MPI_REQUEST_NULL;
            link->peers[r].output[slot] = MPI_REQUEST_NULL;
        }
        link->watch[r] = (struct pollfd){.fd = fds[r], .events = POLLRDHUP};
    }
    *out = link;
    return FV_OK;
}

void fv_link_destroy(fv_link_t *link)
{
    if (link == NULL) {
        return;
    }
    for (uint32_t r = 0; r < link->n_ranks; r++) {
        if (link->peers[r].fd >= 0) {
            (void)close(link->peers[r].fd);
        }
    }
    free(link->peers);
    free(link->watch);
    free(link->lengths);
    free(link->addresses);
    free(link);
}

/* ------------------------------------------------------------------ death */

size_t fv_link_pollfds(const fv_link_t *link, struct pollfd *out, size_t cap)
{
    size_t n = 0;

    for (uint32_t r = 0; (r < link->n_ranks) && (n < cap); r++) {
        if (link->peers[r].fd >= 0) {
            out[n++] = (struct pollfd){.fd = link->peers[r].fd, .events = POLLIN | POLLRDHUP};
        }
    }
    return n;
}

void fv_link_declare_silent(fv_link_t *link, uint32_t rank, uint32_t silent_ms)
{
    atomic_store(&link->peers[rank].silent_ms, (silent_ms == 0U) ? 1U : silent_ms);
    (void)shutdown(link->peers[rank].fd, SHUT_RDWR); /* wakes whoever polls it */
}

/* What TCP found out by itself is as good as missed heartbeats. */
static void note_network_error(fv_link_t *link, uint32_t rank)
{
    int error = 0;
    socklen_t n = sizeof(error);

    if ((getsockopt(link->peers[rank].fd, SOL_SOCKET, SO_ERROR, &error, &n) == 0) &&
        ((error == ETIMEDOUT) || (error == EHOSTUNREACH) || (error == ENETUNREACH))) {
        link->peers[rank].is_unreachable = true;
    }
}

bool fv_link_is_cut_off(const fv_link_t *link, uint32_t rank)
{
    const fv_peer_t *peer = &link->peers[rank];

    return peer->is_unreachable || (atomic_load(&peer->silent_ms) > 0U);
}

static fv_status_t rank_is_gone(const fv_link_t *link, uint32_t rank)
{
    uint32_t silent_ms = atomic_load(&link->peers[rank].silent_ms);

    if (silent_ms > 0U) {
        return fv_fail(FV_ERR_RANK_LOST, "rank %u is gone: not heard for %u ms, stopped or cut off",
                       rank, silent_ms);
    }
    return fv_fail(FV_ERR_RANK_LOST, "rank %u is gone: its control socket closed", rank);
}

fv_status_t fv_link_check(fv_link_t *link)
{
    if (poll(link->watch, link->n_ranks, 0) <= 0) {
        return FV_OK;
    }
    for (uint32_t r = 0; r < link->n_ranks; r++) {
        if ((link->watch[r].revents & (POLLHUP | POLLRDHUP | POLLERR)) != 0) {
            note_network_error(link, r);
            return rank_is_gone(link, r);
        }
    }
    return FV_OK;
}

bool fv_link_is_lost(const fv_link_t *link, uint32_t rank)
{
    struct pollfd p = {.fd = link->peers[rank].fd, .events = POLLRDHUP};

    return (p.fd >= 0) && (poll(&p, 1, 0) > 0) &&
           ((p.revents & (POLLHUP | POLLRDHUP | POLLERR)) != 0);
}

/* ------------------------------------------------------------------ another epoch */

void fv_link_begin_epoch(fv_link_t *link, uint32_t epoch)
{
    link->epoch = epoch;
    for (uint32_t r = 0; r < link->n_ranks; r++) {
        for (uint32_t slot = 0; slot < FV_STEP_DEPTH; slot++) { /* they stay posted, for ever */
            link->peers[r].input[slot] = MPI_REQUEST_NULL;
            link->peers[r].output[slot] = MPI_REQUEST_NULL;
        }
    }
}

void fv_link_replace(fv_link_t *link, uint32_t rank, int fd)
{
    fv_peer_t *peer = &link->peers[rank];

    if (peer->fd >= 0) {
        (void)close(peer->fd);
    }
    peer->fd = fd;
    peer->is_unreachable = false;
    atomic_store(&peer->silent_ms, 0U);
    link->watch[rank].fd = fd;
}

void fv_link_set_comm(fv_link_t *link, void *mpi_comm)
{
    link->comm = *(MPI_Comm *)mpi_comm;
}

/* ------------------------------------------------------------------ */

void fv_link_on_wait(fv_link_t *link, void (*on_wait)(void *arg), void *arg)
{
    link->on_wait = on_wait;
    link->on_wait_arg = arg;
}

bool fv_link_is_broken(void *link)
{
    fv_link_t *l = link;

    if (l->on_wait != NULL) {
        l->on_wait(l->on_wait_arg);
    }
    return fv_link_check(l) != FV_OK;
}

uint32_t fv_link_deadline_ms(const fv_link_t *link)
{
    return link->deadline_ms;
}

/* ------------------------------------------------------------------ control messages */

static fv_status_t send_message(fv_link_t *link,
                                uint32_t rank,
                                fv_ctl_type_t type,
                                const fv_frame_piece_t *body,
                                size_t n_body)
{
    fv_frame_piece_t pieces[4];
    size_t body_bytes = 0;

    FV_ASSERT(n_body <= 3U);
    for (size_t i = 0; i < n_body; i++) {
        pieces[i + 1U] = body[i];
        body_bytes += body[i].n_bytes;
    }
    fv_ctl_header_t header = {.magic = FV_CTL_MAGIC,
                              .type = (uint16_t)type,
                              .epoch = link->epoch,
                              .body_bytes = (uint32_t)body_bytes,
                              .seq = ++link->next_seq};
    pieces[0] = (fv_frame_piece_t){.data = &header, .n_bytes = sizeof(header)};
    fv_status_t status =
        fv_frame_send(link->peers[rank].fd, pieces, n_body + 1U, (int)link->deadline_ms);
    return (status == FV_ERR_RANK_LOST) ? rank_is_gone(link, rank) : status;
}

fv_status_t
fv_link_send(fv_link_t *link, uint32_t rank, fv_ctl_type_t type, const void *body, size_t n_bytes)
{
    fv_frame_piece_t piece = {.data = body, .n_bytes = n_bytes};

    return send_message(link, rank, type, &piece, 1);
}

/* Waits until `rank`'s socket has something to read, watching all the others for a death. */
static fv_status_t wait_readable(fv_link_t *link, uint32_t rank, int64_t deadline_us)
{
    for (;;) {
        link->watch[rank].events = POLLIN | POLLRDHUP;
        int n = poll(link->watch, link->n_ranks, 100);
        short got = link->watch[rank].revents;
        link->watch[rank].events = POLLRDHUP;
        if ((n > 0) && ((got & POLLIN) != 0)) {
            return FV_OK; /* also with a hang-up: what was sent before it is still there */
        }
        FV_RETURN_IF_ERR(fv_link_check(link));
        if (fv_clock_us() > deadline_us) {
            return fv_fail(FV_ERR_TIMED_OUT, "rank %u did not answer within %u ms", rank,
                           link->deadline_ms);
        }
    }
}

static fv_status_t read_from(fv_link_t *link, uint32_t rank, void *out, size_t n_bytes)
{
    fv_status_t status = fv_frame_read(link->peers[rank].fd, out, n_bytes, (int)link->deadline_ms);

    return (status == FV_ERR_RANK_LOST) ? rank_is_gone(link, rank) : status;
}

/* What rank `rank` says next, of this epoch; what it said in an older one is read and forgotten. */
static fv_status_t read_header(fv_link_t *link, uint32_t rank, fv_ctl_header_t *out)
{
    int64_t deadline_us = fv_clock_us() + (int64_t)link->deadline_ms * 1000;
    uint8_t old[1024];

    for (;;) {
        FV_RETURN_IF_ERR(wait_readable(link, rank, deadline_us));
        FV_RETURN_IF_ERR(read_from(link, rank, out, sizeof(*out)));
        if ((out->magic != FV_CTL_MAGIC) || (out->epoch >= link->epoch)) {
            return FV_OK;
        }
        for (size_t left = out->body_bytes; left > 0;) {
            size_t n = (left < sizeof(old)) ? left : sizeof(old);
            FV_RETURN_IF_ERR(read_from(link, rank, old, n));
            left -= n;
        }
    }
}

/* An answer of `type`: DONE's body, and what follows it. */
static fv_status_t read_answer(fv_link_t *link,
                               uint32_t rank,
                               fv_ctl_type_t type,
                               fv_ctl_done_t *out,
                               size_t *out_more)
{
    fv_ctl_header_t header;

    FV_RETURN_IF_ERR(read_header(link, rank, &header));
    if ((header.magic != FV_CTL_MAGIC) || (header.type != type) || (header.epoch != link->epoch) ||
        (header.body_bytes < sizeof(*out))) {
        return fv_fail(FV_ERR_PROTOCOL, "rank %u: message type %u of %u bytes, expected type %d",
                       rank, header.type, header.body_bytes, (int)type);
    }
    *out_more = header.body_bytes - sizeof(*out);
    FV_RETURN_IF_ERR(read_from(link, rank, out, sizeof(*out)));
    out->error.text[sizeof(out->error.text) - 1U] = '\0';
    return FV_OK;
}

static fv_status_t read_done(fv_link_t *link,
                             uint32_t rank,
                             fv_ctl_done_t *out,
                             fv_error_t *item_errors,
                             size_t n_items)
{
    size_t n_more = 0;

    FV_RETURN_IF_ERR(read_answer(link, rank, FV_CTL_DONE, out, &n_more));
    size_t n_errors = n_more / sizeof(fv_error_t);
    if ((n_errors != out->n_items) || ((n_errors != 0) && (n_errors != n_items))) {
        return fv_fail(FV_ERR_PROTOCOL, "rank %u: DONE with %zu item errors, expected 0 or %zu",
                       rank, n_errors, n_items);
    }
    if (n_errors > 0) {
        FV_RETURN_IF_ERR(read_from(link, rank, item_errors, n_errors * sizeof(fv_error_t)));
    }
    for (size_t i = 0; i < n_errors; i++) {
        item_errors[i].text[sizeof(item_errors[i].text) - 1U] = '\0';
    }
    return FV_OK;
}

fv_status_t fv_link_wait_kept(fv_link_t *link,
                              uint32_t rank,
                              fv_ctl_done_t *out,
                              uint64_t *floors,
                              size_t n_layers)
{
    size_t n_more = 0;
    size_t n_floors = n_layers * sizeof(*floors);

    FV_RETURN_IF_ERR(read_answer(link, rank, FV_CTL_KEPT, out, &n_more));
    if (n_more != ((out->error.status == FV_OK) ? n_floors : 0U)) {
        return fv_fail(FV_ERR_PROTOCOL, "rank %u: KEPT with %zu bytes of floors, expected %zu",
                       rank, n_more, n_floors);
    }
    return (n_more > 0) ? read_from(link, rank, floors, n_more) : FV_OK;
}

fv_status_t fv_link_wait_done(fv_link_t *link, uint32_t rank, fv_ctl_done_t *out)
{
    return read_done(link, rank, out, NULL, 0);
}

fv_status_t fv_link_wait_hello(fv_link_t *link, uint32_t rank, fv_ctl_hello_t *out)
{
    fv_ctl_header_t header;

    FV_RETURN_IF_ERR(read_header(link, rank, &header));
    if ((header.magic != FV_CTL_MAGIC) || (header.type != FV_CTL_HELLO) ||
        (header.epoch != link->epoch) || (header.body_bytes != sizeof(*out))) {
        return fv_fail(FV_ERR_PROTOCOL, "rank %u: message type %u of %u bytes, expected HELLO",
                       rank, header.type, header.body_bytes);
    }
    FV_RETURN_IF_ERR(read_from(link, rank, out, sizeof(*out)));
    out->host[sizeof(out->host) - 1U] = '\0';
    out->backend[sizeof(out->backend) - 1U] = '\0';
    out->device[sizeof(out->device) - 1U] = '\0';
    return FV_OK;
}

void fv_link_stop(fv_link_t *link, bool discards_stores)
{
    const fv_ctl_stop_t body = {.discards_store = discards_stores ? 1U : 0U};
    const fv_frame_piece_t piece = {.data = &body, .n_bytes = sizeof(body)};

    for (uint32_t r = 0; r < link->n_ranks; r++) {
        if ((link->peers[r].fd >= 0) && (send_message(link, r, FV_CTL_STOP, &piece, 1) != FV_OK)) {
            fv_warn("stop: %s", fv_error_context());
        }
    }
}

/* ------------------------------------------------------------------ tensors */

static fv_status_t mpi_error(const char *call, int rc)
{
    char text[MPI_MAX_ERROR_STRING] = "";
    int n = 0;

    (void)MPI_Error_string(rc, text, &n);
    return fv_fail(FV_ERR_MPI, "%s: %s", call, text);
}

static fv_status_t reserve_blocks(fv_link_t *link, size_t n_blocks)
{
    if (n_blocks <= link->n_blocks_cap) {
        return FV_OK;
    }
    size_t cap = (link->n_blocks_cap == 0) ? 64U : link->n_blocks_cap;
    while (cap < n_blocks) {
        cap *= 2U;
    }
    int *lengths = realloc(link->lengths, cap * sizeof(*lengths));
    if (lengths != NULL) {
        link->lengths = lengths;
    }
    MPI_Aint *addresses = realloc(link->addresses, cap * sizeof(*addresses));
    if (addresses != NULL) {
        link->addresses = addresses;
    }
    if ((lengths == NULL) || (addresses == NULL)) {
        return fv_fail(FV_ERR_NO_MEMORY, "link: %zu blocks", cap);
    }
    link->n_blocks_cap = cap;
    return FV_OK;
}

/*
 * A datatype over absolute addresses: MPI gathers or scatters straight from the segments. Building it costs
 * Open MPI an allocation and 1-2 us, against a copy of every tensor byte.
 */
static fv_status_t
make_type(fv_link_t *link, const fv_segment_t *segments, size_t n_segments, MPI_Datatype *out)
{
    FV_RETURN_IF_ERR(reserve_blocks(link, n_segments));
    for (size_t i = 0; i < n_segments; i++) {
        if (segments[i].n_bytes > INT_MAX) {
            return fv_fail(FV_ERR_INVALID_ARG, "link: a segment of %zu bytes, at most %d",
                           segments[i].n_bytes, INT_MAX);
        }
        link->lengths[i] = (int)segments[i].n_bytes;
        (void)MPI_Get_address(segments[i].data, &link->addresses[i]);
    }
    int rc =
        MPI_Type_create_hindexed((int)n_segments, link->lengths, link->addresses, MPI_BYTE, out);
    if (rc == MPI_SUCCESS) {
        rc = MPI_Type_commit(out);
    }
    return (rc == MPI_SUCCESS) ? FV_OK : mpi_error("MPI_Type_create_hindexed", rc);
}

fv_status_t
fv_link_step_begin(fv_link_t *link, uint32_t slot, uint32_t rank, const fv_link_step_t *step)
{
    fv_peer_t *peer = &link->peers[rank];
    MPI_Datatype type = MPI_DATATYPE_NULL;
    fv_frame_piece_t body[2] = {
        {.data = &step->head, .n_bytes = sizeof(step->head)},
        {.data = step->items, .n_bytes = (size_t)step->head.n_items * sizeof(*step->items)},
    };

    if (step->head.out_bytes > 0) { /* posted first, so that the answer finds its place */
        FV_RETURN_IF_ERR(make_type(link, step->outputs, step->n_outputs, &type));
        int rc = MPI_Irecv(MPI_BOTTOM, 1, type, (int)rank, FV_TAG_OUTPUT, link->comm,
                           &peer->output[slot]);
        (void)MPI_Type_free(&type);
        if (rc != MPI_SUCCESS) {
            return mpi_error("MPI_Irecv", rc);
        }
    }
    FV_RETURN_IF_ERR(send_message(link, rank, FV_CTL_STEP, body, 2)); /* the doorbell */
    fv_fault_point(5);
    if (step->head.in_bytes > 0) {
        FV_RETURN_IF_ERR(make_type(link, step->inputs, step->n_inputs, &type));
        int rc =
            MPI_Isend(MPI_BOTTOM, 1, type, (int)rank, FV_TAG_INPUT, link->comm, &peer->input[slot]);
        (void)MPI_Type_free(&type);
        if (rc != MPI_SUCCESS) {
            return mpi_error("MPI_Isend", rc);
        }
    }
    return FV_OK;
}

static fv_status_t test(MPI_Request *request, const char *what, bool *out_is_done)
{
    int is_done = 1;

    if (*request != MPI_REQUEST_NULL) {
        int rc = MPI_Test(request, &is_done, MPI_STATUS_IGNORE);
        if (rc != MPI_SUCCESS) {
            return mpi_error(what, rc);
        }
    }
    *out_is_done = is_done != 0;
    return FV_OK;
}

/* Completes one request; while it waits, watches the sockets and gives the core away. */
static fv_status_t complete(fv_link_t *link, MPI_Request *request, const char *what, uint32_t rank)
{
    int64_t begin_us = fv_clock_us();
    bool is_done = false;

    for (;;) {
        FV_RETURN_IF_ERR(test(request, what, &is_done));
        if (is_done) {
            return FV_OK;
        }
        int64_t waited_us = fv_clock_us() - begin_us;
        if (waited_us < SPIN_US) {
            (void)sched_yield();
            continue;
        }
        FV_RETURN_IF_ERR(fv_link_check(link));
        if (waited_us > (int64_t)link->deadline_ms * 1000) {
            return fv_fail(FV_ERR_TIMED_OUT, "%s: rank %u made no progress within %u ms", what,
                           rank, link->deadline_ms);
        }
        (void)nanosleep(&(struct timespec){.tv_nsec = NAP_US * 1000}, NULL);
    }
}

fv_status_t fv_link_step_flush(fv_link_t *link, uint32_t slot)
{
    for (uint32_t r = 0; r < link->n_ranks; r++) {
        FV_RETURN_IF_ERR(complete(link, &link->peers[r].input[slot], "tensors to a rank", r));
    }
    return FV_OK;
}

fv_status_t fv_link_step_push(fv_link_t *link, uint32_t slot)
{
    bool is_done = false;

    for (uint32_t r = 0; r < link->n_ranks; r++) {
        FV_RETURN_IF_ERR(test(&link->peers[r].input[slot], "tensors to a rank", &is_done));
    }
    return FV_OK;
}

fv_status_t fv_link_step_test(fv_link_t *link,
                              uint32_t slot,
                              uint32_t rank,
                              bool *out_is_done,
                              fv_ctl_done_t *out,
                              fv_error_t *item_errors,
                              size_t n_items)
{
    fv_peer_t *peer = &link->peers[rank];
    struct pollfd p = {.fd = peer->fd, .events = POLLIN};

    FV_RETURN_IF_ERR(test(&peer->output[slot], "results of a rank", out_is_done));
    if (!*out_is_done) {
        return FV_OK;
    }
    *out_is_done = (poll(&p, 1, 0) > 0) && ((p.revents & POLLIN) != 0);
    if (!*out_is_done) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(read_done(link, rank, out, item_errors, n_items));
    if ((out->error.status != FV_OK) &&
        (out->n_items == 0)) { /* not an item's failure: the whole step's */
        return fv_fail((fv_status_t)out->error.status, "rank %u failed a step: %s", rank,
                       out->error.text);
    }
    /* An input that the rank has taken is as good as sent; the request may need one more look. */
    return complete(link, &peer->input[slot], "tensors to a rank", rank);
}
