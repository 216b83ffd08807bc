/*
 * step_packed.c - the step over packed buffers: where each tensor lies in them (proto/step.h).
 *
 * Decode path: station 6 of 10. Before: worker/inbox_mpi.c. After: worker/step.c.
 */
#include "worker/internal.h"

/* The item's tensors at the cursors, which move past them. */
static fv_step_io_t packed_io(const fv_step_item_t *item, const uint8_t **in, uint8_t **out)
{
    const fv_item_share_t *s = &item->share;
    const fv_head_part_t *part = &s->part;
    size_t e = fv_dtype_bytes((fv_dtype_t)item->ctl->dtype);
    size_t n_q_heads = (size_t)item->n_q_heads;
    size_t n_heads = (size_t)item->session->n_heads;
    fv_step_io_t io = {
        .q = *in,
        .k = *in + fv_align_up(s->q_bytes, FV_STEP_ALIGN),
        .q_token_bytes = n_q_heads * (size_t)part->head_dim_qk * e,
        .k_token_bytes = n_heads * (size_t)part->head_dim_qk * e,
        .v_token_bytes = n_heads * (size_t)part->head_dim_v * e,
        .out = *out,
        .out_token_bytes = n_q_heads * (size_t)part->head_dim_v * e,
        .lse_token_stride = n_q_heads,
        .is_packed = true,
    };

    io.v = (const uint8_t *)io.k + fv_align_up(s->k_bytes, FV_STEP_ALIGN);
    if (s->lse_bytes > 0U) {
        io.lse = (float *)(void *)(*out + fv_align_up(s->out_bytes, FV_STEP_ALIGN));
    }
    *in += fv_share_in_bytes(s);
    *out += fv_share_out_bytes(s);
    return io;
}

fv_status_t fv_worker_packed_bytes(const fv_worker_t *worker,
                                   const fv_ctl_item_t *items,
                                   size_t n_items,
                                   size_t *out_in_bytes,
                                   size_t *out_out_bytes)
{
    size_t in_bytes = 0;
    size_t out_bytes = 0;

    for (size_t i = 0; i < n_items; i++) {
        fv_step_item_t item;

        FV_RETURN_IF_ERR(fv_step_item_make(worker, &items[i], &item));
        in_bytes += fv_share_in_bytes(&item.share);
        out_bytes += fv_share_out_bytes(&item.share);
    }
    *out_in_bytes = in_bytes;
    *out_out_bytes = out_bytes;
    return FV_OK;
}

/* NOLINTNEXTLINE(readability-function-size): the contract has seven parameters */
fv_status_t fv_worker_step_packed(fv_worker_t *worker,
                                  const fv_ctl_step_t *step,
                                  const fv_ctl_item_t *items,
                                  const void *in,
                                  void *out,
                                  fv_ctl_done_t *out_done,
                                  fv_error_t *item_errors)
{
    const uint8_t *in_at = in;
    uint8_t *out_at = out;
    size_t in_bytes = 0;
    size_t out_bytes = 0;

    FV_RETURN_IF_ERR(fv_worker_packed_bytes(worker, items, step->n_items, &in_bytes, &out_bytes));
    if ((in_bytes != step->in_bytes) || (out_bytes != step->out_bytes)) {
        return fv_fail(FV_ERR_PROTOCOL,
                       "step: packed bytes given %llu in and %llu out, expected %zu and %zu",
                       (unsigned long long)step->in_bytes, (unsigned long long)step->out_bytes,
                       in_bytes, out_bytes);
    }
    FV_RETURN_IF_ERR(fv_array_reserve(&worker->ios, step->n_items, sizeof(fv_step_io_t)));
    fv_step_io_t *io = worker->ios.data;
    for (size_t i = 0; i < step->n_items; i++) {
        fv_step_item_t item;

        FV_RETURN_IF_ERR(fv_step_item_make(worker, &items[i], &item));
        io[i] = packed_io(&item, &in_at, &out_at);
    }
    return fv_worker_step(worker, items, io, step->n_items, out_done, item_errors);
}
