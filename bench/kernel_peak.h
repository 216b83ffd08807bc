/*
 * kernel_peak.h - what these cores can do at best: the ceilings that bench_kernels reports against.
 */
#ifndef FV_BENCH_KERNEL_PEAK_H
#define FV_BENCH_KERNEL_PEAK_H

#include "kernels/pool.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Reads [data, data + n_bytes) once, an equal part per thread. */
void fv_peak_host_read(fv_pool_t *pool, int32_t n_threads, const void *data, size_t n_bytes);

/* fp32 fused multiply-adds in registers on every thread: flops per second (an FMA is two). */
double fv_peak_fma(fv_pool_t *pool, int32_t n_threads);

/*
 * bf16 multiply-adds with fp32 sums: flops per second; 0 when there is no such unit. amx: with AMX (a CPU backend of isa
 * "amx" was created before, which asked the kernel for it), else with vdpbf16ps.
 */
double fv_peak_bf16(fv_pool_t *pool, int32_t n_threads, bool amx);

#endif /* FV_BENCH_KERNEL_PEAK_H */
