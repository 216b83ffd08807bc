/*
 * wire.h - bytes <-> checked C structs, for server and client alike.
 *
 * Decode path: station 2 of 10. Before: coord/rpc_event.c. After: coord/engine_inbox.c.
 *
 * proto/ is the only user of protobuf-c's generated code. Two ways through it:
 *  - Attend messages carry tensors and are hot: they are scanned in place over the slices gRPC
 *    received (wire_attend.c). The scan copies the small fields and reports where each tensor lies;
 *    fv_wire_gather() then makes the one copy into aligned memory. Responses are encoded as small
 *    heads around the tensors, which are never copied.
 *  - Every other message is small and goes through protobuf-c (wire_control.c).
 *
 * Wire rules kept by the scanner: fields in any order, last occurrence of a scalar or bytes field
 * wins, unknown fields skipped, varints of at most 10 bytes, every length checked against what is
 * left, groups rejected, anything truncated rejected, a field may straddle slices anywhere.
 *
 * Decoders: FV_ERR_INVALID_ARG with the field's name, what was given and what was expected; `out` is
 * meaningful only on FV_OK. They check what can be checked without knowing the service's state.
 * Thread: any; no shared state.
 */
#ifndef FV_PROTO_WIRE_H
#define FV_PROTO_WIRE_H

#include "common/model.h"
#include "common/status.h"
#include "proto/session_id.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FV_ITEMS_MAX        4096 /* items of one AttendRequest */
#define FV_SESSION_ID_CHARS 32   /* hex digits */

/* One piece of a message as received (or to be sent). Borrowed memory. */
typedef struct fv_span {
    const uint8_t *data;
    size_t n_bytes;
} fv_span_t;

/* An owned byte string; fv_bytes_free() releases it. */
typedef struct fv_bytes {
    uint8_t *data;
    size_t n_bytes;
} fv_bytes_t;

void fv_bytes_free(fv_bytes_t *bytes); /* NULL data is fine; leaves it empty */

bool fv_session_id_parse(const char *hex, size_t n_chars, fv_session_id_t *out);
void fv_session_id_format(const fv_session_id_t *id, char out[FV_SESSION_ID_CHARS + 1]);

/* ------------------------------------------------------------------ Attend (hot) */

typedef struct fv_attend_item {
    fv_session_id_t session;
    uint64_t position; /* of the first token */
    uint32_t n_tokens; /* >= 1, checked */
    uint32_t reserved;
} fv_attend_item_t;

/* Where a bytes field lies inside the message: [offset, offset + n_bytes). */
typedef struct fv_region {
    size_t offset;
    size_t n_bytes;
} fv_region_t;

typedef struct fv_attend_request {
    uint64_t request_id;
    uint32_t layer;
    fv_dtype_t dtype; /* valid, checked */
    bool causal;      /* absent = true */
    bool want_lse;
    bool append;         /* absent = true */
    uint32_t only_slice; /* LATENT: 1 + the slice that is answered; 0: all */
    uint32_t n_items;    /* 1..FV_ITEMS_MAX, checked */
    uint64_t n_tokens;   /* T = sum over items; fits 32 bits, checked */
    fv_region_t q, k, v;
} fv_attend_request_t;

/*
 * Scans one AttendRequest spread over `n_spans` pieces. Copies the items into `items` (room for
 * `items_cap` <= FV_ITEMS_MAX). Tensor sizes are NOT checked against a model here. On failure
 * `out->request_id` still holds the id if one was read (0 if not), so that the error can be answered.
 * Cost: O(fields + spans); touches no tensor byte. Allocates nothing.
 */
FV_MUST_CHECK fv_status_t fv_wire_attend_request_scan(const fv_span_t *spans,
                                                      size_t n_spans,
                                                      fv_attend_request_t *out,
                                                      fv_attend_item_t *items,
                                                      size_t items_cap);

/* Copies region [offset, offset + n_bytes) of the spans to `dst`. The region must lie inside. */
void fv_wire_gather(const fv_span_t *spans, size_t n_spans, fv_region_t region, void *dst);

typedef struct fv_timings {
    uint32_t queue_us, compute_us, exchange_us, total_us;
} fv_timings_t;

typedef struct fv_attend_response {
    uint64_t request_id;
    int32_t code;        /* gRPC status code; 0 = OK */
    const char *message; /* may be NULL; borrowed */
    fv_timings_t timings;
    int32_t durability; /* as in attention.proto */
    size_t lse_bytes;   /* 0 = no lse field */
    size_t out_bytes;   /* 0 = no out field */
} fv_attend_response_t;

#define FV_WIRE_HEAD_BYTES 640 /* enough for any head below */

/*
 * Encodes everything of an AttendResponse but its tensors. The message is the concatenation
 *   head[0 .. *n_before_lse)  lse bytes  head[*n_before_lse .. *n_head)  out bytes
 * Returns nothing to free. Thread: any.
 */
void fv_wire_attend_response_encode(const fv_attend_response_t *response,
                                    uint8_t head[FV_WIRE_HEAD_BYTES],
                                    size_t *n_before_lse,
                                    size_t *n_head);

/*
 * Client side of the same: scans an AttendResponse. `message` is copied, cut to fit.
 */
typedef struct fv_attend_response_view {
    uint64_t request_id;
    int32_t code;
    char message[FV_ERROR_TEXT_BYTES];
    fv_timings_t timings;
    int32_t durability;
    fv_region_t lse, out;
} fv_attend_response_view_t;

FV_MUST_CHECK fv_status_t fv_wire_attend_response_scan(const fv_span_t *spans,
                                                       size_t n_spans,
                                                       fv_attend_response_view_t *out);

/*
 * Client side: encodes an AttendRequest's small fields (the regions of `request` are ignored). The
 * message is  head, q_head, q bytes, k_head, k bytes, v_head, v bytes;  a tensor of 0 bytes has
 * neither head nor bytes. `out_head` is owned by the caller.
 */
typedef struct fv_wire_tensor_heads {
    uint8_t q[16], k[16], v[16];
    size_t n_q, n_k, n_v;
} fv_wire_tensor_heads_t;

FV_MUST_CHECK fv_status_t fv_wire_attend_request_encode(const fv_attend_request_t *request,
                                                        const fv_attend_item_t *items,
                                                        size_t q_bytes,
                                                        size_t k_bytes,
                                                        size_t v_bytes,
                                                        fv_bytes_t *out_head,
                                                        fv_wire_tensor_heads_t *out_tensors);

/* ------------------------------------------------------------------ small messages */
/*
 * For each message M: fv_wire_M_decode(span, &out) and fv_wire_M_encode(&in, &bytes). Strings in
 * decoded structs are fixed arrays, lists are owned and released by the matching _free.
 */

typedef struct fv_register_response {
    char model_id[FV_MODEL_ID_BYTES];
    uint32_t n_warnings;
    char warnings[4][FV_ERROR_TEXT_BYTES];
} fv_register_response_t;

typedef struct fv_open_request {
    char model_id[FV_MODEL_ID_BYTES];
    uint64_t max_tokens_hint;
    fv_sharding_t sharding; /* is_set = 0: use the model's */
    bool close_with_stream;
} fv_open_request_t;

/* Fork, Truncate, Close, GetSession, GetPlacement requests. */
typedef struct fv_session_request {
    fv_session_id_t session;
    uint64_t position; /* Fork, Truncate */
    bool has_position; /* Fork: false = everything */
} fv_session_request_t;

typedef struct fv_session_info {
    fv_session_id_t session;
    char model_id[FV_MODEL_ID_BYTES];
    uint32_t n_layers;
    uint64_t *layer_tokens; /* [n_layers], owned */
    uint64_t max_tokens;
    uint64_t kv_bytes;
    uint64_t created_unix_ms;
    fv_session_id_t parent;
    bool has_parent;
    int32_t durability;
} fv_session_info_t;

typedef struct fv_list_request {
    uint32_t page_size; /* 0 (= 100) or at most 1000, checked */
    char page_token[64];
    char model_id[FV_MODEL_ID_BYTES];
} fv_list_request_t;

typedef struct fv_list_response {
    uint32_t n_sessions;
    fv_session_info_t *sessions; /* owned */
    char next_page_token[64];
    uint64_t n_total;
} fv_list_response_t;

typedef struct fv_rank_status {
    uint32_t rank;
    char host[64], backend[16], device[96], state[16];
    uint32_t threads;
    uint64_t kv_bytes_total, kv_bytes_free, n_steps, busy_us;
} fv_rank_status_t;

typedef struct fv_cluster_status {
    char version[32], state[16], exchange[16];
    int32_t durability;
    uint64_t epoch, uptime_ms;
    uint32_t n_ranks;
    fv_rank_status_t *ranks; /* owned */
    uint32_t n_listen;
    char listen[8][128];
    uint64_t n_models, n_sessions, n_requests_queued, n_requests_running, n_requests_done,
        n_requests_failed, n_steps, n_tokens_appended, kv_bytes_total, kv_bytes_free;
} fv_cluster_status_t;

#define FV_SHARE_RANGES_MAX 64
typedef struct fv_token_range {
    uint64_t begin, end;
} fv_token_range_t;

typedef struct fv_placement_share {
    uint32_t rank, kv_head_begin, kv_head_end, q_head_begin, q_head_end;
    uint32_t latent_begin, latent_end; /* LATENT: dims of the latent; else 0, 0 */
    uint32_t n_ranges;
    fv_token_range_t ranges[FV_SHARE_RANGES_MAX];
    uint64_t n_tokens, kv_bytes, freed_bytes;
    bool truncated;
} fv_placement_share_t;

/* What the layers of one policy hold. policy.n_heads is left to the reader: it follows from the heads below. */
typedef struct fv_placement_pattern {
    fv_policy_t policy;
    uint32_t n_layers;
    uint32_t layers[FV_LAYERS_MAX];
    uint64_t n_tokens, floor, kv_bytes, freed_bytes;
} fv_placement_pattern_t;

typedef struct fv_placement_info {
    fv_session_id_t session;
    char model_id[FV_MODEL_ID_BYTES];
    char mode[32], reason[FV_ERROR_TEXT_BYTES];
    uint32_t n_head_parts, n_ctx_parts, shard_tokens;
    uint32_t n_latent_parts; /* slices; 1 unless sharded by latent */
    bool is_approximate;     /* a softmax for each slice: not what the model computes */
    uint64_t n_tokens;
    uint32_t n_shares;
    fv_placement_share_t *shares; /* owned */
    uint32_t n_q_heads, n_kv_heads;
    uint32_t n_patterns;
    fv_placement_pattern_t *patterns; /* owned */
} fv_placement_info_t;

typedef struct fv_drain_response {
    uint64_t n_sessions, n_requests_finished;
} fv_drain_response_t;

#define FV_WIRE_PAIR(name, type)                                                             \
    FV_MUST_CHECK fv_status_t fv_wire_##name##_decode(fv_span_t in, type *out); /* NOLINT */ \
    FV_MUST_CHECK fv_status_t fv_wire_##name##_encode(const type *in, fv_bytes_t *out);

FV_WIRE_PAIR(register_request, fv_model_spec_t) /* decode: not yet fv_model_spec_check()ed */
FV_WIRE_PAIR(register_response, fv_register_response_t)
FV_WIRE_PAIR(open_request, fv_open_request_t)
FV_WIRE_PAIR(open_response, fv_session_id_t)
FV_WIRE_PAIR(fork_request, fv_session_request_t)
FV_WIRE_PAIR(fork_response, fv_session_id_t)
FV_WIRE_PAIR(truncate_request, fv_session_request_t)
FV_WIRE_PAIR(close_request, fv_session_request_t)
FV_WIRE_PAIR(get_request, fv_session_request_t)
FV_WIRE_PAIR(session_info, fv_session_info_t)
FV_WIRE_PAIR(list_request, fv_list_request_t)
FV_WIRE_PAIR(list_response, fv_list_response_t)
FV_WIRE_PAIR(cluster_status, fv_cluster_status_t)
FV_WIRE_PAIR(placement_request, fv_session_request_t)
FV_WIRE_PAIR(placement, fv_placement_info_t)
FV_WIRE_PAIR(watch_request, uint32_t) /* interval_ms: 0 (= 1000) or at least 50, checked */
FV_WIRE_PAIR(drain_request, uint32_t) /* timeout_ms; 0 = the server's */
FV_WIRE_PAIR(drain_response, fv_drain_response_t)
/* TruncateSessionResponse, CloseSessionResponse and GetStatusRequest have no fields: 0 bytes. */

void fv_session_info_free(fv_session_info_t *info);
void fv_list_response_free(fv_list_response_t *response);
void fv_cluster_status_free(fv_cluster_status_t *status);
void fv_placement_info_free(fv_placement_info_t *placement);

#endif /* FV_PROTO_WIRE_H */
