/*
 * test_sched.c - the scheduler core, rule by rule: exactly-once, refusals, batching, memory.
 *
 * Goal:   every rule of coord/sched.h and of "Exactly-once append" in the design, each refusal with field, given and
 *         expected in its text, and nothing changed by a refusal.
 * Method: requests by hand; one step at a time.
 */
#include "coord/sched.h"
#include "tests/support/sched_case.h"
#include "tests/support/test.h"

#include <stdlib.h>
#include <string.h>

typedef struct fixture {
    fv_sched_t *sched;
    fv_model_spec_t spec;
    char model_id[FV_MODEL_ID_BYTES];
} fixture_t;

static int setup(void **state)
{
    fixture_t *f = calloc(1, sizeof(*f));

    assert_non_null(f);
    f->sched = fv_case_sched(2, 4, 64U * 1024U);
    f->spec = fv_case_spec("m");
    fv_case_register(f->sched, &f->spec, f->model_id);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fixture_t *f = *state;

    fv_sched_destroy(f->sched);
    free(f);
    return 0;
}

/* Runs one step with everything that waits; the ranks always succeed. */
static fv_step_plan_t run_step(fixture_t *f)
{
    fv_step_plan_t plan;

    fv_sched_next_step(f->sched, 0, fv_case_is_cancelled, &plan);
    fv_sched_step_done(f->sched, &plan);
    return plan;
}

/* Submits alone, runs as many steps as it takes; the status the client would see. */
static int serve(fixture_t *f, fv_case_request_t *r)
{
    fv_case_sizes(r, &f->spec);
    fv_sched_submit(f->sched, &r->request);
    fv_step_plan_t plan = run_step(f);
    while ((plan.n_joined > 0) && (plan.joined == NULL)) { /* piece by piece */
        plan = run_step(f);
    }
    assert_true((plan.joined == &r->request) != (plan.finished == &r->request));
    return r->request.error.status;
}

static int append(fixture_t *f,
                  fv_session_id_t s,
                  uint64_t position,
                  uint32_t n,
                  uint32_t digest,
                  uint64_t expect_kv_end,
                  bool expect_append)
{
    fv_case_request_t *r = fv_case_request(0, true);

    fv_case_add(r, s, position, n, digest);
    int status = serve(f, r);
    if (status == FV_OK) {
        assert_int_equal(r->ctl_items[0].kv_end, expect_kv_end);
        assert_int_equal((r->ctl_items[0].flags & FV_ITEM_APPEND) != 0, expect_append);
    }
    free(r);
    return status;
}

static uint64_t length(fixture_t *f, fv_session_id_t s, int layer)
{
    return fv_sched_session(f->sched, &s)->layers[layer].n_tokens;
}

static void test_append_then_retry_then_refusals(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t s = fv_case_open(f->sched, f->model_id, NULL);

    assert_int_equal(append(f, s, 0, 10, 111, 10, true), FV_OK);
    assert_int_equal(append(f, s, 10, 1, 222, 11, true), FV_OK);
    assert_int_equal(length(f, s, 0), 11);
    assert_int_equal(length(f, s, 1), 0); /* layers have lengths of their own */
    /* the same again: answered, not doubled, and it sees what it saw then */
    assert_int_equal(append(f, s, 0, 10, 111, 10, false), FV_OK);
    assert_int_equal(append(f, s, 10, 1, 222, 11, false), FV_OK);
    assert_int_equal(length(f, s, 0), 11);
    /* other bytes, other cut, beyond the end */
    assert_int_equal(append(f, s, 10, 1, 999, 0, false), FV_ERR_PRECONDITION);
    assert_int_equal(append(f, s, 0, 9, 111, 0, false), FV_ERR_PRECONDITION);
    assert_int_equal(append(f, s, 12, 1, 1, 0, false), FV_ERR_OUT_OF_RANGE);
    assert_non_null(strstr(fv_error_context(), "given 12"));
    assert_non_null(strstr(fv_error_context(), "11 tokens committed"));
    assert_int_equal(length(f, s, 0), 11);
}

static void test_query_only_reads_without_appending(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t s = fv_case_open(f->sched, f->model_id, NULL);

    assert_int_equal(append(f, s, 0, 10, 1, 10, true), FV_OK);
    fv_case_request_t *r = fv_case_request(0, false);
    fv_case_add(r, s, 4, 3, 0);
    assert_int_equal(serve(f, r), FV_OK);
    assert_int_equal(r->ctl_items[0].kv_end, 10);
    assert_int_equal(r->ctl_items[0].flags & FV_ITEM_APPEND, 0);
    assert_int_equal(length(f, s, 0), 10);
    free(r);
}

static void expect_refusal(fixture_t *f, fv_case_request_t *r, int status, const char *text)
{
    fv_step_plan_t plan;

    fv_sched_submit(f->sched, &r->request);
    fv_sched_next_step(f->sched, 0, fv_case_is_cancelled, &plan);
    assert_null(plan.joined);
    assert_ptr_equal(plan.finished, &r->request);
    assert_int_equal(r->request.error.status, status);
    if (strstr(r->request.error.text, text) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", r->request.error.text, text);
    }
    free(r);
}

/* Two steps under way share no (session, layer), and a rank's DONE of the first does not give back what the second will take. */
static void test_two_steps_under_way(void **state)
{
    fixture_t *f = *state;
    fv_sharding_t on_one_rank = {.mode = FV_SHARDING_HEADS, .is_set = 1, .max_ranks = 1};
    fv_session_id_t s = fv_case_open(f->sched, f->model_id, &on_one_rank);
    fv_case_request_t *r[4] = {fv_case_request(0, true), fv_case_request(0, true),
                               fv_case_request(1, true), fv_case_request(1, true)};
    uint32_t rank = fv_sched_session(f->sched, &s)->placement.ranks[0];
    uint64_t free_before = fv_sched_rank(f->sched, rank)->kv_bytes_free;
    fv_step_plan_t first;
    fv_step_plan_t second;
    fv_step_plan_t third;

    for (int i = 0; i < 4; i++) {
        fv_case_add(r[i], s, (uint64_t)(i % 2) * 10U, 10, (uint32_t)i);
        fv_case_sizes(r[i], &f->spec);
    }
    fv_sched_submit(f->sched, &r[0]->request);
    fv_sched_next_step(f->sched, 0, fv_case_is_cancelled, &first);
    fv_ctl_memory_t after_first = *fv_sched_rank(f->sched, rank);
    for (int i = 1; i < 4; i++) {
        fv_sched_submit(f->sched, &r[i]->request);
    }
    fv_sched_next_step(f->sched, 0, fv_case_is_cancelled, &second);
    assert_ptr_equal(first.joined, &r[0]->request);
    assert_ptr_equal(second.joined, &r[2]->request); /* layer 0 is under way; r[3] is behind r[2] */
    assert_int_equal(second.n_joined, 1);
    assert_int_not_equal(first.slot, second.slot);
    uint64_t free_in_both = fv_sched_rank(f->sched, rank)->kv_bytes_free;
    assert_true((free_in_both < after_first.kv_bytes_free) &&
                (after_first.kv_bytes_free < free_before));
    fv_sched_rank_done(f->sched, &first, rank, &after_first);
    assert_int_equal(fv_sched_rank(f->sched, rank)->kv_bytes_free, free_in_both);
    fv_sched_step_done(f->sched, &first);
    fv_sched_next_step(f->sched, 0, fv_case_is_cancelled, &third);
    assert_ptr_equal(third.joined, &r[1]->request); /* now layer 1 is under way */
    assert_int_equal(third.n_joined, 1);
    assert_int_equal(fv_sched_n_queued(f->sched), 1);
    assert_int_equal(fv_sched_bytes_queued(f->sched),
                     r[3]->request.head.q.n_bytes + 2U * r[3]->request.head.k.n_bytes);
    fv_sched_step_done(f->sched, &second);
    fv_sched_step_done(f->sched, &third);
    assert_ptr_equal(run_step(f).joined, &r[3]->request);
    assert_int_equal(length(f, s, 0), 20);
    assert_int_equal(length(f, s, 1), 20);
    for (int i = 0; i < 4; i++) {
        free(r[i]);
    }
}

static void test_wrong_requests_are_named(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t s = fv_case_open(f->sched, f->model_id, NULL);
    fv_session_id_t unknown = {{0xEE}};
    fv_case_request_t *r = fv_case_request(0, true);

    fv_case_add(r, unknown, 0, 1, 0);
    expect_refusal(f, r, FV_ERR_NOT_FOUND, "items[0].session_id");

    r = fv_case_request(2, true);
    fv_case_add(r, s, 0, 1, 0);
    expect_refusal(f, r, FV_ERR_INVALID_ARG, "layer: given 2, expected 0..1");

    r = fv_case_request(0, true);
    fv_case_add(r, s, 0, 1, 0);
    fv_case_add(r, s, 1, 1, 0);
    fv_case_sizes(r, &f->spec);
    expect_refusal(f, r, FV_ERR_INVALID_ARG,
                   "items[1].session_id: the session is in this request twice");

    r = fv_case_request(0, true);
    fv_case_add(r, s, 0, 2, 0);
    fv_case_sizes(r, &f->spec);
    r->request.head.k.n_bytes -= 4;
    expect_refusal(f, r, FV_ERR_INVALID_ARG,
                   "k: given 252 bytes, expected 256 = 2 tokens x 2 heads x 16 x f32");

    r = fv_case_request(0, false);
    fv_case_add(r, s, 0, 1, 0);
    fv_case_sizes(r, &f->spec);
    r->request.head.v.n_bytes = 8;
    expect_refusal(f, r, FV_ERR_INVALID_ARG, "v: given 8 bytes, expected none with append = false");

    fv_model_spec_t other = fv_case_spec("other");
    char other_id[FV_MODEL_ID_BYTES];
    fv_case_register(f->sched, &other, other_id);
    r = fv_case_request(0, true);
    fv_case_add(r, s, 0, 1, 0);
    fv_case_add(r, fv_case_open(f->sched, other_id, NULL), 0, 1, 0);
    expect_refusal(f, r, FV_ERR_INVALID_ARG, "items[1].session_id: a session of model");
}

static void test_same_layer_waits_in_order(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t s = fv_case_open(f->sched, f->model_id, NULL);
    fv_session_id_t t = fv_case_open(f->sched, f->model_id, NULL);
    fv_case_request_t *a = fv_case_request(0, true);
    fv_case_request_t *b = fv_case_request(0, true);
    fv_case_request_t *c = fv_case_request(1, true); /* another layer: joins at once */
    fv_case_request_t *d = fv_case_request(0, true); /* another session, but also s behind b */
    fv_case_request_t *all[] = {a, b, c, d};

    fv_case_add(a, s, 0, 1, 1);
    fv_case_add(b, s, 1, 1, 2);
    fv_case_add(c, s, 0, 1, 3);
    fv_case_add(d, t, 0, 1, 4);
    fv_case_add(d, s, 2, 1, 5);
    for (size_t i = 0; i < 4; i++) {
        fv_case_sizes(all[i], &f->spec);
        fv_sched_submit(f->sched, &all[i]->request);
    }
    fv_step_plan_t plan = run_step(f);
    assert_int_equal(plan.n_joined, 2);
    assert_ptr_equal(plan.joined, &a->request);
    assert_ptr_equal(plan.joined->next, &c->request);
    plan = run_step(f);
    assert_int_equal(plan.n_joined, 1);
    assert_ptr_equal(plan.joined, &b->request);
    plan = run_step(f);
    assert_ptr_equal(plan.joined, &d->request);
    assert_int_equal(length(f, s, 0), 3);
    assert_int_equal(length(f, t, 0), 1);
    assert_int_equal(fv_sched_n_queued(f->sched), 0);
    for (size_t i = 0; i < 4; i++) {
        free(all[i]);
    }
}

static void test_step_tokens_bound_a_step(void **state)
{
    fixture_t *f = *state;
    fv_case_request_t *large = fv_case_request(0, true);
    fv_case_request_t *small = fv_case_request(0, true);

    fv_case_add(large, fv_case_open(f->sched, f->model_id, NULL), 0, 300, 1); /* over the bound */
    fv_case_add(small, fv_case_open(f->sched, f->model_id, NULL), 0, 254, 2);
    fv_case_sizes(large, &f->spec);
    fv_case_sizes(small, &f->spec);
    fv_sched_submit(f->sched, &large->request);
    fv_sched_submit(f->sched, &small->request);
    fv_step_plan_t plan = run_step(f);
    assert_int_equal(plan.n_joined, 1);
    assert_int_equal(plan.n_tokens, 256);
    assert_null(plan.joined); /* nothing to answer yet */
    plan = run_step(f);       /* what is left went to the back of the queue */
    assert_int_equal(plan.n_joined, 1);
    assert_ptr_equal(plan.joined, &small->request);
    plan = run_step(f);
    assert_int_equal(plan.n_tokens, 44);
    assert_ptr_equal(plan.joined, &large->request);
    free(large);
    free(small);
}

static void test_cancelled_and_late_leave_the_queue(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t s = fv_case_open(f->sched, f->model_id, NULL);
    fv_case_request_t *cancelled = fv_case_request(0, true);
    fv_case_request_t *late = fv_case_request(0, true);
    fv_step_plan_t plan;

    fv_case_add(cancelled, s, 0, 1, 1);
    fv_case_add(late, s, 0, 1, 1);
    cancelled->is_cancelled = true;
    late->request.deadline_us = 1000;
    fv_sched_submit(f->sched, &cancelled->request);
    fv_sched_submit(f->sched, &late->request);
    fv_sched_next_step(f->sched, 1000, fv_case_is_cancelled, &plan);
    assert_null(plan.joined);
    assert_int_equal(cancelled->request.error.status, FV_ERR_CANCELLED);
    assert_int_equal(late->request.error.status, FV_ERR_DEADLINE);
    assert_int_equal(length(f, s, 0), 0);
    free(cancelled);
    free(late);
}

/* Rank memory: 4 slabs of 64 KiB; a page is 4 KiB (2 heads: 8 KiB a page of tokens and layer). */
static void test_full_pool_refuses_with_numbers_and_all_or_nothing(void **state)
{
    fixture_t *f = *state;
    fv_sharding_t one = {.mode = FV_SHARDING_CONTEXT, .max_ranks = 1};
    fv_session_id_t s = fv_case_open(f->sched, f->model_id, &one);
    uint32_t rank = fv_sched_session(f->sched, &s)->placement.ranks[0];

    assert_int_equal(append(f, s, 0, 64 * 31, 1, 64 * 31, true), FV_OK); /* 62 of 64 pages */
    fv_ctl_memory_t before = *fv_sched_rank(f->sched, rank);
    fv_case_request_t *r = fv_case_request(1, true);
    fv_case_add(r, s, 0, 65, 2); /* 4 pages */
    assert_int_equal(serve(f, r), FV_ERR_EXHAUSTED);
    assert_non_null(strstr(r->request.error.text, "16384 bytes needed, 8192 free of 262144"));
    assert_memory_equal(fv_sched_rank(f->sched, rank), &before, sizeof(before));
    free(r);
    r = fv_case_request(1, true);
    fv_case_add(r, s, 0, 64, 2); /* 2 pages: what is left */
    assert_int_equal(serve(f, r), FV_OK);
    assert_int_equal(fv_sched_rank(f->sched, rank)->kv_bytes_free, 0);
    free(r);
}

static void test_failed_on_a_rank_commits_nothing(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t s = fv_case_open(f->sched, f->model_id, NULL);
    fv_case_request_t *r = fv_case_request(0, true);
    fv_step_plan_t plan;

    fv_case_add(r, s, 0, 5, 1);
    fv_case_sizes(r, &f->spec);
    fv_sched_submit(f->sched, &r->request);
    fv_sched_next_step(f->sched, 0, fv_case_is_cancelled, &plan);
    assert_ptr_equal(plan.joined, &r->request);
    r->request.error.status = FV_ERR_INTERNAL;
    fv_sched_step_done(f->sched, &plan);
    assert_int_equal(length(f, s, 0), 0);
    assert_int_equal(append(f, s, 0, 5, 1, 5, true), FV_OK);
    free(r);
}

static void test_models_are_idempotent_and_sessions_fork(void **state)
{
    fixture_t *f = *state;
    fv_model_spec_t again = fv_case_spec("m");
    char id[FV_MODEL_ID_BYTES];
    fv_session_id_t s = fv_case_open(f->sched, f->model_id, NULL);
    fv_session_id_t child = {{0xC1}};
    fv_ctl_fork_t fork;
    fv_ctl_truncate_t cut;
    fv_placement_t placement;

    fv_case_register(f->sched, &again, id);
    assert_string_equal(id, f->model_id);
    assert_int_equal(fv_sched_n_models(f->sched), 1);
    assert_int_equal(append(f, s, 0, 70, 1, 70, true), FV_OK);
    assert_int_equal(fv_sched_fork(f->sched, &s, 71, &(fv_birth_t){.id = child}, &fork, &placement),
                     FV_ERR_OUT_OF_RANGE);
    assert_int_equal(fv_sched_fork(f->sched, &s, 66, &(fv_birth_t){.id = child}, &fork, &placement),
                     FV_OK);
    assert_int_equal(length(f, child, 0), 66);
    assert_int_equal(append(f, child, 66, 1, 2, 67, true), FV_OK);
    assert_int_equal(length(f, s, 0), 70);
    assert_int_equal(fv_sched_truncate(f->sched, &s, 71, &cut, &placement), FV_ERR_OUT_OF_RANGE);
    assert_int_equal(fv_sched_truncate(f->sched, &s, 3, &cut, &placement), FV_OK);
    assert_int_equal(length(f, s, 0), 3);
    assert_int_equal(append(f, s, 3, 1, 9, 4, true), FV_OK);
}

/* A fork costs one page of each head when one of the two appends, and none when the other does. */
static void test_full_pool_after_a_fork(void **state)
{
    fixture_t *f = *state;
    fv_sharding_t one = {.mode = FV_SHARDING_CONTEXT, .max_ranks = 1};
    fv_session_id_t s = fv_case_open(f->sched, f->model_id, &one);
    fv_session_id_t child = {{0xC2}};
    fv_ctl_fork_t fork;
    fv_placement_t placement;

    assert_int_equal(append(f, s, 0, 64 * 30 + 5, 1, 64 * 30 + 5, true),
                     FV_OK); /* 62 of 64 pages */
    assert_int_equal(
        fv_sched_fork(f->sched, &s, UINT64_MAX, &(fv_birth_t){.id = child}, &fork, &placement),
        FV_OK);
    assert_int_equal(append(f, child, 64 * 30 + 5, 1, 2, 64 * 30 + 6, true),
                     FV_OK); /* the last two */
    assert_int_equal(fv_sched_rank(f->sched, placement.ranks[0])->kv_bytes_free, 0);
    assert_int_equal(append(f, s, 64 * 30 + 5, 1, 3, 64 * 30 + 6, true),
                     FV_OK); /* its own by now */
    assert_int_equal(append(f, child, 64 * 30 + 6, 1, 4, 64 * 30 + 7, true), FV_OK);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

/* Owners see their own, quotas hold within a step, and whoever waits counts as used. */
static void test_owners_quotas_and_use(void **state)
{
    fixture_t *f = *state;
    static fv_principal_t owner = {.name = "owner", .sessions_max = 2};
    static fv_principal_t other = {.name = "other"};
    fv_open_request_t open = {0};
    fv_ctl_open_t message;
    fv_birth_t birth[3] = {{.id = {{0xa1}}, .owner = &owner, .now_us = 5},
                           {.id = {{0xa2}}, .owner = &owner, .now_us = 6},
                           {.id = {{0xa3}}, .owner = &owner}};
    fv_case_request_t *r[3];
    fv_step_plan_t plan;

    memcpy(open.model_id, f->model_id, sizeof(open.model_id));
    assert_int_equal(fv_sched_open(f->sched, &open, &birth[0], &message), FV_OK);
    assert_int_equal(fv_sched_open(f->sched, &open, &birth[1], &message), FV_OK);
    assert_int_equal(fv_sched_open(f->sched, &open, &birth[2], &message), FV_ERR_EXHAUSTED);
    assert_null(fv_sched_session(f->sched, &birth[2].id));
    assert_int_equal(owner.n_sessions, 2);
    r[0] = fv_case_request(0, true);
    fv_case_add(r[0], birth[0].id, 0, 1, 0);
    fv_case_sizes(r[0], &f->spec);
    r[0]->request.principal = &other;
    expect_refusal(f, r[0], FV_ERR_NOT_FOUND, "items[0].session_id: no session");

    /* one page of every head of a layer for each: the second would be one too many */
    uint64_t layer_bytes = fv_model_page_bytes(&f->spec) * (uint64_t)f->spec.n_kv_heads;
    owner.kv_bytes_max = layer_bytes;
    for (int i = 0; i < 3; i++) { /* 0 joins, 1 waits behind it on the layer, 2 is refused */
        r[i] = fv_case_request(0, true);
        fv_case_add(r[i], birth[(i == 2) ? 1 : 0].id, (i == 1) ? 1 : 0, 1, 0);
        fv_case_sizes(r[i], &f->spec);
        r[i]->request.principal = &owner;
        fv_sched_submit(f->sched, &r[i]->request);
    }
    fv_sched_next_step(f->sched, 100, fv_case_is_cancelled, &plan);
    assert_ptr_equal(plan.joined, &r[0]->request);
    assert_ptr_equal(plan.finished, &r[2]->request);
    assert_int_equal(r[2]->request.error.status, FV_ERR_EXHAUSTED);
    assert_non_null(strstr(r[2]->request.error.text, "quota of owner"));
    assert_int_equal(owner.kv_bytes_pending, layer_bytes);
    fv_sched_step_done(f->sched, &plan);
    assert_int_equal(owner.kv_bytes_pending, 0);
    assert_int_equal(owner.kv_bytes, layer_bytes);
    fv_sched_next_step(f->sched, 200, fv_case_is_cancelled, &plan); /* the one that waited */
    assert_ptr_equal(plan.joined, &r[1]->request);
    assert_int_equal(fv_sched_session(f->sched, &birth[0].id)->used_us, 200);
    assert_int_equal(fv_sched_formed_us(f->sched), 200);
    fv_sched_step_done(f->sched, &plan);
    for (int i = 0; i < 2; i++) {
        fv_ctl_close_t close;
        fv_placement_t placement;
        assert_int_equal(fv_sched_close(f->sched, &birth[i].id, &close, &placement), FV_OK);
    }
    assert_int_equal(owner.n_sessions, 0);
    assert_int_equal(owner.kv_bytes, 0);
    for (int i = 0; i < 3; i++) {
        free(r[i]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_append_then_retry_then_refusals),
        TEST(test_two_steps_under_way),
        TEST(test_query_only_reads_without_appending),
        TEST(test_wrong_requests_are_named),
        TEST(test_same_layer_waits_in_order),
        TEST(test_owners_quotas_and_use),
        TEST(test_step_tokens_bound_a_step),
        TEST(test_cancelled_and_late_leave_the_queue),
        TEST(test_full_pool_refuses_with_numbers_and_all_or_nothing),
        TEST(test_full_pool_after_a_fork),
        TEST(test_failed_on_a_rank_commits_nothing),
        TEST(test_models_are_idempotent_and_sessions_fork),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
