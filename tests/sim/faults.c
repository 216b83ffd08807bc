/*
 * faults.c - processes die at a random moment or at a random system call, stop for a while, are cut off; networks are slow.
 */
#include "common/fault.h"
#include "tests/sim/job.h"

static uint32_t s_n_hosts;
static uint32_t
    s_n_messages; /* the last of so many that are no STEP is its receiver's death; 0: none */
static sim_plan_t s_plan;
static uint32_t s_n_epochs, s_second; /* EPOCH messages; to whom the second one went */

/* The ten stations of a step are places to die at, as system calls are. */
static void on_station(int station)
{
    (void)station;
    sim_call();
}

static uint32_t some_process(void)
{
    uint32_t n = sim_job_n_processes();

    return sim_chance(4) ? 0U : (uint32_t)sim_pick(0, (int64_t)n - 1); /* rank 0 more often */
}

static void kill_coordinator(void *a, uint64_t b)
{
    (void)a;
    (void)b;
    if (sim_process_is_alive(0)) {
        sim_say("fault: process 0 is killed");
        sim_job_note_fault();
        g_sim_counts.n_kills++;
        sim_kill(0);
    }
}

static void let_die(uint32_t process, uint32_t n_calls)
{
    if (sim_process_is_alive(process)) {
        sim_say("fault: process %u dies over a message, at its %u. call", process, n_calls);
        sim_job_note_fault();
        g_sim_counts.n_kills++;
        sim_kill_after(process, n_calls);
    }
}

/* It has the epoch's communicator, as the others have, and has not said so. */
static void on_comm(uint32_t process)
{
    if (s_plan.has_second && (process == s_second) && (s_n_epochs >= 2)) {
        s_plan.has_second = false;
        let_die(process, 1);
    }
}

void sim_faults_on_message(uint32_t process, uint16_t type)
{
    if ((s_plan.type == type) && (s_plan.nth > 0) && (--s_plan.nth == 0)) {
        let_die(process, s_plan.n_calls);
        if (!s_plan.has_second) {
            sim_at(sim_now_us() + 400000, kill_coordinator, NULL, 0);
        }
    }
    s_n_epochs += (type == FV_CTL_EPOCH) ? 1U : 0U;
    s_second = ((type == FV_CTL_EPOCH) && (s_n_epochs == 2)) ? process : s_second;
    if ((type != FV_CTL_STEP) && (s_n_messages > 0) && (--s_n_messages == 0)) {
        let_die(process, (uint32_t)sim_pick(1, 30));
    }
}

static void strike(void *a, uint64_t b)
{
    uint32_t number = some_process();
    int64_t dice = sim_pick(0, 99);

    (void)a;
    (void)b;
    if (sim_process_is_alive(number)) {
        sim_job_note_fault();
        if (dice < 10) {
            s_n_messages = (uint32_t)sim_pick(1, 20);
        } else if (dice < 30) {
            sim_say("fault: process %u is killed", number);
            g_sim_counts.n_kills++;
            sim_kill(number);
        } else if (dice < 60) {
            uint32_t n_calls = (uint32_t)sim_pick(1, sim_chance(2) ? 60 : 1500);
            sim_say("fault: process %u dies at its %u. call from now", number, n_calls);
            g_sim_counts.n_kills++;
            sim_kill_after(number, n_calls);
        } else if (dice < 80) {
            int64_t length_us = sim_pick(1000, 2 * SIM_SECOND);
            sim_say("fault: process %u stops for %lld ms", number, (long long)length_us / 1000);
            g_sim_counts.n_stops++;
            sim_stop_until(number, sim_now_us() + length_us);
        } else if (s_n_hosts > 1) {
            uint32_t host = (uint32_t)sim_pick(0, (int64_t)s_n_hosts - 1);
            int64_t length_us = sim_pick(1000, 12 * SIM_SECOND);
            sim_say("fault: host %u is cut off for %lld ms", host, (long long)length_us / 1000);
            g_sim_counts.n_partitions++;
            sim_partition(host, sim_now_us() + length_us);
        }
    }
}

static void calm_down(void *a, uint64_t b)
{
    (void)a;
    (void)b;
    s_n_messages = 0;
    for (uint32_t i = 0; i < sim_job_n_processes(); i++) {
        sim_kill_after(i, 0);
    }
}

void sim_faults_begin(const sim_job_config_t *config, const sim_plan_t *plan, int64_t until_us)
{
    s_n_epochs = 0;
    s_plan = (plan != NULL) ? *plan : (sim_plan_t){0};
    s_n_hosts = config->n_hosts;
    fv_fault_hook = on_station;
    s_n_messages = 0;
    if (plan != NULL) {
        sim_mpi_on_comm(on_comm);
        return;
    }
    if (sim_chance(4)) { /* at the very beginning, too */
        s_n_messages = (uint32_t)sim_pick(1, 12);
    }
    if (sim_chance(4)) {
        sim_set_delay(1000, sim_pick(2000, 200000)); /* a slow network between hosts */
    }
    for (int64_t n = sim_pick(0, 5); n > 0; n--) {
        sim_at(sim_pick(sim_now_us(), until_us), strike, NULL, 0);
    }
    sim_at(until_us + 1, calm_down, NULL, 0);
}
