/*
 * plan_shape.c - a session at a length, reduced to what the cost of a grid depends on (plan_grid.h).
 */
#include "common/policy.h"
#include "coord/plan_grid.h"

/* Longer blocks of tokens than this are not made for the sake of a pattern. */
#define ALIGNED_SHARD_MAX ((uint64_t)1 << 18)

static uint64_t read_tokens(const fv_policy_t *policy, uint64_t n_tokens)
{
    uint64_t n = n_tokens;

    if (policy->kind == FV_POLICY_WINDOW) {
        uint64_t visible = (uint64_t)policy->window_tokens + (uint64_t)policy->sink_tokens;
        n = (visible < n) ? visible : n;
    }
    return n;
}

static fv_plan_length_t cut(uint64_t n_tokens, uint32_t shard_tokens)
{
    return (fv_plan_length_t){.n_full = n_tokens / shard_tokens, .n_rest = n_tokens % shard_tokens};
}

/* KV heads with a dense query head: the last ones. */
static int32_t dense_kv_heads(const fv_model_spec_t *spec, const fv_policy_t *p)
{
    int32_t per_kv_head = fv_policy_splits_group(p) ? fv_model_group(spec) : 1;

    return (p->num_dense_heads + per_kv_head - 1) / per_kv_head;
}

static void read_s2(const fv_model_spec_t *spec,
                    const fv_policy_t *p,
                    uint32_t shard_tokens,
                    uint64_t n_tokens,
                    fv_plan_read_t *out)
{
    uint64_t local = (uint64_t)p->local_blocks * (uint64_t)p->block_tokens;
    int32_t n_patterns = fv_policy_splits_group(p) ? fv_model_group(spec) : 1;
    double share = (double)n_patterns / (double)p->vert_stride;

    if (p->block_tokens < FV_PAGE_TOKENS) {
        share *= (double)(FV_PAGE_TOKENS / p->block_tokens);
    }
    local = (local < n_tokens) ? local : n_tokens;
    out->is_s2 = true;
    out->local = cut(local, shard_tokens);
    out->strided = (double)(n_tokens - local) * ((share < 1.0) ? share : 1.0);
    out->n_dense = dense_kv_heads(spec, p);
}

uint32_t fv_plan_align_shard(const fv_model_spec_t *spec, uint32_t shard_tokens)
{
    uint64_t period = FV_PAGE_TOKENS;

    for (int32_t i = 0; i < spec->n_policies; i++) {
        const fv_policy_t *p = &spec->policies[i];

        if (p->kind == FV_POLICY_S2) {
            uint64_t own = (uint64_t)p->vert_stride * (uint64_t)p->block_tokens;
            uint64_t a = period;
            uint64_t b = own;

            while (b != 0) {
                uint64_t rest = a % b;
                a = b;
                b = rest;
            }
            period = period / a * own;
            if (period > ALIGNED_SHARD_MAX) {
                return shard_tokens;
            }
        }
    }
    return (uint32_t)(fv_div_up(shard_tokens, period) * period);
}

fv_plan_shape_t fv_plan_shape(const fv_plan_cost_t *cost,
                              const fv_model_spec_t *spec,
                              uint32_t shard_tokens,
                              uint64_t n_tokens)
{
    fv_plan_shape_t s; /* reads[0 .. n_reads) only are ever written: the whole is a kilobyte */

    s.cost = cost;
    s.spec = spec;
    s.n_tokens = n_tokens;
    s.shard_tokens = shard_tokens;
    s.n_reads = 0;
    s.has_s2 = false;
    s.token_bytes = (double)fv_model_token_bytes(spec);
    s.length = cut(n_tokens, shard_tokens);
    int32_t n_layers[FV_POLICIES_MAX] = {0};

    if (spec->n_policies <= 1) {
        n_layers[0] = spec->n_layers;
    } else {
        for (int32_t i = 0; i < spec->n_layers; i++) {
            n_layers[spec->layer_policy[i]]++;
        }
    }
    for (int32_t i = 0; (i < FV_POLICIES_MAX) && (i < spec->n_policies); i++) {
        if (n_layers[i] > 0) {
            fv_plan_read_t *read = &s.reads[s.n_reads++];

            read->is_s2 = false;
            read->weight = (double)n_layers[i] / (double)spec->n_layers;
            read->length = cut(read_tokens(&spec->policies[i], n_tokens), shard_tokens);
            if (spec->policies[i].kind == FV_POLICY_S2) {
                s.has_s2 = true;
                read_s2(spec, &spec->policies[i], shard_tokens, n_tokens, read);
            }
        }
    }
    return s;
}
