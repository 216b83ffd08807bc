/*
 * world_calls.c - system calls of a simulated process: clock, naps, threads, signals, random bytes, eventfds.
 */
#define _GNU_SOURCE

#include "common/deadline.h"
#include "common/log.h"
#include "common/status.h"
#include "tests/sim/job.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>

int __wrap_clock_gettime(clockid_t clock, struct timespec *out);
int __wrap_nanosleep(const struct timespec *length, struct timespec *left);
int __wrap_sched_yield(void);
ssize_t __wrap_getrandom(void *out, size_t n_bytes, unsigned flags);
ssize_t __wrap_write(int fd, const void *data, size_t n_bytes);
ssize_t __real_write(int fd, const void *data, size_t n_bytes);
pid_t __wrap_getpid(void);
int __wrap_kill(pid_t pid, int signal);
void __wrap__exit(int code) __attribute__((noreturn));
void __real__exit(int code) __attribute__((noreturn));
int __wrap_pthread_create(pthread_t *out,
                          const pthread_attr_t *attributes,
                          void *(*run)(void *arg),
                          void *arg);
int __wrap_pthread_join(pthread_t thread, void **out);
void __wrap_fv_log_write(fv_log_level_t level, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

int __wrap_clock_gettime(clockid_t clock, struct timespec *out)
{
    int64_t now_us = sim_now_us() + ((clock == CLOCK_REALTIME) ? 1700000000 * SIM_SECOND : 0);

    out->tv_sec = now_us / SIM_SECOND;
    out->tv_nsec = (now_us % SIM_SECOND) * 1000;
    return 0;
}

int __wrap_nanosleep(const struct timespec *length, struct timespec *left)
{
    (void)length; /* all of them are naps between two looks */
    (void)left;
    sim_nap();
    return 0;
}

int __wrap_sched_yield(void)
{
    sim_nap();
    return 0;
}

ssize_t __wrap_getrandom(void *out, size_t n_bytes, unsigned flags)
{
    uint8_t *bytes = out;

    (void)flags;
    for (size_t i = 0; i < n_bytes; i++) {
        bytes[i] = (uint8_t)sim_pick(0, 255);
    }
    return (ssize_t)n_bytes;
}

/* To an eventfd: some thread of the process may wait for it. */
ssize_t __wrap_write(int fd, const void *data, size_t n_bytes)
{
    sim_process_t *p = sim_current();
    ssize_t n = __real_write(fd, data, n_bytes);

    if (p != NULL) {
        sim_wake(p);
    }
    return n;
}

pid_t __wrap_getpid(void)
{
    return sim_process_pid(sim_process_number(sim_current()));
}

int __wrap_kill(pid_t pid, int signal)
{
    FV_ASSERT(signal == SIGKILL);
    sim_kill_pid(pid);
    return 0;
}

void __wrap__exit(int code)
{
    if (sim_current() == NULL) {
        __real__exit(code);
    }
    sim_exit(code);
}

int __wrap_pthread_create(pthread_t *out,
                          const pthread_attr_t *attributes,
                          void *(*run)(void *arg),
                          void *arg)
{
    void *fiber = sim_fiber_start(run, arg);

    (void)attributes;
    FV_ASSERT(sizeof(*out) == sizeof(fiber));
    memcpy(out, &fiber, sizeof(fiber));
    return 0;
}

int __wrap_pthread_join(pthread_t thread, void **out)
{
    void *fiber = NULL;

    (void)out;
    memcpy(&fiber, &thread, sizeof(fiber));
    sim_fiber_join(fiber);
    return 0;
}

/* Errors are what stories are made of. */
void __wrap_fv_log_write(fv_log_level_t level, const char *format, ...)
{
    char text[512];
    va_list list;

    va_start(list, format);
    (void)vsnprintf(text, sizeof(text), format, list);
    va_end(list);
    if (strstr(text, "message type") != NULL) { /* coord/link_mpi.c, worker/inbox_mpi.c */
        sim_fail("process %u was told what it did not expect: %s",
                 sim_process_number(sim_current()), text);
    }
    sim_say("process %u, %s: %s", sim_process_number(sim_current()),
            (level == FV_LOG_ERROR)  ? "error"
            : (level == FV_LOG_WARN) ? "warning"
                                     : "info",
            text);
}

/* common/deadline.h: the real one would end this process. */
void fv_deadline_arm(uint32_t ms, int code, const char *what)
{
    (void)what;
    sim_set_deadline(sim_now_us() + (int64_t)ms * 1000, code);
}

void fv_deadline_disarm(void)
{
    sim_set_deadline(SIM_NEVER, 0);
}
