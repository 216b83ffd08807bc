/*
 * recruit.c - coord/main_recruit.h without MPI_Comm_spawn: a process is started in a lost rank's place.
 *
 * It gets the number of whom it replaces, and the job's first communicator has its place, so there is no other base to move to.
 */
#include "common/deadline.h"
#include "coord/main_exit.h"
#include "coord/main_heartbeat.h"
#include "coord/main_parts.h"
#include "coord/main_recruit.h"
#include "tests/sim/job.h"

#include <stdlib.h>
#include <string.h>

#define TAG_RECRUITS (1 << 20)

static struct {
    bool is_on, is_met[SIM_PROCESSES_MAX], is_here[SIM_PROCESSES_MAX];
    fv_ctl_epoch_t epochs[SIM_PROCESSES_MAX];
    int fds[SIM_PROCESSES_MAX][2], beat_fds[SIM_PROCESSES_MAX][2];
} s;

void sim_recruits_begin(bool is_on)
{
    memset(&s, 0, sizeof(s));
    s.is_on = is_on;
}

bool fv_recruit_is_possible(const fv_config_t *config)
{
    (void)config;
    return s.is_on;
}

/* Where another rank of the host lives; and not too often, as the real one. One that is cut off, and lives, keeps its place. */
bool fv_recruit_can(fv_crew_t *crew, const bool *is_lost, uint32_t rank)
{
    if (!crew->may_recruit || sim_process_is_alive(crew->members[rank]) ||
        (++crew->n_recruited > 3U)) {
        return false;
    }
    for (uint32_t r = 0; r < crew->n_ranks; r++) {
        if (!is_lost[r] &&
            (sim_process_host(crew->members[r]) == sim_process_host(crew->members[rank]))) {
            return true;
        }
    }
    return false;
}

/* All ranks of the epoch. */
static fv_status_t make_comm(fv_crew_t *crew)
{
    MPI_Group group = MPI_GROUP_NULL;
    int members[SIM_PROCESSES_MAX] = {0};

    for (uint32_t r = 0; r < crew->n_ranks; r++) {
        members[r] = (int)crew->members[r];
    }
    (void)MPI_Group_incl(MPI_GROUP_EMPTY, (int)crew->n_ranks, members, &group);
    (void)MPI_Comm_create_group(crew->base, group, TAG_RECRUITS + (int)crew->epoch, &crew->comm);
    (void)MPI_Group_free(&group);
    return FV_OK;
}

static fv_status_t let_in(fv_crew_t *crew, uint32_t rank)
{
    uint32_t number = crew->members[rank];

    while (!s.is_here[number]) {
        sim_block(sim_now_us() + 500);
    }
    sim_process_t *recruit = sim_process(number);
    if (recruit == NULL) {
        return fv_fail(FV_ERR_TIMED_OUT, "process %u did not come", number);
    }
    sim_connect(sim_current(), recruit, s.fds[number]);
    sim_connect(sim_current(), recruit, s.beat_fds[number]);
    sim_laws_watch((s.fds[number][0] - SIM_FDS_FROM) / 2, number);
    crew->hellos[rank].pid = sim_process_pid(number);
    fv_link_replace(crew->link, rank, s.fds[number][0]);
    atomic_store(&crew->rank_of[number], rank);
    fv_heartbeat_replace(crew->heartbeat, number, s.beat_fds[number][0]);
    s.is_met[number] = true;
    return FV_OK;
}

fv_status_t fv_recruit_start(fv_crew_t *crew, MPI_Comm present, uint32_t own_rank)
{
    fv_status_t status = FV_OK;

    (void)present;
    for (uint32_t r = 1; (own_rank == 0U) && (r < crew->n_ranks); r++) {
        uint32_t number = crew->members[r];
        if (crew->is_recruit[r] != 0U) {
            s.is_met[number] = false;
            s.is_here[number] = false;
            fv_crew_tell(crew, r, &s.epochs[number]);
            sim_job_start_recruit(number);
        }
    }
    FV_RETURN_IF_ERR(make_comm(crew));
    for (uint32_t r = 1; (own_rank == 0U) && (r < crew->n_ranks) && (status == FV_OK); r++) {
        if (crew->is_recruit[r] != 0U) {
            status = let_in(crew, r);
        }
    }
    return status;
}

bool fv_recruit_is_one(void)
{
    return false; /* its main knows */
}

fv_status_t fv_recruit_join(fv_process_t *p, fv_ctl_epoch_t *out)
{
    uint32_t own = sim_process_number(sim_current());

    *out = s.epochs[own];
    p->crew.exchange = &p->exchange;
    fv_crew_init(&p->crew, out->n_ranks, (uint32_t)p->n_world, out->epoch);
    FV_RETURN_IF_ERR(fv_crew_adopt(&p->crew, out));
    p->rank = (int)out->rank;
    p->n_ranks = (int)out->n_ranks;
    FV_RETURN_IF_ERR(make_comm(&p->crew));
    FV_RETURN_IF_ERR(
        fv_main_store_open(&p->config, p->config.job, out->rank, out->n_ranks, &p->store));
    s.is_here[own] = true;
    while (!s.is_met[own]) {
        sim_block(sim_now_us() + 500);
    }
    p->fds = calloc(1, sizeof(*p->fds));
    p->beat_fds = calloc(1, sizeof(*p->beat_fds));
    FV_ASSERT((p->fds != NULL) && (p->beat_fds != NULL));
    p->fds[0] = s.fds[own][1];
    p->beat_fds[0] = s.beat_fds[own][1];
    sim_job_name_host(own, p->hello.host);
    FV_RETURN_IF_ERR(fv_main_heartbeat_start(&p->config, p->rank, 1, p->beat_fds, NULL,
                                             FV_EXIT_FENCED, &p->heartbeat));
    return fv_main_exchange_renew(&p->crew.comm, &p->exchange);
}
