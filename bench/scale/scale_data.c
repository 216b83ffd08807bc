/*
 * scale_data.c - what sessions of the scaling benchmark hold, and what attention over it must give.
 *
 * K and V repeat after WINDOW tokens, so the softmax over millions of tokens is one over WINDOW distinct ones with
 * multiplicities: exact in fp64, whatever the length. Another window for every (item, layer): a page that belongs to
 * somebody else shows.
 */
#include "bench/scale/scale.h"

#include <math.h>
#include <string.h>

#define QUERY_TOKENS 2048 /* a prime step through them gives every (item, position) its own */
#define QUERY_BYTES  ((size_t)32 << 20) /* of them at most: 128 heads of 576 take 144 KB a token */

static void fill(uint16_t *out, size_t n, fv_random_t *random)
{
    for (size_t i = 0; i < n; i++) { /* the sum of two: round, unlike a uniform one */
        out[i] = fv_f32_to_bf16(fv_random_unit(random) + fv_random_unit(random));
    }
}

void fv_scale_data_open(fv_scale_data_t *d,
                        fv_scale_rank_t *r,
                        const fv_model_spec_t *spec,
                        size_t n_query_tokens)
{
    fv_random_t random = {.state = 20261122};
    size_t kv_elems = (size_t)spec->n_kv_heads * (size_t)spec->head_dim_qk;
    size_t q_elems = (size_t)spec->n_q_heads * (size_t)spec->head_dim_qk;
    size_t v_elems = (size_t)spec->n_kv_heads * (size_t)fv_model_v_dim_sent(spec);
    size_t n_q_tokens = QUERY_TOKENS;

    memset(d, 0, sizeof(*d));
    while (n_q_tokens * q_elems * sizeof(uint16_t) > QUERY_BYTES) {
        n_q_tokens /= 2U;
    }
    d->spec = spec;
    d->q_tokens = n_q_tokens;
    d->kv_token_bytes = kv_elems * sizeof(uint16_t);
    d->v_token_bytes = v_elems * sizeof(uint16_t);
    d->q_token_bytes = q_elems * sizeof(uint16_t);
    fv_scale_check(fv_host_buffer_reserve(&d->memory, r->backend, r->worker->backend,
                                          FV_SCALE_POOL * (d->kv_token_bytes + d->v_token_bytes) +
                                              (n_q_tokens + n_query_tokens) * d->q_token_bytes),
                   "data");
    d->k = d->memory.data;
    d->v = d->k + FV_SCALE_POOL * kv_elems;
    d->q = d->v + FV_SCALE_POOL * v_elems;
    fill(d->k, FV_SCALE_POOL * (kv_elems + v_elems), &random);
    fill(d->q, n_q_tokens * q_elems, &random);
    /* again behind it: queries of several tokens are read in one piece */
    for (size_t i = 0; i < n_query_tokens; i++) {
        memcpy(d->q + (n_q_tokens + i) * q_elems, d->q + i * q_elems, d->q_token_bytes);
    }
}

void fv_scale_data_close(fv_scale_data_t *d, fv_scale_rank_t *r)
{
    fv_host_buffer_free(&d->memory, r->backend, r->worker->backend);
}

size_t fv_scale_token(uint32_t item, uint32_t layer, uint64_t t)
{
    size_t shift = ((size_t)item * 61U + (size_t)layer * 997U) % FV_SCALE_WINDOW;

    return shift + (size_t)(t % FV_SCALE_WINDOW);
}

const uint16_t *fv_scale_query(const fv_scale_data_t *d, uint32_t item, uint64_t position)
{
    size_t first = (size_t)(((uint64_t)item * 389U + position) % d->q_tokens);

    return d->q + first * (d->q_token_bytes / sizeof(uint16_t));
}

/* How many of the tokens that a row at `position` sees are the pool's token t. */
static uint64_t times_seen(const fv_model_spec_t *spec,
                           uint32_t layer,
                           uint64_t position,
                           int32_t kv_head,
                           uint64_t t)
{
    const fv_policy_t *s2 = &spec->policies[spec->layer_policy[layer]];
    uint64_t n = 0;

    if (s2->kind != FV_POLICY_S2) {
        return (position - t) / FV_SCALE_WINDOW + 1U;
    }
    for (uint64_t j = t; j <= position; j += FV_SCALE_WINDOW) {
        const int64_t block = (int64_t)j / s2->block_tokens;
        const int64_t shift = (int64_t)kv_head * s2->head_sliding_step + s2->head_sliding_offset;

        n += (((int64_t)position / s2->block_tokens - block < s2->local_blocks) ||
              ((block + shift) % s2->vert_stride == 0))
                 ? 1U
                 : 0U;
    }
    return n;
}

static double dot(const uint16_t *a, const uint16_t *b, size_t n)
{
    double sum = 0.0;

    for (size_t i = 0; i < n; i++) {
        sum += (double)fv_bf16_to_f32(a[i]) * (double)fv_bf16_to_f32(b[i]);
    }
    return sum;
}

void fv_scale_expected(const fv_scale_data_t *d,
                       uint32_t item,
                       uint32_t layer,
                       uint64_t position,
                       int32_t head,
                       const fv_head_part_t *part,
                       double *out)
{
    const size_t dim = (size_t)d->spec->head_dim_qk; /* of a row of the pool */
    const size_t first = (size_t)part->latent_begin;
    const size_t dv = (size_t)part->head_dim_v;
    const size_t n_shared = (size_t)(part->head_dim_qk - part->head_dim_v); /* the RoPE key */
    const bool is_latent = fv_model_is_latent(d->spec);
    const uint16_t *values = is_latent ? d->k : d->v;
    const size_t kv_head = (size_t)(head / fv_model_group(d->spec));
    const uint16_t *q = fv_scale_query(d, item, position) + (size_t)head * dim;
    const uint64_t n_tokens = position + 1U;
    const uint64_t n_distinct = (n_tokens < FV_SCALE_WINDOW) ? n_tokens : FV_SCALE_WINDOW;
    static double scores[FV_SCALE_WINDOW]; /* one thread */
    double highest = -INFINITY;
    double sum = 0.0;

    for (uint64_t t = 0; t < n_distinct; t++) {
        const size_t row =
            (fv_scale_token(item, layer, t) * (size_t)d->spec->n_kv_heads + kv_head) * dim;
        const size_t rope = dim - n_shared;

        scores[t] =
            (dot(q + first, d->k + row + first, dv) + dot(q + rope, d->k + row + rope, n_shared)) *
            (double)d->spec->softmax_scale;
        highest = fmax(highest, scores[t]);
    }
    memset(out, 0, dv * sizeof(*out));
    for (uint64_t t = 0; t < n_distinct; t++) {
        const size_t row =
            (fv_scale_token(item, layer, t) * (size_t)d->spec->n_kv_heads + kv_head) * dim;
        const uint64_t n_times = times_seen(d->spec, layer, position, (int32_t)kv_head, t);
        const double weight = (double)n_times * exp(scores[t] - highest);

        sum += weight;
        for (size_t i = 0; i < dv; i++) {
            out[i] += weight * (double)fv_bf16_to_f32(values[row + first + i]);
        }
    }
    for (size_t i = 0; i < dv; i++) {
        out[i] /= sum;
    }
}
