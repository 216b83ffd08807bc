/*
 * fovea.h - the C client of Fovea, a distributed attention service.
 *
 * A frontend owns a model's weights; Fovea owns its KV cache and computes its attention. The life of
 * a client: fovea_connect(), fovea_register_model() once, fovea_open_session() per sequence, then one
 * attend request per layer and step (fovea_attend(), or pipelined on a fovea_stream_t), and
 * fovea_close_session() at the end. A short program: client/examples/attend.c.
 *
 * This header stands alone: C11 or C++11, no other Fovea header. Link with -lfovea.
 *
 * Conventions
 *  - Zero is every default: initialise structs with {0} and set what you need. Later versions append
 *    fields to option and request structs, with 0 meaning what this version does.
 *  - Every call that can fail returns a fovea_code_t, and fills `error` with the same code and a text
 *    (naming the field, what was given and what was expected) when it is not FOVEA_OK. `error` may
 *    be NULL everywhere. Outputs are written only on FOVEA_OK, unless said otherwise.
 *  - timeout_ms: FOVEA_TIMEOUT_DEFAULT (0) = the client's call_timeout_ms, FOVEA_TIMEOUT_NONE (-1) =
 *    wait for ever. Past it: FOVEA_DEADLINE_EXCEEDED.
 *  - Nothing is retried behind your back. FOVEA_UNAVAILABLE may be retried as it is: an append that
 *    was already made is recognised by its position and contents, and answered without being doubled.
 *  - Shape letters: T tokens of a request (the sum over its items), Hq query heads, Hkv KV heads,
 *    dk head_dim_qk, dv head_dim_v. Tensors are row-major, little-endian, any alignment.
 *
 * Ownership. Arguments are borrowed until the call returns. Tensors of a request are sent from the
 * caller's memory without a copy, and results are gathered once, into the caller's memory: see
 * fovea_attend() and fovea_stream_submit() for how long that memory is in use. Structs with lists are
 * released by their _free function, which accepts a zeroed struct.
 *
 * Threads. A fovea_client_t and a fovea_stream_t may be used from any number of threads at once;
 * closing one must be the last call on it. No thread is started except by fovea_stream_options_t's
 * with_thread (gRPC has threads of its own). After fork() a child must not use a client it inherited.
 *
 * Settings an application may want, because they concern the whole process: without
 *     mallopt(M_MMAP_THRESHOLD, 1 << 30); mallopt(M_TRIM_THRESHOLD, INT_MAX); mallopt(M_TOP_PAD, 64 << 20);
 * at start, glibc returns the buffers of every message of 128 KiB or more to the kernel and faults them
 * in again: about half the throughput at 1 MiB. The library leaves this choice to the application. It
 * does not touch signals; block them in all threads before fovea_connect() if you use sigwait().
 */
#ifndef FOVEA_H
#define FOVEA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#    define FOVEA_API __attribute__((visibility("default")))
#else
#    define FOVEA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The public prefix is fovea_, not the project's own. NOLINTBEGIN(readability-identifier-naming) */

/* ------------------------------------------------------------------ errors */

/* The gRPC status codes. */
typedef enum fovea_code {
    FOVEA_OK = 0,
    FOVEA_CANCELLED = 1,
    FOVEA_UNKNOWN = 2,
    FOVEA_INVALID_ARGUMENT = 3,  /* a shape, size or value is wrong; a retry cannot help */
    FOVEA_DEADLINE_EXCEEDED = 4, /* an append may or may not have been made: retry it as it was */
    FOVEA_NOT_FOUND = 5,         /* no such session or model */
    FOVEA_ALREADY_EXISTS = 6,
    FOVEA_PERMISSION_DENIED = 7,
    FOVEA_RESOURCE_EXHAUSTED = 8,  /* KV memory or a quota, with bytes needed and free */
    FOVEA_FAILED_PRECONDITION = 9, /* e.g. other tokens stand at this position: truncate first */
    FOVEA_ABORTED = 10,
    FOVEA_OUT_OF_RANGE = 11, /* position beyond the session's length, which the text gives */
    FOVEA_UNIMPLEMENTED = 12,
    FOVEA_INTERNAL = 13,
    FOVEA_UNAVAILABLE =
        14, /* no connection, draining, or a rank was lost; an append's retry is safe */
    FOVEA_DATA_LOSS = 15,
    FOVEA_UNAUTHENTICATED = 16
} fovea_code_t;

#define FOVEA_MESSAGE_BYTES 512

typedef struct fovea_error {
    fovea_code_t code;
    char message[FOVEA_MESSAGE_BYTES]; /* NUL-terminated; "" when code is FOVEA_OK */
} fovea_error_t;

/* "OK", "INVALID_ARGUMENT", ...; never NULL. */
FOVEA_API const char *fovea_code_name(fovea_code_t code);

#define FOVEA_TIMEOUT_DEFAULT 0
#define FOVEA_TIMEOUT_NONE    (-1)

/* ------------------------------------------------------------------ connection */

typedef struct fovea_client fovea_client_t;

typedef struct fovea_options {
    int64_t connect_timeout_ms; /* how long fovea_connect() waits for the service; 0 = 5000 */
    int64_t call_timeout_ms;    /* of calls with FOVEA_TIMEOUT_DEFAULT; 0 = 30000, -1 = none */
    size_t message_bytes_max;   /* the largest answer accepted; 0 = no limit but gRPC's 2 GiB */
    int32_t keepalive_ms; /* after this silence of a running call the peer is probed, and a dead
                                   connection fails its calls with UNAVAILABLE; 0 = 30000, -1 = off */
    /* who the service must be, and who this client is; files are PEM and read by fovea_connect() */
    bool tls;            /* TLS; a ca_file or cert_file implies it */
    const char *ca_file; /* who signs the service's certificate; NULL = whom this system trusts */
    const char *cert_file, *key_file; /* this client's own, for mutual TLS; both or none */
    const char
        *server_name;  /* what the service's certificate must name; NULL = the address's host */
    const char *token; /* shown with every call; in clear text without TLS */
    const char *token_file; /* or a file whose first line it is */
    /* a call that finds the service unavailable (it restarts, say) is repeated, with longer and longer pauses, for so long and
       within its own timeout, and a stream is opened again and sends what has no answer; 0 = 10000, -1 = never. Open and fork
       are repeated only while there is no connection at all: otherwise there may be a session already that nobody knows */
    int32_t retry_ms;
} fovea_options_t;

/*
 * Connects to `address`: "host:port", "unix:/path" or "unix-abstract:name". One client is one
 * connection. Waits until the service accepts it; a service that is still starting is waited for.
 * options: may be NULL. *out: owned by the caller, for fovea_close().
 * Errors: INVALID_ARGUMENT (address, a file that cannot be used); UNAVAILABLE naming the address when it cannot be reached in time.
 */
FOVEA_API fovea_code_t fovea_connect(const char *address,
                                     const fovea_options_t *options,
                                     fovea_client_t **out,
                                     fovea_error_t *error);

/* Closes the connection and frees the client. Its streams must be closed and its calls over. NULL is fine. */
FOVEA_API void fovea_close(fovea_client_t *client);

/* The version of this library, e.g. "0.1.0". */
FOVEA_API const char *fovea_version(void);

/* ------------------------------------------------------------------ models */

typedef enum fovea_dtype {
    FOVEA_DTYPE_F32 = 1,
    FOVEA_DTYPE_F16 = 2,  /* IEEE binary16 */
    FOVEA_DTYPE_BF16 = 3, /* the upper 16 bits of a binary32 */
    FOVEA_DTYPE_FP8_LATENT =
        4 /* of kv_dtype alone, kind LATENT: latents in e4m3 with an fp32 scale for each 128
                                  dims, RoPE keys in bf16; 656 bytes a token of 512 + 64 */
} fovea_dtype_t;

/* Bytes of one element: 4 or 2; 0 for a value that is no dtype. */
FOVEA_API size_t fovea_dtype_bytes(fovea_dtype_t dtype);

typedef enum fovea_policy_kind {
    FOVEA_POLICY_DENSE = 0,
    FOVEA_POLICY_WINDOW = 1,
    FOVEA_POLICY_S2 = 2
} fovea_policy_kind_t;

typedef enum fovea_pattern_per {
    FOVEA_PATTERN_KV_HEAD = 0, /* the query heads of a KV head share a pattern */
    FOVEA_PATTERN_Q_HEAD = 1   /* each query head has its own */
} fovea_pattern_per_t;

/* S2-Attention: local blocks, and a strided rest that differs from head to head; proto/attention.proto defines it. */
typedef struct fovea_s2 {
    const char *preset; /* "phi3-small", "s2-16", ...: then all else is 0; NULL: by the numbers */
    uint32_t block_tokens;     /* 16, 32, 64, 128 or 256 */
    uint32_t local_blocks;     /* >= 1, counts the query's own */
    uint32_t vert_stride;      /* >= 1 blocks */
    int32_t head_sliding_step; /* 0 = max(1, vert_stride / n_q_heads) */
    int32_t head_sliding_offset;
    uint32_t num_dense_heads; /* the last ones */
    bool homo_head;           /* every head as head 0 */
    fovea_pattern_per_t pattern_per;
} fovea_s2_t;

/* Which tokens a query may read in some layers. Layers no entry names are dense; a later entry wins. */
typedef struct fovea_policy {
    fovea_policy_kind_t kind;
    uint32_t window_tokens; /* WINDOW: >= 1, counts the query's own position */
    uint32_t sink_tokens;   /* WINDOW: the first tokens of the sequence, always visible */
    const uint32_t *layers; /* [n_layers] layer indices; NULL with n_layers = 0: every layer */
    uint32_t n_layers;
    fovea_s2_t s2; /* S2 */
} fovea_policy_t;

typedef enum fovea_sharding_mode {
    FOVEA_SHARDING_AUTO = 0,    /* the planner decides, per session */
    FOVEA_SHARDING_HEADS = 1,   /* KV heads over ranks: nothing is exchanged */
    FOVEA_SHARDING_CONTEXT = 2, /* token blocks over ranks: partial results are merged */
    FOVEA_SHARDING_LATENT = 3 /* latent models only: slices of the latent, a softmax each (TPLA). An
                                 approximation of the model; CONTEXT is exact */
} fovea_sharding_mode_t;

typedef struct fovea_sharding {
    fovea_sharding_mode_t mode;
    uint32_t
        shard_tokens; /* tokens per turn of the block-cyclic context, a multiple of 64; 0 = server's */
    uint32_t max_ranks; /* 0 = all */
    uint32_t groups;    /* LATENT: slices, 1, 2, 4 or 8; a model's, not a session's */
    const float *mu;    /* LATENT: [groups] factors of each slice's latent scores; NULL = 1 */
    bool
        exact; /* LATENT: scores are added up over the slices before one softmax; exact, and slower than CONTEXT */
} fovea_sharding_t;

typedef enum fovea_model_kind {
    FOVEA_KIND_KV = 0,
    FOVEA_KIND_LATENT = 1 /* MLA: one latent and one RoPE key a token, for all heads */
} fovea_model_kind_t;

#define FOVEA_POLICIES_MAX 15

typedef struct fovea_model_spec {
    const char *name;       /* shown in status output; 1..63 bytes */
    uint32_t n_layers;      /* 1..1024 */
    uint32_t n_q_heads;     /* Hq: 1..1024, a multiple of n_kv_heads, at most 128 per KV head */
    uint32_t n_kv_heads;    /* Hkv: 1..1024 */
    uint32_t head_dim_qk;   /* dk: 16..256, a multiple of 8 */
    uint32_t head_dim_v;    /* dv: likewise; 0 = head_dim_qk */
    fovea_dtype_t kv_dtype; /* how the service stores K and V */
    float softmax_scale;    /* 0 = 1/sqrt(dk) */
    float logit_softcap;    /* c > 0: logits become c * tanh(logit / c), after scaling; 0 = off */
    const fovea_policy_t *policies; /* [n_policies]; may be NULL when n_policies is 0 */
    uint32_t n_policies;            /* 0..FOVEA_POLICIES_MAX */
    fovea_sharding_t sharding;
    /*
     * LATENT: n_kv_heads and the head dims are left 0, softmax_scale is explicit. Requests bring q [T, Hq, latent_dim +
     * rope_dim] in absorbed form, k [T, latent_dim + rope_dim] and no v (NULL, 0 bytes); out is [T, Hq, latent_dim].
     */
    fovea_model_kind_t kind;
    uint32_t latent_dim; /* 64..1024, a multiple of 64 */
    uint32_t rope_dim;   /* 0..128, a multiple of 8 */
    bool norm_slices;    /* latents arrive raw: each slice c is stored as c / sqrt(alpha / groups *
                            mean(c^2) + norm_eps) */
    float norm_eps;
    const float *
        norm_alpha; /* [groups] reciprocals of the slices' shares of the squared norm; NULL: one slice */
} fovea_model_spec_t;

#define FOVEA_MODEL_ID_BYTES 40
#define FOVEA_WARNINGS_MAX   4

typedef struct fovea_model {
    char model_id[FOVEA_MODEL_ID_BYTES]; /* NUL-terminated */
    uint32_t n_warnings;
    char warnings[FOVEA_WARNINGS_MAX]
                 [256]; /* what is accepted but will not be fast, for a person */
} fovea_model_t;

/*
 * Idempotent: the same spec always gives the same model_id.
 * Errors: INVALID_ARGUMENT naming the field; UNIMPLEMENTED.
 */
FOVEA_API fovea_code_t fovea_register_model(fovea_client_t *client,
                                            const fovea_model_spec_t *spec,
                                            int64_t timeout_ms,
                                            fovea_model_t *out,
                                            fovea_error_t *error);

/* ------------------------------------------------------------------ sessions */

/* One sequence with its KV cache. 128 random bits; who knows them may use the session. */
typedef struct fovea_session_id {
    uint8_t bytes[16];
} fovea_session_id_t;

#define FOVEA_SESSION_TEXT_BYTES 33 /* 32 hex digits and NUL */

/* Text form and back; parse returns false, leaving *out alone, unless `text` is 32 hex digits. */
FOVEA_API void fovea_session_id_format(const fovea_session_id_t *id,
                                       char out[FOVEA_SESSION_TEXT_BYTES]);
FOVEA_API bool fovea_session_id_parse(const char *text, fovea_session_id_t *out);

typedef struct fovea_session_options {
    uint64_t max_tokens_hint;         /* 0 = unknown; guides placement, reserves nothing */
    const fovea_sharding_t *sharding; /* overrides the model's; NULL = the model's */
    bool
        close_with_stream; /* it (and its forks) ends with the first stream that used it, however that ends */
} fovea_session_options_t;

/* options: may be NULL. Errors: NOT_FOUND (model_id), RESOURCE_EXHAUSTED, UNAVAILABLE (draining). */
FOVEA_API fovea_code_t fovea_open_session(fovea_client_t *client,
                                          const char *model_id,
                                          const fovea_session_options_t *options,
                                          int64_t timeout_ms,
                                          fovea_session_id_t *out,
                                          fovea_error_t *error);

#define FOVEA_WHOLE UINT64_MAX /* fork: everything the session holds */

/*
 * A new session that holds `session`'s tokens [0, at_position) of every layer (a layer that is shorter:
 * all it has). Copy on write: no KV is copied until one of the two appends into a page that both use.
 * Errors: NOT_FOUND; OUT_OF_RANGE when at_position is beyond the longest layer.
 */
FOVEA_API fovea_code_t fovea_fork_session(fovea_client_t *client,
                                          const fovea_session_id_t *session,
                                          uint64_t at_position,
                                          int64_t timeout_ms,
                                          fovea_session_id_t *out,
                                          fovea_error_t *error);

/*
 * Every layer keeps its tokens [0, position) at most. One whose answer is lost is not repeated, for what has been appended since
 * would be cut: it succeeds when the session is as long as it should be. Errors: NOT_FOUND, OUT_OF_RANGE, UNAVAILABLE.
 */
FOVEA_API fovea_code_t fovea_truncate_session(fovea_client_t *client,
                                              const fovea_session_id_t *session,
                                              uint64_t position,
                                              int64_t timeout_ms,
                                              fovea_error_t *error);

/* Frees its KV cache (forks of it live on). Errors: NOT_FOUND. */
FOVEA_API fovea_code_t fovea_close_session(fovea_client_t *client,
                                           const fovea_session_id_t *session,
                                           int64_t timeout_ms,
                                           fovea_error_t *error);

typedef struct fovea_session_info {
    fovea_session_id_t session;
    char model_id[FOVEA_MODEL_ID_BYTES];
    uint32_t n_layers;
    uint64_t *layer_tokens; /* [n_layers] tokens committed; owned */
    uint64_t max_tokens;    /* of the longest layer */
    uint64_t kv_bytes;      /* pages held, shared pages counted in full */
    uint64_t created_unix_ms;
    bool has_parent; /* it is a fork */
    fovea_session_id_t parent;
} fovea_session_info_t;

FOVEA_API fovea_code_t fovea_get_session(fovea_client_t *client,
                                         const fovea_session_id_t *session,
                                         int64_t timeout_ms,
                                         fovea_session_info_t *out,
                                         fovea_error_t *error);
FOVEA_API void fovea_session_info_free(fovea_session_info_t *info);

typedef struct fovea_list_options {
    uint32_t page_size;     /* 0 = 100, at most 1000 */
    const char *page_token; /* NULL = from the start; else next_page_token of the page before */
    const char *model_id;   /* NULL = of all models */
} fovea_list_options_t;

typedef struct fovea_session_list {
    uint32_t n_sessions;
    fovea_session_info_t *sessions; /* [n_sessions], owned with what they own */
    char next_page_token[64];       /* "" at the end */
    uint64_t n_total;
} fovea_session_list_t;

/* One page of the sessions. options: may be NULL. */
FOVEA_API fovea_code_t fovea_list_sessions(fovea_client_t *client,
                                           const fovea_list_options_t *options,
                                           int64_t timeout_ms,
                                           fovea_session_list_t *out,
                                           fovea_error_t *error);
FOVEA_API void fovea_session_list_free(fovea_session_list_t *list);

/* ------------------------------------------------------------------ attention */

/* The query (and, unless FOVEA_ATTEND_QUERY_ONLY, new K/V) tokens of one session. */
typedef struct fovea_attend_item {
    fovea_session_id_t session;
    uint64_t position; /* of the first token: the layer's length to append, lower to repeat */
    uint32_t n_tokens; /* 1 = decode; more = prefill (any chunking) or multi-token verification */
} fovea_attend_item_t;

#define FOVEA_ATTEND_NOT_CAUSAL 1U /* queries also see the tokens after them */
#define FOVEA_ATTEND_QUERY_ONLY 2U /* appends nothing: k and v are NULL, 0 bytes */

/*
 * One layer of one step, for the tokens of all items packed in item order. All items belong to
 * different sessions of one model. Sizes are given in bytes and must be exactly those of the shapes
 * (e = fovea_dtype_bytes(dtype)): the service knows the model, the library does not have to.
 */
typedef struct fovea_attend_request {
    uint32_t layer;
    fovea_dtype_t dtype; /* of q, k, v and out; need not be the cache's */
    uint32_t flags;      /* FOVEA_ATTEND_* */
    uint32_t
        only_slice; /* LATENT in groups: 1 + the slice that out is of, [T, Hq, latent_dim / groups]; only its ranks
                            answer, all append. 0: all slices */
    uint32_t n_items;                 /* 1..4096 */
    const fovea_attend_item_t *items; /* [n_items] */
    const void *q;                    /* [T, Hq, dk] */
    size_t q_bytes;
    const void *k; /* [T, Hkv, dk] */
    size_t k_bytes;
    const void *v; /* [T, Hkv, dv] */
    size_t v_bytes;
    void *out; /* [T, Hq, dv]: the result; may not overlap q, k or v */
    size_t out_bytes;
    float *lse; /* [T, Hq] fp32: natural log of each row's sum of exponentials, -inf for a row that
                   sees no token; NULL = not wanted */
    size_t lse_bytes;
} fovea_attend_request_t;

/* Where the time went, by the service's clock; microseconds. */
typedef struct fovea_timings {
    uint32_t queue_us;    /* received -> its step began */
    uint32_t compute_us;  /* append and attention, of the slowest rank */
    uint32_t exchange_us; /* partial states exchanged and merged, of the slowest rank */
    uint32_t total_us;    /* received -> answer handed to gRPC */
} fovea_timings_t;

/*
 * One request, as a unary call; blocks. A stream costs about a third as much per request.
 * out_timings: may be NULL. On failure `out` and `lse` are unspecified.
 * Ownership: everything is borrowed until return, and nothing after it. (After a deadline the return
 * is delayed until gRPC lets go of q, k and v: at worst until the keepalive finds the connection dead.)
 */
FOVEA_API fovea_code_t fovea_attend(fovea_client_t *client,
                                    const fovea_attend_request_t *request,
                                    int64_t timeout_ms,
                                    fovea_timings_t *out_timings,
                                    fovea_error_t *error);

/* ------------------------------------------------------------------ streams */

/*
 * A long-lived stream with many requests in flight; answers come in any order. A request that fails
 * fails alone. Requests on one stream reach the service in order of submission, so that steps of one
 * session may be pipelined.
 *
 * Who does the work? Without with_thread, whoever is inside fovea_stream_wait(), _poll() or _flush()
 * drives the stream: lowest latency, no thread, but a request that had to queue behind another's sending
 * moves on only while somebody is inside. With it, a thread of the stream's own drives it.
 *
 * When the stream breaks (connection lost, service stopped, cancelled), every request in flight
 * finishes with that status, and fovea_stream_submit() returns it: close it and open another.
 */
typedef struct fovea_stream fovea_stream_t;

typedef struct fovea_stream_options {
    bool with_thread;
} fovea_stream_options_t;

/* How a request ended. */
typedef struct fovea_result {
    uint64_t ticket; /* as given by fovea_stream_submit() */
    void *user;      /* likewise */
    fovea_timings_t timings;
    fovea_error_t error; /* code FOVEA_OK: out (and lse) hold the answer */
} fovea_result_t;

/*
 * Called once per request submitted with it, on the thread that drives the stream, which does nothing
 * else meanwhile: keep it short. It may submit further requests and cancel the stream, but not wait,
 * poll, flush or close it. `result` is borrowed until return.
 */
typedef void (*fovea_done_fn_t)(const fovea_result_t *result);

/* options: may be NULL. The client must outlive the stream. *out: for fovea_stream_close(). */
FOVEA_API fovea_code_t fovea_stream_open(fovea_client_t *client,
                                         const fovea_stream_options_t *options,
                                         fovea_stream_t **out,
                                         fovea_error_t *error);

/*
 * Queues one request; returns at once. With `done` the result goes to it; with done = NULL it is kept
 * until fovea_stream_wait() or fovea_stream_poll() collects it. `user` comes back in the result.
 * out_ticket: may be NULL; tickets are never 0 and never reused on a stream.
 * Ownership: `request` and its items are borrowed until return. q, k, v, out and lse stay in use until
 * the request is finished (done called, or its result collected): do not touch or free them before.
 * Errors (nothing was queued, done will not be called): INVALID_ARGUMENT, RESOURCE_EXHAUSTED (host
 * memory), or the status with which the stream broke.
 */
FOVEA_API fovea_code_t fovea_stream_submit(fovea_stream_t *stream,
                                           const fovea_attend_request_t *request,
                                           fovea_done_fn_t done,
                                           void *user,
                                           uint64_t *out_ticket,
                                           fovea_error_t *error);

/*
 * Waits for the request `ticket`, submitted without a callback, and collects its result. Returns
 * FOVEA_OK when it was collected, even if the request failed: see out->error.
 * Errors: DEADLINE_EXCEEDED (the request stays in flight and its memory in use); NOT_FOUND (not of this
 * stream, already collected, or submitted with a callback).
 */
FOVEA_API fovea_code_t fovea_stream_wait(fovea_stream_t *stream,
                                         uint64_t ticket,
                                         int64_t timeout_ms,
                                         fovea_result_t *out,
                                         fovea_error_t *error);

/*
 * Drives the stream until a request submitted without a callback is finished, and collects it (the
 * one that finished first); with out = NULL, until any request finishes, collecting nothing.
 * timeout_ms here: 0 = only what can be done without waiting.
 * Errors: DEADLINE_EXCEEDED; NOT_FOUND when no request is left that could satisfy it.
 */
FOVEA_API fovea_code_t fovea_stream_poll(fovea_stream_t *stream,
                                         int64_t timeout_ms,
                                         fovea_result_t *out,
                                         fovea_error_t *error);

/* Drives the stream until no request is in flight (results may still wait to be collected). */
FOVEA_API fovea_code_t fovea_stream_flush(fovea_stream_t *stream,
                                          int64_t timeout_ms,
                                          fovea_error_t *error);

/* Requests submitted and not finished yet. */
FOVEA_API uint32_t fovea_stream_in_flight(fovea_stream_t *stream);

/* Breaks the stream: everything in flight finishes with CANCELLED (while the stream is driven). */
FOVEA_API void fovea_stream_cancel(fovea_stream_t *stream);

/*
 * Cancels what is still in flight (callbacks run, uncollected results are dropped), waits until no
 * memory of any request is in use, ends the stream and frees it. fovea_stream_flush() first for a
 * graceful end. NULL is fine.
 */
FOVEA_API void fovea_stream_close(fovea_stream_t *stream);

/* ------------------------------------------------------------------ cluster */

typedef struct fovea_rank_status {
    uint32_t rank;
    char host[64];
    char backend[16]; /* "cpu", "cuda"; "none" for a dedicated coordinator */
    char device[96];
    char state[16]; /* "ready", "lost" */
    uint32_t threads;
    uint64_t kv_bytes_total, kv_bytes_free;
    uint64_t n_steps, busy_us; /* since start */
} fovea_rank_status_t;

#define FOVEA_LISTEN_MAX 8

typedef struct fovea_cluster_status {
    char version[32];
    char state[16];    /* "serving", "draining" */
    char exchange[16]; /* "none", "mpi", "nccl" */
    int32_t
        durability; /* what sessions survive: 0 nothing, 1 the service's processes, 2 its hosts */
    uint64_t epoch, uptime_ms;
    uint32_t n_ranks;
    fovea_rank_status_t *ranks; /* [n_ranks], owned */
    uint32_t n_listen;
    char listen[FOVEA_LISTEN_MAX][128];
    uint64_t n_models, n_sessions;
    uint64_t n_requests_queued, n_requests_running, n_requests_done, n_requests_failed;
    uint64_t n_steps, n_tokens_appended;
    uint64_t kv_bytes_total, kv_bytes_free;
} fovea_cluster_status_t;

FOVEA_API fovea_code_t fovea_get_status(fovea_client_t *client,
                                        int64_t timeout_ms,
                                        fovea_cluster_status_t *out,
                                        fovea_error_t *error);
FOVEA_API void fovea_cluster_status_free(fovea_cluster_status_t *status);

/* Return true to go on, false to stop watching. `status` is borrowed until return. */
typedef bool (*fovea_watch_fn_t)(void *user, const fovea_cluster_status_t *status);

/*
 * Calls `on_status` with the status now and then every interval_ms (0 = 1000; at least 50), on the
 * calling thread, until it returns false (FOVEA_OK), timeout_ms is over, or the service ends.
 * timeout_ms: FOVEA_TIMEOUT_DEFAULT means none here.
 */
FOVEA_API fovea_code_t fovea_watch_status(fovea_client_t *client,
                                          uint32_t interval_ms,
                                          int64_t timeout_ms,
                                          fovea_watch_fn_t on_status,
                                          void *user,
                                          fovea_error_t *error);

#define FOVEA_RANGES_MAX 64

typedef struct fovea_token_range {
    uint64_t begin, end; /* [begin, end) */
} fovea_token_range_t;

/* What one rank holds of a session. */
typedef struct fovea_placement_share {
    uint32_t rank;
    uint32_t kv_head_begin, kv_head_end; /* [begin, end) */
    uint32_t q_head_begin, q_head_end;   /* [begin, end) */
    uint32_t latent_begin, latent_end; /* [begin, end) of the latent's dims; 0, 0 of other models */
    uint32_t n_ranges;
    fovea_token_range_t ranges[FOVEA_RANGES_MAX]; /* of the longest layer */
    bool truncated;                               /* there are more ranges */
    uint64_t n_tokens, kv_bytes;
    uint64_t freed_bytes; /* given back because no query can read it any more */
} fovea_placement_share_t;

/* What the layers of one policy hold, over all ranks. */
typedef struct fovea_placement_pattern {
    fovea_policy_t policy; /* nothing left open; its layers belong to the placement */
    uint64_t n_tokens;     /* of the longest of them */
    uint64_t floor;        /* that layer's last append: queries from here on are possible */
    uint64_t kv_bytes, freed_bytes;
} fovea_placement_pattern_t;

typedef struct fovea_placement {
    fovea_session_id_t session;
    char model_id[FOVEA_MODEL_ID_BYTES];
    char mode
        [32]; /* "one rank", "heads", "context", "heads x context"; "latent" or "latent exact", " x heads", " x context" */
    char reason[256]; /* why the planner chose it */
    uint32_t n_head_parts, n_ctx_parts, shard_tokens;
    uint32_t n_latent_parts; /* slices of the latent; 1 unless sharded by latent */
    bool is_approximate;     /* sharded by latent: each slice has a softmax of its own */
    uint64_t n_tokens;       /* of the longest layer */
    uint32_t n_shares;
    fovea_placement_share_t *shares; /* [n_shares], owned */
    uint32_t n_q_heads, n_kv_heads;
    uint32_t n_patterns;
    fovea_placement_pattern_t *patterns; /* [n_patterns], owned: of the layers that are not dense */
} fovea_placement_t;

/* Which rank holds which heads and tokens of a session. Errors: NOT_FOUND. */
FOVEA_API fovea_code_t fovea_get_placement(fovea_client_t *client,
                                           const fovea_session_id_t *session,
                                           int64_t timeout_ms,
                                           fovea_placement_t *out,
                                           fovea_error_t *error);
FOVEA_API void fovea_placement_free(fovea_placement_t *placement);

typedef struct fovea_drained {
    uint64_t n_sessions;          /* still open */
    uint64_t n_requests_finished; /* while draining */
} fovea_drained_t;

/*
 * Refuses new sessions and requests, finishes what runs, then stops the service.
 * drain_timeout_ms: how long what runs may take; 0 = the server's --drain-timeout. out: may be NULL.
 */
FOVEA_API fovea_code_t fovea_drain(fovea_client_t *client,
                                   uint32_t drain_timeout_ms,
                                   int64_t timeout_ms,
                                   fovea_drained_t *out,
                                   fovea_error_t *error);

/* NOLINTEND(readability-identifier-naming) */

#ifdef __cplusplus
}
#endif

#endif /* FOVEA_H */
