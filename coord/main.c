/*
 * main.c - fovead: picks this process's role and puts the parts together.
 *
 * Alone (no mpirun): one rank, coordinator and worker, no MPI. Under mpirun or srun: rank 0 coordinates and, unless
 * --dedicated-coordinator, works too; the others work.
 *
 *   main               parse, block signals
 *   main_ranks         join MPI
 *   main_parts         backend, exchange (main_exchange), store (main_store), worker: all ranks or none
 *   main_ranks         meet: control sockets, heartbeats (main_heartbeat)
 *   main_coordinator   rank 0: listen, serve, drain, stop the others   main_local: its own worker
 *   main_worker        the others: serve; spares wait                  main_repair: a spare takes a rank's place
 *   main               close what was opened, in an order that waits for nobody
 *
 * main and main_* are the only files that know coord and worker both. Exit codes: main_exit.h.
 */
#define _GNU_SOURCE

#include "common/config.h"
#include "common/deadline.h"
#include "common/log.h"
#include "coord/heartbeat.h"
#include "coord/link.h"
#include "coord/main_coordinator.h"
#include "coord/main_exchange.h"
#include "coord/main_exit.h"
#include "coord/main_parts.h"
#include "coord/main_process.h"
#include "coord/main_ranks.h"
#include "coord/main_worker.h"
#include "coord/version.h"

#include <mpi.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/signalfd.h>
#include <unistd.h>

/* MPI_Finalize waits for every rank, and one may have died meanwhile. */
#define FINISH_MS 10000U

extern char **environ;

/*
 * Signals mean "drain and stop" to rank 0, which reads them from a descriptor; the others wait to be told. Blocked
 * before any thread exists, MPI's included, so that all inherit the mask.
 */
static void block_signals(sigset_t *out_set)
{
    (void)signal(SIGPIPE, SIG_IGN);
    (void)sigemptyset(out_set);
    (void)sigaddset(out_set, SIGTERM);
    (void)sigaddset(out_set, SIGINT);
    (void)sigaddset(out_set, SIGUSR1);
    (void)sigaddset(out_set, SIGHUP); /* not to stop: reads the token file again */
    (void)pthread_sigmask(SIG_BLOCK, out_set, NULL);
}

static int start_and_run(fv_process_t *p, const sigset_t *signals)
{
    fv_log_level_t level = FV_LOG_INFO;

    fv_status_t status = fv_log_level_parse(p->config.log_level, &level);
    fv_log_init(level, p->rank);
    if (p->is_recruit) {
        return fv_main_run_worker(p);
    }
    int signal_fd = (p->rank == 0) ? signalfd(-1, signals, SFD_NONBLOCK | SFD_CLOEXEC) : -1;
    if (!fv_main_said_fine(p, status) || !fv_main_start_parts(p)) {
        return FV_EXIT_START;
    }
    status = fv_main_meet(p);
    fv_deadline_disarm();
    if (status != FV_OK) {
        fv_error("%s", fv_error_context());
        return FV_EXIT_START;
    }
    return (p->rank == 0) ? fv_main_run_coordinator(p, signal_fd) : fv_main_run_worker(p);
}

static void finish(fv_process_t *p, int code)
{
    if (p->rank == 0) {
        fv_main_write_exit_file(p, code);
    }
    if ((code != FV_EXIT_CLEAN) && p->has_mpi) {
        /* Something is gone: MPI_Finalize would wait for it. The sockets close with the process. */
        (void)fflush(NULL);
        _exit(code);
    }
    fv_heartbeat_stop(p->heartbeat);
    fv_link_destroy(p->link);
    if ((p->rank != 0) && (p->fds != NULL)) {
        (void)close(p->fds[0]);
    }
    fv_worker_destroy(p->worker);
    fv_main_exchange_close(&p->exchange);
    free(p->hellos);
    free(p->fds);
    free(p->beat_fds);
    if ((p->config.spares > 0) ||
        (p->crew.epoch > FV_MAIN_EPOCH)) { /* somebody was lost, it may be */
        (void)fflush(NULL);
        _exit(code);
    }
    if (p->has_mpi) {
        fv_deadline_arm(FINISH_MS, code, "fovead: MPI_Finalize");
        (void)MPI_Finalize();
        fv_deadline_disarm();
    }
}

int main(int argc, char **argv)
{
    static fv_process_t process;
    fv_status_t status = fv_config_load(argc, argv, environ, &process.config);

    if (status != FV_OK) {
        (void)fprintf(stderr, "fovead: %s\nTry fovead --help.\n", fv_error_context());
        fv_main_write_exit_file(&process, FV_EXIT_USAGE); /* every rank finds the same */
        return FV_EXIT_USAGE;
    }
    switch (process.config.action) {
    case FV_CONFIG_PRINT:
        fv_config_print(&process.config, stdout);
        return FV_EXIT_CLEAN;
    case FV_CONFIG_HELP:
        fv_config_help("fovead", stdout);
        return FV_EXIT_CLEAN;
    case FV_CONFIG_VERSION:
        (void)printf("fovead %s\n", FV_VERSION);
        return FV_EXIT_CLEAN;
    case FV_CONFIG_RUN:
    default:
        break;
    }
    int code = FV_EXIT_START;
    sigset_t signals;
    block_signals(&signals);
    fv_deadline_arm((uint32_t)process.config.start_deadline_ms, FV_EXIT_START, "fovead: start");
    process.argv = argv;
    status = fv_main_join(&process);
    if (status == FV_OK) {
        code = start_and_run(&process, &signals);
    } else {
        (void)fprintf(stderr, "fovead: %s\n", fv_error_context());
    }
    finish(&process, code);
    return code;
}
