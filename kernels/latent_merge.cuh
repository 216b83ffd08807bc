/*
 * latent_merge.cuh - groups of latents that shares' borders cut: their pieces are counted, and merged by lean_merge.cuh.
 *
 * Decode path: station 7 of 10. Before: latent_values.cuh, latent_any.cu. After: lean_write.cuh.
 *
 * Two teams of 128 threads, the first 256 threads of a CTA (lean_smem.cuh). CTAs of a cluster each bring their rows of a
 * piece, so a group is complete with n_pieces * n_cluster arrivals.
 */
#ifndef FV_KERNELS_LATENT_MERGE_CUH
#define FV_KERNELS_LATENT_MERGE_CUH

#include "kernels/lean_merge.cuh"

/* Both teams have written a piece to its slot: it is counted, and merged if that is early and it was the last. */
static __device__ __forceinline__ void fv_latent_arrive(const fv_lean_launch_t &p,
                                                        const fv_lean_run_t &run,
                                                        const fv_lean_group_t &cut,
                                                        uint32_t *is_last)
{
    const fv_lean_group_t group = {cut.head, cut.first, cut.n_pieces & ~FV_LEAN_LATE};
    uint32_t *counter = p.arrived + cut.first;

    fv_lean_sync<2>();
    if ((cut.n_pieces & FV_LEAN_LATE) != 0) {
        if (threadIdx.x == 0) {
            fv_add_release(counter);
        }
        return;
    }
    if (threadIdx.x == 0) {
        *is_last = (fv_add_acq_rel(counter) + 1U == group.n_pieces * p.n_cluster) ? 1U : 0U;
        if (*is_last != 0) {
            *counter = 0;
        }
    }
    fv_lean_sync<2>();
    for (uint32_t quad = fv_lean_team() * FV_LEAN_UNIT_THREADS;
         (*is_last != 0) && (quad < (uint32_t)(run.n_rows * p.head_dim_v / 4));
         quad += 2U * FV_LEAN_UNIT_THREADS) {
        fv_lean_merge_unit(p, NULL, run, group, quad, 1U, NULL);
    }
    fv_lean_sync<2>(); /* is_last has been read */
}

/* This CTA has no more shares: each team's units of the late groups. late, run: of each team, in shared memory. */
static __device__ __forceinline__ void
fv_latent_merge_late(const fv_lean_launch_t &p, fv_lean_late_t *late, fv_lean_run_t *run)
{
    const uint32_t n_teams = 2U * gridDim.x;

    for (uint32_t u = blockIdx.x + fv_lean_team() * gridDim.x; u < p.n_late_units; u += n_teams) {
        const uint32_t at = fv_lean_find_late(p, u);

        fv_lean_sync_team(); /* all are done with the unit before */
        if (fv_lean_thread() == 0) {
            *late = p.late[at];
        }
        for (uint32_t i = fv_lean_thread(); i < sizeof(fv_lean_run_t) / 8U; i += FV_LEAN_TEAM) {
            ((uint64_t *)run)[i] = ((const uint64_t *)(p.runs + p.late[at].run))[i];
        }
        fv_lean_sync_team();
        const fv_lean_group_t group = {late->head, late->first, late->n_pieces};
        const uint32_t n_own = FV_LEAN_UNIT_THREADS / late->split;

        fv_lean_merge_unit(p, NULL, *run, group, (u - late->unit_begin) * n_own, late->split, late);
    }
}

#endif /* FV_KERNELS_LATENT_MERGE_CUH */
