/*
 * worker_rig.c - the rig's life: workers, models, sessions and their shadows.
 */
#include "tests/support/worker_rig.h"

#include "common/policy.h"
#include "tests/support/test.h"

#include <stdlib.h>
#include <string.h>

/* Ranks go round the GPUs that there are. */
static int32_t device_of(uint32_t rank)
{
#if defined(FV_WITH_CUDA)
    const int32_t n_devices = fv_backend_cuda_count();

    return (n_devices > 0) ? ((int32_t)rank % n_devices) : 0;
#else
    (void)rank;
    return 0;
#endif
}

void fv_rig_create_through(fv_rig_t *rig,
                           uint32_t n_ranks,
                           size_t arena_bytes,
                           const fv_backend_ops_t *backend,
                           const fv_rig_door_t *door,
                           uint64_t seed)
{
    const char *isa = getenv("FV_ISA"); /* NOLINT(concurrency-mt-unsafe): before any thread */

    memset(rig, 0, sizeof(*rig));
    rig->n_ranks = n_ranks;
    rig->door = *door;
    rig->move_bytes = door->move_bytes;
    rig->is_cuda = (backend != NULL) && (strcmp(backend->name, "cuda") == 0);
    rig->random.state = seed;
    for (uint32_t r = 0; r < n_ranks; r++) {
        fv_worker_config_t config = {
            .rank = r,
            .n_ranks = n_ranks,
            .backend = (backend != NULL) ? backend : &fv_backend_cpu,
            .backend_config = {.n_threads = 1,
                               .kv_arena_bytes = arena_bytes,
                               .device = device_of(r),
                               .isa = (isa != NULL) ? isa : "auto"},
            .exchange = (n_ranks > 1U) ? door->exchange : NULL,
            .exchange_ctx = door->ctx(door->arg, r),
            .move_bytes = door->move_bytes,
            .step_deadline_ms = 20000,
        };

        assert_int_equal(fv_worker_create(&config, &rig->workers[r]), FV_OK);
    }
}

static void *hub_ctx(void *arg, uint32_t rank)
{
    return fv_local_hub_ctx(arg, rank);
}

void fv_rig_create(fv_rig_t *rig,
                   uint32_t n_ranks,
                   size_t arena_bytes,
                   const fv_backend_ops_t *backend,
                   uint64_t seed)
{
    fv_rig_create_moving(rig, n_ranks, arena_bytes, 0, backend, seed);
}

void fv_rig_create_moving(fv_rig_t *rig,
                          uint32_t n_ranks,
                          size_t arena_bytes,
                          size_t move_bytes,
                          const fv_backend_ops_t *backend,
                          uint64_t seed)
{
    fv_local_hub_t *hub = fv_local_hub_create(n_ranks);
    fv_rig_door_t door = {
        .exchange = &fv_local_exchange_ops, .ctx = hub_ctx, .arg = hub, .move_bytes = move_bytes};

    assert_non_null(hub);
    fv_rig_create_through(rig, n_ranks, arena_bytes, backend, &door, seed);
    rig->hub = hub;
}

void fv_rig_destroy(fv_rig_t *rig)
{
    for (uint32_t s = 0; s < FV_RIG_SESSIONS; s++) {
        if (rig->sessions[s].is_open) {
            fv_rig_close(rig, s);
        }
    }
    for (uint32_t r = 0; r < rig->n_ranks; r++) {
        fv_ctl_memory_t memory;

        fv_worker_memory(rig->workers[r], &memory);
        assert_int_equal(memory.kv_bytes_free, memory.kv_bytes_total);
        fv_worker_destroy(rig->workers[r]);
    }
    fv_local_hub_destroy(rig->hub);
}

uint32_t fv_rig_model(fv_rig_t *rig, const fv_model_spec_t *spec)
{
    fv_ctl_model_t message = {.model_slot = rig->n_models, .spec = *spec};

    assert_true(rig->n_models < FV_RIG_MODELS);
    for (uint32_t r = 0; r < rig->n_ranks; r++) {
        assert_int_equal(fv_worker_model(rig->workers[r], &message), FV_OK);
    }
    rig->models[rig->n_models] = *spec;
    assert_int_equal(fv_model_spec_check(&rig->models[rig->n_models]), FV_OK);
    return rig->n_models++;
}

void fv_rig_open(fv_rig_t *rig,
                 uint32_t slot,
                 uint32_t model,
                 uint16_t n_head_parts,
                 uint16_t n_ctx_parts,
                 uint32_t shard_tokens)
{
    fv_rig_session_t *s = &rig->sessions[slot];
    fv_ctl_open_t message = {.session_slot = slot,
                             .model_slot = model,
                             .placement = {.n_head_parts = n_head_parts,
                                           .n_ctx_parts = n_ctx_parts,
                                           .shard_tokens = shard_tokens}};
    uint16_t order[FV_RIG_RANKS];

    for (uint32_t r = 0; r < rig->n_ranks; r++) {
        order[r] = (uint16_t)r;
    }
    for (uint32_t i = 0; i < (uint32_t)n_head_parts * n_ctx_parts;
         i++) { /* a random choice of ranks */
        uint32_t j = (uint32_t)fv_random_int(&rig->random, i, (int64_t)rig->n_ranks - 1);
        uint16_t rank = order[j];

        order[j] = order[i];
        order[i] = rank;
        message.placement.ranks[i] = rank;
    }
    for (uint32_t r = 0; r < rig->n_ranks; r++) {
        assert_int_equal(fv_worker_open(rig->workers[r], &message), FV_OK);
    }
    *s = (fv_rig_session_t){.is_open = true, .model = model, .placement = message.placement};
}

static double *copy_doubles(const double *from, size_t n)
{
    double *to = malloc((n + 1U) * sizeof(*to));

    assert_non_null(to);
    if (n > 0U) {
        memcpy(to, from, n * sizeof(*to));
    }
    return to;
}

void fv_rig_fork(fv_rig_t *rig, uint32_t slot, uint32_t parent, uint64_t at_position)
{
    fv_ctl_fork_t message = {
        .session_slot = slot, .parent_slot = parent, .at_position = at_position};
    const fv_rig_session_t *p = &rig->sessions[parent];
    const fv_model_spec_t *spec = &rig->models[p->model];
    fv_rig_session_t *c = &rig->sessions[slot];

    for (uint32_t r = 0; r < rig->n_ranks; r++) {
        assert_int_equal(fv_worker_fork(rig->workers[r], &message), FV_OK);
    }
    *c = *p;
    for (uint32_t l = 0; l < FV_RIG_LAYERS; l++) {
        uint64_t n = (p->layers[l].n_tokens < at_position) ? p->layers[l].n_tokens : at_position;
        size_t heads = n * (size_t)spec->n_kv_heads;

        c->layers[l].n_tokens = n;
        c->layers[l].floor = (p->layers[l].floor < n) ? p->layers[l].floor : n;
        c->layers[l].k = copy_doubles(p->layers[l].k, heads * (size_t)spec->head_dim_qk);
        c->layers[l].v = copy_doubles(p->layers[l].v, heads * (size_t)spec->head_dim_v);
    }
}

bool fv_rig_is_readable(const fv_rig_t *rig,
                        uint32_t slot,
                        uint32_t layer,
                        uint64_t position,
                        uint64_t end)
{
    const fv_rig_session_t *s = &rig->sessions[slot];
    const fv_model_spec_t *spec = &rig->models[s->model];

    for (uint32_t l = 0; l < FV_RIG_LAYERS; l++) {
        if (((layer == UINT32_MAX) || (layer == l)) && (position < s->layers[l].n_tokens) &&
            !fv_policy_is_readable(&spec->policies[spec->layer_policy[l]], spec->n_kv_heads,
                                   fv_model_group(spec), (int64_t)s->layers[l].floor,
                                   (int64_t)position, (int64_t)end)) {
            return false;
        }
    }
    return true;
}

void fv_rig_truncate(fv_rig_t *rig, uint32_t slot, uint32_t layer, uint64_t position)
{
    fv_ctl_truncate_t message = {.session_slot = slot, .layer = layer, .position = position};
    fv_rig_session_t *s = &rig->sessions[slot];

    for (uint32_t r = 0; r < rig->n_ranks; r++) {
        assert_int_equal(fv_worker_truncate(rig->workers[r], &message), FV_OK);
    }
    for (uint32_t l = 0; l < FV_RIG_LAYERS; l++) {
        if (((layer == UINT32_MAX) || (layer == l)) && (s->layers[l].n_tokens > position)) {
            s->layers[l].n_tokens = position;
            s->layers[l].floor = (s->layers[l].floor < position) ? s->layers[l].floor : position;
        }
    }
}

void fv_rig_close(fv_rig_t *rig, uint32_t slot)
{
    fv_ctl_close_t message = {.session_slot = slot};

    for (uint32_t r = 0; r < rig->n_ranks; r++) {
        assert_int_equal(fv_worker_close(rig->workers[r], &message), FV_OK);
    }
    for (uint32_t l = 0; l < FV_RIG_LAYERS; l++) {
        free(rig->sessions[slot].layers[l].k);
        free(rig->sessions[slot].layers[l].v);
    }
    rig->sessions[slot] = (fv_rig_session_t){0};
}

/* Pages of one layer that the head's KV on context part cp still needs, page by page. */
static uint64_t count_pages(const fv_rig_t *rig,
                            const fv_rig_session_t *session,
                            uint32_t layer,
                            int32_t cp,
                            int32_t head)
{
    const fv_model_spec_t *spec = &rig->models[session->model];
    const fv_policy_t *policy = &spec->policies[spec->layer_policy[layer]];
    const fv_rig_layer_t *l = &session->layers[layer];
    uint64_t n = 0;

    for (uint64_t token = 0; token < l->n_tokens; token += FV_PAGE_TOKENS) {
        int64_t page = (int64_t)(token / FV_PAGE_TOKENS);

        n += (fv_placement_part_of(&session->placement, token) == cp) &&
             ((page >= fv_policy_dead_pages(policy, (int64_t)l->floor)) ||
              fv_policy_keeps(policy, head, fv_model_group(spec), page));
    }
    return n;
}

void fv_rig_check_pages(const fv_rig_t *rig)
{
    for (uint32_t s = 0; s < FV_RIG_SESSIONS; s++) {
        const fv_rig_session_t *session = &rig->sessions[s];
        const fv_placement_t *p = &session->placement;

        for (uint32_t r = 0; session->is_open && (r < rig->n_ranks); r++) {
            int32_t cell = fv_placement_cell(p, r);
            uint64_t expected = 0;

            for (uint32_t l = 0; (cell >= 0) && (l < FV_RIG_LAYERS); l++) {
                int32_t hp = cell / p->n_ctx_parts;

                fv_head_part_t part = fv_placement_head_part(p, &rig->models[session->model], hp);

                for (int32_t h = part.head_begin; h < part.head_end; h++) {
                    expected += count_pages(rig, session, l, cell % p->n_ctx_parts, h);
                }
            }
            assert_int_equal(fv_worker_session_pages(rig->workers[r], s), expected);
        }
    }
}

fv_model_spec_t fv_rig_random_spec(fv_random_t *r)
{
    fv_model_spec_t spec = {
        .name = "rig",
        .n_layers = FV_RIG_LAYERS,
        .n_kv_heads = (int32_t)fv_random_int(r, 1, 5),
        .head_dim_qk = (int32_t)fv_random_int(r, 2, 6) * 8,
        .head_dim_v = (int32_t)fv_random_int(r, 2, 6) * 8,
        .kv_dtype = (int32_t)fv_random_int(r, FV_DTYPE_F32, FV_DTYPE_BF16),
        .logit_softcap = (fv_random_int(r, 0, 3) == 0) ? 5.0F : 0.0F,
        .n_policies = 2,
        .policies = {{.kind = FV_POLICY_DENSE},
                     {.kind = FV_POLICY_WINDOW,
                      .window_tokens = (int32_t)fv_random_int(r, 1, 150),
                      .sink_tokens = (int32_t)fv_random_int(r, 0, 5)}},
    };

    spec.n_q_heads = spec.n_kv_heads * (int32_t)fv_random_int(r, 1, 4);
    spec.layer_policy[1] = (uint8_t)fv_random_int(r, 0, 1);
    return spec;
}

fv_model_spec_t fv_rig_random_sparse_spec(fv_random_t *r)
{
    fv_model_spec_t spec = fv_rig_random_spec(r);

    spec.n_policies = 3;
    spec.policies[2] = (fv_policy_t){.kind = FV_POLICY_S2,
                                     .block_tokens = 16 << fv_random_int(r, 0, 4),
                                     .local_blocks = (int32_t)fv_random_int(r, 1, 4),
                                     .vert_stride = (int32_t)fv_random_int(r, 1, 9),
                                     .head_sliding_offset = (int32_t)fv_random_int(r, -3, 3),
                                     .pattern_per = (int32_t)fv_random_int(r, 0, 1),
                                     .homo_head = fv_random_int(r, 0, 4) == 0};
    spec.layer_policy[0] = (fv_random_int(r, 0, 2) == 0) ? 2U : 0U;
    spec.layer_policy[1] = (uint8_t)fv_random_int(r, 0, 2);
    assert_int_equal(fv_model_spec_check(&spec), FV_OK); /* resolves the pattern */
    return spec;
}

fv_model_spec_t fv_rig_random_latent(fv_random_t *r, int32_t n_groups)
{
    fv_model_spec_t spec = fv_rig_random_spec(r);

    spec.kind = FV_MODEL_LATENT;
    spec.n_kv_heads = 0;
    spec.n_q_heads = (int32_t)fv_random_int(r, 1, 9);
    spec.head_dim_qk = 0;
    spec.head_dim_v = 0;
    spec.latent_dim = (n_groups > 2) ? 256 : (64 * (int32_t)fv_random_int(r, 1, 3));
    spec.rope_dim = 8 * (int32_t)fv_random_int(r, 0, 4);
    spec.softmax_scale = 0.11F;
    if (fv_random_int(r, 0, 1) == 0) {
        spec.latent_norm = (fv_latent_norm_t){.mode = FV_NORM_SLICE_RMS, .eps = 1e-6F};
    }
    if (n_groups == 0) {
        return spec;
    }
    spec.sharding.mode = FV_SHARDING_LATENT;
    spec.sharding.groups = n_groups;
    spec.sharding.n_mu = n_groups;
    for (int32_t g = 0; g < n_groups; g++) { /* shares 1/2, 1/4 ... : no two slices alike */
        spec.sharding.mu[g] = 1.0F + 0.25F * (float)g;
        if (spec.latent_norm.mode != FV_NORM_NONE) {
            spec.latent_norm.n_alpha = n_groups;
            spec.latent_norm.alpha[g] = (float)(1 << ((g + 1 < n_groups) ? (g + 1) : g));
        }
    }
    return spec;
}
