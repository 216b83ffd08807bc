/*
 * bench_plan.c - the planner: a full plan of many sessions on many ranks, and one more token of one session.
 *
 *     bench_plan [--ranks 1024] [--sessions 10000] [--rounds 15] [--seed 1] [--json]
 *
 * Full plan: an empty planner is told its ranks; then each session is placed and accounted at its length.
 * One more token: a random session grows by one token: fv_plan_growth_bytes() and fv_planner_account() for every cell.
 * Mixes: "short" hints of 128 to 8k tokens, "mixed" 128 to 256k (uniform in magnitude), "no hint".
 * Each plan is verified (every rank's bytes equal to what its sessions hold) before its time counts.
 */
#include "coord/plan.h"

#include <getopt.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define RANK_BYTES   (1ULL << 40)
#define SHARD_TOKENS 2048
#define N_TOKENS_RUN 100000 /* timed single-token steps a round */

typedef struct options {
    uint32_t n_ranks;
    uint32_t n_sessions;
    uint32_t n_rounds;
    uint64_t seed;
    bool is_json;
} options_t;

typedef struct mix {
    const char *name;
    uint32_t low_bits, high_bits; /* of the length */
    bool has_hint;
} mix_t;

static const mix_t k_mixes[] = {
    {"short", 7, 12, true},
    {"mixed", 7, 17, true},
    {"no hint", 7, 12, false},
};

typedef struct session {
    fv_placement_t placement;
    uint64_t n_tokens;
} session_t;

typedef struct bench {
    options_t options;
    fv_model_spec_t spec;
    fv_planner_t *planner;
    session_t *sessions;
    uint64_t random;
} bench_t;

typedef struct result {
    double plan_ms_min, plan_ms_median;
    double token_us_min, token_us_median;
    double mean_ranks; /* of a session */
} result_t;

static double now_us(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

static uint64_t next(bench_t *b)
{
    uint64_t z = (b->random += 0x9e3779b97f4a7c15ULL);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
}

static int32_t n_cells(const fv_placement_t *p)
{
    return p->n_head_parts * p->n_ctx_parts;
}

static void account(bench_t *b, const session_t *s, uint64_t n_before, uint64_t n_after)
{
    for (int32_t cell = 0; cell < n_cells(&s->placement); cell++) {
        uint64_t bytes = fv_plan_growth_bytes(&b->spec, &s->placement, cell, n_before, n_after) *
                         (uint64_t)b->spec.n_layers;

        if (bytes > 0) {
            fv_planner_account(b->planner, s->placement.ranks[cell], (int64_t)bytes);
        }
    }
}

static fv_status_t full_plan(bench_t *b, const mix_t *mix)
{
    static const fv_sharding_t sharding = {.mode = FV_SHARDING_AUTO};
    char reason[FV_PLAN_REASON_BYTES];

    for (uint32_t i = 0; i < b->options.n_ranks; i++) {
        fv_planner_set_rank(b->planner, i, RANK_BYTES);
    }
    for (uint32_t i = 0; i < b->options.n_sessions; i++) {
        session_t *s = &b->sessions[i];

        FV_RETURN_IF_ERR(fv_planner_place(b->planner, &b->spec, &sharding, SHARD_TOKENS,
                                          mix->has_hint ? s->n_tokens : 0, &s->placement, reason));
        account(b, s, 0, s->n_tokens);
    }
    return FV_OK;
}

/* What every rank holds, counted from the sessions page by page, is what the planner believes. */
static bool is_right(const bench_t *b)
{
    uint64_t *held = calloc(b->options.n_ranks, sizeof(*held));
    bool is_ok = held != NULL;

    for (uint32_t i = 0; is_ok && (i < b->options.n_sessions); i++) {
        const session_t *s = &b->sessions[i];
        const fv_placement_t *p = &s->placement;

        for (uint64_t token = 0; token < s->n_tokens; token += FV_PAGE_TOKENS) {
            int32_t cp = fv_placement_part_of(p, token);
            for (int32_t head = 0; head < b->spec.n_kv_heads; head++) {
                int32_t hp = 0;
                while (head >= fv_placement_head_begin(p, b->spec.n_kv_heads, hp + 1)) {
                    hp++;
                }
                held[p->ranks[hp * p->n_ctx_parts + cp]] +=
                    fv_model_page_bytes(&b->spec) * (uint64_t)b->spec.n_layers;
            }
        }
    }
    for (uint32_t i = 0; is_ok && (i < b->options.n_ranks); i++) {
        is_ok = held[i] == fv_planner_used(b->planner, i);
    }
    free(held);
    return is_ok;
}

static double one_more_token(bench_t *b)
{
    double begin = now_us();

    for (uint32_t i = 0; i < N_TOKENS_RUN; i++) {
        session_t *s = &b->sessions[next(b) % b->options.n_sessions];

        account(b, s, s->n_tokens, s->n_tokens + 1);
        s->n_tokens++;
    }
    return (now_us() - begin) / N_TOKENS_RUN;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a;
    double y = *(const double *)b;

    return (x > y) - (x < y);
}

static fv_status_t run_round(bench_t *b, const mix_t *mix, double *plan_ms, double *token_us)
{
    fv_plan_cost_t cost = fv_plan_cost_cpu();
    fv_status_t status = fv_planner_create(b->options.n_ranks, &cost, &b->planner);

    if (status != FV_OK) {
        return status;
    }
    for (uint32_t i = 0; i < b->options.n_sessions; i++) {
        uint64_t bits = mix->low_bits + (next(b) % (mix->high_bits - mix->low_bits + 1));
        b->sessions[i].n_tokens = (1ULL << bits) + (next(b) & ((1ULL << bits) - 1));
    }
    double begin = now_us();
    status = full_plan(b, mix);
    *plan_ms = (now_us() - begin) * 1e-3;
    if ((status == FV_OK) && !is_right(b)) {
        status = fv_fail(FV_ERR_INTERNAL, "mix %s: the planner's bytes are wrong", mix->name);
    }
    if (status == FV_OK) {
        *token_us = one_more_token(b);
    }
    fv_planner_destroy(b->planner);
    return status;
}

static fv_status_t run_mix(bench_t *b, const mix_t *mix, result_t *out)
{
    double *plan_ms = calloc(b->options.n_rounds, sizeof(double));
    double *token_us = calloc(b->options.n_rounds, sizeof(double));
    fv_status_t status = FV_OK;
    uint64_t n_ranks = 0;

    if ((plan_ms == NULL) || (token_us == NULL)) {
        status = fv_fail(FV_ERR_NO_MEMORY, "no memory for %u rounds", b->options.n_rounds);
    }
    for (uint32_t i = 0; (status == FV_OK) && (i < b->options.n_rounds); i++) {
        status = run_round(b, mix, &plan_ms[i], &token_us[i]);
    }
    if (status == FV_OK) {
        qsort(plan_ms, b->options.n_rounds, sizeof(double), compare);
        qsort(token_us, b->options.n_rounds, sizeof(double), compare);
        for (uint32_t i = 0; i < b->options.n_sessions; i++) {
            n_ranks += (uint64_t)n_cells(&b->sessions[i].placement);
        }
        *out = (result_t){.plan_ms_min = plan_ms[0],
                          .plan_ms_median = plan_ms[b->options.n_rounds / 2],
                          .token_us_min = token_us[0],
                          .token_us_median = token_us[b->options.n_rounds / 2],
                          .mean_ranks = (double)n_ranks / b->options.n_sessions};
    }
    free(plan_ms);
    free(token_us);
    return status;
}

static void print_result(const options_t *o, const mix_t *mix, const result_t *r)
{
    if (o->is_json) {
        printf("{\"bench\": \"plan\", \"case\": \"%s\", \"ranks\": %u, \"sessions\": %u, "
               "\"mean_ranks_per_session\": %.2f, \"plan_ms_min\": %.3f, \"plan_ms_median\": %.3f, "
               "\"token_us_min\": %.4f, \"token_us_median\": %.4f}\n",
               mix->name, o->n_ranks, o->n_sessions, r->mean_ranks, r->plan_ms_min,
               r->plan_ms_median, r->token_us_min, r->token_us_median);
    } else {
        printf("%-8s  %9.2f  %12.2f  %12.2f  %13.3f  %13.3f\n", mix->name, r->mean_ranks,
               r->plan_ms_min, r->plan_ms_median, r->token_us_min, r->token_us_median);
    }
}

static bool parse_number(const char *text, uint64_t low, uint64_t high, uint64_t *out)
{
    char *end = NULL;
    unsigned long long value = strtoull(text, &end, 10);

    if ((*text == '\0') || (*end != '\0') || (value < low) || (value > high)) {
        return false;
    }
    *out = value;
    return true;
}

static bool parse(int argc, char **argv, options_t *out)
{
    static const struct option longs[] = {
        {"ranks", required_argument, NULL, 'r'},  {"sessions", required_argument, NULL, 's'},
        {"rounds", required_argument, NULL, 'n'}, {"seed", required_argument, NULL, 'e'},
        {"json", no_argument, NULL, 'j'},         {NULL, 0, NULL, 0}};
    uint64_t ranks = 1024;
    uint64_t sessions = 10000;
    uint64_t rounds = 15;
    uint64_t random = 1;
    bool is_ok = true;
    bool is_json = false;

    for (int c = 0; is_ok && (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        is_ok = ((c == 'r') && parse_number(optarg, 1, 65536, &ranks)) ||
                ((c == 's') && parse_number(optarg, 1, 1000000, &sessions)) ||
                ((c == 'n') && parse_number(optarg, 1, 10000, &rounds)) ||
                ((c == 'e') && parse_number(optarg, 0, UINT64_MAX, &random)) || (c == 'j');
        is_json = is_json || (c == 'j');
    }
    *out = (options_t){.n_ranks = (uint32_t)ranks,
                       .n_sessions = (uint32_t)sessions,
                       .n_rounds = (uint32_t)rounds,
                       .seed = random,
                       .is_json = is_json};
    return is_ok && (optind == argc);
}

int main(int argc, char **argv)
{
    bench_t b = {0};
    fv_status_t status = FV_OK;

    if (!parse(argc, argv, &b.options)) {
        fprintf(stderr, "usage: bench_plan [--ranks N] [--sessions N] [--rounds N] [--seed N] "
                        "[--json]\n");
        return 2;
    }
    b.random = b.options.seed;
    b.spec = (fv_model_spec_t){.n_layers = 32,
                               .n_q_heads = 32,
                               .n_kv_heads = 8,
                               .head_dim_qk = 128,
                               .head_dim_v = 128,
                               .kv_dtype = FV_DTYPE_BF16,
                               .n_policies = 1};
    b.sessions = calloc(b.options.n_sessions, sizeof(*b.sessions));
    if (b.sessions == NULL) {
        fprintf(stderr, "no memory for %u sessions\n", b.options.n_sessions);
        return 1;
    }
    if (!b.options.is_json) {
        printf("%u sessions on %u ranks, 32 layers, 32/8 heads, d = 128, bf16\n",
               b.options.n_sessions, b.options.n_ranks);
        printf("mix       ranks/ses  plan min, ms  median, ms    token min, us  median, us\n");
    }
    for (size_t i = 0; (status == FV_OK) && (i < sizeof(k_mixes) / sizeof(k_mixes[0])); i++) {
        result_t result;
        status = run_mix(&b, &k_mixes[i], &result);
        if (status == FV_OK) {
            print_result(&b.options, &k_mixes[i], &result);
        } else {
            fprintf(stderr, "bench_plan: %s\n", fv_error_context());
        }
    }
    free(b.sessions);
    return (status == FV_OK) ? 0 : 1;
}
