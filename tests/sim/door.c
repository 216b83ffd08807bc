/*
 * door.c - coord/rpc.h without gRPC: messages come late and overtake each other, answers are counted.
 *
 * Laws: every message that was handed over is answered exactly once, within a time, unless the coordinator dies or the client
 * has left; what is answered was asked.
 */
#include "tests/sim/job.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ANSWER_US \
    (60 * SIM_SECOND) /* longer than all deadlines in a row, stops and partitions included */
#define UNAVAILABLE 14

struct fv_rpc {
    fv_rpc_handlers_t handlers;
    bool is_closed;
};

struct fv_call {
    struct fv_call *next;
    uint64_t handle;
    fv_method_t method;
    sim_caller_t caller;
    fv_principal_t *principal;
    void *user;
    int n_refs, n_answers;
    uint32_t n_start; /* of the job, that it was handed over to; 0: not yet */
    bool is_closed;   /* the client has left */
    bool is_told;     /* the client has heard, or will not */
    sim_answer_t answer;
    size_t n_bytes;
    uint8_t data[];
};

static struct {
    fv_rpc_t *rpc; /* of the coordinator that lives */
    bool is_serving;
    fv_call_t *calls;
    uint64_t next_handle;
} d;

/* ------------------------------------------------------------------ what the engine calls */

void fv_call_ref(fv_call_t *call)
{
    call->n_refs++;
}

void fv_call_unref(fv_call_t *call)
{
    if (--call->n_refs < 0) {
        sim_fail("a call was let go of too often");
    }
}

bool fv_call_is_closed(const fv_call_t *call)
{
    return call->is_closed;
}

fv_method_t fv_call_method(const fv_call_t *call)
{
    return call->method;
}

fv_principal_t *fv_call_principal(const fv_call_t *call)
{
    return call->principal;
}

void fv_call_step_aside(fv_call_t *call)
{
    (void)call; /* there is one thread here */
}

void fv_call_step_back(fv_call_t *call)
{
    (void)call;
}

fv_status_t fv_call_recheck(const fv_call_t *call)
{
    (void)call;
    return FV_OK;
}

void fv_call_end_request(fv_call_t *call)
{
    if (call->principal != NULL) {
        fv_principal_end_request(call->principal);
    }
}

void *fv_call_user(const fv_call_t *call)
{
    return call->user;
}

void fv_call_set_user(fv_call_t *call, void *user)
{
    call->user = user;
}

static void tell(void *a, uint64_t b)
{
    fv_call_t *call = a;

    (void)b;
    if (!call->is_told) {
        call->is_told = true;
        call->caller.on_answer(call->caller.arg, call->caller.tag, &call->answer);
    }
}

static void note_answer(fv_call_t *call)
{
    call->n_answers++;
    if ((call->n_answers > 1) && !call->is_closed) {
        sim_fail("call %llu of method %d has %d answers", (unsigned long long)call->handle,
                 (int)call->method, call->n_answers);
    }
    if (!call->is_closed) {
        sim_at(sim_now_us() + sim_pick(20, 2000), tell, call, 0);
    }
}

void fv_call_reply(fv_call_t *call, const fv_reply_piece_t *pieces, size_t n_pieces)
{
    size_t n_bytes = 0;
    uint8_t *data = NULL;

    sim_call();
    for (size_t i = 0; i < n_pieces; i++) {
        n_bytes += pieces[i].n_bytes;
    }
    data = sim_alloc(n_bytes + 1U);
    n_bytes = 0;
    for (size_t i = 0; i < n_pieces; i++) {
        memcpy(data + n_bytes, pieces[i].data, pieces[i].n_bytes);
        n_bytes += pieces[i].n_bytes;
        if (pieces[i].release != NULL) {
            pieces[i].release(pieces[i].arg);
        }
    }
    sim_free((void *)(uintptr_t)call->answer.data);
    call->answer = (sim_answer_t){.data = data, .n_bytes = n_bytes};
    note_answer(call);
}

void fv_call_fail(fv_call_t *call, int32_t grpc_code, const char *message)
{
    sim_call();
    if (grpc_code == 0) {
        sim_fail("a failure with code 0");
    }
    call->answer.code = grpc_code;
    (void)snprintf(call->answer.text, sizeof(call->answer.text), "%s", message);
    note_answer(call);
}

fv_status_t
fv_rpc_start(const fv_rpc_config_t *config, const fv_rpc_handlers_t *handlers, fv_rpc_t **out)
{
    (void)config;
    d.rpc = calloc(1, sizeof(*d.rpc));
    if (d.rpc == NULL) {
        return FV_ERR_NO_MEMORY;
    }
    d.rpc->handlers = *handlers;
    d.is_serving = false;
    *out = d.rpc;
    return FV_OK;
}

int32_t fv_rpc_n_addresses(const fv_rpc_t *rpc)
{
    (void)rpc;
    return 0;
}

const char *fv_rpc_address(const fv_rpc_t *rpc, int32_t i)
{
    (void)rpc;
    (void)i;
    return "";
}

bool fv_rpc_address_has_tls(const fv_rpc_t *rpc, int32_t i)
{
    (void)rpc;
    (void)i;
    return false;
}

void fv_rpc_set_serving(fv_rpc_t *rpc, bool is_serving)
{
    (void)rpc;
    d.is_serving = is_serving;
}

/* ------------------------------------------------------------------ the end of a coordinator */

static void tell_unavailable(fv_call_t *call)
{
    call->answer.code = UNAVAILABLE;
    (void)snprintf(call->answer.text, sizeof(call->answer.text), "the connection is gone");
    sim_at(sim_now_us() + sim_pick(20, 20000), tell, call, 0);
}

/* An answer that is on its way may still come, or not. */
void sim_door_drop(void)
{
    d.rpc = NULL;
    for (fv_call_t *call = d.calls; call != NULL; call = call->next) {
        if ((call->n_start == 0) || call->is_told) {
            continue;
        }
        if (call->n_answers == 0) {
            call->n_answers = 1;
            tell_unavailable(call);
        } else if (sim_chance(2)) { /* it had not left the host */
            call->answer.code = UNAVAILABLE;
        }
    }
}

void fv_rpc_stop(fv_rpc_t *rpc, uint32_t grace_ms)
{
    (void)grace_ms;
    rpc->is_closed = true;
}

void fv_rpc_destroy(fv_rpc_t *rpc)
{
    for (fv_call_t *call = d.calls; call != NULL; call = call->next) {
        if ((call->n_start == sim_job_n_starts()) && !call->is_told && (call->n_answers == 0)) {
            sim_fail("call %llu of method %d was never answered", (unsigned long long)call->handle,
                     (int)call->method);
        }
    }
    d.rpc = NULL;
    free(rpc);
}

/* ------------------------------------------------------------------ clients */

static void expect_answer(void *a, uint64_t n_start)
{
    const fv_call_t *call = a;

    if ((call->n_start == n_start) && (call->n_answers == 0) && !call->is_closed &&
        (n_start == sim_job_n_starts())) {
        sim_fail("call %llu of method %d is not answered after %lld s",
                 (unsigned long long)call->handle, (int)call->method,
                 (long long)(ANSWER_US / SIM_SECOND));
    }
}

static void hand_over(void *a, uint64_t b)
{
    fv_call_t *call = a;
    sim_process_t *coordinator = sim_process(0);

    (void)b;
    if (call->is_closed) {
        return;
    }
    if ((coordinator != NULL) && (sim_stopped_until(0) > sim_now_us())) {
        sim_at(sim_stopped_until(0) + sim_pick(1, 100), hand_over, call, 0);
        return;
    }
    if ((coordinator == NULL) || (d.rpc == NULL) || d.rpc->is_closed) {
        tell_unavailable(call);
        return;
    }
    fv_span_t spans[2] = {
        {.data = call->data, .n_bytes = (size_t)sim_pick(0, (int64_t)call->n_bytes)}};
    spans[1] = (fv_span_t){.data = call->data + spans[0].n_bytes,
                           .n_bytes = call->n_bytes - spans[0].n_bytes};
    call->n_start = sim_job_n_starts();
    sim_at(sim_now_us() + ANSWER_US, expect_answer, call, call->n_start);
    sim_process_t *before = sim_enter(coordinator);
    char name[16];
    (void)snprintf(name, sizeof(name), "p%u", call->caller.principal);
    call->principal = fv_auth_principal(sim_job_process(0)->auth, name);
    d.rpc->handlers.on_message(d.rpc->handlers.ctx, call, call->method, spans, 2, sim_now_us(),
                               SIM_NEVER);
    (void)sim_enter(before);
}

uint64_t
sim_door_send(fv_method_t method, const void *data, size_t n_bytes, const sim_caller_t *caller)
{
    fv_call_t *call = sim_alloc(sizeof(*call) + n_bytes);

    memset(call, 0, sizeof(*call));
    call->handle = ++d.next_handle;
    call->method = method;
    call->caller = *caller;
    call->n_bytes = n_bytes;
    if (n_bytes > 0) {
        memcpy(call->data, data, n_bytes);
    }
    call->next = d.calls;
    d.calls = call;
    sim_at(sim_now_us() + sim_pick(20, 3000), hand_over, call, 0);
    return call->handle;
}

void sim_door_cancel(uint64_t handle)
{
    for (fv_call_t *call = d.calls; call != NULL; call = call->next) {
        if (call->handle == handle) {
            call->is_closed = true;
            call->is_told = true;
            if ((d.rpc != NULL) && (call->n_start == sim_job_n_starts()) && (call->n_start != 0)) {
                sim_process_t *before = sim_enter(sim_process(0));
                d.rpc->handlers.on_closed(d.rpc->handlers.ctx, call);
                (void)sim_enter(before);
            }
        }
    }
}

void sim_door_begin(void)
{
    memset(&d, 0, sizeof(d));
}

void sim_door_end(void)
{
    while (d.calls != NULL) {
        fv_call_t *next = d.calls->next;
        sim_free((void *)(uintptr_t)d.calls->answer.data);
        sim_free(d.calls);
        d.calls = next;
    }
}
