/*
 * test_dispatch.c - a step cut into each rank's bytes.
 *
 * Goal:   every byte of q, k, v goes to the ranks that need it, every byte of out and lse comes from exactly one rank, and
 *         the packed sizes are those the workers will compute.
 * Method: random placements and items; tensors whose bytes are numbered, so a segment's address says what it is.
 */
#include "coord/dispatch.h"
#include "tests/support/random.h"
#include "tests/support/sched_case.h"
#include "tests/support/test.h"

#include <stdlib.h>
#include <string.h>

#define OWN_RANK 0U
#define N_RANKS  7U

static fv_tensors_t g_tensors;

static const fv_tensors_t *tensors_of(fv_request_t *request)
{
    (void)request;
    return &g_tensors;
}

static bool is_inside(const void *p, const void *base, size_t n_bytes)
{
    return ((uintptr_t)p >= (uintptr_t)base) && ((uintptr_t)p < (uintptr_t)base + n_bytes);
}

/* Adds 1 to each covered byte of `cover` for segments that lie in the tensor. */
static void
cover(const fv_rank_work_t *work, bool outputs, const void *base, size_t n_bytes, uint8_t *count)
{
    const fv_segment_t *segments = outputs ? work->outputs : work->inputs;
    size_t n = outputs ? work->n_outputs : work->n_inputs;

    for (size_t i = 0; i < n; i++) {
        if (is_inside(segments[i].data, base, n_bytes)) {
            size_t at = (size_t)((const uint8_t *)segments[i].data - (const uint8_t *)base);
            assert_true(at + segments[i].n_bytes <= n_bytes);
            for (size_t b = 0; b < segments[i].n_bytes; b++) {
                count[at + b]++;
            }
        }
    }
}

static void check_packed_sizes(fv_dispatch_t *d, const fv_case_request_t *r, uint32_t rank)
{
    const fv_rank_work_t *work = fv_dispatch_work(d, rank);
    size_t in_bytes = 0;
    size_t out_bytes = 0;

    for (uint32_t i = 0; i < r->request.head.n_items; i++) {
        fv_item_share_t share;
        if (fv_item_share(r->request.spec, &r->sessions[i]->placement, &r->ctl_items[i], rank,
                          &share)) {
            in_bytes += fv_share_in_bytes(&share);
            out_bytes += fv_share_out_bytes(&share);
        }
    }
    assert_int_equal(work->in_bytes, in_bytes);
    assert_int_equal(work->out_bytes, out_bytes);
}

/* Rows that rank 0 merges are written in place by its worker: counted here from its share, at where its view begins. */
static void
cover_own_rows(fv_dispatch_t *d, const fv_case_request_t *r, size_t row_bytes, uint8_t *count)
{
    size_t token_bytes = (size_t)r->request.spec->n_q_heads * 16U * 4U;
    const fv_step_io_t *io = fv_dispatch_work(d, OWN_RANK)->io;
    uint64_t hq = (uint64_t)r->request.spec->n_q_heads;
    uint64_t group = (uint64_t)fv_model_group(r->request.spec);

    for (uint32_t i = 0; i < r->request.head.n_items; i++) {
        fv_item_share_t s;
        if (fv_item_share(r->request.spec, &r->sessions[i]->placement, &r->ctl_items[i], OWN_RANK,
                          &s)) {
            uint64_t token_begin =
                (uint64_t)((const uint8_t *)io->out - g_tensors.out) / token_bytes;
            assert_ptr_equal(io->q, g_tensors.q + token_begin * token_bytes);
            io++;
            uint64_t n_local = (uint64_t)(s.part.head_end - s.part.head_begin) * group;
            uint64_t row = 0;
            uint64_t end = 0;
            for (int32_t run = 0; fv_share_rows(&s, run, &row, &end); run++) {
                for (; row < end; row++) {
                    uint64_t at = (token_begin + row / n_local) * hq +
                                  (uint64_t)s.part.head_begin * group + row % n_local;
                    for (size_t b = 0; b < row_bytes; b++) {
                        count[at * row_bytes + b]++;
                    }
                }
            }
        }
    }
}

/* All the pieces of the one request: of a step's work each part of the answers is counted. */
static void serve(fv_sched_t *sched,
                  fv_dispatch_t *d,
                  fv_case_request_t *r,
                  size_t out_bytes,
                  uint8_t *count,
                  uint8_t *lse_count)
{
    fv_step_plan_t plan = {0};

    fv_case_sizes(r, r->request.spec);
    fv_sched_submit(sched, &r->request);
    while (plan.joined == NULL) {
        fv_sched_next_step(sched, 0, fv_case_is_cancelled, &plan);
        assert_ptr_equal(plan.joined, &r->request);
        assert_int_equal(fv_dispatch_build(d, &plan, tensors_of), FV_OK);
        for (uint32_t rank = 1; rank < N_RANKS; rank++) {
            check_packed_sizes(d, r, rank);
            cover(fv_dispatch_work(d, rank), true, g_tensors.out, out_bytes, count);
            cover(fv_dispatch_work(d, rank), true, g_tensors.lse, out_bytes / 16U, lse_count);
        }
        cover_own_rows(d, r, 64, count);
        cover_own_rows(d, r, 4, lse_count);
        fv_sched_step_done(sched, &plan);
    }
}

static void check_case(fv_random_t *random)
{
    fv_sched_t *sched = fv_case_sched_ways(
        N_RANKS, 64, 1U << 20,
        (uint32_t)fv_random_int(random, 0, 1) * (uint32_t)fv_random_int(random, 1, 200),
        (fv_plan_prefill_t)fv_random_int(random, FV_PLAN_PREFILL_VISIT, FV_PLAN_PREFILL_MOVE));
    fv_model_spec_t spec = fv_case_spec("d");
    char id[FV_MODEL_ID_BYTES];
    fv_dispatch_t *d = NULL;
    fv_sharding_t sharding = {.mode = (int32_t)fv_random_int(random, 0, 2),
                              .max_ranks = (int32_t)fv_random_int(random, 1, N_RANKS),
                              .shard_tokens = 64};

    spec.n_kv_heads = (int32_t)fv_random_int(random, 1, 5);
    spec.n_q_heads = spec.n_kv_heads * (int32_t)fv_random_int(random, 1, 3);
    fv_case_register(sched, &spec, id);
    fv_case_request_t *r = fv_case_request(0, true);
    r->request.head.want_lse = true;
    for (int i = 0; i < 3; i++) {
        fv_case_add(r, fv_case_open(sched, id, &sharding), 0,
                    (uint32_t)fv_random_int(random, 1, 300), 0);
    }
    r->request.spec = &spec;
    size_t n_rows = (size_t)r->request.head.n_tokens * (size_t)spec.n_q_heads;
    size_t out_bytes = n_rows * 16U * 4U;
    g_tensors =
        (fv_tensors_t){.q = malloc(out_bytes), /* K and V have fewer heads, and all have one size */
                       .k = malloc(out_bytes),
                       .v = malloc(out_bytes),
                       .out = malloc(out_bytes),
                       .lse = malloc(n_rows * 4U)};
    uint8_t *count = calloc(out_bytes, 1);
    uint8_t *lse_count = calloc(n_rows * 4U, 1);
    assert_true((count != NULL) && (lse_count != NULL));
    assert_int_equal(fv_dispatch_create(N_RANKS, OWN_RANK, &d), FV_OK);
    serve(sched, d, r, out_bytes, count, lse_count);
    for (size_t b = 0; b < out_bytes; b++) {
        assert_int_equal(count[b], 1);
    }
    for (size_t b = 0; b < n_rows * 4U; b++) {
        assert_int_equal(lse_count[b], 1);
    }
    free((void *)(uintptr_t)g_tensors.q);
    free((void *)(uintptr_t)g_tensors.k);
    free((void *)(uintptr_t)g_tensors.v);
    free(g_tensors.out);
    free(g_tensors.lse);
    free(count);
    free(lse_count);
    free(r);
    fv_dispatch_destroy(d);
    fv_sched_destroy(sched);
}

static void test_every_byte_once(void **state)
{
    fv_random_t random = {.state = fv_random_seed(7)};

    (void)state;
    for (int i = 0; i < 100; i++) {
        check_case(&random);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_byte_once),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
