/*
 * fault_hook.c - what fovead_faulty does at a station.
 *
 * FV_FAULT=RANK:STATION:N:kill|stop    process RANK (of MPI_COMM_WORLD) is killed or stopped when it comes to the station for the
 *                                      N-th time
 * FV_FAULT_ONCE=PATH                   but only if this file is not there yet; it is made then, so that what is started
 *                                      again goes on
 */
#define _GNU_SOURCE
#include "common/fault.h"

#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int s_station;
static unsigned s_count;
static int s_signal;
static atomic_uint s_n;

static void on_station(int station)
{
    const char *once = getenv("FV_FAULT_ONCE"); /* NOLINT(concurrency-mt-unsafe) */

    if ((station != s_station) || (atomic_fetch_add(&s_n, 1U) + 1U != s_count)) {
        return;
    }
    if (once != NULL) {
        int fd = open(once, O_WRONLY | O_CREAT | O_EXCL, 0600);
        if (fd < 0) {
            return;
        }
        (void)close(fd);
    }
    (void)kill(getpid(), s_signal);
}

__attribute__((constructor)) static void read_fault(void)
{
    const char *text = getenv("FV_FAULT");             /* NOLINT(concurrency-mt-unsafe) */
    const char *rank = getenv("OMPI_COMM_WORLD_RANK"); /* NOLINT(concurrency-mt-unsafe) */
    const char *parent = getenv("OMPI_PARENT_PORT");   /* NOLINT(concurrency-mt-unsafe) */
    char kind[8] = "";
    int at_rank = 0;

    if ((text == NULL) || (parent != NULL)) { /* started by the others: of another world */
        return;
    }
    if ((sscanf(text, "%d:%d:%u:%7s", &at_rank, &s_station, &s_count, kind) != 4) ||
        ((strcmp(kind, "kill") != 0) && (strcmp(kind, "stop") != 0))) {
        (void)fprintf(stderr, "FV_FAULT: given \"%s\", expected RANK:STATION:N:kill|stop\n", text);
        _exit(2);
    }
    if (at_rank == ((rank == NULL) ? 0 : atoi(rank))) {
        s_signal = (strcmp(kind, "kill") == 0) ? SIGKILL : SIGSTOP;
        fv_fault_hook = on_station;
    }
}
