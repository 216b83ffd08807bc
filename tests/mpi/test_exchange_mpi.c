/*
 * test_exchange_mpi.c - the packed all-to-all over MPI.
 *
 * Goal:   every message arrives whole, at every size and in every sparse pattern; a peer that is silent, gone or
 *         of another opinion about a size ends the call with its own status, and nothing hangs.
 * Method: all ranks derive the same random pattern from one seed.
 */
#include "common/clock.h"
#include "tests/support/mpi_main.h"
#include "tests/support/random.h"
#include "tests/support/test.h"
#include "worker/progress_mpi.h"
#include "worker/worker.h"

#include <limits.h>
#include <string.h>

#define RANKS_MAX 8

static int rank;
static int n_ranks;
static uint64_t seed;

static uint8_t byte_of(int from, int to, size_t i)
{
    return (uint8_t)((size_t)from * 131U + (size_t)to * 17U + i * 7U + (i >> 8));
}

static size_t size_of(fv_random_t *r)
{
    int64_t kind = fv_random_int(r, 0, 3);

    return (kind == 0)   ? 0U
           : (kind == 1) ? (size_t)fv_random_int(r, 1, 64)
           : (kind == 2) ? (size_t)fv_random_int(r, 4096, 9000)
                         : (size_t)fv_random_int(r, 100000, 300000);
}

/* One exchange: sizes[from][to]. True when it went well and every byte is right. */
static bool exchange_once(fv_exchange_mpi_t *exchange, size_t sizes[RANKS_MAX][RANKS_MAX])
{
    fv_exchange_message_t sends[RANKS_MAX];
    fv_exchange_message_t recvs[RANKS_MAX];
    size_t n_sends = 0;
    size_t n_recvs = 0;
    bool ok = true;

    for (int p = 0; p < n_ranks; p++) {
        size_t n = sizes[rank][p];

        if ((p != rank) && (n > 0U)) {
            uint8_t *data = malloc(n);

            for (size_t i = 0; i < n; i++) {
                data[i] = byte_of(rank, p, i);
            }
            sends[n_sends++] =
                (fv_exchange_message_t){.peer = (uint32_t)p, .data = data, .n_bytes = n};
        }
        n = sizes[p][rank];
        if ((p != rank) && (n > 0U)) {
            recvs[n_recvs++] =
                (fv_exchange_message_t){.peer = (uint32_t)p, .data = calloc(n, 1), .n_bytes = n};
        }
    }
    ok = fv_exchange_mpi_ops.all_to_all(exchange, sends, n_sends, recvs, n_recvs, 10000) == FV_OK;
    for (size_t m = 0; m < n_recvs; m++) {
        const uint8_t *data = recvs[m].data;

        for (size_t i = 0; ok && (i < recvs[m].n_bytes); i++) {
            ok = data[i] == byte_of((int)recvs[m].peer, rank, i);
        }
        free(recvs[m].data);
    }
    for (size_t m = 0; m < n_sends; m++) {
        free(sends[m].data);
    }
    return ok;
}

static bool exchange_rounds(int n_rounds, uint64_t round_seed)
{
    MPI_Comm comm = MPI_COMM_WORLD;
    fv_random_t r = {round_seed};
    fv_exchange_mpi_t *exchange = NULL;
    bool ok = fv_exchange_mpi_create(&comm, &exchange) == FV_OK;

    for (int i = 0; ok && (i < n_rounds); i++) {
        size_t sizes[RANKS_MAX][RANKS_MAX];

        for (int a = 0; a < n_ranks; a++) {
            for (int b = 0; b < n_ranks; b++) {
                sizes[a][b] = size_of(&r);
            }
        }
        ok = exchange_once(exchange, sizes);
    }
    fv_exchange_mpi_destroy(exchange);
    return ok;
}

static void test_random_patterns_arrive(void **state)
{
    (void)state;
    fv_assert_all_ranks(exchange_rounds(100, seed));
}

/* Messages above the count limit take the derived-type path; the limit is lowered to reach it. */
static void test_messages_above_the_count_limit(void **state)
{
    (void)state;
    fv_mpi_count_max = 1000;
    bool ok = exchange_rounds(30, seed + 1U);
    fv_mpi_count_max = INT_MAX;
    fv_assert_all_ranks(ok);
}

/* The next cases spoil a communicator, so each has its own. */
static fv_exchange_mpi_t *own_exchange(MPI_Comm *comm)
{
    fv_exchange_mpi_t *exchange = NULL;

    (void)MPI_Comm_dup(MPI_COMM_WORLD, comm);
    return (fv_exchange_mpi_create(comm, &exchange) == FV_OK) ? exchange : NULL;
}

static void test_a_silent_peer_times_out(void **state)
{
    static uint8_t never[64]; /* its receive stays posted */
    MPI_Comm comm = MPI_COMM_NULL;
    fv_exchange_mpi_t *exchange = own_exchange(&comm);
    bool ok = exchange != NULL;

    (void)state;
    if (ok && (rank == 0)) {
        fv_exchange_message_t recv = {.peer = 1, .data = never, .n_bytes = sizeof(never)};
        int64_t t = fv_clock_us();

        ok = fv_exchange_mpi_ops.all_to_all(exchange, NULL, 0, &recv, 1, 100) == FV_ERR_TIMED_OUT;
        ok = ok && (fv_clock_us() - t >= 100000);
        /* afterwards it refuses at once: the order of messages is lost */
        ok = ok &&
             (fv_exchange_mpi_ops.all_to_all(exchange, NULL, 0, &recv, 1, 100) == FV_ERR_RANK_LOST);
    }
    fv_exchange_mpi_destroy(exchange);
    fv_assert_all_ranks(ok);
}

static bool gone_after_a_while(void *arg)
{
    int *n_polls = arg;

    return ++*n_polls > 3;
}

static void test_an_abort_ends_the_wait(void **state)
{
    static uint8_t never[64];
    MPI_Comm comm = MPI_COMM_NULL;
    fv_exchange_mpi_t *exchange = own_exchange(&comm);
    bool ok = exchange != NULL;
    int n_polls = 0;

    (void)state;
    if (ok && (rank == 0)) {
        fv_exchange_message_t recv = {.peer = 1, .data = never, .n_bytes = sizeof(never)};

        fv_exchange_mpi_ops.on_poll(exchange, gone_after_a_while, &n_polls);
        ok = fv_exchange_mpi_ops.all_to_all(exchange, NULL, 0, &recv, 1, 10000) == FV_ERR_RANK_LOST;
        ok = ok && (n_polls == 4);
    }
    fv_exchange_mpi_destroy(exchange);
    fv_assert_all_ranks(ok);
}

/* Rank 1 sends n_sent bytes where rank 0 expects 4096. */
static void check_mismatch(size_t n_sent, fv_status_t expected)
{
    static uint8_t data[8192];
    MPI_Comm comm = MPI_COMM_NULL;
    fv_exchange_mpi_t *exchange = own_exchange(&comm);
    fv_exchange_message_t message = {.peer = 1U - (uint32_t)rank, .data = data};
    bool ok = exchange != NULL;

    if (ok && (rank == 0)) {
        message.n_bytes = 4096;
        ok = fv_exchange_mpi_ops.all_to_all(exchange, NULL, 0, &message, 1, 10000) == expected;
    } else if (ok && (rank == 1)) {
        message.n_bytes = n_sent;
        ok = fv_exchange_mpi_ops.all_to_all(exchange, &message, 1, NULL, 0, 10000) == FV_OK;
    }
    fv_exchange_mpi_destroy(exchange);
    fv_assert_all_ranks(ok);
}

static void test_sizes_that_differ_are_refused(void **state)
{
    (void)state;
    check_mismatch(1000, FV_ERR_PROTOCOL); /* shorter */
    check_mismatch(5000, FV_ERR_MPI);      /* longer: truncated */
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_patterns_arrive),
        cmocka_unit_test(test_messages_above_the_count_limit),
        cmocka_unit_test(test_a_silent_peer_times_out),
        cmocka_unit_test(test_an_abort_ends_the_wait),
        cmocka_unit_test(test_sizes_that_differ_are_refused),
    };

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &n_ranks);
    seed = fv_random_seed(1);
    return fv_mpi_finish(cmocka_run_group_tests(tests, NULL, NULL));
}
