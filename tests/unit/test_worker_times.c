/*
 * test_worker_times.c - the step waits with the configured limits, and tells the device's times where it knows them.
 *
 * Method: the null backend with a finish() of its own, which notes its limits and says what the test wants.
 */
#include "tests/support/test.h"
#include "worker/worker.h"

#define COMPUTE_US  1234567U /* no host clock says this of a step that does nothing */
#define DEADLINE_MS 4321U

static fv_wait_limits_t seen;
static fv_device_times_t told;
static fv_status_t outcome;

static fv_status_t
fake_finish(fv_backend_t *backend, const fv_wait_limits_t *limits, fv_device_times_t *out_times)
{
    (void)backend;
    assert_non_null(limits);
    seen = *limits;
    if (out_times != NULL) {
        *out_times = told;
    }
    return (outcome == FV_OK) ? FV_OK : fv_fail(outcome, "as the test wants");
}

static fv_status_t one_step(fv_worker_t *worker, uint64_t position, fv_ctl_done_t *out_done)
{
    static uint8_t tensor[64];
    const fv_ctl_item_t item = {.position = position,
                                .kv_end = position + 1U,
                                .n_tokens = 1,
                                .dtype = FV_DTYPE_F32,
                                .flags = FV_ITEM_CAUSAL | FV_ITEM_APPEND};
    const fv_step_io_t io = {.q = tensor,
                             .k = tensor,
                             .v = tensor,
                             .q_token_bytes = sizeof(tensor),
                             .k_token_bytes = sizeof(tensor),
                             .v_token_bytes = sizeof(tensor),
                             .out = tensor,
                             .out_token_bytes = sizeof(tensor)};
    fv_error_t error;

    return fv_worker_step(worker, &item, &io, 1, out_done, &error);
}

static void test_limits_and_times(void **state)
{
    fv_backend_ops_t ops = fv_backend_null;
    fv_worker_config_t config = {.n_ranks = 1,
                                 .backend = &ops,
                                 .backend_config = {.kv_arena_bytes = (size_t)16 << 20},
                                 .step_deadline_ms = DEADLINE_MS};
    const fv_ctl_model_t model = {.spec = {.name = "times",
                                           .n_layers = 1,
                                           .n_q_heads = 1,
                                           .n_kv_heads = 1,
                                           .head_dim_qk = 16,
                                           .head_dim_v = 16,
                                           .kv_dtype = FV_DTYPE_F32,
                                           .n_policies = 1}};
    const fv_ctl_open_t open = {
        .placement = {.n_head_parts = 1, .n_ctx_parts = 1, .shard_tokens = 64}};
    fv_worker_t *worker = NULL;
    fv_ctl_done_t done;

    (void)state;
    ops.finish = fake_finish;
    assert_int_equal(fv_worker_create(&config, &worker), FV_OK);
    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    assert_int_equal(fv_worker_open(worker, &open), FV_OK);
    told = (fv_device_times_t){.is_known = true, .compute_us = COMPUTE_US};
    assert_int_equal(one_step(worker, 0, &done), FV_OK);
    assert_int_equal(seen.deadline_ms, DEADLINE_MS);
    assert_int_equal(done.compute_us, COMPUTE_US);
    told.is_known = false; /* then the host's clock counts, whatever else is told */
    assert_int_equal(one_step(worker, 1, &done), FV_OK);
    assert_true(done.compute_us < COMPUTE_US);
    outcome = FV_ERR_TIMED_OUT;
    assert_int_equal(one_step(worker, 2, &done), FV_ERR_TIMED_OUT);
    outcome = FV_OK; /* a worker whose device was given up stays broken */
    assert_int_equal(one_step(worker, 2, &done), FV_ERR_TIMED_OUT);
    fv_worker_destroy(worker);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_limits_and_times),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
