/*
 * test_e2e_session.c - sessions and positions: exactly-once append, fork, truncate, and errors that tell.
 */
#include "tests/client/e2e.h"

#include <stdlib.h>

static fv_e2e_t g_e2e;
static fovea_model_spec_t g_spec = {.name = "sessions",
                                    .n_layers = 2,
                                    .n_q_heads = 4,
                                    .n_kv_heads = 2,
                                    .head_dim_qk = 32,
                                    .head_dim_v = 32,
                                    .kv_dtype = FOVEA_DTYPE_F32};
static fovea_model_t g_model;

static int setup(void **state)
{
    static const char *const k_extra[] = {"--kv-memory=64m", NULL};
    fovea_error_t error;

    if (fv_e2e_setup(&g_e2e, state, k_extra) != 0) {
        return -1;
    }
    return (fovea_register_model(g_e2e.client, &g_spec, 0, &g_model, &error) == FOVEA_OK) ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    return fv_e2e_teardown(&g_e2e);
}

static uint64_t layer_tokens(const fv_e2e_t *e, const fovea_session_id_t *session, uint32_t layer)
{
    fovea_session_info_t info = {0};
    fovea_error_t error = {FOVEA_OK, ""};
    uint64_t n = 0;

    fv_assert_ok(fovea_get_session(e->client, session, 0, &info, &error), error);
    assert_int_equal(info.n_layers, g_spec.n_layers);
    n = info.layer_tokens[layer];
    fovea_session_info_free(&info);
    return n;
}

static void test_registration_is_idempotent(void **state)
{
    fv_e2e_t *e = *state;
    fovea_model_spec_t other = g_spec;
    fovea_model_t again = fv_e2e_model(e, &g_spec);

    assert_string_equal(again.model_id, g_model.model_id);
    other.softmax_scale = 0.5F;
    again = fv_e2e_model(e, &other);
    assert_string_not_equal(again.model_id, g_model.model_id);
}

static void test_bad_specs_are_named(void **state)
{
    fv_e2e_t *e = *state;
    fovea_model_spec_t spec = g_spec;
    fovea_policy_t policy = {.kind = FOVEA_POLICY_WINDOW, .window_tokens = 0};
    fovea_model_t model;
    fovea_error_t error;

    spec.head_dim_qk = 33;
    assert_int_equal(fovea_register_model(e->client, &spec, 0, &model, &error), 3);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "head_dim_qk", "33", "multiple of 8");
    spec = g_spec;
    spec.n_q_heads = 5;
    (void)fovea_register_model(e->client, &spec, 0, &model, &error);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "n_q_heads", "5", "multiple");
    spec = g_spec;
    spec.n_q_heads = UINT32_MAX;
    (void)fovea_register_model(e->client, &spec, 0, &model, &error);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "n_q_heads", "1024", NULL);
    spec = g_spec;
    spec.name = "";
    (void)fovea_register_model(e->client, &spec, 0, &model, &error);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "name", "1..63", NULL);
    spec = g_spec;
    spec.policies = &policy;
    spec.n_policies = 1;
    (void)fovea_register_model(e->client, &spec, 0, &model, &error);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "window_tokens", "0", "1..");
}

/* The same append again: the same answer, and nothing is appended. */
static void test_replay_is_answered_not_doubled(void **state)
{
    fv_e2e_t *e = *state;
    fovea_session_id_t session = fv_e2e_open(e, &g_model);
    fovea_error_t error = {FOVEA_OK, ""};
    uint32_t n_tokens = 10;
    fv_mirror_t m;
    fv_mirror_t *all = &m;
    fv_exam_t exam;

    fv_mirror_init(&m, &g_spec, &session, 0, 64);
    fv_exam_init(&exam, &all, &n_tokens, 1, FOVEA_DTYPE_F32, 0, &e->random);
    for (int i = 0; i < 3; i++) {
        memset(exam.out, 0xFF, exam.request.out_bytes);
        fv_assert_ok(fovea_attend(e->client, &exam.request, 0, NULL, &error), error);
        assert_int_equal(fv_exam_check(&exam), 0);
        assert_int_equal(layer_tokens(e, &session, 0), n_tokens);
        assert_int_equal(layer_tokens(e, &session, 1), 0);
    }
    fv_exam_fini(&exam);
    fv_e2e_step(e, &m, 1, FOVEA_DTYPE_F32, 0);
    fv_mirror_fini(&m);
    fv_e2e_close(e, &session);
}

static void test_positions_out_of_order(void **state)
{
    fv_e2e_t *e = *state;
    fovea_session_id_t session = fv_e2e_open(e, &g_model);
    fovea_error_t error;
    uint32_t n_tokens = 6;
    fv_mirror_t m;
    fv_mirror_t other;
    fv_mirror_t *all = &other;
    fv_exam_t exam;

    fv_mirror_init(&m, &g_spec, &session, 0, 64);
    fv_e2e_step(e, &m, 6, FOVEA_DTYPE_F32, 0);

    fv_mirror_init(&other, &g_spec, &session, 0, 64); /* other tokens at a position that is taken */
    fv_exam_init(&exam, &all, &n_tokens, 1, FOVEA_DTYPE_F32, 0, &e->random);
    assert_int_not_equal(fovea_attend(e->client, &exam.request, 0, NULL, &error), FOVEA_OK);
    fv_assert_error(&error, FOVEA_FAILED_PRECONDITION, "position", NULL, NULL);
    exam.items[0].position = 9; /* beyond the end: the text tells where that is */
    assert_int_not_equal(fovea_attend(e->client, &exam.request, 0, NULL, &error), FOVEA_OK);
    fv_assert_error(&error, FOVEA_OUT_OF_RANGE, "position", "9", "6");
    fv_exam_fini(&exam);
    fv_mirror_fini(&other);

    assert_int_equal(layer_tokens(e, &session, 0), 6); /* what was refused changed nothing */
    fv_e2e_step(e, &m, 1, FOVEA_DTYPE_F32, 0);
    fv_mirror_fini(&m);
    fv_e2e_close(e, &session);
}

static void test_fork_and_truncate(void **state)
{
    fv_e2e_t *e = *state;
    fovea_session_id_t session = fv_e2e_open(e, &g_model);
    fovea_session_id_t forked;
    fovea_error_t error = {FOVEA_OK, ""};
    fovea_session_info_t info = {0};
    fv_mirror_t m;
    fv_mirror_t f;

    fv_mirror_init(&m, &g_spec, &session, 0, 256);
    fv_e2e_step(e, &m, 100, FOVEA_DTYPE_F32, 0);
    (void)fovea_fork_session(e->client, &session, 101, 0, &forked, &error);
    fv_assert_error(&error, FOVEA_OUT_OF_RANGE, "at_position", "101", "100");
    fv_assert_ok(fovea_fork_session(e->client, &session, 70, 0, &forked, &error), error);
    fv_mirror_fork(&f, &m, &forked, 70);
    assert_int_equal(layer_tokens(e, &forked, 0), 70);
    assert_int_equal(layer_tokens(e, &forked, 1), 0); /* a shorter layer keeps what it has */
    fv_assert_ok(fovea_get_session(e->client, &forked, 0, &info, &error), error);
    assert_true(info.has_parent);
    assert_memory_equal(&info.parent, &session, sizeof(session));
    fovea_session_info_free(&info);

    fv_e2e_step(e, &f, 5, FOVEA_DTYPE_F32, 0); /* both go on, apart, from a page they share */
    fv_e2e_step(e, &m, 3, FOVEA_DTYPE_F32, 0);
    fv_e2e_step(e, &f, 1, FOVEA_DTYPE_F32, 0);

    fv_assert_ok(fovea_truncate_session(e->client, &session, 30, 0, &error), error);
    m.n_tokens = 30;
    assert_int_equal(layer_tokens(e, &session, 0), 30);
    fv_e2e_step(e, &m, 40, FOVEA_DTYPE_F32, 0); /* other tokens where the dropped ones were */
    fv_e2e_close(e, &session);
    fv_e2e_step(e, &f, 1, FOVEA_DTYPE_F32, 0); /* a fork outlives its parent */
    fv_e2e_close(e, &forked);
    fv_mirror_fini(&m);
    fv_mirror_fini(&f);
}

static void test_closed_sessions_are_gone(void **state)
{
    fv_e2e_t *e = *state;
    fovea_session_id_t session = fv_e2e_open(e, &g_model);
    char text[FOVEA_SESSION_TEXT_BYTES];
    fovea_session_info_t info = {0};
    fovea_placement_t placement = {0};
    fovea_error_t error;
    size_t n_bad = 0;
    fv_mirror_t m;

    fv_mirror_init(&m, &g_spec, &session, 0, 8);
    fovea_session_id_format(&session, text);
    fv_e2e_close(e, &session);
    (void)fovea_close_session(e->client, &session, 0, &error);
    fv_assert_error(&error, FOVEA_NOT_FOUND, text, NULL, NULL);
    (void)fovea_get_session(e->client, &session, 0, &info, &error);
    fv_assert_error(&error, FOVEA_NOT_FOUND, text, NULL, NULL);
    (void)fovea_get_placement(e->client, &session, 0, &placement, &error);
    fv_assert_error(&error, FOVEA_NOT_FOUND, text, NULL, NULL);
    (void)fovea_truncate_session(e->client, &session, 0, 0, &error);
    fv_assert_error(&error, FOVEA_NOT_FOUND, text, NULL, NULL);
    (void)fv_exam_run(e->client, &m, 1, FOVEA_DTYPE_F32, 0, &e->random, &n_bad, &error);
    fv_assert_error(&error, FOVEA_NOT_FOUND, text, NULL, NULL);
    fv_mirror_fini(&m);
    (void)fovea_open_session(e->client, "m-of-nobody", NULL, 0, &session, &error);
    fv_assert_error(&error, FOVEA_NOT_FOUND, "m-of-nobody", NULL, NULL);
}

/* Every refusal names the field, what was given and what was expected, and changes nothing. */
static void test_wrong_requests(void **state)
{
    fv_e2e_t *e = *state;
    fovea_session_id_t session = fv_e2e_open(e, &g_model);
    uint32_t n_tokens[2] = {2, 2};
    fovea_attend_request_t r;
    fovea_error_t error;
    fv_mirror_t m;
    fv_mirror_t *all[2] = {&m, &m};
    fv_exam_t exam;

    fv_mirror_init(&m, &g_spec, &session, 0, 8);
    fv_exam_init(&exam, all, n_tokens, 1, FOVEA_DTYPE_F32, 0, &e->random);
    r = exam.request;
    r.q_bytes -= 4;
    (void)fovea_attend(e->client, &r, 0, NULL, &error);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "q", "1020", "1024");
    r = exam.request;
    r.v_bytes = 0;
    (void)fovea_attend(e->client, &r, 0, NULL, &error);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "v", "0", "512");
    r = exam.request;
    r.layer = 2;
    (void)fovea_attend(e->client, &r, 0, NULL, &error);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "layer", "2", NULL);
    r = exam.request;
    r.flags = FOVEA_ATTEND_QUERY_ONLY;
    (void)fovea_attend(e->client, &r, 0, NULL, &error); /* with k and v */
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "k", NULL, NULL);
    exam.items[0].n_tokens = 0;
    (void)fovea_attend(e->client, &exam.request, 0, NULL, &error);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "n_tokens", "0", NULL);
    fv_exam_fini(&exam);
    m.n_tokens = 0;

    fv_exam_init(&exam, all, n_tokens, 2, FOVEA_DTYPE_F32, 0, &e->random); /* one session twice */
    (void)fovea_attend(e->client, &exam.request, 0, NULL, &error);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "items", NULL, NULL);
    fv_exam_fini(&exam);
    m.n_tokens = 0;
    assert_int_equal(layer_tokens(e, &session, 0), 0);
    fv_e2e_step(e, &m, 2, FOVEA_DTYPE_F32, 0);
    fv_mirror_fini(&m);
    fv_e2e_close(e, &session);
}

/* What the library itself refuses: nothing is sent. */
static void test_wrong_calls(void **state)
{
    fv_e2e_t *e = *state;
    fovea_attend_request_t r = {.dtype = FOVEA_DTYPE_F32};
    fovea_attend_item_t item = {.n_tokens = 1};
    fovea_client_t *client = NULL;
    fovea_options_t quick = {.connect_timeout_ms = 50};
    fovea_error_t error;

    (void)fovea_attend(e->client, &r, 0, NULL, &error);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "items", "0", "4096");
    r.items = &item;
    r.n_items = 1;
    r.dtype = (fovea_dtype_t)9;
    (void)fovea_attend(e->client, &r, 0, NULL, &error);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "dtype", "9", "F32");
    r.dtype = FOVEA_DTYPE_F32;
    r.q_bytes = 8;
    (void)fovea_attend(e->client, &r, 0, NULL, &error);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "q", "NULL", NULL);
    (void)fovea_attend(e->client, NULL, 0, NULL, &error);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "request", "NULL", NULL);
    (void)fovea_connect("", NULL, &client, &error);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "address", "host:port", NULL);
    (void)fovea_connect("unix:/tmp/fv-nobody-listens-here", &quick, &client, &error);
    fv_assert_error(&error, FOVEA_UNAVAILABLE, "fv-nobody-listens-here", "50 ms", NULL);
    assert_null(client);
}

static void test_wrong_out_size_is_said(void **state)
{
    fv_e2e_t *e = *state;
    fovea_session_id_t session = fv_e2e_open(e, &g_model);
    fovea_error_t error;
    uint32_t n_tokens = 1;
    fv_mirror_t m;
    fv_mirror_t *all = &m;
    fv_exam_t exam;

    fv_mirror_init(&m, &g_spec, &session, 0, 8);
    fv_exam_init(&exam, &all, &n_tokens, 1, FOVEA_DTYPE_F32, 0, &e->random);
    exam.request.out_bytes -= 4;
    (void)fovea_attend(e->client, &exam.request, 0, NULL, &error);
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "out_bytes", "508", "512");
    exam.request.out_bytes += 4;
    exam.request.lse_bytes -= 4;
    (void)fovea_attend(e->client, &exam.request, 0, NULL, &error); /* the append is a replay now */
    fv_assert_error(&error, FOVEA_INVALID_ARGUMENT, "lse_bytes", "12", "16");
    fv_exam_fini(&exam);
    fv_mirror_fini(&m);
    fv_e2e_close(e, &session);
}

static void test_list_in_pages(void **state)
{
    enum {
        N = 7
    };
    fv_e2e_t *e = *state;
    fovea_model_spec_t spec = g_spec;
    fovea_session_id_t sessions[N];
    fovea_list_options_t options = {.page_size = 3};
    fovea_session_list_t page = {0};
    fovea_error_t error = {FOVEA_OK, ""};
    char token[64] = "";
    int n_seen = 0;
    int n_pages = 0;

    spec.name = "listed";
    fovea_model_t model = fv_e2e_model(e, &spec);
    for (int i = 0; i < N; i++) {
        sessions[i] = fv_e2e_open(e, &model);
    }
    options.model_id = model.model_id;
    do {
        options.page_token = token;
        fv_assert_ok(fovea_list_sessions(e->client, &options, 0, &page, &error), error);
        for (uint32_t i = 0; i < page.n_sessions; i++) {
            for (int j = 0; j < N; j++) {
                n_seen += memcmp(&page.sessions[i].session, &sessions[j], 16) == 0;
            }
        }
        memcpy(token, page.next_page_token, sizeof(token));
        fovea_session_list_free(&page);
        n_pages++;
    } while ((token[0] != '\0') && (n_pages < 10));
    assert_int_equal(n_seen, N); /* each once, none left out */
    assert_int_equal(n_pages, 3);
    for (int i = 0; i < N; i++) {
        fv_e2e_close(e, &sessions[i]);
    }
}

static bool stop_after_three(void *user, const fovea_cluster_status_t *status)
{
    int *n = user;

    assert_string_equal(status->state, "serving");
    assert_true(status->n_ranks >= 1);
    (*n)++;
    return *n < 3;
}

static void test_status_placement_watch(void **state)
{
    fv_e2e_t *e = *state;
    fovea_session_id_t session = fv_e2e_open(e, &g_model);
    fovea_cluster_status_t status = {0};
    fovea_placement_t placement = {0};
    fovea_error_t error = {FOVEA_OK, ""};
    uint64_t cells = 0;
    fv_mirror_t m;
    int n = 0;

    fv_mirror_init(&m, &g_spec, &session, 0, 256);
    fv_e2e_step(e, &m, 130, FOVEA_DTYPE_F32, 0);
    fv_assert_ok(fovea_get_status(e->client, 0, &status, &error), error);
    assert_int_equal(status.n_sessions, 1);
    assert_true(status.kv_bytes_free < status.kv_bytes_total);
    assert_string_equal(status.ranks[0].state, "ready");
    fovea_cluster_status_free(&status);
    fv_assert_ok(fovea_get_placement(e->client, &session, 0, &placement, &error), error);
    assert_int_equal(placement.n_tokens, 130);
    for (uint32_t i = 0; i < placement.n_shares; i++) { /* the shares tile heads x tokens */
        cells += placement.shares[i].n_tokens *
                 (placement.shares[i].kv_head_end - placement.shares[i].kv_head_begin);
    }
    assert_int_equal(cells, 130 * g_spec.n_kv_heads);
    fovea_placement_free(&placement);
    fv_assert_ok(fovea_watch_status(e->client, 50, 0, stop_after_three, &n, &error), error);
    assert_int_equal(n, 3);
    n = -1000; /* never reaches three: the deadline ends it */
    assert_int_equal(fovea_watch_status(e->client, 50, 300, stop_after_three, &n, &error),
                     FOVEA_DEADLINE_EXCEEDED);
    assert_true(n > -1000);
    fv_mirror_fini(&m);
    fv_e2e_close(e, &session);
}

/* A full pool is a status with numbers, and what is stored stays usable. */
static void test_pool_exhaustion(void **state)
{
    enum {
        CHUNK = 2048,
        TOKENS_MAX = 400000
    };
    fv_e2e_t *e = *state;
    fovea_model_spec_t spec = {.name = "fat",
                               .n_layers = 1,
                               .n_q_heads = 8,
                               .n_kv_heads = 8,
                               .head_dim_qk = 256,
                               .head_dim_v = 256,
                               .kv_dtype = FOVEA_DTYPE_F32};
    fovea_model_t model = fv_e2e_model(e, &spec);
    fovea_session_id_t sessions[64];
    uint32_t n_tokens = CHUNK;
    int n_sessions = 0;
    fovea_error_t error = {FOVEA_OK, ""};
    fv_mirror_t m;
    fv_exam_t exam;

    fv_mirror_init(&m, &g_spec, &(fovea_session_id_t){{0}}, 0, 64);
    m.session = fv_e2e_open(e, &g_model);
    fv_e2e_step(e, &m, 10, FOVEA_DTYPE_F32, 0);
    {
        fv_mirror_t fat;
        fv_mirror_t *p = &fat;
        fv_mirror_init(&fat, &spec, &m.session, 0, CHUNK);
        fv_exam_init(&exam, &p, &n_tokens, 1, FOVEA_DTYPE_F32, 0, &e->random);
        fv_mirror_fini(&fat);
    }
    while ((error.code == FOVEA_OK) && (n_sessions < 64)) {
        sessions[n_sessions] = fv_e2e_open(e, &model);
        exam.items[0].session = sessions[n_sessions++];
        (void)fovea_attend(e->client, &exam.request, 120000, NULL, &error);
    }
    fv_assert_error(&error, FOVEA_RESOURCE_EXHAUSTED, "bytes", "free", NULL);
    fv_e2e_step(e, &m, 1, FOVEA_DTYPE_F32, FOVEA_ATTEND_QUERY_ONLY);
    for (int i = 0; i < n_sessions; i++) {
        fv_e2e_close(e, &sessions[i]);
    }
    fv_e2e_step(e, &m, 20, FOVEA_DTYPE_F32, 0); /* and there is room again */
    fv_exam_fini(&exam);
    fv_e2e_close(e, &m.session);
    fv_mirror_fini(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_registration_is_idempotent),
        cmocka_unit_test(test_bad_specs_are_named),
        cmocka_unit_test(test_replay_is_answered_not_doubled),
        cmocka_unit_test(test_positions_out_of_order),
        cmocka_unit_test(test_fork_and_truncate),
        cmocka_unit_test(test_closed_sessions_are_gone),
        cmocka_unit_test(test_wrong_requests),
        cmocka_unit_test(test_wrong_calls),
        cmocka_unit_test(test_wrong_out_size_is_said),
        cmocka_unit_test(test_list_in_pages),
        cmocka_unit_test(test_status_placement_watch),
        cmocka_unit_test(test_pool_exhaustion),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
