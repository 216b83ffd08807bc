/*
 * scale_read_cuda.c - the GPU's streaming read, over as much of the arena as there is.
 */
#include "bench/cuda_peak.h"
#include "bench/scale/scale.h"
#include "kernels/backend_cuda.h"

#define READ_UNIT      ((size_t)16 << 10) /* fv_peak_read's */
#define READ_BYTES_MAX ((size_t)8 << 30)
#define ROUNDS         5

static void check(cudaError_t error, const char *what)
{
    fv_scale_check(fv_cuda_check(error, what), what);
}

double fv_scale_read_rate_cuda(const fv_scale_rank_t *r)
{
    const fv_backend_t *b = r->worker->backend;
    size_t n_bytes = (b->kv_arena_bytes < READ_BYTES_MAX) ? b->kv_arena_bytes : READ_BYTES_MAX;
    uint32_t *sink = NULL;
    cudaEvent_t from = NULL;
    cudaEvent_t to = NULL;
    double best = 0.0;

    n_bytes = n_bytes / READ_UNIT * READ_UNIT;
    check(cudaMalloc((void **)&sink, 4096), "sink");
    check(cudaEventCreate(&from), "event");
    check(cudaEventCreate(&to), "event");
    check(fv_peak_read(b->arena, n_bytes, b->n_sms, sink, b->stream), "warm up");
    check(cudaStreamSynchronize(b->stream), "warm up");
    (void)MPI_Barrier(r->comm);
    for (int i = 0; i < ROUNDS; i++) {
        float ms = 0.0F;
        double rate = 0.0;

        check(cudaEventRecord(from, b->stream), "record");
        check(fv_peak_read(b->arena, n_bytes, b->n_sms, sink, b->stream), "read");
        check(cudaEventRecord(to, b->stream), "record");
        check(cudaEventSynchronize(to), "read");
        check(cudaEventElapsedTime(&ms, from, to), "elapsed");
        rate = (double)n_bytes / (double)ms * 1e-6;
        best = (rate > best) ? rate : best;
    }
    check(cudaEventDestroy(from), "event");
    check(cudaEventDestroy(to), "event");
    check(cudaFree(sink), "sink");
    return best;
}
