/*
 * lean_plan_cuda.c - cuts the line of a launch into shares, and owns what cut groups need on the device.
 *
 * Decode path: station 7 of 10. Before: attend_cuda.c (items become runs). After: lean_cuda.cu (executes).
 *
 * Arithmetic on the host, some ns for each share: where it begins on the line, and how many pieces the groups have that
 * its borders cut (lean_cuda.h).
 */
#include "kernels/backend_cuda.h"
#include "kernels/latent_cuda.h"
#include "kernels/lean_cuda_launch.h"

#include <stdlib.h>
#include <string.h>

#define CTAS_PER_SM_MAX 2
#define CTA_RESERVED    1024U /* bytes of shared memory that the driver takes of each CTA */
#define RING_SLOTS_MIN  4U

static const fv_lean_tuning_t k_tuning = {
    .ctas_max = {CTAS_PER_SM_MAX, CTAS_PER_SM_MAX},
    .ring_slots = FV_LEAN_SLOTS_MAX,
    .bytes_ahead = 64U << 10U,
    .rounds_min = {200, 800},
    .first_percent = 90,
    .tail_tiles = {8, 8},
    .prefill_tiles = 4,
    .latent_tiles = 2,
    .early_bytes = 64U << 10U,
    .tail_bytes = 16U << 10U,
    .is_cooperative = 1,
    .is_direct = 1,
};

static size_t counters(const fv_backend_t *backend)
{
    return (size_t)backend->shares_max + 1U;
}

fv_status_t fv_lean_plan_init(fv_backend_t *backend)
{
    backend->tuning = k_tuning;
    backend->shares_max = backend->n_sms * CTAS_PER_SM_MAX * FV_LEAN_SHARES_MAX;
    backend->begins = calloc((size_t)backend->shares_max + 1U, sizeof(*backend->begins));
    if (backend->begins == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "cuda backend: no memory");
    }
    FV_RETURN_IF_ERR(FV_CUDA(
        cudaMalloc((void **)&backend->arrived, counters(backend) * sizeof(*backend->arrived))));
    FV_RETURN_IF_ERR(FV_CUDA(cudaMemsetAsync(
        backend->arrived, 0, counters(backend) * sizeof(*backend->arrived), backend->stream)));
    /* the usual decode step's pieces: 2 slots a share, 8 rows of 128 */
    backend->slots_bytes = (size_t)backend->shares_max * 2U * 8U * (128U + 2U) * sizeof(float);
    return FV_CUDA(cudaMalloc((void **)&backend->slots, backend->slots_bytes));
}

void fv_lean_plan_free(fv_backend_t *backend)
{
    (void)cudaFree(backend->slots);
    (void)cudaFree(backend->arrived);
    free(backend->begins);
}

size_t fv_lean_plan_device_bytes(const fv_backend_t *backend)
{
    return backend->slots_bytes + counters(backend) * sizeof(*backend->arrived);
}

size_t fv_lean_plan_stage_bytes(const fv_backend_t *backend)
{
    const size_t n = (size_t)backend->shares_max;

    return FV_CUDA_STAGE_BYTES(n * sizeof(fv_lean_share_t)) +
           FV_CUDA_STAGE_BYTES(n * sizeof(fv_lean_late_t));
}

static uint32_t kv_slot_bytes(const fv_lean_geometry_t *g)
{
    const uint32_t e = (g->kind == (int32_t)FV_LEAN_F32_WIDE) ? 4U : 2U;

    return FV_PAGE_TOKENS * e *
           (uint32_t)((g->head_dim_qk > g->head_dim_v) ? g->head_dim_qk : g->head_dim_v);
}

bool fv_lean_plan_fits(const fv_backend_t *backend,
                       const fv_lean_geometry_t *geometry,
                       int32_t n_q_parts)
{
    return (size_t)fv_lean_cuda_fixed_bytes(geometry->head_dim_qk, geometry->head_dim_v,
                                            geometry->m_warps, n_q_parts) +
               CTA_RESERVED + 2U * (size_t)kv_slot_bytes(geometry) <=
           backend->smem_per_sm;
}

/* Shared memory: as many ring slots as two CTAs of an SM can have, or one CTA if those are too few. */
static fv_status_t set_ring(const fv_backend_t *backend,
                            const fv_lean_draft_t *draft,
                            fv_lean_launch_t *launch,
                            int32_t *ctas)
{
    const uint32_t fixed = fv_lean_cuda_fixed_bytes(launch->head_dim_qk, launch->head_dim_v,
                                                    launch->m_warps, draft->n_q_parts) +
                           CTA_RESERVED;
    uint32_t n_slots = 0;
    int32_t most = 0;

    *ctas =
        fv_lean_cuda_ctas(launch->kind, launch->m_warps, launch->head_dim_v, launch->is_exact != 0);
    most = (int32_t)backend->tuning.ctas_max[(launch->m_warps == 1) ? 0 : 1];
    *ctas = (*ctas < most) ? *ctas : most;
    for (; *ctas >= 1; (*ctas)--) {
        const uint32_t each = (uint32_t)backend->smem_per_sm / (uint32_t)*ctas;

        n_slots = (each > fixed) ? ((each - fixed) / launch->slot_bytes) : 0U;
        if ((n_slots >= RING_SLOTS_MIN) || (*ctas == 1)) {
            break;
        }
    }
    if (n_slots < 2U) {
        return fv_fail(FV_ERR_UNIMPLEMENTED,
                       "cuda backend: head dims %d and %d do not fit into shared memory",
                       launch->head_dim_qk, launch->head_dim_v);
    }
    n_slots = (n_slots < FV_LEAN_SLOTS_MAX) ? n_slots : FV_LEAN_SLOTS_MAX;
    n_slots = (n_slots < backend->tuning.ring_slots) ? n_slots : backend->tuning.ring_slots;
    if ((fv_lean_cuda_teams(launch->m_warps, launch->is_exact != 0) == 2) && (n_slots > 4U)) {
        /* an even number of tiles: a slot is one team's within a piece, which so has seen each of its phases */
        n_slots -= n_slots % 4U;
    }
    launch->ring_slots = (int32_t)n_slots;
    launch->tiles_ahead = backend->tuning.bytes_ahead / (2U * launch->slot_bytes * (uint32_t)*ctas);
    launch->tiles_ahead = (launch->tiles_ahead > 2U) ? launch->tiles_ahead : 2U;
    launch->tiles_ahead =
        (launch->tiles_ahead < n_slots / 2U) ? launch->tiles_ahead : (n_slots / 2U);
    launch->smem_bytes = fixed - CTA_RESERVED + n_slots * launch->slot_bytes;
    return FV_OK;
}

/*
 * Tiles of each share of a round: most of the line in the first, then half of what is left each time. 0: the rest, in
 * equal shares. A short line is one round, and so is prefill, whose pieces are large.
 */
static uint32_t share_tiles(const fv_lean_tuning_t *tuning,
                            uint32_t left,
                            uint32_t n_ctas,
                            bool is_first,
                            int32_t m_warps)
{
    const uint32_t all = (uint32_t)fv_div_up(left, n_ctas);
    const int many = (m_warps == 1) ? 0 : 1;
    const uint32_t least = 2U * tuning->tail_tiles[many];

    if ((m_warps == 4) || (all < (is_first ? tuning->rounds_min[many] : least))) {
        return 0;
    }
    return is_first ? (uint32_t)((uint64_t)(left / n_ctas) * tuning->first_percent / 100U)
                    : (all / 2U);
}

/* Where each share begins; returns how many there are. begins [FV_LEAN_SHARES_MAX * n_ctas + 1]. */
static uint32_t cut_line(const fv_lean_tuning_t *tuning,
                         uint32_t n_tiles,
                         uint32_t n_ctas,
                         int32_t m_warps,
                         uint32_t *begins)
{
    uint32_t n = 0;
    uint32_t at = 0;

    for (int round = 0; at < n_tiles; round++) {
        const uint32_t left = n_tiles - at;
        const uint32_t each = (round == FV_LEAN_SHARES_MAX - 1)
                                  ? 0U
                                  : share_tiles(tuning, left, n_ctas, round == 0, m_warps);
        const uint32_t here = (left < n_ctas) ? left : n_ctas;

        for (uint32_t i = 0; i < here; i++) {
            begins[n++] = at;
            at += (each > 0U) ? each : (left / here + ((i < left % here) ? 1U : 0U));
        }
    }
    begins[n] = n_tiles;
    return n;
}

/* Which groups the borders of shares cut, and into how many pieces. */
static void count_pieces(const fv_lean_run_t *runs,
                         const uint32_t *begins,
                         fv_lean_share_t *shares,
                         uint32_t n_shares)
{
    uint32_t first = 0;

    for (uint32_t s = 1; s < n_shares; s++) {
        const uint32_t group = begins[s] - (uint32_t)shares[s].tile; /* its first tile */
        const uint32_t end = group + (uint32_t)runs[shares[s].run].n_tiles;

        if (shares[s].tile == 0) {
            continue;
        }
        first = (group >= begins[s - 1U]) ? (s - 1U) : first;
        shares[s].first = first;
        if (end <= begins[s + 1U]) {
            shares[first].n_last = s - first + 1U;
            for (uint32_t i = first + 1U; i <= s; i++) {
                shares[i].n_first = s - first + 1U;
            }
        }
    }
}

/*
 * A share of the first round names its first pages (those of one stretch of the tile list stand side by side) and its
 * Q, so that both are under way before its run is read.
 */
static void
set_direct(const fv_lean_launch_t *launch, const fv_lean_run_t *run, fv_lean_share_t *share)
{
    const int32_t n_a = run->tiles.a_end - run->tiles.a_begin;
    const bool is_a = share->tile < n_a;
    const int32_t page =
        is_a ? (run->tiles.a_begin + share->tile) : (run->tiles.b_begin + (share->tile - n_a));
    const int32_t left = (is_a ? n_a : run->n_tiles) - share->tile;

    if ((run->is_empty == 0) && !(is_a && (run->query.policy.kind == FV_POLICY_S2))) {
        share->pages = fv_lean_head_pages(run, share->head) + fv_lean_page_index(run, page);
        share->n_direct = (uint32_t)((left < share->n_tiles) ? left : share->n_tiles);
    }
    /* rows of the first token; Q as wide as K */
    if ((launch->is_exact != 0) && (run->row_begin + run->n_rows <= run->group)) {
        share->q =
            run->q + (size_t)(share->head * run->group + run->row_begin) * (size_t)launch->k_bytes;
        share->n_q_rows = (uint32_t)run->n_rows;
    }
}

/* Cuts the line of a draft; its runs are complete. */
static void make_shares(fv_backend_t *backend,
                        const fv_lean_draft_t *draft,
                        fv_lean_launch_t *launch,
                        uint32_t n_ctas)
{
    const fv_lean_run_t *runs = fv_cuda_on_host(backend, draft->runs);
    const fv_lean_tuning_t *tuning = &backend->tuning;
    const uint32_t *begins = backend->begins;
    fv_lean_share_t *shares = NULL;
    fv_lean_late_t *late = NULL;
    size_t offset = 0;
    uint32_t most = 0;
    uint32_t r = 0;

    launch->n_tiles = (uint32_t)draft->n_tiles;
    most = launch->n_tiles;
    if (launch->m_warps == 4) {
        most = (uint32_t)fv_div_up(launch->n_tiles, (launch->latent != (int32_t)FV_LATENT_NONE)
                                                        ? tuning->latent_tiles
                                                        : tuning->prefill_tiles);
    }
    launch->n_ctas = (most < n_ctas) ? most : n_ctas;
    launch->n_shares =
        cut_line(tuning, launch->n_tiles, launch->n_ctas, launch->m_warps, backend->begins);
    offset = fv_cuda_stage(backend, launch->n_shares * sizeof(*shares));
    launch->shares = fv_cuda_on_device(backend, offset);
    shares = fv_cuda_on_host(backend, offset);
    for (uint32_t s = 0; s < launch->n_shares; s++) {
        while (begins[s] - runs[r].line_begin >=
               (uint32_t)runs[r].n_tiles * (uint32_t)runs[r].n_kv_heads) {
            r++;
        }
        const uint32_t at = begins[s] - runs[r].line_begin;

        shares[s] = (fv_lean_share_t){.run = r, .index = s};
        shares[s].head = (int32_t)(at / (uint32_t)runs[r].n_tiles);
        shares[s].tile = (int32_t)(at % (uint32_t)runs[r].n_tiles);
        shares[s].n_tiles = (int32_t)(begins[s + 1U] - begins[s]);
        if ((s < launch->n_ctas) && (tuning->is_direct != 0)) {
            set_direct(launch, &runs[r], &shares[s]);
        }
    }
    count_pieces(runs, begins, shares, launch->n_shares);
    offset = fv_cuda_stage(backend, launch->n_shares * sizeof(*late));
    launch->late = fv_cuda_on_device(backend, offset);
    late = fv_cuda_on_host(backend, offset);
    fv_lean_plan_late(tuning, launch, runs, shares, late);
    launch->is_dependent = backend->has_sm90 ? (int32_t)tuning->is_dependent : 0;
    launch->is_cooperative = ((launch->n_late > 0) && (tuning->is_cooperative == 1U)) ? 1 : 0;
}

/* Slots for the pieces of cut groups, of this launch's shape. */
static fv_status_t reserve_slots(fv_backend_t *backend, fv_lean_launch_t *launch)
{
    const size_t n_slots = 2U * launch->n_shares;
    const size_t o_elems = n_slots * (size_t)launch->slot_rows * (size_t)launch->head_dim_v;
    const size_t n_bytes = (o_elems + n_slots * 2U * (size_t)launch->slot_rows) * sizeof(float);

    if (n_bytes > backend->slots_bytes) {
        FV_RETURN_IF_ERR(FV_CUDA(cudaStreamSynchronize(backend->stream)));
        FV_RETURN_IF_ERR(FV_CUDA(cudaFree(backend->slots)));
        backend->slots = NULL;
        backend->slots_bytes = 0;
        FV_RETURN_IF_ERR(FV_CUDA(cudaMalloc((void **)&backend->slots, n_bytes)));
        backend->slots_bytes = n_bytes;
    }
    return FV_OK;
}

fv_status_t fv_lean_plan(fv_backend_t *backend, const fv_lean_draft_t *draft)
{
    const fv_lean_geometry_t *g = &draft->geometry;
    const uint32_t e = (g->kind == (int32_t)FV_LEAN_F32_WIDE) ? 4U : 2U;
    fv_lean_launch_t launch;
    uint32_t n_ctas = 0;
    int32_t ctas = 0;

    memset(&launch, 0, sizeof(launch));
    launch.arena = backend->arena;
    launch.runs = fv_cuda_on_device(backend, draft->runs);
    launch.head_dim_qk = g->head_dim_qk;
    launch.head_dim_v = g->head_dim_v;
    launch.kind = g->kind;
    launch.latent = g->latent;
    launch.n_cluster = (g->latent == (int32_t)FV_LATENT_PAIR) ? 2U : 1U;
    launch.m_warps = g->m_warps;
    launch.n_q_parts = draft->n_q_parts;
    launch.slot_rows = draft->rows_max;
    launch.k_bytes = (uint32_t)g->head_dim_qk * e;
    launch.v_bytes = (uint32_t)g->head_dim_v * e;
    launch.k_rows = fv_page_rows_make(launch.k_bytes, e);
    launch.v_rows = fv_page_rows_make(launch.v_bytes, e);
    launch.slot_bytes = kv_slot_bytes(g);
    /* K and V as the tensor cores take them, Q too: no other kind has such a kernel */
    launch.is_exact = ((g->kind == (int32_t)FV_LEAN_BF16) || (g->kind == (int32_t)FV_LEAN_F16)) &&
                      (draft->n_q_parts == 1) && (g->head_dim_qk == g->head_dim_v) &&
                      ((g->head_dim_v == 64) || (g->head_dim_v == 128));
    if (g->latent != (int32_t)FV_LATENT_NONE) {
        launch.smem_bytes = fv_latent_cuda_smem(g->latent, g->head_dim_qk, g->head_dim_v);
        ctas = 1;
    } else {
        FV_RETURN_IF_ERR(set_ring(backend, draft, &launch, &ctas));
    }
    n_ctas = (uint32_t)(backend->n_sms * ctas) / launch.n_cluster;
    if ((backend->tuning.launch_ctas > 0U) && (backend->tuning.launch_ctas < n_ctas)) {
        n_ctas = backend->tuning.launch_ctas;
    }
    make_shares(backend, draft, &launch, n_ctas);
    FV_RETURN_IF_ERR(reserve_slots(backend, &launch));
    FV_RETURN_IF_ERR(fv_cuda_grow((void **)&backend->launches, &backend->launches_max,
                                  backend->n_launches + 1U, sizeof(*backend->launches)));
    backend->launches[backend->n_launches++] = launch;
    return FV_OK;
}

void fv_lean_plan_finish(fv_backend_t *backend)
{
    /* slots may have moved while later launches were planned */
    for (size_t i = 0; i < backend->n_launches; i++) {
        fv_lean_launch_t *launch = &backend->launches[i];

        launch->arrived = backend->arrived;
        launch->claimed = backend->arrived + backend->shares_max;
        launch->slot_o = backend->slots;
        launch->slot_ml = backend->slots + 2U * (size_t)launch->n_shares *
                                               (size_t)launch->slot_rows *
                                               (size_t)launch->head_dim_v;
    }
}
