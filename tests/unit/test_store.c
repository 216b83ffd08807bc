/*
 * test_store.c - a worker's sessions come back from its slot's files, whole or not at all.
 *
 * Goal:   what was committed answers with the same bits, in place and from a device's mirror; forks, cuts and freed pages are
 *         as they were, also where a step was given up in between; whatever is damaged or missing is refused, the rest is kept.
 * Method: a worker with a store runs a few steps and is left; another one opens its files, as after a death. Answers are
 *         compared bit by bit. Every fifth byte of the journal is damaged once.
 */
#include "tests/support/journal_file.h"
#include "tests/support/test.h"
#include "worker/worker.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define DIM        16
#define HEADS      2
#define LAYERS     2
#define N_SESSIONS 3U
#define ARENA      ((size_t)1 << 20)

static char g_dir[64];
static fv_store_place_t g_place;
static fv_backend_ops_t g_ops;

static int make_folder(void **state)
{
    (void)state;
    (void)snprintf(g_dir, sizeof(g_dir), "/tmp/fv_store_XXXXXX");
    return ((mkdtemp(g_dir) != NULL) &&
            (fv_store_place_make(g_dir, "unit", 0, 1, &g_place) == FV_OK))
               ? 0
               : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    (void)rmdir(g_dir); /* empty, if a test did not fail */
    return 0;
}

static fv_ctl_model_t make_model(void)
{
    fv_ctl_model_t m = {.spec = {.name = "store",
                                 .n_layers = LAYERS,
                                 .n_q_heads = HEADS,
                                 .n_kv_heads = HEADS,
                                 .head_dim_qk = DIM,
                                 .head_dim_v = DIM,
                                 .kv_dtype = FV_DTYPE_BF16,
                                 .n_policies = 2}};

    m.spec.policies[1] =
        (fv_policy_t){.kind = FV_POLICY_WINDOW, .window_tokens = 65, .sink_tokens = 1};
    m.spec.layer_policy[1] = 1; /* lets pages die */
    assert_int_equal(fv_model_spec_check(&m.spec), FV_OK);
    return m;
}

static fv_worker_t *make_worker(void)
{
    const fv_worker_config_t config = {.n_ranks = 1,
                                       .backend = &g_ops,
                                       .backend_config = {.kv_arena_bytes = ARENA, .n_threads = 1},
                                       .store = &g_place};
    fv_worker_t *worker = NULL;

    assert_int_equal(fv_worker_create(&config, &worker), FV_OK);
    return worker;
}

static float value_of(uint32_t seed, size_t i)
{
    uint32_t x = (seed * 2654435761U) ^ (uint32_t)(i * 40503U + 17U);

    x ^= x >> 13U;
    x *= 2246822519U;
    x ^= x >> 16U;
    return (float)(int32_t)(x % 2001U) / 1000.0F - 1.0F;
}

/* n tokens at `position`; not an append: a query over what is there. */
static fv_status_t try_run(fv_worker_t *worker,
                           uint32_t slot,
                           uint32_t layer,
                           uint64_t position,
                           uint32_t n,
                           bool is_append,
                           float *out)
{
    static float q[256 * HEADS * DIM], k[256 * HEADS * DIM], v[256 * HEADS * DIM];
    const fv_ctl_item_t item = {.session_slot = slot,
                                .layer = layer,
                                .position = position,
                                .kv_end = position + n,
                                .n_tokens = n,
                                .dtype = FV_DTYPE_F32,
                                .flags = FV_ITEM_CAUSAL | (is_append ? FV_ITEM_APPEND : 0)};
    const size_t row = HEADS * DIM * sizeof(float);
    const fv_step_io_t io = {.q = q,
                             .k = k,
                             .v = v,
                             .q_token_bytes = row,
                             .k_token_bytes = row,
                             .v_token_bytes = row,
                             .out = out,
                             .out_token_bytes = row};
    fv_ctl_done_t done;
    fv_error_t error;

    for (size_t i = 0; i < (size_t)n * HEADS * DIM; i++) {
        q[i] = value_of(1U + layer, i + (size_t)position * HEADS * DIM);
        k[i] = value_of(11U + slot, i + (size_t)position * HEADS * DIM);
        v[i] = value_of(21U + slot, i + (size_t)position * HEADS * DIM);
    }
    fv_status_t status = fv_worker_step(worker, &item, &io, 1, &done, &error);
    return (status == FV_OK) ? (fv_status_t)error.status : status;
}

static void run(fv_worker_t *worker,
                uint32_t slot,
                uint32_t layer,
                uint64_t position,
                uint32_t n,
                bool is_append,
                float *out)
{
    assert_int_equal(try_run(worker, slot, layer, position, n, is_append, out), FV_OK);
}

/* The last one is closed. */
static const uint64_t k_lengths[N_SESSIONS + 1U][LAYERS] = {{150, 203},
                                                            {80, 140},
                                                            {90, 40},
                                                            {100, 0}};

static fv_session_id_t make_id(uint32_t number)
{
    fv_session_id_t id = {{0}};

    for (size_t i = 0; i < sizeof(id.bytes); i++) {
        id.bytes[i] = (uint8_t)(number * 31U + i * 7U + 1U);
    }
    return id;
}

static fv_ctl_open_t make_open(uint32_t slot)
{
    return (fv_ctl_open_t){.session_slot = slot,
                           .id = make_id(slot),
                           .placement = {.n_head_parts = 1, .n_ctx_parts = 1, .shard_tokens = 64}};
}

/* Session 0; 1, a fork of it that went on alone; 2, one that was cut. And one that was closed. */
static void play(fv_worker_t *worker)
{
    static float out[256 * HEADS * DIM];
    const fv_ctl_model_t model = make_model();
    const fv_ctl_open_t open0 = make_open(0);
    const fv_ctl_open_t open2 = make_open(2);
    const fv_ctl_open_t open3 = make_open(3);
    const fv_ctl_fork_t fork1 = {
        .session_slot = 1, .id = make_id(1), .parent_slot = 0, .at_position = UINT64_MAX};
    const fv_ctl_truncate_t cut = {.session_slot = 2, .layer = 0, .position = 90};
    const fv_ctl_close_t close3 = {.session_slot = 3};

    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    assert_int_equal(fv_worker_open(worker, &open0), FV_OK);
    run(worker, 0, 0, 0, 70, true, out);
    run(worker, 0, 1, 0, 139, true, out);
    assert_int_equal(fv_worker_fork(worker, &fork1), FV_OK);
    run(worker, 0, 0, 70, 80, true, out); /* copies the shared page */
    run(worker, 1, 0, 70, 10, true, out);
    run(worker, 0, 1, 139, 64, true, out); /* pages die */
    run(worker, 1, 1, 139, 1, true, out);
    assert_int_equal(fv_worker_open(worker, &open3), FV_OK);
    run(worker, 3, 0, 0, 100, true, out);
    assert_int_equal(fv_worker_open(worker, &open2), FV_OK);
    run(worker, 2, 0, 0, 130, true, out);
    run(worker, 2, 1, 0, 40, true, out);
    assert_int_equal(fv_worker_truncate(worker, &cut), FV_OK);
    assert_int_equal(fv_worker_close(worker, &close3), FV_OK);
}

/* Answers of the last token of every session and layer. */
static void query(fv_worker_t *worker, uint32_t slot, float out[LAYERS][HEADS * DIM])
{
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        run(worker, slot, layer, k_lengths[slot][layer] - 1U, 1, false, out[layer]);
    }
}

static fv_status_t
keep_as(fv_worker_t *worker, uint32_t slot, fv_session_id_t id, const uint64_t lengths[LAYERS])
{
    const fv_ctl_keep_t message = {
        .session_slot = slot, .id = id, .n_layers = LAYERS, .placement = make_open(slot).placement};
    fv_ctl_keep_layer_t layers[LAYERS];
    uint64_t floors[LAYERS];

    for (uint32_t i = 0; i < LAYERS; i++) {
        layers[i].n_tokens = lengths[i];
    }
    return fv_worker_keep(worker, &message, layers, floors);
}

static fv_status_t keep_lengths(fv_worker_t *worker, uint32_t slot, const uint64_t lengths[LAYERS])
{
    return keep_as(worker, slot, make_id(slot), lengths);
}

static fv_status_t keep(fv_worker_t *worker, uint32_t slot, uint64_t missing)
{
    const uint64_t lengths[LAYERS] = {k_lengths[slot][0] + missing, k_lengths[slot][1] + missing};

    return keep_lengths(worker, slot, lengths);
}

static void check_comes_back(void)
{
    static float before[N_SESSIONS][LAYERS][HEADS * DIM], after[LAYERS][HEADS * DIM];
    const fv_ctl_model_t model = make_model();
    fv_worker_t *worker = make_worker();
    uint64_t n_pages[N_SESSIONS];
    fv_ctl_memory_t memory[2];

    play(worker);
    for (uint32_t s = 0; s < N_SESSIONS; s++) {
        query(worker, s, before[s]);
        n_pages[s] = fv_worker_session_pages(worker, s);
    }
    fv_worker_memory(worker, &memory[0]);
    fv_worker_destroy(worker); /* nothing is written at the end: as good as a death */
    for (int round = 0; round < 2; round++) { /* the second time from a journal written anew */
        worker = make_worker();
        assert_int_equal(fv_worker_model(worker, &model), FV_OK);
        for (uint32_t s = 0; s < N_SESSIONS; s++) {
            assert_int_equal(keep(worker, s, 0), FV_OK);
        }
        assert_int_equal(keep(worker, 3, 0), FV_ERR_DATA_LOSS); /* was closed */
        assert_int_equal(fv_worker_keep_end(worker), FV_OK);
        for (uint32_t s = 0; s < N_SESSIONS; s++) {
            query(worker, s, after);
            assert_memory_equal(after, before[s], sizeof(after));
            assert_int_equal(fv_worker_session_pages(worker, s), n_pages[s]);
        }
        fv_worker_memory(worker, &memory[1]);
        assert_int_equal(memory[1].kv_bytes_free, memory[0].kv_bytes_free);
        fv_worker_destroy(worker);
    }
    worker = make_worker(); /* what the coordinator has more of than the files is missing here */
    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    assert_int_equal(keep(worker, 0, 64), FV_ERR_DATA_LOSS);
    assert_int_equal(keep(worker, 1, 0), FV_OK);
    assert_int_equal(fv_worker_keep_end(worker), FV_OK);
    query(worker, 1, after);
    assert_memory_equal(after, before[1], sizeof(after));
    fv_worker_discard_store(worker);
    fv_worker_destroy(worker);
    assert_int_equal(access(g_place.dir, F_OK), -1);
}

static void test_comes_back_in_place(void **state)
{
    (void)state;
    g_ops = fv_backend_cpu;
    check_comes_back();
}

/* A CPU backend that is said to be a device: its own arena, and a mirror in the segment. */
static void test_comes_back_from_a_mirror(void **state)
{
    (void)state;
    g_ops = fv_backend_cpu;
    g_ops.kv_home = FV_KV_DEVICE;
    check_comes_back();
}

static void test_missing_pages_lose_the_sessions(void **state)
{
    char path[FV_STORE_PATH_BYTES];
    const fv_ctl_model_t model = make_model();

    (void)state;
    g_ops = fv_backend_cpu;
    fv_worker_t *worker = make_worker();
    play(worker);
    fv_worker_destroy(worker);
    fv_store_path(&g_place, FV_STORE_PAGES, path);
    assert_int_equal(unlink(path), 0);
    worker = make_worker();
    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    assert_int_equal(keep(worker, 0, 0), FV_ERR_DATA_LOSS);
    assert_int_equal(fv_worker_keep_end(worker), FV_OK);
    fv_worker_discard_store(worker);
    fv_worker_destroy(worker);
}

static void test_other_geometry_is_refused(void **state)
{
    fv_worker_config_t config = {.n_ranks = 1,
                                 .backend = &g_ops,
                                 .backend_config = {.kv_arena_bytes = 2U * ARENA, .n_threads = 1},
                                 .store = &g_place};
    fv_worker_t *worker = NULL;

    (void)state;
    g_ops = fv_backend_cpu;
    worker = make_worker();
    play(worker);
    fv_worker_destroy(worker);
    assert_int_equal(fv_worker_create(&config, &worker), FV_ERR_PRECONDITION);
    assert_non_null(strstr(fv_error_context(), "kv_memory"));
    worker = make_worker();
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
    static float out[30 * HEADS * DIM];
    const fv_ctl_model_t model = make_model();
    const fv_ctl_open_t open0 = make_open(0);
    const fv_ctl_fork_t fork1 = {
        .session_slot = 1, .id = make_id(1), .parent_slot = 0, .at_position = UINT64_MAX};
    fv_worker_t *worker = make_worker();

    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    assert_int_equal(fv_worker_open(worker, &open0), FV_OK);
    run(worker, 0, 0, 0, 30, true, out);
    assert_int_equal(fv_worker_fork(worker, &fork1), FV_OK);
    return worker;
}

/* What a coordinator does when a rank was lost: the fork's append is given up, cut back, and comes again. */
static void lose_a_rank(fv_worker_t *worker, bool fails_copy)
{
    const fv_ctl_truncate_t cut = {.session_slot = 1, .layer = 0, .position = 30};
    static float out[HEADS * DIM];

    g_fails_copy = fails_copy;
    g_fails_attend = !fails_copy;
    assert_int_equal(try_run(worker, 1, 0, 30, 1, true, out), FV_ERR_ABORTED);
    g_fails_copy = false;
    g_fails_attend = false;
    fv_worker_renew(worker);
    assert_int_equal(fv_worker_truncate(worker, &cut), FV_OK);
}

/* The fork of an undisturbed worker answers `want`; one whose step was given up does, too, before and after a death. */
static void check_given_up(fv_kv_home_t home, bool fails_copy)
{
    static float out[HEADS * DIM], want[HEADS * DIM];
    const uint64_t lengths[LAYERS] = {31, 0};
    const fv_ctl_model_t model = make_model();

    g_ops = fv_backend_cpu;
    g_ops.kv_home = home;
    g_ops.copy_pages = copy_or_fail;
    g_ops.attend = attend_or_fail;
    for (int is_disturbed = 0; is_disturbed < 2; is_disturbed++) {
        fv_worker_t *worker = make_fork();
        uint64_t n_pages = fv_worker_session_pages(worker, 1);
        if (is_disturbed != 0) {
            lose_a_rank(worker, fails_copy);
            assert_int_equal(fv_worker_session_pages(worker, 1), n_pages);
        }
        run(worker, 1, 0, 30, 1, true, out);
        run(worker, 0, 0, 30, 1, true, out); /* the parent goes on, elsewhere */
        run(worker, 1, 0, 30, 1, false, out);
        if (is_disturbed == 0) {
            memcpy(want, out, sizeof(want));
        }
        assert_memory_equal(out, want, sizeof(want));
        fv_worker_destroy(worker);
        worker = make_worker();
        assert_int_equal(fv_worker_model(worker, &model), FV_OK);
        assert_int_equal(keep_lengths(worker, 0, lengths), FV_OK);
        assert_int_equal(keep_lengths(worker, 1, lengths), FV_OK);
        assert_int_equal(fv_worker_keep_end(worker), FV_OK);
        run(worker, 1, 0, 30, 1, false, out);
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
    static float out[30 * HEADS * DIM];
    const uint64_t lengths[LAYERS] = {20, 0};
    const fv_ctl_model_t model = make_model();
    const fv_ctl_open_t open0 = make_open(0);
    const fv_ctl_fork_t fork2 = {
        .session_slot = 2, .id = make_id(2), .parent_slot = 0, .at_position = UINT64_MAX};

    (void)state;
    g_ops = fv_backend_cpu;
    fv_worker_t *worker = make_worker();
    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    assert_int_equal(fv_worker_open(worker, &open0), FV_OK);
    run(worker, 0, 0, 0, 30, true, out);
    assert_int_equal(fv_worker_fork(worker, &fork2), FV_OK);
    fv_worker_destroy(worker);
    for (int round = 0; round < 2; round++) { /* the second time from a journal written anew */
        worker = make_worker();
        assert_int_equal(fv_worker_model(worker, &model), FV_OK);
        assert_int_equal(keep_as(worker, 0, make_id(7), lengths), FV_ERR_DATA_LOSS);
        assert_int_equal(keep_as(worker, 2, make_id(0), lengths), FV_ERR_DATA_LOSS);
        assert_int_equal(keep_lengths(worker, 0, lengths), FV_OK);
        assert_int_equal(keep_lengths(worker, 2, lengths), FV_OK);
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
    static float out[30 * HEADS * DIM], want[HEADS * DIM];
    const uint64_t lengths[LAYERS] = {30, 0};
    const fv_ctl_model_t model = make_model();
    const fv_ctl_open_t open0 = make_open(0);
    fv_ctl_model_t other = model;

    (void)state;
    g_ops = fv_backend_cpu;
    other.spec.head_dim_qk = 2 * DIM;
    other.spec.head_dim_v = 2 * DIM;
    assert_int_equal(fv_model_spec_check(&other.spec), FV_OK);
    fv_worker_t *worker = make_worker();
    assert_int_equal(fv_worker_model(worker, &other), FV_OK);
    assert_int_equal(fv_worker_open(worker, &open0), FV_OK);
    fv_worker_destroy(worker);
    for (int round = 0; round < 2; round++) {
        worker = make_worker();
        assert_int_equal(fv_worker_model(worker, &model), FV_OK);
        assert_int_equal(fv_worker_model(worker, &other), FV_ERR_PROTOCOL); /* it has one now */
        assert_int_equal(keep_lengths(worker, 0, lengths), (round == 0) ? FV_ERR_DATA_LOSS : FV_OK);
        assert_int_equal(fv_worker_keep_end(worker), FV_OK);
        if (round == 0) {
            assert_int_equal(fv_worker_open(worker, &open0), FV_OK);
            run(worker, 0, 0, 0, 30, true, out);
            run(worker, 0, 0, 29, 1, false, want);
        } else {
            run(worker, 0, 0, 29, 1, false, out);
            assert_memory_equal(out, want, sizeof(want));
            fv_worker_discard_store(worker);
        }
        fv_worker_destroy(worker);
    }
}

/* ------------------------------------------------------------------ level host */

/* The rest of the tests' place, with a disk: the folder that tests run in is on one. */
static fv_store_place_t with_disk(char dir[64])
{
    fv_store_place_t place = g_place;

    (void)snprintf(dir, 64, "fv_disk_XXXXXX");
    assert_non_null(mkdtemp(dir));
    assert_int_equal(fv_store_place_disk(&place, dir), FV_OK);
    return place;
}

/* What a host that was down has lost. */
static void wipe_memory(void)
{
    char path[FV_STORE_PATH_BYTES];

    fv_store_path(&g_place, FV_STORE_PAGES, path);
    assert_int_equal(unlink(path), 0);
    fv_store_path(&g_place, FV_STORE_TABLES, path);
    assert_int_equal(unlink(path), 0);
}

typedef float answers_t[N_SESSIONS][LAYERS][HEADS * DIM];

static void query_all(fv_worker_t *worker, answers_t out)
{
    for (uint32_t s = 0; s < N_SESSIONS; s++) {
        query(worker, s, out[s]);
    }
}

/* Opens what is there, keeps all of it, and compares. */
static fv_worker_t *come_back(answers_t before)
{
    static answers_t after;
    const fv_ctl_model_t model = make_model();
    fv_worker_t *worker = make_worker();

    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    for (uint32_t s = 0; s < N_SESSIONS; s++) {
        assert_int_equal(keep(worker, s, 0), FV_OK);
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
    const fv_store_place_t memory = g_place;
    const fv_ctl_close_t close2 = {.session_slot = 2};
    fv_ctl_open_t open4 = make_open(4);

    g_place = with_disk(dir);
    fv_worker_t *worker = make_worker();
    play(worker);
    query_all(worker, before);
    fv_worker_destroy(worker);
    for (int round = 0; round < 3; round++) { /* each time from what the one before has written */
        wipe_memory();
        fv_worker_destroy(come_back(before));
    }
    fv_worker_destroy(come_back(before)); /* from memory: goes on with the same log */
    worker = come_back(before);
    static float out[256 * HEADS * DIM];
    assert_int_equal(fv_worker_open(worker, &open4), FV_OK);
    run(worker, 4, 0, 0, 100, true, out);
    assert_int_equal(fv_worker_close(worker, &close2), FV_OK);
    run(worker, 1, 0, 80, 60, true, out); /* in pages that were another's */
    query(worker, 0, before[0]);
    run(worker, 1, 0, 139, 1, false, before[1][0]);
    fv_worker_destroy(worker);
    wipe_memory();
    worker = make_worker();
    const fv_ctl_model_t model = make_model();
    const uint64_t lengths1[LAYERS] = {140, 140};
    const uint64_t lengths4[LAYERS] = {100, 0};
    assert_int_equal(fv_worker_model(worker, &model), FV_OK);
    assert_int_equal(keep(worker, 0, 0), FV_OK);
    assert_int_equal(keep_lengths(worker, 1, lengths1), FV_OK);
    assert_int_equal(keep(worker, 2, 0), FV_ERR_DATA_LOSS); /* was closed */
    assert_int_equal(keep_lengths(worker, 4, lengths4), FV_OK);
    assert_int_equal(fv_worker_keep_end(worker), FV_OK);
    float after[LAYERS][HEADS * DIM];
    query(worker, 0, after);
    assert_memory_equal(after, before[0], sizeof(after));
    run(worker, 1, 0, 139, 1, false, after[0]);
    assert_memory_equal(after[0], before[1][0], sizeof(after[0]));
    fv_worker_discard_store(worker);
    fv_worker_destroy(worker);
    assert_int_equal(access(g_place.disk_dir, F_OK), -1);
    g_place = memory;
    (void)rmdir(dir);
}

static void test_outlives_its_host_in_place(void **state)
{
    (void)state;
    g_ops = fv_backend_cpu;
    check_outlives_its_host();
}

static void test_outlives_its_host_from_a_mirror(void **state)
{
    (void)state;
    g_ops = fv_backend_cpu;
    g_ops.kv_home = FV_KV_DEVICE;
    check_outlives_its_host();
}

/* Files of level process get a disk, which has nothing yet: all pages go there before anything else. */
static void test_a_disk_comes_later(void **state)
{
    static answers_t before;
    char dir[64];
    const fv_store_place_t memory = g_place;

    (void)state;
    g_ops = fv_backend_cpu;
    fv_worker_t *worker = make_worker();
    play(worker);
    query_all(worker, before);
    fv_worker_destroy(worker);
    g_place = with_disk(dir);
    fv_worker_destroy(come_back(before));
    wipe_memory();
    fv_worker_destroy(come_back(before));
    fv_store_place_t both = g_place;
    g_place = memory; /* and is not there for a while: what it has is older then */
    worker = come_back(before);
    static float out[256 * HEADS * DIM];
    run(worker, 2, 0, 90, 8, true, out);
    const fv_ctl_truncate_t cut = {.session_slot = 2, .layer = 0, .position = 90};
    assert_int_equal(fv_worker_truncate(worker, &cut), FV_OK);
    fv_worker_destroy(worker);
    g_place = both;
    fv_worker_destroy(come_back(before));
    wipe_memory();
    worker = come_back(before);
    fv_worker_discard_store(worker);
    fv_worker_destroy(worker);
    g_place = memory;
    (void)rmdir(dir);
}

/* Whatever a damaged log still gives is right: the same bits, or the session is refused; and most are not. */
static void test_a_damaged_disk_never_changes_an_answer(void **state)
{
    static uint8_t log[1 << 22];
    static answers_t before;
    float after[LAYERS][HEADS * DIM];
    char dir[64];
    char path[FV_STORE_PATH_BYTES];
    const fv_ctl_model_t model = make_model();
    const fv_store_place_t memory = g_place;
    uint32_t n_kept = 0;
    uint32_t n_refused = 0;

    (void)state;
    g_ops = fv_backend_cpu;
    g_place = with_disk(dir);
    fv_worker_t *worker = make_worker();
    play(worker);
    query_all(worker, before);
    fv_worker_destroy(worker);
    fv_store_path(&g_place, FV_STORE_LOG, path);
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
        bool is_kept[N_SESSIONS];
        worker = make_worker();
        assert_int_equal(fv_worker_model(worker, &model), FV_OK);
        for (uint32_t s = 0; s < N_SESSIONS; s++) {
            is_kept[s] = keep(worker, s, 0) == FV_OK;
            n_kept += is_kept[s] ? 1U : 0U;
            n_refused += is_kept[s] ? 0U : 1U;
        }
        assert_int_equal(fv_worker_keep_end(worker), FV_OK);
        for (uint32_t s = 0; s < N_SESSIONS; s++) {
            if (is_kept[s]) {
                query(worker, s, after);
                assert_memory_equal(after, before[s], sizeof(after));
            }
        }
        fv_worker_destroy(worker);
    }
    print_message("%u kept, %u refused\n", n_kept, n_refused);
    assert_true(n_kept > n_refused / 2U);
    assert_true(n_refused > 0U);
    worker = make_worker();
    fv_worker_discard_store(worker);
    fv_worker_destroy(worker);
    g_place = memory;
    (void)rmdir(dir);
}

/* ------------------------------------------------------------------ damage */

/* Whatever a damaged journal still gives is right: the same bits, or the session is refused. */
static void test_damage_never_changes_an_answer(void **state)
{
    static uint8_t journal[1 << 20];
    static float before[N_SESSIONS][LAYERS][HEADS * DIM], after[LAYERS][HEADS * DIM];
    const fv_ctl_model_t model = make_model();
    char path[FV_STORE_PATH_BYTES];
    uint32_t n_kept = 0;
    uint32_t n_refused = 0;

    (void)state;
    g_ops = fv_backend_cpu;
    fv_worker_t *worker = make_worker();
    play(worker);
    for (uint32_t s = 0; s < N_SESSIONS; s++) {
        query(worker, s, before[s]);
    }
    fv_worker_destroy(worker);
    fv_store_path(&g_place, FV_STORE_TABLES, path);
    size_t n_bytes = fv_read_file(path, journal, sizeof(journal));
    for (size_t at = FV_JOURNAL_HEAD_BYTES; at < n_bytes; at += 5U) {
        journal[at] ^= (uint8_t)(1U << (at % 8U));
        fv_write_file(path, journal, n_bytes);
        journal[at] ^= (uint8_t)(1U << (at % 8U));
        worker = make_worker();
        bool is_kept[N_SESSIONS];
        assert_int_equal(fv_worker_model(worker, &model), FV_OK);
        for (uint32_t s = 0; s < N_SESSIONS; s++) {
            is_kept[s] = keep(worker, s, 0) == FV_OK;
            n_kept += is_kept[s] ? 1U : 0U;
            n_refused += is_kept[s] ? 0U : 1U;
        }
        assert_int_equal(fv_worker_keep_end(worker), FV_OK);
        for (uint32_t s = 0; s < N_SESSIONS; s++) {
            if (is_kept[s]) {
                query(worker, s, after);
                assert_memory_equal(after, before[s], sizeof(after));
            }
        }
        fv_worker_destroy(worker);
    }
    assert_true(n_kept >
                0U); /* damage concerns one session, and its forks; that of the model all */
    assert_true(n_refused > 0U);
    worker = make_worker();
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
        cmocka_unit_test(test_outlives_its_host_in_place),
        cmocka_unit_test(test_outlives_its_host_from_a_mirror),
        cmocka_unit_test(test_a_disk_comes_later),
        cmocka_unit_test(test_a_damaged_disk_never_changes_an_answer),
    };

    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
