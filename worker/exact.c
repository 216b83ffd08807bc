/*
 * exact.c - scores of the slices of latents, added up between their ranks.
 *
 * Decode path: station 7 of 10. Before: worker/step.c. After: worker/partials.c.
 */
#include "worker/exact.h"

#include "common/clock.h"

#include <string.h>

#define ROUND_BYTES ((uint64_t)512 << 10) /* of one item's scores in a round; a row at least */

bool fv_exact_is_served(const fv_worker_t *worker)
{
    return (worker->config.backend->scores != NULL) &&
           ((worker->config.exchange == NULL) || (worker->config.exchange->begin == NULL));
}

void fv_exact_free(fv_exact_work_t *work)
{
    fv_array_free(&work->items);
    fv_array_free(&work->blocks);
    fv_array_free(&work->attends);
    fv_array_free(&work->dsts);
    fv_array_free(&work->peers);
    fv_array_free(&work->messages);
}

void fv_exact_begin(fv_worker_t *worker)
{
    worker->work.exact.n_items = 0;
    worker->work.exact.exchange_us = 0;
}

fv_status_t
fv_exact_add(fv_worker_t *worker, const fv_step_item_t *item, const fv_attn_item_t *attend)
{
    fv_exact_work_t *x = &worker->work.exact;
    uint64_t row_bytes =
        (uint64_t)fv_max64(1, fv_shard_pages(&attend->shard, attend->kv_end)) * FV_PAGE_TOKENS * 4U;
    uint64_t n_rows = fv_div_up(ROUND_BYTES, row_bytes);
    uint64_t n_heads = (uint64_t)attend->group;

    FV_RETURN_IF_ERR(fv_array_reserve(&x->items, x->n_items + 1U, sizeof(fv_exact_item_t)));
    fv_exact_item_t *e = (fv_exact_item_t *)x->items.data + x->n_items++;
    *e = (fv_exact_item_t){.item = item, .attend = *attend};
    e->attend.without_rope = item->share.part.slice > 0;
    if (n_rows >= n_heads) { /* whole tokens */
        e->n_block_tokens = (int32_t)fv_min64((int64_t)(n_rows / n_heads), attend->n_tokens);
        e->n_block_heads = attend->group;
        e->n_blocks = fv_div_up((uint64_t)attend->n_tokens, (uint64_t)e->n_block_tokens);
    } else { /* some heads of one */
        e->n_block_tokens = 1;
        e->n_block_heads = (int32_t)n_rows;
        e->n_blocks = (uint64_t)attend->n_tokens * fv_div_up(n_heads, n_rows);
    }
    return FV_OK;
}

/* ------------------------------------------------------------------ blocks */

/* Those of the item's places of partial states that rows [begin, end) go to, as rows of their own. */
static int32_t
clip_dsts(const fv_attn_item_t *whole, uint64_t begin, uint64_t end, fv_partial_dst_t *out)
{
    int32_t n = 0;

    for (int32_t i = 0; i < whole->n_dst; i++) {
        const fv_partial_dst_t *d = &whole->dst[i];
        uint64_t d_end = (i + 1 < whole->n_dst) ? whole->dst[i + 1].row_begin : UINT64_MAX;
        uint64_t first = (d->row_begin > begin) ? d->row_begin : begin;

        if ((first < end) && (first < d_end)) {
            size_t skipped = (size_t)(first - d->row_begin);

            out[n++] = (fv_partial_dst_t){.row_begin = first - begin,
                                          .o = d->o + skipped * (size_t)whole->head_dim_v,
                                          .lse_log2 = d->lse_log2 + skipped};
        }
    }
    return n;
}

/* Block i of an item as an item of its own; its rows are consecutive ones of the whole. */
static fv_attn_item_t cut_block(const fv_exact_item_t *x, uint64_t i, fv_partial_dst_t *dsts)
{
    const fv_attn_item_t *whole = &x->attend;
    fv_attn_item_t a = *whole;
    size_t e = fv_dtype_bytes((fv_dtype_t)a.io_dtype);
    uint64_t n_per_token = fv_div_up((uint64_t)whole->group, (uint64_t)x->n_block_heads);
    int32_t t = (int32_t)(i / n_per_token) * x->n_block_tokens;
    int32_t h = (int32_t)(i % n_per_token) * x->n_block_heads;
    size_t q_head = (a.q_head_bytes != 0U) ? a.q_head_bytes : ((size_t)a.head_dim_qk * e);
    size_t out_head = (a.out_head_bytes != 0U) ? a.out_head_bytes : ((size_t)a.head_dim_v * e);

    a.n_tokens = (int32_t)fv_min64(x->n_block_tokens, whole->n_tokens - t);
    a.group = (int32_t)fv_min64(x->n_block_heads, whole->group - h);
    a.position += t;
    a.q = (const uint8_t *)a.q + (size_t)t * a.q_token_bytes + (size_t)h * q_head;
    if (whole->n_dst > 0) {
        uint64_t row = (uint64_t)t * (uint64_t)whole->group + (uint64_t)h;

        a.dst = dsts;
        a.n_dst = clip_dsts(whole, row, row + (uint64_t)a.n_tokens * (uint64_t)a.group, dsts);
        return a;
    }
    a.out = (uint8_t *)a.out + (size_t)t * a.out_token_bytes + (size_t)h * out_head;
    a.lse = (a.lse == NULL) ? NULL : (a.lse + (size_t)t * a.lse_token_stride + (size_t)h);
    return a;
}

/* The round's blocks, and how many scores they have. */
static fv_status_t cut_round(fv_worker_t *worker, uint64_t round, uint64_t *out_n_scores)
{
    fv_exact_work_t *x = &worker->work.exact;
    const fv_exact_item_t *items = x->items.data;
    size_t n_dsts = 0;

    FV_RETURN_IF_ERR(fv_array_reserve(&x->blocks, x->n_items, sizeof(fv_exact_block_t)));
    for (size_t i = 0; i < x->n_items; i++) {
        n_dsts += (size_t)items[i].attend.n_dst;
    }
    FV_RETURN_IF_ERR(fv_array_reserve(&x->dsts, n_dsts, sizeof(fv_partial_dst_t)));
    fv_partial_dst_t *dsts = x->dsts.data;
    fv_exact_block_t *blocks = x->blocks.data;
    x->n_blocks = 0;
    *out_n_scores = 0;
    for (size_t i = 0; i < x->n_items; i++) {
        if (round >= items[i].n_blocks) {
            continue;
        }
        fv_exact_block_t *b = &blocks[x->n_blocks++];
        *b = (fv_exact_block_t){.item = items[i].item, .attend = cut_block(&items[i], round, dsts)};
        b->n_scores = worker->config.backend->score_count(&b->attend);
        dsts += items[i].attend.n_dst;
        *out_n_scores += b->n_scores;
    }
    return FV_OK;
}

/* ------------------------------------------------------------------ who gets what */

static int32_t n_slices(const fv_exact_block_t *b)
{
    return fv_model_groups(&b->item->session->model->spec);
}

/* The rank that holds slice s of the block's tokens for its query heads. */
static uint32_t rank_of(const fv_exact_block_t *b, int32_t s)
{
    const fv_placement_t *p = &b->item->session->placement;
    const fv_item_share_t *share = &b->item->share;
    int32_t n_per_slice = p->n_head_parts / n_slices(b);

    return p->ranks[(s * n_per_slice + share->hp % n_per_slice) * p->n_ctx_parts + share->cp];
}

/* The part of the block's scores that slice s's rank adds up. */
static float *part_of(const fv_exact_block_t *b, int32_t s, size_t *out_bytes)
{
    uint64_t begin = fv_rows_begin(b->n_scores, n_slices(b), s);
    uint64_t end = fv_rows_begin(b->n_scores, n_slices(b), s + 1);

    *out_bytes = (size_t)(end - begin) * sizeof(float);
    return b->attend.scores + begin;
}

/* Own scores, and a buffer to and one from each peer: the other's part of them, and the own part of theirs. */
static fv_status_t lay_out(fv_worker_t *worker, uint64_t n_scores)
{
    fv_exact_work_t *x = &worker->work.exact;
    fv_exact_block_t *blocks = x->blocks.data;
    uint32_t n_ranks = worker->config.n_ranks;
    size_t n_bytes = (size_t)n_scores * sizeof(float);

    FV_RETURN_IF_ERR(fv_array_reserve(&x->peers, n_ranks, sizeof(fv_peer_t)));
    FV_RETURN_IF_ERR(
        fv_array_reserve(&x->messages, 2U * (size_t)n_ranks, sizeof(fv_exchange_message_t)));
    fv_peer_t *peers = x->peers.data;
    memset(peers, 0, n_ranks * sizeof(*peers));
    for (size_t i = 0; i < x->n_blocks; i++) {
        int32_t own = blocks[i].item->share.part.slice;
        size_t own_bytes = 0;

        (void)part_of(&blocks[i], own, &own_bytes);
        for (int32_t s = 0; s < n_slices(&blocks[i]); s++) {
            size_t bytes = 0;

            (void)part_of(&blocks[i], s, &bytes);
            if (s != own) {
                peers[rank_of(&blocks[i], s)].send_bytes += bytes;
                peers[rank_of(&blocks[i], s)].recv_bytes += own_bytes;
                n_bytes += bytes + own_bytes;
            }
        }
    }
    FV_RETURN_IF_ERR(
        fv_host_buffer_reserve(&x->buffer, worker->config.backend, worker->backend, n_bytes));
    uint8_t *at = x->buffer.data;
    for (size_t i = 0; i < x->n_blocks; i++) {
        blocks[i].attend.scores = (float *)(void *)at;
        at += blocks[i].n_scores * sizeof(float);
    }
    for (uint32_t r = 0; r < n_ranks; r++) {
        peers[r].send = at;
        peers[r].recv = at + peers[r].send_bytes;
        at += peers[r].send_bytes + peers[r].recv_bytes;
    }
    return FV_OK;
}

/* Sends each peer's `send` and receives its `recv`; back: the other way round. The cursors stand at the beginnings. */
static fv_status_t exchange(fv_worker_t *worker, bool back)
{
    fv_exact_work_t *x = &worker->work.exact;
    const fv_peer_t *peers = x->peers.data;
    fv_exchange_message_t *sends = x->messages.data;
    fv_exchange_message_t *recvs = sends + worker->config.n_ranks;
    int64_t begin_us = fv_clock_us();
    size_t n_sends = 0;
    size_t n_recvs = 0;

    for (uint32_t r = 0; r < worker->config.n_ranks; r++) {
        fv_exchange_message_t a = {
            .peer = r, .data = peers[r].send, .n_bytes = peers[r].send_bytes};
        fv_exchange_message_t b = {
            .peer = r, .data = peers[r].recv, .n_bytes = peers[r].recv_bytes};

        if ((back ? b : a).n_bytes > 0U) {
            sends[n_sends++] = back ? b : a;
        }
        if ((back ? a : b).n_bytes > 0U) {
            recvs[n_recvs++] = back ? a : b;
        }
    }
    if ((n_sends == 0U) && (n_recvs == 0U)) {
        return FV_OK;
    }
    fv_status_t status =
        worker->config.exchange->all_to_all(worker->config.exchange_ctx, sends, n_sends, recvs,
                                            n_recvs, worker->config.step_deadline_ms);
    x->exchange_us += fv_clock_us() - begin_us;
    return status;
}

/* ------------------------------------------------------------------ adding up */

/* Copies the others' parts of all scores to where they are sent from, or what came back from there. */
static void move_parts(fv_worker_t *worker, bool back)
{
    fv_exact_work_t *x = &worker->work.exact;
    const fv_exact_block_t *blocks = x->blocks.data;
    fv_peer_t *peers = x->peers.data;

    for (size_t i = 0; i < x->n_blocks; i++) {
        for (int32_t s = 0; s < n_slices(&blocks[i]); s++) {
            fv_peer_t *peer = &peers[rank_of(&blocks[i], s)];
            size_t n_bytes = 0;
            float *part = part_of(&blocks[i], s, &n_bytes);

            if (s != blocks[i].item->share.part.slice) {
                memcpy(back ? (uint8_t *)part : peer->send, back ? peer->send : (uint8_t *)part,
                       n_bytes);
                peer->send += n_bytes;
            }
        }
    }
    for (uint32_t r = 0; r < worker->config.n_ranks; r++) {
        peers[r].send -= peers[r].send_bytes;
    }
}

/* Sums the own part of a block in the order of the slices, and puts the sum where each peer's came. */
static void add_part(const fv_exact_block_t *b, fv_peer_t *peers)
{
    int32_t own = b->item->share.part.slice;
    size_t n_bytes = 0;
    float *mine = part_of(b, own, &n_bytes);
    size_t n = n_bytes / sizeof(float);

    for (size_t j = 0; j < n; j++) {
        float sum = 0.0F;

        for (int32_t s = 0; s < n_slices(b); s++) {
            const float *from =
                (s == own) ? mine : (const float *)(const void *)peers[rank_of(b, s)].recv;

            sum = (s == 0) ? from[j] : (sum + from[j]);
        }
        mine[j] = sum;
    }
    for (int32_t s = 0; s < n_slices(b); s++) {
        if (s != own) {
            fv_peer_t *peer = &peers[rank_of(b, s)];

            memcpy(peer->recv, mine, n_bytes);
            peer->recv += n_bytes;
        }
    }
}

static void add_up(fv_worker_t *worker)
{
    fv_exact_work_t *x = &worker->work.exact;
    const fv_exact_block_t *blocks = x->blocks.data;
    fv_peer_t *peers = x->peers.data;

    for (size_t i = 0; i < x->n_blocks; i++) {
        add_part(&blocks[i], peers);
    }
    for (uint32_t r = 0; r < worker->config.n_ranks; r++) {
        peers[r].recv -= peers[r].recv_bytes;
    }
}

/* ------------------------------------------------------------------ rounds */

/* The blocks that have not failed, in a row for the backend; scores of the others are 0. */
static fv_status_t list_attends(fv_worker_t *worker, size_t *out_n)
{
    fv_exact_work_t *x = &worker->work.exact;
    const fv_exact_block_t *blocks = x->blocks.data;
    size_t n = 0;

    FV_RETURN_IF_ERR(fv_array_reserve(&x->attends, x->n_blocks, sizeof(fv_attn_item_t)));
    for (size_t i = 0; i < x->n_blocks; i++) {
        if (blocks[i].item->failed) {
            memset(blocks[i].attend.scores, 0, blocks[i].n_scores * sizeof(float));
        } else {
            ((fv_attn_item_t *)x->attends.data)[n++] = blocks[i].attend;
        }
    }
    *out_n = n;
    return FV_OK;
}

/* Of those, the ones whose slice is asked for: only scores were wanted of the others. */
static size_t keep_answered(fv_exact_work_t *x)
{
    const fv_exact_block_t *blocks = x->blocks.data;
    fv_attn_item_t *attends = x->attends.data;
    size_t n_kept = 0;
    size_t n = 0;

    for (size_t i = 0; i < x->n_blocks; i++) {
        if (!blocks[i].item->failed) {
            if (blocks[i].item->share.is_answered) {
                attends[n_kept++] = attends[n];
            }
            n++;
        }
    }
    return n_kept;
}

static fv_status_t run_round(fv_worker_t *worker, uint64_t round)
{
    const fv_backend_ops_t *ops = worker->config.backend;
    fv_exact_work_t *x = &worker->work.exact;
    uint64_t n_scores = 0;
    size_t n = 0;

    FV_RETURN_IF_ERR(cut_round(worker, round, &n_scores));
    FV_RETURN_IF_ERR(lay_out(worker, n_scores));
    FV_RETURN_IF_ERR(list_attends(worker, &n));
    if (n > 0U) {
        FV_RETURN_IF_ERR(ops->scores(worker->backend, x->attends.data, n));
        FV_RETURN_IF_ERR(fv_worker_finish(worker, NULL));
    }
    move_parts(worker, false);
    FV_RETURN_IF_ERR(exchange(worker, false));
    add_up(worker);
    FV_RETURN_IF_ERR(exchange(worker, true));
    move_parts(worker, true);
    n = keep_answered(x);
    return (n > 0U) ? ops->attend(worker->backend, x->attends.data, n) : FV_OK;
}

fv_status_t fv_exact_run(fv_worker_t *worker)
{
    const fv_exact_work_t *x = &worker->work.exact;
    const fv_exact_item_t *items = x->items.data;
    uint64_t n_rounds = 0;

    for (size_t i = 0; i < x->n_items; i++) {
        n_rounds = (items[i].n_blocks > n_rounds) ? items[i].n_blocks : n_rounds;
    }
    for (uint64_t round = 0; round < n_rounds; round++) {
        FV_RETURN_IF_ERR(run_round(worker, round));
    }
    return FV_OK;
}
