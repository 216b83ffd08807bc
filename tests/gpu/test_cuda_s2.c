/*
 * test_cuda_s2.c - S2 on the CUDA backend: every pattern against the fp64 oracle, pages that were freed, the line's cuts.
 *
 * Tokens that no row sees are NaN (attn_case.h). Parts of a context, merged: prop_attend_split.c; lives of sessions, with
 * NaN over everything that was freed: prop_worker_s2.c; both are built for this backend too.
 */
#include "kernels/backend_cuda.h"
#include "tests/support/cuda_case.h"
#include "tests/support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ARENA_BYTES ((size_t)512 << 20)
#define STEP_MAX    6
#define MACS        3000000

static const fv_backend_ops_t *const k_ops = &fv_backend_cuda;
static fv_backend_t *backend;

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

/* Under a sanitizer everything is a hundred times slower: FV_GPU_QUICK=1 takes a sample of each test. */
static int quick(int n_all, int n_some)
{
    return (getenv("FV_GPU_QUICK") != NULL) ? n_some : n_all;
}

static void *must_alloc(size_t n_bytes)
{
    void *memory = malloc(n_bytes + 1U);

    assert_non_null(memory);
    memset(memory, 0xff, n_bytes + 1U); /* what is not written is NaN */
    return memory;
}

/* Problems that share a step. */
typedef struct step {
    size_t n;
    fv_attn_case_t *cases[STEP_MAX];
    fv_attn_item_t items[STEP_MAX];
    void *out[STEP_MAX];
    float *lse[STEP_MAX];
    uint32_t next_unit;
} step_t;

static void step_add(step_t *step, const fv_attn_spec_t *given, fv_rng_t *rng)
{
    const size_t i = step->n++;
    fv_attn_spec_t spec = *given;

    fv_cuda_case_fit(backend, &spec);
    assert_true(step->n <= STEP_MAX);
    step->cases[i] = fv_attn_case_create(&spec);
    fv_attn_case_place(step->cases[i], rng, &step->next_unit);
    assert_true((size_t)step->next_unit * FV_PAGE_UNIT <= ARENA_BYTES);
    assert_int_equal(fv_attn_case_load(step->cases[i], k_ops, backend, rng), FV_OK);
    step->out[i] = must_alloc(fv_attn_case_out_bytes(step->cases[i]));
    step->lse[i] = must_alloc(fv_attn_case_rows(step->cases[i]) * sizeof(float));
    step->items[i] = fv_attn_case_item(step->cases[i], 0, step->out[i], step->lse[i]);
}

/* By the lean kernel alone, then what is long enough by the prefill kernel. */
static void step_run(step_t *step, const char *name)
{
    for (uint32_t i_kernel = 0; i_kernel < 2U; i_kernel++) {
        backend->prefill_units_min = (i_kernel == 0U) ? UINT32_MAX : 1U;
        for (size_t i = 0; i < step->n; i++) {
            memset(step->out[i], 0xff, fv_attn_case_out_bytes(step->cases[i]));
            memset(step->lse[i], 0xff, fv_attn_case_rows(step->cases[i]) * sizeof(float));
            step->cases[i]->spec.one_part = i_kernel == 1U; /* that kernel's tolerance */
        }
        assert_int_equal(k_ops->attend(backend, step->items, step->n), FV_OK);
        assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
        for (size_t i = 0; i < step->n; i++) {
            fv_attn_case_solve(step->cases[i]);
            assert_int_equal(fv_attn_case_check(step->cases[i], step->out[i], step->lse[i], name),
                             0);
        }
    }
}

static void step_free(step_t *step)
{
    for (size_t i = 0; i < step->n; i++) {
        fv_attn_case_destroy(step->cases[i]);
        free(step->out[i]);
        free(step->lse[i]);
    }
    memset(step, 0, sizeof(*step));
}

static fv_attn_spec_t
spec_of(int32_t n_kv_heads, int32_t group, int32_t n_tokens, int64_t kv_end, fv_policy_t policy)
{
    fv_attn_spec_t spec;

    memset(&spec, 0, sizeof(spec));
    spec.n_tokens = n_tokens;
    spec.n_kv_heads = n_kv_heads;
    spec.group = group;
    spec.head_dim_qk = 64;
    spec.head_dim_v = 64;
    spec.io_dtype = FV_DTYPE_BF16;
    spec.kv_dtype = FV_DTYPE_BF16;
    spec.causal = true;
    spec.policy = policy;
    spec.policy.kind = FV_POLICY_S2;
    spec.policy.n_heads =
        (policy.pattern_per == FV_PATTERN_Q_HEAD) ? (n_kv_heads * group) : n_kv_heads;
    spec.kv_end = kv_end;
    spec.position = kv_end - n_tokens;
    spec.seed = (uint64_t)(kv_end * 31 + policy.block_tokens);
    return spec;
}

static void one(const fv_attn_spec_t *spec, fv_rng_t *rng, const char *name)
{
    step_t step = {0};

    step_add(&step, spec, rng);
    step_run(&step, name);
    step_free(&step);
}

/* Every size of block, by KV head and by query head, decode and prefill, lengths round the borders of blocks. */
static void test_blocks(void **state)
{
    static const int64_t k_lengths[] = {1, 64, 65, 640, 1535, 1537, 3333};
    static const int32_t k_tokens[] = {1, 3, 200};
    fv_rng_t rng = {1};

    (void)state;
    for (int32_t block = 16; block <= 256; block *= 2) {
        for (int32_t per = FV_PATTERN_KV_HEAD; per <= FV_PATTERN_Q_HEAD; per++) {
            for (size_t i = 0; i < FV_COUNT(k_lengths); i += (size_t)quick(1, 4)) {
                fv_policy_t policy = {.block_tokens = block,
                                      .local_blocks = 1 + (int32_t)i % 3,
                                      .vert_stride = 5,
                                      .head_sliding_step = 1,
                                      .pattern_per = per};
                const int32_t n_tokens = (int32_t)fv_min64(k_tokens[i % 3], k_lengths[i]);
                fv_attn_spec_t spec = spec_of(3, 4, n_tokens, k_lengths[i], policy);

                one(&spec, &rng, "blocks");
            }
        }
    }
}

/* Prefill over blocks of query rows whose local blocks begin apart; dense heads beside sparse ones; one pattern for all. */
static void test_prefill(void **state)
{
    fv_rng_t rng = {2};

    (void)state;
    for (int i = 0; i < quick(8, 3); i++) {
        fv_policy_t policy = {.block_tokens = (i % 2 == 0) ? 64 : 32,
                              .local_blocks = 1 + i % 4,
                              .vert_stride = 4 + i,
                              .head_sliding_step = 1,
                              .num_dense_heads = (i == 2) ? 2 : 0,
                              .homo_head = (i == 3) ? 1 : 0,
                              .pattern_per = (i >= 6) ? FV_PATTERN_Q_HEAD : FV_PATTERN_KV_HEAD};
        fv_attn_spec_t spec = spec_of(4, (i == 4) ? 1 : 4, 300, 1100 + 64 * i, policy);

        spec.head_dim_qk = (i % 2 == 0) ? 128 : 64;
        spec.head_dim_v = spec.head_dim_qk;
        one(&spec, &rng, "prefill");
    }
}

/* Dense heads beside sparse ones whose local blocks end inside a page or a page before: each head has a mask of its own. */
static void test_dense_heads(void **state)
{
    fv_rng_t rng = {6};

    (void)state;
    for (int i = 0; i < quick(6, 2); i++) {
        fv_policy_t policy = {.block_tokens = (i % 2 == 0) ? 16 : 64,
                              .local_blocks = 1,
                              .vert_stride = 6,
                              .head_sliding_step = 1,
                              .num_dense_heads = 2,
                              .pattern_per = (i >= 4) ? FV_PATTERN_Q_HEAD : FV_PATTERN_KV_HEAD};
        fv_attn_spec_t spec = spec_of(4, 4, (i % 3 == 2) ? 1 : 600, 1000 + i, policy);

        one(&spec, &rng, "dense heads");
    }
}

/* Lines that every CTA has a share of, in one round and in several; groups in many pieces. */
static void test_long_lines(void **state)
{
    const fv_lean_tuning_t shipped = backend->tuning;
    const fv_policy_t policy = {
        .block_tokens = 64, .local_blocks = 8, .vert_stride = 16, .head_sliding_step = 1};
    fv_rng_t rng = {3};

    (void)state;
    for (int i = 0; i < quick(3, 1); i++) {
        fv_attn_spec_t spec = spec_of(8, 4, 1, 64 * 400 + 17, policy);
        step_t step = {0};

        if (i == 1) { /* shares in rounds, all merged late */
            backend->tuning.rounds_min[0] = 3;
            backend->tuning.tail_tiles[0] = 1;
            backend->tuning.first_percent = 60;
            backend->tuning.early_bytes = 0;
            backend->tuning.tail_bytes = 0;
        }
        backend->tuning.is_direct = (i == 2) ? 0U : shipped.is_direct;
        step_add(&step, &spec, &rng);
        spec.kv_end = 64 * 130;
        spec.position = spec.kv_end - 1;
        step_add(&step, &spec, &rng);
        spec.policy.kind = FV_POLICY_DENSE;
        step_add(&step, &spec, &rng);
        step_run(&step, "long");
        step_free(&step);
    }
    backend->tuning = shipped;
}

/* Steps of random problems, most of them of S2: every dtype, shape and pattern; NaN here and there. */
static void test_random_steps(void **state)
{
    fv_rng_t rng = {fv_test_seed(20261124)};

    (void)state;
    for (int n = 0; n < quick(60, 4); n++) {
        step_t step = {0};

        for (int i = 0; i < STEP_MAX; i++) {
            fv_attn_spec_t spec = fv_attn_spec_random(&rng, MACS);

            fv_attn_spec_maybe_s2(&rng, &spec);
            if ((spec.kv_end > 0) && (fv_rng_range(&rng, 0, 3) == 0)) {
                spec.spoil_token = fv_rng_range(&rng, 1, spec.kv_end);
            }
            step_add(&step, &spec, &rng);
        }
        step_run(&step, "random");
        step_free(&step);
    }
}

/* Entries of freed pages become FV_PAGE_NONE and change nothing, staged or kept; a hole in what is read is refused. */
static void test_holes(void **state)
{
    const fv_policy_t policy = {
        .block_tokens = 64, .local_blocks = 2, .vert_stride = 7, .head_sliding_step = 2};
    fv_attn_spec_t spec = spec_of(3, 2, 1, 64 * 50 + 5, policy);
    fv_rng_t rng = {4};

    (void)state;
    for (int is_kept = 0; is_kept < 2; is_kept++) {
        step_t step = {0};
        int32_t n_freed = 0;

        step_add(&step, &spec, &rng);
        fv_attn_case_t *attn = step.cases[0];
        step.items[0].table_id = is_kept != 0 ? 77U : 0U;
        step.items[0].table_version = 1;
        step.items[0].n_table_pages = 51;
        for (int32_t h = 0; h < 3; h++) {
            for (int32_t p = 0; p < 51 - 2; p++) {
                if (!fv_policy_keeps(&spec.policy, h, 2, p)) {
                    attn->pages[(size_t)h * attn->pages_stride + (size_t)p] = FV_PAGE_NONE;
                    n_freed++;
                }
            }
        }
        assert_int_equal(n_freed, 3 * 42);
        step_run(&step, "holes");
        attn->pages[attn->pages_stride + 50] = FV_PAGE_NONE;
        step.items[0].table_version = 2;
        assert_int_equal(k_ops->attend(backend, step.items, 1), FV_ERR_INVALID_ARG);
        assert_non_null(strstr(fv_error_context(), "pages[head 1][50]"));
        step_free(&step);
    }
}

/* The line is one of kept tiles: as long as the lists say, and shares of one round differ by at most one tile. */
static void test_line(void **state)
{
    const fv_policy_t policy = {
        .block_tokens = 64, .local_blocks = 8, .vert_stride = 16, .head_sliding_step = 1};
    fv_attn_spec_t spec = spec_of(8, 4, 1, 64 * 256, policy);
    fv_rng_t rng = {5};
    step_t step = {0};
    int32_t fewest = INT32_MAX;
    int32_t most = 0;

    (void)state;
    step_add(&step, &spec, &rng);
    assert_int_equal(fv_cuda_attend_plan(backend, step.items, 1), FV_OK);
    assert_int_equal(backend->n_launches, 1);
    const fv_lean_launch_t *launch = &backend->launches[0];
    const size_t offset = (size_t)((const uint8_t *)launch->shares - backend->staging_device);
    const fv_lean_share_t *shares = fv_cuda_on_host(backend, offset);

    /* 8 local blocks of 256, and the 248 before them are 15 turns of 16 and 8 more: of 8 residues only head 0's */
    assert_int_equal(launch->n_tiles, 8 * (8 + 15) + 1);
    for (uint32_t s = 0; s < launch->n_shares; s++) {
        fewest = (shares[s].n_tiles < fewest) ? shares[s].n_tiles : fewest;
        most = (shares[s].n_tiles > most) ? shares[s].n_tiles : most;
    }
    assert_true((launch->n_shares == launch->n_ctas) && (most - fewest <= 1));
    assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
    step_free(&step);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_blocks),       cmocka_unit_test(test_prefill),
        cmocka_unit_test(test_dense_heads),  cmocka_unit_test(test_long_lines),
        cmocka_unit_test(test_random_steps), cmocka_unit_test(test_holes),
        cmocka_unit_test(test_line),
    };

    if (!fv_backend_cuda_is_visible()) {
        print_message("no GPU: skipped\n");
        return 77;
    }
    return cmocka_run_group_tests(tests, setup, teardown);
}
