/*
 * test_cuda_cancel.c - 1,000 relaunches with steps between them that were refused, aborted or given up: no stale state.
 *
 * Method: one step of many shapes is repeated; before each repetition something else is begun and not carried through.
 *         Its results must be the same bits every time. A backend that gave up a step is unusable and is replaced, while
 *         the device may still be busy with what it was told: the step then runs beside it, on pages loaded anew.
 */
#include "kernels/backend_cuda.h"
#include "tests/support/attn_case.h"
#include "tests/support/test.h"

#include <stdlib.h>
#include <string.h>

#define ARENA_BYTES ((size_t)96 << 20)
#define N_CASES     8U
#define LOST_EVERY  40 /* relaunches; what a lost backend holds is freed with the process */

static const fv_backend_ops_t *const k_ops = &fv_backend_cuda;

typedef struct rig {
    fv_backend_t *backend;
    fv_attn_case_t *cases[N_CASES], *other;
    fv_attn_item_t items[N_CASES], long_item;
    void *out[N_CASES], *first[N_CASES], *other_out;
    uint32_t *words; /* mapped: abort, gave_up, what is awaited, what is told */
    int n_lost;
} rig_t;

static void *host(rig_t *r, size_t n_bytes)
{
    void *memory = NULL;

    assert_int_equal(k_ops->host_alloc(r->backend, n_bytes, &memory), FV_OK);
    memset(memory, 0, n_bytes);
    return memory;
}

static fv_attn_case_t *make_case(int32_t group, int32_t n_kv_heads, int64_t kv_end)
{
    const fv_attn_spec_t spec = {
        .n_tokens = 1,
        .n_kv_heads = n_kv_heads,
        .group = group,
        .head_dim_qk = 128,
        .head_dim_v = 128,
        .io_dtype = FV_DTYPE_BF16,
        .kv_dtype = FV_DTYPE_BF16,
        .causal = true,
        .kv_end = kv_end,
        .position = (kv_end > 0) ? (kv_end - 1) : 0,
        .seed = 77U + (uint64_t)kv_end,
    };

    return fv_attn_case_create(&spec);
}

/* A new backend with all cases in it; pages and data are the same each time. */
static void open_backend(rig_t *r)
{
    const fv_backend_config_t config = {.kv_arena_bytes = ARENA_BYTES};
    fv_rng_t rng = {9};
    uint32_t next_unit = 0;

    assert_int_equal(k_ops->create(&config, &r->backend), FV_OK);
    for (size_t i = 0; i < N_CASES; i++) {
        fv_attn_case_place(r->cases[i], &rng, &next_unit);
        assert_int_equal(fv_attn_case_load(r->cases[i], k_ops, r->backend, &rng), FV_OK);
        r->out[i] = host(r, fv_attn_case_out_bytes(r->cases[i]));
        r->items[i] = fv_attn_case_item(r->cases[i], 0, r->out[i], NULL);
    }
    fv_attn_case_place(r->other, &rng, &next_unit);
    assert_true((size_t)next_unit * FV_PAGE_UNIT <= ARENA_BYTES);
    assert_int_equal(fv_attn_case_load(r->other, k_ops, r->backend, &rng), FV_OK);
    r->other_out = host(r, fv_attn_case_out_bytes(r->other));
    r->long_item = fv_attn_case_item(r->other, 0, r->other_out, NULL);
    r->words = host(r, 4096);
}

static void run(rig_t *r)
{
    for (size_t i = 0; i < N_CASES; i++) {
        memset(r->out[i], 0xff, fv_attn_case_out_bytes(r->cases[i]));
    }
    assert_int_equal(k_ops->attend(r->backend, r->items, N_CASES), FV_OK);
    assert_int_equal(k_ops->finish(r->backend, NULL, NULL), FV_OK);
}

/* ------------------------------------------------------------------ what is not carried through */

/* The second of two items is refused: the first, which was described, is not done. */
static void refuse_attend(rig_t *r)
{
    fv_attn_item_t items[2] = {r->long_item, r->long_item};

    items[1].head_dim_qk = 7;
    memset(r->other_out, 0x5a, fv_attn_case_out_bytes(r->other));
    assert_int_equal(k_ops->attend(r->backend, items, 2), FV_ERR_INVALID_ARG);
    assert_int_equal(k_ops->finish(r->backend, NULL, NULL), FV_OK);
    assert_int_equal(((const uint8_t *)r->other_out)[0], 0x5a);
}

/* A step of which one call went through and the next is refused. */
static void refuse_rest(rig_t *r)
{
    fv_attn_item_t bad = r->items[4];

    bad.pages_head_stride = 0;
    bad.group = 0;
    assert_int_equal(k_ops->attend(r->backend, &r->long_item, 1), FV_OK);
    assert_int_equal(k_ops->attend(r->backend, &bad, 1), FV_ERR_INVALID_ARG);
    assert_int_equal(k_ops->finish(r->backend, NULL, NULL), FV_OK);
}

/* New tokens are written to their pages, and nothing attends to them: the step before this one failed elsewhere. */
static void append_only(rig_t *r)
{
    const fv_attn_case_t *attn = r->other;
    const fv_append_item_t item = {
        .n_kv_heads = attn->spec.n_kv_heads,
        .head_dim_qk = 128,
        .head_dim_v = 128,
        .src_dtype = FV_DTYPE_BF16,
        .kv_dtype = FV_DTYPE_BF16,
        .k = attn->k,
        .v = attn->v,
        .k_token_bytes = (size_t)attn->spec.n_kv_heads * 128U * 2U,
        .v_token_bytes = (size_t)attn->spec.n_kv_heads * 128U * 2U,
        .n_tokens = 5,
        .pages = attn->pages,
        .pages_head_stride = attn->pages_stride,
    };

    assert_int_equal(k_ops->append(r->backend, &item, 1), FV_OK);
    assert_int_equal(k_ops->finish(r->backend, NULL, NULL), FV_OK);
}

/* An exchange whose peer never answers: the device waits for deadline_ms, or until the host's word ends it. */
static void begin_in_vain(rig_t *r, uint32_t deadline_ms, uint32_t abort)
{
    const fv_merge_pair_t pair = {.signal = &r->words[3], .awaited = &r->words[2], .value = 5};
    const fv_merge_sync_t sync = {.pairs = &pair,
                                  .n_pairs = 1,
                                  .deadline_ms = deadline_ms,
                                  .abort = &r->words[0],
                                  .gave_up = &r->words[1]};

    r->words[0] = abort;
    r->words[1] = 0;
    assert_int_equal(k_ops->attend(r->backend, &r->long_item, 1), FV_OK);
    assert_int_equal(k_ops->merge(r->backend, NULL, 0, &sync), FV_OK);
}

static void abort_exchange(rig_t *r)
{
    begin_in_vain(r, 10000, 1);
    assert_int_equal(k_ops->finish(r->backend, NULL, NULL), FV_OK);
    assert_int_equal(r->words[1], 1);
}

static bool always(void *arg)
{
    (void)arg;
    return true;
}

/*
 * finish() gives up at once; the device waits another 10 ms for the peer and then does what else it was told. The backend
 * takes nothing more, and another one is made.
 */
static void give_up(rig_t *r, bool is_aborted)
{
    const fv_wait_limits_t limits = {.deadline_ms = is_aborted ? 1000U : 0U,
                                     .is_aborted = is_aborted ? always : NULL};
    const fv_status_t expected = is_aborted ? FV_ERR_RANK_LOST : FV_ERR_TIMED_OUT;

    begin_in_vain(r, 10, 0);
    assert_int_equal(k_ops->attend(r->backend, &r->long_item, 1), FV_OK);
    assert_int_equal(k_ops->finish(r->backend, &limits, NULL), expected);
    assert_int_equal(k_ops->finish(r->backend, NULL, NULL), expected);
    k_ops->destroy(r->backend);
    r->n_lost++;
    open_backend(r);
}

static void disturb(rig_t *r, int n)
{
    if (n % LOST_EVERY == LOST_EVERY - 1) {
        give_up(r, n % (2 * LOST_EVERY) == LOST_EVERY - 1);
        return;
    }
    switch (n % 4) {
    case 0:
        refuse_attend(r);
        break;
    case 1:
        refuse_rest(r);
        break;
    case 2:
        append_only(r);
        break;
    default:
        abort_exchange(r);
        break;
    }
}

static void test_relaunches(void **state)
{
    static const int64_t k_lengths[N_CASES] = {0, 1, 64, 333, 5000, 12000, 7, 129};
    const int n_relaunches = (getenv("FV_GPU_QUICK") != NULL) ? 2 * LOST_EVERY : 1000;
    static rig_t r;

    (void)state;
    for (size_t i = 0; i < N_CASES; i++) {
        r.cases[i] = make_case(4, 3, k_lengths[i]);
    }
    r.other = make_case(16, 2, 20000);
    open_backend(&r);
    run(&r);
    for (size_t i = 0; i < N_CASES; i++) {
        fv_attn_case_solve(r.cases[i]);
        assert_int_equal(fv_attn_case_check(r.cases[i], r.out[i], NULL, "first"), 0);
        r.first[i] = malloc(fv_attn_case_out_bytes(r.cases[i]));
        memcpy(r.first[i], r.out[i], fv_attn_case_out_bytes(r.cases[i]));
    }
    for (int n = 0; n < n_relaunches; n++) {
        disturb(&r, n);
        run(&r);
        for (size_t i = 0; i < N_CASES; i++) {
            assert_memory_equal(r.first[i], r.out[i], fv_attn_case_out_bytes(r.cases[i]));
        }
    }
    assert_int_equal(r.n_lost, n_relaunches / LOST_EVERY);
    k_ops->destroy(r.backend);
    for (size_t i = 0; i < N_CASES; i++) {
        free(r.first[i]);
        fv_attn_case_destroy(r.cases[i]);
    }
    fv_attn_case_destroy(r.other);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_relaunches)};

    if (!fv_backend_cuda_is_visible()) {
        print_message("no GPU: skipped\n");
        return 77;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
