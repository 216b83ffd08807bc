/*
 * wire_session.c - the messages that name one session, and the list of sessions.
 */
#include "proto/wire_message.h"

#include <stdlib.h>
#include <string.h>

#define PAGE_SIZE_MAX 1000

/*
 * Requests and responses that are one session id. In the generated structs they differ only in name: each
 * has the string first, which the assertions hold to.
 */
typedef struct id_message {
    ProtobufCMessage base;
    char *session_id;
} id_message_t;

#define ASSERT_ID_FIRST(type) \
    _Static_assert(offsetof(type, session_id) == offsetof(id_message_t, session_id), #type)
ASSERT_ID_FIRST(Fovea__V1__OpenSessionResponse);
ASSERT_ID_FIRST(Fovea__V1__ForkSessionRequest);
ASSERT_ID_FIRST(Fovea__V1__ForkSessionResponse);
ASSERT_ID_FIRST(Fovea__V1__TruncateSessionRequest);
ASSERT_ID_FIRST(Fovea__V1__CloseSessionRequest);
ASSERT_ID_FIRST(Fovea__V1__GetSessionRequest);
ASSERT_ID_FIRST(Fovea__V1__GetPlacementRequest);

/* Unpacks and reads the id; on FV_OK the caller frees *out_message. */
static fv_status_t id_unpack(const ProtobufCMessageDescriptor *descriptor,
                             fv_span_t in,
                             fv_session_id_t *out,
                             ProtobufCMessage **out_message)
{
    ProtobufCMessage *message = NULL;

    FV_RETURN_IF_ERR(fv_message_unpack(descriptor, in, FV_WIRE_REQUEST_MAX, &message));
    fv_status_t status =
        fv_message_session("session_id", ((id_message_t *)message)->session_id, out);
    if (status != FV_OK) {
        fv_message_free(message);
        return status;
    }
    *out_message = message;
    return FV_OK;
}

static fv_status_t
id_decode(const ProtobufCMessageDescriptor *descriptor, fv_span_t in, fv_session_id_t *out)
{
    ProtobufCMessage *message = NULL;

    FV_RETURN_IF_ERR(id_unpack(descriptor, in, out, &message));
    fv_message_free(message);
    return FV_OK;
}

static fv_status_t id_encode(id_message_t *message, const fv_session_id_t *id, fv_bytes_t *out)
{
    char hex[FV_SESSION_ID_CHARS + 1];

    fv_session_id_format(id, hex);
    message->session_id = hex;
    fv_status_t status = fv_message_pack(&message->base, out);
    message->session_id = NULL;
    return status;
}

static fv_status_t request_decode(const ProtobufCMessageDescriptor *descriptor,
                                  fv_span_t in,
                                  fv_session_request_t *out)
{
    *out = (fv_session_request_t){0};
    return id_decode(descriptor, in, &out->session);
}

fv_status_t fv_wire_open_response_decode(fv_span_t in, fv_session_id_t *out)
{
    return id_decode(&fovea__v1__open_session_response__descriptor, in, out);
}

fv_status_t fv_wire_open_response_encode(const fv_session_id_t *in, fv_bytes_t *out)
{
    Fovea__V1__OpenSessionResponse message = FOVEA__V1__OPEN_SESSION_RESPONSE__INIT;

    return id_encode((id_message_t *)&message, in, out);
}

fv_status_t fv_wire_fork_response_decode(fv_span_t in, fv_session_id_t *out)
{
    return id_decode(&fovea__v1__fork_session_response__descriptor, in, out);
}

fv_status_t fv_wire_fork_response_encode(const fv_session_id_t *in, fv_bytes_t *out)
{
    Fovea__V1__ForkSessionResponse message = FOVEA__V1__FORK_SESSION_RESPONSE__INIT;

    return id_encode((id_message_t *)&message, in, out);
}

fv_status_t fv_wire_fork_request_decode(fv_span_t in, fv_session_request_t *out)
{
    ProtobufCMessage *message = NULL;

    *out = (fv_session_request_t){0};
    FV_RETURN_IF_ERR(
        id_unpack(&fovea__v1__fork_session_request__descriptor, in, &out->session, &message));
    const Fovea__V1__ForkSessionRequest *m = (Fovea__V1__ForkSessionRequest *)message;
    if (m->at_position_set_case == FOVEA__V1__FORK_SESSION_REQUEST__AT_POSITION_SET_AT_POSITION) {
        out->has_position = true;
        out->position = m->at_position;
    }
    fv_message_free(message);
    return FV_OK;
}

fv_status_t fv_wire_fork_request_encode(const fv_session_request_t *in, fv_bytes_t *out)
{
    Fovea__V1__ForkSessionRequest message = FOVEA__V1__FORK_SESSION_REQUEST__INIT;

    if (in->has_position) {
        message.at_position_set_case = FOVEA__V1__FORK_SESSION_REQUEST__AT_POSITION_SET_AT_POSITION;
        message.at_position = in->position;
    }
    return id_encode((id_message_t *)&message, &in->session, out);
}

fv_status_t fv_wire_truncate_request_decode(fv_span_t in, fv_session_request_t *out)
{
    ProtobufCMessage *message = NULL;

    *out = (fv_session_request_t){0};
    FV_RETURN_IF_ERR(
        id_unpack(&fovea__v1__truncate_session_request__descriptor, in, &out->session, &message));
    out->has_position = true;
    out->position = ((Fovea__V1__TruncateSessionRequest *)message)->position;
    fv_message_free(message);
    return FV_OK;
}

fv_status_t fv_wire_truncate_request_encode(const fv_session_request_t *in, fv_bytes_t *out)
{
    Fovea__V1__TruncateSessionRequest message = FOVEA__V1__TRUNCATE_SESSION_REQUEST__INIT;

    message.position = in->position;
    return id_encode((id_message_t *)&message, &in->session, out);
}

fv_status_t fv_wire_close_request_decode(fv_span_t in, fv_session_request_t *out)
{
    return request_decode(&fovea__v1__close_session_request__descriptor, in, out);
}

fv_status_t fv_wire_close_request_encode(const fv_session_request_t *in, fv_bytes_t *out)
{
    Fovea__V1__CloseSessionRequest message = FOVEA__V1__CLOSE_SESSION_REQUEST__INIT;

    return id_encode((id_message_t *)&message, &in->session, out);
}

fv_status_t fv_wire_get_request_decode(fv_span_t in, fv_session_request_t *out)
{
    return request_decode(&fovea__v1__get_session_request__descriptor, in, out);
}

fv_status_t fv_wire_get_request_encode(const fv_session_request_t *in, fv_bytes_t *out)
{
    Fovea__V1__GetSessionRequest message = FOVEA__V1__GET_SESSION_REQUEST__INIT;

    return id_encode((id_message_t *)&message, &in->session, out);
}

fv_status_t fv_wire_placement_request_decode(fv_span_t in, fv_session_request_t *out)
{
    return request_decode(&fovea__v1__get_placement_request__descriptor, in, out);
}

fv_status_t fv_wire_placement_request_encode(const fv_session_request_t *in, fv_bytes_t *out)
{
    Fovea__V1__GetPlacementRequest message = FOVEA__V1__GET_PLACEMENT_REQUEST__INIT;

    return id_encode((id_message_t *)&message, &in->session, out);
}

void fv_session_info_free(fv_session_info_t *info)
{
    free(info->layer_tokens);
    *info = (fv_session_info_t){0};
}

/* On failure the caller frees `out`. */
static fv_status_t info_decode(const Fovea__V1__SessionInfo *in, fv_session_info_t *out)
{
    FV_RETURN_IF_ERR(fv_message_session("session_id", in->session_id, &out->session));
    FV_RETURN_IF_ERR(
        fv_message_text("model_id", in->model_id, out->model_id, sizeof(out->model_id)));
    if (in->parent_session_id[0] != '\0') {
        FV_RETURN_IF_ERR(
            fv_message_session("parent_session_id", in->parent_session_id, &out->parent));
        out->has_parent = true;
    }
    out->max_tokens = in->max_tokens;
    out->kv_bytes = in->kv_bytes;
    out->created_unix_ms = in->created_unix_ms;
    out->durability = (int32_t)in->durability;
    FV_RETURN_IF_ERR(fv_message_count("layer_tokens", in->n_layer_tokens, FV_LAYERS_MAX));
    out->layer_tokens = fv_message_alloc(in->n_layer_tokens, sizeof(uint64_t));
    if (out->layer_tokens == NULL) {
        return FV_ERR_NO_MEMORY;
    }
    out->n_layers = (uint32_t)in->n_layer_tokens;
    if (out->n_layers > 0) {
        memcpy(out->layer_tokens, in->layer_tokens, out->n_layers * sizeof(uint64_t));
    }
    return FV_OK;
}

fv_status_t fv_wire_session_info_decode(fv_span_t in, fv_session_info_t *out)
{
    ProtobufCMessage *message = NULL;

    *out = (fv_session_info_t){0};
    FV_RETURN_IF_ERR(fv_message_unpack(&fovea__v1__session_info__descriptor, in,
                                       FV_WIRE_RESPONSE_MAX, &message));
    fv_status_t status = info_decode((Fovea__V1__SessionInfo *)message, out);
    if (status != FV_OK) {
        fv_session_info_free(out);
    }
    fv_message_free(message);
    return status;
}

/* A SessionInfo and the memory of its strings; everything else is borrowed from `in`. */
typedef struct info_out {
    Fovea__V1__SessionInfo message;
    char session[FV_SESSION_ID_CHARS + 1];
    char parent[FV_SESSION_ID_CHARS + 1];
} info_out_t;

static void info_encode(const fv_session_info_t *in, info_out_t *out)
{
    Fovea__V1__SessionInfo *m = &out->message;

    *m = (Fovea__V1__SessionInfo)FOVEA__V1__SESSION_INFO__INIT;
    fv_session_id_format(&in->session, out->session);
    m->session_id = out->session;
    m->model_id = fv_message_borrow(in->model_id);
    m->n_layer_tokens = in->n_layers;
    m->layer_tokens = in->layer_tokens;
    m->max_tokens = in->max_tokens;
    m->kv_bytes = in->kv_bytes;
    m->created_unix_ms = in->created_unix_ms;
    m->durability = (Fovea__V1__Durability)in->durability;
    if (in->has_parent) {
        fv_session_id_format(&in->parent, out->parent);
        m->parent_session_id = out->parent;
    }
}

fv_status_t fv_wire_session_info_encode(const fv_session_info_t *in, fv_bytes_t *out)
{
    info_out_t info;

    info_encode(in, &info);
    return fv_message_pack(&info.message.base, out);
}

static fv_status_t list_request_read(const Fovea__V1__ListSessionsRequest *in,
                                     fv_list_request_t *out)
{
    if (in->page_size > PAGE_SIZE_MAX) {
        return fv_fail(FV_ERR_INVALID_ARG, "page_size: given %u, expected at most %d",
                       in->page_size, PAGE_SIZE_MAX);
    }
    out->page_size = in->page_size;
    FV_RETURN_IF_ERR(
        fv_message_text("page_token", in->page_token, out->page_token, sizeof(out->page_token)));
    return fv_message_text("model_id", in->model_id, out->model_id, sizeof(out->model_id));
}

fv_status_t fv_wire_list_request_decode(fv_span_t in, fv_list_request_t *out)
{
    ProtobufCMessage *message = NULL;

    *out = (fv_list_request_t){0};
    FV_RETURN_IF_ERR(fv_message_unpack(&fovea__v1__list_sessions_request__descriptor, in,
                                       FV_WIRE_REQUEST_MAX, &message));
    fv_status_t status = list_request_read((Fovea__V1__ListSessionsRequest *)message, out);

    fv_message_free(message);
    return status;
}

fv_status_t fv_wire_list_request_encode(const fv_list_request_t *in, fv_bytes_t *out)
{
    Fovea__V1__ListSessionsRequest message = FOVEA__V1__LIST_SESSIONS_REQUEST__INIT;

    message.page_size = in->page_size;
    message.page_token = fv_message_borrow(in->page_token);
    message.model_id = fv_message_borrow(in->model_id);
    return fv_message_pack(&message.base, out);
}

void fv_list_response_free(fv_list_response_t *response)
{
    for (uint32_t i = 0; i < response->n_sessions; i++) {
        fv_session_info_free(&response->sessions[i]);
    }
    free(response->sessions);
    *response = (fv_list_response_t){0};
}

/* On failure the caller frees `out`. */
static fv_status_t list_decode(const Fovea__V1__ListSessionsResponse *in, fv_list_response_t *out)
{
    out->n_total = in->n_total;
    FV_RETURN_IF_ERR(fv_message_text("next_page_token", in->next_page_token, out->next_page_token,
                                     sizeof(out->next_page_token)));
    FV_RETURN_IF_ERR(fv_message_count("sessions", in->n_sessions, PAGE_SIZE_MAX));
    out->sessions = fv_message_alloc(in->n_sessions, sizeof(*out->sessions));
    if (out->sessions == NULL) {
        return FV_ERR_NO_MEMORY;
    }
    out->n_sessions = (uint32_t)in->n_sessions;
    for (uint32_t i = 0; i < out->n_sessions; i++) {
        FV_RETURN_IF_ERR(info_decode(in->sessions[i], &out->sessions[i]));
    }
    return FV_OK;
}

fv_status_t fv_wire_list_response_decode(fv_span_t in, fv_list_response_t *out)
{
    ProtobufCMessage *message = NULL;

    *out = (fv_list_response_t){0};
    FV_RETURN_IF_ERR(fv_message_unpack(&fovea__v1__list_sessions_response__descriptor, in,
                                       FV_WIRE_RESPONSE_MAX, &message));
    fv_status_t status = list_decode((Fovea__V1__ListSessionsResponse *)message, out);
    if (status != FV_OK) {
        fv_list_response_free(out);
    }
    fv_message_free(message);
    return status;
}

fv_status_t fv_wire_list_response_encode(const fv_list_response_t *in, fv_bytes_t *out)
{
    Fovea__V1__ListSessionsResponse message = FOVEA__V1__LIST_SESSIONS_RESPONSE__INIT;
    /* one block: the messages, then the pointers to them */
    info_out_t *infos =
        fv_message_alloc(in->n_sessions, sizeof(info_out_t) + sizeof(Fovea__V1__SessionInfo *));

    if (infos == NULL) {
        return FV_ERR_NO_MEMORY;
    }
    Fovea__V1__SessionInfo **list = (void *)(infos + in->n_sessions);
    for (uint32_t i = 0; i < in->n_sessions; i++) {
        info_encode(&in->sessions[i], &infos[i]);
        list[i] = &infos[i].message;
    }
    message.n_sessions = in->n_sessions;
    message.sessions = list;
    message.next_page_token = fv_message_borrow(in->next_page_token);
    message.n_total = in->n_total;
    fv_status_t status = fv_message_pack(&message.base, out);
    free(infos);
    return status;
}
