/*
 * tiles.h - the one iterator over the KV tiles that a group of query rows reads.
 *
 * A tile is one page: FV_PAGE_TOKENS tokens of one (session, layer, KV head), in this rank's own
 * numbering ("local"). The list of tiles is closed form: an index into it costs O(1), so that stream-K
 * (kernels.h) can cut the line of all tiles anywhere. New policies (S2's strided blocks, block lists) join here
 * and nowhere else: every kernel, CPU or CUDA, and every load balance goes through fv_tiles_make() and fv_tile_at().
 *
 * Which token a row sees (row at position p, token j, n = kv_end):
 *     j < n,  and (not causal or j <= p),  and
 *     DENSE:  nothing more
 *     WINDOW: |p - j| < window_tokens  or  j < sink_tokens
 */
#ifndef FV_KERNELS_TILES_H
#define FV_KERNELS_TILES_H

#include "common/model.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __CUDACC__
#    define FV_HD __host__ __device__
#else
#    define FV_HD
#endif

/* This rank's part of the context: block b of shard_tokens tokens is here iff b % n_parts == part. */
typedef struct fv_kv_shard {
    uint32_t shard_tokens; /* multiple of FV_PAGE_TOKENS */
    uint16_t n_parts;
    uint16_t part;
} fv_kv_shard_t;

/* The query rows that share a walk: positions [q_begin, q_end), all rows of one KV head. */
typedef struct fv_tile_query {
    fv_policy_t policy;
    fv_kv_shard_t shard;
    int64_t q_begin, q_end;
    int64_t kv_end; /* tokens [0, kv_end) exist in the session */
    bool causal;
} fv_tile_query_t;

/* Tiles in ascending position: local pages [a_begin, a_end), then [b_begin, b_end). */
typedef struct fv_tile_list {
    int32_t a_begin, a_end;
    int32_t b_begin, b_end;
} fv_tile_list_t;

typedef struct fv_tile {
    int32_t local_page;
    int32_t n_tokens; /* that exist: FV_PAGE_TOKENS but for the last page */
    int64_t begin;    /* position of its first token in the session */
    bool full;        /* every row of the query sees every one of the n_tokens */
} fv_tile_t;

/* Visible tokens of a row at position p: [0, sink) and [begin, end); begin >= sink, all <= kv_end. */
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
    int64_t turn = local / s->shard_tokens;

    return (turn * s->n_parts + s->part) * (int64_t)s->shard_tokens + local % s->shard_tokens;
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
    tile.begin = fv_shard_page_position(&q->shard, tile.local_page);
    tile.n_tokens = (int32_t)fv_min64(FV_PAGE_TOKENS, q->kv_end - tile.begin);
    end = tile.begin + tile.n_tokens;
    /* `first` has the smallest end, `last` the largest begin; sinks grow with p */
    tile.full = ((tile.begin >= last.begin) && (tile.begin >= first.begin) && (end <= first.end)) ||
                ((end <= first.sink) && (end <= last.sink));
    return tile;
}

#endif /* FV_KERNELS_TILES_H */
