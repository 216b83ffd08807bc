/*
 * lean_late_cuda.c - which groups of a cut line are merged late, and who merges what of them.
 *
 * Decode path: station 7 of 10, inside lean_plan_cuda.c. After: lean_merge.cuh.
 */
#include "kernels/backend_cuda.h"

#define AT_ONCE 12U /* pieces of one thread under way (lean_merge.cuh) */

/* Rows of latents are long enough for all teams, and their kernels keep no place for sums of many threads. */
static uint32_t most_split(const fv_lean_launch_t *launch)
{
    return (launch->latent != (int32_t)FV_LATENT_NONE) ? 4U : FV_LEAN_SPLIT_MAX;
}

/* Whether the group that share s ends in the middle of is merged late: its pieces are n. */
static bool is_late(const fv_lean_tuning_t *tuning,
                    const fv_lean_launch_t *launch,
                    uint32_t s,
                    uint32_t n,
                    int32_t n_rows)
{
    const uint64_t n_bytes = (uint64_t)n * (uint64_t)n_rows * (uint64_t)launch->head_dim_v * 4U;
    const bool is_tail = s + n + launch->n_ctas > launch->n_shares;

    return (tuning->is_cooperative != 0) &&
           (n_bytes > (is_tail ? tuning->tail_bytes : tuning->early_bytes));
}

/* Units of a group that `split` threads merge for each four columns. */
static uint32_t late_units(const fv_lean_launch_t *launch, const fv_lean_run_t *run, uint32_t split)
{
    return (uint32_t)fv_div_up((uint64_t)run->n_rows * (uint64_t)(launch->head_dim_v / 4) * split,
                               FV_LEAN_UNIT_THREADS);
}

/* Late groups' records, and a mark in the shares of their pieces. */
static uint32_t mark_late(const fv_lean_tuning_t *tuning,
                          const fv_lean_launch_t *launch,
                          const fv_lean_run_t *runs,
                          fv_lean_share_t *shares,
                          fv_lean_late_t *late)
{
    uint32_t n_late = 0;

    for (uint32_t s = 0; s < launch->n_shares; s++) {
        const uint32_t n = shares[s].n_last;
        uint32_t split = 1;

        if ((n == 0) || !is_late(tuning, launch, s, n, runs[shares[s + 1U].run].n_rows)) {
            continue;
        }
        while ((split < most_split(launch)) && (split * AT_ONCE < n)) {
            split *= 4U;
        }
        /* the share after begins in the group */
        late[n_late++] = (fv_lean_late_t){.run = shares[s + 1U].run,
                                          .head = shares[s + 1U].head,
                                          .first = s,
                                          .n_pieces = n,
                                          .split = split};
        shares[s].n_last |= FV_LEAN_LATE;
        for (uint32_t i = 1; i < n; i++) {
            shares[s + i].n_first |= FV_LEAN_LATE;
        }
    }
    return n_late;
}

/* Cuts the merging of late groups into units, which are as many as there are teams, if the pieces allow. */
static uint32_t deal_late(const fv_lean_launch_t *launch,
                          const fv_lean_run_t *runs,
                          fv_lean_late_t *late,
                          uint32_t n_late)
{
    const uint32_t n_teams = fv_lean_launch_teams(launch);
    const uint32_t split_max = most_split(launch);
    uint32_t n_units = 0;
    bool is_finer = true;

    for (uint32_t i = 0; i < n_late; i++) {
        n_units += late_units(launch, &runs[late[i].run], late[i].split);
    }
    while (is_finer && (4U * n_units <= n_teams)) {
        n_units = 0;
        is_finer = false;
        for (uint32_t i = 0; i < n_late; i++) {
            if ((late[i].split < split_max) && (4U * late[i].split <= late[i].n_pieces)) {
                late[i].split *= 4U;
                is_finer = true;
            }
            n_units += late_units(launch, &runs[late[i].run], late[i].split);
        }
    }
    n_units = 0;
    for (uint32_t i = 0; i < n_late; i++) {
        late[i].unit_begin = n_units;
        late[i].n_units = late_units(launch, &runs[late[i].run], late[i].split);
        n_units += late[i].n_units;
    }
    return n_units;
}

void fv_lean_plan_late(const fv_lean_tuning_t *tuning,
                       fv_lean_launch_t *launch,
                       const fv_lean_run_t *runs,
                       fv_lean_share_t *shares,
                       fv_lean_late_t *late)
{
    launch->n_late = mark_late(tuning, launch, runs, shares, late);
    launch->n_late_units = deal_late(launch, runs, late, launch->n_late);
}
