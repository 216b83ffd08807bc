/*
 * config_value.c - one option's value: text to struct, struct to text, and what is allowed, in words.
 */
#include "common/config_table.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define EXPECTED_BYTES 192
#define GIVEN_BYTES    100 /* of a bad value that an error repeats */
#define PORT_MAX       65535
#define UNIX_PATH_MAX  107 /* sun_path, less its NUL */

void fv_source_text(const fv_source_t *source, char out[FV_SOURCE_TEXT_BYTES])
{
    switch (source->kind) {
    case FV_SOURCE_FILE:
        (void)snprintf(out, FV_SOURCE_TEXT_BYTES, "%s:%d", source->name, source->line);
        break;
    case FV_SOURCE_ENV:
        (void)snprintf(out, FV_SOURCE_TEXT_BYTES, "environment variable %s", source->name);
        break;
    case FV_SOURCE_COMMAND_LINE:
        (void)snprintf(out, FV_SOURCE_TEXT_BYTES, "command line");
        break;
    case FV_SOURCE_DEFAULT:
    default:
        (void)snprintf(out, FV_SOURCE_TEXT_BYTES, "default");
        break;
    }
}

/* A number of bytes with the largest suffix that is exact. */
static void bytes_text(uint64_t bytes, char *out, size_t cap)
{
    static const char k_suffix[] = {'\0', 'k', 'm', 'g', 't'};
    size_t i = 0;

    while ((i + 1U < sizeof(k_suffix)) && (bytes != 0) && ((bytes % 1024U) == 0)) {
        bytes /= 1024U;
        i++;
    }
    (void)snprintf(out, cap, "%" PRIu64 "%.1s", bytes, &k_suffix[i]);
}

void fv_option_expected(const fv_option_t *option, char *out, size_t cap)
{
    char low[32];
    char high[32];

    bytes_text(option->min, low, sizeof(low));
    bytes_text(option->max, high, sizeof(high));
    switch (option->type) {
    case FV_OPTION_BOOL:
        (void)snprintf(out, cap, "true or false");
        break;
    case FV_OPTION_INT:
        if (option->multiple > 0) {
            (void)snprintf(out, cap, "a multiple of %" PRIu64 " in %" PRIu64 "..%" PRIu64,
                           option->multiple, option->min, option->max);
        } else {
            (void)snprintf(out, cap, "%" PRIu64 "..%" PRIu64, option->min, option->max);
        }
        break;
    case FV_OPTION_BYTES:
        (void)snprintf(out, cap, "bytes as 512k, 64m, 2g or 1t, %s..%s", low, high);
        break;
    case FV_OPTION_MEMORY:
        (void)snprintf(out, cap, "bytes as 512m, 16g or 1t, %s..%s, or 1%%..100%%", low, high);
        break;
    case FV_OPTION_CHOICE:
        (void)snprintf(out, cap, "one of: %s", option->choices);
        break;
    case FV_OPTION_ADDRESS:
        (void)snprintf(out, cap, "auto, host:port, [v6]:port or unix:/path");
        break;
    case FV_OPTION_PATH:
        (void)snprintf(out, cap, "a path without spaces, at most %d characters, or nothing",
                       FV_CONFIG_PATH_BYTES - 1);
        break;
    case FV_OPTION_ADDRESSES:
    default:
        (void)snprintf(out, cap, "host:port, [v6]:port or unix:/path, at most %d of them",
                       FV_CONFIG_ADDRESSES_MAX);
        break;
    }
}

static fv_status_t
bad_value(const fv_option_t *option, const char *given, const fv_source_t *source)
{
    char expected[EXPECTED_BYTES];
    char where[FV_SOURCE_TEXT_BYTES];

    fv_option_expected(option, expected, sizeof(expected));
    fv_source_text(source, where);
    return fv_fail(FV_ERR_INVALID_ARG, "%s: given \"%.*s\" (%.60s), expected %s", option->name,
                   GIVEN_BYTES - 40, given, where, expected);
}

/* Digits only: no sign, no spaces. Returns what follows them, NULL when there are none or too many. */
static const char *read_number(const char *text, uint64_t *out)
{
    uint64_t value = 0;
    const char *c = text;

    for (; isdigit((unsigned char)*c) != 0; c++) {
        uint64_t digit = (uint64_t)(*c - '0');

        if (value > (UINT64_MAX - digit) / 10U) {
            return NULL;
        }
        value = (value * 10U) + digit;
    }
    *out = value;
    return (c == text) ? NULL : c;
}

bool fv_bytes_parse(const char *text, uint64_t *out)
{
    static const char k_suffix[] = "kmgt";
    uint64_t value = 0;
    const char *rest = read_number(text, &value);
    unsigned shift = 0;

    if (rest == NULL) {
        return false;
    }
    if (*rest != '\0') {
        const char *found = strchr(k_suffix, tolower((unsigned char)*rest));

        if ((found == NULL) || (rest[1] != '\0')) {
            return false;
        }
        shift = 10U * (unsigned)(found - k_suffix + 1);
    }
    if (value > (UINT64_MAX >> shift)) {
        return false;
    }
    *out = value << shift;
    return true;
}

static bool is_in_range(const fv_option_t *option, uint64_t value)
{
    return (value >= option->min) && (value <= option->max) &&
           ((option->multiple == 0) || ((value % option->multiple) == 0));
}

static bool set_bool(const char *text, bool *out)
{
    static const char *const k_words[2][4] = {{"false", "no", "off", "0"},
                                              {"true", "yes", "on", "1"}};

    for (int value = 0; value < 2; value++) {
        for (size_t i = 0; i < 4; i++) {
            if (strcasecmp(text, k_words[value][i]) == 0) {
                *out = value != 0;
                return true;
            }
        }
    }
    return false;
}

static bool set_memory(const fv_option_t *option, const char *text, fv_memory_limit_t *out)
{
    uint64_t value = 0;
    const char *rest = read_number(text, &value);

    if ((rest != NULL) && (strcmp(rest, "%") == 0)) {
        *out = (fv_memory_limit_t){.percent = (value <= 100U) ? (int32_t)value : 0};
        return (value >= 1U) && (value <= 100U);
    }
    *out = (fv_memory_limit_t){0};
    return fv_bytes_parse(text, &out->bytes) && is_in_range(option, out->bytes);
}

static bool is_choice(const char *choices, const char *text)
{
    size_t n = strlen(text);

    for (const char *c = choices; (n > 0) && (c != NULL) && (*c != '\0');) {
        if ((strncmp(c, text, n) == 0) && ((c[n] == ' ') || (c[n] == '\0'))) {
            return strchr(text, ' ') == NULL;
        }
        c = strchr(c, ' ');
        c = (c == NULL) ? NULL : (c + 1);
    }
    return false;
}

/* Shape only: whether a host has a name and a path can be made is found out when listening. */
static bool is_address(const char *text)
{
    uint64_t port = 0;

    if (strlen(text) >= FV_CONFIG_TEXT_BYTES) {
        return false;
    }
    for (const char *c = text; *c != '\0'; c++) {
        if ((isgraph((unsigned char)*c) == 0) || (*c == ';') || (*c == ',')) {
            return false; /* could not be written to a file and read back */
        }
    }
    if (strncmp(text, "unix:", 5) == 0) {
        return (text[5] != '\0') && (strlen(text + 5) <= UNIX_PATH_MAX);
    }
    const char *colon = strrchr(text, ':');
    if ((colon == NULL) || (colon == text)) {
        return false;
    }
    if ((memchr(text, ':', (size_t)(colon - text)) != NULL) &&
        ((text[0] != '[') || (colon[-1] != ']'))) {
        return false; /* a v6 address needs its brackets */
    }
    const char *end = read_number(colon + 1, &port);
    return (end != NULL) && (*end == '\0') && (port <= PORT_MAX);
}

/* Whether there is such a file is found out when it is read. */
static bool set_path(const char *text, char *out)
{
    size_t n = strlen(text);

    for (size_t i = 0; i < n; i++) {
        if ((isgraph((unsigned char)text[i]) == 0) || (text[i] == ';')) {
            return false; /* could not be written to a file and read back */
        }
    }
    if (n >= FV_CONFIG_PATH_BYTES) {
        return false;
    }
    memset(out, 0, FV_CONFIG_PATH_BYTES); /* so that equal configurations are equal bytes */
    memcpy(out, text, n);
    return true;
}

/* Adds each address of a comma-separated text. */
static bool set_addresses(const char *text, fv_source_kind_t source, fv_address_list_t *out)
{
    if (out->source != (uint32_t)source) {
        *out = (fv_address_list_t){.source = (uint32_t)source};
    }
    for (;;) {
        size_t n = strcspn(text, ",");

        if ((out->n == FV_CONFIG_ADDRESSES_MAX) || (n >= FV_CONFIG_TEXT_BYTES)) {
            return false;
        }
        char *to = out->text[out->n];
        (void)snprintf(to, FV_CONFIG_TEXT_BYTES, "%.*s", (int)n, text);
        if (!is_address(to)) {
            return false;
        }
        out->n++;
        if (text[n] == '\0') {
            return true;
        }
        text += n + 1U;
        text += strspn(text, " ");
    }
}

static bool set_text(const char *text, char *out)
{
    size_t n = strlen(text);

    if (n >= FV_CONFIG_TEXT_BYTES) {
        return false;
    }
    memset(out, 0, FV_CONFIG_TEXT_BYTES); /* so that equal configurations are equal bytes */
    (void)snprintf(out, FV_CONFIG_TEXT_BYTES, "%s", text);
    return true;
}

static bool set_number(const fv_option_t *option, const char *text, void *place)
{
    uint64_t value = 0;
    const char *end = NULL;

    if (option->type == FV_OPTION_BYTES) {
        if (!fv_bytes_parse(text, &value) || !is_in_range(option, value)) {
            return false;
        }
        memcpy(place, &value, sizeof(value));
        return true;
    }
    end = read_number(text, &value);
    if ((end == NULL) || (*end != '\0') || !is_in_range(option, value)) {
        return false;
    }
    int32_t small = (int32_t)value;
    memcpy(place, &small, sizeof(small));
    return true;
}

fv_status_t fv_option_set(const fv_option_t *option,
                          const char *text,
                          const fv_source_t *source,
                          fv_config_t *config)
{
    char *place = (char *)config + option->offset;
    bool ok = false;

    switch (option->type) {
    case FV_OPTION_BOOL:
        ok = set_bool(text, (bool *)place);
        break;
    case FV_OPTION_INT:
    case FV_OPTION_BYTES:
        ok = set_number(option, text, place);
        break;
    case FV_OPTION_MEMORY:
        ok = set_memory(option, text, (void *)place);
        break;
    case FV_OPTION_CHOICE:
        ok = is_choice(option->choices, text) && set_text(text, place);
        break;
    case FV_OPTION_ADDRESS:
        ok = ((strcmp(text, "auto") == 0) || is_address(text)) && set_text(text, place);
        break;
    case FV_OPTION_PATH:
        ok = set_path(text, place);
        break;
    case FV_OPTION_ADDRESSES:
    default:
        ok = set_addresses(text, source->kind, (void *)place);
        break;
    }
    return ok ? FV_OK : bad_value(option, text, source);
}

void fv_option_print(const fv_option_t *option, const fv_config_t *config, FILE *out)
{
    const char *place = (const char *)config + option->offset;
    const fv_memory_limit_t *memory = (const void *)place;
    const fv_address_list_t *list = (const void *)place;
    uint64_t bytes = 0;
    char text[32];

    switch (option->type) {
    case FV_OPTION_BOOL:
        (void)fprintf(out, "%s = %s\n", option->name, *(const bool *)place ? "true" : "false");
        break;
    case FV_OPTION_INT:
        (void)fprintf(out, "%s = %" PRId32 "\n", option->name,
                      *(const int32_t *)(const void *)place);
        break;
    case FV_OPTION_BYTES:
    case FV_OPTION_MEMORY:
        if ((option->type == FV_OPTION_MEMORY) && (memory->percent > 0)) {
            (void)fprintf(out, "%s = %" PRId32 "%%\n", option->name, memory->percent);
            break;
        }
        memcpy(&bytes, place, sizeof(bytes)); /* both begin with the bytes */
        bytes_text(bytes, text, sizeof(text));
        (void)fprintf(out, "%s = %s\n", option->name, text);
        break;
    case FV_OPTION_CHOICE:
    case FV_OPTION_ADDRESS:
    case FV_OPTION_PATH:
        (void)fprintf(out, "%s = %s\n", option->name, place);
        break;
    case FV_OPTION_ADDRESSES:
    default:
        for (uint32_t i = 0; i < list->n; i++) {
            (void)fprintf(out, "%s = %s\n", option->name, list->text[i]);
        }
        break;
    }
}
