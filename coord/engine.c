/*
 * engine.c - the coordinator's loop: sleep until something comes, commands, steps, drain.
 */
#define _GNU_SOURCE /* POLLRDHUP */

#include "coord/engine.h"

#include "common/clock.h"
#include "common/log.h"
#include "coord/engine_internal.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#define POLL_FDS_MAX (2U + 1024U)

/* Requests lie where the own rank's device reads them in place. */
static fv_status_t create_staging(const fv_engine_config_t *config, fv_staging_t **out)
{
    const fv_local_ops_t *local = config->local;

    if ((local == NULL) || (local->host_alloc == NULL)) {
        return fv_staging_create(config->request_memory_bytes, NULL, out);
    }
    const fv_staging_memory_t memory = {
        .alloc = local->host_alloc, .free = local->host_free, .ctx = config->local_ctx};

    return fv_staging_create(config->request_memory_bytes, &memory, out);
}

/* What a rank that holds KV does not serve of latent models. */
static void note_latents(fv_sched_config_t *sched, const fv_ctl_hello_t *rank)
{
    if (rank->memory.kv_bytes_total == 0U) {
        return;
    }
    sched->no_latent = (rank->has_latent == 0U) ? rank->backend : sched->no_latent;
    sched->no_fp8 = (rank->has_fp8_latent == 0U) ? rank->backend : sched->no_fp8;
    sched->no_exact = (rank->has_exact == 0U) ? rank->backend : sched->no_exact;
}

/* Rounds of KV that moves are cut alike on all ranks, by the size of their staging. */
static size_t common_move_bytes(const fv_engine_config_t *config)
{
    uint32_t kib = UINT32_MAX;

    for (uint32_t r = 0; r < config->sched.n_ranks; r++) {
        const fv_ctl_hello_t *rank = &config->ranks[r];

        if (rank->memory.kv_bytes_total == 0U) {
            continue;
        }
        if ((kib != UINT32_MAX) && (kib != rank->move_kib)) {
            fv_warn("move_memory: rank %u has %u KiB, others %u: no KV moves to queries", r,
                    rank->move_kib, kib);
            return 0;
        }
        kib = rank->move_kib;
    }
    return (kib == UINT32_MAX) ? 0U : ((size_t)kib * 1024U);
}

fv_status_t fv_engine_create(const fv_engine_config_t *config, fv_engine_t **out)
{
    uint32_t n_ranks = config->sched.n_ranks;
    fv_engine_t *engine = calloc(1, sizeof(*engine));

    if (engine == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "engine");
    }
    engine->config = *config;
    engine->start_us = fv_clock_us();
    engine->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    (void)pthread_mutex_init(&engine->turn, NULL);
    engine->hellos = calloc(n_ranks, sizeof(*engine->hellos));
    engine->rank_stats = calloc(n_ranks, sizeof(*engine->rank_stats));
    engine->scan_items = calloc(FV_ITEMS_MAX, sizeof(*engine->scan_items));
    fv_status_t status = FV_OK;
    if ((engine->wake_fd < 0) || (engine->hellos == NULL) || (engine->rank_stats == NULL) ||
        (engine->scan_items == NULL)) {
        status = fv_fail(FV_ERR_NO_MEMORY, "engine of %u ranks", n_ranks);
    }
    if (status == FV_OK) {
        fv_sched_config_t sched = config->sched;
        sched.prepare = fv_engine_prepare;
        for (uint32_t r = 0; r < n_ranks; r++) {
            note_latents(&sched, &config->ranks[r]);
        }
        sched.move_bytes = common_move_bytes(config);
        status = fv_sched_create(&sched, &engine->sched);
    }
    if (status == FV_OK) {
        status = create_staging(config, &engine->staging);
    }
    if (status == FV_OK) {
        status = fv_lost_create(&engine->lost);
    }
    if (status == FV_OK) {
        status = fv_engine_init_pipeline(engine);
    }
    if (status != FV_OK) {
        fv_engine_destroy(engine);
        return status;
    }
    memcpy(engine->hellos, config->ranks, n_ranks * sizeof(*engine->hellos));
    for (uint32_t r = 0; r < n_ranks; r++) {
        fv_sched_rank_memory(engine->sched, r, &engine->hellos[r].memory);
    }
    *out = engine;
    return FV_OK;
}

void fv_engine_destroy(fv_engine_t *engine)
{
    if (engine == NULL) {
        return;
    }
    for (uint32_t slot = 0; slot < FV_STEP_DEPTH; slot++) {
        fv_dispatch_destroy(engine->flights[slot].dispatch);
        free(engine->flights[slot].is_rank_done);
    }
    fv_staging_destroy(engine->staging);
    fv_sched_destroy(engine->sched);
    fv_engine_free_streams(engine);
    fv_lost_destroy(engine->lost);
    free(engine->hellos);
    free(engine->rank_stats);
    free(engine->scan_items);
    if (engine->wake_fd >= 0) {
        (void)close(engine->wake_fd);
    }
    (void)pthread_mutex_destroy(&engine->turn);
    free(engine);
}

fv_rpc_handlers_t fv_engine_handlers(fv_engine_t *engine)
{
    return (fv_rpc_handlers_t){.ctx = engine,
                               .on_message = fv_engine_on_message,
                               .on_closed = fv_engine_on_closed,
                               .wants_idle = fv_engine_wants_idle,
                               .on_idle = fv_engine_on_idle};
}

int fv_engine_stop_signal(const fv_engine_t *engine)
{
    return engine->stop_signal;
}

/* ------------------------------------------------------------------ drain */

void fv_engine_begin_drain(fv_engine_t *engine, uint32_t timeout_ms)
{
    if (engine->is_draining) {
        return;
    }
    engine->is_draining = true;
    engine->wants_own_thread = true;
    engine->n_done_at_drain = engine->n_done;
    engine->drain_deadline_us =
        fv_clock_us() +
        (int64_t)((timeout_ms == 0) ? engine->config.drain_timeout_ms : timeout_ms) * 1000;
    fv_rpc_set_serving(engine->rpc, false);
    fv_info("draining: %u requests queued", fv_sched_n_queued(engine->sched));
}

static void answer_drain(fv_engine_t *engine)
{
    fv_bytes_t bytes = {0};
    fv_drain_response_t response = {
        .n_sessions = fv_session_table_count(fv_sched_sessions(engine->sched)),
        .n_requests_finished = engine->n_done - engine->n_done_at_drain,
    };

    if (engine->drain_call == NULL) {
        return;
    }
    fv_status_t status = fv_wire_drain_response_encode(&response, &bytes);
    if (status == FV_OK) {
        fv_reply_bytes(engine->drain_call, &bytes);
    } else {
        fv_reply_error(engine->drain_call, status);
    }
    fv_call_unref(engine->drain_call);
    engine->drain_call = NULL;
}

static void refuse_entries(fv_entry_t *entry, const char *why)
{
    while (entry != NULL) {
        fv_entry_t *next = entry->next;
        fv_status_t status = fv_fail(FV_ERR_UNAVAILABLE, "%s", why);
        if ((entry->method == FV_METHOD_ATTEND) || (entry->method == FV_METHOD_ATTEND_ONCE)) {
            fv_job_t *job = (fv_job_t *)(void *)entry;
            fv_entry_end_request(entry);
            fv_reply_refused(entry->call, entry->method, job->request.head.request_id, status);
            fv_job_release(job);
        } else {
            fv_reply_error(entry->call, status);
            fv_entry_release(entry);
        }
        entry = next;
    }
}

/* Everything that still waits is told so: in the scheduler's queue, commands, in the inbox, watchers. */
static void refuse_rest(fv_engine_t *engine, const char *why)
{
    fv_request_t *request = fv_sched_take_all(engine->sched);

    atomic_store(&engine->is_closed, true);
    while (request != NULL) {
        fv_request_t *next = request->next;
        request->error = fv_error_capture(fv_fail(FV_ERR_UNAVAILABLE, "%s", why));
        fv_reply_job(engine, fv_job_of(request), fv_clock_us());
        request = next;
    }
    refuse_entries(engine->held, why);
    engine->held = NULL;
    refuse_entries(engine->commands, why);
    engine->commands = NULL;
    engine->commands_tail = &engine->commands;
    refuse_entries(fv_engine_take_inbox(engine), why);
    fv_engine_end_watchers(engine, why);
}

/* ------------------------------------------------------------------ the loop */

static int timeout_ms(int64_t until_us)
{
    if (until_us == INT64_MAX) {
        return -1;
    }
    int64_t left_us = until_us - fv_clock_us();
    return (left_us <= 0) ? 0 : (int)((left_us + 999) / 1000);
}

/* Reads what woke us. */
static void read_wakeups(fv_engine_t *engine, const struct pollfd *fds, int signal_fd)
{
    uint64_t count = 0;
    struct signalfd_siginfo info;

    if ((fds[0].revents & POLLIN) != 0) {
        ssize_t n = read(engine->wake_fd, &count, sizeof(count));
        (void)n;
    }
    if ((signal_fd >= 0) && ((fds[1].revents & POLLIN) != 0) &&
        (read(signal_fd, &info, sizeof(info)) == (ssize_t)sizeof(info))) {
        if (info.ssi_signo == (uint32_t)SIGHUP) {
            if (engine->config.auth != NULL) {
                fv_auth_reload(engine->config.auth);
            }
            return;
        }
        (void)pthread_mutex_lock(&engine->turn);
        if (engine->is_draining) {
            fv_warn("signal %u again: stopping without waiting", info.ssi_signo);
            engine->drain_deadline_us = 0;
        } else {
            fv_info("signal %u: stopping", info.ssi_signo);
            engine->stop_signal = (int)info.ssi_signo;
            fv_engine_begin_drain(engine, 0);
        }
        (void)pthread_mutex_unlock(&engine->turn);
    }
}

/* Sleeps until the inbox, a signal, a rank's socket or a watcher wants something. */
static fv_status_t sleep_until_needed(fv_engine_t *engine, int signal_fd, int64_t until_us)
{
    struct pollfd fds[POLL_FDS_MAX] = {
        {.fd = engine->wake_fd, .events = POLLIN},
        {.fd = signal_fd, .events = POLLIN},
    };
    size_t n_links = 0;

    if (engine->config.link != NULL) {
        n_links = fv_link_pollfds(engine->config.link, fds + 2, POLL_FDS_MAX - 2U);
    }
    atomic_store_explicit(&engine->is_asleep, true, memory_order_seq_cst);
    bool is_empty = atomic_load_explicit(&engine->inbox, memory_order_seq_cst) == NULL;
    int n = poll(fds, 2U + n_links, is_empty ? timeout_ms(until_us) : 0);
    atomic_store_explicit(&engine->is_asleep, false, memory_order_relaxed);
    if ((n < 0) && (errno != EINTR)) {
        return fv_fail(FV_ERR_SYSTEM, "poll: %s", strerror(errno));
    }
    if (n <= 0) {
        return FV_OK;
    }
    read_wakeups(engine, fds, signal_fd);
    for (size_t i = 0; i < n_links; i++) {
        if (fds[2U + i].revents == 0) {
            continue;
        }
        FV_RETURN_IF_ERR(fv_link_check(engine->config.link));
        return fv_fail(FV_ERR_PROTOCOL, "a rank spoke without being asked");
    }
    return FV_OK;
}

static bool is_drained(const fv_engine_t *engine)
{
    return engine->is_draining && ((fv_sched_n_queued(engine->sched) == 0) ||
                                   (fv_clock_us() >= engine->drain_deadline_us));
}

/* One turn of the engine's own thread. *out_until_us: when it wants to be woken at the latest. */
static fv_status_t take_own_turn(fv_engine_t *engine, bool *out_is_done, int64_t *out_until_us)
{
    fv_status_t status = FV_OK;

    (void)pthread_mutex_lock(&engine->turn);
    engine->wants_own_thread = false;
    if (engine->broken.status != FV_OK) {
        status = fv_fail((fv_status_t)engine->broken.status, "%s", engine->broken.text);
    } else {
        status = fv_engine_work(engine);
    }
    int64_t sweep_us = INT64_MAX;
    if (status == FV_OK) {
        status = fv_engine_close_idle(engine, fv_clock_us(), &sweep_us);
    }
    if (status == FV_OK) {
        status = fv_engine_close_orphans(engine, fv_clock_us(), &sweep_us);
    }
    *out_is_done = (status != FV_OK) || is_drained(engine);
    *out_until_us = fv_engine_serve_watchers(engine, fv_clock_us());
    if (sweep_us < *out_until_us) {
        *out_until_us = sweep_us;
    }
    if (engine->is_draining && (engine->drain_deadline_us < *out_until_us)) {
        *out_until_us = engine->drain_deadline_us;
    }
    if (fv_engine_has_work(engine)) {
        *out_until_us = 0;
    }
    (void)pthread_mutex_unlock(&engine->turn);
    return status;
}

static void refuse_rest_in_turn(fv_engine_t *engine, const char *why)
{
    (void)pthread_mutex_lock(&engine->turn);
    refuse_rest(engine, why);
    (void)pthread_mutex_unlock(&engine->turn);
}

fv_status_t fv_engine_run(fv_engine_t *engine, fv_rpc_t *rpc, int signal_fd)
{
    fv_status_t status = FV_OK;
    bool is_done = false;
    int64_t until_us = INT64_MAX;

    fv_log_thread_name("engine");
    (void)pthread_mutex_lock(&engine->turn);
    engine->rpc = rpc;
    (void)pthread_mutex_unlock(&engine->turn);
    fv_rpc_set_serving(rpc, true);
    for (;;) {
        status = take_own_turn(engine, &is_done, &until_us);
        if ((status == FV_OK) && !is_done) {
            status = sleep_until_needed(engine, signal_fd, until_us);
        }
        if (status != FV_OK) {
            fv_error_t cause = fv_error_capture(status);
            fv_warn("%s", cause.text);
            if (fv_engine_repair(engine)) {
                continue;
            }
            status = fv_fail(status, "%s", cause.text);
        }
        if (is_done || (status != FV_OK)) {
            break;
        }
    }
    fv_error_t error = fv_error_capture(status);
    fv_info("steps: %llu, of them %llu begun while another was under way",
            (unsigned long long)engine->n_steps, (unsigned long long)engine->n_steps_ahead);
    if (status != FV_OK) {
        fv_error("the service ends: %s", error.text);
    }
    fv_rpc_set_serving(rpc, false);
    refuse_rest_in_turn(engine, (status == FV_OK) ? "the service is stopping" : error.text);
    answer_drain(engine);
    int64_t left_ms = (engine->drain_deadline_us - fv_clock_us()) / 1000;
    fv_rpc_stop(rpc, ((status == FV_OK) && (left_ms > 100)) ? (uint32_t)left_ms : 100U);
    refuse_rest_in_turn(engine, "the service is stopping"); /* what came in between */
    return (status == FV_OK) ? FV_OK : fv_fail(status, "%s", error.text);
}
