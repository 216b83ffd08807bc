/*
 * story.c - one seed: a job, its clients, its faults; at the end nothing is left, and all leave as they should.
 */
#define _GNU_SOURCE

#include "common/log.h"
#include "tests/sim/job.h"

#include <ftw.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define STORY_US   (600 * SIM_SECOND) /* of virtual time: then it hangs */
#define CLIENTS    4
#define LIST_BYTES 64

static struct {
    uint64_t seed;
    bool is_told;
    char base[64], dir[96];
    uint32_t principal; /* whose sessions are closed */
    fv_list_response_t left;
    bool has_left, is_done;
    uint32_t n_next;
} s;

void sim_fail(const char *format, ...)
{
    va_list list;

    (void)fprintf(stderr, "FV_SEED=%llu: after %.6f s: ", (unsigned long long)s.seed,
                  (double)sim_now_us() / 1e6);
    va_start(list, format);
    (void)vfprintf(stderr, format, list);
    va_end(list);
    (void)fprintf(stderr, "\n");
    abort();
}

void sim_say(const char *format, ...)
{
    va_list list;

    if (s.is_told) {
        (void)fprintf(stderr, "%10.6f  ", (double)sim_now_us() / 1e6);
        va_start(list, format);
        (void)vfprintf(stderr, format, list);
        va_end(list);
        (void)fprintf(stderr, "\n");
    }
}

/* ------------------------------------------------------------------ files */

static int remove_one(const char *path, const struct stat *info, int kind, struct FTW *at)
{
    (void)info;
    (void)kind;
    (void)at;
    return remove(path);
}

static void make_dir(const char *path)
{
    if (mkdir(path, 0700) != 0) {
        sim_fail("mkdir %s", path);
    }
}

/* For what outlives processes; and who may call, with quotas that are sometimes too small. */
static void make_dirs(void)
{
    char path[128];
    const char *root = (access("/dev/shm", W_OK) == 0) ? "/dev/shm" : "/tmp";

    (void)snprintf(s.base, sizeof(s.base), "%s/fovea-sim-XXXXXX", root);
    if (mkdtemp(s.base) == NULL) {
        sim_fail("mkdtemp %s", s.base);
    }
    (void)snprintf(s.dir, sizeof(s.dir), "%s/story", s.base);
    (void)snprintf(path, sizeof(path), "%s/tokens", s.base);
    FILE *file = fopen(path, "w");
    if (file == NULL) {
        sim_fail("%s", path);
    }
    for (int i = 0; i < SIM_PRINCIPALS; i++) {
        (void)fprintf(file, "p%d user sha256=%064x sessions=14 kv_bytes=%d\n", i, i + 1,
                      (i == 0) ? 300000 : 2000000);
    }
    (void)fclose(file);
    (void)chmod(path, 0600);
}

void sim_story_clean(void)
{
    if (s.base[0] != '\0') {
        (void)nftw(s.base, remove_one, 8, FTW_DEPTH | FTW_PHYS);
        s.base[0] = '\0';
    }
}

/* ------------------------------------------------------------------ the end */

static void sweep(void);

static void on_closed(void *arg, uint64_t tag, const sim_answer_t *answer)
{
    (void)arg;
    (void)tag;
    bool is_lost = (answer->code == 15) && sim_job_may_lose();
    if ((answer->code != 0) && (answer->code != 14) && (answer->code != 5) && !is_lost) {
        sim_fail("CloseSession answers %d: %s", answer->code, answer->text);
    }
    sweep();
}

static void on_listed(void *arg, uint64_t tag, const sim_answer_t *answer)
{
    (void)arg;
    (void)tag;
    if (answer->code == 0) {
        FV_ASSERT(fv_wire_list_response_decode(
                      (fv_span_t){.data = answer->data, .n_bytes = answer->n_bytes}, &s.left) ==
                  FV_OK);
        s.has_left = true;
        s.n_next = 0;
    }
    sweep();
}

static void send_close(const fv_session_id_t *id)
{
    fv_session_request_t request = {.session = *id};
    fv_bytes_t bytes = {0};
    sim_caller_t caller = {.on_answer = on_closed, .principal = s.principal};

    FV_ASSERT(fv_wire_close_request_encode(&request, &bytes) == FV_OK);
    (void)sim_door_send(FV_METHOD_CLOSE_SESSION, bytes.data, bytes.n_bytes, &caller);
    free(bytes.data);
}

/* Sessions whose opening was never answered are nobody's: closed one by one, until each principal's list is empty. */
static void sweep(void)
{
    fv_list_request_t request = {.page_size = LIST_BYTES};
    fv_bytes_t bytes = {0};
    sim_caller_t caller = {.on_answer = on_listed};

    if (s.has_left && (s.n_next < s.left.n_sessions)) {
        send_close(&s.left.sessions[s.n_next++].session);
        return;
    }
    if (s.has_left) {
        s.principal += (s.left.n_sessions == 0) ? 1U : 0U;
        s.has_left = false;
        fv_list_response_free(&s.left);
    }
    if (s.principal == SIM_PRINCIPALS) {
        s.is_done = true;
        return;
    }
    caller.principal = s.principal;
    FV_ASSERT(fv_wire_list_request_encode(&request, &bytes) == FV_OK);
    (void)sim_door_send(FV_METHOD_LIST_SESSIONS, bytes.data, bytes.n_bytes, &caller);
    free(bytes.data);
}

static bool is_swept(void)
{
    return s.is_done;
}

static void drain(void);

static void drain_again(void *a, uint64_t b)
{
    (void)a;
    (void)b;
    if (!sim_job_has_ended()) {
        drain();
    }
}

/* It may be lost when the coordinator leaves; or the job is being started again. */
static void on_drained(void *arg, uint64_t tag, const sim_answer_t *answer)
{
    (void)arg;
    (void)tag;
    if (answer->code != 0) {
        sim_at(sim_now_us() + SIM_SECOND, drain_again, NULL, 0);
    }
}

static void drain(void)
{
    uint32_t timeout_ms = 0;
    fv_bytes_t bytes = {0};
    sim_caller_t caller = {.on_answer = on_drained};

    FV_ASSERT(fv_wire_drain_request_encode(&timeout_ms, &bytes) == FV_OK);
    (void)sim_door_send(FV_METHOD_DRAIN, bytes.data, bytes.n_bytes, &caller);
    free(bytes.data);
}

static bool never(void)
{
    return false;
}

/* ------------------------------------------------------------------ a story */

static void run_until(bool (*is_over)(void), const char *what)
{
    if (!sim_run(is_over, sim_now_us() + STORY_US)) {
        sim_fail("%s does not end", what);
    }
}

static sim_job_config_t make_config(void)
{
    static const int32_t pieces[] = {0, 32, 64, 100};

    return (sim_job_config_t){.n_ranks = (uint32_t)sim_pick(2, 4),
                              .n_spares = (uint32_t)sim_pick(0, 2),
                              .n_hosts = sim_chance(3) ? (uint32_t)sim_pick(2, 3) : 1U,
                              .is_durable = !sim_chance(8),
                              .is_dedicated = sim_chance(6),
                              .has_recruits = sim_chance(2),
                              .kv_bytes = (uint64_t)sim_pick(1, 4) << 17,
                              .prefill_tokens_per_step = pieces[sim_pick(0, 3)],
                              .dir = s.dir};
}

/* Partitions are over, and what they led to. */
static int64_t end_of_faults(const sim_job_config_t *config, int64_t calm_us)
{
    int64_t until_us = (sim_calm_us() > calm_us) ? sim_calm_us() : calm_us;

    return until_us + ((config->n_hosts > 1U) ? 6 : 1) * SIM_SECOND;
}

void sim_story(uint64_t seed, const sim_plan_t *plan)
{
    s.seed = seed;
    s.is_told = getenv("FV_SIM_TELL") != NULL;
    fv_log_level_now = s.is_told ? FV_LOG_DEBUG : FV_LOG_ERROR;
    if (s.base[0] == '\0') {
        make_dirs();
    }
    make_dir(s.dir);
    sim_world_begin(seed);
    sim_laws_begin();
    sim_door_begin();
    sim_job_config_t config = make_config();
    if (plan != NULL) {
        config.n_ranks = 3;
        config.n_spares = plan->has_second ? 2 : 1;
        config.n_hosts = 1;
        config.is_durable = true;
    }
    if (plan != NULL) {
        sim_say("plan: message %u of type %u, call %u", plan->nth, plan->type, plan->n_calls);
    }
    sim_say("%u ranks, %u spares, %u hosts, %s", config.n_ranks, config.n_spares, config.n_hosts,
            config.is_durable ? "durable" : "not durable");
    sim_job_begin(&config);
    int64_t calm_us = sim_now_us() + sim_pick(1, 8) * SIM_SECOND / 2;
    sim_faults_begin(&config, plan, calm_us);
    sim_clients_begin(CLIENTS, (uint32_t)sim_pick(5, 40) * 3U / 5U);
    run_until(sim_clients_are_done, "a client's story");
    s.principal = 0;
    s.has_left = false;
    s.is_done = false;
    sweep();
    run_until(is_swept, "closing what is left");
    (void)sim_run(never, end_of_faults(&config, calm_us));
    s.is_done = false;
    s.principal = 0;
    sweep();
    run_until(is_swept, "looking for what is left");
    (void)sim_run(never, sim_now_us() + SIM_SECOND);
    sim_laws_check_quiet(true);
    drain();
    run_until(sim_job_has_ended, "the drain");
    sim_world_end();
    sim_door_end();
    (void)nftw(s.dir, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}
