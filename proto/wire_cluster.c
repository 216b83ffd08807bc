/*
 * wire_cluster.c - the messages of service Cluster: status, watch and drain.
 */
#include "proto/wire_message.h"
#include "proto/wire_text.h"

#include <stdlib.h>
#include <string.h>

#define RANKS_MAX       65536
#define INTERVAL_MS_MIN 50

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
    out->durability = (int32_t)in->durability;
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
    message.durability = (Fovea__V1__Durability)in->durability;
    message.n_listen = in->n_listen;
    message.listen = listen;
    message.n_ranks = in->n_ranks;
    message.ranks = list;
    fv_status_t status = fv_message_pack(&message.base, out);
    free(ranks);
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
