/*
 * engine_pipeline.c - the order of things: commands, and up to two steps under way.
 *
 * Decode path: stations 3 to 5 and 9 of 10, see engine_step.c for each stage.
 *
 *   ranks   | step n computes ....... | step n + 1 computes ..... |
 *   engine  | form, begin n + 1       | collect n, commit, form and begin n + 2, answer n
 *   tensors |    n + 1 in             |    n out, n + 2 in
 *
 * fv_engine_look() does whatever can be done without waiting. It runs between steps, and again and again while our own
 * share's device works (on_wait), so that the thread that computes is never what others wait for.
 *
 * When the next step is formed. A step formed early is smaller: what comes a moment later misses it. So it is formed when a
 * rank has nothing left to do, or when so many bytes wait that their way to the ranks takes longer than a step costs.
 *
 * Commands that change sessions wait until nothing is under way, and no step is formed while one waits (one for a session
 * whose prefill is half-way waits, by itself, until that has ended); likewise a step
 * with a failed request waits for the other one under way and is then undone (coord/sched.h says why). Both end within
 * two steps. Commands that only read are answered at once, from what is committed.
 */
#include "common/clock.h"
#include "common/log.h"
#include "coord/engine_internal.h"

#include <sched.h>
#include <stdlib.h>
#include <time.h>

#define OWN_RANK 0U

/* MPI moves this in 100 to 300 us: more than a step's fixed cost, which a smaller batch pays more often. */
#define AHEAD_BYTES_MIN ((uint64_t)1 << 20)
/* A larger control message might not fit into the socket of a rank that computes, and we would wait for it. */
#define AHEAD_ITEMS_MAX 1024U
/* Then the engine's thread looks after timers and signals, however much waits. */
#define TURN_US 500000
#define SPIN_US 200 /* of looking without a pause; then a nap between looks */
#define NAP_NS  30000

/* ------------------------------------------------------------------ what came in */

static bool changes_sessions(fv_method_t method)
{
    return (method == FV_METHOD_REGISTER_MODEL) || (method == FV_METHOD_OPEN_SESSION) ||
           (method == FV_METHOD_FORK_SESSION) || (method == FV_METHOD_TRUNCATE_SESSION) ||
           (method == FV_METHOD_CLOSE_SESSION) || (method == FV_METHOD_COUNT); /* a stream's end */
}

static void take_job(fv_engine_t *engine, fv_entry_t *entry)
{
    fv_job_t *job = (fv_job_t *)(void *)entry;

    if (engine->is_draining) {
        fv_entry_end_request(entry);
        fv_reply_refused(entry->call, entry->method, job->request.head.request_id,
                         fv_fail(FV_ERR_UNAVAILABLE, "the service is draining"));
        fv_job_release(job);
        return;
    }
    fv_sched_submit(engine->sched, &job->request);
    engine->may_form = true;
}

/* A command that breaks the service: it is told so, unless it was answered, and so are those behind it. */
static fv_status_t run_command(fv_engine_t *engine, fv_entry_t *entry, fv_status_t status)
{
    if (status == FV_OK) {
        status = fv_engine_command(engine, entry);
    }
    if (status != FV_OK) {
        fv_reply_error(entry->call, FV_ERR_UNAVAILABLE);
    }
    fv_entry_release(entry);
    return status;
}

static fv_status_t take_in(fv_engine_t *engine, bool *out_had_any)
{
    bool is_empty = atomic_load_explicit(&engine->inbox, memory_order_relaxed) == NULL;
    fv_entry_t *entry = is_empty ? NULL : fv_engine_take_inbox(engine);
    fv_status_t status = FV_OK;

    *out_had_any = entry != NULL;
    while (entry != NULL) {
        fv_entry_t *next = entry->next;
        if ((entry->method == FV_METHOD_ATTEND) || (entry->method == FV_METHOD_ATTEND_ONCE)) {
            take_job(engine, entry);
        } else if (changes_sessions(entry->method)) {
            entry->next = NULL;
            *engine->commands_tail = entry;
            engine->commands_tail = &entry->next;
        } else {
            status = run_command(engine, entry, status);
        }
        entry = next;
    }
    return status;
}

/* In order of arrival, as the commands are. */
static void hold(fv_engine_t *engine, fv_entry_t *entry)
{
    fv_entry_t **tail = &engine->held;

    while (*tail != NULL) {
        tail = &(*tail)->next;
    }
    entry->next = NULL;
    *tail = entry;
}

static fv_status_t run_commands(fv_engine_t *engine)
{
    fv_entry_t *entry = engine->commands;
    fv_status_t status = FV_OK;

    engine->commands = NULL;
    engine->commands_tail = &engine->commands;
    while (entry != NULL) {
        fv_entry_t *next = entry->next;
        if (fv_engine_must_hold(engine, entry)) {
            hold(engine, entry);
        } else {
            status = run_command(engine, entry, status);
        }
        entry = next;
    }
    return ((status == FV_OK) && engine->has_ended_streams) ? fv_engine_end_streams(engine)
                                                            : status;
}

/* ------------------------------------------------------------------ the steps */

/* Commits the steps that have ended. */
static fv_status_t retire(fv_engine_t *engine, bool *out_did)
{
    while (engine->n_flights > 0) {
        fv_flight_t *oldest = fv_engine_flight(engine, 0);
        FV_RETURN_IF_ERR(fv_engine_collect(engine, oldest));
        if (!fv_engine_is_complete(oldest)) {
            break;
        }
        if (oldest->has_failed && (engine->n_flights > 1U)) { /* undone when nothing is under way */
            fv_flight_t *other = fv_engine_flight(engine, 1);
            if (!other->is_begun) {
                FV_RETURN_IF_ERR(fv_engine_begin(engine, other));
            }
            FV_RETURN_IF_ERR(fv_engine_collect(engine, other));
            if (!fv_engine_is_complete(other)) {
                break;
            }
        }
        FV_RETURN_IF_ERR(fv_engine_settle(engine));
        *out_did = true;
    }
    return FV_OK;
}

static bool is_time_to_form(fv_engine_t *engine)
{
    if (!engine->may_form || (engine->commands != NULL) || engine->has_ended_streams ||
        (engine->n_flights == engine->depth)) {
        return false;
    }
    if (engine->n_flights == 0) {
        return true;
    }
    const fv_flight_t *oldest = fv_engine_flight(engine, 0);
    return !oldest->has_failed &&
           (oldest->is_rank_idle || (fv_sched_bytes_queued(engine->sched) >= AHEAD_BYTES_MIN));
}

/* Tells the ranks of the steps whose turn it is. */
static fv_status_t begin_formed(fv_engine_t *engine)
{
    for (uint32_t i = 0; i < engine->n_flights; i++) {
        fv_flight_t *flight = fv_engine_flight(engine, i);
        if (!flight->is_begun && ((i == 0) || (flight->plan.n_items <= AHEAD_ITEMS_MAX))) {
            FV_RETURN_IF_ERR(fv_engine_begin(engine, flight));
        }
    }
    if ((engine->n_flights > 0) && fv_engine_flight(engine, 0)->is_begun) {
        fv_engine_note_queue_times(fv_engine_flight(engine, 0), fv_clock_us());
    }
    if ((engine->config.link != NULL) && (engine->n_flights > 1U)) {
        return fv_link_step_push(engine->config.link, fv_engine_flight(engine, 1)->plan.slot);
    }
    return FV_OK;
}

/* Our own share of the next step, if its turn has come. One that keeps this thread waits until the step before is answered,
 * or has ended and waits to be undone. */
static fv_flight_t *next_local(fv_engine_t *engine)
{
    for (uint32_t i = 0; i < engine->n_flights; i++) {
        fv_flight_t *flight = fv_engine_flight(engine, i);
        if (flight->local == FV_LOCAL_WAITS) {
            const fv_flight_t *oldest = fv_engine_flight(engine, 0);
            bool is_turn = (i == 0) || engine->config.local_is_async ||
                           (oldest->has_failed && fv_engine_is_complete(oldest));
            return is_turn ? flight : NULL;
        }
    }
    return NULL;
}

/* Our own share of the next step, if it has one: its tensors may travel to the device that works on this one's. */
static void prefetch_next(fv_engine_t *engine)
{
    const fv_engine_config_t *c = &engine->config;
    fv_flight_t *next = (engine->n_flights > 1U) ? fv_engine_flight(engine, 1) : NULL;

    if ((next == NULL) || next->is_prefetched || (next->local != FV_LOCAL_WAITS) ||
        (c->local->prefetch == NULL)) {
        return;
    }
    next->is_prefetched = true;
    for (fv_request_t *r = next->plan.joined; r != NULL; r = r->next) {
        const fv_tensors_t *t = &fv_job_of(r)->tensors;

        c->local->prefetch(c->local_ctx, t->q, r->head.q.n_bytes);
        if (r->head.append) {
            c->local->prefetch(c->local_ctx, t->k, r->head.k.n_bytes);
            c->local->prefetch(c->local_ctx, t->v, r->head.v.n_bytes);
        }
    }
}

/* All that can be done without waiting. *out_did: something was. */
static fv_status_t look(fv_engine_t *engine, bool is_computing, bool *out_did)
{
    bool is_over = fv_clock_us() >= engine->turn_end_us;
    bool had_any = false;

    FV_RETURN_IF_ERR(retire(engine, out_did));
    if (engine->depth == 1U) { /* nobody waits for the next step but those whose answers are here */
        fv_engine_answer(engine);
    }
    if (!is_over) {
        FV_RETURN_IF_ERR(take_in(engine, &had_any));
        *out_did = *out_did || had_any;
        if (engine->n_flights == 0) {
            FV_RETURN_IF_ERR(run_commands(engine));
        }
        while (is_time_to_form(engine)) {
            fv_engine_form(engine);
            *out_did = true;
        }
    }
    FV_RETURN_IF_ERR(begin_formed(engine));
    if (is_computing) {
        prefetch_next(engine);
    }
    if (is_computing || !engine->config.local_is_async || (next_local(engine) == NULL)) {
        fv_engine_answer(engine); /* else the device comes first; answers go out while it works */
    }
    return FV_OK;
}

/* While our own share computes. */
static void on_wait(void *arg)
{
    fv_engine_t *engine = arg;
    bool did = false;

    if (engine->is_looking || (engine->look_error.status != FV_OK)) {
        return;
    }
    engine->is_looking = true;
    fv_status_t status = look(engine, true, &did);
    if (status != FV_OK) {
        engine->look_error = fv_error_capture(status);
    }
    engine->is_looking = false;
}

/* ------------------------------------------------------------------ waiting */

/* Nothing to do until a rank answers: names the one that does not in time. */
static fv_status_t wait_for_ranks(fv_engine_t *engine)
{
    const fv_flight_t *oldest = fv_engine_flight(engine, 0);
    uint32_t deadline_ms = fv_link_deadline_ms(engine->config.link);
    int64_t waited_us = fv_clock_us() - engine->progress_us;
    const uint32_t *ranks = NULL;

    if (waited_us < SPIN_US) {
        (void)sched_yield();
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_link_check(engine->config.link));
    if (waited_us <= (int64_t)deadline_ms * 1000) {
        (void)nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
        return FV_OK;
    }
    size_t n_ranks = fv_dispatch_ranks(oldest->dispatch, &ranks);
    for (size_t i = 0; i < n_ranks; i++) {
        if (!oldest->is_rank_done[ranks[i]]) {
            fv_link_declare_silent(engine->config.link, ranks[i], deadline_ms);
            return fv_fail(FV_ERR_TIMED_OUT, "rank %u did not answer within %u ms", ranks[i],
                           deadline_ms);
        }
    }
    return fv_fail(FV_ERR_TIMED_OUT, "a step made no progress within %u ms", deadline_ms);
}

bool fv_engine_has_work(const fv_engine_t *engine)
{
    return (fv_sched_n_queued(engine->sched) > 0) || (engine->commands != NULL) ||
           engine->has_ended_streams;
}

static fv_status_t work(fv_engine_t *engine)
{
    bool did = false;

    do {
        fv_flight_t *flight = next_local(engine);
        did = false;
        if (flight != NULL) {
            FV_RETURN_IF_ERR(fv_engine_run_local(engine, flight));
            did = true;
            continue;
        }
        engine->is_looking = true;
        fv_status_t status = look(engine, false, &did);
        engine->is_looking = false;
        FV_RETURN_IF_ERR(status);
        if (!did && (engine->n_flights > 0)) {
            FV_RETURN_IF_ERR(wait_for_ranks(engine));
        }
    } while (did || (engine->n_flights > 0));
    return FV_OK;
}

fv_status_t fv_engine_work(fv_engine_t *engine)
{
    engine->turn_end_us = fv_clock_us() + TURN_US;
    fv_status_t status = work(engine);
    if (status != FV_OK) {
        fv_error_t error = fv_error_capture(status);
        if (engine->config.repair == NULL) { /* else fv_engine_repair() sees to them */
            fv_engine_fail_steps(engine, status);
        }
        return fv_fail(status, "%s", error.text);
    }
    return FV_OK;
}

/* A second step gains something where its tensors have a way to go, or where the device leaves this thread free. */
fv_status_t fv_engine_init_pipeline(fv_engine_t *engine)
{
    const fv_engine_config_t *c = &engine->config;

    engine->depth = ((c->link != NULL) || c->local_is_async) ? FV_STEP_DEPTH : 1U;
    engine->commands_tail = &engine->commands;
    engine->answers_tail = &engine->answers;
    for (uint32_t slot = 0; slot < FV_STEP_DEPTH; slot++) {
        fv_flight_t *flight = &engine->flights[slot];
        flight->is_rank_done = calloc(c->sched.n_ranks, sizeof(*flight->is_rank_done));
        if (flight->is_rank_done == NULL) {
            return fv_fail(FV_ERR_NO_MEMORY, "engine of %u ranks", c->sched.n_ranks);
        }
        FV_RETURN_IF_ERR(fv_dispatch_create(c->sched.n_ranks, OWN_RANK, &flight->dispatch));
    }
    if ((engine->depth > 1U) && (c->link != NULL)) {
        fv_link_on_wait(c->link, on_wait, engine);
    }
    if ((engine->depth > 1U) && (c->local != NULL)) {
        c->local->on_wait(c->local_ctx, on_wait, engine);
    }
    return FV_OK;
}
