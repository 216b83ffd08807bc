/*
 * token.c - one line of a token file: text to struct and back.
 */
#include "common/token.h"

#include "common/config_table.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define WORD_BYTES 160

const char *fv_role_str(fv_role_t role)
{
    return (role == FV_ROLE_ADMIN) ? "admin" : "user";
}

bool fv_token_name_is_valid(const char *name)
{
    size_t n = strlen(name);

    if ((n == 0) || (n >= FV_TOKEN_NAME_BYTES) || (strcmp(name, "anonymous") == 0) ||
        (strncmp(name, FV_TOKEN_PREFIX, strlen(FV_TOKEN_PREFIX)) == 0)) {
        return false; /* the last: names are shown, so a token in their place must not be one */
    }
    for (size_t i = 0; i < n; i++) {
        if ((isalnum((unsigned char)name[i]) == 0) && (strchr("._@-", name[i]) == NULL)) {
            return false;
        }
    }
    return true;
}

/*
 * Errors say what was expected and never what was given: a token may stand where it should not.
 */

/* ------------------------------------------------------------------ time */

/* `n` digits at *at, which moves past them and past `after` (NUL: nothing). */
static bool take_number(const char **at, int n, char after, int *out)
{
    int value = 0;

    for (int i = 0; i < n; i++, (*at)++) {
        if (isdigit((unsigned char)**at) == 0) {
            return false;
        }
        value = (value * 10) + (**at - '0');
    }
    if (after != '\0') {
        if (**at != after) {
            return false;
        }
        (*at)++;
    }
    *out = value;
    return true;
}

static bool read_time(const char *text, struct tm *out)
{
    bool is_date = take_number(&text, 4, '-', &out->tm_year) &&
                   take_number(&text, 2, '-', &out->tm_mon) &&
                   take_number(&text, 2, '\0', &out->tm_mday);

    out->tm_year -= 1900;
    out->tm_mon -= 1;
    if (!is_date || (*text == '\0')) {
        return is_date;
    }
    return (*text++ == 'T') && take_number(&text, 2, ':', &out->tm_hour) &&
           take_number(&text, 2, ':', &out->tm_min) && take_number(&text, 2, 'Z', &out->tm_sec) &&
           (*text == '\0');
}

fv_status_t fv_token_time_parse(const char *text, int64_t *out_unix_s)
{
    struct tm given = {0};
    bool is_time = read_time(text, &given);
    struct tm same = given;
    time_t unix_s = is_time ? timegm(&same) : 0;

    /* timegm() takes the 31st of February for a day in March: then it changes its argument */
    if (!is_time || (same.tm_mon != given.tm_mon) || (same.tm_mday != given.tm_mday) ||
        (same.tm_hour != given.tm_hour) || (same.tm_min != given.tm_min) ||
        (same.tm_sec != given.tm_sec) || (same.tm_year != given.tm_year)) {
        return fv_fail(FV_ERR_INVALID_ARG, "expires: expected YYYY-MM-DD or YYYY-MM-DDThh:mm:ssZ");
    }
    *out_unix_s = (int64_t)unix_s;
    return FV_OK;
}

/* ------------------------------------------------------------------ words */

static fv_status_t
set_quota(const char *key, const char *value, bool is_bytes, uint64_t max, uint64_t *out)
{
    uint64_t n = 0;
    bool is_number =
        fv_bytes_parse(value, &n) && (is_bytes || (value[strspn(value, "0123456789")] == '\0'));

    if (!is_number || (n == 0) || (n > max)) {
        return fv_fail(FV_ERR_INVALID_ARG, "%s: expected %s of at least 1 (no entry: no limit)",
                       key, is_bytes ? "bytes as 512m or 16g," : "a number");
    }
    *out = n;
    return FV_OK;
}

static fv_status_t set_word(const char *word, fv_token_line_t *line, bool *has_hash)
{
    static const struct {
        const char *key;
        bool is_bytes;
        size_t offset;
    } k_quotas[] = {
        {"sessions", false, offsetof(fv_quota_t, sessions)},
        {"kv_bytes", true, offsetof(fv_quota_t, kv_bytes)},
        {"requests", false, offsetof(fv_quota_t, requests)},
        {"bytes_per_second", true, offsetof(fv_quota_t, bytes_per_second)},
        {"models", false, offsetof(fv_quota_t, models)},
    };
    const char *equals = strchr(word, '=');
    size_t n = (equals == NULL) ? 0 : (size_t)(equals - word);

    if ((n == 6) && (memcmp(word, "sha256", n) == 0)) {
        *has_hash = fv_hex_parse(equals + 1, FV_SHA256_BYTES, line->sha256);
        return *has_hash ? FV_OK
                         : fv_fail(FV_ERR_INVALID_ARG,
                                   "sha256: expected the 64 hex digits of the token's SHA-256");
    }
    if ((n == 7) && (memcmp(word, "expires", n) == 0)) {
        return fv_token_time_parse(equals + 1, &line->expires_s);
    }
    for (size_t i = 0; i < sizeof(k_quotas) / sizeof(k_quotas[0]); i++) {
        if ((n == strlen(k_quotas[i].key)) && (memcmp(word, k_quotas[i].key, n) == 0)) {
            uint64_t *place = (uint64_t *)(void *)((char *)&line->quota + k_quotas[i].offset);
            return set_quota(k_quotas[i].key, equals + 1, k_quotas[i].is_bytes, (uint64_t)1 << 60,
                             place);
        }
    }
    return fv_fail(FV_ERR_INVALID_ARG,
                   "a word that is none of sha256=, expires=, sessions=, kv_bytes=, requests=, "
                   "bytes_per_second=, models=");
}

/* The next word at *at; false at the end, or when it is too long (*out is empty then). */
static bool next_word(const char **at, char out[WORD_BYTES])
{
    *at += strspn(*at, " \t\r");
    size_t n = strcspn(*at, " \t\r");

    out[0] = '\0';
    if (n < WORD_BYTES) {
        memcpy(out, *at, n);
        out[n] = '\0';
    }
    *at += n;
    return n > 0;
}

fv_status_t fv_token_line_parse(const char *text, fv_token_line_t *out)
{
    fv_token_line_t line = {.expires_s = FV_TOKEN_NEVER};
    char word[WORD_BYTES];
    bool has_hash = false;

    (void)next_word(&text, word);
    if (!fv_token_name_is_valid(word)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "name: expected 1..%d letters, digits and ._@-, not \"anonymous\" and not "
                       "beginning with " FV_TOKEN_PREFIX,
                       FV_TOKEN_NAME_BYTES - 1);
    }
    memcpy(line.name, word, strlen(word) + 1U); /* it is short enough: checked */
    (void)next_word(&text, word);
    if ((strcmp(word, "user") != 0) && (strcmp(word, "admin") != 0)) {
        return fv_fail(FV_ERR_INVALID_ARG, "role: expected user or admin after the name");
    }
    line.role = (word[0] == 'a') ? FV_ROLE_ADMIN : FV_ROLE_USER;
    while (next_word(&text, word)) {
        FV_RETURN_IF_ERR(set_word(word, &line, &has_hash));
    }
    if (!has_hash) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "sha256: expected the 64 hex digits of the token's SHA-256");
    }
    *out = line;
    return FV_OK;
}

/* ------------------------------------------------------------------ writing */

static size_t add_quota(char *out, size_t n, const char *key, uint64_t value)
{
    if (value != 0) {
        n += (size_t)snprintf(out + n, FV_TOKEN_LINE_BYTES - n, " %s=%" PRIu64, key, value);
    }
    return n;
}

void fv_token_line_format(const fv_token_line_t *line, char out[FV_TOKEN_LINE_BYTES])
{
    char hex[(2 * FV_SHA256_BYTES) + 1];
    struct tm t = {0};
    time_t unix_s = (time_t)line->expires_s;

    fv_hex_format(line->sha256, FV_SHA256_BYTES, hex);
    size_t n = (size_t)snprintf(out, FV_TOKEN_LINE_BYTES, "%s %s sha256=%s", line->name,
                                fv_role_str(line->role), hex);
    if ((line->expires_s != FV_TOKEN_NEVER) && (gmtime_r(&unix_s, &t) != NULL)) {
        n += (size_t)snprintf(out + n, FV_TOKEN_LINE_BYTES - n,
                              " expires=%04d-%02d-%02dT%02d:%02d:%02dZ", t.tm_year + 1900,
                              t.tm_mon + 1, t.tm_mday, t.tm_hour, t.tm_min, t.tm_sec);
    }
    n = add_quota(out, n, "sessions", line->quota.sessions);
    n = add_quota(out, n, "kv_bytes", line->quota.kv_bytes);
    n = add_quota(out, n, "requests", line->quota.requests);
    n = add_quota(out, n, "bytes_per_second", line->quota.bytes_per_second);
    (void)add_quota(out, n, "models", line->quota.models);
}
