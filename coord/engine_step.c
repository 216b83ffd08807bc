/*
 * engine_step.c - one step, top to bottom: plan, dispatch, compute, collect, commit, answer.
 *
 * Decode path: stations 3 to 5 and 9 of 10. Read this after coord/sched.h; engine_pipeline.c says when each stage's turn is.
 */
#include "common/clock.h"
#include "common/fault.h"
#include "common/log.h"
#include "coord/engine_internal.h"

#include <string.h>

#define OWN_RANK 0U

static bool is_cancelled(void *user)
{
    const fv_job_t *job = user;

    return fv_call_is_closed(job->entry.call);
}

static const fv_tensors_t *tensors_of(fv_request_t *request)
{
    return &fv_job_of(request)->tensors;
}

/* Room for a request's answer, out of the same bounded memory as the requests. */
fv_status_t fv_engine_prepare(fv_request_t *request)
{
    fv_job_t *job = fv_job_of(request);
    size_t n_rows = (size_t)request->head.n_tokens * (size_t)request->spec->n_q_heads;
    void *out = NULL;
    void *lse = NULL;

    job->out_bytes =
        n_rows * (size_t)fv_request_out_dim(request) * fv_dtype_bytes(request->head.dtype);
    job->lse_bytes = request->head.want_lse ? (n_rows * sizeof(float)) : 0U;
    if (request->head.append) { /* nothing that runs may fail to be noted */
        FV_RETURN_IF_ERR(fv_ledger_reserve(job->ledger));
    }
    FV_RETURN_IF_ERR(fv_staging_take(job->staging, job->out_bytes, false, &out));
    job->tensors.out = out;
    if (job->lse_bytes > 0) {
        FV_RETURN_IF_ERR(fv_staging_take(job->staging, job->lse_bytes, false, &lse));
        job->tensors.lse = lse;
    }
    return FV_OK;
}

fv_flight_t *fv_engine_flight(fv_engine_t *engine, uint32_t i)
{
    return &engine->flights[(engine->first_slot + i) % FV_STEP_DEPTH];
}

/* Until now its requests waited. */
void fv_engine_note_queue_times(fv_flight_t *flight, int64_t now_us)
{
    if (flight->is_timed) {
        return;
    }
    flight->is_timed = true;
    for (fv_request_t *r = flight->plan.joined; r != NULL; r = r->next) {
        if (r->n_tokens_done == 0) {
            fv_job_of(r)->timings.queue_us = (uint32_t)(now_us - r->received_us);
        }
    }
}

/* ------------------------------------------------------------------ answering */

static void add_answers(fv_engine_t *engine, fv_request_t *requests)
{
    *engine->answers_tail = requests;
    while (*engine->answers_tail != NULL) {
        engine->answers_tail = &(*engine->answers_tail)->next;
    }
}

void fv_engine_answer(fv_engine_t *engine)
{
    fv_request_t *request = engine->answers;
    int64_t now_us = (request == NULL) ? 0 : fv_clock_us();

    engine->answers = NULL;
    engine->answers_tail = &engine->answers;
    while (request != NULL) {
        fv_request_t *next = request->next;
        fv_reply_job(engine, fv_job_of(request), now_us);
        request = next;
    }
}

/* The step broke: everything in it is answered UNAVAILABLE, so that clients may retry elsewhere or later. */
void fv_engine_fail_steps(fv_engine_t *engine, fv_status_t status)
{
    fv_error_t error = fv_error_capture(status);

    error.status = FV_ERR_UNAVAILABLE;
    for (; engine->n_flights > 0; engine->n_flights--) {
        fv_flight_t *flight = fv_engine_flight(engine, 0);
        for (fv_request_t *r = flight->plan.joined; r != NULL; r = r->next) {
            r->error = error;
        }
        add_answers(engine, flight->plan.joined);
        engine->first_slot = (engine->first_slot + 1U) % FV_STEP_DEPTH;
    }
    engine->n_running = 0;
    fv_engine_answer(engine);
}

/* ------------------------------------------------------------------ beginning */

void fv_engine_form(fv_engine_t *engine)
{
    fv_step_plan_t plan;

    fv_sched_next_step(engine->sched, fv_clock_us(), is_cancelled, &plan);
    fv_fault_point(3);
    add_answers(engine, plan.finished);
    /* who waited behind one that is finished now may have its turn */
    engine->may_form = ((plan.joined != NULL) || (plan.finished != NULL)) &&
                       (fv_sched_n_queued(engine->sched) > 0);
    if (plan.joined == NULL) {
        return;
    }
    fv_flight_t *flight = &engine->flights[plan.slot];
    *flight = (fv_flight_t){
        .plan = plan, .dispatch = flight->dispatch, .is_rank_done = flight->is_rank_done};
    for (const fv_request_t *r = plan.joined; r != NULL; r = r->next) {
        flight->has_failed =
            flight->has_failed || (r->error.status != FV_OK); /* given up half-way */
    }
    if (engine->n_flights == 0) {
        engine->first_slot = plan.slot;
    } else {
        engine->n_steps_ahead++;
    }
    engine->n_flights++;
    engine->n_running += plan.n_joined;
}

static fv_status_t begin_remote(fv_engine_t *engine, const fv_flight_t *flight, uint32_t rank)
{
    const fv_rank_work_t *work = fv_dispatch_work(flight->dispatch, rank);
    fv_link_step_t step = {.head = {.step_id = flight->plan.step_id,
                                    .n_items = (uint32_t)work->n_items,
                                    .in_bytes = work->in_bytes,
                                    .out_bytes = work->out_bytes},
                           .items = work->items,
                           .inputs = work->inputs,
                           .outputs = work->outputs,
                           .n_inputs = work->n_inputs,
                           .n_outputs = work->n_outputs};

    return fv_link_step_begin(engine->config.link, flight->plan.slot, rank, &step);
}

fv_status_t fv_engine_begin(fv_engine_t *engine, fv_flight_t *flight)
{
    const uint32_t *ranks = NULL;

    flight->is_begun = true;
    FV_RETURN_IF_ERR(fv_dispatch_build(flight->dispatch, &flight->plan, tensors_of));
    size_t n_ranks = fv_dispatch_ranks(flight->dispatch, &ranks);
    fv_fault_point(4);
    for (size_t i = 0; i < n_ranks; i++) {
        flight->is_rank_done[ranks[i]] = false;
        if (ranks[i] == OWN_RANK) {
            flight->local = FV_LOCAL_WAITS;
        } else {
            flight->n_left++;
            FV_RETURN_IF_ERR(begin_remote(engine, flight, ranks[i]));
        }
    }
    flight->is_rank_idle = n_ranks == 0; /* all of it is to be undone */
    engine->progress_us = fv_clock_us();
    flight->begun_us = engine->progress_us;
    if (flight == fv_engine_flight(engine, 0)) {
        fv_engine_note_queue_times(flight, engine->progress_us);
    }
    return FV_OK;
}

/* ------------------------------------------------------------------ running */

/* Of a request in pieces, each piece's slowest rank counts. */
static void add_timings(fv_job_t *job, uint64_t step_id, const fv_ctl_done_t *done)
{
    fv_timings_t *timings = &job->timings;

    if (job->timed_step != step_id) {
        job->timed_step = step_id;
        job->compute_us_before = timings->compute_us;
        job->exchange_us_before = timings->exchange_us;
    }
    uint32_t compute_us = job->compute_us_before + done->compute_us;
    uint32_t exchange_us = job->exchange_us_before + done->exchange_us;
    timings->compute_us = (compute_us > timings->compute_us) ? compute_us : timings->compute_us;
    timings->exchange_us =
        (exchange_us > timings->exchange_us) ? exchange_us : timings->exchange_us;
}

/* Timings of a rank go to every request it served: the slowest rank counts. */
static void
note_done(fv_engine_t *engine, fv_flight_t *flight, uint32_t rank, const fv_ctl_done_t *done)
{
    fv_rank_work_t *work = fv_dispatch_work(flight->dispatch, rank);

    for (size_t i = 0; i < work->n_items; i++) {
        fv_request_t *request = work->origins[i].request;

        add_timings(fv_job_of(request), flight->plan.step_id, done);
        if ((work->errors[i].status != FV_OK) && (request->error.status == FV_OK)) {
            request->error = work->errors[i];
            flight->has_failed = true;
        }
    }
    flight->is_rank_done[rank] = true;
    flight->is_rank_idle = true;
    engine->progress_us = fv_clock_us();
    engine->rank_stats[rank].n_steps++;
    engine->rank_stats[rank].busy_us += done->compute_us;
    fv_sched_rank_done(engine->sched, &flight->plan, rank, &done->memory);
}

fv_status_t fv_engine_run_local(fv_engine_t *engine, fv_flight_t *flight)
{
    fv_rank_work_t *work = fv_dispatch_work(flight->dispatch, OWN_RANK);
    fv_ctl_done_t done = {0};

    flight->local = FV_LOCAL_RUNS;
    if ((engine->config.link != NULL) && !engine->config.local_is_async) {
        FV_RETURN_IF_ERR(fv_link_step_flush(engine->config.link, flight->plan.slot));
    }
    fv_engine_note_queue_times(flight, fv_clock_us());
    fv_status_t status = engine->config.local->step(engine->config.local_ctx, work->items, work->io,
                                                    work->n_items, &done, work->errors);
    if (engine->look_error.status != FV_OK) { /* it knows more than what broke off our share */
        return fv_fail((fv_status_t)engine->look_error.status, "%s", engine->look_error.text);
    }
    if (status ==
        FV_ERR_RANK_LOST) { /* the exchange knows that somebody is gone; the link knows who */
        FV_RETURN_IF_ERR(fv_link_check(engine->config.link));
    }
    FV_RETURN_IF_ERR(status);
    flight->local = FV_LOCAL_NONE;
    note_done(engine, flight, OWN_RANK, &done);
    return FV_OK;
}

/* ------------------------------------------------------------------ ending */

fv_status_t fv_engine_collect(fv_engine_t *engine, fv_flight_t *flight)
{
    const uint32_t *ranks = NULL;
    size_t n_ranks = fv_dispatch_ranks(flight->dispatch, &ranks);

    for (size_t i = 0; (i < n_ranks) && (flight->n_left > 0); i++) {
        fv_rank_work_t *work = fv_dispatch_work(flight->dispatch, ranks[i]);
        fv_ctl_done_t done;
        bool is_done = false;
        if ((ranks[i] == OWN_RANK) || flight->is_rank_done[ranks[i]]) {
            continue;
        }
        FV_RETURN_IF_ERR(fv_link_step_test(engine->config.link, flight->plan.slot, ranks[i],
                                           &is_done, &done, work->errors, work->n_items));
        if (is_done) {
            fv_fault_point(9);
            flight->n_left--;
            note_done(engine, flight, ranks[i], &done);
        }
    }
    return FV_OK;
}

bool fv_engine_is_complete(const fv_flight_t *flight)
{
    return flight->is_begun && (flight->n_left == 0) && flight->is_rank_idle &&
           (flight->local == FV_LOCAL_NONE);
}

/* A request that failed on one rank may have been appended on others: all go back to where they were. */
static fv_status_t undo_failed(fv_engine_t *engine, const fv_step_plan_t *plan)
{
    for (fv_request_t *r = plan->joined; r != NULL; r = r->next) {
        if (r->error.status != FV_OK) {
            fv_sched_forget_rest(engine->sched, r);
        }
    }
    for (fv_request_t *r = plan->joined; r != NULL; r = r->next) {
        if (r->error.status == FV_OK) {
            continue;
        }
        if ((r->error.status == FV_ERR_CANCELLED) || (r->error.status == FV_ERR_DEADLINE)) {
            fv_debug("step %llu: undone after %llu of %llu tokens: %s",
                     (unsigned long long)plan->step_id, (unsigned long long)r->n_tokens_done,
                     (unsigned long long)r->head.n_tokens, r->error.text);
        } else {
            fv_warn("step %llu: a request failed on a rank: %s", (unsigned long long)plan->step_id,
                    r->error.text);
        }
        for (uint32_t i = 0; i < r->head.n_items; i++) {
            fv_error_t refusal = {0};
            fv_ctl_truncate_t cut = {.session_slot = r->ctl_items[i].session_slot,
                                     .layer = r->ctl_items[i].layer,
                                     .position = r->items[i].position};
            if ((r->ctl_items[i].flags & FV_ITEM_APPEND) !=
                0) { /* not begun: its ranks still say what is free */
                FV_RETURN_IF_ERR(fv_engine_broadcast(engine, &r->sessions[i]->placement,
                                                     FV_CTL_TRUNCATE, &cut, sizeof(cut), &refusal));
            }
        }
    }
    return FV_OK;
}

void fv_engine_release_held(fv_engine_t *engine)
{
    engine->has_ended_streams = engine->has_ended_streams || engine->has_held_streams;
    engine->has_held_streams = false;
    *engine->commands_tail = engine->held;
    while (*engine->commands_tail != NULL) {
        engine->commands_tail = &(*engine->commands_tail)->next;
    }
    engine->held = NULL;
}

fv_status_t fv_engine_settle(fv_engine_t *engine)
{
    fv_flight_t *flight = fv_engine_flight(engine, 0);

    int64_t now_us = fv_clock_us();
    int64_t from_us =
        (flight->begun_us > engine->settled_us) ? flight->begun_us : engine->settled_us;

    engine->settled_us = now_us;
    flight->plan.cost.took_us =
        now_us - from_us; /* from the end of the step before, if it had to wait for that */
    FV_RETURN_IF_ERR(undo_failed(engine, &flight->plan));
    FV_RETURN_IF_ERR(fv_ledger_note_step(engine->config.ledger, &flight->plan));
    fv_engine_note_use(engine, flight->plan.joined);
    fv_sched_step_done(engine->sched, &flight->plan);
    if (flight->plan.joined != NULL) {
        fv_engine_release_held(engine);
    }
    engine->n_steps++;
    engine->n_running -= flight->plan.n_joined;
    engine->may_form = fv_sched_n_queued(engine->sched) > 0;
    fv_trace("step %llu: %u requests, %u items, %llu tokens",
             (unsigned long long)flight->plan.step_id, flight->plan.n_joined, flight->plan.n_items,
             (unsigned long long)flight->plan.n_tokens);
    add_answers(engine, flight->plan.joined);
    engine->n_flights--;
    engine->first_slot = (engine->first_slot + 1U) % FV_STEP_DEPTH;
    fv_ledger_tidy(engine->config.ledger, engine->sched);
    return FV_OK;
}
