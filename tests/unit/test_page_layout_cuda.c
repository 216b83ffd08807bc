/*
 * test_page_layout_cuda.c - where the GPU's pages keep their elements: every chunk once, no bank conflicts, wgmma's panels.
 */
#include "kernels/page_layout_cuda.h"
#include "tests/support/test.h"

#include <string.h>

#define DIM_MAX 576U

static uint8_t g_seen[FV_PAGE_TOKENS * DIM_MAX * 4U / 16U];

/* Chunks fill the matrix, each place once; 8 tokens of one column of chunks lie in 8 groups of banks. */
static void test_every_row_length(void **state)
{
    (void)state;
    for (uint32_t elem_bytes = 2; elem_bytes <= 4U; elem_bytes += 2U) {
        for (uint32_t dim = 8; dim <= DIM_MAX; dim += 8U) {
            const uint32_t row_bytes = dim * elem_bytes;
            const uint32_t n_chunks = row_bytes / 16U;
            const fv_page_rows_t rows = fv_page_rows_make(row_bytes, elem_bytes);

            memset(g_seen, 0, sizeof(g_seen));
            for (uint32_t chunk = 0; chunk < n_chunks; chunk++) {
                uint32_t groups = 0;

                for (uint32_t token = 0; token < FV_PAGE_TOKENS; token++) {
                    const uint32_t at = fv_page_chunk(&rows, token, chunk);

                    assert_int_equal(at % 16U, 0);
                    assert_in_range(at, 0, FV_PAGE_TOKENS * row_bytes - 16U);
                    assert_int_equal(g_seen[at / 16U], 0);
                    g_seen[at / 16U] = 1;
                    groups |= 1U << (at / 16U % 8U);
                    if (token % 8U == 7U) {
                        assert_int_equal(groups, 0xff);
                        groups = 0;
                    }
                }
            }
        }
    }
}

/* The 128-byte swizzle as the hardware defines it: address bits 4 to 6 exclusive or with bits 7 to 9, panel by panel. */
static void test_panels(void **state)
{
    (void)state;
    for (uint32_t dim = 64; dim <= DIM_MAX; dim += 64U) {
        const fv_page_rows_t rows = fv_page_rows_make(dim * 2U, 2U);

        assert_true(fv_page_is_panels(dim * 2U, 2U));
        for (uint32_t token = 0; token < FV_PAGE_TOKENS; token++) {
            for (uint32_t chunk = 0; chunk < dim / 8U; chunk++) {
                const uint32_t plain = chunk / 8U * 8192U + token * 128U + chunk % 8U * 16U;

                assert_int_equal(fv_page_chunk(&rows, token, chunk),
                                 plain ^ ((plain >> 7U & 7U) << 4U));
            }
        }
    }
    assert_false(fv_page_is_panels(64U * 4U, 4U)); /* fp32: rows */
    assert_false(fv_page_is_panels(80U * 2U, 2U));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_row_length),
        cmocka_unit_test(test_panels),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
