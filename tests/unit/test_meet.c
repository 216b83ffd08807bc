/*
 * test_meet.c - only ranks of the job get a place, and nobody else keeps them waiting.
 *
 * Method: ranks and strangers are threads of this process on a unix socket; fv_meet_accept() runs here.
 */
#include "common/frame.h"
#include "common/secret.h"
#include "coord/meet.h"
#include "tests/support/test.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define EPOCH    7U
#define N_RANKS  4U
#define SHORT_MS 5000 /* enough for those who do come, on a busy machine */
#define SILENT   80   /* more than fv_meet_accept() keeps at a time for so few ranks */

static const uint8_t k_secret[FV_SECRET_BYTES] = "a job's secret!";
static char g_path[64];

typedef enum who {
    RANK,
    SILENT_ONE,
    GARBAGE,
    WRONG_SECRET,
    WRONG_EPOCH,
    OLD_PROOF,     /* of another connection */
    OTHER_RANK,    /* a proof for rank 1, shown by rank 2 */
    RANK_ZERO,     /* knows the secret and claims rank 0 */
    RANK_TOO_HIGH, /* and one that is not there */
    NO_CHANNEL,    /* and a connection that no rank has */
    HALF_A_RANK    /* has no connection for beats */
} who_t;

typedef struct guest {
    who_t who;
    uint32_t rank;
    pthread_t thread;
    int fd, beat_fd;
    fv_status_t status; /* of introducing itself; who comes when all are in is turned away anyhow */
} guest_t;

static int listening(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    (void)snprintf(g_path, sizeof(g_path), "/tmp/fv_meet_%ld", (long)getpid());
    (void)unlink(g_path);
    (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", g_path);
    assert_int_equal(bind(fd, (const struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(listen(fd, 128), 0);
    return fd;
}

static int connected(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", g_path);
    assert_int_equal(connect(fd, (const struct sockaddr *)&address, sizeof(address)), 0);
    return fd;
}

static fv_ctl_hello_t hello_of(uint32_t rank)
{
    fv_ctl_hello_t hello = {.rank = rank, .n_threads = 10U + rank};

    (void)snprintf(hello.host, sizeof(hello.host), "host%u", rank);
    return hello;
}

/* Takes what a real rank says on a connection of its own, and says it (changed to `as_rank`) on fd. */
static void say_what_another_said(int fd, uint32_t rank, uint32_t as_rank)
{
    fv_meet_challenge_t own = {.magic = FV_CTL_MAGIC, .epoch = EPOCH, .nonce = {1, 2, 3}};
    uint8_t said[sizeof(fv_ctl_header_t) + sizeof(fv_ctl_hello_t)];
    fv_meet_challenge_t challenge;
    fv_ctl_hello_t hello = hello_of(rank);
    int pair[2];

    if (fv_frame_read(fd, &challenge, sizeof(challenge), 5000) != FV_OK) {
        return; /* all ranks were in before */
    }
    if (as_rank != rank) {
        own = challenge; /* a man in the middle: the right nonce, another rank */
    }
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    assert_int_equal(write(pair[0], &own, sizeof(own)), sizeof(own));
    assert_int_equal(fv_meet_introduce(pair[1], k_secret, EPOCH, &hello, 1000), FV_OK);
    assert_int_equal(fv_frame_read(pair[0], said, sizeof(said), 1000), FV_OK);
    memcpy(said + sizeof(fv_ctl_header_t) + offsetof(fv_ctl_hello_t, rank), &as_rank,
           sizeof(as_rank));
    (void)send(fd, said, sizeof(said), MSG_NOSIGNAL);
    (void)close(pair[0]);
    (void)close(pair[1]);
}

static void *visit(void *arg)
{
    guest_t *guest = arg;
    uint8_t garbage[4096];
    uint8_t other[FV_SECRET_BYTES] = "another secret!";
    fv_ctl_hello_t hello = hello_of(guest->rank);

    memset(garbage, 0x5a, sizeof(garbage));
    guest->fd = connected();
    guest->beat_fd = -1;
    switch (guest->who) {
    case RANK:
        guest->status = fv_meet_introduce(guest->fd, k_secret, EPOCH, &hello, 5000);
        guest->beat_fd = connected();
        hello.channel = FV_CHANNEL_BEAT;
        if (guest->status == FV_OK) {
            guest->status = fv_meet_introduce(guest->beat_fd, k_secret, EPOCH, &hello, 5000);
        }
        break;
    case HALF_A_RANK:
        guest->status = fv_meet_introduce(guest->fd, k_secret, EPOCH, &hello, 5000);
        break;
    case NO_CHANNEL:
        hello.channel = FV_CHANNEL_BEAT + 1;
        guest->status = fv_meet_introduce(guest->fd, k_secret, EPOCH, &hello, 5000);
        break;
    case RANK_ZERO:
    case RANK_TOO_HIGH:
        guest->status = fv_meet_introduce(guest->fd, k_secret, EPOCH, &hello, 5000);
        break;
    case WRONG_SECRET:
        guest->status = fv_meet_introduce(guest->fd, other, EPOCH, &hello, 5000);
        break;
    case WRONG_EPOCH:
        guest->status = fv_meet_introduce(guest->fd, k_secret, EPOCH + 1U, &hello, 5000);
        break;
    case GARBAGE:
        (void)send(guest->fd, garbage, sizeof(garbage), MSG_NOSIGNAL);
        break;
    case OLD_PROOF:
        say_what_another_said(guest->fd, guest->rank, guest->rank);
        break;
    case OTHER_RANK:
        say_what_another_said(guest->fd, 1, guest->rank);
        break;
    case SILENT_ONE:
    default:
        break;
    }
    return NULL;
}

static void begin(guest_t *guest, who_t who, uint32_t rank)
{
    *guest = (guest_t){.who = who, .rank = rank};
    assert_int_equal(pthread_create(&guest->thread, NULL, visit, guest), 0);
}

static void end(guest_t *guest)
{
    assert_int_equal(pthread_join(guest->thread, NULL), 0);
    assert_true((guest->who != RANK) || (guest->status == FV_OK));
    assert_true((guest->who != WRONG_EPOCH) || (guest->status != FV_OK));
    (void)close(guest->fd);
    if (guest->beat_fd >= 0) {
        (void)close(guest->beat_fd);
    }
}

static void test_ranks_among_strangers(void **state)
{
    static const who_t k_strangers[] = {GARBAGE,   WRONG_SECRET, WRONG_EPOCH,   OLD_PROOF,
                                        RANK_ZERO, OTHER_RANK,   RANK_TOO_HIGH, NO_CHANNEL};
    static guest_t guests[SILENT + FV_COUNT(k_strangers) + N_RANKS];
    int fds[N_RANKS] = {-1, -1, -1, -1};
    int beats[N_RANKS] = {-1, -1, -1, -1};
    static fv_ctl_hello_t hellos[N_RANKS];
    size_t n = 0;
    int fd = listening();

    (void)state;
    for (size_t i = 0; i < SILENT; i++) {
        begin(&guests[n++], SILENT_ONE, 0);
    }
    for (size_t i = 0; i < SILENT;
         i++) { /* all are there before anybody else: the oldest make room */
        assert_int_equal(pthread_join(guests[i].thread, NULL), 0);
    }
    for (size_t i = 0; i < FV_COUNT(k_strangers); i++) {
        uint32_t rank = (k_strangers[i] == RANK_ZERO)       ? 0U
                        : (k_strangers[i] == RANK_TOO_HIGH) ? N_RANKS
                                                            : 2U;
        begin(&guests[n++], k_strangers[i], rank);
    }
    for (uint32_t r = 1; r < N_RANKS; r++) {
        begin(&guests[n++], RANK, r);
    }
    assert_int_equal(fv_meet_accept(fd, k_secret, EPOCH, N_RANKS, 20000, NULL, fds, beats, hellos),
                     FV_OK);
    (void)close(fd);
    for (size_t i = 0; i < SILENT; i++) {
        (void)close(guests[i].fd);
    }
    for (size_t i = SILENT; i < n; i++) {
        end(&guests[i]);
    }
    assert_int_equal(fds[0] & beats[0], -1);
    for (uint32_t r = 1; r < N_RANKS; r++) {
        char host[16];
        (void)snprintf(host, sizeof(host), "host%u", r);
        assert_true((fds[r] >= 0) && (beats[r] >= 0) && (fds[r] != beats[r]));
        assert_int_equal(hellos[r].channel, FV_CHANNEL_CONTROL);
        assert_string_equal(hellos[r].host, host);
        assert_int_equal(hellos[r].n_threads, 10U + r);
        assert_int_equal(hellos[r].proof[0] | hellos[r].proof[31], 0);
        (void)close(fds[r]);
        (void)close(beats[r]);
    }
    (void)unlink(g_path);
}

/* Rank 2 comes, and one more that is none of 1 and 3: those are missed by name. */
static void meet_in_vain(who_t who, uint32_t rank, const char *expected)
{
    int fds[N_RANKS] = {-1, -1, -1, -1};
    int beats[N_RANKS] = {-1, -1, -1, -1};
    fv_ctl_hello_t hellos[N_RANKS];
    guest_t guests[2];
    int fd = listening();

    begin(&guests[0], RANK, 2);
    begin(&guests[1], who, rank);
    assert_int_equal(
        fv_meet_accept(fd, k_secret, EPOCH, N_RANKS, SHORT_MS, NULL, fds, beats, hellos),
        FV_ERR_TIMED_OUT);
    assert_non_null(strstr(fv_error_context(), expected));
    end(&guests[0]);
    end(&guests[1]);
    for (size_t r = 1; r < N_RANKS; r++) {
        if (fds[r] >= 0) {
            (void)close(fds[r]);
        }
        if (beats[r] >= 0) {
            (void)close(beats[r]);
        }
    }
    (void)close(fd);
    (void)unlink(g_path);
}

static void test_who_is_missing_is_named(void **state)
{
    (void)state;
    meet_in_vain(WRONG_SECRET, 3, "did not connect within 5 s: 1 3");
}

static void test_the_same_rank_twice(void **state)
{
    (void)state;
    meet_in_vain(RANK, 2, ": 1 3");
}

/* A rank that could not be missed when it is stopped is not in. */
static void test_a_rank_without_beats_is_not_in(void **state)
{
    (void)state;
    meet_in_vain(HALF_A_RANK, 3, ": 1 3");
}

/* Later one rank alone is awaited: another one that is here already is not let in a second time. */
static void test_one_rank_joins_later(void **state)
{
    int fds[N_RANKS] = {0, 0, -1, 0};
    int beats[N_RANKS] = {0, 0, -1, 0};
    static fv_ctl_hello_t hellos[N_RANKS];
    guest_t guests[2];
    int fd = listening();

    (void)state;
    begin(&guests[0], RANK, 1);
    assert_int_equal(pthread_join(guests[0].thread, NULL), 0);
    begin(&guests[1], RANK, 2);
    assert_int_equal(fv_meet_accept(fd, k_secret, EPOCH, N_RANKS, 20000, NULL, fds, beats, hellos),
                     FV_OK);
    assert_int_equal(fds[1] | beats[1] | fds[3] | beats[3], 0);
    assert_string_equal(hellos[1].host, "");
    assert_string_equal(hellos[2].host, "host2");
    assert_true((fds[2] > 0) && (beats[2] > 0));
    (void)close(guests[0].fd);
    end(&guests[1]);
    (void)close(fds[2]);
    (void)close(beats[2]);
    (void)close(fd);
    (void)unlink(g_path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ranks_among_strangers),
        cmocka_unit_test(test_who_is_missing_is_named),
        cmocka_unit_test(test_the_same_rank_twice),
        cmocka_unit_test(test_a_rank_without_beats_is_not_in),
        cmocka_unit_test(test_one_rank_joins_later),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
