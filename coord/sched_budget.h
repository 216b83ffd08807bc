/*
 * sched_budget.h - how much prefill a step takes beside decode. Pure: no clock; times are given.
 *
 * Decode path: station 3 of 10, part of coord/sched_step.c.
 *
 * Why time and not tokens. What a token of a prompt costs grows with the context before it, and differs by a factor of a
 * thousand between a CPU core and a GPU; what a decode request waits is time. So the allowance of a step is a time, turned
 * into multiply-adds by a rate that is learned from the steps themselves, and those into tokens at their position.
 *
 * How long. Decode alone takes D a step. While a prefill runs, a decode request comes in behind a piece that has just begun
 * (C), then runs beside the next one (D + C): D + 2C at worst, which is at most 2D as long as C <= D / 2. While no decode has
 * been seen for a moment, pieces last FV_BUDGET_IDLE_US: what the first decode request waits at most, and long against what
 * a step costs by itself.
 *
 * What a piece takes is fitted by a line, fixed cost and macs apart: on a GPU launches and transfers cost more than a small
 * piece's arithmetic, and one rate for both would take them for a slow device, make pieces smaller, and see it slower still.
 * What is fixed is taken off C, up to its half: below that, pieces get many, and each keeps decode waiting.
 *
 * A piece is never smaller than fv_budget_least(): where one pass over a long prompt's KV takes longer than C, D + 2C is more
 * than 2D, and cutting along the queries can not help.
 *
 * D is learned from steps without prefill. While both run, one step in FV_BUDGET_LOOK_EVERY takes none, to see it again.
 */
#ifndef FV_COORD_SCHED_BUDGET_H
#define FV_COORD_SCHED_BUDGET_H

#include <stdbool.h>
#include <stdint.h>

#define FV_BUDGET_IDLE_US    20000
#define FV_BUDGET_MIN_US     250 /* less is mostly what a step costs by itself */
#define FV_BUDGET_LOOK_EVERY 16U
#define FV_PIECE_TOKENS_MIN  16U
#define FV_PIECE_TOKENS_FULL 64U

/* Sums over the last pieces: macs x, microseconds y. */
typedef struct fv_fit {
    double n, x, y, xx, xy;
} fv_fit_t;

typedef struct fv_budget {
    uint32_t tokens_fixed; /* > 0: so many tokens a step, whatever they cost */
    double macs_per_us;    /* prefill, learned */
    double over_us;        /* what a piece costs beside its macs, learned */
    fv_fit_t fit;
    double decode_us;       /* a step without prefill, learned; 0 = not known */
    int64_t decode_seen_us; /* when decode joined a step last; INT64_MIN: never */
    uint32_t n_mixed;       /* steps with both since one without prefill */
} fv_budget_t;

/* What one step may still take: both bounds hold. */
typedef struct fv_allowance {
    uint64_t n_tokens;
    double macs;
} fv_allowance_t;

/* What a step took: for learning. */
typedef struct fv_step_cost {
    double prefill_macs;
    bool has_decode;
    int64_t took_us; /* 0: not known */
} fv_step_cost_t;

void fv_budget_init(fv_budget_t *budget, uint32_t tokens_fixed);

/* Of a step at now_us that takes n_tokens_max tokens at most; decode has been chosen already. */
fv_allowance_t
fv_budget_allow(fv_budget_t *budget, int64_t now_us, bool has_decode, uint64_t n_tokens_max);
void fv_budget_learn(fv_budget_t *budget, const fv_step_cost_t *cost);

/*
 * n query tokens whose first sees `visible` tokens (each later one sees one more): multiply-adds, with
 * macs_per_pair = query heads x (dk + dv) of one (query, key) pair. A constant of pairs a token stands for its transfers.
 */
double fv_budget_macs(double macs_per_pair, double visible, double n_tokens);
/*
 * The tokens of the smallest piece. Whatever their number, a piece reads all the KV that they see; below as many as the rank
 * computes in the time of reading (macs_per_token of one KV token, kv_bytes of it), fewer are hardly faster.
 * In FV_PIECE_TOKENS_MIN .. FV_PIECE_TOKENS_FULL, a multiple of FV_PIECE_TOKENS_MIN.
 */
uint64_t fv_budget_least(const fv_budget_t *budget,
                         double macs_per_pair,
                         double kv_bytes,
                         double bytes_per_us);
/* The most tokens that cost at most `macs`. */
uint64_t fv_budget_tokens(double macs_per_pair, double visible, double macs);

#endif /* FV_COORD_SCHED_BUDGET_H */
