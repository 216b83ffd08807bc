/*
 * echo_server.h - a gRPC door whose handler sends every message back, and counts.
 *
 * Each reply is a copied head of up to 5 bytes and the rest by reference, with a release that is counted:
 * at the end n_released must equal n_referenced, whatever became of the calls.
 */
#ifndef FV_TESTS_RPC_ECHO_SERVER_H
#define FV_TESTS_RPC_ECHO_SERVER_H

#include "coord/rpc.h"

#include <pthread.h>

#define ECHO_MESSAGE_MAX  (17U << 20U)
#define ECHO_INFLIGHT_MAX 4

typedef enum fv_echo_mode {
    FV_ECHO_AT_ONCE, /* on the rpc thread, inside on_message */
    FV_ECHO_WORKER,  /* by another thread */
    FV_ECHO_HOLD     /* when the test says so */
} fv_echo_mode_t;

typedef struct fv_echo_message fv_echo_message_t;

typedef struct fv_echo {
    fv_rpc_t *rpc;
    pthread_t worker;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t changed;
    fv_echo_mode_t mode;
    bool is_stopping;
    fv_echo_message_t *first, *last; /* delivered, not yet answered */
    int64_t n_delivered, n_answered, n_referenced, n_released, n_closed;
    int64_t n_unanswered_max;   /* the most that were delivered and not answered at a time */
    int64_t n_live, n_live_max; /* replies by reference that gRPC holds */
    int64_t aside_until; /* a message of FV_CALL_ASIDE_BYTES is aside until so many are delivered */
    int64_t n_aside, n_aside_in_vain; /* such messages; those that waited 20 s for that */
    int64_t last_left_us;             /* deadline - received of the last message */
    fv_method_t last_method;
} fv_echo_t;

/* `address` e.g. "127.0.0.1:0". */
void fv_echo_start(fv_echo_t *echo, const char *address, fv_echo_mode_t mode);
/* With a config that began as fv_echo_config(). */
void fv_echo_start_with(fv_echo_t *echo, const fv_rpc_config_t *config, fv_echo_mode_t mode);
/* Stops and checks that each reference was released once and each call closed. */
void fv_echo_stop(fv_echo_t *echo, uint32_t grace_ms);
fv_rpc_config_t fv_echo_config(const char *address);
void fv_echo_set_mode(fv_echo_t *echo, fv_echo_mode_t mode);
/* Answers everything held now. */
void fv_echo_answer_held(fv_echo_t *echo);
/* Takes the oldest held call out without answering; the caller unrefs it. NULL when none. */
fv_call_t *fv_echo_take(fv_echo_t *echo);
/* True when a call is held and it is over. */
bool fv_echo_first_is_closed(fv_echo_t *echo);
/* Blocks until the counter reaches `value`; false after 20 s. */
bool fv_echo_wait(fv_echo_t *echo, const int64_t *counter, int64_t value);
int64_t fv_echo_read(fv_echo_t *echo, const int64_t *counter);

#endif /* FV_TESTS_RPC_ECHO_SERVER_H */
