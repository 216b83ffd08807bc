/*
 * test_config.c - options: each source, their order, bad values, and the committed files that follow from them.
 *
 * FV_REGENERATE=1 writes deploy/config/fovea.conf and docs/configuration.md anew instead of comparing.
 */
#include "common/config.h"
#include "common/config_table.h"
#include "common/log.h"
#include "tests/property/prop_wire_random.h"
#include "tests/support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ARGS_MAX   24
#define FILE_MAX   65536
#define N_RANDOM   300
#define PATH_BYTES 512

static char g_path[] = "/tmp/fv_test_config_XXXXXX"; /* the file under --config */

static void write_file(const char *text)
{
    FILE *file = fopen(g_path, "w");

    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

/* fv_config_load() with arguments as one string, words separated by spaces. */
static fv_status_t load(const char *words, char *const *env, fv_config_t *out)
{
    char text[1024];
    char program[] = "fovead";
    char *argv[ARGS_MAX] = {program};
    int argc = 1;
    char *save = NULL;

    assert_true(strlen(words) < sizeof(text));
    (void)snprintf(text, sizeof(text), "%s", words);
    for (char *w = strtok_r(text, " ", &save); w != NULL; w = strtok_r(NULL, " ", &save)) {
        assert_true(argc < ARGS_MAX - 1);
        argv[argc++] = w;
    }
    return fv_config_load(argc, argv, env, out);
}

static fv_status_t load_with_file(const char *words, char *const *env, fv_config_t *out)
{
    char all[1024];

    assert_true(snprintf(all, sizeof(all), "--config %s %s", g_path, words) < (int)sizeof(all));
    return load(all, env, out);
}

static void assert_refused(fv_status_t status, fv_status_t expected, const char *part)
{
    assert_int_equal(status, expected);
    if (strstr(fv_error_context(), part) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", fv_error_context(), part);
    }
}

static void test_defaults(void **state)
{
    fv_config_t c;
    fv_log_level_t level;

    (void)state;
    assert_int_equal(load("", NULL, &c), FV_OK);
    assert_int_equal(c.action, FV_CONFIG_RUN);
    assert_int_equal(c.listen.n, 1);
    assert_string_equal(c.listen.text[0], "127.0.0.1:7411");
    assert_int_equal(c.kv_memory.percent, 90);
    assert_int_equal(c.threads, 0);
    assert_string_equal(c.backend, "auto");
    assert_string_equal(c.isa, "auto");
    assert_string_equal(c.exchange, "auto");
    assert_int_equal(c.exchange_memory, 256U << 20U);
    assert_string_equal(c.control_address, "auto");
    assert_false(c.dedicated_coordinator);
    assert_int_equal(c.shard_tokens, 2048);
    assert_int_equal(c.message_max, 256U << 20U);
    assert_int_equal(c.stream_inflight, 64);
    assert_int_equal(c.connection_streams, 1024);
    assert_int_equal(c.request_memory, 1U << 30U);
    assert_int_equal(c.grpc_memory, 512U << 20U);
    assert_int_equal(c.sessions_max, 100000);
    assert_int_equal(c.session_tokens_max, 1 << 24);
    assert_int_equal(c.session_idle_s, 0);
    assert_int_equal(c.batch_max, 4096);
    assert_int_equal(c.calls_max, 16384);
    assert_int_equal(c.health_calls_max, 256);
    assert_int_equal(c.first_message_ms, 60000);
    assert_int_equal(c.connections_max, 4096);
    assert_int_equal(c.metadata_max, 16384);
    assert_string_equal(c.tokens, "");
    assert_string_equal(c.tls_cert, "");
    assert_string_equal(c.unix_mode, "auto");
    assert_string_equal(c.unix_peers, "any");
    assert_false(c.insecure);
    assert_int_equal(c.step_tokens_max, 8192);
    assert_int_equal(c.prefill_tokens_per_step, 0);
    assert_int_equal(c.step_deadline_ms, 600000);
    assert_int_equal(c.heartbeat_ms, 200);
    assert_int_equal(c.heartbeat_misses, 5);
    assert_int_equal(c.start_deadline_ms, 300000);
    assert_int_equal(c.spares, 0);
    assert_true(c.respawn);
    assert_int_equal(c.repair_deadline_ms, 5000);
    assert_int_equal(c.drain_timeout_ms, 10000);
    assert_int_equal(fv_log_level_parse(c.log_level, &level), FV_OK);
    assert_int_equal(level, FV_LOG_INFO);
}

static void test_later_sources_win(void **state)
{
    char threads[] = "FV_THREADS=5";
    char shard[] = "FV_SHARD_TOKENS=128";
    char other[] = "FV_THREADSX=9";
    char *env[] = {other, threads, shard, NULL};
    fv_config_t c;

    (void)state;
    write_file("# comment\nthreads = 4\nshard_tokens=64 ; inline\n  sessions_max : 7\n");
    assert_int_equal(load_with_file("--threads 6", env, &c), FV_OK);
    assert_int_equal(c.threads, 6);
    assert_int_equal(c.shard_tokens, 128);
    assert_int_equal(c.sessions_max, 7);
    assert_int_equal(load_with_file("", env, &c), FV_OK);
    assert_int_equal(c.threads, 5);
    assert_int_equal(load_with_file("", NULL, &c), FV_OK);
    assert_int_equal(c.threads, 4);
    assert_int_equal(load("--threads=1 --threads=2", NULL, &c), FV_OK);
    assert_int_equal(c.threads, 2);
}

static void test_file_can_be_named_by_the_environment(void **state)
{
    char named[PATH_BYTES];
    char *env[] = {named, NULL};
    fv_config_t c;

    (void)state;
    write_file("threads = 4\n");
    assert_true(snprintf(named, sizeof(named), "FV_CONFIG=%s", g_path) < (int)sizeof(named));
    assert_int_equal(load("", env, &c), FV_OK);
    assert_int_equal(c.threads, 4);
    assert_refused(load("--config /nowhere/f", env, &c), FV_ERR_NOT_FOUND, "/nowhere/f");
    assert_refused(load("--config /tmp", env, &c), FV_ERR_NOT_FOUND, "/tmp");
}

static void test_a_list_is_replaced_by_a_later_source(void **state)
{
    char listen[] = "FV_LISTEN=e:1, unix:/e";
    char *env[] = {listen, NULL};
    fv_config_t c;

    (void)state;
    write_file("listen = f:1\nlisten = f:2,[::1]:3\n");
    assert_int_equal(load_with_file("", NULL, &c), FV_OK);
    assert_int_equal(c.listen.n, 3);
    assert_string_equal(c.listen.text[1], "f:2");
    assert_string_equal(c.listen.text[2], "[::1]:3");
    assert_int_equal(load_with_file("", env, &c), FV_OK);
    assert_int_equal(c.listen.n, 2);
    assert_string_equal(c.listen.text[1], "unix:/e");
    assert_int_equal(load_with_file("--listen c:1 --listen c:2", env, &c), FV_OK);
    assert_int_equal(c.listen.n, 2);
    assert_string_equal(c.listen.text[0], "c:1");
    assert_int_equal(load("--listen=1:1,2:1,3:1,4:1,5:1,6:1,7:1,8:1", NULL, &c), FV_OK);
    assert_int_equal(c.listen.n, 8);
    assert_refused(load("--listen=1:1,2:1,3:1,4:1,5:1,6:1,7:1,8:1,9:1", NULL, &c),
                   FV_ERR_INVALID_ARG, "at most 8");
}

static void test_values_of_each_type(void **state)
{
    fv_config_t c;

    (void)state;
    assert_int_equal(load("--kv-memory 3g", NULL, &c), FV_OK);
    assert_int_equal(c.kv_memory.percent, 0);
    assert_true(c.kv_memory.bytes == (uint64_t)3 << 30U);
    assert_int_equal(load("--kv-memory 100%", NULL, &c), FV_OK);
    assert_int_equal(c.kv_memory.percent, 100);
    assert_int_equal(load("--kv-memory 65536", NULL, &c), FV_OK);
    assert_int_equal(c.kv_memory.bytes, 65536);
    assert_int_equal(load("--kv-memory 2T", NULL, &c), FV_OK);
    assert_true(c.kv_memory.bytes == (uint64_t)2 << 40U);
    assert_int_equal(load("--message-max 100000k", NULL, &c), FV_OK);
    assert_int_equal(c.message_max, 102400000);
    assert_int_equal(load("--dedicated-coordinator", NULL, &c), FV_OK);
    assert_true(c.dedicated_coordinator);
    assert_int_equal(load("--dedicated-coordinator=off", NULL, &c), FV_OK);
    assert_false(c.dedicated_coordinator);
    assert_int_equal(load("--control-address 10.0.0.1:0 --backend null", NULL, &c), FV_OK);
    assert_string_equal(c.control_address, "10.0.0.1:0");
    assert_string_equal(c.backend, "null");
    assert_int_equal(load("--tokens /etc/fovea/tokens --unix-mode 660 --insecure", NULL, &c),
                     FV_OK);
    assert_string_equal(c.tokens, "/etc/fovea/tokens");
    assert_string_equal(c.unix_mode, "660");
    assert_true(c.insecure);
    assert_int_equal(load("--tokens=", NULL, &c), FV_OK);
    assert_string_equal(c.tokens, "");
}

static void test_bad_values_are_refused(void **state)
{
    static const char *const k_bad[] = {
        "--threads=-1",         "--threads=1025",    "--threads=",
        "--threads=1.5",        "--threads=0x10",    "--threads=99999999999999999999",
        "--shard-tokens=100",   "--shard-tokens=0",  "--kv-memory=0%",
        "--kv-memory=101%",     "--kv-memory=1kk",   "--kv-memory=12q",
        "--kv-memory=1",        "--kv-memory=-1",    "--kv-memory=16777217t",
        "--kv-memory=%",        "--message-max=2g",  "--message-max=50%",
        "--backend=gpux",       "--backend=aut",     "--backend=",
        "--isa=auto,amx",       "--log-level=INFO",  "--dedicated-coordinator=maybe",
        "--listen=host",        "--listen=:1",       "--listen=h:",
        "--listen=h:65536",     "--listen=h:1x",     "--listen=unix:",
        "--listen=::1:80",      "--listen=a:1,,b:1", "--listen=",
        "--control-address=me", "--sessions-max=+5", "--step-deadline-ms=5",
        "--unix-mode=777",      "--unix-peers=all",  "--tls-key=a;b",
    };
    fv_config_t c;

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_bad); i++) {
        if (load(k_bad[i], NULL, &c) != FV_ERR_INVALID_ARG) {
            fail_msg("%s was not refused", k_bad[i]);
        }
        assert_non_null(strstr(fv_error_context(), "command line"));
        assert_non_null(strstr(fv_error_context(), "expected"));
    }
}

static void test_errors_name_key_and_place(void **state)
{
    char memory[] = "FV_KV_MEMORY=lots";
    char *env[] = {memory, NULL};
    char place[PATH_BYTES];
    fv_config_t c;

    (void)state;
    assert_refused(load("", env, &c), FV_ERR_INVALID_ARG,
                   "kv_memory: given \"lots\" (environment variable FV_KV_MEMORY)");
    write_file("threads = 1\n\nthreads = many\nbad\n");
    (void)snprintf(place, sizeof(place), "threads: given \"many\" (%s:3)", g_path);
    assert_refused(load_with_file("", NULL, &c), FV_ERR_INVALID_ARG, place);
    write_file("threads = 1\nbad line\nthreads = many\n");
    assert_refused(load_with_file("", NULL, &c), FV_ERR_INVALID_ARG, ":2: expected key = value");
    write_file("thread = 1\n");
    assert_refused(load_with_file("", NULL, &c), FV_ERR_INVALID_ARG, ":1: given thread");
    write_file("threads = 1\n[ranks]\nthreads = 2\n");
    assert_refused(load_with_file("", NULL, &c), FV_ERR_INVALID_ARG, ":2: given a [section]");
    assert_refused(load("--no-such", NULL, &c), FV_ERR_INVALID_ARG, "--no-such");
    assert_refused(load("stray", NULL, &c), FV_ERR_INVALID_ARG, "stray");
    assert_refused(load("--threads", NULL, &c), FV_ERR_INVALID_ARG, "--threads");
}

static void test_a_long_line_is_refused(void **state)
{
    static char text[6000];
    fv_config_t c;

    (void)state;
    (void)snprintf(text, sizeof(text), "threads = 4%*s\nthreads = 5\n", 5900, "");
    write_file(text);
    assert_refused(load_with_file("", NULL, &c), FV_ERR_INVALID_ARG, ":1: given a longer line");
}

static char *printed(const fv_config_t *config, int which);

/* What the command line takes, a file takes too, and what is printed. */
static void test_the_longest_path_fits_in_a_file(void **state)
{
    static char text[1200];
    fv_config_t c;
    fv_config_t back;

    (void)state;
    (void)snprintf(text, sizeof(text), "tokens = /%0510d\n", 7);
    write_file(text);
    assert_int_equal(load_with_file("", NULL, &c), FV_OK);
    assert_int_equal(strlen(c.tokens), 511);
    char *again = printed(&c, 0);
    write_file(again);
    free(again);
    assert_int_equal(load_with_file("", NULL, &back), FV_OK);
    assert_string_equal(c.tokens, back.tokens);
    (void)snprintf(text, sizeof(text), "tokens = /%0511d\n", 7);
    write_file(text);
    assert_refused(load_with_file("", NULL, &c), FV_ERR_INVALID_ARG, "tokens");
    write_file("\xEF\xBB\xBFthreads: 3 ; three\n  # c\n ; c\nisa = avx2");
    assert_int_equal(load_with_file("", NULL, &c), FV_OK);
    assert_int_equal(c.threads, 3);
    assert_string_equal(c.isa, "avx2");
}

static void test_actions(void **state)
{
    fv_config_t c;

    (void)state;
    assert_int_equal(load("--print-config --threads 3", NULL, &c), FV_OK);
    assert_int_equal(c.action, FV_CONFIG_PRINT);
    assert_int_equal(c.threads, 3);
    assert_int_equal(load("--help", NULL, &c), FV_OK);
    assert_int_equal(c.action, FV_CONFIG_HELP);
    assert_int_equal(load("--version --config /nowhere", NULL, &c), FV_OK);
    assert_int_equal(c.action, FV_CONFIG_VERSION);
}

/* Runs a printer into memory; the caller frees. */
static char *printed(const fv_config_t *config, int which)
{
    char *text = NULL;
    size_t n = 0;
    FILE *stream = open_memstream(&text, &n);

    assert_non_null(stream);
    if (which == 0) {
        fv_config_print(config, stream);
    } else if (which == 1) {
        fv_config_print_markdown(stream);
    } else {
        fv_config_help("fovead", stream);
    }
    assert_int_equal(fclose(stream), 0);
    return text;
}

static void test_help_and_table_have_every_option(void **state)
{
    static const char *const k_actions[] = {"--config", "--print-config", "--help", "--version"};
    char *help = printed(NULL, 2);
    char *table = printed(NULL, 1);
    char name[64];

    (void)state;
    for (size_t i = 0; i < fv_n_options; i++) {
        fv_option_long_name(&fv_options[i], name, sizeof(name));
        assert_non_null(strstr(help, name));
        assert_non_null(strstr(table, name));
        fv_option_env_name(&fv_options[i], name, sizeof(name));
        assert_non_null(strstr(table, name));
    }
    for (size_t i = 0; i < FV_COUNT(k_actions); i++) {
        assert_non_null(strstr(help, k_actions[i]));
        assert_non_null(strstr(table, k_actions[i]));
    }
    free(help);
    free(table);
}

/* A random valid value of an option, as text. */
static void random_value(fv_random_t *r, const fv_option_t *o, char *out, size_t cap)
{
    uint64_t step = (o->multiple > 0) ? o->multiple : 1U;
    uint64_t value = o->min + (fv_random_wide(r) % (((o->max - o->min) / step) + 1U)) * step;
    size_t n_words = 1;
    const char *word = o->choices;

    switch (o->type) {
    case FV_OPTION_BOOL:
        (void)snprintf(out, cap, "%s", (value % 2U == 0) ? "yes" : "off");
        break;
    case FV_OPTION_CHOICE:
        for (const char *c = o->choices; *c != '\0'; c++) {
            n_words += (*c == ' ') ? 1U : 0U;
        }
        for (uint64_t skip = fv_random_below(r, n_words); skip > 0; skip--) {
            word = strchr(word, ' ') + 1;
        }
        (void)snprintf(out, cap, "%.*s", (int)strcspn(word, " "), word);
        break;
    case FV_OPTION_ADDRESS:
    case FV_OPTION_ADDRESSES:
        (void)snprintf(out, cap, "h%u:%u", (unsigned)fv_random_below(r, 1000),
                       (unsigned)fv_random_below(r, 65536));
        break;
    case FV_OPTION_PATH:
        (void)snprintf(out, cap, "%.*s", (int)fv_random_below(r, 20), "/etc/fovea/a-b_c.pem#x");
        break;
    case FV_OPTION_MEMORY:
        if (fv_random_below(r, 2) == 0) {
            (void)snprintf(out, cap, "%u%%", 1U + (unsigned)fv_random_below(r, 100));
            break;
        }
        (void)snprintf(out, cap, "%" PRIu64, value);
        break;
    case FV_OPTION_INT:
    case FV_OPTION_BYTES:
    default:
        (void)snprintf(out, cap, "%" PRIu64, value);
        break;
    }
}

static void test_what_is_printed_reads_back_to_the_same(void **state)
{
    fv_random_t r = fv_random_begin("test_config");
    fv_source_t source = {.kind = FV_SOURCE_FILE, .name = "random"};
    char value[64];
    fv_config_t c;
    fv_config_t back;

    (void)state;
    for (int i = 0; i < N_RANDOM; i++) {
        fv_config_defaults(&c);
        for (size_t j = 0; j < fv_n_options; j++) {
            random_value(&r, &fv_options[j], value, sizeof(value));
            assert_int_equal(fv_option_set(&fv_options[j], value, &source, &c), FV_OK);
        }
        char *text = printed(&c, 0);
        write_file(text);
        free(text);
        assert_int_equal(load_with_file("", NULL, &back), FV_OK);
        assert_memory_equal(&back, &c, sizeof(c));
    }
}

static void compare_with_tree(const char *relative, char *text)
{
    static char found[FILE_MAX];
    char path[PATH_BYTES];

    assert_true(snprintf(path, sizeof(path), "%s/%s", FV_SOURCE_DIR, relative) < (int)sizeof(path));
    bool is_write = getenv("FV_REGENERATE") != NULL; /* NOLINT(concurrency-mt-unsafe): one thread */
    FILE *file = fopen(path, is_write ? "w" : "r");
    if (file == NULL) {
        fail_msg("%s cannot be opened", path);
    }
    if (is_write) {
        assert_true(fputs(text, file) >= 0);
    } else {
        found[fread(found, 1, sizeof(found) - 1U, file)] = '\0';
        if (strcmp(found, text) != 0) {
            fail_msg("%s is out of date: run this test once with FV_REGENERATE=1", relative);
        }
    }
    assert_int_equal(fclose(file), 0);
    free(text);
}

static void test_committed_files_are_up_to_date(void **state)
{
    char words[PATH_BYTES];
    fv_config_t c;
    fv_config_t loaded;

    (void)state;
    fv_config_defaults(&c);
    compare_with_tree("deploy/config/fovea.conf", printed(&c, 0));
    compare_with_tree("docs/configuration.md", printed(&c, 1));
    (void)snprintf(words, sizeof(words), "--config %s/deploy/config/fovea.conf", FV_SOURCE_DIR);
    assert_int_equal(load(words, NULL, &loaded), FV_OK);
    loaded.listen.source = c.listen.source;
    assert_memory_equal(&loaded, &c, sizeof(c));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_later_sources_win),
        cmocka_unit_test(test_file_can_be_named_by_the_environment),
        cmocka_unit_test(test_a_list_is_replaced_by_a_later_source),
        cmocka_unit_test(test_values_of_each_type),
        cmocka_unit_test(test_bad_values_are_refused),
        cmocka_unit_test(test_errors_name_key_and_place),
        cmocka_unit_test(test_a_long_line_is_refused),
        cmocka_unit_test(test_the_longest_path_fits_in_a_file),
        cmocka_unit_test(test_actions),
        cmocka_unit_test(test_help_and_table_have_every_option),
        cmocka_unit_test(test_what_is_printed_reads_back_to_the_same),
        cmocka_unit_test(test_committed_files_are_up_to_date),
    };
    int fd = mkstemp(g_path);

    if (fd < 0) {
        return 1;
    }
    (void)close(fd);
    int n_failed = cmocka_run_group_tests(tests, NULL, NULL);
    (void)unlink(g_path);
    return n_failed;
}
