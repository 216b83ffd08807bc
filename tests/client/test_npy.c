/*
 * test_npy.c - .npy files: what is written is read back, and nothing in a file is trusted.
 */
#include "client/npy.h"
#include "tests/support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char g_path[64];

static int setup(void **state)
{
    (void)state;
    (void)snprintf(g_path, sizeof(g_path), "/tmp/fv-test-npy-%ld", (long)getpid());
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    (void)unlink(g_path);
    return 0;
}

static void put(const void *data, size_t n_bytes)
{
    FILE *file = fopen(g_path, "wb");

    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, n_bytes, file), n_bytes);
    assert_int_equal(fclose(file), 0);
}

/* A version 1 file with this header text and n_data bytes of elements. */
static void put_file(const char *header, size_t n_data)
{
    uint8_t bytes[1024] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0};
    size_t n = strlen(header);

    assert_true((10 + n + n_data) <= sizeof(bytes));
    bytes[8] = (uint8_t)n;
    bytes[9] = (uint8_t)(n >> 8U);
    memcpy(bytes + 10, header, n);
    put(bytes, 10 + n + n_data);
}

static void test_round_trip(void **state)
{
    static const fv_npy_type_t k_types[] = {FV_NPY_F4, FV_NPY_F2, FV_NPY_U2};
    float data[24];
    char text[FV_NPY_TEXT_BYTES];

    (void)state;
    for (size_t i = 0; i < FV_COUNT(data); i++) {
        data[i] = (float)i * 1.5F;
    }
    for (size_t t = 0; t < FV_COUNT(k_types); t++) {
        for (uint32_t n_dims = 0; n_dims <= 3; n_dims++) {
            fv_npy_t in = {.type = k_types[t], .n_dims = n_dims, .shape = {2, 3, 4}, .data = data};
            fv_npy_t out;
            in.n_bytes = fv_npy_type_bytes(k_types[t]);
            for (uint32_t d = 0; d < n_dims; d++) {
                in.n_bytes *= in.shape[d];
            }
            assert_true(fv_npy_write(g_path, &in, text));
            assert_true(fv_npy_read(g_path, &out, text));
            assert_int_equal(out.type, in.type);
            assert_int_equal(out.n_dims, n_dims);
            assert_memory_equal(out.shape, in.shape, n_dims * sizeof(size_t));
            assert_int_equal(out.n_bytes, in.n_bytes);
            assert_memory_equal(out.data, data, in.n_bytes);
            fv_npy_free(&out);
        }
    }
}

/* Byte for byte what numpy.save writes for np.arange(3, dtype='<f4'), so that numpy reads ours. */
static void test_bytes_are_numpys(void **state)
{
    static const char k_header[] = "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }";
    float data[3] = {0.0F, 1.0F, 2.0F};
    fv_npy_t in = {
        .type = FV_NPY_F4, .n_dims = 1, .shape = {3}, .data = data, .n_bytes = sizeof(data)};
    uint8_t expected[128 + sizeof(data)] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, 118, 0};
    uint8_t got[sizeof(expected) + 1];
    char text[FV_NPY_TEXT_BYTES];
    FILE *file = NULL;

    (void)state;
    memset(expected + 10, ' ', 118);
    memcpy(expected + 10, k_header, sizeof(k_header) - 1);
    expected[127] = '\n';
    memcpy(expected + 128, data, sizeof(data));
    assert_true(fv_npy_write(g_path, &in, text));
    file = fopen(g_path, "rb");
    assert_non_null(file);
    assert_int_equal(fread(got, 1, sizeof(got), file), sizeof(expected));
    (void)fclose(file);
    assert_memory_equal(got, expected, sizeof(expected));
}

/* Headers as other programs write them: version 2, other key order and spacing, V2 for bfloat16. */
static void test_other_writers(void **state)
{
    static const char k_header[] = "{'shape':(2, 2),'fortran_order':False,'descr':'|V2'}\n";
    uint8_t bytes[256] = {0x93, 'N', 'U', 'M', 'P', 'Y', 2, 0, sizeof(k_header) - 1, 0, 0, 0};
    char text[FV_NPY_TEXT_BYTES];
    fv_npy_t out;

    (void)state;
    memcpy(bytes + 12, k_header, sizeof(k_header) - 1);
    put(bytes, 12 + (sizeof(k_header) - 1) + 8);
    assert_true(fv_npy_read(g_path, &out, text));
    assert_int_equal(out.type, FV_NPY_U2);
    assert_int_equal(out.n_dims, 2);
    assert_int_equal(out.n_bytes, 8);
    fv_npy_free(&out);
}

static void refused(const char *word)
{
    char text[FV_NPY_TEXT_BYTES] = "";
    fv_npy_t out;

    assert_false(fv_npy_read(g_path, &out, text));
    if ((strstr(text, word) == NULL) || (strstr(text, g_path) == NULL)) {
        fail_msg("expected \"%s\" and the path in \"%s\"", word, text);
    }
}

static void test_bad_files(void **state)
{
    static const struct {
        const char *header;
        size_t n_data;
        const char *word;
    } k_bad[] = {
        {"{'descr': '>f4', 'fortran_order': False, 'shape': (1,), }", 4, "dtype"},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }", 8, "dtype"},
        {"{'fortran_order': False, 'shape': (1,), }", 4, "dtype"},
        {"{'descr': '<f4', 'fortran_order': True, 'shape': (1, 1), }", 4, "fortran_order"},
        {"{'descr': '<f4', 'shape': (1, 1), }", 4, "fortran_order"},
        {"{'descr': '<f4', 'fortran_order': False, }", 4, "shape"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1, x), }", 4, "shape"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", 4, "shape"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1", 4, "shape"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1,1,1,1,1,1,1,1,1), }", 4, "shape"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296), }", 4,
         "shape"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904,), }", 4, "shape"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }", 4, "data"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", 7, "data"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", 9, "data"},
    };
    uint8_t huge[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, 0xFF, 0xFF};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_bad); i++) {
        put_file(k_bad[i].header, k_bad[i].n_data);
        refused(k_bad[i].word);
    }
    put("hello", 5);
    refused("not a .npy file");
    put(huge, sizeof(huge)); /* a header that is not there */
    refused("header");
    (void)unlink(g_path);
    refused("cannot be opened");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_bytes_are_numpys),
        cmocka_unit_test(test_other_writers),
        cmocka_unit_test(test_bad_files),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
