/*
 * rpc_tls.c - TLS on a listening address: certificate and key from files, read again when they change.
 *
 * gRPC asks for the certificate at every handshake (on its own threads); we look whether the files have changed, at the
 * cost of three stat(). What changed is taken only when certificate and key belong together, so a pair that is being
 * replaced file by file is taken when the second has arrived; until then, and for files gone bad, the last good pair
 * serves; such files are tried again from time to time (reload.h). Connections that stand are not touched. TLS 1.2 at least (gRPC's own default).
 */
#include "common/clock.h"
#include "common/log.h"
#include "coord/reload.h"
#include "coord/rpc_internal.h"

#include <grpc/grpc_security.h>

#include <errno.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define PEM_BYTES_MAX ((size_t)1 << 20)
#define N_FILES       3

enum {
    FV_PEM_CERT,
    FV_PEM_KEY,
    FV_PEM_CLIENT_CA,
};

typedef struct fv_pem_set {
    char *text[N_FILES]; /* NULL: none */
} fv_pem_set_t;

struct fv_tls {
    char path[N_FILES][FV_TLS_PATH_BYTES]; /* "": none */
    pthread_mutex_t lock;                  /* guards what follows */
    struct stat seen[N_FILES];
    fv_reload_t reload;
    bool has_served;
};

static void free_set(fv_pem_set_t *set)
{
    for (size_t i = 0; i < N_FILES; i++) {
        if (set->text[i] != NULL) {
            OPENSSL_cleanse(set->text[i], strlen(set->text[i]));
        }
        free(set->text[i]);
        set->text[i] = NULL;
    }
}

static fv_status_t read_pem(const char *path, char **out)
{
    FILE *file = fopen(path, "re");
    char *text = malloc(PEM_BYTES_MAX);
    size_t n = 0;

    if ((file != NULL) && (text != NULL)) {
        n = fread(text, 1, PEM_BYTES_MAX, file);
    }
    fv_status_t status = FV_OK;
    if (text == NULL) {
        status = fv_fail(FV_ERR_NO_MEMORY, "tls: %zu bytes", PEM_BYTES_MAX);
    } else if ((file == NULL) || (ferror(file) != 0)) {
        status = fv_fail(FV_ERR_INVALID_ARG, "tls: %.160s: %s", path,
                         (file == NULL) ? strerror(errno) : "cannot be read");
    } else if ((n == 0) || (n == PEM_BYTES_MAX)) {
        status = fv_fail(FV_ERR_INVALID_ARG, "tls: %.160s: given %zu bytes, expected a PEM file",
                         path, n);
    }
    if (file != NULL) {
        (void)fclose(file);
    }
    if (status != FV_OK) {
        free(text);
        return status;
    }
    text[n] = '\0';
    *out = text;
    return FV_OK;
}

/* A key that asks for a passphrase is refused, not asked about on the terminal. */
static int no_passphrase(char *text, int size, int is_writing, void *arg)
{
    (void)text;
    (void)size;
    (void)is_writing;
    (void)arg;
    return -1;
}

static X509 *first_certificate(const char *pem)
{
    BIO *bio = BIO_new_mem_buf(pem, -1);
    X509 *certificate = (bio == NULL) ? NULL : PEM_read_bio_X509(bio, NULL, no_passphrase, NULL);

    (void)BIO_free(bio);
    return certificate;
}

static fv_status_t check_pair(const fv_tls_t *tls, const fv_pem_set_t *set)
{
    BIO *bio = BIO_new_mem_buf(set->text[FV_PEM_KEY], -1);
    EVP_PKEY *key = (bio == NULL) ? NULL : PEM_read_bio_PrivateKey(bio, NULL, no_passphrase, NULL);
    X509 *certificate = first_certificate(set->text[FV_PEM_CERT]);
    fv_status_t status = FV_OK;

    if (certificate == NULL) {
        status = fv_fail(FV_ERR_INVALID_ARG, "tls_cert: %.160s: expected a certificate in PEM form",
                         tls->path[FV_PEM_CERT]);
    } else if (key == NULL) {
        status = fv_fail(FV_ERR_INVALID_ARG,
                         "tls_key: %.160s: expected a private key in PEM form, without passphrase",
                         tls->path[FV_PEM_KEY]);
    } else if (X509_check_private_key(certificate, key) != 1) {
        status = fv_fail(FV_ERR_INVALID_ARG,
                         "tls_key: %.100s: is not the key of the certificate in %.100s",
                         tls->path[FV_PEM_KEY], tls->path[FV_PEM_CERT]);
    } else if (X509_cmp_current_time(X509_get0_notAfter(certificate)) < 0) {
        fv_warn("tls_cert: %s has expired: clients will refuse it", tls->path[FV_PEM_CERT]);
    }
    X509_free(certificate);
    EVP_PKEY_free(key);
    (void)BIO_free(bio);
    ERR_clear_error();
    return status;
}

static fv_status_t check_client_ca(const fv_tls_t *tls, const fv_pem_set_t *set)
{
    if (set->text[FV_PEM_CLIENT_CA] == NULL) {
        return FV_OK;
    }
    X509 *certificate = first_certificate(set->text[FV_PEM_CLIENT_CA]);
    ERR_clear_error();
    if (certificate == NULL) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "tls_client_ca: %.160s: expected certificates in PEM form",
                       tls->path[FV_PEM_CLIENT_CA]);
    }
    X509_free(certificate);
    return FV_OK;
}

/* All files, checked. */
static fv_status_t read_set(const fv_tls_t *tls, fv_pem_set_t *out)
{
    fv_pem_set_t set = {{NULL}};
    fv_status_t status = FV_OK;

    for (size_t i = 0; (i < N_FILES) && (status == FV_OK); i++) {
        if (tls->path[i][0] != '\0') {
            status = read_pem(tls->path[i], &set.text[i]);
        }
    }
    if (status == FV_OK) {
        status = check_pair(tls, &set);
    }
    if (status == FV_OK) {
        status = check_client_ca(tls, &set);
    }
    if (status != FV_OK) {
        free_set(&set);
        return status;
    }
    *out = set;
    return FV_OK;
}

/* Lock held. Notes what it sees. */
static bool has_changed(fv_tls_t *tls)
{
    bool changed = false;

    for (size_t i = 0; i < N_FILES; i++) {
        struct stat now;
        struct stat *seen = &tls->seen[i];
        if ((tls->path[i][0] == '\0') || (stat(tls->path[i], &now) != 0)) {
            continue; /* gone: on its way, perhaps */
        }
        changed = changed || (now.st_ino != seen->st_ino) || (now.st_size != seen->st_size) ||
                  (now.st_mtim.tv_sec != seen->st_mtim.tv_sec) ||
                  (now.st_mtim.tv_nsec != seen->st_mtim.tv_nsec);
        *seen = now;
    }
    return changed;
}

/* gRPC's question before each handshake. Thread: any of gRPC's. */
static grpc_ssl_certificate_config_reload_status fetch(void *arg,
                                                       grpc_ssl_server_certificate_config **out)
{
    fv_tls_t *tls = arg;
    fv_pem_set_t set = {{NULL}};
    grpc_ssl_certificate_config_reload_status answer = GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;

    (void)pthread_mutex_lock(&tls->lock);
    int64_t now_us = fv_clock_us();
    bool is_new = has_changed(tls);
    if (is_new || !tls->has_served || fv_reload_is_due(&tls->reload, now_us)) {
        if (read_set(tls, &set) == FV_OK) {
            grpc_ssl_pem_key_cert_pair pair = {.private_key = set.text[FV_PEM_KEY],
                                               .cert_chain = set.text[FV_PEM_CERT]};
            /* gRPC insists on roots from a fetcher; where no client certificate is asked for, they are not used */
            const char *roots = (set.text[FV_PEM_CLIENT_CA] != NULL) ? set.text[FV_PEM_CLIENT_CA]
                                                                     : set.text[FV_PEM_CERT];
            *out = grpc_ssl_server_certificate_config_create(roots, &pair, 1);
            answer = GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
            if (tls->has_served) {
                fv_info("tls: new certificate from %s", tls->path[FV_PEM_CERT]);
            }
            tls->has_served = true;
            fv_reload_succeeded(&tls->reload);
            free_set(&set);
        } else {
            (void)fv_reload_failed(&tls->reload, "tls: the last good certificate stays in force",
                                   is_new, now_us);
        }
    }
    (void)pthread_mutex_unlock(&tls->lock);
    return answer;
}

static fv_status_t set_path(const char *key, const char *given, char *out)
{
    int n = snprintf(out, FV_TLS_PATH_BYTES, "%s", (given == NULL) ? "" : given);

    if (n >= FV_TLS_PATH_BYTES) {
        return fv_fail(FV_ERR_INVALID_ARG, "%s: given %d characters, expected fewer than %d", key,
                       n, FV_TLS_PATH_BYTES);
    }
    return FV_OK;
}

fv_status_t fv_tls_create(const fv_rpc_config_t *config, fv_tls_t **out)
{
    fv_pem_set_t set = {{NULL}};
    fv_tls_t *tls = calloc(1, sizeof(*tls));

    if (tls == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "tls");
    }
    (void)pthread_mutex_init(&tls->lock, NULL);
    fv_status_t status = set_path("tls_cert", config->tls_cert, tls->path[FV_PEM_CERT]);
    if (status == FV_OK) {
        status = set_path("tls_key", config->tls_key, tls->path[FV_PEM_KEY]);
    }
    if (status == FV_OK) {
        status = set_path("tls_client_ca", config->tls_client_ca, tls->path[FV_PEM_CLIENT_CA]);
    }
    if ((status == FV_OK) &&
        ((tls->path[FV_PEM_CERT][0] == '\0') || (tls->path[FV_PEM_KEY][0] == '\0'))) {
        status = fv_fail(FV_ERR_INVALID_ARG,
                         "tls_cert, tls_key: given one of them, or tls_client_ca alone, expected "
                         "certificate and key");
    }
    if (status == FV_OK) {
        status = read_set(tls, &set);
    }
    free_set(&set);
    if (status != FV_OK) {
        fv_tls_destroy(tls);
        return status;
    }
    *out = tls;
    return FV_OK;
}

struct grpc_server_credentials *fv_tls_credentials(fv_tls_t *tls)
{
    grpc_ssl_client_certificate_request_type request =
        (tls->path[FV_PEM_CLIENT_CA][0] == '\0')
            ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
            : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY;

    return grpc_ssl_server_credentials_create_with_options(
        grpc_ssl_server_credentials_create_options_using_config_fetcher(request, fetch, tls));
}

void fv_tls_destroy(fv_tls_t *tls)
{
    if (tls != NULL) {
        (void)pthread_mutex_destroy(&tls->lock);
        free(tls);
    }
}
