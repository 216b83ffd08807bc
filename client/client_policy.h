/*
 * client_policy.h - fovea_policy_t and fv_policy_t. Private to the library.
 */
#ifndef FV_CLIENT_CLIENT_POLICY_H
#define FV_CLIENT_CLIENT_POLICY_H

#include "client/fovea.h"
#include "common/model.h"

/* All but the layers; presets are spelled out. `index` is for messages. Errors: INVALID_ARGUMENT. */
fovea_code_t fv_client_policy_in(const fovea_policy_t *in,
                                 uint32_t index,
                                 fv_policy_t *out,
                                 fovea_error_t *error);
/* All but the layers. */
fovea_policy_t fv_client_policy_out(const fv_policy_t *in);

#endif /* FV_CLIENT_CLIENT_POLICY_H */
