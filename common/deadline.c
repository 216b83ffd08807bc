/*
 * deadline.c - an interval timer whose signal ends the process.
 */
#define _GNU_SOURCE /* sigaction, setitimer */
#include "common/deadline.h"

#include <signal.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

static volatile sig_atomic_t s_code;
static const char *volatile s_what = "";

/* Only what may be called in a signal handler. */
static void on_alarm(int number)
{
    static const char k_text[] = ": not done in time; this process ends\n";
    const char *what = s_what;
    ssize_t n = write(STDERR_FILENO, what, strlen(what));

    n += write(STDERR_FILENO, k_text, sizeof(k_text) - 1U);
    (void)n;
    (void)number;
    _exit((int)s_code);
}

static void set(uint32_t ms)
{
    struct itimerval timer = {
        .it_value = {.tv_sec = (time_t)(ms / 1000U), .tv_usec = (suseconds_t)(ms % 1000U) * 1000}};

    (void)setitimer(ITIMER_REAL, &timer, NULL);
}

void fv_deadline_arm(uint32_t ms, int code, const char *what)
{
    struct sigaction action = {.sa_handler = on_alarm};

    s_code = code;
    s_what = what;
    (void)sigemptyset(&action.sa_mask);
    (void)sigaction(SIGALRM, &action, NULL);
    set((ms == 0U) ? 1U : ms);
}

void fv_deadline_disarm(void)
{
    set(0);
}
