/*
 * rpc_health.c - grpc.health.v1: Check and Watch. The messages have one field each and are written by hand.
 *
 *   HealthCheckRequest { string service = 1; }
 *   HealthCheckResponse { ServingStatus status = 1; }
 */
#include "coord/rpc_internal.h"
#include "coord/rpc_pb.h"

#include <string.h>

#define GRPC_NOT_FOUND          5
#define GRPC_INVALID_ARGUMENT   3
#define GRPC_RESOURCE_EXHAUSTED 8

typedef enum fv_serving_status {
    FV_SERVING = 1,
    FV_NOT_SERVING = 2,
    FV_SERVICE_UNKNOWN = 3,
} fv_serving_status_t;

void fv_health_init(fv_health_t *health)
{
    memset(health, 0, sizeof(*health));
    (void)pthread_mutex_init(&health->lock, NULL);
}

void fv_health_fini(fv_health_t *health)
{
    FV_ASSERT(health->n_watchers == 0U); /* every call saw its close */
    (void)pthread_mutex_destroy(&health->lock);
}

static void answer(fv_call_t *call, fv_serving_status_t status)
{
    const uint8_t message[2] = {0x08, (uint8_t)status}; /* field 1, varint */
    fv_reply_piece_t piece = {.data = message, .n_bytes = sizeof(message)};

    fv_call_reply(call, &piece, 1);
}

static bool is_text(fv_span_t span, const char *text)
{
    return (span.n_bytes == strlen(text)) && (memcmp(span.data, text, span.n_bytes) == 0);
}

static bool is_known(fv_span_t service)
{
    return (service.n_bytes == 0U) || is_text(service, "fovea.v1.Attention") ||
           is_text(service, "fovea.v1.Cluster");
}

/* Lock held. The answer goes out under it, so that two changes reach a watcher in their order. */
static bool add_watcher(fv_health_t *health, fv_call_t *call)
{
    if (health->n_watchers == FV_HEALTH_WATCHERS_MAX) {
        return false;
    }
    fv_call_ref(call);
    health->watchers[health->n_watchers++] = call;
    return true;
}

void fv_health_message(fv_health_t *health, fv_call_t *call, bool is_watch, fv_span_t request)
{
    fv_span_t service;

    if (!fv_pb_find_bytes(request, 1, &service)) {
        fv_call_fail(call, GRPC_INVALID_ARGUMENT, "request: not a HealthCheckRequest");
        return;
    }
    if (!is_known(service)) {
        if (is_watch) { /* by the protocol a watch of an unknown service goes on */
            answer(call, FV_SERVICE_UNKNOWN);
        } else {
            fv_call_fail(call, GRPC_NOT_FOUND,
                         "service: unknown, expected \"\", fovea.v1.Attention "
                         "or fovea.v1.Cluster");
        }
        return;
    }
    (void)pthread_mutex_lock(&health->lock);
    if (is_watch && !add_watcher(health, call)) {
        fv_call_fail(call, GRPC_RESOURCE_EXHAUSTED, "watch: 4096 watch already, the most there may be");
    } else {
        answer(call, health->is_serving ? FV_SERVING : FV_NOT_SERVING);
    }
    (void)pthread_mutex_unlock(&health->lock);
}

void fv_health_closed(fv_health_t *health, fv_call_t *call)
{
    bool was_watching = false;

    (void)pthread_mutex_lock(&health->lock);
    for (size_t i = 0; (i < health->n_watchers) && !was_watching; i++) {
        if (health->watchers[i] == call) {
            health->watchers[i] = health->watchers[--health->n_watchers];
            was_watching = true;
        }
    }
    (void)pthread_mutex_unlock(&health->lock);
    if (was_watching) {
        fv_call_unref(call);
    }
}

void fv_health_set_serving(fv_health_t *health, bool is_serving)
{
    (void)pthread_mutex_lock(&health->lock);
    if (health->is_serving != is_serving) {
        health->is_serving = is_serving;
        for (size_t i = 0; i < health->n_watchers; i++) {
            answer(health->watchers[i], is_serving ? FV_SERVING : FV_NOT_SERVING);
        }
    }
    (void)pthread_mutex_unlock(&health->lock);
}
