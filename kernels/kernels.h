/*
 * kernels.h - everything the rest of the system may ask of a device.
 *
 * Decode path: station 7 of 10. Before: worker/step.c. After: worker/exchange_*.c.
 *
 * The only header of kernels/ that others include (with tiles.h, which it needs). It names no CUDA type.
 * A backend is a table of functions; backend_cpu.c and backend_cuda.c implement it.
 *
 * One step of a rank is: append (new K/V into pages), attend (partial softmax states of this rank's rows), and, for
 * rows whose KV spans ranks, merge (after the exchange). All take the whole step at once: items of any sessions,
 * layers, models, lengths, decode and prefill mixed.
 *
 * Lean decode (LeanAttention, arXiv:2405.10480): all KV tiles of all (item, KV head) rows of the step form
 * one line, cut into equal shares, one per CTA or thread; a row cut by a share's border yields partial
 * states that are merged in ascending tile order, so the same step on the same placement gives the same bits.
 *
 * Partial states: o fp32, normalised by its own sum; lse_log2 = m + log2(l), base 2. The empty set is
 * (o = 0, lse = -inf). On finite inputs no NaN and no +inf ever comes out. A NaN or inf in q, k or v spoils
 * exactly the rows that see it: a masked token, an unused page slot or the tail of a page may hold anything
 * and touches nothing (0 * NaN must not be computed).
 *
 * Pages. The KV arena is one allocation of the backend. A page reference is the page's offset in the arena in units of
 * FV_PAGE_UNIT bytes. A page holds FV_PAGE_TOKENS tokens of one (layer, KV head), K first, then V, in
 * fv_model_page_bytes(); how elements are arranged inside is the backend's own business. LATENT (v_in_k): K alone, up to
 * FV_DIM_QK_MAX dims, of which V is the first head_dim_v.
 */
#ifndef FV_KERNELS_KERNELS_H
#define FV_KERNELS_KERNELS_H

#include "common/model.h"
#include "common/status.h"
#include "kernels/tiles.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FV_PAGE_UNIT 1024 /* bytes; every page size is a multiple (head dims are multiples of 8) */
#define FV_PAGE_NONE UINT32_MAX

typedef uint32_t fv_page_ref_t;

typedef struct fv_backend fv_backend_t;

typedef struct fv_backend_config {
    int32_t n_threads; /* CPU: compute threads, caller's included; 0 = all this process may use */
    size_t kv_arena_bytes; /* multiple of FV_PAGE_UNIT */
    /* FV_KV_HOST: memory for the arena and FV_KV_ARENA_SLACK bytes behind it; keeps. NULL: the backend's own. */
    void *kv_arena;
    int32_t device; /* CUDA: which of the GPUs that this process sees */
    const char
        *isa; /* CPU: "auto", "amx", "avx512", "avx2", "portable" (tests force each); NULL = auto */
} fv_backend_config_t;

#define FV_KV_ARENA_SLACK \
    4096 /* bytes behind a host's arena: vector loads of a page's last row may reach there */

/* Where a backend keeps KV. */
typedef enum fv_kv_home {
    FV_KV_DEVICE = 0, /* where the host does not reach it */
    FV_KV_HOST,       /* in the host's memory, which may be given to it */
    FV_KV_NOWHERE,    /* it keeps none */
} fv_kv_home_t;

typedef struct fv_device_info {
    char device[96]; /* e.g. "Intel Xeon, 2 threads, avx512 bf16" */
    int32_t n_threads;
    size_t kv_arena_bytes;
    size_t workspace_bytes;
} fv_device_info_t;

/* ------------------------------------------------------------------ append */

/* New tokens of one item for all KV heads of this rank: K/V rows into pages, converted to the cache dtype. */
typedef struct fv_append_item {
    int32_t n_kv_heads; /* on this rank */
    int32_t head_dim_qk, head_dim_v;
    int32_t src_dtype, kv_dtype; /* fv_dtype_t; src FP8_LATENT: whole pages (fp8.h) */
    bool v_in_k; /* LATENT: V is dims [0, head_dim_v) of K and stored with it; `v` is not read */
    size_t rope_gap_bytes;      /* v_in_k: between dims [0, dv) and the others of a source row: a
                                   slice of a latent and the RoPE key lie apart */
    float norm_alpha, norm_eps; /* LATENT, norm_alpha > 0: those dims c of a K row are stored as
                                   c / sqrt(norm_alpha * mean(c^2) + norm_eps) */
    const void *k,
        *v; /* first token; heads contiguous: k + t * k_token_bytes + h * dk * e; 16-byte aligned
                                    base or any multiple of the element size */
    size_t k_token_bytes, v_token_bytes;
    uint64_t
        local_begin; /* the part's own index of the first token: page local_begin / P, slot local_begin % P */
    uint64_t n_tokens;          /* contiguous in the part */
    const fv_page_ref_t *pages; /* pages[h * pages_head_stride + local_page]; all present */
    size_t pages_head_stride;
} fv_append_item_t;

/* Copy on write: the first n_tokens tokens of page src to page dst. */
typedef struct fv_page_copy {
    fv_page_ref_t src, dst;
    int32_t n_tokens;
    int32_t head_dim_qk, head_dim_v;
    int32_t kv_dtype;
    bool v_in_k;
} fv_page_copy_t;

/* ------------------------------------------------------------------ attend */

/* Where partial states of a split row go: rows [row_begin of this, row_begin of the next). */
typedef struct fv_partial_dst {
    uint64_t row_begin;
    float *o;        /* [rows, dv] fp32 */
    float *lse_log2; /* [rows] fp32 */
} fv_partial_dst_t;

/* One item on this rank. Row r = t * (n_kv_heads * group) + h, t query token, h local query head. */
typedef struct fv_attn_item {
    int32_t n_tokens; /* query tokens, >= 1 */
    int32_t n_kv_heads, group;
    int32_t kv_head_begin; /* the model's number of local KV head 0: S2's patterns go by it */
    int32_t head_dim_qk, head_dim_v;
    int32_t io_dtype, kv_dtype;
    bool v_in_k;           /* as in fv_append_item_t */
    size_t rope_gap_bytes; /* v_in_k: likewise, of q */
    float latent_mu;       /* v_in_k: factor of the scores' part from dims [0, dv); 0 = 1 */
    float softmax_scale, logit_softcap; /* softcap 0 = off; else c * tanh(s / c) after scaling */
    bool causal;
    fv_policy_t policy;
    fv_kv_shard_t shard;
    int64_t position; /* of the first query token */
    int64_t kv_end;
    const void *q; /* q + t * q_token_bytes + h * q_head_bytes */
    size_t q_token_bytes;
    size_t q_head_bytes; /* v_in_k; 0 = dk * e, and always so without */
    const fv_page_ref_t *
        pages; /* pages[kv_head * pages_head_stride + local_page]; may be NULL when no tile; those that no row reads may be anything */
    size_t pages_head_stride;
    /*
     * A backend may keep tables. Entries that it may have seen stay as they are while id and version do (or become
     * FV_PAGE_NONE and are never read again); entries behind n_table_pages are nobody's yet.
     */
    uint64_t table_id;      /* of this table in the whole process; 0: not to be kept */
    uint64_t table_version; /* differs from all before when an entry was replaced */
    uint32_t n_table_pages; /* entries of each head; every page that is read is among them */

    /* Result, n_dst = 0: final. o in io_dtype at out + t * out_token_bytes + h * out_head_bytes; lse (may be
     * NULL) fp32 natural log at lse + t * lse_token_stride + h.
     * Result, n_dst > 0: partial states to dst[0..n_dst), ascending row_begin, dst[0].row_begin = 0. */
    void *out;
    size_t out_token_bytes;
    size_t out_head_bytes; /* v_in_k; 0 = dv * e, and always so without */
    float *lse;
    size_t lse_token_stride; /* elements */
    const fv_partial_dst_t *dst;
    int32_t n_dst;
    /*
     * Scores that are added up between ranks (LATENT, exact; v_in_k): fp32, q . k before scale and softcap, in an order of
     * the backend's own, which the same item has on every rank. NULL: attend() computes its own.
     */
    float *scores;     /* scores() writes them, attend() reads (and may change) them */
    bool without_rope; /* scores(): of dims [0, dv) alone */
} fv_attn_item_t;

/* ------------------------------------------------------------------ merge */

/*
 * Merges n_parts partial states of each row, ascending part order:
 *   m = max_s lse[s];  w[s] = 2^(lse[s] - m);  o = sum_s w[s] o[s] / sum_s w[s];  lse = m + log2(sum_s w[s])
 * A part with lse = -inf is skipped without being multiplied (its o may be anything); only empty parts:
 * (0, -inf). Any other lse, NaN and +inf included, follows IEEE. Source: FlashInfer, arXiv:2501.01005.
 * Row i of [0, n_rows) is row (row_base + i); result row r goes to out + (r / row_len) * out_token_bytes +
 * (r % row_len) * dv * e, lse alike, converted to io_dtype / natural log.
 */
typedef struct fv_merge_item {
    uint64_t n_rows;
    int32_t n_parts;
    int32_t head_dim_v;
    int32_t io_dtype;
    const float *const *o;        /* [n_parts] -> [n_rows, dv] */
    const float *const *lse_log2; /* [n_parts] -> [n_rows] */
    uint64_t row_base, row_len;
    void *out;
    size_t out_token_bytes;
    size_t out_head_bytes; /* from row to row of a token; 0 = dv * e */
    float *lse;            /* may be NULL */
    size_t lse_token_stride;
} fv_merge_item_t;

/*
 * One peer of an exchange in which devices write partial states into each other's memory (worker/exchange_nccl.h).
 * Device addresses. Large messages were written by attend; the merge tells the peer so, and waits to be told:
 *     *signal becomes `value` when all that was enqueued before is there; *awaited must become `value` or later.
 * Small ones the merge itself brings over, each 4 bytes with `value` beside them (LL, for "low latency"): nothing needs
 * to be told. `send` lies in this device's memory, its words go to ll_send[i] = {word, value}; the peer's are awaited in
 * ll_recv, and merge items name them as if they lay, without values, at ll_recv.
 */
typedef struct fv_merge_pair {
    uint32_t *signal;                /* NULL: nothing to tell */
    const uint32_t *awaited;         /* NULL: nothing to wait for */
    const uint32_t *send;            /* 16-byte aligned, as the two below */
    uint32_t *ll_send;               /* in the peer's memory, 2 * send_bytes */
    const uint32_t *ll_recv;         /* in this device's memory, 2 * recv_bytes */
    uint64_t send_bytes, recv_bytes; /* multiples of 16; 0: not this way */
    uint32_t value;
    uint32_t reserved;
} fv_merge_pair_t;

/* The exchange that a merge completes. Borrowed during the call; *abort and *gave_up until finish(). */
typedef struct fv_merge_sync {
    const fv_merge_pair_t *pairs;
    size_t n_pairs;
    uint32_t deadline_ms;     /* of waiting */
    volatile uint32_t *abort; /* memory of the host that the device reads: not 0 ends the waiting */
    volatile uint32_t
        *gave_up; /* alike, written: 1 + the pair that did not answer; no row is merged then */
} fv_merge_sync_t;

/* ------------------------------------------------------------------ waiting */

/* When finish() gives up. */
typedef struct fv_wait_limits {
    uint32_t deadline_ms;          /* from the call on */
    bool (*is_aborted)(void *arg); /* asked now and then; NULL: never */
    void *arg;
} fv_wait_limits_t;

/* Of the work between two calls of finish(), by the device's own clock. */
typedef struct fv_device_times {
    bool is_known; /* false: the backend has no clock of its own; the rest is 0 then */
    uint32_t
        compute_us; /* from the first operation to the end of the last attend(); of append() if there was none */
    uint32_t
        exchange_us; /* from there to the end of the last merge(), what lay between included; 0 without one */
} fv_device_times_t;

/* ------------------------------------------------------------------ the table */

/*
 * All calls from one thread (compute). Errors: FV_ERR_INVALID_ARG for a descriptor that breaks its contract,
 * backend failures as their own status. A call returns when its work is done or enqueued; `finish` returns
 * when all of it is done and its results are readable by the host. Pointers are borrowed until then.
 */
typedef struct fv_backend_ops {
    const char *name; /* "cpu", "cuda" */
    fv_kv_home_t kv_home;
    bool has_latent;     /* serves models of kind LATENT (v_in_k) */
    bool has_fp8_latent; /* and such with a cache of FP8_LATENT */
    bool is_async;       /* calls enqueue, and the caller's thread is free until finish() */
    fv_status_t (*create)(const fv_backend_config_t *config, fv_backend_t **out);
    void (*destroy)(fv_backend_t *backend); /* NULL is fine */
    void (*describe)(const fv_backend_t *backend, fv_device_info_t *out);
    /* Host memory that the device reaches fast (pinned); CPU: page-aligned. These two from any thread. */
    fv_status_t (*host_alloc)(fv_backend_t *backend, size_t n_bytes, void **out);
    void (*host_free)(fv_backend_t *backend, void *memory);
    /*
     * A hint, while a step works: n_bytes of the next step's inputs lie at `data`, in memory of host_alloc(), and stay as
     * they are until that step's finish(). The device may fetch them beside what it does. NULL: nothing to gain.
     */
    void (*prefetch)(fv_backend_t *backend, const void *data, size_t n_bytes);
    /* Address of the KV arena: of the host (FV_KV_HOST) or of the device. Whoever moves whole pages himself needs it. */
    void *(*kv_base)(fv_backend_t *backend);
    fv_status_t (*append)(fv_backend_t *backend, const fv_append_item_t *items, size_t n_items);
    fv_status_t (*copy_pages)(fv_backend_t *backend, const fv_page_copy_t *copies, size_t n_copies);
    fv_status_t (*attend)(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items);
    /* FV_ERR_UNIMPLEMENTED: attend() would fail for an item of these dtypes and dims, pages aside. NULL: for none. */
    fv_status_t (*check_attend)(const fv_backend_t *backend, const fv_attn_item_t *item);
    /*
     * The first half of attend(), for items whose scores are added up between ranks before the second: writes
     * score_count(item) floats to each item's `scores`. Both NULL: not served.
     */
    uint64_t (*score_count)(const fv_attn_item_t *item);
    fv_status_t (*scores)(fv_backend_t *backend, const fv_attn_item_t *items, size_t n_items);
    /* sync NULL: all parts are there. CPU backends take nothing else. With it, n_items may be 0: signals and waits. */
    fv_status_t (*merge)(fv_backend_t *backend,
                         const fv_merge_item_t *items,
                         size_t n_items,
                         const fv_merge_sync_t *sync);
    /* n_rows partial states become the empty set by their lse alone: an empty part's o may be anything. */
    fv_status_t (*empty)(fv_backend_t *backend, float *lse_log2, uint64_t n_rows);
    /*
     * limits NULL: waits for ever. out_times may be NULL.
     * FV_ERR_TIMED_OUT or FV_ERR_RANK_LOST (aborted): given up. The backend is unusable then: the device may still
     * write where it was told to, so memory named by the step must stay; destroy() does not wait.
     */
    fv_status_t (*finish)(fv_backend_t *backend,
                          const fv_wait_limits_t *limits,
                          fv_device_times_t *out_times);
} fv_backend_ops_t;

extern const fv_backend_ops_t fv_backend_cpu;
/*
 * A page of the CPU backend as plain rows (FP8_LATENT: as it is): k_rows [FV_PAGE_TOKENS, head_dim_qk], v_rows [FV_PAGE_TOKENS,
 * head_dim_v] (unused with v_in_k), elements of kv_dtype as stored. Rows that were never written hold anything. Errors: FV_ERR_INVALID_ARG.
 */
FV_MUST_CHECK fv_status_t fv_cpu_read_page(const fv_backend_t *backend,
                                           const fv_page_copy_t *page,
                                           void *k_rows,
                                           void *v_rows);
/* Moves no KV and computes nothing: outputs are left as they are. For measuring the service around it. */
extern const fv_backend_ops_t fv_backend_null;
#if defined(FV_WITH_CUDA)
/* One NVIDIA GPU of compute capability 9.0. */
extern const fv_backend_ops_t fv_backend_cuda;

#    define FV_CUDA_ID_BYTES 16
bool fv_backend_cuda_is_visible(void); /* the driver shows this process a GPU */
int32_t fv_backend_cuda_count(void);   /* how many */
/* Bytes free on a GPU, and what names it on all hosts and whatever the order of devices; 0 and false: there is none. */
size_t fv_backend_cuda_memory_free(int32_t device);
bool fv_backend_cuda_id(int32_t device, uint8_t out[FV_CUDA_ID_BYTES]);

/* For the exchange between devices: the backend's cudaStream_t, and memory of others that the device reaches. */
void *fv_backend_cuda_stream(fv_backend_t *backend);
FV_MUST_CHECK fv_status_t fv_backend_cuda_reach(fv_backend_t *backend, void *begin, size_t n_bytes);
void fv_backend_cuda_unreach(fv_backend_t *backend, const void *begin);
#endif

/* ------------------------------------------------------------------ oracle */

/*
 * fp64 attention straight from the definition (attend_ref.c): no tiles, no online softmax, no shared code
 * with the kernels but fv_row_range()'s specification. K and V are given as stored values, widened.
 *
 *   out[r, :] = sum_j softmax_j(cap(scale * q_r . k_j)) v_j over the tokens row r sees; lse natural log.
 */
typedef struct fv_attend_ref_params {
    int64_t n_tokens, position, kv_end;
    int32_t n_kv_heads, group, head_dim_qk, head_dim_v;
    int32_t kv_head_begin; /* as in fv_attn_item_t */
    double softmax_scale, logit_softcap;
    bool causal;
    fv_policy_t policy;
    const double *q; /* [n_tokens, n_kv_heads * group, dk] */
    const double *k; /* [kv_end, n_kv_heads, dk] */
    const double *v; /* [kv_end, n_kv_heads, dv] */
    double *out;     /* [n_tokens, n_kv_heads * group, dv] */
    double *lse;     /* [n_tokens, n_kv_heads * group] or NULL */
} fv_attend_ref_params_t;

void fv_attend_ref(const fv_attend_ref_params_t *params);

/* Scalar conversions, round to nearest even, NaN stays NaN: for oracles, tests and remainders. */
float fv_f16_to_f32(uint16_t h);
uint16_t fv_f32_to_f16(float f);
float fv_bf16_to_f32(uint16_t h);
uint16_t fv_f32_to_bf16(float f);

/* Element i of a buffer of `dtype`, and rounding of a value through a dtype. */
float fv_load_element(const void *data, fv_dtype_t dtype, size_t i);
void fv_store_element(void *data, fv_dtype_t dtype, size_t i, float value);

/* n_elems contiguous elements at any alignment, same rounding. */
void fv_load_row(float *out, const void *data, fv_dtype_t dtype, size_t n_elems);
void fv_store_row(void *data, fv_dtype_t dtype, const float *row, size_t n_elems);

#ifdef __cplusplus
}
#endif

#endif /* FV_KERNELS_KERNELS_H */
