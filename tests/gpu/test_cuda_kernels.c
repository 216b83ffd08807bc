/*
 * test_cuda_kernels.c - every lean kernel once with each way of merging, on problems small enough for compute-sanitizer.
 *
 * Method: few CTAs and a short ring, so that a line of 10 or 14 tiles wraps it, cuts groups and takes shares in rounds, and
 *         little is done that another CTA does as well. What was launched is compared with what the table says, so that
 *         no kernel drops out of it unseen; results with the oracle. racecheck over all of it: docs/gpu.md.
 */
#include "kernels/backend_cuda.h"
#include "tests/support/cuda_case.h"
#include "tests/support/test.h"

#include <stdlib.h>
#include <string.h>

#define ARENA_BYTES ((size_t)64 << 20)

static const fv_backend_ops_t *const k_ops = &fv_backend_cuda;
static fv_backend_t *backend;
static fv_lean_tuning_t shipped;

/* How elements are stored and asked for, and the kernel's kind that this makes. */
static const struct {
    int32_t io, kv, kind;
} k_kinds[] = {
    {FV_DTYPE_BF16, FV_DTYPE_BF16, FV_LEAN_BF16},   {FV_DTYPE_F16, FV_DTYPE_F16, FV_LEAN_F16},
    {FV_DTYPE_F32, FV_DTYPE_F32, FV_LEAN_F32_WIDE}, {FV_DTYPE_BF16, FV_DTYPE_F16, FV_LEAN_F16_WIDE},
    {FV_DTYPE_F32, FV_DTYPE_BF16, FV_LEAN_BF16}, /* Q in three parts */
};

static const struct {
    int32_t dk, dv;
} k_dims[] = {{64, 64}, {128, 128}, {72, 40}, {192, 128}, {256, 256}};

/* Rows of a KV head: both halves of the last 16, and not all of them. */
static const struct {
    int32_t rows, m_warps;
} k_rows[] = {{12, 1}, {27, 2}, {50, 4}};

static int setup(void **state)
{
    fv_backend_config_t config = {.kv_arena_bytes = ARENA_BYTES};

    (void)state;
    if (k_ops->create(&config, &backend) != FV_OK) {
        return -1;
    }
    shipped = backend->tuning;
    backend->prefill_units_min = UINT32_MAX; /* lean kernels only */
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    k_ops->destroy(backend);
    return 0;
}

/* One problem in a step of its own; the launch that it became is left in backend->launches. */
static void run(const fv_attn_spec_t *spec, fv_rng_t *rng)
{
    fv_attn_case_t *attn = fv_attn_case_create(spec);
    uint8_t *out = malloc(fv_attn_case_out_bytes(attn));
    float *lse = malloc(fv_attn_case_rows(attn) * sizeof(float));
    uint32_t next_unit = 0;

    fv_attn_case_place(attn, rng, &next_unit);
    assert_true((size_t)next_unit * FV_PAGE_UNIT <= ARENA_BYTES);
    assert_int_equal(fv_attn_case_load(attn, k_ops, backend, rng), FV_OK);
    memset(out, 0xff, fv_attn_case_out_bytes(attn)); /* what is not written is NaN */
    memset(lse, 0xff, fv_attn_case_rows(attn) * sizeof(float));
    const fv_attn_item_t item = fv_attn_case_item(attn, 0, out, lse);
    assert_int_equal(k_ops->attend(backend, &item, 1), FV_OK);
    assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
    fv_attn_case_solve(attn);
    assert_int_equal(fv_attn_case_check(attn, out, lse, "kernels"), 0);
    free(out);
    free(lse);
    fv_attn_case_destroy(attn);
}

/* 2 groups of 5 tiles on 3 CTAs, or one of 14 on 2, in rounds down to a tile, each of which is a piece. */
static fv_attn_spec_t problem(size_t kind, size_t dims, size_t rows, bool is_late)
{
    const int64_t tiles = is_late ? 14 : 5;
    fv_attn_spec_t spec = {
        .n_tokens = 1,
        .n_kv_heads = is_late ? 1 : 2,
        .group = k_rows[rows].rows,
        .head_dim_qk = k_dims[dims].dk,
        .head_dim_v = k_dims[dims].dv,
        .io_dtype = k_kinds[kind].io,
        .kv_dtype = k_kinds[kind].kv,
        .causal = true,
        .kv_end = (tiles - 1) * FV_PAGE_TOKENS + 7,
        .seed = 1U + kind * 100U + dims * 10U + rows,
    };

    spec.position = spec.kv_end - 1;
    backend->tuning = shipped;
    backend->tuning.ring_slots = 8; /* 4 tiles */
    backend->tuning.launch_ctas = is_late ? 2 : 3;
    backend->tuning.early_bytes = is_late ? 0U : UINT32_MAX;
    backend->tuning.tail_bytes = backend->tuning.early_bytes;
    for (int many = 0; (many < 2) && is_late; many++) {
        backend->tuning.rounds_min[many] = 3;
        backend->tuning.tail_tiles[many] = 1;
    }
    backend->tuning.first_percent = 60;
    return spec;
}

/* The launch is the table's, and its groups were cut and merged as it should be. */
static void
check_launch(const fv_lean_launch_t *launch, size_t kind, size_t dims, size_t rows, bool is_late)
{
    const bool is_16_bit =
        (k_kinds[kind].kind == FV_LEAN_BF16) || (k_kinds[kind].kind == FV_LEAN_F16);
    const bool is_exact = is_16_bit && (k_kinds[kind].io == k_kinds[kind].kv) && (dims < 2U);
    /* shared memory has no room for 64 rows of long Q in three parts */
    const bool is_large =
        ((k_kinds[kind].kind == FV_LEAN_F32_WIDE) && (k_dims[dims].dk > 128)) ||
        (!backend->has_sm90 && (k_kinds[kind].io == FV_DTYPE_F32) && (k_dims[dims].dk > 192));
    const int32_t m_warps = (is_large && (k_rows[rows].m_warps == 4)) ? 2 : k_rows[rows].m_warps;

    assert_int_equal(launch->kind, k_kinds[kind].kind);
    assert_int_equal(launch->m_warps, m_warps);
    assert_int_equal(launch->head_dim_v, k_dims[dims].dv);
    assert_int_equal(launch->is_exact, is_exact ? 1 : 0);
    assert_int_equal(launch->n_ctas, is_late ? 2 : 3);
    assert_int_equal(launch->n_late > 0, is_late);
    if (is_late && (m_warps < 4)) { /* prefill's kernels take no rounds */
        assert_true(launch->n_shares > 2U * launch->n_ctas);
    }
}

/* A test for each kind, so that as many sanitizers can work side by side. */
static void test_kind(void **state)
{
    const size_t kind = *(const size_t *)*state;
    fv_rng_t rng = {1};

    for (size_t dims = 0; dims < FV_COUNT(k_dims); dims++) {
        for (size_t i = 0; i < 2U * FV_COUNT(k_rows); i++) {
            const bool is_late = (i % 2U) != 0;
            const fv_attn_spec_t spec = problem(kind, dims, i / 2U, is_late);

            if (!fv_cuda_case_fits(backend, &spec)) {
                assert_true(!backend->has_sm90 && (k_dims[dims].dk == 256) &&
                            (k_kinds[kind].kv == FV_DTYPE_F32));
                continue;
            }
            run(&spec, &rng);
            assert_int_equal(backend->n_launches, 1);
            check_launch(&backend->launches[0], kind, dims, i / 2U, is_late);
        }
    }
    backend->tuning = shipped;
}

int main(int argc, char **argv)
{
    static size_t kinds[] = {0, 1, 2, 3, 4};
    const struct CMUnitTest tests[] = {
        {"bf16", test_kind, NULL, NULL, &kinds[0]},
        {"f16", test_kind, NULL, NULL, &kinds[1]},
        {"f32", test_kind, NULL, NULL, &kinds[2]},
        {"f16_wide", test_kind, NULL, NULL, &kinds[3]},
        {"bf16_q_parts", test_kind, NULL, NULL, &kinds[4]},
    };

    if (!fv_backend_cuda_is_visible()) {
        print_message("no GPU: skipped\n");
        return 77;
    }
    if (argc > 1) { /* one of these names */
        cmocka_set_test_filter(argv[1]);
    }
    return cmocka_run_group_tests(tests, setup, teardown);
}
