/*
 * sched_budget.c - see sched_budget.h.
 */
#include "coord/sched_budget.h"

#include <math.h>

/* Of a slow core; a rate that is too low costs a few small steps, one that is too high a long wait. */
#define MACS_PER_US_FIRST 1e5
#define MACS_PER_US_MIN   1e3
/* Pairs that one token's transfers, append and output are worth. */
#define TOKEN_PAIRS 256.0
/* Decode counts as running for so long after it was seen: a frontend's other layers lie between two requests. */
#define DECODE_IDLE_US    100000
#define DECODE_IDLE_STEPS 8.0
#define SHARE             0.5 /* of a decode step: sched_budget.h says why */
#define WEIGHT            0.25
#define KEEP              0.97 /* of what earlier pieces say, at each new one */
#define SPREAD            0.01 /* variance over mean^2 from which a line can be fitted */
#define FIXED_LEAST       0.1  /* of a piece's time at least is its macs' */
#define GROWTH            4.0  /* of the rate in one step, at most: a slow step shows late */
#define DITHER            0.7  /* every other piece is so much smaller: else there is no line */

void fv_budget_init(fv_budget_t *budget, uint32_t tokens_fixed)
{
    *budget = (fv_budget_t){.tokens_fixed = tokens_fixed,
                            .macs_per_us = MACS_PER_US_FIRST,
                            .decode_seen_us = INT64_MIN};
}

static bool is_decode_running(const fv_budget_t *budget, int64_t now_us)
{
    double idle_us = DECODE_IDLE_STEPS * budget->decode_us;

    idle_us = (idle_us > DECODE_IDLE_US) ? idle_us : DECODE_IDLE_US;
    return (budget->decode_seen_us != INT64_MIN) &&
           ((double)(now_us - budget->decode_seen_us) < idle_us);
}

fv_allowance_t
fv_budget_allow(fv_budget_t *budget, int64_t now_us, bool has_decode, uint64_t n_tokens_max)
{
    fv_allowance_t none = {0, 0.0};
    double us = FV_BUDGET_IDLE_US;

    if (has_decode) {
        budget->decode_seen_us = now_us;
    }
    if (budget->tokens_fixed > 0) {
        return (fv_allowance_t){
            .n_tokens = (budget->tokens_fixed < n_tokens_max) ? budget->tokens_fixed : n_tokens_max,
            .macs = (double)INFINITY};
    }
    if (has_decode && ((budget->decode_us <= 0.0) || (budget->n_mixed >= FV_BUDGET_LOOK_EVERY))) {
        budget->n_mixed = 0;
        return none;
    }
    if (is_decode_running(budget, now_us)) {
        us = SHARE * budget->decode_us;
        us = (us > FV_BUDGET_MIN_US) ? us : FV_BUDGET_MIN_US;
        us = (budget->over_us < us / 2.0) ? (us - budget->over_us) : (us / 2.0);
        us *= (budget->n_mixed % 2U == 0U) ? 1.0 : DITHER;
    }
    return (fv_allowance_t){.n_tokens = n_tokens_max, .macs = us * budget->macs_per_us};
}

/* What a busy machine makes of a step now and then says little of the next: within so many times what is known. */
static double tame(double known, double seen, double times)
{
    if (known <= 0.0) {
        return seen;
    }
    return (seen > times * known)   ? (times * known)
           : (seen < known / times) ? (known / times)
                                    : seen;
}

static double follow(double known, double seen)
{
    return (known <= 0.0) ? seen : (known + WEIGHT * (tame(known, seen, 2.0) - known));
}

/* What a piece of so many macs takes is fitted by a straight line through the last ones: over_us + macs / rate. */
static void fit(fv_budget_t *budget, double macs, double us)
{
    fv_fit_t *f = &budget->fit;

    us = (us > 0.0) ? tame(budget->over_us + macs / budget->macs_per_us, us, 4.0) : 0.0;
    f->n = f->n * KEEP + 1.0;
    f->x = f->x * KEEP + macs;
    f->y = f->y * KEEP + us;
    f->xx = f->xx * KEEP + macs * macs;
    f->xy = f->xy * KEEP + macs * us;
    double x = f->x / f->n;
    double y = (f->y > f->n) ? (f->y / f->n) : 1.0;
    double variance = f->xx / f->n - x * x;
    double known = x / budget->macs_per_us;
    /* pieces of one size say nothing of what is fixed: its share stays */
    double slope = y / x * (known / (known + budget->over_us));

    if (variance > SPREAD * x * x) {
        slope = (f->xy / f->n - x * (f->y / f->n)) / variance;
    }
    slope = (slope > y / x) ? (y / x) : slope;
    slope = (slope < FIXED_LEAST * y / x) ? (FIXED_LEAST * y / x) : slope;
    double rate = 1.0 / slope;
    rate = (rate < GROWTH * budget->macs_per_us) ? rate : (GROWTH * budget->macs_per_us);
    budget->macs_per_us = (rate > MACS_PER_US_MIN) ? rate : MACS_PER_US_MIN;
    double over_us = y - x / budget->macs_per_us;
    budget->over_us = (over_us > 0.0) ? over_us : 0.0;
}

void fv_budget_learn(fv_budget_t *budget, const fv_step_cost_t *cost)
{
    double prefill_us = (double)cost->took_us;

    if (cost->took_us <= 0) {
        return;
    }
    if (cost->prefill_macs <= 0.0) {
        if (cost->has_decode) {
            budget->decode_us = follow(budget->decode_us, (double)cost->took_us);
            budget->n_mixed = 0;
        }
        return;
    }
    if (cost->has_decode) {
        budget->n_mixed++;
        prefill_us -= budget->decode_us;
    }
    fit(budget, cost->prefill_macs, prefill_us);
}

/* n tokens, the first of which sees `visible`: n * visible + n^2 / 2 pairs. */
double fv_budget_macs(double macs_per_pair, double visible, double n_tokens)
{
    return macs_per_pair * n_tokens * (visible + TOKEN_PAIRS + n_tokens / 2.0);
}

uint64_t fv_budget_least(const fv_budget_t *budget,
                         double macs_per_pair,
                         double kv_bytes,
                         double bytes_per_us)
{
    double n = kv_bytes / bytes_per_us * budget->macs_per_us / macs_per_pair;
    uint64_t least = (uint64_t)((n < FV_PIECE_TOKENS_FULL) ? n : (double)FV_PIECE_TOKENS_FULL) /
                     FV_PIECE_TOKENS_MIN * FV_PIECE_TOKENS_MIN;

    return (least > FV_PIECE_TOKENS_MIN) ? least : FV_PIECE_TOKENS_MIN;
}

uint64_t fv_budget_tokens(double macs_per_pair, double visible, double macs)
{
    double b = visible + TOKEN_PAIRS;
    double n = 0.0;

    if (isinf(macs)) {
        return UINT64_MAX;
    }
    n = sqrt(b * b + 2.0 * macs / macs_per_pair) - b;
    return (n > 0.0) ? (uint64_t)n : 0U;
}
