/*
 * config_print.c - writes a configuration as a file, and the table of options as a page.
 */
#include "common/config_table.h"

#include <string.h>

#define NAME_BYTES     48
#define EXPECTED_BYTES 320
#define WRAP_COLUMN    96

/* Writes text as comment lines, broken between words. */
static void print_comment(const char *text, FILE *out)
{
    while (*text != '\0') {
        size_t n = strlen(text);

        if (n > WRAP_COLUMN) {
            n = WRAP_COLUMN;
            while ((n > 1U) && (text[n] != ' ')) {
                n--;
            }
        }
        (void)fprintf(out, "# %.*s\n", (int)n, text);
        text += n;
        text += strspn(text, " ");
    }
}

void fv_config_print(const fv_config_t *config, FILE *out)
{
    char text[EXPECTED_BYTES];

    (void)fprintf(out,
                  "# fovea.conf - configuration of fovead, as fovead --print-config writes it.\n"
                  "# The environment (FV_KEY) and the command line (--key) win over this file.\n");
    for (size_t i = 0; i < fv_n_options; i++) {
        const fv_option_t *option = &fv_options[i];

        if (option->group != NULL) {
            (void)fprintf(out, "\n# ---- %s\n", option->group);
        }
        (void)fprintf(out, "\n");
        print_comment(option->help, out);
        fv_option_expected(option, text, sizeof(text));
        (void)fprintf(out, "# Expected: %s. Default: %s.\n", text, option->value);
        fv_option_print(option, config, out);
    }
}

void fv_config_print_markdown(FILE *out)
{
    char expected[EXPECTED_BYTES];
    char env[NAME_BYTES];
    char name[NAME_BYTES];

    (void)fprintf(
        out, "# Configuration\n\n"
             "Each option of `fovead` can be set in four places; a later one wins:\n\n"
             "1. its default,\n"
             "2. a line `key = value` in the file that `--config FILE` (or `FV_CONFIG`) names,\n"
             "3. the environment variable,\n"
             "4. the command line.\n\n"
             "The key in the file is the option without its dashes and with `_` for `-`. "
             "`fovead --print-config` writes the configuration that results as such a file; "
             "`deploy/config/fovea.conf` is that file with all defaults. "
             "An unknown key, a value out of range or a malformed line stops the start "
             "with a message that names key, place, what was given and what was expected. "
             "An empty environment variable counts as unset.\n");
    for (size_t i = 0; i < fv_n_options; i++) {
        const fv_option_t *option = &fv_options[i];

        if (option->group != NULL) {
            (void)fprintf(out,
                          "\n## %s\n\n"
                          "| Option | Environment | Default | Expected | What it is |\n"
                          "|---|---|---|---|---|\n",
                          option->group);
        }
        fv_option_expected(option, expected, sizeof(expected));
        fv_option_env_name(option, env, sizeof(env));
        fv_option_long_name(option, name, sizeof(name));
        (void)fprintf(out, "| `--%s` | `%s` | `%s` | %s | %s |\n", name, env, option->value,
                      expected, option->help);
    }
    (void)fprintf(out, "\n## Other\n\n"
                       "| Option | What it does |\n"
                       "|---|---|\n"
                       "| `--config FILE` | reads this file; also `FV_CONFIG` |\n"
                       "| `--print-config` | prints the configuration that results, and exits |\n"
                       "| `--help` | prints all options, and exits |\n"
                       "| `--version` | prints the version, and exits |\n");
}
