/*
 * rpc.h - the gRPC door: bytes in, bytes out, nothing of what they mean.
 *
 * Decode path: stations 1 and 10 of 10. After station 1: coord/engine_inbox.c. Before station 10: coord/engine_reply.c.
 *
 * Behind it stands gRPC C core (rpc_server.c: life cycle and completion-queue loop; rpc_event.c and rpc_call.c: the
 * state machine of one call). Health (grpc.health.v1) and server reflection (v1 and v1alpha) are answered inside the door.
 *
 * Calls. A call is one RPC. Every message delivered by on_message is answered by exactly one
 * fv_call_reply() (or, for a unary call, fv_call_fail()), from any thread, in any order. WatchStatus is
 * delivered once and may be answered many times, then finished.
 * A call is reference-counted: on_message lends it; whoever keeps it takes fv_call_ref().
 * Replies to a call that is gone release their pieces and are otherwise ignored.
 *
 * Admission. With `auth` a call is admitted by its metadata, before any message of it is read (rpc_admit.c), and a stream's
 * token is looked at again for every message. Health is open to everybody, Drain to admins.
 *
 * A call whose first message does not come within `first_message_ms` ends with DEADLINE_EXCEEDED, so that calls that ask for nothing
 * do not fill `calls_max`. An Attend stream may be silent: before its first message as between two of them.
 *
 * Backpressure. A stream with `stream_inflight_max` messages delivered but not yet answered and sent reads no further
 * message, so a slow reader stops its own sending; gRPC's flow control and resource quota bound the rest.
 */
#ifndef FV_COORD_RPC_H
#define FV_COORD_RPC_H

#include "common/status.h"
#include "coord/auth.h"
#include "proto/wire.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct fv_rpc fv_rpc_t;
typedef struct fv_call fv_call_t;

typedef enum fv_method {
    FV_METHOD_REGISTER_MODEL,
    FV_METHOD_OPEN_SESSION,
    FV_METHOD_FORK_SESSION,
    FV_METHOD_TRUNCATE_SESSION,
    FV_METHOD_CLOSE_SESSION,
    FV_METHOD_GET_SESSION,
    FV_METHOD_LIST_SESSIONS,
    FV_METHOD_ATTEND, /* bidirectional stream */
    FV_METHOD_ATTEND_ONCE,
    FV_METHOD_GET_STATUS,
    FV_METHOD_GET_PLACEMENT,
    FV_METHOD_WATCH_STATUS, /* server stream */
    FV_METHOD_DRAIN,
    FV_METHOD_COUNT
} fv_method_t;

#define FV_LISTEN_MAX 8

/* Whose processes may connect to unix sockets. */
typedef enum fv_unix_peers {
    FV_UNIX_PEERS_ANY = 0, /* whom the file mode lets */
    FV_UNIX_PEERS_USER,    /* our user's, and root's */
    FV_UNIX_PEERS_GROUP,   /* and those in our group */
} fv_unix_peers_t;

typedef struct fv_rpc_config {
    const char *listen[FV_LISTEN_MAX]; /* "host:port", port 0 = any free; "unix:/path" */
    int32_t n_listen;
    size_t message_bytes_max;       /* of one message; over it: RESOURCE_EXHAUSTED */
    int32_t stream_inflight_max;    /* messages of one Attend stream not yet answered and sent */
    int32_t connection_streams_max; /* concurrent calls per connection */
    size_t memory_bytes_max;        /* gRPC resource quota */
    int32_t calls_max;              /* open at once, over it: RESOURCE_EXHAUSTED; 0 = no limit */
    int32_t health_calls_max;       /* of health, not counted in calls_max; 0 = no limit */
    int32_t
        first_message_ms; /* a call other than Attend waits so long for its message; 0 = for ever */
    int32_t connections_max; /* open at once; a further one is closed; 0 = 4096 */
    int32_t unix_mode;       /* file mode of unix sockets; 0 = as the umask has it */
    fv_unix_peers_t unix_peers;
    size_t metadata_bytes_max;      /* of one call; over it: RESOURCE_EXHAUSTED; 0 = gRPC's 8 KiB */
    const char *tls_cert, *tls_key; /* PEM files: TLS on every TCP address; NULL or "" = none */
    const char *tls_client_ca;      /* PEM file: client certificates are required */
    bool
        may_be_open; /* TCP addresses beyond loopback although there is neither TLS nor a token file */
    fv_auth_t *auth; /* NULL = nobody is asked who they are; outlives the door */
} fv_rpc_config_t;

typedef struct fv_rpc_handlers {
    void *ctx;
    /*
     * A message arrived. `spans` are borrowed until return. deadline_us, received_us: CLOCK_MONOTONIC
     * microseconds, deadline INT64_MAX when there is none. Thread: rpc; must not block.
     */
    void (*on_message)(void *ctx,
                       fv_call_t *call,
                       fv_method_t method,
                       const fv_span_t *spans,
                       size_t n_spans,
                       int64_t received_us,
                       int64_t deadline_us);
    /* The call is over (cancelled, client gone, finished): once per call that saw on_message. Thread: rpc. */
    void (*on_closed)(void *ctx, fv_call_t *call);
    /*
     * May be NULL. While wants_idle() says true, on_idle() is called as soon as no further event is ready (and after some
     * events at the latest): the moment to serve on this thread, together, what came in. Thread: rpc.
     */
    bool (*wants_idle)(void *ctx);
    void (*on_idle)(void *ctx);
} fv_rpc_handlers_t;

/*
 * Binds every address and starts the rpc thread, with all signals blocked in it and in gRPC's own threads.
 * Health says NOT_SERVING until fv_rpc_set_serving(). Sets malloc's thresholds for the whole process.
 * Errors: FV_ERR_UNAVAILABLE naming the address; FV_ERR_INVALID_ARG for a bad address or limit.
 */
FV_MUST_CHECK fv_status_t fv_rpc_start(const fv_rpc_config_t *config,
                                       const fv_rpc_handlers_t *handlers,
                                       fv_rpc_t **out);

/* Addresses as bound (port 0 resolved), e.g. "127.0.0.1:7411". */
int32_t fv_rpc_n_addresses(const fv_rpc_t *rpc);
const char *fv_rpc_address(const fv_rpc_t *rpc, int32_t i);

bool fv_rpc_address_has_tls(const fv_rpc_t *rpc, int32_t i);

/* What health answers: SERVING or NOT_SERVING, for "" and each service's name; watchers are told. */
void fv_rpc_set_serving(fv_rpc_t *rpc, bool is_serving);

/*
 * Refuses new calls (UNAVAILABLE), waits up to grace_ms for those under way, cancels the rest, joins the thread.
 * A stream ends (UNAVAILABLE) as soon as what it delivered is answered and sent. Health says NOT_SERVING.
 * Replies may still come from other threads until it returns, and are ignored. Then fv_rpc_destroy() frees
 * it; after that only fv_call_unref() and fv_call_end_request() may be called.
 */
void fv_rpc_stop(fv_rpc_t *rpc, uint32_t grace_ms);
void fv_rpc_destroy(fv_rpc_t *rpc); /* NULL is fine */

/* ------------------------------------------------------------------ calls; any thread */

void fv_call_ref(fv_call_t *call);
void fv_call_unref(fv_call_t *call);

/*
 * Within on_message() alone: what is done between the two may take long, others' events are handled meanwhile, and other calls' messages
 * delivered; the spans stay, and the call's next message waits. For messages of FV_CALL_ASIDE_BYTES and more.
 */
#define FV_CALL_ASIDE_BYTES ((size_t)256 << 10)
void fv_call_step_aside(fv_call_t *call);
void fv_call_step_back(fv_call_t *call);

bool fv_call_is_closed(const fv_call_t *call);
fv_method_t fv_call_method(const fv_call_t *call);
/* Who called; NULL when nobody is asked. Lives as long as the fv_auth_t. */
fv_principal_t *fv_call_principal(const fv_call_t *call);
/* Whether the caller's token still holds. Errors: FV_ERR_UNAUTHENTICATED. */
FV_MUST_CHECK fv_status_t fv_call_recheck(const fv_call_t *call);
/*
 * A request of the caller's that fv_principal_begin_request() let in is about to be answered, or is given up: it counts as in flight
 * until the next reply to the call is gRPC's to send, which takes one at a time (of a unary call: until it is over). Before the reply, because the caller's next
 * request may come in before fv_call_reply() returns. Closed calls, and after fv_rpc_destroy(): at once.
 */
void fv_call_end_request(fv_call_t *call);
/* A word for the handler's own use, 0 at first. */
void *fv_call_user(const fv_call_t *call);
void fv_call_set_user(fv_call_t *call, void *user);

/*
 * A piece of a reply message. release == NULL: at most a few hundred bytes, copied before return.
 * Else: not copied; release(arg) runs once, on any thread, when gRPC no longer reads it: perhaps before
 * fv_call_reply() returns, perhaps inside a call of this header for another RPC. So release must not block,
 * and whoever calls into this header must not hold a lock that a release takes. All have run when
 * fv_rpc_destroy() returns.
 */
typedef struct fv_reply_piece {
    const void *data;
    size_t n_bytes;
    void (*release)(void *arg);
    void *arg;
} fv_reply_piece_t;

/*
 * Sends one message: the concatenation of the pieces. A unary call thereby ends with OK. Of a WatchStatus at
 * most one reply waits to be sent: a newer one takes its place, so a slow watcher sees the newest.
 */
void fv_call_reply(fv_call_t *call, const fv_reply_piece_t *pieces, size_t n_pieces);
/*
 * Ends the call with a gRPC status code and text: unary instead of a reply; a stream after its queued messages.
 * The first end counts; replies that come after it are released and dropped.
 */
void fv_call_fail(fv_call_t *call, int32_t grpc_code, const char *message);

#endif /* FV_COORD_RPC_H */
