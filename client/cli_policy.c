/*
 * cli_policy.c - patterns and lists of layers on the command line.
 */
#include "client/cli.h"

#include <stdlib.h>
#include <string.h>

#define LAYERS_MAX 1024U

static long parse_long(struct argp_state *state, const char *option, const char *text)
{
    char *end = NULL;
    long value = strtol((text == NULL) ? "" : text, &end, 10);

    if ((text == NULL) || (end == text) || (*end != '\0') || (value > INT32_MAX) ||
        (value < INT32_MIN)) {
        argp_error(state, "--s2: %s: given \"%s\", expected a number", option,
                   (text == NULL) ? "" : text);
    }
    return value;
}

static uint32_t parse_count(struct argp_state *state, const char *option, const char *text)
{
    long value = parse_long(state, option, text);

    if (value < 0) {
        argp_error(state, "--s2: %s: given %ld, expected 0 or more", option, value);
    }
    return (uint32_t)value;
}

/* Which of the words `item` is; the number of words when none. */
static size_t word_of(const char *item)
{
    static const char *const k_words[] = {"block",  "local", "stride", "step",
                                          "offset", "dense", "homo",   "per"};
    size_t i = 0;

    while ((i < sizeof(k_words) / sizeof(k_words[0])) && (strcmp(item, k_words[i]) != 0)) {
        i++;
    }
    return i;
}

static fovea_pattern_per_t parse_per(struct argp_state *state, const char *value)
{
    if ((value == NULL) || ((strcmp(value, "q") != 0) && (strcmp(value, "kv") != 0))) {
        argp_error(state, "--s2: per: given \"%s\", expected kv or q",
                   (value == NULL) ? "" : value);
        return FOVEA_PATTERN_KV_HEAD;
    }
    return (strcmp(value, "q") == 0) ? FOVEA_PATTERN_Q_HEAD : FOVEA_PATTERN_KV_HEAD;
}

static void set_word(struct argp_state *state, fovea_s2_t *s2, const char *item, const char *value)
{
    switch (word_of(item)) {
    case 0:
        s2->block_tokens = parse_count(state, item, value);
        break;
    case 1:
        s2->local_blocks = parse_count(state, item, value);
        break;
    case 2:
        s2->vert_stride = parse_count(state, item, value);
        break;
    case 3:
        s2->head_sliding_step = (int32_t)parse_long(state, item, value);
        break;
    case 4:
        s2->head_sliding_offset = (int32_t)parse_long(state, item, value);
        break;
    case 5:
        s2->num_dense_heads = parse_count(state, item, value);
        break;
    case 6:
        s2->homo_head = true;
        break;
    case 7:
        s2->pattern_per = parse_per(state, value);
        break;
    default:
        argp_error(state,
                   "--s2: given \"%s\", expected block, local, stride, step, offset, dense, homo "
                   "or per",
                   item);
    }
}

fovea_s2_t fv_cli_s2(struct argp_state *state, char *text)
{
    fovea_s2_t s2 = {0};
    char *rest = NULL;

    if (strchr(text, '=') == NULL) {
        s2.preset = text; /* the library knows which there are */
        return s2;
    }
    for (char *item = strtok_r(text, ",", &rest); item != NULL; item = strtok_r(NULL, ",", &rest)) {
        char *value = strchr(item, '=');

        if (value != NULL) {
            *value++ = '\0';
        }
        set_word(state, &s2, item, value);
    }
    return s2;
}

/* One number of a list, up to one of `ends`. */
static uint32_t
layer_number(struct argp_state *state, const char **text, uint32_t n_layers, const char *all)
{
    char *end = NULL;
    unsigned long value = strtoul(*text, &end, 10);

    if ((end == *text) || (**text < '0') || (**text > '9') || (value >= n_layers)) {
        argp_error(state,
                   "--s2-layers: given \"%s\", expected layers below %u (even, odd, 0-30:2,31)",
                   all, n_layers);
    }
    *text = end;
    return (uint32_t)value;
}

static bool accept(const char **text, char c)
{
    if (**text != c) {
        return false;
    }
    (*text)++;
    return true;
}

uint32_t fv_cli_layers(struct argp_state *state, const char *text, uint32_t n_layers, uint32_t *out)
{
    const char *at = text;
    uint32_t n = 0;

    n_layers = (n_layers < LAYERS_MAX) ? n_layers : LAYERS_MAX;
    if ((strcmp(text, "even") == 0) || (strcmp(text, "odd") == 0)) {
        for (uint32_t i = (text[0] == 'o') ? 1U : 0U; i < n_layers; i += 2U) {
            out[n++] = i;
        }
        return n;
    }
    do {
        uint32_t first = layer_number(state, &at, n_layers, text);
        uint32_t last = accept(&at, '-') ? layer_number(state, &at, n_layers, text) : first;
        uint32_t step = accept(&at, ':') ? layer_number(state, &at, n_layers, text) : 1U;

        for (uint32_t i = first; (step > 0) && (i <= last) && (n < LAYERS_MAX); i += step) {
            out[n++] = i;
        }
    } while (accept(&at, ','));
    if ((*at != '\0') || (n == 0)) {
        argp_error(state, "--s2-layers: given \"%s\", expected a list such as 0-30:2,31", text);
    }
    return n;
}
