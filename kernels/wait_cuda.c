/*
 * wait_cuda.c - the end of a step on the GPU: waiting with limits, and what the device's clock says.
 *
 * Decode path: station 7 of 10. Before: attend_cuda.c, merge_cuda.c. After: worker/step.c.
 *
 * Waiting watches a word that the step's last kernel writes: asking the driver costs 1 us more, timed events another 4, and
 * going to sleep and being woken more than a small step. Long waits yield the core between looks, very long ones nap.
 * The times are the device's clock, read by the step's first and last kernel.
 */
#include "common/clock.h"
#include "kernels/backend_cuda.h"

#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#define SPIN_US  2000 /* of asking without pause */
#define YIELD_US 20000
#define NAP_NS   50000
#define ASK_US \
    50 /* between two calls of is_aborted(), which others use to get on with their work */
#define QUERY_US 1000 /* between two questions to the driver, which take us each */

const fv_wait_limits_t fv_cuda_long = {.deadline_ms = 30000};

/* ------------------------------------------------------------------ times */

fv_status_t fv_cuda_attended(fv_backend_t *backend)
{
    return FV_CUDA(
        fv_stamp_launch(&backend->outbox.record->attended_ns, backend->has_sm90, backend->stream));
}

static uint32_t between_us(uint64_t from_ns, uint64_t to_ns)
{
    return (to_ns > from_ns) ? (uint32_t)((to_ns - from_ns + 500U) / 1000U) : 0U;
}

/* The step is over: what its record says. */
static void read_times(fv_cuda_record_t *record, fv_device_times_t *out_times)
{
    const bool is_known = record->begin_ns != 0U;
    const bool has_exchange = is_known && (record->attended_ns != 0U);
    const uint64_t attended_ns = has_exchange ? record->attended_ns : record->end_ns;

    if (out_times != NULL) {
        *out_times = (fv_device_times_t){
            .is_known = is_known,
            .compute_us = is_known ? between_us(record->begin_ns, attended_ns) : 0U,
            .exchange_us = has_exchange ? between_us(attended_ns, record->end_ns) : 0U,
        };
    }
    record->begin_ns = 0;
    record->attended_ns = 0;
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

/* Has the device failed? A stream that is idle has written the word, or is about to be seen to. */
static fv_status_t ask_driver(const fv_backend_t *backend)
{
    const cudaError_t error = cudaStreamQuery(backend->stream);

    return (error == cudaErrorNotReady) ? FV_OK : fv_cuda_check(error, "the step's work");
}

/* Is there still something to wait for? */
static fv_status_t
ask_caller(fv_backend_t *backend, const fv_wait_limits_t *limits, int64_t waited_us)
{
    if ((limits->is_aborted != NULL) && limits->is_aborted(limits->arg)) {
        return give_up(backend, FV_ERR_RANK_LOST, waited_us);
    }
    if (waited_us >= (int64_t)limits->deadline_ms * 1000) {
        return give_up(backend, FV_ERR_TIMED_OUT, waited_us);
    }
    return FV_OK;
}

fv_status_t fv_cuda_wait(fv_backend_t *backend, const fv_wait_limits_t *limits)
{
    fv_cuda_outbox_t *o = &backend->outbox;
    const volatile uint32_t *n_done = &o->record->n_done;
    const int64_t begin_us = fv_clock_us();
    int64_t ask_us = begin_us; /* at once: the device may not need long */
    int64_t query_us = begin_us + QUERY_US;

    o->n_done++;
    FV_RETURN_IF_ERR(
        FV_CUDA(fv_done_launch(o->record, o->n_done, backend->has_sm90, backend->stream)));
    while (*n_done != o->n_done) {
        const int64_t now_us = fv_clock_us();

        if (now_us >= query_us) {
            query_us = now_us + QUERY_US;
            FV_RETURN_IF_ERR(ask_driver(backend));
        }
        if ((limits != NULL) && (now_us >= ask_us)) {
            ask_us = now_us + ASK_US;
            FV_RETURN_IF_ERR(ask_caller(backend, limits, now_us - begin_us));
        }
        pause_after(now_us - begin_us);
    }
    atomic_thread_fence(memory_order_acquire); /* results were written before the word */
    return FV_OK;
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
    FV_RETURN_IF_ERR(fv_cuda_usable(backend));
    FV_RETURN_IF_ERR(fv_cuda_flush(backend));
    backend->ahead.is_open = true;
    fv_status_t status = fv_cuda_wait(backend, limits);
    backend->ahead.is_open = false;
    FV_RETURN_IF_ERR(status);
    read_times(backend->outbox.record, out_times);
    backend->outbox.has_begun = false;
    fv_cuda_staging_reset(backend);
    fv_cuda_ahead_next(backend);
    return FV_OK;
}
