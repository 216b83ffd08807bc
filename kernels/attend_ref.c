/*
 * attend_ref.c - the oracle: attention in fp64, straight from its definition.
 *
 * Nothing here is shared with the kernels: visibility is written out from the comment of tiles.h, token by
 * token. A row whose visible scores are all -inf has no weight anywhere and is the empty set, as a row that
 * sees nothing: that keeps the answer the same however the context is split.
 */
#include "kernels/kernels.h"

#include <math.h>

/* common/policy.h's definition, block by block; q_head and the head of the pattern are the model's numbers. */
static bool ref_sees_s2(const fv_policy_t *s2,
                        int32_t group,
                        int32_t q_head,
                        int64_t row_position,
                        int64_t token)
{
    int64_t bs = s2->block_tokens;
    int64_t h = (s2->pattern_per == FV_PATTERN_Q_HEAD) ? q_head : (q_head / group);
    int64_t t = row_position / bs;
    int64_t b = token / bs;

    h = (s2->homo_head != 0) ? 0 : h;
    return (b <= t) &&
           ((t - b < s2->local_blocks) ||
            ((b + h * s2->head_sliding_step + s2->head_sliding_offset) % s2->vert_stride == 0) ||
            (h >= s2->n_heads - s2->num_dense_heads));
}

static bool
ref_sees(const fv_attend_ref_params_t *p, int32_t q_head, int64_t row_position, int64_t token)
{
    int64_t distance = row_position - token;

    if (p->causal && (distance < 0)) {
        return false;
    }
    if (p->policy.kind == FV_POLICY_WINDOW) {
        distance = (distance < 0) ? -distance : distance;
        return (distance < p->policy.window_tokens) || (token < p->policy.sink_tokens);
    }
    if (p->policy.kind == FV_POLICY_S2) {
        return ref_sees_s2(&p->policy, p->group, p->kv_head_begin * p->group + q_head, row_position,
                           token);
    }
    return true;
}

static double ref_score(const fv_attend_ref_params_t *p, const double *q, const double *k)
{
    double s = 0.0;

    for (int32_t d = 0; d < p->head_dim_qk; d++) {
        s += q[d] * k[d];
    }
    s *= p->softmax_scale;
    return (p->logit_softcap > 0.0) ? (p->logit_softcap * tanh(s / p->logit_softcap)) : s;
}

/* One row; the scores are computed twice, so that no memory is needed for them. */
static void ref_row(const fv_attend_ref_params_t *p,
                    int64_t row_position,
                    int32_t q_head,
                    const double *q,
                    double *out,
                    double *lse)
{
    size_t dk = (size_t)p->head_dim_qk;
    size_t dv = (size_t)p->head_dim_v;
    size_t n_heads = (size_t)p->n_kv_heads;
    size_t kv_head = (size_t)(q_head / p->group);
    double m = -(double)INFINITY;
    double l = 0.0;

    for (size_t d = 0; d < dv; d++) {
        out[d] = 0.0;
    }
    for (int64_t j = 0; j < p->kv_end; j++) {
        if (ref_sees(p, q_head, row_position, j)) {
            double s = ref_score(p, q, p->k + ((size_t)j * n_heads + kv_head) * dk);
            m = ((s > m) || isnan(s)) ? s : m;
            if (isnan(m)) {
                break;
            }
        }
    }
    *lse = m;
    if (isinf(m) && (m < 0.0)) {
        return;
    }
    for (int64_t j = 0; j < p->kv_end; j++) {
        if (ref_sees(p, q_head, row_position, j)) {
            size_t at = (size_t)j * n_heads + kv_head;
            double w = exp(ref_score(p, q, p->k + at * dk) - m);
            l += w;
            for (size_t d = 0; d < dv; d++) {
                out[d] += w * p->v[at * dv + d];
            }
        }
    }
    for (size_t d = 0; d < dv; d++) {
        out[d] /= l;
    }
    *lse = m + log(l);
}

void fv_attend_ref(const fv_attend_ref_params_t *params)
{
    int32_t n_q_heads = params->n_kv_heads * params->group;

    for (int64_t t = 0; t < params->n_tokens; t++) {
        for (int32_t h = 0; h < n_q_heads; h++) {
            size_t row = (size_t)t * (size_t)n_q_heads + (size_t)h;
            double lse = 0.0;

            ref_row(params, params->position + t, h, params->q + row * (size_t)params->head_dim_qk,
                    params->out + row * (size_t)params->head_dim_v, &lse);
            if (params->lse != NULL) {
                params->lse[row] = lse;
            }
        }
    }
}
