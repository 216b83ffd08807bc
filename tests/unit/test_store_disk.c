/*
 * test_store_disk.c - level host: a worker's sessions come back from a disk, with nothing left in memory.
 *
 * Goal:   the same bits, in place and from a device's mirror; also when the disk came later, or was away for a while; a damaged
 *         log gives the same bits or refuses a session, wherever snapshots lie in it;
 *         a step's records have room.
 * Method: as test_store.c; the files in memory are deleted before the worker that opens them again.
 */
#include "common/disklog_format.h"
#include "tests/support/journal_file.h"
#include "tests/support/store_life.h"
#include "tests/support/test.h"
#include "worker/store_disk.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

/* The rest of the tests' place, with a disk: the folder that tests run in is on one. */
static fv_store_place_t with_disk(char dir[64])
{
    fv_store_place_t place = fv_life_place;

    (void)snprintf(dir, 64, "fv_disk_XXXXXX");
    assert_non_null(mkdtemp(dir));
    assert_int_equal(fv_store_place_disk(&place, dir), FV_OK);
    return place;
}

/* What a host that was down has lost. */
static void wipe_memory(void)
{
    char path[FV_STORE_PATH_BYTES];

    fv_store_path(&fv_life_place, FV_STORE_PAGES, path);
    assert_int_equal(unlink(path), 0);
    fv_store_path(&fv_life_place, FV_STORE_TABLES, path);
    assert_int_equal(unlink(path), 0);
}

#define LOG_BYTES ((size_t)1 << 22)

typedef float answers_t[FV_LIFE_SESSIONS][FV_LIFE_LAYERS][FV_LIFE_HEADS * FV_LIFE_DIM];

static void query_all(fv_worker_t *worker, answers_t out)
{
    for (uint32_t s = 0; s < FV_LIFE_SESSIONS; s++) {
        fv_life_query(worker, s, out[s]);
    }
}

/* Opens what is there, keeps all of it, and compares. */
static fv_worker_t *come_back(answers_t before)
{
    static answers_t after;
    const fv_ctl_model_t model = fv_life_model();
    fv_worker_t *worker = fv_life_worker();

    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    for (uint32_t s = 0; s < FV_LIFE_SESSIONS; s++) {
        assert_int_equal(fv_life_keep(worker, s, 0), FV_OK);
    }
    assert_int_equal(fv_worker_keep_end(worker), FV_OK);
    query_all(worker, after);
    assert_memory_equal(after, before, sizeof(after));
    return worker;
}

static void check_outlives_its_host(void)
{
    static answers_t before;
    char dir[64];
    const fv_store_place_t memory = fv_life_place;
    const fv_ctl_close_t close2 = {.session_slot = 2};
    fv_ctl_open_t open4 = fv_life_open(4);

    fv_life_place = with_disk(dir);
    fv_worker_t *worker = fv_life_worker();
    fv_life_play(worker);
    query_all(worker, before);
    fv_worker_destroy(worker);
    for (int round = 0; round < 3; round++) { /* each time from what the one before has written */
        wipe_memory();
        fv_worker_destroy(come_back(before));
    }
    fv_worker_destroy(come_back(before)); /* from memory: goes on with the same log */
    worker = come_back(before);
    static float out[256 * FV_LIFE_HEADS * FV_LIFE_DIM];
    assert_int_equal(fv_worker_open(worker, &open4), FV_OK);
    fv_life_run(worker, 4, 0, 0, 100, true, out);
    assert_int_equal(fv_worker_close(worker, &close2), FV_OK);
    fv_life_run(worker, 1, 0, 80, 60, true, out); /* in pages that were another's */
    fv_life_query(worker, 0, before[0]);
    fv_life_run(worker, 1, 0, 139, 1, false, before[1][0]);
    fv_worker_destroy(worker);
    wipe_memory();
    worker = fv_life_worker();
    const fv_ctl_model_t model = fv_life_model();
    const uint64_t lengths1[FV_LIFE_LAYERS] = {140, 140};
    const uint64_t lengths4[FV_LIFE_LAYERS] = {100, 0};
    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    assert_int_equal(fv_life_keep(worker, 0, 0), FV_OK);
    assert_int_equal(fv_life_keep_lengths(worker, 1, lengths1), FV_OK);
    assert_int_equal(fv_life_keep(worker, 2, 0), FV_ERR_DATA_LOSS); /* was closed */
    assert_int_equal(fv_life_keep_lengths(worker, 4, lengths4), FV_OK);
    assert_int_equal(fv_worker_keep_end(worker), FV_OK);
    float after[FV_LIFE_LAYERS][FV_LIFE_HEADS * FV_LIFE_DIM];
    fv_life_query(worker, 0, after);
    assert_memory_equal(after, before[0], sizeof(after));
    fv_life_run(worker, 1, 0, 139, 1, false, after[0]);
    assert_memory_equal(after[0], before[1][0], sizeof(after[0]));
    fv_worker_discard_store(worker);
    fv_worker_destroy(worker);
    assert_int_equal(access(fv_life_place.disk_dir, F_OK), -1);
    fv_life_place = memory;
    (void)rmdir(dir);
}

static void test_outlives_its_host_in_place(void **state)
{
    (void)state;
    fv_life_ops = fv_backend_cpu;
    check_outlives_its_host();
}

static void test_outlives_its_host_from_a_mirror(void **state)
{
    (void)state;
    fv_life_ops = fv_backend_cpu;
    fv_life_ops.kv_home = FV_KV_DEVICE;
    check_outlives_its_host();
}

/* Files of level process get a disk, which has nothing yet: all pages go there before anything else. */
static void test_a_disk_comes_later(void **state)
{
    static answers_t before;
    char dir[64];
    const fv_store_place_t memory = fv_life_place;

    (void)state;
    fv_life_ops = fv_backend_cpu;
    fv_worker_t *worker = fv_life_worker();
    fv_life_play(worker);
    query_all(worker, before);
    fv_worker_destroy(worker);
    fv_life_place = with_disk(dir);
    fv_worker_destroy(come_back(before));
    wipe_memory();
    fv_worker_destroy(come_back(before));
    fv_store_place_t both = fv_life_place;
    fv_life_place = memory; /* and is not there for a while: what it has is older then */
    worker = come_back(before);
    static float out[256 * FV_LIFE_HEADS * FV_LIFE_DIM];
    fv_life_run(worker, 2, 0, 90, 8, true, out);
    const fv_ctl_truncate_t cut = {.session_slot = 2, .layer = 0, .position = 90};
    assert_int_equal(fv_worker_truncate(worker, &cut), FV_OK);
    fv_worker_destroy(worker);
    fv_life_place = both;
    fv_worker_destroy(come_back(before));
    wipe_memory();
    worker = come_back(before);
    fv_worker_discard_store(worker);
    fv_worker_destroy(worker);
    fv_life_place = memory;
    (void)rmdir(dir);
}

/* Whatever a damaged log still gives is right: the same bits, or the session is refused; and most are not. */
static void test_a_damaged_disk_never_changes_an_answer(void **state)
{
    static uint8_t log[1 << 22];
    static answers_t before;
    float after[FV_LIFE_LAYERS][FV_LIFE_HEADS * FV_LIFE_DIM];
    char dir[64];
    char path[FV_STORE_PATH_BYTES];
    const fv_ctl_model_t model = fv_life_model();
    const fv_store_place_t memory = fv_life_place;
    uint32_t n_kept = 0;
    uint32_t n_refused = 0;

    (void)state;
    fv_life_ops = fv_backend_cpu;
    fv_life_place = with_disk(dir);
    fv_worker_t *worker = fv_life_worker();
    fv_life_play(worker);
    query_all(worker, before);
    fv_worker_destroy(worker);
    fv_store_path(&fv_life_place, FV_STORE_LOG, path);
    size_t n_bytes = fv_read_file(path, log, sizeof(log));
    size_t n_used = n_bytes;
    while ((n_used > 0) && (log[n_used - 1U] == 0U)) {
        n_used--;
    }
    size_t step = (n_used - FV_JOURNAL_HEAD_BYTES) / 90U | 1U;
    for (size_t at = FV_JOURNAL_HEAD_BYTES; at < n_used; at += step) {
        wipe_memory();
        log[at] ^= (uint8_t)(1U << (at % 8U));
        fv_write_file(path, log, n_bytes);
        log[at] ^= (uint8_t)(1U << (at % 8U));
        bool is_kept[FV_LIFE_SESSIONS];
        worker = fv_life_worker();
        assert_int_equal(fv_worker_model(worker, &model), FV_OK);
        for (uint32_t s = 0; s < FV_LIFE_SESSIONS; s++) {
            is_kept[s] = fv_life_keep(worker, s, 0) == FV_OK;
            n_kept += is_kept[s] ? 1U : 0U;
            n_refused += is_kept[s] ? 0U : 1U;
        }
        assert_int_equal(fv_worker_keep_end(worker), FV_OK);
        for (uint32_t s = 0; s < FV_LIFE_SESSIONS; s++) {
            if (is_kept[s]) {
                fv_life_query(worker, s, after);
                assert_memory_equal(after, before[s], sizeof(after));
            }
        }
        fv_worker_destroy(worker);
    }
    print_message("%u kept, %u refused\n", n_kept, n_refused);
    assert_true(n_kept > n_refused / 2U);
    assert_true(n_refused > 0U);
    worker = fv_life_worker();
    fv_worker_discard_store(worker);
    fv_worker_destroy(worker);
    fv_life_place = memory;
    (void)rmdir(dir);
}

/* ------------------------------------------------------------------ damage before a snapshot */

#define DAMAGE_BODIES  0U /* of one batch after the other; their heads stay */
#define DAMAGE_BATCHES 1U /* one after the other, heads and all */

static const uint64_t k_grown[FV_LIFE_SESSIONS][FV_LIFE_LAYERS] = {{150, 203},
                                                                   {110, 140},
                                                                   {120, 40}};

static void query_grown(fv_worker_t *worker,
                        uint32_t slot,
                        float out[FV_LIFE_LAYERS][FV_LIFE_HEADS * FV_LIFE_DIM])
{
    for (uint32_t layer = 0; layer < FV_LIFE_LAYERS; layer++) {
        fv_life_run(worker, slot, layer, k_grown[slot][layer] - 1U, 1, false, out[layer]);
    }
}

static fv_worker_t *keep_grown(bool is_kept[FV_LIFE_SESSIONS])
{
    const fv_ctl_model_t model = fv_life_model();
    fv_worker_t *worker = fv_life_worker();

    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    for (uint32_t s = 0; s < FV_LIFE_SESSIONS; s++) {
        is_kept[s] = fv_life_keep_lengths(worker, s, k_grown[s]) == FV_OK;
    }
    assert_int_equal(fv_worker_keep_end(worker), FV_OK);
    return worker;
}

/* Sessions of a log that grow a token at a time, inside pages; a start then writes their tables anew behind all of it. */
static void make_grown(bool is_fresh, answers_t before)
{
    static float out[256 * FV_LIFE_HEADS * FV_LIFE_DIM];
    const fv_store_place_t disk = fv_life_place;
    bool is_kept[FV_LIFE_SESSIONS];

    fv_life_place.disk_dir[0] = is_fresh ? '\0' : disk.disk_dir[0];
    fv_worker_t *worker = fv_life_worker();
    fv_life_play(worker);
    if (is_fresh) { /* the log knows them from a snapshot alone */
        static answers_t answers;
        query_all(worker, answers);
        fv_worker_destroy(worker);
        fv_life_place = disk;
        worker = come_back(answers);
    }
    for (uint32_t i = 0; i < 30U; i++) {
        fv_life_run(worker, 2, 0, 90U + i, 1, true, out); /* had them before it was cut */
        fv_life_run(worker, 1, 0, 80U + i, 1, true, out);
    }
    for (uint32_t s = 0; s < FV_LIFE_SESSIONS; s++) {
        query_grown(worker, s, before[s]);
    }
    fv_worker_destroy(worker);
    fv_worker_destroy(keep_grown(is_kept));
}

/* Damages what lies at `at`; returns where the next damage begins. */
static size_t damage(uint8_t *log, size_t at, size_t n_used, size_t block)
{
    fv_journal_disk_record_t head;
    fv_disklog_batch_t batch;

    if (block > DAMAGE_BATCHES) {
        memset(log + at, 0xA5, block);
        return at + block;
    }
    memcpy(&head, log + at, sizeof(head));
    memcpy(&batch, log + at + sizeof(head), sizeof(batch));
    assert_int_equal(head.type, FV_DISKLOG_BATCH);
    size_t end = at + FV_DISKLOG_BATCH_BYTES + (size_t)batch.n_bytes;
    at += (block == DAMAGE_BODIES) ? FV_DISKLOG_BATCH_BYTES : 0U;
    assert_in_range(end, at, LOG_BYTES);
    memset(log + at, 0xA5, end - at);
    return (end < n_used) ? end : n_used;
}

/* Sessions that come back, each with the same bits. */
static uint32_t count_right(answers_t before)
{
    float after[FV_LIFE_LAYERS][FV_LIFE_HEADS * FV_LIFE_DIM];
    bool is_kept[FV_LIFE_SESSIONS];
    uint32_t n_kept = 0;
    fv_worker_t *worker = keep_grown(is_kept);

    for (uint32_t s = 0; s < FV_LIFE_SESSIONS; s++) {
        if (is_kept[s]) {
            query_grown(worker, s, after);
            assert_memory_equal(after, before[s], sizeof(after));
            n_kept++;
        }
    }
    fv_worker_destroy(worker);
    return n_kept;
}

/* One place of `every` is damaged, one at a time; and each where the snapshot begins. */
static void sweep(bool is_fresh, size_t block, uint32_t every)
{
    static uint8_t whole[LOG_BYTES], log[LOG_BYTES];
    static answers_t before;
    char dir[64];
    char path[FV_STORE_PATH_BYTES];
    const fv_store_place_t memory = fv_life_place;
    uint32_t n_kept = 0;
    uint32_t n_all = 0;

    fv_life_place = with_disk(dir);
    make_grown(is_fresh, before);
    fv_store_path(&fv_life_place, FV_STORE_LOG, path);
    size_t n_bytes = fv_read_file(path, whole, sizeof(whole));
    size_t n_used = n_bytes;
    while ((n_used > 0) && (whole[n_used - 1U] == 0U)) {
        n_used--;
    }
    uint32_t n_places = 0;
    for (size_t at = FV_JOURNAL_HEAD_BYTES; at < n_used; n_places++) {
        bool is_meant = (n_places % every == every - 1U) || (n_used - at < 4096U);
        memcpy(log, whole, n_bytes);
        at = damage(log, at, n_used, block);
        if (is_meant) {
            wipe_memory();
            fv_write_file(path, log, n_bytes);
            n_kept += count_right(before);
            n_all += FV_LIFE_SESSIONS;
        }
    }
    print_message("%s log, %zu bytes: %u of %u kept\n", is_fresh ? "fresh" : "old", block, n_kept,
                  n_all);
    assert_true(n_kept < n_all);
    fv_worker_t *worker = fv_life_worker();
    fv_worker_discard_store(worker);
    fv_worker_destroy(worker);
    fv_life_place = memory;
    (void)rmdir(dir);
}

/* No record's number tells of what is missing there: the numbers are the snapshot's. */
static void test_damage_before_a_snapshot_never_changes_an_answer(void **state)
{
    (void)state;
    fv_life_ops = fv_backend_cpu;
    sweep(false, DAMAGE_BODIES, 12);
    sweep(true, DAMAGE_BODIES, 12);
    sweep(false, DAMAGE_BATCHES, 12);
    sweep(true, DAMAGE_BATCHES, 12);
    sweep(false, 512, 41);
    sweep(true, 512, 41);
}

/* From here on no file of this process takes another byte behind `at`: a device that fails. Exit code 0: as it should be. */
static int fail_to_commit(answers_t before, uint64_t at)
{
    static float out[256 * FV_LIFE_HEADS * FV_LIFE_DIM];
    const struct rlimit limit = {.rlim_cur = at, .rlim_max = at};
    fv_worker_t *worker = come_back(before);

    if ((signal(SIGXFSZ, SIG_IGN) == SIG_ERR) || (setrlimit(RLIMIT_FSIZE, &limit) != 0)) {
        return 2;
    }
    bool is_acknowledged = /* what no disk has is not */
        fv_life_try_run(worker, 0, 0, fv_life_lengths[0][0], 100, true, out) == FV_OK;
    bool goes_on =
        fv_life_try_run(worker, 0, 0, fv_life_lengths[0][0] - 1U, 1, false, out) == FV_OK;
    fv_worker_destroy(worker);
    return is_acknowledged ? 3 : (goes_on ? 4 : 0);
}

/* A step whose write fails is told so, the rank does nothing more, and nobody has lost anything when it is started again. */
static void test_a_write_that_fails_loses_nothing(void **state)
{
    static answers_t before;
    char dir[64];
    char path[FV_STORE_PATH_BYTES];
    const fv_store_place_t memory = fv_life_place;
    fv_journal_head_t head;
    fv_journal_report_t report = {0};
    const fv_disklog_reader_t nobody = {0};
    bool is_locked = false;
    int code = -1;

    (void)state;
    fv_life_ops = fv_backend_cpu;
    fv_life_place = with_disk(dir);
    fv_worker_t *worker = fv_life_worker();
    fv_life_play(worker);
    query_all(worker, before);
    fv_worker_destroy(worker);
    fv_worker_destroy(come_back(before));
    fv_store_path(&fv_life_place, FV_STORE_LOG, path);
    assert_int_equal(fv_disklog_inspect(path, &nobody, &head, &report, &is_locked), FV_OK);
    pid_t pid = fork();
    if (pid == 0) { /* come_back() itself writes a little more: the tables */
        _exit(fail_to_commit(before, report.n_bytes + 3U * FV_JOURNAL_HEAD_BYTES));
    }
    assert_true(pid > 0);
    assert_int_equal(waitpid(pid, &code, 0), pid);
    assert_true(WIFEXITED(code));
    assert_int_equal(WEXITSTATUS(code), 0);
    fv_worker_destroy(come_back(before)); /* from memory */
    wipe_memory();
    worker = come_back(before); /* from the disk */
    fv_worker_discard_store(worker);
    fv_worker_destroy(worker);
    fv_life_place = memory;
    (void)rmdir(dir);
}

/* ------------------------------------------------------------------ room */

#define ROOM_PAGES 230U /* of one head, in one step */

static fv_status_t add_bytes(void *arg, const fv_journal_record_t *record)
{
    *(size_t *)arg += fv_journal_size(record->n_bytes);
    return FV_OK;
}

/* One KV head whose blocks are a page each: a record for each page. What is reserved for a step is enough for all of them. */
static void test_room_for_a_record_of_each_page(void **state)
{
    static float x[ROOM_PAGES * FV_PAGE_TOKENS * FV_LIFE_DIM], out[sizeof(x) / sizeof(x[0])];
    const size_t row = FV_LIFE_DIM * sizeof(float);
    const fv_store_place_t memory = fv_life_place;
    fv_ctl_model_t model = fv_life_model();
    const fv_ctl_open_t open = fv_life_open(0);
    const fv_ctl_item_t item = {.layer = 1, /* a window: soon done */
                                .kv_end = ROOM_PAGES * FV_PAGE_TOKENS,
                                .n_tokens = ROOM_PAGES * FV_PAGE_TOKENS,
                                .dtype = FV_DTYPE_F32,
                                .flags = FV_ITEM_CAUSAL | FV_ITEM_APPEND};
    const fv_step_io_t io = {.q = x,
                             .k = x,
                             .v = x,
                             .q_token_bytes = row,
                             .k_token_bytes = row,
                             .v_token_bytes = row,
                             .out = out,
                             .out_token_bytes = row};
    size_t n_bytes = 0;
    const fv_disklog_reader_t reader = {.page = add_bytes, .arg = &n_bytes};
    fv_journal_head_t head;
    fv_journal_report_t report;
    fv_ctl_done_t done;
    fv_error_t error;
    bool is_locked = false;
    char dir[64];
    char path[FV_STORE_PATH_BYTES];

    (void)state;
    fv_life_ops = fv_backend_cpu;
    fv_life_place = with_disk(dir);
    fv_store_path(&fv_life_place, FV_STORE_LOG, path);
    model.spec.n_q_heads = 1;
    model.spec.n_kv_heads = 1;
    fv_worker_t *worker = fv_life_worker();
    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    assert_int_equal(fv_worker_open(worker, &open), FV_OK);
    assert_int_equal(fv_worker_step(worker, &item, &io, 1, &done, &error), FV_OK);
    assert_int_equal(error.status, FV_OK);
    assert_int_equal(fv_disklog_inspect(path, &reader, &head, &report, &is_locked), FV_OK);
    assert_true(n_bytes > ROOM_PAGES * FV_PAGE_TOKENS * 2U * row);
    assert_in_range(n_bytes, 1,
                    fv_store_disk_need(worker, worker->work.items.data, ROOM_PAGES + 1U));
    fv_worker_discard_store(worker);
    fv_worker_destroy(worker);
    fv_life_place = memory;
    (void)rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_outlives_its_host_in_place),
        cmocka_unit_test(test_outlives_its_host_from_a_mirror),
        cmocka_unit_test(test_a_disk_comes_later),
        cmocka_unit_test(test_a_damaged_disk_never_changes_an_answer),
        cmocka_unit_test(test_damage_before_a_snapshot_never_changes_an_answer),
        cmocka_unit_test(test_room_for_a_record_of_each_page),
        cmocka_unit_test(test_a_write_that_fails_loses_nothing),
    };

    return cmocka_run_group_tests(tests, fv_life_make_folder, fv_life_remove_folder);
}
