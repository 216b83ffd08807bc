/*
 * test_kv_pool.c - the pool against a naive model of itself.
 *
 * Goal:   no page is handed out twice, overlaps another or lies outside the arena; counts and free memory are exact.
 * Method: random alloc, ref, unref over several page sizes; the model is a list of held pages with their counts.
 */
#include "tests/support/random.h"
#include "tests/support/test.h"
#include "worker/kv_pool.h"

#include <stdlib.h>
#include <string.h>

#define N_CLASSES 3
#define N_HELD    4096
#define N_OPS     20000

static const size_t k_page_bytes[N_CLASSES] = {4096, 98304, 16384};

typedef struct held {
    fv_page_ref_t page;
    uint32_t page_class, refs;
} held_t;

typedef struct model {
    fv_kv_pool_t *pool;
    size_t arena_bytes;
    uint8_t *owner; /* per FV_PAGE_UNIT of the arena: taken or not */
    held_t held[N_HELD];
    size_t n_held;
} model_t;

static void mark(model_t *m, const held_t *h, uint8_t from, uint8_t to)
{
    size_t n = k_page_bytes[h->page_class] / FV_PAGE_UNIT;

    assert_true((h->page + n) * FV_PAGE_UNIT <= m->arena_bytes);
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(m->owner[h->page + i], from);
        m->owner[h->page + i] = to;
    }
}

static void do_alloc(model_t *m, fv_random_t *r)
{
    fv_page_ref_t pages[64];
    uint32_t c = (uint32_t)fv_random_int(r, 0, N_CLASSES - 1);
    size_t n = (size_t)fv_random_int(r, 1, 64);
    uint64_t before = fv_kv_pool_bytes_free(m->pool);
    bool has = fv_kv_pool_has(m->pool, c, n);

    if (m->n_held + n > N_HELD) {
        return;
    }
    fv_status_t status = fv_kv_pool_alloc(m->pool, c, n, pages);
    assert_int_equal(status, has ? FV_OK : FV_ERR_EXHAUSTED);
    if (!has) { /* all or nothing */
        assert_int_equal(fv_kv_pool_bytes_free(m->pool), before);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        held_t *h = &m->held[m->n_held++];

        *h = (held_t){.page = pages[i], .page_class = c, .refs = 1};
        mark(m, h, 0, 1);
    }
}

static void do_unref(model_t *m, fv_random_t *r)
{
    size_t i = (size_t)fv_random_int(r, 0, (int64_t)m->n_held - 1);
    held_t *h = &m->held[i];

    fv_kv_pool_unref(m->pool, h->page);
    if (--h->refs == 0U) {
        mark(m, h, 1, 0);
        assert_int_equal(fv_kv_pool_refs(m->pool, h->page), 0);
        *h = m->held[--m->n_held];
    }
}

/* The figures follow from which pages are held. */
static void check_figures(const model_t *m)
{
    fv_kv_pool_stats_t stats;
    uint64_t bytes_used = 0;

    fv_kv_pool_stats(m->pool, &stats);
    for (size_t i = 0; i < m->n_held; i++) {
        bytes_used += k_page_bytes[m->held[i].page_class];
        assert_int_equal(fv_kv_pool_refs(m->pool, m->held[i].page), m->held[i].refs);
    }
    assert_int_equal(stats.n_pages_held, m->n_held);
    assert_int_equal(stats.bytes_free + stats.bytes_lost + bytes_used, stats.bytes_total);
    for (uint32_t c = 0; c < N_CLASSES; c++) {
        uint64_t n = fv_kv_pool_pages_free(m->pool, c) +
                     (uint64_t)stats.n_slabs_free * (stats.slab_bytes / k_page_bytes[c]);

        assert_true(fv_kv_pool_has(m->pool, c, n));
        assert_false(fv_kv_pool_has(m->pool, c, n + 1U));
    }
}

static void test_random_operations_match_a_naive_model(void **state)
{
    static model_t m;
    fv_random_t r = {fv_random_seed(1)};

    (void)state;
    m.arena_bytes = (size_t)12 << 20;
    m.owner = calloc(m.arena_bytes / FV_PAGE_UNIT, 1);
    assert_non_null(m.owner);
    assert_int_equal(fv_kv_pool_create(m.arena_bytes, 0, &m.pool), FV_OK);
    for (uint32_t c = 0; c < N_CLASSES; c++) {
        uint32_t got = UINT32_MAX;

        assert_int_equal(fv_kv_pool_class(m.pool, k_page_bytes[c], &got), FV_OK);
        assert_int_equal(got, c);
    }
    for (int i = 0; i < N_OPS; i++) {
        int64_t op = fv_random_int(&r, 0, 99);
        bool growing = (i / 2000) % 2 == 0; /* the pool fills, then empties, several times */

        if (op < (growing ? 8 : 1)) {
            do_alloc(&m, &r);
        } else if ((op < 30) && (m.n_held > 0U)) {
            held_t *h = &m.held[fv_random_int(&r, 0, (int64_t)m.n_held - 1)];

            fv_kv_pool_ref(m.pool, h->page);
            h->refs++;
        } else if (m.n_held > 0U) {
            do_unref(&m, &r);
        }
        if (i % 500 == 0) {
            check_figures(&m);
        }
    }
    while (m.n_held > 0U) {
        do_unref(&m, &r);
    }
    check_figures(&m);
    fv_kv_pool_stats_t stats;
    fv_kv_pool_stats(m.pool, &stats);
    assert_int_equal(stats.bytes_free, m.arena_bytes);
    assert_int_equal(stats.n_slabs_free, stats.n_slabs);
    fv_kv_pool_destroy(m.pool);
    free(m.owner);
}

/* An emptied slab serves another page size. */
static void test_a_slab_changes_its_page_size(void **state)
{
    fv_kv_pool_t *pool = NULL;
    fv_page_ref_t pages[256];
    uint32_t small = 0;
    uint32_t large = 0;

    (void)state;
    assert_int_equal(fv_kv_pool_create((size_t)1 << 20, (size_t)1 << 20, &pool), FV_OK);
    assert_int_equal(fv_kv_pool_class(pool, 4096, &small), FV_OK);
    assert_int_equal(fv_kv_pool_class(pool, 131072, &large), FV_OK);
    assert_int_equal(fv_kv_pool_alloc(pool, small, 256, pages), FV_OK);
    assert_int_equal(fv_kv_pool_take(pool, small), FV_PAGE_NONE);
    for (int i = 0; i < 255; i++) {
        fv_kv_pool_unref(pool, pages[i]);
    }
    assert_false(fv_kv_pool_has(pool, large, 1)); /* one small page holds the slab */
    fv_kv_pool_unref(pool, pages[255]);
    assert_true(fv_kv_pool_has(pool, large, 8));
    assert_int_equal(fv_kv_pool_alloc(pool, large, 8, pages), FV_OK);
    assert_int_equal(fv_kv_pool_alloc(pool, large, 1, pages), FV_ERR_EXHAUSTED);
    assert_string_equal(fv_error_context(), "KV memory: 131072 bytes needed, 0 free");
    fv_kv_pool_destroy(pool);
}

static void test_small_arenas_work_for_every_page_size(void **state)
{
    static const size_t arenas[] = {128U << 10, 300U << 10, 1U << 20, 4U << 20, 5U << 20};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(arenas); i++) {
        fv_kv_pool_t *pool = NULL;
        uint32_t c = 0;

        assert_int_equal(fv_kv_pool_create(arenas[i], 0, &pool), FV_OK);
        assert_int_equal(fv_kv_pool_class(pool, FV_KV_SLAB_BYTES_MIN, &c), FV_OK);
        assert_true(fv_kv_pool_has(pool, c, 1));
        fv_kv_pool_destroy(pool);
    }
}

static void test_bad_sizes_are_refused(void **state)
{
    fv_kv_pool_t *pool = NULL;
    uint32_t c = 0;

    (void)state;
    assert_int_equal(fv_kv_pool_create(1000, 0, &pool), FV_ERR_INVALID_ARG);
    assert_int_equal(fv_kv_pool_create((size_t)1 << 24, 300000, &pool), FV_ERR_INVALID_ARG);
    assert_int_equal(fv_kv_pool_create((size_t)1 << 43, 0, &pool), FV_ERR_INVALID_ARG);
    assert_int_equal(fv_kv_pool_create((size_t)1 << 22, 0, &pool), FV_OK);
    assert_int_equal(fv_kv_pool_class(pool, 2048, &c), FV_ERR_INVALID_ARG);
    assert_int_equal(fv_kv_pool_class(pool, 4096 + 512, &c), FV_ERR_INVALID_ARG);
    assert_int_equal(fv_kv_pool_class(pool, FV_KV_PAGE_BYTES_MAX + 1024U, &c), FV_ERR_INVALID_ARG);
    for (uint32_t i = 0; i < FV_KV_POOL_CLASSES_MAX; i++) {
        assert_int_equal(fv_kv_pool_class(pool, 4096 + (size_t)i * 1024, &c), FV_OK);
    }
    assert_int_equal(fv_kv_pool_class(pool, 131072, &c), FV_ERR_EXHAUSTED);
    fv_kv_pool_destroy(pool);
    /* the widest latents need slabs of half a MiB: an arena for smaller ones says so */
    assert_int_equal(fv_kv_pool_create((size_t)300 << 10, 0, &pool), FV_OK);
    assert_int_equal(fv_kv_pool_class(pool, FV_KV_PAGE_BYTES_MAX, &c), FV_ERR_INVALID_ARG);
    assert_string_equal(fv_error_context(),
                        "KV page size: given 294912 bytes, expected at most the "
                        "slab size of this arena, 131072");
    fv_kv_pool_destroy(pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_operations_match_a_naive_model),
        cmocka_unit_test(test_a_slab_changes_its_page_size),
        cmocka_unit_test(test_small_arenas_work_for_every_page_size),
        cmocka_unit_test(test_bad_sizes_are_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
