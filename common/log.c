/*
 * log.c - formats a line into one buffer and writes it with one call, so lines of ranks do not mix.
 */
#include "common/log.h"

#include "common/clock.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

fv_log_level_t fv_log_level_now = FV_LOG_INFO;
static int g_rank = -1;
static _Thread_local const char *t_thread = "main";
static const char *const k_names[] = {"error", "warn", "info", "debug", "trace"};

fv_status_t fv_log_level_parse(const char *text, fv_log_level_t *out)
{
    for (int i = 0; i <= FV_LOG_TRACE; i++) {
        if (strcmp(text, k_names[i]) == 0) {
            *out = (fv_log_level_t)i;
            return FV_OK;
        }
    }
    return fv_fail(FV_ERR_INVALID_ARG,
                   "log-level: given \"%s\", expected error, warn, info, debug or trace", text);
}

void fv_log_init(fv_log_level_t level, int rank)
{
    fv_log_level_now = level;
    g_rank = rank;
}

void fv_log_thread_name(const char *name)
{
    t_thread = name;
}

void fv_log_write(fv_log_level_t level, const char *fmt, ...)
{
    char line[1024];
    struct timespec now;
    struct tm tm;
    va_list ap;

    (void)clock_gettime(CLOCK_REALTIME, &now);
    (void)localtime_r(&now.tv_sec, &tm);
    size_t n = strftime(line, sizeof(line), "%H:%M:%S", &tm);
    n += (size_t)snprintf(line + n, sizeof(line) - n,
                          ".%03ld %-5s rank %d %s: ", now.tv_nsec / 1000000, k_names[level], g_rank,
                          t_thread);
    va_start(ap, fmt);
    int m = vsnprintf(line + n, sizeof(line) - n - 1U, fmt, ap);
    va_end(ap);
    n = ((m < 0) || (n + (size_t)m >= sizeof(line) - 1U)) ? (sizeof(line) - 2U) : (n + (size_t)m);
    line[n++] = '\n';
    ssize_t written = write(STDERR_FILENO, line, n);
    (void)written; /* nowhere left to report it */
}
