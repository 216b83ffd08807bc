/*
 * move.c - see move.h.
 *
 * Decode path: station 7 of 10. Before: worker/step.c. After: worker/step.c.
 */
#include "worker/move.h"

#include "common/clock.h"
#include "common/policy.h"

#include <string.h>

static bool is_between_devices(const fv_worker_t *worker)
{
    return (worker->config.exchange != NULL) && (worker->config.exchange->begin != NULL);
}

size_t fv_move_config_bytes(const fv_worker_config_t *c)
{
    bool is_direct = (c->exchange != NULL) && (c->exchange->begin != NULL);
    bool can_bring = is_direct ? (c->exchange->bring != NULL) : (c->backend->kv_home == FV_KV_HOST);

    return (can_bring && (c->backend->kv_base != NULL)) ? c->move_bytes : 0U;
}

size_t fv_move_served_bytes(const fv_worker_t *worker)
{
    return fv_move_config_bytes(&worker->config);
}

void fv_move_free(fv_move_work_t *work)
{
    fv_array_free(&work->items);
    fv_array_free(&work->tables);
    fv_array_free(&work->attends);
    fv_array_free(&work->copies);
    fv_array_free(&work->messages); /* the buffer is the worker's to free */
}

void fv_move_begin(fv_worker_t *worker)
{
    fv_move_work_t *m = &worker->work.move;

    m->n_items = 0;
    m->n_entries = 0;
    m->n_attends = 0;
    m->n_copies = 0;
    m->exchange_us = 0;
}

fv_status_t
fv_move_add(fv_worker_t *worker, const fv_step_item_t *item, const fv_attn_item_t *attend)
{
    const fv_session_t *session = item->session;
    fv_move_work_t *m = &worker->work.move;
    fv_moved_t moved =
        fv_moved_make(&session->model->spec, &session->placement, item->ctl, item->share.hp);

    if (fv_moved_least_bytes(&moved) > fv_move_served_bytes(worker)) {
        return fv_fail(FV_ERR_PROTOCOL, "step: KV of %zu bytes is to move through %zu",
                       fv_moved_least_bytes(&moved), fv_move_served_bytes(worker));
    }
    FV_RETURN_IF_ERR(fv_array_reserve(&m->items, m->n_items + 1U, sizeof(fv_move_item_t)));
    ((fv_move_item_t *)m->items.data)[m->n_items++] =
        (fv_move_item_t){.item = item, .attend = *attend, .moved = moved};
    return FV_OK;
}

/* ------------------------------------------------------------------ one round */

/* Some KV heads of an item: their whole context. */
typedef struct round {
    const fv_move_item_t *it;
    int32_t head_begin, head_end; /* local */
    size_t page_bytes;
    size_t stage;         /* of the arena, bytes: where the area begins */
    fv_page_ref_t *table; /* [heads of the round, n_pages] */
    uint8_t
        *area; /* where messages are: the staging area, or a buffer of the host laid out like it */
} round_t;

static fv_page_ref_t page_at(const round_t *r, uint64_t i)
{
    return (fv_page_ref_t)((r->stage + i * r->page_bytes) / FV_PAGE_UNIT);
}

/* The i-th page of the round that travels, of local head h: into the table, and our own onto the list of copies. */
static void place_page(fv_move_work_t *m, const round_t *r, int32_t h, int64_t page, uint64_t i)
{
    const fv_step_item_t *item = r->it->item;
    const fv_session_t *session = item->session;
    const fv_head_part_t *part = &item->share.part;
    uint64_t token = (uint64_t)page * FV_PAGE_TOKENS;
    fv_page_ref_t *entry =
        &r->table[(size_t)(h - r->head_begin) * r->it->moved.n_pages + (size_t)page];

    *entry = page_at(r, i);
    if ((fv_placement_part_of(&session->placement, token) != session->cp) || item->failed) {
        return;
    }
    uint64_t local = fv_placement_local(&session->placement, token) / FV_PAGE_TOKENS;
    fv_page_ref_t own = item->layer->pages[(size_t)h * item->layer->stride + local];
    if (own !=
        FV_PAGE_NONE) { /* else no row reads it, though one at the item's first position might */
        ((fv_page_copy_t *)m->copies.data)[m->n_copies++] =
            (fv_page_copy_t){.src = own,
                             .dst = *entry,
                             .n_tokens = FV_PAGE_TOKENS,
                             .head_dim_qk = part->head_dim_qk,
                             .head_dim_v = part->head_dim_v,
                             .kv_dtype = session->model->spec.kv_dtype,
                             .v_in_k = fv_model_is_latent(&session->model->spec)};
    }
    *entry = own;
}

/* What part d has of the round lies side by side, the parts one behind the other. out_first[d]: its first page; [n_parts]: the end. */
static void place_pages(fv_move_work_t *m, const round_t *r, uint64_t *out_first)
{
    const fv_moved_t *moved = &r->it->moved;
    uint64_t i = 0;

    for (int32_t h = r->head_begin; h < r->head_end; h++) {
        for (uint64_t p = 0; p < moved->n_pages; p++) {
            r->table[(size_t)(h - r->head_begin) * moved->n_pages + p] = FV_PAGE_NONE;
        }
    }
    for (int32_t d = 0; d < moved->n_parts; d++) {
        out_first[d] = i;
        for (int32_t h = r->head_begin; h < r->head_end; h++) {
            for (int64_t p = 0; p < (int64_t)moved->n_pages; p++) {
                if (fv_moved_has(moved, d, h, p)) {
                    place_page(m, r, h, p, i++);
                }
            }
        }
    }
    out_first[moved->n_parts] = i;
}

/* Own pages to everybody, everybody's pages here. */
static fv_status_t bring(fv_worker_t *worker, const round_t *r, const uint64_t *first)
{
    const fv_exchange_ops_t *exchange = worker->config.exchange;
    const fv_session_t *session = r->it->item->session;
    const fv_placement_t *p = &session->placement;
    fv_move_work_t *m = &worker->work.move;
    fv_exchange_message_t *sends = m->messages.data;
    fv_exchange_message_t *recvs = sends + FV_PLACEMENT_RANKS_MAX;
    size_t n_sends = 0;
    size_t n_recvs = 0;

    for (int32_t d = 0; d < r->it->moved.n_parts; d++) {
        uint32_t peer = p->ranks[r->it->item->share.hp * p->n_ctx_parts + d];
        const fv_exchange_message_t in = {.peer = peer,
                                          .data = r->area + first[d] * r->page_bytes,
                                          .n_bytes = (first[d + 1] - first[d]) * r->page_bytes};
        const fv_exchange_message_t out = {
            .peer = peer,
            .data = r->area + first[session->cp] * r->page_bytes,
            .n_bytes = (first[session->cp + 1] - first[session->cp]) * r->page_bytes};

        if ((d != session->cp) && (in.n_bytes > 0U)) {
            recvs[n_recvs++] = in;
        }
        if ((d != session->cp) && (out.n_bytes > 0U)) {
            sends[n_sends++] = out;
        }
    }
    if (n_sends + n_recvs == 0U) {
        return FV_OK;
    }
    if (is_between_devices(worker)) {
        return exchange->bring(worker->config.exchange_ctx, sends, n_sends, recvs, n_recvs);
    }
    int64_t begin_us = fv_clock_us();
    fv_status_t status = exchange->all_to_all(worker->config.exchange_ctx, sends, n_sends, recvs,
                                              n_recvs, worker->config.step_deadline_ms);
    m->exchange_us += fv_clock_us() - begin_us;
    return status;
}

/* The round's heads of one span of query tokens; n_before: tokens of the spans before it, which is where packed ones lie. */
static fv_attn_item_t make_attend(const round_t *r, const fv_token_span_t *span, uint64_t n_before)
{
    const fv_step_item_t *item = r->it->item;
    fv_attn_item_t a = r->it->attend;
    size_t e = fv_dtype_bytes((fv_dtype_t)a.io_dtype);
    size_t q_head = (a.q_head_bytes != 0U) ? a.q_head_bytes : ((size_t)a.head_dim_qk * e);
    size_t out_head = (a.out_head_bytes != 0U) ? a.out_head_bytes : ((size_t)a.head_dim_v * e);
    size_t t = (size_t)(item->io->is_packed ? n_before : span->begin);
    size_t h = (size_t)r->head_begin * (size_t)a.group;

    a.n_tokens = (int32_t)span->n;
    a.n_kv_heads = r->head_end - r->head_begin;
    a.kv_head_begin += r->head_begin;
    a.position += (int64_t)span->begin;
    a.q = (const uint8_t *)a.q + t * a.q_token_bytes + h * q_head;
    a.out = (uint8_t *)a.out + t * a.out_token_bytes + h * out_head;
    a.lse = (a.lse == NULL) ? NULL : (a.lse + t * a.lse_token_stride + h);
    a.shard = (fv_kv_shard_t){.shard_tokens = FV_PAGE_TOKENS, .n_parts = 1};
    a.pages = r->table;
    a.pages_head_stride = r->it->moved.n_pages;
    a.table_id = 0;
    a.table_version = 0;
    a.n_table_pages = (uint32_t)r->it->moved.n_pages;
    return a;
}

/* Own pages to where messages leave from. */
static fv_status_t
pack(fv_worker_t *worker, const round_t *r, const fv_page_copy_t *copies, size_t n)
{
    const fv_backend_ops_t *ops = worker->config.backend;

    if (n == 0U) {
        return FV_OK;
    }
    if (is_between_devices(worker)) {
        return ops->copy_pages(worker->backend, copies, n);
    }
    const uint8_t *arena = ops->kv_base(worker->backend);
    for (size_t i = 0; i < n; i++) {
        memcpy(r->area + ((size_t)copies[i].dst * FV_PAGE_UNIT - r->stage),
               arena + (size_t)copies[i].src * FV_PAGE_UNIT, r->page_bytes);
    }
    return FV_OK;
}

/* What came, to where the table says: messages that are given up may still be written, and the arena is used again. */
static void unpack(fv_worker_t *worker, const round_t *r, const uint64_t *first)
{
    uint8_t *stage = (uint8_t *)worker->config.backend->kv_base(worker->backend) + r->stage;

    for (int32_t d = 0; !is_between_devices(worker) && (d < r->it->moved.n_parts); d++) {
        if (d != r->it->item->session->cp) {
            memcpy(stage + first[d] * r->page_bytes, r->area + first[d] * r->page_bytes,
                   (first[d + 1] - first[d]) * r->page_bytes);
        }
    }
}

static fv_status_t run_round(fv_worker_t *worker, round_t *r)
{
    const fv_backend_ops_t *ops = worker->config.backend;
    const fv_item_share_t *share = &r->it->item->share;
    fv_move_work_t *m = &worker->work.move;
    const fv_page_copy_t *copies = (const fv_page_copy_t *)m->copies.data + m->n_copies;
    fv_attn_item_t *attends = (fv_attn_item_t *)m->attends.data + m->n_attends;
    size_t n_copies_before = m->n_copies;
    size_t n_attends = 0;
    uint64_t n_before = 0;
    uint64_t first[FV_PLACEMENT_RANKS_MAX + 1];

    place_pages(m, r, first);
    r->area = (uint8_t *)ops->kv_base(worker->backend) + r->stage;
    if (!is_between_devices(worker)) {
        FV_RETURN_IF_ERR(fv_host_buffer_reserve(&m->buffer, ops, worker->backend,
                                                first[r->it->moved.n_parts] * r->page_bytes));
        r->area = m->buffer.data;
    }
    FV_RETURN_IF_ERR(pack(worker, r, copies, m->n_copies - n_copies_before));
    FV_RETURN_IF_ERR(bring(worker, r, first));
    unpack(worker, r, first);
    for (int32_t i = 0; !r->it->item->failed && (i < share->n_spans); i++) {
        attends[n_attends++] = make_attend(r, &share->spans[i], n_before);
        n_before += share->spans[i].n;
    }
    m->n_attends += n_attends;
    return (n_attends > 0U) ? ops->attend(worker->backend, attends, n_attends) : FV_OK;
}

/* ------------------------------------------------------------------ all rounds */

/* Room for what all rounds point to: it stays where it is until the backend is done. */
static fv_status_t reserve(fv_move_work_t *m)
{
    const fv_move_item_t *items = m->items.data;
    size_t n_heads = 0;
    size_t n_entries = 0;

    for (size_t i = 0; i < m->n_items; i++) {
        n_heads += (size_t)items[i].moved.n_heads;
        n_entries += (size_t)items[i].moved.n_heads * items[i].moved.n_pages;
    }
    FV_RETURN_IF_ERR(fv_array_reserve(&m->tables, n_entries, sizeof(fv_page_ref_t)));
    FV_RETURN_IF_ERR(fv_array_reserve(&m->copies, n_entries, sizeof(fv_page_copy_t)));
    FV_RETURN_IF_ERR(fv_array_reserve(&m->attends, 2U * n_heads, sizeof(fv_attn_item_t)));
    return fv_array_reserve(&m->messages, 2U * (size_t)FV_PLACEMENT_RANKS_MAX,
                            sizeof(fv_exchange_message_t));
}

fv_status_t fv_move_run(fv_worker_t *worker)
{
    fv_move_work_t *m = &worker->work.move;
    size_t area_bytes = fv_move_served_bytes(worker);

    if (m->n_items == 0U) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(reserve(m));
    for (size_t i = 0; i < m->n_items; i++) {
        const fv_move_item_t *it = (const fv_move_item_t *)m->items.data + i;
        round_t r = {.it = it,
                     .page_bytes = it->moved.page_bytes,
                     .stage = worker->config.backend_config.kv_arena_bytes - area_bytes};

        while (r.head_begin < it->moved.n_heads) {
            r.head_end = fv_moved_round_end(&it->moved, r.head_begin, area_bytes);
            r.table = (fv_page_ref_t *)m->tables.data + m->n_entries;
            m->n_entries += (size_t)(r.head_end - r.head_begin) * it->moved.n_pages;
            FV_RETURN_IF_ERR(run_round(worker, &r));
            r.head_begin = r.head_end;
        }
    }
    return FV_OK;
}
