/*
 * fake_service.h - a service that answers attend requests as the test wants, right or wrong.
 *
 * It stands on the real gRPC door (coord/rpc.h) with nothing behind it, so that the client can be shown
 * answers that a correct service never gives.
 */
#ifndef FV_TESTS_CLIENT_FAKE_SERVICE_H
#define FV_TESTS_CLIENT_FAKE_SERVICE_H

#include "coord/rpc.h"

#include <pthread.h>

typedef enum fv_fake_mode {
    FV_FAKE_ECHO,    /* out = the bytes of q, lse = those of k; timings 1, 2, 3, 4 us */
    FV_FAKE_REVERSE, /* the same, but collects `n_collect` requests and answers the last one first */
    FV_FAKE_HOLD,    /* never answers */
    FV_FAKE_WRONG_ID,   /* answers a request that was never made */
    FV_FAKE_TWICE,      /* answers every request two times */
    FV_FAKE_GARBAGE,    /* answers bytes that are no message */
    FV_FAKE_SHORT,      /* an `out` that is 4 bytes too short */
    FV_FAKE_END_STREAM, /* ends the call: UNAVAILABLE "going away" */
} fv_fake_mode_t;

#define FV_FAKE_HELD_MAX 256

/* One request to be answered later. */
typedef struct fv_fake_held {
    fv_call_t *call;
    uint64_t request_id;
    uint8_t *q, *k;
    size_t q_bytes, k_bytes;
} fv_fake_held_t;

typedef struct fv_fake {
    fv_rpc_t *rpc;
    fv_fake_mode_t mode; /* set while no request is under way */
    int n_collect;
    pthread_mutex_t lock; /* guards what follows */
    fv_fake_held_t held[FV_FAKE_HELD_MAX];
    int n_held, n_requests;
    int n_others;             /* calls that are no attend requests */
    fv_attend_request_t last; /* the last request as decoded */
    fv_attend_item_t last_items[16];
    int64_t last_left_us; /* its deadline - now; INT64_MAX = none */
} fv_fake_t;

/* Listens on `address`, e.g. "unix:/tmp/x". */
FV_MUST_CHECK fv_status_t fv_fake_start(fv_fake_t *fake, const char *address);
void fv_fake_stop(fv_fake_t *fake);
int fv_fake_n_requests(fv_fake_t *fake);

#endif /* FV_TESTS_CLIENT_FAKE_SERVICE_H */
