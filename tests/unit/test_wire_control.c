/*
 * test_wire_control.c - small messages: golden bytes, policies, and what is refused.
 *
 * Bad messages are written with protobuf-c, as any client could.
 */
#include "proto/attention.pb-c.h"
#include "proto/wire.h"
#include "tests/support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEX "000102030405060708090a0b0c0d0e0f"

static char *text(const char *literal)
{
    static char copies[8][512]; /* protobuf-c wants char * */
    static size_t next;
    char *copy = copies[next++ % FV_COUNT(copies)];

    assert_true(strlen(literal) < sizeof(copies[0]));
    (void)snprintf(copy, sizeof(copies[0]), "%s", literal);
    return copy;
}

static fv_bytes_t packed(const ProtobufCMessage *message)
{
    fv_bytes_t out = {.n_bytes = protobuf_c_message_get_packed_size(message)};

    out.data = malloc(out.n_bytes + 1U);
    assert_non_null(out.data);
    assert_int_equal(protobuf_c_message_pack(message, out.data), out.n_bytes);
    return out;
}

/* Decodes what protobuf-c writes of `message`; *out_status is the decoder's. */
#define DECODE(name, message, out, out_status)                                   \
    do {                                                                         \
        fv_bytes_t bytes_ = packed(&(message).base);                             \
        *(out_status) = fv_wire_##name##_decode(                                 \
            (fv_span_t){.data = bytes_.data, .n_bytes = bytes_.n_bytes}, (out)); \
        fv_bytes_free(&bytes_);                                                  \
    } while (0)

static void assert_says(fv_status_t status, fv_status_t expected, const char *part)
{
    if ((status != expected) || (strstr(fv_error_context(), part) == NULL)) {
        fail_msg("status %d \"%s\" does not say \"%s\"", (int)status, fv_error_context(), part);
    }
}

/* ------------------------------------------------------------------ models */

static fv_model_spec_t g_spec;

static fv_status_t decode_spec(Fovea__V1__ModelSpec *spec)
{
    Fovea__V1__RegisterModelRequest message = FOVEA__V1__REGISTER_MODEL_REQUEST__INIT;
    fv_status_t status = FV_OK;

    message.spec = spec;
    DECODE(register_request, message, &g_spec, &status);
    return status;
}

static Fovea__V1__ModelSpec good_spec(void)
{
    Fovea__V1__ModelSpec spec = FOVEA__V1__MODEL_SPEC__INIT;

    spec.name = text("m");
    spec.n_layers = 4;
    spec.n_q_heads = 8;
    spec.n_kv_heads = 2;
    spec.head_dim_qk = 64;
    spec.kv_dtype = FOVEA__V1__DTYPE__DTYPE_F16;
    return spec;
}

static void test_golden_model(void **state)
{
    static const uint8_t k_golden[] = "\x0a\x12" /* spec, 18 bytes */
                                      "\x0a\x01m\x10\x04\x18\x08\x20\x02\x28\x40\x38\x02"
                                      "\x45\x00\x00\x00\x3f"; /* softmax_scale 0.5 */
    fv_span_t span = {.data = k_golden, .n_bytes = sizeof(k_golden) - 1U};
    fv_model_spec_t spec;

    (void)state;
    memset(&spec, 0xff, sizeof(spec));
    assert_int_equal(fv_wire_register_request_decode(span, &spec), FV_OK);
    assert_string_equal(spec.name, "m");
    assert_int_equal(spec.n_layers, 4);
    assert_int_equal(spec.n_q_heads, 8);
    assert_int_equal(spec.n_kv_heads, 2);
    assert_int_equal(spec.head_dim_qk, 64);
    assert_int_equal(spec.head_dim_v, 0);
    assert_int_equal(spec.kv_dtype, FV_DTYPE_F16);
    assert_true(spec.softmax_scale == 0.5F);
    assert_int_equal(spec.n_policies, 1);
    assert_int_equal(fv_model_spec_check(&spec), FV_OK);
}

/* The same request twice is the same spec, whatever was in memory before. */
static void test_same_request_same_spec(void **state)
{
    static fv_model_spec_t first;
    Fovea__V1__ModelSpec spec = good_spec();
    Fovea__V1__Sharding sharding = FOVEA__V1__SHARDING__INIT;

    (void)state;
    memset(&g_spec, 0x55, sizeof(g_spec));
    assert_int_equal(decode_spec(&spec), FV_OK);
    assert_int_equal(fv_model_spec_check(&g_spec), FV_OK);
    first = g_spec;
    memset(&g_spec, 0xaa, sizeof(g_spec));
    spec.sharding = &sharding; /* AUTO, written out */
    assert_int_equal(decode_spec(&spec), FV_OK);
    assert_int_equal(fv_model_spec_check(&g_spec), FV_OK);
    assert_true(fv_model_spec_equal(&first, &g_spec));
}

static void test_policies_fall_on_their_layers(void **state)
{
    Fovea__V1__ModelSpec spec = good_spec();
    Fovea__V1__LayerPolicy list[4] = {FOVEA__V1__LAYER_POLICY__INIT, FOVEA__V1__LAYER_POLICY__INIT,
                                      FOVEA__V1__LAYER_POLICY__INIT, FOVEA__V1__LAYER_POLICY__INIT};
    Fovea__V1__LayerPolicy *pointers[4] = {&list[0], &list[1], &list[2], &list[3]};
    Fovea__V1__Window wide = FOVEA__V1__WINDOW__INIT;
    Fovea__V1__Window narrow = FOVEA__V1__WINDOW__INIT;
    Fovea__V1__Dense dense = FOVEA__V1__DENSE__INIT;
    uint32_t layers[3] = {1, 3, 2};

    (void)state;
    wide.window_tokens = 1000;
    wide.sink_tokens = 4;
    narrow.window_tokens = 7;
    list[0].policy_case = FOVEA__V1__LAYER_POLICY__POLICY_WINDOW; /* every layer */
    list[0].window = &wide;
    list[1].policy_case = FOVEA__V1__LAYER_POLICY__POLICY_WINDOW;
    list[1].window = &narrow;
    list[1].layers = layers;
    list[1].n_layers = 2;
    list[2].policy_case = FOVEA__V1__LAYER_POLICY__POLICY_DENSE;
    list[2].dense = &dense;
    list[2].layers = &layers[1];
    list[2].n_layers = 1;
    list[3].policy_case = FOVEA__V1__LAYER_POLICY__POLICY_WINDOW; /* known already: no new entry */
    list[3].window = &wide;
    list[3].layers = &layers[2];
    list[3].n_layers = 1;
    spec.policies = pointers;
    spec.n_policies = 4;
    assert_int_equal(decode_spec(&spec), FV_OK);
    assert_int_equal(g_spec.n_policies, 3);
    assert_int_equal(g_spec.policies[0].kind, FV_POLICY_DENSE);
    assert_int_equal(g_spec.policies[1].window_tokens, 1000);
    assert_int_equal(g_spec.policies[1].sink_tokens, 4);
    assert_int_equal(g_spec.policies[2].window_tokens, 7);
    assert_memory_equal(g_spec.layer_policy, "\x01\x02\x01\x00\x00", 5);
    layers[0] = 4;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "spec.policies[1].layers[0]: given 4");
    layers[0] = UINT32_MAX;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "given 4294967295");
    layers[0] = 1;
    list[1].policy_case = FOVEA__V1__LAYER_POLICY__POLICY__NOT_SET;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "spec.policies[1].policy: given none");
}

static void test_distinct_policies_are_bounded(void **state)
{
    Fovea__V1__ModelSpec spec = good_spec();
    Fovea__V1__LayerPolicy list[FV_POLICIES_MAX];
    Fovea__V1__LayerPolicy *pointers[FV_POLICIES_MAX];
    Fovea__V1__Window windows[FV_POLICIES_MAX];

    (void)state;
    for (uint32_t i = 0; i < FV_POLICIES_MAX; i++) {
        windows[i] = (Fovea__V1__Window)FOVEA__V1__WINDOW__INIT;
        windows[i].window_tokens = i + 1U;
        list[i] = (Fovea__V1__LayerPolicy)FOVEA__V1__LAYER_POLICY__INIT;
        list[i].policy_case = FOVEA__V1__LAYER_POLICY__POLICY_WINDOW;
        list[i].window = &windows[i];
        pointers[i] = &list[i];
    }
    spec.policies = pointers;
    spec.n_policies = FV_POLICIES_MAX - 1; /* and dense */
    assert_int_equal(decode_spec(&spec), FV_OK);
    assert_int_equal(g_spec.n_policies, FV_POLICIES_MAX);
    spec.n_policies = FV_POLICIES_MAX;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "spec.policies: given more than 16");
}

static void test_bad_models_are_refused(void **state)
{
    Fovea__V1__ModelSpec spec = good_spec();
    Fovea__V1__Window window = FOVEA__V1__WINDOW__INIT;
    Fovea__V1__LayerPolicy policy = FOVEA__V1__LAYER_POLICY__INIT;
    Fovea__V1__LayerPolicy *policies[1] = {&policy};
    Fovea__V1__Sharding sharding = FOVEA__V1__SHARDING__INIT;

    (void)state;
    assert_says(decode_spec(NULL), FV_ERR_INVALID_ARG, "spec: given none");
    spec.name = text("0123456789012345678901234567890123456789012345678901234567890123");
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "spec.name: given 64 bytes");
    spec.name = text("\xff");
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "spec.name: given bytes");
    spec = good_spec();
    spec.n_layers = 0;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "spec.n_layers: given 0");
    spec.n_layers = 1025;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "spec.n_layers: given 1025");
    spec = good_spec();
    spec.n_q_heads = UINT32_MAX;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "spec.n_q_heads: given 4294967295");
    spec = good_spec();
    spec.kind = (Fovea__V1__ModelSpec__Kind)2;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "spec.kind: given 2");
    spec = good_spec();
    spec.latent_dim = 512;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "spec.latent_dim");
    spec = good_spec();
    policy.policy_case = FOVEA__V1__LAYER_POLICY__POLICY_WINDOW;
    policy.window = &window;
    window.window_tokens = (uint32_t)INT32_MAX + 1U;
    spec.policies = policies;
    spec.n_policies = 1;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "window_tokens: given 2147483648");
    spec = good_spec();
    spec.sharding = &sharding;
    sharding.mode = (Fovea__V1__Sharding__Mode)9;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "sharding.mode: given 9");
    sharding.mode = FOVEA__V1__SHARDING__MODE__HEADS;
    sharding.groups = 2;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "sharding.groups");
}

static void test_s2(void **state)
{
    Fovea__V1__ModelSpec spec = good_spec();
    Fovea__V1__S2 s2 = FOVEA__V1__S2__INIT;
    Fovea__V1__LayerPolicy policy = FOVEA__V1__LAYER_POLICY__INIT;
    Fovea__V1__LayerPolicy *policies[1] = {&policy};
    fv_policy_t given = {0};

    (void)state;
    policy.policy_case = FOVEA__V1__LAYER_POLICY__POLICY_S2;
    policy.s2 = &s2;
    spec.policies = policies;
    spec.n_policies = 1;
    s2.block_tokens = 128;
    s2.local_blocks = 4;
    s2.vert_stride = 7;
    s2.head_sliding_step = -2;
    s2.head_sliding_offset = 3;
    s2.num_dense_heads = 1;
    s2.pattern_per = FOVEA__V1__S2__PATTERN_PER__Q_HEAD;
    assert_int_equal(decode_spec(&spec), FV_OK);
    given = (fv_policy_t){.kind = FV_POLICY_S2,
                          .block_tokens = 128,
                          .local_blocks = 4,
                          .vert_stride = 7,
                          .head_sliding_step = -2,
                          .head_sliding_offset = 3,
                          .num_dense_heads = 1,
                          .pattern_per = FV_PATTERN_Q_HEAD};
    assert_memory_equal(&g_spec.policies[1], &given, sizeof(given));
    assert_int_equal(fv_model_spec_check(&g_spec), FV_OK);
    assert_int_equal(g_spec.policies[1].n_heads, spec.n_q_heads);
    s2.vert_stride = (uint32_t)INT32_MAX + 1U;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "s2.vert_stride: given 2147483648");
    s2.vert_stride = 7;
    s2.preset = text("s2-16");
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "given \"s2-16\" with other fields");
    s2 = (Fovea__V1__S2)FOVEA__V1__S2__INIT;
    s2.preset = text("s2-16");
    assert_int_equal(decode_spec(&spec), FV_OK);
    assert_int_equal(g_spec.policies[1].vert_stride, 16);
    s2.preset = text("s2-17");
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "expected phi3-small");
}

static void test_latent(void **state)
{
    Fovea__V1__ModelSpec spec = good_spec();
    Fovea__V1__Sharding sharding = FOVEA__V1__SHARDING__INIT;
    Fovea__V1__LatentNorm norm = FOVEA__V1__LATENT_NORM__INIT;
    float alpha[9] = {1.25F, 5.0F};
    float mu[2] = {1.0F, 1.5F};
    static fv_model_spec_t again;
    fv_bytes_t bytes = {0};

    (void)state;
    spec.kind = FOVEA__V1__MODEL_SPEC__KIND__LATENT;
    spec.n_kv_heads = 0;
    spec.head_dim_qk = 0;
    spec.head_dim_v = 0;
    spec.latent_dim = 512;
    spec.rope_dim = 64;
    spec.softmax_scale = 0.1F;
    spec.latent_norm = &norm;
    norm.mode = FOVEA__V1__LATENT_NORM__MODE__SLICE_RMS;
    norm.alpha = alpha;
    norm.n_alpha = 2;
    norm.eps = 1e-5F;
    sharding.mode = FOVEA__V1__SHARDING__MODE__LATENT;
    sharding.groups = 2;
    sharding.mu = mu;
    sharding.n_mu = 2;
    spec.sharding = &sharding;
    assert_int_equal(decode_spec(&spec), FV_OK);
    assert_int_equal(g_spec.latent_dim, 512);
    assert_int_equal(g_spec.rope_dim, 64);
    assert_int_equal(g_spec.latent_norm.mode, FV_NORM_SLICE_RMS);
    assert_true((g_spec.latent_norm.n_alpha == 2) && (g_spec.latent_norm.alpha[1] == 5.0F) &&
                (g_spec.latent_norm.eps == 1e-5F));
    assert_true((g_spec.sharding.groups == 2) && (g_spec.sharding.n_mu == 2) &&
                (g_spec.sharding.mu[1] == 1.5F));
    assert_int_equal(fv_wire_register_request_encode(&g_spec, &bytes), FV_OK);
    assert_int_equal(fv_wire_register_request_decode(
                         (fv_span_t){.data = bytes.data, .n_bytes = bytes.n_bytes}, &again),
                     FV_OK);
    assert_memory_equal(&again, &g_spec, sizeof(again));
    fv_bytes_free(&bytes);
    assert_int_equal(fv_model_spec_check(&g_spec), FV_OK);
    norm.n_alpha = 9;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "latent_norm.alpha");
    norm.mode = FOVEA__V1__LATENT_NORM__MODE__NONE;
    norm.n_alpha = 2;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "latent_norm.alpha, eps");
    norm.mode = (Fovea__V1__LatentNorm__Mode)7;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "latent_norm.mode: given 7");
    spec.latent_norm = NULL;
    spec.rope_dim = UINT32_MAX;
    assert_says(decode_spec(&spec), FV_ERR_INVALID_ARG, "spec.rope_dim: given 4294967295");
}

/* ------------------------------------------------------------------ the others */

static void test_bad_opens_are_refused(void **state)
{
    Fovea__V1__OpenSessionRequest m = FOVEA__V1__OPEN_SESSION_REQUEST__INIT;
    Fovea__V1__Sharding sharding = FOVEA__V1__SHARDING__INIT;
    fv_open_request_t out;
    fv_status_t status = FV_OK;

    (void)state;
    DECODE(open_request, m, &out, &status);
    assert_says(status, FV_ERR_INVALID_ARG, "model_id: given none");
    m.model_id = text("0123456789012345678901234567890123456789");
    DECODE(open_request, m, &out, &status);
    assert_says(status, FV_ERR_INVALID_ARG, "model_id: given 40 bytes");
    m.model_id = text("id");
    m.sharding = &sharding;
    DECODE(open_request, m, &out, &status);
    assert_int_equal(status, FV_OK);
    assert_int_equal(out.sharding.is_set, 1);
    sharding.shard_tokens = 65;
    DECODE(open_request, m, &out, &status);
    assert_says(status, FV_ERR_INVALID_ARG, "sharding.shard_tokens: given 65");
    sharding.shard_tokens = UINT32_MAX;
    DECODE(open_request, m, &out, &status);
    assert_says(status, FV_ERR_INVALID_ARG, "sharding.shard_tokens: given 4294967295");
    sharding.shard_tokens = 0;
    sharding.mode = FOVEA__V1__SHARDING__MODE__LATENT;
    sharding.groups = 4; /* whether the model is cut into four is not known here */
    DECODE(open_request, m, &out, &status);
    assert_int_equal(status, FV_OK);
    assert_true((out.sharding.mode == FV_SHARDING_LATENT) && (out.sharding.groups == 4));
}

static void test_bad_session_ids_are_refused(void **state)
{
    static const char *const k_bad[] = {"", "abc", "000102030405060708090a0b0c0d0e0f0",
                                        "g00102030405060708090a0b0c0d0e0f",
                                        "00010203 405060708090a0b0c0d0e0f"};
    Fovea__V1__GetSessionRequest m = FOVEA__V1__GET_SESSION_REQUEST__INIT;
    fv_session_request_t out;
    fv_status_t status = FV_OK;

    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_bad); i++) {
        m.session_id = text(k_bad[i]);
        DECODE(get_request, m, &out, &status);
        assert_says(status, FV_ERR_INVALID_ARG, "session_id: given \"");
        assert_non_null(strstr(fv_error_context(), "expected 32 hex digits"));
    }
    m.session_id = text("\xff\xfe");
    DECODE(get_request, m, &out, &status);
    assert_says(status, FV_ERR_INVALID_ARG, "given \"??\"");
    m.session_id = text(HEX);
    DECODE(get_request, m, &out, &status);
    assert_int_equal(status, FV_OK);
}

static void test_absent_and_zero_fork_positions_differ(void **state)
{
    Fovea__V1__ForkSessionRequest m = FOVEA__V1__FORK_SESSION_REQUEST__INIT;
    fv_session_request_t out;
    fv_status_t status = FV_OK;

    (void)state;
    m.session_id = text(HEX);
    DECODE(fork_request, m, &out, &status);
    assert_true((status == FV_OK) && !out.has_position);
    m.at_position_set_case = FOVEA__V1__FORK_SESSION_REQUEST__AT_POSITION_SET_AT_POSITION;
    DECODE(fork_request, m, &out, &status);
    assert_true((status == FV_OK) && out.has_position && (out.position == 0));
}

static void test_small_limits(void **state)
{
    Fovea__V1__ListSessionsRequest list = FOVEA__V1__LIST_SESSIONS_REQUEST__INIT;
    Fovea__V1__WatchStatusRequest watch = FOVEA__V1__WATCH_STATUS_REQUEST__INIT;
    fv_list_request_t list_out;
    uint32_t ms = 0;
    fv_status_t status = FV_OK;

    (void)state;
    list.page_size = 1001;
    DECODE(list_request, list, &list_out, &status);
    assert_says(status, FV_ERR_INVALID_ARG, "page_size: given 1001");
    list.page_size = 1000;
    list.page_token = text("0123456789012345678901234567890123456789012345678901234567890123");
    DECODE(list_request, list, &list_out, &status);
    assert_says(status, FV_ERR_INVALID_ARG, "page_token: given 64 bytes");
    watch.interval_ms = 49;
    DECODE(watch_request, watch, &ms, &status);
    assert_says(status, FV_ERR_INVALID_ARG, "interval_ms: given 49");
    watch.interval_ms = 50;
    DECODE(watch_request, watch, &ms, &status);
    assert_true((status == FV_OK) && (ms == 50));
}

/* Lists in answers are bounded too: a client may talk to anything. */
static void test_long_lists_are_refused(void **state)
{
    static uint64_t tokens[FV_LAYERS_MAX + 1];
    Fovea__V1__SessionInfo info = FOVEA__V1__SESSION_INFO__INIT;
    Fovea__V1__Placement placement = FOVEA__V1__PLACEMENT__INIT;
    Fovea__V1__PlacementShare share = FOVEA__V1__PLACEMENT_SHARE__INIT;
    Fovea__V1__PlacementShare *shares[1] = {&share};
    Fovea__V1__TokenRange range = FOVEA__V1__TOKEN_RANGE__INIT;
    Fovea__V1__TokenRange *ranges[FV_SHARE_RANGES_MAX + 1];
    fv_session_info_t info_out;
    fv_placement_info_t placement_out;
    fv_status_t status = FV_OK;

    (void)state;
    info.session_id = text(HEX);
    info.layer_tokens = tokens;
    info.n_layer_tokens = FV_LAYERS_MAX + 1;
    DECODE(session_info, info, &info_out, &status);
    assert_says(status, FV_ERR_INVALID_ARG, "layer_tokens: given 1025");
    placement.session_id = text(HEX);
    placement.shares = shares;
    placement.n_shares = 1;
    for (size_t i = 0; i < FV_COUNT(ranges); i++) {
        ranges[i] = &range;
    }
    share.ranges = ranges;
    share.n_ranges = FV_SHARE_RANGES_MAX + 1;
    DECODE(placement, placement, &placement_out, &status);
    assert_says(status, FV_ERR_INVALID_ARG, "shares.ranges: given 65");
}

static void test_large_and_malformed_messages_are_refused(void **state)
{
    static uint8_t zeros[(1U << 20U) + 1U];
    static const uint8_t k_cut[] = "\x0a\x20"
                                   "abc";
    fv_session_request_t out;
    fv_drain_response_t drain;

    (void)state;
    assert_says(fv_wire_close_request_decode((fv_span_t){zeros, sizeof(zeros)}, &out),
                FV_ERR_INVALID_ARG, "CloseSessionRequest: given 1048577 bytes");
    assert_says(fv_wire_close_request_decode((fv_span_t){k_cut, 5}, &out), FV_ERR_INVALID_ARG,
                "CloseSessionRequest: given 5 malformed bytes");
    assert_int_equal(fv_wire_drain_response_decode((fv_span_t){NULL, 0}, &drain), FV_OK);
    assert_int_equal(drain.n_sessions, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_model),
        cmocka_unit_test(test_same_request_same_spec),
        cmocka_unit_test(test_policies_fall_on_their_layers),
        cmocka_unit_test(test_distinct_policies_are_bounded),
        cmocka_unit_test(test_bad_models_are_refused),
        cmocka_unit_test(test_s2),
        cmocka_unit_test(test_latent),
        cmocka_unit_test(test_bad_opens_are_refused),
        cmocka_unit_test(test_bad_session_ids_are_refused),
        cmocka_unit_test(test_absent_and_zero_fork_positions_differ),
        cmocka_unit_test(test_small_limits),
        cmocka_unit_test(test_long_lists_are_refused),
        cmocka_unit_test(test_large_and_malformed_messages_are_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
