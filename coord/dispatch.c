/*
 * dispatch.c - walks requests, items and the cells of their placements once, and lists bytes.
 */
#include "coord/dispatch.h"

#include <stdlib.h>
#include <string.h>

struct fv_dispatch {
    uint32_t n_ranks, own_rank;
    fv_rank_work_t *works; /* [n_ranks] */
    uint32_t *ranks;       /* [n_ranks] with work in this build, ascending */
    size_t n_ranks_busy;
    uint8_t (*pads)[FV_STEP_ALIGN]; /* where padding bytes come from or go to, one each */
    size_t n_pads, pads_cap;
};

fv_status_t fv_dispatch_create(uint32_t n_ranks, uint32_t own_rank, fv_dispatch_t **out)
{
    fv_dispatch_t *d = calloc(1, sizeof(*d));

    if (d != NULL) {
        d->works = calloc(n_ranks, sizeof(*d->works));
        d->ranks = calloc(n_ranks, sizeof(*d->ranks));
    }
    if ((d == NULL) || (d->works == NULL) || (d->ranks == NULL)) {
        fv_dispatch_destroy(d);
        return fv_fail(FV_ERR_NO_MEMORY, "dispatch of %u ranks", n_ranks);
    }
    d->n_ranks = n_ranks;
    d->own_rank = own_rank;
    *out = d;
    return FV_OK;
}

void fv_dispatch_destroy(fv_dispatch_t *d)
{
    if (d == NULL) {
        return;
    }
    for (uint32_t r = 0; (d->works != NULL) && (r < d->n_ranks); r++) {
        free(d->works[r].items);
        free(d->works[r].origins);
        free(d->works[r].errors);
        free(d->works[r].io);
        free(d->works[r].inputs);
        free(d->works[r].outputs);
    }
    free(d->works);
    free(d->ranks);
    free(d->pads);
    free(d);
}

/* `array` points to a pointer to elements; doubles what it points to until it holds n of them. */
static fv_status_t grow(void *array, size_t *cap, size_t n, size_t element_bytes)
{
    size_t new_cap = (*cap == 0) ? 64U : *cap;
    void *elements = NULL;

    if (n <= *cap) {
        return FV_OK;
    }
    while (new_cap < n) {
        new_cap *= 2U;
    }
    memcpy(&elements, array, sizeof(elements));
    elements = realloc(elements, new_cap * element_bytes);
    if (elements == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "dispatch: %zu x %zu bytes", new_cap, element_bytes);
    }
    memcpy(array, &elements, sizeof(elements));
    *cap = new_cap;
    return FV_OK;
}

#define GROW(array, cap, n) grow(&(array), &(cap), (n), sizeof(*(array)))

static fv_status_t grow_items(fv_rank_work_t *work)
{
    size_t cap = 0;

    if (work->n_items < work->items_cap) {
        return FV_OK;
    }
    size_t want = work->n_items + 1U;
    cap = work->items_cap;
    FV_RETURN_IF_ERR(GROW(work->origins, cap, want));
    cap = work->items_cap;
    FV_RETURN_IF_ERR(GROW(work->errors, cap, want));
    cap = work->items_cap;
    FV_RETURN_IF_ERR(GROW(work->io, cap, want));
    return GROW(work->items, work->items_cap, want);
}

static fv_status_t add_input(fv_rank_work_t *work, const void *data, size_t n_bytes)
{
    if (n_bytes == 0) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(GROW(work->inputs, work->inputs_cap, work->n_inputs + 1U));
    work->inputs[work->n_inputs++] =
        (fv_segment_t){.data = (void *)(uintptr_t)data, .n_bytes = n_bytes};
    work->in_bytes += n_bytes;
    return FV_OK;
}

static fv_status_t add_output(fv_rank_work_t *work, void *data, size_t n_bytes)
{
    if (n_bytes == 0) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(GROW(work->outputs, work->outputs_cap, work->n_outputs + 1U));
    work->outputs[work->n_outputs++] = (fv_segment_t){.data = data, .n_bytes = n_bytes};
    work->out_bytes += n_bytes;
    return FV_OK;
}

/* Pads are counted before they are used (fv_dispatch_build), so their addresses do not move. */
static uint8_t *next_pad(fv_dispatch_t *d)
{
    FV_ASSERT(d->n_pads < d->pads_cap);
    return d->pads[d->n_pads++];
}

/*
 * A tensor [n_tokens, n_heads, dim] of which heads [head_begin, head_end) go: one segment when whole rows go,
 * else one a token. A slice of a latent: two of each head, the slice and the RoPE key.
 */
typedef struct fv_rows {
    const uint8_t *base;
    size_t row_bytes, offset_bytes, take_bytes; /* of a token: all heads; before ours; ours */
    size_t head_bytes;                          /* of one head; 0: heads go whole */
    size_t slice_at, slice_bytes, rope_at;      /* in it */
} fv_rows_t;

static fv_status_t add_slices(fv_rank_work_t *work, const fv_rows_t *rows, const uint8_t *first)
{
    for (size_t at = 0; at < rows->take_bytes; at += rows->head_bytes) {
        const uint8_t *head = first + at;

        FV_RETURN_IF_ERR(add_input(work, head + rows->slice_at, rows->slice_bytes));
        FV_RETURN_IF_ERR(add_input(work, head + rows->rope_at, rows->head_bytes - rows->rope_at));
    }
    return FV_OK;
}

static fv_status_t add_rows(fv_rank_work_t *work, const fv_rows_t *rows, uint64_t begin, uint64_t n)
{
    const uint8_t *first = rows->base + begin * rows->row_bytes + rows->offset_bytes;

    for (uint64_t t = 0; (rows->head_bytes > 0) && (t < n); t++) {
        FV_RETURN_IF_ERR(add_slices(work, rows, first + t * rows->row_bytes));
    }
    if (rows->head_bytes > 0) {
        return FV_OK;
    }
    if (rows->take_bytes == rows->row_bytes) {
        return add_input(work, first, n * rows->row_bytes);
    }
    for (uint64_t t = 0; t < n; t++) {
        FV_RETURN_IF_ERR(add_input(work, first + t * rows->row_bytes, rows->take_bytes));
    }
    return FV_OK;
}

static fv_status_t add_input_pad(fv_dispatch_t *d, fv_rank_work_t *work, size_t n_bytes)
{
    return add_input(work, next_pad(d), fv_align_up(n_bytes, FV_STEP_ALIGN) - n_bytes);
}

/* An item's place: its request, its tensors, its piece's first token among the request's. */
typedef struct fv_item_place {
    const fv_request_t *request;
    const fv_tensors_t *tensors;
    const fv_placement_t *placement;
    const fv_ctl_item_t *item;
    uint64_t token_begin;
    fv_item_share_t share;
} fv_item_place_t;

/* Heads [begin, end) of n_heads, of `dim` elements. */
static fv_rows_t rows_of(const fv_item_place_t *at,
                         const uint8_t *base,
                         int32_t n_heads,
                         int32_t begin,
                         int32_t end,
                         int32_t dim)
{
    const fv_model_spec_t *spec = at->request->spec;
    const fv_head_part_t *part = &at->share.part;
    size_t e = fv_dtype_bytes(at->request->head.dtype);
    size_t head_bytes = (size_t)dim * e;
    fv_rows_t rows = {
        .row_bytes = (size_t)n_heads * head_bytes,
        .offset_bytes = (size_t)begin * head_bytes,
        .take_bytes = (size_t)(end - begin) * head_bytes,
    };

    if (fv_model_groups(spec) > 1) {
        rows.head_bytes = head_bytes;
        rows.slice_at = (size_t)part->latent_begin * e;
        rows.slice_bytes = (size_t)part->head_dim_v * e;
        rows.rope_at = (size_t)spec->latent_dim * e;
    }
    rows.base = (base == NULL) ? NULL : (base + at->token_begin * rows.row_bytes);
    return rows;
}

static fv_status_t list_kv(const fv_item_place_t *at, fv_rank_work_t *work, const fv_rows_t *rows)
{
    uint64_t cursor = 0;
    fv_token_run_t run;

    while (fv_token_run_next(at->placement, at->share.cp, at->item, &cursor, &run)) {
        FV_RETURN_IF_ERR(add_rows(work, rows, run.item_begin, run.n_tokens));
    }
    return FV_OK;
}

static fv_status_t list_inputs(fv_dispatch_t *d, const fv_item_place_t *at, fv_rank_work_t *work)
{
    const fv_model_spec_t *spec = at->request->spec;
    const fv_head_part_t *part = &at->share.part;
    fv_rows_t q = rows_of(at, at->tensors->q, spec->n_q_heads, part->q_head_begin, part->q_head_end,
                          spec->head_dim_qk);
    fv_rows_t k = rows_of(at, at->tensors->k, spec->n_kv_heads, part->head_begin, part->head_end,
                          spec->head_dim_qk);
    fv_rows_t v = rows_of(at, at->tensors->v, spec->n_kv_heads, part->head_begin, part->head_end,
                          spec->head_dim_v);

    for (int32_t i = 0; (at->share.q_bytes > 0) && (i < at->share.n_spans); i++) {
        FV_RETURN_IF_ERR(add_rows(work, &q, at->share.spans[i].begin, at->share.spans[i].n));
    }
    FV_RETURN_IF_ERR(add_input_pad(d, work, at->share.q_bytes));
    FV_RETURN_IF_ERR(list_kv(at, work, &k));
    FV_RETURN_IF_ERR(add_input_pad(d, work, at->share.k_bytes));
    if (!fv_model_is_latent(spec)) {
        FV_RETURN_IF_ERR(list_kv(at, work, &v));
    }
    return add_input_pad(d, work, at->share.v_bytes);
}

/* A run of rows that a rank returns, of elements of row_bytes: contiguous within a token's local heads. */
static fv_status_t list_output_run(const fv_item_place_t *at,
                                   fv_rank_work_t *work,
                                   uint8_t *base,
                                   size_t row_bytes,
                                   uint64_t row,
                                   uint64_t row_end)
{
    const fv_model_spec_t *spec = at->request->spec;
    uint64_t n_local = (uint64_t)at->share.n_q_heads;

    while (row < row_end) {
        uint64_t t = row / n_local;
        uint64_t h = row % n_local;
        uint64_t n = n_local - h;
        if (n_local == (uint64_t)spec->n_q_heads) { /* whole tokens follow each other */
            n = row_end - row;
        } else if (n > row_end - row) {
            n = row_end - row;
        }
        uint64_t element = (at->token_begin + t) * (uint64_t)spec->n_q_heads +
                           (uint64_t)at->share.part.q_head_begin + h;
        FV_RETURN_IF_ERR(add_output(work, base + element * row_bytes, n * row_bytes));
        row += n;
    }
    return FV_OK;
}

static fv_status_t
list_output_rows(const fv_item_place_t *at, fv_rank_work_t *work, uint8_t *base, size_t row_bytes)
{
    uint64_t begin = 0;
    uint64_t end = 0;

    for (int32_t i = 0; fv_share_rows(&at->share, i, &begin, &end); i++) {
        FV_RETURN_IF_ERR(list_output_run(at, work, base, row_bytes, begin, end));
    }
    return FV_OK;
}

/* Rows of which this rank has one slice. */
static fv_status_t list_output_slices(const fv_item_place_t *at, fv_rank_work_t *work)
{
    const fv_model_spec_t *spec = at->request->spec;
    const fv_head_part_t *part = &at->share.part;
    size_t e = fv_dtype_bytes(at->request->head.dtype);
    uint64_t n_local = (uint64_t)at->share.n_q_heads;
    uint64_t begin = 0;
    uint64_t end = 0;

    for (int32_t i = 0; fv_share_rows(&at->share, i, &begin, &end); i++) {
        for (uint64_t row = begin; row < end; row++) {
            uint64_t element = (at->token_begin + row / n_local) * (uint64_t)spec->n_q_heads +
                               (uint64_t)part->q_head_begin + row % n_local;
            uint8_t *out = at->tensors->out + (element * (size_t)fv_item_out_dim(spec, at->item) +
                                               (size_t)fv_item_out_begin(part, at->item)) *
                                                  e;

            FV_RETURN_IF_ERR(add_output(work, out, (size_t)part->head_dim_v * e));
        }
    }
    return FV_OK;
}

static fv_status_t list_outputs(fv_dispatch_t *d, const fv_item_place_t *at, fv_rank_work_t *work)
{
    size_t e = fv_dtype_bytes(at->request->head.dtype);
    const fv_item_share_t *share = &at->share;

    FV_RETURN_IF_ERR(
        (fv_model_groups(at->request->spec) > 1)
            ? list_output_slices(at, work)
            : list_output_rows(at, work, at->tensors->out, (size_t)share->part.head_dim_v * e));
    FV_RETURN_IF_ERR(add_output(work, next_pad(d),
                                fv_align_up(share->out_bytes, FV_STEP_ALIGN) - share->out_bytes));
    if (share->lse_bytes > 0) {
        FV_RETURN_IF_ERR(list_output_rows(at, work, (uint8_t *)at->tensors->lse, sizeof(float)));
    }
    return add_output(work, next_pad(d),
                      fv_align_up(share->lse_bytes, FV_STEP_ALIGN) - share->lse_bytes);
}

static fv_step_io_t view_of(const fv_item_place_t *at)
{
    const fv_model_spec_t *spec = at->request->spec;
    size_t e = fv_dtype_bytes(at->request->head.dtype);
    size_t q_row = (size_t)spec->n_q_heads * (size_t)spec->head_dim_qk * e;
    size_t k_row = (size_t)spec->n_kv_heads * (size_t)spec->head_dim_qk * e;
    size_t v_row = (size_t)spec->n_kv_heads * (size_t)fv_model_v_dim_sent(spec) * e;
    size_t out_row = (size_t)spec->n_q_heads * (size_t)fv_item_out_dim(spec, at->item) * e;
    fv_step_io_t io = {
        .q = at->tensors->q + at->token_begin * q_row,
        .q_token_bytes = q_row,
        .k_token_bytes = k_row,
        .v_token_bytes = v_row,
        .out = at->tensors->out + at->token_begin * out_row,
        .out_token_bytes = out_row,
        .lse_token_stride = (size_t)spec->n_q_heads,
        .is_packed = false,
    };

    if ((at->item->flags & FV_ITEM_APPEND) != 0) {
        io.k = at->tensors->k + at->token_begin * k_row;
        io.v = at->tensors->v + at->token_begin * v_row;
    }
    if (at->tensors->lse != NULL) {
        io.lse = at->tensors->lse + at->token_begin * (uint64_t)spec->n_q_heads;
    }
    return io;
}

static fv_status_t
add_item(fv_dispatch_t *d, fv_request_t *request, uint32_t i, fv_item_place_t *at)
{
    for (int32_t cell = 0; cell < at->placement->n_head_parts * at->placement->n_ctx_parts;
         cell++) {
        uint32_t rank = at->placement->ranks[cell];
        fv_rank_work_t *work = &d->works[rank];
        if (!fv_item_share(request->spec, at->placement, at->item, rank, &at->share)) {
            continue;
        }
        FV_RETURN_IF_ERR(grow_items(work));
        if (rank == d->own_rank) {
            work->io[work->n_items] = view_of(at);
        } else {
            FV_RETURN_IF_ERR(list_inputs(d, at, work));
            FV_RETURN_IF_ERR(list_outputs(d, at, work));
        }
        work->items[work->n_items] = *at->item;
        work->origins[work->n_items] = (fv_work_origin_t){.request = request, .item = i};
        work->errors[work->n_items] = (fv_error_t){0};
        work->n_items++;
    }
    return FV_OK;
}

/* Upper bound of pads: five for every cell of every item. */
static fv_status_t reserve_pads(fv_dispatch_t *d, const fv_step_plan_t *plan)
{
    size_t n_pads = 0;

    for (const fv_request_t *r = plan->joined; r != NULL; r = r->next) {
        for (uint32_t i = 0; i < r->head.n_items; i++) {
            const fv_placement_t *p = &r->sessions[i]->placement;
            n_pads += 5U * (size_t)p->n_head_parts * (size_t)p->n_ctx_parts;
        }
    }
    d->n_pads = 0;
    return GROW(d->pads, d->pads_cap, n_pads);
}

fv_status_t fv_dispatch_build(fv_dispatch_t *d,
                              const fv_step_plan_t *plan,
                              const fv_tensors_t *(*tensors_of)(fv_request_t *request))
{
    for (uint32_t rank = 0; rank < d->n_ranks; rank++) {
        fv_rank_work_t *work = &d->works[rank];
        work->n_items = 0;
        work->n_inputs = 0;
        work->n_outputs = 0;
        work->in_bytes = 0;
        work->out_bytes = 0;
    }
    d->n_ranks_busy = 0;
    FV_RETURN_IF_ERR(reserve_pads(d, plan));
    for (fv_request_t *r = plan->joined; r != NULL; r = r->next) {
        fv_item_place_t at = {.request = r, .tensors = tensors_of(r)};
        uint64_t n_before = 0;
        for (uint32_t i = 0; i < r->head.n_items; i++) {
            at.placement = &r->sessions[i]->placement;
            at.item = &r->ctl_items[i];
            at.token_begin = n_before + (at.item->position - r->items[i].position);
            FV_RETURN_IF_ERR(add_item(d, r, i, &at));
            n_before += r->items[i].n_tokens;
        }
    }
    for (uint32_t rank = 0; rank < d->n_ranks; rank++) {
        if (d->works[rank].n_items > 0) {
            d->ranks[d->n_ranks_busy++] = rank;
        }
    }
    return FV_OK;
}

size_t fv_dispatch_ranks(const fv_dispatch_t *d, const uint32_t **out)
{
    *out = d->ranks;
    return d->n_ranks_busy;
}

fv_rank_work_t *fv_dispatch_work(fv_dispatch_t *d, uint32_t rank)
{
    return &d->works[rank];
}
