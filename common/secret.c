/*
 * secret.c - libcrypto does the work.
 */
#include "common/secret.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <string.h>
#include <sys/random.h>

fv_status_t fv_sha256(const void *data, size_t n_bytes, uint8_t out[FV_SHA256_BYTES])
{
    unsigned int n = 0;

    if ((EVP_Digest(data, n_bytes, out, &n, EVP_sha256(), NULL) != 1) || (n != FV_SHA256_BYTES)) {
        return fv_fail(FV_ERR_SYSTEM, "libcrypto gives no SHA-256");
    }
    return FV_OK;
}

fv_status_t fv_hmac_sha256(const void *key,
                           size_t key_bytes,
                           const void *data,
                           size_t n_bytes,
                           uint8_t out[FV_SHA256_BYTES])
{
    unsigned int n = 0;

    if ((HMAC(EVP_sha256(), key, (int)key_bytes, data, n_bytes, out, &n) == NULL) ||
        (n != FV_SHA256_BYTES)) {
        return fv_fail(FV_ERR_SYSTEM, "libcrypto gives no HMAC-SHA256");
    }
    return FV_OK;
}

bool fv_secret_equal(const void *a, const void *b, size_t n_bytes)
{
    return CRYPTO_memcmp(a, b, n_bytes) == 0;
}

void fv_secret_wipe(void *data, size_t n_bytes)
{
    OPENSSL_cleanse(data, n_bytes);
}

fv_status_t fv_random_bytes(void *out, size_t n_bytes)
{
    if (getrandom(out, n_bytes, 0) != (ssize_t)n_bytes) { /* whole up to 256 bytes */
        return fv_fail(FV_ERR_SYSTEM, "getrandom gave too little");
    }
    return FV_OK;
}

void fv_hex_format(const void *data, size_t n_bytes, char *out)
{
    static const char k_digits[] = "0123456789abcdef";
    const uint8_t *bytes = data;

    for (size_t i = 0; i < n_bytes; i++) {
        out[2U * i] = k_digits[bytes[i] >> 4U];
        out[(2U * i) + 1U] = k_digits[bytes[i] & 15U];
    }
    out[2U * n_bytes] = '\0';
}

static int digit(char c)
{
    if ((c >= '0') && (c <= '9')) {
        return c - '0';
    }
    if ((c >= 'a') && (c <= 'f')) {
        return c - 'a' + 10;
    }
    return ((c >= 'A') && (c <= 'F')) ? (c - 'A' + 10) : -1;
}

bool fv_hex_parse(const char *text, size_t n_bytes, void *out)
{
    uint8_t *bytes = out;

    if (strlen(text) != 2U * n_bytes) {
        return false;
    }
    for (size_t i = 0; i < n_bytes; i++) {
        int high = digit(text[2U * i]);
        int low = digit(text[(2U * i) + 1U]);
        if ((high < 0) || (low < 0)) {
            return false;
        }
        bytes[i] = (uint8_t)((high << 4) | low);
    }
    return true;
}
