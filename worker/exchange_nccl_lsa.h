/*
 * exchange_nccl_lsa.h - who reaches whose window, and where: what only NCCL's device interface says.
 *
 * Only for the library that the headers belong to: its device structures are compiled in.
 */
#ifndef FV_WORKER_EXCHANGE_NCCL_LSA_H
#define FV_WORKER_EXCHANGE_NCCL_LSA_H

#include <cuda_runtime_api.h>
#include <nccl.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The ranks [*out_first, *out_first + *out_n) of the communicator, `rank` among them, reach each other's windows. */
ncclResult_t fv_nccl_lsa_team(ncclComm_t comm, int rank, int *out_first, int *out_n);

/* This device reaches their windows at out_bases[i], i < n: memory of the host that the device reaches. */
cudaError_t fv_nccl_lsa_bases(ncclWindow_t window, int n, void **out_bases, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* FV_WORKER_EXCHANGE_NCCL_LSA_H */
