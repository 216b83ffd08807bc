/*
 * cmd_placement.c - `fovea placement`: draws which rank holds which heads and tokens of a session.
 *
 * The drawing is a grid. A row is a range of KV heads, a column a range of tokens, a cell the rank
 * that holds both, with the bytes that fall into it:
 *
 *     KV heads |      0..2047    2048..4095    4096..4999
 *     ---------+------------------------------------------
 *     0..3     |  r0  4.0 MiB   r1  4.0 MiB   r0  1.8 MiB
 *     4..7     |  r2  4.0 MiB   r3  4.0 MiB   r2  1.8 MiB
 */
#include "client/cli.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COLUMNS_DEFAULT 8
#define CELL_BYTES      24

typedef struct fv_placement_args {
    fovea_session_id_t session;
    bool has_session, is_json;
    uint32_t columns_max;
    const char *svg; /* NULL: no picture */
} fv_placement_args_t;

static const struct argp_option k_options[] = {
    {"json", 'j', 0, 0, "One JSON object", 0},
    {"svg", 's', "FILE", 0, "Write which blocks each head reads to FILE, as a picture", 0},
    {"columns", 'c', "N", 0, "Draw at most N token ranges (default 8)", 0},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    fv_placement_args_t *a = state->input;

    switch (key) {
    case 'j':
        a->is_json = true;
        return 0;
    case 'c':
        a->columns_max = (uint32_t)fv_cli_u64(state, "--columns", arg, 1000000);
        return 0;
    case 's':
        a->svg = arg;
        return 0;
    case ARGP_KEY_ARG:
        if (a->has_session) {
            argp_error(state, "unexpected argument \"%s\"", arg);
        }
        a->session = fv_cli_session(state, arg);
        a->has_session = true;
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_usage(state);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp k_argp = {
    .options = k_options,
    .parser = parse,
    .args_doc = "SESSION",
    .doc = "Draw which rank holds which KV heads (rows) and tokens (columns) of a session.\v"
           "Exit codes: 0 success, 1 service error, 2 wrong usage.",
};

/* ------------------------------------------------------------------ JSON */

static cJSON *share_json(const fovea_placement_share_t *s)
{
    cJSON *json = cJSON_CreateObject();
    cJSON *ranges = NULL;

    fv_json_u64(json, "rank", s->rank);
    fv_json_u64(json, "kv_head_begin", s->kv_head_begin);
    fv_json_u64(json, "kv_head_end", s->kv_head_end);
    fv_json_u64(json, "q_head_begin", s->q_head_begin);
    fv_json_u64(json, "q_head_end", s->q_head_end);
    fv_json_u64(json, "latent_begin", s->latent_begin);
    fv_json_u64(json, "latent_end", s->latent_end);
    ranges = cJSON_AddArrayToObject(json, "tokens");
    for (uint32_t i = 0; i < s->n_ranges; i++) {
        cJSON *range = cJSON_CreateArray();
        (void)cJSON_AddItemToArray(range, cJSON_CreateNumber((double)s->ranges[i].begin));
        (void)cJSON_AddItemToArray(range, cJSON_CreateNumber((double)s->ranges[i].end));
        (void)cJSON_AddItemToArray(ranges, range);
    }
    fv_json_bool(json, "truncated", s->truncated);
    fv_json_u64(json, "n_tokens", s->n_tokens);
    fv_json_u64(json, "kv_bytes", s->kv_bytes);
    fv_json_u64(json, "freed_bytes", s->freed_bytes);
    return json;
}

static cJSON *pattern_json(const fovea_placement_pattern_t *p)
{
    const fovea_s2_t *s2 = &p->policy.s2;
    cJSON *json = cJSON_CreateObject();
    cJSON *layers = cJSON_AddArrayToObject(json, "layers");

    for (uint32_t i = 0; i < p->policy.n_layers; i++) {
        (void)cJSON_AddItemToArray(layers, cJSON_CreateNumber((double)p->policy.layers[i]));
    }
    fv_json_u64(json, "n_tokens", p->n_tokens);
    fv_json_u64(json, "floor", p->floor);
    fv_json_u64(json, "kv_bytes", p->kv_bytes);
    fv_json_u64(json, "freed_bytes", p->freed_bytes);
    if (p->policy.kind == FOVEA_POLICY_WINDOW) {
        fv_json_text(json, "policy", "window");
        fv_json_u64(json, "window_tokens", p->policy.window_tokens);
        fv_json_u64(json, "sink_tokens", p->policy.sink_tokens);
        return json;
    }
    fv_json_text(json, "policy", "s2");
    fv_json_u64(json, "block_tokens", s2->block_tokens);
    fv_json_u64(json, "local_blocks", s2->local_blocks);
    fv_json_u64(json, "vert_stride", s2->vert_stride);
    fv_json_real(json, "head_sliding_step", (double)s2->head_sliding_step);
    fv_json_real(json, "head_sliding_offset", (double)s2->head_sliding_offset);
    fv_json_u64(json, "num_dense_heads", s2->num_dense_heads);
    fv_json_bool(json, "homo_head", s2->homo_head);
    fv_json_text(json, "pattern_per",
                 (s2->pattern_per == FOVEA_PATTERN_Q_HEAD) ? "q_head" : "kv_head");
    return json;
}

static cJSON *placement_json(const fovea_placement_t *p)
{
    char text[FOVEA_SESSION_TEXT_BYTES];
    cJSON *json = cJSON_CreateObject();
    cJSON *shares = NULL;
    cJSON *patterns = NULL;

    fovea_session_id_format(&p->session, text);
    fv_json_text(json, "session_id", text);
    fv_json_text(json, "model_id", p->model_id);
    fv_json_text(json, "mode", p->mode);
    fv_json_text(json, "reason", p->reason);
    fv_json_u64(json, "n_head_parts", p->n_head_parts);
    fv_json_u64(json, "n_ctx_parts", p->n_ctx_parts);
    fv_json_u64(json, "n_latent_parts", p->n_latent_parts);
    fv_json_bool(json, "approximate", p->is_approximate);
    fv_json_u64(json, "shard_tokens", p->shard_tokens);
    fv_json_u64(json, "n_tokens", p->n_tokens);
    shares = cJSON_AddArrayToObject(json, "shares");
    for (uint32_t i = 0; i < p->n_shares; i++) {
        (void)cJSON_AddItemToArray(shares, share_json(&p->shares[i]));
    }
    fv_json_u64(json, "n_q_heads", p->n_q_heads);
    fv_json_u64(json, "n_kv_heads", p->n_kv_heads);
    patterns = cJSON_AddArrayToObject(json, "patterns");
    for (uint32_t i = 0; i < p->n_patterns; i++) {
        (void)cJSON_AddItemToArray(patterns, pattern_json(&p->patterns[i]));
    }
    return json;
}

/* ------------------------------------------------------------------ the grid */

/* Sorted, distinct values; at most `cap` of them are looked at. */
typedef struct fv_edges {
    uint64_t *values;
    size_t n_values;
} fv_edges_t;

static int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a;
    uint64_t y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

static void sort_distinct(fv_edges_t *e)
{
    size_t n = 0;

    qsort(e->values, e->n_values, sizeof(*e->values), compare_u64);
    for (size_t i = 0; i < e->n_values; i++) {
        if ((n == 0) || (e->values[n - 1] != e->values[i])) {
            e->values[n++] = e->values[i];
        }
    }
    e->n_values = n;
}

/* The rows of a share: KV heads; where ranks hold the one latent for some heads or in slices, query heads or its dims. */
typedef struct fv_rows_of {
    const char *title;
    uint64_t begin, end;
} fv_rows_of_t;

static fv_rows_of_t rows_of(const fovea_placement_t *p, const fovea_placement_share_t *s)
{
    if (p->n_latent_parts > 1) {
        return (fv_rows_of_t){"latent", s->latent_begin, s->latent_end};
    }
    if (s->latent_end > 0) {
        return (fv_rows_of_t){"Q heads", s->q_head_begin, s->q_head_end};
    }
    return (fv_rows_of_t){"KV heads", s->kv_head_begin, s->kv_head_end};
}

/* Every place where a column (tokens) or a row (rows_of()) begins or ends. */
static bool edges_of(const fovea_placement_t *p, bool is_tokens, fv_edges_t *out)
{
    size_t cap = 2U * (size_t)p->n_shares * FOVEA_RANGES_MAX;

    out->values = calloc(cap + 1, sizeof(*out->values));
    out->n_values = 0;
    if (out->values == NULL) {
        return false;
    }
    for (uint32_t i = 0; i < p->n_shares; i++) {
        const fovea_placement_share_t *s = &p->shares[i];
        if (!is_tokens) {
            out->values[out->n_values++] = rows_of(p, s).begin;
            out->values[out->n_values++] = rows_of(p, s).end;
        }
        for (uint32_t j = 0; is_tokens && (j < s->n_ranges); j++) {
            out->values[out->n_values++] = s->ranges[j].begin;
            out->values[out->n_values++] = s->ranges[j].end;
        }
    }
    sort_distinct(out);
    return true;
}

/* The share that holds (row, token), NULL for none that the answer names. */
static const fovea_placement_share_t *
owner(const fovea_placement_t *p, uint64_t row, uint64_t token)
{
    for (uint32_t i = 0; i < p->n_shares; i++) {
        const fovea_placement_share_t *s = &p->shares[i];
        if ((row < rows_of(p, s).begin) || (row >= rows_of(p, s).end)) {
            continue;
        }
        for (uint32_t j = 0; j < s->n_ranges; j++) {
            if ((token >= s->ranges[j].begin) && (token < s->ranges[j].end)) {
                return s;
            }
        }
    }
    return NULL;
}

static void print_cell(const fovea_placement_t *p,
                       const fovea_placement_share_t *s,
                       uint64_t n_rows,
                       uint64_t n_tokens)
{
    char bytes[FV_CLI_TEXT_BYTES];
    char cell[CELL_BYTES + FV_CLI_TEXT_BYTES];
    double part = 0.0;

    if (s == NULL) {
        (void)printf(" %18s", "-");
        return;
    }
    fv_rows_of_t rows = rows_of(p, s);
    if ((s->n_tokens > 0) && (rows.end > rows.begin)) {
        part = ((double)n_tokens / (double)s->n_tokens) *
               ((double)n_rows / (double)(rows.end - rows.begin));
    }
    (void)snprintf(cell, sizeof(cell), "r%u %9s", s->rank,
                   fv_cli_bytes((uint64_t)((double)s->kv_bytes * part), bytes));
    (void)printf(" %18s", cell);
}

static void print_grid(const fovea_placement_t *p,
                       const fv_edges_t *rows,
                       const fv_edges_t *columns,
                       uint32_t columns_max)
{
    size_t n_columns = columns->n_values - 1;
    size_t n_drawn = (n_columns < columns_max) ? n_columns : columns_max;
    char text[48];

    (void)printf("%-9s|", rows_of(p, &p->shares[0]).title);
    for (size_t c = 0; c < n_drawn; c++) {
        (void)snprintf(text, sizeof(text), "%llu..%llu", (unsigned long long)columns->values[c],
                       (unsigned long long)columns->values[c + 1] - 1);
        (void)printf(" %18s", text);
    }
    (void)printf("%s\n---------+", (n_drawn < n_columns) ? "  ..." : "");
    for (size_t c = 0; c < n_drawn; c++) {
        (void)printf("-------------------");
    }
    (void)printf("\n");
    for (size_t r = 0; (r + 1) < rows->n_values; r++) {
        (void)snprintf(text, sizeof(text), "%llu..%llu", (unsigned long long)rows->values[r],
                       (unsigned long long)rows->values[r + 1] - 1);
        (void)printf("%-9s|", text);
        for (size_t c = 0; c < n_drawn; c++) {
            print_cell(p, owner(p, rows->values[r], columns->values[c]),
                       rows->values[r + 1] - rows->values[r],
                       columns->values[c + 1] - columns->values[c]);
        }
        (void)printf("\n");
    }
    if (n_drawn < n_columns) {
        (void)printf("(%zu of %zu token ranges drawn; --columns shows more)\n", n_drawn, n_columns);
    }
}

static int draw(const fovea_placement_t *p, uint32_t columns_max)
{
    fv_edges_t rows = {0};
    fv_edges_t columns = {0};
    int rc = FV_EXIT_SERVICE;

    if (edges_of(p, false, &rows) && edges_of(p, true, &columns)) {
        if ((rows.n_values >= 2) && (columns.n_values >= 2)) {
            print_grid(p, &rows, &columns, columns_max);
        } else {
            (void)printf("(no token is stored yet)\n");
        }
        rc = FV_EXIT_OK;
    }
    free(rows.values);
    free(columns.values);
    return rc;
}

static int print_placement(const fovea_placement_t *p, uint32_t columns_max)
{
    char id[FOVEA_SESSION_TEXT_BYTES];
    char bytes[FV_CLI_TEXT_BYTES];
    char freed[FV_CLI_TEXT_BYTES];
    int rc = FV_EXIT_OK;

    fovea_session_id_format(&p->session, id);
    (void)printf("session %s of model %s: %llu tokens\n", id, p->model_id,
                 (unsigned long long)p->n_tokens);
    (void)printf("placement: %s (%u head part%s x %u context part%s, %u tokens per turn)\n",
                 p->mode, p->n_head_parts, (p->n_head_parts == 1) ? "" : "s", p->n_ctx_parts,
                 (p->n_ctx_parts == 1) ? "" : "s", p->shard_tokens);
    (void)printf("because: %s\n", p->reason);
    if (p->is_approximate) {
        (void)printf("approximation: each of %u slices of the latent has a softmax of its own\n",
                     p->n_latent_parts);
    }
    (void)printf("\n");
    rc = draw(p, columns_max);
    (void)printf("\n%4s  %10s  %10s  %10s  %10s  %10s\n", "rank", "KV heads", "Q heads", "tokens",
                 "KV memory", "freed");
    for (uint32_t i = 0; i < p->n_shares; i++) {
        const fovea_placement_share_t *s = &p->shares[i];
        char kv[24];
        char q[24];
        (void)snprintf(kv, sizeof(kv), "%u..%u", s->kv_head_begin, s->kv_head_end - 1U);
        (void)snprintf(q, sizeof(q), "%u..%u", s->q_head_begin, s->q_head_end - 1U);
        (void)printf("%4u  %10s  %10s  %10llu  %10s  %10s%s\n", s->rank, kv, q,
                     (unsigned long long)s->n_tokens, fv_cli_bytes(s->kv_bytes, bytes),
                     fv_cli_bytes(s->freed_bytes, freed),
                     s->truncated ? "  (only its first token ranges are drawn)" : "");
    }
    fv_cli_print_patterns(p);
    return rc;
}

int fv_cmd_placement(const fv_cli_t *cli, int argc, char **argv)
{
    fv_placement_args_t a = {.columns_max = COLUMNS_DEFAULT};
    fovea_client_t *client = NULL;
    fovea_placement_t placement;
    fovea_error_t error;
    int rc = FV_EXIT_OK;

    (void)argp_parse(&k_argp, argc, argv, 0, NULL, &a);
    rc = fv_cli_connect(cli, &client);
    if (rc != FV_EXIT_OK) {
        return rc;
    }
    if (fovea_get_placement(client, &a.session, cli->timeout_ms, &placement, &error) != FOVEA_OK) {
        rc = fv_cli_error(&error);
    } else {
        rc = a.is_json ? fv_cli_print_json(placement_json(&placement), true)
                       : print_placement(&placement, a.columns_max);
        if ((a.svg != NULL) && !fv_cli_draw_patterns(&placement, a.svg)) {
            (void)fprintf(stderr, "fovea: %s: %s\n", a.svg, strerror(errno));
            rc = FV_EXIT_SERVICE;
        }
        fovea_placement_free(&placement);
    }
    fovea_close(client);
    return rc;
}
