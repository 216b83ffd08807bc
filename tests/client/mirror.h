/*
 * mirror.h - what a session must hold, and what its attention must be: the fp64 oracle beside the service.
 *
 * A mirror keeps, for one layer of one session, K and V as the cache stores them (rounded to kv_dtype,
 * then widened). A step draws random tokens, appends them here and there, and compares the answers.
 */
#ifndef FV_TESTS_CLIENT_MIRROR_H
#define FV_TESTS_CLIENT_MIRROR_H

#include "client/fovea.h"
#include "tests/support/random.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct fv_mirror {
    const fovea_model_spec_t *spec; /* borrowed; head_dim_v set */
    fovea_session_id_t session;
    uint32_t layer;
    uint64_t n_tokens, tokens_max;
    double *k; /* [tokens_max, Hkv, dk] */
    double *v; /* [tokens_max, Hkv, dv] */
} fv_mirror_t;

void fv_mirror_init(fv_mirror_t *m,
                    const fovea_model_spec_t *spec,
                    const fovea_session_id_t *session,
                    uint32_t layer,
                    uint64_t tokens_max);
/* A copy of the first n_tokens tokens, for a fork. */
void fv_mirror_fork(fv_mirror_t *m,
                    const fv_mirror_t *from,
                    const fovea_session_id_t *session,
                    uint64_t n_tokens);
void fv_mirror_fini(fv_mirror_t *m);

/* One request over one or more mirrors of the same model, with its memory. */
typedef struct fv_exam {
    fovea_attend_request_t request; /* points into what follows */
    fovea_attend_item_t *items;
    void *q, *k, *v, *out;
    float *lse;
    fv_mirror_t **mirrors; /* [n_items], borrowed */
} fv_exam_t;

/*
 * Draws random q, k, v for n_tokens[i] tokens of mirrors[i] and, unless FOVEA_ATTEND_QUERY_ONLY, appends
 * them to the mirrors. Query-only items ask about their last n_tokens[i] positions. The answer's memory
 * is poisoned.
 */
void fv_exam_init(fv_exam_t *e,
                  fv_mirror_t **mirrors,
                  const uint32_t *n_tokens,
                  uint32_t n_items,
                  fovea_dtype_t dtype,
                  uint32_t flags,
                  fv_random_t *random);
void fv_exam_fini(fv_exam_t *e);

/* Compares the answer with the oracle; prints the first mismatches, returns how many there are. */
size_t fv_exam_check(const fv_exam_t *e);

/* init, fovea_attend(), check, fini for one mirror; the service's code. *n_bad as fv_exam_check(). */
fovea_code_t fv_exam_run(fovea_client_t *client,
                         fv_mirror_t *m,
                         uint32_t n_tokens,
                         fovea_dtype_t dtype,
                         uint32_t flags,
                         fv_random_t *random,
                         size_t *n_bad,
                         fovea_error_t *error);

#endif /* FV_TESTS_CLIENT_MIRROR_H */
