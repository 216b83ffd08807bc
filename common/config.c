/*
 * config.c - reads the sources in order.
 */
#include "common/config.h"

#include "common/config_table.h"

#include <argp.h>
#include <errno.h>
#include <string.h>

#define NAME_BYTES 48
#define DOC_BYTES  320

enum {
    FV_KEY_FIRST = 0x1000, /* + index into fv_options; beyond any character */
    FV_KEY_CONFIG = 0x2000,
    FV_KEY_PRINT,
    FV_KEY_HELP,
    FV_KEY_VERSION,
};

/* ------------------------------------------------------------------ environment */

/* The value of `name`; NULL when it is not there or empty. */
static const char *env_value(char *const *env, const char *name)
{
    size_t n = strlen(name);

    for (; (env != NULL) && (*env != NULL); env++) {
        if ((strncmp(*env, name, n) == 0) && ((*env)[n] == '=') && ((*env)[n + 1U] != '\0')) {
            return *env + n + 1U;
        }
    }
    return NULL;
}

static fv_status_t load_env(char *const *env, fv_config_t *config)
{
    char name[NAME_BYTES];

    for (size_t i = 0; i < fv_n_options; i++) {
        fv_option_env_name(&fv_options[i], name, sizeof(name));
        fv_source_t source = {.kind = FV_SOURCE_ENV, .name = name};
        const char *value = env_value(env, name);

        if (value != NULL) {
            FV_RETURN_IF_ERR(fv_option_set(&fv_options[i], value, &source, config));
        }
    }
    return FV_OK;
}

/* ------------------------------------------------------------------ command line */

#define OPTIONS_CAP 64 /* options and group headings */

/* What argp needs, made from the table. */
typedef struct argp_text {
    struct argp_option options[OPTIONS_CAP];
    char names[OPTIONS_CAP][NAME_BYTES];
    char docs[OPTIONS_CAP][DOC_BYTES];
    struct argp argp;
} argp_text_t;

/* The command line is walked twice: first for --config and the actions, then, after the other sources,
 * for the values. */
typedef struct command_line {
    bool is_values;
    const char *file;
    fv_config_t *config;
    fv_status_t status;
} command_line_t;

static error_t
set_from_command_line(command_line_t *line, const fv_option_t *option, const char *arg)
{
    static const fv_source_t k_source = {.kind = FV_SOURCE_COMMAND_LINE};

    if (!line->is_values) {
        return 0;
    }
    /* a switch without its optional value is on */
    line->status = fv_option_set(option, (arg != NULL) ? arg : "true", &k_source, line->config);
    return (line->status == FV_OK) ? 0 : EINVAL;
}

static error_t refuse(command_line_t *line, const char *given)
{
    if (line->status == FV_OK) {
        line->status =
            fv_fail(FV_ERR_INVALID_ARG,
                    "command line: given \"%.80s\", expected options as --help lists them", given);
    }
    return EINVAL;
}

static error_t parse_option(int key, char *arg, struct argp_state *state)
{
    command_line_t *line = state->input;

    if ((key >= FV_KEY_FIRST) && (key < FV_KEY_FIRST + (int)fv_n_options)) {
        return set_from_command_line(line, &fv_options[key - FV_KEY_FIRST], arg);
    }
    switch (key) {
    case FV_KEY_CONFIG:
        line->file = arg;
        return 0;
    case FV_KEY_PRINT:
        line->config->action = FV_CONFIG_PRINT;
        return 0;
    case FV_KEY_VERSION:
        line->config->action = FV_CONFIG_VERSION;
        return 0;
    case FV_KEY_HELP:
        line->config->action = FV_CONFIG_HELP;
        return 0;
    case ARGP_KEY_ARG:
        return refuse(line, arg);
    case ARGP_KEY_ERROR:
        return refuse(line, state->argv[(state->next > 0) ? (state->next - 1) : 0]);
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static size_t add_actions(struct argp_option *o, int group)
{
    const struct argp_option actions[] = {
        {.doc = "Other:", .group = group},
        {.name = "config",
         .key = FV_KEY_CONFIG,
         .arg = "FILE",
         .group = group,
         .doc = "Read this file (key = value lines); also FV_CONFIG."},
        {.name = "print-config",
         .key = FV_KEY_PRINT,
         .group = group,
         .doc = "Print the configuration that results, as such a file, and exit."},
        {.name = "help", .key = FV_KEY_HELP, .group = group, .doc = "Print this and exit."},
        {.name = "version",
         .key = FV_KEY_VERSION,
         .group = group,
         .doc = "Print the version and exit."},
    };

    memcpy(o, actions, sizeof(actions));
    return sizeof(actions) / sizeof(actions[0]);
}

/* Made anew each time in memory of its own: it is large for a stack, and there is one thread yet. */
static argp_text_t *make_argp(void)
{
    static argp_text_t text;
    argp_text_t *t = &text;
    struct argp_option *o = t->options;
    int group = 0;

    memset(t, 0, sizeof(*t));
    for (size_t i = 0; i < fv_n_options; i++) {
        const fv_option_t *option = &fv_options[i];

        if (option->group != NULL) {
            group++;
            (void)snprintf(t->names[OPTIONS_CAP - 1 - group], NAME_BYTES, "%s:", option->group);
            *o++ = (struct argp_option){.doc = t->names[OPTIONS_CAP - 1 - group], .group = group};
        }
        fv_option_long_name(option, t->names[i], NAME_BYTES);
        (void)snprintf(t->docs[i], DOC_BYTES, "%s [%s]", option->help, option->value);
        *o++ = (struct argp_option){.name = t->names[i],
                                    .key = FV_KEY_FIRST + (int)i,
                                    .arg = option->arg,
                                    .flags =
                                        (option->type == FV_OPTION_BOOL) ? OPTION_ARG_OPTIONAL : 0,
                                    .doc = t->docs[i],
                                    .group = group};
    }
    o += add_actions(o, group + 1);
    FV_ASSERT(o < &t->options[OPTIONS_CAP]); /* the list ends with an entry of zeros */
    t->argp = (struct argp){
        .options = t->options,
        .parser = parse_option,
        .doc =
            "Distributed attention service. Alone it is a whole service in one process; under "
            "mpirun each rank holds a part of the KV cache.\vEvery option KEY can also be set by "
            "FV_KEY in the environment and by a line in the file; the command line wins over "
            "the environment, the environment over the file."};
    return t;
}

static fv_status_t walk_command_line(int argc, char *const *argv, command_line_t *line)
{
    union {
        char *const *in;
        char **out;
    } words = {.in = argv}; /* ARGP_IN_ORDER: argp leaves them as they are */
    argp_text_t *text = make_argp();

    if (argc < 1) { /* argp reads the program's name */
        return FV_OK;
    }
    error_t error = /* NOLINTNEXTLINE(concurrency-mt-unsafe): one thread yet */
        argp_parse(&text->argp, argc, words.out,
                   ARGP_NO_EXIT | ARGP_NO_ERRS | ARGP_NO_HELP | ARGP_IN_ORDER, NULL, line);
    if ((error != 0) && (line->status == FV_OK)) {
        (void)refuse(line, "an argument");
    }
    return line->status;
}

/* ------------------------------------------------------------------ all together */

void fv_config_defaults(fv_config_t *out)
{
    static const fv_source_t k_source = {.kind = FV_SOURCE_DEFAULT};

    memset(out, 0, sizeof(*out));
    for (size_t i = 0; i < fv_n_options; i++) {
        FV_ASSERT(fv_option_set(&fv_options[i], fv_options[i].value, &k_source, out) == FV_OK);
    }
}

fv_status_t fv_config_load(int argc, char *const *argv, char *const *env, fv_config_t *out)
{
    fv_config_t config;
    command_line_t line = {.config = &config, .status = FV_OK};

    fv_config_defaults(&config);
    FV_RETURN_IF_ERR(walk_command_line(argc, argv, &line));
    if ((config.action != FV_CONFIG_HELP) && (config.action != FV_CONFIG_VERSION)) {
        const char *file = (line.file != NULL) ? line.file : env_value(env, "FV_CONFIG");

        if (file != NULL) {
            FV_RETURN_IF_ERR(fv_config_read_file(file, &config));
        }
        FV_RETURN_IF_ERR(load_env(env, &config));
        line.is_values = true;
        FV_RETURN_IF_ERR(walk_command_line(argc, argv, &line));
    }
    *out = config;
    return FV_OK;
}

void fv_config_help(const char *program, FILE *out)
{
    argp_text_t *text = make_argp();
    char name[NAME_BYTES];

    (void)snprintf(name, sizeof(name), "%s", program);
    /* NOLINTNEXTLINE(concurrency-mt-unsafe): one thread yet */
    argp_help(&text->argp, out, ARGP_HELP_SHORT_USAGE | ARGP_HELP_LONG | ARGP_HELP_DOC, name);
}
