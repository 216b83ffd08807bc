/*
 * token.h - the token file: who may use a service, and how much of it.
 *
 * A token is a random text that a client shows; the file holds only its SHA-256. One line each, empty lines and those that
 * begin with # apart:
 *
 *   NAME user|admin sha256=HEX [expires=2027-01-31|2027-01-31T12:00:00Z] [sessions=N] [kv_bytes=16g] [requests=N]
 *        [bytes_per_second=500m] [models=N]
 *
 * NAME is the principal: sessions and quotas are its own. Several lines may give a principal several tokens (to replace one
 * while the other still works); role and quotas must then be the same in all of them. `fovea token` writes such lines.
 */
#ifndef FV_COMMON_TOKEN_H
#define FV_COMMON_TOKEN_H

#include "common/secret.h"
#include "common/status.h"

#include <stddef.h>
#include <stdint.h>

#define FV_TOKEN_NAME_BYTES 64    /* with NUL; letters, digits and ._@- */
#define FV_TOKEN_TEXT_BYTES 512   /* of a token as a client shows it, with NUL */
#define FV_TOKEN_LINE_BYTES 512   /* with NUL */
#define FV_TOKENS_MAX       65536 /* lines of a file */
#define FV_TOKEN_NEVER      INT64_MAX
#define FV_TOKEN_PREFIX     "fv_" /* of the tokens that `fovea token` makes */

typedef enum fv_role {
    FV_ROLE_USER = 0, /* its own sessions, and the service's status */
    FV_ROLE_ADMIN,    /* everybody's sessions, and Drain */
} fv_role_t;

const char *fv_role_str(fv_role_t role);

#define FV_TOKEN_MODELS_DEFAULT 16 /* of the 64 that a service holds for everybody */

/* 0 = no limit of its own; of models: FV_TOKEN_MODELS_DEFAULT. */
typedef struct fv_quota {
    uint64_t models;           /* that it was the first to register: they stay */
    uint64_t sessions;         /* open at once */
    uint64_t kv_bytes;         /* of the KV cache, in whole pages; a fork counts in full */
    uint64_t requests;         /* in flight at once */
    uint64_t bytes_per_second; /* of request messages; two seconds' worth may come at once */
} fv_quota_t;

typedef struct fv_token_line {
    char name[FV_TOKEN_NAME_BYTES];
    fv_role_t role;
    uint8_t sha256[FV_SHA256_BYTES];
    int64_t expires_s; /* unix seconds from which on it is refused; FV_TOKEN_NEVER */
    fv_quota_t quota;
} fv_token_line_t;

/* `text`: without its newline. Errors: FV_ERR_INVALID_ARG; the text never repeats what was given. */
FV_MUST_CHECK fv_status_t fv_token_line_parse(const char *text, fv_token_line_t *out);

/* The line, without a newline; fv_token_line_parse() reads it back. */
void fv_token_line_format(const fv_token_line_t *line, char out[FV_TOKEN_LINE_BYTES]);

/* "2027-01-31" (its first second, UTC) or "2027-01-31T12:00:00Z". */
FV_MUST_CHECK fv_status_t fv_token_time_parse(const char *text, int64_t *out_unix_s);

/* Letters, digits and ._@-, 1..63 of them; not "anonymous", not beginning with FV_TOKEN_PREFIX. */
bool fv_token_name_is_valid(const char *name);

/*
 * Reads a whole file. *out: [*out_n], the caller's to free(). Errors: FV_ERR_NOT_FOUND when it cannot be opened;
 * FV_ERR_INVALID_ARG naming file and line: a bad line, a token twice, a principal of two roles or quotas; or a file that
 * others may write.
 */
FV_MUST_CHECK fv_status_t fv_token_file_load(const char *path,
                                             fv_token_line_t **out,
                                             size_t *out_n);

#endif /* FV_COMMON_TOKEN_H */
