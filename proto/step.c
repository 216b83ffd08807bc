/*
 * step.c - an item's share of a rank, computed alike by coordinator and workers.
 */
#include "proto/step.h"

/* The query tokens of a part: all, or two blocks of the item, next to each other for the last part. */
static void set_spans(fv_item_share_t *s, uint64_t n_tokens)
{
    if (s->n_movers == 0) {
        s->n_spans = 1;
        s->spans[0] = (fv_token_span_t){.n = n_tokens};
        return;
    }
    const fv_token_span_t blocks[] = {
        fv_mover_block(n_tokens, s->n_movers, s->cp),
        fv_mover_block(n_tokens, s->n_movers, 2 * s->n_movers - 1 - s->cp)};

    for (int32_t i = 0; i < 2; i++) {
        fv_token_span_t *last = &s->spans[s->n_spans - ((s->n_spans > 0) ? 1 : 0)];

        if (blocks[i].n == 0U) {
            continue;
        }
        if ((s->n_spans > 0) && (last->begin + last->n == blocks[i].begin)) {
            last->n += blocks[i].n;
        } else {
            s->spans[s->n_spans++] = blocks[i];
        }
    }
}

bool fv_item_share(const fv_model_spec_t *spec,
                   const fv_placement_t *placement,
                   const fv_ctl_item_t *item,
                   uint32_t rank,
                   fv_item_share_t *out)
{
    int32_t cell = fv_placement_cell(placement, rank);
    int32_t n_parts = fv_placement_active_parts(placement, item->kv_end);
    size_t e = fv_dtype_bytes((fv_dtype_t)item->dtype);
    fv_item_share_t s = {0};

    if (n_parts == 0) { /* nothing to read: part 0 answers with the empty set */
        n_parts = 1;
    }
    if ((item->n_tokens == 0) || (cell < 0) || (cell % placement->n_ctx_parts >= n_parts)) {
        return false;
    }
    s.hp = cell / placement->n_ctx_parts;
    s.cp = cell % placement->n_ctx_parts;
    s.part = fv_placement_head_part(placement, spec, s.hp);
    s.n_q_heads = s.part.q_head_end - s.part.q_head_begin;
    s.n_parts = n_parts;
    if ((item->flags & FV_ITEM_APPEND) != 0) {
        s.n_kv_tokens = fv_placement_tokens(placement, s.cp, item->position + item->n_tokens) -
                        fv_placement_tokens(placement, s.cp, item->position);
    }
    size_t n_heads = (size_t)(s.part.head_end - s.part.head_begin);
    size_t dk = (size_t)s.part.head_dim_qk;
    size_t dv = (size_t)s.part.head_dim_v;
    uint64_t n_rows = (uint64_t)item->n_tokens * (uint64_t)s.n_q_heads;
    int32_t only = fv_item_only_slice(item);
    s.is_answered = (only == 0) || (only == s.part.slice + 1);
    bool is_read = s.is_answered || fv_model_adds_scores(spec); /* the others' scores need it */
    if (!is_read && ((item->flags & FV_ITEM_APPEND) == 0)) {
        return false;
    }
    s.n_rows = s.is_answered ? n_rows : 0U;
    s.row_begin = fv_rows_begin(s.n_rows, n_parts, s.cp);
    s.row_end = fv_rows_begin(s.n_rows, n_parts, s.cp + 1);
    uint64_t n_returned = s.row_end - s.row_begin;
    if (((item->flags & FV_ITEM_MOVES_KV) != 0) && (n_parts > 1) && s.is_answered) {
        s.n_movers = n_parts;
        s.n_parts = 1;
    }
    set_spans(&s, item->n_tokens);
    if (s.n_movers > 0) {
        n_rows = fv_share_tokens(&s) * (uint64_t)s.n_q_heads;
        n_returned = n_rows;
    }
    s.q_bytes = is_read ? (n_rows * dk * e) : 0U;
    s.k_bytes = s.n_kv_tokens * n_heads * dk * e;
    s.v_bytes = fv_model_is_latent(spec) ? 0U : (s.n_kv_tokens * n_heads * dv * e);
    s.out_bytes = n_returned * dv * e;
    if (((item->flags & FV_ITEM_WANT_LSE) != 0) && ((only != 0) || (s.part.slice == 0))) {
        s.lse_bytes = n_returned * sizeof(float); /* all slices have the same */
    }
    *out = s;
    return true;
}

bool fv_token_run_next(const fv_placement_t *placement,
                       int32_t cp,
                       const fv_ctl_item_t *item,
                       uint64_t *cursor,
                       fv_token_run_t *out)
{
    if ((item->flags & FV_ITEM_APPEND) == 0) {
        return false;
    }
    while (*cursor < item->n_tokens) {
        uint64_t token = item->position + *cursor;
        uint64_t to_block_end = placement->shard_tokens - (token % placement->shard_tokens);
        uint64_t left = item->n_tokens - *cursor;
        uint64_t n = (left < to_block_end) ? left : to_block_end;
        uint64_t begin = *cursor;

        *cursor += n;
        if (fv_placement_part_of(placement, token) == cp) {
            *out = (fv_token_run_t){.item_begin = begin,
                                    .local_begin = fv_placement_local(placement, token),
                                    .n_tokens = n};
            return true;
        }
    }
    return false;
}
