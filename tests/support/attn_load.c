/*
 * attn_load.c - an attention case goes into a backend: pages dealt out, tokens appended, items described.
 */
#include "tests/support/attn_case.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define WILD_ENTRIES 3U /* page-table entries past the end, that nothing may follow */

static size_t page_units(const fv_attn_spec_t *s)
{
    if (s->kv_dtype == (int32_t)FV_DTYPE_FP8_LATENT) {
        return (size_t)fv_div_up(
            FV_PAGE_TOKENS * fv_fp8_token_bytes(s->head_dim_v, s->head_dim_qk - s->head_dim_v),
            FV_PAGE_UNIT);
    }
    return (size_t)(s->head_dim_qk + (s->v_in_k ? 0 : s->head_dim_v)) * FV_PAGE_TOKENS *
           fv_dtype_bytes((fv_dtype_t)s->kv_dtype) / FV_PAGE_UNIT;
}

static fv_kv_shard_t part_shard(const fv_attn_spec_t *s, uint16_t part)
{
    fv_kv_shard_t shard = {.shard_tokens = s->shard_tokens, .n_parts = s->n_parts, .part = part};

    return shard;
}

static size_t part_pages(const fv_attn_spec_t *s, uint16_t part)
{
    fv_kv_shard_t shard = part_shard(s, part);

    return (size_t)fv_shard_pages(&shard, s->kv_end);
}

size_t fv_attn_case_arena_bytes(const fv_attn_case_t *attn)
{
    size_t n_pages = 0;

    for (uint16_t part = 0; part < attn->spec.n_parts; part++) {
        n_pages += part_pages(&attn->spec, part) * (size_t)attn->spec.n_kv_heads;
    }
    return n_pages * page_units(&attn->spec) * FV_PAGE_UNIT;
}

static void shuffle(fv_page_ref_t *refs, size_t n, fv_rng_t *rng)
{
    for (size_t i = n; i > 1U; i--) {
        size_t j = (size_t)fv_rng_range(rng, 0, (int64_t)i - 1);
        fv_page_ref_t swap = refs[i - 1U];

        refs[i - 1U] = refs[j];
        refs[j] = swap;
    }
}

void fv_attn_case_place(fv_attn_case_t *attn, fv_rng_t *rng, uint32_t *next_unit)
{
    const fv_attn_spec_t *s = &attn->spec;
    size_t units = page_units(s);
    size_t n_pages = fv_attn_case_arena_bytes(attn) / (units * FV_PAGE_UNIT);
    size_t n_tables = (size_t)s->n_parts * (size_t)s->n_kv_heads;
    fv_page_ref_t *refs = malloc((n_pages + 1U) * sizeof(*refs));
    size_t used = 0;

    attn->pages_stride = part_pages(s, 0) + WILD_ENTRIES; /* part 0 has the most */
    free(attn->pages);
    attn->pages = malloc(n_tables * attn->pages_stride * sizeof(*attn->pages));
    if ((refs == NULL) || (attn->pages == NULL)) {
        abort();
    }
    for (size_t i = 0; i < n_pages; i++) {
        refs[i] = *next_unit + (uint32_t)(i * units);
    }
    *next_unit += (uint32_t)(n_pages * units);
    if (!s->tame) {
        shuffle(refs, n_pages, rng);
    }
    memset(attn->pages, 0xa5, n_tables * attn->pages_stride * sizeof(*attn->pages));
    for (size_t table = 0; table < n_tables; table++) {
        size_t n = part_pages(s, (uint16_t)(table / (size_t)s->n_kv_heads));

        memcpy(attn->pages + table * attn->pages_stride, refs + used, n * sizeof(*refs));
        used += n;
    }
    free(refs);
}

static fv_append_item_t append_item(const fv_attn_case_t *attn, uint16_t part)
{
    const fv_attn_spec_t *s = &attn->spec;
    size_t e = fv_dtype_bytes((fv_dtype_t)s->io_dtype);
    fv_append_item_t item;

    memset(&item, 0, sizeof(item));
    item.n_kv_heads = s->n_kv_heads;
    item.head_dim_qk = s->head_dim_qk;
    item.head_dim_v = s->head_dim_v;
    item.src_dtype = s->io_dtype;
    item.kv_dtype = s->kv_dtype;
    item.v_in_k = s->v_in_k;
    item.norm_alpha = s->norm_alpha;
    item.norm_eps = FV_ATTN_NORM_EPS;
    item.k_token_bytes = (size_t)s->n_kv_heads * (size_t)s->head_dim_qk * e;
    item.v_token_bytes = (size_t)s->n_kv_heads * (size_t)s->head_dim_v * e;
    item.pages = attn->pages + (size_t)part * (size_t)s->n_kv_heads * attn->pages_stride;
    item.pages_head_stride = attn->pages_stride;
    return item;
}

/* Every slot of every page becomes NaN: one row of NaN, appended with stride 0. */
static fv_status_t poison_pages(const fv_attn_case_t *attn,
                                const fv_backend_ops_t *ops,
                                fv_backend_t *backend,
                                uint16_t part)
{
    fv_append_item_t item = append_item(attn, part);
    size_t n = item.k_token_bytes + item.v_token_bytes;
    uint8_t *row = malloc(n);
    fv_status_t status = FV_OK;

    if (row == NULL) {
        abort();
    }
    memset(row, 0xff, n); /* NaN in every dtype */
    item.k = row;
    item.v = row;
    item.k_token_bytes = 0;
    item.v_token_bytes = 0;
    item.n_tokens = part_pages(&attn->spec, part) * FV_PAGE_TOKENS;
    status = ops->append(backend, &item, 1);
    free(row);
    return status;
}

/* Tokens [token, end) lie in one shard block of `part`; appended in chunks of random sizes. */
static fv_status_t append_block(const fv_attn_case_t *attn,
                                const fv_backend_ops_t *ops,
                                fv_backend_t *backend,
                                uint16_t part,
                                int64_t token,
                                int64_t end,
                                fv_rng_t *rng)
{
    const fv_attn_spec_t *s = &attn->spec;
    int64_t shard_tokens = (int64_t)s->shard_tokens;
    fv_append_item_t item = append_item(attn, part);

    while (token < end) {
        int64_t n = s->tame ? (end - token) : fv_min64(end - token, fv_rng_range(rng, 1, 90));

        item.k = (const uint8_t *)attn->k + (size_t)token * item.k_token_bytes;
        item.v = (const uint8_t *)attn->v + (size_t)token * item.v_token_bytes;
        item.local_begin =
            (uint64_t)(token / shard_tokens / s->n_parts * shard_tokens + token % shard_tokens);
        item.n_tokens = (uint64_t)n;
        FV_RETURN_IF_ERR(ops->append(backend, &item, 1));
        token += n;
    }
    return FV_OK;
}

fv_status_t fv_attn_case_load(fv_attn_case_t *attn,
                              const fv_backend_ops_t *ops,
                              fv_backend_t *backend,
                              fv_rng_t *rng)
{
    const fv_attn_spec_t *s = &attn->spec;
    int64_t shard_tokens = (int64_t)s->shard_tokens;

    for (uint16_t part = 0; !s->tame && (part < s->n_parts); part++) {
        FV_RETURN_IF_ERR(poison_pages(attn, ops, backend, part));
    }
    for (int64_t block = 0; block * shard_tokens < s->kv_end; block++) {
        FV_RETURN_IF_ERR(append_block(attn, ops, backend, (uint16_t)(block % s->n_parts),
                                      block * shard_tokens,
                                      fv_min64((block + 1) * shard_tokens, s->kv_end), rng));
    }
    return FV_OK;
}

fv_attn_item_t fv_attn_case_item(const fv_attn_case_t *attn, uint16_t part, void *out, float *lse)
{
    const fv_attn_spec_t *s = &attn->spec;
    size_t e = fv_dtype_bytes((fv_dtype_t)s->io_dtype);
    fv_attn_item_t item;

    memset(&item, 0, sizeof(item));
    item.n_tokens = s->n_tokens;
    item.n_kv_heads = s->n_kv_heads;
    item.group = s->group;
    item.head_dim_qk = s->head_dim_qk;
    item.head_dim_v = s->head_dim_v;
    item.io_dtype = s->io_dtype;
    item.kv_dtype = s->kv_dtype;
    item.v_in_k = s->v_in_k;
    item.latent_mu = s->latent_mu;
    item.softmax_scale = s->softmax_scale;
    item.logit_softcap = s->logit_softcap;
    item.causal = s->causal;
    item.policy = s->policy;
    item.kv_head_begin = s->kv_head_begin;
    item.shard = part_shard(s, part);
    item.position = s->position;
    item.kv_end = s->kv_end;
    item.q = attn->q;
    item.q_token_bytes = (size_t)attn->n_q_heads * (size_t)s->head_dim_qk * e;
    item.pages = attn->pages + (size_t)part * (size_t)s->n_kv_heads * attn->pages_stride;
    item.pages_head_stride = attn->pages_stride;
    item.out = out;
    item.out_token_bytes = (size_t)attn->n_q_heads * (size_t)s->head_dim_v * e;
    item.lse = lse;
    item.lse_token_stride = (size_t)attn->n_q_heads;
    return item;
}
