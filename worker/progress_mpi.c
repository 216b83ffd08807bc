/*
 * progress_mpi.c - posting and waiting, with deadlines.
 */
#include "worker/progress_mpi.h"

#include "common/clock.h"

#include <limits.h>
#include <sched.h>
#include <time.h>

#define SPIN_US  150  /* ranks of one step finish close together: most waits end here */
#define YIELD_US 1000 /* then the core goes to whoever wants it */
#define NAP_NS   30000

size_t fv_mpi_count_max = INT_MAX;

fv_status_t fv_mpi_check(int rc, const char *call)
{
    char text[MPI_MAX_ERROR_STRING] = "";
    int n = 0;

    if (rc == MPI_SUCCESS) {
        return FV_OK;
    }
    (void)MPI_Error_string(rc, text, &n);
    return fv_fail(FV_ERR_MPI, "%s: %.200s", call, text);
}

/* n_bytes as (count, type): bytes, or one element of `whole * max + rest` bytes that the caller frees. */
static fv_status_t make_type(size_t n_bytes, int *count, MPI_Datatype *type)
{
    int max = (int)fv_mpi_count_max;
    int lengths[2] = {1, (int)(n_bytes % fv_mpi_count_max)};
    MPI_Aint places[2] = {0, (MPI_Aint)(n_bytes - n_bytes % fv_mpi_count_max)};
    MPI_Datatype row = MPI_DATATYPE_NULL;
    MPI_Datatype rows = MPI_DATATYPE_NULL;

    *count = (int)n_bytes;
    *type = MPI_BYTE;
    if (n_bytes <= fv_mpi_count_max) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_mpi_check(MPI_Type_contiguous(max, MPI_BYTE, &row), "MPI_Type_contiguous"));
    int rc = MPI_Type_contiguous((int)(n_bytes / fv_mpi_count_max), row, &rows);
    (void)MPI_Type_free(&row);
    FV_RETURN_IF_ERR(fv_mpi_check(rc, "MPI_Type_contiguous"));
    MPI_Datatype kinds[2] = {rows, MPI_BYTE};
    rc = MPI_Type_create_struct(2, lengths, places, kinds, type);
    (void)MPI_Type_free(&rows);
    FV_RETURN_IF_ERR(fv_mpi_check(rc, "MPI_Type_create_struct"));
    *count = 1;
    return fv_mpi_check(MPI_Type_commit(type), "MPI_Type_commit");
}

/* A type may be freed while messages of it are under way. */
static void free_type(MPI_Datatype *type)
{
    if (*type != MPI_BYTE) {
        (void)MPI_Type_free(type);
    }
}

fv_status_t fv_mpi_post_recv(MPI_Comm comm,
                             void *data,
                             size_t n_bytes,
                             uint32_t peer,
                             int tag,
                             MPI_Request *out)
{
    MPI_Datatype type = MPI_DATATYPE_NULL;
    int count = 0;

    FV_RETURN_IF_ERR(make_type(n_bytes, &count, &type));
    int rc = MPI_Irecv(data, count, type, (int)peer, tag, comm, out);
    free_type(&type);
    return fv_mpi_check(rc, "MPI_Irecv");
}

fv_status_t fv_mpi_post_send(MPI_Comm comm,
                             const void *data,
                             size_t n_bytes,
                             uint32_t peer,
                             int tag,
                             MPI_Request *out)
{
    MPI_Datatype type = MPI_DATATYPE_NULL;
    int count = 0;

    FV_RETURN_IF_ERR(make_type(n_bytes, &count, &type));
    int rc = MPI_Isend(data, count, type, (int)peer, tag, comm, out);
    free_type(&type);
    return fv_mpi_check(rc, "MPI_Isend");
}

/* The first error of a completed set, by its own text: MPI_ERR_IN_STATUS says nothing. */
static fv_status_t first_failure(int rc, const MPI_Status *statuses, size_t n)
{
    for (size_t i = 0; (rc == MPI_ERR_IN_STATUS) && (i < n); i++) {
        if ((statuses[i].MPI_ERROR != MPI_SUCCESS) && (statuses[i].MPI_ERROR != MPI_ERR_PENDING)) {
            return fv_mpi_check(statuses[i].MPI_ERROR, "MPI message");
        }
    }
    return fv_mpi_check(rc, "MPI_Testall");
}

fv_status_t fv_mpi_wait_all(MPI_Request *requests,
                            MPI_Status *statuses,
                            size_t n,
                            const fv_mpi_limits_t *limits)
{
    int64_t begin_us = fv_clock_us();

    for (;;) {
        int is_done = 0;
        int rc = MPI_Testall((int)n, requests, &is_done, statuses);

        if (rc != MPI_SUCCESS) {
            return first_failure(rc, statuses, n);
        }
        if (is_done != 0) {
            return FV_OK;
        }
        int64_t waited_us = fv_clock_us() - begin_us;
        if (waited_us < SPIN_US) {
            continue;
        }
        if ((limits->is_aborted != NULL) && limits->is_aborted(limits->arg)) {
            return fv_fail(FV_ERR_RANK_LOST, "a rank was lost while messages were under way");
        }
        if (waited_us > (int64_t)limits->deadline_ms * 1000) {
            return fv_fail(FV_ERR_TIMED_OUT, "no answer from a rank within %u ms",
                           limits->deadline_ms);
        }
        if (waited_us < YIELD_US) {
            (void)sched_yield();
        } else {
            (void)nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
        }
    }
}

fv_status_t fv_mpi_check_bytes(const MPI_Status *status, size_t n_bytes, uint32_t peer)
{
    MPI_Count n = 0;

    FV_RETURN_IF_ERR(fv_mpi_check(MPI_Get_elements_x(status, MPI_BYTE, &n), "MPI_Get_elements_x"));
    if ((n < 0) || ((size_t)n != n_bytes)) {
        return fv_fail(FV_ERR_PROTOCOL, "message of rank %u: given %lld bytes, expected %zu", peer,
                       (long long)n, n_bytes);
    }
    return FV_OK;
}
