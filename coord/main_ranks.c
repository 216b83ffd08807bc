/*
 * main_ranks.c - this process among those of the job: MPI, agreement, control sockets.
 */
#include "coord/main_ranks.h"

#include "common/log.h"
#include "coord/bootstrap.h"
#include "coord/main_exit.h"
#include "coord/main_heartbeat.h"
#include "coord/main_recruit.h"

#include <mpi.h>

#include <stdlib.h>
#include <unistd.h>

/* ------------------------------------------------------------------ joining */

static bool is_launched_by_mpi(void)
{
    static const char *const k_marks[] = {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"};

    for (size_t i = 0; i < sizeof(k_marks) / sizeof(k_marks[0]); i++) {
        if (getenv(k_marks[i]) != NULL) { /* NOLINT(concurrency-mt-unsafe): no thread yet */
            return true;
        }
    }
    return false;
}

bool fv_main_is_spare(const fv_process_t *p)
{
    return !p->is_recruit && (p->rank >= p->n_ranks);
}

/* The first epoch's communicator. Without spares there is never another one. */
static fv_status_t form_crew(fv_process_t *p)
{
    fv_crew_init(&p->crew, (uint32_t)p->n_ranks, (uint32_t)p->n_world, FV_MAIN_EPOCH);
    p->crew.deadline_ms = (uint32_t)p->config.repair_deadline_ms;
    p->crew.lost_code = FV_EXIT_RANK_LOST;
    p->crew.exchange = &p->exchange;
    p->crew.comm = MPI_COMM_WORLD;
    return ((p->config.spares == 0) || fv_main_is_spare(p))
               ? FV_OK
               : fv_crew_make_comm(&p->crew, (uint32_t)p->rank);
}

fv_status_t fv_main_join(fv_process_t *p)
{
    MPI_Comm local = MPI_COMM_NULL;
    int provided = 0;

    p->n_ranks = 1;
    p->n_world = 1;
    p->n_local_ranks = 1;
    p->is_with_coordinator = true;
    if (!is_launched_by_mpi()) {
        return FV_OK; /* embedded: MPI is not entered at all */
    }
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS) {
        return fv_fail(FV_ERR_MPI, "MPI_Init_thread failed");
    }
    p->has_mpi = true;
    (void)MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    if (fv_recruit_is_one()) {
        p->is_recruit = true;
        p->rank = 1; /* not 0, and later told which */
        return FV_OK;
    }
    (void)MPI_Comm_rank(MPI_COMM_WORLD, &p->rank);
    (void)MPI_Comm_size(MPI_COMM_WORLD, &p->n_world);
    p->n_ranks = p->n_world - p->config.spares;
    if (MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &local) ==
        MPI_SUCCESS) {
        int first = p->rank;
        int is_rank = fv_main_is_spare(p) ? 0 : 1;

        (void)MPI_Allreduce(&is_rank, &p->n_local_ranks, 1, MPI_INT, MPI_SUM, local);
        p->n_local_ranks = (p->n_local_ranks > 0) ? p->n_local_ranks : 1;
        (void)MPI_Comm_rank(local, &p->local_rank);
        (void)MPI_Bcast(&first, 1, MPI_INT, 0, local);
        p->is_with_coordinator = first == 0;
        (void)MPI_Comm_free(&local);
    }
    if (p->n_world > (int)FV_RANKS_MAX) {
        return fv_fail(FV_ERR_INVALID_ARG, "mpirun -np: given %d ranks, expected at most %d",
                       p->n_world, FV_RANKS_MAX);
    }
    if ((p->config.spares > 0) && (p->n_ranks < 2)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spares: given %d of %d processes, expected two ranks at least beside them",
                       p->config.spares, p->n_world);
    }
    return form_crew(p);
}

/* ------------------------------------------------------------------ agreement */

/* Every rank learns whether all ranks are fine. */
static bool all_fine(const fv_process_t *p, bool mine)
{
    int local = mine ? 1 : 0;
    int all = local;

    if (p->has_mpi) {
        (void)MPI_Allreduce(&local, &all, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    }
    return all != 0;
}

bool fv_main_said_fine(const fv_process_t *p, fv_status_t status)
{
    if (status != FV_OK) {
        fv_error("%s", fv_error_context());
    }
    return all_fine(p, status == FV_OK);
}

/* ------------------------------------------------------------------ meeting */

fv_status_t fv_main_meet(fv_process_t *p)
{
    p->hellos = calloc((size_t)p->n_world, sizeof(*p->hellos));
    p->fds = calloc((size_t)p->n_world, sizeof(*p->fds));
    p->beat_fds = calloc((size_t)p->n_world, sizeof(*p->beat_fds));
    if ((p->hellos == NULL) || (p->fds == NULL) || (p->beat_fds == NULL)) {
        return fv_fail(FV_ERR_NO_MEMORY, "%d ranks", p->n_ranks);
    }
    MPI_Comm world = MPI_COMM_WORLD;
    p->hello.pid = (int32_t)getpid();
    if (!p->has_mpi || (p->n_world == 1)) {
        (void)gethostname(p->hello.host, sizeof(p->hello.host) - 1U);
        p->hellos[0] = p->hello;
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_bootstrap(&world, p->config.control_address, FV_MAIN_EPOCH, &p->hello,
                                  p->fds, p->beat_fds, p->hellos));
    if (p->rank != 0) {
        return fv_main_heartbeat_start(&p->config, p->rank, p->n_world, p->beat_fds, NULL,
                                       FV_EXIT_FENCED, &p->heartbeat);
    }
    FV_RETURN_IF_ERR(fv_link_create(&p->crew.comm, (uint32_t)p->n_ranks, FV_MAIN_EPOCH, p->fds,
                                    (uint32_t)p->config.step_deadline_ms, &p->link));
    if ((p->exchange.ops != NULL) && (p->exchange.ops->on_poll != NULL)) {
        p->exchange.ops->on_poll(p->exchange.ctx, fv_link_is_broken, p->link);
    }
    p->crew.link = p->link;
    p->crew.config = &p->config;
    p->crew.argv = p->argv;
    p->crew.may_recruit = fv_recruit_is_possible(&p->config);
    p->crew.fds = p->fds;
    p->crew.hellos = p->hellos;
    FV_RETURN_IF_ERR(fv_main_heartbeat_start(&p->config, p->rank, p->n_world, p->beat_fds, &p->crew,
                                             FV_EXIT_FENCED, &p->heartbeat));
    p->crew.heartbeat = p->heartbeat;
    return FV_OK;
}
