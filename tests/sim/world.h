/*
 * world.h - a job of several processes in one: virtual time, a virtual network, and processes that can die at any moment.
 *
 * Each simulated process runs the real code of its role (coordinator, worker, spare) on fibers of its own: whatever waits
 * (poll, nanosleep, sched_yield, MPI_Testall) goes back to the world, which runs whoever is ready next, as chance says, and
 * moves the clock on when nobody is. System calls come here by the linker's --wrap, MPI's functions by being defined here.
 *
 *   world.c         time, chance, events, fibers, processes
 *   world_memory.c  what a process has and loses with its death: memory, mappings, descriptors
 *   world_calls.c   the other system calls: clock, naps, threads, signals, random bytes
 *   world_socket.c  stream sockets, with delays, partitions, ends that close
 *   world_mpi.c     messages between ranks; nobody is told of a dead peer
 *
 * One seed is one story: everything follows from it. Thread: one.
 */
#ifndef FV_TESTS_SIM_WORLD_H
#define FV_TESTS_SIM_WORLD_H

#include "tests/support/random.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SIM_PROCESSES_MAX 12
#define SIM_HOSTS_MAX     3
#define SIM_FDS_FROM      10000 /* descriptors of virtual sockets */
#define SIM_NEVER         INT64_MAX
#define SIM_SECOND        ((int64_t)1000000)

typedef struct sim_process sim_process_t;

/* ------------------------------------------------------------------ chance, time, events */

void sim_world_begin(uint64_t seed);
void sim_world_end(void); /* all processes die, all events are dropped */

int64_t sim_pick(int64_t low, int64_t high);
bool sim_chance(int64_t one_in);
int64_t sim_now_us(void);

/* Calls happen(a, b) at that time, in no process. _owned: `a` is sim_free()d when the story ends before. */
void sim_at(int64_t at_us, void (*happen)(void *a, uint64_t b), void *a, uint64_t b);
void sim_at_owned(int64_t at_us, void (*happen)(void *a, uint64_t b), void *a, uint64_t b);
/* Until is_over() says so, or the time is up; false: that. */
bool sim_run(bool (*is_over)(void), int64_t until_us);

/* ------------------------------------------------------------------ processes */

typedef int (*sim_main_t)(sim_process_t *process);

/* A process's main runs from now on; its number must be free. on_end hears of its death, with its exit code, -1 if it was killed. */
sim_process_t *sim_process_start(uint32_t number,
                                 uint32_t host,
                                 sim_main_t main,
                                 void (*on_end)(uint32_t number, int code));
bool sim_process_is_alive(uint32_t number);
int sim_process_pid(uint32_t number);
uint32_t sim_process_number(const sim_process_t *process);
uint32_t sim_process_host(uint32_t number);
/* Whose code runs, or NULL. */
sim_process_t *sim_current(void);
/* Runs what follows as if in that process, but on the world's own stack: it must not wait. NULL: in none. */
sim_process_t *sim_enter(sim_process_t *process);
sim_process_t *sim_process(uint32_t number); /* NULL: dead */

void sim_kill(uint32_t number);
void sim_kill_pid(int pid);
/* It dies at its n-th system call from now on. */
void sim_kill_after(uint32_t number, uint32_t n_calls);
/* Those that did, in all worlds until now. */
uint64_t sim_n_deaths(void);
void sim_stop_until(uint32_t number, int64_t until_us); /* as SIGSTOP and SIGCONT */
int64_t sim_stopped_until(uint32_t number);
/* The own process leaves; does not return. */
void sim_exit(int code) __attribute__((noreturn));
/* It leaves with `code` at that time, unless this is called again. */
void sim_set_deadline(int64_t at_us, int code);

/* ------------------------------------------------------------------ fibers */

/* One more thread of the own process. */
void *sim_fiber_start(void *(*run)(void *arg), void *arg);
void sim_fiber_join(void *fiber);
/* Waits until then, or until the process is woken. */
void sim_block(int64_t until_us);
/* Waits a little: until something happens somewhere. For loops that look again and again. */
void sim_nap(void);
/* Looks without waiting: after many of them in a row it naps. */
void sim_look(void);
/* A system call: here a process may die. */
void sim_call(void);
/* Something has come for the process. */
void sim_wake(sim_process_t *process);

/* ------------------------------------------------------------------ memory (world_memory.c) */

/* Of the world itself: no process's death takes it away. */
void *sim_alloc(size_t n_bytes);
void sim_free(void *memory);
void sim_memory_drop(const sim_process_t *process);

/* ------------------------------------------------------------------ the network (world_socket.c, world_mpi.c) */

void sim_sockets_begin(void);
void sim_sockets_end(void);
void sim_sockets_drop(const sim_process_t *process); /* its ends close */
/* A connection between two processes; ends: descriptors of `a` and of `b`. */
void sim_connect(sim_process_t *a, sim_process_t *b, int ends[2]);
/* When a message from host to host that leaves now arrives at the earliest. */
int64_t sim_arrival_us(uint32_t from_host, uint32_t to_host);
void sim_partition(uint32_t host, int64_t until_us); /* from all other hosts */
int64_t sim_partition_ends_us(uint32_t a, uint32_t b);
int64_t sim_calm_us(void); /* when no host is cut off any more */
void sim_set_delay(int64_t low_us, int64_t high_us);

/* Sees every byte that is sent on connections made with sim_connect(), in order. */
typedef void (*sim_tap_t)(int connection, int from_end, const void *data, size_t n_bytes);
void sim_tap(sim_tap_t tap);

void sim_mpi_begin(void);
/* Hears of each process that leaves MPI_Comm_create_group(), on its fiber; NULL: nobody does. */
void sim_mpi_on_comm(void (*on_comm)(uint32_t number));
void sim_mpi_end(void);
void sim_mpi_drop(const sim_process_t *process);

#endif /* FV_TESTS_SIM_WORLD_H */
