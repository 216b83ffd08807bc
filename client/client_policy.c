/*
 * client_policy.c - fovea_policy_t to and from what the wire functions take.
 */
#include "client/client_policy.h"

#include "client/client_internal.h"
#include "common/policy.h"

static fovea_code_t
preset_in(const fovea_s2_t *in, uint32_t index, fv_policy_t *out, fovea_error_t *error)
{
    if ((in->block_tokens != 0) || (in->local_blocks != 0) || (in->vert_stride != 0) ||
        (in->head_sliding_step != 0) || (in->head_sliding_offset != 0) ||
        (in->num_dense_heads != 0) || in->homo_head || (in->pattern_per != FOVEA_PATTERN_KV_HEAD)) {
        return fv_client_fail(error, FOVEA_INVALID_ARGUMENT,
                              "spec.policies[%u].s2.preset: given \"%.32s\" with other fields, "
                              "expected one or the other",
                              index, in->preset);
    }
    if (!fv_policy_preset(in->preset, out)) {
        return fv_client_fail(error, FOVEA_INVALID_ARGUMENT,
                              "spec.policies[%u].s2.preset: given \"%.32s\", expected %s", index,
                              in->preset, fv_policy_preset_names);
    }
    return FOVEA_OK;
}

fovea_code_t fv_client_policy_in(const fovea_policy_t *in,
                                 uint32_t index,
                                 fv_policy_t *out,
                                 fovea_error_t *error)
{
    const fovea_s2_t *s2 = &in->s2;

    *out = (fv_policy_t){.kind = (int32_t)in->kind};
    if (in->kind == FOVEA_POLICY_WINDOW) {
        out->window_tokens = fv_client_i32(in->window_tokens);
        out->sink_tokens = fv_client_i32(in->sink_tokens);
    }
    if (in->kind != FOVEA_POLICY_S2) {
        return FOVEA_OK;
    }
    if (s2->preset != NULL) {
        return preset_in(s2, index, out, error);
    }
    out->block_tokens = fv_client_i32(s2->block_tokens);
    out->local_blocks = fv_client_i32(s2->local_blocks);
    out->vert_stride = fv_client_i32(s2->vert_stride);
    out->head_sliding_step = s2->head_sliding_step;
    out->head_sliding_offset = s2->head_sliding_offset;
    out->num_dense_heads = fv_client_i32(s2->num_dense_heads);
    out->homo_head = s2->homo_head ? 1 : 0;
    out->pattern_per = (int32_t)s2->pattern_per;
    return FOVEA_OK;
}

fovea_policy_t fv_client_policy_out(const fv_policy_t *in)
{
    fovea_policy_t out = {.kind = (fovea_policy_kind_t)in->kind,
                          .window_tokens = (uint32_t)in->window_tokens,
                          .sink_tokens = (uint32_t)in->sink_tokens};

    if (in->kind == FV_POLICY_S2) {
        out.s2 = (fovea_s2_t){.block_tokens = (uint32_t)in->block_tokens,
                              .local_blocks = (uint32_t)in->local_blocks,
                              .vert_stride = (uint32_t)in->vert_stride,
                              .head_sliding_step = in->head_sliding_step,
                              .head_sliding_offset = in->head_sliding_offset,
                              .num_dense_heads = (uint32_t)in->num_dense_heads,
                              .homo_head = in->homo_head != 0,
                              .pattern_per = (fovea_pattern_per_t)in->pattern_per};
    }
    return out;
}
