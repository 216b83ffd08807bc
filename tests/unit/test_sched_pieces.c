/*
 * test_sched_pieces.c - prefill in pieces beside decode: coord/sched_piece.c and coord/sched_budget.c, rule by rule.
 *
 * Goal:   decode joins every step first; a long request is served in pieces over steps, within the step's allowance, and is
 *         admitted, committed and answered whole; between its pieces its layer is nobody else's and its memory is kept;
 *         one that ends half-way leaves everything as it was; the allowance follows what steps are said to take.
 * Method: requests by hand, one step at a time; times are made up.
 */
#include "coord/sched.h"
#include "tests/support/sched_case.h"
#include "tests/support/test.h"

#include <stdlib.h>
#include <string.h>

#define PIECE 64U

typedef struct fixture {
    fv_sched_t *sched;
    fv_model_spec_t spec;
    char model_id[FV_MODEL_ID_BYTES];
} fixture_t;

static int setup(void **state)
{
    fixture_t *f = calloc(1, sizeof(*f));

    assert_non_null(f);
    f->sched = fv_case_sched_pieces(1, 4, 64U * 1024U, PIECE);
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

static fv_case_request_t *
submit(fixture_t *f, fv_session_id_t s, uint64_t position, uint32_t n_tokens, uint32_t digest)
{
    fv_case_request_t *r = fv_case_request(0, true);

    fv_case_add(r, s, position, n_tokens, digest);
    fv_case_sizes(r, &f->spec);
    fv_sched_submit(f->sched, &r->request);
    return r;
}

static fv_step_plan_t form(fixture_t *f)
{
    fv_step_plan_t plan;

    fv_sched_next_step(f->sched, 0, fv_case_is_cancelled, &plan);
    return plan;
}

static fv_step_plan_t run_step(fixture_t *f)
{
    fv_step_plan_t plan = form(f);

    fv_sched_step_done(f->sched, &plan);
    return plan;
}

static uint64_t length(fixture_t *f, fv_session_id_t s)
{
    return fv_sched_session(f->sched, &s)->layers[0].n_tokens;
}

static void test_decode_goes_first_and_a_prompt_in_pieces(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t a = fv_case_open(f->sched, f->model_id, NULL);
    fv_session_id_t b = fv_case_open(f->sched, f->model_id, NULL);
    fv_case_request_t *prompt = submit(f, a, 0, 200, 1);

    for (uint32_t i = 0; i < 4; i++) {
        fv_case_request_t *decode = submit(f, b, i, 1, i);
        fv_step_plan_t plan = form(f);
        assert_int_equal(plan.n_joined, 2);
        assert_ptr_equal(plan.joined, &decode->request);
        assert_ptr_equal(plan.joined->next, &prompt->request);
        assert_int_equal(prompt->request.n_tokens_done, i * PIECE);
        assert_int_equal(prompt->ctl_items[0].position, i * PIECE);
        assert_int_equal(prompt->ctl_items[0].n_tokens, (i < 3) ? PIECE : 8U);
        assert_int_equal(prompt->ctl_items[0].kv_end, (i < 3) ? (i + 1U) * PIECE : 200U);
        assert_int_equal((prompt->ctl_items[0].flags & FV_ITEM_CONTINUES) != 0, i > 0);
        assert_int_equal(length(f, a), 0); /* not before all of it is there */
        fv_sched_step_done(f->sched, &plan);
        assert_ptr_equal(plan.joined, &decode->request);
        assert_ptr_equal(plan.joined->next, (i < 3) ? NULL : &prompt->request);
        assert_int_equal(fv_sched_is_half_way(fv_sched_session(f->sched, &a)), i < 3);
        free(decode);
    }
    assert_int_equal(length(f, a), 200);
    fv_case_request_t *again =
        submit(f, a, 0, 200, 1); /* a retry of the whole: nothing is appended */
    fv_step_plan_t plan = run_step(f);
    while (plan.joined == NULL) {
        assert_int_equal(again->ctl_items[0].flags & FV_ITEM_APPEND, 0);
        assert_int_equal(again->ctl_items[0].kv_end, 200);
        plan = run_step(f);
    }
    assert_int_equal(again->request.error.status, FV_OK);
    assert_int_equal(length(f, a), 200);
    free(again);
    free(prompt);
}

static void test_who_wants_the_same_layer_waits(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t a = fv_case_open(f->sched, f->model_id, NULL);
    fv_case_request_t *prompt = submit(f, a, 0, 100, 1);
    fv_case_request_t *decode = submit(f, a, 100, 1, 2);

    assert_null(run_step(f).joined);
    fv_step_plan_t plan = run_step(f);
    assert_ptr_equal(plan.joined, &prompt->request);
    assert_null(plan.joined->next);
    plan = run_step(f);
    assert_ptr_equal(plan.joined, &decode->request);
    assert_int_equal(decode->request.error.status, FV_OK);
    assert_int_equal(length(f, a), 101);
    free(prompt);
    free(decode);
}

static void test_prompts_take_turns(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t a = fv_case_open(f->sched, f->model_id, NULL);
    fv_session_id_t b = fv_case_open(f->sched, f->model_id, NULL);
    fv_case_request_t *long_one = submit(f, a, 0, 600, 1);
    fv_case_request_t *short_one = submit(f, b, 0, 80, 2);

    assert_null(run_step(f).joined);   /* 64 of the long one, which goes to the back */
    assert_null(run_step(f).joined);   /* 64 of the short one */
    fv_step_plan_t plan = run_step(f); /* 64 of the long one */
    assert_int_equal(long_one->request.n_tokens_done, 128);
    plan = run_step(f); /* the short one's 16, and of the long one what fits beside */
    assert_ptr_equal(plan.joined, &short_one->request);
    assert_int_equal(long_one->request.n_tokens_done, 128 + 48);
    while (plan.joined != &long_one->request) {
        plan = run_step(f);
    }
    assert_int_equal(length(f, a), 600);
    free(long_one);
    free(short_one);
}

/* Two heads' pages of 64 tokens take 8 KiB: 4 slabs of 64 KiB hold 32 x 64 tokens. */
static void test_memory_is_taken_for_all_of_it(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t a = fv_case_open(f->sched, f->model_id, NULL);
    fv_session_id_t b = fv_case_open(f->sched, f->model_id, NULL);
    fv_case_request_t *too_long = submit(f, a, 0, 32U * 64U + 1U, 1);

    fv_step_plan_t plan = form(f);
    assert_null(plan.joined);
    assert_ptr_equal(plan.finished, &too_long->request);
    assert_int_equal(too_long->request.error.status, FV_ERR_EXHAUSTED);
    assert_int_equal(fv_sched_rank(f->sched, 0)->kv_bytes_free, 4U * 64U * 1024U);
    fv_case_request_t *prompt = submit(f, a, 0, 31U * 64U, 1);
    assert_null(run_step(f).joined);
    fv_case_request_t *other = submit(f, b, 0, 65, 2); /* there is a page for one of its two */
    do {                                               /* its turn comes */
        plan = run_step(f);
    } while (plan.finished == NULL);
    assert_ptr_equal(plan.finished, &other->request);
    assert_int_equal(other->request.error.status, FV_ERR_EXHAUSTED);
    assert_int_equal(length(f, a), 0);
    free(other);
    other = submit(f, b, 0, 64, 2);
    while (length(f, a) == 0) {
        plan = run_step(f);
    }
    assert_int_equal(length(f, b), 64);
    free(too_long);
    free(prompt);
    free(other);
}

static void test_given_up_half_way(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t a = fv_case_open(f->sched, f->model_id, NULL);
    fv_ctl_memory_t all = *fv_sched_rank(f->sched, 0);
    fv_case_request_t *prompt = submit(f, a, 0, 1000, 1);

    assert_null(run_step(f).joined);
    assert_null(run_step(f).joined);
    prompt->is_cancelled = true;
    fv_step_plan_t plan = form(f);
    assert_ptr_equal(plan.joined, &prompt->request); /* to be undone */
    assert_null(plan.finished);
    assert_int_equal(prompt->request.error.status, FV_ERR_CANCELLED);
    assert_int_equal(plan.n_tokens, 0);
    assert_true(fv_request_has_begun(&prompt->request, 0));
    fv_sched_forget_rest(f->sched, &prompt->request);
    fv_sched_rank_memory(f->sched, 0, &all); /* the rank has cut it back, and says so */
    assert_int_equal(fv_sched_rank(f->sched, 0)->kv_bytes_free, all.kv_bytes_free);
    fv_sched_step_done(f->sched, &plan);
    assert_ptr_equal(plan.joined, &prompt->request);
    assert_int_equal(length(f, a), 0);
    assert_false(fv_sched_is_half_way(fv_sched_session(f->sched, &a)));
    free(prompt);
    prompt = submit(f, a, 0, 100, 1);
    do {
        plan = run_step(f);
    } while (plan.joined == NULL);
    assert_int_equal(length(f, a), 100);
    free(prompt);
}

static void test_appends_without_a_mask_are_not_cut(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t a = fv_case_open(f->sched, f->model_id, NULL);
    fv_case_request_t *r = fv_case_request(0, true);

    fv_case_add(r, a, 0, 300, 1);
    fv_case_sizes(r, &f->spec);
    r->request.head.causal = false;
    fv_sched_submit(f->sched, &r->request);
    fv_step_plan_t plan = run_step(f);
    assert_ptr_equal(plan.joined, &r->request);
    assert_int_equal(plan.n_tokens, 300);
    free(r);
    r = fv_case_request(0, false); /* what is there already can be asked for in pieces */
    fv_case_add(r, a, 0, 300, 1);
    fv_case_sizes(r, &f->spec);
    r->request.head.causal = false;
    fv_sched_submit(f->sched, &r->request);
    plan = run_step(f);
    assert_null(plan.joined);
    assert_int_equal(r->ctl_items[0].kv_end, 300);
    while (plan.joined == NULL) {
        plan = run_step(f);
    }
    free(r);
}

/* Decode that fills every step does not keep a prompt waiting for ever. */
static void test_prompts_are_not_starved(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t s[32];
    fv_case_request_t *decode[32];
    int n_steps = 0;

    for (int i = 0; i < 32; i++) {
        s[i] = fv_case_open(f->sched, f->model_id, NULL);
    }
    fv_case_request_t *prompt = submit(f, fv_case_open(f->sched, f->model_id, NULL), 0, 40, 1);
    for (; (prompt->request.n_tokens_piece == 0) && (n_steps < 40); n_steps++) {
        for (int i = 0; i < 32;
             i++) { /* twice what a step takes of queries, which need no memory */
            decode[i] = fv_case_request(0, false);
            fv_case_add(decode[i], s[i], 0, 16, 0);
            fv_case_sizes(decode[i], &f->spec);
            fv_sched_submit(f->sched, &decode[i]->request);
        }
        while (fv_sched_n_queued(f->sched) > ((prompt->request.n_tokens_piece == 0) ? 1U : 0U)) {
            (void)run_step(f);
        }
        for (int i = 0; i < 32; i++) {
            assert_int_equal(decode[i]->request.error.status, FV_OK);
            free(decode[i]);
        }
    }
    assert_true((n_steps > 1) && (n_steps < 10));
    free(prompt);
}

/* ------------------------------------------------------------------ the allowance */

static void assert_near(double x, double expected, double tolerance)
{
    assert_true((x >= expected - tolerance) && (x <= expected + tolerance));
}

static void learn(fv_budget_t *b, double macs, bool has_decode, int64_t took_us, int n)
{
    for (int i = 0; i < n; i++) {
        fv_budget_learn(b, &(fv_step_cost_t){
                               .prefill_macs = macs, .has_decode = has_decode, .took_us = took_us});
    }
}

static void test_the_allowance_is_half_of_what_decode_takes(void **state)
{
    fv_budget_t b;

    (void)state;
    fv_budget_init(&b, 0);
    fv_allowance_t idle = fv_budget_allow(&b, 0, false, 1000);
    assert_int_equal(idle.n_tokens, 1000);
    learn(&b, idle.macs, false, 10000, 30); /* twice as fast as thought */
    idle = fv_budget_allow(&b, 0, false, 1000);
    assert_near(idle.macs / b.macs_per_us, FV_BUDGET_IDLE_US, 1.0);
    assert_int_equal(fv_budget_allow(&b, 0, true, 1000).n_tokens, 0); /* what does decode take? */
    learn(&b, 0.0, true, 4000, 30);
    fv_allowance_t beside = fv_budget_allow(&b, 10, true, 1000);
    assert_near(beside.macs / b.macs_per_us, 2000.0, 20.0);
    /* decode was here a moment ago; and long ago */
    assert_near(fv_budget_allow(&b, 50000, false, 1000).macs, beside.macs, 1.0);
    assert_near(fv_budget_allow(&b, 500000, false, 1000).macs, idle.macs, 1.0);
    /* the rate follows, in mixed steps by what they take longer than decode */
    for (int i = 0; i < 150; i++) {
        learn(&b, beside.macs, true, 4000 + 8000, 1);
        learn(&b, idle.macs / 4.0, false, 20000, 1);
    }
    assert_int_equal(fv_budget_allow(&b, 500000, true, 1000).n_tokens, 0); /* a look at decode */
    assert_near(fv_budget_allow(&b, 500010, true, 1000).macs, beside.macs / 4.0,
                beside.macs / 50.0);
}

static void test_decode_is_looked_at_again(void **state)
{
    fv_budget_t b;
    int n_looks = 0;

    (void)state;
    fv_budget_init(&b, 0);
    learn(&b, 0.0, true, 1000, 1);
    for (int i = 0; i < 100; i++) {
        fv_allowance_t a = fv_budget_allow(&b, i, true, 1000);
        n_looks += (a.n_tokens == 0) ? 1 : 0;
        learn(&b, a.macs, true, (a.n_tokens == 0) ? 3000 : 5000, 1);
    }
    assert_in_range(n_looks, 4, 7);
    assert_in_range((int)b.decode_us, 2000, 3000);
}

static void test_tokens_of_a_cost(void **state)
{
    (void)state;
    for (double visible = 0.0; visible < 2e6; visible = visible * 3.0 + 7.0) {
        for (double n = 1.0; n < 1e6; n *= 10.0) {
            double macs = fv_budget_macs(1024.0, visible, n);
            assert_in_range(fv_budget_tokens(1024.0, visible, macs * 1.0001), (uint64_t)n,
                            (uint64_t)(n * 1.001) + 1U);
        }
    }
    assert_int_equal(fv_budget_tokens(1024.0, 1000.0, 0.0), 0);
    fv_budget_t b;
    fv_budget_init(&b, 0);
    b.macs_per_us =
        160000.0; /* 160 macs in the time of a byte: of a token's 4096 bytes 80 x 8192 macs */
    assert_int_equal(fv_budget_least(&b, 8192.0, 4096.0, 1000.0), 64);
    assert_int_equal(fv_budget_least(&b, 8192.0, 4096.0, 2000.0), 32); /* of 40 */
    assert_int_equal(fv_budget_least(&b, 8192.0, 4096.0, 1e6), 16);
}

/* Pieces over several parts say how they are computed, and the session counts them; decode never moves KV. */
static void test_ways_of_pieces(void **state)
{
    static const fv_plan_prefill_t k_ways[] = {FV_PLAN_PREFILL_VISIT, FV_PLAN_PREFILL_MOVE};

    (void)state;
    for (size_t w = 0; w < FV_COUNT(k_ways); w++) {
        fixture_t f = {.sched = fv_case_sched_ways(3, 4, 64U * 1024U, PIECE, k_ways[w]),
                       .spec = fv_case_spec("ways")};
        const fv_sharding_t sharding = {.mode = FV_SHARDING_CONTEXT, .shard_tokens = 64};
        bool moves = k_ways[w] == FV_PLAN_PREFILL_MOVE;

        fv_case_register(f.sched, &f.spec, f.model_id);
        fv_session_id_t s = fv_case_open(f.sched, f.model_id, &sharding);
        fv_case_request_t *prompt = submit(&f, s, 0, 4U * PIECE, 1);
        for (uint32_t i = 0; i < 4U; i++) { /* the first piece sees what one part holds */
            fv_step_plan_t plan = form(&f);
            assert_int_equal((prompt->ctl_items[0].flags & FV_ITEM_MOVES_KV) != 0,
                             moves && (i > 0));
            fv_sched_step_done(f.sched, &plan);
        }
        fv_case_request_t *decode = submit(&f, s, 4U * PIECE, 1, 2);
        fv_step_plan_t plan = run_step(&f);
        assert_ptr_equal(plan.joined, &decode->request);
        assert_int_equal(decode->ctl_items[0].flags & FV_ITEM_MOVES_KV, 0);
        const fv_session_t *session = fv_sched_session(f.sched, &s);
        assert_int_equal(session->n_moves, moves ? 3 : 0);
        assert_int_equal(session->n_visits, moves ? 0 : 3);
        free(prompt);
        free(decode);
        fv_sched_destroy(f.sched);
    }
}

/*
 * A device with a fixed cost for each piece, seen only beside decode and from a bad first guess: both parts are found, and pieces
 * neither shrink for what is fixed nor grow over what they may take.
 */
static void test_fixed_cost_and_rate_are_told_apart(void **state)
{
    static const double k_rates[] = {2e8, 1e6, 3e4};
    static const double k_fixed[] = {400.0, 100.0, 0.0};
    static const double k_decode[] = {2000.0, 2000.0, 4000.0};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_rates); i++) {
        fv_budget_t b;
        double most_us = 0.0;
        uint32_t x = 1;

        fv_budget_init(&b, 0);
        learn(&b, 0.0, true, (int64_t)k_decode[i], 1);
        for (int n = 0; n < 600; n++) {
            fv_allowance_t a = fv_budget_allow(&b, n, true, 1000000);
            double us = (a.n_tokens == 0) ? 0.0 : (k_fixed[i] + a.macs / k_rates[i]);
            x = x * 1664525U + 1013904223U; /* scatter of 20 % */
            double scatter = 0.9 + 0.2 * (double)(x >> 8U) / 16777216.0;
            learn(&b, a.macs, true, (int64_t)((k_decode[i] + us) * scatter), 1);
            most_us = ((n > 300) && (us > most_us)) ? us : most_us;
        }
        print_message("rate %g, found %g; fixed %g us, found %.0f; longest piece %.0f us of %.0f\n",
                      k_rates[i], b.macs_per_us, k_fixed[i], b.over_us, most_us, k_decode[i] / 2.0);
        assert_true((b.macs_per_us > k_rates[i] / 3.0) && (b.macs_per_us < k_rates[i] * 3.0));
        assert_true(most_us > k_decode[i] / 8.0);
        assert_true(most_us < k_decode[i] * 0.9);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ways_of_pieces),
        cmocka_unit_test(test_fixed_cost_and_rate_are_told_apart),
        cmocka_unit_test_setup_teardown(test_decode_goes_first_and_a_prompt_in_pieces, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_who_wants_the_same_layer_waits, setup, teardown),
        cmocka_unit_test_setup_teardown(test_prompts_take_turns, setup, teardown),
        cmocka_unit_test_setup_teardown(test_memory_is_taken_for_all_of_it, setup, teardown),
        cmocka_unit_test_setup_teardown(test_given_up_half_way, setup, teardown),
        cmocka_unit_test_setup_teardown(test_appends_without_a_mask_are_not_cut, setup, teardown),
        cmocka_unit_test_setup_teardown(test_prompts_are_not_starved, setup, teardown),
        cmocka_unit_test(test_the_allowance_is_half_of_what_decode_takes),
        cmocka_unit_test(test_decode_is_looked_at_again),
        cmocka_unit_test(test_tokens_of_a_cost),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
