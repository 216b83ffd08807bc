/*
 * digest.h - checksums, from a well-kept library (ISA-L): the only door to it.
 */
#ifndef FV_COMMON_DIGEST_H
#define FV_COMMON_DIGEST_H

#include <stddef.h>
#include <stdint.h>

/* crc32c (Castagnoli) of `n_bytes`, continued from `crc` (0 to begin). Cost: 15-20 GB/s. Thread: any. */
uint32_t fv_crc32c(uint32_t crc, const void *data, size_t n_bytes);

/* 64-bit CRC (ECMA-182, reflected), for names that must be the same in every run. Thread: any. */
uint64_t fv_crc64(const void *data, size_t n_bytes);

#endif /* FV_COMMON_DIGEST_H */
