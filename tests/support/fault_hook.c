/*
 * fault_hook.c - what fovead_faulty does at a station.
 *
 * FV_FAULT_PAGE=PATH: a file of at least sizeof(fault_page_t) zero bytes that a test and all processes map (tests/fault/faults.py knows
 * the layout too). The test arms a fault by writing the other fields and then `countdown`: the process of that class which comes
 * to the station as the countdown reaches 0 is killed or stopped there. Every process says who it is, and stations are counted, so that a
 * test knows how often each is passed.
 */
#define _GNU_SOURCE
#include "common/fault.h"

#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define STATIONS    11 /* 1..10 */
#define CLASSES     2  /* rank 0, the others */
#define PROCESS_MAX 4096

typedef struct fault_page {
    int32_t class_of, station, signal;
    atomic_int countdown; /* 0: not armed */
    atomic_int n_hits;
    atomic_int n_processes;
    atomic_int n_visits[CLASSES][STATIONS];
    struct {
        int32_t pid;
        int32_t process; /* of MPI_COMM_WORLD; -1: started in a lost rank's place */
        atomic_int has_worked;
    } processes[PROCESS_MAX];
} fault_page_t;

static fault_page_t *s_page;
static int s_class, s_slot;

static void on_station(int station)
{
    (void)atomic_fetch_add(&s_page->n_visits[s_class][station], 1);
    atomic_store(&s_page->processes[s_slot].has_worked, 1);
    if ((atomic_load(&s_page->countdown) > 0) && (s_page->class_of == s_class) &&
        (s_page->station == station) && (atomic_fetch_sub(&s_page->countdown, 1) == 1)) {
        (void)atomic_fetch_add(&s_page->n_hits, 1);
        (void)kill(getpid(), s_page->signal);
    }
}

static void refuse(const char *why)
{
    (void)fprintf(stderr, "FV_FAULT_PAGE: %s\n", why);
    _exit(2);
}

__attribute__((constructor)) static void map_page(void)
{
    const char *path = getenv("FV_FAULT_PAGE");        /* NOLINT(concurrency-mt-unsafe) */
    const char *rank = getenv("OMPI_COMM_WORLD_RANK"); /* NOLINT(concurrency-mt-unsafe) */
    const char *parent = getenv("OMPI_PARENT_PORT");   /* NOLINT(concurrency-mt-unsafe) */

    if (path == NULL) {
        return;
    }
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if ((fd < 0) || (lseek(fd, 0, SEEK_END) < (off_t)sizeof(*s_page))) {
        refuse("can not be opened, or is too short");
    }
    s_page = mmap(NULL, sizeof(*s_page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    (void)close(fd);
    if (s_page == MAP_FAILED) {
        refuse("can not be mapped");
    }
    int process = ((rank == NULL) || (parent != NULL)) ? -1 : atoi(rank);
    s_class = (process == 0) ? 0 : 1;
    s_slot = atomic_fetch_add(&s_page->n_processes, 1);
    if (s_slot >= PROCESS_MAX) {
        refuse("too many processes");
    }
    s_page->processes[s_slot].process = process;
    s_page->processes[s_slot].pid = (int32_t)getpid();
    fv_fault_hook = on_station;
}
