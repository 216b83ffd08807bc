/*
 * engine_inbox.c - the rpc thread's side: a message becomes an entry, tensors go to staging.
 *
 * Decode path: station 2 of 10. Before: coord/rpc_call.c. After: coord/sched_step.c, on whichever thread has the turn.
 *
 * This is where a request's tensors are copied, once, from gRPC's receive slices into aligned memory; the
 * crc32c that proves a retry is taken while they are hot.
 */
#include "common/clock.h"
#include "common/digest.h"
#include "common/fault.h"
#include "coord/engine_internal.h"

#include <string.h>
#include <unistd.h>

#define ALIGNMENT   64U
#define SMALL_BYTES ((size_t)64 << 10)

/*
 * A request at most this large, with at most inline_pairs_max (query token, KV token) pairs, is served on the rpc thread: some
 * milliseconds at the very most. What it keeps waiting meanwhile would wait for the step anyway; only long steps are worth
 * a hand-over, so that gRPC's own business (cancellations, pings) and the copying of large requests go on beside them.
 */
#define INLINE_BYTES_MAX ((size_t)2 << 20)
#define INLINE_PAIRS_CPU 65536U
/* A request that comes this soon after the last answer was waiting behind it: there are several in flight. */
#define LONE_GAP_US 5
/* So many in a row that came alone: one client with one request in flight. */
#define LONE_RUN 16U

static uint64_t inline_pairs_max(const fv_engine_t *engine)
{
    return (engine->config.inline_pairs_max > 0U) ? engine->config.inline_pairs_max
                                                  : INLINE_PAIRS_CPU;
}

static void ring(fv_engine_t *engine)
{
    uint64_t one = 1;
    ssize_t n = write(engine->wake_fd, &one, sizeof(one));

    (void)n; /* fails only when the counter is full: then it is readable anyway */
}

/* seq_cst on both sides of (inbox, is_asleep): either we see the engine asleep and ring, or it sees what was pushed when it
 * looks once more before it sleeps. */
static void ring_if_asleep(fv_engine_t *engine)
{
    if (atomic_load_explicit(&engine->is_asleep, memory_order_seq_cst)) {
        ring(engine);
    }
}

/*
 * Serves what waits on this (the rpc) thread if nobody else is at it. A hand-over to another thread costs more than a small
 * step; a large one would keep gRPC waiting, and MPI belongs to the engine's thread, so those are handed over.
 * False: somebody holds the turn, and looks at the inbox again before sleeping.
 */
static bool take_turn(fv_engine_t *engine)
{
    if (pthread_mutex_trylock(&engine->turn) != 0) {
        return false;
    }
    /* the service is still starting; or a prefill is between two pieces: its steps are for the engine's thread */
    if ((engine->rpc == NULL) || fv_engine_has_work(engine)) {
        (void)pthread_mutex_unlock(&engine->turn);
        return false;
    }
    if (engine->broken.status == FV_OK) {
        fv_status_t status = fv_engine_work(engine);
        if (status != FV_OK) {
            engine->broken = fv_error_capture(status);
            engine->wants_own_thread = true;
        }
        engine->wants_own_thread = engine->wants_own_thread || fv_engine_has_work(engine);
    }
    bool must_ring = engine->wants_own_thread;
    (void)pthread_mutex_unlock(&engine->turn);
    if (must_ring) {
        ring(engine);
    }
    return true;
}

bool fv_engine_wants_idle(void *ctx)
{
    const fv_engine_t *engine = ctx;

    return engine->n_deferred > 0;
}

void fv_engine_on_idle(void *ctx)
{
    fv_engine_t *engine = ctx;

    if (engine->n_deferred == 0) {
        return;
    }
    bool is_small =
        engine->deferred_pairs <= inline_pairs_max(engine); /* all of it together, too */
    engine->n_lone = (engine->n_deferred == 1) ? (engine->n_lone + 1U) : 0U;
    engine->n_deferred = 0;
    engine->deferred_pairs = 0;
    if (!is_small || !take_turn(engine)) {
        ring_if_asleep(engine);
    }
    engine->served_us = fv_clock_us();
}

/* n_pairs: the work it brings; over inline_pairs_max() it goes to the engine's thread. */
static void push(fv_engine_t *engine, fv_entry_t *entry, uint64_t n_pairs)
{
    fv_entry_t *head = atomic_load_explicit(&engine->inbox, memory_order_relaxed);

    do {
        entry->next = head;
        /* release: the entry's fields are written before it can be seen */
    } while (!atomic_compare_exchange_weak_explicit(&engine->inbox, &head, entry,
                                                    memory_order_seq_cst, memory_order_relaxed));
    if ((n_pairs > inline_pairs_max(engine)) || (engine->config.link != NULL)) {
        ring_if_asleep(engine);
        return;
    }
    /* One at a time: serve it now. Several: wait until nothing more is ready, so that they share a step. */
    engine->n_deferred++;
    engine->deferred_pairs += n_pairs;
    if (fv_clock_us() - engine->served_us <= LONE_GAP_US) {
        engine->n_lone = 0;
    }
    if (engine->n_lone >= LONE_RUN) {
        fv_engine_on_idle(engine);
    }
}

fv_entry_t *fv_engine_take_inbox(fv_engine_t *engine)
{
    fv_entry_t *entry = atomic_exchange_explicit(&engine->inbox, NULL, memory_order_seq_cst);
    fv_entry_t *oldest = NULL;

    while (entry != NULL) {
        fv_entry_t *next = entry->next;
        entry->next = oldest;
        oldest = entry;
        entry = next;
    }
    return oldest;
}

void fv_entry_end_request(fv_entry_t *entry)
{
    if (entry->is_counted) {
        entry->is_counted = false;
        fv_call_end_request(entry->call);
    }
}

void fv_entry_release(fv_entry_t *entry)
{
    fv_entry_end_request(entry);
    fv_call_unref(entry->call);
    if (entry->is_abandoned) {
        fv_staging_abandon(entry);
    } else {
        fv_staging_give(entry);
    }
}

void fv_job_release(fv_job_t *job)
{
    fv_staging_give(job->tensors.out);
    fv_staging_give(job->tensors.lse);
    fv_entry_release(&job->entry);
}

static size_t span_bytes(const fv_span_t *spans, size_t n_spans)
{
    size_t n_bytes = 0;

    for (size_t i = 0; i < n_spans; i++) {
        n_bytes += spans[i].n_bytes;
    }
    return n_bytes;
}

/* ------------------------------------------------------------------ small RPCs */

static void take_small(fv_engine_t *engine,
                       fv_call_t *call,
                       fv_method_t method,
                       const fv_span_t *spans,
                       size_t n_spans)
{
    size_t n_bytes = span_bytes(spans, n_spans);
    void *memory = NULL;

    /* A small one passes the bound of request memory: closing sessions must work when it is full. */
    bool passes = n_bytes <= SMALL_BYTES;
    fv_status_t status =
        fv_staging_take(engine->staging, sizeof(fv_entry_t) + n_bytes, passes, &memory);
    if (status != FV_OK) {
        fv_reply_error(call, status);
        return;
    }
    fv_entry_t *entry = memory;
    *entry = (fv_entry_t){.call = call, .method = method, .n_bytes = n_bytes};
    fv_wire_gather(spans, n_spans, (fv_region_t){.offset = 0, .n_bytes = n_bytes}, entry + 1);
    fv_call_ref(call);
    push(engine, entry, 0);
}

/* ------------------------------------------------------------------ attend */

typedef struct fv_job_layout {
    size_t items, ctl_items, sessions, digests, q, k, v, n_bytes;
} fv_job_layout_t;

static size_t place(size_t *end, size_t n_bytes)
{
    size_t at = fv_align_up(*end, ALIGNMENT);

    *end = at + n_bytes;
    return at;
}

static fv_job_layout_t layout_of(const fv_attend_request_t *head)
{
    fv_job_layout_t l = {0};
    size_t end = sizeof(fv_job_t);
    size_t n = head->n_items;

    l.items = place(&end, n * sizeof(fv_attend_item_t));
    l.ctl_items = place(&end, n * sizeof(fv_ctl_item_t));
    l.sessions = place(&end, n * sizeof(fv_session_t *));
    l.digests = place(&end, n * sizeof(uint32_t));
    l.q = place(&end, head->q.n_bytes);
    l.k = place(&end, head->k.n_bytes);
    l.v = place(&end, head->v.n_bytes);
    l.n_bytes = end;
    return l;
}

/*
 * crc32c of each item's K then V bytes. Sizes are not checked against a model yet: an item's slice is its share of
 * the tokens; when that does not come out even, the request will be refused for its sizes and the digest is not used.
 */
static void take_digests(const fv_attend_request_t *head,
                         const fv_attend_item_t *items,
                         const uint8_t *k,
                         const uint8_t *v,
                         uint32_t *digests)
{
    size_t k_token = head->k.n_bytes / head->n_tokens;
    size_t v_token = head->v.n_bytes / head->n_tokens;

    for (uint32_t i = 0; i < head->n_items; i++) {
        digests[i] = fv_crc32c(0, k, k_token * items[i].n_tokens);
        digests[i] = fv_crc32c(digests[i], v, v_token * items[i].n_tokens);
        k += k_token * items[i].n_tokens;
        v += v_token * items[i].n_tokens;
    }
}

/* (query token, KV token) pairs of a request; UINT64_MAX: too many, or too many bytes, to be served on the spot. */
static uint64_t count_pairs(const fv_attend_request_t *head,
                            const fv_attend_item_t *items,
                            size_t n_bytes,
                            uint64_t pairs_max)
{
    uint64_t n_pairs = 0;

    if ((n_bytes > INLINE_BYTES_MAX) || (head->n_tokens > pairs_max) ||
        (!head->append &&
         !head->causal)) { /* the last reads a whole layer, whose length only the engine knows */
        return UINT64_MAX;
    }
    for (uint32_t i = 0; i < head->n_items; i++) {
        if (items[i].position > pairs_max) {
            return UINT64_MAX;
        }
        n_pairs += items[i].n_tokens * (items[i].position + items[i].n_tokens);
    }
    return n_pairs;
}

/* One more request of a caller, unless it is refused already. One that is refused is paid for as well: it has come in. */
static fv_status_t
begin_request(fv_principal_t *principal, fv_status_t scanned, uint64_t n_bytes, int64_t received_us)
{
    fv_status_t status =
        (scanned != FV_OK) ? scanned : fv_principal_begin_request(principal, n_bytes, received_us);

    if (status != FV_OK) {
        fv_principal_charge(principal, n_bytes, received_us);
    }
    return status;
}

/* Into the job's memory, whose items are there; large ones beside what else comes in. */
static void take_tensors(fv_call_t *call,
                         const fv_span_t *spans,
                         size_t n_spans,
                         const fv_attend_request_t *head,
                         const fv_job_layout_t *l,
                         uint8_t *base)
{
    bool is_aside = l->n_bytes >= FV_CALL_ASIDE_BYTES;

    if (is_aside) {
        fv_call_step_aside(call);
    }
    fv_wire_gather(spans, n_spans, head->q, base + l->q);
    fv_wire_gather(spans, n_spans, head->k, base + l->k);
    fv_wire_gather(spans, n_spans, head->v, base + l->v);
    if (head->append) {
        take_digests(head, (const fv_attend_item_t *)(const void *)(base + l->items), base + l->k,
                     base + l->v, (uint32_t *)(void *)(base + l->digests));
    }
    if (is_aside) {
        fv_call_step_back(call);
    }
}

static void take_attend(fv_engine_t *engine,
                        fv_call_t *call,
                        fv_method_t method,
                        const fv_span_t *spans,
                        size_t n_spans,
                        int64_t received_us,
                        int64_t deadline_us)
{
    fv_attend_request_t head = {0};
    fv_status_t status =
        fv_wire_attend_request_scan(spans, n_spans, &head, engine->scan_items, FV_ITEMS_MAX);
    fv_principal_t *principal = fv_call_principal(call);
    fv_job_layout_t l = {0};
    void *memory = NULL;

    if (principal != NULL) {
        status = begin_request(principal, status, span_bytes(spans, n_spans), received_us);
    }
    if (status == FV_OK) {
        l = layout_of(&head);
        status = fv_staging_take(engine->staging, l.n_bytes, false, &memory);
        if ((status != FV_OK) && (principal != NULL)) {
            fv_principal_end_request(principal);
        }
    }
    if (status != FV_OK) {
        fv_reply_refused(call, method, head.request_id, status);
        return;
    }
    uint8_t *base = memory;
    fv_job_t *job = memory;
    *job = (fv_job_t){.entry = {.call = call, .method = method, .is_counted = true},
                      .staging = engine->staging,
                      .ledger = engine->config.ledger};
    uint64_t n_pairs = count_pairs(&head, engine->scan_items, l.n_bytes, inline_pairs_max(engine));
    memcpy(base + l.items, engine->scan_items, head.n_items * sizeof(fv_attend_item_t));
    take_tensors(call, spans, n_spans, &head, &l, base);
    job->tensors = (fv_tensors_t){.q = base + l.q, .k = base + l.k, .v = base + l.v};
    job->request = (fv_request_t){
        .head = head,
        .items = (const fv_attend_item_t *)(const void *)(base + l.items),
        .digests = (const uint32_t *)(const void *)(base + l.digests),
        .ctl_items = (fv_ctl_item_t *)(void *)(base + l.ctl_items),
        .sessions = (fv_session_t **)(void *)(base + l.sessions),
        .received_us = received_us,
        .deadline_us = deadline_us,
        .principal = principal,
        .user = job,
    };
    fv_call_ref(call);
    fv_fault_point(2);
    push(engine, &job->entry, n_pairs);
}

void fv_engine_on_message(void *ctx,
                          fv_call_t *call,
                          fv_method_t method,
                          const fv_span_t *spans,
                          size_t n_spans,
                          int64_t received_us,
                          int64_t deadline_us)
{
    fv_engine_t *engine = ctx;
    bool is_attend = (method == FV_METHOD_ATTEND) || (method == FV_METHOD_ATTEND_ONCE);

    if (atomic_load(&engine->is_closed)) {
        fv_status_t status = fv_fail(FV_ERR_UNAVAILABLE, "the service is stopping");
        if (is_attend) {
            fv_reply_refused(call, method, 0, status);
        } else {
            fv_reply_error(call, status);
        }
        return;
    }
    if (is_attend) {
        take_attend(engine, call, method, spans, n_spans, received_us, deadline_us);
    } else {
        take_small(engine, call, method, spans, n_spans);
    }
}

/* The end of a stream that sessions end with goes the way of a small RPC; nobody reads its answer. */
void fv_engine_on_closed(void *ctx, fv_call_t *call)
{
    fv_engine_t *engine = ctx;

    /* whoever holds another call asks fv_call_is_closed() when it next looks at it */
    if ((fv_call_method(call) == FV_METHOD_ATTEND) && (fv_call_user(call) != NULL) &&
        !atomic_load(&engine->is_closed)) {
        take_small(engine, call, FV_METHOD_COUNT, NULL, 0);
    }
}
