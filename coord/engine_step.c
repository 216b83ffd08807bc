/*
 * engine_step.c - one step, top to bottom: plan, dispatch, compute, collect, commit, answer.
 *
 * Decode path: stations 3 to 5 and 9 of 10. Read this after coord/sched.h.
 */
#include "common/clock.h"
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
        n_rows * (size_t)request->spec->head_dim_v * fv_dtype_bytes(request->head.dtype);
    job->lse_bytes = request->head.want_lse ? (n_rows * sizeof(float)) : 0U;
    FV_RETURN_IF_ERR(fv_staging_take(job->staging, job->out_bytes, false, &out));
    job->tensors.out = out;
    if (job->lse_bytes > 0) {
        FV_RETURN_IF_ERR(fv_staging_take(job->staging, job->lse_bytes, false, &lse));
        job->tensors.lse = lse;
    }
    return FV_OK;
}

static void note_queue_times(fv_request_t *request, int64_t now_us)
{
    for (; request != NULL; request = request->next) {
        fv_job_of(request)->timings.queue_us = (uint32_t)(now_us - request->received_us);
    }
}

static void answer_all(fv_engine_t *engine, fv_request_t *request)
{
    int64_t now_us = fv_clock_us();

    while (request != NULL) {
        fv_request_t *next = request->next;
        fv_reply_job(engine, fv_job_of(request), now_us);
        request = next;
    }
}

/* The step broke: everything in it is answered UNAVAILABLE, so that clients may retry elsewhere or later. */
static void fail_all(fv_engine_t *engine, fv_request_t *joined, fv_status_t status)
{
    fv_error_t error = fv_error_capture(status);

    error.status = FV_ERR_UNAVAILABLE;
    for (fv_request_t *r = joined; r != NULL; r = r->next) {
        r->error = error;
    }
    answer_all(engine, joined);
}

/* ------------------------------------------------------------------ running */

static fv_status_t begin_remote(fv_engine_t *engine, uint64_t step_id, uint32_t rank)
{
    const fv_rank_work_t *work = fv_dispatch_work(engine->dispatch, rank);
    fv_ctl_step_t step = {.step_id = step_id,
                          .n_items = (uint32_t)work->n_items,
                          .in_bytes = work->in_bytes,
                          .out_bytes = work->out_bytes};

    return fv_link_step_begin(engine->config.link, rank, &step, work->items, work->inputs,
                              work->n_inputs, work->outputs, work->n_outputs);
}

/* Timings of a rank go to every request it served: the slowest rank counts. */
static void note_done(fv_engine_t *engine, uint32_t rank, const fv_ctl_done_t *done)
{
    fv_rank_work_t *work = fv_dispatch_work(engine->dispatch, rank);

    for (size_t i = 0; i < work->n_items; i++) {
        fv_request_t *request = work->origins[i].request;
        fv_timings_t *timings = &fv_job_of(request)->timings;
        if (done->compute_us > timings->compute_us) {
            timings->compute_us = done->compute_us;
        }
        if (done->exchange_us > timings->exchange_us) {
            timings->exchange_us = done->exchange_us;
        }
        if ((work->errors[i].status != FV_OK) && (request->error.status == FV_OK)) {
            request->error = work->errors[i];
        }
    }
    engine->rank_stats[rank].n_steps++;
    engine->rank_stats[rank].busy_us += done->compute_us;
    fv_sched_rank_memory(engine->sched, rank, &done->memory);
}

static fv_status_t run_local(fv_engine_t *engine)
{
    fv_rank_work_t *work = fv_dispatch_work(engine->dispatch, OWN_RANK);
    fv_ctl_done_t done = {0};

    fv_status_t status = engine->config.local->step(engine->config.local_ctx, work->items, work->io,
                                                    work->n_items, &done, work->errors);
    if (status ==
        FV_ERR_RANK_LOST) { /* the exchange knows that somebody is gone; the link knows who */
        FV_RETURN_IF_ERR(fv_link_check(engine->config.link));
    }
    FV_RETURN_IF_ERR(status);
    note_done(engine, OWN_RANK, &done);
    return FV_OK;
}

/* Remote ranks first (they compute meanwhile), then our own share, then what they send back. */
static fv_status_t run(fv_engine_t *engine, const fv_step_plan_t *plan)
{
    const uint32_t *ranks = NULL;
    size_t n_ranks = 0;

    FV_RETURN_IF_ERR(fv_dispatch_build(engine->dispatch, plan, tensors_of));
    n_ranks = fv_dispatch_ranks(engine->dispatch, &ranks);
    for (size_t i = 0; i < n_ranks; i++) {
        if (ranks[i] != OWN_RANK) {
            FV_RETURN_IF_ERR(begin_remote(engine, plan->step_id, ranks[i]));
        }
    }
    if (engine->config.link != NULL) {
        FV_RETURN_IF_ERR(fv_link_step_flush(engine->config.link));
    }
    if ((n_ranks > 0) && (ranks[0] == OWN_RANK)) {
        FV_RETURN_IF_ERR(run_local(engine));
    }
    for (size_t i = 0; i < n_ranks; i++) {
        if (ranks[i] != OWN_RANK) {
            fv_rank_work_t *work = fv_dispatch_work(engine->dispatch, ranks[i]);
            fv_ctl_done_t done;
            FV_RETURN_IF_ERR(fv_link_step_end(engine->config.link, ranks[i], &done, work->errors,
                                              work->n_items));
            note_done(engine, ranks[i], &done);
        }
    }
    return FV_OK;
}

/* A request that failed on one rank may have been appended on others: all go back to where they were. */
static fv_status_t undo_failed(fv_engine_t *engine, const fv_step_plan_t *plan)
{
    for (fv_request_t *r = plan->joined; r != NULL; r = r->next) {
        if (r->error.status == FV_OK) {
            continue;
        }
        fv_warn("step %llu: a request failed on a rank: %s", (unsigned long long)plan->step_id,
                r->error.text);
        for (uint32_t i = 0; i < r->head.n_items; i++) {
            fv_error_t refusal = {0};
            fv_ctl_truncate_t cut = {.session_slot = r->ctl_items[i].session_slot,
                                     .layer = r->ctl_items[i].layer,
                                     .position = r->ctl_items[i].position};
            if ((r->ctl_items[i].flags & FV_ITEM_APPEND) != 0) {
                FV_RETURN_IF_ERR(fv_engine_broadcast(engine, &r->sessions[i]->placement,
                                                     FV_CTL_TRUNCATE, &cut, sizeof(cut), &refusal));
            }
        }
    }
    return FV_OK;
}

/* Answered even when closing a session ends the service. */
static fv_status_t note_use(fv_engine_t *engine, const fv_step_plan_t *plan)
{
    fv_status_t status = fv_engine_note_use(engine, plan->joined);

    if (status != FV_OK) {
        fail_all(engine, plan->joined, status);
    }
    return status;
}

fv_status_t fv_engine_step(fv_engine_t *engine, bool *out_ran)
{
    fv_step_plan_t plan;
    int64_t now_us = fv_clock_us();

    fv_sched_next_step(engine->sched, now_us, is_cancelled, &plan);
    *out_ran = (plan.joined != NULL) || (plan.finished != NULL);
    answer_all(engine, plan.finished);
    note_queue_times(plan.joined, now_us);
    if (plan.joined == NULL) {
        return FV_OK;
    }
    engine->n_running = plan.n_joined;
    fv_status_t status = run(engine, &plan);
    if (status == FV_OK) {
        status = undo_failed(engine, &plan);
    }
    engine->n_running = 0;
    if (status != FV_OK) {
        fail_all(engine, plan.joined, status);
        return status;
    }
    engine->n_steps++;
    fv_sched_step_done(engine->sched, &plan);
    FV_RETURN_IF_ERR(note_use(engine, &plan));
    fv_trace("step %llu: %u requests, %u items, %llu tokens, %lld us",
             (unsigned long long)plan.step_id, plan.n_joined, plan.n_items,
             (unsigned long long)plan.n_tokens, (long long)(fv_clock_us() - now_us));
    answer_all(engine, plan.joined);
    return FV_OK;
}
