/*
 * test_auth.c - grants and their end, reloads, quotas: coord/auth.h without any door.
 */
#include "common/log.h"
#include "coord/auth.h"
#include "coord/reload.h"
#include "tests/support/test.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define SECOND_US 1000000

static char g_path[] = "/tmp/fv_test_auth_XXXXXX";

/* One token a line, "name role words"; the token of a line is "token-" and its number. */
static void write_tokens(const char *const *lines, size_t n)
{
    FILE *file = fopen(g_path, "w");

    assert_non_null(file);
    for (size_t i = 0; i < n; i++) {
        char token[32];
        char hex[(2 * FV_SHA256_BYTES) + 1];
        uint8_t sha256[FV_SHA256_BYTES];
        (void)snprintf(token, sizeof(token), "token-%zu", i);
        assert_int_equal(fv_sha256(token, strlen(token), sha256), FV_OK);
        fv_hex_format(sha256, sizeof(sha256), hex);
        assert_true(fprintf(file, "%s sha256=%s\n", lines[i], hex) > 0);
    }
    assert_int_equal(fclose(file), 0);
}

static fv_status_t check(fv_auth_t *auth, const char *header, fv_grant_t **out)
{
    return fv_auth_check(auth, header, (header == NULL) ? 0 : strlen(header), out);
}

static void refused(fv_auth_t *auth, const char *header, const char *part)
{
    fv_grant_t *grant = NULL;

    assert_int_equal(check(auth, header, &grant), FV_ERR_UNAUTHENTICATED);
    assert_null(grant);
    if (strstr(fv_error_context(), part) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", fv_error_context(), part);
    }
    assert_null(strstr(fv_error_context(), "token-"));
}

static void test_nobody_is_asked_without_a_file(void **state)
{
    fv_auth_t *auth = NULL;
    fv_grant_t *grant = NULL;

    (void)state;
    assert_int_equal(fv_auth_create("", &auth), FV_OK);
    assert_false(fv_auth_is_required(auth));
    assert_int_equal(check(auth, NULL, &grant), FV_OK);
    assert_string_equal(grant->principal->name, "anonymous");
    assert_true(fv_principal_is_admin(grant->principal));
    assert_int_equal(fv_auth_recheck(auth, grant), FV_OK);
    fv_grant_unref(grant);
    fv_auth_destroy(auth);
}

static void test_who_gets_in(void **state)
{
    static const char *const k_lines[] = {"alice user", "root admin",
                                          "late user expires=2020-01-01", "alice user"};
    fv_auth_t *auth = NULL;
    fv_grant_t *first = NULL;
    fv_grant_t *second = NULL;

    (void)state;
    write_tokens(k_lines, FV_COUNT(k_lines));
    assert_int_equal(fv_auth_create(g_path, &auth), FV_OK);
    assert_true(fv_auth_is_required(auth));
    assert_int_equal(check(auth, "Bearer token-0", &first), FV_OK);
    assert_int_equal(check(auth, "bearer token-3", &second), FV_OK);
    assert_ptr_equal(first->principal, second->principal); /* two tokens of one principal */
    assert_false(fv_principal_is_admin(first->principal));
    fv_grant_unref(second);
    assert_int_equal(check(auth, "Bearer token-1", &second), FV_OK);
    assert_true(fv_principal_is_admin(second->principal));
    assert_true(fv_principal_may_see(second->principal, first->principal));
    assert_true(fv_principal_may_see(first->principal, first->principal));
    assert_false(fv_principal_may_see(first->principal, second->principal));
    refused(auth, NULL, "given none");
    refused(auth, "", "another scheme");
    refused(auth, "Bearer ", "another scheme");
    refused(auth, "Basic token-0", "another scheme");
    refused(auth, "Bearer token-2", "expired");
    refused(auth, "Bearer token-9", "not known");
    refused(auth, "Bearer token-0 ", "not known");
    fv_grant_unref(first);
    fv_grant_unref(second);
    fv_auth_destroy(auth);
}

static void test_a_reload(void **state)
{
    static const char *const k_before[] = {"alice user sessions=1", "bob user"};
    static const char *const k_after[] = {"alice admin sessions=2"};
    static const char *const k_bad[] = {"alice nobody"};
    fv_auth_t *auth = NULL;
    fv_grant_t *alice = NULL;
    fv_grant_t *bob = NULL;
    fv_grant_t *again = NULL;

    (void)state;
    write_tokens(k_before, 2);
    assert_int_equal(fv_auth_create(g_path, &auth), FV_OK);
    assert_int_equal(check(auth, "Bearer token-0", &alice), FV_OK);
    assert_int_equal(check(auth, "Bearer token-1", &bob), FV_OK);
    write_tokens(k_bad, 1);
    fv_auth_reload(auth); /* the last good one stays */
    assert_int_equal(fv_auth_recheck(auth, bob), FV_OK);
    write_tokens(k_after, 1);
    fv_auth_reload(auth);
    assert_int_equal(fv_auth_recheck(auth, alice), FV_OK); /* its token is still there */
    assert_true(fv_principal_is_admin(alice->principal));
    assert_int_equal(alice->principal->sessions_max, 2);
    assert_int_equal(fv_auth_recheck(auth, bob), FV_ERR_UNAUTHENTICATED);
    refused(auth, "Bearer token-1", "not known");
    write_tokens(k_before, 2);
    fv_auth_reload(auth);
    assert_int_equal(check(auth, "Bearer token-1", &again), FV_OK);
    assert_ptr_equal(again->principal, bob->principal); /* its sessions are its own again */
    assert_int_equal(fv_auth_recheck(auth, bob), FV_ERR_UNAUTHENTICATED);
    fv_grant_unref(alice);
    fv_grant_unref(bob);
    fv_grant_unref(again);
    fv_auth_destroy(auth);
}

/* Another text of the same length, time and inode: nothing tells that the file has changed. */
static void rewrite_unseen(const char *line, const struct stat *before)
{
    const struct timespec times[2] = {before->st_atim, before->st_mtim};
    struct stat now;

    write_tokens(&line, 1);
    assert_int_equal(utimensat(AT_FDCWD, g_path, times, 0), 0);
    assert_int_equal(stat(g_path, &now), 0);
    assert_int_equal(now.st_size, before->st_size);
    assert_int_equal(now.st_ino, before->st_ino);
    assert_int_equal(now.st_mtim.tv_nsec, before->st_mtim.tv_nsec);
}

static void test_a_failed_reload_is_tried_again(void **state)
{
    static const char *const k_good[] = {"alice user"};
    static const char *const k_bad[] = {"alice nser requests=7"};
    fv_auth_t *auth = NULL;
    fv_grant_t *alice = NULL;
    struct stat bad;

    (void)state;
    write_tokens(k_good, 1);
    assert_int_equal(fv_auth_create(g_path, &auth), FV_OK);
    assert_int_equal(check(auth, "Bearer token-0", &alice), FV_OK);
    write_tokens(k_bad, 1);
    assert_int_equal(stat(g_path, &bad), 0);
    fv_auth_reload(auth); /* it cannot be read */
    rewrite_unseen("alice user requests=7", &bad);
    for (int i = 0; (i < 100) && (alice->principal->requests_max == 0); i++) {
        assert_int_equal(fv_auth_recheck(auth, alice), FV_OK);
        (void)nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
    }
    assert_int_equal(alice->principal->requests_max, 7);
    fv_grant_unref(alice);
    fv_auth_destroy(auth);
}

static void test_when_and_what_a_reload_tells(void **state)
{
    fv_reload_t r = {0};
    int64_t now_us = 1000;

    (void)state;
    assert_false(fv_reload_is_due(&r, INT64_MAX)); /* nothing has failed */
    assert_int_equal(fv_fail(FV_ERR_INVALID_ARG, "line 1"), FV_ERR_INVALID_ARG);
    assert_true(fv_reload_failed(&r, "file", true, now_us));
    for (int64_t wait_us = FV_RELOAD_FIRST_US; wait_us < FV_RELOAD_MAX_US; wait_us *= 2) {
        assert_false(fv_reload_is_due(&r, now_us + wait_us - 1));
        assert_true(fv_reload_is_due(&r, now_us + wait_us));
        assert_false(fv_reload_failed(&r, "file", false, now_us)); /* told already */
    }
    for (int i = 0; i < 100; i++) { /* never rarer than that */
        assert_false(fv_reload_is_due(&r, now_us + FV_RELOAD_MAX_US - 1));
        assert_true(fv_reload_is_due(&r, now_us + FV_RELOAD_MAX_US));
        assert_false(fv_reload_failed(&r, "file", false, now_us));
    }
    assert_int_equal(fv_fail(FV_ERR_INVALID_ARG, "line 2"), FV_ERR_INVALID_ARG);
    assert_true(fv_reload_failed(&r, "file", false, now_us)); /* something else */
    assert_true(fv_reload_failed(&r, "file", true, now_us));  /* a new file with the same fault */
    assert_true(fv_reload_is_due(&r, now_us + FV_RELOAD_FIRST_US));
    fv_reload_succeeded(&r);
    assert_false(fv_reload_is_due(&r, INT64_MAX));
    assert_true(fv_reload_failed(&r, "file", false, now_us));
}

static void test_requests_in_flight(void **state)
{
    fv_principal_t p = {.name = "p", .requests_max = 2};

    (void)state;
    assert_int_equal(fv_principal_begin_request(&p, 10, 1), FV_OK);
    assert_int_equal(fv_principal_begin_request(&p, 10, 1), FV_OK);
    assert_int_equal(fv_principal_check_request(&p, 1), FV_ERR_EXHAUSTED);
    assert_int_equal(fv_principal_begin_request(&p, 10, 1), FV_ERR_EXHAUSTED);
    assert_non_null(strstr(fv_error_context(), "quota of p: 2 requests in flight of 2"));
    fv_principal_end_request(&p);
    assert_int_equal(fv_principal_begin_request(&p, 10, 1), FV_OK);
    fv_principal_end_request(&p);
    fv_principal_end_request(&p);
    assert_int_equal(p.n_requests, 0);
}

static void test_bytes_a_second(void **state)
{
    fv_principal_t p = {.name = "p", .bytes_per_second = 1000};
    int64_t now_us = 5 * SECOND_US;

    (void)state;
    assert_int_equal(fv_principal_begin_request(&p, 1999, now_us), FV_OK);
    assert_int_equal(fv_principal_begin_request(&p, 3000, now_us), FV_OK); /* overdraws by 2999 */
    assert_int_equal(fv_principal_check_request(&p, now_us), FV_ERR_EXHAUSTED);
    assert_non_null(strstr(fv_error_context(), "try again in 3000 ms"));
    assert_int_equal(fv_principal_check_request(&p, now_us + 2 * SECOND_US), FV_ERR_EXHAUSTED);
    assert_int_equal(fv_principal_check_request(&p, now_us + 3 * SECOND_US), FV_OK);
    now_us += 1000LL * 86400 * SECOND_US; /* however long the silence, two seconds' worth */
    assert_int_equal(fv_principal_begin_request(&p, 2000, now_us), FV_OK);
    assert_int_equal(fv_principal_check_request(&p, now_us), FV_ERR_EXHAUSTED);
    atomic_store(&p.bytes_per_second, 0);
    assert_int_equal(fv_principal_check_request(&p, now_us), FV_OK);
}

/* What is tiny, or refused, is not for nothing; and refusals alone lock nobody out for long. */
static void test_refused_and_tiny_messages_cost(void **state)
{
    fv_principal_t p = {.name = "p", .bytes_per_second = 1024};
    int64_t now_us = 5 * SECOND_US;
    int n = 0;

    (void)state;
    while ((n < 1000) && (fv_principal_begin_request(&p, 0, now_us) == FV_OK)) {
        n++;
    }
    assert_int_equal(n, 2 * 1024 / FV_REQUEST_BYTES_MIN);
    now_us += 100 * SECOND_US;
    for (n = 0; (n < 1000) && (fv_principal_check_request(&p, now_us) == FV_OK); n++) {
        fv_principal_charge(&p, 1000, now_us);
    }
    assert_int_equal(n, 3);
    for (n = 0; n < 1000; n++) {
        fv_principal_charge(&p, 1U << 20U, now_us);
    }
    assert_int_equal(fv_principal_check_request(&p, now_us + 9 * SECOND_US), FV_ERR_EXHAUSTED);
    assert_int_equal(fv_principal_check_request(&p, now_us + 11 * SECOND_US), FV_OK);
    now_us += 1000 * SECOND_US;
    assert_int_equal(fv_principal_begin_request(&p, 102400, now_us), FV_OK);
    fv_principal_charge(&p, 1000, now_us); /* the debt of a served request is not forgiven */
    assert_int_equal(fv_principal_check_request(&p, now_us + 90 * SECOND_US), FV_ERR_EXHAUSTED);
    atomic_store(&p.bytes_per_second, 0);
    fv_principal_charge(&p, UINT64_MAX, now_us);
    assert_int_equal(fv_principal_check_request(&p, now_us), FV_OK);
}

static void test_sessions_and_kv(void **state)
{
    fv_principal_t p = {.name = "p", .sessions_max = 2, .n_sessions = 1, .kv_bytes_max = 100};

    (void)state;
    assert_int_equal(fv_principal_check_session(&p), FV_OK);
    p.n_sessions = 2;
    assert_int_equal(fv_principal_check_session(&p), FV_ERR_EXHAUSTED);
    p.kv_bytes = 60;
    p.kv_bytes_pending = 30;
    assert_int_equal(fv_principal_check_kv(&p, 10), FV_OK);
    assert_int_equal(fv_principal_check_kv(&p, 11), FV_ERR_EXHAUSTED);
    assert_non_null(strstr(fv_error_context(), "11 bytes of KV needed, 90 used of 100"));
    p.kv_bytes = 200; /* the quota was lowered meanwhile */
    assert_int_equal(fv_principal_check_kv(&p, 1), FV_ERR_EXHAUSTED);
    assert_int_equal(fv_principal_check_kv(&p, 0), FV_OK);
    assert_int_equal(fv_principal_check_kv(&p, UINT64_MAX), FV_ERR_EXHAUSTED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nobody_is_asked_without_a_file),
        cmocka_unit_test(test_who_gets_in),
        cmocka_unit_test(test_a_reload),
        cmocka_unit_test(test_a_failed_reload_is_tried_again),
        cmocka_unit_test(test_when_and_what_a_reload_tells),
        cmocka_unit_test(test_requests_in_flight),
        cmocka_unit_test(test_bytes_a_second),
        cmocka_unit_test(test_refused_and_tiny_messages_cost),
        cmocka_unit_test(test_sessions_and_kv),
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
