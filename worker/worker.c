/*
 * worker.c - a rank's worker: its life, its models and sessions.
 */
#include "worker/worker.h"

#include "common/log.h"
#include "worker/exact.h"
#include "worker/internal.h"
#include "worker/move.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------ life */

static fv_status_t create_parts(fv_worker_t *worker)
{
    const fv_worker_config_t *c = &worker->config;

    fv_backend_config_t backend = c->backend_config;

    if ((c->move_bytes % FV_PAGE_UNIT != 0U) || (c->move_bytes > backend.kv_arena_bytes)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "move_bytes: given %zu, expected a multiple of %d up to the KV memory, %zu",
                       c->move_bytes, FV_PAGE_UNIT, backend.kv_arena_bytes);
    }
    FV_RETURN_IF_ERR(
        fv_kv_pool_create(backend.kv_arena_bytes - fv_move_served_bytes(worker), 0, &worker->pool));
    worker->work.peers = calloc(c->n_ranks, sizeof(*worker->work.peers));
    if (worker->work.peers == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "worker: no host memory");
    }
    FV_RETURN_IF_ERR(fv_store_open(c, &backend, &worker->store));
    FV_RETURN_IF_ERR(c->backend->create(&backend, &worker->backend));
    FV_RETURN_IF_ERR(fv_store_load(worker));
    if ((c->exchange == NULL) || (c->exchange->attach == NULL)) {
        return FV_OK;
    }
    return c->exchange->attach(c->exchange_ctx, worker->backend);
}

fv_status_t fv_worker_create(const fv_worker_config_t *config, fv_worker_t **out)
{
    if ((config->backend == NULL) || (config->rank >= config->n_ranks) ||
        ((config->exchange == NULL) && (config->n_ranks > 1U))) {
        return fv_fail(
            FV_ERR_INVALID_ARG,
            "worker: rank %u of %u, expected a backend, and an exchange for several ranks",
            config->rank, config->n_ranks);
    }
    fv_worker_t *worker = calloc(1, sizeof(*worker));
    if (worker == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "worker: no host memory");
    }
    worker->config = *config;
    if (worker->config.step_deadline_ms == 0U) {
        worker->config.step_deadline_ms = FV_WORKER_DEADLINE_MS;
    }
    fv_status_t status = create_parts(worker);
    if (status != FV_OK) {
        fv_worker_destroy(worker);
        return status;
    }
    *out = worker;
    return FV_OK;
}

/* Buffers that messages given up may still read or write. Reachable for ever: the leak is meant. */
typedef struct abandoned {
    struct abandoned *next;
    fv_host_buffer_t buffers[3 + 2 * FV_STEP_DEPTH];
} abandoned_t;

static _Atomic(abandoned_t *) s_abandoned;

static void abandon_buffers(const fv_worker_t *worker)
{
    abandoned_t *a = malloc(sizeof(*a));

    if (a != NULL) { /* without it they leak unseen: as good */
        memcpy(a->buffers, worker->in, sizeof(worker->in));
        memcpy(a->buffers + FV_STEP_DEPTH, worker->out, sizeof(worker->out));
        a->buffers[2 * FV_STEP_DEPTH] = worker->work.exchange;
        a->buffers[2 * FV_STEP_DEPTH + 1] = worker->work.exact.buffer;
        a->buffers[2 * FV_STEP_DEPTH + 2] = worker->work.move.buffer;
        a->next = atomic_load(&s_abandoned);
        while (!atomic_compare_exchange_weak(&s_abandoned, &a->next, a)) {
        }
    }
}

void fv_worker_renew(fv_worker_t *worker)
{
    if (worker->broken == FV_OK) {
        return;
    }
    abandon_buffers(worker);
    memset(worker->in, 0, sizeof(worker->in));
    memset(worker->out, 0, sizeof(worker->out));
    memset(&worker->work.exchange, 0, sizeof(worker->work.exchange));
    memset(&worker->work.exact.buffer, 0, sizeof(worker->work.exact.buffer));
    memset(&worker->work.move.buffer, 0, sizeof(worker->work.move.buffer));
    worker->broken = FV_OK;
}

static void free_work(fv_worker_t *worker)
{
    const fv_backend_ops_t *ops = worker->config.backend;
    fv_step_work_t *w = &worker->work;

    fv_array_free(&w->items);
    fv_array_free(&w->attends);
    fv_array_free(&w->appends);
    fv_array_free(&w->copies);
    fv_array_free(&w->merges);
    fv_array_free(&w->dsts);
    fv_array_free(&w->parts);
    fv_array_free(&w->messages);
    fv_array_free(&w->with);
    fv_exact_free(&w->exact);
    fv_move_free(&w->move);
    free(w->peers);
    if (worker->broken != FV_OK) {
        abandon_buffers(worker);
        return;
    }
    fv_host_buffer_free(&w->exchange, ops, worker->backend);
    fv_host_buffer_free(&w->exact.buffer, ops, worker->backend);
    fv_host_buffer_free(&w->move.buffer, ops, worker->backend);
    for (size_t i = 0; i < FV_STEP_DEPTH; i++) {
        fv_host_buffer_free(&worker->in[i], ops, worker->backend);
        fv_host_buffer_free(&worker->out[i], ops, worker->backend);
    }
}

void fv_worker_destroy(fv_worker_t *worker)
{
    if (worker == NULL) {
        return;
    }
    for (uint32_t i = 0; i < worker->n_session_slots; i++) {
        /* what was found and not counted yet has no references */
        bool is_counted = (worker->store == NULL) || !worker->store->is_attaching;
        fv_session_destroy(fv_worker_session(worker, i), is_counted ? worker->pool : NULL);
    }
    for (size_t i = 0; i < FV_MODELS_MAX; i++) {
        free(worker->models[i]);
    }
    free_work(worker);
    fv_array_free(&worker->sessions);
    fv_array_free(&worker->ios);
    fv_array_free(&worker->store_refs);
    fv_array_free(&worker->store_tags);
    worker->config.backend->destroy(worker->backend);
    fv_kv_pool_destroy(worker->pool);
    fv_store_close(worker->store);
    free(worker);
}

fv_status_t fv_worker_break(fv_worker_t *worker, fv_status_t status)
{
    if (status != FV_ERR_ABORTED) { /* given up for another epoch */
        fv_error("worker %u can not go on: %s (%s)", worker->config.rank, fv_error_context(),
                 fv_status_str(status));
    }
    worker->broken = status;
    return status;
}

fv_status_t fv_worker_usable(const fv_worker_t *worker)
{
    if (worker->broken != FV_OK) {
        return fv_fail(worker->broken, "rank %u failed in an earlier step and must be restarted",
                       worker->config.rank);
    }
    if ((worker->store != NULL) && worker->store->is_attaching) {
        return fv_fail(FV_ERR_PROTOCOL, "rank %u has not been told what to keep of its store",
                       worker->config.rank);
    }
    return FV_OK;
}

void fv_worker_prefetch(fv_worker_t *worker, const void *data, size_t n_bytes)
{
    if (worker->config.backend->prefetch != NULL) {
        worker->config.backend->prefetch(worker->backend, data, n_bytes);
    }
}

void fv_worker_on_wait(fv_worker_t *worker, void (*on_wait)(void *arg), void *arg)
{
    worker->on_wait = on_wait;
    worker->on_wait_arg = arg;
}

/* Lets others use the time, and hears whether waiting is in vain. */
static bool ask(void *arg)
{
    fv_worker_t *worker = arg;
    const fv_worker_config_t *c = &worker->config;

    worker->has_asked = true;
    if ((c->exchange != NULL) && (c->exchange->is_aborted != NULL)) {
        return c->exchange->is_aborted(c->exchange_ctx);
    }
    if (worker->on_wait != NULL) {
        worker->on_wait(worker->on_wait_arg);
    }
    return false;
}

fv_status_t fv_worker_finish(fv_worker_t *worker, fv_device_times_t *out_times)
{
    const fv_worker_config_t *c = &worker->config;
    const fv_wait_limits_t limits = {
        .deadline_ms = c->step_deadline_ms, .is_aborted = ask, .arg = worker};

    worker->has_asked = false;
    if (!c->backend->is_async) {
        (void)ask(worker); /* bad news keep until it is asked again */
    }
    fv_status_t status = c->backend->finish(worker->backend, &limits, out_times);
    if (!worker->has_asked) { /* the device was done before it was waited for */
        (void)ask(worker);
    }
    return status;
}

fv_status_t fv_worker_host_alloc(fv_worker_t *worker, size_t n_bytes, void **out)
{
    return worker->config.backend->host_alloc(worker->backend, n_bytes, out);
}

void fv_worker_host_free(fv_worker_t *worker, void *memory)
{
    worker->config.backend->host_free(worker->backend, memory);
}

/* ------------------------------------------------------------------ what it says of itself */

void fv_worker_memory(const fv_worker_t *worker, fv_ctl_memory_t *out)
{
    fv_kv_pool_stats_t stats;

    fv_kv_pool_stats(worker->pool, &stats);
    *out = (fv_ctl_memory_t){.kv_bytes_total = stats.bytes_total,
                             .kv_bytes_free = stats.bytes_free,
                             .slab_bytes = (uint32_t)stats.slab_bytes,
                             .n_slabs_free = stats.n_slabs_free};
    for (size_t i = 0; i < FV_MODELS_MAX; i++) {
        if (worker->models[i] != NULL) {
            out->n_pages_free[i] =
                fv_kv_pool_pages_free(worker->pool, worker->models[i]->page_class);
        }
    }
}

void fv_worker_hello(const fv_worker_t *worker, fv_ctl_hello_t *out)
{
    fv_device_info_t info = {0};

    worker->config.backend->describe(worker->backend, &info);
    memset(out, 0, sizeof(*out));
    out->rank = worker->config.rank;
    out->n_threads = (uint32_t)info.n_threads;
    out->has_latent = worker->config.backend->has_latent ? 1U : 0U;
    out->has_fp8_latent = worker->config.backend->has_fp8_latent ? 1U : 0U;
    out->has_exact = fv_exact_is_served(worker) ? 1U : 0U;
    out->move_kib = (uint32_t)(fv_move_served_bytes(worker) / 1024U);
    (void)snprintf(out->backend, sizeof(out->backend), "%s", worker->config.backend->name);
    (void)snprintf(out->device, sizeof(out->device), "%s", info.device);
    fv_worker_memory(worker, &out->memory);
}

/* ------------------------------------------------------------------ models and sessions */

fv_session_t *fv_worker_session(const fv_worker_t *worker, uint32_t slot)
{
    return (slot < worker->n_session_slots) ? ((fv_session_t **)worker->sessions.data)[slot] : NULL;
}

fv_status_t fv_worker_add_model(fv_worker_t *worker, uint32_t slot, const fv_model_spec_t *spec)
{
    fv_worker_model_t *model = calloc(1, sizeof(*model));
    if (model == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "model: no host memory");
    }
    model->spec = *spec;
    fv_status_t status = fv_model_spec_check(&model->spec);
    if ((status == FV_OK) && fv_model_is_latent(&model->spec) &&
        !worker->config.backend->has_latent) {
        status = fv_fail(FV_ERR_UNIMPLEMENTED, "spec.kind: LATENT is not served by the %s backend",
                         worker->config.backend->name);
    }
    if ((status == FV_OK) && (model->spec.kv_dtype == (int32_t)FV_DTYPE_FP8_LATENT) &&
        !worker->config.backend->has_fp8_latent) {
        status = fv_fail(FV_ERR_UNIMPLEMENTED,
                         "spec.kv_dtype: FP8_LATENT is not served by the %s backend",
                         worker->config.backend->name);
    }
    if ((status == FV_OK) && fv_model_adds_scores(&model->spec) && !fv_exact_is_served(worker)) {
        status = fv_fail(FV_ERR_UNIMPLEMENTED,
                         "spec.sharding.exact: given true, which the %s backend does not serve",
                         worker->config.backend->name);
    }
    if (status == FV_OK) {
        status =
            fv_kv_pool_class(worker->pool, fv_model_page_bytes(&model->spec), &model->page_class);
    }
    if (status != FV_OK) {
        free(model);
        return status;
    }
    worker->models[slot] = model;
    return FV_OK;
}

/* A model that the store has, too: it is kept, or it is of files of another time, and goes with its sessions. */
static bool keep_model(fv_worker_t *worker, const fv_ctl_model_t *message)
{
    fv_worker_model_t *model = worker->models[message->model_slot];

    if ((model == NULL) || (worker->store == NULL) || !worker->store->is_attaching) {
        return false;
    }
    if (!fv_model_spec_equal(&model->spec, &message->spec)) {
        if (!model->is_kept) {
            fv_store_forget_model(worker, message->model_slot);
        }
        return false;
    }
    model->is_kept = true;
    return true;
}

fv_status_t fv_worker_model(fv_worker_t *worker, const fv_ctl_model_t *message)
{
    uint32_t slot = message->model_slot;

    if ((slot < FV_MODELS_MAX) && keep_model(worker, message)) {
        return FV_OK;
    }
    if ((slot >= FV_MODELS_MAX) || (worker->models[slot] != NULL)) {
        return fv_fail(FV_ERR_PROTOCOL, "model slot %u: expected a free one below %d", slot,
                       FV_MODELS_MAX);
    }
    FV_RETURN_IF_ERR(fv_worker_add_model(worker, slot, &message->spec));
    worker->models[slot]->is_kept = true;
    return fv_store_note_model(worker, slot);
}

/* Room for session slot `slot`, which must be empty. */
fv_status_t fv_worker_claim_slot(fv_worker_t *worker, uint32_t slot)
{
    if ((slot >= FV_SESSION_SLOTS_MAX) || (fv_worker_session(worker, slot) != NULL)) {
        return fv_fail(FV_ERR_PROTOCOL, "session slot %u: expected a free one below %u", slot,
                       FV_SESSION_SLOTS_MAX);
    }
    if (slot >= worker->n_session_slots) {
        FV_RETURN_IF_ERR(
            fv_array_reserve(&worker->sessions, (size_t)slot + 1U, sizeof(fv_session_t *)));
        fv_session_t **sessions = worker->sessions.data;
        for (uint32_t i = worker->n_session_slots; i <= slot; i++) {
            sessions[i] = NULL;
        }
        worker->n_session_slots = slot + 1U;
    }
    return FV_OK;
}

fv_status_t fv_worker_check_placement(const fv_worker_t *worker,
                                      const fv_model_spec_t *spec,
                                      const fv_placement_t *p)
{
    uint32_t n_cells = (uint32_t)p->n_head_parts * p->n_ctx_parts;
    int32_t groups = fv_model_groups(spec);
    int32_t n_heads = fv_model_is_latent(spec) ? (groups * spec->n_q_heads) : spec->n_kv_heads;

    if ((n_cells == 0U) || (n_cells > FV_PLACEMENT_RANKS_MAX) || (p->n_head_parts > n_heads) ||
        (p->n_head_parts % groups != 0)) {
        return fv_fail(FV_ERR_PROTOCOL, "placement: %u x %u parts for %d heads, %d groups",
                       p->n_head_parts, p->n_ctx_parts, n_heads, groups);
    }
    if ((p->shard_tokens == 0U) || (p->shard_tokens % FV_PAGE_TOKENS != 0U)) {
        return fv_fail(FV_ERR_PROTOCOL,
                       "placement: shard_tokens given %u, expected a multiple of %d",
                       p->shard_tokens, FV_PAGE_TOKENS);
    }
    for (uint32_t i = 0; i < n_cells; i++) {
        if ((p->ranks[i] >= worker->config.n_ranks) ||
            (fv_placement_cell(p, p->ranks[i]) != (int32_t)i)) {
            return fv_fail(FV_ERR_PROTOCOL, "placement: rank %u, expected distinct ones below %u",
                           p->ranks[i], worker->config.n_ranks);
        }
    }
    return FV_OK;
}

/* A new session, and whether it is in the journal. */
static fv_status_t
settle_new(fv_worker_t *worker, uint32_t slot, fv_session_t *session, fv_status_t status)
{
    if (status != FV_OK) {
        fv_session_destroy(session, worker->pool);
        return status;
    }
    ((fv_session_t **)worker->sessions.data)[slot] = session;
    return FV_OK;
}

fv_status_t fv_worker_open(fv_worker_t *worker, const fv_ctl_open_t *message)
{
    uint32_t slot = message->session_slot;

    FV_RETURN_IF_ERR(fv_worker_usable(worker));
    if ((message->model_slot >= FV_MODELS_MAX) || (worker->models[message->model_slot] == NULL)) {
        return fv_fail(FV_ERR_PROTOCOL, "open: model slot %u is unknown", message->model_slot);
    }
    const fv_worker_model_t *model = worker->models[message->model_slot];
    FV_RETURN_IF_ERR(fv_worker_check_placement(worker, &model->spec, &message->placement));
    FV_RETURN_IF_ERR(fv_worker_claim_slot(worker, slot));
    fv_session_t *session = NULL;
    FV_RETURN_IF_ERR(fv_session_create(model, message->model_slot, &message->placement,
                                       worker->config.rank, &session));
    session->id = message->id;
    return settle_new(worker, slot, session, fv_store_note_open(worker, slot, session));
}

/* A session that a message names. */
static fv_status_t find_session(const fv_worker_t *worker, uint32_t slot, fv_session_t **out)
{
    FV_RETURN_IF_ERR(fv_worker_usable(worker));
    *out = fv_worker_session(worker, slot);
    if (*out == NULL) {
        return fv_fail(FV_ERR_PROTOCOL, "session slot %u is not open", slot);
    }
    return FV_OK;
}

fv_status_t fv_worker_fork(fv_worker_t *worker, const fv_ctl_fork_t *message)
{
    fv_session_t *parent = NULL;

    FV_RETURN_IF_ERR(find_session(worker, message->parent_slot, &parent));
    FV_RETURN_IF_ERR(fv_worker_claim_slot(worker, message->session_slot));
    fv_session_t *child = NULL;
    FV_RETURN_IF_ERR(fv_session_fork(parent, message->at_position, worker->pool, &child));
    child->id = message->id;
    return settle_new(worker, message->session_slot, child,
                      fv_store_note_fork(worker, message, child));
}

fv_status_t fv_worker_truncate(fv_worker_t *worker, const fv_ctl_truncate_t *message)
{
    fv_session_t *session = NULL;

    FV_RETURN_IF_ERR(find_session(worker, message->session_slot, &session));
    uint32_t n_layers = (uint32_t)session->model->spec.n_layers;
    bool is_all = message->layer == UINT32_MAX;
    if (!is_all && (message->layer >= n_layers)) {
        return fv_fail(FV_ERR_PROTOCOL, "truncate: layer given %u, expected less than %u",
                       message->layer, n_layers);
    }
    FV_RETURN_IF_ERR(fv_store_note_truncate(worker, message, session));
    if (session->layers == NULL) {
        return FV_OK;
    }
    for (uint32_t i = is_all ? 0U : message->layer; i < (is_all ? n_layers : message->layer + 1U);
         i++) {
        fv_session_truncate(session, i, message->position, worker->pool);
    }
    return FV_OK;
}

fv_status_t fv_worker_close(fv_worker_t *worker, const fv_ctl_close_t *message)
{
    fv_session_t *session = NULL;

    FV_RETURN_IF_ERR(find_session(worker, message->session_slot, &session));
    FV_RETURN_IF_ERR(fv_store_note_close(worker, message->session_slot, session));
    fv_session_destroy(session, worker->pool);
    ((fv_session_t **)worker->sessions.data)[message->session_slot] = NULL;
    return FV_OK;
}

uint64_t fv_worker_session_pages(const fv_worker_t *worker, uint32_t session_slot)
{
    const fv_session_t *session = fv_worker_session(worker, session_slot);

    return (session == NULL) ? 0U : fv_session_pages(session);
}
