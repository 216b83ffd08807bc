/*
 * worker_rig_latent.c - what the rig knows of LATENT models: what is stored, and the oracle of a softmax for each slice.
 */
#include "tests/support/fp8_ref.h"
#include "tests/support/test.h"
#include "tests/support/worker_rig.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double *must_alloc(size_t n)
{
    double *data = malloc((n + 1U) * sizeof(*data));

    assert_non_null(data);
    return data;
}

/* The slice's dims of a row, as latent_norm says, in the precision and the order of an append: 32 sums, 4 dims each in turn. */
static void normalise(const fv_model_spec_t *spec, int32_t slice, float *row)
{
    int32_t dim = spec->latent_dim / fv_model_groups(spec);
    float sums[32] = {0.0F};

    if (spec->latent_norm.mode == FV_NORM_NONE) {
        return;
    }
    for (int32_t d = 0; d < dim; d++) {
        sums[d / 4 % 32] += row[d] * row[d];
    }
    for (int32_t n = 16; n > 0; n /= 2) {
        for (int32_t i = 0; i < n; i++) {
            sums[i] += sums[i + n];
        }
    }
    float factor = 1.0F / sqrtf(spec->latent_norm.alpha[slice] / (float)fv_model_groups(spec) *
                                    (sums[0] / (float)dim) +
                                spec->latent_norm.eps);
    for (int32_t d = 0; d < dim; d++) {
        row[d] *= factor;
    }
}

void fv_rig_latent_store(const fv_model_spec_t *spec, float *row, double *out_k, double *out_v)
{
    int32_t n_groups = fv_model_groups(spec);
    float stored = 0.0F;

    for (int32_t g = 0; g < n_groups; g++) {
        normalise(spec, g, row + g * (spec->latent_dim / n_groups));
    }
    if (spec->kv_dtype ==
        (int32_t)FV_DTYPE_FP8_LATENT) { /* scales are of whole blocks of a slice */
        fv_fp8_row_ref(row, (size_t)spec->head_dim_qk, (size_t)spec->latent_dim);
    }
    for (int32_t d = 0; d < spec->head_dim_qk; d++) {
        fv_dtype_t dtype = (spec->kv_dtype == (int32_t)FV_DTYPE_FP8_LATENT)
                               ? FV_DTYPE_F32
                               : (fv_dtype_t)spec->kv_dtype;

        fv_store_element(&stored, dtype, 0, row[d]);
        out_k[d] = (double)fv_load_element(&stored, dtype, 0);
    }
    memcpy(out_v, out_k, (size_t)spec->head_dim_v * sizeof(*out_v));
}

/* Slice g of n rows of latents and RoPE dims, the latter taken along; the latent part times `factor`. */
static double *
cut(const fv_model_spec_t *spec, const double *rows, size_t n, int32_t g, double factor)
{
    size_t dv = (size_t)(spec->latent_dim / fv_model_groups(spec));
    size_t rope = (size_t)spec->rope_dim;
    size_t dk = (size_t)spec->head_dim_qk;
    double *out = must_alloc(n * (dv + rope));

    for (size_t r = 0; r < n; r++) {
        for (size_t d = 0; d < dv; d++) {
            out[r * (dv + rope) + d] = factor * rows[r * dk + (size_t)g * dv + d];
        }
        memcpy(out + r * (dv + rope) + dv, rows + r * dk + (size_t)spec->latent_dim,
               rope * sizeof(*out));
    }
    return out;
}

void fv_rig_latent_ref(const fv_model_spec_t *spec, const fv_attend_ref_params_t *whole)
{
    int32_t n_groups = fv_model_groups(spec);
    size_t dv = (size_t)(spec->latent_dim / n_groups);

    if (!fv_model_is_approximate(spec)) {
        fv_attend_ref(whole);
        return;
    }
    size_t n_rows = (size_t)whole->n_tokens * (size_t)spec->n_q_heads;
    double *out = must_alloc(n_rows * dv);

    for (int32_t g = 0; g < n_groups; g++) {
        double *q = cut(spec, whole->q, n_rows, g, (double)spec->sharding.mu[g]);
        double *k = cut(spec, whole->k, (size_t)whole->kv_end, g, 1.0);
        double *v = must_alloc((size_t)whole->kv_end * dv);
        fv_attend_ref_params_t part = *whole;

        for (size_t j = 0; j < (size_t)whole->kv_end; j++) {
            memcpy(v + j * dv, k + j * (dv + (size_t)spec->rope_dim), dv * sizeof(*v));
        }
        part.head_dim_qk = (int32_t)dv + spec->rope_dim;
        part.head_dim_v = (int32_t)dv;
        part.q = q;
        part.k = k;
        part.v = v;
        part.out = out;
        fv_attend_ref(&part);
        for (size_t r = 0; r < n_rows; r++) {
            memcpy(whole->out + r * (size_t)spec->latent_dim + (size_t)g * dv, out + r * dv,
                   dv * sizeof(*out));
        }
        free(q);
        free(k);
        free(v);
    }
    free(out);
}
