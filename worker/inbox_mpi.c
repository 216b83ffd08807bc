/*
 * inbox_mpi.c - the service loop of a rank other than the coordinator's.
 *
 * Decode path: station 6 of 10. Before: coord/link_mpi.c. After: worker/step_packed.c.
 *
 * The rank sleeps in poll() on its control socket; a message is the doorbell. MPI is entered only while a step is under
 * way: the packed input comes in, the step runs, the packed output goes out, then DONE on the socket.
 *
 * Whenever a step waits (for its device, for partial states, for MPI), the next message is read, and if it is a STEP its
 * input begins to come in, into buffers of its own: FV_STEP_DEPTH of everything, by turns. A device that needs no help from
 * this thread begins the next step while the output of the last one still leaves.
 */
#include "common/fault.h"
#include "common/frame.h"
#include "common/log.h"
#include "worker/internal.h"
#include "worker/progress_mpi.h"

#include <errno.h>
#include <poll.h>
#include <string.h>

#define LOOKS_MAX 1000U /* then a nap between two looks at an output that leaves */

/* A message, and of a STEP what travels for it. */
typedef struct arrival {
    bool is_here; /* read, not yet handled */
    fv_ctl_header_t header;
    fv_array_t body;
    fv_array_t item_errors; /* fv_error_t */
    fv_error_t error;       /* of a STEP that can not be run */
    fv_ctl_step_t step;
    const fv_ctl_item_t *items; /* in body */
    bool is_input_here;
    MPI_Request input, output;
    fv_host_buffer_t *in, *out; /* the worker's */
} arrival_t;

typedef struct inbox {
    fv_worker_t *worker;
    int fd;
    uint32_t epoch;
    MPI_Comm comm;
    arrival_t arrivals[FV_STEP_DEPTH];
    arrival_t *now, *next; /* the message under way, and the one that may come meanwhile */
    arrival_t urgent; /* what came behind the next message: nothing but the end of the epoch does */
    bool is_superseded; /* the coordinator has begun another epoch */
    fv_ctl_epoch_t *out_next;
    bool is_looking;
    fv_error_t look_error; /* the next message could not be read */
} inbox_t;

static void look_ahead(inbox_t *in);

/* Asked while a step waits. */
static bool is_coordinator_gone(void *arg)
{
    inbox_t *in = arg;

    look_ahead(in);
    return in->is_superseded || (in->look_error.status != FV_OK) || fv_frame_is_closed(in->fd);
}

/* ------------------------------------------------------------------ answers */

static fv_status_t
answer(const inbox_t *in, fv_ctl_type_t type, const fv_frame_piece_t *body, size_t n_body)
{
    fv_ctl_header_t header = {.magic = FV_CTL_MAGIC,
                              .type = (uint16_t)type,
                              .epoch = in->epoch,
                              .seq = in->now->header.seq};
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
        {.data = in->now->item_errors.data, .n_bytes = done->n_items * sizeof(fv_error_t)}};

    return answer(in, FV_CTL_DONE, body, (done->n_items > 0U) ? 2U : 1U);
}

/* DONE with the outcome of a message; a refusal is an answer, not the end of the loop. */
static fv_status_t answer_status(const inbox_t *in, fv_status_t status)
{
    fv_ctl_done_t done = {.error = fv_error_capture(status)};

    fv_worker_memory(in->worker, &done.memory);
    return answer_done(in, &done);
}

/* ------------------------------------------------------------------ tensors */

static fv_status_t wait_for(inbox_t *in, MPI_Request *request, MPI_Status *out)
{
    fv_mpi_limits_t limits = {.deadline_ms = in->worker->config.step_deadline_ms,
                              .is_aborted = is_coordinator_gone,
                              .arg = in};
    fv_status_t status = fv_mpi_wait_all(request, out, 1, &limits);

    return (status == FV_OK) ? FV_OK : fv_worker_break(in->worker, status);
}

static fv_status_t note_input(arrival_t *a, const MPI_Status *status)
{
    a->is_input_here = true;
    return fv_mpi_check_bytes(status, a->step.in_bytes, 0);
}

static fv_status_t await_input(inbox_t *in, arrival_t *a)
{
    MPI_Status status;

    if (a->is_input_here) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(wait_for(in, &a->input, &status));
    return note_input(a, &status);
}

static fv_status_t await_output(inbox_t *in, arrival_t *a)
{
    MPI_Status status;

    return (a->output == MPI_REQUEST_NULL) ? FV_OK : wait_for(in, &a->output, &status);
}

/* ------------------------------------------------------------------ steps */

/* The sizes come from the coordinator's word and are checked against the shares before memory is spent on them. */
static fv_status_t parse_step(inbox_t *in, arrival_t *a)
{
    const uint8_t *body = a->body.data;
    fv_ctl_step_t *step = &a->step;
    size_t in_bytes = 0;
    size_t out_bytes = 0;

    if (a->header.body_bytes < sizeof(*step)) {
        return fv_fail(FV_ERR_PROTOCOL, "STEP: given %u bytes, expected at least %zu",
                       a->header.body_bytes, sizeof(*step));
    }
    memcpy(step, body, sizeof(*step));
    if ((step->n_items > FV_STEP_ITEMS_MAX) ||
        (a->header.body_bytes != sizeof(*step) + step->n_items * sizeof(fv_ctl_item_t))) {
        return fv_fail(FV_ERR_PROTOCOL, "STEP: given %u bytes for %u items (at most %d)",
                       a->header.body_bytes, step->n_items, FV_STEP_ITEMS_MAX);
    }
    a->items = (const fv_ctl_item_t *)(const void *)(body + sizeof(*step));
    FV_RETURN_IF_ERR(
        fv_worker_packed_bytes(in->worker, a->items, step->n_items, &in_bytes, &out_bytes));
    if ((in_bytes != step->in_bytes) || (out_bytes != step->out_bytes)) {
        return fv_fail(FV_ERR_PROTOCOL,
                       "STEP: given %llu bytes in and %llu out, expected %zu and %zu",
                       (unsigned long long)step->in_bytes, (unsigned long long)step->out_bytes,
                       in_bytes, out_bytes);
    }
    return fv_array_reserve(&a->item_errors, step->n_items, sizeof(fv_error_t));
}

/* Makes room for a step's tensors and lets its input come. Its shares depend on no step before it, so it may be early. */
static fv_status_t accept_step(inbox_t *in, arrival_t *a)
{
    fv_worker_t *worker = in->worker;
    const fv_backend_ops_t *ops = worker->config.backend;

    FV_RETURN_IF_ERR(fv_worker_usable(worker));
    FV_RETURN_IF_ERR(parse_step(in, a));
    fv_fault_point(5);
    /* The coordinator has had the output of the step before the last one, or it would not have sent this. */
    FV_RETURN_IF_ERR(await_output(in, a));
    FV_RETURN_IF_ERR(fv_host_buffer_reserve(a->in, ops, worker->backend, a->step.in_bytes));
    FV_RETURN_IF_ERR(fv_host_buffer_reserve(a->out, ops, worker->backend, a->step.out_bytes));
    a->is_input_here = a->step.in_bytes == 0U;
    return a->is_input_here ? FV_OK
                            : fv_mpi_post_recv(in->comm, a->in->data, a->step.in_bytes, 0,
                                               FV_TAG_INPUT, &a->input);
}

static fv_status_t run_step(inbox_t *in, arrival_t *a, fv_ctl_done_t *done)
{
    if (a->error.status != FV_OK) {
        return fv_fail((fv_status_t)a->error.status, "%s", a->error.text);
    }
    FV_RETURN_IF_ERR(await_input(in, a));
    FV_RETURN_IF_ERR(fv_worker_step_packed(in->worker, &a->step, a->items, a->in->data,
                                           a->out->data, done, a->item_errors.data));
    if (a->step.out_bytes == 0U) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(
        fv_mpi_post_send(in->comm, a->out->data, a->step.out_bytes, 0, FV_TAG_OUTPUT, &a->output));
    /* Where this thread computes, nothing would move the output along during the next step. */
    return in->worker->config.backend->is_async ? FV_OK : await_output(in, a);
}

/* A step that fails as a whole ends the loop: what was sent for it over MPI is in an unknown state. */
static fv_status_t handle_step(inbox_t *in)
{
    fv_ctl_done_t done = {0};
    fv_status_t status = run_step(in, in->now, &done);

    if (status == FV_OK) {
        fv_fault_point(9);
        status = answer_done(in, &done);
        fv_fault_point(10);
        return status;
    }
    if (in->is_superseded) {
        return FV_ERR_ABORTED; /* nobody waits for an answer */
    }
    fv_error_t error = fv_error_capture(status);
    (void)answer_status(in, status); /* the peer may be the reason */
    return fv_fail(status, "%s", error.text);
}

/* ------------------------------------------------------------------ messages */

/* The body as a struct of its type, or NULL when its size is another. */
#define BODY_AS(in, type) \
    (((in)->now->header.body_bytes == sizeof(type)) ? (const type *)(in)->now->body.data : NULL)

static fv_status_t bad_body(const inbox_t *in)
{
    return fv_fail(FV_ERR_PROTOCOL, "message type %u with a body of %u bytes", in->now->header.type,
                   in->now->header.body_bytes);
}

static fv_status_t run_control(inbox_t *in)
{
    fv_worker_t *w = in->worker;

    switch (in->now->header.type) {
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
    case FV_CTL_KEEP_END:
        return fv_worker_keep_end(w);
    default:
        return fv_fail(FV_ERR_PROTOCOL, "message type %u is not for a worker",
                       in->now->header.type);
    }
}

/* Sizes are the coordinator's word. */
static fv_status_t run_keep(inbox_t *in, uint64_t *floors)
{
    const fv_ctl_keep_t *m = in->now->body.data;
    size_t n_bytes = in->now->header.body_bytes;

    if ((n_bytes < sizeof(*m)) || (m->n_layers > FV_LAYERS_MAX) ||
        (n_bytes != sizeof(*m) + m->n_layers * sizeof(fv_ctl_keep_layer_t))) {
        return bad_body(in);
    }
    return fv_worker_keep(in->worker, m, (const fv_ctl_keep_layer_t *)(const void *)(m + 1),
                          floors);
}

static fv_status_t handle_keep(inbox_t *in)
{
    uint64_t floors[FV_LAYERS_MAX];
    fv_status_t status = run_keep(in, floors);
    fv_ctl_done_t done = {.error = fv_error_capture(status)};
    fv_frame_piece_t body[2] = {{.data = &done, .n_bytes = sizeof(done)}};

    if (status == FV_OK) {
        const fv_ctl_keep_t *m = in->now->body.data;
        body[1] = (fv_frame_piece_t){.data = floors, .n_bytes = m->n_layers * sizeof(floors[0])};
    }
    fv_worker_memory(in->worker, &done.memory);
    return answer(in, FV_CTL_KEPT, body, (status == FV_OK) ? 2U : 1U);
}

static fv_status_t handle_message(inbox_t *in)
{
    const fv_ctl_header_t *header = &in->now->header;

    if (header->epoch != in->epoch) {
        return answer_status(
            in, fv_fail(FV_ERR_PROTOCOL, "epoch given %u, expected %u", header->epoch, in->epoch));
    }
    if (header->type == FV_CTL_STEP) {
        return handle_step(in);
    }
    if (header->type == FV_CTL_PING) {
        fv_ctl_memory_t memory;
        fv_frame_piece_t body = {.data = &memory, .n_bytes = sizeof(memory)};

        fv_worker_memory(in->worker, &memory);
        return answer(in, FV_CTL_PONG, &body, 1);
    }
    if (header->type == FV_CTL_KEEP) {
        return handle_keep(in);
    }
    return answer_status(in, run_control(in));
}

/* The coordinator's word that another epoch has begun. Nothing of this one is done any more. */
static fv_status_t note_epoch(inbox_t *in, const arrival_t *a)
{
    if ((a->header.epoch <= in->epoch) || (a->header.body_bytes != sizeof(*in->out_next))) {
        return fv_fail(FV_ERR_PROTOCOL, "EPOCH %u of %u bytes in epoch %u", a->header.epoch,
                       a->header.body_bytes, in->epoch);
    }
    memcpy(in->out_next, a->body.data, sizeof(*in->out_next));
    in->out_next->epoch = a->header.epoch;
    in->is_superseded = true;
    return FV_OK;
}

/* Reads the message that waits on the socket; a STEP's input begins to come in. */
static fv_status_t receive(inbox_t *in, arrival_t *a)
{
    int timeout_ms = (int)in->worker->config.step_deadline_ms;

    FV_RETURN_IF_ERR(fv_frame_read(in->fd, &a->header, sizeof(a->header), timeout_ms));
    if ((a->header.magic != FV_CTL_MAGIC) || (a->header.body_bytes > FV_CTL_BODY_MAX)) {
        return fv_fail(FV_ERR_PROTOCOL, "control message: magic %08x, body of %u bytes",
                       a->header.magic, a->header.body_bytes);
    }
    FV_RETURN_IF_ERR(fv_array_reserve(&a->body, a->header.body_bytes, 1));
    FV_RETURN_IF_ERR(fv_frame_read(in->fd, a->body.data, a->header.body_bytes, timeout_ms));
    if (a->header.type == FV_CTL_EPOCH) {
        return note_epoch(in, a);
    }
    a->is_here = true;
    if ((a->header.type == FV_CTL_STEP) && (a->header.epoch == in->epoch)) {
        a->error = fv_error_capture(accept_step(in, a)); /* answered when its turn comes */
    }
    return FV_OK;
}

/* The next message, if it is there, and its input; never waits for either. */
static void look_ahead(inbox_t *in)
{
    arrival_t *a = in->next;
    struct pollfd p = {.fd = in->fd, .events = POLLIN};
    fv_status_t status = FV_OK;

    if (in->is_looking || (in->look_error.status != FV_OK)) {
        return;
    }
    in->is_looking = true;
    if (!in->is_superseded && !in->urgent.is_here && (poll(&p, 1, 0) > 0) &&
        ((p.revents & POLLIN) != 0)) {
        status = receive(in, a->is_here ? &in->urgent : a);
    }
    if ((status == FV_OK) && in->urgent.is_here) { /* STOP, or what should not be there */
        status = fv_fail(FV_ERR_RANK_LOST, "the coordinator gives up what is under way");
    }
    if ((status == FV_OK) && a->is_here && (a->input != MPI_REQUEST_NULL)) {
        MPI_Status mpi_status;
        int is_done = 0;

        status = fv_mpi_check(MPI_Test(&a->input, &is_done, &mpi_status), "MPI_Test");
        if ((status == FV_OK) && (is_done != 0)) {
            status = note_input(a, &mpi_status);
            fv_worker_prefetch(in->worker, a->in->data, a->step.in_bytes);
        }
    }
    if (status != FV_OK) {
        in->look_error = fv_error_capture(status);
    }
    in->is_looking = false;
}

/* ------------------------------------------------------------------ the loop */

/* Moves the outputs that still leave; *out_is_done when none does. */
static fv_status_t push_outputs(inbox_t *in, bool *out_is_done)
{
    *out_is_done = true;
    for (size_t i = 0; i < FV_STEP_DEPTH; i++) {
        int is_done = 1;

        if (in->arrivals[i].output != MPI_REQUEST_NULL) {
            FV_RETURN_IF_ERR(fv_mpi_check(
                MPI_Test(&in->arrivals[i].output, &is_done, MPI_STATUS_IGNORE), "MPI_Test"));
        }
        *out_is_done = *out_is_done && (is_done != 0);
    }
    return FV_OK;
}

/* Sleeps until the socket has something to say, as long as that takes; not before all outputs have left. */
static fv_status_t wait_for_doorbell(inbox_t *in)
{
    struct pollfd p = {.fd = in->fd, .events = POLLIN};
    bool has_left = false;
    uint32_t n_looks = 0;

    for (;;) {
        if (!has_left) {
            FV_RETURN_IF_ERR(push_outputs(in, &has_left));
            n_looks++;
        }
        int n = poll(&p, 1, has_left ? -1 : ((n_looks > LOOKS_MAX) ? 1 : 0));
        if (n > 0) {
            return FV_OK;
        }
        if ((n < 0) && (errno != EINTR)) {
            return fv_fail(FV_ERR_SYSTEM, "poll on the control socket: errno %d", errno);
        }
    }
}

static fv_status_t serve(inbox_t *in)
{
    for (;;) {
        if (in->look_error.status != FV_OK) {
            return fv_fail((fv_status_t)in->look_error.status, "%s", in->look_error.text);
        }
        if (!in->is_superseded && !in->now->is_here) {
            FV_RETURN_IF_ERR(wait_for_doorbell(in));
            FV_RETURN_IF_ERR(receive(in, in->now));
        }
        if (in->is_superseded) {
            return FV_ERR_ABORTED;
        }
        if ((in->now->header.type == FV_CTL_STOP) && (in->now->header.epoch == in->epoch)) {
            const fv_ctl_stop_t *stop = BODY_AS(in, fv_ctl_stop_t);
            if ((stop != NULL) && (stop->discards_store != 0U)) {
                fv_worker_discard_store(in->worker);
            }
            return FV_OK;
        }
        FV_RETURN_IF_ERR(handle_message(in));
        in->now->is_here = false;
        arrival_t *next = in->next;
        in->next = in->now;
        in->now = next;
    }
}

/* What is still posted keeps its buffers. */
static fv_status_t end(inbox_t *in, fv_status_t status)
{
    bool is_pending = false;

    for (size_t i = 0; i < FV_STEP_DEPTH; i++) {
        arrival_t *a = &in->arrivals[i];

        if (status == FV_OK) {
            status = await_output(in, a);
        }
        is_pending =
            is_pending || (a->input != MPI_REQUEST_NULL) || (a->output != MPI_REQUEST_NULL);
        fv_array_free(&a->body);
        fv_array_free(&a->item_errors);
    }
    fv_array_free(&in->urgent.body);
    fv_array_free(&in->urgent.item_errors);
    if (is_pending && (fv_worker_usable(in->worker) == FV_OK)) {
        return fv_worker_break(in->worker, (status != FV_OK) ? status : FV_ERR_PROTOCOL);
    }
    return status;
}

fv_status_t fv_worker_serve(fv_worker_t *worker,
                            int control_fd,
                            uint32_t epoch,
                            void *mpi_comm,
                            fv_ctl_epoch_t *out_next)
{
    inbox_t in = {.worker = worker,
                  .fd = control_fd,
                  .epoch = epoch,
                  .comm = *(MPI_Comm *)mpi_comm,
                  .out_next = out_next};
    const fv_exchange_ops_t *exchange = worker->config.exchange;
    bool is_polled = (exchange != NULL) && (exchange->on_poll != NULL);

    for (size_t i = 0; i < FV_STEP_DEPTH; i++) {
        in.arrivals[i].input = MPI_REQUEST_NULL;
        in.arrivals[i].output = MPI_REQUEST_NULL;
        in.arrivals[i].in = &worker->in[i];
        in.arrivals[i].out = &worker->out[i];
    }
    in.now = &in.arrivals[0];
    in.next = &in.arrivals[1];
    FV_RETURN_IF_ERR(fv_mpi_check(MPI_Comm_set_errhandler(in.comm, MPI_ERRORS_RETURN),
                                  "MPI_Comm_set_errhandler"));
    if (is_polled) { /* an exchange must not outlive the coordinator either */
        exchange->on_poll(worker->config.exchange_ctx, is_coordinator_gone, &in);
    }
    fv_status_t status = serve(&in);
    if (is_polled) {
        exchange->on_poll(worker->config.exchange_ctx, NULL, NULL);
    }
    return end(&in, status);
}
