/*
 * wire_policy.c - one LayerPolicy message and one fv_policy_t.
 */
#include "proto/wire_policy.h"

#include "common/policy.h"
#include "proto/wire_message.h"

/* A name stands for all numbers: given with any of them it would be unclear which count. */
static fv_status_t preset_decode(const Fovea__V1__S2 *in, fv_policy_t *out)
{
    if ((in->block_tokens != 0) || (in->local_blocks != 0) || (in->vert_stride != 0) ||
        (in->head_sliding_step != 0) || (in->head_sliding_offset != 0) ||
        (in->num_dense_heads != 0) || in->homo_head || ((int)in->pattern_per != 0)) {
        return fv_fail(
            FV_ERR_INVALID_ARG,
            "spec.policies.s2.preset: given \"%.32s\" with other fields, expected one or "
            "the other",
            in->preset);
    }
    if (!fv_policy_preset(in->preset, out)) {
        return fv_fail(FV_ERR_INVALID_ARG, "spec.policies.s2.preset: given \"%.32s\", expected %s",
                       in->preset, fv_policy_preset_names);
    }
    return FV_OK;
}

static fv_status_t s2_decode(const Fovea__V1__S2 *in, fv_policy_t *out)
{
    if (in->preset[0] != '\0') {
        return preset_decode(in, out);
    }
    out->kind = FV_POLICY_S2;
    out->head_sliding_step = in->head_sliding_step;
    out->head_sliding_offset = in->head_sliding_offset;
    out->homo_head = in->homo_head ? 1 : 0;
    out->pattern_per = (int32_t)in->pattern_per;
    FV_RETURN_IF_ERR(
        fv_message_int32("spec.policies.s2.block_tokens", in->block_tokens, &out->block_tokens));
    FV_RETURN_IF_ERR(
        fv_message_int32("spec.policies.s2.local_blocks", in->local_blocks, &out->local_blocks));
    FV_RETURN_IF_ERR(
        fv_message_int32("spec.policies.s2.vert_stride", in->vert_stride, &out->vert_stride));
    return fv_message_int32("spec.policies.s2.num_dense_heads", in->num_dense_heads,
                            &out->num_dense_heads);
}

fv_status_t fv_wire_policy_decode(const Fovea__V1__LayerPolicy *in, size_t index, fv_policy_t *out)
{
    *out = (fv_policy_t){0};
    switch ((int)in->policy_case) {
    case FOVEA__V1__LAYER_POLICY__POLICY_DENSE:
        out->kind = FV_POLICY_DENSE;
        return FV_OK;
    case FOVEA__V1__LAYER_POLICY__POLICY_WINDOW:
        out->kind = FV_POLICY_WINDOW;
        FV_RETURN_IF_ERR(fv_message_int32("spec.policies.window.window_tokens",
                                          in->window->window_tokens, &out->window_tokens));
        return fv_message_int32("spec.policies.window.sink_tokens", in->window->sink_tokens,
                                &out->sink_tokens);
    case FOVEA__V1__LAYER_POLICY__POLICY_S2:
        return s2_decode(in->s2, out);
    case FOVEA__V1__LAYER_POLICY__POLICY__NOT_SET:
    default:
        return fv_fail(FV_ERR_INVALID_ARG,
                       "spec.policies[%zu].policy: given none, expected dense, window or s2",
                       index);
    }
}

static void s2_encode(const fv_policy_t *in, Fovea__V1__S2 *out)
{
    *out = (Fovea__V1__S2)FOVEA__V1__S2__INIT;
    out->block_tokens = (uint32_t)in->block_tokens;
    out->local_blocks = (uint32_t)in->local_blocks;
    out->vert_stride = (uint32_t)in->vert_stride;
    out->head_sliding_step = in->head_sliding_step;
    out->head_sliding_offset = in->head_sliding_offset;
    out->num_dense_heads = (uint32_t)in->num_dense_heads;
    out->homo_head = in->homo_head != 0;
    out->pattern_per = (Fovea__V1__S2__PatternPer)in->pattern_per;
}

void fv_wire_policy_encode(const fv_policy_t *in,
                           fv_wire_policy_t *memory,
                           Fovea__V1__LayerPolicy *out)
{
    if (in->kind == FV_POLICY_WINDOW) {
        memory->window = (Fovea__V1__Window)FOVEA__V1__WINDOW__INIT;
        memory->window.window_tokens = (uint32_t)in->window_tokens;
        memory->window.sink_tokens = (uint32_t)in->sink_tokens;
        out->policy_case = FOVEA__V1__LAYER_POLICY__POLICY_WINDOW;
        out->window = &memory->window;
    } else if (in->kind == FV_POLICY_S2) {
        s2_encode(in, &memory->s2);
        out->policy_case = FOVEA__V1__LAYER_POLICY__POLICY_S2;
        out->s2 = &memory->s2;
    } else {
        memory->dense = (Fovea__V1__Dense)FOVEA__V1__DENSE__INIT;
        out->policy_case = FOVEA__V1__LAYER_POLICY__POLICY_DENSE;
        out->dense = &memory->dense;
    }
}
