/*
 * partials.c - layout, exchange and merge of partial states.
 *
 * Decode path: station 8 of 10. Before: kernels (attend). After: coord (outputs gathered).
 */
#include "worker/partials.h"

#include "common/clock.h"
#include "common/fault.h"

#include <math.h>
#include <string.h>

/* Bytes of the partial states of n rows in a message. */
static size_t o_bytes(const fv_step_item_t *item, uint64_t n_rows)
{
    size_t dv = (size_t)item->share.part.head_dim_v;

    return fv_align_up(n_rows * dv * sizeof(float), FV_STEP_ALIGN);
}

static size_t chunk_bytes(const fv_step_item_t *item, uint64_t n_rows)
{
    return o_bytes(item, n_rows) + fv_align_up(n_rows * sizeof(float), FV_STEP_ALIGN);
}

/* Rows of an item that part d merges. */
static uint64_t rows_of(const fv_step_item_t *item, int32_t d)
{
    const fv_item_share_t *s = &item->share;

    return fv_rows_begin(s->n_rows, s->n_parts, d + 1) - fv_rows_begin(s->n_rows, s->n_parts, d);
}

/* The rank that holds context part d of the item's heads here. */
static fv_peer_t *peer_of(fv_worker_t *worker, const fv_step_item_t *item, int32_t d)
{
    const fv_placement_t *p = &item->session->placement;

    return &worker->work.peers[p->ranks[item->share.hp * p->n_ctx_parts + d]];
}

void fv_partials_begin(fv_worker_t *worker)
{
    fv_step_work_t *w = &worker->work;

    memset(w->peers, 0, worker->config.n_ranks * sizeof(*w->peers));
    w->own_bytes = 0;
    w->n_dsts = 0;
    w->n_parts = 0;
    w->n_merges = 0;
    w->n_with = 0;
}

static bool is_between_devices(const fv_worker_t *worker)
{
    return (worker->config.exchange != NULL) && (worker->config.exchange->begin != NULL);
}

void fv_partials_add(fv_worker_t *worker, const fv_step_item_t *item)
{
    const fv_item_share_t *s = &item->share;
    fv_step_work_t *w = &worker->work;
    size_t own = chunk_bytes(item, s->row_end - s->row_begin);

    if (s->n_parts == 1) {
        return;
    }
    for (int32_t d = 0; d < s->n_parts; d++) {
        if (d == s->cp) {
            w->own_bytes += own;
        } else {
            peer_of(worker, item, d)->send_bytes += chunk_bytes(item, rows_of(item, d));
            peer_of(worker, item, d)->recv_bytes += own;
        }
    }
    w->n_dsts += (size_t)s->n_parts;
    w->n_parts += 2U * (size_t)s->n_parts;
    w->n_merges++;
}

/* All messages in one buffer of the host. */
static fv_status_t place_on_host(fv_worker_t *worker)
{
    fv_step_work_t *w = &worker->work;
    uint32_t n_ranks = worker->config.n_ranks;
    size_t n_bytes = w->own_bytes;

    FV_RETURN_IF_ERR(
        fv_array_reserve(&w->messages, 2U * (size_t)n_ranks, sizeof(fv_exchange_message_t)));
    for (uint32_t r = 0; r < n_ranks; r++) {
        n_bytes += w->peers[r].send_bytes + w->peers[r].recv_bytes;
    }
    FV_RETURN_IF_ERR(
        fv_host_buffer_reserve(&w->exchange, worker->config.backend, worker->backend, n_bytes));
    uint8_t *at = w->exchange.data;
    for (uint32_t r = 0; r < n_ranks; r++) {
        w->peers[r].send = at;
        at += w->peers[r].send_bytes;
        w->peers[r].recv = at;
        at += w->peers[r].recv_bytes;
    }
    w->own = at;
    return FV_OK;
}

/* Each message where the exchange wants it. */
static fv_status_t place_on_devices(fv_worker_t *worker)
{
    const fv_exchange_ops_t *ops = worker->config.exchange;
    fv_step_work_t *w = &worker->work;
    fv_exchange_peer_t *with = NULL;

    FV_RETURN_IF_ERR(
        fv_array_reserve(&w->with, worker->config.n_ranks, sizeof(fv_exchange_peer_t)));
    with = w->with.data;
    for (uint32_t r = 0; r < worker->config.n_ranks; r++) {
        const fv_peer_t *p = &w->peers[r];

        if ((p->send_bytes > 0U) || (p->recv_bytes > 0U)) {
            with[w->n_with++] = (fv_exchange_peer_t){
                .rank = r, .send_bytes = p->send_bytes, .recv_bytes = p->recv_bytes};
        }
    }
    if (w->n_with == 0U) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(
        ops->begin(worker->config.exchange_ctx, with, w->n_with, w->own_bytes, &w->own));
    for (size_t i = 0; i < w->n_with; i++) {
        w->peers[with[i].rank].send = with[i].send;
        w->peers[with[i].rank].recv = with[i].recv;
    }
    return FV_OK;
}

fv_status_t fv_partials_layout(fv_worker_t *worker)
{
    fv_step_work_t *w = &worker->work;

    FV_RETURN_IF_ERR(fv_array_reserve(&w->dsts, w->n_dsts, sizeof(fv_partial_dst_t)));
    FV_RETURN_IF_ERR(fv_array_reserve(&w->parts, w->n_parts, sizeof(const float *)));
    FV_RETURN_IF_ERR(fv_array_reserve(&w->merges, w->n_merges, sizeof(fv_merge_item_t)));
    w->n_dsts = 0; /* from here on: how many are bound */
    w->n_parts = 0;
    w->n_merges = 0;
    return is_between_devices(worker) ? place_on_devices(worker) : place_on_host(worker);
}

/* The empty set: o = 0, lse = -inf. The host does not reach memory of devices. */
static fv_status_t fill_empty(fv_worker_t *worker,
                              const fv_step_item_t *item,
                              const fv_partial_dst_t *dst,
                              uint64_t n_rows)
{
    size_t dv = (size_t)item->share.part.head_dim_v;

    if (is_between_devices(worker)) {
        return worker->config.backend->empty(worker->backend, dst->lse_log2, n_rows);
    }
    memset(dst->o, 0, n_rows * dv * sizeof(float));
    for (uint64_t i = 0; i < n_rows; i++) {
        dst->lse_log2[i] = -INFINITY;
    }
    return FV_OK;
}

/* Where the merged rows of this rank go: the first row of it in packed outputs, else the item's row 0. */
static fv_merge_item_t make_merge(const fv_step_item_t *item)
{
    const fv_item_share_t *s = &item->share;
    size_t q_head = (size_t)s->part.q_head_begin;
    const fv_model_spec_t *spec = &item->session->model->spec;
    size_t e = fv_dtype_bytes((fv_dtype_t)item->ctl->dtype);
    size_t row_bytes = (size_t)s->part.head_dim_v * e;
    size_t head_bytes = (size_t)fv_item_out_dim(spec, item->ctl) * e; /* of all slices */
    fv_merge_item_t m = {
        .n_rows = s->row_end - s->row_begin,
        .n_parts = s->n_parts,
        .head_dim_v = s->part.head_dim_v,
        .io_dtype = item->ctl->dtype,
        .row_len = (uint64_t)item->n_q_heads,
    };

    if (item->io->is_packed) {
        m.row_base = 0;
        m.row_len = m.n_rows;
        m.out = item->io->out;
        m.out_token_bytes = m.n_rows * row_bytes;
        m.lse = item->io->lse;
        m.lse_token_stride = m.n_rows;
    } else {
        m.row_base = s->row_begin;
        m.out = (uint8_t *)item->io->out + q_head * head_bytes +
                (size_t)fv_item_out_begin(&s->part, item->ctl) * e;
        m.out_head_bytes = (head_bytes > row_bytes) ? head_bytes : 0U;
        m.out_token_bytes = item->io->out_token_bytes;
        m.lse = (s->lse_bytes == 0U) ? NULL : (item->io->lse + q_head);
        m.lse_token_stride = item->io->lse_token_stride;
    }
    return m;
}

/* A chunk of n rows at the cursor, which moves past it. */
static fv_partial_dst_t take_chunk(const fv_step_item_t *item, uint64_t n_rows, uint8_t **at)
{
    uint8_t *base = *at;

    *at += chunk_bytes(item, n_rows);
    return (fv_partial_dst_t){.o = (float *)(void *)base,
                              .lse_log2 = (float *)(void *)(base + o_bytes(item, n_rows))};
}

/* Sources of the merge, ascending part: own states, and those that arrive. */
static void bind_merge(fv_worker_t *worker, const fv_step_item_t *item, fv_partial_dst_t own)
{
    fv_step_work_t *w = &worker->work;
    const fv_item_share_t *s = &item->share;
    uint64_t n_rows = s->row_end - s->row_begin;
    const float **o = (const float **)w->parts.data + w->n_parts;
    const float **lse = o + s->n_parts;

    for (int32_t d = 0; d < s->n_parts; d++) {
        fv_partial_dst_t from =
            (d == s->cp) ? own : take_chunk(item, n_rows, &peer_of(worker, item, d)->recv);

        o[d] = from.o;
        lse[d] = from.lse_log2;
    }
    if ((n_rows > 0U) && !item->failed) {
        fv_merge_item_t *m = (fv_merge_item_t *)w->merges.data + w->n_merges++;

        *m = make_merge(item);
        m->o = o;
        m->lse_log2 = lse;
        w->n_parts += 2U * (size_t)s->n_parts;
    }
}

fv_status_t
fv_partials_bind(fv_worker_t *worker, const fv_step_item_t *item, fv_attn_item_t *attend)
{
    fv_step_work_t *w = &worker->work;
    const fv_item_share_t *s = &item->share;
    fv_partial_dst_t *dsts = (fv_partial_dst_t *)w->dsts.data + w->n_dsts;
    fv_partial_dst_t own = {0};
    int32_t n = 0;

    if (s->n_parts == 1) {
        return FV_OK;
    }
    for (int32_t d = 0; d < s->n_parts; d++) {
        uint64_t n_rows = rows_of(item, d);
        uint8_t **at = (d == s->cp) ? &w->own : &peer_of(worker, item, d)->send;
        fv_partial_dst_t dst = take_chunk(item, n_rows, at);

        dst.row_begin = fv_rows_begin(s->n_rows, s->n_parts, d);
        if (d == s->cp) {
            own = dst;
        }
        if (item->failed) {
            FV_RETURN_IF_ERR(fill_empty(worker, item, &dst, n_rows));
        } else if (n_rows > 0U) { /* fewer rows than parts: the last ones merge none */
            dsts[n++] = dst;
        }
    }
    w->n_dsts += (size_t)n;
    if (!item->failed) {
        attend->dst = dsts;
        attend->n_dst = n;
    }
    bind_merge(worker, item, own);
    return FV_OK;
}

static fv_status_t all_to_all(fv_worker_t *worker)
{
    fv_step_work_t *w = &worker->work;
    fv_exchange_message_t *sends = w->messages.data;
    fv_exchange_message_t *recvs = sends + worker->config.n_ranks;
    size_t n_sends = 0;
    size_t n_recvs = 0;

    for (uint32_t r = 0; r < worker->config.n_ranks; r++) {
        const fv_peer_t *p = &w->peers[r];

        if (p->send_bytes > 0U) { /* the cursors stand at the ends now */
            sends[n_sends++] = (fv_exchange_message_t){
                .peer = r, .data = p->send - p->send_bytes, .n_bytes = p->send_bytes};
        }
        if (p->recv_bytes > 0U) {
            recvs[n_recvs++] = (fv_exchange_message_t){
                .peer = r, .data = p->recv - p->recv_bytes, .n_bytes = p->recv_bytes};
        }
    }
    if ((n_sends == 0U) && (n_recvs == 0U)) {
        return FV_OK;
    }
    return worker->config.exchange->all_to_all(worker->config.exchange_ctx, sends, n_sends, recvs,
                                               n_recvs, worker->config.step_deadline_ms);
}

/* Through the host: the states are finished before they travel. */
static fv_status_t finish_over_host(fv_worker_t *worker, fv_step_times_t *times)
{
    const fv_backend_ops_t *ops = worker->config.backend;
    fv_step_work_t *w = &worker->work;

    FV_RETURN_IF_ERR(fv_worker_finish(worker, &times->device));
    times->computed_us = fv_clock_us();
    fv_fault_point(8);
    FV_RETURN_IF_ERR(all_to_all(worker));
    fv_fault_point(8);
    if (w->n_merges == 0U) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(ops->merge(worker->backend, w->merges.data, w->n_merges, NULL));
    return fv_worker_finish(worker, NULL);
}

/* Attend, exchange and merge follow each other on the devices; the host waits once. */
static fv_status_t finish_on_devices(fv_worker_t *worker, fv_step_times_t *times)
{
    const fv_exchange_ops_t *exchange = worker->config.exchange;
    fv_step_work_t *w = &worker->work;
    const fv_merge_sync_t *sync = NULL;

    times->computed_us = fv_clock_us();
    FV_RETURN_IF_ERR(exchange->run(worker->config.exchange_ctx, w->with.data, w->n_with, &sync));
    FV_RETURN_IF_ERR(
        worker->config.backend->merge(worker->backend, w->merges.data, w->n_merges, sync));
    times->is_exchange_known = true;
    return fv_worker_finish(worker, &times->device);
}

fv_status_t fv_partials_finish(fv_worker_t *worker, fv_status_t computed, fv_step_times_t *times)
{
    fv_status_t status = computed;

    if (!is_between_devices(worker)) {
        return (status == FV_OK) ? finish_over_host(worker, times) : status;
    }
    if (worker->work.n_with == 0U) {
        if (status == FV_OK) {
            status = fv_worker_finish(worker, &times->device);
        }
        times->computed_us = fv_clock_us();
        if (worker->work.move.n_items > 0U) { /* it had messages before its end */
            status = worker->config.exchange->end(worker->config.exchange_ctx, status);
        }
        return status;
    }
    if (status == FV_OK) {
        status = finish_on_devices(worker, times);
    }
    return worker->config.exchange->end(worker->config.exchange_ctx, status);
}
