/*
 * engine_watch.c - WatchStatus: the status again and again, as fast as the client reads and no faster.
 */
#include "common/clock.h"
#include "coord/engine_internal.h"

#include <stdlib.h>

#define INTERVAL_MS_DEFAULT 1000U

static void drop(fv_watcher_t *watcher)
{
    fv_call_unref(watcher->call);
    free(watcher);
}

fv_status_t fv_engine_encode_status(fv_engine_t *engine, fv_bytes_t *out)
{
    fv_cluster_status_t view = {0};
    fv_status_t status = fv_engine_status(engine, &view);

    if (status == FV_OK) {
        status = fv_wire_cluster_status_encode(&view, out);
    }
    fv_cluster_status_free(&view);
    return status;
}

fv_status_t fv_engine_add_watcher(fv_engine_t *engine, fv_call_t *call, uint32_t interval_ms)
{
    fv_watcher_t *watcher = calloc(1, sizeof(*watcher));
    if (watcher == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "watcher");
    }
    fv_call_ref(call);
    watcher->next = engine->watchers;
    watcher->call = call;
    watcher->due_us = fv_clock_us();
    watcher->interval_us = (int64_t)((interval_ms == 0) ? INTERVAL_MS_DEFAULT : interval_ms) * 1000;
    engine->watchers = watcher;
    engine->wants_own_thread = true; /* its timer */
    return FV_OK;
}

int64_t fv_engine_serve_watchers(fv_engine_t *engine, int64_t now_us)
{
    fv_watcher_t **link = &engine->watchers;
    int64_t next_us = INT64_MAX;

    while (*link != NULL) {
        fv_watcher_t *watcher = *link;
        fv_status_t status = fv_call_recheck(watcher->call); /* a watch outlives tokens */
        if (status != FV_OK) {
            fv_reply_error(watcher->call, status);
        }
        if ((status != FV_OK) || fv_call_is_closed(watcher->call)) {
            *link = watcher->next;
            drop(watcher);
            continue;
        }
        if (watcher->due_us <= now_us) {
            watcher->due_us = now_us + watcher->interval_us;
            fv_bytes_t bytes = {0};
            if (fv_engine_encode_status(engine, &bytes) == FV_OK) {
                fv_reply_bytes(watcher->call, &bytes);
            }
        }
        if (watcher->due_us < next_us) {
            next_us = watcher->due_us;
        }
        link = &watcher->next;
    }
    return next_us;
}

void fv_engine_end_watchers(fv_engine_t *engine, const char *why)
{
    while (engine->watchers != NULL) {
        fv_watcher_t *watcher = engine->watchers;
        engine->watchers = watcher->next;
        fv_call_fail(watcher->call, fv_status_grpc(FV_ERR_UNAVAILABLE), why);
        drop(watcher);
    }
}
