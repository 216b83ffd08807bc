/*
 * wire_attend.c - AttendRequest and AttendResponse scanned in place: small fields copied, tensors located.
 *
 * Decode path: station 2 of 10. Before: coord/engine_inbox.c. After: coord/sched_step.c.
 *
 * A request that is well-formed but wrong (a bad session id, a bad dtype) is still walked to its end,
 * because its request_id may come last and the error must be answered with it.
 */
#include "proto/wire_scan.h"
#include "proto/wire_text.h"

enum {
    FV_REQUEST_ID = 1,
    FV_REQUEST_LAYER = 2,
    FV_REQUEST_ITEMS = 3,
    FV_REQUEST_DTYPE = 4,
    FV_REQUEST_CAUSAL = 5,
    FV_REQUEST_WANT_LSE = 6,
    FV_REQUEST_APPEND = 7,
    FV_REQUEST_ONLY_SLICE = 8,
    FV_REQUEST_Q = 14,
    FV_REQUEST_K = 15,
    FV_REQUEST_V = 16,
    FV_ITEM_SESSION_ID = 1,
    FV_ITEM_POSITION = 2,
    FV_ITEM_N_TOKENS = 3,
    FV_RESPONSE_ID = 1,
    FV_RESPONSE_STATUS = 2,
    FV_RESPONSE_TIMINGS = 3,
    FV_RESPONSE_DURABILITY = 4,
    FV_RESPONSE_LSE = 14,
    FV_RESPONSE_OUT = 15,
    FV_STATUS_CODE = 1,
    FV_STATUS_MESSAGE = 2,
    FV_TIMINGS_QUEUE = 1,
    FV_TIMINGS_COMPUTE = 2,
    FV_TIMINGS_EXCHANGE = 3,
    FV_TIMINGS_TOTAL = 4,
};

/* Items are named by their index, which is known only when something is wrong with one. */
static fv_status_t fail_item(uint32_t index, const char *field, const char *expected)
{
    return fv_fail(FV_ERR_INVALID_ARG, "items[%u].%s, expected %s", index, field, expected);
}

static fv_status_t item_session(const fv_scan_t *scan,
                                const fv_scan_field_t *field,
                                uint32_t index,
                                fv_session_id_t *out)
{
    char hex[FV_SESSION_ID_CHARS];

    if (field->wire_type != FV_WIRE_LEN) {
        return fail_item(index, "session_id: given a wrong wire type", "a string");
    }
    if (field->region.n_bytes != FV_SESSION_ID_CHARS) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "items[%u].session_id: given %zu characters, expected %d hex digits", index,
                       field->region.n_bytes, FV_SESSION_ID_CHARS);
    }
    fv_scan_read(scan, hex, sizeof(hex));
    if (!fv_session_id_parse(hex, sizeof(hex), out)) {
        return fail_item(index, "session_id: given other characters", "32 hex digits");
    }
    return FV_OK;
}

static fv_status_t item_check(const fv_attend_item_t *item, bool has_session, uint32_t index)
{
    if (!has_session) {
        return fail_item(index, "session_id: given none", "32 hex digits");
    }
    if (item->n_tokens == 0) {
        return fail_item(index, "n_tokens: given 0", "at least 1");
    }
    if (item->position > (uint64_t)INT64_MAX - item->n_tokens) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "items[%u].position: given %llu, expected less than 2^63", index,
                       (unsigned long long)item->position);
    }
    return FV_OK;
}

static fv_status_t scan_item(fv_scan_t *scan, uint32_t index, fv_attend_item_t *out)
{
    fv_attend_item_t item = {0};
    fv_scan_field_t field;
    fv_status_t session_status = FV_OK;
    fv_error_t session_error;
    bool has_session = false;

    while (fv_scan_next(scan, &field)) {
        switch (field.number) {
        case FV_ITEM_SESSION_ID:
            session_status = item_session(scan, &field, index, &item.session);
            if (session_status != FV_OK) { /* unless a later one takes its place: the last wins */
                session_error = fv_error_capture(session_status);
            }
            has_session = true;
            break;
        case FV_ITEM_POSITION:
            FV_RETURN_IF_ERR(fv_scan_expect(&field, FV_WIRE_VARINT, "items.position"));
            item.position = field.value;
            break;
        case FV_ITEM_N_TOKENS:
            FV_RETURN_IF_ERR(fv_scan_expect(&field, FV_WIRE_VARINT, "items.n_tokens"));
            item.n_tokens = (uint32_t)field.value;
            break;
        default:
            break;
        }
    }
    if (scan->error != NULL) {
        return fv_scan_fail(scan, "items");
    }
    if (session_status != FV_OK) {
        return fv_fail(session_status, "%s", session_error.text);
    }
    FV_RETURN_IF_ERR(item_check(&item, has_session, index));
    *out = item;
    return FV_OK;
}

/* Where the items of a request go. */
typedef struct item_sink {
    fv_attend_item_t *items;
    size_t cap;
} item_sink_t;

static fv_status_t request_item(const fv_scan_t *scan,
                                const fv_scan_field_t *field,
                                item_sink_t sink,
                                fv_attend_request_t *r)
{
    FV_RETURN_IF_ERR(fv_scan_expect(field, FV_WIRE_LEN, "items"));
    if (r->n_items >= sink.cap) {
        return fv_fail(FV_ERR_INVALID_ARG, "items: given more than %zu, expected 1..%zu", sink.cap,
                       sink.cap);
    }
    fv_scan_t sub = fv_scan_sub(scan, field);
    FV_RETURN_IF_ERR(scan_item(&sub, r->n_items, &sink.items[r->n_items]));
    r->n_tokens += sink.items[r->n_items].n_tokens;
    r->n_items++;
    return FV_OK;
}

static fv_status_t request_small(const fv_scan_field_t *field, fv_attend_request_t *r)
{
    static const char *const k_names[] = {
        [FV_REQUEST_ID] = "request_id",         [FV_REQUEST_LAYER] = "layer",
        [FV_REQUEST_DTYPE] = "dtype",           [FV_REQUEST_CAUSAL] = "causal",
        [FV_REQUEST_WANT_LSE] = "want_lse",     [FV_REQUEST_APPEND] = "append",
        [FV_REQUEST_ONLY_SLICE] = "only_slice",
    };

    FV_RETURN_IF_ERR(fv_scan_expect(field, FV_WIRE_VARINT, k_names[field->number]));
    switch (field->number) {
    case FV_REQUEST_ID:
        r->request_id = field->value;
        break;
    case FV_REQUEST_LAYER:
        r->layer = (uint32_t)field->value;
        break;
    case FV_REQUEST_DTYPE:
        r->dtype = (fv_dtype_t)(int32_t)(uint32_t)field->value;
        break;
    case FV_REQUEST_CAUSAL:
        r->causal = field->value != 0;
        break;
    case FV_REQUEST_WANT_LSE:
        r->want_lse = field->value != 0;
        break;
    case FV_REQUEST_ONLY_SLICE:
        r->only_slice = (uint32_t)field->value;
        break;
    default: /* FV_REQUEST_APPEND */
        r->append = field->value != 0;
        break;
    }
    return FV_OK;
}

static fv_status_t request_field(const fv_scan_t *scan,
                                 const fv_scan_field_t *field,
                                 item_sink_t sink,
                                 fv_attend_request_t *r)
{
    switch (field->number) {
    case FV_REQUEST_ITEMS:
        return request_item(scan, field, sink, r);
    case FV_REQUEST_ID:
    case FV_REQUEST_LAYER:
    case FV_REQUEST_DTYPE:
    case FV_REQUEST_CAUSAL:
    case FV_REQUEST_WANT_LSE:
    case FV_REQUEST_APPEND:
    case FV_REQUEST_ONLY_SLICE:
        return request_small(field, r);
    case FV_REQUEST_Q:
        r->q = field->region;
        return fv_scan_expect(field, FV_WIRE_LEN, "q");
    case FV_REQUEST_K:
        r->k = field->region;
        return fv_scan_expect(field, FV_WIRE_LEN, "k");
    case FV_REQUEST_V:
        r->v = field->region;
        return fv_scan_expect(field, FV_WIRE_LEN, "v");
    default:
        return FV_OK;
    }
}

static fv_status_t request_check(const fv_attend_request_t *r, size_t items_cap)
{
    if (!fv_dtype_is_valid((int)r->dtype)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "dtype: given %d, expected DTYPE_F32, DTYPE_F16 or DTYPE_BF16",
                       (int)r->dtype);
    }
    if (r->n_items == 0) {
        return fv_fail(FV_ERR_INVALID_ARG, "items: given 0, expected 1..%zu", items_cap);
    }
    if (r->n_tokens > UINT32_MAX) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "items: given %llu tokens in all, expected at most 4294967295",
                       (unsigned long long)r->n_tokens);
    }
    if (!r->append && (r->k.n_bytes + r->v.n_bytes > 0)) {
        return fv_fail(
            FV_ERR_INVALID_ARG, "%s: given %zu bytes, expected 0 because append is false",
            (r->k.n_bytes > 0) ? "k" : "v", (r->k.n_bytes > 0) ? r->k.n_bytes : r->v.n_bytes);
    }
    return FV_OK;
}

fv_status_t fv_wire_attend_request_scan(const fv_span_t *spans,
                                        size_t n_spans,
                                        fv_attend_request_t *out,
                                        fv_attend_item_t *items,
                                        size_t items_cap)
{
    fv_attend_request_t r = {.causal = true, .append = true};
    item_sink_t sink = {.items = items, .cap = items_cap};
    fv_status_t status = FV_OK;
    fv_scan_field_t field;
    fv_scan_t scan;

    fv_scan_begin(&scan, spans, n_spans);
    while (fv_scan_next(&scan, &field)) {
        if (status == FV_OK) {
            status = request_field(&scan, &field, sink, &r);
        } else if ((field.number == FV_REQUEST_ID) && (field.wire_type == FV_WIRE_VARINT)) {
            r.request_id = field.value;
        }
    }
    if (scan.error !=
        NULL) { /* outranks what was wrong before it: the request_id may be in the part not read */
        status = fv_scan_fail(&scan, "AttendRequest");
    } else if (status == FV_OK) {
        status = request_check(&r, items_cap);
    }
    *out = r;
    return status;
}

static fv_status_t response_status(fv_scan_t scan, fv_attend_response_view_t *out)
{
    char text[FV_ERROR_TEXT_BYTES];
    fv_scan_field_t field;

    while (fv_scan_next(&scan, &field)) {
        if (field.number == FV_STATUS_CODE) {
            FV_RETURN_IF_ERR(fv_scan_expect(&field, FV_WIRE_VARINT, "status.code"));
            out->code = (int32_t)(uint32_t)field.value;
        } else if (field.number == FV_STATUS_MESSAGE) {
            FV_RETURN_IF_ERR(fv_scan_expect(&field, FV_WIRE_LEN, "status.message"));
            size_t n = (field.region.n_bytes < sizeof(text)) ? field.region.n_bytes : sizeof(text);
            fv_scan_read(&scan, text, n);
            (void)fv_utf8_copy(out->message, sizeof(out->message), text, n);
        }
    }
    return (scan.error == NULL) ? FV_OK : fv_scan_fail(&scan, "status");
}

static fv_status_t response_timings(fv_scan_t scan, fv_timings_t *out)
{
    fv_scan_field_t field;

    while (fv_scan_next(&scan, &field)) {
        if ((field.number < FV_TIMINGS_QUEUE) || (field.number > FV_TIMINGS_TOTAL)) {
            continue;
        }
        FV_RETURN_IF_ERR(fv_scan_expect(&field, FV_WIRE_VARINT, "timings"));
        uint32_t us = (uint32_t)field.value;
        if (field.number == FV_TIMINGS_QUEUE) {
            out->queue_us = us;
        } else if (field.number == FV_TIMINGS_COMPUTE) {
            out->compute_us = us;
        } else if (field.number == FV_TIMINGS_EXCHANGE) {
            out->exchange_us = us;
        } else {
            out->total_us = us;
        }
    }
    return (scan.error == NULL) ? FV_OK : fv_scan_fail(&scan, "timings");
}

static fv_status_t
response_field(const fv_scan_t *scan, const fv_scan_field_t *field, fv_attend_response_view_t *v)
{
    switch (field->number) {
    case FV_RESPONSE_ID:
        v->request_id = field->value;
        return fv_scan_expect(field, FV_WIRE_VARINT, "request_id");
    case FV_RESPONSE_STATUS:
        FV_RETURN_IF_ERR(fv_scan_expect(field, FV_WIRE_LEN, "status"));
        return response_status(fv_scan_sub(scan, field), v);
    case FV_RESPONSE_TIMINGS:
        FV_RETURN_IF_ERR(fv_scan_expect(field, FV_WIRE_LEN, "timings"));
        return response_timings(fv_scan_sub(scan, field), &v->timings);
    case FV_RESPONSE_DURABILITY:
        v->durability = (int32_t)field->value;
        return fv_scan_expect(field, FV_WIRE_VARINT, "durability");
    case FV_RESPONSE_LSE:
        v->lse = field->region;
        return fv_scan_expect(field, FV_WIRE_LEN, "lse");
    case FV_RESPONSE_OUT:
        v->out = field->region;
        return fv_scan_expect(field, FV_WIRE_LEN, "out");
    default:
        return FV_OK;
    }
}

fv_status_t
fv_wire_attend_response_scan(const fv_span_t *spans, size_t n_spans, fv_attend_response_view_t *out)
{
    fv_attend_response_view_t v = {0};
    fv_scan_field_t field;
    fv_scan_t scan;

    fv_scan_begin(&scan, spans, n_spans);
    while (fv_scan_next(&scan, &field)) {
        FV_RETURN_IF_ERR(response_field(&scan, &field, &v));
    }
    if (scan.error != NULL) {
        return fv_scan_fail(&scan, "AttendResponse");
    }
    *out = v;
    return FV_OK;
}
