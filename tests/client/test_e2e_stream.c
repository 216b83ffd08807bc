/*
 * test_e2e_stream.c - streams: many requests in flight, callbacks, threads, cancellation.
 */
#include "tests/client/e2e.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#define N_IN_FLIGHT 100

static fv_e2e_t g_e2e;
static fovea_model_spec_t g_spec = {.name = "streams",
                                    .n_layers = 1,
                                    .n_q_heads = 4,
                                    .n_kv_heads = 2,
                                    .head_dim_qk = 32,
                                    .head_dim_v = 32,
                                    .kv_dtype = FOVEA_DTYPE_F32};
static fovea_model_t g_model;

static int setup(void **state)
{
    static const char *const k_extra[] = {"--kv-memory=128m", NULL};
    fovea_error_t error;

    if (fv_e2e_setup(&g_e2e, state, k_extra) != 0) {
        return -1;
    }
    return (fovea_register_model(g_e2e.client, &g_spec, 0, &g_model, &error) == FOVEA_OK) ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    return fv_e2e_teardown(&g_e2e);
}

/* N requests, each on a session of its own. */
typedef struct fv_fleet {
    fv_mirror_t mirrors[N_IN_FLIGHT];
    fv_exam_t exams[N_IN_FLIGHT];
    uint64_t tickets[N_IN_FLIGHT];
    atomic_int n_done[N_IN_FLIGHT];
    atomic_int n_failed;
    fovea_stream_t *stream;
    int n;
} fv_fleet_t;

static fv_fleet_t *fleet_create(fv_e2e_t *e, int n, const fovea_stream_options_t *options)
{
    fv_fleet_t *f = calloc(1, sizeof(*f));
    fovea_error_t error = {FOVEA_OK, ""};

    assert_non_null(f);
    f->n = n;
    for (int i = 0; i < n; i++) {
        fovea_session_id_t session = fv_e2e_open(e, &g_model);
        fv_mirror_t *m = &f->mirrors[i];
        uint32_t n_tokens = (uint32_t)fv_random_int(&e->random, 1, 40);
        fv_mirror_init(m, &g_spec, &session, 0, 256);
        fv_exam_init(&f->exams[i], &m, &n_tokens, 1, FOVEA_DTYPE_F32, 0, &e->random);
    }
    fv_assert_ok(fovea_stream_open(e->client, options, &f->stream, &error), error);
    return f;
}

static void fleet_destroy(fv_e2e_t *e, fv_fleet_t *f)
{
    fovea_stream_close(f->stream);
    for (int i = 0; i < f->n; i++) {
        fv_e2e_close(e, &f->mirrors[i].session);
        fv_exam_fini(&f->exams[i]);
        fv_mirror_fini(&f->mirrors[i]);
    }
    free(f);
}

static void submit_all(fv_fleet_t *f, fovea_done_fn_t done)
{
    fovea_error_t error = {FOVEA_OK, ""};

    for (int i = 0; i < f->n; i++) {
        fv_assert_ok(fovea_stream_submit(f->stream, &f->exams[i].request, done,
                                         (done != NULL) ? (void *)f : (void *)&f->exams[i],
                                         &f->tickets[i], &error),
                     error);
    }
}

static void check_all(fv_fleet_t *f)
{
    for (int i = 0; i < f->n; i++) {
        assert_int_equal(fv_exam_check(&f->exams[i]), 0);
    }
}

/* Collected backwards, by ticket: order of finishing must not matter. */
static void test_hundred_in_flight_waited_for(void **state)
{
    fv_e2e_t *e = *state;
    fv_fleet_t *f = fleet_create(e, N_IN_FLIGHT, NULL);
    fovea_error_t error = {FOVEA_OK, ""};
    fovea_result_t result;

    submit_all(f, NULL);
    for (int i = N_IN_FLIGHT - 1; i >= 0; i--) {
        fv_assert_ok(fovea_stream_wait(f->stream, f->tickets[i], 0, &result, &error), error);
        fv_assert_ok(result.error.code, result.error);
        assert_int_equal(result.ticket, f->tickets[i]);
        assert_ptr_equal(result.user, &f->exams[i]);
    }
    check_all(f);
    assert_int_equal(fovea_stream_in_flight(f->stream), 0);
    (void)fovea_stream_wait(f->stream, f->tickets[3], 0, &result, &error);
    fv_assert_error(&error, FOVEA_NOT_FOUND, "ticket", NULL, NULL); /* collected already */
    fleet_destroy(e, f);
}

static void test_polled_in_order_of_finishing(void **state)
{
    fv_e2e_t *e = *state;
    fv_fleet_t *f = fleet_create(e, 50, NULL);
    fovea_error_t error = {FOVEA_OK, ""};
    fovea_result_t result;
    int n_seen = 0;

    submit_all(f, NULL);
    while (fovea_stream_poll(f->stream, 10000, &result, &error) == FOVEA_OK) {
        fv_exam_t *exam = result.user;
        fv_assert_ok(result.error.code, result.error);
        assert_int_equal(fv_exam_check(exam), 0);
        n_seen++;
    }
    fv_assert_error(&error, FOVEA_NOT_FOUND, "in flight", NULL, NULL);
    assert_int_equal(n_seen, 50);
    fleet_destroy(e, f);
}

static void on_done(const fovea_result_t *result)
{
    fv_fleet_t *f = result->user;

    for (int i = 0; i < f->n; i++) {
        if (f->tickets[i] == result->ticket) {
            (void)atomic_fetch_add(&f->n_done[i], 1);
        }
    }
    if (result->error.code != FOVEA_OK) {
        (void)atomic_fetch_add(&f->n_failed, 1);
    }
}

static void check_each_done_once(fv_fleet_t *f)
{
    for (int i = 0; i < f->n; i++) {
        assert_int_equal(atomic_load(&f->n_done[i]), 1);
    }
}

static void test_callbacks(void **state)
{
    fv_e2e_t *e = *state;
    fv_fleet_t *f = fleet_create(e, N_IN_FLIGHT, NULL);
    fovea_error_t error = {FOVEA_OK, ""};
    fovea_result_t result;

    submit_all(f, on_done); /* nobody drives yet, so no callback can precede its ticket */
    fv_assert_ok(fovea_stream_flush(f->stream, 0, &error), error);
    check_each_done_once(f);
    assert_int_equal(atomic_load(&f->n_failed), 0);
    check_all(f);
    assert_int_equal(fovea_stream_poll(f->stream, 0, &result, &error), FOVEA_NOT_FOUND);
    fleet_destroy(e, f);
}

/* Four threads wait on one stream, with and without a thread of its own. */
typedef struct fv_waiter {
    fv_fleet_t *fleet;
    int first, n_bad;
} fv_waiter_t;

static void *wait_for_quarter(void *arg)
{
    fv_waiter_t *w = arg;

    for (int i = w->first; i < w->fleet->n; i += 4) {
        fovea_result_t result = {0};
        if ((fovea_stream_submit(w->fleet->stream, &w->fleet->exams[i].request, NULL, NULL,
                                 &w->fleet->tickets[i], NULL) != FOVEA_OK) ||
            (fovea_stream_wait(w->fleet->stream, w->fleet->tickets[i], 0, &result, NULL) !=
             FOVEA_OK) ||
            (result.error.code != FOVEA_OK)) {
            w->n_bad++;
        }
    }
    return NULL;
}

static void run_waiters(fv_e2e_t *e, bool with_thread)
{
    fovea_stream_options_t options = {.with_thread = with_thread};
    fv_fleet_t *f = fleet_create(e, N_IN_FLIGHT, &options);
    fv_waiter_t waiters[4];
    pthread_t threads[4];

    for (int i = 0; i < 4; i++) {
        waiters[i] = (fv_waiter_t){.fleet = f, .first = i};
        assert_int_equal(pthread_create(&threads[i], NULL, wait_for_quarter, &waiters[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
        assert_int_equal(waiters[i].n_bad, 0);
    }
    check_all(f);
    fleet_destroy(e, f);
}

static void test_many_threads(void **state)
{
    run_waiters(*state, false);
    run_waiters(*state, true);
}

/* With a thread of its own a stream needs nobody: callbacks come by themselves. */
static void test_thread_of_its_own(void **state)
{
    fv_e2e_t *e = *state;
    fovea_stream_options_t options = {.with_thread = true};
    fv_fleet_t *f = fleet_create(e, 20, &options);
    fovea_error_t error = {FOVEA_OK, ""};

    for (int i = 0; i < f->n; i++) {
        fv_assert_ok(fovea_stream_submit(f->stream, &f->exams[i].request, on_done, f, NULL, &error),
                     error);
    }
    while (fovea_stream_in_flight(f->stream) > 0) {
        struct timespec t = {.tv_nsec = 1000000};
        (void)nanosleep(&t, NULL); /* not inside the stream: only its thread can drive it */
    }
    assert_int_equal(atomic_load(&f->n_failed), 0);
    check_all(f);
    fleet_destroy(e, f);
}

/* A callback submits the next decode step: the usual shape of a frontend. */
typedef struct fv_chain {
    fv_e2e_t *e;
    fovea_stream_t *stream;
    fv_mirror_t mirror;
    fv_exam_t exam;
    int n_left;
    size_t n_bad;
    fovea_error_t error;
} fv_chain_t;

static void next_step(const fovea_result_t *result)
{
    fv_chain_t *c = result->user;
    fv_mirror_t *m = &c->mirror;
    uint32_t one = 1;

    c->n_bad += (result->error.code == FOVEA_OK) ? fv_exam_check(&c->exam) : 1U;
    if (--c->n_left == 0) {
        return;
    }
    fv_exam_fini(&c->exam);
    fv_exam_init(&c->exam, &m, &one, 1, FOVEA_DTYPE_F32, 0, &c->e->random);
    (void)fovea_stream_submit(c->stream, &c->exam.request, next_step, c, NULL, &c->error);
}

static void test_callback_submits_the_next(void **state)
{
    fv_e2e_t *e = *state;
    fv_chain_t c = {.e = e, .n_left = 30};
    fv_mirror_t *m = &c.mirror;
    fovea_session_id_t session = fv_e2e_open(e, &g_model);
    uint32_t n_tokens = 20;

    fv_mirror_init(&c.mirror, &g_spec, &session, 0, 64);
    fv_assert_ok(fovea_stream_open(e->client, NULL, &c.stream, &c.error), c.error);
    fv_exam_init(&c.exam, &m, &n_tokens, 1, FOVEA_DTYPE_F32, 0, &e->random);
    fv_assert_ok(fovea_stream_submit(c.stream, &c.exam.request, next_step, &c, NULL, &c.error),
                 c.error);
    fv_assert_ok(fovea_stream_flush(c.stream, 0, &c.error), c.error);
    assert_int_equal(c.n_left, 0);
    assert_int_equal(c.n_bad, 0);
    fovea_stream_close(c.stream);
    fv_exam_fini(&c.exam);
    fv_mirror_fini(&c.mirror);
    fv_e2e_close(e, &session);
}

static void test_a_failed_request_fails_alone(void **state)
{
    fv_e2e_t *e = *state;
    fv_fleet_t *f = fleet_create(e, 3, NULL);
    fovea_error_t error = {FOVEA_OK, ""};
    fovea_result_t result;

    f->exams[1].items[0].session = (fovea_session_id_t){{0xAB}}; /* nobody's */
    submit_all(f, NULL);
    for (int i = 0; i < 3; i++) {
        fv_assert_ok(fovea_stream_wait(f->stream, f->tickets[i], 0, &result, &error), error);
        if (i == 1) {
            fv_assert_error(&result.error, FOVEA_NOT_FOUND, "ab000000", NULL, NULL);
        } else {
            fv_assert_ok(result.error.code, result.error);
            assert_int_equal(fv_exam_check(&f->exams[i]), 0);
        }
    }
    fleet_destroy(e, f);
}

static void test_cancel_finishes_everything(void **state)
{
    fv_e2e_t *e = *state;
    fv_fleet_t *f = fleet_create(e, N_IN_FLIGHT, NULL);
    fovea_error_t error = {FOVEA_OK, ""};

    submit_all(f, on_done);
    fovea_stream_cancel(f->stream);
    fv_assert_ok(fovea_stream_flush(f->stream, 0, &error), error);
    check_each_done_once(f);
    assert_true(atomic_load(&f->n_failed) > 0); /* the later ones had not even been sent */
    (void)fovea_stream_submit(f->stream, &f->exams[0].request, NULL, NULL, NULL, &error);
    fv_assert_error(&error, FOVEA_CANCELLED, "broken", NULL, NULL);
    fleet_destroy(e, f);
}

/* Closing with requests in flight runs their callbacks; uncollected results are dropped. */
static void test_close_with_requests_in_flight(void **state)
{
    fv_e2e_t *e = *state;

    for (int with_thread = 0; with_thread < 2; with_thread++) {
        fovea_stream_options_t options = {.with_thread = with_thread != 0};
        fv_fleet_t *f = fleet_create(e, 40, &options);
        submit_all(f, NULL);
        fovea_stream_close(f->stream);
        fv_assert_ok(fovea_stream_open(e->client, NULL, &f->stream, NULL),
                     ((fovea_error_t){FOVEA_UNAVAILABLE, "the connection suffered"}));
        fleet_destroy(e, f);
    }
}

/* Large tensors cut short while gRPC is sending them: their memory must be free when close returns. */
static void test_cancel_large_requests(void **state)
{
    enum {
        N = 4,
        TOKENS = 4096
    };
    fv_e2e_t *e = *state;
    fovea_model_spec_t spec = {.name = "large",
                               .n_layers = 1,
                               .n_q_heads = 16,
                               .n_kv_heads = 1,
                               .head_dim_qk = 64,
                               .head_dim_v = 64,
                               .kv_dtype = FOVEA_DTYPE_F32};
    fovea_model_t model = fv_e2e_model(e, &spec);
    size_t q_bytes = (size_t)TOKENS * spec.n_q_heads * spec.head_dim_qk * sizeof(float);
    size_t k_bytes = (size_t)TOKENS * spec.head_dim_qk * sizeof(float);
    fovea_error_t error = {FOVEA_OK, ""};
    fovea_session_id_t sessions[N];
    fovea_stream_t *stream = NULL;
    void *memory[N];

    fv_assert_ok(fovea_stream_open(e->client, NULL, &stream, &error), error);
    for (int i = 0; i < N; i++) {
        sessions[i] = fv_e2e_open(e, &model);
        memory[i] = calloc(1, (2 * q_bytes) + (2 * k_bytes));
        assert_non_null(memory[i]);
        uint8_t *at = memory[i];
        fovea_attend_item_t item = {.session = sessions[i], .n_tokens = TOKENS};
        fovea_attend_request_t r = {.dtype = FOVEA_DTYPE_F32,
                                    .n_items = 1,
                                    .items = &item,
                                    .q = at,
                                    .q_bytes = q_bytes,
                                    .k = at + q_bytes,
                                    .k_bytes = k_bytes,
                                    .v = at + q_bytes + k_bytes,
                                    .v_bytes = k_bytes,
                                    .out = at + q_bytes + (2 * k_bytes),
                                    .out_bytes = q_bytes};
        fv_assert_ok(fovea_stream_submit(stream, &r, NULL, NULL, NULL, &error), error);
    }
    fovea_stream_close(stream);
    for (int i = 0; i < N; i++) { /* the address sanitizer sees whoever still reads it */
        memset(memory[i], 0xAA, q_bytes);
        free(memory[i]);
        fv_e2e_close(e, &sessions[i]);
    }
}

/*
 * The service is stopped (SIGSTOP) while tensors are being sent, and the call is cut short: they sit half
 * sent in the connection, which no longer knows the call. Freed too early they would be read by the
 * kernel, which the address sanitizer sees.
 */
typedef struct fv_big {
    fovea_attend_item_t item; /* of nobody's session: refused, but only when it has arrived */
    fovea_attend_request_t request;
    void *q;
    uint8_t out[4];
} fv_big_t;

static void big_init(fv_big_t *b)
{
    memset(b, 0, sizeof(*b));
    b->q = calloc(1, 8U << 20U);
    assert_non_null(b->q);
    b->item.n_tokens = 1;
    b->request = (fovea_attend_request_t){.dtype = FOVEA_DTYPE_F32,
                                          .flags = FOVEA_ATTEND_QUERY_ONLY,
                                          .n_items = 1,
                                          .items = &b->item,
                                          .q = b->q,
                                          .q_bytes = 8U << 20U,
                                          .out = b->out,
                                          .out_bytes = sizeof(b->out)};
}

static void *continue_later(void *arg)
{
    const struct timespec t = {.tv_nsec = 400000000};

    (void)nanosleep(&t, NULL);
    (void)kill(((fv_e2e_t *)arg)->fovead.pid, SIGCONT);
    return NULL;
}

static void test_cut_short_while_the_service_stands_still(void **state)
{
    fv_e2e_t *e = *state;
    fovea_stream_t *stream = NULL;
    fovea_error_t error = {FOVEA_OK, ""};
    pthread_t thread;
    fv_big_t b;

    if (getenv("FV_TEST_LAUNCH") != NULL) {
        skip(); /* the process to stop is then not ours */
    }
    for (int i = 0; i < 8;
         i++) { /* afterwards HTTP/2's windows let megabytes into the connection */
        big_init(&b);
        (void)fovea_attend(e->client, &b.request, 0, NULL, &error);
        fv_assert_error(&error, FOVEA_NOT_FOUND, NULL, NULL, NULL);
        free(b.q);
    }
    for (int on_stream = 0; on_stream < 2; on_stream++) {
        big_init(&b);
        assert_int_equal(kill(e->fovead.pid, SIGSTOP), 0);
        assert_int_equal(pthread_create(&thread, NULL, continue_later, e), 0);
        if (on_stream == 0) {
            (void)fovea_attend(e->client, &b.request, 100, NULL, &error);
            fv_assert_error(&error, FOVEA_DEADLINE_EXCEEDED, NULL, NULL, NULL);
        } else {
            fv_assert_ok(fovea_stream_open(e->client, NULL, &stream, &error), error);
            fv_assert_ok(fovea_stream_submit(stream, &b.request, NULL, NULL, NULL, &error), error);
            (void)fovea_stream_poll(stream, 100, NULL, &error); /* time to get under way */
            fovea_stream_close(stream);
        }
        free(b.q);
        assert_int_equal(pthread_join(thread, NULL), 0);
    }
}

/* Deadlines: of a call that cannot be answered so fast, and of waiting. */
static void test_deadlines(void **state)
{
    enum {
        TOKENS = 2048
    };
    fv_e2e_t *e = *state;
    fovea_model_spec_t spec = {.name = "slow",
                               .n_layers = 1,
                               .n_q_heads = 16,
                               .n_kv_heads = 1,
                               .head_dim_qk = 128,
                               .head_dim_v = 128,
                               .kv_dtype = FOVEA_DTYPE_F32};
    fovea_model_t model = fv_e2e_model(e, &spec);
    fovea_session_id_t session = fv_e2e_open(e, &model);
    fovea_stream_t *stream = NULL;
    fovea_result_t result;
    fovea_error_t error = {FOVEA_OK, ""};
    uint64_t ticket = 0;
    uint32_t n_tokens = TOKENS;
    fv_mirror_t m;
    fv_mirror_t *all = &m;
    fv_exam_t exam;

    fv_mirror_init(&m, &spec, &session, 0, TOKENS);
    fv_exam_init(&exam, &all, &n_tokens, 1, FOVEA_DTYPE_F32, 0, &e->random);
    (void)fovea_attend(e->client, &exam.request, 1, NULL, &error);
    fv_assert_error(&error, FOVEA_DEADLINE_EXCEEDED, NULL, NULL, NULL);
    fv_assert_ok(fovea_stream_open(e->client, NULL, &stream, &error), error);
    /* The same again: whether or not the first one was appended, this is answered. */
    fv_assert_ok(fovea_stream_submit(stream, &exam.request, NULL, NULL, &ticket, &error), error);
    (void)fovea_stream_wait(stream, ticket, 1, &result, &error);
    fv_assert_error(&error, FOVEA_DEADLINE_EXCEEDED, "1 ms", NULL, NULL);
    fv_assert_ok(fovea_stream_wait(stream, ticket, 60000, &result, &error), error);
    fv_assert_ok(result.error.code, result.error);
    fovea_stream_close(stream);
    fv_exam_fini(&exam);
    fv_mirror_fini(&m);
    fv_e2e_close(e, &session);
}

/* Twenty clients come and go, some mid-stream: the service and this client do not care. */
static void test_clients_that_vanish(void **state)
{
    fv_e2e_t *e = *state;
    fovea_error_t error = {FOVEA_OK, ""};

    for (int i = 0; i < 20; i++) {
        fovea_client_t *client = NULL;
        fovea_client_t *before = e->client;
        fv_assert_ok(fovea_connect(e->fovead.address, NULL, &client, &error), error);
        e->client = client;
        fv_fleet_t *f = fleet_create(e, 5, NULL);
        submit_all(f, NULL);
        fovea_stream_close(f->stream);
        f->stream = NULL;
        fleet_destroy(e, f);
        e->client = before;
        fovea_close(client);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_hundred_in_flight_waited_for),
        cmocka_unit_test(test_polled_in_order_of_finishing),
        cmocka_unit_test(test_callbacks),
        cmocka_unit_test(test_many_threads),
        cmocka_unit_test(test_thread_of_its_own),
        cmocka_unit_test(test_callback_submits_the_next),
        cmocka_unit_test(test_a_failed_request_fails_alone),
        cmocka_unit_test(test_cancel_finishes_everything),
        cmocka_unit_test(test_close_with_requests_in_flight),
        cmocka_unit_test(test_cancel_large_requests),
        cmocka_unit_test(test_cut_short_while_the_service_stands_still),
        cmocka_unit_test(test_deadlines),
        cmocka_unit_test(test_clients_that_vanish),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
