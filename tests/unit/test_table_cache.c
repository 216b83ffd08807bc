/*
 * test_table_cache.c - the bookkeeping of page tables on the device: whatever the history, what it says stands there does.
 *
 * Method: an array plays the device's memory; each step sends what the cache asks for and then looks at every table it
 *         used, entry by entry.
 */
#include "kernels/table_cache.h"
#include "tests/support/random.h"
#include "tests/support/test.h"

#include <stdlib.h>
#include <string.h>

#define WORDS   8192U
#define TABLES  40U
#define HEADS   12U
#define N_MAX   70U
#define IN_STEP 6U
#define N_STEPS 20000

typedef struct table {
    uint64_t id, version;
    uint32_t n_heads, n;
    uint32_t entries[HEADS][N_MAX];
} table_t;

static uint64_t seed;
static table_t tables[TABLES];
static uint32_t device[WORDS];

static void renew(table_t *t, fv_random_t *r, uint64_t *next_id)
{
    t->id = (*next_id)++;
    t->version = (uint64_t)fv_random_int(r, 0, 5);
    t->n_heads = (uint32_t)fv_random_int(r, 1, HEADS);
    t->n = (uint32_t)fv_random_int(r, 1, 20);
    for (uint32_t h = 0; h < HEADS; h++) {
        for (uint32_t p = 0; p < N_MAX; p++) {
            t->entries[h][p] = (uint32_t)fv_random_next(r);
        }
    }
}

/* What happens to a table between steps: it grows, is cut and grows elsewhere, or is closed. */
static void change(table_t *t, fv_random_t *r, uint64_t *next_id)
{
    const int64_t what = fv_random_int(r, 0, 19);

    if (what == 0) {
        renew(t, r, next_id);
    } else if (what == 1) {
        t->n = (uint32_t)fv_random_int(r, 1, t->n);
        t->version++;
        for (uint32_t h = 0; h < HEADS; h++) {
            for (uint32_t p = t->n - 1U; p < N_MAX; p++) { /* the last one too: copy on write */
                t->entries[h][p] = (uint32_t)fv_random_next(r);
            }
        }
    } else if ((what < 10) && (t->n < N_MAX)) {
        t->n += (uint32_t)fv_random_int(r, 1, (t->n + 4U < N_MAX) ? 4 : 1);
    }
}

static void send(const table_t *t, const fv_table_view_t *view)
{
    for (uint32_t h = 0; h < t->n_heads; h++) {
        for (uint32_t p = view->n_known; p < t->n; p++) {
            device[view->offset + h * view->stride + p] = t->entries[h][p];
        }
    }
}

static void look(const table_t *t, const fv_table_view_t *view)
{
    assert_true(t->n <= view->stride);
    assert_int_equal(view->stride % 4U, 0);
    assert_int_equal(view->offset % FV_TABLE_BLOCK_WORDS, 0);
    assert_true((uint64_t)view->offset + (uint64_t)t->n_heads * view->stride <= WORDS);
    for (uint32_t h = 0; h < t->n_heads; h++) {
        assert_memory_equal(&device[view->offset + h * view->stride], t->entries[h],
                            t->n * sizeof(t->entries[h][0]));
    }
}

static void test_random_histories(void **state)
{
    fv_random_t r = {seed};
    fv_table_cache_t *cache = NULL;
    uint64_t next_id = 1;
    uint64_t n_kept = 0;
    uint64_t n_refused = 0;

    (void)state;
    assert_int_equal(fv_table_cache_create(WORDS, &cache), FV_OK);
    for (uint32_t i = 0; i < TABLES; i++) {
        renew(&tables[i], &r, &next_id);
    }
    for (int step = 0; step < N_STEPS; step++) {
        fv_table_view_t views[IN_STEP];
        const table_t *used[IN_STEP];
        uint32_t n_used = 0;

        fv_table_cache_begin(cache);
        for (uint32_t i = 0; i < IN_STEP; i++) {
            table_t *t = &tables[fv_random_int(&r, 0, TABLES - 1)];
            bool is_new = true;

            for (uint32_t j = 0; j < n_used; j++) {
                is_new = is_new && (used[j] != t);
            }
            if (is_new) {
                change(t, &r, &next_id);
            }
            if (fv_table_cache_use(cache, t->id, t->version, t->n_heads, t->n, &views[n_used])) {
                n_kept += (views[n_used].n_known > 0U);
                used[n_used++] = t;
            } else {
                n_refused++;
            }
        }
        if (fv_random_int(&r, 0, 9) == 0) {
            fv_table_cache_undo(cache);
            continue;
        }
        for (uint32_t i = 0; i < n_used; i++) {
            send(used[i], &views[i]);
        }
        for (uint32_t i = 0; i < n_used; i++) { /* after all were sent: none lies on another */
            look(used[i], &views[i]);
        }
    }
    assert_true(n_kept > (uint64_t)N_STEPS);    /* it does keep */
    assert_true(n_refused < (uint64_t)N_STEPS); /* and makes room */
    fv_table_cache_destroy(cache);
}

/* Everything is given back: after any history one table of the whole area fits. */
static void test_blocks_join_again(void **state)
{
    fv_table_cache_t *cache = NULL;
    fv_table_view_t view;

    (void)state;
    assert_int_equal(fv_table_cache_create(WORDS, &cache), FV_OK);
    for (uint64_t id = 1; id < 500U; id++) {
        fv_table_cache_begin(cache);
        assert_true(fv_table_cache_use(cache, id, 1, 1U + (uint32_t)id % 8U,
                                       1U + (uint32_t)id % 60U, &view));
    }
    fv_table_cache_begin(cache);
    assert_true(fv_table_cache_use(cache, 1000, 1, 1, WORDS, &view));
    assert_int_equal(fv_table_cache_count(cache), 1);
    assert_false(fv_table_cache_use(cache, 1001, 1, 1, 4, &view));     /* this step uses it all */
    assert_false(fv_table_cache_use(cache, 1000, 2, 1, WORDS, &view)); /* as it is */
    fv_table_cache_undo(cache);
    assert_int_equal(fv_table_cache_count(cache), 0);
    fv_table_cache_destroy(cache);
}

static void test_refusals(void **state)
{
    fv_table_cache_t *cache = NULL;
    fv_table_view_t view;

    (void)state;
    assert_int_equal(fv_table_cache_create(FV_TABLE_BLOCK_WORDS - 1U, &cache), FV_ERR_INVALID_ARG);
    assert_int_equal(fv_table_cache_create(3U * FV_TABLE_BLOCK_WORDS, &cache), FV_OK);
    fv_table_cache_begin(cache);
    assert_false(fv_table_cache_use(cache, 1, 1, 1, 4U * FV_TABLE_BLOCK_WORDS, &view));
    assert_false(fv_table_cache_use(cache, 1, 1, 128, UINT32_MAX, &view));
    assert_true(fv_table_cache_use(cache, 1, 1, 2, FV_TABLE_BLOCK_WORDS, &view));
    assert_true(fv_table_cache_use(cache, 2, 1, 1, FV_TABLE_BLOCK_WORDS, &view));
    assert_int_equal(fv_table_cache_count(cache), 2);
    fv_table_cache_destroy(cache);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_histories),
        cmocka_unit_test(test_blocks_join_again),
        cmocka_unit_test(test_refusals),
    };

    seed = fv_random_seed(31);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
