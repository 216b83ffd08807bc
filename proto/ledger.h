/*
 * ledger.h - what the coordinator's journal says (coord/ledger.h); also read by `fovea store`.
 *
 * Records of a session carry its slot as key, and numbers from one of its own on (proto/session_id.h). Bodies are plain data; texts end with NUL, unused bytes are 0.
 */
#ifndef FV_PROTO_LEDGER_H
#define FV_PROTO_LEDGER_H

#include "proto/placement.h"
#include "proto/wire.h"

#include <stdint.h>

#define FV_LEDGER_MODEL_KEY    0x80000000U /* and the model's slot */
#define FV_LEDGER_REASON_BYTES 192
#define FV_LEDGER_OWNER_BYTES  64

enum {
    FV_LEDGER_MODEL = 1, /* first; fv_ledger_model_t */
    FV_LEDGER_OPEN,      /* first; fv_ledger_session_t */
    FV_LEDGER_FORK,      /* first; fv_ledger_session_t: as its parent is then, up to at_position */
    FV_LEDGER_APPEND,    /* fv_ledger_append_t: acknowledged */
    FV_LEDGER_TRUNCATE,  /* fv_ledger_truncate_t */
    FV_LEDGER_CLOSE,     /* no body */
    FV_LEDGER_LAYER, /* fv_ledger_layer_t, then n_records of {uint64_t position; uint32_t n_tokens, digest} */
};

typedef struct fv_ledger_model {
    fv_model_spec_t spec;
    char owner[FV_LEDGER_OWNER_BYTES]; /* whose quota it counts for; "" = nobody's */
} fv_ledger_model_t;

typedef struct fv_ledger_session {
    fv_session_id_t id, parent;
    uint8_t has_parent, is_forked, closes_with_stream, reserved;
    uint32_t model_slot;
    uint64_t created_unix_ms, opened_seq;
    uint32_t parent_slot, reserved2; /* FORK */
    uint64_t at_position;            /* FORK */
    fv_placement_t placement;
    char reason[FV_LEDGER_REASON_BYTES]; /* of the placement */
    char owner[FV_LEDGER_OWNER_BYTES];   /* "" = nobody's */
} fv_ledger_session_t;

typedef struct fv_ledger_append {
    uint64_t position;
    uint32_t n_tokens;
    uint32_t digest; /* crc32c of K, then V, as received */
    uint32_t layer;
    uint32_t reserved;
} fv_ledger_append_t;

typedef struct fv_ledger_truncate {
    uint64_t position;
} fv_ledger_truncate_t;

typedef struct fv_ledger_layer {
    uint64_t n_tokens, floor;
    uint32_t layer, n_records;
} fv_ledger_layer_t;

#endif /* FV_PROTO_LEDGER_H */
