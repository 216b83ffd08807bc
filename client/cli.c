/*
 * cli.c - helpers of the subcommands: connecting, complaining, printing, parsing.
 */
#include "client/cli.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int fv_cli_error(const fovea_error_t *error)
{
    (void)fflush(stdout);
    (void)fprintf(stderr, "fovea: %s: %s\n", fovea_code_name(error->code), error->message);
    return FV_EXIT_SERVICE;
}

int fv_cli_connect(const fv_cli_t *cli, fovea_client_t **out)
{
    fovea_options_t options = cli->options;
    fovea_error_t error;

    options.connect_timeout_ms = cli->timeout_ms;
    options.call_timeout_ms = cli->timeout_ms;

    if (fovea_connect(cli->address, &options, out, &error) != FOVEA_OK) {
        return fv_cli_error(&error);
    }
    return FV_EXIT_OK;
}

/* ------------------------------------------------------------------ JSON */

int fv_cli_print_json(cJSON *json, bool is_pretty)
{
    char *text = (json == NULL) ? NULL
                 : is_pretty    ? cJSON_Print(json)
                                : cJSON_PrintUnformatted(json);
    int rc = FV_EXIT_OK;

    if (text == NULL) {
        (void)fprintf(stderr, "fovea: out of memory\n");
        rc = FV_EXIT_SERVICE;
    } else {
        (void)printf("%s\n", text);
        (void)fflush(stdout); /* --watch is read line by line */
    }
    cJSON_free(text);
    cJSON_Delete(json);
    return rc;
}

void fv_json_u64(cJSON *object, const char *name, uint64_t value)
{
    (void)cJSON_AddNumberToObject(object, name, (double)value);
}

void fv_json_text(cJSON *object, const char *name, const char *value)
{
    (void)cJSON_AddStringToObject(object, name, value);
}

void fv_json_bool(cJSON *object, const char *name, bool value)
{
    (void)cJSON_AddBoolToObject(object, name, value);
}

void fv_json_real(cJSON *object, const char *name, double value)
{
    (void)cJSON_AddNumberToObject(object, name, value);
}

/* ------------------------------------------------------------------ text */

const char *fv_cli_bytes(uint64_t n_bytes, char out[FV_CLI_TEXT_BYTES])
{
    static const char *const k_units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    double value = (double)n_bytes;
    size_t unit = 0;

    while ((value >= 1024.0) && (unit < ((sizeof(k_units) / sizeof(k_units[0])) - 1))) {
        value /= 1024.0;
        unit++;
    }
    (void)snprintf(out, FV_CLI_TEXT_BYTES, (unit == 0) ? "%.0f %s" : "%.1f %s", value,
                   k_units[unit]);
    return out;
}

const char *fv_cli_duration(uint64_t duration_ms, char out[FV_CLI_TEXT_BYTES])
{
    unsigned long long s = duration_ms / 1000;

    if (s < 60) {
        (void)snprintf(out, FV_CLI_TEXT_BYTES, "%.1fs", (double)duration_ms / 1e3);
    } else if (s < 3600) {
        (void)snprintf(out, FV_CLI_TEXT_BYTES, "%llum %02llus", s / 60, s % 60);
    } else if (s < 86400) {
        (void)snprintf(out, FV_CLI_TEXT_BYTES, "%lluh %02llum", s / 3600, (s / 60) % 60);
    } else {
        (void)snprintf(out, FV_CLI_TEXT_BYTES, "%llud %lluh", s / 86400, (s / 3600) % 24);
    }
    return out;
}

/* ------------------------------------------------------------------ parsing */

uint64_t fv_cli_u64(struct argp_state *state, const char *option, const char *text, uint64_t max)
{
    char *end = NULL;
    unsigned long long value = 0;

    errno = 0;
    value = strtoull(text, &end, 10);
    if ((text[0] == '\0') || (text[0] == '-') || (*end != '\0') || (errno != 0) || (value > max)) {
        argp_error(state, "%s: given \"%s\", expected a whole number, at most %llu", option, text,
                   (unsigned long long)max);
    }
    return value;
}

double fv_cli_real(struct argp_state *state, const char *option, const char *text)
{
    char *end = NULL;
    double value = 0.0;

    errno = 0;
    value = strtod(text, &end);
    if ((text[0] == '\0') || (*end != '\0') || (errno != 0) || !isfinite(value)) {
        argp_error(state, "%s: given \"%s\", expected a number", option, text);
    }
    return value;
}

fovea_dtype_t fv_cli_dtype(struct argp_state *state, const char *text)
{
    if (strcmp(text, "f32") == 0) {
        return FOVEA_DTYPE_F32;
    }
    if (strcmp(text, "f16") == 0) {
        return FOVEA_DTYPE_F16;
    }
    if (strcmp(text, "bf16") != 0) {
        argp_error(state, "dtype: given \"%s\", expected f32, f16 or bf16", text);
    }
    return FOVEA_DTYPE_BF16;
}

fovea_session_id_t fv_cli_session(struct argp_state *state, const char *text)
{
    fovea_session_id_t id = {{0}};

    if (!fovea_session_id_parse(text, &id)) {
        argp_error(state, "session: given \"%s\", expected 32 hex digits", text);
    }
    return id;
}

/* ------------------------------------------------------------------ model options */

enum {
    OPT_NAME = 1000,
    OPT_LAYERS,
    OPT_Q_HEADS,
    OPT_KV_HEADS,
    OPT_HEAD_DIM,
    OPT_HEAD_DIM_V,
    OPT_KV_DTYPE,
    OPT_SCALE,
    OPT_SOFTCAP,
    OPT_WINDOW,
    OPT_SINKS,
    OPT_LATENT_DIM,
    OPT_ROPE_DIM,
    OPT_GROUPS,
    OPT_SHARDING,
    OPT_SHARD_TOKENS,
    OPT_MAX_RANKS,
    OPT_S2,
    OPT_S2_LAYERS,
};

static const struct argp_option k_spec_options[] = {
    {0, 0, 0, 0, "Model:", 0},
    {"name", OPT_NAME, "NAME", 0, "Name shown in status output", 0},
    {"layers", OPT_LAYERS, "N", 0, "Number of layers", 0},
    {"q-heads", OPT_Q_HEADS, "N", 0, "Query heads", 0},
    {"kv-heads", OPT_KV_HEADS, "N", 0, "KV heads", 0},
    {"head-dim", OPT_HEAD_DIM, "N", 0, "Dimension of Q and K heads (16..256, a multiple of 8)", 0},
    {"head-dim-v", OPT_HEAD_DIM_V, "N", 0, "Dimension of V heads (default: as --head-dim)", 0},
    {"kv-dtype", OPT_KV_DTYPE, "f32|f16|bf16|fp8_latent", 0,
     "How the service stores K and V; fp8_latent with --latent-dim", 0},
    {"scale", OPT_SCALE, "X", 0, "Softmax scale (default: 1/sqrt(head dim))", 0},
    {"softcap", OPT_SOFTCAP, "C", 0, "Logits become C*tanh(logit/C) (default: off)", 0},
    {"window", OPT_WINDOW, "N", 0, "A query sees the last N tokens only", 0},
    {"sinks", OPT_SINKS, "N", 0, "... and the first N (with --window)", 0},
    {"s2", OPT_S2, "PATTERN", 0,
     "S2-Attention: phi3-small, s2-4..64, or block=B,local=L,stride=V[,step=,offset=,dense=,homo,per=q]",
     0},
    {"s2-layers", OPT_S2_LAYERS, "LIST", 0, "... in these layers (even, odd, 0-30:2,31)", 0},
    {"latent-dim", OPT_LATENT_DIM, "N", 0,
     "A latent (MLA) model of this many dims, in place of KV heads; needs --scale", 0},
    {"rope-dim", OPT_ROPE_DIM, "N", 0, "... and its RoPE key's", 0},
    {"sharding", OPT_SHARDING, "auto|heads|context|latent|latent-exact", 0,
     "How sessions spread over ranks; latent (approximate) cuts the latent, latent-exact adds up "
     "the slices' scores",
     0},
    {"groups", OPT_GROUPS, "N", 0, "Slices of the latent (with --sharding latent)", 0},
    {"shard-tokens", OPT_SHARD_TOKENS, "N", 0, "Tokens per turn of a sharded context", 0},
    {"max-ranks", OPT_MAX_RANKS, "N", 0, "Use at most N ranks per session", 0},
    {0, 0, 0, 0, "Other:", -1},
    {0},
};

static fovea_sharding_mode_t parse_sharding(struct argp_state *state, const char *text)
{
    if (strcmp(text, "auto") == 0) {
        return FOVEA_SHARDING_AUTO;
    }
    if (strcmp(text, "heads") == 0) {
        return FOVEA_SHARDING_HEADS;
    }
    if ((strcmp(text, "latent") == 0) || (strcmp(text, "latent-exact") == 0)) {
        return FOVEA_SHARDING_LATENT;
    }
    if (strcmp(text, "context") != 0) {
        argp_error(state,
                   "--sharding: given \"%s\", expected auto, heads, context, latent or "
                   "latent-exact",
                   text);
    }
    return FOVEA_SHARDING_CONTEXT;
}

/* Options that are plain counts, in the order of the enum's first and last ones. */
static uint32_t *count_of(fv_spec_options_t *o, int key)
{
    switch (key) {
    case OPT_LAYERS:
        return &o->spec.n_layers;
    case OPT_Q_HEADS:
        return &o->spec.n_q_heads;
    case OPT_KV_HEADS:
        return &o->spec.n_kv_heads;
    case OPT_HEAD_DIM:
        return &o->spec.head_dim_qk;
    case OPT_HEAD_DIM_V:
        return &o->spec.head_dim_v;
    case OPT_WINDOW:
        return &o->window_tokens;
    case OPT_SINKS:
        return &o->sink_tokens;
    case OPT_LATENT_DIM:
        return &o->spec.latent_dim;
    case OPT_ROPE_DIM:
        return &o->spec.rope_dim;
    case OPT_GROUPS:
        return &o->spec.sharding.groups;
    case OPT_SHARD_TOKENS:
        return &o->spec.sharding.shard_tokens;
    case OPT_MAX_RANKS:
        return &o->spec.sharding.max_ranks;
    default:
        return NULL;
    }
}

/* A later policy wins, so S2 in some layers leaves the window to the others. */
static void set_policies(struct argp_state *state, fv_spec_options_t *o)
{
    uint32_t n = 0;

    if (o->window_tokens > 0) {
        o->policies[n++] = (fovea_policy_t){.kind = FOVEA_POLICY_WINDOW,
                                            .window_tokens = o->window_tokens,
                                            .sink_tokens = o->sink_tokens};
    } else if (o->sink_tokens > 0) {
        argp_error(state, "--sinks: given without --window");
    }
    if (o->has_s2) {
        o->policies[n] = (fovea_policy_t){.kind = FOVEA_POLICY_S2, .s2 = o->s2};
        if (o->s2_layers != NULL) {
            o->policies[n].n_layers =
                fv_cli_layers(state, o->s2_layers, o->spec.n_layers, o->layers);
            o->policies[n].layers = o->layers;
        }
        n++;
    } else if (o->s2_layers != NULL) {
        argp_error(state, "--s2-layers: given without --s2");
    }
    o->spec.policies = o->policies;
    o->spec.n_policies = n;
}

static error_t parse_spec(int key, char *arg, struct argp_state *state)
{
    fv_spec_options_t *o = state->input;
    uint32_t *count = (o != NULL) ? count_of(o, key) : NULL;

    if (count != NULL) {
        *count = (uint32_t)fv_cli_u64(state, "model options", arg, UINT32_MAX);
        o->has_spec = true;
        return 0;
    }
    switch (key) {
    case OPT_NAME:
        o->spec.name = arg;
        break;
    case OPT_KV_DTYPE:
        o->spec.kv_dtype =
            (strcmp(arg, "fp8_latent") == 0) ? FOVEA_DTYPE_FP8_LATENT : fv_cli_dtype(state, arg);
        break;
    case OPT_SCALE:
        o->spec.softmax_scale = (float)fv_cli_real(state, "--scale", arg);
        break;
    case OPT_SOFTCAP:
        o->spec.logit_softcap = (float)fv_cli_real(state, "--softcap", arg);
        break;
    case OPT_SHARDING:
        o->spec.sharding.mode = parse_sharding(state, arg);
        o->spec.sharding.exact = strcmp(arg, "latent-exact") == 0;
        break;
    case OPT_S2:
        o->s2 = fv_cli_s2(state, arg);
        o->has_s2 = true;
        break;
    case OPT_S2_LAYERS:
        o->s2_layers = arg;
        break;
    case ARGP_KEY_END:
        if ((o != NULL) && (o->spec.latent_dim > 0)) {
            o->spec.kind = FOVEA_KIND_LATENT;
            o->spec.n_kv_heads = 0;
            o->spec.head_dim_qk = 0;
            o->spec.head_dim_v = 0;
        }
        if (o != NULL) {
            set_policies(state, o);
        }
        return ARGP_ERR_UNKNOWN; /* the parent's to see as well */
    default:
        return ARGP_ERR_UNKNOWN;
    }
    o->has_spec = true;
    return 0;
}

const struct argp fv_spec_argp = {.options = k_spec_options, .parser = parse_spec};
