/*
 * fuzz_control.c - any messages on a worker's control socket.
 *
 * Input: byte 0 is what MPI's messages and partial states of others consist of, and says what computes; then messages, each of 5 bytes {kind, a, b, c,
 *        number of patches} and its patches {offset (2), width, value (8)}. A message is built as the coordinator would
 *        (sizes of a step as they really are), patched, and sent; of kinds with the top bit set the next one goes with it.
 * Checks: each message is answered once, in order, with a text that ends, up to the one that ends the connection (no
 *         control message, another epoch, a stop, a step that fails as a whole); at the end every page can be given back. Only sizes that would make a run slow are cut down (limit()).
 */
#include "tests/fuzz/no_mpi.h"
#include "worker/internal.h"

#include <mpi.h>

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define ARENA_BYTES   ((size_t)1 << 20)
#define MOVE_BYTES    ((size_t)64 << 10) /* 16 pages of a head: some contexts fit, some do not */
#define MESSAGES_MAX  48
#define RECORD_BYTES  5U
#define PATCH_BYTES   11U
#define ITEMS_MAX     4U
#define OUTPUT_CAP    ((size_t)1 << 17)
#define OWN_RANK      1U
#define N_RANKS       2U
#define SLOTS         8U
#define TOGETHER      0x80U
#define TOGETHER_MAX  3
#define MESSAGE_BYTES (sizeof(fv_ctl_header_t) + sizeof(fv_ctl_model_t) + 4096U)

/* NOLINTNEXTLINE(readability-identifier-naming): the name is libFuzzer's */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

typedef struct message {
    fv_ctl_header_t header;
    union {
        fv_ctl_model_t model;
        fv_ctl_open_t open;
        fv_ctl_fork_t fork;
        fv_ctl_truncate_t truncate;
        fv_ctl_close_t close;
        fv_ctl_stop_t stop;
        fv_ctl_epoch_t epoch;
        struct {
            fv_ctl_keep_t keep;
            fv_ctl_keep_layer_t layers[FV_GROUPS_MAX];
        } keep;
        struct {
            fv_ctl_step_t step;
            fv_ctl_item_t items[ITEMS_MAX];
        } step;
    } body;
} message_t;

/* What comes of a message. */
typedef enum fate {
    FATE_ANSWER, /* and of the next one */
    FATE_STEP,   /* an answer; the last one if the step failed as a whole */
    FATE_END     /* no answer, to no other either */
} fate_t;

typedef struct run {
    fv_worker_t *worker;
    uint32_t epoch;
    int fds[2]; /* ours, the worker's */
    uint64_t seq, n_answered;
    uint64_t n_sent; /* on this connection */
    fate_t fates[TOGETHER_MAX];
} run_t;

static void check(bool ok, const char *what)
{
    if (!ok) {
        (void)fprintf(stderr, "fuzz_control: %s (%s)\n", what, fv_error_context());
        abort();
    }
}

/* ------------------------------------------------------------------ the other rank */

static fv_status_t all_to_all(void *ctx,
                              const fv_exchange_message_t *sends,
                              size_t n_sends,
                              const fv_exchange_message_t *recvs,
                              size_t n_recvs,
                              uint32_t deadline_ms)
{
    volatile uint8_t sum = 0;

    (void)ctx;
    (void)deadline_ms;
    for (size_t i = 0; i < n_sends; i++) {
        check(sends[i].peer == 0, "partial states for nobody");
        for (size_t j = 0; j < sends[i].n_bytes; j++) {
            sum = (uint8_t)(sum ^ ((const uint8_t *)sends[i].data)[j]);
        }
    }
    for (size_t i = 0; i < n_recvs; i++) {
        memset(recvs[i].data, fv_no_mpi_byte, recvs[i].n_bytes);
    }
    return FV_OK;
}

static const fv_exchange_ops_t k_exchange = {.name = "fuzz", .all_to_all = all_to_all};

/* Most runs compute nothing: 20 times as many. */
static fv_worker_t *make_worker(bool computes)
{
    fv_worker_config_t config = {.rank = OWN_RANK,
                                 .n_ranks = N_RANKS,
                                 .backend = computes ? &fv_backend_cpu : &fv_backend_null,
                                 .backend_config = {.kv_arena_bytes = ARENA_BYTES, .n_threads = 1},
                                 .exchange = &k_exchange,
                                 .move_bytes = MOVE_BYTES,
                                 .step_deadline_ms = 1000};
    fv_worker_t *worker = NULL;

    check(fv_worker_create(&config, &worker) == FV_OK, "no worker");
    return worker;
}

/* ------------------------------------------------------------------ messages as they should be */

static void build_model(message_t *m, const uint8_t *r)
{
    fv_model_spec_t *spec = &m->body.model.spec;

    m->header.type = FV_CTL_MODEL;
    m->header.body_bytes = sizeof(m->body.model);
    m->body.model.model_slot = r[1] % SLOTS;
    *spec = (fv_model_spec_t){.name = "fuzz",
                              .n_layers = 2,
                              .n_q_heads = 4,
                              .n_kv_heads = (r[3] % 2U == 0U) ? 2 : 4,
                              .head_dim_qk = 16,
                              .head_dim_v = 16,
                              .kv_dtype = (int32_t)FV_DTYPE_BF16,
                              .softmax_scale = 0.25F,
                              .n_policies = 1};
    if (r[2] % 4U == 1U) {
        spec->n_policies = 2;
        spec->policies[1] =
            (fv_policy_t){.kind = FV_POLICY_WINDOW, .window_tokens = 70, .sink_tokens = 2};
        memset(spec->layer_policy, 1, (size_t)spec->n_layers);
    } else if (r[2] % 4U == 2U) {
        spec->n_policies = 2;
        spec->policies[1] = (fv_policy_t){.kind = FV_POLICY_S2,
                                          .block_tokens = 64,
                                          .local_blocks = 1,
                                          .vert_stride = 4,
                                          .head_sliding_step = 1,
                                          .n_heads = spec->n_kv_heads};
        memset(spec->layer_policy, 1, (size_t)spec->n_layers);
    } else if (r[2] % 4U == 3U) {
        spec->kind = FV_MODEL_LATENT;
        spec->latent_dim = 64;
        spec->rope_dim = 16;
        spec->n_kv_heads = 1;
        spec->head_dim_qk = 80;
        spec->head_dim_v = 64;
        if (r[3] % 2U == 1U) {
            spec->sharding = (fv_sharding_t){.mode = FV_SHARDING_LATENT,
                                             .is_set = 1,
                                             .groups = 2,
                                             .exact = (r[3] / 2U) % 2U,
                                             .n_mu = 2,
                                             .mu = {1.0F, 1.0F}};
        }
    }
}

static fv_placement_t placement_of(uint8_t c)
{
    static const fv_placement_t k_placements[] = {
        {.n_head_parts = 1, .n_ctx_parts = 1, .shard_tokens = 64, .ranks = {OWN_RANK}},
        {.n_head_parts = 1, .n_ctx_parts = 2, .shard_tokens = 64, .ranks = {0, OWN_RANK}},
        {.n_head_parts = 2, .n_ctx_parts = 1, .shard_tokens = 128, .ranks = {OWN_RANK, 0}},
        {.n_head_parts = 1, .n_ctx_parts = 1, .shard_tokens = 64, .ranks = {0}},
    };

    return k_placements[c % (sizeof(k_placements) / sizeof(k_placements[0]))];
}

static void build_step(const run_t *run, message_t *m, const uint8_t *r)
{
    uint32_t n_items = 1U + r[1] % ITEMS_MAX;
    uint32_t n_tokens = 1U + r[3] % 100U;

    m->header.type = FV_CTL_STEP;
    m->header.body_bytes = (uint32_t)(sizeof(fv_ctl_step_t) + n_items * sizeof(fv_ctl_item_t));
    m->body.step.step = (fv_ctl_step_t){.step_id = run->seq, .n_items = n_items};
    for (uint32_t i = 0; i < n_items; i++) {
        uint32_t slot = ((uint32_t)r[2] + i) % SLOTS;
        uint32_t layer = (r[2] / SLOTS) % 2U;
        const fv_session_t *session = fv_worker_session(run->worker, slot);
        uint64_t length = ((session != NULL) && (session->layers != NULL) &&
                           (layer < (uint32_t)session->model->spec.n_layers))
                              ? session->layers[layer].length
                              : 0;
        bool is_append = (r[2] & 0x40U) == 0U;

        m->body.step.items[i] =
            (fv_ctl_item_t){.session_slot = slot,
                            .layer = layer,
                            .position = is_append ? length : (length / 2U),
                            .kv_end = is_append ? (length + n_tokens) : length,
                            .n_tokens = n_tokens,
                            .dtype = (uint16_t)((r[2] & 0x80U) ? FV_DTYPE_BF16 : FV_DTYPE_F32),
                            .flags = (uint16_t)(FV_ITEM_CAUSAL | (is_append ? FV_ITEM_APPEND : 0) |
                                                ((r[2] & 0x20U) ? FV_ITEM_MOVES_KV : 0) |
                                                ((r[3] & 0x80U) ? FV_ITEM_WANT_LSE : 0))};
    }
}

static void build(const run_t *run, message_t *m, const uint8_t *r)
{
    switch ((r[0] & ~TOGETHER) % 12U) {
    case 0:
        build_model(m, r);
        break;
    case 1:
        m->header.type = FV_CTL_OPEN;
        m->header.body_bytes = sizeof(m->body.open);
        m->body.open = (fv_ctl_open_t){.session_slot = r[1] % SLOTS,
                                       .model_slot = r[2] % SLOTS,
                                       .placement = placement_of(r[3])};
        break;
    case 2:
        m->header.type = FV_CTL_FORK;
        m->header.body_bytes = sizeof(m->body.fork);
        m->body.fork = (fv_ctl_fork_t){
            .session_slot = r[1] % SLOTS, .parent_slot = r[2] % SLOTS, .at_position = r[3]};
        break;
    case 3:
        m->header.type = FV_CTL_TRUNCATE;
        m->header.body_bytes = sizeof(m->body.truncate);
        m->body.truncate = (fv_ctl_truncate_t){.session_slot = r[1] % SLOTS,
                                               .layer = (r[2] % 3U == 2U) ? UINT32_MAX : r[2] % 3U,
                                               .position = r[3]};
        break;
    case 4:
        m->header.type = FV_CTL_CLOSE;
        m->header.body_bytes = sizeof(m->body.close);
        m->body.close = (fv_ctl_close_t){.session_slot = r[1] % SLOTS};
        break;
    case 5:
        m->header.type = FV_CTL_PING;
        break;
    case 6:
        m->header.type = FV_CTL_KEEP_END;
        break;
    case 7:
        m->header.type = FV_CTL_KEEP;
        m->header.body_bytes = sizeof(fv_ctl_keep_t) + 2U * sizeof(fv_ctl_keep_layer_t);
        m->body.keep.keep = (fv_ctl_keep_t){.session_slot = r[1] % SLOTS,
                                            .model_slot = r[2] % SLOTS,
                                            .n_layers = 2,
                                            .placement = placement_of(r[3])};
        break;
    case 8:
        m->header.type = FV_CTL_EPOCH;
        m->header.epoch++;
        m->header.body_bytes = sizeof(m->body.epoch);
        m->body.epoch.n_ranks = N_RANKS;
        m->body.epoch.rank = OWN_RANK;
        break;
    case 9:
        m->header.type = r[1];
        m->header.body_bytes = r[2];
        break;
    default:
        build_step(run, m, r);
        break;
    }
}

/* ------------------------------------------------------------------ sending */

static void patch(message_t *m, const uint8_t *p)
{
    size_t at = ((size_t)p[0] | ((size_t)p[1] << 8U)) % sizeof(*m);
    size_t width = (size_t)1 << (p[2] % 4U);

    if (at + width <= sizeof(*m)) {
        memcpy((uint8_t *)m + at, p + 3, width);
    }
}

static uint32_t at_most(uint32_t value, uint32_t max)
{
    return (value > max) ? (1U + value % max) : value;
}

/* What is possible, and only slow or large, is made small. */
static void limit(message_t *m)
{
    if (m->header.body_bytes > sizeof(m->body)) {
        m->header.body_bytes = sizeof(m->body); /* (more is not sent, see deliver()) */
    }
    if (m->header.type == FV_CTL_MODEL) {
        fv_model_spec_t *spec = &m->body.model.spec;
        spec->n_layers = (spec->n_layers > 4) ? 4 : spec->n_layers;
        spec->n_q_heads = (spec->n_q_heads > 16) ? 16 : spec->n_q_heads;
    } else if (m->header.type == FV_CTL_OPEN) {
        m->body.open.session_slot = at_most(m->body.open.session_slot, 256);
    } else if (m->header.type == FV_CTL_FORK) {
        m->body.fork.session_slot = at_most(m->body.fork.session_slot, 256);
    } else if (m->header.type == FV_CTL_STEP) {
        for (size_t i = 0; i < ITEMS_MAX; i++) {
            m->body.step.items[i].n_tokens = at_most(m->body.step.items[i].n_tokens, 200);
        }
    }
}

/* The sizes of a step's tensors, unless they were patched. */
static void set_sizes(const run_t *run, message_t *m)
{
    fv_ctl_step_t *step = &m->body.step.step;
    size_t in_bytes = 0;
    size_t out_bytes = 0;

    if ((m->header.type == FV_CTL_STEP) && (step->n_items <= ITEMS_MAX) && (step->in_bytes == 0) &&
        (step->out_bytes == 0) &&
        (fv_worker_packed_bytes(run->worker, m->body.step.items, step->n_items, &in_bytes,
                                &out_bytes) == FV_OK)) {
        step->in_bytes = in_bytes;
        step->out_bytes = out_bytes;
    }
}

static fate_t fate_of(const run_t *run, const fv_ctl_header_t *header)
{
    bool is_of_epoch = header->epoch == run->epoch;

    if ((header->magic != FV_CTL_MAGIC) || (header->type == FV_CTL_EPOCH) ||
        ((header->type == FV_CTL_STOP) && is_of_epoch)) {
        return FATE_END;
    }
    return ((header->type == FV_CTL_STEP) && is_of_epoch) ? FATE_STEP : FATE_ANSWER;
}

static void deliver(run_t *run, const message_t *m)
{
    size_t n_bytes = sizeof(m->header) + m->header.body_bytes;
    ssize_t n = send(run->fds[0], m, n_bytes, MSG_DONTWAIT | MSG_NOSIGNAL);

    check((n > 0) && ((size_t)n == n_bytes), "a message did not fit");
    run->fates[run->n_sent++] = fate_of(run, &m->header);
}

/* One answer's body; whether it says that a step failed as a whole (if some items did it names them), where it is a step's. */
static bool judge_body(const fv_ctl_header_t *header, const uint8_t *body)
{
    fv_ctl_done_t done;

    if (header->type == FV_CTL_PONG) {
        return false;
    }
    check((header->type == FV_CTL_DONE) || (header->type == FV_CTL_KEPT), "an answer of no kind");
    check(header->body_bytes >= sizeof(done), "a short answer");
    memcpy(&done, body, sizeof(done));
    check(memchr(done.error.text, '\0', sizeof(done.error.text)) != NULL, "an endless text");
    check((done.error.status == FV_OK) || (done.error.text[0] != '\0'), "no text");
    return (done.error.status != FV_OK) && (done.n_items == 0U);
}

/* Reads what was answered. */
static void judge(run_t *run)
{
    static uint8_t bytes[OUTPUT_CAP];
    ssize_t n = recv(run->fds[0], bytes, sizeof(bytes), MSG_DONTWAIT);
    size_t n_bytes = (n > 0) ? (size_t)n : 0U;
    size_t at = 0;
    uint64_t i = 0; /* which message */
    bool is_over = false;

    for (fv_ctl_header_t header; at + sizeof(header) <= n_bytes; i++) {
        memcpy(&header, bytes + at, sizeof(header));
        at += sizeof(header);
        check(!is_over && (i < run->n_sent) && (run->fates[i] != FATE_END), "an answer too many");
        check((header.magic == FV_CTL_MAGIC) && (header.epoch == run->epoch), "not an answer");
        check(header.body_bytes <= n_bytes - at, "an answer without its end");
        check(header.seq == run->n_answered + i, "answers out of order");
        is_over = judge_body(&header, bytes + at) && (run->fates[i] == FATE_STEP);
        at += header.body_bytes;
    }
    check(at == n_bytes, "half an answer");
    check(is_over || (i == run->n_sent) || (run->fates[i] == FATE_END), "no answer");
}

static void open_connection(run_t *run)
{
    int size = (int)OUTPUT_CAP;

    check(socketpair(AF_UNIX, SOCK_STREAM, 0, run->fds) == 0, "socketpair");
    for (int i = 0; i < 2; i++) {
        (void)setsockopt(run->fds[i], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
    }
    run->n_answered = run->seq;
    run->n_sent = 0;
}

/* Lets the worker serve what was sent on this connection; false when it can not go on. */
static bool serve(run_t *run)
{
    static fv_ctl_epoch_t next;
    MPI_Comm comm = MPI_COMM_SELF;

    (void)shutdown(run->fds[0], SHUT_WR);
    fv_status_t status =
        fv_worker_serve(run->worker, run->fds[1], run->epoch, (void *)&comm, &next);
    judge(run);
    (void)close(run->fds[0]);
    (void)close(run->fds[1]);
    if (status == FV_ERR_ABORTED) {
        check(next.epoch > run->epoch, "an epoch that is none");
        run->epoch = next.epoch;
        fv_worker_renew(run->worker);
    } else {
        check((status == FV_OK) || (fv_error_context()[0] != '\0'), "ended without a text");
    }
    return (status != FV_OK) && (fv_worker_usable(run->worker) == FV_OK);
}

/* ------------------------------------------------------------------ the whole */

/* One message of the input; returns what it took of it. */
static size_t send_next(run_t *run, const uint8_t *data, size_t n_bytes)
{
    static message_t m; /* large for a stack */
    size_t n_patches = data[4] % 8U;
    size_t at = RECORD_BYTES;

    memset(&m, 0, sizeof(m));
    m.header = (fv_ctl_header_t){.magic = FV_CTL_MAGIC, .epoch = run->epoch, .seq = run->seq++};
    build(run, &m, data);
    uint64_t seq = m.header.seq;
    for (; (n_patches > 0) && (at + PATCH_BYTES <= n_bytes); n_patches--, at += PATCH_BYTES) {
        patch(&m, data + at);
    }
    m.header.seq = seq;
    limit(&m);
    set_sizes(run, &m);
    deliver(run, &m);
    return at;
}

static void close_all(run_t *run)
{
    fv_ctl_memory_t memory;

    for (uint32_t slot = 0; slot < run->worker->n_session_slots; slot++) {
        if (fv_worker_session(run->worker, slot) != NULL) {
            fv_ctl_close_t message = {.session_slot = slot};
            check(fv_worker_close(run->worker, &message) == FV_OK, "a session can not be closed");
        }
    }
    fv_worker_memory(run->worker, &memory);
    check(memory.kv_bytes_free == memory.kv_bytes_total, "pages are lost");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    if (n_bytes < 1U + RECORD_BYTES) {
        return 0;
    }
    run_t run = {.worker = make_worker(data[0] % 64U == 63U), .epoch = 1};
    bool is_alive = true;
    size_t at = 1;

    fv_no_mpi_byte = data[0];
    for (int i = 0; is_alive && (i < MESSAGES_MAX) && (at + RECORD_BYTES <= n_bytes);) {
        bool goes_on = true;
        open_connection(&run);
        for (int n = 0; goes_on && (n < TOGETHER_MAX) && (at + RECORD_BYTES <= n_bytes); n++, i++) {
            goes_on = (data[at] & TOGETHER) != 0U;
            at += send_next(&run, data + at, n_bytes - at);
        }
        is_alive = serve(&run);
    }
    if (fv_worker_usable(run.worker) == FV_OK) {
        close_all(&run);
    }
    fv_worker_destroy(run.worker);
    return 0;
}
