/*
 * lean_plan_cuda.h - the plan of one lean launch: from a line of runs to shares. Private to kernels/.
 */
#ifndef FV_KERNELS_LEAN_PLAN_CUDA_H
#define FV_KERNELS_LEAN_PLAN_CUDA_H

#include "kernels/kernels.h"

/* Items with the same geometry go into one launch. */
typedef struct fv_lean_geometry {
    int32_t kind, m_warps, head_dim_qk, head_dim_v; /* kind: fv_lean_kind_t */
} fv_lean_geometry_t;

/* A launch in the making. */
typedef struct fv_lean_draft {
    fv_lean_geometry_t geometry;
    size_t
        runs; /* offset into the staging area: fv_lean_run_t [n_runs], complete when the line is cut */
    uint32_t n_runs, runs_max;
    uint64_t n_tiles;
    int32_t n_q_parts, rows_max; /* most of any run */
} fv_lean_draft_t;

/* Device memory for pieces and their counters; `backend` knows its device and stream. */
FV_MUST_CHECK fv_status_t fv_lean_plan_init(fv_backend_t *backend);
void fv_lean_plan_free(fv_backend_t *backend);
size_t fv_lean_plan_device_bytes(const fv_backend_t *backend);

/* What the plan of one launch takes of the staging area, at most. */
size_t fv_lean_plan_stage_bytes(const fv_backend_t *backend);

/*
 * Cuts the line of a draft and adds its launch to backend->launches; staging space was reserved. The memory of
 * pieces may move: once all of a step's drafts are planned, fv_lean_plan_finish() puts its address into each launch.
 */
FV_MUST_CHECK fv_status_t fv_lean_plan(fv_backend_t *backend, const fv_lean_draft_t *draft);
void fv_lean_plan_finish(fv_backend_t *backend);

#endif /* FV_KERNELS_LEAN_PLAN_CUDA_H */
