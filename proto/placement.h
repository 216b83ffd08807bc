/*
 * placement.h - which rank holds which part of a session's KV: the arithmetic both sides share.
 *
 * A placement is a grid: KV heads cut into n_head_parts ranges, the context dealt block-cyclically to
 * n_ctx_parts. Cell (hp, cp) lives on ranks[hp * n_ctx_parts + cp] and holds, for its heads, the tokens
 * whose block (token / shard_tokens) is congruent to cp modulo n_ctx_parts:
 *
 *     n_ctx_parts = 3:   token block   0  1  2  3  4  5  6 ...
 *                        context part  0  1  2  0  1  2  0 ...
 *
 * LATENT models have one latent for all heads: their head parts are ranges of query heads, and each holds the
 * latent again; sharded by latent (TPLA), of g slices, the first n_head_parts / g parts hold slice 0, and so on.
 *
 * 1 x 1 is a whole session on one rank, H x 1 head sharding (no exchange), 1 x C context sharding.
 * The coordinator decides a placement when a session opens; workers execute it. A short context simply
 * has not reached the later parts: they hold nothing and take no part in its steps.
 *
 * shard_tokens is a multiple of FV_PAGE_TOKENS, so a page never spans two parts; the pages of a part
 * are numbered 0, 1, 2... in ascending position ("local pages").
 */
#ifndef FV_PROTO_PLACEMENT_H
#define FV_PROTO_PLACEMENT_H

#include "common/model.h"

#define FV_PLACEMENT_RANKS_MAX 64

typedef struct fv_placement {
    uint16_t
        n_head_parts; /* >= 1, <= n_kv_heads; LATENT: <= groups * n_q_heads, a multiple of groups */
    uint16_t n_ctx_parts;  /* >= 1; n_head_parts * n_ctx_parts <= FV_PLACEMENT_RANKS_MAX */
    uint32_t shard_tokens; /* multiple of FV_PAGE_TOKENS */
    uint16_t ranks[FV_PLACEMENT_RANKS_MAX]; /* all distinct */
} fv_placement_t;

/* Cell of `rank`, or -1. */
static inline int32_t fv_placement_cell(const fv_placement_t *p, uint32_t rank)
{
    for (int32_t i = 0; i < p->n_head_parts * p->n_ctx_parts; i++) {
        if (p->ranks[i] == rank) {
            return i;
        }
    }
    return -1;
}

/* First KV head of head part hp; hp = n_head_parts gives n_kv_heads. Sizes differ by at most one. */
static inline int32_t
fv_placement_head_begin(const fv_placement_t *p, int32_t n_kv_heads, int32_t hp)
{
    return (int32_t)(((int64_t)n_kv_heads * hp) / p->n_head_parts);
}

/* What the ranks of one head part hold of a token. */
typedef struct fv_head_part {
    int32_t head_begin, head_end;     /* KV heads */
    int32_t q_head_begin, q_head_end; /* query heads, which these KV heads serve here */
    int32_t slice;                    /* LATENT: of the latent; else 0 */
    int32_t latent_begin;             /* LATENT: its first dim */
    int32_t head_dim_qk, head_dim_v;  /* of a row here: LATENT, the slice, and the whole RoPE key */
} fv_head_part_t;

static inline fv_head_part_t
fv_placement_head_part(const fv_placement_t *p, const fv_model_spec_t *spec, int32_t hp)
{
    int32_t n_per_slice = p->n_head_parts / fv_model_groups(spec);
    int32_t group = fv_model_group(spec);
    fv_head_part_t part = {.head_dim_qk = fv_model_stored_dim_qk(spec),
                           .head_dim_v = fv_model_stored_dim_v(spec)};

    if (fv_model_is_latent(spec)) {
        part.head_end = 1;
        part.slice = hp / n_per_slice;
        part.latent_begin = part.slice * part.head_dim_v;
        part.q_head_begin = (int32_t)((int64_t)spec->n_q_heads * (hp % n_per_slice) / n_per_slice);
        part.q_head_end =
            (int32_t)((int64_t)spec->n_q_heads * (hp % n_per_slice + 1) / n_per_slice);
        return part;
    }
    part.head_begin = fv_placement_head_begin(p, spec->n_kv_heads, hp);
    part.head_end = fv_placement_head_begin(p, spec->n_kv_heads, hp + 1);
    part.q_head_begin = part.head_begin * group;
    part.q_head_end = part.head_end * group;
    return part;
}

/* KV heads of head part hp, as pages count. */
static inline int32_t
fv_placement_n_heads(const fv_placement_t *p, const fv_model_spec_t *spec, int32_t hp)
{
    return fv_model_is_latent(spec) ? 1
                                    : (fv_placement_head_begin(p, spec->n_kv_heads, hp + 1) -
                                       fv_placement_head_begin(p, spec->n_kv_heads, hp));
}

/* Context part that owns `token`. */
static inline int32_t fv_placement_part_of(const fv_placement_t *p, uint64_t token)
{
    return (int32_t)((token / p->shard_tokens) % p->n_ctx_parts);
}

/* How many tokens of [0, n_tokens) part cp owns. */
static inline uint64_t fv_placement_tokens(const fv_placement_t *p, int32_t cp, uint64_t n_tokens)
{
    uint64_t turn = (uint64_t)p->shard_tokens * p->n_ctx_parts;
    uint64_t rest = n_tokens % turn;
    uint64_t begin = (uint64_t)cp * p->shard_tokens;
    uint64_t in_rest = (rest <= begin) ? 0 : (rest - begin);

    if (in_rest > p->shard_tokens) {
        in_rest = p->shard_tokens;
    }
    return (n_tokens / turn) * p->shard_tokens + in_rest;
}

/* Parts that own at least one token of [0, n_tokens): parts 0 .. result - 1. */
static inline int32_t fv_placement_active_parts(const fv_placement_t *p, uint64_t n_tokens)
{
    uint64_t blocks = fv_div_up(n_tokens, p->shard_tokens);

    return (blocks < p->n_ctx_parts) ? (int32_t)blocks : (int32_t)p->n_ctx_parts;
}

/* Pages that part cp needs for [0, n_tokens), per (layer, KV head). */
static inline uint64_t fv_placement_pages(const fv_placement_t *p, int32_t cp, uint64_t n_tokens)
{
    return fv_div_up(fv_placement_tokens(p, cp, n_tokens), FV_PAGE_TOKENS);
}

/* A token of part cp -> its index among the part's own tokens. */
static inline uint64_t fv_placement_local(const fv_placement_t *p, uint64_t token)
{
    uint64_t block = token / p->shard_tokens;

    return (block / p->n_ctx_parts) * p->shard_tokens + (token % p->shard_tokens);
}

/* The inverse: the part's `local`-th own token -> its position in the session. */
static inline uint64_t fv_placement_global(const fv_placement_t *p, int32_t cp, uint64_t local)
{
    uint64_t turn = local / p->shard_tokens;

    return (turn * p->n_ctx_parts + (uint64_t)cp) * p->shard_tokens + (local % p->shard_tokens);
}

#endif /* FV_PROTO_PLACEMENT_H */
