/*
 * prop_worker_s2.c - what is freed is never missed: a long context in an arena that could not hold it densely.
 *
 * Goal:   a session of S2 or Window layers decodes 4096 tokens with the memory of what it keeps; whatever is written over
 *         the pages that it gave back changes nothing; forks keep what their parent lets go.
 * Method: after every block a second session takes all memory that is free, fills it with NaN, and goes. Each result
 *         is compared with the fp64 oracle, each rank's pages with a count page by page (tests/support/worker_rig.h).
 */
#include "common/policy.h"
#include "tests/support/test.h"
#include "tests/support/worker_rig.h"

#define ARENA_BYTES ((size_t)1 << 20)
/* TSan is ten times slower; still more tokens than the arenas hold densely. */
#if defined(__SANITIZE_THREAD__)
#    define N_TOKENS 3200U
#else
#    define N_TOKENS 4096U
#endif

#if defined(FV_PROP_CUDA) /* tests/worker.cmake */
#    define BACKEND (&fv_backend_cuda)
#else
#    define BACKEND NULL
#endif

static uint64_t seed;

static fv_model_spec_t model(const fv_policy_t *policy)
{
    fv_model_spec_t spec = {
        .name = "sparse",
        .n_layers = FV_RIG_LAYERS,
        .n_q_heads = 4,
        .n_kv_heads = 2,
        .head_dim_qk = 16,
        .head_dim_v = 16,
        .kv_dtype = FV_DTYPE_F32,
        .n_policies = 2,
    };

    spec.policies[1] = *policy;
    spec.layer_policy[0] = 1;
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
    return spec;
}

/* A session takes all free pages, writes NaN, and goes. */
static void poison_free_pages(fv_rig_t *rig, uint32_t slot, uint32_t n_parts)
{
    fv_rig_item_t item = {.status = FV_OK};

    fv_rig_open(rig, slot, 0, 1, (uint16_t)n_parts, FV_PAGE_TOKENS);
    while (item.status == FV_OK) {
        uint64_t n = rig->sessions[slot].layers[1].n_tokens;

        item = (fv_rig_item_t){.session = slot,
                               .layer = 1,
                               .position = n,
                               .kv_end = n + FV_PAGE_TOKENS,
                               .n_tokens = FV_PAGE_TOKENS,
                               .dtype = FV_DTYPE_F32,
                               .flags = FV_ITEM_CAUSAL | FV_ITEM_APPEND,
                               .is_poison = true};
        fv_rig_step(rig, &item, 1);
    }
    fv_rig_close(rig, slot);
}

static const fv_policy_t k_policies[] = {
    {.kind = FV_POLICY_S2, .block_tokens = 64, .local_blocks = 2, .vert_stride = 8},
    {.kind = FV_POLICY_S2,
     .block_tokens = 32,
     .local_blocks = 3,
     .vert_stride = 24,
     .pattern_per = FV_PATTERN_Q_HEAD},
    {.kind = FV_POLICY_S2,
     .block_tokens = 128,
     .local_blocks = 1,
     .vert_stride = 8,
     .head_sliding_offset = 1,
     .homo_head = 1},
    {.kind = FV_POLICY_WINDOW, .window_tokens = 200, .sink_tokens = 70},
};

/* S9: token by token, and in chunks over several ranks. */
static void test_freeing_is_unobservable(void **state)
{
    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_policies); i++) {
        static fv_rig_t rig; /* large */
        uint32_t n_ranks = 1U + (uint32_t)i % 3U;
        fv_model_spec_t spec = model(&k_policies[i]);
        uint64_t *n_tokens = &rig.sessions[0].layers[0].n_tokens;

        size_t arena_bytes = (n_ranks == 1U) ? (ARENA_BYTES / 2U) : (ARENA_BYTES / 4U);

        assert_true(n_ranks * arena_bytes <
                    N_TOKENS * fv_model_token_bytes(&spec) * (size_t)spec.n_kv_heads);
        fv_rig_create(&rig, n_ranks, arena_bytes, BACKEND, seed + i);
        (void)fv_rig_model(&rig, &spec);
        fv_rig_open(&rig, 0, 0, 1, (uint16_t)n_ranks, FV_PAGE_TOKENS);
        while (*n_tokens < N_TOKENS) {
            uint32_t n = (i == 0) ? 1U : (uint32_t)fv_random_int(&rig.random, 1, 90);

            assert_int_equal(fv_rig_append(&rig, 0, 0, n), FV_OK);
            if (*n_tokens % FV_PAGE_TOKENS < n) {
                poison_free_pages(&rig, 1, n_ranks);
            }
        }
        assert_true(rig.n_exhausted > 20U);
        fv_rig_destroy(&rig);
    }
}

/* A fork holds by reference what its parent has let go since, and lets go of it by itself. */
static void test_forks_keep_their_own(void **state)
{
    static fv_rig_t rig;
    fv_model_spec_t spec = model(&k_policies[0]);

    (void)state;
    fv_rig_create(&rig, 2, ARENA_BYTES / 4U, BACKEND, seed);
    (void)fv_rig_model(&rig, &spec);
    fv_rig_open(&rig, 0, 0, 1, 2, FV_PAGE_TOKENS);
    for (int i = 0; i < 10; i++) {
        assert_int_equal(fv_rig_append(&rig, 0, 0, 64), FV_OK);
    }
    fv_rig_fork(&rig, 2, 0, UINT64_MAX);
    uint64_t at_fork =
        fv_worker_session_pages(rig.workers[0], 2) + fv_worker_session_pages(rig.workers[1], 2);
    for (int i = 0; i < 10; i++) {
        assert_int_equal(fv_rig_append(&rig, 0, 0, 64), FV_OK);
        poison_free_pages(&rig, 1, 2);
    }
    assert_int_equal(fv_worker_session_pages(rig.workers[0], 2) +
                         fv_worker_session_pages(rig.workers[1], 2),
                     at_fork);
    for (int i = 0; i < 100; i++) { /* judged by the oracle; the rig counts its pages */
        assert_int_equal(fv_rig_append(&rig, 2, 0, 3), FV_OK);
    }
    fv_rig_close(&rig, 0);
    poison_free_pages(&rig, 1, 2);
    assert_int_equal(fv_rig_append(&rig, 2, 0, 1), FV_OK);
    fv_rig_destroy(&rig);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_freeing_is_unobservable),
        cmocka_unit_test(test_forks_keep_their_own),
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
