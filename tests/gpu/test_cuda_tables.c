/*
 * test_cuda_tables.c - page tables that stay on the device, and waits that end.
 *
 * Method: what the backend has seen of a table is replaced by wild references on the host's side afterwards: a right
 *         result proves that the device's own entries are used, a refusal or a wrong one that they are not.
 */
#include "kernels/backend_cuda.h"
#include "kernels/kernels.h"
#include "tests/support/attn_case.h"
#include "tests/support/test.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define ARENA_BYTES ((size_t)64 << 20)
#define WILD        0xfffffff0U /* no hole, and far outside of any arena */

static const fv_backend_ops_t *const k_ops = &fv_backend_cuda;
static fv_backend_t *backend;
static uint64_t next_id = 1;

static int setup(void **state)
{
    fv_backend_config_t config = {.kv_arena_bytes = ARENA_BYTES};

    (void)state;
    return (k_ops->create(&config, &backend) == FV_OK) ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    k_ops->destroy(backend);
    return 0;
}

/* A decode step over n tokens, and what it is asked with. */
typedef struct problem {
    fv_attn_case_t *attn;
    fv_attn_item_t item;
    fv_page_ref_t *pages; /* the item's own copy of the table */
    size_t n_pages;
    uint8_t *out;
    fv_rng_t rng;
    uint32_t next_unit;
} problem_t;

static problem_t make(int32_t n_heads, int64_t kv_end, uint64_t seed)
{
    problem_t p = {.rng = {seed}};
    fv_attn_spec_t spec = {.n_tokens = 1,
                           .n_kv_heads = n_heads,
                           .group = 2,
                           .head_dim_qk = 64,
                           .head_dim_v = 64,
                           .io_dtype = FV_DTYPE_BF16,
                           .kv_dtype = FV_DTYPE_BF16,
                           .causal = true,
                           .kv_end = kv_end,
                           .position = kv_end - 1,
                           .seed = seed};

    p.attn = fv_attn_case_create(&spec);
    fv_attn_case_place(p.attn, &p.rng, &p.next_unit);
    assert_int_equal(fv_attn_case_load(p.attn, k_ops, backend, &p.rng), FV_OK);
    fv_attn_case_solve(p.attn);
    p.n_pages = (size_t)(kv_end + FV_PAGE_TOKENS - 1) / FV_PAGE_TOKENS;
    p.out = malloc(fv_attn_case_out_bytes(p.attn));
    p.pages = malloc(p.n_pages * (size_t)n_heads * sizeof(*p.pages));
    p.item = fv_attn_case_item(p.attn, 0, p.out, NULL);
    for (size_t h = 0; h < (size_t)n_heads; h++) {
        memcpy(p.pages + h * p.n_pages, p.item.pages + h * p.item.pages_head_stride,
               p.n_pages * sizeof(*p.pages));
    }
    p.item.pages = p.pages;
    p.item.pages_head_stride = p.n_pages;
    p.item.table_id = next_id++;
    p.item.table_version = 1;
    p.item.n_table_pages = (uint32_t)p.n_pages;
    return p;
}

static void drop(problem_t *p)
{
    free(p->out);
    free(p->pages);
    fv_attn_case_destroy(p->attn);
}

/* Entries [begin, end) of every head become wild on the host, or right again. */
static void set_pages(problem_t *p, size_t begin, size_t end, bool is_wild)
{
    for (size_t h = 0; h < (size_t)p->item.n_kv_heads; h++) {
        for (size_t i = begin; i < end; i++) {
            p->pages[h * p->n_pages + i] =
                is_wild ? WILD : p->attn->pages[h * p->attn->pages_stride + i];
        }
    }
}

static fv_status_t run(problem_t *p)
{
    memset(p->out, 0xff, fv_attn_case_out_bytes(p->attn));
    FV_RETURN_IF_ERR(k_ops->attend(backend, &p->item, 1));
    return k_ops->finish(backend, NULL, NULL);
}

static void run_right(problem_t *p, const char *name)
{
    assert_int_equal(run(p), FV_OK);
    assert_int_equal(fv_attn_case_check(p->attn, p->out, NULL, name), 0);
}

static void test_kept(void **state)
{
    (void)state;
    for (int32_t n_heads = 1; n_heads <= 17; n_heads += 8) {
        problem_t p = make(n_heads, 1000, 21);

        run_right(&p, "sent");
        set_pages(&p, 0, p.n_pages, true);
        run_right(&p, "kept");
        p.item.table_version = 2; /* every entry is looked at again */
        assert_int_equal(run(&p), FV_ERR_INVALID_ARG);
        set_pages(&p, 0, p.n_pages, false);
        run_right(&p, "sent again after a refusal");
        drop(&p);
    }
}

/* The step's pages grow by one or by many; what was there before is not sent again. */
static void test_growth(void **state)
{
    (void)state;
    for (size_t first = 1; first <= 28; first += 9) {
        problem_t p = make(9, 30 * FV_PAGE_TOKENS, 22);
        const int64_t position = p.item.position;
        const bool fits = first > 16; /* its block, that is: rows of 32 entries */

        p.item.n_table_pages = (uint32_t)first;
        p.item.kv_end = (int64_t)first * FV_PAGE_TOKENS;
        p.item.position = p.item.kv_end - 1;
        set_pages(&p, first, p.n_pages, true); /* nobody's yet */
        assert_int_equal(run(&p), FV_OK);
        set_pages(&p, 0, p.n_pages, false);
        set_pages(&p, 0, fits ? (first & ~(size_t)3) : first, true); /* entries travel by fours */
        p.item.n_table_pages = (uint32_t)p.n_pages;
        p.item.kv_end = position + 1;
        p.item.position = position;
        if (fits) { /* the device's entries stay */
            run_right(&p, "grown in place");
        } else { /* a larger block: all of it travels, and wild entries are refused */
            assert_int_equal(run(&p), FV_ERR_INVALID_ARG);
            set_pages(&p, 0, first, false);
            run_right(&p, "grown");
        }
        drop(&p);
    }
}

/* Pages replaced by others, as after a truncation or a copy on write. */
static void test_replaced(void **state)
{
    problem_t p = make(8, 500, 23);

    (void)state;
    run_right(&p, "before");
    for (int i = 0; i < 3; i++) {
        assert_true((size_t)p.next_unit * FV_PAGE_UNIT < ARENA_BYTES / 2U);
        fv_attn_case_place(p.attn, &p.rng, &p.next_unit);
        assert_int_equal(fv_attn_case_load(p.attn, k_ops, backend, &p.rng), FV_OK);
        p.item.table_version++;
        set_pages(&p, 0, p.n_pages, false);
        run_right(&p, "after");
    }
    drop(&p);
}

/* More tables than the area holds: the ones used longest ago go, none is mixed up. */
static void test_eviction(void **state)
{
    const uint64_t first = next_id;
    problem_t p = make(8, 40 * FV_PAGE_TOKENS, 24); /* blocks of 512 words: 64 fill the area */
    bool was_sent_again = false;

    (void)state;
    assert_int_equal(backend->tables_bytes, 131072);
    for (uint64_t id = 0; id < 100; id++) {
        p.item.table_id = first + id;
        run_right(&p, "one of many");
    }
    next_id = first + 200;
    set_pages(&p, 0, p.n_pages, true);
    for (uint64_t id = 99; id > 85; id--) {
        p.item.table_id = first + id;
        run_right(&p, "still there");
    }
    p.item.table_id = first;
    was_sent_again = (run(&p) == FV_ERR_INVALID_ARG);
    assert_true(was_sent_again);
    drop(&p);
}

/* A step of more tables than fit: the rest travels, all are right; the next step uses what is there. */
static void test_too_many_for_a_step(void **state)
{
    enum {
        N = 80
    };
    static problem_t p[N];
    static fv_attn_item_t items[N];

    (void)state;
    for (size_t i = 0; i < N; i++) {
        p[i] = make(8, 40 * FV_PAGE_TOKENS, 24);
        items[i] = p[i].item;
        memset(p[i].out, 0xff, fv_attn_case_out_bytes(p[i].attn));
    }
    assert_int_equal(k_ops->attend(backend, items, N), FV_OK);
    assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
    for (size_t i = 0; i < N; i++) {
        assert_int_equal(fv_attn_case_check(p[i].attn, p[i].out, NULL, "many"), 0);
        drop(&p[i]);
    }
}

/* ------------------------------------------------------------------ waiting */

static void nap(void *ms)
{
    const struct timespec t = {.tv_sec = *(int *)ms / 1000, .tv_nsec = *(int *)ms % 1000 * 1000000};

    (void)nanosleep(&t, NULL);
}

static bool say_yes(void *arg)
{
    (void)arg;
    return true;
}

/* The stream is held up by the host: finish() gives up, and nothing afterwards waits for it. */
static void give_up(const fv_wait_limits_t *limits, fv_status_t expected)
{
    static int ms = 1500;
    fv_backend_config_t config = {.kv_arena_bytes = ARENA_BYTES};
    fv_backend_t *lost = NULL;
    struct timespec from;
    struct timespec to;

    assert_int_equal(k_ops->create(&config, &lost), FV_OK);
    assert_int_equal(cudaLaunchHostFunc(lost->stream, nap, &ms), cudaSuccess);
    (void)clock_gettime(CLOCK_MONOTONIC, &from);
    assert_int_equal(k_ops->finish(lost, limits, NULL), expected);
    assert_int_equal(k_ops->finish(lost, NULL, NULL), expected);
    assert_int_equal(k_ops->append(lost, NULL, 0), expected);
    k_ops->destroy(lost);
    (void)clock_gettime(CLOCK_MONOTONIC, &to);
    assert_true((to.tv_sec - from.tv_sec) * 1000 + (to.tv_nsec - from.tv_nsec) / 1000000 < 1000);
}

static void test_waits_end(void **state)
{
    const fv_wait_limits_t soon = {.deadline_ms = 50};
    const fv_wait_limits_t aborted = {.deadline_ms = 60000, .is_aborted = say_yes};

    (void)state;
    give_up(&soon, FV_ERR_TIMED_OUT);
    give_up(&aborted, FV_ERR_RANK_LOST);
}

/* Times are of this step: the device's, known only when it had work. */
static void test_times(void **state)
{
    fv_device_times_t times = {0};
    problem_t p = make(8, 4000, 25);
    int ms = 20;

    (void)state;
    assert_int_equal(k_ops->attend(backend, &p.item, 1), FV_OK);
    assert_int_equal(cudaLaunchHostFunc(backend->stream, nap, &ms), cudaSuccess);
    assert_int_equal(k_ops->finish(backend, NULL, &times), FV_OK);
    assert_true(times.is_known && (times.compute_us >= 20000U) && (times.compute_us < 2000000U));
    assert_int_equal(times.exchange_us, 0);
    assert_int_equal(k_ops->finish(backend, NULL, &times), FV_OK);
    assert_false(times.is_known);
    drop(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kept),
        cmocka_unit_test(test_growth),
        cmocka_unit_test(test_replaced),
        cmocka_unit_test(test_eviction),
        cmocka_unit_test(test_too_many_for_a_step),
        cmocka_unit_test(test_times),
        cmocka_unit_test(test_waits_end),
    };

    if (!fv_backend_cuda_is_visible()) {
        print_message("no GPU: skipped\n");
        return 77;
    }
    return cmocka_run_group_tests(tests, setup, teardown);
}
