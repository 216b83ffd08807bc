/*
 * policy.c - presets, coverage, and what freed history still allows.
 */
#include "common/policy.h"

#include <string.h>

bool fv_policy_is_readable(const fv_policy_t *p,
                           int32_t n_kv_heads,
                           int32_t group,
                           int64_t floor,
                           int64_t position,
                           int64_t end)
{
    int64_t last = fv_policy_dead_pages(p, floor);
    int64_t n_pages = (end + FV_PAGE_TOKENS - 1) / FV_PAGE_TOKENS;

    last = (n_pages < last) ? n_pages : last;
    for (int64_t page = fv_policy_dead_pages(p, position); page < last; page++) {
        for (int32_t h = 0; h < n_kv_heads; h++) {
            if (!fv_policy_keeps(p, h, group, page)) {
                return false;
            }
        }
    }
    return true;
}

const char fv_policy_preset_names[] = "phi3-small, s2-4, s2-8, s2-16, s2-32 or s2-64";

bool fv_policy_preset(const char *name, fv_policy_t *out)
{
    static const struct {
        const char *name;
        fv_policy_t policy;
    } k_presets[] = {
        /* its configuration: 64-token blocks, 16 local, stride 8; a pattern for each query head, one block ahead */
        {"phi3-small",
         {.block_tokens = 64,
          .local_blocks = 16,
          .vert_stride = 8,
          .head_sliding_offset = 1,
          .pattern_per = FV_PATTERN_Q_HEAD}},
        {"s2-4", {.block_tokens = 64, .local_blocks = 8, .vert_stride = 4}},
        {"s2-8", {.block_tokens = 64, .local_blocks = 8, .vert_stride = 8}},
        {"s2-16", {.block_tokens = 64, .local_blocks = 8, .vert_stride = 16}},
        {"s2-32", {.block_tokens = 64, .local_blocks = 8, .vert_stride = 32}},
        {"s2-64", {.block_tokens = 64, .local_blocks = 8, .vert_stride = 64}},
    };

    for (size_t i = 0; i < sizeof(k_presets) / sizeof(k_presets[0]); i++) {
        if (strcmp(name, k_presets[i].name) == 0) {
            *out = k_presets[i].policy;
            out->kind = FV_POLICY_S2;
            return true;
        }
    }
    return false;
}

int32_t fv_s2_coverage(const fv_policy_t *p)
{
    uint8_t seen[FV_S2_STRIDE_MAX / 8] = {0};
    int32_t n_sparse = (p->homo_head != 0) ? 1 : (p->n_heads - p->num_dense_heads);
    int32_t n = 0;

    if ((p->num_dense_heads > 0) || (p->vert_stride == 1)) {
        return p->vert_stride;
    }
    for (int32_t h = 0; h < n_sparse; h++) {
        uint32_t residue = (uint32_t)fv_s2_residue(p, h);

        n += ((seen[residue / 8U] >> (residue % 8U)) & 1U) == 0U;
        seen[residue / 8U] |= (uint8_t)(1U << (residue % 8U));
    }
    return n;
}
