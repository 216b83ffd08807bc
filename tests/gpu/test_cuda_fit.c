/*
 * test_cuda_fit.c - which lean kernel an item takes, and what shared memory is too small for. Needs no GPU.
 *
 * Method: a backend that has nothing but what the choice looks at, as an H100 and as an A100. On sm_90 the choice goes by
 *         rows alone and everything fits; sm_80 refuses fp32 KV of large head dims, and nothing else.
 */
#include "tests/support/cuda_case.h"
#include "tests/support/test.h"

#include <string.h>

#define H100_SMEM ((size_t)228 << 10)
#define A100_SMEM ((size_t)164 << 10)

static fv_attn_item_t item_of(int32_t dk, int32_t dv, int32_t io, int32_t kv, int32_t n_rows)
{
    return (fv_attn_item_t){.n_tokens = 1,
                            .n_kv_heads = 1,
                            .group = n_rows,
                            .head_dim_qk = dk,
                            .head_dim_v = dv,
                            .io_dtype = io,
                            .kv_dtype = kv};
}

/* Calls check with every shape. */
static void for_each(fv_backend_t *backend,
                     void (*check)(const fv_backend_t *backend, const fv_attn_item_t *item))
{
    static const int32_t k_rows[] = {1, 16, 17, 32, 33, 500};

    for (int32_t dk = 8; dk <= 256; dk += 8) {
        for (int32_t dv = 8; dv <= 256; dv += 8) {
            for (int32_t io = FV_DTYPE_F32; io <= FV_DTYPE_BF16; io++) {
                for (int32_t kv = FV_DTYPE_F32; kv <= FV_DTYPE_BF16; kv++) {
                    for (size_t r = 0; r < FV_COUNT(k_rows); r++) {
                        const fv_attn_item_t item = item_of(dk, dv, io, kv, k_rows[r]);

                        check(backend, &item);
                    }
                }
            }
        }
    }
}

static void check_sm90(const fv_backend_t *backend, const fv_attn_item_t *item)
{
    const bool is_wide =
        (item->kv_dtype == FV_DTYPE_F32) && ((item->head_dim_qk > 128) || (item->head_dim_v > 128));
    const int32_t most = is_wide ? 2 : 4;
    const int32_t warps = (item->group <= 16) ? 1 : ((item->group <= 32) ? 2 : most);

    assert_int_equal(fv_cuda_item_geometry(backend, item).m_warps, warps);
    assert_true(fv_cuda_attend_fits(backend, item));
}

static void check_sm80(const fv_backend_t *backend, const fv_attn_item_t *item)
{
    const bool is_large = (item->head_dim_qk > 192) || (item->head_dim_v > 192);

    if (!fv_cuda_attend_fits(backend, item)) {
        assert_true((item->kv_dtype == FV_DTYPE_F32) && is_large);
    }
}

static void test_sm90(void **state)
{
    static fv_backend_t backend;

    (void)state;
    backend.has_sm90 = true;
    backend.smem_per_sm = H100_SMEM;
    for_each(&backend, check_sm90);
}

static void test_sm80(void **state)
{
    static fv_backend_t backend;
    fv_attn_item_t item = item_of(256, 256, FV_DTYPE_F32, FV_DTYPE_F32, 4);

    (void)state;
    backend.smem_per_sm = A100_SMEM;
    for_each(&backend, check_sm80);
    assert_false(fv_cuda_attend_fits(&backend, &item));
    assert_int_equal(fv_backend_cuda.check_attend(&backend, &item), FV_ERR_UNIMPLEMENTED);
    assert_non_null(strstr(fv_error_context(), "given f32, 256, 256 and tensors of f32"));
    /* 64 rows of Q in three parts leave no room: 32 do */
    item = item_of(256, 256, FV_DTYPE_F32, FV_DTYPE_BF16, 64);
    assert_int_equal(fv_cuda_item_geometry(&backend, &item).m_warps, 2);
    assert_int_equal(fv_backend_cuda.check_attend(&backend, &item), FV_OK);
    /* what 16 rows need to join their sums leaves none: 64 rows join none */
    item = item_of(240, 240, FV_DTYPE_BF16, FV_DTYPE_F32, 4);
    assert_int_equal(fv_cuda_item_geometry(&backend, &item).m_warps, 4);
}

/* What the GPU tests do to random problems makes all of them fit. */
static void test_random(void **state)
{
    static fv_backend_t backend;
    fv_rng_t rng = {fv_test_seed(20261125)};

    (void)state;
    backend.smem_per_sm = A100_SMEM;
    for (int n = 0; n < 20000; n++) {
        fv_attn_spec_t spec = fv_attn_spec_random(&rng, 1000000);

        if (n % 2 == 0) {
            fv_attn_spec_maybe_s2(&rng, &spec);
        }
        fv_cuda_case_fit(&backend, &spec);
        assert_true(fv_cuda_case_fits(&backend, &spec));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sm90),
        cmocka_unit_test(test_sm80),
        cmocka_unit_test(test_random),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
