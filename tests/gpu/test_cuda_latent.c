/*
 * test_cuda_latent.c - latents (MLA) on the CUDA backend against the fp64 oracle: the wgmma kernel and the one for the rest.
 *
 * Every case is poisoned (attn_case.h): unused slots and unseen tokens are NaN, page-table entries past the end wild.
 */
#include "kernels/backend_cuda.h"
#include "tests/support/cuda_case.h"
#include "tests/support/test.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ARENA_BYTES ((size_t)1 << 30)
#define STEP_MAX    20
#define MACS        6000000
#define ROPE        64
#define PARTS_MAX   4

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

static bool is_wgmma(const fv_attn_spec_t *spec)
{
    return backend->has_sm90 && (spec->io_dtype == FV_DTYPE_BF16) &&
           (spec->kv_dtype == FV_DTYPE_BF16) && (spec->head_dim_qk == spec->head_dim_v + ROPE) &&
           ((spec->latent_mu == 0.0F) || (spec->latent_mu == 1.0F)) &&
           ((spec->head_dim_v == 512) || (spec->head_dim_v == 256) || (spec->head_dim_v == 128));
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

static void *take(size_t n_bytes, bool is_pinned)
{
    void *memory = NULL;

    if (is_pinned) {
        assert_int_equal(k_ops->host_alloc(backend, n_bytes, &memory), FV_OK);
    } else {
        memory = malloc(n_bytes);
    }
    memset(memory, 0xff, n_bytes); /* what is not written is NaN */
    return memory;
}

static void step_add(step_t *step, const fv_attn_spec_t *given, fv_rng_t *rng, bool is_pinned)
{
    const size_t i = step->n++;
    fv_attn_spec_t spec = *given;
    fv_attn_case_t *attn = NULL;

    fv_cuda_case_fit(backend, &spec); /* there are others than latents among them */
    spec.one_part = is_wgmma(&spec);
    attn = fv_attn_case_create(&spec);
    assert_true(step->n <= STEP_MAX);
    step->cases[i] = attn;
    fv_attn_case_place(attn, rng, &step->next_unit);
    assert_true((size_t)step->next_unit * FV_PAGE_UNIT <= ARENA_BYTES);
    assert_int_equal(fv_attn_case_load(attn, k_ops, backend, rng), FV_OK);
    step->out[i] = take(fv_attn_case_out_bytes(attn), is_pinned);
    step->lse[i] = take(fv_attn_case_rows(attn) * sizeof(float), is_pinned);
    step->items[i] = fv_attn_case_item(attn, 0, step->out[i], step->lse[i]);
}

static void step_run(step_t *step)
{
    assert_int_equal(k_ops->attend(backend, step->items, step->n), FV_OK);
    assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
}

static size_t step_check(step_t *step, const char *name)
{
    size_t n_bad = 0;

    for (size_t i = 0; i < step->n; i++) {
        fv_attn_case_solve(step->cases[i]);
        n_bad += fv_attn_case_check(step->cases[i], step->out[i], step->lse[i], name);
    }
    return n_bad;
}

static void step_free(step_t *step, bool is_pinned)
{
    for (size_t i = 0; i < step->n; i++) {
        fv_attn_case_destroy(step->cases[i]);
        if (is_pinned) {
            k_ops->host_free(backend, step->out[i]);
            k_ops->host_free(backend, step->lse[i]);
        } else {
            free(step->out[i]);
            free(step->lse[i]);
        }
    }
    memset(step, 0, sizeof(*step));
}

/* One problem in a step of its own. */
static void one(const fv_attn_spec_t *spec, fv_rng_t *rng, const char *name)
{
    step_t step = {0};

    step_add(&step, spec, rng, false);
    step_run(&step);
    assert_int_equal(step_check(&step, name), 0);
    step_free(&step, false);
}

static fv_attn_spec_t spec_of(int32_t latent, int32_t group, int32_t n_tokens, int64_t kv_end)
{
    fv_attn_spec_t spec;

    memset(&spec, 0, sizeof(spec));
    spec.v_in_k = true;
    spec.n_tokens = n_tokens;
    spec.n_kv_heads = 1;
    spec.group = group;
    spec.head_dim_qk = latent + ROPE;
    spec.head_dim_v = latent;
    spec.io_dtype = FV_DTYPE_BF16;
    spec.kv_dtype = FV_DTYPE_BF16;
    spec.softmax_scale = 0.07F;
    spec.causal = true;
    spec.kv_end = kv_end;
    spec.position = (kv_end > n_tokens) ? (kv_end - n_tokens) : 0;
    spec.seed = (uint64_t)(latent * 1000 + group * 8 + n_tokens) + (uint64_t)kv_end;
    return spec;
}

/* The smallest problem of each kernel: whole tiles, then parts of one. */
static void test_first(void **state)
{
    static const int32_t k_latent[] = {512, 256, 128, 64};
    fv_rng_t rng = {1};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_latent); i++) {
        for (int32_t group = 16; group <= 128; group *= 8) {
            fv_attn_spec_t spec = spec_of(k_latent[i], group, 1, 64);

            one(&spec, &rng, "one tile");
            spec = spec_of(k_latent[i], group, 1, 64 * 9);
            one(&spec, &rng, "tiles");
            spec = spec_of(k_latent[i], group, 1, 5);
            one(&spec, &rng, "part of a tile");
        }
    }
}

/* FlashMLA's own grid (M1, M8): heads, new tokens, lengths, causal and not. */
static void test_flashmla_grid(void **state)
{
    static const int32_t k_groups[] = {1, 3, 9, 16, 32, 63, 64, 126, 128};
    static const int32_t k_tokens[] = {1, 2, 4, 8};
    static const int64_t k_lengths[] = {0, 20, 140, 4096};
    fv_rng_t rng = {2};

    (void)state;
    for (size_t g = 0; g < FV_COUNT(k_groups); g += (size_t)quick(1, 4)) {
        for (size_t t = 0; t < FV_COUNT(k_tokens); t += (size_t)quick(1, 3)) {
            step_t step = {0};

            for (size_t n = 0; n < FV_COUNT(k_lengths); n++) {
                /* the oracle takes its time: long ones for few rows */
                const int64_t rows = (int64_t)k_groups[g] * k_tokens[t];
                const int64_t length =
                    (k_lengths[n] * rows > 20000) ? (20000 / rows) : k_lengths[n];
                fv_attn_spec_t spec = spec_of(512, k_groups[g], k_tokens[t], length);

                spec.causal = (n + g) % 3 != 0;
                step_add(&step, &spec, &rng, (n % 2) != 0);
                step_free(&step, (n % 2) != 0);
                step_add(&step, &spec, &rng, false);
                step_run(&step);
                assert_int_equal(step_check(&step, "grid"), 0);
                step_free(&step, false);
            }
        }
    }
}

/* One row over every CTA, and groups of several pieces, merged late, early, and with other cuts. */
static void test_cut_groups(void **state)
{
    static const int32_t k_groups[] = {1, 16, 64, 100};
    static const int32_t k_latent[] = {512, 128, 320};
    const fv_lean_tuning_t shipped = backend->tuning;
    fv_rng_t rng = {3};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_groups); i++) {
        for (size_t k = 0; k < FV_COUNT(k_latent); k++) {
            fv_attn_spec_t spec = spec_of(k_latent[k], k_groups[i], 1, 64 * 20 + 5);

            for (int way = 0; way < 4; way++) {
                backend->tuning = shipped;
                backend->tuning.latent_tiles = 1;
                backend->tuning.is_cooperative = (way == 1) ? 0U : 1U;
                backend->tuning.is_dependent = (way == 2) ? 1U : 0U;
                backend->tuning.latent_tiles = (way == 3) ? 7U : 1U;
                one(&spec, &rng, "one group");
            }
        }
    }
    backend->tuning = shipped;
}

/* Steps of long, short and empty sequences. */
static void test_ragged(void **state)
{
    fv_rng_t rng = {fv_test_seed(20261124)};

    (void)state;
    for (int n = 0; n < quick(6, 1); n++) {
        static const int32_t k_latent[] = {512, 256, 128};
        static const int32_t k_groups[] = {16, 128};
        step_t step = {0};

        for (int i = 0; i < 16; i++) {
            const int64_t longest = (i % 5 == 0) ? 1500 : 200;
            fv_attn_spec_t spec = spec_of(k_latent[n % 3], k_groups[n % 2], 1 + (i % 4 == 1),
                                          (i % 7 == 3) ? 0 : fv_rng_range(&rng, 1, longest));

            step_add(&step, &spec, &rng, true);
        }
        step_run(&step);
        assert_int_equal(step_check(&step, "ragged"), 0);
        step_free(&step, true);
    }
}

/* Chunked prefill in absorbed form; windows, softcap; a NaN that only later rows see. */
static void test_prefill(void **state)
{
    fv_rng_t rng = {4};

    (void)state;
    for (int i = 0; i < quick(10, 3); i++) {
        fv_attn_spec_t spec = spec_of((i % 2 != 0) ? 256 : 512, 16, 40, 300);

        spec.causal = i != 1;
        spec.logit_softcap = (i == 3) ? 5.0F : 0.0F;
        if (i >= 4) {
            spec.spoil_token = 270 + 4 * i;
            spec.seed += (uint64_t)i;
        }
        if (i >= 7) {
            spec.policy.kind = FV_POLICY_WINDOW;
            spec.policy.window_tokens = 100;
            spec.policy.sink_tokens = 5;
        }
        one(&spec, &rng, "prefill");
    }
}

/* Steps of random problems: every dtype, dims, policy; norms and weights; NaN here and there; results pinned or not. */
static void test_random_steps(void **state)
{
    fv_rng_t rng = {fv_test_seed(20261122)};

    (void)state;
    for (int n = 0; n < quick(40, 3); n++) {
        const bool is_pinned = (n % 2) != 0;
        step_t step = {0};

        for (int i = 0; i < 5; i++) {
            fv_attn_spec_t spec = fv_attn_spec_random(&rng, MACS);

            if (n % 3 == 0) {
                fv_attn_spec_maybe_s2(&rng, &spec);
            }
            if (i > 0) {
                fv_attn_spec_latent(&spec, &rng, MACS);
            }
            if (i > 2) { /* the wgmma kernel's share */
                spec.head_dim_v = 128 << fv_rng_range(&rng, 0, 2);
                spec.head_dim_qk = spec.head_dim_v + ROPE;
                spec.io_dtype = FV_DTYPE_BF16;
                spec.kv_dtype = FV_DTYPE_BF16;
                spec.norm_alpha = 0.0F;
                spec.latent_mu = 0.0F;
                spec.kv_end = fv_min64(spec.kv_end, 400);
                spec.position = fv_max64(0, spec.kv_end - spec.n_tokens);
            }
            if ((spec.kv_end > 0) && (fv_rng_range(&rng, 0, 3) == 0)) {
                spec.spoil_token = fv_rng_range(&rng, 1, spec.kv_end);
            }
            step_add(&step, &spec, &rng, is_pinned);
        }
        step_run(&step);
        assert_int_equal(step_check(&step, "random"), 0);
        step_free(&step, is_pinned);
    }
}

/* Slices of whole rows (TPLA): Q, K and results lie apart, the RoPE key behind a gap; both slices of a latent of 512. */
static void test_slices(void **state)
{
    enum {
        SLICE = 256,
        ROW = 2 * SLICE + ROPE,
        TOKENS = 130,
        HEADS = 16
    };
    fv_attn_spec_t spec = spec_of(SLICE, HEADS, 1, TOKENS);
    fv_rng_t rng = {5};

    (void)state;
    spec.one_part = true;
    for (int way = 0; way < 4; way++) {
        const bool is_pinned = (way % 2) != 0;
        const size_t slice = (size_t)(way / 2);
        fv_attn_case_t *attn = fv_attn_case_create(&spec);
        uint16_t *q = take((size_t)HEADS * ROW * 2U, is_pinned);
        uint16_t *k = take((size_t)TOKENS * ROW * 2U, is_pinned);
        uint16_t *out = take((size_t)HEADS * 2U * SLICE * 2U, is_pinned);
        uint16_t packed[HEADS * SLICE];
        uint32_t next_unit = 0;
        const uint16_t *given_q = attn->q;
        const uint16_t *given_k = attn->k;

        for (size_t r = 0; r < TOKENS; r++) {
            uint16_t *row = k + r * ROW;

            memcpy(row + slice * SLICE, given_k + r * (SLICE + ROPE), SLICE * 2U);
            memcpy(row + 2U * SLICE, given_k + r * (SLICE + ROPE) + SLICE, ROPE * 2U);
        }
        for (size_t r = 0; r < HEADS; r++) {
            uint16_t *row = q + r * ROW;

            memcpy(row + slice * SLICE, given_q + r * (SLICE + ROPE), SLICE * 2U);
            memcpy(row + 2U * SLICE, given_q + r * (SLICE + ROPE) + SLICE, ROPE * 2U);
        }
        fv_attn_case_place(attn, &rng, &next_unit);
        fv_attn_item_t item = fv_attn_case_item(attn, 0, out + slice * SLICE, NULL);
        fv_append_item_t append = {.n_kv_heads = 1,
                                   .head_dim_qk = SLICE + ROPE,
                                   .head_dim_v = SLICE,
                                   .src_dtype = FV_DTYPE_BF16,
                                   .kv_dtype = FV_DTYPE_BF16,
                                   .v_in_k = true,
                                   .rope_gap_bytes = (1U - slice) * SLICE * 2U,
                                   .k = k + slice * SLICE,
                                   .k_token_bytes = ROW * 2U,
                                   .n_tokens = TOKENS,
                                   .pages = item.pages,
                                   .pages_head_stride = item.pages_head_stride};

        assert_int_equal(k_ops->append(backend, &append, 1), FV_OK);
        item.q = q + slice * SLICE;
        item.q_head_bytes = ROW * 2U;
        item.q_token_bytes = (size_t)HEADS * ROW * 2U;
        item.rope_gap_bytes = append.rope_gap_bytes;
        item.out_head_bytes = 2U * SLICE * 2U;
        item.out_token_bytes = (size_t)HEADS * 2U * SLICE * 2U;
        assert_int_equal(k_ops->attend(backend, &item, 1), FV_OK);
        assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
        for (size_t r = 0; r < HEADS; r++) {
            memcpy(packed + r * SLICE, out + (r * 2U + slice) * SLICE, SLICE * 2U);
            for (size_t d = 0; d < SLICE; d++) { /* the other slice is another rank's */
                assert_int_equal(out[(r * 2U + 1U - slice) * SLICE + d], 0xffff);
            }
        }
        fv_attn_case_solve(attn);
        assert_int_equal(fv_attn_case_check(attn, packed, NULL, "slices"), 0);
        fv_attn_case_destroy(attn);
        if (is_pinned) {
            k_ops->host_free(backend, q);
            k_ops->host_free(backend, k);
            k_ops->host_free(backend, out);
        } else {
            free(q);
            free(k);
            free(out);
        }
    }
}

/* Parts of the context attended to apart and merged (M7): rows of up to 1024 dims through merge(). */
static void test_shards(void **state)
{
    static const int32_t k_latent[] = {512, 1024, 256, 320};
    fv_rng_t rng = {6};

    (void)state;
    for (int i = 0; i < 8; i++) {
        fv_attn_spec_t spec = spec_of(k_latent[i % 4], (i < 4) ? 128 : 16, 1, 100 + 137 * i);
        fv_attn_case_t *attn = NULL;
        fv_merge_item_t merge;
        const float *o[PARTS_MAX];
        const float *l[PARTS_MAX];
        uint32_t next_unit = 0;

        spec.n_parts = (uint16_t)(2 + i % 3);
        spec.one_part = is_wgmma(&spec);
        attn = fv_attn_case_create(&spec);
        fv_attn_case_place(attn, &rng, &next_unit);
        assert_int_equal(fv_attn_case_load(attn, k_ops, backend, &rng), FV_OK);
        const size_t n_rows = fv_attn_case_rows(attn);
        const size_t dv = (size_t)spec.head_dim_v;
        void *out = take(fv_attn_case_out_bytes(attn), (i % 2) != 0);
        float *lse = take(n_rows * sizeof(float), false);
        float *parts[PARTS_MAX];

        for (uint16_t part = 0; part < spec.n_parts; part++) {
            fv_attn_item_t item = fv_attn_case_item(attn, part, NULL, NULL);
            fv_partial_dst_t dst = {0};

            parts[part] = take(n_rows * (dv + 1U) * sizeof(float), (i % 2) != 0);
            dst.o = parts[part];
            dst.lse_log2 = parts[part] + n_rows * dv;
            o[part] = dst.o;
            l[part] = dst.lse_log2;
            item.dst = &dst;
            item.n_dst = 1;
            assert_int_equal(k_ops->attend(backend, &item, 1), FV_OK);
            assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
        }
        merge = (fv_merge_item_t){.n_rows = n_rows,
                                  .n_parts = spec.n_parts,
                                  .head_dim_v = spec.head_dim_v,
                                  .io_dtype = spec.io_dtype,
                                  .o = o,
                                  .lse_log2 = l,
                                  .row_len = (uint64_t)attn->n_q_heads,
                                  .out = out,
                                  .out_token_bytes = (size_t)attn->n_q_heads * dv * 2U,
                                  .lse = lse,
                                  .lse_token_stride = (size_t)attn->n_q_heads};
        assert_int_equal(k_ops->merge(backend, &merge, 1, NULL), FV_OK);
        assert_int_equal(k_ops->finish(backend, NULL, NULL), FV_OK);
        fv_attn_case_solve(attn);
        assert_int_equal(fv_attn_case_check(attn, out, lse, "shards"), 0);
        for (uint16_t part = 0; part <= spec.n_parts; part++) {
            void *memory = (part < spec.n_parts) ? (void *)parts[part] : out;

            if ((i % 2) != 0) {
                k_ops->host_free(backend, memory);
            } else {
                free(memory);
            }
        }
        free(lse);
        fv_attn_case_destroy(attn);
    }
}

/* The same step again and again: the same bits, whoever came first. */
static void test_repeat(void **state)
{
    static const int64_t k_lengths[] = {0, 1, 64, 333, 5000, 7, 129, 2000};
    fv_rng_t rng = {7};
    static step_t step;

    (void)state;
    for (int32_t group = 16; group <= 128; group *= 8) {
        void *first[STEP_MAX];

        for (size_t i = 0; i < FV_COUNT(k_lengths); i++) {
            fv_attn_spec_t spec =
                spec_of((group == 16) ? 512 : 256, group, 1,
                        (group == 16) ? k_lengths[i] : fv_min64(k_lengths[i], 1500));

            step_add(&step, &spec, &rng, true);
        }
        step_run(&step);
        assert_int_equal(step_check(&step, "repeat"), 0);
        for (size_t i = 0; i < step.n; i++) {
            first[i] = malloc(fv_attn_case_out_bytes(step.cases[i]));
            memcpy(first[i], step.out[i], fv_attn_case_out_bytes(step.cases[i]));
        }
        for (int n = 0; n < quick(300, 3); n++) {
            for (size_t i = 0; i < step.n; i++) {
                memset(step.out[i], 0xff, fv_attn_case_out_bytes(step.cases[i]));
            }
            step_run(&step);
            for (size_t i = 0; i < step.n; i++) {
                assert_memory_equal(first[i], step.out[i], fv_attn_case_out_bytes(step.cases[i]));
            }
        }
        for (size_t i = 0; i < step.n; i++) {
            free(first[i]);
        }
        step_free(&step, true);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_first),      cmocka_unit_test(test_flashmla_grid),
        cmocka_unit_test(test_cut_groups), cmocka_unit_test(test_ragged),
        cmocka_unit_test(test_prefill),    cmocka_unit_test(test_random_steps),
        cmocka_unit_test(test_slices),     cmocka_unit_test(test_shards),
        cmocka_unit_test(test_repeat),
    };

    if (!fv_backend_cuda_is_visible()) {
        print_message("no GPU: skipped\n");
        return 77;
    }
    return cmocka_run_group_tests(tests, setup, teardown);
}
