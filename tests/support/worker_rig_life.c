/*
 * worker_rig_life.c - a random life of a rig: sessions come, fork, are cut back and go; steps of mixed items between.
 */
#include "tests/support/worker_rig.h"

static bool pick_session(fv_rig_t *rig, uint32_t *out)
{
    uint32_t first = (uint32_t)fv_random_int(&rig->random, 0, FV_RIG_SESSIONS - 1);

    for (uint32_t i = 0; i < FV_RIG_SESSIONS; i++) {
        *out = (first + i) % FV_RIG_SESSIONS;
        if (rig->sessions[*out].is_open) {
            return true;
        }
    }
    return false;
}

static bool pick_slot(const fv_rig_t *rig, uint32_t *out)
{
    for (*out = 0; *out < FV_RIG_SESSIONS; (*out)++) {
        if (!rig->sessions[*out].is_open) {
            return true;
        }
    }
    return false;
}

static void random_open(fv_rig_t *rig)
{
    fv_random_t *r = &rig->random;
    uint32_t model = (uint32_t)fv_random_int(r, 0, (int64_t)rig->n_models - 1);
    const fv_model_spec_t *spec = &rig->models[model];
    int64_t groups = fv_model_groups(spec); /* head parts are multiples of it */
    int64_t n_heads = fv_model_is_latent(spec) ? spec->n_q_heads : spec->n_kv_heads;
    int64_t n_places = (int64_t)rig->n_ranks / groups;
    int64_t hp = groups * fv_random_int(r, 1, (n_heads < n_places) ? n_heads : n_places);
    int64_t cp = fv_random_int(r, 1, (int64_t)rig->n_ranks / hp);
    uint32_t slot = 0;

    if (pick_slot(rig, &slot)) {
        fv_rig_open(rig, slot, model, (uint16_t)hp, (uint16_t)cp,
                    64U * (uint32_t)fv_random_int(r, 1, 2));
    }
}

static const fv_policy_t *policy_of(const fv_rig_t *rig, uint32_t slot, uint32_t layer)
{
    const fv_model_spec_t *spec = &rig->models[rig->sessions[slot].model];

    return &spec->policies[spec->layer_policy[layer]];
}

/* An append, a replay of an earlier one, or a query. */
static fv_rig_item_t random_item(fv_rig_t *rig, uint32_t slot, uint32_t layer)
{
    fv_random_t *r = &rig->random;
    uint64_t n = rig->sessions[slot].layers[layer].n_tokens;
    int64_t kind = fv_random_int(r, 0, 9);
    uint32_t n_tokens = (uint32_t)((fv_random_int(r, 0, 1) == 0) ? 1 : fv_random_int(r, 1, 150));
    fv_rig_item_t item = {
        .session = slot,
        .layer = layer,
        .position = n,
        .kv_end = n + n_tokens,
        .n_tokens = n_tokens,
        .dtype = (uint16_t)fv_random_int(r, FV_DTYPE_F32, FV_DTYPE_BF16),
        .flags = (uint16_t)(((fv_random_int(r, 0, 4) != 0) ? FV_ITEM_CAUSAL : 0) |
                            ((fv_random_int(r, 0, 1) != 0) ? FV_ITEM_WANT_LSE : 0)),
    };

    if (policy_of(rig, slot, layer)->kind == FV_POLICY_S2) {
        item.flags |= FV_ITEM_CAUSAL;
    }
    if (kind == 0) {
        item.position = (uint64_t)fv_random_int(r, 0, (int64_t)n);
        if (!fv_rig_is_readable(rig, slot, layer, item.position, n)) {
            item.position = rig->sessions[slot].layers[layer].floor; /* the last append */
        }
    }
    if (item.position < n) { /* replay: what came later is not seen */
        item.n_tokens = (uint32_t)fv_random_int(r, 1, (int64_t)(n - item.position));
        item.n_tokens = (item.n_tokens > 100U) ? 100U : item.n_tokens;
        item.kv_end = item.position + item.n_tokens;
    } else if (kind <= 1) { /* query at the end, possibly of an empty session */
        item.kv_end = n;
    } else {
        item.flags |= FV_ITEM_APPEND;
    }
    return item;
}

static void random_step(fv_rig_t *rig)
{
    fv_rig_item_t items[FV_RIG_ITEMS];
    bool used[FV_RIG_SESSIONS][FV_RIG_LAYERS] = {{false}};
    size_t n_wanted = (size_t)fv_random_int(&rig->random, 1, 6);
    size_t n = 0;

    for (size_t i = 0; i < n_wanted; i++) {
        uint32_t layer = (uint32_t)fv_random_int(&rig->random, 0, FV_RIG_LAYERS - 1);
        uint32_t slot = 0;

        if (pick_session(rig, &slot) && !used[slot][layer]) {
            used[slot][layer] = true;
            items[n++] = random_item(rig, slot, layer);
        }
    }
    if (n > 0U) {
        fv_rig_step(rig, items, n);
    }
}

void fv_rig_live(fv_rig_t *rig, int n_ops)
{
    for (int i = 0; i < n_ops; i++) {
        int64_t op = fv_random_int(&rig->random, 0, 19);
        uint32_t slot = 0;
        uint32_t fork = 0;

        if (!pick_session(rig, &slot) || (op == 0)) {
            random_open(rig);
            continue;
        }
        uint64_t n = rig->sessions[slot].layers[op % FV_RIG_LAYERS].n_tokens;
        uint64_t at = (uint64_t)fv_random_int(&rig->random, 0, (int64_t)n + 10);
        if (!fv_rig_is_readable(rig, slot, UINT32_MAX, at, at)) { /* the coordinator refuses it */
            at = (at % 3U == 0U) ? 0U : n;
            at = fv_rig_is_readable(rig, slot, UINT32_MAX, at, at) ? at : 0U;
        }
        if ((op <= 3) && pick_slot(rig, &fork)) {
            fv_rig_fork(rig, fork, slot, (op == 1) ? UINT64_MAX : at);
        } else if (op == 4) {
            fv_rig_truncate(rig, slot, (at % 2U == 0U) ? UINT32_MAX : 1U, at);
        } else if (op == 5) {
            fv_rig_close(rig, slot);
        } else {
            random_step(rig);
        }
    }
}

/* Slot s on all ranks: by context, by heads, in slices. */
static void open_over_all(fv_rig_t *rig, uint32_t slot, uint32_t model)
{
    const fv_model_spec_t *spec = &rig->models[model];
    const uint16_t n_ranks = (uint16_t)rig->n_ranks;
    const bool is_slices = fv_model_groups(spec) > 1;
    const bool is_heads =
        fv_model_is_latent(spec) && (slot % 2U == 1U) && (spec->n_q_heads >= (int32_t)rig->n_ranks);

    if (is_slices) {
        fv_rig_open(rig, slot, model, 2, 1, 64);
    } else if (is_heads) {
        fv_rig_open(rig, slot, model, n_ranks, 1, 64);
    } else {
        fv_rig_open(rig, slot, model, 1, n_ranks, 64);
    }
}

void fv_rig_latents_and_s2(fv_rig_t *rig)
{
    static const uint32_t k_sizes[] = {150, 1, 70, 1};
    const fv_model_spec_t deepseek = {.name = "deepseek",
                                      .n_layers = FV_RIG_LAYERS,
                                      .n_q_heads = 16,
                                      .kv_dtype = FV_DTYPE_BF16,
                                      .softmax_scale = 0.07F,
                                      .kind = FV_MODEL_LATENT,
                                      .latent_dim = 512,
                                      .rope_dim = 64,
                                      .n_policies = 1};
    const fv_model_spec_t specs[FV_RIG_MODELS] = {deepseek, fv_rig_random_latent(&rig->random, 0),
                                                  fv_rig_random_latent(&rig->random, 2),
                                                  fv_rig_random_sparse_spec(&rig->random)};

    for (uint32_t m = 0; m < FV_RIG_MODELS; m++) {
        (void)fv_rig_model(rig, &specs[m]);
    }
    for (uint32_t slot = 0; slot < 2U * FV_RIG_MODELS; slot++) {
        open_over_all(rig, slot, slot / 2U);
        for (uint32_t i = 0; i < sizeof(k_sizes) / sizeof(k_sizes[0]); i++) {
            (void)fv_rig_append(rig, slot, i % 2U, k_sizes[i]);
        }
    }
    fv_rig_live(rig, 40);
}
