/*
 * sim_sched.c - the scheduler core with N workers in one process, virtual time, random order of events.
 *
 * Goal:   whatever clients do in whatever order, each request gets exactly one answer, lengths are those of a simple model
 *         of the service, the coordinator's view of every rank's memory and of what each session holds and has freed is
 *         exact when nothing is under way and never above the truth, a rank never has to refuse, and when all is closed all
 *         memory is free again.
 * Method: real workers (page tables, pools, forks, copy on write) over a backend that moves no data; each seed is
 *         a story of random commands, requests, retries, cancellations, deadlines and rank failures, with up to two
 *         steps under way: each rank runs them when it likes, in order, and its DONE arrives later. The laws are
 *         checked after every event. FV_SEED repeats one story, FV_SIM_STORIES sets how many.
 */
#include "common/policy.h"
#include "coord/sched.h"
#include "tests/support/random.h"
#include "tests/support/sched_case.h"
#include "tests/support/test.h"
#include "worker/worker.h"

#include <stdlib.h>
#include <string.h>

#define N_RANKS_MAX    5
#define N_SESSIONS_MAX 12
#define N_LAYERS       2
#define N_MODELS       5
#define N_LOG_MAX      256
#define N_EVENTS       300

/* The model of the service: what one layer of one session holds. */
typedef struct model_layer {
    uint64_t n_tokens;
    uint64_t floor; /* position of the last append, or of a cut below it */
    struct {
        uint64_t position;
        uint32_t n_tokens, digest;
    } log[N_LOG_MAX];
    uint32_t n_log;
} model_layer_t;

typedef struct model_session {
    bool is_open;
    const fv_model_spec_t *spec;
    fv_session_id_t id;
    model_layer_t layers[N_LAYERS];
} model_session_t;

/* A step under way: what each rank has done of it, and its DONE while that is on its way. */
typedef struct story_step {
    fv_step_plan_t plan;
    uint32_t broken; /* this rank fails its first item; N_RANKS_MAX: none */
    bool has_failed;
    enum {
        STEP_TO_RUN,
        STEP_HAS_RUN,
        STEP_IS_DONE
    } ranks[N_RANKS_MAX];
    fv_ctl_memory_t memory[N_RANKS_MAX];
} story_step_t;

typedef struct story {
    fv_random_t random;
    fv_sched_t *sched;
    uint32_t n_ranks;
    fv_worker_t *workers[N_RANKS_MAX];
    fv_model_spec_t specs[N_MODELS];
    char model_ids[N_MODELS][FV_MODEL_ID_BYTES];
    model_session_t sessions[N_SESSIONS_MAX];
    uint64_t n_ids;
    int64_t now_us;
    uint32_t n_waiting;                /* submitted, not yet answered */
    story_step_t steps[FV_STEP_DEPTH]; /* oldest first */
    uint32_t n_steps;
    uint64_t n_served, n_refused, n_exhausted, n_freed_refused, n_pairs, n_undone;
    uint64_t n_cut, n_given_up; /* served in pieces; and cancelled or late between two of them */
} story_t;

static fv_status_t no_exchange(void *ctx,
                               const fv_exchange_message_t *sends,
                               size_t n_sends,
                               const fv_exchange_message_t *recvs,
                               size_t n_recvs,
                               uint32_t deadline_ms)
{
    (void)ctx;
    (void)sends;
    (void)n_sends;
    (void)deadline_ms;
    for (size_t i = 0; i < n_recvs; i++) {
        memset(recvs[i].data, 0, recvs[i].n_bytes);
    }
    return FV_OK;
}

static const fv_exchange_ops_t k_no_exchange = {.name = "none", .all_to_all = no_exchange};

static int64_t pick(story_t *s, int64_t low, int64_t high)
{
    return fv_random_int(&s->random, low, high);
}

/* ------------------------------------------------------------------ the laws */

/* A request is between two pieces. */
static bool is_any_half_way(const story_t *s)
{
    for (int i = 0; i < N_SESSIONS_MAX; i++) {
        if (s->sessions[i].is_open &&
            fv_sched_is_half_way(fv_sched_session(s->sched, &s->sessions[i].id))) {
            return true;
        }
    }
    return false;
}

static void check_memory(story_t *s)
{
    bool is_exact = (s->n_steps == 0) && !is_any_half_way(s);

    for (uint32_t r = 0; r < s->n_ranks; r++) {
        fv_ctl_memory_t actual;
        fv_worker_memory(s->workers[r], &actual);
        const fv_ctl_memory_t *mirror = fv_sched_rank(s->sched, r);
        if (!is_exact) {
            assert_true(mirror->kv_bytes_free <= actual.kv_bytes_free);
            continue;
        }
        assert_int_equal(mirror->kv_bytes_free, actual.kv_bytes_free);
        assert_int_equal(mirror->n_slabs_free, actual.n_slabs_free);
    }
}

static void check_lengths(story_t *s)
{
    for (int i = 0; i < N_SESSIONS_MAX; i++) {
        const model_session_t *m = &s->sessions[i];
        if (m->is_open) {
            const fv_session_t *session = fv_sched_session(s->sched, &m->id);
            assert_non_null(session);
            for (int layer = 0; layer < N_LAYERS; layer++) {
                assert_int_equal(session->layers[layer].n_tokens, m->layers[layer].n_tokens);
            }
        }
    }
}

/* What the coordinator says that a session holds is what the workers hold of it. */
static void check_held(story_t *s)
{
    for (int i = 0; (s->n_steps == 0) && (i < N_SESSIONS_MAX); i++) {
        const model_session_t *m = &s->sessions[i];
        const fv_session_t *session = m->is_open ? fv_sched_session(s->sched, &m->id) : NULL;

        if ((session != NULL) && fv_sched_is_half_way(session)) { /* counted when it ends */
            continue;
        }
        for (int cell = 0; (session != NULL) && (cell < session->placement.n_head_parts *
                                                            session->placement.n_ctx_parts);
             cell++) {
            uint64_t n_pages =
                fv_worker_session_pages(s->workers[session->placement.ranks[cell]], session->slot);
            assert_int_equal(session->held[cell], n_pages * fv_model_page_bytes(m->spec));
            assert_int_equal(session->held[cell], fv_session_cell_bytes(session, m->spec, cell));
        }
    }
}

/* Has the layer still what queries from `position` on read, of tokens before `end`? */
static bool is_readable(const model_session_t *m, uint32_t layer, uint64_t position, uint64_t end)
{
    const fv_model_spec_t *spec = m->spec;

    return (position >= m->layers[layer].n_tokens) ||
           fv_policy_is_readable(&spec->policies[spec->layer_policy[layer]], spec->n_kv_heads,
                                 fv_model_group(spec), (int64_t)m->layers[layer].floor,
                                 (int64_t)position, (int64_t)end);
}

/* ------------------------------------------------------------------ commands */

/* Commands for such a session are held. */
static bool is_held(const story_t *s, const model_session_t *m)
{
    return fv_sched_is_half_way(fv_sched_session(s->sched, &m->id));
}

static void refresh(story_t *s, uint32_t rank)
{
    fv_ctl_memory_t memory;

    fv_worker_memory(s->workers[rank], &memory);
    fv_sched_rank_memory(s->sched, rank, &memory);
}

#define TELL(s, placement, call, message)                                                 \
    do {                                                                                  \
        for (int cell_ = 0; cell_ < (placement)->n_head_parts * (placement)->n_ctx_parts; \
             cell_++) {                                                                   \
            uint32_t rank_ = (placement)->ranks[cell_];                                   \
            assert_int_equal(call((s)->workers[rank_], (message)), FV_OK);                \
            refresh((s), rank_);                                                          \
        }                                                                                 \
    } while (0)

static fv_session_id_t fresh_id(story_t *s)
{
    fv_session_id_t id = {{0}};

    s->n_ids++;
    memcpy(id.bytes, &s->n_ids, sizeof(s->n_ids));
    return id;
}

static model_session_t *pick_session(story_t *s, bool is_open)
{
    int first = (int)pick(s, 0, N_SESSIONS_MAX - 1);

    for (int i = 0; i < N_SESSIONS_MAX; i++) {
        model_session_t *m = &s->sessions[(first + i) % N_SESSIONS_MAX];
        if (m->is_open == is_open) {
            return m;
        }
    }
    return NULL;
}

static void do_open(story_t *s)
{
    model_session_t *m = pick_session(s, false);
    fv_open_request_t request = {.max_tokens_hint = (uint64_t)pick(s, 0, 2000)};
    fv_ctl_open_t message;

    if (m == NULL) {
        return;
    }
    int64_t model = pick(s, 0, N_MODELS - 1);
    memcpy(request.model_id, s->model_ids[model], FV_MODEL_ID_BYTES);
    request.sharding = (fv_sharding_t){.mode = (int32_t)pick(s, 0, 2), .is_set = 1};
    if (s->specs[model].sharding.mode == FV_SHARDING_LATENT) { /* a session can not choose that */
        request.sharding.mode = FV_SHARDING_LATENT;
        request.sharding.groups = s->specs[model].sharding.groups;
    }
    memset(m, 0, sizeof(*m));
    m->id = fresh_id(s);
    assert_int_equal(fv_sched_open(s->sched, &request, &(fv_birth_t){.id = m->id}, &message),
                     FV_OK);
    TELL(s, &message.placement, fv_worker_open, &message);
    m->is_open = true;
    m->spec = &s->specs[model];
}

static uint64_t longest(const model_session_t *m)
{
    return (m->layers[0].n_tokens > m->layers[1].n_tokens) ? m->layers[0].n_tokens
                                                           : m->layers[1].n_tokens;
}

static void model_cut(model_layer_t *layer, uint64_t position)
{
    if (layer->n_tokens <= position) {
        return;
    }
    layer->n_tokens = position;
    layer->floor = (layer->floor < position) ? layer->floor : position;
    while ((layer->n_log > 0) &&
           (layer->log[layer->n_log - 1].position + layer->log[layer->n_log - 1].n_tokens >
            position)) {
        layer->n_log--;
    }
}

static fv_status_t cut_status(const model_session_t *m, uint64_t at)
{
    if (at > longest(m)) {
        return FV_ERR_OUT_OF_RANGE;
    }
    return (is_readable(m, 0, at, at) && is_readable(m, 1, at, at)) ? FV_OK : FV_ERR_PRECONDITION;
}

static void do_fork(story_t *s)
{
    model_session_t *parent = pick_session(s, true);
    model_session_t *child = pick_session(s, false);
    fv_ctl_fork_t message;
    fv_placement_t placement;

    if ((parent == NULL) || (child == NULL) || is_held(s, parent)) {
        return;
    }
    uint64_t at = (uint64_t)pick(s, 0, (int64_t)longest(parent) + 2);
    fv_session_id_t id = fresh_id(s);
    fv_status_t status =
        fv_sched_fork(s->sched, &parent->id, at, &(fv_birth_t){.id = id}, &message, &placement);
    assert_int_equal(status, cut_status(parent, at));
    if (status == FV_OK) {
        *child = *parent;
        child->id = id;
        model_cut(&child->layers[0], at);
        model_cut(&child->layers[1], at);
        TELL(s, &placement, fv_worker_fork, &message);
    }
}

static void do_truncate(story_t *s)
{
    model_session_t *m = pick_session(s, true);
    fv_ctl_truncate_t message;
    fv_placement_t placement;

    if ((m != NULL) && !is_held(s, m)) {
        uint64_t at = (uint64_t)pick(s, 0, (int64_t)longest(m));
        fv_status_t status = fv_sched_truncate(s->sched, &m->id, at, &message, &placement);
        assert_int_equal(status, cut_status(m, at));
        if (status != FV_OK) {
            s->n_freed_refused++;
            return;
        }
        model_cut(&m->layers[0], at);
        model_cut(&m->layers[1], at);
        TELL(s, &placement, fv_worker_truncate, &message);
    }
}

static void do_close(story_t *s)
{
    model_session_t *m = pick_session(s, true);
    fv_ctl_close_t message;
    fv_placement_t placement;

    if ((m != NULL) && !is_held(s, m)) {
        assert_int_equal(fv_sched_close(s->sched, &m->id, &message, &placement), FV_OK);
        TELL(s, &placement, fv_worker_close, &message);
        m->is_open = false;
    }
}

/* ------------------------------------------------------------------ requests */

/* A random item: usually the next append, else a retry, a wrong position, or other bytes. */
static void add_item(story_t *s, fv_case_request_t *r, const model_session_t *m)
{
    const model_layer_t *layer = &m->layers[r->request.head.layer];
    int64_t dice = pick(s, 0, 9);

    if ((dice < 2) && (layer->n_log > 0)) {
        uint32_t i = (uint32_t)pick(s, 0, layer->n_log - 1);
        fv_case_add(r, m->id, layer->log[i].position, layer->log[i].n_tokens,
                    layer->log[i].digest + ((dice == 1) ? 1U : 0U));
    } else if (dice == 2) {
        fv_case_add(r, m->id, (uint64_t)pick(s, 0, (int64_t)layer->n_tokens + 3),
                    (uint32_t)pick(s, 1, 4), 7);
    } else {
        uint32_t n = (pick(s, 0, 2) == 0) ? (uint32_t)pick(s, 1, 400) : 1U;
        fv_case_add(r, m->id, layer->n_tokens, n, (uint32_t)pick(s, 1, 1 << 30));
    }
}

static void do_submit(story_t *s)
{
    fv_case_request_t *r = fv_case_request((uint32_t)pick(s, 0, N_LAYERS - 1), pick(s, 0, 9) != 0);
    int64_t n_items = pick(s, 1, 3);
    const fv_session_t *first = NULL;

    for (int64_t i = 0; i < n_items; i++) {
        const model_session_t *m = pick_session(s, true);
        const fv_session_t *session = (m == NULL) ? NULL : fv_sched_session(s->sched, &m->id);
        bool fits = (first == NULL) || ((session != NULL) && (session != first) &&
                                        (session->model_slot == first->model_slot));
        if ((session != NULL) &&
            (fits || (pick(s, 0, 9) == 0))) { /* seldom: a request to be refused */
            first = (first == NULL) ? session : first;
            add_item(s, r, m);
        }
    }
    if (first == NULL) {
        free(r);
        return;
    }
    fv_case_sizes(r, fv_sched_model(s->sched, first->model_slot));
    r->is_cancelled = pick(s, 0, 19) == 0;
    r->request.deadline_us = (pick(s, 0, 9) == 0) ? (s->now_us + pick(s, 0, 500)) : INT64_MAX;
    fv_sched_submit(s->sched, &r->request);
    s->n_waiting++;
}

static model_session_t *model_of(story_t *s, const fv_session_id_t *id)
{
    for (int i = 0; i < N_SESSIONS_MAX; i++) {
        if (s->sessions[i].is_open &&
            (memcmp(s->sessions[i].id.bytes, id->bytes, sizeof(id->bytes)) == 0)) {
            return &s->sessions[i];
        }
    }
    return NULL;
}

/* What the model says of an item: appended, repeated, or to be refused. */
static int expected_of_item(const model_session_t *m, const fv_case_request_t *r, uint32_t i)
{
    const fv_attend_item_t *item = &r->items[i];
    const model_layer_t *layer = &m->layers[r->request.head.layer];
    bool is_lost =
        !is_readable(m, r->request.head.layer, item->position, item->position + item->n_tokens);

    if (item->position > layer->n_tokens) {
        return FV_ERR_OUT_OF_RANGE;
    }
    if (!r->request.head.append || (item->position == layer->n_tokens)) {
        return is_lost ? FV_ERR_PRECONDITION : FV_OK;
    }
    for (uint32_t k = 0; k < layer->n_log; k++) {
        if ((layer->log[k].position == item->position) &&
            (layer->log[k].n_tokens == item->n_tokens) && (layer->log[k].digest == r->digests[i])) {
            return is_lost ? FV_ERR_PRECONDITION : FV_OK;
        }
    }
    return FV_ERR_PRECONDITION;
}

static void check_refusal(story_t *s, fv_case_request_t *r)
{
    int status = r->request.error.status;
    bool is_explained = (status == FV_ERR_EXHAUSTED) || (status == FV_ERR_NOT_FOUND) ||
                        (status == FV_ERR_INVALID_ARG) ||
                        ((status == FV_ERR_CANCELLED) && r->is_cancelled) ||
                        ((status == FV_ERR_DEADLINE) && (s->now_us >= r->request.deadline_us));

    for (uint32_t i = 0; (i < r->request.head.n_items) && !is_explained; i++) {
        const model_session_t *m = model_of(s, &r->items[i].session);
        is_explained = (m != NULL) && (expected_of_item(m, r, i) == status);
    }
    if (!is_explained) {
        fail_msg("refused without a reason: %s", r->request.error.text);
    }
    s->n_exhausted += (status == FV_ERR_EXHAUSTED) ? 1U : 0U;
    s->n_refused++;
}

/* Rank runs its part of a step. */
static void run_rank(story_t *s, story_step_t *step, uint32_t rank)
{
    static uint8_t zeros[1 << 20];
    static fv_ctl_item_t items[256];
    static fv_step_io_t io[256];
    static fv_request_t *origins[256];
    static fv_error_t errors[256];
    fv_ctl_done_t done;
    size_t n = 0;

    for (fv_request_t *r = step->plan.joined; r != NULL; r = r->next) {
        for (uint32_t i = 0; i < r->head.n_items; i++) {
            fv_item_share_t share;
            if (fv_item_share(r->spec, &r->sessions[i]->placement, &r->ctl_items[i], rank,
                              &share)) {
                assert_true(n < FV_COUNT(items));
                items[n] = r->ctl_items[i];
                io[n] = (fv_step_io_t){.q = zeros, .k = zeros, .v = zeros, .out = zeros};
                origins[n++] = r;
            }
        }
    }
    if (n == 0) { /* not asked */
        step->ranks[rank] = STEP_IS_DONE;
        return;
    }
    memset(errors, 0, sizeof(errors));
    assert_int_equal(fv_worker_step(s->workers[rank], items, io, n, &done, errors), FV_OK);
    for (size_t i = 0; i < n; i++) {
        if (errors[i].status != FV_OK) {
            fail_msg("rank %u had to refuse: %s", rank, errors[i].text);
        }
    }
    step->memory[rank] = done.memory;
    step->ranks[rank] = STEP_HAS_RUN;
    if (rank == step->broken) {
        origins[0]->error.status = FV_ERR_INTERNAL;
        step->has_failed = true;
    }
}

/* One rank goes on by one: it runs the next step that it has not run, or its oldest DONE arrives. False: it has nothing to do. */
static bool advance(story_t *s, uint32_t rank, bool may_run)
{
    for (uint32_t i = 0; i < s->n_steps; i++) {
        story_step_t *step = &s->steps[i];
        if (step->ranks[rank] == STEP_TO_RUN) {
            run_rank(s, step, rank);
            return true;
        }
        if ((step->ranks[rank] == STEP_HAS_RUN) && !may_run) {
            fv_sched_rank_done(s->sched, &step->plan, rank, &step->memory[rank]);
            step->ranks[rank] = STEP_IS_DONE;
            return true;
        }
    }
    return may_run ? advance(s, rank, false) : false;
}

/* A request that failed on a rank is cut back on all of them, as the engine does. */
static void undo(story_t *s, const fv_request_t *r)
{
    for (uint32_t i = 0; i < r->head.n_items; i++) {
        fv_ctl_truncate_t cut = {.session_slot = r->ctl_items[i].session_slot,
                                 .layer = r->ctl_items[i].layer,
                                 .position = r->items[i].position};
        if ((r->ctl_items[i].flags & FV_ITEM_APPEND) != 0) {
            TELL(s, &r->sessions[i]->placement, fv_worker_truncate, &cut);
        }
        if (fv_request_has_begun(r, i)) {
            model_of(s, &r->sessions[i]->id)->layers[cut.layer].floor = cut.position;
        }
    }
}

static void apply_to_model(story_t *s, const fv_case_request_t *r)
{
    for (uint32_t i = 0; i < r->request.head.n_items; i++) {
        model_session_t *m = model_of(s, &r->items[i].session);
        assert_non_null(m);
        assert_int_equal(expected_of_item(m, r, i), FV_OK);
        model_layer_t *layer = &m->layers[r->request.head.layer];
        bool appends = (r->ctl_items[i].flags & FV_ITEM_APPEND) != 0;
        assert_int_equal(appends,
                         r->request.head.append && (r->items[i].position == layer->n_tokens));
        if (appends) {
            assert_true(layer->n_log < N_LOG_MAX);
            layer->log[layer->n_log].position = r->items[i].position;
            layer->log[layer->n_log].n_tokens = r->items[i].n_tokens;
            layer->log[layer->n_log++].digest = r->digests[i];
            layer->floor = layer->n_tokens;
            layer->n_tokens += r->items[i].n_tokens;
        }
    }
    s->n_served++;
}

static void free_list(story_t *s, fv_request_t *r)
{
    while (r != NULL) {
        fv_request_t *next = r->next;
        s->n_waiting--;
        free(fv_case_of(r));
        r = next;
    }
}

/* Forms a step, as the engine does: not while one under way has failed. */
static bool do_begin(story_t *s)
{
    story_step_t *step = &s->steps[s->n_steps];
    bool fails = pick(s, 0, 19) == 0;
    fv_step_plan_t plan;

    if ((s->n_steps == FV_STEP_DEPTH) || ((s->n_steps > 0) && s->steps[0].has_failed)) {
        return false;
    }
    fv_sched_next_step(s->sched, s->now_us, fv_case_is_cancelled, &plan);
    for (fv_request_t *r = plan.finished; r != NULL; r = r->next) {
        check_refusal(s, fv_case_of(r));
    }
    bool has_refused = plan.finished != NULL;
    free_list(s, plan.finished);
    if (plan.joined == NULL) {
        return has_refused;
    }
    if (s->n_steps > 0) {
        assert_int_not_equal(plan.slot, s->steps[0].plan.slot);
        s->n_pairs++;
    }
    memset(step, 0, sizeof(*step));
    step->plan = plan;
    for (fv_request_t *r = plan.joined; r != NULL; r = r->next) {
        if (r->error.status != FV_OK) { /* given up half-way: joins to be undone */
            assert_int_equal(r->n_tokens_piece, 0);
            assert_true(r->n_tokens_done > 0);
            check_refusal(s, fv_case_of(r));
            step->has_failed = true;
            s->n_given_up++;
        }
    }
    step->broken = fails ? (uint32_t)pick(s, 0, s->n_ranks - 1) : N_RANKS_MAX;
    s->n_steps++;
    return true;
}

static bool is_complete(const story_t *s, const story_step_t *step)
{
    for (uint32_t r = 0; r < s->n_ranks; r++) {
        if (step->ranks[r] != STEP_IS_DONE) {
            return false;
        }
    }
    return true;
}

static void settle(story_t *s, story_step_t *step)
{
    for (fv_request_t *r = step->plan.joined; r != NULL; r = r->next) {
        if (r->error.status != FV_OK) {
            fv_sched_forget_rest(s->sched, r);
        }
    }
    for (fv_request_t *r = step->plan.joined; r != NULL; r = r->next) {
        if (r->error.status != FV_OK) {
            undo(s, r);
            s->n_undone++;
        } else if (fv_request_is_last_piece(r)) {
            apply_to_model(s, fv_case_of(r));
            s->n_cut += (r->n_tokens_done > 0) ? 1U : 0U;
        }
    }
    fv_sched_step_done(s->sched, &step->plan);
    free_list(s, step->plan.joined);
    s->n_steps--;
    s->steps[0] = s->steps[1];
}

/* Commits the oldest step once all its ranks are done; one with a failure when nothing else is under way. */
static bool do_settle(story_t *s)
{
    if ((s->n_steps == 0) || !is_complete(s, &s->steps[0]) ||
        (s->steps[0].has_failed && (s->n_steps > 1) && !is_complete(s, &s->steps[1]))) {
        return false;
    }
    settle(s, &s->steps[0]);
    return true;
}

static bool advance_any(story_t *s)
{
    uint32_t first = (uint32_t)pick(s, 0, s->n_ranks - 1);
    bool may_run = pick(s, 0, 1) == 0;

    for (uint32_t i = 0; i < s->n_ranks; i++) {
        if (advance(s, (first + i) % s->n_ranks, may_run)) {
            return true;
        }
    }
    return false;
}

/* What a command waits for. */
static void end_steps(story_t *s)
{
    while (s->n_steps > 0) {
        if (!do_settle(s)) {
            assert_true(advance_any(s));
        }
        check_memory(s);
    }
}

/* ------------------------------------------------------------------ stories */

/* Layer 0 is S2, layer 1 has a window: both free pages. */
static void make_sparse(story_t *s, fv_model_spec_t *spec)
{
    spec->n_policies = 3;
    spec->policies[1] = (fv_policy_t){.kind = FV_POLICY_S2,
                                      .block_tokens = 16 << pick(s, 0, 4),
                                      .local_blocks = (int32_t)pick(s, 1, 3),
                                      .vert_stride = (int32_t)pick(s, 1, 9),
                                      .head_sliding_offset = (int32_t)pick(s, -5, 5),
                                      .pattern_per = (int32_t)pick(s, 0, 1),
                                      .num_dense_heads = (int32_t)pick(s, 0, 1)};
    spec->policies[2] = (fv_policy_t){.kind = FV_POLICY_WINDOW,
                                      .window_tokens = (int32_t)pick(s, 1, 300),
                                      .sink_tokens = (int32_t)pick(s, 0, 130)};
    spec->layer_policy[0] = 1;
    spec->layer_policy[1] = 2;
}

/* One latent for all heads; or as many slices of it as there are ranks for. */
static void make_latent(story_t *s, fv_model_spec_t *spec, bool is_sliced)
{
    spec->kind = FV_MODEL_LATENT;
    spec->n_kv_heads = 0;
    spec->head_dim_qk = 0;
    spec->latent_dim = 128;
    spec->rope_dim = 16;
    spec->softmax_scale = 0.1F;
    if (is_sliced) {
        spec->sharding.mode = FV_SHARDING_LATENT;
        spec->sharding.groups = (s->n_ranks >= 4U) ? 4 : (s->n_ranks >= 2U) ? 2 : 1;
        spec->sharding.max_ranks = (int32_t)pick(s, spec->sharding.groups, N_RANKS_MAX);
    }
}

static void begin(story_t *s, uint64_t seed)
{
    memset(s, 0, sizeof(*s));
    s->random.state = seed;
    s->n_ranks = (uint32_t)pick(s, 1, N_RANKS_MAX);
    static const uint32_t pieces[] = {0, 1, 20, 64, 100, 250};
    s->sched = fv_case_sched_pieces(s->n_ranks, 0, 0, pieces[pick(s, 0, 5)]);
    for (uint32_t r = 0; r < s->n_ranks; r++) {
        fv_worker_config_t config = {
            .rank = r,
            .n_ranks = s->n_ranks,
            .backend = &fv_backend_null,
            .backend_config = {.n_threads = 1, .kv_arena_bytes = (size_t)pick(s, 1, 8) << 18},
            .exchange = &k_no_exchange,
        };
        assert_int_equal(fv_worker_create(&config, &s->workers[r]), FV_OK);
        refresh(s, r);
    }
    for (int i = 0; i < N_MODELS; i++) {
        static fv_ctl_model_t message;
        fv_register_response_t response;
        bool is_new = false;
        static const char *const names[N_MODELS] = {"small", "large", "sparse", "latent", "slices"};
        s->specs[i] = fv_case_spec(names[i]);
        s->specs[i].n_kv_heads = (i == 0) ? 2 : 4;
        s->specs[i].head_dim_qk = (i == 0) ? 16 : 64;
        if (i == 2) {
            make_sparse(s, &s->specs[i]);
        } else if (i >= 3) {
            make_latent(s, &s->specs[i], i == 4);
        }
        assert_int_equal(
            fv_sched_register(s->sched, &s->specs[i], NULL, &response, &is_new, &message), FV_OK);
        memcpy(s->model_ids[i], response.model_id, FV_MODEL_ID_BYTES);
        for (uint32_t r = 0; r < s->n_ranks; r++) {
            assert_int_equal(fv_worker_model(s->workers[r], &message), FV_OK);
            refresh(s, r);
        }
    }
}

static void end(story_t *s)
{
    do {
        end_steps(s);
    } while (do_begin(s));
    assert_int_equal(s->n_waiting, 0); /* exactly one answer each */
    while (pick_session(s, true) != NULL) {
        do_close(s);
    }
    for (uint32_t r = 0; r < s->n_ranks; r++) {
        fv_ctl_memory_t memory;
        fv_worker_memory(s->workers[r], &memory);
        assert_int_equal(memory.kv_bytes_free, memory.kv_bytes_total);
        fv_worker_destroy(s->workers[r]);
    }
    fv_sched_destroy(s->sched);
}

static void tell_story(story_t *s)
{
    for (int event = 0; event < N_EVENTS; event++) {
        int64_t dice = pick(s, 0, 99);
        s->now_us += pick(s, 0, 200);
        if (dice < 20) {
            end_steps(s);
        }
        if (dice < 8) {
            do_open(s);
        } else if (dice < 12) {
            do_fork(s);
        } else if (dice < 16) {
            do_truncate(s);
        } else if (dice < 20) {
            do_close(s);
        } else if (dice < 50) {
            do_submit(s);
        } else if (dice < 65) {
            (void)do_begin(s);
        } else if (dice < 90) {
            (void)advance_any(s);
        } else {
            (void)do_settle(s);
        }
        check_memory(s);
        check_lengths(s);
        check_held(s);
    }
}

static void test_stories(void **state)
{
    const char *text = getenv("FV_SIM_STORIES");
    int n_stories = (text != NULL) ? atoi(text) : 3000;
    uint64_t first = fv_random_seed(1);
    uint64_t n_served = 0;
    uint64_t n_refused = 0;
    uint64_t n_exhausted = 0;
    uint64_t n_freed_refused = 0;
    uint64_t n_pairs = 0;
    uint64_t n_undone = 0;
    uint64_t n_cut = 0;
    uint64_t n_given_up = 0;
    story_t *s = malloc(sizeof(*s));

    (void)state;
    assert_non_null(s);
    if (getenv("FV_SEED") != NULL) {
        n_stories = 1;
    }
    for (int i = 0; i < n_stories; i++) {
        if ((i % 100) == 0) {
            print_message("story %d (FV_SEED=%llu)\n", i,
                          (unsigned long long)(first + (uint64_t)i));
        }
        begin(s, first + (uint64_t)i);
        tell_story(s);
        end(s);
        n_served += s->n_served;
        n_refused += s->n_refused;
        n_exhausted += s->n_exhausted;
        n_freed_refused += s->n_freed_refused;
        n_pairs += s->n_pairs;
        n_undone += s->n_undone;
        n_cut += s->n_cut;
        n_given_up += s->n_given_up;
    }
    free(s);
    print_message(
        "%llu served, %llu refused, %llu of them for want of memory; %llu undone; "
        "%llu steps begun beside another; %llu served in pieces, %llu given up half-way\n",
        (unsigned long long)n_served, (unsigned long long)n_refused,
        (unsigned long long)n_exhausted, (unsigned long long)n_undone, (unsigned long long)n_pairs,
        (unsigned long long)n_cut, (unsigned long long)n_given_up);
    if (n_stories >= 100) { /* the stories must have something to tell */
        assert_true((n_served > 1000) && (n_refused > 1000) && (n_exhausted > 10) &&
                    (n_freed_refused > 10));
        assert_true((n_pairs > 1000) && (n_undone > 10));
        assert_true((n_cut > 1000) && (n_given_up > 10));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stories),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
