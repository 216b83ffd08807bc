/*
 * model.c - checks a model's geometry once, so that nothing behind it has to.
 */
#include "common/model.h"

#include "common/policy.h"

#include <math.h>
#include <string.h>

static fv_status_t check_range(const char *field, int64_t given, int64_t low, int64_t high)
{
    if ((given >= low) && (given <= high)) {
        return FV_OK;
    }
    return fv_fail(FV_ERR_INVALID_ARG, "spec.%s: given %lld, expected %lld..%lld", field,
                   (long long)given, (long long)low, (long long)high);
}

static fv_status_t check_head_dim(const char *field, int32_t given)
{
    if ((given >= FV_HEAD_DIM_MIN) && (given <= FV_HEAD_DIM_MAX) && ((given % 8) == 0)) {
        return FV_OK;
    }
    return fv_fail(FV_ERR_INVALID_ARG, "spec.%s: given %d, expected a multiple of 8 in %d..%d",
                   field, given, FV_HEAD_DIM_MIN, FV_HEAD_DIM_MAX);
}

static fv_status_t check_head_dims(fv_model_spec_t *spec)
{
    if (fv_model_is_latent(spec)) {
        return FV_OK; /* by latent.c */
    }
    if (spec->head_dim_v == 0) {
        spec->head_dim_v = spec->head_dim_qk;
    }
    FV_RETURN_IF_ERR(check_head_dim("head_dim_qk", spec->head_dim_qk));
    return check_head_dim("head_dim_v", spec->head_dim_v);
}

static fv_status_t check_heads(const fv_model_spec_t *spec)
{
    FV_RETURN_IF_ERR(check_range("n_q_heads", spec->n_q_heads, 1, FV_HEADS_MAX));
    FV_RETURN_IF_ERR(check_range("n_kv_heads", spec->n_kv_heads, 1, FV_HEADS_MAX));
    if ((spec->n_q_heads % spec->n_kv_heads) != 0) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.n_q_heads: given %d, expected a multiple of n_kv_heads (%d)",
                       spec->n_q_heads, spec->n_kv_heads);
    }
    if (fv_model_group(spec) > FV_GROUP_MAX) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.n_q_heads: given %d for %d KV heads, expected at most %d per KV head",
                       spec->n_q_heads, spec->n_kv_heads, FV_GROUP_MAX);
    }
    return FV_OK;
}

static fv_status_t check_s2(const fv_model_spec_t *spec, const fv_policy_t *p)
{
    int32_t bs = p->block_tokens;

    if ((bs < FV_S2_BLOCK_MIN) || (bs > FV_S2_BLOCK_MAX) || ((bs & (bs - 1)) != 0)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.policies.s2.block_tokens: given %d, expected 16, 32, 64, 128 or 256",
                       bs);
    }
    FV_RETURN_IF_ERR(check_range("policies.s2.local_blocks", p->local_blocks, 1, FV_S2_LOCAL_MAX));
    FV_RETURN_IF_ERR(check_range("policies.s2.vert_stride", p->vert_stride, 1, FV_S2_STRIDE_MAX));
    FV_RETURN_IF_ERR(check_range("policies.s2.head_sliding_step", p->head_sliding_step,
                                 -FV_S2_SLIDING_MAX, FV_S2_SLIDING_MAX));
    FV_RETURN_IF_ERR(check_range("policies.s2.head_sliding_offset", p->head_sliding_offset,
                                 -FV_S2_SLIDING_MAX, FV_S2_SLIDING_MAX));
    if ((p->pattern_per != FV_PATTERN_KV_HEAD) && (p->pattern_per != FV_PATTERN_Q_HEAD)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.policies.s2.pattern_per: given %d, expected KV_HEAD or Q_HEAD",
                       p->pattern_per);
    }
    if ((p->homo_head != 0) && (p->num_dense_heads != 0)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.policies.s2.num_dense_heads: given %d, expected 0 with homo_head",
                       p->num_dense_heads);
    }
    return check_range("policies.s2.num_dense_heads", p->num_dense_heads, 0,
                       (p->pattern_per == FV_PATTERN_Q_HEAD) ? spec->n_q_heads : spec->n_kv_heads);
}

/* What is left to the model: the reference divides by the query heads, whichever heads the pattern is for. */
static void resolve_s2(const fv_model_spec_t *spec, fv_policy_t *p)
{
    int32_t n_q_heads = (p->homo_head != 0) ? 1 : spec->n_q_heads;

    p->n_heads = (p->pattern_per == FV_PATTERN_Q_HEAD) ? spec->n_q_heads : spec->n_kv_heads;
    if (p->head_sliding_step == 0) {
        p->head_sliding_step = (p->vert_stride > n_q_heads) ? (p->vert_stride / n_q_heads) : 1;
    }
}

static fv_status_t check_policy(const fv_model_spec_t *spec, fv_policy_t *policy)
{
    if (policy->kind == FV_POLICY_S2) {
        FV_RETURN_IF_ERR(check_s2(spec, policy));
        resolve_s2(spec, policy);
        return FV_OK;
    }
    if (policy->kind == FV_POLICY_WINDOW) {
        FV_RETURN_IF_ERR(
            check_range("policies.window.window_tokens", policy->window_tokens, 1, INT32_MAX));
        return check_range("policies.window.sink_tokens", policy->sink_tokens, 0, INT32_MAX);
    }
    return check_range("policies.kind", policy->kind, 0, FV_POLICY_S2);
}

static fv_status_t check_sharding(const fv_sharding_t *sharding)
{
    FV_RETURN_IF_ERR(check_range("sharding.mode", sharding->mode, 0, FV_SHARDING_LATENT));
    FV_RETURN_IF_ERR(check_range("sharding.max_ranks", sharding->max_ranks, 0, INT32_MAX));
    if ((sharding->shard_tokens < 0) || ((sharding->shard_tokens % FV_PAGE_TOKENS) != 0)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.sharding.shard_tokens: given %d, expected 0 or a multiple of %d",
                       sharding->shard_tokens, FV_PAGE_TOKENS);
    }
    return FV_OK;
}

fv_status_t fv_model_spec_check(fv_model_spec_t *spec)
{
    if (spec->name[0] == '\0') {
        return fv_fail(FV_ERR_INVALID_ARG, "spec.name: given \"\", expected 1..%d bytes",
                       FV_MODEL_NAME_BYTES - 1);
    }
    FV_RETURN_IF_ERR(check_range("n_layers", spec->n_layers, 1, FV_LAYERS_MAX));
    FV_RETURN_IF_ERR(fv_model_latent_check(spec));
    FV_RETURN_IF_ERR(check_heads(spec));
    FV_RETURN_IF_ERR(check_head_dims(spec));
    if (!fv_dtype_is_valid(spec->kv_dtype) &&
        (spec->kv_dtype != (int32_t)FV_DTYPE_FP8_LATENT)) { /* which latent.c has seen */
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.kv_dtype: given %d, expected F32, F16 or BF16 (or FP8_LATENT with "
                       "kind LATENT)",
                       spec->kv_dtype);
    }
    if (!isfinite(spec->softmax_scale) || (spec->softmax_scale < 0.0F)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.softmax_scale: given %g, expected 0 or a positive finite number",
                       (double)spec->softmax_scale);
    }
    if (!isfinite(spec->logit_softcap) || (spec->logit_softcap < 0.0F)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.logit_softcap: given %g, expected 0 or a positive finite number",
                       (double)spec->logit_softcap);
    }
    if (spec->softmax_scale == 0.0F) {
        spec->softmax_scale = (float)(1.0 / sqrt((double)spec->head_dim_qk));
    }
    FV_RETURN_IF_ERR(check_range("policies", spec->n_policies, 1, FV_POLICIES_MAX));
    for (int32_t i = 0; i < spec->n_policies; i++) {
        FV_RETURN_IF_ERR(check_policy(spec, &spec->policies[i]));
    }
    for (int32_t i = 0; i < spec->n_layers; i++) {
        FV_RETURN_IF_ERR(
            check_range("policies.layers", spec->layer_policy[i], 0, spec->n_policies - 1));
    }
    return check_sharding(&spec->sharding);
}

bool fv_model_spec_equal(const fv_model_spec_t *a, const fv_model_spec_t *b)
{
    return memcmp(a, b, sizeof(*a)) == 0; /* decoded into zeroed memory, so padding is equal too */
}
