/*
 * test_worker.c - the worker's promises one by one: what fails alone, what is refused, what is shared and copied.
 *
 * Goal:   each rule of worker.h and control.h that random histories reach only by luck.
 * Method: the rig where results matter; a backend that fails on demand where errors do.
 */
#include "tests/support/test.h"
#include "tests/support/worker_rig.h"

#include <string.h>

#define ARENA_BYTES ((size_t)4 << 20)

static fv_model_spec_t make_spec(void)
{
    return (fv_model_spec_t){.name = "unit",
                             .n_layers = FV_RIG_LAYERS,
                             .n_q_heads = 4,
                             .n_kv_heads = 2,
                             .head_dim_qk = 16,
                             .head_dim_v = 16,
                             .kv_dtype = FV_DTYPE_F32,
                             .n_policies = 1};
}

static uint64_t bytes_free(const fv_rig_t *rig)
{
    fv_ctl_memory_t memory;

    fv_worker_memory(rig->workers[0], &memory);
    return memory.kv_bytes_free;
}

/* One decode item of a single-rank session, straight to the worker; the tensors are zeros. */
static fv_status_t
step_raw(fv_rig_t *rig, const fv_ctl_item_t *items, size_t n, fv_error_t *out_errors)
{
    static float zeros[4096];
    static float out[4][4096];
    fv_step_io_t io[4];
    fv_ctl_done_t done;

    for (size_t i = 0; i < n; i++) {
        io[i] = (fv_step_io_t){.q = zeros,
                               .k = zeros,
                               .v = zeros,
                               .q_token_bytes = 256,
                               .k_token_bytes = 128,
                               .v_token_bytes = 128,
                               .out = out[i],
                               .out_token_bytes = 256};
    }
    return fv_worker_step(rig->workers[0], items, io, n, &done, out_errors);
}

static fv_ctl_item_t append_at(uint32_t slot, uint64_t position)
{
    return (fv_ctl_item_t){.session_slot = slot,
                           .position = position,
                           .kv_end = position + 1U,
                           .n_tokens = 1,
                           .dtype = FV_DTYPE_F32,
                           .flags = FV_ITEM_CAUSAL | FV_ITEM_APPEND};
}

/* ------------------------------------------------------------------ forks */

static void test_a_fork_shares_until_one_appends(void **state)
{
    static fv_rig_t rig;
    fv_model_spec_t spec = make_spec();
    uint64_t page = fv_model_page_bytes(&spec);

    (void)state;
    fv_rig_create(&rig, 1, ARENA_BYTES, NULL, 1);
    (void)fv_rig_model(&rig, &spec);
    fv_rig_open(&rig, 0, 0, 1, 1, 64);
    assert_int_equal(fv_rig_append(&rig, 0, 0, 100), FV_OK);
    uint64_t before = bytes_free(&rig);
    fv_rig_fork(&rig, 1, 0, UINT64_MAX);
    assert_int_equal(bytes_free(&rig), before); /* nothing copied */
    assert_int_equal(fv_rig_append(&rig, 1, 0, 1), FV_OK);
    assert_int_equal(bytes_free(&rig), before - 2U * page); /* the partial page, two heads */
    assert_int_equal(fv_rig_append(&rig, 0, 0, 1), FV_OK);
    assert_int_equal(bytes_free(&rig),
                     before - 2U * page); /* the parent has the old one alone now */
    fv_rig_fork(&rig, 2, 0, 64);
    assert_int_equal(fv_rig_append(&rig, 2, 0, 1), FV_OK); /* at a page border nothing is copied */
    assert_int_equal(bytes_free(&rig), before - 4U * page);
    fv_rig_destroy(&rig);
}

/* Parent and child append into their shared page in one step: the copy must come before the write. */
static void test_both_sides_of_a_fork_in_one_step(void **state)
{
    static fv_rig_t rig;
    fv_model_spec_t spec = make_spec();

    (void)state;
    fv_rig_create(&rig, 1, ARENA_BYTES, NULL, 2);
    (void)fv_rig_model(&rig, &spec);
    fv_rig_open(&rig, 0, 0, 1, 1, 64);
    assert_int_equal(fv_rig_append(&rig, 0, 0, 100), FV_OK);
    fv_rig_fork(&rig, 1, 0, 80); /* shorter: its next token lies inside what the parent reads */
    fv_rig_item_t items[2] = {
        {.session = 0,
         .position = 100,
         .kv_end = 101,
         .n_tokens = 1,
         .dtype = FV_DTYPE_F32,
         .flags = FV_ITEM_CAUSAL | FV_ITEM_APPEND},
        {.session = 1,
         .position = 80,
         .kv_end = 90,
         .n_tokens = 10,
         .dtype = FV_DTYPE_F32,
         .flags = FV_ITEM_CAUSAL | FV_ITEM_APPEND},
    };
    fv_rig_step(&rig, items, 2);
    assert_int_equal(fv_rig_append(&rig, 0, 0, 3), FV_OK);
    assert_int_equal(fv_rig_append(&rig, 1, 0, 3), FV_OK);
    fv_rig_destroy(&rig);
}

/* ------------------------------------------------------------------ refusals */

static void test_items_that_fail_alone(void **state)
{
    static fv_rig_t rig;
    fv_model_spec_t spec = make_spec();
    fv_error_t errors[4];

    (void)state;
    fv_rig_create(&rig, 1, ARENA_BYTES, NULL, 3);
    (void)fv_rig_model(&rig, &spec);
    for (uint32_t s = 0; s < 4U; s++) {
        fv_rig_open(&rig, s, 0, 1, 1, 64);
    }
    fv_ctl_item_t items[4] = {append_at(0, 0), append_at(1, 5), append_at(0, 0), append_at(3, 0)};
    assert_int_equal(step_raw(&rig, items, 4, errors), FV_OK);
    assert_int_equal(errors[0].status, FV_OK);
    assert_int_equal(errors[1].status, FV_ERR_PROTOCOL);
    assert_string_equal(errors[1].text, "step: append at position 5, expected 0");
    assert_int_equal(errors[2].status, FV_ERR_PROTOCOL);
    assert_string_equal(errors[2].text, "step: session slot 0, layer 0 comes twice");
    assert_int_equal(errors[3].status, FV_OK);

    items[0] = append_at(0, 0); /* behind: a replay must not append */
    items[1] = append_at(1, 0);
    items[1].kv_end = 2; /* not what this append makes */
    items[2] = append_at(3, 1);
    items[2].flags = FV_ITEM_CAUSAL; /* a query of a token that does not exist */
    assert_int_equal(step_raw(&rig, items, 3, errors), FV_OK);
    assert_string_equal(errors[0].text, "step: append at position 0, expected 1");
    assert_string_equal(errors[1].text, "step: append with kv_end 2, expected 1");
    assert_string_equal(errors[2].text, "step: kv_end given 2, this rank has 1 tokens");
    assert_int_equal(fv_worker_session_pages(rig.workers[0], 1), 0);
    fv_rig_destroy(&rig);
}

static void test_steps_that_are_refused_whole(void **state)
{
    static fv_rig_t rig;
    fv_model_spec_t spec = make_spec();
    fv_error_t errors[4];

    (void)state;
    fv_rig_create(&rig, 1, ARENA_BYTES, NULL, 4);
    (void)fv_rig_model(&rig, &spec);
    fv_rig_open(&rig, 0, 0, 1, 1, 64);
    fv_ctl_item_t bad[5] = {append_at(7, 0), append_at(0, 0), append_at(0, 0), append_at(0, 0),
                            append_at(0, (uint64_t)1 << 60)};
    bad[1].layer = FV_RIG_LAYERS;
    bad[2].dtype = 9;
    bad[3].n_tokens = 0;
    for (size_t i = 0; i < FV_COUNT(bad); i++) {
        assert_int_equal(step_raw(&rig, &bad[i], 1, errors), FV_ERR_PROTOCOL);
    }
    assert_int_equal(step_raw(&rig, &(fv_ctl_item_t){0}, 0, errors), FV_OK); /* an empty step */
    assert_int_equal(fv_rig_append(&rig, 0, 0, 5), FV_OK); /* the worker still works */
    fv_rig_destroy(&rig);
}

static void test_control_messages_that_are_refused(void **state)
{
    static fv_rig_t rig;
    fv_model_spec_t spec = make_spec();
    fv_ctl_model_t model = {.model_slot = 1, .spec = spec};

    (void)state;
    fv_rig_create(&rig, 2, ARENA_BYTES, NULL, 5);
    (void)fv_rig_model(&rig, &spec);
    fv_worker_t *w = rig.workers[0];
    model.spec.head_dim_qk = 17;
    assert_int_equal(fv_worker_model(w, &model), FV_ERR_INVALID_ARG);
    model.model_slot = FV_MODELS_MAX;
    assert_int_equal(fv_worker_model(w, &model), FV_ERR_PROTOCOL);
    const fv_placement_t good = {
        .n_head_parts = 1, .n_ctx_parts = 2, .shard_tokens = 64, .ranks = {1, 0}};
    fv_ctl_open_t opens[8];
    for (size_t i = 0; i < FV_COUNT(opens); i++) {
        opens[i] = (fv_ctl_open_t){.session_slot = 3, .placement = good};
    }
    opens[0].model_slot = 1;
    opens[1].placement.n_ctx_parts = 0;
    opens[2].placement.n_head_parts = 3; /* of two KV heads */
    opens[3].placement.n_ctx_parts = FV_PLACEMENT_RANKS_MAX + 1;
    opens[4].placement.shard_tokens = 65;
    opens[5].placement.ranks[1] = 2; /* of two ranks */
    opens[6].placement.ranks[1] = 1; /* twice */
    opens[7].session_slot = UINT32_MAX;
    for (size_t i = 0; i < FV_COUNT(opens); i++) {
        assert_int_equal(fv_worker_open(w, &opens[i]), FV_ERR_PROTOCOL);
    }
    fv_rig_open(&rig, 3, 0, 1, 2, 64);
    opens[0] = (fv_ctl_open_t){.session_slot = 3, .placement = good};
    assert_int_equal(fv_worker_open(w, &opens[0]), FV_ERR_PROTOCOL); /* in use */
    assert_int_equal(fv_worker_fork(w, &(fv_ctl_fork_t){.session_slot = 4, .parent_slot = 9}),
                     FV_ERR_PROTOCOL);
    assert_int_equal(fv_worker_fork(w, &(fv_ctl_fork_t){.session_slot = 3, .parent_slot = 3}),
                     FV_ERR_PROTOCOL);
    assert_int_equal(fv_worker_truncate(w, &(fv_ctl_truncate_t){.session_slot = 3, .layer = 2}),
                     FV_ERR_PROTOCOL);
    assert_int_equal(fv_worker_close(w, &(fv_ctl_close_t){.session_slot = 4}), FV_ERR_PROTOCOL);
    fv_rig_destroy(&rig);
}

static void test_packed_sizes_must_match(void **state)
{
    static fv_rig_t rig;
    fv_model_spec_t spec = make_spec();
    fv_ctl_item_t item = append_at(0, 0);
    fv_ctl_step_t step = {.n_items = 1, .in_bytes = 512, .out_bytes = 320};
    fv_ctl_done_t done;
    fv_error_t error;
    _Alignas(FV_STEP_ALIGN) static uint8_t in[1024];
    _Alignas(FV_STEP_ALIGN) static uint8_t out[1024];

    (void)state;
    fv_rig_create(&rig, 1, ARENA_BYTES, NULL, 6);
    (void)fv_rig_model(&rig, &spec);
    fv_rig_open(&rig, 0, 0, 1, 1, 64);
    item.flags |= FV_ITEM_WANT_LSE; /* q 256 + k 128 + v 128 bytes in; o 256 + lse 16 -> 64 out */
    step.in_bytes = 511;
    assert_int_equal(fv_worker_step_packed(rig.workers[0], &step, &item, in, out, &done, &error),
                     FV_ERR_PROTOCOL);
    step.in_bytes = 512;
    step.out_bytes = 256;
    assert_int_equal(fv_worker_step_packed(rig.workers[0], &step, &item, in, out, &done, &error),
                     FV_ERR_PROTOCOL);
    step.out_bytes = 320;
    assert_int_equal(fv_worker_step_packed(rig.workers[0], &step, &item, in, out, &done, &error),
                     FV_OK);
    assert_int_equal(error.status, FV_OK);
    fv_rig_destroy(&rig);
}

/* ------------------------------------------------------------------ memory */

static void test_a_full_pool_names_its_numbers(void **state)
{
    static fv_rig_t rig;
    fv_model_spec_t spec = make_spec(); /* a page is 8 KiB, a token of one layer needs two */
    fv_error_t errors[4];
    fv_ctl_memory_t memory;

    (void)state;
    fv_rig_create(&rig, 1, (size_t)128 << 10, NULL, 7); /* 16 pages */
    (void)fv_rig_model(&rig, &spec);
    fv_rig_open(&rig, 0, 0, 1, 1, 64);
    fv_rig_open(&rig, 1, 0, 1, 1, 64);
    assert_int_equal(fv_rig_append(&rig, 0, 0, 64U * 7U), FV_OK); /* 14 pages */
    fv_worker_memory(rig.workers[0], &memory);
    assert_int_equal(memory.n_slabs_free, 0);
    assert_int_equal(memory.n_pages_free[0], 2);
    assert_int_equal(memory.n_pages_free[1], 0);
    fv_ctl_item_t items[2] = {append_at(0, 448), append_at(1, 0)};
    assert_int_equal(step_raw(&rig, items, 2, errors), FV_OK);
    assert_int_equal(errors[0].status, FV_OK); /* takes the last two */
    assert_int_equal(errors[1].status, FV_ERR_EXHAUSTED);
    assert_string_equal(errors[1].text, "KV memory: 16384 bytes needed, 0 free");
    assert_int_equal(fv_worker_session_pages(rig.workers[0], 1), 0);
    fv_rig_destroy(&rig);
}

static void test_a_session_elsewhere_holds_nothing(void **state)
{
    static fv_rig_t rig;
    fv_model_spec_t spec = make_spec();
    fv_ctl_open_t open = {
        .session_slot = 0,
        .placement = {.n_head_parts = 1, .n_ctx_parts = 1, .shard_tokens = 64, .ranks = {1}}};

    (void)state;
    fv_rig_create(&rig, 2, ARENA_BYTES, NULL, 8);
    (void)fv_rig_model(&rig, &spec);
    fv_worker_t *w = rig.workers[0];
    assert_int_equal(fv_worker_open(w, &open), FV_OK);
    assert_int_equal(fv_worker_fork(w, &(fv_ctl_fork_t){.session_slot = 1, .at_position = 9}),
                     FV_OK);
    assert_int_equal(fv_worker_truncate(w, &(fv_ctl_truncate_t){.session_slot = 1, .layer = 0}),
                     FV_OK);
    fv_error_t error;
    fv_ctl_item_t item = append_at(1, 0);
    assert_int_equal(step_raw(&rig, &item, 1, &error), FV_ERR_PROTOCOL); /* no share here */
    assert_int_equal(fv_worker_session_pages(w, 0), 0);
    assert_int_equal(fv_worker_close(w, &(fv_ctl_close_t){.session_slot = 0}), FV_OK);
    assert_int_equal(fv_worker_close(w, &(fv_ctl_close_t){.session_slot = 1}), FV_OK);
    fv_rig_destroy(&rig);
}

/* ------------------------------------------------------------------ failures that end a worker */

static bool attend_fails;

static fv_status_t attend_or_fail(fv_backend_t *backend, const fv_attn_item_t *items, size_t n)
{
    if (attend_fails) {
        return fv_fail(FV_ERR_INTERNAL, "the device is on fire");
    }
    return fv_backend_cpu.attend(backend, items, n);
}

static void test_a_backend_failure_ends_the_worker(void **state)
{
    static fv_rig_t rig;
    fv_model_spec_t spec = make_spec();
    fv_backend_ops_t ops = fv_backend_cpu;
    fv_error_t error;

    (void)state;
    ops.attend = attend_or_fail;
    attend_fails = false;
    fv_rig_create(&rig, 1, ARENA_BYTES, &ops, 9);
    (void)fv_rig_model(&rig, &spec);
    fv_rig_open(&rig, 0, 0, 1, 1, 64);
    assert_int_equal(fv_rig_append(&rig, 0, 0, 64), FV_OK);
    attend_fails = true;
    fv_ctl_item_t item = append_at(0, 64);
    assert_int_equal(step_raw(&rig, &item, 1, &error), FV_ERR_INTERNAL);
    assert_string_equal(fv_error_context(), "the device is on fire");
    fv_rig_check_pages(&rig); /* the pages of the token that did not come are back */
    attend_fails = false;
    assert_int_equal(step_raw(&rig, &item, 1, &error), FV_ERR_INTERNAL);
    assert_string_equal(fv_error_context(),
                        "rank 0 failed in an earlier step and must be restarted");
    assert_int_equal(fv_worker_open(rig.workers[0], &(fv_ctl_open_t){.session_slot = 5}),
                     FV_ERR_INTERNAL);
    fv_worker_destroy(rig.workers[0]);
    fv_local_hub_destroy(rig.hub);
    for (uint32_t l = 0; l < FV_RIG_LAYERS; l++) {
        free(rig.sessions[0].layers[l].k);
        free(rig.sessions[0].layers[l].v);
    }
}

/* ------------------------------------------------------------------ a backend that does not compute all */

static int32_t refused_part; /* the context part whose fp32 tensors are refused; -1: of none */

static fv_status_t refuse_f32(const fv_backend_t *backend, const fv_attn_item_t *item)
{
    (void)backend;
    if ((item->io_dtype == (int32_t)FV_DTYPE_F32) && (item->shard.part == refused_part)) {
        return fv_fail(FV_ERR_UNIMPLEMENTED, "no fp32 here");
    }
    return FV_OK;
}

/* As such a backend does: one item that it refuses ends the call. */
static fv_status_t attend_no_f32(fv_backend_t *backend, const fv_attn_item_t *items, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        FV_RETURN_IF_ERR(refuse_f32(backend, &items[i]));
    }
    return fv_backend_cpu.attend(backend, items, n);
}

static fv_backend_ops_t ops_without_f32(void)
{
    fv_backend_ops_t ops = fv_backend_cpu;

    ops.attend = attend_no_f32;
    ops.check_attend = refuse_f32;
    refused_part = -1;
    return ops;
}

static void test_a_shape_that_is_not_computed_fails_alone(void **state)
{
    static fv_rig_t rig;
    fv_model_spec_t spec = make_spec();
    fv_backend_ops_t ops = ops_without_f32();
    fv_ctl_item_t items[3] = {append_at(0, 64), append_at(1, 64), append_at(2, 64)};
    fv_error_t errors[3];

    (void)state;
    fv_rig_create(&rig, 1, ARENA_BYTES, &ops, 11);
    (void)fv_rig_model(&rig, &spec);
    for (uint32_t slot = 0; slot < 3U; slot++) {
        fv_rig_open(&rig, slot, 0, 1, 1, 64);
        assert_int_equal(fv_rig_append(&rig, slot, 0, 64), FV_OK);
    }
    uint64_t before = bytes_free(&rig);
    refused_part = 0;
    items[0].dtype = FV_DTYPE_BF16;
    items[2].dtype = FV_DTYPE_F16;
    assert_int_equal(step_raw(&rig, items, 3, errors), FV_OK);
    assert_int_equal(errors[0].status, FV_OK);
    assert_int_equal(errors[1].status, FV_ERR_UNIMPLEMENTED);
    assert_string_equal(errors[1].text, "no fp32 here");
    assert_int_equal(errors[2].status, FV_OK);
    assert_int_equal(bytes_free(&rig), before - 4U * fv_model_page_bytes(&spec)); /* two items' */
    /* the worker goes on: the two others are a token further, this one is where it was */
    items[0] = append_at(0, 65);
    items[2] = append_at(2, 65);
    refused_part = -1;
    assert_int_equal(step_raw(&rig, items, 3, errors), FV_OK);
    for (size_t i = 0; i < 3U; i++) {
        assert_int_equal(errors[i].status, FV_OK);
        assert_int_equal(
            fv_worker_truncate(rig.workers[0],
                               &(fv_ctl_truncate_t){.session_slot = (uint32_t)i, .position = 64}),
            FV_OK);
    }
    assert_int_equal(fv_rig_append(&rig, 1, 0, 3), FV_OK); /* and the rig finds what it knows */
    fv_rig_destroy(&rig);
}

/* Ranks may differ: the others' append is taken back, and all have freed the same pages. */
static void test_a_shape_that_one_rank_does_not_compute(void **state)
{
    static fv_rig_t rig;
    fv_model_spec_t spec = make_spec();
    fv_backend_ops_t ops = ops_without_f32();

    (void)state;
    spec.policies[0] = (fv_policy_t){.kind = FV_POLICY_WINDOW, .window_tokens = 64};
    fv_rig_create(&rig, 2, ARENA_BYTES, &ops, 12);
    (void)fv_rig_model(&rig, &spec);
    fv_rig_open(&rig, 0, 0, 1, 2, 64);
    assert_int_equal(fv_rig_append(&rig, 0, 0, 512), FV_OK);
    for (refused_part = 0; refused_part < 2; refused_part++) {
        assert_int_equal(fv_rig_append(&rig, 0, 0, 70), FV_ERR_UNIMPLEMENTED); /* checks pages */
    }
    refused_part = -1;
    assert_int_equal(fv_rig_append(&rig, 0, 0, 70), FV_OK);
    assert_int_equal(fv_rig_append(&rig, 0, 0, 1), FV_OK);
    fv_rig_destroy(&rig);
}

static fv_status_t lost(void *ctx,
                        const fv_exchange_message_t *sends,
                        size_t n_sends,
                        const fv_exchange_message_t *recvs,
                        size_t n_recvs,
                        uint32_t deadline_ms)
{
    (void)ctx;
    (void)sends;
    (void)recvs;
    assert_int_equal(n_sends, 1);
    assert_int_equal(n_recvs, 1);
    assert_int_equal(deadline_ms, 77);
    return fv_fail(FV_ERR_RANK_LOST, "gone");
}

/* The step is not done: the length stays, so that a retry elsewhere finds what it expects. */
static void test_a_lost_exchange_leaves_the_length(void **state)
{
    const fv_exchange_ops_t ops = {.name = "lost", .all_to_all = lost};
    fv_worker_config_t config = {.n_ranks = 2,
                                 .backend = &fv_backend_cpu,
                                 .backend_config = {.n_threads = 1, .kv_arena_bytes = ARENA_BYTES},
                                 .exchange = &ops,
                                 .step_deadline_ms = 77};
    fv_ctl_model_t model = {.spec = make_spec()};
    fv_ctl_open_t open = {
        .placement = {.n_head_parts = 1, .n_ctx_parts = 2, .shard_tokens = 64, .ranks = {0, 1}}};
    static fv_rig_t rig; /* large */
    fv_error_t error;

    (void)state;
    assert_int_equal(fv_worker_create(&config, &rig.workers[0]), FV_OK);
    assert_int_equal(fv_worker_model(rig.workers[0], &model), FV_OK);
    assert_int_equal(fv_worker_open(rig.workers[0], &open), FV_OK);
    for (uint64_t t = 0; t < 64U; t++) { /* alone until the context reaches part 1 */
        fv_ctl_item_t item = append_at(0, t);

        assert_int_equal(step_raw(&rig, &item, 1, &error), FV_OK);
    }
    fv_ctl_item_t item = append_at(0, 64);
    assert_int_equal(step_raw(&rig, &item, 1, &error), FV_ERR_RANK_LOST);
    assert_int_equal(step_raw(&rig, &item, 1, &error), FV_ERR_RANK_LOST);
    assert_int_equal(fv_worker_session_pages(rig.workers[0], 0), 2);
    fv_worker_destroy(rig.workers[0]);
}

static void test_hello_describes_the_rank(void **state)
{
    static fv_rig_t rig;
    fv_ctl_hello_t hello;

    (void)state;
    fv_rig_create(&rig, 2, ARENA_BYTES, NULL, 10);
    fv_worker_hello(rig.workers[1], &hello);
    assert_int_equal(hello.rank, 1);
    assert_int_equal(hello.n_threads, 1);
    assert_string_equal(hello.backend, "cpu");
    assert_true(strlen(hello.device) > 0U);
    assert_int_equal(hello.memory.kv_bytes_total, ARENA_BYTES);
    assert_int_equal(hello.memory.kv_bytes_free, ARENA_BYTES);
    fv_rig_destroy(&rig);

    fv_worker_t *worker = NULL;
    fv_worker_config_t config = {.n_ranks = 2, .backend = &fv_backend_cpu};
    assert_int_equal(fv_worker_create(&config, &worker), FV_ERR_INVALID_ARG); /* no exchange */
    config.n_ranks = 1;                                                       /* no memory */
    assert_int_equal(fv_worker_create(&config, &worker), FV_ERR_INVALID_ARG);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_fork_shares_until_one_appends),
        cmocka_unit_test(test_both_sides_of_a_fork_in_one_step),
        cmocka_unit_test(test_items_that_fail_alone),
        cmocka_unit_test(test_steps_that_are_refused_whole),
        cmocka_unit_test(test_control_messages_that_are_refused),
        cmocka_unit_test(test_packed_sizes_must_match),
        cmocka_unit_test(test_a_full_pool_names_its_numbers),
        cmocka_unit_test(test_a_session_elsewhere_holds_nothing),
        cmocka_unit_test(test_a_backend_failure_ends_the_worker),
        cmocka_unit_test(test_a_shape_that_is_not_computed_fails_alone),
        cmocka_unit_test(test_a_shape_that_one_rank_does_not_compute),
        cmocka_unit_test(test_a_lost_exchange_leaves_the_length),
        cmocka_unit_test(test_hello_describes_the_rank),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
