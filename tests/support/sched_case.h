/*
 * sched_case.h - small helpers for tests of the scheduler core: models, sessions, requests without tensors.
 */
#ifndef FV_TESTS_SUPPORT_SCHED_CASE_H
#define FV_TESTS_SUPPORT_SCHED_CASE_H

#include "coord/sched.h"

/* A request that owns its arrays; freed by fv_case_request_free(). */
typedef struct fv_case_request {
    fv_request_t request;
    fv_attend_item_t items[16];
    uint32_t digests[16];
    fv_ctl_item_t ctl_items[16];
    fv_session_t *sessions[16];
    bool is_cancelled;
    int tag; /* the test's own */
} fv_case_request_t;

/* heads 4/2, dims 16, 2 layers, bf16 unless changed by the caller before registering */
fv_model_spec_t fv_case_spec(const char *name);
/* Memory of a rank with n_slabs of slab_bytes, all free. */
fv_ctl_memory_t fv_case_memory(uint32_t n_slabs, uint32_t slab_bytes);
/* A scheduler of n_ranks, each with such memory. */
fv_sched_t *fv_case_sched(uint32_t n_ranks, uint32_t n_slabs, uint32_t slab_bytes);
/* And one that takes so many prompt tokens a step. */
fv_sched_t *
fv_case_sched_pieces(uint32_t n_ranks, uint32_t n_slabs, uint32_t slab_bytes, uint32_t n_tokens);
/* And one whose prompts over several ranks are computed one way (coord/plan_prefill.h). */
fv_sched_t *fv_case_sched_ways(uint32_t n_ranks,
                               uint32_t n_slabs,
                               uint32_t slab_bytes,
                               uint32_t n_tokens,
                               fv_plan_prefill_t way);
/* Registers and returns the model id in out_id. */
void fv_case_register(fv_sched_t *sched, fv_model_spec_t *spec, char out_id[FV_MODEL_ID_BYTES]);
/* Opens a session with a made-up id. */
fv_session_id_t
fv_case_open(fv_sched_t *sched, const char *model_id, const fv_sharding_t *sharding);

/* An empty request on a layer; items are added, then sizes filled in from the spec. */
fv_case_request_t *fv_case_request(uint32_t layer, bool append);
void fv_case_add(fv_case_request_t *r,
                 fv_session_id_t session,
                 uint64_t position,
                 uint32_t n_tokens,
                 uint32_t digest);
void fv_case_sizes(fv_case_request_t *r, const fv_model_spec_t *spec);
bool fv_case_is_cancelled(void *user);
#define fv_case_of(req) ((fv_case_request_t *)(req)->user)

#endif /* FV_TESTS_SUPPORT_SCHED_CASE_H */
