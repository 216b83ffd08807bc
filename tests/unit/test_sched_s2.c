/*
 * test_sched_s2.c - the scheduler core and S2: what is warned of, refused, freed and counted.
 */
#include "coord/sched.h"
#include "tests/support/sched_case.h"
#include "tests/support/test.h"

#include <stdlib.h>
#include <string.h>

#define BLOCK 64U

typedef struct fixture {
    fv_sched_t *sched;
    fv_model_spec_t spec;
    char model_id[FV_MODEL_ID_BYTES];
} fixture_t;

/* 2 KV heads: blocks of 64, 2 local, every 8th; layer 1 is dense. */
static fv_model_spec_t sparse_spec(void)
{
    fv_model_spec_t spec = fv_case_spec("sparse");

    spec.n_policies = 2;
    spec.policies[1] = (fv_policy_t){
        .kind = FV_POLICY_S2, .block_tokens = BLOCK, .local_blocks = 2, .vert_stride = 8};
    spec.layer_policy[0] = 1;
    return spec;
}

static int setup(void **state)
{
    fixture_t *f = calloc(1, sizeof(*f));

    assert_non_null(f);
    f->sched = fv_case_sched(1, 16, 64U * 1024U);
    f->spec = sparse_spec();
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

/* Serves one request of one item; its error, and the status. */
static int serve(fixture_t *f, fv_case_request_t *r, fv_error_t *out)
{
    fv_step_plan_t plan;

    fv_case_sizes(r, &f->spec);
    fv_sched_submit(f->sched, &r->request);
    fv_sched_next_step(f->sched, 0, fv_case_is_cancelled, &plan);
    fv_sched_step_done(f->sched, &plan);
    *out = r->request.error;
    free(r);
    return out->status;
}

static int append(fixture_t *f, fv_session_id_t s, uint32_t layer, uint64_t position, uint32_t n)
{
    fv_case_request_t *r = fv_case_request(layer, true);
    fv_error_t error;

    fv_case_add(r, s, position, n, (uint32_t)position + 1U);
    return serve(f, r, &error);
}

static void assert_text(const char *given, const char *part)
{
    if (strstr(given, part) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", given, part);
    }
}

static void test_warnings_of_a_model(void **state)
{
    static fv_ctl_model_t message;
    fv_model_spec_t spec = sparse_spec();
    fv_register_response_t response;
    bool is_new = false;
    fixture_t *f = *state;

    assert_int_equal(fv_sched_register(f->sched, &spec, NULL, &response, &is_new, &message), FV_OK);
    assert_int_equal(response.n_warnings, 1);
    assert_text(response.warnings[0],
                "S2 in 1 layers (layer 0 the first): no head reads 6 of every 8");
    spec.policies[1].num_dense_heads = 1; /* which reads them all */
    assert_int_equal(fv_sched_register(f->sched, &spec, NULL, &response, &is_new, &message), FV_OK);
    assert_int_equal(response.n_warnings, 0);
}

static void test_only_causal(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t s = fv_case_open(f->sched, f->model_id, NULL);

    for (uint32_t layer = 0; layer < 2U; layer++) {
        fv_case_request_t *r = fv_case_request(layer, true);
        fv_error_t error;

        fv_case_add(r, s, 0, 1, 1);
        r->request.head.causal = false;
        assert_int_equal(serve(f, r, &error), (layer == 0U) ? FV_ERR_INVALID_ARG : FV_OK);
        assert_text(error.text, (layer == 0U) ? "causal: given false" : "");
    }
}

/* Pages of 64 tokens: 20 blocks, the last token in block 19. Each head keeps 2 local blocks and its own of every 8. */
static void test_what_is_held(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t s = fv_case_open(f->sched, f->model_id, NULL);
    const fv_session_t *session = fv_sched_session(f->sched, &s);
    uint64_t page_bytes = fv_model_page_bytes(&f->spec);

    for (uint64_t i = 0; i < 20U; i++) {
        assert_int_equal(append(f, s, 0, i * BLOCK, BLOCK), FV_OK);
        assert_int_equal(append(f, s, 1, i * BLOCK, BLOCK), FV_OK);
    }
    /* head 0: 0, 8, 16, 18, 19; head 1: 7, 15, 18, 19; the dense layer: 20 each */
    assert_int_equal(session->held[0], (5U + 4U + 40U) * page_bytes);
    assert_int_equal(fv_session_cell_bytes(session, &f->spec, 0), session->held[0]);
}

static void test_the_past_is_refused(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t s = fv_case_open(f->sched, f->model_id, NULL);
    fv_birth_t child = {.id = {{0xC3}}};
    fv_ctl_truncate_t cut;
    fv_ctl_fork_t fork;
    fv_placement_t placement;

    for (uint64_t i = 0; i < 10U; i++) {
        assert_int_equal(append(f, s, 0, i * BLOCK, BLOCK), FV_OK);
    }
    assert_int_equal(append(f, s, 0, 640, 3),
                     FV_OK); /* three draft tokens, the first in block 10 */
    /* a lost answer: asked again, and again */
    assert_int_equal(append(f, s, 0, 640, 3), FV_OK);
    assert_int_equal(append(f, s, 0, 640, 3), FV_OK);
    assert_int_equal(append(f, s, 0, 576, BLOCK), FV_ERR_PRECONDITION); /* what it reads is freed */
    /* drafts rejected: cut anywhere in the last append */
    assert_int_equal(fv_sched_truncate(f->sched, &s, 641, &cut, &placement), FV_OK);
    assert_int_equal(append(f, s, 0, 641, 2), FV_OK);
    assert_int_equal(fv_sched_truncate(f->sched, &s, 600, &cut, &placement), FV_ERR_PRECONDITION);
    assert_text(fv_error_context(), "position: given 600, expected 641");
    assert_int_equal(fv_sched_fork(f->sched, &s, 600, &child, &fork, &placement),
                     FV_ERR_PRECONDITION);
    assert_text(fv_error_context(), "at_position: given 600");
    assert_int_equal(fv_sched_session(f->sched, &s)->layers[0].n_tokens, 643); /* nothing changed */
    assert_int_equal(fv_sched_fork(f->sched, &s, 640, &child, &fork, &placement), FV_OK);
    assert_int_equal(fv_sched_truncate(f->sched, &s, 0, &cut, &placement), FV_OK); /* anew */
    assert_int_equal(fv_sched_session(f->sched, &s)->held[0], 0);
    assert_int_equal(append(f, s, 0, 0, 100), FV_OK);
}

static void test_queries_of_the_past_are_refused(void **state)
{
    fixture_t *f = *state;
    fv_session_id_t s = fv_case_open(f->sched, f->model_id, NULL);
    fv_case_request_t *r = NULL;
    fv_error_t error;

    for (uint64_t i = 0; i < 10U; i++) {
        assert_int_equal(append(f, s, 0, i * BLOCK, BLOCK), FV_OK);
    }
    r = fv_case_request(0, false);
    fv_case_add(r, s, 600, 5, 0);
    assert_int_equal(serve(f, r, &error), FV_OK);
    r = fv_case_request(0, false);
    fv_case_add(r, s, 500, 5, 0);
    assert_int_equal(serve(f, r, &error), FV_ERR_PRECONDITION);
    assert_text(error.text, "items[0].position: given 500");
    assert_text(error.text, "from 576 on");
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_warnings_of_a_model),
        TEST(test_only_causal),
        TEST(test_what_is_held),
        TEST(test_the_past_is_refused),
        TEST(test_queries_of_the_past_are_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
