/*
 * attn_case.c - see attn_case.h.
 */
#include "tests/support/attn_case.h"

#include "tests/support/fp8_ref.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MISMATCHES_SHOWN 5U

uint64_t fv_rng_next(fv_rng_t *rng)
{
    uint64_t z = (rng->state += 0x9e3779b97f4a7c15ULL);

    z = (z ^ (z >> 30U)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27U)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31U);
}

int64_t fv_rng_range(fv_rng_t *rng, int64_t low, int64_t high)
{
    return low + (int64_t)(fv_rng_next(rng) % (uint64_t)(high - low + 1));
}

float fv_rng_normal(fv_rng_t *rng)
{
    /* four 16-bit uniforms: variance 4/12 each unit width, scaled to 1 */
    uint64_t bits = fv_rng_next(rng);
    float sum = (float)(bits & 0xffffU) + (float)((bits >> 16U) & 0xffffU) +
                (float)((bits >> 32U) & 0xffffU) + (float)(bits >> 48U);

    return (sum / 65536.0F - 2.0F) * 1.7320508F;
}

uint64_t fv_test_seed(uint64_t fallback)
{
    const char *text = getenv("FV_SEED");
    uint64_t seed = (text != NULL) ? strtoull(text, NULL, 0) : fallback;

    (void)printf("FV_SEED=%" PRIu64 "\n", seed);
    return seed;
}

static void *must_alloc(size_t n_elems, size_t elem_bytes)
{
    void *memory = calloc((n_elems > 0U) ? n_elems : 1U, elem_bytes);

    if (memory == NULL) {
        (void)fprintf(stderr, "attn_case: no memory for %zu x %zu bytes\n", n_elems, elem_bytes);
        abort();
    }
    return memory;
}

static int32_t pick_dtype(fv_rng_t *rng)
{
    return (int32_t)fv_rng_range(rng, FV_DTYPE_F32, FV_DTYPE_BF16);
}

static int32_t pick_dim(fv_rng_t *rng)
{
    static const int32_t k_usual[] = {64, 128, 96, 80, 256, 192, 32};

    if (fv_rng_range(rng, 0, 1) == 0) {
        return k_usual[fv_rng_range(rng, 0, 6)];
    }
    return (int32_t)fv_rng_range(rng, FV_HEAD_DIM_MIN / 8, FV_HEAD_DIM_MAX / 8) * 8;
}

static void pick_policy(fv_rng_t *rng, fv_attn_spec_t *spec)
{
    spec->causal = fv_rng_range(rng, 0, 3) != 0;
    spec->policy.kind = FV_POLICY_DENSE;
    if (fv_rng_range(rng, 0, 2) == 0) {
        spec->policy.kind = FV_POLICY_WINDOW;
        spec->policy.window_tokens = (int32_t)fv_rng_range(rng, 1, 300);
        spec->policy.sink_tokens =
            (int32_t)fv_rng_range(rng, 0, 1) * (int32_t)fv_rng_range(rng, 0, 200);
    }
}

fv_policy_t fv_s2_random(fv_rng_t *rng, int32_t n_q_heads, int32_t n_kv_heads)
{
    fv_policy_t p = {.kind = FV_POLICY_S2};

    p.block_tokens = 16 << fv_rng_range(rng, 0, 4);
    p.local_blocks = (int32_t)fv_rng_range(rng, 1, (fv_rng_range(rng, 0, 3) == 0) ? 20 : 4);
    p.vert_stride = (int32_t)fv_rng_range(rng, 1, (fv_rng_range(rng, 0, 3) == 0) ? 70 : 9);
    p.pattern_per = (int32_t)fv_rng_range(rng, FV_PATTERN_KV_HEAD, FV_PATTERN_Q_HEAD);
    p.n_heads = (p.pattern_per == FV_PATTERN_Q_HEAD) ? n_q_heads : n_kv_heads;
    p.homo_head = fv_rng_range(rng, 0, 4) == 0;
    if (fv_rng_range(rng, 0, 1) == 0) {
        p.head_sliding_step = (p.vert_stride > n_q_heads) ? (p.vert_stride / n_q_heads) : 1;
    } else {
        p.head_sliding_step = (int32_t)fv_rng_range(rng, -9, 9);
    }
    p.head_sliding_offset = (int32_t)fv_rng_range(rng, 0, 1) * (int32_t)fv_rng_range(rng, -99, 99);
    if ((p.homo_head == 0) && (fv_rng_range(rng, 0, 3) == 0)) {
        p.num_dense_heads = (int32_t)fv_rng_range(rng, 0, p.n_heads);
    }
    return p;
}

fv_attn_spec_t fv_attn_spec_random(fv_rng_t *rng, int64_t macs)
{
    fv_attn_spec_t spec;
    int64_t per_token = 0;
    int64_t longest = 0;

    memset(&spec, 0, sizeof(spec));
    spec.n_kv_heads = (int32_t)fv_rng_range(rng, 1, 4);
    spec.group = (int32_t)((fv_rng_range(rng, 0, 7) == 0) ? fv_rng_range(rng, 9, 128)
                                                          : fv_rng_range(rng, 1, 8));
    spec.n_tokens = (int32_t)((fv_rng_range(rng, 0, 1) == 0) ? 1 : fv_rng_range(rng, 1, 40));
    spec.head_dim_qk = pick_dim(rng);
    spec.head_dim_v = (fv_rng_range(rng, 0, 1) == 0) ? spec.head_dim_qk : pick_dim(rng);
    spec.io_dtype = pick_dtype(rng);
    spec.kv_dtype = pick_dtype(rng);
    spec.softmax_scale = (fv_rng_range(rng, 0, 2) == 0) ? 0.1F : 0.0F;
    spec.logit_softcap = (fv_rng_range(rng, 0, 3) == 0) ? (float)fv_rng_range(rng, 1, 50) : 0.0F;
    spec.q_amplitude = (fv_rng_range(rng, 0, 5) == 0) ? 30.0F : 1.0F;
    pick_policy(rng, &spec);
    per_token = (int64_t)spec.n_tokens * spec.n_kv_heads * spec.group *
                (spec.head_dim_qk * 2 + spec.head_dim_v);
    longest = fv_max64(1, fv_min64(1500, macs / per_token));
    spec.kv_end = fv_rng_range(rng, 0, longest);
    /* usually the query's tokens are the newest; sometimes they lie before the end */
    spec.position = fv_max64(0, spec.kv_end - spec.n_tokens);
    if (fv_rng_range(rng, 0, 3) == 0) {
        spec.position = fv_rng_range(rng, 0, spec.kv_end + 10);
    }
    spec.shard_tokens = FV_PAGE_TOKENS * (uint32_t)fv_rng_range(rng, 1, 3);
    spec.seed = fv_rng_next(rng);
    return spec;
}

void fv_attn_spec_maybe_s2(fv_rng_t *rng, fv_attn_spec_t *spec)
{
    int32_t n_kv_heads = spec->n_kv_heads + (int32_t)fv_rng_range(rng, 0, 6);

    if (fv_rng_range(rng, 0, 1) == 0) {
        return;
    }
    spec->causal = true;
    spec->kv_head_begin = (int32_t)fv_rng_range(rng, 0, n_kv_heads - spec->n_kv_heads);
    spec->policy = fv_s2_random(rng, n_kv_heads * spec->group, n_kv_heads);
}

void fv_attn_spec_latent(fv_attn_spec_t *spec, fv_rng_t *rng, int64_t macs)
{
    static const int32_t k_latent[] = {512, 256, 64, 1024, 128, 320, 40, 32};
    static const int32_t k_groups[] = {1, 16, 32, 64, 128, 3, 9, 63, 126};
    int64_t per_token = 0;

    spec->v_in_k = true;
    spec->n_kv_heads = (fv_rng_range(rng, 0, 5) == 0) ? 2 : 1;
    spec->group = k_groups[fv_rng_range(rng, 0, (int64_t)(sizeof(k_groups) / sizeof(int32_t)) - 1)];
    spec->head_dim_v = k_latent[fv_rng_range(rng, 0, 7)];
    spec->head_dim_qk =
        spec->head_dim_v +
        (int32_t)((fv_rng_range(rng, 0, 1) == 0) ? 64 : 8 * fv_rng_range(rng, 0, 16));
    spec->n_tokens = (int32_t)((fv_rng_range(rng, 0, 1) == 0) ? 1 : fv_rng_range(rng, 2, 6));
    spec->softmax_scale = 0.07F;
    spec->latent_mu = (fv_rng_range(rng, 0, 3) == 0) ? 1.7F : 0.0F;
    if (fv_rng_range(rng, 0, 3) ==
        0) { /* in fp32: a value that is rounded the other way is no error */
        spec->norm_alpha = 0.6F;
        spec->kv_dtype = FV_DTYPE_F32;
    }
    per_token = (int64_t)spec->n_tokens * spec->n_kv_heads * spec->group *
                (spec->head_dim_qk * 2 + spec->head_dim_v);
    spec->kv_end = fv_rng_range(rng, 0, fv_max64(70, fv_min64(1500, macs / per_token)));
    spec->position = fv_max64(0, spec->kv_end - spec->n_tokens);
}

void fv_attn_spec_print(const fv_attn_spec_t *s)
{
    (void)printf(
        "  tokens %d position %" PRId64 " kv_end %" PRId64 " heads %dx%d dims %d/%d io %s "
        "kv %s scale %g softcap %g causal %d policy %d window %d sink %d "
        "s2 %d/%d/%d step %d offset %d dense %d homo %d per %d of %d from head %d shard %u parts %u "
        "amplitude %g latent %d mu %g norm %g spoil %" PRId64 " seed %" PRIu64 "\n",
        s->n_tokens, s->position, s->kv_end, s->n_kv_heads, s->group, s->head_dim_qk, s->head_dim_v,
        fv_dtype_str(s->io_dtype), fv_dtype_str(s->kv_dtype), (double)s->softmax_scale,
        (double)s->logit_softcap, s->causal, s->policy.kind, s->policy.window_tokens,
        s->policy.sink_tokens, s->policy.block_tokens, s->policy.local_blocks,
        s->policy.vert_stride, s->policy.head_sliding_step, s->policy.head_sliding_offset,
        s->policy.num_dense_heads, s->policy.homo_head, s->policy.pattern_per, s->policy.n_heads,
        s->kv_head_begin, s->shard_tokens, s->n_parts, (double)s->q_amplitude, s->v_in_k,
        (double)s->latent_mu, (double)s->norm_alpha, s->spoil_token, s->seed);
}

static void fill(void *data, int32_t dtype, size_t n, float amplitude, float mean, fv_rng_t *rng)
{
    for (size_t i = 0; i < n; i++) {
        fv_store_element(data, (fv_dtype_t)dtype, i, fv_rng_normal(rng) * amplitude + mean);
    }
}

/* Does any query head of the KV head, in a row at position p, see token j? */
static bool row_sees(const fv_attn_spec_t *s, int32_t kv_head, int64_t p, int64_t j)
{
    const fv_policy_t *s2 = &s->policy;
    bool seen = !s->causal || (j <= p);

    if (s->policy.kind == FV_POLICY_WINDOW) {
        seen = seen && ((llabs((long long)(p - j)) < s->policy.window_tokens) ||
                        (j < s->policy.sink_tokens));
    }
    if (seen && (s->policy.kind == FV_POLICY_S2)) {
        seen = p / s2->block_tokens - j / s2->block_tokens < s2->local_blocks;
        for (int32_t g = 0; !seen && (g < s->group); g++) {
            int32_t head = fv_policy_head(s2, s->kv_head_begin + kv_head, s->group, g);

            seen = fv_policy_is_dense(s2, head) ||
                   ((j / s2->block_tokens + (int64_t)head * s2->head_sliding_step +
                     s2->head_sliding_offset) %
                        s2->vert_stride ==
                    0);
        }
    }
    return seen;
}

/* Tokens that no row sees become NaN, for each KV head its own; spoil_token gets one NaN in K and one in V. */
static void poison(fv_attn_case_t *attn)
{
    const fv_attn_spec_t *s = &attn->spec;
    size_t dk = (size_t)s->head_dim_qk;
    size_t dv = (size_t)s->head_dim_v;
    size_t k_row = (size_t)s->n_kv_heads * dk;
    size_t v_row = (size_t)s->n_kv_heads * dv;
    fv_dtype_t io = (fv_dtype_t)s->io_dtype;

    for (int64_t i = 0; i < s->kv_end * s->n_kv_heads; i++) {
        bool seen = false;
        for (int64_t t = 0; !seen && (t < s->n_tokens); t++) {
            seen = row_sees(s, (int32_t)(i % s->n_kv_heads), s->position + t, i / s->n_kv_heads);
        }
        for (size_t d = 0; !seen && (d < dk); d++) {
            fv_store_element(attn->k, io, (size_t)i * dk + d, NAN);
        }
        for (size_t d = 0; !seen && (d < dv); d++) {
            fv_store_element(attn->v, io, (size_t)i * dv + d, NAN);
        }
    }
    if (s->spoil_token > 0) { /* V of head 0, K of the last head */
        size_t j = (size_t)s->spoil_token - 1U;
        if (s->v_in_k && ((s->seed % 2U) == 0U)) {
            fv_store_element(attn->k, io, j * k_row + (s->seed % (uint64_t)s->head_dim_v), NAN);
        }
        fv_store_element(attn->v, io, j * v_row + (s->seed % (uint64_t)s->head_dim_v), NAN);
        fv_store_element(attn->k, io, (j + 1U) * k_row - 1U, NAN);
    }
}

/* Stored values in fp64, and the largest row norm (K) or element (V). */
static double *widen_stored(const void *src,
                            const fv_attn_spec_t *s,
                            size_t n_rows,
                            size_t dim,
                            bool norm,
                            double *bound)
{
    double *out = must_alloc(n_rows * dim, sizeof(*out));
    uint8_t stored[4] = {0};

    for (size_t r = 0; r < n_rows; r++) {
        double square = 0.0;
        for (size_t d = 0; d < dim; d++) {
            float x = fv_load_element(src, (fv_dtype_t)s->io_dtype, r * dim + d);
            fv_store_element(stored, (fv_dtype_t)s->kv_dtype, 0, x);
            x = fv_load_element(stored, (fv_dtype_t)s->kv_dtype, 0);
            out[r * dim + d] = (double)x;
            square += (double)x * (double)x;
            if (!norm && isfinite(x)) {
                *bound = fmax(*bound, fabs((double)x));
            }
        }
        if (norm && isfinite(square)) {
            *bound = fmax(*bound, sqrt(square));
        }
    }
    return out;
}

/* What an append with norm_alpha stores of dims [0, dv) of each row, before it is rounded. */
static void normalise_rows(void *k, const fv_attn_spec_t *s, size_t n_rows)
{
    size_t dk = (size_t)s->head_dim_qk;
    size_t dv = (size_t)s->head_dim_v;
    float *rows = k;

    for (size_t r = 0; r < n_rows; r++) {
        double sum = 0.0;
        for (size_t d = 0; d < dv; d++) {
            sum += (double)rows[r * dk + d] * (double)rows[r * dk + d];
        }
        for (size_t d = 0; d < dv; d++) {
            rows[r * dk + d] /=
                (float)sqrt((double)s->norm_alpha * sum / (double)dv + (double)FV_ATTN_NORM_EPS);
        }
    }
}

/* K as the cache sees it in fp32: normalised if asked for; V is the first dims of each row. */
static float *latent_rows(fv_attn_case_t *attn, size_t n_rows)
{
    const fv_attn_spec_t *s = &attn->spec;
    size_t dk = (size_t)s->head_dim_qk;
    float *rows = must_alloc(n_rows * dk, sizeof(*rows));

    fv_load_row(rows, attn->k, (fv_dtype_t)s->io_dtype, n_rows * dk);
    if (s->norm_alpha > 0.0F) {
        normalise_rows(rows, s, n_rows);
    }
    for (size_t r = 0; (s->kv_dtype == (int32_t)FV_DTYPE_FP8_LATENT) && (r < n_rows); r++) {
        fv_fp8_row_ref(rows + r * dk, dk, (size_t)s->head_dim_v);
    }
    return rows;
}

/* k_ref and v_ref of a latent case. */
static void widen_latent(fv_attn_case_t *attn, size_t n_rows)
{
    fv_attn_spec_t s = attn->spec;
    size_t dk = (size_t)s.head_dim_qk;
    size_t dv = (size_t)s.head_dim_v;
    float *rows = latent_rows(attn, n_rows);
    float *v = must_alloc(n_rows * dv, sizeof(*v));

    for (size_t r = 0; r < n_rows; r++) {
        memcpy(v + r * dv, rows + r * dk, dv * sizeof(*v));
    }
    s.io_dtype = FV_DTYPE_F32;
    if (s.kv_dtype == (int32_t)FV_DTYPE_FP8_LATENT) { /* rounded already */
        s.kv_dtype = FV_DTYPE_F32;
    }
    attn->k_ref = widen_stored(rows, &s, n_rows, dk, true, &attn->logit_bound);
    attn->v_ref = widen_stored(v, &s, n_rows, dv, false, &attn->v_bound);
    if (s.latent_mu > 1.0F) {
        attn->logit_bound *= (double)s.latent_mu;
    }
    free(rows);
    free(v);
}

static double largest_norm(const void *q, int32_t dtype, size_t n_rows, size_t dim)
{
    double largest = 0.0;

    for (size_t r = 0; r < n_rows; r++) {
        double square = 0.0;
        for (size_t d = 0; d < dim; d++) {
            double x = (double)fv_load_element(q, (fv_dtype_t)dtype, r * dim + d);
            square += x * x;
        }
        largest = fmax(largest, sqrt(square));
    }
    return largest;
}

fv_attn_case_t *fv_attn_case_create(const fv_attn_spec_t *spec)
{
    fv_attn_case_t *attn = must_alloc(1, sizeof(*attn));
    fv_attn_spec_t *s = &attn->spec;
    size_t e = 0;
    size_t n_kv_rows = 0;
    fv_rng_t rng = {spec->seed};

    *s = *spec;
    s->softmax_scale =
        (s->softmax_scale == 0.0F) ? (1.0F / sqrtf((float)s->head_dim_qk)) : s->softmax_scale;
    s->q_amplitude = (s->q_amplitude == 0.0F) ? 1.0F : s->q_amplitude;
    s->shard_tokens = (s->shard_tokens == 0U) ? FV_PAGE_TOKENS : s->shard_tokens;
    s->n_parts = (s->n_parts == 0U) ? 1U : s->n_parts;
    attn->n_q_heads = s->n_kv_heads * s->group;
    e = fv_dtype_bytes((fv_dtype_t)s->io_dtype);
    n_kv_rows = (size_t)s->kv_end * (size_t)s->n_kv_heads;
    attn->q = must_alloc(fv_attn_case_rows(attn) * (size_t)s->head_dim_qk, e);
    attn->k = must_alloc(n_kv_rows * (size_t)s->head_dim_qk, e);
    attn->v = must_alloc(n_kv_rows * (size_t)s->head_dim_v, e);
    fill(attn->q, s->io_dtype, fv_attn_case_rows(attn) * (size_t)s->head_dim_qk, s->q_amplitude,
         0.0F, &rng);
    fill(attn->k, s->io_dtype, n_kv_rows * (size_t)s->head_dim_qk, 1.0F, 0.0F, &rng);
    fill(attn->v, s->io_dtype, n_kv_rows * (size_t)s->head_dim_v, 1.0F, s->v_mean, &rng);
    if (!s->tame) {
        poison(attn);
    }
    if (s->v_in_k) {
        widen_latent(attn, n_kv_rows);
    } else {
        attn->k_ref =
            widen_stored(attn->k, s, n_kv_rows, (size_t)s->head_dim_qk, true, &attn->logit_bound);
        attn->v_ref =
            widen_stored(attn->v, s, n_kv_rows, (size_t)s->head_dim_v, false, &attn->v_bound);
    }
    attn->logit_bound *=
        (double)s->softmax_scale *
        largest_norm(attn->q, s->io_dtype, fv_attn_case_rows(attn), (size_t)s->head_dim_qk);
    return attn;
}

void fv_attn_case_destroy(fv_attn_case_t *attn)
{
    if (attn == NULL) {
        return;
    }
    free(attn->q);
    free(attn->k);
    free(attn->v);
    free(attn->k_ref);
    free(attn->v_ref);
    free(attn->out_ref);
    free(attn->lse_ref);
    free(attn->pages);
    free(attn);
}

size_t fv_attn_case_rows(const fv_attn_case_t *attn)
{
    return (size_t)attn->spec.n_tokens * (size_t)attn->n_q_heads;
}

size_t fv_attn_case_out_bytes(const fv_attn_case_t *attn)
{
    return fv_attn_case_rows(attn) * (size_t)attn->spec.head_dim_v *
           fv_dtype_bytes((fv_dtype_t)attn->spec.io_dtype);
}

void fv_attn_case_solve(fv_attn_case_t *attn)
{
    const fv_attn_spec_t *s = &attn->spec;
    size_t n_rows = fv_attn_case_rows(attn);
    double *q = NULL;
    fv_attend_ref_params_t params;

    if (attn->out_ref != NULL) {
        return;
    }
    q = must_alloc(n_rows * (size_t)s->head_dim_qk, sizeof(*q));
    for (size_t i = 0; i < n_rows * (size_t)s->head_dim_qk; i++) {
        q[i] = (double)fv_load_element(attn->q, (fv_dtype_t)s->io_dtype, i);
        if ((s->latent_mu != 0.0F) && (i % (size_t)s->head_dim_qk < (size_t)s->head_dim_v)) {
            q[i] *= (double)s->latent_mu;
        }
    }
    attn->out_ref = must_alloc(n_rows * (size_t)s->head_dim_v, sizeof(double));
    attn->lse_ref = must_alloc(n_rows, sizeof(double));
    memset(&params, 0, sizeof(params));
    params.n_tokens = s->n_tokens;
    params.position = s->position;
    params.kv_end = s->kv_end;
    params.n_kv_heads = s->n_kv_heads;
    params.group = s->group;
    params.kv_head_begin = s->kv_head_begin;
    params.head_dim_qk = s->head_dim_qk;
    params.head_dim_v = s->head_dim_v;
    params.softmax_scale = (double)s->softmax_scale;
    params.logit_softcap = (double)s->logit_softcap;
    params.causal = s->causal;
    params.policy = s->policy;
    params.q = q;
    params.k = attn->k_ref;
    params.v = attn->v_ref;
    params.out = attn->out_ref;
    params.lse = attn->lse_ref;
    fv_attend_ref(&params);
    free(q);
}

fv_tolerance_t fv_attn_tolerance(const fv_attn_case_t *attn)
{
    static const double k_io[] = {0.0, 0x1p-22, 0x1p-11, 0x1p-8};
    static const double k_kv[] = {0.0, 1e-5, 1e-5, 2e-5, 1e-5};
    static const double k_one_part[] = {0.0, 0.0, 0x1p-11, 0x1p-8, 0.0};
    const fv_attn_spec_t *s = &attn->spec;
    double logit = (attn->logit_bound + (double)s->logit_softcap) * 0x1p-22;
    fv_tolerance_t tolerance;

    tolerance.relative = k_io[s->io_dtype];
    tolerance.absolute = k_kv[s->kv_dtype] + (s->one_part ? k_one_part[s->kv_dtype] : 0.0) + logit;
    tolerance.lse = 1e-5 + logit;
    return tolerance;
}

/* A non-finite oracle value asks for a non-finite result; which one is not asked. */
static bool is_close(double got, double ref, double allowed)
{
    if (!isfinite(ref)) {
        return !isfinite(got);
    }
    return fabs(got - ref) <= allowed;
}

static bool lse_is_close(double got, double ref, double allowed)
{
    if (isinf(ref) && (ref < 0.0)) { /* the empty set is exact */
        return isinf(got) && (got < 0.0);
    }
    return is_close(got, ref, allowed + 0x1p-21 * fabs(ref));
}

size_t
fv_attn_case_check(const fv_attn_case_t *attn, const void *out, const float *lse, const char *name)
{
    const fv_attn_spec_t *s = &attn->spec;
    fv_tolerance_t tolerance = fv_attn_tolerance(attn);
    size_t dv = (size_t)s->head_dim_v;
    size_t n_bad = 0;

    for (size_t i = 0; i < fv_attn_case_rows(attn) * dv; i++) {
        double got = (double)fv_load_element(out, (fv_dtype_t)s->io_dtype, i);
        double ref = attn->out_ref[i];
        double allowed = tolerance.relative * fabs(ref) + tolerance.absolute * attn->v_bound;

        if (!is_close(got, ref, allowed) && (n_bad++ < MISMATCHES_SHOWN)) {
            (void)printf("%s: out[row %zu][%zu] = %.8g, oracle %.8g, allowed %.2g\n", name, i / dv,
                         i % dv, got, ref, allowed);
        }
    }
    for (size_t r = 0; (lse != NULL) && (r < fv_attn_case_rows(attn)); r++) {
        if (!lse_is_close((double)lse[r], attn->lse_ref[r], tolerance.lse) &&
            (n_bad++ < MISMATCHES_SHOWN)) {
            (void)printf("%s: lse[row %zu] = %.8g, oracle %.8g, allowed %.2g\n", name, r,
                         (double)lse[r], attn->lse_ref[r], tolerance.lse);
        }
    }
    if (n_bad > 0) {
        fv_attn_spec_print(s);
    }
    return n_bad;
}
