/*
 * random.h - reproducible random numbers for tests: the seed comes from FV_SEED and is printed.
 */
#ifndef FV_TESTS_SUPPORT_RANDOM_H
#define FV_TESTS_SUPPORT_RANDOM_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct fv_random {
    uint64_t state;
} fv_random_t;

/* splitmix64 */
static inline uint64_t fv_random_next(fv_random_t *r)
{
    uint64_t z = (r->state += 0x9e3779b97f4a7c15U);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
}

/* Uniform in [low, high], both included. */
static inline int64_t fv_random_int(fv_random_t *r, int64_t low, int64_t high)
{
    return low + (int64_t)(fv_random_next(r) % (uint64_t)(high - low + 1));
}

/* Uniform in [-1, 1). */
static inline float fv_random_unit(fv_random_t *r)
{
    return (float)(fv_random_next(r) >> 40) / 8388608.0F - 1.0F;
}

/* The seed of this run: FV_SEED, or `fallback`. Printed, so that a failure can be repeated. */
static inline uint64_t fv_random_seed(uint64_t fallback)
{
    const char *text = getenv("FV_SEED"); /* NOLINT(concurrency-mt-unsafe): before any thread */
    uint64_t seed = (text != NULL) ? strtoull(text, NULL, 10) : fallback;

    (void)fprintf(stderr, "FV_SEED=%llu\n", (unsigned long long)seed);
    return seed;
}

#endif /* FV_TESTS_SUPPORT_RANDOM_H */
