/*
 * prop_wire_attend.c - the attend scanner against protobuf-c, on random messages in random pieces.
 *
 * Goal:   however a message is written and however it is cut, the scanner reads what protobuf-c reads.
 * Method: protobuf says that the concatenation of two messages is their merge. So a random request is
 *         written as a random row of fragments (fields in any order, some twice, unknown ones between),
 *         cut at random, and judged by tests/fuzz/wire_oracle.h.
 */
#include "proto/attention.pb-c.h"
#include "tests/fuzz/wire_oracle.h"
#include "tests/property/prop_wire_random.h"
#include "tests/support/test.h"

#include <string.h>

#define N_CASES    3000
#define BYTES_MAX  65536
#define TENSOR_MAX 700
#define N_CUTS_MAX 12
#define N_HEAD_CAP 4

static fv_random_t g_random;

typedef struct buffer {
    uint8_t bytes[BYTES_MAX];
    size_t n;
} buffer_t;

static void check(const char *error, const char *what)
{
    if (error != NULL) {
        fail_msg("%s: %s", what, error);
    }
}

/* Pieces of random sizes; often tiny ones, so that varints are cut too. */
static fv_pieces_t random_pieces(const uint8_t *data, size_t n_bytes)
{
    size_t cuts[N_CUTS_MAX];
    size_t n_cuts = fv_random_below(&g_random, N_CUTS_MAX + 1U);

    for (size_t i = 0; i < n_cuts; i++) {
        cuts[i] = fv_random_below(&g_random, (i % 2U == 0) ? 4U : 64U);
    }
    return fv_pieces_cut(data, n_bytes, cuts, n_cuts);
}

static void random_hex(char out[FV_SESSION_ID_CHARS + 1])
{
    fv_session_id_t id;

    for (size_t i = 0; i < sizeof(id.bytes); i++) {
        id.bytes[i] = (uint8_t)fv_random_next(&g_random);
    }
    fv_session_id_format(&id, out);
}

static void append_request(buffer_t *to, const Fovea__V1__AttendRequest *fragment)
{
    assert_true(to->n + fovea__v1__attend_request__get_packed_size(fragment) <= BYTES_MAX);
    to->n += fovea__v1__attend_request__pack(fragment, to->bytes + to->n);
}

/* An unknown field of each wire type: numbers 20..35 are free in the schema. */
static void append_unknown(buffer_t *to)
{
    uint8_t *p = to->bytes + to->n;
    unsigned number = 20U + (unsigned)fv_random_below(&g_random, 12);
    static const uint8_t k_types[] = {0, 1, 2, 5};
    uint8_t type = k_types[fv_random_below(&g_random, 4)];
    size_t n = (type == 1) ? 8U : (type == 5) ? 4U : (type == 2) ? 3U : 1U;

    assert_true(to->n + 16U <= BYTES_MAX);
    *p++ = (uint8_t)(((number << 3U) | type) | 0x80U);
    *p++ = (uint8_t)(number >> 4U);
    if (type == 2) {
        *p++ = (uint8_t)n;
    }
    memset(p, 0x11, n); /* as a varint: 17 */
    to->n = (size_t)(p + n - to->bytes);
}

static void append_item(buffer_t *to, bool is_bad_allowed)
{
    Fovea__V1__AttendRequest fragment = FOVEA__V1__ATTEND_REQUEST__INIT;
    Fovea__V1__AttendItem item = FOVEA__V1__ATTEND_ITEM__INIT;
    Fovea__V1__AttendItem *list[1] = {&item};
    char hex[FV_SESSION_ID_CHARS + 1];

    random_hex(hex);
    item.session_id = hex;
    item.position = fv_random_wide(&g_random) >> 1U;
    item.n_tokens = 1U + (uint32_t)fv_random_below(&g_random, 5000);
    if (is_bad_allowed && (fv_random_below(&g_random, 8) == 0)) {
        hex[fv_random_below(&g_random, FV_SESSION_ID_CHARS)] = 'g';
    }
    if (is_bad_allowed && (fv_random_below(&g_random, 8) == 0)) {
        item.n_tokens = 0;
    }
    fragment.n_items = 1;
    fragment.items = list;
    append_request(to, &fragment);
}

/* One fragment with one random field. */
static void append_fragment(buffer_t *to, bool is_bad_allowed)
{
    static uint8_t tensor[TENSOR_MAX];
    Fovea__V1__AttendRequest f = FOVEA__V1__ATTEND_REQUEST__INIT;
    ProtobufCBinaryData bytes = {.data = tensor, .len = fv_random_below(&g_random, TENSOR_MAX)};

    for (size_t i = 0; i < bytes.len; i++) {
        tensor[i] = (uint8_t)fv_random_next(&g_random);
    }
    switch (fv_random_below(&g_random, 12)) {
    case 0:
        f.request_id = fv_random_wide(&g_random);
        break;
    case 1:
        f.layer = (uint32_t)fv_random_wide(&g_random);
        break;
    case 2:
        f.dtype = (Fovea__V1__DType)fv_random_below(&g_random, is_bad_allowed ? 5 : 4);
        break;
    case 3:
        f.causal_set_case = FOVEA__V1__ATTEND_REQUEST__CAUSAL_SET_CAUSAL;
        f.causal = (protobuf_c_boolean)fv_random_below(&g_random, 2);
        break;
    case 4:
        f.want_lse = 1;
        break;
    case 5:
        f.append_set_case = FOVEA__V1__ATTEND_REQUEST__APPEND_SET_APPEND;
        f.append = (protobuf_c_boolean)(is_bad_allowed ? fv_random_below(&g_random, 2) : 1);
        break;
    case 6:
        f.q = bytes;
        break;
    case 7:
        f.k = bytes;
        break;
    case 8:
        f.v = bytes;
        break;
    case 9:
        append_unknown(to);
        return;
    default:
        append_item(to, is_bad_allowed);
        return;
    }
    append_request(to, &f);
}

static void random_request(buffer_t *to, bool is_bad_allowed)
{
    Fovea__V1__AttendRequest f = FOVEA__V1__ATTEND_REQUEST__INIT;
    size_t n = fv_random_below(&g_random, 20);

    to->n = 0;
    for (size_t i = 0; i < n; i++) {
        append_fragment(to, is_bad_allowed);
    }
    f.dtype = FOVEA__V1__DTYPE__DTYPE_BF16;
    append_request(to, &f);
    append_item(to, false);
}

static void oracle_request(const uint8_t *data, size_t n, bool is_strict)
{
    fv_pieces_t pieces = random_pieces(data, n);
    const char *error = fv_oracle_request(data, n, pieces, is_strict);

    fv_pieces_free(&pieces);
    check(error, "request");
}

static void test_any_writing_and_any_cut_reads_the_same(void **state)
{
    static buffer_t message;

    (void)state;
    for (int i = 0; i < N_CASES; i++) {
        random_request(&message, (i % 2) == 0);
        oracle_request(message.bytes, message.n, true);
    }
}

static void test_every_truncation_is_refused_or_equal(void **state)
{
    static buffer_t message;

    (void)state;
    for (int i = 0; i < 20; i++) {
        do {
            random_request(&message, false);
        } while (message.n > 1500);
        for (size_t n = 0; n <= message.n; n++) {
            oracle_request(message.bytes, n, false);
        }
    }
}

static void test_flipped_bytes_are_refused_or_equal(void **state)
{
    static buffer_t message;

    (void)state;
    for (int i = 0; i < N_CASES; i++) {
        random_request(&message, true);
        for (uint64_t flips = 1U + fv_random_below(&g_random, 3); flips > 0; flips--) {
            message.bytes[fv_random_below(&g_random, message.n)] ^=
                (uint8_t)(1U << fv_random_below(&g_random, 8));
        }
        oracle_request(message.bytes, message.n, false);
    }
}

/* Our own encoder: what it writes, protobuf-c and the scanner both read back. */
static void test_encoded_request_is_read_back(void **state)
{
    static uint8_t bytes[BYTES_MAX];
    static fv_attend_item_t items[N_HEAD_CAP];
    static fv_attend_item_t read[N_HEAD_CAP];

    (void)state;
    for (int i = 0; i < N_CASES; i++) {
        fv_attend_request_t r = {.request_id = fv_random_wide(&g_random),
                                 .layer = (uint32_t)fv_random_wide(&g_random),
                                 .dtype = (fv_dtype_t)(1U + fv_random_below(&g_random, 3)),
                                 .causal = fv_random_below(&g_random, 2) != 0,
                                 .want_lse = fv_random_below(&g_random, 2) != 0,
                                 .only_slice = (uint32_t)fv_random_below(&g_random, 10),
                                 .append = fv_random_below(&g_random, 2) != 0};
        size_t sizes[3] = {0};
        size_t n = 0;
        fv_bytes_t head;
        fv_wire_tensor_heads_t heads;
        fv_attend_request_t back;

        r.n_items = 1U + (uint32_t)fv_random_below(&g_random, N_HEAD_CAP);
        for (uint32_t j = 0; j < r.n_items; j++) {
            items[j] =
                (fv_attend_item_t){.position = fv_random_wide(&g_random) >> 1U,
                                   .n_tokens = 1U + (uint32_t)(fv_random_wide(&g_random) >> 36U)};
            memset(items[j].session.bytes, (int)(fv_random_next(&g_random) & 255U), 16);
        }
        for (int t = 0; t < (r.append ? 3 : 1); t++) {
            sizes[t] = fv_random_below(&g_random, 4000);
        }
        assert_int_equal(
            fv_wire_attend_request_encode(&r, items, sizes[0], sizes[1], sizes[2], &head, &heads),
            FV_OK);
        memcpy(bytes, head.data, head.n_bytes);
        n = head.n_bytes;
        fv_bytes_free(&head);
        const uint8_t *tensor_head[3] = {heads.q, heads.k, heads.v};
        size_t n_tensor_head[3] = {heads.n_q, heads.n_k, heads.n_v};
        for (int t = 0; t < 3; t++) {
            memcpy(bytes + n, tensor_head[t], n_tensor_head[t]);
            memset(bytes + n + n_tensor_head[t], t + 1, sizes[t]);
            n += n_tensor_head[t] + sizes[t];
        }
        oracle_request(bytes, n, true);
        fv_span_t span = {.data = bytes, .n_bytes = n};
        assert_int_equal(fv_wire_attend_request_scan(&span, 1, &back, read, N_HEAD_CAP), FV_OK);
        assert_int_equal(back.request_id, r.request_id);
        assert_int_equal(back.layer, r.layer);
        assert_int_equal(back.dtype, r.dtype);
        assert_true((back.causal == r.causal) && (back.want_lse == r.want_lse) &&
                    (back.only_slice == r.only_slice) && (back.append == r.append));
        assert_int_equal(back.n_items, r.n_items);
        assert_memory_equal(read, items, r.n_items * sizeof(items[0]));
        assert_true((back.q.n_bytes == sizes[0]) && (back.k.n_bytes == sizes[1]) &&
                    (back.v.n_bytes == sizes[2]));
    }
}

static void test_encoded_response_is_read_back(void **state)
{
    static uint8_t bytes[BYTES_MAX];
    char message[400];

    (void)state;
    for (int i = 0; i < N_CASES; i++) {
        uint8_t head[FV_WIRE_HEAD_BYTES];
        size_t n_message = fv_random_below(&g_random, sizeof(message));
        fv_attend_response_t r = {.request_id = fv_random_wide(&g_random),
                                  .code = (int32_t)fv_random_below(&g_random, 17),
                                  .message = (i % 3 == 0) ? NULL : message,
                                  .timings = {.queue_us = (uint32_t)fv_random_wide(&g_random),
                                              .compute_us = (uint32_t)fv_random_wide(&g_random),
                                              .exchange_us = (uint32_t)fv_random_wide(&g_random),
                                              .total_us = (uint32_t)fv_random_wide(&g_random)},
                                  .lse_bytes = fv_random_below(&g_random, 2) * 17U,
                                  .out_bytes = fv_random_below(&g_random, 4000)};
        size_t n_before_lse = 0;
        size_t n_head = 0;
        fv_attend_response_view_t v;

        memset(message, 'a' + (i % 26), n_message);
        message[n_message] = '\0';
        fv_wire_attend_response_encode(&r, head, &n_before_lse, &n_head);
        assert_true((n_before_lse <= n_head) && (n_head <= FV_WIRE_HEAD_BYTES));
        size_t n = n_before_lse;
        memcpy(bytes, head, n);
        memset(bytes + n, 7, r.lse_bytes);
        n += r.lse_bytes;
        memcpy(bytes + n, head + n_before_lse, n_head - n_before_lse);
        n += n_head - n_before_lse;
        memset(bytes + n, 9, r.out_bytes);
        n += r.out_bytes;
        fv_pieces_t pieces = random_pieces(bytes, n);
        check(fv_oracle_response(bytes, n, pieces), "response");
        assert_int_equal(fv_wire_attend_response_scan(pieces.spans, pieces.n, &v), FV_OK);
        fv_pieces_free(&pieces);
        assert_int_equal(v.request_id, r.request_id);
        assert_int_equal(v.code, r.code);
        assert_memory_equal(&v.timings, &r.timings, sizeof(v.timings));
        assert_int_equal(v.lse.n_bytes, r.lse_bytes);
        assert_int_equal(v.out.n_bytes, r.out_bytes);
        size_t n_kept = (n_message < sizeof(v.message)) ? n_message : (sizeof(v.message) - 1U);
        assert_int_equal(strlen(v.message), (r.message == NULL) ? 0U : n_kept);
        assert_memory_equal(v.message, message, strlen(v.message));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_any_writing_and_any_cut_reads_the_same),
        cmocka_unit_test(test_every_truncation_is_refused_or_equal),
        cmocka_unit_test(test_flipped_bytes_are_refused_or_equal),
        cmocka_unit_test(test_encoded_request_is_read_back),
        cmocka_unit_test(test_encoded_response_is_read_back),
    };

    g_random = fv_random_begin("prop_wire_attend");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
