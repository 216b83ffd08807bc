/*
 * digest.c - ISA-L takes at most INT_MAX bytes a call; longer input is fed in pieces.
 */
#include "common/digest.h"

#include <isa-l/crc.h>
#include <isa-l/crc64.h>

#define PIECE_BYTES ((size_t)1 << 30)

uint32_t fv_crc32c(uint32_t crc, const void *data, size_t n_bytes)
{
    unsigned char *p =
        (unsigned char *)(uintptr_t)data; /* ISA-L reads only, but forgot the const */

    crc = ~crc; /* crc32_iscsi leaves the customary inversions to its caller */
    while (n_bytes > 0) {
        size_t n = (n_bytes < PIECE_BYTES) ? n_bytes : PIECE_BYTES;
        crc = crc32_iscsi(p, (int)n, crc);
        p += n;
        n_bytes -= n;
    }
    return ~crc;
}

uint64_t fv_crc64(const void *data, size_t n_bytes)
{
    return crc64_ecma_refl(0, data, n_bytes);
}
