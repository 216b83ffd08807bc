/*
 * prop_wire_random.h - a seeded generator for the wire, step and config tests.
 *
 * The seed is printed, and FV_SEED in the environment sets it.
 */
#ifndef FV_TESTS_PROPERTY_PROP_WIRE_RANDOM_H
#define FV_TESTS_PROPERTY_PROP_WIRE_RANDOM_H

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

typedef struct fv_random {
    uint64_t state;
} fv_random_t;

static inline fv_random_t fv_random_begin(const char *test)
{
    const char *given = getenv("FV_SEED"); /* NOLINT(concurrency-mt-unsafe): one thread */
    uint64_t seed = (given != NULL) ? strtoull(given, NULL, 0) : (uint64_t)time(NULL);

    (void)printf("%s: FV_SEED=%" PRIu64 "\n", test, seed);
    return (fv_random_t){.state = seed};
}

/* splitmix64 */
static inline uint64_t fv_random_next(fv_random_t *r)
{
    uint64_t z = (r->state += 0x9e3779b97f4a7c15U);

    z = (z ^ (z >> 30U)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27U)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31U);
}

/* 0..n - 1 */
static inline uint64_t fv_random_below(fv_random_t *r, uint64_t n)
{
    return fv_random_next(r) % n;
}

/* Any width alike: small numbers, 32-bit ones and 64-bit ones all occur. */
static inline uint64_t fv_random_wide(fv_random_t *r)
{
    return fv_random_next(r) >> fv_random_below(r, 64);
}

#endif /* FV_TESTS_PROPERTY_PROP_WIRE_RANDOM_H */
