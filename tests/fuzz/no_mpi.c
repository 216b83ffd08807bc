/*
 * no_mpi.c - MPI for one process that talks to nobody: messages arrive at once, with bytes of fv_no_mpi_byte.
 *
 * Linked before the library, these take its functions' places: fuzz targets run what calls MPI without starting it.
 */
#include "tests/fuzz/no_mpi.h"

#include <mpi.h>

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

uint8_t fv_no_mpi_byte;

static int element_bytes(MPI_Datatype type)
{
    return (type == MPI_BYTE) ? 1 : 0; /* targets stay below what needs a type of its own */
}

/* NOLINTBEGIN(readability-identifier-naming, readability-non-const-parameter): the names are MPI's */
int MPI_Comm_set_errhandler(MPI_Comm comm, MPI_Errhandler handler)
{
    (void)comm;
    (void)handler;
    return MPI_SUCCESS;
}

int MPI_Irecv(void *data,
              int count,
              MPI_Datatype type,
              int source,
              int tag,
              MPI_Comm comm,
              MPI_Request *request)
{
    (void)source;
    (void)tag;
    (void)comm;
    memset(data, fv_no_mpi_byte, (size_t)count * (size_t)element_bytes(type));
    *request = MPI_REQUEST_NULL;
    fv_no_mpi_received = (size_t)count;
    return MPI_SUCCESS;
}

size_t fv_no_mpi_received;

int MPI_Isend(const void *data,
              int count,
              MPI_Datatype type,
              int dest,
              int tag,
              MPI_Comm comm,
              MPI_Request *request)
{
    const uint8_t *bytes = data;
    volatile uint8_t sum = 0; /* reads every byte: sanitizers look */

    (void)dest;
    (void)tag;
    (void)comm;
    for (size_t i = 0; i < (size_t)count * (size_t)element_bytes(type); i++) {
        sum = (uint8_t)(sum ^ bytes[i]);
    }
    *request = MPI_REQUEST_NULL;
    return MPI_SUCCESS;
}

int MPI_Test(MPI_Request *request, int *flag, MPI_Status *status)
{
    (void)request;
    (void)status;
    *flag = 1;
    return MPI_SUCCESS;
}

int MPI_Testall(int count, MPI_Request requests[], int *flag, MPI_Status statuses[])
{
    (void)count;
    (void)requests;
    (void)statuses;
    *flag = 1;
    return MPI_SUCCESS;
}

int MPI_Get_elements_x(const MPI_Status *status, MPI_Datatype type, MPI_Count *count)
{
    (void)status;
    (void)type;
    *count = (MPI_Count)fv_no_mpi_received;
    return MPI_SUCCESS;
}

int MPI_Error_string(int code, char *text, int *n_chars)
{
    *n_chars = snprintf(text, MPI_MAX_ERROR_STRING, "error %d", code);
    return MPI_SUCCESS;
}
/* NOLINTEND(readability-identifier-naming, readability-non-const-parameter) */
