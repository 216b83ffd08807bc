/*
 * main_recruit.c - MPI_Comm_spawn and what comes after it, on all three sides.
 */
#define _GNU_SOURCE /* readlink */

#include "coord/main_recruit.h"

#include "common/clock.h"
#include "common/deadline.h"
#include "common/log.h"
#include "common/secret.h"
#include "coord/bootstrap.h"
#include "coord/main_exit.h"
#include "coord/main_heartbeat.h"
#include "coord/main_parts.h"

#include <mpi.h>

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A crash loop is for whoever starts the job. */
#define RECRUITS_MAX 30U
#define WINDOW_US    ((int64_t)60 * 1000 * 1000)
#define TAG_TERMS    77

/* What rank 0 tells a recruit. Plain data, sent as bytes. */
typedef struct terms {
    fv_ctl_epoch_t epoch;
    fv_meeting_t meeting;
    uint32_t n_world;
    char job[FV_JOURNAL_JOB_BYTES];
} terms_t;

static fv_status_t mpi_error(const char *call, int rc)
{
    char text[MPI_MAX_ERROR_STRING] = "";
    int n = 0;

    (void)MPI_Error_string(rc, text, &n);
    return fv_fail(FV_ERR_MPI, "%s: %s", call, text);
}

/* ------------------------------------------------------------------ whether */

bool fv_recruit_is_possible(const fv_config_t *config)
{
    /* NOLINTNEXTLINE(concurrency-mt-unsafe): nobody sets it */
    const char *recovery = getenv("OMPI_MCA_orte_enable_recovery");

    return config->respawn && (recovery != NULL) && (strcmp(recovery, "1") == 0);
}

static bool is_host_alive(const fv_crew_t *crew, const bool *is_lost, uint32_t rank)
{
    for (uint32_t r = 0; r < crew->n_ranks; r++) {
        if (!is_lost[r] && (strcmp(crew->hellos[r].host, crew->hellos[rank].host) == 0)) {
            return true;
        }
    }
    return false;
}

bool fv_recruit_can(fv_crew_t *crew, const bool *is_lost, uint32_t rank)
{
    int64_t now_us = fv_clock_us();

    if (!crew->may_recruit || !is_host_alive(crew, is_lost, rank)) {
        return false;
    }
    if (now_us - crew->recruited_us > WINDOW_US) {
        crew->recruited_us = now_us;
        crew->n_recruited = 0;
    }
    return ++crew->n_recruited <= RECRUITS_MAX;
}

/* ------------------------------------------------------------------ starting */

/* One command for each recruit, on the host of whom it replaces. */
typedef struct commands {
    int n;
    char program[4096];
    char *programs[FV_REPAIRED_MAX];
    char **argvs[FV_REPAIRED_MAX];
    int counts[FV_REPAIRED_MAX];
    MPI_Info infos[FV_REPAIRED_MAX];
} commands_t;

static bool is_one_host(const fv_crew_t *crew)
{
    for (uint32_t r = 1; r < crew->n_ranks; r++) {
        if (strcmp(crew->hellos[r].host, crew->hellos[0].host) != 0) {
            return false;
        }
    }
    return true;
}

static fv_status_t make_commands(const fv_crew_t *crew, commands_t *out)
{
    ssize_t n = readlink("/proc/self/exe", out->program, sizeof(out->program) - 1U);
    bool is_near = is_one_host(crew);

    if (n <= 0) {
        return fv_fail(FV_ERR_SYSTEM, "/proc/self/exe can not be read");
    }
    for (uint32_t r = 0; r < crew->n_ranks; r++) {
        if (crew->is_recruit[r] == 0U) {
            continue;
        }
        out->programs[out->n] = out->program;
        out->argvs[out->n] = (char **)(uintptr_t)&crew->argv[1];
        out->counts[out->n] = 1;
        (void)MPI_Info_create(&out->infos[out->n]);
        if (!is_near) { /* (of one host mpirun may know another name than the host itself) */
            (void)MPI_Info_set(out->infos[out->n], "host", crew->hellos[r].host);
        }
        out->n++;
    }
    return FV_OK;
}

/* All that are present; rank 0 says what. How many there are is known to all. */
static fv_status_t spawn(const fv_crew_t *crew, MPI_Comm present, uint32_t own_rank, MPI_Comm *out)
{
    static commands_t commands; /* large; one thread */
    MPI_Comm children = MPI_COMM_NULL;
    int errors[FV_REPAIRED_MAX] = {0};
    fv_status_t status = FV_OK;

    memset(&commands, 0, sizeof(commands));
    if (own_rank == 0U) {
        status = make_commands(crew, &commands);
    }
    FV_RETURN_IF_ERR(status); /* the others' timers end their wait */
    int rc = MPI_Comm_spawn_multiple(commands.n, commands.programs, commands.argvs, commands.counts,
                                     commands.infos, 0, present, &children, errors);
    for (int i = 0; i < commands.n; i++) {
        (void)MPI_Info_free(&commands.infos[i]);
    }
    if (rc != MPI_SUCCESS) {
        return mpi_error("MPI_Comm_spawn_multiple", rc);
    }
    (void)MPI_Comm_set_errhandler(children, MPI_ERRORS_RETURN);
    rc = MPI_Intercomm_merge(children, 0, out);
    return (rc == MPI_SUCCESS) ? FV_OK : mpi_error("MPI_Intercomm_merge", rc);
}

/* ------------------------------------------------------------------ rank 0 */

/* In `merged` recruits come after those that were present, in the order of their ranks. */
static fv_status_t
send_terms(const fv_crew_t *crew, MPI_Comm merged, int n_present, const fv_meeting_t *meeting)
{
    static terms_t terms; /* large; one thread */
    int to = n_present;

    terms.meeting = *meeting;
    terms.n_world = crew->n_world;
    memcpy(terms.job, crew->job, sizeof(terms.job));
    for (uint32_t r = 1; r < crew->n_ranks; r++) {
        if (crew->is_recruit[r] == 0U) {
            continue;
        }
        fv_crew_tell(crew, r, &terms.epoch);
        int rc = MPI_Send(&terms, (int)sizeof(terms), MPI_BYTE, to++, TAG_TERMS, merged);
        if (rc != MPI_SUCCESS) {
            return mpi_error("MPI_Send", rc);
        }
    }
    fv_secret_wipe(&terms, sizeof(terms));
    return FV_OK;
}

/* Where recruits connect, and their hellos until they are ranks. Plain data but for one thread. */
typedef struct door {
    fv_meeting_t meeting;
    int listen_fd;
    int fds[FV_RANKS_MAX], beat_fds[FV_RANKS_MAX];
    fv_ctl_hello_t *hellos;
} door_t;

static fv_status_t let_in(fv_crew_t *crew, door_t *door)
{
    for (uint32_t r = 0; r < crew->n_ranks; r++) {
        door->fds[r] = (crew->is_recruit[r] != 0U) ? -1 : 0; /* 0: is not awaited */
        door->beat_fds[r] = door->fds[r];
    }
    FV_RETURN_IF_ERR(fv_bootstrap_accept(&door->meeting, door->listen_fd,
                                         crew->config->control_address, crew->epoch, crew->n_ranks,
                                         door->fds, door->beat_fds, door->hellos));
    for (uint32_t r = 1; r < crew->n_ranks; r++) {
        if (crew->is_recruit[r] == 0U) {
            continue;
        }
        uint32_t process = crew->members[r];
        crew->hellos[r].pid = door->hellos[r].pid; /* the rest comes with its HELLO */
        memcpy(crew->hellos[r].host, door->hellos[r].host, sizeof(crew->hellos[r].host));
        fv_link_replace(crew->link, r, door->fds[r]);
        atomic_store(&crew->rank_of[process], r);
        if (crew->heartbeat != NULL) {
            fv_heartbeat_replace(crew->heartbeat, process, door->beat_fds[r]);
        } else {
            (void)close(door->beat_fds[r]);
        }
    }
    return FV_OK;
}

/* ------------------------------------------------------------------ those that are left */

/* From here on everybody who may be a member is in the communicator of this epoch, in its place. */
static void move_base(fv_crew_t *crew)
{
    crew->base = crew->comm;
    for (uint32_t r = 0; r < crew->n_ranks; r++) {
        crew->seats[crew->members[r]] = r;
    }
}

static fv_status_t order(fv_crew_t *crew, MPI_Comm merged, uint32_t own_rank)
{
    int rc = MPI_Comm_split(merged, 0, (int)own_rank, &crew->comm);

    if (rc != MPI_SUCCESS) {
        return mpi_error("MPI_Comm_split", rc);
    }
    (void)MPI_Comm_set_errhandler(crew->comm, MPI_ERRORS_RETURN);
    move_base(crew);
    return FV_OK;
}

static fv_status_t
start_with(fv_crew_t *crew, MPI_Comm present, uint32_t own_rank, const fv_meeting_t *meeting)
{
    MPI_Comm merged = MPI_COMM_NULL;
    int n_present = 0;

    (void)MPI_Comm_size(present, &n_present);
    FV_RETURN_IF_ERR(spawn(crew, present, own_rank, &merged));
    if (meeting != NULL) {
        FV_RETURN_IF_ERR(send_terms(crew, merged, n_present, meeting));
    }
    return order(crew, merged, own_rank);
}

fv_status_t fv_recruit_start(fv_crew_t *crew, MPI_Comm present, uint32_t own_rank)
{
    static door_t door; /* large; one thread */

    if (own_rank != 0U) {
        return start_with(crew, present, own_rank, NULL);
    }
    door = (door_t){.hellos = calloc(crew->n_ranks, sizeof(*door.hellos))};
    if (door.hellos == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "a place for recruits");
    }
    fv_status_t status = fv_bootstrap_open(is_one_host(crew), crew->config->control_address,
                                           &door.meeting, &door.listen_fd);
    if (status == FV_OK) {
        status = start_with(crew, present, own_rank, &door.meeting);
        if (status == FV_OK) {
            status = let_in(crew, &door);
        } else {
            (void)close(door.listen_fd);
        }
    }
    fv_secret_wipe(&door.meeting, sizeof(door.meeting));
    free(door.hellos);
    return status;
}

/* ------------------------------------------------------------------ the recruit */

bool fv_recruit_is_one(void)
{
    MPI_Comm parent = MPI_COMM_NULL;

    return (MPI_Comm_get_parent(&parent) == MPI_SUCCESS) && (parent != MPI_COMM_NULL);
}

static fv_status_t hear_terms(fv_process_t *p, terms_t *terms)
{
    MPI_Comm parent = MPI_COMM_NULL;
    MPI_Comm merged = MPI_COMM_NULL;

    (void)MPI_Comm_get_parent(&parent);
    (void)MPI_Comm_set_errhandler(parent, MPI_ERRORS_RETURN);
    int rc = MPI_Intercomm_merge(parent, 1, &merged);
    if (rc != MPI_SUCCESS) {
        return mpi_error("MPI_Intercomm_merge", rc);
    }
    rc = MPI_Recv(terms, (int)sizeof(*terms), MPI_BYTE, 0, TAG_TERMS, merged, MPI_STATUS_IGNORE);
    if (rc != MPI_SUCCESS) {
        return mpi_error("MPI_Recv", rc);
    }
    if ((terms->n_world == 0U) || (terms->n_world > FV_RANKS_MAX)) {
        return fv_fail(FV_ERR_PROTOCOL, "a recruit's terms: %u processes", terms->n_world);
    }
    p->n_world = (int)terms->n_world;
    fv_crew_init(&p->crew, terms->epoch.n_ranks, terms->n_world, terms->epoch.epoch);
    FV_RETURN_IF_ERR(fv_crew_adopt(&p->crew, &terms->epoch));
    p->rank = (int)terms->epoch.rank;
    p->n_ranks = (int)terms->epoch.n_ranks;
    return order(&p->crew, merged, terms->epoch.rank);
}

static fv_status_t connect_as(fv_process_t *p, const terms_t *terms)
{
    p->fds = calloc(1, sizeof(*p->fds));
    p->beat_fds = calloc(1, sizeof(*p->beat_fds));
    if ((p->fds == NULL) || (p->beat_fds == NULL)) {
        return fv_fail(FV_ERR_NO_MEMORY, "control sockets");
    }
    p->hello =
        (fv_ctl_hello_t){.rank = terms->epoch.rank, .pid = (int32_t)getpid(), .backend = "recruit"};
    (void)gethostname(p->hello.host, sizeof(p->hello.host) - 1U);
    FV_RETURN_IF_ERR(fv_bootstrap_enter(&terms->meeting, terms->epoch.epoch, &p->hello, &p->fds[0],
                                        &p->beat_fds[0]));
    return fv_main_heartbeat_start(&p->config, p->rank, 1, p->beat_fds, NULL, FV_EXIT_FENCED,
                                   &p->heartbeat);
}

fv_status_t fv_recruit_join(fv_process_t *p, fv_ctl_epoch_t *out)
{
    static terms_t terms; /* large; one thread */

    p->crew.exchange = &p->exchange;
    fv_status_t status = hear_terms(p, &terms);
    if (status == FV_OK) {
        fv_log_init(fv_log_level_now, p->rank);
        status = fv_main_start_recruit_parts(p, terms.job);
    }
    if (status == FV_OK) {
        status = connect_as(p, &terms);
    }
    if (status == FV_OK) {
        status = fv_main_exchange_renew(&p->crew.comm, &p->exchange);
    }
    *out = terms.epoch;
    fv_secret_wipe(&terms, sizeof(terms));
    return status;
}
