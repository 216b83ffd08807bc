/*
 * test_rpc_life.c - the door's own life: start, addresses, stop, clients that vanish, strangers.
 */
#include "common/clock.h"
#include "tests/rpc/echo_server.h"
#include "tests/rpc/raw_client.h"
#include "tests/support/test.h"

#include <grpc/status.h>

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define ONCE   "/fovea.v1.Attention/AttendOnce"
#define ATTEND "/fovea.v1.Attention/Attend"

extern char **environ;

static uint64_t g_random = 1;
static char g_program[512];

static uint8_t random_byte(void)
{
    g_random ^= g_random << 13U;
    g_random ^= g_random >> 7U;
    g_random ^= g_random << 17U;
    return (uint8_t)(g_random >> 32U);
}

static void check_alive(const char *address)
{
    fv_raw_client_t *client = fv_raw_open(address);
    uint8_t *reply = NULL;
    size_t n_reply = 0;

    assert_int_equal(fv_raw_unary(client, ONCE, "alive?", 6, &reply, &n_reply), GRPC_STATUS_OK);
    assert_int_equal(n_reply, 6);
    free(reply);
    fv_raw_close(client);
}

/* ------------------------------------------------------------------ clients that go away */

/* What the child does: messages that are held, then a large one that never arrives whole. Killed while it waits. */
static int run_client(const char *address)
{
    const size_t large_bytes = (size_t)16U << 20U;
    uint8_t *large = calloc(1, large_bytes);
    fv_raw_client_t *client = fv_raw_open(address);
    fv_raw_call_t *unary = fv_raw_start(client, ONCE, 0);
    fv_raw_call_t *stream = fv_raw_start(client, ATTEND, 0);

    fv_raw_send(unary, "never answered in time", 22);
    for (int i = 0; i < ECHO_INFLIGHT_MAX; i++) {
        fv_raw_send(stream, "nor this", 8);
        (void)fv_raw_sent(stream, RAW_WAIT_MS);
    }
    fv_raw_send(stream, large, large_bytes);
    (void)fv_raw_sent(stream, RAW_WAIT_MS);
    return 1; /* the parent should have killed us */
}

/* The program itself, as a client that is killed: nothing is said to the server, its socket just ends. */
static void test_client_is_killed_mid_stream(void **state)
{
    fv_echo_t echo;
    char address[128];
    char mode[] = "--client";
    char *argv[] = {g_program, mode, address, NULL};
    pid_t pid = 0;

    (void)state;
    fv_echo_start(&echo, "127.0.0.1:0", FV_ECHO_HOLD);
    (void)snprintf(address, sizeof(address), "%s", fv_rpc_address(echo.rpc, 0));
    assert_int_equal(posix_spawn(&pid, g_program, NULL, NULL, argv, environ), 0);
    assert_true(fv_echo_wait(&echo, &echo.n_delivered, ECHO_INFLIGHT_MAX + 1));
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    assert_true(fv_echo_wait(&echo, &echo.n_closed, 2)); /* both calls, once each */
    fv_echo_answer_held(&echo);
    assert_int_equal(fv_echo_read(&echo, &echo.n_released), ECHO_INFLIGHT_MAX + 1);
    fv_echo_set_mode(&echo, FV_ECHO_WORKER);
    check_alive(address);
    fv_echo_stop(&echo, 2000);
    assert_int_equal(echo.n_closed, 3);
}

/* ------------------------------------------------------------------ stop */

static void test_stop_finishes_what_runs(void **state)
{
    fv_echo_t echo;
    char text[256];
    size_t n_reply = 0;

    (void)state;
    fv_echo_start(&echo, "127.0.0.1:0", FV_ECHO_HOLD);
    fv_raw_client_t *client = fv_raw_open(fv_rpc_address(echo.rpc, 0));
    fv_raw_call_t *idle = fv_raw_start(client, ATTEND, 0);
    fv_raw_call_t *busy = fv_raw_start(client, ATTEND, 0);
    fv_raw_call_t *unary = fv_raw_start(client, ONCE, 0);
    fv_raw_send(busy, "b", 1);
    fv_raw_send(unary, "u", 1);
    assert_true(fv_echo_wait(&echo, &echo.n_delivered, 2));
    fv_echo_set_mode(&echo, FV_ECHO_WORKER); /* what is held is answered while we stop */
    int64_t begin_us = fv_clock_us();
    fv_rpc_stop(echo.rpc, 15000);
    assert_true(fv_clock_us() - begin_us < 10000000); /* idle streams do not keep it waiting */
    uint8_t *reply = fv_raw_receive(busy, &n_reply);
    assert_non_null(reply);
    free(reply);
    assert_int_equal(fv_raw_status(busy, text), GRPC_STATUS_UNAVAILABLE);
    assert_string_equal(text, "the service is stopping");
    reply = fv_raw_receive(unary, &n_reply);
    assert_non_null(reply);
    free(reply);
    assert_int_equal(fv_raw_status(unary, NULL), GRPC_STATUS_OK);
    assert_int_equal(fv_raw_status(idle, NULL), GRPC_STATUS_UNAVAILABLE);
    fv_raw_free(idle);
    fv_raw_free(busy);
    fv_raw_free(unary);
    fv_raw_close(client);
    fv_echo_stop(&echo, 0);
    assert_int_equal(echo.n_closed,
                     2); /* the idle stream delivered nothing, so it is not reported */
}

static void test_stop_cancels_after_the_grace(void **state)
{
    fv_echo_t echo;

    (void)state;
    fv_echo_start(&echo, "127.0.0.1:0", FV_ECHO_HOLD);
    fv_raw_client_t *client = fv_raw_open(fv_rpc_address(echo.rpc, 0));
    fv_raw_call_t *stream = fv_raw_start(client, ATTEND, 0);
    fv_raw_call_t *unary = fv_raw_start(client, ONCE, 0);
    fv_raw_send(stream, "s", 1);
    fv_raw_send(unary, "u", 1);
    assert_true(fv_echo_wait(&echo, &echo.n_delivered, 2));
    int64_t begin_us = fv_clock_us();
    fv_rpc_stop(echo.rpc, 300);
    assert_true(fv_clock_us() - begin_us >= 290000);
    assert_int_equal(fv_raw_status(stream, NULL), GRPC_STATUS_UNAVAILABLE);
    assert_int_equal(fv_raw_status(unary, NULL), GRPC_STATUS_UNAVAILABLE);
    fv_raw_free(stream);
    fv_raw_free(unary);
    fv_raw_close(client);
    fv_echo_stop(&echo, 0); /* answers what is held: to calls that are gone */
    assert_int_equal(echo.n_closed, 2);
}

/* Many times, with calls in every state: what leaks or hangs, leaks or hangs here. */
static void test_start_stop_again_and_again(void **state)
{
    (void)state;
    for (int i = 0; i < 12; i++) {
        fv_echo_t echo;
        fv_raw_call_t *calls[6];
        fv_echo_start(&echo, "127.0.0.1:0", (fv_echo_mode_t)(i % 3));
        fv_raw_client_t *client = fv_raw_open(fv_rpc_address(echo.rpc, 0));
        for (int j = 0; j < 6; j++) {
            calls[j] = fv_raw_start(client, ((j % 2) == 0) ? ATTEND : ONCE, 0);
            if (j < 4) {
                fv_raw_send(calls[j], "x", 1);
            }
        }
        assert_true(fv_echo_wait(&echo, &echo.n_delivered, i % 5));
        fv_echo_stop(&echo, (uint32_t)(i % 4) * 10U);
        for (int j = 0; j < 6; j++) {
            fv_raw_cancel(calls[j]); /* WAIT_FOR_READY: the last ones may still look for a server */
            fv_raw_free(calls[j]);
        }
        fv_raw_close(client);
    }
}

/* ------------------------------------------------------------------ addresses */

static fv_status_t try_start(const char *address, fv_rpc_t **out)
{
    static fv_rpc_handlers_t k_none;
    fv_rpc_config_t config = fv_echo_config(address);

    return fv_rpc_start(&config, &k_none, out);
}

static void check_refused(const char *address, fv_status_t expected, const char *text)
{
    fv_rpc_t *rpc = NULL;

    assert_int_equal(try_start(address, &rpc), expected);
    assert_null(rpc);
    if (strstr(fv_error_context(), text) == NULL) {
        fail_msg("\"%s\" lacks \"%s\"", fv_error_context(), text);
    }
}

static void test_bad_addresses(void **state)
{
    char long_path[200];

    (void)state;
    check_refused("nonsense", FV_ERR_INVALID_ARG, "\"nonsense\"");
    check_refused(":7411", FV_ERR_INVALID_ARG, "HOST:PORT");
    check_refused("127.0.0.1:", FV_ERR_INVALID_ARG, "65535");
    check_refused("127.0.0.1:65536", FV_ERR_INVALID_ARG, "65535");
    check_refused("127.0.0.1:80x", FV_ERR_INVALID_ARG, "65535");
    check_refused("127.0.0.1:-1", FV_ERR_INVALID_ARG, "65535");
    check_refused("::1:7411", FV_ERR_INVALID_ARG, "brackets");
    check_refused("unix:", FV_ERR_INVALID_ARG, "no path");
    (void)memset(long_path, 'p', sizeof(long_path));
    memcpy(long_path, "unix:/", 6);
    long_path[5 + 108] = '\0';
    check_refused(long_path, FV_ERR_INVALID_ARG, "108 bytes, expected at most 107");
    check_refused("unix:/no/such/folder/s", FV_ERR_UNAVAILABLE, "unix:/no/such/folder/s");
    check_refused("192.0.2.1:7411", FV_ERR_UNAVAILABLE, "192.0.2.1:7411"); /* not of this host */
}

static void test_tcp_port_is_not_shared(void **state)
{
    fv_echo_t echo;

    (void)state;
    fv_echo_start(&echo, "127.0.0.1:0", FV_ECHO_AT_ONCE);
    const char *address = fv_rpc_address(echo.rpc, 0);
    assert_int_equal(fv_rpc_n_addresses(echo.rpc), 1);
    assert_int_equal(strncmp(address, "127.0.0.1:", 10), 0);
    assert_true(strtol(address + 10, NULL, 10) > 0); /* port 0 resolved */
    check_refused(address, FV_ERR_UNAVAILABLE, address);
    check_alive(address);
    fv_echo_stop(&echo, 2000);
}

static void test_unix_path_has_one_owner(void **state)
{
    char folder[] = "/tmp/fv-rpc-test-XXXXXX";
    char path[128];
    char lock[160];
    char address[160];
    struct stat named;
    fv_echo_t echo;

    (void)state;
    assert_non_null(mkdtemp(folder));
    (void)snprintf(path, sizeof(path), "%s/s", folder);
    (void)snprintf(lock, sizeof(lock), "%s.lock", path);
    (void)snprintf(address, sizeof(address), "unix:%s", path);
    fv_echo_start(&echo, address, FV_ECHO_AT_ONCE);
    assert_string_equal(fv_rpc_address(echo.rpc, 0), address);
    check_refused(address, FV_ERR_UNAVAILABLE, "another server listens there");
    check_alive(address); /* the first one still has it */
    fv_echo_stop(&echo, 2000);
    assert_int_not_equal(stat(path, &named), 0); /* nothing is left behind */
    assert_int_not_equal(stat(lock, &named), 0);

    /* what a killed server leaves: a socket nobody answers, and a lock file nobody holds */
    struct sockaddr_un stale = {.sun_family = AF_UNIX};
    (void)snprintf(stale.sun_path, sizeof(stale.sun_path), "%.100s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(fd, (const struct sockaddr *)&stale, sizeof(stale)), 0);
    FILE *file = fopen(lock, "w");
    assert_non_null(file);
    (void)fclose(file);
    (void)close(fd);
    fv_echo_start(&echo, address, FV_ECHO_AT_ONCE);
    check_alive(address);
    fv_echo_stop(&echo, 2000);

    /* a server that has the path but does not answer yet: the lock alone says so */
    fd = open(lock, O_RDWR | O_CREAT, 0600);
    assert_true(fd >= 0);
    assert_int_equal(flock(fd, LOCK_EX | LOCK_NB), 0);
    check_refused(address, FV_ERR_UNAVAILABLE, "another server listens there");
    (void)close(fd);
    (void)unlink(lock);

    /* a stranger's socket without a lock, and a file that is no socket, are left alone */
    fd = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(fd, (const struct sockaddr *)&stale, sizeof(stale)), 0);
    assert_int_equal(listen(fd, 1), 0);
    check_refused(address, FV_ERR_UNAVAILABLE, "another server listens there");
    (void)close(fd);
    (void)unlink(path);
    file = fopen(path, "w");
    assert_non_null(file);
    (void)fclose(file);
    check_refused(address, FV_ERR_UNAVAILABLE, "no socket");
    assert_int_equal(unlink(path), 0);
    assert_int_equal(rmdir(folder), 0); /* and no lock file is left */
}

static void test_bad_limits(void **state)
{
    static fv_rpc_handlers_t k_none;
    fv_rpc_t *rpc = NULL;
    fv_rpc_config_t config = fv_echo_config("127.0.0.1:0");

    (void)state;
    config.message_bytes_max = (size_t)1U << 31U;
    assert_int_equal(fv_rpc_start(&config, &k_none, &rpc), FV_ERR_INVALID_ARG);
    config = fv_echo_config("127.0.0.1:0");
    config.memory_bytes_max = config.message_bytes_max - 1U;
    assert_int_equal(fv_rpc_start(&config, &k_none, &rpc), FV_ERR_INVALID_ARG);
    config = fv_echo_config("127.0.0.1:0");
    config.stream_inflight_max = 0;
    assert_int_equal(fv_rpc_start(&config, &k_none, &rpc), FV_ERR_INVALID_ARG);
    config = fv_echo_config("127.0.0.1:0");
    config.n_listen = FV_LISTEN_MAX + 1;
    assert_int_equal(fv_rpc_start(&config, &k_none, &rpc), FV_ERR_INVALID_ARG);
    assert_null(rpc);
}

/* ------------------------------------------------------------------ strangers */

static void throw_bytes(int port, size_t n_bytes, const char *first)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    uint8_t bytes[4096];
    int fd = socket(AF_INET, SOCK_STREAM, 0);

    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    assert_int_equal(connect(fd, (const struct sockaddr *)&to, sizeof(to)), 0);
    for (size_t i = 0; i < sizeof(bytes); i++) {
        bytes[i] = random_byte();
    }
    (void)send(fd, first, strlen(first), MSG_NOSIGNAL);
    (void)send(fd, bytes, (n_bytes < sizeof(bytes)) ? n_bytes : sizeof(bytes), MSG_NOSIGNAL);
    (void)close(fd);
}

static void test_random_bytes_on_the_port(void **state)
{
    static const char *const k_firsts[] = {"", "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                                           "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"};
    fv_echo_t echo;

    (void)state;
    fv_echo_start(&echo, "127.0.0.1:0", FV_ECHO_AT_ONCE);
    int port = (int)strtol(strrchr(fv_rpc_address(echo.rpc, 0), ':') + 1, NULL, 10);
    for (size_t i = 0; i < 60; i++) {
        throw_bytes(port, (i * 97U) % 4096U, k_firsts[i % FV_COUNT(k_firsts)]);
    }
    check_alive(fv_rpc_address(echo.rpc, 0));
    assert_int_equal(fv_echo_read(&echo, &echo.n_delivered), 1);
    fv_echo_stop(&echo, 2000);
}

int main(int argc, char **argv)
{
    const char *seed = getenv("FV_SEED"); /* NOLINT(concurrency-mt-unsafe): one thread yet */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_client_is_killed_mid_stream),
        cmocka_unit_test(test_stop_finishes_what_runs),
        cmocka_unit_test(test_stop_cancels_after_the_grace),
        cmocka_unit_test(test_start_stop_again_and_again),
        cmocka_unit_test(test_bad_addresses),
        cmocka_unit_test(test_tcp_port_is_not_shared),
        cmocka_unit_test(test_unix_path_has_one_owner),
        cmocka_unit_test(test_bad_limits),
        cmocka_unit_test(test_random_bytes_on_the_port),
    };

    if ((argc == 3) && (strcmp(argv[1], "--client") == 0)) {
        return run_client(argv[2]);
    }
    if (readlink("/proc/self/exe", g_program, sizeof(g_program) - 1U) <= 0) {
        return 1;
    }
    g_random = (seed != NULL) ? strtoull(seed, NULL, 10) : 20261122U;
    g_random += (g_random == 0U);
    (void)printf("FV_SEED=%llu\n", (unsigned long long)g_random);
    /* NOLINTNEXTLINE(concurrency-mt-unsafe): a name, with * and ?; unset: all */
    cmocka_set_test_filter(getenv("FV_TEST"));
    return cmocka_run_group_tests(tests, NULL, NULL);
}
