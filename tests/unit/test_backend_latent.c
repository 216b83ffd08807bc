/*
 * test_backend_latent.c - MLA at the real dims (512 + 64) on every instruction set: FlashMLA's grid of heads, new tokens and
 * lengths; a scale that is the caller's; V that is K's own beginning.
 */
#include "kernels/kernels.h"
#include "tests/support/attn_case.h"
#include "tests/support/test.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ARENA ((size_t)16 << 20)

static const char *const k_isas[] = {"amx", "avx512", "avx2", "portable"};

static fv_attn_spec_t mla(int32_t heads, int32_t n_tokens, int64_t kv_end, int32_t dtype)
{
    return (fv_attn_spec_t){.n_tokens = n_tokens,
                            .n_kv_heads = 1,
                            .group = heads,
                            .head_dim_qk = 576,
                            .head_dim_v = 512,
                            .io_dtype = dtype,
                            .kv_dtype = dtype,
                            .v_in_k = true,
                            .softmax_scale = 0.05F,
                            .causal = true,
                            .position = (kv_end > n_tokens) ? (kv_end - n_tokens) : 0,
                            .kv_end = kv_end,
                            .seed = (uint64_t)(heads * 1000 + n_tokens * 100) + (uint64_t)kv_end};
}

/* Runs one case and compares it with the oracle. */
static void check(fv_backend_t *backend, const fv_attn_spec_t *spec, const char *name)
{
    fv_rng_t rng = {spec->seed};
    uint32_t next_unit = 0;
    fv_attn_case_t *attn = fv_attn_case_create(spec);

    fv_attn_case_place(attn, &rng, &next_unit);
    assert_int_equal(fv_attn_case_load(attn, &fv_backend_cpu, backend, &rng), FV_OK);
    void *out = malloc(fv_attn_case_out_bytes(attn));
    float *lse = malloc(fv_attn_case_rows(attn) * sizeof(*lse));
    fv_attn_item_t item = fv_attn_case_item(attn, 0, out, lse);

    assert_int_equal(fv_backend_cpu.attend(backend, &item, 1), FV_OK);
    assert_int_equal(fv_backend_cpu.finish(backend, NULL, NULL), FV_OK);
    fv_attn_case_solve(attn);
    assert_int_equal(fv_attn_case_check(attn, out, lse, name), 0);
    fv_attn_case_destroy(attn);
    free(out);
    free(lse);
}

static fv_backend_t *open_backend(const char *isa)
{
    fv_backend_config_t config = {.n_threads = 2, .kv_arena_bytes = ARENA, .isa = isa};
    fv_backend_t *backend = NULL;

    if (fv_backend_cpu.create(&config, &backend) != FV_OK) {
        print_message("%s: not on this machine\n", isa);
        return NULL;
    }
    return backend;
}

/* M1, M5, M8: the first row of several new tokens sees fewer keys; length 0 is the empty set. */
static void test_flashmla_grid(void **state)
{
    static const int32_t k_heads[] = {1, 3, 9, 63, 64, 126, 128};
    static const int32_t k_tokens[] = {1, 2, 4};
    static const int64_t k_lengths[] = {0, 20, 140};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_isas); i++) {
        fv_backend_t *backend = open_backend(k_isas[i]);

        for (size_t h = 0; (backend != NULL) && (h < FV_COUNT(k_heads)); h++) {
            for (size_t t = 0; t < FV_COUNT(k_tokens); t++) {
                /* one length each, in turn: every pair of two of the three is met */
                fv_attn_spec_t spec = mla(k_heads[h], k_tokens[t], k_lengths[(h + t) % 3U],
                                          (h % 2U == 0U) ? FV_DTYPE_BF16 : FV_DTYPE_F32);

                check(backend, &spec, k_isas[i]);
            }
        }
        if (backend != NULL) {
            fv_attn_spec_t deep = mla(16, 1, 4096, FV_DTYPE_BF16);

            check(backend, &deep, k_isas[i]);
            fv_backend_cpu.destroy(backend);
        }
    }
}

/* M3: 0.13523 (DeepSeek-V3 with YaRN), 1/sqrt(192), 1/sqrt(576); and what only some kernels take the fast way. */
static void test_scales_and_dtypes(void **state)
{
    static const float k_scales[] = {0.13523F, 0.0721688F, 0.0416667F};
    static const int32_t k_dtypes[] = {FV_DTYPE_F16, FV_DTYPE_BF16, FV_DTYPE_F32};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_isas); i++) {
        fv_backend_t *backend = open_backend(k_isas[i]);

        for (size_t s = 0; (backend != NULL) && (s < FV_COUNT(k_scales)); s++) {
            fv_attn_spec_t spec = mla(16, 2, 200, k_dtypes[s]);

            spec.softmax_scale = k_scales[s];
            check(backend, &spec, k_isas[i]);
            spec.latent_mu = 1.3F; /* the query is no longer what its dtype holds */
            check(backend, &spec, k_isas[i]);
            spec.logit_softcap = 2.0F;
            check(backend, &spec, k_isas[i]);
        }
        if (backend != NULL) {
            fv_backend_cpu.destroy(backend);
        }
    }
}

/* M9: a cache of FP8 latents, 656 bytes a token and other dims, on every instruction set; NaN spoils its rows alone. */
static void test_fp8_cache(void **state)
{
    static const int32_t k_heads[] = {1, 16, 63, 128};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_isas); i++) {
        fv_backend_t *backend = open_backend(k_isas[i]);

        for (size_t h = 0; (backend != NULL) && (h < FV_COUNT(k_heads)); h++) {
            fv_attn_spec_t spec = mla(k_heads[h], 1 + (int32_t)(h % 3U), 70 + 100 * (int64_t)h,
                                      (h % 2U == 0U) ? FV_DTYPE_BF16 : FV_DTYPE_F32);

            spec.kv_dtype = FV_DTYPE_FP8_LATENT;
            check(backend, &spec, k_isas[i]);
            spec.head_dim_v = 128;
            spec.head_dim_qk = 128 + 8 * (int32_t)h;
            spec.spoil_token = 40;
            check(backend, &spec, k_isas[i]);
        }
        if (backend != NULL) {
            fv_backend_cpu.destroy(backend);
        }
    }
}

/* Pages of FP8 latents leave and come back as they are; nothing else is taken for one. */
static void test_fp8_pages_move_whole(void **state)
{
    enum {
        DK = 192,
        DV = 128,
        PAGE = 17 * 1024 /* 64 (128 + 4 + 2 * 64), in whole KiB */
    };
    static const fv_page_ref_t pages[2] = {0, PAGE / FV_PAGE_UNIT};
    static uint8_t stored[2][PAGE];
    static uint8_t again[PAGE];
    fv_backend_t *backend = open_backend("portable");
    fv_append_item_t append = {.n_kv_heads = 1,
                               .head_dim_qk = DK,
                               .head_dim_v = DV,
                               .src_dtype = FV_DTYPE_FP8_LATENT,
                               .kv_dtype = FV_DTYPE_FP8_LATENT,
                               .v_in_k = true,
                               .k = stored,
                               .n_tokens = 128,
                               .pages = pages,
                               .pages_head_stride = 2};

    (void)state;
    for (size_t i = 0; i < sizeof(stored); i++) {
        stored[i / PAGE][i % PAGE] = (uint8_t)(i * 31U + i / 251U);
    }
    assert_int_equal(fv_backend_cpu.append(backend, &append, 1), FV_OK);
    for (size_t p = 0; p < 2U; p++) {
        const fv_page_copy_t page = {.src = pages[p],
                                     .dst = pages[p],
                                     .n_tokens = 64,
                                     .head_dim_qk = DK,
                                     .head_dim_v = DV,
                                     .kv_dtype = FV_DTYPE_FP8_LATENT,
                                     .v_in_k = true};

        assert_int_equal(fv_cpu_read_page(backend, &page, again, NULL), FV_OK);
        assert_memory_equal(again, stored[p], PAGE);
    }
    append.n_tokens = 100;
    assert_int_equal(fv_backend_cpu.append(backend, &append, 1), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "n_tokens: given 100"));
    append.n_tokens = 128;
    append.kv_dtype = FV_DTYPE_BF16;
    assert_int_equal(fv_backend_cpu.append(backend, &append, 1), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "src_dtype"));
    fv_backend_cpu.destroy(backend);
}

/* M5: a batch of 128 with sequences of length 0 among it: their rows are 0 with lse -inf, the others as alone. */
static void test_empty_sequences_in_a_batch(void **state)
{
    enum {
        N = 128,
        HEADS = 16
    };
    static fv_attn_item_t items[N];
    fv_backend_t *backend = open_backend("auto");
    fv_rng_t rng = {5};
    uint32_t next_unit = 0;
    fv_attn_case_t *cases[N];
    float *out = malloc((size_t)N * HEADS * 512U * sizeof(*out));
    float lse[N * HEADS];

    (void)state;
    assert_true((backend != NULL) && (out != NULL));
    for (int32_t i = 0; i < N; i++) {
        fv_attn_spec_t spec = mla(HEADS, 1, (i % 5 == 0) ? 0 : (1 + i % 60), FV_DTYPE_F32);

        spec.kv_dtype = FV_DTYPE_BF16;
        spec.seed += (uint64_t)i;
        cases[i] = fv_attn_case_create(&spec);
        fv_attn_case_place(cases[i], &rng, &next_unit);
        assert_int_equal(fv_attn_case_load(cases[i], &fv_backend_cpu, backend, &rng), FV_OK);
        items[i] =
            fv_attn_case_item(cases[i], 0, out + (size_t)i * HEADS * 512U, lse + (size_t)i * HEADS);
    }
    assert_int_equal(fv_backend_cpu.attend(backend, items, N), FV_OK);
    for (size_t i = 0; i < N; i++) {
        fv_attn_case_solve(cases[i]);
        assert_int_equal(
            fv_attn_case_check(cases[i], out + i * HEADS * 512U, lse + i * HEADS, "batch"), 0);
        for (size_t h = 0; (i % 5U == 0U) && (h < HEADS); h++) {
            assert_true(isinf(lse[i * HEADS + h]) && (lse[i * HEADS + h] < 0.0F));
            assert_true(out[(i * HEADS + h) * 512U] == 0.0F);
        }
        fv_attn_case_destroy(cases[i]);
    }
    free(out);
    fv_backend_cpu.destroy(backend);
}

static void test_wrong_descriptors_are_named(void **state)
{
    fv_backend_t *backend = open_backend("portable");
    fv_attn_spec_t spec = mla(2, 1, 10, FV_DTYPE_F32);
    fv_attn_case_t *attn = fv_attn_case_create(&spec);
    fv_rng_t rng = {1};
    uint32_t next_unit = 0;
    float out[2 * 512];

    (void)state;
    fv_attn_case_place(attn, &rng, &next_unit);
    const fv_attn_item_t good = fv_attn_case_item(attn, 0, out, NULL);
    fv_attn_item_t bad = good;
    bad.v_in_k = false; /* then 576 is too wide */
    assert_int_equal(fv_backend_cpu.attend(backend, &bad, 1), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "head_dim_qk: given 576"));
    bad = good;
    bad.head_dim_v = 584;
    assert_int_equal(fv_backend_cpu.attend(backend, &bad, 1), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "head_dim_v: given 584"));
    bad = good;
    bad.rope_gap_bytes = 64;
    assert_int_equal(fv_backend_cpu.attend(backend, &bad, 1), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "q_head_bytes"));
    bad = good;
    bad.latent_mu = -1.0F;
    assert_int_equal(fv_backend_cpu.attend(backend, &bad, 1), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "latent_mu: given -1"));
    fv_attn_case_destroy(attn);
    fv_backend_cpu.destroy(backend);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_flashmla_grid),
        cmocka_unit_test(test_scales_and_dtypes),
        cmocka_unit_test(test_empty_sequences_in_a_batch),
        cmocka_unit_test(test_fp8_cache),
        cmocka_unit_test(test_fp8_pages_move_whole),
        cmocka_unit_test(test_wrong_descriptors_are_named),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
