/*
 * client_cluster.c - status, watching it, placement, drain.
 */
#include "client/client_internal.h"
#include "client/client_policy.h"

#include <stdlib.h>

#define METHOD(name) FV_METHOD_PATH("Cluster", name)

FV_CLIENT_DECODER(cluster_status, fv_cluster_status_t)
FV_CLIENT_DECODER(placement, fv_placement_info_t)
FV_CLIENT_DECODER(drain_response, fv_drain_response_t)

/* ------------------------------------------------------------------ status */

static void copy_rank(const fv_rank_status_t *in, fovea_rank_status_t *out)
{
    out->rank = in->rank;
    memcpy(out->host, in->host, sizeof(out->host));
    memcpy(out->backend, in->backend, sizeof(out->backend));
    memcpy(out->device, in->device, sizeof(out->device));
    memcpy(out->state, in->state, sizeof(out->state));
    out->threads = in->threads;
    out->kv_bytes_total = in->kv_bytes_total;
    out->kv_bytes_free = in->kv_bytes_free;
    out->n_steps = in->n_steps;
    out->busy_us = in->busy_us;
}

static fovea_code_t
copy_status(const fv_cluster_status_t *in, fovea_cluster_status_t *out, fovea_error_t *error)
{
    fovea_rank_status_t *ranks = calloc((size_t)in->n_ranks + 1, sizeof(*ranks));

    if (ranks == NULL) {
        return fv_client_fail(error, FOVEA_RESOURCE_EXHAUSTED, "out of host memory");
    }
    memset(out, 0, sizeof(*out));
    for (uint32_t i = 0; i < in->n_ranks; i++) {
        copy_rank(&in->ranks[i], &ranks[i]);
    }
    out->ranks = ranks;
    out->n_ranks = in->n_ranks;
    memcpy(out->version, in->version, sizeof(out->version));
    memcpy(out->state, in->state, sizeof(out->state));
    memcpy(out->exchange, in->exchange, sizeof(out->exchange));
    out->durability = in->durability;
    out->epoch = in->epoch;
    out->uptime_ms = in->uptime_ms;
    out->n_listen = in->n_listen;
    memcpy(out->listen, in->listen, sizeof(out->listen));
    out->n_models = in->n_models;
    out->n_sessions = in->n_sessions;
    out->n_requests_queued = in->n_requests_queued;
    out->n_requests_running = in->n_requests_running;
    out->n_requests_done = in->n_requests_done;
    out->n_requests_failed = in->n_requests_failed;
    out->n_steps = in->n_steps;
    out->n_tokens_appended = in->n_tokens_appended;
    out->kv_bytes_total = in->kv_bytes_total;
    out->kv_bytes_free = in->kv_bytes_free;
    return FOVEA_OK;
}

fovea_code_t fovea_get_status(fovea_client_t *client,
                              int64_t timeout_ms,
                              fovea_cluster_status_t *out,
                              fovea_error_t *error)
{
    fv_cluster_status_t status = {0};
    fv_bytes_t request = {0};
    fovea_code_t code = FOVEA_OK;

    if ((client == NULL) || (out == NULL)) {
        return fv_client_null(error, "client or out");
    }
    code = fv_client_call(client,
                          &(fv_client_call_t){.method = METHOD("GetStatus"),
                                              .encoded = FV_OK,
                                              .request = &request,
                                              .timeout_ms = timeout_ms,
                                              .decode = decode_cluster_status,
                                              .out = &status},
                          error);
    if (code == FOVEA_OK) {
        code = copy_status(&status, out, error);
        fv_cluster_status_free(&status);
    }
    return code;
}

void fovea_cluster_status_free(fovea_cluster_status_t *status)
{
    if (status != NULL) {
        free(status->ranks);
        status->ranks = NULL;
        status->n_ranks = 0;
    }
}

/* ------------------------------------------------------------------ watch */

/* Decodes one status and shows it; *go_on is the callback's answer. */
static fovea_code_t watch_one(const fv_duplex_event_t *event,
                              fovea_watch_fn_t on_status,
                              void *user,
                              bool *go_on,
                              fovea_error_t *error)
{
    fv_cluster_status_t wire = {0};
    fovea_cluster_status_t status = {0};
    fovea_code_t code =
        fv_client_decode(event->spans, event->n_spans, decode_cluster_status, &wire, error);

    if (code != FOVEA_OK) {
        return code;
    }
    code = copy_status(&wire, &status, error);
    fv_cluster_status_free(&wire);
    if (code == FOVEA_OK) {
        *go_on = on_status(user, &status);
        fovea_cluster_status_free(&status);
    }
    return code;
}

/* Runs the call to its end. The callback's false, or a bad answer, cancels it. */
static fovea_code_t
watch_run(fv_duplex_t *duplex, fovea_watch_fn_t on_status, void *user, fovea_error_t *error)
{
    fovea_code_t code = FOVEA_OK;
    bool go_on = true;

    for (;;) {
        fv_duplex_event_t event = fv_duplex_next(duplex, FV_RPC_NO_DEADLINE);
        if (event.kind == FV_DUPLEX_CLOSED) {
            break;
        }
        if (event.kind == FV_DUPLEX_SENT) {
            fv_duplex_half_close(duplex);
        }
        if (event.kind == FV_DUPLEX_RECEIVED) {
            if (go_on && (code == FOVEA_OK)) {
                code = watch_one(&event, on_status, user, &go_on, error);
            }
            if (!go_on || (code != FOVEA_OK)) {
                fv_duplex_cancel(duplex);
            }
            fv_duplex_receive_next(duplex);
        }
    }
    if (go_on && (code == FOVEA_OK)) { /* not we but the service (or the deadline) ended it */
        const fovea_error_t *status = fv_duplex_status(duplex);
        if (status->code != FOVEA_OK) {
            code = fv_client_fail(error, status->code, "%s", status->message);
        }
    }
    return code;
}

fovea_code_t fovea_watch_status(fovea_client_t *client,
                                uint32_t interval_ms,
                                int64_t timeout_ms,
                                fovea_watch_fn_t on_status,
                                void *user,
                                fovea_error_t *error)
{
    fv_duplex_t *duplex = NULL;
    fv_bytes_t request = {0};
    fovea_code_t code = FOVEA_OK;

    if ((client == NULL) || (on_status == NULL)) {
        return fv_client_null(error, "client or on_status");
    }
    fv_status_t status = fv_wire_watch_request_encode(&interval_ms, &request);
    if (status != FV_OK) {
        return fv_client_status(error, status);
    }
    code =
        fv_duplex_open(client->channel, METHOD("WatchStatus"),
                       fv_client_deadline((timeout_ms == FOVEA_TIMEOUT_DEFAULT) ? -1 : timeout_ms),
                       &duplex, error);
    if (code == FOVEA_OK) {
        fv_out_piece_t piece = {.data = request.data, .n_bytes = request.n_bytes};
        if (!fv_duplex_send(duplex, &piece, (request.n_bytes > 0) ? 1 : 0)) {
            fv_duplex_cancel(duplex);
        }
        code = watch_run(duplex, on_status, user, error);
        fv_duplex_destroy(duplex);
    }
    fv_bytes_free(&request);
    return code;
}

/* ------------------------------------------------------------------ placement */

static void copy_share(const fv_placement_share_t *in, fovea_placement_share_t *out)
{
    out->rank = in->rank;
    out->kv_head_begin = in->kv_head_begin;
    out->kv_head_end = in->kv_head_end;
    out->q_head_begin = in->q_head_begin;
    out->q_head_end = in->q_head_end;
    out->latent_begin = in->latent_begin;
    out->latent_end = in->latent_end;
    out->n_ranges = in->n_ranges;
    for (uint32_t i = 0; i < in->n_ranges; i++) {
        out->ranges[i].begin = in->ranges[i].begin;
        out->ranges[i].end = in->ranges[i].end;
    }
    out->truncated = in->truncated;
    out->n_tokens = in->n_tokens;
    out->kv_bytes = in->kv_bytes;
    out->freed_bytes = in->freed_bytes;
}

/* One block of memory: the patterns, then the layers of all of them. */
static fovea_placement_pattern_t *copy_patterns(const fv_placement_info_t *in)
{
    size_t n_layers = 0;

    for (uint32_t i = 0; i < in->n_patterns; i++) {
        n_layers += in->patterns[i].n_layers;
    }
    fovea_placement_pattern_t *patterns =
        calloc(1, ((size_t)in->n_patterns + 1U) * sizeof(*patterns) + n_layers * sizeof(uint32_t));
    uint32_t *layers = (patterns == NULL) ? NULL : (void *)(patterns + in->n_patterns);
    for (uint32_t i = 0; (patterns != NULL) && (i < in->n_patterns); i++) {
        const fv_placement_pattern_t *from = &in->patterns[i];
        fovea_placement_pattern_t *to = &patterns[i];

        to->policy = fv_client_policy_out(&from->policy);
        memcpy(layers, from->layers, from->n_layers * sizeof(*layers));
        to->policy.layers = layers;
        to->policy.n_layers = from->n_layers;
        layers += from->n_layers;
        to->n_tokens = from->n_tokens;
        to->floor = from->floor;
        to->kv_bytes = from->kv_bytes;
        to->freed_bytes = from->freed_bytes;
    }
    return patterns;
}

static fovea_code_t
copy_placement(const fv_placement_info_t *in, fovea_placement_t *out, fovea_error_t *error)
{
    fovea_placement_share_t *shares = calloc((size_t)in->n_shares + 1, sizeof(*shares));
    fovea_placement_pattern_t *patterns = copy_patterns(in);

    if ((shares == NULL) || (patterns == NULL)) {
        free(shares);
        free(patterns);
        return fv_client_fail(error, FOVEA_RESOURCE_EXHAUSTED, "out of host memory");
    }
    memset(out, 0, sizeof(*out));
    for (uint32_t i = 0; i < in->n_shares; i++) {
        copy_share(&in->shares[i], &shares[i]);
    }
    out->shares = shares;
    out->n_shares = in->n_shares;
    out->session = fv_client_session_out(&in->session);
    memcpy(out->model_id, in->model_id, sizeof(out->model_id));
    memcpy(out->mode, in->mode, sizeof(out->mode));
    memcpy(out->reason, in->reason, sizeof(out->reason));
    out->n_head_parts = in->n_head_parts;
    out->n_latent_parts = in->n_latent_parts;
    out->is_approximate = in->is_approximate;
    out->n_ctx_parts = in->n_ctx_parts;
    out->shard_tokens = in->shard_tokens;
    out->n_tokens = in->n_tokens;
    out->n_q_heads = in->n_q_heads;
    out->n_kv_heads = in->n_kv_heads;
    out->patterns = patterns;
    out->n_patterns = in->n_patterns;
    return FOVEA_OK;
}

fovea_code_t fovea_get_placement(fovea_client_t *client,
                                 const fovea_session_id_t *session,
                                 int64_t timeout_ms,
                                 fovea_placement_t *out,
                                 fovea_error_t *error)
{
    fv_placement_info_t placement = {0};
    fv_bytes_t request = {0};
    fovea_code_t code = FOVEA_OK;

    if ((client == NULL) || (session == NULL) || (out == NULL)) {
        return fv_client_null(error, "client, session or out");
    }
    fv_session_request_t wire = {.session = fv_client_session(session)};
    fv_status_t status = fv_wire_placement_request_encode(&wire, &request);
    code = fv_client_call(client,
                          &(fv_client_call_t){.method = METHOD("GetPlacement"),
                                              .encoded = status,
                                              .request = &request,
                                              .timeout_ms = timeout_ms,
                                              .decode = decode_placement,
                                              .out = &placement},
                          error);
    if (code == FOVEA_OK) {
        code = copy_placement(&placement, out, error);
        fv_placement_info_free(&placement);
    }
    return code;
}

void fovea_placement_free(fovea_placement_t *placement)
{
    if (placement != NULL) {
        free(placement->shares);
        free(placement->patterns);
        placement->shares = NULL;
        placement->patterns = NULL;
        placement->n_shares = 0;
        placement->n_patterns = 0;
    }
}

/* ------------------------------------------------------------------ drain */

fovea_code_t fovea_drain(fovea_client_t *client,
                         uint32_t drain_timeout_ms,
                         int64_t timeout_ms,
                         fovea_drained_t *out,
                         fovea_error_t *error)
{
    fv_drain_response_t response = {0};
    fv_bytes_t request = {0};
    fovea_code_t code = FOVEA_OK;

    if (client == NULL) {
        return fv_client_null(error, "client");
    }
    fv_status_t status = fv_wire_drain_request_encode(&drain_timeout_ms, &request);
    code = fv_client_call(client,
                          &(fv_client_call_t){.method = METHOD("Drain"),
                                              .encoded = status,
                                              .request = &request,
                                              .timeout_ms = timeout_ms,
                                              .is_single = true,
                                              .decode = decode_drain_response,
                                              .out = &response},
                          error);
    if ((code == FOVEA_OK) && (out != NULL)) {
        out->n_sessions = response.n_sessions;
        out->n_requests_finished = response.n_requests_finished;
    }
    return code;
}
