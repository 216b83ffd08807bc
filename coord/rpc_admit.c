/*
 * rpc_admit.c - who may call: decided from a call's metadata, before any of its messages is read.
 */
#include "common/clock.h"
#include "common/log.h"
#include "coord/rpc_call.h"

#include <string.h>

#define LOG_EVERY_US 1000000 /* refusals are counted, not listed */

/* The value of `authorization`; false when it is there twice. */
static bool find_header(const grpc_metadata_array *metadata, const char **out, size_t *out_n)
{
    *out = NULL;
    for (size_t i = 0; i < metadata->count; i++) {
        const grpc_metadata *m = &metadata->metadata[i];
        if (grpc_slice_str_cmp(m->key, "authorization") != 0) {
            continue;
        }
        if (*out != NULL) {
            return false;
        }
        *out = (const char *)GRPC_SLICE_START_PTR(m->value);
        *out_n = GRPC_SLICE_LENGTH(m->value);
    }
    return true;
}

static fv_status_t check_role(const fv_call_t *call)
{
    if ((call->method->access == FV_ACCESS_ADMIN) &&
        !fv_principal_is_admin(call->grant->principal)) {
        return fv_fail(FV_ERR_PERMISSION, "%s: given role user, expected admin",
                       strrchr(call->method->path, '/') + 1);
    }
    return FV_OK;
}

static fv_status_t check_token(fv_call_t *call)
{
    fv_auth_t *auth = call->calls->auth;
    const char *header = NULL;
    size_t n_chars = 0;

    if (!find_header(&call->metadata, &header, &n_chars)) {
        return fv_fail(FV_ERR_UNAUTHENTICATED, "authorization: given twice, expected once");
    }
    FV_RETURN_IF_ERR(fv_auth_check(auth, header, n_chars, &call->grant));
    return check_role(call);
}

/* Requests that count for quotas are refused before their payload comes; a stream's messages are checked one by one. */
static fv_status_t check_quota(const fv_call_t *call)
{
    if ((call->method->kind != FV_CALL_UNARY) || (call->method->access != FV_ACCESS_USER)) {
        return FV_OK;
    }
    return fv_principal_check_request(call->grant->principal, fv_clock_us());
}

static void log_refusal(fv_calls_t *calls, const char *why)
{
    int64_t now_us = fv_clock_us();

    calls->n_refused++;
    if (now_us - calls->refused_logged_us >= LOG_EVERY_US) {
        fv_warn("refused %llu call%s; the last: %s", (unsigned long long)calls->n_refused,
                (calls->n_refused == 1U) ? "" : "s", why);
        calls->refused_logged_us = now_us;
        calls->n_refused = 0;
    }
}

bool fv_call_is_health(const fv_call_t *call)
{
    return (call->method != NULL) && (call->method->access == FV_ACCESS_ANYBODY);
}

/* Probes are not kept out by a crowd of other calls, nor can they, open to everybody, keep those out. The call itself is counted. */
static fv_status_t check_health_calls(const fv_calls_t *calls)
{
    if ((calls->health_calls_max > 0) && (calls->n_health > (size_t)calls->health_calls_max)) {
        return fv_fail(FV_ERR_EXHAUSTED,
                       "health: %d calls are open, the most this service allows (health_calls_max)",
                       (int)calls->health_calls_max);
    }
    return FV_OK;
}

fv_status_t fv_call_admit(fv_call_t *call)
{
    fv_calls_t *calls = call->calls;

    if (fv_call_is_health(call)) {
        return check_health_calls(calls);
    }
    if ((calls->calls_max > 0) && (calls->n_live - calls->n_health > (size_t)calls->calls_max)) {
        return fv_fail(FV_ERR_EXHAUSTED,
                       "calls: %d are open, the most this service allows (calls_max)",
                       (int)calls->calls_max);
    }
    if (calls->auth == NULL) {
        return FV_OK;
    }
    fv_status_t status = check_token(call);
    if (status == FV_OK) {
        status = check_quota(call);
    } else {
        log_refusal(calls, fv_error_context());
    }
    if ((status != FV_OK) && (call->grant != NULL)) {
        fv_principal_charge(call->grant->principal, 0, fv_clock_us());
    }
    return status;
}

void fv_call_charge(const fv_call_t *call, int64_t now_us)
{
    const fv_span_list_t *list = &call->calls->spans;
    int method = call->method->method;
    uint64_t n_bytes = 0;

    /* attention is charged where a request of it begins (coord/engine_inbox.c) */
    if ((call->grant == NULL) || (call->method->access != FV_ACCESS_USER) ||
        (method == FV_METHOD_ATTEND) || (method == FV_METHOD_ATTEND_ONCE)) {
        return;
    }
    for (size_t i = 0; i < list->n_spans; i++) {
        n_bytes += list->spans[i].n_bytes;
    }
    fv_principal_charge(call->grant->principal, n_bytes, now_us);
}

fv_status_t fv_call_recheck(const fv_call_t *call)
{
    if (call->grant == NULL) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(fv_auth_recheck(call->calls->auth, call->grant));
    return check_role(call);
}

fv_principal_t *fv_call_principal(const fv_call_t *call)
{
    return (call->grant == NULL) ? NULL : call->grant->principal;
}
