/*
 * prop_wire_control.c - every small message: what is encoded reads back to the same.
 *
 * Method: random structs through encode and decode; then the same bytes cut short or with bits flipped, which
 *         must be read or refused with a text, never worse (memory is watched by the sanitizers).
 */
#include "proto/wire.h"
#include "tests/property/prop_wire_random.h"
#include "tests/support/test.h"

#include <string.h>

#define N_CASES 300

static fv_random_t g_random;

static void random_bytes(void *out, size_t n)
{
    uint8_t *p = out;

    for (size_t i = 0; i < n; i++) {
        p[i] = (uint8_t)fv_random_next(&g_random);
    }
}

/* Printable, at least n_min characters, fits `cap` with its NUL; the rest of the array is zero. */
static void random_text(char *out, size_t cap, size_t n_min)
{
    size_t n = n_min + fv_random_below(&g_random, cap - n_min);

    memset(out, 0, cap);
    for (size_t i = 0; i < n; i++) {
        out[i] = (char)('!' + fv_random_below(&g_random, 90));
    }
}

static uint32_t random_u32(void)
{
    return (uint32_t)(fv_random_wide(&g_random) >> 32U);
}

static int32_t random_i31(void)
{
    return (int32_t)(random_u32() >> 1U);
}

static fv_session_id_t random_id(void)
{
    fv_session_id_t id;

    random_bytes(&id, sizeof(id));
    return id;
}

static fv_span_t span_of(fv_bytes_t bytes)
{
    return (fv_span_t){.data = bytes.data, .n_bytes = bytes.n_bytes};
}

/* Bytes of their own, so that a read past the end is caught. */
static fv_bytes_t damaged(fv_bytes_t bytes)
{
    fv_bytes_t out = {.data = malloc(bytes.n_bytes + 1U), .n_bytes = bytes.n_bytes};

    assert_non_null(out.data);
    memcpy(out.data, bytes.data, bytes.n_bytes);
    if ((bytes.n_bytes > 0) && (fv_random_below(&g_random, 2) == 0)) {
        out.n_bytes = fv_random_below(&g_random, bytes.n_bytes);
        uint8_t *cut = malloc(out.n_bytes + 1U);
        assert_non_null(cut);
        memcpy(cut, out.data, out.n_bytes);
        free(out.data);
        out.data = cut;
    } else if (bytes.n_bytes > 0) {
        out.data[fv_random_below(&g_random, bytes.n_bytes)] ^=
            (uint8_t)(1U << fv_random_below(&g_random, 8));
    }
    return out;
}

/* Encodes `in`, decodes into `back`; then damaged bytes into `scratch`, which `release` frees. */
#define ROUND_TRIP(name, in, back, scratch, release)                               \
    do {                                                                           \
        fv_bytes_t bytes_ = {0};                                                   \
        assert_int_equal(fv_wire_##name##_encode((in), &bytes_), FV_OK);           \
        assert_int_equal(fv_wire_##name##_decode(span_of(bytes_), (back)), FV_OK); \
        fv_bytes_t bad_ = damaged(bytes_);                                         \
        if (fv_wire_##name##_decode(span_of(bad_), (scratch)) == FV_OK) {          \
            release(scratch);                                                      \
        } else {                                                                   \
            assert_true(fv_error_context()[0] != '\0');                            \
        }                                                                          \
        fv_bytes_free(&bad_);                                                      \
        fv_bytes_free(&bytes_);                                                    \
    } while (0)
#define NOTHING_TO_FREE(scratch) ((void)(scratch))

static void test_session_requests(void **state)
{
    (void)state;
    for (int i = 0; i < N_CASES; i++) {
        fv_session_request_t in = {.session = random_id()};
        fv_session_request_t back;
        fv_session_request_t scratch;
        fv_session_id_t id = random_id();
        fv_session_id_t id_back;

        ROUND_TRIP(close_request, &in, &back, &scratch, NOTHING_TO_FREE);
        assert_memory_equal(&back.session, &in.session, sizeof(in.session));
        assert_false(back.has_position);
        ROUND_TRIP(get_request, &in, &back, &scratch, NOTHING_TO_FREE);
        assert_memory_equal(&back.session, &in.session, sizeof(in.session));
        ROUND_TRIP(placement_request, &in, &back, &scratch, NOTHING_TO_FREE);
        assert_memory_equal(&back.session, &in.session, sizeof(in.session));
        ROUND_TRIP(fork_request, &in, &back, &scratch, NOTHING_TO_FREE);
        assert_false(back.has_position);
        in.has_position = true;
        in.position = (i % 4 == 0) ? 0 : fv_random_wide(&g_random);
        ROUND_TRIP(fork_request, &in, &back, &scratch, NOTHING_TO_FREE);
        assert_true(back.has_position);
        assert_int_equal(back.position, in.position);
        assert_memory_equal(&back.session, &in.session, sizeof(in.session));
        ROUND_TRIP(truncate_request, &in, &back, &scratch, NOTHING_TO_FREE);
        assert_int_equal(back.position, in.position);
        assert_memory_equal(&back.session, &in.session, sizeof(in.session));
        ROUND_TRIP(open_response, &id, &id_back, &scratch.session, NOTHING_TO_FREE);
        assert_memory_equal(&id_back, &id, sizeof(id));
        ROUND_TRIP(fork_response, &id, &id_back, &scratch.session, NOTHING_TO_FREE);
        assert_memory_equal(&id_back, &id, sizeof(id));
    }
}

static int32_t random_factors(float factors[FV_GROUPS_MAX])
{
    int32_t n = (int32_t)fv_random_below(&g_random, FV_GROUPS_MAX + 1);

    for (int32_t i = 0; i < n; i++) {
        factors[i] = (float)fv_random_below(&g_random, 1000) / 9.0F;
    }
    return n;
}

static void random_latent(fv_model_spec_t *spec)
{
    spec->latent_dim = random_i31();
    spec->rope_dim = random_i31();
    if (fv_random_below(&g_random, 2) == 0) {
        spec->latent_norm.mode = FV_NORM_SLICE_RMS;
        spec->latent_norm.eps = (float)fv_random_below(&g_random, 1000) / 11.0F;
        spec->latent_norm.n_alpha = random_factors(spec->latent_norm.alpha);
    }
    if (spec->sharding.mode == FV_SHARDING_LATENT) {
        spec->sharding.groups = random_i31();
        spec->sharding.exact = (int32_t)fv_random_below(&g_random, 2);
        spec->sharding.n_alpha = random_factors(spec->sharding.alpha);
        spec->sharding.n_mu = random_factors(spec->sharding.mu);
    }
}

/* A spec as decoding leaves it: each policy but dense is used by a layer, in order of first use. */
static void random_spec(fv_model_spec_t *spec)
{
    memset(spec, 0, sizeof(*spec));
    random_text(spec->name, sizeof(spec->name), 0);
    spec->n_layers = 1 + (int32_t)fv_random_below(&g_random, FV_LAYERS_MAX);
    spec->n_q_heads = random_i31();
    spec->n_kv_heads = random_i31();
    spec->head_dim_qk = random_i31();
    spec->head_dim_v = random_i31();
    spec->kv_dtype = (int32_t)fv_random_below(&g_random, 4);
    spec->softmax_scale = (float)fv_random_below(&g_random, 1000) / 7.0F;
    spec->logit_softcap = (float)fv_random_below(&g_random, 1000) / 3.0F;
    spec->kind = (int32_t)fv_random_below(&g_random, 2);
    spec->sharding.mode = (int32_t)fv_random_below(&g_random, 4);
    spec->sharding.shard_tokens = random_i31();
    spec->sharding.max_ranks = random_i31();
    if (spec->kind == FV_MODEL_LATENT) {
        random_latent(spec);
    }
    spec->n_policies = 1 + (int32_t)fv_random_below(&g_random, FV_POLICIES_MAX);
    if (spec->n_policies > spec->n_layers) {
        spec->n_policies = spec->n_layers;
    }
    for (int32_t i = 1; i < spec->n_policies; i++) {
        spec->policies[i] = (fv_policy_t){
            .kind = FV_POLICY_WINDOW, .window_tokens = i, .sink_tokens = random_i31()};
        if (fv_random_below(&g_random, 2) == 0) {
            spec->policies[i] =
                (fv_policy_t){.kind = FV_POLICY_S2,
                              .block_tokens = i,
                              .local_blocks = random_i31(),
                              .vert_stride = random_i31(),
                              .head_sliding_step = -random_i31(),
                              .head_sliding_offset = random_i31(),
                              .num_dense_heads = random_i31(),
                              .homo_head = (int32_t)fv_random_below(&g_random, 2),
                              .pattern_per = (int32_t)fv_random_below(&g_random, 2)};
        }
    }
    for (int32_t i = 0; i < spec->n_layers; i++) {
        spec->layer_policy[i] =
            (uint8_t)((i < spec->n_policies)
                          ? i
                          : (int32_t)fv_random_below(&g_random, (uint64_t)spec->n_policies));
    }
}

static void test_models(void **state)
{
    static fv_model_spec_t spec;
    static fv_model_spec_t back;
    static fv_model_spec_t scratch;

    (void)state;
    for (int i = 0; i < N_CASES; i++) {
        fv_register_response_t r = {.n_warnings = (uint32_t)fv_random_below(&g_random, 5)};
        fv_register_response_t r_back;
        fv_register_response_t r_scratch;

        random_spec(&spec);
        ROUND_TRIP(register_request, &spec, &back, &scratch, NOTHING_TO_FREE);
        assert_memory_equal(&back, &spec, sizeof(spec));
        random_text(r.model_id, sizeof(r.model_id), 1);
        for (uint32_t j = 0; j < r.n_warnings; j++) {
            random_text(r.warnings[j], sizeof(r.warnings[j]), 0);
        }
        ROUND_TRIP(register_response, &r, &r_back, &r_scratch, NOTHING_TO_FREE);
        assert_memory_equal(&r_back, &r, sizeof(r));
    }
}

static void test_open(void **state)
{
    (void)state;
    for (int i = 0; i < N_CASES; i++) {
        fv_open_request_t in = {.max_tokens_hint = fv_random_wide(&g_random),
                                .close_with_stream = (i % 3) == 0};
        fv_open_request_t back;
        fv_open_request_t scratch;

        random_text(in.model_id, sizeof(in.model_id), 1);
        if (i % 2 == 0) {
            in.sharding = (fv_sharding_t){.is_set = 1,
                                          .mode = (int32_t)fv_random_below(&g_random, 3),
                                          .shard_tokens = (random_i31() / 64) * 64,
                                          .max_ranks = random_i31()};
        }
        ROUND_TRIP(open_request, &in, &back, &scratch, NOTHING_TO_FREE);
        assert_memory_equal(&back, &in, sizeof(in));
    }
}

static void random_info(fv_session_info_t *info)
{
    *info = (fv_session_info_t){.session = random_id(),
                                .n_layers = (uint32_t)fv_random_below(&g_random, 70),
                                .max_tokens = fv_random_wide(&g_random),
                                .kv_bytes = fv_random_wide(&g_random),
                                .created_unix_ms = fv_random_wide(&g_random),
                                .has_parent = fv_random_below(&g_random, 2) != 0};
    random_text(info->model_id, sizeof(info->model_id), 0);
    if (info->has_parent) {
        info->parent = random_id();
    }
    info->layer_tokens = calloc(info->n_layers + 1U, sizeof(uint64_t));
    assert_non_null(info->layer_tokens);
    for (uint32_t i = 0; i < info->n_layers; i++) {
        info->layer_tokens[i] = fv_random_wide(&g_random);
    }
}

static void assert_same_info(const fv_session_info_t *a, const fv_session_info_t *b)
{
    assert_memory_equal(&a->session, &b->session, sizeof(a->session));
    assert_string_equal(a->model_id, b->model_id);
    assert_int_equal(a->n_layers, b->n_layers);
    if (a->n_layers > 0) {
        assert_memory_equal(a->layer_tokens, b->layer_tokens, a->n_layers * sizeof(uint64_t));
    }
    assert_int_equal(a->max_tokens, b->max_tokens);
    assert_int_equal(a->kv_bytes, b->kv_bytes);
    assert_int_equal(a->created_unix_ms, b->created_unix_ms);
    assert_int_equal(a->has_parent, b->has_parent);
    assert_memory_equal(&a->parent, &b->parent, sizeof(a->parent));
}

static void test_sessions(void **state)
{
    (void)state;
    for (int i = 0; i < N_CASES; i++) {
        fv_session_info_t in;
        fv_session_info_t back;
        fv_session_info_t scratch;

        random_info(&in);
        ROUND_TRIP(session_info, &in, &back, &scratch, fv_session_info_free);
        assert_same_info(&in, &back);
        fv_session_info_free(&in);
        fv_session_info_free(&back);
    }
}

static void test_lists(void **state)
{
    (void)state;
    for (int i = 0; i < N_CASES / 10; i++) {
        fv_session_info_t sessions[20];
        fv_list_response_t in = {.n_sessions = (uint32_t)fv_random_below(&g_random, 20),
                                 .sessions = sessions,
                                 .n_total = fv_random_wide(&g_random)};
        fv_list_response_t back;
        fv_list_response_t scratch;
        fv_list_request_t request = {.page_size = (uint32_t)fv_random_below(&g_random, 1001)};
        fv_list_request_t request_back;
        fv_list_request_t request_scratch;

        random_text(in.next_page_token, sizeof(in.next_page_token), 0);
        for (uint32_t j = 0; j < in.n_sessions; j++) {
            random_info(&sessions[j]);
        }
        ROUND_TRIP(list_response, &in, &back, &scratch, fv_list_response_free);
        assert_int_equal(back.n_sessions, in.n_sessions);
        assert_int_equal(back.n_total, in.n_total);
        assert_string_equal(back.next_page_token, in.next_page_token);
        for (uint32_t j = 0; j < in.n_sessions; j++) {
            assert_same_info(&sessions[j], &back.sessions[j]);
            fv_session_info_free(&sessions[j]);
        }
        fv_list_response_free(&back);
        random_text(request.page_token, sizeof(request.page_token), 0);
        random_text(request.model_id, sizeof(request.model_id), 0);
        ROUND_TRIP(list_request, &request, &request_back, &request_scratch, NOTHING_TO_FREE);
        assert_memory_equal(&request_back, &request, sizeof(request));
    }
}

static void random_rank(fv_rank_status_t *rank)
{
    memset(rank, 0, sizeof(*rank));
    rank->rank = random_u32();
    random_text(rank->host, sizeof(rank->host), 0);
    random_text(rank->backend, sizeof(rank->backend), 0);
    random_text(rank->device, sizeof(rank->device), 0);
    random_text(rank->state, sizeof(rank->state), 0);
    rank->threads = random_u32();
    rank->kv_bytes_total = fv_random_wide(&g_random);
    rank->kv_bytes_free = fv_random_wide(&g_random);
    rank->n_steps = fv_random_wide(&g_random);
    rank->busy_us = fv_random_wide(&g_random);
}

static void random_status(fv_cluster_status_t *s, fv_rank_status_t *ranks)
{
    memset(s, 0, sizeof(*s));
    random_text(s->version, sizeof(s->version), 0);
    random_text(s->state, sizeof(s->state), 0);
    random_text(s->exchange, sizeof(s->exchange), 0);
    s->n_ranks = (uint32_t)fv_random_below(&g_random, 9);
    s->n_listen = (uint32_t)fv_random_below(&g_random, 9);
    for (uint32_t i = 0; i < s->n_listen; i++) {
        random_text(s->listen[i], sizeof(s->listen[i]), 0);
    }
    for (uint32_t i = 0; i < s->n_ranks; i++) {
        random_rank(&ranks[i]);
    }
    uint64_t *const numbers[] = {&s->epoch,
                                 &s->uptime_ms,
                                 &s->n_models,
                                 &s->n_sessions,
                                 &s->n_requests_queued,
                                 &s->n_requests_running,
                                 &s->n_requests_done,
                                 &s->n_requests_failed,
                                 &s->n_steps,
                                 &s->n_tokens_appended,
                                 &s->kv_bytes_total,
                                 &s->kv_bytes_free};
    for (size_t i = 0; i < FV_COUNT(numbers); i++) {
        *numbers[i] = fv_random_wide(&g_random);
    }
}

static void test_cluster_status(void **state)
{
    (void)state;
    for (int i = 0; i < N_CASES; i++) {
        fv_rank_status_t ranks[9];
        fv_cluster_status_t in;
        fv_cluster_status_t back;
        fv_cluster_status_t scratch;

        random_status(&in, ranks);
        in.ranks = ranks;
        ROUND_TRIP(cluster_status, &in, &back, &scratch, fv_cluster_status_free);
        if (in.n_ranks > 0) {
            assert_memory_equal(back.ranks, ranks, in.n_ranks * sizeof(ranks[0]));
        }
        fv_rank_status_t *owned = back.ranks;
        back.ranks = NULL;
        in.ranks = NULL;
        assert_memory_equal(&back, &in, sizeof(in));
        back.ranks = owned;
        fv_cluster_status_free(&back);
    }
}

static void random_share(fv_placement_share_t *share)
{
    memset(share, 0, sizeof(*share));
    share->rank = random_u32();
    share->kv_head_begin = random_u32();
    share->latent_begin = random_u32();
    share->latent_end = random_u32();
    share->kv_head_end = random_u32();
    share->q_head_begin = random_u32();
    share->q_head_end = random_u32();
    share->n_ranges = (uint32_t)fv_random_below(&g_random, FV_SHARE_RANGES_MAX + 1U);
    for (uint32_t i = 0; i < share->n_ranges; i++) {
        share->ranges[i] = (fv_token_range_t){.begin = fv_random_wide(&g_random),
                                              .end = fv_random_wide(&g_random)};
    }
    share->n_tokens = fv_random_wide(&g_random);
    share->kv_bytes = fv_random_wide(&g_random);
    share->freed_bytes = fv_random_wide(&g_random);
    share->truncated = fv_random_below(&g_random, 2) != 0;
}

static void random_policy(fv_policy_t *out)
{
    *out = (fv_policy_t){
        .kind = FV_POLICY_WINDOW, .window_tokens = random_i31(), .sink_tokens = random_i31()};
    if (fv_random_below(&g_random, 2) == 0) {
        *out = (fv_policy_t){.kind = FV_POLICY_S2,
                             .block_tokens = random_i31(),
                             .local_blocks = random_i31(),
                             .vert_stride = random_i31(),
                             .head_sliding_step = -random_i31(),
                             .head_sliding_offset = random_i31(),
                             .num_dense_heads = random_i31(),
                             .homo_head = (int32_t)fv_random_below(&g_random, 2),
                             .pattern_per = (int32_t)fv_random_below(&g_random, 2)};
    }
}

static void random_pattern(fv_placement_pattern_t *pattern)
{
    memset(pattern, 0, sizeof(*pattern));
    random_policy(&pattern->policy);
    pattern->n_layers = (uint32_t)fv_random_below(&g_random, FV_LAYERS_MAX + 1U);
    for (uint32_t i = 0; i < pattern->n_layers; i++) {
        pattern->layers[i] = random_u32();
    }
    pattern->n_tokens = fv_random_wide(&g_random);
    pattern->floor = fv_random_wide(&g_random);
    pattern->kv_bytes = fv_random_wide(&g_random);
    pattern->freed_bytes = fv_random_wide(&g_random);
}

static void test_placements(void **state)
{
    static fv_placement_share_t shares[6];
    static fv_placement_pattern_t patterns[3];

    (void)state;
    for (int i = 0; i < N_CASES; i++) {
        fv_placement_info_t in;
        fv_placement_info_t back;
        fv_placement_info_t scratch;

        memset(&in, 0, sizeof(in));
        in.session = random_id();
        random_text(in.model_id, sizeof(in.model_id), 0);
        random_text(in.mode, sizeof(in.mode), 0);
        random_text(in.reason, sizeof(in.reason), 0);
        in.n_head_parts = random_u32();
        in.n_latent_parts = random_u32();
        in.is_approximate = fv_random_below(&g_random, 2) == 0;
        in.n_ctx_parts = random_u32();
        in.shard_tokens = random_u32();
        in.n_tokens = fv_random_wide(&g_random);
        in.n_shares = (uint32_t)fv_random_below(&g_random, 7);
        in.shares = shares;
        for (uint32_t j = 0; j < in.n_shares; j++) {
            random_share(&shares[j]);
        }
        in.n_q_heads = random_u32();
        in.n_kv_heads = random_u32();
        in.n_patterns = (uint32_t)fv_random_below(&g_random, 4);
        in.patterns = patterns;
        for (uint32_t j = 0; j < in.n_patterns; j++) {
            random_pattern(&patterns[j]);
        }
        ROUND_TRIP(placement, &in, &back, &scratch, fv_placement_info_free);
        for (uint32_t j = 0; j < in.n_patterns; j++) {
            assert_memory_equal(&back.patterns[j], &patterns[j], sizeof(patterns[j]));
        }
        for (uint32_t j = 0; j < in.n_shares; j++) {
            assert_memory_equal(&back.shares[j], &shares[j], sizeof(shares[j]));
        }
        fv_placement_share_t *owned = back.shares;
        fv_placement_pattern_t *owned_patterns = back.patterns;
        back.shares = NULL;
        in.shares = NULL;
        back.patterns = NULL;
        in.patterns = NULL;
        assert_memory_equal(&back, &in, sizeof(in));
        back.shares = owned;
        back.patterns = owned_patterns;
        fv_placement_info_free(&back);
    }
}

static void test_watch_and_drain(void **state)
{
    (void)state;
    for (int i = 0; i < N_CASES; i++) {
        uint32_t ms = (i == 0) ? 0 : (50U + (random_u32() >> 1U));
        uint32_t ms_back = 0;
        uint32_t ms_scratch = 0;
        fv_drain_response_t in = {.n_sessions = fv_random_wide(&g_random),
                                  .n_requests_finished = fv_random_wide(&g_random)};
        fv_drain_response_t back;
        fv_drain_response_t scratch;

        ROUND_TRIP(watch_request, &ms, &ms_back, &ms_scratch, NOTHING_TO_FREE);
        assert_int_equal(ms_back, ms);
        ROUND_TRIP(drain_request, &ms, &ms_back, &ms_scratch, NOTHING_TO_FREE);
        assert_int_equal(ms_back, ms);
        ROUND_TRIP(drain_response, &in, &back, &scratch, NOTHING_TO_FREE);
        assert_memory_equal(&back, &in, sizeof(in));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_session_requests),
        cmocka_unit_test(test_models),
        cmocka_unit_test(test_open),
        cmocka_unit_test(test_sessions),
        cmocka_unit_test(test_lists),
        cmocka_unit_test(test_cluster_status),
        cmocka_unit_test(test_placements),
        cmocka_unit_test(test_watch_and_drain),
    };

    g_random = fv_random_begin("prop_wire_control");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
