/*
 * prop_attend.c - attention on random problems equals the oracle, on every instruction set and thread count.
 *
 * Several problems share each step, so that the line of tiles runs over items, heads, decode and prefill.
 */
#include "kernels/kernels.h"
#include "tests/support/attn_case.h"
#include "tests/support/test.h"

#include <stdio.h>
#include <stdlib.h>

#define N_STEPS   6
#define N_CASES   4
#define MACS      400000
#define ARENA_MAX ((size_t)64 << 20)

static const char *const k_isas[] = {"portable", "avx2", "avx512", "amx"};
static const int32_t k_threads[] = {1, 2, 3, 5};

/* Draws N_CASES problems, runs them as one step, compares each. */
static void one_step(fv_backend_t *backend, fv_rng_t *rng, const char *name)
{
    fv_attn_case_t *cases[N_CASES];
    fv_attn_item_t items[N_CASES];
    void *out[N_CASES];
    float *lse[N_CASES];
    uint32_t next_unit = 0;

    for (size_t i = 0; i < N_CASES; i++) {
        fv_attn_spec_t spec = fv_attn_spec_random(rng, MACS);
        fv_attn_spec_maybe_s2(rng, &spec);

        if (fv_rng_range(rng, 0, 2) == 0) {
            fv_attn_spec_latent(&spec, rng, MACS);
        }
        if ((spec.kv_end > 0) && (fv_rng_range(rng, 0, 3) == 0)) {
            spec.spoil_token = fv_rng_range(rng, 1, spec.kv_end);
        }
        cases[i] = fv_attn_case_create(&spec);
        fv_attn_case_place(cases[i], rng, &next_unit);
        assert_int_equal(fv_attn_case_load(cases[i], &fv_backend_cpu, backend, rng), FV_OK);
        out[i] = malloc(fv_attn_case_out_bytes(cases[i]));
        lse[i] = malloc(fv_attn_case_rows(cases[i]) * sizeof(float));
        items[i] = fv_attn_case_item(cases[i], 0, out[i], lse[i]);
    }
    assert_int_equal(fv_backend_cpu.attend(backend, items, N_CASES), FV_OK);
    assert_int_equal(fv_backend_cpu.finish(backend, NULL, NULL), FV_OK);
    for (size_t i = 0; i < N_CASES; i++) {
        fv_attn_case_solve(cases[i]);
        assert_int_equal(fv_attn_case_check(cases[i], out[i], lse[i], name), 0);
        fv_attn_case_destroy(cases[i]);
        free(out[i]);
        free(lse[i]);
    }
}

static void test_equals_oracle(void **state)
{
    fv_rng_t rng = {fv_test_seed(20261122)};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_isas); i++) {
        for (size_t t = 0; t < FV_COUNT(k_threads); t++) {
            fv_backend_config_t config = {
                .n_threads = k_threads[t], .kv_arena_bytes = ARENA_MAX, .isa = k_isas[i]};
            fv_backend_t *backend = NULL;
            char name[64];

            if (fv_backend_cpu.create(&config, &backend) != FV_OK) {
                print_message("%s: not on this machine\n", k_isas[i]);
                continue;
            }
            (void)snprintf(name, sizeof(name), "%s, %d threads", k_isas[i], k_threads[t]);
            for (int step = 0; step < N_STEPS; step++) {
                one_step(backend, &rng, name);
            }
            fv_backend_cpu.destroy(backend);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_equals_oracle)};

    return cmocka_run_group_tests(tests, NULL, NULL);
}
