/*
 * cmd_models.c - `fovea models register`.
 */
#include "client/cli.h"

#include <stdio.h>
#include <string.h>

typedef struct fv_models_args {
    fv_spec_options_t spec;
    bool has_verb;
} fv_models_args_t;

static error_t parse(int key, char *arg, struct argp_state *state)
{
    fv_models_args_t *a = state->input;

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &a->spec;
        return 0;
    case ARGP_KEY_ARG:
        if (a->has_verb || (strcmp(arg, "register") != 0)) {
            argp_error(state, "given \"%s\", expected: register [OPTIONS]", arg);
        }
        a->has_verb = true;
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_usage(state);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_child k_children[] = {{&fv_spec_argp, 0, NULL, 0}, {0}};

static const struct argp k_argp = {
    .parser = parse,
    .children = k_children,
    .args_doc = "register",
    .doc = "Register a model: the geometry of its attention. Prints the model id; the same spec "
           "always gives the same id.\v"
           "Example:\n  fovea models register --name llama-8b --layers 32 --q-heads 32 "
           "--kv-heads 8 --head-dim 128 --kv-dtype bf16\n\n"
           "Exit codes: 0 success, 1 service error, 2 wrong usage.",
};

int fv_cmd_models(const fv_cli_t *cli, int argc, char **argv)
{
    fv_models_args_t a = {.spec.spec = {.kv_dtype = FOVEA_DTYPE_BF16}};
    fovea_client_t *client = NULL;
    fovea_model_t model;
    fovea_error_t error;
    int rc = FV_EXIT_OK;

    (void)argp_parse(&k_argp, argc, argv, 0, NULL, &a);
    rc = fv_cli_connect(cli, &client);
    if (rc != FV_EXIT_OK) {
        return rc;
    }
    if (fovea_register_model(client, &a.spec.spec, cli->timeout_ms, &model, &error) != FOVEA_OK) {
        rc = fv_cli_error(&error);
    } else {
        (void)printf("%s\n", model.model_id);
        for (uint32_t i = 0; i < model.n_warnings; i++) {
            (void)fprintf(stderr, "fovea: warning: %s\n", model.warnings[i]);
        }
    }
    fovea_close(client);
    return rc;
}
