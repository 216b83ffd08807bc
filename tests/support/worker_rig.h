/*
 * worker_rig.h - several workers in one process, driven and judged as a coordinator would.
 *
 * The rig keeps what every session holds as fp64 values (as stored in the cache's dtype), runs each step on all
 * ranks at once (a thread each; rank 0 unpacked, the others packed) and compares every result with fv_attend_ref().
 * An item that fails on some rank is cut back on the others, and must have changed nothing.
 * Checks are cmocka assertions, made on the calling thread.
 */
#ifndef FV_TESTS_SUPPORT_WORKER_RIG_H
#define FV_TESTS_SUPPORT_WORKER_RIG_H

#include "tests/support/local_exchange.h"
#include "tests/support/random.h"
#include "worker/worker.h"

#define FV_RIG_RANKS    8
#define FV_RIG_MODELS   4
#define FV_RIG_LAYERS   2
#define FV_RIG_SESSIONS 24
#define FV_RIG_ITEMS    16

typedef struct fv_rig_layer {
    uint64_t n_tokens;
    uint64_t floor; /* position of the last append: nothing before it can be asked any more */
    double *k, *v;  /* [n_tokens, Hkv, dk], [n_tokens, Hkv, dv] */
} fv_rig_layer_t;

typedef struct fv_rig_session {
    bool is_open;
    uint32_t model;
    fv_placement_t placement;
    fv_rig_layer_t layers[FV_RIG_LAYERS];
} fv_rig_session_t;

typedef struct fv_rig_item {
    uint32_t session, layer;
    uint64_t position, kv_end;
    uint32_t n_tokens;
    uint16_t dtype, flags; /* as fv_ctl_item_t */
    bool is_poison;        /* K and V are NaN, and the result is not judged */
    /* by fv_rig_step() */
    fv_status_t status; /* FV_OK, or of the first rank that failed */
    fv_ctl_item_t ctl;
    fv_step_io_t full;
} fv_rig_item_t;

/* The exchange of a rig's workers. */
typedef struct fv_rig_door {
    const fv_exchange_ops_t *exchange;
    void *(*ctx)(void *arg, uint32_t rank); /* its exchange_ctx of a rank */
    void (*enter)(void *arg,
                  uint32_t rank); /* first call of a thread that works for a rank; may be NULL */
    void *arg;
    size_t move_bytes; /* as in fv_worker_config_t */
} fv_rig_door_t;

typedef struct fv_rig {
    uint32_t n_ranks;
    fv_rig_door_t door;
    bool is_cuda;        /* its results differ from the oracle's by a little more */
    fv_local_hub_t *hub; /* of the rig's own exchange */
    fv_worker_t *workers[FV_RIG_RANKS];
    uint32_t n_models;
    fv_model_spec_t models[FV_RIG_MODELS];
    fv_rig_session_t sessions[FV_RIG_SESSIONS];
    fv_random_t random;
    size_t move_bytes; /* > 0: the KV of every other item moves, where it fits */
    uint64_t n_checked, n_exhausted, n_moved; /* items */
} fv_rig_t;

/* `backend` NULL: fv_backend_cpu. FV_ISA chooses its instruction set (default "auto"). */
void fv_rig_create(fv_rig_t *rig,
                   uint32_t n_ranks,
                   size_t arena_bytes,
                   const fv_backend_ops_t *backend,
                   uint64_t seed);
/* The same, with move_bytes of each arena for KV that moves: that of every other item does, where it fits. */
void fv_rig_create_moving(fv_rig_t *rig,
                          uint32_t n_ranks,
                          size_t arena_bytes,
                          size_t move_bytes,
                          const fv_backend_ops_t *backend,
                          uint64_t seed);
/* The same with another exchange than local_exchange.h; its worker of rank r gets backend_config.device r. */
void fv_rig_create_through(fv_rig_t *rig,
                           uint32_t n_ranks,
                           size_t arena_bytes,
                           const fv_backend_ops_t *backend,
                           const fv_rig_door_t *door,
                           uint64_t seed);
/* Closes what is open, and checks that no page leaked. */
void fv_rig_destroy(fv_rig_t *rig);

uint32_t fv_rig_model(fv_rig_t *rig, const fv_model_spec_t *spec);
void fv_rig_open(fv_rig_t *rig,
                 uint32_t slot,
                 uint32_t model,
                 uint16_t n_head_parts,
                 uint16_t n_ctx_parts,
                 uint32_t shard_tokens);
void fv_rig_fork(fv_rig_t *rig, uint32_t slot, uint32_t parent, uint64_t at_position);
/* False when a policy has freed what queries at `position` and later read, of tokens before `end`; UINT32_MAX: any layer. */
bool fv_rig_is_readable(const fv_rig_t *rig,
                        uint32_t slot,
                        uint32_t layer,
                        uint64_t position,
                        uint64_t end);
void fv_rig_truncate(fv_rig_t *rig, uint32_t slot, uint32_t layer, uint64_t position);
void fv_rig_close(fv_rig_t *rig, uint32_t slot);

/* Runs the items, at most FV_RIG_ITEMS, with random tensors as one step and checks everything. */
void fv_rig_step(fv_rig_t *rig, fv_rig_item_t *items, size_t n_items);

/* Appends n tokens to (slot, layer) and reads with them: causal, fp32, with lse. Returns the item's status. */
fv_status_t fv_rig_append(fv_rig_t *rig, uint32_t slot, uint32_t layer, uint32_t n_tokens);

/* n_ops random operations: opens, forks, truncations, closes, and mostly steps (worker_rig_life.c). */
void fv_rig_live(fv_rig_t *rig, int n_ops);

/*
 * A random life of four models on all ranks, at least two: 512 + 64 latents and random ones, whole; latents in two slices, a
 * softmax each; S2. Each is opened over all ranks at first, prefilled and decoded. Every placement is one that CUDA ranks serve.
 */
void fv_rig_latents_and_s2(fv_rig_t *rig);

/* Every rank holds exactly the pages that placements, lengths and policies say. */
void fv_rig_check_pages(const fv_rig_t *rig);

/* What the cache holds of a row [latent_dim + rope_dim] of a LATENT model (`row` is changed), and its V. */
void fv_rig_latent_store(const fv_model_spec_t *spec, float *row, double *out_k, double *out_v);
/* The oracle of a LATENT model: of each slice for itself, the whole RoPE key with each. lse: of the last slice. */
void fv_rig_latent_ref(const fv_model_spec_t *spec, const fv_attend_ref_params_t *whole);
/* A random small one: policies as fv_rig_random_spec(); n_groups 0 = not sharded by latent. */
fv_model_spec_t fv_rig_random_latent(fv_random_t *r, int32_t n_groups);

/* A random small model: GQA, dims, dtypes, softcap, window; and one that may have S2 layers too. */
fv_model_spec_t fv_rig_random_spec(fv_random_t *r);
fv_model_spec_t fv_rig_random_sparse_spec(fv_random_t *r);

#endif /* FV_TESTS_SUPPORT_WORKER_RIG_H */
