/*
 * cuda_peak.h - device code of the GPU kernel benchmark: random cache, streaming read, a naive reference.
 */
#ifndef FV_BENCH_CUDA_PEAK_H
#define FV_BENCH_CUDA_PEAK_H

#include "kernels/kernels.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Near-normal bf16 values, the same for a seed. */
cudaError_t fv_peak_fill_bf16(void *data, size_t n_elems, uint32_t seed, cudaStream_t stream);

/* Reads n_bytes (multiple of 16 KiB) by bulk copies, 12 x 16 KiB under way on each SM. */
cudaError_t
fv_peak_read(const void *data, size_t n_bytes, int32_t n_sms, uint32_t *sink, cudaStream_t stream);

/* One row of bf16 attention over one KV head, in fp64, from pages as kernels/lean_cuda.h lays them out. */
typedef struct fv_peak_row {
    const uint8_t *arena;
    const fv_page_ref_t *pages; /* device */
    const uint16_t *q;          /* device, [head_dim] */
    double *out;                /* device, [head_dim + 1]: the row, then its natural lse */
    int64_t n_tokens;
    int32_t head_dim;
    double scale;
} fv_peak_row_t;

/*
 * Matrix products of 2 warpgroups on each SM: `steps` times 4 wgmma m64n256k16, bf16, on 48 KB of `data` in shared memory.
 * sink: one word.
 */
#define FV_PEAK_WGMMA_STEPS 20000
cudaError_t fv_peak_wgmma(const void *data,
                          int32_t n_steps,
                          int32_t n_sms,
                          uint32_t *sink,
                          cudaStream_t stream);
double fv_peak_wgmma_flop(int32_t n_steps, int32_t n_sms);

cudaError_t fv_peak_reference(const fv_peak_row_t *row, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* FV_BENCH_CUDA_PEAK_H */
