/*
 * test_token.c - lines of a token file, whole files, and that no error repeats what may be a secret.
 */
#include "common/token.h"
#include "tests/property/prop_wire_random.h"
#include "tests/support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define HEX      "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08" /* of "test" */
#define N_RANDOM 500

static char g_path[] = "/tmp/fv_test_token_XXXXXX";

static void write_file(const char *text, mode_t mode)
{
    FILE *file = fopen(g_path, "w");

    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
    assert_int_equal(chmod(g_path, mode), 0);
}

static void test_sha256(void **state)
{
    uint8_t sha256[FV_SHA256_BYTES];
    char hex[(2 * FV_SHA256_BYTES) + 1];

    (void)state;
    assert_int_equal(fv_sha256("test", 4, sha256), FV_OK);
    fv_hex_format(sha256, sizeof(sha256), hex);
    assert_string_equal(hex, HEX);
    assert_int_equal(fv_sha256("", 0, sha256), FV_OK);
    fv_hex_format(sha256, 4, hex);
    assert_string_equal(hex, "e3b0c442");
    assert_true(fv_hex_parse("E3b0C442", 4, sha256));
    assert_false(fv_hex_parse("e3b0c44", 4, sha256));
    assert_false(fv_hex_parse("e3b0c44g", 4, sha256));
    assert_true(fv_secret_equal("ab", "ab", 2));
    assert_false(fv_secret_equal("ab", "ac", 2));
}

static void test_a_whole_line(void **state)
{
    fv_token_line_t line;

    (void)state;
    assert_int_equal(fv_token_line_parse(" a.b_c@d-9\tadmin  kv_bytes=16g sha256=" HEX
                                         " expires=2027-02-03T04:05:06Z sessions=7 requests=64 "
                                         "bytes_per_second=500m \r",
                                         &line),
                     FV_OK);
    assert_string_equal(line.name, "a.b_c@d-9");
    assert_int_equal(line.role, FV_ROLE_ADMIN);
    assert_int_equal(line.sha256[0], 0x9f);
    assert_int_equal(line.sha256[31], 0x08);
    assert_int_equal(line.expires_s, 1801627506);
    assert_int_equal(line.quota.sessions, 7);
    assert_int_equal(line.quota.kv_bytes, (uint64_t)16 << 30U);
    assert_int_equal(line.quota.requests, 64);
    assert_int_equal(line.quota.bytes_per_second, (uint64_t)500 << 20U);
    assert_int_equal(fv_token_line_parse("x user sha256=" HEX, &line), FV_OK);
    assert_int_equal(line.role, FV_ROLE_USER);
    assert_true(line.expires_s == FV_TOKEN_NEVER);
    assert_int_equal(line.quota.sessions, 0);
}

static void test_times(void **state)
{
    static const char *const k_bad[] = {"2027-02-29",
                                        "2027-13-01",
                                        "2027-00-01",
                                        "27-01-01",
                                        "2027-1-1",
                                        "2027-01-01T24:00:00Z",
                                        "2027-01-01T00:00:00",
                                        "2027-01-01 ",
                                        "2027-01-01T00:00:00Zx",
                                        "never",
                                        ""};
    int64_t unix_s = 0;

    (void)state;
    assert_int_equal(fv_token_time_parse("1970-01-01", &unix_s), FV_OK);
    assert_int_equal(unix_s, 0);
    assert_int_equal(fv_token_time_parse("2028-02-29T23:59:59Z", &unix_s), FV_OK);
    assert_int_equal(unix_s, 1835481599);
    for (size_t i = 0; i < FV_COUNT(k_bad); i++) {
        if (fv_token_time_parse(k_bad[i], &unix_s) != FV_ERR_INVALID_ARG) {
            fail_msg("\"%s\" was not refused", k_bad[i]);
        }
    }
}

static void test_bad_lines_are_refused_without_repeating_them(void **state)
{
    static const char *const k_bad[] = {
        "",
        "alice",
        "alice user",
        "alice root sha256=" HEX,
        "al/ice user sha256=" HEX,
        "anonymous user sha256=" HEX,
        "fv_SECRET user sha256=" HEX,
        "alice user sha256=SECRET",
        "alice user sha256=" HEX "00",
        "alice user SECRET",
        "alice user sha256=" HEX " SECRET",
        "alice user sha256=" HEX " token=SECRET",
        "alice user sha256=" HEX " sessions=",
        "alice user sha256=" HEX " sessions=0",
        "alice user sha256=" HEX " sessions=1k",
        "alice user sha256=" HEX " sessions=-1",
        "alice user sha256=" HEX " kv_bytes=16x",
        "alice user sha256=" HEX " kv_bytes=0",
        "alice user sha256=" HEX " kv_bytes=9999999t",
        "alice user sha256=" HEX " expires=tomorrow",
        "a234567890123456789012345678901234567890123456789012345678901234 user sha256=" HEX};
    fv_token_line_t line;

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_bad); i++) {
        if (fv_token_line_parse(k_bad[i], &line) != FV_ERR_INVALID_ARG) {
            fail_msg("\"%s\" was not refused", k_bad[i]);
        }
        assert_null(strstr(fv_error_context(), "SECRET"));
        assert_null(strstr(fv_error_context(), HEX));
    }
}

static void test_what_is_written_reads_back(void **state)
{
    static const char k_letters[] = "abcXYZ019._@-";
    fv_random_t r = fv_random_begin("test_token");
    char text[FV_TOKEN_LINE_BYTES];

    (void)state;
    for (int i = 0; i < N_RANDOM; i++) {
        fv_token_line_t line = {.role = (fv_role_t)fv_random_below(&r, 2)};
        fv_token_line_t back = {0};
        uint64_t n = 1U + fv_random_below(&r, FV_TOKEN_NAME_BYTES - 1);
        for (uint64_t j = 0; j < n; j++) {
            line.name[j] = k_letters[fv_random_below(&r, sizeof(k_letters) - 1U)];
        }
        for (size_t j = 0; j < FV_SHA256_BYTES; j++) {
            line.sha256[j] = (uint8_t)fv_random_below(&r, 256);
        }
        line.expires_s =
            (i % 2 == 0) ? FV_TOKEN_NEVER : (int64_t)fv_random_below(&r, 253402300799ULL);
        line.quota =
            (fv_quota_t){.sessions = fv_random_below(&r, 3) * fv_random_below(&r, 1000),
                         .kv_bytes = fv_random_below(&r, 2) * (fv_random_wide(&r) >> 4U),
                         .requests = fv_random_below(&r, 2) * fv_random_below(&r, 1000),
                         .bytes_per_second = fv_random_below(&r, 2) * (fv_random_wide(&r) >> 4U),
                         .models = fv_random_below(&r, 2) * (fv_random_wide(&r) >> 4U)};
        fv_token_line_format(&line, text);
        assert_int_equal(fv_token_line_parse(text, &back), FV_OK);
        assert_string_equal(back.name, line.name);
        assert_memory_equal(back.sha256, line.sha256, FV_SHA256_BYTES);
        assert_memory_equal(&back.quota, &line.quota, sizeof(line.quota));
        assert_true((back.expires_s == line.expires_s) && (back.role == line.role));
    }
}

static void refuses_file(const char *text, const char *part)
{
    fv_token_line_t *lines = NULL;
    size_t n = 0;

    write_file(text, 0600);
    assert_int_equal(fv_token_file_load(g_path, &lines, &n), FV_ERR_INVALID_ARG);
    if (strstr(fv_error_context(), part) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", fv_error_context(), part);
    }
}

static void test_files(void **state)
{
    static char text[2 * FV_TOKEN_LINE_BYTES];
    fv_token_line_t *lines = NULL;
    size_t n = 0;

    (void)state;
    write_file("# a comment\n\n  \nbob user sha256=" HEX
               "\nalice user sha256=0086d081884c7d659a2feaa0"
               "c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 sessions=1",
               0644);
    assert_int_equal(fv_token_file_load(g_path, &lines, &n), FV_OK);
    assert_int_equal(n, 2);
    assert_string_equal(lines[0].name, "alice"); /* ascending hash */
    free(lines);
    write_file("", 0600);
    assert_int_equal(fv_token_file_load(g_path, &lines, &n), FV_OK);
    assert_int_equal(n, 0);
    free(lines);
    refuses_file("bob user sha256=" HEX "\nal user sha256=" HEX "\n", "the same token twice");
    refuses_file("bob user sha256=" HEX
                 "\nbob admin sha256=0086d081884c7d659a2feaa0c55ad015a3bf4f1b"
                 "2b0b822cd15d6c15b0f00a08\n",
                 "different roles");
    refuses_file("\nbob user\n", ":2: sha256");
    (void)snprintf(text, sizeof(text), "bob user sha256=" HEX "%*s\n", FV_TOKEN_LINE_BYTES, "");
    refuses_file(text, ":1: given a longer line");
    write_file("", 0602);
    assert_int_equal(fv_token_file_load(g_path, &lines, &n), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "given mode 602"));
    assert_int_equal(fv_token_file_load("/nowhere/tokens", &lines, &n), FV_ERR_NOT_FOUND);
    assert_int_equal(fv_token_file_load("/tmp", &lines, &n), FV_ERR_NOT_FOUND);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sha256),
        cmocka_unit_test(test_a_whole_line),
        cmocka_unit_test(test_times),
        cmocka_unit_test(test_bad_lines_are_refused_without_repeating_them),
        cmocka_unit_test(test_what_is_written_reads_back),
        cmocka_unit_test(test_files),
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
