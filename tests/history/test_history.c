/*
 * test_history.c - the history check: random clients against the real service and a small model of it.
 *
 * Goal:   whatever clients send, repeat, fork, cut, cancel and leave: each answer is what a model of a few lines says, its
 *         attention is right, refusals change nothing; at the end the service lists exactly the model's sessions, and when they
 *         are closed all KV memory is free.
 * Method: a fovead of the test's own; each client is a thread with sessions of its own and up to eight requests in flight.
 *         FV_HISTORY_OPERATIONS (a million: about ten minutes), FV_HISTORY_CLIENTS. Under fovead-run (FV_TEST_LAUNCH)
 *         FV_HISTORY_KILL_MS kills some rank, rank 0 too, that often: at least once, or the test fails.
 */
#include "tests/client/fovead.h"
#include "tests/history/history.h"
#include "tests/support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static hs_world_t g_world;
static hs_actor_t g_actors[HS_ACTORS_MAX];

static uint64_t setting(const char *name, uint64_t fallback)
{
    const char *text = getenv(name);

    return (text != NULL) ? strtoull(text, NULL, 10) : fallback;
}

static int64_t now_ms(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* ------------------------------------------------------------------ before and after */

static void register_model(fovea_client_t *client)
{
    fovea_model_spec_t spec = {.name = "history",
                               .n_layers = HS_LAYERS,
                               .n_q_heads = HS_Q_HEADS,
                               .n_kv_heads = 1,
                               .head_dim_qk = HS_DIM,
                               .head_dim_v = HS_DIM,
                               .kv_dtype = FOVEA_DTYPE_F32};
    fovea_model_t model;
    fovea_error_t error;

    if (fovea_register_model(client, &spec, 0, &model, &error) != FOVEA_OK) {
        fail_msg("%s", error.message);
    }
    memcpy(g_world.model_id, model.model_id, sizeof(g_world.model_id));
}

static hs_session_t *find(const fovea_session_id_t *id, uint64_t n_clients)
{
    for (uint64_t i = 0; i < n_clients; i++) {
        for (int k = 0; k < HS_SESSIONS_MAX; k++) {
            hs_session_t *s = &g_actors[i].sessions[k];
            if (s->is_open && (memcmp(&s->id, id, sizeof(*id)) == 0)) {
                return s;
            }
        }
    }
    return NULL;
}

static void check_listed(const fovea_session_info_t *info, uint64_t n_clients, uint64_t *n_unknown)
{
    hs_session_t *s = find(&info->session, n_clients);

    if (s == NULL) {
        (*n_unknown)++;
        return;
    }
    assert_false(s->is_busy); /* listed twice */
    s->is_busy = true;
    for (int i = 0; i < HS_LAYERS; i++) {
        assert_int_equal(info->layer_tokens[i], s->layers[i].n_tokens);
    }
}

/* The service lists the model's sessions, each once; closes them all. */
static void check_list(fovea_client_t *client, uint64_t n_clients)
{
    fovea_session_list_t list = {0};
    fovea_error_t error;
    uint64_t n_unknown = 0;
    uint64_t n_listed = 0;
    uint64_t n_open = 0;

    do {
        fovea_list_options_t options = {.page_size = 7, .page_token = list.next_page_token};
        fovea_session_list_t next = {0};
        if (fovea_list_sessions(client, &options, 0, &next, &error) != FOVEA_OK) {
            fail_msg("ListSessions: %s", error.message);
        }
        fovea_session_list_free(&list);
        list = next;
        for (uint32_t i = 0; i < list.n_sessions; i++) {
            check_listed(&list.sessions[i], n_clients, &n_unknown);
            n_listed++;
        }
    } while (list.next_page_token[0] != '\0');
    fovea_session_list_free(&list);
    for (uint64_t i = 0; i < n_clients; i++) {
        for (int k = 0; k < HS_SESSIONS_MAX; k++) {
            n_open += g_actors[i].sessions[k].is_open ? 1U : 0U;
        }
    }
    assert_int_equal(n_listed - n_unknown, n_open);
    assert_true(n_unknown <= atomic_load(&g_world.n_unknown));
}

static void close_all(fovea_client_t *client)
{
    fovea_session_list_t list = {0};
    fovea_error_t error;

    do {
        fovea_session_list_free(&list);
        if (fovea_list_sessions(client, NULL, 0, &list, &error) != FOVEA_OK) {
            fail_msg("ListSessions: %s", error.message);
        }
        for (uint32_t i = 0; i < list.n_sessions; i++) {
            if (fovea_close_session(client, &list.sessions[i].session, 0, &error) != FOVEA_OK) {
                fail_msg("CloseSession: %s", error.message);
            }
        }
    } while (list.n_sessions > 0);
    fovea_session_list_free(&list);
}

static void check_empty(fovea_client_t *client)
{
    fovea_cluster_status_t status = {0};
    fovea_error_t error;

    if (fovea_get_status(client, 0, &status, &error) != FOVEA_OK) {
        fail_msg("GetStatus: %s", error.message);
    }
    assert_int_equal(status.n_sessions, 0);
    for (uint32_t r = 0; r < status.n_ranks; r++) {
        assert_int_equal(status.ranks[r].kv_bytes_free, status.ranks[r].kv_bytes_total);
    }
    fovea_cluster_status_free(&status);
}

/* ------------------------------------------------------------------ the history */

static void nap(long ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = (ms % 1000) * 1000000};

    (void)nanosleep(&t, NULL);
}

/* While there are operations left. */
static int kill_now_and_then(const fv_fovead_t *fovead, uint64_t interval_ms)
{
    fv_random_t random = {.state = interval_ms};
    int64_t last_ms = now_ms();
    int n_killed = 0;

    while ((atomic_load(&g_world.n_left) > 0) && !atomic_load(&g_world.has_failed)) {
        nap(50);
        if ((interval_ms > 0) && (now_ms() - last_ms > (int64_t)interval_ms)) {
            last_ms = now_ms();
            n_killed += (hs_kill_some_rank(fovead->pid, &random) >= 0) ? 1 : 0;
        }
    }
    return n_killed;
}

static void tell(uint64_t n_operations, uint64_t n_clients, int n_killed, int64_t ms)
{
    print_message(
        "%llu operations of %llu clients in %.1f s: %llu served and compared, %llu "
        "refused, %llu for want of memory; %llu repeated, %llu forks, %llu cuts, %llu "
        "streams cancelled, %llu clients vanished, %llu answers unsure; %d ranks killed\n",
        (unsigned long long)n_operations, (unsigned long long)n_clients, (double)ms / 1000.0,
        (unsigned long long)atomic_load(&g_world.n_served),
        (unsigned long long)atomic_load(&g_world.n_refused),
        (unsigned long long)atomic_load(&g_world.n_exhausted),
        (unsigned long long)atomic_load(&g_world.n_repeats),
        (unsigned long long)atomic_load(&g_world.n_forks),
        (unsigned long long)atomic_load(&g_world.n_cuts),
        (unsigned long long)atomic_load(&g_world.n_cancels),
        (unsigned long long)atomic_load(&g_world.n_vanished),
        (unsigned long long)atomic_load(&g_world.n_unsure), n_killed);
}

static void test_history(void **state)
{
    uint64_t n_operations = setting("FV_HISTORY_OPERATIONS", 8000);
    uint64_t n_clients = setting("FV_HISTORY_CLIENTS", 3);
    uint64_t kill_ms = setting("FV_HISTORY_KILL_MS", 0);
    uint64_t seed = fv_random_seed(1);
    fovea_client_t *client = NULL;
    fv_fovead_t fovead;
    char kv_memory[24]; /* that is sometimes too little */
    const char *const options[] = {"--kv-memory", kv_memory, "--threads", "1",
                                   "--log-level", "warn",    NULL};

    (void)state;
    (void)snprintf(kv_memory, sizeof(kv_memory), "%llum",
                   (unsigned long long)((n_clients + 2U) / 3U));
    assert_true((n_clients >= 1) && (n_clients <= HS_ACTORS_MAX));
    assert_true(fv_fovead_start(&fovead, options));
    assert_int_equal(
        fovea_connect(fovead.address, &(fovea_options_t){.retry_ms = 60000}, &client, NULL),
        FOVEA_OK);
    register_model(client);
    g_world.address = fovead.address;
    g_world.has_kills = kill_ms > 0;
    atomic_store(&g_world.n_left, n_operations);
    int64_t begin_ms = now_ms();
    for (uint64_t i = 0; i < n_clients; i++) {
        g_actors[i].world = &g_world;
        g_actors[i].number = (uint32_t)i;
        g_actors[i].next_token = (uint32_t)i << 28;
        g_actors[i].random.state = seed * 1000U + i;
        assert_int_equal(pthread_create(&g_actors[i].thread, NULL, hs_actor_run, &g_actors[i]), 0);
    }
    int n_killed = kill_now_and_then(&fovead, kill_ms);
    for (uint64_t i = 0; i < n_clients; i++) {
        (void)pthread_join(g_actors[i].thread, NULL);
    }
    tell(n_operations, n_clients, n_killed, now_ms() - begin_ms);
    if (!atomic_load(&g_world.has_failed)) {
        check_list(client, n_clients);
        close_all(client);
        check_empty(client);
    }
    fovea_close(client);
    bool is_stopped = fv_fovead_stop(&fovead);
    if (atomic_load(&g_world.has_failed)) {
        fail_msg("%s", g_world.failure);
    }
    if ((kill_ms > 0) && (n_killed == 0)) {
        fail_msg("FV_HISTORY_KILL_MS: given %llu, and nobody was killed; expected ranks below a "
                 "launcher (FV_TEST_LAUNCH), and more operations than end in that time",
                 (unsigned long long)kill_ms);
    }
    assert_true(is_stopped);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_history),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
