/*
 * test_staging.c - the staging pool: reuse, bounds, and many threads at once.
 */
#include "coord/staging.h"
#include "tests/support/test.h"

#include <pthread.h>
#include <string.h>

static void test_reuse_and_bound(void **state)
{
    fv_staging_t *staging = NULL;
    void *a = NULL;
    void *b = NULL;
    void *c = NULL;

    (void)state;
    assert_int_equal(fv_staging_create(3U * 8192U, &staging), FV_OK);
    assert_int_equal(fv_staging_take(staging, 8000, false, &a), FV_OK);
    assert_int_equal((uintptr_t)a % 64U, 0);
    assert_int_equal(fv_staging_bytes(staging), 8192);
    assert_int_equal(fv_staging_take(staging, 16384, false, &b), FV_OK);
    assert_int_equal(fv_staging_take(staging, 1, false, &c), FV_ERR_EXHAUSTED);
    assert_non_null(strstr(fv_error_context(), "4096 bytes needed, 0 free of 24576"));
    assert_int_equal(fv_staging_take(staging, 1, true, &c), FV_OK); /* a reply may pass the bound */
    fv_staging_give(c);
    fv_staging_give(a);
    assert_int_equal(fv_staging_take(staging, 5000, false, &c), FV_OK);
    assert_ptr_equal(c, a); /* the same buffer, warm */
    fv_staging_give(c);
    fv_staging_give(b);
    fv_staging_give(NULL);
    assert_int_equal(fv_staging_bytes(staging), 0);
    fv_staging_destroy(staging);
}

static void *take_and_give(void *arg)
{
    fv_staging_t *staging = arg;
    void *held[8] = {NULL};

    for (uint32_t i = 0; i < 20000; i++) {
        uint32_t k = (i * 7U) % 8U;
        fv_staging_give(held[k]);
        held[k] = NULL;
        if (fv_staging_take(staging, (i * 131U) % 60000U + 1U, false, &held[k]) == FV_OK) {
            memset(held[k], (int)k, 16);
        }
    }
    for (uint32_t k = 0; k < 8; k++) {
        fv_staging_give(held[k]);
    }
    return NULL;
}

static void test_threads(void **state)
{
    fv_staging_t *staging = NULL;
    pthread_t threads[3];

    (void)state;
    assert_int_equal(fv_staging_create(1U << 20, &staging), FV_OK);
    for (size_t i = 0; i < 3; i++) {
        assert_int_equal(pthread_create(&threads[i], NULL, take_and_give, staging), 0);
    }
    for (size_t i = 0; i < 3; i++) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
    }
    assert_int_equal(fv_staging_bytes(staging), 0);
    fv_staging_destroy(staging);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reuse_and_bound),
        cmocka_unit_test(test_threads),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
