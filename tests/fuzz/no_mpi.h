/*
 * no_mpi.h - what the stand-in for MPI of fuzz targets can be told.
 */
#ifndef FV_TESTS_FUZZ_NO_MPI_H
#define FV_TESTS_FUZZ_NO_MPI_H

#include <stddef.h>
#include <stdint.h>

extern uint8_t fv_no_mpi_byte;    /* what messages consist of */
extern size_t fv_no_mpi_received; /* bytes of the last one */

#endif /* FV_TESTS_FUZZ_NO_MPI_H */
