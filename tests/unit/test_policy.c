/*
 * test_policy.c - S2's patterns against the published definition: goldens, kept pages, what may be freed, coverage, presets.
 *
 * The goldens are block masks of the reference implementation. They are asked of the arithmetic (common/policy.h, kernels/
 * tiles.h) and of the oracle (kernels/attend_ref.c), which share nothing.
 */
#include "common/policy.h"
#include "kernels/kernels.h"
#include "tests/support/attn_case.h"
#include "tests/support/test.h"

#include <stdlib.h>
#include <string.h>

#define N_RANDOM   400
#define HEADS_MAX  64
#define BLOCKS_MAX 32

/* Does a head's row at the last token of block qb see block kb? Blocks of 64 and more, by the tile iterator. */
static bool tiles_see(const fv_policy_t *p, int32_t head, int64_t qb, int64_t kb)
{
    int64_t position = (qb + 1) * p->block_tokens - 1;
    fv_tile_query_t q = {.policy = *p,
                         .shard = {.shard_tokens = FV_PAGE_TOKENS, .n_parts = 1},
                         .q_begin = position,
                         .q_end = position + 1,
                         .kv_end = position + 1,
                         .head = head,
                         .causal = true};
    fv_tile_list_t list = fv_tiles_make(&q);

    for (int32_t i = 0; i < fv_tiles_count(&list); i++) {
        if (fv_tile_at(&q, &list, i).begin == kb * p->block_tokens) {
            return true;
        }
    }
    return false;
}

/*
 * The oracle's mask of a row in the last block: K is 0, so that all tokens seen have one weight, and V of a token is 1 in
 * the column of its block.
 */
static void
oracle_row(const fv_policy_t *p, int32_t n_kv_heads, int32_t group, int64_t qb, bool *out)
{
    size_t n_blocks = (size_t)qb + 1U;
    size_t n = n_blocks * (size_t)p->block_tokens;
    size_t n_heads = (size_t)n_kv_heads;
    size_t n_rows = n_heads * (size_t)group;
    double *zeros = calloc((n + 1U) * n_rows * 16U, sizeof(*zeros));
    double *v = calloc(n * n_heads * n_blocks, sizeof(*v));
    double *got = calloc(n_rows * n_blocks, sizeof(*got));

    assert_true((zeros != NULL) && (v != NULL) && (got != NULL));
    for (size_t j = 0; j < n; j++) {
        for (size_t h = 0; h < n_heads; h++) {
            v[(j * n_heads + h) * n_blocks + j / (size_t)p->block_tokens] = 1.0;
        }
    }
    fv_attend_ref_params_t params = {.n_tokens = 1,
                                     .position = (int64_t)n - 1,
                                     .kv_end = (int64_t)n,
                                     .n_kv_heads = n_kv_heads,
                                     .group = group,
                                     .head_dim_qk = 16,
                                     .head_dim_v = (int32_t)n_blocks,
                                     .softmax_scale = 1.0,
                                     .causal = true,
                                     .policy = *p,
                                     .q = zeros,
                                     .k = zeros,
                                     .v = v,
                                     .out = got};
    fv_attend_ref(&params);
    for (size_t i = 0; i < n_rows * n_blocks; i++) {
        out[i] = got[i] > 0.0;
    }
    free(zeros);
    free(v);
    free(got);
}

/* S1: blocks of 2 there, of 64 here: the mask is one of blocks. */
static void test_golden_mask(void **state)
{
    static const char *const k_rows[] = {"1",     "11",     "111",     "1011",
                                         "10011", "100111", "1001011", "10010011"};
    fv_policy_t p = {.kind = FV_POLICY_S2,
                     .block_tokens = 64,
                     .local_blocks = 2,
                     .vert_stride = 3,
                     .head_sliding_step = 3,
                     .homo_head = 1,
                     .n_heads = 4};
    bool oracle[2 * BLOCKS_MAX];

    (void)state;
    for (int64_t qb = 0; qb < (int64_t)FV_COUNT(k_rows); qb++) {
        oracle_row(&p, 2, 1, qb, oracle);
        assert_int_equal(strlen(k_rows[qb]), (size_t)qb + 1U);
        for (int64_t kb = 0; kb <= qb; kb++) {
            assert_int_equal(tiles_see(&p, 0, qb, kb), k_rows[qb][kb] == '1');
            assert_int_equal(oracle[kb], k_rows[qb][kb] == '1');
            assert_int_equal(oracle[qb + 1 + kb], k_rows[qb][kb] == '1'); /* the other head */
        }
    }
}

/* The blocks, -1 behind the last. */
static void
assert_row(const fv_policy_t *p, int32_t head, int64_t qb, const bool *oracle, const int *blocks)
{
    for (int64_t kb = 0; kb <= qb; kb++) {
        bool expected = false;

        for (const int *b = blocks; *b >= 0; b++) {
            expected = expected || (*b == kb);
        }
        assert_int_equal(tiles_see(p, head, qb, kb), expected);
        assert_int_equal(oracle[kb], expected);
    }
}

/* S2 and S5: 4 KV heads, 8 query heads; both heads of a group read the same. */
static void test_golden_heads(void **state)
{
    static const int k_blocks[4][8] = {
        {0, 8, 16, 22, 23, -1}, {7, 15, 22, 23, -1}, {6, 14, 22, 23, -1}, {5, 13, 21, 22, 23, -1}};
    fv_policy_t p = {.kind = FV_POLICY_S2,
                     .block_tokens = 64,
                     .local_blocks = 2,
                     .vert_stride = 8,
                     .head_sliding_step = 1,
                     .n_heads = 4};
    bool oracle[8 * BLOCKS_MAX];

    (void)state;
    oracle_row(&p, 4, 2, 23, oracle);
    for (int32_t h = 0; h < 4; h++) {
        assert_row(&p, h, 23, oracle + (size_t)(2 * h) * 24U, k_blocks[h]);
        assert_row(&p, h, 23, oracle + (size_t)(2 * h + 1) * 24U, k_blocks[h]);
    }
    p.num_dense_heads = 1; /* the last KV head */
    oracle_row(&p, 4, 2, 23, oracle);
    assert_row(&p, 0, 23, oracle, k_blocks[0]);
    for (size_t kb = 0; kb < 24U; kb++) {
        assert_true(oracle[6U * 24U + kb] && oracle[7U * 24U + kb] && !oracle[5U * 24U + 8U]);
        assert_true(tiles_see(&p, 3, 23, (int64_t)kb));
    }
}

/* S3: a pattern for each query head, one block ahead. */
static void test_offset_convention(void **state)
{
    fv_policy_t p;

    (void)state;
    assert_true(fv_policy_preset("phi3-small", &p));
    p.n_heads = 32;
    p.head_sliding_step = 1;
    assert_int_equal(fv_s2_residue(&p, 0), 7);
    assert_int_equal(fv_s2_residue(&p, 7), 0);
    for (int32_t h = 0; h < 24; h++) {
        assert_int_equal(fv_s2_residue(&p, h), fv_s2_residue(&p, h + 8));
    }
    p.head_sliding_step = -1; /* the other way round */
    assert_int_equal(fv_s2_residue(&p, 0), 7);
    assert_int_equal(fv_s2_residue(&p, 1), 0);
    assert_false(fv_policy_preset("phi4", &p));
}

/* S8: blocks kept of a context, fewest and most over the heads, as published. */
static void test_kept_blocks(void **state)
{
    static const struct {
        int64_t tokens;
        int32_t block, local, stride;
        int64_t fewest, most;
    } k_rows[] = {
        {4096, 64, 16, 8, 22, 22},    {8192, 64, 16, 8, 30, 30},     {32768, 64, 16, 8, 78, 78},
        {32768, 64, 8, 16, 39, 40},   {131072, 64, 16, 8, 270, 270}, {131072, 64, 8, 16, 135, 136},
        {131072, 128, 4, 16, 67, 68},
    };

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_rows); i++) {
        fv_policy_t p = {.kind = FV_POLICY_S2,
                         .block_tokens = k_rows[i].block,
                         .local_blocks = k_rows[i].local,
                         .vert_stride = k_rows[i].stride,
                         .head_sliding_step = 1,
                         .n_heads = k_rows[i].stride};
        int64_t fewest = INT64_MAX;
        int64_t most = 0;

        for (int32_t h = 0; h < p.n_heads; h++) {
            int64_t n_pages = k_rows[i].tokens / FV_PAGE_TOKENS;
            int64_t dead = fv_policy_dead_pages(&p, k_rows[i].tokens - 1);
            int64_t kept = n_pages - dead;

            for (int64_t page = 0; page < dead; page++) {
                kept += fv_policy_keeps(&p, h, 1, page);
            }
            kept /= p.block_tokens / FV_PAGE_TOKENS;
            fewest = fv_min64(fewest, kept);
            most = fv_max64(most, kept);
        }
        assert_int_equal(fewest, k_rows[i].fewest);
        assert_int_equal(most, k_rows[i].most);
    }
}

/* S8's trap: where each of 4 query heads has its own pattern, their KV head keeps the union. */
static void test_kept_by_a_group(void **state)
{
    fv_policy_t p;
    int64_t kept = 0;

    (void)state;
    assert_true(fv_policy_preset("phi3-small", &p));
    p.n_heads = 32;
    p.head_sliding_step = 1;
    for (int32_t h = 0; h < 8; h++) {
        kept = 128 - fv_policy_dead_pages(&p, 8191);
        for (int64_t page = 0; page < fv_policy_dead_pages(&p, 8191); page++) {
            kept += fv_policy_keeps(&p, h, 4, page);
        }
        assert_int_equal(kept, 72);
    }
}

/* S14: (heads, stride) -> residues that some head reads. */
static void test_coverage(void **state)
{
    static const int32_t k_rows[][3] = {
        {8, 8, 8}, {16, 16, 16}, {8, 16, 8}, {4, 16, 4}, {8, 12, 8}};
    fv_policy_t p = {
        .kind = FV_POLICY_S2, .block_tokens = 64, .local_blocks = 1, .head_sliding_step = 1};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_rows); i++) {
        p.n_heads = k_rows[i][0];
        p.vert_stride = k_rows[i][1];
        assert_int_equal(fv_s2_coverage(&p), k_rows[i][2]);
    }
    p.num_dense_heads = 1;
    assert_int_equal(fv_s2_coverage(&p), p.vert_stride);
    p.num_dense_heads = 0;
    p.homo_head = 1;
    assert_int_equal(fv_s2_coverage(&p), 1);
}

/* Does any row at `floor` or later, up to a horizon, of any query head of the KV head see the page? From the definition. */
static bool
is_ever_read(const fv_policy_t *p, int32_t kv_head, int32_t group, int64_t floor, int64_t page)
{
    for (int64_t row = floor; row < floor + 3 * FV_S2_BLOCK_MAX; row += FV_S2_BLOCK_MIN) {
        for (int64_t j = page * FV_PAGE_TOKENS; j < (page + 1) * FV_PAGE_TOKENS; j++) {
            int64_t t = row / FV_S2_BLOCK_MIN * FV_S2_BLOCK_MIN / p->block_tokens;
            int64_t b = j / p->block_tokens;

            for (int32_t g = 0; g < group; g++) {
                int32_t h = (p->pattern_per == FV_PATTERN_Q_HEAD) ? (kv_head * group + g) : kv_head;

                h = (p->homo_head != 0) ? 0 : h;
                if ((t - b < p->local_blocks) || (h >= p->n_heads - p->num_dense_heads) ||
                    ((b + (int64_t)h * p->head_sliding_step + p->head_sliding_offset) %
                         p->vert_stride ==
                     0)) {
                    return true;
                }
            }
        }
    }
    return false;
}

/* A page is freed exactly when nothing can read it any more. */
static void test_freed_is_dead(void **state)
{
    fv_rng_t rng = {fv_test_seed(41)};

    (void)state;
    for (int n = 0; n < N_RANDOM; n++) {
        int32_t group = (int32_t)fv_rng_range(&rng, 1, 4);
        int32_t n_kv_heads = (int32_t)fv_rng_range(&rng, 1, 6);
        fv_policy_t p = fv_s2_random(&rng, n_kv_heads * group, n_kv_heads);
        int64_t floor = fv_rng_range(&rng, 0, 3000);
        int32_t h = (int32_t)fv_rng_range(&rng, 0, n_kv_heads - 1);
        int64_t dead = fv_policy_dead_pages(&p, floor);

        for (int64_t page = 0; page <= floor / FV_PAGE_TOKENS; page++) {
            bool freed = (page < dead) && !fv_policy_keeps(&p, h, group, page);

            assert_int_equal(freed, !is_ever_read(&p, h, group, floor, page));
        }
    }
}

/* Rows are readable exactly when no page that they see has been freed. */
static void test_readable(void **state)
{
    fv_rng_t rng = {fv_test_seed(42)};

    (void)state;
    for (int n = 0; n < N_RANDOM; n++) {
        int32_t n_kv_heads = (int32_t)fv_rng_range(&rng, 1, 4);
        fv_policy_t p = fv_s2_random(&rng, n_kv_heads * 2, n_kv_heads);
        int64_t floor = fv_rng_range(&rng, 0, 3000);
        int64_t position = fv_rng_range(&rng, 0, 3000);
        int64_t end = position + fv_rng_range(&rng, 0, 100);
        bool lost = false;

        if (fv_rng_range(&rng, 0, 3) == 0) {
            p = (fv_policy_t){.kind = FV_POLICY_WINDOW,
                              .window_tokens = (int32_t)fv_rng_range(&rng, 1, 500),
                              .sink_tokens = (int32_t)fv_rng_range(&rng, 0, 200)};
        }
        for (int64_t page = fv_policy_dead_pages(&p, position); page * FV_PAGE_TOKENS < end;
             page++) {
            for (int32_t h = 0; h < n_kv_heads; h++) {
                lost = lost || ((page < fv_policy_dead_pages(&p, floor)) &&
                                !fv_policy_keeps(&p, h, 2, page));
            }
        }
        assert_int_equal(fv_policy_is_readable(&p, n_kv_heads, 2, floor, position, end), !lost);
        assert_true(fv_policy_is_readable(&p, n_kv_heads, 2, floor, floor, floor + 1000));
        assert_true(fv_policy_is_readable(&p, n_kv_heads, 2, floor, 0, 0)); /* begin anew */
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_mask),       cmocka_unit_test(test_golden_heads),
        cmocka_unit_test(test_offset_convention), cmocka_unit_test(test_kept_blocks),
        cmocka_unit_test(test_kept_by_a_group),   cmocka_unit_test(test_coverage),
        cmocka_unit_test(test_freed_is_dead),     cmocka_unit_test(test_readable),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
