/*
 * secret.h - what is done with secrets: digests, comparison in constant time, random bytes. The only door to libcrypto
 * besides coord/rpc_tls.c.
 */
#ifndef FV_COMMON_SECRET_H
#define FV_COMMON_SECRET_H

#include "common/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FV_SHA256_BYTES 32

/* Errors: FV_ERR_SYSTEM when the library refuses (it was built without SHA-256). Thread: any. */
FV_MUST_CHECK fv_status_t fv_sha256(const void *data, size_t n_bytes, uint8_t out[FV_SHA256_BYTES]);

/* HMAC-SHA256. Errors: as fv_sha256(). */
FV_MUST_CHECK fv_status_t fv_hmac_sha256(const void *key,
                                         size_t key_bytes,
                                         const void *data,
                                         size_t n_bytes,
                                         uint8_t out[FV_SHA256_BYTES]);

/* True when equal; takes as long whatever the bytes are. */
bool fv_secret_equal(const void *a, const void *b, size_t n_bytes);

/* Overwrites; the compiler may not leave it out. */
void fv_secret_wipe(void *data, size_t n_bytes);

/* From the kernel. Errors: FV_ERR_SYSTEM. */
FV_MUST_CHECK fv_status_t fv_random_bytes(void *out, size_t n_bytes);

/* 2 * n_bytes lower-case digits and a NUL. */
void fv_hex_format(const void *data, size_t n_bytes, char *out);
/* Exactly 2 * n_bytes digits, either case. False: something else; out is undefined then. */
bool fv_hex_parse(const char *text, size_t n_bytes, void *out);

#endif /* FV_COMMON_SECRET_H */
