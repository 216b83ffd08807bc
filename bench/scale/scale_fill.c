/*
 * scale_fill.c - what the sessions of a case hold before its steps: put in place, or by prefill steps.
 */
#include "bench/scale/scale.h"

#define APPENDS_AT_ONCE 256

static fv_layer_kv_t *layer_of(const fv_scale_run_t *run, uint32_t item, uint32_t layer)
{
    fv_session_t *session = fv_worker_session(run->r->worker, item);

    return (session->layers == NULL) ? NULL : &session->layers[layer];
}

static void append(const fv_scale_run_t *run, const fv_append_item_t *appends, size_t n)
{
    fv_worker_t *w = run->r->worker;

    if (n > 0U) {
        fv_scale_check(run->r->backend->append(w->backend, appends, n), "append");
        fv_scale_check(fv_worker_finish(w, NULL), "append");
    }
}

/* Appends tokens [begin, end) of the part that this rank holds, without attending to them. */
static void
put_tokens(const fv_scale_run_t *run, uint32_t item, uint32_t layer, uint64_t begin, uint64_t end)
{
    fv_worker_t *w = run->r->worker;
    fv_session_t *session = fv_worker_session(w, item);
    const fv_ctl_item_t all = {.position = begin,
                               .kv_end = end,
                               .n_tokens = (uint32_t)(end - begin),
                               .flags = FV_ITEM_APPEND};
    const fv_head_part_t part = fv_placement_head_part(&run->placement, &run->model,
                                                       run->r->rank / run->placement.n_ctx_parts);
    const bool is_latent = fv_model_is_latent(&run->model);
    const size_t head =
        (size_t)part.head_begin * (size_t)run->model.head_dim_qk + (size_t)part.latent_begin;
    const size_t rope_gap = /* of a row of the pool: from the slice's end to the RoPE key */
        (size_t)(run->model.head_dim_v - part.latent_begin - part.head_dim_v) * sizeof(uint16_t);
    static fv_page_copy_t copies[FV_HEADS_MAX]; /* none is made: nothing is shared */
    size_t n_copies = 0;
    static fv_append_item_t appends[APPENDS_AT_ONCE];
    size_t n_appends = 0;
    uint64_t cursor = 0;
    fv_token_run_t tokens;
    fv_layer_kv_t *kv = layer_of(run, item, layer);

    fv_scale_check(fv_session_reserve(session, layer, end, w->pool, copies, &n_copies), "pages");
    while (fv_token_run_next(&run->placement, session->cp, &all, &cursor, &tokens)) {
        for (uint64_t done = 0; done < tokens.n_tokens;) {
            const uint64_t t = begin + tokens.item_begin + done;
            const uint64_t rest = FV_SCALE_WINDOW - t % FV_SCALE_WINDOW;
            const uint64_t n = (rest < tokens.n_tokens - done) ? rest : (tokens.n_tokens - done);
            const size_t at =
                fv_scale_token(item, layer, t) * (run->data.kv_token_bytes / sizeof(uint16_t)) +
                head;

            if (n_appends == APPENDS_AT_ONCE) {
                append(run, appends, n_appends);
                n_appends = 0;
            }
            appends[n_appends++] = (fv_append_item_t){.n_kv_heads = session->n_heads,
                                                      .head_dim_qk = part.head_dim_qk,
                                                      .head_dim_v = part.head_dim_v,
                                                      .src_dtype = FV_DTYPE_BF16,
                                                      .kv_dtype = FV_DTYPE_BF16,
                                                      .v_in_k = is_latent,
                                                      .rope_gap_bytes = is_latent ? rope_gap : 0U,
                                                      .k = run->data.k + at,
                                                      .v = is_latent ? NULL : (run->data.v + at),
                                                      .k_token_bytes = run->data.kv_token_bytes,
                                                      .v_token_bytes = run->data.v_token_bytes,
                                                      .local_begin = tokens.local_begin + done,
                                                      .n_tokens = n,
                                                      .pages = kv->pages,
                                                      .pages_head_stride = kv->stride};
            done += n;
        }
    }
    append(run, appends, n_appends);
    kv->length = end;
    fv_session_settle(session, layer, end - 1U, w->pool);
}

/* S2: piece by piece, so that what is freed makes room. */
static void put_layer(const fv_scale_run_t *run, uint32_t item, uint32_t layer)
{
    const uint64_t each = (run->spec->s2_stride > 0) ? FV_SCALE_S2_FILL : run->n_tokens;

    for (uint64_t at = 0; at < run->n_tokens; at += each) {
        put_tokens(run, item, layer, at, (run->n_tokens - at < each) ? run->n_tokens : (at + each));
    }
}

/* By real steps: every row of every chunk is compared. */
static void prefill(fv_scale_run_t *run, uint32_t layer)
{
    fv_ctl_done_t done;

    while (run->lengths[layer] < run->n_tokens) {
        const uint64_t rest = run->n_tokens - run->lengths[layer];
        const uint32_t n = (rest < run->chunk) ? (uint32_t)rest : run->chunk;

        if (fv_scale_step_prepare(run, layer, n)) {
            fv_scale_step_run(run, &done);
            fv_scale_step_verify(run, layer);
        }
        run->lengths[layer] += n;
    }
}

void fv_scale_fill(fv_scale_run_t *run)
{
    for (uint32_t layer = 0; layer < run->n_layers; layer++) {
        if (run->is_prefill) { /* by the timed steps themselves */
            continue;
        }
        if (run->chunk > 0U) {
            prefill(run, layer);
            continue;
        }
        for (uint32_t item = 0; (run->r->rank < run->p) && (item < run->n_items); item++) {
            put_layer(run, item, layer);
        }
        run->lengths[layer] = run->n_tokens;
    }
}
