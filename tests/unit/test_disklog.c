/*
 * test_disklog.c - a log on a disk says what was acknowledged, whatever was cut off or damaged.
 *
 * Goal:   a batch that did not get through never happened, at whatever byte or sector it ends; damage is noticed, and costs no
 *         record but those that it hits; snapshots take the place of what was before, or never were; a full disk is a status.
 * Method: a log of a few batches in the folder that the test runs in; its bytes are cut, flipped and zeroed, and read.
 */
#include "common/disklog.h"
#include "tests/support/journal_file.h"
#include "tests/support/test.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define N_BATCHES 6U
#define PAGE      FV_DISKLOG_PAGES
#define SECTOR    512U
#define LOG_BYTES ((size_t)2 << 20)

static char g_dir[64], g_path[96];
static uint8_t *g_log;  /* [LOG_BYTES], a whole file */
static size_t g_n_log;  /* its bytes */
static size_t g_n_used; /* up to the last that is not 0 */
static const fv_journal_head_t k_head = {.kind = "test",
                                         .job = "unit",
                                         .slot = 1,
                                         .n_slots = 3,
                                         .kv_bytes = 4096};

static int make_folder(void **state)
{
    (void)state;
    (void)snprintf(g_dir, sizeof(g_dir), "fv_disklog_XXXXXX");
    if (mkdtemp(g_dir) == NULL) {
        return -1;
    }
    (void)snprintf(g_path, sizeof(g_path), "%s/a.log", g_dir);
    g_log = malloc(LOG_BYTES);
    return (g_log == NULL) ? -1 : 0;
}

static int remove_folder(void **state)
{
    (void)state;
    (void)unlink(g_path);
    free(g_log);
    return rmdir(g_dir);
}

/* A record of a journal, as its bytes: of key 1 + i % 2, with i as its body. */
static size_t table_record(uint32_t i, uint32_t flags, uint8_t out[128])
{
    static fv_journal_t *journal;
    uint8_t body[48];
    char path[128];
    bool is_new = false;
    const fv_journal_record_t record = {.type = 3,
                                        .flags = flags,
                                        .key = 1U + i % 2U,
                                        .number = 1U + i / 2U,
                                        .body = body,
                                        .n_bytes = 40U + i % 8U};
    static uint8_t file[16384];

    memset(body, (int)i, sizeof(body));
    (void)snprintf(path, sizeof(path), "%s/t.journal", g_dir);
    assert_int_equal(fv_journal_open(path, &k_head, 0, &journal, &is_new), FV_OK);
    assert_int_equal(fv_journal_reserve(journal, 128), FV_OK);
    fv_journal_add(journal, &record, NULL, 0);
    assert_int_equal(fv_journal_commit(journal), FV_OK);
    (void)fv_read_file(path, file, sizeof(file));
    size_t n = (size_t)fv_journal_bytes(journal);
    fv_journal_remove(journal);
    memcpy(out, file + FV_JOURNAL_HEAD_BYTES, n);
    return n;
}

/* Batch i: a page of 300 bytes and more, and a table's record, both of key 1 + i % 2. */
static fv_status_t commit(fv_disklog_t *log, uint32_t i)
{
    uint8_t bytes[128];
    size_t n_page = 300U + 700U * (i % 3U);
    const fv_journal_record_t page = {
        .type = PAGE, .key = 1U + i % 2U, .number = i, .n_bytes = (uint32_t)n_page};
    size_t n = table_record(i, 0, bytes);

    FV_RETURN_IF_ERR(fv_disklog_reserve(log, n + n_page + 64U, n + n_page + 64U));
    memset(fv_disklog_begin(log, &page), (int)(0x40U + i), n_page);
    fv_disklog_end(log);
    return fv_disklog_commit(log, bytes, n);
}

static fv_disklog_t *open_log(bool *out_is_new)
{
    fv_disklog_t *log = NULL;

    assert_int_equal(fv_disklog_open(g_path, &k_head, 0, &log, out_is_new), FV_OK);
    return log;
}

static fv_disklog_t *make_log(uint32_t n)
{
    bool is_new = false;

    (void)unlink(g_path);
    fv_disklog_t *log = open_log(&is_new);
    assert_true(is_new);
    for (uint32_t i = 0; i < n; i++) {
        assert_int_equal(commit(log, i), FV_OK);
    }
    return log;
}

static void load_bytes(void)
{
    g_n_log = fv_read_file(g_path, g_log, LOG_BYTES);
    g_n_used = g_n_log;
    while ((g_n_used > 0) && (g_log[g_n_used - 1U] == 0U)) {
        g_n_used--;
    }
}

/* What a reader saw: bit i for batch i's. */
typedef struct seen {
    uint32_t pages, tables, damaged_pages, damaged_tables, suspects;
    uint32_t n_holes;
} seen_t;

static fv_status_t see_page(void *arg, const fv_journal_record_t *record)
{
    seen_t *seen = arg;

    if (record->body == NULL) {
        seen->damaged_pages |= 1U << record->key;
        return FV_OK;
    }
    for (uint32_t b = 0; b < record->n_bytes; b++) {
        assert_int_equal(((const uint8_t *)record->body)[b], 0x40U + record->number);
    }
    seen->pages |= 1U << record->number;
    return FV_OK;
}

static fv_status_t see_record(void *arg, const fv_journal_record_t *record)
{
    seen_t *seen = arg;
    uint32_t i = (uint32_t)(record->number - 1U) * 2U + record->key - 1U;

    if (record->body == NULL) {
        seen->damaged_tables |= 1U << record->key;
        return FV_OK;
    }
    assert_true(i < 32U);
    for (uint32_t b = 0; b < record->n_bytes; b++) {
        assert_int_equal(((const uint8_t *)record->body)[b], i);
    }
    seen->tables |= 1U << i;
    return FV_OK;
}

static fv_status_t see_table(void *arg, const void *records, size_t n_bytes)
{
    seen_t *seen = arg;
    fv_journal_report_t report;

    fv_status_t status = fv_journal_scan(records, n_bytes, see_record, arg, &report);
    seen->n_holes +=
        (uint32_t)report.n_holes + ((report.n_records + report.n_damaged == 0U) ? 1U : 0U);
    return status;
}

static fv_status_t see_suspect(void *arg, uint32_t key)
{
    seen_t *seen = arg;

    seen->suspects |= (key < 32U) ? (1U << key) : 0x80000000U;
    return FV_OK;
}

static seen_t read_bytes(const uint8_t *data, size_t n_bytes, fv_journal_report_t *out)
{
    seen_t seen = {0};
    const fv_disklog_reader_t reader = {
        .page = see_page, .table = see_table, .suspect = see_suspect, .arg = &seen};
    size_t end = 0;
    uint64_t n_batches = 0;

    assert_int_equal(fv_disklog_scan(data + FV_JOURNAL_HEAD_BYTES, n_bytes - FV_JOURNAL_HEAD_BYTES,
                                     &reader, out, &end, &n_batches),
                     FV_OK);
    assert_true(end <= n_bytes - FV_JOURNAL_HEAD_BYTES);
    return seen;
}

#define ALL(n) ((1U << (n)) - 1U)

static void test_comes_back_and_goes_on(void **state)
{
    fv_journal_report_t report;
    bool is_new = true;

    (void)state;
    fv_disklog_close(make_log(3));
    for (uint32_t i = 3; i < N_BATCHES; i++) { /* each by a process of its own */
        fv_disklog_t *log = open_log(&is_new);
        assert_false(is_new);
        assert_int_equal(commit(log, i), FV_OK);
        fv_disklog_close(log);
    }
    load_bytes();
    seen_t seen = read_bytes(g_log, g_n_log, &report);
    assert_int_equal(seen.pages, ALL(N_BATCHES));
    assert_int_equal(seen.tables, ALL(N_BATCHES));
    assert_int_equal(report.n_damaged + report.n_holes + report.tail_bytes, 0);
    assert_int_equal(report.n_records, 2U * N_BATCHES);
}

/* At whatever byte the file ends: the batches before are there, the last one never was. */
static void test_cut_at_every_byte_of_the_last_batch(void **state)
{
    fv_journal_report_t report;
    fv_disklog_t *log = make_log(N_BATCHES - 1U);
    size_t begin = FV_JOURNAL_HEAD_BYTES + (size_t)fv_disklog_bytes(log);

    (void)state;
    assert_int_equal(commit(log, N_BATCHES - 1U), FV_OK);
    size_t end = FV_JOURNAL_HEAD_BYTES + (size_t)fv_disklog_bytes(log);
    fv_disklog_close(log);
    load_bytes();
    for (size_t cut = begin; cut < end; cut++) {
        seen_t seen = read_bytes(g_log, cut, &report);
        assert_int_equal(seen.pages, ALL(N_BATCHES - 1U));
        assert_int_equal(seen.tables, ALL(N_BATCHES - 1U));
        assert_int_equal(report.n_holes + report.n_damaged, 0);
    }
    assert_int_equal(read_bytes(g_log, end, &report).tables, ALL(N_BATCHES));
}

/* Any of its sectors were not written: it never was. And what comes after a start follows it without a trace. */
static void test_sectors_of_the_last_batch_are_missing(void **state)
{
    static uint8_t bytes[LOG_BYTES];
    fv_journal_report_t report;
    fv_disklog_t *log = make_log(N_BATCHES - 1U);
    size_t begin = FV_JOURNAL_HEAD_BYTES + (size_t)fv_disklog_bytes(log);
    bool is_new = true;

    (void)state;
    assert_int_equal(commit(log, N_BATCHES - 1U), FV_OK);
    size_t end = FV_JOURNAL_HEAD_BYTES + (size_t)fv_disklog_bytes(log);
    fv_disklog_close(log);
    load_bytes();
    size_t first = begin / SECTOR;
    size_t n = (end - 1U) / SECTOR - first + 1U;
    assert_in_range(n, 2, 10);
    for (uint32_t missing = 1; missing < (1U << n); missing++) {
        memcpy(bytes, g_log, g_n_log);
        for (size_t i = 0; i < n; i++) {
            size_t at = (first + i) * SECTOR;
            size_t from = (at < begin) ? begin : at; /* what was there before stays */
            if ((missing & (1U << i)) != 0U) {
                memset(bytes + from, 0, at + SECTOR - from);
            }
        }
        seen_t seen = read_bytes(bytes, g_n_log, &report);
        assert_int_equal(seen.pages & ALL(N_BATCHES - 1U), ALL(N_BATCHES - 1U));
        assert_int_equal(seen.tables & ALL(N_BATCHES - 1U), ALL(N_BATCHES - 1U));
        assert_int_equal(seen.tables >> (N_BATCHES - 1U), seen.pages >> (N_BATCHES - 1U));
        assert_int_equal(report.n_holes, 0);
        fv_write_file(g_path, bytes, g_n_log);
        log = open_log(&is_new);
        assert_int_equal(commit(log, N_BATCHES - 1U), FV_OK);
        fv_disklog_close(log);
        static uint8_t again[LOG_BYTES];
        size_t n_again = fv_read_file(g_path, again, sizeof(again));
        seen = read_bytes(again, n_again, &report);
        assert_int_equal(seen.tables, ALL(N_BATCHES));
        assert_int_equal(report.n_holes + report.n_damaged + report.tail_bytes, 0);
    }
}

/*
 * Of a flipped bit one batch is the worse: all others are there, and it is known whose page or record is missing: by its key, or
 * by a hole, or by a gap in the records' numbers.
 */
static void test_every_bit_flipped(void **state)
{
    fv_journal_report_t report;

    (void)state;
    fv_disklog_close(make_log(N_BATCHES));
    load_bytes();
    g_n_log = g_n_used + SECTOR; /* the zeros behind it take time */
    for (size_t bit = FV_JOURNAL_HEAD_BYTES * 8U; bit < g_n_used * 8U; bit += 7U) {
        g_log[bit / 8U] ^= (uint8_t)(1U << (bit % 8U));
        seen_t seen = read_bytes(g_log, g_n_log, &report);
        g_log[bit / 8U] ^= (uint8_t)(1U << (bit % 8U));
        uint32_t missing = ALL(N_BATCHES) & ~seen.pages;
        uint32_t untold = ALL(N_BATCHES) & ~seen.tables;
        assert_true((missing & (missing - 1U)) == 0U); /* one at most */
        assert_true((untold & (untold - 1U)) == 0U);
        assert_true((missing == 0U) || (untold == 0U));
        for (uint32_t i = 0; i < N_BATCHES; i++) {
            uint32_t key = 1U << (1U + i % 2U);
            assert_true(((missing & (1U << i)) == 0U) ||
                        (((seen.damaged_pages | seen.suspects) & key) != 0U));
            assert_true(((untold & (1U << i)) == 0U) || ((seen.damaged_tables & key) != 0U) ||
                        (seen.n_holes > 0U));
        }
        if ((missing | untold) != 0U) {
            assert_true(report.n_damaged + report.n_holes > 0U);
        }
    }
}

/* Of all that is in it: three tables' records. */
static fv_status_t snapshot(fv_disklog_t *log, bool is_fresh, bool is_ended)
{
    uint8_t bytes[128];

    if (is_fresh) {
        fv_disklog_want_fresh(log);
    }
    FV_RETURN_IF_ERR(fv_disklog_snapshot_begin(log));
    assert_int_equal(fv_disklog_is_fresh(log), is_fresh);
    for (uint32_t i = 10; i < 13; i++) {
        size_t n = table_record(i, 0, bytes);
        FV_RETURN_IF_ERR(fv_disklog_commit(log, bytes, n));
    }
    if (!is_ended) {
        fv_disklog_snapshot_abort(log);
        return FV_OK;
    }
    return fv_disklog_snapshot_end(log);
}

static void check_snapshot(bool is_fresh)
{
    fv_journal_report_t report;
    fv_disklog_t *log = make_log(4);
    uint64_t id = fv_disklog_id(log);
    bool is_new = true;

    assert_int_equal(snapshot(log, is_fresh, false), FV_OK); /* given up: it never was */
    assert_int_equal(commit(log, 4), FV_OK);
    load_bytes();
    assert_int_equal(read_bytes(g_log, g_n_log, &report).tables, ALL(5));
    assert_int_equal(snapshot(log, is_fresh, true), FV_OK);
    load_bytes();
    seen_t seen = read_bytes(g_log, g_n_log, &report);
    assert_int_equal(seen.tables, 7U << 10U); /* what was before is past */
    assert_int_equal(seen.pages, is_fresh ? 0U : ALL(5));
    assert_int_equal(commit(log, 5), FV_OK);
    fv_disklog_close(log);
    log = open_log(&is_new);
    assert_int_equal(fv_disklog_id(log), id);
    assert_int_equal(snapshot(log, is_fresh, false), FV_OK);
    fv_disklog_close(log);
    load_bytes();
    seen = read_bytes(g_log, g_n_log, &report);
    assert_int_equal(seen.tables, (7U << 10U) | (1U << 5U));
    assert_int_equal(report.n_holes + report.n_damaged + report.tail_bytes, 0);
}

static void test_a_snapshot_in_the_log(void **state)
{
    (void)state;
    check_snapshot(false);
}

static void test_a_snapshot_in_a_new_file(void **state)
{
    (void)state;
    check_snapshot(true);
}

/* The new file has its name, but nobody knows whether that lasts: nothing is acknowledged until the log is opened again. */
static void test_a_new_file_whose_name_may_not_last(void **state)
{
    fv_journal_report_t report;
    struct rlimit limit;
    bool is_new = true;
    fv_disklog_t *log = make_log(3);
    uint8_t bytes[128];
    size_t n = table_record(10, 0, bytes);

    (void)state;
    fv_disklog_want_fresh(log);
    assert_int_equal(fv_disklog_snapshot_begin(log), FV_OK);
    assert_int_equal(fv_disklog_commit(log, bytes, n), FV_OK);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
    const struct rlimit none = {.rlim_cur = 0, .rlim_max = limit.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0); /* the folder can not be opened */
    fv_status_t status = fv_disklog_snapshot_end(log);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
    assert_int_equal(status, FV_ERR_SYSTEM);
    assert_non_null(strstr(fv_error_context(), "folder"));
    fv_disklog_snapshot_abort(log);
    assert_int_equal(fv_disklog_commit(log, bytes, n), FV_ERR_SYSTEM);
    assert_non_null(strstr(fv_error_context(), "opened again"));
    fv_disklog_close(log);
    log = open_log(&is_new);
    assert_false(is_new);
    assert_int_equal(commit(log, 3), FV_OK);
    fv_disklog_close(log);
    load_bytes();
    assert_int_equal(read_bytes(g_log, g_n_log, &report).tables, (1U << 10U) | (1U << 3U));
    assert_int_equal(report.n_holes + report.n_damaged + report.tail_bytes, 0);
}

static void test_memory_is_no_disk(void **state)
{
    const char *path = "/dev/shm/fv_disklog_test.log";
    fv_disklog_t *log = NULL;
    bool is_new = false;

    (void)state;
    assert_int_equal(fv_disklog_open(path, &k_head, 0, &log, &is_new), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "disk_dir"));
    (void)unlink(path);
}

/* No file of this process may grow beyond 3 MiB: as if the file system ended there. */
static int fill_log(void)
{
    const struct rlimit limit = {.rlim_cur = 3U << 20U, .rlim_max = 3U << 20U};
    bool is_new = false;
    fv_disklog_t *log = make_log(1);
    uint32_t n = 1;

    if ((signal(SIGXFSZ, SIG_IGN) == SIG_ERR) || (setrlimit(RLIMIT_FSIZE, &limit) != 0)) {
        return 2;
    }
    fv_status_t status = FV_OK;
    while ((status == FV_OK) && (n < 100000U)) {
        status = fv_disklog_reserve(log, 64U << 10U, 64U << 10U);
        const fv_journal_record_t page = {
            .type = PAGE, .key = 1, .number = 0, .n_bytes = 60U << 10U};
        if (status == FV_OK) {
            memset(fv_disklog_begin(log, &page), 0x40, page.n_bytes);
            fv_disklog_end(log);
            status = fv_disklog_commit(log, NULL, 0);
            n++;
        }
    }
    bool is_right = (status == FV_ERR_EXHAUSTED) &&
                    (strstr(fv_error_context(), "bytes needed") != NULL) && (n > 10U);
    uint64_t n_bytes = fv_disklog_bytes(log);
    /* what was refused has changed nothing, and what little there is room for goes on */
    is_right = is_right && (commit(log, 1) == FV_OK);
    fv_disklog_close(log);
    log = open_log(&is_new);
    is_right = is_right && (fv_disklog_bytes(log) > n_bytes);
    fv_disklog_close(log);
    return is_right ? 0 : 1;
}

static void test_a_full_disk_is_a_status(void **state)
{
    int code = -1;
    pid_t pid = fork();

    (void)state;
    if (pid == 0) {
        _exit(fill_log());
    }
    assert_true(pid > 0);
    assert_int_equal(waitpid(pid, &code, 0), pid);
    assert_true(WIFEXITED(code));
    assert_int_equal(WEXITSTATUS(code), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_comes_back_and_goes_on),
        cmocka_unit_test(test_cut_at_every_byte_of_the_last_batch),
        cmocka_unit_test(test_sectors_of_the_last_batch_are_missing),
        cmocka_unit_test(test_every_bit_flipped),
        cmocka_unit_test(test_a_snapshot_in_the_log),
        cmocka_unit_test(test_a_snapshot_in_a_new_file),
        cmocka_unit_test(test_a_new_file_whose_name_may_not_last),
        cmocka_unit_test(test_memory_is_no_disk),
        cmocka_unit_test(test_a_full_disk_is_a_status),
    };

    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
