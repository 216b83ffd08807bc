/*
 * auth.h - principals: who a call comes from, what it may do, how much it may use.
 *
 * A principal is a name in the token file. Its sessions are visible to itself alone (and to admins); its quotas hold for
 * all its connections together. Without a token file there is one principal, "anonymous", an admin without quotas.
 *
 * A grant is what a valid token opened: calls keep a reference to theirs. A token that is taken out of the file, or that
 * expires, ends the streams that it opened at their next message.
 *
 * Principals live as long as the fv_auth_t: sessions point to their owner. The file is looked at at most once a second, when
 * somebody asks, and read again when it has changed; a file that has become bad is reported once, tried again
 * from time to time (reload.h), and the last good one stays.
 */
#ifndef FV_COORD_AUTH_H
#define FV_COORD_AUTH_H

#include "common/status.h"
#include "common/token.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct fv_auth fv_auth_t;

typedef struct fv_principal {
    char name[FV_TOKEN_NAME_BYTES];
    /* as the file has them now; may change at any time (relaxed) */
    _Atomic(fv_role_t) role;
    _Atomic(uint64_t) sessions_max, kv_bytes_max, requests_max, bytes_per_second,
        models_max; /* 0 = no limit */
    /* used; the engine's turn guards them */
    uint64_t n_sessions;
    uint64_t n_models;         /* registered by it first; those that came back count, too */
    uint64_t kv_bytes;         /* committed */
    uint64_t kv_bytes_pending; /* of requests in the step that runs */
    atomic_uint n_requests;    /* in flight */
    /* token bucket of bytes_per_second; thread: rpc */
    int64_t bucket_bytes, bucket_us;
} fv_principal_t;

typedef struct fv_grant {
    fv_principal_t *principal;
    int64_t expires_s;
    atomic_bool is_revoked;
    atomic_uint n_refs;
} fv_grant_t;

/* path: "" or NULL = no tokens. Errors: as fv_token_file_load(). */
FV_MUST_CHECK fv_status_t fv_auth_create(const char *path, fv_auth_t **out);
void fv_auth_destroy(fv_auth_t *auth); /* NULL is fine; no session, no grant is used any more */

/* The principal of that name; one that the file does not have (any more) may do nothing and limits nothing. NULL: no memory.
 * Thread: any. */
fv_principal_t *fv_auth_principal(fv_auth_t *auth, const char *name);

/* True when clients must show a token. */
bool fv_auth_is_required(const fv_auth_t *auth);

/* Reads the file now, changed or not (SIGHUP). A bad file is logged, and the last good one stays. Thread: any. */
void fv_auth_reload(fv_auth_t *auth);

/*
 * Whom `header`, the value of `authorization` ("Bearer TOKEN"; NULL: none was sent), admits. *out: one reference.
 * Errors: FV_ERR_UNAUTHENTICATED: none given, not of this form, unknown, expired; the text never has the token.
 * Thread: any.
 */
FV_MUST_CHECK fv_status_t fv_auth_check(fv_auth_t *auth,
                                        const char *header,
                                        size_t n_chars,
                                        fv_grant_t **out);

/* Whether it still holds. Errors: FV_ERR_UNAUTHENTICATED. Thread: any. */
FV_MUST_CHECK fv_status_t fv_auth_recheck(fv_auth_t *auth, const fv_grant_t *grant);

void fv_grant_ref(fv_grant_t *grant);
void fv_grant_unref(fv_grant_t *grant); /* NULL is fine */

/* ------------------------------------------------------------------ what a principal may; NULL: everything */

bool fv_principal_is_admin(const fv_principal_t *principal);

/* Whether it may see what `owner` owns. */
bool fv_principal_may_see(const fv_principal_t *principal, const fv_principal_t *owner);

/* ------------------------------------------------------------------ quotas; FV_ERR_EXHAUSTED with numbers */

/* Before anything of a request is read: whether one more would be let in. Takes nothing. Thread: rpc. */
FV_MUST_CHECK fv_status_t fv_principal_check_request(fv_principal_t *principal, int64_t now_us);
/* One more request of n_bytes, in flight until fv_principal_end_request(). Thread: rpc. */
FV_MUST_CHECK fv_status_t fv_principal_begin_request(fv_principal_t *principal,
                                                     uint64_t n_bytes,
                                                     int64_t now_us);
void fv_principal_end_request(fv_principal_t *principal); /* thread: any */
/* What comes in, served or refused, costs at least this of bytes_per_second: about what headers and frames take. */
#define FV_REQUEST_BYTES_MIN 256
/*
 * A message of n_bytes that was no begun request: refused, or a small one. Its bytes have come in all the same, so they are paid
 * for, up to some seconds' worth of debt: who floods has used his quota up, who errs can soon go on. Thread: rpc.
 */
void fv_principal_charge(fv_principal_t *principal, uint64_t n_bytes, int64_t now_us);

/* Room for one more session. The turn is held. */
FV_MUST_CHECK fv_status_t fv_principal_check_session(const fv_principal_t *principal);
/* Room for one more model that nobody has registered yet. The turn is held. */
FV_MUST_CHECK fv_status_t fv_principal_check_model(const fv_principal_t *principal);
/* Room for n_bytes more of KV, besides what is committed and pending. The turn is held. */
FV_MUST_CHECK fv_status_t fv_principal_check_kv(const fv_principal_t *principal, uint64_t n_bytes);

#endif /* FV_COORD_AUTH_H */
