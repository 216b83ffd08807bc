/*
 * engine_command.c - the small RPCs: decode, let the core decide, tell the ranks, answer.
 */
#include "common/clock.h"
#include "common/log.h"
#include "coord/engine_internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define OWN_RANK     0U
#define LIST_DEFAULT 100U
#define LIST_MAX     1000U

/* ------------------------------------------------------------------ to the ranks */

static fv_status_t run_own(fv_engine_t *engine, fv_ctl_type_t type, const void *body)
{
    const fv_local_ops_t *local = engine->config.local;
    void *ctx = engine->config.local_ctx;

    switch (type) {
    case FV_CTL_MODEL:
        return local->model(ctx, body);
    case FV_CTL_OPEN:
        return local->open(ctx, body);
    case FV_CTL_FORK:
        return local->fork(ctx, body);
    case FV_CTL_TRUNCATE:
        return local->truncate(ctx, body);
    case FV_CTL_CLOSE:
        return local->close(ctx, body);
    case FV_CTL_KEEP_END:
        return local->keep_end(ctx);
    case FV_CTL_HELLO:
    case FV_CTL_STEP:
    case FV_CTL_DONE:
    case FV_CTL_PING:
    case FV_CTL_PONG:
    case FV_CTL_EPOCH:
    case FV_CTL_STOP:
    case FV_CTL_KEEP:
    case FV_CTL_KEPT:
    default:
        return fv_fail(FV_ERR_INTERNAL, "message type %d is not a command", (int)type);
    }
}

static void note_refusal(fv_error_t *refusal, const fv_error_t *error)
{
    if ((error->status != FV_OK) && (refusal->status == FV_OK)) {
        *refusal = *error;
    }
}

static uint32_t rank_count(const fv_engine_t *engine, const fv_placement_t *placement)
{
    return (placement == NULL) ? engine->config.sched.n_ranks
                               : ((uint32_t)placement->n_head_parts * placement->n_ctx_parts);
}

static uint32_t rank_at(const fv_placement_t *placement, uint32_t i)
{
    return (placement == NULL) ? i : placement->ranks[i];
}

static fv_status_t send_to_ranks(fv_engine_t *engine,
                                 const fv_placement_t *placement,
                                 fv_ctl_type_t type,
                                 const void *body,
                                 size_t n_bytes,
                                 fv_error_t *out_refusal)
{
    uint32_t n = rank_count(engine, placement);

    for (uint32_t i = 0; i < n; i++) {
        if (rank_at(placement, i) != OWN_RANK) {
            FV_RETURN_IF_ERR(
                fv_link_send(engine->config.link, rank_at(placement, i), type, body, n_bytes));
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        fv_ctl_done_t done = {0};
        if (rank_at(placement, i) != OWN_RANK) {
            FV_RETURN_IF_ERR(fv_link_wait_done(engine->config.link, rank_at(placement, i), &done));
        } else if (engine->config.local == NULL) {
            continue; /* a dedicated coordinator has no share of anything */
        } else {
            done.error = fv_error_capture(run_own(engine, type, body));
            engine->config.local->memory(engine->config.local_ctx, &done.memory);
        }
        note_refusal(out_refusal, &done.error);
        fv_sched_rank_memory(engine->sched, rank_at(placement, i), &done.memory);
    }
    return FV_OK;
}

fv_status_t fv_engine_broadcast(fv_engine_t *engine,
                                const fv_placement_t *placement,
                                fv_ctl_type_t type,
                                const void *body,
                                size_t n_bytes,
                                fv_error_t *out_refusal)
{
    fv_status_t status = send_to_ranks(engine, placement, type, body, n_bytes, out_refusal);

    if (status != FV_OK) { /* some ranks may have it */
        fv_engine_note_broken_command(engine, placement, type, body, n_bytes);
    }
    return status;
}

/* ------------------------------------------------------------------ helpers */

static uint64_t unix_ms(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_REALTIME, &t);
    return ((uint64_t)t.tv_sec * 1000U) + ((uint64_t)t.tv_nsec / 1000000U);
}

/* A session that `entry`'s caller opens. */
static fv_status_t fresh_birth(const fv_entry_t *entry, fv_birth_t *out)
{
    *out = (fv_birth_t){
        .now_unix_ms = unix_ms(), .now_us = fv_clock_us(), .owner = fv_call_principal(entry->call)};
    return fv_random_bytes(out->id.bytes, sizeof(out->id.bytes));
}

/* FV_ERR_NOT_FOUND, too, for what is there and not the caller's to see. */
static fv_status_t visible_session(const fv_engine_t *engine,
                                   const fv_entry_t *entry,
                                   const fv_session_id_t *id,
                                   fv_session_t **out)
{
    *out = fv_sched_session(engine->sched, id);
    if ((*out == NULL) || !fv_principal_may_see(fv_call_principal(entry->call), (*out)->owner)) {
        char hex[FV_SESSION_ID_CHARS + 1];
        fv_session_id_format(id, hex);
        fv_error_t error =
            fv_error_capture(fv_fail(FV_ERR_NOT_FOUND, "session_id: no session %s", hex));
        fv_engine_explain_loss(engine, fv_call_principal(entry->call), id, &error);
        return fv_fail((fv_status_t)error.status, "%s", error.text);
    }
    (*out)->used_us = fv_clock_us();
    return FV_OK;
}

static fv_span_t message_of(const fv_entry_t *entry)
{
    return (fv_span_t){.data = (const uint8_t *)(entry + 1), .n_bytes = entry->n_bytes};
}

/* Answers with the encoded bytes, or with the error that `status` names. */
static void answer(fv_call_t *call, fv_status_t status, fv_bytes_t *bytes)
{
    if (status == FV_OK) {
        fv_reply_bytes(call, bytes);
    } else {
        fv_reply_error(call, status);
    }
}

static void answer_empty(fv_call_t *call)
{
    fv_call_reply(call, NULL, 0);
}

static void answer_refusal(fv_call_t *call, const fv_error_t *refusal)
{
    fv_call_fail(call, fv_status_grpc((fv_status_t)refusal->status), refusal->text);
}

/* ------------------------------------------------------------------ models and sessions */

static fv_status_t do_register(fv_engine_t *engine, const fv_entry_t *entry)
{
    static fv_model_spec_t spec; /* large; guarded by the turn */
    static fv_ctl_model_t message;
    fv_register_response_t response = {0};
    fv_bytes_t bytes = {0};
    bool is_new = false;
    fv_error_t refusal = {0};

    memset(&spec, 0, sizeof(spec));
    fv_status_t status = fv_wire_register_request_decode(message_of(entry), &spec);
    if (status == FV_OK) {
        status = fv_sched_register(engine->sched, &spec, fv_call_principal(entry->call), &response,
                                   &is_new, &message);
    }
    if ((status == FV_OK) && is_new) { /* before any rank knows it */
        status = fv_ledger_reserve_command(engine->config.ledger);
        if (status != FV_OK) {
            fv_sched_unregister_last(engine->sched, fv_call_principal(entry->call));
        }
    }
    if ((status == FV_OK) && is_new) {
        fv_info("model %s \"%s\": %d layers, %d/%d heads, d %d/%d, %s cache", response.model_id,
                spec.name, spec.n_layers, spec.n_q_heads, spec.n_kv_heads, spec.head_dim_qk,
                spec.head_dim_v, fv_dtype_str(spec.kv_dtype));
        FV_RETURN_IF_ERR(
            fv_engine_broadcast(engine, NULL, FV_CTL_MODEL, &message, sizeof(message), &refusal));
        if (refusal.status != FV_OK) { /* ranks and coordinator no longer agree: not to be served */
            return fv_fail(FV_ERR_INTERNAL, "a rank refused a model: %s", refusal.text);
        }
        FV_RETURN_IF_ERR(
            fv_ledger_note_model(engine->config.ledger, engine->sched, message.model_slot));
    }
    if (status == FV_OK) {
        status = fv_wire_register_response_encode(&response, &bytes);
    }
    answer(entry->call, status, &bytes);
    return FV_OK;
}

/* What the core and the ranks have made of OPEN or FORK. */
typedef struct new_session {
    fv_session_id_t id;
    const fv_session_t *parent; /* NULL: opened */
    uint64_t at_position;
    fv_error_t refusal; /* of a rank */
} new_session_t;

/* A new session that a rank could not hold (host memory): taken back everywhere. */
static fv_status_t take_back(fv_engine_t *engine, const fv_session_id_t *id)
{
    fv_ctl_close_t message;
    fv_placement_t placement;
    fv_error_t ignored = {0};

    FV_RETURN_IF_ERR(fv_sched_close(engine->sched, id, &message, &placement));
    return fv_engine_broadcast(engine, &placement, FV_CTL_CLOSE, &message, sizeof(message),
                               &ignored);
}

static fv_status_t finish_new_session(fv_engine_t *engine,
                                      const fv_entry_t *entry,
                                      const new_session_t *made,
                                      fv_status_t (*encode)(const fv_session_id_t *, fv_bytes_t *))
{
    const fv_session_id_t *id = &made->id;
    fv_error_t refusal = made->refusal;
    fv_bytes_t bytes = {0};

    if (refusal.status == FV_OK) { /* all ranks have it */
        refusal = fv_error_capture(fv_ledger_note_session(engine->config.ledger,
                                                          fv_sched_session(engine->sched, id),
                                                          made->parent, made->at_position));
    }
    if (refusal.status != FV_OK) {
        answer_refusal(entry->call, &refusal);
        return take_back(engine, id);
    }
    answer(entry->call, encode(id, &bytes), &bytes);
    return FV_OK;
}

static fv_status_t refuse_when_draining(const fv_engine_t *engine)
{
    return engine->is_draining ? fv_fail(FV_ERR_UNAVAILABLE, "the service is draining") : FV_OK;
}

static fv_status_t do_open(fv_engine_t *engine, const fv_entry_t *entry)
{
    fv_open_request_t request = {0};
    fv_birth_t birth = {0};
    fv_ctl_open_t message = {0};
    fv_error_t refusal = {0};

    fv_status_t status = refuse_when_draining(engine);
    if (status == FV_OK) {
        status = fv_wire_open_request_decode(message_of(entry), &request);
    }
    if (status == FV_OK) {
        status = fresh_birth(entry, &birth);
    }
    if (status == FV_OK) {
        status = fv_sched_open(engine->sched, &request, &birth, &message);
    }
    if (status != FV_OK) {
        fv_reply_error(entry->call, status);
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_engine_broadcast(engine, &message.placement, FV_CTL_OPEN, &message,
                                         sizeof(message), &refusal));
    const new_session_t made = {.id = birth.id, .refusal = refusal};
    return finish_new_session(engine, entry, &made, fv_wire_open_response_encode);
}

bool fv_engine_must_hold(const fv_engine_t *engine, const fv_entry_t *entry)
{
    fv_session_request_t request = {0};
    fv_status_t status = FV_ERR_INVALID_ARG;

    if (entry->method == FV_METHOD_COUNT) {
        return fv_engine_is_stream_half_way(entry->call);
    }
    if (entry->method == FV_METHOD_FORK_SESSION) {
        status = fv_wire_fork_request_decode(message_of(entry), &request);
    } else if (entry->method == FV_METHOD_TRUNCATE_SESSION) {
        status = fv_wire_truncate_request_decode(message_of(entry), &request);
    } else if (entry->method == FV_METHOD_CLOSE_SESSION) {
        status = fv_wire_close_request_decode(message_of(entry), &request);
    }
    const fv_session_t *session =
        (status == FV_OK) ? fv_sched_session(engine->sched, &request.session) : NULL;

    return (session != NULL) && fv_sched_is_half_way(session);
}

static fv_status_t do_fork(fv_engine_t *engine, const fv_entry_t *entry)
{
    fv_session_request_t request = {0};
    fv_birth_t birth = {0};
    fv_session_t *session = NULL;
    fv_ctl_fork_t message = {0};
    fv_placement_t placement;
    fv_error_t refusal = {0};

    fv_status_t status = refuse_when_draining(engine);
    if (status == FV_OK) {
        status = fv_wire_fork_request_decode(message_of(entry), &request);
    }
    if (status == FV_OK) {
        status = visible_session(engine, entry, &request.session, &session);
    }
    if (status == FV_OK) {
        status = fresh_birth(entry, &birth);
    }
    if (status == FV_OK) {
        status = fv_sched_fork(engine->sched, &request.session,
                               request.has_position ? request.position : UINT64_MAX, &birth,
                               &message, &placement);
    }
    if (status != FV_OK) {
        fv_reply_error(entry->call, status);
        return FV_OK;
    }
    FV_RETURN_IF_ERR(
        fv_engine_broadcast(engine, &placement, FV_CTL_FORK, &message, sizeof(message), &refusal));
    const new_session_t made = {
        .id = birth.id, .parent = session, .at_position = message.at_position, .refusal = refusal};
    return finish_new_session(engine, entry, &made, fv_wire_fork_response_encode);
}

static fv_status_t do_truncate(fv_engine_t *engine, const fv_entry_t *entry)
{
    fv_session_request_t request = {0};
    fv_session_t *session = NULL;
    fv_ctl_truncate_t message = {0};
    fv_placement_t placement;
    fv_error_t refusal = {0};
    bool is_cut = false;

    fv_status_t status = fv_wire_truncate_request_decode(message_of(entry), &request);
    if (status == FV_OK) {
        status = visible_session(engine, entry, &request.session, &session);
    }
    if (status == FV_OK) {
        is_cut = request.position < fv_session_tokens(session);
        status = fv_ledger_reserve_command(is_cut ? engine->config.ledger : NULL);
    }
    if (status == FV_OK) {
        status = fv_sched_truncate(engine->sched, &request.session, request.position, &message,
                                   &placement);
    }
    if (status != FV_OK) {
        fv_reply_error(entry->call, status);
        return FV_OK;
    }
    FV_RETURN_IF_ERR(
        fv_ledger_note_truncate(is_cut ? engine->config.ledger : NULL, session, request.position));
    FV_RETURN_IF_ERR(fv_engine_broadcast(engine, &placement, FV_CTL_TRUNCATE, &message,
                                         sizeof(message), &refusal));
    if (refusal.status != FV_OK) {
        return fv_fail(FV_ERR_INTERNAL, "a rank refused to truncate: %s", refusal.text);
    }
    answer_empty(entry->call);
    return FV_OK;
}

static fv_status_t do_close(fv_engine_t *engine, const fv_entry_t *entry)
{
    fv_session_request_t request = {0};
    fv_session_t *session = NULL;

    fv_status_t status = fv_wire_close_request_decode(message_of(entry), &request);
    if (status == FV_OK) {
        status = visible_session(engine, entry, &request.session, &session);
    }
    if (status != FV_OK) {
        fv_reply_error(entry->call, status);
        return FV_OK;
    }
    status = fv_engine_close_session(engine, &request.session);
    if (status == FV_ERR_EXHAUSTED) { /* nothing has changed */
        fv_reply_error(entry->call, status);
        return FV_OK;
    }
    FV_RETURN_IF_ERR(status);
    answer_empty(entry->call);
    return FV_OK;
}

static fv_status_t do_get(fv_engine_t *engine, const fv_entry_t *entry)
{
    fv_session_request_t request = {0};
    fv_session_t *session = NULL;
    fv_session_info_t info = {0};
    fv_bytes_t bytes = {0};

    fv_status_t status = fv_wire_get_request_decode(message_of(entry), &request);
    if (status == FV_OK) {
        status = visible_session(engine, entry, &request.session, &session);
    }
    if (status == FV_OK) {
        status = fv_engine_session_info(engine, session, &info);
    }
    if (status == FV_OK) {
        status = fv_wire_session_info_encode(&info, &bytes);
    }
    answer(entry->call, status, &bytes);
    fv_session_info_free(&info);
    return FV_OK;
}

/* The page token is the opened_seq of the last session shown, in decimal. */
static fv_status_t list_sessions(fv_engine_t *engine,
                                 const fv_principal_t *principal,
                                 const fv_list_request_t *request,
                                 fv_list_response_t *out)
{
    bool is_number = strspn(request->page_token, "0123456789") == strlen(request->page_token);
    uint64_t after = strtoull(request->page_token, NULL, 10);
    uint32_t page_size = (request->page_size == 0) ? LIST_DEFAULT : request->page_size;

    if (!is_number || (after == UINT64_MAX) || (request->page_size > LIST_MAX)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "%s: given \"%s\" and %u, expected a next_page_token and 0..%u",
                       (request->page_size > LIST_MAX) ? "page_size" : "page_token",
                       request->page_token, request->page_size, LIST_MAX);
    }
    out->sessions = calloc(page_size, sizeof(*out->sessions));
    if (out->sessions == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "a page of %u sessions", page_size);
    }
    out->n_total = fv_principal_is_admin(principal)
                       ? fv_session_table_count(fv_sched_sessions(engine->sched))
                       : principal->n_sessions;
    uint64_t last = after;
    for (const fv_session_t *s = fv_session_after(fv_sched_sessions(engine->sched), after);
         s != NULL; s = s->next) {
        if (!fv_principal_may_see(principal, s->owner)) {
            continue;
        }
        if ((request->model_id[0] != '\0') &&
            (strcmp(request->model_id, fv_sched_model_id(engine->sched, s->model_slot)) != 0)) {
            continue;
        }
        if (out->n_sessions == page_size) { /* there is one more: say where it begins */
            (void)snprintf(out->next_page_token, sizeof(out->next_page_token), "%" PRIu64, last);
            break;
        }
        FV_RETURN_IF_ERR(fv_engine_session_info(engine, s, &out->sessions[out->n_sessions]));
        out->n_sessions++;
        last = s->opened_seq;
    }
    return FV_OK;
}

static fv_status_t do_list(fv_engine_t *engine, const fv_entry_t *entry)
{
    fv_list_request_t request = {0};
    fv_list_response_t response = {0};
    fv_bytes_t bytes = {0};

    fv_status_t status = fv_wire_list_request_decode(message_of(entry), &request);
    if (status == FV_OK) {
        status = list_sessions(engine, fv_call_principal(entry->call), &request, &response);
    }
    if (status == FV_OK) {
        status = fv_wire_list_response_encode(&response, &bytes);
    }
    answer(entry->call, status, &bytes);
    fv_list_response_free(&response);
    return FV_OK;
}

/* ------------------------------------------------------------------ cluster */

static fv_status_t do_status(fv_engine_t *engine, const fv_entry_t *entry)
{
    fv_bytes_t bytes = {0};

    answer(entry->call, fv_engine_encode_status(engine, &bytes), &bytes);
    return FV_OK;
}

static fv_status_t do_placement(fv_engine_t *engine, const fv_entry_t *entry)
{
    fv_session_request_t request = {0};
    fv_session_t *session = NULL;
    fv_placement_info_t info = {0};
    fv_bytes_t bytes = {0};

    fv_status_t status = fv_wire_placement_request_decode(message_of(entry), &request);
    if (status == FV_OK) {
        status = visible_session(engine, entry, &request.session, &session);
    }
    if (status == FV_OK) {
        status = fv_engine_placement(engine, session, &info);
    }
    if (status == FV_OK) {
        status = fv_wire_placement_encode(&info, &bytes);
    }
    answer(entry->call, status, &bytes);
    fv_placement_info_free(&info);
    return FV_OK;
}

static fv_status_t do_watch(fv_engine_t *engine, const fv_entry_t *entry)
{
    uint32_t interval_ms = 0;
    fv_status_t status = fv_wire_watch_request_decode(message_of(entry), &interval_ms);

    if (status == FV_OK) {
        status = fv_engine_add_watcher(engine, entry->call, interval_ms);
    }
    if (status != FV_OK) {
        fv_reply_error(entry->call, status);
    }
    return FV_OK;
}

static fv_status_t do_drain(fv_engine_t *engine, const fv_entry_t *entry)
{
    uint32_t timeout_ms = 0;
    fv_status_t status = fv_wire_drain_request_decode(message_of(entry), &timeout_ms);

    if ((status == FV_OK) && (engine->drain_call != NULL)) {
        status = fv_fail(FV_ERR_PRECONDITION, "the service is draining already");
    }
    if (status != FV_OK) {
        fv_reply_error(entry->call, status);
        return FV_OK;
    }
    fv_call_ref(entry->call);
    engine->drain_call = entry->call;
    fv_engine_begin_drain(engine, timeout_ms);
    return FV_OK;
}

fv_status_t fv_engine_command(fv_engine_t *engine, fv_entry_t *entry)
{
    switch (entry->method) {
    case FV_METHOD_REGISTER_MODEL:
        return do_register(engine, entry);
    case FV_METHOD_OPEN_SESSION:
        return do_open(engine, entry);
    case FV_METHOD_FORK_SESSION:
        return do_fork(engine, entry);
    case FV_METHOD_TRUNCATE_SESSION:
        return do_truncate(engine, entry);
    case FV_METHOD_CLOSE_SESSION:
        return do_close(engine, entry);
    case FV_METHOD_GET_SESSION:
        return do_get(engine, entry);
    case FV_METHOD_LIST_SESSIONS:
        return do_list(engine, entry);
    case FV_METHOD_GET_STATUS:
        return do_status(engine, entry);
    case FV_METHOD_GET_PLACEMENT:
        return do_placement(engine, entry);
    case FV_METHOD_WATCH_STATUS:
        return do_watch(engine, entry);
    case FV_METHOD_DRAIN:
        return do_drain(engine, entry);
    case FV_METHOD_COUNT:
        return fv_engine_stream_ended(engine, entry->call);
    case FV_METHOD_ATTEND:
    case FV_METHOD_ATTEND_ONCE:
    default:
        return fv_fail(FV_ERR_INTERNAL, "method %d is not a command", (int)entry->method);
    }
}
