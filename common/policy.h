/*
 * policy.h - which tokens of the context a head may read: the arithmetic of Window and S2, for all who need it.
 *
 * S2-Attention (arXiv:2407.17678), as its reference implementation defines it and not as its figure draws it. Tokens are
 * cut into blocks of bs = block_tokens. A query at position p is in block t = p / bs, and its head h reads block b iff
 *
 *     b <= t  and  (t - b < local_blocks  or  (b + h * head_sliding_step + head_sliding_offset) mod vert_stride == 0
 *                   or  h >= n_heads - num_dense_heads)
 *
 * and of its own block the tokens up to p. h is the model's number of the KV head (pattern_per KV_HEAD) or of the query head
 * (Q_HEAD), wherever that head's KV lies, and 0 for all with homo_head. S2 is causal by definition.
 *
 * So a head reads its local blocks, and a strided rest that is the same for every later query: a block that has left
 * the local blocks of the oldest query that can still come, and is strided for none of its KV head's query heads, is never
 * read again. Memory is given back by the page (P tokens): a page when all its blocks are dead. Of blocks of 16 or 32
 * tokens a page holds several, so one strided block keeps its whole page; blocks of 128 or 256 are whole pages.
 *
 * "The oldest query that can still come" is the floor of a layer: the position of its last append. That append may be
 * repeated (a lost answer) or cut back (rejected draft tokens), and so may everything after it; nothing before it. What is
 * freed is therefore a pure function of (policy, floor), which coordinator and workers compute alike (proto/reduce.h).
 */
#ifndef FV_COMMON_POLICY_H
#define FV_COMMON_POLICY_H

#include "common/model.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __CUDACC__
#    define FV_HD __host__ __device__
#else
#    define FV_HD
#endif

#define FV_S2_BLOCK_MIN    16
#define FV_S2_BLOCK_MAX    256
#define FV_S2_LOCAL_MAX    (1 << 24) /* blocks */
#define FV_S2_STRIDE_MAX   (1 << 16) /* blocks */
#define FV_S2_SLIDING_MAX  (1 << 20) /* either sign */
#define FV_S2_QUARTERS     (FV_PAGE_TOKENS / FV_S2_BLOCK_MIN)
#define FV_S2_QUARTERS_ALL ((1U << FV_S2_QUARTERS) - 1U)

/*
 * The strided blocks of one head, in units that never span pages: unit u is strided iff u mod period is in
 * [first, first + width). A unit is a page (blocks of 64 and more) or a block (smaller ones).
 */
typedef struct fv_strides {
    int64_t period, first;
    int32_t width;    /* > 1: a block is several units; then per_page is 1 */
    int32_t per_page; /* units of a page: 4, 2 or 1 */
} fv_strides_t;

/* The pattern's number of query head `g` of KV head `kv_head` (global). */
static inline FV_HD int32_t fv_policy_head(const fv_policy_t *p,
                                           int32_t kv_head,
                                           int32_t group,
                                           int32_t g)
{
    if (p->homo_head != 0) {
        return 0;
    }
    return (p->pattern_per == FV_PATTERN_Q_HEAD) ? (kv_head * group + g) : kv_head;
}

/* True when the query heads of one KV head may read different blocks. */
static inline FV_HD bool fv_policy_splits_group(const fv_policy_t *p)
{
    return (p->kind == FV_POLICY_S2) && (p->pattern_per == FV_PATTERN_Q_HEAD) &&
           (p->homo_head == 0);
}

static inline FV_HD bool fv_policy_is_dense(const fv_policy_t *p, int32_t head)
{
    return (p->kind == FV_POLICY_DENSE) ||
           ((p->kind == FV_POLICY_S2) &&
            ((p->vert_stride == 1) || (head >= p->n_heads - p->num_dense_heads)));
}

/* b mod vert_stride of the blocks that `head` reads wherever they are. */
static inline FV_HD int32_t fv_s2_residue(const fv_policy_t *p, int32_t head)
{
    int64_t shift = (int64_t)head * p->head_sliding_step + p->head_sliding_offset;
    int64_t residue = (-shift) % p->vert_stride;

    return (int32_t)((residue < 0) ? (residue + p->vert_stride) : residue);
}

static inline FV_HD fv_strides_t fv_s2_strides(const fv_policy_t *p, int32_t head)
{
    int32_t residue = fv_s2_residue(p, head);
    fv_strides_t s;

    s.width = (p->block_tokens > FV_PAGE_TOKENS) ? (p->block_tokens / FV_PAGE_TOKENS) : 1;
    s.per_page = (p->block_tokens < FV_PAGE_TOKENS) ? (FV_PAGE_TOKENS / p->block_tokens) : 1;
    s.period = (int64_t)p->vert_stride * s.width;
    s.first = (int64_t)residue * s.width;
    return s;
}

/* Strided units of [0, n). */
static inline FV_HD int64_t fv_strides_count(const fv_strides_t *s, int64_t n)
{
    int64_t rest = n % s->period - s->first;

    rest = (rest < 0) ? 0 : ((rest > s->width) ? s->width : rest);
    return (n / s->period) * s->width + rest;
}

/* The i-th strided unit. */
static inline FV_HD int64_t fv_strides_unit(const fv_strides_t *s, int64_t i)
{
    return (i / s->width) * s->period + s->first + i % s->width;
}

/* True when the strides leave no page out, so that they need no list. */
static inline FV_HD bool fv_strides_fill_pages(const fv_strides_t *s)
{
    return s->period <= s->per_page;
}

/* First token of the local blocks of a query at `position`: it reads everything from there on. */
static inline FV_HD int64_t fv_s2_local_begin(const fv_policy_t *p, int64_t position)
{
    int64_t block = position / p->block_tokens - p->local_blocks + 1;

    return (block > 0) ? (block * p->block_tokens) : 0;
}

/* Which quarters (16 tokens) of a page are strided for `head`: bit i is tokens [16 i, 16 i + 16). */
static inline FV_HD uint32_t fv_s2_quarters(const fv_policy_t *p, int32_t head, int64_t page)
{
    int64_t token = page * FV_PAGE_TOKENS;
    int32_t residue = fv_s2_residue(p, head);
    uint32_t quarters = 0;

    if (p->block_tokens >= FV_PAGE_TOKENS) {
        return (token / p->block_tokens % p->vert_stride == residue) ? FV_S2_QUARTERS_ALL : 0U;
    }
    for (int32_t i = 0; i < FV_S2_QUARTERS; i++) {
        int64_t block = (token + (int64_t)i * FV_S2_BLOCK_MIN) / p->block_tokens;

        quarters |= (block % p->vert_stride == residue) ? (1U << i) : 0U;
    }
    return quarters;
}

/* Pages [0, result) are not local to any query at `floor` or later: they live only if fv_policy_keeps(). */
static inline FV_HD int64_t fv_policy_dead_pages(const fv_policy_t *p, int64_t floor)
{
    int64_t token = 0;

    if (p->kind == FV_POLICY_WINDOW) {
        token = floor - p->window_tokens + 1;
    } else if (p->kind == FV_POLICY_S2) {
        token = fv_s2_local_begin(p, floor);
    }
    return (token > 0) ? (token / FV_PAGE_TOKENS) : 0;
}

/* True when some query head of the KV head reads a token of `page` from however far. */
static inline bool
fv_policy_keeps(const fv_policy_t *p, int32_t kv_head, int32_t group, int64_t page)
{
    int32_t n = fv_policy_splits_group(p) ? group : 1;

    if (p->kind == FV_POLICY_WINDOW) {
        return page * FV_PAGE_TOKENS < p->sink_tokens;
    }
    for (int32_t g = 0; g < n; g++) {
        int32_t head = fv_policy_head(p, kv_head, group, g);

        if (fv_policy_is_dense(p, head) || (fv_s2_quarters(p, head, page) != 0U)) {
            return true;
        }
    }
    return false;
}

/*
 * True when nothing is missing for rows at `position` and later, which see tokens before `end`, after a layer's
 * floor has been `floor`.
 */
bool fv_policy_is_readable(const fv_policy_t *p,
                           int32_t n_kv_heads,
                           int32_t group,
                           int64_t floor,
                           int64_t position,
                           int64_t end);

/*
 * A named S2 pattern into *out. "phi3-small" is that model's (in its even layers; the odd ones are dense); "s2-N", N 4, 8,
 * 16, 32 or 64: blocks of 64, 8 local blocks, stride N, a pattern for each KV head. False when there is none of the name.
 */
bool fv_policy_preset(const char *name, fv_policy_t *out);
extern const char fv_policy_preset_names[]; /* all of them, for messages */

/* How many of vert_stride's residues at least one head reads, over all heads. S2 only. */
int32_t fv_s2_coverage(const fv_policy_t *p);

#endif /* FV_COMMON_POLICY_H */
