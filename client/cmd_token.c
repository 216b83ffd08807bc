/*
 * cmd_token.c - `fovea token`: a fresh token, and its line for the service's token file. Talks to no service.
 */
#include "client/cli.h"
#include "common/config_table.h"
#include "common/token.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define TOKEN_RANDOM_BYTES 32
#define TOKEN_CHARS        (sizeof(FV_TOKEN_PREFIX) + (2U * TOKEN_RANDOM_BYTES)) /* with NUL */
#define SECONDS_A_DAY      86400

enum {
    OPT_ROLE = 0x100,
    OPT_EXPIRES,
    OPT_DAYS,
    OPT_SESSIONS,
    OPT_KV_BYTES,
    OPT_REQUESTS,
    OPT_RATE,
    OPT_MODELS,
    OPT_FILE,
};

typedef struct fv_token_args {
    fv_token_line_t line;
    const char *file;
} fv_token_args_t;

static const struct argp_option k_token_options[] = {
    {"role", OPT_ROLE, "ROLE", 0, "user (its own sessions; default) or admin (everybody's, drain)",
     0},
    {"expires", OPT_EXPIRES, "DATE", 0, "YYYY-MM-DD or YYYY-MM-DDThh:mm:ssZ; default: never", 0},
    {"days", OPT_DAYS, "N", 0, "Expires in N days", 0},
    {"sessions", OPT_SESSIONS, "N", 0, "Quota: sessions open at once", 0},
    {"kv-bytes", OPT_KV_BYTES, "BYTES", 0, "Quota: KV cache, e.g. 16g", 0},
    {"requests", OPT_REQUESTS, "N", 0, "Quota: requests in flight", 0},
    {"bytes-per-second", OPT_RATE, "BYTES", 0, "Quota: of request messages, e.g. 500m", 0},
    {"models", OPT_MODELS, "N", 0, "Quota: models registered; default: 16", 0},
    {"file", OPT_FILE, "FILE", 0, "Append the line to FILE (made with mode 600)", 0},
    {0},
};

static uint64_t quota(struct argp_state *state, const char *option, const char *text)
{
    uint64_t value = 0;

    if (!fv_bytes_parse(text, &value) || (value == 0) || (value > ((uint64_t)1 << 60))) {
        argp_error(state, "%s: given \"%s\", expected a number of at least 1, as 16 or 16g", option,
                   text);
    }
    return value;
}

static void set_expiry(struct argp_state *state, fv_token_line_t *line, int key, const char *arg)
{
    if (key == OPT_DAYS) {
        uint64_t days = fv_cli_u64(state, "--days", arg, 36500);
        line->expires_s = (int64_t)time(NULL) + ((int64_t)days * SECONDS_A_DAY);
    } else if (fv_token_time_parse(arg, &line->expires_s) != FV_OK) {
        argp_error(state, "--%s", fv_error_context());
    }
}

static error_t parse_token(int key, char *arg, struct argp_state *state)
{
    fv_token_args_t *a = state->input;

    switch (key) {
    case OPT_ROLE:
        if ((strcmp(arg, "user") != 0) && (strcmp(arg, "admin") != 0)) {
            argp_error(state, "--role: given \"%s\", expected user or admin", arg);
        }
        a->line.role = (arg[0] == 'a') ? FV_ROLE_ADMIN : FV_ROLE_USER;
        return 0;
    case OPT_EXPIRES:
    case OPT_DAYS:
        set_expiry(state, &a->line, key, arg);
        return 0;
    case OPT_SESSIONS:
        a->line.quota.sessions = quota(state, "--sessions", arg);
        return 0;
    case OPT_KV_BYTES:
        a->line.quota.kv_bytes = quota(state, "--kv-bytes", arg);
        return 0;
    case OPT_REQUESTS:
        a->line.quota.requests = quota(state, "--requests", arg);
        return 0;
    case OPT_RATE:
        a->line.quota.bytes_per_second = quota(state, "--bytes-per-second", arg);
        return 0;
    case OPT_MODELS:
        a->line.quota.models = quota(state, "--models", arg);
        return 0;
    case OPT_FILE:
        a->file = arg;
        return 0;
    case ARGP_KEY_ARG:
        if ((a->line.name[0] != '\0') || !fv_token_name_is_valid(arg)) {
            argp_error(state,
                       "NAME: given \"%s\", expected one name of 1..%d letters, digits and "
                       "._@-, not \"anonymous\" and not beginning with " FV_TOKEN_PREFIX,
                       arg, FV_TOKEN_NAME_BYTES - 1);
        }
        (void)snprintf(a->line.name, sizeof(a->line.name), "%s", arg);
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_usage(state);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp k_token_argp = {
    .options = k_token_options,
    .parser = parse_token,
    .args_doc = "NAME",
    .doc =
        "Make a token for NAME and its line for the service's token file (--tokens). The token goes to stdout; "
        "it is nowhere else, so keep it. The line follows it, unless --file takes it."
        "\vExit codes: 0 success, 1 no random bytes or the file cannot be written, 2 wrong usage.",
};

static fv_status_t make(fv_token_line_t *line, char token[TOKEN_CHARS])
{
    uint8_t random[TOKEN_RANDOM_BYTES];

    FV_RETURN_IF_ERR(fv_random_bytes(random, sizeof(random)));
    memcpy(token, FV_TOKEN_PREFIX, strlen(FV_TOKEN_PREFIX));
    fv_hex_format(random, sizeof(random), token + strlen(FV_TOKEN_PREFIX));
    fv_secret_wipe(random, sizeof(random));
    return fv_sha256(token, strlen(token), line->sha256);
}

/* A file edited by hand may end in the middle of its last line. */
static bool ends_a_line(int fd)
{
    off_t end = lseek(fd, 0, SEEK_END);
    char last = '\n';

    return (end <= 0) || (pread(fd, &last, 1, end - 1) != 1) || (last == '\n');
}

/* One write(): two `fovea token` at once do not mix their lines. */
static bool append(const char *path, const char *line)
{
    char text[FV_TOKEN_LINE_BYTES + 2];
    int fd = open(path, O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    int n = snprintf(text, sizeof(text), "%s%s\n", ((fd < 0) || ends_a_line(fd)) ? "" : "\n", line);
    bool ok = (fd >= 0) && (write(fd, text, (size_t)n) == n);
    int error = errno;

    if ((fd >= 0) && (close(fd) != 0)) {
        error = errno;
        ok = false;
    }
    if (!ok) {
        (void)fprintf(stderr, "fovea: %s: %s\n", path, strerror(error));
    }
    return ok;
}

int fv_cmd_token(const fv_cli_t *cli, int argc, char **argv)
{
    fv_token_args_t a = {.line = {.expires_s = FV_TOKEN_NEVER}};
    char token[TOKEN_CHARS];
    char line[FV_TOKEN_LINE_BYTES];

    (void)cli;
    (void)argp_parse(&k_token_argp, argc, argv, 0, NULL, &a);
    if (make(&a.line, token) != FV_OK) {
        (void)fprintf(stderr, "fovea: %s\n", fv_error_context());
        return FV_EXIT_SERVICE;
    }
    fv_token_line_format(&a.line, line);
    if ((a.file != NULL) && !append(a.file, line)) {
        return FV_EXIT_SERVICE;
    }
    (void)printf("%s\n", token);
    if (a.file == NULL) {
        (void)printf("%s\n", line);
    }
    return FV_EXIT_OK;
}
