/*
 * scale_read.c - the streaming read that a case's floor is made of: all ranks read at once.
 */
#include "bench/kernel_peak.h"
#include "bench/scale/scale.h"

#include <string.h>

#define CPU_READ_BYTES ((size_t)256 << 20)
#define ROUNDS         8

static double read_rate_cpu(const fv_scale_rank_t *r)
{
    uint8_t *data = fv_scale_alloc(CPU_READ_BYTES, 1);
    fv_pool_t *pool = NULL;
    double best = 0.0;

    memset(data, 1, CPU_READ_BYTES); /* pages of its own, not the zero page */
    fv_scale_check(fv_pool_create(r->device.n_threads, &pool), "threads");
    (void)MPI_Barrier(r->comm);
    for (int i = 0; i < ROUNDS; i++) {
        const double begin = fv_scale_now_us();
        double rate = 0.0;

        fv_peak_host_read(pool, r->device.n_threads, data, CPU_READ_BYTES);
        rate = (double)CPU_READ_BYTES / (fv_scale_now_us() - begin) * 1e-3;
        best = (rate > best) ? rate : best;
    }
    fv_pool_destroy(pool);
    free(data);
    return best;
}

double fv_scale_read_rate(const fv_scale_rank_t *r)
{
#if defined(FV_WITH_CUDA)
    if (r->backend == &fv_backend_cuda) {
        return fv_scale_read_rate_cuda(r);
    }
#endif
    return read_rate_cpu(r);
}
