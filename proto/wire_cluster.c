/*
 * wire_cluster.c - the messages of service Cluster: status, placement, watch and drain.
 */
#include "proto/wire_message.h"
#include "proto/wire_text.h"

#include <stdlib.h>
#include <string.h>

#define RANKS_MAX       65536
#define INTERVAL_MS_MIN 50
#define SHARES_MAX      1024

void fv_cluster_status_free(fv_cluster_status_t *status)
{
    free(status->ranks);
    *status = (fv_cluster_status_t){0};
}

static fv_status_t rank_decode(const Fovea__V1__RankStatus *in, fv_rank_status_t *out)
{
    FV_RETURN_IF_ERR(fv_message_text("ranks.host", in->host, out->host, sizeof(out->host)));
    FV_RETURN_IF_ERR(
        fv_message_text("ranks.backend", in->backend, out->backend, sizeof(out->backend)));
    FV_RETURN_IF_ERR(fv_message_text("ranks.device", in->device, out->device, sizeof(out->device)));
    FV_RETURN_IF_ERR(fv_message_text("ranks.state", in->state, out->state, sizeof(out->state)));
    out->rank = in->rank;
    out->threads = in->threads;
    out->kv_bytes_total = in->kv_bytes_total;
    out->kv_bytes_free = in->kv_bytes_free;
    out->n_steps = in->n_steps;
    out->busy_us = in->busy_us;
    return FV_OK;
}

static void rank_encode(const fv_rank_status_t *in, Fovea__V1__RankStatus *out)
{
    *out = (Fovea__V1__RankStatus)FOVEA__V1__RANK_STATUS__INIT;
    out->rank = in->rank;
    out->host = fv_message_borrow(in->host);
    out->backend = fv_message_borrow(in->backend);
    out->device = fv_message_borrow(in->device);
    out->state = fv_message_borrow(in->state);
    out->threads = in->threads;
    out->kv_bytes_total = in->kv_bytes_total;
    out->kv_bytes_free = in->kv_bytes_free;
    out->n_steps = in->n_steps;
    out->busy_us = in->busy_us;
}

static fv_status_t status_texts(const Fovea__V1__ClusterStatus *in, fv_cluster_status_t *out)
{
    size_t room = sizeof(out->listen) / sizeof(out->listen[0]);

    FV_RETURN_IF_ERR(fv_message_text("version", in->version, out->version, sizeof(out->version)));
    FV_RETURN_IF_ERR(fv_message_text("state", in->state, out->state, sizeof(out->state)));
    FV_RETURN_IF_ERR(
        fv_message_text("exchange", in->exchange, out->exchange, sizeof(out->exchange)));
    FV_RETURN_IF_ERR(fv_message_count("listen", in->n_listen, room));
    for (size_t i = 0; i < in->n_listen; i++) {
        FV_RETURN_IF_ERR(
            fv_message_text("listen", in->listen[i], out->listen[i], sizeof(out->listen[i])));
    }
    out->n_listen = (uint32_t)in->n_listen;
    return FV_OK;
}

/* On failure the caller frees `out`. */
static fv_status_t status_decode(const Fovea__V1__ClusterStatus *in, fv_cluster_status_t *out)
{
    FV_RETURN_IF_ERR(status_texts(in, out));
    FV_RETURN_IF_ERR(fv_message_count("ranks", in->n_ranks, RANKS_MAX));
    out->ranks = fv_message_alloc(in->n_ranks, sizeof(*out->ranks));
    if (out->ranks == NULL) {
        return FV_ERR_NO_MEMORY;
    }
    out->n_ranks = (uint32_t)in->n_ranks;
    for (uint32_t i = 0; i < out->n_ranks; i++) {
        FV_RETURN_IF_ERR(rank_decode(in->ranks[i], &out->ranks[i]));
    }
    out->epoch = in->epoch;
    out->uptime_ms = in->uptime_ms;
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
    return FV_OK;
}

fv_status_t fv_wire_cluster_status_decode(fv_span_t in, fv_cluster_status_t *out)
{
    ProtobufCMessage *message = NULL;

    *out = (fv_cluster_status_t){0};
    FV_RETURN_IF_ERR(fv_message_unpack(&fovea__v1__cluster_status__descriptor, in,
                                       FV_WIRE_RESPONSE_MAX, &message));
    fv_status_t status = status_decode((Fovea__V1__ClusterStatus *)message, out);
    if (status != FV_OK) {
        fv_cluster_status_free(out);
    }
    fv_message_free(message);
    return status;
}

static void status_numbers(const fv_cluster_status_t *in, Fovea__V1__ClusterStatus *out)
{
    out->epoch = in->epoch;
    out->uptime_ms = in->uptime_ms;
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
}

fv_status_t fv_wire_cluster_status_encode(const fv_cluster_status_t *in, fv_bytes_t *out)
{
    Fovea__V1__ClusterStatus message = FOVEA__V1__CLUSTER_STATUS__INIT;
    char *listen[sizeof(in->listen) / sizeof(in->listen[0])];

    FV_RETURN_IF_ERR(fv_message_count("listen", in->n_listen, sizeof(listen) / sizeof(listen[0])));
    /* one block: the messages, then the pointers to them */
    Fovea__V1__RankStatus *ranks = fv_message_alloc(
        in->n_ranks, sizeof(Fovea__V1__RankStatus) + sizeof(Fovea__V1__RankStatus *));
    if (ranks == NULL) {
        return FV_ERR_NO_MEMORY;
    }
    Fovea__V1__RankStatus **list = (void *)(ranks + in->n_ranks);
    for (uint32_t i = 0; i < in->n_ranks; i++) {
        rank_encode(&in->ranks[i], &ranks[i]);
        list[i] = &ranks[i];
    }
    for (uint32_t i = 0; i < in->n_listen; i++) {
        listen[i] = fv_message_borrow(in->listen[i]);
    }
    status_numbers(in, &message);
    message.version = fv_message_borrow(in->version);
    message.state = fv_message_borrow(in->state);
    message.exchange = fv_message_borrow(in->exchange);
    message.n_listen = in->n_listen;
    message.listen = listen;
    message.n_ranks = in->n_ranks;
    message.ranks = list;
    fv_status_t status = fv_message_pack(&message.base, out);
    free(ranks);
    return status;
}

void fv_placement_info_free(fv_placement_info_t *placement)
{
    free(placement->shares);
    *placement = (fv_placement_info_t){0};
}

static fv_status_t share_decode(const Fovea__V1__PlacementShare *in, fv_placement_share_t *out)
{
    FV_RETURN_IF_ERR(fv_message_count("shares.ranges", in->n_ranges, FV_SHARE_RANGES_MAX));
    for (size_t i = 0; i < in->n_ranges; i++) {
        out->ranges[i] =
            (fv_token_range_t){.begin = in->ranges[i]->begin, .end = in->ranges[i]->end};
    }
    out->n_ranges = (uint32_t)in->n_ranges;
    out->rank = in->rank;
    out->kv_head_begin = in->kv_head_begin;
    out->kv_head_end = in->kv_head_end;
    out->q_head_begin = in->q_head_begin;
    out->q_head_end = in->q_head_end;
    out->n_tokens = in->n_tokens;
    out->kv_bytes = in->kv_bytes;
    out->freed_bytes = in->freed_bytes;
    out->latent_begin = in->latent_begin;
    out->latent_end = in->latent_end;
    out->truncated = in->truncated != 0;
    return FV_OK;
}

/* On failure the caller frees `out`. */
static fv_status_t placement_decode(const Fovea__V1__Placement *in, fv_placement_info_t *out)
{
    FV_RETURN_IF_ERR(fv_message_session("session_id", in->session_id, &out->session));
    FV_RETURN_IF_ERR(
        fv_message_text("model_id", in->model_id, out->model_id, sizeof(out->model_id)));
    FV_RETURN_IF_ERR(fv_message_text("mode", in->mode, out->mode, sizeof(out->mode)));
    FV_RETURN_IF_ERR(fv_message_text("reason", in->reason, out->reason, sizeof(out->reason)));
    out->n_head_parts = in->n_head_parts;
    out->n_latent_parts = in->n_latent_parts;
    out->is_approximate = in->approximate != 0;
    out->n_ctx_parts = in->n_ctx_parts;
    out->shard_tokens = in->shard_tokens;
    out->n_tokens = in->n_tokens;
    FV_RETURN_IF_ERR(fv_message_count("shares", in->n_shares, SHARES_MAX));
    out->shares = fv_message_alloc(in->n_shares, sizeof(*out->shares));
    if (out->shares == NULL) {
        return FV_ERR_NO_MEMORY;
    }
    out->n_shares = (uint32_t)in->n_shares;
    for (uint32_t i = 0; i < out->n_shares; i++) {
        FV_RETURN_IF_ERR(share_decode(in->shares[i], &out->shares[i]));
    }
    return FV_OK;
}

fv_status_t fv_wire_placement_decode(fv_span_t in, fv_placement_info_t *out)
{
    ProtobufCMessage *message = NULL;

    *out = (fv_placement_info_t){0};
    FV_RETURN_IF_ERR(
        fv_message_unpack(&fovea__v1__placement__descriptor, in, FV_WIRE_RESPONSE_MAX, &message));
    fv_status_t status = placement_decode((Fovea__V1__Placement *)message, out);
    if (status != FV_OK) {
        fv_placement_info_free(out);
    }
    fv_message_free(message);
    return status;
}

/* A share and the memory of its ranges. */
typedef struct share_out {
    Fovea__V1__PlacementShare message;
    Fovea__V1__TokenRange *list[FV_SHARE_RANGES_MAX];
    Fovea__V1__TokenRange ranges[FV_SHARE_RANGES_MAX];
} share_out_t;

static void share_encode(const fv_placement_share_t *in, share_out_t *out)
{
    Fovea__V1__PlacementShare *m = &out->message;

    *m = (Fovea__V1__PlacementShare)FOVEA__V1__PLACEMENT_SHARE__INIT;
    for (uint32_t i = 0; i < in->n_ranges; i++) {
        out->ranges[i] = (Fovea__V1__TokenRange)FOVEA__V1__TOKEN_RANGE__INIT;
        out->ranges[i].begin = in->ranges[i].begin;
        out->ranges[i].end = in->ranges[i].end;
        out->list[i] = &out->ranges[i];
    }
    m->n_ranges = in->n_ranges;
    m->ranges = out->list;
    m->rank = in->rank;
    m->kv_head_begin = in->kv_head_begin;
    m->kv_head_end = in->kv_head_end;
    m->q_head_begin = in->q_head_begin;
    m->q_head_end = in->q_head_end;
    m->n_tokens = in->n_tokens;
    m->kv_bytes = in->kv_bytes;
    m->freed_bytes = in->freed_bytes;
    m->latent_begin = in->latent_begin;
    m->latent_end = in->latent_end;
    m->truncated = in->truncated ? 1 : 0;
}

/* Checked before anything is allocated: share_encode() relies on it. */
static fv_status_t check_shares(const fv_placement_info_t *in)
{
    FV_RETURN_IF_ERR(fv_message_count("shares", in->n_shares, SHARES_MAX));
    for (uint32_t i = 0; i < in->n_shares; i++) {
        FV_RETURN_IF_ERR(
            fv_message_count("shares.ranges", in->shares[i].n_ranges, FV_SHARE_RANGES_MAX));
    }
    return FV_OK;
}

fv_status_t fv_wire_placement_encode(const fv_placement_info_t *in, fv_bytes_t *out)
{
    Fovea__V1__Placement message = FOVEA__V1__PLACEMENT__INIT;
    char reason[sizeof(in->reason)];
    char session[FV_SESSION_ID_CHARS + 1];

    FV_RETURN_IF_ERR(check_shares(in));
    /* one block: the messages, then the pointers to them */
    share_out_t *shares =
        fv_message_alloc(in->n_shares, sizeof(share_out_t) + sizeof(Fovea__V1__PlacementShare *));
    if (shares == NULL) {
        return FV_ERR_NO_MEMORY;
    }
    Fovea__V1__PlacementShare **list = (void *)(shares + in->n_shares);
    for (uint32_t i = 0; i < in->n_shares; i++) {
        share_encode(&in->shares[i], &shares[i]);
        list[i] = &shares[i].message;
    }
    fv_session_id_format(&in->session, session);
    (void)fv_utf8_copy(reason, sizeof(reason), in->reason, strlen(in->reason));
    message.session_id = session;
    message.model_id = fv_message_borrow(in->model_id);
    message.mode = fv_message_borrow(in->mode);
    message.reason = reason;
    message.n_head_parts = in->n_head_parts;
    message.n_latent_parts = in->n_latent_parts;
    message.approximate = in->is_approximate ? 1 : 0;
    message.n_ctx_parts = in->n_ctx_parts;
    message.shard_tokens = in->shard_tokens;
    message.n_tokens = in->n_tokens;
    message.n_shares = in->n_shares;
    message.shares = list;
    fv_status_t status = fv_message_pack(&message.base, out);
    free(shares);
    return status;
}

fv_status_t fv_wire_watch_request_decode(fv_span_t in, uint32_t *out)
{
    ProtobufCMessage *message = NULL;

    FV_RETURN_IF_ERR(fv_message_unpack(&fovea__v1__watch_status_request__descriptor, in,
                                       FV_WIRE_REQUEST_MAX, &message));
    uint32_t interval_ms = ((Fovea__V1__WatchStatusRequest *)message)->interval_ms;
    fv_message_free(message);
    if ((interval_ms != 0) && (interval_ms < INTERVAL_MS_MIN)) {
        return fv_fail(FV_ERR_INVALID_ARG, "interval_ms: given %u, expected 0 or at least %d",
                       interval_ms, INTERVAL_MS_MIN);
    }
    *out = interval_ms;
    return FV_OK;
}

fv_status_t fv_wire_watch_request_encode(const uint32_t *in, fv_bytes_t *out)
{
    Fovea__V1__WatchStatusRequest message = FOVEA__V1__WATCH_STATUS_REQUEST__INIT;

    message.interval_ms = *in;
    return fv_message_pack(&message.base, out);
}

fv_status_t fv_wire_drain_request_decode(fv_span_t in, uint32_t *out)
{
    ProtobufCMessage *message = NULL;

    FV_RETURN_IF_ERR(fv_message_unpack(&fovea__v1__drain_request__descriptor, in,
                                       FV_WIRE_REQUEST_MAX, &message));
    *out = ((Fovea__V1__DrainRequest *)message)->timeout_ms;
    fv_message_free(message);
    return FV_OK;
}

fv_status_t fv_wire_drain_request_encode(const uint32_t *in, fv_bytes_t *out)
{
    Fovea__V1__DrainRequest message = FOVEA__V1__DRAIN_REQUEST__INIT;

    message.timeout_ms = *in;
    return fv_message_pack(&message.base, out);
}

fv_status_t fv_wire_drain_response_decode(fv_span_t in, fv_drain_response_t *out)
{
    ProtobufCMessage *message = NULL;

    FV_RETURN_IF_ERR(fv_message_unpack(&fovea__v1__drain_response__descriptor, in,
                                       FV_WIRE_RESPONSE_MAX, &message));
    const Fovea__V1__DrainResponse *m = (Fovea__V1__DrainResponse *)message;
    *out = (fv_drain_response_t){.n_sessions = m->n_sessions,
                                 .n_requests_finished = m->n_requests_finished};
    fv_message_free(message);
    return FV_OK;
}

fv_status_t fv_wire_drain_response_encode(const fv_drain_response_t *in, fv_bytes_t *out)
{
    Fovea__V1__DrainResponse message = FOVEA__V1__DRAIN_RESPONSE__INIT;

    message.n_sessions = in->n_sessions;
    message.n_requests_finished = in->n_requests_finished;
    return fv_message_pack(&message.base, out);
}
