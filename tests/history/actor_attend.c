/*
 * actor_attend.c - attend requests: several at once on a stream; what has no sure answer is repeated alone until it has.
 */
#include "tests/history/history.h"

#include <string.h>

#define WAIT_MS 120000

static bool is_sure(fovea_code_t code)
{
    return (code != FOVEA_UNAVAILABLE) && (code != FOVEA_CANCELLED) &&
           (code != FOVEA_DEADLINE_EXCEEDED);
}

/* Usually the next append, else one once more, with other bytes, or at a wrong position. */
static void add_item(hs_actor_t *a, hs_request_t *r, hs_session_t *s)
{
    hs_item_t *at = &r->items[r->n_items++];
    const hs_layer_t *l = &s->layers[r->layer];
    int64_t dice = hs_pick(a, 0, 19);

    s->is_busy = true;
    at->session = s;
    at->n_tokens = (uint32_t)((hs_pick(a, 0, 5) == 0) ? hs_pick(a, 1, HS_PIECE_MAX) : 1);
    at->position = l->n_tokens;
    for (uint32_t t = 0; t < HS_PIECE_MAX; t++) {
        at->tokens[t] = a->next_token++;
    }
    if (!r->append) {
        at->position = (uint32_t)hs_pick(a, 0, l->n_tokens);
    } else if (((dice < 3) && (l->n_log > 0)) || (l->n_tokens + at->n_tokens > HS_TOKENS_MAX)) {
        uint32_t i = (uint32_t)hs_pick(a, 0, (int64_t)l->n_log - 1);
        at->position = l->log[i].position;
        at->n_tokens = l->log[i].n_tokens;
        if (dice != 0) {
            memcpy(at->tokens, &l->tokens[at->position], at->n_tokens * sizeof(uint32_t));
            atomic_fetch_add(&a->world->n_repeats, 1);
        }
    } else if (dice == 3) {
        at->position += (uint32_t)hs_pick(a, 1, 3);
    }
}

static bool make_request(hs_actor_t *a, hs_request_t *r)
{
    hs_session_t *s = hs_pick_session(a, true);

    if (s == NULL) {
        return false;
    }
    r->layer = (uint32_t)hs_pick(a, 0, HS_LAYERS - 1);
    r->n_items = 0;
    r->append = hs_pick(a, 0, 7) != 0;
    r->is_unsure = false;
    add_item(a, r, s);
    s = (hs_pick(a, 0, 3) == 0) ? hs_pick_session(a, true) : NULL;
    if (s != NULL) {
        add_item(a, r, s);
    }
    hs_fill(r, &a->random);
    return true;
}

/* No room, and it may have been made before: each of its sessions is asked. */
static void settle(hs_actor_t *a, hs_request_t *r)
{
    uint32_t n = r->n_items;

    for (uint32_t i = 0; i < n; i++) {
        if (i > 0) {
            r->items[0] = r->items[i];
        }
        r->n_items = 1;
        (void)hs_check_session(a, r->items[0].session, r);
        r->items[0].session->is_busy = false;
    }
    r->n_items = n;
}

/* A sure answer. */
static void take(hs_actor_t *a, hs_request_t *r, const fovea_error_t *error)
{
    fovea_code_t expected = FOVEA_OK;
    bool is_expected = false;

    for (uint32_t i = 0; i < r->n_items; i++) {
        fovea_code_t code = hs_expect(r, i);
        expected = (expected == FOVEA_OK) ? code : expected;
        is_expected = is_expected || ((code == error->code) && (code != FOVEA_OK));
    }
    if (error->code == FOVEA_OK) {
        if (expected != FOVEA_OK) {
            hs_fail(a, "a request is served, expected %s", fovea_code_name(expected));
            return;
        }
        hs_apply(r);
        if (!hs_is_right(r)) {
            hs_fail(a, "layer %u, position %u, %u tokens: another answer than the model's",
                    r->layer, r->items[0].position, r->items[0].n_tokens);
        }
        atomic_fetch_add(&a->world->n_served, 1);
    } else if (is_expected) {
        atomic_fetch_add(&a->world->n_refused, 1);
    } else if ((error->code == FOVEA_RESOURCE_EXHAUSTED) && (expected == FOVEA_OK)) {
        atomic_fetch_add(&a->world->n_exhausted, 1);
        if (r->is_unsure) {
            settle(a, r);
        }
    } else {
        hs_fail(a, "a request answers %s, expected %s: %s", fovea_code_name(error->code),
                fovea_code_name(expected), error->message);
    }
}

/* Until its answer is sure. Sometimes with so little time that it is not. */
static void repeat(hs_actor_t *a, hs_request_t *r)
{
    fovea_error_t error = {FOVEA_UNAVAILABLE, ""};

    for (int tries = 0; !is_sure(error.code) && !atomic_load(&a->world->has_failed); tries++) {
        fovea_attend_request_t message = hs_message(r);
        error = (fovea_error_t){FOVEA_OK, ""};
        (void)fovea_attend(a->client, &message, WAIT_MS, NULL, &error);
        if (tries == 100) {
            hs_fail(a, "no answer after %d tries: %s", tries, error.message);
        }
    }
    if (!atomic_load(&a->world->has_failed)) {
        take(a, r, &error);
    }
}

static void end_request(hs_request_t *r)
{
    for (uint32_t i = 0; i < r->n_items; i++) {
        r->items[i].session->is_busy = false;
    }
}

/* All answers of the stream's requests; those that are not sure are marked. */
static void collect(hs_actor_t *a, uint32_t n)
{
    fovea_result_t result;
    fovea_error_t error;

    for (uint32_t i = 0; (i < n) && !atomic_load(&a->world->has_failed); i++) {
        if (fovea_stream_poll(a->stream, WAIT_MS, &result, &error) != FOVEA_OK) {
            hs_fail(a, "the stream: %s", error.message);
            return;
        }
        hs_request_t *r = result.user;
        if (is_sure(result.error.code)) {
            take(a, r, &result.error);
            end_request(r);
        } else {
            r->is_unsure = true;
            atomic_fetch_add(&a->world->n_unsure, 1);
        }
    }
}

static bool open_stream(hs_actor_t *a)
{
    fovea_error_t error;

    if ((a->stream == NULL) &&
        (fovea_stream_open(a->client, NULL, &a->stream, &error) != FOVEA_OK)) {
        hs_fail(a, "a stream: %s", error.message);
    }
    return a->stream != NULL;
}

/* It cancels its stream, or goes away altogether, with requests in flight. */
static void disturb(hs_actor_t *a, uint32_t n)
{
    int64_t dice = hs_pick(a, 0, 999);

    if (dice < 3) {
        atomic_fetch_add(&a->world->n_cancels, 1);
        fovea_stream_cancel(a->stream);
        collect(a, n);
    } else if (dice < 5) {
        atomic_fetch_add(&a->world->n_vanished, 1);
        for (uint32_t i = 0; i < n; i++) {
            a->requests[i].is_unsure = true;
        }
    } else {
        collect(a, n);
        return;
    }
    fovea_stream_close(a->stream);
    a->stream = NULL;
    if (dice >= 3) {
        fovea_close(a->client);
        a->client = NULL;
        (void)hs_connect(a);
    }
}

uint32_t hs_attend_some(hs_actor_t *a)
{
    uint32_t n_wanted = (uint32_t)hs_pick(a, 1, 8);
    uint32_t n = 0;
    fovea_error_t error;

    if (!open_stream(a)) {
        return 0;
    }
    while ((n < n_wanted) && make_request(a, &a->requests[n])) {
        hs_request_t *r = &a->requests[n];
        fovea_attend_request_t message = hs_message(r);
        if (fovea_stream_submit(a->stream, &message, NULL, r, NULL, &error) != FOVEA_OK) {
            end_request(r); /* it is not sent: the stream has broken */
            break;
        }
        n++;
    }
    disturb(a, n);
    for (uint32_t i = 0; i < n; i++) {
        if (a->requests[i].is_unsure && !atomic_load(&a->world->has_failed)) {
            repeat(a, &a->requests[i]);
            end_request(&a->requests[i]);
        }
    }
    if ((n < n_wanted) && (n == 0) && (a->stream != NULL)) {
        fovea_stream_close(a->stream);
        a->stream = NULL;
    }
    return n;
}
