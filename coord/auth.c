/*
 * auth.c - the token table in force, and its replacement when the file changes.
 *
 * Constant time. What a client shows is hashed first; the table is searched by the first 8 bytes of the hash, which nobody
 * can steer without inverting SHA-256, and the rest is compared in constant time.
 */
#include "coord/auth.h"

#include "common/clock.h"
#include "common/log.h"
#include "coord/reload.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <time.h>

#define LOOK_EVERY_S 1
#define SCHEME       "Bearer "

/* One token of the table in force. */
typedef struct fv_table_entry {
    uint8_t sha256[FV_SHA256_BYTES];
    fv_grant_t *grant; /* one reference */
} fv_table_entry_t;

typedef struct fv_auth_table {
    fv_table_entry_t *entries; /* ascending hash */
    size_t n;
} fv_auth_table_t;

struct fv_auth {
    const char *path; /* NULL: no tokens */
    char *path_text;
    fv_grant_t *anonymous;

    pthread_mutex_t lock; /* guards what follows */
    fv_auth_table_t table;
    struct stat seen;            /* of the file that was read last */
    fv_reload_t reload;          /* of a file that could not be read */
    time_t looked_s;             /* when it was looked at last */
    fv_principal_t **principals; /* [n_principals] every one ever named, ascending name */
    size_t n_principals;
};

void fv_grant_ref(fv_grant_t *grant)
{
    (void)atomic_fetch_add_explicit(&grant->n_refs, 1U, memory_order_relaxed);
}

void fv_grant_unref(fv_grant_t *grant)
{
    if ((grant != NULL) &&
        (atomic_fetch_sub_explicit(&grant->n_refs, 1U, memory_order_acq_rel) == 1U)) {
        free(grant);
    }
}

static fv_grant_t *grant_create(fv_principal_t *principal, int64_t expires_s)
{
    fv_grant_t *grant = calloc(1, sizeof(*grant));

    if (grant != NULL) {
        grant->principal = principal;
        grant->expires_s = expires_s;
        atomic_init(&grant->n_refs, 1U);
    }
    return grant;
}

/* ------------------------------------------------------------------ principals; lock held, or not shared yet */

static size_t principal_place(const fv_auth_t *auth, const char *name)
{
    size_t low = 0;
    size_t high = auth->n_principals;

    while (low < high) {
        size_t middle = low + ((high - low) / 2U);
        if (strcmp(auth->principals[middle]->name, name) < 0) {
            low = middle + 1U;
        } else {
            high = middle;
        }
    }
    return low;
}

/* The principal called `name`, a new one if need be; NULL when out of memory. */
static fv_principal_t *principal_named(fv_auth_t *auth, const char *name)
{
    size_t at = principal_place(auth, name);

    if ((at < auth->n_principals) && (strcmp(auth->principals[at]->name, name) == 0)) {
        return auth->principals[at];
    }
    fv_principal_t **all =
        realloc(auth->principals, (auth->n_principals + 1U) * sizeof(fv_principal_t *));
    fv_principal_t *principal = calloc(1, sizeof(*principal));
    if (all != NULL) {
        auth->principals = all;
    }
    if ((all == NULL) || (principal == NULL)) {
        free(principal);
        return NULL;
    }
    memcpy(principal->name, name, strlen(name) + 1U);
    memmove(all + at + 1U, all + at, (auth->n_principals - at) * sizeof(fv_principal_t *));
    all[at] = principal;
    auth->n_principals++;
    return principal;
}

static void set_limits(fv_principal_t *principal, const fv_token_line_t *line)
{
    atomic_store_explicit(&principal->role, line->role, memory_order_relaxed);
    atomic_store_explicit(&principal->sessions_max, line->quota.sessions, memory_order_relaxed);
    atomic_store_explicit(&principal->kv_bytes_max, line->quota.kv_bytes, memory_order_relaxed);
    atomic_store_explicit(&principal->requests_max, line->quota.requests, memory_order_relaxed);
    uint64_t n_models = (line->quota.models == 0) ? FV_TOKEN_MODELS_DEFAULT : line->quota.models;
    atomic_store_explicit(&principal->models_max, n_models, memory_order_relaxed);
    atomic_store_explicit(&principal->bytes_per_second, line->quota.bytes_per_second,
                          memory_order_relaxed);
}

/* ------------------------------------------------------------------ tables; lock held, or not shared yet */

static void table_free(fv_auth_table_t *table)
{
    for (size_t i = 0; i < table->n; i++) {
        fv_grant_unref(table->entries[i].grant);
    }
    free(table->entries);
    *table = (fv_auth_table_t){0};
}

static uint64_t prefix_of(const uint8_t *sha256)
{
    uint64_t prefix = 0;

    for (int i = 0; i < 8; i++) {
        prefix = (prefix << 8U) | sha256[i];
    }
    return prefix;
}

static fv_table_entry_t *find_token(const fv_auth_table_t *table, const uint8_t *sha256)
{
    uint64_t prefix = prefix_of(sha256);
    fv_table_entry_t *found = NULL;
    size_t low = 0;
    size_t high = table->n;

    while (low < high) {
        size_t middle = low + ((high - low) / 2U);
        if (prefix_of(table->entries[middle].sha256) < prefix) {
            low = middle + 1U;
        } else {
            high = middle;
        }
    }
    for (; (low < table->n) && (prefix_of(table->entries[low].sha256) == prefix); low++) {
        if (fv_secret_equal(table->entries[low].sha256, sha256, FV_SHA256_BYTES)) {
            found = &table->entries[low];
        }
    }
    return found;
}

/* A table of the file's lines. A token that was there before keeps its grant, so that streams go on. */
static fv_status_t
table_create(fv_auth_t *auth, const fv_token_line_t *lines, size_t n, fv_auth_table_t *out)
{
    fv_auth_table_t table = {.entries = calloc(n + 1U, sizeof(fv_table_entry_t))};

    if (table.entries == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "%zu tokens", n);
    }
    for (; table.n < n; table.n++) {
        const fv_token_line_t *line = &lines[table.n];
        fv_principal_t *principal = principal_named(auth, line->name);
        fv_table_entry_t *old = find_token(&auth->table, line->sha256);
        fv_grant_t *grant = NULL;
        if ((old != NULL) && (old->grant->principal == principal) &&
            (old->grant->expires_s == line->expires_s)) {
            grant = old->grant;
            fv_grant_ref(grant);
        } else if (principal != NULL) {
            grant = grant_create(principal, line->expires_s);
        }
        if (grant == NULL) {
            table_free(&table);
            return fv_fail(FV_ERR_NO_MEMORY, "%zu tokens", n);
        }
        table.entries[table.n].grant = grant;
        memcpy(table.entries[table.n].sha256, line->sha256, FV_SHA256_BYTES);
    }
    *out = table;
    return FV_OK;
}

/* Puts `next` in force: grants that are not in it any more are revoked. */
static void replace_table(fv_auth_t *auth, const fv_auth_table_t *next)
{
    for (size_t i = 0; i < auth->table.n; i++) {
        const fv_table_entry_t *kept = find_token(next, auth->table.entries[i].sha256);
        if ((kept == NULL) || (kept->grant != auth->table.entries[i].grant)) {
            atomic_store(&auth->table.entries[i].grant->is_revoked, true);
        }
    }
    table_free(&auth->table);
    auth->table = *next;
}

static fv_status_t load(fv_auth_t *auth)
{
    fv_token_line_t *lines = NULL;
    fv_auth_table_t next = {0};
    size_t n = 0;

    if (stat(auth->path, &auth->seen) != 0) {
        memset(&auth->seen, 0, sizeof(auth->seen));
    }
    FV_RETURN_IF_ERR(fv_token_file_load(auth->path, &lines, &n));
    fv_status_t status = table_create(auth, lines, n, &next);
    if (status == FV_OK) {
        for (size_t i = 0; i < n; i++) {
            set_limits(next.entries[i].grant->principal, &lines[i]);
        }
        replace_table(auth, &next);
        fv_info("tokens: %zu of %s", n, auth->path);
    }
    free(lines);
    return status;
}

/* is_new: it has changed, or somebody asked for it; else a retry. */
static void reload(fv_auth_t *auth, bool is_new)
{
    if (load(auth) == FV_OK) {
        fv_reload_succeeded(&auth->reload);
    } else {
        (void)fv_reload_failed(&auth->reload, "tokens: the last good file stays in force", is_new,
                               fv_clock_us());
    }
}

static bool has_changed(const struct stat *a, const struct stat *b)
{
    return (a->st_ino != b->st_ino) || (a->st_size != b->st_size) || (a->st_dev != b->st_dev) ||
           (a->st_mode != b->st_mode) || (a->st_mtim.tv_sec != b->st_mtim.tv_sec) ||
           (a->st_mtim.tv_nsec != b->st_mtim.tv_nsec);
}

/* Lock held. A file that is not there stays unread: it may be on its way from one place to another. */
static void look(fv_auth_t *auth, time_t now_s)
{
    struct stat now;

    if ((now_s - auth->looked_s < LOOK_EVERY_S) && (now_s >= auth->looked_s)) {
        return;
    }
    auth->looked_s = now_s;
    if (stat(auth->path, &now) == 0) {
        bool is_new = has_changed(&now, &auth->seen);
        if (is_new || fv_reload_is_due(&auth->reload, fv_clock_us())) {
            reload(auth, is_new);
        }
    }
}

/* ------------------------------------------------------------------ life */

fv_status_t fv_auth_create(const char *path, fv_auth_t **out)
{
    fv_auth_t *auth = calloc(1, sizeof(*auth));
    fv_principal_t *nobody = NULL;

    if (auth == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "auth");
    }
    (void)pthread_mutex_init(&auth->lock, NULL);
    nobody = principal_named(auth, "anonymous");
    if (nobody != NULL) {
        atomic_store(&nobody->role, FV_ROLE_ADMIN);
        auth->anonymous = grant_create(nobody, FV_TOKEN_NEVER);
    }
    fv_status_t status =
        (auth->anonymous != NULL) ? FV_OK : fv_fail(FV_ERR_NO_MEMORY, "auth: no memory");
    if ((status == FV_OK) && (path != NULL) && (path[0] != '\0')) {
        auth->path_text = strdup(path);
        auth->path = auth->path_text;
        auth->looked_s = time(NULL);
        status = (auth->path != NULL) ? load(auth) : fv_fail(FV_ERR_NO_MEMORY, "auth: no memory");
    }
    if (status != FV_OK) {
        fv_auth_destroy(auth);
        return status;
    }
    *out = auth;
    return FV_OK;
}

void fv_auth_destroy(fv_auth_t *auth)
{
    if (auth == NULL) {
        return;
    }
    table_free(&auth->table);
    fv_grant_unref(auth->anonymous);
    for (size_t i = 0; i < auth->n_principals; i++) {
        free(auth->principals[i]);
    }
    free(auth->principals);
    free(auth->path_text);
    (void)pthread_mutex_destroy(&auth->lock);
    free(auth);
}

fv_principal_t *fv_auth_principal(fv_auth_t *auth, const char *name)
{
    (void)pthread_mutex_lock(&auth->lock);
    fv_principal_t *principal = principal_named(auth, name);
    (void)pthread_mutex_unlock(&auth->lock);
    return principal;
}

bool fv_auth_is_required(const fv_auth_t *auth)
{
    return auth->path != NULL;
}

void fv_auth_reload(fv_auth_t *auth)
{
    if (auth->path != NULL) {
        (void)pthread_mutex_lock(&auth->lock);
        reload(auth, true);
        (void)pthread_mutex_unlock(&auth->lock);
    }
}

/* ------------------------------------------------------------------ checks */

static fv_status_t check_grant(const fv_grant_t *grant, time_t now_s)
{
    if (atomic_load_explicit(&grant->is_revoked, memory_order_relaxed)) {
        return fv_fail(FV_ERR_UNAUTHENTICATED, "authorization: the token is not valid any more");
    }
    if ((int64_t)now_s >= grant->expires_s) {
        return fv_fail(FV_ERR_UNAUTHENTICATED, "authorization: the token has expired");
    }
    return FV_OK;
}

fv_status_t fv_auth_check(fv_auth_t *auth, const char *header, size_t n_chars, fv_grant_t **out)
{
    uint8_t sha256[FV_SHA256_BYTES];
    size_t n_scheme = strlen(SCHEME);
    time_t now_s = time(NULL);

    if (auth->path == NULL) {
        fv_grant_ref(auth->anonymous);
        *out = auth->anonymous;
        return FV_OK;
    }
    if ((header == NULL) || (n_chars <= n_scheme) || (strncasecmp(header, SCHEME, n_scheme) != 0)) {
        return fv_fail(FV_ERR_UNAUTHENTICATED, "authorization: given %s, expected \"Bearer TOKEN\"",
                       (header == NULL) ? "none" : "another scheme");
    }
    if (n_chars - n_scheme >= FV_TOKEN_TEXT_BYTES) {
        return fv_fail(FV_ERR_UNAUTHENTICATED, "authorization: given a longer token than any");
    }
    FV_RETURN_IF_ERR(fv_sha256(header + n_scheme, n_chars - n_scheme, sha256));
    (void)pthread_mutex_lock(&auth->lock);
    look(auth, now_s);
    fv_table_entry_t *entry = find_token(&auth->table, sha256);
    fv_status_t status = FV_OK;
    if (entry == NULL) {
        status = fv_fail(FV_ERR_UNAUTHENTICATED, "authorization: the token is not known here");
    } else {
        status = check_grant(entry->grant, now_s);
    }
    if (status == FV_OK) {
        fv_grant_ref(entry->grant);
        *out = entry->grant;
    }
    (void)pthread_mutex_unlock(&auth->lock);
    return status;
}

fv_status_t fv_auth_recheck(fv_auth_t *auth, const fv_grant_t *grant)
{
    if (auth->path == NULL) {
        return FV_OK;
    }
    time_t now_s = time(NULL);
    (void)pthread_mutex_lock(&auth->lock);
    look(auth, now_s);
    (void)pthread_mutex_unlock(&auth->lock);
    return check_grant(grant, now_s);
}
