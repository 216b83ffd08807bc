/*
 * scale_prefill.c - a prompt over p ranks: prefill steps of one chunk each, timed, and some of them compared with fp64.
 *
 * A step takes as long as its slowest rank, so the prompt takes the sum of the chunks' slowest ranks. The first chunks of
 * another layer warm up; the prompt is repeated in a second layer when it took less than the case's seconds.
 */
#include "bench/scale/scale.h"

#include <string.h>

#define WARM_CHUNKS  2U
#define VERIFY_EVERY 16U /* and the last: fp64 takes longer than the chunk */

typedef struct chunks {
    double wall[FV_SCALE_STEPS_MAX], device[FV_SCALE_STEPS_MAX];
    double compute[FV_SCALE_STEPS_MAX], exchange[FV_SCALE_STEPS_MAX];
    uint32_t n;
} chunks_t;

static void one_chunk(fv_scale_run_t *run, MPI_Comm comm, uint32_t layer, chunks_t *c)
{
    const uint64_t rest = run->n_tokens - run->lengths[layer];
    const uint32_t n = (rest < run->chunk) ? (uint32_t)rest : run->chunk;
    const bool has_share = fv_scale_step_prepare(run, layer, n);
    fv_ctl_done_t done = {0};

    (void)MPI_Barrier(comm);
    const double begin = fv_scale_now_us();
    if (has_share) {
        fv_scale_step_run(run, &done);
    }
    c->wall[c->n] = fv_scale_now_us() - begin;
    c->compute[c->n] = (double)done.compute_us;
    c->exchange[c->n] = (double)done.exchange_us;
    c->device[c->n] = c->compute[c->n] + c->exchange[c->n];
    c->n++;
    if (has_share && ((c->n % VERIFY_EVERY == 1U) || (rest == n))) {
        fv_scale_step_verify(run, layer);
    }
    run->lengths[layer] += n;
}

/* Over the chunks, of each the slowest rank; the same on all ranks. */
static double sum_of(const double *values, uint32_t n, MPI_Comm comm)
{
    double all[FV_SCALE_STEPS_MAX];
    double sum = 0.0;

    (void)MPI_Allreduce(values, all, (int)n, MPI_DOUBLE, MPI_MAX, comm);
    for (uint32_t i = 0; i < n; i++) {
        sum += all[i];
    }
    return sum;
}

static void keep_least(fv_scale_times_t *times, double us, bool is_first)
{
    if (is_first || (us < times->p50)) {
        *times = (fv_scale_times_t){.p10 = us, .p50 = us, .p90 = us};
    }
}

void fv_scale_prefill(fv_scale_run_t *run, MPI_Comm comm, fv_scale_result_t *out)
{
    static chunks_t c;
    const uint32_t warm = run->n_layers - 1U;
    double wall_us = 0.0;

    c.n = 0;
    while ((c.n < WARM_CHUNKS) && (run->lengths[warm] < run->n_tokens)) {
        one_chunk(run, comm, warm, &c);
    }
    for (uint32_t layer = 0; (layer < run->n_layers) && (run->lengths[layer] == 0U); layer++) {
        if (wall_us > run->r->options->seconds * 1e6) {
            break;
        }
        c.n = 0;
        while (run->lengths[layer] < run->n_tokens) {
            one_chunk(run, comm, layer, &c);
        }
        wall_us = sum_of(c.wall, c.n, comm);
        keep_least(&out->wall, wall_us, layer == 0U);
        keep_least(&out->device, sum_of(c.device, c.n, comm), layer == 0U);
        keep_least(&out->compute, sum_of(c.compute, c.n, comm), layer == 0U);
        keep_least(&out->exchange, sum_of(c.exchange, c.n, comm), layer == 0U);
        out->n_steps = c.n;
    }
}

double fv_scale_prefill_flops(const fv_scale_result_t *x)
{
    const double n = (double)x->n_tokens;

    return 4.0 * (double)x->spec->n_q_heads * (double)x->spec->head_dim * n * (n + 1.0) / 2.0 *
           (double)x->n_items;
}
