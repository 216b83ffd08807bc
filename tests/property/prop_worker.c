/*
 * prop_worker.c - whatever the placement and the history, the workers together equal unsharded attention.
 *
 * Goal:   every grid of heads x context over 1 to 7 ranks, parts without a token and heads that do not divide
 *         included; forks, truncations, replays, queries, mixed batches; a full pool spoils nothing.
 * Method: the rig (tests/support/worker_rig.h) compares each step with the fp64 oracle.
 */
#include "tests/support/local_windows.h"
#include "tests/support/test.h"
#include "tests/support/worker_rig.h"

#define ARENA_BYTES ((size_t)24 << 20)

#if defined(FV_PROP_CUDA) /* tests/worker.cmake: what that backend does */
#    define BACKEND (&fv_backend_cuda)
#else
#    define BACKEND NULL
#endif
#define WINDOW_FLAGS \
    (((size_t)2 << 20) - 65536U) /* too small for LL, large enough for every message */

static uint64_t seed;

static fv_model_spec_t fixed_spec(void)
{
    fv_model_spec_t spec = {
        .name = "fixed",
        .n_layers = FV_RIG_LAYERS,
        .n_q_heads = 10,
        .n_kv_heads = 5,
        .head_dim_qk = 24,
        .head_dim_v = 16,
        .kv_dtype = FV_DTYPE_F32,
        .n_policies = 2,
        .policies = {{.kind = FV_POLICY_DENSE},
                     {.kind = FV_POLICY_WINDOW, .window_tokens = 70, .sink_tokens = 3}}};

    spec.layer_policy[1] = 1;
    return spec;
}

/* Shapes that use every rank, and for 7 ranks all others too: more ranks than a session uses change nothing. */
static bool is_wanted(uint32_t n_ranks, uint32_t n_cells)
{
    return (n_cells == n_ranks) || ((n_ranks == 7U) && (n_cells < n_ranks));
}

/* One session of every shape: it begins on part 0 alone and reaches every part, some of them twice. */
static void test_every_placement_shape(void **state)
{
    (void)state;
    for (uint32_t n_ranks = 1; n_ranks <= 7U; n_ranks++) {
        static fv_rig_t rig; /* large */
        fv_model_spec_t spec = fixed_spec();
        uint32_t slot = 0;

        fv_rig_create(&rig, n_ranks, ARENA_BYTES, BACKEND, seed + n_ranks);
        uint32_t model = fv_rig_model(&rig, &spec);
        for (uint16_t hp = 1; hp <= 5U; hp++) {
            for (uint16_t cp = 1; (uint32_t)hp * cp <= n_ranks; cp++) {
                if (!is_wanted(n_ranks, (uint32_t)hp * cp)) {
                    continue;
                }
                fv_rig_open(&rig, slot, model, hp, cp, 64);
                const uint32_t sizes[] = {1, 40, 90, 1, 1, 1, 64U * cp + 10U, 128, 1, 1};
                for (size_t i = 0; i < FV_COUNT(sizes); i++) {
                    assert_int_equal(fv_rig_append(&rig, slot, i % 2U, sizes[i]), FV_OK);
                }
                slot++;
            }
        }
        assert_true((n_ranks == 1U) || (fv_local_hub_messages(rig.hub) > 0U));
        fv_rig_destroy(&rig);
    }
}

/* A LATENT model under one sharding: `groups` slices (0: not by latent), each on n_per_slice ranks; or context parts. */
static void one_latent(uint32_t n_ranks, int32_t groups, uint32_t n_per_slice, uint32_t n_ctx)
{
    fv_rig_t rig;

    fv_rig_create(&rig, n_ranks, ARENA_BYTES, BACKEND,
                  seed * 31U + n_ranks * 100U + (uint32_t)groups * 10U + n_per_slice + n_ctx);
    for (uint32_t slot = 0; slot < 3U; slot++) {
        fv_model_spec_t spec = fv_rig_random_latent(&rig.random, groups);

        spec.n_q_heads += (int32_t)n_per_slice; /* heads enough for each */
        uint32_t model = fv_rig_model(&rig, &spec);
        uint32_t slices = (groups > 0) ? (uint32_t)groups : 1U;
        const uint32_t sizes[] = {1, 40, 90, 1, 1, 64U * n_ctx + 10U, 1, 130, 1};

        fv_rig_open(&rig, slot, model, (uint16_t)(slices * n_per_slice), (uint16_t)n_ctx, 64);
        for (size_t i = 0; i < FV_COUNT(sizes); i++) {
            assert_int_equal(fv_rig_append(&rig, slot, i % 2U, sizes[i]), FV_OK);
        }
        if (!fv_rig_is_readable(&rig, slot, UINT32_MAX, 60, 60) ||
            !fv_rig_is_readable(&rig, slot, UINT32_MAX, 70, 70)) {
            continue; /* its window has let go of what such a cut would need */
        }
        fv_rig_fork(&rig, slot + 3U, slot, 70);
        fv_rig_truncate(&rig, slot, UINT32_MAX, 60);
        assert_int_equal(fv_rig_append(&rig, slot, 0, 3), FV_OK);
        assert_int_equal(fv_rig_append(&rig, slot + 3U, 0, 70), FV_OK);
    }
    if (n_ctx == 1U) { /* neither heads nor slices have anything to say to each other */
        assert_int_equal(fv_local_hub_messages(rig.hub), 0);
    }
    fv_rig_destroy(&rig);
}

/* Exact by heads and context, and by latent equal to the oracle of a softmax for each slice. */
static void test_latent_placements(void **state)
{
    static const uint32_t k_ranks[] = {1, 2, 3, 4, 8};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_ranks); i++) {
        uint32_t n = k_ranks[i];

        one_latent(n, 0, 1, n);
        one_latent(n, 0, n, 1);
        one_latent(n, 1, n, 1);
        for (int32_t groups = 2; groups <= (int32_t)n; groups *= 2) {
            one_latent(n, groups, n / (uint32_t)groups, 1);
        }
    }
    one_latent(6, 0, 2, 3);
}

/*
 * Prompts over all context parts: in one chunk, which covers blocks of every part several times, and in chunks of random size
 * that begin and end anywhere; each row of each chunk equals the oracle, so any chunking equals one shot.
 */
static void test_prompts_over_context_parts(void **state)
{
    (void)state;
    for (uint32_t n_ranks = 1; n_ranks <= 4U; n_ranks++) {
        static fv_rig_t rig; /* large */
        fv_model_spec_t spec = fixed_spec();

        fv_rig_create(&rig, n_ranks, ARENA_BYTES, BACKEND, seed * 37U + n_ranks);
        uint32_t model = fv_rig_model(&rig, &spec);
        for (uint32_t slot = 0; slot < 3U; slot++) {
            uint32_t left = 64U * n_ranks * 2U + 75U;
            fv_rig_open(&rig, slot, model, 1, (uint16_t)n_ranks, 64);
            while (left > 0U) {
                uint32_t most = (slot == 0U) ? left : (uint32_t)fv_random_int(&rig.random, 1, 200);
                uint32_t n = (most < left) ? most : left;
                assert_int_equal(fv_rig_append(&rig, slot, 0, n), FV_OK);
                assert_int_equal(fv_rig_append(&rig, slot, 1, n), FV_OK); /* with a window */
                left -= n;
            }
        }
        fv_rig_destroy(&rig);
    }
}

/*
 * KV that moves: prompts in any chunking over 2 to 4 context parts, with heads cut too, dense, windows, sinks, softcap, S2 and
 * latents, beside items whose queries visit; areas that hold one head and areas that hold all.
 */
static void test_moved_kv_equals_the_oracle(void **state)
{
    static const size_t k_areas[] = {(size_t)96 << 10, (size_t)4 << 20};

    (void)state;
    for (uint32_t n_ranks = 2; n_ranks <= 4U; n_ranks++) {
        for (size_t a = 0; a < FV_COUNT(k_areas); a++) {
            static fv_rig_t rig; /* large */

            fv_rig_create_moving(&rig, n_ranks, ARENA_BYTES, k_areas[a], BACKEND,
                                 seed * 41U + n_ranks * 10U + a);
            for (uint32_t m = 0; m < 4U; m++) {
                fv_model_spec_t spec = (m < 2U)    ? fv_rig_random_sparse_spec(&rig.random)
                                       : (m == 2U) ? fixed_spec()
                                                   : fv_rig_random_latent(&rig.random, 0);

                (void)fv_rig_model(&rig, &spec);
                fv_rig_open(&rig, m, m, 1, (uint16_t)n_ranks, 64);
                for (uint32_t left = 64U * n_ranks * 2U + 75U; left > 0U;) {
                    uint32_t n = (uint32_t)fv_random_int(&rig.random, 1, 200);
                    n = (n < left) ? n : left;
                    assert_int_equal(fv_rig_append(&rig, m, 0, n), FV_OK);
                    assert_int_equal(fv_rig_append(&rig, m, 1, n), FV_OK);
                    left -= n;
                }
            }
            fv_rig_live(&rig, 60);
            assert_true(rig.n_moved > 10U);
            fv_rig_destroy(&rig);
        }
    }
}

/* A full pool: items that fail on one rank take part all the same, and the others stay right. */
static void test_moved_kv_beside_failures(void **state)
{
    static fv_rig_t rig; /* large */

    (void)state;
    fv_rig_create_moving(&rig, 3, (size_t)832 << 10, (size_t)192 << 10, BACKEND, seed * 43U);
    fv_model_spec_t spec = fixed_spec();
    uint32_t model = fv_rig_model(&rig, &spec);
    fv_rig_open(&rig, 0, model, 1, 3, 64);
    for (uint32_t i = 0; i < 24U;
         i++) { /* one is refused on the rank that is full, while others are not */
        (void)fv_rig_append(&rig, 0, i % 2U, 40);
    }
    fv_rig_live(&rig, 150);
    assert_true(rig.n_exhausted > 0U);
    assert_true(rig.n_moved > 4U);
    fv_rig_destroy(&rig);
}

/* ------------------------------------------------------------------ random histories */

static void test_random_histories_equal_the_oracle(void **state)
{
    static const uint32_t ranks[] = {1, 2, 3, 4, 7};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(ranks); i++) {
        static fv_rig_t rig; /* large */

        fv_rig_create(&rig, ranks[i], ARENA_BYTES, BACKEND, seed * 1000U + i);
        for (uint32_t m = 0; m < 4U; m++) {
            fv_model_spec_t spec = (m < 3U) ? fv_rig_random_sparse_spec(&rig.random)
                                            : fv_rig_random_latent(&rig.random, 0);

            (void)fv_rig_model(&rig, &spec);
        }
        fv_rig_live(&rig, 80);
        assert_true(rig.n_checked > 60U);
        assert_int_equal(rig.n_exhausted, 0);
        fv_rig_destroy(&rig);
    }
}

/* The same with an arena that fills: refused items change nothing, the others stay right. */
static void test_a_full_pool_refuses_items_alone(void **state)
{
    (void)state;
    for (uint32_t n_ranks = 1; n_ranks <= 3U; n_ranks++) {
        static fv_rig_t rig; /* large */

        fv_rig_create(&rig, n_ranks, (size_t)640 << 10, BACKEND, seed * 77U + n_ranks);
        fv_model_spec_t spec = fixed_spec();
        (void)fv_rig_model(&rig, &spec);
        fv_rig_live(&rig, 150);
        assert_true(rig.n_checked > 50U);
        assert_true(rig.n_exhausted > 0U);
        fv_rig_destroy(&rig);
    }
}

/* ------------------------------------------------------------------ windows */

static void *windows_ctx(void *arg, uint32_t rank)
{
    return fv_local_windows_ctx(arg, rank);
}

/* The exchange between devices: windows of several sizes, and ranks that do not reach each other. */
static void live_through_windows(uint32_t n_ranks,
                                 uint32_t domain_ranks,
                                 size_t window_bytes,
                                 size_t arena_bytes,
                                 size_t move_bytes,
                                 uint64_t life_seed)
{
    fv_local_hub_t *hub = fv_local_hub_create(n_ranks);
    fv_local_windows_t *windows =
        (hub == NULL) ? NULL : fv_local_windows_create(hub, n_ranks, domain_ranks, window_bytes);
    fv_rig_door_t door = {.exchange = &fv_local_windows_ops,
                          .ctx = windows_ctx,
                          .arg = windows,
                          .move_bytes = move_bytes};
    static fv_rig_t rig; /* large */

    assert_non_null(windows);
    fv_rig_create_through(&rig, n_ranks, arena_bytes, NULL, &door, life_seed);
    fv_model_spec_t spec = fixed_spec();
    (void)fv_rig_model(&rig, &spec);
    spec = fv_rig_random_spec(&rig.random);
    (void)fv_rig_model(&rig, &spec);
    for (uint32_t i = 0; i < 40U; i++) { /* every one over all ranks; decode and prefill in turn */
        if (i < 4U) {
            fv_rig_open(&rig, i, i % 2U, 1, (uint16_t)n_ranks, 64);
        }
        (void)fv_rig_append(&rig, i % 4U, i / 4U % 2U, ((i / 8U) % 2U == 0U) ? (70U + i) : 1U);
    }
    fv_rig_live(&rig, 120);
    assert_true(rig.n_checked > 60U);
    assert_true((rig.n_exhausted > 0U) == (arena_bytes < ARENA_BYTES));
    assert_true((window_bytes < ((size_t)64 << 20)) || (fv_local_windows_ll(windows) > 20U));
    assert_true(fv_local_windows_direct(windows) + fv_local_windows_ll(windows) > 20U);
    assert_true((fv_local_windows_rest(windows) > 0U) ==
                ((domain_ranks < n_ranks) || (window_bytes < ((size_t)1 << 20))));
    assert_true((rig.n_moved > 10U) == (move_bytes > 0U));
    fv_rig_destroy(&rig);
    fv_local_windows_destroy(windows);
    fv_local_hub_destroy(hub);
}

static void test_windows_equal_the_oracle(void **state)
{
    (void)state;
    live_through_windows(2, 2, (size_t)64 << 20, ARENA_BYTES, 0, seed * 23U); /* LL */
    live_through_windows(3, 3, (size_t)64 << 20, ARENA_BYTES, (size_t)1 << 20, seed * 47U);
    live_through_windows(2, 2, (size_t)64 << 20, (size_t)640 << 10, 0, seed * 29U);
    live_through_windows(2, 2, WINDOW_FLAGS, ARENA_BYTES, 0, seed * 11U);
    live_through_windows(3, 3, (size_t)64 << 10, ARENA_BYTES, 0, seed * 13U); /* some do not fit */
    live_through_windows(4, 2, WINDOW_FLAGS, ARENA_BYTES, 0, seed * 17U);     /* two domains */
    live_through_windows(2, 2, WINDOW_FLAGS, (size_t)640 << 10, 0, seed * 19U); /* empty sets */
}

/* The life of test_exchange_cuda, whose ranks are GPUs. */
static void test_latents_and_s2_live_together(void **state)
{
    (void)state;
    for (uint32_t n_ranks = 2; n_ranks <= 4U; n_ranks += 2U) {
        static fv_rig_t rig; /* large */

        fv_rig_create(&rig, n_ranks, ARENA_BYTES, BACKEND, seed * 31U + n_ranks);
        fv_rig_latents_and_s2(&rig);
        assert_true(rig.n_checked > 50U);
        fv_rig_destroy(&rig);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_placement_shape),
        cmocka_unit_test(test_latent_placements),
        cmocka_unit_test(test_prompts_over_context_parts),
        cmocka_unit_test(test_moved_kv_equals_the_oracle),
        cmocka_unit_test(test_moved_kv_beside_failures),
        cmocka_unit_test(test_random_histories_equal_the_oracle),
        cmocka_unit_test(test_a_full_pool_refuses_items_alone),
        cmocka_unit_test(test_windows_equal_the_oracle),
        cmocka_unit_test(test_latents_and_s2_live_together),
    };

#if defined(FV_PROP_CUDA)
    if (!fv_backend_cuda_is_visible()) {
        print_message("no GPU: skipped\n");
        return 77;
    }
#endif
    seed = fv_random_seed(1);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
