/*
 * main.c - the `fovea` command-line tool: global options, then a subcommand.
 */
#include "client/cli.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    fv_command_fn_t run;
    const char *help;
} k_commands[] = {
    {"status", fv_cmd_status, "ranks, memory, load (--watch, --json)"},
    {"sessions", fv_cmd_sessions, "open sessions and their KV memory"},
    {"placement", fv_cmd_placement, "draw which rank holds which heads and tokens of a session"},
    {"models", fv_cmd_models, "`models register`: register a model, print its id"},
    {"open", fv_cmd_open, "open a session, print its id"},
    {"fork", fv_cmd_fork, "fork a session (copy on write), print the new id"},
    {"truncate", fv_cmd_truncate, "drop the tokens of a session from a position on"},
    {"close", fv_cmd_close, "close sessions"},
    {"attend", fv_cmd_attend, "attention of .npy files: q, k, v to out, lse"},
    {"bench", fv_cmd_bench, "quick latency and throughput of a running service"},
    {"drain", fv_cmd_drain, "finish what runs, then stop the service"},
    {"store", fv_cmd_store, "what services have stored on this host: ls, check, rm"},
    {"token", fv_cmd_token, "make a token and its line for the service's token file"},
};

#define N_COMMANDS (sizeof(k_commands) / sizeof(k_commands[0]))

typedef struct fv_main {
    fv_cli_t cli;
    int command_at; /* index of the subcommand in argv; 0 = none */
} fv_main_t;

const char *argp_program_bug_address = "the project's issue tracker";

enum {
    OPT_TLS = 0x100,
    OPT_CA,
    OPT_CERT,
    OPT_KEY,
    OPT_SERVER_NAME,
    OPT_TOKEN_FILE,
    OPT_RETRY,
};

static const struct argp_option k_options[] = {
    {"address", 'a', "ADDRESS", 0,
     "Where the service listens: host:port or unix:/path "
     "(default: $FOVEA_ADDRESS, else " FV_CLI_ADDRESS_DEFAULT ")",
     0},
    {"timeout", 't', "SECONDS", 0, "Of connecting (default 5) and of each call (default 30)", 0},
    {"retry", OPT_RETRY, "SECONDS", 0,
     "How long a call is repeated while the service is unavailable (default 10; 0: never)", 0},
    {"tls", OPT_TLS, NULL, 0, "TLS; --ca and --cert imply it", 0},
    {"ca", OPT_CA, "FILE", 0,
     "PEM: who signs the service's certificate (default: $FOVEA_CA, else whom this system trusts)",
     0},
    {"cert", OPT_CERT, "FILE", 0, "PEM: this client's own certificate (default: $FOVEA_CERT)", 0},
    {"key", OPT_KEY, "FILE", 0, "PEM: its key (default: $FOVEA_KEY)", 0},
    {"server-name", OPT_SERVER_NAME, "NAME", 0,
     "What the service's certificate must name (default: the address's host)", 0},
    {"token-file", OPT_TOKEN_FILE, "FILE", 0,
     "Its first line is shown as token (default: $FOVEA_TOKEN_FILE, else the token in $FOVEA_TOKEN)",
     0},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    fv_main_t *m = state->input;

    switch (key) {
    case 'a':
        m->cli.address = arg;
        return 0;
    case 't': {
        double seconds = fv_cli_real(state, "--timeout", arg);
        if ((seconds < 0.001) || (seconds > 1e9)) {
            argp_error(state, "--timeout: given \"%s\", expected 0.001..1e9 seconds", arg);
        }
        m->cli.timeout_ms = (int64_t)(seconds * 1000.0);
        return 0;
    }
    case OPT_RETRY: {
        double seconds = fv_cli_real(state, "--retry", arg);
        if ((seconds < 0.0) || (seconds > 1e6)) {
            argp_error(state, "--retry: given \"%s\", expected 0..1e6 seconds", arg);
        }
        m->cli.options.retry_ms = (seconds * 1000.0 < 1.0) ? -1 : (int32_t)(seconds * 1000.0);
        return 0;
    }
    case OPT_TLS:
        m->cli.options.tls = true;
        return 0;
    case OPT_CA:
        m->cli.options.ca_file = arg;
        return 0;
    case OPT_CERT:
        m->cli.options.cert_file = arg;
        return 0;
    case OPT_KEY:
        m->cli.options.key_file = arg;
        return 0;
    case OPT_SERVER_NAME:
        m->cli.options.server_name = arg;
        return 0;
    case OPT_TOKEN_FILE:
        m->cli.options.token_file = arg;
        m->cli.options.token = NULL;
        return 0;
    case ARGP_KEY_ARG: /* the subcommand; the rest of the line is its own */
        m->command_at = state->next - 1;
        state->next = state->argc;
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_usage(state);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* Appends the list of commands and the exit codes to --help. */
static char *help_filter(int key, const char *text, void *input)
{
    size_t n_bytes = 4096;
    char *out = NULL;
    int n = 0;

    (void)input;
    if (key != ARGP_KEY_HELP_POST_DOC) {
        return (char *)(uintptr_t)text; /* argp's signature is not const-correct */
    }
    out = malloc(n_bytes);
    if (out == NULL) {
        return NULL;
    }
    n = snprintf(out, n_bytes, "Commands (each has its own --help):\n");
    for (size_t i = 0; (i < N_COMMANDS) && (n > 0) && ((size_t)n < n_bytes); i++) {
        n += snprintf(out + n, n_bytes - (size_t)n, "  %-10s %s\n", k_commands[i].name,
                      k_commands[i].help);
    }
    if ((n > 0) && ((size_t)n < n_bytes)) {
        (void)snprintf(out + n, n_bytes - (size_t)n,
                       "\nExit codes: 0 success; 1 the service refused, failed or could not be "
                       "reached; 2 wrong usage.\n");
    }
    return out;
}

static const struct argp k_argp = {
    .options = k_options,
    .parser = parse,
    .args_doc = "COMMAND [ARGUMENTS]",
    .doc = "Inspect and use a Fovea attention service.\v",
    .help_filter = help_filter,
};

static int run_command(fv_main_t *m, int argc, char **argv)
{
    char name[64];

    for (size_t i = 0; i < N_COMMANDS; i++) {
        if (strcmp(argv[0], k_commands[i].name) == 0) {
            (void)snprintf(name, sizeof(name), "fovea %s", k_commands[i].name);
            argv[0] = name; /* what its messages and its --help call it */
            return k_commands[i].run(&m->cli, argc, argv);
        }
    }
    (void)fprintf(stderr, "fovea: unknown command \"%s\"; see fovea --help\n", argv[0]);
    return FV_EXIT_USAGE;
}

static const char *env_or(const char *name, const char *otherwise)
{
    const char *value = getenv(name); /* NOLINT(concurrency-mt-unsafe): one thread yet */

    return ((value != NULL) && (value[0] != '\0')) ? value : otherwise;
}

int main(int argc, char **argv)
{
    fv_main_t m = {.cli = {.address = env_or("FOVEA_ADDRESS", FV_CLI_ADDRESS_DEFAULT),
                           .options = {.ca_file = env_or("FOVEA_CA", NULL),
                                       .cert_file = env_or("FOVEA_CERT", NULL),
                                       .key_file = env_or("FOVEA_KEY", NULL),
                                       .token_file = env_or("FOVEA_TOKEN_FILE", NULL)}}};

    if (m.cli.options.token_file == NULL) {
        m.cli.options.token = env_or("FOVEA_TOKEN", NULL);
    }

    argp_program_version = fovea_version();
    argp_err_exit_status = FV_EXIT_USAGE;
    if (argp_parse(&k_argp, argc, argv, ARGP_IN_ORDER, NULL, &m) != 0) {
        return FV_EXIT_USAGE;
    }
    return run_command(&m, argc - m.command_at, argv + m.command_at);
}
