/*
 * rpc_loop.c - the threads that take gRPC's events: one, and a second one while large messages come in.
 *
 * Decode path: station 1 of 10. Before: rpc_server.c starts them. After: rpc_event.c.
 *
 * Small messages are served fastest by one thread that polls: of several, one polls and wakes another for what it found. But
 * that thread also parses what arrives, and copies it: some milliseconds of a prompt's message, in which nobody reads others'.
 * So a second thread joins when a large message was seen, and leaves when none was copied for HELP_US. Events are handled
 * by one of them at a time, under the door's lock (fv_calls_t); what takes long is done aside, without it
 * (fv_call_step_aside()), while the other thread polls and serves.
 */
#include "common/clock.h"
#include "common/log.h"
#include "coord/rpc_call.h"

#include <grpc/support/time.h>

#define REQUESTS_POSTED 64    /* calls that can be matched before a thread comes round */
#define EVENTS_PER_IDLE 1024U /* a busy door still lets its handler serve */
#define HELP_US         200000
#define LOOK_US         50000 /* how often a thread asks whether the second is still wanted */

static bool wants_idle(const fv_loop_t *loop)
{
    const fv_rpc_handlers_t *handlers = loop->calls->handlers;

    return (handlers->wants_idle != NULL) && handlers->wants_idle(handlers->ctx);
}

/* The door's lock is held. */
static bool is_helped(const fv_loop_t *loop)
{
    return (loop->calls->n_aside > 0U) || (fv_clock_us() < loop->calls->busy_until_us);
}

/* How long the next event may be waited for; not at all when the handler has something to do meanwhile. The door's lock is held. */
static int64_t may_wait_us(fv_loop_t *loop, uint32_t *n_since_idle, bool *out_is_idle)
{
    *out_is_idle = false;
    if (!wants_idle(loop)) {
        int64_t left_us = fv_waiting_expire(loop->calls);

        *n_since_idle = 0;
        /* what the other thread puts on that list is not known here */
        return (is_helped(loop) && (left_us > LOOK_US)) ? LOOK_US : left_us;
    }
    if (*n_since_idle >= EVENTS_PER_IDLE) {
        *n_since_idle = 0;
        *out_is_idle = true;
        return 0;
    }
    (*n_since_idle)++;
    return 0;
}

static gpr_timespec until(int64_t wait_us)
{
    if (wait_us == INT64_MAX) {
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    }
    if (wait_us == 0) {
        return gpr_time_0(GPR_CLOCK_MONOTONIC);
    }
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_micros(wait_us, GPR_TIMESPAN));
}

/* One event, or an idle moment. False: the queue has shut down. */
static bool serve_one(fv_loop_t *loop, uint32_t *n_since_idle)
{
    fv_calls_t *calls = loop->calls;
    const fv_rpc_handlers_t *handlers = calls->handlers;
    grpc_event event = {.type = GRPC_QUEUE_TIMEOUT};
    bool is_idle = false;

    (void)pthread_mutex_lock(&calls->door);
    int64_t wait_us = may_wait_us(loop, n_since_idle, &is_idle);
    (void)pthread_mutex_unlock(&calls->door);
    if (!is_idle) {
        event = grpc_completion_queue_next(calls->queue, until(wait_us), NULL);
    }
    if (event.type == GRPC_QUEUE_SHUTDOWN) {
        return false;
    }
    (void)pthread_mutex_lock(&calls->door);
    if (event.type == GRPC_OP_COMPLETE) {
        fv_calls_on_event(event.tag, event.success != 0);
    } else if ((wait_us == 0) && (handlers->on_idle != NULL)) {
        handlers->on_idle(handlers->ctx);
    }
    (void)pthread_mutex_unlock(&calls->door);
    return true;
}

static void *run(void *arg)
{
    fv_loop_t *loop = arg;
    fv_calls_t *calls = loop->calls;
    uint32_t n_since_idle = 0;

    fv_log_thread_name("rpc");
    (void)pthread_mutex_lock(&calls->door);
    fv_calls_begin(calls, REQUESTS_POSTED);
    (void)pthread_mutex_unlock(&calls->door);
    while (serve_one(loop, &n_since_idle)) {
    }
    return NULL;
}

/* False: the end. */
static bool wait_until_wanted(fv_loop_t *loop)
{
    fv_calls_t *calls = loop->calls;

    (void)pthread_mutex_lock(&calls->door);
    while (!loop->is_ending && !is_helped(loop) && !wants_idle(loop)) {
        (void)pthread_cond_wait(&calls->is_busy, &calls->door);
    }
    bool is_ending = loop->is_ending;
    (void)pthread_mutex_unlock(&calls->door);
    return !is_ending;
}

static void *help(void *arg)
{
    fv_loop_t *loop = arg;
    uint32_t n_since_idle = 0;

    fv_log_thread_name("rpc 2");
    while (wait_until_wanted(loop) && serve_one(loop, &n_since_idle)) {
    }
    return NULL;
}

fv_status_t fv_loop_start(fv_loop_t *loop, fv_calls_t *calls)
{
    loop->calls = calls;
    loop->is_ending = false;
    if (pthread_create(&loop->thread, NULL, run, loop) != 0) {
        return fv_fail(FV_ERR_SYSTEM, "rpc: cannot create a thread");
    }
    loop->is_running = true;
    loop->has_helper = pthread_create(&loop->helper, NULL, help, loop) == 0; /* works without */
    return FV_OK;
}

void fv_loop_join(fv_loop_t *loop)
{
    if (!loop->is_running) {
        return;
    }
    (void)pthread_mutex_lock(&loop->calls->door);
    loop->is_ending = true;
    (void)pthread_cond_broadcast(&loop->calls->is_busy);
    (void)pthread_mutex_unlock(&loop->calls->door);
    if (loop->has_helper) {
        (void)pthread_join(loop->helper, NULL);
    }
    (void)pthread_join(loop->thread, NULL);
    loop->is_running = false;
}

void fv_call_step_aside(fv_call_t *call)
{
    fv_calls_t *calls = call->calls;

    calls->n_aside++;
    (void)pthread_cond_signal(&calls->is_busy);
    (void)pthread_mutex_unlock(&calls->door);
}

void fv_call_step_back(fv_call_t *call)
{
    fv_calls_t *calls = call->calls;

    (void)pthread_mutex_lock(&calls->door);
    calls->n_aside--;
    calls->busy_until_us = fv_clock_us() + HELP_US; /* from here on: a copy may take far longer */
}
