/*
 * engine_reply.c - answers: encoded heads around pooled tensors, nothing copied.
 *
 * Decode path: station 10 of 10. Before: coord/engine_step.c. After: coord/rpc_call.c sends it.
 */
#include "common/fault.h"
#include "coord/engine_internal.h"

#include <stdlib.h>

static void free_bytes(void *data)
{
    free(data);
}

void fv_reply_bytes(fv_call_t *call, fv_bytes_t *bytes)
{
    fv_reply_piece_t piece = {
        .data = bytes->data, .n_bytes = bytes->n_bytes, .release = free_bytes, .arg = bytes->data};

    fv_call_reply(call, &piece, (bytes->n_bytes > 0) ? 1U : 0U);
    if (bytes->n_bytes == 0) {
        free(bytes->data);
    }
    *bytes = (fv_bytes_t){0};
}

void fv_reply_error(fv_call_t *call, fv_status_t status)
{
    fv_call_fail(call, fv_status_grpc(status), fv_error_context());
}

/* A failure: on a stream it is a message of its own and the stream goes on; a unary call ends with it. */
static void reply_failure(fv_call_t *call,
                          fv_method_t method,
                          uint64_t request_id,
                          const fv_error_t *error,
                          const fv_timings_t *timings)
{
    uint8_t head[FV_WIRE_HEAD_BYTES];
    size_t n_before_lse = 0;
    size_t n_head = 0;

    if (method != FV_METHOD_ATTEND) {
        fv_call_fail(call, fv_status_grpc((fv_status_t)error->status), error->text);
        return;
    }
    fv_attend_response_t response = {.request_id = request_id,
                                     .code = fv_status_grpc((fv_status_t)error->status),
                                     .message = error->text,
                                     .timings = *timings};
    fv_wire_attend_response_encode(&response, head, &n_before_lse, &n_head);
    fv_reply_piece_t piece = {.data = head, .n_bytes = n_head};
    fv_call_reply(call, &piece, 1);
}

void fv_reply_refused(fv_call_t *call, fv_method_t method, uint64_t request_id, fv_status_t status)
{
    fv_error_t error = fv_error_capture(status);

    reply_failure(call, method, request_id, &error, &(fv_timings_t){0});
}

static uint32_t clamp_us(int64_t us)
{
    return (us < 0) ? 0U : ((us > UINT32_MAX) ? UINT32_MAX : (uint32_t)us);
}

static void reply_results(fv_job_t *job)
{
    uint8_t head[FV_WIRE_HEAD_BYTES];
    size_t n_before_lse = 0;
    size_t n_head = 0;
    fv_attend_response_t response = {.request_id = job->request.head.request_id,
                                     .timings = job->timings,
                                     .durability = fv_ledger_durability(job->ledger),
                                     .lse_bytes = job->lse_bytes,
                                     .out_bytes = job->out_bytes};
    fv_reply_piece_t pieces[4];
    size_t n = 0;

    fv_wire_attend_response_encode(&response, head, &n_before_lse, &n_head);
    pieces[n++] = (fv_reply_piece_t){.data = head, .n_bytes = n_before_lse};
    if (job->lse_bytes > 0) {
        pieces[n++] = (fv_reply_piece_t){.data = job->tensors.lse,
                                         .n_bytes = job->lse_bytes,
                                         .release = fv_staging_give,
                                         .arg = job->tensors.lse};
        job->tensors.lse = NULL; /* lent */
    }
    pieces[n++] = (fv_reply_piece_t){.data = head + n_before_lse, .n_bytes = n_head - n_before_lse};
    pieces[n++] = (fv_reply_piece_t){.data = job->tensors.out,
                                     .n_bytes = job->out_bytes,
                                     .release = fv_staging_give,
                                     .arg = job->tensors.out};
    job->tensors.out = NULL; /* lent */
    fv_fault_point(10);
    fv_call_reply(job->entry.call, pieces, n);
}

void fv_reply_job(fv_engine_t *engine, fv_job_t *job, int64_t now_us)
{
    fv_request_t *request = &job->request;

    job->timings.total_us = clamp_us(now_us - request->received_us);
    fv_entry_end_request(&job->entry);
    if (request->error.status == FV_OK) {
        engine->n_done++;
        reply_results(job);
    } else {
        engine->n_failed++;
        for (uint32_t i = 0; i < request->head.n_items; i++) {
            fv_engine_explain_loss(engine, request->principal, &request->items[i].session,
                                   &request->error);
        }
        reply_failure(job->entry.call, job->entry.method, request->head.request_id, &request->error,
                      &job->timings);
    }
    fv_job_release(job);
}
