/*
 * client_session.c - models and sessions: fovea_ structs to and from those of the wire.
 */
#include "client/client_internal.h"
#include "client/client_policy.h"

#include <stdio.h>
#include <stdlib.h>

#define METHOD(name) FV_METHOD_PATH("Attention", name)

FV_CLIENT_DECODER(register_response, fv_register_response_t)
FV_CLIENT_DECODER(open_response, fv_session_id_t)
FV_CLIENT_DECODER(fork_response, fv_session_id_t)
FV_CLIENT_DECODER(session_info, fv_session_info_t)
FV_CLIENT_DECODER(list_response, fv_list_response_t)

/* ------------------------------------------------------------------ models */

/* Copies a string that must fit with its NUL; NULL is "". */
static fovea_code_t
copy_text(const char *field, const char *text, char *out, size_t out_bytes, fovea_error_t *error)
{
    size_t n_bytes = (text == NULL) ? 0 : strlen(text);

    if (n_bytes >= out_bytes) {
        return fv_client_fail(error, FOVEA_INVALID_ARGUMENT,
                              "%s: given %zu bytes, expected at most %zu", field, n_bytes,
                              out_bytes - 1);
    }
    memcpy(out, (text == NULL) ? "" : text, n_bytes + 1);
    return FOVEA_OK;
}

/* As many as there are slices, and as fit: other counts the service refuses by name. */
static int32_t copy_factors(const float *from, uint32_t groups, float to[FV_GROUPS_MAX])
{
    uint32_t n = (groups > FV_GROUPS_MAX) ? FV_GROUPS_MAX : groups;

    if (from == NULL) {
        return 0;
    }
    memcpy(to, from, n * sizeof(*from));
    return (int32_t)n;
}

static fv_sharding_t sharding_of(const fovea_sharding_t *sharding)
{
    fv_sharding_t out = {.mode = (int32_t)sharding->mode,
                         .shard_tokens = fv_client_i32(sharding->shard_tokens),
                         .max_ranks = fv_client_i32(sharding->max_ranks),
                         .groups = fv_client_i32(sharding->groups),
                         .exact = sharding->exact ? 1 : 0,
                         .is_set = 1};

    out.n_mu = copy_factors(sharding->mu, sharding->groups, out.mu);
    return out;
}

static fv_latent_norm_t norm_of(const fovea_model_spec_t *spec)
{
    uint32_t groups = (spec->sharding.groups > 0) ? spec->sharding.groups : 1U;
    fv_latent_norm_t out = {0};

    if (spec->norm_slices) {
        out.mode = FV_NORM_SLICE_RMS;
        out.eps = spec->norm_eps;
        out.n_alpha = copy_factors(spec->norm_alpha, groups, out.alpha);
    }
    return out;
}

/* Policy i of the caller becomes policies[i + 1] and is written over the layers it names. */
static fovea_code_t
set_policy(fv_model_spec_t *out, const fovea_policy_t *policy, uint32_t i, fovea_error_t *error)
{
    fovea_code_t code = fv_client_policy_in(policy, i, &out->policies[i + 1], error);

    if (code != FOVEA_OK) {
        return code;
    }
    if (policy->n_layers == 0) {
        memset(out->layer_policy, (int)(i + 1), (size_t)out->n_layers);
        return FOVEA_OK;
    }
    if (policy->layers == NULL) {
        return fv_client_null(error, "spec.policies.layers");
    }
    for (uint32_t j = 0; j < policy->n_layers; j++) {
        if (policy->layers[j] >= (uint32_t)out->n_layers) {
            return fv_client_fail(error, FOVEA_INVALID_ARGUMENT,
                                  "spec.policies[%u].layers[%u]: given %u, expected less than "
                                  "n_layers (%d)",
                                  i, j, policy->layers[j], out->n_layers);
        }
        out->layer_policy[policy->layers[j]] = (uint8_t)(i + 1);
    }
    return FOVEA_OK;
}

static fovea_code_t
spec_of(const fovea_model_spec_t *spec, fv_model_spec_t *out, fovea_error_t *error)
{
    fovea_code_t code = copy_text("spec.name", spec->name, out->name, sizeof(out->name), error);

    if (code != FOVEA_OK) {
        return code;
    }
    if (spec->n_policies > FOVEA_POLICIES_MAX) {
        return fv_client_fail(error, FOVEA_INVALID_ARGUMENT,
                              "spec.n_policies: given %u, expected at most %d", spec->n_policies,
                              FOVEA_POLICIES_MAX);
    }
    if ((spec->n_policies > 0) && (spec->policies == NULL)) {
        return fv_client_null(error, "spec.policies");
    }
    if ((spec->n_layers == 0) || (spec->n_layers > FV_LAYERS_MAX)) {
        return fv_client_fail(error, FOVEA_INVALID_ARGUMENT,
                              "spec.n_layers: given %u, expected 1..%d", spec->n_layers,
                              FV_LAYERS_MAX);
    }
    out->n_layers = (int32_t)spec->n_layers;
    out->n_q_heads = fv_client_i32(spec->n_q_heads);
    out->n_kv_heads = fv_client_i32(spec->n_kv_heads);
    out->head_dim_qk = fv_client_i32(spec->head_dim_qk);
    out->head_dim_v = fv_client_i32(spec->head_dim_v);
    out->kv_dtype = (int32_t)spec->kv_dtype;
    out->softmax_scale = spec->softmax_scale;
    out->logit_softcap = spec->logit_softcap;
    out->kind = (int32_t)spec->kind;
    out->latent_dim = fv_client_i32(spec->latent_dim);
    out->rope_dim = fv_client_i32(spec->rope_dim);
    out->latent_norm = norm_of(spec);
    out->n_policies = (int32_t)spec->n_policies + 1; /* [0] is dense */
    out->sharding = sharding_of(&spec->sharding);
    for (uint32_t i = 0; (i < spec->n_policies) && (code == FOVEA_OK); i++) {
        code = set_policy(out, &spec->policies[i], i, error);
    }
    return code;
}

fovea_code_t fovea_register_model(fovea_client_t *client,
                                  const fovea_model_spec_t *spec,
                                  int64_t timeout_ms,
                                  fovea_model_t *out,
                                  fovea_error_t *error)
{
    fv_model_spec_t wire = {0};
    fv_register_response_t response = {0};
    fv_bytes_t request = {0};
    fovea_code_t code = FOVEA_OK;

    if ((client == NULL) || (spec == NULL) || (out == NULL)) {
        return fv_client_null(error, "client, spec or out");
    }
    code = spec_of(spec, &wire, error);
    if (code != FOVEA_OK) {
        return code;
    }
    fv_status_t status = fv_wire_register_request_encode(&wire, &request);
    code = fv_client_call(client,
                          &(fv_client_call_t){.method = METHOD("RegisterModel"),
                                              .encoded = status,
                                              .request = &request,
                                              .timeout_ms = timeout_ms,
                                              .decode = decode_register_response,
                                              .out = &response},
                          error);
    if (code != FOVEA_OK) {
        return code;
    }
    memset(out, 0, sizeof(*out));
    memcpy(out->model_id, response.model_id, sizeof(out->model_id));
    out->n_warnings = response.n_warnings;
    for (uint32_t i = 0; i < response.n_warnings; i++) {
        memcpy(out->warnings[i], response.warnings[i], sizeof(out->warnings[i]));
    }
    return FOVEA_OK;
}

/* ------------------------------------------------------------------ sessions */

fovea_code_t fovea_open_session(fovea_client_t *client,
                                const char *model_id,
                                const fovea_session_options_t *options,
                                int64_t timeout_ms,
                                fovea_session_id_t *out,
                                fovea_error_t *error)
{
    fv_open_request_t wire = {0};
    fv_session_id_t session;
    fv_bytes_t request = {0};
    fovea_code_t code = FOVEA_OK;

    if ((client == NULL) || (model_id == NULL) || (out == NULL)) {
        return fv_client_null(error, "client, model_id or out");
    }
    code = copy_text("model_id", model_id, wire.model_id, sizeof(wire.model_id), error);
    if (code != FOVEA_OK) {
        return code;
    }
    if (options != NULL) {
        wire.max_tokens_hint = options->max_tokens_hint;
        wire.close_with_stream = options->close_with_stream;
        if (options->sharding != NULL) {
            wire.sharding = sharding_of(options->sharding);
        }
    }
    fv_status_t status = fv_wire_open_request_encode(&wire, &request);
    code = fv_client_call(client,
                          &(fv_client_call_t){.method = METHOD("OpenSession"),
                                              .encoded = status,
                                              .request = &request,
                                              .timeout_ms = timeout_ms,
                                              .is_once = true,
                                              .decode = decode_open_response,
                                              .out = &session},
                          error);
    if (code == FOVEA_OK) {
        *out = fv_client_session_out(&session);
    }
    return code;
}

fovea_code_t fovea_fork_session(fovea_client_t *client,
                                const fovea_session_id_t *session,
                                uint64_t at_position,
                                int64_t timeout_ms,
                                fovea_session_id_t *out,
                                fovea_error_t *error)
{
    fv_session_id_t forked;
    fv_bytes_t request = {0};
    fovea_code_t code = FOVEA_OK;

    if ((client == NULL) || (session == NULL) || (out == NULL)) {
        return fv_client_null(error, "client, session or out");
    }
    fv_session_request_t wire = {.session = fv_client_session(session),
                                 .has_position = at_position != FOVEA_WHOLE,
                                 .position = (at_position != FOVEA_WHOLE) ? at_position : 0};
    fv_status_t status = fv_wire_fork_request_encode(&wire, &request);
    code = fv_client_call(client,
                          &(fv_client_call_t){.method = METHOD("ForkSession"),
                                              .encoded = status,
                                              .request = &request,
                                              .timeout_ms = timeout_ms,
                                              .is_once = true,
                                              .decode = decode_fork_response,
                                              .out = &forked},
                          error);
    if (code == FOVEA_OK) {
        *out = fv_client_session_out(&forked);
    }
    return code;
}

/*
 * Whether a truncate whose answer was lost has been done. If not, it is the caller's to repeat: what is longer than `position`
 * may have been appended, and acknowledged, after it.
 */
static bool is_cut(fovea_client_t *client,
                   const fovea_session_id_t *session,
                   uint64_t position,
                   int64_t timeout_ms)
{
    fovea_session_info_t info = {0};
    fovea_error_t error;
    uint64_t longest = 0;
    bool is_known = fovea_get_session(client, session, timeout_ms, &info, &error) == FOVEA_OK;

    for (uint32_t i = 0; i < info.n_layers; i++) {
        longest = (info.layer_tokens[i] > longest) ? info.layer_tokens[i] : longest;
    }
    fovea_session_info_free(&info);
    return is_known && (longest == position);
}

fovea_code_t fovea_truncate_session(fovea_client_t *client,
                                    const fovea_session_id_t *session,
                                    uint64_t position,
                                    int64_t timeout_ms,
                                    fovea_error_t *error)
{
    fv_bytes_t request = {0};

    if ((client == NULL) || (session == NULL)) {
        return fv_client_null(error, "client or session");
    }
    fv_session_request_t wire = {
        .session = fv_client_session(session), .position = position, .has_position = true};
    fv_status_t status = fv_wire_truncate_request_encode(&wire, &request);
    fovea_code_t code = fv_client_call(client,
                                       &(fv_client_call_t){.method = METHOD("TruncateSession"),
                                                           .encoded = status,
                                                           .request = &request,
                                                           .timeout_ms = timeout_ms,
                                                           .is_once = true},
                                       error);
    if ((code == FOVEA_UNAVAILABLE) && (client->retry_ms > 0) &&
        is_cut(client, session, position, timeout_ms)) {
        code = FOVEA_OK;
    }
    return code;
}

fovea_code_t fovea_close_session(fovea_client_t *client,
                                 const fovea_session_id_t *session,
                                 int64_t timeout_ms,
                                 fovea_error_t *error)
{
    fv_bytes_t request = {0};

    if ((client == NULL) || (session == NULL)) {
        return fv_client_null(error, "client or session");
    }
    fv_session_request_t wire = {.session = fv_client_session(session)};
    fv_status_t status = fv_wire_close_request_encode(&wire, &request);
    return fv_client_call(client,
                          &(fv_client_call_t){.method = METHOD("CloseSession"),
                                              .encoded = status,
                                              .request = &request,
                                              .timeout_ms = timeout_ms,
                                              .may_be_done = true},
                          error);
}

/* Moves the list of layers over: `wire` no longer owns it. */
static void take_info(fv_session_info_t *wire, fovea_session_info_t *out)
{
    memset(out, 0, sizeof(*out));
    out->session = fv_client_session_out(&wire->session);
    memcpy(out->model_id, wire->model_id, sizeof(out->model_id));
    out->n_layers = wire->n_layers;
    out->layer_tokens = wire->layer_tokens;
    wire->layer_tokens = NULL;
    out->max_tokens = wire->max_tokens;
    out->kv_bytes = wire->kv_bytes;
    out->created_unix_ms = wire->created_unix_ms;
    out->has_parent = wire->has_parent;
    out->parent = fv_client_session_out(&wire->parent);
}

fovea_code_t fovea_get_session(fovea_client_t *client,
                               const fovea_session_id_t *session,
                               int64_t timeout_ms,
                               fovea_session_info_t *out,
                               fovea_error_t *error)
{
    fv_session_info_t info = {0};
    fv_bytes_t request = {0};
    fovea_code_t code = FOVEA_OK;

    if ((client == NULL) || (session == NULL) || (out == NULL)) {
        return fv_client_null(error, "client, session or out");
    }
    fv_session_request_t wire = {.session = fv_client_session(session)};
    fv_status_t status = fv_wire_get_request_encode(&wire, &request);
    code = fv_client_call(client,
                          &(fv_client_call_t){.method = METHOD("GetSession"),
                                              .encoded = status,
                                              .request = &request,
                                              .timeout_ms = timeout_ms,
                                              .decode = decode_session_info,
                                              .out = &info},
                          error);
    if (code == FOVEA_OK) {
        take_info(&info, out);
        fv_session_info_free(&info);
    }
    return code;
}

void fovea_session_info_free(fovea_session_info_t *info)
{
    if (info != NULL) {
        free(info->layer_tokens);
        info->layer_tokens = NULL;
        info->n_layers = 0;
    }
}

static fovea_code_t
take_list(fv_list_response_t *wire, fovea_session_list_t *out, fovea_error_t *error)
{
    fovea_session_info_t *sessions = NULL;

    if (wire->n_sessions > 0) {
        sessions = calloc(wire->n_sessions, sizeof(*sessions));
        if (sessions == NULL) {
            return fv_client_fail(error, FOVEA_RESOURCE_EXHAUSTED, "out of host memory");
        }
    }
    memset(out, 0, sizeof(*out));
    for (uint32_t i = 0; i < wire->n_sessions; i++) {
        take_info(&wire->sessions[i], &sessions[i]);
    }
    out->sessions = sessions;
    out->n_sessions = wire->n_sessions;
    out->n_total = wire->n_total;
    memcpy(out->next_page_token, wire->next_page_token, sizeof(out->next_page_token));
    return FOVEA_OK;
}

fovea_code_t fovea_list_sessions(fovea_client_t *client,
                                 const fovea_list_options_t *options,
                                 int64_t timeout_ms,
                                 fovea_session_list_t *out,
                                 fovea_error_t *error)
{
    fv_list_request_t wire = {0};
    fv_list_response_t response = {0};
    fv_bytes_t request = {0};
    fovea_code_t code = FOVEA_OK;

    if ((client == NULL) || (out == NULL)) {
        return fv_client_null(error, "client or out");
    }
    if (options != NULL) {
        wire.page_size = options->page_size;
        code = copy_text("page_token", options->page_token, wire.page_token,
                         sizeof(wire.page_token), error);
        if (code == FOVEA_OK) {
            code = copy_text("model_id", options->model_id, wire.model_id, sizeof(wire.model_id),
                             error);
        }
        if (code != FOVEA_OK) {
            return code;
        }
    }
    fv_status_t status = fv_wire_list_request_encode(&wire, &request);
    code = fv_client_call(client,
                          &(fv_client_call_t){.method = METHOD("ListSessions"),
                                              .encoded = status,
                                              .request = &request,
                                              .timeout_ms = timeout_ms,
                                              .decode = decode_list_response,
                                              .out = &response},
                          error);
    if (code == FOVEA_OK) {
        code = take_list(&response, out, error);
        fv_list_response_free(&response);
    }
    return code;
}

void fovea_session_list_free(fovea_session_list_t *list)
{
    if (list == NULL) {
        return;
    }
    for (uint32_t i = 0; i < list->n_sessions; i++) {
        fovea_session_info_free(&list->sessions[i]);
    }
    free(list->sessions);
    list->sessions = NULL;
    list->n_sessions = 0;
}
