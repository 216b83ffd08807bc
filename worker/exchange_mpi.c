/*
 * exchange_mpi.c - the packed all-to-all of a step over MPI, on host memory.
 *
 * Decode path: station 8 of 10. Before: worker/partials.c. After: kernels (merge).
 *
 * Point to point, because a step involves few of the ranks and a collective involves all; and because a collective with
 * a dead member can not be given up.
 */
#include "worker/internal.h"
#include "worker/progress_mpi.h"

#include <stdlib.h>

struct fv_exchange_mpi {
    MPI_Comm comm;
    fv_array_t requests; /* MPI_Request: receives, then sends */
    fv_array_t statuses; /* MPI_Status, alike */
    bool (*is_aborted)(void *arg);
    void *arg;
    bool broken; /* messages were given up: the communicator's order is lost */
};

fv_status_t fv_exchange_mpi_create(void *mpi_comm, fv_exchange_mpi_t **out)
{
    fv_exchange_mpi_t *exchange = calloc(1, sizeof(*exchange));

    if (exchange == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "exchange: no host memory");
    }
    exchange->comm = *(MPI_Comm *)mpi_comm;
    fv_status_t status = fv_mpi_check(MPI_Comm_set_errhandler(exchange->comm, MPI_ERRORS_RETURN),
                                      "MPI_Comm_set_errhandler");
    if (status != FV_OK) {
        free(exchange);
        return status;
    }
    *out = exchange;
    return FV_OK;
}

void fv_exchange_mpi_destroy(fv_exchange_mpi_t *exchange)
{
    if (exchange == NULL) {
        return;
    }
    fv_array_free(&exchange->requests);
    fv_array_free(&exchange->statuses);
    free(exchange);
}

fv_status_t fv_exchange_mpi_renew(fv_exchange_mpi_t *exchange, void *mpi_comm)
{
    exchange->comm = *(MPI_Comm *)mpi_comm;
    exchange->broken =
        false; /* the next step's requests are written over those that were given up */
    return fv_mpi_check(MPI_Comm_set_errhandler(exchange->comm, MPI_ERRORS_RETURN),
                        "MPI_Comm_set_errhandler");
}

static void on_poll(void *ctx, bool (*is_gone)(void *arg), void *arg)
{
    fv_exchange_mpi_t *exchange = ctx;

    exchange->is_aborted = is_gone;
    exchange->arg = arg;
}

/* Receives first, so that what arrives finds its place. */
static fv_status_t post_all(fv_exchange_mpi_t *exchange,
                            const fv_exchange_message_t *sends,
                            size_t n_sends,
                            const fv_exchange_message_t *recvs,
                            size_t n_recvs)
{
    MPI_Request *requests = exchange->requests.data;

    for (size_t i = 0; i < n_recvs; i++) {
        FV_RETURN_IF_ERR(fv_mpi_post_recv(exchange->comm, recvs[i].data, recvs[i].n_bytes,
                                          recvs[i].peer, FV_TAG_EXCHANGE, &requests[i]));
    }
    for (size_t i = 0; i < n_sends; i++) {
        FV_RETURN_IF_ERR(fv_mpi_post_send(exchange->comm, sends[i].data, sends[i].n_bytes,
                                          sends[i].peer, FV_TAG_EXCHANGE, &requests[n_recvs + i]));
    }
    return FV_OK;
}

static fv_status_t exchange_all(fv_exchange_mpi_t *exchange,
                                const fv_exchange_message_t *sends,
                                size_t n_sends,
                                const fv_exchange_message_t *recvs,
                                size_t n_recvs,
                                uint32_t deadline_ms)
{
    fv_mpi_limits_t limits = {
        .deadline_ms = deadline_ms, .is_aborted = exchange->is_aborted, .arg = exchange->arg};
    MPI_Status *statuses = exchange->statuses.data;

    FV_RETURN_IF_ERR(post_all(exchange, sends, n_sends, recvs, n_recvs));
    FV_RETURN_IF_ERR(
        fv_mpi_wait_all(exchange->requests.data, statuses, n_recvs + n_sends, &limits));
    for (size_t i = 0; i < n_recvs; i++) {
        FV_RETURN_IF_ERR(fv_mpi_check_bytes(&statuses[i], recvs[i].n_bytes, recvs[i].peer));
    }
    return FV_OK;
}

static fv_status_t all_to_all(void *ctx,
                              const fv_exchange_message_t *sends,
                              size_t n_sends,
                              const fv_exchange_message_t *recvs,
                              size_t n_recvs,
                              uint32_t deadline_ms)
{
    fv_exchange_mpi_t *exchange = ctx;
    size_t n = n_sends + n_recvs;

    if (exchange->broken) {
        return fv_fail(FV_ERR_RANK_LOST, "exchange: it failed in an earlier step");
    }
    FV_RETURN_IF_ERR(fv_array_reserve(&exchange->requests, n, sizeof(MPI_Request)));
    FV_RETURN_IF_ERR(fv_array_reserve(&exchange->statuses, n, sizeof(MPI_Status)));
    fv_status_t status = exchange_all(exchange, sends, n_sends, recvs, n_recvs, deadline_ms);
    exchange->broken = (status != FV_OK);
    return status;
}

static bool is_aborted(void *ctx)
{
    const fv_exchange_mpi_t *exchange = ctx;

    return (exchange->is_aborted != NULL) && exchange->is_aborted(exchange->arg);
}

const fv_exchange_ops_t fv_exchange_mpi_ops = {
    .name = "mpi",
    .all_to_all = all_to_all,
    .is_aborted = is_aborted,
    .on_poll = on_poll,
};
