/*
 * test_engine.c - the engine's order of things: two steps under way, commands, failures.
 *
 * Goal:   every message is answered exactly once, those served in pieces or given up between two of them as well; at most
 *         FV_STEP_DEPTH steps are under way, and n + 2 begins only when every rank is done with n; commands reach ranks only
 *         when nothing is under way, and not between two pieces of their session's request, also those that undo what
 *         failed; a next step is begun while one is under way, also while our own share runs; a lost rank ends both
 *         steps at once.
 * Method: the real engine and scheduler core between a door and ranks that are made up here: ranks answer when chance says
 *         so, our own share gives the engine a random number of looks and brings new messages meanwhile. Each seed is one
 *         story; FV_SEED repeats it.
 */
#include "coord/engine_internal.h"
#include "coord/sched_internal.h"
#include "tests/support/random.h"
#include "tests/support/sched_case.h"
#include "tests/support/test.h"

#include <stdlib.h>
#include <string.h>

#define N_RANKS    3U
#define N_SESSIONS 6
#define N_CALLS    4000
#define N_STORIES  60
#define SLAB_BYTES (64U * 1024U)

struct fv_link {
    int unused;
};

struct fv_rpc {
    int unused;
};

struct fv_call {
    fv_method_t method;
    int n_refs, n_answers;
    void *user;
    bool is_closed;
};

/* A rank's step as the link knows it. */
typedef struct rank_step {
    uint64_t step_id; /* 0: none */
    uint32_t n_items;
} rank_step_t;

static struct {
    fv_random_t random;
    fv_engine_t *engine;
    fv_link_t link;
    fv_rpc_t rpc;
    fv_model_spec_t spec;
    char model_id[FV_MODEL_ID_BYTES];
    fv_session_id_t sessions[N_SESSIONS];
    fv_call_t *calls[N_CALLS];
    int n_calls, n_calls_max; /* of an event's turn */
    rank_step_t steps[FV_STEP_DEPTH][N_RANKS];
    int n_commands_out[N_RANKS]; /* sent, not answered */
    bool is_local_running, is_dead;
    void (*on_wait)(void *arg);
    void *on_wait_arg;
    uint64_t n_held, n_given_up; /* commands, and requests, of sessions between two pieces */
    uint64_t n_pairs, n_pairs_in_local, n_failed, n_commands, n_served;
} g;

static int64_t pick(int64_t low, int64_t high)
{
    return fv_random_int(&g.random, low, high);
}

/* ------------------------------------------------------------------ the door */

void fv_call_ref(fv_call_t *call)
{
    call->n_refs++;
}

void fv_call_unref(fv_call_t *call)
{
    assert_true(call->n_refs > 0);
    call->n_refs--;
}

bool fv_call_is_closed(const fv_call_t *call)
{
    return call->is_closed;
}

fv_method_t fv_call_method(const fv_call_t *call)
{
    return call->method;
}

void *fv_call_user(const fv_call_t *call)
{
    return call->user;
}

void fv_call_set_user(fv_call_t *call, void *user)
{
    call->user = user;
}

void fv_call_step_aside(fv_call_t *call)
{
    (void)call; /* there is one thread here */
}

void fv_call_step_back(fv_call_t *call)
{
    (void)call;
}

fv_status_t fv_call_recheck(const fv_call_t *call)
{
    (void)call;
    return FV_OK;
}

void fv_call_end_request(fv_call_t *call)
{
    assert_true(call->n_refs > 0);
}

fv_principal_t *fv_call_principal(const fv_call_t *call)
{
    (void)call;
    return NULL;
}

void fv_call_reply(fv_call_t *call, const fv_reply_piece_t *pieces, size_t n_pieces)
{
    for (size_t i = 0; i < n_pieces; i++) {
        if (pieces[i].release != NULL) {
            pieces[i].release(pieces[i].arg);
        }
    }
    call->n_answers++;
    g.n_served++;
}

void fv_call_fail(fv_call_t *call, int32_t grpc_code, const char *message)
{
    (void)message;
    assert_int_not_equal(grpc_code, 0);
    call->n_answers++;
}

void fv_rpc_set_serving(fv_rpc_t *rpc, bool is_serving)
{
    (void)rpc;
    (void)is_serving;
}

void fv_rpc_stop(fv_rpc_t *rpc, uint32_t grace_ms)
{
    (void)rpc;
    (void)grace_ms;
}

int32_t fv_rpc_n_addresses(const fv_rpc_t *rpc)
{
    (void)rpc;
    return 0;
}

const char *fv_rpc_address(const fv_rpc_t *rpc, int32_t i)
{
    (void)rpc;
    (void)i;
    return "";
}

/* ------------------------------------------------------------------ the ranks */

static fv_ctl_memory_t memory_of_rank(void)
{
    return fv_case_memory(1000, SLAB_BYTES);
}

/* Steps begun on a rank and not seen to end; *out_oldest among them. */
static size_t count_under_way(uint64_t *out_oldest)
{
    uint64_t ids[FV_STEP_DEPTH];
    size_t n = 0;

    *out_oldest = UINT64_MAX;
    for (uint32_t slot = 0; slot < FV_STEP_DEPTH; slot++) {
        for (uint32_t r = 0; r < N_RANKS; r++) {
            uint64_t id = g.steps[slot][r].step_id;
            if ((id != 0) && ((n == 0) || (ids[n - 1U] != id))) {
                assert_true(n < FV_STEP_DEPTH);
                ids[n++] = id;
                *out_oldest = (id < *out_oldest) ? id : *out_oldest;
            }
        }
    }
    return n;
}

fv_status_t
fv_link_step_begin(fv_link_t *link, uint32_t slot, uint32_t rank, const fv_link_step_t *step)
{
    uint64_t oldest = 0;

    assert_ptr_equal(link, &g.link);
    assert_true((slot < FV_STEP_DEPTH) && (rank > 0) && (rank < N_RANKS));
    assert_int_equal(g.steps[slot][rank].step_id, 0);
    for (uint32_t r = 0; r < N_RANKS; r++) { /* a slot is one step's */
        assert_true((g.steps[slot][r].step_id == 0) ||
                    (g.steps[slot][r].step_id == step->head.step_id));
    }
    g.steps[slot][rank] =
        (rank_step_t){.step_id = step->head.step_id, .n_items = step->head.n_items};
    if (count_under_way(&oldest) > 1U) {
        assert_true(oldest < step->head.step_id);
        g.n_pairs++;
    }
    g.n_pairs_in_local += g.is_local_running ? 1U : 0U;
    return FV_OK;
}

fv_status_t fv_link_step_flush(fv_link_t *link, uint32_t slot)
{
    (void)link;
    (void)slot;
    return FV_OK;
}

fv_status_t fv_link_step_push(fv_link_t *link, uint32_t slot)
{
    (void)link;
    (void)slot;
    return FV_OK;
}

static void fail_one(fv_ctl_done_t *out, fv_error_t *item_errors, size_t n_items)
{
    item_errors[pick(0, (int64_t)n_items - 1)] =
        (fv_error_t){.status = FV_ERR_EXHAUSTED, .text = "made up"};
    out->error.status = FV_ERR_EXHAUSTED;
    out->n_items = (uint32_t)n_items;
    g.n_failed++;
}

fv_status_t fv_link_step_test(fv_link_t *link,
                              uint32_t slot,
                              uint32_t rank,
                              bool *out_is_done,
                              fv_ctl_done_t *out,
                              fv_error_t *item_errors,
                              size_t n_items)
{
    rank_step_t *step = &g.steps[slot][rank];
    const rank_step_t *other = &g.steps[1U - slot][rank];

    (void)link;
    assert_int_not_equal(step->step_id, 0);
    assert_true((other->step_id == 0) || (other->step_id > step->step_id)); /* in order */
    assert_int_equal(step->n_items, n_items);
    *out_is_done = !g.is_dead && (pick(0, 3) == 0);
    if (*out_is_done) {
        *step = (rank_step_t){0};
        *out = (fv_ctl_done_t){.memory = memory_of_rank(), .compute_us = 5};
        if (pick(0, 39) == 0) {
            fail_one(out, item_errors, n_items);
        }
    }
    return FV_OK;
}

/* A client's truncation waits for a request that is half-way; what undoes that request does not. */
static void check_not_half_way(const fv_ctl_truncate_t *cut)
{
    for (int i = 0; (cut->layer == UINT32_MAX) && (i < N_SESSIONS); i++) {
        const fv_session_t *session = fv_sched_session(g.engine->sched, &g.sessions[i]);
        assert_false((session->slot == cut->session_slot) && fv_sched_is_half_way(session));
    }
}

fv_status_t
fv_link_send(fv_link_t *link, uint32_t rank, fv_ctl_type_t type, const void *body, size_t n_bytes)
{
    uint64_t oldest = 0;

    (void)link;
    (void)n_bytes;
    if (type == FV_CTL_TRUNCATE) {
        check_not_half_way(body);
    }
    assert_int_equal(count_under_way(&oldest), 0);
    assert_false(g.is_local_running);
    g.n_commands_out[rank]++;
    return FV_OK;
}

fv_status_t fv_link_wait_kept(fv_link_t *link,
                              uint32_t rank,
                              fv_ctl_done_t *out,
                              uint64_t *floors,
                              size_t n_layers)
{
    (void)link;
    (void)rank;
    (void)out;
    (void)floors;
    (void)n_layers;
    return fv_fail(FV_ERR_INTERNAL, "nothing was kept here");
}

fv_status_t fv_link_wait_done(fv_link_t *link, uint32_t rank, fv_ctl_done_t *out)
{
    (void)link;
    assert_int_equal(g.n_commands_out[rank]--, 1);
    *out = (fv_ctl_done_t){.memory = memory_of_rank()};
    g.n_commands++;
    return FV_OK;
}

fv_status_t fv_link_check(fv_link_t *link)
{
    (void)link;
    return g.is_dead ? fv_fail(FV_ERR_RANK_LOST, "rank 2 is gone") : FV_OK;
}

bool fv_link_is_lost(const fv_link_t *link, uint32_t rank)
{
    (void)link;
    return g.is_dead && (rank == 2U);
}

void fv_link_declare_silent(fv_link_t *link, uint32_t rank, uint32_t silent_ms)
{
    (void)link;
    (void)rank;
    (void)silent_ms;
    fail(); /* no rank of this test is that slow */
}

uint32_t fv_link_deadline_ms(const fv_link_t *link)
{
    (void)link;
    return 5000;
}

void fv_link_on_wait(fv_link_t *link, void (*on_wait)(void *arg), void *arg)
{
    (void)link;
    (void)on_wait;
    (void)arg;
}

size_t fv_link_pollfds(const fv_link_t *link, struct pollfd *out, size_t cap)
{
    (void)link;
    (void)out;
    (void)cap;
    return 0;
}

/* ------------------------------------------------------------------ messages */

static fv_call_t *new_call(fv_method_t method)
{
    fv_call_t *call = calloc(1, sizeof(*call));

    assert_non_null(call);
    assert_true(g.n_calls < N_CALLS);
    call->method = method;
    g.calls[g.n_calls++] = call;
    return call;
}

static void deliver(fv_call_t *call, const void *data, size_t n_bytes)
{
    fv_span_t span = {.data = data, .n_bytes = n_bytes};

    fv_engine_on_message(g.engine, call, call->method, &span, 1, 0, INT64_MAX);
}

/* A query of a session's one layer; large: of enough bytes to be begun early. */
static void deliver_attend(bool is_large)
{
    static uint8_t message[1 << 22];
    const fv_session_id_t *id = &g.sessions[pick(0, N_SESSIONS - 1)];
    uint32_t layer = (uint32_t)pick(0, 1);
    const fv_session_t *session = fv_sched_session(g.engine->sched, id);
    uint32_t n_tokens = is_large ? 4096U : (uint32_t)pick(1, 3);
    fv_attend_item_t item = {
        .session = *id, .position = session->layers[layer].n_tokens, .n_tokens = n_tokens};
    fv_attend_request_t request = {.request_id = 1,
                                   .layer = layer,
                                   .n_items = 1,
                                   .n_tokens = n_tokens,
                                   .dtype = FV_DTYPE_F32,
                                   .causal = true,
                                   .append = true};
    size_t q_bytes = (size_t)n_tokens * 4U * 16U * 4U;
    size_t kv_bytes = q_bytes / 2U;
    fv_bytes_t head = {0};
    fv_wire_tensor_heads_t heads;
    size_t n = 0;

    assert_int_equal(
        fv_wire_attend_request_encode(&request, &item, q_bytes, kv_bytes, kv_bytes, &head, &heads),
        FV_OK);
    memcpy(message, head.data, head.n_bytes);
    n = head.n_bytes;
    free(head.data);
    const uint8_t *const tensor_heads[3] = {heads.q, heads.k, heads.v};
    const size_t head_bytes[3] = {heads.n_q, heads.n_k, heads.n_v};
    const size_t bytes[3] = {q_bytes, kv_bytes, kv_bytes};
    for (int i = 0; i < 3; i++) {
        memcpy(message + n, tensor_heads[i], head_bytes[i]);
        n += head_bytes[i];
        assert_true(n + bytes[i] <= sizeof(message));
        memset(message + n, 0, bytes[i]);
        n += bytes[i];
    }
    fv_call_t *call = new_call(FV_METHOD_ATTEND_ONCE);
    call->is_closed = pick(0, 29) == 0;
    deliver(call, message, n);
}

/* Cuts a session to nothing. */
static void deliver_truncate(void)
{
    fv_session_request_t request = {.session = g.sessions[pick(0, N_SESSIONS - 1)]};
    fv_bytes_t bytes = {0};

    g.n_held += fv_sched_is_half_way(fv_sched_session(g.engine->sched, &request.session)) ? 1U : 0U;
    assert_int_equal(fv_wire_truncate_request_encode(&request, &bytes), FV_OK);
    deliver(new_call(FV_METHOD_TRUNCATE_SESSION), bytes.data, bytes.n_bytes);
    free(bytes.data);
}

/* The client of some request is gone, maybe half-way. */
static void close_some(void)
{
    for (fv_request_t *r = g.engine->sched->queue_head; r != NULL; r = r->next) {
        if ((r->n_tokens_done > 0) && (pick(0, 9) == 0)) {
            fv_job_of(r)->entry.call->is_closed = true;
            g.n_given_up++;
        }
    }
}

static void deliver_some(void)
{
    close_some();
    for (int64_t n = pick(0, 3); n > 0; n--) {
        int64_t dice = pick(0, 19);
        if (dice == 0) {
            deliver_truncate();
        } else if (dice == 1) {
            deliver(new_call(FV_METHOD_GET_STATUS), "", 0);
        } else {
            deliver_attend(dice < 5);
        }
    }
}

/* ------------------------------------------------------------------ our own share */

static void local_on_wait(void *ctx, void (*on_wait)(void *arg), void *arg)
{
    (void)ctx;
    g.on_wait = on_wait;
    g.on_wait_arg = arg;
}

static fv_status_t local_step(void *ctx,
                              const fv_ctl_item_t *items,
                              const fv_step_io_t *io,
                              size_t n_items,
                              fv_ctl_done_t *out_done,
                              fv_error_t *item_errors)
{
    (void)ctx;
    (void)items;
    (void)io;
    assert_false(g.is_local_running);
    assert_true(n_items > 0);
    g.is_local_running = true;
    for (int64_t n = pick(0, 4); n > 0; n--) {
        if (g.n_calls < g.n_calls_max) { /* else it would never end */
            deliver_some();
        }
        g.on_wait(g.on_wait_arg);
    }
    g.is_local_running = false;
    *out_done = (fv_ctl_done_t){.memory = memory_of_rank()};
    if (pick(0, 39) == 0) {
        fail_one(out_done, item_errors, n_items);
    }
    return FV_OK;
}

static fv_status_t local_truncate(void *ctx, const fv_ctl_truncate_t *message)
{
    (void)ctx;
    (void)message;
    assert_false(g.is_local_running);
    return FV_OK;
}

static void local_memory(void *ctx, fv_ctl_memory_t *out)
{
    (void)ctx;
    *out = memory_of_rank();
}

static const fv_local_ops_t k_local = {.step = local_step,
                                       .truncate = local_truncate,
                                       .memory = local_memory,
                                       .on_wait = local_on_wait};

/* ------------------------------------------------------------------ stories */

static void begin(uint64_t seed)
{
    fv_ctl_hello_t hellos[N_RANKS] = {{.rank = 0}, {.rank = 1}, {.rank = 2}};
    bool is_dedicated = (seed % 3U) == 0;

    g.random.state = seed;
    g.n_calls = 0;
    g.is_dead = false;
    memset(g.steps, 0, sizeof(g.steps));
    for (uint32_t r = is_dedicated ? 1U : 0U; r < N_RANKS; r++) {
        hellos[r].memory = memory_of_rank();
    }
    fv_engine_config_t config = {.sched = {.n_ranks = N_RANKS,
                                           .sessions_max = 64,
                                           .step_tokens_max = 8192,
                                           .prefill_tokens_per_step = (uint32_t)(seed % 4U) * 700U,
                                           .shard_tokens = 64,
                                           .cost = fv_plan_cost_cpu()},
                                 .request_memory_bytes = (size_t)1 << 30,
                                 .local = is_dedicated ? NULL : &k_local,
                                 .local_is_async = (seed % 2U) == 0,
                                 .link = &g.link,
                                 .exchange = "mpi",
                                 .ranks = hellos};
    assert_int_equal(fv_engine_create(&config, &g.engine), FV_OK);
    g.engine->rpc = &g.rpc;
    g.spec = fv_case_spec("m");
    fv_case_register(g.engine->sched, &g.spec, g.model_id);
    for (int i = 0; i < N_SESSIONS; i++) {
        fv_sharding_t sharding = {.mode = (i < 3) ? FV_SHARDING_CONTEXT : FV_SHARDING_HEADS,
                                  .is_set = 1};
        g.sessions[i] = fv_case_open(g.engine->sched, g.model_id, &sharding);
    }
}

static void end(void)
{
    for (int i = 0; i < g.n_calls; i++) {
        assert_int_equal(g.calls[i]->n_answers, 1);
        assert_int_equal(g.calls[i]->n_refs, 0);
        free(g.calls[i]);
    }
    fv_engine_destroy(g.engine);
}

static void test_stories(void **state)
{
    uint64_t first = fv_random_seed(1);
    int n_stories = (getenv("FV_SEED") != NULL) ? 1 : N_STORIES;

    (void)state;
    memset(&g, 0, sizeof(g));
    for (int i = 0; i < n_stories; i++) {
        begin(first + (uint64_t)i);
        for (int event = 0; event < 40; event++) {
            uint64_t oldest = 0;
            g.n_calls_max = g.n_calls + 60;
            deliver_some();
            if (fv_engine_work(g.engine) != FV_OK) {
                fail_msg("%s", fv_error_context());
            }
            assert_int_equal(count_under_way(&oldest), 0); /* it leaves nothing behind */
        }
        for (int turn = 0; (turn < 200) && fv_engine_has_work(g.engine); turn++) {
            if (fv_engine_work(g.engine) != FV_OK) { /* a turn ends after half a second */
                fail_msg("%s", fv_error_context());
            }
        }
        end();
    }
    print_message("%llu answered well; %llu shares begun beside a step, %llu of them while our own "
                  "ran; %llu failures, %llu commands\n",
                  (unsigned long long)g.n_served, (unsigned long long)g.n_pairs,
                  (unsigned long long)g.n_pairs_in_local, (unsigned long long)g.n_failed,
                  (unsigned long long)g.n_commands);
    if (n_stories == N_STORIES) { /* the stories must have something to tell */
        assert_true((g.n_served > 500) && (g.n_pairs > 100) && (g.n_pairs_in_local > 50) &&
                    (g.n_failed > 10) && (g.n_commands > 10) && (g.n_held > 10) &&
                    (g.n_given_up > 10));
    }
}

/* Everything under way is answered; what waits is left to the end of the service. */
static void test_a_lost_rank_ends_all_steps(void **state)
{
    (void)state;
    memset(&g, 0, sizeof(g));
    for (uint64_t seed = 1; seed < 30; seed++) {
        int n_waiting = 0;
        begin(seed);
        deliver_attend(true);
        deliver_attend(true);
        g.is_dead = true;
        assert_int_equal(fv_engine_work(g.engine), FV_ERR_RANK_LOST);
        fv_request_t *left = fv_sched_take_all(g.engine->sched);
        while (left != NULL) {
            fv_request_t *next = left->next;
            fv_reply_refused(fv_job_of(left)->entry.call, FV_METHOD_ATTEND_ONCE, 1,
                             FV_ERR_UNAVAILABLE);
            fv_job_release(fv_job_of(left));
            left = next;
            n_waiting++;
        }
        fv_entry_t *entry = fv_engine_take_inbox(g.engine);
        while (entry != NULL) { /* brought by our own share after the last look */
            fv_entry_t *next = entry->next;
            entry->call->n_answers++;
            if (entry->method == FV_METHOD_ATTEND_ONCE) {
                fv_job_release((fv_job_t *)(void *)entry);
            } else {
                fv_entry_release(entry);
            }
            entry = next;
            n_waiting++;
        }
        for (entry = g.engine->commands; entry != NULL;) {
            fv_entry_t *next = entry->next;
            entry->call->n_answers++;
            fv_entry_release(entry);
            entry = next;
        }
        assert_true(n_waiting < g.n_calls);
        memset(g.steps, 0, sizeof(g.steps));
        end();
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stories),
        cmocka_unit_test(test_a_lost_rank_ends_all_steps),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
