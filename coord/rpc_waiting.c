/*
 * rpc_waiting.c - calls whose first message has not come yet, and their end when it does not come.
 *
 * All wait equally long, so a list in the order of their arrival is in the order of their ends.
 */
#include "common/clock.h"
#include "coord/rpc_call.h"

#include <stdio.h>

void fv_waiting_add(fv_call_t *call)
{
    fv_calls_t *calls = call->calls;

    /* a stream that its client keeps at hand costs no more before its first message than after it */
    if ((calls->first_message_us == 0) || (call->method->method == FV_METHOD_ATTEND)) {
        return;
    }
    call->is_waiting = true;
    call->waits_until_us = fv_clock_us() + calls->first_message_us;
    call->waiting_prev = calls->waiting_last;
    if (calls->waiting_last != NULL) {
        calls->waiting_last->waiting_next = call;
    } else {
        calls->waiting_first = call;
    }
    calls->waiting_last = call;
}

void fv_waiting_remove(fv_call_t *call)
{
    fv_calls_t *calls = call->calls;

    if (!call->is_waiting) {
        return;
    }
    call->is_waiting = false;
    if (call->waiting_prev != NULL) {
        call->waiting_prev->waiting_next = call->waiting_next;
    } else {
        calls->waiting_first = call->waiting_next;
    }
    if (call->waiting_next != NULL) {
        call->waiting_next->waiting_prev = call->waiting_prev;
    } else {
        calls->waiting_last = call->waiting_prev;
    }
    call->waiting_prev = NULL;
    call->waiting_next = NULL;
}

int64_t fv_waiting_expire(fv_calls_t *calls)
{
    int64_t now_us = (calls->waiting_first == NULL) ? 0 : fv_clock_us();

    while (calls->waiting_first != NULL) {
        fv_call_t *call = calls->waiting_first;
        char text[FV_ERROR_TEXT_BYTES];
        if (call->waits_until_us > now_us) {
            return call->waits_until_us - now_us;
        }
        (void)snprintf(text, sizeof(text), "message: none came in %lld ms (first_message_ms)",
                       (long long)(calls->first_message_us / 1000));
        fv_waiting_remove(call);
        (void)pthread_mutex_lock(&call->lock);
        fv_call_end(call, GRPC_STATUS_DEADLINE_EXCEEDED, text);
        (void)pthread_mutex_unlock(&call->lock);
        fv_call_pump(call); /* it lives: its close, still to come, takes it off the list */
    }
    return INT64_MAX;
}
