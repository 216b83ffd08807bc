/*
 * test_backend_cpu.c - the CPU backend's contract, case by case: masks and poison, extremes, repeatability, refusals.
 *
 * Every case runs on each instruction set of this machine; what differs between them is only speed.
 */
#include "kernels/kernels.h"
#include "tests/support/attn_case.h"
#include "tests/support/test.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ARENA_BYTES ((size_t)48 << 20)

static const char *const k_isas[] = {"portable", "avx2", "avx512", "amx"};

static fv_backend_t *open_backend(const char *isa, int32_t n_threads)
{
    fv_backend_config_t config = {
        .n_threads = n_threads, .kv_arena_bytes = ARENA_BYTES, .isa = isa};
    fv_backend_t *backend = NULL;

    return (fv_backend_cpu.create(&config, &backend) == FV_OK) ? backend : NULL;
}

/* One case alone on a fresh part of the arena, compared with the oracle. */
static void check_spec(fv_backend_t *backend, const fv_attn_spec_t *spec, const char *name)
{
    fv_attn_case_t *attn = fv_attn_case_create(spec);
    void *out = malloc(fv_attn_case_out_bytes(attn));
    float *lse = malloc(fv_attn_case_rows(attn) * sizeof(*lse));
    fv_rng_t rng = {spec->seed + 1};
    uint32_t next_unit = 0;
    fv_attn_item_t item;

    fv_attn_case_place(attn, &rng, &next_unit);
    assert_int_equal(fv_attn_case_load(attn, &fv_backend_cpu, backend, &rng), FV_OK);
    item = fv_attn_case_item(attn, 0, out, lse);
    assert_int_equal(fv_backend_cpu.attend(backend, &item, 1), FV_OK);
    fv_attn_case_solve(attn);
    assert_int_equal(fv_attn_case_check(attn, out, lse, name), 0);
    fv_attn_case_destroy(attn);
    free(out);
    free(lse);
}

static fv_attn_spec_t decode_spec(int32_t dtype)
{
    fv_attn_spec_t spec = {.n_tokens = 1,
                           .n_kv_heads = 2,
                           .group = 4,
                           .head_dim_qk = 64,
                           .head_dim_v = 64,
                           .io_dtype = FV_DTYPE_F32,
                           .kv_dtype = dtype,
                           .causal = true,
                           .position = 299,
                           .kv_end = 300,
                           .seed = 99};
    return spec;
}

typedef void (*on_isa_fn_t)(fv_backend_t *backend, const char *isa);

static void for_each_isa(on_isa_fn_t fn, int32_t n_threads)
{
    for (size_t i = 0; i < FV_COUNT(k_isas); i++) {
        fv_backend_t *backend = open_backend(k_isas[i], n_threads);

        if (backend == NULL) {
            print_message("%s: not on this machine\n", k_isas[i]);
            continue;
        }
        fn(backend, k_isas[i]);
        fv_backend_cpu.destroy(backend);
    }
}

/* ------------------------------------------------------------------ extremes */

static void extremes(fv_backend_t *backend, const char *isa)
{
    for (int32_t dtype = FV_DTYPE_F32; dtype <= FV_DTYPE_BF16; dtype++) {
        fv_attn_spec_t spec = decode_spec(dtype);

        spec.q_amplitude = 3000.0F; /* logits of 1e4 */
        check_spec(backend, &spec, isa);
        spec = decode_spec(dtype);
        spec.logit_softcap = 30.0F;
        spec.q_amplitude = 20.0F;
        check_spec(backend, &spec, isa);
        spec = decode_spec(dtype); /* a sum of fp16 values of mean 1 would stop growing at 2048 */
        spec.n_kv_heads = 1;
        spec.group = 1;
        spec.kv_end = 9000;
        spec.position = 8999;
        spec.v_mean = 100.0F;
        spec.tame = true;
        check_spec(backend, &spec, isa);
    }
}

static void test_extremes(void **state)
{
    (void)state;
    for_each_isa(extremes, 2);
}

/* ------------------------------------------------------------------ empty and tiny */

static void empties(fv_backend_t *backend, const char *isa)
{
    static const struct {
        int64_t position, kv_end;
        int32_t n_tokens;
        bool causal;
    } k_shapes[] = {
        {0, 0, 1, true},   {0, 0, 3, false},    {0, 1, 1, true},     {63, 64, 1, true},
        {64, 65, 1, true}, {0, 130, 130, true}, {500, 65, 2, false}, {40, 65, 70, true},
    };

    for (size_t i = 0; i < FV_COUNT(k_shapes); i++) {
        fv_attn_spec_t spec = decode_spec(FV_DTYPE_BF16);

        spec.position = k_shapes[i].position;
        spec.kv_end = k_shapes[i].kv_end;
        spec.n_tokens = k_shapes[i].n_tokens;
        spec.causal = k_shapes[i].causal;
        check_spec(backend, &spec, isa);
        spec.policy = (fv_policy_t){.kind = FV_POLICY_WINDOW, .window_tokens = 5, .sink_tokens = 2};
        check_spec(backend, &spec, isa);
    }
}

static void test_empties(void **state)
{
    (void)state;
    for_each_isa(empties, 2);
}

/* ------------------------------------------------------------------ NaN and inf spoil their rows only */

static void spoils(fv_backend_t *backend, const char *isa)
{
    static const int64_t k_tokens[] = {1, 64, 65, 100, 129, 130};

    for (size_t i = 0; i < FV_COUNT(k_tokens); i++) {
        for (int32_t dtype = FV_DTYPE_F32; dtype <= FV_DTYPE_BF16; dtype++) {
            fv_attn_spec_t spec = decode_spec(dtype);

            /* prefill: earlier rows do not see the spoiled token, in the same tile or not */
            spec.kv_end = 130;
            spec.n_tokens = 40;
            spec.position = 90;
            spec.spoil_token = k_tokens[i];
            check_spec(backend, &spec, isa);
            spec.policy =
                (fv_policy_t){.kind = FV_POLICY_WINDOW, .window_tokens = 20, .sink_tokens = 3};
            check_spec(backend, &spec, isa);
        }
    }
}

static void test_spoils(void **state)
{
    (void)state;
    for_each_isa(spoils, 3);
}

/* An infinite query: the IEEE answer in fp64 decides, row by row. */
static void infinite_query(fv_backend_t *backend, const char *isa)
{
    fv_attn_spec_t spec = decode_spec(FV_DTYPE_BF16);
    fv_attn_case_t *attn = fv_attn_case_create(&spec);
    float *out = malloc(fv_attn_case_out_bytes(attn));
    float lse[8];
    fv_rng_t rng = {5};
    uint32_t next_unit = 0;
    fv_attn_item_t item;

    ((float *)attn->q)[3 * 64 + 5] = INFINITY;
    ((float *)attn->q)[6 * 64 + 1] = NAN;
    fv_attn_case_place(attn, &rng, &next_unit);
    assert_int_equal(fv_attn_case_load(attn, &fv_backend_cpu, backend, &rng), FV_OK);
    item = fv_attn_case_item(attn, 0, out, lse);
    assert_int_equal(fv_backend_cpu.attend(backend, &item, 1), FV_OK);
    attn->logit_bound = 20.0; /* its own is infinite now */
    fv_attn_case_solve(attn);
    assert_int_equal(fv_attn_case_check(attn, out, lse, isa), 0);
    assert_true(isnan(out[3 * 64]) && isnan(out[6 * 64]) && isfinite(out[2 * 64]));
    fv_attn_case_destroy(attn);
    free(out);
}

static void test_infinite_query(void **state)
{
    (void)state;
    for_each_isa(infinite_query, 1);
}

/* ------------------------------------------------------------------ bitwise promises */

/* Bytes of one case's result, alone or behind `n_others` other items, on pages placed by `page_seed`. */
static void run_with(fv_backend_t *backend,
                     const fv_attn_spec_t *spec,
                     uint64_t page_seed,
                     int n_others,
                     void *out,
                     float *lse)
{
    fv_attn_case_t *attn = fv_attn_case_create(spec);
    fv_attn_spec_t other_spec = decode_spec(FV_DTYPE_F16);
    fv_attn_case_t *other = fv_attn_case_create(&other_spec);
    float *other_out = malloc(fv_attn_case_out_bytes(other));
    fv_rng_t rng = {page_seed};
    uint32_t next_unit = (uint32_t)(page_seed % 7U) * 64U;
    fv_attn_item_t items[4];

    fv_attn_case_place(other, &rng, &next_unit);
    fv_attn_case_place(attn, &rng, &next_unit);
    assert_int_equal(fv_attn_case_load(attn, &fv_backend_cpu, backend, &rng), FV_OK);
    assert_int_equal(fv_attn_case_load(other, &fv_backend_cpu, backend, &rng), FV_OK);
    for (int i = 0; i < n_others; i++) {
        items[i] = fv_attn_case_item(other, 0, other_out, NULL);
    }
    items[n_others] = fv_attn_case_item(attn, 0, out, lse);
    assert_int_equal(fv_backend_cpu.attend(backend, items, (size_t)n_others + 1U), FV_OK);
    fv_attn_case_destroy(attn);
    fv_attn_case_destroy(other);
    free(other_out);
}

static void same_bits(fv_backend_t *backend, const char *isa, int n_others)
{
    fv_attn_spec_t spec = decode_spec(FV_DTYPE_BF16);
    size_t n_bytes = (size_t)70 * 8 * 64 * 4;
    uint8_t *a = malloc(n_bytes);
    uint8_t *b = malloc(n_bytes);
    float lse_a[70 * 8];
    float lse_b[70 * 8];

    (void)isa;
    spec.n_tokens = 70;
    spec.position = 230;
    run_with(backend, &spec, 1, 0, a, lse_a);
    for (uint64_t seed = 2; seed < 5; seed++) { /* other pages each time */
        memset(b, 0, n_bytes);
        run_with(backend, &spec, seed, n_others, b, lse_b);
        assert_memory_equal(a, b, n_bytes);
        assert_memory_equal(lse_a, lse_b, sizeof(lse_a));
    }
    free(a);
    free(b);
}

/* The same step gives the same bits on any pages, with any number of threads. */
static void same_step(fv_backend_t *backend, const char *isa)
{
    same_bits(backend, isa, 0);
}

/* One thread cuts nothing, so what else is in the batch changes no bit either. */
static void same_batch(fv_backend_t *backend, const char *isa)
{
    same_bits(backend, isa, 3);
}

static void test_same_bits(void **state)
{
    (void)state;
    for_each_isa(same_step, 3);
    for_each_isa(same_batch, 1);
}

/* ------------------------------------------------------------------ copy on write */

/* A copied page reads as its source, and appending to one leaves the other alone. */
static void test_copy_pages(void **state)
{
    fv_backend_t *backend = open_backend("auto", 2);
    fv_attn_spec_t spec = decode_spec(FV_DTYPE_F16);
    fv_attn_case_t *attn = NULL;
    fv_rng_t rng = {3};
    uint32_t next_unit = 0;
    float out[8 * 64];
    fv_attn_item_t item;

    (void)state;
    spec.kv_end = 90;
    spec.position = 89;
    attn = fv_attn_case_create(&spec);
    fv_attn_case_place(attn, &rng, &next_unit);
    assert_int_equal(fv_attn_case_load(attn, &fv_backend_cpu, backend, &rng), FV_OK);
    for (size_t h = 0; h < 2; h++) { /* the half-full last page of each head moves to a copy */
        fv_page_ref_t *ref = &attn->pages[h * attn->pages_stride + 1U];
        fv_page_copy_t copy = {.src = *ref,
                               .dst = next_unit,
                               .n_tokens = 26,
                               .head_dim_qk = 64,
                               .head_dim_v = 64,
                               .kv_dtype = FV_DTYPE_F16};
        assert_int_equal(fv_backend_cpu.copy_pages(backend, &copy, 1), FV_OK);
        *ref = copy.dst;
        next_unit += 16U;
        copy.dst = copy.src; /* the source is then overwritten with another page */
        copy.src = attn->pages[h * attn->pages_stride];
        copy.n_tokens = FV_PAGE_TOKENS;
        assert_int_equal(fv_backend_cpu.copy_pages(backend, &copy, 1), FV_OK);
    }
    item = fv_attn_case_item(attn, 0, out, NULL);
    assert_int_equal(fv_backend_cpu.attend(backend, &item, 1), FV_OK);
    fv_attn_case_solve(attn);
    assert_int_equal(fv_attn_case_check(attn, out, NULL, "copy"), 0);
    fv_attn_case_destroy(attn);
    fv_backend_cpu.destroy(backend);
}

/* ------------------------------------------------------------------ refusals */

static void refuse(fv_backend_t *backend, const fv_attn_item_t *item, const char *field)
{
    assert_int_equal(fv_backend_cpu.attend(backend, item, 1), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), field));
}

static void test_refusals(void **state)
{
    fv_backend_t *backend = open_backend("auto", 2);
    fv_attn_spec_t spec = decode_spec(FV_DTYPE_BF16);
    fv_attn_case_t *attn = fv_attn_case_create(&spec);
    fv_rng_t rng = {3};
    uint32_t next_unit = 0;
    float out[8 * 64];
    fv_attn_item_t good;
    fv_attn_item_t bad;

    (void)state;
    fv_attn_case_place(attn, &rng, &next_unit);
    assert_int_equal(fv_attn_case_load(attn, &fv_backend_cpu, backend, &rng), FV_OK);
    good = fv_attn_case_item(attn, 0, out, NULL);
#define REFUSE(field, value)           \
    do {                               \
        bad = good;                    \
        bad.field = (value);           \
        refuse(backend, &bad, #field); \
    } while (0)
    REFUSE(n_tokens, 0);
    REFUSE(n_kv_heads, 0);
    REFUSE(n_kv_heads, 1025);
    REFUSE(group, 129);
    REFUSE(head_dim_qk, 12);
    REFUSE(head_dim_v, 264);
    REFUSE(io_dtype, 4);
    REFUSE(kv_dtype, 0);
    REFUSE(softmax_scale, 0.0F);
    REFUSE(softmax_scale, NAN);
    REFUSE(logit_softcap, -1.0F);
    REFUSE(position, -1);
    REFUSE(kv_end, INT64_MAX);
    REFUSE(shard.shard_tokens, 65);
    REFUSE(shard.part, 1);
    REFUSE(policy.kind, 3);
    REFUSE(kv_head_begin, -1);
    good.policy = (fv_policy_t){
        .kind = FV_POLICY_S2, .block_tokens = 64, .local_blocks = 1, .vert_stride = 4};
    REFUSE(policy.block_tokens, 48);
    REFUSE(policy.local_blocks, 0);
    REFUSE(policy.vert_stride, 0);
    REFUSE(causal, false);
    good.policy = (fv_policy_t){.kind = FV_POLICY_DENSE};
    REFUSE(q, NULL);
    REFUSE(out, NULL);
    REFUSE(pages, NULL);
#undef REFUSE
    attn->pages[attn->pages_stride + 2U] =
        FV_PAGE_NONE; /* a page in use: wild, refused, not read */
    refuse(backend, &good, "pages");
    fv_attn_case_destroy(attn);
    fv_backend_cpu.destroy(backend);
}

static void test_append_refuses_wild_pages(void **state)
{
    fv_backend_t *backend = open_backend("auto", 1);
    float row[64] = {0.0F};
    fv_page_ref_t pages[2] = {0, (fv_page_ref_t)(ARENA_BYTES / FV_PAGE_UNIT) - 31U};
    fv_append_item_t item = {.n_kv_heads = 1,
                             .head_dim_qk = 64,
                             .head_dim_v = 64,
                             .src_dtype = FV_DTYPE_F32,
                             .kv_dtype = FV_DTYPE_F32,
                             .k = row,
                             .v = row,
                             .local_begin = 60,
                             .n_tokens = 5,
                             .pages = pages};

    (void)state; /* a page of 32 units that begins 31 before the arena's end */
    assert_int_equal(fv_backend_cpu.append(backend, &item, 1), FV_ERR_INVALID_ARG);
    pages[1]--;
    assert_int_equal(fv_backend_cpu.append(backend, &item, 1), FV_OK);
    item.kv_dtype = 9;
    assert_int_equal(fv_backend_cpu.append(backend, &item, 1), FV_ERR_INVALID_ARG);
    fv_backend_cpu.destroy(backend);
}

static void test_create_refusals(void **state)
{
    fv_backend_t *backend = NULL;
    fv_backend_config_t config = {.n_threads = -1, .kv_arena_bytes = 1024};

    (void)state;
    assert_int_equal(fv_backend_cpu.create(&config, &backend), FV_ERR_INVALID_ARG);
    config = (fv_backend_config_t){.n_threads = 1, .kv_arena_bytes = 1000};
    assert_int_equal(fv_backend_cpu.create(&config, &backend), FV_ERR_INVALID_ARG);
    config = (fv_backend_config_t){.n_threads = 1, .kv_arena_bytes = 1024, .isa = "mmx"};
    assert_int_equal(fv_backend_cpu.create(&config, &backend), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "mmx"));
    assert_null(backend);
    fv_backend_cpu.destroy(NULL);
}

/* ------------------------------------------------------------------ describe, host memory, null backend */

static void test_describe_and_host_memory(void **state)
{
    fv_backend_t *backend = open_backend("portable", 3);
    fv_device_info_t info;
    void *memory = NULL;

    (void)state;
    fv_backend_cpu.describe(backend, &info);
    assert_non_null(strstr(info.device, "portable"));
    assert_int_equal(info.n_threads, 3);
    assert_int_equal(info.kv_arena_bytes, ARENA_BYTES);
    assert_true(info.workspace_bytes > 0);
    assert_int_equal(fv_backend_cpu.host_alloc(backend, 100, &memory), FV_OK);
    assert_int_equal((uintptr_t)memory % 4096U, 0);
    fv_backend_cpu.host_free(backend, memory);
    fv_backend_cpu.destroy(backend);
}

static void test_null_backend(void **state)
{
    fv_backend_config_t config = {.kv_arena_bytes = 4096};
    fv_backend_t *backend = NULL;
    fv_device_info_t info;
    fv_attn_item_t item;
    float out[4] = {1.0F, 2.0F, 3.0F, 4.0F};

    (void)state;
    assert_int_equal(fv_backend_null.create(&config, &backend), FV_OK);
    fv_backend_null.describe(backend, &info);
    assert_int_equal(info.kv_arena_bytes, 4096);
    memset(&item, 0, sizeof(item));
    item.out = out;
    assert_int_equal(fv_backend_null.attend(backend, &item, 1), FV_OK);
    assert_int_equal(fv_backend_null.finish(backend, NULL, NULL), FV_OK);
    assert_true(out[3] == 4.0F);
    fv_backend_null.destroy(backend);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_extremes),        cmocka_unit_test(test_empties),
        cmocka_unit_test(test_spoils),          cmocka_unit_test(test_infinite_query),
        cmocka_unit_test(test_same_bits),       cmocka_unit_test(test_copy_pages),
        cmocka_unit_test(test_refusals),        cmocka_unit_test(test_append_refuses_wild_pages),
        cmocka_unit_test(test_create_refusals), cmocka_unit_test(test_describe_and_host_memory),
        cmocka_unit_test(test_null_backend),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
