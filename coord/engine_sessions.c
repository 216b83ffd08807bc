/*
 * engine_sessions.c - sessions that end: closed by their owner, idle for too long, or with the stream that used them.
 *
 * A session opened with close_with_stream belongs to the first Attend stream that has a request of it served; when that stream
 * is over, however it ends, the session is closed. The rpc thread posts the end of such a stream (the call's user word
 * says that it is one) to the inbox.
 */
#include "common/clock.h"
#include "common/log.h"
#include "coord/engine_internal.h"

#include <stdlib.h>

#define SWEEP_EVERY_US 250000
#define ORPHAN_US      15000000 /* more than clients try to reach a service that is away */
#define SWEEP_MIN      1024U    /* sessions looked at in one go, at least */
#define SWEEP_PART     16U      /* of all of them: each is looked at every 4 s at the latest */

fv_status_t fv_engine_close_session(fv_engine_t *engine, const fv_session_id_t *id)
{
    fv_ctl_close_t message = {0};
    fv_placement_t placement;
    fv_error_t refusal = {0};

    const fv_session_t *session = fv_sched_session(engine->sched, id);
    if (session != NULL) { /* before a rank has forgotten it */
        FV_RETURN_IF_ERR(fv_ledger_note_close(engine->config.ledger, session));
    }
    FV_RETURN_IF_ERR(fv_sched_close(engine->sched, id, &message, &placement));
    FV_RETURN_IF_ERR(
        fv_engine_broadcast(engine, &placement, FV_CTL_CLOSE, &message, sizeof(message), &refusal));
    if (refusal.status != FV_OK) {
        return fv_fail(FV_ERR_INTERNAL, "a rank refused to close a session: %s", refusal.text);
    }
    return FV_OK;
}

/* ------------------------------------------------------------------ idle */

fv_status_t fv_engine_close_idle(fv_engine_t *engine, int64_t now_us, int64_t *out_next_us)
{
    int64_t idle_us = (int64_t)engine->config.session_idle_s * 1000000;
    fv_session_table_t *table = fv_sched_session_table(engine->sched);
    uint32_t n_closed = 0;

    *out_next_us = INT64_MAX;
    if (idle_us == 0) {
        return FV_OK;
    }
    if (now_us < engine->sweep_due_us) {
        *out_next_us = engine->sweep_due_us;
        return FV_OK;
    }
    /* While requests wait, time stands still for sessions: theirs were last seen when a step was formed. */
    bool has_waiting = (fv_sched_n_queued(engine->sched) > 0) ||
                       (atomic_load_explicit(&engine->inbox, memory_order_relaxed) != NULL);
    int64_t seen_us = has_waiting ? fv_sched_formed_us(engine->sched) : now_us;
    uint32_t n = fv_session_table_count(table);
    uint32_t n_looks = (n / SWEEP_PART > SWEEP_MIN) ? (n / SWEEP_PART) : SWEEP_MIN;
    for (uint32_t i = 0; (i < n) && (i < n_looks); i++) {
        const fv_session_t *session = fv_session_table_round(table);
        if (seen_us - session->used_us >= idle_us) {
            fv_session_id_t id = session->id;
            fv_status_t status = fv_engine_close_session(engine, &id);
            if (status == FV_ERR_EXHAUSTED) {
                break; /* not even room to note it: later */
            }
            FV_RETURN_IF_ERR(status);
            n_closed++;
        }
    }
    if (n_closed > 0) {
        fv_debug("%u sessions closed: not used for %d s (session_idle_s)", n_closed,
                 (int)engine->config.session_idle_s);
    }
    engine->sweep_due_us = now_us + SWEEP_EVERY_US;
    *out_next_us = engine->sweep_due_us;
    return FV_OK;
}

/* ------------------------------------------------------------------ with a stream */

void fv_engine_note_orphans(fv_engine_t *engine, int64_t now_us)
{
    for (fv_session_t *s = fv_session_after(fv_sched_sessions(engine->sched), 0); s != NULL;
         s = s->next) {
        if (s->closes_with_stream) {
            s->is_orphan = true;
            engine->orphans_due_us = now_us + ORPHAN_US;
        }
    }
}

/* Whether it still is one afterwards. */
static fv_status_t
close_orphan(fv_engine_t *engine, fv_session_t *session, int64_t now_us, bool *out_is_left)
{
    *out_is_left = false;
    if (session->list != NULL) { /* a stream has it */
        session->is_orphan = false;
        return FV_OK;
    }
    if (fv_sched_is_half_way(session) || (now_us - session->used_us < ORPHAN_US)) {
        *out_is_left = true;
        return FV_OK;
    }
    const fv_session_id_t id = session->id;
    fv_status_t status = fv_engine_close_session(engine, &id);
    *out_is_left = status == FV_ERR_EXHAUSTED; /* not even room to note it: later */
    return *out_is_left ? FV_OK : status;
}

fv_status_t fv_engine_close_orphans(fv_engine_t *engine, int64_t now_us, int64_t *inout_next_us)
{
    fv_session_t *next = NULL;

    if (engine->orphans_due_us == 0) {
        return FV_OK;
    }
    if ((now_us >= engine->orphans_due_us) && (fv_sched_n_queued(engine->sched) == 0)) {
        engine->orphans_due_us = 0;
        for (fv_session_t *s = fv_session_after(fv_sched_sessions(engine->sched), 0); s != NULL;
             s = next) {
            bool is_left = false;
            next = s->next;
            if (s->is_orphan) {
                FV_RETURN_IF_ERR(close_orphan(engine, s, now_us, &is_left));
            }
            engine->orphans_due_us = is_left ? (now_us + ORPHAN_US) : engine->orphans_due_us;
        }
    }
    if ((engine->orphans_due_us != 0) && (engine->orphans_due_us < *inout_next_us)) {
        *inout_next_us =
            (engine->orphans_due_us > now_us) ? engine->orphans_due_us : (now_us + SWEEP_EVERY_US);
    }
    return FV_OK;
}

/* The stream's record, made when it is needed. NULL when out of memory. */
static fv_stream_t *stream_of(fv_engine_t *engine, fv_call_t *call)
{
    fv_stream_t *stream = fv_call_user(call);

    if (stream != NULL) {
        return stream;
    }
    stream = calloc(1, sizeof(*stream));
    if (stream == NULL) {
        return NULL;
    }
    fv_call_ref(call);
    stream->call = call;
    stream->next = engine->streams;
    if (stream->next != NULL) {
        stream->next->prev = stream;
    }
    engine->streams = stream;
    fv_call_set_user(call, stream);
    return stream;
}

static void stream_free(fv_engine_t *engine, fv_stream_t *stream)
{
    fv_call_set_user(stream->call, NULL);
    *((stream->prev != NULL) ? &stream->prev->next : &engine->streams) = stream->next;
    if (stream->next != NULL) {
        stream->next->prev = stream->prev;
    }
    fv_call_unref(stream->call);
    free(stream);
}

fv_status_t fv_engine_stream_ended(fv_engine_t *engine, fv_call_t *call)
{
    fv_stream_t *stream = fv_call_user(call);

    if (stream == NULL) {
        return FV_OK; /* done already */
    }
    while (stream->sessions.first != NULL) {
        fv_session_id_t id = stream->sessions.first->id;
        FV_RETURN_IF_ERR(fv_engine_close_session(engine, &id)); /* takes it off the list */
    }
    stream_free(engine, stream);
    return FV_OK;
}

bool fv_engine_is_stream_half_way(fv_call_t *call)
{
    const fv_stream_t *stream = fv_call_user(call);
    const fv_session_t *session = (stream == NULL) ? NULL : stream->sessions.first;

    while ((session != NULL) && !fv_sched_is_half_way(session)) {
        session = session->next_of_list;
    }
    return session != NULL;
}

void fv_engine_note_use(fv_engine_t *engine, const fv_request_t *joined)
{
    int64_t now_us = fv_clock_us();

    for (const fv_request_t *r = joined; r != NULL; r = r->next) {
        fv_call_t *call = ((const fv_job_t *)r->user)->entry.call;
        bool has_bound = false;
        for (uint32_t i = 0; i < r->head.n_items; i++) {
            fv_session_t *session = r->sessions[i];
            session->used_us = now_us; /* a long step is no idleness */
            if (!session->closes_with_stream || (session->list != NULL) ||
                (fv_call_method(call) != FV_METHOD_ATTEND)) {
                continue;
            }
            fv_stream_t *stream = stream_of(engine, call);
            if (stream != NULL) { /* else its next request tries again */
                fv_session_list_add(&stream->sessions, session);
                has_bound = true;
            }
        }
        /* The end may have come before the user word was set: then nobody posts it. */
        engine->has_ended_streams =
            engine->has_ended_streams || (has_bound && fv_call_is_closed(call));
    }
}

fv_status_t fv_engine_end_streams(fv_engine_t *engine)
{
    fv_stream_t *next = NULL;

    engine->has_ended_streams = false;
    for (fv_stream_t *stream = engine->streams; stream != NULL; stream = next) {
        next = stream->next;
        if (!fv_call_is_closed(stream->call)) {
            continue;
        }
        if (fv_engine_is_stream_half_way(stream->call)) {
            engine->has_held_streams = true;
        } else {
            FV_RETURN_IF_ERR(fv_engine_stream_ended(engine, stream->call));
        }
    }
    return FV_OK;
}

void fv_engine_free_streams(fv_engine_t *engine)
{
    while (engine->streams != NULL) {
        stream_free(engine, engine->streams);
    }
}
