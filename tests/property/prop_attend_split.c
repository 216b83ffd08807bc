/*
 * prop_attend_split.c - any split of the context over parts, merged, equals the whole.
 *
 * Each part attends to its own pages with partial destinations, cut at random rows as the exchange cuts them; then
 * each destination is merged. Parts without any block take part too.
 */
#include "kernels/kernels.h"
#include "tests/support/attn_case.h"
#include "tests/support/test.h"

#include <stdlib.h>
#include <string.h>

#define N_CASES   60
#define MACS      300000
#define PARTS_MAX 7
#define DST_MAX   4
#define ARENA     ((size_t)32 << 20)

#if defined(FV_PROP_CUDA) /* tests/gpu.cmake: what that backend does, without latent attention */
#    define IS_CUDA true
static const fv_backend_ops_t *const k_ops = &fv_backend_cuda;
#else
#    define IS_CUDA false
static const fv_backend_ops_t *const k_ops = &fv_backend_cpu;
#endif

typedef struct split {
    fv_attn_case_t *attn;
    size_t n_rows;
    uint64_t cut[DST_MAX + 1]; /* rows [cut[i], cut[i + 1]) go to destination i */
    int32_t n_dst;
    float *o[PARTS_MAX][DST_MAX];
    float *lse_log2[PARTS_MAX][DST_MAX];
} split_t;

static void cut_rows(split_t *s, fv_rng_t *rng)
{
    s->n_rows = fv_attn_case_rows(s->attn);
    s->n_dst = (int32_t)fv_rng_range(rng, 1, DST_MAX);
    s->cut[0] = 0;
    for (int32_t i = 1; i < s->n_dst; i++) { /* equal cuts: empty destinations are allowed */
        s->cut[i] = (uint64_t)fv_rng_range(rng, (int64_t)s->cut[i - 1], (int64_t)s->n_rows);
    }
    s->cut[s->n_dst] = s->n_rows;
}

/* All parts in one step, as one rank never would, but as all ranks do together. */
static void attend_parts(split_t *s, fv_backend_t *backend)
{
    uint16_t n_parts = s->attn->spec.n_parts;
    size_t dv = (size_t)s->attn->spec.head_dim_v;
    fv_partial_dst_t dst[PARTS_MAX][DST_MAX];
    fv_attn_item_t items[PARTS_MAX];

    for (uint16_t p = 0; p < n_parts; p++) {
        for (int32_t d = 0; d < s->n_dst; d++) {
            size_t n = (size_t)(s->cut[d + 1] - s->cut[d]);

            s->o[p][d] = malloc((n * dv + 1U) * sizeof(float));
            s->lse_log2[p][d] = malloc((n + 1U) * sizeof(float));
            dst[p][d] = (fv_partial_dst_t){
                .row_begin = s->cut[d], .o = s->o[p][d], .lse_log2 = s->lse_log2[p][d]};
        }
        items[p] = fv_attn_case_item(s->attn, p, NULL, NULL);
        items[p].dst = dst[p];
        items[p].n_dst = s->n_dst;
    }
    assert_int_equal(k_ops->attend(backend, items, n_parts), FV_OK);
    assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
}

static void merge_parts(split_t *s, fv_backend_t *backend, void *out, float *lse)
{
    const fv_attn_spec_t *spec = &s->attn->spec;
    const float *o[DST_MAX][PARTS_MAX];
    const float *lse_log2[DST_MAX][PARTS_MAX];
    fv_merge_item_t items[DST_MAX];

    memset(items, 0, sizeof(items));
    for (int32_t d = 0; d < s->n_dst; d++) {
        for (uint16_t p = 0; p < spec->n_parts; p++) {
            o[d][p] = s->o[p][d];
            lse_log2[d][p] = s->lse_log2[p][d];
        }
        items[d].n_rows = s->cut[d + 1] - s->cut[d];
        items[d].n_parts = spec->n_parts;
        items[d].head_dim_v = spec->head_dim_v;
        items[d].io_dtype = spec->io_dtype;
        items[d].o = o[d];
        items[d].lse_log2 = lse_log2[d];
        items[d].row_base = s->cut[d];
        items[d].row_len = (uint64_t)s->attn->n_q_heads;
        items[d].out = out;
        items[d].out_token_bytes = (size_t)s->attn->n_q_heads * (size_t)spec->head_dim_v *
                                   fv_dtype_bytes((fv_dtype_t)spec->io_dtype);
        items[d].lse = lse;
        items[d].lse_token_stride = (size_t)s->attn->n_q_heads;
    }
    assert_int_equal(k_ops->merge(backend, items, (size_t)s->n_dst, NULL), FV_OK);
    assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
}

static void one_split(fv_backend_t *backend, fv_rng_t *rng)
{
    split_t s;
    fv_attn_spec_t spec = fv_attn_spec_random(rng, MACS);
    uint32_t next_unit = 0;
    void *out = NULL;
    float *lse = NULL;

    memset(&s, 0, sizeof(s));
    if (!IS_CUDA && (fv_rng_range(rng, 0, 2) == 0)) {
        fv_attn_spec_latent(&spec, rng, MACS);
    } else {
        fv_attn_spec_maybe_s2(rng, &spec);
    }
    spec.n_parts = (uint16_t)fv_rng_range(rng, 1, PARTS_MAX);
    s.attn = fv_attn_case_create(&spec);
    fv_attn_case_place(s.attn, rng, &next_unit);
    assert_int_equal(fv_attn_case_load(s.attn, k_ops, backend, rng), FV_OK);
    cut_rows(&s, rng);
    out = malloc(fv_attn_case_out_bytes(s.attn));
    lse = malloc(s.n_rows * sizeof(*lse));
    attend_parts(&s, backend);
    merge_parts(&s, backend, out, lse);
    fv_attn_case_solve(s.attn);
    assert_int_equal(fv_attn_case_check(s.attn, out, lse, "split"), 0);
    for (uint16_t p = 0; p < spec.n_parts; p++) {
        for (int32_t d = 0; d < s.n_dst; d++) {
            free(s.o[p][d]);
            free(s.lse_log2[p][d]);
        }
    }
    fv_attn_case_destroy(s.attn);
    free(out);
    free(lse);
}

static void test_split_equals_whole(void **state)
{
    static const char *const k_isas[] = {"auto", "portable"};
    fv_rng_t rng = {fv_test_seed(20261123)};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_isas); i++) {
        fv_backend_config_t config = {.n_threads = 3, .kv_arena_bytes = ARENA, .isa = k_isas[i]};
        fv_backend_t *backend = NULL;

        assert_int_equal(k_ops->create(&config, &backend), FV_OK);
        for (int n = 0; n < N_CASES; n++) {
            one_split(backend, &rng);
        }
        k_ops->destroy(backend);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_split_equals_whole)};

#if defined(FV_PROP_CUDA)
    if (!fv_backend_cuda_is_visible()) {
        print_message("no GPU: skipped\n");
        return 77;
    }
#endif

    return cmocka_run_group_tests(tests, NULL, NULL);
}
