/*
 * test_heartbeat.c - who sends is not missed, who is silent or gone is, once, and who was given up is not.
 *
 * Method: two heartbeats, or one and this test, at the ends of socket pairs. Times are long against a busy machine's naps.
 */
#include "common/clock.h"
#include "coord/heartbeat.h"
#include "tests/support/test.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BEAT_MS    20U
#define SILENCE_MS 400U
#define PEERS      3

typedef struct notes {
    atomic_uint n_calls[PEERS];
    atomic_uint silent_ms[PEERS];
} notes_t;

static void nap(uint32_t ms)
{
    const struct timespec t = {.tv_sec = ms / 1000U, .tv_nsec = (long)(ms % 1000U) * 1000000};

    (void)nanosleep(&t, NULL);
}

static void on_silent(void *arg, uint32_t peer, uint32_t silent_ms)
{
    notes_t *notes = arg;

    atomic_store(&notes->silent_ms[peer], silent_ms);
    atomic_fetch_add(&notes->n_calls[peer], 1U);
}

static fv_heartbeat_t *started(const int *fds, uint32_t n, notes_t *notes)
{
    const fv_heartbeat_config_t config = {
        .interval_ms = BEAT_MS, .silence_ms = SILENCE_MS, .on_silent = on_silent, .arg = notes};
    fv_heartbeat_t *h = NULL;

    assert_int_equal(fv_heartbeat_start(&config, fds, n, &h), FV_OK);
    return h;
}

static void pair(int out[2])
{
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, out), 0);
}

/* Waits until peer is missed; false after 20 s. */
static bool is_missed(notes_t *notes, uint32_t peer)
{
    int64_t end_us = fv_clock_us() + 20000000;

    while ((atomic_load(&notes->n_calls[peer]) == 0U) && (fv_clock_us() < end_us)) {
        nap(5);
    }
    return atomic_load(&notes->n_calls[peer]) > 0U;
}

static void test_silent_and_closed_are_missed_once_and_the_living_are_not(void **state)
{
    notes_t ours = {0};
    notes_t theirs = {0};
    int living[2];
    int silent[2];
    int closed[2];

    (void)state;
    pair(living);
    pair(silent);
    pair(closed);
    int fds[PEERS] = {living[0], silent[0], closed[0]};
    fv_heartbeat_t *h = started(fds, PEERS, &ours);
    fv_heartbeat_t *other = started(&living[1], 1, &theirs);
    (void)close(closed[1]);
    assert_true(is_missed(&ours, 1));
    assert_true(is_missed(&ours, 2));
    assert_true(atomic_load(&ours.silent_ms[1]) >= SILENCE_MS);
    nap(2U * SILENCE_MS);
    assert_int_equal(atomic_load(&ours.n_calls[0]), 0);
    assert_int_equal(atomic_load(&theirs.n_calls[0]), 0);
    assert_int_equal(atomic_load(&ours.n_calls[1]), 1);
    assert_int_equal(atomic_load(&ours.n_calls[2]), 1);
    fv_heartbeat_stop(other); /* now it is silent, too */
    assert_true(is_missed(&ours, 0));
    fv_heartbeat_stop(h);
    (void)close(silent[1]);
}

static void test_whoever_was_dropped_is_not_missed(void **state)
{
    notes_t notes = {0};
    int kept[2];
    int dropped[2];
    uint8_t byte = 0;

    (void)state;
    pair(kept);
    pair(dropped);
    int fds[2] = {dropped[0], kept[0]};
    fv_heartbeat_t *h = started(fds, 2, &notes);
    fv_heartbeat_drop(h, 0);
    fv_heartbeat_drop(h, 0);
    assert_true(is_missed(&notes, 1)); /* so it did look */
    assert_int_equal(atomic_load(&notes.n_calls[0]), 0);
    fv_heartbeat_stop(h);
    while (recv(dropped[1], &byte, 1, 0) > 0) { /* what was sent before, then the end */
    }
    assert_int_equal(recv(dropped[1], &byte, 1, 0), 0);
    (void)close(dropped[1]);
    (void)close(kept[1]);
}

static void test_another_process_in_a_lost_ones_place_is_watched_again(void **state)
{
    notes_t notes = {0};
    int lost[2];
    int fresh[2];

    (void)state;
    pair(lost);
    pair(fresh);
    fv_heartbeat_t *h = started(&lost[0], 1, &notes);
    assert_true(is_missed(&notes, 0));
    fv_heartbeat_replace(h, 0, fresh[0]);
    atomic_store(&notes.n_calls[0], 0U);
    assert_true(is_missed(&notes, 0)); /* it is silent, too */
    fv_heartbeat_stop(h);
    (void)close(lost[1]);
    (void)close(fresh[1]);
}

static void test_a_silence_no_longer_than_the_interval_is_refused(void **state)
{
    const fv_heartbeat_config_t config = {
        .interval_ms = 100, .silence_ms = 100, .on_silent = on_silent};
    fv_heartbeat_t *h = NULL;
    int fds[2];

    (void)state;
    pair(fds);
    assert_int_equal(fv_heartbeat_start(&config, fds, 1, &h), FV_ERR_INVALID_ARG);
    assert_null(h);
    assert_true(send(fds[0], "x", 1, MSG_NOSIGNAL) < 0); /* it was taken and closed */
    (void)close(fds[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_silent_and_closed_are_missed_once_and_the_living_are_not),
        cmocka_unit_test(test_whoever_was_dropped_is_not_missed),
        cmocka_unit_test(test_another_process_in_a_lost_ones_place_is_watched_again),
        cmocka_unit_test(test_a_silence_no_longer_than_the_interval_is_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
