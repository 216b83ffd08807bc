/*
 * store_life.c - see store_life.h.
 */
#include "tests/support/store_life.h"

#include "tests/support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char g_dir[64];
fv_store_place_t fv_life_place;
fv_backend_ops_t fv_life_ops;

int fv_life_make_folder(void **state)
{
    (void)state;
    (void)snprintf(g_dir, sizeof(g_dir), "/tmp/fv_store_XXXXXX");
    return ((mkdtemp(g_dir) != NULL) &&
            (fv_store_place_make(g_dir, "unit", 0, 1, &fv_life_place) == FV_OK))
               ? 0
               : -1;
}

int fv_life_remove_folder(void **state)
{
    (void)state;
    (void)rmdir(g_dir); /* empty, if a test did not fail */
    return 0;
}

fv_ctl_model_t fv_life_model(void)
{
    fv_ctl_model_t m = {.spec = {.name = "store",
                                 .n_layers = FV_LIFE_LAYERS,
                                 .n_q_heads = FV_LIFE_HEADS,
                                 .n_kv_heads = FV_LIFE_HEADS,
                                 .head_dim_qk = FV_LIFE_DIM,
                                 .head_dim_v = FV_LIFE_DIM,
                                 .kv_dtype = FV_DTYPE_BF16,
                                 .n_policies = 2}};

    m.spec.policies[1] =
        (fv_policy_t){.kind = FV_POLICY_WINDOW, .window_tokens = 65, .sink_tokens = 1};
    m.spec.layer_policy[1] = 1; /* lets pages die */
    assert_int_equal(fv_model_spec_check(&m.spec), FV_OK);
    return m;
}

fv_worker_t *fv_life_worker(void)
{
    const fv_worker_config_t config = {
        .n_ranks = 1,
        .backend = &fv_life_ops,
        .backend_config = {.kv_arena_bytes = FV_LIFE_ARENA, .n_threads = 1},
        .store = &fv_life_place};
    fv_worker_t *worker = NULL;

    assert_int_equal(fv_worker_create(&config, &worker), FV_OK);
    return worker;
}

static float value_of(uint32_t seed, size_t i)
{
    uint32_t x = (seed * 2654435761U) ^ (uint32_t)(i * 40503U + 17U);

    x ^= x >> 13U;
    x *= 2246822519U;
    x ^= x >> 16U;
    return (float)(int32_t)(x % 2001U) / 1000.0F - 1.0F;
}

/* n tokens at `position`; not an append: a query over what is there. */
fv_status_t fv_life_try_run(fv_worker_t *worker,
                            uint32_t slot,
                            uint32_t layer,
                            uint64_t position,
                            uint32_t n,
                            bool is_append,
                            float *out)
{
    static float q[256 * FV_LIFE_HEADS * FV_LIFE_DIM], k[256 * FV_LIFE_HEADS * FV_LIFE_DIM],
        v[256 * FV_LIFE_HEADS * FV_LIFE_DIM];
    const fv_ctl_item_t item = {.session_slot = slot,
                                .layer = layer,
                                .position = position,
                                .kv_end = position + n,
                                .n_tokens = n,
                                .dtype = FV_DTYPE_F32,
                                .flags = FV_ITEM_CAUSAL | (is_append ? FV_ITEM_APPEND : 0)};
    const size_t row = FV_LIFE_HEADS * FV_LIFE_DIM * sizeof(float);
    const fv_step_io_t io = {.q = q,
                             .k = k,
                             .v = v,
                             .q_token_bytes = row,
                             .k_token_bytes = row,
                             .v_token_bytes = row,
                             .out = out,
                             .out_token_bytes = row};
    fv_ctl_done_t done;
    fv_error_t error;

    for (size_t i = 0; i < (size_t)n * FV_LIFE_HEADS * FV_LIFE_DIM; i++) {
        q[i] = value_of(1U + layer, i + (size_t)position * FV_LIFE_HEADS * FV_LIFE_DIM);
        k[i] = value_of(11U + slot, i + (size_t)position * FV_LIFE_HEADS * FV_LIFE_DIM);
        v[i] = value_of(21U + slot, i + (size_t)position * FV_LIFE_HEADS * FV_LIFE_DIM);
    }
    fv_status_t status = fv_worker_step(worker, &item, &io, 1, &done, &error);
    return (status == FV_OK) ? (fv_status_t)error.status : status;
}

void fv_life_run(fv_worker_t *worker,
                 uint32_t slot,
                 uint32_t layer,
                 uint64_t position,
                 uint32_t n,
                 bool is_append,
                 float *out)
{
    assert_int_equal(fv_life_try_run(worker, slot, layer, position, n, is_append, out), FV_OK);
}

/* The last one is closed. */
const uint64_t fv_life_lengths[FV_LIFE_SESSIONS + 1U][FV_LIFE_LAYERS] = {{150, 203},
                                                                         {80, 140},
                                                                         {90, 40},
                                                                         {100, 0}};

fv_session_id_t fv_life_id(uint32_t number)
{
    fv_session_id_t id = {{0}};

    for (size_t i = 0; i < sizeof(id.bytes); i++) {
        id.bytes[i] = (uint8_t)(number * 31U + i * 7U + 1U);
    }
    return id;
}

fv_ctl_open_t fv_life_open(uint32_t slot)
{
    return (fv_ctl_open_t){.session_slot = slot,
                           .id = fv_life_id(slot),
                           .placement = {.n_head_parts = 1, .n_ctx_parts = 1, .shard_tokens = 64}};
}

/* Session 0; 1, a fork of it that went on alone; 2, one that was cut. And one that was closed. */
void fv_life_play(fv_worker_t *worker)
{
    static float out[256 * FV_LIFE_HEADS * FV_LIFE_DIM];
    const fv_ctl_model_t model = fv_life_model();
    const fv_ctl_open_t open0 = fv_life_open(0);
    const fv_ctl_open_t open2 = fv_life_open(2);
    const fv_ctl_open_t open3 = fv_life_open(3);
    const fv_ctl_fork_t fork1 = {
        .session_slot = 1, .id = fv_life_id(1), .parent_slot = 0, .at_position = UINT64_MAX};
    const fv_ctl_truncate_t cut = {.session_slot = 2, .layer = 0, .position = 90};
    const fv_ctl_close_t close3 = {.session_slot = 3};

    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    assert_int_equal(fv_worker_open(worker, &open0), FV_OK);
    fv_life_run(worker, 0, 0, 0, 70, true, out);
    fv_life_run(worker, 0, 1, 0, 139, true, out);
    assert_int_equal(fv_worker_fork(worker, &fork1), FV_OK);
    fv_life_run(worker, 0, 0, 70, 80, true, out); /* copies the shared page */
    fv_life_run(worker, 1, 0, 70, 10, true, out);
    fv_life_run(worker, 0, 1, 139, 64, true, out); /* pages die */
    fv_life_run(worker, 1, 1, 139, 1, true, out);
    assert_int_equal(fv_worker_open(worker, &open3), FV_OK);
    fv_life_run(worker, 3, 0, 0, 100, true, out);
    assert_int_equal(fv_worker_open(worker, &open2), FV_OK);
    fv_life_run(worker, 2, 0, 0, 130, true, out);
    fv_life_run(worker, 2, 1, 0, 40, true, out);
    assert_int_equal(fv_worker_truncate(worker, &cut), FV_OK);
    assert_int_equal(fv_worker_close(worker, &close3), FV_OK);
}

/* Answers of the last token of every session and layer. */
void fv_life_query(fv_worker_t *worker,
                   uint32_t slot,
                   float out[FV_LIFE_LAYERS][FV_LIFE_HEADS * FV_LIFE_DIM])
{
    for (uint32_t layer = 0; layer < FV_LIFE_LAYERS; layer++) {
        fv_life_run(worker, slot, layer, fv_life_lengths[slot][layer] - 1U, 1, false, out[layer]);
    }
}

fv_status_t fv_life_keep_as(fv_worker_t *worker,
                            uint32_t slot,
                            fv_session_id_t id,
                            const uint64_t lengths[FV_LIFE_LAYERS])
{
    const fv_ctl_keep_t message = {.session_slot = slot,
                                   .id = id,
                                   .n_layers = FV_LIFE_LAYERS,
                                   .placement = fv_life_open(slot).placement};
    fv_ctl_keep_layer_t layers[FV_LIFE_LAYERS];
    uint64_t floors[FV_LIFE_LAYERS];

    for (uint32_t i = 0; i < FV_LIFE_LAYERS; i++) {
        layers[i].n_tokens = lengths[i];
    }
    return fv_worker_keep(worker, &message, layers, floors);
}

fv_status_t
fv_life_keep_lengths(fv_worker_t *worker, uint32_t slot, const uint64_t lengths[FV_LIFE_LAYERS])
{
    return fv_life_keep_as(worker, slot, fv_life_id(slot), lengths);
}

fv_status_t fv_life_keep(fv_worker_t *worker, uint32_t slot, uint64_t missing)
{
    const uint64_t lengths[FV_LIFE_LAYERS] = {fv_life_lengths[slot][0] + missing,
                                              fv_life_lengths[slot][1] + missing};

    return fv_life_keep_lengths(worker, slot, lengths);
}
