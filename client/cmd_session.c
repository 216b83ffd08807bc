/*
 * cmd_session.c - one session: `fovea open`, `fork`, `truncate`, `close`.
 */
#include "client/cli.h"

#include <stdio.h>
#include <stdlib.h>

#define EXIT_CODES "\vExit codes: 0 success, 1 service error, 2 wrong usage."

static void print_id(const fovea_session_id_t *id)
{
    char text[FOVEA_SESSION_TEXT_BYTES];

    fovea_session_id_format(id, text);
    (void)printf("%s\n", text);
}

/* ------------------------------------------------------------------ open */

typedef struct fv_open_args {
    uint64_t max_tokens_hint;
    const char *model_id;
} fv_open_args_t;

static const struct argp_option k_open_options[] = {
    {"max-tokens", 'n', "N", 0, "How long the session may become: guides its placement", 0},
    {0},
};

static error_t parse_open(int key, char *arg, struct argp_state *state)
{
    fv_open_args_t *a = state->input;

    switch (key) {
    case 'n':
        a->max_tokens_hint = fv_cli_u64(state, "--max-tokens", arg, UINT64_MAX);
        return 0;
    case ARGP_KEY_ARG:
        if (a->model_id != NULL) {
            argp_error(state, "unexpected argument \"%s\"", arg);
        }
        a->model_id = arg;
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_usage(state);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp k_open_argp = {
    .options = k_open_options,
    .parser = parse_open,
    .args_doc = "MODEL_ID",
    .doc = "Open a session of a registered model and print its id." EXIT_CODES,
};

int fv_cmd_open(const fv_cli_t *cli, int argc, char **argv)
{
    fv_open_args_t a = {0};
    fovea_client_t *client = NULL;
    fovea_session_id_t id;
    fovea_error_t error;
    int rc = FV_EXIT_OK;

    (void)argp_parse(&k_open_argp, argc, argv, 0, NULL, &a);
    rc = fv_cli_connect(cli, &client);
    if (rc != FV_EXIT_OK) {
        return rc;
    }
    fovea_session_options_t options = {.max_tokens_hint = a.max_tokens_hint};
    if (fovea_open_session(client, a.model_id, &options, cli->timeout_ms, &id, &error) !=
        FOVEA_OK) {
        rc = fv_cli_error(&error);
    } else {
        print_id(&id);
    }
    fovea_close(client);
    return rc;
}

/* ------------------------------------------------------------------ fork, truncate */

typedef struct fv_at_args {
    fovea_session_id_t session;
    uint64_t position;
    int n_args;
    bool needs_position;
} fv_at_args_t;

static error_t parse_at(int key, char *arg, struct argp_state *state)
{
    fv_at_args_t *a = state->input;

    switch (key) {
    case ARGP_KEY_ARG:
        a->n_args++;
        if (a->n_args == 1) {
            a->session = fv_cli_session(state, arg);
        } else if (a->n_args == 2) {
            a->position = fv_cli_u64(state, "position", arg, UINT64_MAX - 1);
        } else {
            argp_error(state, "unexpected argument \"%s\"", arg);
        }
        return 0;
    case ARGP_KEY_END:
        if (a->n_args < (a->needs_position ? 2 : 1)) {
            argp_usage(state);
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp k_fork_argp = {
    .parser = parse_at,
    .args_doc = "SESSION [POSITION]",
    .doc = "Make a session that shares the tokens [0, POSITION) of SESSION (default: all of them), "
           "copy on write, and print its id." EXIT_CODES,
};

static const struct argp k_truncate_argp = {
    .parser = parse_at,
    .args_doc = "SESSION POSITION",
    .doc = "Drop the tokens of every layer of SESSION from POSITION on." EXIT_CODES,
};

int fv_cmd_fork(const fv_cli_t *cli, int argc, char **argv)
{
    fv_at_args_t a = {.position = FOVEA_WHOLE};
    fovea_client_t *client = NULL;
    fovea_session_id_t forked;
    fovea_error_t error;
    int rc = FV_EXIT_OK;

    (void)argp_parse(&k_fork_argp, argc, argv, 0, NULL, &a);
    rc = fv_cli_connect(cli, &client);
    if (rc != FV_EXIT_OK) {
        return rc;
    }
    if (fovea_fork_session(client, &a.session, a.position, cli->timeout_ms, &forked, &error) !=
        FOVEA_OK) {
        rc = fv_cli_error(&error);
    } else {
        print_id(&forked);
    }
    fovea_close(client);
    return rc;
}

int fv_cmd_truncate(const fv_cli_t *cli, int argc, char **argv)
{
    fv_at_args_t a = {.needs_position = true};
    fovea_client_t *client = NULL;
    fovea_error_t error;
    int rc = FV_EXIT_OK;

    (void)argp_parse(&k_truncate_argp, argc, argv, 0, NULL, &a);
    rc = fv_cli_connect(cli, &client);
    if (rc != FV_EXIT_OK) {
        return rc;
    }
    if (fovea_truncate_session(client, &a.session, a.position, cli->timeout_ms, &error) !=
        FOVEA_OK) {
        rc = fv_cli_error(&error);
    }
    fovea_close(client);
    return rc;
}

/* ------------------------------------------------------------------ close */

typedef struct fv_close_args {
    fovea_session_id_t *sessions; /* room for every argument */
    int n_sessions;
} fv_close_args_t;

static error_t parse_close(int key, char *arg, struct argp_state *state)
{
    fv_close_args_t *a = state->input;

    switch (key) {
    case ARGP_KEY_ARG:
        a->sessions[a->n_sessions++] = fv_cli_session(state, arg);
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_usage(state);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp k_close_argp = {
    .parser = parse_close,
    .args_doc = "SESSION...",
    .doc = "Close sessions and free their KV memory." EXIT_CODES,
};

int fv_cmd_close(const fv_cli_t *cli, int argc, char **argv)
{
    fv_close_args_t a = {.sessions = calloc((size_t)argc, sizeof(*a.sessions))};
    fovea_client_t *client = NULL;
    fovea_error_t error;
    int rc = FV_EXIT_SERVICE;

    if (a.sessions == NULL) {
        (void)fprintf(stderr, "fovea: out of memory\n");
        return rc;
    }
    (void)argp_parse(&k_close_argp, argc, argv, 0, NULL, &a);
    rc = fv_cli_connect(cli, &client);
    /* One that cannot be closed does not keep the others open. */
    for (int i = 0; (client != NULL) && (i < a.n_sessions); i++) {
        if (fovea_close_session(client, &a.sessions[i], cli->timeout_ms, &error) != FOVEA_OK) {
            rc = fv_cli_error(&error);
        }
    }
    fovea_close(client);
    free(a.sessions);
    return rc;
}
