/*
 * engine_internal.h - the engine's state, shared by engine.c (loop), engine_inbox.c (rpc thread's side),
 * engine_pipeline.c (the order of steps), engine_step.c (a step), engine_command.c (the small RPCs) and engine_view.c
 * (status and placement).
 */
#ifndef FV_COORD_ENGINE_INTERNAL_H
#define FV_COORD_ENGINE_INTERNAL_H

#include "coord/dispatch.h"
#include "coord/engine.h"
#include "coord/lost.h"
#include "coord/staging.h"

#include <pthread.h>
#include <stdatomic.h>

/* What waits in the inbox: a small RPC with its message, or an attend job. One staging buffer each. */
typedef struct fv_entry {
    struct fv_entry *next;
    fv_call_t *call; /* one reference held */
    fv_method_t method;
    size_t n_bytes;    /* small RPC: its message follows the entry */
    bool is_counted;   /* among its principal's requests in flight */
    bool is_abandoned; /* messages given up may still read it: never reused */
} fv_entry_t;

/* An AttendRequest in staging: this struct, its item arrays, then q, k, v, each aligned. */
typedef struct fv_job {
    fv_entry_t entry;
    fv_request_t request;
    fv_staging_t *staging;
    fv_ledger_t *ledger; /* the engine's */
    fv_tensors_t tensors;
    /* tensors.out and tensors.lse are staging buffers of their own: gRPC gives each back when sent. */
    size_t out_bytes, lse_bytes;
    fv_timings_t timings;
    /* of the pieces before the step that added to the timings last */
    uint64_t timed_step;
    uint32_t compute_us_before, exchange_us_before;
    uint32_t n_repeats; /* steps it was in when a rank was lost */
} fv_job_t;

/* One WatchStatus call. The door keeps at most one unsent message: a slow reader sees the newest state. */
typedef struct fv_watcher {
    struct fv_watcher *next;
    fv_call_t *call; /* one reference held */
    int64_t due_us, interval_us;
} fv_watcher_t;

/* An Attend stream that sessions end with. */
typedef struct fv_stream {
    struct fv_stream *next, *prev;
    fv_call_t *call; /* one reference held; its user word points back */
    fv_session_list_t sessions;
} fv_stream_t;

typedef struct fv_rank_stats {
    uint64_t n_steps, busy_us;
} fv_rank_stats_t;

/* A step under way, from its forming to its commit. */
typedef struct fv_flight {
    fv_step_plan_t plan;
    fv_dispatch_t *dispatch;
    bool is_begun; /* the other ranks have been told */
    enum {
        FV_LOCAL_NONE, /* no share of our own, or it is done */
        FV_LOCAL_WAITS,
        FV_LOCAL_RUNS,
    } local;
    bool
        is_rank_idle; /* a rank has done its share, and has nothing left to do unless a next step comes */
    bool has_failed; /* a request failed on a rank: it must be undone */
    bool is_timed;   /* queue_us is noted */
    int64_t begun_us;
    bool is_prefetched; /* our own device was told where its tensors are */
    bool *is_rank_done; /* [n_ranks] */
    size_t n_left;      /* other ranks that have not answered */
} fv_flight_t;

struct fv_engine {
    fv_engine_config_t config;
    fv_ctl_hello_t *hellos; /* [n_ranks] */
    fv_sched_t *sched;
    fv_staging_t *staging;
    fv_rpc_t *rpc;

    _Atomic(fv_entry_t *) inbox; /* a stack; the engine takes all of it and turns it round */
    atomic_bool is_asleep;       /* the engine's thread is in, or on its way into, poll() */
    atomic_bool is_closed;       /* nothing is accepted any more */
    int wake_fd;
    /*
     * Whoever holds it is the engine: its own thread, or for small requests on a single rank the rpc thread, which saves
     * the hand-over (engine_inbox.c). Guards everything below and the scheduler core.
     */
    pthread_mutex_t turn;
    fv_error_t
        broken; /* what ended a turn taken by the rpc thread; the engine's thread ends the service */
    bool
        wants_own_thread; /* a turn left something that only the engine's thread does: timers, drain, the end */

    /* rpc thread only: small requests that wait for its idle moment, and how many in a row came alone */
    uint32_t n_deferred, n_lone;
    uint64_t deferred_pairs; /* their work together */
    int64_t served_us;
    fv_attend_item_t *scan_items; /* rpc thread: scratch of FV_ITEMS_MAX */

    fv_watcher_t *watchers;
    fv_stream_t *streams;
    bool has_ended_streams; /* some of them are over, and nobody has said so */
    int64_t orphans_due_us; /* when sessions without their streams are closed; 0: there are none */
    int64_t sweep_due_us;   /* when idle sessions are looked for again */
    fv_call_t *drain_call;  /* to be answered when drained */
    bool is_draining;
    int stop_signal; /* that began it; 0: the Drain call */
    int64_t drain_deadline_us;
    uint64_t n_done_at_drain;

    /* engine_pipeline.c */
    fv_flight_t flights[FV_STEP_DEPTH]; /* by slot */
    uint32_t first_slot, n_flights;     /* oldest first from first_slot on */
    uint32_t depth; /* steps under way at most: 1 where a second gains nothing */
    fv_entry_t *commands, **commands_tail; /* wait until nothing is under way */
    fv_entry_t
        *held; /* of those, for sessions whose request is half-way: until some request has ended */
    bool has_held_streams;                 /* that are over: likewise */
    int64_t settled_us;                    /* when a step ended last */
    fv_request_t *answers, **answers_tail; /* committed, to be answered */
    bool may_form;                         /* something changed since the last forming */
    bool is_looking;                       /* fv_engine_look() is running */
    fv_error_t look_error;                 /* of a look while our own share was running */
    int64_t turn_end_us, progress_us;
    uint64_t n_steps_ahead; /* begun while another was under way */

    /* engine_repair.c */
    struct {
        bool is_set, has_placement;
        fv_ctl_type_t type;
        fv_placement_t placement;
        size_t n_bytes;
        union {
            fv_ctl_model_t model;
            fv_ctl_open_t open;
            fv_ctl_fork_t fork;
            fv_ctl_truncate_t truncate;
            fv_ctl_close_t close;
        } body;
    } broken_command; /* that some ranks may have, and others not */
    fv_lost_t *lost;  /* sessions that were lost with a rank */
    uint64_t n_repairs;

    int64_t start_us;
    uint64_t n_running, n_done, n_failed, n_steps;
    fv_rank_stats_t *rank_stats; /* [n_ranks] */
};

/* engine_inbox.c */
void fv_engine_on_message(void *ctx,
                          fv_call_t *call,
                          fv_method_t method,
                          const fv_span_t *spans,
                          size_t n_spans,
                          int64_t received_us,
                          int64_t deadline_us);
bool fv_engine_wants_idle(void *ctx);
void fv_engine_on_idle(void *ctx);
void fv_engine_on_closed(void *ctx, fv_call_t *call);
fv_entry_t *fv_engine_take_inbox(fv_engine_t *engine); /* oldest first, NULL when empty */
/* It is about to be answered; nothing the second time. */
void fv_entry_end_request(fv_entry_t *entry);
void fv_entry_release(fv_entry_t *entry);
void fv_job_release(fv_job_t *job);
static inline fv_job_t *fv_job_of(fv_request_t *request)
{
    return (fv_job_t *)request->user;
}

/* engine_reply.c */
void fv_reply_bytes(fv_call_t *call, fv_bytes_t *bytes);  /* takes bytes */
void fv_reply_error(fv_call_t *call, fv_status_t status); /* with this thread's error text */
/* Answers an attend job with its results or its error, and releases it. */
void fv_reply_job(fv_engine_t *engine, fv_job_t *job, int64_t now_us);
/* Answers an attend request that never became a job. */
void fv_reply_refused(fv_call_t *call, fv_method_t method, uint64_t request_id, fv_status_t status);

/* engine_step.c: the scheduler's prepare hook. */
FV_MUST_CHECK fv_status_t fv_engine_prepare(fv_request_t *request);

/* engine_step.c: the stages of a step. An error ends the service. */
fv_flight_t *fv_engine_flight(fv_engine_t *engine, uint32_t i); /* i-th oldest */
/* Forms the next step of what waits; refusals go to the answers. Nothing is told to ranks yet. */
void fv_engine_form(fv_engine_t *engine);
FV_MUST_CHECK fv_status_t fv_engine_begin(fv_engine_t *engine, fv_flight_t *flight);
FV_MUST_CHECK fv_status_t fv_engine_run_local(fv_engine_t *engine, fv_flight_t *flight);
/* Takes what the other ranks have answered by now. */
FV_MUST_CHECK fv_status_t fv_engine_collect(fv_engine_t *engine, fv_flight_t *flight);
bool fv_engine_is_complete(const fv_flight_t *flight);
/* Undoes what failed, commits the rest; all of the oldest step goes to the answers. */
FV_MUST_CHECK fv_status_t fv_engine_settle(fv_engine_t *engine);
void fv_engine_note_queue_times(fv_flight_t *flight, int64_t now_us);
void fv_engine_answer(fv_engine_t *engine); /* sends what is in the answers */
/* Everything under way is answered with UNAVAILABLE. */
void fv_engine_fail_steps(fv_engine_t *engine, fv_status_t status);

/* engine_pipeline.c */
FV_MUST_CHECK fv_status_t fv_engine_init_pipeline(fv_engine_t *engine);
/* Commands and steps until nothing waits, or for half a second. The turn is held. An error ends the service. */
FV_MUST_CHECK fv_status_t fv_engine_work(fv_engine_t *engine);
bool fv_engine_has_work(const fv_engine_t *engine); /* left by fv_engine_work() */

/* engine_command.c: would it change a session between two pieces of a request? */
bool fv_engine_must_hold(const fv_engine_t *engine, const fv_entry_t *entry);
/* engine_command.c: answers one small RPC. An error ends the service. */
FV_MUST_CHECK fv_status_t fv_engine_command(fv_engine_t *engine, fv_entry_t *entry);
/* Sends a command to the ranks of a placement (NULL: all) and waits for their DONE. */
FV_MUST_CHECK fv_status_t fv_engine_broadcast(fv_engine_t *engine,
                                              const fv_placement_t *placement,
                                              fv_ctl_type_t type,
                                              const void *body,
                                              size_t n_bytes,
                                              fv_error_t *out_refusal);

/* engine_step.c: what waited for a request that was half-way is looked at again. */
void fv_engine_release_held(fv_engine_t *engine);

/* engine_repair.c: notes a command that not every rank may have had, because one is gone. */
void fv_engine_note_broken_command(fv_engine_t *engine,
                                   const fv_placement_t *placement,
                                   fv_ctl_type_t type,
                                   const void *body,
                                   size_t n_bytes);
/*
 * A rank was lost: a spare takes its place, what was under way is done again. False: it can not be, the service must end; what
 * was under way is answered. The turn is not held.
 */
bool fv_engine_repair(fv_engine_t *engine);
/* An error of a request or command on a session that was lost says so. */
void fv_engine_explain_loss(const fv_engine_t *engine,
                            const fv_principal_t *who,
                            const fv_session_id_t *id,
                            fv_error_t *error);

/* engine_recover.c: a rank is new, and may have what its slot's store holds: it is told what to keep, the rest is lost. */
FV_MUST_CHECK fv_status_t fv_engine_recover_rank(fv_engine_t *engine, uint32_t rank);
/* engine_repair.c: closes it on all ranks that have it, and remembers that it is lost. */
FV_MUST_CHECK fv_status_t fv_engine_lose_session(fv_engine_t *engine,
                                                 fv_session_t *session,
                                                 uint32_t rank);

/* engine_sessions.c; the turn is held; an error ends the service */
FV_MUST_CHECK fv_status_t fv_engine_close_session(fv_engine_t *engine, const fv_session_id_t *id);
/* Closes some of those that are idle; when it wants to be called again (INT64_MAX: never). */
FV_MUST_CHECK fv_status_t fv_engine_close_idle(fv_engine_t *engine,
                                               int64_t now_us,
                                               int64_t *out_next_us);
/* After a restart: those of close_with_stream, whose streams ended with the process, get a while to be used by another one. */
void fv_engine_note_orphans(fv_engine_t *engine, int64_t now_us);
/* Closes those of them that were not used. Lowers *inout_next_us to when it wants to be called again. */
FV_MUST_CHECK fv_status_t fv_engine_close_orphans(fv_engine_t *engine,
                                                  int64_t now_us,
                                                  int64_t *inout_next_us);
/* A step was done: its sessions were used; those that end with a stream belong to the first that used them. */
void fv_engine_note_use(fv_engine_t *engine, const fv_request_t *joined);
/* These two when no step is under way. */
FV_MUST_CHECK fv_status_t fv_engine_end_streams(fv_engine_t *engine); /* has_ended_streams */
FV_MUST_CHECK fv_status_t fv_engine_stream_ended(fv_engine_t *engine, fv_call_t *call);
/* A session that ends with this stream is between two pieces of a request. */
bool fv_engine_is_stream_half_way(fv_call_t *call);
void fv_engine_free_streams(fv_engine_t *engine); /* after its sessions */

/* engine_watch.c */
FV_MUST_CHECK fv_status_t fv_engine_encode_status(fv_engine_t *engine, fv_bytes_t *out);
FV_MUST_CHECK fv_status_t fv_engine_add_watcher(fv_engine_t *engine,
                                                fv_call_t *call,
                                                uint32_t interval_ms);
/* Sends the status to the watchers that are due; when the next one is (INT64_MAX: none). */
int64_t fv_engine_serve_watchers(fv_engine_t *engine, int64_t now_us);
void fv_engine_end_watchers(fv_engine_t *engine, const char *why);

/* engine.c: refuses what is new from now on; timeout_ms 0 = the configured one. */
void fv_engine_begin_drain(fv_engine_t *engine, uint32_t timeout_ms);

/* engine_view.c */
FV_MUST_CHECK fv_status_t fv_engine_status(fv_engine_t *engine, fv_cluster_status_t *out);
FV_MUST_CHECK fv_status_t fv_engine_session_info(fv_engine_t *engine,
                                                 const fv_session_t *session,
                                                 fv_session_info_t *out);
FV_MUST_CHECK fv_status_t fv_engine_placement(fv_engine_t *engine,
                                              const fv_session_t *session,
                                              fv_placement_info_t *out);

#endif /* FV_COORD_ENGINE_INTERNAL_H */
