/*
 * npy.h - NumPy's .npy files: a small header, then the elements.
 *
 * Read are versions 1 to 3, little-endian, C order, elements of 2 or 4 bytes: f4, f2, u2, and the V2
 * under which NumPy stores a bfloat16 it knows no name for. Written is version 1.
 */
#ifndef FV_CLIENT_NPY_H
#define FV_CLIENT_NPY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FV_NPY_DIMS_MAX   8
#define FV_NPY_TEXT_BYTES 256

typedef enum fv_npy_type {
    FV_NPY_F4, /* fp32 */
    FV_NPY_F2, /* fp16 */
    FV_NPY_U2, /* 16 bits that mean something else: bf16 */
} fv_npy_type_t;

typedef struct fv_npy {
    fv_npy_type_t type;
    uint32_t n_dims;
    size_t shape[FV_NPY_DIMS_MAX];
    void *data; /* owned; C order */
    size_t n_bytes;
} fv_npy_t;

static inline size_t fv_npy_type_bytes(fv_npy_type_t type)
{
    return (type == FV_NPY_F4) ? 4U : 2U;
}

/*
 * Reads a whole file. On failure returns false with the reason, which names the path, in `text`.
 * *out: released by fv_npy_free(). Nothing in the file is trusted.
 */
bool fv_npy_read(const char *path, fv_npy_t *out, char text[FV_NPY_TEXT_BYTES]);
void fv_npy_free(fv_npy_t *array); /* zeroed is fine */

/* Writes `array` (data borrowed); on failure false with the reason in `text`. */
bool fv_npy_write(const char *path, const fv_npy_t *array, char text[FV_NPY_TEXT_BYTES]);

#endif /* FV_CLIENT_NPY_H */
