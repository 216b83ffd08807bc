/*
 * step_pack.c - a rank's share of an item, packed and unpacked.
 */
#include "tests/support/step_pack.h"

#include <string.h>

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
    size_t n_heads = (size_t)(s.head_end - s.head_begin);
    size_t group = (size_t)fv_model_group(spec);
    uint8_t *q = in;
    uint8_t *k = q + fv_align_up(s.q_bytes, FV_STEP_ALIGN);
    uint8_t *v = k + fv_align_up(s.k_bytes, FV_STEP_ALIGN);
    for (size_t t = 0; t < item->n_tokens; t++) {
        memcpy(q + t * n_heads * group * dk,
               (const uint8_t *)full->q + t * full->q_token_bytes +
                   (size_t)s.head_begin * group * dk,
               n_heads * group * dk);
    }
    while (fv_token_run_next(placement, s.cp, item, &cursor, &run)) {
        for (size_t t = run.item_begin; t < run.item_begin + run.n_tokens; t++) {
            memcpy(k,
                   (const uint8_t *)full->k + t * full->k_token_bytes + (size_t)s.head_begin * dk,
                   n_heads * dk);
            memcpy(v,
                   (const uint8_t *)full->v + t * full->v_token_bytes + (size_t)s.head_begin * dv,
                   n_heads * dv);
            k += n_heads * dk;
            v += n_heads * dv;
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
    size_t dv = (size_t)spec->head_dim_v * fv_dtype_bytes((fv_dtype_t)item->dtype);
    size_t group = (size_t)fv_model_group(spec);

    if (!fv_item_share(spec, placement, item, rank, &s)) {
        return 0;
    }
    const uint8_t *lse = out + fv_align_up(s.out_bytes, FV_STEP_ALIGN);
    size_t n_q_heads = (size_t)(s.head_end - s.head_begin) * group;
    for (uint64_t r = s.row_begin; r < s.row_end; r++) {
        size_t t = r / n_q_heads;
        size_t h = (size_t)s.head_begin * group + r % n_q_heads;

        memcpy((uint8_t *)full->out + t * full->out_token_bytes + h * dv,
               out + (r - s.row_begin) * dv, dv);
        if (s.lse_bytes > 0U) {
            memcpy(full->lse + t * full->lse_token_stride + h,
                   lse + (r - s.row_begin) * sizeof(float), sizeof(float));
        }
    }
    return fv_share_out_bytes(&s);
}
