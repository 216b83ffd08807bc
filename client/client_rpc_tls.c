/*
 * client_rpc_tls.c - what a client shows and what it asks for: TLS credentials, its token.
 */
#include "client/client_rpc_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PEM_BYTES_MAX   ((size_t)1 << 20)
#define TOKEN_BYTES_MAX 512U
#define SYSTEM_ROOTS    "/etc/ssl/certs/ca-certificates.crt"

/* A whole file as text; the caller frees. NULL: *error says why. */
static char *read_file(const char *what, const char *path, fovea_error_t *error)
{
    FILE *file = fopen(path, "re");
    char *text = malloc(PEM_BYTES_MAX);
    size_t n = 0;

    if ((file == NULL) || (text == NULL)) {
        (void)fv_client_fail(error, FOVEA_INVALID_ARGUMENT, "%s: %s: %s", what, path,
                             strerror(errno));
        free(text);
        text = NULL;
    } else {
        n = fread(text, 1, PEM_BYTES_MAX, file);
        if ((ferror(file) != 0) || (n == 0) || (n == PEM_BYTES_MAX)) {
            (void)fv_client_fail(error, FOVEA_INVALID_ARGUMENT,
                                 "%s: %s: given %zu bytes, expected a small text file", what, path,
                                 n);
            free(text);
            text = NULL;
        } else {
            text[n] = '\0';
        }
    }
    if (file != NULL) {
        (void)fclose(file);
    }
    return text;
}

static bool is_given(const char *text)
{
    return (text != NULL) && (text[0] != '\0');
}

static grpc_channel_credentials *tls_credentials(const fovea_options_t *o, fovea_error_t *error)
{
    grpc_channel_credentials *credentials = NULL;
    char *roots = read_file("ca_file", is_given(o->ca_file) ? o->ca_file : SYSTEM_ROOTS, error);
    char *certificate = NULL;
    char *key = NULL;
    bool has_own = is_given(o->cert_file);

    if (has_own && (roots != NULL)) {
        certificate = read_file("cert_file", o->cert_file, error);
        key = (certificate == NULL) ? NULL : read_file("key_file", o->key_file, error);
    }
    if ((roots != NULL) && (!has_own || (key != NULL))) {
        grpc_ssl_pem_key_cert_pair pair = {.private_key = key, .cert_chain = certificate};
        credentials = grpc_ssl_credentials_create_ex(roots, has_own ? &pair : NULL, NULL, NULL);
        if (credentials == NULL) {
            (void)fv_client_fail(error, FOVEA_INVALID_ARGUMENT,
                                 "ca_file, cert_file, key_file: gRPC takes them for no PEM files");
        }
    }
    if (key != NULL) {
        memset(key, 0, strlen(key));
    }
    free(key);
    free(certificate);
    free(roots);
    return credentials;
}

grpc_channel_credentials *fv_rpc_credentials(const fovea_options_t *o, fovea_error_t *error)
{
    if (is_given(o->cert_file) != is_given(o->key_file)) {
        (void)fv_client_fail(error, FOVEA_INVALID_ARGUMENT,
                             "cert_file, key_file: given one of them, expected both or none");
        return NULL;
    }
    if (o->tls || is_given(o->ca_file) || is_given(o->cert_file)) {
        return tls_credentials(o, error);
    }
    return grpc_insecure_credentials_create();
}

/* Visible ASCII: anything else would be no header, and gRPC would end the call without saying why. */
static fovea_code_t set_token(fv_channel_t *channel, const char *token, fovea_error_t *error)
{
    char header[TOKEN_BYTES_MAX + 16U];
    size_t n = strlen(token);

    for (size_t i = 0; i < n; i++) {
        if ((token[i] <= ' ') || (token[i] > '~') || (n >= TOKEN_BYTES_MAX)) {
            return fv_client_fail(error, FOVEA_INVALID_ARGUMENT,
                                  "token: expected fewer than %u visible characters, no spaces",
                                  TOKEN_BYTES_MAX);
        }
    }
    (void)snprintf(header, sizeof(header), "Bearer %s", token);
    channel->token = (grpc_metadata){.key = grpc_slice_from_static_string("authorization"),
                                     .value = grpc_slice_from_copied_string(header)};
    channel->has_token = true;
    memset(header, 0, sizeof(header));
    return FOVEA_OK;
}

fovea_code_t
fv_channel_set_token(fv_channel_t *channel, const fovea_options_t *o, fovea_error_t *error)
{
    if (is_given(o->token) && is_given(o->token_file)) {
        return fv_client_fail(error, FOVEA_INVALID_ARGUMENT,
                              "token, token_file: given both, expected one");
    }
    if (is_given(o->token)) {
        return set_token(channel, o->token, error);
    }
    if (!is_given(o->token_file)) {
        return FOVEA_OK;
    }
    fovea_error_t why = {0};
    char *text = read_file("token_file", o->token_file, &why);
    if (text == NULL) {
        return fv_client_fail(error, why.code, "%s", why.message);
    }
    text[strcspn(text, "\r\n")] = '\0';
    fovea_code_t code = set_token(channel, text, error);
    memset(text, 0, strlen(text));
    free(text);
    return code;
}
