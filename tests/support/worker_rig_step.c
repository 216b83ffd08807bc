/*
 * worker_rig_step.c - one step of the rig: tensors, all ranks at once, the verdict.
 */
#include "proto/moved.h"
#include "tests/support/step_pack.h"
#include "tests/support/test.h"
#include "tests/support/worker_rig.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* What one rank is given and answers. */
typedef struct rank_run {
    fv_rig_t *rig;
    fv_rig_item_t *items;
    size_t n_items;
    uint32_t rank;
    fv_status_t status;
    size_t n_mine;
    size_t index[FV_RIG_ITEMS]; /* of my items among all */
    fv_error_t errors[FV_RIG_ITEMS];
    uint8_t *out; /* packed */
} rank_run_t;

static const fv_model_spec_t *spec_of(const fv_rig_t *rig, const fv_rig_item_t *item)
{
    return &rig->models[rig->sessions[item->session].model];
}

static void *random_tensor(fv_random_t *r, uint16_t dtype, size_t n)
{
    void *data = malloc((n + 1U) * sizeof(float));

    assert_non_null(data);
    for (size_t i = 0; i < n; i++) {
        fv_store_element(data, (fv_dtype_t)dtype, i, fv_random_unit(r));
    }
    return data;
}

static void make_item(fv_rig_t *rig, fv_rig_item_t *item)
{
    const fv_model_spec_t *spec = spec_of(rig, item);
    size_t e = fv_dtype_bytes((fv_dtype_t)item->dtype);
    size_t n_q = (size_t)spec->n_q_heads;
    size_t n_kv = (item->flags & FV_ITEM_APPEND) ? (size_t)spec->n_kv_heads : 0U;
    size_t dk = (size_t)spec->head_dim_qk;
    const fv_ctl_item_t asked = {.flags = item->flags};
    size_t dv = (size_t)fv_item_out_dim(spec, &asked);
    size_t dv_sent = (size_t)fv_model_v_dim_sent(spec);
    size_t n_out = item->n_tokens * n_q * dv * e;

    if (fv_model_is_approximate(spec)) { /* a softmax for each slice: there is no one lse */
        item->flags &= (uint16_t) ~(unsigned)FV_ITEM_WANT_LSE;
    }

    item->ctl = (fv_ctl_item_t){.session_slot = item->session,
                                .layer = item->layer,
                                .position = item->position,
                                .kv_end = item->kv_end,
                                .n_tokens = item->n_tokens,
                                .dtype = item->dtype,
                                .flags = item->flags};
    item->full = (fv_step_io_t){
        .q = random_tensor(&rig->random, item->dtype, item->n_tokens * n_q * dk),
        .k = random_tensor(&rig->random, item->dtype, item->n_tokens * n_kv * dk),
        .v = random_tensor(&rig->random, item->dtype, item->n_tokens * n_kv * dv_sent),
        .q_token_bytes = n_q * dk * e,
        .k_token_bytes = n_kv * dk * e,
        .v_token_bytes = n_kv * dv_sent * e,
        .out = malloc(n_out),
        .out_token_bytes = n_q * dv * e,
        .lse_token_stride = n_q,
    };
    assert_non_null(item->full.out);
    memset(item->full.out, 0xff, n_out); /* NaN: what no rank writes shows */
    if ((item->flags & FV_ITEM_WANT_LSE) != 0) {
        item->full.lse = malloc(item->n_tokens * n_q * sizeof(float));
        assert_non_null(item->full.lse);
        memset(item->full.lse, 0xff, item->n_tokens * n_q * sizeof(float));
    }
    if (item->is_poison) {
        memset((void *)(uintptr_t)item->full.k, 0xff, item->n_tokens * n_kv * dk * e);
        memset((void *)(uintptr_t)item->full.v, 0xff, item->n_tokens * n_kv * dv_sent * e);
    }
    item->status = FV_OK;
}

/* Every other item's KV moves, if each of its head parts' fits the staging area. */
static void choose_way(fv_rig_t *rig, fv_rig_item_t *item)
{
    const fv_placement_t *p = &rig->sessions[item->session].placement;
    const fv_model_spec_t *spec = spec_of(rig, item);

    if ((rig->move_bytes == 0U) || fv_model_adds_scores(spec) ||
        (fv_random_int(&rig->random, 0, 1) == 0)) {
        return;
    }
    for (int32_t hp = 0; hp < p->n_head_parts; hp++) {
        fv_moved_t m = fv_moved_make(spec, p, &item->ctl, hp);

        if (fv_moved_least_bytes(&m) > rig->move_bytes) {
            return;
        }
    }
    item->ctl.flags |= FV_ITEM_MOVES_KV;
    rig->n_moved += (fv_placement_active_parts(p, item->kv_end) > 1) ? 1U : 0U;
}

/* ------------------------------------------------------------------ ranks */

static void run_unpacked(rank_run_t *run)
{
    fv_ctl_item_t ctl[FV_RIG_ITEMS];
    fv_step_io_t io[FV_RIG_ITEMS];
    fv_ctl_done_t done;

    for (size_t i = 0; i < run->n_mine; i++) {
        ctl[i] = run->items[run->index[i]].ctl;
        io[i] = run->items[run->index[i]].full;
    }
    run->status =
        fv_worker_step(run->rig->workers[run->rank], ctl, io, run->n_mine, &done, run->errors);
}

static void run_packed(rank_run_t *run)
{
    fv_ctl_item_t ctl[FV_RIG_ITEMS];
    fv_ctl_step_t step = {.n_items = (uint32_t)run->n_mine};
    fv_ctl_done_t done;
    uint8_t *in = NULL;

    for (size_t i = 0; i < run->n_mine; i++) {
        const fv_rig_item_t *item = &run->items[run->index[i]];
        fv_item_share_t s;

        ctl[i] = item->ctl;
        (void)fv_item_share(spec_of(run->rig, item), &run->rig->sessions[item->session].placement,
                            &item->ctl, run->rank, &s);
        step.in_bytes += fv_share_in_bytes(&s);
        step.out_bytes += fv_share_out_bytes(&s);
    }
    in = aligned_alloc(FV_STEP_ALIGN, step.in_bytes + FV_STEP_ALIGN);
    run->out = aligned_alloc(FV_STEP_ALIGN, step.out_bytes + FV_STEP_ALIGN);
    if ((in == NULL) || (run->out == NULL)) {
        abort();
    }
    memset(run->out, 0xff, step.out_bytes);
    uint8_t *at = in;
    for (size_t i = 0; i < run->n_mine; i++) {
        const fv_rig_item_t *item = &run->items[run->index[i]];

        at += fv_pack_input(spec_of(run->rig, item), &run->rig->sessions[item->session].placement,
                            &item->ctl, run->rank, &item->full, at);
    }
    run->status = fv_worker_step_packed(run->rig->workers[run->rank], &step, ctl, in, run->out,
                                        &done, run->errors);
    free(in);
}

static void *run_rank(void *arg)
{
    rank_run_t *run = arg;
    const fv_rig_door_t *door = &run->rig->door;

    if (door->enter != NULL) {
        door->enter(door->arg, run->rank);
    }
    if (run->rank == 0U) {
        run_unpacked(run);
    } else {
        run_packed(run);
    }
    return NULL;
}

/* Starts a rank with the items in which it has a share. */
static void choose_items(rank_run_t *run)
{
    for (size_t i = 0; i < run->n_items; i++) {
        const fv_rig_item_t *item = &run->items[i];
        fv_item_share_t s;

        if (fv_item_share(spec_of(run->rig, item), &run->rig->sessions[item->session].placement,
                          &item->ctl, run->rank, &s)) {
            run->index[run->n_mine++] = i;
        }
    }
}

static void collect(rank_run_t *run)
{
    const uint8_t *at = run->out;

    assert_int_equal(run->status, FV_OK);
    for (size_t i = 0; i < run->n_mine; i++) {
        fv_rig_item_t *item = &run->items[run->index[i]];

        if (run->errors[i].status != FV_OK) {
            item->status = (fv_status_t)run->errors[i].status;
        }
        if (run->rank != 0U) {
            at += fv_unpack_output(spec_of(run->rig, item),
                                   &run->rig->sessions[item->session].placement, &item->ctl,
                                   run->rank, at, &item->full);
        }
    }
    free(run->out);
}

/* ------------------------------------------------------------------ the verdict */

static double *grow(double *data, size_t n)
{
    double *grown = realloc(data, (n + 1U) * sizeof(*grown));

    assert_non_null(grown);
    return grown;
}

static void
append_latent_shadow(const fv_model_spec_t *spec, const fv_rig_item_t *item, fv_rig_layer_t *layer)
{
    size_t dk = (size_t)spec->head_dim_qk;
    float row[FV_DIM_QK_MAX];

    for (size_t t = 0; t < item->n_tokens; t++) {
        const uint8_t *from = (const uint8_t *)item->full.k + t * item->full.k_token_bytes;

        fv_load_row(row, from, (fv_dtype_t)item->dtype, dk);
        fv_rig_latent_store(spec, row, layer->k + (item->position + t) * dk,
                            layer->v + (item->position + t) * (size_t)spec->head_dim_v);
    }
    layer->n_tokens = item->kv_end;
}

/* What the cache holds after the append: the values rounded to its dtype. */
static void append_shadow(fv_rig_t *rig, const fv_rig_item_t *item)
{
    const fv_model_spec_t *spec = spec_of(rig, item);
    fv_rig_layer_t *layer = &rig->sessions[item->session].layers[item->layer];
    size_t k_len = (size_t)spec->n_kv_heads * (size_t)spec->head_dim_qk;
    size_t v_len = (size_t)spec->n_kv_heads * (size_t)spec->head_dim_v;
    float stored = 0.0F;

    assert_int_equal(layer->n_tokens, item->position);
    layer->k = grow(layer->k, item->kv_end * k_len);
    layer->v = grow(layer->v, item->kv_end * v_len);
    if (fv_model_is_latent(spec)) {
        append_latent_shadow(spec, item, layer);
        return;
    }
    for (size_t i = 0; i < item->n_tokens * k_len; i++) {
        fv_store_element(&stored, (fv_dtype_t)spec->kv_dtype, 0,
                         fv_load_element(item->full.k, (fv_dtype_t)item->dtype, i));
        layer->k[item->position * k_len + i] =
            (double)fv_load_element(&stored, (fv_dtype_t)spec->kv_dtype, 0);
    }
    for (size_t i = 0; i < item->n_tokens * v_len; i++) {
        fv_store_element(&stored, (fv_dtype_t)spec->kv_dtype, 0,
                         fv_load_element(item->full.v, (fv_dtype_t)item->dtype, i));
        layer->v[item->position * v_len + i] =
            (double)fv_load_element(&stored, (fv_dtype_t)spec->kv_dtype, 0);
    }
    layer->n_tokens = item->kv_end;
}

/* What an item's results may differ by from the oracle's. */
typedef struct slack {
    double out, lse;
} slack_t;

/*
 * |v| <= 1. The first row of attn_case.h's table, and what GPUs add to it: weights rounded to the cache's dtype where the
 * tensor cores take them in one part (prompts; latents), and norms that they add up in another order, so that an element
 * of the cache may round the other way.
 */
static slack_t slack_of(const fv_rig_t *rig, const fv_rig_item_t *item)
{
    static const double k_out[] = {0.0, 2e-5, 1e-3, 8e-3};             /* by dtype of out */
    static const double k_weight[] = {0.0, 0.0, 0x1p-11, 0x1p-8, 0.0}; /* by dtype of the cache */
    const fv_model_spec_t *spec = spec_of(rig, item);
    const double weight = k_weight[spec->kv_dtype];
    slack_t slack = {k_out[item->dtype], 2e-5};

    if (!rig->is_cuda) {
        return slack;
    }
    if (fv_model_is_latent(spec) || (item->dtype == spec->kv_dtype)) {
        slack.out += weight;
    }
    if (spec->latent_norm.mode != FV_NORM_NONE) {
        slack.out += weight;
        slack.lse += weight;
    }
    return slack;
}

static void assert_near(const fv_rig_item_t *item,
                        const char *what,
                        size_t i,
                        double given,
                        double expected,
                        double tolerance)
{
    bool same_inf = isinf(expected) && (given == expected);

    if (!same_inf && !(fabs(given - expected) <= tolerance)) {
        fail_msg(
            "%s[%zu] of session %u, layer %u, tokens %llu to %llu: given %.9g, expected %.9g, tolerance %.3g",
            what, i, (unsigned)item->session, (unsigned)item->layer,
            (unsigned long long)item->position, (unsigned long long)item->kv_end, given, expected,
            tolerance);
    }
}

/* The oracle for token t of the item alone: a row depends on its own position only. */
static void check_token(const fv_rig_t *rig, const fv_rig_item_t *item, size_t t)
{
    const slack_t slack = slack_of(rig, item);
    const fv_model_spec_t *spec = spec_of(rig, item);
    const fv_rig_layer_t *layer = &rig->sessions[item->session].layers[item->layer];
    size_t n_rows = (size_t)spec->n_q_heads;
    size_t n_q = n_rows * (size_t)spec->head_dim_qk;
    size_t n_out = n_rows * (size_t)spec->head_dim_v;
    double *q = grow(NULL, n_q);
    double *out = grow(NULL, n_out);
    double *lse = grow(NULL, n_rows);

    for (size_t i = 0; i < n_q; i++) {
        q[i] = (double)fv_load_element(item->full.q, (fv_dtype_t)item->dtype, t * n_q + i);
    }
    const fv_attend_ref_params_t params = {
        .n_tokens = 1,
        .position = (int64_t)(item->position + t),
        .kv_end = (int64_t)item->kv_end,
        .n_kv_heads = spec->n_kv_heads,
        .group = fv_model_group(spec),
        .head_dim_qk = spec->head_dim_qk,
        .head_dim_v = spec->head_dim_v,
        .softmax_scale = (double)spec->softmax_scale,
        .logit_softcap = (double)spec->logit_softcap,
        .causal = (item->flags & FV_ITEM_CAUSAL) != 0,
        .policy = spec->policies[spec->layer_policy[item->layer]],
        .q = q,
        .k = layer->k,
        .v = layer->v,
        .out = out,
        .lse = lse,
    };
    if (fv_model_is_latent(spec)) {
        fv_rig_latent_ref(spec, &params);
    } else {
        fv_attend_ref(&params);
    }
    size_t dim = (size_t)fv_item_out_dim(spec, &item->ctl);
    size_t first = (fv_item_only_slice(&item->ctl) > 0)
                       ? ((size_t)(fv_item_only_slice(&item->ctl) - 1) * dim)
                       : 0U;
    for (size_t i = 0; i < n_rows * dim; i++) {
        assert_near(
            item, "out", t * n_rows * dim + i,
            (double)fv_load_element(item->full.out, (fv_dtype_t)item->dtype, t * n_rows * dim + i),
            out[i / dim * (size_t)spec->head_dim_v + first + i % dim], slack.out);
    }
    for (size_t i = 0; (item->full.lse != NULL) && (i < n_rows); i++) {
        assert_near(item, "lse", t * n_rows + i, (double)item->full.lse[t * n_rows + i], lse[i],
                    slack.lse);
    }
    free(q);
    free(out);
    free(lse);
}

/* Every value must have been written; a few tokens, the first and the last among them, are judged. */
static void check_item(fv_rig_t *rig, const fv_rig_item_t *item)
{
    const fv_model_spec_t *spec = spec_of(rig, item);
    size_t n_out =
        (size_t)item->n_tokens * (size_t)(spec->n_q_heads * fv_item_out_dim(spec, &item->ctl));

    for (size_t i = 0; i < n_out; i++) {
        assert_false(isnan(fv_load_element(item->full.out, (fv_dtype_t)item->dtype, i)));
    }
    check_token(rig, item, 0);
    if (item->n_tokens > 1U) {
        check_token(rig, item, item->n_tokens - 1U);
    }
    for (int i = 0; (i < 6) && (item->n_tokens > 2U); i++) {
        check_token(rig, item, (size_t)fv_random_int(&rig->random, 1, (int64_t)item->n_tokens - 2));
    }
    rig->n_checked++;
}

static void settle_item(fv_rig_t *rig, const fv_rig_item_t *item)
{
    if ((item->flags & FV_ITEM_APPEND) != 0) { /* failed or not: earlier queries are over */
        rig->sessions[item->session].layers[item->layer].floor = item->position;
    }
    if (item->status == FV_OK) {
        if ((item->flags & FV_ITEM_APPEND) != 0) {
            append_shadow(rig, item);
        }
        if (!item->is_poison) {
            check_item(rig, item);
        }
    } else {
        assert_true((item->status == FV_ERR_EXHAUSTED) || (item->status == FV_ERR_UNIMPLEMENTED));
        rig->n_exhausted += (item->status == FV_ERR_EXHAUSTED) ? 1U : 0U;
        fv_rig_truncate(rig, item->session, item->layer, item->position);
    }
    free((void *)(uintptr_t)item->full.q);
    free((void *)(uintptr_t)item->full.k);
    free((void *)(uintptr_t)item->full.v);
    free(item->full.out);
    free(item->full.lse);
}

void fv_rig_step(fv_rig_t *rig, fv_rig_item_t *items, size_t n_items)
{
    static rank_run_t runs[FV_RIG_RANKS]; /* large, and steps do not nest */
    pthread_t threads[FV_RIG_RANKS];

    for (size_t i = 0; i < n_items; i++) {
        make_item(rig, &items[i]);
        choose_way(rig, &items[i]);
    }
    for (uint32_t r = 0; r < rig->n_ranks; r++) {
        runs[r] = (rank_run_t){.rig = rig, .rank = r, .items = items, .n_items = n_items};
        choose_items(&runs[r]);
    }
    for (uint32_t r = 0; r < rig->n_ranks; r++) {
        assert_int_equal(pthread_create(&threads[r], NULL, run_rank, &runs[r]), 0);
    }
    for (uint32_t r = 0; r < rig->n_ranks; r++) {
        assert_int_equal(pthread_join(threads[r], NULL), 0);
    }
    for (uint32_t r = 0; r < rig->n_ranks; r++) {
        collect(&runs[r]);
    }
    for (size_t i = 0; i < n_items; i++) {
        settle_item(rig, &items[i]);
    }
    fv_rig_check_pages(rig);
}

fv_status_t fv_rig_append(fv_rig_t *rig, uint32_t slot, uint32_t layer, uint32_t n_tokens)
{
    uint64_t n = rig->sessions[slot].layers[layer].n_tokens;
    fv_rig_item_t item = {.session = slot,
                          .layer = layer,
                          .position = n,
                          .kv_end = n + n_tokens,
                          .n_tokens = n_tokens,
                          .dtype = FV_DTYPE_F32,
                          .flags = FV_ITEM_CAUSAL | FV_ITEM_APPEND | FV_ITEM_WANT_LSE};

    fv_rig_step(rig, &item, 1);
    return item.status;
}
