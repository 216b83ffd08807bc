/*
 * latent.c - checks and resolves what only LATENT models have.
 *
 * Softmax scale: always explicit. MLA's is that of the model before absorption (192 dims and its RoPE scaling), which
 * nothing here can know; 1/sqrt of the stored dims would be wrong for every model there is.
 */
#include "common/model.h"

#include <math.h>
#include <string.h>

#define SHARE_SUM_SLACK 0.05 /* shares of a calibration add up to 1 within this */

static fv_status_t fail_number(const char *field, int64_t given, const char *expected)
{
    return fv_fail(FV_ERR_INVALID_ARG, "spec.%s: given %lld, expected %s", field, (long long)given,
                   expected);
}

static fv_status_t check_no_groups(const fv_sharding_t *sharding)
{
    if ((sharding->groups | sharding->n_alpha | sharding->n_mu | sharding->exact) == 0) {
        return FV_OK;
    }
    return fail_number("sharding.groups, alpha, mu, exact", sharding->groups,
                       "none unless sharding.mode is LATENT");
}

/* A KV model has no latent fields. */
static fv_status_t check_absent(const fv_model_spec_t *spec)
{
    if ((spec->latent_dim != 0) || (spec->rope_dim != 0) ||
        (spec->latent_norm.mode != FV_NORM_NONE)) {
        return fail_number("latent_dim, rope_dim, latent_norm", spec->latent_dim,
                           "none unless kind is LATENT");
    }
    if (spec->kv_dtype == (int32_t)FV_DTYPE_FP8_LATENT) {
        return fail_number("kv_dtype", spec->kv_dtype,
                           "F32, F16 or BF16 (FP8_LATENT is for kind LATENT)");
    }
    if (spec->sharding.mode == FV_SHARDING_LATENT) {
        return fail_number("sharding.mode", spec->sharding.mode,
                           "AUTO, HEADS or CONTEXT (LATENT is for kind LATENT)");
    }
    return check_no_groups(&spec->sharding);
}

/* A dim that LATENT derives: 0, or exactly that. */
static fv_status_t resolve_derived(const char *field, int32_t *given, int32_t derived)
{
    if ((*given != 0) && (*given != derived)) {
        return fv_fail(FV_ERR_INVALID_ARG, "spec.%s: given %d, expected 0 or %d with kind LATENT",
                       field, *given, derived);
    }
    *given = derived;
    return FV_OK;
}

static fv_status_t check_dims(fv_model_spec_t *spec)
{
    if ((spec->latent_dim < FV_LATENT_DIM_STEP) || (spec->latent_dim > FV_LATENT_DIM_MAX) ||
        ((spec->latent_dim % FV_LATENT_DIM_STEP) != 0)) {
        return fail_number("latent_dim", spec->latent_dim, "a multiple of 64 in 64..1024");
    }
    if ((spec->rope_dim < 0) || (spec->rope_dim > FV_ROPE_DIM_MAX) || ((spec->rope_dim % 8) != 0)) {
        return fail_number("rope_dim", spec->rope_dim, "a multiple of 8 in 0..128");
    }
    if (spec->softmax_scale == 0.0F) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.softmax_scale: given 0, expected the model's own scale with kind "
                       "LATENT (1/sqrt(192) for DeepSeek's dims, times its RoPE factor)");
    }
    FV_RETURN_IF_ERR(resolve_derived("n_kv_heads", &spec->n_kv_heads, 1));
    FV_RETURN_IF_ERR(resolve_derived("head_dim_v", &spec->head_dim_v, spec->latent_dim));
    return resolve_derived("head_dim_qk", &spec->head_dim_qk, spec->latent_dim + spec->rope_dim);
}

/* The latent is one KV head: it has one pattern, and is freed where that no longer reads it. */
static fv_status_t check_policies(const fv_model_spec_t *spec)
{
    for (int32_t i = 0; (i < spec->n_policies) && (i < FV_POLICIES_MAX); i++) {
        const fv_policy_t *policy = &spec->policies[i];

        if ((policy->kind == FV_POLICY_S2) && (policy->pattern_per == FV_PATTERN_Q_HEAD)) {
            return fail_number("policies.s2.pattern_per", policy->pattern_per,
                               "KV_HEAD with kind LATENT: all heads read the same latents");
        }
    }
    return FV_OK;
}

/* n factors, each positive; n_given of them are there. */
static fv_status_t
check_factors(const char *field, const float *factors, int32_t n_given, int32_t n)
{
    if (n_given != n) {
        return fv_fail(FV_ERR_INVALID_ARG, "spec.%s: given %d, expected %d: one for each slice",
                       field, n_given, n);
    }
    for (int32_t i = 0; i < n; i++) {
        if (!isfinite(factors[i]) || !(factors[i] > 0.0F)) {
            return fv_fail(FV_ERR_INVALID_ARG, "spec.%s[%d]: given %g, expected a positive number",
                           field, i, (double)factors[i]);
        }
    }
    return FV_OK;
}

/* One softmax over added scores is the model's own: there is nothing to weigh. */
static fv_status_t check_exact(const fv_sharding_t *sharding)
{
    FV_RETURN_IF_ERR(((sharding->exact == 0) || (sharding->exact == 1))
                         ? FV_OK
                         : fail_number("sharding.exact", sharding->exact, "0 or 1"));
    for (int32_t i = 0; (sharding->exact != 0) && (i < sharding->n_mu); i++) {
        if ((sharding->mu[i] < 1.0F) || (sharding->mu[i] > 1.0F)) {
            return fv_fail(FV_ERR_INVALID_ARG,
                           "spec.sharding.mu[%d]: given %g, expected 1 with sharding.exact", i,
                           (double)sharding->mu[i]);
        }
    }
    return FV_OK;
}

static fv_status_t check_sharding(fv_sharding_t *sharding, int32_t latent_dim)
{
    if (sharding->mode != FV_SHARDING_LATENT) {
        return check_no_groups(sharding);
    }
    int32_t g = sharding->groups;
    if ((g != 1) && (g != 2) && (g != 4) && (g != FV_GROUPS_MAX)) {
        return fail_number("sharding.groups", g, "1, 2, 4 or 8");
    }
    if (latent_dim / g < FV_SLICE_DIM_MIN) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.sharding.groups: given %d, expected slices of at least %d of "
                       "latent_dim %d",
                       g, FV_SLICE_DIM_MIN, latent_dim);
    }
    if (sharding->n_mu == 0) {
        sharding->n_mu = g;
        for (int32_t i = 0; i < g; i++) {
            sharding->mu[i] = 1.0F;
        }
    }
    FV_RETURN_IF_ERR(check_factors("sharding.mu", sharding->mu, sharding->n_mu, g));
    return check_exact(sharding);
}

/*
 * alpha is the reciprocal of a slice's share of the squared norm (RMS(c)^2 = alpha / groups * RMS(slice)^2); the paper also
 * prints the share itself, which would scale the latents by groups^2 and more. Shares add up to 1: the other convention,
 * and most slips, show.
 */
static fv_status_t check_shares(const fv_latent_norm_t *norm)
{
    double sum = 0.0;

    for (int32_t i = 0; i < norm->n_alpha; i++) {
        sum += 1.0 / (double)norm->alpha[i];
    }
    if (fabs(sum - 1.0) > SHARE_SUM_SLACK) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.latent_norm.alpha: given reciprocals that add up to %g, expected 1: "
                       "alpha[i] is 1 / (the share of slice i in the squared norm)",
                       sum);
    }
    return FV_OK;
}

static fv_status_t check_norm(fv_model_spec_t *spec)
{
    fv_latent_norm_t *norm = &spec->latent_norm;
    fv_sharding_t *sharding = &spec->sharding;
    int32_t g = fv_model_groups(spec);

    if (norm->mode == FV_NORM_NONE) {
        if ((sharding->n_alpha != 0) || (norm->n_alpha != 0)) {
            return fail_number("sharding.alpha", sharding->n_alpha,
                               "none: alpha acts in latent_norm SLICE_RMS only");
        }
        return FV_OK;
    }
    if (norm->mode != FV_NORM_SLICE_RMS) {
        return fail_number("latent_norm.mode", norm->mode, "NONE or SLICE_RMS");
    }
    if (sharding->exact != 0) {
        return fail_number("latent_norm.mode", norm->mode,
                           "NONE with sharding.exact: a slice does not know the whole's norm");
    }
    if (!isfinite(norm->eps) || (norm->eps < 0.0F)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.latent_norm.eps: given %g, expected 0 or a positive number",
                       (double)norm->eps);
    }
    if ((norm->n_alpha == 0) && (sharding->n_alpha == 0) && (g == 1)) { /* all of it is one slice */
        norm->n_alpha = 1;
        norm->alpha[0] = 1.0F;
    }
    if (norm->n_alpha == 0) {
        norm->n_alpha = sharding->n_alpha;
        memcpy(norm->alpha, sharding->alpha, sizeof(norm->alpha));
    } else if ((sharding->n_alpha != 0) &&
               ((sharding->n_alpha != norm->n_alpha) ||
                (memcmp(sharding->alpha, norm->alpha, sizeof(norm->alpha)) != 0))) {
        return fail_number("sharding.alpha", sharding->n_alpha,
                           "none, or the same as latent_norm.alpha");
    }
    sharding->n_alpha = 0;
    memset(sharding->alpha, 0, sizeof(sharding->alpha));
    FV_RETURN_IF_ERR(check_factors("latent_norm.alpha", norm->alpha, norm->n_alpha, g));
    return check_shares(norm);
}

/* Whole blocks of dims share a scale, of each slice too. */
static fv_status_t check_fp8(const fv_model_spec_t *spec)
{
    if ((spec->kv_dtype != (int32_t)FV_DTYPE_FP8_LATENT) ||
        (fv_model_stored_dim_v(spec) % FV_FP8_BLOCK == 0)) {
        return FV_OK;
    }
    return fv_fail(FV_ERR_INVALID_ARG,
                   "spec.kv_dtype: given FP8_LATENT with latent_dim %d in %d groups, expected "
                   "slices of a multiple of %d dims, which share a scale",
                   spec->latent_dim, fv_model_groups(spec), FV_FP8_BLOCK);
}

fv_status_t fv_model_latent_check(fv_model_spec_t *spec)
{
    if (!fv_model_is_latent(spec)) {
        if (spec->kind != FV_MODEL_KV) {
            return fail_number("kind", spec->kind, "KV or LATENT");
        }
        return check_absent(spec);
    }
    FV_RETURN_IF_ERR(check_dims(spec));
    FV_RETURN_IF_ERR(check_policies(spec));
    FV_RETURN_IF_ERR(check_sharding(&spec->sharding, spec->latent_dim));
    FV_RETURN_IF_ERR(check_fp8(spec));
    return check_norm(spec);
}
