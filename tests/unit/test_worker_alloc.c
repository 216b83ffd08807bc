/*
 * test_worker_alloc.c - the step path allocates nothing once its workspaces have grown.
 *
 * Method: the linker routes malloc, calloc and realloc through the counters below (tests/worker.cmake); sharded and
 *         whole sessions decode between two doublings of their page tables.
 */
#include "tests/support/test.h"
#include "worker/worker.h"

#include <stdlib.h>

#define N_SESSIONS 8U
#define TOKEN      512U /* bytes of one token's q, k or v, at most */

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *memory, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *memory, size_t n);

static size_t n_allocations;

void *__wrap_malloc(size_t n)
{
    n_allocations++;
    return __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t size)
{
    n_allocations++;
    return __real_calloc(n, size);
}

void *__wrap_realloc(void *memory, size_t n)
{
    n_allocations++;
    return __real_realloc(memory, n);
}

/* A peer whose partial states are whatever the buffer holds: nothing here is computed. */
static fv_status_t no_exchange(void *ctx,
                               const fv_exchange_message_t *sends,
                               size_t n_sends,
                               const fv_exchange_message_t *recvs,
                               size_t n_recvs,
                               uint32_t deadline_ms)
{
    (void)ctx;
    (void)sends;
    (void)n_sends;
    (void)recvs;
    (void)n_recvs;
    (void)deadline_ms;
    return FV_OK;
}

static fv_worker_t *make_worker(void)
{
    static const fv_exchange_ops_t exchange = {.name = "none", .all_to_all = no_exchange};
    fv_worker_config_t config = {.n_ranks = 2,
                                 .backend = &fv_backend_null,
                                 .backend_config = {.kv_arena_bytes = (size_t)16 << 20},
                                 .exchange = &exchange};
    fv_ctl_model_t model = {.spec = {.name = "alloc",
                                     .n_layers = 1,
                                     .n_q_heads = 4,
                                     .n_kv_heads = 2,
                                     .head_dim_qk = 32,
                                     .head_dim_v = 32,
                                     .kv_dtype = FV_DTYPE_F32,
                                     .n_policies = 1}};
    fv_worker_t *worker = NULL;

    assert_int_equal(fv_worker_create(&config, &worker), FV_OK);
    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    for (uint32_t s = 0; s < N_SESSIONS; s++) { /* every second one is sharded */
        fv_ctl_open_t open = {.session_slot = s,
                              .placement = {.n_head_parts = 1,
                                            .n_ctx_parts = (uint16_t)(1U + s % 2U),
                                            .shard_tokens = 64,
                                            .ranks = {0, 1}}};

        assert_int_equal(fv_worker_open(worker, &open), FV_OK);
    }
    return worker;
}

/* One token to each session. */
static void decode(fv_worker_t *worker, uint64_t position)
{
    static uint8_t in[N_SESSIONS][TOKEN];
    static uint8_t out[N_SESSIONS][TOKEN];
    fv_ctl_item_t items[N_SESSIONS];
    fv_step_io_t io[N_SESSIONS];
    fv_error_t errors[N_SESSIONS];
    fv_ctl_done_t done;

    for (uint32_t s = 0; s < N_SESSIONS; s++) {
        items[s] = (fv_ctl_item_t){.session_slot = s,
                                   .position = position,
                                   .kv_end = position + 1U,
                                   .n_tokens = 1,
                                   .dtype = FV_DTYPE_F32,
                                   .flags = FV_ITEM_CAUSAL | FV_ITEM_APPEND};
        io[s] = (fv_step_io_t){.q = in[s],
                               .k = in[s],
                               .v = in[s],
                               .q_token_bytes = TOKEN,
                               .k_token_bytes = TOKEN / 2U,
                               .v_token_bytes = TOKEN / 2U,
                               .out = out[s],
                               .out_token_bytes = TOKEN};
    }
    assert_int_equal(fv_worker_step(worker, items, io, N_SESSIONS, &done, errors), FV_OK);
    assert_int_equal(done.error.status, FV_OK);
}

static void test_a_warm_step_allocates_nothing(void **state)
{
    fv_worker_t *worker = make_worker();
    uint64_t position = 0;

    (void)state;
    for (; position < 100U; position++) {
        decode(worker, position);
    }
    assert_true(n_allocations > 0U); /* the counters do count */
    n_allocations = 0;
    for (; position < 256U; position++) { /* the first page tables hold 256 tokens */
        decode(worker, position);
    }
    assert_int_equal(n_allocations, 0);
    fv_worker_destroy(worker);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_warm_step_allocates_nothing),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
