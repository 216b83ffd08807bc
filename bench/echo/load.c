/*
 * load.c - the load generator: whose turn it is, replies checked, latencies summed up. One thread.
 */
#include "bench/echo/load.h"

#include "bench/echo/load_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now_us(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return ((double)t.tv_sec * 1e6) + ((double)t.tv_nsec * 1e-3);
}

static grpc_byte_buffer *build(fv_load_t *load, uint32_t slot)
{
    fv_load_request_t request = {.n_pieces = 0};
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(NULL, 0);

    load->workload.build(load->workload.ctx, slot, &request);
    for (size_t i = 0; i < request.n_pieces; i++) {
        const fv_span_t *piece = &request.pieces[i];
        grpc_slice_buffer_add(
            &message->data.raw.slice_buffer,
            request.is_copied[i]
                ? grpc_slice_from_copied_buffer((const char *)piece->data, piece->n_bytes)
                : grpc_slice_from_static_buffer(piece->data, piece->n_bytes));
    }
    return message;
}

static void record(fv_load_t *load, double us)
{
    if (load->n_latencies == load->cap) {
        size_t cap = (load->cap == 0U) ? 65536U : (load->cap * 2U);
        double *grown = realloc(load->latencies, cap * sizeof(*grown));
        if (grown == NULL) {
            fv_load_fail(load, "out of memory");
            return;
        }
        load->latencies = grown;
        load->cap = cap;
    }
    load->latencies[load->n_latencies++] = us;
}

/* Reads the reply; the slot it answers, or load->n_slots. */
static uint32_t check(fv_load_t *load, grpc_byte_buffer *reply)
{
    static fv_span_t spans[LOAD_SPANS_MAX];
    grpc_byte_buffer_reader reader;
    grpc_slice *slice = NULL;
    size_t n = 0;
    uint32_t slot = 0;

    (void)grpc_byte_buffer_reader_init(&reader, reply);
    while ((n < LOAD_SPANS_MAX) && (grpc_byte_buffer_reader_peek(&reader, &slice) != 0)) {
        spans[n].data = GRPC_SLICE_START_PTR(*slice);
        spans[n++].n_bytes = GRPC_SLICE_LENGTH(*slice);
    }
    grpc_byte_buffer_reader_destroy(&reader);
    if (!load->workload.check(load->workload.ctx, spans, n, &slot) || (slot >= load->n_slots)) {
        fv_load_fail(load, "a reply is wrong");
        return load->n_slots;
    }
    return slot;
}

/* ------------------------------------------------------------------ stream */

static void stream_send(fv_load_t *load)
{
    grpc_op op = {.op = GRPC_OP_SEND_MESSAGE};

    if (load->is_sending || (load->n_turns == 0U) || load->has_failed) {
        return;
    }
    uint32_t slot = load->turns[load->first_turn];
    load->first_turn = (load->first_turn + 1U) % LOAD_SLOTS_MAX;
    load->n_turns--;
    load->is_sending = true;
    load->stream.sent = build(load, slot);
    op.data.send_message.send_message = load->stream.sent;
    op.flags = (load->n_turns > 0U) ? GRPC_WRITE_BUFFER_HINT : 0U;
    fv_load_start(load, load->stream.call, &op, 1, &load->tag_send);
}

/* ------------------------------------------------------------------ turns */

static void begin_turn(fv_load_t *load, uint32_t slot)
{
    load->n_outstanding++;
    load->slots[slot].begin_us = now_us();
    if (!load->is_stream) {
        fv_load_once_start(load, &load->slots[slot], load->workload.once_method, build(load, slot),
                           &load->slots[slot]);
        return;
    }
    load->turns[(load->first_turn + load->n_turns) % LOAD_SLOTS_MAX] = slot;
    load->n_turns++;
    stream_send(load);
}

static void end_turn(fv_load_t *load, uint32_t slot)
{
    double end_us = now_us();

    load->n_outstanding--;
    if (slot < load->n_slots) {
        record(load, end_us - load->slots[slot].begin_us);
        if ((end_us < load->end_us) && !load->has_failed) {
            begin_turn(load, slot);
        }
    }
}

static void on_reply(fv_load_t *load)
{
    grpc_byte_buffer *reply = load->stream.received;

    load->is_reading = false;
    if (reply == NULL) {
        fv_load_fail(load, "the stream ended");
        return;
    }
    uint32_t slot = check(load, reply);
    grpc_byte_buffer_destroy(reply);
    fv_load_stream_read(load);
    end_turn(load, slot);
}

static void on_once(fv_load_t *load, fv_slot_t *slot)
{
    uint32_t answered = load->n_slots;

    if ((slot->status != GRPC_STATUS_OK) || (slot->received == NULL)) {
        (void)fprintf(stderr, "load: status %d: %.*s\n", (int)slot->status,
                      (int)GRPC_SLICE_LENGTH(slot->details),
                      (const char *)GRPC_SLICE_START_PTR(slot->details));
        fv_load_fail(load, "a call failed");
    } else {
        answered = check(load, slot->received);
    }
    fv_load_once_finish(slot);
    end_turn(load, answered);
}

void fv_load_on_event(fv_load_t *load, void *tag)
{
    if (tag == &load->tag_send) {
        load->is_sending = false;
        grpc_byte_buffer_destroy(load->stream.sent);
        stream_send(load);
    } else if (tag == &load->tag_read) {
        on_reply(load);
    } else if (tag == &load->tag_status) {
        (void)fprintf(stderr, "load: the stream ended with status %d: %.*s\n",
                      (int)load->stream.status, (int)GRPC_SLICE_LENGTH(load->stream.details),
                      (const char *)GRPC_SLICE_START_PTR(load->stream.details));
        fv_load_fail(load, "the stream ended");
    } else if (tag != &load->tag_head) {
        on_once(load, tag);
    }
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a;
    double y = *(const double *)b;

    return (x > y) - (x < y);
}

static void summarise(fv_load_t *load, double seconds, fv_load_result_t *out)
{
    double sum = 0;
    size_t n = load->n_latencies;

    qsort(load->latencies, n, sizeof(double), compare);
    for (size_t i = 0; i < n; i++) {
        sum += load->latencies[i];
    }
    out->n_replies = n;
    out->seconds = seconds;
    out->p50_us = load->latencies[n / 2U];
    out->p99_us = load->latencies[(n * 99U) / 100U];
    out->mean_us = sum / (double)n;
    out->per_second = (double)n / seconds;
}

bool fv_load_run(fv_load_t *load, double seconds, fv_load_result_t *out)
{
    double begin_us = now_us();

    load->n_latencies = 0;
    load->end_us = begin_us + (seconds * 1e6);
    for (uint32_t slot = 0; slot < load->n_slots; slot++) {
        begin_turn(load, slot);
    }
    while ((load->n_outstanding > 0U) && !load->has_failed) {
        grpc_event event = fv_load_next(load);
        if (event.type == GRPC_OP_COMPLETE) {
            fv_load_on_event(load, event.tag);
        } else {
            fv_load_fail(load, "no event for a minute");
        }
    }
    if (load->has_failed || (load->n_latencies == 0U)) {
        return false;
    }
    summarise(load, (now_us() - begin_us) * 1e-6, out);
    return true;
}
