/*
 * test_journal.c - a journal says what was committed, whatever was cut off or damaged.
 *
 * Goal:   torn tails never happened; damage is noticed and costs no other record; a full file system is a status.
 * Method: a journal of a few records in a folder of its own; its file is cut at every byte and flipped at every bit.
 */
#include "common/journal.h"
#include "tests/support/test.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define N_RECORDS 6U

static char g_dir[64], g_path[96], g_copy[96];
static const fv_journal_head_t k_head = {.kind = "test",
                                         .job = "unit",
                                         .slot = 1,
                                         .n_slots = 3,
                                         .kv_bytes = 4096};

static int make_folder(void **state)
{
    (void)state;
    (void)snprintf(g_dir, sizeof(g_dir), "/tmp/fv_journal_XXXXXX");
    if (mkdtemp(g_dir) == NULL) {
        return -1;
    }
    (void)snprintf(g_path, sizeof(g_path), "%s/a.journal", g_dir);
    (void)snprintf(g_copy, sizeof(g_copy), "%s/b.journal", g_dir);
    return 0;
}

static int remove_folder(void **state)
{
    (void)state;
    (void)unlink(g_path);
    (void)unlink(g_copy);
    return rmdir(g_dir);
}

/* Record i: i + 1 bytes of its number, key i % 2. */
static void add(fv_journal_t *journal, uint32_t i)
{
    uint8_t body[64];
    const fv_journal_record_t record = {.type = 7,
                                        .key = i % 2U,
                                        .number = 1U + i / 2U,
                                        .flags = (i < 2U) ? FV_JOURNAL_FIRST : 0U,
                                        .body = body,
                                        .n_bytes = i + 1U};

    memset(body, (int)i, sizeof(body));
    assert_int_equal(fv_journal_reserve(journal, fv_journal_size(record.n_bytes)), FV_OK);
    fv_journal_add(journal, &record, NULL, 0);
}

static fv_journal_t *make_journal(uint32_t n)
{
    fv_journal_t *journal = NULL;
    bool is_new = false;

    (void)unlink(g_path);
    assert_int_equal(fv_journal_open(g_path, &k_head, 0, &journal, &is_new), FV_OK);
    assert_true(is_new);
    for (uint32_t i = 0; i < n; i++) {
        add(journal, i);
        assert_int_equal(fv_journal_commit(journal), FV_OK);
    }
    return journal;
}

/* What a reader saw: bit i for record i, whole; bits 16 and up: damaged. */
static fv_status_t see(void *arg, const fv_journal_record_t *record)
{
    uint32_t *seen = arg;
    uint32_t i = (uint32_t)(record->number - 1U) * 2U + record->key;

    if (i >= N_RECORDS) {
        *seen |= 0x80000000U; /* nobody wrote that */
        return FV_OK;
    }
    if (record->body == NULL) {
        *seen |= 0x10000U << i;
        return FV_OK;
    }
    for (uint32_t b = 0; b < record->n_bytes; b++) {
        assert_int_equal(((const uint8_t *)record->body)[b], i);
    }
    assert_int_equal(record->n_bytes, i + 1U);
    *seen |= 1U << i;
    return FV_OK;
}

static size_t read_file(const char *path, uint8_t *out, size_t cap)
{
    FILE *file = fopen(path, "rb");
    size_t n = 0;

    assert_non_null(file);
    n = fread(out, 1, cap, file);
    (void)fclose(file);
    return n;
}

static void write_file(const char *path, const uint8_t *data, size_t n)
{
    FILE *file = fopen(path, "wb");

    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, n, file), n);
    assert_int_equal(fclose(file), 0);
}

static void test_comes_back(void **state)
{
    fv_journal_t *journal = make_journal(N_RECORDS);
    fv_journal_report_t report;
    uint32_t seen = 0;
    bool is_new = true;

    (void)state;
    add(journal, 0); /* not committed: never happened */
    fv_journal_close(journal);
    assert_int_equal(fv_journal_open(g_path, &k_head, 0, &journal, &is_new), FV_OK);
    assert_false(is_new);
    assert_int_equal(fv_journal_read(journal, see, &seen, &report), FV_OK);
    assert_int_equal(seen, (1U << N_RECORDS) - 1U);
    assert_int_equal(report.n_records, N_RECORDS);
    assert_int_equal(report.n_damaged + report.n_holes + report.tail_bytes, 0);
    fv_journal_close(journal);
}

/* The writer died in the middle of its last write: the record is in the file, `committed` does not know of it. */
static void test_torn_tail_never_happened(void **state)
{
    static uint8_t before[16384], after[16384];
    fv_journal_t *journal = make_journal(N_RECORDS - 1U);
    size_t n_before = read_file(g_path, before, sizeof(before));

    (void)state;
    add(journal, N_RECORDS - 1U);
    assert_int_equal(fv_journal_commit(journal), FV_OK);
    fv_journal_close(journal);
    size_t n_after = read_file(g_path, after, sizeof(after));
    assert_true(n_after > n_before);
    memcpy(after, before, FV_JOURNAL_HEAD_BYTES); /* `committed` as it was */
    for (size_t n = n_before; n <= n_after; n++) {
        uint32_t seen = 0;
        fv_journal_report_t report;
        fv_journal_head_t head;
        bool is_locked = true;

        write_file(g_copy, after, n);
        assert_int_equal(fv_journal_inspect(g_copy, see, &seen, &head, &report, &is_locked), FV_OK);
        assert_false(is_locked);
        assert_int_equal(seen, (1U << (N_RECORDS - 1U)) - 1U);
        assert_int_equal(report.n_damaged + report.n_holes + report.tail_bytes, 0);
    }
    /* it goes on where it was cut */
    bool is_new = true;
    assert_int_equal(fv_journal_open(g_copy, &k_head, 0, &journal, &is_new), FV_OK);
    add(journal, N_RECORDS - 1U);
    assert_int_equal(fv_journal_commit(journal), FV_OK);
    uint32_t seen = 0;
    fv_journal_report_t report;
    assert_int_equal(fv_journal_read(journal, see, &seen, &report), FV_OK);
    assert_int_equal(seen, (1U << N_RECORDS) - 1U);
    fv_journal_close(journal);
}

/* Cut behind `committed`: the file lost what it had promised. */
static void test_lost_bytes_are_noticed(void **state)
{
    static uint8_t bytes[16384];

    (void)state;
    fv_journal_close(make_journal(N_RECORDS));
    size_t n_bytes = read_file(g_path, bytes, sizeof(bytes));
    for (size_t n = 0; n < n_bytes; n++) {
        fv_journal_report_t report;
        fv_journal_head_t head;
        bool is_locked = false;

        write_file(g_copy, bytes, n);
        assert_int_equal(fv_journal_inspect(g_copy, NULL, NULL, &head, &report, &is_locked),
                         FV_ERR_DATA_LOSS);
    }
}

static void test_every_flipped_bit_is_noticed(void **state)
{
    static uint8_t bytes[16384];
    uint32_t all = (1U << N_RECORDS) - 1U;

    (void)state;
    fv_journal_close(make_journal(N_RECORDS));
    size_t n_bytes = read_file(g_path, bytes, sizeof(bytes));
    for (size_t bit = 0; bit < n_bytes * 8U; bit++) {
        uint32_t seen = 0;
        fv_journal_report_t report = {0};
        fv_journal_head_t head;
        bool is_locked = false;
        bool is_unused = ((bit / 8U >= 128U) && (bit / 8U < 2048U)) ||
                         ((bit / 8U >= 2056U) && (bit / 8U < FV_JOURNAL_HEAD_BYTES));

        if (is_unused) {
            continue;
        }
        bytes[bit / 8U] ^= (uint8_t)(1U << (bit % 8U));
        write_file(g_copy, bytes, n_bytes);
        bytes[bit / 8U] ^= (uint8_t)(1U << (bit % 8U));
        fv_status_t status = fv_journal_inspect(g_copy, see, &seen, &head, &report, &is_locked);
        if (status != FV_OK) {
            assert_int_equal(status, FV_ERR_DATA_LOSS);
            continue;
        }
        /* nothing that nobody wrote; whatever is missing is told; at most one record has gone */
        assert_int_equal(seen & 0x80000000U, 0);
        assert_true((seen & all) == all
                        ? (bit / 8U < FV_JOURNAL_HEAD_BYTES) ||
                              (report.n_damaged + report.n_holes == 0U)
                        : (report.n_damaged + report.n_holes + report.tail_bytes > 0U));
        uint32_t missing = all & ~seen;
        assert_int_equal(missing & (missing - 1U), 0);
    }
}

static void test_two_processes_never_share_one(void **state)
{
    fv_journal_t *journal = make_journal(1);
    fv_journal_t *second = NULL;
    fv_journal_head_t head = k_head;
    bool is_new = false;

    (void)state;
    assert_int_equal(fv_journal_open(g_path, &k_head, 20, &second, &is_new), FV_ERR_PRECONDITION);
    assert_non_null(strstr(fv_error_context(), "in use"));
    fv_journal_close(journal);
    head.n_slots = 4;
    assert_int_equal(fv_journal_open(g_path, &head, 0, &second, &is_new), FV_ERR_PRECONDITION);
    assert_non_null(strstr(fv_error_context(), "rank 1 of 3, expected rank 1 of 4"));
    head = k_head;
    head.kv_bytes = 8192;
    assert_int_equal(fv_journal_open(g_path, &head, 0, &second, &is_new), FV_ERR_PRECONDITION);
    assert_non_null(strstr(fv_error_context(), "kv_memory"));
}

static void test_writing_anew(void **state)
{
    fv_journal_t *journal = make_journal(N_RECORDS);
    fv_journal_report_t report;
    uint32_t seen = 0;
    bool is_new = false;

    (void)state;
    assert_int_equal(fv_journal_rewrite_begin(journal), FV_OK);
    add(journal, 1);
    fv_journal_rewrite_abort(journal); /* the old one stays */
    assert_int_equal(fv_journal_read(journal, see, &seen, &report), FV_OK);
    assert_int_equal(seen, (1U << N_RECORDS) - 1U);
    assert_int_equal(fv_journal_rewrite_begin(journal), FV_OK);
    add(journal, 0);
    add(journal, 1);
    assert_int_equal(fv_journal_rewrite_end(journal), FV_OK);
    add(journal, 2);
    assert_int_equal(fv_journal_commit(journal), FV_OK);
    fv_journal_close(journal);
    assert_int_equal(fv_journal_open(g_path, &k_head, 0, &journal, &is_new), FV_OK);
    seen = 0;
    assert_int_equal(fv_journal_read(journal, see, &seen, &report), FV_OK);
    assert_int_equal(seen, 7);
    fv_journal_close(journal);
}

/* In a process of its own: the limit stays. */
static int fill_up(void)
{
    const struct rlimit limit = {.rlim_cur = 400000, .rlim_max = 400000};
    fv_journal_t *journal = make_journal(2);
    fv_journal_report_t report;
    uint32_t seen = 0;
    bool is_new = false;

    (void)signal(SIGXFSZ, SIG_IGN);
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) {
        return 2;
    }
    static uint8_t large[500000];
    const fv_journal_record_t record = {
        .type = 7, .key = 9, .number = 1, .body = large, .n_bytes = sizeof(large)};
    if (fv_journal_reserve(journal, fv_journal_size(sizeof(large))) == FV_OK) {
        fv_journal_add(journal, &record, NULL, 0);
        if (fv_journal_commit(journal) != FV_ERR_EXHAUSTED) {
            return 3;
        }
    }
    add(journal, 2); /* there is still room for this one */
    if (fv_journal_commit(journal) != FV_OK) {
        return 4;
    }
    fv_journal_close(journal);
    if (fv_journal_open(g_path, &k_head, 0, &journal, &is_new) != FV_OK) {
        return 5;
    }
    if ((fv_journal_read(journal, see, &seen, &report) != FV_OK) || (seen != 7U)) {
        return 6;
    }
    fv_journal_close(journal);
    return 0;
}

static void test_full_file_system_is_a_status(void **state)
{
    int code = 0;
    pid_t pid = fork();

    (void)state;
    if (pid == 0) {
        _exit(fill_up());
    }
    assert_true(pid > 0);
    assert_int_equal(waitpid(pid, &code, 0), pid);
    assert_true(WIFEXITED(code));
    assert_int_equal(WEXITSTATUS(code), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_comes_back),
        cmocka_unit_test(test_torn_tail_never_happened),
        cmocka_unit_test(test_lost_bytes_are_noticed),
        cmocka_unit_test(test_every_flipped_bit_is_noticed),
        cmocka_unit_test(test_two_processes_never_share_one),
        cmocka_unit_test(test_writing_anew),
        cmocka_unit_test(test_full_file_system_is_a_status),
    };

    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
