/*
 * scale_step.c - sessions of a case on its ranks, their steps, and the comparison of what they return.
 */
#include "bench/scale/scale.h"
#include "tests/support/step_pack.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define VERIFY_ROWS  96 /* of an item at most: evenly spread, all heads */
#define VERIFY_MLA   24 /* such a row takes fp64 ten times as long */
#define VERIFY_ITEMS 3
#define TOLERANCE    6e-3 /* of a row's norm: bf16 results; as in bench_kernels_cuda */

/* ------------------------------------------------------------------ placement */

/* Head parts for p ranks: all of them, or the largest divisor of p that the KV heads allow. */
static int head_parts(const fv_scale_case_t *c, int p)
{
    int parts = 1;

    if (c->axis == FV_SCALE_CONTEXT) {
        return 1;
    }
    for (int h = 1; h <= p; h++) {
        const bool is_half = (c->axis == FV_SCALE_GRID) && (h > 1) && (h == p);

        if ((p % h == 0) && (h <= fv_scale_parts_max(c)) && !is_half) {
            parts = h;
        }
    }
    return parts;
}

/* Shrunken cases are dealt out in as many turns as the whole ones. */
static uint32_t shard_tokens(const fv_scale_run_t *run)
{
    const uint32_t shrink = ((run->chunk > 0U) && !run->is_prefill) ? 1U : run->r->options->shrink;
    const uint32_t n = run->spec->shard_tokens / shrink / FV_PAGE_TOKENS * FV_PAGE_TOKENS;

    return (n < FV_PAGE_TOKENS) ? FV_PAGE_TOKENS : n;
}

static void place(fv_scale_run_t *run)
{
    const int parts = head_parts(run->spec, run->p);

    run->placement = (fv_placement_t){.n_head_parts = (uint16_t)parts,
                                      .n_ctx_parts = (uint16_t)(run->p / parts),
                                      .shard_tokens = shard_tokens(run)};
    for (int i = 0; i < run->p; i++) {
        run->placement.ranks[i] = (uint16_t)i;
    }
}

/* ------------------------------------------------------------------ life */

/* DeepSeek's scale: of 128 + 64 dims before they were absorbed. */
static void describe_latents(fv_scale_run_t *run)
{
    const fv_scale_case_t *c = run->spec;
    fv_model_spec_t *m = &run->model;

    m->kind = FV_MODEL_LATENT;
    m->latent_dim = c->head_dim;
    m->rope_dim = c->latent.rope_dim;
    m->n_kv_heads = 0;
    m->head_dim_qk = 0;
    m->head_dim_v = 0;
    m->softmax_scale = 0.0721687836F;
    if (c->axis == FV_SCALE_SLICES) {
        m->sharding = (fv_sharding_t){.mode = FV_SHARDING_LATENT, .groups = c->latent.groups};
    }
}

static void describe_model(fv_scale_run_t *run)
{
    const fv_scale_case_t *c = run->spec;

    run->model = (fv_model_spec_t){
        .name = "scale",
        .n_layers = FV_SCALE_LAYERS_MAX, /* one model for all cases of these heads */
        .n_q_heads = c->n_q_heads,
        .n_kv_heads = c->n_kv_heads,
        .head_dim_qk = c->head_dim,
        .head_dim_v = c->head_dim,
        .kv_dtype = FV_DTYPE_BF16,
        .n_policies = 1};
    if (c->s2_stride > 0) {
        run->model.n_policies = 2;
        run->model.policies[1] = (fv_policy_t){.kind = FV_POLICY_S2,
                                               .block_tokens = 64,
                                               .local_blocks = FV_SCALE_S2_LOCAL,
                                               .vert_stride = c->s2_stride};
        memset(run->model.layer_policy, 1,
               FV_SCALE_LAYERS_MAX * sizeof(run->model.layer_policy[0]));
    }
    if (fv_scale_is_latent(c)) {
        describe_latents(run);
    }
    fv_scale_check(fv_model_spec_check(&run->model), "model");
}

void fv_scale_run_open(fv_scale_run_t *run, fv_scale_rank_t *r, const fv_scale_case_t *c, int p)
{
    const uint32_t q_tokens = (run->chunk > 0U) ? run->chunk : 1U;

    run->r = r;
    run->spec = c;
    run->p = p;
    describe_model(run);
    place(run);
    const uint32_t model = fv_scale_model(r, &run->model);
    for (uint32_t i = 0; i < run->n_items; i++) {
        const fv_ctl_open_t open = {
            .session_slot = i, .model_slot = model, .placement = run->placement};

        fv_scale_check(fv_worker_open(r->worker, &open), "session");
    }
    fv_scale_data_open(&run->data, r, &run->model, q_tokens);
    run->lengths = fv_scale_alloc(run->n_layers, sizeof(*run->lengths));
    run->items = fv_scale_alloc(run->n_items, sizeof(*run->items));
    run->item_of = fv_scale_alloc(run->n_items, sizeof(*run->item_of));
    run->errors = fv_scale_alloc(run->n_items, sizeof(*run->errors));
    const size_t n_bytes =
        (size_t)run->n_items *
        (q_tokens * (run->data.q_token_bytes + 2U * run->data.kv_token_bytes) + 4U * FV_STEP_ALIGN);
    fv_scale_check(fv_host_buffer_reserve(&run->in, r->backend, r->worker->backend, n_bytes),
                   "input");
    fv_scale_check(fv_host_buffer_reserve(&run->out, r->backend, r->worker->backend, n_bytes),
                   "output");
    fv_scale_fill(run);
}

void fv_scale_run_close(fv_scale_run_t *run)
{
    fv_scale_rank_t *r = run->r;

    for (uint32_t i = 0; i < run->n_items; i++) {
        const fv_ctl_close_t message = {.session_slot = i};

        fv_scale_check(fv_worker_close(r->worker, &message), "close");
    }
    fv_host_buffer_free(&run->in, r->backend, r->worker->backend);
    fv_host_buffer_free(&run->out, r->backend, r->worker->backend);
    fv_scale_data_close(&run->data, r);
    free(run->lengths);
    free(run->items);
    free(run->item_of);
    free(run->errors);
}

/* ------------------------------------------------------------------ a step */

bool fv_scale_step_prepare(fv_scale_run_t *run, uint32_t layer, uint32_t n_tokens)
{
    const uint64_t position = run->lengths[layer];
    const size_t kv_elems = run->data.kv_token_bytes / sizeof(uint16_t);
    uint16_t *kv = fv_scale_alloc(2U * (size_t)n_tokens, run->data.kv_token_bytes);
    uint8_t *in = run->in.data;
    size_t out_bytes = 0;

    run->n_shares = 0;
    for (uint32_t i = 0; i < run->n_items; i++) {
        const bool moves = run->is_prefill && (run->r->options->move_bytes > 0U);
        const fv_ctl_item_t item = {
            .session_slot = i,
            .layer = layer,
            .position = position,
            .kv_end = position + n_tokens,
            .n_tokens = n_tokens,
            .dtype = FV_DTYPE_BF16,
            .flags = (uint16_t)(FV_ITEM_CAUSAL | FV_ITEM_APPEND | (moves ? FV_ITEM_MOVES_KV : 0))};
        const fv_step_io_t full = {.q = fv_scale_query(&run->data, i, position),
                                   .k = kv,
                                   .v = kv + (size_t)n_tokens * kv_elems, /* latents: of no bytes */
                                   .q_token_bytes = run->data.q_token_bytes,
                                   .k_token_bytes = run->data.kv_token_bytes,
                                   .v_token_bytes = run->data.v_token_bytes};
        fv_item_share_t share;

        if (!fv_item_share(&run->model, &run->placement, &item, (uint32_t)run->r->rank, &share)) {
            continue;
        }
        for (uint64_t t = 0; t < n_tokens; t++) {
            const size_t from = fv_scale_token(i, layer, position + t) * kv_elems;

            memcpy(kv + t * kv_elems, run->data.k + from, run->data.kv_token_bytes);
            if (run->data.v_token_bytes > 0U) {
                memcpy(kv + (n_tokens + t) * kv_elems, run->data.v + from, run->data.v_token_bytes);
            }
        }
        in += fv_pack_input(&run->model, &run->placement, &item, (uint32_t)run->r->rank, &full, in);
        out_bytes += fv_share_out_bytes(&share);
        run->item_of[run->n_shares] = i;
        run->items[run->n_shares++] = item;
    }
    free(kv);
    run->step = (fv_ctl_step_t){.step_id = ++run->step_id,
                                .n_items = run->n_shares,
                                .in_bytes = (uint64_t)(in - (uint8_t *)run->in.data),
                                .out_bytes = out_bytes};
    memset(run->out.data, 0xff, out_bytes); /* NaN: what is not written shows */
    return run->n_shares > 0U;
}

void fv_scale_step_run(fv_scale_run_t *run, fv_ctl_done_t *out_done)
{
    fv_scale_check(fv_worker_step_packed(run->r->worker, &run->step, run->items, run->in.data,
                                         run->out.data, out_done, run->errors),
                   "step");
    if (out_done->error.status != FV_OK) {
        (void)fv_fail(out_done->error.status, "%s", out_done->error.text);
        fv_scale_die("item");
    }
}

/* ------------------------------------------------------------------ comparison */

/* A row of the result against fp64 and against what one rank gave: the first token of step 1 is kept for that. */
static void verify_row(fv_scale_run_t *run,
                       uint32_t layer,
                       const fv_ctl_item_t *item,
                       uint64_t t,
                       int32_t head,
                       const fv_head_part_t *part,
                       const uint16_t *row)
{
    const size_t dim = (size_t)part->head_dim_v;
    const bool is_first = (layer == 0U) && (item->position + t == run->n_tokens);
    double want[FV_DIM_V_MAX];
    double error = 0.0;
    double norm = 0.0;
    double difference = 0.0;

    fv_scale_expected(&run->data, item->session_slot, layer, item->position + t, head, part, want);
    const uint16_t *one =
        (is_first && (run->one_rank != NULL))
            ? run->one_rank +
                  ((size_t)item->session_slot * (size_t)run->model.n_q_heads + (size_t)head) * dim
            : row;
    for (size_t d = 0; d < dim; d++) {
        const double got = (double)fv_bf16_to_f32(row[d]);

        error += (got - want[d]) * (got - want[d]);
        difference +=
            (got - (double)fv_bf16_to_f32(one[d])) * (got - (double)fv_bf16_to_f32(one[d]));
        norm += want[d] * want[d];
    }
    error = sqrt(error / norm);
    difference = sqrt(difference / norm);
    if (!(error <= TOLERANCE) || !(difference <= TOLERANCE)) { /* NaN, too */
        (void)fv_fail(
            FV_ERR_INTERNAL,
            "%s on %d ranks: item %u, layer %u, position %llu, head %d: error %.3g of the row, %.3g from "
            "one rank's, expected at most %g",
            run->spec->name, run->p, item->session_slot, layer,
            (unsigned long long)(item->position + t), head, error, difference, TOLERANCE);
        fv_scale_die("verify");
    }
    run->error = fmax(run->error, error);
    run->difference = fmax(run->difference, difference);
}

static bool is_looked_at(const fv_scale_run_t *run, uint32_t item)
{
    for (uint32_t i = 0; i < VERIFY_ITEMS; i++) {
        if (item == (run->n_items - 1U) * i / (VERIFY_ITEMS - 1U)) {
            return true;
        }
    }
    return false;
}

void fv_scale_step_verify(fv_scale_run_t *run, uint32_t layer)
{
    const uint8_t *out = run->out.data;
    const uint64_t n_rows_most =
        fv_model_is_latent(&run->model) ? (uint64_t)VERIFY_MLA : (uint64_t)VERIFY_ROWS;

    for (uint32_t i = 0; i < run->n_shares; i++) {
        fv_item_share_t share;

        (void)fv_item_share(&run->model, &run->placement, &run->items[i], (uint32_t)run->r->rank,
                            &share);
        const uint64_t n_heads = (uint64_t)share.n_q_heads;
        const uint16_t *rows = (const uint16_t *)(const void *)out;
        uint64_t begin = 0;
        uint64_t end = 0;

        for (int32_t k = 0; fv_share_rows(&share, k, &begin, &end); k++) {
            const uint64_t n_rows = end - begin;
            const uint64_t stride = (n_rows <= n_rows_most) ? 1U : ((n_rows / n_rows_most) | 1U);

            for (uint64_t i_row = 0; (i_row < n_rows) && is_looked_at(run, run->item_of[i]);
                 i_row += stride) {
                const uint64_t row = begin + i_row;

                verify_row(run, layer, &run->items[i], row / n_heads,
                           share.part.q_head_begin + (int32_t)(row % n_heads), &share.part,
                           rows + i_row * (size_t)share.part.head_dim_v);
            }
            rows += n_rows * (size_t)share.part.head_dim_v;
        }
        out += fv_share_out_bytes(&share);
    }
}

/* ------------------------------------------------------------------ what a step moves */

/* Tokens of this rank's pages that a query at the end reads, all its KV heads. */
static double read_tokens(const fv_scale_run_t *run, const fv_session_t *session)
{
    const fv_policy_t *policy = &run->model.policies[run->model.n_policies - 1];
    double n = 0.0;

    for (int32_t h = 0; h < session->n_heads; h++) {
        const fv_tile_query_t query = {.policy = *policy,
                                       .shard = {.shard_tokens = run->placement.shard_tokens,
                                                 .n_parts = run->placement.n_ctx_parts,
                                                 .part = (uint16_t)session->cp},
                                       .q_begin = (int64_t)run->n_tokens - 1,
                                       .q_end = (int64_t)run->n_tokens,
                                       .kv_end = (int64_t)run->n_tokens,
                                       .head =
                                           fv_policy_head(policy, session->head_begin + h, 1, 0),
                                       .causal = true};
        const fv_tile_list_t list = fv_tiles_make(&query);

        n += (double)fv_tiles_count(&list) * FV_PAGE_TOKENS;
    }
    return n;
}

double fv_scale_kv_bytes(const fv_scale_run_t *run)
{
    double n_bytes = 0.0;

    if ((run->r->rank < run->p) && (run->spec->s2_stride > 0)) {
        n_bytes = read_tokens(run, fv_worker_session(run->r->worker, 0)) *
                  (double)fv_model_token_bytes(&run->model) * (double)run->n_items;
    } else if (run->r->rank < run->p) {
        const fv_session_t *session = fv_worker_session(run->r->worker, 0);

        n_bytes = (double)fv_session_own(session, run->n_tokens) * (double)session->n_heads *
                  (double)fv_model_token_bytes(&run->model) * (double)run->n_items;
    }
    return fv_scale_max(run->r, n_bytes);
}

double fv_scale_sent_bytes(const fv_scale_run_t *run)
{
    double n_bytes = 0.0;

    for (uint32_t i = 0; i < run->n_shares; i++) {
        fv_item_share_t share;

        (void)fv_item_share(&run->model, &run->placement, &run->items[i], (uint32_t)run->r->rank,
                            &share);
        const uint64_t n_rows =
            (share.n_parts > 1) ? (share.n_rows - (share.row_end - share.row_begin)) : 0U;
        n_bytes += (double)n_rows * (double)(share.part.head_dim_v + 1) * sizeof(float);
    }
    return fv_scale_max(run->r, n_bytes);
}
