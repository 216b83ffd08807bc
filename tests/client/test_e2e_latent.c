/*
 * test_e2e_latent.c - a LATENT model through the C client: exact, and in two slices, against the fp64 oracle.
 */
#include "kernels/kernels.h"
#include "tests/client/e2e.h"

#include <math.h>
#include <stdlib.h>

enum {
    LATENT = 128,
    ROPE = 16,
    DIM = LATENT + ROPE,
    HEADS = 6,
    TOKENS = 150,
};

static fv_e2e_t s_e2e;

static fovea_model_spec_t make_spec(const char *name)
{
    return (fovea_model_spec_t){.name = name,
                                .n_layers = 1,
                                .n_q_heads = HEADS,
                                .kv_dtype = FOVEA_DTYPE_F32,
                                .softmax_scale = 0.11F,
                                .kind = FOVEA_KIND_LATENT,
                                .latent_dim = LATENT,
                                .rope_dim = ROPE};
}

typedef struct latents {
    float q[TOKENS][HEADS][DIM];
    float k[TOKENS][DIM];
    float out[TOKENS][HEADS][LATENT];
} latents_t;

static latents_t *make_latents(fv_random_t *random)
{
    latents_t *x = malloc(sizeof(*x));
    float *q = NULL;

    assert_non_null(x);
    q = &x->q[0][0][0];
    for (size_t i = 0; i < sizeof(x->q) / sizeof(float); i++) {
        q[i] = fv_random_unit(random);
    }
    for (size_t i = 0; i < sizeof(x->k) / sizeof(float); i++) {
        (&x->k[0][0])[i] = fv_random_unit(random);
    }
    memset(x->out, 0xff, sizeof(x->out)); /* NaN: what is not written shows */
    return x;
}

static fovea_code_t send(const fv_e2e_t *e,
                         const fovea_session_id_t *session,
                         latents_t *x,
                         uint32_t begin,
                         uint32_t end,
                         fovea_error_t *error)
{
    fovea_attend_item_t item = {.session = *session, .position = begin, .n_tokens = end - begin};
    fovea_attend_request_t request = {
        .dtype = FOVEA_DTYPE_F32,
        .n_items = 1,
        .items = &item,
        .q = x->q[begin],
        .q_bytes = (end - begin) * sizeof(x->q[0]),
        .k = x->k[begin],
        .k_bytes = (end - begin) * sizeof(x->k[0]),
        .out = x->out[begin],
        .out_bytes = (end - begin) * sizeof(x->out[0]),
    };

    return fovea_attend(e->client, &request, 0, NULL, error);
}

/* The oracle for one slice: dims [first, first + n) of the latent, scores times mu, and the whole RoPE key. */
static void check_slice(const latents_t *x, size_t first, size_t n, double mu)
{
    size_t dk = n + ROPE;
    double *q = malloc(TOKENS * HEADS * dk * sizeof(*q));
    double *k = malloc(TOKENS * dk * sizeof(*k));
    double *v = malloc(TOKENS * n * sizeof(*v));
    double *out = malloc(TOKENS * HEADS * n * sizeof(*out));

    assert_true((q != NULL) && (k != NULL) && (v != NULL) && (out != NULL));
    for (size_t t = 0; t < TOKENS; t++) {
        for (size_t d = 0; d < dk; d++) {
            size_t from = (d < n) ? (first + d) : (LATENT + d - n);

            k[t * dk + d] = (double)x->k[t][from];
            if (d < n) {
                v[t * n + d] = (double)x->k[t][from];
            }
            for (size_t h = 0; h < HEADS; h++) {
                q[(t * HEADS + h) * dk + d] = (double)x->q[t][h][from] * ((d < n) ? mu : 1.0);
            }
        }
    }
    fv_attend_ref(&(fv_attend_ref_params_t){.n_tokens = TOKENS,
                                            .kv_end = TOKENS,
                                            .n_kv_heads = 1,
                                            .group = HEADS,
                                            .head_dim_qk = (int32_t)dk,
                                            .head_dim_v = (int32_t)n,
                                            .softmax_scale = (double)0.11F,
                                            .causal = true,
                                            .q = q,
                                            .k = k,
                                            .v = v,
                                            .out = out});
    for (size_t row = 0; row < (size_t)TOKENS * HEADS; row++) {
        for (size_t d = 0; d < n; d++) {
            double given = (double)x->out[row / HEADS][row % HEADS][first + d];

            assert_true(fabs(given - out[row * n + d]) <= 2e-5);
        }
    }
    free(q);
    free(k);
    free(v);
    free(out);
}

/* Prefill in two chunks, then decode. */
static void run(const fv_e2e_t *e, const fovea_session_id_t *session, latents_t *x)
{
    static const uint32_t k_ends[] = {70, 140, 141, 142, TOKENS};
    fovea_error_t error = {FOVEA_OK, ""};
    uint32_t begin = 0;

    for (size_t i = 0; i < FV_COUNT(k_ends); i++) {
        fv_assert_ok(send(e, session, x, begin, k_ends[i], &error), error);
        begin = k_ends[i];
    }
}

static void test_exact(void **state)
{
    fv_e2e_t *e = *state;
    fovea_model_spec_t spec = make_spec("mla");
    latents_t *x = make_latents(&e->random);
    fovea_placement_t placement = {0};
    fovea_error_t error = {FOVEA_OK, ""};

    spec.sharding = (fovea_sharding_t){.mode = FOVEA_SHARDING_CONTEXT, .shard_tokens = 64};
    fovea_model_t model = fv_e2e_model(e, &spec);
    fovea_session_id_t session = fv_e2e_open(e, &model);
    run(e, &session, x);
    check_slice(x, 0, LATENT, 1.0);
    fv_assert_ok(fovea_get_placement(e->client, &session, 0, &placement, &error), error);
    assert_false(placement.is_approximate);
    assert_int_equal(placement.n_latent_parts, 1);
    assert_int_equal(placement.shares[0].latent_end, LATENT);
    fovea_placement_free(&placement);
    fv_e2e_close(e, &session);
    free(x);
}

/* T11: two slices whose scores are added up are the model itself, lse included; nothing is approximate. */
static void test_slices_added_up(void **state)
{
    fv_e2e_t *e = *state;
    fovea_model_spec_t spec = make_spec("exact");
    fovea_placement_t placement = {0};
    fovea_session_id_t session = {{0}};
    fovea_error_t error = {FOVEA_OK, ""};

    spec.sharding = (fovea_sharding_t){.mode = FOVEA_SHARDING_LATENT, .groups = 2, .exact = true};
    fovea_model_t model = fv_e2e_model(e, &spec);
    assert_int_equal(model.n_warnings, 1);
    assert_null(strstr(model.warnings[0], "approximation"));
    if (fovea_open_session(e->client, model.model_id, NULL, 0, &session, &error) != FOVEA_OK) {
        fv_assert_error(&error, FOVEA_FAILED_PRECONDITION, "groups", "2 given", "at most 1");
        return;
    }
    latents_t *x = make_latents(&e->random);
    run(e, &session, x);
    check_slice(x, 0, LATENT, 1.0);
    fv_assert_ok(fovea_get_placement(e->client, &session, 0, &placement, &error), error);
    assert_false(placement.is_approximate);
    assert_string_equal(placement.mode, "latent exact");
    assert_int_equal(placement.n_latent_parts, 2);
    fovea_placement_free(&placement);
    fv_e2e_close(e, &session);
    free(x);
}

/* On one rank two slices are refused; on more each is a softmax of its own, and said to be. */
static void test_slices(void **state)
{
    fv_e2e_t *e = *state;
    fovea_model_spec_t spec = make_spec("tpla");
    const float mu[] = {1.0F, 1.5F};
    fovea_placement_t placement = {0};
    fovea_session_id_t session = {{0}};
    fovea_error_t error = {FOVEA_OK, ""};

    spec.sharding = (fovea_sharding_t){.mode = FOVEA_SHARDING_LATENT, .groups = 2, .mu = mu};
    fovea_model_t model = fv_e2e_model(e, &spec);
    assert_int_equal(model.n_warnings, 1);
    assert_non_null(strstr(model.warnings[0], "approximation"));
    if (fovea_open_session(e->client, model.model_id, NULL, 0, &session, &error) != FOVEA_OK) {
        fv_assert_error(&error, FOVEA_FAILED_PRECONDITION, "groups", "2 given", "at most 1");
        return;
    }
    latents_t *x = make_latents(&e->random);
    run(e, &session, x);
    check_slice(x, 0, LATENT / 2, 1.0);
    check_slice(x, LATENT / 2, LATENT / 2, 1.5);
    fv_assert_ok(fovea_get_placement(e->client, &session, 0, &placement, &error), error);
    assert_true(placement.is_approximate);
    assert_string_equal(placement.mode, "latent");
    assert_int_equal(placement.n_latent_parts, 2);
    assert_int_equal(placement.shares[1].latent_begin, LATENT / 2);
    fovea_placement_free(&placement);
    fv_e2e_close(e, &session);
    free(x);
}

static void test_norm_is_the_models(void **state)
{
    fv_e2e_t *e = *state;
    fovea_model_spec_t spec = make_spec("norm");
    fovea_model_t model;
    fovea_error_t error = {FOVEA_OK, ""};
    const float shares[] = {0.7F, 0.3F};

    spec.sharding = (fovea_sharding_t){.mode = FOVEA_SHARDING_LATENT, .groups = 2};
    spec.norm_slices = true;
    spec.norm_eps = 1e-6F;
    spec.norm_alpha = shares; /* which are not their reciprocals */
    assert_int_equal(fovea_register_model(e->client, &spec, 0, &model, &error),
                     FOVEA_INVALID_ARGUMENT);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "latent_norm.alpha", "4.76", NULL);
}

static int setup(void **state)
{
    return fv_e2e_setup(&s_e2e, state, NULL);
}

static int teardown(void **state)
{
    (void)state;
    return fv_e2e_teardown(&s_e2e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exact),
        cmocka_unit_test(test_slices_added_up),
        cmocka_unit_test(test_slices),
        cmocka_unit_test(test_norm_is_the_models),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
