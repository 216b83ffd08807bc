/*
 * cmd_placement_pattern.c - `fovea placement`: which blocks each head reads, as text and as a picture.
 *
 * A row is a head (or several with one pattern), a column one block or, where there are more than fit, several of them:
 *
 *     S2 64/8/16, layers 0-30:2 ...
 *     head  0..7   |#.......#.......#.......#######|     # read   + some of several   . not read, freed
 */
#include "client/cli.h"
#include "common/policy.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define TEXT_COLUMNS    96
#define PICTURE_COLUMNS 2048
#define CELL_HEIGHT     10
#define PICTURE_WIDTH   1200.0

/* A pattern as the arithmetic of common/policy.h takes it. */
typedef struct drawn {
    fv_policy_t policy;
    int32_t n_heads;    /* rows */
    int32_t group;      /* query heads of a KV head */
    int64_t block;      /* tokens of a column's unit */
    int64_t n_blocks;   /* of the context */
    int64_t position;   /* of the newest token */
    int64_t per_column; /* blocks; the last column may have fewer */
    int64_t n_columns;  /* at most the caller's limit */
} drawn_t;

static drawn_t
drawn_of(const fovea_placement_t *p, const fovea_placement_pattern_t *pattern, int64_t columns_max)
{
    const fovea_policy_t *in = &pattern->policy;
    drawn_t d = {.policy = {.kind = (int32_t)in->kind,
                            .window_tokens = (int32_t)in->window_tokens,
                            .sink_tokens = (int32_t)in->sink_tokens,
                            .block_tokens = (int32_t)in->s2.block_tokens,
                            .local_blocks = (int32_t)in->s2.local_blocks,
                            .vert_stride = (int32_t)in->s2.vert_stride,
                            .head_sliding_step = in->s2.head_sliding_step,
                            .head_sliding_offset = in->s2.head_sliding_offset,
                            .num_dense_heads = (int32_t)in->s2.num_dense_heads,
                            .homo_head = in->s2.homo_head ? 1 : 0,
                            .pattern_per = (int32_t)in->s2.pattern_per}};

    d.n_heads =
        (int32_t)((in->s2.pattern_per == FOVEA_PATTERN_Q_HEAD) ? p->n_q_heads : p->n_kv_heads);
    d.policy.n_heads = d.n_heads;
    d.n_heads = ((in->kind == FOVEA_POLICY_WINDOW) || in->s2.homo_head) ? 1 : d.n_heads;
    d.block = (in->kind == FOVEA_POLICY_S2) ? d.policy.block_tokens : FV_PAGE_TOKENS;
    d.position = (int64_t)pattern->n_tokens - 1;
    d.n_blocks = ((int64_t)pattern->n_tokens + d.block - 1) / d.block;
    d.per_column = (d.n_blocks + columns_max - 1) / columns_max;
    d.n_columns = (d.n_blocks + d.per_column - 1) / d.per_column;
    return d;
}

/* What the answer says is drawn only when it is a pattern: the service is not ours to trust with a division. */
static bool is_drawable(const fovea_placement_t *p, const fovea_placement_pattern_t *pattern)
{
    const fovea_s2_t *s2 = &pattern->policy.s2;

    if ((pattern->n_tokens == 0) || (pattern->n_tokens > ((uint64_t)1 << 40)) ||
        (p->n_kv_heads == 0) || (p->n_q_heads > FV_HEADS_MAX) || (p->n_kv_heads > FV_HEADS_MAX)) {
        return false;
    }
    return (pattern->policy.kind == FOVEA_POLICY_WINDOW) ||
           ((pattern->policy.kind == FOVEA_POLICY_S2) && (s2->block_tokens >= FV_S2_BLOCK_MIN) &&
            (s2->block_tokens <= FV_S2_BLOCK_MAX) && (s2->vert_stride >= 1) &&
            (s2->vert_stride <= FV_S2_STRIDE_MAX) && (s2->local_blocks <= FV_S2_LOCAL_MAX));
}

/* Does a query at the end of the context, of this head, read the block? */
static bool reads(const drawn_t *d, int32_t head, int64_t block)
{
    int64_t token = block * d->block;

    if (d->policy.kind == FV_POLICY_WINDOW) {
        return (token + d->block > d->position - d->policy.window_tokens + 1) ||
               (token < d->policy.sink_tokens);
    }
    return fv_policy_is_dense(&d->policy, head) ||
           (token >= fv_s2_local_begin(&d->policy, d->position)) ||
           (block % d->policy.vert_stride == fv_s2_residue(&d->policy, head));
}

/* The share of column `c`'s blocks that the head reads. */
static double column_share(const drawn_t *d, int32_t head, int64_t c)
{
    int64_t begin = c * d->per_column;
    int64_t end = (begin + d->per_column < d->n_blocks) ? (begin + d->per_column) : d->n_blocks;
    int64_t n = 0;

    for (int64_t b = begin; b < end; b++) {
        n += reads(d, head, b) ? 1 : 0;
    }
    return (double)n / (double)(end - begin);
}

static bool same_row(const drawn_t *d, int32_t a, int32_t b)
{
    bool dense_a = fv_policy_is_dense(&d->policy, a);
    bool dense_b = fv_policy_is_dense(&d->policy, b);

    return (dense_a && dense_b) ||
           ((dense_a == dense_b) && (fv_s2_residue(&d->policy, a) == fv_s2_residue(&d->policy, b)));
}

static void print_rows(const drawn_t *d)
{
    for (int32_t first = 0; first < d->n_heads;) {
        char heads[32];
        int32_t next = first + 1;

        while ((next < d->n_heads) && same_row(d, first, next)) {
            next++;
        }
        (void)snprintf(heads, sizeof(heads), (next > first + 1) ? "%d..%d" : "%d", first, next - 1);
        (void)printf("  %-9s |", (d->n_heads == 1) ? "all" : heads);
        for (int64_t c = 0; c < d->n_columns; c++) {
            double share = column_share(d, first, c);
            (void)putchar((share >= 1.0) ? '#' : ((share > 0.0) ? '+' : '.'));
        }
        (void)printf("|\n");
        first = next;
    }
}

static void print_title(const fovea_placement_pattern_t *pattern)
{
    const fovea_policy_t *p = &pattern->policy;

    if (p->kind == FOVEA_POLICY_WINDOW) {
        (void)printf("\nwindow of %u tokens, %u sinks", p->window_tokens, p->sink_tokens);
    } else {
        (void)printf(
            "\nS2: blocks of %u, %u local, every %u. (step %d, offset %d, %u dense heads%s)",
            p->s2.block_tokens, p->s2.local_blocks, p->s2.vert_stride, p->s2.head_sliding_step,
            p->s2.head_sliding_offset, p->s2.num_dense_heads,
            p->s2.homo_head ? ", all heads alike" : "");
    }
    (void)printf(", in %u layers:", p->n_layers);
    for (uint32_t i = 0; (i < p->n_layers) && (i < 16U); i++) {
        (void)printf(" %u", p->layers[i]);
    }
    (void)printf("%s\n", (p->n_layers > 16U) ? " ..." : "");
}

void fv_cli_print_patterns(const fovea_placement_t *placement)
{
    for (uint32_t i = 0; i < placement->n_patterns; i++) {
        const fovea_placement_pattern_t *pattern = &placement->patterns[i];
        char kept[FV_CLI_TEXT_BYTES];
        char freed[FV_CLI_TEXT_BYTES];
        uint64_t dense = pattern->kv_bytes + pattern->freed_bytes;

        print_title(pattern);
        (void)printf("  kept %s, freed %s: %.1f x less than dense; queries from token %" PRIu64
                     " on are possible\n",
                     fv_cli_bytes(pattern->kv_bytes, kept),
                     fv_cli_bytes(pattern->freed_bytes, freed),
                     (pattern->kv_bytes > 0) ? ((double)dense / (double)pattern->kv_bytes) : 1.0,
                     pattern->floor);
        if (is_drawable(placement, pattern)) {
            drawn_t d = drawn_of(placement, pattern, TEXT_COLUMNS);

            (void)printf("  %-9s |%" PRId64 " blocks of %" PRId64 " tokens%s\n",
                         (d.policy.pattern_per == FV_PATTERN_Q_HEAD) ? "Q heads" : "KV heads",
                         d.n_blocks, d.block,
                         (d.per_column > 1) ? "; # all of a column is read, + some, . none"
                                            : "; # is read, . is not");
            print_rows(&d);
        }
    }
}

/* ------------------------------------------------------------------ picture */

/* A row's runs of columns that are read alike become one rectangle each. */
static void draw_row(FILE *file, const drawn_t *d, int32_t head, double y)
{
    double width = PICTURE_WIDTH / (double)d->n_columns;
    int64_t begin = 0;

    for (int64_t c = 1; c <= d->n_columns; c++) {
        double share = column_share(d, head, begin);

        if ((c < d->n_columns) && (column_share(d, head, c) == share)) {
            continue;
        }
        if (share > 0.0) {
            (void)fprintf(file,
                          "<rect x=\"%.3f\" y=\"%.1f\" width=\"%.3f\" height=\"%d\" "
                          "fill=\"#1f5f8b\" fill-opacity=\"%.3f\"/>\n",
                          120.0 + (double)begin * width, y, (double)(c - begin) * width,
                          CELL_HEIGHT - 1, share);
        }
        begin = c;
    }
}

static double draw_pattern(FILE *file, const drawn_t *d, uint32_t n_layers, double y)
{
    (void)fprintf(file,
                  "<text x=\"0\" y=\"%.1f\">%s: %" PRId64 " blocks of %" PRId64
                  " tokens, %u layers; dark = read and kept</text>\n",
                  y + 12.0, (d->policy.kind == FV_POLICY_S2) ? "S2" : "window", d->n_blocks,
                  d->block, n_layers);
    y += 20.0;
    for (int32_t h = 0; h < d->n_heads; h++) {
        (void)fprintf(file, "<text x=\"0\" y=\"%.1f\">%s %d</text>\n", y + CELL_HEIGHT - 1.0,
                      (d->policy.pattern_per == FV_PATTERN_Q_HEAD) ? "Q head" : "KV head", h);
        (void)fprintf(file,
                      "<rect x=\"120\" y=\"%.1f\" width=\"%.0f\" height=\"%d\" fill=\"#eee\"/>\n",
                      y, PICTURE_WIDTH, CELL_HEIGHT - 1);
        draw_row(file, d, h, y);
        y += CELL_HEIGHT;
    }
    return y + CELL_HEIGHT;
}

bool fv_cli_draw_patterns(const fovea_placement_t *placement, const char *path)
{
    FILE *file = fopen(path, "w");
    double y = 0.0;
    double height = 0.0;

    if (file == NULL) {
        return false;
    }
    for (uint32_t i = 0; i < placement->n_patterns; i++) {
        if (is_drawable(placement, &placement->patterns[i])) {
            drawn_t d = drawn_of(placement, &placement->patterns[i], PICTURE_COLUMNS);
            height += 20.0 + CELL_HEIGHT * ((double)d.n_heads + 1.0);
        }
    }
    (void)fprintf(file,
                  "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%.0f\" "
                  "font-family=\"sans-serif\" font-size=\"10\">\n",
                  PICTURE_WIDTH + 120.0, height + 20.0);
    for (uint32_t i = 0; i < placement->n_patterns; i++) {
        const fovea_placement_pattern_t *pattern = &placement->patterns[i];

        if (is_drawable(placement, pattern)) {
            drawn_t d = drawn_of(placement, pattern, PICTURE_COLUMNS);
            y = draw_pattern(file, &d, pattern->policy.n_layers, y);
        }
    }
    (void)fprintf(file, "</svg>\n");
    return fclose(file) == 0;
}
