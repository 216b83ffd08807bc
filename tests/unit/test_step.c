/*
 * test_step.c - placement and step arithmetic against brute force.
 *
 * Method: random placements, specs and items; every token and every row is given to its owner one by one,
 *         and the closed formulas of placement.h and step.c must say the same.
 */
#include "proto/step.h"
#include "tests/property/prop_wire_random.h"
#include "tests/support/test.h"

#include <math.h>
#include <string.h>

#define N_CASES    400
#define TOKENS_MAX 3000
#define RANKS_MAX  9
#define ROWS_MAX   70000

static fv_random_t g_random;

static fv_placement_t random_placement(int32_t n_kv_heads)
{
    fv_placement_t p = {0};
    uint16_t first = (uint16_t)fv_random_below(&g_random, 100);

    do {
        p.n_head_parts = (uint16_t)(1U + fv_random_below(&g_random, 4));
    } while (p.n_head_parts > n_kv_heads);
    p.n_ctx_parts = (uint16_t)(1U + fv_random_below(&g_random, 5));
    p.shard_tokens = (uint32_t)(FV_PAGE_TOKENS * (1U + fv_random_below(&g_random, 4)));
    for (uint16_t i = 0; i < p.n_head_parts * p.n_ctx_parts; i++) { /* distinct, in no order */
        p.ranks[i] = (uint16_t)(first + ((i % 2U == 0) ? i : (200U + i)));
    }
    return p;
}

static void random_spec(fv_model_spec_t *spec)
{
    memset(spec, 0, sizeof(*spec));
    spec->n_kv_heads = 1 + (int32_t)fv_random_below(&g_random, 9);
    spec->n_q_heads = spec->n_kv_heads * (1 + (int32_t)fv_random_below(&g_random, 3));
    spec->head_dim_qk = 16 + (8 * (int32_t)fv_random_below(&g_random, 4));
    spec->head_dim_v = 16 + (8 * (int32_t)fv_random_below(&g_random, 4));
}

static fv_ctl_item_t random_item(void)
{
    fv_ctl_item_t item = {.position = fv_random_below(&g_random, TOKENS_MAX),
                          .n_tokens = 1U + (uint32_t)fv_random_below(&g_random, 300),
                          .dtype = (uint16_t)(1U + fv_random_below(&g_random, 3)),
                          .flags = (uint16_t)fv_random_below(&g_random, 8)};

    item.flags |= (fv_random_below(&g_random, 2) == 0) ? FV_ITEM_MOVES_KV : 0U;

    item.kv_end =
        ((item.flags & FV_ITEM_APPEND) != 0) ? (item.position + item.n_tokens) : item.position;
    return item;
}

static void test_every_token_has_one_owner(void **state)
{
    (void)state;
    for (int i = 0; i < N_CASES; i++) {
        fv_placement_t p = random_placement(4);
        uint64_t n_tokens = fv_random_below(&g_random, TOKENS_MAX);
        uint64_t owned[RANKS_MAX] = {0};
        int32_t n_active = 0;

        for (uint64_t t = 0; t < n_tokens; t++) {
            int32_t part = (int32_t)((t / p.shard_tokens) % p.n_ctx_parts);

            assert_int_equal(fv_placement_part_of(&p, t), part);
            assert_int_equal(fv_placement_local(&p, t),
                             owned[part]); /* ascending, without a hole */
            assert_int_equal(fv_placement_global(&p, part, owned[part]), t);
            owned[part]++;
        }
        for (int32_t part = 0; part < p.n_ctx_parts; part++) {
            n_active += (owned[part] > 0) ? 1 : 0;
            assert_int_equal(fv_placement_tokens(&p, part, n_tokens), owned[part]);
            assert_int_equal(fv_placement_pages(&p, part, n_tokens),
                             (owned[part] + FV_PAGE_TOKENS - 1U) / FV_PAGE_TOKENS);
            assert_true((part < n_active) || (owned[part] == 0)); /* active parts come first */
        }
        assert_int_equal(fv_placement_active_parts(&p, n_tokens), n_active);
    }
}

static void test_every_head_has_one_part(void **state)
{
    (void)state;
    for (int32_t n_heads = 1; n_heads <= 40; n_heads++) {
        for (int32_t n_parts = 1; n_parts <= n_heads; n_parts++) {
            fv_placement_t p = {
                .n_head_parts = (uint16_t)n_parts, .n_ctx_parts = 1, .shard_tokens = 64};

            assert_int_equal(fv_placement_head_begin(&p, n_heads, 0), 0);
            assert_int_equal(fv_placement_head_begin(&p, n_heads, n_parts), n_heads);
            for (int32_t hp = 0; hp < n_parts; hp++) {
                int32_t n = fv_placement_head_begin(&p, n_heads, hp + 1) -
                            fv_placement_head_begin(&p, n_heads, hp);
                assert_true((n == n_heads / n_parts) || (n == (n_heads / n_parts) + 1));
            }
        }
    }
}

static void test_cells_are_found(void **state)
{
    (void)state;
    for (int i = 0; i < N_CASES; i++) {
        fv_placement_t p = random_placement(4);

        for (int32_t cell = 0; cell < p.n_head_parts * p.n_ctx_parts; cell++) {
            assert_int_equal(fv_placement_cell(&p, p.ranks[cell]), cell);
        }
        assert_int_equal(fv_placement_cell(&p, 60000), -1);
    }
}

static void test_rows_are_cut_once(void **state)
{
    (void)state;
    for (uint64_t n_rows = 0; n_rows <= 200; n_rows++) {
        for (int32_t n_parts = 1; n_parts <= 17; n_parts++) {
            assert_int_equal(fv_rows_begin(n_rows, n_parts, 0), 0);
            assert_int_equal(fv_rows_begin(n_rows, n_parts, n_parts), n_rows);
            for (int32_t d = 0; d < n_parts; d++) {
                uint64_t n =
                    fv_rows_begin(n_rows, n_parts, d + 1) - fv_rows_begin(n_rows, n_parts, d);
                uint64_t even = n_rows / (uint64_t)n_parts;
                assert_true((n == even) || (n == even + 1U));
            }
        }
    }
}

/* Walks the runs of one share; marks each token of the item. */
static uint64_t mark_runs(const fv_placement_t *p,
                          const fv_item_share_t *share,
                          const fv_ctl_item_t *item,
                          uint8_t *seen)
{
    uint64_t cursor = 0;
    uint64_t n = 0;
    uint64_t next = 0;
    fv_token_run_t run;

    while (fv_token_run_next(p, share->cp, item, &cursor, &run)) {
        assert_true((run.n_tokens > 0) && (run.item_begin >= next));
        for (uint64_t t = 0; t < run.n_tokens; t++) {
            uint64_t token = item->position + run.item_begin + t;

            assert_int_equal(fv_placement_part_of(p, token), share->cp);
            assert_int_equal(fv_placement_local(p, token), run.local_begin + t);
            seen[run.item_begin + t]++;
        }
        next = run.item_begin + run.n_tokens;
        n += run.n_tokens;
    }
    return n;
}

/* What all shares of one item add up to. */
typedef struct totals {
    uint64_t q_bytes, k_bytes, v_bytes, out_bytes, lse_bytes;
    uint8_t rows[ROWS_MAX]; /* times each (token, q head) is returned */
} totals_t;

/* All tokens; of an item whose KV moves two blocks of about the same size, one as far from the front as the other from the end. */
static void check_spans(const fv_ctl_item_t *item, const fv_item_share_t *s)
{
    if (s->n_movers == 0) {
        assert_int_equal(s->n_spans, 1);
        assert_int_equal(fv_share_tokens(s), item->n_tokens);
        return;
    }
    uint64_t block = fv_div_up(item->n_tokens, 2U * (uint64_t)s->n_movers);
    double sum = 0.0;
    assert_int_equal(s->n_parts, 1);
    assert_true(fv_share_tokens(s) <= 2U * block);
    assert_true(fv_share_tokens(s) + 2U >= 2U * block);
    for (int32_t i = 0; i < s->n_spans; i++) {
        const fv_token_span_t *span = &s->spans[i];
        assert_true(span->n > 0U);
        sum += (double)span->n * ((double)span->begin + (double)(span->n - 1U) / 2.0);
    }
    double even = (double)item->n_tokens * (double)(item->n_tokens - 1U) / 2.0 / s->n_movers;
    assert_true(fabs(sum - even) <= 2.0 * (double)item->n_tokens); /* pairs of a causal mask */
}

static void add_share(const fv_model_spec_t *spec,
                      const fv_placement_t *p,
                      const fv_ctl_item_t *item,
                      uint32_t rank,
                      totals_t *t)
{
    uint8_t seen[300] = {0};
    fv_item_share_t s;
    int32_t group = fv_model_group(spec);
    size_t e = fv_dtype_bytes((fv_dtype_t)item->dtype);

    if (!fv_item_share(spec, p, item, rank, &s)) {
        return;
    }
    uint64_t n_heads = (uint64_t)(s.part.head_end - s.part.head_begin);
    uint64_t n_q_local = n_heads * (uint64_t)group;
    assert_int_equal(mark_runs(p, &s, item, seen), s.n_kv_tokens);
    assert_int_equal(s.n_rows, item->n_tokens * n_q_local);
    assert_int_equal(s.q_bytes, fv_share_tokens(&s) * n_q_local * (uint64_t)spec->head_dim_qk * e);
    check_spans(item, &s);
    assert_true((fv_share_in_bytes(&s) % FV_STEP_ALIGN) == 0);
    assert_true((fv_share_in_bytes(&s) >= s.q_bytes + s.k_bytes + s.v_bytes) &&
                (fv_share_out_bytes(&s) >= s.out_bytes + s.lse_bytes));
    /* every context part of a head part gets all of q, unless the KV moves */
    t->q_bytes += ((s.cp == 0) || (s.n_movers > 0)) ? s.q_bytes : 0;
    t->k_bytes += s.k_bytes;
    t->v_bytes += s.v_bytes;
    t->out_bytes += s.out_bytes;
    t->lse_bytes += s.lse_bytes;
    uint64_t begin = 0;
    uint64_t end = 0;
    for (int32_t i = 0; fv_share_rows(&s, i, &begin, &end); i++) {
        for (uint64_t r = begin; r < end; r++) {
            uint64_t q_head = ((uint64_t)s.part.head_begin * (uint64_t)group) + (r % n_q_local);

            t->rows[((r / n_q_local) * (uint64_t)spec->n_q_heads) + q_head]++;
        }
    }
}

static void check_totals(const fv_model_spec_t *spec, const fv_ctl_item_t *item, const totals_t *t)
{
    uint64_t e = fv_dtype_bytes((fv_dtype_t)item->dtype);
    uint64_t n_rows = (uint64_t)item->n_tokens * (uint64_t)spec->n_q_heads;
    uint64_t n_kv = ((item->flags & FV_ITEM_APPEND) != 0)
                        ? ((uint64_t)item->n_tokens * (uint64_t)spec->n_kv_heads)
                        : 0;

    assert_int_equal(t->q_bytes, n_rows * (uint64_t)spec->head_dim_qk * e);
    assert_int_equal(t->k_bytes, n_kv * (uint64_t)spec->head_dim_qk * e);
    assert_int_equal(t->v_bytes, n_kv * (uint64_t)spec->head_dim_v * e);
    assert_int_equal(t->out_bytes, n_rows * (uint64_t)spec->head_dim_v * e);
    assert_int_equal(t->lse_bytes, ((item->flags & FV_ITEM_WANT_LSE) != 0) ? (n_rows * 4U) : 0U);
    for (uint64_t r = 0; r < n_rows; r++) {
        assert_int_equal(t->rows[r], 1);
    }
}

static void test_shares_cover_an_item_exactly(void **state)
{
    static totals_t totals;
    static fv_model_spec_t spec;

    (void)state;
    for (int i = 0; i < N_CASES; i++) {
        random_spec(&spec);
        fv_placement_t p = random_placement(spec.n_kv_heads);
        fv_ctl_item_t item = random_item();

        memset(&totals, 0, sizeof(totals));
        assert_true((size_t)item.n_tokens * (size_t)spec.n_q_heads <= ROWS_MAX);
        for (uint32_t rank = 0; rank < 400; rank++) {
            add_share(&spec, &p, &item, rank, &totals);
        }
        check_totals(&spec, &item, &totals);
    }
}

/* Parts that the context has not reached have no share; an empty context is answered by part 0. */
static void test_parts_without_tokens_take_no_part(void **state)
{
    fv_model_spec_t spec = {.n_q_heads = 2, .n_kv_heads = 1, .head_dim_qk = 16, .head_dim_v = 16};
    fv_placement_t p = {
        .n_head_parts = 1, .n_ctx_parts = 3, .shard_tokens = 64, .ranks = {5, 6, 7}};
    fv_ctl_item_t item = {.position = 63,
                          .kv_end = 64,
                          .n_tokens = 1,
                          .dtype = FV_DTYPE_F32,
                          .flags = FV_ITEM_APPEND};
    fv_item_share_t s;

    (void)state;
    assert_true(fv_item_share(&spec, &p, &item, 5, &s));
    assert_int_equal(s.n_parts, 1);
    assert_false(fv_item_share(&spec, &p, &item, 6, &s));
    assert_false(fv_item_share(&spec, &p, &item, 4, &s));
    item.position = 64;
    item.kv_end = 65;
    assert_true(fv_item_share(&spec, &p, &item, 6, &s));
    assert_int_equal(s.n_kv_tokens, 1);
    assert_int_equal(s.n_parts, 2);
    assert_false(fv_item_share(&spec, &p, &item, 7, &s));
    item = (fv_ctl_item_t){.n_tokens = 3, .dtype = FV_DTYPE_F16}; /* query only, nothing stored */
    assert_true(fv_item_share(&spec, &p, &item, 5, &s));
    assert_int_equal(s.row_end - s.row_begin, 6);
    assert_int_equal(s.k_bytes + s.v_bytes, 0);
    assert_false(fv_item_share(&spec, &p, &item, 6, &s));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_token_has_one_owner),
        cmocka_unit_test(test_every_head_has_one_part),
        cmocka_unit_test(test_cells_are_found),
        cmocka_unit_test(test_rows_are_cut_once),
        cmocka_unit_test(test_shares_cover_an_item_exactly),
        cmocka_unit_test(test_parts_without_tokens_take_no_part),
    };

    g_random = fv_random_begin("test_step");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
