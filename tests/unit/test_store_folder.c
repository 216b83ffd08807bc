/*
 * test_store_folder.c - a store's folder: whose it is, and what of it may be deleted.
 *
 * Goal:   nothing that a process uses is deleted, nor what may be used; nothing of another user's making is followed.
 * Method: real files below a folder of the test's own; journals are locked as services lock them.
 */
#include "common/store.h"
#include "tests/support/test.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static char g_dir[64];
static fv_store_place_t g_place;

static int make_folder(void **state)
{
    (void)state;
    (void)snprintf(g_dir, sizeof(g_dir), "/tmp/fv_folder_XXXXXX");
    return ((mkdtemp(g_dir) != NULL) &&
            (fv_store_place_make(g_dir, "unit", 0, 2, &g_place) == FV_OK) &&
            (fv_store_prepare(&g_place) == FV_OK))
               ? 0
               : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    fv_store_leave(&g_place); /* fails if anything is left */
    return (access(g_dir, F_OK) != 0) ? 0 : -1;
}

static void path_of(fv_store_file_t file, uint32_t slot, char out[FV_STORE_PATH_BYTES])
{
    fv_store_place_t place = g_place;

    place.slot = slot;
    fv_store_path(&place, file, out);
}

static void make_file(fv_store_file_t file, uint32_t slot)
{
    char path[FV_STORE_PATH_BYTES];

    path_of(file, slot, path);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_int_equal(fputs("x", f) >= 0, 1);
    assert_int_equal(fclose(f), 0);
}

static bool has_file(fv_store_file_t file, uint32_t slot)
{
    char path[FV_STORE_PATH_BYTES];

    path_of(file, slot, path);
    return access(path, F_OK) == 0;
}

static fv_journal_t *lock(uint32_t slot)
{
    const fv_journal_head_t head = {.kind = "worker", .job = "unit", .slot = slot, .n_slots = 2};
    char path[FV_STORE_PATH_BYTES];
    fv_journal_t *journal = NULL;
    bool is_new = false;

    path_of(FV_STORE_TABLES, slot, path);
    assert_int_equal(fv_journal_open(path, &head, 0, &journal, &is_new), FV_OK);
    return journal;
}

/* Pages have no lock of their own: their slot's journal decides. */
static void test_pages_in_use_stay(void **state)
{
    char path[FV_STORE_PATH_BYTES];

    (void)state;
    fv_journal_t *journal = lock(1);
    make_file(FV_STORE_PAGES, 1);
    make_file(FV_STORE_PAGES, 0); /* whose journal is gone */
    fv_store_clear(&g_place);
    assert_true(has_file(FV_STORE_PAGES, 1));
    assert_true(has_file(FV_STORE_TABLES, 1));
    assert_false(has_file(FV_STORE_PAGES, 0));
    assert_false(has_file(FV_STORE_TABLES, 0)); /* that the lock made */
    path_of(FV_STORE_PAGES, 1, path);
    assert_int_equal(fv_store_delete_file(path), FV_ERR_PRECONDITION);
    assert_int_equal(fv_store_delete(g_place.dir), FV_ERR_PRECONDITION);
    assert_true(has_file(FV_STORE_PAGES, 1));
    fv_journal_close(journal);
    fv_store_clear(&g_place);
    assert_false(has_file(FV_STORE_PAGES, 1));
    assert_false(has_file(FV_STORE_TABLES, 1));
}

/* No descriptor is left: whether somebody uses it is not known. */
static void test_what_cannot_be_looked_at_stays(void **state)
{
    struct rlimit before;
    char path[FV_STORE_PATH_BYTES];

    (void)state;
    make_file(FV_STORE_TABLES, 0);
    path_of(FV_STORE_TABLES, 0, path);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    const struct rlimit none = {.rlim_cur = 0, .rlim_max = before.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
    bool is_used = fv_store_is_used(g_place.dir);
    fv_status_t status = fv_store_delete_file(path);
    fv_store_clear(&g_place);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_true(is_used);
    assert_int_equal(status, FV_ERR_PRECONDITION);
    assert_true(has_file(FV_STORE_TABLES, 0));
    fv_store_clear(&g_place);
    assert_false(has_file(FV_STORE_TABLES, 0));
}

/* A FIFO blocks whoever opens it to read; nobody who has locked it is known. */
static void test_a_fifo_is_left_alone(void **state)
{
    char path[FV_STORE_PATH_BYTES];
    fv_journal_head_t head;
    fv_journal_report_t report;
    bool is_locked = false;

    (void)state;
    path_of(FV_STORE_TABLES, 0, path);
    assert_int_equal(mkfifo(path, 0600), 0);
    (void)alarm(20); /* instead of waiting for ever */
    assert_true(fv_store_is_used(g_place.dir));
    assert_int_not_equal(fv_store_delete(g_place.dir), FV_OK);
    assert_int_not_equal(fv_journal_inspect(path, NULL, NULL, &head, &report, &is_locked), FV_OK);
    (void)alarm(0);
    assert_int_equal(unlink(path), 0);
}

/* Somebody else was there first. */
static void test_a_folder_of_others_is_refused(void **state)
{
    char link[96];
    char job[FV_STORE_DIR_BYTES];
    fv_store_place_t place;

    (void)state;
    (void)snprintf(link, sizeof(link), "%s.link", g_dir);
    assert_int_equal(symlink(g_dir, link), 0);
    assert_int_equal(fv_store_place_make(link, "unit", 0, 1, &place), FV_OK);
    assert_int_equal(fv_store_prepare(&place), FV_ERR_PERMISSION);
    assert_int_equal(unlink(link), 0);

    assert_int_equal(fv_store_place_make(g_dir, "other", 0, 1, &place), FV_OK);
    (void)snprintf(job, sizeof(job), "%s/other", g_dir);
    assert_int_equal(symlink(g_place.dir, job), 0);
    assert_int_equal(fv_store_prepare(&place), FV_ERR_PERMISSION);
    assert_int_equal(unlink(job), 0);
    assert_int_equal(mkdir(job, 0700), 0);
    assert_int_equal(chmod(job, 0777), 0);
    assert_int_equal(fv_store_prepare(&place), FV_ERR_PERMISSION);
    assert_int_equal(rmdir(job), 0);
}

/* Of a segment's end alone, before anything else of it has memory. */
static void test_an_end_is_allocated_alone(void **state)
{
    const size_t n = (size_t)64 << 20;
    const size_t n_tail = (size_t)3 << 20;
    char path[FV_STORE_PATH_BYTES];
    fv_segment_t *segment = NULL;
    struct stat info;
    bool is_new = false;

    (void)state;
    path_of(FV_STORE_PAGES, 0, path);
    assert_int_equal(fv_segment_open(path, n, 0, &segment, &is_new), FV_OK);
    assert_int_equal(stat(path, &info), 0);
    assert_true((size_t)info.st_blocks * 512U < n_tail);
    assert_int_equal(fv_segment_ensure_range(segment, n - n_tail, n), FV_OK);
    assert_int_equal(stat(path, &info), 0);
    assert_in_range((size_t)info.st_blocks * 512U, n_tail, 2U * n_tail);
    assert_int_equal(fv_segment_ensure_range(segment, n, n + n_tail),
                     FV_OK); /* behind it: nothing */
    fv_segment_base(segment)[n - 1U] = 1;
    fv_segment_remove(segment);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_an_end_is_allocated_alone),
        cmocka_unit_test(test_pages_in_use_stay),
        cmocka_unit_test(test_what_cannot_be_looked_at_stays),
        cmocka_unit_test(test_a_fifo_is_left_alone),
        cmocka_unit_test(test_a_folder_of_others_is_refused),
    };

    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
