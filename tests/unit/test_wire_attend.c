/*
 * test_wire_attend.c - the attend codec: golden bytes, and what is refused.
 *
 * The random half of this is tests/property/prop_wire_attend.c.
 */
#include "proto/descriptor.h"
#include "proto/wire.h"
#include "proto/wire_text.h"
#include "tests/support/test.h"

#include <stdio.h>
#include <string.h>

#define ITEMS_CAP 4
#define HEX       "000102030405060708090a0b0c0d0e0f"

/* request_id 300, layer 2, one item {HEX, position 5, n_tokens 2}, BF16, q "abcd", k "ef", v "g" */
static const uint8_t k_request[] = "\x08\xac\x02" /* request_id */
                                   "\x10\x02"     /* layer */
                                   "\x1a\x26"     /* items, 38 bytes */
                                   "\x0a\x20" HEX "\x10\x05\x18\x02"
                                   "\x20\x03" /* dtype */
                                   "\x72\x04"
                                   "abcd"
                                   "\x7a\x02"
                                   "ef"
                                   "\x82\x01\x01"
                                   "g";
#define REQUEST_BYTES (sizeof(k_request) - 1U)

static fv_status_t
scan(const void *data, size_t n, fv_attend_request_t *out, fv_attend_item_t *items)
{
    fv_span_t span = {.data = data, .n_bytes = n};

    return fv_wire_attend_request_scan(&span, 1, out, items, ITEMS_CAP);
}

static void test_golden_request(void **state)
{
    fv_attend_item_t items[ITEMS_CAP];
    fv_attend_request_t r;
    fv_span_t span = {.data = k_request, .n_bytes = REQUEST_BYTES};
    char tensor[8] = {0};

    (void)state;
    assert_int_equal(scan(k_request, REQUEST_BYTES, &r, items), FV_OK);
    assert_int_equal(r.request_id, 300);
    assert_int_equal(r.layer, 2);
    assert_int_equal(r.dtype, FV_DTYPE_BF16);
    assert_true(r.causal && r.append && !r.want_lse);
    assert_int_equal(r.n_items, 1);
    assert_int_equal(r.n_tokens, 2);
    assert_int_equal(items[0].position, 5);
    assert_int_equal(items[0].n_tokens, 2);
    for (uint8_t i = 0; i < 16; i++) {
        assert_int_equal(items[0].session.bytes[i], i);
    }
    fv_wire_gather(&span, 1, r.q, tensor);
    assert_string_equal(tensor, "abcd");
    assert_memory_equal(k_request + r.k.offset, "ef", 2);
    assert_int_equal(r.v.offset, REQUEST_BYTES - 1U);
    assert_int_equal(r.v.n_bytes, 1);
}

static void test_golden_request_is_what_the_client_writes(void **state)
{
    fv_attend_request_t r = {.request_id = 300,
                             .layer = 2,
                             .dtype = FV_DTYPE_BF16,
                             .causal = true,
                             .append = true,
                             .n_items = 1};
    fv_attend_item_t item = {.position = 5, .n_tokens = 2};
    fv_wire_tensor_heads_t heads;
    fv_bytes_t head;

    (void)state;
    assert_true(fv_session_id_parse(HEX, 32, &item.session));
    assert_int_equal(fv_wire_attend_request_encode(&r, &item, 4, 2, 1, &head, &heads), FV_OK);
    assert_int_equal(head.n_bytes, REQUEST_BYTES - 4U - 6U - 4U);
    assert_memory_equal(head.data, k_request, head.n_bytes);
    assert_memory_equal(heads.q, "\x72\x04", heads.n_q);
    assert_memory_equal(heads.k, "\x7a\x02", heads.n_k);
    assert_memory_equal(heads.v, "\x82\x01\x01", heads.n_v);
    assert_int_equal(heads.n_q + heads.n_k + heads.n_v, 7);
    fv_bytes_free(&head);
    assert_int_equal(fv_wire_attend_request_encode(&r, &item, 4, 0, 0, &head, &heads), FV_OK);
    assert_int_equal(heads.n_k + heads.n_v, 0);
    fv_bytes_free(&head);
}

static void test_golden_response(void **state)
{
    static const uint8_t k_golden[] = "\x08\x07"                 /* request_id */
                                      "\x12\x06\x08\x03\x12\x02" /* status: INVALID_ARGUMENT */
                                      "no"
                                      "\x1a\x05\x08\x01\x20\x80\x01"; /* queue 1, total 128 */
    fv_attend_response_t r = {
        .request_id = 7, .code = 3, .message = "no", .timings = {.queue_us = 1, .total_us = 128}};
    uint8_t head[FV_WIRE_HEAD_BYTES];
    size_t n_before = 0;
    size_t n_head = 0;

    (void)state;
    fv_wire_attend_response_encode(&r, head, &n_before, &n_head);
    assert_int_equal(n_head, sizeof(k_golden) - 1U);
    assert_memory_equal(head, k_golden, n_head);
    r = (fv_attend_response_t){.request_id = 7, .lse_bytes = 4, .out_bytes = 300};
    fv_wire_attend_response_encode(&r, head, &n_before, &n_head);
    assert_int_equal(n_before, 4);
    assert_memory_equal(head, "\x08\x07\x72\x04\x7a\xac\x02", n_head);
    assert_int_equal(n_head, 7);
}

/* The largest head there is fits. */
static void test_the_longest_head_fits(void **state)
{
    static char message[2000];
    fv_attend_response_t r = {.request_id = UINT64_MAX,
                              .code = -1,
                              .message = message,
                              .timings = {UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX},
                              .lse_bytes = SIZE_MAX,
                              .out_bytes = SIZE_MAX};
    uint8_t head[FV_WIRE_HEAD_BYTES + 64];
    size_t n_before = 0;
    size_t n_head = 0;

    (void)state;
    memset(message, 'x', sizeof(message) - 1U);
    memset(head, 0xee, sizeof(head));
    fv_wire_attend_response_encode(&r, head, &n_before, &n_head);
    assert_true(n_head <= FV_WIRE_HEAD_BYTES);
    assert_int_equal(head[n_head], 0xee);
}

static void test_each_truncation_is_refused(void **state)
{
    fv_attend_item_t items[ITEMS_CAP];
    fv_attend_request_t r;
    /* Where a field ends the rest is simply absent; the item and the dtype are needed. */
    static const size_t k_ends[] = {47, 53, 57};

    (void)state;
    for (size_t n = 0; n < REQUEST_BYTES; n++) {
        bool is_end = false;

        for (size_t i = 0; i < FV_COUNT(k_ends); i++) {
            is_end = is_end || (n == k_ends[i]);
        }
        fv_status_t status = scan(k_request, n, &r, items);
        assert_int_equal(status, is_end ? FV_OK : FV_ERR_INVALID_ARG);
        assert_int_equal(r.request_id, (n >= 3) ? 300 : 0);
    }
}

/* What follows a good request, and what the error says of it. */
typedef struct bad_tail {
    const char *bytes;
    size_t n;
    const char *says;
} bad_tail_t;

#define TAIL(bytes, says)               \
    {                                   \
        bytes, sizeof(bytes) - 1U, says \
    }

static void test_malformed_bytes_are_refused(void **state)
{
    static const bad_tail_t k_tails[] = {
        TAIL("\xa3\x01", "group"),                /* field 20, start of a group */
        TAIL("\xa4\x01", "group"),                /* its end */
        TAIL("\xa6\x01", "wire type"),            /* 6 */
        TAIL("\xa7\x01", "wire type"),            /* 7 */
        TAIL("\x00\x01", "field number"),         /* 0 */
        TAIL("\xa0\x80\x80\x80\x80\x01", "long"), /* a tag of 6 bytes */
        TAIL("\xff\xff\xff\xff\x7f\x01", "field number"),
        TAIL("\xa0\x01\x80\x80\x80\x80\x80\x80\x80\x80\x80\x02", "long"), /* 65 bits */
        TAIL("\xa0\x01\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", "long"),
        TAIL("\xa0\x01\x80", "truncated"),
        TAIL("\xa1\x01\x01\x02\x03", "truncated"), /* 64-bit */
        TAIL("\xa5\x01\x01\x02\x03", "truncated"), /* 32-bit */
        TAIL("\x72\x05"
             "abcd",
             "beyond the end"),
        TAIL("\x72\xff\xff\xff\xff\x0f", "beyond the end"),
        TAIL("\x72\xff\xff\xff\xff\xff\x01", "long"),
        TAIL("\x70\x01", "q: given wire type 0"),
        TAIL("\x0a\x00", "request_id: given wire type 2"),
        TAIL("\x2a\x00", "causal: given wire type 2"),
        TAIL("\x18\x01", "items: given wire type 0"),
        TAIL("\x1a\x02\x08\x01", "items[1].session_id"),
        TAIL("\x1a\x02\x0a\x05", "beyond the end"), /* past the item, not past the message */
        TAIL("\x1a\x02\x12\x00", "items.position: given wire type 2"),
    };
    uint8_t bytes[128];
    fv_attend_item_t items[ITEMS_CAP];
    fv_attend_request_t r;

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_tails); i++) {
        memcpy(bytes, k_request, REQUEST_BYTES);
        memcpy(bytes + REQUEST_BYTES, k_tails[i].bytes, k_tails[i].n);
        fv_status_t status = scan(bytes, REQUEST_BYTES + k_tails[i].n, &r, items);
        if ((status != FV_ERR_INVALID_ARG) ||
            (strstr(fv_error_context(), k_tails[i].says) == NULL)) {
            fail_msg("tail %zu: status %d \"%s\"", i, (int)status, fv_error_context());
        }
        assert_int_equal(r.request_id, 300);
    }
}

static void test_wrong_requests_are_refused(void **state)
{
    /* tails that are well-formed; the request_id comes last */
    static const bad_tail_t k_tails[] = {
        TAIL("\x20\x04\x08\x09", "dtype: given 4"),
        TAIL("\x20\x00\x08\x09", "dtype: given 0"),
        TAIL("\x20\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x08\x09", "dtype: given -1"),
        TAIL("\x38\x00\x08\x09", "k: given 2 bytes, expected 0 because append"),
        TAIL("\x1a\x22\x0a\x20" HEX "\x08\x09", "items[1].n_tokens: given 0"),
        TAIL("\x1a\x02\x18\x01\x08\x09", "items[1].session_id: given none"),
        TAIL("\x1a\x05\x0a\x03"
             "abc"
             "\x08\x09",
             "items[1].session_id: given 3 characters"),
        TAIL("\x1a\x24\x0a\x20"
             "g00102030405060708090a0b0c0d0e0f"
             "\x18\x01\x08\x09",
             "hex digits"),
        TAIL("\x1a\x2f\x0a\x20" HEX "\x18\x01\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x08\x09",
             "items[1].position: given 18446744073709551615"),
        TAIL("\x1a\x28\x0a\x20" HEX "\x18\xff\xff\xff\xff\x0f\x08\x09", "tokens in all"),
    };
    uint8_t bytes[256];
    fv_attend_item_t items[ITEMS_CAP];
    fv_attend_request_t r;

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_tails); i++) {
        memcpy(bytes, k_request, REQUEST_BYTES);
        memcpy(bytes + REQUEST_BYTES, k_tails[i].bytes, k_tails[i].n);
        fv_status_t status = scan(bytes, REQUEST_BYTES + k_tails[i].n, &r, items);
        if ((status != FV_ERR_INVALID_ARG) ||
            (strstr(fv_error_context(), k_tails[i].says) == NULL)) {
            fail_msg("tail %zu: status %d \"%s\"", i, (int)status, fv_error_context());
        }
        assert_int_equal(r.request_id, 9);
    }
}

static void test_numbers_of_items(void **state)
{
    static const char k_item[] = "\x1a\x24\x0a\x20" HEX "\x18\x01";
    uint8_t bytes[512] = "\x20\x01"; /* F32 */
    fv_attend_item_t items[ITEMS_CAP];
    fv_attend_request_t r;
    size_t n = 2;

    (void)state;
    assert_int_equal(scan(bytes, n, &r, items), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "items: given 0"));
    for (uint32_t i = 0; i < ITEMS_CAP; i++) {
        memcpy(bytes + n, k_item, sizeof(k_item) - 1U);
        n += sizeof(k_item) - 1U;
        assert_int_equal(scan(bytes, n, &r, items), FV_OK);
        assert_int_equal(r.n_items, i + 1U);
        assert_int_equal(r.n_tokens, i + 1U);
    }
    memcpy(bytes + n, k_item, sizeof(k_item) - 1U);
    assert_int_equal(scan(bytes, n + sizeof(k_item) - 1U, &r, items), FV_ERR_INVALID_ARG);
    assert_non_null(strstr(fv_error_context(), "items: given more than 4"));
}

/* No byte at all is a message: one without items. */
static void test_nothing_is_refused(void **state)
{
    fv_attend_item_t items[1];
    fv_attend_request_t r;
    fv_attend_response_view_t v;
    fv_span_t empty[3] = {{0}};

    (void)state;
    assert_int_equal(fv_wire_attend_request_scan(NULL, 0, &r, items, 1), FV_ERR_INVALID_ARG);
    assert_int_equal(fv_wire_attend_request_scan(empty, 3, &r, items, 1), FV_ERR_INVALID_ARG);
    assert_int_equal(fv_wire_attend_response_scan(empty, 3, &v), FV_OK);
    assert_int_equal(v.request_id, 0);
    assert_int_equal(v.out.n_bytes, 0);
}

static void test_bad_encodes_are_refused(void **state)
{
    fv_attend_request_t r = {.dtype = FV_DTYPE_F32};
    fv_attend_item_t item = {.n_tokens = 1};
    fv_wire_tensor_heads_t heads;
    fv_bytes_t head;

    (void)state;
    assert_int_equal(fv_wire_attend_request_encode(&r, &item, 0, 0, 0, &head, &heads),
                     FV_ERR_INVALID_ARG);
    r.n_items = FV_ITEMS_MAX + 1;
    assert_int_equal(fv_wire_attend_request_encode(&r, &item, 0, 0, 0, &head, &heads),
                     FV_ERR_INVALID_ARG);
    r.n_items = 1;
    assert_int_equal(
        fv_wire_attend_request_encode(&r, &item, 0, 0, (size_t)1 << 31U, &head, &heads),
        FV_ERR_INVALID_ARG);
    r.dtype = FV_DTYPE_NONE;
    assert_int_equal(fv_wire_attend_request_encode(&r, &item, 0, 0, 0, &head, &heads),
                     FV_ERR_INVALID_ARG);
}

static void test_session_ids(void **state)
{
    fv_session_id_t id = {.bytes = {0}};
    fv_session_id_t upper;
    char text[FV_SESSION_ID_CHARS + 1];

    (void)state;
    assert_true(fv_session_id_parse("00112233445566778899aabbccddeeff", 32, &id));
    assert_int_equal(id.bytes[1], 0x11);
    assert_int_equal(id.bytes[15], 0xff);
    fv_session_id_format(&id, text);
    assert_string_equal(text, "00112233445566778899aabbccddeeff");
    assert_true(fv_session_id_parse("00112233445566778899AABBCCDDEEFF", 32, &upper));
    assert_memory_equal(&id, &upper, sizeof(id));
    assert_false(fv_session_id_parse("00112233445566778899aabbccddeeff", 31, &id));
    assert_false(fv_session_id_parse("0x112233445566778899aabbccddeeff", 32, &id));
    assert_false(fv_session_id_parse("00112233445566778899aabbccddeef ", 32, &id));
}

static void test_gather_over_pieces(void **state)
{
    static const uint8_t k_data[] = "0123456789";
    fv_span_t spans[] = {{k_data, 3}, {NULL, 0}, {k_data + 3, 1}, {k_data + 4, 6}};
    char out[11];

    (void)state;
    for (size_t begin = 0; begin <= 10; begin++) {
        for (size_t n = 0; begin + n <= 10; n++) {
            memset(out, '#', sizeof(out));
            fv_wire_gather(spans, 4, (fv_region_t){.offset = begin, .n_bytes = n}, out);
            assert_memory_equal(out, k_data + begin, n);
            assert_int_equal(out[n], '#');
        }
    }
}

static void test_text_on_the_wire_is_utf8(void **state)
{
    static const struct {
        const char *in;
        size_t n;
        bool is_valid;
        const char *copied;
    } k_cases[] = {
        {"plain", 5, true, "plain"},
        {"\xc3\xa9", 2, true, "\xc3\xa9"},
        {"\xe2\x82\xac", 3, true, "\xe2\x82\xac"},
        {"\xf0\x9f\x8c\x88", 4, true, "\xf0\x9f\x8c\x88"},
        {"a\xff"
         "b",
         3, false, "a?b"},
        {"\xc0\xaf", 2, false, "??"},           /* overlong */
        {"\xe0\x80\xaf", 3, false, "???"},      /* overlong */
        {"\xed\xa0\x80", 3, false, "???"},      /* surrogate */
        {"\xf4\x90\x80\x80", 4, false, "????"}, /* beyond U+10FFFF */
        {"\xf5\x80\x80\x80", 4, false, "????"},
        {"\xe2\x82", 2, false, "??"}, /* cut */
        {"\x80", 1, false, "?"},
        {"1234567", 7, true, "1234567"},
        {"12345678", 8, true, "1234567"},
        {"123456\xc3\xa9", 8, true, "123456"}, /* not half a character */
    };
    char out[8];

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_cases); i++) {
        assert_int_equal(fv_utf8_valid(k_cases[i].in, k_cases[i].n), k_cases[i].is_valid);
        assert_int_equal(fv_utf8_copy(out, sizeof(out), k_cases[i].in, k_cases[i].n),
                         strlen(k_cases[i].copied));
        assert_string_equal(out, k_cases[i].copied);
    }
}

/* A FileDescriptorSet begins with its first file: field 1, then the file's name. */
static void test_the_descriptor_set_is_embedded(void **state)
{
    static const char k_name[] = "proto/attention.proto";
    bool has_service = false;

    (void)state;
    assert_true(fv_descriptor_set_bytes > 4000);
    assert_int_equal(fv_descriptor_set[0], 0x0a);
    assert_memory_equal(fv_descriptor_set + 5, k_name, sizeof(k_name) - 1U);
    for (size_t i = 0; i + 10U < fv_descriptor_set_bytes; i++) {
        has_service = has_service || (memcmp(fv_descriptor_set + i, "AttendOnce", 10) == 0);
    }
    assert_true(has_service);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_request),
        cmocka_unit_test(test_golden_request_is_what_the_client_writes),
        cmocka_unit_test(test_golden_response),
        cmocka_unit_test(test_the_longest_head_fits),
        cmocka_unit_test(test_each_truncation_is_refused),
        cmocka_unit_test(test_malformed_bytes_are_refused),
        cmocka_unit_test(test_wrong_requests_are_refused),
        cmocka_unit_test(test_numbers_of_items),
        cmocka_unit_test(test_nothing_is_refused),
        cmocka_unit_test(test_bad_encodes_are_refused),
        cmocka_unit_test(test_session_ids),
        cmocka_unit_test(test_gather_over_pieces),
        cmocka_unit_test(test_text_on_the_wire_is_utf8),
        cmocka_unit_test(test_the_descriptor_set_is_embedded),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
