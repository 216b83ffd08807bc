/*
 * test_rpc_call.c - single calls through the door: echoes, limits, ends.
 */
#include "tests/rpc/echo_server.h"
#include "tests/rpc/raw_client.h"
#include "tests/support/test.h"

#include <grpc/status.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define ONCE   "/fovea.v1.Attention/AttendOnce"
#define ATTEND "/fovea.v1.Attention/Attend"
#define WATCH  "/fovea.v1.Cluster/WatchStatus"

#define STREAM_MESSAGES 200U
#define STREAM_AHEAD    12U
#define SLOW_BYTES      (4U << 20U)
#define WATCH_REPLIES   3000U
#define WATCH_BYTES     4096U

typedef struct fv_fixture {
    fv_echo_t echo;
    fv_raw_client_t *client;
} fv_fixture_t;

static uint64_t g_random = 1;

static uint64_t next_random(void)
{
    g_random ^= g_random << 13U;
    g_random ^= g_random >> 7U;
    g_random ^= g_random << 17U;
    return g_random;
}

static int set_up(void **state)
{
    fv_fixture_t *f = calloc(1, sizeof(*f));

    fv_echo_start(&f->echo, "127.0.0.1:0", FV_ECHO_WORKER);
    f->client = fv_raw_open(fv_rpc_address(f->echo.rpc, 0));
    *state = f;
    return 0;
}

/* The server goes on after whatever the test did to it; then every reference must come back. */
static int tear_down(void **state)
{
    fv_fixture_t *f = *state;
    uint8_t *reply = NULL;
    size_t n_reply = 0;

    fv_echo_set_mode(&f->echo, FV_ECHO_WORKER);
    assert_int_equal(fv_raw_unary(f->client, ONCE, "alive?", 6, &reply, &n_reply), GRPC_STATUS_OK);
    assert_int_equal(n_reply, 6);
    assert_memory_equal(reply, "alive?", 6);
    free(reply);
    fv_raw_close(f->client);
    fv_echo_stop(&f->echo, 2000);
    free(f);
    return 0;
}

static uint8_t *random_bytes(size_t n_bytes)
{
    uint8_t *bytes = malloc(n_bytes + 8U);

    assert_non_null(bytes);
    for (size_t i = 0; i < n_bytes; i += 8U) {
        uint64_t word = next_random();
        memcpy(bytes + i, &word, 8);
    }
    return bytes;
}

static void check_echo(fv_raw_client_t *client, size_t n_bytes)
{
    uint8_t *bytes = random_bytes(n_bytes);
    uint8_t *reply = NULL;
    size_t n_reply = 0;

    assert_int_equal(fv_raw_unary(client, ONCE, bytes, n_bytes, &reply, &n_reply), GRPC_STATUS_OK);
    assert_int_equal(n_reply, n_bytes);
    assert_memory_equal(reply, bytes, n_bytes);
    free(reply);
    free(bytes);
}

static void test_unary_echo_of_every_size(void **state)
{
    static const size_t k_sizes[] = {0, 1, 5, 6, 100, 8191, 65536, 1U << 20U, 16U << 20U};
    fv_fixture_t *f = *state;

    for (int mode = FV_ECHO_AT_ONCE; mode <= FV_ECHO_WORKER; mode++) {
        fv_echo_set_mode(&f->echo, (fv_echo_mode_t)mode);
        for (size_t i = 0; i < FV_COUNT(k_sizes); i++) {
            check_echo(f->client, k_sizes[i]);
        }
    }
    assert_int_equal(f->echo.last_method, FV_METHOD_ATTEND_ONCE);
    assert_true(f->echo.last_left_us == INT64_MAX);
}

static void test_thousand_calls(void **state)
{
    fv_fixture_t *f = *state;

    for (int i = 0; i < 1000; i++) {
        check_echo(f->client, (size_t)(i % 37));
    }
    assert_int_equal(fv_echo_read(&f->echo, &f->echo.n_answered), 1000);
    assert_true(fv_echo_wait(&f->echo, &f->echo.n_closed, 1000));
}

static void receive_and_compare(fv_raw_call_t *call, uint8_t **sent, const size_t *sizes, size_t i)
{
    size_t n_bytes = 0;
    uint8_t *bytes = fv_raw_receive(call, &n_bytes);

    assert_non_null(bytes);
    assert_int_equal(n_bytes, sizes[i]);
    assert_memory_equal(bytes, sent[i], n_bytes);
    free(bytes);
    free(sent[i]);
}

/* More messages in flight than the limit, so that reading stops and goes on. One worker answers: in order. */
static void test_stream_pipelined(void **state)
{
    fv_fixture_t *f = *state;
    uint8_t *sent[STREAM_MESSAGES];
    size_t sizes[STREAM_MESSAGES];
    size_t n_received = 0;

    fv_raw_call_t *call = fv_raw_start(f->client, ATTEND, 0);
    for (size_t i = 0; i < STREAM_MESSAGES; i++) {
        sizes[i] = (i % 50U == 49U) ? (3U << 20U) : (size_t)(next_random() % 5000U);
        sent[i] = random_bytes(sizes[i]);
        fv_raw_send(call, sent[i], sizes[i]);
        /* flow control: read something first, if there is anything */
        while (!fv_raw_sent(call, (n_received < i) ? 20 : RAW_WAIT_MS)) {
            assert_true(n_received < i);
            receive_and_compare(call, sent, sizes, n_received++);
        }
        if (i - n_received >= STREAM_AHEAD) {
            receive_and_compare(call, sent, sizes, n_received++);
        }
    }
    fv_raw_half_close(call);
    while (n_received < STREAM_MESSAGES) {
        receive_and_compare(call, sent, sizes, n_received++);
    }
    size_t n_bytes = 0;
    assert_null(fv_raw_receive(call, &n_bytes)); /* all answered: the server ends the stream */
    assert_int_equal(fv_raw_status(call, NULL), GRPC_STATUS_OK);
    fv_raw_free(call);
    assert_true(f->echo.n_unanswered_max <= ECHO_INFLIGHT_MAX);
}

/* Others' calls while a large message is taken in, that long after its begin; the next message of its own stream waits for it. */
static void serve_beside(fv_fixture_t *f, long after_ms)
{
    const size_t n_large = (size_t)2 << 20;
    uint8_t *large = calloc(n_large, 1);
    uint8_t *reply = NULL;
    size_t n_bytes = 0;

    assert_non_null(large);
    (void)pthread_mutex_lock(&f->echo.lock);
    f->echo.aside_until = 3;
    (void)pthread_mutex_unlock(&f->echo.lock);
    fv_raw_call_t *stream = fv_raw_start(f->client, ATTEND, 0);
    fv_raw_send(stream, large, n_large);
    (void)fv_raw_sent(stream, RAW_WAIT_MS);
    fv_raw_send(stream, "behind", 6);
    assert_true(fv_echo_wait(&f->echo, &f->echo.n_aside, 1));
    (void)nanosleep(&(struct timespec){.tv_nsec = after_ms * 1000000}, NULL);
    fv_raw_client_t *other = fv_raw_open(fv_rpc_address(f->echo.rpc, 0));
    for (int i = 0; i < 3; i++) {
        assert_int_equal(fv_raw_unary(other, ONCE, "beside", 6, &reply, &n_bytes), 0);
        assert_int_equal(n_bytes, 6);
        free(reply);
    }
    reply = fv_raw_receive(stream, &n_bytes);
    assert_int_equal(n_bytes, n_large);
    free(reply);
    reply = fv_raw_receive(stream, &n_bytes);
    assert_int_equal(n_bytes, 6);
    assert_memory_equal(reply, "behind", 6);
    free(reply);
    assert_int_equal(fv_echo_read(&f->echo, &f->echo.n_aside_in_vain), 0);
    fv_raw_free(stream);
    fv_raw_close(other);
    free(large);
}

static void test_others_are_served_beside_a_large_message(void **state)
{
    serve_beside(*state, 0);
}

/* However long it takes: the second thread does not leave before the first is back. */
static void test_others_are_served_beside_a_slow_message(void **state)
{
    serve_beside(*state, 600);
}

/* A client that does not read: its replies may pile up to the limit, and then it is not read either. */
static void test_slow_reader_is_bounded(void **state)
{
    fv_fixture_t *f = *state;
    uint8_t *bytes = random_bytes(SLOW_BYTES);
    int n_sent = 0;

    fv_raw_call_t *call = fv_raw_start(f->client, ATTEND, 0);
    for (bool is_blocked = false; !is_blocked && (n_sent < 50);) {
        fv_raw_send(call, bytes, SLOW_BYTES);
        is_blocked = !fv_raw_sent(call, 1000);
        n_sent++;
    }
    assert_true(n_sent < 50);
    /* the windows and socket buffers hold a few MiB; behind them nothing may be delivered */
    assert_true(fv_echo_read(&f->echo, &f->echo.n_delivered) <= ECHO_INFLIGHT_MAX + 2);
    assert_true(fv_echo_read(&f->echo, &f->echo.n_live_max) <= ECHO_INFLIGHT_MAX);
    assert_true(fv_echo_read(&f->echo, &f->echo.n_unanswered_max) <= ECHO_INFLIGHT_MAX);
    for (int i = 0; i < n_sent; i++) { /* and it all comes once the client reads */
        size_t n_reply = 0;
        uint8_t *reply = fv_raw_receive(call, &n_reply);
        assert_int_equal(n_reply, SLOW_BYTES);
        assert_memory_equal(reply, bytes, SLOW_BYTES);
        free(reply);
    }
    fv_raw_free(call);
    free(bytes);
}

static void test_stream_that_is_not_answered_is_not_read(void **state)
{
    fv_fixture_t *f = *state;

    fv_echo_set_mode(&f->echo, FV_ECHO_HOLD);
    fv_raw_call_t *call = fv_raw_start(f->client, ATTEND, 0);
    for (int i = 0; i < 3 * ECHO_INFLIGHT_MAX; i++) {
        fv_raw_send(call, "x", 1);
        assert_true(fv_raw_sent(call, RAW_WAIT_MS));
    }
    assert_true(fv_echo_wait(&f->echo, &f->echo.n_delivered, ECHO_INFLIGHT_MAX));
    assert_int_equal(fv_echo_read(&f->echo, &f->echo.n_delivered), ECHO_INFLIGHT_MAX);
    fv_raw_half_close(call);
    fv_echo_set_mode(&f->echo, FV_ECHO_WORKER);
    for (int i = 0; i < 3 * ECHO_INFLIGHT_MAX; i++) {
        size_t n_reply = 0;
        uint8_t *reply = fv_raw_receive(call, &n_reply);
        assert_int_equal(n_reply, 1);
        free(reply);
    }
    assert_int_equal(fv_raw_status(call, NULL), GRPC_STATUS_OK);
    fv_raw_free(call);
}

static void test_too_large_message(void **state)
{
    fv_fixture_t *f = *state;
    uint8_t *bytes = random_bytes(ECHO_MESSAGE_MAX + 1U);
    char text[256];

    assert_int_equal(fv_raw_unary(f->client, ONCE, bytes, ECHO_MESSAGE_MAX + 1U, NULL, NULL),
                     GRPC_STATUS_RESOURCE_EXHAUSTED);
    fv_raw_call_t *call = fv_raw_start(f->client, ATTEND, 0);
    fv_raw_send(call, "ok", 2);
    size_t n_reply = 0;
    uint8_t *reply = fv_raw_receive(call, &n_reply);
    assert_int_equal(n_reply, 2);
    free(reply);
    assert_true(fv_raw_sent(call, RAW_WAIT_MS));
    fv_raw_send(call, bytes, ECHO_MESSAGE_MAX + 1U);
    assert_int_equal(fv_raw_status(call, text), GRPC_STATUS_RESOURCE_EXHAUSTED);
    assert_non_null(strstr(text, "larger than max"));
    fv_raw_free(call);
    free(bytes);
    assert_int_equal(fv_echo_read(&f->echo, &f->echo.n_delivered), 1);
}

static void test_unknown_method(void **state)
{
    static const char *const k_methods[] = {"/fovea.v1.Attention/Attend2", "/fovea.v1.Attention",
                                            "/", "/x/y"};
    fv_fixture_t *f = *state;

    for (size_t i = 0; i < FV_COUNT(k_methods); i++) {
        assert_int_equal(fv_raw_unary(f->client, k_methods[i], "a", 1, NULL, NULL),
                         GRPC_STATUS_UNIMPLEMENTED);
    }
    assert_int_equal(fv_echo_read(&f->echo, &f->echo.n_delivered), 0);
}

static void test_unary_without_message(void **state)
{
    fv_fixture_t *f = *state;
    char text[256];

    fv_raw_call_t *call = fv_raw_start(f->client, ONCE, 0);
    fv_raw_half_close(call);
    assert_int_equal(fv_raw_status(call, text), GRPC_STATUS_INVALID_ARGUMENT);
    assert_string_equal(text, "message: given none, expected one");
    fv_raw_free(call);
}

static void test_cancel(void **state)
{
    static const char *const k_methods[] = {ONCE, ATTEND};
    fv_fixture_t *f = *state;

    fv_echo_set_mode(&f->echo, FV_ECHO_HOLD);
    for (int i = 0; i < 2; i++) {
        fv_raw_call_t *call = fv_raw_start(f->client, k_methods[i], 0);
        fv_raw_send(call, "to be cancelled", 15);
        assert_true(fv_echo_wait(&f->echo, &f->echo.n_delivered, i + 1));
        fv_raw_cancel(call);
        assert_int_equal(fv_raw_status(call, NULL), GRPC_STATUS_CANCELLED);
        fv_raw_free(call);
        assert_true(fv_echo_wait(&f->echo, &f->echo.n_closed, i + 1));
        assert_true(fv_echo_first_is_closed(&f->echo));
        fv_echo_answer_held(&f->echo); /* too late: released and ignored */
        assert_int_equal(fv_echo_read(&f->echo, &f->echo.n_released), i + 1);
    }
}

static void test_deadline(void **state)
{
    fv_fixture_t *f = *state;

    fv_echo_set_mode(&f->echo, FV_ECHO_HOLD);
    fv_raw_call_t *call = fv_raw_start(f->client, ONCE, 300);
    fv_raw_send(call, "late", 4);
    assert_true(fv_echo_wait(&f->echo, &f->echo.n_delivered, 1));
    int64_t left_us = fv_echo_read(&f->echo, &f->echo.last_left_us);
    assert_true((left_us > 0) && (left_us <= 310000)); /* gRPC rounds timeouts up */
    assert_int_equal(fv_raw_status(call, NULL), GRPC_STATUS_DEADLINE_EXCEEDED);
    assert_true(fv_echo_wait(&f->echo, &f->echo.n_closed, 1)); /* the server need not be told */
    fv_raw_free(call);
    fv_echo_answer_held(&f->echo);
}

static void test_fail_unary(void **state)
{
    fv_fixture_t *f = *state;
    char text[256];

    fv_echo_set_mode(&f->echo, FV_ECHO_HOLD);
    fv_raw_call_t *call = fv_raw_start(f->client, ONCE, 0);
    fv_raw_send(call, "no", 2);
    assert_true(fv_echo_wait(&f->echo, &f->echo.n_delivered, 1));
    fv_call_t *held = fv_echo_take(&f->echo);
    fv_call_fail(held, GRPC_STATUS_NOT_FOUND, "session: given \xc3\xa4 \"q\", expected another");
    fv_call_fail(held, GRPC_STATUS_INTERNAL, "the first failure counts");
    fv_call_unref(held);
    assert_int_equal(fv_raw_status(call, text), GRPC_STATUS_NOT_FOUND);
    assert_string_equal(text, "session: given \xc3\xa4 \"q\", expected another");
    fv_raw_free(call);
}

/* The stream's end comes after the replies that were queued before it, and later replies are dropped. */
static void test_fail_stream_after_queued(void **state)
{
    fv_fixture_t *f = *state;
    fv_call_t *held[3];

    fv_echo_set_mode(&f->echo, FV_ECHO_HOLD);
    fv_raw_call_t *call = fv_raw_start(f->client, ATTEND, 0);
    for (int i = 0; i < 3; i++) {
        fv_raw_send(call, "m", 1);
        assert_true(fv_raw_sent(call, RAW_WAIT_MS));
        assert_true(fv_echo_wait(&f->echo, &f->echo.n_delivered, i + 1));
        held[i] = fv_echo_take(&f->echo);
    }
    fv_reply_piece_t one = {.data = "1", .n_bytes = 1};
    fv_reply_piece_t two = {.data = "2", .n_bytes = 1};
    fv_call_reply(held[0], &one, 1);
    fv_call_reply(held[1], &two, 1);
    fv_call_fail(held[2], GRPC_STATUS_ABORTED, "enough");
    fv_call_reply(held[2], &one, 1);
    for (int i = 0; i < 3; i++) {
        fv_call_unref(held[i]);
    }
    for (int i = 0; i < 2; i++) {
        size_t n_reply = 0;
        uint8_t *reply = fv_raw_receive(call, &n_reply);
        assert_int_equal(n_reply, 1);
        assert_int_equal(reply[0], '1' + i);
        free(reply);
    }
    size_t n_reply = 0;
    assert_null(fv_raw_receive(call, &n_reply));
    assert_int_equal(fv_raw_status(call, NULL), GRPC_STATUS_ABORTED);
    fv_raw_free(call);
}

/* Many replies to one request; a watcher that does not read costs one message, and then sees the newest. */
static void test_server_stream(void **state)
{
    fv_fixture_t *f = *state;
    uint8_t data[WATCH_BYTES];
    uint32_t seen = 0;
    uint32_t n_received = 0;
    size_t n_reply = 0;

    memset(data, 0, sizeof(data));
    fv_echo_set_mode(&f->echo, FV_ECHO_HOLD);
    fv_raw_call_t *call = fv_raw_start(f->client, WATCH, 0);
    fv_raw_send(call, "", 0);
    assert_true(fv_raw_sent(call, RAW_WAIT_MS));
    fv_raw_half_close(call);
    assert_true(fv_echo_wait(&f->echo, &f->echo.n_delivered, 1));
    fv_call_t *held = fv_echo_take(&f->echo);
    assert_int_equal(fv_call_method(held), FV_METHOD_WATCH_STATUS);
    fv_reply_piece_t piece = {.data = data, .n_bytes = sizeof(data)};
    for (uint32_t i = 1; i <= WATCH_REPLIES; i++) {
        memcpy(data, &i, sizeof(i));
        fv_call_reply(held, &piece, 1);
    }
    fv_call_fail(held, GRPC_STATUS_OK, "");
    fv_call_unref(held);
    for (uint8_t *reply = fv_raw_receive(call, &n_reply); reply != NULL;
         reply = fv_raw_receive(call, &n_reply)) {
        uint32_t number = 0;
        assert_int_equal(n_reply, WATCH_BYTES);
        memcpy(&number, reply, sizeof(number));
        assert_true(number > seen);
        seen = number;
        n_received++;
        free(reply);
    }
    assert_int_equal(seen, WATCH_REPLIES);
    assert_true(n_received < WATCH_REPLIES); /* 12 MB do not fit what the windows hold */
    assert_int_equal(fv_raw_status(call, NULL), GRPC_STATUS_OK);
    fv_raw_free(call);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

/* The requests in flight of whoever calls, when they are `expected` within 20 s. */
static void expect_requests(const fv_principal_t *principal, unsigned expected)
{
    for (int i = 0; (i < 2000) && (atomic_load(&principal->n_requests) != expected); i++) {
        (void)nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
    assert_int_equal(atomic_load(&principal->n_requests), expected);
}

/* A request is in flight until its reply has been sent, however long ago it was computed; or until its call is over. */
static void test_requests_end_when_the_reply_is_sent(void **state)
{
    static const char *const k_methods[] = {"/fovea.v1.Attention/Attend",
                                            "/fovea.v1.Attention/AttendOnce"};
    const size_t n_bytes = 16U << 20U; /* more than flow control takes in while nobody reads */
    fv_rpc_config_t config = fv_echo_config("127.0.0.1:0");
    uint8_t *message = calloc(1, n_bytes);
    fv_echo_t echo;

    (void)state;
    assert_int_equal(fv_auth_create(NULL, &config.auth), FV_OK);
    const fv_principal_t *anyone = fv_auth_principal(config.auth, "anonymous");
    fv_echo_start_with(&echo, &config, FV_ECHO_WORKER);
    for (size_t i = 0; i < 2U * FV_COUNT(k_methods); i++) {
        bool is_read = (i % 2U) == 0U;
        /* a new one: as it reads, its window grows to more than a reply */
        fv_raw_client_t *client = fv_raw_open(fv_rpc_address(echo.rpc, 0));
        int64_t n_before = fv_echo_read(&echo, &echo.n_answered);
        fv_raw_call_t *call = fv_raw_start(client, k_methods[i / 2U], 0);
        size_t n_requests = (i < 2U) ? 2 : 1; /* of a stream's replies one is gRPC's */
        for (size_t j = 0; j < n_requests; j++) {
            fv_raw_send(call, message, n_bytes);
            assert_true(fv_raw_sent(call, RAW_WAIT_MS));
        }
        assert_true(fv_echo_wait(&echo, &echo.n_answered, n_before + (int64_t)n_requests));
        (void)nanosleep(&(struct timespec){.tv_nsec = 200000000}, NULL);
        assert_int_equal(atomic_load(&anyone->n_requests), 1);
        if (is_read) {
            size_t n = 0;
            free(fv_raw_receive(call, &n));
            assert_int_equal(n, n_bytes);
            if (i < 2U) { /* the stream goes on; of a unary call the status comes as well */
                expect_requests(anyone, 0);
            }
        }
        fv_raw_free(call);
        expect_requests(anyone, 0);
        fv_raw_close(client);
    }
    free(message);
    fv_echo_stop(&echo, 2000);
    fv_auth_destroy(config.auth);
}

int main(void)
{
    const char *seed = getenv("FV_SEED"); /* NOLINT(concurrency-mt-unsafe): one thread yet */
    const struct CMUnitTest tests[] = {
        TEST(test_unary_echo_of_every_size),
        TEST(test_thousand_calls),
        TEST(test_stream_pipelined),
        TEST(test_others_are_served_beside_a_large_message),
        TEST(test_others_are_served_beside_a_slow_message),
        TEST(test_slow_reader_is_bounded),
        TEST(test_stream_that_is_not_answered_is_not_read),
        TEST(test_too_large_message),
        TEST(test_unknown_method),
        TEST(test_unary_without_message),
        TEST(test_cancel),
        TEST(test_deadline),
        TEST(test_fail_unary),
        TEST(test_fail_stream_after_queued),
        TEST(test_server_stream),
        TEST(test_requests_end_when_the_reply_is_sent),
    };

    g_random = (seed != NULL) ? strtoull(seed, NULL, 10) : 20261122U;
    g_random += (g_random == 0U);
    (void)printf("FV_SEED=%llu\n", (unsigned long long)g_random);
    /* NOLINTNEXTLINE(concurrency-mt-unsafe): a name, with * and ?; unset: all */
    cmocka_set_test_filter(getenv("FV_TEST"));
    return cmocka_run_group_tests(tests, NULL, NULL);
}
