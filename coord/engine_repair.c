/*
 * engine_repair.c - a rank was lost and another process has its place: what was under way is done again.
 *
 *   ranks     those that are left have been taken to another epoch; one is new and empty (engine.h, repair)
 *   models    the new one is told them
 *   commands  one that not every rank may have had is sent again; those that have it refuse, which is no matter
 *   steps     each request under way, or half-way, is cut back on every rank, as if it had failed there, and waits at the head
 *             of the queue: positions and digests make the second time harmless, placement and bits are the same
 *   sessions  of which the lost rank held a part are gone, unless its store has them: closed, remembered as lost
 *
 * A further loss meanwhile ends the service: it is started again by whoever started it.
 */
#include "common/clock.h"
#include "common/log.h"
#include "coord/engine_internal.h"

#include <string.h>

/* A request whose steps lose a rank again and again may be what kills it. */
#define REPEATS_MAX 3U

/* ------------------------------------------------------------------ commands */

void fv_engine_note_broken_command(fv_engine_t *engine,
                                   const fv_placement_t *placement,
                                   fv_ctl_type_t type,
                                   const void *body,
                                   size_t n_bytes)
{
    FV_ASSERT(n_bytes <= sizeof(engine->broken_command.body));
    engine->broken_command.is_set = true;
    engine->broken_command.type = type;
    engine->broken_command.has_placement = placement != NULL;
    if (placement != NULL) {
        engine->broken_command.placement = *placement;
    }
    engine->broken_command.n_bytes = n_bytes;
    if (n_bytes > 0) { /* KEEP_END has no body */
        memcpy(&engine->broken_command.body, body, n_bytes);
    }
}

/* To the ranks of a placement, whatever they say: a rank that has it, or is new, refuses. */
static fv_status_t send_again(fv_engine_t *engine,
                              const fv_placement_t *placement,
                              fv_ctl_type_t type,
                              const void *body,
                              size_t n_bytes)
{
    fv_error_t ignored = {0};

    return fv_engine_broadcast(engine, placement, type, body, n_bytes, &ignored);
}

static fv_session_t *session_in_slot(fv_engine_t *engine, uint32_t slot)
{
    fv_session_t *session = fv_session_after(fv_sched_sessions(engine->sched), 0);

    while ((session != NULL) && (session->slot != slot)) {
        session = session->next;
    }
    return session;
}

static fv_status_t close_everywhere(fv_engine_t *engine, const fv_session_id_t *id)
{
    fv_ctl_close_t message = {0};
    fv_placement_t placement;

    FV_RETURN_IF_ERR(fv_sched_close(engine->sched, id, &message, &placement));
    return send_again(engine, &placement, FV_CTL_CLOSE, &message, sizeof(message));
}

/* Whoever gave it was told UNAVAILABLE and gives it again: a session that was being opened would be nobody's. */
static fv_status_t mend_command(fv_engine_t *engine)
{
    bool is_open = engine->broken_command.type == FV_CTL_OPEN;

    if (!engine->broken_command.is_set) {
        return FV_OK;
    }
    engine->broken_command.is_set = false;
    if (is_open || (engine->broken_command.type == FV_CTL_FORK)) {
        const fv_session_t *session =
            session_in_slot(engine, is_open ? engine->broken_command.body.open.session_slot
                                            : engine->broken_command.body.fork.session_slot);
        if (session == NULL) {
            return FV_OK;
        }
        fv_session_id_t id = session->id;
        return close_everywhere(engine, &id);
    }
    FV_RETURN_IF_ERR(send_again(
        engine, engine->broken_command.has_placement ? &engine->broken_command.placement : NULL,
        engine->broken_command.type, &engine->broken_command.body, engine->broken_command.n_bytes));
    if (engine->broken_command.type == FV_CTL_MODEL) { /* who asks again finds it, and uses it */
        const fv_ctl_model_t *model = &engine->broken_command.body.model;
        return fv_ledger_note_model(engine->config.ledger, engine->sched, model->model_slot);
    }
    return FV_OK;
}

/* ------------------------------------------------------------------ steps */

/* Messages of the step may still read its tensors and write its answer: that memory stays as it is. */
static void let_go_of_answer(fv_job_t *job, bool is_reached)
{
    void (*give)(void *buffer) = is_reached ? fv_staging_abandon : fv_staging_give;

    job->entry.is_abandoned = job->entry.is_abandoned || is_reached;
    give(job->tensors.out);
    give(job->tensors.lse);
    job->tensors.out = NULL;
    job->tensors.lse = NULL;
}

/* All ranks of a request are told to forget what they have appended of it. */
static fv_status_t cut_back(fv_engine_t *engine, const fv_request_t *r)
{
    for (uint32_t i = 0; i < r->head.n_items; i++) {
        fv_ctl_truncate_t cut = {.session_slot = r->ctl_items[i].session_slot,
                                 .layer = r->ctl_items[i].layer,
                                 .position = r->items[i].position};
        if ((r->ctl_items[i].flags & FV_ITEM_APPEND) != 0) {
            FV_RETURN_IF_ERR(
                send_again(engine, &r->sessions[i]->placement, FV_CTL_TRUNCATE, &cut, sizeof(cut)));
        }
    }
    return FV_OK;
}

/* Undoes the requests of a plan, as if they had failed; they stay in plan->joined. */
static fv_status_t undo(fv_engine_t *engine, fv_step_plan_t *plan, bool is_reached)
{
    for (fv_request_t *r = plan->joined; r != NULL; r = r->next) {
        fv_sched_forget_rest(engine->sched, r);
        r->error = fv_error_capture(fv_fail(FV_ERR_UNAVAILABLE, "a rank was lost"));
    }
    for (fv_request_t *r = plan->joined; r != NULL; r = r->next) {
        FV_RETURN_IF_ERR(cut_back(engine, r));
        let_go_of_answer(fv_job_of(r), is_reached);
    }
    plan->cost = (fv_step_cost_t){0};
    fv_sched_step_done(engine->sched, plan); /* nothing is committed */
    for (fv_request_t *r = plan->joined; r != NULL; r = r->next) {
        r->kv_bytes_pending = 0;
    }
    return FV_OK;
}

static void append(fv_request_t ***tail, fv_request_t *requests)
{
    **tail = requests;
    while (**tail != NULL) {
        *tail = &(**tail)->next;
    }
}

/* Takes the steps apart; their requests, oldest first, go to *tail. */
static fv_status_t undo_steps(fv_engine_t *engine, fv_request_t ***tail)
{
    while (engine->n_flights > 0) {
        fv_flight_t *flight = fv_engine_flight(engine, 0);
        uint32_t n_joined = flight->plan.n_joined;

        FV_RETURN_IF_ERR(undo(engine, &flight->plan, flight->is_begun));
        append(tail, flight->plan.joined);
        engine->n_running -= n_joined;
        engine->n_flights--;
        engine->first_slot = (engine->first_slot + 1U) % FV_STEP_DEPTH;
    }
    return FV_OK;
}

/* What waits; those between two pieces begin anew. Earlier pieces were answered, so nothing reaches their memory. */
static fv_status_t undo_waiting(fv_engine_t *engine, fv_request_t ***tail)
{
    fv_request_t *waiting = fv_sched_take_all(engine->sched);

    while (waiting != NULL) {
        fv_request_t *r = waiting;
        waiting = r->next;
        r->next = NULL;
        if (r->n_tokens_done > 0) {
            fv_step_plan_t plan = {.joined = r, .n_joined = 1};
            fv_status_t status = undo(engine, &plan, false);
            if (status != FV_OK) {
                r->next = waiting;
                append(tail, r);
                return status;
            }
        }
        append(tail, r);
    }
    return FV_OK;
}

/* In their order. */
static void queue_again(fv_engine_t *engine, fv_request_t *requests)
{
    fv_request_t *next = NULL;

    for (fv_request_t *r = requests; r != NULL; r = next) {
        fv_job_t *job = fv_job_of(r);
        bool was_undone = r->error.status != FV_OK;
        next = r->next;
        r->next = NULL;
        job->n_repeats += was_undone ? 1U : 0U;
        if (was_undone && (job->n_repeats > REPEATS_MAX)) {
            fv_reply_job(engine, job, fv_clock_us()); /* UNAVAILABLE */
            continue;
        }
        job->timings = (fv_timings_t){0};
        fv_sched_submit(engine->sched, r);
    }
    engine->may_form = true;
}

/* ------------------------------------------------------------------ sessions */

fv_status_t fv_engine_lose_session(fv_engine_t *engine, fv_session_t *session, uint32_t rank)
{
    const fv_lost_session_t lost = {.id = session->id, .owner = session->owner, .rank = rank};

    fv_lost_add(engine->lost, &lost);
    FV_RETURN_IF_ERR(fv_ledger_note_close(engine->config.ledger, session));
    return close_everywhere(engine, &lost.id);
}

static fv_status_t lose_sessions(fv_engine_t *engine, uint32_t rank)
{
    fv_session_t *next = NULL;
    uint32_t n_lost = 0;

    for (fv_session_t *s = fv_session_after(fv_sched_sessions(engine->sched), 0); s != NULL;
         s = next) {
        next = s->next;
        if (fv_placement_cell(&s->placement, rank) < 0) {
            continue;
        }
        FV_RETURN_IF_ERR(fv_engine_lose_session(engine, s, rank));
        n_lost++;
    }
    if (n_lost > 0) {
        fv_warn("rank %u: %u sessions of which it held a part are lost", rank, n_lost);
    }
    return FV_OK;
}

void fv_engine_explain_loss(const fv_engine_t *engine,
                            const fv_principal_t *who,
                            const fv_session_id_t *id,
                            fv_error_t *error)
{
    const fv_lost_session_t *lost =
        (error->status == FV_ERR_NOT_FOUND) ? fv_lost_find(engine->lost, id) : NULL;
    char hex[FV_SESSION_ID_CHARS + 1];

    if ((lost == NULL) || !fv_principal_may_see(who, lost->owner)) {
        return;
    }
    fv_session_id_format(id, hex);
    *error = fv_error_capture(
        (lost->rank == FV_LOST_RECORDS)
            ? fv_fail(FV_ERR_DATA_LOSS,
                      "session_id: session %s was lost: its records are damaged; open another one",
                      hex)
            : fv_fail(FV_ERR_DATA_LOSS,
                      "session_id: session %s was lost with rank %u; open another one", hex,
                      lost->rank));
}

/* ------------------------------------------------------------------ all of it */

static fv_status_t welcome(fv_engine_t *engine, uint32_t rank, const fv_ctl_hello_t *hello)
{
    static fv_ctl_model_t message; /* large; guarded by the turn */

    engine->hellos[rank] = *hello;
    fv_sched_rank_memory(engine->sched, rank, &hello->memory);
    for (uint32_t i = 0; i < fv_sched_n_models(engine->sched); i++) {
        fv_ctl_done_t done = {0};
        message = (fv_ctl_model_t){.model_slot = i, .spec = *fv_sched_model(engine->sched, i)};
        FV_RETURN_IF_ERR(
            fv_link_send(engine->config.link, rank, FV_CTL_MODEL, &message, sizeof(message)));
        FV_RETURN_IF_ERR(fv_link_wait_done(engine->config.link, rank, &done));
        if (done.error.status != FV_OK) {
            return fv_fail(FV_ERR_INTERNAL, "rank %u refused a model: %s", rank, done.error.text);
        }
        fv_sched_rank_memory(engine->sched, rank, &done.memory);
    }
    return FV_OK;
}

static fv_status_t repair(fv_engine_t *engine, const fv_repaired_t *repaired)
{
    fv_request_t *requests = NULL;
    fv_request_t **tail = &requests;
    fv_status_t status = FV_OK;

    for (uint32_t i = 0; (i < repaired->n) && (status == FV_OK); i++) {
        status = welcome(engine, repaired->ranks[i], &repaired->hellos[i]);
    }
    if (status == FV_OK) {
        status = mend_command(engine);
    }
    if (status == FV_OK) {
        status = undo_steps(engine, &tail);
    }
    if (status == FV_OK) {
        status = undo_waiting(engine, &tail);
    }
    for (uint32_t i = 0; (i < repaired->n) && (status == FV_OK); i++) {
        status = (engine->config.ledger == NULL)
                     ? lose_sessions(engine, repaired->ranks[i])
                     : fv_engine_recover_rank(engine, repaired->ranks[i]);
    }
    fv_engine_release_held(engine);
    queue_again(engine, requests);
    return status;
}

static bool is_rank_lost(const fv_engine_t *engine)
{
    for (uint32_t r = 0; r < engine->config.sched.n_ranks; r++) {
        if (fv_link_is_lost(engine->config.link, r)) {
            return true;
        }
    }
    return false;
}

bool fv_engine_repair(fv_engine_t *engine)
{
    static fv_repaired_t repaired; /* large; guarded by the turn */
    int64_t begin_us = fv_clock_us();
    fv_status_t status = FV_ERR_RANK_LOST;

    (void)pthread_mutex_lock(&engine->turn);
    fv_rpc_set_serving(engine->rpc, false);
    engine->look_error = (fv_error_t){0};
    engine->is_looking = false;
    if ((engine->config.repair != NULL) && is_rank_lost(engine)) {
        status = engine->config.repair(engine->config.repair_ctx, &repaired);
        if (status == FV_OK) {
            status = repair(engine, &repaired);
        }
        if (status != FV_OK) {
            fv_error("repair: %s", fv_error_context());
        }
    }
    if (status != FV_OK) {
        fv_engine_fail_steps(engine, status);
    } else {
        engine->broken = (fv_error_t){0};
        engine->n_repairs++;
        engine->progress_us = fv_clock_us();
        fv_rpc_set_serving(engine->rpc, !engine->is_draining);
        fv_info("epoch %u: repaired in %lld ms, goes on", repaired.epoch,
                (long long)((fv_clock_us() - begin_us) / 1000));
    }
    (void)pthread_mutex_unlock(&engine->turn);
    return status == FV_OK;
}
