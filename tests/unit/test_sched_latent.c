/*
 * test_sched_latent.c - the scheduler core and LATENT models: what is refused, warned of, and taken of each rank's memory.
 */
#include "coord/sched.h"
#include "tests/support/sched_case.h"
#include "tests/support/test.h"

#include <stdlib.h>
#include <string.h>

#define N_RANKS    2U
#define N_SLABS    8U
#define SLAB_BYTES (1U << 20)

static fv_model_spec_t make_spec(int32_t groups)
{
    fv_model_spec_t spec = {.name = "latent",
                            .n_layers = 1,
                            .n_q_heads = 16,
                            .kind = FV_MODEL_LATENT,
                            .latent_dim = 512,
                            .rope_dim = 64,
                            .kv_dtype = FV_DTYPE_BF16,
                            .softmax_scale = 0.1F,
                            .n_policies = 1};

    if (groups > 0) {
        spec.sharding.mode = FV_SHARDING_LATENT;
        spec.sharding.groups = groups;
    }
    return spec;
}

static fv_status_t
try_register(fv_sched_t *sched, fv_model_spec_t spec, fv_register_response_t *out)
{
    static fv_ctl_model_t message; /* large */
    bool is_new = false;

    return fv_sched_register(sched, &spec, NULL, out, &is_new, &message);
}

static void test_ranks_without_latents_refuse_the_kind(void **state)
{
    fv_sched_config_t config = {.n_ranks = N_RANKS,
                                .sessions_max = 4,
                                .step_tokens_max = 64,
                                .shard_tokens = 64,
                                .cost = fv_plan_cost_cpu(),
                                .no_latent = "cuda",
                                .no_exact = "cuda"};
    fv_register_response_t response;
    fv_sched_t *sched = NULL;

    (void)state;
    assert_int_equal(fv_sched_create(&config, &sched), FV_OK);
    assert_int_equal(try_register(sched, make_spec(0), &response), FV_ERR_UNIMPLEMENTED);
    assert_non_null(strstr(fv_error_context(), "spec.kind: LATENT"));
    assert_non_null(strstr(fv_error_context(), "cuda"));
    assert_int_equal(fv_sched_n_models(sched), 0);
    fv_model_spec_t kv = fv_case_spec("kv");
    assert_int_equal(try_register(sched, kv, &response), FV_OK);
    fv_sched_destroy(sched);
}

/* Ranks that serve latents, but not in FP8, and do not add up scores between them. */
static void test_ranks_refuse_what_they_lack(void **state)
{
    fv_sched_config_t config = {.n_ranks = N_RANKS,
                                .sessions_max = 4,
                                .step_tokens_max = 64,
                                .shard_tokens = 64,
                                .cost = fv_plan_cost_cpu(),
                                .no_fp8 = "cuda",
                                .no_exact = "cuda"};
    fv_model_spec_t spec = make_spec(2);
    fv_register_response_t response;
    fv_sched_t *sched = NULL;

    (void)state;
    spec.sharding.exact = 1;
    assert_int_equal(fv_sched_create(&config, &sched), FV_OK);
    assert_int_equal(try_register(sched, spec, &response), FV_ERR_UNIMPLEMENTED);
    assert_non_null(strstr(fv_error_context(), "spec.sharding.exact: given true"));
    assert_non_null(strstr(fv_error_context(), "cuda"));
    spec = make_spec(0);
    spec.kv_dtype = FV_DTYPE_FP8_LATENT;
    assert_int_equal(try_register(sched, spec, &response), FV_ERR_UNIMPLEMENTED);
    assert_non_null(strstr(fv_error_context(), "FP8_LATENT is not served by the cuda backend"));
    fv_sched_destroy(sched);
}

/* 1024 + 128 dims in fp32: 288 KiB a page. */
static void test_pages_must_fit_every_ranks_slabs(void **state)
{
    fv_sched_t *sched = fv_case_sched(N_RANKS, N_SLABS, 1U << 18);
    fv_model_spec_t spec = make_spec(0);
    fv_register_response_t response;

    (void)state;
    spec.latent_dim = 1024;
    spec.rope_dim = 128;
    spec.kv_dtype = FV_DTYPE_F32;
    assert_int_equal(try_register(sched, spec, &response), FV_ERR_EXHAUSTED);
    assert_non_null(strstr(fv_error_context(), "294912 bytes"));
    assert_non_null(strstr(fv_error_context(), "262144"));
    assert_int_equal(fv_sched_n_models(sched), 0);
    assert_int_equal(try_register(sched, make_spec(0), &response), FV_OK);
    fv_sched_destroy(sched);
}

/* A function of its own: each copy of a spec on the caller's stack is 4 KB. */
static uint32_t warnings_of(fv_sched_t *sched, int32_t n_groups, fv_register_response_t *out)
{
    assert_int_equal(try_register(sched, make_spec(n_groups), out), FV_OK);
    return (uint32_t)out->n_warnings;
}

static void test_warnings(void **state)
{
    fv_sched_t *sched = fv_case_sched(N_RANKS, N_SLABS, SLAB_BYTES);
    fv_model_spec_t heads = make_spec(0);
    fv_register_response_t response;

    (void)state;
    assert_int_equal(warnings_of(sched, 0, &response), 0);
    assert_int_equal(warnings_of(sched, 1, &response), 0); /* one slice is the model itself */
    assert_int_equal(warnings_of(sched, 2, &response), 1);
    assert_non_null(strstr(response.warnings[0], "approximation"));
    heads.sharding = (fv_sharding_t){.mode = FV_SHARDING_LATENT, .groups = 2, .exact = 1};
    assert_int_equal(try_register(sched, heads, &response), FV_OK);
    assert_int_equal(response.n_warnings, 1);
    assert_null(strstr(response.warnings[0], "approximation"));
    assert_non_null(strstr(response.warnings[0], "scores of every token are exchanged"));
    heads.sharding = (fv_sharding_t){.mode = FV_SHARDING_HEADS};
    assert_int_equal(try_register(sched, heads, &response), FV_OK);
    assert_int_equal(response.n_warnings, 1);
    assert_non_null(strstr(response.warnings[0], "whole latent cache on every rank"));
    fv_sched_destroy(sched);
}

/* Slices are the model's: a session may repeat them, never change them. */
static void test_sessions_do_not_choose_slices(void **state)
{
    fv_sched_t *sched = fv_case_sched(N_RANKS, N_SLABS, SLAB_BYTES);
    fv_model_spec_t spec = make_spec(2);
    fv_open_request_t open = {.sharding = {.is_set = 1}};
    fv_birth_t birth = {.id = {.bytes = {1}}};
    fv_ctl_open_t message;

    (void)state;
    fv_case_register(sched, &spec, open.model_id);
    open.sharding.mode = FV_SHARDING_CONTEXT;
    assert_int_equal(fv_sched_open(sched, &open, &birth, &message), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "expected LATENT, as its model says"));
    open.sharding.mode = FV_SHARDING_LATENT;
    open.sharding.groups = 1;
    assert_int_equal(fv_sched_open(sched, &open, &birth, &message), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "groups: given 1"));
    open.sharding.groups = 2;
    open.sharding.n_mu = 2;
    assert_int_equal(fv_sched_open(sched, &open, &birth, &message), FV_ERR_INVALID_ARG);
    open.sharding.n_mu = 0;
    open.sharding.exact = 1;
    assert_int_equal(fv_sched_open(sched, &open, &birth, &message), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "exact = 1, expected"));
    open.sharding.exact = 0;
    assert_int_equal(fv_sched_open(sched, &open, &birth, &message), FV_OK);
    assert_int_equal(message.placement.n_head_parts, 2);
    spec = make_spec(0);
    fv_case_register(sched, &spec, open.model_id);
    assert_int_equal(fv_sched_open(sched, &open, &birth, &message), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "register a model of its own"));
    fv_sched_destroy(sched);
}

/* One step of n tokens; the request's status. */
static int serve(fv_sched_t *sched, fv_case_request_t *r)
{
    fv_step_plan_t plan;

    fv_sched_submit(sched, &r->request);
    fv_sched_next_step(sched, 0, fv_case_is_cancelled, &plan);
    fv_sched_step_done(sched, &plan);
    return r->request.error.status;
}

/* What 65 tokens take of each rank: two pages of a slice on both, or of the whole latent where the tokens are. */
static void check_memory(int32_t groups, size_t page_bytes, uint64_t pages_0, uint64_t pages_1)
{
    fv_sched_t *sched = fv_case_sched(N_RANKS, N_SLABS, SLAB_BYTES);
    fv_model_spec_t spec = make_spec(groups);
    uint64_t total = (uint64_t)N_SLABS * SLAB_BYTES;
    char id[FV_MODEL_ID_BYTES];

    fv_case_register(sched, &spec, id);
    fv_case_request_t *r = fv_case_request(0, true);
    fv_case_add(r, fv_case_open(sched, id, NULL), 0, 65, 0);
    fv_case_sizes(r, &spec);
    assert_int_equal(r->request.head.v.n_bytes, 0);
    assert_int_equal(serve(sched, r), FV_OK);
    const uint64_t pages[N_RANKS] = {pages_0, pages_1};
    for (uint32_t rank = 0; rank < N_RANKS; rank++) {
        uint64_t rest =
            (pages[rank] > 0) ? (SLAB_BYTES % page_bytes) : 0; /* of the slab they lie in */
        assert_int_equal(total - fv_sched_rank(sched, rank)->kv_bytes_free,
                         pages[rank] * page_bytes + rest);
    }
    free(r);
    fv_sched_destroy(sched);
}

static void test_memory_is_that_of_the_slices(void **state)
{
    (void)state;
    check_memory(0, (size_t)64 * 576 * 2, 1, 1); /* AUTO: blocks of 64 tokens in turn */
    check_memory(1, (size_t)64 * 576 * 2, 2, 0);
    check_memory(2, (size_t)64 * 320 * 2, 2, 2);
}

static void test_tensors_are_checked(void **state)
{
    fv_sched_t *sched = fv_case_sched(N_RANKS, N_SLABS, SLAB_BYTES);
    fv_model_spec_t spec = make_spec(2);
    char id[FV_MODEL_ID_BYTES];

    (void)state;
    fv_case_register(sched, &spec, id);
    fv_session_id_t session = fv_case_open(sched, id, NULL);
    for (int i = 0; i < 4; i++) {
        static const char *const k_texts[] = {"want_lse: given true", "v: given 2048 bytes",
                                              "k: given 2048 bytes, expected 2304",
                                              "only_slice: given 3, expected 0..2"};
        fv_case_request_t *r = fv_case_request(0, true);

        fv_case_add(r, session, 0, 1, 0);
        fv_case_sizes(r, &spec);
        r->request.head.want_lse = i == 0;
        r->request.head.v.n_bytes = (i == 1) ? 2048U : 0U;
        r->request.head.k.n_bytes -= (i == 2) ? 256U : 0U;
        r->request.head.only_slice = (i == 3) ? 3U : 0U;
        assert_int_equal(serve(sched, r), FV_ERR_INVALID_ARG);
        assert_non_null(strstr(r->request.error.text, k_texts[i]));
        free(r);
    }
    fv_sched_destroy(sched);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ranks_without_latents_refuse_the_kind),
        cmocka_unit_test(test_ranks_refuse_what_they_lack),
        cmocka_unit_test(test_pages_must_fit_every_ranks_slabs),
        cmocka_unit_test(test_warnings),
        cmocka_unit_test(test_sessions_do_not_choose_slices),
        cmocka_unit_test(test_memory_is_that_of_the_slices),
        cmocka_unit_test(test_tensors_are_checked),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
