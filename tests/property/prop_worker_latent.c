/*
 * prop_worker_latent.c - slices of latents over ranks: exact, in grids with context parts, and what they exchange.
 *
 * Goal:   LATENT with `exact` equals the model's own attention (T11) whatever the heads, context parts, policies, forks and
 *         truncations; TPLA in g slices on k ranks equals the oracle of g softmaxes (T10), context parts included.
 * Method: the rig (tests/support/worker_rig.h) compares each step with the fp64 oracle: for `exact` that of the whole model.
 */
#include "tests/support/test.h"
#include "tests/support/worker_rig.h"

#include <string.h>

#define ARENA_BYTES ((size_t)24 << 20)

#if defined(FV_PROP_CUDA) /* tests/worker.cmake: that backend adds no scores up */
#    define BACKEND   (&fv_backend_cuda)
#    define HAS_EXACT false
#else
#    define BACKEND   NULL
#    define HAS_EXACT true
#endif

static uint64_t seed;

typedef struct grid {
    int32_t groups;
    uint32_t n_per_slice, n_ctx;
} grid_t;

/* Appends of several sizes, a fork, a truncation; both layers, so that policies differ. */
static void live(fv_rig_t *rig, uint32_t slot, uint32_t n_ctx)
{
    const uint32_t sizes[] = {1, 40, 90, 1, 3, 64U * n_ctx + 10U, 1, 130, 1};

    for (size_t i = 0; i < FV_COUNT(sizes); i++) {
        assert_int_equal(fv_rig_append(rig, slot, i % 2U, sizes[i]), FV_OK);
    }
    if (!fv_rig_is_readable(rig, slot, UINT32_MAX, 60, 60) ||
        !fv_rig_is_readable(rig, slot, UINT32_MAX, 70, 70)) {
        return; /* its window has let go of what such a cut would need */
    }
    fv_rig_fork(rig, slot + 3U, slot, 70);
    fv_rig_truncate(rig, slot, UINT32_MAX, 60);
    assert_int_equal(fv_rig_append(rig, slot, 0, 3), FV_OK);
    assert_int_equal(fv_rig_append(rig, slot + 3U, 0, 70), FV_OK);
}

static fv_model_spec_t make_spec(fv_rig_t *rig, const grid_t *grid, bool exact)
{
    fv_model_spec_t spec = fv_rig_random_latent(&rig->random, grid->groups);

    spec.n_q_heads += (int32_t)grid->n_per_slice; /* heads enough for each */
    if (fv_random_int(&rig->random, 0, 2) == 0) { /* slices of whole scales */
        spec.kv_dtype = FV_DTYPE_FP8_LATENT;
        spec.latent_dim = 128 * grid->groups;
    }
    if (exact) {
        spec.sharding.exact = 1;
        spec.sharding.n_mu = 0;
        memset(spec.sharding.mu, 0, sizeof(spec.sharding.mu));
        spec.latent_norm = (fv_latent_norm_t){.mode = FV_NORM_NONE};
    }
    return spec;
}

static void one_grid(const grid_t *grid, bool exact)
{
    static fv_rig_t rig; /* large */
    uint32_t n_ranks = (uint32_t)grid->groups * grid->n_per_slice * grid->n_ctx;

    fv_rig_create(&rig, n_ranks, ARENA_BYTES, BACKEND,
                  seed * 131U + n_ranks * 10U + grid->n_ctx + (exact ? 1000U : 0U));
    for (uint32_t slot = 0; slot < 3U; slot++) {
        fv_model_spec_t spec = make_spec(&rig, grid, exact);
        uint32_t model = fv_rig_model(&rig, &spec);

        fv_rig_open(&rig, slot, model, (uint16_t)((uint32_t)grid->groups * grid->n_per_slice),
                    (uint16_t)grid->n_ctx, 64);
        live(&rig, slot, grid->n_ctx);
    }
    assert_true((fv_local_hub_messages(rig.hub) > 0U) ==
                ((exact && (grid->groups > 1)) || (grid->n_ctx > 1U)));
    fv_rig_destroy(&rig);
}

/* N = 1 is the model as it is; every other adds scores up. */
static void test_exact_equals_the_model(void **state)
{
    static const grid_t k_grids[] = {{1, 1, 1}, {2, 1, 1}, {2, 2, 1}, {4, 1, 1},
                                     {8, 1, 1}, {2, 1, 2}, {2, 2, 2}};

    (void)state;
    if (!HAS_EXACT) {
        skip();
    }
    for (size_t i = 0; i < FV_COUNT(k_grids); i++) {
        one_grid(&k_grids[i], true);
    }
}

/* Context parts inside slices, heads cut or not; (k, g) = (4, 2), (8, 2), (8, 4) among them. */
static void test_slices_by_context(void **state)
{
    static const grid_t k_grids[] = {{1, 1, 3}, {2, 1, 2}, {2, 1, 3}, {2, 2, 2},
                                     {2, 1, 4}, {4, 1, 2}, {2, 4, 1}, {4, 2, 1}};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_grids); i++) {
        one_grid(&k_grids[i], false);
    }
}

static void open_long(fv_rig_t *rig, int32_t groups, int32_t n_q_heads)
{
    fv_model_spec_t spec = {.name = "long",
                            .n_layers = FV_RIG_LAYERS,
                            .n_q_heads = n_q_heads,
                            .kv_dtype = FV_DTYPE_BF16,
                            .softmax_scale = 0.2F,
                            .kind = FV_MODEL_LATENT,
                            .latent_dim = 128,
                            .rope_dim = 32,
                            .n_policies = 1,
                            .sharding = {.mode = FV_SHARDING_LATENT, .groups = groups, .exact = 1}};

    fv_rig_create(rig, (uint32_t)groups, ARENA_BYTES, BACKEND, seed * 17U + (uint64_t)groups);
    fv_rig_open(rig, 0, fv_rig_model(rig, &spec), (uint16_t)groups, 1, 64);
}

/*
 * T11: the bytes that go round in a decode step, whole pages because scores are of whole tiles. With 128 heads a token of 1088
 * has more scores than a round takes: rounds of some heads each.
 */
static void decode_at(int32_t groups, uint64_t n_q, uint64_t n_tokens, uint64_t n_rounds)
{
    static fv_rig_t rig; /* large */
    /* two messages each from every rank to every other */
    uint64_t per_round = 2U * (uint64_t)groups * ((uint64_t)groups - 1U);

    open_long(&rig, groups, (int32_t)n_q);
    assert_int_equal(fv_rig_append(&rig, 0, 0, (uint32_t)n_tokens - 1U), FV_OK);
    uint64_t bytes = fv_local_hub_bytes(rig.hub);
    uint64_t messages = fv_local_hub_messages(rig.hub);
    assert_int_equal(fv_rig_append(&rig, 0, 0, 1), FV_OK);
    /* from all N ranks: N times 2 (N - 1) / N B H S e */
    assert_int_equal(fv_local_hub_bytes(rig.hub) - bytes,
                     2U * ((uint64_t)groups - 1U) * n_q * n_tokens * sizeof(float));
    assert_int_equal(fv_local_hub_messages(rig.hub) - messages, n_rounds * per_round);
    fv_rig_destroy(&rig);
}

static void test_bytes_and_rounds(void **state)
{
    (void)state;
    if (!HAS_EXACT) {
        skip();
    }
    decode_at(2, 16, 256, 1);
    decode_at(4, 16, 256, 1);
    decode_at(2, 128, 1088, 2);
}

/* One of two, or both. */
static void ask_for_a_slice(fv_rig_t *rig, fv_rig_item_t *item)
{
    item->flags |= (uint16_t)((uint32_t)fv_random_int(&rig->random, 0, 2) << FV_ITEM_SLICE_SHIFT);
}

/* Whole outputs and single slices, new tokens and queries alone. */
static void test_random_histories(void **state)
{
    (void)state;
    for (uint32_t n_ranks = 2; n_ranks <= 4U; n_ranks += 2U) {
        static fv_rig_t rig; /* large */
        const grid_t grid = {.groups = 2, .n_per_slice = 1, .n_ctx = n_ranks / 2U};

        fv_rig_create(&rig, n_ranks, ARENA_BYTES, BACKEND, seed * 53U + n_ranks);
        for (uint32_t slot = 0; slot < 3U; slot++) {
            fv_model_spec_t spec = make_spec(&rig, &grid, HAS_EXACT && (slot != 1U));

            fv_rig_open(&rig, slot, fv_rig_model(&rig, &spec), 2, (uint16_t)grid.n_ctx, 64);
        }
        for (int step = 0; step < 12; step++) { /* exact and not, decode and prefill, in one step */
            fv_rig_item_t items[3];

            for (uint32_t s = 0; s < 3U; s++) {
                uint64_t n = rig.sessions[s].layers[0].n_tokens;
                uint32_t n_new = (fv_random_int(&rig.random, 0, 2) == 0)
                                     ? (uint32_t)fv_random_int(&rig.random, 2, 90)
                                     : 1U;

                items[s] = (fv_rig_item_t){
                    .session = s,
                    .position = n,
                    .kv_end = n + n_new,
                    .n_tokens = n_new,
                    .dtype = (uint16_t)fv_random_int(&rig.random, FV_DTYPE_F32, FV_DTYPE_BF16),
                    .flags = FV_ITEM_CAUSAL | FV_ITEM_APPEND | FV_ITEM_WANT_LSE};
                ask_for_a_slice(&rig, &items[s]);
            }
            fv_rig_step(&rig, items, 3);
            for (uint32_t s = 0; s < 3U; s++) { /* as a client's other ranks repeat it */
                items[s].flags = FV_ITEM_CAUSAL | FV_ITEM_WANT_LSE;
                ask_for_a_slice(&rig, &items[s]);
            }
            fv_rig_step(&rig, items, 3);
        }
        assert_int_equal(rig.n_checked, 72);
        fv_rig_destroy(&rig);
    }
}

/* A rank whose pool is full takes part with empty scores: nobody waits, and the others' items stay right. */
static void test_a_full_pool_keeps_nobody_waiting(void **state)
{
    static fv_rig_t rig; /* large */
    const grid_t grid = {.groups = 2, .n_per_slice = 1, .n_ctx = 1};

    (void)state;
    if (!HAS_EXACT) {
        skip();
    }
    fv_rig_create(&rig, 2, (size_t)384 << 10, BACKEND, seed * 59U);
    fv_model_spec_t spec = make_spec(&rig, &grid, true);
    uint32_t model = fv_rig_model(&rig, &spec);
    for (uint32_t slot = 0; slot < 4U; slot++) {
        fv_rig_open(&rig, slot, model, 2, 1, 64);
    }
    for (uint32_t i = 0; (i < 400U) && (rig.n_exhausted < 3U); i++) {
        fv_status_t status = fv_rig_append(&rig, i % 4U, i % 2U, 1U + i % 70U);

        assert_true((status == FV_OK) || (status == FV_ERR_EXHAUSTED));
    }
    assert_true(rig.n_exhausted > 0U);
    assert_true(rig.n_checked > 4U);
    fv_rig_destroy(&rig);
}

/* 512 + 64, in fp32 so that a value that the norm rounds the other way is no error. */
static fv_model_spec_t deepseek(int32_t n_q_heads)
{
    return (fv_model_spec_t){.name = "deepseek",
                             .n_layers = FV_RIG_LAYERS,
                             .n_q_heads = n_q_heads,
                             .kv_dtype = FV_DTYPE_F32,
                             .softmax_scale = 0.07F,
                             .kind = FV_MODEL_LATENT,
                             .latent_dim = 512,
                             .rope_dim = 64,
                             .n_policies = 1};
}

/* T3: 16, 64 and 128 heads, a softmax for each of two slices, alpha and mu given. */
static void test_two_softmaxes(void **state)
{
    (void)state;
    for (int32_t n_q = 16; n_q <= 128; n_q += (n_q == 16) ? 48 : 64) {
        static fv_rig_t rig; /* large */
        fv_model_spec_t spec = deepseek(n_q);

        spec.latent_norm = (fv_latent_norm_t){
            .mode = FV_NORM_SLICE_RMS, .eps = 1e-6F, .n_alpha = 2, .alpha = {4.0F / 3.0F, 4.0F}};
        spec.sharding =
            (fv_sharding_t){.mode = FV_SHARDING_LATENT, .groups = 2, .n_mu = 2, .mu = {1.1F, 0.9F}};
        fv_rig_create(&rig, 2, ARENA_BYTES, BACKEND, seed * 61U + (uint64_t)n_q);
        fv_rig_open(&rig, 0, fv_rig_model(&rig, &spec), 2, 1, 64);
        assert_int_equal(fv_rig_append(&rig, 0, 0, 70), FV_OK);
        assert_int_equal(fv_rig_append(&rig, 0, 0, 1), FV_OK);
        assert_int_equal(fv_rig_append(&rig, 0, 0, 4), FV_OK);
        assert_int_equal(fv_local_hub_bytes(rig.hub), 0); /* T6: no lse, no state, nothing */
        fv_rig_destroy(&rig);
    }
}

/* M7: the context over 2, 4 and 8 ranks, most of which hold nothing at first: 1..9 tokens, then 1..9 blocks. */
static void test_context_parts_without_tokens(void **state)
{
    (void)state;
    for (uint32_t n_ranks = 2; n_ranks <= 8U; n_ranks *= 2U) {
        static fv_rig_t rig; /* large */
        fv_model_spec_t spec = deepseek(16);

        fv_rig_create(&rig, n_ranks, ARENA_BYTES, BACKEND, seed * 67U + n_ranks);
        fv_rig_open(&rig, 0, fv_rig_model(&rig, &spec), 1, (uint16_t)n_ranks, 64);
        for (uint32_t n = 1; n <= 9U; n++) {
            assert_int_equal(fv_rig_append(&rig, 0, 0, 1), FV_OK);
        }
        assert_int_equal(fv_local_hub_messages(rig.hub), 0);
        for (uint32_t n = 1; n <= 9U; n++) {
            assert_int_equal(fv_rig_append(&rig, 0, 0, (n == 1U) ? 55U : 64U), FV_OK);
        }
        assert_true(fv_local_hub_messages(rig.hub) > 0U);
        fv_rig_destroy(&rig);
    }
}

/*
 * X2: one pattern for the latent, whose pages are freed where no head reads them (the rig counts page by page), whichever
 * way it is sharded.
 */
static void test_s2_frees_latents(void **state)
{
    static const struct {
        grid_t grid;
        bool exact;
    } k_cases[] = {{{0, 1, 2}, false},
                   {{0, 2, 1}, false},
                   {{2, 1, 1}, false},
                   {{2, 1, 2}, false},
                   {{2, 1, 1}, true}};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_cases); i++) {
        static fv_rig_t rig; /* large */
        const grid_t *grid = &k_cases[i].grid;

        if (k_cases[i].exact && !HAS_EXACT) {
            continue;
        }
        uint32_t n_hp = (uint32_t)fv_max64(1, grid->groups) * grid->n_per_slice;
        fv_model_spec_t spec = deepseek(3);

        spec.latent_dim = 128;
        spec.rope_dim = 16;
        spec.n_policies = 2;
        spec.policies[1] = (fv_policy_t){.kind = FV_POLICY_S2,
                                         .block_tokens = 64,
                                         .local_blocks = 2,
                                         .vert_stride = 3,
                                         .head_sliding_offset = 1};
        spec.layer_policy[0] = 1;
        if (grid->groups > 0) {
            spec.sharding = (fv_sharding_t){.mode = FV_SHARDING_LATENT,
                                            .groups = grid->groups,
                                            .exact = k_cases[i].exact ? 1 : 0};
        }
        fv_rig_create(&rig, n_hp * grid->n_ctx, ARENA_BYTES, BACKEND, seed * 71U + i);
        fv_rig_open(&rig, 0, fv_rig_model(&rig, &spec), (uint16_t)n_hp, (uint16_t)grid->n_ctx, 64);
        for (uint32_t n = 0; n < 14U; n++) {
            assert_int_equal(fv_rig_append(&rig, 0, 0, (n % 3U == 0U) ? 130U : 1U), FV_OK);
        }
        uint64_t n_held = 0;
        for (uint32_t r = 0; r < rig.n_ranks; r++) {
            n_held += fv_worker_session_pages(rig.workers[r], 0);
        }
        /* 659 tokens, 11 pages: 2 local ones, one that two appends are still about, and every third */
        assert_true(n_held < (uint64_t)9 * n_hp);
        fv_rig_destroy(&rig);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exact_equals_the_model),
        cmocka_unit_test(test_slices_by_context),
        cmocka_unit_test(test_bytes_and_rounds),
        cmocka_unit_test(test_random_histories),
        cmocka_unit_test(test_a_full_pool_keeps_nobody_waiting),
        cmocka_unit_test(test_two_softmaxes),
        cmocka_unit_test(test_context_parts_without_tokens),
        cmocka_unit_test(test_s2_frees_latents),
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
