/*
 * attn_case.h - random attention problems with a known answer, for tests and benchmarks.
 *
 * A case is a spec (shape, dtypes, policy, how the values are drawn) and the data made from it: tensors as
 * they come over the wire, and the cache's values as stored, widened to fp64 for the oracle. A case is loaded
 * into a backend through append only, so nothing here knows how pages are arranged.
 *
 * Hostile by default: slots are filled with NaN before the real tokens are appended, tokens that no row sees
 * are NaN, physical pages are shuffled, and page-table entries past the end are wild.
 */
#ifndef FV_TESTS_SUPPORT_ATTN_CASE_H
#define FV_TESTS_SUPPORT_ATTN_CASE_H

#include "kernels/kernels.h"

#include <stdbool.h>
#include <stdint.h>

#define FV_ATTN_NORM_EPS 1e-6F /* with norm_alpha */

/* splitmix64: small, seedable, the same everywhere. */
typedef struct fv_rng {
    uint64_t state;
} fv_rng_t;

uint64_t fv_rng_next(fv_rng_t *rng);
int64_t fv_rng_range(fv_rng_t *rng, int64_t low, int64_t high); /* low..high, both included */
float fv_rng_normal(fv_rng_t *rng); /* mean 0, deviation 1 (12 uniforms) */

/* FV_SEED of the environment, else `fallback`; printed, so that a failure can be repeated. */
uint64_t fv_test_seed(uint64_t fallback);

typedef struct fv_attn_spec {
    int32_t n_tokens, n_kv_heads, group, head_dim_qk, head_dim_v;
    int32_t io_dtype, kv_dtype;
    float softmax_scale, logit_softcap; /* scale 0 = 1/sqrt(dk) */
    bool causal;
    fv_policy_t policy;
    int32_t kv_head_begin; /* S2: the model's number of KV head 0 */
    int64_t position, kv_end;
    uint32_t shard_tokens; /* 0 = 64 */
    uint16_t n_parts;      /* 0 = 1 */
    float q_amplitude;     /* 0 = 1; large = huge logits */
    float v_mean;
    bool v_in_k;      /* LATENT: V is the first dv dims of K */
    float latent_mu;  /* 0 = 1 */
    float norm_alpha; /* of the append; 0 = none */
    bool
        one_part; /* weights go through the tensor cores in one 16-bit part: the tolerance of wgmma kernels */
    bool tame; /* no poison, pages in order: for benchmarks */
    int64_t
        spoil_token; /* 0 = none; else token spoil_token - 1 gets a NaN in K and in V (each its own dim) */
    uint64_t seed;
} fv_attn_spec_t;

typedef struct fv_attn_case {
    fv_attn_spec_t spec; /* defaults resolved */
    int32_t n_q_heads;
    void *q, *k, *v; /* wire: q [T, Hq, dk], k [kv_end, Hkv, dk], v [kv_end, Hkv, dv], io_dtype */
    double *k_ref, *v_ref;     /* as stored, widened; same shapes */
    double *out_ref, *lse_ref; /* NULL until fv_attn_case_solve() */
    fv_page_ref_t *pages;      /* [n_parts][Hkv][pages_stride] */
    size_t pages_stride;
    double logit_bound; /* scale * max|q| * max|k|: bounds every |logit| */
    double v_bound;     /* max finite |v| */
} fv_attn_case_t;

/*
 * Random spec: any shape the contract allows whose oracle stays below about `macs` multiply-adds. Dense or window; S2 is
 * what fv_s2_random() puts in its place (with causal).
 */
fv_attn_spec_t fv_attn_spec_random(fv_rng_t *rng, int64_t macs);
/* A random S2 policy of a model with these heads, resolved as its check would; may be any the API allows. */
fv_policy_t fv_s2_random(fv_rng_t *rng, int32_t n_q_heads, int32_t n_kv_heads);
/* Every other spec becomes one of S2: causal, with fv_s2_random()'s policy, its heads a slice of a larger model's. */
void fv_attn_spec_maybe_s2(fv_rng_t *rng, fv_attn_spec_t *spec);
/* Makes a latent problem of it: one KV head, a slice of a latent and a RoPE key, sometimes weighted or normalised. */
void fv_attn_spec_latent(fv_attn_spec_t *spec, fv_rng_t *rng, int64_t macs);
void fv_attn_spec_print(const fv_attn_spec_t *spec);

/* Never fails: a test machine without memory for it aborts. destroy(NULL) is fine. */
fv_attn_case_t *fv_attn_case_create(const fv_attn_spec_t *spec);
void fv_attn_case_destroy(fv_attn_case_t *attn);
void fv_attn_case_solve(fv_attn_case_t *attn); /* runs the oracle once */

/* Arena bytes that a case needs, and its own share of an arena from *next_unit on. */
size_t fv_attn_case_arena_bytes(const fv_attn_case_t *attn);
void fv_attn_case_place(fv_attn_case_t *attn, fv_rng_t *rng, uint32_t *next_unit);
FV_MUST_CHECK fv_status_t fv_attn_case_load(fv_attn_case_t *attn,
                                            const fv_backend_ops_t *ops,
                                            fv_backend_t *backend,
                                            fv_rng_t *rng);

/* The item of one part with final results to out [T, Hq, dv] (io_dtype) and lse [T, Hq] (may be NULL). */
fv_attn_item_t fv_attn_case_item(const fv_attn_case_t *attn, uint16_t part, void *out, float *lse);
size_t fv_attn_case_out_bytes(const fv_attn_case_t *attn);
size_t fv_attn_case_rows(const fv_attn_case_t *attn);

/*
 * The tolerance table. |got - ref| <= relative * |ref| + absolute, absolute in units of v_bound (out) or of 1 (lse).
 *   io:  fp32 2^-22, fp16 2^-11, bf16 2^-8 (rounding of the result)
 *   kv:  fp32 and fp16 1e-5, bf16 2e-5 (weights may be two bf16 parts)
 *         one_part, to it: bf16 2^-8, fp16 2^-11, the rounding of each weight, as in every prefill kernel and every kernel for
 *         latents known to us;
 *         two parts would cost a half more of the products. Decode keeps the tighter row.
 *   both grow with the logits: an fp32 logit of size L is only known to L * 2^-24
 */
typedef struct fv_tolerance {
    double relative, absolute, lse;
} fv_tolerance_t;

fv_tolerance_t fv_attn_tolerance(const fv_attn_case_t *attn);

/* Compares with the oracle; prints the first mismatches and returns how many there are. */
size_t
fv_attn_case_check(const fv_attn_case_t *attn, const void *out, const float *lse, const char *name);

#endif /* FV_TESTS_SUPPORT_ATTN_CASE_H */
