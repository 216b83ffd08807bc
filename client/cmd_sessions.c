/*
 * cmd_sessions.c - `fovea sessions`: the open sessions and what they hold.
 */
#include "client/cli.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#define PAGE_SIZE 200

typedef struct fv_sessions_args {
    bool is_json;
    const char *model_id;
    uint64_t limit; /* 0 = all */
} fv_sessions_args_t;

static const struct argp_option k_options[] = {
    {"json", 'j', 0, 0, "One JSON object with the tokens of every layer", 0},
    {"model-id", 'm', "ID", 0, "Sessions of this model only", 0},
    {"limit", 'n', "N", 0, "Stop after N sessions (default: all)", 0},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    fv_sessions_args_t *a = state->input;

    switch (key) {
    case 'j':
        a->is_json = true;
        return 0;
    case 'm':
        a->model_id = arg;
        return 0;
    case 'n':
        a->limit = fv_cli_u64(state, "--limit", arg, UINT32_MAX);
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp k_argp = {
    .options = k_options,
    .parser = parse,
    .doc = "List open sessions with their length and KV memory.\v"
           "Exit codes: 0 success, 1 service error, 2 wrong usage.",
};

static cJSON *session_json(const fovea_session_info_t *info)
{
    char text[FOVEA_SESSION_TEXT_BYTES];
    cJSON *json = cJSON_CreateObject();
    cJSON *layers = NULL;

    fovea_session_id_format(&info->session, text);
    fv_json_text(json, "session_id", text);
    fv_json_text(json, "model_id", info->model_id);
    fv_json_u64(json, "max_tokens", info->max_tokens);
    fv_json_u64(json, "kv_bytes", info->kv_bytes);
    fv_json_u64(json, "created_unix_ms", info->created_unix_ms);
    if (info->has_parent) {
        fovea_session_id_format(&info->parent, text);
        fv_json_text(json, "parent_session_id", text);
    }
    layers = cJSON_AddArrayToObject(json, "layer_tokens");
    for (uint32_t i = 0; i < info->n_layers; i++) {
        (void)cJSON_AddItemToArray(layers, cJSON_CreateNumber((double)info->layer_tokens[i]));
    }
    return json;
}

static void print_session(const fovea_session_info_t *info)
{
    char id[FOVEA_SESSION_TEXT_BYTES];
    char parent[FOVEA_SESSION_TEXT_BYTES] = "";
    char bytes[FV_CLI_TEXT_BYTES];
    char age[FV_CLI_TEXT_BYTES];
    struct timespec now;
    uint64_t now_ms = 0;

    (void)clock_gettime(CLOCK_REALTIME, &now);
    now_ms = ((uint64_t)now.tv_sec * 1000U) + ((uint64_t)now.tv_nsec / 1000000U);
    fovea_session_id_format(&info->session, id);
    if (info->has_parent) {
        fovea_session_id_format(&info->parent, parent);
    }
    (void)printf(
        "%s  %-20.20s %10llu %11s %8s  %s\n", id, info->model_id,
        (unsigned long long)info->max_tokens, fv_cli_bytes(info->kv_bytes, bytes),
        fv_cli_duration((now_ms > info->created_unix_ms) ? now_ms - info->created_unix_ms : 0, age),
        parent);
}

/* Shows one page; returns how many sessions it took. */
static uint64_t show_page(const fovea_session_list_t *page, uint64_t room, cJSON *sessions)
{
    uint64_t n = (page->n_sessions < room) ? page->n_sessions : room;

    for (uint64_t i = 0; i < n; i++) {
        if (sessions != NULL) {
            (void)cJSON_AddItemToArray(sessions, session_json(&page->sessions[i]));
        } else {
            print_session(&page->sessions[i]);
        }
    }
    return n;
}

static int list(const fv_cli_t *cli,
                fovea_client_t *client,
                const fv_sessions_args_t *a,
                cJSON *sessions,
                uint64_t *n_total)
{
    fovea_list_options_t options = {.page_size = PAGE_SIZE, .model_id = a->model_id};
    fovea_session_list_t page = {0};
    char token[sizeof(page.next_page_token)] = "";
    uint64_t n_shown = 0;
    fovea_error_t error;

    do {
        options.page_token = token;
        if (fovea_list_sessions(client, &options, cli->timeout_ms, &page, &error) != FOVEA_OK) {
            return fv_cli_error(&error);
        }
        *n_total = page.n_total;
        n_shown += show_page(&page, (a->limit == 0) ? UINT64_MAX : (a->limit - n_shown), sessions);
        memcpy(token, page.next_page_token, sizeof(token));
        fovea_session_list_free(&page);
    } while ((token[0] != '\0') && ((a->limit == 0) || (n_shown < a->limit)));
    return FV_EXIT_OK;
}

int fv_cmd_sessions(const fv_cli_t *cli, int argc, char **argv)
{
    fv_sessions_args_t a = {0};
    fovea_client_t *client = NULL;
    cJSON *json = NULL;
    uint64_t n_total = 0;
    int rc = FV_EXIT_OK;

    (void)argp_parse(&k_argp, argc, argv, 0, NULL, &a);
    rc = fv_cli_connect(cli, &client);
    if (rc != FV_EXIT_OK) {
        return rc;
    }
    if (a.is_json) {
        json = cJSON_CreateObject();
        rc = list(cli, client, &a, cJSON_AddArrayToObject(json, "sessions"), &n_total);
        fv_json_u64(json, "n_total", n_total);
        if (rc == FV_EXIT_OK) {
            rc = fv_cli_print_json(json, true);
        } else {
            cJSON_Delete(json);
        }
    } else {
        (void)printf("%-32s  %-20s %10s %11s %8s  %s\n", "session", "model", "tokens", "KV memory",
                     "age", "forked from");
        rc = list(cli, client, &a, NULL, &n_total);
        (void)printf("%llu in total\n", (unsigned long long)n_total);
    }
    fovea_close(client);
    return rc;
}
