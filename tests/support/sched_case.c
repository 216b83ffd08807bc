/*
 * sched_case.c - see sched_case.h.
 */
#include "tests/support/sched_case.h"

#include "tests/support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

fv_model_spec_t fv_case_spec(const char *name)
{
    fv_model_spec_t spec;

    memset(&spec, 0, sizeof(spec));
    (void)snprintf(spec.name, sizeof(spec.name), "%s", name);
    spec.n_layers = 2;
    spec.n_q_heads = 4;
    spec.n_kv_heads = 2;
    spec.head_dim_qk = 16;
    spec.kv_dtype = FV_DTYPE_BF16;
    spec.n_policies = 1;
    return spec;
}

fv_ctl_memory_t fv_case_memory(uint32_t n_slabs, uint32_t slab_bytes)
{
    return (fv_ctl_memory_t){.kv_bytes_total = (uint64_t)n_slabs * slab_bytes,
                             .kv_bytes_free = (uint64_t)n_slabs * slab_bytes,
                             .slab_bytes = slab_bytes,
                             .n_slabs_free = n_slabs};
}

fv_sched_t *fv_case_sched(uint32_t n_ranks, uint32_t n_slabs, uint32_t slab_bytes)
{
    return fv_case_sched_pieces(n_ranks, n_slabs, slab_bytes, 0);
}

fv_sched_t *
fv_case_sched_pieces(uint32_t n_ranks, uint32_t n_slabs, uint32_t slab_bytes, uint32_t n_tokens)
{
    return fv_case_sched_ways(n_ranks, n_slabs, slab_bytes, n_tokens, FV_PLAN_PREFILL_VISIT);
}

fv_sched_t *fv_case_sched_ways(uint32_t n_ranks,
                               uint32_t n_slabs,
                               uint32_t slab_bytes,
                               uint32_t n_tokens,
                               fv_plan_prefill_t way)
{
    fv_sched_t *sched = NULL;
    fv_sched_config_t config = {.n_ranks = n_ranks,
                                .sessions_max = 64,
                                .step_tokens_max = 256,
                                .prefill_tokens_per_step = n_tokens,
                                .shard_tokens = 64,
                                .context_prefill = way,
                                .move_bytes = (size_t)1 << 20,
                                .cost = fv_plan_cost_cpu()};

    assert_int_equal(fv_sched_create(&config, &sched), FV_OK);
    for (uint32_t r = 0; r < n_ranks; r++) {
        fv_ctl_memory_t memory = fv_case_memory(n_slabs, slab_bytes);
        fv_sched_rank_memory(sched, r, &memory);
    }
    return sched;
}

void fv_case_register(fv_sched_t *sched, fv_model_spec_t *spec, char out_id[FV_MODEL_ID_BYTES])
{
    fv_register_response_t response;
    static fv_ctl_model_t message;
    bool is_new = false;

    assert_int_equal(fv_sched_register(sched, spec, NULL, &response, &is_new, &message), FV_OK);
    memcpy(out_id, response.model_id, FV_MODEL_ID_BYTES);
}

fv_session_id_t fv_case_open(fv_sched_t *sched, const char *model_id, const fv_sharding_t *sharding)
{
    static uint64_t n_opened;
    fv_open_request_t request = {0};
    fv_session_id_t id = {{0}};
    fv_ctl_open_t message;

    n_opened++;
    memcpy(id.bytes, &n_opened, sizeof(n_opened));
    memcpy(request.model_id, model_id, FV_MODEL_ID_BYTES);
    if (sharding != NULL) {
        request.sharding = *sharding;
        request.sharding.is_set = 1;
    }
    fv_birth_t birth = {.id = id};
    assert_int_equal(fv_sched_open(sched, &request, &birth, &message), FV_OK);
    return id;
}

fv_case_request_t *fv_case_request(uint32_t layer, bool append)
{
    fv_case_request_t *r = calloc(1, sizeof(*r));

    assert_non_null(r);
    r->request.head.layer = layer;
    r->request.head.append = append;
    r->request.head.causal = true;
    r->request.head.dtype = FV_DTYPE_F32;
    r->request.items = r->items;
    r->request.digests = r->digests;
    r->request.ctl_items = r->ctl_items;
    r->request.sessions = r->sessions;
    r->request.deadline_us = INT64_MAX;
    r->request.user = r;
    return r;
}

void fv_case_add(fv_case_request_t *r,
                 fv_session_id_t session,
                 uint64_t position,
                 uint32_t n_tokens,
                 uint32_t digest)
{
    uint32_t i = r->request.head.n_items;

    assert_true(i < FV_COUNT(r->items));
    r->items[i] =
        (fv_attend_item_t){.session = session, .position = position, .n_tokens = n_tokens};
    r->digests[i] = digest;
    r->request.head.n_items++;
    r->request.head.n_tokens += n_tokens;
}

void fv_case_sizes(fv_case_request_t *r, const fv_model_spec_t *spec)
{
    size_t e = fv_dtype_bytes(r->request.head.dtype);
    size_t n = (size_t)r->request.head.n_tokens;
    size_t n_kv = r->request.head.append ? n : 0U;

    r->request.head.q.n_bytes = n * (size_t)(spec->n_q_heads * spec->head_dim_qk) * e;
    r->request.head.k.n_bytes = n_kv * (size_t)(spec->n_kv_heads * spec->head_dim_qk) * e;
    r->request.head.v.n_bytes = n_kv * (size_t)(spec->n_kv_heads * fv_model_v_dim_sent(spec)) * e;
}

bool fv_case_is_cancelled(void *user)
{
    return ((fv_case_request_t *)user)->is_cancelled;
}
