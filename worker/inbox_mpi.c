/*
 * inbox_mpi.c - the service loop of a rank other than the coordinator's.
 *
 * Decode path: station 6 of 10. Before: coord/link_mpi.c. After: worker/step_packed.c.
 *
 * The rank sleeps in poll() on its control socket; a message is the doorbell. MPI is entered only while a step is under
 * way: the packed input comes in, the step runs, the packed output goes out, then DONE on the socket.
 */
#include "common/frame.h"
#include "common/log.h"
#include "worker/internal.h"
#include "worker/progress_mpi.h"

#include <errno.h>
#include <poll.h>
#include <string.h>

typedef struct inbox {
    fv_worker_t *worker;
    int fd;
    uint32_t epoch;
    MPI_Comm comm;
    fv_ctl_header_t header; /* of the message under way */
    fv_array_t body;
    fv_array_t item_errors; /* fv_error_t */
} inbox_t;

static bool is_coordinator_gone(void *arg)
{
    return fv_frame_is_closed(((const inbox_t *)arg)->fd);
}

/* ------------------------------------------------------------------ answers */

static fv_status_t
answer(const inbox_t *in, fv_ctl_type_t type, const fv_frame_piece_t *body, size_t n_body)
{
    fv_ctl_header_t header = {
        .magic = FV_CTL_MAGIC, .type = (uint16_t)type, .epoch = in->epoch, .seq = in->header.seq};
    fv_frame_piece_t pieces[3] = {{.data = &header, .n_bytes = sizeof(header)}};

    for (size_t i = 0; i < n_body; i++) {
        pieces[i + 1U] = body[i];
        header.body_bytes += (uint32_t)body[i].n_bytes;
    }
    return fv_frame_send(in->fd, pieces, n_body + 1U, (int)in->worker->config.step_deadline_ms);
}

static fv_status_t answer_done(const inbox_t *in, const fv_ctl_done_t *done)
{
    fv_frame_piece_t body[2] = {
        {.data = done, .n_bytes = sizeof(*done)},
        {.data = in->item_errors.data, .n_bytes = done->n_items * sizeof(fv_error_t)}};

    return answer(in, FV_CTL_DONE, body, (done->n_items > 0U) ? 2U : 1U);
}

/* DONE with the outcome of a message; a refusal is an answer, not the end of the loop. */
static fv_status_t answer_status(const inbox_t *in, fv_status_t status)
{
    fv_ctl_done_t done = {.error = fv_error_capture(status)};

    fv_worker_memory(in->worker, &done.memory);
    return answer_done(in, &done);
}

/* ------------------------------------------------------------------ steps */

static fv_status_t transfer(inbox_t *in, MPI_Request *request, size_t n_bytes, bool is_recv)
{
    fv_mpi_limits_t limits = {.deadline_ms = in->worker->config.step_deadline_ms,
                              .is_aborted = is_coordinator_gone,
                              .arg = in};
    MPI_Status status;

    FV_RETURN_IF_ERR(fv_mpi_wait_all(request, &status, 1, &limits));
    return is_recv ? fv_mpi_check_bytes(&status, n_bytes, 0) : FV_OK;
}

/* The sizes come from the coordinator's word and are checked against the shares before memory is spent on them. */
static fv_status_t parse_step(inbox_t *in, fv_ctl_step_t *step, const fv_ctl_item_t **out_items)
{
    const uint8_t *body = in->body.data;
    size_t in_bytes = 0;
    size_t out_bytes = 0;

    if (in->header.body_bytes < sizeof(*step)) {
        return fv_fail(FV_ERR_PROTOCOL, "STEP: given %u bytes, expected at least %zu",
                       in->header.body_bytes, sizeof(*step));
    }
    memcpy(step, body, sizeof(*step));
    if ((step->n_items > FV_STEP_ITEMS_MAX) ||
        (in->header.body_bytes != sizeof(*step) + step->n_items * sizeof(fv_ctl_item_t))) {
        return fv_fail(FV_ERR_PROTOCOL, "STEP: given %u bytes for %u items (at most %d)",
                       in->header.body_bytes, step->n_items, FV_STEP_ITEMS_MAX);
    }
    *out_items = (const fv_ctl_item_t *)(const void *)(body + sizeof(*step));
    FV_RETURN_IF_ERR(
        fv_worker_packed_bytes(in->worker, *out_items, step->n_items, &in_bytes, &out_bytes));
    if ((in_bytes != step->in_bytes) || (out_bytes != step->out_bytes)) {
        return fv_fail(FV_ERR_PROTOCOL,
                       "STEP: given %llu bytes in and %llu out, expected %zu and %zu",
                       (unsigned long long)step->in_bytes, (unsigned long long)step->out_bytes,
                       in_bytes, out_bytes);
    }
    return fv_array_reserve(&in->item_errors, step->n_items, sizeof(fv_error_t));
}

static fv_status_t run_step(inbox_t *in, fv_ctl_done_t *done)
{
    fv_worker_t *worker = in->worker;
    const fv_backend_ops_t *ops = worker->config.backend;
    const fv_ctl_item_t *items = NULL;
    MPI_Request request = MPI_REQUEST_NULL;
    fv_ctl_step_t step;

    FV_RETURN_IF_ERR(fv_worker_usable(worker));
    FV_RETURN_IF_ERR(parse_step(in, &step, &items));
    FV_RETURN_IF_ERR(fv_host_buffer_reserve(&worker->in, ops, worker->backend, step.in_bytes));
    FV_RETURN_IF_ERR(fv_host_buffer_reserve(&worker->out, ops, worker->backend, step.out_bytes));
    if (step.in_bytes > 0U) {
        FV_RETURN_IF_ERR(
            fv_mpi_post_recv(in->comm, worker->in.data, step.in_bytes, 0, FV_TAG_INPUT, &request));
        fv_status_t status = transfer(in, &request, step.in_bytes, true);
        if (status != FV_OK) {
            return fv_worker_break(worker, status);
        }
    }
    FV_RETURN_IF_ERR(fv_worker_step_packed(worker, &step, items, worker->in.data, worker->out.data,
                                           done, in->item_errors.data));
    if (step.out_bytes > 0U) {
        FV_RETURN_IF_ERR(fv_mpi_post_send(in->comm, worker->out.data, step.out_bytes, 0,
                                          FV_TAG_OUTPUT, &request));
        fv_status_t status = transfer(in, &request, step.out_bytes, false);
        if (status != FV_OK) {
            return fv_worker_break(worker, status);
        }
    }
    return FV_OK;
}

/* A step that fails as a whole ends the loop: what was sent for it over MPI is in an unknown state. */
static fv_status_t handle_step(inbox_t *in)
{
    fv_ctl_done_t done = {0};
    fv_status_t status = run_step(in, &done);

    if (status == FV_OK) {
        return answer_done(in, &done);
    }
    fv_error_t error = fv_error_capture(status);
    (void)answer_status(in, status); /* the peer may be the reason */
    return fv_fail(status, "%s", error.text);
}

/* ------------------------------------------------------------------ messages */

/* The body as a struct of its type, or NULL when its size is another. */
#define BODY_AS(in, type) \
    (((in)->header.body_bytes == sizeof(type)) ? (const type *)(in)->body.data : NULL)

static fv_status_t bad_body(const inbox_t *in)
{
    return fv_fail(FV_ERR_PROTOCOL, "message type %u with a body of %u bytes", in->header.type,
                   in->header.body_bytes);
}

static fv_status_t run_control(inbox_t *in)
{
    fv_worker_t *w = in->worker;

    switch (in->header.type) {
    case FV_CTL_MODEL: {
        const fv_ctl_model_t *m = BODY_AS(in, fv_ctl_model_t);
        return (m == NULL) ? bad_body(in) : fv_worker_model(w, m);
    }
    case FV_CTL_OPEN: {
        const fv_ctl_open_t *m = BODY_AS(in, fv_ctl_open_t);
        return (m == NULL) ? bad_body(in) : fv_worker_open(w, m);
    }
    case FV_CTL_FORK: {
        const fv_ctl_fork_t *m = BODY_AS(in, fv_ctl_fork_t);
        return (m == NULL) ? bad_body(in) : fv_worker_fork(w, m);
    }
    case FV_CTL_TRUNCATE: {
        const fv_ctl_truncate_t *m = BODY_AS(in, fv_ctl_truncate_t);
        return (m == NULL) ? bad_body(in) : fv_worker_truncate(w, m);
    }
    case FV_CTL_CLOSE: {
        const fv_ctl_close_t *m = BODY_AS(in, fv_ctl_close_t);
        return (m == NULL) ? bad_body(in) : fv_worker_close(w, m);
    }
    default:
        return fv_fail(FV_ERR_PROTOCOL, "message type %u is not for a worker", in->header.type);
    }
}

static fv_status_t handle_message(inbox_t *in)
{
    if (in->header.epoch != in->epoch) {
        return answer_status(in, fv_fail(FV_ERR_PROTOCOL, "epoch given %u, expected %u",
                                         in->header.epoch, in->epoch));
    }
    if (in->header.type == FV_CTL_STEP) {
        return handle_step(in);
    }
    if (in->header.type == FV_CTL_PING) {
        fv_ctl_memory_t memory;
        fv_frame_piece_t body = {.data = &memory, .n_bytes = sizeof(memory)};

        fv_worker_memory(in->worker, &memory);
        return answer(in, FV_CTL_PONG, &body, 1);
    }
    return answer_status(in, run_control(in));
}

static fv_status_t read_message(inbox_t *in)
{
    int timeout_ms = (int)in->worker->config.step_deadline_ms;

    FV_RETURN_IF_ERR(fv_frame_read(in->fd, &in->header, sizeof(in->header), timeout_ms));
    if ((in->header.magic != FV_CTL_MAGIC) || (in->header.body_bytes > FV_CTL_BODY_MAX)) {
        return fv_fail(FV_ERR_PROTOCOL, "control message: magic %08x, body of %u bytes",
                       in->header.magic, in->header.body_bytes);
    }
    FV_RETURN_IF_ERR(fv_array_reserve(&in->body, in->header.body_bytes, 1));
    return fv_frame_read(in->fd, in->body.data, in->header.body_bytes, timeout_ms);
}

/* Sleeps until the socket has something to say, as long as that takes. */
static fv_status_t wait_for_doorbell(const inbox_t *in)
{
    struct pollfd p = {.fd = in->fd, .events = POLLIN};

    while (poll(&p, 1, -1) < 0) {
        if (errno != EINTR) {
            return fv_fail(FV_ERR_SYSTEM, "poll on the control socket: errno %d", errno);
        }
    }
    return FV_OK;
}

static fv_status_t serve(inbox_t *in)
{
    for (;;) {
        FV_RETURN_IF_ERR(wait_for_doorbell(in));
        FV_RETURN_IF_ERR(read_message(in));
        if ((in->header.type == FV_CTL_STOP) && (in->header.epoch == in->epoch)) {
            return FV_OK;
        }
        FV_RETURN_IF_ERR(handle_message(in));
    }
}

fv_status_t fv_worker_serve(fv_worker_t *worker, int control_fd, uint32_t epoch, void *mpi_comm)
{
    inbox_t in = {
        .worker = worker, .fd = control_fd, .epoch = epoch, .comm = *(MPI_Comm *)mpi_comm};
    const fv_exchange_ops_t *exchange = worker->config.exchange;
    bool is_polled = (exchange != NULL) && (exchange->on_poll != NULL);

    FV_RETURN_IF_ERR(fv_mpi_check(MPI_Comm_set_errhandler(in.comm, MPI_ERRORS_RETURN),
                                  "MPI_Comm_set_errhandler"));
    if (is_polled) { /* an exchange must not outlive the coordinator either */
        exchange->on_poll(worker->config.exchange_ctx, is_coordinator_gone, &in);
    }
    fv_status_t status = serve(&in);
    if (is_polled) {
        exchange->on_poll(worker->config.exchange_ctx, NULL, NULL);
    }
    fv_array_free(&in.body);
    fv_array_free(&in.item_errors);
    return status;
}
