/*
 * test_cuda_ahead.c - inputs that travel to the device while the step before works.
 *
 * Method: during a long step the next one's Q, K and V are offered; then they are overwritten on the host before the next
 *         step is described. A result of the offered values proves that the device's own copies are read; a third step, of
 *         the overwritten values at the same addresses, proves that no copy outlives its step.
 */
#include "kernels/backend_cuda.h"
#include "tests/support/random.h"
#include "tests/support/test.h"

#include <string.h>

#define N_HEADS     8
#define GROUP       4
#define DIM         128
#define N_TOKENS    32     /* of the step that is offered: K and V of 64 KB, Q of 256 KB */
#define LONG_TOKENS 262144 /* of the step during which it is */
#define PAGE_BYTES  ((size_t)FV_PAGE_TOKENS * 2U * DIM * 2U)
#define N_PAGES     64U
#define SHORT_PAGE  32U /* the short sequence's first */

static const fv_backend_ops_t *const k_ops = &fv_backend_cuda;
static fv_page_ref_t long_pages[LONG_TOKENS / FV_PAGE_TOKENS * N_HEADS];
static fv_page_ref_t short_pages[N_HEADS];

typedef struct rig {
    fv_backend_t *backend;
    uint16_t *q, *k, *v, *out;
    bool is_offered;
} rig_t;

static void *host(rig_t *r, size_t n_bytes)
{
    void *memory = NULL;

    assert_int_equal(k_ops->host_alloc(r->backend, n_bytes, &memory), FV_OK);
    memset(memory, 0, n_bytes);
    return memory;
}

static size_t q_elems(void)
{
    return (size_t)N_TOKENS * N_HEADS * GROUP * DIM;
}

static size_t kv_elems(void)
{
    return (size_t)N_TOKENS * N_HEADS * DIM;
}

static void fill(uint16_t *x, size_t n, fv_random_t *rng)
{
    for (size_t i = 0; i < n; i++) {
        x[i] = fv_f32_to_bf16(fv_random_unit(rng));
    }
}

static void fill_all(rig_t *r, uint64_t seed)
{
    fv_random_t rng = {seed};

    fill(r->q, q_elems(), &rng);
    fill(r->k, kv_elems(), &rng);
    fill(r->v, kv_elems(), &rng);
}

static fv_attn_item_t item(rig_t *r, int32_t n_tokens, int64_t kv_end, const fv_page_ref_t *pages)
{
    return (fv_attn_item_t){
        .n_tokens = n_tokens,
        .n_kv_heads = N_HEADS,
        .group = GROUP,
        .head_dim_qk = DIM,
        .head_dim_v = DIM,
        .io_dtype = FV_DTYPE_BF16,
        .kv_dtype = FV_DTYPE_BF16,
        .softmax_scale = 0.1F,
        .causal = true,
        .shard = {.shard_tokens = FV_PAGE_TOKENS, .n_parts = 1},
        .position = kv_end - n_tokens,
        .kv_end = kv_end,
        .q = r->q,
        .q_token_bytes = (size_t)N_HEADS * GROUP * DIM * 2U,
        .pages = pages,
        .pages_head_stride = (size_t)((kv_end + FV_PAGE_TOKENS - 1) / FV_PAGE_TOKENS),
        .out = r->out,
        .out_token_bytes = (size_t)N_HEADS * GROUP * DIM * 2U,
    };
}

static fv_status_t describe_short(rig_t *r)
{
    const fv_append_item_t append = {
        .n_kv_heads = N_HEADS,
        .head_dim_qk = DIM,
        .head_dim_v = DIM,
        .src_dtype = FV_DTYPE_BF16,
        .kv_dtype = FV_DTYPE_BF16,
        .k = r->k,
        .v = r->v,
        .k_token_bytes = (size_t)N_HEADS * DIM * 2U,
        .v_token_bytes = (size_t)N_HEADS * DIM * 2U,
        .n_tokens = N_TOKENS,
        .pages = short_pages,
        .pages_head_stride = 1,
    };
    const fv_attn_item_t attend = item(r, N_TOKENS, N_TOKENS, short_pages);

    FV_RETURN_IF_ERR(k_ops->append(r->backend, &append, 1));
    return k_ops->attend(r->backend, &attend, 1);
}

/* The short step's result, without anything travelling ahead. */
static void run_short(rig_t *r, uint16_t *result)
{
    memset(r->out, 0xff, q_elems() * 2U);
    assert_int_equal(describe_short(r), FV_OK);
    assert_int_equal(k_ops->finish(r->backend, NULL, NULL), FV_OK);
    memcpy(result, r->out, q_elems() * 2U);
}

/* Asked while the long step works: offers the next one's inputs once. */
static bool offer(void *arg)
{
    rig_t *r = arg;

    if (!r->is_offered) {
        r->is_offered = true;
        k_ops->prefetch(r->backend, r->q, q_elems() * 2U);
        k_ops->prefetch(r->backend, r->k, kv_elems() * 2U);
        k_ops->prefetch(r->backend, r->v, kv_elems() * 2U);
        assert_int_equal(cudaStreamSynchronize(r->backend->ahead.stream), cudaSuccess);
    }
    return false;
}

static void run_long(rig_t *r)
{
    const fv_wait_limits_t limits = {.deadline_ms = 10000, .is_aborted = offer, .arg = r};
    const fv_attn_item_t attend = item(r, 1, LONG_TOKENS, long_pages);

    r->is_offered = false;
    assert_int_equal(k_ops->attend(r->backend, &attend, 1), FV_OK);
    assert_int_equal(k_ops->finish(r->backend, &limits, NULL), FV_OK);
    assert_true(r->is_offered); /* it takes half a millisecond, and is asked every 50 us */
}

static void setup_rig(rig_t *r)
{
    const fv_backend_config_t config = {.kv_arena_bytes = N_PAGES * PAGE_BYTES};

    assert_int_equal(k_ops->create(&config, &r->backend), FV_OK);
    r->q = host(r, q_elems() * 2U);
    r->k = host(r, kv_elems() * 2U);
    r->v = host(r, kv_elems() * 2U);
    r->out = host(r, q_elems() * 2U);
    for (size_t i = 0; i < FV_COUNT(long_pages); i++) {
        long_pages[i] = (fv_page_ref_t)(i % SHORT_PAGE * (PAGE_BYTES / FV_PAGE_UNIT));
    }
    for (uint32_t h = 0; h < N_HEADS; h++) {
        short_pages[h] = (fv_page_ref_t)((SHORT_PAGE + h) * (PAGE_BYTES / FV_PAGE_UNIT));
    }
}

static void test_ahead(void **state)
{
    static uint16_t expected[2][(size_t)N_TOKENS * N_HEADS * GROUP * DIM];
    static uint16_t got[(size_t)N_TOKENS * N_HEADS * GROUP * DIM];
    rig_t r = {0};

    (void)state;
    setup_rig(&r);
    for (int i = 0; i < 2; i++) {
        fill_all(&r, 40U + (uint64_t)i);
        run_short(&r, expected[i]);
    }
    assert_memory_not_equal(expected[0], expected[1], sizeof(got));
    for (int round = 0; round < 20; round++) {
        const uint64_t before = r.backend->ahead.n_bytes;

        fill_all(&r, 40U);
        run_long(&r);
        fill_all(&r, 41U);
        run_short(&r, got); /* of what was offered */
        assert_memory_equal(got, expected[0], sizeof(got));
        assert_int_equal(r.backend->ahead.n_bytes - before, (q_elems() + 2U * kv_elems()) * 2U);
        run_short(&r, got); /* of what is there now */
        assert_memory_equal(got, expected[1], sizeof(got));
    }
    k_ops->prefetch(r.backend, r.q, q_elems() * 2U); /* nobody waits: whose would it be? */
    assert_int_equal(r.backend->ahead.steps[0].n_leases + r.backend->ahead.steps[1].n_leases, 0);
    k_ops->destroy(r.backend);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_ahead)};

    if (!fv_backend_cuda_is_visible()) {
        return 77;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
