/*
 * prop_worker.c - whatever the placement and the history, the workers together equal unsharded attention.
 *
 * Goal:   every grid of heads x context over 1 to 7 ranks, parts without a token and heads that do not divide
 *         included; forks, truncations, replays, queries, mixed batches; a full pool spoils nothing.
 * Method: the rig (tests/support/worker_rig.h) compares each step with the fp64 oracle.
 */
#include "tests/support/test.h"
#include "tests/support/worker_rig.h"

#define ARENA_BYTES ((size_t)24 << 20)

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
        fv_rig_t rig;
        fv_model_spec_t spec = fixed_spec();
        uint32_t slot = 0;

        fv_rig_create(&rig, n_ranks, ARENA_BYTES, NULL, seed + n_ranks);
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

/* ------------------------------------------------------------------ random life */

static bool pick_session(fv_rig_t *rig, uint32_t *out)
{
    uint32_t first = (uint32_t)fv_random_int(&rig->random, 0, FV_RIG_SESSIONS - 1);

    for (uint32_t i = 0; i < FV_RIG_SESSIONS; i++) {
        *out = (first + i) % FV_RIG_SESSIONS;
        if (rig->sessions[*out].is_open) {
            return true;
        }
    }
    return false;
}

static bool pick_slot(const fv_rig_t *rig, uint32_t *out)
{
    for (*out = 0; *out < FV_RIG_SESSIONS; (*out)++) {
        if (!rig->sessions[*out].is_open) {
            return true;
        }
    }
    return false;
}

static void random_open(fv_rig_t *rig)
{
    fv_random_t *r = &rig->random;
    uint32_t model = (uint32_t)fv_random_int(r, 0, (int64_t)rig->n_models - 1);
    int64_t n_kv_heads = rig->models[model].n_kv_heads;
    int64_t hp_max = (n_kv_heads < (int64_t)rig->n_ranks) ? n_kv_heads : (int64_t)rig->n_ranks;
    int64_t hp = fv_random_int(r, 1, hp_max);
    int64_t cp = fv_random_int(r, 1, (int64_t)rig->n_ranks / hp);
    uint32_t slot = 0;

    if (pick_slot(rig, &slot)) {
        fv_rig_open(rig, slot, model, (uint16_t)hp, (uint16_t)cp,
                    64U * (uint32_t)fv_random_int(r, 1, 2));
    }
}

/* An append, a replay of an earlier one, or a query. */
static fv_rig_item_t random_item(fv_rig_t *rig, uint32_t slot, uint32_t layer)
{
    fv_random_t *r = &rig->random;
    uint64_t n = rig->sessions[slot].layers[layer].n_tokens;
    int64_t kind = fv_random_int(r, 0, 9);
    uint32_t n_tokens = (uint32_t)((fv_random_int(r, 0, 1) == 0) ? 1 : fv_random_int(r, 1, 150));
    fv_rig_item_t item = {
        .session = slot,
        .layer = layer,
        .position = n,
        .kv_end = n + n_tokens,
        .n_tokens = n_tokens,
        .dtype = (uint16_t)fv_random_int(r, FV_DTYPE_F32, FV_DTYPE_BF16),
        .flags = (uint16_t)(((fv_random_int(r, 0, 4) != 0) ? FV_ITEM_CAUSAL : 0) |
                            ((fv_random_int(r, 0, 1) != 0) ? FV_ITEM_WANT_LSE : 0)),
    };

    if ((kind == 0) && (n > 0U)) { /* replay: what came later is not seen */
        item.position = (uint64_t)fv_random_int(r, 0, (int64_t)n - 1);
        item.n_tokens = (uint32_t)fv_random_int(r, 1, (int64_t)(n - item.position));
        item.n_tokens = (item.n_tokens > 100U) ? 100U : item.n_tokens;
        item.kv_end = item.position + item.n_tokens;
    } else if (kind == 1) { /* query at the end, possibly of an empty session */
        item.kv_end = n;
    } else {
        item.flags |= FV_ITEM_APPEND;
    }
    return item;
}

static void random_step(fv_rig_t *rig)
{
    fv_rig_item_t items[FV_RIG_ITEMS];
    bool used[FV_RIG_SESSIONS][FV_RIG_LAYERS] = {{false}};
    size_t n_wanted = (size_t)fv_random_int(&rig->random, 1, 6);
    size_t n = 0;

    for (size_t i = 0; i < n_wanted; i++) {
        uint32_t layer = (uint32_t)fv_random_int(&rig->random, 0, FV_RIG_LAYERS - 1);
        uint32_t slot = 0;

        if (pick_session(rig, &slot) && !used[slot][layer]) {
            used[slot][layer] = true;
            items[n++] = random_item(rig, slot, layer);
        }
    }
    if (n > 0U) {
        fv_rig_step(rig, items, n);
    }
}

static void random_life(fv_rig_t *rig, int n_ops)
{
    for (int i = 0; i < n_ops; i++) {
        int64_t op = fv_random_int(&rig->random, 0, 19);
        uint32_t slot = 0;
        uint32_t fork = 0;

        if (!pick_session(rig, &slot) || (op == 0)) {
            random_open(rig);
            continue;
        }
        uint64_t n = rig->sessions[slot].layers[op % FV_RIG_LAYERS].n_tokens;
        uint64_t at = (uint64_t)fv_random_int(&rig->random, 0, (int64_t)n + 10);
        if ((op <= 3) && pick_slot(rig, &fork)) {
            fv_rig_fork(rig, fork, slot, (op == 1) ? UINT64_MAX : at);
        } else if (op == 4) {
            fv_rig_truncate(rig, slot, (at % 2U == 0U) ? UINT32_MAX : 1U, at);
        } else if (op == 5) {
            fv_rig_close(rig, slot);
        } else {
            random_step(rig);
        }
    }
}

static void test_random_histories_equal_the_oracle(void **state)
{
    static const uint32_t ranks[] = {1, 2, 3, 4, 7};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(ranks); i++) {
        fv_rig_t rig;

        fv_rig_create(&rig, ranks[i], ARENA_BYTES, NULL, seed * 1000U + i);
        for (uint32_t m = 0; m < 3U; m++) {
            fv_model_spec_t spec = fv_rig_random_spec(&rig.random);

            (void)fv_rig_model(&rig, &spec);
        }
        random_life(&rig, 80);
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
        fv_rig_t rig;

        fv_rig_create(&rig, n_ranks, (size_t)640 << 10, NULL, seed * 77U + n_ranks);
        fv_model_spec_t spec = fixed_spec();
        (void)fv_rig_model(&rig, &spec);
        random_life(&rig, 150);
        assert_true(rig.n_checked > 50U);
        assert_true(rig.n_exhausted > 0U);
        fv_rig_destroy(&rig);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_placement_shape),
        cmocka_unit_test(test_random_histories_equal_the_oracle),
        cmocka_unit_test(test_a_full_pool_refuses_items_alone),
    };

    seed = fv_random_seed(1);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
