/*
 * log.h - one line per event on stderr: `time level rank thread: text`.
 *
 * error, warn, info: never per token. debug: proportional to sessions. trace: per step.
 */
#ifndef FV_COMMON_LOG_H
#define FV_COMMON_LOG_H

#include "common/status.h"

#include <stdbool.h>

typedef enum fv_log_level {
    FV_LOG_ERROR = 0,
    FV_LOG_WARN,
    FV_LOG_INFO,
    FV_LOG_DEBUG,
    FV_LOG_TRACE,
} fv_log_level_t;

extern fv_log_level_t fv_log_level_now; /* set once at start, before threads */

/* "error", "warn", "info", "debug", "trace". */
FV_MUST_CHECK fv_status_t fv_log_level_parse(const char *text, fv_log_level_t *out);
void fv_log_init(fv_log_level_t level, int rank);
void fv_log_thread_name(const char *name); /* of the calling thread; keeps the pointer */

__attribute__((format(printf, 2, 3))) void fv_log_write(fv_log_level_t level, const char *fmt, ...);

/* The level test is inline: a silent level costs one load and a branch. */
#define fv_log(level, ...)                      \
    do {                                        \
        if ((level) <= fv_log_level_now) {      \
            fv_log_write((level), __VA_ARGS__); \
        }                                       \
    } while (0)
#define fv_error(...) fv_log(FV_LOG_ERROR, __VA_ARGS__)
#define fv_warn(...)  fv_log(FV_LOG_WARN, __VA_ARGS__)
#define fv_info(...)  fv_log(FV_LOG_INFO, __VA_ARGS__)
#define fv_debug(...) fv_log(FV_LOG_DEBUG, __VA_ARGS__)
#define fv_trace(...) fv_log(FV_LOG_TRACE, __VA_ARGS__)

#endif /* FV_COMMON_LOG_H */
