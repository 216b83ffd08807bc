/*
 * test_e2e_cli.c - the `fovea` tool, run as a user runs it, against a real service.
 */
#include "client/npy.h"
#include "tests/client/e2e.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <unistd.h>

#define OUTPUT_BYTES 32768
#define ARGS_MAX     32

static fv_e2e_t g_e2e;
static char g_output[OUTPUT_BYTES];

static int setup(void **state)
{
    static const char *const k_extra[] = {"--kv-memory=64m", NULL};

    return fv_e2e_setup(&g_e2e, state, k_extra);
}

static int teardown(void **state)
{
    (void)state;
    return fv_e2e_teardown(&g_e2e);
}

/* Runs `fovea WORDS` with the service's address; the output is in g_output. Returns the exit code. */
static int fovea(const char *words)
{
    char *argv[ARGS_MAX] = {getenv("FV_TEST_CLI"), (char *)(uintptr_t) "-a", g_e2e.fovead.address};
    char copy[1024];
    char *rest = NULL;
    int n = 3;

    assert_non_null(argv[0]);
    (void)snprintf(copy, sizeof(copy), "%s", words);
    for (char *w = strtok_r(copy, " ", &rest); w != NULL; w = strtok_r(NULL, " ", &rest)) {
        assert_true(n < (ARGS_MAX - 1));
        argv[n++] = w;
    }
    return fv_run_program(argv, g_output, sizeof(g_output));
}

static void expect(int rc, const char *words)
{
    int got = fovea(words);

    if (got != rc) {
        fail_msg("fovea %s: exit code %d, expected %d: %s", words, got, rc, g_output);
    }
}

static void says(const char *text)
{
    if (strstr(g_output, text) == NULL) {
        fail_msg("expected \"%s\" in: %s", text, g_output);
    }
}

/* The first line of the last output. */
static void take_line(char out[64])
{
    (void)snprintf(out, 64, "%.*s", (int)strcspn(g_output, "\n"), g_output);
}

/* One number somewhere in the JSON of the last output. */
static double json_number(const char *array, const char *name)
{
    cJSON *json = cJSON_Parse(g_output);
    const cJSON *at = NULL;
    double value = 0.0;

    if (json == NULL) {
        fail_msg("not JSON: %s", g_output);
    }
    at = (array == NULL) ? json : cJSON_GetArrayItem(cJSON_GetObjectItem(json, array), 0);
    at = cJSON_GetObjectItem(at, name);
    assert_true(cJSON_IsNumber(at));
    value = at->valuedouble;
    cJSON_Delete(json);
    return value;
}

static void test_help_and_usage(void **state)
{
    static const char *const k_commands[] = {"status", "sessions", "placement", "models",
                                             "open",   "fork",     "truncate",  "close",
                                             "attend", "bench",    "drain"};
    char words[64];

    (void)state;
    expect(0, "--help");
    says("Exit codes: 0 success; 1");
    for (size_t i = 0; i < FV_COUNT(k_commands); i++) {
        says(k_commands[i]);
    }
    for (size_t i = 0; i < FV_COUNT(k_commands); i++) {
        (void)snprintf(words, sizeof(words), "%s --help", k_commands[i]);
        expect(0, words);
        says("Exit codes: 0 success, 1");
        (void)snprintf(words, sizeof(words), "%s --no-such-option", k_commands[i]);
        expect(2, words);
    }
    expect(2, "no-such-command");
    says("no-such-command");
    expect(2, "close not-a-session");
    says("32 hex digits");
    expect(2, "truncate");
    expect(2, "bench --batch 0");
    expect(2, "attend -q x.npy -k k.npy");
    expect(2, "--timeout 0 status");
    expect(2, "models list");
}

static void test_service_errors(void **state)
{
    char address[96];
    (void)state;

    expect(1, "close 00000000000000000000000000000000");
    says("NOT_FOUND");
    expect(1, "open no-such-model");
    says("no-such-model");
    expect(1, "models register --name bad --layers 1 --q-heads 3 --kv-heads 2 --head-dim 64");
    says("n_q_heads");
    (void)snprintf(address, sizeof(address), "-a unix:%s/nobody -t 0.1 status", g_e2e.fovead.dir);
    expect(1, address);
    says("nobody");
}

static void test_status(void **state)
{
    (void)state;
    expect(0, "status");
    says("serving");
    says("KV memory");
    expect(0, "status --json");
    assert_true(json_number("ranks", "kv_bytes_total") > 0.0);
    assert_true(json_number(NULL, "uptime_ms") > 0.0);
}

static void test_life_of_a_session(void **state)
{
    char model[64];
    char session[64];
    char forked[64];
    char words[256];

    (void)state;
    expect(0, "models register --name cli --layers 2 --q-heads 4 --kv-heads 2 --head-dim 32");
    take_line(model);
    (void)snprintf(words, sizeof(words), "open %s", model);
    expect(0, words);
    take_line(session);
    assert_int_equal(strlen(session), 32);
    expect(0, "sessions");
    says(session);
    (void)snprintf(words, sizeof(words), "sessions --json --model-id %s", model);
    expect(0, words);
    assert_true(json_number(NULL, "n_total") == 1.0);
    (void)snprintf(words, sizeof(words), "fork %s", session);
    expect(0, words);
    take_line(forked);
    (void)snprintf(words, sizeof(words), "truncate %s 5", forked);
    expect(1, words);
    says("OUT_OF_RANGE");
    (void)snprintf(words, sizeof(words), "truncate %s 0", forked);
    expect(0, words);
    (void)snprintf(words, sizeof(words), "close %s %s", session, forked);
    expect(0, words);
    expect(1, words); /* both are gone; both are named */
    says(session);
    says(forked);
}

static void
write_tensor(const char *name, const void *data, size_t n_bytes, size_t heads, size_t dim)
{
    char path[128];
    char text[FV_NPY_TEXT_BYTES];
    fv_npy_t array = {.type = FV_NPY_F4, .n_dims = 3, .n_bytes = n_bytes};
    union {
        const void *read_only;
        void *plain;
    } memory = {.read_only = data};

    array.shape[0] = n_bytes / (heads * dim * sizeof(float));
    array.shape[1] = heads;
    array.shape[2] = dim;
    array.data = memory.plain;
    (void)snprintf(path, sizeof(path), "%s/%s", g_e2e.fovead.dir, name);
    assert_true(fv_npy_write(path, &array, text));
}

static void read_into(const char *name, void *data, size_t n_bytes)
{
    char path[128];
    char text[FV_NPY_TEXT_BYTES];
    fv_npy_t array;

    (void)snprintf(path, sizeof(path), "%s/%s", g_e2e.fovead.dir, name);
    if (!fv_npy_read(path, &array, text)) {
        fail_msg("%s", text);
    }
    assert_int_equal(array.n_bytes, n_bytes);
    memcpy(data, array.data, n_bytes);
    fv_npy_free(&array);
    (void)unlink(path);
}

/* Files in, files out, judged by the oracle; then the placement of the session that was kept. */
static void test_attend_and_placement(void **state)
{
    fv_e2e_t *e = *state;
    const char *dir = e->fovead.dir;
    fovea_model_spec_t spec = {.n_q_heads = 4,
                               .n_kv_heads = 2,
                               .head_dim_qk = 32,
                               .head_dim_v = 48,
                               .kv_dtype = FOVEA_DTYPE_F32};
    fovea_session_id_t nobody = {{0}};
    uint32_t n_tokens = 37;
    char words[512];
    char session[64];
    fv_mirror_t m;
    fv_mirror_t *all = &m;
    fv_exam_t exam;

    fv_mirror_init(&m, &spec, &nobody, 0, 64);
    fv_exam_init(&exam, &all, &n_tokens, 1, FOVEA_DTYPE_F32, 0, &e->random);
    write_tensor("q.npy", exam.q, exam.request.q_bytes, 4, 32);
    write_tensor("k.npy", exam.k, exam.request.k_bytes, 2, 32);
    write_tensor("v.npy", exam.v, exam.request.v_bytes, 2, 48);
    (void)snprintf(
        words, sizeof(words),
        "attend -q %s/q.npy -k %s/k.npy -v %s/v.npy --out %s/o.npy --lse %s/l.npy --keep", dir, dir,
        dir, dir, dir);
    expect(0, words);
    take_line(session); /* stdout and stderr share the pipe: find the id by its length */
    for (char *line = strtok(g_output, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        if (strlen(line) == 32) {
            (void)snprintf(session, sizeof(session), "%s", line);
        }
    }
    read_into("o.npy", exam.out, exam.request.out_bytes);
    read_into("l.npy", exam.lse, exam.request.lse_bytes);
    assert_int_equal(fv_exam_check(&exam), 0);

    memset(exam.out, 0xFF,
           exam.request.out_bytes); /* the same tokens once more, only asked about */
    (void)snprintf(words, sizeof(words),
                   "attend --session %s -q %s/q.npy --head-dim-v 48 --out %s/o.npy", session, dir,
                   dir);
    expect(0, words);
    read_into("o.npy", exam.out, exam.request.out_bytes);
    assert_int_equal(fv_exam_check(&exam), 0);

    (void)snprintf(words, sizeof(words), "placement %s", session);
    expect(0, words);
    says("37 tokens");
    says("KV heads |");
    says("r0");
    (void)snprintf(words, sizeof(words), "placement --json %s", session);
    expect(0, words);
    assert_true(json_number(NULL, "n_tokens") == 37.0);
    (void)snprintf(words, sizeof(words), "close %s", session);
    expect(0, words);

    (void)snprintf(
        words, sizeof(words),
        "attend -q %s/q.npy -k %s/k.npy -v %s/v.npy --out %s/o.npy --keep --layers 4 --s2 "
        "block=16,local=1,stride=4 --s2-layers even",
        dir, dir, dir, dir);
    expect(0, words);
    take_line(session);
    for (char *line = strtok(g_output, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        if (strlen(line) == 32) {
            (void)snprintf(session, sizeof(session), "%s", line);
        }
    }
    (void)snprintf(words, sizeof(words), "placement %s --svg %s/p.svg", session, dir);
    expect(0, words);
    says("S2: blocks of 16, 1 local, every 4.");
    says("in 2 layers: 0 2");
    says("3 blocks of 16 tokens");
    says("0         |#.#|"); /* head 0 reads every 4th, and its own */
    says("1         |..#|"); /* head 1 the one before each */
    (void)snprintf(words, sizeof(words), "%s/p.svg", dir);
    assert_int_equal(unlink(words), 0);
    (void)snprintf(words, sizeof(words), "close %s", session);
    expect(0, words);
    expect(2, "models register --layers 4 --s2 block=16,wrong=1");
    says("--s2: given \"wrong\"");
    expect(2, "models register --layers 4 --s2 s2-8 --s2-layers 4");
    says("--s2-layers");

    write_tensor("v.npy", exam.k, exam.request.k_bytes / 37, 2, 32); /* one token only */
    (void)snprintf(words, sizeof(words), "attend -q %s/q.npy -k %s/k.npy -v %s/v.npy", dir, dir,
                   dir);
    expect(1, words);
    says("INVALID_ARGUMENT: v");
    (void)snprintf(words, sizeof(words), "%s/q.npy", dir);
    (void)unlink(words);
    (void)snprintf(words, sizeof(words), "%s/k.npy", dir);
    (void)unlink(words);
    (void)snprintf(words, sizeof(words), "%s/v.npy", dir);
    (void)unlink(words);
    fv_exam_fini(&exam);
    fv_mirror_fini(&m);
}

static void test_bench(void **state)
{
    fv_e2e_t *e = *state;
    fovea_session_list_t list = {0};
    fovea_error_t error = {FOVEA_OK, ""};

    expect(0, "bench --q-heads 4 --kv-heads 2 --head-dim 32 --context 100 --batch 2 --in-flight 3 "
              "--duration 0.3 --json");
    assert_true(json_number(NULL, "n_requests") > 0.0);
    assert_true(json_number(NULL, "p50_us") <= json_number(NULL, "p99_us"));
    expect(0, "bench --q-heads 4 --kv-heads 2 --head-dim 32 --context 64 --duration 0.2 "
              "--query-only --own-context --dtype f32");
    says("tokens/s");
    fv_assert_ok(fovea_list_sessions(e->client, NULL, 0, &list, &error), error);
    assert_int_equal(list.n_total, 0); /* it tidies up */
    fovea_session_list_free(&list);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_help_and_usage),
        cmocka_unit_test(test_service_errors),
        cmocka_unit_test(test_status),
        cmocka_unit_test(test_life_of_a_session),
        cmocka_unit_test(test_attend_and_placement),
        cmocka_unit_test(test_bench),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
