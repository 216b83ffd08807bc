/*
 * test_cuda_latent_fp8.c - latents on the CUDA backend in FP8.
 *
 * Goal:   a page of FP8 has the bytes that the CPU's has (M9), and attention to it equals the fp64 oracle of the values as
 *         stored.
 * Method: attn_case.h's problems, poisoned: unused slots and unseen tokens are NaN.
 */
#include "kernels/backend_cuda.h"
#include "kernels/fp8.h"
#include "tests/support/attn_case.h"
#include "tests/support/test.h"

#include <cuda_runtime_api.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ARENA_BYTES ((size_t)64 << 20)

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

static void *take(size_t n_bytes, bool is_pinned)
{
    void *memory = NULL;

    if (is_pinned) {
        assert_int_equal(k_ops->host_alloc(backend, n_bytes, &memory), FV_OK);
    } else {
        memory = malloc(n_bytes + 1U);
    }
    assert_non_null(memory);
    memset(memory, 0xff, n_bytes); /* what is not written is NaN */
    return memory;
}

static void give(void *memory, bool is_pinned)
{
    if (is_pinned) {
        k_ops->host_free(backend, memory);
    } else {
        free(memory);
    }
}

/* ------------------------------------------------------------------ FP8 */

static fv_attn_spec_t fp8_spec(int32_t group, int32_t latent, int32_t rope, int32_t io)
{
    return (fv_attn_spec_t){.v_in_k = true,
                            .n_tokens = 1,
                            .n_kv_heads = 1,
                            .group = group,
                            .head_dim_qk = latent + rope,
                            .head_dim_v = latent,
                            .io_dtype = io,
                            .kv_dtype = FV_DTYPE_FP8_LATENT,
                            .softmax_scale = 0.06F,
                            .causal = true,
                            .seed = (uint64_t)(group * 10000 + latent + rope)};
}

static void check_one(const fv_attn_spec_t *spec, const char *name)
{
    fv_attn_case_t *attn = fv_attn_case_create(spec);
    fv_rng_t rng = {spec->seed};
    uint32_t next_unit = 0;
    const bool is_pinned = (spec->seed % 2U) != 0;

    fv_attn_case_place(attn, &rng, &next_unit);
    assert_true((size_t)next_unit * FV_PAGE_UNIT <= ARENA_BYTES);
    assert_int_equal(fv_attn_case_load(attn, k_ops, backend, &rng), FV_OK);
    void *out = take(fv_attn_case_out_bytes(attn), is_pinned);
    float *lse = take(fv_attn_case_rows(attn) * sizeof(float), is_pinned);
    fv_attn_item_t item = fv_attn_case_item(attn, 0, out, lse);

    assert_int_equal(k_ops->attend(backend, &item, 1), FV_OK);
    assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
    fv_attn_case_solve(attn);
    assert_int_equal(fv_attn_case_check(attn, out, lse, name), 0);
    give(out, is_pinned);
    give(lse, is_pinned);
    fv_attn_case_destroy(attn);
}

/* Heads, new tokens, lengths, dims, dtypes of the request, windows; a NaN spoils the rows that see it, and no others. */
static void test_fp8_cache(void **state)
{
    static const int32_t k_groups[] = {1, 16, 63, 128};
    static const int32_t k_latent[] = {512, 128, 256, 1024};

    (void)state;
    for (size_t i = 0; i < 12U; i++) {
        fv_attn_spec_t spec =
            fp8_spec(k_groups[i % 4U], k_latent[(i + i / 4U) % 4U], 8 * (int32_t)((i * 8U) % 17U),
                     (int32_t)(FV_DTYPE_F32 + i % 3U));

        spec.n_tokens = 1 + (int32_t)(i % 3U) * 3;
        spec.kv_end = 70 + 97 * (int64_t)(i % 5U);
        spec.position = spec.kv_end - spec.n_tokens;
        spec.spoil_token = (i % 2U == 0U) ? 0 : (spec.kv_end - 2);
        spec.logit_softcap = (i % 6U == 5U) ? 3.0F : 0.0F;
        spec.latent_mu = (i % 4U == 1U) ? 1.4F : 0.0F;
        if (i % 4U == 2U) {
            spec.policy =
                (fv_policy_t){.kind = FV_POLICY_WINDOW, .window_tokens = 90, .sink_tokens = 3};
        }
        check_one(&spec, "fp8");
    }
}

/* Values of every size, some not finite, a row of zeros. */
static void fill_row(fv_rng_t *rng, float *row, size_t n, size_t dv, size_t t)
{
    for (size_t d = 0; d < n; d++) {
        const int e = (int)fv_rng_range(rng, -40, 40);

        row[d] = ldexpf(fv_rng_normal(rng), (t % 3U == 0U) ? (e / 16) : e);
        row[d] = (t % 7U == 4U) ? 0.0F : row[d];
    }
    if (t % 5U == 2U) {
        row[fv_rng_range(rng, 0, (int64_t)dv - 1)] = (t % 2U == 0U) ? INFINITY : -NAN;
    }
    if (t % 9U == 8U) {
        row[fv_rng_range(rng, 0, (int64_t)dv - 1)] = 1e-42F; /* too small for a scale, alone */
    }
}

typedef struct bytes_case {
    int32_t latent, rope, dtype;
    float norm_alpha;
    size_t gap; /* elements between latent and RoPE key */
} bytes_case_t;

/* Whole pages as they are stored, into the other two places: how a host's copy comes back. */
static void bring_pages(const fv_append_item_t *like,
                        const fv_page_ref_t pages[2],
                        const uint8_t *stored,
                        size_t page_bytes)
{
    fv_append_item_t append = *like;
    uint8_t *here = malloc(2U * page_bytes);

    assert_non_null(here);
    append.src_dtype = FV_DTYPE_FP8_LATENT;
    append.norm_alpha = 0.0F;
    append.rope_gap_bytes = 0;
    append.k = stored; /* page 0 of the arena is the item's second one */
    append.local_begin = 0;
    append.n_tokens = 2U * FV_PAGE_TOKENS;
    assert_int_equal(cudaMemset(backend->arena, 0x5a, 2U * page_bytes), cudaSuccess);
    assert_int_equal(k_ops->append(backend, &append, 1), FV_OK);
    assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
    for (size_t p = 0; p < 2U; p++) {
        assert_int_equal(cudaMemcpy(here + p * page_bytes,
                                    backend->arena + (size_t)pages[p] * FV_PAGE_UNIT, page_bytes,
                                    cudaMemcpyDeviceToHost),
                         cudaSuccess);
    }
    assert_memory_equal(here, stored, 2U * page_bytes);
    free(here);
}

/* The same rows appended here and by the CPU: the same bytes, that is. */
static void same_bytes(const bytes_case_t *c, fv_rng_t *rng)
{
    enum {
        TOKENS = 90,
        FIRST = 20
    };
    const size_t row = (size_t)c->latent + c->gap + (size_t)c->rope;
    const size_t page_bytes =
        fv_page_bytes(FV_DTYPE_FP8_LATENT, c->latent + c->rope, c->latent, true);
    const size_t e = fv_dtype_bytes((fv_dtype_t)c->dtype);
    const size_t n_units = page_bytes / FV_PAGE_UNIT;
    const fv_page_ref_t pages[2] = {(fv_page_ref_t)n_units, 0};
    float *values = malloc(row * sizeof(float));
    uint8_t *rows = malloc(TOKENS * row * sizeof(float));
    uint8_t *here = malloc(2U * page_bytes);
    uint8_t *there = aligned_alloc(4096, fv_align_up(2U * page_bytes + FV_KV_ARENA_SLACK, 4096U));
    fv_backend_config_t config = {
        .n_threads = 1, .kv_arena_bytes = 2U * page_bytes, .kv_arena = there};
    fv_backend_t *cpu = NULL;

    assert_true((values != NULL) && (rows != NULL) && (here != NULL) && (there != NULL));
    assert_int_equal(fv_backend_cpu.create(&config, &cpu), FV_OK);
    memset(there, 0xa5, 2U * page_bytes);
    assert_int_equal(cudaMemset(backend->arena, 0xa5, 2U * page_bytes), cudaSuccess);
    for (size_t t = 0; t < TOKENS; t++) {
        fill_row(rng, values, row, (size_t)c->latent, t);
        for (size_t d = 0; d < row; d++) {
            fv_store_element(rows, (fv_dtype_t)c->dtype, t * row + d, values[d]);
        }
    }
    const fv_append_item_t append = {.n_kv_heads = 1,
                                     .head_dim_qk = c->latent + c->rope,
                                     .head_dim_v = c->latent,
                                     .src_dtype = c->dtype,
                                     .kv_dtype = FV_DTYPE_FP8_LATENT,
                                     .v_in_k = true,
                                     .rope_gap_bytes = c->gap * e,
                                     .norm_alpha = c->norm_alpha,
                                     .norm_eps = 1e-6F,
                                     .k = rows,
                                     .k_token_bytes = row * e,
                                     .local_begin = FIRST,
                                     .n_tokens = TOKENS,
                                     .pages = pages,
                                     .pages_head_stride = 2};

    assert_int_equal(fv_backend_cpu.append(cpu, &append, 1), FV_OK);
    assert_int_equal(k_ops->append(backend, &append, 1), FV_OK);
    assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
    assert_int_equal(cudaMemcpy(here, backend->arena, 2U * page_bytes, cudaMemcpyDeviceToHost),
                     cudaSuccess);
    assert_memory_equal(here, there, 2U * page_bytes);
    bring_pages(&append, pages, there, page_bytes);
    fv_backend_cpu.destroy(cpu);
    free(values);
    free(rows);
    free(here);
    free(there);
}

static void test_fp8_pages_have_the_bytes_of_a_cpu(void **state)
{
    static const bytes_case_t k_cases[] = {
        {512, 64, FV_DTYPE_BF16, 0.0F, 0},    {512, 64, FV_DTYPE_F32, 0.7F, 0},
        {128, 8, FV_DTYPE_F16, 1.3F, 0},      {1024, 0, FV_DTYPE_F32, 0.0F, 0},
        {256, 64, FV_DTYPE_BF16, 0.25F, 256}, {128, 128, FV_DTYPE_F32, 0.5F, 384},
    };
    fv_rng_t rng = {fv_test_seed(20261123)};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_cases); i++) {
        same_bytes(&k_cases[i], &rng);
    }
}

static void test_wrong_descriptors_are_refused(void **state)
{
    fv_attn_spec_t spec = fp8_spec(4, 128, 8, FV_DTYPE_F32);
    fv_attn_case_t *attn = NULL;
    fv_rng_t rng = {9};
    uint32_t next_unit = 0;
    float out[4 * 128];

    (void)state;
    spec.kv_end = 30;
    spec.position = 29;
    attn = fv_attn_case_create(&spec);
    fv_attn_case_place(attn, &rng, &next_unit);
    assert_int_equal(fv_attn_case_load(attn, k_ops, backend, &rng), FV_OK);
    fv_attn_item_t item = fv_attn_case_item(attn, 0, out, NULL);

    item.head_dim_v = 120; /* no whole scales */
    assert_int_equal(k_ops->attend(backend, &item, 1), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "kv_dtype"));
    fv_attn_case_destroy(attn);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fp8_cache),
        cmocka_unit_test(test_fp8_pages_have_the_bytes_of_a_cpu),
        cmocka_unit_test(test_wrong_descriptors_are_refused),
    };

    if (!fv_backend_cuda_is_visible()) {
        print_message("no GPU: skipped\n");
        return 77;
    }
    return cmocka_run_group_tests(tests, setup, teardown);
}
