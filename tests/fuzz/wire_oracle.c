/*
 * wire_oracle.c - see wire_oracle.h.
 */
#include "tests/fuzz/wire_oracle.h"

#include "proto/attention.pb-c.h"
#include "proto/wire_scan.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define ITEMS_CAP 256 /* fewer than the service's, so that the limit is met */

static uint8_t *piece(fv_pieces_t *pieces, const uint8_t *data, size_t n_bytes)
{
    uint8_t *copy = (n_bytes > 0) ? malloc(n_bytes) : NULL;

    if (n_bytes > 0) {
        FV_ASSERT(copy != NULL);
        memcpy(copy, data, n_bytes);
    }
    pieces->memory[pieces->n] = copy;
    pieces->spans[pieces->n++] = (fv_span_t){.data = copy, .n_bytes = n_bytes};
    return copy;
}

fv_pieces_t fv_pieces_cut(const uint8_t *data, size_t n_bytes, const size_t *cuts, size_t n_cuts)
{
    fv_pieces_t pieces = {.spans = calloc(n_cuts + 1U, sizeof(fv_span_t)),
                          .memory = calloc(n_cuts + 1U, sizeof(uint8_t *))};
    size_t at = 0;

    FV_ASSERT((pieces.spans != NULL) && (pieces.memory != NULL));
    for (size_t i = 0; i < n_cuts; i++) {
        size_t n = (cuts[i] < n_bytes - at) ? cuts[i] : (n_bytes - at);

        (void)piece(&pieces, data + at, n);
        at += n;
    }
    (void)piece(&pieces, data + at, n_bytes - at);
    return pieces;
}

void fv_pieces_free(fv_pieces_t *pieces)
{
    for (size_t i = 0; i < pieces->n; i++) {
        free(pieces->memory[i]);
    }
    free(pieces->memory);
    free(pieces->spans);
    *pieces = (fv_pieces_t){0};
}

/* A bytes field of the message equals what protobuf-c has, and gathers to the same bytes. */
static bool same_bytes(fv_pieces_t pieces, fv_region_t region, ProtobufCBinaryData pb)
{
    if (region.n_bytes != pb.len) {
        return false;
    }
    uint8_t *copy = malloc(pb.len + 1U);
    FV_ASSERT(copy != NULL);
    fv_wire_gather(pieces.spans, pieces.n, region, copy);
    bool same = (pb.len == 0) || (memcmp(copy, pb.data, pb.len) == 0);
    free(copy);
    return same;
}

static bool is_bad_item(const Fovea__V1__AttendItem *item)
{
    fv_session_id_t id;

    return !fv_session_id_parse(item->session_id, strlen(item->session_id), &id) ||
           (item->n_tokens == 0) || (item->position > (uint64_t)INT64_MAX - item->n_tokens);
}

static bool is_append(const Fovea__V1__AttendRequest *pb)
{
    return (pb->append_set_case == FOVEA__V1__ATTEND_REQUEST__APPEND_SET__NOT_SET) || pb->append;
}

/* A request that the scanner must refuse for what it means. */
static bool is_bad_request(const Fovea__V1__AttendRequest *pb)
{
    uint64_t n_tokens = 0;

    for (size_t i = 0; i < pb->n_items; i++) {
        if (is_bad_item(pb->items[i])) {
            return true;
        }
        n_tokens += pb->items[i]->n_tokens;
    }
    return (pb->n_items == 0) || (pb->n_items > ITEMS_CAP) || (n_tokens > UINT32_MAX) ||
           !fv_dtype_is_valid((int)pb->dtype) || (!is_append(pb) && (pb->k.len + pb->v.len > 0));
}

static const char *compare_items(const Fovea__V1__AttendRequest *pb, const fv_attend_item_t *items)
{
    char hex[FV_SESSION_ID_CHARS + 1];

    for (size_t i = 0; i < pb->n_items; i++) {
        fv_session_id_format(&items[i].session, hex);
        if ((strcasecmp(hex, pb->items[i]->session_id) != 0) ||
            (items[i].position != pb->items[i]->position) ||
            (items[i].n_tokens != pb->items[i]->n_tokens)) {
            return "an item differs";
        }
    }
    return NULL;
}

static const char *compare_request(const Fovea__V1__AttendRequest *pb,
                                   const fv_attend_request_t *r,
                                   const fv_attend_item_t *items,
                                   fv_pieces_t pieces)
{
    bool is_causal =
        (pb->causal_set_case == FOVEA__V1__ATTEND_REQUEST__CAUSAL_SET__NOT_SET) || pb->causal;

    if ((r->request_id != pb->request_id) || (r->layer != pb->layer) ||
        ((int)r->dtype != (int)pb->dtype)) {
        return "request_id, layer or dtype differs";
    }
    if ((r->causal != is_causal) || (r->append != is_append(pb)) ||
        (r->want_lse != (pb->want_lse != 0)) || (r->only_slice != pb->only_slice)) {
        return "a flag differs";
    }
    if (r->n_items != pb->n_items) {
        return "n_items differs";
    }
    if (!same_bytes(pieces, r->q, pb->q) || !same_bytes(pieces, r->k, pb->k) ||
        !same_bytes(pieces, r->v, pb->v)) {
        return "a tensor differs";
    }
    return compare_items(pb, items);
}

/* Refused for how it is written. (protobuf-c lets some wrong wire types pass, e.g. a string as a bool.) */
static bool is_malformed(void)
{
    return (strstr(fv_error_context(), "malformed") != NULL) ||
           (strstr(fv_error_context(), "wire type") != NULL);
}

/* protobuf-c's strings end at a NUL: an id with a tail behind one looks right to it, and is refused by us. */
static bool may_be_cut(const uint8_t *data, size_t n_bytes)
{
    return (strstr(fv_error_context(), "session_id") != NULL) && (memchr(data, 0, n_bytes) != NULL);
}

const char *
fv_oracle_request(const uint8_t *data, size_t n_bytes, fv_pieces_t pieces, bool is_strict)
{
    static fv_attend_item_t items[ITEMS_CAP];
    fv_attend_request_t r;
    const char *error = NULL;

    memset(items, 0x5a, sizeof(items));
    fv_status_t status = fv_wire_attend_request_scan(pieces.spans, pieces.n, &r, items, ITEMS_CAP);
    Fovea__V1__AttendRequest *pb = fovea__v1__attend_request__unpack(NULL, n_bytes, data);
    if (status == FV_OK) {
        error = (pb == NULL)         ? "accepted what protobuf-c refuses"
                : is_bad_request(pb) ? "accepted a bad request"
                                     : compare_request(pb, &r, items, pieces);
    } else if (status != FV_ERR_INVALID_ARG) {
        error = "a status other than INVALID_ARGUMENT";
    } else if ((pb != NULL) && !is_bad_request(pb) &&
               (is_strict || !(is_malformed() || may_be_cut(data, n_bytes)))) {
        error = fv_error_context();
    } else if ((pb != NULL) && !is_malformed() && (r.request_id != pb->request_id)) {
        error = "the request_id of a bad request differs";
    }
    fovea__v1__attend_request__free_unpacked(pb, NULL);
    return error;
}

/*
 * The bodies of every occurrence of field `number`, end to end: by protobuf's rule that is the merged message.
 * (protobuf-c's own merge of repeated occurrences drops scalars, so it cannot be the judge here.) Owned.
 */
static fv_bytes_t merged_bodies(fv_pieces_t pieces, uint32_t number, size_t n_bytes_max)
{
    fv_bytes_t out = {.data = malloc(n_bytes_max + 1U)};
    fv_scan_field_t field;
    fv_scan_t scan;

    FV_ASSERT(out.data != NULL);
    fv_scan_begin(&scan, pieces.spans, pieces.n);
    while (fv_scan_next(&scan, &field)) {
        if (field.number == number) {
            fv_scan_read(&scan, out.data + out.n_bytes, field.region.n_bytes);
            out.n_bytes += field.region.n_bytes;
        }
    }
    return out;
}

/* The text is not compared: bytes that are not UTF-8 and what does not fit are changed on purpose. */
static bool same_status(fv_pieces_t pieces, size_t n_bytes, const fv_attend_response_view_t *v)
{
    fv_bytes_t body = merged_bodies(pieces, 2, n_bytes);
    Fovea__V1__Status *pb = fovea__v1__status__unpack(NULL, body.n_bytes, body.data);
    bool same = (pb != NULL) && (v->code == pb->code) &&
                ((v->message[0] == '\0') == (pb->message[0] == '\0'));

    fovea__v1__status__free_unpacked(pb, NULL);
    fv_bytes_free(&body);
    return same;
}

static bool same_timings(fv_pieces_t pieces, size_t n_bytes, const fv_timings_t *t)
{
    fv_bytes_t body = merged_bodies(pieces, 3, n_bytes);
    Fovea__V1__Timings *pb = fovea__v1__timings__unpack(NULL, body.n_bytes, body.data);
    bool same = (pb != NULL) && (pb->queue_us == t->queue_us) &&
                (pb->compute_us == t->compute_us) && (pb->exchange_us == t->exchange_us) &&
                (pb->total_us == t->total_us);

    fovea__v1__timings__free_unpacked(pb, NULL);
    fv_bytes_free(&body);
    return same;
}

const char *fv_oracle_response(const uint8_t *data, size_t n_bytes, fv_pieces_t pieces)
{
    fv_attend_response_view_t v;
    const char *error = NULL;
    fv_status_t status = fv_wire_attend_response_scan(pieces.spans, pieces.n, &v);
    Fovea__V1__AttendResponse *pb = fovea__v1__attend_response__unpack(NULL, n_bytes, data);

    if (status != FV_OK) {
        error = ((pb != NULL) && !is_malformed()) ? fv_error_context() : NULL;
    } else if (pb == NULL) {
        error = "accepted what protobuf-c refuses";
    } else if (v.request_id != pb->request_id) {
        error = "request_id differs";
    } else if (!same_bytes(pieces, v.lse, pb->lse) || !same_bytes(pieces, v.out, pb->out)) {
        error = "a tensor differs";
    } else if (!same_status(pieces, n_bytes, &v) || !same_timings(pieces, n_bytes, &v.timings)) {
        error = "status or timings differ";
    }
    fovea__v1__attend_response__free_unpacked(pb, NULL);
    return error;
}
