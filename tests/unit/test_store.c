/*
 * test_store.c - a worker's sessions come back from its slot's files, whole or not at all.
 *
 * Goal:   what was committed answers with the same bits, in place and from a device's mirror; forks, cuts and freed pages are
 *         as they were, also where a step was given up in between; whatever is damaged or missing is refused, the rest is kept.
 * Method: a worker with a store runs a few steps and is left; another one opens its files, as after a death. Answers are
 *         compared bit by bit. Every fifth byte of the journal is damaged once.
 */
#include "tests/support/journal_file.h"
#include "tests/support/store_life.h"
#include "tests/support/test.h"
#include "worker/worker.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void check_comes_back(void)
{
    static float before[FV_LIFE_SESSIONS][FV_LIFE_LAYERS][FV_LIFE_HEADS * FV_LIFE_DIM],
        after[FV_LIFE_LAYERS][FV_LIFE_HEADS * FV_LIFE_DIM];
    const fv_ctl_model_t model = fv_life_model();
    fv_worker_t *worker = fv_life_worker();
    uint64_t n_pages[FV_LIFE_SESSIONS];
    fv_ctl_memory_t memory[2];

    fv_life_play(worker);
    for (uint32_t s = 0; s < FV_LIFE_SESSIONS; s++) {
        fv_life_query(worker, s, before[s]);
        n_pages[s] = fv_worker_session_pages(worker, s);
    }
    fv_worker_memory(worker, &memory[0]);
    fv_worker_destroy(worker); /* nothing is written at the end: as good as a death */
    for (int round = 0; round < 2; round++) { /* the second time from a journal written anew */
        worker = fv_life_worker();
        assert_int_equal(fv_worker_model(worker, &model), FV_OK);
        for (uint32_t s = 0; s < FV_LIFE_SESSIONS; s++) {
            assert_int_equal(fv_life_keep(worker, s, 0), FV_OK);
        }
        assert_int_equal(fv_life_keep(worker, 3, 0), FV_ERR_DATA_LOSS); /* was closed */
        assert_int_equal(fv_worker_keep_end(worker), FV_OK);
        for (uint32_t s = 0; s < FV_LIFE_SESSIONS; s++) {
            fv_life_query(worker, s, after);
            assert_memory_equal(after, before[s], sizeof(after));
            assert_int_equal(fv_worker_session_pages(worker, s), n_pages[s]);
        }
        fv_worker_memory(worker, &memory[1]);
        assert_int_equal(memory[1].kv_bytes_free, memory[0].kv_bytes_free);
        fv_worker_destroy(worker);
    }
    worker = fv_life_worker(); /* what the coordinator has more of than the files is missing here */
    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    assert_int_equal(fv_life_keep(worker, 0, 64), FV_ERR_DATA_LOSS);
    assert_int_equal(fv_life_keep(worker, 1, 0), FV_OK);
    assert_int_equal(fv_worker_keep_end(worker), FV_OK);
    fv_life_query(worker, 1, after);
    assert_memory_equal(after, before[1], sizeof(after));
    fv_worker_discard_store(worker);
    fv_worker_destroy(worker);
    assert_int_equal(access(fv_life_place.dir, F_OK), -1);
}

static void test_comes_back_in_place(void **state)
{
    (void)state;
    fv_life_ops = fv_backend_cpu;
    check_comes_back();
}

/* A CPU backend that is said to be a device: its own arena, and a mirror in the segment. */
static void test_comes_back_from_a_mirror(void **state)
{
    (void)state;
    fv_life_ops = fv_backend_cpu;
    fv_life_ops.kv_home = FV_KV_DEVICE;
    check_comes_back();
}

static void test_missing_pages_lose_the_sessions(void **state)
{
    char path[FV_STORE_PATH_BYTES];
    const fv_ctl_model_t model = fv_life_model();

    (void)state;
    fv_life_ops = fv_backend_cpu;
    fv_worker_t *worker = fv_life_worker();
    fv_life_play(worker);
    fv_worker_destroy(worker);
    fv_store_path(&fv_life_place, FV_STORE_PAGES, path);
    assert_int_equal(unlink(path), 0);
    worker = fv_life_worker();
    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    assert_int_equal(fv_life_keep(worker, 0, 0), FV_ERR_DATA_LOSS);
    assert_int_equal(fv_worker_keep_end(worker), FV_OK);
    fv_worker_discard_store(worker);
    fv_worker_destroy(worker);
}

static void test_other_geometry_is_refused(void **state)
{
    fv_worker_config_t config = {
        .n_ranks = 1,
        .backend = &fv_life_ops,
        .backend_config = {.kv_arena_bytes = 2U * FV_LIFE_ARENA, .n_threads = 1},
        .store = &fv_life_place};
    fv_worker_t *worker = NULL;

    (void)state;
    fv_life_ops = fv_backend_cpu;
    worker = fv_life_worker();
    fv_life_play(worker);
    fv_worker_destroy(worker);
    assert_int_equal(fv_worker_create(&config, &worker), FV_ERR_PRECONDITION);
    assert_non_null(strstr(fv_error_context(), "kv_memory"));
    config.backend_config.kv_arena_bytes = FV_LIFE_ARENA;
    config.move_bytes = FV_LIFE_ARENA / 4U; /* pages may lie where KV that moves would land */
    assert_int_equal(fv_worker_create(&config, &worker), FV_ERR_PRECONDITION);
    assert_non_null(strstr(fv_error_context(), "move_memory"));
    worker = fv_life_worker();
    fv_worker_discard_store(worker);
    fv_worker_destroy(worker);
}

/* ------------------------------------------------------------------ a step that was given up */

static bool g_fails_copy, g_fails_attend;

static fv_status_t copy_or_fail(fv_backend_t *b, const fv_page_copy_t *items, size_t n)
{
    return g_fails_copy ? fv_fail(FV_ERR_ABORTED, "given up")
                        : fv_backend_cpu.copy_pages(b, items, n);
}

static fv_status_t attend_or_fail(fv_backend_t *b, const fv_attn_item_t *items, size_t n)
{
    return g_fails_attend ? fv_fail(FV_ERR_ABORTED, "given up")
                          : fv_backend_cpu.attend(b, items, n);
}

/* Session 0 has 30 tokens of layer 0, session 1 is its fork: their one page is shared. */
static fv_worker_t *make_fork(void)
{
    static float out[30 * FV_LIFE_HEADS * FV_LIFE_DIM];
    const fv_ctl_model_t model = fv_life_model();
    const fv_ctl_open_t open0 = fv_life_open(0);
    const fv_ctl_fork_t fork1 = {
        .session_slot = 1, .id = fv_life_id(1), .parent_slot = 0, .at_position = UINT64_MAX};
    fv_worker_t *worker = fv_life_worker();

    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    assert_int_equal(fv_worker_open(worker, &open0), FV_OK);
    fv_life_run(worker, 0, 0, 0, 30, true, out);
    assert_int_equal(fv_worker_fork(worker, &fork1), FV_OK);
    return worker;
}

/* What a coordinator does when a rank was lost: the fork's append is given up, cut back, and comes again. */
static void lose_a_rank(fv_worker_t *worker, bool fails_copy)
{
    const fv_ctl_truncate_t cut = {.session_slot = 1, .layer = 0, .position = 30};
    static float out[FV_LIFE_HEADS * FV_LIFE_DIM];

    g_fails_copy = fails_copy;
    g_fails_attend = !fails_copy;
    assert_int_equal(fv_life_try_run(worker, 1, 0, 30, 1, true, out), FV_ERR_ABORTED);
    g_fails_copy = false;
    g_fails_attend = false;
    fv_worker_renew(worker);
    assert_int_equal(fv_worker_truncate(worker, &cut), FV_OK);
}

/* The fork of an undisturbed worker answers `want`; one whose step was given up does, too, before and after a death. */
static void check_given_up(fv_kv_home_t home, bool fails_copy)
{
    static float out[FV_LIFE_HEADS * FV_LIFE_DIM], want[FV_LIFE_HEADS * FV_LIFE_DIM];
    const uint64_t lengths[FV_LIFE_LAYERS] = {31, 0};
    const fv_ctl_model_t model = fv_life_model();

    fv_life_ops = fv_backend_cpu;
    fv_life_ops.kv_home = home;
    fv_life_ops.copy_pages = copy_or_fail;
    fv_life_ops.attend = attend_or_fail;
    for (int is_disturbed = 0; is_disturbed < 2; is_disturbed++) {
        fv_worker_t *worker = make_fork();
        uint64_t n_pages = fv_worker_session_pages(worker, 1);
        if (is_disturbed != 0) {
            lose_a_rank(worker, fails_copy);
            assert_int_equal(fv_worker_session_pages(worker, 1), n_pages);
        }
        fv_life_run(worker, 1, 0, 30, 1, true, out);
        fv_life_run(worker, 0, 0, 30, 1, true, out); /* the parent goes on, elsewhere */
        fv_life_run(worker, 1, 0, 30, 1, false, out);
        if (is_disturbed == 0) {
            memcpy(want, out, sizeof(want));
        }
        assert_memory_equal(out, want, sizeof(want));
        fv_worker_destroy(worker);
        worker = fv_life_worker();
        assert_int_equal(fv_worker_model(worker, &model), FV_OK);
        assert_int_equal(fv_life_keep_lengths(worker, 0, lengths), FV_OK);
        assert_int_equal(fv_life_keep_lengths(worker, 1, lengths), FV_OK);
        assert_int_equal(fv_worker_keep_end(worker), FV_OK);
        fv_life_run(worker, 1, 0, 30, 1, false, out);
        assert_memory_equal(out, want, sizeof(want));
        fv_worker_discard_store(worker);
        fv_worker_destroy(worker);
    }
}

static void test_a_given_up_step_leaves_a_fork_alone(void **state)
{
    (void)state;
    check_given_up(FV_KV_HOST, false);
    check_given_up(FV_KV_HOST, true);
    check_given_up(FV_KV_DEVICE, false);
    check_given_up(FV_KV_DEVICE, true);
}

/* ------------------------------------------------------------------ another session's files */

/* A slot's files of another time: the coordinator has given the session's slot to somebody else since. */
static void test_another_sessions_tables_are_refused(void **state)
{
    static float out[30 * FV_LIFE_HEADS * FV_LIFE_DIM];
    const uint64_t lengths[FV_LIFE_LAYERS] = {20, 0};
    const fv_ctl_model_t model = fv_life_model();
    const fv_ctl_open_t open0 = fv_life_open(0);
    const fv_ctl_fork_t fork2 = {
        .session_slot = 2, .id = fv_life_id(2), .parent_slot = 0, .at_position = UINT64_MAX};

    (void)state;
    fv_life_ops = fv_backend_cpu;
    fv_worker_t *worker = fv_life_worker();
    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    assert_int_equal(fv_worker_open(worker, &open0), FV_OK);
    fv_life_run(worker, 0, 0, 0, 30, true, out);
    assert_int_equal(fv_worker_fork(worker, &fork2), FV_OK);
    fv_worker_destroy(worker);
    for (int round = 0; round < 2; round++) { /* the second time from a journal written anew */
        worker = fv_life_worker();
        assert_int_equal(fv_worker_model(worker, &model), FV_OK);
        assert_int_equal(fv_life_keep_as(worker, 0, fv_life_id(7), lengths), FV_ERR_DATA_LOSS);
        assert_int_equal(fv_life_keep_as(worker, 2, fv_life_id(0), lengths), FV_ERR_DATA_LOSS);
        assert_int_equal(fv_life_keep_lengths(worker, 0, lengths), FV_OK);
        assert_int_equal(fv_life_keep_lengths(worker, 2, lengths), FV_OK);
        assert_int_equal(fv_worker_keep_end(worker), FV_OK);
        if (round == 1) {
            fv_worker_discard_store(worker);
        }
        fv_worker_destroy(worker);
    }
}

/* Files of another time have another model in the slot: they give nothing, and stop nobody. */
static void test_another_model_is_forgotten(void **state)
{
    static float out[30 * FV_LIFE_HEADS * FV_LIFE_DIM], want[FV_LIFE_HEADS * FV_LIFE_DIM];
    const uint64_t lengths[FV_LIFE_LAYERS] = {30, 0};
    const fv_ctl_model_t model = fv_life_model();
    const fv_ctl_open_t open0 = fv_life_open(0);
    fv_ctl_model_t other = model;

    (void)state;
    fv_life_ops = fv_backend_cpu;
    other.spec.head_dim_qk = 2 * FV_LIFE_DIM;
    other.spec.head_dim_v = 2 * FV_LIFE_DIM;
    assert_int_equal(fv_model_spec_check(&other.spec), FV_OK);
    fv_worker_t *worker = fv_life_worker();
    assert_int_equal(fv_worker_model(worker, &other), FV_OK);
    assert_int_equal(fv_worker_open(worker, &open0), FV_OK);
    fv_worker_destroy(worker);
    for (int round = 0; round < 2; round++) {
        worker = fv_life_worker();
        assert_int_equal(fv_worker_model(worker, &model), FV_OK);
        assert_int_equal(fv_worker_model(worker, &other), FV_ERR_PROTOCOL); /* it has one now */
        assert_int_equal(fv_life_keep_lengths(worker, 0, lengths),
                         (round == 0) ? FV_ERR_DATA_LOSS : FV_OK);
        assert_int_equal(fv_worker_keep_end(worker), FV_OK);
        if (round == 0) {
            assert_int_equal(fv_worker_open(worker, &open0), FV_OK);
            fv_life_run(worker, 0, 0, 0, 30, true, out);
            fv_life_run(worker, 0, 0, 29, 1, false, want);
        } else {
            fv_life_run(worker, 0, 0, 29, 1, false, out);
            assert_memory_equal(out, want, sizeof(want));
            fv_worker_discard_store(worker);
        }
        fv_worker_destroy(worker);
    }
}

/* ------------------------------------------------------------------ damage */

/* Whatever a damaged journal still gives is right: the same bits, or the session is refused. */
static void test_damage_never_changes_an_answer(void **state)
{
    static uint8_t journal[1 << 20];
    static float before[FV_LIFE_SESSIONS][FV_LIFE_LAYERS][FV_LIFE_HEADS * FV_LIFE_DIM],
        after[FV_LIFE_LAYERS][FV_LIFE_HEADS * FV_LIFE_DIM];
    const fv_ctl_model_t model = fv_life_model();
    char path[FV_STORE_PATH_BYTES];
    uint32_t n_kept = 0;
    uint32_t n_refused = 0;

    (void)state;
    fv_life_ops = fv_backend_cpu;
    fv_worker_t *worker = fv_life_worker();
    fv_life_play(worker);
    for (uint32_t s = 0; s < FV_LIFE_SESSIONS; s++) {
        fv_life_query(worker, s, before[s]);
    }
    fv_worker_destroy(worker);
    fv_store_path(&fv_life_place, FV_STORE_TABLES, path);
    size_t n_bytes = fv_read_file(path, journal, sizeof(journal));
    for (size_t at = FV_JOURNAL_HEAD_BYTES; at < n_bytes; at += 5U) {
        journal[at] ^= (uint8_t)(1U << (at % 8U));
        fv_write_file(path, journal, n_bytes);
        journal[at] ^= (uint8_t)(1U << (at % 8U));
        worker = fv_life_worker();
        bool is_kept[FV_LIFE_SESSIONS];
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
    assert_true(n_kept >
                0U); /* damage concerns one session, and its forks; that of the model all */
    assert_true(n_refused > 0U);
    worker = fv_life_worker();
    fv_worker_discard_store(worker);
    fv_worker_destroy(worker);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_comes_back_in_place),
        cmocka_unit_test(test_comes_back_from_a_mirror),
        cmocka_unit_test(test_missing_pages_lose_the_sessions),
        cmocka_unit_test(test_other_geometry_is_refused),
        cmocka_unit_test(test_a_given_up_step_leaves_a_fork_alone),
        cmocka_unit_test(test_another_sessions_tables_are_refused),
        cmocka_unit_test(test_another_model_is_forgotten),
        cmocka_unit_test(test_damage_never_changes_an_answer),
    };

    return cmocka_run_group_tests(tests, fv_life_make_folder, fv_life_remove_folder);
}
