/*
 * client_stream_drive.c - the driver of a stream: events in, requests finished.
 */
#include "client/client_stream.h"
#include "common/clock.h"

#include <stdlib.h>
#include <time.h>

#define LINGER_POLL_US 500 /* while an answered request's tensors are still gRPC's */
#define FIRST_PAUSE_US 20000
#define MAX_PAUSE_US   500000

fv_pending_t *fv_stream_find(const fovea_stream_t *s, uint64_t ticket)
{
    uint32_t slot = (uint32_t)(ticket & ((1U << FV_TICKET_SLOT_BITS) - 1U));
    fv_pending_t *p = (slot < s->n_slots) ? s->slots[slot] : NULL;

    return ((p != NULL) && (p->result.ticket == ticket)) ? p : NULL;
}

void fv_stream_release(fovea_stream_t *s, fv_pending_t *p)
{
    uint32_t slot = (uint32_t)(p->result.ticket & ((1U << FV_TICKET_SLOT_BITS) - 1U));

    s->slots[slot] = NULL;
    if (slot < s->first_free_hint) {
        s->first_free_hint = slot;
    }
    fv_attend_message_fini(&p->message);
    free(p);
}

void fv_stream_send_next(fovea_stream_t *s)
{
    fv_pending_t *p = TAILQ_FIRST(&s->queued);

    if ((p == NULL) || s->is_sending || s->is_broken) {
        return;
    }
    if (fv_duplex_send(s->duplex, p->message.pieces, p->message.n_pieces)) {
        TAILQ_REMOVE(&s->queued, p, link);
        p->state = FV_PENDING_SENT;
        s->is_sending = true;
    } else { /* the call is over, or host memory is: either way the end of it finishes everything */
        fv_duplex_cancel(s->duplex);
    }
}

/* The last step of a request: nobody but its owner uses its memory from here. */
static void finish(fovea_stream_t *s, fv_pending_t *p)
{
    fovea_done_fn_t done = p->done;

    p->state = FV_PENDING_FINISHED;
    if (done != NULL) {
        (void)pthread_mutex_unlock(&s->lock);
        done(&p->result);
        (void)pthread_mutex_lock(&s->lock);
        fv_stream_release(s, p);
    } else {
        TAILQ_INSERT_TAIL(&s->finished, p, link);
        s->n_in_flight_plain--;
    }
    s->n_in_flight--;
    s->n_finished++;
    (void)pthread_cond_broadcast(&s->changed);
}

/* A request has its result; it is finished as soon as gRPC has let go of its tensors. */
static void settle(fovea_stream_t *s, fv_pending_t *p)
{
    if (atomic_load_explicit(&p->pins, memory_order_acquire) == 0) {
        finish(s, p);
    } else {
        p->state = FV_PENDING_LINGERING;
        TAILQ_INSERT_TAIL(&s->lingering, p, link);
    }
}

static void settle_lingering(fovea_stream_t *s)
{
    fv_pending_t *p = TAILQ_FIRST(&s->lingering);

    while (p != NULL) {
        fv_pending_t *next = TAILQ_NEXT(p, link);
        if (atomic_load_explicit(&p->pins, memory_order_acquire) == 0) {
            TAILQ_REMOVE(&s->lingering, p, link);
            finish(s, p); /* releases the lock, but only the driver touches this list */
        }
        p = next;
    }
}

/* The service broke the protocol: no answer can be trusted to belong to its request any more. */
static void fault(fovea_stream_t *s, const fovea_error_t *error)
{
    if (s->broken.code == FOVEA_OK) {
        s->broken = *error;
    }
    fv_duplex_cancel(s->duplex);
}

static void on_received(fovea_stream_t *s, const fv_duplex_event_t *event)
{
    fv_attend_response_view_t view;
    fovea_error_t error = {FOVEA_OK, ""};
    fv_pending_t *p = NULL;

    if (fv_attend_reply_scan(event->spans, event->n_spans, &view, &error) != FOVEA_OK) {
        fault(s, &error);
        return;
    }
    p = fv_stream_find(s, view.request_id);
    if ((p == NULL) || (p->state != FV_PENDING_SENT)) {
        (void)fv_client_fail(&error, FOVEA_INTERNAL,
                             "the service answered request %llu, which is not in flight: %s",
                             (unsigned long long)view.request_id, view.message);
        fault(s, &error);
        return;
    }
    /* The copy runs without the lock: `p` is the driver's until it is finished. */
    (void)pthread_mutex_unlock(&s->lock);
    (void)fv_attend_reply_gather(event->spans, event->n_spans, &view, &p->target,
                                 &p->result.timings, &p->result.error);
    (void)pthread_mutex_lock(&s->lock);
    s->retry_end_us = 0; /* the service is there */
    settle(s, p);
}

/* ------------------------------------------------------------------ again */

/* The service is away, and may come back while we have patience. One that stops cancels what is under way. */
static bool may_open_again(fovea_stream_t *s)
{
    int64_t now_us = fv_clock_us();

    if ((s->client->retry_ms < 0) || s->is_cancelled ||
        ((s->broken.code != FOVEA_UNAVAILABLE) && (s->broken.code != FOVEA_CANCELLED))) {
        return false;
    }
    if (s->retry_end_us == 0) {
        s->retry_end_us = now_us + (int64_t)s->client->retry_ms * 1000;
        s->pause_us = FIRST_PAUSE_US;
    }
    return now_us + s->pause_us < s->retry_end_us;
}

/* What was sent and not answered goes before what waits, all in the order of submission. */
static void queue_again(fovea_stream_t *s)
{
    TAILQ_INIT(&s->queued);
    for (uint32_t i = 0; i < s->n_slots; i++) {
        fv_pending_t *p = s->slots[i];
        fv_pending_t *at = NULL;

        if ((p == NULL) || (p->state > FV_PENDING_SENT)) {
            continue;
        }
        p->state = FV_PENDING_QUEUED;
        TAILQ_FOREACH(at, &s->queued, link)
        {
            if (at->result.ticket > p->result.ticket) {
                break;
            }
        }
        if (at != NULL) {
            TAILQ_INSERT_BEFORE(at, p, link);
        } else {
            TAILQ_INSERT_TAIL(&s->queued, p, link);
        }
    }
}

static void nap_until(int64_t until_us)
{
    int64_t us = until_us - fv_clock_us();
    const struct timespec t = {.tv_sec = (time_t)(us / 1000000),
                               .tv_nsec = (long)(us % 1000000) * 1000};

    if (us > 0) {
        (void)nanosleep(&t, NULL);
    }
}

/* Waits for the service, and opens another call. False: not before the deadline. */
static bool open_again(fovea_stream_t *s, int64_t deadline_us)
{
    int64_t end_us = (s->retry_end_us < deadline_us) ? s->retry_end_us : deadline_us;
    int64_t nap_us = fv_clock_us() + s->pause_us;
    fv_duplex_t *fresh = NULL;
    fv_duplex_t *old = s->duplex;
    fovea_error_t error;

    (void)pthread_mutex_unlock(&s->lock);
    nap_until((nap_us < end_us) ? nap_us : end_us);
    bool is_ready = fv_channel_wait_ready(s->client->channel, end_us);
    if (is_ready) {
        is_ready = fv_duplex_open(s->client->channel, FV_METHOD_PATH("Attention", "Attend"),
                                  FV_RPC_NO_DEADLINE, &fresh, &error) == FOVEA_OK;
    }
    (void)pthread_mutex_lock(&s->lock);
    s->pause_us = (2 * s->pause_us < MAX_PAUSE_US) ? (2 * s->pause_us) : MAX_PAUSE_US;
    if (!is_ready) {
        s->is_reopening = (fv_clock_us() < s->retry_end_us) && !s->is_cancelled;
        return fv_clock_us() < deadline_us;
    }
    s->duplex = fresh;
    s->is_reopening = false;
    s->is_broken = false;
    s->is_sending = false;
    s->is_over = false;
    s->broken = (fovea_error_t){FOVEA_OK, ""};
    queue_again(s);
    fv_duplex_destroy(old);
    if (s->is_cancelled) {
        fv_duplex_cancel(s->duplex);
    }
    fv_stream_send_next(s);
    (void)pthread_cond_broadcast(&s->changed);
    return true;
}

/* The call is over: everything in flight ends with its status, unless it is tried again. */
static void on_closed(fovea_stream_t *s)
{
    const fovea_error_t *status = fv_duplex_status(s->duplex);

    if (!s->is_broken) { /* from here nothing is sent; what was started meanwhile comes back first */
        s->is_broken = true;
        if (s->broken.code == FOVEA_OK) {
            s->broken = *status;
        }
        s->is_reopening = may_open_again(s);
        return;
    }
    if (s->is_reopening && !s->is_cancelled) {
        s->is_over = true; /* step() opens another one */
        return;
    }
    s->is_reopening = false;
    fv_duplex_end(s->duplex);
    TAILQ_INIT(&s->queued);
    for (uint32_t i = 0; i < s->n_slots; i++) {
        fv_pending_t *p = s->slots[i];
        if ((p != NULL) && (p->state <= FV_PENDING_SENT)) {
            p->result.error = s->broken;
            if (s->broken.code == FOVEA_OK) {
                (void)fv_client_fail(&p->result.error, FOVEA_UNAVAILABLE,
                                     "the service ended the stream before it answered");
            }
            settle(s, p);
        }
    }
    s->is_closed = TAILQ_EMPTY(&s->lingering);
    (void)pthread_cond_broadcast(&s->changed);
}

/* One event. False when there was none before the deadline. */
static bool step(fovea_stream_t *s, int64_t deadline_us)
{
    bool is_lingering = !TAILQ_EMPTY(&s->lingering);
    int64_t until_us = deadline_us;
    fv_duplex_event_t event;

    if (s->is_reopening && s->is_over && !s->is_cancelled) {
        return open_again(s, deadline_us);
    }

    if (is_lingering) {
        int64_t soon_us = fv_clock_us() + LINGER_POLL_US;
        until_us = (soon_us < deadline_us) ? soon_us : deadline_us;
    }
    (void)pthread_mutex_unlock(&s->lock);
    event = fv_duplex_next(s->duplex, until_us);
    (void)pthread_mutex_lock(&s->lock);
    settle_lingering(s);
    switch (event.kind) {
    case FV_DUPLEX_SENT:
        s->is_sending = false;
        fv_stream_send_next(s);
        if (!s->is_sending) {
            (void)pthread_cond_broadcast(&s->changed); /* fovea_stream_close() may wait for it */
        }
        break;
    case FV_DUPLEX_RECEIVED:
        on_received(s, &event);
        fv_duplex_receive_next(s->duplex);
        break;
    case FV_DUPLEX_CLOSED:
        on_closed(s);
        break;
    case FV_DUPLEX_TIMEOUT:
        return fv_clock_us() < deadline_us;
    case FV_DUPLEX_OTHER:
        break;
    }
    return true;
}

/* Sleeps until something changes; false when the deadline passed. */
static bool sleep_until(fovea_stream_t *s, int64_t deadline_us)
{
    struct timespec at = {.tv_sec = (time_t)(deadline_us / 1000000),
                          .tv_nsec = (long)(deadline_us % 1000000) * 1000};

    if (deadline_us == FV_RPC_NO_DEADLINE) {
        return pthread_cond_wait(&s->changed, &s->lock) == 0;
    }
    return pthread_cond_timedwait(&s->changed, &s->lock, &at) == 0;
}

bool fv_stream_drive(fovea_stream_t *s,
                     fv_stream_until_fn_t until,
                     const void *ctx,
                     int64_t deadline_us)
{
    bool in_time = true;

    while (!until(s, ctx) && in_time) {
        if (s->is_driven) {
            in_time = sleep_until(s, deadline_us);
            continue;
        }
        s->is_driven = true;
        while (in_time && !until(s, ctx)) {
            in_time = step(s, deadline_us);
        }
        s->is_driven = false;
        (void)pthread_cond_broadcast(&s->changed); /* somebody else may have to take over */
    }
    return until(s, ctx);
}
