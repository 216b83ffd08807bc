/*
 * rpc_call.h - one call as rpc_call.c (what it sends) and rpc_event.c (what happens to it) see it.
 *
 *   request -> matched -> [read, deliver, reply, send]* -> status sent -> closed -> buried
 *
 * - One batch of each kind (read, send, close) is outstanding at most; the flags is_reading and
 *   is_sending are taken under the lock, the batch is started outside it: gRPC may run release
 *   callbacks (the engine's locks) before grpc_call_start_batch() returns.
 * - Each outstanding batch holds a reference, so a tag's memory outlives its completion.
 * - The close batch is posted at once: it is how a cancellation, a deadline or a lost client shows.
 * - Buried: closed and no batch outstanding. Then the gRPC call is given back, whoever still holds a
 *   reference to ours.
 */
#ifndef FV_COORD_RPC_CALL_H
#define FV_COORD_RPC_CALL_H

#include "coord/rpc_internal.h"

#include <grpc/byte_buffer.h>
#include <grpc/grpc.h>
#include <grpc/slice.h>

typedef enum fv_tag_kind {
    FV_TAG_REQUEST,
    FV_TAG_CLOSE,
    FV_TAG_READ,
    FV_TAG_SEND
} fv_tag_kind_t;

typedef struct fv_tag {
    fv_call_t *call;
    fv_tag_kind_t kind;
} fv_tag_t;

/* A reply that waits for its turn, or is being sent. */
typedef struct fv_outgoing {
    struct fv_outgoing *next;
    grpc_byte_buffer *message;
    fv_principal_t *principal; /* whose n_ends requests end with it */
    uint32_t n_ends;
} fv_outgoing_t;

struct fv_call {
    fv_calls_t *calls; /* not touched once the call is closed, but by the rpc thread */
    atomic_uint n_refs;
    atomic_bool is_closed;
    _Atomic(void *) user;
    const fv_method_info_t *method; /* NULL: unknown */
    fv_grant_t *grant;              /* one reference; NULL: nobody was asked, or refused */
    int64_t deadline_us;
    fv_tag_t tag_request, tag_close, tag_read, tag_send;

    /* filled by gRPC */
    grpc_call *call;
    grpc_call_details details;
    grpc_metadata_array metadata;
    grpc_byte_buffer *received;
    int was_cancelled;

    bool was_delivered; /* thread: rpc */
    bool is_waiting;    /* thread: rpc, and what follows: for its first message */
    int64_t waits_until_us;
    fv_call_t *waiting_prev;
    fv_call_t *waiting_next;
    fv_call_t *prev; /* guarded by calls->lock */
    fv_call_t *next;

    pthread_mutex_t lock; /* guards what follows */
    uint32_t n_batches;
    uint32_t n_ends; /* requests of its principal that end with the next reply, or with the call */
    int32_t n_inflight; /* BIDI: delivered, not yet answered and sent */
    bool has_read;      /* a read was posted at least once */
    bool is_reading;
    bool is_delivering; /* its handler has a message of it, perhaps aside */
    bool is_half_closed;
    bool is_refusing; /* a message was dropped because the service stops */
    bool is_sending;
    bool has_sent_head; /* initial metadata */
    bool is_ending;     /* the status is decided; sent after what is queued */
    bool has_sent_status;
    int32_t end_code;
    char end_text[FV_ERROR_TEXT_BYTES];
    fv_outgoing_t *first;
    fv_outgoing_t *last;
    fv_outgoing_t *sending;
};

/* NULL when out of memory. One reference. */
fv_call_t *fv_call_create(fv_calls_t *calls);
/* Posts the close batch. Thread: rpc. */
void fv_call_start_close(fv_call_t *call);
/* Whether it may be made at all, from its metadata. Errors: what to refuse it with. Thread: rpc. */
FV_MUST_CHECK fv_status_t fv_call_admit(fv_call_t *call);
/* Its message, the spans of which are at hand, is paid for by its principal. Thread: rpc. */
void fv_call_charge(const fv_call_t *call, int64_t now_us);
/* grpc.health.v1: has a limit of its own. */
bool fv_call_is_health(const fv_call_t *call);
/* Its first message is expected from now on; it has come, or the call is over (again: nothing). Thread: rpc. */
void fv_waiting_add(fv_call_t *call);
void fv_waiting_remove(fv_call_t *call);
/* Decides the status, unless it is decided. Lock held. */
void fv_call_end(fv_call_t *call, int32_t code, const char *text);
/* Starts whatever the state allows now. Thread: any; no lock held. */
void fv_call_pump(fv_call_t *call);
/* n requests in flight fewer. */
void fv_requests_end(fv_principal_t *principal, uint32_t n);
/* Frees a list of replies; their release callbacks run. No lock held. */
void fv_outgoing_drop(fv_outgoing_t *list);

#endif /* FV_COORD_RPC_CALL_H */
