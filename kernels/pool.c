/*
 * pool.c - see pool.h. One mutex guards the hand-over; the spins read atomics only.
 */
#define _GNU_SOURCE /* sched_getaffinity, CPU_COUNT */
#include "kernels/pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define SPIN_TURNS 400 /* some 10 us: less than two futex calls and a wake-up cost */

typedef struct pool_thread {
    fv_pool_t *pool;
    pthread_t handle;
    int32_t thread_idx;
} pool_thread_t;

struct fv_pool {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    atomic_uint generation; /* a change means: new work, or stop */
    atomic_int n_running;   /* threads, the caller's not counted, that have not finished this run */
    bool stop;              /* guarded by lock */
    fv_pool_fn_t fn;        /* written before generation changes, read after: release / acquire */
    void *ctx;
    int32_t n_started;
    pool_thread_t threads[]; /* n_threads - 1 */
};

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

int32_t fv_pool_cpus(void)
{
    cpu_set_t set;

    if (sched_getaffinity(0, sizeof(set), &set) != 0) {
        return 1;
    }
    return (CPU_COUNT(&set) > 0) ? (int32_t)CPU_COUNT(&set) : 1;
}

/* Waits for a generation other than `seen`; false = stop. */
static bool wait_for_work(fv_pool_t *pool, unsigned *seen)
{
    bool stop = false;

    for (int i = 0; i < SPIN_TURNS; i++) {
        if (atomic_load_explicit(&pool->generation, memory_order_acquire) != *seen) {
            break;
        }
        relax();
    }
    (void)pthread_mutex_lock(&pool->lock);
    while (atomic_load_explicit(&pool->generation, memory_order_acquire) == *seen) {
        (void)pthread_cond_wait(&pool->work, &pool->lock);
    }
    *seen = atomic_load_explicit(&pool->generation, memory_order_acquire);
    stop = pool->stop;
    (void)pthread_mutex_unlock(&pool->lock);
    return !stop;
}

static void *thread_main(void *arg)
{
    pool_thread_t *self = arg;
    fv_pool_t *pool = self->pool;
    unsigned seen = 0;

    while (wait_for_work(pool, &seen)) {
        pool->fn(pool->ctx, self->thread_idx);
        /* acq_rel: the caller that sees 0 sees everything this thread wrote */
        if (atomic_fetch_sub_explicit(&pool->n_running, 1, memory_order_acq_rel) == 1) {
            (void)pthread_mutex_lock(&pool->lock);
            (void)pthread_cond_signal(&pool->done);
            (void)pthread_mutex_unlock(&pool->lock);
        }
    }
    return NULL;
}

static void announce(fv_pool_t *pool, bool stop)
{
    (void)pthread_mutex_lock(&pool->lock);
    pool->stop = stop;
    atomic_fetch_add_explicit(&pool->generation, 1U, memory_order_release);
    (void)pthread_cond_broadcast(&pool->work);
    (void)pthread_mutex_unlock(&pool->lock);
}

fv_status_t fv_pool_create(int32_t n_threads, fv_pool_t **out)
{
    size_t n_others = (n_threads > 1) ? (size_t)(n_threads - 1) : 0U;
    fv_pool_t *pool = calloc(1, sizeof(*pool) + n_others * sizeof(pool->threads[0]));

    if (pool == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "cpu backend: no memory for a pool of %d threads",
                       n_threads);
    }
    (void)pthread_mutex_init(&pool->lock, NULL);
    (void)pthread_cond_init(&pool->work, NULL);
    (void)pthread_cond_init(&pool->done, NULL);
    for (size_t i = 0; i < n_others; i++) {
        pool_thread_t *t = &pool->threads[i];
        int error = 0;

        t->pool = pool;
        t->thread_idx = (int32_t)i + 1;
        error = pthread_create(&t->handle, NULL, thread_main, t);
        if (error != 0) {
            fv_pool_destroy(pool);
            return fv_fail(FV_ERR_SYSTEM, "cpu backend: thread %d of %d: pthread_create: error %d",
                           (int)i + 2, n_threads, error);
        }
        pool->n_started++;
    }
    *out = pool;
    return FV_OK;
}

void fv_pool_destroy(fv_pool_t *pool)
{
    if (pool == NULL) {
        return;
    }
    announce(pool, true);
    for (int32_t i = 0; i < pool->n_started; i++) {
        (void)pthread_join(pool->threads[i].handle, NULL);
    }
    (void)pthread_cond_destroy(&pool->done);
    (void)pthread_cond_destroy(&pool->work);
    (void)pthread_mutex_destroy(&pool->lock);
    free(pool);
}

void fv_pool_run(fv_pool_t *pool, fv_pool_fn_t fn, void *ctx)
{
    if (pool->n_started > 0) {
        pool->fn = fn;
        pool->ctx = ctx;
        atomic_store_explicit(&pool->n_running, pool->n_started, memory_order_relaxed);
        announce(pool, false);
    }
    fn(ctx, 0);
    for (int i = 0; i < SPIN_TURNS; i++) {
        if (atomic_load_explicit(&pool->n_running, memory_order_acquire) == 0) {
            break; /* the last thread may still be on its way to signal: harmless */
        }
        relax();
    }
    if (atomic_load_explicit(&pool->n_running, memory_order_acquire) != 0) {
        (void)pthread_mutex_lock(&pool->lock);
        while (atomic_load_explicit(&pool->n_running, memory_order_acquire) != 0) {
            (void)pthread_cond_wait(&pool->done, &pool->lock);
        }
        (void)pthread_mutex_unlock(&pool->lock);
    }
}
