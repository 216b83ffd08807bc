/*
 * lean_plan_cuda.h - the plan of one lean launch: from a line of runs to shares. Private to kernels/.
 */
#ifndef FV_KERNELS_LEAN_PLAN_CUDA_H
#define FV_KERNELS_LEAN_PLAN_CUDA_H

#include "kernels/kernels.h"
#include "kernels/lean_cuda.h"

/* Items with the same geometry go into one launch. */
typedef struct fv_lean_geometry {
    int32_t kind, m_warps, head_dim_qk, head_dim_v; /* kind: fv_lean_kind_t */
    int32_t latent;                                 /* fv_lean_latent_t */
} fv_lean_geometry_t;

/* A launch in the making. */
typedef struct fv_lean_draft {
    fv_lean_geometry_t geometry;
    size_t
        runs; /* offset into the staging area: fv_lean_run_t [n_runs], complete when the line is cut */
    uint32_t n_runs;
    uint64_t n_tiles;
    int32_t n_q_parts, rows_max; /* most of any run */
} fv_lean_draft_t;

/* How lines are cut and groups merged: set by fv_lean_plan_init() to what measured best; others only for measuring. */
typedef struct fv_lean_tuning {
    uint32_t ctas_max[2]; /* of an SM: up to 16 rows, more */
    uint32_t launch_ctas; /* of a launch, at most; 0: as many as fit */
    uint32_t ring_slots;  /* at most: even, 4 or more; FV_LEAN_SLOTS_MAX or more: as many as fit */
    uint32_t bytes_ahead; /* of K and V under way on an SM, but at least 2 tiles of each CTA */
    uint32_t rounds_min
        [2]; /* tiles for each CTA from which shares come in rounds: up to 16 rows, to 32 */
    uint32_t first_percent; /* of the line in the first round */
    uint32_t tail_tiles[2]; /* least of a share of later rounds: up to 16 rows, to 32 */
    uint32_t prefill_tiles; /* least of a share of more than 32 rows */
    uint32_t latent_tiles;  /* least of a share of latents */
    uint32_t early_bytes;   /* of a group's pieces, most that its last arriver merges */
    uint32_t tail_bytes;    /* the same where the group ends in the last shares */
    uint32_t
        is_cooperative; /* 0: no late merging; 2: late, but nobody promises that CTAs run together */
    uint32_t is_direct;    /* 0: no pages and no Q in shares */
    uint32_t is_dependent; /* launches may overlap what is ahead of them in the stream */
} fv_lean_tuning_t;

/* Device memory for pieces and their counters; `backend` knows its device and stream. */
FV_MUST_CHECK fv_status_t fv_lean_plan_init(fv_backend_t *backend);
void fv_lean_plan_free(fv_backend_t *backend);
size_t fv_lean_plan_device_bytes(const fv_backend_t *backend);

/* True if shared memory has room for a block's Q, in that many parts, and for K and V of a tile. */
bool fv_lean_plan_fits(const fv_backend_t *backend,
                       const fv_lean_geometry_t *geometry,
                       int32_t n_q_parts);

/* What the plan of one launch takes of the staging area, at most. */
size_t fv_lean_plan_stage_bytes(const fv_backend_t *backend);

/*
 * Cuts the line of a draft and adds its launch to backend->launches; staging space was reserved. The memory of
 * pieces may move: once all of a step's drafts are planned, fv_lean_plan_finish() puts its address into each launch.
 */
FV_MUST_CHECK fv_status_t fv_lean_plan(fv_backend_t *backend, const fv_lean_draft_t *draft);
void fv_lean_plan_finish(fv_backend_t *backend);

/* Marks the shares of late groups and lists these groups: late [n_shares]. lean_late_cuda.c */
void fv_lean_plan_late(const fv_lean_tuning_t *tuning,
                       fv_lean_launch_t *launch,
                       const fv_lean_run_t *runs,
                       fv_lean_share_t *shares,
                       fv_lean_late_t *late);

#endif /* FV_KERNELS_LEAN_PLAN_CUDA_H */
