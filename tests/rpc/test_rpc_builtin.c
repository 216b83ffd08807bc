/*
 * test_rpc_builtin.c - what the door answers itself: health, and server reflection.
 */
#include "tests/rpc/echo_server.h"
#include "tests/rpc/raw_client.h"
#include "tests/support/test.h"

#include <grpc/status.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t g_random = 1;

static uint8_t random_byte(void)
{
    g_random ^= g_random << 13U;
    g_random ^= g_random >> 7U;
    g_random ^= g_random << 17U;
    return (uint8_t)(g_random >> 32U);
}

static void check_health(fv_raw_client_t *client, const char *service, int expected)
{
    uint8_t request[64] = {0x0a, (uint8_t)strlen(service)};
    uint8_t *reply = NULL;
    size_t n_reply = 0;

    memcpy(request + 2, service, strlen(service));
    assert_int_equal(fv_raw_unary(client, "/grpc.health.v1.Health/Check", request,
                                  2U + strlen(service), &reply, &n_reply),
                     GRPC_STATUS_OK);
    assert_int_equal(n_reply, 2);
    assert_int_equal(reply[0], 0x08);
    assert_int_equal(reply[1], expected);
    free(reply);
}

static void expect_watched(fv_raw_call_t *watch, int expected)
{
    size_t n_reply = 0;
    uint8_t *reply = fv_raw_receive(watch, &n_reply);

    assert_non_null(reply);
    assert_int_equal(n_reply, 2);
    assert_int_equal(reply[1], expected);
    free(reply);
}

static void test_health(void **state)
{
    fv_echo_t echo;

    (void)state;
    fv_echo_start(&echo, "127.0.0.1:0", FV_ECHO_AT_ONCE);
    fv_raw_client_t *client = fv_raw_open(fv_rpc_address(echo.rpc, 0));
    assert_int_equal(
        fv_raw_unary(client, "/grpc.health.v1.Health/Check", "\x0a\x01x", 3, NULL, NULL),
        GRPC_STATUS_NOT_FOUND);
    assert_int_equal(
        fv_raw_unary(client, "/grpc.health.v1.Health/Check", "\x0a\x09x", 3, NULL, NULL),
        GRPC_STATUS_INVALID_ARGUMENT);
    check_health(client, "", 1);
    check_health(client, "fovea.v1.Attention", 1);
    check_health(client, "fovea.v1.Cluster", 1);
    fv_raw_call_t *watch = fv_raw_start(client, "/grpc.health.v1.Health/Watch", 0);
    fv_raw_call_t *other = fv_raw_start(client, "/grpc.health.v1.Health/Watch", 0);
    fv_raw_send(watch, "", 0);
    fv_raw_send(other, "\x0a\x01x", 3);
    expect_watched(watch, 1);
    expect_watched(other, 3); /* SERVICE_UNKNOWN, and the stream goes on */
    fv_rpc_set_serving(echo.rpc, false);
    expect_watched(watch, 2);
    check_health(client, "", 2);
    fv_rpc_set_serving(echo.rpc, false); /* no change, no message */
    fv_rpc_set_serving(echo.rpc, true);
    expect_watched(watch, 1);
    fv_raw_free(watch); /* gone while it watches */
    fv_rpc_set_serving(echo.rpc, false);
    check_health(client, "fovea.v1.Attention", 2);
    fv_raw_free(other);
    fv_raw_close(client);
    fv_echo_stop(&echo, 2000);
    assert_int_equal(echo.n_closed, 0); /* the handler never saw these calls */
}

#define STATUS_PATH "/fovea.v1.Cluster/GetStatus"
#define WATCH_PATH  "/grpc.health.v1.Health/Watch"

static void expect_end(fv_raw_call_t *call, int code, const char *part)
{
    char text[256];

    assert_int_equal(fv_raw_status(call, text), code);
    if (strstr(text, part) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", text, part);
    }
    fv_raw_free(call);
}

/* Health, open to everybody, has a limit of its own: it fills nobody else's, and is not kept out by it. */
static void test_health_has_its_own_limit(void **state)
{
    fv_rpc_config_t config = fv_echo_config("127.0.0.1:0");
    fv_raw_call_t *watches[3];
    fv_echo_t echo;

    (void)state;
    config.calls_max = 2;
    config.health_calls_max = 3;
    fv_echo_start_with(&echo, &config, FV_ECHO_AT_ONCE);
    fv_raw_client_t *client = fv_raw_open(fv_rpc_address(echo.rpc, 0));
    for (size_t i = 0; i < FV_COUNT(watches); i++) {
        watches[i] = fv_raw_start(client, WATCH_PATH, 0);
        fv_raw_send(watches[i], (i == 0U) ? "\x0a\x01x" : "", (i == 0U) ? 3 : 0);
        expect_watched(watches[i], (i == 0U) ? 3 : 1); /* one of no known service counts as well */
    }
    expect_end(fv_raw_start(client, WATCH_PATH, 0), GRPC_STATUS_RESOURCE_EXHAUSTED,
               "health: 3 calls are open, the most this service allows (health_calls_max)");
    assert_int_equal(fv_raw_unary(client, STATUS_PATH, "x", 1, NULL, NULL), GRPC_STATUS_OK);
    fv_raw_call_t *stream[2]; /* now the others are at their limit, and health goes on */
    for (size_t i = 0; i < FV_COUNT(stream); i++) {
        stream[i] = fv_raw_start(client, "/fovea.v1.Attention/Attend", 0);
        fv_raw_send(stream[i], "x", 1);
        free(fv_raw_receive(stream[i], &(size_t){0}));
    }
    expect_end(fv_raw_start(client, STATUS_PATH, 0), GRPC_STATUS_RESOURCE_EXHAUSTED, "calls_max");
    fv_raw_free(watches[0]);
    int code = GRPC_STATUS_RESOURCE_EXHAUSTED;
    for (int i = 0; (i < 1000) && (code == GRPC_STATUS_RESOURCE_EXHAUSTED);
         i++) { /* it is over soon */
        code = fv_raw_unary(client, "/grpc.health.v1.Health/Check", "", 0, NULL, NULL);
    }
    assert_int_equal(code, GRPC_STATUS_OK);
    fv_raw_free(watches[1]);
    fv_raw_free(watches[2]);
    fv_raw_free(stream[0]);
    fv_raw_free(stream[1]);
    fv_raw_close(client);
    fv_echo_stop(&echo, 2000);
}

static void test_a_call_without_its_message_ends(void **state)
{
    static const char *const k_paths[] = {
        "/grpc.health.v1.Health/Check", WATCH_PATH, STATUS_PATH, "/fovea.v1.Cluster/WatchStatus",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"};
    fv_rpc_config_t config = fv_echo_config("127.0.0.1:0");
    fv_raw_call_t *calls[FV_COUNT(k_paths)];
    fv_echo_t echo;

    (void)state;
    config.first_message_ms = 300;
    fv_echo_start_with(&echo, &config, FV_ECHO_AT_ONCE);
    fv_raw_client_t *client = fv_raw_open(fv_rpc_address(echo.rpc, 0));
    fv_raw_call_t *stream = fv_raw_start(client, "/fovea.v1.Attention/Attend", 0);
    fv_raw_call_t *watch = fv_raw_start(client, WATCH_PATH, 0);
    fv_raw_send(watch, "", 0);
    expect_watched(watch, 1);
    for (size_t i = 0; i < FV_COUNT(k_paths); i++) {
        calls[i] = fv_raw_start(client, k_paths[i], 0);
    }
    fv_raw_free(calls[0]); /* from the middle of those that wait */
    for (size_t i = 1; i < FV_COUNT(k_paths); i++) {
        expect_end(calls[i], GRPC_STATUS_DEADLINE_EXCEEDED,
                   "none came in 300 ms (first_message_ms)");
    }
    fv_raw_send(stream, "x", 1); /* a stream may be silent, and a watch has its message */
    size_t n = 0;
    uint8_t *reply = fv_raw_receive(stream, &n);
    assert_non_null(reply);
    free(reply);
    fv_rpc_set_serving(echo.rpc, false);
    expect_watched(watch, 2);
    fv_raw_free(stream);
    fv_raw_free(watch);
    fv_raw_close(client);
    fv_echo_stop(&echo, 2000);
}

static bool holds(const uint8_t *bytes, size_t n_bytes, const char *text)
{
    for (size_t i = 0; i + strlen(text) <= n_bytes; i++) {
        if (memcmp(bytes + i, text, strlen(text)) == 0) {
            return true;
        }
    }
    return false;
}

/* `field` of ServerReflectionRequest; the reply must hold `expected`. */
static void
check_reflection(fv_raw_call_t *call, uint8_t field, const char *value, const char *expected)
{
    uint8_t request[160] = {(uint8_t)((field << 3U) | 2U), (uint8_t)strlen(value)};
    size_t n_reply = 0;

    memcpy(request + 2, value, strlen(value));
    fv_raw_send(call, request, 2U + strlen(value));
    uint8_t *reply = fv_raw_receive(call, &n_reply);
    assert_non_null(reply);
    assert_true(fv_raw_sent(call, RAW_WAIT_MS));
    if (!holds(reply, n_reply, expected)) {
        fail_msg("the answer to field %d \"%s\" lacks \"%s\"", field, value, expected);
    }
    free(reply);
}

static void test_reflection(void **state)
{
    static const char *const k_methods[] = {
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"};
    static const char *const k_services[] = {
        "fovea.v1.Attention", "fovea.v1.Cluster", "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"};
    static const char *const k_symbols[] = {"fovea.v1.Attention",
                                            "fovea.v1.Attention.Attend",
                                            "fovea.v1.AttendRequest",
                                            "fovea.v1.AttendRequest.q",
                                            "fovea.v1.AttendRequest.causal_set",
                                            "fovea.v1.ModelSpec.Kind",
                                            "fovea.v1.ModelSpec.LATENT",
                                            "fovea.v1.DType",
                                            "fovea.v1.DTYPE_BF16"};
    static const char *const k_unknown[] = {"fovea.v1.Attention.q",
                                            "fovea.v1",
                                            "fovea.v1.",
                                            "fovea",
                                            "",
                                            ".",
                                            "fovea.v1.DType.DTYPE_BF16",
                                            "fovea.v1.AttendRequest.q.x",
                                            "fovea.v2.AttendRequest"};
    fv_echo_t echo;

    (void)state;
    fv_echo_start(&echo, "127.0.0.1:0", FV_ECHO_AT_ONCE);
    fv_raw_client_t *client = fv_raw_open(fv_rpc_address(echo.rpc, 0));
    for (size_t m = 0; m < FV_COUNT(k_methods); m++) {
        fv_raw_call_t *call = fv_raw_start(client, k_methods[m], 0);
        for (size_t i = 0; i < FV_COUNT(k_services); i++) {
            check_reflection(call, 7, "*", k_services[i]);
            check_reflection(call, 4, k_services[i], ".proto"); /* a file descriptor comes */
        }
        for (size_t i = 0; i < FV_COUNT(k_symbols); i++) {
            check_reflection(call, 4, k_symbols[i], "attention.proto");
        }
        for (size_t i = 0; i < FV_COUNT(k_unknown); i++) {
            check_reflection(call, 4, k_unknown[i], "symbol: not defined here");
        }
        check_reflection(call, 3, "grpc/health/v1/health.proto", "HealthCheckRequest");
        check_reflection(call, 3, "none.proto", "file: not known here");
        check_reflection(call, 6, "fovea.v1.AttendRequest", "fovea.v1.AttendRequest");
        check_reflection(call, 6, "fovea.v1.X", "type: not defined here");
        check_reflection(call, 5, "", "extension: there are none here");
        check_reflection(call, 1, "host", "request: asks for nothing");
        fv_raw_half_close(call);
        assert_int_equal(fv_raw_status(call, NULL), GRPC_STATUS_OK);
        fv_raw_free(call);
    }
    fv_raw_close(client);
    fv_echo_stop(&echo, 2000);
}

/* Random bytes, and valid fields with random contents: an answer or a status, and the door goes on. */
static void test_random_requests(void **state)
{
    static const char *const k_methods[] = {
        "/grpc.health.v1.Health/Check", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"};
    fv_echo_t echo;

    (void)state;
    fv_echo_start(&echo, "127.0.0.1:0", FV_ECHO_AT_ONCE);
    fv_raw_client_t *client = fv_raw_open(fv_rpc_address(echo.rpc, 0));
    for (size_t i = 0; i < 600; i++) {
        uint8_t request[64];
        size_t n_bytes = random_byte() % sizeof(request);
        for (size_t j = 0; j < n_bytes; j++) {
            request[j] = random_byte();
        }
        if ((i % 2U == 0U) && (n_bytes >= 2U)) { /* a string field of the length that it says */
            request[0] = (uint8_t)(((1U + (i % 7U)) << 3U) | 2U);
            request[1] = (uint8_t)(n_bytes - 2U);
        }
        int status =
            fv_raw_unary(client, k_methods[i % FV_COUNT(k_methods)], request, n_bytes, NULL, NULL);
        assert_true((status == GRPC_STATUS_OK) || (status == GRPC_STATUS_INVALID_ARGUMENT) ||
                    (status == GRPC_STATUS_NOT_FOUND));
    }
    uint8_t *large = calloc(1, 5000);
    assert_non_null(large);
    assert_int_equal(fv_raw_unary(client, k_methods[0], large, 5000, NULL, NULL),
                     GRPC_STATUS_INVALID_ARGUMENT); /* more than any name */
    free(large);
    check_health(client, "", 1);
    fv_raw_close(client);
    fv_echo_stop(&echo, 2000);
}

int main(void)
{
    const char *seed = getenv("FV_SEED"); /* NOLINT(concurrency-mt-unsafe): one thread yet */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_health),
        cmocka_unit_test(test_health_has_its_own_limit),
        cmocka_unit_test(test_a_call_without_its_message_ends),
        cmocka_unit_test(test_reflection),
        cmocka_unit_test(test_random_requests),
    };

    g_random = (seed != NULL) ? strtoull(seed, NULL, 10) : 20261122U;
    g_random += (g_random == 0U);
    (void)printf("FV_SEED=%llu\n", (unsigned long long)g_random);
    /* NOLINTNEXTLINE(concurrency-mt-unsafe): a name, with * and ?; unset: all */
    cmocka_set_test_filter(getenv("FV_TEST"));
    return cmocka_run_group_tests(tests, NULL, NULL);
}
