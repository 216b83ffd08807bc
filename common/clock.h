/*
 * clock.h - monotonic time in microseconds. The scheduler core never calls it: time is handed in.
 */
#ifndef FV_COMMON_CLOCK_H
#define FV_COMMON_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline int64_t fv_clock_us(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return ((int64_t)t.tv_sec * 1000000) + (t.tv_nsec / 1000);
}

#endif /* FV_COMMON_CLOCK_H */
