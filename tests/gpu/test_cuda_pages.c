/*
 * test_cuda_pages.c - pages and parts on the GPU: shards merge to the whole, copies, refusals, far offsets, CPU = GPU.
 */
#include "kernels/kernels.h"
#include "tests/support/attn_case.h"
#include "tests/support/test.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ARENA_BYTES ((size_t)64 << 20)
#define FAR_BYTES   ((size_t)20 << 30) /* over 2^33 bf16 elements */
#define PARTS_MAX   4

static const fv_backend_ops_t *const k_ops = &fv_backend_cuda;

static fv_backend_t *make(size_t arena_bytes)
{
    fv_backend_config_t config = {.kv_arena_bytes = arena_bytes};
    fv_backend_t *backend = NULL;

    assert_int_equal(k_ops->create(&config, &backend), FV_OK);
    return backend;
}

/* Partial states of each part, split over two destinations; then merged in two items that cut a token. */
static void shards(fv_backend_t *backend, const fv_attn_spec_t *spec, fv_rng_t *rng, bool is_pinned)
{
    fv_attn_case_t *attn = fv_attn_case_create(spec);
    const size_t n_rows = fv_attn_case_rows(attn);
    const size_t dv = (size_t)spec->head_dim_v;
    const size_t cut = n_rows / 3U;
    const size_t state = n_rows * (dv + 1U) * sizeof(float);
    uint8_t *out = malloc(fv_attn_case_out_bytes(attn));
    float *lse = malloc(n_rows * sizeof(float));
    float *parts[PARTS_MAX];
    const float *o[2][PARTS_MAX];
    const float *l[2][PARTS_MAX];
    fv_merge_item_t merges[2];
    uint32_t next_unit = 0;

    fv_attn_case_place(attn, rng, &next_unit);
    assert_int_equal(fv_attn_case_load(attn, k_ops, backend, rng), FV_OK);
    for (uint16_t part = 0; part < spec->n_parts; part++) {
        void *memory = NULL;

        if (is_pinned) {
            assert_int_equal(k_ops->host_alloc(backend, state, &memory), FV_OK);
        } else {
            memory = malloc(state);
        }
        memset(memory, 0xff, state);
        parts[part] = memory;
        o[0][part] = parts[part];
        o[1][part] = parts[part] + cut * dv;
        l[0][part] = parts[part] + n_rows * dv;
        l[1][part] = parts[part] + n_rows * dv + cut;
        fv_attn_item_t item = fv_attn_case_item(attn, part, NULL, NULL);
        fv_partial_dst_t dst[2] = {{0, parts[part], parts[part] + n_rows * dv},
                                   {cut, parts[part] + cut * dv, parts[part] + n_rows * dv + cut}};
        item.dst = dst;
        item.n_dst = 2;
        assert_int_equal(k_ops->attend(backend, &item, 1), FV_OK);
        assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
    }
    memset(out, 0xff, fv_attn_case_out_bytes(attn));
    for (int i = 0; i < 2; i++) {
        merges[i] = (fv_merge_item_t){
            .n_rows = (i == 0) ? cut : (n_rows - cut),
            .n_parts = spec->n_parts,
            .head_dim_v = spec->head_dim_v,
            .io_dtype = spec->io_dtype,
            .o = o[i],
            .lse_log2 = l[i],
            .row_base = (i == 0) ? 0 : cut,
            .row_len = (uint64_t)attn->n_q_heads,
            .out = out,
            .out_token_bytes =
                (size_t)attn->n_q_heads * dv * fv_dtype_bytes((fv_dtype_t)spec->io_dtype),
            .lse = lse,
            .lse_token_stride = (size_t)attn->n_q_heads,
        };
    }
    assert_int_equal(k_ops->merge(backend, merges, 2, NULL), FV_OK);
    assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
    fv_attn_case_solve(attn);
    assert_int_equal(fv_attn_case_check(attn, out, lse, "shards"), 0);
    for (uint16_t part = 0; part < spec->n_parts; part++) {
        if (is_pinned) {
            k_ops->host_free(backend, parts[part]);
        } else {
            free(parts[part]);
        }
    }
    free(out);
    free(lse);
    fv_attn_case_destroy(attn);
}

static void test_shards(void **state)
{
    fv_backend_t *backend = make(ARENA_BYTES);
    fv_rng_t rng = {fv_test_seed(7)};

    (void)state;
    for (int i = 0; i < 24; i++) {
        fv_attn_spec_t spec = fv_attn_spec_random(&rng, 1000000);

        spec.n_parts = (uint16_t)(1 + i % PARTS_MAX);
        shards(backend, &spec, &rng, (i % 2) != 0);
    }
    k_ops->destroy(backend);
}

/* A page of a far-away place is the page that is read: the arena is longer than 32-bit arithmetic reaches. */
static void test_far_offsets(void **state)
{
    fv_backend_t *backend = make(FAR_BYTES);
    fv_rng_t rng = {11};
    uint32_t next_unit = (uint32_t)((FAR_BYTES - ((size_t)4 << 20)) / FV_PAGE_UNIT);
    fv_attn_spec_t spec = {.n_tokens = 1,
                           .n_kv_heads = 2,
                           .group = 4,
                           .head_dim_qk = 128,
                           .head_dim_v = 128,
                           .io_dtype = FV_DTYPE_BF16,
                           .kv_dtype = FV_DTYPE_BF16,
                           .causal = true,
                           .kv_end = 1000,
                           .position = 999,
                           .seed = 12};
    fv_attn_case_t *attn = fv_attn_case_create(&spec);
    uint8_t *out = malloc(fv_attn_case_out_bytes(attn));

    (void)state;
    fv_attn_case_place(attn, &rng, &next_unit);
    assert_int_equal(fv_attn_case_load(attn, k_ops, backend, &rng), FV_OK);
    fv_attn_item_t item = fv_attn_case_item(attn, 0, out, NULL);
    assert_int_equal(k_ops->attend(backend, &item, 1), FV_OK);
    assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
    fv_attn_case_solve(attn);
    assert_int_equal(fv_attn_case_check(attn, out, NULL, "far"), 0);
    /* the same page of near memory, were the offset cut to 32 bits, is not there at all */
    fv_page_copy_t copy = {.src = attn->pages[0],
                           .dst = 0,
                           .n_tokens = 64,
                           .head_dim_qk = 128,
                           .head_dim_v = 128,
                           .kv_dtype = FV_DTYPE_BF16};
    assert_int_equal(k_ops->copy_pages(backend, &copy, 1), FV_OK);
    attn->pages[0] = 0;
    memset(out, 0xff, fv_attn_case_out_bytes(attn));
    assert_int_equal(k_ops->attend(backend, &item, 1), FV_OK);
    assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
    assert_int_equal(fv_attn_case_check(attn, out, NULL, "copied"), 0);
    free(out);
    fv_attn_case_destroy(attn);
    k_ops->destroy(backend);
}

/* Both backends answer the same problem within twice the tolerance that each keeps to the oracle: checked each. */
static void test_cpu_equals_gpu(void **state)
{
    const fv_backend_ops_t *const k_both[] = {&fv_backend_cpu, &fv_backend_cuda};
    fv_rng_t rng = {fv_test_seed(13)};

    (void)state;
    for (int n = 0; n < 6; n++) {
        fv_attn_spec_t spec = fv_attn_spec_random(&rng, 1000000);
        fv_attn_case_t *attn = fv_attn_case_create(&spec);
        void *out[2];
        double worst = 0.0;

        fv_attn_case_solve(attn);
        for (int i = 0; i < 2; i++) {
            fv_backend_config_t config = {.n_threads = 4, .kv_arena_bytes = ARENA_BYTES};
            fv_backend_t *backend = NULL;
            uint32_t next_unit = 0;

            out[i] = malloc(fv_attn_case_out_bytes(attn));
            assert_int_equal(k_both[i]->create(&config, &backend), FV_OK);
            fv_attn_case_place(attn, &rng, &next_unit);
            assert_int_equal(fv_attn_case_load(attn, k_both[i], backend, &rng), FV_OK);
            fv_attn_item_t item = fv_attn_case_item(attn, 0, out[i], NULL);
            assert_int_equal(k_both[i]->attend(backend, &item, 1), FV_OK);
            assert_int_equal(k_both[i]->finish(backend, NULL, NULL), FV_OK);
            assert_int_equal(fv_attn_case_check(attn, out[i], NULL, k_both[i]->name), 0);
            k_both[i]->destroy(backend);
        }
        for (size_t i = 0; i < fv_attn_case_rows(attn) * (size_t)spec.head_dim_v; i++) {
            const double a = (double)fv_load_element(out[0], (fv_dtype_t)spec.io_dtype, i);
            const double b = (double)fv_load_element(out[1], (fv_dtype_t)spec.io_dtype, i);
            const fv_tolerance_t tolerance = fv_attn_tolerance(attn);
            const double allowed =
                2.0 * (tolerance.relative * fabs(a) + tolerance.absolute * attn->v_bound) + 1e-12;

            worst = isfinite(a) ? fmax(worst, fabs(a - b) / allowed) : worst;
        }
        assert_true(worst <= 1.0);
        free(out[0]);
        free(out[1]);
        fv_attn_case_destroy(attn);
    }
}

/* A page reference outside the arena is refused, and nothing is read or written. */
static void test_refusals(void **state)
{
    fv_backend_t *backend = make(ARENA_BYTES);
    const fv_page_ref_t wild = (fv_page_ref_t)(ARENA_BYTES / FV_PAGE_UNIT);
    uint16_t row[2 * 128] = {0};
    fv_append_item_t append = {.n_kv_heads = 1,
                               .head_dim_qk = 128,
                               .head_dim_v = 128,
                               .src_dtype = FV_DTYPE_BF16,
                               .kv_dtype = FV_DTYPE_BF16,
                               .k = row,
                               .v = row,
                               .n_tokens = 1,
                               .pages = &wild,
                               .pages_head_stride = 1};
    fv_attn_item_t attend = {.n_tokens = 1,
                             .n_kv_heads = 1,
                             .group = 1,
                             .head_dim_qk = 128,
                             .head_dim_v = 128,
                             .io_dtype = FV_DTYPE_BF16,
                             .kv_dtype = FV_DTYPE_BF16,
                             .softmax_scale = 1.0F,
                             .shard = {.shard_tokens = 64, .n_parts = 1},
                             .kv_end = 1,
                             .q = row,
                             .pages = &wild,
                             .out = row + 128};
    fv_page_copy_t copy = {
        .src = wild, .head_dim_qk = 128, .head_dim_v = 128, .kv_dtype = FV_DTYPE_BF16};

    (void)state;
    assert_int_equal(k_ops->append(backend, &append, 1), FV_ERR_INVALID_ARG);
    assert_int_equal(k_ops->attend(backend, &attend, 1), FV_ERR_INVALID_ARG);
    assert_int_equal(k_ops->copy_pages(backend, &copy, 1), FV_ERR_INVALID_ARG);
    attend.group = 0;
    assert_int_equal(k_ops->attend(backend, &attend, 1), FV_ERR_INVALID_ARG);
    assert_int_equal(k_ops->attend(backend, NULL, 0), FV_OK);
    assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
    k_ops->destroy(backend);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shards),
        cmocka_unit_test(test_far_offsets),
        cmocka_unit_test(test_cpu_equals_gpu),
        cmocka_unit_test(test_refusals),
    };

    if (!fv_backend_cuda_is_visible()) {
        print_message("no GPU: skipped\n");
        return 77;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
