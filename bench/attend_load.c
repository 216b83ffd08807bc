/*
 * attend_load.c - sessions, requests and the check of replies for bench_service.
 */
#include "bench/attend_load.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ATTENTION      "/fovea.v1.Attention/"
#define CLUSTER        "/fovea.v1.Cluster/"
#define PREFILL_TOKENS 512U
#define VERIFY_STEPS   4
#define TOLERANCE      0.02 /* bf16 keeps 8 bits; |v| <= 1 */
#define Q_ELEMS        ((size_t)ATTEND_Q_HEADS * ATTEND_HEAD_DIM)
#define KV_ELEMS       ((size_t)ATTEND_KV_HEADS * ATTEND_HEAD_DIM)

static float from_bf16(uint16_t bits)
{
    uint32_t word = (uint32_t)bits << 16U;
    float value = 0;

    memcpy(&value, &word, sizeof(value));
    return value;
}

static uint16_t to_bf16(float value)
{
    uint32_t word = 0;

    memcpy(&word, &value, sizeof(word));
    return (uint16_t)(word >> 16U);
}

/* One token of random values in [-1, 1], repeated for each item. */
static uint16_t *make_tensor(uint32_t n_items, size_t n_elems, uint32_t seed)
{
    uint16_t *tensor = malloc(n_items * n_elems * sizeof(*tensor));
    uint32_t x = seed;

    for (size_t i = 0; (tensor != NULL) && (i < n_elems); i++) {
        x = (x * 1664525U) + 1013904223U;
        tensor[i] = to_bf16(((float)(x >> 8U) / 8388608.0F) - 1.0F);
    }
    for (uint32_t item = 1; (tensor != NULL) && (item < n_items); item++) {
        memcpy(tensor + ((size_t)item * n_elems), tensor, n_elems * sizeof(*tensor));
    }
    return tensor;
}

/* ------------------------------------------------------------------ the workload */

static bool
encode(fv_attend_load_t *a, uint32_t slot_idx, uint32_t n_tokens, fv_load_request_t *out)
{
    fv_attend_slot_t *slot = &a->slots[slot_idx];
    size_t q_bytes = (size_t)a->batch * Q_ELEMS * 2U;
    size_t kv_bytes = (size_t)a->batch * KV_ELEMS * 2U;
    uint32_t parity = (uint32_t)(slot->position % 2U);
    fv_attend_request_t request = {.request_id = slot_idx,
                                   .dtype = FV_DTYPE_BF16,
                                   .causal = true,
                                   .append = true,
                                   .n_items = a->batch,
                                   .n_tokens = (uint64_t)a->batch * n_tokens};

    for (uint32_t i = 0; i < a->batch; i++) {
        slot->items[i].position = slot->position;
        slot->items[i].n_tokens = n_tokens;
    }
    fv_bytes_free(&slot->head);
    if (fv_wire_attend_request_encode(&request, slot->items, q_bytes * n_tokens,
                                      kv_bytes * n_tokens, kv_bytes * n_tokens, &slot->head,
                                      &slot->tensors) != FV_OK) {
        (void)fprintf(stderr, "attend: %s\n", fv_error_context());
        return false;
    }
    const fv_span_t pieces[7] = {
        {slot->head.data, slot->head.n_bytes},     {slot->tensors.q, slot->tensors.n_q},
        {(const uint8_t *)a->q, q_bytes},          {slot->tensors.k, slot->tensors.n_k},
        {(const uint8_t *)a->k[parity], kv_bytes}, {slot->tensors.v, slot->tensors.n_v},
        {(const uint8_t *)a->v[parity], kv_bytes},
    };
    a->request_bytes = 0;
    for (size_t i = 0; i < 7U; i++) {
        out->pieces[i] = pieces[i];
        out->is_copied[i] = (i % 2U == 1U) || (i == 0U);
        a->request_bytes += pieces[i].n_bytes;
    }
    out->n_pieces = 7;
    return true;
}

static void build(void *ctx, uint32_t slot, fv_load_request_t *out)
{
    if (!encode(ctx, slot, 1, out)) {
        out->n_pieces = 0; /* an empty request is refused by the service */
    }
}

/* Largest error of one item's row against the closed form of attend_load.h, `n_tokens` in the session. */
static double row_error(const fv_attend_load_t *a, const uint16_t *out, uint64_t n_tokens)
{
    double worst = 0;
    uint64_t n_odd = n_tokens / 2U;
    double n[2] = {(double)(n_tokens - n_odd), (double)n_odd};

    for (uint32_t h = 0; h < ATTEND_Q_HEADS; h++) {
        uint32_t kv = (h / (ATTEND_Q_HEADS / ATTEND_KV_HEADS)) * ATTEND_HEAD_DIM;
        double s[2] = {0, 0};
        for (uint32_t i = 0; i < 2U; i++) {
            for (uint32_t d = 0; d < ATTEND_HEAD_DIM; d++) {
                s[i] += (double)from_bf16(a->q[(h * ATTEND_HEAD_DIM) + d]) *
                        (double)from_bf16(a->k[i][kv + d]);
            }
            s[i] /= sqrt((double)ATTEND_HEAD_DIM);
        }
        double w0 = n[0] * exp(s[0] - fmax(s[0], s[1]));
        double w1 = n[1] * exp(s[1] - fmax(s[0], s[1]));
        for (uint32_t d = 0; d < ATTEND_HEAD_DIM; d++) {
            double v0 = (double)from_bf16(a->v[0][kv + d]);
            double v1 = (double)from_bf16(a->v[1][kv + d]);
            double expected = ((w0 * v0) + (w1 * v1)) / (w0 + w1);
            double error = fabs((double)from_bf16(out[(h * ATTEND_HEAD_DIM) + d]) - expected);
            worst = (error > worst) || (error != error) ? error : worst;
        }
    }
    return worst;
}

static bool verify(fv_attend_load_t *a,
                   const fv_span_t *spans,
                   size_t n_spans,
                   fv_region_t out,
                   uint64_t n_tokens)
{
    fv_wire_gather(spans, n_spans, out, a->scratch.data);
    for (uint32_t item = 0; item < a->batch; item++) {
        const uint16_t *row =
            (const uint16_t *)(const void *)a->scratch.data + ((size_t)item * Q_ELEMS);
        double error = row_error(a, row, n_tokens);
        if (!(error <= TOLERANCE)) {
            (void)fprintf(stderr,
                          "attend: item %u at %llu tokens is off by %g, expected at most %g\n",
                          item, (unsigned long long)n_tokens, error, TOLERANCE);
            return false;
        }
    }
    return true;
}

static bool check(void *ctx, const fv_span_t *spans, size_t n_spans, uint32_t *out_slot)
{
    fv_attend_load_t *a = ctx;
    fv_attend_response_view_t view;
    size_t expected = (size_t)a->batch * Q_ELEMS * 2U;

    if (fv_wire_attend_response_scan(spans, n_spans, &view) != FV_OK) {
        (void)fprintf(stderr, "attend: %s\n", fv_error_context());
        return false;
    }
    if ((view.code != 0) || (view.out.n_bytes != expected) || (view.request_id >= a->n_slots)) {
        (void)fprintf(stderr, "attend: status %d (%s), %zu bytes out, expected %zu\n",
                      (int)view.code, view.message, view.out.n_bytes, expected);
        return false;
    }
    fv_attend_slot_t *slot = &a->slots[view.request_id];
    slot->position++;
    *out_slot = (uint32_t)view.request_id;
    a->reply_bytes = 0;
    for (size_t i = 0; i < n_spans; i++) {
        a->reply_bytes += spans[i].n_bytes;
    }
    a->n_timed++;
    a->queue_us += view.timings.queue_us;
    a->compute_us += view.timings.compute_us;
    a->exchange_us += view.timings.exchange_us;
    a->total_us += view.timings.total_us;
    return !a->is_verifying || a->is_noop || verify(a, spans, n_spans, view.out, slot->position);
}

/* ------------------------------------------------------------------ sessions */

static bool call(fv_attend_load_t *a, const char *method, fv_bytes_t *request, fv_bytes_t *reply)
{
    fv_span_t span = {request->data, request->n_bytes};
    int status = fv_load_call(a->load, method, span, reply);

    fv_bytes_free(request);
    return status == 0;
}

static bool register_model(fv_attend_load_t *a, char model_id[FV_MODEL_ID_BYTES])
{
    fv_model_spec_t spec = {.name = "bench-32-8-128",
                            .n_layers = 1,
                            .n_q_heads = (int32_t)ATTEND_Q_HEADS,
                            .n_kv_heads = (int32_t)ATTEND_KV_HEADS,
                            .head_dim_qk = (int32_t)ATTEND_HEAD_DIM,
                            .head_dim_v = (int32_t)ATTEND_HEAD_DIM,
                            .kv_dtype = FV_DTYPE_BF16,
                            .n_policies = 1};
    fv_bytes_t request = {0};
    fv_bytes_t reply = {0};
    fv_register_response_t response;

    if ((fv_model_spec_check(&spec) != FV_OK) ||
        (fv_wire_register_request_encode(&spec, &request) != FV_OK)) {
        (void)fprintf(stderr, "model: %s\n", fv_error_context());
        return false;
    }
    bool is_ok = call(a, ATTENTION "RegisterModel", &request, &reply) &&
                 (fv_wire_register_response_decode((fv_span_t){reply.data, reply.n_bytes},
                                                   &response) == FV_OK);
    if (is_ok) {
        memcpy(model_id, response.model_id, FV_MODEL_ID_BYTES);
    }
    fv_bytes_free(&reply);
    return is_ok;
}

static bool open_sessions(fv_attend_load_t *a, const char *model_id)
{
    fv_open_request_t open = {.max_tokens_hint = a->context + 4096U};

    memcpy(open.model_id, model_id, FV_MODEL_ID_BYTES);
    for (uint32_t i = 0; i < a->n_slots * a->batch; i++) {
        fv_bytes_t request = {0};
        fv_bytes_t reply = {0};
        fv_session_id_t *id = &a->slots[i / a->batch].items[i % a->batch].session;
        bool is_ok =
            (fv_wire_open_request_encode(&open, &request) == FV_OK) &&
            call(a, ATTENTION "OpenSession", &request, &reply) &&
            (fv_wire_open_response_decode((fv_span_t){reply.data, reply.n_bytes}, id) == FV_OK);
        fv_bytes_free(&reply);
        if (!is_ok) {
            return false;
        }
    }
    return true;
}

typedef fv_status_t (*encode_session_fn_t)(const fv_session_request_t *in, fv_bytes_t *out);

static bool
for_each_session(fv_attend_load_t *a, const char *method, encode_session_fn_t encode_request)
{
    for (uint32_t i = 0; i < a->n_slots * a->batch; i++) {
        fv_session_request_t session = {
            .session = a->slots[i / a->batch].items[i % a->batch].session, .position = a->context};
        fv_bytes_t request = {0};
        fv_bytes_t reply = {0};
        bool is_ok =
            (encode_request(&session, &request) == FV_OK) && call(a, method, &request, &reply);
        fv_bytes_free(&reply);
        if (!is_ok) {
            return false;
        }
    }
    return true;
}

/* One chunk of prefill as a whole message in `buffer`; its bytes, or 0. Tokens alternate as decode goes on. */
static size_t build_chunk(const fv_attend_load_t *a,
                          fv_attend_item_t *item,
                          uint64_t at,
                          uint32_t n,
                          uint8_t *buffer)
{
    const size_t sizes[3] = {Q_ELEMS * 2U, KV_ELEMS * 2U, KV_ELEMS * 2U};
    fv_attend_request_t request = {
        .dtype = FV_DTYPE_BF16, .causal = true, .append = true, .n_items = 1, .n_tokens = n};
    fv_bytes_t head = {0};
    fv_wire_tensor_heads_t heads;

    item->position = at;
    item->n_tokens = n;
    if (fv_wire_attend_request_encode(&request, item, n * sizes[0], n * sizes[1], n * sizes[2],
                                      &head, &heads) != FV_OK) {
        return 0;
    }
    const uint8_t *marks[3] = {heads.q, heads.k, heads.v};
    const size_t n_marks[3] = {heads.n_q, heads.n_k, heads.n_v};
    size_t used = head.n_bytes;
    memcpy(buffer, head.data, head.n_bytes);
    fv_bytes_free(&head);
    for (int tensor = 0; tensor < 3; tensor++) {
        memcpy(buffer + used, marks[tensor], n_marks[tensor]);
        used += n_marks[tensor];
        for (uint32_t t = 0; t < n; t++) {
            size_t parity = (at + t) % 2U;
            const uint16_t *kv = (tensor == 1) ? a->k[parity] : a->v[parity];
            memcpy(buffer + used, (tensor == 0) ? a->q : kv, sizes[tensor]);
            used += sizes[tensor];
        }
    }
    return used;
}

static bool prefill_session(fv_attend_load_t *a, fv_attend_item_t *item, uint8_t *buffer)
{
    bool is_ok = true;

    for (uint64_t at = 0; is_ok && (at < a->context);) {
        uint64_t left = a->context - at;
        uint32_t n = (left < PREFILL_TOKENS) ? (uint32_t)left : PREFILL_TOKENS;
        fv_bytes_t reply = {0};
        size_t n_bytes = build_chunk(a, item, at, n, buffer);
        is_ok = (n_bytes > 0U) && (fv_load_call(a->load, ATTENTION "AttendOnce",
                                                (fv_span_t){buffer, n_bytes}, &reply) == 0);
        fv_bytes_free(&reply);
        at += n;
    }
    return is_ok;
}

static bool prefill(fv_attend_load_t *a)
{
    uint8_t *buffer = malloc((size_t)PREFILL_TOKENS * (Q_ELEMS + (2U * KV_ELEMS)) * 2U + 4096U);
    bool is_ok = (buffer != NULL);

    for (uint32_t i = 0; is_ok && (i < a->n_slots * a->batch); i++) {
        is_ok = prefill_session(a, &a->slots[i / a->batch].items[i % a->batch], buffer);
    }
    for (uint32_t i = 0; i < a->n_slots; i++) {
        a->slots[i].position = a->context;
    }
    free(buffer);
    return is_ok;
}

/* ------------------------------------------------------------------ life */

static bool read_backend(fv_attend_load_t *a)
{
    fv_bytes_t request = {0};
    fv_bytes_t reply = {0};
    fv_cluster_status_t status;

    if (!call(a, CLUSTER "GetStatus", &request, &reply) ||
        (fv_wire_cluster_status_decode((fv_span_t){reply.data, reply.n_bytes}, &status) != FV_OK)) {
        fv_bytes_free(&reply);
        return false;
    }
    for (uint32_t i = 0; i < status.n_ranks; i++) {
        a->is_noop = a->is_noop || (strcmp(status.ranks[i].backend, "null") == 0);
    }
    fv_cluster_status_free(&status);
    fv_bytes_free(&reply);
    return true;
}

static bool allocate(fv_attend_load_t *a)
{
    a->q = make_tensor(a->batch, Q_ELEMS, 1);
    for (uint32_t i = 0; i < 2U; i++) {
        a->k[i] = make_tensor(a->batch, KV_ELEMS, 2U + i);
        a->v[i] = make_tensor(a->batch, KV_ELEMS, 4U + i);
    }
    a->scratch.n_bytes = (size_t)a->batch * Q_ELEMS * 2U;
    a->scratch.data = malloc(a->scratch.n_bytes);
    a->slots = calloc(a->n_slots, sizeof(*a->slots));
    bool is_ok = (a->q != NULL) && (a->k[0] != NULL) && (a->k[1] != NULL) && (a->v[0] != NULL) &&
                 (a->v[1] != NULL) && (a->scratch.data != NULL) && (a->slots != NULL);
    for (uint32_t i = 0; is_ok && (i < a->n_slots); i++) {
        a->slots[i].items = calloc(a->batch, sizeof(fv_attend_item_t));
        is_ok = (a->slots[i].items != NULL);
    }
    return is_ok;
}

bool fv_attend_load_rewind(fv_attend_load_t *a)
{
    for (uint32_t i = 0; i < a->n_slots; i++) {
        a->slots[i].position = a->context;
    }
    a->n_timed = 0;
    a->queue_us = 0;
    a->compute_us = 0;
    a->exchange_us = 0;
    a->total_us = 0;
    return for_each_session(a, ATTENTION "TruncateSession", fv_wire_truncate_request_encode);
}

bool fv_attend_load_open(fv_attend_load_t *a,
                         const char *address,
                         bool is_stream,
                         uint32_t batch,
                         uint32_t n_in_flight,
                         uint64_t context)
{
    fv_workload_t workload = {.stream_method = ATTENTION "Attend",
                              .once_method = ATTENTION "AttendOnce",
                              .ctx = a,
                              .build = build,
                              .check = check};
    char model_id[FV_MODEL_ID_BYTES];
    fv_load_result_t result;

    memset(a, 0, sizeof(*a));
    a->batch = batch;
    a->n_slots = n_in_flight;
    a->context = context;
    a->load = fv_load_open(address, &workload, is_stream, n_in_flight);
    if ((a->load == NULL) || !allocate(a) || !read_backend(a) || !register_model(a, model_id) ||
        !open_sessions(a, model_id) || !prefill(a)) {
        return false;
    }
    a->is_verifying = true; /* nothing is timed that does not answer right */
    bool is_ok = true;
    for (int i = 0; is_ok && (i < VERIFY_STEPS); i++) {
        is_ok = fv_load_run(a->load, 1e-9, &result); /* one request per slot */
    }
    a->is_verifying = false;
    return is_ok;
}

void fv_attend_load_close(fv_attend_load_t *a)
{
    if ((a->load != NULL) && (a->slots != NULL)) {
        (void)for_each_session(a, ATTENTION "CloseSession", fv_wire_close_request_encode);
    }
    fv_load_close(a->load);
    for (uint32_t i = 0; (a->slots != NULL) && (i < a->n_slots); i++) {
        free(a->slots[i].items);
        fv_bytes_free(&a->slots[i].head);
    }
    free(a->slots);
    free(a->q);
    for (uint32_t i = 0; i < 2U; i++) {
        free(a->k[i]);
        free(a->v[i]);
    }
    fv_bytes_free(&a->scratch);
    memset(a, 0, sizeof(*a));
}
