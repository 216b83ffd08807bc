/*
 * ahead_cuda.c - inputs of the next step travel to the device while this one works.
 *
 * Decode path: between stations 5 and 6 of 10. Before: coord/engine_step.c, worker/inbox_mpi.c, which have the next step's
 * tensors early. After: append_cuda.c, stage_cuda.c, which read them where they are.
 *
 * Copies go by DMA on a stream of their own into one half of a fixed area; the other half belongs to the step that works.
 * finish() turns the halves round, so a copy lives as long as the step after the one during which it was made: long enough
 * for the tensors themselves to stay, and no longer, because their memory is used again. Outside finish() nothing is taken:
 * which step it is for would be a guess. What finds no room, or is small, travels with its step as ever: only a hint is lost.
 */
#include "kernels/backend_cuda.h"

#define HALF_BYTES \
    ((size_t)32    \
     << 20) /* a step of 64 x 128 tokens, 32/8 heads of 128, bf16, is 96 MB: its Q does not fit */
#define BYTES_MIN \
    ((size_t)32 << 10) /* a copy costs the host 2 us; the pull kernel brings as much in 2 */
#define ALIGNMENT 256U

fv_status_t fv_cuda_ahead_create(fv_cuda_ahead_t *ahead)
{
    FV_RETURN_IF_ERR(FV_CUDA(cudaStreamCreateWithFlags(&ahead->stream, cudaStreamNonBlocking)));
    FV_RETURN_IF_ERR(FV_CUDA(cudaEventCreateWithFlags(&ahead->copied, cudaEventDisableTiming)));
    FV_RETURN_IF_ERR(FV_CUDA(cudaMalloc((void **)&ahead->area, 2U * HALF_BYTES)));
    ahead->half_bytes = HALF_BYTES;
    return FV_OK;
}

void fv_cuda_ahead_destroy(fv_cuda_ahead_t *ahead)
{
    if (ahead->stream != NULL) {
        (void)cudaStreamSynchronize(ahead->stream);
        (void)cudaStreamDestroy(ahead->stream);
    }
    if (ahead->copied != NULL) {
        (void)cudaEventDestroy(ahead->copied);
    }
    (void)cudaFree(ahead->area);
}

void fv_cuda_prefetch(fv_backend_t *backend, const void *data, size_t n_bytes)
{
    fv_cuda_ahead_t *a = &backend->ahead;
    fv_cuda_ahead_step_t *next = &a->steps[a->now ^ 1U];
    uint8_t *dst = a->area + (size_t)(a->now ^ 1U) * a->half_bytes + next->used;
    const size_t room = a->half_bytes - next->used;

    n_bytes = (n_bytes < room) ? n_bytes : room; /* items that begin it may do with the rest */
    if (!a->is_open || (n_bytes < BYTES_MIN) || (next->n_leases == FV_CUDA_LEASES_MAX) ||
        (backend->lost != FV_OK) || !fv_cuda_is_pinned(backend, data, n_bytes)) {
        return;
    }
    if ((cudaMemcpyAsync(dst, data, n_bytes, cudaMemcpyHostToDevice, a->stream) != cudaSuccess) ||
        (cudaEventRecord(a->copied, a->stream) != cudaSuccess)) {
        return; /* the step itself will meet the error */
    }
    next->leases[next->n_leases].src = data;
    next->leases[next->n_leases].dst = dst;
    next->leases[next->n_leases].n_bytes = n_bytes;
    next->n_leases++;
    next->used += fv_align_up(n_bytes, ALIGNMENT);
}

const uint8_t *fv_cuda_ahead_source(fv_backend_t *backend, const void *src, size_t n_bytes)
{
    fv_cuda_ahead_t *a = &backend->ahead;
    fv_cuda_ahead_step_t *now = &a->steps[a->now];
    const uint8_t *at = src;

    for (size_t i = 0; i < now->n_leases; i++) {
        if ((at >= now->leases[i].src) && (at < now->leases[i].src + now->leases[i].n_bytes) &&
            (n_bytes <= (size_t)(now->leases[i].src + now->leases[i].n_bytes - at))) {
            now->is_used = true;
            a->n_bytes += n_bytes;
            return now->leases[i].dst + (at - now->leases[i].src);
        }
    }
    return src;
}

fv_status_t fv_cuda_ahead_join(fv_backend_t *backend)
{
    fv_cuda_ahead_t *a = &backend->ahead;

    if (!a->steps[a->now].is_used) {
        return FV_OK;
    }
    a->steps[a->now].is_used = false;
    /* of the last copy: those before it are done then too */
    return FV_CUDA(cudaStreamWaitEvent(backend->stream, a->copied, 0));
}

void fv_cuda_ahead_next(fv_backend_t *backend)
{
    fv_cuda_ahead_t *a = &backend->ahead;

    a->steps[a->now].n_leases = 0;
    a->steps[a->now].used = 0;
    a->steps[a->now].is_used = false;
    a->now ^= 1U;
}
