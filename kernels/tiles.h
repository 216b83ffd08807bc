/*
 * tiles.h - the one iterator over the KV tiles that a group of query rows reads.
 *
 * A tile is one page: FV_PAGE_TOKENS tokens of one (session, layer, KV head), in this rank's own
 * numbering ("local"). The list of tiles is closed form: an index into it costs O(1), so that stream-K
 * (kernels.h) can cut the line of all tiles anywhere. New policies (block lists) join here and nowhere else: every
 * kernel, CPU or CUDA, and every load balance goes through fv_tiles_make() and fv_tile_at().
 *
 * Which token a row sees (row at position p, token j, n = kv_end):
 *     j < n,  and (not causal or j <= p),  and
 *     DENSE:  nothing more
 *     WINDOW: |p - j| < window_tokens  or  j < sink_tokens
 *     S2:     p's block - j's block < local_blocks,  or  j's block is strided for the row's head (common/policy.h)
 *
 * S2's blocks and tiles. A tile stays a page whatever the block: of 128 and 256 tokens a block is 2 or 4 tiles, of 16 and
 * 32 it is a part of one. The list is the strided pages before the local blocks, by number, then every page from there on.
 * Smaller blocks leave tokens of a strided page unseen: fv_tile_t.strided names the quarters that are, for the mask. A page is
 * freed when no head can read any of it (fv_policy_keeps()); no list names it then.
 *
 * All rows of a query have one pattern. Where the query heads of a KV head differ (pattern_per Q_HEAD) each is a
 * query of its own: their strided blocks are disjoint, so a common walk would load nothing less and compute more.
 *
 * A context shard keeps its own part of each list. In general which strided page comes i-th there is found by bisection
 * over the turns; directly where the context is not split, or every turn has the same pattern (the planner sees to it).
 */
#ifndef FV_KERNELS_TILES_H
#define FV_KERNELS_TILES_H

#include "common/policy.h"

#include <stdbool.h>
#include <stdint.h>

/* This rank's part of the context: block b of shard_tokens tokens is here iff b % n_parts == part. */
typedef struct fv_kv_shard {
    uint32_t shard_tokens; /* multiple of FV_PAGE_TOKENS */
    uint16_t n_parts;
    uint16_t part;
} fv_kv_shard_t;

/* The query rows that share a walk: positions [q_begin, q_end), rows of one KV head, with one pattern. */
typedef struct fv_tile_query {
    fv_policy_t policy;
    fv_kv_shard_t shard;
    int64_t q_begin, q_end;
    int64_t kv_end; /* tokens [0, kv_end) exist in the session */
    int32_t head;   /* S2: the pattern's (fv_policy_head()) */
    bool causal;    /* S2: true */
} fv_tile_query_t;

/* Tiles in ascending position: local pages (S2: strided pages) [a_begin, a_end), then local pages [b_begin, b_end). */
typedef struct fv_tile_list {
    int32_t a_begin, a_end;
    int32_t b_begin, b_end;
} fv_tile_list_t;

typedef struct fv_tile {
    int32_t local_page;
    int32_t n_tokens; /* that exist: FV_PAGE_TOKENS but for the last page */
    int64_t begin;    /* position of its first token in the session */
    bool full;        /* every row of the query sees every one of the n_tokens */
    uint8_t
        strided; /* S2: quarters that the rows see before their local blocks too, bit i tokens [16 i, 16 i + 16) */
} fv_tile_t;

/*
 * Visible tokens of a row at position p: [0, sink) and [begin, end); begin >= sink, all <= kv_end. S2: and of [0, begin)
 * the strided blocks.
 */
typedef struct fv_row_range {
    int64_t sink, begin, end;
} fv_row_range_t;

static inline FV_HD int64_t fv_min64(int64_t a, int64_t b)
{
    return (a < b) ? a : b;
}

static inline FV_HD int64_t fv_max64(int64_t a, int64_t b)
{
    return (a > b) ? a : b;
}

static inline FV_HD fv_row_range_t fv_row_range(const fv_tile_query_t *q, int64_t p)
{
    fv_row_range_t r;

    r.sink = 0;
    r.begin = 0;
    r.end = q->causal ? fv_min64(p + 1, q->kv_end) : q->kv_end;
    if (q->policy.kind == FV_POLICY_WINDOW) {
        if (!q->causal) {
            r.end = fv_min64(r.end, p + q->policy.window_tokens);
        }
        /* a query past kv_end may see nothing: the empty range must not reach beyond kv_end */
        r.begin = fv_min64(fv_max64(0, p - q->policy.window_tokens + 1), q->kv_end);
        /* sinks obey kv_end and causality like every token */
        r.sink =
            fv_min64(q->policy.sink_tokens, q->causal ? fv_min64(p + 1, q->kv_end) : q->kv_end);
        if (r.begin <= r.sink) { /* the two touch: one range */
            r.end = fv_max64(r.end, r.sink);
            r.begin = 0;
            r.sink = 0;
        }
    }
    if ((q->policy.kind == FV_POLICY_S2) && !fv_policy_is_dense(&q->policy, q->head)) {
        r.begin = fv_min64(fv_s2_local_begin(&q->policy, p), q->kv_end);
    }
    return r; /* begin <= end: both ends are clamped to kv_end, and window_tokens >= 1 */
}

/* Pages of this part that hold a token of [0, token): the first pages of the part. */
static inline FV_HD int64_t fv_shard_pages(const fv_kv_shard_t *s, int64_t token)
{
    int64_t turn = (int64_t)s->shard_tokens * s->n_parts;
    int64_t rest = token % turn - (int64_t)s->part * s->shard_tokens;

    rest = fv_max64(0, fv_min64(rest, (int64_t)s->shard_tokens));
    return ((token / turn) * s->shard_tokens + rest + FV_PAGE_TOKENS - 1) / FV_PAGE_TOKENS;
}

/* Local pages wholly before `token`: index of the first local page that could hold it or a later one. */
static inline FV_HD int64_t fv_shard_pages_before(const fv_kv_shard_t *s, int64_t token)
{
    int64_t aligned = (token / FV_PAGE_TOKENS) * FV_PAGE_TOKENS;

    return fv_shard_pages(s, aligned);
}

/* Position in the session of the first token of a local page. */
static inline FV_HD int64_t fv_shard_page_position(const fv_kv_shard_t *s, int64_t local_page)
{
    int64_t local = local_page * FV_PAGE_TOKENS;
    int64_t turn = 0;

    if (s->n_parts == 1) { /* a device has no fast division */
        return local;
    }
    turn = local / s->shard_tokens;
    return (turn * s->n_parts + s->part) * (int64_t)s->shard_tokens + local % s->shard_tokens;
}

/* ------------------------------------------------------------------ strided pages of a part */

/* Sum over i < n of (a i + b) / m, rounded down each; Euclid's way, O(log m). */
static inline FV_HD int64_t fv_floor_sum(int64_t n, int64_t m, int64_t a, int64_t b)
{
    int64_t sum = 0;

    for (;;) {
        int64_t top = 0;
        int64_t old_m = m;

        sum += (n * (n - 1) / 2) * (a / m) + n * (b / m);
        top = (a % m) * n + b % m;
        if (top < m) {
            return sum;
        }
        n = top / m;
        b = top % m;
        m = a % m;
        a = old_m;
    }
}

static inline FV_HD int64_t fv_shard_units(const fv_kv_shard_t *shard, const fv_strides_t *s)
{
    return (int64_t)(shard->shard_tokens / FV_PAGE_TOKENS) * s->per_page;
}

/* Strided units in the part's first n turns. */
static inline FV_HD int64_t fv_strides_in_turns(const fv_strides_t *s,
                                                const fv_kv_shard_t *shard,
                                                int64_t n)
{
    int64_t u = fv_shard_units(shard, s);
    int64_t begin = u * shard->part;
    int64_t sum = 0;

    if ((u * shard->n_parts) % s->period == 0) {
        return n * (fv_strides_count(s, begin + u) - fv_strides_count(s, begin));
    }
    for (int32_t j = 0; j < s->width; j++) {
        int64_t shift = s->period - 1 - s->first - j;

        sum += fv_floor_sum(n, s->period, u * shard->n_parts, begin + u + shift) -
               fv_floor_sum(n, s->period, u * shard->n_parts, begin + shift);
    }
    return sum;
}

/* Strided pages among the part's first n pages. Pages that strides do not all reach (fv_strides_fill_pages()). */
static inline FV_HD int64_t fv_strides_pages(const fv_strides_t *s,
                                             const fv_kv_shard_t *shard,
                                             int64_t n)
{
    int64_t units = n * s->per_page;
    int64_t u = fv_shard_units(shard, s);
    int64_t turn = 0;
    int64_t begin = 0;

    if (shard->n_parts == 1) {
        return fv_strides_count(s, units);
    }
    turn = units / u;
    begin = (turn * shard->n_parts + shard->part) * u;
    return fv_strides_in_turns(s, shard, turn) + fv_strides_count(s, begin + units % u) -
           fv_strides_count(s, begin);
}

/* The part's i-th strided page; there are more than i. */
static inline FV_HD int64_t fv_strides_page(const fv_strides_t *s,
                                            const fv_kv_shard_t *shard,
                                            int64_t i)
{
    int64_t u = fv_shard_units(shard, s);
    int64_t turn = 0;
    int64_t begin = 0;

    if (shard->n_parts == 1) {
        return ((s->width == 1) && (s->per_page == 1)) ? (i * s->period + s->first)
                                                       : (fv_strides_unit(s, i) / s->per_page);
    }
    if ((u * shard->n_parts) % s->period == 0) {
        turn = i / fv_strides_in_turns(s, shard, 1);
    } else {
        int64_t high = 1;

        while (fv_strides_in_turns(s, shard, high) <= i) {
            high *= 2;
        }
        while (high - turn > 1) { /* the last turn that begins with no more than i behind it */
            int64_t middle = turn + (high - turn) / 2;

            if (fv_strides_in_turns(s, shard, middle) <= i) {
                turn = middle;
            } else {
                high = middle;
            }
        }
    }
    begin = (turn * shard->n_parts + shard->part) * u;
    i += fv_strides_count(s, begin) - fv_strides_in_turns(s, shard, turn);
    return (turn * u + fv_strides_unit(s, i) - begin) / s->per_page;
}

/* ------------------------------------------------------------------ the list */

/* S2: the strided pages before the local blocks of the first row, then all. */
static inline FV_HD fv_tile_list_t fv_tiles_make_s2(const fv_tile_query_t *q)
{
    fv_tile_list_t list = {0, 0, 0, 0};
    fv_strides_t strides = fv_s2_strides(&q->policy, q->head);
    int64_t begin = fv_row_range(q, q->q_begin).begin;
    int64_t end = fv_row_range(q, q->q_end - 1).end;
    int64_t n_pages = fv_shard_pages(&q->shard, end);
    /* queries past kv_end may have no local block left */
    int64_t n_before = (end > begin) ? fv_shard_pages_before(&q->shard, begin) : n_pages;

    list.b_end = (int32_t)n_pages;
    if (!fv_policy_is_dense(&q->policy, q->head) && !fv_strides_fill_pages(&strides)) {
        list.a_end = (int32_t)fv_strides_pages(&strides, &q->shard, n_before);
        list.b_begin = (int32_t)n_before;
    }
    return list;
}

/* The tiles that at least one row of `q` reads. */
static inline FV_HD fv_tile_list_t fv_tiles_make(const fv_tile_query_t *q)
{
    fv_tile_list_t list;
    fv_row_range_t first = fv_row_range(q, q->q_begin);  /* reaches furthest back */
    fv_row_range_t last = fv_row_range(q, q->q_end - 1); /* reaches furthest ahead, widest sinks */
    int64_t sink = fv_max64(first.sink, last.sink);
    int64_t begin = fv_min64(first.begin, last.begin);
    int64_t end = fv_max64(first.end, last.end);

    if (q->policy.kind == FV_POLICY_S2) {
        return fv_tiles_make_s2(q);
    }
    list.a_begin = 0;
    list.a_end = 0;
    if (begin > 0) {
        list.a_end = (int32_t)fv_shard_pages(&q->shard, sink);
    }
    list.b_begin = (int32_t)fv_max64(list.a_end, fv_shard_pages_before(&q->shard, begin));
    list.b_end =
        (int32_t)fv_max64(list.b_begin, (end > begin) ? fv_shard_pages(&q->shard, end) : 0);
    return list;
}

static inline FV_HD int32_t fv_tiles_count(const fv_tile_list_t *list)
{
    return (list->a_end - list->a_begin) + (list->b_end - list->b_begin);
}

/* Tile i of the list, 0 <= i < fv_tiles_count(). */
static inline FV_HD fv_tile_t fv_tile_at(const fv_tile_query_t *q,
                                         const fv_tile_list_t *list,
                                         int32_t i)
{
    int32_t n_a = list->a_end - list->a_begin;
    fv_tile_t tile;
    fv_row_range_t first = fv_row_range(q, q->q_begin);
    fv_row_range_t last = fv_row_range(q, q->q_end - 1);
    int64_t end;

    tile.local_page = (i < n_a) ? (list->a_begin + i) : (list->b_begin + (i - n_a));
    if ((q->policy.kind == FV_POLICY_S2) && (i < n_a)) {
        fv_strides_t strides = fv_s2_strides(&q->policy, q->head);

        tile.local_page = (int32_t)fv_strides_page(&strides, &q->shard, i);
    }
    tile.begin = fv_shard_page_position(&q->shard, tile.local_page);
    tile.n_tokens = (int32_t)fv_min64(FV_PAGE_TOKENS, q->kv_end - tile.begin);
    end = tile.begin + tile.n_tokens;
    /* `first` has the smallest end, `last` the largest begin; sinks grow with p */
    tile.full = ((tile.begin >= last.begin) && (tile.begin >= first.begin) && (end <= first.end)) ||
                ((end <= first.sink) && (end <= last.sink));
    tile.strided = 0;
    if ((q->policy.kind == FV_POLICY_S2) && (tile.begin < last.begin)) {
        tile.strided =
            ((i < n_a) && (q->policy.block_tokens >= FV_PAGE_TOKENS))
                ? (uint8_t)FV_S2_QUARTERS_ALL
                : (uint8_t)fv_s2_quarters(&q->policy, q->head, tile.begin / FV_PAGE_TOKENS);
        tile.full = tile.full || ((tile.strided == FV_S2_QUARTERS_ALL) && (end <= first.end));
    }
    return tile;
}

#endif /* FV_KERNELS_TILES_H */
