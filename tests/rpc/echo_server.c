/*
 * echo_server.c - the counting echo behind the door under test.
 */
#include "tests/rpc/echo_server.h"

#include "tests/support/test.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define HEAD_BYTES 5U

struct fv_echo_message {
    fv_echo_message_t *next;
    fv_echo_t *echo;
    fv_call_t *call;
    size_t n_bytes;
    uint8_t bytes[];
};

static void release(void *arg)
{
    fv_echo_message_t *message = arg;
    fv_echo_t *echo = message->echo;

    (void)pthread_mutex_lock(&echo->lock);
    echo->n_released++;
    echo->n_live--;
    (void)pthread_cond_broadcast(&echo->changed);
    (void)pthread_mutex_unlock(&echo->lock);
    free(message);
}

static void answer(fv_echo_message_t *message)
{
    fv_echo_t *echo = message->echo;
    size_t n_head = (message->n_bytes < HEAD_BYTES) ? message->n_bytes : HEAD_BYTES;
    fv_reply_piece_t pieces[2] = {
        {.data = message->bytes, .n_bytes = n_head},
        {.data = message->bytes + n_head,
         .n_bytes = message->n_bytes - n_head,
         .release = release,
         .arg = message},
    };
    fv_call_t *call = message->call;

    (void)pthread_mutex_lock(&echo->lock);
    echo->n_answered++;
    echo->n_referenced++;
    echo->n_live++;
    if (echo->n_live > echo->n_live_max) {
        echo->n_live_max = echo->n_live;
    }
    (void)pthread_cond_broadcast(&echo->changed);
    (void)pthread_mutex_unlock(&echo->lock);
    fv_call_end_request(call);
    fv_call_reply(call, pieces, 2);
    fv_call_unref(call);
}

static fv_echo_message_t *take(fv_echo_t *echo)
{
    (void)pthread_mutex_lock(&echo->lock);
    fv_echo_message_t *message = echo->first;
    if (message != NULL) {
        echo->first = message->next;
    }
    (void)pthread_mutex_unlock(&echo->lock);
    return message;
}

void fv_echo_answer_held(fv_echo_t *echo)
{
    for (fv_echo_message_t *m = take(echo); m != NULL; m = take(echo)) {
        answer(m);
    }
}

fv_call_t *fv_echo_take(fv_echo_t *echo)
{
    fv_echo_message_t *message = take(echo);
    fv_call_t *call = (message == NULL) ? NULL : message->call;

    free(message);
    return call;
}

bool fv_echo_first_is_closed(fv_echo_t *echo)
{
    (void)pthread_mutex_lock(&echo->lock);
    bool is_closed = (echo->first != NULL) && fv_call_is_closed(echo->first->call);
    (void)pthread_mutex_unlock(&echo->lock);
    return is_closed;
}

/* What a large message's copy is: it takes as long as the test says. */
static void be_aside(fv_echo_t *echo, fv_call_t *call)
{
    fv_call_step_aside(call);
    (void)pthread_mutex_lock(&echo->lock);
    int64_t until = echo->aside_until;
    echo->n_aside++;
    (void)pthread_cond_broadcast(&echo->changed);
    (void)pthread_mutex_unlock(&echo->lock);
    bool is_reached = fv_echo_wait(echo, &echo->n_delivered, until);
    (void)pthread_mutex_lock(&echo->lock);
    echo->n_aside_in_vain += is_reached ? 0 : 1;
    (void)pthread_mutex_unlock(&echo->lock);
    fv_call_step_back(call);
}

static void on_message(void *ctx,
                       fv_call_t *call,
                       fv_method_t method,
                       const fv_span_t *spans,
                       size_t n_spans,
                       int64_t received_us,
                       int64_t deadline_us)
{
    fv_echo_t *echo = ctx;
    size_t n_bytes = 0;

    for (size_t i = 0; i < n_spans; i++) {
        n_bytes += spans[i].n_bytes;
    }
    if (n_bytes >= FV_CALL_ASIDE_BYTES) {
        be_aside(echo, call);
    }
    if (fv_call_principal(call) != NULL) {
        assert_int_equal(fv_principal_begin_request(fv_call_principal(call), n_bytes, received_us),
                         FV_OK);
    }
    fv_echo_message_t *message = malloc(sizeof(*message) + n_bytes);
    message->next = NULL;
    message->echo = echo;
    message->call = call;
    message->n_bytes = 0;
    for (size_t i = 0; i < n_spans; i++) {
        memcpy(message->bytes + message->n_bytes, spans[i].data, spans[i].n_bytes);
        message->n_bytes += spans[i].n_bytes;
    }
    fv_call_ref(call);
    (void)pthread_mutex_lock(&echo->lock);
    if (echo->first == NULL) {
        echo->first = message;
    } else {
        echo->last->next = message;
    }
    echo->last = message;
    echo->last_left_us = (deadline_us == INT64_MAX) ? INT64_MAX : (deadline_us - received_us);
    echo->last_method = method;
    echo->n_delivered++;
    if (echo->n_delivered - echo->n_answered > echo->n_unanswered_max) {
        echo->n_unanswered_max = echo->n_delivered - echo->n_answered;
    }
    fv_echo_mode_t mode = echo->mode;
    (void)pthread_cond_broadcast(&echo->changed);
    (void)pthread_mutex_unlock(&echo->lock);
    if (mode == FV_ECHO_AT_ONCE) {
        fv_echo_answer_held(echo);
    }
}

static void on_closed(void *ctx, fv_call_t *call)
{
    fv_echo_t *echo = ctx;

    (void)pthread_mutex_lock(&echo->lock);
    echo->n_closed++;
    (void)pthread_cond_broadcast(&echo->changed);
    (void)pthread_mutex_unlock(&echo->lock);
    if (fv_call_user(call) != NULL) { /* twice for one call */
        abort();
    }
    fv_call_set_user(call, echo);
}

static void *work(void *arg)
{
    fv_echo_t *echo = arg;

    (void)pthread_mutex_lock(&echo->lock);
    while (!echo->is_stopping) {
        if ((echo->first == NULL) || (echo->mode != FV_ECHO_WORKER)) {
            (void)pthread_cond_wait(&echo->changed, &echo->lock);
            continue;
        }
        (void)pthread_mutex_unlock(&echo->lock);
        fv_echo_answer_held(echo);
        (void)pthread_mutex_lock(&echo->lock);
    }
    (void)pthread_mutex_unlock(&echo->lock);
    return NULL;
}

fv_rpc_config_t fv_echo_config(const char *address)
{
    return (fv_rpc_config_t){
        .listen = {address},
        .n_listen = 1,
        .message_bytes_max = ECHO_MESSAGE_MAX,
        .stream_inflight_max = ECHO_INFLIGHT_MAX,
        .connection_streams_max = 100,
        .memory_bytes_max = 512U << 20U,
        .may_be_open = true,
    };
}

void fv_echo_start(fv_echo_t *echo, const char *address, fv_echo_mode_t mode)
{
    fv_rpc_config_t config = fv_echo_config(address);

    fv_echo_start_with(echo, &config, mode);
}

void fv_echo_start_with(fv_echo_t *echo, const fv_rpc_config_t *config, fv_echo_mode_t mode)
{
    fv_rpc_handlers_t handlers = {.ctx = echo, .on_message = on_message, .on_closed = on_closed};

    memset(echo, 0, sizeof(*echo));
    echo->mode = mode;
    (void)pthread_mutex_init(&echo->lock, NULL);
    (void)pthread_cond_init(&echo->changed, NULL);
    assert_int_equal(fv_rpc_start(config, &handlers, &echo->rpc), FV_OK);
    fv_rpc_set_serving(echo->rpc, true);
    assert_int_equal(pthread_create(&echo->worker, NULL, work, echo), 0);
}

void fv_echo_stop(fv_echo_t *echo, uint32_t grace_ms)
{
    fv_rpc_stop(echo->rpc, grace_ms);
    (void)pthread_mutex_lock(&echo->lock);
    echo->is_stopping = true;
    (void)pthread_cond_broadcast(&echo->changed);
    (void)pthread_mutex_unlock(&echo->lock);
    (void)pthread_join(echo->worker, NULL);
    fv_echo_answer_held(echo); /* to calls that are gone */
    fv_rpc_destroy(echo->rpc);
    assert_int_equal(echo->n_released, echo->n_referenced);
    assert_int_equal(echo->n_live, 0);
    (void)pthread_cond_destroy(&echo->changed);
    (void)pthread_mutex_destroy(&echo->lock);
}

void fv_echo_set_mode(fv_echo_t *echo, fv_echo_mode_t mode)
{
    (void)pthread_mutex_lock(&echo->lock);
    echo->mode = mode;
    (void)pthread_cond_broadcast(&echo->changed);
    (void)pthread_mutex_unlock(&echo->lock);
}

bool fv_echo_wait(fv_echo_t *echo, const int64_t *counter, int64_t value)
{
    struct timespec until;
    int error = 0;

    (void)clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 20;
    (void)pthread_mutex_lock(&echo->lock);
    while ((*counter < value) && (error == 0)) {
        error = pthread_cond_timedwait(&echo->changed, &echo->lock, &until);
    }
    bool is_reached = (*counter >= value);
    (void)pthread_mutex_unlock(&echo->lock);
    return is_reached;
}

int64_t fv_echo_read(fv_echo_t *echo, const int64_t *counter)
{
    (void)pthread_mutex_lock(&echo->lock);
    int64_t value = *counter;
    (void)pthread_mutex_unlock(&echo->lock);
    return value;
}
