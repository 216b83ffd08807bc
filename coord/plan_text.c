/*
 * plan_text.c - the planner's one sentence.
 */
#include "coord/plan_text.h"

#include <stddef.h>
#include <string.h>

typedef struct text {
    char *out;
    size_t n;
} text_t;

static void put(text_t *t, const char *s)
{
    size_t n = strlen(s);
    size_t room = FV_PLAN_REASON_BYTES - 1 - t->n;

    n = (n < room) ? n : room;
    memcpy(&t->out[t->n], s, n);
    t->n += n;
    t->out[t->n] = '\0';
}

static void put_number(text_t *t, uint64_t value)
{
    char digits[24];
    size_t at = sizeof(digits) - 1;

    digits[at] = '\0';
    do {
        digits[--at] = (char)('0' + (int)(value % 10U));
        value /= 10U;
    } while (value > 0);
    put(t, &digits[at]);
}

/* Rounded to the nearest whole; what does not fit 64 bits is shown as the largest that does. */
static void put_rounded(text_t *t, double value)
{
    put_number(t, (value < 1.8e19) ? (uint64_t)(value + 0.5) : UINT64_MAX);
}

static void put_count(text_t *t, uint64_t n, const char *unit)
{
    put_number(t, n);
    put(t, " ");
    put(t, unit);
    put(t, (n == 1) ? "" : "s");
}

static const char *axis(const fv_plan_grid_t *g, const fv_model_spec_t *spec)
{
    if (fv_model_groups(spec) > 1) {
        return (g->n_ctx_parts > 1) ? "latent x context" : "latent";
    }
    if ((g->n_head_parts > 1) && (g->n_ctx_parts > 1)) {
        return "heads x context";
    }
    return (g->n_head_parts > 1) ? "heads" : ((g->n_ctx_parts > 1) ? "context" : "one rank");
}

static void put_latent_parts(text_t *t, const fv_model_spec_t *spec, int32_t n_head_parts)
{
    int32_t groups = fv_model_groups(spec);

    if (groups > 1) {
        put_number(t, (uint64_t)groups);
        put(t, " slices of ");
        put_number(t, (uint64_t)fv_model_stored_dim_v(spec));
        put(t, fv_model_is_approximate(spec) ? " dims, an approximation"
                                             : " dims, their scores added up");
    }
    if (n_head_parts > groups) {
        put(t, (groups > 1) ? "; " : "");
        put_number(t, (uint64_t)spec->n_q_heads);
        put(t, " query heads over ");
        put_count(t, (uint64_t)(n_head_parts / groups), "rank");
        put(t, ", the latent on each");
    }
}

static void put_parts(text_t *t, const fv_plan_why_t *w)
{
    const fv_plan_grid_t *g = w->grid;
    const fv_model_spec_t *spec = w->shape->spec;

    put(t, ": ");
    if (fv_model_is_latent(spec) && (g->n_head_parts > 1)) {
        put_latent_parts(t, spec, g->n_head_parts);
        put(t, (g->n_ctx_parts > 1) ? "; " : "");
    } else if (g->n_head_parts > 1) {
        put_number(t, (uint64_t)w->shape->spec->n_kv_heads);
        put(t, " KV heads over ");
        put_count(t, (uint64_t)g->n_head_parts, "rank");
        put(t, (g->n_ctx_parts > 1) ? " x " : "");
    }
    if (g->n_ctx_parts > 1) {
        put(t, "blocks of ");
        put_number(t, w->shape->shard_tokens);
        put(t, " tokens over ");
        put_count(t, (uint64_t)g->n_ctx_parts, "rank");
    }
    if (g->n_head_parts * g->n_ctx_parts > 1) {
        put(t, ", ");
    }
}

static void put_prediction(text_t *t, const fv_plan_why_t *w)
{
    put(t, "predicted ");
    put_rounded(t, w->grid->token_us);
    put(t, " us a token at ");
    put_number(t, w->shape->n_tokens);
    put(t, " tokens");
    if (fv_model_groups(w->shape->spec) > 1) {
        return; /* one rank can not hold it: nothing to compare with */
    }
    if (w->grid->n_head_parts * w->grid->n_ctx_parts > 1) {
        put(t, " against ");
        put_rounded(t, w->one_rank_us);
        put(t, " us on one");
    } else if (w->n_ranks_max == 1) {
        put(t, ", no other rank may be used");
    }
}

static void put_no_hint(text_t *t, const fv_plan_why_t *w)
{
    put(t, "no length hint, begins on rank ");
    put_number(t, w->first_rank);
    if (w->grid->n_ctx_parts > 1) {
        put(t, " and reaches the next each ");
        put_number(t, w->shape->shard_tokens);
        put(t, " tokens");
    }
}

static void put_memory(text_t *t, const fv_plan_why_t *w)
{
    if (w->memory == FV_PLAN_MEMORY_AMPLE) {
        return;
    }
    put(t, (w->memory == FV_PLAN_MEMORY_DECIDED) ? "; memory decided: " : "; memory is short: ");
    put_rounded(t, w->grid->rank_bytes / (1024.0 * 1024.0));
    put(t, " MiB a rank needed, ");
    put_rounded(t, w->room_bytes / (1024.0 * 1024.0));
    put(t, " MiB free");
}

void fv_plan_text(const fv_plan_why_t *why, char out[FV_PLAN_REASON_BYTES])
{
    text_t t = {.out = out};

    put(&t, axis(why->grid, why->shape->spec));
    put(&t, why->is_asked ? " (as asked)" : "");
    put_parts(&t, why);
    if (why->has_hint) {
        put_prediction(&t, why);
    } else {
        put_no_hint(&t, why);
    }
    put_memory(&t, why);
}
