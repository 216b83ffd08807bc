/*
 * model.h - what Fovea knows of a model: the geometry of its attention, checked once at RegisterModel.
 *
 * Shape letters used in every comment of the project: T tokens of a request, Hq n_q_heads,
 * Hkv n_kv_heads, G = Hq / Hkv (group), dk head_dim_qk, dv head_dim_v, P FV_PAGE_TOKENS.
 */
#ifndef FV_COMMON_MODEL_H
#define FV_COMMON_MODEL_H

#include "common/status.h"
#include "common/tensor.h"

#define FV_PAGE_TOKENS      64 /* P: tokens of one KV page, and of one attention tile */
#define FV_MODEL_NAME_BYTES 64
#define FV_LAYERS_MAX       1024
#define FV_HEADS_MAX        1024
#define FV_GROUP_MAX        128 /* query heads per KV head */
#define FV_HEAD_DIM_MIN     16
#define FV_HEAD_DIM_MAX     256
#define FV_LATENT_DIM_STEP  64 /* latent_dim: a multiple, from 64 on */
#define FV_LATENT_DIM_MAX   1024
#define FV_ROPE_DIM_MAX     128
#define FV_DIM_QK_MAX       (FV_LATENT_DIM_MAX + FV_ROPE_DIM_MAX) /* of any kind of model */
#define FV_DIM_V_MAX        FV_LATENT_DIM_MAX
#define FV_GROUPS_MAX       8    /* slices of a latent (TPLA) */
#define FV_SLICE_DIM_MIN    32   /* a slice's share of latent_dim, at least */
#define FV_FP8_BLOCK        128  /* FP8_LATENT: dims of a latent that share a scale */
#define FV_FP8_PAGE_STEP    1024 /* and pages are whole units of as many bytes */
#define FV_POLICIES_MAX     16   /* distinct policies of one model */
#define FV_MODEL_ID_BYTES   40

typedef enum fv_model_kind {
    FV_MODEL_KV = 0,
    FV_MODEL_LATENT = 1,
} fv_model_kind_t;

/*
 * LATENT (MLA, multi-head latent attention): one latent vector and one RoPE key per token, shared by all heads. To the
 * kernels it is one KV head with dk = latent_dim + rope_dim and dv = latent_dim, whose V is the first dv dims of its K,
 * stored once.
 */
typedef enum fv_latent_norm_mode {
    FV_NORM_NONE = 0,      /* latents arrive normalised */
    FV_NORM_SLICE_RMS = 1, /* latents arrive raw: each slice c becomes c / sqrt(alpha / n_groups *
                              mean(c^2) + eps) when it is appended */
} fv_latent_norm_mode_t;

typedef struct fv_latent_norm {
    int32_t mode; /* fv_latent_norm_mode_t */
    float eps;
    int32_t n_alpha;            /* resolved: one for each slice */
    float alpha[FV_GROUPS_MAX]; /* the reciprocal of the slice's share of the squared norm */
} fv_latent_norm_t;

typedef enum fv_policy_kind {
    FV_POLICY_DENSE = 0,
    FV_POLICY_WINDOW = 1,
    FV_POLICY_S2 = 2,
} fv_policy_kind_t;

/* Values are those of fovea.v1.S2.PatternPer. */
typedef enum fv_pattern_per {
    FV_PATTERN_KV_HEAD = 0, /* the query heads of a KV head share its pattern */
    FV_PATTERN_Q_HEAD = 1,  /* each query head has its own */
} fv_pattern_per_t;

/* Which tokens a query may read; what the numbers of S2 mean is in common/policy.h. */
typedef struct fv_policy {
    int32_t kind;          /* fv_policy_kind_t */
    int32_t window_tokens; /* WINDOW: >= 1, counts the query's own position */
    int32_t sink_tokens;   /* WINDOW: >= 0, the first tokens, always visible */
    /* S2 */
    int32_t block_tokens; /* 16, 32, 64, 128 or 256 */
    int32_t local_blocks; /* >= 1, counts the query's own block */
    int32_t vert_stride;  /* >= 1 blocks; 1 is dense */
    int32_t
        head_sliding_step; /* blocks from head to head; resolved: 0 = max(1, vert_stride / Hq) */
    int32_t head_sliding_offset;
    int32_t num_dense_heads; /* the last heads */
    int32_t homo_head;       /* 1: every head has head 0's pattern */
    int32_t pattern_per;     /* fv_pattern_per_t */
    int32_t n_heads;         /* of the pattern: Hkv, or Hq with Q_HEAD; resolved, not given */
} fv_policy_t;

typedef enum fv_sharding_mode {
    FV_SHARDING_AUTO = 0,
    FV_SHARDING_HEADS = 1,
    FV_SHARDING_CONTEXT = 2,
    FV_SHARDING_LATENT =
        3, /* slices of the latent: a softmax each (TPLA), an approximation; or `exact` */
} fv_sharding_mode_t;

typedef struct fv_sharding {
    int32_t mode;         /* fv_sharding_mode_t */
    int32_t shard_tokens; /* multiple of P; 0 = the server's default */
    int32_t max_ranks;    /* 0 = all */
    int32_t is_set;       /* a request carried it (OpenSession override) */
    int32_t groups;       /* LATENT: slices of the latent */
    int32_t exact;   /* LATENT: 1 = the slices' scores are added up before one softmax; 0 = TPLA */
    int32_t n_alpha; /* as given; resolved into latent_norm: 0 */
    int32_t n_mu;    /* resolved: groups */
    float alpha[FV_GROUPS_MAX];
    float mu[FV_GROUPS_MAX]; /* of each slice's latent scores, as a factor */
} fv_sharding_t;

/* Plain data without pointers or padding that matters: it travels to the workers as it is. */
typedef struct fv_model_spec {
    char name[FV_MODEL_NAME_BYTES];
    int32_t n_layers;
    int32_t n_q_heads;            /* Hq */
    int32_t n_kv_heads;           /* Hkv */
    int32_t head_dim_qk;          /* dk */
    int32_t head_dim_v;           /* dv, resolved */
    int32_t kv_dtype;             /* fv_dtype_t of the cache */
    float softmax_scale;          /* resolved: never 0 */
    float logit_softcap;          /* 0 = off */
    int32_t kind;                 /* fv_model_kind_t */
    int32_t latent_dim, rope_dim; /* LATENT */
    fv_latent_norm_t latent_norm; /* LATENT */
    int32_t n_policies;           /* >= 1; policies[0] is dense */
    fv_policy_t policies[FV_POLICIES_MAX];
    uint8_t layer_policy[FV_LAYERS_MAX]; /* index into policies */
    fv_sharding_t sharding;
} fv_model_spec_t;

static inline int32_t fv_model_group(const fv_model_spec_t *spec)
{
    return spec->n_q_heads / spec->n_kv_heads;
}

static inline bool fv_model_is_latent(const fv_model_spec_t *spec)
{
    return spec->kind == FV_MODEL_LATENT;
}

/* Dims of V that a request brings for a token of a KV head: a LATENT model's V is part of its K. */
static inline int32_t fv_model_v_dim_sent(const fv_model_spec_t *spec)
{
    return fv_model_is_latent(spec) ? 0 : spec->head_dim_v;
}

/* Slices into which a model's latents are cut; 1 unless it is sharded by latent. */
static inline int32_t fv_model_groups(const fv_model_spec_t *spec)
{
    return (fv_model_is_latent(spec) && (spec->sharding.mode == FV_SHARDING_LATENT))
               ? spec->sharding.groups
               : 1;
}

/* TPLA: each slice of the latent has a softmax of its own, which the model has not. */
static inline bool fv_model_is_approximate(const fv_model_spec_t *spec)
{
    return (fv_model_groups(spec) > 1) && (spec->sharding.exact == 0);
}

/* The slices' scores are added up before the one softmax. */
static inline bool fv_model_adds_scores(const fv_model_spec_t *spec)
{
    return (fv_model_groups(spec) > 1) && (spec->sharding.exact != 0);
}

/* Dims of one stored row of K (a slice, and the whole RoPE key) and of V. */
static inline int32_t fv_model_stored_dim_v(const fv_model_spec_t *spec)
{
    return spec->head_dim_v / fv_model_groups(spec);
}

static inline int32_t fv_model_stored_dim_qk(const fv_model_spec_t *spec)
{
    return fv_model_is_latent(spec) ? (fv_model_stored_dim_v(spec) + spec->rope_dim)
                                    : spec->head_dim_qk;
}

/* FP8_LATENT: a byte a dim of the latent, a scale of 4 for each FV_FP8_BLOCK, the RoPE key in bf16. 512 + 64: 656. */
static inline size_t fv_fp8_token_bytes(int32_t latent_dim, int32_t rope_dim)
{
    return (size_t)latent_dim + (size_t)(latent_dim / FV_FP8_BLOCK) * 4U + (size_t)rope_dim * 2U;
}

/* Bytes of K and V of one token of one KV head of one layer, as one rank stores them. */
static inline size_t fv_model_token_bytes(const fv_model_spec_t *spec)
{
    if (spec->kv_dtype == (int32_t)FV_DTYPE_FP8_LATENT) {
        return fv_fp8_token_bytes(fv_model_stored_dim_v(spec), spec->rope_dim);
    }
    return (size_t)(fv_model_stored_dim_qk(spec) + fv_model_v_dim_sent(spec)) *
           fv_dtype_bytes((fv_dtype_t)spec->kv_dtype);
}

/* Bytes of one KV page: P tokens, K and V together, of one KV head of one layer. */
static inline size_t fv_model_page_bytes(const fv_model_spec_t *spec)
{
    return fv_align_up(fv_model_token_bytes(spec) * FV_PAGE_TOKENS,
                       (spec->kv_dtype == (int32_t)FV_DTYPE_FP8_LATENT) ? FV_FP8_PAGE_STEP : 1U);
}

/*
 * Checks every field of `spec`, and resolves head_dim_v = 0, softmax_scale = 0 and what S2 policies leave open.
 * Errors: FV_ERR_INVALID_ARG naming the field, what was given and what was expected;
 *         FV_ERR_UNIMPLEMENTED for kinds and policies that this version does not serve.
 */
FV_MUST_CHECK fv_status_t fv_model_spec_check(fv_model_spec_t *spec);

/*
 * The part of it for kind LATENT (latent.c): resolves n_kv_heads, head_dim_qk, head_dim_v, latent_norm.alpha and
 * sharding.mu, checks everything that only such models have, and that others have none of it.
 */
FV_MUST_CHECK fv_status_t fv_model_latent_check(fv_model_spec_t *spec);

/* True when both describe the same model (after fv_model_spec_check). */
bool fv_model_spec_equal(const fv_model_spec_t *a, const fv_model_spec_t *b);

#endif /* FV_COMMON_MODEL_H */
