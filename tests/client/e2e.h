/*
 * e2e.h - the fixture of the end-to-end tests: one fovead and one client for a whole test program.
 */
#ifndef FV_TESTS_CLIENT_E2E_H
#define FV_TESTS_CLIENT_E2E_H

#include "tests/client/fovead.h"
#include "tests/client/mirror.h"
#include "tests/support/test.h" /* first: it orders what cmocka needs */

#include <stdio.h>
#include <string.h>

typedef struct fv_e2e {
    fv_fovead_t fovead;
    fovea_client_t *client;
    fv_random_t random;
} fv_e2e_t;

static inline int fv_e2e_setup(fv_e2e_t *e, void **state, const char *const *extra)
{
    fovea_error_t error;

    e->random.state = fv_random_seed(7);
    *state = e;
    if (!fv_fovead_start(&e->fovead, extra)) {
        return -1;
    }
    if (fovea_connect(e->fovead.address, NULL, &e->client, &error) != FOVEA_OK) {
        (void)fprintf(stderr, "%s\n", error.message);
        return -1;
    }
    return 0;
}

static inline int fv_e2e_teardown(fv_e2e_t *e)
{
    fovea_close(e->client);
    return fv_fovead_stop(&e->fovead) ? 0 : -1;
}

#define fv_assert_ok(call, error_)                                                \
    do {                                                                          \
        if ((call) != FOVEA_OK) {                                                 \
            fail_msg("%s: %s", fovea_code_name((error_).code), (error_).message); \
        }                                                                         \
    } while (0)

/* The code, and a text in which each of up to three words appears. */
static inline void fv_assert_error(const fovea_error_t *error,
                                   fovea_code_t code,
                                   const char *a,
                                   const char *b,
                                   const char *c)
{
    const char *const words[] = {a, b, c};

    if (error->code != code) {
        fail_msg("expected %s, got %s: %s", fovea_code_name(code), fovea_code_name(error->code),
                 error->message);
    }
    for (size_t i = 0; i < FV_COUNT(words); i++) {
        if ((words[i] != NULL) && (strstr(error->message, words[i]) == NULL)) {
            fail_msg("expected \"%s\" in \"%s\"", words[i], error->message);
        }
    }
}

/* A backend may refuse a kind of model as a whole: then there is nothing to test. */
static inline void fv_e2e_need_model(const fv_e2e_t *e, const fovea_model_spec_t *spec)
{
    fovea_model_t model;
    fovea_error_t error = {FOVEA_OK, ""};

    if (fovea_register_model(e->client, spec, 0, &model, &error) == FOVEA_UNIMPLEMENTED) {
        print_message("%s\n", error.message);
        skip();
    }
}

/* A registered model; the spec must have head_dim_v set. */
static inline fovea_model_t fv_e2e_model(const fv_e2e_t *e, const fovea_model_spec_t *spec)
{
    fovea_model_t model;
    fovea_error_t error = {FOVEA_OK, ""};

    fv_assert_ok(fovea_register_model(e->client, spec, 0, &model, &error), error);
    return model;
}

static inline fovea_session_id_t fv_e2e_open(const fv_e2e_t *e, const fovea_model_t *model)
{
    fovea_session_id_t session = {{0}};
    fovea_error_t error = {FOVEA_OK, ""};

    fv_assert_ok(fovea_open_session(e->client, model->model_id, NULL, 0, &session, &error), error);
    return session;
}

static inline void fv_e2e_close(const fv_e2e_t *e, const fovea_session_id_t *session)
{
    fovea_error_t error = {FOVEA_OK, ""};

    fv_assert_ok(fovea_close_session(e->client, session, 0, &error), error);
}

/* One step of one mirror that must succeed and agree with the oracle. */
static inline void
fv_e2e_step(fv_e2e_t *e, fv_mirror_t *m, uint32_t n_tokens, fovea_dtype_t dtype, uint32_t flags)
{
    fovea_error_t error = {FOVEA_OK, ""};
    size_t n_bad = 0;

    fv_assert_ok(fv_exam_run(e->client, m, n_tokens, dtype, flags, &e->random, &n_bad, &error),
                 error);
    assert_int_equal(n_bad, 0);
}

#endif /* FV_TESTS_CLIENT_E2E_H */
