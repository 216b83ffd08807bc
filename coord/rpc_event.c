/*
 * rpc_event.c - what happens to calls: matched, a message read, a reply sent, closed.
 *
 * Decode path: station 1 of 10. Before: rpc_loop.c. After: coord/engine_inbox.c.
 */
#include "common/clock.h"
#include "common/fault.h"
#include "common/log.h"
#include "coord/rpc_call.h"

#include <grpc/support/time.h>

#include <stdlib.h>
#include <string.h>

#define BUILTIN_REQUEST_BYTES 4096U /* health and reflection requests hold one name */

/* ------------------------------------------------------------------ deliveries; thread rpc */

/* One contiguous piece of a small message; false when it is larger than `flat`. */
static bool flatten(const fv_span_list_t *list, uint8_t *flat, size_t flat_bytes, fv_span_t *out)
{
    size_t n = 0;

    if (list->n_spans == 1U) {
        *out = list->spans[0];
        return out->n_bytes <= flat_bytes;
    }
    for (size_t i = 0; i < list->n_spans; i++) {
        if (list->spans[i].n_bytes > flat_bytes - n) {
            return false;
        }
        memcpy(flat + n, list->spans[i].data, list->spans[i].n_bytes);
        n += list->spans[i].n_bytes;
    }
    out->data = flat;
    out->n_bytes = n;
    return true;
}

static void deliver_builtin(fv_call_t *call, const fv_span_list_t *spans)
{
    uint8_t flat[BUILTIN_REQUEST_BYTES];
    fv_span_t request;
    int method = call->method->method;

    if (!flatten(spans, flat, sizeof(flat), &request)) {
        fv_call_fail(call, GRPC_STATUS_INVALID_ARGUMENT,
                     "request: given more than 4096 bytes, expected one name");
    } else if ((method == FV_METHOD_HEALTH_CHECK) || (method == FV_METHOD_HEALTH_WATCH)) {
        fv_health_message(call->calls->health, call, method == FV_METHOD_HEALTH_WATCH, request);
    } else {
        fv_reflection_message(call, request);
    }
}

static void deliver(fv_call_t *call, grpc_byte_buffer *message)
{
    fv_calls_t *calls = call->calls;
    fv_span_list_t spans = calls->spans; /* the handler may step aside, and another message come */
    int64_t now_us = fv_clock_us();

    calls->spans = (fv_span_list_t){0};
    if (fv_message_spans(message, &spans) != FV_OK) {
        fv_call_fail(call, GRPC_STATUS_RESOURCE_EXHAUSTED, fv_error_context());
    } else if (call->method->method >= FV_METHOD_COUNT) {
        deliver_builtin(call, &spans);
    } else {
        call->was_delivered = true;
        fv_call_charge(call, now_us);
        fv_fault_point(1);
        calls->handlers->on_message(calls->handlers->ctx, call, fv_call_method(call), spans.spans,
                                    spans.n_spans, now_us, call->deadline_us);
    }
    if (calls->spans.spans == NULL) {
        calls->spans = spans;
    } else {
        free(spans.spans);
    }
}

/* ------------------------------------------------------------------ events; thread rpc */

static int64_t deadline_us(gpr_timespec deadline)
{
    gpr_timespec now = gpr_now(deadline.clock_type);

    if (gpr_time_cmp(deadline, gpr_inf_future(deadline.clock_type)) == 0) {
        return INT64_MAX;
    }
    /* as a distance: gRPC's clocks need not begin where ours does */
    gpr_timespec left = gpr_time_sub(deadline, now);
    if (gpr_time_cmp(left, gpr_time_from_hours(8760, GPR_TIMESPAN)) > 0) {
        return INT64_MAX;
    }
    return fv_clock_us() + (left.tv_sec * 1000000) + (left.tv_nsec / 1000);
}

static void link_call(fv_call_t *call)
{
    fv_calls_t *calls = call->calls;

    (void)pthread_mutex_lock(&calls->lock);
    call->next = calls->live;
    if (call->next != NULL) {
        call->next->prev = call;
    }
    calls->live = call;
    calls->n_live++;
    calls->n_health += fv_call_is_health(call) ? 1U : 0U;
    (void)pthread_mutex_unlock(&calls->lock);
}

/* Lock of `calls` held. */
static void signal_if_idle(fv_calls_t *calls)
{
    if ((calls->n_live == 0U) && (calls->n_requests == 0U)) {
        (void)pthread_cond_broadcast(&calls->idle);
    }
}

static void bury_if_over(fv_call_t *call)
{
    fv_calls_t *calls = call->calls;

    (void)pthread_mutex_lock(&call->lock);
    bool is_over = atomic_load(&call->is_closed) && (call->n_batches == 0U) && !call->is_delivering;
    (void)pthread_mutex_unlock(&call->lock);
    if (!is_over) {
        return;
    }
    grpc_call_unref(call->call);
    (void)pthread_mutex_lock(&calls->lock);
    if (call->prev != NULL) {
        call->prev->next = call->next;
    } else {
        calls->live = call->next;
    }
    if (call->next != NULL) {
        call->next->prev = call->prev;
    }
    calls->n_live--;
    calls->n_health -= fv_call_is_health(call) ? 1U : 0U;
    signal_if_idle(calls);
    (void)pthread_mutex_unlock(&calls->lock);
    fv_call_unref(call); /* the one of its life */
}

/* Asks gRPC for one more call. */
static void request_next(fv_calls_t *calls)
{
    fv_call_t *call = fv_call_create(calls);

    if (call == NULL) { /* the other requests posted keep the door open */
        fv_error("out of memory: one call fewer can be accepted at a time");
        return;
    }
    (void)pthread_mutex_lock(&calls->lock);
    calls->n_requests++;
    (void)pthread_mutex_unlock(&calls->lock);
    /* After a shutdown the tag comes back at once, failed: that is counted like any other. */
    grpc_call_error error =
        grpc_server_request_call(calls->server, &call->call, &call->details, &call->metadata,
                                 calls->queue, calls->queue, &call->tag_request);
    FV_ASSERT(error == GRPC_CALL_OK);
}

static void count_request_back(fv_calls_t *calls)
{
    (void)pthread_mutex_lock(&calls->lock);
    calls->n_requests--;
    signal_if_idle(calls);
    (void)pthread_mutex_unlock(&calls->lock);
}

static void on_request(fv_call_t *call, bool is_ok)
{
    fv_calls_t *calls = call->calls;

    if (is_ok) {
        request_next(calls);
        call->method = fv_method_find((const char *)GRPC_SLICE_START_PTR(call->details.method),
                                      GRPC_SLICE_LENGTH(call->details.method));
        call->deadline_us = deadline_us(call->details.deadline);
        fv_call_start_close(call);
        link_call(call); /* from here on fv_calls_stop() sees it */
        fv_status_t status = (call->method == NULL) ? FV_OK : fv_call_admit(call);
        (void)pthread_mutex_lock(&call->lock);
        if (call->method == NULL) {
            fv_call_end(call, GRPC_STATUS_UNIMPLEMENTED, "method: no such method is served here");
        } else if (status != FV_OK) { /* decided before any read is posted */
            fv_call_end(call, fv_status_grpc(status), fv_error_context());
        } else if (atomic_load(&calls->is_stopping)) {
            fv_call_end(call, GRPC_STATUS_UNAVAILABLE, "the service is stopping");
        }
        bool expects_message = !call->is_ending;
        (void)pthread_mutex_unlock(&call->lock);
        if (expects_message) {
            fv_waiting_add(call);
        }
        fv_call_pump(call);
    }
    grpc_metadata_array_destroy(&call->metadata);
    grpc_call_details_destroy(&call->details);
    count_request_back(calls);
    if (!is_ok) { /* the server is shutting down */
        fv_call_unref(call);
    }
}

/* NULL is the end of the client's messages, or a failure that the close tag will report. */
static void on_no_message(fv_call_t *call)
{
    if (grpc_call_failed_before_recv_message(call->call) != 0) {
        return;
    }
    call->is_half_closed = true;
    if ((call->method->kind != FV_CALL_BIDI) && !call->is_ending) {
        fv_call_end(call, GRPC_STATUS_INVALID_ARGUMENT, "message: given none, expected one");
    }
}

static void on_read(fv_call_t *call)
{
    grpc_byte_buffer *message = call->received;
    fv_status_t admitted = FV_OK;

    call->received = NULL;
    fv_waiting_remove(call);
    if (message != NULL) {
        admitted =
            fv_call_recheck(call); /* a call may have been open for long before its message */
    }
    (void)pthread_mutex_lock(&call->lock);
    if (admitted != FV_OK) {
        fv_call_end(call, fv_status_grpc(admitted), fv_error_context());
    }
    call->n_batches--;
    call->is_reading = false;
    bool is_stopping = atomic_load(&call->calls->is_stopping);
    bool is_wanted = (message != NULL) && !call->is_ending && !atomic_load(&call->is_closed);
    if (message == NULL) {
        on_no_message(call);
    } else if (is_wanted && is_stopping) { /* not delivered, so a retry elsewhere is safe */
        is_wanted = false;
        call->is_refusing = true;
        if (call->method->kind !=
            FV_CALL_BIDI) { /* a stream ends when its other messages are answered */
            fv_call_end(call, GRPC_STATUS_UNAVAILABLE, "the service is stopping");
        }
    } else if (is_wanted) {
        call->n_inflight++;
        call->is_delivering = true; /* the next one is not read before, so that none overtakes */
    }
    (void)pthread_mutex_unlock(&call->lock);
    if (is_wanted) {
        deliver(call, message);
        (void)pthread_mutex_lock(&call->lock);
        call->is_delivering = false;
        (void)pthread_mutex_unlock(&call->lock);
    }
    if (message != NULL) {
        grpc_byte_buffer_destroy(message);
    }
    fv_call_pump(call);
}

static void on_sent(fv_call_t *call)
{
    (void)pthread_mutex_lock(&call->lock);
    fv_outgoing_t *sent = call->sending;
    call->sending = NULL;
    call->n_batches--;
    call->is_sending = false;
    if ((sent != NULL) && (call->n_inflight > 0)) {
        call->n_inflight--;
    }
    (void)pthread_mutex_unlock(&call->lock);
    fv_outgoing_drop(sent);
    fv_call_pump(call);
}

static void on_close(fv_call_t *call)
{
    fv_calls_t *calls = call->calls;

    fv_waiting_remove(call);
    (void)pthread_mutex_lock(&call->lock);
    atomic_store(&call->is_closed, true);
    call->n_batches--;
    fv_outgoing_t *unsent = call->first;
    uint32_t n_ends = call->n_ends;
    call->first = NULL;
    call->n_ends = 0;
    (void)pthread_mutex_unlock(&call->lock);
    fv_requests_end(fv_call_principal(call), n_ends);
    fv_outgoing_drop(unsent);
    if (call->was_delivered) {
        calls->handlers->on_closed(calls->handlers->ctx, call);
    } else if ((call->method != NULL) && (call->method->method == FV_METHOD_HEALTH_WATCH)) {
        fv_health_closed(calls->health, call);
    }
}

void fv_calls_on_event(void *tag_pointer, bool is_ok)
{
    fv_tag_t *tag = tag_pointer;
    fv_call_t *call = tag->call;

    switch (tag->kind) {
    case FV_TAG_REQUEST:
        on_request(call, is_ok);
        return;
    case FV_TAG_READ:
        on_read(call);
        break;
    case FV_TAG_SEND:
        on_sent(call);
        break;
    case FV_TAG_CLOSE:
        on_close(call);
        break;
    }
    bury_if_over(call);
    fv_call_unref(call); /* the batch's */
}

/* ------------------------------------------------------------------ all calls */

void fv_calls_init(fv_calls_t *calls)
{
    memset(calls, 0, sizeof(*calls));
    atomic_init(&calls->is_stopping, false);
    (void)pthread_mutex_init(&calls->lock, NULL);
    (void)pthread_cond_init(&calls->idle, NULL);
    (void)pthread_mutex_init(&calls->door, NULL);
    (void)pthread_cond_init(&calls->is_busy, NULL);
}

void fv_calls_fini(fv_calls_t *calls)
{
    FV_ASSERT(calls->n_live + calls->n_requests == 0U);
    free(calls->spans.spans);
    (void)pthread_cond_destroy(&calls->idle);
    (void)pthread_cond_destroy(&calls->is_busy);
    (void)pthread_mutex_destroy(&calls->door);
    (void)pthread_mutex_destroy(&calls->lock);
}

void fv_calls_begin(fv_calls_t *calls, size_t n_requests)
{
    for (size_t i = 0; i < n_requests; i++) {
        request_next(calls);
    }
    count_request_back(calls);
}

void fv_calls_stop(fv_calls_t *calls)
{
    size_t n = 0;

    atomic_store(&calls->is_stopping, true);
    (void)pthread_mutex_lock(&calls->lock);
    fv_call_t **live = calloc(calls->n_live + 1U, sizeof(fv_call_t *));
    for (fv_call_t *call = calls->live; (live != NULL) && (call != NULL); call = call->next) {
        fv_call_ref(call);
        live[n++] = call;
    }
    (void)pthread_mutex_unlock(&calls->lock);
    for (size_t i = 0; i < n;
         i++) { /* idle streams end now; without memory, when the grace is over */
        fv_call_pump(live[i]);
        fv_call_unref(live[i]);
    }
    free(live);
}

void fv_calls_wait_idle(fv_calls_t *calls)
{
    (void)pthread_mutex_lock(&calls->lock);
    while (calls->n_live + calls->n_requests != 0U) {
        (void)pthread_cond_wait(&calls->idle, &calls->lock);
    }
    (void)pthread_mutex_unlock(&calls->lock);
}
