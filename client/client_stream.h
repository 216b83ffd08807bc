/*
 * client_stream.h - the inside of a stream: its requests, and who drives it.
 *
 * A request's life:   QUEUED  ->  SENT  ->  (LINGERING)  ->  FINISHED
 *   QUEUED     waits until the message before it left (gRPC takes one at a time)
 *   SENT       handed to gRPC
 *   LINGERING  answered, but gRPC has not let go of its tensors yet (seldom, and for microseconds)
 *   FINISHED   in `finished` until collected; with a callback it is freed instead
 *
 * When the call ends because the service is unavailable, another one is opened, and what was sent and not answered is sent again
 * in order: back from SENT to QUEUED. Positions make it harmless.
 *
 * One thread at a time is the driver: it alone takes events from the call, gathers answers and runs
 * callbacks. Whoever waits while there is no driver becomes it; the others sleep on `changed`.
 */
#ifndef FV_CLIENT_CLIENT_STREAM_H
#define FV_CLIENT_CLIENT_STREAM_H

#include "client/client_attend.h"

#include <pthread.h>
#include <sys/queue.h>

typedef enum fv_pending_state {
    FV_PENDING_QUEUED,
    FV_PENDING_SENT,
    FV_PENDING_LINGERING,
    FV_PENDING_FINISHED,
} fv_pending_state_t;

typedef struct fv_pending {
    TAILQ_ENTRY(fv_pending) link; /* in the list of its state; SENT is in none */
    fv_pending_state_t state;
    fovea_done_fn_t done;
    fovea_result_t result;
    fv_attend_target_t target;
    fv_attend_message_t message;
    atomic_uint pins;
} fv_pending_t;

TAILQ_HEAD(fv_pending_list, fv_pending);

#define FV_TICKET_SLOT_BITS 24 /* low bits of a ticket: its slot; the rest counts up from 1 */

struct fovea_stream {
    fovea_client_t *client;
    fv_duplex_t *duplex;
    pthread_mutex_t lock; /* guards everything below; never held while a callback runs */
    pthread_cond_t changed;
    bool is_driven;
    bool is_sending; /* a message is under way */
    bool is_broken;  /* nothing can be sent any more */
    bool is_closed;  /* and everything has finished */
    bool
        is_reopening; /* broken because the service is away: the driver opens another call, until retry_end_us */
    bool is_over;                   /* and nothing of the old one is under way */
    bool is_cancelled;              /* by its owner: not to be opened again */
    int64_t retry_end_us, pause_us; /* 0: the service answered since it was away */
    fovea_error_t broken;           /* why; code OK: the service ended the stream in order */
    fv_pending_t **slots;           /* [n_slots], NULL = free */
    uint32_t n_slots, first_free_hint;
    uint64_t n_submitted;
    uint64_t n_finished; /* ever */
    uint32_t n_in_flight;
    uint32_t n_in_flight_plain; /* of these, without a callback */
    struct fv_pending_list queued, lingering, finished;
    pthread_t thread;
    bool has_thread;
};

/* What a waiter waits for. Called with the lock held. */
typedef bool (*fv_stream_until_fn_t)(const fovea_stream_t *stream, const void *ctx);

/*
 * Drives the stream, or waits for who does, until `until` holds: true. False when deadline_us passed
 * first. Called with the lock held, and returns with it held; it is released in between.
 */
bool fv_stream_drive(fovea_stream_t *stream,
                     fv_stream_until_fn_t until,
                     const void *ctx,
                     int64_t deadline_us);

/* Sends the head of the queue if nothing is under way. Lock held. */
void fv_stream_send_next(fovea_stream_t *stream);

/* Slot of a ticket, NULL when it holds none or another one. Lock held. */
fv_pending_t *fv_stream_find(const fovea_stream_t *stream, uint64_t ticket);

/* Frees the slot and the request. Lock held. */
void fv_stream_release(fovea_stream_t *stream, fv_pending_t *pending);

#endif /* FV_CLIENT_CLIENT_STREAM_H */
