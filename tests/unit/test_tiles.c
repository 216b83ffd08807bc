/*
 * test_tiles.c - the list of tiles against the definition of visibility, token by token.
 *
 * For random policies, shards and rows: every token that a row sees lies in exactly one listed tile of its part, tiles
 * ascend, `full` tells the truth, and no listed tile is beyond kv_end.
 */
#include "kernels/tiles.h"
#include "tests/support/attn_case.h"
#include "tests/support/test.h"

#include <stdlib.h>

#define N_QUERIES 4000

/* The definition, from the head comment of tiles.h. */
static bool sees(const fv_tile_query_t *q, int64_t p, int64_t j)
{
    bool seen = (j < q->kv_end) && (!q->causal || (j <= p));

    if (q->policy.kind == FV_POLICY_WINDOW) {
        int64_t distance = (p > j) ? (p - j) : (j - p);
        seen = seen && ((distance < q->policy.window_tokens) || (j < q->policy.sink_tokens));
    }
    if (q->policy.kind == FV_POLICY_S2) {
        const fv_policy_t *s = &q->policy;
        int64_t t = p / s->block_tokens;
        int64_t b = j / s->block_tokens;

        seen = seen && (b <= t) &&
               ((t - b < s->local_blocks) || (q->head >= s->n_heads - s->num_dense_heads) ||
                ((b + (int64_t)q->head * s->head_sliding_step + s->head_sliding_offset) %
                     s->vert_stride ==
                 0));
    }
    return seen;
}

static fv_tile_query_t random_query(fv_rng_t *rng)
{
    fv_tile_query_t q = {.causal = fv_rng_range(rng, 0, 1) == 0};

    q.kv_end = (fv_rng_range(rng, 0, 9) == 0) ? 0 : fv_rng_range(rng, 0, 1200);
    q.q_begin = fv_rng_range(rng, 0, q.kv_end + 200);
    q.q_end = q.q_begin + fv_rng_range(rng, 1, 150);
    q.policy.kind = (int32_t)fv_rng_range(rng, FV_POLICY_DENSE, FV_POLICY_WINDOW);
    q.policy.window_tokens = (int32_t)fv_rng_range(rng, 1, 300);
    q.policy.sink_tokens = (int32_t)(fv_rng_range(rng, 0, 1) * fv_rng_range(rng, 0, 300));
    if (fv_rng_range(rng, 0, 1) == 0) {
        int32_t n_heads = (int32_t)fv_rng_range(rng, 1, 12);

        q.policy = fv_s2_random(rng, n_heads * 4, n_heads);
        q.head =
            (q.policy.homo_head != 0) ? 0 : (int32_t)fv_rng_range(rng, 0, q.policy.n_heads - 1);
        q.causal = true;
    }
    q.shard.shard_tokens = FV_PAGE_TOKENS * (uint32_t)fv_rng_range(rng, 1, 4);
    q.shard.n_parts = (uint16_t)fv_rng_range(rng, 1, 7);
    q.shard.part = (uint16_t)fv_rng_range(rng, 0, q.shard.n_parts - 1);
    return q;
}

static bool owns(const fv_kv_shard_t *shard, int64_t token)
{
    return (token / shard->shard_tokens) % shard->n_parts == shard->part;
}

/* Marks what the tiles hold; checks each tile by itself. */
static void walk(const fv_tile_query_t *q, uint8_t *covered)
{
    fv_tile_list_t list = fv_tiles_make(q);
    int64_t previous = -1;

    for (int32_t i = 0; i < fv_tiles_count(&list); i++) {
        fv_tile_t tile = fv_tile_at(q, &list, i);
        bool full = true;
        bool any = false;

        assert_true(tile.begin > previous);
        assert_true((tile.n_tokens >= 1) && (tile.n_tokens <= FV_PAGE_TOKENS));
        assert_true(tile.begin + tile.n_tokens <= q->kv_end);
        assert_true((tile.n_tokens == FV_PAGE_TOKENS) || (tile.begin + tile.n_tokens == q->kv_end));
        assert_true(owns(&q->shard, tile.begin));
        previous = tile.begin;
        for (int64_t j = tile.begin; j < tile.begin + tile.n_tokens; j++) {
            covered[j]++;
            for (int64_t p = q->q_begin; p < q->q_end; p++) {
                full = full && sees(q, p, j);
                any = any || sees(q, p, j);
            }
        }
        /* `full` may be modest (a mask costs time), but never wrong */
        assert_true(full || !tile.full);
        /* kept tiles and no others, but for the last page: its strided blocks may not have come yet */
        assert_true(any || (q->policy.kind != FV_POLICY_S2) || (tile.n_tokens < FV_PAGE_TOKENS));
    }
}

static void test_tiles_cover(void **state)
{
    fv_rng_t rng = {fv_test_seed(7)};
    uint8_t *covered = malloc(2048);

    (void)state;
    assert_non_null(covered);
    for (int n = 0; n < N_QUERIES; n++) {
        fv_tile_query_t q = random_query(&rng);

        for (int64_t j = 0; j < q.kv_end; j++) {
            covered[j] = 0;
        }
        walk(&q, covered);
        for (int64_t j = 0; j < q.kv_end; j++) {
            bool seen = false;
            for (int64_t p = q.q_begin; p < q.q_end; p++) {
                seen = seen || sees(&q, p, j);
            }
            assert_true(covered[j] <= 1);
            if (seen && owns(&q.shard, j)) {
                assert_int_equal(covered[j], 1);
            }
        }
    }
    free(covered);
}

/* Tiles that nothing sees are not read: bounds on the count for the shapes that matter. */
static void test_tiles_are_few(void **state)
{
    fv_tile_query_t q = {.q_begin = 9999, .q_end = 10000, .kv_end = 10000, .causal = true};
    fv_tile_list_t list;

    (void)state;
    q.shard = (fv_kv_shard_t){.shard_tokens = FV_PAGE_TOKENS, .n_parts = 1, .part = 0};
    list = fv_tiles_make(&q);
    assert_int_equal(fv_tiles_count(&list), 157);
    q.policy = (fv_policy_t){.kind = FV_POLICY_WINDOW, .window_tokens = 128, .sink_tokens = 4};
    list = fv_tiles_make(&q);
    assert_int_equal(fv_tiles_count(&list), 4); /* 1 of sinks, 3 that the window touches */
    assert_int_equal(list.a_end, 1);
    q.kv_end = 0;
    list = fv_tiles_make(&q);
    assert_int_equal(fv_tiles_count(&list), 0);
}

static void test_row_range(void **state)
{
    fv_rng_t rng = {fv_test_seed(8)};

    (void)state;
    for (int n = 0; n < N_QUERIES; n++) {
        fv_tile_query_t q = random_query(&rng);
        fv_row_range_t r = fv_row_range(&q, q.q_begin);

        assert_true((r.sink <= r.begin) && (r.begin <= r.end) && (r.end <= q.kv_end));
        for (int64_t j = 0; j < q.kv_end; j++) {
            bool in_range = (j < r.sink) || ((j >= r.begin) && (j < r.end));

            if ((q.policy.kind == FV_POLICY_S2) && (j < r.begin)) {
                uint32_t quarters = fv_s2_quarters(&q.policy, q.head, j / FV_PAGE_TOKENS);
                in_range = ((quarters >> (j % FV_PAGE_TOKENS / FV_S2_BLOCK_MIN)) & 1U) != 0U;
            }
            assert_int_equal(in_range, sees(&q, q.q_begin, j));
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_row_range),
        cmocka_unit_test(test_tiles_cover),
        cmocka_unit_test(test_tiles_are_few),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
