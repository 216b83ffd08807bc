/*
 * actor.c - a client: opens, forks, cuts, closes, asks, and attends; each answer is compared with the model.
 */
#include "tests/history/history.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define WAIT_MS 120000

void hs_fail(hs_actor_t *a, const char *format, ...)
{
    char text[400];
    va_list list;

    va_start(list, format);
    (void)vsnprintf(text, sizeof(text), format, list);
    va_end(list);
    if (!atomic_exchange(&a->world->has_failed, true)) {
        (void)snprintf(a->world->failure, sizeof(a->world->failure), "actor %u: %s", a->number,
                       text);
    }
}

int64_t hs_pick(hs_actor_t *a, int64_t low, int64_t high)
{
    return fv_random_int(&a->random, low, high);
}

hs_session_t *hs_pick_session(hs_actor_t *a, bool is_open)
{
    int64_t first = hs_pick(a, 0, HS_SESSIONS_MAX - 1);

    for (int64_t i = 0; i < HS_SESSIONS_MAX; i++) {
        hs_session_t *s = &a->sessions[(first + i) % HS_SESSIONS_MAX];
        if ((s->is_open == is_open) && !s->is_busy) {
            return s;
        }
    }
    return NULL;
}

bool hs_connect(hs_actor_t *a)
{
    /* while ranks are killed the client's own repeating is on for longer than any repair */
    fovea_options_t options = {.call_timeout_ms = WAIT_MS, .retry_ms = 60000};
    fovea_error_t error;

    if (fovea_connect(a->world->address, &options, &a->client, &error) != FOVEA_OK) {
        hs_fail(a, "connect: %s", error.message);
        return false;
    }
    return true;
}

static bool has_lengths(const fovea_session_info_t *info, const hs_session_t *s)
{
    return (info->n_layers == HS_LAYERS) && (info->layer_tokens[0] == s->layers[0].n_tokens) &&
           (info->layer_tokens[1] == s->layers[1].n_tokens);
}

bool hs_check_session(hs_actor_t *a, hs_session_t *s, const hs_request_t *unsure)
{
    fovea_session_info_t info = {0};
    fovea_error_t error;

    if (fovea_get_session(a->client, &s->id, 0, &info, &error) != FOVEA_OK) {
        hs_fail(a, "GetSession: %s", error.message);
        return false;
    }
    bool is_right = has_lengths(&info, s);
    if (!is_right && (unsure != NULL)) {
        hs_apply(unsure);
        is_right = has_lengths(&info, s);
    }
    if (!is_right) {
        hs_fail(a, "a session has %llu and %llu tokens, expected %u and %u",
                (unsigned long long)info.layer_tokens[0], (unsigned long long)info.layer_tokens[1],
                s->layers[0].n_tokens, s->layers[1].n_tokens);
    }
    fovea_session_info_free(&info);
    return is_right;
}

/* ------------------------------------------------------------------ operations */

/* Open and fork are not repeated by the library: a session that nobody knows may be left. */
static bool note_unknown(hs_actor_t *a, const fovea_error_t *error)
{
    if (a->world->has_kills && (error->code == FOVEA_UNAVAILABLE)) {
        atomic_fetch_add(&a->world->n_unknown, 1);
        return true;
    }
    return false;
}

static void open_one(hs_actor_t *a)
{
    static const fovea_sharding_mode_t modes[] = {FOVEA_SHARDING_AUTO, FOVEA_SHARDING_HEADS,
                                                  FOVEA_SHARDING_CONTEXT};
    fovea_sharding_t sharding = {.mode = modes[hs_pick(a, 0, 2)], .shard_tokens = 64};
    fovea_session_options_t options = {.sharding = &sharding,
                                       .max_tokens_hint = (uint64_t)hs_pick(a, 0, 200)};
    hs_session_t *s = hs_pick_session(a, false);
    fovea_session_id_t id;
    fovea_error_t error;

    if (s == NULL) {
        return;
    }
    if (fovea_open_session(a->client, a->world->model_id, &options, 0, &id, &error) != FOVEA_OK) {
        if (!note_unknown(a, &error)) {
            hs_fail(a, "OpenSession: %s", error.message);
        }
        return;
    }
    memset(s, 0, sizeof(*s));
    s->id = id;
    s->is_open = true;
}

static void fork_one(hs_actor_t *a)
{
    hs_session_t *parent = hs_pick_session(a, true);
    hs_session_t *child = hs_pick_session(a, false);
    fovea_session_id_t id;
    fovea_error_t error;

    if ((parent == NULL) || (child == NULL)) {
        return;
    }
    uint32_t n = hs_longest(parent);
    uint32_t at = (uint32_t)hs_pick(a, 0, (int64_t)n + ((hs_pick(a, 0, 7) == 0) ? 3 : 0));
    fovea_code_t code = fovea_fork_session(a->client, &parent->id, at, 0, &id, &error);
    if ((at > n) && (code == FOVEA_OUT_OF_RANGE)) {
        atomic_fetch_add(&a->world->n_refused, 1);
    } else if ((code == FOVEA_OK) && (at <= n)) {
        *child = *parent;
        child->id = id;
        hs_cut(child, at);
        atomic_fetch_add(&a->world->n_forks, 1);
    } else if ((code == FOVEA_OK) || !note_unknown(a, &error)) {
        hs_fail(a, "ForkSession at %u of %u: %s", at, n, fovea_code_name(code));
    }
}

static void truncate_one(hs_actor_t *a)
{
    hs_session_t *s = hs_pick_session(a, true);
    fovea_error_t error;

    if (s == NULL) {
        return;
    }
    uint32_t n = hs_longest(s);
    uint32_t at = (uint32_t)hs_pick(a, 0, (int64_t)n + ((hs_pick(a, 0, 7) == 0) ? 3 : 0));
    fovea_code_t code = fovea_truncate_session(a->client, &s->id, at, 0, &error);
    if ((at > n) && (code == FOVEA_OUT_OF_RANGE)) {
        atomic_fetch_add(&a->world->n_refused, 1);
    } else if ((code == FOVEA_OK) && (at <= n)) {
        hs_cut(s, at);
        atomic_fetch_add(&a->world->n_cuts, 1);
    } else {
        hs_fail(a, "TruncateSession at %u of %u: %s", at, n, fovea_code_name(code));
    }
}

/* Then it is not found, whatever it is asked for. */
static void close_one(hs_actor_t *a)
{
    hs_session_t *s = hs_pick_session(a, true);
    fovea_session_info_t info = {0};
    fovea_error_t error;

    if (s == NULL) {
        return;
    }
    fovea_code_t code = fovea_close_session(a->client, &s->id, 0, &error);
    bool is_repeated = a->world->has_kills && (code == FOVEA_NOT_FOUND);
    if ((code != FOVEA_OK) && !is_repeated) {
        hs_fail(a, "CloseSession: %s", error.message);
        return;
    }
    s->is_open = false;
    if ((hs_pick(a, 0, 3) == 0) &&
        (fovea_get_session(a->client, &s->id, 0, &info, &error) != FOVEA_NOT_FOUND)) {
        hs_fail(a, "GetSession of a closed session: %s", fovea_code_name(error.code));
    }
}

static void do_one(hs_actor_t *a, int64_t dice)
{
    hs_session_t *s = hs_pick_session(a, true);

    if ((s == NULL) || (dice < 20)) {
        open_one(a);
    } else if (dice < 45) {
        fork_one(a);
    } else if (dice < 60) {
        truncate_one(a);
    } else if (dice < 80) {
        close_one(a);
    } else {
        (void)hs_check_session(a, s, NULL);
    }
}

/* What remains: an answer for each session, and it goes. */
static void end(hs_actor_t *a)
{
    for (int i = 0; (i < HS_SESSIONS_MAX) && !atomic_load(&a->world->has_failed); i++) {
        if (a->sessions[i].is_open) {
            (void)hs_check_session(a, &a->sessions[i], NULL);
        }
    }
    fovea_stream_close(a->stream);
    a->stream = NULL;
    fovea_close(a->client);
    a->client = NULL;
}

static bool take_operations(hs_world_t *w, uint64_t n)
{
    uint64_t left = atomic_load(&w->n_left);

    while ((left > 0) &&
           !atomic_compare_exchange_weak(&w->n_left, &left, (left > n) ? (left - n) : 0U)) {
    }
    return (left > 0) && !atomic_load(&w->has_failed);
}

void *hs_actor_run(void *actor)
{
    hs_actor_t *a = actor;
    uint64_t n = 1;

    if (!hs_connect(a)) {
        return NULL;
    }
    while (take_operations(a->world, n)) {
        int64_t dice = hs_pick(a, 0, 199);
        n = 1;
        if (dice < 100) {
            do_one(a, dice);
        } else {
            n = hs_attend_some(a);
        }
    }
    end(a);
    return NULL;
}
