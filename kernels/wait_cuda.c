/*
 * wait_cuda.c - the end of a step on the GPU: waiting with limits, and what the device's clock says.
 *
 * Decode path: station 7 of 10. Before: attend_cuda.c, merge_cuda.c. After: worker/step.c.
 *
 * Waiting asks the driver again and again: going to sleep and being woken costs more than a small step. Long waits yield
 * the core between questions, very long ones nap.
 */
#include "common/clock.h"
#include "kernels/backend_cuda.h"

#include <sched.h>
#include <string.h>
#include <time.h>

#define SPIN_US  2000 /* of asking without pause */
#define YIELD_US 20000
#define NAP_NS   50000
#define ASK_US   200 /* between two questions whether to give up */

/* ------------------------------------------------------------------ the clock */

fv_status_t fv_cuda_clock_create(fv_cuda_clock_t *clock)
{
    for (int i = 0; i < FV_CUDA_MARKS; i++) {
        FV_RETURN_IF_ERR(FV_CUDA(cudaEventCreate(&clock->events[i])));
    }
    return FV_OK;
}

void fv_cuda_clock_destroy(fv_cuda_clock_t *clock)
{
    for (int i = 0; i < FV_CUDA_MARKS; i++) {
        if (clock->events[i] != NULL) {
            (void)cudaEventDestroy(clock->events[i]);
            clock->events[i] = NULL;
        }
    }
}

fv_status_t fv_cuda_clock_mark(fv_backend_t *backend, fv_cuda_mark_t mark)
{
    fv_cuda_clock_t *clock = &backend->clock;

    if (!clock->is_wanted || ((mark == FV_CUDA_BEGIN) && clock->has[FV_CUDA_BEGIN])) {
        return FV_OK;
    }
    clock->has[mark] = true;
    return FV_CUDA(cudaEventRecord(clock->events[mark], backend->stream));
}

static uint32_t between_us(cudaEvent_t from, cudaEvent_t to)
{
    float ms = 0.0F;

    return (cudaEventElapsedTime(&ms, from, to) == cudaSuccess) ? (uint32_t)(ms * 1000.0F + 0.5F)
                                                                : 0U;
}

/* The step is over: what its marks say. */
static void read_clock(fv_cuda_clock_t *clock, fv_device_times_t *out_times)
{
    fv_device_times_t times = {.is_known = clock->has[FV_CUDA_BEGIN]};
    cudaEvent_t from = clock->events[FV_CUDA_BEGIN];

    if (clock->has[FV_CUDA_ATTENDED]) {
        times.compute_us = between_us(from, clock->events[FV_CUDA_ATTENDED]);
        from = clock->events[FV_CUDA_ATTENDED];
    }
    if (clock->has[FV_CUDA_MERGED]) {
        times.exchange_us = between_us(from, clock->events[FV_CUDA_MERGED]);
    }
    *out_times = times;
}

/* ------------------------------------------------------------------ waiting */

static fv_status_t give_up(fv_backend_t *backend, fv_status_t status, int64_t waited_us)
{
    backend->lost = status;
    return fv_fail(status, "cuda backend: the step was given up after %lld ms%s",
                   (long long)(waited_us / 1000),
                   (status == FV_ERR_TIMED_OUT) ? "" : ": a rank is gone");
}

static void pause_after(int64_t waited_us)
{
    if (waited_us > YIELD_US) {
        (void)nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
    } else if (waited_us > SPIN_US) {
        (void)sched_yield();
    }
}

fv_status_t fv_cuda_wait(fv_backend_t *backend, const fv_wait_limits_t *limits)
{
    const int64_t begin_us = fv_clock_us();
    int64_t next_us = begin_us + ASK_US;

    for (;;) {
        const cudaError_t error = cudaStreamQuery(backend->stream);
        const int64_t now_us = fv_clock_us();

        if (error != cudaErrorNotReady) {
            return fv_cuda_check(error, "the step's work");
        }
        if ((limits != NULL) && (now_us >= next_us)) {
            next_us = now_us + ASK_US;
            if ((limits->is_aborted != NULL) && limits->is_aborted(limits->arg)) {
                return give_up(backend, FV_ERR_RANK_LOST, now_us - begin_us);
            }
            if (now_us - begin_us >= (int64_t)limits->deadline_ms * 1000) {
                return give_up(backend, FV_ERR_TIMED_OUT, now_us - begin_us);
            }
        }
        pause_after(now_us - begin_us);
    }
}

fv_status_t fv_cuda_usable(const fv_backend_t *backend)
{
    if (backend->lost != FV_OK) {
        return fv_fail(backend->lost, "cuda backend: a step was given up before");
    }
    return FV_OK;
}

fv_status_t
fv_cuda_finish(fv_backend_t *backend, const fv_wait_limits_t *limits, fv_device_times_t *out_times)
{
    fv_cuda_clock_t *clock = &backend->clock;

    FV_RETURN_IF_ERR(fv_cuda_usable(backend));
    FV_RETURN_IF_ERR(fv_cuda_wait(backend, limits));
    if (out_times != NULL) {
        read_clock(clock, out_times);
    }
    clock->is_wanted = clock->is_wanted || (out_times != NULL);
    memset(clock->has, 0, sizeof(clock->has));
    fv_cuda_staging_reset(backend);
    return FV_OK;
}
