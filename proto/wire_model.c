/*
 * wire_model.c - RegisterModel and OpenSession: model specs, policies and sharding.
 *
 * The decoded spec is all zero bytes where nothing was given, because specs are compared as bytes.
 * Ranges that fv_model_spec_check() knows are left to it; here is only what the flat struct cannot hold.
 */
#include "proto/wire_message.h"
#include "proto/wire_policy.h"
#include "proto/wire_text.h"

#include <string.h>

#define KINDS_MAX 2 /* values of ModelSpec.Kind */
#define MODES_MAX 4 /* values of Sharding.Mode */

/* protobuf-c's structs have float * where numbers are only read. */
static float *borrow_floats(const float *numbers)
{
    union {
        const float *in;
        float *out;
    } u = {.in = numbers};

    return u.out;
}

/* One factor for each slice of a latent. Fewer than `max` are left zero. */
static fv_status_t factors_decode(const char *field,
                                  const float *given,
                                  size_t n,
                                  float out[FV_GROUPS_MAX],
                                  int32_t *out_n)
{
    FV_RETURN_IF_ERR(fv_message_count(field, n, FV_GROUPS_MAX));
    for (size_t i = 0; i < n; i++) {
        out[i] = given[i];
    }
    *out_n = (int32_t)n;
    return FV_OK;
}

static fv_status_t sharding_decode(const Fovea__V1__Sharding *in, fv_sharding_t *out)
{
    if (((int)in->mode < 0) || ((int)in->mode >= MODES_MAX)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "sharding.mode: given %d, expected AUTO, HEADS, CONTEXT or LATENT",
                       (int)in->mode);
    }
    if (((int)in->mode != FV_SHARDING_LATENT) &&
        ((in->groups != 0) || (in->n_alpha != 0) || (in->n_mu != 0) || (in->exact != 0))) {
        return fv_fail(
            FV_ERR_INVALID_ARG,
            "sharding.groups, alpha, mu, exact: given with mode %d, expected none unless LATENT",
            (int)in->mode);
    }
    out->mode = (int32_t)in->mode;
    out->exact = (in->exact != 0) ? 1 : 0;
    FV_RETURN_IF_ERR(fv_message_int32("sharding.groups", in->groups, &out->groups));
    FV_RETURN_IF_ERR(
        factors_decode("sharding.alpha", in->alpha, in->n_alpha, out->alpha, &out->n_alpha));
    FV_RETURN_IF_ERR(factors_decode("sharding.mu", in->mu, in->n_mu, out->mu, &out->n_mu));
    FV_RETURN_IF_ERR(
        fv_message_int32("sharding.shard_tokens", in->shard_tokens, &out->shard_tokens));
    return fv_message_int32("sharding.max_ranks", in->max_ranks, &out->max_ranks);
}

/* The message borrows the factors of `in`. */
static Fovea__V1__Sharding sharding_encode(const fv_sharding_t *in)
{
    Fovea__V1__Sharding out = FOVEA__V1__SHARDING__INIT;

    out.groups = (uint32_t)in->groups;
    out.n_alpha = (size_t)in->n_alpha;
    out.alpha = borrow_floats(in->alpha);
    out.n_mu = (size_t)in->n_mu;
    out.mu = borrow_floats(in->mu);
    out.mode = (Fovea__V1__Sharding__Mode)in->mode;
    out.exact = (in->exact != 0) ? 1 : 0;
    out.shard_tokens = (uint32_t)in->shard_tokens;
    out.max_ranks = (uint32_t)in->max_ranks;
    return out;
}

/* The index of `policy` in the spec's table, where it is put if it is not there yet. */
static fv_status_t policy_intern(fv_model_spec_t *spec, const fv_policy_t *policy, uint8_t *out)
{
    for (int32_t i = 0; i < spec->n_policies; i++) {
        if (memcmp(&spec->policies[i], policy, sizeof(*policy)) == 0) {
            *out = (uint8_t)i;
            return FV_OK;
        }
    }
    if (spec->n_policies == FV_POLICIES_MAX) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.policies: given more than %d distinct ones (dense counts as one), "
                       "expected at most %d",
                       FV_POLICIES_MAX, FV_POLICIES_MAX);
    }
    *out = (uint8_t)spec->n_policies;
    spec->policies[spec->n_policies++] = *policy;
    return FV_OK;
}

static fv_status_t
layer_policy_decode(const Fovea__V1__LayerPolicy *in, size_t index, fv_model_spec_t *spec)
{
    fv_policy_t policy;
    uint8_t slot = 0;

    FV_RETURN_IF_ERR(fv_wire_policy_decode(in, index, &policy));
    FV_RETURN_IF_ERR(policy_intern(spec, &policy, &slot));
    if (in->n_layers == 0) {
        memset(spec->layer_policy, slot, (size_t)spec->n_layers);
    }
    for (size_t i = 0; i < in->n_layers; i++) {
        if (in->layers[i] >= (uint32_t)spec->n_layers) {
            return fv_fail(FV_ERR_INVALID_ARG,
                           "spec.policies[%zu].layers[%zu]: given %u, expected less than n_layers "
                           "(%d)",
                           index, i, in->layers[i], spec->n_layers);
        }
        spec->layer_policy[in->layers[i]] = slot;
    }
    return FV_OK;
}

static fv_status_t policies_decode(const Fovea__V1__ModelSpec *in, fv_model_spec_t *out)
{
    if ((in->n_layers == 0) || (in->n_layers > FV_LAYERS_MAX)) { /* layer_policy has no more room */
        return fv_fail(FV_ERR_INVALID_ARG, "spec.n_layers: given %u, expected 1..%d", in->n_layers,
                       FV_LAYERS_MAX);
    }
    out->n_layers = (int32_t)in->n_layers;
    out->n_policies = 1; /* policies[0], all zero, is dense */
    for (size_t i = 0; i < in->n_policies; i++) {
        FV_RETURN_IF_ERR(layer_policy_decode(in->policies[i], i, out));
    }
    return FV_OK;
}

static fv_status_t norm_decode(const Fovea__V1__LatentNorm *in, fv_latent_norm_t *out)
{
    if (in == NULL) {
        return FV_OK;
    }
    if (((int)in->mode != FV_NORM_NONE) && ((int)in->mode != FV_NORM_SLICE_RMS)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.latent_norm.mode: given %d, expected NONE or SLICE_RMS",
                       (int)in->mode);
    }
    if (((int)in->mode == FV_NORM_NONE) && ((in->n_alpha != 0) || (in->eps != 0.0F))) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.latent_norm.alpha, eps: given with mode NONE, expected none");
    }
    out->mode = (int32_t)in->mode;
    out->eps = in->eps;
    return factors_decode("spec.latent_norm.alpha", in->alpha, in->n_alpha, out->alpha,
                          &out->n_alpha);
}

static fv_status_t kind_decode(const Fovea__V1__ModelSpec *in, fv_model_spec_t *out)
{
    if (((int)in->kind < 0) || ((int)in->kind >= KINDS_MAX)) {
        return fv_fail(FV_ERR_INVALID_ARG, "spec.kind: given %d, expected KV or LATENT",
                       (int)in->kind);
    }
    out->kind = (int32_t)in->kind;
    if ((out->kind == FV_MODEL_KV) &&
        ((in->latent_dim != 0) || (in->rope_dim != 0) || (in->latent_norm != NULL))) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.latent_dim, rope_dim, latent_norm: given with kind "
                       "KV, expected none unless LATENT");
    }
    FV_RETURN_IF_ERR(fv_message_int32("spec.latent_dim", in->latent_dim, &out->latent_dim));
    FV_RETURN_IF_ERR(fv_message_int32("spec.rope_dim", in->rope_dim, &out->rope_dim));
    return norm_decode(in->latent_norm, &out->latent_norm);
}

static fv_status_t spec_decode(const Fovea__V1__ModelSpec *in, fv_model_spec_t *out)
{
    FV_RETURN_IF_ERR(fv_message_text("spec.name", in->name, out->name, sizeof(out->name)));
    FV_RETURN_IF_ERR(kind_decode(in, out));
    FV_RETURN_IF_ERR(fv_message_int32("spec.n_q_heads", in->n_q_heads, &out->n_q_heads));
    FV_RETURN_IF_ERR(fv_message_int32("spec.n_kv_heads", in->n_kv_heads, &out->n_kv_heads));
    FV_RETURN_IF_ERR(fv_message_int32("spec.head_dim_qk", in->head_dim_qk, &out->head_dim_qk));
    FV_RETURN_IF_ERR(fv_message_int32("spec.head_dim_v", in->head_dim_v, &out->head_dim_v));
    out->kv_dtype = (int32_t)in->kv_dtype;
    out->softmax_scale = in->softmax_scale;
    out->logit_softcap = in->logit_softcap;
    if (in->sharding != NULL) { /* is_set stays 0: absent and AUTO are the same spec */
        FV_RETURN_IF_ERR(sharding_decode(in->sharding, &out->sharding));
    }
    return policies_decode(in, out);
}

fv_status_t fv_wire_register_request_decode(fv_span_t in, fv_model_spec_t *out)
{
    ProtobufCMessage *message = NULL;

    memset(out, 0, sizeof(*out));
    FV_RETURN_IF_ERR(fv_message_unpack(&fovea__v1__register_model_request__descriptor, in,
                                       FV_WIRE_REQUEST_MAX, &message));
    const Fovea__V1__ModelSpec *spec = ((Fovea__V1__RegisterModelRequest *)message)->spec;
    fv_status_t status =
        (spec != NULL) ? spec_decode(spec, out)
                       : fv_fail(FV_ERR_INVALID_ARG, "spec: given none, expected a ModelSpec");
    fv_message_free(message);
    return status;
}

/* One LayerPolicy a table entry that a layer uses, dense apart: no entry means dense. */
typedef struct policies_out {
    Fovea__V1__LayerPolicy *list[FV_POLICIES_MAX];
    Fovea__V1__LayerPolicy policies[FV_POLICIES_MAX];
    fv_wire_policy_t kinds[FV_POLICIES_MAX];
    uint32_t layers[FV_LAYERS_MAX];
    size_t n;
} policies_out_t;

static void policies_encode(const fv_model_spec_t *in, policies_out_t *p)
{
    uint32_t *layers = p->layers;

    p->n = 0;
    for (int32_t i = 1; i < in->n_policies; i++) {
        Fovea__V1__LayerPolicy *out = &p->policies[p->n];
        uint32_t *next = layers;

        *out = (Fovea__V1__LayerPolicy)FOVEA__V1__LAYER_POLICY__INIT;
        for (int32_t layer = 0; layer < in->n_layers; layer++) {
            if (in->layer_policy[layer] == i) {
                *next++ = (uint32_t)layer;
            }
        }
        if (next == layers) {
            continue; /* an empty list would mean every layer */
        }
        out->layers = layers;
        out->n_layers = (size_t)(next - layers);
        layers = next;
        fv_wire_policy_encode(&in->policies[i], &p->kinds[p->n], out);
        p->list[p->n++] = out;
    }
}

static fv_status_t check_factor_counts(const fv_model_spec_t *in)
{
    FV_RETURN_IF_ERR(
        fv_message_count("sharding.alpha", (size_t)in->sharding.n_alpha, FV_GROUPS_MAX));
    FV_RETURN_IF_ERR(fv_message_count("sharding.mu", (size_t)in->sharding.n_mu, FV_GROUPS_MAX));
    return fv_message_count("latent_norm.alpha", (size_t)in->latent_norm.n_alpha, FV_GROUPS_MAX);
}

static Fovea__V1__LatentNorm norm_encode(const fv_latent_norm_t *in)
{
    Fovea__V1__LatentNorm out = FOVEA__V1__LATENT_NORM__INIT;

    out.mode = (Fovea__V1__LatentNorm__Mode)in->mode;
    out.n_alpha = (size_t)in->n_alpha;
    out.alpha = borrow_floats(in->alpha);
    out.eps = in->eps;
    return out;
}

fv_status_t fv_wire_register_request_encode(const fv_model_spec_t *in, fv_bytes_t *out)
{
    Fovea__V1__RegisterModelRequest message = FOVEA__V1__REGISTER_MODEL_REQUEST__INIT;
    Fovea__V1__ModelSpec spec = FOVEA__V1__MODEL_SPEC__INIT;
    Fovea__V1__Sharding sharding = sharding_encode(&in->sharding);
    Fovea__V1__LatentNorm norm = norm_encode(&in->latent_norm);
    policies_out_t policies;

    FV_RETURN_IF_ERR(check_factor_counts(in));
    if ((in->n_policies < 0) || (in->n_policies > FV_POLICIES_MAX) || (in->n_layers < 0) ||
        (in->n_layers > FV_LAYERS_MAX)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec: given %d policies and %d layers, expected at most %d and %d",
                       in->n_policies, in->n_layers, FV_POLICIES_MAX, FV_LAYERS_MAX);
    }
    policies_encode(in, &policies);
    spec.name = fv_message_borrow(in->name);
    spec.n_layers = (uint32_t)in->n_layers;
    spec.n_q_heads = (uint32_t)in->n_q_heads;
    spec.n_kv_heads = (uint32_t)in->n_kv_heads;
    spec.head_dim_qk = (uint32_t)in->head_dim_qk;
    spec.head_dim_v = (uint32_t)in->head_dim_v;
    spec.kv_dtype = (Fovea__V1__DType)in->kv_dtype;
    spec.softmax_scale = in->softmax_scale;
    spec.logit_softcap = in->logit_softcap;
    spec.kind = (Fovea__V1__ModelSpec__Kind)in->kind;
    spec.latent_dim = (uint32_t)in->latent_dim;
    spec.rope_dim = (uint32_t)in->rope_dim;
    spec.latent_norm = (in->latent_norm.mode != FV_NORM_NONE) ? &norm : NULL;
    spec.n_policies = policies.n;
    spec.policies = policies.list;
    spec.sharding = &sharding;
    message.spec = &spec;
    return fv_message_pack(&message.base, out);
}

fv_status_t fv_wire_register_response_decode(fv_span_t in, fv_register_response_t *out)
{
    ProtobufCMessage *message = NULL;

    *out = (fv_register_response_t){0};
    FV_RETURN_IF_ERR(fv_message_unpack(&fovea__v1__register_model_response__descriptor, in,
                                       FV_WIRE_RESPONSE_MAX, &message));
    const Fovea__V1__RegisterModelResponse *m = (Fovea__V1__RegisterModelResponse *)message;
    fv_status_t status = fv_message_model_id(m->model_id, out->model_id);
    size_t room = sizeof(out->warnings) / sizeof(out->warnings[0]);

    for (size_t i = 0; (i < m->n_warnings) && (i < room); i++) { /* for people: cut to what fits */
        (void)fv_utf8_copy(out->warnings[i], sizeof(out->warnings[i]), m->warnings[i],
                           strlen(m->warnings[i]));
        out->n_warnings++;
    }
    fv_message_free(message);
    return status;
}

fv_status_t fv_wire_register_response_encode(const fv_register_response_t *in, fv_bytes_t *out)
{
    Fovea__V1__RegisterModelResponse message = FOVEA__V1__REGISTER_MODEL_RESPONSE__INIT;
    char text[sizeof(in->warnings) / sizeof(in->warnings[0])][FV_ERROR_TEXT_BYTES];
    char *warnings[sizeof(text) / sizeof(text[0])];

    FV_RETURN_IF_ERR(fv_message_count("warnings", in->n_warnings, sizeof(text) / sizeof(text[0])));
    for (uint32_t i = 0; i < in->n_warnings; i++) {
        (void)fv_utf8_copy(text[i], sizeof(text[i]), in->warnings[i], strlen(in->warnings[i]));
        warnings[i] = text[i];
    }
    message.model_id = fv_message_borrow(in->model_id);
    message.n_warnings = in->n_warnings;
    message.warnings = warnings;
    return fv_message_pack(&message.base, out);
}

/* The checks that fv_model_spec_check() makes for a model's own sharding. */
static fv_status_t check_override(const fv_sharding_t *sharding)
{
    if ((sharding->shard_tokens % FV_PAGE_TOKENS) != 0) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "sharding.shard_tokens: given %d, expected 0 or a multiple of %d",
                       sharding->shard_tokens, FV_PAGE_TOKENS);
    }
    return FV_OK;
}

static fv_status_t open_decode(const Fovea__V1__OpenSessionRequest *in, fv_open_request_t *out)
{
    FV_RETURN_IF_ERR(fv_message_model_id(in->model_id, out->model_id));
    out->max_tokens_hint = in->max_tokens_hint;
    out->close_with_stream = in->close_with_stream != 0;
    if (in->sharding == NULL) {
        return FV_OK;
    }
    out->sharding.is_set = 1;
    FV_RETURN_IF_ERR(sharding_decode(in->sharding, &out->sharding));
    return check_override(&out->sharding);
}

fv_status_t fv_wire_open_request_decode(fv_span_t in, fv_open_request_t *out)
{
    ProtobufCMessage *message = NULL;

    *out = (fv_open_request_t){0};
    FV_RETURN_IF_ERR(fv_message_unpack(&fovea__v1__open_session_request__descriptor, in,
                                       FV_WIRE_REQUEST_MAX, &message));
    fv_status_t status = open_decode((Fovea__V1__OpenSessionRequest *)message, out);

    fv_message_free(message);
    return status;
}

fv_status_t fv_wire_open_request_encode(const fv_open_request_t *in, fv_bytes_t *out)
{
    Fovea__V1__OpenSessionRequest message = FOVEA__V1__OPEN_SESSION_REQUEST__INIT;
    Fovea__V1__Sharding sharding = sharding_encode(&in->sharding);

    message.model_id = fv_message_borrow(in->model_id);
    message.max_tokens_hint = in->max_tokens_hint;
    message.close_with_stream = in->close_with_stream ? 1 : 0;
    message.sharding = (in->sharding.is_set != 0) ? &sharding : NULL;
    return fv_message_pack(&message.base, out);
}
