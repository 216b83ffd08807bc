/*
 * client_stream.c - the calls of fovea.h on a stream.
 */
#include "client/client_stream.h"

#include <signal.h>
#include <stdlib.h>

#define SLOTS_MIN        64
#define CLOSE_TIMEOUT_MS 1000 /* for an orderly end; after it the call is cancelled */

/* ------------------------------------------------------------------ what one can wait for */

static bool until_closed(const fovea_stream_t *s, const void *ctx)
{
    (void)ctx;
    return s->is_closed;
}

static bool until_sent(const fovea_stream_t *s, const void *ctx)
{
    (void)ctx;
    return !s->is_sending || s->is_closed;
}

static bool until_idle(const fovea_stream_t *s, const void *ctx)
{
    (void)ctx;
    return s->n_in_flight == 0;
}

static bool until_ticket(const fovea_stream_t *s, const void *ctx)
{
    const fv_pending_t *p = fv_stream_find(s, *(const uint64_t *)ctx);

    return (p == NULL) || (p->done != NULL) || (p->state == FV_PENDING_FINISHED);
}

static bool until_collectable(const fovea_stream_t *s, const void *ctx)
{
    (void)ctx;
    return !TAILQ_EMPTY(&s->finished) || (s->n_in_flight_plain == 0);
}

static bool until_any(const fovea_stream_t *s, const void *ctx)
{
    return (s->n_finished != *(const uint64_t *)ctx) || (s->n_in_flight == 0);
}

/* ------------------------------------------------------------------ life */

static void *thread_main(void *arg)
{
    fovea_stream_t *s = arg;

    (void)pthread_mutex_lock(&s->lock);
    (void)fv_stream_drive(s, until_closed, NULL, FV_RPC_NO_DEADLINE);
    (void)pthread_mutex_unlock(&s->lock);
    return NULL;
}

/* Signals are the application's: none is delivered to the stream's thread. */
static bool start_thread(fovea_stream_t *s)
{
    sigset_t all;
    sigset_t before;

    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    s->has_thread = pthread_create(&s->thread, NULL, thread_main, s) == 0;
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return s->has_thread;
}

static void sync_init(fovea_stream_t *s)
{
    pthread_condattr_t attr;

    (void)pthread_mutex_init(&s->lock, NULL);
    (void)pthread_condattr_init(&attr);
    (void)pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&s->changed, &attr);
    (void)pthread_condattr_destroy(&attr);
}

fovea_code_t fovea_stream_open(fovea_client_t *client,
                               const fovea_stream_options_t *options,
                               fovea_stream_t **out,
                               fovea_error_t *error)
{
    fovea_stream_t *s = NULL;
    fovea_code_t code = FOVEA_OK;

    if ((client == NULL) || (out == NULL)) {
        return fv_client_null(error, "client or out");
    }
    s = calloc(1, sizeof(*s));
    if (s == NULL) {
        return fv_client_fail(error, FOVEA_RESOURCE_EXHAUSTED, "out of host memory");
    }
    s->client = client;
    TAILQ_INIT(&s->queued);
    TAILQ_INIT(&s->lingering);
    TAILQ_INIT(&s->finished);
    sync_init(s);
    code = fv_duplex_open(client->channel, FV_METHOD_PATH("Attention", "Attend"),
                          FV_RPC_NO_DEADLINE, &s->duplex, error);
    if (code != FOVEA_OK) {
        free(s);
        return code;
    }
    if ((options != NULL) && options->with_thread && !start_thread(s)) {
        fovea_stream_close(s);
        return fv_client_fail(error, FOVEA_RESOURCE_EXHAUSTED, "no thread could be started");
    }
    *out = s;
    return FOVEA_OK;
}

void fovea_stream_cancel(fovea_stream_t *stream)
{
    if (stream != NULL) {
        (void)pthread_mutex_lock(&stream->lock);
        stream->is_cancelled = true;
        fv_duplex_cancel(stream->duplex);
        (void)pthread_mutex_unlock(&stream->lock);
    }
}

void fovea_stream_close(fovea_stream_t *s)
{
    if (s == NULL) {
        return;
    }
    (void)pthread_mutex_lock(&s->lock);
    s->is_cancelled = s->is_cancelled || s->is_reopening || (s->n_in_flight > 0);
    if (s->n_in_flight == 0) {
        int64_t deadline_us = fv_client_deadline(CLOSE_TIMEOUT_MS);
        if (fv_stream_drive(s, until_sent, NULL, deadline_us) && !s->is_broken) {
            s->is_broken = true; /* no further message may follow the half-close */
            fv_duplex_half_close(s->duplex);
        }
        (void)fv_stream_drive(s, until_closed, NULL, deadline_us);
    }
    if (!s->is_closed) {
        fv_duplex_cancel(s->duplex);
        (void)fv_stream_drive(s, until_closed, NULL, FV_RPC_NO_DEADLINE);
    }
    (void)pthread_mutex_unlock(&s->lock);
    if (s->has_thread) {
        (void)pthread_join(s->thread, NULL);
    }
    for (uint32_t i = 0; i < s->n_slots; i++) {
        if (s->slots[i] != NULL) { /* finished, not collected */
            fv_stream_release(s, s->slots[i]);
        }
    }
    fv_duplex_destroy(s->duplex);
    (void)pthread_cond_destroy(&s->changed);
    (void)pthread_mutex_destroy(&s->lock);
    free(s->slots);
    free(s);
}

/* ------------------------------------------------------------------ submit */

/* A free slot, growing the table when there is none; false when out of memory. */
static bool take_slot(fovea_stream_t *s, uint32_t *out)
{
    uint32_t slot = s->first_free_hint;

    while ((slot < s->n_slots) && (s->slots[slot] != NULL)) {
        slot++;
    }
    if (slot == s->n_slots) {
        uint32_t n_slots = (s->n_slots == 0) ? SLOTS_MIN : (2 * s->n_slots);
        fv_pending_t **slots = NULL;

        if (n_slots <= (1U << FV_TICKET_SLOT_BITS)) {
            slots = realloc(s->slots, n_slots * sizeof(fv_pending_t *));
        }
        if (slots == NULL) {
            return false;
        }
        memset(&slots[s->n_slots], 0, (n_slots - s->n_slots) * sizeof(fv_pending_t *));
        s->slots = slots;
        s->n_slots = n_slots;
    }
    s->first_free_hint = slot + 1;
    *out = slot;
    return true;
}

/* Gives the request its ticket, encodes it and puts it in the queue. Lock held. */
static fovea_code_t enqueue(fovea_stream_t *s,
                            fv_pending_t *p,
                            const fovea_attend_request_t *request,
                            fovea_error_t *error)
{
    uint32_t slot = 0;
    fovea_code_t code = FOVEA_OK;

    if (s->is_broken && !s->is_reopening) {
        if (s->broken.code == FOVEA_OK) {
            return fv_client_fail(error, FOVEA_UNAVAILABLE, "the service has ended this stream");
        }
        return fv_client_fail(error, s->broken.code, "the stream is broken: %s", s->broken.message);
    }
    if (!take_slot(s, &slot)) {
        return fv_client_fail(error, FOVEA_RESOURCE_EXHAUSTED, "out of host memory");
    }
    p->result.ticket = ((s->n_submitted + 1) << FV_TICKET_SLOT_BITS) | slot;
    code = fv_attend_message_init(&p->message, request, p->result.ticket, &p->pins, error);
    if (code != FOVEA_OK) {
        s->first_free_hint = (slot < s->first_free_hint) ? slot : s->first_free_hint;
        return code;
    }
    s->slots[slot] = p;
    s->n_submitted++;
    s->n_in_flight++;
    s->n_in_flight_plain += (p->done == NULL) ? 1 : 0;
    TAILQ_INSERT_TAIL(&s->queued, p, link);
    fv_stream_send_next(s);
    return FOVEA_OK;
}

fovea_code_t fovea_stream_submit(fovea_stream_t *s,
                                 const fovea_attend_request_t *request,
                                 fovea_done_fn_t done,
                                 void *user,
                                 uint64_t *out_ticket,
                                 fovea_error_t *error)
{
    fv_pending_t *p = NULL;
    uint64_t ticket = 0;
    fovea_code_t code = FOVEA_OK;

    if ((s == NULL) || (request == NULL)) {
        return fv_client_null(error, "stream or request");
    }
    p = calloc(1, sizeof(*p));
    if (p == NULL) {
        return fv_client_fail(error, FOVEA_RESOURCE_EXHAUSTED, "out of host memory");
    }
    p->done = done;
    p->result.user = user;
    p->target = fv_attend_target(request);
    (void)pthread_mutex_lock(&s->lock);
    code = enqueue(s, p, request, error);
    ticket = p->result.ticket; /* with the lock held: afterwards `p` may be gone */
    (void)pthread_mutex_unlock(&s->lock);
    if (code != FOVEA_OK) {
        free(p);
        return code;
    }
    if (out_ticket != NULL) {
        *out_ticket = ticket;
    }
    return FOVEA_OK;
}

/* ------------------------------------------------------------------ wait */

static void collect(fovea_stream_t *s, fv_pending_t *p, fovea_result_t *out)
{
    if (out != NULL) {
        *out = p->result;
    }
    TAILQ_REMOVE(&s->finished, p, link);
    fv_stream_release(s, p);
}

static fovea_code_t late(const fovea_stream_t *s, int64_t timeout_ms, fovea_error_t *error)
{
    if (timeout_ms == FOVEA_TIMEOUT_DEFAULT) {
        timeout_ms = s->client->call_timeout_ms;
    }
    return fv_client_fail(error, FOVEA_DEADLINE_EXCEEDED, "nothing finished within %lld ms",
                          (long long)timeout_ms);
}

fovea_code_t fovea_stream_wait(fovea_stream_t *s,
                               uint64_t ticket,
                               int64_t timeout_ms,
                               fovea_result_t *out,
                               fovea_error_t *error)
{
    fovea_code_t code = FOVEA_OK;
    fv_pending_t *p = NULL;

    if ((s == NULL) || (out == NULL)) {
        return fv_client_null(error, "stream or out");
    }
    (void)pthread_mutex_lock(&s->lock);
    if (!fv_stream_drive(s, until_ticket, &ticket,
                         fv_client_call_deadline(s->client, timeout_ms))) {
        code = late(s, timeout_ms, error);
    } else {
        p = fv_stream_find(s, ticket);
        if ((p == NULL) || (p->done != NULL)) {
            code = fv_client_fail(error, FOVEA_NOT_FOUND,
                                  "ticket: given %llu, expected one in flight or not yet collected",
                                  (unsigned long long)ticket);
        } else {
            collect(s, p, out);
        }
    }
    (void)pthread_mutex_unlock(&s->lock);
    return code;
}

fovea_code_t
fovea_stream_poll(fovea_stream_t *s, int64_t timeout_ms, fovea_result_t *out, fovea_error_t *error)
{
    fovea_code_t code = FOVEA_OK;
    int64_t deadline_us = fv_client_deadline(timeout_ms);

    if (s == NULL) {
        return fv_client_null(error, "stream");
    }
    (void)pthread_mutex_lock(&s->lock);
    const uint64_t n_before = s->n_finished;
    if (!fv_stream_drive(s, (out != NULL) ? until_collectable : until_any, &n_before,
                         deadline_us)) {
        code = fv_client_fail(error, FOVEA_DEADLINE_EXCEEDED, "nothing finished within %lld ms",
                              (long long)timeout_ms);
    } else if ((out != NULL) && !TAILQ_EMPTY(&s->finished)) {
        collect(s, TAILQ_FIRST(&s->finished), out);
    } else if ((out != NULL) || (s->n_finished == n_before)) {
        code = fv_client_fail(error, FOVEA_NOT_FOUND, "no request is in flight");
    }
    (void)pthread_mutex_unlock(&s->lock);
    return code;
}

fovea_code_t fovea_stream_flush(fovea_stream_t *s, int64_t timeout_ms, fovea_error_t *error)
{
    fovea_code_t code = FOVEA_OK;

    if (s == NULL) {
        return fv_client_null(error, "stream");
    }
    (void)pthread_mutex_lock(&s->lock);
    if (!fv_stream_drive(s, until_idle, NULL, fv_client_call_deadline(s->client, timeout_ms))) {
        code = late(s, timeout_ms, error);
    }
    (void)pthread_mutex_unlock(&s->lock);
    return code;
}

uint32_t fovea_stream_in_flight(fovea_stream_t *s)
{
    uint32_t n_in_flight = 0;

    if (s != NULL) {
        (void)pthread_mutex_lock(&s->lock);
        n_in_flight = s->n_in_flight;
        (void)pthread_mutex_unlock(&s->lock);
    }
    return n_in_flight;
}
