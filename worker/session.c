/*
 * session.c - page tables of a session: grow, share, cut.
 */
#include "worker/session.h"

#include "proto/reduce.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define STRIDE_MIN 4U /* pages per head of the first table: 256 tokens */

/* Never used twice in a process, so that what a backend keeps of a closed session is nobody's. */
static uint64_t take_table_ids(uint64_t n)
{
    static atomic_uint_fast64_t s_next = 1;

    return atomic_fetch_add_explicit(&s_next, n, memory_order_relaxed);
}

fv_status_t fv_session_create(const fv_worker_model_t *model,
                              uint32_t model_slot,
                              const fv_placement_t *placement,
                              uint32_t rank,
                              fv_session_t **out)
{
    int32_t cell = fv_placement_cell(placement, rank);
    fv_session_t *session = calloc(1, sizeof(*session));

    if (session == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "session: no host memory");
    }
    session->model = model;
    session->model_slot = model_slot;
    session->placement = *placement;
    session->rank = rank;
    session->table_id = take_table_ids((uint64_t)model->spec.n_layers);
    session->cp = -1;
    if (cell >= 0) {
        int32_t hp = cell / placement->n_ctx_parts;

        session->cp = cell % placement->n_ctx_parts;
        session->head_begin = fv_placement_head_part(placement, &model->spec, hp).head_begin;
        session->n_heads = fv_placement_n_heads(placement, &model->spec, hp);
        session->layers = calloc((size_t)model->spec.n_layers, sizeof(*session->layers));
        if (session->layers == NULL) {
            free(session);
            return fv_fail(FV_ERR_NO_MEMORY, "session: no host memory for %d layers",
                           model->spec.n_layers);
        }
    }
    *out = session;
    return FV_OK;
}

/* An entry of the table leaves it. */
static void release(fv_layer_kv_t *layer, size_t i, fv_kv_pool_t *pool)
{
    if (layer->pages[i] == FV_PAGE_NONE) {
        layer->n_freed--;
    } else {
        fv_kv_pool_unref(pool, layer->pages[i]);
    }
}

/* Drops the pages [n_keep, n_pages) of every head. */
static void
drop_pages(const fv_session_t *session, fv_layer_kv_t *layer, uint32_t n_keep, fv_kv_pool_t *pool)
{
    for (uint32_t h = 0; h < (uint32_t)session->n_heads; h++) {
        for (uint32_t p = n_keep; p < layer->n_pages; p++) {
            release(layer, (size_t)h * layer->stride + p, pool);
        }
    }
    if (n_keep < layer->n_pages) {
        layer->n_pages = n_keep;
        layer->table_version++;
    }
    if (layer->n_dead > layer->n_pages) {
        layer->n_dead = layer->n_pages;
    }
}

void fv_session_destroy(fv_session_t *session, fv_kv_pool_t *pool)
{
    if (session == NULL) {
        return;
    }
    for (int32_t i = 0; (session->layers != NULL) && (i < session->model->spec.n_layers); i++) {
        drop_pages(session, &session->layers[i], 0, pool);
        free(session->layers[i].pages);
    }
    free(session->layers);
    free(session);
}

/* Room for n pages per head, doubling so that growth costs O(1) per page. */
static fv_status_t grow_table(const fv_session_t *session, fv_layer_kv_t *layer, uint64_t n)
{
    uint64_t stride = (layer->stride == 0U) ? STRIDE_MIN : layer->stride;
    size_t n_bytes = 0;

    if (n <= layer->stride) {
        return FV_OK;
    }
    while (stride < n) {
        stride *= 2U;
    }
    if ((stride > INT32_MAX) ||
        !fv_size_mul((size_t)stride * sizeof(fv_page_ref_t), (size_t)session->n_heads, &n_bytes)) {
        return fv_fail(FV_ERR_EXHAUSTED, "page table: %llu pages per head are too many",
                       (unsigned long long)n);
    }
    fv_page_ref_t *pages = malloc(n_bytes);
    if (pages == NULL) {
        return fv_fail(FV_ERR_EXHAUSTED, "page table: no host memory for %zu bytes", n_bytes);
    }
    for (size_t h = 0; (layer->n_pages > 0U) && (h < (size_t)session->n_heads); h++) {
        memcpy(&pages[h * stride], &layer->pages[h * layer->stride],
               layer->n_pages * sizeof(*pages));
    }
    free(layer->pages);
    layer->pages = pages;
    layer->stride = (uint32_t)stride;
    return FV_OK;
}

static uint32_t pages_for(const fv_session_t *session, uint64_t n_tokens)
{
    return (uint32_t)fv_placement_pages(&session->placement, session->cp, n_tokens);
}

/* A copied entry becomes one more reference. */
static void share(fv_layer_kv_t *layer, size_t i, fv_kv_pool_t *pool)
{
    if (layer->pages[i] == FV_PAGE_NONE) {
        layer->n_freed++;
    } else {
        fv_kv_pool_ref(pool, layer->pages[i]);
    }
}

fv_status_t fv_session_fork(const fv_session_t *parent,
                            uint64_t at_position,
                            fv_kv_pool_t *pool,
                            fv_session_t **out)
{
    fv_session_t *child = NULL;

    FV_RETURN_IF_ERR(fv_session_create(parent->model, parent->model_slot, &parent->placement,
                                       parent->rank, &child));
    FV_ASSERT((child != NULL) && ((parent->layers == NULL) || (child->layers != NULL)));
    for (int32_t i = 0; (parent->layers != NULL) && (i < parent->model->spec.n_layers); i++) {
        const fv_layer_kv_t *from = &parent->layers[i];
        fv_layer_kv_t *to = &child->layers[i];
        uint64_t length = (from->length < at_position) ? from->length : at_position;
        uint32_t n_pages = pages_for(parent, length);

        if (grow_table(child, to, n_pages) != FV_OK) {
            fv_session_destroy(child, pool);
            return fv_fail(FV_ERR_NO_MEMORY, "fork: no host memory for the page tables");
        }
        for (size_t h = 0; (n_pages > 0U) && (h < (size_t)parent->n_heads); h++) {
            memcpy(&to->pages[h * to->stride], &from->pages[h * from->stride],
                   n_pages * sizeof(*to->pages));
            for (uint32_t p = 0; p < n_pages; p++) {
                share(to, h * to->stride + p, pool);
            }
        }
        to->n_pages = n_pages;
        to->n_dead = (from->n_dead < n_pages) ? from->n_dead : n_pages;
        to->floor = (from->floor < length) ? from->floor : length;
        to->length = length;
    }
    *out = child;
    return FV_OK;
}

void fv_session_truncate(fv_session_t *session,
                         uint32_t layer,
                         uint64_t position,
                         fv_kv_pool_t *pool)
{
    fv_layer_kv_t *l = &session->layers[layer];

    l->floor = (l->floor < position) ? l->floor : position;
    if (position < l->length) {
        l->length = position;
        fv_session_trim(session, layer, pool);
    }
}

void fv_session_settle(fv_session_t *session, uint32_t layer, uint64_t position, fv_kv_pool_t *pool)
{
    const fv_model_spec_t *spec = &session->model->spec;
    const fv_policy_t *policy = &spec->policies[spec->layer_policy[layer]];
    fv_layer_kv_t *l = &session->layers[layer];
    uint64_t end = fv_reduce_dead(&session->placement, session->cp, policy, position);

    l->floor = position;
    for (; (l->n_dead < end) && (l->n_dead < l->n_pages); l->n_dead++) {
        int64_t page = fv_reduce_page(&session->placement, session->cp, l->n_dead);

        for (int32_t h = 0; h < session->n_heads; h++) {
            fv_page_ref_t *entry = &l->pages[(size_t)h * l->stride + l->n_dead];

            if (!fv_policy_keeps(policy, session->head_begin + h, fv_model_group(spec), page)) {
                fv_kv_pool_unref(pool, *entry);
                *entry = FV_PAGE_NONE;
                l->n_freed++;
            }
        }
    }
}

void fv_session_trim(fv_session_t *session, uint32_t layer, fv_kv_pool_t *pool)
{
    fv_layer_kv_t *l = &session->layers[layer];

    drop_pages(session, l, pages_for(session, l->length), pool);
}

/* Heads whose last page must be copied before `n_filled` > 0 of its slots are followed by another. */
static uint32_t
count_shared(const fv_session_t *session, const fv_layer_kv_t *layer, const fv_kv_pool_t *pool)
{
    uint32_t n = 0;

    for (size_t h = 0; h < (size_t)session->n_heads; h++) {
        n += fv_kv_pool_refs(pool, layer->pages[h * layer->stride + layer->n_pages - 1U]) > 1U;
    }
    return n;
}

/* Replaces the shared last pages by own ones, to be filled by the copies. */
static size_t unshare_last(fv_session_t *session,
                           fv_layer_kv_t *layer,
                           int32_t n_filled,
                           fv_kv_pool_t *pool,
                           fv_page_copy_t *copies)
{
    const fv_model_spec_t *spec = &session->model->spec;
    size_t n = 0;

    layer->table_version++;
    for (size_t h = 0; h < (size_t)session->n_heads; h++) {
        fv_page_ref_t *page = &layer->pages[h * layer->stride + layer->n_pages - 1U];

        if (fv_kv_pool_refs(pool, *page) > 1U) {
            fv_page_ref_t own = fv_kv_pool_take(pool, session->model->page_class);

            copies[n++] = (fv_page_copy_t){.src = *page,
                                           .dst = own,
                                           .n_tokens = n_filled,
                                           .head_dim_qk = fv_model_stored_dim_qk(spec),
                                           .head_dim_v = fv_model_stored_dim_v(spec),
                                           .kv_dtype = spec->kv_dtype,
                                           .v_in_k = fv_model_is_latent(spec)};
            fv_kv_pool_unref(pool, *page);
            *page = own;
        }
    }
    return n;
}

fv_status_t fv_session_reserve(fv_session_t *session,
                               uint32_t layer,
                               uint64_t end,
                               fv_kv_pool_t *pool,
                               fv_page_copy_t *copies,
                               size_t *out_n_copies)
{
    fv_layer_kv_t *l = &session->layers[layer];
    uint64_t own = fv_session_own(session, l->length);
    uint64_t n_pages = fv_placement_pages(&session->placement, session->cp, end);
    int32_t n_filled = (int32_t)(own % FV_PAGE_TOKENS);
    bool writes_last = (n_filled != 0) && (fv_session_own(session, end) > own);
    uint64_t n_new = (n_pages - l->n_pages) * (uint64_t)session->n_heads;
    uint32_t n_shared = writes_last ? count_shared(session, l, pool) : 0U;

    if (!fv_kv_pool_has(pool, session->model->page_class, n_new + n_shared)) {
        uint64_t n_bytes = (n_new + n_shared) * fv_model_page_bytes(&session->model->spec);

        return fv_fail(FV_ERR_EXHAUSTED, "KV memory: %llu bytes needed, %llu free",
                       (unsigned long long)n_bytes,
                       (unsigned long long)fv_kv_pool_bytes_free(pool));
    }
    FV_RETURN_IF_ERR(grow_table(session, l, n_pages));
    *out_n_copies = (n_shared > 0U) ? unshare_last(session, l, n_filled, pool, copies) : 0U;
    /* page by page over all heads: a decoding session's heads come to lie together */
    for (size_t p = l->n_pages; p < n_pages; p++) {
        for (size_t h = 0; h < (size_t)session->n_heads; h++) {
            l->pages[h * l->stride + p] = fv_kv_pool_take(pool, session->model->page_class);
        }
    }
    l->n_pages = (uint32_t)n_pages;
    return FV_OK;
}

void fv_session_share_again(fv_session_t *session,
                            uint32_t layer,
                            uint32_t entry,
                            const fv_page_copy_t *copies,
                            size_t n_copies,
                            fv_kv_pool_t *pool)
{
    fv_layer_kv_t *l = &session->layers[layer];
    size_t n = 0;

    for (size_t h = 0; (n < n_copies) && (h < (size_t)session->n_heads); h++) {
        fv_page_ref_t *page = &l->pages[h * l->stride + entry];

        if (*page == copies[n].dst) { /* heads in order; some may not have been shared */
            *page = copies[n].src;
            fv_kv_pool_ref(pool, copies[n].src);
            fv_kv_pool_unref(pool, copies[n].dst);
            n++;
        }
    }
    l->table_version += (n > 0U) ? 1U : 0U;
}

fv_status_t fv_session_set_entries(fv_session_t *session,
                                   uint32_t layer,
                                   uint32_t first,
                                   uint32_t n,
                                   const fv_page_ref_t *refs)
{
    fv_layer_kv_t *l = &session->layers[layer];

    FV_RETURN_IF_ERR(grow_table(session, l, (uint64_t)first + n));
    drop_pages(session, l, first, NULL);
    for (size_t h = 0; h < (size_t)session->n_heads; h++) {
        for (uint32_t p = 0; p < n; p++) {
            l->pages[h * l->stride + first + p] = refs[h * n + p];
            l->n_freed += (refs[h * n + p] == FV_PAGE_NONE) ? 1U : 0U;
        }
    }
    l->n_pages = first + n;
    return FV_OK;
}

uint64_t fv_session_pages(const fv_session_t *session)
{
    uint64_t n = 0;

    for (int32_t i = 0; (session->layers != NULL) && (i < session->model->spec.n_layers); i++) {
        n += (uint64_t)session->layers[i].n_pages * (uint64_t)session->n_heads -
             session->layers[i].n_freed;
    }
    return n;
}
