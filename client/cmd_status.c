/*
 * cmd_status.c - `fovea status` and `fovea drain`.
 */
#include "client/cli.h"

#include <stdio.h>
#include <string.h>

typedef struct fv_status_args {
    bool is_watch, is_json;
    uint32_t interval_ms;
} fv_status_args_t;

/* ------------------------------------------------------------------ printing */

static const char *durability_of(const fovea_cluster_status_t *s)
{
    static const char *const k_names[] = {"none", "process", "host"};

    return ((s->durability >= 0) && (s->durability < 3)) ? k_names[s->durability] : "?";
}

static cJSON *rank_json(const fovea_rank_status_t *r)
{
    cJSON *json = cJSON_CreateObject();

    fv_json_u64(json, "rank", r->rank);
    fv_json_text(json, "host", r->host);
    fv_json_text(json, "backend", r->backend);
    fv_json_text(json, "device", r->device);
    fv_json_text(json, "state", r->state);
    fv_json_u64(json, "threads", r->threads);
    fv_json_u64(json, "kv_bytes_total", r->kv_bytes_total);
    fv_json_u64(json, "kv_bytes_free", r->kv_bytes_free);
    fv_json_u64(json, "n_steps", r->n_steps);
    fv_json_u64(json, "busy_us", r->busy_us);
    return json;
}

static cJSON *status_json(const fovea_cluster_status_t *s)
{
    cJSON *json = cJSON_CreateObject();
    cJSON *listen = NULL;
    cJSON *ranks = NULL;

    fv_json_text(json, "version", s->version);
    fv_json_text(json, "state", s->state);
    fv_json_text(json, "exchange", s->exchange);
    fv_json_text(json, "durability", durability_of(s));
    fv_json_u64(json, "epoch", s->epoch);
    fv_json_u64(json, "uptime_ms", s->uptime_ms);
    listen = cJSON_AddArrayToObject(json, "listen");
    for (uint32_t i = 0; i < s->n_listen; i++) {
        (void)cJSON_AddItemToArray(listen, cJSON_CreateString(s->listen[i]));
    }
    fv_json_u64(json, "n_models", s->n_models);
    fv_json_u64(json, "n_sessions", s->n_sessions);
    fv_json_u64(json, "n_requests_queued", s->n_requests_queued);
    fv_json_u64(json, "n_requests_running", s->n_requests_running);
    fv_json_u64(json, "n_requests_done", s->n_requests_done);
    fv_json_u64(json, "n_requests_failed", s->n_requests_failed);
    fv_json_u64(json, "n_steps", s->n_steps);
    fv_json_u64(json, "n_tokens_appended", s->n_tokens_appended);
    fv_json_u64(json, "kv_bytes_total", s->kv_bytes_total);
    fv_json_u64(json, "kv_bytes_free", s->kv_bytes_free);
    ranks = cJSON_AddArrayToObject(json, "ranks");
    for (uint32_t i = 0; i < s->n_ranks; i++) {
        (void)cJSON_AddItemToArray(ranks, rank_json(&s->ranks[i]));
    }
    return json;
}

static void print_rank(const fovea_rank_status_t *r)
{
    char used[FV_CLI_TEXT_BYTES];
    char total[FV_CLI_TEXT_BYTES];
    double mean_us = (r->n_steps == 0) ? 0.0 : ((double)r->busy_us / (double)r->n_steps);

    (void)printf(
        "%4u  %-12.12s %-7s %-7s %7u  %10s %10s %10llu %9.0f us  %s\n", r->rank, r->host,
        r->backend, r->state, r->threads, fv_cli_bytes(r->kv_bytes_total - r->kv_bytes_free, used),
        fv_cli_bytes(r->kv_bytes_total, total), (unsigned long long)r->n_steps, mean_us, r->device);
}

static void print_status(const fovea_cluster_status_t *s)
{
    char a[FV_CLI_TEXT_BYTES];
    char b[FV_CLI_TEXT_BYTES];

    (void)printf("Fovea %s, %s, up %s, %u rank%s, exchange %s, durability %s, epoch %llu\n",
                 s->version, s->state, fv_cli_duration(s->uptime_ms, a), s->n_ranks,
                 (s->n_ranks == 1) ? "" : "s", s->exchange, durability_of(s),
                 (unsigned long long)s->epoch);
    (void)printf("listening on");
    for (uint32_t i = 0; i < s->n_listen; i++) {
        (void)printf(" %s", s->listen[i]);
    }
    (void)printf("\nmodels %llu, sessions %llu, tokens appended %llu\n",
                 (unsigned long long)s->n_models, (unsigned long long)s->n_sessions,
                 (unsigned long long)s->n_tokens_appended);
    (void)printf("requests: %llu queued, %llu running, %llu done, %llu failed; steps %llu\n",
                 (unsigned long long)s->n_requests_queued,
                 (unsigned long long)s->n_requests_running, (unsigned long long)s->n_requests_done,
                 (unsigned long long)s->n_requests_failed, (unsigned long long)s->n_steps);
    (void)printf("KV memory: %s used of %s\n\n",
                 fv_cli_bytes(s->kv_bytes_total - s->kv_bytes_free, a),
                 fv_cli_bytes(s->kv_bytes_total, b));
    (void)printf("%4s  %-12s %-7s %-7s %7s  %10s %10s %10s %12s  %s\n", "rank", "host", "backend",
                 "state", "threads", "KV used", "KV total", "steps", "mean busy", "device");
    for (uint32_t i = 0; i < s->n_ranks; i++) {
        print_rank(&s->ranks[i]);
    }
    (void)fflush(stdout);
}

/* ------------------------------------------------------------------ status */

static const struct argp_option k_status_options[] = {
    {"watch", 'w', 0, 0, "Print again whenever the interval is over, until interrupted", 0},
    {"interval", 'i', "MS", 0, "Of --watch: milliseconds, at least 50 (default 1000)", 0},
    {"json", 'j', 0, 0, "One JSON object (with --watch: one a line)", 0},
    {0},
};

static error_t parse_status(int key, char *arg, struct argp_state *state)
{
    fv_status_args_t *a = state->input;

    switch (key) {
    case 'w':
        a->is_watch = true;
        return 0;
    case 'i':
        a->interval_ms = (uint32_t)fv_cli_u64(state, "--interval", arg, 3600000);
        return 0;
    case 'j':
        a->is_json = true;
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp k_status_argp = {
    .options = k_status_options,
    .parser = parse_status,
    .doc = "Show the ranks of a service, their memory and their load.\v"
           "Exit codes: 0 success, 1 service error, 2 wrong usage.",
};

static bool on_status(void *user, const fovea_cluster_status_t *status)
{
    const fv_status_args_t *a = user;

    if (a->is_json) {
        return fv_cli_print_json(status_json(status), false) == FV_EXIT_OK;
    }
    print_status(status);
    (void)printf("\n");
    return true;
}

static int show_once(const fv_cli_t *cli, fovea_client_t *client, bool is_json)
{
    fovea_cluster_status_t status;
    fovea_error_t error;
    int rc = FV_EXIT_OK;

    if (fovea_get_status(client, cli->timeout_ms, &status, &error) != FOVEA_OK) {
        return fv_cli_error(&error);
    }
    if (is_json) {
        rc = fv_cli_print_json(status_json(&status), true);
    } else {
        print_status(&status);
    }
    fovea_cluster_status_free(&status);
    return rc;
}

int fv_cmd_status(const fv_cli_t *cli, int argc, char **argv)
{
    fv_status_args_t a = {0};
    fovea_client_t *client = NULL;
    fovea_error_t error;
    int rc = FV_EXIT_OK;

    (void)argp_parse(&k_status_argp, argc, argv, 0, NULL, &a);
    rc = fv_cli_connect(cli, &client);
    if (rc != FV_EXIT_OK) {
        return rc;
    }
    if (!a.is_watch) {
        rc = show_once(cli, client, a.is_json);
    } else if (fovea_watch_status(client, a.interval_ms, FOVEA_TIMEOUT_NONE, on_status, &a,
                                  &error) != FOVEA_OK) {
        rc = fv_cli_error(&error);
    }
    fovea_close(client);
    return rc;
}

/* ------------------------------------------------------------------ drain */

static const struct argp_option k_drain_options[] = {
    {"drain-timeout", 'd', "SECONDS", 0,
     "How long what runs may take (default: the service's --drain-timeout)", 0},
    {0},
};

static error_t parse_drain(int key, char *arg, struct argp_state *state)
{
    uint32_t *timeout_ms = state->input;

    switch (key) {
    case 'd': {
        double seconds = fv_cli_real(state, "--drain-timeout", arg);
        if ((seconds < 0.001) || (seconds > 1e6)) {
            argp_error(state, "--drain-timeout: given \"%s\", expected 0.001..1e6 seconds", arg);
        }
        *timeout_ms = (uint32_t)(seconds * 1000.0);
        return 0;
    }
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp k_drain_argp = {
    .options = k_drain_options,
    .parser = parse_drain,
    .doc =
        "Stop a service in order: new sessions and requests are refused, what runs is finished.\v"
        "Exit codes: 0 success, 1 service error, 2 wrong usage.",
};

int fv_cmd_drain(const fv_cli_t *cli, int argc, char **argv)
{
    uint32_t drain_ms = 0;
    fovea_client_t *client = NULL;
    fovea_drained_t drained = {0};
    fovea_error_t error;
    int rc = FV_EXIT_OK;

    (void)argp_parse(&k_drain_argp, argc, argv, 0, NULL, &drain_ms);
    rc = fv_cli_connect(cli, &client);
    if (rc != FV_EXIT_OK) {
        return rc;
    }
    /* The answer comes when everything is finished: by default wait as long as that takes. */
    if (fovea_drain(client, drain_ms, (cli->timeout_ms == 0) ? FOVEA_TIMEOUT_NONE : cli->timeout_ms,
                    &drained, &error) != FOVEA_OK) {
        rc = fv_cli_error(&error);
    } else {
        (void)printf("drained: %llu requests finished, %llu sessions were still open\n",
                     (unsigned long long)drained.n_requests_finished,
                     (unsigned long long)drained.n_sessions);
    }
    fovea_close(client);
    return rc;
}
