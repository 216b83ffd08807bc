/*
 * test_exchange_cuda.c - partial states between the GPUs of one host.
 *
 * Goal:   several GPUs together equal the fp64 oracle whatever the placement, of heads, S2, latents and slices, directly through windows, through windows
 *         too small for some messages, and through send and receive alone; the same step gives the same bits a thousand
 *         times, with nothing but the exchange to keep ranks in step; a peer that does not come ends a step in time.
 * Method: the worker rig, a GPU and an NCCL rank a thread (tests/support/worker_rig.h). Two GPUs at least, else skipped.
 *         What only separate processes show is tested through fovead (docs/gpu.md).
 */
#include "common/clock.h"
#include "tests/support/step_pack.h"
#include "tests/support/test.h"
#include "tests/support/worker_rig.h"

#include <cuda_runtime_api.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ARENA_BYTES ((size_t)256 << 20)
#define SMALL_ARENA ((size_t)3 << 20)
#define N_RELAUNCH  1000
#define SILENCE_MS  1500U

static uint64_t seed;
static uint32_t n_gpus;

/* ------------------------------------------------------------------ the exchanges of all ranks */

typedef struct world {
    uint32_t n_ranks;
    fv_exchange_nccl_config_t config;
    fv_exchange_nccl_t *exchanges[FV_RIG_RANKS];
    fv_status_t status[FV_RIG_RANKS];
} world_t;

typedef struct seat {
    world_t *world;
    uint32_t rank;
} seat_t;

static void *open_rank(void *arg)
{
    const seat_t *seat = arg;
    fv_exchange_nccl_config_t config = seat->world->config;

    config.rank = seat->rank;
    config.device = (int32_t)seat->rank;
    seat->world->status[seat->rank] =
        fv_exchange_nccl_create(&config, &seat->world->exchanges[seat->rank]);
    if (seat->world->status[seat->rank] != FV_OK) {
        print_error("rank %u: %s\n", seat->rank, fv_error_context());
    }
    return NULL;
}

/* `body` on a thread for each rank. */
static void on_all_ranks(world_t *world, void *(*body)(void *))
{
    pthread_t threads[FV_RIG_RANKS];
    seat_t seats[FV_RIG_RANKS];

    for (uint32_t r = 0; r < world->n_ranks; r++) {
        seats[r] = (seat_t){.world = world, .rank = r};
        assert_int_equal(pthread_create(&threads[r], NULL, body, &seats[r]), 0);
    }
    for (uint32_t r = 0; r < world->n_ranks; r++) {
        assert_int_equal(pthread_join(threads[r], NULL), 0);
    }
}

static void
open_world(world_t *world, size_t window_bytes, bool is_collective, uint32_t deadline_ms)
{
    char text[160];

    memset(world, 0, sizeof(*world));
    world->n_ranks = n_gpus;
    world->config = (fv_exchange_nccl_config_t){.n_ranks = n_gpus,
                                                .window_bytes = window_bytes,
                                                .deadline_ms = deadline_ms,
                                                .is_collective = is_collective};
    assert_int_equal(fv_exchange_nccl_id(world->config.id), FV_OK);
    on_all_ranks(world, open_rank);
    for (uint32_t r = 0; r < n_gpus; r++) {
        assert_int_equal(world->status[r], FV_OK);
    }
    fv_exchange_nccl_describe(world->exchanges[0], text, sizeof(text));
    print_message("%s\n", text);
}

static void close_world(world_t *world)
{
    for (uint32_t r = 0; r < world->n_ranks; r++) {
        fv_exchange_nccl_destroy(world->exchanges[r]);
    }
}

static void *ctx_of(void *arg, uint32_t rank)
{
    return ((world_t *)arg)->exchanges[rank];
}

static void enter(void *arg, uint32_t rank)
{
    (void)arg;
    (void)cudaSetDevice((int)rank);
}

static fv_rig_door_t door_of(world_t *world)
{
    return (fv_rig_door_t){
        .exchange = &fv_exchange_nccl_ops, .ctx = ctx_of, .enter = enter, .arg = world};
}

/* ------------------------------------------------------------------ against the oracle */

static fv_model_spec_t fixed_spec(int32_t dtype)
{
    fv_model_spec_t spec = {
        .name = "fixed",
        .n_layers = FV_RIG_LAYERS,
        .n_q_heads = 16,
        .n_kv_heads = 4,
        .head_dim_qk = 128,
        .head_dim_v = 128,
        .kv_dtype = dtype,
        .n_policies = 2,
        .policies = {{.kind = FV_POLICY_DENSE},
                     {.kind = FV_POLICY_WINDOW, .window_tokens = 70, .sink_tokens = 3}}};

    spec.layer_policy[1] = 1;
    return spec;
}

static void live(size_t window_bytes, bool is_collective, size_t arena_bytes, uint64_t life_seed)
{
    static fv_rig_t rig; /* large */
    world_t world;

    open_world(&world, window_bytes, is_collective, 10000);
    fv_rig_door_t door = door_of(&world);
    fv_rig_create_through(&rig, world.n_ranks, arena_bytes, &fv_backend_cuda, &door, life_seed);
    fv_model_spec_t spec = fixed_spec(FV_DTYPE_BF16);
    (void)fv_rig_model(&rig, &spec);
    spec = fixed_spec(FV_DTYPE_F32);
    (void)fv_rig_model(&rig, &spec);
    spec = fv_rig_random_spec(&rig.random);
    (void)fv_rig_model(&rig, &spec);
    for (uint32_t i = 0; i < 36U; i++) { /* over all ranks; prefill of several sizes, then decode */
        if (i < 6U) {
            fv_rig_open(&rig, i, i % 3U, 1, (uint16_t)world.n_ranks, 64);
        }
        uint32_t n = ((i / 12U) == 0U) ? (1U + i * 37U) : (((i / 12U) == 1U) ? 1U : 200U);
        (void)fv_rig_append(&rig, i % 6U, i / 6U % 2U, n);
    }
    fv_rig_live(&rig, 100);
    assert_true(rig.n_checked > 20U);
    assert_true((rig.n_exhausted > 0U) == (arena_bytes == SMALL_ARENA));
    fv_rig_destroy(&rig);
    close_world(&world);
}

static void test_direct_equals_the_oracle(void **state)
{
    (void)state;
    live(0, false, ARENA_BYTES, seed * 3U);
}

static void test_small_windows_equal_the_oracle(void **state)
{
    (void)state;
    live((size_t)128 << 10, false, ARENA_BYTES, seed * 5U);
}

static void test_send_and_receive_equal_the_oracle(void **state)
{
    (void)state;
    live(0, true, ARENA_BYTES, seed * 7U);
}

static void test_failed_items_send_the_empty_set(void **state)
{
    (void)state;
    live(0, false, SMALL_ARENA, seed * 11U);
    live(0, true, SMALL_ARENA, seed * 13U);
}

/*
 * Latents by heads and by context, in two slices with a softmax each, and S2 layers, all in one life. On a CPU the same
 * life is prop_worker's.
 */
static void live_latents_and_s2(bool is_collective, uint64_t life_seed)
{
    static fv_rig_t rig; /* large */
    world_t world;

    open_world(&world, 0, is_collective, 10000);
    fv_rig_door_t door = door_of(&world);
    fv_rig_create_through(&rig, world.n_ranks, ARENA_BYTES, &fv_backend_cuda, &door, life_seed);
    fv_rig_latents_and_s2(&rig);
    assert_true(rig.n_checked > 50U);
    fv_rig_destroy(&rig);
    close_world(&world);
}

static void test_latents_and_s2_equal_the_oracle(void **state)
{
    (void)state;
    live_latents_and_s2(false, seed * 17U);
    live_latents_and_s2(true, seed * 19U);
}

/* ------------------------------------------------------------------ the same bits, a thousand times */

#define SESSIONS 3

typedef struct relaunch {
    world_t world;
    fv_rig_t *rig;
    fv_ctl_item_t items[SESSIONS];
    fv_step_io_t io[SESSIONS];
    uint64_t n_different[FV_RIG_RANKS];
} relaunch_t;

static relaunch_t relaunch;

/* No barrier between steps: only the exchange keeps this rank from running ahead. */
static void *relaunch_rank(void *arg)
{
    const uint32_t rank = ((const seat_t *)arg)->rank;
    fv_rig_t *rig = relaunch.rig;
    fv_ctl_step_t step = {.n_items = SESSIONS};
    fv_error_t errors[SESSIONS];
    fv_ctl_done_t done;

    enter(NULL, rank);
    for (uint32_t i = 0; i < SESSIONS; i++) {
        fv_item_share_t s;

        (void)fv_item_share(&rig->models[0], &rig->sessions[i].placement, &relaunch.items[i], rank,
                            &s);
        step.in_bytes += fv_share_in_bytes(&s);
        step.out_bytes += fv_share_out_bytes(&s);
    }
    uint8_t *in = aligned_alloc(FV_STEP_ALIGN, step.in_bytes + FV_STEP_ALIGN);
    uint8_t *out = aligned_alloc(FV_STEP_ALIGN, step.out_bytes + FV_STEP_ALIGN);
    uint8_t *first = aligned_alloc(FV_STEP_ALIGN, step.out_bytes + FV_STEP_ALIGN);
    uint8_t *at = in;

    for (uint32_t i = 0; i < SESSIONS; i++) {
        at += fv_pack_input(&rig->models[0], &rig->sessions[i].placement, &relaunch.items[i], rank,
                            &relaunch.io[i], at);
    }
    for (int n = 0; n < N_RELAUNCH; n++) {
        memset(out, 0xff, step.out_bytes);
        if (fv_worker_step_packed(rig->workers[rank], &step, relaunch.items, in, out, &done,
                                  errors) != FV_OK) {
            relaunch.world.status[rank] = FV_ERR_INTERNAL;
            break;
        }
        if (n == 0) {
            memcpy(first, out, step.out_bytes);
        }
        relaunch.n_different[rank] += (memcmp(first, out, step.out_bytes) == 0) ? 0U : 1U;
    }
    free(in);
    free(out);
    free(first);
    return NULL;
}

static void *random_tensor(size_t n)
{
    fv_random_t random = {seed + n};
    void *data = malloc((n + 1U) * sizeof(float));

    assert_non_null(data);
    for (size_t i = 0; i < n; i++) {
        fv_store_element(data, FV_DTYPE_BF16, i, fv_random_unit(&random));
    }
    return data;
}

static void relaunch_with(size_t window_bytes, bool is_collective)
{
    static fv_rig_t rig; /* large */
    fv_model_spec_t spec = fixed_spec(FV_DTYPE_BF16);

    open_world(&relaunch.world, window_bytes, is_collective, 10000);
    fv_rig_door_t door = door_of(&relaunch.world);
    fv_rig_create_through(&rig, n_gpus, ARENA_BYTES, &fv_backend_cuda, &door, seed);
    relaunch.rig = &rig;
    (void)fv_rig_model(&rig, &spec);
    memset(relaunch.n_different, 0, sizeof(relaunch.n_different));
    for (uint32_t i = 0; i < SESSIONS; i++) {
        const uint32_t length = 70U + 400U * i;
        const size_t n_q = (size_t)(spec.n_q_heads * spec.head_dim_qk);

        fv_rig_open(&rig, i, 0, 1, (uint16_t)n_gpus, 64);
        assert_int_equal(fv_rig_append(&rig, i, 0, length), FV_OK);
        relaunch.items[i] = (fv_ctl_item_t){.session_slot = i,
                                            .position = length - 1U,
                                            .kv_end = length,
                                            .n_tokens = 1,
                                            .dtype = FV_DTYPE_BF16,
                                            .flags = FV_ITEM_CAUSAL | FV_ITEM_WANT_LSE};
        relaunch.io[i] = (fv_step_io_t){.q = random_tensor(n_q),
                                        .k = random_tensor(n_q),
                                        .v = random_tensor(n_q),
                                        .q_token_bytes = n_q * 2U,
                                        .k_token_bytes = 4U * 128U * 2U,
                                        .v_token_bytes = 4U * 128U * 2U};
    }
    on_all_ranks(&relaunch.world, relaunch_rank);
    for (uint32_t r = 0; r < n_gpus; r++) {
        assert_int_equal(relaunch.world.status[r], FV_OK);
        assert_int_equal(relaunch.n_different[r], 0);
    }
    for (uint32_t i = 0; i < SESSIONS; i++) {
        free((void *)(uintptr_t)relaunch.io[i].q);
        free((void *)(uintptr_t)relaunch.io[i].k);
        free((void *)(uintptr_t)relaunch.io[i].v);
    }
    fv_rig_destroy(&rig);
    close_world(&relaunch.world);
}

static void test_the_same_bits_every_time(void **state)
{
    (void)state;
    relaunch_with(0, false);
    relaunch_with(0, true);
}

/* ------------------------------------------------------------------ a peer that does not come */

static bool is_gone_now(void *arg)
{
    int *n_asked = arg;

    return ++*n_asked > 3;
}

/* Rank 0 runs a step of the session that rank 1 never hears of. */
static fv_status_t lonely_step(bool is_collective, bool is_gone, int64_t *out_us)
{
    static fv_rig_t rig; /* large; what a lost step may still touch is never freed */
    fv_model_spec_t spec = fixed_spec(FV_DTYPE_BF16);
    world_t *world = malloc(sizeof(*world));
    fv_error_t error;
    fv_ctl_done_t done;
    uint8_t *out = malloc((size_t)1 << 20);
    int n_asked = 0;

    assert_true((world != NULL) && (out != NULL));
    open_world(world, 0, is_collective, SILENCE_MS);
    fv_rig_door_t door = door_of(world);
    fv_rig_create_through(&rig, n_gpus, ARENA_BYTES, &fv_backend_cuda, &door, seed);
    (void)fv_rig_model(&rig, &spec);
    fv_rig_open(&rig, 0, 0, 1, (uint16_t)n_gpus, 64);
    assert_int_equal(fv_rig_append(&rig, 0, 0, 300), FV_OK);
    fv_ctl_item_t item = {.position = 299,
                          .kv_end = 300,
                          .n_tokens = 1,
                          .dtype = FV_DTYPE_BF16,
                          .flags = FV_ITEM_CAUSAL};
    fv_step_io_t io = {.q = random_tensor((size_t)(spec.n_q_heads * spec.head_dim_qk)),
                       .q_token_bytes = (size_t)(spec.n_q_heads * spec.head_dim_qk) * 2U,
                       .out = out,
                       .out_token_bytes = (size_t)(spec.n_q_heads * spec.head_dim_v) * 2U};
    if (is_gone) {
        fv_exchange_nccl_ops.on_poll(world->exchanges[0], is_gone_now, &n_asked);
    }
    enter(NULL, 0);
    int64_t begin_us = fv_clock_us();
    fv_status_t status = fv_worker_step(rig.workers[0], &item, &io, 1, &done, &error);
    *out_us = fv_clock_us() - begin_us;
    print_message("%s after %lld ms: %s\n", fv_status_str(status), (long long)(*out_us / 1000),
                  fv_error_context());
    assert_int_not_equal(fv_worker_step(rig.workers[0], &item, &io, 1, &done, &error), FV_OK);
    begin_us = fv_clock_us();
    for (uint32_t r = 0; r < n_gpus; r++) {
        fv_worker_destroy(rig.workers[r]);
    }
    close_world(world);
    assert_true(fv_clock_us() - begin_us < 20000000);
    return status;
}

static void test_a_silent_peer_ends_the_step(void **state)
{
    int64_t us = 0;

    (void)state;
    assert_int_equal(lonely_step(false, false, &us), FV_ERR_TIMED_OUT);
    assert_true((us >= (int64_t)SILENCE_MS * 1000) && (us < 10000000));
    assert_int_equal(lonely_step(false, true, &us), FV_ERR_RANK_LOST);
    assert_true(us < (int64_t)SILENCE_MS * 1000);
}

static void test_a_silent_peer_ends_a_collective_step(void **state)
{
    int64_t us = 0;

    (void)state;
    assert_int_equal(lonely_step(true, true, &us), FV_ERR_RANK_LOST);
    assert_true(us < 10000000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_direct_equals_the_oracle),
        cmocka_unit_test(test_small_windows_equal_the_oracle),
        cmocka_unit_test(test_send_and_receive_equal_the_oracle),
        cmocka_unit_test(test_failed_items_send_the_empty_set),
        cmocka_unit_test(test_latents_and_s2_equal_the_oracle),
        cmocka_unit_test(test_the_same_bits_every_time),
        cmocka_unit_test(test_a_silent_peer_ends_the_step),
        cmocka_unit_test(test_a_silent_peer_ends_a_collective_step),
    };

    n_gpus = (uint32_t)fv_backend_cuda_count();
    if (n_gpus < 2U) {
        (void)printf("skipped: %u GPUs visible, two are needed\n", n_gpus);
        return 77;
    }
    n_gpus = (n_gpus > FV_RIG_RANKS) ? FV_RIG_RANKS : n_gpus;
    seed = fv_random_seed(1);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
