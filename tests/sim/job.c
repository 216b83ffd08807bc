/*
 * job.c - the processes of a job, as mpirun starts them, and fovead-run starts them again.
 *
 * Each runs the real code of its role. What main.c and bootstrap_mpi.c do before that (joining, agreeing, meeting) is told
 * in few words here: it happens before anybody is served, and has tests of its own.
 */
#include "tests/sim/job.h"

#include "common/deadline.h"
#include "coord/bootstrap.h"
#include "coord/main_coordinator.h"
#include "coord/main_exit.h"
#include "coord/main_parts.h"
#include "coord/main_ranks.h"
#include "coord/main_recruit.h"
#include "coord/main_worker.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define START_MS 2000

static struct {
    sim_job_config_t config;
    uint32_t n_world, n_starts;
    fv_process_t *processes[SIM_PROCESSES_MAX];
    fv_ctl_hello_t hellos[SIM_PROCESSES_MAX];
    int fds[SIM_PROCESSES_MAX][2], beat_fds[SIM_PROCESSES_MAX][2];
    bool is_here[SIM_PROCESSES_MAX], is_met;
    bool is_recruit[SIM_PROCESSES_MAX];
    bool may_lose, has_fault, is_over;
    uint32_t slot_hosts[SIM_PROCESSES_MAX]; /* where a rank's files are the newest */
    int codes[SIM_PROCESSES_MAX];
} j;

static fv_backend_ops_t s_backend; /* fv_backend_null, but its work takes time */

static fv_status_t attend(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items)
{
    (void)backend;
    (void)items;
    (void)n_items;
    sim_block(sim_now_us() + sim_pick(5, 400));
    return FV_OK;
}

/* ------------------------------------------------------------------ a process */

void sim_job_name_host(uint32_t number, char out[64])
{
    (void)snprintf(out, 64, "host%u", sim_process_host(number));
}

/* Every process reports here; rank 0 connects them. */
fv_status_t fv_bootstrap(void *mpi_comm,
                         const char *control_address,
                         uint32_t epoch,
                         fv_ctl_hello_t *hello,
                         int *out_fds,
                         int *out_beat_fds,
                         fv_ctl_hello_t *out_hellos)
{
    uint32_t own = sim_process_number(sim_current());

    (void)mpi_comm;
    (void)control_address;
    (void)epoch;
    sim_job_name_host(own, hello->host);
    j.hellos[own] = *hello;
    j.is_here[own] = true;
    for (uint32_t i = 0; i < j.n_world; i++) {
        while ((own == 0) ? !j.is_here[i] : !j.is_met) {
            sim_block(sim_now_us() + 500);
        }
    }
    for (uint32_t i = 0; i < j.n_world; i++) {
        out_fds[i] = -1;
        out_beat_fds[i] = -1;
    }
    if (own != 0) {
        out_fds[0] = j.fds[own][1];
        out_beat_fds[0] = j.beat_fds[own][1];
        return FV_OK;
    }
    for (uint32_t i = 1; i < j.n_world; i++) {
        if (sim_process(i) == NULL) {
            return fv_fail(FV_ERR_TIMED_OUT, "process %u did not come", i);
        }
        sim_connect(sim_current(), sim_process(i), j.fds[i]);
        sim_connect(sim_current(), sim_process(i), j.beat_fds[i]);
        sim_laws_watch((j.fds[i][0] - SIM_FDS_FROM) / 2, i);
        out_fds[i] = j.fds[i][0];
        out_beat_fds[i] = j.beat_fds[i][0];
    }
    memcpy(out_hellos, j.hellos, j.n_world * sizeof(*out_hellos));
    j.is_met = true;
    return FV_OK;
}

static void configure(fv_process_t *p, uint32_t number)
{
    fv_config_t *c = &p->config;

    fv_config_defaults(c);
    c->listen.n = 1;
    (void)snprintf(c->listen.text[0], sizeof(c->listen.text[0]), "unix:/sim");
    (void)snprintf(c->durability, sizeof(c->durability), "%s",
                   j.config.is_durable ? "process" : "none");
    (void)snprintf(c->store_dir, sizeof(c->store_dir), "%s/host%u", j.config.dir,
                   sim_process_host(number));
    (void)snprintf(c->job, sizeof(c->job), "sim");
    (void)snprintf(c->tokens, sizeof(c->tokens), "%s/../tokens", j.config.dir);
    c->threads = 1;
    c->dedicated_coordinator = j.config.is_dedicated;
    c->spares = (int32_t)j.config.n_spares;
    c->shard_tokens = 64;
    c->prefill_tokens_per_step = j.config.prefill_tokens_per_step;
    c->step_deadline_ms = 3000;
    c->heartbeat_ms = 100;
    c->heartbeat_misses = 5;
    c->repair_deadline_ms = 2000;
    c->request_memory = (uint64_t)16 << 20;
    c->sessions_max = 64;
}

/* As main.c and its parts do it. */
static fv_status_t start_parts(fv_process_t *p)
{
    fv_exchange_mpi_t *exchange = NULL;

    fv_crew_init(&p->crew, (uint32_t)p->n_ranks, (uint32_t)p->n_world, FV_MAIN_EPOCH);
    p->crew.deadline_ms = (uint32_t)p->config.repair_deadline_ms;
    p->crew.lost_code = FV_EXIT_RANK_LOST;
    p->crew.config = &p->config;
    p->crew.may_recruit = fv_recruit_is_possible(&p->config);
    p->crew.exchange = &p->exchange;
    p->exchange = (fv_main_exchange_t){.name = "none", .text = "none"};
    FV_RETURN_IF_ERR(fv_main_store_open(&p->config, p->config.job, (uint32_t)p->rank,
                                        (uint32_t)p->n_ranks, &p->store));
    if (fv_main_is_spare(p)) {
        p->hello = (fv_ctl_hello_t){.rank = (uint32_t)p->rank, .backend = "spare"};
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_crew_make_comm(&p->crew, (uint32_t)p->rank));
    FV_RETURN_IF_ERR(fv_exchange_mpi_create(&p->crew.comm, &exchange));
    p->exchange.ops = &fv_exchange_mpi_ops;
    p->exchange.ctx = exchange;
    p->exchange.name = "mpi";
    return fv_main_start_worker(p, j.config.kv_bytes, 1);
}

static int run(sim_process_t *process)
{
    uint32_t number = sim_process_number(process);
    fv_process_t *p = calloc(1, sizeof(*p));

    FV_ASSERT(p != NULL);
    j.processes[number] = p;
    configure(p, number);
    p->has_mpi = true;
    p->rank = (int)number;
    p->n_world = (int)j.n_world;
    p->n_ranks = (int)j.config.n_ranks;
    p->n_local_ranks = 1;
    p->is_with_coordinator = sim_process_host(number) == sim_process_host(0);
    p->backend = &s_backend;
    if (j.is_recruit[number]) {
        p->is_recruit = true;
        return fv_main_run_worker(p);
    }
    fv_deadline_arm(START_MS, FV_EXIT_START, "start");
    fv_status_t status = start_parts(p);
    if (status == FV_OK) {
        status = fv_main_meet(p);
    }
    if (status != FV_OK) {
        sim_say("process %u: no start: %s", number, fv_error_context());
        return FV_EXIT_START;
    }
    fv_deadline_disarm();
    return (number == 0) ? fv_main_run_coordinator(p, -1) : fv_main_run_worker(p);
}

/* ------------------------------------------------------------------ the job */

static void end_process(uint32_t number, int code);

/* Ranks back on their own hosts. A slot whose newest files lie elsewhere has lost what it held. */
static void start_all(void *a, uint64_t b)
{
    (void)a;
    (void)b;
    j.n_starts++;
    g_sim_counts.n_starts++;
    j.is_met = false;
    j.has_fault = false;
    memset(j.is_here, 0, sizeof(j.is_here));
    sim_say("the job starts, %u. time", j.n_starts);
    for (uint32_t i = 0; i < j.n_world; i++) {
        uint32_t host = i % j.config.n_hosts;
        if (j.slot_hosts[i] != host) {
            j.may_lose = true;
            j.slot_hosts[i] = host;
        }
        j.codes[i] = -2;
        j.is_recruit[i] = false;
        (void)sim_process_start(i, host, run, end_process);
    }
}

/* On the host of whom it replaces. */
void sim_job_start_recruit(uint32_t number)
{
    sim_say("process %u is started anew", number);
    j.is_recruit[number] = true;
    j.codes[number] = -2;
    (void)sim_process_start(number, sim_process_host(number), run, end_process);
}

static void kill_all(void *a, uint64_t n_starts)
{
    (void)a;
    for (uint32_t i = 0; (n_starts == j.n_starts) && (i < j.n_world); i++) {
        sim_kill(i);
    }
}

static void end_process(uint32_t number, int code)
{
    sim_say("process %u has ended, code %d", number, code);
    j.processes[number] = NULL;
    j.codes[number] = code;
    if ((code == FV_EXIT_START) && !j.has_fault) {
        sim_fail("process %u did not start, and nothing had happened", number);
    }
    if (code == FV_EXIT_SERVING) {
        sim_fail("process %u failed while serving", number);
    }
    if (number != 0) {
        return;
    }
    sim_door_drop();
    if (code == FV_EXIT_CLEAN) {
        j.is_over = true;
        return;
    }
    if (!j.has_fault) {
        sim_fail("the coordinator has left with %d, and nothing had happened", code);
    }
    sim_at(sim_now_us() + sim_pick(100, 5000), kill_all, NULL, j.n_starts);
    sim_at(sim_calm_us() + sim_pick(20000, 300000), start_all, NULL, 0);
}

void sim_job_begin(const sim_job_config_t *config)
{
    memset(&j, 0, sizeof(j));
    j.config = *config;
    j.n_world = config->n_ranks + config->n_spares;
    j.may_lose = !config->is_durable;
    sim_recruits_begin(config->has_recruits);
    s_backend = fv_backend_null;
    s_backend.attend = attend;
    for (uint32_t i = 0; i < j.n_world; i++) {
        j.slot_hosts[i] = i % config->n_hosts;
    }
    start_all(NULL, 0);
}

uint32_t sim_job_n_processes(void)
{
    return j.n_world;
}

uint32_t sim_job_n_starts(void)
{
    return j.n_starts;
}

fv_process_t *sim_job_process(uint32_t number)
{
    return sim_process_is_alive(number) ? j.processes[number] : NULL;
}

/* A spare on another host than the lost rank's files begins with nothing. */
void sim_job_note_rank(uint32_t rank, uint32_t process)
{
    uint32_t host = sim_process_host(process);

    if ((rank < j.config.n_ranks) && (host != j.slot_hosts[rank])) {
        j.may_lose = true;
        j.slot_hosts[rank] = host;
    }
}

bool sim_job_may_lose(void)
{
    return j.may_lose;
}

void sim_job_note_fault(void)
{
    j.has_fault = true;
}

bool sim_job_has_ended(void)
{
    for (uint32_t i = 0; i < j.n_world; i++) {
        if (sim_process_is_alive(i)) {
            return false;
        }
        if (j.is_over && !j.has_fault && (j.codes[i] != FV_EXIT_CLEAN)) {
            sim_fail("process %u left with %d after a drain", i, j.codes[i]);
        }
    }
    return j.is_over;
}
