/*
 * cli.h - what the subcommands of the `fovea` tool share.
 *
 * A subcommand is a function that parses its own arguments with argp, does its work through fovea.h,
 * prints to stdout, complains to stderr, and returns the exit code.
 */
#ifndef FV_CLIENT_CLI_H
#define FV_CLIENT_CLI_H

#include "client/fovea.h"

#include <argp.h>
#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stdint.h>

#define FV_EXIT_OK 0
#define FV_EXIT_SERVICE \
    1 /* the service refused, failed or could not be reached; or a file could not */
#define FV_EXIT_USAGE 2 /* the command line is wrong; nothing was sent */

#define FV_CLI_ADDRESS_DEFAULT "127.0.0.1:7411"

typedef struct fv_cli {
    const char *address;
    int64_t timeout_ms;      /* of connecting and of each call; 0 = the library's defaults */
    fovea_options_t options; /* TLS and token */
} fv_cli_t;

typedef int (*fv_command_fn_t)(const fv_cli_t *cli, int argc, char **argv);

int fv_cmd_status(const fv_cli_t *cli, int argc, char **argv);
int fv_cmd_sessions(const fv_cli_t *cli, int argc, char **argv);
int fv_cmd_placement(const fv_cli_t *cli, int argc, char **argv);
int fv_cmd_models(const fv_cli_t *cli, int argc, char **argv);
int fv_cmd_open(const fv_cli_t *cli, int argc, char **argv);
int fv_cmd_fork(const fv_cli_t *cli, int argc, char **argv);
int fv_cmd_truncate(const fv_cli_t *cli, int argc, char **argv);
int fv_cmd_close(const fv_cli_t *cli, int argc, char **argv);
int fv_cmd_attend(const fv_cli_t *cli, int argc, char **argv);
int fv_cmd_bench(const fv_cli_t *cli, int argc, char **argv);
int fv_cmd_store(const fv_cli_t *cli, int argc, char **argv);
int fv_cmd_token(const fv_cli_t *cli, int argc, char **argv);
int fv_cmd_drain(const fv_cli_t *cli, int argc, char **argv);

/* Connects, or says why not on stderr: FV_EXIT_OK or FV_EXIT_SERVICE. */
int fv_cli_connect(const fv_cli_t *cli, fovea_client_t **out);

/* "fovea: NOT_FOUND: text" on stderr; returns FV_EXIT_SERVICE. */
int fv_cli_error(const fovea_error_t *error);

/* Prints and deletes `json`; FV_EXIT_SERVICE when it could not be made (NULL). */
int fv_cli_print_json(cJSON *json, bool is_pretty);

/* Number members: cJSON's numbers are doubles, exact up to 2^53. */
void fv_json_u64(cJSON *object, const char *name, uint64_t value);
void fv_json_text(cJSON *object, const char *name, const char *value);
void fv_json_bool(cJSON *object, const char *name, bool value);
void fv_json_real(cJSON *object, const char *name, double value);

#define FV_CLI_TEXT_BYTES 32

/* "1.5 GiB", "730 B". Returns `out`. */
const char *fv_cli_bytes(uint64_t n_bytes, char out[FV_CLI_TEXT_BYTES]);
/* "2d 3h", "4m 05s", "1.2s". */
const char *fv_cli_duration(uint64_t duration_ms, char out[FV_CLI_TEXT_BYTES]);

/* Strict parsing for argp parsers: on failure ends through argp_error(), which exits with 2. */
uint64_t fv_cli_u64(struct argp_state *state, const char *option, const char *text, uint64_t max);
double fv_cli_real(struct argp_state *state, const char *option, const char *text);
fovea_dtype_t fv_cli_dtype(struct argp_state *state, const char *text); /* f32, f16, bf16 */
fovea_session_id_t fv_cli_session(struct argp_state *state, const char *text);

/* ------------------------------------------------------------------ model options */

/* A model spec given by options (child parser `fv_spec_argp`, whose input this is). */
typedef struct fv_spec_options {
    fovea_model_spec_t spec;
    fovea_policy_t policies[2]; /* spec.policies points here: the window, then S2 */
    uint32_t window_tokens, sink_tokens;
    fovea_s2_t s2;
    const char *s2_layers; /* as given; NULL: every layer */
    uint32_t layers[1024]; /* those that s2_layers names */
    bool has_s2;
    bool has_spec; /* at least one of the options was given */
} fv_spec_options_t;

extern const struct argp fv_spec_argp;

/* "s2-16", or "block=64,local=8,stride=16" with any of step=, offset=, dense=, homo, per=q. Points into `text`. */
fovea_s2_t fv_cli_s2(struct argp_state *state, char *text);
/* "0-30:2,31", "even", "odd" of n_layers: how many, written to out[1024]. */
uint32_t
fv_cli_layers(struct argp_state *state, const char *text, uint32_t n_layers, uint32_t *out);

/* ------------------------------------------------------------------ patterns of a placement */

/* What each policy keeps and has freed, and which blocks each head reads. */
void fv_cli_print_patterns(const fovea_placement_t *placement);
/* The same as a picture. False, with errno, when the file can not be written. */
bool fv_cli_draw_patterns(const fovea_placement_t *placement, const char *path);

#endif /* FV_CLIENT_CLI_H */
