/*
 * npy.c - reading and writing of .npy files.
 *
 * Layout (numpy.lib.format): "\x93NUMPY", major, minor, the header's length (u16 in version 1, u32
 * later, little-endian), the header - a Python dict literal
 *     {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }
 * padded with spaces and a newline to a multiple of 64 bytes - then the elements.
 */
#include "client/npy.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAGIC_BYTES      6
#define PREAMBLE_BYTES   10    /* of version 1, as written */
#define HEADER_BYTES_MAX 65536 /* ours is about 100 */
#define ALIGN_BYTES      64

static const uint8_t k_magic[MAGIC_BYTES] = {0x93, 'N', 'U', 'M', 'P', 'Y'};

static const struct {
    const char *descr;
    fv_npy_type_t type;
} k_types[] = {
    {"<f4", FV_NPY_F4}, {"<f2", FV_NPY_F2}, {"<u2", FV_NPY_U2},
    {"|V2", FV_NPY_U2}, {"<V2", FV_NPY_U2},
};

#define N_TYPES (sizeof(k_types) / sizeof(k_types[0]))

__attribute__((format(printf, 2, 3))) static bool
fail(char text[FV_NPY_TEXT_BYTES], const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    (void)vsnprintf(text, FV_NPY_TEXT_BYTES, fmt, ap);
    va_end(ap);
    return false;
}

/* ------------------------------------------------------------------ header */

/* The text after "'key':" and blanks; NULL when the header has no such key. */
static const char *value_of(const char *header, const char *key)
{
    char quoted[32];
    const char *at = NULL;

    (void)snprintf(quoted, sizeof(quoted), "'%s'", key);
    at = strstr(header, quoted);
    if (at == NULL) {
        return NULL;
    }
    at += strlen(quoted);
    at += strspn(at, " ");
    if (*at != ':') {
        return NULL;
    }
    at++;
    return at + strspn(at, " ");
}

static bool parse_descr(const char *path, const char *header, fv_npy_t *out, char *text)
{
    const char *descr = value_of(header, "descr");

    for (size_t i = 0; (descr != NULL) && (descr[0] == '\'') && (i < N_TYPES); i++) {
        size_t n = strlen(k_types[i].descr);
        if ((strncmp(descr + 1, k_types[i].descr, n) == 0) && (descr[n + 1] == '\'')) {
            out->type = k_types[i].type;
            return true;
        }
    }
    return fail(text, "%s: dtype: given %.16s, expected '<f4', '<f2' or '<u2' (bf16)", path,
                (descr == NULL) ? "none" : descr);
}

static bool parse_shape(const char *path, const char *header, fv_npy_t *out, char *text)
{
    const char *at = value_of(header, "shape");
    size_t n_elements = 1;

    if ((at == NULL) || (*at != '(')) {
        return fail(text, "%s: shape: the header has none", path);
    }
    at++;
    for (out->n_dims = 0;; out->n_dims++) {
        char *end = NULL;
        at += strspn(at, " ,");
        if (*at == ')') {
            break;
        }
        errno = 0;
        uintmax_t n = strtoumax(at, &end, 10);
        if ((end == at) || (*at == '-') || (errno != 0) || (out->n_dims == FV_NPY_DIMS_MAX)) {
            return fail(text, "%s: shape: given %.32s, expected at most %d whole numbers", path, at,
                        FV_NPY_DIMS_MAX);
        }
        if (__builtin_mul_overflow(n_elements, n, &n_elements)) {
            return fail(text, "%s: shape: more elements than memory can hold", path);
        }
        out->shape[out->n_dims] = (size_t)n;
        at = end;
    }
    if (__builtin_mul_overflow(n_elements, fv_npy_type_bytes(out->type), &out->n_bytes)) {
        return fail(text, "%s: shape: more elements than memory can hold", path);
    }
    return true;
}

static bool parse_header(const char *path, const char *header, fv_npy_t *out, char *text)
{
    const char *order = value_of(header, "fortran_order");

    if (!parse_descr(path, header, out, text) || !parse_shape(path, header, out, text)) {
        return false;
    }
    if ((order == NULL) || ((strncmp(order, "False", 5) != 0) && (out->n_dims > 1))) {
        return fail(text, "%s: fortran_order: given %.5s, expected False (C order)", path,
                    (order == NULL) ? "none" : order);
    }
    return true;
}

/* ------------------------------------------------------------------ read */

static bool read_header(FILE *file, const char *path, fv_npy_t *out, char *text)
{
    uint8_t head[PREAMBLE_BYTES + 2];
    char *header = NULL;
    size_t n_bytes = 0;
    bool is_ok = false;

    if ((fread(head, 1, PREAMBLE_BYTES, file) != PREAMBLE_BYTES) ||
        (memcmp(head, k_magic, MAGIC_BYTES) != 0) || (head[6] < 1) || (head[6] > 3)) {
        return fail(text, "%s: not a .npy file of version 1 to 3", path);
    }
    n_bytes = (size_t)head[8] | ((size_t)head[9] << 8U);
    if (head[6] >= 2) {
        if (fread(head + PREAMBLE_BYTES, 1, 2, file) != 2) {
            return fail(text, "%s: the file ends inside its header", path);
        }
        n_bytes |= ((size_t)head[10] << 16U) | ((size_t)head[11] << 24U);
    }
    if (n_bytes > HEADER_BYTES_MAX) {
        return fail(text, "%s: header: given %zu bytes, expected at most %d", path, n_bytes,
                    HEADER_BYTES_MAX);
    }
    header = calloc(n_bytes + 1, 1); /* ends with NUL for the string functions */
    if (header == NULL) {
        return fail(text, "%s: out of memory", path);
    }
    if (fread(header, 1, n_bytes, file) != n_bytes) {
        is_ok = fail(text, "%s: the file ends inside its header", path);
    } else {
        is_ok = parse_header(path, header, out, text);
    }
    free(header);
    return is_ok;
}

/* Reads in pieces, so that a header that promises more than the file has costs no memory. */
static bool read_data(FILE *file, const char *path, fv_npy_t *out, char *text)
{
    size_t n_read = 0;
    size_t cap = 0;

    do {
        size_t want = (cap == 0) ? (1U << 20U) : (2 * cap);
        uint8_t *data = NULL;
        want = (want < out->n_bytes) ? want : out->n_bytes;
        data = realloc(out->data, (want == 0) ? 1 : want);
        if (data == NULL) {
            return fail(text, "%s: out of memory for %zu bytes", path, out->n_bytes);
        }
        out->data = data;
        cap = want;
        n_read += fread(data + n_read, 1, cap - n_read, file);
        if (n_read != cap) {
            return fail(text, "%s: data: given %zu bytes, expected %zu by its shape", path, n_read,
                        out->n_bytes);
        }
    } while (cap < out->n_bytes);
    if (fgetc(file) != EOF) {
        return fail(text, "%s: data: more than the %zu bytes of its shape", path, out->n_bytes);
    }
    return true;
}

bool fv_npy_read(const char *path, fv_npy_t *out, char text[FV_NPY_TEXT_BYTES])
{
    fv_npy_t array = {0};
    FILE *file = fopen(path, "rb");
    bool is_ok = false;

    if (file == NULL) {
        return fail(text, "%s: cannot be opened for reading (errno %d)", path, errno);
    }
    is_ok = read_header(file, path, &array, text) && read_data(file, path, &array, text);
    (void)fclose(file);
    if (!is_ok) {
        fv_npy_free(&array);
        return false;
    }
    *out = array;
    return true;
}

void fv_npy_free(fv_npy_t *array)
{
    free(array->data);
    memset(array, 0, sizeof(*array));
}

/* ------------------------------------------------------------------ write */

static const char *descr_of(fv_npy_type_t type)
{
    for (size_t i = 0; i < N_TYPES; i++) {
        if (k_types[i].type == type) {
            return k_types[i].descr;
        }
    }
    return "|V2";
}

/* The header with its padding; returns how many bytes of `head` it takes. */
static size_t format_header(const fv_npy_t *array, char head[512])
{
    int n = snprintf(head + PREAMBLE_BYTES, 512 - PREAMBLE_BYTES,
                     "{'descr': '%s', 'fortran_order': False, 'shape': (", descr_of(array->type));
    size_t end = PREAMBLE_BYTES + (size_t)n;
    size_t n_header = 0;

    for (uint32_t i = 0; i < array->n_dims;
         i++) { /* "(3,)" for one dimension, as Python writes it */
        n = snprintf(head + end, 512 - end, "%zu,%s", array->shape[i],
                     ((i + 1) < array->n_dims) ? " " : "");
        end += (size_t)n;
    }
    n = snprintf(head + end, 512 - end, "), }");
    end += (size_t)n;
    while (((end + 1) % ALIGN_BYTES) != 0) {
        head[end++] = ' ';
    }
    head[end++] = '\n';
    memcpy(head, k_magic, MAGIC_BYTES);
    head[6] = 1;
    head[7] = 0;
    n_header = end - PREAMBLE_BYTES;
    head[8] = (char)(n_header & 0xFFU);
    head[9] = (char)(n_header >> 8U);
    return end;
}

bool fv_npy_write(const char *path, const fv_npy_t *array, char text[FV_NPY_TEXT_BYTES])
{
    char head[512];
    size_t n_head = 0;
    FILE *file = NULL;
    bool is_ok = false;

    if (array->n_dims > FV_NPY_DIMS_MAX) { /* so that the header fits */
        return fail(text, "%s: shape: given %u dimensions, expected at most %d", path,
                    array->n_dims, FV_NPY_DIMS_MAX);
    }
    n_head = format_header(array, head);
    file = fopen(path, "wb");
    if (file == NULL) {
        return fail(text, "%s: cannot be opened for writing (errno %d)", path, errno);
    }
    is_ok = (fwrite(head, 1, n_head, file) == n_head) &&
            (fwrite(array->data, 1, array->n_bytes, file) == array->n_bytes);
    is_ok = (fclose(file) == 0) && is_ok; /* a full disk may only show here */
    return is_ok || fail(text, "%s: cannot be written (errno %d)", path, errno);
}
