/*
 * sched.c - the scheduler core's tables: models, sessions, ranks. Steps are formed in sched_step.c.
 */
#include "coord/sched.h"

#include "common/digest.h"
#include "common/policy.h"
#include "coord/sched_internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

fv_status_t fv_sched_create(const fv_sched_config_t *config, fv_sched_t **out)
{
    fv_sched_t *sched = calloc(1, sizeof(*sched));

    if (sched == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "scheduler");
    }
    sched->config = *config;
    sched->queue_tail = &sched->queue_head;
    fv_budget_init(&sched->budget, config->prefill_tokens_per_step);
    sched->ranks = calloc(config->n_ranks, sizeof(*sched->ranks));
    sched->pages_needed = calloc(config->n_ranks, sizeof(*sched->pages_needed));
    sched->touched_ranks = calloc(config->n_ranks, sizeof(*sched->touched_ranks));
    sched->promises = calloc((size_t)FV_PROMISES * config->n_ranks, sizeof(*sched->promises));
    fv_status_t status = FV_OK;
    if ((sched->promises == NULL) || (sched->ranks == NULL) || (sched->pages_needed == NULL) ||
        (sched->touched_ranks == NULL)) {
        status = fv_fail(FV_ERR_NO_MEMORY, "scheduler of %u ranks", config->n_ranks);
    }
    if (status == FV_OK) {
        status = fv_session_table_create(config->sessions_max, &sched->sessions);
    }
    if (status == FV_OK) {
        status = fv_planner_create(config->n_ranks, &config->cost, &sched->planner);
    }
    if (status != FV_OK) {
        fv_sched_destroy(sched);
        return status;
    }
    *out = sched;
    return FV_OK;
}

void fv_sched_destroy(fv_sched_t *sched)
{
    if (sched == NULL) {
        return;
    }
    fv_session_table_destroy(sched->sessions);
    fv_planner_destroy(sched->planner);
    free(sched->ranks);
    free(sched->promises);
    free(sched->pages_needed);
    free(sched->touched_ranks);
    free(sched);
}

void fv_sched_rank_memory(fv_sched_t *sched, uint32_t rank, const fv_ctl_memory_t *memory)
{
    if (sched->ranks[rank].kv_bytes_total != memory->kv_bytes_total) {
        fv_planner_set_rank(sched->planner, rank, memory->kv_bytes_total);
    }
    sched->ranks[rank] = *memory;
    fv_sched_deduct_promises(sched, rank);
}

const fv_ctl_memory_t *fv_sched_rank(const fv_sched_t *sched, uint32_t rank)
{
    return &sched->ranks[rank];
}

/* ------------------------------------------------------------------ models */

static int32_t find_model(const fv_sched_t *sched, const char *id)
{
    for (uint32_t i = 0; i < sched->n_models; i++) {
        if (strcmp(sched->models[i].id, id) == 0) {
            return (int32_t)i;
        }
    }
    return -1;
}

/* What a rank's backend does not compute is refused before any rank hears of it. */
static fv_status_t check_served(const fv_sched_t *sched, const fv_model_spec_t *spec)
{
    if (fv_model_is_latent(spec) && (sched->config.no_latent != NULL)) {
        return fv_fail(FV_ERR_UNIMPLEMENTED,
                       "spec.kind: LATENT is not served by the %s backend in this version",
                       sched->config.no_latent);
    }
    if ((spec->kv_dtype == (int32_t)FV_DTYPE_FP8_LATENT) && (sched->config.no_fp8 != NULL)) {
        return fv_fail(FV_ERR_UNIMPLEMENTED,
                       "spec.kv_dtype: FP8_LATENT is not served by the %s backend in this version",
                       sched->config.no_fp8);
    }
    if (fv_model_adds_scores(spec) && (sched->config.no_exact != NULL)) {
        return fv_fail(FV_ERR_UNIMPLEMENTED,
                       "spec.sharding.exact: given true, which the %s backend does not serve; "
                       "CONTEXT is as exact, and faster",
                       sched->config.no_exact);
    }
    return FV_OK;
}

/* So is a model whose pages some rank's slabs do not hold. */
static fv_status_t check_pages(const fv_sched_t *sched, const fv_model_spec_t *spec)
{
    size_t page_bytes = fv_model_page_bytes(spec);

    for (uint32_t r = 0; r < sched->config.n_ranks; r++) {
        const fv_ctl_memory_t *memory = &sched->ranks[r];

        if ((memory->kv_bytes_total > 0) && (memory->slab_bytes < page_bytes)) {
            return fv_fail(
                FV_ERR_EXHAUSTED,
                "spec: a page of %zu bytes does not fit the slabs of rank %u (%u bytes): "
                "give it more KV memory",
                page_bytes, r, memory->slab_bytes);
        }
    }
    return FV_OK;
}

fv_status_t fv_sched_register(fv_sched_t *sched,
                              fv_model_spec_t *spec,
                              fv_principal_t *owner,
                              fv_register_response_t *out,
                              bool *out_is_new,
                              fv_ctl_model_t *out_message)
{
    FV_RETURN_IF_ERR(fv_model_spec_check(spec));
    FV_RETURN_IF_ERR(check_served(sched, spec));
    FV_RETURN_IF_ERR(check_pages(sched, spec));
    fv_register_response_t response = {0};
    /* The id is the spec's own checksum, so it is the same after a restart. */
    (void)snprintf(response.model_id, sizeof(response.model_id), "m%016" PRIx64,
                   fv_crc64(spec, sizeof(*spec)));
    fv_sched_warn(spec, &response);
    int32_t known = find_model(sched, response.model_id);
    if (known >= 0) {
        if (!fv_model_spec_equal(&sched->models[known].spec, spec)) {
            return fv_fail(FV_ERR_ALREADY_EXISTS,
                           "spec: two models have the same checksum; change spec.name");
        }
        *out = response;
        *out_is_new = false;
        return FV_OK;
    }
    if (owner != NULL) {
        FV_RETURN_IF_ERR(fv_principal_check_model(owner));
    }
    if (sched->n_models == FV_MODELS_MAX) {
        return fv_fail(FV_ERR_EXHAUSTED, "models: %u are registered, the most this service holds",
                       sched->n_models);
    }
    fv_model_t *model = &sched->models[sched->n_models];
    memcpy(model->id, response.model_id, sizeof(model->id));
    model->spec = *spec;
    *out_message = (fv_ctl_model_t){.model_slot = sched->n_models, .spec = *spec};
    sched->n_models++;
    fv_sched_own_model(sched, sched->n_models - 1U, owner);
    *out = response;
    *out_is_new = true;
    return FV_OK;
}

void fv_sched_unregister_last(fv_sched_t *sched, fv_principal_t *owner)
{
    sched->n_models--;
    sched->models[sched->n_models].owner = NULL;
    if (owner != NULL) {
        owner->n_models--;
    }
}

/* ------------------------------------------------------------------ sessions */

void fv_sched_account(fv_sched_t *sched, fv_session_t *session, int32_t cell, uint64_t held_bytes)
{
    if (session->owner != NULL) {
        session->owner->kv_bytes += held_bytes - session->held[cell];
    }
    session->held[cell] = held_bytes;
    if (held_bytes > session->accounted[cell]) {
        fv_planner_account(sched->planner, session->placement.ranks[cell],
                           (int64_t)(held_bytes - session->accounted[cell]));
        session->accounted[cell] = held_bytes;
    }
}

static fv_status_t
find_session(const fv_sched_t *sched, const fv_session_id_t *id, fv_session_t **out)
{
    fv_session_t *session = fv_session_find(sched->sessions, id);

    if (session == NULL) {
        char hex[FV_SESSION_ID_CHARS + 1];
        fv_session_id_format(id, hex);
        return fv_fail(FV_ERR_NOT_FOUND, "session_id: no session %s", hex);
    }
    *out = session;
    return FV_OK;
}

static int32_t n_cells(const fv_placement_t *placement)
{
    return placement->n_head_parts * placement->n_ctx_parts;
}

/* At opening the planner is told what the hint promises, at least the first page of every layer. */
static void account_opening(fv_sched_t *sched, fv_session_t *session, uint64_t hint)
{
    const fv_model_spec_t *spec = &sched->models[session->model_slot].spec;
    uint64_t n_tokens = (hint == 0) ? 1U : hint;

    for (int32_t i = 0; i < spec->n_layers; i++) { /* for a moment as it is expected to become */
        session->layers[i].n_tokens = n_tokens;
        session->layers[i].floor = n_tokens - 1U;
    }
    for (int32_t cell = 0; cell < n_cells(&session->placement); cell++) {
        uint64_t bytes = fv_session_cell_bytes(session, spec, cell);
        fv_planner_account(sched->planner, session->placement.ranks[cell], (int64_t)bytes);
        session->accounted[cell] = bytes;
    }
    for (int32_t i = 0; i < spec->n_layers; i++) {
        session->layers[i].n_tokens = 0;
        session->layers[i].floor = 0;
    }
}

static void set_birth(fv_session_t *session, const fv_birth_t *birth, fv_principal_t *owner)
{
    session->created_unix_ms = birth->now_unix_ms;
    session->used_us = birth->now_us;
    session->owner = owner;
    if (owner != NULL) {
        owner->n_sessions++;
    }
}

static fv_status_t check_session_quota(const fv_principal_t *owner)
{
    return (owner == NULL) ? FV_OK : fv_principal_check_session(owner);
}

/* Slices decide how large a page is and what a model computes: they are the model's, not a session's. */
static fv_status_t check_override(const fv_model_spec_t *spec, const fv_sharding_t *given)
{
    bool is_latent = spec->sharding.mode == FV_SHARDING_LATENT;

    if (is_latent != (given->mode == FV_SHARDING_LATENT)) {
        return fv_fail(
            FV_ERR_INVALID_ARG,
            "sharding.mode: given %d, expected %s: register a model of its own for the other",
            given->mode,
            is_latent ? "LATENT, as its model says" : "no LATENT, as its model says none");
    }
    if (is_latent &&
        ((given->groups != spec->sharding.groups) || (given->exact != spec->sharding.exact) ||
         ((given->n_alpha | given->n_mu) != 0))) {
        return fv_fail(
            FV_ERR_INVALID_ARG,
            "sharding.groups: given %d with %d alpha, %d mu and exact = %d, expected the model's "
            "%d, no factors and exact = %d",
            given->groups, given->n_alpha, given->n_mu, given->exact, spec->sharding.groups,
            spec->sharding.exact);
    }
    return FV_OK;
}

fv_status_t fv_sched_open(fv_sched_t *sched,
                          const fv_open_request_t *request,
                          const fv_birth_t *birth,
                          fv_ctl_open_t *out_message)
{
    int32_t slot = find_model(sched, request->model_id);

    if (slot < 0) {
        return fv_fail(FV_ERR_NOT_FOUND, "model_id: no model \"%s\"", request->model_id);
    }
    if (request->max_tokens_hint > FV_POSITION_MAX) { /* byte counts of more would wrap */
        return fv_fail(FV_ERR_INVALID_ARG, "max_tokens_hint: given %llu, expected at most %llu",
                       (unsigned long long)request->max_tokens_hint,
                       (unsigned long long)FV_POSITION_MAX);
    }
    const fv_model_spec_t *spec = &sched->models[slot].spec;
    fv_model_spec_t overridden = *spec;
    if (request->sharding.is_set != 0) {
        FV_RETURN_IF_ERR(check_override(spec, &request->sharding));
        overridden.sharding = request->sharding;
        FV_RETURN_IF_ERR(fv_model_spec_check(&overridden));
    }
    FV_RETURN_IF_ERR(check_session_quota(birth->owner));
    fv_placement_t placement = {0};
    char reason[FV_PLAN_REASON_BYTES] = "";
    FV_RETURN_IF_ERR(fv_planner_place(sched->planner, spec, &overridden.sharding,
                                      sched->config.shard_tokens, request->max_tokens_hint,
                                      &placement, reason));
    fv_session_t *session = NULL;
    FV_RETURN_IF_ERR(fv_session_add(sched->sessions, &birth->id, spec->n_layers, &session));
    session->model_slot = (uint32_t)slot;
    session->closes_with_stream = request->close_with_stream;
    set_birth(session, birth, birth->owner);
    session->placement = placement;
    memcpy(session->reason, reason, sizeof(session->reason));
    account_opening(sched, session, request->max_tokens_hint);
    *out_message = (fv_ctl_open_t){.session_slot = session->slot,
                                   .model_slot = session->model_slot,
                                   .id = session->id,
                                   .placement = placement};
    return FV_OK;
}

/* A layer cut to `position` must still have what the next query reads. */
static fv_status_t check_cut(const fv_sched_t *sched,
                             const fv_session_t *session,
                             const char *field,
                             uint64_t position)
{
    const fv_model_spec_t *spec = &sched->models[session->model_slot].spec;

    for (int32_t i = 0; i < session->n_layers; i++) {
        const fv_layer_t *layer = &session->layers[i];

        if ((position < layer->n_tokens) &&
            !fv_policy_is_readable(&spec->policies[spec->layer_policy[i]], spec->n_kv_heads,
                                   fv_model_group(spec), (int64_t)layer->floor, (int64_t)position,
                                   (int64_t)position)) {
            return fv_fail(FV_ERR_PRECONDITION,
                           "%s: given %" PRIu64 ", expected %" PRIu64
                           " (the last append) or more, or 0: layer %d's policy has freed KV that "
                           "queries before it read",
                           field, position, layer->floor, i);
        }
    }
    return FV_OK;
}

/* The fork's tables as its parent's up to at_position. */
static fv_status_t copy_parent(fv_session_t *parent, uint64_t at_position, fv_session_t *child)
{
    child->model_slot = parent->model_slot;
    child->placement = parent->placement;
    child->parent = parent->id;
    child->has_parent = true;
    child->is_forked = true;
    child->closes_with_stream = parent->closes_with_stream;
    memcpy(child->reason, parent->reason, sizeof(child->reason));
    for (int32_t i = 0; i < parent->n_layers; i++) {
        FV_RETURN_IF_ERR(fv_layer_fork(&parent->layers[i], at_position, &child->layers[i]));
    }
    return FV_OK;
}

/* A fork counts in full: what it would hold alone. */
static fv_status_t check_fork_quota(const fv_sched_t *sched, const fv_session_t *child)
{
    uint64_t n_bytes = 0;

    for (int32_t cell = 0; cell < n_cells(&child->placement); cell++) {
        n_bytes += fv_session_cell_bytes(child, &sched->models[child->model_slot].spec, cell);
    }
    return fv_principal_check_kv(child->owner, n_bytes);
}

fv_status_t fv_sched_fork(fv_sched_t *sched,
                          const fv_session_id_t *parent_id,
                          uint64_t at_position,
                          const fv_birth_t *birth,
                          fv_ctl_fork_t *out_message,
                          fv_placement_t *out_placement)
{
    fv_session_t *parent = NULL;
    fv_session_t *child = NULL;

    FV_RETURN_IF_ERR(find_session(sched, parent_id, &parent));
    uint64_t n_tokens = fv_session_tokens(parent);
    if ((at_position != UINT64_MAX) && (at_position > n_tokens)) {
        return fv_fail(FV_ERR_OUT_OF_RANGE,
                       "at_position: given %" PRIu64 ", the session has %" PRIu64 " tokens",
                       at_position, n_tokens);
    }
    FV_RETURN_IF_ERR(check_cut(sched, parent, "at_position", at_position));
    FV_RETURN_IF_ERR(check_session_quota(parent->owner));
    FV_RETURN_IF_ERR(fv_session_add(sched->sessions, &birth->id, parent->n_layers, &child));
    child->owner = parent->owner;
    fv_status_t status = copy_parent(parent, at_position, child);
    if ((status == FV_OK) && (child->owner != NULL)) {
        status = check_fork_quota(sched, child);
    }
    if (status != FV_OK) {
        fv_session_remove(sched->sessions, child);
        return status;
    }
    set_birth(child, birth, parent->owner);
    parent->is_forked = true;
    parent->used_us = birth->now_us;
    for (int32_t cell = 0; cell < n_cells(&child->placement); cell++) {
        fv_sched_account(
            sched, child, cell,
            fv_session_cell_bytes(child, &sched->models[child->model_slot].spec, cell));
    }
    *out_message = (fv_ctl_fork_t){.session_slot = child->slot,
                                   .parent_slot = parent->slot,
                                   .at_position = at_position,
                                   .id = child->id};
    *out_placement = child->placement;
    return FV_OK;
}

fv_status_t fv_sched_truncate(fv_sched_t *sched,
                              const fv_session_id_t *id,
                              uint64_t position,
                              fv_ctl_truncate_t *out_message,
                              fv_placement_t *out_placement)
{
    fv_session_t *session = NULL;

    FV_RETURN_IF_ERR(find_session(sched, id, &session));
    uint64_t n_tokens = fv_session_tokens(session);
    if (position > n_tokens) {
        return fv_fail(FV_ERR_OUT_OF_RANGE,
                       "position: given %" PRIu64 ", the session has %" PRIu64 " tokens", position,
                       n_tokens);
    }
    FV_RETURN_IF_ERR(check_cut(sched, session, "position", position));
    for (int32_t i = 0; i < session->n_layers; i++) {
        fv_layer_truncate(&session->layers[i], position, session->is_forked);
    }
    for (int32_t cell = 0; cell < n_cells(&session->placement); cell++) {
        fv_sched_account(
            sched, session, cell,
            fv_session_cell_bytes(session, &sched->models[session->model_slot].spec, cell));
    }
    *out_message = (fv_ctl_truncate_t){
        .session_slot = session->slot, .layer = UINT32_MAX, .position = position};
    *out_placement = session->placement;
    return FV_OK;
}

fv_status_t fv_sched_close(fv_sched_t *sched,
                           const fv_session_id_t *id,
                           fv_ctl_close_t *out_message,
                           fv_placement_t *out_placement)
{
    fv_session_t *session = NULL;

    FV_RETURN_IF_ERR(find_session(sched, id, &session));
    *out_message = (fv_ctl_close_t){.session_slot = session->slot};
    *out_placement = session->placement;
    for (int32_t cell = 0; cell < n_cells(&session->placement); cell++) {
        fv_planner_account(sched->planner, session->placement.ranks[cell],
                           -(int64_t)session->accounted[cell]);
        fv_sched_account(sched, session, cell, 0);
    }
    if (session->owner != NULL) {
        session->owner->n_sessions--;
    }
    fv_session_remove(sched->sessions, session);
    return FV_OK;
}

void fv_sched_restore(fv_sched_t *sched, fv_session_t *session)
{
    if (session->owner != NULL) {
        session->owner->n_sessions++;
    }
    fv_sched_recount(sched, session);
}

void fv_sched_recount(fv_sched_t *sched, fv_session_t *session)
{
    for (int32_t cell = 0; cell < n_cells(&session->placement); cell++) {
        fv_sched_account(
            sched, session, cell,
            fv_session_cell_bytes(session, &sched->models[session->model_slot].spec, cell));
    }
}

/* ------------------------------------------------------------------ views */

fv_session_t *fv_sched_session(const fv_sched_t *sched, const fv_session_id_t *id)
{
    return fv_session_find(sched->sessions, id);
}

const fv_session_table_t *fv_sched_sessions(const fv_sched_t *sched)
{
    return sched->sessions;
}

fv_session_table_t *fv_sched_session_table(fv_sched_t *sched)
{
    return sched->sessions;
}

void fv_sched_own_model(fv_sched_t *sched, uint32_t slot, fv_principal_t *owner)
{
    sched->models[slot].owner = owner;
    if (owner != NULL) {
        owner->n_models++;
    }
}

const fv_principal_t *fv_sched_model_owner(const fv_sched_t *sched, uint32_t slot)
{
    return sched->models[slot].owner;
}

uint32_t fv_sched_n_models(const fv_sched_t *sched)
{
    return sched->n_models;
}

const fv_model_spec_t *fv_sched_model(const fv_sched_t *sched, uint32_t model_slot)
{
    return &sched->models[model_slot].spec;
}

const char *fv_sched_model_id(const fv_sched_t *sched, uint32_t model_slot)
{
    return sched->models[model_slot].id;
}

uint64_t fv_sched_tokens_appended(const fv_sched_t *sched)
{
    return sched->n_tokens_appended;
}

int64_t fv_sched_formed_us(const fv_sched_t *sched)
{
    return sched->formed_us;
}

uint32_t fv_sched_n_queued(const fv_sched_t *sched)
{
    return sched->n_queued;
}

uint64_t fv_sched_bytes_queued(const fv_sched_t *sched)
{
    return sched->n_bytes_queued;
}
