/*
 * scale_case.c - one case on p ranks: its size, its steps and their times.
 */
#include "bench/scale/scale.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define STEPS_MIN   12
#define LAUNCH_US   1.4 /* of a floor on a GPU: a launch that reads nothing */
#define CHECK_STEPS 3

typedef struct samples {
    double wall[FV_SCALE_STEPS_MAX], device[FV_SCALE_STEPS_MAX];
    double compute[FV_SCALE_STEPS_MAX], exchange[FV_SCALE_STEPS_MAX];
    uint32_t n;
} samples_t;

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a;
    const double y = *(const double *)b;

    return (x > y) - (x < y);
}

/* A step is as slow as its slowest rank. Valid on rank 0 of comm. */
static fv_scale_times_t times_of(double *values, uint32_t n, MPI_Comm comm)
{
    double all[FV_SCALE_STEPS_MAX];

    (void)MPI_Reduce(values, all, (int)n, MPI_DOUBLE, MPI_MAX, 0, comm);
    int rank = 0;
    (void)MPI_Comm_rank(comm, &rank);
    if (rank != 0) {
        return (fv_scale_times_t){0};
    }
    qsort(all, n, sizeof(all[0]), compare);
    return (fv_scale_times_t){
        .p10 = all[n / 10U], .p50 = all[n / 2U], .p90 = all[n - 1U - n / 10U]};
}

/* ------------------------------------------------------------------ size */

/* Of a layer, by the rank that holds most. */
static double kept_tokens(const fv_scale_case_t *c, uint64_t n_tokens, int p)
{
    /* the latent is there whole for any of its heads, or in slices, which token_bytes tells */
    const bool is_cut = !fv_scale_is_latent(c) || (c->axis == FV_SCALE_CONTEXT);
    const double part = (double)n_tokens / (is_cut ? (double)p : 1.0);

    return (c->s2_stride == 0) ? part
                               : fmin(part, part / (double)c->s2_stride +
                                                (double)(FV_SCALE_S2_LOCAL + 2) * FV_PAGE_TOKENS);
}

/* Layers that are all there, whatever a step walks through; 0: as many as that takes. */
static double model_layers(const fv_scale_case_t *c)
{
    return (strcmp(c->table, "s2") == 0)    ? (double)FV_SCALE_S2_LAYERS
           : (strcmp(c->table, "mla") == 0) ? (double)FV_SCALE_MLA_LAYERS
                                            : 0.0;
}

static uint32_t items_that_fit(const fv_scale_rank_t *r, double item_bytes)
{
    const double n = floor((double)r->arena_bytes * 0.98 / (item_bytes * 1.02));

    return (uint32_t)fmin(fmax(n, 1.0), (double)FV_SCALE_ITEMS_MAX);
}

/* Tokens, items and layers; false: even one layer does not fit. */
static bool
choose_size(fv_scale_run_t *run, const fv_scale_rank_t *r, const fv_scale_case_t *c, int p)
{
    run->is_prefill = strcmp(c->table, "prefill") == 0;
    const uint32_t shrink = ((c->chunk > 0U) && !run->is_prefill) ? 1U : r->options->shrink;
    const bool is_tiny = strcmp(c->table, "exchange") == 0;
    const double token_bytes = fv_scale_token_bytes(c);
    const double all_layers = model_layers(c);

    run->n_tokens =
        (is_tiny || (c->n_tokens / shrink < 64U)) ? c->n_tokens : (c->n_tokens / shrink);
    run->n_items = c->n_items;
    run->chunk = c->chunk / shrink;
    if ((run->chunk == 0U) && (c->chunk > 0U)) {
        run->chunk = 1U;
    }
    if (c->grows == FV_SCALE_WEAK_TOKENS) {
        run->n_tokens *= (uint64_t)p;
    } else if (c->grows == FV_SCALE_WEAK_ITEMS) {
        run->n_items *= (uint32_t)p;
    }
    /* each layer's steps take up to two pages more on one rank */
    const double item_bytes =
        (kept_tokens(c, run->n_tokens, p) + 2.0 * FV_PAGE_TOKENS) * token_bytes;
    run->n_items = (c->n_items == 0U) ? items_that_fit(r, item_bytes * all_layers) : run->n_items;
    const double rank_bytes = (double)run->n_items * item_bytes;
    const double filling =
        (c->s2_stride > 0) ? ((double)FV_SCALE_S2_FILL * token_bytes / (double)p) : 0.0;
    const double fits = floor(((double)r->arena_bytes * 0.98 - filling) / (rank_bytes * 1.02));
    double n_layers = ceil((double)r->options->rotate_bytes / rank_bytes);
    const double rank_layers = fmax(all_layers, 1.0);

    if (is_tiny || (c->chunk > 0U)) {
        n_layers = run->is_prefill ? 3.0 : 2.0;
    }
    n_layers = fmin(fmin(n_layers, FV_SCALE_LAYERS_MAX), fits);
    if (all_layers > 0.0) {
        n_layers = (fits >= all_layers) ? all_layers : 0.0;
    }
    run->n_layers = (uint32_t)fmax(n_layers, 0.0);
    if ((n_layers < 1.0) && (r->rank == 0)) {
        (void)printf("%-30s %3d ranks: needs %.1f GB a rank, there are %.1f\n", c->name, p,
                     (rank_layers * rank_bytes + filling) * 1.02e-9, (double)r->arena_bytes * 1e-9);
    }
    return n_layers >= 1.0;
}

/* ------------------------------------------------------------------ steps */

static void one_step(fv_scale_run_t *run, MPI_Comm comm, uint32_t layer, samples_t *s)
{
    fv_ctl_done_t done;
    const bool has_share = fv_scale_step_prepare(run, layer, 1);

    (void)MPI_Barrier(comm);
    const double begin = fv_scale_now_us();
    if (has_share) {
        fv_scale_step_run(run, &done);
    } else {
        memset(&done, 0, sizeof(done));
    }
    s->wall[s->n] = fv_scale_now_us() - begin;
    s->compute[s->n] = (double)done.compute_us;
    s->exchange[s->n] = (double)done.exchange_us;
    s->device[s->n] = s->compute[s->n] + s->exchange[s->n];
    run->lengths[layer]++;
}

/* What one rank gives at the first step of all is what others are compared with. */
static void keep_one_rank(fv_scale_run_t *run, uint16_t **one_rank)
{
    const size_t row_bytes =
        (size_t)run->model.n_q_heads * (size_t)run->model.head_dim_v * sizeof(uint16_t);
    const uint8_t *out = run->out.data;

    *one_rank = fv_scale_alloc(run->n_items, row_bytes);
    for (uint32_t i = 0; i < run->n_items; i++) {
        memcpy((uint8_t *)*one_rank + i * row_bytes, out, row_bytes);
        out += fv_align_up(row_bytes, FV_STEP_ALIGN);
    }
}

static uint32_t choose_steps(const fv_scale_run_t *run, MPI_Comm comm, double warm_us)
{
    double n = run->r->options->seconds * 1e6 / warm_us;

    n = fmin(fmax(n, STEPS_MIN), FV_SCALE_STEPS_MAX);
    (void)MPI_Bcast(&n, 1, MPI_DOUBLE, 0, comm);
    /* a layer may take two pages of new tokens at most, see choose_size() */
    return (uint32_t)fmin(n, (double)run->n_layers * FV_PAGE_TOKENS);
}

static void
take_part(fv_scale_run_t *run, MPI_Comm comm, uint16_t **one_rank, fv_scale_result_t *out)
{
    static samples_t s;
    const bool is_check = run->chunk > 0U;
    double warm_us = 0.0;

    for (uint32_t layer = 0; layer < run->n_layers; layer++) {
        s.n = 0;
        one_step(run, comm, layer, &s);
        warm_us = s.wall[0]; /* the last layer's: everything is loaded then */
        if ((layer == 0U) && (run->p == 1)) {
            keep_one_rank(run, one_rank);
        }
        if ((layer == 0U) || (layer + 1U == run->n_layers)) {
            fv_scale_step_verify(run, layer);
        }
    }
    const uint32_t n_steps =
        is_check ? (run->n_layers * CHECK_STEPS) : choose_steps(run, comm, warm_us);
    for (s.n = 0; s.n < n_steps; s.n++) {
        one_step(run, comm, s.n % run->n_layers, &s);
        if (is_check || (s.n + 1U == n_steps)) {
            fv_scale_step_verify(run, s.n % run->n_layers);
        }
    }
    out->n_steps = n_steps;
    out->wall = times_of(s.wall, n_steps, comm);
    out->device = times_of(s.device, n_steps, comm);
    out->compute = times_of(s.compute, n_steps, comm);
    out->exchange = times_of(s.exchange, n_steps, comm);
}

/* Ranks that have no part sleep, so that they take no core from those that have. */
static void meet(const fv_scale_rank_t *r)
{
    const struct timespec nap = {.tv_nsec = 200000};
    MPI_Request request = MPI_REQUEST_NULL;
    int is_done = 0;

    (void)MPI_Ibarrier(r->comm, &request);
    while (is_done == 0) {
        (void)MPI_Test(&request, &is_done, MPI_STATUS_IGNORE);
        if (is_done == 0) {
            (void)nanosleep(&nap, NULL);
        }
    }
}

bool fv_scale_case_run(fv_scale_rank_t *r,
                       const fv_scale_case_t *c,
                       int p,
                       uint16_t **one_rank,
                       fv_scale_result_t *out)
{
    fv_scale_run_t run = {0};
    MPI_Comm comm = MPI_COMM_NULL;

    if (!choose_size(&run, r, c, p)) {
        return false;
    }
    if (run.is_prefill && (fv_div_up(run.n_tokens, run.chunk) > FV_SCALE_STEPS_MAX)) {
        (void)fv_fail(FV_ERR_INVALID_ARG, "more than %d chunks", FV_SCALE_STEPS_MAX);
        fv_scale_die(c->name);
    }
    run.one_rank = fv_scale_has_one_rank(c) ? *one_rank : NULL;
    fv_scale_run_open(&run, r, c, p);
    (void)MPI_Comm_split(r->comm, (r->rank < p) ? 0 : MPI_UNDEFINED, r->rank, &comm);
    memset(out, 0, sizeof(*out));
    if (comm != MPI_COMM_NULL) {
        if (run.is_prefill) {
            fv_scale_prefill(&run, comm, out);
        } else {
            take_part(&run, comm, fv_scale_has_one_rank(c) ? one_rank : &run.one_rank, out);
        }
        (void)MPI_Comm_free(&comm);
    }
    meet(r);
    (void)snprintf(out->name, sizeof(out->name), "%s", c->name);
    out->spec = c;
    out->n_ranks = p;
    out->n_items = run.n_items;
    out->n_layers = run.n_layers;
    out->n_tokens = run.n_tokens;
    out->kv_bytes = fv_scale_kv_bytes(&run);
    out->sent_bytes = fv_scale_sent_bytes(&run);
    out->error = fv_scale_max(r, run.error);
    out->difference = fv_scale_max(r, run.difference);
    out->floor_us = run.is_prefill ? 0.0 : /* arithmetic, not memory */
                        ((r->backend == &fv_backend_cpu) ? 0.0 : LAUNCH_US) +
                            out->kv_bytes / r->read_gbps * 1e-3;
    if (run.is_prefill) { /* nothing is kept of one rank: chunks were compared with fp64 */
        fv_scale_run_close(&run);
        return true;
    }
    if (fv_scale_has_one_rank(c) && (p == 1)) {
        const size_t n_bytes =
            (size_t)run.n_items * (size_t)c->n_q_heads * (size_t)c->head_dim * sizeof(uint16_t);

        if (*one_rank == NULL) {
            *one_rank = fv_scale_alloc(1, n_bytes);
        }
        (void)MPI_Bcast(*one_rank, (int)n_bytes, MPI_BYTE, 0, r->comm);
    } else if (!fv_scale_has_one_rank(c)) {
        free(run.one_rank);
    }
    fv_scale_run_close(&run);
    return true;
}
