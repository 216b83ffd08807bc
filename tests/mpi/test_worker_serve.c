/*
 * test_worker_serve.c - fv_worker_serve() on every rank but 0, driven by a small coordinator on rank 0.
 *
 * Goal:   models, sessions and steps over control socket and MPI give what one unsharded worker gives; refusals are
 *         answers; STOP ends the loop; a closed socket ends it at once, also in the middle of an exchange. The input of a
 *         second step comes in while the first is under way.
 * Method: rank 0 listens on a unix socket, shards each step over all ranks and itself, and runs the same items on a
 *         worker of its own that is alone.
 */
#include "common/clock.h"
#include "common/frame.h"
#include "tests/support/mpi_main.h"
#include "tests/support/random.h"
#include "tests/support/step_pack.h"
#include "tests/support/test.h"
#include "worker/worker.h"

#include <math.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define RANKS_MAX   8
#define EPOCH       3U
#define ARENA_BYTES ((size_t)4 << 20)
#define N_TOKENS    70U /* of a prefill */
#define N_Q_HEADS   ((size_t)10)
#define N_KV_HEADS  ((size_t)5)
#define DIM         ((size_t)16)

static int rank;
static int n_ranks;
static MPI_Comm comm;       /* of the scenario */
static int fds[RANKS_MAX];  /* rank 0: to each worker */
static uint64_t n_messages; /* rank 0: sent */

static fv_worker_t *make_worker(uint32_t r, uint32_t n, fv_exchange_mpi_t *exchange)
{
    fv_worker_t *worker = NULL;
    fv_worker_config_t config = {.rank = r,
                                 .n_ranks = n,
                                 .backend = &fv_backend_cpu,
                                 .backend_config = {.n_threads = 1, .kv_arena_bytes = ARENA_BYTES},
                                 .exchange = (exchange != NULL) ? &fv_exchange_mpi_ops : NULL,
                                 .exchange_ctx = exchange,
                                 .step_deadline_ms = 5000};

    return (fv_worker_create(&config, &worker) == FV_OK) ? worker : NULL;
}

/* Rank 0 listens, the others connect; returns a worker's descriptor, fills fds on rank 0. */
static int connect_all(void)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int listener = -1;
    int fd = -1;

    if (rank == 0) {
        (void)snprintf(a.sun_path, sizeof(a.sun_path), "/tmp/fv-serve-%d.sock", (int)getpid());
        (void)unlink(a.sun_path);
        listener = socket(AF_UNIX, SOCK_STREAM, 0);
        if ((bind(listener, (struct sockaddr *)&a, sizeof(a)) != 0) || (listen(listener, 8) != 0)) {
            MPI_Abort(MPI_COMM_WORLD, 1);
        }
    }
    MPI_Bcast(a.sun_path, sizeof(a.sun_path), MPI_CHAR, 0, MPI_COMM_WORLD);
    if (rank != 0) {
        fd = socket(AF_UNIX, SOCK_STREAM, 0);
        if ((connect(fd, (struct sockaddr *)&a, sizeof(a)) != 0) ||
            (write(fd, &rank, sizeof(rank)) != (ssize_t)sizeof(rank))) {
            MPI_Abort(MPI_COMM_WORLD, 1);
        }
        return fd;
    }
    for (int i = 1; i < n_ranks; i++) {
        int peer = 0;

        fd = accept(listener, NULL, NULL);
        if (fv_frame_read(fd, &peer, sizeof(peer), 5000) != FV_OK) {
            MPI_Abort(MPI_COMM_WORLD, 1);
        }
        fds[peer] = fd;
    }
    (void)close(listener);
    (void)unlink(a.sun_path);
    return -1;
}

/* ------------------------------------------------------------------ the coordinator's side */

static void send_to(int peer, uint32_t epoch, fv_ctl_type_t type, const void *body, size_t n_bytes)
{
    fv_ctl_header_t header = {.magic = FV_CTL_MAGIC,
                              .type = (uint16_t)type,
                              .epoch = epoch,
                              .body_bytes = (uint32_t)n_bytes,
                              .seq = ++n_messages};
    fv_frame_piece_t pieces[2] = {{.data = &header, .n_bytes = sizeof(header)},
                                  {.data = body, .n_bytes = n_bytes}};

    assert_int_equal(fv_frame_send(fds[peer], pieces, 2, 5000), FV_OK);
}

static void read_body(int peer, fv_ctl_type_t type, void *body, size_t n_bytes)
{
    fv_ctl_header_t header;

    assert_int_equal(fv_frame_read(fds[peer], &header, sizeof(header), 5000), FV_OK);
    assert_int_equal(header.magic, FV_CTL_MAGIC);
    assert_int_equal(header.type, type);
    assert_int_equal(header.epoch, EPOCH);
    assert_true(header.body_bytes >= n_bytes);
    assert_int_equal(fv_frame_read(fds[peer], body, n_bytes, 5000), FV_OK);
}

static fv_ctl_done_t ask(int peer, uint32_t epoch, fv_ctl_type_t type, const void *body, size_t n)
{
    fv_ctl_done_t done;

    send_to(peer, epoch, type, body, n);
    read_body(peer, FV_CTL_DONE, &done, sizeof(done));
    return done;
}

static void ask_all(fv_ctl_type_t type, const void *body, size_t n)
{
    for (int p = 1; p < n_ranks; p++) {
        assert_int_equal(ask(p, EPOCH, type, body, n).error.status, FV_OK);
    }
}

typedef struct tensors {
    float q[N_TOKENS * N_Q_HEADS * DIM];
    float k[N_TOKENS * N_KV_HEADS * DIM], v[N_TOKENS * N_KV_HEADS * DIM];
    float out[N_TOKENS * N_Q_HEADS * DIM], lse[N_TOKENS * N_Q_HEADS];
} tensors_t;

static void fill(fv_random_t *r, tensors_t *t)
{
    for (size_t i = 0; i < FV_COUNT(t->q); i++) {
        t->q[i] = fv_random_unit(r);
    }
    for (size_t i = 0; i < FV_COUNT(t->k); i++) {
        t->k[i] = fv_random_unit(r);
        t->v[i] = fv_random_unit(r);
    }
}

static fv_step_io_t io_of(tensors_t *t)
{
    return (fv_step_io_t){.q = t->q,
                          .k = t->k,
                          .v = t->v,
                          .q_token_bytes = N_Q_HEADS * DIM * sizeof(float),
                          .k_token_bytes = N_KV_HEADS * DIM * sizeof(float),
                          .v_token_bytes = N_KV_HEADS * DIM * sizeof(float),
                          .out = t->out,
                          .out_token_bytes = N_Q_HEADS * DIM * sizeof(float),
                          .lse = t->lse,
                          .lse_token_stride = N_Q_HEADS};
}

static fv_model_spec_t make_spec(void)
{
    fv_model_spec_t spec = {.name = "serve",
                            .n_layers = 1,
                            .n_q_heads = N_Q_HEADS,
                            .n_kv_heads = N_KV_HEADS,
                            .head_dim_qk = DIM,
                            .head_dim_v = DIM,
                            .kv_dtype = FV_DTYPE_F32,
                            .n_policies = 1};

    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    return spec;
}

/* The requests leave the function that posts them, which clang's MPI checker can not follow. */
/* NOLINTBEGIN(clang-analyzer-optin.mpi.MPI-Checker) */
typedef struct packed {
    uint8_t *in, *out;
    MPI_Request sent, received;
} packed_t;

/* STEP with one item to a worker: output awaited first, then the doorbell, then the input. */
static packed_t begin_step(int peer,
                           const fv_model_spec_t *spec,
                           const fv_placement_t *p,
                           const fv_ctl_item_t *item,
                           const fv_step_io_t *io)
{
    struct {
        fv_ctl_step_t step;
        fv_ctl_item_t item;
    } body = {.item = *item};
    packed_t packed = {.sent = MPI_REQUEST_NULL, .received = MPI_REQUEST_NULL};
    fv_item_share_t s;

    if (!fv_item_share(spec, p, item, (uint32_t)peer, &s)) {
        return packed;
    }
    body.step = (fv_ctl_step_t){
        .n_items = 1, .in_bytes = fv_share_in_bytes(&s), .out_bytes = fv_share_out_bytes(&s)};
    packed.in = calloc(body.step.in_bytes + 1U, 1);
    packed.out = calloc(body.step.out_bytes + 1U, 1);
    (void)fv_pack_input(spec, p, item, (uint32_t)peer, io, packed.in);
    if (body.step.out_bytes > 0U) {
        MPI_Irecv(packed.out, (int)body.step.out_bytes, MPI_BYTE, peer, FV_TAG_OUTPUT, comm,
                  &packed.received);
    }
    send_to(peer, EPOCH, FV_CTL_STEP, &body, sizeof(body));
    /* Synchronous: it completes only once the rank has posted the receive. */
    MPI_Issend(packed.in, (int)body.step.in_bytes, MPI_BYTE, peer, FV_TAG_INPUT, comm,
               &packed.sent);
    return packed;
}

/* An item on all ranks and on the one that is alone. */
typedef struct both {
    fv_worker_t *mine, *alone;
    const fv_model_spec_t *spec;
    const fv_placement_t *p;
    const fv_ctl_item_t *item;
    tensors_t sharded, whole;
    fv_step_io_t io, whole_io;
    packed_t packed[RANKS_MAX];
} both_t;

static void begin_both(both_t *b, fv_random_t *r)
{
    fill(r, &b->sharded);
    b->whole = b->sharded;
    b->io = io_of(&b->sharded);
    b->whole_io = io_of(&b->whole);
    for (int peer = 1; peer < n_ranks; peer++) {
        b->packed[peer] = begin_step(peer, b->spec, b->p, b->item, &b->io);
    }
}

/* Rank 0's own share, the others' answers, and what the one that is alone says: they must agree. */
static void end_both(both_t *b)
{
    fv_ctl_done_t done;
    fv_error_t error;
    fv_item_share_t s;

    if (fv_item_share(b->spec, b->p, b->item, 0, &s)) {
        assert_int_equal(fv_worker_step(b->mine, b->item, &b->io, 1, &done, &error), FV_OK);
        assert_int_equal(error.status, FV_OK);
    }
    for (int peer = 1; peer < n_ranks; peer++) {
        packed_t *packed = &b->packed[peer];

        MPI_Wait(&packed->sent, MPI_STATUS_IGNORE);
        MPI_Wait(&packed->received, MPI_STATUS_IGNORE);
        if (packed->in != NULL) {
            read_body(peer, FV_CTL_DONE, &done, sizeof(done));
            assert_int_equal(done.error.status, FV_OK);
            (void)fv_unpack_output(b->spec, b->p, b->item, (uint32_t)peer, packed->out, &b->io);
            free(packed->in);
            free(packed->out);
        }
    }
    assert_int_equal(fv_worker_step(b->alone, b->item, &b->whole_io, 1, &done, &error), FV_OK);
    assert_int_equal(error.status, FV_OK);
    for (size_t i = 0; i < (size_t)b->item->n_tokens * N_Q_HEADS * DIM; i++) {
        assert_true(fabsf(b->sharded.out[i] - b->whole.out[i]) <= 1e-5F);
    }
    for (size_t i = 0; i < (size_t)b->item->n_tokens * N_Q_HEADS; i++) {
        assert_true(fabsf(b->sharded.lse[i] - b->whole.lse[i]) <= 1e-5F);
    }
}

static void check_step(fv_worker_t *mine,
                       fv_worker_t *alone,
                       const fv_model_spec_t *spec,
                       const fv_placement_t *p,
                       const fv_ctl_item_t *item,
                       fv_random_t *r)
{
    static both_t b;

    b.mine = mine;
    b.alone = alone;
    b.spec = spec;
    b.p = p;
    b.item = item;
    begin_both(&b, r);
    end_both(&b);
}

/* ------------------------------------------------------------------ scenarios */

/* Runs `drive` on rank 0 against serving workers, each of which must return `expected`. */
static void scenario(void (*drive)(fv_worker_t *mine), fv_status_t expected)
{
    static fv_ctl_epoch_t next;
    fv_exchange_mpi_t *exchange = NULL;
    fv_status_t status = FV_OK;

    MPI_Comm_dup(MPI_COMM_WORLD, &comm);
    int fd = connect_all();
    bool ok = fv_exchange_mpi_create(&comm, &exchange) == FV_OK;
    fv_worker_t *worker = make_worker((uint32_t)rank, (uint32_t)n_ranks, exchange);
    if (rank == 0) {
        drive(worker);
        for (int p = 1; p < n_ranks; p++) {
            (void)close(fds[p]);
        }
    } else {
        status = fv_worker_serve(worker, fd, EPOCH, &comm, &next);
        ok = ok && (status == expected);
        if (!ok) {
            print_error("rank %d: %s: %s\n", rank, fv_status_str(status), fv_error_context());
        }
        (void)close(fd);
    }
    fv_worker_destroy(worker);
    fv_exchange_mpi_destroy(exchange);
    fv_assert_all_ranks(ok);
}

static fv_ctl_open_t make_open(uint32_t slot, uint16_t n_head_parts, uint16_t n_ctx_parts)
{
    fv_ctl_open_t open = {.session_slot = slot,
                          .placement = {.n_head_parts = n_head_parts,
                                        .n_ctx_parts = n_ctx_parts,
                                        .shard_tokens = 64}};

    for (uint16_t i = 0; i < n_head_parts * n_ctx_parts; i++) {
        open.placement.ranks[i] = (uint16_t)((i + 1) % n_ranks); /* rank 0 is not the first */
    }
    return open;
}

static void drive_sessions(fv_worker_t *mine)
{
    static const uint32_t sizes[] = {1, 62, 1, 1, 70, 70, 1, 1, 70, 1};
    fv_worker_t *alone = make_worker(0, 1, NULL);
    fv_ctl_model_t model = {.spec = make_spec()};
    fv_random_t r = {fv_random_seed(1)};
    fv_ctl_open_t opens[2] = {make_open(0, 1, (uint16_t)n_ranks),
                              make_open(5, (uint16_t)n_ranks, 1)};

    assert_non_null(alone);
    assert_int_equal(fv_worker_model(mine, &model), FV_OK);
    assert_int_equal(fv_worker_model(alone, &model), FV_OK);
    ask_all(FV_CTL_MODEL, &model, sizeof(model));
    for (size_t s = 0; s < 2U; s++) {
        fv_ctl_open_t whole = {
            .session_slot = opens[s].session_slot,
            .placement = {.n_head_parts = 1, .n_ctx_parts = 1, .shard_tokens = 64}};
        uint64_t position = 0;

        assert_int_equal(fv_worker_open(mine, &opens[s]), FV_OK);
        assert_int_equal(fv_worker_open(alone, &whole), FV_OK);
        ask_all(FV_CTL_OPEN, &opens[s], sizeof(opens[s]));
        for (size_t i = 0; i < FV_COUNT(sizes); i++) {
            fv_ctl_item_t item = {.session_slot = opens[s].session_slot,
                                  .position = position,
                                  .kv_end = position + sizes[i],
                                  .n_tokens = sizes[i],
                                  .dtype = FV_DTYPE_F32,
                                  .flags = FV_ITEM_CAUSAL | FV_ITEM_APPEND | FV_ITEM_WANT_LSE};

            check_step(mine, alone, &model.spec, &opens[s].placement, &item, &r);
            position += sizes[i];
        }
    }
    fv_ctl_fork_t fork = {.session_slot = 1, .parent_slot = 0, .at_position = 100};
    fv_ctl_truncate_t cut = {.session_slot = 0, .layer = UINT32_MAX, .position = 10};
    ask_all(FV_CTL_FORK, &fork, sizeof(fork));
    ask_all(FV_CTL_TRUNCATE, &cut, sizeof(cut));
    for (uint32_t slot = 0; slot < 6U; slot += (slot == 1U) ? 4U : 1U) { /* 0, 1, 5 */
        fv_ctl_close_t close_message = {.session_slot = slot};

        ask_all(FV_CTL_CLOSE, &close_message, sizeof(close_message));
    }
    for (int p = 1; p < n_ranks; p++) { /* nothing leaked there */
        fv_ctl_memory_t memory;

        send_to(p, EPOCH, FV_CTL_PING, NULL, 0);
        read_body(p, FV_CTL_PONG, &memory, sizeof(memory));
        assert_int_equal(memory.kv_bytes_free, memory.kv_bytes_total);
        send_to(p, EPOCH, FV_CTL_STOP, NULL, 0);
    }
    fv_worker_destroy(alone);
}

static void test_sessions_and_steps(void **state)
{
    (void)state;
    scenario(drive_sessions, FV_OK);
}

static fv_ctl_item_t append_item(uint32_t slot, uint64_t position, uint32_t n_tokens)
{
    return (fv_ctl_item_t){.session_slot = slot,
                           .position = position,
                           .kv_end = position + n_tokens,
                           .n_tokens = n_tokens,
                           .dtype = FV_DTYPE_F32,
                           .flags = FV_ITEM_CAUSAL | FV_ITEM_APPEND | FV_ITEM_WANT_LSE};
}

static void open_both(fv_worker_t *mine, fv_worker_t *alone, const fv_ctl_open_t *open)
{
    fv_ctl_open_t whole = *open;

    whole.placement = (fv_placement_t){.n_head_parts = 1, .n_ctx_parts = 1, .shard_tokens = 64};
    assert_int_equal(fv_worker_open(mine, open), FV_OK);
    assert_int_equal(fv_worker_open(alone, &whole), FV_OK);
    ask_all(FV_CTL_OPEN, open, sizeof(*open));
}

/* Rank 0 does not join the first step's exchange before the workers have taken the second one's input. */
static void check_pair(both_t *first, both_t *second, fv_random_t *r)
{
    int64_t deadline_us = fv_clock_us() + 4000000;
    int is_sent = 0;

    begin_both(first, r);
    begin_both(second, r);
    for (int peer = 1; peer < n_ranks; peer++) {
        struct pollfd answer = {.fd = fds[peer], .events = POLLIN};

        assert_non_null(second->packed[peer].in);
        for (is_sent = 0; is_sent == 0;) {
            MPI_Test(&second->packed[peer].sent, &is_sent, MPI_STATUS_IGNORE);
            if ((is_sent == 0) && (fv_clock_us() > deadline_us)) {
                fail_msg("rank %d does not take the second step's input", peer);
            }
        }
        assert_int_equal(poll(&answer, 1, 0), 0); /* it is in the first step still */
    }
    end_both(first);
    end_both(second);
}

static void drive_two_steps(fv_worker_t *mine)
{
    static both_t first;
    static both_t second;
    fv_worker_t *alone = make_worker(0, 1, NULL);
    fv_ctl_model_t model = {.spec = make_spec()};
    fv_random_t r = {fv_random_seed(1)};
    fv_ctl_open_t opens[2] = {make_open(0, 1, (uint16_t)n_ranks),
                              make_open(5, (uint16_t)n_ranks, 1)};
    uint64_t position = 0;

    assert_non_null(alone);
    first.mine = second.mine = mine;
    first.alone = second.alone = alone;
    first.spec = second.spec = &model.spec;
    first.p = &opens[0].placement;
    second.p = &opens[1].placement;
    assert_int_equal(fv_worker_model(mine, &model), FV_OK);
    assert_int_equal(fv_worker_model(alone, &model), FV_OK);
    ask_all(FV_CTL_MODEL, &model, sizeof(model));
    open_both(mine, alone, &opens[0]);
    open_both(mine, alone, &opens[1]);
    while (position < 64U * (uint64_t)n_ranks) { /* until every rank has a part */
        fv_ctl_item_t item = append_item(0, position, N_TOKENS);

        check_step(mine, alone, &model.spec, &opens[0].placement, &item, &r);
        position += N_TOKENS;
    }
    for (uint32_t i = 0; i < 4U; i++) {
        fv_ctl_item_t items[2] = {append_item(0, position, 1U + i),
                                  append_item(5, (uint64_t)i * N_TOKENS, N_TOKENS)};

        first.item = &items[0];
        second.item = &items[1];
        check_pair(&first, &second, &r);
        position += items[0].n_tokens;
    }
    for (int p = 1; p < n_ranks; p++) {
        send_to(p, EPOCH, FV_CTL_STOP, NULL, 0);
    }
    fv_worker_destroy(alone);
}

static void test_the_next_input_comes_while_a_step_is_under_way(void **state)
{
    (void)state;
    scenario(drive_two_steps, FV_OK);
}

/* Refusals are answers: the loop goes on after each. */
static void drive_refusals(fv_worker_t *mine)
{
    fv_ctl_model_t model = {.spec = make_spec()};
    fv_ctl_open_t open = make_open(0, 1, 1);

    (void)mine;
    for (int p = 1; p < n_ranks; p++) {
        assert_int_equal(ask(p, EPOCH + 1U, FV_CTL_MODEL, &model, sizeof(model)).error.status,
                         FV_ERR_PROTOCOL);
        assert_int_equal(ask(p, EPOCH, FV_CTL_OPEN, &open, sizeof(open)).error.status,
                         FV_ERR_PROTOCOL); /* the refused model is unknown */
        assert_int_equal(ask(p, EPOCH, FV_CTL_MODEL, &model, sizeof(model)).error.status, FV_OK);
        assert_int_equal(ask(p, EPOCH, FV_CTL_MODEL, &model, sizeof(model)).error.status,
                         FV_ERR_PROTOCOL); /* slot in use */
        assert_int_equal(ask(p, EPOCH, FV_CTL_OPEN, &open, 7).error.status, FV_ERR_PROTOCOL);
        assert_int_equal(ask(p, EPOCH, FV_CTL_HELLO, NULL, 0).error.status, FV_ERR_PROTOCOL);
        assert_int_equal(ask(p, EPOCH, FV_CTL_OPEN, &open, sizeof(open)).error.status, FV_OK);
        send_to(p, EPOCH + 1U, FV_CTL_STOP, NULL, 0); /* not ours to obey */
        fv_ctl_done_t done;
        read_body(p, FV_CTL_DONE, &done, sizeof(done));
        assert_int_equal(done.error.status, FV_ERR_PROTOCOL);
        send_to(p, EPOCH, FV_CTL_STOP, NULL, 0);
    }
}

static void test_refusals_are_answers(void **state)
{
    (void)state;
    scenario(drive_refusals, FV_OK);
}

/* A step whose sizes do not match its items ends the loop, with an answer. */
static void drive_bad_step(fv_worker_t *mine)
{
    struct {
        fv_ctl_step_t step;
        fv_ctl_item_t item;
    } body = {.step = {.n_items = 1}, .item = {.session_slot = 9, .n_tokens = 1, .dtype = 1}};

    (void)mine;
    for (int p = 1; p < n_ranks; p++) {
        fv_ctl_done_t done = ask(p, EPOCH, FV_CTL_STEP, &body, sizeof(body));

        assert_int_equal(done.error.status, FV_ERR_PROTOCOL);
        assert_string_equal(done.error.text, "step: session slot 9 is not open");
    }
}

static void test_a_bad_step_ends_the_loop(void **state)
{
    (void)state;
    scenario(drive_bad_step, FV_ERR_PROTOCOL);
}

static void drive_nothing(fv_worker_t *mine)
{
    (void)mine;
}

static void test_a_closed_socket_ends_the_loop(void **state)
{
    (void)state;
    scenario(drive_nothing, FV_ERR_RANK_LOST);
}

/* Rank 0 holds a part but never joins the exchange: the workers wait for it when its sockets close. */
static void drive_half_a_step(fv_worker_t *mine)
{
    static tensors_t t;
    static packed_t packed[RANKS_MAX]; /* their messages may still be under way at the end */
    fv_ctl_model_t model = {.spec = make_spec()};
    fv_ctl_open_t open = make_open(0, 1, (uint16_t)n_ranks);
    fv_random_t r = {1};
    uint64_t position = 0;

    ask_all(FV_CTL_MODEL, &model, sizeof(model));
    ask_all(FV_CTL_OPEN, &open, sizeof(open));
    assert_int_equal(fv_worker_model(mine, &model), FV_OK);
    assert_int_equal(fv_worker_open(mine, &open), FV_OK);
    fill(&r, &t);
    fv_step_io_t io = io_of(&t);
    /* the last step reaches rank 0's part, the last one */
    while (position < 64U * ((uint64_t)n_ranks - 1U)) {
        fv_ctl_item_t item = {.position = position,
                              .kv_end = position + N_TOKENS,
                              .n_tokens = N_TOKENS,
                              .dtype = FV_DTYPE_F32,
                              .flags = FV_ITEM_CAUSAL | FV_ITEM_APPEND};
        bool is_last = item.kv_end > 64U * ((uint64_t)n_ranks - 1U);

        for (int p = 1; p < n_ranks; p++) {
            packed[p] = begin_step(p, &model.spec, &open.placement, &item, &io);
        }
        for (int p = 1; !is_last && (p < n_ranks); p++) {
            fv_ctl_done_t done;

            MPI_Wait(&packed[p].sent, MPI_STATUS_IGNORE);
            MPI_Wait(&packed[p].received, MPI_STATUS_IGNORE);
            if (packed[p].in != NULL) {
                read_body(p, FV_CTL_DONE, &done, sizeof(done));
            }
            free(packed[p].in);
            free(packed[p].out);
        }
        position += N_TOKENS;
    }
    (void)usleep(20000); /* they are in the exchange by now */
}

/* NOLINTEND(clang-analyzer-optin.mpi.MPI-Checker) */

static void test_a_coordinator_lost_in_an_exchange(void **state)
{
    int64_t t = fv_clock_us();

    (void)state;
    scenario(drive_half_a_step, FV_ERR_RANK_LOST);
    fv_assert_all_ranks(fv_clock_us() - t < 4000000); /* not by the deadline of 5 s */
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sessions_and_steps),
        cmocka_unit_test(test_the_next_input_comes_while_a_step_is_under_way),
        cmocka_unit_test(test_refusals_are_answers),
        cmocka_unit_test(test_a_bad_step_ends_the_loop),
        cmocka_unit_test(test_a_closed_socket_ends_the_loop),
        cmocka_unit_test(test_a_coordinator_lost_in_an_exchange),
    };

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &n_ranks);
    return fv_mpi_finish(cmocka_run_group_tests(tests, NULL, NULL));
}
