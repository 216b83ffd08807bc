/*
 * wire_policy.h - one LayerPolicy message and one fv_policy_t. Private to proto/.
 */
#ifndef FV_PROTO_WIRE_POLICY_H
#define FV_PROTO_WIRE_POLICY_H

#include "common/model.h"
#include "proto/attention.pb-c.h"

/* Where the message of the policy's kind lies while the LayerPolicy is packed. */
typedef union fv_wire_policy {
    Fovea__V1__Window window;
    Fovea__V1__S2 s2;
    Fovea__V1__Dense dense;
} fv_wire_policy_t;

/* `index` is for messages. Presets are spelled out here. Errors: FV_ERR_INVALID_ARG naming the field. */
FV_MUST_CHECK fv_status_t fv_wire_policy_decode(const Fovea__V1__LayerPolicy *in,
                                                size_t index,
                                                fv_policy_t *out);
/* Sets out's policy, not its layers. */
void fv_wire_policy_encode(const fv_policy_t *in,
                           fv_wire_policy_t *memory,
                           Fovea__V1__LayerPolicy *out);

#endif /* FV_PROTO_WIRE_POLICY_H */
