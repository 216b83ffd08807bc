/*
 * check_cpu.c - descriptors are checked once a call, so that nothing behind has to.
 */
#include "kernels/backend_cpu.h"

#include <math.h>

#define TOKENS_MAX ((int64_t)1 << 36) /* pages are counted in 32 bits */

static fv_status_t check(bool ok, const char *field, int64_t given, const char *expected)
{
    if (ok) {
        return FV_OK;
    }
    return fv_fail(FV_ERR_INVALID_ARG, "kernels: %s: given %lld, expected %s", field,
                   (long long)given, expected);
}

static fv_status_t check_head_dim(const char *field, int32_t given)
{
    return check((given >= FV_HEAD_DIM_MIN) && (given <= FV_HEAD_DIM_MAX) && ((given % 8) == 0),
                 field, given, "a multiple of 8 in 16..256");
}

/* v_in_k: V is a part of K, and both are wider. */
static fv_status_t check_head_dims(int32_t dk, int32_t dv, bool v_in_k)
{
    if (!v_in_k) {
        FV_RETURN_IF_ERR(check_head_dim("head_dim_qk", dk));
        return check_head_dim("head_dim_v", dv);
    }
    FV_RETURN_IF_ERR(check((dk >= FV_HEAD_DIM_MIN) && (dk <= FV_DIM_QK_MAX) && ((dk % 8) == 0),
                           "head_dim_qk", dk, "a multiple of 8 in 16..1152 with v_in_k"));
    return check((dv >= FV_HEAD_DIM_MIN) && (dv <= dk) && (dv <= FV_DIM_V_MAX) && ((dv % 8) == 0),
                 "head_dim_v", dv, "a multiple of 8 in 16..1024, at most head_dim_qk, with v_in_k");
}

static fv_status_t check_dtype(const char *field, int32_t given)
{
    return check(fv_dtype_is_valid(given), field, given, "F32, F16 or BF16");
}

static fv_status_t check_cache(const char *field, int32_t given, int32_t dv, bool v_in_k)
{
    if (given != (int32_t)FV_DTYPE_FP8_LATENT) {
        return check_dtype(field, given);
    }
    return check(v_in_k && (dv % FV_FP8_BLOCK == 0), field, given,
                 "F32, F16 or BF16 (FP8_LATENT: with v_in_k, and head_dim_v a multiple of 128)");
}

static fv_status_t check_heads(int32_t n_kv_heads)
{
    return check((n_kv_heads >= 1) && (n_kv_heads <= FV_HEADS_MAX), "n_kv_heads", n_kv_heads,
                 "1..1024");
}

static fv_status_t check_pointer(const char *field, const void *given)
{
    return check(given != NULL, field, 0, "a pointer");
}

/* Pages of FP8 latents as they are stored: whole ones, of a cache of the same. */
static fv_status_t check_page_source(const fv_append_item_t *item)
{
    FV_RETURN_IF_ERR(check(item->kv_dtype == (int32_t)FV_DTYPE_FP8_LATENT, "src_dtype",
                           item->src_dtype, "F32, F16 or BF16 for such a kv_dtype"));
    FV_RETURN_IF_ERR(
        check((item->local_begin % FV_PAGE_TOKENS == 0U) && (item->n_tokens % FV_PAGE_TOKENS == 0U),
              "n_tokens", (int64_t)item->n_tokens, "whole pages of 64 with src_dtype FP8_LATENT"));
    return check((item->n_kv_heads == 1) && (item->norm_alpha == 0.0F), "n_kv_heads, norm_alpha",
                 item->n_kv_heads, "1 head, no norm with src_dtype FP8_LATENT");
}

fv_status_t fv_cpu_check_append(const fv_append_item_t *item)
{
    FV_RETURN_IF_ERR(check_heads(item->n_kv_heads));
    FV_RETURN_IF_ERR(check_head_dims(item->head_dim_qk, item->head_dim_v, item->v_in_k));
    if (!(item->norm_alpha >= 0.0F) || ((item->norm_alpha > 0.0F) && !item->v_in_k)) {
        return fv_fail(
            FV_ERR_INVALID_ARG,
            "kernels: norm_alpha: given %g, expected 0, or a positive number with v_in_k",
            (double)item->norm_alpha);
    }
    FV_RETURN_IF_ERR(check_cache("kv_dtype", item->kv_dtype, item->head_dim_v, item->v_in_k));
    FV_RETURN_IF_ERR((item->src_dtype == (int32_t)FV_DTYPE_FP8_LATENT)
                         ? check_page_source(item)
                         : check_dtype("src_dtype", item->src_dtype));
    if (item->n_tokens == 0) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(check_pointer("k", item->k));
    if (!item->v_in_k) {
        FV_RETURN_IF_ERR(check_pointer("v", item->v));
    }
    return check_pointer("pages", item->pages);
}

static fv_status_t check_result(const fv_attn_item_t *item)
{
    FV_RETURN_IF_ERR(check(item->n_dst >= 0, "n_dst", item->n_dst, "0 or more"));
    if (item->n_dst == 0) {
        return check_pointer("out", item->out);
    }
    FV_RETURN_IF_ERR(check_pointer("dst", item->dst));
    FV_RETURN_IF_ERR(check(item->dst[0].row_begin == 0, "dst[0].row_begin",
                           (int64_t)item->dst[0].row_begin, "0"));
    for (int32_t i = 1; i < item->n_dst; i++) {
        FV_RETURN_IF_ERR(check(item->dst[i].row_begin >= item->dst[i - 1].row_begin,
                               "dst.row_begin", (int64_t)item->dst[i].row_begin, "ascending"));
    }
    return FV_OK;
}

/* The model's check has seen the rest (common/model.c); here is what an index or a division rests on. */
static fv_status_t check_s2(const fv_attn_item_t *item)
{
    const fv_policy_t *p = &item->policy;

    FV_RETURN_IF_ERR(check(item->causal, "causal", 0, "true with an S2 policy"));
    FV_RETURN_IF_ERR(check((p->block_tokens >= FV_S2_BLOCK_MIN) &&
                               (p->block_tokens <= FV_S2_BLOCK_MAX) &&
                               ((p->block_tokens & (p->block_tokens - 1)) == 0),
                           "policy.block_tokens", p->block_tokens, "16, 32, 64, 128 or 256"));
    FV_RETURN_IF_ERR(check((p->local_blocks >= 1) && (p->local_blocks <= FV_S2_LOCAL_MAX),
                           "policy.local_blocks", p->local_blocks, "1..2^24"));
    return check((p->vert_stride >= 1) && (p->vert_stride <= FV_S2_STRIDE_MAX),
                 "policy.vert_stride", p->vert_stride, "1..65536");
}

static fv_status_t check_context(const fv_attn_item_t *item)
{
    const fv_kv_shard_t *shard = &item->shard;

    FV_RETURN_IF_ERR(check((item->position >= 0) && (item->position <= TOKENS_MAX), "position",
                           item->position, "0..2^36"));
    FV_RETURN_IF_ERR(check((item->kv_end >= 0) && (item->kv_end <= TOKENS_MAX), "kv_end",
                           item->kv_end, "0..2^36"));
    FV_RETURN_IF_ERR(
        check((shard->shard_tokens > 0) && ((shard->shard_tokens % FV_PAGE_TOKENS) == 0),
              "shard.shard_tokens", shard->shard_tokens, "a positive multiple of 64"));
    FV_RETURN_IF_ERR(check(shard->part < shard->n_parts, "shard.part", shard->part, "< n_parts"));
    FV_RETURN_IF_ERR(
        check((item->policy.kind >= FV_POLICY_DENSE) && (item->policy.kind <= FV_POLICY_S2),
              "policy.kind", item->policy.kind, "DENSE, WINDOW or S2"));
    if (item->policy.kind == FV_POLICY_S2) {
        return check_s2(item);
    }
    if (item->policy.kind == FV_POLICY_WINDOW) {
        FV_RETURN_IF_ERR(check(item->policy.window_tokens >= 1, "policy.window_tokens",
                               item->policy.window_tokens, "1 or more"));
        FV_RETURN_IF_ERR(check(item->policy.sink_tokens >= 0, "policy.sink_tokens",
                               item->policy.sink_tokens, "0 or more"));
    }
    return FV_OK;
}

fv_status_t fv_cpu_check_attend(const fv_attn_item_t *item)
{
    FV_RETURN_IF_ERR(check(item->n_tokens >= 1, "n_tokens", item->n_tokens, "1 or more"));
    FV_RETURN_IF_ERR(check_heads(item->n_kv_heads));
    FV_RETURN_IF_ERR(
        check((item->group >= 1) && (item->group <= FV_GROUP_MAX), "group", item->group, "1..128"));
    FV_RETURN_IF_ERR(check_head_dims(item->head_dim_qk, item->head_dim_v, item->v_in_k));
    if (!isfinite(item->latent_mu) || (item->latent_mu < 0.0F)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "kernels: latent_mu: given %g, expected 0 or a positive finite number",
                       (double)item->latent_mu);
    }
    FV_RETURN_IF_ERR(check_dtype("io_dtype", item->io_dtype));
    FV_RETURN_IF_ERR(check_cache("kv_dtype", item->kv_dtype, item->head_dim_v, item->v_in_k));
    if (!isfinite(item->softmax_scale) || (item->softmax_scale <= 0.0F)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "kernels: softmax_scale: given %g, expected a positive finite number",
                       (double)item->softmax_scale);
    }
    if (!isfinite(item->logit_softcap) || (item->logit_softcap < 0.0F)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "kernels: logit_softcap: given %g, expected 0 or a positive finite number",
                       (double)item->logit_softcap);
    }
    FV_RETURN_IF_ERR(check((item->kv_head_begin >= 0) && (item->kv_head_begin < FV_HEADS_MAX),
                           "kv_head_begin", item->kv_head_begin, "0..1023"));
    if (!item->v_in_k &&
        ((item->q_head_bytes | item->out_head_bytes | item->rope_gap_bytes) != 0U)) {
        return check(false, "q_head_bytes, out_head_bytes, rope_gap_bytes",
                     (int64_t)(item->q_head_bytes | item->out_head_bytes | item->rope_gap_bytes),
                     "0 without v_in_k");
    }
    FV_RETURN_IF_ERR(check((item->rope_gap_bytes == 0U) || (item->q_head_bytes != 0U),
                           "q_head_bytes", 0,
                           "the bytes of a head, because rope_gap_bytes is given"));
    FV_RETURN_IF_ERR(
        check((item->scores == NULL) || item->v_in_k, "scores", 1, "none without v_in_k"));
    FV_RETURN_IF_ERR(check_pointer("q", item->q));
    FV_RETURN_IF_ERR(check_context(item));
    return check_result(item);
}

fv_status_t fv_cpu_check_merge(const fv_merge_item_t *item)
{
    FV_RETURN_IF_ERR(check_head_dims(item->head_dim_v, item->head_dim_v, true)); /* either kind */
    FV_RETURN_IF_ERR(check_dtype("io_dtype", item->io_dtype));
    FV_RETURN_IF_ERR(check(item->n_parts >= 1, "n_parts", item->n_parts, "1 or more"));
    FV_RETURN_IF_ERR(check(item->row_len >= 1, "row_len", (int64_t)item->row_len, "1 or more"));
    if (item->n_rows == 0) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(check_pointer("o", item->o));
    FV_RETURN_IF_ERR(check_pointer("lse_log2", item->lse_log2));
    return check_pointer("out", item->out);
}

fv_status_t fv_cpu_check_copy(const fv_page_copy_t *copy)
{
    FV_RETURN_IF_ERR(check_head_dims(copy->head_dim_qk, copy->head_dim_v, copy->v_in_k));
    FV_RETURN_IF_ERR(check_cache("kv_dtype", copy->kv_dtype, copy->head_dim_v, copy->v_in_k));
    return check((copy->n_tokens >= 0) && (copy->n_tokens <= FV_PAGE_TOKENS), "n_tokens",
                 copy->n_tokens, "0..64");
}
