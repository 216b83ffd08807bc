/*
 * test_client_fake.c - the client against a service that answers late, wrongly, or not at all.
 */
#include "client/fovea.h"
#include "tests/client/fake_service.h"
#include "tests/support/test.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define N_MAX 64

typedef struct fv_rig {
    fv_fake_t fake;
    char address[64];
    fovea_client_t *client;
} fv_rig_t;

static fv_rig_t g_rig;

static int setup(void **state)
{
    static int n_rigs;
    fovea_error_t error;

    *state = &g_rig;
    (void)snprintf(g_rig.address, sizeof(g_rig.address), "unix:/tmp/fv-test-fake-%ld-%d",
                   (long)getpid(), n_rigs++);
    if (fv_fake_start(&g_rig.fake, g_rig.address) != FV_OK) {
        return -1;
    }
    const fovea_options_t options = {.retry_ms = -1}; /* failures are what is looked at here */
    return (fovea_connect(g_rig.address, &options, &g_rig.client, &error) == FOVEA_OK) ? 0 : -1;
}

static int teardown(void **state)
{
    char lock[80];

    (void)state;
    fovea_close(g_rig.client);
    fv_fake_stop(&g_rig.fake);
    (void)snprintf(lock, sizeof(lock), "%s.lock", g_rig.address + strlen("unix:"));
    (void)unlink(lock);
    return 0;
}

/* A request with its memory: q_bytes of q, some k for the lse, and room for the echo. */
typedef struct fv_parcel {
    fovea_attend_item_t item;
    fovea_attend_request_t request;
    uint8_t *q, *out;
    float k[8], lse[8];
} fv_parcel_t;

static void parcel_init(fv_parcel_t *p, size_t q_bytes, uint32_t seed)
{
    memset(p, 0, sizeof(*p));
    p->item = (fovea_attend_item_t){.position = seed, .n_tokens = 2};
    memset(p->item.session.bytes, (int)seed + 1, sizeof(p->item.session.bytes));
    p->q = malloc(q_bytes);
    p->out = malloc(q_bytes);
    assert_non_null(p->q);
    assert_non_null(p->out);
    for (size_t i = 0; i < q_bytes; i++) {
        p->q[i] = (uint8_t)((i * 31U) + (i >> 11U) + seed);
    }
    memset(p->out, 0, q_bytes);
    for (size_t i = 0; i < FV_COUNT(p->k); i++) {
        p->k[i] = (float)(seed + i);
    }
    p->request = (fovea_attend_request_t){.layer = 7,
                                          .dtype = FOVEA_DTYPE_BF16,
                                          .n_items = 1,
                                          .items = &p->item,
                                          .q = p->q,
                                          .q_bytes = q_bytes,
                                          .k = p->k,
                                          .k_bytes = sizeof(p->k),
                                          .v = p->k,
                                          .v_bytes = sizeof(p->k),
                                          .out = p->out,
                                          .out_bytes = q_bytes,
                                          .lse = p->lse,
                                          .lse_bytes = sizeof(p->lse)};
}

static void parcel_check(const fv_parcel_t *p)
{
    assert_memory_equal(p->out, p->q, p->request.q_bytes);
    assert_memory_equal(p->lse, p->k, sizeof(p->k));
}

static void parcel_fini(fv_parcel_t *p)
{
    free(p->q);
    free(p->out);
}

static void ok(fovea_code_t code, const fovea_error_t *error)
{
    if (code != FOVEA_OK) {
        fail_msg("%s: %s", fovea_code_name(error->code), error->message);
    }
}

static void failed(const fovea_error_t *error, fovea_code_t code, const char *word)
{
    if ((error->code != code) || (strstr(error->message, word) == NULL)) {
        fail_msg("expected %s with \"%s\", got %s: %s", fovea_code_name(code), word,
                 fovea_code_name(error->code), error->message);
    }
}

/* Every field arrives as it was given, and the tensors byte by byte, small and large. */
static void test_fields_and_bytes(void **state)
{
    static const size_t k_sizes[] = {4, 16, 24, 4096, 65536 + 8, 5U << 20U};
    fv_rig_t *rig = *state;
    fovea_error_t error;

    for (size_t i = 0; i < FV_COUNT(k_sizes); i++) {
        fovea_timings_t timings = {0};
        fv_parcel_t p;
        parcel_init(&p, k_sizes[i], (uint32_t)i);
        p.request.flags = (i % 2 == 0) ? FOVEA_ATTEND_NOT_CAUSAL : 0;
        ok(fovea_attend(rig->client, &p.request, 0, &timings, &error), &error);
        parcel_check(&p);
        assert_int_equal(timings.queue_us, 1);
        assert_int_equal(timings.compute_us, 2);
        assert_int_equal(timings.exchange_us, 3);
        assert_int_equal(timings.total_us, 4);
        assert_int_equal(rig->fake.last.layer, 7);
        assert_int_equal(rig->fake.last.dtype, FV_DTYPE_BF16);
        assert_int_equal(rig->fake.last.causal, i % 2 != 0);
        assert_true(rig->fake.last.append);
        assert_true(rig->fake.last.want_lse);
        assert_int_equal(rig->fake.last.n_items, 1);
        assert_int_equal(rig->fake.last_items[0].position, i);
        assert_int_equal(rig->fake.last_items[0].n_tokens, 2);
        assert_memory_equal(rig->fake.last_items[0].session.bytes, p.item.session.bytes, 16);
        assert_in_range(rig->fake.last_left_us, 1, 31000000); /* the default deadline, rounded */
        parcel_fini(&p);
    }
}

static void test_deadline_of_a_call(void **state)
{
    fv_rig_t *rig = *state;
    fovea_error_t error;
    fv_parcel_t p;

    rig->fake.mode = FV_FAKE_HOLD;
    parcel_init(&p, 3U << 20U, 1);
    (void)fovea_attend(rig->client, &p.request, 100, NULL, &error);
    failed(&error, FOVEA_DEADLINE_EXCEEDED, "");
    assert_in_range(rig->fake.last_left_us, 1, 110000); /* rounded on the wire */
    parcel_fini(&p); /* free the moment the call returns: the sanitizer watches */
}

static void test_answers_in_reverse_order(void **state)
{
    fv_rig_t *rig = *state;
    static fv_parcel_t p[N_MAX]; /* large for a stack */
    uint64_t tickets[N_MAX];
    fovea_stream_t *stream = NULL;
    fovea_result_t result;
    fovea_error_t error;

    rig->fake.mode = FV_FAKE_REVERSE;
    rig->fake.n_collect = N_MAX;
    ok(fovea_stream_open(rig->client, NULL, &stream, &error), &error);
    for (uint32_t i = 0; i < N_MAX; i++) {
        parcel_init(&p[i], 1000 + (i * 700), i);
        ok(fovea_stream_submit(stream, &p[i].request, NULL, &p[i], &tickets[i], &error), &error);
    }
    for (uint32_t i = N_MAX; i-- > 0;) { /* the last one submitted finishes first */
        ok(fovea_stream_poll(stream, 20000, &result, &error), &error);
        assert_int_equal(result.error.code, FOVEA_OK);
        assert_int_equal(result.ticket, tickets[i]);
        assert_ptr_equal(result.user, &p[i]);
        parcel_check(&p[i]);
        parcel_fini(&p[i]);
    }
    fovea_stream_close(stream);
}

/* One request on a new stream, whose fate is given. */
static void expect_stream_error(fv_rig_t *rig, fovea_code_t code, const char *word)
{
    fovea_stream_t *stream = NULL;
    fovea_result_t result;
    fovea_error_t error;
    uint64_t ticket = 0;
    fv_parcel_t p;

    parcel_init(&p, 4096, 3);
    ok(fovea_stream_open(rig->client, NULL, &stream, &error), &error);
    ok(fovea_stream_submit(stream, &p.request, NULL, NULL, &ticket, &error), &error);
    ok(fovea_stream_wait(stream, ticket, 20000, &result, &error), &error);
    failed(&result.error, code, word);
    fovea_stream_close(stream);
    parcel_fini(&p);
}

static void test_wrong_answers_on_a_stream(void **state)
{
    fv_rig_t *rig = *state;

    rig->fake.mode = FV_FAKE_WRONG_ID;
    expect_stream_error(rig, FOVEA_INTERNAL, "not in flight");
    rig->fake.mode = FV_FAKE_GARBAGE;
    expect_stream_error(rig, FOVEA_INTERNAL, "cannot be decoded");
    rig->fake.mode = FV_FAKE_SHORT;
    expect_stream_error(rig, FOVEA_INVALID_ARGUMENT, "out_bytes: given 4096, expected 4092");
    rig->fake.mode = FV_FAKE_END_STREAM;
    expect_stream_error(rig, FOVEA_UNAVAILABLE, "going away");
}

static void test_wrong_answers_to_a_call(void **state)
{
    fv_rig_t *rig = *state;
    fovea_cluster_status_t status;
    fovea_session_id_t session = {{1}};
    fovea_error_t error;
    fv_parcel_t p;

    parcel_init(&p, 4096, 3);
    rig->fake.mode = FV_FAKE_GARBAGE;
    (void)fovea_attend(rig->client, &p.request, 0, NULL, &error);
    failed(&error, FOVEA_INTERNAL, "cannot be decoded");
    rig->fake.mode = FV_FAKE_SHORT;
    (void)fovea_attend(rig->client, &p.request, 0, NULL, &error);
    failed(&error, FOVEA_INVALID_ARGUMENT, "out_bytes");
    (void)fovea_get_status(rig->client, 0, &status, &error);
    failed(&error, FOVEA_INTERNAL, "cannot be decoded");
    (void)fovea_open_session(rig->client, "m", NULL, 0, &session, &error);
    failed(&error, FOVEA_INTERNAL, "cannot be decoded");
    assert_int_equal(session.bytes[0], 1); /* outputs are written on success only */
    parcel_fini(&p);
}

/* The second answer belongs to nobody: the stream breaks, and says so to whoever comes next. */
static void test_an_answer_too_many(void **state)
{
    fv_rig_t *rig = *state;
    fovea_stream_t *stream = NULL;
    fovea_result_t result;
    fovea_error_t error;
    uint64_t ticket = 0;
    fv_parcel_t p;

    rig->fake.mode = FV_FAKE_TWICE;
    parcel_init(&p, 64, 3);
    ok(fovea_stream_open(rig->client, NULL, &stream, &error), &error);
    ok(fovea_stream_submit(stream, &p.request, NULL, NULL, &ticket, &error), &error);
    ok(fovea_stream_wait(stream, ticket, 20000, &result, &error), &error);
    assert_int_equal(result.error.code, FOVEA_OK);
    parcel_check(&p);
    rig->fake.mode = FV_FAKE_HOLD;
    ok(fovea_stream_submit(stream, &p.request, NULL, NULL, &ticket, &error), &error);
    ok(fovea_stream_wait(stream, ticket, 20000, &result, &error), &error);
    failed(&result.error, FOVEA_INTERNAL, "not in flight");
    assert_int_not_equal(fovea_stream_submit(stream, &p.request, NULL, NULL, NULL, &error), 0);
    failed(&error, FOVEA_INTERNAL, "broken");
    fovea_stream_close(stream);
    parcel_fini(&p);
}

static void count_done(const fovea_result_t *result)
{
    int *n = result->user;

    *n += (result->error.code == FOVEA_CANCELLED) ? 1 : 1000;
}

/* A service that hangs, with 48 MiB under way: close still comes back, and the memory is free then. */
static void test_close_while_the_service_hangs(void **state)
{
    fv_rig_t *rig = *state;

    rig->fake.mode = FV_FAKE_HOLD;
    for (int with_thread = 0; with_thread < 2; with_thread++) {
        fovea_stream_options_t options = {.with_thread = with_thread != 0};
        fovea_stream_t *stream = NULL;
        fovea_error_t error;
        fv_parcel_t p[8];
        int n_done = 0;
        ok(fovea_stream_open(rig->client, &options, &stream, &error), &error);
        for (uint32_t i = 0; i < 8; i++) {
            parcel_init(&p[i], 6U << 20U, i);
            ok(fovea_stream_submit(stream, &p[i].request, count_done, &n_done, NULL, &error),
               &error);
        }
        assert_int_equal(fovea_stream_poll(stream, 20, NULL, &error), FOVEA_DEADLINE_EXCEEDED);
        assert_int_equal(fovea_stream_in_flight(stream), 8);
        fovea_stream_close(stream);
        assert_int_equal(n_done, 8); /* each callback once, CANCELLED */
        for (uint32_t i = 0; i < 8; i++) {
            parcel_fini(&p[i]);
        }
    }
}

/* The service dies with requests in flight and comes back: UNAVAILABLE, then all is well again. */
static void test_the_service_dies_and_comes_back(void **state)
{
    fv_rig_t *rig = *state;
    fovea_stream_t *stream = NULL;
    fovea_result_t result;
    fovea_error_t error;
    uint64_t ticket = 0;
    fovea_code_t code = FOVEA_OK;
    fv_parcel_t p;
    int n_tries = 0;

    rig->fake.mode = FV_FAKE_HOLD;
    parcel_init(&p, 4096, 3);
    ok(fovea_stream_open(rig->client, NULL, &stream, &error), &error);
    ok(fovea_stream_submit(stream, &p.request, NULL, NULL, &ticket, &error), &error);
    while (fv_fake_n_requests(&rig->fake) == 0) {
        (void)fovea_stream_poll(stream, 1, NULL, NULL);
    }
    fv_fake_stop(&rig->fake);
    ok(fovea_stream_wait(stream, ticket, 20000, &result, &error), &error);
    assert_true((result.error.code == FOVEA_UNAVAILABLE) ||
                (result.error.code == FOVEA_CANCELLED)); /* the door cancels what it stops */
    fovea_stream_close(stream);
    (void)fovea_attend(rig->client, &p.request, 0, NULL, &error);
    failed(&error, FOVEA_UNAVAILABLE, "");

    assert_int_equal(fv_fake_start(&rig->fake, rig->address), FV_OK);
    do { /* gRPC reconnects by itself, after a back-off */
        (void)usleep(20000);
        code = fovea_attend(rig->client, &p.request, 0, NULL, &error);
        n_tries++;
    } while ((code != FOVEA_OK) && (n_tries < 500));
    ok(code, &error);
    parcel_check(&p);
    parcel_fini(&p);
}

static void *start_later(void *arg)
{
    fv_rig_t *rig = arg;

    (void)usleep(400000);
    assert_int_equal(fv_fake_start(&rig->fake, rig->address), FV_OK);
    return NULL;
}

/* The service is away for a moment: whoever calls meanwhile waits, and not longer than he said. */
static void test_a_call_is_repeated_while_the_service_is_away(void **state)
{
    const fovea_options_t briefly = {.retry_ms = 100};
    fv_rig_t *rig = *state;
    fovea_client_t *patient = NULL;
    fovea_client_t *hasty = NULL;
    fovea_error_t error;
    pthread_t thread;
    fv_parcel_t p;

    parcel_init(&p, 4096, 3);
    ok(fovea_connect(rig->address, NULL, &patient, &error), &error);
    ok(fovea_connect(rig->address, &briefly, &hasty, &error), &error);
    fv_fake_stop(&rig->fake);
    (void)fovea_attend(hasty, &p.request, 0, NULL, &error);
    failed(&error, FOVEA_UNAVAILABLE, "");
    assert_int_equal(pthread_create(&thread, NULL, start_later, rig), 0);
    ok(fovea_attend(patient, &p.request, 0, NULL, &error), &error);
    parcel_check(&p);
    assert_int_equal(pthread_join(thread, NULL), 0);
    fovea_close(hasty);
    fovea_close(patient);
    parcel_fini(&p);
}

#define N_AGAIN 12

/* The service dies with a stream's requests unanswered: they are answered when it is back, each once, in any way of waiting. */
static void test_a_stream_is_opened_again(void **state)
{
    fv_rig_t *rig = *state;
    fovea_client_t *patient = NULL;
    fovea_error_t error;
    static fv_parcel_t p[N_AGAIN];

    ok(fovea_connect(rig->address, NULL, &patient, &error), &error);
    for (int with_thread = 0; with_thread < 2; with_thread++) {
        const fovea_stream_options_t options = {.with_thread = with_thread != 0};
        fovea_stream_t *stream = NULL;
        uint64_t tickets[N_AGAIN];
        fovea_result_t result;
        pthread_t thread;

        rig->fake.mode = FV_FAKE_HOLD;
        ok(fovea_stream_open(patient, &options, &stream, &error), &error);
        for (uint32_t i = 0; i < N_AGAIN; i++) {
            parcel_init(&p[i], 4096, i);
        }
        int n_before = fv_fake_n_requests(&rig->fake);
        for (uint32_t i = 0; i < N_AGAIN / 2U; i++) {
            ok(fovea_stream_submit(stream, &p[i].request, NULL, NULL, &tickets[i], &error), &error);
        }
        while (fv_fake_n_requests(&rig->fake) == n_before) {
            (void)fovea_stream_poll(stream, 1, NULL, NULL);
        }
        fv_fake_stop(&rig->fake);
        rig->fake.mode = FV_FAKE_ECHO;
        assert_int_equal(pthread_create(&thread, NULL, start_later, rig), 0);
        for (uint32_t i = N_AGAIN / 2U; i < N_AGAIN; i++) { /* while it is away */
            (void)fovea_stream_poll(stream, 20, NULL, NULL);
            ok(fovea_stream_submit(stream, &p[i].request, NULL, NULL, &tickets[i], &error), &error);
        }
        for (uint32_t i = 0; i < N_AGAIN; i++) {
            ok(fovea_stream_wait(stream, tickets[i], 20000, &result, &error), &error);
            ok(result.error.code, &result.error);
            parcel_check(&p[i]);
            parcel_fini(&p[i]);
        }
        assert_int_equal(pthread_join(thread, NULL), 0);
        fovea_stream_close(stream);
    }
    fovea_close(patient);
}

/* The answer is lost: what may have been done is not done again. Close is: it can be said twice. */
static void test_what_must_not_be_done_twice(void **state)
{
    fv_rig_t *rig = *state;
    const fovea_options_t options = {.retry_ms = 500};
    fovea_client_t *client = NULL;
    fovea_session_id_t session = {{1}};
    fovea_error_t error;

    ok(fovea_connect(rig->address, &options, &client, &error), &error);
    rig->fake.mode = FV_FAKE_END_STREAM;
    (void)fovea_open_session(client, "m", NULL, 0, &session, &error);
    failed(&error, FOVEA_UNAVAILABLE, "going away");
    assert_int_equal(rig->fake.n_others, 1);
    (void)fovea_fork_session(client, &session, 1, 0, &session, &error);
    failed(&error, FOVEA_UNAVAILABLE, "going away");
    assert_int_equal(rig->fake.n_others, 2);
    assert_int_equal(fovea_open_session(client, "m", NULL, 0, &session, NULL), FOVEA_UNAVAILABLE);
    assert_int_equal(rig->fake.n_others, 3);
    (void)fovea_close_session(client, &session, FOVEA_TIMEOUT_DEFAULT, &error);
    failed(&error, FOVEA_UNAVAILABLE, "going away");
    assert_true(rig->fake.n_others > 4);
    fovea_close(client);
}

/* Nothing was sent yet: that can be tried again. */
static void test_open_waits_for_a_service_that_is_away(void **state)
{
    fv_rig_t *rig = *state;
    fovea_client_t *client = NULL;
    fovea_session_id_t session;
    fovea_error_t error;
    pthread_t thread;

    ok(fovea_connect(rig->address, NULL, &client, &error), &error);
    fv_fake_stop(&rig->fake);
    assert_int_equal(pthread_create(&thread, NULL, start_later, rig), 0);
    if ((fovea_open_session(client, "m", NULL, 0, &session, &error) == FOVEA_UNAVAILABLE) &&
        (strstr(error.message, "failed to connect") == NULL)) {
        /* it left on the connection that was just being closed, may have been sent, and is not for the client to repeat */
        (void)fovea_open_session(client, "m", NULL, 0, &session, &error);
    }
    failed(&error, FOVEA_INTERNAL, "cannot be decoded"); /* the new one answers so */
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_int_equal(rig->fake.n_others, 1);
    fovea_close(client);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_fields_and_bytes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_deadline_of_a_call, setup, teardown),
        cmocka_unit_test_setup_teardown(test_answers_in_reverse_order, setup, teardown),
        cmocka_unit_test_setup_teardown(test_wrong_answers_on_a_stream, setup, teardown),
        cmocka_unit_test_setup_teardown(test_wrong_answers_to_a_call, setup, teardown),
        cmocka_unit_test_setup_teardown(test_an_answer_too_many, setup, teardown),
        cmocka_unit_test_setup_teardown(test_close_while_the_service_hangs, setup, teardown),
        cmocka_unit_test_setup_teardown(test_the_service_dies_and_comes_back, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_call_is_repeated_while_the_service_is_away, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_a_stream_is_opened_again, setup, teardown),
        cmocka_unit_test_setup_teardown(test_what_must_not_be_done_twice, setup, teardown),
        cmocka_unit_test_setup_teardown(test_open_waits_for_a_service_that_is_away, setup,
                                        teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
