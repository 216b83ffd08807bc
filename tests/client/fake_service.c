/*
 * fake_service.c - see fake_service.h.
 */
#include "tests/client/fake_service.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint8_t *gather(const fv_span_t *spans, size_t n_spans, fv_region_t region)
{
    uint8_t *data = malloc(region.n_bytes + 1);

    if (data == NULL) {
        abort();
    }
    fv_wire_gather(spans, n_spans, region, data);
    return data;
}

/* Sends the answer; q and k become the reply's. */
static void answer(const fv_fake_t *f, fv_fake_held_t *h)
{
    fv_attend_response_t response = {.request_id = h->request_id,
                                     .timings = {1, 2, 3, 4},
                                     .lse_bytes = h->k_bytes,
                                     .out_bytes = h->q_bytes};
    uint8_t head[FV_WIRE_HEAD_BYTES];
    size_t n_before = 0;
    size_t n_head = 0;

    if (f->mode == FV_FAKE_WRONG_ID) {
        response.request_id += 1000;
    }
    if (f->mode == FV_FAKE_SHORT) {
        response.out_bytes -= 4;
    }
    fv_wire_attend_response_encode(&response, head, &n_before, &n_head);
    fv_reply_piece_t pieces[4] = {{head, n_before, NULL, NULL},
                                  {h->k, response.lse_bytes, free, h->k},
                                  {head + n_before, n_head - n_before, NULL, NULL},
                                  {h->q, response.out_bytes, free, h->q}};
    fv_call_reply(h->call, pieces, 4);
}

static void hold(fv_fake_t *f, const fv_fake_held_t *h)
{
    fv_call_ref(h->call);
    (void)pthread_mutex_lock(&f->lock);
    f->held[f->n_held % FV_FAKE_HELD_MAX] = *h;
    f->n_held++;
    (void)pthread_mutex_unlock(&f->lock);
    if ((f->mode == FV_FAKE_REVERSE) && (f->n_held == f->n_collect)) {
        while (f->n_held > 0) {
            f->n_held--;
            answer(f, &f->held[f->n_held]);
            fv_call_unref(f->held[f->n_held].call);
        }
    }
}

static void answer_as_told(fv_fake_t *f, fv_fake_held_t *h)
{
    fv_fake_held_t again = *h;

    switch (f->mode) {
    case FV_FAKE_REVERSE:
    case FV_FAKE_HOLD:
        hold(f, h);
        return;
    case FV_FAKE_GARBAGE: {
        fv_reply_piece_t piece = {"\xFF\xFF\xFF\xFF garbage", 12, NULL, NULL};
        fv_call_reply(h->call, &piece, 1);
        break;
    }
    case FV_FAKE_END_STREAM:
        fv_call_fail(h->call, 14, "going away");
        break;
    case FV_FAKE_TWICE:
        again.q = gather(&(fv_span_t){h->q, h->q_bytes}, 1, (fv_region_t){0, h->q_bytes});
        again.k = gather(&(fv_span_t){h->k, h->k_bytes}, 1, (fv_region_t){0, h->k_bytes});
        answer(f, &again);
        answer(f, h);
        return;
    case FV_FAKE_ECHO:
    case FV_FAKE_WRONG_ID:
    case FV_FAKE_SHORT:
        answer(f, h);
        return;
    }
    free(h->q);
    free(h->k);
}

static void on_message(void *ctx,
                       fv_call_t *call,
                       fv_method_t method,
                       const fv_span_t *spans,
                       size_t n_spans,
                       int64_t received_us,
                       int64_t deadline_us)
{
    fv_fake_t *f = ctx;
    fv_fake_held_t h = {.call = call};
    fv_attend_request_t request = {0};
    fv_attend_item_t items[16];

    if ((method != FV_METHOD_ATTEND) && (method != FV_METHOD_ATTEND_ONCE)) {
        fv_reply_piece_t piece = {"\xFF\xFF\xFF\xFF garbage", 12, NULL, NULL};
        (void)pthread_mutex_lock(&f->lock);
        f->n_others++;
        (void)pthread_mutex_unlock(&f->lock);
        if (f->mode == FV_FAKE_END_STREAM) {
            fv_call_fail(call, 14, "going away");
        } else {
            fv_call_reply(call, &piece, 1);
        }
        return;
    }
    if (fv_wire_attend_request_scan(spans, n_spans, &request, items, 16) != FV_OK) {
        fv_call_fail(call, 3, fv_error_context());
        return;
    }
    (void)pthread_mutex_lock(&f->lock);
    f->n_requests++;
    f->last = request;
    memcpy(f->last_items, items, sizeof(items));
    f->last_left_us = (deadline_us == INT64_MAX) ? INT64_MAX : (deadline_us - received_us);
    (void)pthread_mutex_unlock(&f->lock);
    h.request_id = request.request_id;
    h.q = gather(spans, n_spans, request.q);
    h.q_bytes = request.q.n_bytes;
    h.k = gather(spans, n_spans, request.k);
    h.k_bytes = request.k.n_bytes;
    answer_as_told(f, &h);
}

static void on_closed(void *ctx, fv_call_t *call)
{
    (void)ctx;
    (void)call;
}

fv_status_t fv_fake_start(fv_fake_t *f, const char *address)
{
    fv_rpc_config_t config = {.listen = {address},
                              .n_listen = 1,
                              .message_bytes_max = 256U << 20U,
                              .stream_inflight_max = FV_FAKE_HELD_MAX,
                              .connection_streams_max = 100,
                              .memory_bytes_max = 512U << 20U};
    fv_rpc_handlers_t handlers = {.ctx = f, .on_message = on_message, .on_closed = on_closed};

    memset(f, 0, sizeof(*f));
    (void)pthread_mutex_init(&f->lock, NULL);
    return fv_rpc_start(&config, &handlers, &f->rpc);
}

void fv_fake_stop(fv_fake_t *f)
{
    fv_rpc_stop(f->rpc, 0);
    for (int i = 0; i < f->n_held; i++) {
        fv_call_unref(f->held[i].call);
        free(f->held[i].q);
        free(f->held[i].k);
    }
    fv_rpc_destroy(f->rpc);
    (void)pthread_mutex_destroy(&f->lock);
}

int fv_fake_n_requests(fv_fake_t *f)
{
    int n = 0;

    (void)pthread_mutex_lock(&f->lock);
    n = f->n_requests;
    (void)pthread_mutex_unlock(&f->lock);
    return n;
}
