/*
 * tile.h - one tile of attention on the CPU: a block of query rows against one KV page. Private to kernels/.
 *
 * The walk over tiles (attend_cpu.c) is the same for every instruction set; what differs is this table:
 *
 *     scores:      S = Q K^T                                   [rows, P]
 *     softcap:     S = cap * tanh(S / cap), with the scale     (only when the model has one)
 *     softmax:     m' = max(m, max S), alpha = 2^(m - m'), P = 2^(S - m'), l = alpha l + sum P
 *     accumulate:  O = alpha O + P V                           [rows, dv]
 *
 * m, l, alpha and the exponents are base 2: scale_log2 = scale * log2(e). The scale is applied to S and never
 * to Q, so that a bf16 query stays exact in bf16. A row that has seen nothing has m = -inf, l = 0, O = 0.
 *
 * NaN: a NaN in S makes P, l and then O of that row NaN; max() may drop it, which is why nothing depends on m
 * carrying it. A score that the walk masked is -inf and its P is exactly 0.
 */
#ifndef FV_KERNELS_TILE_H
#define FV_KERNELS_TILE_H

#include "common/model.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FV_BLOCK_ROWS_MAX FV_GROUP_MAX
#define FV_BLOCK_ROWS     64 /* prefill: rows that share a walk, when the group is smaller */
#define FV_Q_PLANES_MAX   3  /* bf16 parts whose sum is an fp32 query exactly (AMX) */
#define FV_P_PLANES       2  /* bf16 parts of a weight: relative error 2^-17 (AMX) */
#define FV_LOG2E          1.44269504088896340736F
#define FV_LN2            0.69314718055994530942F

typedef struct fv_tile_block {
    int32_t n_rows; /* 1..FV_BLOCK_ROWS_MAX */
    int32_t head_dim_qk, head_dim_v;
    bool v_in_k;      /* the page has no V of its own: latent_v() makes it */
    int32_t o_stride; /* elements: head_dim_v rounded up to 16; the padding may hold anything */
    fv_dtype_t kv_dtype;
    int32_t n_q_planes;         /* bf16 parts that Q needs: 1 bf16, 2 fp16, 3 fp32 */
    float score_scale;          /* log2 units of one unit of S, after softcap if any */
    float cap_inner, cap_outer; /* S = cap_outer * tanh(S * cap_inner) */

    const uint8_t
        *next_page;    /* of the walk, or NULL: attend_cpu.c primes it while this one is computed */
    size_t next_bytes; /* of its K */

    /* Workspace of one thread, 64-byte aligned. */
    float *q;           /* [n_rows, dk] */
    float *s;           /* [n_rows, P]: S, then P */
    float *o;           /* [n_rows, o_stride] */
    float *m;           /* [n_rows] */
    float *l;           /* [n_rows] */
    float *alpha;       /* [n_rows] */
    float *wide;        /* [FV_DIM_QK_MAX, P]: a page's K^T or V widened to fp32 */
    uint16_t *q_planes; /* [FV_Q_PLANES_MAX][FV_BLOCK_ROWS_MAX, dk] bf16 */
    uint16_t *p_planes; /* [FV_P_PLANES][FV_BLOCK_ROWS_MAX, P] bf16 */
    float *unpacked;    /* [FV_DIM_QK_MAX, P]: a page of FP8 latents as one in fp32 */
    uint8_t *v_clean;   /* V out of a latent page; or a copy of V whose unused slots are zero */
} fv_tile_block_t;

typedef struct fv_tile_ops {
    const char *name;
    int32_t macs_per_ns;                   /* for the cost of a tile only */
    void (*begin)(fv_tile_block_t *block); /* q is loaded; NULL = nothing to do */
    void (*scores)(fv_tile_block_t *block, const void *k);
    void (*softcap)(fv_tile_block_t *block);
    void (*softmax)(fv_tile_block_t *block);
    void (*accumulate)(fv_tile_block_t *block, const void *v);
    /*
     * v_in_k: the first dv rows of K^T [dk, P], turned into V [P, dv] as pages have it, in v_clean. It costs a few cycles a
     * cache line, and spares every token its second copy in memory and on the way from there.
     */
    void (*latent_v)(fv_tile_block_t *block, const void *k);
    /* A page of FP8 latents as one in fp32 has it (fp8.h). */
    void (*widen_fp8)(const uint8_t *page, int32_t dk, int32_t dv, float *out);
    void (*end)(void); /* NULL = nothing to do */
} fv_tile_ops_t;

/* What this CPU (and this build) can do. */
typedef struct fv_isa {
    const char *name;           /* "amx", "avx512", "avx2", "portable" */
    const fv_tile_ops_t *ops;   /* any shape and dtype */
    const fv_tile_ops_t *dense; /* bf16 with dk % 32 == 0 and dv % 16 == 0, or NULL */
} fv_isa_t;

/*
 * Chooses by name; "auto" or NULL takes the best there is. Errors: FV_ERR_INVALID_ARG for an unknown name,
 * FV_ERR_UNIMPLEMENTED for one that this CPU, kernel or build lacks.
 */
FV_MUST_CHECK fv_status_t fv_isa_choose(const char *name, fv_isa_t *out);

extern const fv_tile_ops_t fv_tile_portable;
void fv_tile_latent_v(fv_tile_block_t *block,
                      const void *k); /* tile_latent.c: any shape, plain C */
#if defined(FV_KERNELS_X86)
extern const fv_tile_ops_t fv_tile_avx2;
extern const fv_tile_ops_t fv_tile_avx512;
extern const fv_tile_ops_t fv_tile_amx;
void fv_tile_latent_v_avx512(fv_tile_block_t *block, const void *k); /* tile_latent_avx512.c */
#endif

static inline const fv_tile_ops_t *
fv_isa_ops(const fv_isa_t *isa, int32_t dk, int32_t dv, int32_t kv_dtype)
{
    if ((isa->dense != NULL) && (kv_dtype == (int32_t)FV_DTYPE_BF16) && ((dk % 32) == 0) &&
        ((dv % 16) == 0)) {
        return isa->dense;
    }
    return isa->ops;
}

#endif /* FV_KERNELS_TILE_H */
