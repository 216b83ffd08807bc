/*
 * record.c - what the service must hold, and answer.
 */
#include "tests/history/history.h"

#include <math.h>
#include <string.h>

#define TOLERANCE 2e-4

uint32_t hs_longest(const hs_session_t *s)
{
    return (s->layers[0].n_tokens > s->layers[1].n_tokens) ? s->layers[0].n_tokens
                                                           : s->layers[1].n_tokens;
}

void hs_cut(hs_session_t *s, uint32_t position)
{
    for (int i = 0; i < HS_LAYERS; i++) {
        hs_layer_t *l = &s->layers[i];
        l->n_tokens = (l->n_tokens < position) ? l->n_tokens : position;
        while ((l->n_log > 0) &&
               (l->log[l->n_log - 1U].position + l->log[l->n_log - 1U].n_tokens > l->n_tokens)) {
            l->n_log--;
        }
    }
}

fovea_code_t hs_expect(const hs_request_t *r, uint32_t item)
{
    const hs_item_t *at = &r->items[item];
    const hs_layer_t *l = &at->session->layers[r->layer];

    if (at->position > l->n_tokens) {
        return FOVEA_OUT_OF_RANGE;
    }
    if (!r->append || (at->position == l->n_tokens)) {
        return FOVEA_OK;
    }
    for (uint32_t i = 0; i < l->n_log; i++) {
        if ((l->log[i].position == at->position) && (l->log[i].n_tokens == at->n_tokens) &&
            (memcmp(&l->tokens[at->position], at->tokens, at->n_tokens * sizeof(uint32_t)) == 0)) {
            return FOVEA_OK;
        }
    }
    return FOVEA_FAILED_PRECONDITION;
}

void hs_apply(const hs_request_t *r)
{
    for (uint32_t i = 0; r->append && (i < r->n_items); i++) {
        const hs_item_t *at = &r->items[i];
        hs_layer_t *l = &at->session->layers[r->layer];
        if (at->position == l->n_tokens) {
            memcpy(&l->tokens[l->n_tokens], at->tokens, at->n_tokens * sizeof(uint32_t));
            l->log[l->n_log].position = at->position;
            l->log[l->n_log++].n_tokens = at->n_tokens;
            l->n_tokens += at->n_tokens;
        }
    }
}

static void make_kv(uint32_t token, float *k, float *v)
{
    fv_random_t random = {.state = token * 0x9e3779b97f4a7c15U};

    for (int d = 0; d < HS_DIM; d++) {
        k[d] = fv_random_unit(&random);
        v[d] = fv_random_unit(&random);
    }
}

/* A row over tokens [0, n) of a layer: is the answer's? */
static bool is_row_right(uint32_t n,
                         float (*k)[HS_DIM],
                         float (*v)[HS_DIM],
                         const float *q,
                         const float *out,
                         float lse)
{
    double scores[HS_TOKENS_MAX];
    double most = -INFINITY;
    double sum = 0.0;

    for (uint32_t i = 0; i < n; i++) {
        scores[i] = 0.0;
        for (int d = 0; d < HS_DIM; d++) {
            scores[i] += (double)q[d] * (double)k[i][d];
        }
        scores[i] /= 4.0; /* sqrt(HS_DIM) */
        most = (scores[i] > most) ? scores[i] : most;
    }
    for (uint32_t i = 0; i < n; i++) {
        scores[i] = exp(scores[i] - most);
        sum += scores[i];
    }
    for (int d = 0; d < HS_DIM; d++) {
        double expected = 0.0;
        for (uint32_t i = 0; i < n; i++) {
            expected += scores[i] / sum * (double)v[i][d];
        }
        if (!(fabs(expected - (double)out[d]) <= TOLERANCE)) {
            return false;
        }
    }
    return (n == 0) ? (isinf(lse) && (lse < 0.0F))
                    : (fabs(most + log(sum) - (double)lse) <= TOLERANCE);
}

bool hs_is_right(const hs_request_t *r)
{
    static _Thread_local float k[HS_TOKENS_MAX][HS_DIM], v[HS_TOKENS_MAX][HS_DIM]; /* large */
    uint32_t row = 0;

    for (uint32_t i = 0; i < r->n_items; i++) {
        const hs_item_t *at = &r->items[i];
        const hs_layer_t *l = &at->session->layers[r->layer];
        for (uint32_t t = 0; t < l->n_tokens; t++) {
            make_kv(l->tokens[t], k[t], v[t]);
        }
        for (uint32_t t = 0; t < at->n_tokens; t++) {
            uint32_t n = at->position + t + 1U;
            n = (n < l->n_tokens) ? n : l->n_tokens;
            for (uint32_t h = 0; h < HS_Q_HEADS; h++, row++) {
                if (!is_row_right(n, k, v, &r->q[(size_t)row * HS_DIM],
                                  &r->out[(size_t)row * HS_DIM], r->lse[row])) {
                    return false;
                }
            }
        }
    }
    return true;
}

void hs_fill(hs_request_t *r, fv_random_t *random)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < r->n_items; i++) {
        const hs_item_t *at = &r->items[i];
        r->wire_items[i] = (fovea_attend_item_t){
            .session = at->session->id, .position = at->position, .n_tokens = at->n_tokens};
        for (uint32_t t = 0; t < at->n_tokens; t++, n++) {
            make_kv(at->tokens[t], &r->k[(size_t)n * HS_DIM], &r->v[(size_t)n * HS_DIM]);
        }
    }
    r->n_tokens = n;
    for (size_t i = 0; i < (size_t)n * HS_Q_HEADS * HS_DIM; i++) {
        r->q[i] = 2.0F * fv_random_unit(random);
    }
}

fovea_attend_request_t hs_message(hs_request_t *r)
{
    size_t kv_bytes = r->append ? (r->n_tokens * HS_DIM * sizeof(float)) : 0U;

    memset(r->out, 0xff, sizeof(r->out));
    memset(r->lse, 0xff, sizeof(r->lse));
    return (fovea_attend_request_t){
        .layer = r->layer,
        .dtype = FOVEA_DTYPE_F32,
        .flags = r->append ? 0U : FOVEA_ATTEND_QUERY_ONLY,
        .n_items = r->n_items,
        .items = r->wire_items,
        .q = r->q,
        .q_bytes = (size_t)r->n_tokens * HS_Q_HEADS * HS_DIM * sizeof(float),
        .k = r->append ? r->k : NULL,
        .k_bytes = kv_bytes,
        .v = r->append ? r->v : NULL,
        .v_bytes = kv_bytes,
        .out = r->out,
        .out_bytes = (size_t)r->n_tokens * HS_Q_HEADS * HS_DIM * sizeof(float),
        .lse = r->lse,
        .lse_bytes = (size_t)r->n_tokens * HS_Q_HEADS * sizeof(float),
    };
}
