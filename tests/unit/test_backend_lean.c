/*
 * test_backend_lean.c - the cuts of the line of tiles: each tile once, shares equal, cut groups found again.
 */
#include "kernels/lean.h"
#include "tests/support/attn_case.h"
#include "tests/support/test.h"

#include <stdlib.h>
#include <string.h>

#define N_LINES    3000
#define GROUPS_MAX 40

static fv_lean_line_t random_line(fv_rng_t *rng, fv_lean_group_t *groups, bool uniform)
{
    fv_lean_line_t line = {.groups = groups,
                           .n_groups = (uint64_t)fv_rng_range(rng, 1, GROUPS_MAX)};
    uint32_t cost = (uint32_t)fv_rng_range(rng, 1, 100000);

    memset(groups, 0, GROUPS_MAX * sizeof(*groups));
    for (uint64_t g = 0; g < line.n_groups; g++) {
        groups[g].cost_begin = line.cost;
        groups[g].tile_cost = uniform ? cost : (uint32_t)fv_rng_range(rng, 1, 100000);
        groups[g].n_tiles = (int32_t)((fv_rng_range(rng, 0, 9) == 0) ? fv_rng_range(rng, 1, 4096)
                                                                     : fv_rng_range(rng, 1, 20));
        line.cost += (uint64_t)groups[g].tile_cost * (uint64_t)groups[g].n_tiles;
    }
    line.n_shares = (int32_t)fv_rng_range(rng, 1, 200);
    return line;
}

/* Walks every share as a thread would; counts[share] = tiles. Each group's tiles must come in order, gapless. */
static void walk(const fv_lean_line_t *line, int32_t *counts)
{
    int32_t next[GROUPS_MAX] = {0};

    for (int32_t share = 0; share < line->n_shares; share++) {
        uint64_t end = fv_lean_share_begin(line, share + 1);
        int n_cut = 0;

        counts[share] = 0;
        for (uint64_t g = fv_lean_first_group(line, share);
             (g < line->n_groups) && (line->groups[g].cost_begin < end); g++) {
            const fv_lean_group_t *group = &line->groups[g];
            fv_lean_piece_t piece = fv_lean_piece(line, group, share);

            assert_true((piece.begin <= piece.end) && (piece.end <= group->n_tiles));
            if (piece.begin == piece.end) {
                continue;
            }
            assert_int_equal(piece.begin, next[g]);
            assert_int_equal(fv_lean_share_of(line, group, piece.begin), share);
            assert_int_equal(fv_lean_share_of(line, group, piece.end - 1), share);
            next[g] = piece.end;
            counts[share] += piece.end - piece.begin;
            n_cut += (piece.end - piece.begin < group->n_tiles) ? 1 : 0;
        }
        assert_true(n_cut <= 2); /* two slots a share are enough */
    }
    for (uint64_t g = 0; g < line->n_groups; g++) {
        assert_int_equal(next[g], line->groups[g].n_tiles);
    }
}

static void test_each_tile_once(void **state)
{
    fv_lean_group_t groups[GROUPS_MAX];
    int32_t counts[200];
    fv_rng_t rng = {fv_test_seed(11)};

    (void)state;
    for (int n = 0; n < N_LINES; n++) {
        fv_lean_line_t line = random_line(&rng, groups, false);
        walk(&line, counts);
    }
}

static void test_equal_shares(void **state)
{
    fv_lean_group_t groups[GROUPS_MAX];
    int32_t counts[200];
    fv_rng_t rng = {fv_test_seed(12)};

    (void)state;
    for (int n = 0; n < N_LINES; n++) {
        fv_lean_line_t line = random_line(&rng, groups, true);
        int32_t fewest = INT32_MAX;
        int32_t most = 0;

        walk(&line, counts);
        for (int32_t share = 0; share < line.n_shares; share++) {
            fewest = (counts[share] < fewest) ? counts[share] : fewest;
            most = (counts[share] > most) ? counts[share] : most;
        }
        assert_true(most - fewest <= 1);
    }
}

/* One long row among short ones spans nearly all shares; sizes beyond 2^32 do not wrap. */
static void test_extreme_lines(void **state)
{
    fv_lean_group_t groups[GROUPS_MAX];
    int32_t counts[200];
    fv_lean_line_t line = {.groups = groups, .n_groups = 5, .n_shares = 132};

    (void)state;
    memset(groups, 0, sizeof(groups));
    for (int g = 0; g < 5; g++) {
        groups[g].cost_begin = line.cost;
        groups[g].tile_cost = 4000000000U;
        groups[g].n_tiles = (g < 4) ? 1 : 4096;
        line.cost += 4000000000ULL * (uint64_t)groups[g].n_tiles;
    }
    walk(&line, counts);
    assert_int_equal(fv_lean_share_of(&line, &groups[4], 4095), 131);
    assert_int_equal(fv_lean_share_of(&line, &groups[4], 0), 0);
    assert_true((counts[0] == 31) || (counts[0] == 32));
}

/* S2: a row is its head's kept list. Sessions of any length, heads of any pattern: shares differ by at most one tile. */
static void test_kept_lists_are_cut_evenly(void **state)
{
    fv_lean_group_t groups[GROUPS_MAX];
    int32_t counts[200];
    fv_rng_t rng = {fv_test_seed(13)};

    (void)state;
    for (int n = 0; n < N_LINES / 3; n++) {
        fv_policy_t policy = fv_s2_random(&rng, 32, 8);
        fv_lean_line_t line = {.groups = groups, .n_shares = (int32_t)fv_rng_range(&rng, 1, 200)};
        int32_t fewest = INT32_MAX;
        int32_t most = 0;

        memset(groups, 0, sizeof(groups));
        for (uint64_t g = 0; g < GROUPS_MAX; g++) {
            int64_t end = fv_rng_range(&rng, 1, 100000);
            fv_tile_query_t q = {.policy = policy,
                                 .shard = {.shard_tokens = FV_PAGE_TOKENS, .n_parts = 1},
                                 .q_begin = end - 1,
                                 .q_end = end,
                                 .kv_end = end,
                                 .head = fv_policy_head(&policy, (int32_t)(g % 8U), 4, 0),
                                 .causal = true};

            groups[g].tiles = fv_tiles_make(&q);
            groups[g].n_tiles = fv_tiles_count(&groups[g].tiles);
            groups[g].cost_begin = line.cost;
            groups[g].tile_cost = 1000;
            line.cost += 1000U * (uint64_t)groups[g].n_tiles;
            line.n_groups++;
        }
        walk(&line, counts);
        for (int32_t share = 0; share < line.n_shares; share++) {
            fewest = (counts[share] < fewest) ? counts[share] : fewest;
            most = (counts[share] > most) ? counts[share] : most;
        }
        assert_true(most - fewest <= 1);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_each_tile_once),
        cmocka_unit_test(test_equal_shares),
        cmocka_unit_test(test_extreme_lines),
        cmocka_unit_test(test_kept_lists_are_cut_evenly),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
