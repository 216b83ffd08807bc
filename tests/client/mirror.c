/*
 * mirror.c - random requests and their fp64 answers.
 */
#include "tests/client/mirror.h"

#include "kernels/kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MISMATCHES_SHOWN 5

static void *must_calloc(size_t n, size_t n_bytes)
{
    void *p = calloc(n + 1, n_bytes); /* never 0 bytes */

    if (p == NULL) {
        (void)fprintf(stderr, "mirror: out of memory\n");
        abort();
    }
    return p;
}

static size_t k_row(const fovea_model_spec_t *s)
{
    return (size_t)s->n_kv_heads * s->head_dim_qk;
}

static size_t v_row(const fovea_model_spec_t *s)
{
    return (size_t)s->n_kv_heads * s->head_dim_v;
}

static size_t q_row(const fovea_model_spec_t *s)
{
    return (size_t)s->n_q_heads * s->head_dim_qk;
}

static size_t out_row(const fovea_model_spec_t *s)
{
    return (size_t)s->n_q_heads * s->head_dim_v;
}

void fv_mirror_init(fv_mirror_t *m,
                    const fovea_model_spec_t *spec,
                    const fovea_session_id_t *session,
                    uint32_t layer,
                    uint64_t tokens_max)
{
    *m = (fv_mirror_t){.spec = spec, .session = *session, .layer = layer, .tokens_max = tokens_max};
    m->k = must_calloc(tokens_max * k_row(spec), sizeof(double));
    m->v = must_calloc(tokens_max * v_row(spec), sizeof(double));
}

void fv_mirror_fork(fv_mirror_t *m,
                    const fv_mirror_t *from,
                    const fovea_session_id_t *session,
                    uint64_t n_tokens)
{
    fv_mirror_init(m, from->spec, session, from->layer, from->tokens_max);
    m->n_tokens = n_tokens;
    memcpy(m->k, from->k, n_tokens * k_row(m->spec) * sizeof(double));
    memcpy(m->v, from->v, n_tokens * v_row(m->spec) * sizeof(double));
}

void fv_mirror_fini(fv_mirror_t *m)
{
    free(m->k);
    free(m->v);
}

/* Rounds a wire value to the cache's dtype, as the service does when it appends. */
static double stored(float value, fovea_dtype_t kv_dtype)
{
    uint32_t element = 0;

    fv_store_element(&element, (fv_dtype_t)kv_dtype, 0, value);
    return (double)fv_load_element(&element, (fv_dtype_t)kv_dtype, 0);
}

static void *draw(size_t n, fovea_dtype_t dtype, fv_random_t *random)
{
    void *data = must_calloc(n, fovea_dtype_bytes(dtype));

    for (size_t i = 0; i < n; i++) {
        fv_store_element(data, (fv_dtype_t)dtype, i, 2.0F * fv_random_unit(random));
    }
    return data;
}

/* Appends tokens [first, first + n) of the wire tensors to a mirror. */
static void append(fv_mirror_t *m, const fv_exam_t *e, size_t first, size_t n)
{
    const fovea_model_spec_t *s = m->spec;
    fv_dtype_t dtype = (fv_dtype_t)e->request.dtype;

    if ((m->n_tokens + n) > m->tokens_max) {
        (void)fprintf(stderr, "mirror: tokens_max is too small\n");
        abort();
    }
    for (size_t i = 0; i < (n * k_row(s)); i++) {
        m->k[(m->n_tokens * k_row(s)) + i] =
            stored(fv_load_element(e->k, dtype, (first * k_row(s)) + i), s->kv_dtype);
    }
    for (size_t i = 0; i < (n * v_row(s)); i++) {
        m->v[(m->n_tokens * v_row(s)) + i] =
            stored(fv_load_element(e->v, dtype, (first * v_row(s)) + i), s->kv_dtype);
    }
    m->n_tokens += n;
}

void fv_exam_init(fv_exam_t *e,
                  fv_mirror_t **mirrors,
                  const uint32_t *n_tokens,
                  uint32_t n_items,
                  fovea_dtype_t dtype,
                  uint32_t flags,
                  fv_random_t *random)
{
    const fovea_model_spec_t *s = mirrors[0]->spec;
    bool is_append = (flags & FOVEA_ATTEND_QUERY_ONLY) == 0;
    size_t element = fovea_dtype_bytes(dtype);
    size_t total = 0;
    size_t first = 0;

    memset(e, 0, sizeof(*e));
    e->mirrors = must_calloc(n_items, sizeof(*e->mirrors));
    e->items = must_calloc(n_items, sizeof(*e->items));
    for (uint32_t i = 0; i < n_items; i++) {
        uint64_t back = is_append ? 0 : n_tokens[i];
        e->mirrors[i] = mirrors[i];
        e->items[i] =
            (fovea_attend_item_t){mirrors[i]->session, mirrors[i]->n_tokens - back, n_tokens[i]};
        total += n_tokens[i];
    }
    e->q = draw(total * q_row(s), dtype, random);
    e->out = must_calloc(total * out_row(s), element);
    memset(e->out, 0xFF, total * out_row(s) * element); /* NaN in every dtype */
    e->lse = must_calloc(total * s->n_q_heads, sizeof(float));
    memset(e->lse, 0xFF, total * s->n_q_heads * sizeof(float));
    e->request = (fovea_attend_request_t){.layer = mirrors[0]->layer,
                                          .dtype = dtype,
                                          .flags = flags,
                                          .n_items = n_items,
                                          .items = e->items,
                                          .q = e->q,
                                          .q_bytes = total * q_row(s) * element,
                                          .out = e->out,
                                          .out_bytes = total * out_row(s) * element,
                                          .lse = e->lse,
                                          .lse_bytes = total * s->n_q_heads * sizeof(float)};
    if (!is_append) {
        return;
    }
    e->request.k = e->k = draw(total * k_row(s), dtype, random);
    e->request.k_bytes = total * k_row(s) * element;
    e->request.v = e->v = draw(total * v_row(s), dtype, random);
    e->request.v_bytes = total * v_row(s) * element;
    for (uint32_t i = 0; i < n_items; i++) {
        append(mirrors[i], e, first, n_tokens[i]);
        first += n_tokens[i];
    }
}

void fv_exam_fini(fv_exam_t *e)
{
    free(e->mirrors);
    free(e->items);
    free(e->q);
    free(e->k);
    free(e->v);
    free(e->out);
    free(e->lse);
}

/* ------------------------------------------------------------------ check */

static fv_policy_t policy_of(const fovea_model_spec_t *s, uint32_t layer)
{
    fv_policy_t policy = {.kind = FV_POLICY_DENSE};

    for (uint32_t i = 0; i < s->n_policies; i++) {
        const fovea_policy_t *p = &s->policies[i];
        bool is_named = p->n_layers == 0;
        for (uint32_t j = 0; j < p->n_layers; j++) {
            is_named = is_named || (p->layers[j] == layer);
        }
        if (is_named) {
            policy = (fv_policy_t){.kind = (int32_t)p->kind,
                                   .window_tokens = (int32_t)p->window_tokens,
                                   .sink_tokens = (int32_t)p->sink_tokens,
                                   .block_tokens = (int32_t)p->s2.block_tokens,
                                   .local_blocks = (int32_t)p->s2.local_blocks,
                                   .vert_stride = (int32_t)p->s2.vert_stride,
                                   .head_sliding_step = p->s2.head_sliding_step,
                                   .head_sliding_offset = p->s2.head_sliding_offset,
                                   .num_dense_heads = (int32_t)p->s2.num_dense_heads,
                                   .homo_head = p->s2.homo_head ? 1 : 0,
                                   .pattern_per = (int32_t)p->s2.pattern_per};
            policy.n_heads = (int32_t)((p->s2.pattern_per == FOVEA_PATTERN_Q_HEAD) ? s->n_q_heads
                                                                                   : s->n_kv_heads);
        }
    }
    return policy;
}

/*
 * |got - ref| <= relative * |ref| + absolute: the result's rounding to its dtype; fp32 accumulation (bf16
 * weights may be two bf16 parts); and logits of size L known to L * 2^-24 only. Values are below 2.
 */
typedef struct fv_bounds {
    double relative, absolute, lse;
} fv_bounds_t;

static fv_bounds_t bounds_of(const fv_exam_t *e, const fovea_model_spec_t *s)
{
    static const double k_io[] = {0.0, 0x1p-22, 0x1p-11, 0x1p-8};
    static const double k_kv[] = {0.0, 1e-5, 1e-5, 2e-5};
    double scale = (s->softmax_scale != 0.0F) ? (double)s->softmax_scale
                                              : (1.0 / sqrt((double)s->head_dim_qk));
    double logit = ((scale * 4.0 * s->head_dim_qk) + (double)s->logit_softcap) * 0x1p-22;

    return (fv_bounds_t){.relative = k_io[e->request.dtype],
                         .absolute = 2.0 * (k_kv[s->kv_dtype] + logit),
                         .lse = 1e-5 + logit};
}

static size_t check_values(const fv_exam_t *e,
                           size_t first_row,
                           const double *out,
                           const double *lse,
                           size_t n_rows,
                           size_t n_bad)
{
    const fovea_model_spec_t *s = e->mirrors[0]->spec;
    const fv_bounds_t b = bounds_of(e, s);
    size_t dv = s->head_dim_v;

    for (size_t i = 0; i < (n_rows * dv); i++) {
        double got =
            (double)fv_load_element(e->out, (fv_dtype_t)e->request.dtype, (first_row * dv) + i);
        double allowed = (b.relative * fabs(out[i])) + b.absolute;
        if (!(fabs(got - out[i]) <= allowed) && (n_bad++ < MISMATCHES_SHOWN)) { /* NaN is bad too */
            (void)fprintf(stderr, "out[row %zu][%zu]: %.9g, oracle %.9g, allowed %.2g\n",
                          first_row + (i / dv), i % dv, got, out[i], allowed);
        }
    }
    for (size_t r = 0; r < n_rows; r++) {
        double got = (double)e->lse[first_row + r];
        if (!(fabs(got - lse[r]) <= (b.lse + (0x1p-21 * fabs(lse[r])))) &&
            (n_bad++ < MISMATCHES_SHOWN)) {
            (void)fprintf(stderr, "lse[row %zu]: %.9g, oracle %.9g\n", first_row + r, got, lse[r]);
        }
    }
    return n_bad;
}

size_t fv_exam_check(const fv_exam_t *e)
{
    size_t first = 0; /* token */
    size_t n_bad = 0;

    for (uint32_t i = 0; i < e->request.n_items; i++) {
        const fv_mirror_t *m = e->mirrors[i];
        const fovea_model_spec_t *s = m->spec;
        size_t n = e->items[i].n_tokens;
        size_t n_rows = n * s->n_q_heads;
        double *q = must_calloc(n * q_row(s), sizeof(double));
        double *out = must_calloc(n * out_row(s), sizeof(double));
        double *lse = must_calloc(n_rows, sizeof(double));
        for (size_t j = 0; j < (n * q_row(s)); j++) {
            q[j] =
                (double)fv_load_element(e->q, (fv_dtype_t)e->request.dtype, (first * q_row(s)) + j);
        }
        fv_attend_ref(&(fv_attend_ref_params_t){
            .n_tokens = (int64_t)n,
            .position = (int64_t)e->items[i].position,
            .kv_end = (int64_t)m->n_tokens,
            .n_kv_heads = (int32_t)s->n_kv_heads,
            .group = (int32_t)(s->n_q_heads / s->n_kv_heads),
            .head_dim_qk = (int32_t)s->head_dim_qk,
            .head_dim_v = (int32_t)s->head_dim_v,
            .softmax_scale = (s->softmax_scale != 0.0F) ? (double)s->softmax_scale
                                                        : (1.0 / sqrt((double)s->head_dim_qk)),
            .logit_softcap = (double)s->logit_softcap,
            .causal = (e->request.flags & FOVEA_ATTEND_NOT_CAUSAL) == 0,
            .policy = policy_of(s, m->layer),
            .q = q,
            .k = m->k,
            .v = m->v,
            .out = out,
            .lse = lse,
        });
        n_bad = check_values(e, first * s->n_q_heads, out, lse, n_rows, n_bad);
        first += n;
        free(q);
        free(out);
        free(lse);
    }
    return n_bad;
}

fovea_code_t fv_exam_run(fovea_client_t *client,
                         fv_mirror_t *m,
                         uint32_t n_tokens,
                         fovea_dtype_t dtype,
                         uint32_t flags,
                         fv_random_t *random,
                         size_t *n_bad,
                         fovea_error_t *error)
{
    fv_exam_t e;
    fovea_code_t code = FOVEA_OK;

    fv_exam_init(&e, &m, &n_tokens, 1, dtype, flags, random);
    code = fovea_attend(client, &e.request, 0, NULL, error);
    *n_bad = (code == FOVEA_OK) ? fv_exam_check(&e) : 0;
    fv_exam_fini(&e);
    return code;
}
