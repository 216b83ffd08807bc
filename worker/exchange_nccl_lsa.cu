/*
 * exchange_nccl_lsa.cu - where the windows of the peers are, asked once at start.
 *
 * Everything later uses plain addresses, so nothing else depends on the layout of NCCL's device structures.
 */
#include "worker/exchange_nccl_lsa.h"

#include <cuda_runtime.h>
#include <nccl_device.h>

#define THREADS 128

static __global__ void __launch_bounds__(THREADS)
    bases_kernel(ncclWindow_t window, int n, void **out)
{
    for (int i = (int)threadIdx.x; i < n; i += THREADS) {
        out[i] = ncclGetLsaPointer(window, 0, i);
    }
}

ncclResult_t fv_nccl_lsa_team(ncclComm_t comm, int rank, int *out_first, int *out_n)
{
    const ncclTeam_t team = ncclTeamLsa(comm);

    if ((team.stride != 1) || (team.rank > rank)) {
        return ncclInternalError;
    }
    *out_first = rank - team.rank;
    *out_n = team.nRanks;
    return ncclSuccess;
}

cudaError_t fv_nccl_lsa_bases(ncclWindow_t window, int n, void **out_bases, cudaStream_t stream)
{
    bases_kernel<<<1, THREADS, 0, stream>>>(window, n, out_bases);
    return cudaGetLastError();
}
