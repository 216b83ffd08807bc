/*
 * test_staging.c - the staging pool: reuse, bounds, and many threads at once.
 */
#include "coord/staging.h"
#include "tests/support/test.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static void test_reuse_and_bound(void **state)
{
    fv_staging_t *staging = NULL;
    void *a = NULL;
    void *b = NULL;
    void *c = NULL;

    (void)state;
    assert_int_equal(fv_staging_create(3U * 8192U, NULL, &staging), FV_OK);
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
    assert_int_equal(fv_staging_create(1U << 20, NULL, &staging), FV_OK);
    for (size_t i = 0; i < 3; i++) {
        assert_int_equal(pthread_create(&threads[i], NULL, take_and_give, staging), 0);
    }
    for (size_t i = 0; i < 3; i++) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
    }
    assert_int_equal(fv_staging_bytes(staging), 0);
    fv_staging_destroy(staging);
}

/* Memory that counts itself and stops at a limit. */
typedef struct source {
    size_t n_bytes, bytes_max, n_allocs;
    const unsigned char *begin[64];
    size_t size[64];
} source_t;

static fv_status_t source_alloc(void *ctx, size_t n_bytes, void **out)
{
    source_t *s = ctx;

    if ((n_bytes > s->bytes_max - s->n_bytes) || (s->n_allocs == FV_COUNT(s->begin))) {
        return FV_ERR_NO_MEMORY;
    }
    *out = aligned_alloc(4096, (n_bytes + 4095U) / 4096U * 4096U);
    s->begin[s->n_allocs] = *out;
    s->size[s->n_allocs++] = n_bytes;
    s->n_bytes += n_bytes;
    return FV_OK;
}

static void source_free(void *ctx, void *memory)
{
    source_t *s = ctx;

    for (size_t i = 0; i < s->n_allocs; i++) {
        if (s->begin[i] == memory) {
            s->n_bytes -= s->size[i];
        }
    }
    free(memory);
}

static bool is_from(const source_t *s, const void *p, size_t n_bytes)
{
    for (size_t i = 0; i < s->n_allocs; i++) {
        const unsigned char *at = p;

        if ((at >= s->begin[i]) && (at + n_bytes <= s->begin[i] + s->size[i])) {
            return true;
        }
    }
    return false;
}

/* Buffers lie in the given memory, apart from each other; a warm pool asks for none; beyond its bound it goes on. */
static void test_given_memory(void **state)
{
    enum {
        N = 40
    };
    source_t source = {.bytes_max = (size_t)64 << 20};
    const fv_staging_memory_t memory = {source_alloc, source_free, &source};
    fv_staging_t *staging = NULL;
    unsigned char *held[N];
    size_t n_warm = 0;

    (void)state;
    assert_int_equal(fv_staging_create((size_t)48 << 20, &memory, &staging), FV_OK);
    n_warm = source.n_allocs;
    assert_true(n_warm > 0);
    for (int round = 0; round < 3; round++) {
        for (size_t i = 0; i < N; i++) {
            void *p = NULL;

            assert_int_equal(fv_staging_take(staging, 1000U * (i + 1U), false, &p), FV_OK);
            assert_int_equal((uintptr_t)p % 64U, 0);
            assert_true(is_from(&source, p, 1000U * (i + 1U)));
            held[i] = p;
            memset(p, (int)i, 1000U * (i + 1U));
        }
        for (size_t i = 0; i < N; i++) {
            assert_int_equal(held[i][0], i);
            assert_int_equal(held[i][1000U * (i + 1U) - 1U], i);
            fv_staging_give(held[i]);
        }
    }
    assert_int_equal(source.n_allocs, n_warm);
    for (size_t i = 0; i < 5; i++) { /* 5 x 8 MiB: the chunks hold less */
        void *p = NULL;

        assert_int_equal(fv_staging_take(staging, (size_t)8 << 20, false, &p), FV_OK);
        held[i] = p;
        memset(p, (int)i, (size_t)8 << 20);
    }
    assert_true(source.n_bytes <= (size_t)48 << 20);
    assert_false(is_from(&source, held[4], 1));
    for (size_t i = 0; i < 5; i++) {
        assert_int_equal(held[i][((size_t)8 << 20) - 1U], i);
        fv_staging_give(held[i]);
    }
    fv_staging_destroy(staging);
    assert_int_equal(source.n_bytes, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reuse_and_bound),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_given_memory),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
