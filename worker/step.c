/*
 * step.c - one step of one rank. Read this file first.
 *
 * Decode path: station 6 of 10. Before: coord (control message and tensors arrive). After: kernels/kernels.h.
 *
 *   plan      each item's share of this rank; what travels to and from which peer
 *   reserve   pages for new tokens; a shared last page becomes an own copy
 *   compute   copies, appends, attention: one backend call each for the whole step
 *   exchange  partial states of rows whose KV spans ranks, merged where they belong (partials.c)
 *   commit    the layers' lengths; until here the session is as it was. Pages that no later query can read are freed
 *
 * An item fails alone: it is left out of the compute calls and sends the empty set, so that its peers do not wait.
 * Only what makes the sizes of messages uncertain, or a backend or exchange failure, fails the step.
 */
#include "common/clock.h"
#include "common/fault.h"
#include "common/policy.h"
#include "worker/exact.h"
#include "worker/internal.h"
#include "worker/mirror.h"
#include "worker/move.h"
#include "worker/partials.h"
#include "worker/store_disk.h"

#include <string.h>

#define TOKENS_MAX \
    ((uint64_t)1 << 36) /* of a session: keeps every page number and byte count in range */

/* ------------------------------------------------------------------ plan */

fv_status_t
fv_step_item_make(const fv_worker_t *worker, const fv_ctl_item_t *ctl, fv_step_item_t *out)
{
    fv_session_t *session = fv_worker_session(worker, ctl->session_slot);

    if (session == NULL) {
        return fv_fail(FV_ERR_PROTOCOL, "step: session slot %u is not open", ctl->session_slot);
    }
    const fv_model_spec_t *spec = &session->model->spec;
    if (ctl->layer >= (uint32_t)spec->n_layers) {
        return fv_fail(FV_ERR_PROTOCOL, "step: layer given %u, expected less than %d", ctl->layer,
                       spec->n_layers);
    }
    if (!fv_dtype_is_valid(ctl->dtype) || (ctl->n_tokens == 0U) || (ctl->n_tokens > INT32_MAX) ||
        (ctl->position > TOKENS_MAX) || (ctl->kv_end > TOKENS_MAX)) {
        return fv_fail(FV_ERR_PROTOCOL, "step: dtype %u, n_tokens %u, position %llu, kv_end %llu",
                       ctl->dtype, ctl->n_tokens, (unsigned long long)ctl->position,
                       (unsigned long long)ctl->kv_end);
    }
    *out = (fv_step_item_t){.ctl = ctl, .session = session};
    if (!fv_item_share(spec, &session->placement, ctl, worker->config.rank, &out->share)) {
        return fv_fail(FV_ERR_PROTOCOL, "step: rank %u has no share of session slot %u",
                       worker->config.rank, ctl->session_slot);
    }
    if ((out->share.n_movers > 0) && fv_model_adds_scores(spec)) {
        return fv_fail(FV_ERR_PROTOCOL, "step: KV of a model that adds up scores is to move");
    }
    out->layer = &session->layers[ctl->layer];
    out->n_q_heads = out->share.n_q_heads;
    return FV_OK;
}

/* Does the item fit this layer as it is? Its failure is its own. */
static fv_status_t check_item(const fv_step_item_t *item, uint64_t step)
{
    const fv_ctl_item_t *ctl = item->ctl;
    const fv_session_t *session = item->session;
    const fv_model_spec_t *spec = &session->model->spec;
    const fv_step_io_t *io = item->io;
    uint64_t length = item->layer->length;

    if (item->layer->last_step == step) {
        return fv_fail(FV_ERR_PROTOCOL, "step: session slot %u, layer %u comes twice",
                       ctl->session_slot, ctl->layer);
    }
    item->layer->last_step = step;
    if ((io->q == NULL) || ((item->share.out_bytes > 0U) && (io->out == NULL)) ||
        ((item->share.lse_bytes > 0U) && (io->lse == NULL)) ||
        ((item->share.n_kv_tokens > 0U) &&
         ((io->k == NULL) || ((io->v == NULL) && !fv_model_is_latent(&session->model->spec))))) {
        return fv_fail(FV_ERR_PROTOCOL, "step: a tensor of session slot %u is missing",
                       ctl->session_slot);
    }
    if (!fv_policy_is_readable(&spec->policies[spec->layer_policy[ctl->layer]], spec->n_kv_heads,
                               fv_model_group(spec), (int64_t)item->layer->floor,
                               (int64_t)ctl->position, (int64_t)fv_item_sees_end(ctl))) {
        return fv_fail(FV_ERR_PROTOCOL,
                       "step: position %llu of session slot %u, layer %u reads KV that was freed",
                       (unsigned long long)ctl->position, ctl->session_slot, ctl->layer);
    }
    if ((ctl->flags & FV_ITEM_APPEND) == 0) {
        if (fv_session_own(session, ctl->kv_end) > fv_session_own(session, length)) {
            return fv_fail(FV_ERR_PROTOCOL, "step: kv_end given %llu, this rank has %llu tokens",
                           (unsigned long long)ctl->kv_end, (unsigned long long)length);
        }
        return FV_OK;
    }
    /* A rank takes no part in steps before the context reaches its part, so it may be behind by others' tokens. */
    if ((ctl->position < length) ||
        (fv_session_own(session, ctl->position) != fv_session_own(session, length))) {
        return fv_fail(FV_ERR_PROTOCOL, "step: append at position %llu, expected %llu",
                       (unsigned long long)ctl->position, (unsigned long long)length);
    }
    uint64_t end = ctl->position + ctl->n_tokens;
    if (ctl->kv_end != end) {
        return fv_fail(FV_ERR_PROTOCOL, "step: append with kv_end %llu, expected %llu",
                       (unsigned long long)ctl->kv_end, (unsigned long long)end);
    }
    return FV_OK;
}

static void fail_item(fv_step_item_t *item, fv_status_t status, fv_error_t *out_error)
{
    item->failed = true;
    *out_error = fv_error_capture(status);
}

/* Page references and bytes that an append may add; those on a disk. */
static void add_need(const fv_worker_t *worker,
                     const fv_step_item_t *item,
                     size_t *n_refs,
                     size_t *n_bytes,
                     size_t *n_disk_bytes)
{
    const fv_session_t *session = item->session;
    uint64_t end = fv_placement_pages(&session->placement, session->cp, item->ctl->kv_end);
    size_t n_new = ((size_t)(end - item->layer->n_pages) + 1U) * (size_t)session->n_heads;

    *n_refs += n_new;
    *n_bytes += n_new * fv_model_page_bytes(&session->model->spec);
    *n_disk_bytes += fv_store_disk_need(worker, item, n_new);
}

/* Nothing may fail for want of room in the store once pages are taken: without it, appends fail here. */
static void make_room(fv_worker_t *worker, fv_error_t *item_errors)
{
    fv_step_work_t *w = &worker->work;
    fv_step_item_t *items = w->items.data;
    size_t n_refs = 0;
    size_t n_bytes = 0;
    size_t n_disk_bytes = 0;

    w->is_store_full = false;
    if (worker->store == NULL) {
        return;
    }
    for (size_t i = 0; i < w->n_items; i++) {
        if (((items[i].ctl->flags & FV_ITEM_APPEND) != 0) && !items[i].failed) {
            add_need(worker, &items[i], &n_refs, &n_bytes, &n_disk_bytes);
        }
    }
    fv_status_t status = fv_store_reserve(worker, w->n_items, n_refs, n_bytes, n_disk_bytes);
    w->is_store_full = status != FV_OK;
    for (size_t i = 0; (status != FV_OK) && (i < w->n_items); i++) {
        if (((items[i].ctl->flags & FV_ITEM_APPEND) != 0) && !items[i].failed) {
            fail_item(&items[i], status, &item_errors[i]);
        }
    }
}

/* Shares, checks, sizes of messages, room for everything: after it only the backend and the pool can refuse an item. */
static fv_status_t plan(fv_worker_t *worker,
                        const fv_ctl_item_t *items,
                        const fv_step_io_t *io,
                        size_t n_items,
                        fv_error_t *item_errors)
{
    fv_step_work_t *w = &worker->work;

    FV_RETURN_IF_ERR(fv_array_reserve(&w->items, n_items, sizeof(fv_step_item_t)));
    FV_RETURN_IF_ERR(fv_array_reserve(&w->attends, n_items, sizeof(fv_attn_item_t)));
    w->n_items = n_items;
    worker->n_steps++;
    fv_partials_begin(worker);
    for (size_t i = 0; i < n_items; i++) {
        fv_step_item_t *item = (fv_step_item_t *)w->items.data + i;

        FV_RETURN_IF_ERR(fv_step_item_make(worker, &items[i], item));
        item->io = &io[i];
        item->first_entry = item->layer->n_pages;
        item_errors[i] = (fv_error_t){.status = FV_OK};
        fv_status_t status = check_item(item, worker->n_steps);
        if (status != FV_OK) {
            fail_item(item, status, &item_errors[i]);
        }
        fv_partials_add(worker, item);
    }
    make_room(worker, item_errors);
    return fv_partials_layout(worker);
}

/* ------------------------------------------------------------------ reserve and append */

/* Where a rank's slice begins in a row of the whole item's latents; packed rows hold nothing else. */
static size_t latent_begin_bytes(const fv_step_item_t *item)
{
    return item->io->is_packed ? 0U
                               : ((size_t)item->share.part.latent_begin *
                                  fv_dtype_bytes((fv_dtype_t)item->ctl->dtype));
}

/* Between the slice's end and the RoPE key in such a row. */
static size_t rope_gap_bytes(const fv_step_item_t *item)
{
    const fv_head_part_t *part = &item->share.part;
    int32_t dims = item->session->model->spec.head_dim_v - part->latent_begin - part->head_dim_v;

    return item->io->is_packed ? 0U : ((size_t)dims * fv_dtype_bytes((fv_dtype_t)item->ctl->dtype));
}

/* RMS(latent)^2 = alpha / groups * mean(slice^2). */
static float norm_alpha(const fv_model_spec_t *spec, const fv_head_part_t *part)
{
    return (spec->latent_norm.mode == FV_NORM_NONE)
               ? 0.0F
               : (spec->latent_norm.alpha[part->slice] / (float)fv_model_groups(spec));
}

/* One fv_append_item_t for each run of new tokens that is contiguous here. */
static fv_status_t add_appends(fv_step_work_t *w, const fv_step_item_t *item)
{
    const fv_session_t *session = item->session;
    const fv_model_spec_t *spec = &session->model->spec;
    const fv_step_io_t *io = item->io;
    const fv_head_part_t *part = &item->share.part;
    size_t e = fv_dtype_bytes((fv_dtype_t)item->ctl->dtype);
    size_t head = io->is_packed ? 0U : (size_t)part->head_begin;
    const uint8_t *k =
        (const uint8_t *)io->k + head * (size_t)spec->head_dim_qk * e + latent_begin_bytes(item);
    const uint8_t *v = (const uint8_t *)io->v + head * (size_t)spec->head_dim_v * e;
    uint64_t cursor = 0;
    uint64_t n_done = 0;
    fv_token_run_t run;

    while (fv_token_run_next(&session->placement, session->cp, item->ctl, &cursor, &run)) {
        uint64_t first = io->is_packed ? n_done : run.item_begin; /* packed: only own tokens */

        FV_RETURN_IF_ERR(
            fv_array_reserve(&w->appends, w->n_appends + 1U, sizeof(fv_append_item_t)));
        ((fv_append_item_t *)w->appends.data)[w->n_appends++] = (fv_append_item_t){
            .n_kv_heads = session->n_heads,
            .head_dim_qk = part->head_dim_qk,
            .head_dim_v = part->head_dim_v,
            .src_dtype = item->ctl->dtype,
            .kv_dtype = spec->kv_dtype,
            .v_in_k = fv_model_is_latent(spec),
            .rope_gap_bytes = rope_gap_bytes(item),
            .norm_alpha = norm_alpha(spec, part),
            .norm_eps = spec->latent_norm.eps,
            .k = k + first * io->k_token_bytes,
            .v = fv_model_is_latent(spec) ? NULL : (v + first * io->v_token_bytes),
            .k_token_bytes = io->k_token_bytes,
            .v_token_bytes = io->v_token_bytes,
            .local_begin = run.local_begin,
            .n_tokens = run.n_tokens,
            .pages = item->layer->pages,
            .pages_head_stride = item->layer->stride};
        n_done += run.n_tokens;
    }
    return FV_OK;
}

static fv_status_t reserve_item(fv_worker_t *worker, fv_step_item_t *item)
{
    fv_step_work_t *w = &worker->work;
    size_t n_before = w->n_appends;
    size_t n_copies = 0;

    item->first_entry = item->layer->n_pages;
    if (item->share.n_kv_tokens == 0U) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_array_reserve(&w->copies, w->n_copies + (size_t)item->session->n_heads,
                                      sizeof(fv_page_copy_t)));
    FV_RETURN_IF_ERR(fv_session_reserve(item->session, item->ctl->layer, item->ctl->kv_end,
                                        worker->pool,
                                        (fv_page_copy_t *)w->copies.data + w->n_copies, &n_copies));
    item->first_entry -= (n_copies > 0U) ? 1U : 0U;
    item->first_copy = w->n_copies;
    item->n_copies = n_copies;
    w->n_copies +=
        n_copies; /* stay even if the next fails: the table points to the copies already */
    fv_status_t status = add_appends(w, item);
    item->first_append = n_before;
    item->n_appends = w->n_appends - n_before;
    if (status != FV_OK) {
        w->n_appends = n_before;
        item->n_appends = 0;
        fv_session_trim(item->session, item->ctl->layer, worker->pool);
    }
    return status;
}

/* ------------------------------------------------------------------ attend */

static fv_attn_item_t make_attend(const fv_step_item_t *item)
{
    const fv_ctl_item_t *ctl = item->ctl;
    const fv_session_t *session = item->session;
    const fv_model_spec_t *spec = &session->model->spec;
    const fv_step_io_t *io = item->io;
    size_t e = fv_dtype_bytes((fv_dtype_t)ctl->dtype);
    const fv_head_part_t *part = &item->share.part;
    size_t q_head = io->is_packed ? 0U : (size_t)part->q_head_begin;
    size_t latent = latent_begin_bytes(item);
    size_t out_head = (size_t)fv_item_out_dim(spec, ctl) * e;

    fv_attn_item_t a = {
        .n_tokens = (int32_t)ctl->n_tokens,
        .n_kv_heads = session->n_heads,
        .group = item->n_q_heads / session->n_heads,
        .kv_head_begin = part->head_begin,
        .head_dim_qk = part->head_dim_qk,
        .head_dim_v = part->head_dim_v,
        .v_in_k = fv_model_is_latent(spec),
        .io_dtype = ctl->dtype,
        .kv_dtype = spec->kv_dtype,
        .softmax_scale = spec->softmax_scale,
        .logit_softcap = spec->logit_softcap,
        .causal = (ctl->flags & FV_ITEM_CAUSAL) != 0,
        .policy = spec->policies[spec->layer_policy[ctl->layer]],
        .shard = {.shard_tokens = session->placement.shard_tokens,
                  .n_parts = session->placement.n_ctx_parts,
                  .part = (uint16_t)session->cp},
        .position = (int64_t)ctl->position,
        .kv_end = (int64_t)ctl->kv_end,
        .q = (const uint8_t *)io->q + q_head * (size_t)spec->head_dim_qk * e + latent,
        .q_token_bytes = io->q_token_bytes,
        .pages = item->layer->pages,
        .pages_head_stride = item->layer->stride,
        .table_id = session->table_id + ctl->layer,
        .table_version = item->layer->table_version,
        .n_table_pages = item->layer->n_pages,
    };
    if (spec->sharding.mode == FV_SHARDING_LATENT) {
        a.latent_mu = spec->sharding.mu[part->slice];
        if (!io->is_packed) {
            a.rope_gap_bytes = rope_gap_bytes(item);
            a.q_head_bytes = (size_t)spec->head_dim_qk * e;
            a.out_head_bytes = out_head;
        }
    }
    if ((item->share.n_parts == 1) || !item->share.is_answered) { /* whole rows: straight out */
        a.out = (uint8_t *)io->out + q_head * out_head +
                (io->is_packed ? 0U : ((size_t)fv_item_out_begin(part, ctl) * e));
        a.out_token_bytes = io->out_token_bytes;
        a.lse = (item->share.lse_bytes > 0U) ? (io->lse + q_head) : NULL;
        a.lse_token_stride = io->lse_token_stride;
    }
    return a;
}

/* What the backend's attend() would refuse, and the whole step with it, fails alone; before it has taken pages. */
static fv_status_t check_backend(const fv_worker_t *worker, const fv_step_item_t *item)
{
    const fv_backend_ops_t *ops = worker->config.backend;

    if ((ops->check_attend == NULL) || !item->share.is_answered) {
        return FV_OK;
    }
    fv_attn_item_t attend = make_attend(item);

    return ops->check_attend(worker->backend, &attend);
}

/* Pages, copies, appends and attention of every item that has not failed: enqueued, not waited for. */
static fv_status_t compute(fv_worker_t *worker, fv_error_t *item_errors)
{
    const fv_backend_ops_t *ops = worker->config.backend;
    fv_step_work_t *w = &worker->work;
    fv_attn_item_t *attends = w->attends.data;

    w->n_appends = 0;
    w->n_copies = 0;
    w->n_attends = 0;
    fv_exact_begin(worker);
    fv_move_begin(worker);
    for (size_t i = 0; i < w->n_items; i++) {
        fv_step_item_t *item = (fv_step_item_t *)w->items.data + i;

        if (!item->failed) {
            fv_status_t status = check_backend(worker, item);

            status = (status == FV_OK) ? reserve_item(worker, item) : status;
            if (status != FV_OK) {
                fail_item(item, status, &item_errors[i]);
            }
        }
        fv_attn_item_t attend = make_attend(item);

        FV_RETURN_IF_ERR(fv_partials_bind(worker, item, &attend));
        if (fv_model_adds_scores(&item->session->model->spec)) {
            FV_RETURN_IF_ERR(fv_exact_add(worker, item, &attend));
        } else if (item->share.n_movers > 0) {
            FV_RETURN_IF_ERR(fv_move_add(worker, item, &attend));
        } else if (!item->failed && item->share.is_answered) {
            attends[w->n_attends++] = attend;
        }
    }
    if (w->n_copies > 0U) { /* before any append: it may write into a page that is copied here */
        FV_RETURN_IF_ERR(ops->copy_pages(worker->backend, w->copies.data, w->n_copies));
    }
    if (w->n_appends > 0U) {
        FV_RETURN_IF_ERR(ops->append(worker->backend, w->appends.data, w->n_appends));
    }
    fv_fault_point(6);
    if (w->n_attends > 0U) {
        FV_RETURN_IF_ERR(ops->attend(worker->backend, attends, w->n_attends));
    }
    FV_RETURN_IF_ERR(fv_move_run(worker));
    fv_fault_point(7);
    if ((worker->store != NULL) && (worker->store->mirror != NULL)) { /* while the device works */
        FV_RETURN_IF_ERR(fv_mirror_write(worker->store->mirror, w->copies.data, w->n_copies,
                                         w->appends.data, w->n_appends));
    }
    return fv_exact_run(worker);
}

/* ------------------------------------------------------------------ the step */

/* What became of an item's layer, for the journal. */
static void note_item(fv_worker_t *worker, const fv_step_item_t *item, bool frees)
{
    const fv_store_entries_t entries = {.layer = item->ctl->layer,
                                        .first = item->first_entry,
                                        .n_entries = item->layer->n_pages - item->first_entry,
                                        .frees = frees ? 1U : 0U,
                                        .length = item->layer->length,
                                        .position = item->ctl->position};

    fv_store_note_entries(worker, item->ctl->session_slot, item->session, &entries);
}

/* A step that is not done has changed nothing: its copies may not even have been made. */
static void undo_item(fv_worker_t *worker, const fv_step_item_t *item)
{
    fv_session_share_again(item->session, item->ctl->layer, item->first_entry,
                           (const fv_page_copy_t *)worker->work.copies.data + item->first_copy,
                           item->n_copies, worker->pool);
    fv_session_trim(item->session, item->ctl->layer, worker->pool);
}

/* Ranks may differ in these failures: on others the append is in. The rest any rank would find. */
static bool is_own_failure(const fv_error_t *error)
{
    return (error->status == FV_ERR_EXHAUSTED) || (error->status == FV_ERR_UNIMPLEMENTED);
}

/* Lengths advance, or the tables become as they were. */
static fv_status_t settle(fv_worker_t *worker, const fv_error_t *item_errors, bool is_done)
{
    fv_step_work_t *w = &worker->work;

    for (size_t i = 0; i < w->n_items; i++) {
        const fv_step_item_t *item = (const fv_step_item_t *)w->items.data + i;

        if ((item->ctl->flags & FV_ITEM_APPEND) == 0) {
            continue;
        }
        if (!is_done) {
            undo_item(worker, item);
            continue;
        }
        if (!item->failed) {
            item->layer->length = item->ctl->kv_end;
        }
        /* all ranks free alike; a later piece of an append frees nothing, so that the whole of it can be undone, and
         * asked for again, like one that came in one piece */
        bool frees = ((item->ctl->flags & FV_ITEM_CONTINUES) == 0) &&
                     (!item->failed || is_own_failure(&item_errors[i]));
        if (w->is_store_full) { /* then no append got anywhere, and nothing can be noted */
            continue;
        }
        if (worker->store != NULL) {
            fv_store_disk_note_item(worker, item);
            note_item(worker, item, frees);
        }
        if (frees) {
            fv_session_settle(item->session, item->ctl->layer, item->ctl->position, worker->pool);
        }
    }
    return is_done ? fv_store_commit(worker) : FV_OK;
}

static uint32_t micros(int64_t from, int64_t to)
{
    int64_t us = to - from;

    return (us > UINT32_MAX) ? UINT32_MAX : (uint32_t)us;
}

static fv_error_t first_error(const fv_error_t *item_errors, size_t n_items, uint32_t *out_n)
{
    fv_error_t first = {.status = FV_OK};

    *out_n = 0;
    for (size_t i = 0; i < n_items; i++) {
        if (item_errors[i].status != FV_OK) {
            first = (*out_n == 0U) ? item_errors[i] : first;
            *out_n = (uint32_t)n_items; /* one entry per item follows, good ones too */
        }
    }
    return first;
}

fv_status_t fv_worker_step(fv_worker_t *worker,
                           const fv_ctl_item_t *items,
                           const fv_step_io_t *io,
                           size_t n_items,
                           fv_ctl_done_t *out_done,
                           fv_error_t *item_errors)
{
    int64_t t_begin = fv_clock_us();
    const fv_step_work_t *w = &worker->work;
    fv_step_times_t times = {.computed_us = t_begin};

    memset(out_done, 0, sizeof(*out_done));
    FV_RETURN_IF_ERR(fv_worker_usable(worker));
    FV_RETURN_IF_ERR(plan(worker, items, io, n_items, item_errors));
    fv_status_t status = fv_partials_finish(worker, compute(worker, item_errors), &times);
    fv_status_t settled = settle(worker, item_errors, status == FV_OK);
    status = (status == FV_OK) ? settled : status;
    if (status != FV_OK) {
        return fv_worker_break(worker, status);
    }
    int64_t exchanged_us = w->exact.exchange_us + w->move.exchange_us; /* before the end */
    out_done->compute_us = times.device.is_known
                               ? times.device.compute_us
                               : micros(t_begin + exchanged_us, times.computed_us);
    /* through host memory the host's clock sees all of it */
    out_done->exchange_us =
        (times.device.is_known && times.is_exchange_known)
            ? times.device.exchange_us
            : (micros(times.computed_us, fv_clock_us()) + micros(0, exchanged_us));
    out_done->error = first_error(item_errors, n_items, &out_done->n_items);
    fv_worker_memory(worker, &out_done->memory);
    return FV_OK;
}
