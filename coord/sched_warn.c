/*
 * sched_warn.c - what RegisterModel says of a model that it accepts.
 */
#include "common/policy.h"
#include "coord/sched_internal.h"

#include <stdio.h>

static void add_warning(fv_register_response_t *response, const char *text)
{
    if (response->n_warnings < 4U) {
        (void)snprintf(response->warnings[response->n_warnings], sizeof(response->warnings[0]),
                       "%s", text);
        response->n_warnings++;
    }
}

/* Heads that leave a block to no one but the local window see less than their layer's context. */
static void warn_coverage(const fv_model_spec_t *spec, fv_register_response_t *response)
{
    for (int32_t i = 0; i < spec->n_policies; i++) {
        const fv_policy_t *p = &spec->policies[i];
        char text[sizeof(response->warnings[0])];
        int32_t n_layers = 0;
        int32_t first = 0;

        for (int32_t layer = spec->n_layers - 1; layer >= 0; layer--) {
            if (spec->layer_policy[layer] == i) {
                n_layers++;
                first = layer;
            }
        }
        if ((p->kind != FV_POLICY_S2) || (n_layers == 0) || (fv_s2_coverage(p) == p->vert_stride)) {
            continue;
        }
        (void)snprintf(
            text, sizeof(text),
            "S2 in %d layers (layer %d the first): no head reads %d of every %d blocks "
            "once they have left the %d local ones; dense layers between, more heads or a "
            "smaller stride would",
            n_layers, first, p->vert_stride - fv_s2_coverage(p), p->vert_stride, p->local_blocks);
        add_warning(response, text);
    }
}

void fv_sched_warn(const fv_model_spec_t *spec, fv_register_response_t *response)
{
    if ((spec->sharding.mode == FV_SHARDING_HEADS) && (spec->n_kv_heads == 1)) {
        add_warning(
            response,
            fv_model_is_latent(spec)
                ? "sharding.mode: HEADS keeps the whole latent cache on every rank; CONTEXT "
                  "is as exact and keeps it once"
                : "sharding.mode: HEADS cannot split one KV head; every session of this "
                  "model lives on one rank (CONTEXT would spread it)");
    }
    if (fv_model_adds_scores(spec)) {
        add_warning(response,
                    "sharding.exact: the scores of every token are exchanged before the softmax; "
                    "CONTEXT is as exact and exchanges one state a row");
    }
    if (fv_model_is_approximate(spec)) {
        add_warning(response,
                    "sharding.mode: LATENT is an approximation of the model (TPLA): each slice of "
                    "the latent has a softmax of its own; CONTEXT is exact");
    }
    warn_coverage(spec, response);
}
