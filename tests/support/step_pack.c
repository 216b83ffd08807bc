/*
 * step_pack.c - a rank's share of an item, packed and unpacked.
 */
#include "tests/support/step_pack.h"

#include <string.h>

/* A row's slice and RoPE key, of a row of all latents; a whole row of other models. */
static uint8_t *pack_row(const fv_model_spec_t *spec,
                         const fv_head_part_t *part,
                         const uint8_t *row,
                         size_t e,
                         uint8_t *to)
{
    size_t dv = (size_t)part->head_dim_v * e;

    if (fv_model_groups(spec) <= 1) {
        memcpy(to, row, (size_t)part->head_dim_qk * e);
    } else {
        memcpy(to, row + (size_t)part->latent_begin * e, dv);
        memcpy(to + dv, row + (size_t)spec->latent_dim * e, (size_t)spec->rope_dim * e);
    }
    return to + (size_t)part->head_dim_qk * e;
}

size_t fv_pack_input(const fv_model_spec_t *spec,
                     const fv_placement_t *placement,
                     const fv_ctl_item_t *item,
                     uint32_t rank,
                     const fv_step_io_t *full,
                     uint8_t *in)
{
    fv_item_share_t s;
    fv_token_run_t run;
    uint64_t cursor = 0;
    size_t e = fv_dtype_bytes((fv_dtype_t)item->dtype);
    size_t dk = (size_t)spec->head_dim_qk * e;
    size_t dv = (size_t)spec->head_dim_v * e;

    if (!fv_item_share(spec, placement, item, rank, &s)) {
        return 0;
    }
    uint8_t *q = in;
    uint8_t *k = q + fv_align_up(s.q_bytes, FV_STEP_ALIGN);
    uint8_t *v = k + fv_align_up(s.k_bytes, FV_STEP_ALIGN);
    for (size_t i = 0; (s.q_bytes > 0U) && (i < fv_share_tokens(&s)); i++) {
        size_t t =
            (i < s.spans[0].n) ? (s.spans[0].begin + i) : (s.spans[1].begin + (i - s.spans[0].n));

        for (int32_t h = s.part.q_head_begin; h < s.part.q_head_end; h++) {
            q = pack_row(spec, &s.part,
                         (const uint8_t *)full->q + t * full->q_token_bytes + (size_t)h * dk, e, q);
        }
    }
    while (fv_token_run_next(placement, s.cp, item, &cursor, &run)) {
        for (size_t t = run.item_begin; t < run.item_begin + run.n_tokens; t++) {
            for (int32_t h = s.part.head_begin; h < s.part.head_end; h++) {
                k = pack_row(spec, &s.part,
                             (const uint8_t *)full->k + t * full->k_token_bytes + (size_t)h * dk, e,
                             k);
            }
            if (!fv_model_is_latent(spec)) {
                size_t n = (size_t)(s.part.head_end - s.part.head_begin) * dv;

                memcpy(v,
                       (const uint8_t *)full->v + t * full->v_token_bytes +
                           (size_t)s.part.head_begin * dv,
                       n);
                v += n;
            }
        }
    }
    return fv_share_in_bytes(&s);
}

size_t fv_unpack_output(const fv_model_spec_t *spec,
                        const fv_placement_t *placement,
                        const fv_ctl_item_t *item,
                        uint32_t rank,
                        const uint8_t *out,
                        const fv_step_io_t *full)
{
    fv_item_share_t s;
    size_t e = fv_dtype_bytes((fv_dtype_t)item->dtype);
    size_t dv = (size_t)fv_item_out_dim(spec, item) * e; /* of a row of `full` */

    if (!fv_item_share(spec, placement, item, rank, &s)) {
        return 0;
    }
    const uint8_t *lse = out + fv_align_up(s.out_bytes, FV_STEP_ALIGN);
    size_t slice = (size_t)s.part.head_dim_v * e;
    uint64_t begin = 0;
    uint64_t end = 0;
    for (int32_t i = 0; fv_share_rows(&s, i, &begin, &end); i++) {
        for (uint64_t r = begin; r < end; r++) {
            size_t t = r / (size_t)s.n_q_heads;
            size_t h = (size_t)s.part.q_head_begin + r % (size_t)s.n_q_heads;

            memcpy((uint8_t *)full->out + t * full->out_token_bytes + h * dv +
                       (size_t)fv_item_out_begin(&s.part, item) * e,
                   out, slice);
            out += slice;
            if (s.lse_bytes > 0U) {
                memcpy(full->lse + t * full->lse_token_stride + h, lse, sizeof(float));
                lse += sizeof(float);
            }
        }
    }
    return fv_share_out_bytes(&s);
}
