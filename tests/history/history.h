/*
 * history.h - random clients against the real service, and a small model of it that says what each answer must be.
 *
 *   record.c        the model: what sessions hold, what a request must answer, its attention in fp64
 *   actor.c         a client: many sessions, requests in flight, repeats, forks, cuts, and it vanishes
 *   actor_attend.c  its attend requests, on a stream and alone
 *   killer.c        kills a rank now and then
 */
#ifndef FV_TESTS_HISTORY_HISTORY_H
#define FV_TESTS_HISTORY_HISTORY_H

#include "client/fovea.h"
#include "tests/support/random.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define HS_LAYERS       2
#define HS_Q_HEADS      2
#define HS_DIM          16
#define HS_TOKENS_MAX   160 /* of a layer: three pages */
#define HS_PIECE_MAX    40  /* of an item */
#define HS_ITEMS_MAX    2
#define HS_SESSIONS_MAX 24 /* of an actor */
#define HS_ACTORS_MAX   16

/* ------------------------------------------------------------------ record.c */

/* A token is a number that its K and V are made of. */
typedef struct hs_layer {
    uint32_t n_tokens, n_log;
    uint32_t tokens[HS_TOKENS_MAX];
    struct {
        uint32_t position, n_tokens;
    } log[HS_TOKENS_MAX]; /* appends, which may be repeated */
} hs_layer_t;

typedef struct hs_session {
    bool is_open, is_busy;
    fovea_session_id_t id;
    hs_layer_t layers[HS_LAYERS];
} hs_session_t;

typedef struct hs_item {
    hs_session_t *session;
    uint32_t position, n_tokens;
    uint32_t tokens[HS_PIECE_MAX];
} hs_item_t;

typedef struct hs_request {
    uint32_t layer, n_items, n_tokens;
    bool append, is_unsure; /* it was sent before, and may have been done */
    hs_item_t items[HS_ITEMS_MAX];
    fovea_attend_item_t wire_items[HS_ITEMS_MAX];
    float q[HS_ITEMS_MAX * HS_PIECE_MAX * HS_Q_HEADS * HS_DIM];
    float k[HS_ITEMS_MAX * HS_PIECE_MAX * HS_DIM], v[HS_ITEMS_MAX * HS_PIECE_MAX * HS_DIM];
    float out[HS_ITEMS_MAX * HS_PIECE_MAX * HS_Q_HEADS * HS_DIM];
    float lse[HS_ITEMS_MAX * HS_PIECE_MAX * HS_Q_HEADS];
} hs_request_t;

uint32_t hs_longest(const hs_session_t *s);
void hs_cut(hs_session_t *s, uint32_t position);
/* What an item must answer. */
fovea_code_t hs_expect(const hs_request_t *r, uint32_t item);
/* It has been done: the appends among its items are made. */
void hs_apply(const hs_request_t *r);
/* Whether the answer is the attention over what the sessions hold now, the request's own tokens included. */
bool hs_is_right(const hs_request_t *r);
/* q, k, v and wire items of what `items` say. */
void hs_fill(hs_request_t *r, fv_random_t *random);
fovea_attend_request_t hs_message(hs_request_t *r);

/* ------------------------------------------------------------------ actor.c */

typedef struct hs_world {
    const char *address;
    char model_id[FOVEA_MODEL_ID_BYTES];
    bool has_kills;
    atomic_uint_fast64_t n_left; /* operations */
    atomic_bool has_failed;
    char failure[512]; /* the first one's */
    atomic_uint_fast64_t n_served, n_refused, n_exhausted, n_unsure, n_repeats, n_forks, n_cuts,
        n_cancels, n_vanished, n_unknown;
} hs_world_t;

typedef struct hs_actor {
    hs_world_t *world;
    uint32_t number;
    pthread_t thread;
    fv_random_t random;
    fovea_client_t *client;
    fovea_stream_t *stream;
    uint32_t next_token;
    hs_session_t sessions[HS_SESSIONS_MAX];
    hs_request_t requests[8];
} hs_actor_t;

void *hs_actor_run(void *actor);
void hs_fail(hs_actor_t *a, const char *format, ...) __attribute__((format(printf, 2, 3)));
bool hs_connect(hs_actor_t *a);
/* GetSession until it answers, and its lengths: those of the model, or, of an unsure request, with its append made. */
bool hs_check_session(hs_actor_t *a, hs_session_t *s, const hs_request_t *unsure);
int64_t hs_pick(hs_actor_t *a, int64_t low, int64_t high);
hs_session_t *hs_pick_session(hs_actor_t *a, bool is_open);

/* actor_attend.c: some requests at once; all of them have an answer when it returns. How many operations that was. */
uint32_t hs_attend_some(hs_actor_t *a);

/* ------------------------------------------------------------------ killer.c */

/* Kills one of the ranks that `launcher` (or what it started) has; its rank, or -1. */
int hs_kill_some_rank(pid_t launcher, fv_random_t *random);

#endif /* FV_TESTS_HISTORY_HISTORY_H */
