/*
 * test_plan_prefill.c - coord/plan_prefill.h: what a chunk of a prompt costs over context parts, and how even it is.
 *
 * Goal:   every pair of a query and a token it sees is counted on one part, exactly; block-cyclic contexts are nearly balanced
 *         for causal chunks, with the bound that follows from the block's size, for random plans and for whole prompts; rows to
 *         merge are dealt evenly; bytes are those that the exchange's layout has, and those of the pages that move; where KV that moves is
 *         cheaper than queries that visit is where the formula says; each way is chosen where it is the better one.
 * Method: pairs by brute force on small plans; laws on random ones (FV_SEED repeats); numbers of docs/performance.md.
 */
#include "coord/plan_prefill.h"
#include "proto/moved.h"
#include "tests/support/random.h"
#include "tests/support/test.h"

#include <math.h>

static uint64_t seed;

static fv_model_spec_t gqa(int32_t n_q_heads, int32_t n_kv_heads)
{
    return (fv_model_spec_t){.n_layers = 1,
                             .n_q_heads = n_q_heads,
                             .n_kv_heads = n_kv_heads,
                             .head_dim_qk = 128,
                             .head_dim_v = 128,
                             .kv_dtype = FV_DTYPE_BF16,
                             .n_policies = 1};
}

static fv_model_spec_t mla(void)
{
    return (fv_model_spec_t){.kind = FV_MODEL_LATENT,
                             .n_layers = 1,
                             .n_q_heads = 128,
                             .n_kv_heads = 1,
                             .head_dim_qk = 576,
                             .head_dim_v = 512,
                             .latent_dim = 512,
                             .rope_dim = 64,
                             .kv_dtype = FV_DTYPE_BF16,
                             .n_policies = 1};
}

static fv_placement_t context(uint16_t n_parts, uint32_t shard_tokens)
{
    fv_placement_t p = {.n_head_parts = 1, .n_ctx_parts = n_parts, .shard_tokens = shard_tokens};

    for (uint16_t i = 0; i < n_parts; i++) {
        p.ranks[i] = i;
    }
    return p;
}

static void test_pairs_by_brute_force(void **state)
{
    fv_random_t random = {.state = seed};

    (void)state;
    for (int round = 0; round < 200; round++) {
        fv_placement_t p = context((uint16_t)fv_random_int(&random, 1, 7),
                                   64U * (uint32_t)fv_random_int(&random, 1, 4));
        uint64_t position = (uint64_t)fv_random_int(&random, 0, 2000);
        uint64_t n = (uint64_t)fv_random_int(&random, 1, 700);
        double sum = 0.0;

        for (int32_t cp = 0; cp < p.n_ctx_parts; cp++) {
            double expected = 0.0;
            for (uint64_t q = position; q < position + n; q++) {
                expected += (double)fv_placement_tokens(&p, cp, q + 1U);
            }
            double pairs = fv_plan_chunk_pairs(&p, cp, position, n);
            assert_true(pairs == expected);
            sum += pairs;
        }
        assert_true(sum == (double)n * (double)position + (double)n * (double)(n + 1U) / 2.0);
    }
}

/* A query sees of the fullest part at most one block more than of the emptiest. */
static void test_chunks_are_nearly_balanced(void **state)
{
    fv_random_t random = {.state = seed + 1U};
    fv_plan_cost_t cost = fv_plan_cost_cuda();
    fv_model_spec_t spec = gqa(32, 8);

    (void)state;
    for (int round = 0; round < 2000; round++) {
        fv_placement_t p = context((uint16_t)fv_random_int(&random, 1, 64),
                                   64U << (uint32_t)fv_random_int(&random, 0, 6));
        uint64_t position =
            (uint64_t)fv_random_int(&random, 0, (int64_t)1 << fv_random_int(&random, 4, 22));
        uint64_t n = (uint64_t)fv_random_int(&random, 1, 16384);
        fv_plan_chunk_t c = fv_plan_chunk(&cost, &spec, &p, position, n);
        double block_macs = (double)n * (double)p.shard_tokens * 32.0 * 256.0;

        assert_true(c.visit.macs >= c.mean_macs * 0.999999);
        assert_true(c.visit.macs - c.mean_macs <=
                    block_macs * (double)(c.n_parts - 1) / (double)c.n_parts * 1.000001);
    }
}

/* Of a whole prompt in chunks of 4096, blocks of 2048: its slowest parts, step by step, over what each part has on average. */
static double imbalance(uint16_t n_parts, uint64_t n_tokens, uint32_t shard_tokens)
{
    fv_plan_cost_t cost = fv_plan_cost_cuda();
    fv_model_spec_t spec = gqa(32, 8);
    fv_placement_t p = context(n_parts, shard_tokens);
    double slowest = 0.0;
    double all = 0.0;

    for (uint64_t at = 0; at < n_tokens; at += 4096U) {
        fv_plan_chunk_t c = fv_plan_chunk(&cost, &spec, &p, at, 4096U);
        slowest += c.visit.macs;
        all += c.mean_macs * (double)c.n_parts;
    }
    return slowest * (double)n_parts / all;
}

static void test_whole_prompts_are_nearly_balanced(void **state)
{
    static const struct {
        uint16_t n_parts;
        uint64_t n_tokens;
        double most;
    } k_cases[] = {{2, 131072, 1.04}, {2, 524288, 1.01}, {4, 131072, 1.12},
                   {4, 524288, 1.03}, {8, 131072, 1.28}, {8, 524288, 1.07}};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_cases); i++) {
        double x = imbalance(k_cases[i].n_parts, k_cases[i].n_tokens, 2048);
        print_message("%u parts, prompt of %llu: slowest over mean %.4f; blocks of 512: %.4f\n",
                      k_cases[i].n_parts, (unsigned long long)k_cases[i].n_tokens, x,
                      imbalance(k_cases[i].n_parts, k_cases[i].n_tokens, 512));
        assert_true((x >= 1.0) && (x <= k_cases[i].most));
        assert_true(imbalance(k_cases[i].n_parts, k_cases[i].n_tokens, 512) < x);
    }
}

/* Rows to merge differ by one at most, and the bytes are those of the step's shares. */
static void test_rows_and_bytes(void **state)
{
    fv_random_t random = {.state = seed + 2U};
    fv_plan_cost_t cost = fv_plan_cost_cpu();

    (void)state;
    for (int round = 0; round < 500; round++) {
        fv_model_spec_t spec = gqa(8 * (int32_t)fv_random_int(&random, 1, 4), 8);
        fv_placement_t p = context((uint16_t)fv_random_int(&random, 1, 9), 64);
        fv_ctl_item_t item = {.position = (uint64_t)fv_random_int(&random, 0, 3000),
                              .n_tokens = (uint32_t)fv_random_int(&random, 1, 600),
                              .dtype = FV_DTYPE_BF16,
                              .flags = FV_ITEM_CAUSAL | FV_ITEM_APPEND};
        uint64_t least = UINT64_MAX;
        uint64_t most = 0;
        double sent = 0.0;

        item.kv_end = item.position + item.n_tokens;
        fv_plan_chunk_t c = fv_plan_chunk(&cost, &spec, &p, item.position, item.n_tokens);
        for (uint32_t rank = 0; rank < (uint32_t)c.n_parts; rank++) {
            fv_item_share_t s;
            assert_true(fv_item_share(&spec, &p, &item, rank, &s));
            uint64_t n = s.row_end - s.row_begin;
            least = (n < least) ? n : least;
            most = (n > most) ? n : most;
            sent += (c.n_parts > 1) ? ((double)(s.n_rows - n) * 129.0 * 4.0) : 0.0;
        }
        assert_true(most - least <= 1U);
        assert_true((sent / c.n_parts >= c.visit.sent_bytes * 0.999999) &&
                    (sent / c.n_parts <= c.visit.sent_bytes * 1.000001));
    }
}

/* Context, in chunks, from which on queries that visit send less than KV that moves. */
static double crossing(const fv_model_spec_t *spec, uint16_t n_parts)
{
    fv_plan_cost_t cost = fv_plan_cost_cuda();
    fv_placement_t p = context(n_parts, 64);
    const uint64_t n = 8192;

    for (uint64_t seen = n; seen < n * 1000U; seen += n / 64U) {
        fv_plan_chunk_t c = fv_plan_chunk(&cost, spec, &p, seen - n, n);
        if (c.move.sent_bytes >= c.visit.sent_bytes) {
            return (double)seen / (double)n;
        }
    }
    return 1000.0;
}

static void test_where_kv_that_moves_is_cheaper(void **state)
{
    static const int32_t k_heads[][2] = {{32, 8}, {32, 32}, {32, 1}};

    (void)state;
    for (uint16_t n_parts = 2; n_parts <= 8U; n_parts *= 2U) {
        for (size_t i = 0; i < FV_COUNT(k_heads); i++) {
            fv_model_spec_t spec = gqa(k_heads[i][0], k_heads[i][1]);
            double expected =
                (double)k_heads[i][0] * 129.0 * 4.0 / ((double)k_heads[i][1] * 256.0 * 2.0);
            double at = crossing(&spec, n_parts);
            assert_true((at >= expected * 0.97) && (at <= expected * 1.03 + 0.02));
        }
        fv_model_spec_t spec = mla();
        double at = crossing(&spec, n_parts);
        assert_true((at > 220.0) && (at < 236.0));
    }
}

/* The table of docs/performance.md: microseconds of one layer, chunks of 8192. */
static void test_what_it_is_worth(void **state)
{
    fv_plan_cost_t costs[2] = {fv_plan_cost_cuda(), fv_plan_cost_cpu()};
    fv_model_spec_t specs[2] = {gqa(32, 8), mla()};
    static const uint64_t k_seen[] = {8192, 16384, 32768, 131072, 524288};

    (void)state;
    for (size_t on = 0; on < 2U; on++) {
        for (size_t m = 0; m < 2U; m++) {
            for (uint16_t n_parts = 2; n_parts <= 8U; n_parts *= 4U) {
                for (size_t i = 0; i < FV_COUNT(k_seen); i++) {
                    fv_placement_t p = context(n_parts, 64);
                    fv_plan_chunk_t c =
                        fv_plan_chunk(&costs[on], &specs[m], &p, k_seen[i] - 8192U, 8192);
                    print_message("%s, %s, %u ranks, %7llu seen: visit %11.0f, move %11.0f us\n",
                                  (on == 0U) ? "GPU" : "CPU", (m == 0U) ? "32/8" : "MLA", n_parts,
                                  (unsigned long long)k_seen[i], c.visit.us, c.move.us);
                    assert_true((c.visit.us > 0.0) && (c.move.us > 0.0));
                    if ((m == 0U) && (k_seen[i] > 5U * 8192U)) {
                        assert_true(c.visit.us < c.move.us);
                    }
                    if (m == 1U) {
                        assert_true(c.move.us < c.visit.us);
                    }
                }
            }
        }
    }
}

/* A prompt's time when all its chunks visit, over that of the cheaper way for each chunk. */
static double worth(const fv_model_spec_t *spec, uint16_t n_parts, uint64_t n_tokens)
{
    fv_plan_cost_t cost = fv_plan_cost_cuda();
    fv_placement_t p = context(n_parts, 2048);
    double visit = 0.0;
    double best = 0.0;

    for (uint64_t at = 0; at < n_tokens; at += 4096U) {
        fv_plan_chunk_t c = fv_plan_chunk(&cost, spec, &p, at, 4096);
        visit += c.visit.us;
        best += (c.move.us < c.visit.us) ? c.move.us : c.visit.us;
    }
    return visit / best;
}

/* Queries that visit are within these of the best of both ways (docs/performance.md). */
static void test_visiting_is_near_the_best(void **state)
{
    fv_model_spec_t spec = gqa(32, 8);
    fv_model_spec_t latent = mla();

    (void)state;
    for (uint16_t n_parts = 2; n_parts <= 8U; n_parts *= 2U) {
        print_message("%u ranks: 32/8 128k %.4f, 512k %.4f; MLA 128k %.4f, 512k %.4f\n", n_parts,
                      worth(&spec, n_parts, 131072), worth(&spec, n_parts, 524288),
                      worth(&latent, n_parts, 131072), worth(&latent, n_parts, 524288));
    }
    assert_true(worth(&spec, 2, 131072) < 1.01);
    assert_true(worth(&spec, 8, 131072) < 1.02);
    assert_true(worth(&spec, 8, 524288) < 1.002);
}

static fv_ctl_item_t piece(uint64_t position, uint32_t n_tokens)
{
    return (fv_ctl_item_t){.position = position,
                           .kv_end = position + n_tokens,
                           .n_tokens = n_tokens,
                           .dtype = FV_DTYPE_BF16,
                           .flags = FV_ITEM_CAUSAL | FV_ITEM_APPEND};
}

/* Each where it is predicted to be faster, and only what the staging holds; whoever wants one way gets it. */
static void test_the_better_way_is_chosen(void **state)
{
    const fv_plan_cost_t cost = fv_plan_cost_cuda();
    const size_t area = (size_t)256 << 20;
    const fv_placement_t p = context(2, 2048);
    fv_model_spec_t grouped = gqa(32, 8);
    fv_model_spec_t window = gqa(32, 8);
    fv_model_spec_t latent = mla();
    const fv_ctl_item_t late = piece(126976, 4096);
    const fv_ctl_item_t early = piece(4096, 4096);

    (void)state;
    window.policies[0] = (fv_policy_t){.kind = FV_POLICY_WINDOW, .window_tokens = 1024};
    /* few heads of a long context: the queries; one latent for 128 heads, or a window: the KV */
    assert_false(fv_plan_moves(&cost, FV_PLAN_PREFILL_AUTO, area, &grouped, &p, &late));
    assert_true(fv_plan_moves(&cost, FV_PLAN_PREFILL_AUTO, area, &latent, &p, &early));
    assert_true(fv_plan_moves(&cost, FV_PLAN_PREFILL_AUTO, area, &window, &p, &late));
    /* 32 heads of a context that is hardly longer than the chunk; a link so slow that bytes are all that counts */
    fv_plan_cost_t slow = cost;
    slow.exchange_bytes_per_us = 2000.0;
    assert_true(fv_plan_moves(&slow, FV_PLAN_PREFILL_AUTO, area, &grouped, &p, &early));
    assert_false(fv_plan_moves(&slow, FV_PLAN_PREFILL_AUTO, area, &grouped, &p, &late));

    assert_true(fv_plan_moves(&cost, FV_PLAN_PREFILL_MOVE, area, &grouped, &p, &late));
    assert_false(fv_plan_moves(&cost, FV_PLAN_PREFILL_VISIT, area, &latent, &p, &early));
    /* one head's whole context: 2048 pages of 32 KiB; 128 pages of 72 KiB */
    const size_t least = (size_t)64 << 20;
    assert_true(fv_plan_moves(&cost, FV_PLAN_PREFILL_MOVE, least, &grouped, &p, &late));
    assert_false(fv_plan_moves(&cost, FV_PLAN_PREFILL_MOVE, least - 1024U, &grouped, &p, &late));
    const size_t latents = (size_t)128 * 73728U;
    assert_true(fv_plan_moves(&cost, FV_PLAN_PREFILL_AUTO, latents, &latent, &p, &early));
    assert_false(fv_plan_moves(&cost, FV_PLAN_PREFILL_AUTO, latents - 1024U, &latent, &p, &early));
    assert_false(fv_plan_moves(&cost, FV_PLAN_PREFILL_MOVE, 0, &latent, &p, &early));
    /* a context on one part; scores that are added up between slices */
    const fv_ctl_item_t first = piece(0, 2048);
    assert_false(fv_plan_moves(&cost, FV_PLAN_PREFILL_MOVE, area, &grouped, &p, &first));
    latent.sharding = (fv_sharding_t){.mode = FV_SHARDING_LATENT, .groups = 2, .exact = true};
    assert_false(fv_plan_moves(&cost, FV_PLAN_PREFILL_MOVE, area, &latent, &p, &early));
}

/* Heads in rounds: each once, none that does not fit beside the others, and the bytes of the plan. */
static void test_rounds_of_moved_pages(void **state)
{
    fv_random_t random = {.state = seed + 3U};
    fv_plan_cost_t cost = fv_plan_cost_cpu();

    (void)state;
    for (int round = 0; round < 300; round++) {
        fv_model_spec_t spec = gqa(16, 8);
        fv_placement_t p = context((uint16_t)fv_random_int(&random, 2, 7), 64);
        fv_ctl_item_t item = piece(64U * (uint64_t)fv_random_int(&random, 0, 50),
                                   64U * (uint32_t)fv_random_int(&random, 1, 9));
        fv_moved_t m = fv_moved_make(&spec, &p, &item, 0);
        size_t area = fv_moved_least_bytes(&m) * (size_t)fv_random_int(&random, 1, 9);
        uint64_t most = 0;
        int32_t h = 0;

        while (h < m.n_heads) {
            int32_t end = fv_moved_round_end(&m, h, area);
            uint64_t n = 0;
            assert_true((end > h) && (end <= m.n_heads));
            for (; h < end; h++) {
                n += fv_moved_pages(&m, h);
            }
            assert_true(n * m.page_bytes <= area);
        }
        for (int32_t d = 0; d < m.n_parts; d++) {
            uint64_t n = 0;
            for (int32_t head = 0; head < m.n_heads; head++) {
                for (int64_t page = 0; page < (int64_t)m.n_pages; page++) {
                    n += fv_moved_has(&m, d, head, page) ? 1U : 0U;
                }
            }
            most = (n > most) ? n : most;
        }
        fv_plan_chunk_t c = fv_plan_chunk(&cost, &spec, &p, item.position, item.n_tokens);
        double sent = (double)(most * m.page_bytes) * (double)(m.n_parts - 1);
        assert_true(fabs(sent - c.move.sent_bytes) <= sent * 1e-9);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pairs_by_brute_force),
        cmocka_unit_test(test_chunks_are_nearly_balanced),
        cmocka_unit_test(test_whole_prompts_are_nearly_balanced),
        cmocka_unit_test(test_rows_and_bytes),
        cmocka_unit_test(test_where_kv_that_moves_is_cheaper),
        cmocka_unit_test(test_what_it_is_worth),
        cmocka_unit_test(test_visiting_is_near_the_best),
        cmocka_unit_test(test_the_better_way_is_chosen),
        cmocka_unit_test(test_rounds_of_moved_pages),
    };

    seed = fv_random_seed(1);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
