/*
 * rpc_internal.h - what the files behind rpc.h share. Nobody else includes it.
 *
 *   rpc_server.c      life cycle, settings
 *   rpc_loop.c        the threads that take events; "thread: rpc" is whichever of them holds the door's lock
 *   rpc_call.c        one call: replies queued, batches started, status decided
 *   rpc_event.c       one call: matched, read, sent, closed; and the list of all calls
 *   rpc_admit.c       one call: who may make it
 *   rpc_waiting.c     calls whose first message has not come yet
 *   rpc_tls.c         certificates of TCP addresses
 *   rpc_message.c     byte buffers <-> spans and reply pieces
 *   rpc_method.c      the table of methods
 *   rpc_listen.c      addresses, and the lock beside a unix socket
 *   rpc_accept.c      connections of plain addresses: counted, peers looked at
 *   rpc_health.c      grpc.health.v1
 *   rpc_reflection.c  server reflection
 *   rpc_pb.c          protobuf's wire form for the two
 *
 * Locks, outermost first: fv_calls_t.door, fv_health_t.lock, fv_calls_t.lock, fv_call_t.lock. gRPC is entered with at
 * most the first two of them held: it may run release callbacks of any call before it returns.
 */
#ifndef FV_COORD_RPC_INTERNAL_H
#define FV_COORD_RPC_INTERNAL_H

#include "coord/rpc.h"

#include <pthread.h>
#include <stdatomic.h>

/* gRPC's own types stay opaque here, so that only the doors include its headers. */
struct grpc_byte_buffer;
struct grpc_completion_queue;
struct grpc_server;
struct grpc_server_credentials;

/* ------------------------------------------------------------------ methods */

typedef enum fv_call_kind {
    FV_CALL_UNARY,
    FV_CALL_BIDI, /* each message answered once; read while fewer than the limit are unsent */
    FV_CALL_SERVER_STREAM /* one message in, many out; a newer reply replaces one not yet sent */
} fv_call_kind_t;

/* Methods after FV_METHOD_COUNT are answered inside the door. */
enum {
    FV_METHOD_HEALTH_CHECK = FV_METHOD_COUNT,
    FV_METHOD_HEALTH_WATCH,
    FV_METHOD_REFLECTION_V1,
    FV_METHOD_REFLECTION_V1ALPHA,
    FV_METHOD_END
};

/* Who may call it. */
typedef enum fv_access {
    FV_ACCESS_ANYBODY, /* no token needed */
    FV_ACCESS_STATUS,  /* with a token; does not count for quotas */
    FV_ACCESS_USER,    /* with a token; counts for quotas of requests */
    FV_ACCESS_FREE,    /* with a token; does not count: it gives something back */
    FV_ACCESS_ADMIN,
} fv_access_t;

typedef struct fv_method_info {
    const char *path; /* "/fovea.v1.Attention/Attend" */
    int method;
    fv_call_kind_t kind;
    fv_access_t access;
} fv_method_info_t;

/* NULL when unknown. `path` need not be NUL-terminated. Thread: any. */
const fv_method_info_t *fv_method_find(const char *path, size_t n_chars);

/* ------------------------------------------------------------------ health, reflection */

#define FV_HEALTH_WATCHERS_MAX 4096 /* the most that health_calls_max allows */

typedef struct fv_health {
    pthread_mutex_t lock;
    bool is_serving;
    size_t n_watchers;
    fv_call_t *watchers[FV_HEALTH_WATCHERS_MAX]; /* each with a reference */
} fv_health_t;

void fv_health_init(fv_health_t *health);
void fv_health_fini(fv_health_t *health); /* every call is over */
void fv_health_set_serving(fv_health_t *health, bool is_serving);
/* Check and Watch. Thread: rpc. */
void fv_health_message(fv_health_t *health, fv_call_t *call, bool is_watch, fv_span_t request);
void fv_health_closed(fv_health_t *health, fv_call_t *call);

/* A serialized FileDescriptorSet of the APIs that the door answers itself; written at build time. */
extern const uint8_t fv_rpc_descriptor_set[];
extern const size_t fv_rpc_descriptor_set_bytes;

/* One ServerReflectionRequest. Thread: rpc. */
void fv_reflection_message(fv_call_t *call, fv_span_t request);

/* ------------------------------------------------------------------ addresses */

#define FV_ADDRESS_BYTES       256
#define FV_LISTEN_FDS_MAX      8
#define FV_CONNECTIONS_DEFAULT 4096

typedef struct fv_listen {
    char address[FV_ADDRESS_BYTES]; /* as given, then as bound */
    bool is_unix;
    int lock_fd; /* unix: held while the server lives; -1 otherwise */
    char lock_path[FV_ADDRESS_BYTES];
    int fds
        [FV_LISTEN_FDS_MAX]; /* [n_fds] ours, not gRPC's: one for each address that the host's name has */
    int n_fds;
} fv_listen_t;

/*
 * Checks the form of `address`; for a unix socket takes the lock beside it and removes a stale socket.
 * Errors: FV_ERR_INVALID_ARG for its form; FV_ERR_UNAVAILABLE when another server has it.
 */
FV_MUST_CHECK fv_status_t fv_listen_prepare(const char *address, fv_listen_t *out);
/* Reached from this host alone: a unix socket, 127.x.x.x, [::1], localhost. */
bool fv_listen_is_local(const fv_listen_t *listen);
/* After the bind: puts the port in place of 0. */
void fv_listen_set_port(fv_listen_t *listen, int port);
/* Closes its sockets and removes a unix socket: nobody connects any more. The lock stays. */
void fv_listen_close(fv_listen_t *listen);
/* That, and gives up the lock. */
void fv_listen_release(fv_listen_t *listen);

/* Binds and listens at a prepared plain address; the port in place of 0. Errors: FV_ERR_UNAVAILABLE. */
FV_MUST_CHECK fv_status_t fv_listen_bind(fv_listen_t *listen, int32_t unix_mode);

typedef struct fv_acceptor fv_acceptor_t;

/* Starts the thread that accepts at whatever of `listen` is bound (borrowed), and hands connections to the server. */
FV_MUST_CHECK fv_status_t fv_acceptor_start(const fv_rpc_config_t *config,
                                            fv_listen_t *listen,
                                            int32_t n_listen,
                                            struct grpc_server *server,
                                            fv_acceptor_t **out);
/* Accepts no more. Before the server is shut down. NULL is fine. */
void fv_acceptor_stop(fv_acceptor_t *acceptor);

/* ------------------------------------------------------------------ TLS */

#define FV_TLS_PATH_BYTES 512

typedef struct fv_tls fv_tls_t;

/* Reads and checks the configured files. Errors: FV_ERR_INVALID_ARG naming key and file. */
FV_MUST_CHECK fv_status_t fv_tls_create(const fv_rpc_config_t *config, fv_tls_t **out);
/* Of one listening address; they ask `tls` at every handshake, so it must outlive the server. */
struct grpc_server_credentials *fv_tls_credentials(fv_tls_t *tls);
void fv_tls_destroy(fv_tls_t *tls); /* NULL is fine */

/* ------------------------------------------------------------------ messages */

/* The spans of one received message; grown as needed. Thread: rpc. */
typedef struct fv_span_list {
    fv_span_t *spans;
    size_t n_spans;
    size_t cap;
} fv_span_list_t;

/* Points `out` at the slices of `message`. Errors: FV_ERR_NO_MEMORY. */
FV_MUST_CHECK fv_status_t fv_message_spans(struct grpc_byte_buffer *message, fv_span_list_t *out);
/* Takes the pieces: each release runs when gRPC lets go of its slice. */
struct grpc_byte_buffer *fv_message_create(const fv_reply_piece_t *pieces, size_t n_pieces);
/* Releases pieces that will not be sent. */
void fv_message_release_pieces(const fv_reply_piece_t *pieces, size_t n_pieces);

/* ------------------------------------------------------------------ calls */

/* Every call of one door, and what they share. */
typedef struct fv_calls {
    const fv_rpc_handlers_t *handlers;
    int32_t stream_inflight_max;
    int32_t calls_max;        /* 0 = no limit */
    int32_t health_calls_max; /* 0 = no limit */
    int64_t first_message_us; /* 0 = no limit */
    fv_auth_t *auth;          /* NULL: nobody is asked */
    struct grpc_server *server;
    struct grpc_completion_queue *queue;
    fv_health_t *health;
    fv_span_list_t spans;   /* thread: rpc; lent to the message that is delivered */
    pthread_mutex_t door;   /* held by whoever handles an event */
    pthread_cond_t is_busy; /* wakes the second thread */
    uint32_t n_aside;       /* messages copied without the lock; guarded by it, as the next is */
    int64_t busy_until_us;  /* when the second thread leaves, once there are none */
    atomic_bool is_stopping;
    size_t n_health;          /* thread: rpc; of n_live */
    fv_call_t *waiting_first; /* thread: rpc; calls without a message, the longest wait first */
    fv_call_t *waiting_last;
    uint64_t n_refused; /* thread: rpc; since the last line in the log */
    int64_t refused_logged_us;

    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t idle;  /* signalled when n_live + n_requests falls to 0 */
    fv_call_t *live;      /* matched calls whose gRPC call still exists */
    size_t n_live;
    size_t n_requests; /* asked of gRPC, not yet returned */
} fv_calls_t;

void fv_calls_init(fv_calls_t *calls);
void fv_calls_fini(fv_calls_t *calls);
/* Asks gRPC for the first calls; n_requests was 1 until now, so that no stop overtakes it. Thread: rpc. */
void fv_calls_begin(fv_calls_t *calls, size_t n_requests);
/* One event of the completion queue. Thread: rpc. */
void fv_calls_on_event(void *tag, bool is_ok);
/* New calls are refused from here on, streams end as soon as nothing of theirs is under way. */
void fv_calls_stop(fv_calls_t *calls);
/* Ends the calls that have waited too long for their first message. Microseconds until it must be asked again, INT64_MAX when
 * none waits. Thread: rpc. */
int64_t fv_waiting_expire(fv_calls_t *calls);
/* Blocks until no call and no request is left. The server must have been shut down. */
void fv_calls_wait_idle(fv_calls_t *calls);

/* ------------------------------------------------------------------ threads */

typedef struct fv_loop {
    fv_calls_t *calls;
    pthread_t thread, helper;
    bool is_running, has_helper;
    bool is_ending; /* guarded by the door's lock */
} fv_loop_t;

/* Starts taking events of calls->queue. Errors: FV_ERR_SYSTEM. */
FV_MUST_CHECK fv_status_t fv_loop_start(fv_loop_t *loop, fv_calls_t *calls);
/* After the queue's shutdown. */
void fv_loop_join(fv_loop_t *loop);

#endif /* FV_COORD_RPC_INTERNAL_H */
